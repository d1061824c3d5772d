//! The seam between a whole state and what is told after it: a change that falls there must be neither missed nor doubled.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use quorate::testkit::proto::replication::{SnapshotMark, SubscribeRequest, WalEntryProto, WalOperation};
use quorate::testkit::proto::v1::admin_client::AdminClient;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::txn_operation::Operation;
use quorate::testkit::proto::v1::{
    DeleteRangeRequest, DeleteRequest, PutRequest, RangeRequest, SnapshotRequest, TxnDelete, TxnOperation,
    TxnPut, TxnRequest,
};
use tokio::sync::Semaphore;

use crate::replica::{config, hash, node_at, open, reach};
use crate::subscribe::Follower;
use crate::{DEADLINE, channel, put_many, with_node};

/// Keys of each writer.
const KEYS: u64 = 40;
/// States that are sent at a time: fewer than a node allows.
const AT_A_TIME: usize = 6;

/// What is known of a key: its value, the position of its last write, and how many there were.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    value: Vec<u8>,
    written: u64,
    version: u64,
}

/// A state, made of what a follower was told.
#[derive(Debug, Default)]
struct Folded {
    items: BTreeMap<(String, Vec<u8>), Known>,
    /// Of the state that led over.
    state_at: Option<u64>,
    is_whole: bool,
    upto: u64,
}

impl Folded {
    /// Takes in what must fit what is known.
    fn take(&mut self, entry: WalEntryProto) {
        match entry.snapshot() {
            SnapshotMark::SnapshotSoFar => panic!("it has not asked for parts"),
            SnapshotMark::SnapshotBegin => {
                assert_eq!(self.state_at.replace(entry.seq), None, "a state is told once");
                return;
            }
            SnapshotMark::SnapshotEnd => {
                assert_eq!(self.state_at, Some(entry.seq));
                (self.is_whole, self.upto) = (true, entry.seq);
                return;
            }
            SnapshotMark::SnapshotItem => assert!(!self.is_whole && self.state_at == Some(entry.seq)),
            SnapshotMark::NotOfASnapshot => {
                assert!(self.is_whole && entry.seq > self.upto, "{} after {}", entry.seq, self.upto);
                self.upto = if entry.more { self.upto } else { entry.seq };
            }
        }
        let (seq, is_item, operation) =
            (entry.seq, entry.snapshot() == SnapshotMark::SnapshotItem, entry.operation());
        let entity = entry.entity.unwrap();
        let place = (entry.tenant_id, entity.key.to_vec());
        let before = self.items.get(&place);
        let fits = match operation {
            _ if is_item => before.is_none() && entity.previous_seq <= seq,
            WalOperation::Insert => before.is_none() && entity.version == 1,
            WalOperation::Update => before.is_some_and(|before| {
                before.written == entity.previous_seq && before.version + 1 == entity.version
            }),
            _ => before.is_some_and(|before| before.written == entity.previous_seq),
        };
        assert!(fits, "{operation:?} of {place:?} at {seq}, state at {:?}: {before:?}", self.state_at);
        let written = if is_item { entity.previous_seq } else { seq };
        match operation {
            WalOperation::Delete => drop(self.items.remove(&place)),
            _ => {
                let known = Known { value: entity.value.to_vec(), written, version: entity.version };
                self.items.insert(place, known);
            }
        }
    }
}

/// All that the node has, which is at rest.
async fn all(address: SocketAddr) -> BTreeMap<(String, Vec<u8>), Known> {
    let mut kv = KvClient::new(channel(address).await);
    let mut items = BTreeMap::new();
    for tenant in ["t", "default"] {
        let range = RangeRequest { tenant: tenant.to_owned(), limit: 10_000, ..Default::default() };
        let page = kv.range(range).await.unwrap().into_inner();
        assert!(page.next.is_empty(), "all of it fits an answer");
        for item in page.items {
            let known =
                Known { value: item.value.to_vec(), written: item.mod_revision, version: item.version };
            items.insert((tenant.to_owned(), item.key.to_vec()), known);
        }
    }
    items
}

/// Writes, each of which changes several keys now and then, until it is told to stop.
async fn write(address: SocketAddr, writer: u64, stop: &AtomicBool) {
    let mut kv = KvClient::new(channel(address).await);
    let tenant = || "t".to_owned();
    for n in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let name = |n: u64| format!("{writer}/{:02}", n % KEYS);
        let key = name(n);
        match n % 9 {
            3 => {
                let delete = DeleteRequest { tenant: tenant(), key: key.into(), ..Default::default() };
                kv.delete(delete).await.unwrap();
            }
            5 => {
                let operation =
                    |operation| TxnOperation { collection: String::new(), operation: Some(operation) };
                let put = |key: String| TxnPut { key: key.into(), value: "txn".into(), ttl_ms: 0 };
                let success = vec![
                    operation(Operation::Put(put(key.clone()))),
                    operation(Operation::Put(put(name(n + 7)))),
                    operation(Operation::Delete(TxnDelete { key: name(n + 8).into() })),
                    operation(Operation::Put(put(key))),
                ];
                kv.txn(TxnRequest { tenant: tenant(), success, ..Default::default() }).await.unwrap();
            }
            7 if n % 5 == 0 => {
                let (start, end) = (name(3).into(), name(20).into());
                let range = DeleteRangeRequest { tenant: tenant(), start, end, ..Default::default() };
                kv.delete_range(range).await.unwrap();
            }
            _ => {
                let value = vec![n as u8; (n * 37 % 300) as usize].into();
                let put = PutRequest { tenant: tenant(), key: key.into(), value, ..Default::default() };
                kv.put(put).await.unwrap();
            }
        }
    }
}

/// L9: whoever begins with a state, as items or as a file, has the state of the source at each position after that.
#[tokio::test(flavor = "multi_thread")]
async fn a_state_and_what_comes_after_it_fit_at_whatever_moment_one_begins() {
    let followers = std::env::var("QUORATE_TEST_FOLLOWERS").map_or(24, |count| count.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        put_many(address, 300).await;
        AdminClient::new(channel(address).await).snapshot(SnapshotRequest {}).await.unwrap();
    })
    .await;
    // Nobody can be told what happened until now.
    std::fs::remove_dir_all(dir.path().join("events")).unwrap();
    with_node(dir.path(), async |address| Box::pin(begin_at_any_moment(address, followers)).await).await;
}

async fn begin_at_any_moment(address: SocketAddr, followers: u64) {
    let (stop, places) = (AtomicBool::new(false), Semaphore::new(AT_A_TIME));
    let last = tokio::sync::watch::Sender::new(0);
    let finished = || async {
        let mut last = last.subscribe();
        *last.wait_for(|last| *last > 0).await.unwrap()
    };
    let begins = |n: u64| Duration::from_millis(n * 25 + n * 7919 % 23);
    let streams = (0..followers).map(async |n| {
        tokio::time::sleep(begins(n)).await;
        let place = places.acquire().await.unwrap();
        let first = SubscribeRequest { accept_snapshot: true, batched: n % 2 == 0, ..Default::default() };
        let (mut follower, mut folded) = (Follower::begin(address, first).await, Folded::default());
        while !folded.is_whole {
            follower.entries().await.into_iter().for_each(|entry| folded.take(entry));
        }
        drop(place);
        let last = {
            let mut finished = std::pin::pin!(finished());
            loop {
                tokio::select! {
                    last = &mut finished => break last,
                    entries = follower.entries() => entries.into_iter().for_each(|entry| folded.take(entry)),
                }
            }
        };
        while folded.upto < last {
            follower.entries().await.into_iter().for_each(|entry| folded.take(entry));
        }
        folded
    });
    let replicas = (0..followers / 2).map(async |n| {
        tokio::time::sleep(begins(n * 2 + 1)).await;
        let own = tempfile::tempdir().unwrap();
        let place = places.acquire().await.unwrap();
        let replica = open(config(address, own.path())).await;
        let has_state = tokio::time::timeout(DEADLINE, replica.wait_for(|state| state.full_syncs == 1)).await;
        assert!(has_state.is_ok(), "it is not sent the state: {:?}", replica.state());
        drop(place);
        reach(&replica, finished().await).await;
        (replica, own)
    });
    let mut admin = AdminClient::new(channel(address).await);
    let ending = async {
        // Snapshots are at other positions each time.
        for _ in 0..followers {
            tokio::time::sleep(Duration::from_millis(30)).await;
            admin.snapshot(SnapshotRequest {}).await.unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    };
    let writing = async {
        futures::future::join_all((0..4).map(|writer| write(address, writer, &stop))).await;
        let put = PutRequest { key: "last".into(), ..Default::default() };
        let revision = KvClient::new(channel(address).await).put(put).await.unwrap().into_inner().revision;
        last.send_replace(revision);
    };
    let streams = Box::pin(futures::future::join_all(streams));
    let replicas = Box::pin(futures::future::join_all(replicas));
    let (streams, replicas, (), ()) = tokio::join!(streams, replicas, Box::pin(ending), Box::pin(writing));

    let expected = all(address).await;
    let mut moments = std::collections::BTreeSet::new();
    for folded in streams {
        assert!(folded.items == expected, "a state at {:?} has led to another one", folded.state_at);
        moments.insert(folded.state_at.unwrap());
    }
    assert!(moments.len() as u64 > followers / 2, "few moments: {moments:?}");
    for (replica, _own) in replicas {
        let (upto, expected) = node_at(address).await;
        reach(&replica, upto).await;
        assert_eq!(hash(&replica).await, expected, "at {upto}: {:?}", replica.state());
        assert_eq!(replica.state().full_syncs, 1);
    }
}
