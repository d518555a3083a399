//! A plain text table: columns as wide as their widest cell, numbers to the right.

/// Rows of cells under a header.
#[derive(Debug, Clone, Default)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names.
    pub fn new<S: Into<String>>(header: impl IntoIterator<Item = S>) -> Self {
        Self { header: header.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// Adds a row; short rows are padded with empty cells.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) -> &mut Self {
        let mut cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        cells.resize(self.header.len(), String::new());
        self.rows.push(cells);
        self
    }

    /// Whether no row was added.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let columns = self.header.len();
        let width = |c: usize| {
            self.rows.iter().map(|r| &r[c]).chain([&self.header[c]]).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        // A column is numeric when each of its cells starts like a number or is empty or a dash.
        let numeric: Vec<bool> = (0..columns)
            .map(|c| {
                c > 0
                    && self.rows.iter().all(|r| {
                        r[c].is_empty() || r[c] == "-" || r[c].starts_with(|x: char| x.is_ascii_digit() || x == '-')
                    })
            })
            .collect();
        let mut line = |cells: &[String]| {
            let padded: Vec<String> = cells
                .iter()
                .enumerate()
                .map(|(c, cell)| {
                    let pad = " ".repeat(widths[c] - cell.chars().count());
                    if numeric[c] { format!("{pad}{cell}") } else { format!("{cell}{pad}") }
                })
                .collect();
            writeln!(f, "  {}", padded.join("  ").trim_end())
        };
        line(&self.header)?;
        line(&widths.iter().map(|&w| "-".repeat(w)).collect::<Vec<_>>())?;
        self.rows.iter().try_for_each(|row| line(row))
    }
}

/// `1234567` as `1 234 567`.
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

/// Seconds as `4 m 07 s` or `12.3 s`.
pub fn duration(seconds: f64) -> String {
    if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else {
        let whole = seconds.round() as u64;
        format!("{} m {:02} s", whole / 60, whole % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_right_and_words_left() {
        let mut table = Table::new(["split", "accuracy"]);
        table.row(["iid", "99.5"]).row(["held-out content", "100.0"]);
        let text = table.to_string();
        assert_eq!(text.lines().nth(2).unwrap(), "  iid                   99.5");
        assert_eq!(text.lines().nth(3).unwrap(), "  held-out content     100.0");
    }

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!((grouped(7), grouped(1234), grouped(26_500_000)), ("7".into(), "1 234".into(), "26 500 000".into()));
    }
}
