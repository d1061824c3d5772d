//! How a node ends: it is told to, its last handle outside is gone (`hold`), or it must not go on (`fatal`).

pub(super) mod fatal;
pub(super) mod hold;

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::engine::{Engine, Inner, NodeState};
use crate::machine::StateMachine;
use crate::types::Role;

/// What ends is waited for so long: a wedged disk must not keep the process for ever.
pub(super) const LET_GO: Duration = Duration::from_secs(5);

impl<M: StateMachine> Inner<M> {
    /// Waits until this node ends; why it does.
    pub(super) async fn ended(&self) -> String {
        let (mut fatal, mut stop) = (self.fatal.subscribe(), self.stop.subscribe());
        tokio::select! {
            biased;
            _ = fatal.wait_for(Option::is_some) => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        self.fatal.in_words().unwrap_or_else(|| "the node is shutting down".to_owned())
    }
}

impl<M: StateMachine> Engine<M> {
    /// Waits until the node has stopped, for whatever reason: [`NodeState::fatal`] says for which, if it was not
    /// [`shutdown`](Self::shutdown).
    pub async fn stopped(&self) -> NodeState {
        self.wait_for(|state| state.role == Role::Stopped).await.unwrap_or_else(|| self.state())
    }

    /// Hands leadership over if this node leads, then stops. When it returns, the data directory can be
    /// opened again. Idempotent.
    pub async fn shutdown(&self) {
        let inner = &self.inner;
        self.note_time().await;
        self.hand_over().await;
        inner.stopping.store(true, Ordering::Release);
        let deadline = tokio::time::Instant::now() + LET_GO;
        if tokio::time::timeout_at(deadline, inner.core.shutdown()).await.is_err() {
            tracing::error!("the core did not stop within {} s; its disk may hang", LET_GO.as_secs());
        }
        // Whoever watches is to see the end.
        let mut state = self.watch();
        let _ = tokio::time::timeout_at(deadline, state.wait_for(|state| state.role == Role::Stopped)).await;
        inner.stop.send_replace(true);
        let mut released = inner.released.clone();
        // The core's last tasks end by themselves, and with the last of them the log is closed.
        if tokio::time::timeout_at(deadline, async { while released.changed().await.is_ok() {} })
            .await
            .is_err()
        {
            tracing::warn!("the log is still in use; the data directory stays locked until the process ends");
        }
    }

    /// Hands over if this node leads and somebody can.
    async fn hand_over(&self) {
        if self.inner.core.metrics().role == Role::Leader
            && let Err(error) = self.transfer_leader(None).await
        {
            tracing::warn!(%error, "stopping without handing over");
        }
    }
}

/// What a task does that has nothing left to do: its node is gone, or about to be ended, and the task is ended with it.
pub(super) async fn until_ended() {
    std::future::pending().await
}
