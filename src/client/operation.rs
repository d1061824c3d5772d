//! One operation from first attempt to outcome: where to send it, and when to try again.
//!
//! What a failure means is for [`judge`] to say. Everything is repeated until the deadline, except a write
//! without a session whose outcome is unknown. A write in a session keeps its number through all attempts,
//! and is *undecided* from the first attempt that may have been applied: whatever error it ends with then says
//! so.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::select;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::config::Endpoint;
use super::connection::AttemptError;
use super::error::ClientError;
use super::judge::{Case, Failure, Verdict, failed, in_words, judge};
use super::node::Link;
use super::preference::ReadPreference;
use super::reply::{Header, NoAnswer, Response};
use super::request::{Kind, Request, whole_ms};
use super::router::{Hint, Router};
use super::sessions::{Place, Sessions};
use crate::proto::v1::{self, tagged_request, tagged_response};
use crate::reason::Reason;
use crate::runtime;
use crate::session::Session;
use crate::types::{AckLevel, ReadLevel};

/// Attempts that may follow each other without a pause, while each goes to another node.
const MAX_REDIRECTS: u32 = 3;

/// What becomes of an operation after a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Again,
    InNewSession,
}

pub(super) struct Operation<'a> {
    router: &'a Arc<Router>,
    kind: Kind,
    /// Whether the server recognises a repeated attempt.
    in_session: bool,
    /// Which node reads go to that any node can answer.
    preference: &'a ReadPreference,
    /// The only node to ask, if the caller chose one.
    chosen: Option<Arc<Link>>,
    started: Instant,
    deadline: Instant,
    pauses: u32,
    redirects: u32,
    /// The node that failed last.
    failed: Option<Endpoint>,
    /// Whether an attempt of a write may have been applied.
    undecided: bool,
    last: Option<String>,
    /// The leader that the last node asked has named, and that is not reached: which, where, and why.
    unreached: Option<String>,
    /// The last refusal that may pass: what is to be told if it lasts until the deadline.
    refused: Option<ClientError>,
}

/// Where reads that any node can answer go unless somebody prefers otherwise.
static NO_PREFERENCE: ReadPreference = ReadPreference::Any;

/// Executes `request`, on the node at `chosen` only if that is set.
pub(super) async fn execute(
    router: &Arc<Router>,
    sessions: &Sessions,
    request: Request,
    chosen: Option<&Endpoint>,
    preference: Option<&ReadPreference>,
) -> Result<Response, ClientError> {
    refuse(router, &request)?;
    let started = Instant::now();
    let under_way = router.metrics.start(request.method(), started);
    let mut operation = Operation::new(router, kind(&request, preference), preference, started);
    operation.chosen = chosen.map(|endpoint| router.at(endpoint));
    let outcome = operation.run(sessions, &request).await;
    under_way.finish(outcome.is_ok());
    outcome
}

/// Executes the write `request` in `place`, in which it may have been tried before: then it is `undecided`, and is so
/// again if it ends in an error that leaves it open.
pub(super) async fn execute_in(
    router: &Arc<Router>,
    place: &Place,
    request: &Request,
    undecided: &mut bool,
) -> Result<Response, ClientError> {
    refuse(router, request)?;
    let started = Instant::now();
    let under_way = router.metrics.start(request.method(), started);
    let mut operation = Operation::new(router, Kind::Write, None, started);
    operation.in_session = true;
    operation.undecided = *undecided;
    let outcome = loop {
        // Whoever gives up while an attempt is under way leaves it undecided.
        let before = std::mem::replace(undecided, true);
        let attempted = operation.attempt(request, Some(place)).await;
        *undecided = before || operation.undecided;
        match attempted {
            Ok(Ok(response)) => break Ok(response),
            Ok(Err(Next::Again)) => {}
            // Nothing was applied, and nothing can be any more.
            Ok(Err(Next::InNewSession)) => break Err(operation.session_gone(place)),
            Err(error) => break Err(error),
        }
    };
    under_way.finish(outcome.is_ok());
    outcome
}

/// Refuses what the server would, without sending it.
fn refuse(router: &Router, request: &Request) -> Result<(), ClientError> {
    let limit = router.config.max_request_bytes;
    let (reason, message) = match request.fault() {
        Some(fault) => (Reason::Invalid, fault.to_owned()),
        None if request.size_bytes() > limit => {
            let bytes = request.size_bytes();
            let message = format!("the request takes {bytes} bytes, more than the limit of {limit} bytes");
            (Reason::TooLarge, message)
        }
        None => return Ok(()),
    };
    Err(ClientError::Rejected { reason, message })
}

fn kind(request: &Request, preference: Option<&ReadPreference>) -> Kind {
    match request.read_level() {
        None => Kind::Write,
        Some(level) => read_kind(level, preference),
    }
}

/// A linearizable read is cheapest at the leader, and goes elsewhere only for somebody who prefers that.
pub(super) fn read_kind(level: ReadLevel, preference: Option<&ReadPreference>) -> Kind {
    match (level, preference) {
        (ReadLevel::Lease, _) | (ReadLevel::Linearizable, None | Some(ReadPreference::Leader)) => {
            Kind::AtLeader
        }
        (ReadLevel::Linearizable | ReadLevel::Bounded { .. } | ReadLevel::Local, _) => Kind::Anywhere,
    }
}

/// Opens a session. One whose answer is lost is opened in vain, and expires.
pub(super) async fn open_session(
    router: &Arc<Router>,
    deadline: Instant,
) -> Result<Arc<Session>, ClientError> {
    let ttl_ms = whole_ms(router.config.session_ttl);
    let mut operation = Operation::new(router, Kind::AtLeader, None, Instant::now());
    operation.deadline = deadline;
    loop {
        let link = operation.link();
        let expires = deadline.min(Instant::now() + router.config.write_attempt_timeout);
        let request = tagged_request::Request::OpenSession(v1::OpenSessionRequest { ttl_ms });
        let failure = match link.call(router, request, (Kind::AtLeader, false), expires).await {
            Ok(tagged_response::Response::OpenSession(opened)) => {
                router.answered_as_leader(&link);
                let history = Header::from_wire(opened.header).history;
                return Ok(Session::new(opened.session, opened.window, history));
            }
            Ok(tagged_response::Response::Failure(failure)) => Failure::Answered(failure),
            Ok(_) => return Err(operation.unexpected(&link)),
            Err(error) => Failure::of_attempt(error),
        };
        if router.config.without_session_when_full && failure.reason() == Some(Reason::TooManySessions) {
            return Err(failed(&link.node.endpoint, Reason::TooManySessions, in_words(&failure), false));
        }
        operation.after(&link, failure).await?;
    }
}

/// Closes a session: one attempt, which is over by `expires`.
pub(super) async fn close_session(router: &Arc<Router>, session: &Session, expires: Instant) {
    let (session, history) = (session.id(), session.history().0);
    let link = router.leader_or_next();
    let request = tagged_request::Request::CloseSession(v1::CloseSessionRequest { session, history });
    let outcome = link.call(router, request, (Kind::AtLeader, false), expires).await;
    tracing::debug!(session, closed = outcome.is_ok(), "closed the session");
}

impl<'a> Operation<'a> {
    pub(super) fn new(
        router: &'a Arc<Router>,
        kind: Kind,
        preference: Option<&'a ReadPreference>,
        started: Instant,
    ) -> Self {
        Self {
            router,
            kind,
            in_session: false,
            preference: preference.unwrap_or(&NO_PREFERENCE),
            chosen: None,
            started,
            deadline: started + router.config.timeout,
            pauses: 0,
            redirects: 0,
            failed: None,
            undecided: false,
            last: None,
            unreached: None,
            refused: None,
        }
    }

    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    async fn run(&mut self, sessions: &Sessions, request: &Request) -> Result<Response, ClientError> {
        let router = self.router;
        // At level leader nobody waits to hear what the session says.
        let at_leader = request.write_options().is_some_and(|options| options.ack == AckLevel::Leader);
        self.in_session = self.kind == Kind::Write && router.config.exactly_once && !at_leader;
        let mut place = self.begin(sessions).await?;
        loop {
            let attempted = self.attempt(request, place.as_ref()).await.inspect_err(|error| {
                // Here it will never exist again.
                if let (Reason::OtherHistory, Some(place)) = (error.reason(), &place) {
                    sessions.forget(place.slot().session);
                }
            });
            match attempted? {
                Ok(response) => return Ok(response),
                Err(Next::Again) => {}
                Err(Next::InNewSession) => {
                    if let Some(gone) = place.take() {
                        sessions.forget(gone.slot().session);
                    }
                    place = self.begin(sessions).await?;
                }
            }
        }
    }

    /// One attempt, and whatever comes between a failed one and the next.
    async fn attempt(
        &mut self,
        request: &Request,
        place: Option<&Place>,
    ) -> Result<Result<Response, Next>, ClientError> {
        let (router, now) = (self.router, Instant::now());
        let link = self.link();
        let expires = self.attempt_expires(request, now);
        let left = self.deadline.saturating_duration_since(now);
        let wire = request.clone().into_wire(place, left);
        let failure = match link.call(router, wire, (self.kind, self.chosen.is_some()), expires).await {
            Err(error) => Failure::of_attempt(error),
            Ok(answer) => match Response::from_wire(answer) {
                Err(NoAnswer::Failure(failure)) => Failure::Answered(*failure),
                Ok(response) if response.answers(request) => {
                    // A linearizable read proves nothing: every node answers it.
                    if self.kind == Kind::Write && self.chosen.is_none() {
                        router.answered_as_leader(&link);
                    }
                    return Ok(Ok(response));
                }
                Ok(_) | Err(NoAnswer::Unexpected) => return Err(self.unexpected(&link)),
            },
        };
        self.after(&link, failure).await.map(Err)
    }

    async fn begin(&mut self, sessions: &Sessions) -> Result<Option<Place>, ClientError> {
        if !self.in_session {
            return Ok(None);
        }
        match sessions.begin(self.router, self.deadline).await {
            Err(ClientError::Failed { reason: Reason::TooManySessions, .. })
                if self.router.config.without_session_when_full && !self.undecided =>
            {
                tracing::debug!("all sessions are in use: the write is sent once, without one");
                self.in_session = false;
                Ok(None)
            }
            begun => begun.map(Some),
        }
    }

    fn attempt_expires(&self, request: &Request, now: Instant) -> Instant {
        let config = &self.router.config;
        let limit = match request.write_options() {
            None => config.attempt_timeout,
            Some(_) if !self.in_session => return self.deadline,
            // The server answers this one only when it has waited for everybody.
            Some(options) if options.ack == AckLevel::All => {
                options.ack_timeout.saturating_add(config.write_attempt_timeout)
            }
            Some(_) => config.write_attempt_timeout,
        };
        now.checked_add(limit).map_or(self.deadline, |expires| expires.min(self.deadline))
    }

    pub(super) fn link(&self) -> Arc<Link> {
        match (&self.chosen, self.kind) {
            (Some(link), _) => link.clone(),
            (None, Kind::Anywhere) => self.router.choose(self.preference, self.failed.as_ref()),
            (None, Kind::Write | Kind::AtLeader) => self.router.leader_or_next(),
        }
    }

    /// Learns from a failure, and waits as long as it takes before the next attempt.
    pub(super) async fn after(&mut self, link: &Arc<Link>, failure: Failure) -> Result<Next, ClientError> {
        let endpoint = &link.node.endpoint;
        let case = Case { kind: self.kind, in_session: self.in_session, undecided: self.undecided };
        self.undecided |= self.kind == Kind::Write && failure.maybe_applied();
        match self.weigh(link, case, &failure).await {
            Ok(next) => {
                self.failed = Some(endpoint.clone());
                self.router.metrics.retries.fetch_add(1, Ordering::Relaxed);
                Ok(next)
            }
            Err(error) if self.undecided => Err(error.undecided(endpoint)),
            Err(error) => Err(error),
        }
    }

    async fn weigh(&mut self, link: &Arc<Link>, case: Case, failure: &Failure) -> Result<Next, ClientError> {
        let endpoint = &link.node.endpoint;
        let news = self.learn(endpoint, failure).await;
        let verdict = judge(case, endpoint, failure);
        let expired_unsent = matches!(failure, Failure::Attempt(AttemptError::Expired { sent: false }));
        if !expired_unsent || self.last.is_none() {
            self.last = Some(format!("{endpoint}: {}", in_words(failure)));
        }
        let now = Instant::now();
        let patient = now.duration_since(self.started) < self.router.config.unavailable_after;
        let next = if verdict == Verdict::NewSession { Next::InNewSession } else { Next::Again };
        match &verdict {
            Verdict::Return(error) => return Err(error.clone()),
            Verdict::Patiently(error) => self.refused = Some(error.clone()),
            _ => {}
        }
        if now >= self.deadline {
            return Err(self.out_of_time(link));
        }
        if self.chosen.is_some() && failure.is_refusal() {
            return Err(failed(endpoint, Reason::NotLeader, in_words(failure), false));
        }
        // A write that may have been applied is sent again, in its session, for as long as it has time: an answer may come yet.
        if !patient
            && !self.undecided
            && let Some(tried) = self.unreachable(link)
        {
            return Err(ClientError::Unavailable { tried });
        }
        let elsewhere = matches!(verdict, Verdict::Elsewhere | Verdict::Patiently(_));
        let at_once = match verdict {
            Verdict::NewSession => true,
            Verdict::Elsewhere => self.chosen.is_none() && news,
            _ => false,
        };
        if at_once && self.redirects < MAX_REDIRECTS {
            self.redirects += 1;
            if failure.is_refusal() {
                self.router.metrics.redirects.fetch_add(1, Ordering::Relaxed);
            }
            return Ok(next);
        }
        self.redirects = 0;
        self.pause(endpoint, elsewhere).await;
        if Instant::now() >= self.deadline {
            return Err(self.out_of_time(link));
        }
        Ok(next)
    }

    /// Tells the router what the failure says about the cluster. True when there is somebody else to ask.
    async fn learn(&mut self, endpoint: &Endpoint, failure: &Failure) -> bool {
        let answer = match failure {
            Failure::Attempt(AttemptError::Expired { .. }) => {
                self.router.hunt();
                return true;
            }
            Failure::Attempt(_) => return self.router.all_down().is_none(),
            Failure::Answered(answer) => answer,
        };
        self.router.note_failure(answer);
        let reason = failure.reason().unwrap_or_default();
        self.unreached = None;
        match reason {
            Reason::NotLeader => {
                let hinted = match &answer.leader {
                    Some(hint) if self.chosen.is_none() => {
                        let seeking = self.router.hinted(endpoint, hint);
                        timeout_at(self.deadline, seeking).await.unwrap_or(Hint::Useless)
                    }
                    _ => Hint::Useless,
                };
                if hinted == Hint::Followed {
                    return true;
                }
                self.router.lost_leader(endpoint);
                self.router.hunt();
                match hinted {
                    // To ask the same node again at once would bring the same answer.
                    Hint::Unreached(which) => {
                        self.unreached = Some(which);
                        false
                    }
                    Hint::Useless | Hint::Followed => true,
                }
            }
            Reason::Stopped => {
                self.router.lost_leader(endpoint);
                self.router.hunt();
                true
            }
            Reason::Behind => self.kind == Kind::Anywhere && self.router.has_healthy_other_than(endpoint),
            Reason::NoQuorum | Reason::Interrupted | Reason::DiskFull | Reason::DiskStalled => {
                self.router.hunt();
                false
            }
            _ => false,
        }
    }

    /// Waits: longer every time, not beyond the deadline, and not once another leader is known.
    async fn pause(&mut self, failed: &Endpoint, until_leader: bool) {
        let config = &self.router.config;
        let pause = backoff(config.retry_backoff_min, config.retry_backoff_max, self.pauses);
        self.pauses += 1;
        let until = (Instant::now() + pause).min(self.deadline);
        if !until_leader || self.chosen.is_some() || self.kind == Kind::Anywhere {
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

    /// What the operation ends with when its time is over: that no node can be connected to only if nothing was ever heard
    /// from any, or from none any more.
    fn out_of_time(&self, link: &Link) -> ClientError {
        let unheard = match &self.chosen {
            None => self.router.unheard(),
            Some(_) => (!link.node.has_answered())
                .then(|| vec![(link.node.endpoint.clone(), link.node.last_failure())]),
        };
        match self.unreachable(link).or(unheard) {
            Some(tried) if !self.undecided => ClientError::Unavailable { tried },
            _ => self.deadline_exceeded(),
        }
    }

    fn deadline_exceeded(&self) -> ClientError {
        if !self.undecided
            && let Some(refused) = &self.refused
        {
            return refused.clone();
        }
        ClientError::DeadlineExceeded {
            timeout: self.router.config.timeout,
            maybe_applied: self.undecided,
            last: self.unreached.clone().or_else(|| self.last.clone()),
        }
    }

    fn session_gone(&self, place: &Place) -> ClientError {
        let message = format!("session {} is gone; nothing was applied", place.slot().session);
        failed(&self.link().node.endpoint, Reason::SessionExpired, message, false)
    }

    fn unexpected(&self, link: &Link) -> ClientError {
        let message = "the server answered another kind of request".to_owned();
        failed(&link.node.endpoint, Reason::Unspecified, message, self.kind == Kind::Write)
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

    #[test]
    fn pauses_grow_within_their_bounds() {
        let (min, max) = (Duration::from_millis(10), Duration::from_millis(100));
        for step in 0..40 {
            let pause = backoff(min, max, step);
            assert!(pause >= min / 2 && pause <= max, "step {step}: {pause:?}");
        }
        assert!(backoff(min, max, 30) >= max / 2);
    }

    #[test]
    fn reads_go_where_they_are_cheapest_unless_somebody_prefers_otherwise() {
        let nearest = ReadPreference::Nearest;
        for (level, preference, expected) in [
            (ReadLevel::Linearizable, None, Kind::AtLeader),
            (ReadLevel::Linearizable, Some(&ReadPreference::Leader), Kind::AtLeader),
            (ReadLevel::Linearizable, Some(&nearest), Kind::Anywhere),
            (ReadLevel::Lease, None, Kind::AtLeader),
            (ReadLevel::Lease, Some(&nearest), Kind::AtLeader),
            (ReadLevel::Local, None, Kind::Anywhere),
            (ReadLevel::Bounded { max_lag_ms: 1 }, Some(&ReadPreference::Leader), Kind::Anywhere),
        ] {
            assert_eq!(read_kind(level, preference), expected, "{level:?} {preference:?}");
        }
    }
}
