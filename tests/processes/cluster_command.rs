//! `quorate cluster` as a user meets it.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use quorate::Role;
use quorate_cluster::{ClusterSpec, NodeRecord};

use crate::support::{Outcome, QUORATE, eventually, outcome, spec};

/// A running `quorate cluster`; killed when dropped.
struct Running {
    child: Child,
    output: std::path::PathBuf,
}

impl Running {
    fn start(spec: &ClusterSpec, args: &[&str]) -> Self {
        let output = spec.data_dir.with_extension("out");
        let file = File::create(&output).unwrap();
        let mut command = command(spec, args);
        let child = command.stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
        Self { child, output }
    }

    fn output(&self) -> String {
        fs::read_to_string(&self.output).unwrap()
    }

    async fn prints(&self, text: &str) {
        eventually(&format!("\"{text}\" is printed"), async || self.output().contains(text)).await;
    }

    async fn ended(&mut self) -> ExitStatus {
        eventually("quorate cluster ends", async || self.child.try_wait().unwrap().is_some()).await;
        self.child.wait().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(spec: &ClusterSpec, args: &[&str]) -> Command {
    let mut command = Command::new(QUORATE);
    command.arg("cluster").arg("--data-dir").arg(&spec.data_dir).stdin(Stdio::null());
    command.args(["--client-port", &spec.client_port.to_string()]);
    command.args(["--peer-port", &spec.peer_port.to_string()]).args(args);
    command
}

fn call(spec: &ClusterSpec, args: &[&str]) -> Outcome {
    let mut command = Command::new(QUORATE);
    command.args(["--endpoints", &spec.endpoints().join(",")]).args(args);
    outcome(command)
}

fn signal(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

fn record(data_dir: &Path) -> Vec<NodeRecord> {
    serde_json::from_slice(&fs::read(data_dir.join("cluster.json")).unwrap()).unwrap()
}

fn pids(data_dir: &Path) -> Vec<u32> {
    record(data_dir).into_iter().filter_map(|node| node.pid).collect()
}

/// Whether a process runs: a zombie does not.
fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

/// The id and the process of the leader, as a user would find them.
fn leader(spec: &ClusterSpec) -> (u64, u32) {
    let status: serde_json::Value =
        serde_json::from_str(&call(spec, &["status", "-o", "json"]).stdout).unwrap();
    let rows = status.as_array().unwrap();
    let leads = |row: &&serde_json::Value| row["role"] == Role::Leader.name();
    let leader = rows.iter().filter(leads).max_by_key(|row| row["term"].as_u64()).unwrap();
    let node_id = leader["node_id"].as_u64().unwrap();
    let nodes = record(&spec.data_dir);
    (node_id, nodes.iter().find(|node| node.node_id == node_id).unwrap().pid.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tour_from_start_to_the_next_start() {
    let (spec, _dir) = spec();
    let mut first = Running::start(&spec, &[]);
    first.prints("the cluster is ready").await;
    assert!(call(&spec, &["put", "hello", "world"]).status.success());
    assert_eq!(call(&spec, &["get", "hello"]).stdout.trim_end(), "world");

    // A second one in the same place is refused, and does no harm.
    let second = outcome(command(&spec, &[]));
    second.assert_refused(1, &["in use by a running cluster", "--data-dir"]);

    let (node_id, pid) = leader(&spec);
    assert!(first.output().contains(&format!("kill -9 {pid}")), "{}", first.output());
    signal(pid, "-9");
    first.prints(&format!("node {node_id} (process {pid}) ended with signal 9 (SIGKILL)")).await;
    first.prints("start it again with:").await;
    assert!(first.output().contains(&format!("serve --node-id {node_id} ")), "{}", first.output());
    assert_eq!(call(&spec, &["get", "hello"]).stdout.trim_end(), "world");

    let left = pids(&spec.data_dir);
    assert_eq!(left.len(), 2);
    signal(first.child.id(), "-TERM");
    assert_eq!(first.ended().await.code(), Some(0), "{}", first.output());
    assert!(first.output().contains("stopped; the next start continues"), "{}", first.output());
    assert!(!left.iter().any(|pid| runs(*pid)));
    assert!(pids(&spec.data_dir).is_empty());

    let other_size = outcome(command(&spec, &["--nodes", "5"]));
    other_size.assert_refused(1, &["holds a cluster of 3 nodes, not 5", "--nodes 3"]);

    // The next start continues, and a killed parent takes its nodes with it.
    let mut next = Running::start(&spec, &[]);
    next.prints("the cluster is ready").await;
    assert_eq!(call(&spec, &["get", "hello"]).stdout.trim_end(), "world");
    let nodes = pids(&spec.data_dir);
    assert_eq!(nodes.len(), 3);
    signal(next.child.id(), "-9");
    next.ended().await;
    eventually("its nodes are gone", async || !nodes.iter().any(|pid| runs(*pid))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_is_started_again_if_asked_for() {
    let (spec, _dir) = spec();
    // Within the block of ports that is this test's.
    let frames = spec.client_port + 8;
    let mut running = Running::start(&spec, &["--restart", &format!("--frames={frames}")]);
    running.prints("the cluster is ready").await;
    running
        .prints(&format!("followers without gRPC are served at 127.0.0.1:{frames}, 127.0.0.1:{}", frames + 1))
        .await;
    let (node_id, pid) = leader(&spec);
    signal(pid, "-9");
    running.prints(&format!("node {node_id} started again as process")).await;
    eventually("the node answers", async || {
        call(&spec, &["status"]).stdout.lines().filter(|line| line.contains(Role::Follower.name())).count()
            == 2
    })
    .await;
    for port in frames..frames + 3 {
        std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    }
    signal(running.child.id(), "-INT");
    assert_eq!(running.ended().await.code(), Some(0), "{}", running.output());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_any_node_left_it_ends_with_an_error() {
    let (spec, _dir) = spec();
    let mut running = Running::start(&spec, &[]);
    running.prints("the cluster is ready").await;
    for pid in pids(&spec.data_dir) {
        signal(pid, "-9");
    }
    assert_eq!(running.ended().await.code(), Some(1), "{}", running.output());
    assert!(running.output().contains("all 3 nodes have ended"), "{}", running.output());
}

#[test]
fn impossible_arguments_are_invalid_input() {
    let (spec, _dir) = spec();
    outcome(command(&spec, &["--nodes", "0"])).assert_refused(3, &["choose 1 to"]);
    let _holder = std::net::TcpListener::bind(spec.client_address(2)).unwrap();
    let address = spec.client_address(2);
    outcome(command(&spec, &[])).assert_refused(1, &[&address, "--client-port"]);
    assert!(!spec.data_dir.join("node-1").exists());
}
