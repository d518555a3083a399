//! How good a model is: loss on held-back text, and on propositions the share of questions it answers rightly.
//!
//! Loss is the mean cross-entropy of counted tokens; bits per byte divides its sum by the bytes of text those tokens stand for, so
//! that models with different tokenizers compare. An answer is generated greedily and graded twice: the verdict alone, and
//! the whole worked answer word for word.

use std::collections::BTreeMap;

use mixtura_data::propositions::EvaluationItem;
use mixtura_data::propositions::{Formula, Proposition, grade};
use mixtura_data::{Batch, Tokenizer, ValidationSet};
use mixtura_infer::{Engine, Event, Request, StepError};
use mixtura_nn::{Decoder, ForwardContext, ForwardError};
use mixtura_ops::Numerics;
use serde::{Deserialize, Serialize};

use crate::interrupt::Interrupt;
use crate::table::Table;

/// Loss on held-back text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LossReport {
    /// Mean cross-entropy per counted token, in nats.
    #[serde(deserialize_with = "crate::json::real")]
    pub loss: f64,
    /// `exp(loss)`, infinite from a loss of 710 on.
    #[serde(deserialize_with = "crate::json::real")]
    pub perplexity: f64,
    /// Tokens counted.
    pub tokens: u64,
    /// Bits per byte of the text that the counted tokens stand for.
    pub bits_per_byte: Option<f64>,
}

/// Accuracy on one split at one depth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// What is new about the items.
    pub split: String,
    /// Their nesting.
    pub depth: usize,
    /// How many were asked.
    pub items: usize,
    /// Share with the right verdict.
    pub verdict: f64,
    /// Share with the whole worked answer right.
    pub reasoning: f64,
}

/// Accuracy on propositions.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Share of right verdicts over all items.
    pub overall: f64,
    /// The same by split.
    pub by_split: BTreeMap<String, f64>,
    /// The same by depth.
    pub by_depth: BTreeMap<String, f64>,
    /// The same by form: modality and outermost connective, `plain:OR`.
    pub by_form: BTreeMap<String, f64>,
    /// Split by depth.
    pub groups: Vec<Group>,
}

/// One question with what the model answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The question.
    pub prompt: String,
    /// What the model wrote.
    pub answer: String,
    /// The verdict from the facts.
    pub expected: String,
    /// Whether the verdict is right.
    pub right: bool,
}

/// Loss over batches; `None` if no token counts.
pub fn loss(
    model: &Decoder,
    batches: impl Iterator<Item = Batch>,
    tokenizer: &Tokenizer,
    numerics: Numerics,
) -> Result<Option<LossReport>, ForwardError> {
    let context = ForwardContext::evaluation(numerics);
    let (mut nats, mut tokens, mut bytes) = (0.0, 0u64, 0u64);
    for batch in batches {
        let out = model.loss(&batch.ids, &batch.targets, batch.batch, batch.seq, &context)?;
        nats += out.ce.into_scalar::<f32>() as f64 * out.counted as f64;
        tokens += out.counted as u64;
        bytes += ValidationSet::target_bytes(&batch, tokenizer);
    }
    let loss = nats / tokens.max(1) as f64;
    let bits_per_byte = (bytes > 0).then(|| nats / std::f64::consts::LN_2 / bytes as f64);
    Ok((tokens > 0).then(|| LossReport { loss, perplexity: loss.exp(), tokens, bits_per_byte }))
}

/// Asks up to `per_group` questions of every split and depth. What was answered when `interrupt` came counts; `None` if nothing was.
pub fn accuracy(
    model: &Decoder,
    items: &[EvaluationItem],
    per_group: usize,
    tokenizer: &Tokenizer,
    numerics: Numerics,
    interrupt: &Interrupt,
) -> Result<Option<Accuracy>, StepError> {
    let mut asked: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    let chosen: Vec<&EvaluationItem> = items
        .iter()
        .filter(|item| {
            let count = asked.entry((item.split as usize, item.depth)).or_default();
            *count += 1;
            // Deeper than the model was built for: its context cannot hold the answer.
            *count <= per_group && item.prompt.len() + item.answer.len() <= model.config().context
        })
        .collect();
    let prompts: Vec<&[u32]> = chosen.iter().map(|item| item.prompt.as_slice()).collect();
    let longest = chosen.iter().map(|item| item.answer.len()).max().unwrap_or(0);
    let eos = tokenizer.eos();
    let answers = answers(model, &prompts, longest + 8, eos.as_slice(), numerics, interrupt)?;

    let mut all = Tally::default();
    let (mut splits, mut depths, mut forms) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut groups: Vec<((&str, usize), Tally)> = Vec::new();
    for (item, answer) in chosen.iter().zip(&answers) {
        let Some(answer) = answer else { continue };
        let grade = grade(&item.item, &tokenizer.decode(answer));
        let mark = (grade.verdict_right, grade.reasoning_right);
        let key = (item.split.name(), item.depth);
        if groups.last().is_none_or(|(last, _)| *last != key) {
            groups.push((key, Tally::default()));
        }
        let group = &mut groups.last_mut().expect("one was just pushed").1;
        let split: &mut Tally = splits.entry(item.split.name().to_string()).or_default();
        let depth: &mut Tally = depths.entry(item.depth.to_string()).or_default();
        let form: &mut Tally = forms.entry(form_of(&item.item)).or_default();
        [&mut all, group, split, depth, form].into_iter().for_each(|tally| tally.add(mark));
    }
    if all.items == 0 {
        return Ok(None);
    }
    let shares = |tallies: BTreeMap<String, Tally>| tallies.into_iter().map(|(k, t)| (k, t.verdict())).collect();
    Ok(Some(Accuracy {
        overall: all.verdict(),
        by_split: shares(splits),
        by_depth: shares(depths),
        by_form: shares(forms),
        groups: groups
            .into_iter()
            .map(|((split, depth), tally)| Group {
                split: split.to_string(),
                depth,
                items: tally.items,
                verdict: tally.verdict(),
                reasoning: tally.reasoning as f64 / tally.items as f64,
            })
            .collect(),
    }))
}

/// The model's answers to the canonical question and to the first held-out item of each depth.
pub fn samples(
    model: &Decoder,
    items: &[EvaluationItem],
    tokenizer: &Tokenizer,
    numerics: Numerics,
    interrupt: &Interrupt,
) -> Result<Vec<Sample>, StepError> {
    let mut chosen = vec![Proposition::canonical()];
    for depth in 1..=2 {
        let held_out = |item: &&EvaluationItem| item.depth == depth && item.split.name() == "content";
        chosen.extend(items.iter().find(held_out).map(|item| item.item.clone()));
    }
    let prompts: Vec<Vec<u32>> =
        chosen.iter().map(|item| tokenizer.encode_prompt(&item.question()).unwrap_or_default()).collect();
    let room = model.config().context;
    let fits: Vec<usize> = (0..chosen.len()).filter(|&i| !prompts[i].is_empty() && prompts[i].len() < room).collect();
    let borrowed: Vec<&[u32]> = fits.iter().map(|&i| prompts[i].as_slice()).collect();
    let eos = tokenizer.eos();
    let answers = answers(model, &borrowed, 256, eos.as_slice(), numerics, interrupt)?;
    Ok(fits
        .iter()
        .zip(answers)
        .filter_map(|(&i, answer)| {
            let (item, answer) = (&chosen[i], tokenizer.decode(&answer?));
            Some(Sample {
                prompt: item.question(),
                right: grade(item, &answer).verdict_right,
                expected: item.verdict().to_string(),
                answer: answer.trim_start_matches('\n').to_string(),
            })
        })
        .collect())
}

/// The likeliest continuation of every prompt, many at a time; those that `interrupt` cut short are `None`.
fn answers(
    model: &Decoder,
    prompts: &[&[u32]],
    max_tokens: usize,
    ends: &[u32],
    numerics: Numerics,
    interrupt: &Interrupt,
) -> Result<Vec<Option<Vec<u32>>>, StepError> {
    /// Sequences in a pass: enough rows to use the kernels well.
    const AT_ONCE: usize = 64;
    let mut engine = Engine::new(model, numerics);
    let mut asked = prompts.iter().enumerate();
    let (mut under_way, mut answers) = (BTreeMap::new(), vec![None; prompts.len()]);
    while !interrupt.requested() {
        while engine.len() < AT_ONCE
            && let Some((index, prompt)) = asked.next()
        {
            let id = engine.add(Request::greedy(prompt.to_vec(), max_tokens, ends))?;
            under_way.insert(id, (index, Vec::new()));
        }
        if engine.is_idle() {
            break;
        }
        for (id, event) in engine.step()? {
            match event {
                Event::Token { token, .. } => under_way.get_mut(&id).expect("it was asked").1.push(token.id),
                Event::Finished(_) => {
                    let (index, ids) = under_way.remove(&id).expect("it was asked");
                    answers[index] = Some(ids);
                }
                Event::Routed(_) => {}
            }
        }
    }
    Ok(answers)
}

/// Modality and outermost connective.
fn form_of(item: &Proposition) -> String {
    match &item.body {
        Formula::Node(connective, ..) => format!("{}:{}", item.modality.name(), connective.name()),
        Formula::Atom(_) => format!("{}:atom", item.modality.name()),
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    items: usize,
    verdict: usize,
    reasoning: usize,
}

impl Tally {
    fn add(&mut self, (verdict, reasoning): (bool, bool)) {
        self.items += 1;
        self.verdict += usize::from(verdict);
        self.reasoning += usize::from(reasoning);
    }

    fn verdict(&self) -> f64 {
        self.verdict as f64 / self.items.max(1) as f64
    }
}

impl Accuracy {
    /// Split by depth, in percent.
    pub fn table(&self) -> Table {
        let mut table = Table::new(["split", "depth", "questions", "verdict right", "whole answer right"]);
        for group in &self.groups {
            let name = match group.split.as_str() {
                "iid" => "fresh items",
                "form" => "held-out forms",
                "content" => "held-out content",
                "depth" => "untrained depth",
                other => other,
            };
            table.row([
                name.to_string(),
                group.depth.to_string(),
                group.items.to_string(),
                format!("{:.1} %", 100.0 * group.verdict),
                format!("{:.1} %", 100.0 * group.reasoning),
            ]);
        }
        table
    }
}
