//! What surrounds a command inside a log entry.
//!
//! | bytes | content |
//! |---|---|
//! | 1 | version, at present 3 |
//! | 1 | kind |
//! | 8 | the proposing leader's wall clock, milliseconds since the Unix epoch |
//! | 8 | the term that it was counting in |
//! | 8 | how long it had counted in that term, in milliseconds: see [`clock`](super::clock) |
//! | rest | by kind |
//!
//! | kind | rest |
//! |---|---|
//! | 0: command | the command |
//! | 1: command of a session | session (8), sequence (8), first unanswered sequence (8), the command |
//! | 2: open a session | its id (8), how long it may stay unused, in milliseconds (8), 0 for the default, and who opens it, in UTF-8 |
//! | 3: close a session | session (8) |
//! | 4: clock | nothing: it is there for its time |
//! | 5: quota | who sets it (1): 0 the leader, from the memory of the members; 1 an operator; 2 an operator, who leaves it to the leader again; bytes (8), 0 in the last case |
//!
//! Numbers are little-endian; commands are in bincode's standard configuration. Earlier versions are still read. Version 2
//! had no kind 4, no opener of a session, and one clock, *log time* (8), in place of the three numbers. Version 1 had no kind either: log
//! time (8), session (8) and sequence (8), both always 0, and the command.

use std::panic::catch_unwind;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};

use super::clock::{Reading, Stamp};
use crate::machine::StateMachine;
use crate::runtime::panic_message;
use crate::types::SessionSlot;

/// The version this build writes.
const VERSION: u8 = 3;
/// The version with one clock.
const LOG_TIME_VERSION: u8 = 2;
/// The oldest version this build reads.
const OLDEST_VERSION: u8 = 1;
/// Bytes before what depends on the kind.
const HEAD_BYTES: usize = 1 + 1 + 3 * 8;
/// Bytes before what depends on the kind in version 2.
const HEAD_BYTES_2: usize = 1 + 1 + 8;
/// Bytes of a session's slot.
const SLOT_BYTES: usize = 3 * 8;
/// Bytes before the command in version 1.
const HEAD_BYTES_1: usize = 1 + 8 + 8 + 8;

const COMMAND: u8 = 0;
const SESSION_COMMAND: u8 = 1;
const OPEN_SESSION: u8 = 2;
const CLOSE_SESSION: u8 = 3;
const CLOCK: u8 = 4;
const QUOTA: u8 = 5;

const QUOTA_OF_MEMORY: u8 = 0;
const QUOTA_OF_OPERATOR: u8 = 1;
const QUOTA_RELEASED: u8 = 2;

/// Most bytes of the name of who opens a session.
pub const MAX_OPENER_BYTES: usize = 64;

/// What an entry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content<C> {
    /// Apply a command, in its place in a session if it has one.
    Command(C, Option<SessionSlot>),
    /// Open a session.
    OpenSession {
        /// Its id, drawn at random by whoever proposed it.
        session: u64,
        /// How long it may stay unused, in milliseconds; 0 for the default.
        ttl_ms: u64,
        /// Who asks for it: the address of a client, at most [`MAX_OPENER_BYTES`]; empty when it is the program that the
        /// engine is embedded in, or not known.
        opener: String,
    },
    /// Close a session.
    CloseSession {
        /// Its id.
        session: u64,
    },
    /// Nothing but let time pass.
    Clock,
    /// Change the quota on the state.
    Quota(QuotaChange),
}

/// What becomes of the quota on the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuotaChange {
    /// The leader takes it from the memory of the members. No effect while an operator has set one.
    Follow(u64),
    /// An operator sets it.
    Set(u64),
    /// An operator leaves it to the leader from now on; it stays what it is until the leader changes it.
    Release,
}

/// An opened envelope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened<C> {
    /// When the leader proposed the entry.
    pub stamp: Stamp,
    /// What it asks for.
    pub content: Content<C>,
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
    /// A kind this build does not know.
    #[error("the entry is of kind {found}, which this build does not know: upgrade this node")]
    Kind {
        /// Its kind.
        found: u8,
    },
    /// A change of the quota that this build does not know.
    #[error(
        "the entry changes the quota in a way ({found}) that this build does not know: upgrade this node"
    )]
    Quota {
        /// How.
        found: u8,
    },
    /// The command's bytes are not one.
    #[error("the command cannot be decoded: {0}")]
    Command(#[from] bincode::error::DecodeError),
    /// Who opens a session is not a text, or too long a one.
    #[error("the opener of a session is not a text of at most {MAX_OPENER_BYTES} bytes")]
    Opener,
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

/// Counts what bincode would write.
struct Length(usize);

impl bincode::enc::write::Writer for &mut Length {
    fn write(&mut self, bytes: &[u8]) -> Result<(), bincode::error::EncodeError> {
        self.0 += bytes.len();
        Ok(())
    }
}

fn head(kind: u8, reading: Reading, room: usize) -> BytesMut {
    let Reading { wall_ms, term, counted_ms } = reading;
    let mut out = BytesMut::with_capacity(HEAD_BYTES + room);
    out.put_u8(VERSION);
    out.put_u8(kind);
    out.put_u64_le(wall_ms);
    out.put_u64_le(term);
    out.put_u64_le(counted_ms);
    out
}

/// Puts `command` into an envelope.
///
/// # Errors
/// Passes on what the command's `Serialize` implementation returns.
pub fn seal<C: Serialize>(
    reading: Reading,
    command: &C,
    slot: Option<SessionSlot>,
) -> Result<Bytes, bincode::error::EncodeError> {
    // Envelopes stay in memory as long as the log's tail does. One that grew on the way would take up to twice its bytes.
    let mut command_bytes = Length(0);
    bincode::serde::encode_into_writer(command, &mut command_bytes, bincode::config::standard())?;
    let (kind, slot_bytes) = if slot.is_some() { (SESSION_COMMAND, SLOT_BYTES) } else { (COMMAND, 0) };
    let mut out = head(kind, reading, slot_bytes + command_bytes.0);
    if let Some(slot) = slot {
        out.put_u64_le(slot.session);
        out.put_u64_le(slot.sequence);
        out.put_u64_le(slot.first_unanswered);
    }
    bincode::serde::encode_into_writer(command, Output(&mut out), bincode::config::standard())?;
    Ok(out.freeze())
}

/// Asks for a session for `opener`, of whose name no more than [`MAX_OPENER_BYTES`] are kept.
pub fn seal_open_session(reading: Reading, session: u64, ttl_ms: u64, opener: &str) -> Bytes {
    let opener = &opener[..opener.floor_char_boundary(MAX_OPENER_BYTES)];
    let mut out = head(OPEN_SESSION, reading, 16 + opener.len());
    out.put_u64_le(session);
    out.put_u64_le(ttl_ms);
    out.put_slice(opener.as_bytes());
    out.freeze()
}

/// Gives a session back.
pub fn seal_close_session(reading: Reading, session: u64) -> Bytes {
    let mut out = head(CLOSE_SESSION, reading, 8);
    out.put_u64_le(session);
    out.freeze()
}

/// Lets time pass, by itself.
pub fn seal_clock(reading: Reading) -> Bytes {
    head(CLOCK, reading, 0).freeze()
}

/// Changes the quota on the state.
pub fn seal_quota(reading: Reading, change: QuotaChange) -> Bytes {
    let (how, bytes) = match change {
        QuotaChange::Follow(bytes) => (QUOTA_OF_MEMORY, bytes),
        QuotaChange::Set(bytes) => (QUOTA_OF_OPERATOR, bytes),
        QuotaChange::Release => (QUOTA_RELEASED, 0),
    };
    let mut out = head(QUOTA, reading, 1 + 8);
    out.put_u8(how);
    out.put_u64_le(bytes);
    out.freeze()
}

/// Opens an envelope.
///
/// # Errors
/// See [`EnvelopeError`]. A committed entry that cannot be opened stops the node.
pub fn open<C: DeserializeOwned>(mut bytes: &[u8]) -> Result<Opened<C>, EnvelopeError> {
    let whole = bytes.len();
    let need = |bytes: &[u8], count: usize| match bytes.len() >= count {
        true => Ok(()),
        false => Err(EnvelopeError::Truncated { bytes: whole }),
    };
    need(bytes, 1)?;
    let version = bytes.get_u8();
    match version {
        OLDEST_VERSION => {
            need(bytes, HEAD_BYTES_1 - 1)?;
            let stamp = Stamp::LogTime(bytes.get_u64_le());
            bytes.advance(16);
            return Ok(Opened { stamp, content: Content::Command(decode(bytes)?, None) });
        }
        LOG_TIME_VERSION => need(bytes, HEAD_BYTES_2 - 1)?,
        VERSION => need(bytes, HEAD_BYTES - 1)?,
        found => return Err(EnvelopeError::Version { found }),
    }
    let kind = bytes.get_u8();
    let stamp = match version {
        LOG_TIME_VERSION => Stamp::LogTime(bytes.get_u64_le()),
        _ => {
            let (wall_ms, term, counted_ms) = (bytes.get_u64_le(), bytes.get_u64_le(), bytes.get_u64_le());
            Stamp::Reading(Reading { wall_ms, term, counted_ms })
        }
    };
    let content = match kind {
        COMMAND => Content::Command(decode(bytes)?, None),
        SESSION_COMMAND => {
            need(bytes, SLOT_BYTES)?;
            let (session, sequence, first_unanswered) =
                (bytes.get_u64_le(), bytes.get_u64_le(), bytes.get_u64_le());
            let slot = SessionSlot { session, sequence, first_unanswered };
            Content::Command(decode(bytes)?, Some(slot))
        }
        OPEN_SESSION => {
            need(bytes, 16)?;
            let session = bytes.get_u64_le();
            let (ttl_ms, opener) = match version {
                LOG_TIME_VERSION => (end(&mut bytes)?, ""),
                _ => (bytes.get_u64_le(), opener(bytes)?),
            };
            Content::OpenSession { session, ttl_ms, opener: opener.to_owned() }
        }
        CLOSE_SESSION => {
            need(bytes, 8)?;
            Content::CloseSession { session: end(&mut bytes)? }
        }
        CLOCK if version > LOG_TIME_VERSION => match bytes.len() {
            0 => Content::Clock,
            bytes => return Err(EnvelopeError::Trailing { bytes }),
        },
        QUOTA if version > LOG_TIME_VERSION => {
            need(bytes, 1 + 8)?;
            let (how, amount) = (bytes.get_u8(), end(&mut bytes)?);
            Content::Quota(match how {
                QUOTA_OF_MEMORY => QuotaChange::Follow(amount),
                QUOTA_OF_OPERATOR => QuotaChange::Set(amount),
                QUOTA_RELEASED => QuotaChange::Release,
                found => return Err(EnvelopeError::Quota { found }),
            })
        }
        found => return Err(EnvelopeError::Kind { found }),
    };
    Ok(Opened { stamp, content })
}

fn opener(bytes: &[u8]) -> Result<&str, EnvelopeError> {
    match std::str::from_utf8(bytes) {
        Ok(opener) if opener.len() <= MAX_OPENER_BYTES => Ok(opener),
        _ => Err(EnvelopeError::Opener),
    }
}

/// As [`open`], for bytes of which it is not known whether they can be opened: a command's `Deserialize` implementation
/// may panic as well.
///
/// # Errors
/// What is wrong, in words.
pub fn try_open<C: DeserializeOwned>(bytes: &[u8]) -> Result<Opened<C>, String> {
    catch_unwind(|| open(bytes))
        .map_err(|panic| format!("decoding it panicked: {}", panic_message(&*panic)))?
        .map_err(|error| error.to_string())
}

/// Whether `bytes` can be opened and hold a command of machine `M`, or something else that an entry may ask for. Returns when
/// the leader proposed it.
///
/// # Errors
/// What is wrong, in words.
pub fn check<M: StateMachine>(bytes: &[u8]) -> Result<Stamp, String> {
    match plain_command(bytes) {
        Some((stamp, command)) if M::is_command(command) => Ok(stamp),
        _ => try_open::<M::Command>(bytes).map(|opened| opened.stamp),
    }
}

/// The stamp and the command in an envelope of this build's version, if it holds one.
fn plain_command(bytes: &[u8]) -> Option<(Stamp, &[u8])> {
    let (mut head, rest) = bytes.split_at_checked(HEAD_BYTES)?;
    let command = match (head.get_u8(), head.get_u8()) {
        (VERSION, COMMAND) => rest,
        (VERSION, SESSION_COMMAND) => rest.get(SLOT_BYTES..)?,
        _ => return None,
    };
    let reading =
        Reading { wall_ms: head.get_u64_le(), term: head.get_u64_le(), counted_ms: head.get_u64_le() };
    Some((Stamp::Reading(reading), command))
}

/// As [`decode`], for bytes of which it is not known whether they can be decoded.
///
/// # Errors
/// What is wrong, in words.
pub fn try_decode<R: DeserializeOwned>(bytes: &[u8]) -> Result<R, String> {
    catch_unwind(|| decode(bytes))
        .map_err(|panic| format!("decoding it panicked: {}", panic_message(&*panic)))?
        .map_err(|error| error.to_string())
}

/// The last number of an envelope.
fn end(bytes: &mut &[u8]) -> Result<u64, EnvelopeError> {
    let number = bytes.get_u64_le();
    match bytes.len() {
        0 => Ok(number),
        bytes => Err(EnvelopeError::Trailing { bytes }),
    }
}

/// Encodes a reply the way it travels from apply to its caller, and into the table of sessions.
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

    type Command = (String, Vec<u8>);

    const READING: Reading = Reading { wall_ms: 7, term: 3, counted_ms: 90 };

    #[test]
    fn what_is_sealed_can_be_opened() {
        let command: Command = ("put".to_owned(), vec![1, 2, 3]);
        let expect = |sealed: &[u8], content| {
            let opened = open::<Command>(sealed).unwrap();
            assert_eq!(opened, Opened { stamp: Stamp::Reading(READING), content });
        };
        for slot in [None, Some(SessionSlot { session: 8, sequence: 9, first_unanswered: 4 })] {
            let sealed = seal(READING, &command, slot).unwrap();
            expect(&sealed, Content::Command(command.clone(), slot));
        }
        for opener in ["", "192.0.2.1:50000"] {
            let content = Content::OpenSession { session: 8, ttl_ms: 60, opener: opener.to_owned() };
            expect(&seal_open_session(READING, 8, 60, opener), content);
        }
        let long = "\u{e4}".repeat(MAX_OPENER_BYTES);
        let content = Content::OpenSession { session: 8, ttl_ms: 0, opener: "\u{e4}".repeat(32) };
        expect(&seal_open_session(READING, 8, 0, &long), content);
        expect(&seal_close_session(READING, 60), Content::CloseSession { session: 60 });
        expect(&seal_clock(READING), Content::Clock);
        for change in [QuotaChange::Follow(5), QuotaChange::Set(6), QuotaChange::Release] {
            expect(&seal_quota(READING, change), Content::Quota(change));
        }
    }

    /// Logs in use hold these bytes.
    #[test]
    fn the_bytes_are_as_documented() {
        let slot = SessionSlot { session: 2, sequence: 3, first_unanswered: 4 };
        let numbers = |numbers: &[u64]| -> Vec<u8> { numbers.iter().flat_map(|n| n.to_le_bytes()).collect() };
        let expect = |kind: u8, rest: &[u64], command: &[u8]| {
            [&[3, kind][..], &numbers(&[7, 3, 90]), &numbers(rest), command].concat()
        };
        assert_eq!(seal(READING, &9_u8, None).unwrap(), expect(0, &[], &[9]));
        assert_eq!(seal(READING, &9_u8, Some(slot)).unwrap(), expect(1, &[2, 3, 4], &[9]));
        assert_eq!(seal_open_session(READING, 4, 5, "a:1"), expect(2, &[4, 5], b"a:1"));
        assert_eq!(seal_close_session(READING, 5), expect(3, &[5], &[]));
        assert_eq!(seal_clock(READING), expect(4, &[], &[]));
        let quota = |how: u8, bytes: u64| expect(5, &[], &[&[how], &numbers(&[bytes])[..]].concat());
        assert_eq!(seal_quota(READING, QuotaChange::Follow(9)), quota(0, 9));
        assert_eq!(seal_quota(READING, QuotaChange::Set(9)), quota(1, 9));
        assert_eq!(seal_quota(READING, QuotaChange::Release), quota(2, 0));
        assert!(matches!(open::<u8>(&quota(3, 9)), Err(EnvelopeError::Quota { found: 3 })));

        // Of earlier versions.
        let earlier = |bytes: &[u8], content| {
            let opened = open::<u8>(bytes).unwrap();
            assert_eq!(opened, Opened { stamp: Stamp::LogTime(1), content });
        };
        let version_2 = |kind: u8, rest: &[u64], command: &[u8]| {
            [&[2, kind][..], &numbers(&[1]), &numbers(rest), command].concat()
        };
        earlier(&version_2(0, &[], &[9]), Content::Command(9, None));
        earlier(&version_2(1, &[2, 3, 4], &[9]), Content::Command(9, Some(slot)));
        let opened = Content::OpenSession { session: 4, ttl_ms: 5, opener: String::new() };
        earlier(&version_2(2, &[4, 5], &[]), opened);
        earlier(&version_2(3, &[5], &[]), Content::CloseSession { session: 5 });
        assert!(matches!(open::<u8>(&version_2(4, &[], &[])), Err(EnvelopeError::Kind { found: 4 })));
        let version_1 = [&[1][..], &numbers(&[1, 0, 0]), &[9]].concat();
        earlier(&version_1, Content::Command(9, None));
    }

    #[test]
    fn damage_is_told_apart() {
        let slot = SessionSlot { session: 2, sequence: 3, first_unanswered: 4 };
        let bytes = seal(READING, &1234u64, Some(slot)).unwrap();
        assert!(matches!(open::<u64>(&[]), Err(EnvelopeError::Truncated { bytes: 0 })));
        assert!(matches!(open::<u64>(&bytes[..25]), Err(EnvelopeError::Truncated { bytes: 25 })));
        assert!(matches!(open::<u64>(&bytes[..49]), Err(EnvelopeError::Truncated { bytes: 49 })));
        assert!(matches!(open::<u64>(&bytes[..50]), Err(EnvelopeError::Command(_))));
        assert!(matches!(open::<u64>(&[1; 24]), Err(EnvelopeError::Truncated { bytes: 24 })));
        assert!(matches!(open::<u64>(&[2; 9]), Err(EnvelopeError::Truncated { bytes: 9 })));
        let changed = |at: usize, byte: u8| {
            let mut changed = bytes.to_vec();
            changed[at] = byte;
            open::<u64>(&changed)
        };
        assert!(matches!(changed(0, 4), Err(EnvelopeError::Version { found: 4 })));
        assert!(matches!(changed(1, 99), Err(EnvelopeError::Kind { found: 99 })));
        let opened =
            |opener: &[u8]| open::<u64>(&[&seal_open_session(READING, 1, 0, "")[..], opener].concat());
        assert!(matches!(opened(&[0xff]), Err(EnvelopeError::Opener)));
        assert!(matches!(opened(&[b'a'; MAX_OPENER_BYTES + 1]), Err(EnvelopeError::Opener)));
        for sealed in [
            bytes,
            seal_close_session(READING, 1),
            seal_clock(READING),
            seal_quota(READING, QuotaChange::Release),
        ] {
            let longer = [&sealed[..], &[0]].concat();
            assert!(matches!(open::<u64>(&longer), Err(EnvelopeError::Trailing { bytes: 1 })));
        }
    }
}
