//! A server for tests: answers what its script says, and can be killed as a process can.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tonic::{Request, Response, Status, Streaming};

use super::replica::Replica;
use crate::call::Options;
use crate::kv::api::Method;
use crate::kv::codec;
use crate::proto::replication::replication_service_server::ReplicationServiceServer;
use crate::proto::v1::admin_server::{Admin, AdminServer};
use crate::proto::v1::kv_server::{Kv, KvServer};
use crate::proto::v1::pipeline_server::{Pipeline, PipelineServer};
use crate::proto::v1::*;

/// What comes of one message.
pub(crate) enum Step {
    Answer(Vec<TaggedResponse>),
    BreakStream,
}

type Script = Box<dyn FnMut(Vec<TaggedRequest>) -> Step + Send>;
type RangeScript = Box<dyn FnMut(RangeRequest) -> Vec<Result<RangeResponse, Status>> + Send>;
type FakeAnswer<T> = Result<Response<T>, Status>;
type WatchScript = Box<dyn FnMut(WatchRequest) -> Vec<Result<WatchResponse, Status>> + Send>;

#[derive(Clone)]
struct Service {
    script: Arc<Mutex<Script>>,
    status: Arc<Mutex<Option<StatusResponse>>>,
    streams: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
    sessions: Arc<Sessions>,
    watch: Arc<Mutex<Option<WatchScript>>>,
    /// What a range stream sends.
    pieces: Arc<Mutex<RangeScript>>,
    /// What every call is refused with, if anything: as by a node that is being opened.
    closed: Arc<Mutex<Option<Failure>>>,
    /// How many more questions for the status are answered.
    told: Arc<AtomicUsize>,
    /// Who leads after a transfer.
    transferred: Arc<Mutex<Option<LeaderHint>>>,
    /// What open watches are sent later.
    pushed: tokio::sync::broadcast::Sender<WatchResponse>,
    replica: Replica,
}

impl Service {
    fn refuse_if_closed(&self) -> Result<(), Status> {
        match &*self.closed.lock().unwrap() {
            Some(failure) => Err(Status::from(failure.clone())),
            None => Ok(()),
        }
    }
}

/// Sessions are opened and closed without the script, unless it is to see them.
#[derive(Default)]
struct Sessions {
    scripted: AtomicBool,
    window: AtomicU64,
    opened: AtomicU64,
    closed: AtomicU64,
}

impl Sessions {
    /// Answers what is about sessions, and leaves the rest.
    fn answer(&self, requests: Vec<TaggedRequest>) -> (Vec<TaggedResponse>, Vec<TaggedRequest>) {
        use tagged_request::Request as Ask;
        use tagged_response::Response as Reply;
        let mut answers = Vec::new();
        let mut rest = Vec::new();
        for request in requests {
            let reply = match &request.request {
                _ if self.scripted.load(Ordering::SeqCst) => None,
                Some(Ask::OpenSession(ask)) => {
                    let session = self.opened.fetch_add(1, Ordering::SeqCst) + 1;
                    let window = self.window.load(Ordering::SeqCst);
                    let ttl_ms = ask.ttl_ms;
                    Some(Reply::OpenSession(OpenSessionResponse { session, ttl_ms, window, header: None }))
                }
                Some(Ask::CloseSession(_)) => {
                    self.closed.fetch_add(1, Ordering::SeqCst);
                    Some(Reply::CloseSession(CloseSessionResponse::default()))
                }
                _ => None,
            };
            match reply {
                Some(reply) => answers.push(TaggedResponse { tag: request.tag, response: Some(reply) }),
                None => rest.push(request),
            }
        }
        (answers, rest)
    }
}

/// A node on a runtime of its own, so that killing it closes its sockets at once.
pub(crate) struct Fake {
    pub(crate) address: SocketAddr,
    service: Service,
    runtime: Option<Runtime>,
}

impl Fake {
    pub(crate) fn start(script: impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), script)
    }

    pub(crate) fn start_at(
        address: SocketAddr,
        script: impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static,
    ) -> Self {
        Self::start_on(std::net::TcpListener::bind(address).unwrap(), script)
    }

    /// Serves whoever has connected to `listener` already, too.
    pub(crate) fn start_on(
        listener: std::net::TcpListener,
        script: impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static,
    ) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let service = Service {
            script: Arc::new(Mutex::new(Box::new(script))),
            status: Arc::default(),
            streams: Arc::default(),
            requests: Arc::default(),
            sessions: Arc::default(),
            watch: Arc::default(),
            pieces: Arc::new(Mutex::new(Box::new(|_| Vec::new()))),
            closed: Arc::default(),
            told: Arc::new(AtomicUsize::new(usize::MAX)),
            transferred: Arc::default(),
            pushed: tokio::sync::broadcast::channel(16).0,
            replica: Replica::default(),
        };
        service.sessions.window.store(100_000, Ordering::SeqCst);
        let serving = service.clone();
        drop(runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            tonic::transport::Server::builder()
                .add_service(KvServer::new(serving.clone()))
                .add_service(PipelineServer::new(serving.clone()).max_decoding_message_size(64 * 1024 * 1024))
                .add_service(ReplicationServiceServer::new(serving.replica.clone()))
                .add_service(AdminServer::new(serving))
                .serve_with_incoming(
                    tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true)),
                )
                .await
                .unwrap();
        }));
        Self { address, service, runtime: Some(runtime) }
    }

    pub(crate) fn endpoint(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn set_script(&self, script: impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static) {
        *self.service.script.lock().unwrap() = Box::new(script);
    }

    /// Without this, the node does not implement `Admin`.
    pub(crate) fn set_status(&self, status: StatusResponse) {
        *self.service.status.lock().unwrap() = Some(status);
    }

    pub(crate) fn set_window(&self, window: u64) {
        self.service.sessions.window.store(window, Ordering::SeqCst);
    }

    /// From now on the script sees, and must answer, what is about sessions.
    pub(crate) fn script_sessions(&self) {
        self.service.sessions.scripted.store(true, Ordering::SeqCst);
    }

    /// Sessions opened and closed.
    pub(crate) fn sessions(&self) -> (u64, u64) {
        let sessions = &self.service.sessions;
        (sessions.opened.load(Ordering::SeqCst), sessions.closed.load(Ordering::SeqCst))
    }

    /// What a watch is sent. It stays open after that, unless the last one is an error.
    pub(crate) fn set_watch(
        &self,
        script: impl FnMut(WatchRequest) -> Vec<Result<WatchResponse, Status>> + Send + 'static,
    ) {
        *self.service.watch.lock().unwrap() = Some(Box::new(script));
    }

    pub(crate) fn set_pieces(&self, pieces: Vec<Result<RangeResponse, Status>>) {
        self.set_ranges(move |_| pieces.clone());
    }

    /// Answers every range stream by `script`.
    pub(crate) fn set_ranges(
        &self,
        script: impl FnMut(RangeRequest) -> Vec<Result<RangeResponse, Status>> + Send + 'static,
    ) {
        *self.service.pieces.lock().unwrap() = Box::new(script);
    }

    /// From now on refuses every call so, or takes them again.
    pub(crate) fn close(&self, failure: Option<Failure>) {
        *self.service.closed.lock().unwrap() = failure;
    }

    /// Answers so many more questions for its status, and no one after them.
    pub(crate) fn tell_status(&self, times: usize) {
        self.service.told.store(times, Ordering::SeqCst);
    }

    pub(crate) fn set_transferred(&self, leader: LeaderHint) {
        *self.service.transferred.lock().unwrap() = Some(leader);
    }

    /// Sends this to the watches that are open.
    pub(crate) fn push(&self, message: WatchResponse) {
        self.service.pushed.send(message).expect("a watch is open");
    }

    /// What it tells followers.
    pub(crate) fn replica(&self) -> &Replica {
        &self.service.replica
    }

    pub(crate) fn streams(&self) -> usize {
        self.service.streams.load(Ordering::SeqCst)
    }

    pub(crate) fn requests(&self) -> usize {
        self.service.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.kill();
    }
}

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Answers = Messages<PipelineAnswers>;

/// What `call` asks for, as a message of its kind.
fn tagged(call: Call) -> TaggedRequest {
    let Call { tag, content, method, write, level, freshness } = call;
    let request = match content.expect("a call has a content") {
        call::Content::Payload(payload) => {
            let method = Method::ALL.into_iter().find(|known| known.name() == method).expect("a method");
            let mut message = codec::parse(method, payload).expect("a request");
            let options = match method.is_write() {
                true => crate::call::decode_write(write).map(Options::Write),
                false => crate::call::decode_read(level, freshness).map(Options::Read),
            };
            codec::set_options(&mut message, &options.expect("options"));
            message
        }
        call::Content::OpenSession(open) => tagged_request::Request::OpenSession(open),
        call::Content::CloseSession(close) => tagged_request::Request::CloseSession(close),
    };
    TaggedRequest { tag, request: Some(request) }
}

/// `response` as an answer to a call.
fn answer(response: TaggedResponse) -> Answer {
    use tagged_response::Response as Reply;
    let TaggedResponse { tag, response } = response;
    let mut header = None;
    let content = response.map(|message| match message {
        Reply::Failure(failure) => answer::Content::Failure(failure),
        Reply::OpenSession(opened) => answer::Content::OpenSession(opened),
        Reply::CloseSession(closed) => answer::Content::CloseSession(closed),
        mut message => {
            header = codec::take_header(&mut message);
            answer::Content::Payload(codec::payload(message))
        }
    });
    Answer { tag, header, content }
}

#[tonic::async_trait]
impl Pipeline for Service {
    async fn run(&self, request: Request<Streaming<PipelineCalls>>) -> Result<Response<Answers>, Status> {
        self.streams.fetch_add(1, Ordering::SeqCst);
        self.refuse_if_closed()?;
        let service = self.clone();
        let answers = request.into_inner().map(move |message| {
            let requests = message?.calls.into_iter().map(tagged).collect();
            let (mut answers, requests) = service.sessions.answer(requests);
            if !requests.is_empty() {
                service.requests.fetch_add(requests.len(), Ordering::SeqCst);
                match (service.script.lock().unwrap())(requests) {
                    Step::Answer(responses) => answers.extend(responses),
                    Step::BreakStream => return Err(Status::aborted("the script says so")),
                }
            }
            Ok(PipelineAnswers { answers: answers.into_iter().map(answer).collect() })
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

#[tonic::async_trait]
impl Kv for Service {
    async fn watch(&self, request: Request<WatchRequest>) -> FakeAnswer<Messages<WatchResponse>> {
        self.refuse_if_closed()?;
        let mut script = self.watch.lock().unwrap();
        let script = script.as_mut().ok_or_else(|| Status::unimplemented("no watch was set"))?;
        let messages = script(request.into_inner());
        if let [Err(status)] = &messages[..] {
            return Err(status.clone());
        }
        let later = futures::stream::unfold(self.pushed.subscribe(), |mut pushed| async move {
            let message = pushed.recv().await.ok()?;
            Some((Ok(message), pushed))
        });
        let stream = futures::stream::iter(messages).chain(later);
        Ok(Response::new(Box::pin(stream)))
    }

    async fn watch_progress(&self, _: Request<WatchProgressRequest>) -> FakeAnswer<WatchProgressResponse> {
        Err(Status::unimplemented("no watch is asked for progress"))
    }

    async fn range_stream(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<Messages<RangeResponse>>, Status> {
        self.refuse_if_closed()?;
        let pieces = (self.pieces.lock().unwrap())(request.into_inner());
        Ok(Response::new(Box::pin(futures::stream::iter(pieces))))
    }
}

#[tonic::async_trait]
impl Admin for Service {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        self.refuse_if_closed()?;
        let left = |told: usize| told.checked_sub(1);
        if self.told.fetch_update(Ordering::SeqCst, Ordering::SeqCst, left).is_err() {
            return std::future::pending().await;
        }
        match &*self.status.lock().unwrap() {
            Some(status) => Ok(Response::new(status.clone())),
            None => Err(Status::unimplemented("no status was set")),
        }
    }

    /// Those of the status.
    async fn member_list(
        &self,
        _: Request<MemberListRequest>,
    ) -> Result<Response<MemberListResponse>, Status> {
        let StatusResponse { members, leader, applied, .. } = self.status.lock().unwrap().clone().unwrap();
        Ok(Response::new(MemberListResponse { members, leader, position: applied, joint: true }))
    }

    async fn transfer_leader(
        &self,
        _: Request<TransferLeaderRequest>,
    ) -> Result<Response<TransferLeaderResponse>, Status> {
        let leader = self.transferred.lock().unwrap().clone();
        Ok(Response::new(TransferLeaderResponse { leader }))
    }

    /// Does not come to an end.
    async fn promote_member(
        &self,
        _: Request<PromoteMemberRequest>,
    ) -> Result<Response<MemberChangeResponse>, Status> {
        std::future::pending().await
    }

    /// Says nothing of it.
    async fn snapshot(&self, _: Request<SnapshotRequest>) -> Result<Response<SnapshotResponse>, Status> {
        Ok(Response::new(SnapshotResponse::default()))
    }

    async fn list_sessions(
        &self,
        request: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        let ListSessionsRequest { after, limit } = request.into_inner();
        let info = |session| SessionInfo {
            session,
            opener: "192.0.2.1:5".to_owned(),
            opened_ms: 1,
            used_ms: 2,
            expires_ms: 3,
            bytes: 64,
            unsettled: 1,
        };
        let open = self.sessions.opened.load(Ordering::SeqCst);
        let mut sessions: Vec<_> = (after + 1..=open).map(info).collect();
        let more = sessions.len() > limit as usize;
        sessions.truncate(limit as usize);
        let next_after = sessions.last().filter(|_| more).map_or(0, |last| last.session);
        Ok(Response::new(ListSessionsResponse { header: None, sessions, next_after }))
    }

    async fn close_session(
        &self,
        request: Request<CloseSessionRequest>,
    ) -> Result<Response<CloseSessionResponse>, Status> {
        let was_open = request.into_inner().session <= self.sessions.opened.load(Ordering::SeqCst);
        Ok(Response::new(CloseSessionResponse { header: None, was_open }))
    }
}

/// The answer that a leader gives: a put's revision is the length of its value, a get finds its own key.
pub(crate) fn served(request: &TaggedRequest) -> TaggedResponse {
    use tagged_request::Request as Ask;
    use tagged_response::Response as Reply;
    let reply = match request.request.as_ref().unwrap() {
        Ask::Put(put) => Reply::Put(PutResponse { revision: put.value.len() as u64, ..Default::default() }),
        Ask::Get(get) => {
            let item = Item { key: get.key.clone(), value: get.key.clone(), ..Default::default() };
            Reply::Get(GetResponse { item: Some(item), ..Default::default() })
        }
        Ask::Delete(_) => Reply::Delete(DeleteResponse { deleted: true, ..Default::default() }),
        Ask::Range(range) => Reply::Range(RangeResponse { next: range.start.clone(), ..Default::default() }),
        Ask::DeleteRange(_) => Reply::DeleteRange(DeleteRangeResponse { deleted: 1, ..Default::default() }),
        Ask::Txn(txn) => {
            let put = txn_result::Result::Put(PutResponse::default());
            let results = txn.success.iter().map(|_| TxnResult { result: Some(put.clone()) }).collect();
            Reply::Txn(TxnResponse { succeeded: true, results, ..Default::default() })
        }
        other => panic!("{other:?}"),
    };
    TaggedResponse { tag: request.tag, response: Some(reply) }
}

pub(crate) fn refused(request: &TaggedRequest, failure: &Failure) -> TaggedResponse {
    TaggedResponse { tag: request.tag, response: Some(tagged_response::Response::Failure(failure.clone())) }
}

/// Where a write stands in its session: session and sequence; zeroes without one.
pub(crate) fn slot(request: &TaggedRequest) -> (u64, u64) {
    use tagged_request::Request as Ask;
    let options = match request.request.as_ref().unwrap() {
        Ask::Put(put) => &put.options,
        Ask::Delete(delete) => &delete.options,
        Ask::DeleteRange(delete) => &delete.options,
        Ask::Txn(txn) => &txn.options,
        other => panic!("{other:?} is no write"),
    };
    options.map_or((0, 0), |options| (options.session, options.sequence))
}

pub(crate) fn failure(reason: Reason, maybe_applied: bool) -> Failure {
    Failure { reason: reason.into(), maybe_applied, ..Default::default() }
}

pub(crate) fn not_leader(hint: Option<(u64, String)>) -> Failure {
    Failure {
        code: tonic::Code::FailedPrecondition.into(),
        reason: Reason::NotLeader.into(),
        message: "this node is not the leader".to_owned(),
        maybe_applied: false,
        leader: hint.map(|(node_id, client)| LeaderHint { node_id, client }),
        ..Default::default()
    }
}

/// Answers everything.
pub(crate) fn leader(requests: Vec<TaggedRequest>) -> Step {
    Step::Answer(requests.iter().map(served).collect())
}

/// Refuses everything in the same way.
pub(crate) fn refusing(failure: Failure) -> impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static {
    move |requests| Step::Answer(requests.iter().map(|request| refused(request, &failure)).collect())
}

/// Does each step once, in order, then answers everything.
pub(crate) fn steps(
    steps: impl IntoIterator<Item = Next>,
) -> impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static {
    let mut steps: std::collections::VecDeque<_> = steps.into_iter().collect();
    move |requests| match steps.pop_front() {
        Some(Next::Break) => Step::BreakStream,
        Some(Next::Refuse(failure)) => {
            Step::Answer(requests.iter().map(|request| refused(request, &failure)).collect())
        }
        None => leader(requests),
    }
}

/// What is done with one message.
pub(crate) enum Next {
    Break,
    Refuse(Failure),
}

/// Accepts everything, answers nothing.
pub(crate) fn silent(_: Vec<TaggedRequest>) -> Step {
    Step::Answer(vec![])
}

/// What three nodes say: a leader that tells everything, a follower that is not well, and one that has met its end.
pub(crate) fn told() -> [StatusResponse; 3] {
    let at = |index| Some(Position { term: 3, index, history: 0xabc });
    let member = |node_id: u64, matched, reachable| MemberInfo {
        node_id,
        peer: format!("10.0.0.{node_id}:7901"),
        client: if node_id == 3 { String::new() } else { format!("10.0.0.{node_id}:7801") },
        voter: node_id != 3,
        incarnation: format!("{node_id:032x}"),
        matched,
        reachable,
    };
    let leader = StatusResponse {
        cluster: "c".to_owned(),
        node_id: 1,
        endpoint: "10.0.0.1:7801".to_owned(),
        role: "leader".to_owned(),
        term: 3,
        leader: Some(LeaderHint { node_id: 1, client: "10.0.0.1:7801".to_owned() }),
        last_log: Some(10),
        committed: at(9),
        applied: at(8),
        state_hash: Some(42),
        snapshot: at(4),
        purged: at(2),
        version: "0.1.0".to_owned(),
        members: vec![
            member(1, Some(10), Some(true)),
            member(2, Some(8), Some(true)),
            member(3, None, Some(false)),
        ],
        ready: true,
        fatal: String::new(),
        disk: "low".to_owned(),
        sessions: 4,
        session_bytes: 400,
        state_bytes: Some(1_000),
        state_quota_bytes: Some(2_000),
        state_quota_set: true,
        diverged: String::new(),
        disk_available_bytes: Some(48 << 20),
        disk_reserve_bytes: Some(32 << 20),
        disk_needed_bytes: Some(96 << 20),
        feed: Some(FeedInfo {
            first_position: 3,
            next_position: 9,
            event_log_operations: 6,
            event_log_bytes: 600,
            event_log_failing: false,
            event_log_restarts: 0,
        }),
        replicas: Vec::new(),
        replica: None,
    };
    let follower = StatusResponse {
        node_id: 2,
        endpoint: "10.0.0.2:7801".to_owned(),
        role: "follower".to_owned(),
        state_hash: None,
        ready: false,
        disk: "full".to_owned(),
        state_quota_set: false,
        diverged: "after entry 3:8 it differs".to_owned(),
        ..leader.clone()
    };
    let stopped = StatusResponse {
        node_id: 3,
        endpoint: String::new(),
        role: "stopped".to_owned(),
        term: 0,
        leader: None,
        applied: None,
        committed: None,
        ready: false,
        fatal: "fsync failed".to_owned(),
        disk: String::new(),
        state_bytes: None,
        state_quota_bytes: None,
        state_quota_set: false,
        members: Vec::new(),
        ..leader.clone()
    };
    [leader, follower, stopped]
}
