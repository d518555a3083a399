//! Models that say what a test wants to hear.
#![allow(dead_code, reason = "each test file uses its own part of this")]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;
use mixtura::checkpoint::{Family, SaveOptions, TokenIds, save_model};
use mixtura::data::Tokenizer;
use mixtura::nn::{Decoder, ModelConfig, NamedParameters};

use crate::common::Place;

/// A Hugging Face tokenizer of `fixtures/hf/tokenizers`, copied into the model directory `model`.
pub fn tokenizer(place: &Place, model: &str, name: &str) -> Tokenizer {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/hf/tokenizers").join(name);
    std::fs::create_dir_all(place.path(model)).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture.join(file), place.path(model).join(file)).unwrap();
    }
    Tokenizer::from_file(&place.path(model).join("tokenizer.json")).unwrap()
}

/// A model whose likeliest next token depends on the last token alone: `follow`, else the first special end. The identity as
/// embedding, nothing in between, and one row of the head per token.
pub fn chain(place: &Place, model: &str, vocab: usize, context: usize, follow: &BTreeMap<u32, u32>, ids: TokenIds) {
    let d = vocab.next_multiple_of(8);
    let config = ModelConfig { vocab, d_dense: Some(8), ..ModelConfig::new(d, 1, 4, context) };
    let mut decoder = Decoder::new(&config, 0, &Device::default()).unwrap();
    let values = |name: &str, shape: &[usize]| -> Vec<f32> {
        let mut values = vec![if name.contains("norm") { 1.0 } else { 0.0 }; shape.iter().product()];
        match name {
            "embed.weight" => (0..vocab).for_each(|id| values[id * d + id] = 1.0),
            "head.weight" => follow.iter().for_each(|(id, next)| values[*id as usize * vocab + *next as usize] = 1.0),
            _ => {}
        }
        values
    };
    let infos = decoder.parameter_infos();
    let parameters = infos.into_iter().map(|info| {
        let values = values(&info.name, &info.shape);
        (info.name, info.shape, Cow::Owned(values))
    });
    decoder.load_named(parameters.collect::<Vec<_>>()).unwrap();
    let directory = place.path(model);
    let kept: Vec<(String, Vec<u8>)> = ["tokenizer.json", "tokenizer_config.json"]
        .iter()
        .map(|file| (file.to_string(), std::fs::read(directory.join(file)).unwrap()))
        .collect();
    let options = SaveOptions { ids, files: kept, ..SaveOptions::default() };
    let llama = Family::from_model_type("llama").unwrap();
    save_model(&directory, &decoder, llama, &options).unwrap();
}

/// Says the tokens of `line` one after another, then `end`, then the line again.
pub fn saying(
    place: &Place,
    model: &str,
    name: &str,
    line: &str,
    end: &str,
    ids: impl Fn(u32) -> TokenIds,
) -> Tokenizer {
    let tokenizer = tokenizer(place, model, name);
    let line = tokenizer.encode(line).unwrap();
    let end = (0..tokenizer.vocab_size() as u32).find(|id| tokenizer.token(*id).as_deref() == Some(end)).unwrap();
    let mut follow: BTreeMap<u32, u32> = line.windows(2).map(|pair| (pair[0], pair[1])).collect();
    follow.insert(*line.last().unwrap(), end);
    follow.insert(end, line[0]);
    chain(place, model, tokenizer.vocab_size(), 64, &follow, ids(end));
    tokenizer
}

pub fn ends_with(end: u32) -> TokenIds {
    TokenIds { eos: vec![end], ..TokenIds::default() }
}
