//! `mixtura bench`: the machine's ceilings, then our figures as a share of them, all measured in this run.
//!
//! Shapes are those of the peers' scripts in `bench/peers`. A row is the median over at least five repetitions. Layers include the
//! router and the assignment; their weights are packed once, as between two optimizer steps. `train_step` is a whole step
//! with data, packing, clipping and AdamW. Floating-point operations of a layer are `2*3*T*k*d*f` forward and twice that backward.

mod gemm;
mod layer;
mod train_step;
mod decode;

use std::time::Instant;

use mixtura_kernels::roofline;
use mixtura_ops::{Isa, Numerics, Precision};
use mixtura_train::table::Table;
use serde::Serialize;

use crate::cli::{BenchArgs, BenchTarget};
use crate::commands::prepare;
use crate::failure::Failure;
use crate::output::Output;

/// One line of the report; null where a figure does not apply.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// Its size, as in the peers' scripts.
    pub shape: String,
    /// "f32", "bf16", "bf16-native", or "" for bandwidth.
    pub precision: String,
    /// Median milliseconds.
    pub ms: Option<f64>,
    /// 10^9 floating-point operations per second.
    pub gflops: Option<f64>,
    /// 10^9 bytes per second.
    pub gbps: Option<f64>,
    /// Tokens per second.
    pub tokens_per_second: Option<f64>,
    /// The ceiling that bounds it, in its own unit.
    pub ceiling: Option<f64>,
    /// Its figure over that ceiling.
    pub share: Option<f64>,
}

/// What this machine can do at most.
pub struct Peaks {
    /// AMX tiles, where there are any, in GFLOP/s.
    pub amx: Option<f64>,
    /// bf16 operands on the unit that `bf16-native` uses, in GFLOP/s.
    pub bf16: f64,
    /// f32 FMA, in GFLOP/s.
    pub f32: f64,
    /// Reading memory, in GB/s.
    pub read: f64,
}

impl Peaks {
    fn measure(isa: Isa) -> Self {
        let bf16 = roofline::compute_peak(isa, Precision::Bf16Native);
        Self {
            amx: (isa == Isa::Amx).then_some(bf16),
            bf16,
            f32: roofline::fma_peak(isa),
            read: roofline::read_bandwidth(),
        }
    }
}

/// What every part of the benchmark needs.
pub struct Bench {
    /// Ceilings of this machine, measured first.
    pub peaks: Peaks,
    /// Precisions to measure.
    pub precisions: Vec<Precision>,
    /// Seconds per row, at least.
    pub seconds: f64,
    /// Divides every size, for trying the command out; 1 measures.
    pub shrink: usize,
}

impl Bench {
    /// Median seconds of `run` over at least five calls, after one to warm up.
    pub fn median(&self, mut run: impl FnMut()) -> f64 {
        run();
        let started = Instant::now();
        let mut times = Vec::new();
        while times.len() < 5 || started.elapsed().as_secs_f64() < self.seconds {
            let mark = Instant::now();
            run();
            times.push(mark.elapsed().as_secs_f64());
        }
        median(&mut times)
    }

    /// A size of a benchmark, as it is unless the sizes are shrunk.
    pub fn size(&self, full: usize) -> usize {
        (full / self.shrink).max(1)
    }

    /// The arithmetic ceiling of a precision, in GFLOP/s.
    pub fn ceiling(&self, precision: Precision) -> f64 {
        if precision.is_bf16() { self.peaks.bf16 } else { self.peaks.f32 }
    }

    /// A row bounded by arithmetic.
    pub fn arithmetic(&self, name: &str, shape: &str, precision: Precision, seconds: f64, flops: f64) -> Row {
        let (gflops, ceiling) = (flops / seconds / 1e9, self.ceiling(precision));
        Row {
            name: name.into(),
            shape: shape.into(),
            precision: precision.to_string(),
            ms: Some(seconds * 1e3),
            gflops: Some(gflops),
            ceiling: Some(ceiling),
            share: Some(gflops / ceiling),
            ..Row::default()
        }
    }
}

/// The middle of the times.
pub fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Measures and prints.
pub fn run(args: &BenchArgs, output: &Output) -> Result<(), Failure> {
    let threads = prepare(&args.threads)?;
    if !(args.seconds > 0.0 && args.seconds <= 600.0) {
        return Err(Failure::usage(format!("--seconds {}: expected a number above 0 and at most 600", args.seconds)));
    }
    output.note("measuring the ceilings");
    let bench = Bench {
        peaks: Peaks::measure(Isa::current()),
        precisions: match args.precision {
            Some(precision) => vec![precision.into()],
            None => vec![Precision::F32, Precision::Bf16, Precision::Bf16Native],
        },
        seconds: args.seconds,
        shrink: usize::from(args.shrink.get()),
    };
    let mut rows = ceilings(&bench.peaks, threads);
    let all = args.target == BenchTarget::All;
    let parts: [(BenchTarget, &str, fn(&Bench, Numerics) -> Vec<Row>); 5] = [
        (BenchTarget::Gemm, "matrix products", gemm::rows),
        (BenchTarget::Layer, "MoE layers", layer::rows),
        (BenchTarget::Train, "a training step", train_step::rows),
        (BenchTarget::Decode, "decoding", decode::rows),
        (BenchTarget::Scaling, "how a layer scales", layer::scaling_rows),
    ];
    for (target, words, measure) in parts {
        if args.target != target && !(all && target != BenchTarget::Scaling) {
            continue;
        }
        for &precision in &bench.precisions {
            output.note(&format!("measuring {words} in {precision}"));
            rows.extend(measure(&bench, Numerics::new(precision)));
        }
    }
    Ok(output.result(&rows, || text(&rows, threads))?)
}

fn ceilings(peaks: &Peaks, threads: usize) -> Vec<Row> {
    let row = |name: &str, precision: &str, gflops: Option<f64>, gbps: Option<f64>| Row {
        name: name.into(),
        shape: format!("{threads} threads"),
        precision: precision.into(),
        gflops,
        gbps,
        ..Row::default()
    };
    vec![
        row("ceiling_amx", "bf16", peaks.amx, None),
        row("ceiling_bf16", "bf16-native", Some(peaks.bf16), None),
        row("ceiling_f32", "f32", Some(peaks.f32), None),
        row("ceiling_read", "", None, Some(peaks.read)),
    ]
}

fn text(rows: &[Row], threads: usize) -> String {
    let mut table = Table::new(["work", "shape", "precision", "ms", "GFLOP/s", "GB/s", "tokens/s", "ceiling", "share"]);
    let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
    for row in rows {
        table.row([
            row.name.clone(),
            row.shape.clone(),
            row.precision.clone(),
            number(row.ms, 3),
            number(row.gflops, 0),
            number(row.gbps, 1),
            number(row.tokens_per_second, 0),
            number(row.ceiling, 0),
            row.share.map_or("-".into(), |s| format!("{:.0} %", 100.0 * s)),
        ]);
    }
    format!(
        "{} threads, instruction set {}; medians; the ceilings were measured in this run\n\n{table}",
        threads,
        Isa::current()
    )
}
