//! What surrounds a command inside a log entry.
//!
//! | bytes | content |
//! |---|---|
//! | 1 | version, at present 1 |
//! | 8 | log time: the proposing leader's clock, milliseconds since the Unix epoch, little-endian |
//! | 8 | session, 0 for none |
//! | 8 | sequence within the session, 0 for none |
//! | rest | the command, in bincode's standard configuration |

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};

/// The version this build writes.
const VERSION: u8 = 1;
/// Bytes before the command.
const HEADER_BYTES: usize = 1 + 8 + 8 + 8;

/// A command's envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// The leader's clock when it proposed the command, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// The client session the command belongs to, 0 for none.
    pub session: u64,
    /// The command's number within its session, 0 for none.
    pub sequence: u64,
}

/// Why an envelope could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnvelopeError {
    /// Fewer bytes than the header takes.
    #[error("the entry is shorter than its header: {bytes} bytes")]
    Truncated {
        /// How many there were.
        bytes: usize,
    },
    /// A version this build does not know.
    #[error("the entry has envelope version {found}; this build reads up to {VERSION}: upgrade this node")]
    Version {
        /// Its version.
        found: u8,
    },
    /// The command's bytes are not one.
    #[error("the command cannot be decoded: {0}")]
    Command(#[from] bincode::error::DecodeError),
    /// The command was followed by bytes that do not belong to it.
    #[error("{bytes} bytes follow the command")]
    Trailing {
        /// How many.
        bytes: usize,
    },
}

/// Lets bincode write behind the header without a second buffer.
struct Output<'a>(&'a mut BytesMut);

impl bincode::enc::write::Writer for Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), bincode::error::EncodeError> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

/// Puts `command` into an envelope.
///
/// # Errors
/// Passes on what the command's `Serialize` implementation returns.
pub fn seal<C: Serialize>(header: Header, command: &C) -> Result<Bytes, bincode::error::EncodeError> {
    let mut out = BytesMut::with_capacity(HEADER_BYTES + 128);
    out.put_u8(VERSION);
    out.put_u64_le(header.time_ms);
    out.put_u64_le(header.session);
    out.put_u64_le(header.sequence);
    bincode::serde::encode_into_writer(command, Output(&mut out), bincode::config::standard())?;
    Ok(out.freeze())
}

/// Takes a command out of its envelope.
///
/// # Errors
/// See [`EnvelopeError`]. A committed entry that cannot be opened stops the node.
pub fn open<C: DeserializeOwned>(mut bytes: &[u8]) -> Result<(Header, C), EnvelopeError> {
    match bytes.first() {
        None => return Err(EnvelopeError::Truncated { bytes: 0 }),
        Some(&VERSION) => {}
        Some(&found) => return Err(EnvelopeError::Version { found }),
    }
    if bytes.len() < HEADER_BYTES {
        return Err(EnvelopeError::Truncated { bytes: bytes.len() });
    }
    bytes.advance(1);
    let header =
        Header { time_ms: bytes.get_u64_le(), session: bytes.get_u64_le(), sequence: bytes.get_u64_le() };
    Ok((header, decode(bytes)?))
}

/// Encodes a reply the way it travels from apply to its caller, and later into the session table.
///
/// # Errors
/// Passes on what the reply's `Serialize` implementation returns.
pub fn encode<R: Serialize>(reply: &R) -> Result<Bytes, bincode::error::EncodeError> {
    bincode::serde::encode_to_vec(reply, bincode::config::standard()).map(Bytes::from)
}

/// Decodes what [`encode`] wrote, all of it.
///
/// # Errors
/// See [`EnvelopeError`].
pub fn decode<R: DeserializeOwned>(bytes: &[u8]) -> Result<R, EnvelopeError> {
    let (value, read) = bincode::serde::decode_from_slice(bytes, bincode::config::standard())?;
    match bytes.len() - read {
        0 => Ok(value),
        bytes => Err(EnvelopeError::Trailing { bytes }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_can_be_opened() {
        let header = Header { time_ms: 7, session: 8, sequence: 9 };
        let bytes = seal(header, &("put", vec![1u8, 2, 3])).unwrap();
        let (opened, command): (Header, (String, Vec<u8>)) = open(&bytes).unwrap();
        assert_eq!(opened, header);
        assert_eq!(command, ("put".to_owned(), vec![1, 2, 3]));
    }

    #[test]
    fn damage_is_told_apart() {
        let bytes = seal(Header::default(), &1234u64).unwrap();
        assert!(matches!(open::<u64>(&[]), Err(EnvelopeError::Truncated { bytes: 0 })));
        assert!(matches!(open::<u64>(&bytes[..10]), Err(EnvelopeError::Truncated { bytes: 10 })));
        assert!(matches!(open::<u64>(&bytes[..HEADER_BYTES]), Err(EnvelopeError::Command(_))));
        let mut newer = bytes.to_vec();
        newer[0] = 2;
        assert!(matches!(open::<u64>(&newer), Err(EnvelopeError::Version { found: 2 })));
        let mut longer = bytes.to_vec();
        longer.push(0);
        assert!(matches!(open::<u64>(&longer), Err(EnvelopeError::Trailing { bytes: 1 })));
    }
}
