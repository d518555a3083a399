//! Typed access to one case's inputs; a field the case lacks is looked up in the file's `F1`.

use super::{GoldenError, kind};
use crate::error::RoutingError;
use serde::{Deserialize, Deserializer, de};
use serde_json::{Value, json};

/// One case as its function sees it.
pub struct Case<'a> {
    id: &'a str,
    inputs: &'a Value,
    expected: &'a Value,
    fixture: Option<&'a Value>,
    subjects: &'a [String],
}

/// The file again, read for the order of the keys of every case's `inputs.facts`.
#[derive(Deserialize)]
pub(super) struct KeyOrder {
    cases: Vec<CaseOrder>,
}

#[derive(Deserialize)]
struct CaseOrder {
    inputs: InputOrder,
}

#[derive(Deserialize)]
struct InputOrder {
    #[serde(default)]
    facts: Keys,
}

#[derive(Default)]
struct Keys(Vec<String>);

impl KeyOrder {
    /// One list per case, empty where there are no facts.
    pub(super) fn subjects(self) -> impl Iterator<Item = Vec<String>> {
        self.cases.into_iter().map(|c| c.inputs.facts.0)
    }
}

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Keys;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
                let mut keys = Vec::new();
                while let Some((key, _)) = map.next_entry::<String, de::IgnoredAny>()? {
                    keys.push(key);
                }
                Ok(Keys(keys))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// A dense row-major matrix; also how results are turned back into nested lists.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Row-major values.
    pub data: Vec<f64>,
}

impl Matrix {
    /// From parts.
    pub fn new(rows: usize, cols: usize, data: Vec<f64>) -> Self {
        debug_assert_eq!(rows * cols, data.len());
        Self { rows, cols, data }
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// Column `j`.
    pub fn col(&self, j: usize) -> Vec<f64> {
        (0..self.rows).map(|i| self.data[i * self.cols + j]).collect()
    }

    /// `self [m, k] times other [k, n]`.
    pub fn times(&self, other: &Self) -> Self {
        let mut data = vec![0.0; self.rows * other.cols];
        for i in 0..self.rows {
            for (k, &a) in self.row(i).iter().enumerate() {
                for (j, &b) in other.row(k).iter().enumerate() {
                    data[i * other.cols + j] += a * b;
                }
            }
        }
        Self::new(self.rows, other.cols, data)
    }

    /// The transposed matrix.
    pub fn transposed(&self) -> Self {
        Self::new(self.cols, self.rows, (0..self.cols).flat_map(|j| self.col(j)).collect())
    }

    /// As nested lists.
    pub fn json(&self) -> Value {
        rows_json(&self.data, self.cols)
    }
}

/// A flat `[n, cols]` slice as nested lists.
pub fn rows_json<T: Copy + Into<f64>>(data: &[T], cols: usize) -> Value {
    if cols == 0 {
        return json!([]);
    }
    Value::Array(data.chunks(cols).map(|row| json!(row.iter().map(|&v| v.into()).collect::<Vec<f64>>())).collect())
}

impl<'a> Case<'a> {
    /// A case and where its missing inputs come from.
    pub fn new(
        id: &'a str,
        inputs: &'a Value,
        expected: &'a Value,
        fixture: Option<&'a Value>,
        subjects: &'a [String],
    ) -> Self {
        Self { id, inputs, expected, fixture, subjects }
    }

    /// The subjects of `inputs.facts` in the file's order.
    pub fn subjects(&self) -> &'a [String] {
        self.subjects
    }

    /// The input called `name`, the case's own or F1's.
    pub fn input(&self, name: &str) -> Result<&'a Value, GoldenError> {
        let own = self.inputs.get(name);
        own.or_else(|| self.fixture.and_then(|f| f.get(name))).ok_or_else(|| self.missing(&format!("inputs.{name}")))
    }

    /// Whether the case itself carries `name`.
    pub fn has(&self, name: &str) -> bool {
        self.inputs.get(name).is_some()
    }

    /// The expected object, for cases whose questions are the keys of their answers.
    pub fn expected(&self, name: &str) -> Result<&'a Value, GoldenError> {
        self.expected.get(name).ok_or_else(|| self.missing(&format!("expected.{name}")))
    }

    /// A number.
    pub fn number(&self, name: &str) -> Result<f64, GoldenError> {
        let value = self.input(name)?;
        value.as_f64().ok_or_else(|| self.kind(name, "a number", value))
    }

    /// A count between 0 and 2^20, the largest that keeps every case's work bounded.
    pub fn count(&self, name: &str) -> Result<usize, GoldenError> {
        let value = self.input(name)?;
        self.count_of(name, value)
    }

    /// A list of numbers.
    pub fn numbers(&self, name: &str) -> Result<Vec<f64>, GoldenError> {
        let value = self.input(name)?;
        self.numbers_of(name, value)
    }

    /// A list of counts.
    pub fn counts(&self, name: &str) -> Result<Vec<usize>, GoldenError> {
        let value = self.input(name)?;
        let list = value.as_array().ok_or_else(|| self.kind(name, "a list of whole numbers", value))?;
        list.iter().map(|v| self.count_of(name, v)).collect()
    }

    /// A list of lists of numbers, all of one length.
    pub fn matrix(&self, name: &str) -> Result<Matrix, GoldenError> {
        let value = self.input(name)?;
        self.matrix_of(name, value)
    }

    /// A list of matrices of one shape.
    pub fn matrices(&self, name: &str) -> Result<Vec<Matrix>, GoldenError> {
        let value = self.input(name)?;
        let list = value.as_array().ok_or_else(|| self.kind(name, "a list of matrices", value))?;
        let matrices: Vec<Matrix> = list.iter().map(|v| self.matrix_of(name, v)).collect::<Result<_, _>>()?;
        let shape = |m: &Matrix| (m.rows, m.cols);
        match matrices.windows(2).find(|w| shape(&w[0]) != shape(&w[1])) {
            None => Ok(matrices),
            Some(w) => Err(self.shape(name, &format!("{:?}", shape(&w[0])), &format!("{:?}", shape(&w[1])))),
        }
    }

    /// A matrix that must have the given shape.
    pub fn matrix_shaped(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix, GoldenError> {
        let m = self.matrix(name)?;
        if (m.rows, m.cols) == (rows, cols) {
            Ok(m)
        } else {
            Err(self.shape(name, &format!("{rows} x {cols}"), &format!("{} x {}", m.rows, m.cols)))
        }
    }

    /// A list that must have the given length.
    pub fn numbers_sized(&self, name: &str, len: usize) -> Result<Vec<f64>, GoldenError> {
        let list = self.numbers(name)?;
        if list.len() == len {
            Ok(list)
        } else {
            Err(self.shape(name, &format!("{len} numbers"), &format!("{} numbers", list.len())))
        }
    }

    /// A list of numbers from any value.
    pub fn numbers_of(&self, name: &str, value: &Value) -> Result<Vec<f64>, GoldenError> {
        let list = value.as_array().ok_or_else(|| self.kind(name, "a list of numbers", value))?;
        list.iter().map(|v| v.as_f64().ok_or_else(|| self.kind(name, "a number", v))).collect()
    }

    /// A matrix from any value.
    pub fn matrix_of(&self, name: &str, value: &Value) -> Result<Matrix, GoldenError> {
        let list = value.as_array().ok_or_else(|| self.kind(name, "a list of lists", value))?;
        let mut matrix = Matrix::new(0, 0, Vec::new());
        for row in list {
            let row = self.numbers_of(name, row)?;
            if matrix.rows > 0 && row.len() != matrix.cols {
                let expected = format!("rows of {}", matrix.cols);
                return Err(self.shape(name, &expected, &format!("a row of {}", row.len())));
            }
            matrix.cols = row.len();
            matrix.rows += 1;
            matrix.data.extend(row);
        }
        Ok(matrix)
    }

    /// Wraps a routing error with the case's id.
    pub fn routing<T>(&self, result: Result<T, RoutingError>) -> Result<T, GoldenError> {
        result.map_err(|source| GoldenError::Routing { case: self.id.to_string(), source })
    }

    /// A shape error.
    pub fn shape(&self, name: &str, expected: &str, found: &str) -> GoldenError {
        GoldenError::Kind {
            case: self.id.to_string(),
            field: format!("inputs.{name}"),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    fn count_of(&self, name: &str, value: &Value) -> Result<usize, GoldenError> {
        const LARGEST: u64 = 1 << 20;
        let whole =
            value.as_u64().or_else(|| value.as_f64().filter(|f| f.fract() == 0.0 && *f >= 0.0).map(|f| f as u64));
        let whole = whole.filter(|n| *n <= LARGEST);
        whole.map(|n| n as usize).ok_or_else(|| self.kind(name, "a whole number of at most 2^20", value))
    }

    fn missing(&self, field: &str) -> GoldenError {
        GoldenError::Missing { case: self.id.to_string(), field: field.to_string() }
    }

    fn kind(&self, name: &str, expected: &str, value: &Value) -> GoldenError {
        let mut shown = value.to_string();
        if shown.len() > 40 {
            shown = kind(value).to_string();
        }
        self.shape(name, expected, &shown)
    }
}
