//! States that are sent in items, and lines that are cut meanwhile: what has come is not sent once more.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use futures::StreamExt as _;
use quorate::client::SnapshotPart;
use quorate::kv::client::{Client, ClientConfig, EntryFilter, FollowedChange, SubscribeOptions};
use quorate::testkit::proto::replication::{
    Filter, SnapshotMark, StatePart, SubscribeRequest, WalEntryProto,
};
use quorate::testkit::proto::v1::SnapshotRequest;
use quorate::testkit::proto::v1::admin_client::AdminClient;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::runtime;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::subscribe::{Follower, put_one};
use crate::{DEADLINE, channel, with_node};

const KEYS: usize = 96;
const VALUE_BYTES: usize = 256 * 1024;

/// Runs `test` against a node that has a state of 24 MiB, and half of that again of another tenant, and of which nothing is left that led to it.
async fn with_state<T>(dir: &Path, test: impl AsyncFnOnce(SocketAddr) -> T) -> T {
    with_node(dir, async |address| {
        let mut kv = KvClient::new(channel(address).await);
        for number in 0..KEYS {
            put_one(&mut kv, "t", &format!("k{number:03}"), vec![number as u8; VALUE_BYTES]).await;
            if number % 2 == 0 {
                put_one(&mut kv, "other", &format!("k{number:03}"), vec![0; VALUE_BYTES]).await;
            }
        }
        AdminClient::new(channel(address).await).snapshot(SnapshotRequest {}).await.unwrap();
    })
    .await;
    std::fs::remove_dir_all(dir.join("events")).unwrap();
    with_node(dir, test).await
}

fn all_keys() -> Vec<String> {
    (0..KEYS).map(|number| format!("k{number:03}")).collect()
}

fn key(item: &WalEntryProto) -> String {
    let entity = item.entity.as_ref().unwrap();
    assert_eq!((item.snapshot(), entity.value.len()), (SnapshotMark::SnapshotItem, VALUE_BYTES));
    String::from_utf8(entity.key.to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_broke_off_goes_on_behind_the_part_that_has_come() {
    let dir = tempfile::tempdir().unwrap();
    with_state(dir.path(), async |address| {
        let filters = vec![Filter { tenant_id: "t".to_owned(), ..Default::default() }];
        let first =
            SubscribeRequest { accept_snapshot: true, filters, heartbeat_ms: 60_000, ..Default::default() };
        let resumable = SubscribeRequest { resumable: true, ..first.clone() };
        let mut follower = Follower::begin(address, resumable.clone()).await;
        let begin = follower.message().await.unwrap();
        assert_eq!((begin.snapshot(), begin.state_part), (SnapshotMark::SnapshotBegin, None));
        let (mut keys, mut part): (Vec<String>, Option<(StatePart, usize)>) = (Vec::new(), None);
        while part.is_none_or(|(_, entries)| entries < 5 || keys.len() < entries + 2) {
            let message = follower.message().await.unwrap();
            match message.snapshot() {
                SnapshotMark::SnapshotSoFar => {
                    assert_eq!(message.seq, begin.seq);
                    part = Some((message.state_part.unwrap(), keys.len()));
                }
                _ => keys.push(key(&message)),
            }
        }
        drop(follower);
        let next = put_one(&mut KvClient::new(channel(address).await), "t", "new", "z").await;
        let (part, entries) = part.unwrap();
        assert!((5..KEYS / 2).contains(&entries), "{entries}");
        keys.truncate(entries);

        let again = SubscribeRequest { state: Some(part), ..resumable.clone() };
        let mut follower = Follower::begin(address, again.clone()).await;
        let begins = follower.message().await.unwrap();
        assert_eq!((begins.snapshot(), begins.seq), (SnapshotMark::SnapshotBegin, begin.seq));
        assert_eq!(begins.state_part, Some(part));
        loop {
            let message = follower.message().await.unwrap();
            match message.snapshot() {
                SnapshotMark::SnapshotSoFar => {}
                SnapshotMark::SnapshotEnd => break,
                _ => keys.push(key(&message)),
            }
        }
        assert_eq!(keys, all_keys(), "each once, and in order");
        let after = follower.upto(next).await;
        assert_eq!(after.iter().map(|entry| entry.seq).collect::<Vec<_>>(), [next], "without a gap");

        // It was sent to its end, so nothing of it is kept; and what nobody was told begins nothing.
        for part in [part, StatePart { id: part.id, part: 1 << 40 }, StatePart { id: 0, part: 0 }] {
            let again = SubscribeRequest { state: Some(part), ..first.clone() };
            let mut follower = Follower::begin(address, again).await;
            let begins = follower.message().await.unwrap();
            assert_eq!((begins.snapshot(), begins.state_part), (SnapshotMark::SnapshotBegin, None));
            assert!(begins.seq > begin.seq);
        }
        // Who has not asked for it is told no parts.
        let mut plain = Follower::begin(address, first).await;
        loop {
            match plain.message().await.unwrap().snapshot() {
                SnapshotMark::SnapshotSoFar => panic!("it has not asked for that"),
                SnapshotMark::SnapshotEnd => break,
                _ => {}
            }
        }
    })
    .await;
}

/// The part that `follower` is told next.
async fn next_part(follower: &mut Follower) -> StatePart {
    loop {
        let message = follower.message().await.unwrap();
        if message.snapshot() == SnapshotMark::SnapshotSoFar {
            return message.state_part.unwrap();
        }
    }
}

/// A node sends its state to eight at a time. One whose line is dead, which the node has not noticed, has one of these places.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_comes_back_has_the_place_of_its_own_dead_stream_and_another_request_begins_anew() {
    const PLACES: usize = 8;
    let dir = tempfile::tempdir().unwrap();
    with_state(dir.path(), async |address| {
        let resumable = SubscribeRequest {
            accept_snapshot: true,
            resumable: true,
            heartbeat_ms: 60_000,
            ..Default::default()
        };
        let mut followers = Vec::new();
        for _ in 0..PLACES {
            let mut follower = Follower::begin(address, resumable.clone()).await;
            let begins = follower.message().await.unwrap();
            assert_eq!((begins.snapshot(), begins.state_part), (SnapshotMark::SnapshotBegin, None));
            followers.push(follower);
        }
        let part = next_part(&mut followers[0]).await;
        let again = SubscribeRequest { state: Some(part), ..resumable.clone() };
        let mut follower = Follower::begin(address, again).await;
        let begins = follower.message().await.unwrap();
        assert_eq!((begins.snapshot(), begins.state_part), (SnapshotMark::SnapshotBegin, Some(part)));

        drop(followers);
        let part = next_part(&mut follower).await;
        let filters = vec![Filter { tenant_id: "other".to_owned(), ..Default::default() }];
        let other = SubscribeRequest { state: Some(part), filters, ..resumable };
        let mut follower = Follower::begin(address, other).await;
        let begins = follower.message().await.unwrap();
        assert_eq!((begins.snapshot(), begins.state_part), (SnapshotMark::SnapshotBegin, None));
    })
    .await;
}

/// A line to a node that cuts its first connections after so many bytes.
struct CutLine {
    address: SocketAddr,
    bytes: Arc<AtomicU64>,
    cuts: Arc<AtomicUsize>,
}

impl CutLine {
    async fn to(node: SocketAddr, cut_after: u64, most_cuts: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let line =
            Self { address: listener.local_addr().unwrap(), bytes: Arc::default(), cuts: Arc::default() };
        let (bytes, cuts) = (line.bytes.clone(), line.cuts.clone());
        runtime::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (bytes, cuts) = (bytes.clone(), cuts.clone());
                runtime::spawn(async move {
                    let Ok(node) = TcpStream::connect(node).await else { return };
                    let ((mut from_client, mut to_client), (mut from_node, mut to_node)) =
                        (client.into_split(), node.into_split());
                    let there = async { drop(tokio::io::copy(&mut from_client, &mut to_node).await) };
                    let back = async {
                        let (mut carried, mut piece) = (0, vec![0; 64 * 1024]);
                        while let Ok(read @ 1..) = from_node.read(&mut piece).await {
                            if to_client.write_all(&piece[..read]).await.is_err() {
                                return;
                            }
                            carried += read as u64;
                            bytes.fetch_add(read as u64, Ordering::Relaxed);
                            if carried >= cut_after && cuts.load(Ordering::Relaxed) < most_cuts {
                                cuts.fetch_add(1, Ordering::Relaxed);
                                return;
                            }
                        }
                    };
                    tokio::select! {
                        () = there => {}
                        () = back => {}
                    }
                });
            }
        });
        line
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_over_a_line_that_is_cut_is_told_each_item_once_and_little_twice() {
    const CUTS: usize = 4;
    let dir = tempfile::tempdir().unwrap();
    with_state(dir.path(), async |address| {
        let line = CutLine::to(address, 5 << 20, CUTS).await;
        let client = Client::new([line.address.to_string()], ClientConfig::default()).unwrap();
        let mut options = SubscribeOptions::from_beginning();
        (options.accept_snapshot, options.filters) = (true, vec![EntryFilter::tenant("t")]);
        let mut subscription = client.subscribe(options).await.unwrap();
        let (mut keys, mut begins) = (Vec::new(), 0);
        let at = loop {
            let entry = timeout(DEADLINE, subscription.next()).await.unwrap().unwrap().unwrap();
            match (entry.snapshot, entry.change) {
                (SnapshotPart::Begin, _) => begins += 1,
                (SnapshotPart::Item, FollowedChange::Event { key, .. }) => {
                    keys.push(String::from_utf8(key.to_vec()).unwrap());
                }
                (SnapshotPart::End, _) => break entry.seq,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((line.cuts.load(Ordering::Relaxed), begins), (CUTS, 1), "it begins once");
        assert_eq!(keys, all_keys(), "each once, and in order");
        // Anew each time, it would have been 20 MiB more than the state.
        let state = (KEYS * VALUE_BYTES) as u64;
        let carried = line.bytes.load(Ordering::Relaxed);
        assert!(carried < state + (CUTS as u64) * (3 << 20), "{carried} bytes of a state of {state}");
        let next = put_one(&mut KvClient::new(channel(address).await), "t", "new", "z").await;
        let entry = timeout(DEADLINE, subscription.next()).await.unwrap().unwrap().unwrap();
        assert!(entry.seq == next && next > at);
    })
    .await;
}
