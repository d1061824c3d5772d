use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::super::grpc::one_by_one;
use super::super::registry::{FollowerCaller, Subscribers};
use super::super::wire::ProtobufEncoding;
use super::*;
use crate::door::rights::Principal;
use crate::door::streams::{Responses, stream as line_of_chunks};
use crate::feed::{Feed, Recorder};
use crate::incoming::Places;
use crate::machine::ApplyContext;
use crate::proto::replication::WalEntryProto;
use crate::reason::Reason;
use crate::types::{HistoryEpoch, LogId, MachineVersion};

const WINDOW: u64 = 64 * 1024;

/// A node that applies commands, and one who follows it from the beginning.
struct World {
    recorder: Recorder,
    requests: mpsc::Sender<SubscribeRequest>,
    messages: Responses<WalEntryProto>,
    drain: watch::Sender<bool>,
    sending: Sending<ProtobufEncoding>,
    subscribers: Subscribers,
}

async fn world(first: SubscribeRequest) -> World {
    let feed = Feed::new(None);
    let mut recorder = Recorder::new(feed.clone());
    recorder.begin(HistoryEpoch(7), 0);
    let (requests, received) = mpsc::channel(16);
    let (outlet, chunks) = line_of_chunks();
    let (drain, draining) = watch::channel(false);
    let line = FollowerLine {
        requests: ReceiverStream::new(received).map(Ok).boxed(),
        outlet: Arc::new(outlet),
        encoding: ProtobufEncoding,
        caller: Places::new(8, 0).admit(None).await,
        principal: Principal::everyone(),
        limits: Arc::default(),
        draining,
    };
    let wishes = Arc::new(Wishes::parse(first, true).unwrap());
    let subscribers = Subscribers::default();
    let caller = FollowerCaller { transport: "grpc", address: None };
    let place = subscribers.enter("f".to_owned(), caller, Vec::new(), 0);
    let node = || NodeClocks { applied: 0, committed: 0, clock: ClusterClock::default() };
    let sending = Sending::new(Box::new(node), line, wishes, (place, feed.follow(0)), 0);
    World { recorder, requests, messages: one_by_one(chunks), drain, sending, subscribers }
}

fn apply(recorder: &mut Recorder, index: u64, bytes: usize) {
    let at = ApplyContext { log_id: LogId::new(1, index), elapsed_ms: index, time_ms: index };
    recorder.command(&at, MachineVersion { machine: 0, version: 0 }, &vec![7; bytes]);
    recorder.applied(index);
    recorder.publish();
}

fn windowed() -> SubscribeRequest {
    SubscribeRequest { window_bytes: WINDOW, heartbeat_ms: 1_000, ..Default::default() }
}

/// Takes messages until the stream ends or the other side waits for `condition`; the entries among them.
async fn take_entries(messages: &mut Responses<WalEntryProto>, count: usize) -> Vec<u64> {
    let mut entries = Vec::new();
    while entries.len() < count {
        let message = messages.next().await.unwrap().unwrap();
        if message.heartbeat.is_none() {
            entries.push(message.seq);
        }
    }
    entries
}

#[tokio::test(start_paused = true)]
async fn a_follower_with_a_full_window_that_acknowledges_nothing_loses_its_stream() {
    let World { mut recorder, requests, mut messages, mut sending, drain: _drain, .. } =
        world(windowed()).await;
    for index in 1..=3 {
        apply(&mut recorder, index, WINDOW as usize / 2);
    }
    let begun = Instant::now();
    let reading = async {
        assert_eq!(take_entries(&mut messages, 1).await, [1]);
        // Heartbeats come all the same, and saying that one lives is no acknowledgement.
        for _ in 0..30 {
            assert!(messages.next().await.unwrap().unwrap().heartbeat.is_some());
            let lives = SubscribeRequest { heartbeat: true, ..Default::default() };
            requests.send(lives).await.unwrap();
        }
        // One does away with the wait of before.
        requests.send(SubscribeRequest { ack_seq: 1, ..Default::default() }).await.unwrap();
        assert_eq!(take_entries(&mut messages, 1).await, [2]);
        while let Some(Ok(message)) = messages.next().await {
            assert!(message.heartbeat.is_some());
        }
    };
    let sent = async {
        let ended = sending.tail().await;
        drop(sending);
        ended
    };
    let (ended, ()) = tokio::join!(sent, reading);
    assert_eq!(ended.unwrap_err().reason(), Reason::Lagged);
    let waited = begun.elapsed();
    assert!(waited >= LEAST_PATIENCE + Duration::from_secs(29), "{waited:?}");
    assert!(waited < LEAST_PATIENCE * 2, "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn a_follower_that_takes_nothing_loses_its_stream_and_one_that_is_idle_does_not() {
    let World { mut recorder, requests: _requests, mut messages, mut sending, drain, .. } =
        world(SubscribeRequest::default()).await;
    let idle = async {
        // For hours nothing happens but heartbeats.
        for _ in 0..1_000 {
            assert!(messages.next().await.unwrap().unwrap().heartbeat.is_some());
        }
        for index in 1..=200 {
            apply(&mut recorder, index, 10_000);
        }
        std::future::pending::<()>().await;
    };
    let caller = sending.line.caller.clone();
    let ended = tokio::select! {
        ended = sending.tail() => ended,
        () = idle => unreachable!(),
    };
    let failure = ended.unwrap_err();
    assert_eq!(failure.reason(), Reason::Lagged, "{failure:?}");
    assert!(caller.holds(crate::incoming::Held::Unsent) > 100_000, "what it does not take counts");
    drop((messages, sending, drain));
    assert_eq!(caller.holds(crate::incoming::Held::Unsent), 0);
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_a_stream_at_once_whatever_it_waits_for() {
    for window_is_full in [false, true] {
        let World { mut recorder, requests: _requests, mut messages, mut sending, drain, subscribers } =
            world(windowed()).await;
        for index in 1..=3 {
            apply(&mut recorder, index, if window_is_full { WINDOW as usize } else { 10 });
        }
        let begun = Instant::now();
        let reading = async {
            let count = if window_is_full { 1 } else { 3 };
            take_entries(&mut messages, count).await;
            assert_eq!(subscribers.count(), 1);
            drain.send_replace(true);
            std::future::pending::<()>().await;
        };
        let ended = tokio::select! {
            ended = sending.tail() => ended,
            () = reading => unreachable!(),
        };
        assert_eq!(ended.unwrap_err().reason(), Reason::Stopped);
        assert!(begun.elapsed() < Duration::from_secs(1));
        drop(sending);
        assert_eq!(subscribers.count(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_follower_that_goes_is_let_go_of() {
    let World { recorder: _recorder, requests: _requests, messages, mut sending, drain: _drain, .. } =
        world(windowed()).await;
    drop(messages);
    assert_eq!(sending.tail().await, Ok(()));
}
