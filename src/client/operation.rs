//! One operation between its attempts: where to send it, and when to try again. [`execute`](super::execute) makes the attempts.
//!
//! What a failure means is for [`judge`] to say. Everything is repeated until the deadline, except a write
//! without a session whose outcome is unknown. But nothing is sent again that may still be answered: a leader that is slow
//! would only be slower for it, and every answer would come too late. What only the leader answers waits for it until the
//! deadline, the stream is lost, or another is known to lead. A read that any node answers goes on to another one, with more
//! patience every time. A write in a session keeps its number through all attempts,
//! and is *undecided* from the first attempt that may have been applied: whatever error it ends with then says
//! so.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::select;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::attempt::{AttemptError, Kind, backoff};
use super::endpoint::Endpoint;
use super::error::ClientError;
use super::judge::{Case, Failure, Verdict, failed, in_words, judge};
use super::link::Link;
use super::preference::ReadPreference;
use super::router::{Hint, Router};
use crate::call::decode_leader;
use crate::proto::v1;
use crate::reason::Reason;
use crate::types::ReadLevel;

/// Attempts that may follow each other without a pause, while each goes to another node.
const MAX_REDIRECTS: u32 = 3;

/// What becomes of an operation after a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    Again,
    InNewSession,
}

pub(crate) struct Operation<'a> {
    pub(super) router: &'a Arc<Router>,
    pub(super) kind: Kind,
    /// Whether the server recognises a repeated attempt.
    pub(super) in_session: bool,
    /// Which node reads go to that any node can answer.
    pub(super) preference: &'a ReadPreference,
    /// The only node to ask, if the caller chose one.
    pub(super) chosen: Option<Arc<Link>>,
    /// How far behind a replica may be that is asked, if any may be.
    pub(super) replicas: Option<Duration>,
    pub(super) started: Instant,
    pub(super) deadline: Instant,
    /// How long the next attempt may take that can be made elsewhere.
    patience: Duration,
    pub(super) pauses: u32,
    pub(super) redirects: u32,
    /// The node that failed last.
    pub(super) failed: Option<Endpoint>,
    /// Whether an attempt of a write may have been applied.
    pub(super) undecided: bool,
    pub(super) last: Option<String>,
    /// What a node has said last.
    said: Option<String>,
    /// The leader that the last node asked has named, and that is not reached: which, where, and why.
    pub(super) unreached: Option<String>,
    /// The last refusal that may pass: what is to be told if it lasts until the deadline.
    pub(super) refused: Option<ClientError>,
}

/// Where reads that any node can answer go unless somebody prefers otherwise.
static NO_PREFERENCE: ReadPreference = ReadPreference::Any;

/// A linearizable read is cheapest at the leader, and goes elsewhere only for somebody who prefers that.
pub(crate) fn read_kind(level: ReadLevel, preference: Option<&ReadPreference>) -> Kind {
    match (level, preference) {
        (ReadLevel::Lease, _) | (ReadLevel::Linearizable, None | Some(ReadPreference::Leader)) => {
            Kind::AtLeader
        }
        (ReadLevel::Linearizable | ReadLevel::Bounded { .. } | ReadLevel::Local, _) => Kind::Anywhere,
    }
}

impl<'a> Operation<'a> {
    pub(crate) fn new(
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
            replicas: None,
            started,
            deadline: started + router.config.timeout,
            patience: router.config.attempt_timeout,
            pauses: 0,
            redirects: 0,
            failed: None,
            undecided: false,
            last: None,
            said: None,
            unreached: None,
            refused: None,
        }
    }

    /// When the attempt that begins now is given up: not before the operation is, unless another node could answer.
    pub(crate) fn attempt_expires(&self, now: Instant) -> Instant {
        match (self.kind, &self.chosen) {
            (Kind::Anywhere, None) => self.patience_ends(now),
            _ => self.deadline,
        }
    }

    /// When an attempt that begins now has taken as long as it may; the one after it may take twice as long.
    pub(crate) fn patience_ends(&self, now: Instant) -> Instant {
        now.checked_add(self.patience).map_or(self.deadline, |end| end.min(self.deadline))
    }

    pub(crate) fn link(&self) -> Arc<Link> {
        match (&self.chosen, self.kind) {
            (Some(link), _) => link.clone(),
            (None, Kind::Anywhere) => {
                self.router.choose(self.preference, self.failed.as_ref(), self.replicas)
            }
            (None, Kind::Write | Kind::AtLeader) => self.router.leader_or_next(),
        }
    }

    /// Learns from a failure, and waits as long as it takes before the next attempt.
    pub(crate) async fn after(&mut self, link: &Arc<Link>, failure: Failure) -> Result<Next, ClientError> {
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
        if self.leaves_replica(link, failure) {
            return Ok(Next::Again);
        }
        let news = self.learn(endpoint, failure).await;
        let verdict = judge(case, endpoint, failure);
        self.note(endpoint, failure);
        let now = Instant::now();
        let patient = now.duration_since(self.started) < self.router.config.unavailable_after;
        let next = if verdict == Verdict::NewSession { Next::InNewSession } else { Next::Again };
        match &verdict {
            Verdict::Return(error) => return Err(error.clone()),
            Verdict::Patiently(error) => self.refused = Some(error.clone()),
            // It has passed, and something else has come. A node that does not lead, or does not answer, says nothing of that.
            Verdict::Elsewhere | Verdict::Later | Verdict::NewSession => match failure {
                Failure::Answered(_) if !failure.is_refusal() => self.refused = None,
                Failure::Answered(_) | Failure::Attempt(_) => {}
            },
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
            Verdict::Later | Verdict::Patiently(_) | Verdict::Return(_) => false,
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

    /// Whether `failure` came of a replica that need not have been asked: members are from now on, whatever is wrong with that one.
    fn leaves_replica(&mut self, link: &Arc<Link>, failure: &Failure) -> bool {
        if !link.node.replica.is_replica() || self.chosen.is_some() || self.replicas.take().is_none() {
            return false;
        }
        tracing::debug!(endpoint = %link.node.endpoint, why = in_words(failure), "a read leaves a replica");
        link.node.replica.note_failed();
        self.router.ask(&link.node);
        self.note(&link.node.endpoint, failure);
        Instant::now() < self.deadline
    }

    /// Keeps what is to be told of `failure` at the deadline. That a node has not answered says less than what one has said before,
    /// and does not take its place: the last attempt may have had next to no time.
    fn note(&mut self, endpoint: &Endpoint, failure: &Failure) {
        let words = format!("{endpoint}: {}", in_words(failure));
        self.last = match failure {
            Failure::Attempt(AttemptError::Expired { sent: false }) if self.last.is_some() => return,
            Failure::Attempt(AttemptError::Expired { sent: true }) => match &self.said {
                Some(said) => Some(format!("{words}; before that, {said}")),
                None => Some(words),
            },
            Failure::Attempt(_) => Some(words),
            Failure::Answered(_) => {
                self.said = Some(words.clone());
                Some(words)
            }
        };
    }

    /// Tells the router what the failure says about the cluster. True when there is somebody else to ask.
    async fn learn(&mut self, endpoint: &Endpoint, failure: &Failure) -> bool {
        let answer = match failure {
            Failure::Attempt(AttemptError::Expired { .. }) => {
                self.patience = self.patience.saturating_mul(2);
                self.router.hunt();
                return self.kind == Kind::Anywhere && self.router.has_healthy_other_than(endpoint);
            }
            Failure::Attempt(_) => return self.router.all_down().is_none(),
            Failure::Answered(answer) => answer,
        };
        self.router.note_failure(answer);
        let reason = failure.reason().unwrap_or_default();
        self.unreached = None;
        match reason {
            Reason::NotLeader => self.follow_hint(endpoint, answer).await,
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
            Reason::Unspecified
            | Reason::TooLarge
            | Reason::Overloaded
            | Reason::Invalid
            | Reason::SessionExpired
            | Reason::WindowExceeded
            | Reason::TooManySessions
            | Reason::AckTimeout
            | Reason::Compacted
            | Reason::Membership
            | Reason::AnswerForgotten
            | Reason::QuotaExceeded
            | Reason::VersionNotAgreed
            | Reason::Lagged
            | Reason::Unauthenticated
            | Reason::PermissionDenied
            | Reason::LimitReached
            | Reason::OtherHistory
            | Reason::Ahead
            | Reason::Diverged
            | Reason::Undecodable
            | Reason::DeadlineExceeded
            | Reason::NotFound
            | Reason::ConditionFailed
            | Reason::Unreachable => false,
        }
    }

    /// Goes to the leader that a node has named, if one is met there. Whether the next attempt may be made at once.
    async fn follow_hint(&mut self, endpoint: &Endpoint, answer: &v1::Failure) -> bool {
        let hinted = match answer.leader.clone().filter(|_| self.chosen.is_none()) {
            Some(hint) => {
                let hint = decode_leader(hint);
                let seeking = self.router.hinted(endpoint, &hint);
                timeout_at(self.deadline, seeking).await.unwrap_or(Hint::Useless)
            }
            None => Hint::Useless,
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

    pub(super) fn unexpected(&self, link: &Link) -> ClientError {
        let message = "the server answered another kind of request".to_owned();
        failed(&link.node.endpoint, Reason::Unspecified, message, self.kind == Kind::Write)
    }
}

#[cfg(test)]
mod tests {
    mod script;

    use super::*;
    use crate::client::ClientConfig;
    use crate::proto::v1;

    #[tokio::test]
    async fn only_what_can_go_elsewhere_is_given_up_early_and_later_every_time() {
        let endpoint = Endpoint::parse("127.0.0.1:1").unwrap();
        let router = Arc::new(Router::new(vec![endpoint.clone()], ClientConfig::default()));
        let now = Instant::now();
        for (kind, chosen, expected) in [
            (Kind::Anywhere, false, [1, 2, 4, 8, 10]),
            (Kind::Anywhere, true, [10; 5]),
            (Kind::AtLeader, false, [10; 5]),
            (Kind::Write, false, [10; 5]),
        ] {
            let mut operation = Operation::new(&router, kind, None, now);
            operation.chosen = chosen.then(|| router.at(&endpoint));
            for seconds in expected {
                // What fails at once says nothing of how long an answer takes.
                operation.learn(&endpoint, &Failure::Attempt(AttemptError::NotSent("x".into()))).await;
                assert_eq!(operation.attempt_expires(now).duration_since(now).as_secs(), seconds, "{kind:?}");
                operation.learn(&endpoint, &Failure::Attempt(AttemptError::Expired { sent: true })).await;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_told_at_the_deadline_is_what_was_met_last() {
        let endpoint = Endpoint::parse("127.0.0.1:1").unwrap();
        let answered =
            |reason: Reason| Failure::Answered(v1::Failure { reason: reason.into(), ..Default::default() });
        let not_sent = || Failure::Attempt(AttemptError::NotSent("x".into()));
        for (met, expected) in [
            (vec![answered(Reason::DiskFull)], Reason::DiskFull),
            (vec![answered(Reason::DiskFull), answered(Reason::NotLeader), not_sent()], Reason::DiskFull),
            (vec![answered(Reason::DiskFull), answered(Reason::NoQuorum)], Reason::DeadlineExceeded),
            (vec![answered(Reason::DiskStalled), answered(Reason::Overloaded)], Reason::DeadlineExceeded),
            (vec![answered(Reason::NoQuorum), answered(Reason::DiskFull)], Reason::DiskFull),
        ] {
            let router = Arc::new(Router::new(vec![endpoint.clone()], ClientConfig::default()));
            let link = router.at(&endpoint);
            link.node.set_up();
            let mut operation = Operation::new(&router, Kind::Write, None, Instant::now());
            let words = format!("{met:?}");
            for failure in met {
                assert!(operation.after(&link, failure).await.is_ok(), "{words}");
            }
            let told = operation.deadline_exceeded();
            assert_eq!(told.reason(), expected, "{words}: {told}");
        }
    }

    #[tokio::test]
    async fn a_last_attempt_without_an_answer_does_not_hide_what_was_said() {
        let endpoint = Endpoint::parse("127.0.0.1:1").unwrap();
        let router = Arc::new(Router::new(vec![endpoint.clone()], ClientConfig::default()));
        let mut operation = Operation::new(&router, Kind::AtLeader, None, Instant::now());
        let expired = |sent| Failure::Attempt(AttemptError::Expired { sent });
        operation.note(&endpoint, &expired(true));
        assert_eq!(operation.last.as_deref(), Some("127.0.0.1:1: no answer in time"));
        let (reason, message) = (Reason::NoQuorum.into(), "no quorum".to_owned());
        let no_quorum = Failure::Answered(v1::Failure { reason, message, ..Default::default() });
        operation.note(&endpoint, &no_quorum);
        for sent in [true, false] {
            operation.note(&endpoint, &expired(sent));
            let told = "127.0.0.1:1: no answer in time; before that, 127.0.0.1:1: no quorum";
            assert_eq!(operation.last.as_deref(), Some(told));
        }
        operation.note(&endpoint, &Failure::Attempt(AttemptError::NotSent("refused".into())));
        assert_eq!(operation.last.as_deref(), Some("127.0.0.1:1: refused"));
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
