//! What each kind of change does, from its turn to its last entry. What takes the place of another is in `replace`.

use std::time::Duration;

use super::changes::Stage;
use super::{NewAddresses, NewMember, asking, caught_up_by};
use crate::engine::Engine;
use crate::error::MembershipError;
use crate::machine::StateMachine;
use crate::raft::membership::MembershipChange;
use crate::types::{Member, NodeId};

impl<M: StateMachine> Engine<M> {
    pub(super) async fn add(
        &self,
        new: &NewMember,
        promote: bool,
        timeout: Duration,
        stage: &Stage,
    ) -> Result<(), MembershipError> {
        let has_joined = {
            let _turn = self.turn(stage).await?;
            self.settle(stage).await?;
            self.join(new, None, stage).await?
        };
        match promote {
            true => {
                let promoted = self.promote(new.node_id, caught_up_by(timeout), stage).await;
                promoted.map_err(|error| error.after(has_joined))
            }
            false => Ok(()),
        }
    }

    pub(super) async fn demote(
        &self,
        node_id: NodeId,
        force: bool,
        stage: &Stage,
    ) -> Result<(), MembershipError> {
        let _turn = self.turn(stage).await?;
        self.settle(stage).await?;
        let metrics = self.leading()?;
        self.known(&metrics, node_id)?;
        if metrics.membership.is_voter(node_id) {
            self.may_lose(node_id, force, stage).await?;
            self.step_aside(node_id, stage).await?;
            self.propose_change("the demotion", MembershipChange::Demote(node_id), stage).await?;
        }
        Ok(())
    }

    pub(super) async fn remove(
        &self,
        node_id: NodeId,
        force: bool,
        stage: &Stage,
    ) -> Result<(), MembershipError> {
        let _turn = self.turn(stage).await?;
        self.settle(stage).await?;
        let metrics = self.leading()?;
        if !metrics.membership.members.contains_key(&node_id) {
            return match self.inner.core.activity().has_seen_member(node_id) {
                true => Ok(()),
                false => Err(MembershipError::UnknownMember { node_id }),
            };
        }
        if metrics.membership.is_voter(node_id) {
            self.may_lose(node_id, force, stage).await?;
            self.step_aside(node_id, stage).await?;
        }
        self.propose_change("the removal", MembershipChange::Remove { node_id, intent: None }, stage).await
    }

    pub(super) async fn update(
        &self,
        node_id: NodeId,
        addresses: NewAddresses,
        stage: &Stage,
    ) -> Result<(), MembershipError> {
        let _turn = self.turn(stage).await?;
        // A joint membership that is left would be ended by this change, but not in the way that its own change meant.
        self.settle(stage).await?;
        let known = self.known(&self.leading()?, node_id)?;
        let member = Member {
            peer: addresses.peer.unwrap_or_else(|| known.peer.clone()),
            client: addresses.client.unwrap_or_else(|| known.client.clone()),
            ..known.clone()
        };
        stage.waits_for(|| asking(node_id, &member.peer));
        self.check_advertised(node_id, &member).await?;
        match member == known {
            true => Ok(()),
            false => {
                let change = MembershipChange::Readdress { node_id, member };
                self.propose_change("the change of addresses", change, stage).await
            }
        }
    }
}
