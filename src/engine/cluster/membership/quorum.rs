//! Whether a change leaves a quorum that can go on.

use std::collections::{BTreeMap, BTreeSet};

use super::{CAUGHT_UP_ENTRIES, lag};
use crate::error::MembershipError;
use crate::raft::core::CoreMetrics;
use crate::types::NodeId;

/// What is asked of a majority of the voters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Strength {
    /// They answer.
    Answers,
    /// They answer, have caught up, and their disks are well.
    IsWell,
}

/// Whether a majority of the present voters and one of those `after` a change answer, and, if asked, one of the latter is
/// well. `in_touch` says of the other members whether their disks are.
pub(super) fn check_quorum(
    metrics: &CoreMetrics,
    in_touch: &BTreeMap<NodeId, bool>,
    after: &BTreeSet<NodeId>,
    asked: Strength,
) -> Result<(), MembershipError> {
    let answering = |set: &BTreeSet<NodeId>| set.intersection(&metrics.reachable).count();
    for set in metrics.membership.voters.iter().chain([after]) {
        let (voters, healthy, needed) = (set.len(), answering(set), set.len() / 2 + 1);
        if healthy < needed {
            return Err(MembershipError::WouldLoseQuorum { voters, healthy, needed });
        }
    }
    // The leader itself is not heard from: what it lacks it has handed over for.
    let is_well = |node_id: &NodeId| {
        in_touch.get(node_id) != Some(&false)
            && metrics.reachable.contains(node_id)
            && lag(metrics, *node_id) <= CAUGHT_UP_ENTRIES
    };
    let (voters, needed) = (after.len(), after.len() / 2 + 1);
    let healthy = after.iter().filter(|node_id| is_well(node_id)).count();
    match asked == Strength::Answers || healthy >= needed {
        true => Ok(()),
        false => Err(MembershipError::WouldWeakenQuorum { voters, healthy, needed }),
    }
}

#[cfg(test)]
mod tests {
    mod script;

    use super::*;
    use crate::types::{LogId, Membership, Role};

    /// Node 1 leads; those given answer, with their logs matching as given, of 5000 entries.
    fn leader(voters: &[&[NodeId]], answering: &[(NodeId, u64)]) -> CoreMetrics {
        let at = |index| Some(LogId::new(1, index));
        CoreMetrics {
            role: Role::Leader,
            term: 1,
            leader: None,
            in_touch: true,
            last_log: Some(4_999),
            committed: at(0),
            cluster_committed: at(0),
            snapshot: None,
            purged: None,
            membership: Membership {
                voters: voters.iter().map(|set| set.iter().copied().collect()).collect(),
                members: BTreeMap::new(),
            },
            membership_at: at(0),
            committed_membership: Membership::default(),
            committed_membership_at: at(0),
            reachable: answering.iter().map(|(id, _)| *id).collect(),
            matched: answering.iter().map(|(id, index)| (*id, at(*index))).collect(),
            fatal: None,
        }
    }

    #[test]
    fn a_majority_before_and_after_must_answer_and_be_well() {
        let well = BTreeMap::from([(2, true), (3, true)]);
        let check = |metrics: &CoreMetrics, in_touch: &BTreeMap<NodeId, bool>, after: &[NodeId]| {
            check_quorum(metrics, in_touch, &after.iter().copied().collect(), Strength::IsWell)
        };
        let lost =
            |voters, healthy, needed| Err(MembershipError::WouldLoseQuorum { voters, healthy, needed });
        let weak =
            |voters, healthy, needed| Err(MembershipError::WouldWeakenQuorum { voters, healthy, needed });
        let all = leader(&[&[1, 2, 3]], &[(1, 4_999), (2, 4_999), (3, 4_500)]);
        assert_eq!(check(&all, &well, &[1, 3]), Ok(()));
        // Node 3 is silent: node 2 may not go, node 3 may.
        let two = leader(&[&[1, 2, 3]], &[(1, 4_999), (2, 4_999)]);
        assert_eq!(check(&two, &well, &[1, 3]), lost(2, 1, 2));
        assert_eq!(check(&two, &well, &[1, 2]), Ok(()));
        // The voters that go must agree as well.
        let one = leader(&[&[1, 2, 3]], &[(1, 4_999)]);
        assert_eq!(check(&one, &well, &[1]), lost(3, 1, 2));
        // Node 3 answers, and is far behind or has no room.
        let behind = leader(&[&[1, 2, 3]], &[(1, 4_999), (2, 4_999), (3, 10)]);
        assert_eq!(check(&behind, &well, &[1, 3]), weak(2, 1, 2));
        let full = BTreeMap::from([(2, true), (3, false)]);
        assert_eq!(check(&all, &full, &[1, 3]), weak(2, 1, 2));
        let after = [1, 3].into();
        assert_eq!(check_quorum(&all, &full, &after, Strength::Answers), Ok(()));
    }
}
