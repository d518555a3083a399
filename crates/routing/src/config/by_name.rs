//! Enums whose variants have numbers: a name alone means the published ones, a table of one entry gives them.

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// An enum that a file may name without its numbers.
pub(super) trait Named: Sized {
    /// Every name, for the error about one that is none of them.
    const NAMES: &'static [&'static str];

    /// The variant of that name with its published numbers.
    fn named(name: &str) -> Option<Self>;

    /// The variant of a table `{ name = { number = ... } }`.
    fn from_table<'de, D: Deserializer<'de>>(table: D) -> Result<Self, D::Error>;

    /// Why `name` is none of [`Self::NAMES`].
    fn unknown<E: Error>(name: &str) -> E {
        E::unknown_variant(name, Self::NAMES)
    }
}

/// Reads a name, or a table of one entry.
pub(super) fn name_or_table<'de, T: Named, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    deserializer.deserialize_any(NameOrTable(PhantomData))
}

struct NameOrTable<T>(PhantomData<T>);

impl<'de, T: Named> Visitor<'de> for NameOrTable<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "one of {}, or a table of one of them with its numbers", T::NAMES.join(", "))
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<T, E> {
        T::named(name).ok_or_else(|| T::unknown(name))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        match map.size_hint() {
            Some(entries) if entries != 1 => {
                Err(A::Error::custom(format!("expected a table of one name with its numbers, found {entries} entries")))
            }
            _ => T::from_table(MapAccessDeserializer::new(map)),
        }
    }
}
