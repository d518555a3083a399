//! JSON with the numbers that JSON has no words for.
//!
//! A perplexity can be infinite. JSON cannot say so, and serde_json writes `null`, which reads back as nothing. Here such numbers are the
//! strings `"Infinity"`, `"-Infinity"` and `"NaN"`, as in the JSON form of protocol buffers; Python's `float()` and JavaScript's
//! `Number()` understand them. Every document of the command and every line of `metrics.jsonl` is written by [`to_string`]; fields
//! that are read back name [`real`].

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::ser::{
    SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant, SerializeTuple, SerializeTupleStruct,
    SerializeTupleVariant,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

const INFINITY: &str = "Infinity";
const MINUS_INFINITY: &str = "-Infinity";
const NAN: &str = "NaN";

/// One JSON document in one line.
///
/// ```
/// let words = mixtura_train::json::to_string(&[1.5, f64::INFINITY, f64::NAN]).unwrap();
/// assert_eq!(words, r#"[1.5,"Infinity","NaN"]"#);
/// ```
pub fn to_string(value: &(impl Serialize + ?Sized)) -> serde_json::Result<String> {
    serde_json::to_string(&Real(value))
}

/// Reads a number that [`to_string`] wrote; `null` was once written for all three that are not finite and reads as NaN.
pub fn real<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    deserializer.deserialize_any(RealVisitor)
}

/// Reads a map of such numbers.
pub fn reals<'de, D, M>(deserializer: D) -> Result<M, D::Error>
where
    D: Deserializer<'de>,
    M: FromIterator<(String, f64)>,
{
    struct Entries<M>(std::marker::PhantomData<M>);
    impl<'de, M: FromIterator<(String, f64)>> Visitor<'de> for Entries<M> {
        type Value = M;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("an object of numbers")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<M, A::Error> {
            std::iter::from_fn(|| map.next_entry::<String, Number>().transpose())
                .map(|entry| entry.map(|(name, number)| (name, number.0)))
                .collect()
        }
    }
    deserializer.deserialize_map(Entries(std::marker::PhantomData))
}

#[derive(Deserialize)]
struct Number(#[serde(deserialize_with = "real")] f64);

struct RealVisitor;

impl Visitor<'_> for RealVisitor {
    type Value = f64;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "a number, \"{INFINITY}\", \"{MINUS_INFINITY}\" or \"{NAN}\"")
    }

    fn visit_f64<E>(self, value: f64) -> Result<f64, E> {
        Ok(value)
    }

    fn visit_i64<E>(self, value: i64) -> Result<f64, E> {
        Ok(value as f64)
    }

    fn visit_u64<E>(self, value: u64) -> Result<f64, E> {
        Ok(value as f64)
    }

    fn visit_unit<E>(self) -> Result<f64, E> {
        Ok(f64::NAN)
    }

    fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<f64, E> {
        match word {
            INFINITY => Ok(f64::INFINITY),
            MINUS_INFINITY => Ok(f64::NEG_INFINITY),
            NAN => Ok(f64::NAN),
            _ => Err(E::invalid_value(serde::de::Unexpected::Str(word), &self)),
        }
    }
}

/// A value whose floats, however deep, are written as above. Everything else is handed on as it is.
struct Real<'a, T: ?Sized>(&'a T);

impl<T: Serialize + ?Sized> Serialize for Real<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(Words(serializer))
    }
}

/// A serializer that has words for every float.
struct Words<S>(S);

macro_rules! hand_on {
    ($($method:ident($($value:ident: $type:ty),*) -> $result:ty;)*) => {
        $(fn $method(self, $($value: $type),*) -> Result<$result, S::Error> {
            self.0.$method($($value),*)
        })*
    };
}

macro_rules! hand_on_wrapped {
    ($($method:ident($($value:ident: $type:ty),*) -> $result:ident;)*) => {
        $(fn $method(self, $($value: $type),*) -> Result<Self::$result, S::Error> {
            self.0.$method($($value),*).map(Words)
        })*
    };
}

impl<S: Serializer> Serializer for Words<S> {
    type Ok = S::Ok;
    type Error = S::Error;
    type SerializeSeq = Words<S::SerializeSeq>;
    type SerializeTuple = Words<S::SerializeTuple>;
    type SerializeTupleStruct = Words<S::SerializeTupleStruct>;
    type SerializeTupleVariant = Words<S::SerializeTupleVariant>;
    type SerializeMap = Words<S::SerializeMap>;
    type SerializeStruct = Words<S::SerializeStruct>;
    type SerializeStructVariant = Words<S::SerializeStructVariant>;

    fn serialize_f64(self, value: f64) -> Result<S::Ok, S::Error> {
        match value {
            finite if finite.is_finite() => self.0.serialize_f64(finite),
            f64::INFINITY => self.0.serialize_str(INFINITY),
            f64::NEG_INFINITY => self.0.serialize_str(MINUS_INFINITY),
            _ => self.0.serialize_str(NAN),
        }
    }

    fn serialize_f32(self, value: f32) -> Result<S::Ok, S::Error> {
        if value.is_finite() { self.0.serialize_f32(value) } else { self.serialize_f64(value.into()) }
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<S::Ok, S::Error> {
        self.0.serialize_some(&Real(value))
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, name: &'static str, value: &T) -> Result<S::Ok, S::Error> {
        self.0.serialize_newtype_struct(name, &Real(value))
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        index: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<S::Ok, S::Error> {
        self.0.serialize_newtype_variant(name, index, variant, &Real(value))
    }

    hand_on! {
        serialize_bool(value: bool) -> S::Ok;
        serialize_i8(value: i8) -> S::Ok;
        serialize_i16(value: i16) -> S::Ok;
        serialize_i32(value: i32) -> S::Ok;
        serialize_i64(value: i64) -> S::Ok;
        serialize_i128(value: i128) -> S::Ok;
        serialize_u8(value: u8) -> S::Ok;
        serialize_u16(value: u16) -> S::Ok;
        serialize_u32(value: u32) -> S::Ok;
        serialize_u64(value: u64) -> S::Ok;
        serialize_u128(value: u128) -> S::Ok;
        serialize_char(value: char) -> S::Ok;
        serialize_str(value: &str) -> S::Ok;
        serialize_bytes(value: &[u8]) -> S::Ok;
        serialize_none() -> S::Ok;
        serialize_unit() -> S::Ok;
        serialize_unit_struct(name: &'static str) -> S::Ok;
        serialize_unit_variant(name: &'static str, index: u32, variant: &'static str) -> S::Ok;
    }

    hand_on_wrapped! {
        serialize_seq(len: Option<usize>) -> SerializeSeq;
        serialize_tuple(len: usize) -> SerializeTuple;
        serialize_tuple_struct(name: &'static str, len: usize) -> SerializeTupleStruct;
        serialize_tuple_variant(name: &'static str, index: u32, variant: &'static str, len: usize) -> SerializeTupleVariant;
        serialize_map(len: Option<usize>) -> SerializeMap;
        serialize_struct(name: &'static str, len: usize) -> SerializeStruct;
        serialize_struct_variant(name: &'static str, index: u32, variant: &'static str, len: usize) -> SerializeStructVariant;
    }
}

macro_rules! elements {
    ($($part:ident, $method:ident;)*) => {
        $(impl<S: $part> $part for Words<S> {
            type Ok = S::Ok;
            type Error = S::Error;

            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), S::Error> {
                self.0.$method(&Real(value))
            }

            fn end(self) -> Result<S::Ok, S::Error> {
                self.0.end()
            }
        })*
    };
}

macro_rules! fields {
    ($($part:ident;)*) => {
        $(impl<S: $part> $part for Words<S> {
            type Ok = S::Ok;
            type Error = S::Error;

            fn serialize_field<T: Serialize + ?Sized>(&mut self, key: &'static str, value: &T) -> Result<(), S::Error> {
                self.0.serialize_field(key, &Real(value))
            }

            fn end(self) -> Result<S::Ok, S::Error> {
                self.0.end()
            }
        })*
    };
}

elements! {
    SerializeSeq, serialize_element;
    SerializeTuple, serialize_element;
    SerializeTupleStruct, serialize_field;
    SerializeTupleVariant, serialize_field;
}

fields! {
    SerializeStruct;
    SerializeStructVariant;
}

impl<S: SerializeMap> SerializeMap for Words<S> {
    type Ok = S::Ok;
    type Error = S::Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), S::Error> {
        self.0.serialize_key(key)
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), S::Error> {
        self.0.serialize_value(&Real(value))
    }

    fn end(self) -> Result<S::Ok, S::Error> {
        self.0.end()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Serialize)]
    enum Kind {
        Plain,
        One(f32),
        Two(f64, u8),
        Named { x: f64 },
    }

    #[derive(Serialize)]
    struct Inner {
        f: f64,
        map: BTreeMap<String, f64>,
    }

    #[derive(Serialize)]
    struct Outer {
        list: Vec<Vec<f32>>,
        pair: (f64, bool),
        kinds: Vec<Kind>,
        some: Option<f64>,
        none: Option<f64>,
        text: &'static str,
        #[serde(flatten)]
        inner: Inner,
    }

    #[test]
    fn a_float_that_is_not_finite_is_a_word_wherever_it_stands_and_all_else_is_as_ever() {
        let value = |odd: f64| Outer {
            list: vec![vec![0.1, odd as f32], vec![]],
            pair: (odd, true),
            kinds: vec![Kind::Plain, Kind::One(odd as f32), Kind::Two(odd, 3), Kind::Named { x: odd }],
            some: Some(odd),
            none: None,
            text: "a \"b\"\n",
            inner: Inner { f: odd, map: [("z".to_string(), odd)].into() },
        };
        assert_eq!(to_string(&value(0.1)).unwrap(), serde_json::to_string(&value(0.1)).unwrap());
        for (odd, word) in [(f64::INFINITY, "Infinity"), (f64::NEG_INFINITY, "-Infinity"), (f64::NAN, "NaN")] {
            let found = to_string(&value(odd)).unwrap();
            let quoted = format!("\"{word}\"");
            assert_eq!(found.matches(&quoted).count(), 8, "{found}");
            assert_eq!(found.matches("null").count(), 1, "{found}");
            serde_json::from_str::<serde_json::Value>(&found).unwrap();
        }
    }

    #[test]
    fn every_float_is_read_back() {
        let values = [0.1, -3.0, 7.0, 1e300, f64::INFINITY, f64::NEG_INFINITY];
        for value in values {
            let Number(found) = serde_json::from_str(&to_string(&value).unwrap()).unwrap();
            assert_eq!(found, value);
        }
        for nan in ["\"NaN\"", "null"] {
            let Number(found) = serde_json::from_str(nan).unwrap();
            assert!(found.is_nan());
        }
        assert!(serde_json::from_str::<Number>("\"inf\"").is_err());
    }
}
