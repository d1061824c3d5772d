//! Sessions, levels, transactions, expiry, watches and long ranges, as a client of the protocol meets them.

use std::time::Duration;

use quorate::testkit::proto::v1::compare::{Comparison, Target};
use quorate::testkit::proto::v1::event::Kind;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::txn_operation::Operation;
use quorate::testkit::proto::v1::txn_result::Result as TxnAnswer;
use quorate::testkit::proto::v1::{
    AckLevel, CloseSessionRequest, Compare, DeleteRangeRequest, Event, Failure, GetRequest,
    OpenSessionRequest, Position, PutRequest, RangeRequest, ReadLevel, Reason, TxnGet, TxnOperation, TxnPut,
    TxnRequest, WatchRequest, WatchResponse, WriteOptions,
};
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::replication::{http, json_of, metric};
use crate::{DEADLINE, channel, put_many, with_node};

type Kv = KvClient<Channel>;

fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..Default::default() }
}

async fn value(kv: &mut Kv, key: &str) -> Option<String> {
    let request = GetRequest { key: key.to_owned().into(), ..Default::default() };
    let item = kv.get(request).await.unwrap().into_inner().item;
    item.map(|item| String::from_utf8(item.value.to_vec()).unwrap())
}

fn failure(status: &Status) -> Failure {
    quorate::testkit::proto::details::failure(status.details()).unwrap()
}

/// Events of `watch` until there are `count`, in order, and where to go on.
async fn events(watch: &mut Streaming<WatchResponse>, count: usize) -> (Vec<Event>, u64) {
    let mut events = Vec::new();
    let mut next = 0;
    while events.len() < count {
        let message =
            timeout(DEADLINE, watch.message()).await.expect("the watch is silent").unwrap().unwrap();
        assert!(message.next_revision >= next, "a watch does not go back");
        next = message.next_revision;
        events.extend(message.events);
    }
    (events, next)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_sent_twice_in_a_session_is_applied_once() {
    let dir = tempfile::tempdir().unwrap();
    let (session, first) = with_node(dir.path(), async |address| {
        let mut kv = KvClient::new(channel(address).await);
        let opened = kv.open_session(OpenSessionRequest { ttl_ms: 0 }).await.unwrap().into_inner();
        assert!(opened.session > 0 && opened.window > 0 && opened.ttl_ms > 0);
        let options = WriteOptions { session: opened.session, sequence: 1, ..Default::default() };
        let request = PutRequest { options: Some(options), ..put("k", "v") };
        let first = kv.put(request.clone()).await.unwrap().into_inner();
        let second = kv.put(request).await.unwrap().into_inner();
        assert_eq!((second.revision, second.version), (first.revision, 1));
        let (first_header, second_header) = (first.header.unwrap(), second.header.unwrap());
        assert!(!first_header.repeated_write && second_header.repeated_write);
        assert_eq!(second_header.position, first_header.position);
        assert_eq!(first_header.held_by, [1]);
        (opened.session, first.revision)
    })
    .await;
    // The table is part of the state: it is there after a restart.
    with_node(dir.path(), async |address| {
        let mut kv = KvClient::new(channel(address).await);
        let options = WriteOptions { session, sequence: 1, ..Default::default() };
        let request = PutRequest { options: Some(options), ..put("k", "v") };
        assert_eq!(kv.put(request.clone()).await.unwrap().into_inner().revision, first);
        kv.close_session(CloseSessionRequest { session, history: 0 }).await.unwrap();
        // What the log is read again for at a start counts: the session was opened.
        let (_, text) = http(address, "GET", "/metrics", "").await;
        assert_eq!(metric(&text, "quorate_session_opened_total"), 1.0);
        assert_eq!(metric(&text, "quorate_session_closed_total"), 1.0);
        let beyond =
            WriteOptions { session: open_session(&mut kv).await, sequence: u64::MAX, ..Default::default() };
        kv.put(PutRequest { options: Some(beyond), ..put("k", "v") }).await.unwrap_err();
        let (_, text) = http(address, "GET", "/metrics", "").await;
        assert_eq!(metric(&text, "quorate_write_refusals_total{reason=\"window_exceeded\"}"), 1.0);
        let status = kv.put(request).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
        let failure = failure(&status);
        assert_eq!((failure.reason(), failure.maybe_applied), (Reason::SessionExpired, false));
    })
    .await;
}

async fn open_session(kv: &mut Kv) -> u64 {
    kv.open_session(OpenSessionRequest { ttl_ms: 0 }).await.unwrap().into_inner().session
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_acknowledged_at_the_level_it_asks_for() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let mut kv = KvClient::new(channel(address).await);
        for ack in [AckLevel::Quorum, AckLevel::All, AckLevel::Leader] {
            let options = WriteOptions { ack: ack.into(), ..Default::default() };
            let answer = kv.put(PutRequest { options: Some(options), ..put("k", "v") }).await.unwrap();
            let answer = answer.into_inner();
            let header = answer.header.unwrap();
            assert_eq!((header.ack(), &header.held_by[..]), (ack, &[1][..]));
            assert_eq!(answer.revision, header.position.unwrap().index);
            // What is acknowledged before it is applied has no version, unless it was applied by then.
            assert!(answer.version > 0 || ack == AckLevel::Leader);
        }
        let (_, text) = http(address, "GET", "/metrics", "").await;
        let (_, stats) = json_of(address, "GET", "/replication/stats", "").await;
        for ack in ["quorum", "all", "leader"] {
            assert_eq!(metric(&text, &format!("quorate_write_acknowledged_total{{ack=\"{ack}\"}}")), 1.0);
            assert_eq!(stats["acknowledged"][ack], 1);
        }
        let unknown = WriteOptions { ack: 99, ..Default::default() };
        let status = kv.put(PutRequest { options: Some(unknown), ..put("k", "v") }).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_read_level_answers_on_a_leader() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let mut kv = KvClient::new(channel(address).await);
        kv.put(put("k", "v")).await.unwrap();
        for level in [ReadLevel::Linearizable, ReadLevel::Lease, ReadLevel::Bounded, ReadLevel::Local] {
            let request = GetRequest { key: "k".into(), level: level.into(), ..Default::default() };
            let found = kv.get(request).await.unwrap().into_inner();
            assert_eq!(found.item.unwrap().value, "v", "{level:?}");
        }
        let after_index = u64::MAX;
        let freshness = Some(quorate::testkit::proto::v1::Freshness { after_index, ..Default::default() });
        let status =
            kv.get(GetRequest { key: "k".into(), freshness, ..Default::default() }).await.unwrap_err();
        assert_eq!((status.code(), failure(&status).reason()), (Code::OutOfRange, Reason::Ahead));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_does_one_of_two_things() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let mut kv = KvClient::new(channel(address).await);
        let operation = |operation| TxnOperation { collection: String::new(), operation: Some(operation) };
        let put_if_absent = |value: &str| TxnRequest {
            compare: vec![Compare {
                key: "k".into(),
                comparison: Comparison::Equal.into(),
                target: Some(Target::CreateRevision(0)),
                ..Default::default()
            }],
            success: vec![operation(Operation::Put(TxnPut {
                key: "k".into(),
                value: value.to_owned().into(),
                ttl_ms: 0,
            }))],
            failure: vec![operation(Operation::Get(TxnGet { key: "k".into() }))],
            ..Default::default()
        };
        let first = kv.txn(put_if_absent("one")).await.unwrap().into_inner();
        assert!(first.succeeded);
        assert_eq!(first.revision, first.header.unwrap().position.unwrap().index);
        let second = kv.txn(put_if_absent("two")).await.unwrap().into_inner();
        assert!(!second.succeeded);
        let Some(TxnAnswer::Get(get)) = &second.results[0].result else { panic!("{second:?}") };
        let item = get.item.as_ref().unwrap();
        assert_eq!((&item.key[..], &item.value[..]), (&b"k"[..], &b"one"[..]));

        let empty = TxnRequest { success: vec![TxnOperation::default()], ..Default::default() };
        assert_eq!(kv.txn(empty).await.unwrap_err().code(), Code::InvalidArgument);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_reports_every_change_once_from_any_revision() {
    const PUTS: u64 = 3000;
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let mut kv = KvClient::new(channel(address).await);
        let mut live = kv.watch(WatchRequest::default()).await.unwrap().into_inner();
        // The first message says from where on the watch sees everything.
        let begin = live.message().await.unwrap().unwrap();
        assert!(begin.events.is_empty());
        let written: Vec<u64> = put_many(address, PUTS).await.into_iter().collect();
        let (seen, _) = events(&mut live, PUTS as usize).await;
        assert_eq!(seen.iter().map(|event| event.revision).collect::<Vec<_>>(), written);

        // Again from the middle, and only what is asked for.
        let middle = written[1000];
        let request = WatchRequest { start: "k".into(), from_revision: middle, ..Default::default() };
        let mut again = kv.watch(request).await.unwrap().into_inner();
        let (seen, next) = events(&mut again, (PUTS - 1000) as usize).await;
        assert_eq!(seen.iter().map(|event| event.revision).collect::<Vec<_>>(), written[1000..]);
        assert_eq!(next, written.last().unwrap() + 1);

        let deleted = DeleteRangeRequest { start: "k1".into(), end: "k2".into(), ..Default::default() };
        let deleted = kv.delete_range(deleted).await.unwrap().into_inner();
        assert_eq!((deleted.deleted, deleted.more), (1111, false));
        let (seen, _) = events(&mut again, 1111).await;
        assert!(seen.iter().all(|event| event.kind() == Kind::Delete));
        assert_eq!(seen.len(), 1111, "one command's events come together");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_key_is_removed_and_watchers_are_told() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let mut kv = KvClient::new(channel(address).await);
        let mut watch = kv.watch(WatchRequest::default()).await.unwrap().into_inner();
        watch.message().await.unwrap().unwrap();
        kv.put(PutRequest { ttl_ms: 1, ..put("gone", "v") }).await.unwrap();
        kv.put(PutRequest { ttl_ms: 3_600_000, ..put("kept", "v") }).await.unwrap();
        let (seen, _) = events(&mut watch, 3).await;
        let mut kinds: Vec<_> =
            seen.iter().map(|event| (event.kind(), event.item.clone().unwrap().key)).collect();
        kinds.sort_by_key(|(_, key)| key.clone());
        assert_eq!(
            kinds,
            [(Kind::Put, "gone".into()), (Kind::Expire, "gone".into()), (Kind::Put, "kept".into())]
        );
        assert_eq!(value(&mut kv, "gone").await, None);
        assert_eq!(value(&mut kv, "kept").await.as_deref(), Some("v"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_range_shows_one_point_in_time() {
    const PUTS: u64 = 4500;
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        put_many(address, PUTS).await;
        let mut kv = KvClient::new(channel(address).await);
        let mut pages = kv.range_stream(RangeRequest::default()).await.unwrap().into_inner();
        let first = pages.message().await.unwrap().unwrap();
        let everything = DeleteRangeRequest::default();
        assert_eq!(kv.delete_range(everything).await.unwrap().into_inner().deleted, PUTS);
        let mut items = first.items;
        while let Some(page) = timeout(Duration::from_secs(20), pages.message()).await.unwrap().unwrap() {
            items.extend(page.items);
        }
        assert_eq!(items.len() as u64, PUTS, "what was deleted meanwhile is still shown");
        assert!(items.is_sorted_by(|a, b| a.key < b.key));

        // One whose reader went away can be gone on with, also when others have read to the end of theirs.
        put_many(address, PUTS).await;
        let mut pages = kv.range_stream(RangeRequest::default()).await.unwrap().into_inner();
        let first = pages.message().await.unwrap().unwrap();
        drop(pages);
        kv.delete_range(DeleteRangeRequest::default()).await.unwrap();
        let at = first.header.unwrap().position;
        let rest = RangeRequest { start: first.next, at, ..Default::default() };
        let mut pages = kv.range_stream(rest.clone()).await.unwrap().into_inner();
        let mut count = first.items.len() as u64;
        while let Some(page) = timeout(Duration::from_secs(20), pages.message()).await.unwrap().unwrap() {
            assert_eq!(page.header.unwrap().position, at);
            count += page.items.len() as u64;
        }
        assert_eq!(count, PUTS);
        let never = at.map(|at| Position { index: at.index - 1, ..at });
        let refused = kv.range_stream(RangeRequest { at: never, ..rest.clone() }).await.unwrap_err();
        assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
        let elsewhere = at.map(|at| Position { history: at.history + 1, ..at });
        kv.range_stream(RangeRequest { at: elsewhere, ..rest.clone() }).await.unwrap_err();
        assert_eq!(kv.range(rest).await.unwrap_err().code(), Code::InvalidArgument);

        let limited = RangeRequest { limit: 3, ..Default::default() };
        let mut none = kv.range_stream(limited).await.unwrap().into_inner();
        assert!(none.message().await.unwrap().unwrap().items.is_empty());
        assert!(none.message().await.unwrap().is_none());
    })
    .await;
}
