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
use crate::types::HistoryEpoch;

/// Nothing is asked for.
const UNASKED: u64 = 0;

/// What is asked of one watch.
#[derive(Debug)]
struct AskedWatch {
    /// What its revisions are of.
    history: HistoryEpoch,
    /// It is to say that everything below this position is told.
    below: AtomicU64,
    wake: Notify,
}

/// Whose a watch is, and what its caller calls it.
type WatchKey = (Arc<str>, u64);

/// The watches that can be asked, each as long as it is there.
#[derive(Debug, Clone, Default)]
pub(super) struct AskedWatches(Arc<Mutex<HashMap<WatchKey, Vec<Arc<AskedWatch>>>>>);

impl AskedWatches {
    fn lock(&self) -> MutexGuard<'_, HashMap<WatchKey, Vec<Arc<AskedWatch>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of the caller called `name`, who has no say in those of others.
    pub(super) fn of(&self, name: &Arc<str>) -> CallerWatches {
        CallerWatches { watches: self.clone(), caller: name.clone() }
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.lock().len()
    }
}

/// The watches of one caller.
#[derive(Debug, Clone)]
pub(super) struct CallerWatches {
    watches: AskedWatches,
    caller: Arc<str>,
}

impl CallerWatches {
    /// One more watch, of revisions of `history`, which is called `id`; 0 is not asked.
    pub(super) fn register(self, id: u64, history: HistoryEpoch) -> WatchAsked {
        let asked = Arc::new(AskedWatch { history, below: AtomicU64::new(UNASKED), wake: Notify::new() });
        let key = (self.caller, id);
        if id != 0 {
            self.watches.lock().entry(key.clone()).or_default().push(asked.clone());
        }
        WatchAsked { watches: self.watches, key, asked }
    }

    /// Those that are called `id` and tell revisions of `history`.
    ///
    /// # Errors
    /// When there is none.
    fn find(&self, id: u64, history: HistoryEpoch) -> Result<Vec<Arc<AskedWatch>>, Failure> {
        let mut found = self.watches.lock().get(&(self.caller.clone(), id)).cloned().unwrap_or_default();
        found.retain(|asked| !asked.history.differs_from(history));
        match found.is_empty() {
            false => Ok(found),
            true => {
                let message = "this node has no watch of yours with this watch_id: ask the node that the watch is open at";
                Err(failure(Reason::NotFound, message.to_owned(), false, None))
            }
        }
    }
}

/// What one watch is asked.
#[derive(Debug)]
pub(super) struct WatchAsked {
    watches: AskedWatches,
    key: WatchKey,
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
        let mut watches = self.watches.lock();
        if let Some(called) = watches.get_mut(&self.key) {
            called.retain(|asked| !Arc::ptr_eq(asked, &self.asked));
            if called.is_empty() {
                watches.remove(&self.key);
            }
        }
    }
}

/// Has the watch of the caller that `request` names say how far it is.
///
/// # Errors
/// The failure to answer instead.
pub(super) async fn ask<N: KvNode>(
    node: &N,
    by: &Answerer,
    watches: &CallerWatches,
    request: v1::WatchProgressRequest,
) -> Result<v1::WatchProgressResponse, Failure> {
    let id = request.watch_id;
    if id == 0 {
        return Err(invalid("a watch is asked for progress by the watch_id of its request, which is not 0"));
    }
    // Nobody asks the leader for the sake of a watch that is not there.
    watches.find(id, node.current_history().epoch())?;
    let next_revision = node.present().await? + 1;
    // It may have gone meanwhile, or the node may follow another history: then nobody would say what is promised here.
    for asked in watches.find(id, node.current_history().epoch())? {
        asked.below.fetch_max(next_revision, Ordering::AcqRel);
        asked.wake.notify_one();
    }
    Ok(v1::WatchProgressResponse { header: Some(by.header(node.state().applied)), next_revision })
}
