//! Who leads when several could: handing over, and nodes that prefer to lead.
//!
//! A leader hands over to a voter that answers and has nearly all entries; openraft then stops writes, tells that voter
//! to stand at once, and the voters to let it. If it does not win, a new leader is elected after an election timeout,
//! as if the old one had failed.
//!
//! # Preferred leaders
//!
//! A follower that prefers to lead tells the leader so, every [`ANNOUNCE_PACE`], while it is a voter, has caught up, hears
//! the leader, and its disk is well. The leader hands over, unless it prefers to lead itself. So of several that prefer,
//! the first to lead keeps the lead until it fails or is told to hand over; they do not take it from each other. A leader
//! whose disk is not well prefers nothing. After a hand-over on somebody's command, a preferred node asks again with its
//! next announcement: take the preference back first to move the lead for longer.
//!
//! # Addresses
//!
//! The same announcement carries a member's addresses when they are not those in the membership, and the leader commits
//! them; its own it commits itself. Nothing is kept of what was announced: until the membership says what the member
//! says, it says so again, to whoever leads.

use std::sync::Weak;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::membership::{NewAddresses, lag};
use super::{Engine, Inner};
use crate::error::{Leader, TransferError};
use crate::machine::StateMachine;
use crate::raft::core::Metrics;
use crate::raft::network::upstream::Announcement;
use crate::types::{NodeId, Role};

/// A voter that lacks more entries is not handed the lead.
const FOLLOWS_ENTRIES: u64 = 10_000;
/// How often a node looks whether it has something to announce or, as the leader, to set right.
const LOOK_PACE: Duration = Duration::from_millis(250);
/// How often the same is announced again, and the shortest time between two hand-overs to nodes that prefer to lead.
const ANNOUNCE_PACE: Duration = Duration::from_secs(3);
/// Announcements of members that wait for their turn; more are repeated by the members.
pub(super) const MAX_ANNOUNCEMENTS: usize = 64;

impl<M: StateMachine> Inner<M> {
    /// Whether this node prefers to lead, and is fit to.
    fn wants_lead(&self) -> bool {
        self.settings.borrow().preferred_leader && self.disk.state().takes_writes()
    }
}

impl<M: StateMachine> Engine<M> {
    /// Hands the lead to `to`, or to the voter that is furthest ahead, and waits until another node leads. Returns who
    /// does: an election may have had another outcome than was asked for.
    ///
    /// Writes are refused meanwhile with [`WriteError::NotLeader`](crate::error::WriteError::NotLeader), for as long
    /// as an election takes; those in flight are committed first.
    ///
    /// # Errors
    /// See [`TransferError`].
    pub async fn transfer_leader(&self, to: Option<NodeId>) -> Result<Leader, TransferError> {
        let inner = &self.inner;
        let own = inner.config.node_id;
        let metrics = self.leading_for_transfer()?;
        if to == Some(own) {
            return metrics.leader.ok_or(TransferError::NobodyElse);
        }
        let successor = match to {
            Some(node_id) => could_lead(&metrics, node_id).map(|()| node_id)?,
            None => furthest(&metrics, own).ok_or(TransferError::NobodyElse)?,
        };
        tracing::info!(successor, "handing over the lead");
        let begun = Instant::now();
        inner.core.transfer_leader(successor).await;
        let patience = inner.config.timing.patience().saturating_mul(2);
        let mut state = self.watch();
        let changed = state.wait_for(|state| {
            state.role == Role::Stopped || state.leader.as_ref().is_some_and(|leader| leader.node_id != own)
        });
        match tokio::time::timeout(patience, changed).await {
            Ok(Ok(state)) => match state.leader.clone().filter(|leader| leader.node_id != own) {
                Some(leader) => {
                    tracing::info!(leader = leader.node_id, took = ?begun.elapsed(), "another node leads");
                    Ok(leader)
                }
                None => Err(transfer_stopped()),
            },
            Ok(Err(_)) => Err(transfer_stopped()),
            Err(_) => {
                tracing::warn!(successor, "nobody took the lead in time");
                Err(TransferError::Timeout {
                    waited_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
                })
            }
        }
    }

    fn leading_for_transfer(&self) -> Result<Metrics, TransferError> {
        if let Some(fatal) = &*self.inner.fatal.borrow() {
            return Err(TransferError::Stopped { reason: fatal.to_string() });
        }
        let metrics = self.inner.core.metrics();
        match metrics.role {
            Role::Leader => Ok(metrics),
            Role::Stopped => Err(transfer_stopped()),
            _ => Err(TransferError::NotLeader { leader: metrics.leader }),
        }
    }

    /// Sets right what a leader finds wrong. A change that is under way is left alone.
    async fn look_as_leader(&self, metrics: &Metrics) {
        let inner = &self.inner;
        if inner.changes.try_lock().is_err() {
            return;
        }
        let own = inner.config.node_id;
        let half_made = metrics.membership.voters.len() > 1
            && metrics.membership_at.is_some()
            && metrics.membership_at == metrics.committed_membership_at;
        let outcome = match metrics.membership.members.get(&own) {
            _ if half_made => self.settle_member_change().await,
            Some(known) if known.incarnation == inner.own.incarnation && *known != inner.own => {
                self.update_member(own, new_addresses(&inner.own.peer, &inner.own.client)).await
            }
            _ => return,
        };
        if let Err(error) = outcome {
            tracing::warn!(%error, "the membership could not be set right; trying again");
        }
    }

    /// What this node has to tell the leader, if anything.
    fn announcement(&self, metrics: &Metrics) -> Option<(Leader, Announcement)> {
        let inner = &self.inner;
        let leader = metrics.leader.clone().filter(|_| metrics.in_touch)?;
        let known = metrics.membership.members.get(&inner.config.node_id)?;
        if known.incarnation != inner.own.incarnation || leader.node_id == inner.config.node_id {
            return None;
        }
        let applied = inner.core.published().progress().log_id.map_or(0, |applied| applied.index);
        let has_caught_up = metrics
            .committed
            .max(metrics.cluster_committed)
            .is_none_or(|committed| applied + FOLLOWS_ENTRIES >= committed.index);
        let wants_lead =
            inner.wants_lead() && metrics.membership.is_voter(inner.config.node_id) && has_caught_up;
        let member = (*known != inner.own).then(|| inner.own.clone());
        (wants_lead || member.is_some()).then_some((leader, Announcement { member, wants_lead }))
    }

    async fn announce(&self, metrics: &Metrics, leader: &Leader, announcement: &Announcement) -> bool {
        let Some(member) = metrics.membership.members.get(&leader.node_id) else { return false };
        let patience = self.inner.config.timing.patience();
        match self.inner.upstream.announce(leader.node_id, member, announcement, patience).await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "the leader does not hear this node's announcement");
                false
            }
        }
    }

    /// What a member has announced to this node, which leads.
    async fn take(&self, from: NodeId, announcement: Announcement, last_offer: &mut Option<Instant>) {
        let metrics = self.inner.core.metrics();
        let Some(known) = metrics.membership.members.get(&from) else { return };
        if let Some(member) = announcement.member
            && member.incarnation == known.incarnation
            && member != *known
        {
            tracing::info!(node = from, peer = member.peer, client = member.client, "a member has moved");
            let addresses = new_addresses(&member.peer, &member.client);
            if let Err(error) = self.update_member(from, addresses).await {
                tracing::warn!(node = from, %error, "its new addresses are not in the membership yet");
            }
        }
        let paced = last_offer.is_none_or(|at| at.elapsed() >= ANNOUNCE_PACE);
        if announcement.wants_lead && paced && !self.inner.wants_lead() {
            if let Err(error) = could_lead(&metrics, from) {
                tracing::debug!(node = from, %error, "a node that prefers to lead has to wait");
                return;
            }
            *last_offer = Some(Instant::now());
            if let Err(error) = self.transfer_leader(Some(from)).await {
                tracing::warn!(node = from, %error, "a node that prefers to lead did not take the lead");
            }
        }
    }
}

/// Announces what this node has to tell, and acts on what others announce, until the node is gone. Holds no handle, so
/// that dropping the last one ends the node.
pub(super) async fn run<M: StateMachine>(
    node: Weak<Inner<M>>,
    mut announcements: mpsc::Receiver<(NodeId, Announcement)>,
) {
    let (mut last_offer, mut told) = (None, None);
    loop {
        let arrived = tokio::select! {
            arrived = announcements.recv() => match arrived {
                Some(arrived) => Some(arrived),
                None => return,
            },
            () = tokio::time::sleep(LOOK_PACE) => None,
        };
        let Some(inner) = node.upgrade() else { return };
        let engine = Engine { inner };
        if let Some((from, announcement)) = arrived {
            engine.take(from, announcement, &mut last_offer).await;
            continue;
        }
        let metrics = engine.inner.core.metrics();
        if metrics.role == Role::Leader {
            engine.look_as_leader(&metrics).await;
        } else if let Some((leader, announcement)) = engine.announcement(&metrics) {
            // What was told to this leader need not be told again at once.
            let same = |told: &(Leader, Announcement, Instant)| {
                told.0 == leader && told.1 == announcement && told.2.elapsed() < ANNOUNCE_PACE
            };
            if !told.as_ref().is_some_and(same) && engine.announce(&metrics, &leader, &announcement).await {
                told = Some((leader, announcement, Instant::now()));
            }
        }
    }
}

fn new_addresses(peer: &str, client: &str) -> NewAddresses {
    let given = |address: &str| (!address.is_empty()).then(|| address.to_owned());
    NewAddresses { peer: given(peer), client: given(client) }
}

fn transfer_stopped() -> TransferError {
    TransferError::Stopped { reason: "the node is shutting down".to_owned() }
}

/// Whether the lead may be handed to `node_id`.
fn could_lead(metrics: &Metrics, node_id: NodeId) -> Result<(), TransferError> {
    if !metrics.membership.members.contains_key(&node_id) {
        return Err(TransferError::UnknownMember { node_id });
    }
    // Of a joint membership: a voter that is about to go is none to hand over to.
    if !metrics.membership.voters.iter().all(|voters| voters.contains(&node_id)) {
        return Err(TransferError::NotAVoter { node_id });
    }
    if !metrics.reachable.contains(&node_id) {
        return Err(TransferError::NotInTouch { node_id });
    }
    match lag(metrics, node_id) {
        lag if lag > FOLLOWS_ENTRIES => Err(TransferError::NotCaughtUp { node_id, lag }),
        _ => Ok(()),
    }
}

/// The voter that the lead is best handed to.
fn furthest(metrics: &Metrics, own: NodeId) -> Option<NodeId> {
    let others = metrics.membership.members.keys().filter(|node_id| **node_id != own);
    let fit = others.filter(|node_id| could_lead(metrics, **node_id).is_ok());
    fit.min_by_key(|node_id| lag(metrics, **node_id)).copied()
}
