//! Those who follow a real cluster: replicas that are killed, and subscriptions that lose their nodes.

use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::join_all;
use quorate::Reason;
use quorate::client::{FollowedChange, SubscribeOptions};
use quorate::kv::client::{Client, ClientConfig, Compare, Scope, Txn, TxnOp, WriteOptions};
use quorate::testkit::proto::details;
use quorate::testkit::proto::replication::EntriesRequest;
use quorate::testkit::proto::replication::replication_service_client::ReplicationServiceClient;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::{GetRequest, PutRequest};
use serde_json::Value;
use tonic::transport::Channel;

use crate::support::{DEADLINE, QUORATE, TestCluster, free_address, get_at, start};

/// A `quorate replica` process. Killed when dropped.
pub(crate) struct ReplicaProcess {
    child: Child,
    address: String,
}

impl ReplicaProcess {
    pub(crate) fn start(nodes: &TestCluster, dir: &Path, address: &str, log: &Path) -> Self {
        Self::following(&nodes.cluster.endpoints().join(","), dir, address, log)
    }

    pub(crate) fn following(sources: &str, dir: &Path, address: &str, log: &Path) -> Self {
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let mut command = Command::new(QUORATE);
        command.arg("replica").args(["--from", sources]);
        command.arg("--data-dir").arg(dir).args(["--listen", address, "--retries", "0"]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Self { child, address: address.to_owned() }
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl ReplicaProcess {
    /// How it has ended, if it has by itself.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }
}

impl Drop for ReplicaProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The status page at `address`, if it answers.
pub(crate) fn status(address: &str) -> Option<Value> {
    let (code, body) = get_at(address, "/replication/status")?;
    (code == 200).then(|| serde_json::from_str(&body).unwrap())
}

/// The last position that was applied at `address`, and the hash of the state there.
pub(crate) fn position(address: &str) -> Option<(u64, String)> {
    let status = status(address)?;
    let hash = status["state_hash"].as_str()?.to_owned();
    Some((status["offsets"]["applied"].as_u64()?, hash))
}

/// Waits until both are seen at one position, where their states must be the same.
async fn assert_same(node: &str, replica: &ReplicaProcess) {
    let begun = Instant::now();
    loop {
        let (of_node, of_replica) = (position(node), position(&replica.address));
        if let (Some((at, expected)), Some((applied, hash))) = (&of_node, &of_replica)
            && at == applied
        {
            assert_eq!(hash, expected, "the state of {} at {at}", replica.address);
            return;
        }
        let shown = status(&replica.address).map(|status| status["replica"].clone());
        assert!(begun.elapsed() < DEADLINE, "{of_node:?}, {of_replica:?}: {shown:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Writes in every way that a state changes in, but while `pause` is set.
async fn write(nodes: &TestCluster, id: usize, stop: &AtomicBool, pause: &AtomicBool, written: &AtomicU64) {
    let (client, scope) = (&nodes.client, Scope::default());
    for round in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        if pause.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        }
        let key = format!("{id}/{}", round % 40);
        let done = match round % 10 {
            0 => client.delete(&scope, key).await.map(drop),
            1 => client
                .put_with(&scope, key, "short", WriteOptions::default().with_ttl(Duration::from_millis(300)))
                .await
                .map(drop),
            2 => {
                let txn = Txn::default()
                    .when(Compare::missing(key.clone()))
                    .then(TxnOp::put(key.clone(), "new"))
                    .otherwise(TxnOp::delete(key));
                client.txn(&scope, txn).await.map(drop)
            }
            _ => client.put(&scope, key, vec![round as u8; (round % 700) as usize]).await.map(drop),
        };
        done.unwrap();
        written.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_are_killed_have_the_state_of_their_cluster_every_time() {
    let given = |name| std::env::var(name).ok().map(|count| count.parse::<u64>().unwrap());
    let restarts = given("QUORATE_TEST_RESTARTS").unwrap_or(12);
    let number = given("QUORATE_TEST_REPLICAS").unwrap_or(3) as usize;
    let nodes = start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let logs = dir.path().join("replicas.log");
    let (stop, pause, written) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU64::new(0));
    let place = |number: usize| dir.path().join(format!("replica-{number}"));
    let addresses: Vec<_> = (0..number).map(|_| free_address()).collect();
    let begin = |number: usize| ReplicaProcess::start(&nodes, &place(number), &addresses[number], &logs);
    let settle = async || {
        pause.store(true, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(700)).await;
    };
    let restarting = async {
        let mut replicas: Vec<_> = (0..number).map(begin).collect();
        let mut random = 88_172_645_463_325_252_u64;
        for round in 0..restarts {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            tokio::time::sleep(Duration::from_millis(random % 500)).await;
            replicas[0].kill();
            if round == restarts / 2 {
                let leader = nodes.leader(0).await;
                nodes.node(leader.node_id).kill().unwrap();
                nodes.leader(leader.term).await;
                nodes.node(leader.node_id).start().unwrap();
                nodes.node(leader.node_id).wait_ready(DEADLINE).unwrap();
            }
            replicas[0] = begin(0);
            if round % 4 == 3 || round + 1 == restarts {
                settle().await;
                let leader = nodes.leader(0).await;
                let node = nodes.node(leader.node_id).client_address();
                for replica in &replicas {
                    assert_same(&node, replica).await;
                }
                pause.store(false, Ordering::Relaxed);
            }
        }
        stop.store(true, Ordering::Relaxed);
        let shown = status(&replicas[0].address).unwrap()["replica"].clone();
        assert_eq!(shown["full_syncs"], 0, "what it had was thrown away: {shown}");
    };
    let writing = join_all((0..4).map(|id| write(&nodes, id, &stop, &pause, &written)));
    tokio::join!(writing, restarting);
    assert!(written.load(Ordering::Relaxed) > restarts * 20, "hardly anything was written: {written:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_write_is_told_once_and_in_order_while_leaders_are_killed() {
    const CALLERS: usize = 8;
    let nodes = start(&[]);
    let scope = Scope::default();
    let stop = AtomicBool::new(false);
    let writer = |_| async {
        let mut acknowledged = 0;
        while !stop.load(Ordering::Relaxed) {
            nodes.client.put(&scope, "counted", "x").await.unwrap();
            acknowledged += 1;
        }
        acknowledged
    };
    let killing = async {
        let mut term = 0;
        for _ in 0..2 {
            let leader = nodes.leader(term).await;
            term = leader.term;
            nodes.node(leader.node_id).kill().unwrap();
            assert!(nodes.leader(term).await.term > term);
            nodes.node(leader.node_id).start().unwrap();
            nodes.node(leader.node_id).wait_ready(DEADLINE).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    };
    let mut options = SubscribeOptions::from_now();
    options.heartbeat = Duration::from_millis(500);
    options.window_bytes = 64 * 1024;
    let mut subscription = nodes.client.subscribe(options).await.unwrap();
    let writing = async {
        let (acknowledged, ()) = tokio::join!(join_all((0..CALLERS).map(writer)), killing);
        acknowledged.into_iter().sum::<u64>()
    };
    tokio::pin!(writing);
    let (mut seen, mut written) = (0, None);
    while written != Some(seen) {
        tokio::select! {
            entry = subscription.next() => {
                let entry = entry.unwrap().unwrap();
                let FollowedChange::Event { version, .. } = entry.change else { panic!("{entry:?}") };
                seen += 1;
                assert_eq!(version, seen, "each put is told, in order and once");
            }
            acknowledged = &mut writing, if written.is_none() => written = Some(acknowledged),
            () = tokio::time::sleep(DEADLINE) => panic!("it hangs at {seen} of {written:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_takes_no_writes_and_is_not_followed() {
    let nodes = start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let replica = ReplicaProcess::start(
        &nodes,
        &dir.path().join("state"),
        &free_address(),
        &dir.path().join("replica.log"),
    );
    nodes.client.put(&Scope::default(), "k", "v").await.unwrap();
    let leader = nodes.leader(0).await;
    assert_same(&nodes.node(leader.node_id).client_address(), &replica).await;
    let channel = Channel::from_shared(format!("http://{}", replica.address)).unwrap().connect_lazy();
    let put = PutRequest { key: "k".into(), value: "w".into(), ..Default::default() };
    let refused = KvClient::new(channel.clone()).put(put).await.unwrap_err();
    let failure = details::failure(refused.details()).unwrap();
    assert_eq!((failure.reason(), failure.maybe_applied), (Reason::NotLeader, false), "{failure:?}");
    let get = GetRequest { key: "k".into(), ..Default::default() };
    let read = KvClient::new(channel.clone()).get(get).await.unwrap().into_inner();
    assert_eq!(read.item.unwrap().value, "v", "a linearizable read at the replica");
    let entries = ReplicationServiceClient::new(channel).get_entries_after(EntriesRequest::default()).await;
    let failure = details::failure(entries.unwrap_err().details()).unwrap();
    assert_eq!(failure.reason(), Reason::NotLeader, "{failure:?}");
    // A client of this project goes where it is sent.
    let client = Client::new([&replica.address], ClientConfig::default()).unwrap();
    client.put(&Scope::default(), "k", "x").await.unwrap();
}
