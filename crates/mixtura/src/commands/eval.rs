//! `mixtura eval`: loss, perplexity, bits per byte; on propositions, accuracy by split, form and depth.

use std::path::Path;

use mixtura_train::evaluate::{self, Accuracy, LossReport};
use mixtura_train::interrupt::Interrupt;
use mixtura_train::table::grouped;
use serde::Serialize;

use crate::cli::EvalArgs;
use crate::commands::{forward_failure, prepare, step_failure};
use crate::failure::Failure;
use crate::model_dir::{Held, Model};
use crate::output::Output;

#[derive(Serialize)]
struct Document {
    #[serde(flatten)]
    loss: LossReport,
    /// Tokens of a window, where one of the two was asked for: the document of a plain `eval` has the keys it always had.
    #[serde(skip_serializing_if = "Option::is_none")]
    context: Option<usize>,
    /// Tokens from one window to the next.
    #[serde(skip_serializing_if = "Option::is_none")]
    stride: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    accuracy: Option<Accuracy>,
}

/// Evaluates.
pub fn run(args: &EvalArgs, output: &Output) -> Result<(), Failure> {
    prepare(&args.compute.threads)?;
    let interrupt = Interrupt::on_signals().map_err(|e| Failure::running(format!("cannot listen for signals: {e}")))?;
    let model = Model::load(&args.model, Held::packed(args.compute.precision), output)?;
    let tokenizer = model.tokenizer("evaluation")?;
    let numerics = model.numerics();
    let (validation, items) = model.data(args.data.as_deref(), &args.windows, args.stride)?;
    let name = args.data.as_ref().map_or("the validation split".to_string(), |path| path.display().to_string());
    let loss = evaluate::loss(model.decoder(), validation.batches(), tokenizer, numerics)
        .map_err(forward_failure)?
        .ok_or_else(|| Failure::usage(format!("{name}: no token counts, so there is no loss")))?;
    let accuracy = match items.is_empty() || args.questions == 0 {
        true => None,
        false => {
            // There is something to print from here on.
            interrupt.save_first();
            output.note("answering questions");
            evaluate::accuracy(model.decoder(), &items, args.questions, tokenizer, numerics, &interrupt)
                .map_err(step_failure)?
        }
    };
    let asked = args.windows.context.is_some() || args.stride.is_some();
    let windows = asked.then(|| model.windows(&args.windows, args.stride)).transpose()?;
    let (context, stride) = windows.map(|windows| (windows.context, windows.stride)).unzip();
    let document = Document { loss, context, stride, accuracy };
    output.result(&document, || text(&document, &model.path, &name))?;
    if interrupt.requested() { Err(Failure::silent(130)) } else { Ok(()) }
}

fn text(document: &Document, model: &Path, name: &str) -> String {
    let LossReport { loss, perplexity, tokens, bits_per_byte } = &document.loss;
    let bits = bits_per_byte.map_or(String::new(), |bits| format!(", {bits:.4} bits per byte"));
    let mut text = format!(
        "{} on {name}: loss {loss:.4}, perplexity {perplexity:.3}{bits}, {} tokens\n",
        model.display(),
        grouped(*tokens)
    );
    if let Some(accuracy) = &document.accuracy {
        text.push_str(&format!("verdicts right: {:.1} %\n\n{}", 100.0 * accuracy.overall, accuracy.table()));
        text.push_str("\nby form:");
        accuracy.by_form.iter().for_each(|(form, share)| text.push_str(&format!("  {form} {:.0} %", 100.0 * share)));
        text.push('\n');
    }
    text
}
