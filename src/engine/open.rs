//! A node from its data directory: what is found there is checked, locked and read, and then assembled.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::assemble::Life;
use super::config::NO_CLUSTER;
use super::memory::Memory;
use super::{DiskPolicy, Engine, EngineConfig, EngineParts, opening};
use crate::error::{FatalError, OpenError, StorageError};
use crate::machine::StateMachine;
use crate::raft::network::grpc::{self, GrpcTransport};
use crate::runtime::{self, offload};
use crate::storage::{
    Completion, DataDir, Failure, LogBounds, LogStore, Room, SledOptions, SledStore, SnapshotDir, lease,
};
use crate::types::{Entry, Incarnation, LogId, Vote};

/// What to say on a machine that has forgotten the time. The consensus core cannot show its clock there.
const CLOCK_BEFORE_1970: &str =
    "this machine's clock is set to before 1970; set it, and start the node again";

/// A log store and the lock on its directory. Fields are dropped in their order: the log is closed, then the
/// lock released, and then whoever waits is told.
struct LockedLog {
    log: SledStore,
    dir: DataDir,
    _released: watch::Sender<()>,
}

/// What was found in a data directory.
struct Found {
    log: Arc<LockedLog>,
    snapshots: SnapshotDir,
    incarnation: Incarnation,
    /// The longest lease that a leader may still rely on, in milliseconds.
    promised_lease_ms: u64,
    /// Closed when the directory can be opened again.
    released: watch::Receiver<()>,
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
        let memory = fit(&mut config)?;
        let _told = opening::tell_how_far(config.progress.clone());
        let listener = listen(&mut config)?;
        if !config.join && config.initial_members.is_empty() && !DataDir::exists(&config.data_dir) {
            return Err(OpenError::Config(NO_CLUSTER.to_owned()));
        }
        let lease_ms = config.timing.election_timeout_max_ms;
        let stall = (config.disk.stall_ms > 0).then(|| Duration::from_millis(config.disk.stall_ms));
        let life = Life::begin();
        let found = read_directory(&config, lease_ms, life.failing()).await?;
        let (log, promised_lease_ms) = (found.log.clone(), found.promised_lease_ms);
        let transport = GrpcTransport::default();
        let traffic = transport.counts();
        let parts = EngineParts {
            incarnation: found.incarnation,
            log_stats: Some(log.log.stats().clone()),
            released: Some(found.released),
            disk: log.log.watch_disk(stall),
            log: found.log,
            snapshots: Arc::new(found.snapshots),
            transport: Arc::new(transport),
            promised_lease_ms,
            memory_bytes: Some(memory.0),
            config,
        };
        let engine = Self::start_with(life, parts, machine).await?;
        let (inner, tasks) = (&engine.inner, &engine.inner.tasks);
        let port = grpc::serve(listener, engine.peer_door(), traffic, inner.stop.subscribe())
            .map_err(|source| OpenError::Listen { address: inner.own.peer.clone(), source })?;
        tasks.permanent("peer-port", port);
        if promised_lease_ms > lease_ms {
            tasks.passing("lease-settlement", settle_lease(log, promised_lease_ms, lease_ms));
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
) -> Result<Found, StorageError> {
    let (path, cluster, node_id) = (config.data_dir.clone(), config.cluster.clone(), config.node_id);
    let tail_bytes = config.limits.log_tail_bytes;
    let DiskPolicy { reserve_bytes, .. } = config.disk;
    let progress = config.progress.clone();
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
        let log = SledStore::open_in_room(&dir, options, room.clone())?;
        let snapshots = SnapshotDir::open_in_room(&dir.snapshot_dir(), room, progress)?;
        let incarnation = dir.identity().incarnation;
        let (release, released) = watch::channel(());
        let log = Arc::new(LockedLog { log, dir, _released: release });
        Ok(Found { log, snapshots, incarnation, promised_lease_ms, released })
    })
    .await
}

/// Once a longer lease than the present one, which was promised before the restart, has run out, it binds no more.
async fn settle_lease(log: Arc<LockedLog>, promised_ms: u64, lease_ms: u64) {
    tokio::time::sleep(Duration::from_millis(promised_ms)).await;
    let settled = offload(move || lease::settle(log.dir.path(), lease_ms)).await;
    if let Err(error) = settled {
        // Then the next start is silent for longer than it need be.
        tracing::warn!(%error, "the shorter lease could not be noted");
    }
}

impl LogStore for LockedLog {
    fn bounds(&self) -> LogBounds {
        self.log.bounds()
    }

    fn vote(&self) -> Option<Vote> {
        self.log.vote()
    }

    fn committed(&self) -> Option<LogId> {
        self.log.committed()
    }

    fn read(&self, start: u64, end: u64, max_bytes: usize) -> std::io::Result<Vec<Entry>> {
        self.log.read(start, end, max_bytes)
    }

    fn append(&self, entries: Vec<Entry>, done: Completion) {
        self.log.append(entries, done);
    }

    fn save_vote(&self, vote: Vote, done: Completion) {
        self.log.save_vote(vote, done);
    }

    fn save_committed(&self, committed: Option<LogId>) {
        self.log.save_committed(committed);
    }

    fn truncate(&self, last: Option<LogId>, done: Completion) {
        self.log.truncate(last, done);
    }

    fn purge(&self, upto: LogId, done: Completion) {
        self.log.purge(upto, done);
    }
}
