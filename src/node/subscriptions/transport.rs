//! What a stream needs of what carries it. What is said to a follower, and when, is the same on every transport ([`stream`](super::stream));
//! how it is written, and how it gets there, is the transport's.
//!
//! A follower's own words are messages of `proto/replication.proto`, which a transport makes of whatever it reads: so they are checked, and
//! refused, in one place ([`wishes`](super::wishes)).

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use tokio::sync::watch;

use super::entry::{EntryAt, SentEntry};
use crate::door::bodies::Built;
use crate::door::limits::DoorLimits;
use crate::door::rights::Principal;
use crate::door::streams::Outlet;
use crate::incoming::Caller;
use crate::proto::replication::SubscribeRequest;
use crate::proto::v1::Failure;
use crate::types::HistoryEpoch;

/// Less than this is not worth being compressed.
const LEAST_COMPRESSED_BYTES: usize = 256;
/// The fastest of the levels that make anything much smaller.
const LEVEL: i32 = 1;

/// What a follower says: where to begin, then what it has. Ends when it says nothing more.
pub(in crate::node) type FollowerRequests = BoxStream<'static, Result<SubscribeRequest, Failure>>;

/// The two ends of a stream.
pub(in crate::node) struct FollowerLine<E: FollowerEncoding> {
    pub(in crate::node) requests: FollowerRequests,
    pub(in crate::node) outlet: Arc<Outlet<Chunk<E::Message>>>,
    pub(in crate::node) encoding: E,
    pub(in crate::node) caller: Arc<Caller>,
    pub(in crate::node) principal: Arc<Principal>,
    pub(in crate::node) limits: Arc<DoorLimits>,
    pub(in crate::node) draining: watch::Receiver<bool>,
}

/// Messages that are handed over together, and what counts for them until they are taken.
pub(in crate::node) struct Chunk<M> {
    pub(in crate::node) messages: Vec<M>,
    pub(in crate::node) built: Built,
}

/// What a follower is told, as messages of one transport.
pub(in crate::node) trait FollowerEncoding: Send + 'static {
    /// One message.
    type Message: Send + 'static;

    /// What pages call the transport.
    const TRANSPORT: &'static str;

    /// What is said before everything else, where there is a word for it.
    fn beginning(&mut self, begins: SyncBegin) -> Option<Self::Message>;

    /// Bytes of the message that [`entry`](Self::entry) makes.
    fn entry_len(entry: &SentEntry<'_>) -> usize;

    /// An entry by itself.
    fn entry(&mut self, entry: &SentEntry<'_>) -> Self::Message;

    /// Bytes that [`put_batched`](Self::put_batched) writes.
    fn batched_len(entry: &SentEntry<'_>) -> usize;

    /// Writes an entry as one of a batch.
    fn put_batched(entry: &SentEntry<'_>, out: &mut BytesMut);

    /// Makes a message of a batch: what may block for a moment is in what is returned.
    fn batch(&mut self, batch: EntryBatch) -> impl FnOnce() -> Self::Message + Send + 'static;

    /// Where a state begins or ends.
    fn mark(&mut self, at: EntryAt, mark: StateMark, history: HistoryEpoch) -> Self::Message;

    /// Which part of a state was sent, or is gone on behind, where there is a word for it.
    fn part(&mut self, at: EntryAt, mark: PartMark, history: HistoryEpoch) -> Option<Self::Message>;

    /// How far everything is.
    fn heartbeat(&mut self, progress: &FollowerProgress) -> Self::Message;

    /// Bytes of a message.
    fn len(message: &Self::Message) -> usize;
}

/// How a follower is brought up to date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::node) enum SyncKind {
    /// It is told what came after its position.
    Partial,
    /// It is told the state as of a newer position first.
    Full,
}

/// Where a stream begins.
#[derive(Debug, Clone, Copy)]
pub(in crate::node) struct SyncBegin {
    pub(in crate::node) kind: SyncKind,
    /// The position of the state, or the one after which it begins.
    pub(in crate::node) seq: u64,
    pub(in crate::node) history: HistoryEpoch,
}

/// An end of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::node) enum StateMark {
    Begin,
    End,
}

/// A part of a state.
#[derive(Debug, Clone, Copy)]
pub(in crate::node) struct PartMark {
    /// Whether the state is gone on with behind it, or it is what was sent.
    pub(in crate::node) begins: bool,
    /// The state, as only its follower knows it.
    pub(in crate::node) id: u64,
    pub(in crate::node) part: u64,
}

/// How far a follower and its node are.
#[derive(Debug, Clone, Copy)]
pub(in crate::node) struct FollowerProgress {
    pub(in crate::node) history: HistoryEpoch,
    /// Everything up to here that is wanted was sent.
    pub(in crate::node) upto_seq: u64,
    pub(in crate::node) applied_seq: u64,
    pub(in crate::node) committed_seq: u64,
    /// Log time at the first two of them.
    pub(in crate::node) upto_time_ms: u64,
    pub(in crate::node) applied_time_ms: u64,
    pub(in crate::node) applied_elapsed_ms: u64,
}

/// Entries that are sent together, encoded one after the other.
#[derive(Debug, Clone)]
pub(in crate::node) struct EntryBatch {
    pub(in crate::node) entries: Bytes,
    pub(in crate::node) count: u32,
    /// Whether they are items of a state.
    pub(in crate::node) is_state: bool,
    /// Whether they are to be compressed, where that makes them smaller.
    pub(in crate::node) compress: bool,
}

/// The same as they are sent.
pub(in crate::node) struct PackedBatch {
    pub(in crate::node) entries: Bytes,
    pub(in crate::node) is_compressed: bool,
    /// Bytes before compression.
    pub(in crate::node) raw_bytes: u64,
}

impl EntryBatch {
    /// As they are sent. Blocks for a moment if they are compressed.
    pub(in crate::node) fn pack(self) -> PackedBatch {
        let Self { entries, compress, .. } = self;
        let raw_bytes = entries.len() as u64;
        let compressed = (compress && entries.len() >= LEAST_COMPRESSED_BYTES)
            .then(|| zstd::bulk::compress(&entries, LEVEL).ok())
            .flatten()
            .filter(|compressed| compressed.len() < entries.len());
        match compressed {
            Some(compressed) => PackedBatch { entries: compressed.into(), is_compressed: true, raw_bytes },
            None => PackedBatch { entries, is_compressed: false, raw_bytes },
        }
    }
}
