//! Which members are known to hold which entries on disk.
//!
//! openraft counts the same for itself, to know what is committed, but tells it only now and then. Writes
//! that ask for all voters need to know at once, and every acknowledgement names the nodes that hold the
//! entry. So what the peers accept and what the own log flushes is noted here too.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::types::{Incarnation, LogId, NodeId};

/// Those who wait are looked through this often at most, however often anything advances.
const PACE: Duration = Duration::from_millis(2);
/// Those who have given up are forgotten this often.
const SWEEP: Duration = Duration::from_secs(1);

/// How far each member's log is known to be durable, as far as it is this leader's.
#[derive(Debug, Default)]
pub(crate) struct DurablePositions {
    upto: Mutex<BTreeMap<NodeId, (Incarnation, LogId)>>,
    advanced: Notify,
    /// Who waits until all voters hold an entry, by its position.
    waiting: Mutex<BTreeMap<LogId, Vec<oneshot::Sender<()>>>>,
    /// Whether anybody waits; what advances is told only then.
    is_awaited: AtomicBool,
}

impl DurablePositions {
    /// A node holds everything up to `log_id` in its data directory.
    pub(crate) fn note(&self, (node_id, incarnation): (NodeId, Incarnation), log_id: LogId) {
        let mut upto = self.upto.lock().expect("invariant: no panic under this lock");
        let held = upto.entry(node_id).or_insert((incarnation, log_id));
        *held = match held.0 == incarnation {
            // Answers to different requests may overtake each other.
            true => (incarnation, log_id.max(held.1)),
            // It was replaced: what its predecessor held is gone.
            false => (incarnation, log_id),
        };
        drop(upto);
        // Whoever begins to wait after this look finds what was noted before it.
        if self.is_awaited.load(SeqCst) {
            self.advanced.notify_one();
        }
    }

    /// The members known to hold the entry at `log_id`.
    ///
    /// Who holds an entry of the same term at this index or beyond holds this one too: a leader never changes
    /// what it wrote (Raft, §5.3, Log Matching). What was noted in another term says nothing.
    pub(crate) fn holders(&self, log_id: LogId) -> Vec<NodeId> {
        let upto = self.upto.lock().expect("invariant: no panic under this lock");
        let holds = |held: &LogId| held.term == log_id.term && held.index >= log_id.index;
        upto.iter().filter(|(_, (_, held))| holds(held)).map(|(node_id, _)| *node_id).collect()
    }

    /// Which of `voters` are not known to hold the entry at `log_id` in the directory that they have now.
    pub(crate) fn missing(&self, log_id: LogId, voters: &BTreeMap<NodeId, Incarnation>) -> Vec<NodeId> {
        let upto = self.upto.lock().expect("invariant: no panic under this lock");
        let lacks = |(voter, incarnation): &(&NodeId, &Incarnation)| {
            let held = upto.get(*voter).filter(|held| held.0 == **incarnation).map(|held| held.1);
            held.is_none_or(|held| held.term != log_id.term || held.index < log_id.index)
        };
        voters.iter().filter(lacks).map(|(voter, _)| *voter).collect()
    }

    /// Resolves once all voters hold the entry at `log_id`, which may be never.
    pub(crate) fn wait_for_all(&self, log_id: LogId) -> oneshot::Receiver<()> {
        let (done, held) = oneshot::channel();
        let mut waiting = self.waiting.lock().expect("invariant: no panic under this lock");
        waiting.entry(log_id).or_default().push(done);
        self.is_awaited.store(true, SeqCst);
        drop(waiting);
        self.advanced.notify_one();
        held
    }

    /// How many wait until all voters hold something.
    pub(crate) fn waiting(&self) -> usize {
        let waiting = self.waiting.lock().expect("invariant: no panic under this lock");
        waiting.values().flatten().filter(|waiter| !waiter.is_closed()).count()
    }

    /// Tells those who wait, for ever. One task does it for all: there may be thousands of them, and something advances
    /// thousands of times a second.
    pub(crate) async fn tell(&self, voters: impl Fn() -> BTreeMap<NodeId, Incarnation>) {
        let mut swept = Instant::now();
        loop {
            match self.is_anybody_waiting() {
                // Those who wait may give up, and the voters may become others.
                true => {
                    let _ = tokio::time::timeout(SWEEP, self.advanced.notified()).await;
                }
                false => self.advanced.notified().await,
            }
            if let Some(all) = self.all_hold(&voters()) {
                self.tell_upto(all);
            }
            if swept.elapsed() >= SWEEP {
                swept = Instant::now();
                self.forget_closed();
            }
            tokio::time::sleep(PACE).await;
        }
    }

    fn is_anybody_waiting(&self) -> bool {
        let waiting = self.waiting.lock().expect("invariant: no panic under this lock");
        self.is_awaited.store(!waiting.is_empty(), SeqCst);
        !waiting.is_empty()
    }

    /// Looks only at those it tells: the others may wait long, for a voter that is down.
    fn tell_upto(&self, all: LogId) {
        let mut waiting = self.waiting.lock().expect("invariant: no panic under this lock");
        // Not those of an earlier term: their entries may have been replaced.
        let reached: Vec<LogId> = waiting.range(LogId::new(all.term, 0)..=all).map(|(at, _)| *at).collect();
        for waiter in reached.iter().filter_map(|at| waiting.remove(at)).flatten() {
            // Whoever gave up does not matter.
            let _ = waiter.send(());
        }
    }

    fn forget_closed(&self) {
        let mut waiting = self.waiting.lock().expect("invariant: no panic under this lock");
        waiting.retain(|_, waiters| {
            waiters.retain(|waiter| !waiter.is_closed());
            !waiters.is_empty()
        });
    }

    /// The last entry that all of `voters` hold, if they hold entries of the same term.
    fn all_hold(&self, voters: &BTreeMap<NodeId, Incarnation>) -> Option<LogId> {
        let upto = self.upto.lock().expect("invariant: no panic under this lock");
        let holds = |(voter, incarnation): (&NodeId, &Incarnation)| {
            upto.get(voter).filter(|held| held.0 == *incarnation).map(|held| held.1)
        };
        let held: Option<Vec<LogId>> = voters.iter().map(holds).collect();
        let held = held?;
        let (least, most) = (held.iter().min()?, held.iter().max()?);
        (least.term == most.term).then_some(*least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node in its first data directory.
    fn node(node_id: NodeId) -> (NodeId, Incarnation) {
        (node_id, Incarnation(1))
    }

    #[test]
    fn only_the_same_term_counts() {
        let positions = DurablePositions::default();
        positions.note(node(1), LogId::new(2, 9));
        positions.note(node(2), LogId::new(2, 5));
        positions.note(node(3), LogId::new(1, 20));
        assert_eq!(positions.holders(LogId::new(2, 5)), [1, 2]);
        assert_eq!(positions.holders(LogId::new(2, 6)), [1]);
        assert_eq!(positions.holders(LogId::new(1, 5)), [3]);
        positions.note(node(3), LogId::new(2, 6));
        assert_eq!(positions.holders(LogId::new(2, 6)), [1, 3]);
        positions.note(node(3), LogId::new(2, 5));
        assert_eq!(positions.holders(LogId::new(2, 6)), [1, 3], "a late answer takes nothing back");
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_wait_are_told_when_the_slowest_has_it() {
        let positions = std::sync::Arc::new(DurablePositions::default());
        let telling = positions.clone();
        crate::runtime::spawn(async move { telling.tell(|| BTreeMap::from([node(1), node(2)])).await });
        let (mut first, mut second) =
            (positions.wait_for_all(LogId::new(2, 5)), positions.wait_for_all(LogId::new(2, 9)));
        positions.note(node(1), LogId::new(2, 9));
        tokio::time::sleep(SWEEP).await;
        assert!(first.try_recv().is_err() && second.try_recv().is_err());
        assert_eq!(positions.waiting(), 2);
        positions.note(node(2), LogId::new(2, 6));
        first.await.unwrap();
        assert!(second.try_recv().is_err());
        assert_eq!(positions.waiting(), 1);
        drop(second);
        assert_eq!(positions.waiting(), 0);
        tokio::time::sleep(SWEEP * 2).await;
        assert!(positions.waiting.lock().unwrap().is_empty(), "whoever gave up is forgotten");
    }

    #[test]
    fn what_a_replaced_node_held_is_gone() {
        let positions = DurablePositions::default();
        let voters = |incarnation| BTreeMap::from([node(1), (2, Incarnation(incarnation))]);
        positions.note(node(1), LogId::new(2, 9));
        positions.note(node(2), LogId::new(2, 9));
        assert_eq!(positions.all_hold(&voters(1)), Some(LogId::new(2, 9)));
        assert_eq!(positions.all_hold(&voters(2)), None, "the new node has said nothing yet");
        let missing = |incarnation, index| positions.missing(LogId::new(2, index), &voters(incarnation));
        assert_eq!((missing(1, 9), missing(1, 10), missing(2, 9)), (vec![], vec![1, 2], vec![2]));
        positions.note((2, Incarnation(2)), LogId::new(2, 4));
        assert_eq!(positions.all_hold(&voters(2)), Some(LogId::new(2, 4)));
        assert_eq!(positions.holders(LogId::new(2, 9)), [1]);
    }

    #[test]
    fn only_those_of_the_same_term_are_told() {
        let positions = DurablePositions::default();
        let mut waiting = [(1, 5), (2, 5), (2, 6), (2, 7), (3, 1)]
            .map(|(term, index)| positions.wait_for_all(LogId::new(term, index)));
        positions.tell_upto(LogId::new(2, 6));
        let told = waiting.each_mut().map(|waiter| waiter.try_recv().is_ok());
        assert_eq!(told, [false, true, true, false, false]);
        assert_eq!(positions.waiting.lock().unwrap().len(), 3);
    }
}
