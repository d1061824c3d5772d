//! Frames as bytes. `docs/FORMAT.md` has every field.
//!
//! A frame is a length (u32), and so many bytes: the CRC-32 (u32) of the message, and the message. All of it is what bincode's `legacy`
//! configuration makes of `(u32, u32, message)`, which is easy to write by hand: integers of fixed width, little-endian; a bool is a byte; a
//! variant is its number (u32); text and lists have their length before them (u64).

use std::fmt;

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize, Serializer};

use crate::door::failure::{failure, invalid};
use crate::proto::replication::{Compression, Filter, SubscribeRequest};
use crate::proto::v1::Failure;
use crate::reason::Reason;

/// Begins the first message of either side.
pub(super) const MAGIC: [u8; 8] = *b"QFRAMES\0";
/// The version of all that follows the magic. A change that a follower of before cannot read is another one.
pub(super) const VERSION: u32 = 1;

/// What stands before a message: its length with that of the checksum, and the checksum.
pub(super) const HEAD_BYTES: usize = 8;
const CHECKSUM_BYTES: usize = 4;
/// Longest first frame of a follower. All the filters that there may be fit.
pub(super) const MAX_FIRST_BYTES: usize = 256 * 1024;
/// Longest one after that.
pub(super) const MAX_LATER_BYTES: usize = 1024;

/// Reads and writes as said above.
const CONFIG: Configuration<LittleEndian, Fixint, Limit<MAX_FIRST_BYTES>> =
    bincode::config::legacy().with_limit::<MAX_FIRST_BYTES>();

/// What a follower says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FollowerFrame {
    /// The first.
    Subscribe(SubscribeFrame),
    /// Everything up to here was taken.
    Ack { seq: u64 },
    /// Nothing, but that it is alive.
    Alive,
    /// Who the follower is, before the first.
    Authenticate(AuthenticateFrame),
}

/// A credential. Nobody is shown it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AuthenticateFrame {
    pub(super) magic: [u8; 8],
    pub(super) version: u32,
    pub(super) token: String,
}

impl fmt::Debug for AuthenticateFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthenticateFrame").finish_non_exhaustive()
    }
}

/// What a follower may begin with.
#[derive(Debug)]
pub(super) enum FirstFrame {
    /// By this token, and what to follow comes next.
    Authenticate(AuthenticateFrame),
    Subscribe(Box<SubscribeRequest>),
}

/// What a follower asks for. The fields are those of `SubscribeRequest` in `proto/replication.proto`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SubscribeFrame {
    pub(super) magic: [u8; 8],
    pub(super) version: u32,
    pub(super) from_seq: u64,
    pub(super) history: u64,
    pub(super) from_now: bool,
    pub(super) accept_snapshot: bool,
    pub(super) batched: bool,
    pub(super) compressed: bool,
    pub(super) window_bytes: u64,
    pub(super) heartbeat_ms: u32,
    pub(super) id: String,
    pub(super) filters: Vec<FilterFrame>,
}

/// A tenant, and a collection of it or nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FilterFrame {
    pub(super) tenant: String,
    pub(super) collection: String,
}

/// What a node says.
#[derive(Debug, Serialize)]
pub(super) enum NodeFrame<'a> {
    /// The first, unless the node says why there is nothing to follow.
    Begin {
        magic: [u8; 8],
        version: u32,
        history: u64,
        sync: SyncFrame,
        seq: u64,
    },
    Entries(BatchFrame<'a>),
    StateBegin {
        seq: u64,
        term: u64,
        time_ms: u64,
        elapsed_ms: u64,
    },
    StatePart(BatchFrame<'a>),
    StateEnd {
        seq: u64,
        items: u64,
        crc32: u32,
    },
    Heartbeat(HeartbeatFrame),
    /// The last.
    End(EndFrame),
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) enum SyncFrame {
    Partial,
    Full,
}

/// Entries, one after the other.
#[derive(Debug, Serialize)]
pub(super) struct BatchFrame<'a> {
    pub(super) compression: CompressionFrame,
    pub(super) count: u32,
    /// Before compression.
    pub(super) raw_bytes: u64,
    pub(super) entries: Raw<'a>,
}

/// Bytes of a batch before its entries, with the number of its frame's kind.
pub(super) const BATCH_HEAD_BYTES: usize = 4 + 4 + 4 + 8 + 8;

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) enum CompressionFrame {
    None,
    Zstd,
}

#[derive(Debug, Serialize)]
pub(super) struct HeartbeatFrame {
    pub(super) upto_seq: u64,
    pub(super) applied_seq: u64,
    pub(super) committed_seq: u64,
    pub(super) upto_time_ms: u64,
    pub(super) applied_time_ms: u64,
    pub(super) applied_elapsed_ms: u64,
    pub(super) lag_operations: u64,
    pub(super) lag_ms: u64,
}

/// Why nothing more is said.
#[derive(Debug, Serialize)]
pub(super) struct EndFrame {
    /// Of the list in `proto/call.proto`, and its name there without `REASON_`.
    pub(super) reason: u32,
    pub(super) name: &'static str,
    pub(super) message: String,
    /// COMPACTED: the first position that the node has.
    pub(super) first_seq: u64,
    /// The client port of who leads, where that is of use.
    pub(super) leader: String,
}

/// An event or a command.
#[derive(Debug, Serialize)]
pub(super) struct EntryFrame<'a> {
    pub(super) seq: u64,
    pub(super) term: u64,
    pub(super) time_ms: u64,
    pub(super) elapsed_ms: u64,
    pub(super) more: bool,
    pub(super) change: ChangeFrame<'a>,
}

/// The numbers of the variants are those of `WalOperation` in `proto/replication.proto`.
#[derive(Debug, Serialize)]
pub(super) enum ChangeFrame<'a> {
    /// Never sent.
    #[expect(dead_code, reason = "it has the number 0")]
    None,
    Insert(EntityFrame<'a>),
    Update(EntityFrame<'a>),
    Delete(EntityFrame<'a>),
    Expire(EntityFrame<'a>),
    Command {
        machine: u32,
        version: u32,
        command: Raw<'a>,
    },
}

#[derive(Debug, Serialize)]
pub(super) struct EntityFrame<'a> {
    pub(super) tenant: Raw<'a>,
    pub(super) collection: Raw<'a>,
    pub(super) key: Raw<'a>,
    pub(super) value: Raw<'a>,
    pub(super) create_seq: u64,
    pub(super) previous_seq: u64,
    pub(super) version: u64,
    pub(super) expires_ms: u64,
    pub(super) deadline_elapsed_ms: u64,
    pub(super) machine: u32,
}

/// Bytes of an entry beside those of its tenant, collection, key and value; of a command beside the command.
pub(super) const ENTITY_BYTES: usize = ENTRY_BYTES + 4 * 8 + 5 * 8 + 4;
pub(super) const COMMAND_BYTES: usize = ENTRY_BYTES + 4 + 4 + 8;
const ENTRY_BYTES: usize = 4 * 8 + 1 + 4;

/// Bytes that are written as one piece.
#[derive(Debug, Clone, Copy)]
pub(super) struct Raw<'a>(pub(super) &'a [u8]);

impl Serialize for Raw<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

/// Appends `value` to `out`.
pub(super) fn put(value: &impl Serialize, out: &mut BytesMut) {
    let written = bincode::serde::encode_into_std_write(value, &mut out.writer(), bincode::config::legacy());
    written.expect("invariant: what is sent has lengths that are known, and memory takes it");
}

/// `message` as a frame, for which `bytes` are set aside beside the head.
pub(super) fn framed(message: &impl Serialize, bytes: usize) -> Bytes {
    let mut out = BytesMut::with_capacity(HEAD_BYTES + bytes);
    out.put_bytes(0, HEAD_BYTES);
    put(message, &mut out);
    let checksum = crc32fast::hash(&out[HEAD_BYTES..]);
    let length = u32::try_from(out.len() - HEAD_BYTES + CHECKSUM_BYTES);
    let length = length.expect("invariant: no entry is as long as that");
    out[..CHECKSUM_BYTES].copy_from_slice(&length.to_le_bytes());
    out[CHECKSUM_BYTES..HEAD_BYTES].copy_from_slice(&checksum.to_le_bytes());
    out.freeze()
}

/// The end of a stream, for `failure`.
pub(super) fn end(failure: &Failure) -> Bytes {
    let reason = failure.reason();
    let leader = failure.leader.as_ref().map(|leader| leader.client.clone()).unwrap_or_default();
    let end = EndFrame {
        reason: u32::try_from(reason as i32).unwrap_or_default(),
        name: reason.name(),
        message: failure.message.clone(),
        first_seq: failure.first_revision,
        leader,
    };
    framed(&NodeFrame::End(end), 256)
}

/// The head of a frame of a follower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// Of the message.
    pub(super) bytes: usize,
    checksum: u32,
}

impl Head {
    /// Reads one whose message may have `most` bytes.
    ///
    /// # Errors
    /// What to tell the follower.
    pub(super) fn read(head: [u8; HEAD_BYTES], most: usize) -> Result<Self, Failure> {
        let [a, b, c, d, checksum @ ..] = head;
        if let Some(protocol) = other_protocol([a, b, c, d]) {
            return Err(invalid(&format!(
                "this is {protocol}, and this port takes frames for followers: HTTP and gRPC are at the client port"
            )));
        }
        let length = u32::from_le_bytes([a, b, c, d]);
        let bytes = (length as usize).checked_sub(CHECKSUM_BYTES).ok_or_else(|| {
            invalid(&format!(
                "a frame says that it has {length} bytes; its checksum alone has {CHECKSUM_BYTES}"
            ))
        })?;
        if bytes > most {
            let message = format!(
                "a frame says that it has {length} bytes, and at most {} are taken here: a length is a u32, little-endian",
                most + CHECKSUM_BYTES
            );
            return Err(failure(Reason::TooLarge, message, false, None));
        }
        Ok(Self { bytes, checksum: u32::from_le_bytes(checksum) })
    }

    /// # Errors
    /// What to tell the follower, when `message` is not what was sent.
    fn check(self, message: &[u8]) -> Result<(), Failure> {
        let found = crc32fast::hash(message);
        match found == self.checksum {
            true => Ok(()),
            false => Err(invalid(&format!(
                "a frame has the checksum {:08x}, and its message has {found:08x}: it is the CRC-32 of the message, as in zlib",
                self.checksum
            ))),
        }
    }
}

/// What else somebody may take the port for, by how a connection begins.
fn other_protocol(begin: [u8; 4]) -> Option<&'static str> {
    match &begin {
        b"GET " | b"POST" | b"PUT " | b"HEAD" | b"DELE" | b"OPTI" | b"PATC" | b"CONN" | b"TRAC" => {
            Some("HTTP")
        }
        b"PRI " => Some("HTTP/2, as gRPC speaks it"),
        // A handshake, of version 3.x.
        [0x16, 0x03, ..] => Some("TLS"),
        _ => None,
    }
}

/// What a follower says first.
///
/// # Errors
/// What to tell it, when that is nothing that this build can read.
pub(super) fn read_first(head: Head, message: &[u8]) -> Result<FirstFrame, Failure> {
    /// The numbers of the two.
    const SUBSCRIBE: [u8; 4] = 0_u32.to_le_bytes();
    const AUTHENTICATE: [u8; 4] = 3_u32.to_le_bytes();
    head.check(message)?;
    let is_first = message.starts_with(&SUBSCRIBE) || message.starts_with(&AUTHENTICATE);
    let is_subscribe = is_first && message[4..].starts_with(&MAGIC);
    let version = message.get(4 + MAGIC.len()..).and_then(|rest| rest.first_chunk());
    match version.filter(|_| is_subscribe).map(|version| u32::from_le_bytes(*version)) {
        None => Err(invalid(
            "the first frame says what to follow: the number 0, the magic, the version and so on",
        )),
        Some(version) if version != VERSION => {
            Err(invalid(&format!("the follower speaks version {version} of frames, and this node {VERSION}")))
        }
        Some(_) => match decode(message)? {
            FollowerFrame::Subscribe(subscribe) => Ok(FirstFrame::Subscribe(Box::new(subscribe.into()))),
            FollowerFrame::Authenticate(credential) => Ok(FirstFrame::Authenticate(credential)),
            FollowerFrame::Ack { .. } | FollowerFrame::Alive => {
                Err(invalid("the first frame says what to follow"))
            }
        },
    }
}

/// What a follower says later.
///
/// # Errors
/// See [`read_first`].
pub(super) fn read_later(head: Head, message: &[u8]) -> Result<SubscribeRequest, Failure> {
    head.check(message)?;
    match decode(message)? {
        FollowerFrame::Subscribe(_) => Err(invalid("the follower says once what to follow")),
        FollowerFrame::Authenticate(_) => {
            Err(invalid("the follower says once who it is, before it says what to follow"))
        }
        FollowerFrame::Ack { seq } => Ok(SubscribeRequest { ack_seq: seq, ..Default::default() }),
        FollowerFrame::Alive => Ok(SubscribeRequest { heartbeat: true, ..Default::default() }),
    }
}

fn decode(message: &[u8]) -> Result<FollowerFrame, Failure> {
    let decoded = bincode::serde::decode_from_slice(message, CONFIG);
    let (frame, read) = decoded.map_err(|error| invalid(&format!("a frame cannot be read: {error}")))?;
    match read == message.len() {
        true => Ok(frame),
        false => Err(invalid(&format!("a frame has {} bytes after its end", message.len() - read))),
    }
}

impl From<SubscribeFrame> for SubscribeRequest {
    fn from(frame: SubscribeFrame) -> Self {
        let SubscribeFrame { from_seq, history, from_now, accept_snapshot, batched, window_bytes, .. } =
            frame;
        let filter = |FilterFrame { tenant, collection }| Filter { tenant_id: tenant, collection };
        let compression = if frame.compressed { Compression::Zstd } else { Compression::None };
        Self {
            from_seq,
            history,
            from_now,
            accept_snapshot,
            batched,
            compression: compression.into(),
            window_bytes,
            heartbeat_ms: frame.heartbeat_ms,
            id: frame.id,
            filters: frame.filters.into_iter().map(filter).collect(),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests;
