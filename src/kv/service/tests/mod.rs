//! The doors over real sockets, in front of a node whose answers the tests hold back and let go.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use futures::StreamExt;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::health_check_response::ServingStatus as Health;
use tonic_health::pb::health_client::HealthClient;

use super::*;
use crate::door::limits::DoorLimits;
use crate::door::methods::Methods;
use crate::door::metrics::DoorMetrics;
use crate::door::pipeline::MAX_IN_FLIGHT;
use crate::engine::{
    Acknowledged, ClosedSession, CurrentHistory, NodeState, OpenedSession, ReadOutcome, SessionList,
    StartProgress, WriteOptions,
};
use crate::error::{FatalError, Leader, ReadError, WriteError};
use crate::kv::machine::{KvCommand, KvQuery, KvView};
use crate::machine::sessions::SessionInfo;
use crate::machine::{ApplyContext, StateMachine};
use crate::node::operated::OperatedNode;
use crate::node::{ServeError, settings};
use crate::proto::details;
use crate::proto::v1::admin_client::AdminClient;
use crate::proto::v1::kv_client::KvClient;
use crate::proto::v1::tagged_request::Request as Ask;
use crate::proto::v1::tagged_response::Response as Reply;
use crate::proto::v1::{PipelineRequest, PipelineResponse, Reason, TaggedRequest};
use crate::report::NodeReport;
use crate::runtime;
use crate::types::{
    ClusterClock, DiskState, HistoryEpoch, Incarnation, MemberKind, Membership, PeerStanding, Quota,
    QuotaSource, ReadOptions, Role,
};
use fake::{FakeNode, HISTORY, PINNED_BYTES, QUOTA};

mod bounds;
mod deadlines;
mod fake;
mod golden;
mod members;
mod opening;
mod queues;
mod replication;
mod told;
mod untaken;
mod watching;

/// Long enough for a loaded machine; nothing waits for it in vain.
const DEADLINE: Duration = Duration::from_secs(20);

/// A served node.
struct Port {
    node: FakeNode,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<Result<(), ServeError>>,
}

impl Port {
    async fn open() -> Self {
        Self::open_with_patience(DEADLINE).await
    }

    async fn open_with_patience(patience: Duration) -> Self {
        Self::open_with(patience, DoorLimits::default()).await
    }

    async fn open_with(patience: Duration, limits: DoorLimits) -> Self {
        let (node, server) = (FakeNode::new(), with_services(Server::bind("127.0.0.1:0").await.unwrap()));
        let server = server.with_limits(limits).with_fixed_settings(vec![("node_id", 7.into())]);
        let (address, (stop, stopped)) = (server.local_addr(), oneshot::channel());
        let served = node.clone();
        let serving = runtime::spawn(async move {
            let stopped = async { stopped.await.unwrap_or(()) };
            server.serve_node(served, patience, stopped).await
        });
        Self { node, address, stop: Some(stop), serving }
    }

    async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }

    async fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel().await).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    async fn pipeline(&self) -> Pipelining {
        let (requests, outgoing) = mpsc::unbounded_channel();
        let outgoing = UnboundedReceiverStream::new(outgoing);
        let responses = self.kv().await.pipeline(outgoing).await.unwrap().into_inner();
        Pipelining { requests, responses }
    }

    fn stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    async fn ended(self) {
        within(self.serving).await.unwrap().unwrap();
    }

    async fn http(&self, path: &str) -> (u16, String) {
        let (code, _, body) = self.ask("GET", path, "").await;
        (code, body)
    }

    /// Code, content type and body.
    async fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String, String) {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        let (code, head, body) = self.send(&request).await;
        let content_type = head.lines().find_map(|line| line.strip_prefix("content-type: "));
        (code, content_type.unwrap_or_default().to_owned(), body)
    }

    /// Code, head and body of the answer to `request` on a connection of its own.
    async fn send(&self, request: &str) -> (u16, String, String) {
        self.send_bytes(request.as_bytes()).await
    }

    async fn send_bytes(&self, request: &[u8]) -> (u16, String, String) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut response = String::new();
        within(stream.read_to_string(&mut response)).await.unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), head.to_owned(), body.to_owned())
    }

    /// Asks until the body of `path` contains `text`.
    async fn http_shows(&self, path: &str, text: &str) {
        within(async {
            while !self.http(path).await.1.contains(text) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }
}

/// The client's end of a pipeline.
struct Pipelining {
    requests: mpsc::UnboundedSender<PipelineRequest>,
    responses: Streaming<PipelineResponse>,
}

impl Pipelining {
    fn send(&self, requests: impl IntoIterator<Item = (u64, Option<Ask>)>) {
        let requests = requests.into_iter().map(|(tag, request)| TaggedRequest { tag, request }).collect();
        self.requests.send(PipelineRequest { requests }).unwrap();
    }

    /// The next `count` answers, by tag.
    async fn answers(&mut self, count: usize) -> std::collections::BTreeMap<u64, Reply> {
        let mut answers = std::collections::BTreeMap::new();
        while answers.len() < count {
            let message = within(self.responses.next()).await.unwrap().unwrap();
            for answer in message.responses {
                let known = answers.insert(answer.tag, answer.response.unwrap());
                assert!(known.is_none(), "tag {} was answered twice", answer.tag);
            }
        }
        answers
    }
}

/// What is counted for this guest, and the registry that exports it.
fn metrics() -> (Arc<DoorMetrics>, Registry) {
    let mut registry = Registry::default();
    (Arc::new(DoorMetrics::new(methods(), &mut registry)), registry)
}

/// All that can be called.
fn methods() -> Methods {
    let pipelines = [format!("/{NAME}/Pipeline"), crate::door::services::PIPELINE.to_owned()];
    Methods::new(Kv::METHODS, &crate::node::admin::METHODS, pipelines)
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("in time")
}

async fn reaches(counter: &watch::Sender<usize>, count: usize) {
    within(counter.subscribe().wait_for(|now| *now == count)).await.unwrap();
}

fn put(key: &str, value: &'static [u8]) -> Ask {
    Ask::Put(v1::PutRequest { key: key.to_owned().into(), value: value.into(), ..Default::default() })
}

fn get(key: &str) -> Ask {
    Ask::Get(v1::GetRequest { key: key.to_owned().into(), ..Default::default() })
}

fn range() -> Ask {
    Ask::Range(v1::RangeRequest::default())
}

#[tokio::test]
async fn unary_calls() {
    let port = Port::open().await;
    let mut kv = port.kv().await;
    let request = v1::PutRequest { key: "k".into(), value: "v".into(), ..Default::default() };
    let response = kv.put(request).await.unwrap().into_inner();
    let position = Some(v1::Position { term: 3, index: 1, history: HISTORY.0 });
    let header = Some(v1::Header { node_id: 7, position, held_by: vec![7], ..Default::default() });
    let expected = v1::PutResponse { header, revision: 1, create_revision: 1, version: 1 };
    assert_eq!(response, expected);

    let request = v1::GetRequest {
        tenant: "default".to_owned(),
        collection: "default".to_owned(),
        key: "k".into(),
        ..Default::default()
    };
    let item = kv.get(request).await.unwrap().into_inner().item.unwrap();
    assert_eq!((&*item.key, &*item.value, item.version), (&b"k"[..], &b"v"[..], 1));

    let items = kv.range(v1::RangeRequest::default()).await.unwrap().into_inner().items;
    assert_eq!(items, [item]);

    let request = || v1::DeleteRequest { key: "k".into(), ..Default::default() };
    assert!(kv.delete(request()).await.unwrap().into_inner().deleted);
    assert!(!kv.delete(request()).await.unwrap().into_inner().deleted);
    let request = v1::GetRequest { key: "k".into(), ..Default::default() };
    assert_eq!(kv.get(request).await.unwrap().into_inner().item, None);

    let status = kv.put(v1::PutRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(details::failure(status.details()).unwrap().reason(), Reason::Invalid);

    let status = AdminClient::new(port.channel().await).status(v1::StatusRequest {}).await.unwrap();
    let report = NodeReport::decode(status.into_inner());
    assert_eq!((report.leads(), report.node_id, report.state_hash, report.ready), (true, 7, Some(42), true));
    assert_eq!((report.state.bytes, report.sessions.open, report.sessions.bytes), (Some(1_000), 4, 400));
}

#[tokio::test]
async fn a_pipeline_answers_by_tag_and_survives_nonsense() {
    let port = Port::open().await;
    let mut pipeline = port.pipeline().await;
    pipeline.send([(1, Some(put("a", b"1"))), (2, None), (3, Some(put("", b""))), (4, Some(put("b", b"2")))]);
    let answers = pipeline.answers(4).await;
    assert!(matches!(answers[&1], Reply::Put(_)) && matches!(answers[&4], Reply::Put(_)));
    for tag in [2, 3] {
        let Reply::Failure(failure) = &answers[&tag] else { panic!("{answers:?}") };
        assert_eq!(failure.reason(), Reason::Invalid);
    }
    pipeline.send([(5, Some(get("a"))), (6, Some(range())), (7, Some(get("nothing")))]);
    let answers = pipeline.answers(3).await;
    let Reply::Get(found) = &answers[&5] else { panic!("{answers:?}") };
    assert_eq!(found.item.as_ref().unwrap().value, "1");
    let Reply::Range(found) = &answers[&6] else { panic!("{answers:?}") };
    assert_eq!(found.items.len(), 2);

    // Half-closed: what is in flight is answered, then the stream ends in order.
    port.node.hold();
    pipeline.send([(8, Some(put("c", b"3")))]);
    reaches(&port.node.proposed, 3).await;
    let Pipelining { requests, mut responses } = pipeline;
    drop(requests);
    port.node.release();
    assert_eq!(within(responses.next()).await.unwrap().unwrap().responses[0].tag, 8);
    assert!(within(responses.next()).await.is_none());
    port.http_shows("/metrics", "quorate_server_pipelines_open 0").await;
}

/// Small on the wire, large in memory: they are not kept until there is room for them.
#[tokio::test]
async fn a_message_of_too_many_requests_ends_its_pipeline() {
    let port = Port::open().await;
    let mut pipeline = port.pipeline().await;
    pipeline.send((0..=MAX_IN_FLIGHT as u64).map(|tag| (tag, None)));
    let end = within(pipeline.responses.next()).await.unwrap().unwrap_err();
    assert_eq!(end.code(), Code::InvalidArgument, "{end}");
    assert!(within(pipeline.responses.next()).await.is_none());

    let operation = v1::TxnOperation::default();
    let txn = v1::TxnRequest { success: vec![operation; 1_000], ..Default::default() };
    let mut pipeline = port.pipeline().await;
    pipeline.send([(1, Some(Ask::Txn(txn)))]);
    let answers = pipeline.answers(1).await;
    let Reply::Failure(failure) = &answers[&1] else { panic!("{answers:?}") };
    assert!(failure.message.contains("1000 operations"), "{failure:?}");
}

#[tokio::test]
async fn a_full_pipeline_is_not_read_and_nothing_fails() {
    const EXTRA: usize = 1000;
    const TOTAL: usize = MAX_IN_FLIGHT + EXTRA;
    let port = Port::open().await;
    let mut pipeline = port.pipeline().await;
    port.node.hold();
    for tag in 0..TOTAL as u64 {
        pipeline.send([(tag, Some(put("k", b"v")))]);
    }
    reaches(&port.node.proposed, MAX_IN_FLIGHT).await;
    // Time for more to come, if more could.
    for _ in 0..20 {
        port.http("/livez").await;
    }
    assert_eq!(*port.node.proposed.borrow(), MAX_IN_FLIGHT);
    port.node.release();
    let answers = pipeline.answers(TOTAL).await;
    assert!(answers.values().all(|answer| matches!(answer, Reply::Put(_))));
}

/// Reads of one message wait together, and more of them than there are permits do not block themselves.
#[tokio::test]
async fn reads_of_a_message_are_issued_together() {
    let port = Port::open().await;
    let mut pipeline = port.pipeline().await;
    port.node.hold();
    pipeline.send((0..100).map(|tag| (tag, Some(get("k")))));
    reaches(&port.node.reading, 100).await;
    port.node.release();
    pipeline.answers(100).await;

    pipeline.send((0..1000).map(|tag| (tag, Some(range()))));
    pipeline.answers(1000).await;
}

#[tokio::test]
async fn a_client_that_goes_leaves_nothing_behind() {
    let port = Port::open().await;
    port.http_shows("/readyz", "ok").await;
    let before = Arc::strong_count(&port.node.inner);
    port.node.hold();
    let pipeline = port.pipeline().await;
    for tag in 0..2 * MAX_IN_FLIGHT as u64 {
        pipeline.send([(tag, Some(if tag % 2 == 0 { put("k", b"v") } else { get("k") }))]);
    }
    reaches(&port.node.proposed, MAX_IN_FLIGHT / 2).await;
    assert!(Arc::strong_count(&port.node.inner) > before);
    drop(pipeline);
    // Both tasks of the pipeline end although nothing was answered: the full reader and the waiting reads.
    within(async {
        while Arc::strong_count(&port.node.inner) > before {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    port.http_shows("/metrics", "quorate_server_pipelines_open 0").await;
    // The writes complete into nothing.
    port.node.release();
    assert_eq!(port.http("/livez").await.0, 200);
}

#[tokio::test]
async fn shutdown_answers_what_is_in_flight() {
    let mut port = Port::open().await;
    let mut pipeline = port.pipeline().await;
    port.node.hold();
    pipeline.send([(1, Some(put("k", b"v")))]);
    reaches(&port.node.proposed, 1).await;
    port.stop();
    within(async {
        while TcpStream::connect(port.address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert!(!port.serving.is_finished(), "a write is in flight");
    port.node.release();
    assert!(pipeline.answers(1).await.contains_key(&1));
    assert!(within(pipeline.responses.next()).await.is_none());
    port.ended().await;
}

#[tokio::test]
async fn shutdown_does_not_wait_for_ever() {
    let mut port = Port::open_with_patience(Duration::from_millis(50)).await;
    let pipeline = port.pipeline().await;
    port.node.hold();
    pipeline.send([(1, Some(put("k", b"v")))]);
    reaches(&port.node.proposed, 1).await;
    port.stop();
    port.ended().await;
}

/// Without it one client could open all sessions there are.
#[tokio::test]
async fn sessions_are_opened_in_the_name_of_their_connection() {
    let port = Port::open().await;
    let mut pipeline = port.pipeline().await;
    let mut kv = port.kv().await;
    for _ in 0..2 {
        pipeline.send([(1, Some(Ask::OpenSession(v1::OpenSessionRequest::default())))]);
        pipeline.answers(1).await;
        kv.open_session(v1::OpenSessionRequest::default()).await.unwrap();
    }
    let openers = port.node.inner.lock().unwrap().openers.clone();
    let port_of = |opener: &String| opener.parse::<SocketAddr>().expect("an address").port();
    let ports: Vec<_> = openers.iter().map(port_of).collect();
    assert!(ports[0] == ports[2] && ports[1] == ports[3] && ports[0] != ports[1], "{openers:?}");
}

#[tokio::test]
async fn probes_and_metrics() {
    let port = Port::open().await;
    port.pipeline().await.send([]);
    assert_eq!(port.http("/livez").await, (200, "ok\n".to_owned()));
    assert_eq!(port.http("/readyz").await, (200, "ok\n".to_owned()));
    assert_eq!(port.http("/nowhere").await.0, 404);
    let mut kv = port.kv().await;
    let request = v1::PutRequest { key: "k".into(), ..Default::default() };
    kv.put(request).await.unwrap();
    kv.put(v1::PutRequest::default()).await.unwrap_err();
    let (_, metrics) = port.http("/metrics").await;
    for line in [
        r#"quorate_server_requests_total{method="put",outcome="ok"} 1"#,
        r#"quorate_server_requests_total{method="put",outcome="invalid"} 1"#,
        r#"quorate_server_requests_total{method="get",outcome="not_leader"} 0"#,
        r#"quorate_server_request_duration_seconds_count{method="put"} 2"#,
        "quorate_raft_term 3",
        "quorate_raft_is_leader 1",
        r#"quorate_raft_role{role="leader"} 1"#,
        r#"quorate_raft_role{role="follower"} 0"#,
        "quorate_raft_last_log_index 0",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
    assert!(!metrics.contains("quorate_raft_snapshot_index 0"), "there is no snapshot");

    port.node.state.send_modify(|state| state.leader = None);
    let (code, reason) = port.http("/readyz").await;
    assert!(code == 503 && reason.starts_with("no_leader: no leader is known"), "{reason}");
    assert_eq!(port.http("/livez").await.0, 200);
    port.node.state.send_modify(|state| state.fatal = Some(FatalError::Core("fsync failed".to_owned())));
    assert_eq!(port.http("/livez").await, (503, "stopped: fsync failed\n".to_owned()));
}

#[tokio::test]
async fn health_follows_readiness() {
    let mut port = Port::open().await;
    let mut client = HealthClient::new(port.channel().await);
    let request = tonic_health::pb::HealthCheckRequest { service: "quorate.v1.Kv".to_owned() };
    port.node.state.send_modify(|state| state.leader = None);
    // The name appears with the first report.
    let mut watched = within(async {
        loop {
            if let Ok(watched) = client.watch(request.clone()).await {
                return watched.into_inner();
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    shows(&mut watched, Health::NotServing).await;
    let leader = Some(Leader { node_id: 1, client: "a:1".to_owned() });
    port.node.state.send_modify(|state| state.leader = leader);
    shows(&mut watched, Health::Serving).await;
    // As `/readyz` has it: not all requests are answered.
    for disk in [DiskState::Full, DiskState::Stalled] {
        port.node.state.send_modify(|state| state.disk = disk);
        shows(&mut watched, Health::NotServing).await;
        port.node.state.send_modify(|state| state.disk = DiskState::Low);
        shows(&mut watched, Health::Serving).await;
    }
    // Neither the watch nor its idle connection holds up the end.
    port.stop();
    shows(&mut watched, Health::NotServing).await;
    assert!(within(watched.next()).await.is_none());
    port.ended().await;
}

async fn shows<S>(watched: &mut S, expected: Health)
where
    S: Stream<Item = Result<tonic_health::pb::HealthCheckResponse, tonic::Status>> + Unpin,
{
    while within(watched.next()).await.unwrap().unwrap().status() != expected {}
}

#[tokio::test]
async fn unknown_services_and_reflection() {
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    let port = Port::open().await;
    let channel = port.channel().await;
    let mut peer = crate::proto::peer::peer_client::PeerClient::new(channel.clone());
    let status = peer.identify(crate::proto::peer::IdentifyRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);

    let ask = |request| tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(request),
    };
    let requests = [
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol("quorate.v1.Kv".to_owned())),
        ask(MessageRequest::FileContainingSymbol("replication.ReplicationService".to_owned())),
        ask(MessageRequest::FileContainingSymbol("grpc.health.v1.Health".to_owned())),
    ];
    let mut client = ServerReflectionClient::new(channel);
    let mut responses =
        client.server_reflection_info(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let mut next = async || within(responses.next()).await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = next().await else { panic!("not a list") };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    let services = ["Kv", "Sessions", "Pipeline", "Admin"].map(|name| format!("quorate.v1.{name}"));
    assert_eq!(names[..4], services);
    assert_eq!(names[4..], ["replication.ReplicationService", "grpc.health.v1.Health"]);
    for _ in 0..3 {
        assert!(matches!(next().await, MessageResponse::FileDescriptorResponse(_)));
    }
}

#[tokio::test]
async fn a_port_in_use_is_refused() {
    let port = Port::open().await;
    let error = Server::<Kv, FakeNode>::bind(&port.address.to_string()).await.unwrap_err();
    assert!(matches!(&error, OpenError::Listen { address, .. } if *address == port.address.to_string()));
}
