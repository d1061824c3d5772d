//! Writes through a replica that passes them on: to whoever leads, once each, with the outcome that the leader tells.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use quorate::kv::client::{Client, ClientConfig, Scope};
use quorate::kv::machine::KvMachine;
use quorate::testkit::proto::details;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::sessions_client::SessionsClient;
use quorate::testkit::proto::v1::tagged_request::Request;
use quorate::testkit::proto::v1::tagged_response::Response;
use quorate::testkit::proto::v1::{
    AckLevel, CloseSessionRequest, GetRequest, OpenSessionRequest, PipelineRequest, PutRequest, Reason,
    TaggedRequest, WriteOptions,
};
use quorate::{Engine, EngineConfig, ReadLevel, Role};
use serde_json::Value;
use tokio::sync::oneshot;

use crate::replication::json_of;
use crate::{DEADLINE, POLL, channel, with_node};

/// A `quorate replica` process that serves. Killed when dropped.
pub(crate) struct ReplicaProcess {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl ReplicaProcess {
    /// One that follows the nodes at `sources`.
    pub(crate) fn of(sources: &[SocketAddr], dir: &Path, more: &[&str]) -> Self {
        let sources = sources.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let given = ["replica", "--from", &sources, "--listen", "127.0.0.1:0", "--heartbeat", "200ms"];
        Self::start(&[&given[..], &["--data-dir", dir.to_str().unwrap()], more].concat())
    }

    /// One that is run as `arguments` say.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
        command.args(arguments).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let mut said = Vec::new();
        let address = lines.find_map(|line| {
            let found = line.contains("serving a replica").then(|| {
                let (_, after) = line.split_once("client=").unwrap();
                after.split([' ', '\u{1b}']).next().unwrap().parse().unwrap()
            });
            said.push(line);
            found
        });
        // What it says later is read by nobody, and must not stop it.
        std::thread::spawn(move || lines.count());
        Self { child, address: address.unwrap_or_else(|| panic!("it does not serve: {said:#?}")) }
    }
}

impl Drop for ReplicaProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The replica on its status page, once `holds` of it.
pub(crate) async fn shown(address: SocketAddr, holds: impl Fn(&Value) -> bool) -> Value {
    let mut last = Value::Null;
    let seen = async {
        loop {
            let (_, status) = json_of(address, "GET", "/replication/status", "").await;
            if holds(&status) {
                return status;
            }
            last = status;
            tokio::time::sleep(POLL).await;
        }
    };
    match tokio::time::timeout(DEADLINE, seen).await {
        Ok(status) => status,
        Err(_) => panic!("it never holds: {last}"),
    }
}

/// A member with its client port.
pub(crate) struct ServedMember {
    pub(crate) engine: Engine<KvMachine>,
    pub(crate) address: SocketAddr,
    stop: oneshot::Sender<()>,
    serving: tokio::task::JoinHandle<()>,
}

impl ServedMember {
    pub(crate) fn leads(&self) -> bool {
        self.engine.state().role == Role::Leader
    }

    pub(crate) async fn end(self) {
        let _ = self.stop.send(());
        self.serving.await.unwrap();
        self.engine.shutdown().await;
    }
}

/// Three members of one cluster.
pub(crate) async fn three(dir: &Path) -> Vec<ServedMember> {
    let listeners: Vec<_> = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let address = |listener: &TcpListener| listener.local_addr().unwrap().to_string();
    let peers: std::collections::BTreeMap<_, _> = (1..).zip(listeners.iter().map(address)).collect();
    let mut members = Vec::new();
    for (id, listener) in (1..).zip(listeners) {
        listener.set_nonblocking(true).unwrap();
        let server = quorate::kv::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr();
        let mut config = EngineConfig::new(id, dir.join(id.to_string()), peers[&id].clone());
        (config.peer_listener, config.initial_members) = (Some(listener), peers.clone());
        config.client_advertise = address.to_string();
        let engine = Box::pin(Engine::open(config, KvMachine::default())).await.unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = server.serve(engine.clone(), async {
            let _ = stopped.await;
        });
        let serving = quorate::testkit::runtime::spawn(async { serving.await.unwrap() });
        members.push(ServedMember { engine, address, stop, serving });
    }
    for member in &members {
        assert!(member.engine.ready(DEADLINE).await);
    }
    members
}

fn put(key: &str, options: Option<WriteOptions>) -> PutRequest {
    let value = "v".into();
    PutRequest { key: key.to_owned().into(), value, options, ..PutRequest::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_passes_changes_on_and_tells_what_the_leader_tells() {
    let (dir, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    with_node(dir.path(), async |node| {
        let replica = ReplicaProcess::of(&[node], own.path(), &["--forward-writes"]);
        let mut kv = KvClient::new(channel(replica.address).await);
        let written = kv.put(put("k", None)).await.unwrap().into_inner();
        assert_eq!((written.version, written.header.unwrap().node_id), (1, 1));
        let get = GetRequest { key: "k".into(), ..GetRequest::default() };
        let found = kv.get(get).await.unwrap().into_inner();
        assert_eq!(found.item.unwrap().mod_revision, written.revision, "a read of one's own write");
        assert_eq!(found.header.unwrap().node_id, 0, "which the replica has answered");

        let mut sessions = SessionsClient::new(channel(replica.address).await);
        let opened = sessions.open_session(OpenSessionRequest::default()).await.unwrap().into_inner();
        let slot = |sequence| WriteOptions {
            session: opened.session,
            sequence,
            first_unanswered: 1,
            ..WriteOptions::default()
        };
        let first = kv.put(put("once", Some(slot(1)))).await.unwrap().into_inner();
        // The same one again, on a pipeline of the guest and by name at the leader: answered as the first time.
        let request = |tag, request| TaggedRequest { tag, request: Some(request) };
        let requests = vec![
            request(7, Request::Put(put("once", Some(slot(1))))),
            request(8, Request::Put(put("once", Some(slot(2))))),
            request(9, Request::Get(GetRequest { key: "k".into(), ..GetRequest::default() })),
            request(10, Request::Put(PutRequest::default())),
        ];
        let message = PipelineRequest { requests };
        let mut answers = kv.pipeline(tokio_stream::iter([message])).await.unwrap().into_inner();
        let mut seen = std::collections::BTreeMap::new();
        while let Some(message) = answers.message().await.unwrap() {
            seen.extend(message.responses.into_iter().map(|answer| (answer.tag, answer.response.unwrap())));
        }
        let Response::Put(again) = &seen[&7] else { panic!("{seen:?}") };
        assert!(again.header.as_ref().unwrap().repeated_write);
        assert_eq!((again.version, again.revision), (1, first.revision));
        assert!(matches!(&seen[&8], Response::Put(put) if put.version == 2), "{seen:?}");
        assert!(matches!(&seen[&9], Response::Get(get) if get.item.is_some()), "{seen:?}");
        let Response::Failure(refused) = &seen[&10] else { panic!("{seen:?}") };
        assert_eq!((refused.reason(), refused.maybe_applied), (Reason::Invalid, false));

        let close = CloseSessionRequest { session: opened.session, history: 0 };
        assert!(sessions.close_session(close).await.unwrap().into_inner().was_open);
        let gone = kv.put(put("once", Some(slot(3)))).await.unwrap_err();
        let gone = details::failure(gone.details()).unwrap();
        assert_eq!((gone.reason(), gone.maybe_applied), (Reason::SessionExpired, false));
        let all = WriteOptions { ack: AckLevel::All.into(), ..WriteOptions::default() };
        let held = kv.put(put("all", Some(all))).await.unwrap().into_inner().header.unwrap();
        assert_eq!((held.ack(), held.held_by), (AckLevel::All, vec![1]));
        let status = shown(replica.address, |_| true).await;
        assert!(status["replica"]["forwarded"].as_u64() >= Some(8), "{status}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_was_not_told_to_names_the_leader() {
    let (dir, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    with_node(dir.path(), async |node| {
        let replica = ReplicaProcess::of(&[node], own.path(), &[]);
        shown(replica.address, |status| status["leader"]["client"] == node.to_string()).await;
        let refused = KvClient::new(channel(replica.address).await).put(put("k", None)).await.unwrap_err();
        let refused = details::failure(refused.details()).unwrap();
        assert_eq!((refused.reason(), refused.maybe_applied), (Reason::NotLeader, false));
        assert_eq!(refused.leader.unwrap().client, node.to_string());
    })
    .await;
}

/// A replica that is told to follow one that forwards, as nobody should, does not have its writes go round in circles.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_passed_on_once_is_not_passed_on_again() {
    let own = tempfile::tempdir().unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (first, second) = (own.path().join("1"), own.path().join("2"));
    let first = ReplicaProcess::of(&[nobody], &first, &["--forward-writes", "--retries", "0"]);
    let second = ReplicaProcess::of(&[first.address], &second, &["--forward-writes", "--retries", "0"]);
    let mut request = tonic::Request::new(put("k", None));
    request.set_timeout(std::time::Duration::from_secs(2));
    let refused = KvClient::new(channel(second.address).await).put(request).await.unwrap_err();
    let refused = details::failure(refused.details()).unwrap();
    assert_eq!((refused.reason(), refused.maybe_applied), (Reason::NotLeader, false), "{refused:?}");
    let status = shown(first.address, |_| true).await;
    assert_eq!(status["replica"]["forwarded"], 0, "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_write_through_a_replica_is_applied_once_while_the_lead_changes() {
    const WRITERS: u64 = 8;
    const WRITES: u64 = 60;
    let (dir, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut members = three(dir.path()).await;
    let addresses: Vec<_> = members.iter().map(|member| member.address).collect();
    let replica = ReplicaProcess::of(&addresses, own.path(), &["--forward-writes"]);
    let config = ClientConfig::default();
    let client = Client::new([replica.address.to_string()], config).unwrap();
    let scope = Scope::default();
    let done = std::sync::atomic::AtomicU64::new(0);
    let writers = (0..WRITERS).map(|_| async {
        for _ in 0..WRITES {
            client.put(&scope, "counted", "v").await.unwrap();
            done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    });
    let until = async |written| {
        while done.load(std::sync::atomic::Ordering::Relaxed) < written {
            tokio::time::sleep(POLL).await;
        }
    };
    let leads = |members: &[ServedMember]| members.iter().position(ServedMember::leads);
    let changing = async {
        for round in 1..=2 {
            until(round * WRITERS * WRITES / 4).await;
            if let Some(leader) = leads(&members) {
                members[leader].engine.transfer_leader(None).await.unwrap();
            }
        }
        until(3 * WRITERS * WRITES / 4).await;
        while leads(&members).is_none() {
            tokio::time::sleep(POLL).await;
        }
        // One goes for good, and with it the stream that the replica has to it.
        let leader = leads(&members).unwrap();
        members.remove(leader).end().await;
    };
    let both = async { tokio::join!(futures::future::join_all(writers), changing) };
    tokio::time::timeout(4 * DEADLINE, both).await.expect("the writes end");
    assert_eq!(client.endpoints().len(), 1, "all went through the replica: {:?}", client.endpoints());
    let found = client.get(&scope, "counted", ReadLevel::Linearizable).await.unwrap();
    assert_eq!(found.item.unwrap().version, WRITERS * WRITES);
    let status = shown(replica.address, |_| true).await;
    assert!(status["replica"]["forwarded"].as_u64() >= Some(WRITERS * WRITES), "{status}");
    client.close().await;
    for member in members {
        member.end().await;
    }
}
