//! The types openraft works with, and the border between them and [`crate::types`].

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use openraft::RaftTypeConfig;
use openraft::errors::{Fatal, ForwardToLeader};
use openraft::raft::responder::Responder as RaftResponder;
use openraft::type_config::AsyncRuntime;
use openraft::vote::{RaftLeaderId, RaftLeaderIdExt as _};
use openraft_rt_tokio::TokioRuntime;
use rand::{SeedableRng, rngs::SmallRng};

use super::consensus_tasks;
use crate::error::Leader;
use crate::machine::sessions::SessionRefusal;
use crate::runtime;
use crate::types::{self, Member, NodeId};

/// Textbook Raft: one leader per term, terms and node ids are numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TypeConfig;

/// Identifies the leader of a term.
pub(crate) type LeaderId = openraft::impls::leader_id_std::LeaderId<u64, NodeId>;
/// The leader's part of a log id: its term.
pub(crate) type CommittedLeaderId = <LeaderId as RaftLeaderId>::Committed;
/// openraft's log id.
pub(crate) type LogId = openraft::LogId<CommittedLeaderId>;
/// openraft's vote.
pub(crate) type Vote = openraft::impls::Vote<LeaderId>;
/// openraft's payload.
pub(crate) type Payload = openraft::EntryPayload<SealedCommand, NodeId, Member>;
/// openraft's entry.
pub(crate) type Entry = openraft::Entry<CommittedLeaderId, Payload>;
/// openraft's membership.
pub(crate) type Membership = openraft::Membership<NodeId, Member>;
/// A membership and where in the log it stands.
pub(crate) type StoredMembership = openraft::StoredMembership<CommittedLeaderId, NodeId, Member>;
/// What a snapshot covers.
pub(crate) type SnapshotMeta = openraft::storage::SnapshotMeta<CommittedLeaderId, NodeId, Member>;

impl RaftTypeConfig for TypeConfig {
    type D = SealedCommand;
    type R = EntryAnswer;
    type NodeId = NodeId;
    type Node = Member;
    type Term = u64;
    type LeaderId = LeaderId;
    type Vote = Vote;
    type Payload = Payload;
    type Entry = Entry;
    type AsyncRuntime = Runtime;
    type Responder<T>
        = Responder<T>
    where
        T: Send + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: Send + 'static;
    type ErrorSource = ErrorCause;
}

/// What an error of the log or the snapshots says, without the names of Rust's types.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, thiserror::Error)]
#[error("{0}")]
pub struct ErrorCause(Box<str>);

impl openraft::errors::ErrorSource for ErrorCause {
    fn from_error<E: std::error::Error + 'static>(error: &E) -> Self {
        Self::from_string(error)
    }

    fn from_string(said: impl ToString) -> Self {
        Self(said.to_string().into())
    }
}

/// A command in its [envelope](super::envelope), opaque to consensus.
#[derive(Clone)]
pub struct SealedCommand {
    /// The envelope.
    pub bytes: Bytes,
    /// Who wants to know when this node has it on disk. Does not travel.
    pub on_flushed: Option<OnFlushed>,
}

impl SealedCommand {
    /// A command that nobody on this node waits for.
    pub fn new(bytes: Bytes) -> Self {
        Self { bytes, on_flushed: None }
    }
}

impl PartialEq for SealedCommand {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for SealedCommand {}

/// Called at most once, when the log of the node that proposed a command has it on disk.
#[derive(Clone)]
pub struct OnFlushed(Arc<Mutex<Option<OnFlushedCall>>>);

type OnFlushedCall = Box<dyn FnOnce(types::LogId) + Send>;

impl OnFlushed {
    /// Calls `call` with the command's position.
    pub fn new(call: impl FnOnce(types::LogId) + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Some(Box::new(call)))))
    }

    /// The command is on disk, at `log_id`.
    pub fn flushed(&self, log_id: types::LogId) {
        let call = self.0.lock().expect("invariant: no panic under this lock").take();
        if let Some(call) = call {
            call(log_id);
        }
    }
}

impl fmt::Debug for SealedCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for SealedCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.bytes.len())
    }
}

/// Why a committed entry was not carried out, on any node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotApplied {
    /// Its session did not let it through.
    Session(SessionRefusal),
    /// The state would have outgrown its quota. Its session does not count it as applied.
    QuotaExceeded {
        /// Bytes of state.
        state_bytes: u64,
        /// How many they may be.
        quota_bytes: u64,
    },
}

impl From<SessionRefusal> for NotApplied {
    fn from(refusal: SessionRefusal) -> Self {
        Self::Session(refusal)
    }
}

/// What an applied entry was answered.
#[derive(Debug, Clone)]
pub struct EntryAnswer {
    /// The machine's reply, encoded, or why the entry was not carried out.
    pub reply: Result<Bytes, NotApplied>,
    /// Where the command stands, when it was applied by an earlier entry of the same session and sequence.
    pub first: Option<types::LogId>,
}

impl EntryAnswer {
    /// Of an entry that is answered by being applied.
    pub fn empty() -> Self {
        Self { reply: Ok(Bytes::new()), first: None }
    }
}

/// Calls back with the outcome of a request, or with `None` when the core went away without one.
pub struct Responder<T>(Option<Box<dyn FnOnce(Option<T>) + Send>>);

impl<T> Responder<T> {
    /// A responder that calls `done` exactly once.
    pub fn new(done: impl FnOnce(Option<T>) + Send + 'static) -> Self {
        Self(Some(Box::new(done)))
    }
}

impl<T> fmt::Debug for Responder<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Responder").finish()
    }
}

impl<T: Send + 'static> RaftResponder<TypeConfig, T> for Responder<T> {
    fn on_complete(mut self, result: T) {
        if let Some(done) = self.0.take() {
            done(Some(result));
        }
    }
}

impl<T> Drop for Responder<T> {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done(None);
        }
    }
}

/// Tokio, with tasks and random numbers from [`crate::runtime`] so that simulation can replace them.
#[derive(Debug)]
pub struct Runtime(TokioRuntime);

impl AsyncRuntime for Runtime {
    type JoinError = tokio::task::JoinError;
    type JoinHandle<T: Send + 'static> = tokio::task::JoinHandle<T>;
    type Sleep = tokio::time::Sleep;
    type Instant = <TokioRuntime as AsyncRuntime>::Instant;
    type TimeoutError = tokio::time::error::Elapsed;
    type Timeout<R, F: Future<Output = R> + Send> = tokio::time::Timeout<F>;
    type ThreadLocalRng = SmallRng;
    type Mpsc = openraft_rt_tokio::TokioMpsc;
    type Watch = openraft_rt_tokio::TokioWatch;
    type Oneshot = openraft_rt_tokio::TokioOneshot;
    type Mutex<T: Send + 'static> = openraft_rt_tokio::TokioMutex<T>;

    fn spawn<F>(future: F) -> Self::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        consensus_tasks::spawn(future)
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        TokioRuntime::sleep(duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        TokioRuntime::sleep_until(deadline)
    }

    fn timeout<R, F: Future<Output = R> + Send>(duration: Duration, future: F) -> Self::Timeout<R, F> {
        TokioRuntime::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + Send>(
        deadline: Self::Instant,
        future: F,
    ) -> Self::Timeout<R, F> {
        TokioRuntime::timeout_at(deadline, future)
    }

    fn is_panic(error: &Self::JoinError) -> bool {
        error.is_panic()
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        SmallRng::seed_from_u64(runtime::random_u64())
    }

    fn new(threads: usize) -> Self {
        Self(TokioRuntime::new(threads))
    }

    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        self.0.block_on(future)
    }
}

/// openraft's form of `log_id`.
pub(crate) fn log_id(log_id: types::LogId) -> LogId {
    LogId::new(LeaderId::new_committed(log_id.term, 0), log_id.index)
}

/// Our form of `log_id`.
pub(crate) fn from_log_id(log_id: &LogId) -> types::LogId {
    types::LogId::new(log_id.leader_id.term, log_id.index)
}

/// openraft's form of `vote`.
pub(crate) fn vote(vote: types::Vote) -> Vote {
    Vote { leader_id: LeaderId::new(vote.term, vote.node_id), committed: vote.committed }
}

/// Our form of `vote`.
pub(crate) fn from_vote(vote: &Vote) -> types::Vote {
    types::Vote { term: vote.leader_id.term, node_id: vote.leader_id.voted_for, committed: vote.committed }
}

/// Who leads instead, according to openraft.
pub(crate) fn leader(forward: ForwardToLeader<TypeConfig>) -> Option<Leader> {
    match (forward.leader_id, forward.leader_node) {
        (Some(node_id), Some(member)) => Some(Leader { node_id, client: member.client }),
        _ => None,
    }
}

/// Why the core has stopped, without openraft's names for where.
pub(crate) fn fatal(fatal: &Fatal<TypeConfig>) -> String {
    match fatal {
        Fatal::StorageError(error) => match std::error::Error::source(error) {
            Some(source) => source.to_string(),
            None => "the log or a snapshot cannot be read or written".to_owned(),
        },
        Fatal::Panicked => "the consensus core has panicked; the node's log says where".to_owned(),
        Fatal::Stopped => "the node is shutting down".to_owned(),
    }
}

/// openraft's form of `membership`.
///
/// # Errors
/// When a voter has no entry among the members, or there is no voter.
pub(crate) fn membership(
    membership: types::Membership,
) -> Result<Membership, openraft::errors::MembershipError<NodeId>> {
    Membership::new(membership.voters, membership.members)
}

/// Our form of `membership`.
pub(crate) fn from_membership(membership: &Membership) -> types::Membership {
    types::Membership {
        voters: membership.get_joint_config().clone(),
        members: membership.nodes().map(|(id, member)| (*id, member.clone())).collect(),
    }
}

/// openraft's form of `entry`.
///
/// # Errors
/// As [`membership`].
pub(crate) fn entry(entry: types::Entry) -> Result<Entry, openraft::errors::MembershipError<NodeId>> {
    let payload = match entry.payload {
        types::Payload::Blank => Payload::Blank,
        types::Payload::Command(bytes) => Payload::Normal(SealedCommand::new(bytes)),
        types::Payload::Membership(change) => Payload::Membership(membership(change)?),
    };
    Ok(Entry { log_id: log_id(entry.log_id), payload })
}

/// Our form of `entry`.
pub(crate) fn from_entry(entry: Entry) -> types::Entry {
    let payload = match entry.payload {
        Payload::Blank => types::Payload::Blank,
        Payload::Normal(command) => types::Payload::Command(command.bytes),
        Payload::Membership(membership) => types::Payload::Membership(from_membership(&membership)),
    };
    types::Entry { log_id: from_log_id(&entry.log_id), payload }
}
