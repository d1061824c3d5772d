//! Why another node leads: one line in the log of every node that learns of it.
//!
//! openraft does not say. It is told from the votes that this node saves, in their order, and from what leaders have
//! announced: somebody was asked to stand, this node gave its vote, or it only heard of a newer term.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;

use crate::types::{NodeId, Vote};

/// Candidates of one hand-over that are remembered.
const CANDIDATES: usize = 64;

/// Why a node leads, as far as another one can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Succession {
    /// No leader was known since this node started.
    Start,
    /// The leader before it was not heard of for an election timeout.
    Timeout,
    /// The leader before it handed over.
    Transfer,
    /// It prefers to lead, and the leader before it handed over for that reason.
    Preference,
    /// This node took no part in the election, and heard of a newer term.
    HigherTerm,
}

impl fmt::Display for Succession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start: this node had not known a leader since it was started",
            Self::Timeout => "timeout: the leader before it was not heard of in time",
            Self::Transfer => "transfer: the leader before it handed over",
            Self::Preference => "preference: it prefers to lead, and the leader before it handed over",
            Self::HigherTerm => "higher term: it was elected without this node's vote",
        })
    }
}

/// A leader, in its term.
type Led = (u64, NodeId);

#[derive(Debug, Default)]
struct KnownLeads {
    leader: Option<Led>,
    /// Why that leads.
    why: Option<Succession>,
    /// For whom this node has voted last, itself included.
    voted: Option<Led>,
    /// The term whose leader hands over, and to whom.
    offered: (u64, BTreeMap<NodeId, Succession>),
}

/// What this node knows of leaders and their hand-overs.
#[derive(Debug, Default)]
pub(super) struct Successions(Mutex<KnownLeads>);

impl Successions {
    fn known(&self) -> std::sync::MutexGuard<'_, KnownLeads> {
        self.0.lock().expect("invariant: no panic under this lock")
    }

    /// The leader of `term` asks `to` to stand.
    pub(super) fn offered(&self, term: u64, to: NodeId, why: Succession) {
        let mut known = self.known();
        if known.offered.0 != term {
            known.offered = (term, BTreeMap::new());
        }
        if known.offered.1.len() < CANDIDATES {
            known.offered.1.insert(to, why);
        }
    }

    /// Why the leader of `term` has asked `to` to stand, if it has.
    pub(super) fn offer(&self, term: u64, to: NodeId) -> Option<Succession> {
        let known = self.known();
        known.offered.1.get(&to).filter(|_| known.offered.0 == term).copied()
    }

    /// This node has come back, and had saved `vote` before. Whoever led then is the one that others come after.
    pub(super) fn returns(&self, vote: Vote) -> Option<NodeId> {
        let leader = vote.committed.then_some((vote.term, vote.node_id));
        self.known().leader = leader;
        leader.map(|(_, node_id)| node_id)
    }

    /// This node saves `vote`. If that makes another leader, says which led before, and why another one does.
    pub(super) fn voted(&self, vote: Vote) -> Option<(Option<NodeId>, Succession)> {
        let new = (vote.term, vote.node_id);
        if !vote.committed {
            self.known().voted = Some(new);
            return None;
        }
        let offer = vote.term.checked_sub(1).and_then(|before| self.offer(before, vote.node_id));
        let mut known = self.known();
        if known.leader == Some(new) {
            return None;
        }
        let before = known.leader.replace(new).map(|(_, node_id)| node_id);
        let why = match (offer, before) {
            (Some(why), _) => why,
            (None, None) => Succession::Start,
            (None, Some(_)) if known.voted == Some(new) => Succession::Timeout,
            (None, Some(_)) => Succession::HigherTerm,
        };
        known.why = Some(why);
        Some((before, why))
    }

    /// Why `node_id` leads in `term`, if it is the last leader that this node has heard of.
    pub(super) fn why(&self, term: u64, node_id: NodeId) -> Option<Succession> {
        let known = self.known();
        known.why.filter(|_| known.leader == Some((term, node_id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_of_leader_has_its_reason_once() {
        let successions = Successions::default();
        let vote = |term, node_id, committed| successions.voted(Vote { term, node_id, committed });
        assert_eq!(vote(1, 1, false), None);
        assert_eq!(vote(1, 1, true), Some((None, Succession::Start)));
        assert_eq!(vote(1, 1, true), None, "told before");
        assert_eq!(successions.why(1, 1), Some(Succession::Start), "and still known");
        assert_eq!(vote(2, 2, false), None);
        assert_eq!(vote(2, 2, true), Some((Some(1), Succession::Timeout)));
        assert_eq!(vote(4, 3, true), Some((Some(2), Succession::HigherTerm)));
        assert_eq!(successions.why(4, 3), Some(Succession::HigherTerm));
        assert_eq!((successions.why(4, 2), successions.why(2, 2)), (None, None), "no more");
        successions.offered(4, 1, Succession::Transfer);
        assert_eq!(vote(5, 1, true), Some((Some(3), Succession::Transfer)));
        successions.offered(5, 2, Succession::Preference);
        assert_eq!(vote(6, 2, true), Some((Some(1), Succession::Preference)));
        successions.offered(6, 3, Succession::Transfer);
        assert_eq!(vote(9, 3, true), Some((Some(2), Succession::HigherTerm)), "that offer came to nothing");
        let returned = Successions::default();
        assert_eq!(returned.returns(Vote { term: 9, node_id: 3, committed: true }), Some(3));
        let vote_after = |term, node_id, committed| returned.voted(Vote { term, node_id, committed });
        assert_eq!(vote_after(9, 3, true), None, "it leads still");
        assert_eq!(vote_after(10, 1, false), None);
        assert_eq!(vote_after(10, 1, true), Some((Some(3), Succession::Timeout)));
        // An election that the same leader wins again.
        assert_eq!(vote(10, 3, false), None);
        assert_eq!(vote(10, 3, true), Some((Some(3), Succession::Timeout)));
    }
}
