//! The requests of one stream that wait for their answers, by tag.

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::attempt::{AttemptError, Kind, Outcome};

/// The low bits of a tag are the slot, the others count the requests of the connection.
const SLOT_BITS: u32 = 20;

/// The most requests that tags can tell apart.
pub(super) const MAX_SLOTS: usize = 1 << SLOT_BITS;

/// One request that was sent and not yet answered.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) kind: Kind,
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
        let tag = (self.issued << SLOT_BITS) | u64::from(slot);
        self.slots[slot as usize] = Some((tag, waiter));
        tag
    }

    /// Takes the waiter of `tag`, if there is one.
    pub(super) fn take(&mut self, tag: u64) -> Option<Waiter> {
        let slot = (tag as usize) & (MAX_SLOTS - 1);
        match self.slots.get_mut(slot) {
            Some(entry) if entry.as_ref().is_some_and(|(expected, _)| *expected == tag) => {
                self.free.push(u32::try_from(slot).expect("invariant: at most MAX_SLOTS slots"));
                entry.take().map(|(_, waiter)| waiter)
            }
            _ => None,
        }
    }

    /// When the oldest request that only the leader can answer was sent.
    pub(super) fn oldest_for_leader(&self) -> Option<Instant> {
        let waiters = self.slots.iter().flatten().map(|(_, waiter)| waiter);
        waiters.filter(|waiter| waiter.kind != Kind::Anywhere).map(|waiter| waiter.sent).min()
    }

    /// Fails the requests for which `which` holds.
    pub(super) fn fail(&mut self, error: &AttemptError, which: impl Fn(&Waiter) -> bool) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].as_ref().is_some_and(|(_, waiter)| which(waiter))
                && let Some((_, waiter)) = self.slots[slot].take()
            {
                self.free.push(u32::try_from(slot).expect("invariant: at most MAX_SLOTS slots"));
                // The caller may have given up by itself; nobody else wants to know.
                let _ = waiter.reply.send(Err(error.clone()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiter(kind: Kind) -> (Waiter, oneshot::Receiver<Outcome>) {
        let (reply, answer) = oneshot::channel();
        let now = Instant::now();
        (Waiter { kind, sent: now, expires: now, reply }, answer)
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
    fn failing_is_selective() {
        let mut table = InFlight::new(8);
        let (write, mut write_answer) = waiter(Kind::Write);
        let (read, mut read_answer) = waiter(Kind::Anywhere);
        table.insert(write);
        let tag = table.insert(read);
        table.fail(&AttemptError::LeaderChanged, |waiter| waiter.kind != Kind::Anywhere);
        assert!(matches!(write_answer.try_recv(), Ok(Err(AttemptError::LeaderChanged))));
        assert!(read_answer.try_recv().is_err());
        assert!(table.oldest_for_leader().is_none());
        assert!(table.take(tag).is_some());
    }
}
