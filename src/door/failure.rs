//! The one place that turns errors into what callers are told: a [`Failure`], by itself on a pipeline, and
//! in the details of a gRPC status on a unary call.
//!
//! Codes, and what a caller does about each reason, are in [`crate::reason`] and `docs/OPERATIONS.md`. `UNAVAILABLE` is
//! never used for a write that may have been applied: generic gRPC clients retry it.

use tonic::Code;

use crate::call::{Rejected, encode_leader, encode_position};
use crate::error::{Leader, OperationError, Told};
use crate::proto::details;
use crate::proto::v1::Failure;
use crate::reason::Reason;
use crate::runtime::panic_message;
use crate::shown::{MESSAGE_BYTES, Shown, shortened};
use crate::types::HistoryEpoch;

use super::limits::Bound;

impl<E: OperationError> From<E> for Failure {
    fn from(error: E) -> Self {
        let Told { reason, maybe_applied, leader, standing } = error.told();
        let told = failure(reason, error.to_string(), maybe_applied, leader.cloned());
        // Of which history is for the [answerer](super::Answerer) to say.
        let at = standing.map(|(at, _)| encode_position(at, HistoryEpoch::UNKNOWN));
        Self {
            position: at,
            missing: standing.map(|(_, missing)| missing.to_vec()).unwrap_or_default(),
            ..told
        }
    }
}

impl From<Rejected> for Failure {
    fn from(rejected: Rejected) -> Self {
        let Rejected { reason, message, maybe_applied } = rejected;
        // The words of a guest, whose reasons are its own.
        as_told(reason, message, maybe_applied, None)
    }
}

/// The node cannot go on with a stream.
pub(crate) fn stopped(reason: String) -> Failure {
    failure(Reason::Stopped, reason, false, None)
}

/// The client has taken nothing of a stream for too long.
pub(crate) fn too_slow(patience: std::time::Duration) -> Failure {
    let message = format!(
        "nothing was read from the stream for {} s, so the node has ended it; open another one where this one stopped",
        patience.as_secs()
    );
    failure(Reason::Behind, message, false, None)
}

/// A call whose deadline has passed, or is about to: `maybe_applied` when a write was under way.
pub(crate) fn deadline_exceeded(maybe_applied: bool) -> Failure {
    let message = match maybe_applied {
        true => {
            "the call's deadline has passed while it was under way: it may have been applied, or may be yet"
        }
        false => "the call's deadline has passed",
    };
    failure(Reason::DeadlineExceeded, message.to_owned(), maybe_applied, None)
}

/// A connection has, or all have, as many watches as there may be.
pub(crate) fn too_many_watches(bound: Bound) -> Failure {
    let message = format!(
        "this node serves {} watches on one connection and {} in all; close some, or watch at another node (max_connection_watches, max_watches)",
        bound.each, bound.all
    );
    failure(Reason::LimitReached, message, false, None)
}

/// Too much of a connection's requests, or of all, has arrived only in part.
pub(crate) fn too_much_unfinished(bound: Bound) -> Failure {
    let message = format!(
        "requests that have not arrived as a whole may take {} bytes on one connection and {} in all; send fewer large ones at a time (max_connection_unfinished_bytes, max_unfinished_bytes)",
        bound.each, bound.all
    );
    failure(Reason::LimitReached, message, false, None)
}

/// Too much of what a connection was answered has not been taken.
pub(crate) fn too_much_unsent(bound: Bound) -> Failure {
    let message = format!(
        "{} bytes of answers wait on this connection, and nothing more is answered there before they are read (max_connection_unsent_bytes)",
        bound.each
    );
    failure(Reason::LimitReached, message, false, None)
}

/// A write was applied, and there is no room for what it read.
pub(crate) fn no_room_for_answer(bound: Bound) -> Failure {
    let message = format!(
        "it was applied, but {} bytes of answers wait on this connection, so there is no room for its own; read them (max_connection_unsent_bytes)",
        bound.each
    );
    failure(Reason::Interrupted, message, true, None)
}

/// A request that does not arrive as a whole.
pub(crate) fn unfinished(silent: std::time::Duration, total: std::time::Duration) -> Failure {
    let message = format!(
        "the request did not arrive as a whole: no byte of it came for {} s, or the rest of it not within {} s; send it again",
        silent.as_secs(),
        total.as_secs()
    );
    failure(Reason::LimitReached, message, false, None)
}

/// A pipeline whose client does not read.
pub(crate) fn pipeline_not_read(patience: std::time::Duration, bound: Bound) -> Failure {
    let message = format!(
        "answers have waited on this pipeline for {} s without room for another, {} bytes at most and {} for all pipelines; read them, and go on with another pipeline (max_pipeline_queued_bytes, max_queued_bytes)",
        patience.as_secs(),
        bound.each,
        bound.all
    );
    // Answers to writes may be among those that are let go.
    failure(Reason::LimitReached, message, true, None)
}

/// All connections that there may be are busy.
pub(crate) fn no_place(limit: usize) -> Failure {
    let message = format!(
        "{limit} connections are busy on this node, and the places beside them are for probes and operators; try again, or another node (max_connections)"
    );
    failure(Reason::LimitReached, message, false, None)
}

/// What the transport says of a call at `path` that it has not taken, or whose answer it has cut short. The code is that of
/// the reason, but for what is not there: generic clients know that by `UNIMPLEMENTED`, which no reason has.
pub(crate) fn of_transport(status: &tonic::Status, path: &str, maybe_applied: bool) -> Failure {
    let said = status.message();
    let (reason, message) = match status.code() {
        Code::Unimplemented if said.is_empty() => (Reason::Invalid, format!("there is no {}", Shown(path))),
        // Such as an encoding.
        Code::Unimplemented => (Reason::Invalid, said.to_owned()),
        // It says so of requests that cannot be decoded.
        Code::Internal if !maybe_applied => (Reason::Invalid, format!("the request cannot be read: {said}")),
        Code::InvalidArgument => (Reason::Invalid, said.to_owned()),
        Code::PermissionDenied => (Reason::PermissionDenied, said.to_owned()),
        Code::Unauthenticated => (Reason::Unauthenticated, said.to_owned()),
        Code::OutOfRange => (Reason::TooLarge, said.to_owned()),
        Code::ResourceExhausted => (Reason::LimitReached, said.to_owned()),
        Code::NotFound => (Reason::NotFound, said.to_owned()),
        Code::Unavailable => (Reason::Stopped, said.to_owned()),
        Code::DeadlineExceeded => (Reason::DeadlineExceeded, said.to_owned()),
        Code::Cancelled | Code::Aborted => (Reason::Interrupted, said.to_owned()),
        _ => (Reason::Unspecified, said.to_owned()),
    };
    // The reason is guessed from a code.
    let told = as_told(reason, message, maybe_applied, None);
    match status.code() {
        Code::Unimplemented => Failure { code: Code::Unimplemented as i32, ..told },
        _ => told,
    }
}

/// Why a message of a stream was not read. Nothing of it was begun, and what came before it is answered.
pub(crate) fn unread(status: tonic::Status) -> tonic::Status {
    match details::failure(status.details()) {
        Some(_) => status,
        None => of_transport(&status, "", false).into(),
    }
}

/// The guest has made a write of what it lists as a read, or the other way round.
pub(crate) fn mixed_up() -> Failure {
    let message = "this node takes the request for a read in one place and for a write in another; this is a defect of what it serves";
    failure(Reason::Unspecified, message.to_owned(), false, None)
}

/// The guest has panicked.
pub(crate) fn panicked(panic: &(dyn std::any::Any + Send), maybe_applied: bool) -> Failure {
    let what = panic_message(panic);
    tracing::error!(what, "what this node serves has panicked; the request that brought it about fails");
    let message = format!("what this node serves has panicked, which is a defect of it: {what}");
    failure(Reason::Unspecified, message, maybe_applied, None)
}

/// A stream that ends without a word.
pub(crate) fn broken_off() -> Failure {
    let message = "the stream broke off: what follows was not sent; ask for it again from there";
    failure(Reason::Interrupted, message.to_owned(), false, None)
}

/// An answer that no message can carry.
pub(crate) fn answer_too_large(bytes: usize, limit: usize, maybe_applied: bool) -> Failure {
    let message = format!("the answer has {bytes} bytes, and at most {limit} can be sent; ask for less");
    failure(Reason::TooLarge, message, maybe_applied, None)
}

/// The caller has shown no credential that is valid. Which of them is wrong with it is not told.
pub(crate) fn unauthenticated() -> Failure {
    let message = "this node asks its callers who they are, and this call has no credential that is valid: give a token (authorization: Bearer TOKEN; --token-file, QUORATE_TOKEN), or a newer one";
    failure(Reason::Unauthenticated, message.to_owned(), false, None)
}

/// A stream whose credential has come to its end.
pub(crate) fn no_longer_authenticated() -> Failure {
    let message = "the credential that this stream was opened with has expired or is withdrawn: open another one with a newer token; what was sent is answered or may have been applied";
    failure(Reason::Unauthenticated, message.to_owned(), false, None)
}

/// What was asked for is not granted to the caller. Whether it exists is not told.
pub(crate) fn permission_denied() -> Failure {
    let message = "what is asked for is not granted to this caller: ask those who run the cluster for a token with more rights, or ask for less";
    failure(Reason::PermissionDenied, message.to_owned(), false, None)
}

/// The caller asks for more than its credential allows at a time.
pub(crate) fn too_much_asked() -> Failure {
    let message = "this caller has as many calls under way, or asks for as much in a second, as its credential allows (limits); try again after a pause";
    failure(Reason::LimitReached, message.to_owned(), false, None)
}

/// A request that makes no sense.
pub(crate) fn invalid(message: &str) -> Failure {
    failure(Reason::Invalid, message.to_owned(), false, None)
}

/// A request that says nothing, or nothing that this node has heard of.
pub(crate) fn unknown_request() -> Failure {
    invalid("the request is empty, or of a kind that this node does not know")
}

/// A call of a method that the node's guest does not have.
pub(crate) fn unknown_method(name: &str) -> Failure {
    invalid(&format!(
        "this node serves nothing called `{}`: it is of another program, or of an older version",
        Shown(name)
    ))
}

/// A failure for `reason`, of which the table does not say otherwise.
pub(crate) fn failure(
    reason: Reason,
    message: String,
    maybe_applied: bool,
    leader: Option<Leader>,
) -> Failure {
    let known = reason.row().maybe_applied;
    debug_assert!(
        known.is_none_or(|known| known == maybe_applied),
        "the table says otherwise of {reason:?}: {message}"
    );
    as_told(reason, message, maybe_applied, leader)
}

fn as_told(reason: Reason, message: String, maybe_applied: bool, leader: Option<Leader>) -> Failure {
    Failure {
        code: reason.grpc_code(maybe_applied, leader.is_some()) as i32,
        reason: reason.into(),
        message: shortened(&message, MESSAGE_BYTES),
        maybe_applied,
        leader: leader.map(encode_leader),
        ..Default::default()
    }
}

/// The details of a status are sent in a header, and peers take few kilobytes of those: a longer response is left out there.
const MOST_DETAILED_BYTES: usize = 2048;

impl From<Failure> for tonic::Status {
    fn from(mut failure: Failure) -> Self {
        failure.unconfirmed =
            failure.unconfirmed.filter(|answer| answer.response.len() <= MOST_DETAILED_BYTES);
        let details = details::of_failure(&failure);
        tonic::Status::with_details(Code::from_i32(failure.code), failure.message, details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{ReadError, SnapshotError, WriteError};

    fn leader() -> Option<Leader> {
        Some(Leader { node_id: 2, client: "b:7802".to_owned() })
    }

    #[test]
    fn every_error_has_its_reason_and_code() {
        let stopped = |maybe_applied| WriteError::Stopped { reason: "full disk".to_owned(), maybe_applied };
        let cases: [(Failure, Reason, Code, bool, bool); 16] = [
            (
                WriteError::NotLeader { leader: leader() }.into(),
                Reason::NotLeader,
                Code::FailedPrecondition,
                false,
                true,
            ),
            (
                WriteError::NotLeader { leader: None }.into(),
                Reason::NotLeader,
                Code::Unavailable,
                false,
                false,
            ),
            (
                WriteError::TooLarge { bytes: 2, limit: 1 }.into(),
                Reason::TooLarge,
                Code::InvalidArgument,
                false,
                false,
            ),
            (WriteError::Overloaded.into(), Reason::Overloaded, Code::ResourceExhausted, false, false),
            (
                WriteError::DiskFull { available_bytes: 1 }.into(),
                Reason::DiskFull,
                Code::ResourceExhausted,
                false,
                false,
            ),
            (
                WriteError::DiskStalled { writing_for: std::time::Duration::from_secs(2) }.into(),
                Reason::DiskStalled,
                Code::Unavailable,
                false,
                false,
            ),
            (
                WriteError::QuotaExceeded { state_bytes: 9, quota_bytes: 9 }.into(),
                Reason::QuotaExceeded,
                Code::ResourceExhausted,
                false,
                false,
            ),
            (
                WriteError::Interrupted { leader: leader() }.into(),
                Reason::Interrupted,
                Code::Unknown,
                true,
                true,
            ),
            (stopped(true).into(), Reason::Stopped, Code::Unknown, true, false),
            (stopped(false).into(), Reason::Stopped, Code::Unavailable, false, false),
            (
                ReadError::NotLeader { leader: leader() }.into(),
                Reason::NotLeader,
                Code::FailedPrecondition,
                false,
                true,
            ),
            (
                ReadError::NoQuorum { reason: "r".to_owned() }.into(),
                Reason::NoQuorum,
                Code::Unavailable,
                false,
                false,
            ),
            (
                ReadError::Stopped { reason: "r".to_owned() }.into(),
                Reason::Stopped,
                Code::Unavailable,
                false,
                false,
            ),
            (Rejected::invalid("r").into(), Reason::Invalid, Code::InvalidArgument, false, false),
            (
                Rejected::new(Reason::TooLarge, "r").into(),
                Reason::TooLarge,
                Code::InvalidArgument,
                false,
                false,
            ),
            (invalid("no request"), Reason::Invalid, Code::InvalidArgument, false, false),
        ];
        for (failure, reason, code, maybe_applied, leader_known) in cases {
            assert_eq!(failure.reason(), reason, "{failure:?}");
            assert_eq!(failure.code, code as i32, "{failure:?}");
            assert_eq!(failure.maybe_applied, maybe_applied, "{failure:?}");
            assert_eq!(failure.leader.is_some(), leader_known, "{failure:?}");
            assert!(!failure.message.is_empty());
        }
    }

    #[test]
    fn what_the_transport_says_has_the_code_of_its_reason() {
        for maybe_applied in [false, true] {
            for code in (1..=16).map(Code::from_i32) {
                let told = of_transport(&tonic::Status::new(code, "x"), "/a/B", maybe_applied);
                let expected = match code {
                    Code::Unimplemented => Code::Unimplemented as i32,
                    _ => told.reason().grpc_code(maybe_applied, false) as i32,
                };
                assert_eq!((told.code, told.maybe_applied), (expected, maybe_applied), "{code:?}");
            }
        }
        let unread = |code| {
            let status = unread(tonic::Status::new(code, "x"));
            (
                status.code(),
                details::failure(status.details()).map(|told| (told.reason(), told.maybe_applied)),
            )
        };
        assert_eq!(unread(Code::Internal), (Code::InvalidArgument, Some((Reason::Invalid, false))));
        assert_eq!(unread(Code::OutOfRange), (Code::InvalidArgument, Some((Reason::TooLarge, false))));
        let message = |said: &str| of_transport(&tonic::Status::unimplemented(said), "/a/B", false).message;
        assert_eq!((message(""), message("no gzip")), ("there is no /a/B".to_owned(), "no gzip".to_owned()));
    }

    #[test]
    fn a_snapshot_that_is_being_written_may_come_yet() {
        let told = Failure::from(SnapshotError::Timeout { waited_ms: 1 });
        assert_eq!((told.reason(), told.maybe_applied), (Reason::DeadlineExceeded, true));
    }

    #[test]
    fn no_failure_says_otherwise_than_the_table() {
        let (bound, second) = (Bound { each: 1, all: 2 }, std::time::Duration::from_secs(1));
        let told = [
            stopped(String::new()),
            too_slow(second),
            deadline_exceeded(true),
            deadline_exceeded(false),
            too_many_watches(bound),
            too_much_unfinished(bound),
            too_much_unsent(bound),
            no_room_for_answer(bound),
            unfinished(second, second),
            pipeline_not_read(second, bound),
            no_place(1),
            mixed_up(),
            panicked(&"x", true),
            panicked(&"x", false),
            broken_off(),
            answer_too_large(2, 1, true),
            answer_too_large(2, 1, false),
            invalid("x"),
        ];
        for failure in told {
            let known = failure.reason().row().maybe_applied;
            assert!(known.is_none_or(|known| known == failure.maybe_applied), "{failure:?}");
        }
    }

    #[test]
    fn a_status_carries_the_failure() {
        let failure = Failure::from(WriteError::NotLeader { leader: leader() });
        let status = tonic::Status::from(failure.clone());
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(status.message(), failure.message);
        assert_eq!(details::failure(status.details()), Some(failure));
    }
}
