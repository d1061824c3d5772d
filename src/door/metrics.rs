//! What is counted of requests: how many, how they ended, how long they took, how many are under way.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::proto::v1::{Failure, Reason};

use super::methods::{Method, MethodId, Methods};

/// Upper bounds of the latency buckets, in seconds: a durable write on a fast disk to a wedged quorum.
const LATENCY_BUCKETS: [f64; 14] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    method: &'static str,
}

/// What is counted of requests. Counting touches no map and no lock but the histogram's.
pub(crate) struct DoorMetrics {
    methods: Methods,
    /// By method.
    counts: Vec<CallMetrics>,
    pipelines: Gauge,
    pipeline_requests: Gauge,
    pipeline_bytes: Gauge,
}

/// The metrics of one method.
struct CallMetrics {
    /// In the order of [`outcomes`].
    outcomes: Vec<Counter>,
    latency: Histogram,
}

impl DoorMetrics {
    /// Metrics of `methods`, as part of what `registry` exports.
    pub(crate) fn new(methods: Methods, registry: &mut Registry) -> Self {
        let requests = Family::<RequestLabels, Counter>::default();
        let latency =
            Family::<MethodLabels, Histogram>::new_with_constructor(|| Histogram::new(LATENCY_BUCKETS));
        let (pipelines, pipeline_requests, pipeline_bytes) = <(Gauge, Gauge, Gauge)>::default();
        registry.register("quorate_server_requests", "Requests answered", requests.clone());
        registry.register_with_unit(
            "quorate_server_request_duration",
            "From reading a request to its answer, or to the end of its stream",
            Unit::Seconds,
            latency.clone(),
        );
        registry.register("quorate_server_pipelines_open", "Pipelines open", pipelines.clone());
        registry.register(
            "quorate_server_pipeline_requests_in_flight",
            "Requests read from pipelines and not yet answered",
            pipeline_requests.clone(),
        );
        registry.register_with_unit(
            "quorate_server_pipeline_queued",
            "Answers that wait to be sent on pipelines",
            Unit::Bytes,
            pipeline_bytes.clone(),
        );
        let counts_of = |method: &Method| {
            let method = method.name;
            CallMetrics {
                outcomes: outcomes()
                    .map(|outcome| requests.get_or_create_owned(&RequestLabels { method, outcome }))
                    .collect(),
                latency: latency.get_or_create_owned(&MethodLabels { method }),
            }
        };
        let counts = methods.list().iter().map(counts_of).collect();
        Self { methods, counts, pipelines, pipeline_requests, pipeline_bytes }
    }

    /// What is counted.
    pub(crate) fn methods(&self) -> &Methods {
        &self.methods
    }

    /// Counts an answered request, or a stream that has ended.
    pub(crate) fn observe<T>(&self, method: MethodId, started: Instant, outcome: &Result<T, Failure>) {
        let metrics = &self.counts[method.0];
        metrics.outcomes[place_of(outcome)].inc();
        metrics.latency.observe(started.elapsed().as_secs_f64());
    }

    /// Counts a pipeline for as long as the guard lives.
    pub(crate) fn open_pipeline(&self) -> OpenStream {
        OpenStream::new(&self.pipelines)
    }

    /// What one pipeline adds to the requests in flight on all.
    pub(crate) fn pipeline_requests(&self) -> Share {
        Share::new(&self.pipeline_requests)
    }

    /// What one pipeline adds to the bytes of answers that wait on all.
    pub(crate) fn pipeline_bytes(&self) -> Share {
        Share::new(&self.pipeline_bytes)
    }
}

/// How requests end: `ok`, or for the reason of their failure.
fn outcomes() -> impl Iterator<Item = &'static str> {
    std::iter::once("ok").chain(Reason::all().map(Reason::counter))
}

/// Position in [`outcomes`].
fn place_of<T>(outcome: &Result<T, Failure>) -> usize {
    match outcome {
        Ok(_) => 0,
        // Their numbers have a gap.
        Err(failure) => {
            let reason = failure.reason();
            1 + Reason::all().take_while(|before| *before < reason).count()
        }
    }
}

/// An open pipeline, watch or long range.
pub(crate) struct OpenStream(Gauge);

impl OpenStream {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A call that a stream answers. It is counted once: when it is refused, or by how its stream ends.
pub(crate) struct StreamCall {
    metrics: Arc<DoorMetrics>,
    method: MethodId,
    open: Gauge,
    started: Instant,
}

impl StreamCall {
    /// One of `method`. While its stream is open, `open` counts it.
    pub(crate) fn new(metrics: Arc<DoorMetrics>, method: MethodId, open: &Gauge) -> Self {
        Self { metrics, method, open: open.clone(), started: Instant::now() }
    }

    /// The stream is open from here on if what it needs is `prepared`, else the call has failed.
    ///
    /// # Errors
    /// The failure, counted.
    pub(crate) fn open<T>(self, prepared: Result<T, Failure>) -> Result<(T, OpenCall), Failure> {
        match prepared {
            Ok(prepared) => Ok((prepared, OpenCall { _open: OpenStream::new(&self.open), call: self })),
            Err(failure) => {
                self.metrics.observe(self.method, self.started, &Err::<(), _>(failure.clone()));
                Err(failure)
            }
        }
    }
}

/// A call whose stream is open for as long as this lives.
pub(crate) struct OpenCall {
    call: StreamCall,
    _open: OpenStream,
}

impl OpenCall {
    /// The stream has ended. A client that has had enough of it is no failure.
    pub(crate) fn ended(self, outcome: &Result<(), Failure>) {
        let StreamCall { metrics, method, started, open: _ } = &self.call;
        metrics.observe(*method, *started, outcome);
    }
}

/// What one of many adds to a gauge of all of them. It takes back what is left of it when it goes.
pub(crate) struct Share {
    all: Gauge,
    own: AtomicI64,
}

impl Share {
    fn new(all: &Gauge) -> Self {
        Self { all: all.clone(), own: AtomicI64::new(0) }
    }

    pub(crate) fn add(&self, amount: usize) {
        self.change(i64::try_from(amount).unwrap_or(i64::MAX));
    }

    /// What this one adds.
    pub(crate) fn own(&self) -> usize {
        usize::try_from(self.own.load(Relaxed)).unwrap_or_default()
    }

    /// What all add together.
    pub(crate) fn all(&self) -> usize {
        usize::try_from(self.all.get()).unwrap_or_default()
    }

    pub(crate) fn sub(&self, amount: usize) {
        self.change(-i64::try_from(amount).unwrap_or(i64::MAX));
    }

    /// Takes back what is left.
    pub(crate) fn clear(&self) {
        self.all.dec_by(self.own.swap(0, Relaxed));
    }

    fn change(&self, by: i64) {
        self.own.fetch_add(by, Relaxed);
        self.all.inc_by(by);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.all.dec_by(*self.own.get_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_that_goes_takes_back_what_is_left_of_it() {
        let all = Gauge::default();
        let (first, second) = (Share::new(&all), Share::new(&all));
        first.add(5);
        second.add(7);
        first.sub(2);
        assert_eq!(all.get(), 10);
        drop(first);
        assert_eq!(all.get(), 7);
    }

    #[test]
    fn every_reason_has_an_outcome_of_its_own() {
        let names: Vec<_> = outcomes().collect();
        assert_eq!(names[..3], ["ok", "unspecified", "not_leader"]);
        let mut distinct = names.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), names.len());
        for reason in Reason::all() {
            let failure = Failure { reason: reason.into(), ..Default::default() };
            assert_eq!(names[place_of(&Err::<(), _>(failure))], reason.counter());
        }
    }
}
