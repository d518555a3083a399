//! Checkpoints: safetensors, Hugging Face families, and training state.
