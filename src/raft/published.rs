//! How far the machine has come, and views of it for readers.
//!
//! A view of a persistent data structure costs nothing to take, but it shares all its nodes with the machine,
//! and every node the machine changes afterwards must be copied first. Taking one after every batch made
//! that copying a third of a write's cost. So a view is taken only when somebody asks for one that is newer than
//! the last: by the apply task, after its next batch or when it is idle. And when the last one has become so old that
//! it keeps more alive than it saves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::types::{ClusterClock, HistoryEpoch, LogId, Quota};

/// A view may be this many entries old. It keeps alive all that has been overwritten since.
const VIEW_ENTRIES: u64 = 65_536;
/// A view may be this many bytes of commands old, for the same reason. Not less: after each view all that is written is copied
/// once, which small commands should not pay for more often than the number of entries has them do.
const VIEW_BYTES: u64 = 24 * 1024 * 1024;

/// How far the machine has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// The last entry applied.
    pub log_id: Option<LogId>,
    /// The cluster's clocks at that entry.
    pub clock: ClusterClock,
    /// The history that positions belong to.
    pub history: HistoryEpoch,
    /// Bytes of commands applied since this node started; compaction is paced by it.
    pub command_bytes: u64,
    /// Hash of the state, if the machine keeps one up to date.
    pub state_hash: Option<u64>,
    /// When, in elapsed time, the machine wants to be woken.
    pub wake_ms: Option<u64>,
    /// Sessions open.
    pub sessions: usize,
    /// Bytes of answers kept for them.
    pub session_bytes: usize,
    /// Sessions of the opener that has most.
    pub largest_opener: usize,
    /// Bytes of state, if the machine counts them.
    pub state_bytes: Option<u64>,
    /// How many they may be, once that is agreed.
    pub quota: Option<Quota>,
}

impl Progress {
    /// Index of the next entry to apply.
    pub fn next_index(&self) -> u64 {
        self.log_id.map_or(0, |log_id| log_id.index + 1)
    }
}

/// The state after some entry.
#[derive(Debug)]
pub struct Applied<V> {
    /// Which entry.
    pub progress: Progress,
    /// The machine at this point.
    pub view: V,
}

/// Where the apply task tells how far it is, and leaves views.
#[derive(Debug)]
pub struct Published<V> {
    progress: watch::Sender<Progress>,
    view: ArcSwap<Applied<V>>,
    /// The next index of `view`; readers wait on it.
    viewed: watch::Sender<u64>,
    /// How many bytes of commands had been applied when `view` was taken.
    viewed_bytes: AtomicU64,
    /// Whether somebody waits for a newer view.
    wanted: AtomicBool,
    /// That of `progress`: every answer names it, and none should wait for the others.
    history: CurrentHistory,
}

/// The history that a node's positions belong to, for those who name it in every answer. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct CurrentHistory(Arc<AtomicU64>);

impl CurrentHistory {
    /// It is known to be `history`.
    pub fn set(&self, history: HistoryEpoch) {
        self.0.store(history.0, Ordering::Release);
    }

    /// What is known of it at present.
    pub fn epoch(&self) -> HistoryEpoch {
        HistoryEpoch(self.0.load(Ordering::Acquire))
    }
}

impl<V> Published<V> {
    /// The state a node starts with.
    pub fn new(applied: Applied<V>) -> Arc<Self> {
        let history = CurrentHistory::default();
        history.set(applied.progress.history);
        Arc::new(Self {
            progress: watch::Sender::new(applied.progress),
            viewed: watch::Sender::new(applied.progress.next_index()),
            history,
            viewed_bytes: AtomicU64::new(applied.progress.command_bytes),
            view: ArcSwap::from_pointee(applied),
            wanted: AtomicBool::new(false),
        })
    }

    /// The machine has come this far. Whether a view of it is wanted.
    pub fn advance(&self, progress: Progress) -> bool {
        self.history.set(progress.history);
        self.progress.send_replace(progress);
        let is_old = progress.next_index() >= *self.viewed.borrow() + VIEW_ENTRIES
            || progress.command_bytes >= self.viewed_bytes.load(Ordering::Relaxed) + VIEW_BYTES;
        self.wanted.swap(false, Ordering::AcqRel) || is_old
    }

    /// Leaves a view for readers.
    pub fn publish(&self, applied: Applied<V>) {
        let next = applied.progress.next_index();
        self.viewed_bytes.store(applied.progress.command_bytes, Ordering::Relaxed);
        self.view.store(Arc::new(applied));
        self.viewed.send_replace(next);
    }

    /// How far the machine has come.
    pub fn progress(&self) -> Progress {
        *self.progress.borrow()
    }

    /// The history that positions of this state belong to.
    pub fn history(&self) -> &CurrentHistory {
        &self.history
    }

    /// Reports every advance.
    pub fn watch(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Waits until entry `index` has been applied, which may be for ever.
    pub async fn wait_applied(&self, index: u64) {
        let mut progress = self.progress.subscribe();
        let reached = progress.wait_for(|progress| progress.next_index() > index).await;
        debug_assert!(reached.is_ok(), "invariant: the sender is in self");
    }

    /// The newest view, however old.
    pub fn last_view(&self) -> Arc<Applied<V>> {
        self.view.load_full()
    }

    /// The newest view, if everything below `next_index` is in it.
    pub fn view_from(&self, next_index: u64) -> Option<Arc<Applied<V>>> {
        let view = self.view.load_full();
        (view.progress.next_index() >= next_index).then_some(view)
    }

    /// Asks for a newer view. True for the first who asks: the apply task may be idle, and must be told.
    pub fn want_view(&self) -> bool {
        !self.wanted.swap(true, Ordering::AcqRel)
    }

    /// Waits for a view with everything below `next_index`, which may be for ever.
    pub async fn wait_view(&self, next_index: u64) -> Arc<Applied<V>> {
        let mut viewed = self.viewed.subscribe();
        let reached = viewed.wait_for(|next| *next >= next_index).await;
        debug_assert!(reached.is_ok(), "invariant: the sender is in self");
        self.view.load_full()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(index: u64) -> Progress {
        Progress { log_id: Some(LogId::new(1, index)), ..Progress::default() }
    }

    #[test]
    fn a_view_is_wanted_by_a_reader_or_by_age() {
        let published = Published::new(Applied { progress: progress(9), view: () });
        assert!(!published.advance(progress(10)));
        assert!(published.want_view());
        assert!(published.advance(progress(11)));
        assert!(!published.advance(progress(12)));
        assert!(!published.advance(progress(8 + VIEW_ENTRIES)));
        assert!(published.advance(progress(9 + VIEW_ENTRIES)), "nobody reads, and the last view is old");
        published.publish(Applied { progress: progress(9 + VIEW_ENTRIES), view: () });
        assert!(!published.advance(progress(10 + VIEW_ENTRIES)));
        let large = |bytes| Progress { command_bytes: bytes, ..progress(11 + VIEW_ENTRIES) };
        assert!(!published.advance(large(VIEW_BYTES - 1)));
        assert!(published.advance(large(VIEW_BYTES)), "few entries, but large ones");
        published.publish(Applied { progress: large(VIEW_BYTES), view: () });
        assert!(!published.advance(large(2 * VIEW_BYTES - 1)));
    }
}
