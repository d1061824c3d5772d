//! Nodes that prefer to lead, and members that moved.
//!
//! # Preferred leaders
//!
//! A follower that prefers to lead tells the leader so, every [`ANNOUNCE_PACE`], while it is a voter, has caught up, hears
//! the leader, and its disk has been well for [`WELL_FOR`](super::preference::WELL_FOR). The leader hands over, unless it prefers to lead itself. So of
//! several that prefer, the first to lead keeps the lead until it fails or is told to hand over; they do not take it from
//! each other. A leader whose disk is not well prefers nothing. After a hand-over on somebody's command, or one that
//! failed, a preferred node asks again after a pause, which doubles each time ([`Preference`]): take the preference back
//! first to move the lead for longer.
//!
//! # Addresses
//!
//! The same announcement carries a member's addresses when they are not those in the membership. The leader asks at them
//! who answers, and commits them if it is that member; its own it commits itself. Nothing is kept of what was
//! announced: until the membership says what the member says, it says so again, to whoever leads. A node that has moved
//! alone hears of no leader, because it is called where it was: it tells one member after the other.

use std::collections::BTreeMap;
use std::sync::Weak;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::hand_over::Others;
use super::membership::{NewAddresses, lag};
use super::preference::Preference;
use crate::engine::stop::until_ended;
use crate::engine::{Engine, Inner, NodeState, Settings};
use crate::machine::StateMachine;
use crate::raft::core::CoreMetrics;
use crate::raft::network::leader_line::Announcement;
use crate::types::{Member, NodeId, Role};

/// A node that lacks more entries does not ask for the lead, and is not handed it: under load nobody has them all.
const FOLLOWS_ENTRIES: u64 = 1_000;
/// How often a node looks whether it has something to announce or, as the leader, to set right, while there is or something
/// changes.
const LOOK_PACE: Duration = Duration::from_millis(250);
/// How often the same is announced again, and the shortest time between two hand-overs to nodes that prefer to lead, or two
/// changes of one member's addresses.
const ANNOUNCE_PACE: Duration = Duration::from_secs(3);
/// Announcements of members that wait for their turn; more are repeated by the members.
pub(in crate::engine) const MAX_ANNOUNCEMENTS: usize = 64;

/// What a node remembers from one look to the next.
struct LeadershipMemory {
    preference: Preference,
    /// What was told to whom last, and when.
    told: Option<(NodeId, Announcement, Instant)>,
    /// Members that were told in vain since.
    in_vain: usize,
    /// As the leader: when it last handed over to a node that prefers to lead.
    last_offer: Option<Instant>,
    /// As the leader: when it last acted on new addresses of a member.
    last_moves: BTreeMap<NodeId, Instant>,
}

impl<M: StateMachine> Inner<M> {
    /// Whether this node prefers to lead, and is fit to.
    pub(in crate::engine) fn wants_lead(&self) -> bool {
        self.settings.borrow().preferred_leader
            && self.disk.state().takes_writes()
            && self.core.agreement().divergence().is_none()
    }
}

impl<M: StateMachine> Engine<M> {
    /// Sets right what a leader finds wrong. A change that is under way is left alone. Whether there was nothing to do.
    async fn look_as_leader(&self, metrics: &CoreMetrics) -> bool {
        let inner = &self.inner;
        if inner.changes.is_making() || inner.core.is_handing_over() {
            return false;
        }
        let own = inner.config.node_id;
        let voters = &metrics.membership.voters;
        if voters.last().is_some_and(|voters| !voters.contains(&own)) {
            // Elected from a joint membership that it is about to leave.
            if let Err(error) = self.transfer_leader(None).await {
                tracing::warn!(%error, "this node does not vote any more, and could not hand over; trying again");
            }
            return false;
        }
        let is_half_made = voters.len() > 1;
        let is_committed =
            metrics.membership_at.is_some() && metrics.membership_at == metrics.committed_membership_at;
        let outcome = match metrics.membership.members.get(&own) {
            _ if is_half_made && is_committed => self.settle_member_change().await,
            // Nothing tells when it is.
            _ if is_half_made => return false,
            Some(known)
                if known.incarnation == inner.own.incarnation
                    && !known.is_same_place(&self.own_as_known(known)) =>
            {
                self.update_member(own, new_addresses(&inner.own.peer, &inner.own.client)).await
            }
            _ => return true,
        };
        if let Err(error) = outcome {
            tracing::warn!(%error, "the membership could not be set right; trying again");
        }
        false
    }

    /// What this node has to tell the leader, if anything.
    fn announcement(&self, metrics: &CoreMetrics, may_ask: bool) -> Option<Announcement> {
        let inner = &self.inner;
        let node_id = inner.config.node_id;
        let known = metrics.membership.members.get(&node_id)?;
        if known.incarnation != inner.own.incarnation {
            return None;
        }
        let applied = inner.core.published().progress().log_id.map_or(0, |applied| applied.index);
        let has_caught_up = metrics
            .committed
            .max(metrics.cluster_committed)
            .is_none_or(|committed| applied + FOLLOWS_ENTRIES >= committed.index);
        let wants_lead = may_ask
            && inner.wants_lead()
            && metrics.in_touch
            && metrics.membership.is_voter(node_id)
            && has_caught_up;
        let own = self.own_as_known(known);
        let member = (!known.is_same_place(&own)).then_some(own);
        (wants_lead || member.is_some()).then_some(Announcement { member, wants_lead })
    }

    /// This node as the membership should have it. An embedded node may serve no clients: then what is known stays.
    fn own_as_known(&self, known: &Member) -> Member {
        let own = &self.inner.own;
        let client = if own.client.is_empty() { &known.client } else { &own.client };
        Member { client: client.clone(), ..own.clone() }
    }

    /// Tells whoever leads, if this node has something to tell. Each time that nobody takes notice, the next member is tried:
    /// the leader known last comes first. Whether there is nothing to tell, nor will be before something changes.
    async fn announce(&self, metrics: &CoreMetrics, memory: &mut LeadershipMemory) -> bool {
        let Some(announcement) = self.announcement(metrics, memory.preference.may_ask(Instant::now())) else {
            return self.announcement(metrics, true).is_none();
        };
        let own = self.inner.config.node_id;
        let leader = metrics.leader.as_ref().map(|leader| leader.node_id);
        let mut others: Vec<_> = metrics.membership.members.iter().filter(|(id, _)| **id != own).collect();
        others.sort_by_key(|(id, _)| (Some(**id) != leader, **id));
        // One that hears its leader need not look for another.
        others.truncate(if metrics.in_touch && leader.is_some() { 1 } else { others.len() });
        if others.is_empty() {
            return false;
        }
        let (to, member) = others[memory.in_vain % others.len()];
        // What was told need not be told again at once.
        if let Some((told, same, at)) = &memory.told
            && (told, same) == (to, &announcement)
            && at.elapsed() < ANNOUNCE_PACE
        {
            return false;
        }
        let patience = self.inner.config.timing.patience();
        match self.inner.leader_line.announce(*to, member, &announcement, patience).await {
            Ok(true) => {
                if announcement.wants_lead {
                    memory.preference.asked_in = Some(metrics.term);
                }
                memory.told = Some((*to, announcement, Instant::now()));
                return false;
            }
            Ok(false) => tracing::debug!(to, "not the leader, or one that has no time for an announcement"),
            Err(error) => tracing::debug!(to, %error, "this node's announcement is not heard"),
        }
        memory.in_vain = memory.in_vain.wrapping_add(1);
        false
    }

    /// What a member has announced to this node, which leads.
    async fn take(&self, from: NodeId, announcement: Announcement, memory: &mut LeadershipMemory) {
        let metrics = self.inner.core.metrics();
        let Some(known) = metrics.membership.members.get(&from) else { return };
        let has_passed = |at: Option<&Instant>| at.is_none_or(|at| at.elapsed() >= ANNOUNCE_PACE);
        if let Some(member) = announcement.member
            && member.incarnation == known.incarnation
            && !member.is_same_place(known)
            && has_passed(memory.last_moves.get(&from))
            // Until a change that is under way has ended the member says so again.
            && !self.inner.changes.is_making()
        {
            memory.last_moves.retain(|node_id, _| metrics.membership.members.contains_key(node_id));
            memory.last_moves.insert(from, Instant::now());
            tracing::info!(node = from, peer = member.peer, client = member.client, "a member has moved");
            let addresses = new_addresses(&member.peer, &member.client);
            if let Err(error) = self.update_member(from, addresses).await {
                tracing::warn!(node = from, %error, "its new addresses are not in the membership yet");
            }
        }
        if announcement.wants_lead && has_passed(memory.last_offer.as_ref()) && !self.inner.wants_lead() {
            let others = Others { metrics: &metrics, in_touch: &self.inner.core.peers_fit_to_lead() };
            let unfit = others.may_lead(from).err();
            let behind_entries = lag(&metrics, from);
            if unfit.is_some() || behind_entries > FOLLOWS_ENTRIES {
                let why = unfit.map(tracing::field::display);
                tracing::debug!(node = from, why, behind_entries, "a node that prefers to lead has to wait");
                return;
            }
            memory.last_offer = Some(Instant::now());
            if let Err(error) = self.transfer(Some(from), true).await {
                tracing::warn!(node = from, %error, "a node that prefers to lead did not take the lead");
            }
        }
    }

    /// Acts on what has arrived, and on what has come with it. Of what one member has said only the last counts.
    async fn take_all(
        &self,
        (from, announcement): (NodeId, Announcement),
        announcements: &mut mpsc::Receiver<(NodeId, Announcement)>,
        memory: &mut LeadershipMemory,
    ) {
        let mut latest = BTreeMap::from([(from, announcement)]);
        for _ in 0..MAX_ANNOUNCEMENTS {
            let Ok((from, announcement)) = announcements.try_recv() else { break };
            latest.insert(from, announcement);
        }
        for (from, announcement) in latest {
            self.take(from, announcement, memory).await;
        }
    }

    /// Does what this node has to do by itself. Whether there is nothing more to do before something changes.
    async fn look(&self, memory: &mut LeadershipMemory) -> bool {
        let metrics = self.inner.core.metrics();
        let (leads, is_well) = (metrics.role == Role::Leader, self.inner.disk.state().takes_writes());
        // Of an election that goes on nobody knows the outcome.
        if metrics.role != Role::Candidate {
            memory.preference.look(Instant::now(), leads, metrics.term, is_well);
        }
        let is_done = match metrics.role {
            Role::Leader => self.look_as_leader(&metrics).await,
            Role::Stopped => true,
            Role::Learner | Role::Follower | Role::Candidate => self.announce(&metrics, memory).await,
        };
        is_done && is_well && metrics.role != Role::Candidate
    }
}

/// Announces what this node has to tell, and acts on what others announce, until the node is gone. Holds no handle, so
/// that dropping the last one ends the node.
pub(in crate::engine) async fn run<M: StateMachine>(
    node: Weak<Inner<M>>,
    mut announcements: mpsc::Receiver<(NodeId, Announcement)>,
) {
    let mut memory = LeadershipMemory {
        preference: Preference::new(),
        told: None,
        in_vain: 0,
        last_offer: None,
        last_moves: BTreeMap::new(),
    };
    let Some(mut changes) = node.upgrade().map(|inner| OwnChanges::of(&inner)) else {
        return until_ended().await;
    };
    // Whether a look would find something to do although nothing has changed since the last one.
    let (mut is_due, mut look_at) = (true, Instant::now());
    loop {
        let look = async {
            if !is_due {
                changes.changed().await;
                is_due = true;
            }
            tokio::time::sleep_until(look_at).await;
        };
        let arrived = tokio::select! {
            biased;
            // First, so that announcements do not keep a leader from setting things right.
            () = look => None,
            arrived = announcements.recv() => match arrived {
                Some(arrived) => Some(arrived),
                None => return until_ended().await,
            },
        };
        let Some(inner) = node.upgrade() else { return until_ended().await };
        let engine = Engine::within(inner);
        match arrived {
            Some(arrived) => engine.take_all(arrived, &mut announcements, &mut memory).await,
            None => {
                changes.see();
                is_due = !engine.look(&mut memory).await;
                look_at = Instant::now() + LOOK_PACE;
            }
        }
    }
}

/// What a node's part in all this depends on.
struct OwnChanges {
    state: watch::Receiver<NodeState>,
    settings: watch::Receiver<Settings>,
}

impl OwnChanges {
    fn of<M: StateMachine>(inner: &Inner<M>) -> Self {
        Self { state: inner.state.clone(), settings: inner.settings.subscribe() }
    }

    /// What there is now is about to be looked at.
    fn see(&mut self) {
        self.state.borrow_and_update();
        self.settings.borrow_and_update();
    }

    /// Waits for something new. For ever when the node is gone.
    async fn changed(&mut self) {
        tokio::select! {
            Ok(()) = self.state.changed() => {}
            Ok(()) = self.settings.changed() => {}
            else => until_ended().await,
        }
    }
}

fn new_addresses(peer: &str, client: &str) -> NewAddresses {
    let given = |address: &str| (!address.is_empty()).then(|| address.to_owned());
    NewAddresses { peer: given(peer), client: given(client) }
}
