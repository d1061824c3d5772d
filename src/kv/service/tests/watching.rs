//! Watches and their dispatcher on a real feed: what is told is what was applied, and nobody is woken for what is not theirs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;

use futures::task::{ArcWake, waker};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::door::Answerer;
use crate::door::limits::Bound;
use crate::door::streams::Responses;
use crate::feed::{EventLog, EventLogLimits, Feed, FeedContent};
use crate::incoming::{Caller, Places};
use crate::kv::machine::{KvTxn, MAX_VALUE_BYTES, TxnOp};
use crate::machine::{AppliedEvent, EventOperation};

/// Where watches are opened without a port between.
#[derive(Clone)]
struct Watcher {
    node: FakeNode,
    dispatch: Dispatch,
    asked: AskedWatches,
    metrics: Arc<DoorMetrics>,
    caller: Arc<Caller>,
    drain: Arc<watch::Sender<bool>>,
}

impl Watcher {
    async fn of(node: FakeNode) -> Self {
        let caller = Places::new(8, 0).admit(None).await;
        let (metrics, drain) = (metrics().0, Arc::new(watch::Sender::new(false)));
        let (dispatch, asked) = (Dispatch::default(), AskedWatches::default());
        Self { node, dispatch, asked, metrics, caller, drain }
    }

    async fn watch(&self, request: v1::WatchRequest) -> Result<Responses<v1::WatchResponse>, Failure> {
        let call = StreamCall::new(self.metrics.clone(), MethodId(WATCH), &Gauge::default());
        let place = crate::door::streams::WatchPlace::take(&self.caller, Bound { each: 20_000, all: 20_000 });
        let (by, draining) = (Answerer::of(&self.node), self.drain.subscribe());
        let dispatching = (self.dispatch.clone(), self.asked.of(&"somebody".into()));
        watches::watch(self.node.clone(), by, draining, dispatching, request, place, call).await
    }

    async fn watch_from(&self, from_revision: u64) -> Responses<v1::WatchResponse> {
        self.watch(v1::WatchRequest { from_revision, ..Default::default() }).await.unwrap()
    }

    /// All that was applied, by a cursor of its own.
    async fn applied(&self) -> Vec<(u64, AppliedEvent)> {
        let mut cursor = self.node.feed_from(0);
        let mut all = Vec::new();
        loop {
            let page = cursor.page(1 << 20).await.unwrap();
            for record in &page.records {
                let FeedContent::Events(events) = &record.content else { panic!("{record:?}") };
                all.extend(events.iter().map(|event| (record.log_id.index, event.clone())));
            }
            if page.is_last() {
                return all;
            }
        }
    }
}

/// Revision, kind and key, and what the key held before: value, revision and version.
type Seen = (u64, v1::event::Kind, Bytes, Option<Held>);
type Held = (Bytes, u64, u64);

/// What a watch is told below `end`.
async fn seen_below(mut watch: Responses<v1::WatchResponse>, end: u64) -> Vec<Seen> {
    let (mut seen, mut next) = (Vec::new(), 0);
    while next < end {
        let message = within(watch.next()).await.unwrap().unwrap();
        assert!(message.next_revision >= next, "a watch does not go back");
        next = message.next_revision;
        for event in message.events {
            assert!(event.revision < next + u64::from(message.more), "told before it is told to be");
            assert!(!event.previous_unknown, "the feed has all of it");
            let held = event.previous.clone().map(|item| (item.value, item.mod_revision, item.version));
            seen.push((event.revision, event.kind(), event.item.unwrap().key, held));
        }
    }
    seen
}

fn expected(all: &[(u64, AppliedEvent)], request: &v1::WatchRequest) -> Vec<Seen> {
    let mut holds: BTreeMap<(Bytes, Bytes), Held> = BTreeMap::new();
    let inside = |key: &Bytes, start: &Bytes, end: &Bytes| start <= key && (end.is_empty() || key < end);
    let of = |(revision, event): &(u64, AppliedEvent)| {
        let key = (event.collection.clone(), event.key.clone());
        let held = match event.operation {
            EventOperation::Insert | EventOperation::Update => {
                holds.insert(key, (event.value.clone(), *revision, event.version))
            }
            EventOperation::Delete | EventOperation::Expire => holds.remove(&key),
        };
        let kind = match event.operation {
            EventOperation::Insert | EventOperation::Update => v1::event::Kind::Put,
            EventOperation::Delete => v1::event::Kind::Delete,
            EventOperation::Expire => v1::event::Kind::Expire,
        };
        let ranges = request.ranges.iter().map(|range| (&range.start, &range.end));
        let mut ranges = ranges.chain(request.ranges.is_empty().then_some((&request.start, &request.end)));
        let is_wanted = *revision >= request.from_revision
            && event.tenant == "default"
            && event.collection == request.collection.as_bytes()
            && (request.kinds.is_empty() || request.kinds.contains(&kind.into()))
            && ranges.any(|(start, end)| inside(&event.key, start, end));
        is_wanted.then(|| (*revision, kind, event.key.clone(), held.filter(|_| request.previous)))
    };
    all.iter().filter_map(of).collect()
}

fn random_key(rng: &mut SmallRng, least: usize) -> Bytes {
    let length = rng.random_range(least..4);
    (0..length).map(|_| rng.random_range(b'a'..b'e')).collect()
}

/// Empty ones too.
fn random_value(rng: &mut SmallRng) -> Bytes {
    vec![rng.random(); rng.random_range(0..3)].into()
}

fn random_command(rng: &mut SmallRng) -> KvCommand {
    let collection = if rng.random_bool(0.8) { "c" } else { "d" }.to_owned();
    let (tenant, key, value) = ("default".to_owned(), random_key(rng, 1), random_value(rng));
    match rng.random_range(0..6) {
        0 => KvCommand::Delete { tenant, collection, key },
        1 => {
            let operations = (0..rng.random_range(1..4)).map(|_| {
                let (collection, key) = (collection.clone(), random_key(rng, 1));
                match rng.random_bool(0.3) {
                    true => TxnOp::Delete { collection, key },
                    false => TxnOp::Put { collection, key, value: random_value(rng), ttl_ms: 0 },
                }
            });
            let then = operations.collect::<Vec<_>>();
            KvCommand::Txn(KvTxn { tenant, compares: vec![], then, otherwise: vec![] })
        }
        _ => KvCommand::Put { tenant, collection, key, value },
    }
}

fn random_request(rng: &mut SmallRng, applied: u64) -> v1::WatchRequest {
    let collection = if rng.random_bool(0.8) { "c" } else { "d" }.to_owned();
    let mut request = v1::WatchRequest {
        collection,
        from_revision: rng.random_range(1..=applied + 1),
        previous: rng.random_bool(0.5),
        ..Default::default()
    };
    match rng.random_range(0..3) {
        0 => {}
        1 => (request.start, request.end) = (random_key(rng, 0), random_key(rng, 0)),
        _ => {
            let range = |_| v1::WatchRange { start: random_key(rng, 0), end: random_key(rng, 0) };
            request.ranges = (0..3).map(range).collect();
        }
    }
    if rng.random_bool(0.3) {
        request.kinds = vec![v1::event::Kind::Delete.into()];
    }
    request
}

/// Watches come and go while commands are applied.
async fn watches_among_writes(seed: u64) {
    const WRITES: u64 = 600;
    let (watcher, mut rng) = (Watcher::of(FakeNode::new()).await, SmallRng::seed_from_u64(seed));
    let mut watching = Vec::new();
    for written in 0..WRITES {
        if rng.random_bool(0.05) {
            let request = random_request(&mut rng, written);
            let watch = watcher.watch(request.clone()).await.unwrap();
            // Some are read to a revision before the last one, and go while others stay.
            let end = if rng.random_bool(0.3) { rng.random_range(1..=WRITES) } else { WRITES + 1 };
            watching.push((request, end, runtime::spawn(seen_below(watch, end))));
        }
        watcher.node.inner.lock().unwrap().apply(random_command(&mut rng));
        match rng.random_range(0..4) {
            0 => tokio::task::yield_now().await,
            1 => tokio::time::sleep(Duration::from_micros(rng.random_range(0..3_000))).await,
            _ => {}
        }
    }
    let all = watcher.applied().await;
    let mut told = 0;
    for (request, end, watch) in watching {
        let seen = within(watch).await.unwrap();
        told += seen.len();
        let expected = expected(&all, &request);
        let below =
            |seen: &[Seen]| seen.iter().filter(|(revision, ..)| *revision < end).cloned().collect::<Vec<_>>();
        assert_eq!(below(&seen), below(&expected), "seed {seed}: {request:?}");
        assert_eq!(seen, expected[..seen.len()], "seed {seed}: {request:?}");
    }
    assert!(told > 100, "{told}");
}

#[tokio::test(start_paused = true)]
async fn a_watch_is_told_what_was_applied_in_its_ranges_whenever_it_came() {
    for seed in 0..30 {
        watches_among_writes(seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn also_when_all_that_happens_at_the_same_time() {
    for seed in 100..104 {
        watches_among_writes(seed).await;
    }
}

struct Wakes(AtomicUsize);

impl ArcWake for Wakes {
    fn wake_by_ref(wakes: &Arc<Self>) {
        wakes.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_idle_watches_wake_nobody() {
    const WATCHES: usize = 10_000;
    let watcher = Watcher::of(FakeNode::new()).await;
    let wakes = Arc::new(Wakes(AtomicUsize::new(0)));
    let mut idle = Vec::new();
    for number in 0..WATCHES {
        // Apart, nested, and in another collection.
        let request = match number % 3 {
            0 => v1::WatchRequest {
                start: format!("idle{number:05}").into(),
                end: format!("idle{number:05}z").into(),
                ..Default::default()
            },
            1 => v1::WatchRequest {
                start: format!("idle{number:05}").into(),
                end: format!("idle{:05}", 99_999 - number).into(),
                ..Default::default()
            },
            _ => v1::WatchRequest { collection: "other".to_owned(), ..Default::default() },
        };
        let mut watch = watcher.watch(request).await.unwrap();
        within(watch.next()).await.unwrap().unwrap();
        idle.push(watch);
    }
    let mut poll_all = || {
        let waker = waker(wakes.clone());
        let mut cx = std::task::Context::from_waker(&waker);
        let ready = idle.iter_mut().map(|watch| watch.poll_next_unpin(&mut cx));
        ready.filter(Poll::is_ready).count()
    };
    assert_eq!(poll_all(), 0);
    let mut busy = watcher.watch_from(1).await;
    let begun = tokio::time::Instant::now();
    let mut seen = 0;
    for number in 0..500 {
        watcher.node.put(&format!("busy{number}"), 10);
        if number % 10 == 0 {
            seen += within(busy.next()).await.unwrap().unwrap().events.len();
        }
    }
    while seen < 500 {
        seen += within(busy.next()).await.unwrap().unwrap().events.len();
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "nobody is due to tell how far it is");
    assert_eq!(wakes.0.load(Ordering::Relaxed), 0);
    // What is theirs wakes those whose it is: the first of them, and those that it is nested in.
    watcher.node.put("idle00000x", 10);
    assert_eq!(within(busy.next()).await.unwrap().unwrap().events.len(), 1);
    assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
    assert_eq!(poll_all(), 1);
    // Without a watch nobody follows.
    drop((idle, busy));
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(Arc::strong_count(&watcher.dispatch.present().unwrap()), 2, "its task has ended");
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_watches_tell_rarely_how_far_they_are() {
    const WATCHES: usize = 10_000;
    let watcher = Watcher::of(FakeNode::new()).await;
    let mut all = Vec::new();
    for _ in 0..WATCHES {
        all.push(watcher.watch_from(1).await);
    }
    let begun = tokio::time::Instant::now();
    let mut first = all.pop().unwrap();
    within(first.next()).await.unwrap().unwrap();
    watcher.node.inner.lock().unwrap().reach(9);
    let told = tokio::time::timeout(Duration::from_secs(60), first.next()).await.unwrap().unwrap().unwrap();
    assert_eq!((told.events.len(), told.next_revision), (0, 10));
    assert_eq!(begun.elapsed().as_secs(), 25);
    all.clear();
    tokio::time::timeout(Duration::from_secs(60), first.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(begun.elapsed().as_secs(), 30);
}

/// More than the ring keeps.
fn put_much(node: &FakeNode, feed: &Feed) -> u64 {
    let mut last = 0;
    for number in 0..300 {
        last = node.put(&format!("k{number:03}"), 100_000);
        if number % 20 == 0 {
            feed.write_log();
        }
    }
    feed.write_log();
    last
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_was_stopped_goes_on_from_the_event_log() {
    let dir = tempfile::tempdir().unwrap();
    let log = Arc::new(EventLog::open(dir.path(), EventLogLimits::default()).unwrap());
    let feed = Feed::new(Some(log));
    let watcher = Watcher::of(FakeNode::with_feed(feed.clone())).await;
    let mut stopped = watcher.watch_from(1).await;
    within(stopped.next()).await.unwrap().unwrap();
    let last = put_much(&watcher.node, &feed);
    let all = watcher.applied().await;
    assert_eq!(all.len() as u64, last);
    let request = v1::WatchRequest { collection: "default".to_owned(), ..Default::default() };
    assert_eq!(seen_below(stopped, last + 1).await, expected(&all, &request));
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_nowhere_is_named() {
    let feed = Feed::new(None);
    let watcher = Watcher::of(FakeNode::with_feed(feed.clone())).await;
    let mut stopped = watcher.watch_from(1).await;
    within(stopped.next()).await.unwrap().unwrap();
    let last = put_much(&watcher.node, &feed);
    let first = feed.reach().first;
    assert!((100..last).contains(&first), "{first}");
    let mut too_early = watcher.watch_from(first - 1).await;
    for watch in [&mut stopped, &mut too_early] {
        let refused = within(watch.next()).await.unwrap().unwrap_err();
        let failure = details::failure(refused.details()).unwrap();
        assert_eq!((failure.reason(), failure.first_revision), (Reason::Compacted, first));
        assert!(within(watch.next()).await.is_none());
    }
    assert_eq!(seen_below(watcher.watch_from(first).await, last + 1).await.len() as u64, last + 1 - first);
}

/// The revision of the next event.
async fn first_event(watch: &mut Responses<v1::WatchResponse>) -> u64 {
    loop {
        let message = within(watch.next()).await.unwrap().unwrap();
        if let Some(event) = message.events.first() {
            return event.revision;
        }
    }
}

async fn refused(watch: &mut Responses<v1::WatchResponse>) -> Failure {
    let status = within(async {
        loop {
            if let Err(status) = watch.next().await.unwrap() {
                return status;
            }
        }
    })
    .await;
    details::failure(status.details()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_state_that_comes_whole_ends_the_watches_that_it_leaves_behind() {
    let watcher = Watcher::of(FakeNode::new()).await;
    watcher.node.put("k", 1);
    let mut before = watcher.watch_from(1).await;
    within(before.next()).await.unwrap().unwrap();
    watcher.node.inner.lock().unwrap().begin(HISTORY, 1_000);
    let failure = refused(&mut before).await;
    assert_eq!((failure.reason(), failure.first_revision), (Reason::Compacted, 1_001));
    let mut again = watcher.watch_from(1_001).await;
    watcher.node.put("k", 1);
    assert_eq!(first_event(&mut again).await, 1_001);

    // Positions of another history, smaller ones, are none of the watches of this one.
    watcher.node.inner.lock().unwrap().begin(HistoryEpoch(0xdef), 10);
    let mut other = watcher.watch_from(11).await;
    assert_eq!(within(other.next()).await.unwrap().unwrap().next_revision, 11);
    assert_eq!(refused(&mut again).await.reason(), Reason::OtherHistory);
    watcher.node.put("k", 1);
    assert_eq!(first_event(&mut other).await, 11);
    let request = v1::WatchRequest { from_revision: 12, history: HISTORY.0, ..Default::default() };
    assert_eq!(watcher.watch(request).await.err().unwrap().reason(), Reason::OtherHistory);
}

#[tokio::test(start_paused = true)]
async fn watches_end_with_the_feed_and_with_a_drain() {
    let watcher = Watcher::of(FakeNode::new()).await;
    let (mut idle, mut other) = (watcher.watch_from(1).await, watcher.watch_from(1).await);
    within(idle.next()).await.unwrap().unwrap();
    watcher.drain.send_replace(true);
    assert_eq!(refused(&mut idle).await.reason(), Reason::Stopped);
    watcher.drain.send_replace(false);
    within(other.next()).await.unwrap().unwrap();
    watcher.node.inner.lock().unwrap().end();
    assert_eq!(refused(&mut other).await.reason(), Reason::Stopped);
    let late = v1::WatchRequest { from_revision: 1, ..Default::default() };
    assert_eq!(watcher.watch(late).await.err().unwrap().reason(), Reason::Stopped);
}

/// It serves nothing any more: what it was told may not be what the others have.
#[tokio::test(start_paused = true)]
async fn a_node_whose_state_differs_tells_nothing_more() {
    let watcher = Watcher::of(FakeNode::new()).await;
    let mut idle = watcher.watch_from(1).await;
    within(idle.next()).await.unwrap().unwrap();
    let divergence = crate::types::Divergence { at: LogId::new(3, 8), own: 7, majority: Some(8) };
    watcher.node.state.send_modify(|state| state.diverged = Some(divergence));
    assert_eq!(refused(&mut idle).await.reason(), Reason::Diverged);
}

#[tokio::test(start_paused = true)]
async fn wishes_that_are_none_are_refused() {
    let watcher = Watcher::of(FakeNode::new()).await;
    let range = v1::WatchRange { start: "a".into(), end: "b".into() };
    for request in [
        v1::WatchRequest { start: "a".into(), ranges: vec![range.clone()], ..Default::default() },
        v1::WatchRequest { ranges: vec![range.clone(); 65], ..Default::default() },
        v1::WatchRequest { kinds: vec![7], ..Default::default() },
    ] {
        assert_eq!(watcher.watch(request).await.err().unwrap().reason(), Reason::Invalid);
    }
    let long = v1::WatchRange { start: vec![b'k'; 5_000].into(), end: Bytes::new() };
    let request = v1::WatchRequest { ranges: vec![range, long], ..Default::default() };
    assert_eq!(watcher.watch(request).await.err().unwrap().reason(), Reason::Invalid);
    assert!(watcher.dispatch.present().is_none());
}

/// However often watches come and go while nothing is applied, no more is kept than there are.
#[tokio::test(start_paused = true)]
async fn watches_that_have_gone_leave_nothing_behind() {
    let watcher = Watcher::of(FakeNode::new()).await;
    let stays = watcher.watch_from(1).await;
    let mut most = BTreeMap::new();
    for number in 0..1_000 {
        let watch = watcher.watch_from(1).await;
        let kept = watcher.dispatch.present().unwrap().ranges_kept();
        *most.entry(kept).or_insert(0) += 1;
        assert!(kept <= 4, "{kept} after {number}");
        drop(watch);
    }
    assert!(most.len() > 1, "{most:?}");
    drop(stays);
    assert_eq!(watcher.dispatch.present().unwrap().ranges_kept(), 0);
}

/// Every message is one that stock clients take. What memory holds has room for all of it.
#[tokio::test(start_paused = true)]
async fn values_before_and_after_that_are_as_long_as_they_may_be_fit_a_message() {
    let watcher = Watcher::of(FakeNode::new()).await;
    let apply = |command| drop(watcher.node.inner.lock().unwrap().apply(command));
    let names = || ("default".to_owned(), "default".to_owned());
    // Each value says by its bytes at which revision it was written.
    for (revision, key) in (1..).zip(["k0", "k1", "k2", "k3", "k4", "k0", "k1"]) {
        let (tenant, collection) = names();
        let value = vec![revision; MAX_VALUE_BYTES].into();
        apply(KvCommand::Put { tenant, collection, key: key.into(), value });
    }
    let (tenant, collection) = names();
    apply(KvCommand::DeleteRange { tenant, collection, start: "k".into(), end: Bytes::new(), limit: 0 });
    let request = v1::WatchRequest { from_revision: 1, previous: true, ..Default::default() };
    let mut watch = watcher.watch(request).await.unwrap();
    let (mut told, mut next) = (Vec::new(), 0);
    while next < 9 {
        let message = within(watch.next()).await.unwrap().unwrap();
        assert!(message.encoded_len() < 4 * 1024 * 1024, "{}", message.encoded_len());
        next = message.next_revision;
        told.extend(message.events.into_iter().map(|event| {
            let before = event.previous.map(|item| {
                assert_eq!(
                    (item.value.len(), u64::from(item.value[0])),
                    (MAX_VALUE_BYTES, item.mod_revision)
                );
                item.mod_revision
            });
            (event.revision, before)
        }));
    }
    let inserted = (1..=5).map(|revision| (revision, None));
    let rest = [(6, 1), (7, 2), (8, 6), (8, 7), (8, 3), (8, 4), (8, 5)];
    let expected: Vec<_> = inserted.chain(rest.map(|(revision, before)| (revision, Some(before)))).collect();
    assert_eq!(told, expected);
}

/// What the feed does not reach back to is said to be unknown, and what it reaches back to is told.
#[tokio::test(start_paused = true)]
async fn what_is_not_kept_any_more_is_told_to_be_unknown() {
    let watcher = Watcher::of(FakeNode::new()).await;
    watcher.node.put("k", 1);
    // The state comes whole: the feed begins behind it.
    watcher.node.inner.lock().unwrap().begin(HISTORY, 1);
    watcher.node.put("k", 2);
    watcher.node.put("k", 3);
    let request = v1::WatchRequest { from_revision: 2, previous: true, ..Default::default() };
    let mut watch = watcher.watch(request).await.unwrap();
    let mut told = Vec::new();
    while told.len() < 2 {
        told.extend(within(watch.next()).await.unwrap().unwrap().events);
    }
    assert_eq!((&told[0].previous, told[0].previous_unknown), (&None, true));
    let previous = told[1].previous.as_ref().unwrap();
    assert_eq!((previous.mod_revision, previous.version, told[1].previous_unknown), (2, 2, false));
}

impl Watcher {
    async fn ask(&self, watch_id: u64) -> Result<u64, Failure> {
        self.ask_as("somebody", watch_id).await
    }

    async fn ask_as(&self, caller: &str, watch_id: u64) -> Result<u64, Failure> {
        let (by, request) = (Answerer::of(&self.node), v1::WatchProgressRequest { watch_id });
        let own = self.asked.of(&caller.into());
        progress::ask(&self.node, &by, &own, request).await.map(|answer| answer.next_revision)
    }
}

/// On virtual time: what is asked for is said at once, and not when it is due anyway.
#[tokio::test(start_paused = true)]
async fn a_watch_that_is_asked_says_how_far_it_is_and_not_before_it_is_there() {
    let watcher = Watcher::of(FakeNode::new()).await;
    let of_others = v1::WatchRange { start: "z".into(), end: Bytes::new() };
    let request =
        v1::WatchRequest { from_revision: 1, ranges: vec![of_others], watch_id: 7, ..Default::default() };
    let mut watch = watcher.watch(request).await.unwrap();
    assert_eq!(within(watch.next()).await.unwrap().unwrap().next_revision, 1);
    watcher.node.put("k", 1);
    let begun = tokio::time::Instant::now();
    assert_eq!(watcher.ask(7).await.unwrap(), 2);
    assert_eq!(within(watch.next()).await.unwrap().unwrap().next_revision, 2);
    assert!(begun.elapsed() < Duration::from_millis(100), "{:?}", begun.elapsed());

    // The cluster is further than this node: the watch says it once the node is there, and until then what is due.
    watcher.node.inner.lock().unwrap().present = Some(3);
    assert_eq!(watcher.ask(7).await.unwrap(), 4);
    let message = within(watch.next()).await.unwrap().unwrap();
    assert_eq!((message.next_revision, begun.elapsed() >= Duration::from_secs(4)), (2, true));
    let begun = tokio::time::Instant::now();
    watcher.node.put("z", 1);
    let told = within(watch.next()).await.unwrap().unwrap();
    assert_eq!((told.next_revision, told.events.len()), (3, 1));
    watcher.node.put("k", 1);
    assert_eq!(within(watch.next()).await.unwrap().unwrap().next_revision, 4);
    assert!(begun.elapsed() < Duration::from_millis(100), "{:?}", begun.elapsed());

    for (watch_id, reason) in [(0, Reason::Invalid), (8, Reason::NotFound)] {
        assert_eq!(watcher.ask(watch_id).await.unwrap_err().reason(), reason);
    }
    let of_others = watcher.ask_as("somebody else", 7).await;
    assert_eq!(of_others.unwrap_err().reason(), Reason::NotFound, "a watch is its caller's");
    drop(watch);
    assert_eq!(watcher.ask(7).await.unwrap_err().reason(), Reason::NotFound);
    assert_eq!(watcher.asked.count(), 0, "nothing is kept of a watch that has gone");
}

/// The revisions of another history are not those of the node: nobody would say what was promised.
#[tokio::test]
async fn a_watch_of_another_history_is_not_asked() {
    let watcher = Watcher::of(FakeNode::new()).await;
    let own = || watcher.asked.of(&"somebody".into());
    let other = own().register(7, HistoryEpoch(HISTORY.0 + 1));
    assert_eq!(watcher.ask(7).await.unwrap_err().reason(), Reason::NotFound);
    let same = own().register(7, HISTORY);
    let next = watcher.ask(7).await.unwrap();
    assert_eq!((same.below(), other.below()), (Some(next), None));
}
