//! The queue of jobs, in three processes of its own: this test program, run again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use quorate::client::{ClientConfig, ClientError, MachineClient, Reason};
use quorate::{NodeId, ReadLevel, Role};
use quorate_cluster::ClusterSpec;

use crate::jobs::{self, Command, Counts, Job, Queue};

/// For everything that takes well under a second on an idle machine; these machines are not idle.
const DEADLINE: Duration = Duration::from_secs(60);
/// Between two looks at a condition.
const POLL: Duration = Duration::from_millis(10);
/// The arguments of a process, one a line.
const ARGS: &str = "JOBS_ARGS";

/// What the processes of these tests are; no test of its own.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "it is run by the other tests, as a process"]
async fn process() {
    let args = std::env::var(ARGS).unwrap();
    jobs::run(&args.lines().collect::<Vec<_>>()).await.unwrap();
}

/// Three processes and their directory. Those that run are killed at the end.
pub(crate) struct Nodes {
    running: BTreeMap<NodeId, Child>,
    /// For addresses alone.
    spec: ClusterSpec,
    dir: tempfile::TempDir,
    options: Vec<String>,
}

impl Drop for Nodes {
    fn drop(&mut self) {
        self.running.values_mut().for_each(|process| drop(process.kill()));
        self.running.values_mut().for_each(|process| drop(process.wait()));
    }
}

impl Nodes {
    /// Three nodes, started with `options` too, and ready.
    pub(crate) async fn start(options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let spec = ClusterSpec::new("", dir.path()).with_free_ports().unwrap();
        let options = options.iter().map(ToString::to_string).collect();
        let mut nodes = Self { running: BTreeMap::new(), spec, dir, options };
        for node_id in 1..=3 {
            nodes.launch(node_id);
        }
        for node_id in 1..=3 {
            nodes.ready(node_id).await;
        }
        nodes
    }

    pub(crate) fn address(&self, node_id: NodeId) -> String {
        self.spec.client_address(node_id)
    }

    pub(crate) fn all_addresses(&self) -> String {
        self.spec.endpoints().join(",")
    }

    fn node_dir(&self, node_id: NodeId) -> PathBuf {
        self.dir.path().join(node_id.to_string())
    }

    pub(crate) fn log(&self, node_id: NodeId) -> String {
        fs::read_to_string(self.dir.path().join(format!("{node_id}.log"))).unwrap_or_default()
    }

    pub(crate) fn launch(&mut self, node_id: NodeId) {
        let peers: Vec<_> = (1..=3).map(|node_id| self.spec.peer_address(node_id)).collect();
        let (id, dir) = (node_id.to_string(), self.node_dir(node_id));
        let (client, peers) = (self.address(node_id), peers.join(","));
        let mut args = vec!["serve", &id, dir.to_str().unwrap(), &client, &peers];
        args.extend(self.options.iter().map(String::as_str));
        let path = self.dir.path().join(format!("{node_id}.log"));
        let log = File::options().append(true).create(true).open(path).unwrap();
        let mut process = Process::new(std::env::current_exe().unwrap());
        process.args(["three_processes::process", "--exact", "--ignored", "--nocapture"]);
        process.env(ARGS, args.join("\n"));
        process.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        assert!(self.running.insert(node_id, process.spawn().unwrap()).is_none(), "it runs already");
    }

    pub(crate) async fn ready(&self, node_id: NodeId) {
        eventually(&format!("node {node_id} is ready"), async || {
            get(&self.address(node_id), "/readyz").is_some_and(|(code, _)| code == 200)
        })
        .await;
    }

    /// As `kill -9` does it.
    fn kill(&mut self, node_id: NodeId) {
        let mut process = self.running.remove(&node_id).unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    fn signal(&self, node_id: NodeId, signal: &str) {
        let pid = self.running[&node_id].id().to_string();
        assert!(Process::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// How the process of a node ends that has been told to.
    pub(crate) async fn ended(&mut self, node_id: NodeId) -> ExitStatus {
        let mut process = self.running.remove(&node_id).unwrap();
        eventually("the process ends", async || process.try_wait().unwrap().is_some()).await;
        process.wait().unwrap()
    }

    /// Stops a node in order.
    async fn stop(&mut self, node_id: NodeId) {
        self.signal(node_id, "-TERM");
        assert_eq!(self.ended(node_id).await.code(), Some(0), "{}", self.log(node_id));
    }

    /// A client that knows the address of one node, and finds the others.
    pub(crate) fn queue(&self, node_id: NodeId) -> Queue {
        MachineClient::new([self.address(node_id)], ClientConfig::default()).unwrap()
    }

    /// The node that the others follow.
    async fn leader(&self) -> NodeId {
        let client = quorate::client::Client::new(self.spec.endpoints(), ClientConfig::default()).unwrap();
        let mut leader = 0;
        eventually("a node leads", async || {
            let reports = client.status_all().await;
            let mut reports = reports.iter().filter_map(|(_, report)| report.as_ref().ok());
            leader = reports.find(|it| it.role == Some(Role::Leader)).map_or(0, |report| report.node_id);
            leader != 0
        })
        .await;
        leader
    }
}

pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed() < DEADLINE, "in vain waited until {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// The code and the text that a node answers to a GET; nothing if it does not answer.
pub(crate) fn get(address: &str, path: &str) -> Option<(u16, String)> {
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

/// The sum of a metric over its labels.
fn metric(address: &str, name: &str) -> f64 {
    let (_, page) = get(address, "/metrics").unwrap();
    let values = page.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
    values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

async fn push(queue: &Queue, what: &str) -> Job {
    jobs::push(queue, what).await.unwrap().unwrap()
}

async fn take(queue: &Queue, worker: &str, lease_ms: u64) -> Option<Job> {
    queue.write(Command::Take { worker: worker.to_owned(), lease_ms }).await.unwrap().reply
}

async fn counts(queue: &Queue, level: ReadLevel) -> Counts {
    queue.read((), level).await.unwrap().answer
}

/// Pushers and workers go on while the process that leads is killed, once while jobs are pushed and once while they are done.
#[tokio::test(flavor = "multi_thread")]
async fn each_job_is_done_once_although_leaders_are_killed() {
    const PUSHERS: u64 = 4;
    const EACH: u64 = 100;
    let mut nodes = Nodes::start(&[]).await;
    let pushing: Vec<_> = (0..PUSHERS)
        .map(|pusher| {
            let queue = nodes.queue(1 + pusher % 3);
            tokio::spawn(async move {
                for number in 0..EACH {
                    push(&queue, &format!("{pusher}-{number}")).await;
                }
                assert_eq!(queue.metrics().sessions_opened, 1, "each write had its number in a session");
                queue.close().await;
            })
        })
        .collect();
    let observer = nodes.queue(2);
    eventually("some are pushed", async || counts(&observer, ReadLevel::Linearizable).await.waiting > 20)
        .await;
    let first = nodes.leader().await;
    nodes.kill(first);
    for pusher in pushing {
        pusher.await.unwrap();
    }
    let all = PUSHERS * EACH;
    let waiting = Counts { waiting: all, leased: 0, done: 0 };
    assert_eq!(counts(&observer, ReadLevel::Linearizable).await, waiting);
    nodes.launch(first);
    nodes.ready(first).await;

    let working: Vec<_> = (1..=3)
        .map(|worker| {
            let queue = nodes.queue(worker);
            tokio::spawn(async move {
                let mut done = Vec::new();
                jobs::work(&queue, &format!("worker {worker}"), |(_, what)| done.push(what)).await.unwrap();
                done
            })
        })
        .collect();
    eventually("some are done", async || counts(&observer, ReadLevel::Linearizable).await.done > 20).await;
    let second = nodes.leader().await;
    nodes.kill(second);
    let mut done = Vec::new();
    for worker in working {
        done.append(&mut worker.await.unwrap());
    }
    let mut pushed: Vec<_> =
        (0..PUSHERS).flat_map(|pusher| (0..EACH).map(move |number| format!("{pusher}-{number}"))).collect();
    done.sort();
    pushed.sort();
    assert_eq!(done, pushed, "each was told as done once");
    assert_eq!(counts(&observer, ReadLevel::Linearizable).await, Counts { waiting: 0, leased: 0, done: all });

    let leader = nodes.address(nodes.leader().await);
    let entries = metric(&leader, "quorate_raft_applied_index");
    assert!(entries >= 3.0 * all as f64, "each is pushed, taken and done: {entries} entries");
    assert!(metric(&leader, "quorate_server_requests_total") > 0.0);
}

/// Nobody asks for anything meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_comes_back_when_its_lease_ends() {
    let nodes = Nodes::start(&[]).await;
    let queue = nodes.queue(1);
    let job = push(&queue, "wash").await;
    assert_eq!(take(&queue, "ann", 200).await, Some(job.clone()));
    eventually("the lease ends", async || {
        // Of what was applied here, without any command of a caller.
        counts(&queue, ReadLevel::Local).await == Counts { waiting: 1, leased: 0, done: 0 }
    })
    .await;
    assert_eq!(take(&queue, "bob", 60_000).await, Some(job.clone()));
    let late = Command::Done { number: job.0, worker: "ann".to_owned() };
    assert_eq!(queue.write(late).await.unwrap().reply, None, "it is bob's by now");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_command_is_taken_once_all_processes_are_upgraded() {
    let mut nodes = Nodes::start(&["--machine-version", "1"]).await;
    let mut impatient = ClientConfig::default();
    impatient.timeout = Duration::from_secs(1);
    let queue = Queue::new([nodes.address(1)], impatient).unwrap();
    let job = push(&queue, "wash").await;
    assert_eq!(take(&queue, "ann", 3_600_000).await, Some(job.clone()));
    let renew = || Command::Renew { number: job.0, worker: "ann".to_owned(), lease_ms: 3_600_000 };
    let refused = queue.write(renew()).await.unwrap_err();
    assert_eq!((refused.reason(), refused.maybe_applied()), (Reason::VersionNotAgreed, false), "{refused}");
    let words = "version 2 of the machine, and this node reads 0 to 1: upgrade this node";
    assert!(refused.to_string().contains(words), "{refused}");

    nodes.options.clear();
    for node_id in 1..=3 {
        nodes.stop(node_id).await;
        nodes.launch(node_id);
        nodes.ready(node_id).await;
        push(&queue, "the old commands go on").await;
        if node_id == 2 {
            nodes.leader().await;
            let refused = queue.write(renew()).await.unwrap_err();
            assert!(
                matches!(refused, ClientError::Failed { reason: Reason::VersionNotAgreed, .. }),
                "{refused}"
            );
        }
    }
    let queue = nodes.queue(3);
    assert_eq!(queue.write(renew()).await.unwrap().reply, Some(job));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_cluster_begins_with_what_a_backup_holds() {
    let nodes = Nodes::start(&[]).await;
    let queue = nodes.queue(1);
    let wash = push(&queue, "wash").await;
    let dry = push(&queue, "dry").await;
    take(&queue, "ann", 3_600_000).await.unwrap();
    crate::operated::quorate(&nodes.all_addresses(), &["snapshot", "--endpoint", &nodes.address(1)]);
    push(&queue, "too late for the backup").await;
    let (copy, backup) = (tempfile::tempdir().unwrap(), nodes.node_dir(1).join("snapshots"));
    for file in fs::read_dir(backup).unwrap().map(|entry| entry.unwrap().path()) {
        fs::copy(&file, copy.path().join(file.file_name().unwrap())).unwrap();
    }
    drop(nodes);

    let mut restored = Nodes::start(&["--restore", copy.path().to_str().unwrap()]).await;
    let queue = restored.queue(2);
    let expected = Counts { waiting: 2, leased: 0, done: 0 };
    assert_eq!(counts(&queue, ReadLevel::Linearizable).await, expected, "ann's lease has ended");
    assert_eq!(push(&queue, "fold").await.0, dry.0 + 1, "numbers go on");
    assert_eq!(take(&queue, "bob", 3_600_000).await, Some(wash));
    // From now on it is a cluster like any other.
    restored.options.clear();
    for node_id in 1..=3 {
        restored.stop(node_id).await;
        restored.launch(node_id);
        restored.ready(node_id).await;
    }
    let expected = Counts { waiting: 2, leased: 1, done: 0 };
    assert_eq!(counts(&queue, ReadLevel::Linearizable).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_without_a_snapshot_is_no_backup() {
    let dir = tempfile::tempdir().unwrap();
    let of = |dir: &Path| quorate::Engine::<jobs::Jobs<2>>::read_backup(dir).unwrap_err().to_string();
    assert!(of(dir.path()).starts_with("there is no snapshot in"), "{}", of(dir.path()));
    let nowhere = dir.path().join("nowhere");
    assert!(of(&nowhere).contains("nowhere") && !nowhere.exists(), "{}", of(&nowhere));
}

/// SIGHUP, or what does the same where tests run under `nohup`: their processes then ignore that one, as they should.
fn hangup() -> &'static str {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim();
    match u64::from_str_radix(ignored, 16).unwrap() & 1 {
        0 => "-HUP",
        _ => "-TERM",
    }
}

/// A request that is on its way holds up the end of a process, until another signal comes.
#[tokio::test(flavor = "multi_thread")]
async fn signals_end_a_process() {
    let mut nodes = Nodes::start(&[]).await;
    let leader = nodes.leader().await;
    nodes.stop(leader).await;
    assert_ne!(nodes.leader().await, leader, "it has handed over");
    let (hurried, other) = (1 + leader % 3, 1 + (leader + 1) % 3);
    let mut unfinished = TcpStream::connect(nodes.address(hurried)).unwrap();
    let head = "POST /replication/configure HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n";
    unfinished.write_all(head.as_bytes()).unwrap();
    // Said once somebody waits for what is not sent.
    let mut goes_on = [0; 12];
    unfinished.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    unfinished.read_exact(&mut goes_on).unwrap();
    assert_eq!(&goes_on, b"HTTP/1.1 100");
    nodes.signal(hurried, "-INT");
    eventually("it stops", async || nodes.log(hurried).contains("stopping; a second signal exits at once"))
        .await;
    nodes.signal(hurried, hangup());
    assert_eq!(nodes.ended(hurried).await.code(), Some(1));
    // Before it is open, which is not before the others are there to form a cluster with, in this case.
    nodes.signal(other, hangup());
    assert_eq!(nodes.ended(other).await.code(), Some(0));
    nodes.options = vec!["--restore".to_owned(), nodes.dir.path().to_str().unwrap().to_owned()];
    nodes.launch(other);
    assert_eq!(nodes.ended(other).await.code(), Some(101), "there is no snapshot: it does not even begin");
}
