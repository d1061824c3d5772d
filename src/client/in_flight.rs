//! The requests of one stream that wait for their answers, by tag.

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::attempt::{AttemptError, Outcome, Way};

/// The low bits of a tag are the slot, the others count the requests of the connection.
const SLOT_BITS: u32 = 20;

/// Slots that are kept when no request is in flight: what looks through the table passes over all there were at once.
const KEPT_SLOTS: usize = 4096;

/// The most requests that tags can tell apart.
pub(super) const MAX_SLOTS: usize = 1 << SLOT_BITS;

/// One request that was sent and not yet answered.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) way: Way,
    pub(super) sent: Instant,
    pub(super) expires: Instant,
    pub(super) reply: oneshot::Sender<Outcome>,
}

/// Table of waiters. No allocation per request once it has grown, and no hashing.
///
/// A slot is used again, a tag never: an answer that comes after its request was given up finds another
/// tag in the slot and is ignored, instead of answering somebody else.
#[derive(Debug)]
pub(super) struct InFlight {
    slots: Vec<Option<(u64, Waiter)>>,
    free: Vec<u32>,
    issued: u64,
    limit: usize,
}

impl InFlight {
    pub(super) fn new(limit: usize) -> Self {
        assert!(limit <= MAX_SLOTS, "invariant: validated by ClientConfig");
        Self { slots: Vec::new(), free: Vec::new(), issued: 0, limit }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many more requests may be sent.
    pub(super) fn room(&self) -> usize {
        self.limit - self.len()
    }

    /// Enters a request that is about to be sent; returns its tag.
    pub(super) fn insert(&mut self, waiter: Waiter) -> u64 {
        self.issued += 1;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u32::try_from(self.slots.len() - 1).expect("invariant: at most MAX_SLOTS slots")
        });
        assert!(self.len() <= self.limit, "invariant: no more is in flight than may be");
        let tag = (self.issued << SLOT_BITS) | u64::from(slot);
        let other = self.slots[slot as usize].replace((tag, waiter));
        assert!(other.is_none(), "invariant: a free slot holds no request");
        tag
    }

    /// Takes the waiter of `tag`, if there is one.
    pub(super) fn take(&mut self, tag: u64) -> Option<Waiter> {
        let slot = (tag as usize) & (MAX_SLOTS - 1);
        match self.slots.get_mut(slot) {
            Some(entry) if entry.as_ref().is_some_and(|(expected, _)| *expected == tag) => {
                self.free.push(u32::try_from(slot).expect("invariant: at most MAX_SLOTS slots"));
                let waiter = entry.take().map(|(_, waiter)| waiter);
                self.shrink();
                waiter
            }
            _ => None,
        }
    }

    /// A burst that is over takes no memory, and no time to look through.
    fn shrink(&mut self) {
        if self.is_empty() && self.slots.len() > KEPT_SLOTS {
            (self.slots, self.free) = (Vec::new(), Vec::new());
        }
    }

    /// Fails what has expired by `now`. Tells of the rest when the oldest were sent that need the leader.
    pub(super) fn sweep(&mut self, now: Instant) -> Oldest {
        let mut oldest = Oldest::default();
        self.fail(&AttemptError::Expired { sent: true }, |waiter| {
            if waiter.expires > now && waiter.way.needs_leader() {
                oldest.note(waiter);
            }
            waiter.expires <= now
        });
        oldest
    }

    /// Fails the requests for which `which` holds.
    pub(super) fn fail(&mut self, error: &AttemptError, mut which: impl FnMut(&Waiter) -> bool) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].as_ref().is_some_and(|(_, waiter)| which(waiter))
                && let Some((_, waiter)) = self.slots[slot].take()
            {
                self.free.push(u32::try_from(slot).expect("invariant: at most MAX_SLOTS slots"));
                // The caller may have given up by itself; nobody else wants to know.
                let _ = waiter.reply.send(Err(error.clone()));
            }
        }
        self.shrink();
    }
}

/// When the oldest requests were sent that need the leader.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Oldest {
    pub(super) any: Option<Instant>,
    /// Of those that a leader answers soon, unless something is wrong.
    pub(super) prompt: Option<Instant>,
}

impl Oldest {
    fn note(&mut self, waiter: &Waiter) {
        let older = |oldest: Option<Instant>| Some(oldest.map_or(waiter.sent, |sent| sent.min(waiter.sent)));
        self.any = older(self.any);
        if !waiter.way.waits_for_all {
            self.prompt = older(self.prompt);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::client::attempt::Kind;

    fn waiter(kind: Kind) -> (Waiter, oneshot::Receiver<Outcome>) {
        waiting(Way::of(kind), Instant::now())
    }

    fn waiting(way: Way, now: Instant) -> (Waiter, oneshot::Receiver<Outcome>) {
        let (reply, answer) = oneshot::channel();
        (Waiter { way, sent: now, expires: now + Duration::from_secs(9), reply }, answer)
    }

    #[test]
    fn only_what_the_leader_should_have_answered_says_that_it_is_late() {
        let mut table = InFlight::new(8);
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let write = Way::of(Kind::Write);
        let ways = [
            (Way::of(Kind::Anywhere), 0),
            (Way { bound: true, ..write }, 1),
            (Way { waits_for_all: true, ..write }, 2),
            (write, 4),
            (write, 3),
        ];
        let mut answers = ways.map(|(way, sent)| {
            let (waiter, answer) = waiting(way, at(sent));
            table.insert(waiter);
            answer
        });
        let oldest = |any, prompt| Oldest { any: Some(at(any)), prompt: Some(at(prompt)) };
        assert_eq!(table.sweep(at(8)), oldest(2, 3));
        assert!(answers.iter_mut().all(|answer| answer.try_recv().is_err()));
        assert_eq!(table.sweep(at(12)), oldest(4, 4));
        let expired = |answer: &mut oneshot::Receiver<Outcome>| answer.try_recv().is_ok();
        assert_eq!(answers.each_mut().map(expired), [true, true, true, false, true]);
    }

    #[test]
    fn a_tag_is_never_used_again() {
        let mut table = InFlight::new(2);
        let (first, _answer) = waiter(Kind::Write);
        let old = table.insert(first);
        assert!(table.take(old).is_some());
        let (second, _answer) = waiter(Kind::Write);
        let new = table.insert(second);
        assert_ne!(old, new);
        assert!(table.take(old).is_none(), "a late answer must not reach the next request in its slot");
        assert!(table.take(u64::MAX).is_none());
        assert!(table.take(0).is_none());
        assert_eq!(table.room(), 1);
        assert!(table.take(new).is_some());
        assert!(table.is_empty());
    }

    #[test]
    fn a_burst_that_is_over_leaves_no_slots() {
        let mut table = InFlight::new(MAX_SLOTS);
        let mut last = 0;
        for round in 1..=2 {
            let tags: Vec<_> = (0..=KEPT_SLOTS).map(|_| table.insert(waiter(Kind::Write).0)).collect();
            assert!(tags.is_sorted() && tags[0] > last, "a tag is never used again");
            last = tags[KEPT_SLOTS];
            assert_eq!(table.slots.len(), KEPT_SLOTS + 1);
            match round {
                1 => assert!(tags.into_iter().all(|tag| table.take(tag).is_some())),
                _ => table.fail(&AttemptError::LeaderChanged, |_| true),
            }
            assert_eq!((table.slots.len(), table.len()), (0, 0));
        }
    }

    #[test]
    fn failing_is_selective() {
        let mut table = InFlight::new(8);
        let (write, mut write_answer) = waiter(Kind::Write);
        let (read, mut read_answer) = waiter(Kind::Anywhere);
        table.insert(write);
        let tag = table.insert(read);
        table.fail(&AttemptError::LeaderChanged, |waiter| waiter.way.needs_leader());
        assert!(matches!(write_answer.try_recv(), Ok(Err(AttemptError::LeaderChanged))));
        assert!(read_answer.try_recv().is_err());
        assert_eq!(table.sweep(Instant::now()), Oldest::default());
        assert!(table.take(tag).is_some());
    }
}
