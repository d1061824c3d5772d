//! Power cuts of a node that is followed. Its event log is behind what it applies and is synced rarely: whatever a cut leaves of
//! it, it shows nothing that was not applied, lacks nothing that was, and no number comes again.

#![allow(clippy::disallowed_methods)] // of this process, not of a node

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt as _;
use quorate::client::{FollowedChange, FollowedEntry, SubscribeOptions, Subscription};
use quorate::kv::client::Client;
use quorate_cluster::Cluster;
use quorate_testkit::disk::{ForgetfulDisk, Names, mounted};
use quorate_testkit::processes::set::{self, Reading};
use quorate_testkit::processes::{Writers, observe};
use tokio::time::timeout;

use crate::power::CUTS;
use crate::support::{DEADLINE, QUORATE, TestCluster, client, eventually, get, spec};

/// Writes of a round before its cut: some snapshots.
const WRITES: u64 = 900;

/// What was told: keys and values by position.
type Told = BTreeMap<u64, (String, String)>;

fn event(entry: FollowedEntry) -> (u64, (String, String)) {
    let FollowedChange::Event { key, value, version, .. } = entry.change else { panic!("{entry:?}") };
    assert!(version == 1 && !entry.more, "each key is written once");
    let text = |bytes: Bytes| String::from_utf8(bytes.to_vec()).unwrap();
    (entry.seq, (text(key), text(value)))
}

/// Follows until it is aborted, through whatever happens to the node.
async fn follow(mut subscription: Subscription, told: Arc<Mutex<Told>>) {
    while let Some(entry) = subscription.next().await {
        let (seq, event) = event(entry.expect("a position that was told is one of this cluster"));
        let mut told = told.lock().unwrap();
        let last = told.last_key_value().map_or(0, |(last, _)| *last);
        assert!(seq > last, "{seq} is told after {last}");
        told.insert(seq, event);
    }
}

/// All that a node tells from the beginning up to position `upto`.
async fn everything(client: &Client, upto: u64) -> Told {
    let mut subscription = client.subscribe(SubscribeOptions::from_beginning()).await.unwrap();
    let (mut told, mut last) = (Told::new(), 0);
    while last < upto {
        let entry = timeout(DEADLINE, subscription.next()).await;
        let entry = entry.unwrap_or_else(|_| panic!("nothing is told between {last} and {upto}"));
        let (seq, event) = event(entry.unwrap().expect("all of it is there"));
        assert!(seq > last, "{seq} is told after {last}");
        told.insert(seq, event);
        last = seq;
    }
    told
}

/// What led to a state in which each key was written once.
fn led_to(reading: &Reading) -> Told {
    let of_item = |(key, item): (&String, &set::Item)| (item.index, (key.clone(), item.value.clone()));
    reading.items.iter().map(of_item).collect()
}

/// Says where two differ: they are too long to be printed.
fn assert_same(told: &Told, applied: &Told, what: &str) {
    let invented = told.iter().find(|(seq, event)| applied.get(*seq) != Some(*event));
    assert_eq!(invented, None, "{what}: it is told, and was not applied");
    let missing = applied.iter().find(|(seq, _)| !told.contains_key(*seq));
    assert_eq!(missing, None, "{what}: it was applied, and is not told");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_power_is_cut_tells_what_it_has_applied() {
    const ARGS: [&str; 4] = ["--snapshot-every-entries", "400", "--snapshot-keep-entries", "100"];
    let given = |name, default| std::env::var(name).map_or(default, |value| value.parse::<u64>().unwrap());
    let (cuts, first) = (given("QUORATE_TEST_CUTS", 4), given("QUORATE_TEST_SEED", 1));
    let (mut spec, dir) = spec();
    spec.nodes = 1;
    spec.extra_args = ARGS.iter().map(Into::into).collect();
    let path = spec.node_data_dir(1);
    std::fs::create_dir_all(&path).unwrap();
    let Some(disk) = mounted(ForgetfulDisk::mount(&path, Names::WithFile)) else { return };
    let cluster = Cluster::start(spec).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let nodes = TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() };
    let told = Arc::new(Mutex::new(Told::new()));
    let subscription = nodes.client.subscribe(SubscribeOptions::from_beginning()).await.unwrap();
    let follower = tokio::spawn(follow(subscription, told.clone()));
    let mut attempts = Vec::new();
    for seed in first..first + cuts {
        let cut = CUTS[(seed % CUTS.len() as u64) as usize];
        let what = format!("seed {seed}, {cut:?}");
        let mut writers = Writers::start(&nodes.client, &format!("cut-{seed}"), 16, Instant::now());
        assert!(writers.reached(WRITES, 4 * DEADLINE).await, "{what}");
        disk.cut_after(seed * 37 % 101);
        eventually("the power is cut", async || disk.is_off()).await;
        // It may have ended by itself.
        let _ = nodes.node(1).kill();
        disk.cut(cut, seed);
        nodes.node(1).start().unwrap();
        nodes.node(1).wait_ready(DEADLINE).unwrap();
        attempts.extend(writers.finish().await);

        let readings = observe::converged(&nodes.client, DEADLINE).await.unwrap();
        let findings = set::check(&attempts, &readings);
        assert!(findings.is_valid(), "{what}: {findings:?}");
        let applied = led_to(&readings[0]);
        let last = *applied.last_key_value().unwrap().0;
        assert_same(&everything(&nodes.client, last).await, &applied, &what);
        let has_all = async || {
            assert!(!follower.is_finished(), "{what}: the follower has ended");
            told.lock().unwrap().last_key_value().is_some_and(|(upto, _)| *upto >= last)
        };
        eventually("the follower is told all of it", has_all).await;
        assert_same(&told.lock().unwrap(), &applied, &what);
        let (_, metrics) = get(nodes.node(1), "/metrics").unwrap();
        let anew = metrics.lines().find(|line| line.starts_with("quorate_event_log_restarts_total "));
        assert_eq!(
            anew,
            Some("quorate_event_log_restarts_total 0"),
            "{what}: the event log leads to the state"
        );
        println!("{what}: {} events, {} acknowledged", applied.len(), findings.acknowledged);
    }
    follower.abort();
    drop(nodes); // before their disk
}
