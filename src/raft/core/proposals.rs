//! Proposals, and how each of them ends: exactly once, whatever becomes of the core.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use openraft::errors::ClientWriteError;
use openraft::raft::ClientWriteResult;

use super::Core;
use crate::error::Leader;
use crate::machine::StateMachine;
use crate::raft::lease::NotProposed;
use crate::raft::type_config::{self, EntryAnswer, OnFlushed, Responder, SealedCommand, TypeConfig, leader};
use crate::types::LogId;

/// How a proposal ended.
#[derive(Debug)]
pub(crate) enum Proposed {
    /// Committed and applied.
    Applied {
        /// Where it stands.
        log_id: LogId,
        /// What it was answered.
        answer: EntryAnswer,
    },
    /// This leader has it on disk; nothing more is known. Only for [`Core::propose_to_leader`].
    Flushed {
        /// Where it stands.
        log_id: LogId,
    },
    /// This node leads, but has lost touch with its quorum; nothing was proposed.
    NoQuorum,
    /// This node does not lead; nothing was proposed.
    NotLeader(Option<Leader>),
    /// Leadership was lost with the entry in the log: it may yet be committed.
    Interrupted(Option<Leader>),
    /// The core had stopped before; nothing was proposed.
    Gone,
    /// The core went away without an answer.
    Stopped,
}

impl From<NotProposed> for Proposed {
    fn from(closed: NotProposed) -> Self {
        match closed {
            NotProposed::Stopped => Self::Gone,
            NotProposed::NoQuorum => Self::NoQuorum,
        }
    }
}

impl<M: StateMachine> Core<M> {
    /// Proposes `command`; `done` is called exactly once.
    pub(crate) async fn propose(&self, command: Bytes, done: impl FnOnce(Proposed) + Send + 'static) {
        if let Err(closed) = self.admission.check() {
            return done(closed.into());
        }
        let responder = Responder::new(|outcome| done(outcome.map_or(Proposed::Stopped, proposed)));
        // On failure the responder has been dropped, and has reported so.
        let _ = self.raft.client_write_ff(SealedCommand::new(command), Some(responder)).await;
    }

    /// Proposes `command`; `done` is called exactly once: with [`Proposed::Flushed`] as soon as this leader has it on
    /// disk, or with what went wrong before. `ended` is called exactly once, when it has been applied here or is lost
    /// to this node.
    pub(crate) async fn propose_to_leader(
        &self,
        command: Bytes,
        done: impl FnOnce(Proposed) + Send + 'static,
        ended: impl FnOnce() + Send + 'static,
    ) {
        if let Err(closed) = self.admission.check() {
            done(closed.into());
            return ended();
        }
        let done = Arc::new(Mutex::new(Some(done)));
        let once = move |outcome| {
            let done = done.lock().expect("invariant: no panic under this lock").take();
            if let Some(done) = done {
                done(outcome);
            }
        };
        let flushed = once.clone();
        let on_flushed = OnFlushed::new(move |log_id| flushed(Proposed::Flushed { log_id }));
        let command = SealedCommand { bytes: command, on_flushed: Some(on_flushed) };
        let responder = Responder::new(move |outcome| {
            once(outcome.map_or(Proposed::Stopped, proposed));
            ended();
        });
        let _ = self.raft.client_write_ff(command, Some(responder)).await;
    }
}

fn proposed(result: ClientWriteResult<TypeConfig>) -> Proposed {
    match result {
        Ok(response) => {
            Proposed::Applied { log_id: type_config::from_log_id(&response.log_id), answer: response.data }
        }
        Err(ClientWriteError::ForwardToLeader(forward)) => Proposed::NotLeader(leader(forward)),
        Err(ClientWriteError::LogEntryDiscarded(forward)) => Proposed::Interrupted(leader(forward)),
        // Only membership changes and conditional writes end like this.
        Err(ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_)) => {
            Proposed::Stopped
        }
    }
}
