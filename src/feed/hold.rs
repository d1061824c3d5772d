//! What those need who are catching up: the event log keeps it although its limits would not, or they would never arrive.
//!
//! One that is sent a whole state needs what comes after that state, however long the state takes. One that is far behind needs
//! what is next, however fast new operations come. Both hold the log from where they are, until they have come to its end for the
//! first time. The event log bounds all of them together by its size; each is bounded in time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The longest that anybody holds it.
const HOLD_TIME: Duration = Duration::from_hours(2);

/// From which position on somebody needs the event log.
#[derive(Debug, Default)]
pub(super) struct FeedHolds(Mutex<KnownHolds>);

#[derive(Debug, Default)]
struct KnownHolds {
    last_id: u64,
    held: BTreeMap<u64, HeldFrom>,
}

#[derive(Debug, Clone, Copy)]
struct HeldFrom {
    position: u64,
    since: Instant,
}

impl FeedHolds {
    fn lock(&self) -> MutexGuard<'_, KnownHolds> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first position that somebody needs; the largest there is for none.
    pub(super) fn first(&self) -> u64 {
        let mut known = self.lock();
        known.held.retain(|_, held| held.since.elapsed() < HOLD_TIME);
        known.held.values().map(|held| held.position).min().unwrap_or(u64::MAX)
    }

    /// Holds it from `position` on.
    pub(super) fn hold(self: &Arc<Self>, position: u64) -> FeedHold {
        let mut known = self.lock();
        known.last_id += 1;
        let id = known.last_id;
        known.held.insert(id, HeldFrom { position, since: Instant::now() });
        FeedHold { holds: self.clone(), id }
    }
}

/// Somebody who needs the event log from a position on. Ends when it is dropped.
#[derive(Debug)]
pub(crate) struct FeedHold {
    holds: Arc<FeedHolds>,
    id: u64,
}

impl FeedHold {
    /// What is before `position` is needed no more.
    pub(super) fn move_to(&self, position: u64) {
        if let Some(held) = self.holds.lock().held.get_mut(&self.id) {
            held.position = position;
        }
    }
}

impl Drop for FeedHold {
    fn drop(&mut self) {
        self.holds.lock().held.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_that_anybody_needs_is_held_and_not_for_ever() {
        let holds = Arc::new(FeedHolds::default());
        assert_eq!(holds.first(), u64::MAX);
        let (one, two) = (holds.hold(7), holds.hold(5));
        assert_eq!(holds.first(), 5);
        two.move_to(9);
        assert_eq!(holds.first(), 7);
        drop(one);
        assert_eq!(holds.first(), 9);
        tokio::time::advance(HOLD_TIME).await;
        let late = holds.hold(20);
        assert_eq!(holds.first(), 20);
        two.move_to(10);
        drop((late, two));
        assert_eq!(holds.first(), u64::MAX);
    }
}
