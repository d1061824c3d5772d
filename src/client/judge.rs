//! What a failed attempt means: the one place that decides whether an operation may be tried again.
//!
//! | failure | write in a session | write without | read |
//! |---|---|---|---|
//! | it was not sent, or refused for a while | again | again | again |
//! | it was sent, and the outcome is unknown | again: the server knows it | error, *maybe applied* | again |
//! | session gone, no attempt can have been applied | again in a new session | | |
//! | session gone, an attempt may have been applied | error, *maybe applied* | | |
//! | the disk is full or hangs, the table of sessions is full | again: another node may lead soon; at the deadline, that error | the same | the same |
//! | the request is at fault | error | error | error |

use tokio::time::error::Elapsed;
use tonic::Code;

use super::attempt::{AttemptError, Kind, describe, is_unconnected};
use super::endpoint::Endpoint;
use super::error::{ClientError, UnconfirmedAnswer};
use crate::call::{Header, decode_position};
use crate::proto::{details, v1};
use crate::reason::Reason;

/// Why an attempt failed, on this side or on the server's.
#[derive(Debug)]
pub(crate) enum Failure {
    Attempt(AttemptError),
    Answered(v1::Failure),
}

/// What to do about it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Return(ClientError),
    /// Try another node, at once if one is known.
    Elsewhere,
    /// Try again after a pause.
    Later,
    /// Try again after a pause, or once another node leads; the error if it lasts until the deadline.
    Patiently(ClientError),
    /// Try again in a new session.
    NewSession,
}

/// What the judge must know about the operation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) kind: Kind,
    /// Whether the server recognises a repeated attempt.
    pub(crate) in_session: bool,
    /// Whether an attempt before this one may have been applied.
    pub(crate) undecided: bool,
}

impl Failure {
    /// Of an attempt on a pipeline.
    pub(crate) fn of_attempt(error: AttemptError) -> Self {
        match error {
            AttemptError::Refused(failure) => Self::Answered(failure.as_ref().clone()),
            error => Self::Attempt(error),
        }
    }

    /// Whether this attempt of a write may have been applied, or may still be.
    pub(crate) fn maybe_applied(&self) -> bool {
        match self {
            Self::Attempt(
                AttemptError::NotSent(_) | AttemptError::Refused(_) | AttemptError::Expired { sent: false },
            ) => false,
            Self::Attempt(_) => true,
            Self::Answered(answer) => answer.maybe_applied,
        }
    }

    pub(crate) fn is_refusal(&self) -> bool {
        self.reason() == Some(Reason::NotLeader)
    }

    /// What the server says. A reason that this version does not know counts as none: then the gRPC code decides.
    pub(crate) fn reason(&self) -> Option<Reason> {
        match self {
            Self::Attempt(_) => None,
            Self::Answered(answer) => Some(reason(answer)),
        }
    }

    /// The failure that a call other than a pipeline ended with.
    pub(crate) fn of_call(status: &tonic::Status) -> Self {
        if let Some(failure) = details::failure(status.details()) {
            return Self::Answered(failure);
        }
        // A server that does not know the call has not done anything, and is no node of this version.
        if is_unconnected(status) || status.code() == Code::Unimplemented {
            return Self::Attempt(AttemptError::NotSent(describe(status)));
        }
        // Not from a node but from the transport to it.
        if std::error::Error::source(status).is_some() {
            return Self::Attempt(AttemptError::Lost(describe(status)));
        }
        let (code, message) = (status.code().into(), status.message().to_owned());
        Self::Answered(v1::Failure { code, message, ..Default::default() })
    }
}

/// Whether the operation may be tried again after `failure`.
pub(crate) fn judge(case: Case, endpoint: &Endpoint, failure: &Failure) -> Verdict {
    let unsafe_write = case.kind == Kind::Write && !case.in_session;
    let answer = match failure {
        Failure::Attempt(AttemptError::Lost(_)) if unsafe_write => {
            return Verdict::Return(failed(endpoint, Reason::Interrupted, in_words(failure), true));
        }
        Failure::Attempt(AttemptError::LeaderChanged) if unsafe_write => {
            return Verdict::Return(failed(endpoint, Reason::Interrupted, in_words(failure), true));
        }
        // Outside a session a write expires at its deadline only, which the caller looks after.
        Failure::Attempt(_) => return Verdict::Elsewhere,
        Failure::Answered(answer) => answer,
    };
    let by_reason = by_reason(case, endpoint, failure, answer);
    let reason = reason(answer);
    match by_reason {
        Err(decided @ (Verdict::Return(_) | Verdict::NewSession)) => return decided,
        // Whatever the reason: sent again it could be applied twice.
        _ if answer.maybe_applied && unsafe_write => {
            return Verdict::Return(failed(endpoint, reason, in_words(failure), true));
        }
        Err(verdict) | Ok(Some(verdict)) => return verdict,
        Ok(None) => {}
    }
    // The server does not know the outcome, whatever the reason: it will recognise the write.
    if answer.maybe_applied && case.kind == Kind::Write {
        return Verdict::Later;
    }
    match Code::from(answer.code) {
        Code::InvalidArgument | Code::OutOfRange => rejected(Reason::Invalid, answer),
        Code::Unavailable | Code::ResourceExhausted | Code::Aborted => Verdict::Later,
        // Of gRPC, whose codes are not ours.
        _ => Verdict::Return(failed(endpoint, reason, in_words(failure), false)),
    }
}

/// The verdict on the reason, if it has any; as an error where it leaves no choice, whatever the answer says of the outcome.
fn by_reason(
    case: Case,
    endpoint: &Endpoint,
    failure: &Failure,
    answer: &v1::Failure,
) -> Result<Option<Verdict>, Verdict> {
    let reason = reason(answer);
    let failed = |maybe_applied| failed(endpoint, reason, in_words(failure), maybe_applied);
    Err(match reason {
        Reason::TooLarge
        | Reason::Invalid
        | Reason::Undecodable
        | Reason::Unauthenticated
        | Reason::PermissionDenied => rejected(reason, answer),
        Reason::SessionExpired if case.in_session && !case.undecided => Verdict::NewSession,
        Reason::SessionExpired => Verdict::Return(failed(case.undecided)),
        // We never say that a write is settled and then send it: something is broken.
        Reason::AnswerForgotten => Verdict::Return(failed(true)),
        Reason::TooManySessions => Verdict::Patiently(failed(false)),
        Reason::DiskFull | Reason::DiskStalled => Verdict::Patiently(failed(answer.maybe_applied)),
        // The last member may be being upgraded.
        Reason::VersionNotAgreed => Verdict::Patiently(failed(false)),
        Reason::AckTimeout => Verdict::Return(ClientError::AckTimeout {
            endpoint: endpoint.clone(),
            position: answer.position.map(decode_position),
            missing: answer.missing.clone(),
            answer: answer.unconfirmed.as_deref().cloned().map(
                |v1::UnconfirmedAnswer { header, response }| {
                    let header = Header::decode(header);
                    Box::new(UnconfirmedAnswer { header, payload: response, ..UnconfirmedAnswer::default() })
                },
            ),
        }),
        Reason::Compacted if answer.first_revision > 0 => {
            Verdict::Return(ClientError::Compacted { first_revision: answer.first_revision })
        }
        // What is gone is a state, and not the history of one.
        Reason::Compacted => Verdict::Return(failed(false)),
        // What an earlier attempt did, it did in a cluster that is no more.
        Reason::OtherHistory => Verdict::Return(failed(case.undecided)),
        // Nothing that passes by itself.
        Reason::QuotaExceeded | Reason::Ahead | Reason::NotFound | Reason::ConditionFailed => {
            Verdict::Return(failed(answer.maybe_applied))
        }
        Reason::NotLeader
        | Reason::Stopped
        | Reason::Lagged
        | Reason::Interrupted
        | Reason::NoQuorum
        | Reason::Behind
        | Reason::Diverged
        | Reason::Unreachable => return Ok(Some(Verdict::Elsewhere)),
        Reason::Overloaded | Reason::WindowExceeded | Reason::LimitReached | Reason::DeadlineExceeded => {
            return Ok(Some(Verdict::Later));
        }
        Reason::Membership | Reason::Unspecified => return Ok(None),
    })
}

/// Whether the node refuses whoever asks, and not what is asked for.
pub(crate) fn is_unwelcome(failure: &v1::Failure) -> bool {
    matches!(reason(failure), Reason::Unauthenticated | Reason::PermissionDenied)
}

fn rejected(reason: Reason, answer: &v1::Failure) -> Verdict {
    Verdict::Return(ClientError::Rejected { reason, message: answer.message.clone() })
}

fn reason(answer: &v1::Failure) -> Reason {
    Reason::try_from(answer.reason).unwrap_or(Reason::Unspecified)
}

pub(crate) fn failed(
    endpoint: &Endpoint,
    reason: Reason,
    message: String,
    maybe_applied: bool,
) -> ClientError {
    ClientError::Failed { endpoint: endpoint.clone(), reason, message, maybe_applied }
}

/// What a call brought that had a limited time.
pub(crate) async fn in_time<T>(
    call: impl Future<Output = Result<Result<T, tonic::Status>, Elapsed>>,
) -> Result<T, Failure> {
    match call.await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) => Err(Failure::of_call(&status)),
        Err(_) => Err(Failure::Attempt(AttemptError::Expired { sent: true })),
    }
}

pub(crate) fn in_words(failure: &Failure) -> String {
    match failure {
        Failure::Attempt(AttemptError::NotSent(why)) => why.to_string(),
        Failure::Attempt(AttemptError::Lost(why)) => format!("the connection was lost: {why}"),
        Failure::Attempt(AttemptError::Expired { sent: false }) => "no connection in time".to_owned(),
        Failure::Attempt(AttemptError::Expired { sent: true }) => "no answer in time".to_owned(),
        Failure::Attempt(AttemptError::Refused(refused)) => refused.message.clone(),
        Failure::Attempt(AttemptError::LeaderChanged) => {
            "the node has not answered, and another leads by now".to_owned()
        }
        Failure::Answered(answer) if answer.message.is_empty() => {
            Code::from(answer.code).description().to_owned()
        }
        Failure::Answered(answer) => answer.message.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn endpoint() -> Endpoint {
        Endpoint::parse("n1:1").unwrap()
    }

    fn answered(reason: Reason, maybe_applied: bool) -> Failure {
        Failure::Answered(v1::Failure { reason: reason.into(), maybe_applied, ..Default::default() })
    }

    /// First attempt of a write in a session, later one whose earlier attempts are undecided, write without a
    /// session, read.
    const CASES: [Case; 4] = [
        Case { kind: Kind::Write, in_session: true, undecided: false },
        Case { kind: Kind::Write, in_session: true, undecided: true },
        Case { kind: Kind::Write, in_session: false, undecided: false },
        Case { kind: Kind::AtLeader, in_session: false, undecided: false },
    ];

    /// What `judge` says, in one letter: (r)eturn undecided, return (d)ecided, (e)lsewhere, (l)ater, (p)atiently,
    /// (n)ew session.
    fn letter(case: Case, failure: &Failure) -> char {
        match judge(case, &endpoint(), failure) {
            Verdict::Return(error) if error.maybe_applied() => 'r',
            Verdict::Return(_) => 'd',
            Verdict::Elsewhere => 'e',
            Verdict::Later => 'l',
            Verdict::Patiently(_) => 'p',
            Verdict::NewSession => 'n',
        }
    }

    #[test]
    fn a_write_is_repeated_only_in_a_session_or_when_it_was_not_applied() {
        let why: Arc<str> = "x".into();
        let stopped = Arc::new(v1::Failure { reason: Reason::Stopped.into(), ..Default::default() });
        let table = [
            (Failure::Attempt(AttemptError::NotSent(why.clone())), "eeee"),
            (Failure::Attempt(AttemptError::Expired { sent: false }), "eeee"),
            (Failure::Attempt(AttemptError::Expired { sent: true }), "eeee"),
            (Failure::Attempt(AttemptError::Lost(why)), "eere"),
            (Failure::Attempt(AttemptError::LeaderChanged), "eere"),
            (Failure::of_attempt(AttemptError::Refused(stopped)), "eeee"),
            (answered(Reason::NotLeader, false), "eeee"),
            (answered(Reason::NotLeader, true), "eere"),
            (answered(Reason::Overloaded, false), "llll"),
            (answered(Reason::Interrupted, true), "eere"),
            (answered(Reason::NoQuorum, true), "eere"),
            (answered(Reason::NoQuorum, false), "eeee"),
            (answered(Reason::Stopped, true), "eere"),
            (answered(Reason::Stopped, false), "eeee"),
            (answered(Reason::Behind, false), "eeee"),
            (answered(Reason::TooLarge, false), "dddd"),
            (answered(Reason::Invalid, false), "dddd"),
            (answered(Reason::Unspecified, true), "llrd"),
            (answered(Reason::Unspecified, false), "dddd"),
            (answered(Reason::SessionExpired, false), "nrdd"),
            (answered(Reason::WindowExceeded, false), "llll"),
            (answered(Reason::TooManySessions, false), "pppp"),
            (answered(Reason::AnswerForgotten, false), "rrrr"),
            (answered(Reason::AckTimeout, true), "rrrr"),
            (answered(Reason::DiskFull, false), "pppp"),
            (answered(Reason::DiskFull, true), "pprp"),
            (answered(Reason::DiskStalled, true), "pprp"),
            (answered(Reason::TooManySessions, true), "pprp"),
            (answered(Reason::VersionNotAgreed, true), "pprp"),
            (answered(Reason::DiskStalled, false), "pppp"),
            (answered(Reason::Compacted, false), "dddd"),
            (answered(Reason::Membership, false), "dddd"),
            (answered(Reason::QuotaExceeded, false), "dddd"),
            (answered(Reason::LimitReached, false), "llll"),
            (answered(Reason::OtherHistory, false), "drdd"),
            (answered(Reason::Ahead, false), "dddd"),
            (answered(Reason::Diverged, false), "eeee"),
            (answered(Reason::Undecodable, false), "dddd"),
            (answered(Reason::DeadlineExceeded, true), "llrl"),
            (answered(Reason::DeadlineExceeded, false), "llll"),
            (answered(Reason::NotFound, false), "dddd"),
            (answered(Reason::ConditionFailed, false), "dddd"),
        ];
        for (failure, expected) in table {
            let letters: String = CASES.iter().map(|case| letter(*case, &failure)).collect();
            assert_eq!(letters, expected, "{failure:?}");
        }
    }

    #[test]
    fn a_state_that_is_gone_is_no_history_to_be_watched() {
        let message = "read the range again from its beginning".to_owned();
        let gone = |first_revision| {
            let reason = Reason::Compacted.into();
            let message = message.clone();
            Failure::Answered(v1::Failure { reason, message, first_revision, ..Default::default() })
        };
        let [.., read] = CASES;
        let range = Verdict::Return(failed(&endpoint(), Reason::Compacted, message.clone(), false));
        assert_eq!(judge(read, &endpoint(), &gone(0)), range);
        let watch = Verdict::Return(ClientError::Compacted { first_revision: 7 });
        assert_eq!(judge(read, &endpoint(), &gone(7)), watch);
    }

    #[test]
    fn an_unknown_reason_is_judged_by_its_code() {
        let unknown = |code: Code| {
            Failure::Answered(v1::Failure { code: code.into(), reason: 9999, ..Default::default() })
        };
        for (code, expected) in
            [(Code::Unavailable, "llll"), (Code::InvalidArgument, "dddd"), (Code::Internal, "dddd")]
        {
            let letters: String = CASES.iter().map(|case| letter(*case, &unknown(code))).collect();
            assert_eq!(letters, expected, "{code:?}");
        }
    }

    #[test]
    fn a_call_fails_with_what_is_in_its_details_or_with_its_code() {
        let sent = v1::Failure { reason: Reason::Compacted.into(), first_revision: 7, ..Default::default() };
        // A server of before wrote the failure without anything around it.
        let bare = prost::Message::encode_to_vec(&sent).into();
        for details in [details::of_failure(&sent), bare] {
            let status = tonic::Status::with_details(Code::OutOfRange, "x", details);
            let Failure::Answered(received) = Failure::of_call(&status) else { panic!("no answer") };
            assert_eq!(received, sent);
        }
        let Failure::Answered(bare) = Failure::of_call(&tonic::Status::internal("x")) else {
            panic!("no answer")
        };
        assert_eq!((bare.code, bare.message.as_str()), (Code::Internal.into(), "x"));
        let other_port = Failure::of_call(&tonic::Status::unimplemented("x"));
        assert!(!other_port.maybe_applied() && in_words(&other_port).contains("peer port"), "{other_port:?}");
    }
}
