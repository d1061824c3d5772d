//! The apply task's side of the feed.

use std::sync::Arc;

use bytes::BytesMut;

use super::Feed;
use super::piece::{self, Piece};
use super::record::{self, RecordWriter};
use crate::machine::{ApplyContext, EventSink};
use crate::types::{HistoryEpoch, MachineVersion};

/// A piece with so many bytes is closed.
const PIECE_BYTES: usize = 128 * 1024;
/// Small pieces share what they are written into, which is kept as long as one of them is.
const ARENA_BYTES: usize = 64 * 1024;
/// With less room than this left, the next piece begins another one.
const LEAST_ROOM_BYTES: usize = 4 * 1024;

/// Records what is applied. Nothing of a batch can be followed before all of it is [published](Self::publish).
#[derive(Debug)]
pub(crate) struct Recorder {
    feed: Arc<Feed>,
    history: HistoryEpoch,
    /// The first position that no closed piece covers.
    from: u64,
    /// The position after the last one that was applied.
    next: u64,
    /// The open piece, its head included; empty if nothing has happened since the last one.
    open: BytesMut,
    operations: u32,
    time_ms: u64,
    closed: Vec<Piece>,
}

impl Recorder {
    /// Records into `feed`, once [`begin`](Self::begin) says from where on.
    pub(crate) fn new(feed: Arc<Feed>) -> Self {
        Self {
            feed,
            history: HistoryEpoch::UNKNOWN,
            from: 0,
            next: 0,
            open: BytesMut::new(),
            operations: 0,
            time_ms: 0,
            closed: Vec::new(),
        }
    }

    /// What it records into.
    pub(crate) fn feed(&self) -> &Arc<Feed> {
        &self.feed
    }

    /// Everything from position `next` of `history` on will be recorded. Of what was recorded before nothing counts any more, but
    /// what the event log has of this history up to there.
    pub(crate) fn begin(&mut self, history: HistoryEpoch, next: u64) {
        (self.history, self.from, self.next) = (history, next, next);
        self.open.clear();
        self.closed.clear();
        self.operations = 0;
        self.feed.begin(history, next);
    }

    /// A command is applied by `apply`, which tells what happens.
    pub(crate) fn tell<T>(&mut self, at: &ApplyContext, apply: impl FnOnce(&mut dyn EventSink) -> T) -> T {
        self.open_piece();
        let mut record = RecordWriter::begin(&mut self.open, at);
        let told = apply(&mut record);
        let operations = record.end();
        self.note(operations, at.time_ms);
        told
    }

    /// A command was applied that is told as it is.
    pub(crate) fn command(&mut self, at: &ApplyContext, wrote: MachineVersion, command: &[u8]) {
        self.open_piece();
        record::put_command(&mut self.open, at, wrote, command);
        self.note(1, at.time_ms);
    }

    fn open_piece(&mut self) {
        if self.open.is_empty() {
            if self.open.capacity() < LEAST_ROOM_BYTES {
                self.open = BytesMut::with_capacity(ARENA_BYTES);
            }
            piece::begin(&mut self.open);
        }
    }

    fn note(&mut self, operations: u32, time_ms: u64) {
        self.operations += operations;
        self.time_ms = time_ms;
    }

    /// All of the entry at `index` has been applied, whatever it was.
    pub(crate) fn applied(&mut self, index: u64) {
        self.next = index + 1;
        if self.open.len() >= PIECE_BYTES {
            self.close_piece();
        }
    }

    fn close_piece(&mut self) {
        let (from, upto) = (self.from, self.next - 1);
        if self.operations == 0 {
            self.open.clear();
            return;
        }
        let mut bytes = self.open.split();
        piece::put_head(&mut bytes, self.history, from, upto);
        let (operations, time_ms) = (std::mem::take(&mut self.operations), self.time_ms);
        self.closed.push(Piece { from, upto, operations, time_ms, bytes: bytes.freeze() });
        self.from = self.next;
    }

    /// What was applied can be followed now.
    pub(crate) fn publish(&mut self) {
        if self.next == 0 {
            return;
        }
        self.close_piece();
        self.feed.publish(&mut self.closed, self.next);
    }
}

impl Drop for Recorder {
    /// Nothing more is applied: whoever follows learns it.
    fn drop(&mut self) {
        self.feed.end();
    }
}
