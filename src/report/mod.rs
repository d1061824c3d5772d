//! What a node tells of itself and of the members: one report, of which everything that shows a node is an encoding.
//!
//! A node makes it in one place (`engine/report`), whenever somebody asks, from what it has noted anyway; it asks nobody and
//! waits for nothing. Clients decode the same report again.
//!
//! | encoding | where |
//! |---|---|
//! | JSON, for the pages of the node | `Serialize` of the types here; what the pages add is in `node/replication.rs` |
//! | gRPC, in both directions | `wire.rs` |
//! | Prometheus | the tables in `node/metrics.rs` |
//! | tables and JSON of the command line | `cli/{status, health, member}.rs`, from what the client has decoded |
//!
//! A new field is declared here, filled in by `engine/report`, and then it is in the JSON pages. To be known outside the node
//! it needs a number in `proto/admin.proto` and a line for each direction in `wire.rs`; to be a metric, a row of a table.
//!
//! What a report does not hold: counters, which are read where they are counted ([`Activity`](crate::engine::Activity) and its
//! like), and settings.

#[cfg(any(feature = "server", feature = "client"))]
mod wire;

use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::types::{
    DiskStatus, HistoryEpoch, Incarnation, Leader, LogId, MemberKind, NodeId, PeerStanding, QuotaSource, Role,
};

/// What a node tells of itself. Of another node it is what that one has told: what does not cross the wire is not known then.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct NodeReport {
    /// Its id.
    pub node_id: NodeId,
    /// The name of its cluster.
    pub cluster: String,
    /// The client address that it advertises.
    #[serde(skip)]
    pub client: String,
    /// Its role; `None` for one that this version does not know.
    pub role: Option<Role>,
    /// Its term.
    pub term: u64,
    /// Whom it follows.
    pub leader: Option<Leader>,
    /// Whether it follows or leads, has applied nearly everything that it knows to be committed, and serves reads.
    pub ready: bool,
    /// Why it has stopped by itself.
    pub fatal: Option<String>,
    /// How its state differs from the other nodes', for which it serves nothing.
    pub diverged: Option<String>,
    /// How far its log and its state reach.
    pub offsets: Offsets,
    /// Hash of the state after [`Offsets::applied`]: equal on all nodes that have applied the same entry. `None` where it is
    /// not kept up to date.
    #[serde(serialize_with = "hex")]
    pub state_hash: Option<u64>,
    /// How large the state is, and may be.
    pub state: StateSize,
    /// How far its state is behind. Of this node only.
    pub lag: Option<Lag>,
    /// Its disk; of another node only the state and how much room there is.
    pub disk: Option<DiskStatus>,
    /// What its disk is good for, in the word of a newer version that this one does not know. Of another node only.
    #[serde(skip)]
    pub unknown_disk: Option<String>,
    /// How far back what was applied can be told by it. `None` from nodes that do not tell.
    pub feed: Option<FeedReport>,
    /// Its sessions.
    pub sessions: SessionsReport,
    /// What was proposed on it and has not ended. Of this node only.
    #[serde(skip)]
    pub in_flight: Option<InFlight>,
    /// What it has carried to and from peers since it started, those that are no members any more included: no total goes
    /// back. Of this node only.
    #[serde(skip)]
    pub carried: Option<Carried>,
    /// All members that it knows, itself included, in the order of their ids.
    #[serde(skip)]
    pub members: Vec<MemberReport>,
    /// Where the membership stands in the log. Of this node only.
    #[serde(skip)]
    pub membership: Option<LogId>,
    /// Whether a change of the voters is under way. Of this node only.
    #[serde(skip)]
    pub joint: Option<bool>,
    /// Replicas that follow it and answer reads. The pages list them with all who follow.
    #[serde(skip)]
    pub replicas: Vec<ReplicaReport>,
    /// What it is if it is a replica, and no member.
    #[serde(skip)]
    pub replica: Option<ReplicaReport>,
    /// The history that its positions belong to.
    #[serde(skip)]
    pub history: HistoryEpoch,
    /// The version that it runs.
    pub version: String,
}

impl NodeReport {
    /// Whether it says that it leads.
    pub fn leads(&self) -> bool {
        self.role == Some(Role::Leader)
    }

    /// Whether requests of every kind should be sent to it: it is ready, and its disk takes writes.
    pub fn healthy(&self) -> bool {
        // What is not understood is not taken for well.
        let takes_writes = self.disk.is_none_or(|disk| disk.state.takes_writes());
        self.ready && self.unknown_disk.is_none() && takes_writes
    }

    /// The members other than itself.
    pub fn peers(&self) -> impl Iterator<Item = &MemberReport> + Clone {
        self.members.iter().filter(|member| member.node_id != self.node_id)
    }

    /// On the leader: how many of them answer.
    pub fn connected(&self) -> Option<usize> {
        let answers = |member: &&MemberReport| {
            member.led.as_ref().is_some_and(|led| led.standing != PeerStanding::Disconnected)
        };
        self.leads().then(|| self.peers().filter(answers).count())
    }

    /// Who belongs to the cluster, as it knows.
    pub fn into_members(self) -> MemberList {
        let Self { members, leader, membership: position, joint, .. } = self;
        MemberList { members, leader, position, joint, ..MemberList::default() }
    }
}

/// How far a node's log and state reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct Offsets {
    /// Index of its last log entry, durable or not.
    pub last_log: Option<u64>,
    /// Up to where it knows the log to be committed.
    #[serde(serialize_with = "index")]
    pub committed: Option<LogId>,
    /// Up to where it has applied.
    #[serde(serialize_with = "index")]
    pub applied: Option<LogId>,
    /// Last position covered by its newest snapshot.
    #[serde(serialize_with = "index")]
    pub snapshot: Option<LogId>,
    /// Up to where it has purged its log.
    #[serde(serialize_with = "index")]
    pub purged: Option<LogId>,
}

/// Bytes of state; `None` where they are not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct StateSize {
    /// How many there are, for a machine that counts them.
    pub bytes: Option<u64>,
    /// How many there may be, once that is agreed.
    pub quota_bytes: Option<u64>,
    /// Who said so.
    pub quota_source: Option<QuotaSource>,
}

/// How far a node's state is behind what it knows to be committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct Lag {
    /// Entries known to be committed and not yet applied.
    #[serde(rename = "operations")]
    pub entries: u64,
    /// How long ago the first of them was heard to be committed; zero when there is none. What the leader has committed
    /// since its last message is not known here: up to a heartbeat interval comes on top, or, when the leader was not
    /// heard for longer than a lease, an unknown time, and this is `None`.
    #[serde(rename = "ms", serialize_with = "ms")]
    pub time: Option<Duration>,
    /// How long ago the leader was last heard; `None` on the leader, and on who has never heard one.
    #[serde(rename = "leader_heard_ms", serialize_with = "ms")]
    pub leader_heard: Option<Duration>,
}

/// How far back what was applied can be told to those who follow and watch, and what is kept of it on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct FeedReport {
    /// Everything from this position on can be told.
    pub first_position: u64,
    /// The position after the last one that was applied.
    pub next_position: u64,
    /// Operations in the event log.
    pub event_log_operations: u64,
    /// Bytes of the event log on disk.
    pub event_log_bytes: u64,
    /// Whether it cannot be written at present.
    pub event_log_failing: bool,
    /// How often it had to begin anew since the node was started.
    pub event_log_restarts: u64,
}

/// Open sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct SessionsReport {
    /// How many.
    pub open: u64,
    /// Bytes of answers kept for them.
    pub bytes: u64,
    /// How many the client connection has that has most of them. Of this node only.
    #[serde(skip)]
    pub largest_opener: Option<u64>,
}

/// Commands that were proposed on this node and are not yet applied, refused or lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct InFlight {
    /// How many.
    pub commands: u64,
    /// Bytes of them, encoded.
    pub bytes: u64,
    /// Writes that are applied and wait until every voter holds them; they do not count as commands in flight.
    pub waiting_for_all: u64,
}

/// A replica that answers reads, as its source knows it, or as it knows itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ReplicaReport {
    /// Where it answers, as `host:port`. It has said so itself.
    pub client: String,
    /// What it is called; empty without a name.
    pub id: String,
    /// Whether it has a part of the state only.
    pub partial: bool,
    /// The node that tells it what is applied, as `host:port`, as it says itself. Empty where another node tells of it, or it has none.
    pub source: String,
    /// How it stands to its source, such as `Synced`. Empty where another node tells of it.
    pub state: String,
    /// Positions that its source has applied, and it has not.
    pub lag_entries: u64,
    /// How much older its state is; `None` where it is not known.
    pub lag: Option<Duration>,
}

/// Who belongs to the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct MemberList {
    /// All members, in the order of their ids.
    pub members: Vec<MemberReport>,
    /// Who leads, if known.
    pub leader: Option<Leader>,
    /// Where the membership stands in the log, as the node knows that has listed it. Nodes may be behind, and those that reach nobody do
    /// not know it: of two lists the one with the later position is the newer.
    pub position: Option<LogId>,
    /// Whether a change is under way that needs majorities of two sets of voters; `None` where it was not told.
    pub joint: Option<bool>,
    /// Of the answer to a change: nothing had to be done.
    pub unchanged: bool,
    /// Of the answer to a change: where the membership stands that it has led to, as its leader says.
    pub changed_at: Option<LogId>,
}

impl MemberList {
    /// Of the answer to a change: whether the node that has listed the members did not know of it yet, so that the list is of before.
    pub fn is_behind(&self) -> bool {
        self.position < self.changed_at
    }
}

/// One member, as the asked node knows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct MemberReport {
    /// Its id.
    pub node_id: NodeId,
    /// Its advertised peer address.
    pub peer: String,
    /// Its advertised client address; empty until it has told.
    pub client: String,
    /// Whether it votes.
    pub voter: bool,
    /// Identity of its data directory.
    pub incarnation: Option<Incarnation>,
    /// Index up to which its log is known to match the leader's; on the leader only.
    pub matched: Option<u64>,
    /// Whether it has answered a short while ago; on the leader only.
    pub reachable: Option<bool>,
    /// What the asked node has carried to and from it since it started. From this node only.
    pub carried: Option<Carried>,
    /// What else its leader knows of it. From this node only, if that leads, and not of itself.
    pub led: Option<LedPeer>,
}

impl MemberReport {
    /// What it is.
    pub fn kind(&self) -> MemberKind {
        if self.voter { MemberKind::Voter } else { MemberKind::Learner }
    }
}

/// What was carried between a node and one peer, or all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Carried {
    /// Bytes of messages sent to it.
    pub sent_bytes: u64,
    /// Messages sent to it.
    pub sent_messages: u64,
    /// Bytes of messages received from it.
    pub received_bytes: u64,
    /// Messages received from it.
    pub received_messages: u64,
    /// Connections made to it.
    pub dialled: u64,
    /// Attempts at a connection that failed or were refused.
    pub dials_failed: u64,
}

impl std::iter::Sum for Carried {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            sent_bytes: sum.sent_bytes + one.sent_bytes,
            sent_messages: sum.sent_messages + one.sent_messages,
            received_bytes: sum.received_bytes + one.received_bytes,
            received_messages: sum.received_messages + one.received_messages,
            dialled: sum.dialled + one.dialled,
            dials_failed: sum.dials_failed + one.dials_failed,
        })
    }
}

/// A peer as its leader knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LedPeer {
    /// What to make of it.
    pub standing: PeerStanding,
    /// Entries of the leader's log that it is not known to have.
    pub behind_entries: u64,
    /// For how long the first of them has been in the leader's log; zero when there is none. At least this long, if that
    /// entry is older than the leader's process.
    pub behind: Duration,
    /// How long ago it last answered an append or a heartbeat of the leader.
    pub heard: Option<Duration>,
    /// Entries that it has accepted from the leader since that started.
    pub accepted_entries: u64,
    /// Bytes sent and bytes in all of the snapshot that it is being sent.
    pub snapshot: Option<(u64, u64)>,
}

/// Milliseconds with their fraction, as JSON has times.
pub(crate) fn millis(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

fn ms<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    time.map(millis).serialize(serializer)
}

fn index<S: Serializer>(position: &Option<LogId>, serializer: S) -> Result<S::Ok, S::Error> {
    position.map(|at| at.index).serialize(serializer)
}

/// Numbers of 64 bits that are no numbers to count with are text in JSON.
fn hex<S: Serializer>(hash: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    hash.map(|hash| format!("{hash:016x}")).serialize(serializer)
}
