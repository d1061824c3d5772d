//! The public handle: open a node, write, read, watch, stop.
//!
//! - [`EngineConfig`]: what a node needs to know before it starts;
//! - `formation`: how a cluster comes into being, once;
//! - `membership`: who belongs to it from then on;
//! - `transfer`: handing over the lead;
//! - `leadership`: nodes that prefer to lead, members that moved;
//! - `standing`: whether this node still belongs to its cluster;
//! - `writes`: admission, acknowledgement levels;
//! - `sessions`: opened, closed and listed;
//! - `reads`: how fresh the state must be that answers;
//! - `wake`: commands that the machine asked for in advance, such as the expiry of keys;
//! - `clock`: the cluster's clocks as this node knows them, and wall clocks that jump;
//! - `settings`: what can be changed while the node runs;
//! - `quota`: how large the state may become;
//! - `memory`: how much of it this node has, and what for;
//! - `replication`: how far everybody is, and what is in flight;
//! - `compaction`: when snapshots are taken and the log is cut;
//! - `agreement`: a node whose state differs from the others' serves no more;
//! - `ranges`: from where to where each number among the settings may be set;
//! - `health`: a leader whose disk is full or hangs hands over, and takes no writes meanwhile.
//!
//! # Promises
//!
//! - [`Engine::write`] returns `Ok` only for a command that a quorum holds on disk and this node has
//!   applied. An error says whether the command may have been applied nevertheless.
//! - [`Engine::read`] at [`ReadLevel::Linearizable`](crate::ReadLevel::Linearizable) sees every write acknowledged before it was called,
//!   by whichever node.
//! - A node that meets a fatal error (a failed fsync, a damaged record, a panic in `apply`, a peer that
//!   knows another data directory) stops acknowledging at once, and says why in [`NodeState::fatal`]. It
//!   is up to the process to exit.
//!
//! What it does not do: retry, or forward to the leader. That is the client's part.

mod agreement;
mod clock;
mod compaction;
mod config;
mod formation;
mod health;
mod leadership;
#[cfg(test)]
mod lone;
mod membership;
mod memory;
mod opening;
mod quota;
pub mod ranges;
mod reads;
mod replication;
mod sessions;
mod settings;
mod standing;
mod status;
mod transfer;
mod wake;
mod writes;

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};

pub use config::{DiskPolicy, EngineConfig, Limits, MIN_MEMORY_BYTES, PeerPolicy, SnapshotPolicy, Timing};
pub use formation::Forming;
pub use membership::{CATCH_UP_PATIENCE, MemberList, MemberState, NewAddresses, NewMember};
pub use memory::available_bytes as available_memory_bytes;
pub use quota::QuotaError;
pub(crate) use ranges::check_node_id;
pub use replication::{
    Counters, InFlight, Lag, LedPeer, PeerStanding, PeerState, READ_LEVELS, ReadWait, Refused,
    SYNCING_ENTRIES,
};
pub use sessions::{ClosedSession, MAX_LISTED_SESSIONS, OpenedSession, SessionList};
pub use settings::Settings;
pub use status::{NodeState, NotReady, ReadOutcome, Status};
pub use writes::{Acknowledged, DEFAULT_ACK_TIMEOUT, WriteOptions, Written};

use self::config::NO_CLUSTER;
use self::memory::Memory;
use crate::error::{FatalError, OpenError, StorageError};
use crate::machine::StateMachine;
pub use crate::raft::activity::{Activity, LATENCY_BUCKETS_US, Latency, SessionTotals, Snapshots};
use crate::raft::apply::Applier;
use crate::raft::core::{Core, CoreConfig, Parts};
use crate::raft::network::addresses::Addresses;
use crate::raft::network::admission::Claim;
use crate::raft::network::client::{Caller, PeerClients};
use crate::raft::network::grpc::{self, GrpcTransport};
use crate::raft::network::service::Callee;
pub use crate::raft::network::traffic::Carried;
use crate::raft::network::upstream::Upstream;
use crate::raft::network::{PeerDoor, Transport};
pub(crate) use crate::raft::published::CurrentHistory;
use crate::runtime::{self, WallClock, offload};
use crate::storage::{
    DataDir, DiskWatch, LogStats, LogStore, Room, SledOptions, SledStore, SnapshotDir, SnapshotStore, lease,
};
pub use crate::storage::{DiskState, DiskStatus, StartProgress, StartStep, StartedSoFar};
use crate::types::{HistoryEpoch, Incarnation, LogId, Member, Role};

/// One node of a replicated state machine. Cheap to clone; all clones are the same node.
pub struct Engine<M: StateMachine> {
    inner: Arc<Inner<M>>,
}

impl<M: StateMachine> Clone for Engine<M> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<M: StateMachine> std::fmt::Debug for Engine<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("state", &self.state()).finish()
    }
}

struct Inner<M: StateMachine> {
    core: Core<M>,
    caller: Caller,
    transport: Arc<dyn Transport>,
    /// This node's own line to whoever leads.
    upstream: Upstream,
    /// Held while the membership is being changed here.
    changes: tokio::sync::Mutex<()>,
    own: Member,
    config: EngineConfig,
    reads: reads::ReadIndexes,
    settings: watch::Sender<Settings>,
    inflight_bytes: AtomicUsize,
    wall_clock: WallClock,
    /// The quota on the state that this node could bear, if that is known.
    quota_bytes: Option<u64>,
    inflight_commands: AtomicUsize,
    counters: Counters,
    state: watch::Receiver<NodeState>,
    /// What the cluster waits for before there is one.
    forming: watch::Receiver<Option<Forming>>,
    fatal: watch::Sender<Option<FatalError>>,
    /// Set when the node is asked to stop, so that the end of its core is no surprise.
    stopping: Arc<AtomicBool>,
    /// True once the core has stopped and everything else is to follow.
    stop: watch::Sender<bool>,
    /// Closed when the data directory can be opened again.
    released: watch::Receiver<()>,
    log_stats: Option<Arc<LogStats>>,
    disk: DiskWatch,
    quorum_disks: Arc<health::QuorumDisks>,
}

/// What a node is made of, for those who bring their own: simulation, and tests.
pub struct EngineParts {
    /// Settings; the data directory and addresses to listen on are not used.
    pub config: EngineConfig,
    /// Identity of what the parts hold.
    pub incarnation: Incarnation,
    /// The durable log.
    pub log: Arc<dyn LogStore>,
    /// The snapshots.
    pub snapshots: Arc<dyn SnapshotStore>,
    /// How peers are reached.
    pub transport: Arc<dyn Transport>,
    /// The longest lease, in milliseconds, that whoever used these parts before may have promised; 0 if it was the same.
    pub promised_lease_ms: u64,
    /// Memory that the node may use, in bytes; `None` for a node that proposes no quota on the state.
    pub memory_bytes: Option<u64>,
}

impl<M: StateMachine> Engine<M> {
    /// Opens the node in `config.data_dir` and starts to take part in its cluster.
    ///
    /// Returns once the node listens and has recovered what it held; [`ready`](Self::ready) waits for a
    /// leader. The first start forms the cluster together with the other founding members.
    ///
    /// # Errors
    /// See [`OpenError`]. Nothing has been changed when opening fails.
    pub async fn open(mut config: EngineConfig, machine: M) -> Result<Self, OpenError> {
        config.validate()?;
        if runtime::unix_time_ms() == 0 {
            return Err(OpenError::Config(CLOCK_BEFORE_1970.to_owned()));
        }
        config.fit_disk()?;
        let _told = opening::tell_how_far(config.progress.clone());
        // Found out, it may be less than could be asked for.
        let memory = config.memory_bytes.map_or_else(Memory::of_this_process, Memory);
        memory.fit(&mut config.limits, &mut config.snapshots);
        let listener = match config.peer_listener.take() {
            Some(listener) => listener,
            None => TcpListener::bind(&config.peer_listen)
                .map_err(|source| OpenError::Listen { address: config.peer_listen.clone(), source })?,
        };
        if !config.join && config.initial_members.is_empty() && !DataDir::exists(&config.data_dir) {
            return Err(OpenError::Config(NO_CLUSTER.to_owned()));
        }
        let (path, cluster, node_id) = (config.data_dir.clone(), config.cluster.clone(), config.node_id);
        let tail_bytes = config.limits.log_tail_bytes;
        let reserve_bytes = config.disk.reserve_bytes;
        let progress = config.progress.clone();
        let lease_ms = config.timing.election_timeout_max_ms;
        let (log, snapshots, incarnation, promised_lease_ms) = offload(move || -> Result<_, StorageError> {
            let dir = DataDir::open(&path, &cluster, node_id)?;
            let room = match reserve_bytes {
                None | Some(0) => Room::give_up(dir.path()).map(|()| None)?,
                Some(bytes) => Some(Room::open(dir.path(), bytes)?),
            };
            // Before the log has all the room there is, on a disk that is full.
            let promised_lease_ms = lease::promise(dir.path(), lease_ms)?;
            let options = SledOptions { tail_bytes, progress: progress.clone(), ..SledOptions::default() };
            let (snapshot_dir, incarnation) = (dir.snapshot_dir(), dir.identity().incarnation);
            let log = SledStore::open_in(dir, options, room.clone())?;
            let snapshots = SnapshotDir::open_in_room(&snapshot_dir, room, progress)?;
            Ok((log, snapshots, incarnation, promised_lease_ms))
        })
        .await?;
        let transport = GrpcTransport::default();
        let traffic = transport.counts();
        let (log, data_dir): (Arc<dyn LogStore>, _) = (Arc::new(log), config.data_dir.clone());
        let parts = EngineParts {
            incarnation,
            log: log.clone(),
            snapshots: Arc::new(snapshots),
            transport: Arc::new(transport),
            promised_lease_ms,
            memory_bytes: Some(memory.0),
            config,
        };
        let engine = Self::start(parts, machine).await?;
        if promised_lease_ms > lease_ms {
            until_stopped(&engine.inner.stop, settle_lease(log, data_dir, promised_lease_ms, lease_ms));
        }
        grpc::serve(listener, engine.peer_door(), traffic, engine.inner.stop.subscribe())
            .map_err(|source| OpenError::Listen { address: engine.inner.own.peer.clone(), source })?;
        Ok(engine)
    }

    /// The history that positions of this node belong to: to be kept with every position that is to be brought back,
    /// and given along with it. [`UNKNOWN`](HistoryEpoch::UNKNOWN) on a node that has not applied anything yet.
    pub fn history(&self) -> HistoryEpoch {
        self.inner.core.published().history().epoch()
    }

    /// The same, for those who name it with every answer.
    pub(crate) fn current_history(&self) -> CurrentHistory {
        self.inner.core.published().history().clone()
    }

    /// Starts a node from parts. Its caller carries messages to [`peer_door`](Self::peer_door).
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn start(parts: EngineParts, machine: M) -> Result<Self, OpenError> {
        let EngineParts { config, incarnation, log, snapshots, transport, promised_lease_ms, memory_bytes } =
            parts;
        config.validate()?;
        let (log_stats, stall_ms) = (log.stats().cloned(), config.disk.stall_ms);
        let disk = log.watch_disk((stall_ms > 0).then(|| Duration::from_millis(stall_ms)));
        let (release, released) = watch::channel(());
        log.on_closed(Box::new(move || drop(release)));
        let memory = memory_bytes.map(Memory);
        let recovery = snapshots.clone();
        let node_id = config.node_id;
        let mut applier = offload(move || Applier::recover(node_id, machine, recovery)).await?;
        check_coverage(&config, &*log, &applier)?;
        if let Some(memory) = memory {
            applier.bound_snapshot_lag(memory.snapshot_lag_bytes());
        }
        let counting = opening::count_applied(&config.progress, &*log, &applier);
        let recovery = log.clone();
        let replayed = offload(move || applier.replay(&*recovery).map(|()| applier)).await;
        let applier = replayed.map_err(|error| OpenError::Core(error.to_string()))?;
        let (fatal, stop) = (watch::Sender::new(None), watch::Sender::new(false));
        let (refused, refusals) = mpsc::channel(standing::MAX_REFUSALS);
        let caller = Caller {
            cluster: config.cluster.clone(),
            node_id: config.node_id,
            incarnation,
            peer: config.peer_advertise.clone(),
            addresses: Arc::new(Addresses::new(config.initial_members.clone())),
            refused: Arc::new(move |refusal| {
                // One that finds no room comes again.
                let _ = refused.try_send(refusal.clone());
            }),
        };
        let (claimed, claims) = mpsc::channel(standing::MAX_CLAIMS);
        let (announcements, announced) = mpsc::channel(leadership::MAX_ANNOUNCEMENTS);
        let callee = Callee {
            cluster: config.cluster.clone(),
            node_id: config.node_id,
            incarnation,
            peer_address: config.peer_advertise.clone(),
            client_address: config.client_advertise.clone(),
            joins: config.join,
            founders: config.initial_members.clone(),
            claimed: look_into_claims(&config, claimed),
            announcements,
            disk: disk.clone(),
            quota_bytes: memory.map(Memory::quota_bytes),
        };
        let own = Member {
            peer: config.peer_advertise.clone(),
            client: config.client_advertise.clone(),
            incarnation,
            ..Member::default()
        };
        let redial_pause = Duration::from_millis(config.peers.reconnect_interval_ms);
        let clients = PeerClients::new(caller.clone(), transport.clone(), redial_pause);
        let upstream = Upstream::new(caller.clone(), transport.clone());
        let core_parts = Parts { log, snapshots, applier, clients, callee };
        let core = Core::start(&core_config(&config, promised_lease_ms), core_parts)
            .await
            .map_err(OpenError::Core)?;
        drop(counting);
        config.progress.begin(StartStep::Done, 0);
        if !config.join && config.initial_members.is_empty() && !core.is_initialized().await {
            core.shutdown().await;
            return Err(OpenError::Config(NO_CLUSTER.to_owned()));
        }

        let founders = config.initial_members.clone();
        let (forming_tx, forming) = watch::channel(match core.is_initialized().await {
            true => None,
            false if config.join => Some(Forming::ToBeAdded),
            false => Some(Forming::first(config.node_id, &founders)),
        });
        let formation = formation::Formation {
            forming: forming_tx,
            core: core.clone(),
            transport: transport.clone(),
            caller: caller.clone(),
            own: own.clone(),
            fatal: fatal.clone(),
            founders,
            joins: config.join,
        };
        until_stopped(&stop, formation.run());
        let standing = standing::Standing {
            core: core.clone(),
            transport: transport.clone(),
            caller: caller.clone(),
            refusals,
            claims,
            founders: config.initial_members.clone(),
            joins: config.join,
            fatal: fatal.clone(),
        };
        until_stopped(&stop, standing.run());
        let settings = watch::Sender::new(Settings::of(&config));
        until_stopped(&stop, compaction::run(core.clone(), settings.subscribe(), disk.clone()));
        let quorum_disks = Arc::new(health::QuorumDisks::default());
        let health = health::Health {
            core: core.clone(),
            own: config.node_id,
            disk: disk.clone(),
            quorum_disks: quorum_disks.clone(),
            patience: config.timing.patience(),
        };
        until_stopped(&stop, health.run());
        let election = config.timing.patience();
        until_stopped(&stop, transfer::follow_up(core.clone(), config.node_id, election, fatal.clone()));
        let stopping = Arc::new(AtomicBool::new(false));
        let (state_tx, state) = watch::channel(status::observe(&core, config.node_id, &disk, &forming, None));
        until_stopped(
            &stop,
            status::run(
                core.clone(),
                config.node_id,
                disk.clone(),
                forming.clone(),
                state_tx,
                fatal.clone(),
                stopping.clone(),
            ),
        );
        until_stopped(&stop, stop_when_fatal(core.clone(), fatal.subscribe()));
        let reads = reads::ReadIndexes::start(core.clone(), upstream.clone(), config.timing.patience());
        let inner = Arc::new(Inner {
            core,
            upstream,
            caller,
            transport,
            changes: tokio::sync::Mutex::default(),
            own,
            config,
            reads,
            settings,
            inflight_bytes: AtomicUsize::new(0),
            wall_clock: WallClock::of_this_node(),
            quota_bytes: memory.map(Memory::quota_bytes),
            inflight_commands: AtomicUsize::new(0),
            counters: Counters::default(),
            state,
            forming,
            fatal,
            stopping,
            stop,
            released,
            log_stats,
            disk,
            quorum_disks,
        });
        until_stopped(&inner.stop, leadership::run(Arc::downgrade(&inner), announced));
        until_stopped(&inner.stop, wake::run(Arc::downgrade(&inner)));
        until_stopped(&inner.stop, clock::watch_wall_clock(Arc::downgrade(&inner)));
        until_stopped(&inner.stop, agreement::run(Arc::downgrade(&inner)));
        until_stopped(&inner.stop, quota::run(Arc::downgrade(&inner)));
        let core = inner.core.clone();
        until_stopped(&inner.stop, async move { core.held().tell(|| core.voters()).await });
        Ok(Self { inner })
    }

    /// What this node shows to its peers; for those who bring their own transport.
    pub fn peer_door(&self) -> Arc<dyn PeerDoor> {
        self.inner.core.door()
    }

    /// The node's state at this moment.
    pub fn state(&self) -> NodeState {
        let fatal = self.inner.fatal.borrow().clone();
        let inner = &self.inner;
        status::observe(&inner.core, inner.config.node_id, &inner.disk, &inner.forming, fatal)
    }

    /// The node's state, and every change of it. Changes that follow each other closely are reported as
    /// one.
    pub fn watch(&self) -> watch::Receiver<NodeState> {
        self.inner.state.clone()
    }

    /// Waits until the node [is ready](NodeState::is_ready). False when `timeout` passes first, or the node
    /// stops.
    pub async fn ready(&self, timeout: Duration) -> bool {
        let mut state = self.watch();
        let ready = state.wait_for(|state| state.is_ready() || state.role == Role::Stopped);
        match tokio::time::timeout(timeout, ready).await {
            Ok(Ok(state)) => state.is_ready(),
            _ => false,
        }
    }

    /// What the log counts: flushes, their durations, entries and bytes.
    pub fn log_stats(&self) -> Option<&Arc<LogStats>> {
        self.inner.log_stats.as_ref()
    }

    /// What this node knows of its disk. Never waits for it.
    pub fn disk(&self) -> DiskStatus {
        self.inner.disk.status()
    }

    /// The watch behind [`disk`](Self::disk), if there is a disk.
    pub fn disk_watch(&self) -> Option<DiskWatch> {
        Some(self.inner.disk.clone()).filter(DiskWatch::watches)
    }

    /// Hands leadership over if this node leads, then stops. When it returns, the data directory can be
    /// opened again. Idempotent.
    pub async fn shutdown(&self) {
        let inner = &self.inner;
        wake::note_time(self).await;
        self.hand_over().await;
        inner.stopping.store(true, Ordering::Release);
        /// A wedged disk must not keep the process for ever.
        const LET_GO: Duration = Duration::from_secs(5);
        let deadline = tokio::time::Instant::now() + LET_GO;
        if tokio::time::timeout_at(deadline, inner.core.shutdown()).await.is_err() {
            tracing::error!("the core did not stop within {LET_GO:?}; its disk may hang");
        }
        // Whoever watches is to see the end.
        let mut state = self.watch();
        let _ = tokio::time::timeout_at(deadline, state.wait_for(|state| state.role == Role::Stopped)).await;
        inner.stop.send_replace(true);
        let mut released = inner.released.clone();
        // The core's last tasks end by themselves, and with the last of them the log is closed.
        if tokio::time::timeout_at(deadline, async { while released.changed().await.is_ok() {} })
            .await
            .is_err()
        {
            tracing::warn!("the log is still in use; the data directory stays locked until the process ends");
        }
    }

    /// Hands over if this node leads and somebody can.
    async fn hand_over(&self) {
        if self.inner.core.metrics().role == Role::Leader
            && let Err(error) = self.transfer_leader(None).await
        {
            tracing::warn!(%error, "stopping without handing over");
        }
    }
}

/// What to say on a machine that has forgotten the time. The consensus core cannot show its clock there.
const CLOCK_BEFORE_1970: &str =
    "this machine's clock is set to before 1970; set it, and start the node again";

/// Runs `task` until it ends or the node stops.
fn until_stopped(stop: &watch::Sender<bool>, task: impl Future<Output = ()> + Send + 'static) {
    let mut stop = stop.subscribe();
    runtime::spawn(async move {
        tokio::select! {
            biased;
            // An error means that every handle to the node is gone.
            _ = stop.wait_for(|stop| *stop) => {}
            () = task => {}
        }
    });
}

/// A node that must not go on stops its core, so that nothing more is acknowledged.
async fn stop_when_fatal<M: StateMachine>(core: Core<M>, mut fatal: watch::Receiver<Option<FatalError>>) {
    if fatal.wait_for(Option::is_some).await.is_ok() {
        core.shutdown().await;
    }
}

/// What to do when a caller expects another data directory of this node, which belongs to no cluster, or to one of its own.
fn look_into_claims(config: &EngineConfig, claims: mpsc::Sender<Claim>) -> Arc<dyn Fn(Claim) + Send + Sync> {
    let (node_id, peer) = (config.node_id, config.peer_advertise.clone());
    if config.join {
        // It has promised nothing yet and takes part in nothing before it is added.
        return Arc::new(move |claim| {
            tracing::debug!(
                known = %claim.expected,
                "the cluster knows node {node_id} by another data directory: `quorate member replace {node_id} --peer {peer}` puts this one in its place"
            );
        });
    }
    // One that finds no room comes again.
    Arc::new(move |claim| drop(claims.try_send(claim)))
}

/// A purged log is useless without the snapshot that covers what was purged.
fn check_coverage<M: StateMachine>(
    config: &EngineConfig,
    log: &dyn LogStore,
    applier: &Applier<M>,
) -> Result<(), StorageError> {
    let covered: Option<LogId> = applier.published().progress().log_id;
    let purged = log.bounds().purged;
    if purged.map(|p| p.index) > covered.map(|c| c.index) {
        return Err(StorageError::Lost {
            missing: config.data_dir.join("snapshots"),
            marker: config.data_dir.join("log"),
        });
    }
    Ok(())
}

/// Once a longer lease than the present one, which was promised before the restart, has run out, it binds no more.
/// The directory is locked for as long as its log is open.
async fn settle_lease(log: Arc<dyn LogStore>, data_dir: PathBuf, promised_ms: u64, lease_ms: u64) {
    tokio::time::sleep(Duration::from_millis(promised_ms)).await;
    let settled = offload(move || {
        let settled = lease::settle(&data_dir, lease_ms);
        drop(log);
        settled
    })
    .await;
    if let Err(error) = settled {
        // Then the next start is silent for longer than it need be.
        tracing::warn!(%error, "the shorter lease could not be noted");
    }
}

fn core_config(config: &EngineConfig, promised_lease_ms: u64) -> CoreConfig {
    CoreConfig {
        cluster: config.cluster.clone(),
        node_id: config.node_id,
        heartbeat_interval_ms: config.timing.heartbeat_interval_ms,
        election_timeout_min_ms: config.timing.election_timeout_min_ms,
        election_timeout_max_ms: config.timing.election_timeout_max_ms,
        promised_lease_ms,
        message_bytes: config.limits.append_message_bytes,
    }
}
