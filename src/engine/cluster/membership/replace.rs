//! One node takes the place of another, or comes back to its own with another data directory.
//!
//! Every step is committed by itself, and the whole may be interrupted between any two. What has been done is seen from
//! the membership when the command is repeated, so repeating it completes it.

use std::collections::BTreeSet;

use tokio::time::Instant;

use super::changes::Stage;
use super::quorum::Strength;
use super::{NewMember, asking};
use crate::engine::Engine;
use crate::error::MembershipError;
use crate::machine::StateMachine;
use crate::raft::membership::MembershipChange;
use crate::types::{Intent, Membership, NodeId};

impl<M: StateMachine> Engine<M> {
    /// A member with another data directory takes the place of the one with the same id.
    pub(super) async fn replace_in_place(
        &self,
        new: &NewMember,
        deadline: Instant,
        stage: &Stage,
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
        stage.waits_for(|| asking(node_id, &new.peer));
        let found = self.identify_reached(new).await?;
        let has_joined = {
            let _turn = self.turn(stage).await?;
            // What it was is decided before an earlier change is ended, which may end its vote.
            let before = self.leading()?.membership;
            let role = role(&before, node_id);
            self.settle(stage).await?;
            let now = self.leading()?.membership;
            let has_joined = match now.members.get(&node_id) {
                Some(known) if known.incarnation == found.incarnation => {
                    // It is in its place already: what is left is its vote, if it is to have one.
                    if now.is_voter(node_id) || now.intent(node_id) != Some(Intent::Voter) {
                        return Ok(());
                    }
                    false
                }
                Some(_) => {
                    if now.is_voter(node_id) {
                        self.may_lose(node_id, false, stage).await?;
                    }
                    let change = MembershipChange::Remove { node_id, intent: Some(role) };
                    self.propose_change("the removal of the old node", change, stage).await?;
                    self.join(new, Some(role), stage).await.map_err(|error| error.after(true))?;
                    true
                }
                None => self.join(new, Some(role), stage).await?,
            };
            let now = self.leading().map_err(|error| error.after(has_joined))?.membership;
            if now.intent(node_id) == Some(Intent::Learner) {
                return Ok(());
            }
            has_joined
        };
        self.promote(node_id, deadline, stage).await.map_err(|error| error.after(has_joined))
    }

    /// Another node takes the place of `old`; if that votes, both change at once.
    pub(super) async fn replace_by_other(
        &self,
        old: NodeId,
        new: &NewMember,
        deadline: Instant,
        stage: &Stage,
    ) -> Result<(), MembershipError> {
        let (old_votes, is_begun) = {
            let _turn = self.turn(stage).await?;
            self.settle(stage).await?;
            let membership = self.leading()?.membership;
            let voted = membership.is_voter(new.node_id);
            match membership.members.contains_key(&old) {
                false if voted => return Ok(()),
                // The old one has gone; the vote of the new one may be left to give.
                false if membership.members.contains_key(&new.node_id) => {
                    return match membership.intent(new.node_id) {
                        Some(Intent::Voter) => {
                            drop(_turn);
                            self.promote(new.node_id, deadline, stage).await
                        }
                        Some(Intent::Learner) | None => Ok(()),
                    };
                }
                false => return Err(MembershipError::UnknownMember { node_id: old }),
                true if voted && membership.is_voter(old) => {
                    return Err(MembershipError::BothVote { old, new: new.node_id });
                }
                true => {}
            }
            let role = role(&membership, old);
            if membership.is_voter(old) {
                self.step_aside(old, stage).await?;
            }
            let has_joined = self.join(new, Some(role), stage).await?;
            if membership.is_voter(old) {
                (true, has_joined)
            } else {
                let change = MembershipChange::Remove { node_id: old, intent: None };
                let removed = self.propose_change("the removal of the old node", change, stage).await;
                removed.map_err(|error| error.after(has_joined))?;
                if role == Intent::Learner {
                    return Ok(());
                }
                (false, true)
            }
        };
        let completed = match old_votes {
            true => self.swap(old, new.node_id, deadline, stage).await,
            // The old one was itself to get the vote of one before it.
            false => self.promote(new.node_id, deadline, stage).await,
        };
        completed.map_err(|error| error.after(is_begun))
    }

    /// The learner `new` becomes a voter once it has caught up, and the voter `old` ceases to be one.
    async fn swap(
        &self,
        old: NodeId,
        new: NodeId,
        deadline: Instant,
        stage: &Stage,
    ) -> Result<(), MembershipError> {
        let incarnation = self.known(&self.leading()?, new)?.incarnation;
        loop {
            stage.waits_for(|| format!("node {new} to catch up"));
            self.caught_up(new, incarnation, deadline).await?;
            let _turn = self.turn(stage).await?;
            self.settle(stage).await?;
            let metrics = self.leading()?;
            if !self.has_caught_up(&metrics, new, incarnation)? {
                continue;
            }
            // Others may have changed either while it caught up, such as the same call, made twice.
            if metrics.membership.is_voter(new) && !metrics.membership.members.contains_key(&old) {
                return Ok(());
            }
            if !metrics.membership.is_voter(old) || metrics.membership.is_voter(new) {
                return Err(MembershipError::AnotherChange);
            }
            self.step_aside(old, stage).await?;
            let swapped = |voters: &mut BTreeSet<NodeId>| {
                voters.remove(&old);
                voters.insert(new);
            };
            self.keeps_quorum(swapped, Strength::Answers, stage).await?;
            return self.propose_change("the replacement", MembershipChange::Swap { old, new }, stage).await;
        }
    }
}

/// What a node that takes the place of `node_id` is to be. One that is gone is taken to have been a voter, if nothing
/// else is noted.
fn role(membership: &Membership, node_id: NodeId) -> Intent {
    match (membership.is_voter(node_id), membership.members.contains_key(&node_id)) {
        (true, _) => Intent::Voter,
        (false, is_member) => {
            let unknown = if is_member { Intent::Learner } else { Intent::Voter };
            membership.intent(node_id).unwrap_or(unknown)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::types::Member;

    #[test]
    fn a_node_gets_what_the_one_before_it_had_or_was_to_get() {
        let noted =
            |about, intent| Member { intents: BTreeMap::from([(about, intent)]), ..Member::default() };
        let membership = Membership {
            voters: vec![[1, 2].into()],
            members: BTreeMap::from([
                (1, noted(6, Intent::Learner)),
                (2, noted(2, Intent::Learner)),
                (3, Member::default()),
                (4, noted(4, Intent::Voter)),
                (5, noted(5, Intent::Learner)),
            ]),
        };
        for (node_id, expected) in [
            (1, Intent::Voter),
            // Its demotion was cut short before it had begun.
            (2, Intent::Voter),
            (3, Intent::Learner),
            (4, Intent::Voter),
            (5, Intent::Learner),
            (6, Intent::Learner),
            (7, Intent::Voter),
        ] {
            assert_eq!(role(&membership, node_id), expected, "node {node_id}");
        }
    }
}
