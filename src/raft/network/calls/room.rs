//! The room for calls that are passed on, on both sides: how many, and how many bytes.
//!
//! A voter that is down holds up every write that waits for all voters for as long as its caller is patient. Such writes have a room
//! of their own, as large as that of all other calls: one dead voter does not keep those out.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::panicking;

/// Which room a call takes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallRoom {
    /// Of what waits for a quorum at most.
    Quorum,
    /// Of what waits for the slowest voter.
    AllVoters,
}

/// Something for each room.
#[derive(Debug, Default)]
pub(crate) struct Rooms<T> {
    quorum: T,
    all_voters: T,
}

impl<T> Rooms<T> {
    /// What `make` makes for each.
    pub(crate) fn with(make: impl Fn() -> T) -> Self {
        Self { quorum: make(), all_voters: make() }
    }

    /// That of `room`.
    pub(crate) fn of(&self, room: CallRoom) -> &T {
        match room {
            CallRoom::Quorum => &self.quorum,
            CallRoom::AllVoters => &self.all_voters,
        }
    }
}

/// How much of a room is taken up.
pub(crate) type Level = Arc<AtomicUsize>;

/// What counts in a room until this is dropped.
#[derive(Debug)]
pub(crate) struct TakenRoom {
    amount: usize,
    of: Level,
}

impl TakenRoom {
    /// None where there is no room for it beside others. What is alone always finds room.
    pub(crate) fn of(amount: usize, level: &Level, limit: usize) -> Option<Self> {
        let others = level.fetch_add(amount, Ordering::Relaxed);
        let taken = Self { amount, of: level.clone() };
        (others == 0 || others.saturating_add(amount) <= limit).then_some(taken)
    }

    /// How much it is.
    pub(crate) fn amount(&self) -> usize {
        self.amount
    }

    /// From now on it is so much, whether there is room for that or not.
    pub(crate) fn becomes(&mut self, amount: usize) {
        self.of.fetch_add(amount, Ordering::Relaxed);
        let before = self.of.fetch_sub(self.amount, Ordering::Relaxed);
        assert!(before >= self.amount, "invariant: what leaves was counted when it came");
        self.amount = amount;
    }
}

impl Drop for TakenRoom {
    fn drop(&mut self) {
        let before = self.of.fetch_sub(self.amount, Ordering::Relaxed);
        assert!(before >= self.amount || panicking(), "invariant: what leaves was counted when it came");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_alone_finds_room_and_what_is_dropped_gives_it_back() {
        let rooms: Rooms<Level> = Rooms::default();
        let level = rooms.of(CallRoom::AllVoters);
        let mut large = TakenRoom::of(7, level, 5).unwrap();
        assert!(TakenRoom::of(1, level, 5).is_none());
        assert!(TakenRoom::of(5, rooms.of(CallRoom::Quorum), 5).is_some(), "another room");
        large.becomes(3);
        assert_eq!((large.amount(), level.load(Ordering::Relaxed)), (3, 3));
        let small = TakenRoom::of(2, level, 5).unwrap();
        drop(large);
        assert_eq!(level.load(Ordering::Relaxed), 2);
        drop(small);
        assert_eq!(level.load(Ordering::Relaxed), 0);
    }
}
