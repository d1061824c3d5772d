//! The size of the reserve as it is written: a number of bytes, or `auto`.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer, Visitor};

/// How much disk space to set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReserveBytes {
    /// What fits the file system.
    Auto,
    /// So much; 0 for none.
    Given(u64),
}

impl ReserveBytes {
    /// The bytes that were given; `None` for what fits.
    pub(super) fn given(self) -> Option<u64> {
        match self {
            Self::Auto => None,
            Self::Given(bytes) => Some(bytes),
        }
    }
}

/// The one word that stands for no number.
const AUTO: &str = "auto";
const EXPECTED: &str = "a number of bytes, 0 for none, or auto";

impl FromStr for ReserveBytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            AUTO => Ok(Self::Auto),
            _ => text.parse().map(Self::Given).map_err(|_| format!("write {EXPECTED}")),
        }
    }
}

impl<'de> Deserialize<'de> for ReserveBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ReserveVisitor)
    }
}

struct ReserveVisitor;

impl Visitor<'_> for ReserveVisitor {
    type Value = ReserveBytes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<ReserveBytes, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ReserveBytes, E> {
        Ok(ReserveBytes::Given(bytes))
    }

    fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<ReserveBytes, E> {
        u64::try_from(bytes).map(ReserveBytes::Given).map_err(|_| E::custom(format!("write {EXPECTED}")))
    }
}
