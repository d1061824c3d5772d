//! Which changes of the membership there are, how many of them on a node at a time, whose turn it is, and how far one is.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard, OwnedSemaphorePermit, Semaphore};

use super::identify::{check_address, check_number};
use super::{NewAddresses, NewMember};
use crate::error::MembershipError;
use crate::types::NodeId;

/// A change that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RequestedChange {
    /// See [`Engine::add_member`](crate::Engine::add_member).
    Add { new: NewMember, promote: bool, timeout: Duration },
    /// See [`Engine::promote_member`](crate::Engine::promote_member).
    Promote { node_id: NodeId, timeout: Duration },
    /// See [`Engine::demote_member`](crate::Engine::demote_member).
    Demote { node_id: NodeId, force: bool },
    /// See [`Engine::remove_member`](crate::Engine::remove_member).
    Remove { node_id: NodeId, force: bool },
    /// See [`Engine::replace_member`](crate::Engine::replace_member).
    Replace { old: NodeId, new: NewMember, timeout: Duration },
    /// See [`Engine::update_member`](crate::Engine::update_member).
    Update { node_id: NodeId, addresses: NewAddresses },
}

impl RequestedChange {
    /// What can be said of it without asking anybody.
    pub(super) fn check(&self) -> Result<(), MembershipError> {
        match self {
            Self::Add { new, .. } | Self::Replace { new, .. } => check_number(new.node_id),
            Self::Update { addresses: NewAddresses { peer, client }, .. } => {
                peer.iter().chain(client).try_for_each(|address| check_address(address))
            }
            Self::Promote { .. } | Self::Demote { .. } | Self::Remove { .. } => Ok(()),
        }
    }

    pub(super) fn waits(&self) -> ChangeWaits {
        match self {
            Self::Add { promote: true, .. } | Self::Promote { .. } | Self::Replace { .. } => {
                ChangeWaits::ForLearner
            }
            Self::Add { promote: false, .. }
            | Self::Demote { .. }
            | Self::Remove { .. }
            | Self::Update { .. } => ChangeWaits::ForItsTurn,
        }
    }
}

/// How far a change is. Until a part of it is proposed its caller may give it up, and then none is.
#[derive(Debug)]
pub(super) struct Stage(std::sync::Mutex<At>);

#[derive(Debug)]
enum At {
    /// Nothing is proposed, and this is waited for.
    Waiting(String),
    Proposed,
    GivenUp,
}

impl Default for Stage {
    fn default() -> Self {
        Self(std::sync::Mutex::new(At::Waiting("an earlier change to end".to_owned())))
    }
}

impl Stage {
    fn at(&self) -> std::sync::MutexGuard<'_, At> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what is waited for from now on.
    pub(super) fn waits_for(&self, what: impl FnOnce() -> String) {
        if let At::Waiting(before) = &mut *self.at() {
            *before = what();
        }
    }

    /// From now on a part may be made. False when the change was given up before.
    pub(super) fn propose(&self) -> bool {
        let mut at = self.at();
        match *at {
            At::GivenUp => false,
            At::Waiting(_) | At::Proposed => {
                *at = At::Proposed;
                true
            }
        }
    }

    /// Gives the change up, unless a part of it may be made by now. Returns what it waited for.
    pub(super) fn give_up(&self) -> Option<String> {
        let mut at = self.at();
        match std::mem::replace(&mut *at, At::GivenUp) {
            At::Waiting(what) => Some(what),
            before @ (At::Proposed | At::GivenUp) => {
                *at = before;
                None
            }
        }
    }
}

/// What a change may wait for beside its turn. Each kind has a bound of its own: a change goes on without its caller, so callers
/// that come again and again would have as many as they like, and long waits must not keep out what takes a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChangeWaits {
    /// For nothing else: it takes seconds.
    ForItsTurn,
    /// For a learner to catch up, which may be given a day.
    ForLearner,
}

impl ChangeWaits {
    /// How many such changes may be under way.
    pub(super) const fn limit(self) -> usize {
        match self {
            Self::ForItsTurn => 64,
            Self::ForLearner => 32,
        }
    }
}

/// The changes of the membership that are under way on a node.
pub(in crate::engine) struct MemberChanges {
    /// Held while one is made.
    turn: Mutex<()>,
    for_their_turn: Arc<Semaphore>,
    for_learners: Arc<Semaphore>,
}

impl Default for MemberChanges {
    fn default() -> Self {
        let places = |waits: ChangeWaits| Arc::new(Semaphore::new(waits.limit()));
        Self {
            turn: Mutex::default(),
            for_their_turn: places(ChangeWaits::ForItsTurn),
            for_learners: places(ChangeWaits::ForLearner),
        }
    }
}

impl MemberChanges {
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
    pub(super) fn place(&self, waits: ChangeWaits) -> Result<OwnedSemaphorePermit, MembershipError> {
        let places = match waits {
            ChangeWaits::ForItsTurn => &self.for_their_turn,
            ChangeWaits::ForLearner => &self.for_learners,
        };
        let place = places.clone().try_acquire_owned();
        place.map_err(|_| MembershipError::TooManyChanges { limit: waits.limit() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_up_is_not_proposed_and_what_is_proposed_not_given_up() {
        let stage = Stage::default();
        stage.waits_for(|| "a node to answer".to_owned());
        assert_eq!(stage.give_up().as_deref(), Some("a node to answer"));
        assert!(!stage.propose() && stage.give_up().is_none());

        let stage = Stage::default();
        assert!(stage.propose() && stage.propose(), "of a change of several parts");
        stage.waits_for(|| "a node to catch up".to_owned());
        assert_eq!(stage.give_up(), None);
    }
}
