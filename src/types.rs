//! The vocabulary every room shares: ids, positions, log entries, membership and read levels.
//!
//! These are quorate's own types. Nothing here names openraft, sled or tonic, so the public API, the
//! disk format and the wire format do not move when one of those does.

mod founding;
mod named;
mod unconfirmed;
mod versions;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub(crate) use founding::check_initial_state;
pub use founding::{Founding, InitialState, OtherInitialState};
pub use named::{DiskState, MemberKind, PeerStanding, QuotaSource, ReadWait, Role};
pub use unconfirmed::UnconfirmedReply;
pub use versions::{MachineVersion, ReadableVersions, SnapshotMachines, UnsupportedVersion};
pub(crate) use versions::{check_agreed, check_version};

/// Identifies a node for the life of its data directory. Chosen by the operator, never reused.
pub type NodeId = u64;

/// The position of an entry: the term of the leader that proposed it, and its index in the log.
///
/// Ordered by term, then index, which for entries of one log is also the order of their indexes
/// (Raft, §5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct LogId {
    /// Term of the leader that proposed the entry.
    pub term: u64,
    /// Index in the log; the first entry has index 0.
    pub index: u64,
}

impl LogId {
    /// The position `index` in `term`.
    pub const fn new(term: u64, index: u64) -> Self {
        Self { term, index }
    }
}

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.term, self.index)
    }
}

/// A vote: in `term`, this node supports `node_id`; `committed` once a quorum has granted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Vote {
    /// The term voted in.
    pub term: u64,
    /// The candidate, or the leader once `committed`.
    pub node_id: NodeId,
    /// Whether a quorum granted this vote, so that `node_id` leads `term`.
    pub committed: bool,
}

/// A random number drawn once per data directory.
///
/// A node id says which member a process claims to be; the incarnation says whether it still has
/// the disk that member made its promises on. A node whose incarnation differs from the one in the
/// membership has lost its log and its vote, and must not take part under its old id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Incarnation(pub u128);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Names one history of a log: positions of different histories say nothing of each other.
///
/// A cluster that is made anew, or restored from a backup, counts its entries from the beginning, or from somewhere else,
/// on the same addresses. Whoever brings a position back brings its history along, so that one of another history is
/// refused instead of being waited for, or taken for one that it is not.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct HistoryEpoch(pub u64);

impl HistoryEpoch {
    /// Not known: a node that was restored from a snapshot of a version without histories knows none. Also what is
    /// brought by whoever does not care.
    pub const UNKNOWN: Self = Self(0);

    /// The history that begins with this membership. As random as the incarnations in it, and the same for all who read it.
    pub fn founded_by(membership: &Membership) -> Self {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        for (node_id, member) in &membership.members {
            hasher.update(&node_id.to_le_bytes());
            hasher.update(&member.incarnation.0.to_le_bytes());
        }
        Self(hasher.digest().max(1))
    }

    /// Whether both are known, and are not the same.
    pub fn differs_from(self, other: Self) -> bool {
        self != Self::UNKNOWN && other != Self::UNKNOWN && self != other
    }
}

impl fmt::Display for HistoryEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for HistoryEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Where to read from or go on from: an index of the log, and the history in which it was found.
///
/// As text `42@9f3c52a80d1e7b64`, or `42` without a history, which is then not checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Bookmark {
    /// The index.
    pub index: u64,
    /// The history.
    pub history: HistoryEpoch,
}

impl From<u64> for Bookmark {
    fn from(index: u64) -> Self {
        Self { index, history: HistoryEpoch::UNKNOWN }
    }
}

impl fmt::Display for Bookmark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.history {
            HistoryEpoch::UNKNOWN => write!(f, "{}", self.index),
            history => write!(f, "{}@{history}", self.index),
        }
    }
}

/// A text is no [`Bookmark`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write an index, or an index and a history as in 42@9f3c52a80d1e7b64")]
pub struct ParseBookmarkError;

impl FromStr for Bookmark {
    type Err = ParseBookmarkError;

    fn from_str(text: &str) -> Result<Self, ParseBookmarkError> {
        let digits = |text: &str, radix| {
            let plain = text.bytes().all(|byte| byte.is_ascii_hexdigit());
            u64::from_str_radix(text, radix).ok().filter(|_| plain).ok_or(ParseBookmarkError)
        };
        Ok(match text.split_once('@') {
            None => digits(text, 10)?.into(),
            Some((index, history)) => {
                Self { index: digits(index, 10)?, history: HistoryEpoch(digits(history, 16)?) }
            }
        })
    }
}

/// Where a member is reached, and which data directory it must present.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Member {
    /// Advertised `host:port` of its peer port.
    pub peer: String,
    /// Advertised `host:port` of its client port.
    pub client: String,
    /// Identity of the data directory this member joined with.
    pub incarnation: Incarnation,
    /// What members are to be, by id: see [`Intent`]. Agreed by the cluster, and no part of what a member says of itself.
    #[serde(skip)]
    pub intents: BTreeMap<NodeId, Intent>,
    /// What the founders agreed on, on the record of one of them.
    #[serde(skip)]
    pub founding: Option<Founding>,
}

impl Member {
    /// Whether both are the same data directory at the same addresses.
    pub fn is_same_place(&self, other: &Self) -> bool {
        (&self.peer, &self.client, self.incarnation) == (&other.peer, &other.client, other.incarnation)
    }
}

/// What a member is to be once a change of several entries is complete, so that whoever goes on with it knows.
///
/// A note stands on the record of the member that it is about; while there is none, because the member was removed to be
/// added again with another data directory, on that of another member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Intent {
    /// A voter: it takes the place of one.
    Voter,
    /// A learner: it takes the place of one, or stays when it ceases to vote.
    Learner,
}

impl Member {
    /// Longest address, in bytes: a host name has at most 253.
    pub const MAX_ADDRESS_BYTES: usize = 512;

    /// Whether its addresses are no longer than they may be. Members refuse a membership with longer ones.
    pub fn fits(&self) -> bool {
        self.peer.len() <= Self::MAX_ADDRESS_BYTES && self.client.len() <= Self::MAX_ADDRESS_BYTES
    }
}

/// What members are to be: on whose record that stands, about which member, and what. So it is stored.
pub(crate) type Intents = Vec<(NodeId, NodeId, Intent)>;

/// Who belongs to the cluster, and who votes.
///
/// One voter set in the ordinary case, two while a joint change is under way (Raft, §6). Every
/// voter is also in `members`; a member in no voter set is a learner.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Membership {
    /// The voter sets; a decision needs a majority of each.
    pub voters: Vec<BTreeSet<NodeId>>,
    /// Voters and learners.
    pub members: BTreeMap<NodeId, Member>,
}

impl Membership {
    /// Most [notes](Intent) in one. Members refuse a membership with more, and no leader makes one.
    pub const MOST_INTENTS: usize = 1024;

    /// Whether `node_id` votes in any of the sets.
    pub fn is_voter(&self, node_id: NodeId) -> bool {
        self.voters.iter().any(|set| set.contains(&node_id))
    }

    /// What is noted of what `node_id` is to be.
    pub fn intent(&self, node_id: NodeId) -> Option<Intent> {
        let own = self.members.get(&node_id).into_iter();
        own.chain(self.members.values()).find_map(|member| member.intents.get(&node_id)).copied()
    }

    /// All notes: on whose record, about which member, and what it is to be.
    pub fn intents(&self) -> impl Iterator<Item = (NodeId, NodeId, Intent)> + '_ {
        let notes = |(holder, member): (&NodeId, &Member)| {
            let holder = *holder;
            member.intents.clone().into_iter().map(move |(about, intent)| (holder, about, intent))
        };
        self.members.iter().flat_map(notes)
    }

    /// What its founders agreed on, and on whose record that stands.
    pub fn founding(&self) -> Option<(NodeId, &Founding)> {
        self.members.iter().find_map(|(node_id, member)| Some((*node_id, member.founding.as_ref()?)))
    }

    /// Puts back what [`founding`](Self::founding) has told.
    pub fn with_founding(mut self, founding: Option<(NodeId, Founding)>) -> Self {
        if let Some((node_id, founding)) = founding
            && let Some(member) = self.members.get_mut(&node_id)
        {
            member.founding = Some(founding);
        }
        self
    }

    /// Puts back what [`intents`](Self::intents) has told. Notes on the records of others than members are dropped.
    pub fn with_intents(mut self, notes: impl IntoIterator<Item = (NodeId, NodeId, Intent)>) -> Self {
        for (holder, about, intent) in notes {
            if let Some(member) = self.members.get_mut(&holder) {
                member.intents.insert(about, intent);
            }
        }
        self
    }
}

/// Who leads, as far as the answering node knows, and where clients reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Leader {
    /// The leader's id.
    pub node_id: NodeId,
    /// Its advertised client address, `host:port`.
    pub client: String,
}

/// That a node's state is not the others', at the same position of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Divergence {
    /// After which entry.
    pub at: LogId,
    /// The hash of this node's state.
    pub own: u64,
    /// What a majority of the voters has. `None` when no majority has the same.
    pub majority: Option<u64>,
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, own, majority } = self;
        match majority {
            Some(majority) => write!(
                f,
                "after entry {at} the state of this node has the hash {own:016x}, and that of a majority of the voters {majority:016x}"
            ),
            None => write!(
                f,
                "after entry {at} the state of this node has the hash {own:016x}, and no majority of the voters has the same"
            ),
        }
    }
}

/// How many bytes the state may take, as agreed through the log: all nodes refuse by the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Quota {
    /// Most bytes of state, as the state machine counts them.
    pub bytes: u64,
    /// Who said so.
    pub source: QuotaSource,
}

impl Quota {
    /// Set in [`to_stored`](Self::to_stored) when an operator chose the quota.
    const OPERATOR_BIT: u64 = 1 << 63;
    /// The largest quota there can be.
    pub const MAX_BYTES: u64 = Self::OPERATOR_BIT - 1;
    /// The smallest quota that an operator can set: one command of the greatest length fits.
    pub const MIN_BYTES: u64 = 2 * 1024 * 1024;

    /// One number for both fields, never 0.
    pub fn to_stored(self) -> u64 {
        let bytes = self.bytes.clamp(1, Self::MAX_BYTES);
        match self.source {
            QuotaSource::Memory => bytes,
            QuotaSource::Operator => bytes | Self::OPERATOR_BIT,
        }
    }

    /// What [`to_stored`](Self::to_stored) gave this number for; `None` for 0.
    pub fn from_stored(stored: u64) -> Option<Self> {
        let source = match stored & Self::OPERATOR_BIT {
            0 => QuotaSource::Memory,
            _ => QuotaSource::Operator,
        };
        let bytes = stored & Self::MAX_BYTES;
        (bytes != 0).then_some(Self { bytes, source })
    }
}

/// What a node knows of its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct DiskStatus {
    /// What it is good for.
    pub state: DiskState,
    /// Bytes free for this process at the last look; none where nobody looks.
    pub available_bytes: Option<u64>,
    /// Bytes that are set aside, in the reserve file and beyond the end of the log's; none without a reserve.
    pub reserve_bytes: Option<u64>,
    /// Bytes that must be free and set aside together before writes are taken again once the disk was full; none without a
    /// reserve.
    pub needed_bytes: Option<u64>,
    /// How long the present write of the log has been under way.
    #[serde(skip)]
    pub writing_for: Option<Duration>,
    /// Whether there is one: a store in memory has none, and finds everything in order.
    #[serde(skip)]
    pub is_watched: bool,
}

/// How fresh a read must be. `docs/GUARANTEES.md` says what each level promises and when it does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ReadLevel {
    /// Sees every write acknowledged before the read began, on any node: ReadIndex (Raft thesis, §6.4).
    #[default]
    Linearizable,
    /// As linearizable, on the leader only, without asking a quorum while the leader's lease lasts (Raft
    /// thesis, §6.4.1). Holds as long as no two nodes' clocks differ in speed by more than a tenth.
    Lease,
    /// Sees every write acknowledged more than this long before the read began, on any node.
    Bounded {
        /// How long, in milliseconds.
        max_lag_ms: u64,
    },
    /// Whatever this node has applied, however old.
    Local,
}

/// What a read asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReadOptions {
    /// How fresh the answering state must be.
    pub level: ReadLevel,
    /// The answering state includes the entry at this index: the position of an earlier write, to read it
    /// whatever the level and the node.
    pub after_index: u64,
    /// The history that `after_index` belongs to. The read is refused when this is another one.
    pub history: HistoryEpoch,
}

impl ReadOptions {
    /// The same, from a state that includes the entry at `bookmark`.
    #[must_use]
    pub fn after(self, bookmark: Bookmark) -> Self {
        Self { after_index: bookmark.index, history: bookmark.history, ..self }
    }
}

impl From<ReadLevel> for ReadOptions {
    fn from(level: ReadLevel) -> Self {
        Self { level, ..Self::default() }
    }
}

/// When a write is acknowledged. `docs/GUARANTEES.md` says what each level promises and how it can be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AckLevel {
    /// A quorum holds it on disk, and it is applied.
    #[default]
    Quorum,
    /// Every voter holds it on disk, and it is applied.
    All,
    /// The leader holds it on disk. It is lost if the leader fails before a quorum has it; there is no reply
    /// from the state machine.
    Leader,
}

impl AckLevel {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Quorum, Self::All, Self::Leader];

    /// Its name in metrics, JSON and arguments.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quorum => "quorum",
            Self::All => "all",
            Self::Leader => "leader",
        }
    }
}

/// A write's place in a session: what makes it exactly-once. See [`crate::session`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SessionSlot {
    /// The session.
    pub session: u64,
    /// The write's number within it, from 1.
    pub sequence: u64,
    /// All writes with smaller numbers have been answered or given up.
    pub first_unanswered: u64,
}

/// How long a write at [`AckLevel::All`] waits for the slowest voter if its caller does not say.
pub const DEFAULT_ACK_TIMEOUT: Duration = Duration::from_secs(5);

/// How a write is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteOptions {
    /// Its place in a session, which makes it exactly-once.
    pub slot: Option<SessionSlot>,
    /// When it is acknowledged.
    pub ack: AckLevel,
    /// [`AckLevel::All`]: how long to wait, once it is committed, until every voter holds it.
    pub ack_timeout: Duration,
    /// The history that the session, and whatever positions the command holds, belong to. The write is refused, and
    /// nothing proposed, when this is another one.
    pub history: HistoryEpoch,
}

impl Default for WriteOptions {
    fn default() -> Self {
        let (ack, ack_timeout) = (AckLevel::Quorum, DEFAULT_ACK_TIMEOUT);
        Self { slot: None, ack, ack_timeout, history: HistoryEpoch::UNKNOWN }
    }
}

/// The clocks of a cluster, replicated: how much time has passed, and what wall clocks show. [`crate::raft::clock`] says how
/// they advance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct ClusterClock {
    /// Elapsed time in milliseconds. It begins at the wall clock of the first leader, never goes back, and is never ahead of what
    /// has really passed. Lifetimes are measured in it.
    pub elapsed_ms: u64,
    /// What is to be added for log time.
    pub wall_offset_ms: i64,
    /// The term of the last entry that carried a reading of its leader's clocks.
    pub term: u64,
    /// How much that leader had counted in this term by then, in milliseconds; `None` if that is not known.
    pub counted_ms: Option<u64>,
}

/// What an entry carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// Nothing: a new leader's first entry, which commits those of earlier terms (Raft, §8).
    Blank,
    /// One command in its envelope; see [`crate::raft::envelope`].
    Command(Bytes),
    /// A change of membership.
    Membership(Membership),
}

/// One entry of the replicated log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its position.
    pub log_id: LogId,
    /// What it carries.
    pub payload: Payload,
}

impl Entry {
    /// Bytes this entry occupies in memory, in a record and on the wire, give or take a constant.
    pub fn size_bytes(&self) -> usize {
        /// Term, index, kind and length.
        const OVERHEAD_BYTES: usize = 32;
        /// A member is its addresses and an incarnation; membership entries are rare.
        const MEMBER_BYTES: usize = 96;
        OVERHEAD_BYTES
            + match &self.payload {
                Payload::Blank => 0,
                Payload::Command(command) => command.len(),
                Payload::Membership(membership) => membership.members.len() * MEMBER_BYTES,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bookmark_is_read_as_it_is_written() {
        let history = HistoryEpoch(0x0f3c_52a8_0d1e_7b64);
        for (text, bookmark) in [
            ("42", Bookmark::from(42)),
            ("42@0f3c52a80d1e7b64", Bookmark { index: 42, history }),
            ("0@ffffffffffffffff", Bookmark { index: 0, history: HistoryEpoch(u64::MAX) }),
        ] {
            assert_eq!(text.parse(), Ok(bookmark));
            assert_eq!(bookmark.to_string(), text);
        }
        for text in
            ["", "@", "42@", "@7", "-1", "+1", "x", "42@+7", "42@1f3c52a80d1e7b640", "99999999999999999999"]
        {
            assert_eq!(text.parse::<Bookmark>(), Err(ParseBookmarkError), "{text}");
        }
    }

    #[test]
    fn a_history_is_known_by_the_disks_that_founded_it() {
        let founded = |incarnations: &[u128]| {
            let member = |incarnation| Member { incarnation: Incarnation(incarnation), ..Member::default() };
            let members = (1..).zip(incarnations.iter().map(|incarnation| member(*incarnation))).collect();
            HistoryEpoch::founded_by(&Membership { voters: vec![[1].into()], members })
        };
        assert_eq!(founded(&[7, 8]), founded(&[7, 8]));
        assert!(founded(&[7, 8]).differs_from(founded(&[7, 9])), "one disk was wiped");
        assert!(founded(&[7]).differs_from(founded(&[7, 8])));
        assert!(!HistoryEpoch::UNKNOWN.differs_from(founded(&[7])), "nothing is known, nothing is claimed");
        assert!(!founded(&[7]).differs_from(HistoryEpoch::UNKNOWN));
        assert_ne!(founded(&[]), HistoryEpoch::UNKNOWN);
    }
}
