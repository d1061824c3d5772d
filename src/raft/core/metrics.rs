//! The core's view of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, BoxStream, SelectAll};
use openraft::Instant as _;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::Fatal;
use openraft::{RaftMetrics, ServerState};

use super::super::type_config::{self, TypeConfig};
use super::Core;
use crate::error::Leader;
use crate::machine::StateMachine;
use crate::types::{LogId, Member, Membership, NodeId, Role};

/// The core's view of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CoreMetrics {
    /// What this node is.
    pub role: Role,
    /// Its term.
    pub term: u64,
    /// Whom it follows.
    pub leader: Option<Leader>,
    /// Whether it has heard from its leader, or as the leader from a quorum, a short while ago.
    pub in_touch: bool,
    /// Index of its last entry.
    pub last_log: Option<u64>,
    /// Up to where it knows its log to be committed.
    pub committed: Option<LogId>,
    /// Up to where it has heard that the cluster has committed; may be beyond its log.
    pub cluster_committed: Option<LogId>,
    /// What its newest snapshot covers.
    pub snapshot: Option<LogId>,
    /// Up to where it has purged its log.
    pub purged: Option<LogId>,
    /// The membership in effect.
    pub membership: Membership,
    /// Where that stands in the log.
    pub membership_at: Option<LogId>,
    /// The newest membership known to be committed; the one in effect may yet be taken back.
    pub committed_membership: Membership,
    /// Where that stands in the log.
    pub committed_membership_at: Option<LogId>,
    /// On a leader: the members that have answered it within its lease, itself included.
    pub reachable: BTreeSet<NodeId>,
    /// On a leader: up to where each member's log is known to match.
    pub matched: BTreeMap<NodeId, Option<LogId>>,
    /// Why the core stopped by itself.
    pub fatal: Option<String>,
}

/// Wakes when the core's view of itself changes, except for when it heard whom: that changes all the time.
pub(crate) struct CoreChanges(SelectAll<BoxStream<'static, ()>>);

impl CoreChanges {
    /// Waits for a change. False when the core is gone. What is new may show a moment later.
    pub(crate) async fn changed(&mut self) -> bool {
        self.0.next().await.is_some()
    }
}

impl<M: StateMachine> Core<M> {
    /// The core's present view of itself.
    pub(crate) fn metrics(&self) -> CoreMetrics {
        let metrics = self.raft.metrics();
        let current = metrics.borrow_watched().clone();
        let in_touch = self.in_touch(&current);
        let answered = current.heartbeat.iter().flatten().filter(|(node_id, at)| {
            **node_id == current.id || at.as_ref().is_some_and(|at| at.elapsed() <= self.lease)
        });
        let reachable = answered.map(|(node_id, _)| *node_id).collect();
        CoreMetrics { in_touch, reachable, ..from_metrics(&current) }
    }

    /// Whether this node leads.
    pub(crate) fn leads(&self) -> bool {
        self.raft.metrics().borrow_watched().state == ServerState::Leader
    }

    /// Whom it follows.
    pub(crate) fn leader(&self) -> Option<NodeId> {
        self.raft.metrics().borrow_watched().current_leader
    }

    /// A member, as far as this node knows.
    pub(crate) fn member(&self, node_id: NodeId) -> Option<Member> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().get_node(&node_id).cloned()
    }

    fn in_touch(&self, metrics: &RaftMetrics<TypeConfig>) -> bool {
        match metrics.state {
            // Alone it is its own quorum, whenever it was counted last.
            ServerState::Leader if metrics.membership_config.voter_ids().nth(1).is_none() => true,
            ServerState::Leader => {
                let acked = metrics.last_quorum_acked.as_ref();
                acked.is_some_and(|at| at.elapsed() <= self.lease)
            }
            ServerState::Learner | ServerState::Follower | ServerState::Candidate | ServerState::Shutdown => {
                self.heard.within(self.lease)
            }
        }
    }

    /// For how long this node will have been in touch if it hears nothing more; `None` for a leader that is alone.
    pub(crate) fn in_touch_for(&self) -> Option<Duration> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let heard = match metrics.state {
            ServerState::Leader if metrics.membership_config.voter_ids().nth(1).is_none() => return None,
            ServerState::Leader => metrics.last_quorum_acked.as_ref().map(|at| at.elapsed()),
            ServerState::Learner | ServerState::Follower | ServerState::Candidate | ServerState::Shutdown => {
                self.heard.ago()
            }
        };
        Some(heard.map_or(Duration::ZERO, |ago| self.lease.saturating_sub(ago)))
    }

    /// Tells when the view may have changed. The core says all it has to say with every tick and every heartbeat; these
    /// are the parts that it tells of only when they have changed. What is purged, and what a leader says to be
    /// committed beyond this log, is not among them: see [`noticed`](Self::noticed).
    pub(crate) fn changes(&self) -> CoreChanges {
        let server = stream::unfold(self.raft.server_metrics(), |mut server| async move {
            server.changed().await.ok().map(|()| ((), server))
        });
        let log = stream::unfold(self.raft.watch_log_progress(), |mut log| async move {
            log.changed().await.ok().map(|()| ((), log))
        });
        let commit = stream::unfold(self.raft.watch_commit_progress(), |mut commit| async move {
            commit.changed().await.ok().map(|()| ((), commit))
        });
        let snapshot = stream::unfold(self.raft.watch_snapshot_progress(), |mut snapshot| async move {
            snapshot.changed().await.ok().map(|()| ((), snapshot))
        });
        CoreChanges(stream::select_all([server.boxed(), log.boxed(), commit.boxed(), snapshot.boxed()]))
    }
}

fn from_metrics(metrics: &RaftMetrics<TypeConfig>) -> CoreMetrics {
    let position = |log_id: &Option<type_config::LogId>| log_id.as_ref().map(type_config::from_log_id);
    let membership = type_config::from_membership(metrics.membership_config.membership());
    let leader = metrics.current_leader.and_then(|node_id| {
        let client = membership.members.get(&node_id)?.client.clone();
        Some(Leader { node_id, client })
    });
    let fatal = match &metrics.running_state {
        Ok(()) | Err(Fatal::Stopped) => None,
        Err(fatal) => Some(type_config::fatal(fatal)),
    };
    let role = match (&metrics.running_state, metrics.state) {
        (Err(_), _) | (_, ServerState::Shutdown) => Role::Stopped,
        (_, ServerState::Learner) => Role::Learner,
        (_, ServerState::Follower) => Role::Follower,
        (_, ServerState::Candidate) => Role::Candidate,
        (_, ServerState::Leader) => Role::Leader,
    };
    let matched = metrics.replication.as_ref().map_or_else(BTreeMap::new, |replication| {
        replication.iter().map(|(id, log_id)| (*id, position(log_id))).collect()
    });
    CoreMetrics {
        role,
        term: metrics.current_term,
        leader,
        in_touch: false,
        last_log: metrics.last_log_index,
        committed: position(&metrics.local_committed),
        cluster_committed: position(&metrics.cluster_committed),
        snapshot: position(&metrics.snapshot),
        purged: position(&metrics.purged),
        membership,
        membership_at: position(metrics.membership_config.log_id()),
        committed_membership: type_config::from_membership(metrics.committed_membership_config.membership()),
        committed_membership_at: position(metrics.committed_membership_config.log_id()),
        reachable: BTreeSet::new(),
        matched,
        fatal,
    }
}
