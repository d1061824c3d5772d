//! Who of those that watch is to look at what was applied.
//!
//! One task per node follows the feed, while there is a watch, and marks those watches of which a range holds a key that was changed
//! ([`RangeTree`]). A watch that is not marked reads nothing and is not woken: it knows how far it is by how far the task is. So
//! what a watch costs is what it has to tell, and ten thousand that have nothing to tell cost nothing.
//!
//! # Why nothing is lost
//!
//! Everything below [`position`](Dispatcher::position) has been compared with all watches that were there. A watch comes under the
//! same lock under which a page is compared, so it comes between two pages: what is below the position at that moment it reads
//! itself, and of the rest it is told by its mark. The mark is the first position that concerns the watch since it last took it
//! ([`WatchMark::take`]).
//!
//! Before a page is compared, its end is in [`begun`](Dispatcher::begun). A watch takes its mark first, and then reads as far as `begun`
//! says: whatever was marked before it took the mark is below, and whatever is marked later is in the mark that it takes next. And
//! one that finds no mark, and had looked at `position` before, has nothing to read below that.
//!
//! The protocol, with a figure: `docs/design/watching.md`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, watch};

use super::KvNode;
use super::range_tree::RangeTree;
use super::wishes::{EventKinds, WatchWishes};
use crate::engine::NodeState;
use crate::feed::{FeedContent, FeedCursor, FeedError, FeedPage};
use crate::machine::AppliedEvent;
use crate::runtime;
use crate::types::{HistoryEpoch, Role};

/// What was applied is looked at this often at most: what comes closer together wakes a watch once.
const PACE: Duration = Duration::from_millis(2);
/// Bytes that are looked at before watches may come and go.
const PAGE_BYTES: usize = 128 * 1024;
/// How often a watch on which nothing happens tells how far it is.
const PROGRESS: Duration = Duration::from_secs(5);
/// The more watches there are the less often: by so much for each of them.
const PROGRESS_BY_WATCH: Duration = Duration::from_micros(2_500);

/// No position.
const CLEAN: u64 = u64::MAX;

/// The first position that a watch has to look at.
#[derive(Debug)]
struct WatchMark {
    first: AtomicU64,
    wake: Notify,
    is_gone: AtomicBool,
}

impl WatchMark {
    /// True if it was clean.
    fn mark(&self, position: u64) -> bool {
        self.first.fetch_min(position, Ordering::AcqRel) == CLEAN
    }
}

/// The watches of one collection.
#[derive(Debug, Default)]
struct WatchedCollection {
    by_kinds: Vec<(EventKinds, RangeTree<Arc<WatchMark>>)>,
    /// Ranges of watches that are there.
    live: usize,
    /// And of those that have gone.
    gone: usize,
}

impl WatchedCollection {
    fn add(&mut self, wishes: &WatchWishes, mark: &Arc<WatchMark>) {
        let at = match self.by_kinds.iter().position(|(kinds, _)| *kinds == wishes.kinds) {
            Some(at) => at,
            None => {
                self.by_kinds.push((wishes.kinds, RangeTree::default()));
                self.by_kinds.len() - 1
            }
        };
        for (start, end) in &wishes.ranges {
            self.by_kinds[at].1.add(start.clone(), end.clone(), mark.clone());
            self.live += 1;
        }
    }

    /// Watches with so many ranges have gone. Whether none is left.
    fn note_gone(&mut self, ranges: usize) -> bool {
        self.live -= ranges;
        self.gone += ranges;
        if self.gone > self.live {
            self.by_kinds
                .iter_mut()
                .for_each(|(_, tree)| tree.retain(|mark| !mark.is_gone.load(Ordering::Relaxed)));
            self.by_kinds.retain(|(_, tree)| tree.len() > 0);
            self.gone = 0;
        }
        self.live == 0
    }

    /// Marks the watches that want `event`, each once until all are [put back](Self::put_back). True if it is the first of those.
    fn mark(&mut self, event: &AppliedEvent, position: u64, woken: &mut Vec<Arc<WatchMark>>) -> bool {
        let mut is_first = false;
        for (kinds, tree) in &mut self.by_kinds {
            if kinds.has(event.operation) {
                is_first |= tree.take(&event.key, |mark| {
                    if mark.mark(position) {
                        woken.push(mark.clone());
                    }
                });
            }
        }
        is_first
    }

    fn put_back(&mut self) {
        self.by_kinds.iter_mut().for_each(|(_, tree)| tree.put_back());
    }
}

/// The watches, by tenant and collection.
#[derive(Debug, Default)]
struct WatchedRanges {
    tenants: HashMap<Bytes, HashMap<Bytes, WatchedCollection>>,
    watches: usize,
    /// Nobody marks any more.
    is_over: bool,
}

impl WatchedRanges {
    fn collection(&mut self, tenant: &[u8], collection: &[u8]) -> Option<&mut WatchedCollection> {
        self.tenants.get_mut(tenant)?.get_mut(collection)
    }

    fn add(&mut self, wishes: &WatchWishes, mark: &Arc<WatchMark>) {
        let collections = self.tenants.entry(wishes.tenant.clone()).or_default();
        collections.entry(wishes.collection.clone()).or_default().add(wishes, mark);
        self.watches += 1;
    }

    fn remove(&mut self, wishes: &WatchWishes) {
        self.watches -= 1;
        let Some(collections) = self.tenants.get_mut(&wishes.tenant) else { return };
        let Some(collection) = collections.get_mut(&wishes.collection) else { return };
        if collection.note_gone(wishes.ranges.len()) {
            collections.remove(&wishes.collection);
            if collections.is_empty() {
                self.tenants.remove(&wishes.tenant);
            }
        }
    }

    fn mark_all(&self, position: u64) -> Vec<Arc<WatchMark>> {
        let collections = self.tenants.values().flat_map(HashMap::values);
        let trees = collections.flat_map(|collection| &collection.by_kinds);
        trees.flat_map(|(_, tree)| tree.owners()).filter(|mark| mark.mark(position)).cloned().collect()
    }
}

/// The present dispatcher of a node, if it has watches. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Dispatch(Arc<Mutex<Option<Arc<Dispatcher>>>>);

/// See the [module](self). One is of one history, so that its positions never go back.
#[derive(Debug)]
pub(super) struct Dispatcher {
    history: HistoryEpoch,
    watched: Mutex<WatchedRanges>,
    /// Everything below has been compared with the watches, or is about to be.
    begun: AtomicU64,
    /// Everything below has been compared with the watches.
    position: AtomicU64,
    is_over: AtomicBool,
    /// There may be no watch any more.
    emptied: Notify,
    /// More has been compared.
    advanced: Notify,
}

impl Dispatch {
    /// One more watch on `node`, whose positions are of `history`.
    ///
    /// # Errors
    /// When the node follows another one by now.
    pub(super) fn register<N: KvNode>(
        &self,
        node: &N,
        history: HistoryEpoch,
        wishes: WatchWishes,
    ) -> Result<RegisteredWatch, FeedError> {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(dispatcher) = current.as_ref().filter(|current| current.history == history)
            && let Some(registered) = dispatcher.add(&wishes)
        {
            return Ok(registered);
        }
        let mut cursor = node.feed_from(0);
        if cursor.history() != history {
            return Err(FeedError::OtherHistory { known: cursor.history() });
        }
        let next = cursor.applied_next();
        if next == u64::MAX {
            return Err(FeedError::Stopped);
        }
        cursor.move_to(next);
        let dispatcher = Dispatcher::new(history, next);
        let registered = dispatcher.add(&wishes).expect("invariant: it has just begun");
        runtime::spawn(dispatcher.clone().run(cursor, node.watch()));
        *current = Some(dispatcher);
        Ok(registered)
    }
}

impl Dispatcher {
    fn new(history: HistoryEpoch, next: u64) -> Arc<Self> {
        Arc::new(Self {
            history,
            watched: Mutex::default(),
            begun: AtomicU64::new(next),
            position: AtomicU64::new(next),
            is_over: AtomicBool::new(false),
            emptied: Notify::new(),
            advanced: Notify::new(),
        })
    }

    fn watched(&self) -> MutexGuard<'_, WatchedRanges> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` when nobody marks any more.
    fn add(self: &Arc<Self>, wishes: &WatchWishes) -> Option<RegisteredWatch> {
        let mark = Arc::new(WatchMark {
            first: AtomicU64::new(CLEAN),
            wake: Notify::new(),
            is_gone: AtomicBool::new(false),
        });
        let mut watched = self.watched();
        if watched.is_over {
            return None;
        }
        watched.add(wishes, &mark);
        let joined = self.position.load(Ordering::Acquire);
        drop(watched);
        Some(RegisteredWatch { dispatcher: self.clone(), wishes: wishes.clone(), mark, joined })
    }

    /// Follows the feed until there is no watch any more, or nothing more will be applied.
    async fn run(self: Arc<Self>, mut cursor: FeedCursor, mut state: watch::Receiver<NodeState>) {
        let running = Running(self);
        let dispatcher = &running.0;
        loop {
            tokio::select! {
                biased;
                () = dispatcher.emptied.notified() => {
                    if dispatcher.is_over_if_empty() {
                        return;
                    }
                    continue;
                }
                // An error means that the node is gone.
                _ = state.wait_for(|state| state.role == Role::Stopped || state.diverged.is_some()) => return,
                () = cursor.changed() => {}
            }
            match cursor.page(PAGE_BYTES).await {
                Ok(page) => {
                    dispatcher.compare(&page);
                    if !page.is_last() {
                        tokio::task::yield_now().await;
                        continue;
                    }
                }
                Err(FeedError::Stopped | FeedError::OtherHistory { .. }) => return,
                // Each watch finds out for itself what it can still be told.
                Err(FeedError::Compacted { .. } | FeedError::Unreadable { .. }) => {
                    let next = cursor.applied_next();
                    if next == u64::MAX {
                        return;
                    }
                    dispatcher.skip(next);
                    cursor.move_to(next);
                }
            }
            tokio::time::sleep(PACE).await;
        }
    }

    /// Marks the watches that `page` concerns, and wakes them. How many.
    fn compare(&self, page: &FeedPage) -> usize {
        let mut watched = self.watched();
        self.begun.fetch_max(page.next, Ordering::AcqRel);
        let (mut woken, mut touched) = (Vec::new(), Vec::new());
        for record in &page.records {
            let FeedContent::Events(events) = &record.content else { continue };
            for event in events {
                let collection = watched.collection(&event.tenant, &event.collection);
                if collection.is_some_and(|found| found.mark(event, record.log_id.index, &mut woken)) {
                    touched.push((event.tenant.clone(), event.collection.clone()));
                }
            }
        }
        for (tenant, collection) in touched {
            if let Some(collection) = watched.collection(&tenant, &collection) {
                collection.put_back();
            }
        }
        self.position.fetch_max(page.next, Ordering::AcqRel);
        drop(watched);
        self.advanced.notify_waiters();
        wake(woken)
    }

    /// What is before `next` cannot be compared: all watches are to look at it.
    fn skip(&self, next: u64) {
        let watched = self.watched();
        self.begun.fetch_max(next, Ordering::AcqRel);
        let woken = watched.mark_all(self.position.load(Ordering::Acquire));
        self.position.fetch_max(next, Ordering::AcqRel);
        drop(watched);
        self.advanced.notify_waiters();
        wake(woken);
    }

    fn is_over_if_empty(&self) -> bool {
        let mut watched = self.watched();
        watched.is_over |= watched.watches == 0;
        watched.is_over
    }

    /// Nobody marks any more: all watches learn it.
    fn end(&self) {
        let mut watched = self.watched();
        watched.is_over = true;
        self.is_over.store(true, Ordering::Release);
        let woken = watched.mark_all(0);
        drop(watched);
        self.advanced.notify_waiters();
        wake(woken);
    }
}

#[cfg(test)]
impl Dispatch {
    pub(super) fn present(&self) -> Option<Arc<Dispatcher>> {
        self.0.lock().unwrap().clone()
    }
}

#[cfg(test)]
impl Dispatcher {
    /// Ranges of watches that are there, and of some that have gone.
    pub(super) fn ranges_kept(&self) -> usize {
        let watched = self.watched();
        let collections = watched.tenants.values().flat_map(HashMap::values);
        collections.flat_map(|collection| &collection.by_kinds).map(|(_, tree)| tree.len()).sum()
    }
}

fn wake(woken: Vec<Arc<WatchMark>>) -> usize {
    woken.iter().for_each(|mark| mark.wake.notify_one());
    woken.len()
}

/// Whatever ends the task, a panic too: no watch waits for it any more.
struct Running(Arc<Dispatcher>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// A watch that is marked, as long as this is there.
#[derive(Debug)]
pub(super) struct RegisteredWatch {
    dispatcher: Arc<Dispatcher>,
    wishes: WatchWishes,
    mark: Arc<WatchMark>,
    /// What is below was not compared with it.
    joined: u64,
}

impl RegisteredWatch {
    /// What it is told.
    pub(super) fn wishes(&self) -> &WatchWishes {
        &self.wishes
    }

    /// Everything below this position it has to look at, whatever its mark says.
    pub(super) fn joined(&self) -> u64 {
        self.joined
    }

    /// Everything below this position has been compared. Says something of this watch only if its mark is taken afterwards, and is clean.
    pub(super) fn position(&self) -> u64 {
        self.dispatcher.position.load(Ordering::Acquire)
    }

    /// The first position to look at since it was last asked, and the one before which all is that was marked by now.
    pub(super) fn take_mark(&self) -> Option<(u64, u64)> {
        let first = self.mark.first.swap(CLEAN, Ordering::AcqRel);
        (first != CLEAN).then(|| (first, self.dispatcher.begun.load(Ordering::Acquire)))
    }

    /// Waits until it may be marked.
    pub(super) async fn marked(&self) {
        self.mark.wake.notified().await;
    }

    /// Waits until everything below `position` has been compared, or nothing is any more.
    pub(super) async fn compared(&self, position: u64) {
        loop {
            // Before it looks: whatever comes then wakes it.
            let advanced = self.dispatcher.advanced.notified();
            if self.position() >= position || self.is_over() {
                return;
            }
            advanced.await;
        }
    }

    /// Whether it is marked no more.
    pub(super) fn is_over(&self) -> bool {
        self.dispatcher.is_over.load(Ordering::Acquire)
    }

    /// How often to tell how far it is.
    pub(super) fn progress_interval(&self) -> Duration {
        let watches = u32::try_from(self.dispatcher.watched().watches).unwrap_or(u32::MAX);
        PROGRESS.max(PROGRESS_BY_WATCH.saturating_mul(watches))
    }
}

impl Drop for RegisteredWatch {
    fn drop(&mut self) {
        self.mark.is_gone.store(true, Ordering::Relaxed);
        let mut watched = self.dispatcher.watched();
        watched.remove(&self.wishes);
        if watched.watches == 0 {
            self.dispatcher.emptied.notify_one();
        }
    }
}
