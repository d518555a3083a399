//! `mixtura chat`: a conversation by the model's own template, a line of stdin at a time; the answers are streamed. Under `--json` the whole
//! conversation is one document at its end.

use std::io::{BufRead, IsTerminal, Write};

use mixtura_infer::{
    ChatOptions, ChatTemplate, Engine, Event, Finish, Message, Request, Sampling, StopStrings, TextWriter,
};
use serde::Serialize;

use crate::cli::ChatArgs;
use crate::commands::{prepare, request_failure, sampling, step_failure};
use crate::failure::Failure;
use crate::model_dir::{Held, Model};
use crate::output::Output;

#[derive(Serialize)]
struct Document {
    messages: Vec<Said>,
}

#[derive(Serialize)]
struct Said {
    role: &'static str,
    content: String,
    /// Of an answer: `stop` or `length`, the words of serving APIs.
    #[serde(skip_serializing_if = "Option::is_none")]
    finish_reason: Option<&'static str>,
}

/// Talks.
pub fn run(args: &ChatArgs, output: &Output) -> Result<(), Failure> {
    prepare(&args.compute.threads)?;
    let sampling = sampling(&args.sampling)?;
    let model = Model::load(&args.model, Held::packed(args.compute.precision), output)?;
    let template = match &args.template {
        Some(file) => ChatTemplate::read_file(file, &model.path),
        None => ChatTemplate::read(&model.path),
    };
    let template = template.map_err(|e| Failure::usage(e.to_string()))?;
    // Inside the pool, so that no parallel part of a forward pass has to be handed over to it.
    rayon::scope(|_| Chat::new(args, sampling, &model, &template, *output)?.talk())
}

struct Chat<'m> {
    args: &'m ChatArgs,
    sampling: Sampling,
    model: &'m Model,
    template: &'m ChatTemplate,
    output: Output,
    engine: Engine<'m>,
    said: Vec<Said>,
}

impl<'m> Chat<'m> {
    fn new(
        args: &'m ChatArgs,
        sampling: Sampling,
        model: &'m Model,
        template: &'m ChatTemplate,
        output: Output,
    ) -> Result<Self, Failure> {
        model.tokenizer("a conversation")?;
        // A turn's prompt begins as the turns before it went.
        let engine = Engine::new(model.decoder(), model.numerics()).keeping(1);
        let mut chat = Self { args, sampling, model, template, output, engine, said: Vec::new() };
        chat.begin();
        Ok(chat)
    }

    /// Forgets what was said.
    fn begin(&mut self) {
        self.said.clear();
        if let Some(system) = &self.args.system {
            self.said.push(Said { role: "system", content: system.clone(), finish_reason: None });
        }
    }

    fn talk(&mut self) -> Result<(), Failure> {
        let asks = std::io::stdin().is_terminal() && !self.output.json;
        if asks {
            self.output.note("/clear forgets the conversation, /exit or the end of input ends it");
        }
        let mut lines = std::io::stdin().lock().lines();
        loop {
            if asks {
                self.output.print("> ")?;
            }
            let Some(line) = lines.next() else { break };
            let line =
                line.map_err(|e| Failure::usage(format!("cannot read what was said: {e}; it must be UTF-8 text")))?;
            match line.trim() {
                "" => continue,
                "/exit" => break,
                "/clear" => self.begin(),
                words => {
                    self.said.push(Said { role: "user", content: words.to_string(), finish_reason: None });
                    if !self.answer()? {
                        return Ok(());
                    }
                }
            }
        }
        if self.output.json {
            let document = Document { messages: std::mem::take(&mut self.said) };
            self.output.result(&document, String::new)?;
        } else if asks {
            std::io::stdout().write_all(b"\n").ok();
        }
        Ok(())
    }

    /// One answer; `false` if nobody reads it.
    fn answer(&mut self) -> Result<bool, Failure> {
        let messages: Vec<Message> = self.said.iter().map(|said| Message::new(said.role, &said.content)).collect();
        let tokenizer = self.model.tokenizer("a conversation")?;
        let special = tokenizer.special_spellings();
        let special: Vec<&str> = special.iter().map(String::as_str).collect();
        let prompt = self.template.prompt(&messages, &ChatOptions::default(), &special);
        let prompt = prompt.map_err(|e| Failure::usage(e.to_string()))?;
        // What a message spells out is text: it cannot end its own turn.
        let prompt = tokenizer.encode_chat(&prompt.text, |bytes| prompt.is_special(bytes))?;
        let stops = StopStrings::new(&self.args.sampling.stop).expect("checked before the model was read");
        let mut writer = TextWriter::after(tokenizer, &prompt, stops);
        let request =
            Request { sampling: self.sampling, ..Request::greedy(prompt, self.args.max_tokens, &self.model.ends()) };
        let id = self.engine.add(request).map_err(request_failure)?;
        let (mut answer, mut finish_reason) = (String::new(), None);
        while finish_reason.is_none() {
            for (_, event) in self.engine.step().map_err(step_failure)? {
                let piece = match event {
                    Event::Routed(_) => continue,
                    Event::Token { token, .. } => writer.push(token.id),
                    Event::Finished(finish) => {
                        let ended = if let Finish::End(_) = finish { "stop" } else { "length" };
                        finish_reason.get_or_insert(ended);
                        writer.finish()
                    }
                };
                if piece.stopped && finish_reason.is_none() {
                    finish_reason = Some("stop");
                    self.engine.remove(id);
                }
                answer.push_str(&piece.text);
                if !self.output.json && !self.output.print_while_read(&piece.text)? {
                    return Ok(false);
                }
            }
        }
        if !self.output.json {
            self.output.print("\n")?;
            if finish_reason == Some("length") {
                self.output.note("(the answer was cut: --max-tokens, or the model's context)");
            }
        }
        self.said.push(Said { role: "assistant", content: answer, finish_reason });
        Ok(true)
    }
}
