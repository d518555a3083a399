//! One optimizer step and everything that a step depends on; the state that a checkpoint keeps is exactly this.
//!
//! ```text
//! selections of the whole step, where a balance loss counts them and there are several micro-batches
//! for each micro-batch i: ce_i * counted_i / counted + auxiliary_i * tokens_i / tokens -> backward -> gradients added in order
//! norm of the sum -> refuse what is not finite -> clip, AdamW with the rate of this step
//! ```
//!
//! Weighting a micro-batch by its counted targets, and its auxiliary losses by its tokens, makes the step that of one large batch,
//! whatever the padding. The Switch loss is a product of two means over tokens, selections f and probabilities P, of which f has
//! no gradient: with f of the whole step the losses of the parts add up to the whole's, value and gradient. f is only known after
//! every part has been routed, so the parts are first routed without a graph, which costs a forward pass up to the last router.
//! Keeping the parts' graphs until then would cost the memory that micro-batches are there to save.
//!
//! Nothing here depends on the clock or on threads, so equal states make equal steps, bit for bit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use burn::module::Module;
use mixtura_checkpoint::{
    Checkpoint, CheckpointContents, CheckpointStore, Family, StoredType, TensorOut, TokenIds, TrainStateOut,
    check_architecture, load_weights, model_out,
};
use mixtura_data::{Batch, FileContent, Loader, LoaderState, Tokenizer};
use mixtura_nn::{
    Beyond, Decoder, ForwardContext, ForwardError, LayerRouting, NamedParameters, ParameterInfo, SelectionCounts,
};
use mixtura_ops::{Numerics, PackRoom, with_slice};
use mixtura_routing::{BalanceLoss, BalanceScope, HashTable, ReluController, RoutingStats};
use serde::{Deserialize, Serialize};

use crate::config::RunConfig;
use crate::error::TrainError;
use crate::memory::MemoryPlan;
use crate::metrics::{LayerMetrics, StepMetrics};
use crate::non_finite::{NonFinite, first_non_finite};
use crate::optimizer::{Accumulated, AdamW, Moments};

/// Seconds that the parts of a step took.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepTime {
    /// Waiting for batches.
    pub data: f64,
    /// Forward passes.
    pub forward: f64,
    /// Backward passes and the sum over micro-batches.
    pub backward: f64,
    /// Norm, clipping and AdamW.
    pub optimizer: f64,
    /// The whole step; what the four above leave is the loop's own.
    pub whole: f64,
}

impl StepTime {
    /// What is neither data, forward, backward nor optimizer.
    pub fn overhead(&self) -> f64 {
        self.whole - self.data - self.forward - self.backward - self.optimizer
    }

    /// Adds another step's times.
    pub fn add(&mut self, other: &Self) {
        self.data += other.data;
        self.forward += other.forward;
        self.backward += other.backward;
        self.optimizer += other.optimizer;
        self.whole += other.whole;
    }
}

/// Model, optimizer, data position: a run in the middle.
pub struct Trainer {
    /// The model, on the autodiff device.
    pub model: Decoder,
    /// What the data files held, to be recorded with every saved model.
    pub contents: Vec<FileContent>,
    config: RunConfig,
    numerics: Numerics,
    optimizer: AdamW,
    infos: Vec<ParameterInfo>,
    loader: Loader,
    /// Moves the coefficient of the balance loss, with ReLU routing.
    controller: Option<ReluController>,
    steps: u64,
    tokens: u64,
}

/// Training tokens that the tables of balanced hash layers are made from.
const TABLE_TOKENS: usize = 1 << 20;

/// The part of a checkpoint that is numbers rather than tensors.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct SavedState {
    step: u64,
    tokens: u64,
    updates: u64,
    loader: LoaderState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    balance_coefficient: Option<f64>,
}

impl Trainer {
    /// Step 0 of a run: fresh weights, the start of the data.
    pub fn new(config: &RunConfig, mut loader: Loader) -> Result<Self, TrainError> {
        let numerics = Numerics::like(config.train.precision, config.train.way);
        let device = burn::tensor::Device::default().autodiff();
        let mut model =
            Decoder::new(&config.model, config.train.seed, &device).map_err(|e| TrainError::Model(e.to_string()))?;
        if config.model.moe.as_ref().is_some_and(|moe| moe.router.hash_table == HashTable::Balanced) {
            model.balance_hash_tables(&token_frequencies(&mut loader, config.model.vocab)?);
        }
        if config.train.accumulation == 1 {
            // Every pack is used once before the weight changes.
            model.share_packs(&PackRoom::default());
        }
        if MemoryPlan::is_thrifty(config) {
            let (results, work) = MemoryPlan::idle_limits(config);
            mixtura_ops::limit_idle_memory(results as usize, work as usize);
        }
        let controller = config.model.moe.as_ref().and_then(|moe| moe.balance.controller).map(ReluController::new);
        let infos = model.parameter_infos();
        let optimizer = AdamW::new(&config.optimizer, numerics.isa, &infos);
        Ok(Self {
            model,
            contents: Vec::new(),
            config: config.clone(),
            numerics,
            optimizer,
            infos,
            loader,
            controller,
            steps: 0,
            tokens: 0,
        })
    }

    /// Optimizer steps made.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Tokens read.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// How products are computed.
    pub fn numerics(&self) -> Numerics {
        self.numerics
    }

    /// One optimizer step. On an error the weights are those of the step before.
    pub fn step(&mut self) -> Result<(StepMetrics, StepTime), TrainError> {
        let started = Instant::now();
        let mut time = StepTime::default();
        let lr = self.config.optimizer.lr * self.config.schedule.factor(self.steps, self.config.train.steps);
        let mut metrics = StepMetrics { step: self.steps + 1, lr, ..StepMetrics::default() };

        let batches: Vec<_> = (0..self.config.train.accumulation).map(|_| self.loader.next_batch()).collect();
        time.data = started.elapsed().as_secs_f64();

        let counted: Vec<usize> = batches.iter().map(|batch| batch.counted()).collect();
        let all_counted = counted.iter().sum::<usize>().max(1) as f64;
        let all_tokens = batches.iter().map(|batch| batch.batch * batch.seq).sum::<usize>().max(1) as f64;
        let mark = Instant::now();
        let whole = if self.counts_first() { Some(self.count(&batches, lr)?) } else { None };
        time.forward += mark.elapsed().as_secs_f64();
        let mut gradients = Accumulated::default();
        let mut counts = SelectionCounts::default();
        let mut routed = RoutingSums::default();
        let mut first_token = 0;
        for (batch, counted) in batches.iter().zip(counted) {
            let mark = Instant::now();
            let beyond = match &whole {
                Some(whole) => Some(Beyond::Step(whole.clone())),
                None => (first_token > 0).then(|| Beyond::Earlier(Arc::new(counts.clone()))),
            };
            let context = ForwardContext { beyond, ..self.context(first_token) };
            first_token += (batch.batch * batch.seq) as u64;
            let out = self
                .model
                .loss(&batch.ids, &batch.targets, batch.batch, batch.seq, &context)
                .map_err(|error| self.diagnose_forward(error, lr))?;
            let share = counted as f64 / all_counted;
            let token_share = (batch.batch * batch.seq) as f64 / all_tokens;
            let loss = out.total.clone().into_scalar::<f32>() as f64;
            let ce = out.ce.clone().into_scalar::<f32>() as f64;
            metrics.loss += share * ce + token_share * (loss - ce);
            metrics.ce += share * ce;
            *metrics.aux.entry("balance".into()).or_default() += token_share * out.balance;
            *metrics.aux.entry("z".into()).or_default() += token_share * out.z;
            if self.config.model.moe.as_ref().is_some_and(|moe| moe.balance.entropy > 0.0) {
                *metrics.aux.entry("entropy".into()).or_default() += token_share * out.entropy;
            }
            counts.add(&out.routing);
            routed.add(&out.routing, token_share);
            if let Some(controller) = &mut self.controller {
                out.routing.iter().for_each(|layer| controller.add(&layer.routed));
            }
            time.forward += mark.elapsed().as_secs_f64();
            if !loss.is_finite() {
                return Err(self.diagnose("loss", loss, lr, &gradients, &out.routing));
            }
            let mark = Instant::now();
            let mut graph = out.weighted(share, token_share).backward();
            gradients.add(self.model.take_gradients(&mut graph));
            time.backward += mark.elapsed().as_secs_f64();
        }

        let mark = Instant::now();
        metrics.grad_norm = gradients.norm(self.numerics.isa);
        if !metrics.grad_norm.is_finite() {
            return Err(self.diagnose("gradient norm", metrics.grad_norm, lr, &gradients, &[]));
        }
        self.optimizer.step(&mut self.model, &gradients, metrics.grad_norm, lr);
        self.model.update_biases(&counts);
        if let Some(controller) = &mut self.controller {
            metrics.aux.insert("balance_coefficient".into(), controller.lambda);
            controller.update();
        }
        drop(gradients);
        time.optimizer = mark.elapsed().as_secs_f64();

        self.steps += 1;
        self.tokens += first_token;
        metrics.tokens = self.tokens;
        metrics.layers = routed.layers(&counts);
        time.whole = started.elapsed().as_secs_f64();
        metrics.tokens_per_second = first_token as f64 / time.whole;
        Ok((metrics, time))
    }

    /// How a micro-batch is run whose first token is this one of the step.
    fn context(&self, first_token: u64) -> ForwardContext {
        ForwardContext {
            first_token,
            balance_coefficient: self.controller.map(|controller| controller.lambda),
            recompute_activations: self.config.train.checkpoint_activations,
            ..ForwardContext::training(self.config.train.seed, self.steps, self.numerics)
        }
    }

    /// Whether a loss of this step needs the selections of all of its micro-batches.
    fn counts_first(&self) -> bool {
        let Some(moe) = self.config.model.moe.as_ref().filter(|moe| moe.soft.is_none()) else { return false };
        let coefficient = match moe.balance.loss {
            BalanceLoss::Switch => moe.zero_computation.map_or(moe.balance.coefficient, |zero| zero.beta),
            BalanceLoss::ParameterPenalty => moe.balance.coefficient,
            _ => 0.0,
        };
        let has_loss = coefficient > 0.0 || self.controller.is_some();
        self.config.train.accumulation > 1 && moe.balance.scope == BalanceScope::Global && has_loss
    }

    /// The selections of the whole step.
    fn count(&self, batches: &[Batch], lr: f64) -> Result<Arc<SelectionCounts>, TrainError> {
        // Dropped at the end: the optimizer updates weights in place only where nobody else holds them.
        let model = self.model.valid();
        let mut counts = SelectionCounts::default();
        let mut first_token = 0;
        for batch in batches {
            let routing = model.route(&batch.ids, batch.batch, batch.seq, &self.context(first_token));
            counts.add(&routing.map_err(|error| self.diagnose_forward(error, lr))?);
            first_token += (batch.batch * batch.seq) as u64;
        }
        Ok(Arc::new(counts))
    }

    /// Saves everything that the next step depends on. `metric`, lower being better, ranks the checkpoint.
    pub fn save(
        &self,
        store: &CheckpointStore,
        metric: Option<f64>,
        tokenizer: &Tokenizer,
    ) -> Result<std::path::PathBuf, TrainError> {
        let state = SavedState {
            step: self.steps,
            tokens: self.tokens,
            updates: self.optimizer.updates,
            loader: self.loader.state(),
            balance_coefficient: self.controller.map(|controller| controller.lambda),
        };
        let mut tensors = Vec::with_capacity(2 * self.infos.len());
        for (info, moments) in self.infos.iter().zip(&self.optimizer.moments) {
            tensors.push(TensorOut::borrowed(format!("adamw.m.{}", info.name), &info.shape, &moments.m));
            tensors.push(TensorOut::borrowed(format!("adamw.v.{}", info.name), &info.shape, &moments.v));
        }
        let contents = CheckpointContents {
            step: self.steps,
            metric,
            model: model_out(&self.model, Family::of(&self.config.model), StoredType::F32, &token_ids(tokenizer))?,
            train_state: TrainStateOut::new(&state, tensors),
            files: self.model_files(tokenizer),
        };
        Ok(store.save(contents)?)
    }

    /// What lies beside the weights of every saved model: the tokenizer in its two files, the run that made it, and what that was trained on.
    pub fn model_files(&self, tokenizer: &Tokenizer) -> Vec<(String, Vec<u8>)> {
        let mut files = vec![
            ("tokenizer.json".into(), tokenizer.to_json().into_bytes()),
            ("tokenizer_config.json".into(), tokenizer.to_config_json(self.config.model.context).into_bytes()),
            (RUN_FILE.into(), self.config.with_names_only().to_toml().into_bytes()),
        ];
        if !self.contents.is_empty() {
            let names: Vec<_> = self.contents.iter().map(FileContent::name_only).collect();
            files.push((DATA_FILE.into(), serde_json::to_vec_pretty(&names).expect("names and hashes are text")));
        }
        files
    }

    /// Continues from a checkpoint of the same run.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> Result<(), TrainError> {
        // First, so that a changed key is refused by its name and not by a tensor's shape.
        check_architecture(checkpoint.path(), &self.config.model)?;
        let saved = checkpoint.train_state()?;
        let state: SavedState = saved.state()?;
        let mut moments = Vec::with_capacity(self.infos.len());
        for info in &self.infos {
            let moment = |which: &str| saved.tensor(&format!("adamw.{which}.{}", info.name), &info.shape);
            moments.push(Moments { name: info.name.clone(), m: moment("m")?, v: moment("v")? });
        }
        self.loader.restore(&state.loader)?;
        load_weights(checkpoint.path(), &mut self.model)?;
        self.optimizer.moments = moments;
        self.optimizer.updates = state.updates;
        if let (Some(controller), Some(lambda)) = (&mut self.controller, state.balance_coefficient) {
            controller.lambda = lambda;
        }
        self.steps = state.step;
        self.tokens = state.tokens;
        Ok(())
    }

    /// The last step is made and saved: lets go of the optimizer's state, and keeps packed weights, which generating uses for every
    /// token.
    pub fn finish(&mut self) {
        self.optimizer.moments = Vec::new();
        self.model.keep_packs();
    }

    /// Why a forward pass could not go on, when the reason may be numbers that are none.
    fn diagnose_forward(&self, source: ForwardError, lr: f64) -> TrainError {
        match self.diagnose("loss", f64::NAN, lr, &Accumulated::default(), &[]) {
            TrainError::NonFinite(found) if found.culprit.is_some() => TrainError::NonFinite(found),
            _ => TrainError::Forward { during: format!("step {}", self.steps + 1), source: source.into() },
        }
    }

    /// The report of a step that is not applied: the first tensor with values that are no numbers.
    fn diagnose(
        &self,
        quantity: &'static str,
        value: f64,
        lr: f64,
        gradients: &Accumulated,
        routing: &[LayerRouting],
    ) -> TrainError {
        let mut culprit = None;
        let mut look = |role, name: &str, values: &[f32]| {
            if culprit.is_none() {
                culprit = first_non_finite([(role, name.to_string(), values)]);
            }
        };
        self.model.for_each_parameter(|info, values| look("parameter", &info.name, values));
        for layer in routing {
            let name = format!("layers.{}.moe.router", layer.layer);
            with_slice(&layer.logits_te, |values| look("logits of", &name, values));
        }
        gradients.for_each(|index, values| look("gradient of", &self.infos[index].name, values));
        TrainError::NonFinite(NonFinite { step: self.steps + 1, quantity, value, culprit, lr })
    }
}

/// How often each token id occurs in the first training batches; the loader is left where it was.
fn token_frequencies(loader: &mut Loader, vocab: usize) -> Result<Vec<f64>, TrainError> {
    let start = loader.state();
    let mut frequency_v = vec![0.0; vocab];
    let batches = TABLE_TOKENS.div_ceil((loader.batch() * loader.context()).max(1));
    for _ in 0..batches {
        loader.next_batch().ids.iter().for_each(|&id| frequency_v[id as usize] += 1.0);
    }
    loader.restore(&start)?;
    Ok(frequency_v)
}

/// The special ids of a saved model, for `config.json` and `generation_config.json`.
pub fn token_ids(tokenizer: &Tokenizer) -> TokenIds {
    TokenIds { bos: tokenizer.bos(), eos: tokenizer.eos().into_iter().collect(), pad: tokenizer.pad() }
}

/// The resolved run config beside a saved model, so that `eval` finds the data the model was trained on. It names files without their
/// directories: a model that leaves its run says nothing of the machine it was made on.
pub const RUN_FILE: &str = "run.toml";

/// What the data files held, beside a saved model and in the run directory.
pub const DATA_FILE: &str = "data.json";

/// What the routing of a step adds up to beside its selections: by layer index, dropped pairs and the mean z.
#[derive(Default)]
struct RoutingSums {
    layers: BTreeMap<usize, (u64, f64)>,
}

impl RoutingSums {
    fn add(&mut self, routing: &[LayerRouting], share: f64) {
        for layer in routing {
            let (dropped, z) = self.layers.entry(layer.layer).or_default();
            *dropped += layer.assignment().dropped.len() as u64;
            *z += share * layer.stats().z;
        }
    }

    fn layers(&self, counts: &SelectionCounts) -> Vec<LayerMetrics> {
        let layer = |(&layer, &(dropped, z)): (&usize, &(u64, f64))| {
            let load: Vec<u32> = counts.by_layer[layer].iter().map(|&count| count as u32).collect();
            let stats = RoutingStats::from_load(&load);
            LayerMetrics {
                load_cv: stats.load_cv,
                max_over_mean: stats.max_over_mean,
                dead: load.iter().filter(|&&count| count == 0).count() as u64,
                dropped,
                entropy: stats.entropy,
                z,
            }
        };
        self.layers.iter().map(layer).collect()
    }
}
