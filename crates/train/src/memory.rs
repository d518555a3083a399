//! How much memory a run will take, part by part, before it takes any; and how much there is.
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
use std::path::{Path, PathBuf};

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

/// Bytes for people.
pub fn gib(bytes: u64) -> String {
    match bytes as f64 / (1u64 << 30) as f64 {
        gib if gib >= 0.995 => format!("{gib:.1} GiB"),
        gib => format!("{:.0} MiB", gib * 1024.0),
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

/// What bounds the memory that this process can still get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Available {
    /// Bytes left.
    pub bytes: u64,
    /// Who says so, for a person.
    pub bound: String,
}

impl Available {
    /// The tightest of the system's free memory, the limits of the control groups that the process is in, and its own resource
    /// limits; `None` where nothing tells.
    pub fn now() -> Option<Self> {
        Self::under(Path::new("/"))
    }

    /// As [`now`](Self::now), with `/proc` and `/sys` below `root`.
    pub fn under(root: &Path) -> Option<Self> {
        let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
        let mut bounds = Vec::new();
        bounds.extend(
            read("proc/meminfo")
                .and_then(|text| kib(&text, "MemAvailable:"))
                .map(|bytes| Self { bytes, bound: "the system (MemAvailable)".into() }),
        );
        if let Some(groups) = read("proc/self/cgroup") {
            bounds.extend(groups.lines().filter_map(|line| in_groups(root, line)));
        }
        if let (Some(limits), Some(status)) = (read("proc/self/limits"), read("proc/self/status")) {
            for (name, held) in [("Max address space", "VmSize:"), ("Max data size", "VmData:")] {
                let limit =
                    limits.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok());
                let left = limit.map(|limit: u64| limit.saturating_sub(kib(&status, held).unwrap_or(0)));
                bounds.extend(left.map(|bytes| Self { bytes, bound: format!("the process's limit \"{name}\"") }));
            }
        }
        bounds.into_iter().min_by_key(|bound| bound.bytes)
    }
}

/// What the process holds now, in bytes; 0 where the system does not tell.
pub fn held() -> u64 {
    std::fs::read_to_string("/proc/self/status").ok().and_then(|text| kib(&text, "VmRSS:")).unwrap_or(0)
}

/// The number of KiB after `name` in a file of `/proc`, as bytes.
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Where a version of control groups keeps what.
struct Files {
    mounts: &'static [&'static str],
    limit: &'static str,
    usage: &'static str,
    /// In `memory.stat`: file pages that are dropped when memory is wanted.
    reclaimable: &'static str,
}

/// The tightest limit of a line of `/proc/self/cgroup`, over the group and those above it: version 2, or the memory controller of
/// version 1. In a container the group's own path may not be visible: then its root is the container's group.
fn in_groups(root: &Path, line: &str) -> Option<Available> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
    const VERSION_2: Files = Files {
        mounts: &["sys/fs/cgroup", "sys/fs/cgroup/unified"],
        limit: "memory.max",
        usage: "memory.current",
        reclaimable: "inactive_file ",
    };
    const VERSION_1: Files = Files {
        mounts: &["sys/fs/cgroup/memory"],
        limit: "memory.limit_in_bytes",
        usage: "memory.usage_in_bytes",
        reclaimable: "total_inactive_file ",
    };
    let files = match controllers {
        "" => VERSION_2,
        _ if controllers.split(',').any(|controller| controller == "memory") => VERSION_1,
        _ => return None,
    };
    let left = |group: &PathBuf| {
        let number = |name: &str| std::fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
        let reclaimable = std::fs::read_to_string(group.join("memory.stat")).ok().and_then(|stat| {
            stat.lines().find_map(|line| line.strip_prefix(files.reclaimable))?.trim().parse::<u64>().ok()
        });
        let used = number(files.usage)?.saturating_sub(reclaimable.unwrap_or(0));
        // Without a limit, version 2 says "max" and version 1 a number near 2^63.
        Some(number(files.limit).filter(|&limit| limit < 1 << 60)?.saturating_sub(used))
    };
    let groups = files.mounts.iter().flat_map(|mount| {
        let mount = root.join(mount);
        let group = mount.join(path);
        let above: Vec<PathBuf> =
            group.ancestors().take_while(|at| at.starts_with(&mount)).map(Path::to_path_buf).collect();
        above
    });
    let tightest = groups.filter_map(|group| Some((left(&group)?, group))).min()?;
    let (bytes, group) = tightest;
    Some(Available { bytes, bound: format!("the limit of the control group {}", group.display()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().expect("a file has a directory")).expect("a temporary directory");
        std::fs::write(path, text).expect("a temporary file");
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_tightest_bound_counts() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let root = root.path();
        assert_eq!(Available::under(root), None);
        write(root, "proc/meminfo", "MemTotal:  20971520 kB\nMemAvailable:   10485760 kB\n");
        let bound = || Available::under(root).expect("meminfo is there");
        assert_eq!(bound().bytes, 10 * GIB);

        // Version 2: the group has no limit, the one above has 8 GiB, of which 3 are in use and 1 of those can be dropped.
        write(root, "proc/self/cgroup", "0::/box/run\n");
        write(root, "sys/fs/cgroup/box/run/memory.max", "max\n");
        write(root, "sys/fs/cgroup/box/run/memory.current", "1\n");
        write(root, "sys/fs/cgroup/box/memory.max", &format!("{}\n", 8 * GIB));
        write(root, "sys/fs/cgroup/box/memory.current", &format!("{}\n", 3 * GIB));
        write(root, "sys/fs/cgroup/box/memory.stat", &format!("anon 5\ninactive_file {GIB}\n"));
        assert_eq!(bound().bytes, 6 * GIB);
        assert!(bound().bound.contains("box"), "{}", bound().bound);

        // Version 1, inside a container: only the root of its hierarchy is visible.
        write(root, "proc/self/cgroup", "7:blkio:/\n4:memory:/docker/abc\n0::/\n");
        write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", &format!("{}\n", 5 * GIB));
        write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", &format!("{GIB}\n"));
        assert_eq!(bound().bytes, 4 * GIB);
        write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(bound().bytes, 10 * GIB);

        // `ulimit -v`.
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax address space         4294967296  unlimited  bytes\nMax data size  unlimited unlimited bytes\n";
        write(root, "proc/self/limits", limits);
        write(root, "proc/self/status", "VmSize:\t 1048576 kB\nVmData:\t 1 kB\n");
        assert_eq!(bound().bytes, 3 * GIB);
        assert!(bound().bound.contains("address space"));
    }

    #[test]
    fn bytes_are_told_in_mib_and_gib() {
        assert_eq!([gib(300 << 20), gib(GIB), gib(13 * GIB + GIB / 3)], ["300 MiB", "1.0 GiB", "13.3 GiB"]);
    }
}
