//! Replicas: states that follow a node, restart, are sent whole states, and are what they follow.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use quorate::client::EntryFilter;
use quorate::kv::machine::{KvAnswer, KvMachine, KvQuery};
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::{DeleteRangeRequest, DeleteRequest, PutRequest};
use quorate::{ReadError, ReadLevel, Replica, ReplicaConfig, StateMachine, SyncState};
use serde_json::Value;
use tokio::time::timeout;

use crate::replication::json_of;
use crate::{DEADLINE, channel, put_many, with_node};

pub(crate) fn config(address: SocketAddr, dir: &Path) -> ReplicaConfig {
    let mut config = ReplicaConfig::new([address.to_string()], dir);
    config.heartbeat = Duration::from_millis(200);
    config
}

pub(crate) async fn open(config: ReplicaConfig) -> Replica<KvMachine> {
    Box::pin(Replica::open(config, KvMachine::default)).await.unwrap()
}

/// Waits until the replica has position `upto`.
pub(crate) async fn reach(replica: &Replica<KvMachine>, upto: u64) {
    let reached = replica.wait_for(|state| state.local.index >= upto);
    let state = timeout(DEADLINE, reached).await;
    assert!(state.is_ok(), "it does not come to {upto}: {:?}", replica.state());
}

/// Where the node stands, and the hash of its state there.
pub(crate) async fn node_at(address: SocketAddr) -> (u64, String) {
    let (_, status): (u16, Value) = json_of(address, "GET", "/replication/status", "").await;
    let hash = status["state_hash"].as_str().unwrap().to_owned();
    (status["offsets"]["applied"].as_u64().unwrap(), hash)
}

pub(crate) async fn hash(replica: &Replica<KvMachine>) -> String {
    let (_, view) = replica.view(ReadLevel::Local).await.unwrap();
    format!("{:016x}", KvMachine::state_hash(&view))
}

/// The replica comes to the state of the node, which is at rest.
async fn assert_same(replica: &Replica<KvMachine>, address: SocketAddr) {
    let (upto, expected) = node_at(address).await;
    reach(replica, upto).await;
    assert_eq!(hash(replica).await, expected, "at {upto}: {:?}", replica.state());
}

async fn get(replica: &Replica<KvMachine>, tenant: &str, key: &str, level: ReadLevel) -> Option<Vec<u8>> {
    let query = KvQuery::Get { tenant: tenant.into(), collection: "c".into(), key: key.to_owned().into() };
    match replica.read(query, level).await.unwrap().1 {
        KvAnswer::Item(item) => item.map(|item| item.value.to_vec()),
        other => panic!("{other:?}"),
    }
}

fn put(tenant: &str, key: &str, value: &str) -> PutRequest {
    let value = value.to_owned().into();
    let (tenant, key) = (tenant.to_owned(), key.to_owned().into());
    PutRequest { tenant, collection: "c".to_owned(), key, value, ..Default::default() }
}

#[tokio::test]
async fn a_backlog_and_what_is_written_meanwhile_arrive_and_the_states_are_the_same() {
    let (dir, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    with_node(dir.path(), async |address| {
        put_many(address, 500).await;
        let replica = open(config(address, own.path())).await;
        let stop = AtomicBool::new(false);
        let write = async |writer: u32| {
            let mut kv = KvClient::new(channel(address).await);
            let mut written = 0;
            while !stop.load(Ordering::Relaxed) {
                kv.put(put("t", &format!("{writer}/{}", written % 50), "v")).await.unwrap();
                if written % 7 == 0 {
                    let key = format!("{writer}/3").into();
                    let (tenant, collection) = ("t".to_owned(), "c".to_owned());
                    let delete = DeleteRequest { tenant, collection, key, ..Default::default() };
                    kv.delete(delete).await.unwrap();
                }
                written += 1;
            }
        };
        let following = async {
            let early = timeout(DEADLINE, replica.wait_for(|state| state.received_entries > 700)).await;
            early.unwrap().unwrap();
            let mut kv = KvClient::new(channel(address).await);
            let range =
                DeleteRangeRequest { tenant: "t".into(), collection: "c".into(), ..Default::default() };
            kv.delete_range(range).await.unwrap();
            tokio::time::sleep(Duration::from_millis(300)).await;
            stop.store(true, Ordering::Relaxed);
        };
        let writing = futures::future::join_all((0..4).map(|writer| Box::pin(write(writer))));
        tokio::join!(writing, Box::pin(following));
        assert_same(&replica, address).await;
        let synced = replica.wait_for(|state| state.sync == SyncState::Synced && state.lag_entries() == 0);
        let state = timeout(DEADLINE, synced).await.unwrap().unwrap();
        assert_eq!((state.retries, state.full_syncs, state.error), (0, 0, None));
    })
    .await;
}

#[tokio::test]
async fn a_replica_goes_on_where_it_was_and_reads_are_as_fresh_as_they_are_asked_for() {
    let (dir, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    with_node(dir.path(), async |address| {
        let mut kv = KvClient::new(channel(address).await);
        for round in 0..6_u64 {
            let replica = open(config(address, own.path())).await;
            let begun = replica.state().local.index;
            let (upto, _) = node_at(address).await;
            assert!(round == 0 || begun > 0, "it begins anew in round {round}");
            reach(&replica, upto).await;
            for write in 0..20 {
                let value = format!("{round}/{write}");
                kv.put(put("t", "k", &value)).await.unwrap();
                let read = get(&replica, "t", "k", ReadLevel::Linearizable).await;
                assert_eq!(read.as_deref(), Some(value.as_bytes()));
            }
            assert_same(&replica, address).await;
            let received = replica.state().received_entries;
            assert!(round == 0 || received <= 25, "it was told {received} entries again");
            drop(replica);
            put_many(address, 3).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_part_is_followed_and_no_other() {
    let (dir, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    with_node(dir.path(), async |address| {
        let mut kv = KvClient::new(channel(address).await);
        let mut config = config(address, own.path());
        config.filters = vec![EntryFilter::tenant("a")];
        let replica = open(config.clone()).await;
        for round in 0..40 {
            kv.put(put(if round % 2 == 0 { "a" } else { "b" }, "k", &round.to_string())).await.unwrap();
        }
        let (upto, _) = node_at(address).await;
        reach(&replica, upto).await;
        assert_eq!(get(&replica, "a", "k", ReadLevel::Local).await.as_deref(), Some(&b"38"[..]));
        assert_eq!(get(&replica, "b", "k", ReadLevel::Local).await, None);
        drop(replica);
        config.filters.clear();
        // The directory is let go of when a write to the event log that was under way is done.
        let refused = async {
            loop {
                let refused =
                    Replica::open(config.clone(), KvMachine::default).await.unwrap_err().to_string();
                if !refused.contains("in use by another process") {
                    return refused;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let other = timeout(DEADLINE, refused).await.expect("the directory is let go of");
        assert!(other.contains("other tenants"), "{other}");
    })
    .await;
}

#[tokio::test]
async fn whoever_follows_another_cluster_than_before_says_so_and_keeps_what_it_has() {
    let own = tempfile::tempdir().unwrap();
    let first = tempfile::tempdir().unwrap();
    with_node(first.path(), async |address| {
        put_many(address, 50).await;
        let replica = open(config(address, own.path())).await;
        assert_same(&replica, address).await;
    })
    .await;
    let second = tempfile::tempdir().unwrap();
    with_node(second.path(), async |address| {
        put_many(address, 80).await;
        let replica = open(config(address, own.path())).await;
        let gave_up = replica.wait_for(|state| state.gave_up.is_some());
        let state = timeout(DEADLINE, gave_up).await.unwrap().unwrap();
        assert!(state.gave_up.unwrap().contains("not what it has followed before"));
        let query = KvQuery::Get { tenant: "default".into(), collection: "default".into(), key: "k7".into() };
        let (applied, _) = replica.read(query.clone(), ReadLevel::Local).await.unwrap();
        assert!(applied.is_some());
        let error = replica.read(query, ReadLevel::Linearizable).await.unwrap_err();
        assert!(matches!(error, ReadError::OtherHistory { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn nobody_to_follow_is_said_in_numbers() {
    let own = tempfile::tempdir().unwrap();
    let mut config = ReplicaConfig::new(["127.0.0.1:1"], own.path());
    config.retries = Some(1);
    let replica = open(config).await;
    let gave_up = replica.wait_for(|state| state.gave_up.is_some());
    let state = timeout(Duration::from_secs(60), gave_up).await.unwrap().unwrap();
    assert_eq!((state.sync, state.retries), (SyncState::Disconnected, 2));
    let why = state.gave_up.unwrap();
    assert!(why.contains("tried 2 times in vain"), "{why}");
}
