//! Failures that only this service has.

use crate::door::failure::{failure, stopped};
use crate::error::ReadError;
use crate::feed::FeedError;
use crate::proto::v1::Failure;
use crate::reason::Reason;
use crate::types::{HistoryEpoch, LogId};

/// What was applied at `from` and later, in `history`, cannot be told.
pub(super) fn of_feed(error: FeedError, from: u64, history: HistoryEpoch) -> Failure {
    match error {
        FeedError::Compacted { first } => compacted(from, first),
        FeedError::OtherHistory { known } => ReadError::OtherHistory { given: history, known }.into(),
        FeedError::Stopped => stopped(error.to_string()),
        FeedError::Unreadable { .. } => failure(Reason::Unspecified, error.to_string(), false, None),
    }
}

/// What can be told begins later than what was asked for.
fn compacted(from_revision: u64, first_revision: u64) -> Failure {
    let message = format!(
        "this node keeps what was written from revision {first_revision} on, which is after {from_revision}: read the range, and watch from the revision of that read plus one"
    );
    Failure { first_revision, ..failure(Reason::Compacted, message, false, None) }
}

/// A range was to go on with a state that is not kept any more.
pub(super) fn forgotten_moment(at: LogId) -> Failure {
    let message = format!(
        "this node does not keep the state after entry {at} for readers, or not any more: read the range again from its beginning"
    );
    failure(Reason::Compacted, message, false, None)
}

/// What has been replaced since a range began is more than the node keeps.
pub(super) fn too_much_pinned(most_bytes: u64) -> Failure {
    let message = format!(
        "more than {most_bytes} bytes have been overwritten or removed since this range began, which is all that this node keeps for readers, a sixteenth of its memory (memory_bytes): read the range again from its beginning, and faster, or while less is written"
    );
    failure(Reason::Compacted, message, false, None)
}

/// As many long ranges are under way as a node serves.
pub(super) fn too_many_ranges() -> Failure {
    let message = format!(
        "{} long ranges are under way on this connection, or {} on this node; try again",
        super::ranges::MAX_CONNECTION_LONG_RANGES,
        super::moments::MAX_LONG_RANGES
    );
    failure(Reason::LimitReached, message, false, None)
}
