//! The environment that transformers renders templates in, made of minijinja: the same whitespace rules, functions, filters and Python
//! methods, and limits on what a template may take.

use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::python;

/// Marks the error that `raise_exception` makes: the template refuses the conversation.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub String);

/// A template, compiled.
pub(super) fn compile(source: &str) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_unknown_method_callback(method);
    env.set_formatter(|out, _, value| {
        let text = python::to_str(value)?;
        out.write_str(&text).map_err(|_| Error::from(ErrorKind::WriteFailure))
    });
    env.remove_global("debug");
    env.add_function("raise_exception", |message: String| -> Result<(), Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
    });
    env.add_filter("tojson", |value: &Value, args: Rest<Value>| python::to_json(value, &args));
    env.add_filter("string", python::to_str);
    env.add_filter("join", join);
    env.add_filter("trim", trim);
    env.add_filter("length", length);
    env.add_filter("count", length);
    env.add_filter("round", round);
    // To Python, strings and mappings are sequences too, and True is a number.
    env.add_test("sequence", |value: &Value| {
        use ValueKind::{Iterable, Map, Seq, String, Undefined};
        matches!(value.kind(), String | Seq | Iterable | Map | Undefined)
    });
    env.add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
    env.add_template_owned(NAME, prepared(source))?;
    Ok(env)
}

/// What the only template of an environment is called.
pub(super) const NAME: &str = "chat template";

fn join(value: &Value, args: Rest<Value>) -> Result<String, Error> {
    let (separator, named): (Option<&Value>, Kwargs) = match args.first() {
        Some(first) if !first.is_kwargs() => (Some(first), from_args::<(&Value, Kwargs)>(&args)?.1),
        _ => (None, from_args::<(Kwargs,)>(&args)?.0),
    };
    let attribute: Option<Value> = named.get("attribute")?;
    let by_name: Option<Value> = named.get("d")?;
    named.assert_all_used()?;
    let separator = separator.or(by_name.as_ref()).map(python::to_str).transpose()?.unwrap_or_default();
    let mut parts = Vec::new();
    for item in value.try_iter()? {
        let item = match &attribute {
            Some(attribute) => item.get_item(attribute)?,
            None => item,
        };
        parts.push(python::to_str(&item)?);
    }
    Ok(parts.join(&separator))
}

fn trim(value: &Value, chars: Option<String>) -> Result<String, Error> {
    let text = python::to_str(value)?;
    Ok(match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).into(),
        None => text.trim_matches(is_space).into(),
    })
}

fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    value.len().ok_or_else(|| {
        Error::new(ErrorKind::InvalidOperation, format!("a value that is {} has no length", value.kind()))
    })
}

/// Python's `round`: halves to the even neighbour, an integer stays one.
fn round(value: &Value, args: Rest<Value>) -> Result<Value, Error> {
    let (positional, named): (&[Value], Kwargs) = from_args(&args)?;
    let option = |at: usize, name| -> Result<Option<Value>, Error> {
        Ok(named.get::<Option<Value>>(name)?.or_else(|| positional.get(at).cloned()))
    };
    let precision = option(0, "precision")?.and_then(|p| p.as_i64()).unwrap_or(0).clamp(0, 30) as usize;
    let method = option(1, "method")?.map_or("common".into(), |m| m.to_string());
    named.assert_all_used()?;
    if value.is_integer() && method == "common" {
        return Ok(value.clone());
    }
    let x = f64::try_from(value.clone())?;
    let scale = 10f64.powi(precision as i32);
    Ok(Value::from(match method.as_str() {
        "ceil" => (x * scale).ceil() / scale,
        "floor" => (x * scale).floor() / scale,
        // Decimal digits of the exact value, halves to even, as Python computes it.
        _ => format!("{x:.precision$}").parse().unwrap_or(x),
    }))
}

/// Python's methods of strings, mappings and lists: those that minijinja's collection lacks or that count in other units there.
fn method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else { return pycompat::unknown_method_callback(state, value, name, args) };
    match (name, args) {
        ("strip", []) => Ok(text.trim_matches(is_space).into()),
        ("lstrip", []) => Ok(text.trim_start_matches(is_space).into()),
        ("rstrip", []) => Ok(text.trim_end_matches(is_space).into()),
        ("split", _) => split(text, args, false),
        ("rsplit", _) => split(text, args, true),
        ("removeprefix", _) => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        ("removesuffix", _) => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        ("find" | "rfind", _) => {
            let (what,): (&str,) = from_args(args)?;
            let at = if name == "find" { text.find(what) } else { text.rfind(what) };
            // In characters, not bytes: the result is used to slice.
            Ok(Value::from(at.map_or(-1, |at| text[..at].chars().count() as i64)))
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// `str.isspace` of Python, which counts four separators among the controls.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `str.split` and `str.rsplit`: at a separator or, without one, at runs of spaces; at most `maxsplit` times.
fn split(text: &str, args: &[Value], from_end: bool) -> Result<Value, Error> {
    let (positional, named): (&[Value], Kwargs) = from_args(args)?;
    let option = |at: usize, name| -> Result<Option<Value>, Error> {
        let given = named.get::<Option<Value>>(name)?;
        Ok(given.or_else(|| positional.get(at).cloned()).filter(|v| !v.is_none()))
    };
    let separator = option(0, "sep")?;
    let most = option(1, "maxsplit")?.and_then(|v| v.as_i64()).and_then(|n| usize::try_from(n).ok());
    named.assert_all_used()?;
    let most = most.unwrap_or(usize::MAX - 1);
    let parts: Vec<&str> = match &separator {
        Some(separator) => {
            let separator = separator.as_str().filter(|s| !s.is_empty()).ok_or_else(|| {
                Error::new(ErrorKind::InvalidOperation, "split: the separator must be a string that is not empty")
            })?;
            match from_end {
                false => text.splitn(most + 1, separator).collect(),
                true => text.rsplitn(most + 1, separator).collect(),
            }
        }
        None => at_spaces(text, most, from_end),
    };
    Ok(match from_end {
        false => parts.into_iter().map(Value::from).collect(),
        true => parts.into_iter().rev().map(Value::from).collect(),
    })
}

/// The words of a text, from the end where asked; the last part is all the rest after `most` words.
fn at_spaces(text: &str, most: usize, from_end: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let trimmed = |rest: &'_ str| match from_end {
        false => rest.len() - rest.trim_start_matches(is_space).len()..rest.len(),
        true => 0..rest.trim_end_matches(is_space).len(),
    };
    let mut rest = &text[trimmed(text)];
    while !rest.is_empty() {
        let at = if from_end { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(at) = at.filter(|_| parts.len() < most) else {
            parts.push(rest);
            break;
        };
        let (before, after) = rest.split_at(at);
        parts.push(if from_end { after.trim_start_matches(is_space) } else { before });
        rest = if from_end { before } else { after };
        rest = &rest[trimmed(rest)];
    }
    parts
}

/// The source as minijinja takes it. Jinja2 reads every line end as `\n`; and the tag `generation`, which marks the assistant's tokens
/// for training and prints what is in it, becomes `with`, which prints it too and keeps its variables to itself as the tag does.
fn prepared(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find("{%").into_iter().chain(rest.find("{{")).chain(rest.find("{#")).min() {
        let (text, tag) = rest.split_at(start);
        out.push_str(text);
        let length = tag_length(tag);
        out.push_str(&without_generation(&tag[..length]));
        rest = &tag[length..];
    }
    out + rest
}

/// How long the tag is that the text begins with, its delimiters included; a raw block counts as one.
fn tag_length(tag: &str) -> usize {
    let end_of = |marker: &str, from: usize| tag[from..].find(marker).map_or(tag.len(), |at| from + at + marker.len());
    if tag.starts_with("{#") {
        return end_of("#}", 2);
    }
    if tag_word(tag) == Some("raw") {
        let mut end = end_of("%}", 2);
        while end < tag.len() {
            let next = end_of("{%", end) - 2;
            if next >= tag.len() {
                return tag.len();
            }
            end = tag[next..].find("%}").map_or(tag.len(), |at| next + at + 2);
            if tag_word(&tag[next..]) == Some("endraw") {
                return end;
            }
            end = next + 2;
        }
        return tag.len();
    }
    let close = if tag.starts_with("{%") { "%}" } else { "}}" };
    let mut quoted: Option<char> = None;
    let mut escaped = false;
    let mut braces = 0usize;
    for (at, c) in tag.char_indices().skip(2) {
        match quoted {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(quote) if c == quote => quoted = None,
            Some(_) => {}
            None if c == '\'' || c == '"' => quoted = Some(c),
            // A mapping in an expression: its brace does not close the tag.
            None if braces == 0 && tag[at..].starts_with(close) => return at + 2,
            None if c == '{' => braces += 1,
            None if c == '}' => braces = braces.saturating_sub(1),
            None => {}
        }
    }
    tag.len()
}

/// The first word of a block tag.
fn tag_word(tag: &str) -> Option<&str> {
    let inside = tag.strip_prefix("{%")?.trim_start_matches(['-', '+']).trim_start();
    inside.split(|c: char| !(c.is_alphanumeric() || c == '_')).next()
}

fn without_generation(tag: &str) -> String {
    match tag_word(tag) {
        Some("generation") => tag.replacen("generation", "with", 1),
        Some("endgeneration") => tag.replacen("endgeneration", "endwith", 1),
        _ => tag.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> String {
        compile(source).unwrap().get_template(NAME).unwrap().render(()).unwrap()
    }

    #[test]
    fn the_generation_tag_prints_its_body_and_keeps_its_variables() {
        assert_eq!(prepared("{%- generation -%}\r\na{%+endgeneration%}"), "{%- with -%}\na{%+endwith%}");
        let kept = [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{% raw %}{% generation %}{% endraw %}",
            "generation",
        ];
        kept.iter().for_each(|source| assert_eq!(&prepared(source), source));
        assert_eq!(render("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"), "21");
    }

    #[test]
    fn tags_end_where_they_end() {
        let length = |tag: &str| tag_length(&(tag.to_owned() + " {% x %}"));
        for tag in ["{{ '}}' }}", "{{ {'a': {'b': 1}} }}", "{% if x == \"%}\" %}", r"{{ 'a\'}}' }}", "{# '}} #}"] {
            assert_eq!(length(tag), tag.len(), "{tag}");
        }
        assert_eq!(
            tag_length("{% raw %}{% raw %}{{ '{% endraw %} {% x %}"),
            "{% raw %}{% raw %}{{ '{% endraw %}".len()
        );
        ["{{", "{%", "{#", "{% raw %}", "{% raw %}{%", "{{ 'a", ""]
            .iter()
            .for_each(|cut| assert_eq!(tag_length(cut), cut.len()));
    }

    #[test]
    fn methods_count_characters_and_split_as_python_does() {
        assert_eq!(render("{{ 'éa<b'.find('<') }} {{ 'a'.find('x') }}"), "2 -1");
        assert_eq!(render("{{ ' a  b c '.split() }} {{ ' a  b c '.split(none, 1) }}"), "['a', 'b', 'c'] ['a', 'b c ']");
        assert_eq!(
            render("{{ ' a  b c '.rsplit(none, 1) }} {{ 'a,b,c'.rsplit(',', maxsplit=1) }}"),
            "[' a  b', 'c'] ['a,b', 'c']"
        );
        assert_eq!(render("{{ 'xay'.removeprefix('x').removesuffix('y') }}{{ '\u{1c}b\n'.strip() }}"), "ab");
    }
}
