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

/// What is decoded may claim so many times the bytes that there are, because a number counts as what it takes in memory. Room for strings
/// and bytes is made before their lengths are compared with what there is, and a length that is not theirs would end the
/// process. The library takes the limit as a constant, so there are a few of them.
const CLAIM: usize = 16;
/// As many bytes as most messages have at most.
const SMALL_BYTES: usize = 64 * 1024;
/// As many as nearly all have.
const MEDIUM_BYTES: usize = 2 * 1024 * 1024;
/// More than a command has.
const LARGE_BYTES: usize = 32 * 1024 * 1024;

/// Decodes what [`encode`] wrote, all of it.
///
/// # Errors
/// When `encoded` is no `T`, or more than one, or claims more than 512 MiB.
pub fn decode<T: DeserializeOwned>(encoded: &[u8]) -> Result<T, DecodeError> {
    match decode_first(encoded)? {
        (value, []) => Ok(value),
        (_, rest) => Err(DecodeError(format!("{} bytes follow it", rest.len()))),
    }
}

/// Decodes what [`encode`] wrote, and gives back what follows it.
///
/// # Errors
/// When `encoded` does not begin with a `T`, or claims more than 512 MiB.
pub(super) fn decode_first<T: DeserializeOwned>(encoded: &[u8]) -> Result<(T, &[u8]), DecodeError> {
    let bytes = encoded.len();
    if bytes <= SMALL_BYTES {
        decode_within::<T, { CLAIM * SMALL_BYTES }>(encoded)
    } else if bytes <= MEDIUM_BYTES {
        decode_within::<T, { CLAIM * MEDIUM_BYTES }>(encoded)
    } else {
        decode_within::<T, { CLAIM * LARGE_BYTES }>(encoded)
    }
}

fn decode_within<T: DeserializeOwned, const BYTES: usize>(encoded: &[u8]) -> Result<(T, &[u8]), DecodeError> {
    let config = bincode::config::standard().with_limit::<BYTES>();
    let decoded = bincode::serde::decode_from_slice(encoded, config);
    let (value, read) = decoded.map_err(DecodeError::new)?;
    Ok((value, &encoded[read..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        let mut encoded = vec![253];
        encoded.extend_from_slice(&(1_u64 << 62).to_le_bytes());
        encoded.push(b'x');
        assert!(decode::<String>(&encoded).is_err());
        assert!(decode::<Vec<u8>>(&encoded).is_err());
        assert!(decode::<bytes::Bytes>(&encoded).is_err());
        let long = "x".repeat(32 * 1024 * 1024);
        assert_eq!(decode(&encode(&long).unwrap()), Ok(long));
        // A small message has no large room made for it, and what takes most in memory for its size is no more than that.
        encoded[1..9].copy_from_slice(&(2_u64 << 20).to_le_bytes());
        assert_eq!(decode::<String>(&encoded), Err(DecodeError("LimitExceeded".to_owned())));
        for count in [SMALL_BYTES - 3, MEDIUM_BYTES - 5, 4 * 1024 * 1024] {
            let numbers = vec![7_u128; count];
            assert_eq!(decode(&encode(&numbers).unwrap()), Ok(numbers));
        }
    }
}
