//! What a model directory says about its chat template: the template or templates, and the special tokens they may name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::ChatError;

const TEMPLATE_FILE: &str = "chat_template.jinja";
const FURTHER_TEMPLATES: &str = "additional_chat_templates";
const CONFIG_FILE: &str = "tokenizer_config.json";
/// Read where `tokenizer_config.json` does not list its tokens itself, as transformers does.
const LEGACY_TOKENS_FILE: &str = "special_tokens_map.json";

/// A template as it lies in a directory.
pub(super) struct Source {
    pub name: String,
    pub file: PathBuf,
    pub text: String,
}

/// The templates of a directory: those in files of their own, else those of `tokenizer_config.json`.
pub(super) fn templates(dir: &Path) -> Result<Vec<Source>, ChatError> {
    let mut sources = Vec::new();
    let file = dir.join(TEMPLATE_FILE);
    if let Some(text) = text_of(&file)? {
        sources.push(Source { name: "default".into(), file, text });
    }
    for file in further_templates(&dir.join(FURTHER_TEMPLATES))? {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(text) = text_of(&file)? {
            sources.retain(|s| s.name != name);
            sources.push(Source { name, file, text });
        }
    }
    if !sources.is_empty() {
        return Ok(sources);
    }
    let file = dir.join(CONFIG_FILE);
    let refuse = |reason: String| Err(ChatError::Config { path: file.clone(), reason });
    let template = json_of(&file)?.and_then(|mut config| config.get_mut("chat_template").map(Json::take));
    match template.unwrap_or_default() {
        Json::Null => return Err(ChatError::Missing { dir: dir.into() }),
        Json::String(text) => sources.push(Source { name: "default".into(), file, text }),
        Json::Array(list) => {
            for (i, entry) in list.iter().enumerate() {
                let (Some(name), Some(text)) = (entry["name"].as_str(), entry["template"].as_str()) else {
                    return refuse(format!(
                        "entry {} of the list chat_template is {}, but a list must hold objects with the strings name and template; a \
                         single template is a string",
                        i + 1,
                        what(entry)
                    ));
                };
                sources.push(Source { name: name.into(), file: file.clone(), text: text.into() });
            }
            if sources.is_empty() {
                return Err(ChatError::Missing { dir: dir.into() });
            }
        }
        other => {
            return refuse(format!(
                "chat_template is {}, but it must be a string, or a list of objects with the strings name and template",
                what(&other)
            ));
        }
    }
    Ok(sources)
}

/// A template outside of a model directory.
pub(super) fn single(file: &Path) -> Result<Source, ChatError> {
    match text_of(file)? {
        Some(text) => Ok(Source { name: "default".into(), file: file.into(), text }),
        None => Err(ChatError::Io { path: file.into(), source: std::io::ErrorKind::NotFound.into() }),
    }
}

/// The special tokens by the names under which transformers hands them to a template: `bos_token`, `eos_token` and so on.
pub(super) fn special_tokens(dir: &Path) -> Result<BTreeMap<String, String>, ChatError> {
    let mut tokens = BTreeMap::new();
    let config = json_of(&dir.join(CONFIG_FILE))?.unwrap_or_default();
    take_tokens(&config, &mut tokens);
    if config.get("added_tokens_decoder").is_none()
        && let Some(legacy) = json_of(&dir.join(LEGACY_TOKENS_FILE))?
    {
        take_tokens(&legacy, &mut tokens);
    }
    Ok(tokens)
}

fn take_tokens(config: &Json, tokens: &mut BTreeMap<String, String>) {
    let own = config.as_object().into_iter().flatten().filter(|(key, _)| key.ends_with("_token"));
    let named = ["extra_special_tokens", "model_specific_special_tokens"];
    let further = named.iter().filter_map(|key| config.get(key)?.as_object()).flatten();
    for (key, value) in own.chain(further) {
        // A string, or an object that also says how the token is matched.
        if let Some(text) = value.as_str().or_else(|| value["content"].as_str()) {
            tokens.insert(key.clone(), text.into());
        }
    }
}

fn further_templates(dir: &Path) -> Result<Vec<PathBuf>, ChatError> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let io = |source| ChatError::Io { path: dir.into(), source };
    let entries = std::fs::read_dir(dir).map_err(io)?;
    let mut files = entries.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(io)?;
    files.retain(|file| file.extension().is_some_and(|e| e == "jinja"));
    files.sort();
    Ok(files)
}

/// A file's text; `None` where there is no such file.
fn text_of(path: &Path) -> Result<Option<String>, ChatError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ChatError::Io { path: path.into(), source }),
    };
    if bytes.starts_with(b"\xef\xbb\xbf") {
        return Err(ChatError::ByteOrderMark { path: path.into() });
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some(text)),
        Err(error) => {
            let offset = error.utf8_error().valid_up_to();
            Err(ChatError::NotText { path: path.into(), offset, byte: error.as_bytes()[offset] })
        }
    }
}

fn json_of(path: &Path) -> Result<Option<Json>, ChatError> {
    let Some(text) = text_of(path)? else { return Ok(None) };
    let json: Json = serde_json::from_str(&text)
        .map_err(|error| ChatError::Config { path: path.into(), reason: format!("it is not JSON: {error}") })?;
    if !json.is_object() {
        return Err(ChatError::Config {
            path: path.into(),
            reason: format!("it holds {}, not an object", what(&json)),
        });
    }
    Ok(Some(json))
}

/// What a JSON value is, for a sentence.
fn what(json: &Json) -> &'static str {
    match json {
        Json::Null => "null",
        Json::Bool(_) => "true or false",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}
