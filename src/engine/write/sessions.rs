//! Sessions: opened, closed, and listed for whoever operates the cluster.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::admission::Writer;
use crate::engine::{Engine, Inner};
use crate::error::{ReadError, WriteError};
use crate::machine::StateMachine;
use crate::machine::sessions::{SessionInfo, WINDOW};
use crate::raft::envelope;
use crate::runtime;
use crate::session::Session;
use crate::types::{ClusterClock, HistoryEpoch, LogId};

/// Most sessions in one answer.
pub const MAX_LISTED_SESSIONS: usize = 1_000;

/// A session that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenedSession {
    /// Its id.
    pub session: u64,
    /// Where the entry that opened it stands.
    pub log_id: LogId,
}

/// A session that is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClosedSession {
    /// Where the entry that closed it stands.
    pub log_id: LogId,
    /// Whether it was open before.
    pub was_open: bool,
}

/// Sessions that are open.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionList {
    /// Up to where the answering state had been applied.
    pub applied: Option<LogId>,
    /// The clocks at that entry: they turn elapsed time into log time.
    pub clock: ClusterClock,
    /// The sessions, in the order of their ids.
    pub sessions: Vec<SessionInfo>,
    /// Whether there are more.
    pub more: bool,
}

impl<M: StateMachine> Engine<M> {
    /// Opens a session, which makes writes exactly-once: see [`crate::session`]. It is closed when it is not used for
    /// `ttl`, by elapsed time; zero means ten minutes, and the bounds are ten seconds and a day.
    ///
    /// # Errors
    /// See [`WriteError`]. When the outcome is unknown a session may have been opened that nobody uses; it
    /// expires.
    pub async fn open_session(&self, ttl: Duration) -> Result<Arc<Session>, WriteError> {
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        let opened = self.open_session_for("", ttl_ms).await?;
        Ok(Session::new(opened.session, WINDOW, self.history()))
    }

    /// As [`open_session`](Self::open_session), for a client at the address `opener`, of which no more than
    /// [`MAX_OPENER_SESSIONS`](crate::machine::sessions::MAX_OPENER_SESSIONS) are open at a time, and which keeps count
    /// of sequences itself.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn open_session_for(&self, opener: &str, ttl_ms: u64) -> Result<OpenedSession, WriteError> {
        // Random, so that nobody writes into somebody else's session by accident, such as one of an earlier cluster.
        let session = runtime::random_u64().max(1);
        let envelope = envelope::seal_open_session(self.inner.reading(), session, ttl_ms, opener);
        self.write_envelope(Writer::Session, envelope)
            .await
            .map(|opened| OpenedSession { session, log_id: opened.log_id })
    }

    /// Closes a session, whoever opened it. Its unanswered writes can be repeated no more; later ones are refused with
    /// [`WriteError::SessionExpired`].
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn close_session(&self, session: u64) -> Result<ClosedSession, WriteError> {
        self.close_session_in(session, HistoryEpoch::UNKNOWN).await
    }

    /// As [`close_session`](Self::close_session), of a session that was opened in `history`.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn close_session_in(
        &self,
        session: u64,
        history: HistoryEpoch,
    ) -> Result<ClosedSession, WriteError> {
        self.inner.check_history(history)?;
        let envelope = envelope::seal_close_session(self.inner.reading(), session);
        let closed = self.write_envelope(Writer::Session, envelope).await?;
        let was_open = closed.reply.is_some_and(|reply| reply.first() == Some(&1));
        Ok(ClosedSession { log_id: closed.log_id, was_open })
    }

    /// The open sessions with ids above `after`, at most `limit` and [`MAX_LISTED_SESSIONS`], from what this node has applied.
    ///
    /// # Errors
    /// [`ReadError::Stopped`] when the node stops, [`ReadError::Behind`] when it is busy for twice the longest election
    /// timeout.
    pub async fn list_sessions(&self, after: u64, limit: usize) -> Result<SessionList, ReadError> {
        let inner = &self.inner;
        let limit = limit.clamp(1, MAX_LISTED_SESSIONS);
        let deadline = Instant::now() + inner.config.timing.patience();
        match tokio::time::timeout_at(deadline, inner.core.sessions()).await {
            Ok(Some((progress, table))) => {
                // One more tells whether there are more.
                let mut sessions = table.list(after, limit + 1);
                let more = sessions.len() > limit;
                sessions.truncate(limit);
                Ok(SessionList { applied: progress.log_id, clock: progress.clock, sessions, more })
            }
            Ok(None) => Err(inner.stopped_read()),
            Err(_) => {
                let applied = inner.core.published().progress().log_id.map(|log_id| log_id.index);
                Err(ReadError::Behind { applied, wanted: applied.unwrap_or_default() })
            }
        }
    }
}

impl<M: StateMachine> Inner<M> {
    fn stopped_read(&self) -> ReadError {
        let reason = self.fatal.in_words().unwrap_or_else(|| "the node is shutting down".to_owned());
        ReadError::Stopped { reason }
    }
}
