//! A log without threads: its batches are written when somebody says so.
//!
//! For a simulation, which decides from a seed when a write becomes durable, and how much of what waits outlives a crash. All but
//! the threads is what a node runs: state, tail, queue, the writing of a batch, and how a failure ends it all. Nobody looks whether
//! the disk comes back, and nothing is swept.

use std::sync::Arc;

use super::disk::{LogDisk, RecoveredLog};
use super::writer::{self, QueuedWrite};
use super::{Cause, DurableLog, Shared};

/// Writes what the writer thread of a [`DurableLog`] would write.
pub(crate) struct HandWriter<D> {
    shared: Arc<Shared>,
    disk: D,
}

impl<D: LogDisk> DurableLog<D> {
    /// A log of what was `recovered` from `disk`, and its writer.
    pub(crate) fn by_hand(disk: D, reader: D::Reader, recovered: RecoveredLog) -> (Self, HandWriter<D>) {
        let shared = Shared::new(None, Arc::new(|_| {}));
        shared.recover(recovered);
        let mut store = Self::without_threads(shared.clone());
        store.reader = Some(reader);
        (store, HandWriter { shared, disk })
    }
}

impl<D: LogDisk> HandWriter<D> {
    /// Writes that are queued.
    pub(crate) fn queued(&self) -> usize {
        self.shared.queue.len()
    }

    /// Writes the first `count` that are queued, as one batch. What is returned calls the completions, which may call back, and
    /// says how many writes became durable.
    pub(crate) fn write(&mut self, count: usize) -> Box<dyn FnOnce() -> usize + Send> {
        if self.shared.read().failure.is_some() {
            return Box::new(|| 0);
        }
        let writes = self.shared.queue.take(count);
        if writes.is_empty() {
            return Box::new(|| 0);
        }
        let shared = self.shared.clone();
        match writer::settle(&self.shared, &mut self.disk, writes) {
            Ok(settled) => Box::new(move || {
                let count = settled.completions.len();
                if let Err(panic) = settled.complete(&shared.stats) {
                    shared.fail(&format!("a completion panicked: {panic}"), Cause::Disk, Vec::new());
                }
                count
            }),
            Err(error) => {
                // At once: another thread may write before the completions are called.
                let (reason, in_flight) = (error.to_string(), shared.progress.abandon());
                shared.write().failure.get_or_insert_with(|| reason.clone());
                Box::new(move || {
                    shared.fail(&reason, Cause::Disk, in_flight);
                    0
                })
            }
        }
    }

    /// Ends the log as a crash does: the first `count` of the writes that are queued have reached the disk, nobody is told, and
    /// whatever is asked from now on fails. What is returned holds the completions that will not be called.
    pub(crate) fn crash(&mut self, count: usize) -> Vec<QueuedWrite> {
        self.shared.write().failure.get_or_insert_with(|| "this store died in a crash".to_owned());
        let mut lost = self.shared.queue.take(usize::MAX);
        let count = count.min(lost.len());
        for write in &mut lost[..count] {
            let change = std::mem::replace(&mut write.change, writer::LogChange::Nothing);
            // A disk that fails here keeps what it has.
            let written = writer::hand_over(&mut self.disk, change);
            if written.and_then(|()| self.disk.flush(write.committed)).is_err() {
                break;
            }
        }
        lost
    }
}
