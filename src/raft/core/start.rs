//! How the core is started: what it is given, the settings of openraft, and the silence that follows.

use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::{Config, Raft, SnapshotPolicy};

use super::Core;
use super::candidacy::Candidacy;
use crate::machine::StateMachine;
use crate::raft::activity::Activity;
use crate::raft::apply::Applier;
use crate::raft::consensus_tasks;
use crate::raft::lease::LeaderLease;
use crate::raft::log::RaftLog;
use crate::raft::network::addresses::{Addresses, SeenMember};
use crate::raft::network::client::PeerClients;
use crate::raft::network::plausible;
use crate::raft::network::service::{Callee, PeerService, VoterPromise};
use crate::raft::read_index::ReadIndexes;
use crate::raft::type_config::{self, TypeConfig};
use crate::runtime::Tasks;
use crate::storage::{LogStore, SnapshotStore};
use crate::types::NodeId;

/// Most entries in one message to a peer, and in one write to the log.
const MAX_BATCH_ENTRIES: u64 = 4096;

/// Commits that may wait to be applied. What waits is in memory anyway, and is bounded by bytes.
const APPLY_QUEUE: u64 = 1 << 16;
/// How peers that cannot be reached are retried.
const BACKOFF: &str = "20ms 40ms 80ms ...500ms";

/// What the core needs to know before it starts.
#[derive(Debug, Clone)]
pub(crate) struct CoreConfig {
    /// Name of the cluster, for its messages.
    pub cluster: String,
    /// This node.
    pub node_id: NodeId,
    /// Interval between heartbeats, in milliseconds.
    pub heartbeat_interval_ms: u64,
    /// Shortest election timeout, in milliseconds.
    pub election_timeout_min_ms: u64,
    /// Longest election timeout, in milliseconds.
    pub election_timeout_max_ms: u64,
    /// What that was before, if it was longer: a leader may still rely on it.
    pub promised_lease_ms: u64,
    /// Most bytes of entries in one message to a peer.
    pub message_bytes: usize,
}

/// Where the core keeps its state, and how it reaches its peers.
pub(crate) struct Parts<M: StateMachine> {
    /// The durable log.
    pub log: Arc<dyn LogStore>,
    /// The snapshots.
    pub snapshots: Arc<dyn SnapshotStore>,
    /// The state machine, recovered.
    pub applier: Applier<M>,
    /// The calling side of the network.
    pub clients: PeerClients,
    /// The answering side of the network.
    pub callee: Callee,
    /// What the core's tasks join.
    pub tasks: Tasks,
}

impl<M: StateMachine> Core<M> {
    /// Starts the core: recovers, and takes part in elections if this node is a voter.
    ///
    /// # Errors
    /// What openraft says when it cannot recover from the log and the snapshots.
    pub(crate) async fn start(config: &CoreConfig, mut parts: Parts<M>) -> Result<Self, String> {
        let applier = &parts.applier;
        let (published, activity, feed) = (applier.published(), applier.activity(), applier.feed());
        let (agreement, agreed_versions) = (applier.agreement(), applier.agreed_versions());
        parts.clients.count_in(activity.clone());
        parts.clients.judged_by(agreement.clone());
        let (purge_mark, addresses) = (parts.clients.purge_mark(), parts.clients.addresses());
        let snapshot_bytes_per_second = parts.clients.snapshot_bytes_per_second();
        let (durable_positions, fitness) = (parts.clients.durable_positions(), parts.clients.fitness());
        note_vote(&*parts.log, &activity)?;
        let tasks = &parts.tasks;
        let (log, telling) = RaftLog::new(
            parts.log.clone(),
            config.message_bytes,
            (config.node_id, parts.callee.incarnation),
            durable_positions.clone(),
            activity.clone(),
        );
        tasks.passing("flushed-writes", telling);
        let settings = Arc::new(raft_config(config)?);
        let raft = Raft::new(config.node_id, settings, parts.clients, log, parts.applier);
        let raft = consensus_tasks::joining(tasks, raft).await.map_err(|error| type_config::fatal(&error))?;
        follow_membership(&raft, &addresses);
        // The core reports its state before it answers: from here on peers are checked against the membership.
        let has_confirmed = raft.is_initialized().await.map_err(|error| type_config::fatal(&error))?;
        let voter_lease = Duration::from_millis(config.election_timeout_max_ms);
        // A leader may rely on what this node confirmed before it was restarted, so for a while it elects nobody, neither
        // others, see `PeerService`, nor itself. An election that the leader asks for is not held up.
        let silence = match has_confirmed {
            true => voter_lease.max(Duration::from_millis(config.promised_lease_ms)),
            false => Duration::ZERO,
        };
        let candidacy = Arc::new(Candidacy::silent());
        let (elects, candidate) = (raft.clone(), candidacy.clone());
        tasks.passing("silence", async move {
            tokio::time::sleep(silence).await;
            candidate.silence_is_over(&elects);
        });
        let lease = voter_lease.saturating_mul(2);
        let reads = ReadIndexes::start(raft.clone(), lease, activity.clone(), tasks);
        let service = PeerService::new(
            parts.callee,
            raft.clone(),
            (parts.log, parts.snapshots),
            reads.clone(),
            (activity.clone(), agreement.clone()),
            VoterPromise { silence, lease: voter_lease },
        );
        let (heard, offers) = (service.last_heard(), service.offers());
        let admission = Arc::new(LeaderLease::new(raft.metrics(), voter_lease));
        Ok(Self {
            raft,
            published,
            feed,
            door: Arc::new(service),
            heard,
            offers,
            reads,
            purge_mark,
            snapshot_bytes_per_second,
            durable_positions,
            admission,
            fitness,
            activity,
            agreement,
            agreed_versions,
            candidacy,
            lease,
        })
    }
}

/// Takes note of the vote that `log` holds. The next one is not to be out of bounds.
fn note_vote(log: &dyn LogStore, activity: &Activity) -> Result<(), String> {
    let Some(vote) = log.vote() else { return Ok(()) };
    if vote.term >= plausible::LARGEST_TERM {
        return Err(format!("this node has voted in term {}, after which there is none", vote.term));
    }
    activity.had_voted(vote);
    Ok(())
}

/// Has peers be dialled where the membership says.
fn follow_membership<M: StateMachine>(raft: &Raft<TypeConfig, Applier<M>>, addresses: &Addresses) {
    let membership = raft.metrics();
    addresses.follow(move |node_id| {
        let metrics = membership.borrow_watched();
        let stored = &metrics.membership_config;
        SeenMember {
            at: stored.log_id().as_ref().map(type_config::from_log_id),
            member: stored.membership().get_node(&node_id).cloned(),
        }
    });
}

fn raft_config(config: &CoreConfig) -> Result<Config, String> {
    Config {
        cluster_name: config.cluster.clone(),
        heartbeat_interval: config.heartbeat_interval_ms,
        election_timeout_min: config.election_timeout_min_ms,
        election_timeout_max: config.election_timeout_max_ms,
        max_payload_entries: MAX_BATCH_ENTRIES,
        max_append_entries: Some(MAX_BATCH_ENTRIES),
        // While entries wait for a snapshot one is queued per commit, and the core stops when the queue is full: no heartbeats,
        // no votes. What is in flight is to reach its limit first.
        state_machine_channel_size: Some(APPLY_QUEUE),
        // Snapshots and purges are triggered by the engine, which also counts bytes.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        // A follower is sent a snapshot only when the log no longer holds what it needs.
        replication_lag_threshold: u64::MAX,
        // Snapshots have idle timeouts of their own.
        install_snapshot_timeout: Duration::from_secs(24 * 3600).as_millis() as u64,
        enable_pre_vote: Some(true),
        // Until it is known whether this node must be silent first.
        enable_elect: false,
        // The state machine is in memory: a restarted leader must be elected again.
        enable_leader_restore: Some(false),
        backoff: BACKOFF.to_owned(),
        ..Config::default()
    }
    .validate()
    .map_err(|error| error.to_string())
}
