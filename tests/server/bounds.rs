//! What callers do to a node that has no authentication yet, tried on real processes: whatever they make it hold is
//! bounded, others are served meanwhile, and afterwards it is as before.

mod by_hand;
mod node;

use std::io::Write;
use std::net::TcpStream as Socket;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use prost::Message;
use quorate::testkit::proto::v1::admin_client::AdminClient;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::tagged_request::Request;
use quorate::testkit::proto::v1::{
    DeleteRangeRequest, GetRequest, PipelineRequest, PipelineResponse, PutRequest, RangeRequest,
    StatusRequest, TaggedRequest, WatchRequest,
};
use tokio::time::timeout;
use tonic::Code;

use self::by_hand::{begin, call, message_of, raw, send_all};
use self::node::Node;
use crate::DEADLINE;

const MIB: u64 = 1024 * 1024;

/// What a web page can send to any address, without asking: a form over HTTP/1.1.
#[tokio::test(flavor = "multi_thread")]
async fn a_web_page_cannot_use_a_node() {
    let node = Node::start(&[], None);
    let mut kv = node.kv().await;
    kv.put(PutRequest { key: "k".into(), value: "v".into(), ..Default::default() }).await.unwrap();
    let term =
        AdminClient::new(node.channel().await).status(StatusRequest {}).await.unwrap().into_inner().term;
    let calls = [
        "/quorate.v1.Kv/Put",
        "/quorate.v1.Kv/DeleteRange",
        "/quorate.v1.Admin/RemoveMember",
        "/quorate.v1.Admin/TransferLeader",
        "/quorate.v1.Admin/Configure",
        "/replication/configure",
    ];
    let form = |path: &str, headers: &str, body: &str| {
        let length = body.len();
        node.ask(&format!(
            "POST {path} HTTP/1.1\r\n{headers}Connection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        ))
    };
    for path in calls {
        for (headers, expected) in [
            ("Host: evil.example\r\nContent-Type: text/plain\r\nOrigin: http://evil.example\r\n", 403),
            ("Host: 127.0.0.1\r\nContent-Type: text/plain\r\nOrigin: http://evil.example\r\n", 403),
            ("Host: 127.0.0.1\r\nContent-Type: text/plain\r\n", 415),
            ("Host: 127.0.0.1\r\n", 415),
            ("Host: rebound.example\r\nContent-Type: application/json\r\n", 403),
        ] {
            // An empty message: it would delete everything, or step down.
            let (code, _) = form(path, headers, "\0\0\0\0\0");
            assert_eq!(code, expected, "{path} {headers}");
        }
    }
    assert_eq!(
        node.ask("GET /metrics HTTP/1.1\r\nHost: rebound.example\r\nConnection: close\r\n\r\n").0,
        403
    );
    let host = "Host: 127.0.0.1\r\nContent-Type: application/json\r\n";
    assert_eq!(form("/replication/configure", host, "{\"snapshot_every_entries\": 7}").0, 200);
    assert!(
        kv.get(GetRequest { key: "k".into(), ..Default::default() })
            .await
            .unwrap()
            .into_inner()
            .item
            .is_some()
    );
    let now =
        AdminClient::new(node.channel().await).status(StatusRequest {}).await.unwrap().into_inner().term;
    assert_eq!(now, term);
    node.serves_others().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_that_are_not_read_cost_little() {
    const WATCHES: usize = 300;
    let node = Node::start(&[], None);
    let before = node.memory("VmRSS");
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut sender = raw(node.client).await;
        for _ in 0..WATCHES {
            held.push(begin(&mut sender, "/quorate.v1.Kv/Watch", &WatchRequest::default(), true).await);
        }
    }
    node.put_large(12).await;
    node.metric_reaches("quorate_server_unsent_bytes", |bytes| bytes > 16 * MIB).await;
    node.serves_others().await;
    let unsent = node.metric("quorate_server_unsent_bytes");
    assert!(unsent <= 2 * (32 + 4) * MIB, "{unsent}");
    let grown = node.memory("VmHWM").saturating_sub(before);
    assert!(grown < 450 * MIB, "{} MiB for 600 watches", grown / MIB);
    drop(held);
    node.metric_reaches("quorate_server_unsent_bytes", |bytes| bytes == 0).await;
    node.metric_reaches("quorate_server_watches_open", |watches| watches == 0).await;
    node.serves_others().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_never_end_cost_little() {
    const STREAMS: usize = 300;
    const SENT: usize = 512 * 1024;
    let node = Node::start(&[], None);
    let before = node.memory("VmRSS");
    let mut sender = raw(node.client).await;
    // A message of nearly 8 MiB is announced, and part of it comes.
    let length = u32::try_from(8 * MIB - 5 * 1024).unwrap().to_be_bytes();
    let beginning = Bytes::from([&[0][..], &length, &vec![7; SENT]].concat());
    let (mut answers, mut streams) = (Vec::new(), Vec::new());
    for _ in 0..STREAMS {
        sender = sender.ready().await.unwrap();
        let (answer, mut stream) = sender.send_request(call("/quorate.v1.Kv/Put"), false).unwrap();
        stream.send_data(beginning.clone(), false).unwrap();
        answers.push(answer);
        streams.push(stream);
    }
    // Eight such messages are what one connection may have under way. The others are refused.
    let mut answers: FuturesUnordered<_> = answers.into_iter().collect();
    for _ in 0..STREAMS / 2 {
        let answer = timeout(DEADLINE, answers.next()).await.expect("some are refused").unwrap().unwrap();
        assert_eq!(answer.headers()["grpc-status"], "8", "RESOURCE_EXHAUSTED");
    }
    assert!(node.metric("quorate_server_unfinished_bytes") <= 64 * MIB);
    node.serves_others().await;
    let grown = node.memory("VmHWM").saturating_sub(before);
    assert!(grown < 250 * MIB, "{} MiB", grown / MIB);
    drop((streams, sender));
    node.metric_reaches("quorate_server_unfinished_bytes", |bytes| bytes == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_on_the_peer_port_says_little() {
    const CONNECTIONS: usize = 40;
    let node = Node::start(&[], None);
    let before = node.memory("VmRSS");
    let length = u32::try_from(60 * MIB).unwrap().to_be_bytes();
    let beginning = Bytes::from([&[0][..], &length, &vec![7; MIB as usize]].concat());
    for _ in 0..CONNECTIONS {
        let mut sender = raw(node.peer).await.ready().await.unwrap();
        let (answer, mut stream) =
            sender.send_request(call("/quorate.peer.v1.Peer/Exchange"), false).unwrap();
        stream.send_data(beginning.clone(), false).unwrap();
        let ended = timeout(DEADLINE, answer).await.expect("the connection is not closed");
        assert!(ended.is_err() || ended.unwrap().headers().contains_key("grpc-status"));
    }
    let grown = node.memory("VmHWM").saturating_sub(before);
    assert!(grown < 60 * MIB, "{} MiB", grown / MIB);
    node.serves_others().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_give_way_and_busy_ones_leave_places_for_probes() {
    // Few files: more silent connections than the process could open.
    let node = Node::start(&[], Some(64));
    let mut silent = Vec::new();
    for number in 0..100 {
        // Some say nothing, others begin to speak HTTP/2, or half a request.
        match number % 3 {
            0 => silent.push((None, Some(Socket::connect(node.client).unwrap()))),
            1 => {
                let mut socket = Socket::connect(node.client).unwrap();
                socket.write_all(b"GET /livez HTTP/1.1\r\nHost: local").unwrap();
                silent.push((None, Some(socket)));
            }
            _ => silent.push((Some(timeout(DEADLINE, raw(node.client)).await.unwrap()), None)),
        }
    }
    node.serves_others().await;
    assert!(node.metric("quorate_server_connections_evicted_total") >= 50);
    drop(silent);
    drop(node);

    // All places taken by connections on which something is under way.
    let node = Node::start(&["--max-connections", "3"], None);
    let mut busy = Vec::new();
    for _ in 0..3 {
        let mut kv = node.kv().await;
        busy.push((kv.watch(WatchRequest::default()).await.unwrap(), kv));
    }
    assert_eq!(node.page("/livez").0, 200);
    assert_eq!(node.page("/readyz").0, 200);
    let channel = node.channel().await;
    AdminClient::new(channel.clone()).status(StatusRequest {}).await.unwrap();
    let get = || GetRequest { key: "k".into(), ..Default::default() };
    let refused = KvClient::new(channel.clone()).get(get()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("max_connections"), "{refused}");
    busy.pop();
    let served = async {
        while KvClient::new(channel.clone()).get(get()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, served).await.expect("the place that became free is given");
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelines_that_are_not_read_cost_little() {
    const PIPELINES: usize = 8;
    const READS: u64 = 1_000;
    let node = Node::start(&[], None);
    node.put_large(4).await;
    let before = node.memory("VmRSS");
    let mut held = Vec::new();
    for _ in 0..PIPELINES {
        let get = |tag: u64| {
            let request = GetRequest { key: format!("k{}", tag % 4).into(), ..Default::default() };
            TaggedRequest { tag, request: Some(Request::Get(request)) }
        };
        let message = PipelineRequest { requests: (0..READS).map(get).collect() };
        // Not by tonic: it keeps a call, and its connection, as long as more requests may come, also when nobody
        // waits for answers any more.
        held.push(begin(&mut raw(node.client).await, "/quorate.v1.Kv/Pipeline", &message, false).await);
    }
    node.metric_reaches("quorate_server_pipeline_queued_bytes", |bytes| bytes > 100 * MIB).await;
    node.serves_others().await;
    let queued = node.metric("quorate_server_pipeline_queued_bytes");
    assert!(queued <= (256 + PIPELINES as u64) * MIB, "{queued}");
    let grown = node.memory("VmHWM").saturating_sub(before);
    assert!(grown < 300 * MIB, "{} MiB", grown / MIB);
    // One that is read after all is answered in full.
    let (mut answered, mut first) = (0, held.swap_remove(0));
    let mut arrived = BytesMut::new();
    while answered < READS {
        let bytes = timeout(DEADLINE, first.0.data()).await.unwrap().unwrap().unwrap();
        first.0.flow_control().release_capacity(bytes.len()).unwrap();
        arrived.extend_from_slice(&bytes);
        while let Some(message) = message_of(&mut arrived) {
            answered += PipelineResponse::decode(message).unwrap().responses.len() as u64;
        }
    }
    drop((held, first));
    node.metric_reaches("quorate_server_pipeline_queued_bytes", |bytes| bytes == 0).await;
    node.serves_others().await;
}

/// However little room the others leave: writes go on, and reads as soon as those that take nothing have lost their pipelines.
#[tokio::test(flavor = "multi_thread")]
async fn many_unread_pipelines_of_one_connection_hold_up_no_other() {
    const PIPELINES: usize = 160;
    const RANGES: u64 = 40;
    let node = Node::start(&[], None);
    node.put_large(3).await;
    let range = |tag: u64| TaggedRequest { tag, request: Some(Request::Range(RangeRequest::default())) };
    let message = PipelineRequest { requests: (0..RANGES).map(range).collect() };
    let mut held = Vec::new();
    let mut sender = raw(node.client).await;
    for _ in 0..PIPELINES {
        held.push(begin(&mut sender, "/quorate.v1.Kv/Pipeline", &message, false).await);
    }
    let client = quorate::kv::client::Client::new([node.client.to_string()], Default::default()).unwrap();
    let scope = Default::default();
    let served = async {
        for number in 0..200 {
            client.put(&scope, format!("other{number}"), "v").await.unwrap();
            client.get(&scope, "k0", quorate::ReadLevel::Linearizable).await.unwrap();
        }
    };
    // What is not read at all is let go of after a second; what a client lets its operations take is ten.
    timeout(DEADLINE, served).await.expect("others are not served");
    let bound = 2 * 256 * MIB + 16 * MIB;
    let queued = node.metric("quorate_server_pipeline_queued_bytes");
    assert!(queued <= bound, "{queued}");
    drop((held, sender));
    node.metric_reaches("quorate_server_pipeline_queued_bytes", |bytes| bytes == 0).await;
    node.serves_others().await;
}

/// A request is a slice of its message, which may be much larger than it: what waits must not keep that alive.
#[tokio::test(flavor = "multi_thread")]
async fn small_reads_in_large_messages_cost_little() {
    const MESSAGES: usize = 60;
    let node = Node::start(&[], None);
    node.put_large(1).await;
    let get = || GetRequest { key: "k0".into(), ..Default::default() };
    let on_kv =
        PipelineRequest { requests: vec![TaggedRequest { tag: 1, request: Some(Request::Get(get())) }] };
    let payload = quorate::testkit::proto::v1::call::Content::Payload(get().encode_to_vec().into());
    let call = quorate::testkit::proto::v1::Call {
        method: "get".to_owned(),
        content: Some(payload),
        ..Default::default()
    };
    let on_any = quorate::testkit::proto::v1::PipelineCalls { calls: vec![call] };
    for (path, message) in [
        ("/quorate.v1.Kv/Pipeline", on_kv.encode_to_vec()),
        ("/quorate.v1.Pipeline/Run", on_any.encode_to_vec()),
    ] {
        let before = node.memory("VmRSS");
        let mut padded = message;
        // A field that nobody knows, of almost 8 MiB.
        let room = 8 * MIB as usize - padded.len() - 64;
        prost::encoding::encode_key(1000, prost::encoding::WireType::LengthDelimited, &mut padded);
        prost::encoding::encode_varint(room as u64, &mut padded);
        padded.extend(std::iter::repeat_n(0, room));
        let framed = [&[0][..], &u32::try_from(padded.len()).unwrap().to_be_bytes(), &padded].concat();
        let mut sender = raw(node.client).await.ready().await.unwrap();
        let (answer, mut stream) = sender.send_request(self::call(path), false).unwrap();
        let answered = timeout(DEADLINE, answer).await.unwrap().unwrap().into_body();
        for _ in 0..MESSAGES {
            send_all(&mut stream, framed.clone().into()).await;
        }
        let unread = "quorate_server_pipeline_queued_bytes";
        node.metric_reaches(unread, |bytes| bytes > (MESSAGES as u64 - 8) * MIB / 2).await;
        let grown = node.memory("VmRSS").saturating_sub(before);
        assert!(grown < 120 * MIB, "{path}: {} MiB", grown / MIB);
        drop((answered, stream, sender));
        node.metric_reaches(unread, |bytes| bytes == 0).await;
    }
    node.serves_others().await;
}

/// Each would keep alive a whole state of its own.
#[tokio::test(flavor = "multi_thread")]
async fn long_ranges_that_are_not_read_do_not_fill_the_memory() {
    const STATE: usize = 32;
    const RANGES: usize = 5;
    let memory = 400 * MIB;
    let node = Node::start(&["--memory-bytes", &memory.to_string()], None);
    // What the log and the history take is there before.
    for _ in 0..4 {
        node.put_large(STATE).await;
    }
    let before = node.memory("VmRSS");
    let mut sender = raw(node.client).await;
    let mut unread = Vec::new();
    for _ in 0..RANGES {
        let request = RangeRequest::default();
        unread.push(begin(&mut sender, "/quorate.v1.Kv/RangeStream", &request, true).await);
        node.put_large(STATE).await;
        assert!(node.metric("quorate_server_long_ranges_pinned_bytes") < memory / 16 + 16 * MIB);
    }
    node.metric_reaches("quorate_server_long_ranges_open", |open| open == 0).await;
    let grown = node.memory("VmRSS").saturating_sub(before);
    assert!(grown < 3 * STATE as u64 * MIB, "{} MiB", grown / MIB);
    // One that reads is told, and the next has all.
    let mut kv = node.kv().await.max_decoding_message_size(4 * MIB as usize);
    let mut pages = kv.range_stream(RangeRequest::default()).await.unwrap().into_inner();
    timeout(DEADLINE, pages.message()).await.unwrap().unwrap().unwrap();
    node.put_large(STATE).await;
    let ended = loop {
        match timeout(DEADLINE, pages.message()).await.unwrap() {
            Ok(page) => drop(page.expect("it is not complete")),
            Err(ended) => break ended,
        }
    };
    assert_eq!(ended.code(), Code::OutOfRange, "{ended}");
    assert!(ended.message().contains("memory_bytes"), "{ended}");
    let mut pages = kv.range_stream(RangeRequest::default()).await.unwrap().into_inner();
    let mut items = 0;
    while let Some(page) = timeout(DEADLINE, pages.message()).await.unwrap().unwrap() {
        items += page.items.len();
    }
    assert_eq!(items, STATE);
    node.serves_others().await;
}

/// What stock clients refuse to receive they would refuse for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_command_is_watched_in_messages_of_ordinary_size() {
    const KEYS: u64 = 10_000;
    let node = Node::start(&[], None);
    let mut kv = node.kv().await;
    let put = |tag: u64| {
        let put = PutRequest { key: format!("{tag:0492}").into(), ..Default::default() };
        TaggedRequest { tag, request: Some(Request::Put(put)) }
    };
    let messages = (0..KEYS)
        .step_by(1_000)
        .map(|first| PipelineRequest { requests: (first..first + 1_000).map(put).collect() });
    let mut answers =
        kv.pipeline(tokio_stream::iter(messages.collect::<Vec<_>>())).await.unwrap().into_inner();
    while timeout(DEADLINE, answers.message()).await.unwrap().unwrap().is_some() {}
    let mut watch = kv.watch(WatchRequest::default()).await.unwrap().into_inner();
    let deleted = kv.delete_range(DeleteRangeRequest::default()).await.unwrap().into_inner();
    assert_eq!(deleted.deleted, KEYS);
    let (mut events, mut next) = (0, 0);
    let revision = deleted.header.unwrap().position.unwrap().index;
    while next <= revision {
        let message = timeout(DEADLINE, watch.message()).await.unwrap().unwrap().unwrap();
        next = message.next_revision;
        events += message.events.len() as u64;
    }
    assert_eq!(events, KEYS);
}

#[tokio::test(flavor = "multi_thread")]
async fn how_far_back_can_be_watched_is_a_setting_and_shows() {
    let node = Node::start(&["--event-log-bytes", "4194304"], None);
    // More than memory holds, and several files of the event log.
    node.put_large(60).await;
    node.metric_reaches("quorate_feed_first_position", |first| first > 1).await;
    assert!(node.metric("quorate_event_log_bytes") < 60 * MIB);
    assert!(node.metric("quorate_event_log_operations") < 60);
    assert_eq!(node.metric("quorate_event_log_failing"), 0);
    let first = node.metric("quorate_feed_first_position");
    let (_, status) = node.page("/replication/status");
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert!(status["feed"]["first_position"].as_u64().unwrap() >= first);
    assert!(status["feed"]["next_position"].as_u64().unwrap() > 60);
    let mut kv = node.kv().await;
    let mut watch = async |from_revision| {
        let request = WatchRequest { from_revision, ..Default::default() };
        let mut watch = kv.watch(request).await.unwrap().into_inner();
        timeout(DEADLINE, watch.message()).await.unwrap()
    };
    assert_eq!(watch(first - 1).await.unwrap_err().code(), Code::OutOfRange);
    // The event log may still be purged.
    let message = loop {
        match watch(node.metric("quorate_feed_first_position")).await {
            Ok(message) => break message.unwrap(),
            Err(status) => assert_eq!(status.code(), Code::OutOfRange),
        }
    };
    assert!(!message.events.is_empty());
}
