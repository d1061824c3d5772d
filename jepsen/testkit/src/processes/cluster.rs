//! A cluster of real processes in a directory of its own, and the questions that tests ask of it.
//!
//! These panic where something is not as it has to be.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use quorate::kv::client::{Client, ClientConfig, Endpoint, NodeReport, Scope};
use quorate_cluster::{Cluster, ClusterSpec, Node, Stderr};
use tempfile::TempDir;

use super::set::{self, Attempt, Reading};
use super::{Writers, observe};

/// For everything that takes well under a second on an idle machine; these machines are not idle.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// Pause between two looks at a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Nodes, a client of them, and their directory. The fields are dropped in this order.
#[derive(Debug)]
pub struct TestCluster {
    /// Of all nodes.
    pub client: Client,
    /// Killed when it is dropped.
    pub cluster: Cluster,
    /// Holds all of theirs.
    pub dir: TempDir,
    /// What [`quorate`](Self::quorate) runs.
    pub program: PathBuf,
}

/// A spec for three nodes of `binary` in a directory of their own.
pub fn spec(binary: impl Into<PathBuf>) -> (ClusterSpec, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = ClusterSpec::new(binary, dir.path().join("cluster")).with_free_ports().unwrap();
    spec.stderr = stderr();
    (spec, dir)
}

/// Where the nodes' standard error leads. The gate runs the tests that end nodes a second time with
/// `QUORATE_TEST_STDERR=no-reader`.
fn stderr() -> Stderr {
    std::env::var("QUORATE_TEST_STDERR").map_or(Stderr::Output, |kind| kind.parse().unwrap())
}

impl TestCluster {
    /// Three nodes of `binary`, ready, each started with `args` too.
    pub fn start(binary: impl Into<PathBuf>, args: &[&str]) -> Self {
        let program: PathBuf = binary.into();
        let (mut spec, dir) = spec(&program);
        spec.extra_args = args.iter().map(Into::into).collect();
        let cluster = Cluster::start(spec).unwrap();
        cluster.wait_ready(DEADLINE).unwrap();
        Self { client: client(&cluster), cluster, dir, program }
    }

    /// The node of this id.
    pub fn node(&self, node_id: u64) -> &Node {
        self.cluster.node(node_id)
    }

    /// What a node tells of itself, if it answers.
    pub async fn status(&self, node_id: u64) -> Option<NodeReport> {
        let endpoint = Endpoint::parse(&self.node(node_id).client_address()).unwrap();
        self.client.status(&endpoint).await.ok()
    }

    /// The node that leads a later term than `newer_than`; 0 for any.
    pub async fn leader(&self, newer_than: u64) -> NodeReport {
        let leader = observe::leader(&self.client, newer_than, DEADLINE).await;
        leader.unwrap_or_else(|| panic!("no leader of a term after {newer_than}"))
    }

    /// A node that does not lead.
    pub async fn follower(&self) -> u64 {
        let leader = self.leader(0).await.node_id;
        self.cluster.spec().node_ids().find(|node_id| *node_id != leader).unwrap()
    }

    /// Starts callers that write a fresh key after the other.
    pub fn writers(&self, callers: u32) -> Writers {
        Writers::start(&self.client, "key", callers, Instant::now())
    }

    /// Writes a key.
    pub async fn put(&self, key: &str, value: &str) {
        self.client.put(&Scope::default(), key.to_owned(), value.to_owned()).await.unwrap();
    }

    /// What all nodes hold once they have applied the same entry.
    pub async fn converged(&self) -> Vec<Reading> {
        let readings = observe::converged(&self.client, DEADLINE).await;
        readings.unwrap_or_else(|why| panic!("the nodes do not converge: {why}"))
    }

    /// Every node holds what `attempts` require, and nothing else.
    pub async fn check(&self, attempts: &[Attempt]) -> Vec<Reading> {
        let readings = self.converged().await;
        let findings = set::check(attempts, &readings);
        assert!(findings.is_valid(), "{}", serde_json::to_string_pretty(&findings).unwrap());
        assert_eq!(readings.len(), self.cluster.nodes().len());
        readings
    }

    /// Output of `quorate` with this cluster's endpoints.
    pub fn quorate(&self, args: &[&str]) -> Outcome {
        let mut command = Command::new(&self.program);
        command.args(["--endpoints", &self.cluster.endpoints().join(",")]).args(args);
        outcome(command)
    }
}

/// A client of `cluster`.
pub fn client(cluster: &Cluster) -> Client {
    Client::new(cluster.endpoints(), ClientConfig::default()).unwrap()
}

/// What a command printed, and how it ended.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Outcome {
    /// Asserts the exit code, and that standard error holds each of `texts`.
    pub fn assert_refused(&self, code: i32, texts: &[&str]) {
        assert_eq!(self.status.code(), Some(code), "{self:#?}");
        for text in texts {
            assert!(self.stderr.contains(text), "\"{text}\" is not in {self:#?}");
        }
    }
}

/// Runs a command that is expected to end by itself.
pub fn outcome(mut command: Command) -> Outcome {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = child.id();
    let (done, ended) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || done.send(child.wait_with_output()));
    let Ok(output) = ended.recv_timeout(DEADLINE) else {
        // A test that fails must not leave it behind.
        let killed = Command::new("kill").args(["-9", &pid.to_string()]).status();
        let _ = reader.join();
        panic!("{command:?} did not end within {DEADLINE:?}; killed: {killed:?}");
    };
    let output = output.unwrap();
    Outcome {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A process of a node that the cluster does not know of. Killed when dropped.
#[derive(Debug)]
pub struct Unlisted(Child);

impl Unlisted {
    /// Starts node `node_id` of `spec` with another value for `flag`, and with `args` too.
    pub fn start(spec: &ClusterSpec, node_id: u64, flag: &str, value: &str, args: &[&str]) -> Self {
        let plain = spec.command(node_id);
        let mut command = Command::new(plain.get_program());
        // The founders that it is told of have it there, too.
        let listed = |address: &str| format!("{node_id}={address}");
        let mut before = "";
        for argument in plain.get_args().map(|argument| argument.to_str().unwrap()) {
            match (before, flag) {
                ("--peers", "--peer-advertise") => {
                    command.arg(argument.replace(&listed(&spec.peer_address(node_id)), &listed(value)))
                }
                _ if before == flag => command.arg(value),
                _ => command.arg(argument),
            };
            before = argument;
        }
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Unlisted {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until `condition` holds.
pub async fn eventually(what: &str, condition: impl AsyncFnMut() -> bool) {
    eventually_within(DEADLINE, what, condition).await;
}

/// Waits for so long until `condition` holds.
pub async fn eventually_within(deadline: Duration, what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < deadline, "in vain waited until {what}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// The code and the text that a node answers to a GET; nothing if it does not answer.
pub fn get(node: &Node, path: &str) -> Option<(u16, String)> {
    get_at(&node.client_address(), path)
}

/// The same of whatever listens at `address`.
pub fn get_at(address: &str, path: &str) -> Option<(u16, String)> {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().ok()?;
    let (head, text) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, text.to_owned()))
}

/// Whether a node's output holds `text`, where it can be read at all.
pub fn said(node: &Node, text: &str) -> bool {
    stderr() != Stderr::Output || output(node).contains(text)
}

/// What has been written to a node's output.
pub fn output(node: &Node) -> String {
    std::fs::read_to_string(node.log_path()).unwrap_or_default()
}

/// The files of a node's data directory whose path within it `matches`.
pub fn data_files(node: &Node, matches: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![node.data_dir()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if matches(&path.strip_prefix(node.data_dir()).unwrap().to_string_lossy()) {
                found.push(path);
            }
        }
    }
    found
}
