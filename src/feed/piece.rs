//! What several positions did, in one stretch of bytes: what the ring holds and the event log stores.
//!
//! | bytes | content |
//! |---|---|
//! | 1 | version, at present 1 |
//! | 8 | the history that positions belong to |
//! | 8 | the first position that it covers |
//! | 8 | the last one |
//! | rest | [records](super::record) of those positions at which something happened |
//!
//! The next piece covers what follows the last position, so that a gap is seen.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::record::{self, FeedRecord, NoRecord};
use crate::types::HistoryEpoch;

const VERSION: u8 = 1;
/// Bytes before the records.
pub(super) const HEAD_BYTES: usize = 1 + 3 * 8;

/// What happened in a stretch of positions. Clones share the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// The first position that it covers.
    pub(super) from: u64,
    /// The last one.
    pub(super) upto: u64,
    /// Operations in it.
    pub(super) operations: u32,
    /// Log time of the last one.
    pub(super) time_ms: u64,
    /// All of it, with its head.
    pub(super) bytes: Bytes,
}

/// Leaves room for the head of a piece behind what is in `out`.
pub(super) fn begin(out: &mut BytesMut) {
    out.put_bytes(0, HEAD_BYTES);
}

/// Fills in the head of the piece in `bytes`.
pub(super) fn put_head(bytes: &mut [u8], history: HistoryEpoch, from: u64, upto: u64) {
    let mut head = &mut bytes[..HEAD_BYTES];
    head.put_u8(VERSION);
    head.put_u64_le(history.0);
    head.put_u64_le(from);
    head.put_u64_le(upto);
}

impl Piece {
    /// One in which nothing happens.
    pub(super) fn empty(history: HistoryEpoch, from: u64, upto: u64, time_ms: u64) -> Self {
        let mut bytes = BytesMut::with_capacity(HEAD_BYTES);
        begin(&mut bytes);
        put_head(&mut bytes, history, from, upto);
        Self { from, upto, operations: 0, time_ms, bytes: bytes.freeze() }
    }

    /// What an event log stores.
    pub(super) fn read(bytes: Bytes) -> Result<(HistoryEpoch, Self), NoRecord> {
        let mut head = bytes.clone();
        if head.len() < HEAD_BYTES {
            return Err(NoRecord("a piece without its head"));
        }
        if head.get_u8() != VERSION {
            return Err(NoRecord("a piece of a newer version"));
        }
        let history = HistoryEpoch(head.get_u64_le());
        let (from, upto) = (head.get_u64_le(), head.get_u64_le());
        if from > upto {
            return Err(NoRecord("a piece that ends before it begins"));
        }
        Ok((history, Self { from, upto, operations: 0, time_ms: 0, bytes }))
    }

    /// Without the positions below `next`, which it covers.
    pub(super) fn without_first(&self, history: HistoryEpoch, next: u64) -> Result<Self, NoRecord> {
        let (mut rest, mut operations) = (self.bytes.slice(HEAD_BYTES..), 0);
        while !rest.is_empty() && record::glance(&rest)?.0 < next {
            FeedRecord::take(&mut rest)?;
        }
        let mut bytes = BytesMut::with_capacity(HEAD_BYTES + rest.len());
        begin(&mut bytes);
        bytes.put_slice(&rest);
        put_head(&mut bytes, history, next, self.upto);
        while !rest.is_empty() {
            operations += FeedRecord::take(&mut rest)?.operations() as u32;
        }
        Ok(Self { from: next, operations, bytes: bytes.freeze(), ..self.clone() })
    }

    /// Adds its records from `next` on, and up to `last`, to `records`.
    pub(super) fn records(
        &self,
        (next, last): (u64, u64),
        records: &mut Vec<FeedRecord>,
    ) -> Result<(), NoRecord> {
        let mut rest = self.bytes.slice(HEAD_BYTES..);
        let mut before = None;
        while !rest.is_empty() {
            let (index, length) = record::glance(&rest)?;
            let in_order = before.is_none_or(|before| before < index);
            if !in_order || !(self.from..=self.upto).contains(&index) {
                return Err(NoRecord("positions that are not in order"));
            }
            before = Some(index);
            if index > last {
                break;
            }
            if index < next {
                rest.advance(length);
            } else {
                records.push(FeedRecord::take(&mut rest)?);
            }
        }
        Ok(())
    }
}
