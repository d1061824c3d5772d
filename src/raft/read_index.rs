//! Read indexes: reads that wait at the same time share one confirmation of leadership, whether they were asked
//! for here or by a follower on behalf of its own readers.
//!
//! The protocol, with a figure: `docs/design/reads-and-leases.md`.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use openraft::errors::{LinearizableReadError, RaftError};
use openraft::{LinearizerOption, Raft, ReadPolicy};
use tokio::sync::{mpsc, oneshot};

use super::activity::Activity;
use super::apply::Applier;
use super::type_config::{self, TypeConfig};
use crate::error::Leader;
use crate::machine::StateMachine;
use crate::runtime::Tasks;
use crate::types::NodeId;

/// Most reads that share one confirmation; more wait for their turn.
const MAX_SHARED: usize = 65_536;

/// Why there is no read index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NoReadIndex {
    /// This node does not lead.
    NotLeader(Option<Leader>),
    /// A quorum did not confirm that it leads.
    NoQuorum(String),
    /// The core has stopped.
    Stopped(String),
}

/// Who waits for a read index.
pub(crate) type IndexWaiter = oneshot::Sender<Result<u64, NoReadIndex>>;

/// Hands out read indexes. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct ReadIndexes {
    waiting: mpsc::Sender<IndexWaiter>,
}

impl ReadIndexes {
    /// Starts the task that asks `raft`, and gives up on a quorum after `patience`. It ends with the last clone.
    /// Counts in `activity`.
    pub(crate) fn start<M: StateMachine>(
        raft: Raft<TypeConfig, Applier<M>>,
        patience: Duration,
        activity: Arc<Activity>,
        tasks: &Tasks,
    ) -> Self {
        let (waiting, arrivals) = mpsc::channel(MAX_SHARED);
        tasks.passing("read-indexes", confirm(raft, arrivals, patience, activity));
        Self { waiting }
    }

    /// An index such that a state that has applied it has seen every write acknowledged before this call
    /// (Raft thesis, §6.4).
    ///
    /// # Errors
    /// See [`NoReadIndex`].
    pub(crate) async fn next(&self) -> Result<u64, NoReadIndex> {
        let stopped = || NoReadIndex::Stopped("the node is shutting down".to_owned());
        let (done, outcome) = oneshot::channel();
        self.waiting.send(done).await.map_err(|_| stopped())?;
        outcome.await.map_err(|_| stopped())?
    }
}

/// One confirmation after the other, each for all reads that arrived before it began.
async fn confirm<M: StateMachine>(
    raft: Raft<TypeConfig, Applier<M>>,
    mut arrivals: mpsc::Receiver<IndexWaiter>,
    patience: Duration,
    activity: Arc<Activity>,
) {
    let mut waiters = Vec::new();
    while arrivals.recv_many(&mut waiters, MAX_SHARED).await > 0 {
        let outcome = match tokio::time::timeout(patience, ask(&raft, ReadPolicy::ReadIndex)).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let waited_ms = patience.as_millis();
                Err(NoReadIndex::NoQuorum(format!("no majority answered within {waited_ms} ms")))
            }
        };
        // A node that does not lead has confirmed nothing.
        if !matches!(outcome, Err(NoReadIndex::NotLeader(_))) {
            activity.read_confirmations.fetch_add(1, Relaxed);
            activity.confirmed_reads.fetch_add(waiters.len() as u64, Relaxed);
        }
        for waiter in waiters.drain(..) {
            // A reader that gave up does not matter.
            let _ = waiter.send(outcome.clone());
        }
    }
}

/// openraft's own words for too few answers show its types.
fn answered(nodes: impl Iterator<Item = NodeId>) -> String {
    let nodes: Vec<_> = nodes.map(|node_id| node_id.to_string()).collect();
    match nodes.as_slice() {
        [] => "no node answered".to_owned(),
        nodes => format!("no more than these nodes answered: {}", nodes.join(", ")),
    }
}

/// The read index for `how`.
///
/// # Errors
/// See [`NoReadIndex`].
pub(super) async fn ask<M: StateMachine>(
    raft: &Raft<TypeConfig, Applier<M>>,
    how: impl Into<LinearizerOption>,
) -> Result<u64, NoReadIndex> {
    match raft.get_read_log_id(how).await {
        Ok((read, _)) => Ok(read.log_id().index),
        Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => {
            Err(NoReadIndex::NotLeader(type_config::leader(forward)))
        }
        Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(quorum))) => {
            Err(NoReadIndex::NoQuorum(answered(quorum.got.iter().copied())))
        }
        Err(RaftError::Fatal(fatal)) => Err(NoReadIndex::Stopped(type_config::fatal(&fatal))),
    }
}
