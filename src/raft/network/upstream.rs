//! A node's own line to whoever leads, for what followers ask of their leader.
//!
//! One connection at a time, dialled when somebody calls and again when the leader changes or the connection
//! broke. Unlike on the connections that replicate, calls are answered in any order: a slow one holds up
//! nobody. What is sent here may therefore be nothing that openraft wants in order.
//!
//! It promises an answer or an error within the caller's patience. It does not retry: the caller knows whether
//! the leader is still the same.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::client::Caller;
use super::incoming::Incoming;
use super::wire;
use super::{Connection, DialError, Purpose, Target, Transport};
use crate::machine::StateMachine;
use crate::proto::peer::{self as proto, Request, Response, read_index_response, request, response};
use crate::raft::agreement::{Check, Told};
use crate::runtime;
use crate::types::{Incarnation, Member, NodeId};

/// A dial that takes longer has failed.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// A leader that could not be reached is not dialled again before this has passed.
const DIAL_PAUSE: Duration = Duration::from_millis(50);
/// Most calls waiting for their answers; more are refused.
const MAX_CALLS: usize = 65_536;

/// Why the leader has not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UpstreamError {
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
    /// No answer in time. The leader may have acted on the call, or may do so later.
    #[error("node {leader} did not answer within {} ms", .patience.as_millis())]
    Timeout {
        /// Whom the call was for.
        leader: NodeId,
        /// How long was waited.
        patience: Duration,
    },
    /// Too many calls are waiting for their answers.
    #[error("{MAX_CALLS} calls to node {leader} are waiting already")]
    Overloaded {
        /// Whom the call was for.
        leader: NodeId,
    },
    /// The leader could not make sense of the call, or the caller of its answer.
    #[error("node {leader}: {reason}")]
    Failed {
        /// Whom the call was for.
        leader: NodeId,
        /// What was wrong.
        reason: String,
    },
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
pub(crate) struct Upstream {
    shared: Arc<Line>,
}

struct Line {
    caller: Caller,
    transport: Arc<dyn Transport>,
    current: Mutex<Option<Dialled>>,
}

/// A connection, or the attempt to make one.
#[derive(Clone)]
struct Dialled {
    leader: NodeId,
    incarnation: Incarnation,
    outcome: Shared<BoxFuture<'static, Result<Arc<Link>, Failed>>>,
}

#[derive(Debug, Clone)]
struct Failed {
    error: DialError,
    at: Instant,
}

/// An open connection.
struct Link {
    requests: mpsc::Sender<Request>,
    waiting: Arc<Waiting>,
    /// Ends the task that takes in answers when the link is dropped.
    _open: oneshot::Sender<()>,
}

/// Calls waiting for their answers.
struct Waiting {
    calls: Mutex<Calls>,
    /// When anything last arrived.
    heard: Mutex<Instant>,
    /// The connection is to be replaced.
    given_up: AtomicBool,
}

struct Calls {
    next_id: u64,
    /// `None` once the connection is closed.
    answers: Option<HashMap<u64, oneshot::Sender<response::Body>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("invariant: no panic under this lock")
}

impl Upstream {
    /// A line on which `caller` calls over `transport`. Nothing is dialled before the first call.
    pub(crate) fn new(caller: Caller, transport: Arc<dyn Transport>) -> Self {
        Self { shared: Arc::new(Line { caller, transport, current: Mutex::default() }) }
    }

    /// Sends `body` to `leader` and waits for its answer until `patience` has passed, dialling included. Many
    /// calls may be in flight at a time.
    ///
    /// # Errors
    /// See [`UpstreamError`].
    pub(crate) async fn call(
        &self,
        leader: NodeId,
        member: &Member,
        body: request::Body,
        patience: Duration,
    ) -> Result<response::Body, UpstreamError> {
        let begun = Instant::now();
        let dialled = self.dialled(leader, member);
        let mut link = None;
        let exchange = async {
            let connected = dialled.outcome.await;
            let connected =
                connected.map_err(|Failed { error, .. }| UpstreamError::NotConnected { leader, error })?;
            connected.call(leader, body, &mut link).await
        };
        let answered = tokio::time::timeout(patience, exchange).await;
        match answered {
            Ok(Ok(response::Body::Failure(reason))) => Err(UpstreamError::Failed { leader, reason }),
            Ok(outcome) => outcome,
            Err(_) => {
                // A connection on which nothing at all has arrived since may be dead without knowing it.
                if let Some(waiting) = link
                    && *lock(&waiting.heard) <= begun
                {
                    waiting.given_up.store(true, Ordering::Relaxed);
                }
                Err(UpstreamError::Timeout { leader, patience })
            }
        }
    }

    /// Asks `leader` up to where a state must have applied to answer a linearizable read that waits now.
    ///
    /// # Errors
    /// See [`UpstreamError`].
    pub(crate) async fn read_index(
        &self,
        leader: NodeId,
        member: &Member,
        patience: Duration,
    ) -> Result<ReadIndexAnswer, UpstreamError> {
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
            _ => Err(UpstreamError::Failed { leader, reason: "not the answer to a read index".to_owned() }),
        }
    }

    /// Tells `leader` what this node wants it to know. Returns whether it leads and has taken notice, which does
    /// not mean that it has acted yet.
    ///
    /// # Errors
    /// See [`UpstreamError`].
    pub(crate) async fn announce(
        &self,
        leader: NodeId,
        member: &Member,
        announcement: &Announcement,
        patience: Duration,
    ) -> Result<bool, UpstreamError> {
        let body = request::Body::Announce(wire::announce(announcement));
        match self.call(leader, member, body, patience).await? {
            response::Body::Announce(answer) => Ok(answer.accepted),
            _ => {
                Err(UpstreamError::Failed { leader, reason: "not the answer to an announcement".to_owned() })
            }
        }
    }

    /// Tells `leader` the hashes of this node's states. Returns what all members have said; nothing when it does not lead.
    ///
    /// # Errors
    /// See [`UpstreamError`].
    pub(crate) async fn compare<M: StateMachine>(
        &self,
        leader: NodeId,
        member: &Member,
        checks: &[Check],
        patience: Duration,
    ) -> Result<Told, UpstreamError> {
        let failed = |reason: String| UpstreamError::Failed { leader, reason };
        let body = request::Body::Compare(wire::compare::<M>(checks));
        match self.call(leader, member, body, patience).await? {
            response::Body::Compare(told) => {
                wire::from_compare_response(told).map_err(|error| failed(error.to_string()))
            }
            response::Body::Failure(reason) => Err(failed(reason)),
            _ => Err(failed("not the answer to a comparison".to_owned())),
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
        let target = Target { node_id: leader, address: line.caller.addresses.of(leader, member) };
        let hello = line.caller.hello(leader, Some(member.incarnation));
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
                line.caller.addresses.reached(leader, &known, &target.address);
            }
            let dialled = dialled.map(Link::open).map_err(|error| {
                line.caller.addresses.failed(leader, &target.address);
                tracing::debug!(node = leader, address = %target.address, %error, "cannot reach the leader");
                if let DialError::Refused(refusal) = &error {
                    (line.caller.refused)(refusal);
                }
                Failed { error, at: Instant::now() }
            });
            // Nobody waits any more when the line was dropped.
            let _ = done.send(dialled);
        });
        let outcome = outcome.map(|dialled| match dialled {
            Ok(dialled) => dialled,
            Err(_) => {
                let error = DialError::Unreachable("the dial was abandoned".to_owned());
                Err(Failed { error, at: Instant::now() })
            }
        });
        Dialled { leader, incarnation: member.incarnation, outcome: outcome.boxed().shared() }
    }
}

impl Link {
    fn open(connection: Connection) -> Arc<Self> {
        let Connection { requests, responses } = connection;
        let waiting = Arc::new(Waiting {
            calls: Mutex::new(Calls { next_id: 1, answers: Some(HashMap::new()) }),
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
        used: &mut Option<Arc<Waiting>>,
    ) -> Result<response::Body, UpstreamError> {
        let broken = || UpstreamError::Broken { leader };
        let (answer, answered) = oneshot::channel();
        let id = self.waiting.enter(answer).map_err(|full| match full {
            true => UpstreamError::Overloaded { leader },
            false => broken(),
        })?;
        let _place = Place { waiting: &self.waiting, id };
        *used = Some(self.waiting.clone());
        self.requests.send(Request { id, body: Some(body) }).await.map_err(|_| broken())?;
        answered.await.map_err(|_| broken())
    }
}

impl Waiting {
    /// A place for a call's answer; its number. False when the connection is closed, true when too many wait.
    fn enter(&self, answer: oneshot::Sender<response::Body>) -> Result<u64, bool> {
        let mut calls = lock(&self.calls);
        let id = calls.next_id;
        let answers = calls.answers.as_mut().ok_or(false)?;
        if answers.len() >= MAX_CALLS {
            return Err(true);
        }
        answers.insert(id, answer);
        calls.next_id += 1;
        Ok(id)
    }
}

/// A call's place among those that wait, left when the call ends, however it ends.
struct Place<'w> {
    waiting: &'w Waiting,
    id: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(answers) = &mut lock(&self.waiting.calls).answers {
            answers.remove(&self.id);
        }
    }
}

/// Hands every answer to the call it belongs to, until the connection or the link is gone.
async fn take_answers(
    mut responses: Incoming<Response>,
    waiting: Arc<Waiting>,
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
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::raft::network::addresses::Addresses;
    use crate::raft::network::{Hello, IdentifyRequest, IdentifyResponse};

    /// The far ends of the connections that were made.
    struct Fake {
        dials: AtomicUsize,
        accepted: mpsc::UnboundedSender<Connected>,
        refuse: AtomicBool,
    }

    struct Connected {
        target: Target,
        requests: mpsc::Receiver<Request>,
        responses: mpsc::Sender<Response>,
    }

    impl Transport for Fake {
        fn connect(
            &self,
            target: Target,
            _hello: Hello,
            purpose: Purpose,
        ) -> BoxFuture<'static, Result<Connection, DialError>> {
            assert_eq!(purpose, Purpose::Upstream);
            self.dials.fetch_add(1, Ordering::Relaxed);
            if self.refuse.load(Ordering::Relaxed) {
                return async { Err(DialError::Unreachable("nobody there".to_owned())) }.boxed();
            }
            let (requests, sent) = mpsc::channel(8);
            let (answers, responses) = mpsc::channel(8);
            let _ = self.accepted.send(Connected { target, requests: sent, responses: answers });
            async { Ok(Connection { requests, responses: responses.into() }) }.boxed()
        }

        fn identify(
            &self,
            _address: String,
            _request: IdentifyRequest,
        ) -> BoxFuture<'static, Result<IdentifyResponse, DialError>> {
            unreachable!("nobody is asked who it is on this line")
        }
    }

    const PATIENCE: Duration = Duration::from_secs(2);

    fn member(id: u128) -> Member {
        Member {
            peer: format!("n{id}:1"),
            client: String::new(),
            incarnation: Incarnation(id),
            ..Member::default()
        }
    }

    fn line() -> (Upstream, Arc<Fake>, mpsc::UnboundedReceiver<Connected>) {
        let (accepted, connected) = mpsc::unbounded_channel();
        let fake = Arc::new(Fake { dials: AtomicUsize::new(0), accepted, refuse: AtomicBool::new(false) });
        let caller = Caller {
            cluster: "c".to_owned(),
            node_id: 1,
            incarnation: Incarnation(1),
            peer: String::new(),
            addresses: Arc::new(Addresses::default()),
            refused: Arc::new(|_| {}),
        };
        (Upstream::new(caller, fake.clone()), fake, connected)
    }

    fn index(id: u64, index: u64) -> Response {
        let outcome = Some(read_index_response::Outcome::Index(index));
        Response { id, body: Some(response::Body::ReadIndex(proto::ReadIndexResponse { outcome })) }
    }

    #[tokio::test(start_paused = true)]
    async fn answers_in_any_order_on_one_connection() {
        let (line, fake, mut connected) = line();
        let ask = |line: Upstream| async move { line.read_index(2, &member(2), PATIENCE).await };
        let slow = runtime::spawn(ask(line.clone()));
        let mut far = connected.recv().await.unwrap();
        let first = far.requests.recv().await.unwrap();
        let quick = runtime::spawn(ask(line.clone()));
        let second = far.requests.recv().await.unwrap();
        far.responses.send(index(second.id, 20)).await.unwrap();
        assert_eq!(quick.await.unwrap(), Ok(ReadIndexAnswer::Index(20)));
        far.responses.send(index(first.id, 10)).await.unwrap();
        assert_eq!(slow.await.unwrap(), Ok(ReadIndexAnswer::Index(10)));
        assert_eq!(fake.dials.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_connection_ends_its_calls_and_is_replaced() {
        let (line, fake, mut connected) = line();
        let call = runtime::spawn({
            let line = line.clone();
            async move { line.read_index(2, &member(2), PATIENCE).await }
        });
        let mut far = connected.recv().await.unwrap();
        far.requests.recv().await.unwrap();
        drop(far);
        assert_eq!(call.await.unwrap(), Err(UpstreamError::Broken { leader: 2 }));

        let again = runtime::spawn(async move { line.read_index(2, &member(2), PATIENCE).await });
        let mut far = connected.recv().await.unwrap();
        let request = far.requests.recv().await.unwrap();
        far.responses.send(index(request.id, 3)).await.unwrap();
        assert_eq!(again.await.unwrap(), Ok(ReadIndexAnswer::Index(3)));
        assert_eq!(fake.dials.load(Ordering::Relaxed), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_leader_gets_a_connection_of_its_own() {
        let (line, _fake, mut connected) = line();
        let gone = line.read_index(2, &member(2), Duration::from_millis(10)).await;
        assert!(matches!(gone, Err(UpstreamError::Timeout { leader: 2, .. })), "{gone:?}");
        assert_eq!(connected.recv().await.unwrap().target.node_id, 2);
        let answer = runtime::spawn(async move { line.read_index(3, &member(3), PATIENCE).await });
        let mut far = connected.recv().await.unwrap();
        assert_eq!(far.target, Target { node_id: 3, address: "n3:1".to_owned() });
        let request = far.requests.recv().await.unwrap();
        far.responses.send(index(request.id, 3)).await.unwrap();
        assert_eq!(answer.await.unwrap(), Ok(ReadIndexAnswer::Index(3)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_is_given_up_and_a_lively_one_is_kept() {
        let (line, fake, mut connected) = line();
        let short = Duration::from_millis(10);
        line.read_index(2, &member(2), short).await.unwrap_err();
        let _silent = connected.recv().await.unwrap();

        let ask = |line: Upstream, patience| async move { line.read_index(2, &member(2), patience).await };
        let unanswered = runtime::spawn(ask(line.clone(), short));
        let mut far = connected.recv().await.unwrap();
        far.requests.recv().await.unwrap();
        tokio::time::sleep(short / 2).await;
        // The answer to nobody's call is a sign of life all the same.
        far.responses.send(index(9999, 1)).await.unwrap();
        unanswered.await.unwrap().unwrap_err();

        let answer = runtime::spawn(ask(line, PATIENCE));
        let request = far.requests.recv().await.unwrap();
        far.responses.send(index(request.id, 4)).await.unwrap();
        assert_eq!(answer.await.unwrap(), Ok(ReadIndexAnswer::Index(4)));
        assert_eq!(fake.dials.load(Ordering::Relaxed), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_answer_is_not_dialled_all_the_time() {
        let (line, fake, _connected) = line();
        fake.refuse.store(true, Ordering::Relaxed);
        for _ in 0..100 {
            let failed = line.read_index(2, &member(2), PATIENCE).await;
            assert!(matches!(failed, Err(UpstreamError::NotConnected { leader: 2, .. })), "{failed:?}");
        }
        assert_eq!(fake.dials.load(Ordering::Relaxed), 1);
        tokio::time::sleep(DIAL_PAUSE).await;
        line.read_index(2, &member(2), PATIENCE).await.unwrap_err();
        assert_eq!(fake.dials.load(Ordering::Relaxed), 2);
    }
}
