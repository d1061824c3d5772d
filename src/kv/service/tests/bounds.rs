//! What callers may make the node hold, and the size of what it sends.

use super::*;
use prost::Message as _;

use crate::door::Answerer;
use crate::door::limits::Bound;
use crate::incoming::Places;

const MIB: usize = 1024 * 1024;

impl Port {
    /// A client as it is by default: it accepts messages of 4 MiB.
    async fn stock(&self) -> KvClient<Channel> {
        KvClient::new(self.channel().await)
    }

    async fn metric(&self, name: &str) -> usize {
        let (_, text) = self.http("/metrics").await;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("there is no {name} in\n{text}"))
    }
}

impl FakeNode {
    /// Applies `command` without telling anybody.
    fn apply(&self, command: KvCommand) -> u64 {
        self.inner.lock().unwrap().apply(command).0.index
    }

    pub(super) fn put(&self, key: &str, bytes: usize) -> u64 {
        let (tenant, collection) = ("default".to_owned(), "default".to_owned());
        self.apply(KvCommand::Put {
            tenant,
            collection,
            key: key.to_owned().into(),
            value: vec![1; bytes].into(),
        })
    }
}

pub(super) fn refusal(status: &tonic::Status) -> (Code, Reason) {
    let failure = crate::proto::details::failure(status.details()).unwrap();
    (status.code(), failure.reason())
}

#[tokio::test]
async fn a_command_that_changes_much_is_told_in_messages_that_stock_clients_accept() {
    const KEYS: usize = 10_000;
    let port = Port::open().await;
    for number in 0..KEYS {
        port.node.put(&format!("{number:0492}"), 1);
    }
    let before = port.node.put("zzz", 1);
    let (tenant, collection) = ("default".to_owned(), "default".to_owned());
    let (start, end) = ("0".into(), "a".into());
    let deleted = port.node.apply(KvCommand::DeleteRange { tenant, collection, start, end, limit: 0 });
    port.node.put("zzz", 1);
    let mut kv = port.stock().await;
    let request = v1::WatchRequest { from_revision: before, ..Default::default() };
    let mut watch = kv.watch(request.clone()).await.unwrap().into_inner();
    let (mut keys, mut next, mut pieces) = (Vec::new(), before, 0);
    while next <= deleted {
        let message = within(watch.message()).await.unwrap().unwrap();
        assert!(message.encoded_len() <= 2 * MIB, "{}", message.encoded_len());
        assert!(message.next_revision >= next, "a watch does not go back");
        assert_eq!(
            message.more,
            message.next_revision == deleted && message.events.last().is_some_and(|e| e.revision == deleted)
        );
        next = message.next_revision;
        pieces += usize::from(message.more);
        keys.extend(
            message.events.iter().filter(|e| e.revision == deleted).map(|e| e.item.clone().unwrap().key),
        );
    }
    assert!(pieces >= 4, "{pieces}");
    assert!(keys.len() == KEYS && keys.is_sorted());
}

#[tokio::test]
async fn no_answer_exceeds_what_stock_clients_accept() {
    let port = Port::open().await;
    for number in 0..2_000 {
        // Long keys, so that what is said beside the values weighs as much as it can.
        port.node.put(&format!("a{number:04000}"), 0);
    }
    for number in 0..20 {
        port.node.put(&format!("b{number}"), MIB - 1);
    }
    let mut kv = port.stock().await;
    for start in ["", "b"] {
        let request = v1::RangeRequest { start: start.into(), ..Default::default() };
        let found = kv.range(request.clone()).await.unwrap().into_inner();
        assert!(found.encoded_len() <= MAX_ANSWER_BYTES && !found.next.is_empty());
        assert!(found.encoded_len() > 2 * MIB);
        let mut pages = kv.range_stream(request).await.unwrap().into_inner();
        while let Some(page) = within(pages.message()).await.unwrap() {
            assert!(page.encoded_len() <= 2 * MIB);
        }
    }
    let (requests, outgoing) = mpsc::unbounded_channel();
    let responses = kv.pipeline(UnboundedReceiverStream::new(outgoing)).await.unwrap().into_inner();
    let mut pipeline = Pipelining { requests, responses };
    let asked = |tag: u64| match tag % 3 {
        0 => get("b0"),
        1 => range(),
        _ => Ask::Range(v1::RangeRequest { start: "b".into(), ..Default::default() }),
    };
    pipeline.send((0..60).map(|tag| (tag, Some(asked(tag)))));
    assert_eq!(pipeline.answers(60).await.len(), 60);
}

#[tokio::test]
async fn watches_are_bounded_by_connection_and_in_all() {
    let limits = DoorLimits { watches: Bound { each: 2, all: 3 }, ..DoorLimits::default() };
    let port = Port::open_with(DEADLINE, limits).await;
    let (mut first, mut second) = (port.kv().await, port.kv().await);
    let watch = async |kv: &mut KvClient<Channel>| kv.watch(v1::WatchRequest::default()).await;
    let held = (watch(&mut first).await.unwrap(), watch(&mut first).await.unwrap());
    let refused = watch(&mut first).await.unwrap_err();
    assert_eq!(refusal(&refused), (Code::ResourceExhausted, Reason::LimitReached));
    assert!(refused.message().contains("max_connection_watches"), "{refused}");
    let _third = watch(&mut second).await.unwrap();
    assert_eq!(refusal(&watch(&mut second).await.unwrap_err()).1, Reason::LimitReached);
    port.http_shows("/metrics", r#"requests_total{method="watch",outcome="limit_reached"} 2"#).await;
    drop(held);
    port.http_shows("/metrics", "quorate_server_watches_open 1\n").await;
    watch(&mut second).await.unwrap();
}

#[tokio::test]
async fn one_connection_does_not_take_all_long_ranges() {
    let port = Port::open().await;
    let mut other = port.kv().await;
    // So large that a range which nobody reads is not over.
    put_large(&mut other, 24).await;
    let mut kv = port.kv().await;
    let mut held = Vec::new();
    let refused = loop {
        match kv.range_stream(v1::RangeRequest::default()).await {
            Ok(range) => held.push(range),
            Err(refused) => break refused,
        }
    };
    assert_eq!(held.len(), ranges::MAX_CONNECTION_LONG_RANGES);
    assert_eq!(refusal(&refused), (Code::ResourceExhausted, Reason::LimitReached));
    let mut pages = other.range_stream(v1::RangeRequest::default()).await.unwrap().into_inner();
    while within(pages.message()).await.unwrap().is_some() {}
    drop(held);
    port.http_shows("/metrics", "quorate_server_long_ranges_open 0\n").await;
    kv.range_stream(v1::RangeRequest::default()).await.unwrap();
}

#[tokio::test]
async fn a_range_that_is_not_read_ends_when_it_keeps_too_much() {
    const PUTS: usize = 24;
    let port = Port::open().await;
    let (mut kv, mut other) = (port.kv().await, port.kv().await);
    // So large that a range which nobody reads is not over.
    put_large(&mut other, PUTS).await;
    let mut pages = kv.range_stream(v1::RangeRequest::default()).await.unwrap().into_inner();
    let first = within(pages.message()).await.unwrap().unwrap();
    let at = first.header.unwrap().position;
    let replaced = |command_bytes| port.node.progress.send_modify(|now| now.command_bytes = command_bytes);
    replaced(PINNED_BYTES);
    let most = format!("quorate_server_long_ranges_pinned_bytes {PINNED_BYTES}\n");
    port.http_shows("/metrics", &most).await;
    port.http_shows("/metrics", "quorate_server_long_ranges_open 1\n").await;
    replaced(PINNED_BYTES + 1);
    port.http_shows("/metrics", "quorate_server_long_ranges_open 0\n").await;
    port.http_shows("/metrics", "quorate_server_long_ranges_pinned_bytes 0\n").await;
    // What was sent before is there, then the reader is told.
    let mut read = first.items.len();
    let ended = loop {
        match within(pages.message()).await {
            Ok(page) => read += page.expect("it is not complete").items.len(),
            Err(ended) => break ended,
        }
    };
    assert!(read < PUTS, "{read}");
    assert_eq!(refusal(&ended).1, Reason::Compacted);
    assert!(ended.message().contains("memory_bytes"), "{ended}");
    let gone = other.range_stream(v1::RangeRequest { at, ..Default::default() }).await.unwrap_err();
    assert_eq!(refusal(&gone).1, Reason::Compacted);
    // Others begin anew, and are counted from there.
    let mut pages = other.range_stream(v1::RangeRequest::default()).await.unwrap().into_inner();
    while within(pages.message()).await.unwrap().is_some() {}
}

#[tokio::test]
async fn watches_that_are_not_read_hold_little_and_go_on_where_they_were() {
    const WATCHES: usize = 24;
    // As many as memory holds: this node has no event log.
    const PUTS: usize = 7;
    let bound = Bound { each: 8 * MIB, all: 16 * MIB };
    let limits = DoorLimits { unsent_bytes: bound, ..DoorLimits::default() };
    let port = Port::open_with(DEADLINE, limits).await;
    let (mut kv, mut other) = (port.kv().await, port.kv().await);
    let mut watches = Vec::new();
    for _ in 0..WATCHES {
        let request = v1::WatchRequest { from_revision: 1, ..Default::default() };
        watches.push(kv.watch(request).await.unwrap().into_inner());
    }
    put_large(&mut other, PUTS).await;
    port.node.state.send_modify(|state| state.last_log = Some(PUTS as u64));
    within(async {
        while port.metric("quorate_server_unsent_bytes").await < bound.each / 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert!(port.metric("quorate_server_unsent_bytes").await <= bound.each + 2 * MIB);
    // Others are served.
    let found = within(other.get(v1::GetRequest { key: "k0".into(), ..Default::default() })).await.unwrap();
    assert_eq!(found.into_inner().item.unwrap().value.len(), MIB);
    // Whoever goes leaves nothing behind, and whoever reads again misses nothing. All of one connection read: those that
    // do not would hold up the others, for they share its window.
    watches.truncate(WATCHES / 2);
    let reading = watches.into_iter().map(async |mut watch| {
        let mut revisions = Vec::new();
        while revisions.len() < PUTS {
            let message = watch.message().await.unwrap().unwrap();
            revisions.extend(message.events.iter().map(|event| event.revision));
        }
        assert!(revisions.into_iter().eq(1..=PUTS as u64));
    });
    within(futures::future::join_all(reading)).await;
    drop(kv);
    port.http_shows("/metrics", "quorate_server_unsent_bytes 0\n").await;
    port.http_shows("/metrics", "quorate_server_watches_open 0\n").await;
}

async fn put_large(kv: &mut KvClient<Channel>, count: usize) {
    for number in 0..count {
        let (key, value) = (format!("k{number}").into(), vec![0; MIB].into());
        kv.put(v1::PutRequest { key, value, ..Default::default() }).await.unwrap();
    }
}

#[tokio::test]
async fn what_waits_on_pipelines_that_are_not_read_is_bounded_within_a_message_too() {
    const READS: u64 = 500;
    let bound = Bound { each: 16 * MIB, all: 40 * MIB };
    let limits = DoorLimits { queued_bytes: bound, ..DoorLimits::default() };
    let port = Port::open_with(DEADLINE, limits).await;
    put_large(&mut port.kv().await, 3).await;
    let operation = |operation| v1::TxnOperation { operation: Some(operation), ..Default::default() };
    let reading = v1::TxnRequest {
        success: vec![operation(v1::txn_operation::Operation::Get(v1::TxnGet { key: "k0".into() }))],
        ..Default::default()
    };
    let mut pipelines = Vec::new();
    for _ in 0..6 {
        let pipeline = port.pipeline().await;
        let ask = |tag: u64| match tag % 3 {
            0 => get("k1"),
            1 => range(),
            _ => Ask::Txn(reading.clone()),
        };
        pipeline.send((0..READS).map(|tag| (tag, Some(ask(tag)))));
        pipelines.push(pipeline);
    }
    let mut most = 0;
    within(async {
        // Each has read its message, and answered as much as fits.
        for _ in 0..100 {
            most = most.max(port.metric("quorate_server_pipeline_queued_bytes").await);
        }
    })
    .await;
    assert!(most > bound.each, "{most}");
    assert!(most <= bound.all + 6 * 5 * MIB, "{most}");
    let mut first = pipelines.swap_remove(0);
    assert_eq!(first.answers(READS as usize).await.len() as u64, READS, "what found no room is read again");
    drop(pipelines);
    port.http_shows("/metrics", "quorate_server_pipeline_queued_bytes 0\n").await;
}

#[tokio::test]
async fn a_watch_from_now_on_begins_at_the_clusters_present_and_progress_reaches_it() {
    let port = Port::open().await;
    port.node.put("long past", 1);
    // The node has applied one entry; the leader knows of 41, the last of which are no commands.
    port.node.inner.lock().unwrap().present = Some(41);
    let mut kv = port.stock().await;
    let mut watch = kv.watch(v1::WatchRequest::default()).await.unwrap().into_inner();
    let first = within(watch.message()).await.unwrap().unwrap();
    assert_eq!((first.events.len(), first.next_revision), (0, 42));
    port.node.inner.lock().unwrap().reach(41);
    port.node.put("new", 1);
    port.node.state.send_modify(|state| state.last_log = Some(42));
    let second = within(watch.message()).await.unwrap().unwrap();
    assert_eq!((second.events.len(), second.next_revision), (1, 43));

    // A new leader's first entry is no command; it counts all the same.
    port.node.inner.lock().unwrap().reach(50);
    let request = v1::WatchRequest { from_revision: 43, ..Default::default() };
    let mut watch = kv.watch(request).await.unwrap().into_inner();
    assert_eq!(within(watch.message()).await.unwrap().unwrap().next_revision, 51);
}

#[tokio::test]
async fn metrics_come_in_the_format_that_is_asked_for() {
    let port = Port::open().await;
    for (accept, content_type, ends) in [
        ("*/*", "text/plain; version=0.0.4; charset=utf-8", false),
        ("text/plain;version=0.0.4", "text/plain; version=0.0.4; charset=utf-8", false),
        (
            "application/openmetrics-text;version=1.0.0",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            true,
        ),
    ] {
        let (code, head, body) = port
            .send(&format!(
                "GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
            ))
            .await;
        assert_eq!(code, 200);
        assert!(head.contains(&format!("content-type: {content_type}")), "{head}");
        assert_eq!(body.ends_with("# EOF\n"), ends);
        assert_eq!(body.contains("# TYPE quorate_server_requests_total counter"), !ends);
        assert!(body.contains("\nquorate_server_requests_total{method=\"put\",outcome=\"ok\"} 0\n"));
        assert_eq!(body.contains("# UNIT"), ends);
    }
}

#[tokio::test]
async fn what_a_page_could_send_unasked_changes_nothing() {
    let port = Port::open().await;
    let put = v1::PutRequest { key: "k".into(), value: "v".into(), ..Default::default() }.encode_to_vec();
    let body = [&[0, 0, 0, 0, u8::try_from(put.len()).unwrap()][..], &put].concat();
    for (path, headers, expected) in [
        (
            "/quorate.v1.Kv/Put",
            "Host: localhost\r\nContent-Type: text/plain\r\nOrigin: http://evil.example",
            403,
        ),
        ("/quorate.v1.Kv/Put", "Host: localhost\r\nContent-Type: text/plain", 415),
        ("/quorate.v1.Kv/Put", "Host: localhost\r\nContent-Type: application/grpc", 505),
        ("/quorate.v1.Kv/Put", "Host: evil.example\r\nContent-Type: application/grpc", 403),
        ("/replication/configure", "Host: localhost\r\nContent-Type: text/plain", 415),
        ("/replication/configure", "Host: localhost\r\nContent-Type: application/json\r\nOrigin: null", 403),
    ] {
        let mut request = format!(
            "POST {path} HTTP/1.1\r\n{headers}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(&body);
        let (code, _, answer) = port.send_bytes(&request).await;
        assert_eq!(code, expected, "{headers}: {answer}");
        assert!(answer.contains("\"hint\""), "{answer}");
    }
    assert_eq!(*port.node.proposed.borrow(), 0);
    // A stranger's name for the node, by gRPC: a status that its client understands.
    let endpoint = Channel::from_shared(format!("http://{}", port.address)).unwrap();
    let channel = endpoint.origin("http://evil.example".parse().unwrap()).connect().await.unwrap();
    let refused = KvClient::new(channel).get(v1::GetRequest::default()).await.unwrap_err();
    assert_eq!(refusal(&refused), (Code::PermissionDenied, Reason::Invalid), "{refused}");
}

/// A client of which nothing is known but that it is there: it announces room for so many bytes of each answer.
async fn raw(port: &Port, window: u32) -> h2::client::SendRequest<bytes::Bytes> {
    let socket = TcpStream::connect(port.address).await.unwrap();
    let builder = h2::client::Builder::new().initial_window_size(window).handshake(socket);
    let (sender, connection) = builder.await.unwrap();
    runtime::spawn(async move {
        // It ends when either side closes it.
        let _ = connection.await;
    });
    sender
}

fn call(path: &str) -> axum::http::Request<()> {
    let request = axum::http::Request::post(format!("http://localhost{path}"));
    request.header("content-type", "application/grpc").header("te", "trailers").body(()).unwrap()
}

fn framed(message: &impl prost::Message) -> bytes::Bytes {
    let length = u32::try_from(message.encoded_len()).unwrap().to_be_bytes();
    [&[0][..], &length, &message.encode_to_vec()].concat().into()
}

#[tokio::test]
async fn answers_to_single_calls_that_are_not_read_are_bounded_too() {
    const CALLS: usize = 100;
    let bound = Bound { each: 8 * MIB, all: 16 * MIB };
    let limits = DoorLimits { unsent_bytes: bound, ..DoorLimits::default() };
    let port = Port::open_with(DEADLINE, limits).await;
    let mut other = port.kv().await;
    put_large(&mut other, 4).await;
    let mut sender = raw(&port, 0).await;
    let mut answers = futures::stream::FuturesUnordered::new();
    for _ in 0..CALLS {
        sender = sender.ready().await.unwrap();
        let (answer, mut stream) = sender.send_request(call("/quorate.v1.Kv/Range"), false).unwrap();
        stream.send_data(framed(&v1::RangeRequest::default()), true).unwrap();
        answers.push(answer);
    }
    within(async {
        while port.metric("quorate_server_unsent_bytes").await < bound.each {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    // Those that found no room wait, and have not been answered.
    for _ in 0..20 {
        port.http("/livez").await;
    }
    assert!(port.metric("quorate_server_unsent_bytes").await <= bound.each + 2 * MAX_ANSWER_BYTES);
    let mut begun = Vec::new();
    while let Some(Some(answer)) = futures::FutureExt::now_or_never(answers.next()) {
        begun.push(answer.unwrap());
    }
    assert!((1..8).contains(&begun.len()), "{}", begun.len());
    let get = v1::GetRequest { key: "k0".into(), ..Default::default() };
    within(other.get(get)).await.unwrap();
    // Whoever is let go of makes room for the others.
    drop(begun);
    begun = vec![within(answers.next()).await.unwrap().unwrap()];
    drop((begun, answers, sender));
    port.http_shows("/metrics", "quorate_server_unsent_bytes 0\n").await;
}

#[tokio::test]
async fn pages_that_are_not_read_are_bounded_and_others_get_theirs() {
    const CALLS: usize = 200;
    let bound = Bound { each: 256 * 1024, all: 512 * 1024 };
    let limits = DoorLimits { unsent_bytes: bound, ..DoorLimits::default() };
    let port = Port::open_with(DEADLINE, limits).await;
    port.http_shows("/readyz", "ok").await;
    let mut refused = 0;
    let mut held = Vec::new();
    for number in 0..3 {
        let mut sender = raw(&port, 0).await;
        for _ in 0..CALLS {
            // It may have been closed: it takes nothing while others ask for pages.
            let Ok(ready) = within(sender.clone().ready()).await else { break };
            sender = ready;
            let page = axum::http::Request::get("http://localhost/metrics").body(()).unwrap();
            let (answer, _) = sender.send_request(page, true).unwrap();
            match within(answer).await {
                Ok(answer) if answer.status() == 429 => refused += 1,
                Ok(answer) => held.push((answer, sender.clone())),
                Err(_) => break,
            }
        }
        if number == 0 {
            // Operators' calls are bounded like pages.
            sender = within(sender.clone().ready()).await.unwrap();
            let (answer, mut stream) =
                sender.send_request(call("/quorate.v1.Admin/ListSessions"), false).unwrap();
            stream.send_data(framed(&v1::ListSessionsRequest::default()), true).unwrap();
            let answer = within(answer).await.unwrap();
            assert_eq!(answer.headers()["grpc-status"], "8", "RESOURCE_EXHAUSTED");
        }
    }
    assert!(refused > CALLS, "{refused}");
    // Each has a page, and refusals, beyond its bound. All pages would be ten times as much.
    assert!(port.metric("quorate_server_unsent_bytes").await <= 6 * bound.each);
    assert_eq!(port.http("/livez").await.0, 200);
    drop(held);
    port.http_shows("/metrics", "quorate_server_unsent_bytes 0\n").await;
}

/// A watch is asked for its next message when its client has room for one, and that may never come to pass.
#[tokio::test(start_paused = true)]
async fn a_watch_whose_client_stops_in_the_middle_of_something_holds_up_no_other() {
    let node = FakeNode::new();
    node.put("k", 1);
    let (metrics, _) = metrics();
    let caller = Places::new(8, 0).admit(None).await;
    let dispatching = (Dispatch::default(), AskedWatches::default().of(&"somebody".into()));
    let (_drain, draining) = watch::channel(false);
    let watch = async || {
        let call = StreamCall::new(metrics.clone(), MethodId(WATCH), &Gauge::default());
        let place = crate::door::streams::WatchPlace::take(&caller, DoorLimits::default().watches);
        let by = Answerer::of(&node);
        let request = v1::WatchRequest { from_revision: 1, ..Default::default() };
        watches::watch(node.clone(), by, draining.clone(), dispatching.clone(), request, place, call)
            .await
            .unwrap()
    };
    let (mut stopped, mut other) = (watch().await, watch().await);
    for watch in [&mut stopped, &mut other] {
        assert_eq!(within(watch.next()).await.unwrap().unwrap().events.len(), 1);
    }
    for revision in 2..5 {
        // No longer than two states are apart.
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(node.put("k", 1), revision);
        node.state.send_modify(|state| state.last_log = Some(revision));
        let mut begun = std::pin::pin!(stopped.next());
        assert!(futures::poll!(begun.as_mut()).is_pending());
        let message = within(other.next()).await.unwrap().unwrap();
        assert_eq!(message.events[0].revision, revision);
        within(begun).await.unwrap().unwrap();
    }
}
