//! How far the opening of a node is, for the log and for whoever asks.

use std::time::Duration;

use crate::machine::StateMachine;
use crate::raft::apply::Applier;
use crate::runtime;
use crate::storage::{LogStore, StartProgress, StartStep};
use crate::types::LogId;

/// Ends a task when dropped.
pub(in crate::engine) struct Ending(tokio::task::AbortHandle);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Says in the log how far the start is, until what is returned is dropped.
pub(in crate::engine) fn tell_how_far(progress: StartProgress) -> Ending {
    /// A start that takes no longer says nothing.
    const REPORT_INTERVAL: Duration = Duration::from_secs(5);
    let task = runtime::spawn(async move {
        loop {
            tokio::time::sleep(REPORT_INTERVAL).await;
            tracing::info!("recovering: {}", progress.now());
        }
    });
    Ending(task.abort_handle())
}

/// Counts the entries that the core applies while it starts, until what is returned is dropped.
pub(in crate::engine) fn count_applied<M: StateMachine>(
    progress: &StartProgress,
    log: &dyn LogStore,
    applier: &Applier<M>,
) -> Ending {
    let published = applier.published();
    let next = |position: Option<LogId>| position.map_or(0, |log_id| log_id.index + 1);
    let covered = next(published.progress().log_id);
    progress.begin(StartStep::Applying, next(log.committed()).saturating_sub(covered));
    let (mut applied, progress) = (published.watch(), progress.clone());
    let task = runtime::spawn(async move {
        loop {
            let reached = next(published.progress().log_id);
            progress.reach(reached.saturating_sub(covered));
            if applied.changed().await.is_err() {
                return;
            }
        }
    });
    Ending(task.abort_handle())
}
