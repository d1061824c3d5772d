//! `Kv.WatchProgress`: a watch says how far it is when it is asked, and not only every now and then.
//!
//! The call finds out up to where every write was acknowledged, and tells the watch. The watch says on its own stream that it has told
//! everything up to there, once it has: so nothing that it has still to tell can be overtaken. What is asked for while something is
//! asked for already is answered together with that.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::KvNode;
use crate::door::Answerer;
use crate::door::failure::{failure, invalid};
use crate::proto::v1::{self, Failure};
use crate::reason::Reason;

/// Nothing is asked for.
const UNASKED: u64 = 0;

/// What is asked of one watch.
#[derive(Debug, Default)]
struct AskedWatch {
    /// It is to say that everything below this position is told.
    below: AtomicU64,
    wake: Notify,
}

/// The watches that can be asked, by what their callers call them: each as long as it is there.
#[derive(Debug, Clone, Default)]
pub(super) struct AskedWatches(Arc<Mutex<HashMap<u64, Vec<Arc<AskedWatch>>>>>);

impl AskedWatches {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Vec<Arc<AskedWatch>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more watch, which is called `id`; 0 is not asked.
    pub(super) fn register(&self, id: u64) -> WatchAsked {
        let asked = Arc::<AskedWatch>::default();
        if id != 0 {
            self.lock().entry(id).or_default().push(asked.clone());
        }
        WatchAsked { watches: self.clone(), id, asked }
    }

    fn find(&self, id: u64) -> Vec<Arc<AskedWatch>> {
        self.lock().get(&id).cloned().unwrap_or_default()
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.lock().len()
    }
}

/// What one watch is asked.
#[derive(Debug)]
pub(super) struct WatchAsked {
    watches: AskedWatches,
    id: u64,
    asked: Arc<AskedWatch>,
}

impl WatchAsked {
    /// The watch is to say that everything below this position is told, if it is to say so.
    pub(super) fn below(&self) -> Option<u64> {
        Some(self.asked.below.load(Ordering::Acquire)).filter(|below| *below != UNASKED)
    }

    /// Everything below `next` is told and is about to be said.
    pub(super) fn told(&self, next: u64) {
        let answered = |below| (below <= next).then_some(UNASKED);
        let _ = self.asked.below.fetch_update(Ordering::AcqRel, Ordering::Acquire, answered);
    }

    /// Waits until it may be asked for something new.
    pub(super) async fn changed(&self) {
        self.asked.wake.notified().await;
    }
}

impl Drop for WatchAsked {
    fn drop(&mut self) {
        if self.id == 0 {
            return;
        }
        let mut watches = self.watches.lock();
        if let Some(called) = watches.get_mut(&self.id) {
            called.retain(|asked| !Arc::ptr_eq(asked, &self.asked));
            if called.is_empty() {
                watches.remove(&self.id);
            }
        }
    }
}

/// Has the watch that `request` names say how far it is.
///
/// # Errors
/// The failure to answer instead.
pub(super) async fn ask<N: KvNode>(
    node: &N,
    by: &Answerer,
    watches: &AskedWatches,
    request: v1::WatchProgressRequest,
) -> Result<v1::WatchProgressResponse, Failure> {
    if request.watch_id == 0 {
        return Err(invalid("a watch is asked for progress by the watch_id of its request, which is not 0"));
    }
    let found = watches.find(request.watch_id);
    if found.is_empty() {
        let message = "this node has no watch with this watch_id: ask the node that the watch is open at";
        return Err(failure(Reason::NotFound, message.to_owned(), false, None));
    }
    let next_revision = node.present().await? + 1;
    for asked in found {
        asked.below.fetch_max(next_revision, Ordering::AcqRel);
        asked.wake.notify_one();
    }
    Ok(v1::WatchProgressResponse { header: Some(by.header(node.state().applied)), next_revision })
}
