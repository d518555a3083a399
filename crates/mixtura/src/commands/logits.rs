//! `mixtura logits`: logits of every position, and what every router decided.

use mixtura_infer::sampling::likeliest;
use mixtura_nn::{ForwardContext, LayerRouting};
use mixtura_ops::{Precision, with_slice};
use mixtura_train::table::Table;
use serde::Serialize;

use crate::cli::LogitsArgs;
use crate::commands::{Prompt, choices_cell, forward_failure, lines_of, prepare};
use crate::failure::Failure;
use crate::model_dir::{Held, Model};
use crate::output::Output;

#[derive(Serialize)]
struct Document {
    ids: Vec<u32>,
    logits: Vec<Vec<f32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routing: Option<Vec<Layer>>,
}

/// One MoE layer: per token its experts in choice order, their weights, and the router's score of every expert.
#[derive(Serialize)]
struct Layer {
    layer: usize,
    experts: Vec<Vec<u32>>,
    weights: Vec<Vec<f32>>,
    scores: Vec<Vec<f32>>,
}

impl Layer {
    fn of(routing: &LayerRouting) -> Self {
        let routed = &routing.routed;
        let choices = (0..routed.shape.tokens).map(|token| routing.choices(token));
        let (experts, weights) = choices.map(|(experts, weights)| (experts.to_vec(), weights.to_vec())).unzip();
        Self {
            layer: routing.layer,
            experts,
            weights,
            scores: routed.probs_te.chunks(routed.shape.experts).map(<[f32]>::to_vec).collect(),
        }
    }
}

/// Computes.
pub fn run(args: &LogitsArgs, output: &Output) -> Result<(), Failure> {
    prepare(&args.compute.threads)?;
    let precision = args.compute.precision.map_or(Precision::F32, Precision::from);
    let model = Model::load(&args.model, Held::Packed(Some(precision)), output)?;
    let mut documents = Vec::new();
    for ids in texts(args, &model)? {
        documents.push(Document::of(ids, &model, args.routing)?);
    }
    match &documents[..] {
        [one] => output.result(one, || text(one))?,
        several => output.result(&several, || several.iter().map(text).collect::<Vec<_>>().join("\n"))?,
    }
    Ok(())
}

/// The ids of everything that was given.
fn texts(args: &LogitsArgs, model: &Model) -> Result<Vec<Vec<u32>>, Failure> {
    let lines = args.texts.as_deref().map(lines_of).transpose()?.unwrap_or_default();
    let one = |text, file, ids| Ok::<_, Failure>(Prompt::read(model, text, file, ids, args.special)?.ids);
    let mut texts = Vec::new();
    for text in args.text.iter().chain(&lines) {
        texts.push(one(Some(text.as_str()), None, None)?);
    }
    if args.ids.is_some() || args.text_file.is_some() {
        texts.push(one(None, args.text_file.as_deref(), args.ids.as_deref())?);
    }
    if texts.is_empty() || texts.iter().any(Vec::is_empty) {
        return Err(Failure::usage("no token to compute logits for"));
    }
    Ok(texts)
}

impl Document {
    fn of(ids: Vec<u32>, model: &Model, routing: bool) -> Result<Self, Failure> {
        let context = ForwardContext::evaluation(model.numerics());
        let (logits_tv, layers) = model.decoder().logits(&ids, 1, ids.len(), &context).map_err(forward_failure)?;
        let vocab = model.loaded.config.vocab;
        let logits = with_slice(&logits_tv, |values| values.chunks(vocab).map(<[f32]>::to_vec).collect());
        Ok(Self { ids, logits, routing: routing.then(|| layers.iter().map(Layer::of).collect()) })
    }
}

/// A person gets the likeliest token per position, and the experts.
fn text(document: &Document) -> String {
    let layers = document.routing.as_deref().unwrap_or_default();
    let header = ["position", "id", "likeliest next", "logit"].map(String::from).into_iter();
    let mut table = Table::new(header.chain(layers.iter().map(|layer| format!("layer {}", layer.layer))));
    for (position, (id, logits)) in document.ids.iter().zip(&document.logits).enumerate() {
        let best = likeliest(logits);
        let experts = |layer: &Layer| choices_cell(&layer.experts[position], &layer.weights[position]);
        let cells = [position.to_string(), id.to_string(), best.to_string(), format!("{:.4}", logits[best as usize])];
        table.row(cells.into_iter().chain(layers.iter().map(experts)));
    }
    table.to_string()
}
