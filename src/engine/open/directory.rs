//! A node from its data directory: what is found there is checked, locked and read, and then assembled.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::assemble::NodeLife;
use super::progress;
use crate::engine::config::NO_CLUSTER;
use crate::engine::config::memory::Memory;
use crate::engine::{DiskPolicy, Engine, EngineConfig, EngineParts};
use crate::error::{FatalError, OpenError, StorageError};
use crate::feed::EventLog;
use crate::machine::StateMachine;
use crate::raft::network::grpc::{self, GrpcTransport};
use crate::runtime::{self, offload};
use crate::storage::{DataDir, Failure, LogStore, Room, SledOptions, SledStore, SnapshotDir, lease};
use crate::trust::peers::PeerAuthenticator;
use crate::types::Incarnation;

/// What to say on a machine that has forgotten the time. The consensus core cannot show its clock there.
const CLOCK_BEFORE_1970: &str =
    "this machine's clock is set to before 1970; set it, and start the node again";

/// What was found in a data directory.
struct FoundDirectory {
    /// Holds the directory's lock for as long as it is open.
    log: SledStore,
    snapshots: SnapshotDir,
    incarnation: Incarnation,
    event_log: EventLog,
    /// The longest lease that a leader may still rely on, in milliseconds.
    promised_lease_ms: u64,
}

impl<M: StateMachine> Engine<M> {
    /// Opens the node in `config.data_dir` and starts to take part in its cluster.
    ///
    /// Returns once the node listens and has recovered what it held; [`ready`](Self::ready) waits for a
    /// leader. The first start forms the cluster together with the other founding members.
    ///
    /// # Errors
    /// See [`OpenError`]. Nothing has been changed when opening fails.
    pub async fn open(config: EngineConfig, machine: M) -> Result<Self, OpenError> {
        // What opens a node is large, and programs carry this future about.
        Box::pin(Self::open_directory(config, machine)).await
    }

    /// As [`open`](Self::open), for the founding members of a cluster that is to begin with the state of `machine`: one that was read
    /// from a backup, say, or from what came before. It must be the same on all of them, and restored on all of them. They keep it in a
    /// snapshot from the beginning, and members that are added later receive it, whatever their own machines begin with.
    ///
    /// Positions in the log and elapsed time begin at 0 again. A machine that remembers some, such as deadlines, is to be given
    /// new ones by the program before; the key-value machine keeps the revisions of its keys, and those of new writes are below them.
    ///
    /// The same call again, on a node that has formed the cluster already, does what [`open`](Self::open) does. Until the first
    /// snapshot is written, which is at once, a node must be started with that state again.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn restore(mut config: EngineConfig, machine: M) -> Result<Self, OpenError> {
        config.restore = true;
        // What opens a node is large, and programs carry this future about.
        Box::pin(Self::open_directory(config, machine)).await
    }

    async fn open_directory(mut config: EngineConfig, machine: M) -> Result<Self, OpenError> {
        let memory = fit(&mut config)?;
        let _told = progress::tell_how_far(config.progress.clone());
        let listener = listen(&mut config)?;
        if !config.join && config.initial_members.is_empty() && !DataDir::exists(&config.data_dir) {
            return Err(OpenError::Config(NO_CLUSTER.to_owned()));
        }
        let lease_ms = config.timing.election_timeout_max_ms;
        let life = NodeLife::begin();
        let authenticator =
            PeerAuthenticator::open(&config.peer_trust, &config.cluster, config.node_id).await;
        let authenticator = authenticator.map_err(|error| OpenError::Config(error.to_string()))?;
        let found = read_directory(&config, lease_ms, life.failing()).await?;
        let promised_lease_ms = found.promised_lease_ms;
        let (log, data_dir): (Arc<dyn LogStore>, _) = (Arc::new(found.log), config.data_dir.clone());
        let transport = GrpcTransport::secured(authenticator.clone());
        let traffic = transport.counts();
        let parts = EngineParts {
            incarnation: found.incarnation,
            log: log.clone(),
            snapshots: Arc::new(found.snapshots),
            transport: Arc::new(transport),
            promised_lease_ms,
            event_log: Some(Arc::new(found.event_log)),
            memory_bytes: Some(memory.0),
            config,
        };
        let engine = Self::start_with(life, parts, machine).await?;
        let (inner, tasks) = (&engine.inner, &engine.inner.tasks);
        match grpc::serve(
            listener,
            engine.peer_door(),
            traffic,
            authenticator.clone(),
            inner.stop.subscribe(),
        ) {
            Ok(port) => tasks.permanent("peer-port", port),
            Err(source) => {
                engine.shutdown().await;
                return Err(OpenError::Listen { address: inner.own.peer.clone(), source });
            }
        }
        if let Some(authenticator) = authenticator.filter(|authenticator| authenticator.has_files()) {
            tasks.permanent("peer-credentials", authenticator.keep_fresh());
        }
        if promised_lease_ms > lease_ms {
            tasks.passing("lease-settlement", settle_lease(log, data_dir, promised_lease_ms, lease_ms));
        }
        Ok(engine)
    }
}

/// Checks `config`, and makes it fit this machine. Returns the memory that the node has.
fn fit(config: &mut EngineConfig) -> Result<Memory, OpenError> {
    config.validate()?;
    if runtime::unix_time_ms() == 0 {
        return Err(OpenError::Config(CLOCK_BEFORE_1970.to_owned()));
    }
    config.fit_disk()?;
    // Found out, it may be less than could be asked for.
    let memory = config.memory_bytes.map_or_else(Memory::of_this_process, Memory);
    memory.fit(&mut config.limits, &mut config.snapshots);
    Ok(memory)
}

/// The peer port, opened here unless it was brought along.
fn listen(config: &mut EngineConfig) -> Result<TcpListener, OpenError> {
    match config.peer_listener.take() {
        Some(listener) => Ok(listener),
        None => TcpListener::bind(&config.peer_listen)
            .map_err(|source| OpenError::Listen { address: config.peer_listen.clone(), source }),
    }
}

/// Locks the data directory and reads it, for a node that promises its leaders a lease of `lease_ms` from now on. A log that
/// fails has `failed` called at once, whether or not it is written to again.
async fn read_directory(
    config: &EngineConfig,
    lease_ms: u64,
    failed: impl Fn(FatalError) + Send + Sync + 'static,
) -> Result<FoundDirectory, StorageError> {
    let (path, cluster, node_id) = (config.data_dir.clone(), config.cluster.clone(), config.node_id);
    let tail_bytes = config.limits.log_tail_bytes;
    let DiskPolicy { reserve_bytes, .. } = config.disk;
    let (progress, event_log) = (config.progress.clone(), config.event_log);
    offload(move || -> Result<_, StorageError> {
        let dir = DataDir::open(&path, &cluster, node_id)?;
        let room = match reserve_bytes {
            None | Some(0) => Room::give_up(dir.path()).map(|()| None)?,
            Some(bytes) => Some(Room::open(dir.path(), bytes)?),
        };
        // Before the log has all the room there is, on a disk that is full.
        let promised_lease_ms = lease::promise(dir.path(), lease_ms)?;
        let SledOptions { on_failure, .. } = SledOptions::default();
        let on_failure = Arc::new(move |failure: &Failure| {
            on_failure(failure);
            failed(FatalError::Core(format!("the log has failed for good: {}", failure.reason)));
        });
        let options =
            SledOptions { tail_bytes, on_failure, progress: progress.clone(), ..SledOptions::default() };
        let (snapshot_dir, incarnation) = (dir.snapshot_dir(), dir.identity().incarnation);
        let event_log = EventLog::open(&dir.event_dir(), event_log)?;
        let log = SledStore::open_in(dir, options, room.clone())?;
        let snapshots = SnapshotDir::open_in_room(&snapshot_dir, room, progress)?;
        Ok(FoundDirectory { log, snapshots, incarnation, event_log, promised_lease_ms })
    })
    .await
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
