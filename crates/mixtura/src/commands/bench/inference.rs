//! Inference: tokens of one sequence and of eight, bound by the bytes of the weights that they touch, and a prompt, bound by arithmetic.
//!
//! On the model in `--model`, from its files as `mixtura generate` opens it, or on random weights of a shape of our own.

use std::time::Instant;

use burn::tensor::Device;
use mixtura_checkpoint::load_sealed;
use mixtura_nn::{Decoder, ForwardContext, KvCache, LayerFfn, ModelConfig, MoeConfig, NewTokens, Project};
use mixtura_ops::Numerics;
use mixtura_train::cost::peak_memory;

use super::{Bench, Row};
use crate::failure::Failure;
use crate::model_dir::checkpoint_failure;

/// Of the sequences that tokens are added to.
const PROMPT: usize = 32;
/// Of the one that is read as a whole.
const LONG_PROMPT: usize = 512;
const TOGETHER: usize = 8;

/// A model to be measured.
struct Subject {
    model: Decoder,
    shape: String,
    /// From asking for it to its first token after a prompt; only where it was read from files.
    start_seconds: Option<f64>,
}

impl Subject {
    fn open(bench: &Bench, numerics: Numerics) -> Result<Self, Failure> {
        let Some(path) = &bench.model else { return Ok(Self::random(bench)) };
        let started = Instant::now();
        let loaded = load_sealed(path, numerics).map_err(checkpoint_failure)?;
        let subject = Self { model: loaded.decoder, shape: shape(&loaded.config), start_seconds: None };
        let mut cache = subject.model.cache(PROMPT);
        step(&subject.model, &[subject.prompt(PROMPT, 0)], std::slice::from_mut(&mut cache), numerics);
        Ok(Self { start_seconds: Some(started.elapsed().as_secs_f64()), ..subject })
    }

    fn random(bench: &Bench) -> Self {
        // Heads at least two wide, which rotary embedding needs.
        let (d, f, v) = (bench.size(1024).max(32), bench.size(1024), bench.size(8192).max(128));
        let config = ModelConfig { vocab: v, moe: Some(MoeConfig::new(16, 2, f)), ..ModelConfig::new(d, 4, 16, 1024) };
        let model = Decoder::new(&config, 0, &Device::default()).expect("the shape is a constant");
        Self { model, shape: shape(&config), start_seconds: None }
    }

    /// Some ids; others for another sequence.
    fn prompt(&self, tokens: usize, sequence: usize) -> Vec<u32> {
        let vocab = self.model.config().vocab;
        (0..tokens).map(|i| ((i * 61 + sequence * 7919) % vocab) as u32).collect()
    }

    /// Bytes of weights that a token reads: all but the embedding, of the experts those that it visits.
    fn bytes_per_token(&self) -> f64 {
        let config = self.model.config();
        let counts = config.parameter_counts().expect("the model exists");
        let width = self.model.weight_bytes() as f64 / counts.total as f64;
        (counts.active_without_embedding + config.vocab * config.d_model) as f64 * width
    }
}

fn shape(config: &ModelConfig) -> String {
    let experts = match (&config.moe, config.layer_ffn(config.layers.saturating_sub(1))) {
        (Some(moe), Ok(LayerFfn::Moe { experts, d_expert, .. })) => format!(" E{experts} k{} f{d_expert}", moe.top_k),
        _ => String::new(),
    };
    format!("d{} L{} h{}{experts} V{}", config.d_model, config.layers, config.heads, config.vocab)
}

/// One pass in which every sequence gets its ids.
fn step(model: &Decoder, ids: &[Vec<u32>], caches: &mut [KvCache], numerics: Numerics) {
    let new = |(ids, cache): (_, _)| NewTokens { ids, cache, project: Project::Last };
    let mut batch: Vec<NewTokens> = ids.iter().map(Vec::as_slice).zip(caches).map(new).collect();
    // Inside the pool, as generation is.
    rayon::scope(|_| model.decode_batch(&mut batch, &ForwardContext::evaluation(numerics)))
        .expect("ids and lengths are the model's");
}

/// Tokens per second of one sequence and of eight.
pub fn decode_rows(bench: &Bench, numerics: Numerics) -> Result<Vec<Row>, Failure> {
    let subject = Subject::open(bench, numerics)?;
    Ok([1, TOGETHER].map(|sequences| decode_row(bench, &subject, sequences, numerics)).into())
}

fn decode_row(bench: &Bench, subject: &Subject, sequences: usize, numerics: Numerics) -> Row {
    let (model, room) = (&subject.model, subject.model.config().context);
    let mut caches: Vec<KvCache> = (0..sequences).map(|_| model.cache(room)).collect();
    let prompts: Vec<Vec<u32>> = (0..sequences).map(|sequence| subject.prompt(PROMPT.min(room), sequence)).collect();
    step(model, &prompts, &mut caches, numerics);
    let mut ids = vec![vec![0]; sequences];
    let mut turn = 0;
    let seconds = bench.median(|| {
        // Different tokens visit different experts, as in real text.
        turn += 1;
        ids.iter_mut().enumerate().for_each(|(s, id)| id[0] = subject.prompt(1, turn * 31 + s * 7)[0]);
        if caches[0].len() == caches[0].capacity() {
            caches.iter_mut().for_each(|cache| cache.truncate(PROMPT));
        }
        step(model, &ids, &mut caches, numerics);
    });
    let (gbps, ceiling) = (subject.bytes_per_token() / seconds / 1e9, bench.peaks.read);
    // Eight sequences read some experts for several of them; how many is the routing's secret.
    let alone = sequences == 1;
    Row {
        name: "decode".into(),
        shape: format!("{} b{sequences} s{PROMPT}", subject.shape),
        precision: numerics.precision.to_string(),
        way: numerics.way().to_string(),
        batch: Some(sequences),
        ms: Some(seconds * 1e3),
        gbps: alone.then_some(gbps),
        tokens_per_second: Some(sequences as f64 / seconds),
        ceiling: alone.then_some(ceiling),
        share: alone.then_some(gbps / ceiling),
        start_seconds: subject.start_seconds,
        peak_mib: peak_memory().map(|bytes| bytes as f64 / 1024.0 / 1024.0),
        ..Row::default()
    }
}

/// Tokens per second of a prompt.
pub fn prefill_rows(bench: &Bench, numerics: Numerics) -> Result<Vec<Row>, Failure> {
    let subject = Subject::open(bench, numerics)?;
    let (model, config) = (&subject.model, subject.model.config());
    let tokens = LONG_PROMPT.min(config.context);
    let mut caches = [model.cache(tokens)];
    let prompt = [subject.prompt(tokens, 0)];
    let seconds = bench.median(|| {
        caches[0].truncate(0);
        step(model, &prompt, &mut caches, numerics);
    });
    let counts = config.parameter_counts().expect("the model exists");
    let flops = 2.0 * counts.active_without_embedding as f64 * tokens as f64;
    let row = bench.arithmetic("prefill", &format!("{} s{tokens}", subject.shape), numerics, seconds, flops);
    Ok(vec![Row {
        batch: Some(1),
        tokens_per_second: Some(tokens as f64 / seconds),
        start_seconds: subject.start_seconds,
        peak_mib: peak_memory().map(|bytes| bytes as f64 / 1024.0 / 1024.0),
        ..row
    }])
}
