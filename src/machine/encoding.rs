//! Commands and replies as bytes, for the log, the wire, and machines that read what earlier versions of theirs wrote.

use std::fmt;

use serde::{Serialize, de::DeserializeOwned};

/// Bytes are not what they should be, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodeError(String);

impl DecodeError {
    /// What is wrong.
    pub fn new(reason: impl fmt::Display) -> Self {
        Self(reason.to_string())
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for DecodeError {}

/// Encodes a command as the log holds it, or a reply as its session keeps it: fields in their order, without their names, and the
/// position of a variant in its enumeration.
///
/// # Errors
/// What the value's `Serialize` implementation says.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, DecodeError> {
    bincode::serde::encode_to_vec(value, bincode::config::standard()).map_err(DecodeError::new)
}

/// Decodes what [`encode`] wrote, all of it.
///
/// # Errors
/// When `encoded` is no `T`, or more than one.
pub fn decode<T: DeserializeOwned>(encoded: &[u8]) -> Result<T, DecodeError> {
    let decoded = bincode::serde::decode_from_slice(encoded, bincode::config::standard());
    let (value, read) = decoded.map_err(DecodeError::new)?;
    match encoded.len() - read {
        0 => Ok(value),
        bytes => Err(DecodeError(format!("{bytes} bytes follow it"))),
    }
}
