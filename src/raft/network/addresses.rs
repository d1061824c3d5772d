//! Where members are dialled: where the membership says they are, or where this node was told when it started.
//!
//! The two differ while members move. When all of them were restarted at new addresses, nobody can be reached where
//! the membership says, so nobody could commit a membership that says better; the addresses each was told are the
//! way out. A dial that fails makes the other address the next to be tried, one that succeeds is tried again.
//! Whoever answers is asked for its identity, so a stale address costs time and no more, and only until the member has
//! been reached where the membership says: from then on what this node was told is forgotten.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, OnceLock};

use crate::types::{LogId, Member, NodeId};

/// What the membership in effect says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SeenMember {
    /// Where it stands in the log.
    pub at: Option<LogId>,
    /// What it says about the member asked for.
    pub member: Option<Member>,
}

/// What this node was told about its peers' addresses, and which of them to use.
#[derive(Default)]
pub(crate) struct Addresses {
    membership: OnceLock<Box<dyn Fn(NodeId) -> SeenMember + Send + Sync>>,
    told: Mutex<BTreeMap<NodeId, ToldAddress>>,
}

/// What this node was told about one member.
#[derive(Debug)]
struct ToldAddress {
    address: String,
    /// The member is to be dialled here.
    is_next: bool,
}

impl Addresses {
    /// Besides what the membership says, members may be reached at `told`.
    pub(crate) fn new(told: BTreeMap<NodeId, String>) -> Self {
        let told =
            told.into_iter().map(|(node_id, address)| (node_id, ToldAddress { address, is_next: false }));
        Self { membership: OnceLock::new(), told: Mutex::new(told.collect()) }
    }

    /// From now on `membership` tells what the membership in effect says: the core keeps a connection to a member for
    /// as long as it leads, whatever becomes of the member's addresses. Only the first call counts.
    pub(crate) fn follow(&self, membership: impl Fn(NodeId) -> SeenMember + Send + Sync + 'static) {
        let _ = self.membership.set(Box::new(membership));
    }

    /// What the membership in effect says about `node_id`. Nothing before the core has started.
    pub(crate) fn seen(&self, node_id: NodeId) -> SeenMember {
        self.membership.get().map(|membership| membership(node_id)).unwrap_or_default()
    }

    /// Where to dial `node_id` next, which was reached as `member` says when the caller last looked.
    pub(crate) fn of(&self, node_id: NodeId, member: &Member) -> String {
        let told = self.told().get(&node_id).filter(|told| told.is_next).map(|told| told.address.clone());
        told.unwrap_or_else(|| self.known(node_id, member))
    }

    /// `node_id` did not answer at `address`, or somebody else did.
    pub(crate) fn failed(&self, node_id: NodeId, address: &str) {
        if let Some(told) = self.told().get_mut(&node_id) {
            told.is_next = told.address != address;
        }
    }

    /// `node_id`, known as `member`, answered at `address` and is who it should be.
    pub(crate) fn reached(&self, node_id: NodeId, member: &Member, address: &str) {
        if self.known(node_id, member) == address {
            self.told().remove(&node_id);
        }
    }

    /// Where the membership says that `node_id` is.
    fn known(&self, node_id: NodeId, member: &Member) -> String {
        match self.seen(node_id).member {
            Some(now) if now.incarnation == member.incarnation => now.peer,
            _ => member.peer.clone(),
        }
    }

    fn told(&self) -> MutexGuard<'_, BTreeMap<NodeId, ToldAddress>> {
        self.told.lock().expect("invariant: no panic under this lock")
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
        let member = Member {
            peer: "old:1".to_owned(),
            client: String::new(),
            incarnation: Incarnation(1),
            ..Member::default()
        };
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
            ..Member::default()
        };
        let addresses = Addresses::default();
        addresses.follow(move |node_id| SeenMember {
            at: None,
            member: (node_id == 2).then(|| member("moved:1", 1)),
        });
        assert_eq!(addresses.of(2, &member("old:1", 1)), "moved:1");
        assert_eq!(addresses.of(2, &member("old:1", 7)), "old:1", "another node under the same id");
        assert_eq!(addresses.of(3, &member("other:1", 1)), "other:1");
    }

    #[test]
    fn what_was_told_is_forgotten_once_the_membership_is_right() {
        let addresses = Addresses::new(BTreeMap::from([(2, "told:1".to_owned())]));
        let member = Member {
            peer: "known:1".to_owned(),
            client: String::new(),
            incarnation: Incarnation(1),
            ..Member::default()
        };
        addresses.failed(2, "known:1");
        addresses.reached(2, &member, "told:1");
        assert_eq!(addresses.of(2, &member), "told:1", "the membership is not right yet");
        addresses.failed(2, "told:1");
        addresses.reached(2, &member, "known:1");
        addresses.failed(2, "known:1");
        assert_eq!(addresses.of(2, &member), "known:1");
    }

    #[test]
    fn a_member_nothing_was_told_about_is_where_the_membership_says() {
        let addresses = Addresses::default();
        let member = Member {
            peer: "old:1".to_owned(),
            client: String::new(),
            incarnation: Incarnation(1),
            ..Member::default()
        };
        addresses.failed(3, "old:1");
        assert_eq!(addresses.of(3, &member), "old:1");
    }
}
