//! One attempt: where it goes, what comes of it, and how long to wait before the next.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::proto::v1;
use crate::runtime;
use crate::shown;

/// Where an attempt goes, and whether repeating it is harmless.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// To the leader; repeating it is harmless only within a session.
    Write,
    /// To the leader; harmless to repeat.
    AtLeader,
    /// To any node; harmless to repeat.
    Anywhere,
}

/// Where an attempt goes, and how it is waited for there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) kind: Kind,
    /// Whether the caller wants this node and no other.
    pub(crate) bound: bool,
    /// Whether its answer waits for the slowest voter: that it is late says nothing of the leader.
    pub(crate) waits_for_all: bool,
}

impl Way {
    pub(crate) fn of(kind: Kind) -> Self {
        Self { kind, bound: false, waits_for_all: false }
    }

    /// Whether it has to leave a node that leads no more.
    pub(crate) fn needs_leader(self) -> bool {
        self.kind != Kind::Anywhere && !self.bound
    }
}

/// What comes of one attempt: an answer as it came.
pub(crate) type Outcome = Result<Bytes, AttemptError>;

/// Why an attempt has no answer.
#[derive(Debug, Clone)]
pub(crate) enum AttemptError {
    /// The request did not leave this process.
    NotSent(Arc<str>),
    /// Its time was over.
    Expired { sent: bool },
    /// The stream broke after the request was sent.
    Lost(Arc<str>),
    /// It was sent, is unanswered for long, and another node leads by now.
    LeaderChanged,
    /// The node answers, and takes no requests at present: nothing was sent.
    Refused(Arc<v1::Failure>),
}

impl AttemptError {
    /// The connection task is no more, because the runtime that it ran on is no more.
    pub(crate) fn task_gone(sent: bool) -> Self {
        let why = "the runtime that the client was first used on has shut down".into();
        if sent { Self::Lost(why) } else { Self::NotSent(why) }
    }
}

/// `min` doubled `step` times, at most `max`; half of it random, so that callers do not come back together.
pub(crate) fn backoff(min: Duration, max: Duration, step: u32) -> Duration {
    let whole = min.saturating_mul(1 << step.min(20)).min(max);
    let half_us = u64::try_from(whole.as_micros() / 2).unwrap_or(u64::MAX - 1);
    Duration::from_micros(half_us + runtime::random_u64() % (half_us + 1))
}

/// A gRPC status in words: the innermost cause says most ("connection refused").
pub(crate) fn describe(status: &tonic::Status) -> Arc<str> {
    match shown::cause(status) {
        Some(cause) => cause.into(),
        // Every server of gRPC says so, the one at a peer port too.
        None if status.code() == tonic::Code::Unimplemented => {
            "the call is not known there: is this a node's client port, and not its peer port?".into()
        }
        None if status.message().is_empty() => status.code().description().into(),
        None => format!("{}: {}", status.code().description(), status.message()).into(),
    }
}

/// Whether there was no connection to send on.
pub(crate) fn is_unconnected(status: &tonic::Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_within_their_bounds() {
        let (min, max) = (Duration::from_millis(10), Duration::from_millis(100));
        for step in 0..40 {
            let pause = backoff(min, max, step);
            assert!(pause >= min / 2 && pause <= max, "step {step}: {pause:?}");
        }
        assert!(backoff(min, max, 30) >= max / 2);
    }
}
