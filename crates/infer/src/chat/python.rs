//! What Python makes of a value: `str`, `repr`, `json.dumps` and `strftime`, as templates written for Jinja2 expect them.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, ErrorKind, Value};

/// Lists in lists are followed this far: each level is a stack frame.
const DEPTH: usize = 200;

/// `str(value)`; nothing for a value that is not defined, as Jinja2 prints it.
pub(super) fn to_str(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => {
            let mut out = String::new();
            write_repr(&mut out, value, 0)?;
            Ok(out)
        }
    }
}

fn write_repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => write_quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(out, &item, depth + 1)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(out, &key, depth + 1)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        _ => _ = write!(out, "{value}"),
    }
    Ok(())
}

fn check_depth(depth: usize) -> Result<(), Error> {
    match depth > DEPTH {
        true => Err(Error::new(ErrorKind::InvalidOperation, format!("a value nests more than {DEPTH} deep"))),
        false => Ok(()),
    }
}

/// A string's `repr`: single quotes unless that takes more escapes.
fn write_quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        _ = match c {
            '\n' => write!(out, "\\n"),
            '\r' => write!(out, "\\r"),
            '\t' => write!(out, "\\t"),
            c if c == quote || c == '\\' => write!(out, "\\{c}"),
            c if is_printable(c) => write!(out, "{c}"),
            c if (c as u32) < 0x100 => write!(out, "\\x{:02x}", c as u32),
            c if (c as u32) < 0x1_0000 => write!(out, "\\u{:04x}", c as u32),
            c => write!(out, "\\U{:08x}", c as u32),
        };
    }
    out.push(quote);
}

/// `str.isprintable` without the tables of unassigned characters: controls, spaces but the common one, format characters, private use.
fn is_printable(c: char) -> bool {
    let invisible = matches!(c,
        '\u{ad}' | '\u{600}'..='\u{605}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' |
        '\u{e000}'..='\u{f8ff}' | '\u{feff}' | '\u{e0000}'..='\u{10ffff}');
    c == ' ' || !(c.is_control() || c.is_whitespace() || invisible)
}

/// `repr` of an int or a float.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let x = f64::try_from(value.clone()).unwrap_or(f64::NAN);
    if !x.is_finite() {
        return if x.is_nan() { "nan".into() } else { if x > 0.0 { "inf" } else { "-inf" }.into() };
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = x.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// The filter `tojson` as transformers defines it: `json.dumps` whose `ensure_ascii` is off.
pub(super) fn to_json(value: &Value, args: &[Value]) -> Result<String, Error> {
    let (positional, named): (&[Value], Kwargs) = from_args(args)?;
    let option = |at: usize, name| -> Result<Value, Error> {
        let given = named.get::<Option<Value>>(name)?;
        Ok(given.or_else(|| positional.get(at).cloned()).unwrap_or(Value::UNDEFINED))
    };
    let ensure_ascii = option(0, "ensure_ascii")?.is_true();
    let indent = option(1, "indent")?;
    let separators = option(2, "separators")?;
    let sort_keys = option(3, "sort_keys")?.is_true();
    named.assert_all_used()?;
    let indent = match (indent.as_str(), indent.as_i64()) {
        (Some(text), _) => Some(text.to_owned()),
        (None, Some(spaces)) => Some(" ".repeat(spaces.clamp(0, 64) as usize)),
        (None, None) => None,
    };
    let separator = |at: usize, default: &str| match separators.get_item_by_index(at) {
        Ok(text) if text.as_str().is_some() => text.to_string(),
        _ => default.to_owned(),
    };
    let between = separator(0, if indent.is_some() { "," } else { ", " });
    let mut json = Json { out: String::new(), ensure_ascii, indent, between, after_key: separator(1, ": "), sort_keys };
    json.write(value, 0)?;
    Ok(json.out)
}

/// A JSON text in the making.
struct Json {
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    between: String,
    after_key: String,
    sort_keys: bool,
}

impl Json {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        check_depth(depth)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&json_number(value)),
            ValueKind::String => self.write_string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_items('[', ']', depth, items.len(), |json, i| json.write(&items[i], depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.write_items('{', '}', depth, keys.len(), |json, i| {
                    json.write_key(&keys[i])?;
                    json.out.push_str(&json.after_key.clone());
                    json.write(&value.get_item(&keys[i])?, depth + 1)
                })?;
            }
            kind => {
                let reason = format!("tojson: a value that is {kind} cannot be written as JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, reason));
            }
        }
        Ok(())
    }

    fn write_items(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        count: usize,
        mut item: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for i in 0..count {
            if i > 0 {
                self.out.push_str(&self.between.clone());
            }
            self.write_newline(depth + 1);
            item(self, i)?;
        }
        if count > 0 {
            self.write_newline(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn write_newline(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    /// Keys are strings in JSON; Python writes others as they would be written as values.
    fn write_key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.write_string(key.as_str().unwrap_or_default()),
            _ => {
                self.out.push('"');
                self.write(key, DEPTH)?;
                self.out.push('"');
            }
        }
        Ok(())
    }

    fn write_string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn json_number(value: &Value) -> String {
    match number(value).as_str() {
        "nan" => "NaN".into(),
        "inf" => "Infinity".into(),
        "-inf" => "-Infinity".into(),
        text => text.into(),
    }
}

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// `strftime` in UTC and English; a directive that is not known stays as it is, as in the C library.
pub(super) fn strftime(format: &str, time: SystemTime) -> String {
    let seconds = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => after.as_secs() as i64,
        Err(before) => -(before.duration().as_secs_f64().ceil() as i64),
    };
    let (day, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, date) = civil(day);
    let year_day = day - days_to(year, 1, 1);
    let hour = second / 3600;
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        // GNU: %-d is %d without the zero.
        let bare = rest.as_str().starts_with('-');
        if bare {
            rest.next();
        }
        let padded = |n: i64, width: usize| if bare { n.to_string() } else { format!("{n:0width$}") };
        let weekday = DAYS[(day + 4).rem_euclid(7) as usize];
        let month_name = MONTHS[month as usize - 1];
        match rest.next() {
            Some('a') => out.push_str(&weekday[..3]),
            Some('A') => out.push_str(weekday),
            Some('b' | 'h') => out.push_str(&month_name[..3]),
            Some('B') => out.push_str(month_name),
            Some('d') => out.push_str(&padded(date, 2)),
            Some('e') => _ = if bare { write!(out, "{date}") } else { write!(out, "{date:2}") },
            Some('m') => out.push_str(&padded(month, 2)),
            Some('y') => out.push_str(&padded(year.rem_euclid(100), 2)),
            Some('Y') => out.push_str(&year.to_string()),
            Some('H') => out.push_str(&padded(hour, 2)),
            Some('I') => out.push_str(&padded((hour + 11) % 12 + 1, 2)),
            Some('M') => out.push_str(&padded(second / 60 % 60, 2)),
            Some('S') => out.push_str(&padded(second % 60, 2)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('j') => out.push_str(&padded(year_day + 1, 3)),
            Some('u') => _ = write!(out, "{}", (day + 3).rem_euclid(7) + 1),
            Some('w') => _ = write!(out, "{}", (day + 4).rem_euclid(7)),
            Some('F') => _ = write!(out, "{year}-{month:02}-{date:02}"),
            Some('D') => _ = write!(out, "{month:02}/{date:02}/{:02}", year.rem_euclid(100)),
            Some('T') => _ = write!(out, "{hour:02}:{:02}:{:02}", second / 60 % 60, second % 60),
            Some('R') => _ = write!(out, "{hour:02}:{:02}", second / 60 % 60),
            // Python's datetime.now() knows no zone and writes nothing for these two.
            Some('Z' | 'z') => {}
            Some('%') => out.push('%'),
            Some(other) => {
                out.push_str(if bare { "%-" } else { "%" });
                out.push(other);
            }
            None => out.push_str(if bare { "%-" } else { "%" }),
        }
    }
    out
}

/// Days from 1970-01-01 to a date of the Gregorian calendar; years begin in March, so that the leap day comes last.
fn days_to(year: i64, month: i64, date: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + date - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// The year, month and date of a day: the inverse of [`days_to`].
fn civil(day: i64) -> (i64, i64, i64) {
    // At most one year off, since no year has fewer than 365 days and the mean is 365.2425.
    let mut year = 1970 + (day as f64 / 365.2425).floor() as i64;
    while days_to(year, 1, 1) > day {
        year -= 1;
    }
    while days_to(year + 1, 1, 1) <= day {
        year += 1;
    }
    let month = (1..=12).rev().find(|&m| days_to(year, m, 1) <= day).unwrap_or(1);
    (year, month, day - days_to(year, month, 1) + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(strftime("%d %b %Y", at(1_722_000_000)), "26 Jul 2024");
        assert_eq!(
            strftime("%A, %B %-d, %Y %I:%M:%S %p %j", at(951_782_400)),
            "Tuesday, February 29, 2000 12:00:00 AM 060"
        );
        assert_eq!(strftime("%F %T %y %% %Q %", at(0)), "1970-01-01 00:00:00 70 % %Q %");
        assert_eq!(strftime("%F", UNIX_EPOCH - Duration::from_secs(1)), "1969-12-31");
        for day in (-200_000..200_000).step_by(97) {
            let (year, month, date) = civil(day);
            assert_eq!(days_to(year, month, date), day);
        }
    }

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        let written: Vec<String> =
            [0.0, 1.0, -2.5, 0.1, 1e15, 1e16, 1.5e300, 0.0001, 0.00001, 1.25e-7, f64::NAN, f64::NEG_INFINITY]
                .iter()
                .map(|&x| number(&Value::from(x)))
                .collect();
        let python = [
            "0.0",
            "1.0",
            "-2.5",
            "0.1",
            "1000000000000000.0",
            "1e+16",
            "1.5e+300",
            "0.0001",
            "1e-05",
            "1.25e-07",
            "nan",
            "-inf",
        ];
        assert_eq!(written, python);
    }
}
