//! How replication goes: what each peer has, how far this node is behind, what is in flight.
//!
//! Everything is read from what is noted anyway while messages pass; nobody is asked, and nothing waits.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::membership::lag;
use super::{Engine, PeerPolicy};
use crate::machine::StateMachine;
use crate::raft::activity::Activity;
use crate::raft::network::traffic::Carried;
use crate::types::{AckLevel, Member, NodeId, ReadLevel, Role};

/// A peer that answers and lacks more entries than this is catching up.
pub const SYNCING_ENTRIES: u64 = 10_000;

/// What a leader makes of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PeerStanding {
    /// It answers, and has nearly everything.
    Connected,
    /// It answers, and is being sent a snapshot or more than [`SYNCING_ENTRIES`] entries.
    Syncing,
    /// Its first missing entry is older than [`PeerPolicy::lagging_after_ms`], or it has not answered for as long: then
    /// what it has is what it last said.
    Lagging,
    /// It has not answered for longer than [`PeerPolicy::disconnected_after_ms`], or never.
    Disconnected,
}

/// A member of the cluster other than this node, as this node knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerState {
    /// Its id.
    pub node_id: NodeId,
    /// Its addresses and identity.
    pub member: Member,
    /// Whether it votes.
    pub voter: bool,
    /// What was carried to and from it since this node started.
    pub carried: Carried,
    /// What only a leader knows.
    pub led: Option<LedPeer>,
}

/// A peer as its leader knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LedPeer {
    /// Index up to which its log is known to match the leader's.
    pub matched: Option<u64>,
    /// Entries of the leader's log that it is not known to have.
    pub behind_entries: u64,
    /// For how long the first of them has been in the leader's log; zero when there is none. At least this long, if that
    /// entry is older than the leader's process.
    pub behind: Duration,
    /// How long ago it last answered an append or a heartbeat of this node.
    pub heard: Option<Duration>,
    /// Entries that it has accepted from this node since this node started.
    pub accepted_entries: u64,
    /// Bytes sent and bytes in all of the snapshot that it is being sent.
    pub snapshot: Option<(u64, u64)>,
    /// What this leader takes for slow and for silent.
    pub policy: PeerPolicy,
}

impl LedPeer {
    /// What to make of it.
    pub fn standing(&self) -> PeerStanding {
        let lagging_after = Duration::from_millis(self.policy.lagging_after_ms);
        let disconnected_after = Duration::from_millis(self.policy.disconnected_after_ms);
        match self.heard {
            None => PeerStanding::Disconnected,
            Some(heard) if heard > disconnected_after => PeerStanding::Disconnected,
            Some(heard) if heard > lagging_after => PeerStanding::Lagging,
            Some(_) if self.snapshot.is_some() || self.behind_entries > SYNCING_ENTRIES => {
                PeerStanding::Syncing
            }
            Some(_) if self.behind > lagging_after => PeerStanding::Lagging,
            Some(_) => PeerStanding::Connected,
        }
    }
}

/// How far a node's state is behind what it knows to be committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lag {
    /// Entries known to be committed and not yet applied.
    pub entries: u64,
    /// How long ago the first of them was heard to be committed; zero when there is none. What the leader has committed
    /// since its last message is not known here: up to a heartbeat interval comes on top, or, when the leader was not
    /// heard for longer than a lease, an unknown time, and this is `None`.
    pub time: Option<Duration>,
    /// How long ago the leader was last heard; `None` on the leader, and on who has never heard one.
    pub leader_heard: Option<Duration>,
}

/// Commands that were proposed on this node and are not yet applied, refused or lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct InFlight {
    /// How many.
    pub commands: usize,
    /// Bytes of them, encoded.
    pub bytes: usize,
    /// Writes that are applied and wait until every voter holds them; they do not count as commands in flight.
    pub waiting_for_all: usize,
}

/// Why a command was refused: most are not even proposed, those of sessions when they come to be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refused {
    /// Larger than `max_command_bytes`.
    TooLarge,
    /// More than `max_inflight_bytes` in flight.
    Overloaded,
    /// The disk is full.
    DiskFull,
    /// The disk hangs.
    DiskStalled,
    /// The leader is out of touch with its quorum.
    NoQuorum,
    /// This node does not lead.
    NotLeader,
    /// All sessions are in use, or as many as one client may have.
    TooManySessions,
    /// Its session has too many writes, or too many bytes of answers, that its owner has not settled.
    WindowExceeded,
    /// The state would have outgrown its quota; found before or after it was proposed.
    QuotaExceeded,
}

impl Refused {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::TooLarge,
        Self::Overloaded,
        Self::DiskFull,
        Self::DiskStalled,
        Self::NoQuorum,
        Self::NotLeader,
        Self::TooManySessions,
        Self::WindowExceeded,
        Self::QuotaExceeded,
    ];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::Overloaded => "overloaded",
            Self::DiskFull => "disk_full",
            Self::DiskStalled => "disk_stalled",
            Self::NoQuorum => "no_quorum",
            Self::NotLeader => "not_leader",
            Self::TooManySessions => "too_many_sessions",
            Self::WindowExceeded => "window_exceeded",
            Self::QuotaExceeded => "quota_exceeded",
        }
    }
}

/// Names of the read levels in metrics, in the order in which [`Counters`] counts them.
pub const READ_LEVELS: [&str; 4] = ["linearizable", "lease", "bounded", "local"];

/// What a read may have to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReadWait {
    /// A leader, and its confirmation that it leads.
    ReadIndex,
    /// That this node has applied as much as the read needs, and a view of it.
    Apply,
}

impl ReadWait {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::ReadIndex, Self::Apply];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::ReadIndex => "read_index",
            Self::Apply => "apply",
        }
    }
}

/// A read that waits; it counts for as long as this lives.
pub(super) struct Waiting<'a>(&'a AtomicU64);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// What the engine counts, since the node started.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Counters {
    refused: [AtomicU64; Refused::ALL.len()],
    reads: [AtomicU64; READ_LEVELS.len()],
    acknowledged: [AtomicU64; AckLevel::ALL.len()],
    waiting: [AtomicU64; ReadWait::ALL.len()],
    /// Commands proposed because the machine had asked to be woken.
    pub wake_ups: AtomicU64,
    /// Entries proposed for nothing but their time.
    pub clock_entries: AtomicU64,
    /// Jumps of this node's wall clock.
    pub clock_jumps: AtomicU64,
}

impl Counters {
    pub(super) fn refuse(&self, why: Refused) {
        self.refused[why as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn read(&self, level: ReadLevel) {
        let place = match level {
            ReadLevel::Linearizable => 0,
            ReadLevel::Lease => 1,
            ReadLevel::Bounded { .. } => 2,
            ReadLevel::Local => 3,
        };
        self.reads[place].fetch_add(1, Relaxed);
    }

    pub(super) fn acknowledge(&self, level: AckLevel) {
        self.acknowledged[level as usize].fetch_add(1, Relaxed);
    }

    /// Commands acknowledged at this level, for sessions and of the machine's own included.
    pub fn acknowledged(&self, level: AckLevel) -> u64 {
        self.acknowledged[level as usize].load(Relaxed)
    }

    pub(super) fn wait(&self, on: ReadWait) -> Waiting<'_> {
        let waiting = &self.waiting[on as usize];
        waiting.fetch_add(1, Relaxed);
        Waiting(waiting)
    }

    /// Reads that wait for this at the moment.
    pub fn waiting(&self, on: ReadWait) -> u64 {
        self.waiting[on as usize].load(Relaxed)
    }

    /// Commands refused for this reason.
    pub fn refused(&self, why: Refused) -> u64 {
        self.refused[why as usize].load(Relaxed)
    }

    /// Reads asked for, by the names in [`READ_LEVELS`].
    pub fn reads(&self) -> [u64; READ_LEVELS.len()] {
        std::array::from_fn(|place| self.reads[place].load(Relaxed))
    }
}

impl<M: StateMachine> Engine<M> {
    /// The other members, in the order of their ids.
    pub fn peers(&self) -> Vec<PeerState> {
        let inner = &self.inner;
        let metrics = inner.core.metrics();
        let progress = inner.core.peer_progress();
        let carried = inner.transport.traffic().map(|traffic| traffic.carried()).unwrap_or_default();
        let leads = metrics.role == Role::Leader;
        let led = |node_id| {
            let matched = metrics.matched.get(&node_id).copied().flatten().map(|matched| matched.index);
            let behind_entries = lag(&metrics, node_id);
            let first_missing = matched.map_or(0, |matched| matched + 1);
            let behind = match behind_entries {
                0 => None,
                _ => inner.core.entry_age(first_missing),
            };
            let known = progress.get(&node_id);
            LedPeer {
                matched,
                behind_entries,
                behind: behind.unwrap_or_default(),
                heard: known.and_then(|peer| peer.heard).map(|at| at.elapsed()),
                accepted_entries: known.map_or(0, |peer| peer.accepted_entries),
                snapshot: known.and_then(|peer| peer.snapshot),
                policy: inner.config.peers,
            }
        };
        let others =
            metrics.membership.members.iter().filter(|(node_id, _)| **node_id != inner.config.node_id);
        others
            .map(|(node_id, member)| PeerState {
                node_id: *node_id,
                member: member.clone(),
                voter: metrics.membership.is_voter(*node_id),
                carried: carried.get(node_id).copied().unwrap_or_default(),
                led: leads.then(|| led(*node_id)),
            })
            .collect()
    }

    /// How far this node's state is behind.
    pub fn lag(&self) -> Lag {
        let core = &self.inner.core;
        let state = self.state();
        let next = core.published().progress().next_index();
        let entries = state.committed.map_or(0, |committed| (committed.index + 1).saturating_sub(next));
        if state.role == Role::Leader {
            let waiting = if entries > 0 { core.entry_age(next) } else { None };
            return Lag { entries, time: Some(waiting.unwrap_or_default()), leader_heard: None };
        }
        let time = state.in_touch.then(|| core.told_committed(next).unwrap_or_default());
        Lag { entries, time, leader_heard: core.leader_heard() }
    }

    /// What was proposed here and has not ended.
    pub fn in_flight(&self) -> InFlight {
        InFlight {
            commands: self.inner.inflight_commands.load(Relaxed),
            bytes: self.inner.inflight_bytes.load(Relaxed),
            waiting_for_all: self.inner.core.held().waiting(),
        }
    }

    /// Sessions open, and bytes of answers kept for them.
    pub fn sessions(&self) -> (usize, usize) {
        let progress = self.inner.core.published().progress();
        (progress.sessions, progress.session_bytes)
    }

    /// Sessions of the client connection that has most of them.
    pub fn largest_opener(&self) -> usize {
        self.inner.core.published().progress().largest_opener
    }

    /// What the core has counted: elections, applied entries, snapshots and the like.
    pub fn activity(&self) -> &Activity {
        self.inner.core.activity()
    }

    /// What the engine has counted: reads, acknowledgements and refusals.
    pub fn counters(&self) -> &Counters {
        &self.inner.counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_stands_as_its_answers_and_its_lag_say() {
        let well = LedPeer {
            matched: Some(9),
            behind_entries: 0,
            behind: Duration::ZERO,
            heard: Some(Duration::from_millis(20)),
            accepted_entries: 10,
            snapshot: None,
            policy: PeerPolicy::default(),
        };
        assert_eq!(well.standing(), PeerStanding::Connected);
        let late = LedPeer { behind_entries: 5, behind: Duration::from_millis(1001), ..well.clone() };
        assert_eq!(late.standing(), PeerStanding::Lagging);
        let far = LedPeer { behind_entries: SYNCING_ENTRIES + 1, ..late.clone() };
        assert_eq!(far.standing(), PeerStanding::Syncing);
        let fed = LedPeer { snapshot: Some((1, 2)), ..well.clone() };
        assert_eq!(fed.standing(), PeerStanding::Syncing);
        // Who does not answer catches up with nothing.
        let silent = LedPeer { heard: Some(Duration::from_millis(1001)), ..far.clone() };
        assert_eq!(silent.standing(), PeerStanding::Lagging);
        for heard in [None, Some(Duration::from_millis(60_001))] {
            let gone = LedPeer { heard, ..far.clone() };
            assert_eq!(gone.standing(), PeerStanding::Disconnected);
        }
        // Who expects more of its peers calls them slow or gone earlier.
        let policy = PeerPolicy { lagging_after_ms: 10, disconnected_after_ms: 19, ..well.policy };
        assert_eq!(LedPeer { policy, ..well.clone() }.standing(), PeerStanding::Disconnected);
        let policy = PeerPolicy { disconnected_after_ms: 20, ..policy };
        assert_eq!(LedPeer { policy, ..well }.standing(), PeerStanding::Lagging);
    }

    #[test]
    fn refusals_and_levels_are_counted_in_their_places() {
        let counters = Counters::default();
        Refused::ALL.into_iter().for_each(|why| counters.refuse(why));
        counters.refuse(Refused::Overloaded);
        let refused = Refused::ALL.map(|why| counters.refused(why));
        assert_eq!(refused, [1, 2, 1, 1, 1, 1, 1, 1, 1]);
        counters.read(ReadLevel::Bounded { max_lag_ms: 5 });
        assert_eq!(counters.reads(), [0, 0, 1, 0]);
        counters.acknowledge(AckLevel::Leader);
        assert_eq!(AckLevel::ALL.map(|level| counters.acknowledged(level)), [0, 0, 1]);
    }
}
