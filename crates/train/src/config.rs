//! A whole run in one file: model, data, optimizer, schedule, loop. Every table refuses keys it does not know.

use mixtura_data::DataConfig;
use mixtura_kernels::ways;
use mixtura_nn::ModelConfig;
use mixtura_ops::{Precision, Way};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{ConfigError, TrainError};
use crate::schedule::ScheduleConfig;
use crate::toml_file;

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Names the run directory when none is given.
    #[serde(default = "default_name")]
    pub name: String,
    /// The architecture.
    pub model: ModelConfig,
    /// What is read, and how it is split and batched.
    #[serde(default)]
    pub data: DataConfig,
    /// AdamW.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// The learning rate over the steps.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// The loop.
    #[serde(default)]
    pub train: TrainConfig,
}

/// `[optimizer]`: AdamW with decoupled decay, after clipping by the global norm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay of matrices; norms and routers have none.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 does not clip.
    pub clip: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1.0 }
    }
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Micro-batches (of `data.batch` rows) per optimizer step.
    pub accumulation: usize,
    /// Seed of the weights and the routers' noise; that of the data order is `data.seed`.
    pub seed: u64,
    /// Precision of the matrix products. `"auto"` in a file is the one that trains fastest on the machine that reads it; a run's own
    /// config has it resolved.
    #[serde(serialize_with = "name_out", deserialize_with = "precision_in")]
    pub precision: Precision,
    /// The way by which the products of `bf16-native` were computed when the run began, which settles the order of their sums: written
    /// down at the start, followed ever after. `None`: what this machine does fastest.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "way_out", deserialize_with = "way_in")]
    pub way: Option<Way>,
    /// Keeps only the input and the routing of each layer for the backward pass, which computes the rest again: less memory, one
    /// more forward pass, the same bits.
    pub checkpoint_activations: bool,
    /// Steps between evaluations; 0 evaluates at the end only.
    pub eval_every: u64,
    /// Steps between checkpoints; 0 saves at the end only.
    pub checkpoint_every: u64,
    /// Newest checkpoints kept, besides the best one.
    pub keep_last: usize,
    /// Questions answered per group at the end of a run on propositions; 0 asks none.
    pub questions: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            accumulation: 1,
            seed: 1,
            precision: Precision::F32,
            way: None,
            checkpoint_activations: false,
            eval_every: 200,
            checkpoint_every: 500,
            keep_last: 2,
            questions: 100,
        }
    }
}

/// Kept in memory until their step is made.
const MOST_MICRO_BATCHES: u64 = 1 << 16;

/// 2^40: at a thousand steps a second, 35 years.
const MOST_STEPS: u64 = 1 << 40;

/// In f32 the next numbers up are 1, which never forgets.
const MOST_BETA: f64 = 0.999_999_9;

/// Its f32 is a normal number; smaller ones round to 0.
const LEAST_EPS: f64 = 1e-37;

fn default_name() -> String {
    "run".into()
}

fn name_out<S: Serializer>(value: &impl std::fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn way_out<S: Serializer>(way: &Option<Way>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(way.as_ref().map_or("", |way| way.name()))
}

fn way_in<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Way>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map(Some).map_err(|_| serde::de::Error::unknown_variant(&text, &["fma", "vdpbf16ps", "amx"]))
}

fn precision_in<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Precision, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == "auto" {
        return Ok(ways::fastest().0);
    }
    let names = &["f32", "bf16", "bf16-native", "auto"];
    text.parse().map_err(|_| serde::de::Error::unknown_variant(&text, names))
}

impl RunConfig {
    /// Parses a config file's text and the overrides on top of it, for a new run. `origin` names the file in errors.
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Self, TrainError> {
        let config: Self = toml_file::parse(text, origin, overrides)?;
        config.validate(origin)?;
        config.validate_training(origin)?;
        Ok(config)
    }

    /// Parses what [`to_toml`](Self::to_toml) wrote for a run that exists. It may be one that would not be started today:
    /// [`validate_training`](Self::validate_training) says so.
    pub fn parse_saved(text: &str, origin: &str) -> Result<Self, TrainError> {
        let config: Self = toml_file::parse(text, origin, &[])?;
        config.validate(origin)?;
        Ok(config)
    }

    /// Refuses routers that are not what their policy's name says, or that would learn nothing from the task.
    pub fn validate_training(&self, origin: &str) -> Result<(), ConfigError> {
        let refused = self.model.validate_training(self.data.context, self.data.batch);
        refused.map_err(|e| ConfigError::new(origin, format!("model.{e}")))
    }

    /// The file that gives this config again.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a config is made of tables, numbers and strings")
    }

    /// The same run, its files named without their directories: what is written beside a model that may leave the machine.
    pub fn with_names_only(&self) -> Self {
        Self { data: self.data.clone().with_names_only(), ..self.clone() }
    }

    /// Tokens that one optimizer step reads.
    pub fn tokens_per_step(&self) -> u64 {
        (self.data.batch * self.data.context * self.train.accumulation) as u64
    }

    /// Refuses values that cannot be trained; what depends on the data is checked when the data is there.
    fn validate(&self, origin: &str) -> Result<(), TrainError> {
        let refuse = |key: &str, message: String| Err(ConfigError::new(origin, format!("{key}: {message}")).into());
        let train = &self.train;
        for (key, value, most) in [
            ("train.accumulation", train.accumulation as u64, MOST_MICRO_BATCHES),
            ("train.keep_last", train.keep_last as u64, u64::MAX),
            ("train.steps", train.steps, MOST_STEPS),
        ] {
            if value == 0 || value > most {
                let range = if most == u64::MAX { "at least 1".into() } else { format!("1 to {most}") };
                return refuse(key, format!("expected {range}, found {value}"));
            }
        }
        self.data.validate()?;
        if self.data.context > self.model.context {
            let (rows, context) = (self.data.context, self.model.context);
            return refuse("data.context", format!("rows of {rows} tokens are longer than model.context = {context}"));
        }
        if self.name.is_empty() || self.name.contains(['/', '\\']) || self.name.starts_with('.') {
            return refuse("name", format!("{:?} cannot name a directory", self.name));
        }
        let o = &self.optimizer;
        let update = "the update is computed in f32, which holds no more";
        let most_f32 = f64::from(f32::MAX);
        for (key, value, least, most, reason) in [
            ("optimizer.lr", o.lr, 0.0, most_f32, update),
            ("optimizer.beta1", o.beta1, 0.0, MOST_BETA, "the mean of gradients is divided by 1 - beta^step, in f32"),
            ("optimizer.beta2", o.beta2, 0.0, MOST_BETA, "the mean of squares is divided by 1 - beta^step, in f32"),
            ("optimizer.eps", o.eps, LEAST_EPS, 1.0, "without it a parameter with no gradient is divided by 0"),
            ("optimizer.weight_decay", o.weight_decay, 0.0, most_f32, update),
            ("optimizer.clip", o.clip, 0.0, 1e30, "0 does not clip"),
        ] {
            if !(least..=most).contains(&value) {
                return refuse(
                    key,
                    format!("expected a number from {least:?} to {most:?}, found {value:?} ({reason})"),
                );
            }
        }
        self.schedule.validate().map_err(|e| ConfigError::new(origin, e.to_string()))?;
        // The vocabulary may still be open: the tokenizer gives it.
        let model = ModelConfig { vocab: self.model.vocab.max(1), ..self.model.clone() };
        model.validate().map_err(|e| ConfigError::new(origin, format!("model.{e}")))?;
        self.capacity(origin)
    }

    /// Refuses a capacity that leaves no expert a slot in a batch of this size, in training or in evaluation.
    fn capacity(&self, origin: &str) -> Result<(), TrainError> {
        let Some(moe) = &self.model.moe else { return Ok(()) };
        let tokens = self.data.batch * self.data.context;
        for (training, key) in [(true, "capacity_factor"), (false, "eval_capacity_factor")] {
            mixtura_routing::capacity::slots_per_expert(&moe.router, training, tokens, moe.experts, moe.top_k)
                .map_err(|e| ConfigError::new(origin, format!("model.moe.router.{key}: {e}")))?;
        }
        Ok(())
    }

    /// Gives the model the tokenizer's vocabulary, or refuses one that is smaller.
    pub fn fit_vocabulary(&mut self, tokens: usize) -> Result<(), TrainError> {
        match self.model.vocab {
            0 => self.model.vocab = tokens,
            vocab if vocab < tokens => {
                let message = format!("model.vocab: {vocab} is smaller than the tokenizer's vocabulary of {tokens}");
                return Err(ConfigError::new("config", message).into());
            }
            _ => {}
        }
        Ok(())
    }
}
