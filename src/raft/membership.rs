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

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use openraft::ChangeMembers;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};

use super::core::Core;
use super::type_config::{self, leader};
use crate::error::Leader;
use crate::machine::StateMachine;
use crate::types::{LogId, Member, NodeId};

/// One step from a membership to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MembershipChange {
    /// Adds a member that does not vote. No effect on one that is there.
    AddLearner {
        /// Its id, which no member has.
        node_id: NodeId,
        /// Where it is reached, and its identity.
        member: Member,
    },
    /// Makes a learner a voter.
    Promote(NodeId),
    /// Makes a voter a learner.
    Demote(NodeId),
    /// Removes a voter or a learner.
    Remove(NodeId),
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
    /// Ends a change that somebody has begun. Voters that it removes are no members any more: whether they were to stay
    /// is not written anywhere, and one that was to be replaced must not stay as a learner in its own place.
    Settle,
}

impl fmt::Display for MembershipChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddLearner { node_id, member } => {
                write!(f, "add node {node_id} at {} as a learner", member.peer)
            }
            Self::Promote(node_id) => write!(f, "make node {node_id} a voter"),
            Self::Demote(node_id) => write!(f, "make node {node_id} a learner"),
            Self::Remove(node_id) => write!(f, "remove node {node_id}"),
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
pub enum ChangeError {
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
    pub async fn change_membership(&self, change: MembershipChange) -> Result<LogId, ChangeError> {
        // Whether voters that are removed stay as learners.
        let retain = !matches!(
            change,
            MembershipChange::Remove(_) | MembershipChange::Swap { .. } | MembershipChange::Settle
        );
        let learner = |metrics: &super::core::Metrics, node_id| !metrics.membership.is_voter(node_id);
        let changes = match change {
            MembershipChange::AddLearner { node_id, member } => {
                ChangeMembers::AddNodes(BTreeMap::from([(node_id, member)]))
            }
            MembershipChange::Promote(node_id) => ChangeMembers::AddVoterIds(BTreeSet::from([node_id])),
            MembershipChange::Remove(node_id) if learner(&self.metrics(), node_id) => {
                ChangeMembers::RemoveNodes(BTreeSet::from([node_id]))
            }
            MembershipChange::Demote(node_id) | MembershipChange::Remove(node_id) => {
                ChangeMembers::RemoveVoters(BTreeSet::from([node_id]))
            }
            MembershipChange::Swap { old, new } => ChangeMembers::Batch(vec![
                ChangeMembers::AddVoterIds(BTreeSet::from([new])),
                ChangeMembers::RemoveVoters(BTreeSet::from([old])),
            ]),
            MembershipChange::Readdress { node_id, member } => {
                ChangeMembers::SetNodes(BTreeMap::from([(node_id, member)]))
            }
            MembershipChange::Settle => ChangeMembers::AddVoterIds(BTreeSet::new()),
        };
        let before = self.metrics();
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
                ChangeError::Invalid(error.to_string())
            }
        })
    }
}
