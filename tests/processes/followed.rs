//! What followers cost their source: one behind a slow line, one that says nothing, one that takes nothing, one that never comes back.

#![allow(clippy::disallowed_methods)] // of this process, not of a node

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::join_all;
use quorate::Reason;
use quorate::client::{ClientError, FollowedChange, SubscribeOptions, Subscription};
use quorate::kv::client::{Client, ClientConfig, Scope};
use quorate::testkit::proto::details;
use quorate::testkit::proto::replication::replication_service_client::ReplicationServiceClient;
use quorate::testkit::proto::replication::{EntriesRequest, SubscribeRequest, WalEntryProto};
use quorate_testkit::processes::Line;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::replicas::{position, status};
use crate::support::{DEADLINE, QUORATE, eventually, eventually_within, free_address, get_at};
use crate::transfer::{Running, fill, noise, state_mib};

const MIB: u64 = 1024 * 1024;
/// Callers at a time.
const CALLERS: u64 = 16;
/// Keys that are written over and over.
const KEYS: u64 = 200;

/// A node that is its own quorum.
struct Source {
    node: Running,
    client: Client,
    listens: String,
    dir: TempDir,
}

impl Source {
    /// Starts it, and waits until it serves. Its clients are told to come to `advertised`.
    async fn start(listens: &str, advertised: &str, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(QUORATE);
        command.args(["serve", "--single", "--data-dir"]).arg(dir.path().join("node"));
        command.args(["--client-listen", listens, "--client-advertise", advertised]);
        command.args(["--peer-listen", &free_address()]).args(args);
        let node = Running::start(&mut command);
        let serves = async || get_at(listens, "/readyz").is_some_and(|(code, _)| code == 200);
        eventually("the node serves", serves).await;
        let client = Client::new([listens], ClientConfig::default()).unwrap();
        Self { node, client, listens: listens.to_owned(), dir }
    }

    /// One whose clients come to it.
    async fn alone(args: &[&str]) -> Self {
        let listens = free_address();
        Self::start(&listens, &listens, args).await
    }

    /// Puts values `numbers` of `bytes` each, as fast as it takes them.
    async fn write(&self, numbers: std::ops::Range<u64>, bytes: usize) {
        let next = AtomicU64::new(numbers.start);
        let callers = (0..CALLERS).map(async |_| {
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= numbers.end {
                    return;
                }
                let (key, value) = (format!("w{}", n % KEYS), noise(n as usize, bytes));
                self.client.put(&Scope::default(), key, value).await.unwrap();
            }
        });
        join_all(callers).await;
    }

    fn metric(&self, name: &str) -> u64 {
        let (_, text) = get_at(&self.listens, "/metrics").expect("a node that serves has metrics");
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found.unwrap_or_else(|| panic!("there is no {name}")).parse::<f64>().unwrap() as u64
    }

    /// Bytes of memory that it uses, which is known on Linux.
    fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.node.0.id()));
        let Ok(status) = status else { return 0 };
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }
}

/// A subscription as it is on the wire, which acknowledges nothing.
struct Silent {
    _to: mpsc::Sender<SubscribeRequest>,
    from: Streaming<WalEntryProto>,
}

impl Silent {
    async fn begin(address: &str, first: SubscribeRequest) -> Self {
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let (to, requests) = mpsc::channel(1);
        to.send(first).await.unwrap();
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let from = ReplicationServiceClient::new(channel).subscribe(requests).await.unwrap().into_inner();
        Self { _to: to, from }
    }

    /// Reads until it is ended: why, and how many entries came before that.
    async fn ended(mut self) -> (Status, u64) {
        let mut entries = 0;
        loop {
            match self.from.message().await {
                Ok(message) => entries += u64::from(message.expect("it does not end by itself").seq > 0),
                Err(status) => return (status, entries),
            }
        }
    }
}

/// Takes `count` writes of [`Source::write`], each of which must be the next of its key. The position of the last one.
async fn take(subscription: &mut Subscription, versions: &mut [u64], count: u64) -> u64 {
    let mut seq = 0;
    for n in 0..count {
        let next = timeout(DEADLINE, subscription.next()).await;
        let next = next.unwrap_or_else(|_| panic!("{n} of {count} are told, and nothing after {seq}"));
        let entry = next.unwrap().unwrap();
        assert!(entry.seq > seq, "{} is told after {seq}", entry.seq);
        seq = entry.seq;
        let FollowedChange::Event { key, version, .. } = entry.change else { panic!("{entry:?}") };
        let key: usize = std::str::from_utf8(&key[1..]).unwrap().parse().unwrap();
        versions[key] += 1;
        assert_eq!(version, versions[key], "each write of a key is told once and in order");
    }
    seq
}

/// L1: the line is slower than bursts of writes and faster than their mean. What is written while the state is sent is more than
/// the event log keeps by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_on_a_line_that_is_slower_than_bursts_is_sent_the_state_once() {
    const VALUE_BYTES: usize = 4096;
    const OPERATIONS: u64 = 1000;
    let mib = state_mib(32) as u64;
    // The state takes 8 s, and a burst each second is half of what the line carries.
    let bytes_per_second = mib * MIB / 8;
    let burst = bytes_per_second / 2 / VALUE_BYTES as u64;
    let (listens, serves) = (free_address(), free_address());
    let line = Line::to(&listens).unwrap();
    let (operations, bytes) = (OPERATIONS.to_string(), (mib * MIB).to_string());
    let args = ["--event-log-operations", &operations, "--event-log-bytes", &bytes];
    let source = Source::start(&listens, &line.address(), &args).await;
    source.write(0..2 * OPERATIONS, 16).await;
    fill(&source.client, mib as usize).await;
    let is_gone = async || source.metric("quorate_feed_first_position") > OPERATIONS / 2;
    eventually("the beginning is not told any more", is_gone).await;
    source.client.take_snapshot(None).await.unwrap();
    let before = source.memory();

    line.slow_down(bytes_per_second);
    let mut follows = Command::new(QUORATE);
    follows.args(["replica", "--from", &line.address(), "--listen", &serves, "--retries", "0"]);
    follows.arg("--data-dir").arg(source.dir.path().join("replica"));
    let _follows = Running::start(&mut follows);
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let bursts = async {
        let mut each_second = interval(Duration::from_secs(1));
        each_second.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !stop.load(Ordering::Relaxed) {
            each_second.tick().await;
            let from = written.load(Ordering::Relaxed);
            source.write(from..from + burst, VALUE_BYTES).await;
            written.fetch_add(burst, Ordering::Relaxed);
        }
    };
    let full_syncs = || status(&serves).and_then(|status| status["replica"]["full_syncs"].as_u64());
    let (mut most, mut during) = (0, 0);
    let following = async {
        let is_sent = async || {
            most = most.max(source.memory());
            full_syncs() >= Some(1)
        };
        eventually_within(DEADLINE * 10, "the state is sent", is_sent).await;
        during = written.load(Ordering::Relaxed);
        let (upto, _) = position(&listens).unwrap();
        let has_caught_up = async || {
            most = most.max(source.memory());
            assert!(full_syncs() <= Some(1), "the state is sent again: {:?}", status(&serves));
            position(&serves).is_some_and(|(applied, _)| applied >= upto)
        };
        eventually_within(DEADLINE * 10, "the replica has caught up", has_caught_up).await;
        stop.store(true, Ordering::Relaxed);
    };
    tokio::join!(bursts, following);
    let is_same = async || {
        let (of_node, of_replica) = (position(&listens), position(&serves));
        let (Some((upto, expected)), Some((applied, hash))) = (of_node, of_replica) else { return false };
        assert!(upto != applied || expected == hash, "two states at {upto}");
        upto == applied
    };
    eventually("the replica is where its source is", is_same).await;
    let grown = most.saturating_sub(before);
    println!("{during} writes while {mib} MiB were sent; memory {before}, {grown} more");
    // More than the event log keeps by itself, and than there is in memory.
    let is_enough = during > 2 * OPERATIONS && during * VALUE_BYTES as u64 > 9 * MIB;
    assert!(is_enough, "too little was written meanwhile to show anything: {during}");
    assert_eq!(full_syncs(), Some(1));
    // The ring, what is on its way, and a snapshot that is read in pieces.
    assert!(grown < 64 * MIB + mib * MIB / 4, "{grown} bytes more than {before}");
}

/// L4, and the second half of what a slow follower may cost: nobody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_never_come_back_or_take_nothing_hold_up_nobody() {
    const OPERATIONS: u64 = 1000;
    const BYTES: u64 = 4 * MIB;
    const VALUE_BYTES: usize = 8192;
    let (operations, bytes) = (OPERATIONS.to_string(), BYTES.to_string());
    let source = Source::alone(&["--event-log-operations", &operations, "--event-log-bytes", &bytes]).await;
    let (operations, bytes) = ("quorate_event_log_operations", "quorate_event_log_bytes");
    let mut versions = vec![0; KEYS as usize];
    source.write(0..100, VALUE_BYTES).await;
    let mut away = source.client.subscribe(SubscribeOptions::from_beginning()).await.unwrap();
    take(&mut away, &mut versions.clone(), 50).await;
    let left = away.close().await;

    // Neither has seen the end of what there is: they hold the event log.
    let window = SubscribeRequest { window_bytes: 64 * 1024, ..Default::default() };
    let says_nothing = tokio::spawn(Silent::begin(&source.listens, window.clone()).await.ended());
    let takes_nothing = Silent::begin(&source.listens, window).await;
    let mut reads = source.client.subscribe(SubscribeOptions::from_beginning()).await.unwrap();
    let is_there = async || source.metric("quorate_subscribers_open") == 2;
    eventually("both are told", is_there).await;

    let (stop, mut most) = (AtomicBool::new(false), 0);
    let writing = async {
        source.write(100..4_100, VALUE_BYTES).await;
        stop.store(true, Ordering::Relaxed);
    };
    let looking = async {
        while !stop.load(Ordering::Relaxed) {
            most = most.max(source.metric(bytes));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let (_, _, upto) = tokio::join!(writing, looking, take(&mut reads, &mut versions, 4_100));
    println!("{most} bytes of event log at most, told up to {upto}");
    assert!(most > BYTES, "those who are behind hold it: {most}");
    assert!(most < BYTES * 4 + BYTES, "and not for ever: {most}");

    let waits = Duration::from_secs(90);
    let (status, entries) = timeout(waits, says_nothing).await.expect("it is ended").unwrap();
    let reason = |status: &Status| details::failure(status.details()).unwrap().reason();
    assert_eq!(reason(&status), Reason::Lagged, "{status}");
    assert!((1..=64 * 1024 / VALUE_BYTES as u64).contains(&entries), "its window, and no more: {entries}");
    eventually("both are ended", async || source.metric("quorate_subscribers_open") == 1).await;
    let (status, _) = timeout(DEADLINE, takes_nothing.ended()).await.expect("it is ended");
    assert_eq!(reason(&status), Reason::Lagged, "{status}");

    // Nobody holds it any more.
    source.write(4_100..4_200, VALUE_BYTES).await;
    let upto = take(&mut reads, &mut versions, 100).await;
    let is_within =
        async || source.metric(operations) < OPERATIONS * 5 / 4 && source.metric(bytes) < BYTES * 5 / 4;
    eventually("the event log is within its limits", is_within).await;
    let mut back = source.client.subscribe(SubscribeOptions::after(left)).await.unwrap();
    let first = match timeout(DEADLINE, back.next()).await.unwrap().unwrap() {
        Err(ClientError::Compacted { first_revision }) => first_revision,
        other => panic!("{left:?}: {other:?}"),
    };
    assert_eq!(first, source.metric("quorate_feed_first_position"));
    let channel = Channel::from_shared(format!("http://{}", source.listens)).unwrap().connect_lazy();
    let mut service = ReplicationServiceClient::new(channel);
    let after_seq = first - 1;
    let request = EntriesRequest { after_seq, ..Default::default() };
    let entries = service.get_entries_after(request).await.unwrap().into_inner().entries;
    assert!(entries[0].seq >= first && entries[0].seq < upto, "what is said to be there is: {entries:?}");
    let request = EntriesRequest { after_seq: after_seq - 1, ..Default::default() };
    let gone = service.get_entries_after(request).await.unwrap_err();
    assert_eq!(reason(&gone), Reason::Compacted, "{gone}");
}

/// What cannot be sent fast enough stays on the disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_subscriber_costs_bounded_memory_and_is_told_everything() {
    const VALUE_BYTES: usize = 32 * 1024;
    const WARM: u64 = 1_000;
    let writes = std::env::var("QUORATE_TEST_WRITES").map_or(8_000, |writes| writes.parse().unwrap());
    let source = Source::alone(&[]).await;
    let mut versions = vec![0; KEYS as usize];
    let mut fast = source.client.subscribe(SubscribeOptions::from_beginning()).await.unwrap();
    tokio::join!(source.write(0..WARM, VALUE_BYTES), take(&mut fast, &mut versions, WARM));
    let before = source.memory();

    let line = Line::to(&source.listens).unwrap();
    let slow = Client::new([line.address()], ClientConfig::default()).unwrap();
    // Without a window: nothing but the connection holds back what is sent.
    let mut options = SubscribeOptions::from_beginning();
    options.window_bytes = 0;
    // From the beginning: nothing of it is to look dead.
    line.slow_down(50_000);
    let mut slow = slow.subscribe(options).await.unwrap();
    let mut slow_versions = vec![0; KEYS as usize];
    take(&mut slow, &mut slow_versions, 1).await;
    let (stop, mut most, mut unsent) = (AtomicBool::new(false), 0, 0);
    let looking = async {
        while !stop.load(Ordering::Relaxed) {
            (most, unsent) =
                (most.max(source.memory()), unsent.max(source.metric("quorate_server_unsent_bytes")));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let writing = async {
        let all = WARM..WARM + writes;
        tokio::join!(source.write(all, VALUE_BYTES), take(&mut fast, &mut versions, writes));
        stop.store(true, Ordering::Relaxed);
    };
    tokio::join!(writing, looking);
    let (grown, written) = (most.saturating_sub(before), writes * VALUE_BYTES as u64);
    println!("memory {before}, {grown} more for {written} bytes; {unsent} on their way");
    assert!(grown < 128 * MIB, "{grown} bytes more than {before}, for {written}");
    assert!(unsent < 4 * MIB, "{unsent} bytes on their way");
    // And then it has the rest.
    line.slow_down(0);
    take(&mut slow, &mut slow_versions, WARM + writes - 1).await;
    assert_eq!(slow_versions, versions);
}
