//! Linearizable reads: those that wait at the same time share one confirmation of leadership.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::machine::StateMachine;
use crate::raft::core::{Core, NoReadIndex};
use crate::runtime;

/// Most reads that share one confirmation.
const MAX_SHARED: usize = 65_536;

type Waiter = oneshot::Sender<Result<u64, NoReadIndex>>;

/// Hands out read indexes.
#[derive(Debug, Clone)]
pub(super) struct ReadIndexes {
    waiting: mpsc::Sender<Waiter>,
}

impl ReadIndexes {
    /// Starts the task that asks `core`, and gives up on a quorum after `patience`.
    pub(super) fn start<M: StateMachine>(core: Core<M>, patience: Duration) -> Self {
        let (waiting, arrivals) = mpsc::channel(MAX_SHARED);
        runtime::spawn(confirm(core, arrivals, patience));
        Self { waiting }
    }

    /// An index that covers every write acknowledged before this call.
    pub(super) async fn next(&self) -> Result<u64, NoReadIndex> {
        let stopped = || NoReadIndex::Stopped("the node is shutting down".to_owned());
        let (done, outcome) = oneshot::channel();
        self.waiting.send(done).await.map_err(|_| stopped())?;
        outcome.await.map_err(|_| stopped())?
    }
}

/// One confirmation after the other, each for all reads that arrived before it began.
async fn confirm<M: StateMachine>(core: Core<M>, mut arrivals: mpsc::Receiver<Waiter>, patience: Duration) {
    let mut waiters = Vec::new();
    while arrivals.recv_many(&mut waiters, MAX_SHARED).await > 0 {
        let outcome = match tokio::time::timeout(patience, core.read_index()).await {
            Ok(outcome) => outcome,
            Err(_) => Err(NoReadIndex::NoQuorum(format!("no majority answered within {patience:?}"))),
        };
        for waiter in waiters.drain(..) {
            // A reader that gave up does not matter.
            let _ = waiter.send(outcome.clone());
        }
    }
}
