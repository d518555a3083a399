//! Inference: many sequences of different lengths through one model, and the text that a person sees of them.
//!
//! | you have | you call |
//! | --- | --- |
//! | a model and texts to continue | [`Engine::add`], [`Engine::step`] |
//! | the tokens that come, and a tokenizer | [`TextWriter::push`] |
//! | the logits of one position | [`Sampling::next`], [`top_log_probabilities`] |
//! | pieces of text and strings that end it | [`StopStrings::push`] |
//! | a model directory and messages | [`ChatTemplate::read`], [`ChatTemplate::prompt`] |
//!
//! The forward pass is that of training ([`mixtura_nn::Decoder`]), so what is generated is what was evaluated, bit for bit: alone, in any
//! batch, in any chunks, on any number of threads. Nothing here knows progress bars, signals or a network.

mod engine;
mod text;
pub mod sampling;
mod stop;
pub mod chat;
pub mod available;

pub use chat::{ChatError, ChatOptions, ChatTemplate, Message, Prompt};
pub use engine::{
    CHUNK, Engine, Event, Finish, Request, RequestError, SequenceId, StepError, TokenChoices, TokenRouting,
};
pub use sampling::{Candidate, Sampling, SamplingError, ScoredToken, top_log_probabilities};
pub use stop::{EmptyStopString, Piece, StopStrings};
pub use text::TextWriter;
