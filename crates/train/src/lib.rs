//! The training loop: optimizer, schedules, evaluation, metrics, checkpoints, resume.
