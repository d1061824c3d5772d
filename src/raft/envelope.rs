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
//! | 6: command with a version | machine (2), version (4), the command |
//! | 7: command with a version, of a session | session (8), sequence (8), first unanswered sequence (8), machine (2), version (4), the command |
//! | 8: agreement on a version | machine (2), version (4): from here on commands up to that version of that machine may follow |
//!
//! Kinds 0 and 1 hold commands of machine 0 in its version 0, and are the only ones that hold those: builds that know nothing of
//! machines and versions read them.
//!
//! Numbers are little-endian; commands are in bincode's standard configuration. Earlier versions are still read. Version 2
//! had no kind 4, no opener of a session, and one clock, *log time* (8), in place of the three numbers. Version 1 had no kind either: log
//! time (8), session (8) and sequence (8), both always 0, and the command.

use std::panic::catch_unwind;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::Serialize;

use super::clock::{Reading, Stamp};
use crate::machine::{DecodeError, StateMachine};
use crate::runtime::panic_message;
use crate::types::{MachineVersion, SessionSlot, UnsupportedVersion, check_agreed, check_version};

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
/// Bytes of a machine's number and version.
const WROTE_BYTES: usize = 2 + 4;
/// Bytes before the command in version 1.
const HEAD_BYTES_1: usize = 1 + 8 + 8 + 8;

const COMMAND: u8 = 0;
const SESSION_COMMAND: u8 = 1;
const OPEN_SESSION: u8 = 2;
const CLOSE_SESSION: u8 = 3;
const CLOCK: u8 = 4;
const QUOTA: u8 = 5;
const VERSIONED_COMMAND: u8 = 6;
const VERSIONED_SESSION_COMMAND: u8 = 7;
const AGREEMENT: u8 = 8;

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
    /// All members read this version of this machine: commands up to it may follow.
    Agreement(MachineVersion),
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
pub struct OpenedEnvelope<C> {
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
    Command(#[from] DecodeError),
    /// A machine, or a version of it, that this build does not read.
    #[error(transparent)]
    Machine(#[from] UnsupportedVersion),
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
pub fn seal<M: StateMachine>(
    reading: Reading,
    command: &M::Command,
    slot: Option<SessionSlot>,
) -> Result<Bytes, bincode::error::EncodeError> {
    seal_as(M::wrote(command), reading, &M::content(command), slot)
}

/// The same, for what is encoded of a command that a machine `wrote`.
fn seal_as<C: Serialize>(
    wrote: MachineVersion,
    reading: Reading,
    command: &C,
    slot: Option<SessionSlot>,
) -> Result<Bytes, bincode::error::EncodeError> {
    // Envelopes stay in memory as long as the log's tail does. One that grew on the way would take up to twice its bytes.
    let mut command_bytes = Length(0);
    bincode::serde::encode_into_writer(command, &mut command_bytes, bincode::config::standard())?;
    let is_first = wrote == MachineVersion::FIRST;
    let kind = match (is_first, slot.is_some()) {
        (true, false) => COMMAND,
        (true, true) => SESSION_COMMAND,
        (false, false) => VERSIONED_COMMAND,
        (false, true) => VERSIONED_SESSION_COMMAND,
    };
    let slot_bytes = if slot.is_some() { SLOT_BYTES } else { 0 };
    let wrote_bytes = if is_first { 0 } else { WROTE_BYTES };
    let mut out = head(kind, reading, slot_bytes + wrote_bytes + command_bytes.0);
    if let Some(slot) = slot {
        out.put_u64_le(slot.session);
        out.put_u64_le(slot.sequence);
        out.put_u64_le(slot.first_unanswered);
    }
    if !is_first {
        put_wrote(&mut out, wrote);
    }
    bincode::serde::encode_into_writer(command, Output(&mut out), bincode::config::standard())?;
    Ok(out.freeze())
}

/// What an envelope says of the time that is to be stamped by whoever proposes it.
pub const UNSTAMPED: Reading = Reading { wall_ms: 0, term: 0, counted_ms: 0 };

/// The same envelope with another reading of clocks. Nothing that was sealed is encoded again: another build may have done
/// it in another way.
///
/// # Errors
/// [`EnvelopeError::Version`] for an envelope that this build does not write.
pub fn restamp(sealed: &[u8], reading: Reading) -> Result<Bytes, EnvelopeError> {
    match (sealed.first(), sealed.split_at_checked(HEAD_BYTES)) {
        (Some(&VERSION), Some((before, rest))) => {
            let mut out = head(before[1], reading, rest.len());
            out.put_slice(rest);
            Ok(out.freeze())
        }
        (Some(&found), _) if found != VERSION => Err(EnvelopeError::Version { found }),
        _ => Err(EnvelopeError::Truncated { bytes: sealed.len() }),
    }
}

/// The command of a session as it was sealed, in the place that its session gives it now.
///
/// # Panics
/// When it is no command of a session.
pub fn in_place(sealed: &Bytes, slot: SessionSlot) -> Bytes {
    assert!(
        matches!(sealed[..2], [VERSION, SESSION_COMMAND | VERSIONED_SESSION_COMMAND]),
        "invariant: only what has a place is given another"
    );
    let mut out = BytesMut::from(&sealed[..]);
    let mut place = &mut out[HEAD_BYTES..HEAD_BYTES + SLOT_BYTES];
    place.put_u64_le(slot.session);
    place.put_u64_le(slot.sequence);
    place.put_u64_le(slot.first_unanswered);
    out.freeze()
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

/// Says that all members read `version`.
pub fn seal_agreement(reading: Reading, version: MachineVersion) -> Bytes {
    let mut out = head(AGREEMENT, reading, WROTE_BYTES);
    put_wrote(&mut out, version);
    out.freeze()
}

fn put_wrote(out: &mut BytesMut, wrote: MachineVersion) {
    out.put_u16_le(wrote.machine);
    out.put_u32_le(wrote.version);
}

/// Opens an envelope.
///
/// # Errors
/// See [`EnvelopeError`]. A committed entry that cannot be opened stops the node.
pub fn open<M: StateMachine>(bytes: &[u8]) -> Result<OpenedEnvelope<M::Command>, EnvelopeError> {
    open_sealed::<M>(bytes).map(|(opened, _)| opened)
}

/// The command in an envelope as it was sealed. Empty where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandAsSealed<'a> {
    /// Which machine it is for, and which version of it.
    pub wrote: MachineVersion,
    /// As that version encodes it.
    pub encoded: &'a [u8],
}

/// As [`open`], with the command as it was sealed.
///
/// # Errors
/// As [`open`].
pub fn open_sealed<M: StateMachine>(
    bytes: &[u8],
) -> Result<(OpenedEnvelope<M::Command>, CommandAsSealed<'_>), EnvelopeError> {
    let mut sealed = CommandAsSealed { wrote: MachineVersion::FIRST, encoded: &[] };
    let opened = open_with(bytes, |wrote, encoded| {
        check_version(wrote, M::MACHINES)?;
        sealed = CommandAsSealed { wrote, encoded };
        Ok(M::decode_of(wrote, encoded)?)
    })?;
    if let Content::Agreement(version) = opened.content {
        // What follows could not be read.
        check_agreed(version, M::MACHINES)?;
    }
    Ok((opened, sealed))
}

/// Which version of which machine the command in an envelope is sealed as; none where there is no command. What it is decoded
/// to may say another one: a version that was read, and the one in which this build would write the same, are not one.
///
/// # Errors
/// See [`EnvelopeError`].
pub fn sealed_as(bytes: &[u8]) -> Result<Option<MachineVersion>, EnvelopeError> {
    Ok(match open_with(bytes, |wrote, _| Ok(wrote))?.content {
        Content::Command(wrote, _) => Some(wrote),
        Content::OpenSession { .. }
        | Content::CloseSession { .. }
        | Content::Clock
        | Content::Quota(_)
        | Content::Agreement(_) => None,
    })
}

/// Refuses an envelope of `whole` bytes that has less than `count` left where it goes on.
fn need(bytes: &[u8], count: usize, whole: usize) -> Result<(), EnvelopeError> {
    match bytes.len() >= count {
        true => Ok(()),
        false => Err(EnvelopeError::Truncated { bytes: whole }),
    }
}

/// Refuses what stands behind the end.
fn ended(bytes: &[u8]) -> Result<(), EnvelopeError> {
    match bytes.len() {
        0 => Ok(()),
        bytes => Err(EnvelopeError::Trailing { bytes }),
    }
}

/// Opens an envelope, with `decode` for the command in it and the machine that wrote it.
fn open_with<'a, C>(
    mut bytes: &'a [u8],
    mut decode: impl FnMut(MachineVersion, &'a [u8]) -> Result<C, EnvelopeError>,
) -> Result<OpenedEnvelope<C>, EnvelopeError> {
    let whole = bytes.len();
    need(bytes, 1, whole)?;
    let version = bytes.get_u8();
    match version {
        OLDEST_VERSION => {
            need(bytes, HEAD_BYTES_1 - 1, whole)?;
            let stamp = Stamp::LogTime(bytes.get_u64_le());
            bytes.advance(16);
            let command = decode(MachineVersion::FIRST, bytes)?;
            return Ok(OpenedEnvelope { stamp, content: Content::Command(command, None) });
        }
        LOG_TIME_VERSION => need(bytes, HEAD_BYTES_2 - 1, whole)?,
        VERSION => need(bytes, HEAD_BYTES - 1, whole)?,
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
    let content = open_content((version, kind), bytes, whole, decode)?;
    Ok(OpenedEnvelope { stamp, content })
}

/// What follows the head, in an envelope of this version, kind and length.
fn open_content<'a, C>(
    (version, kind): (u8, u8),
    mut bytes: &'a [u8],
    whole: usize,
    mut decode: impl FnMut(MachineVersion, &'a [u8]) -> Result<C, EnvelopeError>,
) -> Result<Content<C>, EnvelopeError> {
    Ok(match kind {
        COMMAND => Content::Command(decode(MachineVersion::FIRST, bytes)?, None),
        SESSION_COMMAND => {
            need(bytes, SLOT_BYTES, whole)?;
            let slot = get_slot(&mut bytes);
            Content::Command(decode(MachineVersion::FIRST, bytes)?, Some(slot))
        }
        VERSIONED_COMMAND if version > LOG_TIME_VERSION => {
            need(bytes, WROTE_BYTES, whole)?;
            Content::Command(decode(get_wrote(&mut bytes), bytes)?, None)
        }
        VERSIONED_SESSION_COMMAND if version > LOG_TIME_VERSION => {
            need(bytes, SLOT_BYTES + WROTE_BYTES, whole)?;
            let slot = get_slot(&mut bytes);
            Content::Command(decode(get_wrote(&mut bytes), bytes)?, Some(slot))
        }
        AGREEMENT if version > LOG_TIME_VERSION => {
            need(bytes, WROTE_BYTES, whole)?;
            let agreed = get_wrote(&mut bytes);
            ended(bytes)?;
            Content::Agreement(agreed)
        }
        OPEN_SESSION => {
            need(bytes, 16, whole)?;
            let session = bytes.get_u64_le();
            let (ttl_ms, opener) = match version {
                LOG_TIME_VERSION => (end(&mut bytes)?, ""),
                _ => (bytes.get_u64_le(), opener(bytes)?),
            };
            Content::OpenSession { session, ttl_ms, opener: opener.to_owned() }
        }
        CLOSE_SESSION => {
            need(bytes, 8, whole)?;
            Content::CloseSession { session: end(&mut bytes)? }
        }
        CLOCK if version > LOG_TIME_VERSION => {
            ended(bytes)?;
            Content::Clock
        }
        QUOTA if version > LOG_TIME_VERSION => {
            need(bytes, 1 + 8, whole)?;
            let (how, amount) = (bytes.get_u8(), end(&mut bytes)?);
            Content::Quota(match how {
                QUOTA_OF_MEMORY => QuotaChange::Follow(amount),
                QUOTA_OF_OPERATOR => QuotaChange::Set(amount),
                QUOTA_RELEASED => QuotaChange::Release,
                found => return Err(EnvelopeError::Quota { found }),
            })
        }
        found => return Err(EnvelopeError::Kind { found }),
    })
}

fn get_slot(bytes: &mut &[u8]) -> SessionSlot {
    let (session, sequence, first_unanswered) = (bytes.get_u64_le(), bytes.get_u64_le(), bytes.get_u64_le());
    SessionSlot { session, sequence, first_unanswered }
}

fn get_wrote(bytes: &mut &[u8]) -> MachineVersion {
    MachineVersion { machine: bytes.get_u16_le(), version: bytes.get_u32_le() }
}

fn opener(bytes: &[u8]) -> Result<&str, EnvelopeError> {
    match std::str::from_utf8(bytes) {
        Ok(opener) if opener.len() <= MAX_OPENER_BYTES => Ok(opener),
        _ => Err(EnvelopeError::Opener),
    }
}

/// An entry that this build cannot apply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Unusable {
    /// Why, in words.
    pub reason: String,
    /// That it was written by a machine, or a version of it, that this build does not read. Nothing else is wrong with it.
    pub unsupported: Option<UnsupportedVersion>,
}

impl From<EnvelopeError> for Unusable {
    fn from(error: EnvelopeError) -> Self {
        let unsupported = match &error {
            EnvelopeError::Machine(unsupported) => Some(*unsupported),
            _ => None,
        };
        Self { reason: error.to_string(), unsupported }
    }
}

/// As [`open`], for bytes of which it is not known whether they can be opened: a command's `Deserialize` implementation
/// may panic as well.
///
/// # Errors
/// What is wrong.
pub fn try_open<M: StateMachine>(bytes: &[u8]) -> Result<OpenedEnvelope<M::Command>, Unusable> {
    let opened = catch_unwind(|| open::<M>(bytes)).map_err(|panic| Unusable {
        reason: format!("decoding it panicked: {}", panic_message(&*panic)),
        unsupported: None,
    })?;
    Ok(opened?)
}

/// Whether `bytes` can be opened and hold a command of machine `M`, or something else that an entry may ask for. Returns when
/// the leader proposed it.
///
/// # Errors
/// What is wrong.
pub fn check<M: StateMachine>(bytes: &[u8]) -> Result<Stamp, Unusable> {
    match plain_command(bytes) {
        Some((stamp, wrote, command)) if M::is_command_of(wrote, command) => Ok(stamp),
        _ => try_open::<M>(bytes).map(|opened| opened.stamp),
    }
}

/// The stamp and the command in an envelope of this build's version, if it holds one, and the machine that wrote it.
fn plain_command(bytes: &[u8]) -> Option<(Stamp, MachineVersion, &[u8])> {
    let (mut head, mut rest) = bytes.split_at_checked(HEAD_BYTES)?;
    let (version, kind) = (head.get_u8(), head.get_u8());
    let slot_bytes = match (version, kind) {
        (VERSION, COMMAND | VERSIONED_COMMAND) => 0,
        (VERSION, SESSION_COMMAND | VERSIONED_SESSION_COMMAND) => SLOT_BYTES,
        _ => return None,
    };
    rest = rest.get(slot_bytes..)?;
    let wrote = match kind {
        COMMAND | SESSION_COMMAND => MachineVersion::FIRST,
        _ if rest.len() < WROTE_BYTES => return None,
        _ => get_wrote(&mut rest),
    };
    let reading =
        Reading { wall_ms: head.get_u64_le(), term: head.get_u64_le(), counted_ms: head.get_u64_le() };
    Some((Stamp::Reading(reading), wrote, rest))
}

/// The reply of `machine` in bytes of which it is not known whether they can be decoded.
///
/// # Errors
/// What is wrong, in words.
pub fn try_decode_reply<M: StateMachine>(machine: u16, bytes: &[u8]) -> Result<M::Reply, String> {
    catch_unwind(|| M::decode_reply(machine, bytes))
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

#[cfg(test)]
mod tests;
