//! The client's session: opened when the first write needs it, shared by all callers, replaced when it is gone.
//!
//! [`crate::session`] says what a session is. Here is who opens it: one caller at a time, while the others
//! wait for it; one that is given up half-way leaves a session that nobody uses, which expires.
//!
//! The window of a session begins at its first write that is not settled, and one that is not settled for long would stop all
//! others. So a session whose window such a write has filled is *retired*: the next writes go into another one, and it is
//! closed once nothing of it is under way.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};

use arc_swap::ArcSwapOption;
use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, timeout_at};

use super::attempt::{Kind, Way};
use super::error::ClientError;
use super::frame::{self, Frame};
use super::judge::{Failure, failed, in_words};
use super::operation::Operation;
use super::router::Router;
use crate::call::{Header, whole_ms};
use crate::proto::v1::answer::Content as Answered;
use crate::proto::v1::call::Content;
use crate::proto::v1::{self, OpenSessionRequest};
use crate::reason::Reason;
use crate::runtime;
use crate::session::{Session, Ticket};
use crate::types::{HistoryEpoch, SessionSlot};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Sessions {
    current: ArcSwapOption<Session>,
    /// Sessions that others have taken the place of, as long as writes of them may be under way.
    retired: std::sync::Mutex<Vec<Arc<Session>>>,
    /// Held by whoever opens a session. Why the last attempt failed.
    opening: Mutex<Option<ClientError>>,
    /// Attempts to open one that have ended, either way.
    attempts: AtomicU64,
    settled: Arc<Settled>,
}

/// Tells those who wait for room in the window that a write is settled.
#[derive(Debug, Default)]
struct Settled {
    notify: Notify,
    /// How many wait; mostly none, and then there is nothing to tell.
    waiting: AtomicUsize,
}

/// Counts one who waits.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    /// From before the look at the window on: what is settled after that look finds it counted, because both happen under the
    /// lock of the session.
    fn new(settled: &'a Settled) -> Self {
        settled.waiting.fetch_add(1, Ordering::Relaxed);
        Self(&settled.waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The place of one write in the session; settles it when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    /// `None` only while it is dropped.
    ticket: Option<Ticket>,
    settled: Arc<Settled>,
}

impl Place {
    /// What to send with the next attempt.
    pub(crate) fn slot(&self) -> SessionSlot {
        self.ticket().slot()
    }

    /// The history in which its session was opened.
    pub(crate) fn history(&self) -> HistoryEpoch {
        self.ticket().session().history()
    }

    fn ticket(&self) -> &Ticket {
        self.ticket.as_ref().expect("invariant: taken only in drop")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.ticket.take());
        if self.settled.waiting.load(Ordering::Relaxed) > 0 {
            self.settled.notify.notify_one();
        }
    }
}

impl Sessions {
    pub(crate) fn new() -> Self {
        Self {
            current: ArcSwapOption::empty(),
            retired: std::sync::Mutex::default(),
            opening: Mutex::new(None),
            attempts: AtomicU64::new(0),
            settled: Arc::default(),
        }
    }

    /// A place for a write. Opens a session if there is none, and waits while its window is full.
    pub(crate) async fn begin(&self, router: &Arc<Router>, deadline: Instant) -> Result<Place, ClientError> {
        if let Some(ticket) = self.current.load().as_ref().and_then(Session::begin) {
            return Ok(self.place(ticket));
        }
        Box::pin(self.begin_slowly(router, deadline)).await
    }

    async fn begin_slowly(&self, router: &Arc<Router>, deadline: Instant) -> Result<Place, ClientError> {
        let _waits = Waits::new(&self.settled);
        loop {
            let settled = self.settled.notify.notified();
            tokio::pin!(settled);
            // From before the look at the window, so that nothing that is settled after it is missed.
            settled.as_mut().enable();
            let Some(session) = self.current.load_full() else {
                self.open(router, deadline, None).await?;
                continue;
            };
            if let Some(ticket) = session.begin() {
                // One settled write can make room for many: whoever gets in lets the next one try.
                self.settled.notify.notify_one();
                return Ok(self.place(ticket));
            }
            if session.is_held_up() {
                self.open(router, deadline, Some(&session)).await?;
                continue;
            }
            if timeout_at(deadline, settled).await.is_err() {
                return Err(out_of_time(router, "the session's window is full"));
            }
        }
    }

    fn place(&self, ticket: Ticket) -> Place {
        Place { ticket: Some(ticket), settled: self.settled.clone() }
    }

    /// Sees to it that there is a session, and another than the one that is `held_up`, unless another caller does.
    async fn open(
        &self,
        router: &Arc<Router>,
        deadline: Instant,
        held_up: Option<&Arc<Session>>,
    ) -> Result<(), ClientError> {
        let seen = self.attempts.load(Ordering::Acquire);
        let Ok(mut last_failure) = timeout_at(deadline, self.opening.lock()).await else {
            return Err(match router.all_down().or_else(|| router.unheard()) {
                Some(tried) => ClientError::Unavailable { tried },
                None => out_of_time(router, "no session could be opened"),
            });
        };
        let is_held_up =
            |current: &Arc<Session>| held_up.is_some_and(|held_up| Arc::ptr_eq(current, held_up));
        if self.current.load().as_ref().is_some_and(|current| !is_held_up(current)) {
            return Ok(());
        }
        // What another caller has just been told holds for us too, except that its time was over, if ours is not.
        let is_late = deadline <= Instant::now() + router.config.retry_backoff_max;
        if self.attempts.load(Ordering::Acquire) != seen
            && let Some(error) = &*last_failure
            && !matches!(error, ClientError::DeadlineExceeded { .. })
            && (is_late || !ended_by_deadline(error))
        {
            return Err(error.clone());
        }
        let opened = open_session(router, deadline).await;
        self.attempts.fetch_add(1, Ordering::AcqRel);
        match opened {
            Ok(session) => {
                router.metrics.sessions_opened.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(session = session.id(), "opened a session");
                if let Some(before) = self.current.swap(Some(session)) {
                    self.retire(router, before);
                    self.settled.notify.notify_waiters();
                }
                *last_failure = None;
                Ok(())
            }
            Err(error) => {
                *last_failure = Some(error.clone());
                Err(error)
            }
        }
    }

    /// `session` is not begun in any more. Closes those retired before it of which nothing is under way.
    fn retire(&self, router: &Arc<Router>, session: Arc<Session>) {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        // A write holds its session.
        for idle in retired.extract_if(.., |session| Arc::strong_count(session) == 1) {
            let (router, expires) = (router.clone(), Instant::now() + router.config.timeout);
            drop(runtime::spawn(async move { close_session(&router, &idle, expires).await }));
        }
        retired.push(session);
    }

    /// The session `id` is gone: the next write opens another.
    pub(crate) fn forget(&self, id: u64) {
        let current = self.current.load();
        if current.as_ref().is_some_and(|session| session.id() == id) {
            // Does nothing if somebody else has replaced it meanwhile.
            self.current.compare_and_swap(&*current, None);
            self.settled.notify.notify_waiters();
        }
    }

    /// All sessions, which are used no more.
    pub(crate) fn take(&self) -> Vec<Arc<Session>> {
        let mut sessions = std::mem::take(&mut *self.retired.lock().unwrap_or_else(PoisonError::into_inner));
        sessions.extend(self.current.swap(None));
        self.settled.notify.notify_waiters();
        sessions
    }
}

/// Whether this is what was told last when the time was over: with more of it there might be a session.
fn ended_by_deadline(error: &ClientError) -> bool {
    let passes =
        |reason: &Reason| matches!(reason, Reason::TooManySessions | Reason::DiskFull | Reason::DiskStalled);
    matches!(error, ClientError::Failed { reason, .. } if passes(reason))
}

/// Nothing was sent when the deadline passed.
fn out_of_time(router: &Router, last: &str) -> ClientError {
    ClientError::DeadlineExceeded {
        timeout: router.config.timeout,
        maybe_applied: false,
        last: Some(last.to_owned()),
    }
}

/// Opens a session. One whose answer is lost is opened in vain, and expires.
pub(crate) async fn open_session(
    router: &Arc<Router>,
    deadline: Instant,
) -> Result<Arc<Session>, ClientError> {
    let ttl_ms = whole_ms(router.config.session_ttl);
    let mut operation = Operation::new(router, Kind::AtLeader, None, Instant::now());
    operation.deadline = deadline;
    loop {
        let link = operation.link();
        let content = Some(Content::OpenSession(OpenSessionRequest { ttl_ms }));
        let frame = Frame::of(&v1::Call { content, ..Default::default() });
        let failure = match link.call(router, frame, Way::of(Kind::AtLeader), deadline).await {
            Ok(answer) => match frame::read(answer).and_then(|answer| answer.content) {
                Some(Answered::OpenSession(opened)) => {
                    router.answered_as_leader(&link);
                    let history = Header::decode(opened.header).history;
                    return Ok(Session::new(opened.session, opened.window, history));
                }
                Some(Answered::Failure(failure)) => Failure::Answered(failure),
                _ => return Err(operation.unexpected(&link)),
            },
            Err(error) => Failure::of_attempt(error),
        };
        if router.config.without_session_when_full && failure.reason() == Some(Reason::TooManySessions) {
            return Err(failed(&link.node.endpoint, Reason::TooManySessions, in_words(&failure), false));
        }
        operation.after(&link, failure).await?;
    }
}

/// Closes a session: one attempt, which is over by `expires`.
pub(crate) async fn close_session(router: &Arc<Router>, session: &Session, expires: Instant) {
    let (session, history) = (session.id(), session.history().0);
    let link = router.leader_or_next();
    let content = Some(Content::CloseSession(v1::CloseSessionRequest { session, history }));
    let frame = Frame::of(&v1::Call { content, ..Default::default() });
    let outcome = link.call(router, frame, Way::of(Kind::AtLeader), expires).await;
    tracing::debug!(session, closed = outcome.is_ok(), "closed the session");
}
