//! The newest pieces, in memory.

use std::collections::VecDeque;

use super::piece::Piece;
use crate::types::HistoryEpoch;

/// Bytes that the ring keeps. The last piece is kept however large it is.
const RING_BYTES: usize = 8 * 1024 * 1024;
/// How many times as many it keeps for an event log that lags behind, before the log has to do without.
const FOR_THE_LOG: usize = 8;
/// What a piece takes beside its bytes.
const PIECE_OVERHEAD_BYTES: usize = size_of::<Piece>() + 64;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) history: HistoryEpoch,
    /// Everything from this position on is in it.
    pub(super) begins: u64,
    /// The position after the last one that was applied.
    pub(super) next: u64,
    /// Log time of the last piece.
    pub(super) time_ms: u64,
    pieces: VecDeque<Piece>,
    bytes: usize,
    /// The event log has everything below; `None` without one.
    pub(super) logged: Option<u64>,
    /// Whether nothing more will be applied.
    pub(super) is_over: bool,
}

impl Ring {
    /// With an event log behind it, or without.
    pub(super) fn new(has_log: bool) -> Self {
        Self {
            history: HistoryEpoch::UNKNOWN,
            begins: 0,
            next: 0,
            time_ms: 0,
            pieces: VecDeque::new(),
            bytes: 0,
            logged: has_log.then_some(0),
            is_over: false,
        }
    }

    /// Begins anew at `next`.
    pub(super) fn begin(&mut self, history: HistoryEpoch, next: u64) {
        (self.history, self.begins, self.next) = (history, next, next);
        self.pieces.clear();
        self.bytes = 0;
    }

    /// Takes in what was applied up to `next`.
    pub(super) fn push(&mut self, pieces: &mut Vec<Piece>, next: u64) {
        assert!(next >= self.next, "invariant: what is applied stays applied");
        for piece in pieces.drain(..) {
            let before = self.pieces.back().map_or(self.begins, |last| last.upto + 1);
            assert!(piece.from >= before.min(self.next), "invariant: pieces follow each other");
            self.time_ms = piece.time_ms;
            self.bytes += piece.bytes.len() + PIECE_OVERHEAD_BYTES;
            self.pieces.push_back(piece);
        }
        self.next = next;
        self.trim();
    }

    /// Whether more waits for the event log than the ring keeps anyway.
    pub(super) fn is_log_behind(&self) -> bool {
        self.logged.is_some() && self.bytes > RING_BYTES
    }

    /// The event log has everything below `next`, or there is none to wait for.
    pub(super) fn log_has(&mut self, logged: Option<u64>) {
        self.logged = logged;
        self.trim();
    }

    fn trim(&mut self) {
        while self.bytes > RING_BYTES && self.pieces.len() > 1 {
            let first = self.pieces.front().expect("invariant: more than one");
            let is_logged = self.logged.is_none_or(|logged| first.upto < logged);
            if !is_logged && self.bytes <= RING_BYTES * FOR_THE_LOG {
                break;
            }
            self.bytes -= first.bytes.len() + PIECE_OVERHEAD_BYTES;
            self.begins = first.upto + 1;
            self.pieces.pop_front();
        }
    }

    /// The last position that a piece covers.
    pub(super) fn last_piece(&self) -> Option<u64> {
        self.pieces.back().map(|last| last.upto)
    }

    /// Pieces with something from `next` on, until they are `max_bytes`; at least one, if there is any.
    pub(super) fn pieces_from(&self, next: u64, max_bytes: usize) -> Vec<Piece> {
        let first = self.pieces.partition_point(|piece| piece.upto < next);
        let (mut found, mut bytes) = (Vec::new(), 0);
        for piece in self.pieces.range(first..) {
            bytes += piece.bytes.len();
            if bytes > max_bytes && !found.is_empty() {
                break;
            }
            found.push(piece.clone());
        }
        found
    }
}
