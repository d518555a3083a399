//! What a model's experts do with data: the load of each, the tokens each takes most, and on propositions what they tell of form
//! and content.

use std::collections::BTreeMap;
use std::path::Path;

use mixtura_data::{DataKind, Tokenizer, ValidationSet};
use mixtura_nn::{ForwardContext, SelectionCounts};
use mixtura_routing::RoutingStats;
use mixtura_train::probe::{ITEMS, ProbeError, ProbeRow, probe};
use mixtura_train::table::{Table, grouped};
use serde::Serialize;

use crate::cli::DataArgs;
use crate::commands::forward_failure;
use crate::failure::Failure;
use crate::model_dir::Model;

/// Tokens listed per expert.
const TOP: usize = 6;

/// One layer on the data.
#[derive(Serialize)]
pub struct Load {
    layer: usize,
    tokens: u64,
    selections: Vec<u64>,
    load_cv: f64,
    max_over_mean: f64,
    dead: usize,
    entropy: f64,
    /// By expert, the tokens that chose it most often.
    top_tokens: Vec<Vec<TopToken>>,
}

/// A token of the vocabulary at one expert.
#[derive(Serialize)]
struct TopToken {
    id: u32,
    text: String,
    /// Times it chose the expert.
    count: u64,
    /// Of all its occurrences, the share that did.
    share: f64,
}

/// Routes `file`, or what the model's run held back, and counts.
pub fn load(model: &Model, file: Option<&Path>, windows: &DataArgs) -> Result<Vec<Load>, Failure> {
    let (data, _) = model.data(file, windows, None)?;
    let seen = Seen::of(model, &data)?;
    let tokenizer = model.tokenizer("--data")?;
    let layers = seen.counts.by_layer.iter().enumerate().filter(|(_, selections)| !selections.is_empty());
    Ok(layers
        .map(|(layer, selections)| {
            let stats = RoutingStats::from_load(&selections.iter().map(|&count| count as u32).collect::<Vec<_>>());
            Load {
                layer,
                tokens: seen.counts.tokens,
                load_cv: stats.load_cv,
                max_over_mean: stats.max_over_mean,
                dead: selections.iter().filter(|&&count| count == 0).count(),
                entropy: stats.entropy,
                selections: selections.clone(),
                top_tokens: (0..selections.len()).map(|expert| seen.top_tokens(layer, expert, tokenizer)).collect(),
            }
        })
        .collect())
}

/// Form and content, for a model of propositions with room for them.
pub fn specialisation(model: &Model) -> Result<Option<Vec<ProbeRow>>, Failure> {
    if model.run.as_ref().is_none_or(|run| run.data.kind != DataKind::Propositions) {
        return Ok(None);
    }
    match probe(model.decoder(), model.tokenizer("--data")?, model.numerics()) {
        Ok(rows) => Ok(Some(rows)),
        Err(ProbeError::TooLong { .. }) => Ok(None),
        Err(ProbeError::Data(error)) => Err(error.into()),
        Err(ProbeError::Forward(error)) => Err(forward_failure(error)),
    }
}

/// Selections by layer and expert, and by layer, token id and expert.
struct Seen {
    counts: SelectionCounts,
    by_token: BTreeMap<(usize, u32), Vec<u64>>,
    occurrences: BTreeMap<u32, u64>,
}

impl Seen {
    fn of(model: &Model, data: &ValidationSet) -> Result<Self, Failure> {
        let context = ForwardContext::evaluation(model.numerics());
        let mut seen =
            Self { counts: SelectionCounts::default(), by_token: BTreeMap::new(), occurrences: BTreeMap::new() };
        for batch in data.batches() {
            let out = model.decoder().forward(&batch.ids, batch.batch, batch.seq, &context).map_err(forward_failure)?;
            seen.counts.add(&out.routing);
            batch.ids.iter().for_each(|&id| *seen.occurrences.entry(id).or_default() += 1);
            for layer in &out.routing {
                let experts = layer.routed.shape.experts;
                for (t, &id) in batch.ids.iter().enumerate() {
                    let counts = seen.by_token.entry((layer.layer, id)).or_insert_with(|| vec![0; experts]);
                    layer.routed.choices.of_token(t).iter().for_each(|&e| counts[e as usize] += 1);
                }
            }
        }
        Ok(seen)
    }

    /// The most frequent first, ties to the lower id.
    fn top_tokens(&self, layer: usize, expert: usize, tokenizer: &Tokenizer) -> Vec<TopToken> {
        let of_layer = self.by_token.range((layer, 0)..=(layer, u32::MAX));
        let mut counts: Vec<(u64, u32)> =
            of_layer.map(|((_, id), counts)| (counts[expert], *id)).filter(|(count, _)| *count > 0).collect();
        counts.sort_by_key(|&(count, id)| (std::cmp::Reverse(count), id));
        counts.truncate(TOP);
        let token = |(count, id): (u64, u32)| TopToken {
            id,
            text: tokenizer.text_of(id),
            count,
            share: count as f64 / self.occurrences[&id] as f64,
        };
        counts.into_iter().map(token).collect()
    }
}

/// The tables for a person.
pub fn text(load: &[Load], specialisation: Option<&[ProbeRow]>) -> String {
    let mut table =
        Table::new(["layer", "tokens", "load cv", "busiest / mean", "dead", "entropy", "share per expert, %"]);
    for layer in load {
        let all: u64 = layer.selections.iter().sum();
        let shares = layer.selections.iter().map(|&n| format!("{:.1}", 100.0 * n as f64 / all.max(1) as f64));
        table.row([
            layer.layer.to_string(),
            grouped(layer.tokens),
            format!("{:.3}", layer.load_cv),
            format!("{:.2}", layer.max_over_mean),
            layer.dead.to_string(),
            format!("{:.3}", layer.entropy),
            shares.collect::<Vec<_>>().join(" "),
        ]);
    }
    let mut text =
        format!("\n{table}\nThe tokens that choose each expert most, and the share of their occurrences that do:\n");
    let mut table = Table::new(["layer", "expert", "tokens"]);
    for layer in load {
        for (expert, tokens) in layer.top_tokens.iter().enumerate() {
            // Special tokens have no text.
            let name = |t: &TopToken| if t.text.is_empty() { format!("<{}>", t.id) } else { format!("{:?}", t.text) };
            let shown = tokens.iter().map(|t| format!("{} {:.0} %", name(t), 100.0 * t.share));
            table.row([layer.layer.to_string(), expert.to_string(), shown.collect::<Vec<_>>().join("  ")]);
        }
    }
    text.push_str(&table.to_string());
    specialisation.iter().for_each(|rows| text.push_str(&probe_text(rows)));
    text
}

fn probe_text(rows: &[ProbeRow]) -> String {
    let mut table = Table::new([
        "layer",
        "place",
        "form",
        "p",
        "content",
        "p",
        "same content: overlap",
        "by chance",
        "p",
        "separates form",
    ]);
    for row in rows {
        let bits = [(row.form.above_chance, row.form.p_value), (row.content.above_chance, row.content.p_value)];
        let mut cells = vec![row.layer.to_string(), row.place.to_string()];
        bits.iter().for_each(|(value, p)| cells.extend([format!("{value:.3}"), format!("{p:.3}")]));
        cells.extend(
            [row.same_content.mean, row.same_content.by_chance, row.same_content.p_lower].map(|v| format!("{v:.3}")),
        );
        cells.push(if row.separates_form { "yes" } else { "no" }.to_string());
        table.row(cells);
    }
    format!(
        "\nWhat a token's experts tell, at the end of the question and before the verdict, over {} propositions in which every\n\
         form meets every content: normalised mutual information above chance (0 none, 1 all) with its permutation p-value,\n\
         and the overlap of the expert sets of one content in two forms.\n{table}",
        ITEMS
    )
}
