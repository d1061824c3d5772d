//! One operation from first attempt to outcome: where to send it, what a failure means, when to try again.
//!
//! Reads are tried again until the deadline, because reading twice is harmless. A write is tried again only
//! when the failure says that it was not applied: the node refused it, or it never left this process. Any
//! other failure of a write goes to the caller as *maybe applied*. Once writes carry a session and a
//! sequence, the server recognises a repeated one, and [`judge`] may retry those too.

use std::sync::Arc;
use std::time::Duration;

use tokio::select;
use tokio::time::{Instant, sleep_until};
use tonic::Code;

use super::config::Endpoint;
use super::connection::AttemptError;
use super::error::{Cause, ClientError, Rejection};
use super::node::Link;
use super::request::{Kind, Request, Response};
use super::router::Router;
use crate::proto::v1::{self, Reason};
use crate::runtime;

/// Attempts that may follow each other without a pause, while each goes to another node.
const MAX_REDIRECTS: u32 = 3;

/// Why an attempt failed, on this side or on the server's.
#[derive(Debug)]
enum Failure {
    Attempt(AttemptError),
    Answered(v1::Failure),
}

/// What to do about it.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Return(ClientError),
    /// Try another node, at once if one is known.
    Elsewhere,
    /// Try again after a pause.
    Later,
}

struct Operation<'a> {
    router: &'a Arc<Router>,
    kind: Kind,
    /// The only node to ask, if the caller chose one.
    chosen: Option<Arc<Link>>,
    started: Instant,
    deadline: Instant,
    pauses: u32,
    redirects: u32,
    last: Option<String>,
    /// The last refusal of a write for its node's disk: what is to be told if it lasts until the deadline.
    refused: Option<ClientError>,
}

/// Executes `request`, on the node at `chosen` only if that is set.
pub(super) async fn execute(
    router: &Arc<Router>,
    request: Request,
    chosen: Option<&Endpoint>,
) -> Result<Response, ClientError> {
    let limit = router.config.max_request_bytes;
    if request.size_bytes() > limit {
        let message =
            format!("the request takes {} bytes, more than the limit of {limit} bytes", request.size_bytes());
        return Err(ClientError::Rejected { rejection: Rejection::TooLarge, message });
    }
    let started = Instant::now();
    let mut operation = Operation {
        router,
        kind: request.kind(),
        chosen: chosen.map(|endpoint| router.at(endpoint)),
        started,
        deadline: started + router.config.timeout,
        pauses: 0,
        redirects: 0,
        last: None,
        refused: None,
    };
    let mut now = started;
    loop {
        let link = operation.link();
        let expires = match operation.kind {
            Kind::Write => operation.deadline,
            Kind::LeaderRead | Kind::LocalRead => operation.deadline.min(now + router.config.attempt_timeout),
        };
        let failure = match link.call(router, request.clone().into_wire(), operation.kind, expires).await {
            Err(error) => Failure::Attempt(error),
            Ok(answer) => match Response::from_wire(answer) {
                Err(failure) => Failure::Answered(failure),
                Ok(response) if response.answers(&request) => {
                    if operation.kind != Kind::LocalRead && operation.chosen.is_none() {
                        router.answered_as_leader(&link);
                    }
                    return Ok(response);
                }
                Ok(_) => return Err(operation.unexpected(&link)),
            },
        };
        operation.after(&link, failure).await?;
        now = Instant::now();
    }
}

impl Operation<'_> {
    fn link(&self) -> Arc<Link> {
        match (&self.chosen, self.kind) {
            (Some(link), _) => link.clone(),
            (None, Kind::LocalRead) => self.router.next(),
            (None, Kind::Write | Kind::LeaderRead) => self.router.leader_or_next(),
        }
    }

    /// Learns from a failure, and waits as long as it takes before the next attempt.
    async fn after(&mut self, link: &Arc<Link>, failure: Failure) -> Result<(), ClientError> {
        let endpoint = &link.node.endpoint;
        let news = self.learn(endpoint, &failure);
        let verdict = judge(self.kind, endpoint, &failure);
        let expired_unsent = matches!(failure, Failure::Attempt(AttemptError::Expired { sent: false }));
        if !expired_unsent || self.last.is_none() {
            self.last = Some(format!("{endpoint}: {}", in_words(&failure)));
        }
        if let Verdict::Return(error) = verdict {
            return Err(error);
        }
        self.refused = disk_refusal(self.kind, endpoint, &failure).or(self.refused.take());
        let now = Instant::now();
        let undecided = self.kind == Kind::Write
            && matches!(failure, Failure::Attempt(AttemptError::Expired { sent: true }));
        if now >= self.deadline || undecided {
            return Err(self.deadline_exceeded(&failure));
        }
        if self.chosen.is_some() && is_refusal(&failure) {
            return Err(failed(endpoint, Cause::NotLeader, in_words(&failure), false));
        }
        if let Some(tried) = self.unreachable(link)
            && now.duration_since(self.started) >= self.router.config.unavailable_after
        {
            return Err(ClientError::Unavailable { tried });
        }
        let at_once = self.chosen.is_none() && verdict == Verdict::Elsewhere && news;
        if at_once && self.redirects < MAX_REDIRECTS {
            self.redirects += 1;
            return Ok(());
        }
        self.redirects = 0;
        self.pause(endpoint, verdict == Verdict::Elsewhere).await;
        if Instant::now() >= self.deadline {
            return Err(match self.unreachable(link) {
                Some(tried) => ClientError::Unavailable { tried },
                None => self.deadline_exceeded(&failure),
            });
        }
        Ok(())
    }

    /// Tells the router what the failure says about the cluster. True when there is somebody else to ask.
    fn learn(&self, endpoint: &Endpoint, failure: &Failure) -> bool {
        match failure {
            Failure::Attempt(AttemptError::Expired { .. }) => {
                self.router.hunt();
                true
            }
            Failure::Attempt(_) => self.router.all_down().is_none(),
            Failure::Answered(answer) => match reason(answer) {
                Reason::NotLeader => {
                    let hinted =
                        answer.leader.as_ref().is_some_and(|hint| self.router.hinted(endpoint, hint));
                    if !hinted {
                        self.router.lost_leader(endpoint);
                        self.router.hunt();
                    }
                    true
                }
                Reason::Stopped => {
                    self.router.lost_leader(endpoint);
                    self.router.hunt();
                    true
                }
                Reason::NoQuorum | Reason::Interrupted | Reason::DiskFull | Reason::DiskStalled => {
                    self.router.hunt();
                    false
                }
                _ => false,
            },
        }
    }

    /// Waits: longer every time, not beyond the deadline, and not once another leader is known.
    async fn pause(&mut self, failed: &Endpoint, until_leader: bool) {
        let config = &self.router.config;
        let pause = backoff(config.retry_backoff_min, config.retry_backoff_max, self.pauses);
        self.pauses += 1;
        let until = (Instant::now() + pause).min(self.deadline);
        if !until_leader || self.chosen.is_some() {
            return sleep_until(until).await;
        }
        let found = self.router.leader_found.notified();
        tokio::pin!(found);
        found.as_mut().enable();
        if self.router.is_led_by_other_than(failed) {
            return;
        }
        if !self.router.has_leader() {
            self.router.hunt();
        }
        select! {
            () = sleep_until(until) => {}
            () = found => {}
        }
    }

    fn unreachable(&self, link: &Link) -> Option<Vec<(Endpoint, String)>> {
        match &self.chosen {
            None => self.router.all_down(),
            Some(_) => {
                link.node.is_down().then(|| vec![(link.node.endpoint.clone(), link.node.last_failure())])
            }
        }
    }

    fn deadline_exceeded(&self, failure: &Failure) -> ClientError {
        let sent = matches!(failure, Failure::Attempt(AttemptError::Expired { sent: true }));
        if !sent && let Some(refused) = &self.refused {
            return refused.clone();
        }
        ClientError::DeadlineExceeded {
            timeout: self.router.config.timeout,
            maybe_applied: sent && self.kind == Kind::Write,
            last: self.last.clone(),
        }
    }

    fn unexpected(&self, link: &Link) -> ClientError {
        let message = "the server answered another kind of request".to_owned();
        failed(&link.node.endpoint, Cause::Unexpected, message, self.kind == Kind::Write)
    }
}

/// Whether an operation of this kind may be tried again after `failure`. The one place that decides it.
fn judge(kind: Kind, endpoint: &Endpoint, failure: &Failure) -> Verdict {
    let write = kind == Kind::Write;
    let answer = match failure {
        Failure::Attempt(AttemptError::Lost(_)) if write => {
            return Verdict::Return(failed(endpoint, Cause::ConnectionLost, in_words(failure), true));
        }
        Failure::Attempt(AttemptError::LeaderChanged) if write => {
            return Verdict::Return(failed(endpoint, Cause::LeaderChanged, in_words(failure), true));
        }
        // An expired write has reached its deadline, which the caller of this function looks after.
        Failure::Attempt(_) => return Verdict::Elsewhere,
        Failure::Answered(answer) => answer,
    };
    let reason = reason(answer);
    let undecided = write && answer.maybe_applied;
    let rejected =
        |rejection| Verdict::Return(ClientError::Rejected { rejection, message: answer.message.clone() });
    let cause = match reason {
        Reason::TooLarge => return rejected(Rejection::TooLarge),
        Reason::Invalid => return rejected(Rejection::Invalid),
        Reason::NotLeader => Cause::NotLeader,
        Reason::Overloaded => Cause::Overloaded,
        Reason::Interrupted => Cause::Interrupted,
        Reason::NoQuorum => Cause::NoQuorum,
        Reason::Stopped => Cause::Stopped,
        Reason::DiskFull => Cause::DiskFull,
        Reason::DiskStalled => Cause::DiskStalled,
        _ => Cause::Unexpected,
    };
    if undecided {
        return Verdict::Return(failed(endpoint, cause, in_words(failure), true));
    }
    match reason {
        Reason::NotLeader
        | Reason::Stopped
        | Reason::Interrupted
        | Reason::NoQuorum
        | Reason::DiskStalled => Verdict::Elsewhere,
        // A leader with a full disk hands over, if there is anybody to hand over to.
        Reason::Overloaded | Reason::DiskFull => Verdict::Later,
        _ => match Code::from(answer.code) {
            Code::InvalidArgument | Code::OutOfRange => rejected(Rejection::Invalid),
            Code::Unavailable | Code::ResourceExhausted | Code::Aborted => Verdict::Later,
            _ => Verdict::Return(failed(endpoint, cause, in_words(failure), false)),
        },
    }
}

/// The error for a write that was refused because of its node's disk, and was not applied.
fn disk_refusal(kind: Kind, endpoint: &Endpoint, failure: &Failure) -> Option<ClientError> {
    let Failure::Answered(answer) = failure else { return None };
    let cause = match reason(answer) {
        Reason::DiskFull => Cause::DiskFull,
        Reason::DiskStalled => Cause::DiskStalled,
        _ => return None,
    };
    let decided = kind == Kind::Write && !answer.maybe_applied;
    decided.then(|| failed(endpoint, cause, in_words(failure), false))
}

fn is_refusal(failure: &Failure) -> bool {
    matches!(failure, Failure::Answered(answer) if reason(answer) == Reason::NotLeader)
}

/// A reason that this version does not know counts as none: then the gRPC code decides.
fn reason(answer: &v1::Failure) -> Reason {
    Reason::try_from(answer.reason).unwrap_or(Reason::Unspecified)
}

fn failed(endpoint: &Endpoint, cause: Cause, message: String, maybe_applied: bool) -> ClientError {
    ClientError::Failed { endpoint: endpoint.clone(), cause, message, maybe_applied }
}

fn in_words(failure: &Failure) -> String {
    match failure {
        Failure::Attempt(AttemptError::NotSent(why)) => why.to_string(),
        Failure::Attempt(AttemptError::Lost(why)) => format!("the connection was lost: {why}"),
        Failure::Attempt(AttemptError::Expired { sent: false }) => "no connection in time".to_owned(),
        Failure::Attempt(AttemptError::Expired { sent: true }) => "no answer in time".to_owned(),
        Failure::Attempt(AttemptError::LeaderChanged) => {
            "the node has not answered, and another leads by now".to_owned()
        }
        Failure::Answered(answer) if answer.message.is_empty() => {
            Code::from(answer.code).description().to_owned()
        }
        Failure::Answered(answer) => answer.message.clone(),
    }
}

/// `min` doubled `step` times, at most `max`; half of it random, so that callers do not come back together.
pub(super) fn backoff(min: Duration, max: Duration, step: u32) -> Duration {
    let whole = min.saturating_mul(1 << step.min(20)).min(max);
    let half_us = u64::try_from(whole.as_micros() / 2).unwrap_or(u64::MAX - 1);
    Duration::from_micros(half_us + runtime::random_u64() % (half_us + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint() -> Endpoint {
        Endpoint::parse("n1:1").unwrap()
    }

    fn answered(reason: Reason, maybe_applied: bool) -> Failure {
        Failure::Answered(v1::Failure { reason: reason.into(), maybe_applied, ..Default::default() })
    }

    /// What `judge` says, in one letter: (r)eturn undecided, return (d)ecided, (e)lsewhere, (l)ater.
    fn letter(kind: Kind, failure: &Failure) -> char {
        match judge(kind, &endpoint(), failure) {
            Verdict::Return(error) if error.maybe_applied() => 'r',
            Verdict::Return(_) => 'd',
            Verdict::Elsewhere => 'e',
            Verdict::Later => 'l',
        }
    }

    #[test]
    fn a_write_is_repeated_only_when_it_was_not_applied() {
        let why: Arc<str> = "x".into();
        let table = [
            (Failure::Attempt(AttemptError::NotSent(why.clone())), "ee"),
            (Failure::Attempt(AttemptError::Lost(why)), "re"),
            (Failure::Attempt(AttemptError::LeaderChanged), "re"),
            (answered(Reason::NotLeader, false), "ee"),
            (answered(Reason::NotLeader, true), "re"),
            (answered(Reason::Overloaded, false), "ll"),
            (answered(Reason::DiskFull, false), "ll"),
            (answered(Reason::DiskStalled, false), "ee"),
            (answered(Reason::Interrupted, true), "re"),
            (answered(Reason::NoQuorum, true), "re"),
            (answered(Reason::NoQuorum, false), "ee"),
            (answered(Reason::Stopped, true), "re"),
            (answered(Reason::Stopped, false), "ee"),
            (answered(Reason::TooLarge, false), "dd"),
            (answered(Reason::Invalid, false), "dd"),
            (answered(Reason::Unspecified, true), "rd"),
            (answered(Reason::Unspecified, false), "dd"),
        ];
        for (failure, expected) in table {
            let letters: String =
                [Kind::Write, Kind::LeaderRead].iter().map(|kind| letter(*kind, &failure)).collect();
            assert_eq!(letters, expected, "{failure:?}");
        }
    }

    #[test]
    fn an_unknown_reason_is_judged_by_its_code() {
        let unknown = |code: Code| {
            Failure::Answered(v1::Failure { code: code.into(), reason: 9999, ..Default::default() })
        };
        assert_eq!(letter(Kind::Write, &unknown(Code::Unavailable)), 'l');
        assert_eq!(letter(Kind::Write, &unknown(Code::InvalidArgument)), 'd');
        assert_eq!(letter(Kind::Write, &unknown(Code::Internal)), 'd');
    }

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
