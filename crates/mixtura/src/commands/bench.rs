//! `mixtura bench`: the machine's ceilings, then our figures as a share of them, all measured in this run.
//!
//! Shapes are those of the peers' scripts in `bench/peers`. A row is the median over at least five repetitions. Layers include the
//! router and the assignment; their weights are packed once, as between two optimizer steps. `train_step` is a whole step
//! with data, packing, clipping and AdamW. Floating-point operations of a layer are `2*3*T*k*d*f` forward and twice that backward.

mod gemm;
mod layer;
mod train_step;
mod inference;

use std::path::PathBuf;
use std::time::Instant;

use mixtura_kernels::roofline;
use mixtura_kernels::ways::Choice;
use mixtura_ops::{Isa, Numerics, Precision, Way};
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
    /// By which way its products are computed, or "".
    pub way: String,
    /// Median milliseconds.
    pub ms: Option<f64>,
    /// 10^9 floating-point operations per second.
    pub gflops: Option<f64>,
    /// 10^9 bytes per second.
    pub gbps: Option<f64>,
    /// Tokens per second.
    pub tokens_per_second: Option<f64>,
    /// Sequences at a time, in inference.
    pub batch: Option<usize>,
    /// From opening a model to its first token, in seconds.
    pub start_seconds: Option<f64>,
    /// The most memory that the process has held so far, in MiB, in inference.
    pub peak_mib: Option<f64>,
    /// The ceiling that bounds it, in its own unit.
    pub ceiling: Option<f64>,
    /// Its figure over that ceiling.
    pub share: Option<f64>,
}

/// What this machine can do at most.
pub struct Peaks {
    /// AMX tiles, where there are any, in GFLOP/s.
    pub amx: Option<f64>,
    /// `VDPBF16PS`, where there is one, in GFLOP/s.
    pub vdpbf16ps: Option<f64>,
    /// f32 FMA, in GFLOP/s.
    pub fma: f64,
    /// Reading memory, in GB/s.
    pub read: f64,
}

impl Peaks {
    fn measure(isa: Isa) -> Self {
        let peak = |way: Way| way.on(isa).map(|isa| roofline::compute_peak(isa, Precision::Bf16));
        Self {
            amx: peak(Way::Amx),
            vdpbf16ps: peak(Way::Vdpbf16ps),
            fma: roofline::fma_peak(isa),
            read: roofline::read_bandwidth(),
        }
    }

    /// The arithmetic ceiling of a way, in GFLOP/s.
    pub fn of(&self, way: Way) -> f64 {
        match way {
            Way::Fma => self.fma,
            Way::Vdpbf16ps => self.vdpbf16ps.unwrap_or(self.fma),
            Way::Amx => self.amx.unwrap_or(self.fma),
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
    /// The model that inference is measured on.
    pub model: Option<PathBuf>,
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

    /// A row bounded by arithmetic.
    pub fn arithmetic(&self, name: &str, shape: &str, numerics: Numerics, seconds: f64, flops: f64) -> Row {
        let (gflops, ceiling) = (flops / seconds / 1e9, self.peaks.of(numerics.way()));
        Row {
            name: name.into(),
            shape: shape.into(),
            precision: numerics.precision.to_string(),
            way: numerics.way().to_string(),
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
        model: args.model.clone(),
        shrink: usize::from(args.shrink.get()),
    };
    if args.model.is_some() && !matches!(args.target, BenchTarget::Decode | BenchTarget::Prefill) {
        return Err(Failure::usage("--model is for `bench decode` and `bench prefill`"));
    }
    let mut rows = ceilings(&bench.peaks, threads);
    let all = args.target == BenchTarget::All;
    let parts: [(BenchTarget, &str, fn(&Bench, Numerics) -> Result<Vec<Row>, Failure>); 6] = [
        (BenchTarget::Gemm, "matrix products", |bench, numerics| Ok(gemm::rows(bench, numerics))),
        (BenchTarget::Layer, "MoE layers", |bench, numerics| Ok(layer::rows(bench, numerics))),
        (BenchTarget::Train, "a training step", |bench, numerics| Ok(train_step::rows(bench, numerics))),
        (BenchTarget::Decode, "decoding", inference::decode_rows),
        (BenchTarget::Prefill, "reading a prompt", inference::prefill_rows),
        (BenchTarget::Scaling, "how a layer scales", |bench, numerics| Ok(layer::scaling_rows(bench, numerics))),
    ];
    for (target, words, measure) in parts {
        if args.target != target && !(all && target != BenchTarget::Scaling) {
            continue;
        }
        for numerics in bench.precisions.iter().flat_map(|&precision| numerics(precision, args.every_way)) {
            output.note(&format!("measuring {words} in {} by {}", numerics.precision, numerics.way()));
            rows.extend(measure(&bench, numerics)?);
        }
    }
    Ok(output.result(&rows, || text(&rows, threads))?)
}

/// A precision by the way chosen for it, or by every way.
fn numerics(precision: Precision, every_way: bool) -> Vec<Numerics> {
    if !every_way || !precision.is_bf16() {
        return vec![Numerics::new(precision)];
    }
    Way::available(Isa::current()).into_iter().filter_map(|way| Numerics::by(precision, way)).collect()
}

fn ceilings(peaks: &Peaks, threads: usize) -> Vec<Row> {
    let row = |name: &str, precision: &str, way: &str, gflops: Option<f64>, gbps: Option<f64>| Row {
        name: name.into(),
        shape: format!("{threads} threads"),
        precision: precision.into(),
        way: way.into(),
        gflops,
        gbps,
        ..Row::default()
    };
    vec![
        row("ceiling_amx", "bf16", "amx", peaks.amx, None),
        row("ceiling_vdpbf16ps", "bf16-native", "vdpbf16ps", peaks.vdpbf16ps, None),
        row("ceiling_f32", "f32", "fma", Some(peaks.fma), None),
        row("ceiling_read", "", "", None, Some(peaks.read)),
    ]
}

fn text(rows: &[Row], threads: usize) -> String {
    let mut table =
        Table::new(["work", "shape", "precision", "way", "ms", "GFLOP/s", "GB/s", "tokens/s", "ceiling", "share"]);
    let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
    for row in rows {
        table.row([
            row.name.clone(),
            row.shape.clone(),
            row.precision.clone(),
            row.way.clone(),
            number(row.ms, 3),
            number(row.gflops, 0),
            number(row.gbps, 1),
            number(row.tokens_per_second, 0),
            number(row.ceiling, 0),
            row.share.map_or("-".into(), |s| format!("{:.0} %", 100.0 * s)),
        ]);
    }
    let ways = [Precision::Bf16, Precision::Bf16Native].map(|precision| {
        let Choice { way, reason, .. } = Choice::of(precision);
        format!("{precision} goes by {way}: {reason}\n")
    });
    format!(
        "{threads} threads, instruction set {}; medians; the ceilings were measured in this run\n{}\n{table}",
        Isa::current(),
        ways.concat()
    )
}
