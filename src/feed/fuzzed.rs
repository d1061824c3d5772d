//! What the event log may hold, from any bytes: see [`crate::fuzzing`].

use bytes::Bytes;

use super::piece::Piece;
use super::record::FeedRecord;

/// A piece of the event log, and each record in it.
pub(crate) fn piece(bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    let mut rest = bytes.clone();
    while let Ok(record) = FeedRecord::take(&mut rest) {
        assert!(record.bytes() <= bytes.len(), "a record tells no more than there is");
    }
    let Ok((history, piece)) = Piece::read(bytes) else { return };
    let mut all = Vec::new();
    let whole = piece.records((piece.from, piece.upto), &mut all);
    if whole.is_ok() && !all.is_empty() && piece.from < piece.upto {
        let next = piece.from + 1;
        let Ok(shorter) = piece.without_first(history, next) else { return };
        let mut rest = Vec::new();
        shorter.records((next, piece.upto), &mut rest).expect("invariant: a part of what was read is read");
        assert_eq!(rest.len(), all.iter().filter(|record| record.log_id.index >= next).count());
    }
}
