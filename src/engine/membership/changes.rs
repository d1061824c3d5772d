//! How many changes of the membership there are on a node at a time, and whose turn it is.

use std::sync::Arc;

use tokio::sync::{Mutex, MutexGuard, OwnedSemaphorePermit, Semaphore};

use crate::error::MembershipError;

/// What a change may wait for beside its turn. Each kind has a bound of its own: a change goes on without its caller, so callers
/// that come again and again would have as many as they like, and long waits must not keep out what takes a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waits {
    /// For nothing else: it takes seconds.
    ForItsTurn,
    /// For a learner to catch up, which may be given a day.
    ForLearner,
}

impl Waits {
    /// How many such changes may be under way.
    pub(super) const fn limit(self) -> usize {
        match self {
            Self::ForItsTurn => 64,
            Self::ForLearner => 32,
        }
    }
}

/// The changes of the membership that are under way on a node.
pub(in crate::engine) struct Changes {
    /// Held while one is made.
    turn: Mutex<()>,
    for_their_turn: Arc<Semaphore>,
    for_learners: Arc<Semaphore>,
}

impl Default for Changes {
    fn default() -> Self {
        let places = |waits: Waits| Arc::new(Semaphore::new(waits.limit()));
        Self {
            turn: Mutex::default(),
            for_their_turn: places(Waits::ForItsTurn),
            for_learners: places(Waits::ForLearner),
        }
    }
}

impl Changes {
    /// Whether one is being made at this moment.
    pub(in crate::engine) fn is_making(&self) -> bool {
        self.turn.try_lock().is_err()
    }

    /// Waits until none is.
    pub(super) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// A place for one more, until what is returned is dropped.
    ///
    /// # Errors
    /// [`MembershipError::TooManyChanges`].
    pub(super) fn place(&self, waits: Waits) -> Result<OwnedSemaphorePermit, MembershipError> {
        let places = match waits {
            Waits::ForItsTurn => &self.for_their_turn,
            Waits::ForLearner => &self.for_learners,
        };
        let place = places.clone().try_acquire_owned();
        place.map_err(|_| MembershipError::TooManyChanges { limit: waits.limit() })
    }
}
