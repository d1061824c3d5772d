//! Which members are known to hold which entries on disk.
//!
//! openraft counts the same for itself, to know what is committed, but tells it only now and then. Writes
//! that ask for all voters need to know at once, and every acknowledgement names the nodes that hold the
//! entry. So what the peers accept and what the own log flushes is noted here too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use tokio::sync::Notify;

use crate::types::{LogId, NodeId};

/// How far each member's log is known to be durable, as far as it is this leader's.
#[derive(Debug, Default)]
pub struct Held {
    upto: Mutex<BTreeMap<NodeId, LogId>>,
    advanced: Notify,
}

impl Held {
    /// `node_id` holds everything up to `log_id` on disk.
    pub fn note(&self, node_id: NodeId, log_id: LogId) {
        self.upto.lock().expect("invariant: no panic under this lock").insert(node_id, log_id);
        self.advanced.notify_waiters();
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

    /// Waits until all that `voters` returns at that moment hold the entry at `log_id`, which may be for ever.
    pub async fn wait_for_all(&self, log_id: LogId, voters: impl Fn() -> BTreeSet<NodeId>) {
        loop {
            let advanced = self.advanced.notified();
            tokio::pin!(advanced);
            advanced.as_mut().enable();
            let holders = self.holders(log_id);
            if voters().iter().all(|voter| holders.contains(voter)) {
                return;
            }
            advanced.await;
        }
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
    }
}
