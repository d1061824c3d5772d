//! What keys held before, and how far a stream is, for those who ask.

use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt as _;
use quorate::kv::client::{
    Client, ClientConfig, EntryFilter, EventKind, FollowedChange, PreviousItem, Range, Scope,
    SubscribeOptions, Txn, TxnOp, WatchEvent, WatchOptions, WriteOptions,
};
use quorate::testkit::proto::replication::{Filter, SubscribeRequest};
use quorate::testkit::proto::v1::kv_client::KvClient;
use tokio::time::{Instant, timeout};

use crate::subscribe::{Follower, put_one};
use crate::{DEADLINE, channel, with_node};

fn client(address: SocketAddr) -> Client {
    Client::new([address.to_string()], ClientConfig::default()).unwrap()
}

/// Writes, overwrites and removes keys in all the ways that there are.
async fn write(client: &Client) {
    let scope = Scope::default();
    for value in ["one", "", "three"] {
        client.put(&scope, "k", value).await.unwrap();
    }
    // One key several times at one position.
    let txn = Txn::new()
        .then(TxnOp::put("k", "four"))
        .then(TxnOp::put("new", "a"))
        .then(TxnOp::put("new", "b"))
        .then(TxnOp::delete("new"))
        .then(TxnOp::put("new", "c"));
    client.txn(&scope, txn).await.unwrap();
    client.delete(&scope, "k").await.unwrap();
    client.put(&scope, "k", "again").await.unwrap();
    let soon = WriteOptions::default().with_ttl(Duration::from_millis(1));
    client.put_with(&scope, "due", "soon", soon).await.unwrap();
    client.delete_range(&scope, Range::prefix("new"), WriteOptions::default()).await.unwrap();
}

/// Kind, key, and what it held before.
type Told = (EventKind, String, Option<String>);

fn told(event: WatchEvent) -> Told {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let before = match event.previous.expect("it was asked for") {
        PreviousItem::Item(item) => {
            assert_eq!(item.key, event.item.key);
            Some(text(&item.value))
        }
        PreviousItem::Absent => None,
        other => panic!("{other:?}"),
    };
    (event.kind, text(&event.item.key), before)
}

async fn watched(client: &Client, count: usize) -> Vec<Told> {
    let options = WatchOptions::of(Range::all()).from(1).with_previous();
    let mut watch = client.watch_with(&Scope::default(), options).await.unwrap();
    let mut all = Vec::new();
    while all.len() < count {
        all.push(told(timeout(DEADLINE, watch.next()).await.unwrap().unwrap().unwrap()));
    }
    // A key may expire before or after the last of the others is removed.
    all.sort_by_key(|(_, key, _)| key == "due");
    all
}

async fn subscribed(client: &Client, batched: bool, count: usize) -> Vec<(String, Option<String>)> {
    let mut options = SubscribeOptions::from_beginning();
    (options.previous, options.batched) = (true, batched);
    let mut subscription = client.subscribe(options).await.unwrap();
    let mut all = Vec::new();
    while all.len() < count {
        let entry = timeout(DEADLINE, subscription.next()).await.unwrap().unwrap().unwrap();
        let FollowedChange::Event { key, previous_value, previous_unknown, .. } = entry.change else {
            panic!("{entry:?}")
        };
        assert!(!previous_unknown);
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        all.push((text(&key), previous_value.map(|value| text(&value))));
    }
    all.sort_by_key(|(key, _)| key == "due");
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_key_held_before_is_told_from_memory_and_from_the_event_log() {
    let expected = || {
        [
            (EventKind::Put, "k", None),
            (EventKind::Put, "k", Some("one")),
            (EventKind::Put, "k", Some("")),
            (EventKind::Put, "k", Some("three")),
            (EventKind::Put, "new", None),
            (EventKind::Put, "new", Some("a")),
            (EventKind::Delete, "new", Some("b")),
            (EventKind::Put, "new", None),
            (EventKind::Delete, "k", Some("four")),
            (EventKind::Put, "k", None),
            (EventKind::Delete, "new", Some("c")),
            (EventKind::Put, "due", None),
            (EventKind::Expire, "due", Some("soon")),
        ]
        .map(|(kind, key, before)| (kind, key.to_owned(), before.map(str::to_owned)))
    };
    let check = async |address| {
        let client = client(address);
        let expected = expected();
        assert_eq!(watched(&client, expected.len()).await, expected);
        for batched in [false, true] {
            let told = subscribed(&client, batched, expected.len()).await;
            assert_eq!(told, expected.clone().map(|(_, key, before)| (key, before)), "{batched}");
        }
    };
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        write(&client(address)).await;
        check(address).await;
    })
    .await;
    // Whatever is in memory now is not that.
    with_node(dir.path(), async |address| {
        client(address).put(&Scope::default(), "other", "x").await.unwrap();
        check(address).await;
    })
    .await;
}

/// The heartbeat is a minute, so what comes before that comes because it was asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_asks_is_told_how_far_everything_is() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let filters = vec![Filter { tenant_id: "t".to_owned(), collection: "none".to_owned() }];
        let first = SubscribeRequest { filters, heartbeat_ms: 60_000, ..Default::default() };
        let mut follower = Follower::begin(address, first).await;
        follower.heartbeat().await;
        let mut kv = KvClient::new(channel(address).await);
        for _ in 0..3 {
            let mut last = 0;
            for number in 0..100 {
                last = put_one(&mut kv, "t", &format!("k{number}"), "v").await;
            }
            let ask = SubscribeRequest { progress: true, ..Default::default() };
            follower.say(ask).await;
            let told = timeout(DEADLINE / 2, follower.heartbeat()).await.expect("it was asked for");
            assert!(told.heartbeat.unwrap().upto_seq >= last, "{told:?} after {last}");
        }
        let silence = timeout(Duration::from_millis(300), follower.heartbeat()).await;
        assert!(silence.is_err(), "it is told once: {silence:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_of_the_client_says_how_far_it_is_when_it_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let (client, scope) = (client(address), Scope::default());
        let mut watch = client.watch(&scope, Range::prefix("z"), None).await.unwrap();
        assert!(watch.ask_progress().await.is_err(), "it is open nowhere before it is read");
        let progress = watch.progress();
        let first = timeout(Duration::from_millis(300), watch.next()).await;
        assert!(first.is_err(), "nothing happens there: {first:?}");
        for _ in 0..3 {
            let put = client.put(&scope, "k", "v").await.unwrap();
            let begun = Instant::now();
            let asked = timeout(DEADLINE, watch.ask_progress()).await.unwrap().unwrap();
            assert!(asked > put.revision);
            let mut told = progress.clone();
            tokio::select! {
                event = watch.next() => panic!("nothing happens there: {event:?}"),
                told = told.wait_for(|at| at.index >= asked) => drop(told.unwrap()),
            }
            // By itself it would say so every five seconds.
            assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_of_the_client_says_how_far_it_is_when_it_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let (client, scope) = (client(address), Scope::default());
        let mut options = SubscribeOptions::from_now();
        options.heartbeat = Duration::from_secs(60);
        options.filters = vec![EntryFilter::collection("default", "none")];
        let mut subscription = client.subscribe(options).await.unwrap();
        let progress = subscription.progress();
        for _ in 0..3 {
            let put = client.put(&scope, "k", "v").await.unwrap();
            subscription.ask_progress();
            let mut told = progress.clone();
            tokio::select! {
                entry = subscription.next() => panic!("nothing happens there: {entry:?}"),
                told = told.wait_for(|at| at.upto >= put.revision) => drop(told.unwrap()),
                () = tokio::time::sleep(DEADLINE) => panic!("it is not told"),
            }
        }
    })
    .await;
}
