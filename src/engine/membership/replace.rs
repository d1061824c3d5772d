//! One node takes the place of another, or comes back to its own with another data directory.
//!
//! Every step is committed by itself, and the whole may be interrupted between any two. What has been done is seen from
//! the membership when the command is repeated, so repeating it completes it.

use std::collections::BTreeSet;

use tokio::time::Instant;

use super::NewMember;
use super::quorum::Strength;
use crate::engine::Engine;
use crate::error::MembershipError;
use crate::machine::StateMachine;
use crate::raft::membership::MembershipChange;
use crate::types::NodeId;

impl<M: StateMachine> Engine<M> {
    /// A member with another data directory takes the place of the one with the same id.
    pub(super) async fn replace_in_place(
        &self,
        new: &NewMember,
        deadline: Instant,
    ) -> Result<(), MembershipError> {
        let node_id = new.node_id;
        if node_id == self.inner.config.node_id {
            // Repeated after it was done, and has come to lead: a leader is in its own place.
            return match self.leading()?.membership.is_voter(node_id) {
                true => Ok(()),
                false => Err(MembershipError::AlreadyReplaced { node_id }),
            };
        }
        // Before anything is removed: is there something to put in its place?
        let found = self.identify(new).await?;
        {
            let _turn = self.turn().await?;
            // What it was is decided before an earlier change is ended, which may end its vote.
            let before = self.leading()?.membership;
            let was_voter = before.is_voter(node_id);
            let known = before.members.get(&node_id).map(|member| member.incarnation);
            self.settle().await?;
            if known == Some(found.incarnation) {
                return match self.leading()?.membership.is_voter(node_id) {
                    true => Ok(()),
                    false => Err(MembershipError::AlreadyReplaced { node_id }),
                };
            }
            if self.leading()?.membership.members.contains_key(&node_id) {
                if self.leading()?.membership.is_voter(node_id) {
                    self.may_lose(node_id, false).await?;
                }
                self.commit("the removal of the old node", MembershipChange::Remove(node_id)).await?;
            }
            self.join(new).await?;
            if known.is_some() && !was_voter {
                return Ok(());
            }
        }
        self.promote(node_id, deadline).await
    }

    /// Another node takes the place of `old`; if that votes, both change at once.
    pub(super) async fn replace_by_other(
        &self,
        old: NodeId,
        new: &NewMember,
        deadline: Instant,
    ) -> Result<(), MembershipError> {
        {
            let _turn = self.turn().await?;
            self.settle().await?;
            let membership = self.leading()?.membership;
            let voted = membership.is_voter(new.node_id);
            match membership.members.contains_key(&old) {
                false if voted => return Ok(()),
                false if membership.members.contains_key(&new.node_id) => {
                    return Err(MembershipError::AlreadyReplaced { node_id: new.node_id });
                }
                false => return Err(MembershipError::UnknownMember { node_id: old }),
                true if voted && membership.is_voter(old) => {
                    return Err(MembershipError::BothVote { old, new: new.node_id });
                }
                true => {}
            }
            if membership.is_voter(old) {
                self.step_aside(old).await?;
            }
            self.join(new).await?;
            if !membership.is_voter(old) {
                return self.commit("the removal of the old node", MembershipChange::Remove(old)).await;
            }
        }
        self.swap(old, new.node_id, deadline).await
    }

    /// The learner `new` becomes a voter once it has caught up, and the voter `old` ceases to be one.
    async fn swap(&self, old: NodeId, new: NodeId, deadline: Instant) -> Result<(), MembershipError> {
        let incarnation = self.known(&self.leading()?, new)?.incarnation;
        loop {
            self.caught_up(new, incarnation, deadline).await?;
            let _turn = self.turn().await?;
            self.settle().await?;
            let metrics = self.leading()?;
            if !self.has_caught_up(&metrics, new, incarnation)? {
                continue;
            }
            // Others may have changed either while it caught up.
            if !metrics.membership.is_voter(old) || metrics.membership.is_voter(new) {
                return Err(MembershipError::AnotherChange);
            }
            self.step_aside(old).await?;
            let swapped = |voters: &mut BTreeSet<NodeId>| {
                voters.remove(&old);
                voters.insert(new);
            };
            self.keeps_quorum(swapped, Strength::Answers).await?;
            return self.commit("the replacement", MembershipChange::Swap { old, new }).await;
        }
    }
}
