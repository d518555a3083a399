//! Times the GEMMs and the three MoE layer shapes in every precision, with the machine's peaks measured between them.
//!
//!     cargo run --release -p mixtura-kernels --example bench_kernels [filter] [isa]
//!
//! Prints GFLOP/s (best of the repeats) and the share of the peak measured just before; rows whose name contains `filter` run.

use mixtura_kernels::experts::{
    Activation, Dispatch, ExpertSaved, ExpertTransposes, ExpertWeights, expert_ffn_backward, expert_ffn_forward,
};
use mixtura_kernels::gemm::{Accum, matmul, matmul_tn};
use mixtura_kernels::isa::Isa;
use mixtura_kernels::pack::{MatView, PackedB};
use mixtura_kernels::precision::Precision;
use mixtura_kernels::roofline;
use std::time::{Duration, Instant};

const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Bf16Native, Precision::Bf16];

fn main() {
    let filter = std::env::args().nth(1).unwrap_or_default();
    let isa = std::env::args().nth(2).map_or_else(Isa::current, |name| name.parse().expect("an instruction set"));
    println!("{isa}, {} threads; read {:.1} GB/s", rayon::current_num_threads(), roofline::read_bandwidth());
    for (m, n, k) in [(2048, 2048, 2048), (512, 2048, 512), (64, 2048, 512)] {
        for precision in PRECISIONS {
            let name = format!("gemm {m}x{n}x{k} {precision}");
            if name.contains(&filter) {
                gemm(isa, precision, m, n, k, &name);
            }
        }
    }
    for (tokens, d, f, experts, k) in [
        (2048, 512, 1024, 16, 2),
        (2048, 512, 256, 64, 8),
        (4096, 1024, 2048, 8, 2),
        (2048, 768, 2048, 8, 2),
        (1, 1024, 2048, 8, 1),
        (1, 1024, 2048, 8, 2),
        (4, 1024, 1024, 64, 8),
        (8, 1024, 1024, 64, 8),
    ] {
        for precision in PRECISIONS {
            let name = format!("moe T{tokens} d{d} f{f} E{experts} k{k} {precision}");
            if name.contains(&filter) {
                layer(isa, precision, tokens, d, f, experts, k, &name);
            }
        }
    }
}

/// The best of the runs that fit into a second, at least five.
fn best(mut run: impl FnMut()) -> f64 {
    run();
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut runs = 0;
    while runs < 5 || start.elapsed() < Duration::from_millis(300) {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

fn report(name: &str, flops: f64, seconds: f64, peak: f64) {
    let rate = flops / seconds / 1e9;
    println!("{name:44} {:9.3} ms {rate:8.1} GFLOP/s {:5.1} % of {peak:.0}", seconds * 1e3, 100.0 * rate / peak);
}

fn gemm(isa: Isa, precision: Precision, m: usize, n: usize, k: usize, name: &str) {
    let peak = roofline::compute_peak(isa, precision);
    let (a, b) = (numbers(1, m * k), numbers(2, k * n));
    let packed = PackedB::pack(isa, precision, 1, k, n, MatView::row_major(&b, k, n));
    let mut c = vec![0f32; m * n];
    let flops = 2.0 * (m * n * k) as f64;
    report(name, flops, best(|| matmul(isa, &a, m, &packed, &mut c, Accum::Replace)), peak);
    let mut dw = vec![0f32; k * n];
    let dc = numbers(3, m * n);
    report(
        &format!("{name} tn"),
        flops,
        best(|| matmul_tn(isa, precision, &a, &dc, m, k, n, &mut dw, Accum::Replace)),
        peak,
    );
    if m == 2048 {
        for (what, view) in [("pack", MatView::row_major(&b, k, n)), ("pack^T", MatView::transposed(&b, n, k))] {
            let mut packed = PackedB::pack(isa, precision, 1, k, n, view);
            let seconds = best(|| packed.repack(isa, view));
            println!(
                "{:44} {:9.3} ms {:8.1} GB/s read",
                format!("{what} {k}x{n} {precision}"),
                seconds * 1e3,
                4.0 * (k * n) as f64 / seconds / 1e9
            );
        }
    }
}

fn layer(isa: Isa, precision: Precision, tokens: usize, d: usize, f: usize, experts: usize, k: usize, name: &str) {
    let peak = roofline::compute_peak(isa, precision);
    let plan = Plan::random(tokens, experts, k);
    let dispatch = plan.dispatch();
    let rows = tokens * k;
    let (x, dy, weight) = (numbers(1, tokens * d), numbers(2, tokens * d), numbers(3, rows));
    let (gate_up, down) = (numbers(4, experts * d * 2 * f), numbers(5, experts * f * d));
    let (swiglu, mut spare) = (Activation::SwiGlu, Vec::new());
    let mut weights = ExpertWeights::pack(&mut spare, isa, precision, experts, d, f, swiglu, &gate_up, &down);
    let mut y = vec![0f32; tokens * d];
    let flops = 2.0 * 3.0 * (rows * d * f) as f64;
    if tokens <= 8 {
        let seconds = best(|| expert_ffn_forward(isa, &x, &weights, &dispatch, &weight, &mut y, None));
        // What bounds a few rows: the weights of every expert that has one (of an expert or two, they stay in L3).
        let chosen = plan.row_offsets.windows(2).filter(|offsets| offsets[0] < offsets[1]).count();
        let bytes = (chosen * 3 * d * f * if precision.is_bf16() { 2 } else { 4 }) as f64;
        println!("{name:44} {:9.3} ms {:8.1} GB/s", seconds * 1e3, bytes / seconds / 1e9);
        return;
    }
    let mut saved = ExpertSaved::new();
    let forward = best(|| expert_ffn_forward(isa, &x, &weights, &dispatch, &weight, &mut y, Some(&mut saved)));
    report(&format!("{name} fwd"), flops, forward, peak);
    let mut transposes = ExpertTransposes::pack(&mut spare, isa, precision, experts, d, f, swiglu, &gate_up, &down);
    let packing = |what: &str, work: &mut dyn FnMut()| {
        let (seconds, bytes) = (best(work), 4.0 * (gate_up.len() + down.len()) as f64);
        println!("{:44} {:9.3} ms {:8.1} GB/s read", format!("{name} {what}"), seconds * 1e3, bytes / seconds / 1e9);
    };
    packing("pack", &mut || {
        weights.gate_up.repack(isa, MatView::row_major(&gate_up, d, 2 * f));
        weights.down.repack(isa, MatView::row_major(&down, f, d));
    });
    packing("pack^T", &mut || {
        transposes.gate_up_t.repack(isa, MatView::transposed(&gate_up, d, 2 * f));
        transposes.down_t.repack(isa, MatView::transposed(&down, f, d));
    });
    let (mut dx, mut dweight) = (vec![0f32; tokens * d], vec![0f32; rows]);
    let (mut dgate_up, mut ddown) = (vec![0f32; gate_up.len()], vec![0f32; down.len()]);
    let backward = best(|| {
        expert_ffn_backward(
            isa,
            &dy,
            &x,
            &transposes,
            &dispatch,
            &weight,
            &saved,
            &mut dx,
            &mut dgate_up,
            &mut ddown,
            &mut dweight,
        );
    });
    report(&format!("{name} bwd"), 2.0 * flops, backward, peak);
    report(&format!("{name} fwd+bwd"), 3.0 * flops, forward + backward, peak);
}

/// A random routing: k different experts per token.
struct Plan {
    tokens: usize,
    row_offsets: Vec<u32>,
    token_of_row: Vec<u32>,
    token_offsets: Vec<u32>,
    row_of_choice: Vec<u32>,
}

impl Plan {
    fn random(tokens: usize, experts: usize, k: usize) -> Plan {
        let mut state = 88172645463325252u64;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 20) as usize
        };
        let mut rows: Vec<(usize, usize, usize)> = Vec::new();
        for token in 0..tokens {
            let mut chosen: Vec<usize> = Vec::new();
            while chosen.len() < k {
                let expert = next() % experts;
                if !chosen.contains(&expert) {
                    rows.push((expert, token, chosen.len()));
                    chosen.push(expert);
                }
            }
        }
        rows.sort_unstable();
        let row_offsets = (0..=experts).map(|expert| rows.partition_point(|row| row.0 < expert) as u32).collect();
        let mut row_of_choice = vec![0u32; rows.len()];
        for (row, &(_, token, choice)) in rows.iter().enumerate() {
            row_of_choice[token * k + choice] = row as u32;
        }
        Plan {
            tokens,
            row_offsets,
            token_of_row: rows.iter().map(|row| row.1 as u32).collect(),
            token_offsets: (0..=tokens).map(|token| (token * k) as u32).collect(),
            row_of_choice,
        }
    }

    fn dispatch(&self) -> Dispatch<'_> {
        Dispatch {
            tokens: self.tokens,
            row_offsets: &self.row_offsets,
            token_of_row: &self.token_of_row,
            token_offsets: &self.token_offsets,
            row_of_choice: &self.row_of_choice,
        }
    }
}

fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 26) as f32 - 0.125
        })
        .collect()
}
