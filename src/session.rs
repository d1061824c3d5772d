//! A client's side of a session: the numbers that make its writes exactly-once.
//!
//! Whoever writes may not learn the outcome: the leader fails, the answer is lost. Sending the command again
//! could then apply it twice. Within a session every write has a number, its *sequence*. The replicated
//! table of sessions remembers which sequences have been applied and what was answered, so a write that is sent
//! again, to whichever node and however often, is applied once and answered every time as the first time
//! (Raft thesis, §6.3).
//!
//! The table must know what it may forget: each write carries the smallest sequence that has not been answered
//! yet. Everything below it is settled. A session therefore has a *window*: a sequence that is too far
//! ahead of the smallest unanswered one is refused.
//!
//! This file is pure bookkeeping. [`Engine::open_session`](crate::Engine::open_session) and the
//! [client](crate::client) open sessions; the table is [`crate::machine::sessions`].
//!
//! The protocol, with a figure: `docs/design/sessions.md`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::types::{HistoryEpoch, SessionSlot};

/// A session that is open in the cluster. One value may serve any number of concurrent writers.
#[derive(Debug)]
pub struct Session {
    id: u64,
    history: HistoryEpoch,
    window: u64,
    slots: Mutex<Slots>,
}

/// Which sequences have been handed out and not yet settled.
#[derive(Debug)]
struct Slots {
    /// The smallest unsettled sequence.
    first: u64,
    /// Whether `first`, `first + 1` and so on are settled; never begins with true.
    settled: VecDeque<bool>,
    /// How many of these are not.
    unsettled: u64,
}

impl Session {
    /// The session `id`, of which no write has been sent yet, with room for `window` unsettled sequences.
    /// It was opened in `history`.
    pub fn new(id: u64, window: u64, history: HistoryEpoch) -> Arc<Self> {
        let slots = Slots { first: 1, settled: VecDeque::new(), unsettled: 0 };
        Arc::new(Self { id, history, window: window.max(1), slots: Mutex::new(slots) })
    }

    /// Its id.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The history in which it was opened: in another one it does not exist, and what was written in it may not either.
    pub fn history(&self) -> HistoryEpoch {
        self.history
    }

    /// A place for one write, however often it will be sent. `None` while the window is full: settle some
    /// first.
    pub fn begin(self: &Arc<Self>) -> Option<Ticket> {
        let mut slots = self.slots.lock().expect("invariant: no panic under this lock");
        if slots.settled.len() as u64 >= self.window {
            return None;
        }
        let sequence = slots.first + slots.settled.len() as u64;
        slots.settled.push_back(false);
        slots.unsettled += 1;
        Some(Ticket { session: self.clone(), sequence })
    }

    /// Whether its window is full although most of the writes in it are settled: a few that are not hold up all others.
    pub(crate) fn is_held_up(&self) -> bool {
        let slots = self.slots.lock().expect("invariant: no panic under this lock");
        slots.settled.len() as u64 >= self.window && slots.unsettled < self.window / 2
    }

    fn settle(&self, sequence: u64) {
        let mut slots = self.slots.lock().expect("invariant: no panic under this lock");
        let place = usize::try_from(sequence - slots.first).expect("invariant: the window fits into memory");
        slots.settled[place] = true;
        slots.unsettled -= 1;
        while slots.settled.front() == Some(&true) {
            slots.settled.pop_front();
            slots.first += 1;
        }
    }
}

/// The place of one write in its session. Dropping it settles the write: it is answered, or given up and must
/// not be sent again.
///
/// A write that was given up while it was under way may still be applied, once; it is never applied after a
/// later write of the session has told the table that this one is settled.
#[derive(Debug)]
pub struct Ticket {
    session: Arc<Session>,
    sequence: u64,
}

impl Ticket {
    /// What to send with the write. Asked for every attempt anew: others may have been settled meanwhile.
    pub fn slot(&self) -> SessionSlot {
        let slots = self.session.slots.lock().expect("invariant: no panic under this lock");
        SessionSlot { session: self.session.id, sequence: self.sequence, first_unanswered: slots.first }
    }

    /// The session it belongs to.
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.session.settle(self.sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_unanswered_follows_the_gaps() {
        let session = Session::new(7, 3, HistoryEpoch::UNKNOWN);
        let (one, two, three) =
            (session.begin().unwrap(), session.begin().unwrap(), session.begin().unwrap());
        assert!(session.begin().is_none(), "the window is full");
        assert_eq!(two.slot(), SessionSlot { session: 7, sequence: 2, first_unanswered: 1 });
        drop(two);
        assert!(session.begin().is_none(), "1 is still unanswered");
        drop(one);
        assert_eq!(three.slot(), SessionSlot { session: 7, sequence: 3, first_unanswered: 3 });
        let four = session.begin().unwrap();
        drop(three);
        assert_eq!(four.slot(), SessionSlot { session: 7, sequence: 4, first_unanswered: 4 });
    }

    #[test]
    fn a_full_window_is_held_up_when_most_of_it_is_settled() {
        let session = Session::new(7, 4, HistoryEpoch::UNKNOWN);
        let mut tickets: Vec<_> = (0..4).map(|_| session.begin().unwrap()).collect();
        tickets.truncate(2);
        assert!(session.begin().is_none() && !session.is_held_up(), "two are as many as half of it");
        tickets.truncate(1);
        assert!(session.begin().is_none() && session.is_held_up());
        tickets.clear();
        assert!(session.begin().is_some() && !session.is_held_up());
    }
}
