//! Why a follower is told nothing more.

use std::time::Duration;

use tonic::Status;

use crate::door::failure::{failure, of_transport, stopped};
use crate::engine::FollowError;
use crate::error::ReadError;
use crate::feed::FeedError;
use crate::proto::details;
use crate::proto::v1::Failure;
use crate::reason::Reason;
use crate::types::HistoryEpoch;

/// What follows a position of `history` cannot be told.
pub(super) fn of_feed(error: FeedError, history: HistoryEpoch) -> Failure {
    let message = error.to_string();
    match error {
        FeedError::Compacted { first } => compacted(message, first),
        FeedError::OtherHistory { known } => ReadError::OtherHistory { given: history, known }.into(),
        FeedError::Stopped => stopped(message),
        FeedError::Unreadable { .. } => failure(Reason::Unspecified, message, false, None),
    }
}

/// A position cannot be followed from.
pub(super) fn of_follow(error: FollowError) -> Failure {
    let message = error.to_string();
    match error {
        FollowError::Compacted { first, .. } => compacted(message, first),
        FollowError::Position(error) => error.into(),
    }
}

fn compacted(message: String, first: u64) -> Failure {
    Failure { first_revision: first, ..failure(Reason::Compacted, message, false, None) }
}

/// The node drains.
pub(in crate::node) fn draining() -> Failure {
    stopped("the node is shutting down; go on at another one".to_owned())
}

/// The follower has a full window and acknowledges nothing.
pub(super) fn unacknowledged(patience: Duration) -> Failure {
    let message = format!(
        "the window has been full for {} s and nothing was acknowledged, so the node has ended the stream; follow again from the last position that was taken",
        patience.as_secs()
    );
    failure(Reason::Lagged, message, false, None)
}

/// The follower takes nothing of what it is sent.
pub(super) fn untaken() -> Failure {
    let message = "nothing was taken from the stream for minutes, so the node has ended it; follow again from the last position that was taken";
    failure(Reason::Lagged, message.to_owned(), false, None)
}

/// The state that is being sent keeps alive more than there is memory for.
pub(super) fn too_much_replaced(most_bytes: u64) -> Failure {
    let message = format!(
        "more than {most_bytes} bytes have been overwritten or removed since this state began to be sent, which is all that this node keeps for readers (memory_bytes): follow again, and take it faster, or while less is written"
    );
    failure(Reason::Lagged, message, false, None)
}

/// The first message did not come.
pub(in crate::node) fn says_nothing(patience: Duration) -> Failure {
    let message = format!(
        "the follower did not say within {} s where to begin: the first message says it",
        patience.as_secs()
    );
    failure(Reason::DeadlineExceeded, message, false, None)
}

/// A message of the follower cannot be read.
pub(super) fn unread(status: &Status) -> Failure {
    details::failure(status.details()).unwrap_or_else(|| of_transport(status, "", false))
}
