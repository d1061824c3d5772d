//! Where members are dialled: where the membership says they are, or where this node was told when it started.
//!
//! The two differ while members move. When all of them were restarted at new addresses, nobody can be reached where
//! the membership says, so nobody could commit a membership that says better; the addresses each was told are the
//! way out. A dial that fails makes the other address the next to be tried, one that succeeds is tried again.
//! Whoever answers is asked for its identity, so a stale address costs time and no more.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Mutex, OnceLock};

use crate::types::{LogId, Member, NodeId};

/// What the membership in effect says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Where it stands in the log.
    pub at: Option<LogId>,
    /// What it says about the member asked for.
    pub member: Option<Member>,
}

/// What this node was told about its peers' addresses, and which of them to use.
#[derive(Default)]
pub struct Addresses {
    membership: OnceLock<Box<dyn Fn(NodeId) -> Seen + Send + Sync>>,
    told: BTreeMap<NodeId, String>,
    /// Members to be dialled where this node was told.
    use_told: Mutex<BTreeSet<NodeId>>,
}

impl Addresses {
    /// Besides what the membership says, members may be reached at `told`.
    pub fn new(told: BTreeMap<NodeId, String>) -> Self {
        Self { membership: OnceLock::new(), told, use_told: Mutex::default() }
    }

    /// From now on `membership` tells what the membership in effect says: the core keeps a connection to a member for
    /// as long as it leads, whatever becomes of the member's addresses. Only the first call counts.
    pub fn follow(&self, membership: impl Fn(NodeId) -> Seen + Send + Sync + 'static) {
        let _ = self.membership.set(Box::new(membership));
    }

    /// What the membership in effect says about `node_id`. Nothing before the core has started.
    pub fn seen(&self, node_id: NodeId) -> Seen {
        self.membership.get().map(|membership| membership(node_id)).unwrap_or_default()
    }

    /// Where to dial `node_id` next, which was reached as `member` says when the caller last looked.
    pub fn of(&self, node_id: NodeId, member: &Member) -> String {
        let use_told = self.use_told.lock().expect("invariant: no panic under this lock");
        match self.told.get(&node_id) {
            Some(told) if use_told.contains(&node_id) => told.clone(),
            _ => match self.seen(node_id).member {
                Some(now) if now.incarnation == member.incarnation => now.peer,
                _ => member.peer.clone(),
            },
        }
    }

    /// `node_id` did not answer at `address`, or somebody else did.
    pub fn failed(&self, node_id: NodeId, address: &str) {
        let Some(told) = self.told.get(&node_id) else { return };
        let mut use_told = self.use_told.lock().expect("invariant: no panic under this lock");
        match told == address {
            true => use_told.remove(&node_id),
            false => use_told.insert(node_id),
        };
    }
}

impl fmt::Debug for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Addresses").field("told", &self.told).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Incarnation;

    #[test]
    fn failures_alternate_and_success_stays() {
        let addresses = Addresses::new(BTreeMap::from([(2, "new:1".to_owned())]));
        let member = Member { peer: "old:1".to_owned(), client: String::new(), incarnation: Incarnation(1) };
        assert_eq!(addresses.of(2, &member), "old:1");
        addresses.failed(2, "old:1");
        // Several connections to one peer fail together.
        addresses.failed(2, "old:1");
        assert_eq!(addresses.of(2, &member), "new:1");
        assert_eq!(addresses.of(2, &member), "new:1");
        addresses.failed(2, "new:1");
        assert_eq!(addresses.of(2, &member), "old:1");
    }

    #[test]
    fn a_member_that_has_moved_is_dialled_where_it_went() {
        let member = |peer: &str, incarnation| Member {
            peer: peer.to_owned(),
            client: String::new(),
            incarnation: Incarnation(incarnation),
        };
        let addresses = Addresses::default();
        addresses
            .follow(move |node_id| Seen { at: None, member: (node_id == 2).then(|| member("moved:1", 1)) });
        assert_eq!(addresses.of(2, &member("old:1", 1)), "moved:1");
        assert_eq!(addresses.of(2, &member("old:1", 7)), "old:1", "another node under the same id");
        assert_eq!(addresses.of(3, &member("other:1", 1)), "other:1");
    }

    #[test]
    fn a_member_nothing_was_told_about_is_where_the_membership_says() {
        let addresses = Addresses::default();
        let member = Member { peer: "old:1".to_owned(), client: String::new(), incarnation: Incarnation(1) };
        addresses.failed(3, "old:1");
        assert_eq!(addresses.of(3, &member), "old:1");
    }
}
