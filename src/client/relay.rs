//! Calls of others, carried to whoever leads, as they came.
//!
//! A node that is not to carry a change out passes it on with this. Nothing is numbered here: session and sequence are the caller's, and so
//! is the decision to repeat a change whose outcome is not known. So a call is sent again only where certainly nothing was done and it is
//! the leader that was not met: it was not sent, or the node asked does not lead, stops or has lost its quorum. Whatever else comes is
//! the answer, as the leader gave it.

use tokio::time::Instant;

use super::Client;
use super::attempt::{AttemptError, Kind, Way};
use super::frame::{self, Frame};
use super::judge::{Failure, in_words};
use super::operation::{Next, Operation};
use crate::proto::v1;
use crate::proto::v1::answer::Content as Answered;
use crate::reason::Reason;

impl Client {
    /// What the leader answers to `call`, which is a change, and has no tag.
    ///
    /// # Errors
    /// The leader's failure, or that none was met by `expires`, or that the outcome is not known.
    pub(crate) async fn relay(&self, call: &v1::Call, expires: Instant) -> Result<v1::Answer, v1::Failure> {
        let router = &self.router;
        let bytes = prost::Message::encoded_len(call);
        let limit = router.config.max_request_bytes;
        if bytes > limit {
            let message = format!("the request takes {bytes} bytes, more than the limit of {limit} bytes");
            return Err(told(Reason::TooLarge, message, false));
        }
        let waits_for_all = call.write.as_ref().is_some_and(|write| write.ack() == v1::AckLevel::All);
        let way = Way { kind: Kind::Write, bound: false, waits_for_all };
        let mut operation = Operation::new(router, Kind::Write, None, Instant::now());
        operation.deadline = expires;
        loop {
            let link = operation.link();
            let answered = link.call(router, Frame::of(call), way, expires).await.map(frame::read);
            let failure = match answered {
                Err(error) => Failure::of_attempt(error),
                Ok(Some(v1::Answer { content: Some(Answered::Failure(failure)), .. })) => {
                    Failure::Answered(failure)
                }
                Ok(Some(answer @ v1::Answer { content: Some(_), .. })) => {
                    router.answered_as_leader(&link);
                    return Ok(answer);
                }
                Ok(_) => {
                    let message = format!("{} has sent what is no answer", link.node.endpoint);
                    return Err(told(Reason::Unspecified, message, true));
                }
            };
            if failure.maybe_applied() || !misses_leader(&failure) {
                return Err(undecided(&link.node.endpoint, failure));
            }
            let words = format!("{}: {}", link.node.endpoint, in_words(&failure));
            match operation.after(&link, failure).await {
                Ok(Next::Again) => {}
                Ok(Next::InNewSession) | Err(_) => {
                    let message =
                        format!("the leader was not reached, and nothing was done; at last {words}");
                    return Err(told(Reason::NotLeader, message, false));
                }
            }
        }
    }
}

/// Whether it says only that this was not the leader, or not in a state to be it.
fn misses_leader(failure: &Failure) -> bool {
    match failure.reason() {
        None => true,
        Some(reason) => matches!(reason, Reason::NotLeader | Reason::Stopped | Reason::NoQuorum),
    }
}

/// The failure that callers are told: a node's own, or that of an attempt whose outcome is not known.
fn undecided(endpoint: &super::Endpoint, failure: Failure) -> v1::Failure {
    let reason = match &failure {
        Failure::Answered(_) => Reason::Unspecified,
        Failure::Attempt(AttemptError::Expired { .. }) => Reason::DeadlineExceeded,
        Failure::Attempt(_) => Reason::Interrupted,
    };
    let message = format!("it was passed on to {endpoint}: {}", in_words(&failure));
    match failure {
        Failure::Answered(answered) => answered,
        Failure::Attempt(_) => told(reason, message, true),
    }
}

fn told(reason: Reason, message: String, maybe_applied: bool) -> v1::Failure {
    v1::Failure {
        code: reason.grpc_code(maybe_applied, false) as i32,
        reason: reason.into(),
        message,
        maybe_applied,
        ..v1::Failure::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_says_that_it_was_not_the_leader_is_sent_again() {
        let answered = |reason: Reason| {
            Failure::Answered(v1::Failure { reason: reason.into(), ..v1::Failure::default() })
        };
        for reason in [Reason::NotLeader, Reason::Stopped, Reason::NoQuorum] {
            assert!(misses_leader(&answered(reason)), "{reason:?}");
        }
        for reason in [Reason::SessionExpired, Reason::Overloaded, Reason::DiskFull, Reason::Invalid] {
            assert!(!misses_leader(&answered(reason)), "{reason:?}");
        }
        assert!(misses_leader(&Failure::Attempt(AttemptError::NotSent("x".into()))));
    }

    #[test]
    fn an_attempt_without_an_answer_may_have_been_applied() {
        let endpoint = crate::client::Endpoint::parse("n1:1").unwrap();
        for error in [AttemptError::Lost("x".into()), AttemptError::LeaderChanged] {
            let told = undecided(&endpoint, Failure::Attempt(error));
            assert_eq!((told.reason(), told.maybe_applied), (Reason::Interrupted, true));
        }
        let expired = undecided(&endpoint, Failure::Attempt(AttemptError::Expired { sent: true }));
        assert_eq!((expired.reason(), expired.maybe_applied), (Reason::DeadlineExceeded, true));
    }
}
