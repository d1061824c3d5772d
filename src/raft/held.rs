//! Which members are known to hold which entries on disk.
//!
//! openraft counts the same for itself, to know what is committed, but tells it only now and then. Writes
//! that ask for all voters need to know at once, and every acknowledgement names the nodes that hold the
//! entry. So what the peers accept and what the own log flushes is noted here too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::{Notify, oneshot};

use crate::types::{LogId, NodeId};

/// Those who wait are looked through this often at most, however often anything advances.
const PACE: Duration = Duration::from_millis(2);
/// Those who have given up are forgotten this often, when nothing advances.
const SWEEP: Duration = Duration::from_secs(1);

/// How far each member's log is known to be durable, as far as it is this leader's.
#[derive(Debug, Default)]
pub struct Held {
    upto: Mutex<BTreeMap<NodeId, LogId>>,
    advanced: Notify,
    /// Who waits until all voters hold an entry, by its position.
    waiting: Mutex<BTreeMap<LogId, Vec<oneshot::Sender<()>>>>,
}

impl Held {
    /// `node_id` holds everything up to `log_id` on disk.
    pub fn note(&self, node_id: NodeId, log_id: LogId) {
        let mut upto = self.upto.lock().expect("invariant: no panic under this lock");
        let held = upto.entry(node_id).or_insert(log_id);
        // Answers to different requests may overtake each other.
        *held = log_id.max(*held);
        drop(upto);
        self.advanced.notify_one();
    }

    /// The members known to hold the entry at `log_id`.
    ///
    /// Who holds an entry of the same term at this index or beyond holds this one too: a leader never changes
    /// what it wrote (Raft, §5.3, Log Matching). What was noted in another term says nothing.
    pub fn holders(&self, log_id: LogId) -> Vec<NodeId> {
        let upto = self.upto.lock().expect("invariant: no panic under this lock");
        let holds = |held: &LogId| held.term == log_id.term && held.index >= log_id.index;
        upto.iter().filter(|(_, held)| holds(held)).map(|(node_id, _)| *node_id).collect()
    }

    /// Resolves once all voters hold the entry at `log_id`, which may be never.
    pub fn wait_for_all(&self, log_id: LogId) -> oneshot::Receiver<()> {
        let (done, held) = oneshot::channel();
        let mut waiting = self.waiting.lock().expect("invariant: no panic under this lock");
        waiting.entry(log_id).or_default().push(done);
        drop(waiting);
        self.advanced.notify_one();
        held
    }

    /// How many wait until all voters hold something.
    pub fn waiting(&self) -> usize {
        let waiting = self.waiting.lock().expect("invariant: no panic under this lock");
        waiting.values().flatten().filter(|waiter| !waiter.is_closed()).count()
    }

    /// Tells those who wait, for ever. One task does it for all: there may be thousands of them, and something advances
    /// thousands of times a second.
    pub async fn tell(&self, voters: impl Fn() -> BTreeSet<NodeId>) {
        loop {
            // An error: nothing has advanced.
            let _ = tokio::time::timeout(SWEEP, self.advanced.notified()).await;
            if self.waiting.lock().expect("invariant: no panic under this lock").is_empty() {
                continue;
            }
            self.tell_now(self.all_hold(&voters()));
            tokio::time::sleep(PACE).await;
        }
    }

    fn tell_now(&self, all: Option<LogId>) {
        let mut waiting = self.waiting.lock().expect("invariant: no panic under this lock");
        waiting.retain(|log_id, waiters| {
            if all.is_some_and(|all| all.term == log_id.term && all.index >= log_id.index) {
                for waiter in waiters.drain(..) {
                    // Whoever gave up does not matter.
                    let _ = waiter.send(());
                }
            }
            waiters.retain(|waiter| !waiter.is_closed());
            !waiters.is_empty()
        });
    }

    /// The last entry that all of `voters` hold, if they hold entries of the same term.
    fn all_hold(&self, voters: &BTreeSet<NodeId>) -> Option<LogId> {
        let upto = self.upto.lock().expect("invariant: no panic under this lock");
        let held: Option<Vec<LogId>> = voters.iter().map(|voter| upto.get(voter).copied()).collect();
        let held = held?;
        let (least, most) = (held.iter().min()?, held.iter().max()?);
        (least.term == most.term).then_some(*least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_term_counts() {
        let held = Held::default();
        held.note(1, LogId::new(2, 9));
        held.note(2, LogId::new(2, 5));
        held.note(3, LogId::new(1, 20));
        assert_eq!(held.holders(LogId::new(2, 5)), [1, 2]);
        assert_eq!(held.holders(LogId::new(2, 6)), [1]);
        assert_eq!(held.holders(LogId::new(1, 5)), [3]);
        held.note(3, LogId::new(2, 6));
        assert_eq!(held.holders(LogId::new(2, 6)), [1, 3]);
        held.note(3, LogId::new(2, 5));
        assert_eq!(held.holders(LogId::new(2, 6)), [1, 3], "a late answer takes nothing back");
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_wait_are_told_when_the_slowest_has_it() {
        let held = std::sync::Arc::new(Held::default());
        let telling = held.clone();
        crate::runtime::spawn(async move { telling.tell(|| BTreeSet::from([1, 2])).await });
        let (mut first, mut second) =
            (held.wait_for_all(LogId::new(2, 5)), held.wait_for_all(LogId::new(2, 9)));
        held.note(1, LogId::new(2, 9));
        tokio::time::sleep(SWEEP).await;
        assert!(first.try_recv().is_err() && second.try_recv().is_err());
        assert_eq!(held.waiting(), 2);
        held.note(2, LogId::new(2, 6));
        first.await.unwrap();
        assert!(second.try_recv().is_err());
        assert_eq!(held.waiting(), 1);
        drop(second);
        assert_eq!(held.waiting(), 0);
        tokio::time::sleep(SWEEP * 2).await;
        assert!(held.waiting.lock().unwrap().is_empty(), "whoever gave up is forgotten");
    }
}
