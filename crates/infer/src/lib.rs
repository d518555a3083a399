//! Text from a model: the next token from its logits, where a text stops, and the prompt that a conversation becomes.
//!
//! | you have | you call |
//! | --- | --- |
//! | the logits of one position | [`Sampling::next`], [`top_log_probabilities`] |
//! | pieces of text and strings that end it | [`StopStrings::push`] |
//! | a model directory and messages | [`ChatTemplate::read`], [`ChatTemplate::prompt`] |
//!
//! These three know nothing of tensors: logits are a slice, text is `str`, and a template is what Hugging Face transformers would
//! make of it, byte for byte.

pub mod sampling;
mod stop;
pub mod chat;

pub use chat::{ChatError, ChatOptions, ChatTemplate, Message, Prompt};
pub use sampling::{Candidate, Sampling, SamplingError, ScoredToken, top_log_probabilities};
pub use stop::{EmptyStopString, Piece, StopStrings};
