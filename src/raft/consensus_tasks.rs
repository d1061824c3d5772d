//! openraft's own tasks, as members of the node's set.
//!
//! openraft notices when its main task panics, and nothing else: without the task that replicates to a peer that peer
//! falls behind for ever, without the one that ticks no leader is ever missed, without the one that reports flushes no
//! write is ever answered. None of this shows anywhere. So a panic in any of them ends the node.
//!
//! openraft spawns through a function without a receiver. The set is therefore handed down from task to task, beginning
//! with the one that starts the core. The tasks are named by the type of what they run, which is good enough for
//! a name that people read: one that is not recognised is a member like any other, and only called [`OTHER`].
//!
//! That they end is for openraft to decide: those that replicate do with every leader. When the main task ends, the
//! node hears of it by what the core says of itself.

use std::any::type_name;

use tokio::task::JoinHandle;

use crate::runtime::{self, Tasks};

tokio::task_local! {
    static SET: Tasks;
}

/// A task that none of [`NAMES`] is for.
pub(super) const OTHER: &str = "consensus-other";

/// What is found in the type of a task, and its name.
const NAMES: [(&str, &str); 9] = [
    ("openraft::core::tick::", "consensus-tick"),
    ("openraft::core::sm::worker::", "consensus-apply"),
    ("openraft::core::step_down_watcher::", "consensus-step-down"),
    ("::pending_read_deadline_notifier::", "consensus-read-deadlines"),
    ("openraft::core::heartbeat::", "consensus-heartbeat"),
    ("openraft::replication::snapshot_transmitter::", "consensus-snapshot"),
    ("openraft::replication::", "consensus-replication"),
    ("::io_completion_forwarder", "consensus-flushed"),
    ("openraft::core::raft_core::", "consensus-core"),
];

fn name<F>() -> &'static str {
    let shown = type_name::<F>();
    NAMES.iter().find(|(part, _)| shown.contains(part)).map_or(OTHER, |(_, name)| *name)
}

/// `start`, whose tasks and theirs join `tasks`.
pub(super) fn joining<F: Future>(tasks: &Tasks, start: F) -> impl Future<Output = F::Output> {
    SET.scope(tasks.clone(), start)
}

/// Spawns a task of openraft's.
pub(super) fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    match SET.try_with(Tasks::clone) {
        Ok(tasks) => runtime::spawn(SET.scope(tasks.clone(), tasks.watched(name::<F>(), future))),
        // openraft's own tests of a log have no node.
        Err(_) => runtime::spawn(future),
    }
}
