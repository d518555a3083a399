//! The balance-loss dictionary: what each library's "load-balancing loss" is worth on the same routing, and what coefficient
//! in one library equals a coefficient in another.
//!
//! Three things differ: which choices are counted (all k or only the first), a constant (1, k, 1/E^2, ...), and how layers are
//! combined (mean, sum, or one loss over all layers' logits pooled, which cannot see imbalances that cancel between layers).

use crate::activation::softmax;
use crate::losses::{cv_squared, cv_squared_bessel, importance};
use crate::select::top_k;
use serde::Serialize;

/// Which selections make f.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Counts {
    /// All k choices of every token.
    All,
    /// First choices only.
    First,
}

/// How a model's layers are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Layers {
    /// Averaged.
    Mean,
    /// Added up.
    Sum,
    /// f and P are computed over all layers' tokens together.
    Pooled,
}

/// What is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// A constant times `sum f_i Pbar_i`.
    Product,
    /// CV^2 of the importance, population variance.
    ImportanceCv,
    /// CV^2 of the hard load.
    LoadCv,
    /// Mean of importance and load CV^2, both with Bessel's correction.
    ImportanceLoadBessel,
}

/// One library's loss.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Library {
    /// Name on the command line.
    pub name: &'static str,
    /// Who else computes the same.
    pub also: &'static str,
    /// What is computed.
    pub form: Form,
    /// Which selections are counted.
    pub counts: Counts,
    /// How layers are combined.
    pub layers: Layers,
    /// The constant before `sum f_i Pbar_i`, f summing to k or 1, in words.
    pub constant: &'static str,
}

/// Every loss the dictionary knows; `mixtura` first.
pub const LIBRARIES: &[Library] = &[
    product("mixtura", "MegaBlocks, OLMo-core, DeepSeekMoE", Counts::All, Layers::Mean, "E/k"),
    product("megablocks", "the same as mixtura", Counts::All, Layers::Mean, "E/k"),
    product("megatron", "NeMo; attached per layer", Counts::All, Layers::Sum, "E/k"),
    product("deepspeed-topk", "SonicMoE", Counts::All, Layers::Sum, "E/k"),
    product(
        "deepspeed-top2",
        "DeepSpeed top1, Switch, mesh, lingvo, Tutel gshard, V-MoE gshard, torchscale",
        Counts::First,
        Layers::Sum,
        "E",
    ),
    product("gshard-paper", "Algorithm 1", Counts::First, Layers::Sum, "1/E"),
    product("flaxformer", "T5X", Counts::All, Layers::Sum, "E"),
    product("hf", "transformers: Mixtral, OLMoE, Qwen, Phi, GPT-OSS", Counts::All, Layers::Pooled, "E"),
    product(
        "fastmoe-ep4",
        "GShardGate on 4 ranks: E is the LOCAL number of experts",
        Counts::First,
        Layers::Sum,
        "E/16",
    ),
    product("moepp", "without tau", Counts::All, Layers::Sum, "1"),
    cv("vmoe-importance", Form::ImportanceCv),
    cv("vmoe-load", Form::LoadCv),
    cv("tutel-load-importance", Form::ImportanceLoadBessel),
];

const fn product(
    name: &'static str,
    also: &'static str,
    counts: Counts,
    layers: Layers,
    constant: &'static str,
) -> Library {
    Library { name, also, form: Form::Product, counts, layers, constant }
}

const fn cv(name: &'static str, form: Form) -> Library {
    Library { name, also: "", form, counts: Counts::All, layers: Layers::Mean, constant: "-" }
}

/// Why a conversion is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DictionaryError {
    /// Not in the dictionary.
    #[error("unknown library {name}; known: {known}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// All names.
        known: String,
    },
    /// CV^2 losses are 0 at balance: no constant turns one form into the other.
    #[error("{name} is a squared coefficient of variation: no coefficient makes it equal to a product loss")]
    NotProportional {
        /// The library.
        name: &'static str,
    },
    /// Sizes without meaning.
    #[error("E = {experts}, k = {top_k}, L = {layers}: expected 1 <= k <= E <= 512 and 1 <= L <= 4096")]
    Sizes {
        /// E.
        experts: usize,
        /// k.
        top_k: usize,
        /// L.
        layers: usize,
    },
}

/// Finds a library by name.
pub fn find(name: &str) -> Result<&'static Library, DictionaryError> {
    LIBRARIES.iter().find(|l| l.name == name).ok_or_else(|| DictionaryError::Unknown {
        name: name.to_string(),
        known: LIBRARIES.iter().map(|l| l.name).collect::<Vec<_>>().join(", "),
    })
}

impl Library {
    /// The constant before `sum f_i Pbar_i`.
    fn factor(&self, experts: usize, top_k: usize) -> f64 {
        let e = experts as f64;
        match self.constant {
            "E/k" => e / top_k as f64,
            "E" => e,
            "1/E" => 1.0 / e,
            // f and P are still over all experts; two factors of E_local / E = 1/4 come in.
            "E/16" => e / 16.0,
            _ => 1.0,
        }
    }

    /// The loss at perfect balance over `layers` layers.
    pub fn at_balance(&self, experts: usize, top_k: usize, layers: usize) -> f64 {
        if self.form != Form::Product {
            return 0.0;
        }
        let chosen = if self.counts == Counts::All { top_k } else { 1 };
        let one = self.factor(experts, top_k) * chosen as f64 / experts as f64;
        if self.layers == Layers::Sum { one * layers as f64 } else { one }
    }

    /// The loss of a model whose layers have these probabilities `[T, E]`, each `times` times.
    pub fn value(&self, layers: &[(&[f64], usize)], experts: usize, top_k: usize) -> f64 {
        let k = if self.counts == Counts::All { top_k } else { 1 };
        let tables: Vec<(Table, f64)> = layers.iter().map(|(p, n)| (Table::of(p, experts, k), *n as f64)).collect();
        let count: f64 = tables.iter().map(|(_, n)| n).sum();
        if self.layers == Layers::Pooled {
            return self.of_table(&Table::pooled(&tables, experts, count), top_k);
        }
        let sum: f64 = tables.iter().map(|(table, n)| n * self.of_table(table, top_k)).sum();
        if self.layers == Layers::Sum { sum } else { sum / count.max(1.0) }
    }

    fn of_table(&self, table: &Table, top_k: usize) -> f64 {
        let Table { fraction_e, mean_e } = table;
        match self.form {
            Form::Product => {
                let inner: f64 = fraction_e.iter().zip(mean_e).map(|(f, p)| f * p).sum();
                self.factor(fraction_e.len(), top_k) * inner
            }
            Form::ImportanceCv => cv_squared(mean_e),
            Form::LoadCv => cv_squared(fraction_e),
            Form::ImportanceLoadBessel => 0.5 * (cv_squared_bessel(mean_e) + cv_squared_bessel(fraction_e)),
        }
    }
}

/// What every loss is made of: selections per token and mean probability of each expert.
struct Table {
    fraction_e: Vec<f64>,
    mean_e: Vec<f64>,
}

impl Table {
    fn of(probs_te: &[f64], experts: usize, k: usize) -> Self {
        let tokens = (probs_te.len() / experts.max(1)).max(1) as f64;
        let mut fraction_e = vec![0.0; experts];
        top_k(probs_te, experts, k).into_iter().for_each(|e| fraction_e[e as usize] += 1.0 / tokens);
        Self { fraction_e, mean_e: importance(probs_te, experts).into_iter().map(|m| m / tokens).collect() }
    }

    fn pooled(tables: &[(Self, f64)], experts: usize, count: f64) -> Self {
        let mean = |pick: fn(&Self) -> &Vec<f64>| {
            (0..experts).map(|e| tables.iter().map(|(t, n)| pick(t)[e] * n).sum::<f64>() / count.max(1.0)).collect()
        };
        Self { fraction_e: mean(|t| &t.fraction_e), mean_e: mean(|t| &t.mean_e) }
    }
}

/// The coefficient in `to` that penalises equally loaded layers as `coefficient` does in `from`.
///
/// Exact where both count the same choices; between all-choices and first-choice losses it is exact at balance.
pub fn convert(
    from: &str,
    to: &str,
    coefficient: f64,
    experts: usize,
    top_k: usize,
    layers: usize,
) -> Result<f64, DictionaryError> {
    check_sizes(experts, top_k, layers)?;
    let (from, to) = (find(from)?, find(to)?);
    if let Some(cv) = [from, to].iter().find(|l| l.form != Form::Product) {
        return Err(DictionaryError::NotProportional { name: cv.name });
    }
    Ok(coefficient * from.at_balance(experts, top_k, layers) / to.at_balance(experts, top_k, layers))
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The library.
    pub library: Library,
    /// Every expert equally loaded, confidently.
    pub balance: f64,
    /// All tokens to the same k experts.
    pub collapse: f64,
    /// Even layers use the first half of the experts, odd layers the second.
    pub cancel: f64,
}

/// Every library on three synthetic routings of 8 E tokens.
pub fn table(experts: usize, top_k: usize, layers: usize) -> Result<Vec<Row>, DictionaryError> {
    check_sizes(experts, top_k, layers)?;
    // Each of the routing's favourites is the first choice of equally many tokens; 0.99 of the mass is on the k chosen.
    let routing = |favourites: std::ops::Range<usize>| -> Vec<f64> {
        let width = favourites.len();
        let mut probs = Vec::with_capacity(8 * experts * experts);
        for t in 0..8 * experts {
            let mut logits = vec![0.0; experts];
            for j in 0..top_k.min(width) {
                // Choices of one token are neighbours; earlier ones are slightly preferred.
                logits[favourites.start + (t + j) % width] = (99.0 * experts as f64).ln() - 1e-3 * j as f64;
            }
            let mut row = vec![0.0; experts];
            softmax(&logits, &mut row);
            probs.extend(row);
        }
        probs
    };
    let half = (experts / 2).max(top_k).min(experts);
    let (all, few) = (routing(0..experts), routing(0..top_k));
    let (low, high) = (routing(0..half), routing(experts - half..experts));
    let row = |library: &Library| Row {
        library: *library,
        balance: library.value(&[(&all, layers)], experts, top_k),
        collapse: library.value(&[(&few, layers)], experts, top_k),
        cancel: library.value(&[(&low, layers.div_ceil(2)), (&high, layers / 2)], experts, top_k),
    };
    Ok(LIBRARIES.iter().map(row).collect())
}

fn check_sizes(experts: usize, top_k: usize, layers: usize) -> Result<(), DictionaryError> {
    if (1..=experts).contains(&top_k) && (1..=4096).contains(&layers) && experts <= 512 {
        Ok(())
    } else {
        Err(DictionaryError::Sizes { experts, top_k, layers })
    }
}
