//! A node from its parts, in steps: what it held is recovered, its lines to peers are laid, the core is started, and then
//! the engine's own tasks, those that need no handle to the node first.
//!
//! A task that is given a handle is given a weak one, so that dropping the last one outside ends the node.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;

use super::progress::{self, Ending};
use crate::engine::anywhere::desk::LeaderDesk;
use crate::engine::cluster::membership::MemberChanges;
use crate::engine::cluster::{expulsion, formation, hand_over, leadership, versions};
use crate::engine::config::NO_CLUSTER;
use crate::engine::config::memory::Memory;
use crate::engine::read::ReaderIndexes;
use crate::engine::report::state::{self, StateObserver, TermLeader};
use crate::engine::stop::LET_GO;
use crate::engine::stop::fatal::{Consequence, Fatal};
use crate::engine::upkeep::disk_health::QuorumDisks;
use crate::engine::upkeep::{agreement, compaction, disk_health, event_log, quota, wake, wall_clock};
use crate::engine::{Counters, Engine, EngineConfig, EngineParts, Forming, Inner, NodeState, Settings};
use crate::error::{FatalError, OpenError, StorageError};
use crate::machine::StateMachine;
use crate::raft::apply::Applier;
use crate::raft::core::{Core, CoreConfig, Parts};
use crate::raft::network::Refusal;
use crate::raft::network::addresses::Addresses;
use crate::raft::network::admission::Claim;
use crate::raft::network::calls::MOST_CALLS;
use crate::raft::network::calls::room::Rooms;
use crate::raft::network::client::PeerClients;
use crate::raft::network::handshake::OwnHandshake;
use crate::raft::network::leader_line::{Announcement, LeaderLine};
use crate::raft::network::service::{Callee, Desk};
use crate::runtime::{Spawner, Tasks, WallClock, offload};
use crate::storage::{DiskWatch, LogStats, LogStore, StartStep};
use crate::types::{InitialState, Member, NodeId, Payload, Role};

impl<M: StateMachine> Engine<M> {
    /// Starts a node from parts. Its caller carries messages to [`peer_door`](Self::peer_door).
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn start(parts: EngineParts, machine: M) -> Result<Self, OpenError> {
        Self::start_with(NodeLife::begin(), parts, machine).await
    }

    /// The same, where parts may have failed already, and say so by `life`.
    pub(in crate::engine) async fn start_with(
        life: NodeLife,
        parts: EngineParts,
        machine: M,
    ) -> Result<Self, OpenError> {
        parts.config.validate()?;
        let store = Store::of(&parts);
        let (applier, initial_state, counting) = recover(&parts, machine).await?;
        let desk = LeaderDesk::new();
        let (lines, (clients, callee), inboxes) =
            lay_lines(&parts, &store.disk, &life, initial_state, desk.clone());
        let core_parts = Parts {
            log: parts.log.clone(),
            snapshots: parts.snapshots.clone(),
            applier,
            clients,
            callee,
            tasks: life.tasks.clone(),
        };
        let core_config = core_config(&parts.config, parts.promised_lease_ms);
        let core = Core::start(&core_config, core_parts).await.map_err(OpenError::Core)?;
        core.limit_snapshots(parts.config.snapshots.send_bytes_per_second);
        drop(counting);
        let config = &parts.config;
        config.progress.begin(StartStep::Done, 0);
        if !config.join && config.initial_members.is_empty() && !core.is_initialized().await {
            core.shutdown().await;
            let mut released = store.released;
            drop((core, lines, parts));
            // Whoever opens the directory again finds it unlocked, unless its disk hangs.
            let _ = timeout(LET_GO, async { while released.changed().await.is_ok() {} }).await;
            return Err(OpenError::Config(NO_CLUSTER.to_owned()));
        }
        let node = Assembly::new(core, (parts, store), (lines, initial_state), life);
        let (forming, waits_for) = node.forming().await;
        let (state, known_leader, consequence) = node.watch_itself(&waits_for);
        node.belong(forming, &state, inboxes.refusals, inboxes.claims);
        let quorum_disks = node.look_after_itself(&state);
        let inner = node.finish(waits_for, quorum_disks, (state, known_leader), consequence);
        desk.open(Arc::downgrade(&inner));
        serve_cluster(&inner, inboxes.announced);
        Ok(Self::outside(inner))
    }
}

/// What the log's store tells of itself.
struct Store {
    stats: Option<Arc<LogStats>>,
    disk: DiskWatch,
    /// Closed when what the store held can be opened again.
    released: watch::Receiver<()>,
}

impl Store {
    fn of(parts: &EngineParts) -> Self {
        let (log, stall_ms) = (&parts.log, parts.config.disk.stall_ms);
        let (release, released) = watch::channel(());
        log.on_closed(Box::new(move || drop(release)));
        let disk = log.watch_disk((stall_ms > 0).then(|| Duration::from_millis(stall_ms)));
        Self { stats: log.stats().cloned(), disk, released }
    }
}

/// See [`StateMachine::counts_from_nothing`].
const COUNTS_TOO_EARLY: &str = "a machine that is added to others must count no bytes of state before anything is applied to it: have its `state_bytes` begin at 0";

/// The machine as it was, from the newest snapshot and the log after it, and its initial state if there was neither. What is
/// returned beside them counts what the core applies while it starts.
async fn recover<M: StateMachine>(
    parts: &EngineParts,
    machine: M,
) -> Result<(Applier<M>, Option<InitialState>, Ending), OpenError> {
    if !M::counts_from_nothing() {
        return Err(OpenError::Config(COUNTS_TOO_EARLY.to_owned()));
    }
    let (node_id, snapshots) = (parts.config.node_id, parts.snapshots.clone());
    let event_log = parts.event_log.clone();
    let mut applier = offload(move || Applier::recover(node_id, machine, snapshots, event_log)).await?;
    check_coverage(&parts.config, &*parts.log, &applier)?;
    if let Some(bytes) = parts.memory_bytes {
        applier.bound_snapshot_lag(Memory(bytes).pinned_bytes());
    }
    let counting = progress::count_applied(&parts.config.progress, &*parts.log, &applier);
    let (log, is_restored) = (parts.log.clone(), parts.config.restore);
    let replayed = offload(move || -> io::Result<_> {
        let is_new = log.bounds().last.is_none() && applier.published().progress().log_id.is_none();
        let initial_state = if is_new { applier.initial_state(is_restored) } else { None };
        if is_new && is_restored && initial_state.is_none() {
            return Err(io::Error::other(
                "the state that is to be restored cannot be hashed; the log says why",
            ));
        }
        if begins_restored(&*log)? {
            applier.begins_restored();
        }
        applier.replay(&*log)?;
        Ok((applier, initial_state))
    });
    let (applier, initial_state) = replayed.await.map_err(|error| OpenError::Core(error.to_string()))?;
    Ok((applier, initial_state, counting))
}

/// Whether `log` still holds the founding membership of a cluster whose state was restored.
fn begins_restored(log: &dyn LogStore) -> io::Result<bool> {
    let bounds = log.bounds();
    if bounds.purged.is_some() || bounds.last.is_none() {
        return Ok(false);
    }
    let first = log.read(0, 1, usize::MAX)?;
    let founders = first.first().and_then(|entry| match &entry.payload {
        Payload::Membership(founders) => founders.founding(),
        Payload::Blank | Payload::Command(_) => None,
    });
    Ok(founders.is_some_and(|(_, founding)| founding.state.is_restored))
}

/// A purged log is useless without the snapshot that covers what was purged.
fn check_coverage<M: StateMachine>(
    config: &EngineConfig,
    log: &dyn LogStore,
    applier: &Applier<M>,
) -> Result<(), StorageError> {
    let covered = applier.published().progress().log_id;
    let purged = log.bounds().purged;
    if purged.map(|p| p.index) > covered.map(|c| c.index) {
        return Err(StorageError::Lost {
            missing: config.data_dir.join("snapshots"),
            marker: config.data_dir.join("log"),
        });
    }
    Ok(())
}

/// How the parts of a node learn of its end.
pub(in crate::engine) struct NodeLife {
    fatal: Fatal,
    stop: watch::Sender<bool>,
    stopping: Arc<AtomicBool>,
    tasks: Tasks,
}

impl NodeLife {
    /// A task that fails is the end of the node.
    pub(in crate::engine) fn begin() -> Self {
        let (fatal, stop) = (Fatal::new(), watch::Sender::new(false));
        let stopping = Arc::new(AtomicBool::new(false));
        let failed = failing(&fatal, &stopping);
        let tasks = Tasks::new(stop.subscribe(), move |name, failure| {
            failed(FatalError::Task { name, failure: failure.to_string() });
        });
        Self { fatal, stop, stopping, tasks }
    }

    /// Says that something has failed which is the end of the node, unless that is being stopped anyway.
    pub(in crate::engine) fn failing(&self) -> impl Fn(FatalError) + Send + Sync + use<> {
        failing(&self.fatal, &self.stopping)
    }
}

fn failing(fatal: &Fatal, stopping: &Arc<AtomicBool>) -> impl Fn(FatalError) + Send + Sync + use<> {
    let (fatal, stopping) = (fatal.clone(), stopping.clone());
    move |error| match stopping.load(Ordering::Acquire) {
        true => tracing::error!(%error, "something has failed while the node stops"),
        false => fatal.report(error),
    }
}

/// What the engine itself says to peers.
struct Lines {
    handshake: OwnHandshake,
    leader_line: LeaderLine,
}

/// What peers say that is for the engine to look into.
struct Inboxes {
    refusals: mpsc::Receiver<Refusal>,
    claims: mpsc::Receiver<Claim>,
    announced: mpsc::Receiver<(NodeId, Announcement)>,
}

/// The node's lines to its peers: the engine's, the core's, and what comes in on either.
fn lay_lines(
    parts: &EngineParts,
    disk: &DiskWatch,
    life: &NodeLife,
    initial_state: Option<InitialState>,
    desk: Arc<dyn Desk>,
) -> (Lines, (PeerClients, Callee), Inboxes) {
    let EngineParts { config, transport, .. } = parts;
    let failed = life.failing();
    let (refused, refusals) = mpsc::channel::<Refusal>(expulsion::MAX_REFUSALS);
    let (claimed, claims) = mpsc::channel(expulsion::MAX_CLAIMS);
    let (announcements, announced) = mpsc::channel(leadership::MAX_ANNOUNCEMENTS);
    let handshake = OwnHandshake {
        cluster: config.cluster.clone(),
        node_id: config.node_id,
        incarnation: parts.incarnation,
        peer: config.peer_advertise.clone(),
        addresses: Arc::new(Addresses::new(config.initial_members.clone())),
        refused: Arc::new(move |refusal| {
            // One that finds no room comes again.
            let _ = refused.try_send(refusal.clone());
        }),
    };
    let callee = Callee {
        cluster: config.cluster.clone(),
        node_id: config.node_id,
        incarnation: parts.incarnation,
        peer_address: config.peer_advertise.clone(),
        client_address: config.client_advertise.clone(),
        joins: config.join,
        founders: config.initial_members.clone(),
        claimed: look_into_claims(config, claimed),
        announcements,
        desk,
        disk: disk.clone(),
        quota_bytes: parts.memory_bytes.map(|bytes| Memory(bytes).quota_bytes()),
        initial_state,
        outdated: Arc::new(move |reason| failed(FatalError::Outdated { reason })),
    };
    let redial_pause = Duration::from_millis(config.peers.reconnect_interval_ms);
    let clients = PeerClients::new(handshake.clone(), transport.clone(), redial_pause);
    let leader_line = LeaderLine::new(handshake.clone(), transport.clone());
    (Lines { handshake, leader_line }, (clients, callee), Inboxes { refusals, claims, announced })
}

/// What to do when a caller expects another data directory of this node, which belongs to no cluster yet.
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

/// A node that has a core, and nobody who could ask it for anything yet.
struct Assembly<M: StateMachine> {
    core: Core<M>,
    parts: EngineParts,
    store: Store,
    lines: Lines,
    initial_state: Option<InitialState>,
    own: Member,
    settings: watch::Sender<Settings>,
    life: NodeLife,
}

impl<M: StateMachine> Assembly<M> {
    fn new(
        core: Core<M>,
        (parts, store): (EngineParts, Store),
        (lines, initial_state): (Lines, Option<InitialState>),
        life: NodeLife,
    ) -> Self {
        let own = Member {
            peer: parts.config.peer_advertise.clone(),
            client: parts.config.client_advertise.clone(),
            incarnation: parts.incarnation,
            ..Member::default()
        };
        let settings = watch::Sender::new(Settings::of(&parts.config));
        Self { core, parts, store, lines, initial_state, own, settings, life }
    }

    /// What the node waits for before it belongs to a cluster.
    async fn forming(&self) -> (watch::Sender<Option<Forming>>, watch::Receiver<Option<Forming>>) {
        let config = &self.parts.config;
        watch::channel(match self.core.is_initialized().await {
            true => None,
            false if config.join => Some(Forming::ToBeAdded),
            false => Some(Forming::first(config.node_id, &config.initial_members)),
        })
    }

    /// Has the node come into a cluster, and notice when it belongs to it no more.
    fn belong(
        &self,
        forming: watch::Sender<Option<Forming>>,
        state: &watch::Receiver<NodeState>,
        refusals: mpsc::Receiver<Refusal>,
        claims: mpsc::Receiver<Claim>,
    ) {
        let config = &self.parts.config;
        let (founders, joins) = (config.initial_members.clone(), config.join);
        let (doubts, doubted) = watch::channel(None);
        let formation = formation::Formation {
            forming,
            core: self.core.clone(),
            transport: self.parts.transport.clone(),
            handshake: self.lines.handshake.clone(),
            own: self.own.clone(),
            initial_state: self.initial_state,
            fatal: self.life.fatal.clone(),
            doubts: doubted,
            founders: founders.clone(),
            joins,
        };
        self.life.tasks.passing("formation", formation.run());
        let expulsion = expulsion::Expulsion {
            core: self.core.clone(),
            transport: self.parts.transport.clone(),
            handshake: self.lines.handshake.clone(),
            refusals,
            claims,
            founders,
            joins,
            state: state.clone(),
            fatal: self.life.fatal.clone(),
            doubts,
        };
        self.life.tasks.permanent("standing", expulsion.run());
    }

    /// Has the node see to its log, its disk, and leads that it hands over.
    fn look_after_itself(&self, state: &watch::Receiver<NodeState>) -> Arc<QuorumDisks> {
        let Self { core, parts: EngineParts { config, .. }, store: Store { disk, .. }, .. } = self;
        let tasks = &self.life.tasks;
        tasks.permanent("compaction", compaction::run(core.clone(), self.settings.subscribe(), disk.clone()));
        if core.feed().log().is_some() {
            tasks.permanent("event-log", event_log::run(core.feed().clone(), disk.clone()));
        }
        let quorum_disks = Arc::new(QuorumDisks::default());
        let health = disk_health::DiskHealth {
            core: core.clone(),
            own: config.node_id,
            disk: disk.clone(),
            quorum_disks: quorum_disks.clone(),
            patience: config.timing.patience(),
            state: state.clone(),
        };
        if disk.watches() {
            tasks.permanent("disk-health", health.run());
        }
        let election = config.timing.patience();
        tasks.permanent(
            "hand-over",
            hand_over::follow_up(core.clone(), config.node_id, election, self.life.fatal.clone()),
        );
        let core = core.clone();
        tasks.permanent("held-by-all", async move { core.durable_positions().tell(|| core.voters()).await });
        quorum_disks
    }

    /// Has the node say what it is, and stop when it must not go on: that is what is returned beside it.
    fn watch_itself(
        &self,
        forming: &watch::Receiver<Option<Forming>>,
    ) -> (watch::Receiver<NodeState>, watch::Receiver<TermLeader>, Arc<Consequence>) {
        let observer = StateObserver {
            core: self.core.clone(),
            node_id: self.parts.config.node_id,
            disk: self.store.disk.clone(),
            forming: forming.clone(),
        };
        let (state, told) = watch::channel(observer.observe(None));
        let consequence = stop_the_core(self.core.clone(), state.clone());
        self.life.fatal.leads_to(&consequence);
        let (fatal, stopping) = (self.life.fatal.clone(), self.life.stopping.clone());
        let (leader, known_leader) = watch::channel(TermLeader::default());
        self.life.tasks.permanent("state", state::run(observer, (state, leader), fatal, stopping));
        (told, known_leader, consequence)
    }

    fn finish(
        self,
        forming: watch::Receiver<Option<Forming>>,
        quorum_disks: Arc<QuorumDisks>,
        (state, known_leader): (watch::Receiver<NodeState>, watch::Receiver<TermLeader>),
        consequence: Arc<Consequence>,
    ) -> Arc<Inner<M>> {
        let Self { core, parts, store, lines, own, settings, life, initial_state: _ } = self;
        let patience = parts.config.timing.patience();
        let reads = ReaderIndexes::start(core.clone(), lines.leader_line.clone(), patience, &life.tasks);
        Arc::new(Inner {
            core,
            leader_line: lines.leader_line,
            handshake: lines.handshake,
            transport: parts.transport,
            passed_on: Rooms::with(|| Semaphore::new(MOST_CALLS)),
            changes: MemberChanges::default(),
            own,
            config: parts.config,
            reads,
            settings,
            inflight_bytes: AtomicUsize::new(0),
            waiting_bytes: AtomicUsize::new(0),
            wall_clock: WallClock::of_this_node(),
            quota_bytes: parts.memory_bytes.map(|bytes| Memory(bytes).quota_bytes()),
            #[cfg(feature = "server")]
            snapshots: parts.snapshots,
            pinned_bytes: parts.memory_bytes.map_or(u64::MAX, |bytes| Memory(bytes).pinned_bytes()),
            inflight_commands: AtomicUsize::new(0),
            counters: Counters::default(),
            state,
            known_leader,
            forming,
            fatal: life.fatal,
            _consequence: consequence,
            tasks: life.tasks,
            stopping: life.stopping,
            stop: life.stop,
            released: store.released,
            log_stats: store.stats,
            disk: store.disk,
            quorum_disks,
        })
    }
}

/// A node that must not go on says so and stops its core, so that nothing more is acknowledged. No task is needed for
/// this that might be the one that has failed.
fn stop_the_core<M: StateMachine>(core: Core<M>, state: watch::Sender<NodeState>) -> Arc<Consequence> {
    let spawner = Spawner::of_this_task();
    Arc::new(move |fatal: &FatalError| {
        state.send_modify(|state| {
            (state.role, state.leader) = (Role::Stopped, None);
            state.fatal = Some(fatal.clone());
        });
        let core = core.clone();
        spawner.spawn(async move { core.shutdown().await });
    })
}

/// Has the node do what it owes its cluster.
fn serve_cluster<M: StateMachine>(node: &Arc<Inner<M>>, announced: mpsc::Receiver<(NodeId, Announcement)>) {
    let (tasks, handle) = (&node.tasks, || Arc::downgrade(node));
    tasks.permanent("leadership", leadership::run(handle(), announced));
    tasks.permanent("wake-ups", wake::run(handle()));
    tasks.permanent("wall-clock", wall_clock::watch_wall_clock(handle()));
    tasks.permanent("agreement", agreement::run(handle()));
    tasks.passing("quota", quota::run(handle()));
    tasks.passing("versions", versions::run(handle()));
}
