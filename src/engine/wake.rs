//! Proposes the command that the state machine asked for in advance, once its time has come.
//!
//! Time passes in the log: nothing happens on any node until the leader has proposed the machine's
//! [`wake`](StateMachine::wake) command and it is applied, at the same position everywhere.

use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;

use super::{Engine, Inner, WriteOptions};
use crate::machine::StateMachine;
use crate::types::Role;

/// Between two proposals: what is due close together goes into one.
const PACE: Duration = Duration::from_millis(10);
/// After a proposal that failed.
const PAUSE: Duration = Duration::from_millis(250);
/// The clock is looked at this often, in case it is set.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Runs for as long as there is a handle to the node.
pub(super) async fn run<M: StateMachine>(node: Weak<Inner<M>>) {
    if M::wake().is_none() {
        return;
    }
    let Some((mut progress, mut state)) =
        node.upgrade().map(|inner| (inner.core.published().watch(), inner.state.clone()))
    else {
        return;
    };
    loop {
        let leads = state.borrow_and_update().role == Role::Leader;
        let wake_ms = progress.borrow_and_update().wake_ms;
        // What the entry would be stamped with.
        let Some(now_ms) = node.upgrade().map(|inner| inner.log_time_ms()) else { return };
        let due_in = match wake_ms {
            Some(wake_ms) if leads => Some(Duration::from_millis(wake_ms.saturating_sub(now_ms))),
            _ => None,
        };
        match due_in {
            Some(Duration::ZERO) => {
                let Some(inner) = node.upgrade() else { return };
                let pause = if wake(&Engine { inner }).await { PACE } else { PAUSE };
                tokio::time::sleep(pause).await;
            }
            due_in => {
                let sleep = tokio::time::sleep(due_in.unwrap_or(LOOK_AGAIN).min(LOOK_AGAIN));
                let alive = tokio::select! {
                    changed = progress.changed() => changed.is_ok(),
                    changed = state.changed() => changed.is_ok(),
                    () = sleep => true,
                };
                if !alive {
                    return;
                }
                // A busy machine advances with every batch; that often the deadline need not be looked at.
                tokio::time::sleep(PACE.min(due_in.unwrap_or(PACE))).await;
            }
        }
    }
}

/// Whether the command was applied.
async fn wake<M: StateMachine>(engine: &Engine<M>) -> bool {
    let Some(command) = M::wake() else { return false };
    engine.inner.counters.wake_ups.fetch_add(1, Ordering::Relaxed);
    let (done, outcome) = oneshot::channel();
    engine
        .propose(command, WriteOptions::default(), move |result| {
            let _ = done.send(result.map(|_| ()));
        })
        .await;
    match outcome.await {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            tracing::debug!(%error, "the machine's wake-up was not applied; it is proposed again");
            false
        }
        Err(_) => false,
    }
}
