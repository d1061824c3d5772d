//! The public handle: open a node, write, read, watch, stop.

use std::time::Duration;

use tokio::sync::watch;

pub use config::{EngineConfig, Limits, SnapshotPolicy, Timing};

use crate::error::{FatalError, Leader, OpenError, ReadError, WriteError};
use crate::machine::StateMachine;
use crate::types::{Incarnation, LogId, Membership, NodeId, ReadLevel, Role};

mod config;

/// One node of a replicated state machine. Cheap to clone; all clones are the same node.
#[derive(Debug)]
pub struct Engine<M: StateMachine> {
    _m: std::marker::PhantomData<fn() -> M>,
}

impl<M: StateMachine> Clone for Engine<M> {
    fn clone(&self) -> Self {
        Self { _m: self._m }
    }
}

/// An acknowledged write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written<R> {
    /// Where in the log the command stands.
    pub log_id: LogId,
    /// What the state machine answered.
    pub reply: R,
}

/// An answered read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadOutcome<A> {
    /// The position up to which the answering state had been applied.
    pub applied: Option<LogId>,
    /// What the state machine answered.
    pub answer: A,
}

/// A node's view of itself and its cluster. Cheap: nothing is computed to tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeState {
    /// This node.
    pub node_id: NodeId,
    /// What it is at present.
    pub role: Role,
    /// Its term.
    pub term: u64,
    /// Whom it follows.
    pub leader: Option<Leader>,
    /// Index of its last log entry, durable or not.
    pub last_log: Option<u64>,
    /// Up to where it knows the log to be committed.
    pub committed: Option<LogId>,
    /// Up to where it has applied.
    pub applied: Option<LogId>,
    /// Last position covered by its newest snapshot.
    pub snapshot: Option<LogId>,
    /// Up to where it has purged its log.
    pub purged: Option<LogId>,
    /// The membership in effect.
    pub membership: Membership,
    /// Set when the node has stopped because of an error.
    pub fatal: Option<FatalError>,
}

/// [`NodeState`], identity, and the hash of the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The name of its cluster.
    pub cluster: String,
    /// Its data directory's incarnation.
    pub incarnation: Incarnation,
    /// Its advertised client address.
    pub client: String,
    /// Role, term and positions. `state.applied` is the position that `state_hash` belongs to.
    pub state: NodeState,
    /// Hash of the state after `state.applied`: equal on all nodes that have applied the same entry.
    pub state_hash: u64,
}

impl<M: StateMachine> Engine<M> {
    /// Opens the node in `config.data_dir` and starts to take part in its cluster.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(config: EngineConfig, machine: M) -> Result<Self, OpenError> {
        let _ = (config, machine);
        unimplemented!("skeleton")
    }

    /// Writes: returns once `command` is committed by a quorum and applied here.
    ///
    /// # Errors
    /// See [`WriteError`]; [`WriteError::maybe_applied`] says whether a retry could apply twice.
    pub async fn write(&self, command: M::Command) -> Result<Written<M::Reply>, WriteError> {
        let _ = command;
        unimplemented!("skeleton")
    }

    /// Proposes `command` and returns; `done` is called exactly once with the outcome, on an engine task
    /// that must not be blocked. Waits only while the queue of proposals is full. Commands proposed one
    /// after the other by one task enter the log in that order.
    pub async fn propose<F>(&self, command: M::Command, done: F)
    where
        F: FnOnce(Result<Written<M::Reply>, WriteError>) + Send + 'static,
    {
        let _ = (command, done);
        unimplemented!("skeleton")
    }

    /// Answers `query` at `level`.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn read(&self, query: M::Query, level: ReadLevel) -> Result<ReadOutcome<M::Answer>, ReadError> {
        let _ = (query, level);
        unimplemented!("skeleton")
    }

    /// The node's state, and every change of it.
    pub fn watch(&self) -> watch::Receiver<NodeState> {
        unimplemented!("skeleton")
    }

    /// State, identity and state hash.
    pub async fn status(&self) -> Status {
        unimplemented!("skeleton")
    }

    /// Waits until a leader is known and this node has applied what was committed when it joined.
    /// False when `timeout` passes first.
    pub async fn ready(&self, timeout: Duration) -> bool {
        let _ = timeout;
        unimplemented!("skeleton")
    }

    /// Hands leadership over if this node leads, then stops. Idempotent.
    pub async fn shutdown(&self) {
        unimplemented!("skeleton")
    }
}
