//! How much memory a run will take, part by part, before it takes any.
//!
//! ```text
//! weights, gradients           4 bytes a parameter each; with accumulation the gradients twice
//! moments                      8 bytes a parameter
//! packs                        the matrices as the kernels read them: of one layer, or with accumulation of all, twice
//! activations                  what the backward pass needs of every layer, or with checkpointing of one and the inputs of the rest
//! work                         what one layer's backward pass writes down in between
//! program                      what the process holds already: itself and the data
//! ```
//!
//! Buffers are kept from step to step, so that the largest moment, the end of the forward pass, sees the gradients' memory too although
//! nothing is written to it then. From a gigabyte of gradients on a run is thrifty instead ([`MemoryPlan::is_thrifty`]): what the backward
//! pass has used is freed and gradients take its place, at the price of mapping both anew in every step, 1 to 2 % of its time.
//!
//! The plan leaves out what is small beside a layer's activations; a test holds it against measured runs.
//!
//! Legend: T tokens of a micro-batch, D width, E experts, F hidden width of an expert, N rows ((token, choice) pairs).

use std::fmt;

use mixtura_infer::available::gib;
use mixtura_nn::{LayerFfn, ModelConfig, MoeConfig};
use mixtura_ops::Precision;
use serde::Serialize;

use crate::config::RunConfig;

/// Bytes of an f32.
const F32: u64 = 4;
/// Copies of the residual stream that are neither one layer's activations nor its work: its gradient, the gradients of branches and
/// sums of both, results that wait in the pool. Measured: 13 at 2048 and at 8192 tokens.
const STREAMS: u64 = 14;
/// Gradients from which on a run is thrifty.
const LARGE: u64 = 1 << 30;
/// Rows that a thread takes through an expert at once.
const ROW_BLOCK: u64 = 128;

/// What a run will hold at its largest moment, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The parameters.
    pub weights: u64,
    /// One gradient for each, two with accumulation.
    pub gradients: u64,
    /// AdamW's two moments for each.
    pub moments: u64,
    /// Matrices packed for the kernels.
    pub packs: u64,
    /// Kept from the forward pass for the backward pass; in a thrifty run, what they take beside the gradients at most.
    pub activations: u64,
    /// Held for a while in one layer's passes.
    pub work: u64,
    /// Held by the process before it begins: itself and the data.
    pub program: u64,
    /// All of them.
    pub total: u64,
}

impl MemoryPlan {
    /// The plan of a run whose vocabulary is known, in a process that holds `program` bytes already.
    pub fn of(config: &RunConfig, program: u64) -> Self {
        let model = &config.model;
        let parameters = model.parameter_counts().map_or(0, |counts| counts.total as u64);
        let layers: Vec<Layer> = (0..model.layers).map(|layer| Layer::of(config, layer)).collect();
        let of_all = |part: fn(&Layer) -> u64| layers.iter().map(part).sum::<u64>();
        let largest = |part: fn(&Layer) -> u64| layers.iter().map(part).max().unwrap_or(0);
        let (tokens, d) = (tokens(config), model.d_model as u64);
        let head = matrix(d, model.vocab as u64, config.train.precision);
        let packs = match config.train.accumulation {
            1 => largest(|layer| layer.packs) + head,
            _ => 2 * (of_all(|layer| layer.packs) + head),
        };
        let of_layer = largest(|layer| layer.activations);
        let mut activations = if config.train.checkpoint_activations {
            layers.len() as u64 * F32 * tokens * d + of_layer
        } else {
            of_all(|layer| layer.activations)
        };
        if Self::is_thrifty(config) {
            activations = activations.saturating_sub(F32 * parameters).max(2 * of_layer);
        }
        let mut plan = Self {
            weights: F32 * parameters,
            // With accumulation a micro-batch's own exist beside the sum until they are added to it.
            gradients: F32 * parameters * if config.train.accumulation == 1 { 1 } else { 2 },
            moments: 2 * F32 * parameters,
            packs,
            activations,
            work: largest(|layer| layer.work) + STREAMS * F32 * tokens * d + logits(model, tokens),
            program,
            total: 0,
        };
        plan.total = plan.parts().iter().map(|(_, bytes)| bytes).sum();
        plan
    }

    /// Whether memory of activations and gradients is freed as soon as it is not needed. With accumulation both are needed at once.
    pub fn is_thrifty(config: &RunConfig) -> bool {
        let parameters = config.model.parameter_counts().map_or(0, |counts| counts.total as u64);
        config.train.accumulation == 1 && F32 * parameters >= LARGE
    }

    /// What may wait for its next use in a thrifty run, in bytes: results for tensors, and work buffers.
    pub fn idle_limits(config: &RunConfig) -> (u64, u64) {
        let layers = (0..config.model.layers).map(|layer| Layer::of(config, layer));
        layers.fold((0, 0), |(results, work), layer| (results.max(layer.activations), work.max(layer.work)))
    }

    /// The parts by name, in the order of the struct.
    pub fn parts(&self) -> [(&'static str, u64); 7] {
        [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("moments", self.moments),
            ("packed weights", self.packs),
            ("activations", self.activations),
            ("work buffers", self.work),
            ("program and data", self.program),
        ]
    }

    /// What a run that cannot fit may do about it, by its own plan.
    pub fn way_out(config: &RunConfig, program: u64, available: u64) -> String {
        let mut ways = Vec::new();
        let mut consider = |change: String, config: &RunConfig| {
            let needed = Self::of(config, program).total;
            if needed < available.saturating_add(program) {
                ways.push(format!("{change} would take {}", gib(needed)));
            }
        };
        let mut other = config.clone();
        other.train.checkpoint_activations = true;
        if !config.train.checkpoint_activations {
            consider("train.checkpoint_activations=true".into(), &other);
        }
        if config.data.batch > 1 {
            other.data.batch = 1;
            consider("with it, data.batch=1".into(), &other);
            other.train.checkpoint_activations = config.train.checkpoint_activations;
            consider("data.batch=1 alone".into(), &other);
        }
        match ways.is_empty() {
            true => "a smaller model is the only way".into(),
            false => ways.join("; "),
        }
    }
}

impl fmt::Display for MemoryPlan {
    /// `weights 1.8 GiB, gradients 1.8 GiB, ...`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.parts().map(|(name, bytes)| format!("{name} {}", gib(bytes)));
        f.write_str(&parts.join(", "))
    }
}

/// One layer's share.
struct Layer {
    packs: u64,
    activations: u64,
    work: u64,
}

impl Layer {
    fn of(config: &RunConfig, layer: usize) -> Self {
        let (model, precision, tokens) = (&config.model, config.train.precision, tokens(config));
        let (d, qkv, heads) = (model.d_model as u64, model.qkv_width() as u64, model.heads as u64);
        let out = heads * model.head_dim() as u64;
        // The inputs of both norms and what comes out of them; queries, keys, values, and what attention made of them.
        let mut activations = F32 * tokens * (4 * d + qkv + out + heads);
        let mut packs = matrix(d, qkv, precision) + matrix(out, d, precision);
        // Attention's backward pass holds the gradient of its input and a packed copy of all its operands.
        let mut work = F32 * tokens * (2 * qkv + 2 * out);
        for network in networks(model, layer, tokens) {
            packs += network.packs(d, precision);
            activations += network.saved(precision);
            work = work.max(network.work(d, precision, rayon::current_num_threads() as u64));
        }
        if let Ok(LayerFfn::Moe { experts, .. }) = model.layer_ffn(layer) {
            // Logits, probabilities, losses' gradients and the copies that the router's closures keep.
            activations += 6 * F32 * tokens * experts as u64;
        }
        Self { packs, activations, work }
    }
}

/// Feed-forward networks of one width with the rows they are given.
struct Networks {
    count: u64,
    hidden: u64,
    into: u64,
    rows: u64,
}

impl Networks {
    fn packs(&self, d: u64, precision: Precision) -> u64 {
        self.count * (matrix(d, self.into, precision) + matrix(self.hidden, d, precision))
    }

    /// The pre-activations.
    fn saved(&self, precision: Precision) -> u64 {
        self.rows * self.into.next_multiple_of(32) * element(precision)
    }

    /// The weighted hidden rows, the panels of both products' gradients and the rows of dx, with what each thread holds.
    fn work(&self, d: u64, precision: Precision, threads: u64) -> u64 {
        let of_row = (self.hidden + self.into + d) * element(precision) + d * F32;
        let of_thread = ROW_BLOCK * ((d + self.into) * element(precision) + 32 * F32);
        self.rows * of_row + threads * of_thread
    }
}

/// The networks of a layer.
fn networks(model: &ModelConfig, layer: usize, tokens: u64) -> Vec<Networks> {
    let into = if model.activation.kernel().is_gated() { 2 } else { 1 };
    let network = |count: usize, hidden: usize, rows: u64| {
        let hidden = hidden as u64;
        Networks { count: count as u64, hidden, into: into * hidden, rows }
    };
    match (model.layer_ffn(layer), &model.moe) {
        (Ok(LayerFfn::Moe { experts, d_expert, d_shared }), Some(moe)) => {
            let rows = rows(moe, tokens, experts);
            let shared = (d_shared > 0).then(|| network(1, d_shared, tokens));
            std::iter::once(network(experts, d_expert, rows)).chain(shared).collect()
        }
        (Ok(LayerFfn::Dense { d_dense }), _) => vec![network(1, d_dense, tokens)],
        _ => Vec::new(),
    }
}

/// Rows of a layer's experts: a token's choices, or in a soft layer what is made of the tokens, about as many.
fn rows(moe: &MoeConfig, tokens: u64, experts: usize) -> u64 {
    match moe.soft {
        None => tokens * moe.top_k.clamp(1, experts.max(1)) as u64,
        Some(_) => tokens,
    }
}

/// Logits exist for a chunk of rows at a time: a million of them, between 256 and 1024 rows.
fn logits(model: &ModelConfig, tokens: u64) -> u64 {
    let vocab = model.vocab.max(1) as u64;
    let rows = ((1 << 20) / vocab / 64 * 64).clamp(256, 1024).min(tokens);
    2 * F32 * rows * vocab
}

fn tokens(config: &RunConfig) -> u64 {
    config.data.batch as u64 * config.data.context as u64
}

/// A packed matrix `[k, n]`.
fn matrix(k: u64, n: u64, precision: Precision) -> u64 {
    let k = if precision.is_bf16() { k.next_multiple_of(32) } else { k };
    k * n.next_multiple_of(32) * element(precision)
}

fn element(precision: Precision) -> u64 {
    if precision.is_bf16() { 2 } else { F32 }
}
