//! What keeps a node running: its handles outside.
//!
//! A node ends when the last of them is dropped. What is under way in it at that moment (a call that another member has passed on, a
//! write that waits for its quorum) holds the node, too, and may wait for long: it ends with the node, and not the other way round.

use std::sync::Weak;
use std::sync::atomic::Ordering;

use crate::engine::Inner;
use crate::machine::StateMachine;
use crate::runtime::Spawner;

/// Held by every handle outside; ends the node when the last of them is dropped.
pub(in crate::engine) struct Hold<M: StateMachine> {
    node: Weak<Inner<M>>,
    spawner: Spawner,
}

impl<M: StateMachine> Hold<M> {
    /// Of `node`, by a task of it.
    pub(in crate::engine) fn on(node: Weak<Inner<M>>) -> Self {
        Self { node, spawner: Spawner::of_this_task() }
    }
}

impl<M: StateMachine> Drop for Hold<M> {
    fn drop(&mut self) {
        // Nothing else holds it: it is gone already.
        let Some(inner) = self.node.upgrade() else { return };
        if inner.stop.send_replace(true) {
            return;
        }
        inner.stopping.store(true, Ordering::Release);
        let core = inner.core.clone();
        // What has been proposed is told its outcome by this, and lets go of the node.
        self.spawner.spawn(async move { core.shutdown().await });
    }
}
