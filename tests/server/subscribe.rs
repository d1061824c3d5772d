//! Followers of a node: what is applied, from any position, in order, once.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use prost::Message as _;
use quorate::client::MachineClient;
use quorate::server::MachineGuest;
use quorate::testkit::proto::replication::replication_service_client::ReplicationServiceClient;
use quorate::testkit::proto::replication::{
    Compression, Entries, EntriesRequest, Filter, SnapshotMark, StatusRequest, SubscribeRequest,
    WalEntryProto, WalOperation,
};
use quorate::testkit::proto::v1::admin_client::AdminClient;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::txn_operation::Operation;
use quorate::testkit::proto::v1::{
    DeleteRangeRequest, DeleteRequest, Failure, OpenSessionRequest, PutRequest, Reason, SnapshotRequest,
    TxnDelete, TxnOperation, TxnPut, TxnRequest, WriteOptions,
};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::machine_guest::{Change, Sum, served_at};
use crate::replication::{http, json_of, metric};
use crate::{DEADLINE, channel, put_many, with_node};

pub(crate) type KvCalls = KvClient<Channel>;

/// A follower: what it says, and what it is sent.
pub(crate) struct Follower {
    to: mpsc::Sender<SubscribeRequest>,
    from: Streaming<WalEntryProto>,
    /// As the first message named it.
    history: u64,
}

impl Follower {
    pub(crate) async fn begin(address: SocketAddr, first: SubscribeRequest) -> Self {
        let (to, requests) = mpsc::channel(16);
        to.send(first).await.unwrap();
        let mut service = ReplicationServiceClient::new(channel(address).await);
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let from = service.subscribe(requests).await.unwrap().into_inner();
        Self { to, from, history: 0 }
    }

    pub(crate) async fn message(&mut self) -> Result<WalEntryProto, Status> {
        let message = timeout(DEADLINE, self.from.message()).await.expect("the follower is told nothing");
        let message = message?.expect("a stream of what is applied does not end by itself");
        if self.history == 0 && message.batch.is_none() {
            assert!(message.history != 0, "the first message names the history");
            self.history = message.history;
        }
        Ok(message)
    }

    /// The next entries, of batches too; none from a heartbeat.
    pub(crate) async fn entries(&mut self) -> Vec<WalEntryProto> {
        let message = self.message().await.unwrap();
        match (message.heartbeat, message.batch.clone()) {
            (Some(_), _) => Vec::new(),
            (None, None) => vec![message],
            (None, Some(batch)) => {
                let raw = match batch.compression() {
                    Compression::None => batch.entries.to_vec(),
                    Compression::Zstd => {
                        zstd::bulk::decompress(&batch.entries, batch.raw_bytes as usize).unwrap()
                    }
                };
                assert_eq!(raw.len() as u64, batch.raw_bytes);
                let entries = Entries::decode(&raw[..]).unwrap().entries;
                assert_eq!(entries.len(), batch.count as usize);
                entries
            }
        }
    }

    /// Entries up to position `upto`, the last of it included.
    pub(crate) async fn upto(&mut self, upto: u64) -> Vec<WalEntryProto> {
        let mut all = Vec::new();
        while !all.last().is_some_and(|last: &WalEntryProto| last.seq >= upto && !last.more) {
            all.extend(self.entries().await);
        }
        all
    }

    pub(crate) async fn heartbeat(&mut self) -> WalEntryProto {
        loop {
            let message = self.message().await.unwrap();
            if message.heartbeat.is_some() {
                return message;
            }
        }
    }

    async fn ack(&self, ack_seq: u64) {
        self.say(SubscribeRequest { ack_seq, ..Default::default() }).await;
    }

    pub(crate) async fn say(&self, request: SubscribeRequest) {
        self.to.send(request).await.unwrap();
    }

    async fn failure(&mut self) -> Failure {
        loop {
            if let Err(status) = self.message().await {
                return failure(&status);
            }
        }
    }
}

fn failure(status: &Status) -> Failure {
    quorate::testkit::proto::details::failure(status.details()).unwrap()
}

pub(crate) fn put(tenant: &str, key: &str, value: impl Into<Vec<u8>>) -> PutRequest {
    let (tenant, key) = (tenant.to_owned(), key.to_owned().into());
    PutRequest { tenant, collection: "c".to_owned(), key, value: value.into().into(), ..Default::default() }
}

pub(crate) async fn put_one(kv: &mut KvCalls, tenant: &str, key: &str, value: impl Into<Vec<u8>>) -> u64 {
    kv.put(put(tenant, key, value)).await.unwrap().into_inner().revision
}

/// What is the same however it was sent.
pub(crate) fn plain(entries: Vec<WalEntryProto>) -> Vec<WalEntryProto> {
    entries.into_iter().map(|entry| WalEntryProto { history: 0, ..entry }).collect()
}

fn key(entry: &WalEntryProto) -> &[u8] {
    &entry.entity.as_ref().unwrap().key
}

/// Transactions and ranges, a write that is sent twice, and writers beside each other. The position of the last of it.
pub(crate) async fn write_much(address: SocketAddr) -> u64 {
    let mut kv = KvClient::new(channel(address).await);
    let operation = |operation| TxnOperation { collection: String::new(), operation: Some(operation) };
    let txn = TxnRequest {
        tenant: "t".to_owned(),
        collection: "c".to_owned(),
        success: vec![
            operation(Operation::Put(TxnPut { key: "a".into(), value: "1".into(), ttl_ms: 0 })),
            operation(Operation::Put(TxnPut { key: "b".into(), value: "2".into(), ttl_ms: 60_000 })),
            operation(Operation::Delete(TxnDelete { key: "a".into() })),
        ],
        ..Default::default()
    };
    kv.txn(txn).await.unwrap();
    let session = kv.open_session(OpenSessionRequest { ttl_ms: 0 }).await.unwrap().into_inner().session;
    let options = Some(WriteOptions { session, sequence: 1, ..Default::default() });
    for _ in 0..2 {
        kv.put(PutRequest { options, ..put("t", "once", "x") }).await.unwrap();
    }
    let writers = (0..4).map(|writer| {
        let mut kv = kv.clone();
        async move {
            for number in 0..50 {
                put_one(&mut kv, "t", &format!("w{writer}-{}", number % 10), number.to_string()).await;
            }
        }
    });
    futures::future::join_all(writers).await;
    let (tenant, collection) = ("t".to_owned(), "c".to_owned());
    let range = DeleteRangeRequest { tenant, collection, start: "w".into(), ..Default::default() };
    assert_eq!(kv.delete_range(range).await.unwrap().into_inner().deleted, 40);
    kv.delete(DeleteRequest { key: "nothing".into(), ..Default::default() }).await.unwrap();
    put_one(&mut kv, "other", "last", "y").await
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_told_once_and_in_order_from_the_beginning() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let writing = write_much(address);
        let mut follower = Follower::begin(address, SubscribeRequest::default()).await;
        let last = writing.await;
        let entries = follower.upto(last).await;
        assert!(
            entries
                .windows(2)
                .all(|two| two[0].seq <= two[1].seq && (two[0].seq < two[1].seq) != two[0].more)
        );
        let first: Vec<_> =
            entries[..3].iter().map(|entry| (entry.operation(), key(entry), entry.more)).collect();
        let (insert, delete) = (WalOperation::Insert, WalOperation::Delete);
        assert_eq!(first, [(insert, &b"a"[..], true), (insert, b"b", true), (delete, b"a", false)]);
        let expires = entries[1].entity.as_ref().unwrap().expires_ms;
        assert_eq!(expires, entries[1].time_ms + 60_000);
        assert_eq!(entries.iter().filter(|entry| key(entry) == b"once").count(), 1);
        // What is told makes the state: of each key as many writes as there were.
        let mut versions = BTreeMap::new();
        for entry in entries.iter().filter(|entry| entry.operation() != WalOperation::Delete) {
            let version = versions.entry(key(entry).to_vec()).or_insert(0);
            *version += 1;
            assert_eq!(entry.entity.as_ref().unwrap().version, *version);
            assert_eq!(entry.operation() == WalOperation::Insert, *version == 1);
        }
        let deleted: Vec<_> =
            entries.iter().filter(|entry| entry.operation() == WalOperation::Delete).collect();
        assert_eq!((deleted.len(), deleted[1].seq), (41, deleted[40].seq));

        // As batches, compressed or not, and as pages it is the same.
        let entries = plain(entries);
        for compression in [Compression::None, Compression::Zstd] {
            let first =
                SubscribeRequest { batched: true, compression: compression.into(), ..Default::default() };
            let batched = Follower::begin(address, first).await.upto(last).await;
            assert!(plain(batched) == entries, "{compression:?}");
        }
        let middle = entries[100].seq;
        let first = SubscribeRequest { from_seq: middle, batched: true, ..Default::default() };
        let later: Vec<_> = entries.iter().filter(|entry| entry.seq > middle).cloned().collect();
        assert_eq!(plain(Follower::begin(address, first).await.upto(last).await), later);
        assert_eq!(pages(address, 7).await, entries);
        assert_eq!(pages(address, 0).await, entries);
    })
    .await;
}

/// All entries there are, by so many positions at a time.
pub(crate) async fn pages(address: SocketAddr, limit: u32) -> Vec<WalEntryProto> {
    let mut service = ReplicationServiceClient::new(channel(address).await);
    let (mut all, mut request) = (Vec::new(), EntriesRequest { limit, ..Default::default() });
    loop {
        let page = service.get_entries_after(request.clone()).await.unwrap().into_inner();
        let positions: std::collections::BTreeSet<_> = page.entries.iter().map(|entry| entry.seq).collect();
        assert!(limit == 0 || positions.len() <= limit as usize);
        assert!(page.upto_seq > request.after_seq || !page.more, "it gets on");
        assert!(positions.last().is_none_or(|last| *last <= page.upto_seq));
        all.extend(page.entries);
        (request.after_seq, request.history) = (page.upto_seq, page.history);
        if !page.more {
            return all;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_leave_out_the_rest_and_heartbeats_tell_of_progress() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let last = write_much(address).await;
        let filter = |tenant_id: &str, collection: &str| {
            vec![Filter { tenant_id: tenant_id.to_owned(), collection: collection.to_owned() }]
        };
        let first = SubscribeRequest { filters: filter("other", ""), ..Default::default() };
        let only = Follower::begin(address, first).await.upto(last).await;
        assert_eq!(only.iter().map(key).collect::<Vec<_>>(), [b"last"]);
        let nothing =
            SubscribeRequest { filters: filter("t", "none"), heartbeat_ms: 100, ..Default::default() };
        let mut follower = Follower::begin(address, nothing).await;
        let mut before = 0;
        loop {
            let message = follower.heartbeat().await;
            let heartbeat = message.heartbeat.unwrap();
            assert!(heartbeat.upto_seq >= before && heartbeat.applied_seq >= heartbeat.upto_seq);
            before = heartbeat.upto_seq;
            if before >= last {
                assert!(heartbeat.committed_seq >= last && heartbeat.applied_time_ms > 0);
                break;
            }
        }
        let mut service = ReplicationServiceClient::new(channel(address).await);
        let request = EntriesRequest { filters: filter("t", "none"), ..Default::default() };
        let page = service.get_entries_after(request).await.unwrap().into_inner();
        assert!(page.entries.is_empty() && page.upto_seq >= last && !page.more);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_holds_back_what_is_not_acknowledged_but_no_single_entry() {
    const WINDOW: u64 = 64 * 1024;
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let mut kv = KvClient::new(channel(address).await);
        let mut last = 0;
        for number in 0..32 {
            last = put_one(&mut kv, "t", &format!("k{number}"), vec![7; 8 * 1024]).await;
        }
        let large = put_one(&mut kv, "t", "large", vec![8; 1024 * 1024]).await;
        let mut others = 0;
        for batched in [false, true] {
            let first =
                SubscribeRequest { window_bytes: WINDOW, heartbeat_ms: 100, batched, ..Default::default() };
            let mut follower = Follower::begin(address, first).await;
            let mut all = Vec::new();
            while all.last().is_none_or(|entry: &WalEntryProto| entry.seq < large) {
                let entries = follower.entries().await;
                if entries.is_empty() {
                    // Nothing else can come: the node has sent a heartbeat instead.
                    let unacked: usize = all.iter().map(WalEntryProto::encoded_len).sum();
                    assert!(unacked as u64 <= WINDOW, "{unacked}");
                    follower.ack(all.last().unwrap().seq).await;
                    all.truncate(0);
                }
                all.extend(entries);
            }
            assert!(all.len() == 1 && large > last, "it came when all before was acknowledged");
            follower.ack(large).await;
            let next = put_one(&mut kv, "t", "next", "x").await;
            others += 1;
            assert_eq!(follower.upto(next).await.len(), others);
            follower.ack(next + 1_000).await;
            let failure = follower.failure().await;
            assert_eq!(failure.reason(), Reason::Invalid);
            assert!(failure.message.contains(&next.to_string()), "{}", failure.message);
        }
    })
    .await;
}

/// What one command does is divided over messages; no window and no batch can hold it.
#[tokio::test(flavor = "multi_thread")]
async fn a_position_with_very_many_events_comes_in_several_messages() {
    const KEYS: u64 = 10_000;
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        put_many(address, KEYS).await;
        let mut kv = KvClient::new(channel(address).await);
        let from_now = SubscribeRequest { from_now: true, ..Default::default() };
        let mut follower = Follower::begin(address, from_now).await;
        let from = follower.heartbeat().await;
        let (from_seq, history) = (from.heartbeat.unwrap().upto_seq, from.history);
        let deleted = kv.delete_range(DeleteRangeRequest::default()).await.unwrap().into_inner();
        assert_eq!(deleted.deleted, KEYS);
        let at = deleted.header.unwrap().position.unwrap().index;
        let plain_entries = plain(follower.upto(at).await);
        assert_eq!(plain_entries.len() as u64, KEYS);
        let first = SubscribeRequest {
            from_seq,
            history,
            batched: true,
            window_bytes: 64 * 1024,
            ..Default::default()
        };
        let mut follower = Follower::begin(address, first).await;
        let (mut batches, mut entries) = (0, Vec::new());
        while entries.last().is_none_or(|entry: &WalEntryProto| entry.more) {
            let batch = follower.entries().await;
            batches += usize::from(!batch.is_empty());
            entries.extend(batch);
        }
        assert!(batches > 1);
        assert_eq!(plain(entries), plain_entries);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_makes_no_sense_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        put_many(address, 10).await;
        let mut service = ReplicationServiceClient::new(channel(address).await);
        let status = service.get_status(StatusRequest::default()).await.unwrap().into_inner();
        assert!(status.current_seq >= 10 && status.healthy && status.history != 0 && status.time_ms > 0);
        assert_eq!((&status.role[..], status.node_id, status.subscribers), ("leader", 1, 0));
        let cases = [
            (SubscribeRequest { history: 1, from_seq: 3, ..Default::default() }, Reason::OtherHistory),
            (SubscribeRequest { history: 1, from_now: true, ..Default::default() }, Reason::OtherHistory),
            (SubscribeRequest { from_seq: 1 << 40, ..Default::default() }, Reason::Ahead),
            (SubscribeRequest { window_bytes: 1, ..Default::default() }, Reason::Invalid),
        ];
        for (first, reason) in cases {
            let failure = Follower::begin(address, first.clone()).await.failure().await;
            assert_eq!(failure.reason(), reason, "{first:?}: {}", failure.message);
        }
        let silent = service.subscribe(tokio_stream::empty()).await.unwrap().into_inner().message().await;
        assert_eq!(failure(&silent.unwrap_err()).reason(), Reason::Invalid);
        let request = EntriesRequest { after_seq: 1 << 40, ..Default::default() };
        let ahead = service.get_entries_after(request).await.unwrap_err();
        assert_eq!(failure(&ahead).reason(), Reason::Ahead);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_show_on_pages_and_end_with_their_node() {
    let dir = tempfile::tempdir().unwrap();
    let mut follower = with_node(dir.path(), async |address| {
        put_many(address, 10).await;
        let first = SubscribeRequest { id: "reader".to_owned(), heartbeat_ms: 100, ..Default::default() };
        let mut follower = Follower::begin(address, first).await;
        let at = follower.heartbeat().await.heartbeat.unwrap().upto_seq;
        let (_, page) = json_of(address, "GET", "/replication/replicas", "").await;
        let row = &page["replicas"][0];
        assert_eq!(
            (&row["kind"], &row["id"], &row["host"]),
            (&"subscriber".into(), &"reader".into(), &"127.0.0.1".into())
        );
        assert_eq!((&row["status"], &row["lag_operations"]), (&"Connected".into(), &Value::from(0)), "{row}");
        assert!(row["offset"].as_u64().unwrap() >= at && row["operations_synced"] == 10, "{row}");
        let (_, text) = http(address, "GET", "/metrics", "").await;
        assert_eq!(metric(&text, "quorate_subscribers_open"), 1.0);
        assert!(metric(&text, "quorate_subscribers_sent_bytes_total") > 100.0);
        follower
    })
    .await;
    let failure = follower.failure().await;
    assert_eq!(failure.reason(), Reason::Stopped, "{}", failure.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_goes_on_after_a_restart_of_its_node() {
    let dir = tempfile::tempdir().unwrap();
    let (before, history) = with_node(dir.path(), async |address| {
        let last = write_much(address).await;
        let mut follower = Follower::begin(address, SubscribeRequest::default()).await;
        let entries = follower.upto(last).await;
        AdminClient::new(channel(address).await).snapshot(SnapshotRequest {}).await.unwrap();
        (entries, follower.history)
    })
    .await;
    with_node(dir.path(), async |address| {
        let middle = before[100].seq;
        let last = put_one(&mut KvClient::new(channel(address).await), "t", "after", "z").await;
        let first = SubscribeRequest { from_seq: middle, history, ..Default::default() };
        let mut entries = plain(Follower::begin(address, first).await.upto(last).await);
        assert_eq!(entries.pop().map(|entry| entry.seq), Some(last));
        let expected: Vec<_> = before.iter().filter(|entry| entry.seq > middle).cloned().collect();
        assert_eq!(entries, plain(expected));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_leads_over_where_the_position_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        write_much(address).await;
        AdminClient::new(channel(address).await).snapshot(SnapshotRequest {}).await.unwrap();
    })
    .await;
    std::fs::remove_dir_all(dir.path().join("events")).unwrap();
    with_node(dir.path(), async |address| {
        let gone = SubscribeRequest { heartbeat_ms: 100, ..Default::default() };
        let failure = Follower::begin(address, gone.clone()).await.failure().await;
        assert_eq!(failure.reason(), Reason::Compacted);
        assert!(failure.first_revision > 0);
        for batched in [false, true] {
            let mut kv = KvClient::new(channel(address).await);
            let first = SubscribeRequest { accept_snapshot: true, batched, ..gone.clone() };
            let mut follower = Follower::begin(address, first).await;
            let begin = follower.message().await.unwrap();
            assert_eq!(begin.snapshot(), SnapshotMark::SnapshotBegin);
            assert!(begin.history != 0 && begin.seq + 1 >= failure.first_revision);
            let mut items = Vec::new();
            while items
                .last()
                .is_none_or(|entry: &WalEntryProto| entry.snapshot() != SnapshotMark::SnapshotEnd)
            {
                items.extend(follower.entries().await);
            }
            let end = items.pop().unwrap();
            assert!(
                items
                    .iter()
                    .all(|item| item.snapshot() == SnapshotMark::SnapshotItem && item.seq == begin.seq)
            );
            let keys: Vec<_> = items.iter().map(key).filter(|key| !key.starts_with(b"n")).collect();
            assert_eq!((end.seq, keys), (begin.seq, vec![&b"last"[..], b"b", b"once"]));
            let next = put_one(&mut kv, "t", "new", "z").await;
            assert_eq!(follower.upto(next).await.last().map(|entry| entry.seq), Some(next));
        }
    })
    .await;
}

/// Nobody who says nothing keeps a stream, and nobody who never reads holds up the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_does_not_read_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let unread = Follower::begin(address, SubscribeRequest::default()).await;
        let mut kv = KvClient::new(channel(address).await);
        let mut last = 0;
        for number in 0..16 {
            last = put_one(&mut kv, "t", &format!("k{number}"), vec![7; 1024 * 1024]).await;
        }
        let entries = Follower::begin(address, SubscribeRequest::default()).await.upto(last).await;
        assert_eq!(entries.len(), 16);
        let (_, text) = http(address, "GET", "/metrics", "").await;
        assert!(metric(&text, "quorate_server_unsent_bytes") < 12e6, "a few messages at most");
        // And when it reads after all, it has everything.
        let mut unread = unread;
        assert_eq!(plain(unread.upto(last).await), plain(entries));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn generic_clients_find_the_service() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let mut follower = Follower::begin(address, SubscribeRequest::default()).await;
        follower.heartbeat().await;
        // The end of what it says is not the end of what it is told.
        let requests = tokio_stream::iter([SubscribeRequest { heartbeat_ms: 100, ..Default::default() }]);
        let mut service = ReplicationServiceClient::new(channel(address).await);
        let told = service.subscribe(requests).await.unwrap().into_inner();
        let told: Vec<_> = timeout(DEADLINE, told.take(3).collect::<Vec<_>>()).await.unwrap();
        assert!(told.iter().all(|message| message.as_ref().unwrap().heartbeat.is_some()), "{told:?}");
    })
    .await;
}

/// A machine that tells no events is followed by its commands.
#[tokio::test(flavor = "multi_thread")]
async fn commands_are_told_as_they_are_of_a_machine_without_events() {
    served_at::<MachineGuest<Sum<2>>>(Sum::default(), async |address, client| {
        let sum = MachineClient::<Sum<2>>::from(client);
        let changes = [Change::Add(5), Change::Multiply(2), Change::Add(300)];
        for change in &changes {
            sum.write(change.clone()).await.unwrap();
        }
        let mut service = ReplicationServiceClient::new(channel(address).await);
        let page = service.get_entries_after(EntriesRequest::default()).await.unwrap().into_inner();
        let told: Vec<_> = page.entries.iter().map(|entry| entry.command.clone().unwrap()).collect();
        let wrote: Vec<_> = told.iter().map(|command| (command.machine, command.version)).collect();
        assert_eq!(wrote, [(0, 1), (0, 2), (0, 1)]);
        let last = page.entries[2].seq;
        for batched in [false, true] {
            let first = SubscribeRequest { batched, ..Default::default() };
            let entries = Follower::begin(address, first).await.upto(last).await;
            assert!(entries.iter().all(|entry| entry.operation() == WalOperation::Command && !entry.more));
            let encoded = changes.iter().map(|change| quorate::encode(change).unwrap());
            let sent = entries.iter().map(|entry| entry.command.as_ref().unwrap().command.to_vec());
            assert!(sent.eq(encoded), "{entries:?}");
        }
        let filters = vec![Filter { tenant_id: "t".to_owned(), collection: String::new() }];
        let first = SubscribeRequest { filters, ..Default::default() };
        let failure = Follower::begin(address, first).await.failure().await;
        assert_eq!(failure.reason(), Reason::Invalid);
        assert!(failure.message.contains("cannot be filtered"), "{}", failure.message);
    })
    .await;
}

/// Bytes that are no request, as the first thing a follower says.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_message_that_cannot_be_read_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let mut client = tonic::client::Grpc::new(channel(address).await);
        client.ready().await.unwrap();
        // Text where a number is expected.
        let codec = quorate::testkit::proto::codec::BoundedCodec::<Filter, WalEntryProto>::default();
        let path = "/replication.ReplicationService/Subscribe".parse().unwrap();
        let garbage = Filter { tenant_id: "no number".to_owned(), collection: "nor this".to_owned() };
        let request = tonic::Request::new(tokio_stream::iter([garbage]));
        let mut answer = client.streaming(request, path, codec).await.unwrap().into_inner();
        let status = timeout(DEADLINE, answer.message()).await.unwrap().unwrap_err();
        assert_eq!(failure(&status).reason(), Reason::Invalid, "{status}");
        let (_, text) = http(address, "GET", "/metrics", "").await;
        let refused = "quorate_server_requests_total{method=\"subscribe\",outcome=\"invalid\"}";
        assert_eq!(metric(&text, refused), 1.0);
    })
    .await;
}
