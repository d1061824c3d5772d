//! States whose followers have gone before all of them was sent: kept for a while, so that one that comes back goes on where it was.
//!
//! A follower that asks for it is told now and then which *part* of its state it has, by a number. A part is where the machine goes on
//! telling its state, which the node remembers itself: what a follower says is looked up, and never given to the machine.
//!
//! One that comes back before its node has noticed that it was gone ends its old stream by that.
//!
//! # Bounds
//!
//! [`MAX_KEPT`] states, each for [`KEPT_FOR`], and not longer than what it keeps alive is within the node's bound for readers. Of each
//! the last [`MAX_PARTS`] parts. What comes after it in the feed is held as long as it is.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot, watch};
use tokio::time::{Instant, timeout_at};

use super::stream::drained;
use super::wishes::Wishes;
use crate::engine::HeldState;
use crate::feed::FeedCursor;
use crate::runtime;

/// Most states that are kept; the oldest goes for another one.
const MAX_KEPT: usize = 4;
/// How long one is kept.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// How long a follower that comes back waits until its stream of before has ended.
const PATIENCE: Duration = Duration::from_secs(2);
/// Parts of a state that are known. What may be on its way to a follower is less than that.
const MAX_PARTS: usize = 256;

/// Where a state can be gone on with: by the numbers of its parts.
#[derive(Debug, Clone)]
pub(super) struct StateParts {
    /// What only its follower knows.
    pub(super) id: u64,
    last: u64,
    known: VecDeque<(u64, Vec<u8>)>,
}

impl StateParts {
    /// None yet.
    pub(super) fn new() -> Self {
        Self { id: runtime::random_u64().max(1), last: 0, known: VecDeque::new() }
    }

    /// Everything up to where the machine goes on at `after` is one more part. Its number.
    pub(super) fn add(&mut self, after: &[u8]) -> u64 {
        self.last += 1;
        if self.known.len() == MAX_PARTS {
            self.known.pop_front();
        }
        self.known.push_back((self.last, after.to_vec()));
        self.last
    }

    /// Where the machine goes on behind part `number`, if that is known; nothing after it is.
    pub(super) fn go_on(&mut self, number: u64) -> Option<Vec<u8>> {
        let at = self.known.iter().position(|(known, _)| *known == number)?;
        self.known.truncate(at + 1);
        self.last = number;
        self.known.back().map(|(_, after)| after.clone())
    }
}

/// A state of which a part was sent, and what came after it.
pub(super) struct UnsentState<V> {
    pub(super) state: HeldState<V>,
    pub(super) cursor: FeedCursor,
    pub(super) parts: StateParts,
    /// What it was sent for.
    pub(super) wishes: Arc<Wishes>,
}

struct KeptState {
    id: u64,
    /// Of this keep: the same state may be kept again after it was gone on with.
    number: u64,
    state: Box<dyn Any + Send>,
    /// What lets go of it waits no more once this is dropped.
    _is_kept: oneshot::Sender<()>,
}

/// See the [module](self).
#[derive(Clone, Default)]
pub(super) struct KeptStates(Arc<SharedStates>);

#[derive(Default)]
struct SharedStates {
    known: Mutex<KnownStates>,
    /// One that was being sent is so no more.
    ended: Notify,
}

#[derive(Default)]
struct KnownStates {
    /// Those that are being sent, and what tells that their followers have left.
    open: HashMap<u64, Arc<Notify>>,
    kept: Vec<KeptState>,
    /// The number of the last keep.
    last: u64,
}

/// A state that is being sent, for as long as it is.
pub(super) struct OpenState {
    states: KeptStates,
    id: u64,
    left: Arc<Notify>,
}

impl OpenState {
    /// Waits until its follower has come back on another stream.
    pub(super) async fn left(&self) {
        self.left.notified().await;
    }
}

impl Drop for OpenState {
    fn drop(&mut self) {
        let mut known = self.states.lock();
        // Its follower may be sent the rest on another stream by now.
        if known.open.get(&self.id).is_some_and(|left| Arc::ptr_eq(left, &self.left)) {
            known.open.remove(&self.id);
        }
        drop(known);
        self.states.0.ended.notify_waiters();
    }
}

impl std::fmt::Debug for KeptStates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("KeptStates").field(&self.lock().kept.len()).finish()
    }
}

impl KeptStates {
    fn lock(&self) -> MutexGuard<'_, KnownStates> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state that its follower knows by `id` is being sent.
    pub(super) fn open(&self, id: u64) -> OpenState {
        let left = Arc::<Notify>::default();
        self.lock().open.insert(id, left.clone());
        OpenState { states: self.clone(), id, left }
    }

    /// Keeps `unsent` for a while, or until the node drains.
    pub(super) fn keep<V: Send + Sync + 'static>(
        &self,
        unsent: UnsentState<V>,
        mut draining: watch::Receiver<bool>,
    ) {
        let (id, mut pinned) = (unsent.parts.id, unsent.state.pinned.clone());
        let (is_kept, taken) = oneshot::channel();
        let state = Box::new(unsent);
        let mut known = self.lock();
        known.last += 1;
        let number = known.last;
        let oldest = (known.kept.len() == MAX_KEPT).then(|| known.kept.remove(0));
        known.kept.push(KeptState { id, number, state, _is_kept: is_kept });
        drop(known);
        // It may be large: nobody waits for that.
        drop(oldest);
        let states = self.clone();
        runtime::spawn(async move {
            tokio::select! {
                _ = taken => {}
                () = tokio::time::sleep(KEPT_FOR) => {}
                () = pinned.too_much() => {}
                () = drained(&mut draining) => {}
            }
            states.let_go(number);
        });
    }

    /// What was kept by keep `number` is kept no more, if it still is.
    fn let_go(&self, number: u64) {
        let mut known = self.lock();
        let found = known.kept.iter().position(|kept| kept.number == number);
        let gone = found.map(|found| known.kept.remove(found));
        drop(known);
        drop(gone);
    }

    /// The state whose follower knows it by `id`, and where the machine goes on behind `part`, if both are known. It is not kept any more.
    pub(super) async fn take<V: Send + Sync + 'static>(
        &self,
        id: u64,
        part: u64,
    ) -> Option<(UnsentState<V>, Vec<u8>)> {
        let found = self.find(id).await?;
        let mut unsent = *found.state.downcast::<UnsentState<V>>().ok()?;
        let after = unsent.parts.go_on(part)?;
        Some((unsent, after))
    }

    /// The one with this `id`, which is not kept any more; if it is being sent, once it is not.
    async fn find(&self, id: u64) -> Option<KeptState> {
        let until = Instant::now() + PATIENCE;
        loop {
            let ended = self.0.ended.notified();
            {
                let mut known = self.lock();
                if let Some(found) = known.kept.iter().position(|kept| kept.id == id) {
                    return Some(known.kept.remove(found));
                }
                known.open.get(&id)?.notify_one();
            }
            timeout_at(until, ended).await.ok()?;
        }
    }

    /// How many are kept.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.lock().kept.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Pinned;
    use crate::feed::Feed;
    use crate::proto::replication::SubscribeRequest;
    use crate::raft::published::{Applied, Progress};

    const MOST_BYTES: u64 = 1_000_000;

    /// One of which a part was sent, and what tells how far its node is.
    fn unsent(now: &watch::Sender<Progress>) -> UnsentState<()> {
        let (progress, view) = (Progress::default(), ());
        let pinned = Pinned::new(progress, now.subscribe(), MOST_BYTES);
        let state = HeldState::new(Arc::new(Applied { progress, view }), pinned);
        let mut parts = StateParts::new();
        parts.add(b"x");
        let wishes = Arc::new(Wishes::parse(SubscribeRequest::default(), true).unwrap());
        UnsentState { state, cursor: Feed::new(None).follow(0), parts, wishes }
    }

    #[tokio::test(start_paused = true)]
    async fn few_are_kept_for_a_while_and_each_is_gone_on_with_once() {
        let (kept, now) = (KeptStates::default(), watch::Sender::new(Progress::default()));
        let (drain, draining) = watch::channel(false);
        let keep = || {
            let unsent = unsent(&now);
            let id = unsent.parts.id;
            kept.keep(unsent, draining.clone());
            id
        };
        let ids: Vec<_> = (0..=MAX_KEPT).map(|_| keep()).collect();
        assert_eq!(kept.count(), MAX_KEPT);
        assert!(kept.take::<()>(ids[0], 1).await.is_none(), "the oldest went for another one");
        assert!(kept.take::<()>(ids[1], 2).await.is_none(), "no such part was sent");
        let (_, after) = kept.take::<()>(ids[2], 1).await.unwrap();
        assert_eq!(after, b"x");
        assert!(kept.take::<()>(ids[2], 1).await.is_none(), "it is somebody's now");
        tokio::time::sleep(KEPT_FOR + Duration::from_secs(1)).await;
        assert_eq!(kept.count(), 0, "not for ever");

        keep();
        now.send_replace(Progress { command_bytes: MOST_BYTES + 1, ..Progress::default() });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(kept.count(), 0, "it keeps alive too much");
        now.send_replace(Progress::default());
        keep();
        drain.send_replace(true);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(kept.count(), 0, "the node drains");
    }

    /// A follower whose line breaks again and again: what waited to let go of an earlier keep has no say in the later one.
    #[tokio::test(start_paused = true)]
    async fn what_is_kept_again_is_kept_for_as_long_as_before() {
        let (kept, now) = (KeptStates::default(), watch::Sender::new(Progress::default()));
        let (_drain, draining) = watch::channel(false);
        let unsent = unsent(&now);
        let id = unsent.parts.id;
        kept.keep(unsent, draining.clone());
        tokio::time::sleep(KEPT_FOR - Duration::from_secs(1)).await;
        let (unsent, _) = kept.take::<()>(id, 1).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        assert_eq!(tasks(), 0, "nothing waits to let go of what was gone on with");
        kept.keep(unsent, draining);
        tokio::time::sleep(KEPT_FOR - Duration::from_secs(1)).await;
        assert_eq!((kept.count(), tasks()), (1, 1));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!((kept.count(), tasks()), (0, 0));
    }

    /// The stream of before ends after the one that took its place has begun.
    #[tokio::test(start_paused = true)]
    async fn a_stream_that_ends_late_leaves_the_next_one_of_its_follower_known() {
        let kept = KeptStates::default();
        let before = kept.open(7);
        let open = kept.open(7);
        drop(before);
        let begun = Instant::now();
        assert!(kept.take::<()>(7, 1).await.is_none());
        assert_eq!(begun.elapsed(), PATIENCE, "it is waited for");
        timeout_at(begun + PATIENCE, open.left()).await.expect("it is told that its follower has left");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_comes_back_early_ends_its_stream_of_before_or_does_without() {
        let (kept, now) = (KeptStates::default(), watch::Sender::new(Progress::default()));
        let (_drain, draining) = watch::channel(false);
        let unsent = unsent(&now);
        let id = unsent.parts.id;
        let open = kept.open(id);
        let ends = async {
            open.left().await;
            kept.keep(unsent, draining);
            drop(open);
        };
        let (found, ()) = tokio::join!(kept.take::<()>(id, 1), ends);
        assert!(found.is_some());
        let _hangs = kept.open(id);
        let begun = Instant::now();
        assert!(kept.take::<()>(id, 1).await.is_none());
        assert_eq!(begun.elapsed(), PATIENCE);
        assert!(kept.take::<()>(id + 1, 1).await.is_none());
        assert_eq!(begun.elapsed(), PATIENCE, "for what is not known nobody waits");
    }

    #[test]
    fn a_part_is_gone_on_behind_if_it_is_known_and_the_numbers_go_on_there() {
        let mut parts = StateParts::new();
        assert_eq!(parts.go_on(0), None);
        for (number, after) in [(1, b"a"), (2, b"b"), (3, b"c")] {
            assert_eq!(parts.add(after), number);
        }
        assert_eq!(parts.clone().go_on(4), None);
        assert_eq!(parts.go_on(2).unwrap(), b"b");
        assert_eq!(parts.clone().go_on(3), None, "what was sent behind it is sent again");
        assert_eq!(parts.add(b"d"), 3);
        for number in 4..=2 * MAX_PARTS as u64 {
            assert_eq!(parts.add(b"e"), number);
        }
        assert_eq!(parts.known.len(), MAX_PARTS);
        assert_eq!(parts.go_on(3), None, "it is too long ago");
    }
}
