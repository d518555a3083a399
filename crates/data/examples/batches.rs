//! The batches that a run reads, as JSON lines: `{"seq": .., "ids": [..], "targets": [..]}`, a target of null not counted.
//!
//! ```text
//! cargo run --release -p mixtura-data --example batches -- RUN.toml STEPS [DATA_SEED [FILE]]
//! ```
//!
//! `RUN.toml` is a run's configuration, of which only `[data]` is read; FILE replaces its paths. Another program that is fed
//! these lines trains on exactly what `mixtura train` trains on.

use std::process::ExitCode;

use mixtura_data::{DataConfig, IGNORED, open};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match batches(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn batches(args: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let [path, steps, more @ ..] = args else {
        return Err("usage: batches RUN.toml STEPS [DATA_SEED [FILE]]".into());
    };
    let run: toml::Table = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?.parse()?;
    let data = run.get("data").cloned().unwrap_or(toml::Value::Table(toml::Table::new()));
    let mut config: DataConfig = data.try_into()?;
    if let Some(seed) = more.first() {
        config.seed = seed.parse()?;
    }
    if let Some(file) = more.get(1) {
        config.paths = vec![file.into()];
    }
    let mut data = open(&config)?;
    for _ in 0..steps.parse()? {
        let batch = data.train.next_batch();
        let targets: Vec<Option<u32>> = batch.targets.iter().map(|&t| (t != IGNORED).then_some(t)).collect();
        println!("{}", serde_json::json!({ "seq": batch.seq, "ids": batch.ids, "targets": targets }));
    }
    Ok(())
}
