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
    /// Parses a config file's text and the overrides on top of it. `origin` names the file in errors.
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Self, TrainError> {
        let config: Self = toml_file::parse(text, origin, overrides)?;
        config.validate(origin)?;
        Ok(config)
    }

    /// The file that gives this config again.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a config is made of tables, numbers and strings")
    }

    /// Tokens that one optimizer step reads.
    pub fn tokens_per_step(&self) -> u64 {
        (self.data.batch * self.data.context * self.train.accumulation) as u64
    }

    /// Refuses values that cannot be trained; what depends on the data is checked when the data is there.
    fn validate(&self, origin: &str) -> Result<(), TrainError> {
        let refuse = |key: &str, message: String| Err(ConfigError::new(origin, format!("{key}: {message}")).into());
        let train = &self.train;
        for (key, value) in [("train.accumulation", train.accumulation), ("train.keep_last", train.keep_last)] {
            if value == 0 {
                return refuse(key, "expected at least 1, found 0".into());
            }
        }
        if train.steps == 0 {
            return refuse("train.steps", "expected at least 1, found 0".into());
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
        for (key, value, below) in [
            ("optimizer.lr", o.lr, f64::INFINITY),
            ("optimizer.beta1", o.beta1, 1.0),
            ("optimizer.beta2", o.beta2, 1.0),
            ("optimizer.eps", o.eps, f64::INFINITY),
            ("optimizer.weight_decay", o.weight_decay, f64::INFINITY),
            ("optimizer.clip", o.clip, f64::INFINITY),
        ] {
            if !(value >= 0.0 && value < below) {
                return refuse(key, format!("expected a number of at least 0 and below {below}, found {value}"));
            }
        }
        self.schedule.validate().map_err(|e| ConfigError::new(origin, e.to_string()))?;
        // The vocabulary may still be open: the tokenizer gives it.
        let model = ModelConfig { vocab: self.model.vocab.max(1), ..self.model.clone() };
        model.validate().map_err(|e| ConfigError::new(origin, format!("model.{e}")))?;
        self.capacity(origin)
    }

    /// Refuses a capacity that leaves no expert a slot in a batch of this size.
    fn capacity(&self, origin: &str) -> Result<(), TrainError> {
        let Some(moe) = &self.model.moe else { return Ok(()) };
        let tokens = self.data.batch * self.data.context;
        mixtura_routing::capacity::slots_per_expert(&moe.router, true, tokens, moe.experts, moe.top_k)
            .map_err(|e| ConfigError::new(origin, format!("model.moe.router.capacity_factor: {e}")))?;
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
