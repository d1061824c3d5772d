//! What a node tells of itself and of the members, made in this one place ([`NodeReport`]).
//!
//! Everything is read from what is noted anyway while messages pass; nobody is asked, and nothing waits. A report is made of one
//! view of the core, so its parts belong together. [`state`] is what there is to watch, and [`leaders`] who leads; [`counters`] is
//! what the engine counts.

pub(super) mod counters;
pub(super) mod leaders;
pub(super) mod state;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::Instant;

use self::state::{NodeState, observe};
use super::cluster::membership::lag;
use super::{Engine, PeerPolicy};
use crate::machine::StateMachine;
use crate::raft::core::CoreMetrics;
use crate::raft::published::Progress;
use crate::report::{
    Carried, FeedReport, InFlight, Lag, LedPeer, MemberList, MemberReport, NodeReport, Offsets,
    SessionsReport, StateSize,
};
use crate::runtime::offload;
#[cfg(feature = "peers")]
use crate::trust::peers::Handshakes;
use crate::types::{NodeId, PeerStanding, Role};

/// A peer that answers and lacks more entries than this is catching up.
pub const SYNCING_ENTRIES: u64 = 10_000;

impl<M: StateMachine> Engine<M> {
    /// All that the node tells of itself, with the state hash where the machine keeps one up to date. Cheap: nothing is
    /// computed.
    pub fn report(&self) -> NodeReport {
        let progress = self.inner.core.published().progress();
        self.report_at(progress, progress.state_hash)
    }

    /// As [`report`](Self::report), with the state hash of any machine. Where the machine does not
    /// [keep one up to date](StateMachine::running_hash) this reads all of the state, off the apply path, and what is
    /// changed meanwhile is in memory twice.
    pub async fn report_with_hash(&self) -> NodeReport {
        let inner = &self.inner;
        let progress = inner.core.published().progress();
        if progress.state_hash.is_some() {
            return self.report_at(progress, progress.state_hash);
        }
        // A node that has stopped tells what it last showed.
        let deadline = Instant::now() + inner.config.timing.patience();
        let viewed = inner.view(None, deadline).await.ok().or_else(|| inner.core.published().last_view());
        let Some(applied) = viewed else { return self.report_at(progress, None) };
        let progress = applied.progress;
        let state_hash = offload(move || M::state_hash(&applied.view)).await;
        self.report_at(progress, Some(state_hash))
    }

    /// Who belongs to the cluster, as far as this node knows.
    pub fn members(&self) -> MemberList {
        self.report().into_members()
    }

    /// What handshakes with other members came to; none where members prove nothing to each other.
    #[cfg(feature = "peers")]
    pub fn handshakes(&self) -> Option<std::sync::Arc<Handshakes>> {
        self.inner.transport.handshakes()
    }

    /// The node's state at this moment.
    pub fn state(&self) -> NodeState {
        self.state_in(&self.inner.core.metrics())
    }

    fn state_in(&self, metrics: &CoreMetrics) -> NodeState {
        let inner = &self.inner;
        let (node_id, fatal) = (inner.config.node_id, inner.fatal.reason());
        observe(&inner.core, metrics, node_id, &inner.disk, &inner.forming, fatal)
    }

    fn report_at(&self, progress: Progress, state_hash: Option<u64>) -> NodeReport {
        let (inner, metrics) = (&self.inner, self.inner.core.metrics());
        let state = NodeState { applied: progress.log_id, ..self.state_in(&metrics) };
        let carried = inner.transport.traffic().map(|traffic| traffic.carried()).unwrap_or_default();
        NodeReport {
            node_id: state.node_id,
            cluster: inner.config.cluster.clone(),
            client: inner.own.client.clone(),
            role: Some(state.role),
            term: state.term,
            leader: state.leader.clone(),
            ready: state.is_ready(),
            fatal: state.fatal.as_ref().map(ToString::to_string),
            diverged: state.diverged.as_ref().map(ToString::to_string),
            offsets: Offsets {
                last_log: state.last_log,
                committed: state.committed,
                applied: state.applied,
                snapshot: state.snapshot,
                purged: state.purged,
            },
            state_hash,
            state: StateSize {
                bytes: progress.state_bytes,
                quota_bytes: progress.quota.map(|quota| quota.bytes),
                quota_source: progress.quota.map(|quota| quota.source),
            },
            lag: Some(self.lag(&state, progress.next_index())),
            disk: Some(inner.disk.status()),
            feed: Some(self.feed_report()),
            sessions: SessionsReport {
                open: progress.sessions as u64,
                bytes: progress.session_bytes as u64,
                largest_opener: Some(progress.largest_opener as u64),
            },
            unknown_disk: None,
            in_flight: Some(InFlight {
                commands: inner.inflight_commands.load(Relaxed) as u64,
                bytes: (inner.inflight_bytes.load(Relaxed) + inner.waiting_bytes.load(Relaxed)) as u64,
                waiting_for_all: inner.core.durable_positions().waiting() as u64,
            }),
            members: self.member_reports(&metrics, &carried),
            carried: Some(carried.into_values().sum()),
            membership: metrics.membership_at,
            joint: Some(metrics.membership.voters.len() > 1),
            // The port knows them.
            replicas: Vec::new(),
            replica: None,
            history: self.history(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn feed_report(&self) -> FeedReport {
        let reach = self.feed_reach();
        FeedReport {
            first_position: reach.first,
            next_position: reach.next,
            event_log_operations: reach.operations,
            event_log_bytes: reach.bytes,
            event_log_failing: reach.is_log_failing,
            event_log_restarts: reach.restarts,
        }
    }

    fn member_reports(
        &self,
        metrics: &CoreMetrics,
        carried: &BTreeMap<NodeId, Carried>,
    ) -> Vec<MemberReport> {
        let inner = &self.inner;
        let (own, leads) = (inner.config.node_id, metrics.role == Role::Leader);
        let progress = inner.core.peer_progress();
        let led = |node_id, matched: Option<u64>| {
            let (behind_entries, known) = (lag(metrics, node_id), progress.get(&node_id));
            let age = || inner.core.entry_age(matched.map_or(0, |matched| matched + 1));
            let behind = (behind_entries > 0).then(age).flatten().unwrap_or_default();
            let led = LedPeer {
                standing: PeerStanding::Disconnected,
                behind_entries,
                behind,
                heard: known.and_then(|peer| peer.heard).map(|at| at.elapsed()),
                accepted_entries: known.map_or(0, |peer| peer.accepted_entries),
                snapshot: known.and_then(|peer| peer.snapshot),
            };
            LedPeer { standing: standing(&led, &inner.config.peers), ..led }
        };
        let members = metrics.membership.members.iter();
        members
            .map(|(node_id, member)| {
                let matched = metrics.matched.get(node_id).copied().flatten().map(|matched| matched.index);
                MemberReport {
                    node_id: *node_id,
                    peer: member.peer.clone(),
                    client: member.client.clone(),
                    voter: metrics.membership.is_voter(*node_id),
                    incarnation: Some(member.incarnation),
                    matched,
                    reachable: leads.then(|| metrics.reachable.contains(node_id)),
                    carried: Some(carried.get(node_id).copied().unwrap_or_default()),
                    led: (leads && *node_id != own).then(|| led(*node_id, matched)),
                }
            })
            .collect()
    }

    fn lag(&self, state: &NodeState, next: u64) -> Lag {
        let core = &self.inner.core;
        let entries = state.committed.map_or(0, |committed| (committed.index + 1).saturating_sub(next));
        if state.role == Role::Leader {
            let waiting = if entries > 0 { core.entry_age(next) } else { None };
            return Lag { entries, time: Some(waiting.unwrap_or_default()), leader_heard: None };
        }
        let time = state.in_touch.then(|| core.told_committed(next).unwrap_or_default());
        Lag { entries, time, leader_heard: core.leader_heard() }
    }
}

/// What to make of a peer by its answers and its lag, as `policy` has it.
fn standing(led: &LedPeer, policy: &PeerPolicy) -> PeerStanding {
    let lagging_after = Duration::from_millis(policy.lagging_after_ms);
    let disconnected_after = Duration::from_millis(policy.disconnected_after_ms);
    match led.heard {
        None => PeerStanding::Disconnected,
        Some(heard) if heard > disconnected_after => PeerStanding::Disconnected,
        Some(heard) if heard > lagging_after => PeerStanding::Lagging,
        Some(_) if led.snapshot.is_some() || led.behind_entries > SYNCING_ENTRIES => PeerStanding::Syncing,
        Some(_) if led.behind > lagging_after => PeerStanding::Lagging,
        Some(_) => PeerStanding::Connected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_node_that_was_stopped_names_no_leader_and_is_not_ready() {
        let engine = crate::engine::tests::lone::engine(false).await;
        assert!(engine.ready(Duration::from_secs(30)).await);
        let told = |report: NodeReport| (report.role, report.ready, report.leader.is_some());
        assert_eq!(told(engine.report()), (Some(Role::Leader), true, true));
        engine.shutdown().await;
        assert_eq!(told(engine.report()), (Some(Role::Stopped), false, false));
        let state = engine.state();
        assert!(!state.is_ready() && state.leader.is_none(), "{state:?}");
    }

    #[test]
    fn a_peer_stands_as_its_answers_and_its_lag_say() {
        let of = |led: &LedPeer| standing(led, &PeerPolicy::default());
        let well = LedPeer {
            standing: PeerStanding::Disconnected,
            behind_entries: 0,
            behind: Duration::ZERO,
            heard: Some(Duration::from_millis(20)),
            accepted_entries: 10,
            snapshot: None,
        };
        assert_eq!(of(&well), PeerStanding::Connected);
        let late = LedPeer { behind_entries: 5, behind: Duration::from_millis(1001), ..well };
        assert_eq!(of(&late), PeerStanding::Lagging);
        let far = LedPeer { behind_entries: SYNCING_ENTRIES + 1, ..late };
        assert_eq!(of(&far), PeerStanding::Syncing);
        let fed = LedPeer { snapshot: Some((1, 2)), ..well };
        assert_eq!(of(&fed), PeerStanding::Syncing);
        // Who does not answer catches up with nothing.
        let silent = LedPeer { heard: Some(Duration::from_millis(1001)), ..far };
        assert_eq!(of(&silent), PeerStanding::Lagging);
        for heard in [None, Some(Duration::from_millis(60_001))] {
            assert_eq!(of(&LedPeer { heard, ..far }), PeerStanding::Disconnected);
        }
        // Who expects more of its peers calls them slow or gone earlier.
        let policy = PeerPolicy { lagging_after_ms: 10, disconnected_after_ms: 19, ..PeerPolicy::default() };
        assert_eq!(standing(&well, &policy), PeerStanding::Disconnected);
        let policy = PeerPolicy { disconnected_after_ms: 20, ..policy };
        assert_eq!(standing(&well, &policy), PeerStanding::Lagging);
    }
}
