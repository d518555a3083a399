//! A run from its first to its last file: data, directory, steps, evaluations, checkpoints, and the report at the end.
//!
//! Order matters. Everything that can be refused (config, data, model) is looked at before the run directory is made; the directory
//! is locked before anything is written into it; the metrics line of a step is written before the checkpoint that claims it.

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::Module;
use mixtura_checkpoint::{CheckpointStore, Family, Retention, SaveOptions, TokenIds, save_model};
use mixtura_data::Dataset;
use mixtura_kernels::roofline;
use mixtura_nn::{ForwardError, ParameterCounts};
use serde::Serialize;

use crate::config::RunConfig;
use crate::cost::{peak_memory, training_flops_per_token};
use crate::error::{ConfigError, TrainError};
use crate::evaluate::{self, Accuracy, LossReport, Sample};
use crate::interrupt::Interrupt;
use crate::memory::{self, Available, MemoryPlan, gib};
use crate::metrics::{EvalMetrics, MetricsFile, StepMetrics};
use crate::progress::{Progress, Reading, Verbosity};
use crate::run_dir::{RunDir, write_whole};
use crate::trainer::{StepTime, Trainer, model_files};

/// What decides how a run is carried out, but not what it computes.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Saves and stops after this many steps in all.
    pub stop_after: Option<u64>,
    /// How much is said on stderr.
    pub verbosity: Verbosity,
    /// Asks the run to save and stop.
    pub interrupt: Interrupt,
    /// Starts even if the memory that the run needs is not there.
    pub force: bool,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// All steps made, final model written.
    Done,
    /// Stopped where `--stop-after` said.
    Stopped,
    /// Stopped by a signal, after saving.
    Interrupted,
}

/// What a run has to say at its end.
#[derive(Debug, Clone, Serialize)]
pub struct RunReport {
    /// The run directory.
    pub run: PathBuf,
    /// How it ended.
    pub status: Status,
    /// Optimizer steps made, in all.
    pub step: u64,
    /// Tokens read, in all.
    pub tokens: u64,
    /// Seconds of training steps in this process, evaluation and checkpoints left out.
    pub training_seconds: f64,
    /// Seconds of this process in all.
    pub seconds: f64,
    /// Tokens per second over the training steps of this process.
    pub tokens_per_second: f64,
    /// Loss of the last step.
    pub loss: f64,
    /// Parameters, all and active.
    pub parameters: ParameterCounts,
    /// Loss on the validation split, at the end of a whole run.
    pub eval: Option<LossReport>,
    /// Accuracy on propositions, at the end of a whole run on them.
    pub accuracy: Option<Accuracy>,
    /// Questions and answers, likewise.
    pub samples: Vec<Sample>,
    /// The memory that the run was reckoned to hold, part by part, in bytes.
    pub memory: MemoryPlan,
    /// Most memory held, in bytes.
    pub peak_memory: Option<u64>,
    /// Mean seconds per step spent on data, forward, backward, optimizer and the loop itself.
    pub step_seconds: StepSeconds,
}

/// Where the time of a mean step went.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct StepSeconds {
    /// Waiting for data.
    pub data: f64,
    /// Forward.
    pub forward: f64,
    /// Backward.
    pub backward: f64,
    /// Norm, clipping, AdamW.
    pub optimizer: f64,
    /// Everything else: metrics, progress, bookkeeping.
    pub overhead: f64,
}

/// Starts a run in `out`, or in a fresh directory under `runs/`.
pub fn start(mut config: RunConfig, out: Option<&Path>, options: &RunOptions) -> Result<RunReport, TrainError> {
    let data = mixtura_data::open(&config.data)?;
    config.fit_vocabulary(data.tokenizer.vocab_size())?;
    let memory = plan_memory(&config, options)?;
    let trainer_config = config.clone();
    let Dataset { tokenizer, train, validation, evaluation, .. } = data;
    let trainer = Trainer::new(&trainer_config, train)?;
    let dir = RunDir::create(out, &config.name)?;
    write_whole(&dir.config(), &config.to_toml())?;
    let held_back = HeldBack { tokenizer, validation, evaluation };
    Run::new(config, dir, trainer, held_back, memory, options)?.carry_out()
}

/// What the run will hold, or the refusal of one that cannot be held. The data is in memory already.
fn plan_memory(config: &RunConfig, options: &RunOptions) -> Result<MemoryPlan, TrainError> {
    let held = memory::held();
    let plan = MemoryPlan::of(config, held);
    match Available::now() {
        Some(available) if !options.force && plan.total.saturating_sub(held) > available.bytes => {
            let way_out = MemoryPlan::way_out(config, held, available.bytes);
            Err(TrainError::Memory { plan, available, way_out })
        }
        _ => Ok(plan),
    }
}

/// Goes on with the run in `path` from its newest intact checkpoint, or from the start if it has none.
pub fn resume(path: &Path, options: &RunOptions) -> Result<RunReport, TrainError> {
    let dir = RunDir::reopen(path)?;
    let file = dir.config();
    let text = std::fs::read_to_string(&file).map_err(|e| TrainError::io("read", &file, e))?;
    let config = RunConfig::parse(&text, &file.display().to_string(), &[])?;
    if dir.final_model().exists() {
        return Err(TrainError::RunDirectory {
            path: path.to_path_buf(),
            message: format!("this run has made all its {} steps; its model is in final/", config.train.steps),
        });
    }
    let Dataset { tokenizer, train, validation, evaluation, .. } = mixtura_data::open(&config.data)?;
    let memory = plan_memory(&config, options)?;
    let mut trainer = Trainer::new(&config, train)?;
    let (checkpoint, damaged) = mixtura_checkpoint::newest_loadable(&dir.checkpoints())?;
    if options.verbosity > Verbosity::Quiet {
        damaged.iter().for_each(|error| eprintln!("warning: a damaged checkpoint is passed over: {error}"));
    }
    if let Some(checkpoint) = checkpoint {
        trainer.restore(&checkpoint)?;
    }
    let held_back = HeldBack { tokenizer, validation, evaluation };
    Run::new(config, dir, trainer, held_back, memory, options)?.carry_out()
}

/// The parts of a data set that are not trained on.
struct HeldBack {
    tokenizer: mixtura_data::Tokenizer,
    validation: mixtura_data::ValidationSet,
    evaluation: Vec<mixtura_data::propositions::EvaluationItem>,
}

/// A run under way.
struct Run<'a> {
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
    last_saved: Option<u64>,
    last_eval: Option<(u64, LossReport)>,
    smooth_loss: Option<f64>,
}

impl<'a> Run<'a> {
    fn new(
        config: RunConfig,
        dir: RunDir,
        trainer: Trainer,
        held_back: HeldBack,
        memory: MemoryPlan,
        options: &'a RunOptions,
    ) -> Result<Self, TrainError> {
        let store = CheckpointStore::open(&dir.checkpoints(), Retention { last: config.train.keep_last, best: true })?;
        let metrics = MetricsFile::open(&dir.metrics(), trainer.steps())?;
        let parameters = config.model.parameter_counts().map_err(|e| TrainError::Model(e.to_string()))?;
        Ok(Self {
            tokens_before: trainer.tokens(),
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

    fn carry_out(mut self) -> Result<RunReport, TrainError> {
        let steps = self.config.train.steps;
        let last = self.options.stop_after.map_or(steps, |stop| stop.min(steps));
        let peak = (self.options.verbosity > Verbosity::Quiet)
            .then(|| 1e9 * roofline::compute_peak(self.trainer.numerics().isa, self.config.train.precision));
        let mut progress = Progress::new(self.trainer.steps(), steps, self.options.verbosity);
        self.introduce(&progress);
        let mut last_loss = f64::NAN;
        let mut status = if last < steps { Status::Stopped } else { Status::Done };
        while self.trainer.steps() < last {
            if self.options.interrupt.requested() {
                status = Status::Interrupted;
                break;
            }
            let (mut metrics, time) = self.trainer.step()?;
            self.time.add(&time);
            self.steps_here += 1;
            last_loss = metrics.loss;
            self.show(&mut progress, &metrics, peak);
            let step = self.trainer.steps();
            if self.due(self.config.train.eval_every) && step < steps {
                let report = self.evaluate()?;
                metrics.eval = report.as_ref().map(eval_metrics);
                if let Some(report) = report {
                    progress.say(&format!("step {step}: validation loss {:.4}", report.loss));
                    self.last_eval = Some((step, report));
                }
            }
            let finished = step == steps;
            let report = if finished { self.evaluate()? } else { None };
            if let Some(report) = report {
                metrics.eval = Some(eval_metrics(&report));
                self.last_eval = Some((step, report));
            }
            self.metrics.write(&metrics)?;
            if self.due(self.config.train.checkpoint_every) || finished {
                self.save(&progress)?;
            }
        }
        if status != Status::Done && self.trainer.steps() > 0 {
            self.save(&progress)?;
        }
        progress.finish();
        self.report(status, last_loss, &progress)
    }

    fn due(&self, every: u64) -> bool {
        every > 0 && self.trainer.steps().is_multiple_of(every)
    }

    fn introduce(&self, progress: &Progress) {
        let ParameterCounts { total, active, .. } = self.parameters;
        progress.say(&format!(
            "{}: {} parameters, {} active per token; {} steps of {} tokens; {} on {}; {} threads",
            self.dir.root().display(),
            crate::table::grouped(total as u64),
            crate::table::grouped(active as u64),
            self.config.train.steps,
            crate::table::grouped(self.config.tokens_per_step()),
            self.config.train.precision,
            self.trainer.numerics().isa,
            rayon::current_num_threads(),
        ));
        let left =
            Available::now().map_or_else(String::new, |left| format!("; {} leaves {}", left.bound, gib(left.bytes)));
        progress.say(&format!("memory: about {} at most{left}", gib(self.memory.total)));
        progress.detail(&format!("memory, part by part: {}", self.memory));
        if self.trainer.steps() > 0 {
            progress.say(&format!("resumed after step {}", self.trainer.steps()));
        }
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

    fn evaluate(&self) -> Result<Option<LossReport>, TrainError> {
        let model = self.trainer.model.valid();
        let HeldBack { tokenizer, validation, .. } = &self.held_back;
        evaluate::loss(&model, validation.batches(), tokenizer, self.trainer.numerics()).map_err(|e| self.forward(&e))
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

    fn report(mut self, status: Status, loss: f64, progress: &Progress) -> Result<RunReport, TrainError> {
        let (mut accuracy, mut samples) = (None, Vec::new());
        if status == Status::Done {
            self.save_final()?;
            let questions = self.config.train.questions;
            let asks = questions > 0 && !self.held_back.evaluation.is_empty();
            let soft = self.config.model.moe.as_ref().and_then(|moe| moe.soft);
            if let Some(soft) = soft.filter(|soft| asks && soft.leak().is_some()) {
                progress
                    .say(&format!("no questions asked: a {} layer sees the future and cannot generate", soft.kind()));
            } else if asks {
                progress.say("answering questions");
                self.trainer.finish();
                let model = self.trainer.model.valid();
                let HeldBack { tokenizer, evaluation, .. } = &self.held_back;
                let numerics = self.trainer.numerics();
                let refuse = |e: ForwardError| self.forward(&e);
                accuracy = evaluate::accuracy(&model, evaluation, questions, tokenizer, numerics).map_err(refuse)?;
                samples = evaluate::samples(&model, evaluation, tokenizer, numerics).map_err(refuse)?;
            }
        }
        let per_step = |seconds: f64| seconds / self.steps_here.max(1) as f64;
        Ok(RunReport {
            run: self.dir.root().to_path_buf(),
            status,
            step: self.trainer.steps(),
            tokens: self.trainer.tokens(),
            training_seconds: self.time.whole,
            seconds: self.started.elapsed().as_secs_f64(),
            tokens_per_second: self.tokens_here() as f64 / self.time.whole.max(f64::MIN_POSITIVE),
            loss,
            parameters: self.parameters,
            eval: self
                .last_eval
                .as_ref()
                .filter(|(at, _)| *at == self.trainer.steps())
                .map(|(_, report)| report.clone()),
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
        })
    }

    fn save_final(&self) -> Result<(), TrainError> {
        let tokenizer = &self.held_back.tokenizer;
        let options = SaveOptions {
            ids: TokenIds { bos: tokenizer.bos(), eos: tokenizer.eos().into_iter().collect(), pad: tokenizer.pad() },
            files: model_files(&self.config, tokenizer),
            ..SaveOptions::default()
        };
        let family = Family::of(&self.config.model);
        Ok(save_model(&self.dir.final_model(), &self.trainer.model, family, &options)?)
    }

    fn forward(&self, error: &ForwardError) -> TrainError {
        ConfigError::new("evaluation", error.to_string()).into()
    }
}

fn eval_metrics(report: &LossReport) -> EvalMetrics {
    EvalMetrics { loss: report.loss, perplexity: report.perplexity, tokens: report.tokens }
}
