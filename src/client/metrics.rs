//! What the client counts: a few atomic additions per operation, read as a snapshot.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

use super::endpoint::Endpoint;

/// Sub-buckets per doubling of latency, as a power of two: a bucket is at most an eighth of its bound wide.
const SUB_BITS: u32 = 3;
const SUB: usize = 1 << SUB_BITS;
/// Latencies from here on share the last bucket: 2^32 µs, more than an hour.
const MAX_BITS: u32 = 32;
const BUCKETS: usize = (MAX_BITS - SUB_BITS + 1) as usize * SUB;

/// The counters of one method.
#[derive(Debug)]
pub(crate) struct PerMethod {
    started: AtomicU64,
    failed: AtomicU64,
    abandoned: AtomicU64,
    latency_sum_us: AtomicU64,
    buckets: Box<[AtomicU64]>,
}

impl PerMethod {
    fn new() -> Self {
        Self {
            started: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            abandoned: AtomicU64::new(0),
            latency_sum_us: AtomicU64::new(0),
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

/// The counters of all methods, each from when it was first heard of on. They stay where they are, so that to find one takes
/// neither a lock nor a count.
#[derive(Debug, Default)]
struct Methods(OnceLock<Box<Listed>>);

#[derive(Debug)]
struct Listed {
    method: &'static str,
    counters: PerMethod,
    rest: Methods,
}

impl Methods {
    /// The counters of `method`, which begin now if it was not heard of before.
    fn of(&self, method: &'static str) -> &PerMethod {
        let mut list = self;
        loop {
            // Another caller may list another one here, and then the next place is tried.
            let listed = list.0.get_or_init(|| {
                Box::new(Listed { method, counters: PerMethod::new(), rest: Self::default() })
            });
            if listed.method == method {
                return &listed.counters;
            }
            list = &listed.rest;
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Listed> {
        std::iter::successors(self.0.get(), |listed| listed.rest.0.get()).map(|listed| &**listed)
    }
}

/// The counters of one kind of stream.
#[derive(Debug, Default)]
pub(crate) struct PerStream {
    pub(crate) opened: AtomicU64,
    pub(crate) failed: AtomicU64,
}

impl PerStream {
    fn snapshot(&self) -> StreamMetrics {
        // Before `opened`: what fails meanwhile must not make more failures than streams.
        let failed = self.failed.load(Relaxed);
        StreamMetrics { opened: self.opened.load(Relaxed), failed }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Metrics {
    methods: Methods,
    pub(crate) range_streams: PerStream,
    pub(crate) watches: PerStream,
    pub(crate) subscriptions: PerStream,
    pub(crate) retries: AtomicU64,
    pub(crate) redirects: AtomicU64,
    pub(crate) fail_overs: AtomicU64,
    pub(crate) sessions_opened: AtomicU64,
    pub(crate) watch_reconnects: AtomicU64,
    pub(crate) subscription_reconnects: AtomicU64,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self {
            methods: Methods::default(),
            range_streams: PerStream::default(),
            watches: PerStream::default(),
            subscriptions: PerStream::default(),
            retries: AtomicU64::new(0),
            redirects: AtomicU64::new(0),
            fail_overs: AtomicU64::new(0),
            sessions_opened: AtomicU64::new(0),
            watch_reconnects: AtomicU64::new(0),
            subscription_reconnects: AtomicU64::new(0),
        }
    }

    /// Counts an operation from here until it is finished, or dropped, which counts as abandoned.
    pub(crate) fn start(&self, method: &'static str, started: Instant) -> UnderWay<'_> {
        let counters = self.methods.of(method);
        counters.started.fetch_add(1, Relaxed);
        UnderWay { counters: Some(counters), started }
    }

    /// What was counted, with what is known of each node.
    pub(crate) fn snapshot(&self, nodes: Vec<NodeMetrics>) -> ClientMetrics {
        let method = |&Listed { method, ref counters, .. }: &Listed| {
            // Before `started`: an operation that ends meanwhile must not make the difference negative.
            let buckets: Vec<u64> = counters.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
            let (failed, abandoned) = (counters.failed.load(Relaxed), counters.abandoned.load(Relaxed));
            let latency = Latencies { sum_us: counters.latency_sum_us.load(Relaxed), buckets };
            let requests = counters.started.load(Relaxed);
            let in_flight = requests.saturating_sub(latency.count() + abandoned);
            MethodMetrics { method, requests, failed, abandoned, in_flight, latency }
        };
        ClientMetrics {
            methods: self.methods.iter().map(method).collect(),
            range_streams: self.range_streams.snapshot(),
            watches: self.watches.snapshot(),
            subscriptions: self.subscriptions.snapshot(),
            nodes,
            retries: self.retries.load(Relaxed),
            redirects: self.redirects.load(Relaxed),
            fail_overs: self.fail_overs.load(Relaxed),
            sessions_opened: self.sessions_opened.load(Relaxed),
            watch_reconnects: self.watch_reconnects.load(Relaxed),
            subscription_reconnects: self.subscription_reconnects.load(Relaxed),
        }
    }
}

/// One operation that is being counted.
#[derive(Debug)]
pub(crate) struct UnderWay<'a> {
    counters: Option<&'a PerMethod>,
    started: Instant,
}

impl UnderWay<'_> {
    pub(crate) fn finish(mut self, succeeded: bool) {
        if let Some(counters) = self.counters.take() {
            let latency_us = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
            counters.latency_sum_us.fetch_add(latency_us, Relaxed);
            if !succeeded {
                counters.failed.fetch_add(1, Relaxed);
            }
            counters.buckets[bucket(latency_us)].fetch_add(1, Relaxed);
        }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if let Some(counters) = &self.counters {
            counters.abandoned.fetch_add(1, Relaxed);
        }
    }
}

/// The bucket of a latency.
fn bucket(us: u64) -> usize {
    let us = us.min((1 << MAX_BITS) - 1);
    if us < SUB as u64 {
        return us as usize;
    }
    let doublings = us.ilog2() - SUB_BITS;
    (doublings as usize) * SUB + (us >> doublings) as usize
}

/// The largest latency of a bucket.
fn bound_us(bucket: usize) -> u64 {
    let doublings = (bucket / SUB).saturating_sub(1);
    let sub = (bucket - doublings * SUB) as u64;
    ((sub + 1) << doublings) - 1
}

/// What a client has done since it was made.
///
/// Operations are counted by method, from the call to its end, however many attempts they take. Range streams,
/// watches and subscriptions, which have no such end, are counted when they are opened and when they end with an error. Attempts are
/// counted by the node to which they went.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientMetrics {
    /// By method that was called, each once.
    pub methods: Vec<MethodMetrics>,
    /// Ranges read as streams.
    pub range_streams: StreamMetrics,
    /// Watches.
    pub watches: StreamMetrics,
    /// Subscriptions.
    pub subscriptions: StreamMetrics,
    /// By node: those that the client was given, then those it has learnt of.
    pub nodes: Vec<NodeMetrics>,
    /// Attempts after the first of an operation.
    pub retries: u64,
    /// Those of them that went straight to a node that another had named as leader.
    pub redirects: u64,
    /// How often another node than before was found to lead.
    pub fail_overs: u64,
    /// Sessions opened.
    pub sessions_opened: u64,
    /// How often a watch went on at another node, or at the same one after a break.
    pub watch_reconnects: u64,
    /// The same of subscriptions.
    pub subscription_reconnects: u64,
}

impl ClientMetrics {
    /// Operations under way, of all methods.
    pub fn in_flight(&self) -> u64 {
        self.methods.iter().map(|method| method.in_flight).sum()
    }

    /// The counts of one method; `None` when it has not been called yet.
    pub fn of(&self, method: impl AsRef<str>) -> Option<&MethodMetrics> {
        self.methods.iter().find(|counts| counts.method == method.as_ref())
    }
}

/// What a client has done by one kind of stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct StreamMetrics {
    /// Streams that the caller has asked for, whether or not they could be opened. A watch or a subscription that goes on
    /// at another node is the same.
    pub opened: u64,
    /// Those that ended with an error, be it at once.
    pub failed: u64,
}

/// What a client knows of one node, and what it has asked of it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NodeMetrics {
    /// Where it is.
    pub endpoint: Endpoint,
    /// Whether it can be reached and is ready, as far as is known; a node that was never asked counts as healthy.
    pub healthy: bool,
    /// Attempts that wait for its answer; those that open a stream are not among them.
    pub in_flight: u64,
    /// How long it took to answer the last question about itself; `None` before the first. Such questions are asked once
    /// the client has sent something.
    pub round_trip: Option<Duration>,
    /// Attempts made there, those that open a stream included.
    pub attempts: u64,
    /// Attempts that brought no answer. A refusal is an answer, except to the opening of a stream.
    pub failures: u64,
}

/// What a client has done by one method.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MethodMetrics {
    /// Its name.
    pub method: &'static str,
    /// Operations begun.
    pub requests: u64,
    /// Operations that ended with an error.
    pub failed: u64,
    /// Operations whose future was dropped before they ended.
    pub abandoned: u64,
    /// Operations under way.
    pub in_flight: u64,
    /// How long those took that ended, failed ones and retries included.
    pub latency: Latencies,
}

/// Latencies in buckets, each at most an eighth of its bound wide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Latencies {
    sum_us: u64,
    buckets: Vec<u64>,
}

impl Latencies {
    /// How many.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// All of them together.
    pub fn sum(&self) -> Duration {
        Duration::from_micros(self.sum_us)
    }

    /// A bound that this part of them (0 to 1) does not exceed; zero when there are none.
    pub fn quantile(&self, part: f64) -> Duration {
        let count = self.count();
        let rank = ((count as f64 * part.clamp(0.0, 1.0)).ceil() as u64).max(1);
        let mut below = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            below += count;
            if below >= rank {
                return Duration::from_micros(bound_us(bucket));
            }
        }
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_ordered_and_bounded() {
        let mut last = 0;
        for us in (0..5000).chain([1 << 20, (1 << 32) - 1, 1 << 32, u64::MAX]) {
            let at = bucket(us);
            assert!(at >= last && at < BUCKETS, "{us}");
            let bounded = us.min((1 << 32) - 1);
            assert!(bound_us(at) >= bounded, "{us}");
            assert!(bound_us(at) - bounded <= bounded / 8, "{us}: {}", bound_us(at));
            last = at;
        }
        assert_eq!(last, BUCKETS - 1);
    }

    #[test]
    fn methods_are_listed_once_whoever_lists_them() {
        const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
        let metrics = Metrics::new();
        std::thread::scope(|scope| {
            for first in 0..NAMES.len() {
                let metrics = &metrics;
                scope.spawn(move || {
                    for at in 0..NAMES.len() {
                        metrics.start(NAMES[(first + at) % NAMES.len()], Instant::now()).finish(true);
                    }
                });
            }
        });
        let seen = metrics.snapshot(Vec::new());
        assert_eq!(seen.methods.len(), NAMES.len());
        assert!(NAMES.iter().all(|name| seen.of(name).unwrap().requests == NAMES.len() as u64), "{seen:?}");
    }

    #[test]
    fn what_is_dropped_is_abandoned_and_what_ends_is_measured() {
        let metrics = Metrics::new();
        let now = Instant::now();
        metrics.start("put", now).finish(true);
        metrics.start("put", now).finish(false);
        drop(metrics.start("put", now));
        let under_way = metrics.start("get", now);
        let seen = metrics.snapshot(Vec::new());
        let put = seen.of("put").unwrap();
        assert_eq!((put.requests, put.failed, put.abandoned, put.in_flight), (3, 1, 1, 0));
        assert_eq!(put.latency.count(), 2);
        assert!(put.latency.quantile(0.99) < Duration::from_secs(1));
        assert_eq!((seen.in_flight(), seen.of("get").unwrap().in_flight), (1, 1));
        under_way.finish(true);
        assert_eq!(metrics.snapshot(Vec::new()).in_flight(), 0);
    }
}
