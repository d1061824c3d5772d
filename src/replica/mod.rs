//! A replica: a state outside the quorum that follows a cluster, from whichever node, and answers reads.
//!
//! It is told what was applied ([`Subscription`](crate::client::Subscription)), applies it in order, and keeps it on its disk, so that it goes on where it was
//! after a restart. Where no source goes back far enough it is told the whole state, and goes on behind that. It may follow some tenants
//! and collections only. It takes no writes; whoever writes is told who leads.
//!
//! # Promises
//!
//! - At a position, the state is that of the cluster at this position, or the part of it that is followed. [`ReplicaState::local`] says which.
//! - What cannot have happened to its state is not applied: it stops following there, says so, and answers reads as of then.
//! - A linearizable or bounded read asks a member of the cluster for a position first, and waits until that is applied here.
//!
//! # What it does not do
//!
//! Vote, lead, or count for any acknowledgement.

mod directory;
mod fetch;
mod follow;
mod node;
mod relay;
mod state;

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use self::follow::Follower;
pub(crate) use self::follow::LONGEST_PAUSE;
pub(crate) use self::node::ReplicaNode;
pub use self::state::{ReplicaState, SyncState};
use crate::client::{
    Client, ClientConfig, ClientTls, ConfigError, EntryCompression, EntryFilter, FollowFrom, ReadPreference,
    ReplicaReads, SubscribeOptions, Token,
};
use crate::error::{OpenError, ReadError, SnapshotError};
use crate::feed::{EventLogLimits, FeedCursor, FeedReach};
use crate::machine::StateMachine;
use crate::raft::told::ToldReader;
use crate::runtime::{self, offload};
use crate::types::{LogId, ReadOptions};

/// A source refuses those that are slower.
const LEAST_STATE_BYTES_PER_SECOND: u64 = 64 * 1024;

/// What a replica is told.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplicaConfig {
    /// Client ports of members of the cluster, as `host:port`. It goes from one to another, also to members that it learns of. Replicas are not followed.
    pub sources: Vec<String>,
    /// Where it keeps its state.
    pub data_dir: PathBuf,
    /// What its sources call it. Default empty: it has no name.
    pub id: String,
    /// What it follows; none: all. It stays the same for a data directory.
    pub filters: Vec<EntryFilter>,
    /// How often it tries to reach a source in vain before it gives up; none: for ever. Default 10.
    pub retries: Option<u32>,
    /// How long all sources may be silent before it begins anew with all of them. Default 30 s.
    pub patience: Duration,
    /// How often a source says that it is there. Default 5 s.
    pub heartbeat: Duration,
    /// How long it waits before it tries its sources again for the first time; twice as long every time after that, up to a minute. Default 1 s.
    pub first_pause: Duration,
    /// Whether what it is told is compressed on the way. Default no.
    pub compressed: bool,
    /// Most bytes of a whole state that it is sent in a second; 0: as many as there can be. Default 0.
    pub state_bytes_per_second: u64,
    /// Where clients reach it for reads, as `host:port`: its sources tell their clients. Default: none; clients are not told of it.
    pub advertise: Option<String>,
    /// TLS towards its sources, and towards the leader that it passes calls on to. Default: none.
    pub tls: Option<ClientTls>,
    /// What it shows of itself to its sources: where these ask, to follow all takes the right to subscribe to everything, to forward writes
    /// that to write. Default: nothing.
    pub token: Option<Token>,
    /// How much of what it was told it keeps for a restart, and for those who follow it.
    pub event_log: EventLogLimits,
}

impl ReplicaConfig {
    /// One that follows all of the cluster that `sources` belong to, in `data_dir`.
    pub fn new<I>(sources: I, data_dir: impl Into<PathBuf>) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        Self {
            sources: sources.into_iter().map(Into::into).collect(),
            data_dir: data_dir.into(),
            id: String::new(),
            filters: Vec::new(),
            retries: Some(10),
            patience: Duration::from_secs(30),
            heartbeat: Duration::from_secs(5),
            first_pause: Duration::from_secs(1),
            compressed: false,
            state_bytes_per_second: 0,
            advertise: None,
            tls: None,
            token: None,
            event_log: EventLogLimits::default(),
        }
    }

    fn connect(&self) -> Result<Client, ConfigError> {
        let config = ClientConfig {
            read_preference: Some(ReadPreference::Any),
            // Another replica is no source.
            replica_reads: ReplicaReads::Never,
            tls: self.tls.clone(),
            token: self.token.clone(),
            ..ClientConfig::default()
        };
        Client::new(&self.sources, config)
    }

    fn options(&self, from: FollowFrom, accept_snapshot: bool) -> SubscribeOptions {
        SubscribeOptions {
            from,
            filters: self.filters.clone(),
            compression: if self.compressed { EntryCompression::Zstd } else { EntryCompression::None },
            heartbeat: self.heartbeat,
            id: self.id.clone(),
            accept_snapshot,
            serves: self.advertise.clone(),
            ..SubscribeOptions::default()
        }
    }
}

/// What the handles of a replica share.
struct SharedTold<M: StateMachine> {
    reader: ToldReader<M>,
    /// The one that is followed with at present.
    client: Arc<Mutex<Option<Client>>>,
}

impl<M: StateMachine> Clone for SharedTold<M> {
    fn clone(&self) -> Self {
        Self { reader: self.reader.clone(), client: self.client.clone() }
    }
}

/// A replica. Cheap to clone; it ends when the last clone is dropped. See the [module](self).
pub struct Replica<M: StateMachine> {
    told: SharedTold<M>,
    state: watch::Receiver<ReplicaState>,
    config: Arc<watch::Sender<ReplicaConfig>>,
    confirmed: node::Confirmed,
    task: Arc<Aborted>,
}

/// A replica that may have ended.
struct WeakReplica<M: StateMachine> {
    told: SharedTold<M>,
    state: watch::Receiver<ReplicaState>,
    config: Arc<watch::Sender<ReplicaConfig>>,
    confirmed: node::Confirmed,
    task: Weak<Aborted>,
}

impl<M: StateMachine> WeakReplica<M> {
    fn upgrade(&self) -> Option<Replica<M>> {
        let Self { told, state, config, confirmed, task } = self;
        Some(Replica {
            told: told.clone(),
            state: state.clone(),
            config: config.clone(),
            confirmed: confirmed.clone(),
            task: task.upgrade()?,
        })
    }
}

/// A task that ends with its handles.
struct Aborted(tokio::task::JoinHandle<()>);

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<M: StateMachine> Clone for Replica<M> {
    fn clone(&self) -> Self {
        let Self { told, state, config, confirmed, task } = self;
        Self {
            told: told.clone(),
            state: state.clone(),
            config: config.clone(),
            confirmed: confirmed.clone(),
            task: task.clone(),
        }
    }
}

impl<M: StateMachine> fmt::Debug for Replica<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replica").field("state", &*self.state.borrow()).finish_non_exhaustive()
    }
}

impl<M: StateMachine> Replica<M> {
    /// Opens the replica in `config.data_dir` and begins to follow. `machine` makes the machine in its initial state.
    ///
    /// # Errors
    /// [`OpenError`]: the directory is in use, is another's or follows something else, or what is in it cannot be read.
    pub async fn open(
        config: ReplicaConfig,
        machine: impl Fn() -> M + Send + Sync + 'static,
    ) -> Result<Self, OpenError> {
        config.connect().map_err(|error| OpenError::Config(error.to_string()))?;
        if !M::TAKES_EVENTS {
            return Err(OpenError::Config(
                "the machine tells events and takes none in, so it can have no replicas: see StateMachine::take_event"
                    .to_owned(),
            ));
        }
        if (1..LEAST_STATE_BYTES_PER_SECOND).contains(&config.state_bytes_per_second) {
            return Err(OpenError::Config(format!(
                "state_bytes_per_second is 0, or {LEAST_STATE_BYTES_PER_SECOND} at least"
            )));
        }
        let has_parts = M::TELLS_EVENTS && M::TELLS_STATE;
        if !config.filters.is_empty() && !has_parts {
            return Err(OpenError::Config(
                "a part of a state can only be followed of a machine that tells events and its state"
                    .to_owned(),
            ));
        }
        let initial = Arc::new(machine);
        let (to_open, own) = (config.clone(), initial.clone());
        let told = offload(move || directory::open(&to_open, own())).await?;
        let shared = SharedTold { reader: told.reader(), client: Arc::default() };
        let (state, states) = watch::channel(ReplicaState::new(told.bookmark()));
        let (change, config) = watch::channel(config);
        let follower = Follower {
            told,
            initial,
            config,
            state,
            shared: shared.clone(),
            receiving: None,
            partial: Vec::new(),
            marked: Instant::now(),
        };
        let task = runtime::spawn(follower.run());
        Ok(Self {
            told: shared,
            state: states,
            config: Arc::new(change),
            confirmed: Arc::default(),
            task: Arc::new(Aborted(task)),
        })
    }

    fn downgrade(&self) -> WeakReplica<M> {
        let Self { told, state, config, confirmed, task } = self;
        WeakReplica {
            told: told.clone(),
            state: state.clone(),
            config: config.clone(),
            confirmed: confirmed.clone(),
            task: Arc::downgrade(task),
        }
    }

    /// Has the state as it is written into a snapshot, which the next start begins with.
    ///
    /// # Errors
    /// [`SnapshotError::Nothing`] while nothing is applied.
    pub(crate) async fn take_snapshot(&self) -> Result<LogId, SnapshotError> {
        let applied = self.told.reader.progress().log_id.ok_or(SnapshotError::Nothing)?;
        self.told.reader.ask_for_snapshot();
        Ok(applied)
    }

    /// How it stands to what it follows.
    pub fn state(&self) -> ReplicaState {
        self.state.borrow().clone()
    }

    /// Its state once `condition` holds for it. None when the replica ends without that.
    pub async fn wait_for(
        &self,
        condition: impl FnMut(&ReplicaState) -> bool + Send,
    ) -> Option<ReplicaState> {
        self.state.clone().wait_for(condition).await.ok().map(|state| state.clone())
    }

    /// Has it follow these from now on, of the same cluster.
    ///
    /// # Errors
    /// That one of them cannot be an address.
    pub fn follow_others(&self, sources: Vec<String>) -> Result<(), ConfigError> {
        let heartbeat = self.config.borrow().heartbeat;
        self.follow_by(sources, heartbeat)
    }

    /// The same, and has them say so often that they are there.
    pub(crate) fn follow_by(&self, sources: Vec<String>, heartbeat: Duration) -> Result<(), ConfigError> {
        let changed = ReplicaConfig { sources, heartbeat, ..self.config.borrow().clone() };
        changed.connect()?;
        self.config.send_if_modified(|config| {
            let is_other = *config != changed;
            *config = changed;
            is_other
        });
        Ok(())
    }

    /// What it is told at present.
    pub fn config(&self) -> ReplicaConfig {
        self.config.borrow().clone()
    }

    /// Answers `query` from a state as recent as `options` ask for.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn read(
        &self,
        query: M::Query,
        options: impl Into<ReadOptions>,
    ) -> Result<(Option<LogId>, M::Answer), ReadError> {
        let applied = self.state_at(options.into()).await?;
        Ok((applied.progress.log_id, M::query(&applied.view, query)))
    }

    /// The state itself.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn view(&self, options: impl Into<ReadOptions>) -> Result<(Option<LogId>, M::View), ReadError>
    where
        M::View: Clone,
    {
        let applied = self.state_at(options.into()).await?;
        Ok((applied.progress.log_id, applied.view.clone()))
    }

    /// Has it keep as much of what it was told as these allow.
    pub(crate) fn keep(&self, event_log: EventLogLimits) {
        if let Some(log) = self.told.reader.feed().log() {
            log.set_limits(event_log);
        }
    }

    /// How far back what it was told can be told by it.
    pub fn feed_reach(&self) -> FeedReach {
        self.told.reader.feed().reach()
    }

    /// Follows it, from a position that it has.
    pub(crate) fn cursor(&self, next: u64) -> FeedCursor {
        self.told.reader.feed().follow(next)
    }
}
