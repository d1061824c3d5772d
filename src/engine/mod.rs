//! The public handle: open a node, write, read, watch, stop.
//!
//! # Tasks, threads and queues of a node
//!
//! All tasks but the last three kinds are members of the node's [`Tasks`]. A panic in any of them is fatal for the node. For
//! a task that runs until the node stops, its end is fatal too. Then [`NodeState::fatal`] names the task, the core stops,
//! and a process exits. In the last column, "the node" means that the node was shut down, or that the last handle outside
//! the node is gone (`hold`).
//!
//! | task | what it is for | woken by | ended by |
//! |---|---|---|---|
//! | `formation` | forms the cluster (`cluster/formation`) | its own rounds; one that waits to be added: the core | membership |
//! | `standing` | judges refusals and claims (`cluster/expulsion`) | queues *refusals*, *claims*; while out of touch every 2 s | the node |
//! | `state` | [`NodeState`], and the end of a core that fails (`report/state`) | core, applied positions, disk, divergence, `forming`, `fatal`; when the leader, or a quorum, must have been heard | the node |
//! | `compaction` | snapshots and purges (`upkeep/compaction`) | applied positions; every 20 ms while a snapshot is written, every second while one is sent | the node |
//! | `event-log` | writes what was applied for those who follow (`upkeep/event_log`); without fsync, but when a new file is begun | applied positions; every 10 s while it fails or has a limit of age | the node |
//! | `disk-health` | hands over when the disk is unwell (`upkeep/disk_health`); only with a disk | writes of the log, disk, peers, `state`; every 50 ms while the log is written to, until 1 s after, and while a disk is unwell | the node |
//! | `hand-over` | sees hand-overs to their end (`cluster/hand_over`) | a hand-over; every 20 ms while it goes on | the node |
//! | `leadership` | preferred leaders, members that moved (`cluster/leadership`) | queue *announcements*, `state`, [`Settings`]; every 250 ms while there is something to do | the node |
//! | `wake-ups` | the machine's wake-ups, entries for their time (`upkeep/wake`) | applied positions, `state`, the next of them | the node |
//! | `wall-clock` | jumps of the wall clock (`upkeep/wall_clock`) | every second | the node |
//! | `agreement` | compares states (`upkeep/agreement`) | `state`; every second while there is something to find out | the node |
//! | `quota` | the quota on the state (`upkeep/quota`); only for machines that count their bytes | `state`, peers | the node |
//! | `versions` | agreements on versions of the machine (`cluster/versions`); only for machines that have any | `state`, peers | the node |
//! | `held-by-all` | tells writes that wait for all voters (`raft/durable_positions.rs`) | while there are any: flushes, answers of peers, every second | the node |
//! | `leader-reads` | read indexes from the leader (`read`) | its queue | the node's last reader |
//! | `read-indexes` | read indexes as the leader (`raft/read_index.rs`) | its queue | the core's last handle |
//! | `flushed-writes` | answers writes that wait for this disk alone (`raft/log.rs`) | its queue | the log |
//! | `silence` | no election for the length of a lease after a start (`raft/core/start.rs`) | one deadline | that |
//! | `lease-settlement` | forgets a longer lease of before the restart (`open/directory`) | one deadline | that |
//! | `peer-port` | accepts peers (`raft/network/grpc.rs`) | the listener | the node |
//! | `peer-credentials` | reads certificates, or the peer secret, again (`trust/peers.rs`); only with files | every 10 s | the node |
//! | `consensus-core`, `-apply`, `-tick`, `-flushed`, `-read-deadlines`, `-step-down` | openraft's (`raft/consensus_tasks.rs`) | each other; `-tick` five times per heartbeat interval | the core |
//! | `consensus-replication`, `-heartbeat`, `-snapshot` | openraft's, one per peer that this node leads | the core | the lead |
//! | one per connection of a peer, one per line to the leader | answers peers; hands the leader's answers to callers (`raft/network`) | the connection | the connection, the node |
//! | two while a node opens | how far it is (`open/progress`) | every 5 s, applied positions | the end of that |
//! | one per dial, membership change, wanted view, write for all voters, hashed state | that | what they wait for | that |
//!
//! | thread | what it is for | woken by | ended by |
//! |---|---|---|---|
//! | `log-writer` | all writes of the log, and their completions | queue *writes of the log* | the log's last handle |
//! | `log-watchdog` | ends a node whose write does not come back | every 3.75 s | the log's last handle |
//! | `log-sync-later` | how much of the log a power cut must leave | every second | the log's last handle |
//! | `disk-look` | free space and the reserve | every 100 ms to 1 s, by how much is free | the log's last handle |
//! | `log-lines` | the process's standard error (`logging.rs`) | its queue | the process |
//! | tokio's for blocking work | reading and writing snapshots, hashing states ([`offload`](crate::runtime::offload)) | the caller | the work |
//!
//! A panic of `log-writer`, `log-watchdog`, `log-sync-later` or `disk-look` fails the log, which is the end of the core.
//!
//! The queues between them, with their bounds, are in `docs/design/bounds.md`.
//! Everything else is a value that is watched, not a queue: applied positions and views (`raft/published.rs`), [`NodeState`],
//! `forming`, `fatal`, `stop`, [`Settings`], offers of the lead.
//!
//! # Where things are
//!
//! A file imports only what stands above it here.
//!
//! - `config`: what a node needs to know before it starts, and what can be changed while it runs;
//! - `stop`: how it ends, in order or because it must not go on;
//! - `read`: how fresh the state must be that answers;
//! - `write`: admission, acknowledgement levels, sessions;
//! - `cluster`: formation, membership, expulsion, who leads, versions that all members read;
//! - `report`: all that the node tells of itself and of the members, what there is to watch, and what is counted;
//! - `upkeep`: snapshots and the log behind them, the disk, the quota, states that differ, time;
//! - `anywhere`: all that only the leader does, from any node;
//! - `open`: a node from its data directory, from parts, or from a backup.
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
//! - A call of [`Engine::anywhere`] may be made on any node, and the leader carries it out. All other calls are for this
//!   node alone: the node neither retries them nor passes them on.

mod anywhere;
mod cluster;
mod config;
mod follow;
mod open;
mod read;
mod report;
mod stop;
#[cfg(test)]
mod tests;
mod upkeep;
mod write;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

pub use anywhere::{ANYWHERE_PATIENCE, Anywhere};
pub use cluster::formation::Forming;
pub(crate) use cluster::membership::RequestedChange;
pub use cluster::membership::{CATCH_UP_PATIENCE, NewAddresses, NewMember};
pub(crate) use config::memory::{
    MIN_ADDRESS_SPACE_BYTES, available_bytes as available_memory_bytes, share_bytes as memory_share_bytes,
};
pub(crate) use config::ranges;
pub(crate) use config::ranges::check_node_id;
pub use config::settings::Settings;
pub use config::{DiskPolicy, EngineConfig, Limits, MIN_MEMORY_BYTES, PeerPolicy, SnapshotPolicy, Timing};
pub use follow::FollowError;
#[cfg(feature = "server")]
pub(crate) use follow::{LeadError, LeadingSnapshot};
pub use open::EngineParts;
pub(crate) use read::HeldState;
pub use read::ReadOutcome;
pub use report::SYNCING_ENTRIES;
pub use report::counters::{Counters, READ_LEVELS, REFUSALS};
pub use report::leaders::{LeaderChange, LeaderChanges};
use report::state::TermLeader;
pub use report::state::{NodeState, NotReady};
pub use upkeep::quota::QuotaError;
pub use write::sessions::{ClosedSession, MAX_LISTED_SESSIONS, OpenedSession, SessionList};
pub use write::{Acknowledged, Written};

use self::stop::fatal::{Consequence, Fatal};
use self::stop::hold::Hold;
use self::upkeep::disk_health::QuorumDisks;
use crate::machine::StateMachine;
pub use crate::raft::activity::{
    Activity, LATENCY_BUCKETS_US, Latency, SessionTotals, Snapshots, Succession,
};
use crate::raft::core::Core;
use crate::raft::network::calls::room::Rooms;
use crate::raft::network::handshake::OwnHandshake;
use crate::raft::network::leader_line::LeaderLine;
use crate::raft::network::{PeerDoor, Transport};
pub(crate) use crate::raft::pinned::Pinned;
pub(crate) use crate::raft::published::CurrentHistory;
use crate::runtime::{Tasks, WallClock};
pub(crate) use crate::storage::StartProgress;
use crate::storage::{DiskWatch, LogStats};
pub(crate) use crate::types::WriteOptions;
use crate::types::{HistoryEpoch, Member, Role};

/// One node of a replicated state machine. Cheap to clone; all clones are the same node, which ends when the last of them is dropped.
pub struct Engine<M: StateMachine> {
    inner: Arc<Inner<M>>,
    /// None within the node.
    hold: Option<Arc<Hold<M>>>,
}

impl<M: StateMachine> Clone for Engine<M> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), hold: self.hold.clone() }
    }
}

impl<M: StateMachine> std::fmt::Debug for Engine<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("state", &self.state()).finish()
    }
}

struct Inner<M: StateMachine> {
    core: Core<M>,
    handshake: OwnHandshake,
    transport: Arc<dyn Transport>,
    /// This node's own line to whoever leads.
    leader_line: LeaderLine,
    /// The changes of the membership that are being made here.
    changes: cluster::membership::MemberChanges,
    /// Places for calls that are passed on to the leader.
    passed_on: Rooms<Semaphore>,
    own: Member,
    config: EngineConfig,
    reads: read::ReaderIndexes,
    settings: watch::Sender<Settings>,
    inflight_bytes: AtomicUsize,
    /// The same of writes that are passed on and wait for all voters.
    waiting_bytes: AtomicUsize,
    wall_clock: WallClock,
    /// The quota on the state that this node could bear, if that is known.
    quota_bytes: Option<u64>,
    /// How many bytes of what has been replaced a view that is read for long may keep alive.
    pinned_bytes: u64,
    inflight_commands: AtomicUsize,
    counters: Counters,
    state: watch::Receiver<NodeState>,
    /// The part of it that those wait for whose calls were passed on.
    known_leader: watch::Receiver<TermLeader>,
    /// What the cluster waits for before there is one.
    forming: watch::Receiver<Option<Forming>>,
    fatal: Fatal,
    /// What follows from it; kept for as long as there is a handle.
    _consequence: Arc<Consequence>,
    tasks: Tasks,
    /// Set when the node is asked to stop, so that the end of its core is no surprise.
    stopping: Arc<AtomicBool>,
    /// True once the core has stopped and everything else is to follow.
    stop: watch::Sender<bool>,
    /// Closed when the data directory can be opened again.
    released: watch::Receiver<()>,
    log_stats: Option<Arc<LogStats>>,
    #[cfg(feature = "server")]
    snapshots: Arc<dyn crate::storage::SnapshotStore>,
    disk: DiskWatch,
    quorum_disks: Arc<QuorumDisks>,
}

/// The states of a node, one after the other. Holds nothing of the node, and ends with it.
#[derive(Debug)]
pub struct StateChanges(watch::Receiver<NodeState>);

impl StateChanges {
    /// The next state: the present one if it was not told yet, else it is waited for. Changes that follow each other closely are
    /// told as one. None once the node is gone.
    pub async fn next(&mut self) -> Option<NodeState> {
        self.0.changed().await.ok()?;
        Some(self.0.borrow_and_update().clone())
    }
}

impl<M: StateMachine> Engine<M> {
    /// A handle for what is part of the node: it does not keep that running.
    fn within(inner: Arc<Inner<M>>) -> Self {
        Self { inner, hold: None }
    }

    /// A handle that keeps it running.
    fn outside(inner: Arc<Inner<M>>) -> Self {
        let hold = Some(Arc::new(Hold::on(Arc::downgrade(&inner))));
        Self { inner, hold }
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

    /// What this node shows to its peers; for those who bring their own transport.
    pub fn peer_door(&self) -> Arc<dyn PeerDoor> {
        self.inner.core.door()
    }

    /// The node's state once `condition` holds for it, which may be at once. None when the node ends without that.
    pub async fn wait_for(&self, condition: impl FnMut(&NodeState) -> bool + Send) -> Option<NodeState> {
        self.watch().wait_for(condition).await.ok().map(|state| state.clone())
    }

    /// The node's state, and then every change of it.
    pub fn changes(&self) -> StateChanges {
        let mut state = self.watch();
        state.mark_changed();
        StateChanges(state)
    }

    /// The state for tasks of this process, which hold no lock on it for longer than a look takes.
    pub(crate) fn watch(&self) -> watch::Receiver<NodeState> {
        self.inner.state.clone()
    }

    /// Waits until the node [is ready](NodeState::is_ready). False when `timeout` passes first, or the node
    /// stops.
    pub async fn ready(&self, timeout: Duration) -> bool {
        let mut state = self.watch();
        let ready = state.wait_for(|state| state.is_ready() || state.role == Role::Stopped);
        match tokio::time::timeout(timeout, ready).await {
            Ok(Ok(state)) => state.is_ready(),
            Ok(Err(_)) | Err(_) => false,
        }
    }

    /// The tasks that this node cannot do without and that run at present, by name. If one fails, that is the end of the
    /// node, and [`NodeState::fatal`] names it.
    pub fn tasks(&self) -> Vec<&'static str> {
        self.inner.tasks.names()
    }

    /// How often the tasks of each name were polled. For tests of what an idle node does.
    #[doc(hidden)]
    pub fn task_polls(&self) -> BTreeMap<&'static str, u64> {
        self.inner.tasks.polls()
    }

    /// Has all of the node's tasks of this name panic; false when there is none. For tests of what follows.
    #[doc(hidden)]
    pub fn panic_in(&self, task: &str) -> bool {
        self.inner.tasks.panic_in(task)
    }

    /// What the log counts: flushes, their durations, entries and bytes.
    pub fn log_stats(&self) -> Option<&Arc<LogStats>> {
        self.inner.log_stats.as_ref()
    }
}
