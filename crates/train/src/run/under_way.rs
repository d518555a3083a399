//! The loop: steps with their evaluations, metrics and checkpoints, then the final model and the questions.
//!
//! An interrupt is looked for between steps, between batches of an evaluation and between tokens of an answer. An evaluation that it
//! cuts short leaves the step's metrics line without one, and whoever resumes the run makes it first; so a run that was interrupted
//! anywhere ends with the files it would have had.

use std::time::Instant;

use burn::module::Module;
use mixtura_checkpoint::{CheckpointStore, Family, Retention, SaveOptions, save_model};
use mixtura_infer::StepError;
use mixtura_infer::available::{Available, gib};
use mixtura_kernels::roofline;
use mixtura_kernels::ways::Choice;
use mixtura_nn::ParameterCounts;

use super::RunOptions;
use super::report::{RunReport, Status, StepSeconds};
use crate::config::RunConfig;
use crate::cost::{peak_memory, training_flops_per_token};
use crate::error::TrainError;
use crate::evaluate::{self, LossReport};
use crate::memory::MemoryPlan;
use crate::metrics::{EvalMetrics, MetricsFile, StepMetrics};
use crate::progress::{Progress, Reading, Verbosity, warn};
use crate::run_dir::RunDir;
use crate::trainer::{StepTime, Trainer, token_ids};

/// The parts of a data set that are not trained on.
pub(super) struct HeldBack {
    pub(super) tokenizer: mixtura_data::Tokenizer,
    pub(super) validation: mixtura_data::ValidationSet,
    pub(super) evaluation: Vec<mixtura_data::propositions::EvaluationItem>,
}

/// A run under way.
pub(super) struct Run<'a> {
    config: RunConfig,
    dir: RunDir,
    trainer: Trainer,
    held_back: HeldBack,
    options: &'a RunOptions,
    store: CheckpointStore,
    metrics: MetricsFile,
    parameters: ParameterCounts,
    memory: MemoryPlan,
    started: Instant,
    time: StepTime,
    steps_here: u64,
    tokens_before: u64,
    last_loss: Option<f64>,
    last_saved: Option<u64>,
    last_eval: Option<(u64, LossReport)>,
    smooth_loss: Option<f64>,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        config: RunConfig,
        dir: RunDir,
        trainer: Trainer,
        held_back: HeldBack,
        memory: MemoryPlan,
        options: &'a RunOptions,
    ) -> Result<Self, TrainError> {
        let store = CheckpointStore::open(&dir.checkpoints(), Retention { last: config.train.keep_last, best: true })?;
        let parameters = config.model.parameter_counts().map_err(|e| TrainError::Model(e.to_string()))?;
        let metrics = MetricsFile::open(&dir.metrics(), trainer.steps())?;
        metrics.remarks().iter().for_each(|remark| warn(&format!("{}: {remark}", dir.metrics().display())));
        Ok(Self {
            tokens_before: trainer.tokens(),
            last_loss: metrics.last().map(|line| line.loss),
            last_saved: (trainer.steps() > 0).then(|| trainer.steps()),
            config,
            dir,
            trainer,
            held_back,
            options,
            store,
            metrics,
            parameters,
            memory,
            started: Instant::now(),
            time: StepTime::default(),
            steps_here: 0,
            last_eval: None,
            smooth_loss: None,
        })
    }

    /// Makes the steps that are left. `remarks` are said after the first line.
    pub(super) fn carry_out(mut self, remarks: &[String]) -> Result<RunReport, TrainError> {
        let steps = self.config.train.steps;
        let last = self.options.stop_after.map_or(steps, |stop| stop.min(steps));
        let peak = (self.options.verbosity > Verbosity::Quiet)
            .then(|| 1e9 * roofline::compute_peak(self.trainer.numerics().isa, self.trainer.numerics().precision));
        let mut progress = Progress::new(self.trainer.steps(), steps, self.options.verbosity);
        self.introduce(&progress);
        remarks.iter().for_each(|remark| progress.say(remark));
        self.complete_last_step(&progress)?;
        while self.trainer.steps() < last && !self.interrupted() {
            let (mut metrics, time) = self.trainer.step()?;
            self.time.add(&time);
            self.steps_here += 1;
            self.last_loss = Some(metrics.loss);
            self.show(&mut progress, &metrics, peak);
            if self.evaluation_due() {
                metrics.eval = self.evaluate(&progress)?;
            }
            self.metrics.write(&metrics)?;
            if self.due(self.config.train.checkpoint_every) || self.trainer.steps() == steps {
                self.save(&progress)?;
            }
        }
        let made = self.trainer.steps();
        let status = match () {
            () if self.interrupted() => Status::Interrupted,
            () if made < steps => Status::Stopped,
            () => Status::Done,
        };
        if made > 0 {
            self.save(&progress)?;
        }
        if status == Status::Done {
            self.save_final()?;
        }
        progress.finish();
        self.report(status, &progress)
    }

    fn interrupted(&self) -> bool {
        self.options.interrupt.requested()
    }

    fn due(&self, every: u64) -> bool {
        every > 0 && self.trainer.steps().is_multiple_of(every)
    }

    /// After every `eval_every` steps and after the last.
    fn evaluation_due(&self) -> bool {
        self.due(self.config.train.eval_every) || self.trainer.steps() == self.config.train.steps
    }

    /// What an interrupt left out after the step that is being resumed: its evaluation, and with it the checkpoint's rank. After the
    /// last step the evaluation is made in any case: the report is about to show it.
    fn complete_last_step(&mut self, progress: &Progress) -> Result<(), TrainError> {
        let incomplete = self.metrics.last().filter(|line| line.eval.is_none()).cloned();
        let step = self.trainer.steps();
        if step == 0 || !self.evaluation_due() || (incomplete.is_none() && step < self.config.train.steps) {
            return Ok(());
        }
        let eval = self.evaluate(progress)?;
        if let (Some(line), true) = (incomplete, eval.is_some()) {
            self.metrics.replace_last(&StepMetrics { eval, ..line })?;
            self.last_saved = None;
            self.save(progress)?;
        }
        Ok(())
    }

    fn introduce(&self, progress: &Progress) {
        let ParameterCounts { total, active, .. } = self.parameters;
        progress.say(&format!(
            "{}: {} parameters, {} active per token; {} steps of {} tokens; {}; {} threads",
            self.dir.root().display(),
            crate::table::grouped(total as u64),
            crate::table::grouped(active as u64),
            self.config.train.steps,
            crate::table::grouped(self.config.tokens_per_step()),
            self.precision(),
            rayon::current_num_threads(),
        ));
        let (_, _, note) = Choice::like(self.config.train.precision, self.config.train.way);
        note.into_iter().for_each(|note| progress.say(&note));
        let left =
            Available::now().map_or_else(String::new, |left| format!("; {} leaves {}", left.bound, gib(left.bytes)));
        progress.say(&format!("memory: about {} at most{left}", gib(self.memory.total)));
        progress.detail(&format!("memory, part by part: {}", self.memory));
        if self.trainer.steps() > 0 {
            progress.say(&format!("resumed after step {}", self.trainer.steps()));
        }
    }

    /// "bf16-native by fma, because VDPBF16PS runs at 0.5x the rate of FMAs here (...), on avx512", "f32 on avx2".
    fn precision(&self) -> String {
        let (precision, choice, _) = Choice::like(self.config.train.precision, self.config.train.way);
        if !precision.is_bf16() {
            return format!("{precision} on {}", choice.isa);
        }
        format!("{precision} by {}, because {}, on {}", choice.way, choice.reason, choice.isa)
    }

    fn show(&mut self, progress: &mut Progress, metrics: &StepMetrics, peak: Option<f64>) {
        let smooth = self.smooth_loss.map_or(metrics.loss, |old| 0.9 * old + 0.1 * metrics.loss);
        self.smooth_loss = Some(smooth);
        let tokens_per_second = self.tokens_here() as f64 / self.time.whole;
        let flops = training_flops_per_token(&self.config.model, self.config.data.context);
        progress.update(&Reading {
            step: metrics.step,
            loss: smooth,
            tokens_per_second,
            roofline: peak.map(|peak| tokens_per_second * flops / peak),
            balance: metrics.layers.iter().map(|layer| layer.max_over_mean).reduce(f64::max),
        });
    }

    fn tokens_here(&self) -> u64 {
        self.trainer.tokens() - self.tokens_before
    }

    /// The loss on the validation split after this step; `None` if there is no split, or if an interrupt came first.
    fn evaluate(&mut self, progress: &Progress) -> Result<Option<EvalMetrics>, TrainError> {
        let step = self.trainer.steps();
        let model = self.trainer.model.valid();
        let HeldBack { tokenizer, validation, .. } = &self.held_back;
        let batches = validation.batches().take_while(|_| !self.interrupted());
        let report = evaluate::loss(&model, batches, tokenizer, self.trainer.numerics()).map_err(|e| {
            TrainError::Forward { during: format!("the evaluation after step {step}"), source: e.into() }
        })?;
        let Some(report) = report.filter(|_| !self.interrupted()) else { return Ok(None) };
        let LossReport { loss, perplexity, tokens, .. } = report;
        if step < self.config.train.steps {
            progress.say(&format!("step {step}: validation loss {loss:.4}"));
        }
        self.last_eval = Some((step, report));
        Ok(Some(EvalMetrics { loss, perplexity, tokens }))
    }

    fn save(&mut self, progress: &Progress) -> Result<(), TrainError> {
        let step = self.trainer.steps();
        if self.last_saved == Some(step) {
            return Ok(());
        }
        let metric = self.last_eval.as_ref().filter(|(at, _)| *at == step).map(|(_, report)| report.loss);
        let path = self.trainer.save(&self.store, metric, &self.held_back.tokenizer)?;
        self.last_saved = Some(step);
        progress.detail(&format!("saved {}", path.display()));
        Ok(())
    }

    fn save_final(&self) -> Result<(), TrainError> {
        let tokenizer = &self.held_back.tokenizer;
        let options = SaveOptions {
            ids: token_ids(tokenizer),
            files: self.trainer.model_files(tokenizer),
            ..SaveOptions::default()
        };
        let family = Family::of(&self.config.model);
        Ok(save_model(&self.dir.final_model(), &self.trainer.model, family, &options)?)
    }

    fn report(mut self, mut status: Status, progress: &Progress) -> Result<RunReport, TrainError> {
        let finished = status == Status::Done;
        let (mut accuracy, mut samples) = (None, Vec::new());
        let questions = self.config.train.questions;
        if finished && questions > 0 && !self.held_back.evaluation.is_empty() {
            let soft = self.config.model.moe.as_ref().and_then(|moe| moe.soft);
            if let Some(soft) = soft.filter(|soft| soft.leak().is_some()) {
                progress
                    .say(&format!("no questions asked: a {} layer sees the future and cannot generate", soft.kind()));
            } else {
                progress.say("answering questions");
                self.trainer.finish();
                let model = self.trainer.model.valid();
                let HeldBack { tokenizer, evaluation, .. } = &self.held_back;
                let (numerics, interrupt) = (self.trainer.numerics(), &self.options.interrupt);
                let failed = |source: StepError| TrainError::Forward { during: "answering questions".into(), source };
                accuracy = evaluate::accuracy(&model, evaluation, questions, tokenizer, numerics, interrupt)
                    .map_err(failed)?;
                samples = evaluate::samples(&model, evaluation, tokenizer, numerics, interrupt).map_err(failed)?;
                if self.interrupted() {
                    status = Status::Interrupted;
                }
            }
        }
        let per_step = |seconds: f64| seconds / self.steps_here.max(1) as f64;
        let step = self.trainer.steps();
        Ok(RunReport {
            run: self.dir.root().to_path_buf(),
            status,
            step,
            tokens: self.trainer.tokens(),
            training_seconds: self.time.whole,
            seconds: self.started.elapsed().as_secs_f64(),
            tokens_per_second: self.tokens_here() as f64 / self.time.whole.max(f64::MIN_POSITIVE),
            loss: self.last_loss,
            parameters: self.parameters,
            eval: self.last_eval.filter(|(at, _)| *at == step).map(|(_, report)| report),
            accuracy,
            samples,
            memory: self.memory,
            peak_memory: peak_memory(),
            step_seconds: StepSeconds {
                data: per_step(self.time.data),
                forward: per_step(self.time.forward),
                backward: per_step(self.time.backward),
                optimizer: per_step(self.time.optimizer),
                overhead: per_step(self.time.overhead()),
            },
            finished,
        })
    }
}
