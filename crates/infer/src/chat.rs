//! A model's chat template: from messages to the text that the model continues.
//!
//! A template is a Jinja2 program that comes with the model. It is rendered as Hugging Face transformers renders it, byte for byte: the
//! same whitespace rules, functions, Python methods, and special tokens by name. Which template: `chat_template.jinja` and
//! `additional_chat_templates/NAME.jinja` win over `chat_template` in `tokenizer_config.json`, which is a string or a list of named
//! templates; of several, the one that is asked for, else `tool_use` where tools are given, else `default`.
//!
//! The text that comes out holds the special tokens that the template wrote, the one at the start included, so it is tokenized with
//! special tokens recognised and none added. [`ChatTemplate::prompt`] says which of them a message merely spelled out.

mod environment;
mod files;
mod messages;
mod prompt;
mod python;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

use minijinja::{Environment, ErrorKind};

pub use messages::{Message, parse_messages};
/// A value that a template sees: anything that JSON can say, with the keys of mappings in their order.
pub use minijinja::Value;
pub use prompt::Prompt;

/// Instructions that a template may take: 200,000, and five thousand more for each message. Those in use take some hundred a message. Not
/// more, since one instruction may be work too: a list that grows by `+` costs the square of its length.
const FUEL: u64 = 200_000;
const FUEL_PER_MESSAGE: u64 = 5_000;
/// The longest text a template may make, in bytes: several million tokens.
const MAX_TEXT: usize = 16 << 20;
/// Stack for lists that a template nests as deep as its instructions last; only what is touched is memory.
const STACK: usize = 256 << 20;

/// A conversation that does not become a prompt, or a template that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The model has no template.
    #[error(
        "{dir} has no chat template: neither chat_template.jinja nor a chat_template in tokenizer_config.json; a base model has none \
         and is given plain text, for a chat model put the template of its publisher there"
    )]
    Missing {
        /// The model directory.
        dir: PathBuf,
    },
    /// The operating system refused to read a file.
    #[error("cannot read {path}: {source}; check that the path is right and that it may be read")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file that begins with the mark of some editors.
    #[error(
        "{path} begins with a byte order mark, which would stand before every prompt; save it as UTF-8 without one"
    )]
    ByteOrderMark {
        /// The file.
        path: PathBuf,
    },
    /// A file that is not text.
    #[error("{path} is not UTF-8 text: byte {offset} is {byte:#04x}; save it as UTF-8")]
    NotText {
        /// The file.
        path: PathBuf,
        /// Offset of the first offending byte.
        offset: usize,
        /// That byte.
        byte: u8,
    },
    /// A JSON file of the tokenizer that does not hold what it must.
    #[error("{path} cannot be used: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// No template of that name.
    #[error("the model has no chat template called {asked}, only {known}; choose one of these by name")]
    NoSuchTemplate {
        /// The name asked for.
        asked: String,
        /// The names there are.
        known: String,
    },
    /// No messages at all.
    #[error("the conversation is empty; give at least one message")]
    NoMessages,
    /// A message that no template can be given.
    #[error("message {number}: {reason}")]
    Message {
        /// Which one, from 1.
        number: usize,
        /// What was expected and what was found.
        reason: String,
    },
    /// Messages that are not JSON.
    #[error("the messages are not a JSON list of objects with role and content: {reason}")]
    Messages {
        /// What the parser said.
        reason: String,
    },
    /// The template is not a Jinja2 template, or uses what this renderer lacks.
    #[error("{path}, line {line}: the chat template cannot be read: {reason}; correct the template, or use another")]
    Syntax {
        /// The file the template is in.
        path: PathBuf,
        /// The line of the template, from 1.
        line: usize,
        /// What was expected and what was found.
        reason: String,
    },
    /// The template came to something it cannot do.
    #[error(
        "{path}, line {line}: the chat template cannot be applied to these messages: {reason}; give it the messages and variables it \
         expects, or correct it"
    )]
    Render {
        /// The file the template is in.
        path: PathBuf,
        /// The line of the template, from 1.
        line: usize,
        /// What went wrong.
        reason: String,
    },
    /// The template itself says no, with `raise_exception`.
    #[error("the model's chat template refuses these messages: {message}")]
    Refused {
        /// In the template's words.
        message: String,
    },
    /// The template takes more than a template may.
    #[error(
        "{path}: the chat template took more than {limit} on {messages} messages and was stopped; it loops or nests without end, or the \
         conversation is too long"
    )]
    Limit {
        /// The file the template is in.
        path: PathBuf,
        /// Which limit.
        limit: String,
        /// How many messages there were.
        messages: usize,
    },
}

/// What a template is told besides the messages.
#[derive(Debug, Clone)]
pub struct ChatOptions {
    /// Whether the text ends with the beginning of the assistant's answer; true unless set otherwise.
    pub add_generation_prompt: bool,
    /// The template to use where the model has several; `None` chooses as transformers does.
    pub template: Option<String>,
    /// Further variables by name, such as `tools`, `documents` or `enable_thinking`. They win over the special tokens.
    pub variables: BTreeMap<String, Value>,
    /// The time that `strftime_now` writes, in UTC.
    pub now: SystemTime,
}

impl Default for ChatOptions {
    fn default() -> Self {
        Self { add_generation_prompt: true, template: None, variables: BTreeMap::new(), now: SystemTime::now() }
    }
}

/// The chat template of a model, ready to render.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
/// use mixtura_infer::{ChatOptions, ChatTemplate, Message};
/// let template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>";
/// std::fs::write(dir.join("chat_template.jinja"), template)?;
/// let text = ChatTemplate::read(dir)?.render(&[Message::new("user", "Hello")], &ChatOptions::default())?;
/// assert_eq!(text, "<|user|>Hello\n<|assistant|>");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ChatTemplate {
    templates: BTreeMap<String, Template>,
    special_tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// The template or templates of a model directory. One that is not asked for by default may be broken; that is said when it is used.
    pub fn read(dir: &Path) -> Result<Self, ChatError> {
        Self::of(files::templates(dir)?, dir)
    }

    /// A template from another file, with the special tokens of a model directory.
    pub fn read_file(template: &Path, dir: &Path) -> Result<Self, ChatError> {
        Self::of(vec![files::single(template)?], dir)
    }

    fn of(sources: Vec<files::Source>, dir: &Path) -> Result<Self, ChatError> {
        let templates: BTreeMap<_, _> = sources.into_iter().map(|s| (s.name.clone(), Template::new(s))).collect();
        if let Some(default) = templates.get("default") {
            default.environment()?;
        }
        Ok(Self { templates, special_tokens: files::special_tokens(dir)? })
    }

    /// The names of the templates.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.templates.keys().map(String::as_str)
    }

    /// The special tokens by the names under which the template sees them.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    /// The text that the model continues.
    ///
    /// Messages whose content is a list of text parts are handed on as they are where the template reads parts. Others would print the
    /// list or fail, so there the parts are joined by newlines first.
    pub fn render(&self, messages: &[Message], options: &ChatOptions) -> Result<String, ChatError> {
        if messages.is_empty() {
            return Err(ChatError::NoMessages);
        }
        let template = self.choose(options)?;
        let joined = messages.iter().any(Message::has_parts) && !self.reads_parts(template)?;
        template.render(self.context(messages, joined, options), messages.len())
    }

    /// [`ChatTemplate::render`], with the places where messages or variables spell out one of these special tokens, which must then be
    /// read as text.
    pub fn prompt(&self, messages: &[Message], options: &ChatOptions, special: &[&str]) -> Result<Prompt, ChatError> {
        let messages: Vec<Message> = messages.iter().map(|m| m.marked(special)).collect();
        let mut options = options.clone();
        options.variables.values_mut().for_each(|value| *value = prompt::marked(value, special));
        Ok(Prompt::of_marked(&self.render(&messages, &options)?))
    }

    fn choose(&self, options: &ChatOptions) -> Result<&Template, ChatError> {
        let with_tools = options.variables.get("tools").is_some_and(|tools| !tools.is_none() && !tools.is_undefined());
        let name = match &options.template {
            Some(name) => name,
            None if with_tools && self.templates.contains_key("tool_use") => "tool_use",
            None => "default",
        };
        self.templates.get(name).ok_or_else(|| ChatError::NoSuchTemplate {
            asked: name.into(),
            known: self.names().collect::<Vec<_>>().join(", "),
        })
    }

    fn context(&self, messages: &[Message], joined: bool, options: &ChatOptions) -> Value {
        let mut context: BTreeMap<&str, Value> =
            BTreeMap::from([("tools", Value::from(())), ("documents", Value::from(()))]);
        context.extend(self.special_tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str()))));
        context.extend(options.variables.iter().map(|(name, value)| (name.as_str(), value.clone())));
        let now = options.now;
        context.insert("strftime_now", Value::from_function(move |format: String| python::strftime(&format, now)));
        context.insert("messages", messages.iter().map(|m| m.seen_by_template(joined)).collect());
        context.insert("add_generation_prompt", options.add_generation_prompt.into());
        context.into_iter().collect()
    }

    /// Whether the template makes text of a list of parts, found by trying: it must print the text, and not as Python prints a list.
    fn reads_parts(&self, template: &Template) -> Result<bool, ChatError> {
        if let Some(&known) = template.reads_parts.get() {
            return Ok(known);
        }
        let options = ChatOptions::default();
        let probe = Message::of_parts("user", ["probe"]);
        let reads = match template.render(self.context(&[probe], false, &options), 1) {
            Ok(text) => {
                text.contains("probe")
                    && !["'text': 'probe'", r#""text": "probe""#].iter().any(|list| text.contains(list))
            }
            // A template that refuses any conversation of one message has not said anything about parts.
            Err(ChatError::Refused { .. }) => true,
            Err(_) => false,
        };
        Ok(*template.reads_parts.get_or_init(|| reads))
    }
}

/// One template of a model.
struct Template {
    file: PathBuf,
    compiled: Result<Environment<'static>, Problem>,
    reads_parts: OnceLock<bool>,
}

/// Where a template failed, and how.
#[derive(Clone)]
struct Problem {
    line: usize,
    reason: String,
}

impl Problem {
    fn of(error: &minijinja::Error) -> Self {
        let reason = match error.detail() {
            Some(detail) => format!("{}: {detail}", error.kind()),
            None => error.kind().to_string(),
        };
        Self { line: error.line().unwrap_or(1), reason }
    }
}

impl Template {
    fn new(source: files::Source) -> Self {
        let compiled = environment::compile(&source.text).map_err(|error| Problem::of(&error));
        Self { file: source.file, compiled, reads_parts: OnceLock::new() }
    }

    fn environment(&self) -> Result<&Environment<'static>, ChatError> {
        self.compiled.as_ref().map_err(|problem| {
            let Problem { line, reason } = problem.clone();
            ChatError::Syntax { path: self.file.clone(), line, reason }
        })
    }

    /// Renders on a thread of its own, whose stack outlasts what the fuel allows to nest.
    fn render(&self, context: Value, messages: usize) -> Result<String, ChatError> {
        let env = self.environment()?;
        std::thread::scope(|scope| {
            let render = || self.render_here(env, context, messages);
            let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK);
            let thread = thread
                .spawn_scoped(scope, render)
                .map_err(|source| ChatError::Io { path: self.file.clone(), source })?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn render_here(&self, env: &Environment, context: Value, messages: usize) -> Result<String, ChatError> {
        let fuel = FUEL + FUEL_PER_MESSAGE * messages as u64;
        let mut env = env.clone();
        env.set_fuel(Some(fuel));
        let mut out = Limited { bytes: Vec::new(), full: false };
        let rendered =
            env.get_template(environment::NAME).and_then(|t| t.render_captured_to(context, &mut out).map(drop));
        let limit = |limit: String| ChatError::Limit { path: self.file.clone(), limit, messages };
        match rendered {
            Ok(()) => Ok(String::from_utf8_lossy(&out.bytes).into_owned()),
            Err(_) if out.full => Err(limit(format!("{} MiB of text", MAX_TEXT >> 20))),
            Err(error) if error.kind() == ErrorKind::OutOfFuel => Err(limit(format!("{fuel} instructions"))),
            Err(error) => Err(self.failure(&error)),
        }
    }

    fn failure(&self, error: &minijinja::Error) -> ChatError {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(at) = cause {
            if let Some(raised) = at.downcast_ref::<environment::Raised>() {
                return ChatError::Refused { message: raised.0.clone() };
            }
            cause = at.source();
        }
        let Problem { line, reason } = Problem::of(error);
        ChatError::Render { path: self.file.clone(), line, reason }
    }
}

/// Takes so many bytes and no more.
struct Limited {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Limited {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + more.len() > MAX_TEXT {
            self.full = true;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
