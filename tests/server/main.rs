//! The client port in front of a real engine on a real disk, and `quorate serve` as a process.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod anywhere;
mod bounds;
mod composed;
mod configure;
mod features;
mod forwarding;
mod frames;
mod guest;
mod machine_guest;
mod previous;
mod read_replicas;
mod replica;
mod replication;
mod resumed;
mod rights;
mod seam;
mod subscribe;
mod tasks;
mod tls;
mod unconfirmed;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use quorate::kv::Kv;
use quorate::kv::machine::KvMachine;
use quorate::server::Server;
use quorate::testkit::proto::v1::admin_client::AdminClient;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::tagged_request::Request;
use quorate::testkit::proto::v1::tagged_response::Response;
use quorate::testkit::proto::v1::{
    GetRequest, PipelineRequest, PutRequest, StatusRequest, StatusResponse, TaggedRequest,
};
use quorate::{Engine, EngineConfig};
use tokio::sync::oneshot;
use tonic::transport::Channel;

const DEADLINE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(1);

async fn channel(address: SocketAddr) -> Channel {
    Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

/// Runs `test` against a single node in `dir`, and stops the node in order.
async fn with_node<T>(dir: &Path, test: impl AsyncFnOnce(SocketAddr) -> T) -> T {
    with_server(dir, quorate::kv::bind("127.0.0.1:0").await.unwrap(), test).await
}

/// The same at the ports of `server`.
async fn with_server<T>(dir: &Path, server: Server<Kv>, test: impl AsyncFnOnce(SocketAddr) -> T) -> T {
    let peer = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    peer.set_nonblocking(true).unwrap();
    let machine = KvMachine::default();
    let address = server.local_addr();
    let mut config = EngineConfig::new(1, dir, peer.local_addr().unwrap().to_string());
    config.client_advertise = address.to_string();
    config.peer_listener = Some(peer);
    let engine = Box::pin(Engine::open(config, machine)).await.unwrap();
    assert!(engine.ready(DEADLINE).await);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = server.serve(engine.clone(), async { stopped.await.unwrap() });
    let test = async {
        let result = test(address).await;
        stop.send(()).unwrap();
        result
    };
    let (served, result) = tokio::join!(serving, test);
    served.unwrap();
    engine.shutdown().await;
    result
}

async fn status(address: SocketAddr) -> StatusResponse {
    AdminClient::new(channel(address).await).status(StatusRequest {}).await.unwrap().into_inner()
}

/// Puts `k0`, `k1`, … in one message; the revisions they got.
async fn put_many(address: SocketAddr, count: u64) -> BTreeSet<u64> {
    let requests = (0..count).map(|tag| {
        let put = PutRequest { key: format!("k{tag}").into(), value: "v".into(), ..Default::default() };
        TaggedRequest { tag, request: Some(Request::Put(put)) }
    });
    let message = PipelineRequest { requests: requests.collect() };
    let mut kv = KvClient::new(channel(address).await);
    let mut responses = kv.pipeline(tokio_stream::iter([message])).await.unwrap().into_inner();
    let mut revisions = BTreeSet::new();
    while let Some(message) = responses.message().await.unwrap() {
        for answer in message.responses {
            let Some(Response::Put(put)) = answer.response else { panic!("{answer:?}") };
            revisions.insert(put.revision);
        }
    }
    revisions
}

#[tokio::test(flavor = "multi_thread")]
async fn every_write_of_a_pipeline_has_its_own_revision() {
    const PUTS: u64 = 1000;
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        assert_eq!(put_many(address, PUTS).await.len() as u64, PUTS);
        let status = status(address).await;
        assert!(status.ready && status.applied.unwrap().index >= PUTS);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let before = with_node(dir.path(), async |address| {
        put_many(address, 10).await;
        status(address).await
    })
    .await;
    with_node(dir.path(), async |address| {
        let request = GetRequest { key: "k7".into(), ..Default::default() };
        let found = KvClient::new(channel(address).await).get(request).await.unwrap().into_inner();
        assert_eq!(found.item.unwrap().value, "v");
        let after = status(address).await;
        assert_eq!(after.state_hash, before.state_hash);
        assert!(after.term > before.term, "a restarted node is elected again");
    })
    .await;
}

/// A `quorate serve` process; killed when the test fails.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(args: &[&str]) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
    command.arg("serve").args(args).stderr(Stdio::piped());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("QUORATE_")) {
        command.env_remove(name);
    }
    Process(command.spawn().unwrap())
}

#[test]
fn a_process_stops_in_order_on_a_signal() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().to_str().unwrap();
    let ports = ["--client-listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"];
    let mut process =
        serve(&[&["--single", "--data-dir", data, "--log-format", "json"][..], &ports].concat());
    let mut lines = BufReader::new(process.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    let serving = lines.find(|line| line.contains("\"serving\"")).expect("the node serves");
    assert!(serving.contains("\"client\":\"127.0.0.1:"), "{serving}");

    let pid = process.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(lines.any(|line| line.contains("\"stopped\"")), "it says that it has stopped");
    assert_eq!(process.0.wait().unwrap().code(), Some(0));
}

#[test]
fn exit_codes_tell_invalid_settings_from_other_errors() {
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap().to_string();
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().to_str().unwrap();
    for (args, code) in [
        (&["--node-id", "0"][..], 3),
        (&["--config", "/nowhere/c.toml"], 3),
        (&["--frobnicate"], 3),
        (&["--data-dir", data, "--client-listen", &taken], 1),
        (&["--data-dir", data, "--client-listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"], 3),
    ] {
        assert_eq!(serve(args).0.wait().unwrap().code(), Some(code), "{args:?}");
    }
}
