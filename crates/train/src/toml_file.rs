//! From TOML text and `key=value` overrides to a struct, or to one paragraph that says which line is wrong.
//!
//! Unknown keys and unknown values are errors that name the nearest valid one. Overrides are applied to the parsed
//! table before the struct is built, so they obey the same rules.

use mixtura_routing::names::nearest;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::error::ConfigError;

/// Parses `text`, applies `overrides` in order and builds a `T`. `origin` names the text in errors.
pub fn parse<T: DeserializeOwned>(text: &str, origin: &str, overrides: &[String]) -> Result<T, ConfigError> {
    let mut table: Table = text.parse().map_err(|e: toml::de::Error| {
        let place = e.span().map_or(origin.to_string(), |span| format!("{origin}, line {}", line_of(text, span.start)));
        ConfigError::new(place, format!("this is not valid TOML: {}", e.message()))
    })?;
    for text in overrides {
        set(&mut table, text)?;
    }
    Value::Table(table).try_into().map_err(|e: toml::de::Error| explain(text, origin, overrides, &e))
}

/// Sets `a.b.c=value` in `table`. The value is TOML where it parses as TOML, else a plain string.
fn set(table: &mut Table, text: &str) -> Result<(), ConfigError> {
    let place = format!("--set {text}");
    let Some((key, value)) = text.split_once('=') else {
        return Err(ConfigError::new(place, "expected key=value, for example --set model.moe.top_k=4"));
    };
    if value.trim().parse::<i128>().is_ok_and(|number| i64::try_from(number).is_err()) {
        return Err(ConfigError::new(place, format!("integers of a config lie between {} and {}", i64::MIN, i64::MAX)));
    }
    let value = format!("value = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut t| t.remove("value"))
        .unwrap_or_else(|| Value::String(value.trim().to_string()));
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().filter(|last| !last.is_empty());
    let Some(last) = last else {
        return Err(ConfigError::new(place, "the key is empty"));
    };
    let mut here = table;
    for part in parts {
        let next = here.entry(part).or_insert_with(|| Value::Table(Table::new()));
        let Value::Table(next) = next else {
            return Err(ConfigError::new(place, format!("`{part}` holds a value, not a section")));
        };
        here = next;
    }
    here.insert(last.to_string(), value);
    Ok(())
}

/// The paragraph for an error of serde: where it is, what it says, and what the person may have meant.
fn explain(text: &str, origin: &str, overrides: &[String], error: &toml::de::Error) -> ConfigError {
    let shown = error.to_string();
    let section = shown.lines().find_map(|l| Some(l.trim().strip_prefix("in `")?.trim_end_matches('`').to_string()));
    let message = error.message().lines().next().unwrap_or("unreadable").to_string();
    // serde's wording: "unknown field `x`, expected one of `a`, `b`" and "unknown variant `x`, expected `a` or `b`".
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let unknown = message.starts_with("unknown field") || message.starts_with("unknown variant");
    let (key, candidates) = match names.split_first() {
        Some((found, rest)) if unknown => (Some(*found), rest),
        _ => (None, &[][..]),
    };
    let mut words = match (&section, message.starts_with("unknown field"), key) {
        (Some(section), true, Some(key)) => format!("unknown key `{key}` in [{section}]"),
        (None, true, Some(key)) => format!("unknown key `{key}`"),
        (Some(section), _, _) => format!("{section}: {message}"),
        (None, _, _) => message.clone(),
    };
    if let Some(found) = key {
        match nearest(found, candidates.iter().copied()) {
            Some(name) => words.push_str(&format!("; did you mean `{name}`?")),
            None if message.starts_with("unknown field") && !candidates.is_empty() => {
                words.push_str(&format!("; valid keys here are {}", candidates.join(", ")));
            }
            None => {}
        }
    }
    ConfigError::new(place(text, origin, overrides, section.as_deref(), key), words)
}

/// The override or the line that brought `key`, as well as can be told.
fn place(text: &str, origin: &str, overrides: &[String], section: Option<&str>, key: Option<&str>) -> String {
    let wanted = key.or(section.and_then(|s| s.rsplit('.').next()));
    let Some(wanted) = wanted else { return origin.to_string() };
    let names_it = |path: &str| path.split('.').any(|part| part.trim() == wanted);
    if let Some(by) = overrides.iter().find(|o| o.split('=').next().is_some_and(names_it) || o.ends_with(wanted)) {
        return format!("--set {by}");
    }
    let found = text.lines().position(|line| {
        let line = line.split('#').next().unwrap_or("");
        line.split('=').next().is_some_and(|left| names_it(left.trim().trim_matches(['[', ']'])))
            || line.contains(&format!("\"{wanted}\""))
    });
    found.map_or(origin.to_string(), |line| format!("{origin}, line {}", line + 1))
}

fn line_of(text: &str, offset: usize) -> usize {
    text[..offset.min(text.len())].matches('\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[allow(dead_code)]
        name: String,
        moe: Inner,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        top_k: usize,
        #[allow(dead_code)]
        kind: Option<Kind>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Kind {
        Softmax,
        Sigmoid,
    }

    fn check(text: &str, overrides: &[&str], expected: &str) {
        let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
        let error = parse::<Outer>(text, "run.toml", &overrides).unwrap_err().to_string();
        assert_eq!(error, expected);
    }

    #[test]
    fn an_unknown_key_names_its_line_and_the_nearest_valid_one() {
        check(
            "name = \"a\"\n[moe]\ntopk = 2\n",
            &[],
            "run.toml, line 3: unknown key `topk` in [moe]; did you mean `top_k`?",
        );
    }

    #[test]
    fn an_unknown_value_names_the_nearest_valid_one() {
        check(
            "name = \"a\"\n[moe]\ntop_k = 2\nkind = \"softmaxx\"\n",
            &[],
            "run.toml, line 4: moe.kind: unknown variant `softmaxx`, expected `softmax` or `sigmoid`; \
             did you mean `softmax`?",
        );
    }

    #[test]
    fn an_override_is_blamed_for_what_it_brought() {
        check(
            "name = \"a\"\n[moe]\ntop_k = 2\n",
            &["moe.topkk=3"],
            "--set moe.topkk=3: unknown key `topkk` in [moe]; did you mean `top_k`?",
        );
        check(
            "name = \"a\"\n[moe]\ntop_k = 2\n",
            &["moe"],
            "--set moe: expected key=value, for example --set model.moe.top_k=4",
        );
    }

    #[test]
    fn overrides_replace_and_add() {
        let text = "name = \"a\"\n[moe]\ntop_k = 2\n";
        let outer: Outer =
            parse(text, "x", &["moe.top_k=4".into(), "name=b c".into(), "moe.kind=sigmoid".into()]).unwrap();
        assert_eq!((outer.moe.top_k, outer.name.as_str()), (4, "b c"));
        assert!(matches!(outer.moe.kind, Some(Kind::Sigmoid)));
    }

    #[test]
    fn broken_toml_names_its_line() {
        let error = parse::<Outer>("name = \"a\"\n[moe\n", "run.toml", &[]).unwrap_err().to_string();
        assert!(error.starts_with("run.toml, line 2: this is not valid TOML"), "{error}");
    }
}
