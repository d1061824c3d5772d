//! How far the machine has come, and views of it for readers.
//!
//! A view of a persistent data structure costs nothing to take, but it shares all its nodes with the machine,
//! and every node the machine changes afterwards must be copied first. Taking one after every batch made
//! that copying a third of a write's cost. So a view is taken only when somebody asks for one that is newer than
//! the last: by the apply task, after its next batch or when it is idle. One that has become so old that it keeps more
//! alive than it saves is let go of: where nobody reads there is none, and nothing is copied.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use tokio::sync::watch;

use crate::machine::Wakes;
use crate::types::{ClusterClock, HistoryEpoch, LogId, Quota};

/// A view that nobody reads may be this many entries old. It keeps alive all that has been overwritten since.
const VIEW_ENTRIES: u64 = 65_536;
/// A view that nobody reads may be this many bytes of commands old, for the same reason.
const VIEW_BYTES: u64 = 24 * 1024 * 1024;

/// How far the machine has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Progress {
    /// The last entry applied.
    pub log_id: Option<LogId>,
    /// The cluster's clocks at that entry.
    pub clock: ClusterClock,
    /// The history that positions belong to.
    pub history: HistoryEpoch,
    /// Bytes of commands applied since this node started; compaction is paced by it.
    pub command_bytes: u64,
    /// Bytes of states that came whole, from other nodes or out of snapshots.
    pub installed_bytes: u64,
    /// Hash of the state, if the machine keeps one up to date.
    pub state_hash: Option<u64>,
    /// When the machines want to be woken.
    pub wakes: Wakes,
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
    /// Whether the log, unless it is purged, begins with a state that was restored, so that nobody else can begin with it.
    pub is_restored: bool,
}

impl Progress {
    /// Index of the next entry to apply.
    pub(crate) fn next_index(&self) -> u64 {
        self.log_id.map_or(0, |log_id| log_id.index + 1)
    }
}

/// The state after some entry.
#[derive(Debug)]
pub(crate) struct Applied<V> {
    /// Which entry.
    pub progress: Progress,
    /// The machine at this point.
    pub view: V,
}

/// Where the apply task tells how far it is, and leaves views.
#[derive(Debug)]
pub(crate) struct Published<V> {
    progress: watch::Sender<Progress>,
    /// Gone when it has become too old.
    view: ArcSwapOption<Applied<V>>,
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
pub(crate) struct CurrentHistory(Arc<AtomicU64>);

impl CurrentHistory {
    /// It is known to be `history`.
    pub(crate) fn set(&self, history: HistoryEpoch) {
        self.0.store(history.0, Ordering::Release);
    }

    /// What is known of it at present.
    pub(crate) fn epoch(&self) -> HistoryEpoch {
        HistoryEpoch(self.0.load(Ordering::Acquire))
    }
}

impl<V> Published<V> {
    /// The state a node starts with.
    pub(crate) fn new(applied: Applied<V>) -> Arc<Self> {
        let history = CurrentHistory::default();
        history.set(applied.progress.history);
        Arc::new(Self {
            progress: watch::Sender::new(applied.progress),
            viewed: watch::Sender::new(applied.progress.next_index()),
            history,
            viewed_bytes: AtomicU64::new(applied.progress.command_bytes),
            view: ArcSwapOption::from_pointee(applied),
            wanted: AtomicBool::new(false),
        })
    }

    /// The machine has come this far. Whether a view of it is wanted.
    pub(crate) fn advance(&self, progress: Progress) -> bool {
        let before = self.progress();
        assert!(
            before.next_index() <= progress.next_index() || before.history.differs_from(progress.history),
            "invariant: what is applied stays applied"
        );
        assert!(before.command_bytes <= progress.command_bytes, "invariant: what was applied stays counted");
        self.history.set(progress.history);
        self.progress.send_replace(progress);
        let is_wanted = self.wanted.swap(false, Ordering::AcqRel);
        let is_old = progress.next_index() >= *self.viewed.borrow() + VIEW_ENTRIES
            || progress.command_bytes >= self.viewed_bytes.load(Ordering::Relaxed) + VIEW_BYTES;
        if is_old && !is_wanted {
            self.view.store(None);
        }
        is_wanted
    }

    /// Leaves a view for readers.
    pub(crate) fn publish(&self, applied: Applied<V>) {
        let next = applied.progress.next_index();
        assert!(
            next <= self.progress.borrow().next_index(),
            "invariant: a view shows nothing that was not told"
        );
        let same_history =
            |view: Arc<Applied<V>>| !view.progress.history.differs_from(applied.progress.history);
        assert!(
            next >= *self.viewed.borrow() || !self.view.load_full().is_none_or(same_history),
            "invariant: no reader is shown an older state than another was"
        );
        self.viewed_bytes.store(applied.progress.command_bytes, Ordering::Relaxed);
        self.view.store(Some(Arc::new(applied)));
        self.viewed.send_replace(next);
    }

    /// How far the machine has come.
    pub(crate) fn progress(&self) -> Progress {
        *self.progress.borrow()
    }

    /// The history that positions of this state belong to.
    pub(crate) fn history(&self) -> &CurrentHistory {
        &self.history
    }

    /// Reports every advance.
    pub(crate) fn watch(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Waits until entry `index` has been applied, which may be for ever.
    pub(crate) async fn wait_applied(&self, index: u64) {
        let mut progress = self.progress.subscribe();
        let reached = progress.wait_for(|progress| progress.next_index() > index).await;
        debug_assert!(reached.is_ok(), "invariant: the sender is in self");
    }

    /// The newest view that somebody has asked for, unless it has become too old.
    pub(crate) fn last_view(&self) -> Option<Arc<Applied<V>>> {
        self.view.load_full()
    }

    /// The newest view, if everything below `next_index` is in it.
    pub(crate) fn view_from(&self, next_index: u64) -> Option<Arc<Applied<V>>> {
        self.view.load_full().filter(|view| view.progress.next_index() >= next_index)
    }

    /// Asks for a newer view. True for the first who asks: the apply task may be idle, and must be told.
    pub(crate) fn want_view(&self) -> bool {
        !self.wanted.swap(true, Ordering::AcqRel)
    }

    /// Waits for a view with everything below `next_index`, which may be for ever. It is not there any more if it has become too
    /// old meanwhile.
    pub(crate) async fn wait_view(&self, next_index: u64) -> Option<Arc<Applied<V>>> {
        let mut viewed = self.viewed.subscribe();
        let reached = viewed.wait_for(|next| *next >= next_index).await;
        debug_assert!(reached.is_ok(), "invariant: the sender is in self");
        self.view_from(next_index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(index: u64) -> Progress {
        Progress { log_id: Some(LogId::new(1, index)), ..Progress::default() }
    }

    #[test]
    fn a_view_is_taken_for_a_reader_and_let_go_of_when_it_is_old() {
        let published = Published::new(Applied { progress: progress(9), view: () });
        assert!(!published.advance(progress(10)));
        assert!(published.want_view());
        assert!(published.advance(progress(11)));
        published.publish(Applied { progress: progress(11), view: () });
        assert!(!published.advance(progress(12)));
        assert!(!published.advance(progress(10 + VIEW_ENTRIES)));
        assert!(published.last_view().is_some() && published.view_from(13).is_none());
        assert!(!published.advance(progress(11 + VIEW_ENTRIES)));
        assert!(published.last_view().is_none(), "nobody reads, and the last view is old");

        let large = |bytes| Progress { command_bytes: bytes, ..progress(12 + VIEW_ENTRIES) };
        published.advance(large(0));
        published.publish(Applied { progress: large(0), view: () });
        assert!(!published.advance(large(VIEW_BYTES - 1)));
        assert!(published.last_view().is_some());
        assert!(!published.advance(large(VIEW_BYTES)));
        assert!(published.last_view().is_none(), "few entries, but large ones");
        assert!(published.want_view(), "the next reader asks again");
        assert!(published.advance(large(VIEW_BYTES)));
    }
}
