//! `mixtura doctor`: what this machine offers, what of it is used, and why.

use mixtura_kernels::roofline;
use mixtura_kernels::ways::{self, Choice};
use mixtura_ops::{Isa, Precision, Way};
use serde::Serialize;

use crate::cli::ThreadArgs;
use crate::commands::prepare;
use crate::failure::Failure;
use crate::output::Output;

#[derive(Serialize)]
struct Document {
    version: &'static str,
    cpu: String,
    isa: String,
    isa_reason: String,
    isa_available: Vec<String>,
    /// Vendor, family and model, by which ways are looked up.
    cpu_id: Option<String>,
    ways: Vec<WayDocument>,
    ways_available: Vec<String>,
    fastest_precision: String,
    fastest_reason: String,
    threads: usize,
    cores: usize,
    memory_bytes: Option<u64>,
    f32_gflops: f64,
    /// Of the way that `bf16-native` takes.
    bf16_gflops: f64,
    read_gbps: f64,
    features: Features,
}

/// By which way a precision is computed here.
#[derive(Serialize)]
struct WayDocument {
    precision: String,
    way: String,
    isa: String,
    reason: String,
}

/// What this build can do beside the CPU.
#[derive(Serialize)]
struct Features {
    mpi: bool,
    gpu: bool,
}

/// Examines.
pub fn run(args: &ThreadArgs, output: &Output) -> Result<(), Failure> {
    let threads = prepare(args)?;
    let isa = Isa::current();
    output.note("measuring");
    let (fastest, fastest_reason) = ways::fastest();
    let forced = std::env::var("MIXTURA_ISA").ok().filter(|name| !name.is_empty());
    let document = Document {
        version: env!("CARGO_PKG_VERSION"),
        cpu: field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_string()),
        isa: isa.to_string(),
        isa_reason: match forced {
            Some(_) => "MIXTURA_ISA asks for it".to_string(),
            None => "the fastest that this CPU and operating system offer".to_string(),
        },
        isa_available: Isa::available().iter().map(Isa::to_string).collect(),
        cpu_id: ways::cpu().map(|cpu| cpu.to_string()),
        ways: [Precision::Bf16, Precision::Bf16Native].map(way).into(),
        ways_available: Way::available(isa).iter().map(Way::to_string).collect(),
        fastest_precision: fastest.to_string(),
        fastest_reason,
        threads,
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: field("/proc/meminfo", "MemTotal")
            .and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
            .map(|kib| kib * 1024),
        f32_gflops: roofline::compute_peak(isa, Precision::F32),
        bf16_gflops: roofline::compute_peak(Choice::of(Precision::Bf16Native).isa, Precision::Bf16Native),
        read_gbps: roofline::read_bandwidth(),
        features: Features { mpi: false, gpu: false },
    };
    Ok(output.result(&document, || text(&document))?)
}

fn way(precision: Precision) -> WayDocument {
    let Choice { way, isa, reason } = Choice::of(precision);
    WayDocument { precision: precision.to_string(), way: way.to_string(), isa: isa.to_string(), reason }
}

/// The value after `key` and a colon in a file of such lines.
fn field(path: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

fn text(document: &Document) -> String {
    let Document { version, isa, isa_reason, isa_available, fastest_precision, fastest_reason, threads, cores, .. } =
        document;
    let cpu = match &document.cpu_id {
        Some(id) => format!("{} ({id})", document.cpu),
        None => document.cpu.clone(),
    };
    let ways: String = document
        .ways
        .iter()
        .map(|WayDocument { precision, way, isa, reason }| {
            format!("{precision:<14} by {way} on {isa}, because {reason}\n")
        })
        .collect();
    let memory = document
        .memory_bytes
        .map_or("unknown".to_string(), |bytes| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)));
    format!(
        "mixtura {version}\n\
         CPU            {cpu}\n\
         instructions   {isa}: {isa_reason}; available: {}\n\
         {ways}\
         fastest        {fastest_precision}: {fastest_reason}\n\
         threads        {threads} of {cores} cores\n\
         memory         {memory}, read at {:.1} GB/s\n\
         f32 peak       {:.0} GFLOP/s\n\
         bf16 peak      {:.0} GFLOP/s\n\
         MPI            not built in\n\
         GPU            not built in\n",
        isa_available.join(", "),
        document.read_gbps,
        document.f32_gflops,
        document.bf16_gflops,
    )
}
