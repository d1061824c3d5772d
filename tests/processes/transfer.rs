//! Snapshots on lines that break.

use std::process::{Child, Command, Stdio};
use std::time::Instant;

use futures::future::join_all;
use quorate::kv::client::{Client, ClientConfig, MemberChange, Scope};
use quorate_testkit::processes::Line;

use crate::replicas::status;
use crate::support::{
    DEADLINE, QUORATE, TestCluster, data_files, eventually, eventually_within, free_address, get_at, start,
};

/// Bytes of one value.
const VALUE_BYTES: usize = 64 * 1024;

/// How large the state is, in MiB, unless it is given.
pub(crate) fn state_mib(default: usize) -> usize {
    std::env::var("QUORATE_TEST_STATE_MIB").map_or(default, |mib| mib.parse().unwrap())
}

/// A program of a test that is killed at its end.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// So many bytes that cannot be compressed, of value number `n`.
pub(crate) fn noise(n: usize, count: usize) -> Vec<u8> {
    let mut state = (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}

pub(crate) async fn fill(client: &Client, mib: usize) {
    let keys = mib * 1024 * 1024 / VALUE_BYTES;
    let callers = (0..16).map(async |caller| {
        for n in (caller..keys).step_by(16) {
            let put = async || client.put(&Scope::default(), format!("k{n}"), noise(n, VALUE_BYTES)).await;
            // A large state is more than the disk takes at once.
            if put().await.is_err() {
                put().await.unwrap();
            }
        }
    });
    join_all(callers).await;
}

/// The size of the newest snapshot of `node_id`, once its log begins behind that.
async fn purged_behind_snapshot(nodes: &TestCluster, node_id: u64) -> u64 {
    nodes.client.take_snapshot(None).await.unwrap();
    eventually("the log begins behind a snapshot", async || {
        let status = nodes.status(node_id).await;
        status.is_some_and(|status| status.offsets.purged.is_some() && status.offsets.snapshot.is_some())
    })
    .await;
    let files = data_files(nodes.node(node_id), |name| name.ends_with(".snapshot"));
    files.iter().map(|file| file.metadata().unwrap().len()).max().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_whose_connection_is_cut_ten_times_is_sent_once() {
    // None but the one that is asked for.
    let nodes = start(&["--snapshot-keep-entries", "10", "--snapshot-every-bytes", "1099511627776"]);
    let mib = state_mib(48);
    fill(&nodes.client, mib).await;
    let leader = nodes.leader(0).await;
    let snapshot = purged_behind_snapshot(&nodes, leader.node_id).await;

    let (listens, dir) = (free_address(), nodes.dir.path().join("joining"));
    let line = Line::to(&listens).unwrap();
    // So that each part, with all else that is said, is less than a twelfth.
    line.cut_after(snapshot / 12, 10);
    let mut command = Command::new(QUORATE);
    command.args(["serve", "--node-id", "4", "--join", "--cluster", &nodes.cluster.spec().cluster]);
    command.arg("--data-dir").arg(&dir).args(["--client-listen", &free_address()]);
    command.args(["--peer-listen", &listens, "--peer-advertise", &line.address()]);
    let _joining = Running::start(&mut command);
    let begun = Instant::now();
    let add = MemberChange::Add { node_id: 4, peer: line.address(), promote: true, catch_up: DEADLINE * 10 };
    // The node may not listen yet.
    while let Err(error) = nodes.client.change_members(add.clone()).await {
        assert!(begun.elapsed() < DEADLINE, "{error}");
    }
    let (sent, cuts) = (line.bytes_to_target(), line.cuts());
    println!(
        "{mib} MiB of state, a snapshot of {snapshot} bytes, {cuts} cuts: {sent} bytes in {:?}",
        begun.elapsed()
    );
    assert_eq!(cuts, 10, "cut so often after {sent} of {snapshot} bytes");
    assert!(sent >= snapshot && sent < snapshot + snapshot / 5, "{sent} bytes for a snapshot of {snapshot}");
    let now = nodes.leader(0).await;
    assert_eq!((now.node_id, now.term), (leader.node_id, leader.term), "nobody was elected meanwhile");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_sent_a_state_once_however_often_its_connection_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    let (listens, replica) = (free_address(), free_address());
    let line = Line::to(&listens).unwrap();
    let mut node = Command::new(QUORATE);
    node.args(["serve", "--single", "--data-dir"]).arg(dir.path().join("node"));
    node.args(["--client-listen", &listens, "--client-advertise", &line.address()]);
    // What it tells by entries reaches back a little.
    node.args([
        "--peer-listen",
        &free_address(),
        "--event-log-operations",
        "1000",
        "--event-log-bytes",
        "4194304",
    ]);
    let _node = Running::start(&mut node);
    let serves = async || get_at(&listens, "/readyz").is_some_and(|(code, _)| code == 200);
    eventually("the node serves", serves).await;
    let client = Client::new([listens.clone()], ClientConfig::default()).unwrap();
    let mib = state_mib(48);
    fill(&client, mib).await;
    let (carried, cut_after) = (line.bytes_from_target(), mib as u64 * 1024 * 1024 / 12);
    line.cut_after(cut_after, 10);

    let mut follows = Command::new(QUORATE);
    follows.args(["replica", "--from", &line.address(), "--listen", &replica, "--retries", "0"]);
    follows.arg("--data-dir").arg(dir.path().join("replica"));
    let mut follows = Running::start(&mut follows);
    let begun = Instant::now();
    // Its state is that of the node at the same position, while the node goes on.
    let mut n = 0_u32;
    let same = async || {
        let (of_node, of_replica) = (status(&listens), status(&replica));
        let (Some(of_node), Some(of_replica)) = (of_node, of_replica) else { return false };
        if of_replica["replica"]["full_syncs"] == 0 {
            // While the state is sent.
            n += 1;
            client.put(&Scope::default(), "more", n.to_string()).await.unwrap();
            return false;
        }
        let is_even = of_node["offsets"]["applied"] == of_replica["offsets"]["applied"];
        if is_even {
            assert_eq!(of_node["state_hash"], of_replica["state_hash"], "{of_node:#} {of_replica:#}");
            assert_eq!(of_replica["replica"]["full_syncs"], 1);
        }
        is_even
    };
    eventually_within(DEADLINE * 10, "the replica is where its source is", same).await;
    let (sent, cuts) = (line.bytes_from_target() - carried, line.cuts());
    println!("{mib} MiB of state, {cuts} cuts: {sent} bytes in {:?}", begun.elapsed());
    let state = mib as u64 * 1024 * 1024;
    assert_eq!(cuts, 10, "cut so often after {sent} bytes");
    assert!(sent >= state && sent < state + state / 5, "{sent} bytes for a state of {state}");
    follows.0.kill().unwrap();
}
