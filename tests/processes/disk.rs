//! Disks that fill up, and disks that hang: leadership moves away from them, and nothing has to be restarted.
//!
//! These tests mount file systems, so they need root (or a user namespace) and `/dev/fuse`. Where that is missing they
//! fail, unless `QUORATE_TEST_WITHOUT_MOUNT` is set: a check that did not run must not look like one that passed.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use quorate::ReadLevel;
use quorate::kv::client::{
    Client, ClientConfig, ClientError, Endpoint, Range, ReadPreference, Reason, Scope,
};
use quorate::store::DiskState;
use quorate_cluster::Cluster;
use quorate_testkit::disk::{Fault, FaultyDisk, SmallDisk, mounted};

use crate::support::{DEADLINE, QUORATE, TestCluster, client, eventually, get, output, said, spec};

const MIB: u64 = 1024 * 1024;
/// Room for the reserve, a log of some segments, and what is written in a test.
const DISK_BYTES: u64 = 192 * MIB;
/// The smallest reserve that goes with the limit on what is in flight.
const ARGS: [&str; 4] = ["--disk-reserve-bytes", "44040192", "--max-inflight-bytes", "8388608"];
/// The file that fills a disk.
const BALLAST: &str = "ballast";
/// From room on the disk to writes that succeed.
const RECOVERY: Duration = Duration::from_secs(30);

/// A cluster whose disks are made by `mount`, one per node id, in a directory of their own. Dropped in this order:
/// processes first, then their disks, then the directory.
struct OnDisks<D: Disk> {
    nodes: TestCluster,
    disks: BTreeMap<u64, D>,
    _dirs: tempfile::TempDir,
}

/// A disk that may hold what is asked of it.
trait Disk {
    fn release(&self);
}

impl Disk for FaultyDisk {
    fn release(&self) {
        self.mend();
    }
}

impl Disk for SmallDisk {
    fn release(&self) {}
}

impl<D: Disk> Drop for OnDisks<D> {
    /// A process that waits for its disk cannot even be killed: a test that fails meanwhile would not end.
    fn drop(&mut self) {
        self.disks.values().for_each(Disk::release);
    }
}

impl<D: Disk> OnDisks<D> {
    /// Mounts a disk for each of `on`, and starts three nodes.
    fn start(
        on: &[u64],
        mount: impl Fn(&std::path::Path, &std::path::Path) -> io::Result<D>,
    ) -> Option<Self> {
        let (mut spec, dir) = spec();
        spec.extra_args = ARGS.iter().map(Into::into).collect();
        let backing = tempfile::tempdir().unwrap();
        let mut disks = BTreeMap::new();
        for node_id in on {
            let path = spec.node_data_dir(*node_id);
            fs::create_dir_all(&path).unwrap();
            let behind = backing.path().join(node_id.to_string());
            fs::create_dir(&behind).unwrap();
            disks.insert(*node_id, mounted(mount(&behind, &path))?);
        }
        let cluster = Cluster::start(spec).unwrap();
        cluster.wait_ready(DEADLINE).unwrap();
        Some(Self {
            nodes: TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() },
            disks,
            _dirs: backing,
        })
    }

    /// Moves the lead to `node_id`, as far as pausing others can.
    async fn lead_by(&self, node_id: u64) {
        let start = Instant::now();
        loop {
            let leader = self.nodes.leader(0).await;
            if leader.node_id == node_id {
                return;
            }
            assert!(start.elapsed() < DEADLINE, "node {node_id} does not get the lead");
            let other = self.nodes.node(leader.node_id);
            other.pause().unwrap();
            self.nodes.leader(leader.term).await;
            other.resume().unwrap();
        }
    }

    async fn disk_state(&self, node_id: u64) -> Option<DiskState> {
        self.nodes.status(node_id).await?.disk.map(|disk| disk.state)
    }

    async fn wait_disk(&self, node_id: u64, expected: DiskState) {
        eventually(&format!("the disk of node {node_id} is {expected}"), async || {
            self.disk_state(node_id).await == Some(expected)
        })
        .await;
    }

    /// All nodes run in the processes they were started in, and none has met an error that stops it.
    fn assert_unbroken(&self, pids: &[Option<u32>]) {
        for (node, pid) in self.nodes.cluster.nodes().iter().zip(pids) {
            assert_eq!(node.pid(), *pid, "node {} was replaced:\n{}", node.node_id(), output(node));
        }
    }

    fn pids(&self) -> Vec<Option<u32>> {
        self.nodes.cluster.nodes().iter().map(|node| node.pid()).collect()
    }
}

fn small(_: &std::path::Path, path: &std::path::Path) -> io::Result<SmallDisk> {
    SmallDisk::mount(path, DISK_BYTES)
}

fn faulty(backing: &std::path::Path, path: &std::path::Path) -> io::Result<FaultyDisk> {
    FaultyDisk::mount(backing, path)
}

/// A client that soon gives up, for writes that are expected to fail.
fn impatient(nodes: &TestCluster) -> Client {
    let mut config = ClientConfig::default();
    config.timeout = Duration::from_secs(3);
    Client::new(nodes.cluster.endpoints(), config).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_is_full_hands_over_and_follows_once_there_is_room() {
    let Some(cluster) = OnDisks::start(&[1], small) else { return };
    let pids = cluster.pids();
    let mut writers = cluster.nodes.writers(8);
    assert!(writers.reached(100, DEADLINE).await);
    cluster.lead_by(1).await;

    // All at once, in the middle of writes.
    cluster.disks[&1].fill(BALLAST).unwrap();
    cluster.wait_disk(1, DiskState::Full).await;
    eventually("another node leads", async || cluster.nodes.leader(0).await.node_id != 1).await;
    let served = writers.acknowledged() + 200;
    assert!(writers.reached(served, DEADLINE).await, "the others do not go on");
    assert_ne!(cluster.nodes.leader(0).await.node_id, 1);

    cluster.disks[&1].empty(BALLAST).unwrap();
    eventually("the node takes writes again", async || {
        cluster.disk_state(1).await.is_some_and(DiskState::takes_writes)
    })
    .await;
    let served = writers.acknowledged() + 100;
    assert!(writers.reached(served, DEADLINE).await);
    let attempts = writers.finish().await;
    cluster.assert_unbroken(&pids);
    cluster.nodes.check(&attempts).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_whose_disks_are_all_full_is_read_and_recovers_by_itself() {
    let Some(cluster) = OnDisks::start(&[1, 2, 3], small) else { return };
    let pids = cluster.pids();
    let mut writers = cluster.nodes.writers(8);
    assert!(writers.reached(100, DEADLINE).await);
    cluster.nodes.put("known", "before").await;
    for disk in cluster.disks.values() {
        disk.fill(BALLAST).unwrap();
    }
    for node_id in 1..=3 {
        cluster.wait_disk(node_id, DiskState::Full).await;
    }
    let attempts = writers.finish().await;

    let (client, scope) = (impatient(&cluster.nodes), Scope::default());
    let refused = client.put(&scope, "refused".to_owned(), "x".to_owned()).await.unwrap_err();
    assert!(!refused.maybe_applied(), "{refused:?}");
    assert!(matches!(refused, ClientError::Failed { reason: Reason::DiskFull, .. }), "{refused:?}");
    let read = cluster.nodes.quorate(&["get", "known"]);
    assert_eq!((read.status.code(), read.stdout.trim_end()), (Some(0), "before"), "{read:?}");

    // Also under a leader that was elected on full disks, and by a node that was started on one.
    let leader = cluster.nodes.leader(0).await;
    let node = cluster.nodes.node(leader.node_id);
    node.kill().unwrap();
    let next = cluster.nodes.leader(leader.term).await;
    eventually("reads are answered by the next leader", async || {
        cluster.nodes.quorate(&["get", "known"]).stdout.trim_end() == "before"
    })
    .await;
    assert!(next.term > leader.term);
    node.start().unwrap();
    // It is ready for reads only, and says so.
    eventually("the node is ready for reads", async || {
        get(node, "/readyz?for=reads").is_some_and(|(code, _)| code == 200)
    })
    .await;
    let (code, text) = get(node, "/readyz").unwrap();
    assert!(code == 503 && text.starts_with("disk_full: "), "{text}");
    assert_eq!(cluster.disk_state(leader.node_id).await, Some(DiskState::Full));
    let mut pids = pids;
    pids[(leader.node_id - 1) as usize] = node.pid();

    let emptied = Instant::now();
    for disk in cluster.disks.values() {
        disk.empty(BALLAST).unwrap();
    }
    eventually("writes succeed again", async || {
        client.put(&scope, "known".to_owned(), "after".to_owned()).await.is_ok()
    })
    .await;
    assert!(emptied.elapsed() < RECOVERY, "it took {:?}", emptied.elapsed());
    cluster.assert_unbroken(&pids);
    // Neither key is the writers'.
    for key in ["known", "refused"] {
        cluster.nodes.quorate(&["del", key]);
    }
    cluster.nodes.check(&attempts).await;
}

/// Nothing that the leader took would be committed, so it must say so, at once and for as long as that is so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_refuses_writes_while_the_disks_of_its_quorum_are_full() {
    let Some(cluster) = OnDisks::start(&[1, 2], small) else { return };
    let pids = cluster.pids();
    cluster.nodes.put("known", "before").await;
    cluster.lead_by(3).await;
    for disk in cluster.disks.values() {
        disk.fill(BALLAST).unwrap();
    }
    for node_id in [1, 2] {
        cluster.wait_disk(node_id, DiskState::Full).await;
    }
    let (client, scope) = (impatient(&cluster.nodes), Scope::default());
    eventually("writes are refused for the others' disks", async || {
        let outcome = client.put(&scope, "known".to_owned(), "during".to_owned()).await;
        matches!(outcome, Err(ClientError::Failed { reason: Reason::DiskFull, maybe_applied: false, .. }))
    })
    .await;
    assert_eq!(cluster.disk_state(3).await, Some(DiskState::Ok));
    assert!(cluster.nodes.quorate(&["get", "known"]).status.success(), "reads go on");

    cluster.disks[&1].empty(BALLAST).unwrap();
    eventually("a quorum is enough", async || {
        client.put(&scope, "known".to_owned(), "after".to_owned()).await.is_ok()
    })
    .await;
    cluster.assert_unbroken(&pids);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_hangs_is_replaced_and_catches_up_when_it_answers_again() {
    let Some(cluster) = OnDisks::start(&[1], faulty) else { return };
    let pids = cluster.pids();
    let mut writers = cluster.nodes.writers(8);
    assert!(writers.reached(100, DEADLINE).await);
    cluster.lead_by(1).await;

    cluster.disks[&1].set(Fault::Stall);
    eventually("another node leads", async || {
        let mut others = false;
        for node_id in [2, 3] {
            let status = cluster.nodes.status(node_id).await;
            others |= status.is_some_and(|status| status.leads());
        }
        others
    })
    .await;
    let served = writers.acknowledged() + 200;
    assert!(writers.reached(served, DEADLINE).await, "the others do not go on");
    assert!(cluster.disks[&1].held() > 0, "nothing waits for the disk");
    assert!(said(cluster.nodes.node(1), "handing over the lead"));
    let ready = |path| get(cluster.nodes.node(1), path).unwrap_or_default();
    eventually("it says what it waits for", async || {
        let (code, text) = ready("/readyz");
        code == 503 && text.starts_with("disk_stalled:")
    })
    .await;
    assert_eq!(ready("/livez").0, 200);
    // Whether it hears the other leader depends on whether its vote for that one waits for the disk too.
    let (code, text) = ready("/readyz?for=reads");
    assert!(code == 200 || text.starts_with("out_of_touch:"), "{code} {text}");
    // What it holds can be read while it hangs.
    let hanging = Endpoint::parse(&cluster.nodes.node(1).client_address()).unwrap();
    let there = cluster.nodes.client.preferring(ReadPreference::weighted([(hanging, 1)]));
    let read =
        there.range(&Scope::default(), Range::prefix("").with_limit(9), ReadLevel::Local).await.unwrap();
    assert_eq!((read.header.node_id, read.items.len()), (1, 9));

    cluster.disks[&1].mend();
    cluster.wait_disk(1, DiskState::Ok).await;
    let attempts = writers.finish().await;
    cluster.assert_unbroken(&pids);
    cluster.nodes.check(&attempts).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_whose_disks_all_hang_says_so_and_recovers_by_itself() {
    let Some(cluster) = OnDisks::start(&[1, 2, 3], faulty) else { return };
    let pids = cluster.pids();
    cluster.nodes.put("before", "1").await;
    for disk in cluster.disks.values() {
        disk.set(Fault::Stall);
    }
    let (client, scope) = (impatient(&cluster.nodes), Scope::default());
    eventually("writes are refused for a disk that hangs", async || {
        let error = client.put(&scope, "during", "1").await.expect_err("no disk takes it");
        matches!(error, ClientError::Failed { reason: Reason::DiskStalled, .. })
    })
    .await;
    let read = client.get(&scope, "before", ReadLevel::Local).await.unwrap();
    assert_eq!(read.item.unwrap().value, "1");
    for node in cluster.nodes.cluster.nodes() {
        assert_eq!(get(node, "/livez").unwrap().0, 200);
        // A vote that waits for its disk has the node out of touch besides.
        assert_eq!(get(node, "/readyz").unwrap().0, 503);
    }
    for disk in cluster.disks.values() {
        disk.mend();
    }
    eventually("writes succeed", async || client.put(&scope, "after", "1").await.is_ok()).await;
    eventually("every node is ready", async || {
        let ready = |node| get(node, "/readyz").is_some_and(|(code, _)| code == 200);
        cluster.nodes.cluster.nodes().iter().all(ready)
    })
    .await;
    cluster.assert_unbroken(&pids);
    cluster.nodes.converged().await;
}
