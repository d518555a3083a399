//! Speed of everything that is not a matrix product of its own, at the shape of a small training step (2048 tokens, d 256, 4 heads,
//! vocabulary 512) and at sequences of 2048: GFLOP/s or GB/s, and the share of the FMA peak or read bandwidth measured in the same run.
//!
//! `cargo run --release -p mixtura-kernels --example bench_other [words of the rows wanted]`
//!
//! The best of many runs counts. With `RAYON_NUM_THREADS=1` CPU time is measured, so a busy machine does not spoil the figures much.
//! Attention counts the products that causality leaves: forward 4 P per (query, key) pair seen, backward 10 P.
#![allow(unsafe_code)]

use mixtura_kernels::adamw::{AdamWParams, adamw_step};
use mixtura_kernels::attention::{
    AttentionSaved, AttentionSpec, KvCache, QkNorm, attention_backward, attention_decode, attention_forward,
};
use mixtura_kernels::cross_entropy::{HeadGradient, linear_cross_entropy_forward_backward};
use mixtura_kernels::embedding::{embedding_backward, embedding_forward};
use mixtura_kernels::grad_norm::grad_norm_squared;
use mixtura_kernels::isa::Isa;
use mixtura_kernels::norm::{rms_norm_backward, rms_norm_forward};
use mixtura_kernels::pack::{MatView, PackedB};
use mixtura_kernels::precision::Precision;
use mixtura_kernels::roofline::{compute_peak, fma_peak, read_bandwidth};
use mixtura_kernels::softmax::{softmax_rows, softmax_rows_backward};
use mixtura_kernels::ways::Choice;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let isa = Isa::current();
    let mut table = Table {
        wanted,
        flops: 1e9 * fma_peak(isa),
        bf16: 1e9 * compute_peak(Choice::of(Precision::Bf16Native).isa, Precision::Bf16Native),
        bytes: 1e9 * read_bandwidth(),
    };
    println!(
        "{isa}, {} threads: {:.0} GFLOP/s f32, {:.0} bf16, {:.1} GB/s read",
        rayon::current_num_threads(),
        table.flops / 1e9,
        table.bf16 / 1e9,
        table.bytes / 1e9
    );
    for (spec, norm) in [
        (AttentionSpec::new(16, 128, 4, 4, 64), None),
        (AttentionSpec::new(16, 128, 4, 4, 64), Some(QkNorm::FullProjection)),
        (AttentionSpec::new(1, 2048, 4, 4, 64), None),
        (AttentionSpec::new(1, 2048, 8, 2, 128), Some(QkNorm::PerHead)),
    ] {
        if table.wants("attention") {
            attention(&mut table, isa, AttentionSpec { qk_norm: norm, ..spec });
        }
    }
    for (d, v) in [(256, 512), (1024, 32_000)] {
        if table.wants("cross-entropy") {
            cross_entropy(&mut table, isa, d, v);
        }
    }
    norms(&mut table, isa, 2048, 256);
    if table.wants("rms_norm") {
        norms(&mut table, isa, 16 * 2048, 2048);
    }
    embedding(&mut table, isa, 2048, 256, 512);
    optimizer(&mut table, isa, 26_500_000);
    softmax(&mut table, isa, 4096, 64);
}

struct Table {
    wanted: Vec<String>,
    flops: f64,
    bf16: f64,
    bytes: f64,
}

impl Table {
    fn wants(&self, name: &str) -> bool {
        self.wanted.is_empty() || self.wanted.iter().any(|word| name.contains(word.as_str()) || word.contains(name))
    }

    fn measure(&mut self, name: &str, amount: f64, peak: f64, unit: &str, mut work: impl FnMut()) {
        if !self.wants(name) {
            return;
        }
        work();
        let (mut best, start) = (Duration::MAX, Instant::now());
        while start.elapsed() < Duration::from_millis(1200) {
            let start = now();
            work();
            best = best.min(now() - start);
        }
        let rate = amount / best.as_secs_f64();
        println!(
            "{name:58} {:9.3} ms {:8.1} {unit} {:4.0} %",
            best.as_secs_f64() * 1e3,
            rate / 1e9,
            100.0 * rate / peak
        );
    }

    fn compute(&mut self, name: &str, flops: f64, work: impl FnMut()) {
        self.measure(name, flops, self.flops, "GFLOP/s", work);
    }

    fn memory(&mut self, name: &str, bytes: f64, work: impl FnMut()) {
        self.measure(name, bytes, self.bytes, "GB/s   ", work);
    }
}

/// Wall time; with one thread, this process's CPU time, which other load on the machine does not stretch.
fn now() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    if rayon::current_num_threads() > 1 {
        return START.get_or_init(Instant::now).elapsed();
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: clock_gettime writes the timespec it is lent.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Values in (-1, 1).
fn numbers(len: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_u32;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / 2_147_483_648.0 - 1.0
        })
        .collect()
}

fn attention(table: &mut Table, isa: Isa, spec: AttentionSpec) {
    let name = format!(
        "b{} s{} h{} g{} p{}{}",
        spec.batch,
        spec.seq,
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        if spec.qk_norm.is_some() { " qk-norm" } else { "" }
    );
    let qkv = numbers(spec.tokens() * spec.qkv_width());
    let dout = numbers(spec.tokens() * spec.out_width());
    let (mut out, mut dqkv) = (vec![0.0; dout.len()], vec![0.0; qkv.len()]);
    let gammas = match spec.qk_norm {
        None => None,
        Some(QkNorm::FullProjection) => Some((spec.out_width(), spec.kv_heads * spec.head_dim)),
        Some(QkNorm::PerHead) => Some((spec.head_dim, spec.head_dim)),
    };
    let q_norm = gammas.map(|g| vec![1.0; g.0]);
    let k_norm = gammas.map(|g| vec![1.0; g.1]);
    let (q_norm, k_norm) = (q_norm.as_deref(), k_norm.as_deref());
    let (mut dq_norm, mut dk_norm) = (q_norm.map(<[f32]>::to_vec), k_norm.map(<[f32]>::to_vec));
    let mut saved = AttentionSaved::default();
    let pairs = (spec.batch * spec.heads * spec.seq * (spec.seq + 1) / 2) as f64;
    let forward = 4.0 * spec.head_dim as f64 * pairs;
    attention_forward(isa, &spec, &qkv, q_norm, k_norm, &mut out, Some(&mut saved));
    let before = out.clone();
    table.compute(&format!("attention forward  {name}"), forward, || {
        attention_forward(isa, &spec, &qkv, q_norm, k_norm, &mut out, Some(&mut saved));
    });
    table.compute(&format!("attention backward {name}"), 2.5 * forward, || {
        let (dq, dk) = (dq_norm.as_deref_mut(), dk_norm.as_deref_mut());
        attention_backward(isa, &spec, &dout, &before, &qkv, q_norm, k_norm, &saved, &mut dqkv, dq, dk);
    });
    let mut cache = vec![KvCache::new(&spec); spec.batch];
    attention_decode(isa, &spec, &qkv, q_norm, k_norm, &mut cache, &mut out);
    let one = AttentionSpec { seq: 1, ..spec };
    let (new, mut new_out) = (&qkv[..spec.batch * spec.qkv_width()], vec![0.0; spec.batch * spec.out_width()]);
    let bytes = 8.0 * (spec.batch * spec.seq * spec.kv_heads * spec.head_dim) as f64;
    table.memory(&format!("attention decode   {name}"), bytes, || {
        cache.iter_mut().for_each(|cache| cache.truncate(spec.seq - 1));
        attention_decode(isa, &one, new, q_norm, k_norm, &mut cache, &mut new_out);
    });
}

fn cross_entropy(table: &mut Table, isa: Isa, d: usize, v: usize) {
    let tokens = 2048;
    let (x, w) = (numbers(tokens * d), numbers(d * v));
    let targets: Vec<u32> = (0..tokens).map(|t| (t * 37 % v) as u32).collect();
    let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
    let flops = 6.0 * (tokens * d * v) as f64;
    for (precision, peak) in [(Precision::F32, table.flops), (Precision::Bf16Native, table.bf16)] {
        let isa = if precision.is_bf16() { Choice::of(precision).isa } else { isa };
        let head = PackedB::pack(isa, precision, 1, d, v, MatView::row_major(&w, d, v));
        let head_t = PackedB::pack(isa, precision, 1, v, d, MatView::transposed(&w, d, v));
        table.measure(&format!("cross-entropy f+b {precision} T{tokens} d{d} V{v}"), flops, peak, "GFLOP/s", || {
            let dw = HeadGradient::InOut(&mut dw);
            linear_cross_entropy_forward_backward(isa, &x, d, &head, &head_t, &targets, 1.0, &mut dx, dw, None);
        });
    }
}

fn norms(table: &mut Table, isa: Isa, rows: usize, cols: usize) {
    let (x, dy, gamma) = (numbers(rows * cols), numbers(rows * cols), numbers(cols));
    let (mut y, mut dgamma) = (vec![0.0; rows * cols], vec![0.0; cols]);
    let bytes = (4 * rows * cols) as f64;
    table.memory(&format!("rms_norm forward  T{rows} d{cols}"), 2.0 * bytes, || {
        rms_norm_forward(isa, &x, rows, cols, cols, &gamma, 1e-5, &mut y);
    });
    table.memory(&format!("rms_norm backward T{rows} d{cols}"), 3.0 * bytes, || {
        rms_norm_backward(isa, &dy, &x, rows, cols, cols, &gamma, 1e-5, &mut y, &mut dgamma);
    });
}

fn embedding(table: &mut Table, isa: Isa, tokens: usize, d: usize, v: usize) {
    let (weights, dy) = (numbers(v * d), numbers(tokens * d));
    let ids: Vec<u32> = (0..tokens).map(|t| (t * t % v) as u32).collect();
    let (mut out, mut dw) = (vec![0.0; tokens * d], vec![0.0; v * d]);
    let bytes = (4 * tokens * d) as f64;
    table.memory(&format!("embedding forward  T{tokens} d{d} V{v}"), 2.0 * bytes, || {
        embedding_forward(isa, &weights, d, &ids, &mut out)
    });
    table.memory(&format!("embedding backward T{tokens} d{d} V{v}"), bytes, || {
        embedding_backward(isa, &dy, d, &ids, &mut dw, false);
    });
}

fn optimizer(table: &mut Table, isa: Isa, len: usize) {
    let (grad, mut param) = (numbers(len), numbers(len));
    let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
    let params = AdamWParams::at_step(1e-3, 0.9, 0.95, 1e-8, 0.1, 10, 1.0);
    table.memory(&format!("adamw {:.1}M parameters", len as f64 / 1e6), 28.0 * len as f64, || {
        adamw_step(isa, &params, &mut param, &grad, &mut m, &mut v);
    });
    table.memory(&format!("grad norm {:.1}M parameters", len as f64 / 1e6), 4.0 * len as f64, || {
        std::hint::black_box(grad_norm_squared(isa, &grad));
    });
}

fn softmax(table: &mut Table, isa: Isa, tokens: usize, experts: usize) {
    let (x, dy, mut y) = (numbers(tokens * experts), numbers(tokens * experts), vec![0.0; tokens * experts]);
    let bytes = (4 * tokens * experts) as f64;
    table.memory(&format!("router softmax forward  T{tokens} E{experts}"), 2.0 * bytes, || {
        softmax_rows(isa, &x, experts, &mut y)
    });
    let mut dx = vec![0.0; y.len()];
    table.memory(&format!("router softmax backward T{tokens} E{experts}"), 3.0 * bytes, || {
        softmax_rows_backward(isa, &y, &dy, experts, &mut dx);
    });
}
