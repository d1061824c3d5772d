//! The states that long ranges are read from.
//!
//! A reader whose connection breaks may come back to the state that it was reading, at the same node: what it has and what
//! is to come are then from one moment. A state keeps alive what has been overwritten since, so of those without a reader
//! few are kept, and not for long; and each, read or not, only until it keeps alive too much ([`Pinned`]).

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::failure;
use crate::engine::Pinned;
use crate::kv::machine::KvView;
use crate::proto::v1::Failure;
use crate::types::LogId;

/// Long ranges that one node serves at a time.
pub(super) const MAX_LONG_RANGES: usize = 64;
/// States kept without a reader.
const MAX_LEFT: usize = 8;
/// And for how long.
const KEPT_FOR: Duration = Duration::from_secs(60);

/// A state, and who reads it.
#[derive(Debug)]
struct Moment {
    at: LogId,
    view: KvView,
    pinned: Pinned,
    readers: usize,
    /// When the last reader went that may come back.
    left: Option<Instant>,
}

/// The states that are being read, or were until a short while ago, and the places of their readers.
#[derive(Debug)]
pub(super) struct Moments {
    places: Arc<Semaphore>,
    kept: Mutex<Vec<Moment>>,
}

impl Default for Moments {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(MAX_LONG_RANGES)), kept: Mutex::default() }
    }
}

impl Moments {
    /// A reader's place.
    ///
    /// # Errors
    /// When all are taken.
    pub(super) fn place(&self) -> Result<OwnedSemaphorePermit, Failure> {
        self.places.clone().try_acquire_owned().map_err(|_| failure::too_many_ranges())
    }

    /// A reader begins to read `view`, the state after entry `at`.
    pub(super) fn begin(&self, at: LogId, view: &KvView, pinned: &Pinned) {
        let mut kept = self.kept();
        match kept.iter_mut().find(|moment| moment.at == at) {
            Some(moment) => moment.readers += 1,
            None => {
                kept.push(Moment { at, view: view.clone(), pinned: pinned.clone(), readers: 1, left: None });
            }
        }
    }

    /// A reader comes back to the state after entry `at`.
    ///
    /// # Errors
    /// When it is not kept.
    pub(super) fn again(&self, at: LogId) -> Result<(KvView, Pinned), Failure> {
        let mut kept = self.kept();
        let moment = kept.iter_mut().find(|moment| moment.at == at);
        let moment = moment.ok_or_else(|| failure::forgotten_moment(at))?;
        moment.readers += 1;
        moment.left = None;
        Ok((moment.view.clone(), moment.pinned.clone()))
    }

    /// A reader has read all that it wanted.
    pub(super) fn end(&self, at: LogId) {
        self.kept().retain_mut(|moment| {
            if moment.at == at {
                moment.readers = moment.readers.saturating_sub(1);
            }
            moment.at != at || moment.readers > 0 || moment.left.is_some()
        });
    }

    /// The state after entry `at` keeps alive too much: nobody comes back to it.
    pub(super) fn forget(&self, at: LogId) {
        self.kept().retain(|moment| moment.at != at);
    }

    /// How much all states together keep alive: no more than the oldest.
    pub(super) fn pinned_bytes(&self) -> u64 {
        self.kept().iter().map(|moment| moment.pinned.bytes()).max().unwrap_or_default()
    }

    /// A reader has gone, or may lack some of what was sent. Returns once it is too late to come back.
    pub(super) async fn leave(&self, at: LogId, mut pinned: Pinned) {
        let now = Instant::now();
        {
            let mut kept = self.kept();
            if let Some(moment) = kept.iter_mut().find(|moment| moment.at == at) {
                moment.readers = moment.readers.saturating_sub(1);
                moment.left = Some(now);
            }
            let is_left = |moment: &Moment| moment.readers == 0;
            if kept.iter().filter(|moment| is_left(moment)).count() > MAX_LEFT {
                let oldest = kept.iter().filter(|moment| is_left(moment)).min_by_key(|moment| moment.left);
                let oldest = oldest.map(|moment| moment.at);
                kept.retain(|moment| Some(moment.at) != oldest);
            }
        }
        if timeout_at(now + KEPT_FOR, pinned.too_much()).await.is_ok() {
            return self.forget(at);
        }
        self.kept().retain(|moment| moment.readers > 0 || moment.left.is_none_or(|left| left > now));
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Moment>> {
        self.kept.lock().expect("invariant: no panic under this lock")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use tokio::sync::watch;

    use super::*;
    use crate::kv::machine::KvMachine;
    use crate::machine::StateMachine as _;
    use crate::raft::published::Progress;

    /// Of a state that changes as the first says.
    fn pinned_by(progress: &watch::Sender<Progress>) -> Pinned {
        Pinned::new(Progress::default(), progress.subscribe(), 1_000)
    }

    /// Of one that does not.
    fn pinned() -> Pinned {
        static STILL: LazyLock<watch::Sender<Progress>> = LazyLock::new(watch::Sender::default);
        pinned_by(&STILL)
    }

    fn at(index: u64) -> LogId {
        LogId::new(1, index)
    }

    #[tokio::test(start_paused = true)]
    async fn a_state_is_kept_for_a_reader_that_has_gone_and_not_for_long() {
        let (moments, view) = (Arc::new(Moments::default()), KvMachine::default().view());
        moments.begin(at(1), &view, &pinned());
        let leaving = crate::runtime::spawn({
            let moments = moments.clone();
            async move { moments.leave(at(1), pinned()).await }
        });
        tokio::time::advance(KEPT_FOR / 2).await;
        tokio::task::yield_now().await;
        moments.again(at(1)).unwrap();
        leaving.await.unwrap();
        moments.again(at(1)).expect("it is being read");
        moments.end(at(1));
        moments.leave(at(1), pinned()).await;
        moments.again(at(1)).unwrap_err();
        assert!(moments.again(at(2)).is_err(), "it was never read");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_read_to_its_end_is_not_kept() {
        let (moments, view) = (Moments::default(), KvMachine::default().view());
        moments.begin(at(1), &view, &pinned());
        moments.begin(at(1), &view, &pinned());
        moments.end(at(1));
        moments.again(at(1)).expect("the other one still reads");
        moments.end(at(1));
        moments.end(at(1));
        moments.again(at(1)).unwrap_err();
    }

    #[tokio::test(start_paused = true)]
    async fn few_states_without_a_reader_are_kept() {
        let (moments, view) = (Arc::new(Moments::default()), KvMachine::default().view());
        let most = MAX_LEFT as u64;
        for index in 0..=most {
            moments.begin(at(index), &view, &pinned());
            let moments = moments.clone();
            crate::runtime::spawn(async move { moments.leave(at(index), pinned()).await });
            tokio::task::yield_now().await;
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        moments.again(at(0)).unwrap_err();
        assert!((1..=most).all(|index| moments.again(at(index)).is_ok()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_state_that_keeps_alive_too_much_is_not_kept() {
        let (moments, view) = (Arc::new(Moments::default()), KvMachine::default().view());
        let progress = watch::Sender::default();
        moments.begin(at(1), &view, &pinned_by(&progress));
        let leaving = crate::runtime::spawn({
            let (moments, pinned) = (moments.clone(), pinned_by(&progress));
            async move { moments.leave(at(1), pinned).await }
        });
        tokio::task::yield_now().await;
        progress.send_replace(Progress { command_bytes: 1_000, ..Progress::default() });
        tokio::time::sleep(KEPT_FOR / 4).await;
        assert_eq!(moments.pinned_bytes(), 1_000);
        moments.again(at(1)).expect("it keeps no more than it may");
        moments.end(at(1));
        progress.send_replace(Progress { command_bytes: 1_001, ..Progress::default() });
        tokio::time::sleep(KEPT_FOR / 4).await;
        moments.again(at(1)).unwrap_err();
        assert_eq!(moments.pinned_bytes(), 0);
        leaving.await.unwrap();
    }
}
