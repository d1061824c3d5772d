//! Whom a node talks to.
//!
//! Both sides of a handshake name themselves and each other. What is refused for good (the caller was removed, or
//! replaced) makes the caller stop, so it is said only to callers that have shown to be of this cluster, by knowing this
//! node's data directory. Whoever wanted another directory is told just that: it may have come by a stale address, from
//! another cluster of the same name.
//!
//! What callers expect also tells a node that it has lost its disk. It believes them while it belongs to no cluster, and
//! when it is the only member of one while theirs has gone further: a founder that was wiped after its cluster had grown
//! would otherwise lead a second cluster under the same name, id and address. A member among others is not stopped
//! by strangers.

use std::collections::BTreeMap;

use super::wire::{self, Malformed};
use super::{Hello, PROTOCOL_VERSION, Refusal};
use crate::types::{Incarnation, LogId, NodeId};

/// Who answers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Own<'a> {
    pub(super) cluster: &'a str,
    pub(super) node_id: NodeId,
    pub(super) incarnation: Incarnation,
}

/// What the answering node knows of its cluster.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    /// The members in effect; none while it belongs to no cluster.
    pub(super) members: BTreeMap<NodeId, Incarnation>,
    /// Where they stand in the log.
    pub(super) at: Option<LogId>,
    /// What the newest committed membership says of the caller, and where that stands: what is not committed may be
    /// taken back, and the caller acts on what it is told.
    pub(super) committed_caller: Option<Incarnation>,
    pub(super) committed_at: Option<LogId>,
}

/// Why a caller is not admitted.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused {
    /// What it is told.
    pub(super) refusal: Refusal,
    /// The data directory this node had before it lost its disk, if the call shows that it did.
    pub(super) lost: Option<Incarnation>,
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, lost: None }
    }
}

impl From<Malformed> for Refused {
    fn from(error: Malformed) -> Self {
        Refusal::Malformed(error.to_string()).into()
    }
}

/// Whether versions, clusters and node ids agree, before anything else is looked at.
pub(super) fn check_address(own: Own<'_>, hello: &Hello) -> Result<(), Refusal> {
    if hello.protocol_version != PROTOCOL_VERSION {
        return Err(Refusal::ProtocolVersion { ours: PROTOCOL_VERSION, theirs: hello.protocol_version });
    }
    if hello.cluster != own.cluster {
        return Err(Refusal::OtherCluster { ours: own.cluster.to_owned(), theirs: hello.cluster.clone() });
    }
    match hello.to_node == own.node_id {
        true => Ok(()),
        false => Err(Refusal::OtherNode { ours: own.node_id, wanted: hello.to_node }),
    }
}

/// Whether the two know each other.
pub(super) fn check_identities(own: Own<'_>, known: &Known, hello: &Hello) -> Result<(), Refused> {
    let from = wire::incarnation(&hello.from_incarnation)?;
    let theirs = hello.membership.map(|at| LogId::new(at.term, at.index));
    let is_ahead = theirs > known.at;
    let expects_this = !hello.to_incarnation.is_empty();
    if expects_this {
        let expected = wire::incarnation(&hello.to_incarnation)?;
        if expected != own.incarnation {
            let alone = known.members.keys().all(|member| *member == own.node_id);
            let lost = known.members.is_empty() || (alone && is_ahead);
            return Err(Refused {
                refusal: Refusal::CalleeFenced { ours: own.incarnation },
                lost: lost.then_some(expected),
            });
        }
    }
    // A caller whose membership is newer may have been added, or replaced, by what this node has not heard yet.
    if is_ahead && expects_this {
        return Ok(());
    }
    let node_id = hello.from_node;
    let at = (known.committed_caller != Some(from)).then_some(known.committed_at).flatten();
    let at = at.map(|at| at.index);
    match known.members.get(&node_id) {
        Some(known) if *known != from => Err(Refusal::CallerFenced { node_id, known: *known, at }.into()),
        None if !known.members.is_empty() => Err(Refusal::UnknownPeer { node_id, at }.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Own<'static> = Own { cluster: "c", node_id: 1, incarnation: Incarnation(10) };

    /// Node 2 calls node 1, of which it expects `to`.
    fn hello(from: u128, to: Option<u128>, membership: Option<LogId>) -> Hello {
        Hello {
            protocol_version: PROTOCOL_VERSION,
            cluster: "c".to_owned(),
            from_node: 2,
            from_incarnation: Incarnation(from).to_string(),
            to_node: 1,
            to_incarnation: to.map(|to| Incarnation(to).to_string()).unwrap_or_default(),
            membership: membership.map(wire::plain_log_id),
        }
    }

    /// Members and their incarnations, as of entry 5, committed.
    fn known(members: &[(NodeId, u128)]) -> Known {
        let members: BTreeMap<_, _> = members.iter().map(|(id, inc)| (*id, Incarnation(*inc))).collect();
        let at = (!members.is_empty()).then_some(LogId::new(1, 5));
        Known { committed_caller: members.get(&2).copied(), members, at, committed_at: at }
    }

    fn refused(known: &Known, hello: &Hello) -> Refused {
        check_identities(OWN, known, hello).unwrap_err()
    }

    const NEWER: Option<LogId> = Some(LogId::new(2, 9));
    const OLDER: Option<LogId> = Some(LogId::new(1, 3));
    const CALLEE_FENCED: Refusal = Refusal::CalleeFenced { ours: Incarnation(10) };

    #[test]
    fn members_are_admitted_and_others_refused_for_certain() {
        let ours = known(&[(1, 10), (2, 20)]);
        for to in [Some(10), None] {
            assert_eq!(check_identities(OWN, &ours, &hello(20, to, OLDER)), Ok(()));
            let fenced = Refusal::CallerFenced { node_id: 2, known: Incarnation(20), at: Some(5) };
            assert_eq!(refused(&ours, &hello(21, to, OLDER)), fenced.into());
            let without = known(&[(1, 10), (3, 30)]);
            let unknown = Refusal::UnknownPeer { node_id: 2, at: Some(5) };
            assert_eq!(refused(&without, &hello(20, to, OLDER)), unknown.into());
        }
    }

    #[test]
    fn who_knows_more_is_admitted_if_it_knows_this_node() {
        let ours = known(&[(1, 10), (3, 30)]);
        assert_eq!(check_identities(OWN, &ours, &hello(20, Some(10), NEWER)), Ok(()));
        assert!(matches!(refused(&ours, &hello(20, None, NEWER)).refusal, Refusal::UnknownPeer { .. }));
    }

    #[test]
    fn a_caller_that_came_by_a_stale_address_is_told_nothing_final() {
        // Its own cluster has the same name and the same ids.
        let ours = known(&[(1, 10), (2, 20)]);
        for membership in [OLDER, NEWER] {
            let expected = Refused { refusal: CALLEE_FENCED, lost: None };
            assert_eq!(refused(&ours, &hello(99, Some(77), membership)), expected);
        }
    }

    #[test]
    fn a_wiped_founder_learns_of_its_loss_before_and_after_it_has_founded_again() {
        let lost = Refused { refusal: CALLEE_FENCED, lost: Some(Incarnation(77)) };
        assert_eq!(refused(&known(&[]), &hello(20, Some(77), NEWER)), lost);
        assert_eq!(refused(&known(&[(1, 10)]), &hello(20, Some(77), NEWER)), lost);
        // What it was before is no news to a cluster that has gone on since.
        assert_eq!(refused(&known(&[(1, 10)]), &hello(20, Some(77), OLDER)).lost, None);
    }

    #[test]
    fn versions_clusters_and_ids_come_first() {
        let plain = || hello(20, None, None);
        assert_eq!(check_address(OWN, &plain()), Ok(()));
        let other = Hello { cluster: "d".to_owned(), ..plain() };
        assert!(matches!(check_address(OWN, &other), Err(Refusal::OtherCluster { .. })));
        let other = Hello { to_node: 3, ..plain() };
        assert!(matches!(check_address(OWN, &other), Err(Refusal::OtherNode { ours: 1, wanted: 3 })));
        let other = Hello { protocol_version: 0, ..plain() };
        assert!(matches!(check_address(OWN, &other), Err(Refusal::ProtocolVersion { .. })));
    }
}
