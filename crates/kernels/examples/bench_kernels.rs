//! Times the GEMMs and the MoE layer shapes in every precision, by every way that the machine has.
//!
//!     cargo run --release -p mixtura-kernels --example bench_kernels [filter] [isa]
//!
//! What contains every word of `filter` in its name runs ("E64 bf16-native"). The kinds of a shape (f32, then each bf16 precision by each way) and the ceiling of each
//! take short turns, one after the other, so that what else the machine does weighs on all of them; the best turn of each counts.
//! A row prints GFLOP/s, the share of its way's ceiling, and its rate over that of the first kind, f32 unless that was filtered out.

use mixtura_kernels::experts::{
    Activation, Dispatch, ExpertSaved, ExpertTransposes, ExpertWeights, expert_ffn_backward, expert_ffn_forward,
};
use mixtura_kernels::gemm::{Accum, matmul, matmul_tn};
use mixtura_kernels::isa::Isa;
use mixtura_kernels::pack::{MatView, PackedB};
use mixtura_kernels::precision::Precision;
use mixtura_kernels::roofline;
use mixtura_kernels::ways::Way;
use std::time::{Duration, Instant};

fn main() {
    let filter = std::env::args().nth(1).unwrap_or_default();
    let isa = std::env::args().nth(2).map_or_else(Isa::current, |name| name.parse().expect("an instruction set"));
    let matching = |name: &str| -> Vec<Kind> {
        let contains =
            |kind: &Kind| filter.split_whitespace().all(|word| format!("{name} {}", kind.name()).contains(word));
        kinds(isa).into_iter().filter(contains).collect()
    };
    println!("{isa}, {} threads; read {:.1} GB/s", rayon::current_num_threads(), roofline::read_bandwidth());
    for (m, n, k) in [(2048, 2048, 2048), (512, 2048, 512), (64, 2048, 512)] {
        let name = format!("gemm {m}x{n}x{k}");
        gemm(&matching(&name), m, n, k, &name);
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
        let name = format!("moe T{tokens} d{d} f{f} E{experts} k{k}");
        layer(&matching(&name), tokens, d, f, experts, k, &name);
    }
}

/// A precision, and the instruction set that computes it by one of its ways.
#[derive(Clone, Copy)]
struct Kind {
    precision: Precision,
    isa: Isa,
}

impl Kind {
    fn name(self) -> String {
        match self.precision {
            Precision::F32 => "f32".into(),
            precision => format!("{precision} by {}", Way::of(self.isa, precision)),
        }
    }
}

/// f32, then bf16-native and bf16 by every way.
fn kinds(isa: Isa) -> Vec<Kind> {
    let mut kinds = vec![Kind { precision: Precision::F32, isa }];
    for precision in [Precision::Bf16Native, Precision::Bf16] {
        kinds.extend(Way::ALL.into_iter().filter_map(|way| way.on(isa)).map(|isa| Kind { precision, isa }));
    }
    kinds
}

/// What a turn of a kind measures: each part's seconds.
type Turn<'a, const PARTS: usize> = Box<dyn FnMut() -> [f64; PARTS] + 'a>;

/// Takes turns for half a second per kind, at least five each; the best seconds of each part of each kind.
fn best<const PARTS: usize>(mut turns: Vec<Turn<'_, PARTS>>) -> Vec<[f64; PARTS]> {
    let mut best = vec![[f64::INFINITY; PARTS]; turns.len()];
    turns.iter_mut().for_each(|turn| _ = turn());
    let (start, limit) = (Instant::now(), Duration::from_millis(500) * turns.len() as u32);
    let mut rounds = 0;
    while rounds < 5 || start.elapsed() < limit {
        for (turn, best) in turns.iter_mut().zip(&mut best) {
            for (seconds, best) in turn().into_iter().zip(best) {
                *best = best.min(seconds);
            }
        }
        rounds += 1;
    }
    best
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// The ceilings of the kinds' ways, each the best of several looks.
fn peaks(kinds: &[Kind]) -> Vec<f64> {
    let look = || kinds.iter().map(|kind| roofline::compute_peak(kind.isa, kind.precision)).collect::<Vec<_>>();
    (0..5).map(|_| look()).reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a.max(*b)).collect()).expect("five looks")
}

fn report(kinds: &[Kind], name: &str, part: &str, flops: f64, seconds: impl Fn(usize) -> f64, peaks: &[f64]) {
    for (at, kind) in kinds.iter().enumerate() {
        let rate = flops / seconds(at) / 1e9;
        println!(
            "{:58} {:9.3} ms {rate:8.1} GFLOP/s {:5.1} % of {:.0}, {:.2}x",
            format!("{name} {part} {}", kind.name()),
            seconds(at) * 1e3,
            100.0 * rate / peaks[at],
            peaks[at],
            seconds(0) / seconds(at),
        );
    }
}

fn gemm(kinds: &[Kind], m: usize, n: usize, k: usize, name: &str) {
    if kinds.is_empty() {
        return;
    }
    let peaks = peaks(kinds);
    let (a, b, dc) = (numbers(1, m * k), numbers(2, k * n), numbers(3, m * n));
    let turn = |&Kind { precision, isa }: &Kind| -> Turn<'_, 4> {
        let view = MatView::row_major(&b, k, n);
        let (a, dc, turned) = (&a, &dc, MatView::transposed(&b, n, k));
        let mut packed = PackedB::pack(isa, precision, 1, k, n, view);
        let mut packed_t = (n == k).then(|| PackedB::pack(isa, precision, 1, k, n, turned));
        let (mut c, mut dw) = (vec![0f32; m * n], vec![0f32; k * n]);
        Box::new(move || {
            [
                seconds(|| matmul(isa, a, m, &packed, &mut c, Accum::Replace)),
                seconds(|| matmul_tn(isa, precision, a, dc, m, k, n, &mut dw, Accum::Replace)),
                seconds(|| packed.repack(isa, view)),
                packed_t.as_mut().map_or(0.0, |packed| seconds(|| packed.repack(isa, turned))),
            ]
        })
    };
    let best = best(kinds.iter().map(turn).collect());
    let flops = 2.0 * (m * n * k) as f64;
    report(kinds, name, "", flops, |at| best[at][0], &peaks);
    report(kinds, name, "tn", flops, |at| best[at][1], &peaks);
    for (part, what) in [(2, "pack"), (3, "pack^T")].into_iter().take(if n == k { 2 } else { 1 }) {
        for (kind, best) in kinds.iter().zip(&best) {
            let rate = 4.0 * (k * n) as f64 / best[part] / 1e9;
            println!(
                "{:58} {:9.3} ms {rate:8.1} GB/s read",
                format!("{what} {k}x{n} {}", kind.precision),
                best[part] * 1e3
            );
        }
    }
}

fn layer(kinds: &[Kind], tokens: usize, d: usize, f: usize, experts: usize, k: usize, name: &str) {
    if kinds.is_empty() {
        return;
    }
    let peaks = peaks(kinds);
    let plan = Plan::random(tokens, experts, k);
    let rows = tokens * k;
    let (x, dy, weight) = (numbers(1, tokens * d), numbers(2, tokens * d), numbers(3, rows));
    let (gate_up, down) = (numbers(4, experts * d * 2 * f), numbers(5, experts * f * d));
    let few = tokens <= 8;
    let turn = |&Kind { precision, isa }: &Kind| -> Turn<'_, 2> {
        let (x, dy, weight, dispatch) = (&x, &dy, &weight, plan.dispatch());
        let (swiglu, mut spare) = (Activation::SwiGlu, Vec::new());
        let weights = ExpertWeights::pack(&mut spare, isa, precision, experts, d, f, swiglu, &gate_up, &down);
        let pack_transposes =
            || ExpertTransposes::pack(&mut Vec::new(), isa, precision, experts, d, f, swiglu, &gate_up, &down);
        let transposes = (!few).then(pack_transposes);
        let (mut y, mut saved) = (vec![0f32; tokens * d], ExpertSaved::new());
        let (mut dx, mut dweight) = (vec![0f32; tokens * d], vec![0f32; rows]);
        let trained = if few { 0 } else { experts * d * f };
        let (mut dgate_up, mut ddown) = (vec![0f32; 2 * trained], vec![0f32; trained]);
        Box::new(move || {
            let keep = (!few).then_some(&mut saved);
            let forward = seconds(|| expert_ffn_forward(isa, x, &weights, &dispatch, weight, &mut y, keep));
            let Some(transposes) = &transposes else { return [forward, 0.0] };
            let backward = seconds(|| {
                expert_ffn_backward(
                    isa,
                    dy,
                    x,
                    transposes,
                    &dispatch,
                    weight,
                    &saved,
                    &mut dx,
                    &mut dgate_up,
                    &mut ddown,
                    &mut dweight,
                );
            });
            [forward, backward]
        })
    };
    let best = best(kinds.iter().map(turn).collect());
    if few {
        // What bounds a few rows: the weights of every expert that has one (of an expert or two, they stay in L3).
        let chosen = plan.row_offsets.windows(2).filter(|offsets| offsets[0] < offsets[1]).count();
        for (kind, [forward, _]) in kinds.iter().zip(&best) {
            let bytes = (chosen * 3 * d * f * if kind.precision.is_bf16() { 2 } else { 4 }) as f64;
            println!(
                "{:58} {:9.3} ms {:8.1} GB/s, {:.2}x",
                format!("{name} {}", kind.name()),
                forward * 1e3,
                bytes / forward / 1e9,
                best[0][0] / forward
            );
        }
        return;
    }
    let flops = 2.0 * 3.0 * (rows * d * f) as f64;
    report(kinds, name, "fwd", flops, |at| best[at][0], &peaks);
    report(kinds, name, "bwd", 2.0 * flops, |at| best[at][1], &peaks);
    report(kinds, name, "both", 3.0 * flops, |at| best[at][0] + best[at][1], &peaks);
    for kind in kinds {
        report_packing(name, kind, [experts, d, f], &gate_up, &down);
    }
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

/// How fast the weights of a layer are packed, as they are and transposed.
fn report_packing(
    name: &str,
    &Kind { precision, isa }: &Kind,
    [experts, d, f]: [usize; 3],
    gate_up: &[f32],
    down: &[f32],
) {
    let (swiglu, mut spare) = (Activation::SwiGlu, Vec::new());
    let mut weights = ExpertWeights::pack(&mut spare, isa, precision, experts, d, f, swiglu, gate_up, down);
    let mut transposes = ExpertTransposes::pack(&mut spare, isa, precision, experts, d, f, swiglu, gate_up, down);
    let packing = |what: &str, work: &mut dyn FnMut()| {
        let time = (0..5).map(|_| seconds(&mut *work)).fold(f64::INFINITY, f64::min);
        let bytes = 4.0 * (gate_up.len() + down.len()) as f64;
        println!(
            "{:44} {:9.3} ms {:8.1} GB/s read",
            format!("{name} {precision} {isa} {what}"),
            time * 1e3,
            bytes / time / 1e9
        );
    };
    packing("pack", &mut || {
        weights.gate_up.repack(isa, MatView::row_major(gate_up, d, 2 * f));
        weights.down.repack(isa, MatView::row_major(down, f, d));
    });
    packing("pack^T", &mut || {
        transposes.gate_up_t.repack(isa, MatView::transposed(gate_up, d, 2 * f));
        transposes.down_t.repack(isa, MatView::transposed(down, f, d));
    });
}
