//! Changes of the membership, in our own types.
//!
//! A change of the voters goes through a joint membership, in which decisions need majorities of the old and of the
//! new voters (Raft, §6). openraft writes both entries; a leader that is lost between them leaves a joint membership
//! behind, which [`MembershipChange::Settle`] ends.
//!
//! A member is identified by its id *and* its incarnation. A node with another data directory never takes over the
//! place of one under the same id: the old one is removed first, by an entry of its own, and the new one added by a
//! later one. Otherwise openraft would go on with what it knows of the old one's log, and the new one would count as
//! a voter that has promised what the old one has.
//!
//! What a change of several entries means to make of a member is written into the first of them, as an
//! [`Intent`]: whoever goes on with it, another leader or the same caller again, finds it there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::type_config::alias::CommittedLeaderIdOf;

use super::core::Core;
use super::type_config::{self, TypeConfig, leader};
use crate::error::Leader;
use crate::machine::StateMachine;
use crate::types::{Intent, LogId, Member, Membership, NodeId};

/// One step from a membership to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MembershipChange {
    /// Adds a member that does not vote. No effect on one that is there.
    AddLearner {
        /// Its id, which no member has.
        node_id: NodeId,
        /// Where it is reached, and its identity.
        member: Member,
        /// What it is to be, if it takes another one's place.
        intent: Option<Intent>,
    },
    /// Makes a learner a voter.
    Promote(NodeId),
    /// Makes a voter a learner.
    Demote(NodeId),
    /// Removes a voter or a learner.
    Remove {
        /// Which.
        node_id: NodeId,
        /// What is to come in its place under the same id, if anything is.
        intent: Option<Intent>,
    },
    /// Makes the learner `new` a voter and removes the voter `old`, both at once.
    Swap {
        /// Who goes.
        old: NodeId,
        /// Who comes.
        new: NodeId,
    },
    /// Corrects the addresses of a member.
    Readdress {
        /// Whose.
        node_id: NodeId,
        /// With the incarnation it had.
        member: Member,
    },
    /// Ends a change that somebody has begun. Voters that it removes are no members any more, unless it is noted that they
    /// are to stay as learners.
    Settle,
}

impl fmt::Display for MembershipChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddLearner { node_id, member, .. } => {
                write!(f, "add node {node_id} at {} as a learner", member.peer)
            }
            Self::Promote(node_id) => write!(f, "make node {node_id} a voter"),
            Self::Demote(node_id) => write!(f, "make node {node_id} a learner"),
            Self::Remove { node_id, .. } => write!(f, "remove node {node_id}"),
            Self::Swap { old, new } => write!(f, "node {new} votes in the place of node {old}"),
            Self::Readdress { node_id, member } => {
                write!(f, "node {node_id} is reached at {} and {}", member.peer, member.client)
            }
            Self::Settle => f.write_str("end the change that has begun"),
        }
    }
}

/// Why a change was not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ChangeError {
    /// This node does not lead; nothing was proposed.
    NotLeader(Option<Leader>),
    /// An earlier change is not committed yet; nothing was proposed.
    UnderWay,
    /// The change makes no sense for the present membership; nothing was proposed.
    Invalid(String),
    /// Leadership was lost on the way: the change may be made, made by half, or not made.
    Interrupted(Option<Leader>),
    /// The core has stopped.
    Stopped(String),
}

impl<M: StateMachine> Core<M> {
    /// Makes `change`: returns where it stands once it is committed and applied here.
    ///
    /// # Errors
    /// See [`ChangeError`].
    pub(crate) async fn change_membership(&self, change: MembershipChange) -> Result<LogId, ChangeError> {
        let before = self.metrics();
        let own = self.raft().metrics().borrow_watched().id;
        let (changes, retain) = changes(&before.membership, own, change);
        let outcome = self.raft().change_membership(changes, retain).await;
        outcome.map(|written| type_config::from_log_id(&written.log_id)).map_err(|error| match error {
            RaftError::Fatal(fatal) => ChangeError::Stopped(type_config::fatal(&fatal)),
            RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
                // The second step of a change is refused like the first one.
                match self.metrics().membership_at == before.membership_at {
                    true => ChangeError::NotLeader(leader(forward)),
                    false => ChangeError::Interrupted(leader(forward)),
                }
            }
            RaftError::APIError(ClientWriteError::LogEntryDiscarded(forward)) => {
                ChangeError::Interrupted(leader(forward))
            }
            RaftError::APIError(ClientWriteError::ChangeMembershipError(
                ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_),
            )) => ChangeError::UnderWay,
            // Somebody else has changed the membership between the two steps of this change.
            RaftError::APIError(ClientWriteError::PreconditionFailed(_)) => ChangeError::Interrupted(None),
            RaftError::APIError(ClientWriteError::ChangeMembershipError(error)) => {
                ChangeError::Invalid(invalid(&error))
            }
        })
    }
}

/// Why the core does not make a change, without openraft's names for things.
fn invalid(error: &ChangeMembershipError<CommittedLeaderIdOf<TypeConfig>, NodeId>) -> String {
    match error {
        ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_) => {
            "an earlier change is not committed yet".to_owned()
        }
        ChangeMembershipError::EmptyMembership(_) => "no voter would be left".to_owned(),
        ChangeMembershipError::LearnerNotFound(absent) => format!("node {} is no member", absent.node_id),
        ChangeMembershipError::UnsupportedMembershipTransition(_) => {
            "the voters are not what they were when it was decided on".to_owned()
        }
        ChangeMembershipError::NodeMetadataChanged(_) => "a member has changed meanwhile".to_owned(),
    }
}

/// openraft's form of `change`, proposed by `own`, and whether voters that it removes stay as learners.
fn changes(
    membership: &Membership,
    own: NodeId,
    change: MembershipChange,
) -> (ChangeMembers<NodeId, Member>, bool) {
    // Without one, whoever goes on guesses.
    let is_full = membership.intents().count() >= Membership::MOST_INTENTS;
    let note = |about: NodeId, intent: Option<Intent>, holder: NodeId| {
        let intent = intent.filter(|_| !is_full);
        noted(membership, &BTreeMap::from([(about, intent)]), holder)
    };
    let with = |notes: BTreeMap<NodeId, Member>, change| match notes.is_empty() {
        true => change,
        false => ChangeMembers::Batch(vec![ChangeMembers::SetNodes(notes), change]),
    };
    match change {
        MembershipChange::AddLearner { node_id, mut member, intent } => {
            member.intents.extend(intent.filter(|_| !is_full).map(|intent| (node_id, intent)));
            let add = ChangeMembers::AddNodes(BTreeMap::from([(node_id, member)]));
            (with(note(node_id, None, own), add), true)
        }
        MembershipChange::Promote(node_id) => {
            let promote = ChangeMembers::AddVoterIds(BTreeSet::from([node_id]));
            (with(note(node_id, None, node_id), promote), true)
        }
        MembershipChange::Demote(node_id) => {
            let demote = ChangeMembers::RemoveVoters(BTreeSet::from([node_id]));
            (with(note(node_id, Some(Intent::Learner), node_id), demote), true)
        }
        MembershipChange::Remove { node_id, intent } => {
            // Not on its own record, which goes with it.
            let notes = note(node_id, intent, own);
            let remove = match membership.is_voter(node_id) {
                true => ChangeMembers::RemoveVoters(BTreeSet::from([node_id])),
                false => ChangeMembers::RemoveNodes(BTreeSet::from([node_id])),
            };
            (with(notes, remove), false)
        }
        MembershipChange::Swap { old, new } => {
            let notes = noted(membership, &BTreeMap::from([(old, None), (new, None)]), own);
            let swap = ChangeMembers::Batch(vec![
                ChangeMembers::AddVoterIds(BTreeSet::from([new])),
                ChangeMembers::RemoveVoters(BTreeSet::from([old])),
            ]);
            (with(notes, swap), false)
        }
        MembershipChange::Readdress { node_id, member } => {
            (ChangeMembers::SetNodes(BTreeMap::from([(node_id, member)])), true)
        }
        MembershipChange::Settle => {
            let last = membership.voters.last();
            let goes = |id: &&NodeId| last.is_some_and(|last| !last.contains(id));
            let mut going = membership.voters.iter().flatten().filter(goes);
            let stay = going.all(|id| {
                membership.intent(*id) == Some(Intent::Learner) && is_noted_on_itself(membership, *id)
            });
            (ChangeMembers::AddVoterIds(BTreeSet::new()), stay)
        }
    }
}

/// Whether what a member is to be is noted on its own record: then it is to be that itself, and not what comes in its place.
fn is_noted_on_itself(membership: &Membership, node_id: NodeId) -> bool {
    membership.members.get(&node_id).is_some_and(|member| member.intents.contains_key(&node_id))
}

/// The records that change so that of the members in `notes` what is given there is noted on the record of `holder`, and
/// nothing else is.
fn noted(
    membership: &Membership,
    notes: &BTreeMap<NodeId, Option<Intent>>,
    holder: NodeId,
) -> BTreeMap<NodeId, Member> {
    let changed = |(id, member): (&NodeId, &Member)| {
        let mut intents = member.intents.clone();
        for (about, intent) in notes {
            match intent.filter(|_| *id == holder) {
                Some(intent) => drop(intents.insert(*about, intent)),
                None => drop(intents.remove(about)),
            }
        }
        (intents != member.intents).then(|| (*id, Member { intents, ..member.clone() }))
    };
    membership.members.iter().filter_map(changed).collect()
}

#[cfg(test)]
mod tests {
    mod script;

    use openraft::Membership as Openraft;

    use super::*;

    /// Nodes 1 to 3 vote, node 4 does not. Node 1 leads.
    fn four() -> Membership {
        let members =
            (1..=4).map(|id| (id, Member { peer: format!("n{id}:1"), ..Member::default() })).collect();
        Membership { voters: vec![[1, 2, 3].into()], members }
    }

    /// What openraft makes of the first entry of `change`, and whether a leader that finds it goes on with retaining voters.
    fn first_entry(before: &Membership, change: MembershipChange) -> Membership {
        let (changes, retain) = changes(before, 1, change);
        apply(before, changes, retain)
    }

    /// As openraft does, whose own function is not public: the next coherent membership towards the changed one.
    fn apply(before: &Membership, change: ChangeMembers<NodeId, Member>, retain: bool) -> Membership {
        fn walk(membership: &mut Membership, change: ChangeMembers<NodeId, Member>) {
            let last = membership.voters.last().cloned().unwrap_or_default();
            match change {
                ChangeMembers::AddVoterIds(add) => {
                    membership.voters.push(last.union(&add).copied().collect())
                }
                ChangeMembers::RemoveVoters(gone) => {
                    membership.voters.push(last.difference(&gone).copied().collect())
                }
                ChangeMembers::AddNodes(nodes) => {
                    for (id, node) in nodes {
                        membership.members.entry(id).or_insert(node);
                    }
                }
                ChangeMembers::SetNodes(nodes) => membership.members.extend(nodes),
                ChangeMembers::RemoveNodes(gone) => membership.members.retain(|id, _| !gone.contains(id)),
                ChangeMembers::Batch(all) => all.into_iter().for_each(|change| walk(membership, change)),
                other => panic!("{other:?}"),
            }
        }
        let mut after = before.clone();
        walk(&mut after, change);
        let (old, goal) = (before.voters.last().cloned().unwrap_or_default(), after.voters.pop().unwrap());
        let was_joint = before.voters.len() > 1;
        after.voters = if was_joint || old == goal { vec![goal.clone()] } else { vec![old, goal.clone()] };
        if !retain {
            let kept: BTreeSet<NodeId> = after.voters.iter().flatten().copied().collect();
            let gone: Vec<_> =
                before.voters.iter().flatten().filter(|id| !kept.contains(id)).copied().collect();
            after.members.retain(|id, _| !gone.contains(id));
        }
        Openraft::new(after.voters.clone(), after.members.clone()).unwrap();
        after
    }

    fn settled(half_made: &Membership) -> Membership {
        assert_eq!(half_made.voters.len(), 2, "{half_made:?}");
        first_entry(half_made, MembershipChange::Settle)
    }

    fn ids(membership: &Membership) -> (Vec<NodeId>, Vec<NodeId>) {
        let voters = membership.voters.last().unwrap().iter().copied().collect();
        (voters, membership.members.keys().copied().collect())
    }

    #[test]
    fn a_change_that_is_cut_in_two_ends_as_it_was_meant() {
        let demoted = settled(&first_entry(&four(), MembershipChange::Demote(2)));
        assert_eq!(ids(&demoted), (vec![1, 3], vec![1, 2, 3, 4]), "it stays as a learner");
        let removed = settled(&first_entry(&four(), MembershipChange::Remove { node_id: 2, intent: None }));
        assert_eq!(ids(&removed), (vec![1, 3], vec![1, 3, 4]));
        let swapped = settled(&first_entry(&four(), MembershipChange::Swap { old: 2, new: 4 }));
        assert_eq!(ids(&swapped), (vec![1, 3, 4], vec![1, 3, 4]));
        // One that was demoted and promoted again is removed like any other.
        let promoted = settled(&first_entry(&demoted, MembershipChange::Promote(2)));
        assert_eq!((ids(&promoted), promoted.intent(2)), ((vec![1, 2, 3], vec![1, 2, 3, 4]), None));
        let removed = settled(&first_entry(&promoted, MembershipChange::Remove { node_id: 2, intent: None }));
        assert_eq!(ids(&removed), (vec![1, 3], vec![1, 3, 4]));
    }

    #[test]
    fn a_swap_leaves_no_note_of_either() {
        let mut before = four();
        let notes = BTreeMap::from([(2, Intent::Learner), (4, Intent::Voter), (9, Intent::Learner)]);
        before.members.entry(1).and_modify(|member| member.intents = notes);
        let swapped = settled(&first_entry(&before, MembershipChange::Swap { old: 2, new: 4 }));
        assert_eq!(ids(&swapped), (vec![1, 3, 4], vec![1, 3, 4]));
        assert_eq!(swapped.intents().collect::<Vec<_>>(), [(1, 9, Intent::Learner)], "that of a third stays");
    }

    #[test]
    fn a_leader_makes_no_more_notes_than_the_others_take() {
        let mut full = four();
        let notes = (100..).take(Membership::MOST_INTENTS).map(|about| (about, Intent::Voter)).collect();
        full.members.entry(1).and_modify(|member| member.intents = notes);
        let member = Member { peer: "new:1".to_owned(), ..Member::default() };
        for change in [
            MembershipChange::AddLearner { node_id: 5, member, intent: Some(Intent::Voter) },
            MembershipChange::Demote(2),
            MembershipChange::Remove { node_id: 2, intent: Some(Intent::Voter) },
        ] {
            let after = first_entry(&full, change.clone());
            assert_eq!(after.intents().count(), Membership::MOST_INTENTS, "{change:?}");
        }
    }

    #[test]
    fn what_is_to_come_in_a_members_place_is_known_until_it_is_there() {
        for (node_id, intent) in [(2, Intent::Voter), (4, Intent::Learner)] {
            let mut away = first_entry(&four(), MembershipChange::Remove { node_id, intent: Some(intent) });
            if away.voters.len() > 1 {
                away = settled(&away);
            }
            assert!(!away.members.contains_key(&node_id), "{away:?}");
            assert_eq!(away.intent(node_id), Some(intent));
            let member = Member { peer: "new:1".to_owned(), ..Member::default() };
            let add = MembershipChange::AddLearner { node_id, member, intent: Some(intent) };
            let back = first_entry(&away, add);
            assert_eq!(
                back.intents().collect::<Vec<_>>(),
                [(node_id, node_id, intent)],
                "on its own record only"
            );
            let promoted = settled(&first_entry(&back, MembershipChange::Promote(node_id)));
            assert_eq!((promoted.is_voter(node_id), promoted.intents().count()), (true, 0));
        }
    }
}
