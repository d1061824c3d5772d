//! A node's own line to whoever leads, for what followers ask of their leader.
//!
//! One connection at a time, dialled when somebody calls and again when the leader changes or the connection
//! broke. Unlike on the connections that replicate, calls are answered in any order: a slow one holds up
//! nobody. What is sent here may therefore be nothing that openraft wants in order.
//!
//! It promises an answer or an error within the caller's patience, and an error says whether the call may have been
//! carried out. It does not retry: the caller knows whether the leader is still the same. Numbers of calls grow in the
//! order in which they are sent, so that the leader knows a call that arrives twice.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::calls::{self, CallDone, CallError, LeaderCall};
use super::handshake::OwnHandshake;
use super::incoming::Incoming;
use super::wire;
use super::{Connection, DialError, Purpose, Target, Transport};
use crate::machine::StateMachine;
use crate::proto::peer::{self as proto, Request, Response, read_index_response, request, response};
use crate::raft::agreement::{Check, HashesTold};
use crate::runtime;
use crate::types::{Incarnation, Member, NodeId};

/// A dial that takes longer has failed.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// A leader that could not be reached is not dialled again before this has passed.
const DIAL_PAUSE: Duration = Duration::from_millis(50);
/// A call that is passed on may take as long by itself, however impatient its caller is: it says nothing of the connection.
const SILENCE: Duration = Duration::from_secs(5);
/// Most calls waiting for their answers; more are refused.
const MAX_CALLS: usize = 65_536;

/// Why the leader has not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LeaderLineError {
    /// There is no connection.
    #[error("node {leader} is not reached: {error}")]
    NotConnected {
        /// Whom the call was for.
        leader: NodeId,
        /// Why not.
        error: DialError,
    },
    /// The connection broke before the answer came. The leader may have acted on the call.
    #[error("the connection to node {leader} broke")]
    Broken {
        /// Whom the call was for.
        leader: NodeId,
    },
    /// No answer in time. If the call was sent, the leader may have acted on it, or may do so later.
    #[error("node {leader} did not answer within {} ms", .patience.as_millis())]
    Timeout {
        /// Whom the call was for.
        leader: NodeId,
        /// How long was waited.
        patience: Duration,
        /// Whether the call left this node.
        sent: bool,
    },
    /// Too many calls are waiting for their answers.
    #[error("{MAX_CALLS} calls to node {leader} are waiting already")]
    Overloaded {
        /// Whom the call was for.
        leader: NodeId,
    },
    /// The leader could not make sense of the call, and has not acted on it.
    #[error("node {leader}: {reason}")]
    Failed {
        /// Whom the call was for.
        leader: NodeId,
        /// What was wrong.
        reason: String,
    },
    /// The caller could not make sense of the answer. The leader may have acted on the call.
    #[error("node {leader} answers what this node does not understand: {reason}")]
    Unintelligible {
        /// Whom the call was for.
        leader: NodeId,
        /// What was wrong.
        reason: String,
    },
}

impl LeaderLineError {
    /// Whether the leader may have acted on the call, or may do so later.
    pub(crate) fn maybe_done(&self) -> bool {
        match self {
            Self::NotConnected { .. } | Self::Overloaded { .. } | Self::Failed { .. } => false,
            Self::Broken { .. } | Self::Unintelligible { .. } => true,
            Self::Timeout { sent, .. } => *sent,
        }
    }
}

/// What a node says when it is asked for a read index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ReadIndexAnswer {
    /// A state that has applied this index has seen every write acknowledged before the call.
    Index(u64),
    /// The node does not lead; this one may.
    NotLeader(Option<NodeId>),
    /// No quorum confirmed in time that the node leads.
    NoQuorum(String),
}

/// What a member wants its leader to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Announcement {
    /// The member's present addresses and identity, where they differ from the membership's.
    pub member: Option<Member>,
    /// It prefers to lead, and is ready to.
    pub wants_lead: bool,
}

/// The line to the leader. Cheap to clone; all clones share one connection.
#[derive(Clone)]
pub(crate) struct LeaderLine {
    shared: Arc<Line>,
}

struct Line {
    handshake: OwnHandshake,
    transport: Arc<dyn Transport>,
    current: Mutex<Option<Dialled>>,
}

/// A connection, or the attempt to make one.
#[derive(Clone)]
struct Dialled {
    leader: NodeId,
    incarnation: Incarnation,
    outcome: Shared<BoxFuture<'static, Result<Arc<LineConnection>, FailedDial>>>,
}

#[derive(Debug, Clone)]
struct FailedDial {
    error: DialError,
    at: Instant,
}

/// An open connection.
struct LineConnection {
    requests: mpsc::Sender<Request>,
    waiting: Arc<WaitingCalls>,
    /// Ends the task that takes in answers when the link is dropped.
    _open: oneshot::Sender<()>,
}

/// Calls waiting for their answers.
struct WaitingCalls {
    calls: Mutex<UnansweredCalls>,
    /// When anything last arrived.
    heard: Mutex<Instant>,
    /// The connection is to be replaced.
    given_up: AtomicBool,
}

struct UnansweredCalls {
    next_id: u64,
    /// `None` once the connection is closed.
    answers: Option<HashMap<u64, oneshot::Sender<response::Body>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("invariant: no panic under this lock")
}

impl LeaderLine {
    /// A line on which `caller` calls over `transport`. Nothing is dialled before the first call.
    pub(crate) fn new(handshake: OwnHandshake, transport: Arc<dyn Transport>) -> Self {
        Self { shared: Arc::new(Line { handshake, transport, current: Mutex::default() }) }
    }

    /// Sends `body` to `leader` and waits for its answer until `patience` has passed, dialling included. Many
    /// calls may be in flight at a time.
    ///
    /// # Errors
    /// See [`LeaderLineError`].
    pub(crate) async fn call(
        &self,
        leader: NodeId,
        member: &Member,
        body: request::Body,
        patience: Duration,
    ) -> Result<response::Body, LeaderLineError> {
        self.call_until(leader, member, body, tokio::time::sleep(patience), Duration::ZERO).await
    }

    /// The same, until something else has happened. A connection on which nothing arrives meanwhile is given up, if that took as long
    /// as a lively one is never `silent`.
    async fn call_until(
        &self,
        leader: NodeId,
        member: &Member,
        body: request::Body,
        given_up: impl Future<Output = ()>,
        silent: Duration,
    ) -> Result<response::Body, LeaderLineError> {
        let begun = Instant::now();
        let dialled = self.dialled(leader, member);
        let mut used = Used::default();
        let exchange = async {
            let connected = dialled.outcome.await;
            let connected = connected
                .map_err(|FailedDial { error, .. }| LeaderLineError::NotConnected { leader, error })?;
            connected.call(leader, body, &mut used).await
        };
        let answered = tokio::select! {
            biased;
            outcome = exchange => Some(outcome),
            () = given_up => None,
        };
        match answered {
            Some(Ok(response::Body::Failure(reason))) => Err(LeaderLineError::Failed { leader, reason }),
            Some(outcome) => outcome,
            None => {
                // A connection on which nothing at all has arrived since may be dead without knowing it.
                if let Some(waiting) = used.waiting
                    && begun.elapsed() >= silent
                    && *lock(&waiting.heard) <= begun
                {
                    waiting.given_up.store(true, Ordering::Relaxed);
                }
                Err(LeaderLineError::Timeout { leader, patience: begun.elapsed(), sent: used.sent })
            }
        }
    }

    /// Asks `leader` up to where a state must have applied to answer a linearizable read that waits now.
    ///
    /// # Errors
    /// See [`LeaderLineError`].
    pub(crate) async fn read_index(
        &self,
        leader: NodeId,
        member: &Member,
        patience: Duration,
    ) -> Result<ReadIndexAnswer, LeaderLineError> {
        use read_index_response::Outcome;
        let body = request::Body::ReadIndex(proto::ReadIndexRequest {});
        let answer = self.call(leader, member, body, patience).await?;
        match answer {
            response::Body::ReadIndex(proto::ReadIndexResponse { outcome: Some(outcome) }) => {
                Ok(match outcome {
                    Outcome::Index(index) => ReadIndexAnswer::Index(index),
                    Outcome::Leader(0) => ReadIndexAnswer::NotLeader(None),
                    Outcome::Leader(node_id) => ReadIndexAnswer::NotLeader(Some(node_id)),
                    Outcome::NoQuorum(reason) => ReadIndexAnswer::NoQuorum(reason),
                })
            }
            _ => Err(unintelligible(leader, "not the answer to a read index")),
        }
    }

    /// Tells `leader` what this node wants it to know. Returns whether it leads and has taken notice, which does
    /// not mean that it has acted yet.
    ///
    /// # Errors
    /// See [`LeaderLineError`].
    pub(crate) async fn announce(
        &self,
        leader: NodeId,
        member: &Member,
        announcement: &Announcement,
        patience: Duration,
    ) -> Result<bool, LeaderLineError> {
        let body = request::Body::Announce(wire::announce(announcement));
        match self.call(leader, member, body, patience).await? {
            response::Body::Announce(answer) => Ok(answer.accepted),
            _ => Err(unintelligible(leader, "not the answer to an announcement")),
        }
    }

    /// Tells `leader` the hashes of this node's states. Returns what all members have said; nothing when it does not lead.
    ///
    /// # Errors
    /// See [`LeaderLineError`].
    pub(crate) async fn compare<M: StateMachine>(
        &self,
        leader: NodeId,
        member: &Member,
        checks: &[Check],
        patience: Duration,
    ) -> Result<HashesTold, LeaderLineError> {
        let body = request::Body::Compare(wire::compare::<M>(checks));
        match self.call(leader, member, body, patience).await? {
            response::Body::Compare(told) => {
                wire::from_compare_response(told).map_err(|error| unintelligible(leader, error))
            }
            _ => Err(unintelligible(leader, "not the answer to a comparison")),
        }
    }

    /// Has `leader` do `call`, which is given up when its caller's `patience` is over, or the leader is `superseded`. Returns what
    /// the leader says has come of it.
    ///
    /// # Errors
    /// See [`LeaderLineError`]. One that [may have been acted on](LeaderLineError::maybe_done) is not to be passed on again,
    /// unless doing it twice is the same as doing it once.
    pub(crate) async fn forward(
        &self,
        leader: NodeId,
        member: &Member,
        call: &LeaderCall,
        patience: Duration,
        superseded: impl Future<Output = ()>,
    ) -> Result<Result<CallDone, CallError>, LeaderLineError> {
        let body = request::Body::Forward(call.to_wire(patience));
        let given_up = async {
            // Whichever comes first.
            let _ = tokio::time::timeout(patience, superseded).await;
        };
        match self.call_until(leader, member, body, given_up, SILENCE).await? {
            response::Body::Forward(answer) => {
                calls::answer_from_wire(answer).map_err(|error| unintelligible(leader, error))
            }
            _ => Err(unintelligible(leader, "not the answer to a forwarded call")),
        }
    }

    /// The connection to `leader`, or the attempt to make one that is under way.
    fn dialled(&self, leader: NodeId, member: &Member) -> Dialled {
        let mut current = lock(&self.shared.current);
        if let Some(dialled) = &*current
            && (dialled.leader, dialled.incarnation) == (leader, member.incarnation)
        {
            let usable = match dialled.outcome.peek() {
                None => true,
                Some(Ok(link)) => link.is_usable(),
                Some(Err(failed)) => failed.at.elapsed() < DIAL_PAUSE,
            };
            if usable {
                return dialled.clone();
            }
        }
        let dialled = self.dial(leader, member);
        *current = Some(dialled.clone());
        dialled
    }

    fn dial(&self, leader: NodeId, member: &Member) -> Dialled {
        let line = self.shared.clone();
        let target = Target { node_id: leader, address: line.handshake.addresses.of(leader, member) };
        let hello = line.handshake.towards(leader, Some(member.incarnation));
        let connect = line.transport.connect(target.clone(), hello, Purpose::Upstream);
        let known = member.clone();
        let (done, outcome) = oneshot::channel();
        // The dial goes on when its caller gives up: a handshake may take longer than a read waits.
        runtime::spawn(async move {
            let dialled = match tokio::time::timeout(DIAL_TIMEOUT, connect).await {
                Ok(dialled) => dialled,
                Err(_) => Err(DialError::no_answer_within(DIAL_TIMEOUT)),
            };
            if dialled.is_ok() {
                line.handshake.addresses.reached(leader, &known, &target.address);
            }
            let dialled = dialled.map(LineConnection::open).map_err(|error| {
                line.handshake.addresses.failed(leader, &target.address);
                tracing::debug!(node = leader, address = %target.address, %error, "cannot reach the leader");
                if let DialError::Refused(refusal) = &error {
                    (line.handshake.refused)(refusal);
                }
                FailedDial { error, at: Instant::now() }
            });
            // Nobody waits any more when the line was dropped.
            let _ = done.send(dialled);
        });
        let outcome = outcome.map(|dialled| match dialled {
            Ok(dialled) => dialled,
            Err(_) => {
                let error = DialError::Unreachable("the dial was abandoned".to_owned());
                Err(FailedDial { error, at: Instant::now() })
            }
        });
        Dialled { leader, incarnation: member.incarnation, outcome: outcome.boxed().shared() }
    }
}

fn unintelligible(leader: NodeId, reason: impl std::fmt::Display) -> LeaderLineError {
    LeaderLineError::Unintelligible { leader, reason: reason.to_string() }
}

/// How far a call has got.
#[derive(Default)]
struct Used {
    /// Those that wait on the connection that it uses.
    waiting: Option<Arc<WaitingCalls>>,
    /// It is on its way.
    sent: bool,
}

impl LineConnection {
    fn open(connection: Connection) -> Arc<Self> {
        let Connection { requests, responses } = connection;
        let waiting = Arc::new(WaitingCalls {
            calls: Mutex::new(UnansweredCalls { next_id: 1, answers: Some(HashMap::new()) }),
            heard: Mutex::new(Instant::now()),
            given_up: AtomicBool::new(false),
        });
        let (open, dropped) = oneshot::channel();
        runtime::spawn(take_answers(responses, waiting.clone(), dropped));
        Arc::new(Self { requests, waiting, _open: open })
    }

    fn is_usable(&self) -> bool {
        !self.requests.is_closed()
            && !self.waiting.given_up.load(Ordering::Relaxed)
            && lock(&self.waiting.calls).answers.is_some()
    }

    async fn call(
        &self,
        leader: NodeId,
        body: request::Body,
        used: &mut Used,
    ) -> Result<response::Body, LeaderLineError> {
        used.waiting = Some(self.waiting.clone());
        let closed = || {
            let error = DialError::Unreachable("the connection was closed".to_owned());
            LeaderLineError::NotConnected { leader, error }
        };
        let (answer, answered) = oneshot::channel();
        let room = self.requests.reserve().await.map_err(|_| closed())?;
        let send = |id| room.send(Request { id, body: Some(body) });
        let id = self.waiting.enter(answer, send).map_err(|full| match full {
            true => LeaderLineError::Overloaded { leader },
            false => closed(),
        })?;
        let _place = CallPlace { waiting: &self.waiting, id };
        used.sent = true;
        answered.await.map_err(|_| LeaderLineError::Broken { leader })
    }
}

impl WaitingCalls {
    /// Sends a call with its number, in the order of numbers, and keeps a place for its answer. False when the connection is
    /// closed, true when too many wait; then nothing is sent.
    fn enter(&self, answer: oneshot::Sender<response::Body>, send: impl FnOnce(u64)) -> Result<u64, bool> {
        let mut calls = lock(&self.calls);
        let id = calls.next_id;
        let answers = calls.answers.as_mut().ok_or(false)?;
        if answers.len() >= MAX_CALLS {
            return Err(true);
        }
        answers.insert(id, answer);
        calls.next_id += 1;
        send(id);
        Ok(id)
    }
}

/// A call's place among those that wait, left when the call ends, however it ends.
struct CallPlace<'w> {
    waiting: &'w WaitingCalls,
    id: u64,
}

impl Drop for CallPlace<'_> {
    fn drop(&mut self) {
        if let Some(answers) = &mut lock(&self.waiting.calls).answers {
            answers.remove(&self.id);
        }
    }
}

/// Hands every answer to the call it belongs to, until the connection or the link is gone.
async fn take_answers(
    mut responses: Incoming<Response>,
    waiting: Arc<WaitingCalls>,
    mut dropped: oneshot::Receiver<()>,
) {
    loop {
        let response = tokio::select! {
            biased;
            _ = &mut dropped => break,
            response = responses.recv() => response,
        };
        let Some(Response { id, body }) = response else { break };
        *lock(&waiting.heard) = Instant::now();
        let caller = lock(&waiting.calls).answers.as_mut().and_then(|answers| answers.remove(&id));
        // A call that was given up, or answered before.
        let Some(caller) = caller else { continue };
        if let Some(body) = body {
            let _ = caller.send(body);
        }
    }
    // Whoever still waits learns that the connection is gone.
    lock(&waiting.calls).answers = None;
}

#[cfg(test)]
mod tests;
