//! Messages as they come from outside, checked, and as a template sees them.

use minijinja::Value;
use minijinja::value::ValueKind;
use serde::Deserialize;

use super::ChatError;
use super::prompt::marked;

/// Names that a message's reasoning goes by. The first is the one that templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// One message of a conversation: an object with a `role` and mostly a `content`, which is a string or a list of
/// `{"type": "text", "text": ...}`. Further keys (`tool_calls`, `name`, ...) reach the template as they are, in their order.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "Value")]
pub struct Message {
    /// In the order given; keys whose value is null are gone.
    fields: Vec<(String, Value)>,
}

/// Reads a JSON list of messages.
pub fn parse_messages(json: &str) -> Result<Vec<Message>, ChatError> {
    let list: Vec<Value> =
        serde_json::from_str(json).map_err(|error| ChatError::Messages { reason: error.to_string() })?;
    let message = |(i, value)| Message::try_from(value).map_err(|reason| ChatError::Message { number: i + 1, reason });
    list.into_iter().enumerate().map(message).collect()
}

impl Message {
    /// A message of plain text.
    pub fn new(role: &str, content: &str) -> Self {
        Self { fields: vec![("role".into(), role.into()), ("content".into(), content.into())] }
    }

    /// A message of text in parts.
    pub fn of_parts<'a>(role: &str, parts: impl IntoIterator<Item = &'a str>) -> Self {
        let part = |text: &str| Value::from_iter([("type", Value::from("text")), ("text", Value::from(text))]);
        let content: Value = parts.into_iter().map(part).collect();
        Self { fields: vec![("role".into(), role.into()), ("content".into(), content)] }
    }

    /// Who speaks.
    pub fn role(&self) -> &str {
        self.field("role").and_then(Value::as_str).unwrap_or_default()
    }

    fn field(&self, name: &str) -> Option<&Value> {
        self.fields.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    pub(super) fn has_parts(&self) -> bool {
        self.field("content").is_some_and(|content| content.as_str().is_none())
    }

    /// The message with special tokens that it spells out between marks.
    pub(super) fn marked(&self, special: &[&str]) -> Self {
        let fields = self.fields.iter().map(|(key, value)| (key.clone(), marked(value, special)));
        Self { fields: fields.collect() }
    }

    /// The message with its reasoning under every name that templates look for, and its parts joined where asked.
    pub(super) fn seen_by_template(&self, joined: bool) -> Value {
        let mut fields = self.fields.clone();
        if joined && let Some((_, content)) = fields.iter_mut().find(|(key, _)| key == "content") {
            *content = joined_text(content).into();
        }
        if let Some(reasoning) = REASONING.iter().find_map(|name| self.field(name)) {
            let thinking = self.field("thinking").unwrap_or(reasoning).clone();
            fields.retain(|(key, _)| key != "thinking");
            fields.insert(0, ("thinking".into(), thinking));
            match fields.iter_mut().find(|(key, _)| key == REASONING[0]) {
                Some((_, value)) => *value = reasoning.clone(),
                None => fields.push((REASONING[0].into(), reasoning.clone())),
            }
        }
        fields.into_iter().collect()
    }
}

/// The texts of parts, by newlines, or the text itself.
fn joined_text(content: &Value) -> String {
    if let Some(text) = content.as_str() {
        return text.into();
    }
    let text = |part: Value| part.get_attr("text").ok().and_then(|text| text.as_str().map(str::to_owned));
    content.try_iter().into_iter().flatten().filter_map(text).collect::<Vec<_>>().join("\n")
}

impl TryFrom<Value> for Message {
    type Error = String;

    /// Checks what templates rely on, and says what is missing.
    fn try_from(value: Value) -> Result<Self, String> {
        let pairs = value.as_object().filter(|_| value.kind() == ValueKind::Map).and_then(|o| o.try_iter_pairs());
        let Some(pairs) = pairs else {
            return Err(format!("it is a {}, but a message is an object with role and content", value.kind()));
        };
        let fields = pairs.filter(|(_, value)| !value.is_none()).map(|(key, value)| (key.to_string(), value)).collect();
        let message = Self { fields };
        match message.field("role") {
            Some(role) if role.as_str().is_some() => {}
            Some(role) => return Err(format!("role is a {}, but it must be a string such as user", role.kind())),
            None => return Err("it has no role; say who speaks, such as system, user or assistant".into()),
        }
        match message.field("content") {
            None => {}
            Some(content) if content.as_str().is_some() => {}
            Some(content) if content.kind() == ValueKind::Seq => check_parts(content)?,
            Some(content) => {
                let kind = content.kind();
                return Err(format!("content is a {kind}, but it must be a string or a list of text parts"));
            }
        }
        Ok(message)
    }
}

fn check_parts(content: &Value) -> Result<(), String> {
    for (i, part) in content.try_iter().into_iter().flatten().enumerate() {
        let field = |name: &str| part.get_attr(name).ok().and_then(|v| v.as_str().map(str::to_owned));
        match (field("type").as_deref(), field("text")) {
            (Some("text"), Some(_)) => {}
            (Some("text"), None) => return Err(format!("part {} of its content has no text", i + 1)),
            (Some(other), _) => {
                return Err(format!(
                    "part {} of its content is of type {other}, but the model takes text alone",
                    i + 1
                ));
            }
            (None, _) => {
                return Err(format!("part {} of its content must be {{\"type\": \"text\", \"text\": ...}}", i + 1));
            }
        }
    }
    Ok(())
}
