//! Whom a node talks to, and what it tells the others.
//!
//! Both sides of a handshake name themselves and each other. A caller is *known* if it is a member in the data directory that
//! the membership says, or if it knows the callee's own directory: nobody outside the cluster is ever told one. Everybody
//! else is a *stranger*. Strangers are all told the same, [`Refusal::Stranger`]: neither the cluster's name, nor who its
//! members are, nor whether an incarnation was right. The callee's own log says what was wrong. A node that belongs to no
//! cluster yet has nothing to hide but its cluster's name, so callers that know the name are told what is wrong.
//!
//! What is refused for good (the caller was removed, or replaced) makes the caller stop, so it is said only to callers that
//! know this node's data directory. Whoever wanted another directory is told just that: it may have come by a stale address,
//! from another cluster of the same name.
//!
//! What callers expect also suggests that a node has lost its disk ([`Claim`]). A claim proves nothing, and stops nothing: it
//! makes the node ask the claimant, which then has to answer from a committed membership (`engine/cluster/expulsion.rs`). That is
//! asked only while the node belongs to no cluster: a founder that was wiped after its cluster had grown would otherwise
//! found a second one under the same name, id and address. A member does not care for claims, not even where it is the
//! only one: whoever makes one may have made up all that it stands on, and the log says that it was made.
//!
//! A node may ask for itself at an address, to learn whether that leads to it.
//!
//! The protocol, with a figure: `docs/design/identity.md`.

use std::collections::BTreeMap;

use super::plausible;
use super::wire::{self, Malformed};
use super::{Hello, PROTOCOL_VERSION, Refusal};
use crate::types::{Incarnation, LogId, NodeId};

/// Who answers.
#[derive(Debug, Clone, Copy)]
pub(super) struct OwnSide<'a> {
    pub(super) cluster: &'a str,
    pub(super) node_id: NodeId,
    pub(super) incarnation: Incarnation,
}

/// What the answering node knows of its cluster.
#[derive(Debug, Clone, Default)]
pub(super) struct KnownCluster {
    /// The members in effect; none while it belongs to no cluster.
    pub(super) members: BTreeMap<NodeId, Incarnation>,
    /// Where they stand in the log.
    pub(super) at: Option<LogId>,
    /// What the newest committed membership says of the caller, and where that stands: what is not committed may be
    /// taken back, and the caller acts on what it is told.
    pub(super) committed_caller: Option<Incarnation>,
    pub(super) committed_at: Option<LogId>,
}

/// What a caller wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// To exchange messages. It must know whom with.
    Exchange,
    /// To know who this node is.
    Identity,
    /// The same, to form a cluster with it.
    Founding,
}

/// A caller says that this node's data directory should be another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Who says so.
    pub node_id: NodeId,
    /// The claimant's data directory.
    pub incarnation: Incarnation,
    /// Where it says that it is reached. Empty when it does not.
    pub peer: String,
    /// The data directory that it expected.
    pub expected: Incarnation,
}

/// Why a caller is not admitted.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CallerRefused {
    /// What it is told.
    pub(super) told: Refusal,
    /// What this node's log says.
    pub(super) why: Refusal,
    /// What the caller claims, if this node has to look into it.
    pub(super) claim: Option<Claim>,
}

impl From<Refusal> for Box<CallerRefused> {
    fn from(refusal: Refusal) -> Self {
        Self::new(CallerRefused { told: refusal.clone(), why: refusal, claim: None })
    }
}

/// A refusal whose reason is none of the caller's business.
fn stranger(why: Refusal) -> Box<CallerRefused> {
    Box::new(CallerRefused { told: Refusal::Stranger, why, claim: None })
}

/// Who calls, if that can be somebody at all.
fn identity(own: OwnSide<'_>, hello: &Hello, wish: Wish) -> Result<(NodeId, Incarnation), Malformed> {
    let from = wire::incarnation(&hello.from_incarnation)?;
    let expects_this = wire::incarnation(&hello.to_incarnation) == Ok(own.incarnation);
    let is_this = wish == Wish::Identity && from == own.incarnation && expects_this;
    if from == Incarnation::default() {
        return Err(Malformed("the caller's incarnation is zero"));
    }
    match hello.from_node {
        0 => Err(Malformed("the caller's node id is zero")),
        node_id if node_id == own.node_id && !is_this => {
            Err(Malformed("the caller claims this node's own id"))
        }
        node_id => Ok((node_id, from)),
    }
}

/// The beginning of a text that somebody sent, for logs and messages.
pub(super) fn shortened(text: &str) -> String {
    const CHARACTERS: usize = 128;
    text.chars().take(CHARACTERS).collect()
}

/// Whether to talk to a caller.
pub(super) fn check(
    own: OwnSide<'_>,
    known: &KnownCluster,
    hello: &Hello,
    wish: Wish,
) -> Result<(), Box<CallerRefused>> {
    if hello.cluster != own.cluster {
        let (ours, theirs) = (own.cluster.to_owned(), shortened(&hello.cluster));
        return Err(stranger(Refusal::OtherCluster { ours, theirs }));
    }
    let malformed = |error: Malformed| stranger(Refusal::Malformed(error.to_string()));
    let (node_id, from) = identity(own, hello, wish).map_err(malformed)?;
    let expected = match hello.to_incarnation.is_empty() {
        true => None,
        false => Some(wire::incarnation(&hello.to_incarnation).map_err(malformed)?),
    };
    let theirs = hello.membership.map(|at| LogId::new(at.term, at.index));
    if theirs.is_some_and(|at| plausible::position(at).is_err()) {
        return Err(malformed(Malformed("no membership stands there")));
    }
    let knows_this = expected == Some(own.incarnation);
    let is_member = known.members.get(&node_id) == Some(&from);
    // What is told to the caller of what is found wrong.
    let refuse = |why: Refusal| match is_member || knows_this || known.members.is_empty() {
        true => why.into(),
        false => stranger(why),
    };
    if hello.protocol_version != PROTOCOL_VERSION {
        let (ours, theirs) = (PROTOCOL_VERSION, hello.protocol_version);
        return Err(refuse(Refusal::ProtocolVersion { ours, theirs }));
    }
    if hello.to_node != own.node_id {
        return Err(refuse(Refusal::OtherNode { ours: own.node_id, wanted: hello.to_node }));
    }
    let is_ahead = theirs > known.at;
    if let Some(expected) = expected
        && expected != own.incarnation
    {
        let peer = shortened(&hello.from_peer);
        let claim = known.members.is_empty().then_some(Claim { node_id, incarnation: from, peer, expected });
        return Err(Box::new(CallerRefused { claim, ..*refuse(Refusal::CalleeFenced) }));
    }
    if wish == Wish::Exchange && !knows_this {
        return Err(refuse(Refusal::Malformed("the caller does not say whom it expects".to_owned())));
    }
    // A caller whose membership is newer may have been added, or replaced, by what this node has not heard yet.
    if is_member || known.members.is_empty() || (is_ahead && knows_this) {
        return Ok(());
    }
    let at = (known.committed_caller != Some(from)).then_some(known.committed_at).flatten();
    let at = at.map(|at| at.index);
    Err(match known.members.get(&node_id) {
        Some(known) => refuse(Refusal::CallerFenced { node_id, known: *known, at }),
        // A founder with the wrong peers: it may know that it has no place here, and no more.
        None if wish == Wish::Founding && !knows_this => {
            let why = Refusal::UnknownPeer { node_id, at };
            Box::new(CallerRefused { told: Refusal::UnknownPeer { node_id, at: None }, why, claim: None })
        }
        None => refuse(Refusal::UnknownPeer { node_id, at }),
    })
}

#[cfg(test)]
mod tests {
    mod script;

    use super::*;

    const OWN: OwnSide<'static> = OwnSide { cluster: "c", node_id: 1, incarnation: Incarnation(10) };
    const WISHES: [Wish; 3] = [Wish::Exchange, Wish::Identity, Wish::Founding];

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
            from_peer: "two:1".to_owned(),
        }
    }

    /// Members and their incarnations, as of entry 5, committed.
    fn known(members: &[(NodeId, u128)]) -> KnownCluster {
        let members: BTreeMap<_, _> = members.iter().map(|(id, inc)| (*id, Incarnation(*inc))).collect();
        let at = (!members.is_empty()).then_some(LogId::new(1, 5));
        KnownCluster { committed_caller: members.get(&2).copied(), members, at, committed_at: at }
    }

    fn refused(known: &KnownCluster, hello: &Hello) -> Box<CallerRefused> {
        check(OWN, known, hello, Wish::Identity).unwrap_err()
    }

    const NEWER: Option<LogId> = Some(LogId::new(2, 9));
    const OLDER: Option<LogId> = Some(LogId::new(1, 3));

    #[test]
    fn members_are_admitted_and_others_refused_for_certain_if_they_know_this_node() {
        let ours = known(&[(1, 10), (2, 20)]);
        for wish in WISHES {
            assert_eq!(check(OWN, &ours, &hello(20, Some(10), OLDER), wish), Ok(()));
        }
        assert_eq!(check(OWN, &ours, &hello(20, None, OLDER), Wish::Identity), Ok(()));
        assert!(check(OWN, &ours, &hello(20, None, OLDER), Wish::Exchange).is_err(), "whom with?");
        let fenced = Refusal::CallerFenced { node_id: 2, known: Incarnation(20), at: Some(5) };
        assert_eq!(refused(&ours, &hello(21, Some(10), OLDER)), fenced.into());
        let without = known(&[(1, 10), (3, 30)]);
        let unknown = Refusal::UnknownPeer { node_id: 2, at: Some(5) };
        assert_eq!(refused(&without, &hello(20, Some(10), OLDER)), unknown.into());
    }

    #[test]
    fn who_knows_more_is_admitted_if_it_knows_this_node() {
        let ours = known(&[(1, 10), (3, 30)]);
        for wish in WISHES {
            assert_eq!(check(OWN, &ours, &hello(20, Some(10), NEWER), wish), Ok(()));
        }
        assert_eq!(refused(&ours, &hello(20, None, NEWER)).told, Refusal::Stranger);
    }

    /// Whatever is wrong with it: the cluster's name, an incarnation, or all at once.
    #[test]
    fn strangers_are_all_told_the_same() {
        let plain = || hello(21, None, NEWER);
        let strangers = [
            Hello { cluster: "d".to_owned(), ..hello(20, Some(10), NEWER) },
            Hello { cluster: String::new(), ..plain() },
            Hello { from_incarnation: Incarnation(0).to_string(), ..hello(0, Some(10), NEWER) },
            Hello { from_incarnation: "0".to_owned(), ..plain() },
            Hello { from_incarnation: "none".to_owned(), ..plain() },
            Hello { to_incarnation: "none".to_owned(), ..hello(20, None, NEWER) },
            Hello { from_node: 0, ..hello(20, Some(10), NEWER) },
            // Who came by its incarnation, and does not say so.
            Hello { from_node: 1, ..hello(10, None, NEWER) },
            Hello { from_node: 1, ..hello(20, Some(10), NEWER) },
            Hello { from_node: 9, ..plain() },
            Hello { to_node: 3, ..plain() },
            Hello { protocol_version: 0, ..plain() },
            Hello { membership: Some(wire::plain_log_id(LogId::new(1, u64::MAX))), ..plain() },
            hello(21, Some(77), NEWER),
            plain(),
        ];
        for (number, stranger) in strangers.iter().enumerate() {
            let ours = known(&[(1, 10), (2, 20), (3, 30)]);
            let refused = refused(&ours, stranger);
            assert_eq!((refused.told, refused.claim), (Refusal::Stranger, None), "stranger {number}");
            assert!(check(OWN, &ours, stranger, Wish::Exchange).is_err(), "stranger {number}");
        }
        let text = Refusal::Stranger.to_string();
        assert!(!text.contains("\"c\"") && !text.contains(&Incarnation(10).to_string()), "{text}");
    }

    #[test]
    fn a_founder_with_the_wrong_peers_learns_that_it_has_no_place_and_no_more() {
        let ours = known(&[(1, 10), (3, 30)]);
        let refused = check(OWN, &ours, &hello(20, None, None), Wish::Founding).unwrap_err();
        assert_eq!(refused.told, Refusal::UnknownPeer { node_id: 2, at: None });
    }

    #[test]
    fn a_caller_that_came_by_a_stale_address_is_told_nothing_final() {
        // Its own cluster has the same name and the same ids.
        let ours = known(&[(1, 10), (2, 20)]);
        for membership in [OLDER, NEWER] {
            let refused = refused(&ours, &hello(99, Some(77), membership));
            assert_eq!((refused.told, refused.claim), (Refusal::Stranger, None));
        }
    }

    #[test]
    fn a_node_may_ask_for_itself_and_exchanges_nothing_with_itself() {
        let own = Hello { from_node: 1, ..hello(10, Some(10), OLDER) };
        for ours in [known(&[]), known(&[(1, 10), (2, 20)])] {
            assert_eq!(check(OWN, &ours, &own, Wish::Identity), Ok(()));
            for wish in [Wish::Exchange, Wish::Founding] {
                assert_eq!(check(OWN, &ours, &own, wish).unwrap_err().told, Refusal::Stranger);
            }
        }
    }

    #[test]
    fn what_is_expected_of_a_wiped_founder_is_a_claim_only_before_it_has_founded_again() {
        let claim = Claim {
            node_id: 2,
            incarnation: Incarnation(20),
            peer: "two:1".to_owned(),
            expected: Incarnation(77),
        };
        assert_eq!(refused(&known(&[]), &hello(20, Some(77), NEWER)).claim, Some(claim));
        for ours in [known(&[(1, 10)]), known(&[(1, 10), (3, 30)])] {
            assert_eq!(refused(&ours, &hello(20, Some(77), NEWER)).claim, None);
        }
    }

    #[test]
    fn before_there_is_a_cluster_callers_that_know_its_name_are_told_what_is_wrong() {
        let plain = || hello(20, None, None);
        assert_eq!(check(OWN, &known(&[]), &plain(), Wish::Identity), Ok(()));
        let told = |hello: &Hello| refused(&known(&[]), hello).told;
        assert_eq!(told(&Hello { cluster: "d".to_owned(), ..plain() }), Refusal::Stranger);
        let other = Hello { to_node: 3, ..plain() };
        assert_eq!(told(&other), Refusal::OtherNode { ours: 1, wanted: 3 });
        let other = Hello { protocol_version: 0, ..plain() };
        assert!(matches!(told(&other), Refusal::ProtocolVersion { .. }));
    }
}
