//! From tokens to the text that a reader sees: whole characters, and nothing from a stop string on.

use mixtura_data::{TextStream, Tokenizer};

use crate::stop::{Piece, StopStrings};

/// The text of a sequence under way. The pieces together are the text of all its tokens, cut before the first stop string.
pub struct TextWriter<'t> {
    /// `None` once the text has ended.
    stream: Option<TextStream<'t>>,
    stops: StopStrings,
}

impl<'t> TextWriter<'t> {
    /// The text that follows a prompt's.
    pub fn after(tokenizer: &'t Tokenizer, prompt: &[u32], stops: StopStrings) -> Self {
        Self { stream: Some(tokenizer.stream_after(prompt)), stops }
    }

    /// The text that one more token settles, and whether a stop string ended it. Nothing follows what has ended.
    pub fn push(&mut self, id: u32) -> Piece {
        let Some(stream) = &mut self.stream else { return Piece { text: String::new(), stopped: true } };
        let piece = self.stops.push(&stream.push(id));
        if piece.stopped {
            self.stream = None;
        }
        piece
    }

    /// What was held back, now that no token follows.
    pub fn finish(&mut self) -> Piece {
        let Some(stream) = self.stream.take() else { return Piece { text: String::new(), stopped: false } };
        let Piece { mut text, stopped } = self.stops.push(&stream.finish());
        if !stopped {
            text.push_str(&self.stops.finish());
        }
        Piece { text, stopped }
    }
}
