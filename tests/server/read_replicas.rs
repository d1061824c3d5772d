//! Replicas as processes: their source tells of them, clients read there, and nobody notices when one is killed.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use quorate::ReadLevel;
use quorate::kv::client::{Client, ClientConfig, Endpoint, ReadPreference, Scope};
use quorate::testkit::runtime;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::replication::json_of;
use crate::{DEADLINE, put_many, status, with_node};

const QUORATE: &str = env!("CARGO_BIN_EXE_quorate");

/// A `quorate replica` process. Killed when dropped.
struct ReplicaProcess(Child);

impl ReplicaProcess {
    fn start(source: SocketAddr, dir: &Path, listen: &str, more: &[&str]) -> Self {
        let mut command = Command::new(QUORATE);
        command.arg("replica").args(["--from", &source.to_string(), "--listen", listen, "--id", listen]);
        command.arg("--data-dir").arg(dir).args(more);
        let silent = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(silent.spawn().unwrap())
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for ReplicaProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < DEADLINE, "in vain waited until {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

fn reader(address: SocketAddr) -> Client {
    let mut config = ClientConfig::default();
    config.health_interval = Duration::from_millis(100);
    config.read_preference = Some(ReadPreference::RoundRobin);
    Client::new([address.to_string()], config).unwrap()
}

async fn read(client: &Client, times: usize) {
    for _ in 0..times {
        let reply = client.get(&Scope::default(), "k7", ReadLevel::Local).await.unwrap();
        assert!(reply.item.is_some());
    }
}

/// How many attempts were made at `endpoint`.
fn attempts(client: &Client, endpoint: &str) -> u64 {
    let nodes = client.metrics().nodes;
    nodes.iter().find(|node| node.endpoint.as_str() == endpoint).map_or(0, |node| node.attempts)
}

/// What a command prints, given the endpoint of a node.
async fn quorate(address: SocketAddr, args: &[&str]) -> (i32, Value) {
    let mut command = Command::new(QUORATE);
    command.args(args).args(["--endpoints", &address.to_string(), "-o", "json"]);
    let Output { status, stdout, stderr } = runtime::offload(move || command.output().unwrap()).await;
    let told = String::from_utf8_lossy(&stderr);
    (
        status.code().unwrap(),
        serde_json::from_slice(&stdout).unwrap_or_else(|error| panic!("{error}: {told}")),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_read_at_and_nobody_notices_when_it_is_killed() {
    let (dir, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    Box::pin(with_node(dir.path(), async |address| {
        put_many(address, 20).await;
        let client = reader(address);
        read(&client, 1).await;
        let listen = free_address();
        let replica = Endpoint::parse(&listen).unwrap();
        for round in 0..3 {
            let mut process = ReplicaProcess::start(address, own.path(), &listen, &[]);
            until("the client knows the replica", async || client.replicas() == [replica.clone()]).await;
            let before = attempts(&client, &listen);
            read(&client, 20).await;
            assert!(attempts(&client, &listen) > before, "in round {round}");
            let reading = async {
                for _ in 0..50 {
                    read(&client, 4).await;
                    sleep(Duration::from_millis(2)).await;
                }
            };
            let killing = async {
                sleep(Duration::from_millis(30)).await;
                process.kill();
            };
            tokio::join!(reading, killing);
            until("it is not offered", async || client.replicas().is_empty()).await;
        }
        client.close().await;
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_tells_of_its_replicas_and_the_tests_of_the_command_line_reach_them() {
    let (dir, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (whole, part) = (free_address(), free_address());
    Box::pin(with_node(dir.path(), async |address| {
        put_many(address, 20).await;
        let _whole = ReplicaProcess::start(address, &own.path().join("whole"), &whole, &[]);
        let more = ["--tenant", "t", "--advertise", &part];
        let _part = ReplicaProcess::start(address, &own.path().join("part"), &part, &more);
        until("the node tells of both", async || status(address).await.replicas.len() == 2).await;
        let mut told = status(address).await.replicas;
        told.sort_by_key(|replica| replica.partial);
        let told: Vec<_> = told.into_iter().map(|replica| (replica.client, replica.partial)).collect();
        assert_eq!(told, [(whole.clone(), false), (part.clone(), true)]);
        let (_, page) = json_of(address, "GET", "/replication/replicas", "").await;
        let row =
            page["replicas"].as_array().unwrap().iter().find(|row| row["client"] == json!(whole)).unwrap();
        let (host, port) = whole.split_once(':').unwrap();
        assert_eq!(
            (&row["kind"], &row["address"], &row["id"]),
            (&json!("replica"), &json!(whole), &json!(whole))
        );
        assert_eq!((&row["host"], &row["port"]), (&json!(host), &json!(port.parse::<u16>().unwrap())));

        until("both are well", async || quorate(address, &["health", "--all"]).await.0 == 0).await;
        let (_, health) = quorate(address, &["health", "--all"]).await;
        let kinds: Vec<_> =
            health.as_array().unwrap().iter().map(|row| row["kind"].as_str().unwrap()).collect();
        assert_eq!((kinds.len(), kinds[0]), (3, "member"));
        assert!(kinds.contains(&"replica") && kinds.contains(&"partial_replica"), "{health}");

        let (code, load) = quorate(address, &["load-test", "--seconds", "1", "--callers", "4"]).await;
        assert_eq!((code, &load["passed"], &load["errors"]), (0, &json!(true), &json!(0)), "{load}");
        let lanes: Vec<_> = load["lanes"].as_array().unwrap().iter().map(|lane| &lane["at"]).collect();
        assert_eq!(lanes, [&json!("leader"), &json!("member"), &json!("replica")]);

        let args = ["replication-test", "--writes", "60", "--rate", "0"];
        let (code, seen) = quorate(address, &args).await;
        assert_eq!((code, &seen["passed"]), (0, &json!(true)), "{seen}");
        let counts: Vec<_> = seen["nodes"].as_array().unwrap().iter().map(|row| &row["seen"]).collect();
        assert_eq!(counts.iter().filter(|count| ***count == json!(60)).count(), 2, "{seen}");

        let all = format!("{address},{whole},{part}");
        let (code, checked) = quorate(address, &["config-test"]).await;
        assert_eq!((code, checked["remarks"].as_array().unwrap().len()), (0, 2), "{checked}");
        let mut command = Command::new(QUORATE);
        command.args(["config-test", "-o", "json", "--endpoints", &format!("{all},{}", free_address())]);
        let output = runtime::offload(move || command.output().unwrap()).await;
        assert_eq!(output.status.code(), Some(1), "nobody is at the last one");
        let checked: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(checked["problems"].as_array().unwrap().len(), 1, "{checked}");
        assert_eq!(checked["cluster"], json!("quorate"));
    }))
    .await;
}
