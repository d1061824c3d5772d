//! What the server counts, and what it tells Prometheus.
//!
//! Requests are counted and timed here; positions, term and role are read from the node at every scrape.
//! Other rooms add theirs with [`Server::with_collector`](super::Server::with_collector).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::Instant;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::engine::NodeState;
use crate::proto::v1::{Failure, Reason};
use crate::types::Role;

use super::moments::MAX_LONG_RANGES;
use super::node::KvNode;
use super::wire::Method;

/// Upper bounds of the latency buckets, in seconds: a durable write on a fast disk to a wedged quorum.
const LATENCY_BUCKETS: [f64; 14] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    outcome: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    method: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleLabels {
    role: String,
}

/// All metrics of one server. Counting touches no map and no lock but the histogram's.
pub(super) struct Metrics {
    registry: Registry,
    methods: [MethodMetrics; Method::ALL.len()],
    pipelines: Gauge,
    pipeline_requests: Gauge,
    pipeline_bytes: Gauge,
    watches: Gauge,
    long_ranges: Gauge,
}

/// The metrics of one method.
struct MethodMetrics {
    /// In the order of [`outcomes`].
    outcomes: Vec<Counter>,
    latency: Histogram,
}

impl Metrics {
    /// Metrics of the server in front of `node`, and of `collectors`.
    pub(super) fn new(node: impl KvNode, collectors: Vec<Box<dyn Collector>>) -> Self {
        let mut registry = Registry::default();
        let requests = Family::<RequestLabels, Counter>::default();
        let latency =
            Family::<MethodLabels, Histogram>::new_with_constructor(|| Histogram::new(LATENCY_BUCKETS));
        let (pipelines, pipeline_requests, pipeline_bytes) = <(Gauge, Gauge, Gauge)>::default();
        let (watches, long_ranges) = <(Gauge, Gauge)>::default();
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
        registry.register("quorate_server_watches_open", "Watches open", watches.clone());
        let help = format!("Long ranges being sent, {MAX_LONG_RANGES} at most");
        registry.register("quorate_server_long_ranges_open", help, long_ranges.clone());
        registry.register_collector(Box::new(NodeCollector(move || node.state())));
        for collector in collectors {
            registry.register_collector(collector);
        }
        let methods = Method::ALL.map(|method| {
            let method = method.name();
            MethodMetrics {
                outcomes: outcomes()
                    .map(|outcome| requests.get_or_create_owned(&RequestLabels { method, outcome }))
                    .collect(),
                latency: latency.get_or_create_owned(&MethodLabels { method }),
            }
        });
        Self { registry, methods, pipelines, pipeline_requests, pipeline_bytes, watches, long_ranges }
    }

    /// Counts an answered request, or a stream that has ended.
    pub(super) fn observe<T>(&self, method: Method, started: Instant, outcome: &Result<T, Failure>) {
        let metrics = &self.methods[method as usize];
        metrics.outcomes[place_of(outcome)].inc();
        metrics.latency.observe(started.elapsed().as_secs_f64());
    }

    /// Counts a pipeline for as long as the guard lives.
    pub(super) fn open_pipeline(&self) -> OpenStream {
        OpenStream::new(&self.pipelines)
    }

    /// What one pipeline adds to the requests in flight on all.
    pub(super) fn pipeline_requests(&self) -> Share {
        Share::new(&self.pipeline_requests)
    }

    /// What one pipeline adds to the bytes of answers that wait on all.
    pub(super) fn pipeline_bytes(&self) -> Share {
        Share::new(&self.pipeline_bytes)
    }

    /// Everything, in the OpenMetrics text format.
    ///
    /// # Errors
    /// When a collector fails.
    pub(super) fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// How requests end: `ok`, or the reason of their failure as `proto/kv.proto` names it, in lower case.
fn outcomes() -> impl Iterator<Item = String> {
    std::iter::once("ok".to_owned()).chain(Reason::all().map(|reason| reason.name().to_lowercase()))
}

/// Position in [`outcomes`].
fn place_of<T>(outcome: &Result<T, Failure>) -> usize {
    match outcome {
        Ok(_) => 0,
        Err(failure) => 1 + failure.reason() as usize,
    }
}

/// An open pipeline, watch or long range.
pub(super) struct OpenStream(Gauge);

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
pub(super) struct StreamCall {
    metrics: Arc<Metrics>,
    method: Method,
    started: Instant,
}

impl StreamCall {
    /// A [`Method::Watch`] or a [`Method::RangeStream`].
    pub(super) fn new(metrics: Arc<Metrics>, method: Method) -> Self {
        Self { metrics, method, started: Instant::now() }
    }

    /// The stream is open from here on if what it needs is `prepared`, else the call has failed.
    ///
    /// # Errors
    /// The failure, counted.
    pub(super) fn open<T>(self, prepared: Result<T, Failure>) -> Result<(T, OpenCall), Failure> {
        match prepared {
            Ok(prepared) => {
                let open = match self.method {
                    Method::Watch => &self.metrics.watches,
                    _ => &self.metrics.long_ranges,
                };
                Ok((prepared, OpenCall { _open: OpenStream::new(open), call: self }))
            }
            Err(failure) => {
                self.metrics.observe(self.method, self.started, &Err::<(), _>(failure.clone()));
                Err(failure)
            }
        }
    }
}

/// A call whose stream is open for as long as this lives.
pub(super) struct OpenCall {
    call: StreamCall,
    _open: OpenStream,
}

impl OpenCall {
    /// The stream has ended. A client that has had enough of it is no failure.
    pub(super) fn ended(self, outcome: &Result<(), Failure>) {
        let StreamCall { metrics, method, started } = &self.call;
        metrics.observe(*method, *started, outcome);
    }
}

/// What one of many adds to a gauge of all of them. It takes back what is left of it when it goes.
pub(super) struct Share {
    all: Gauge,
    own: AtomicI64,
}

impl Share {
    fn new(all: &Gauge) -> Self {
        Self { all: all.clone(), own: AtomicI64::new(0) }
    }

    pub(super) fn add(&self, amount: usize) {
        self.change(i64::try_from(amount).unwrap_or(i64::MAX));
    }

    /// What this one adds.
    pub(super) fn own(&self) -> usize {
        usize::try_from(self.own.load(Relaxed)).unwrap_or_default()
    }

    /// What all add together.
    pub(super) fn all(&self) -> usize {
        usize::try_from(self.all.get()).unwrap_or_default()
    }

    pub(super) fn sub(&self, amount: usize) {
        self.change(-i64::try_from(amount).unwrap_or(i64::MAX));
    }

    /// Takes back what is left.
    pub(super) fn clear(&self) {
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

/// Reads the node's state at every scrape.
struct NodeCollector<F>(F);

impl<F> fmt::Debug for NodeCollector<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeCollector")
    }
}

impl<F: Fn() -> NodeState + Send + Sync + 'static> Collector for NodeCollector<F> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let state = (self.0)();
        let index = |position: Option<crate::types::LogId>| position.map(|log_id| log_id.index);
        let is_leader = u64::from(state.role == Role::Leader);
        let gauges = [
            ("quorate_raft_term", "Current term", Some(state.term)),
            ("quorate_raft_is_leader", "1 on the leader, else 0", Some(is_leader)),
            (
                "quorate_raft_is_ready",
                "1 when /readyz?for=reads answers 200, else 0",
                Some(state.is_ready().into()),
            ),
            (
                "quorate_raft_diverged",
                "1 while this node's state differs from the others' and it serves nothing, else 0",
                Some(state.diverged.is_some().into()),
            ),
            ("quorate_raft_last_log_index", "Index of the last log entry", state.last_log),
            ("quorate_raft_committed_index", "Index known to be committed", index(state.committed)),
            ("quorate_raft_applied_index", "Index applied to the state machine", index(state.applied)),
            ("quorate_raft_snapshot_index", "Last index in the newest snapshot", index(state.snapshot)),
            ("quorate_raft_purged_index", "Last index purged from the log", index(state.purged)),
        ];
        for (name, help, value) in gauges {
            // Absent rather than 0, which is a valid index.
            if let Some(value) = value {
                let gauge = ConstGauge::new(value);
                gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
            }
        }
        let mut roles = encoder.encode_descriptor(
            "quorate_raft_role",
            "1 for the present role",
            None,
            MetricType::Gauge,
        )?;
        for role in [Role::Learner, Role::Follower, Role::Candidate, Role::Leader, Role::Stopped] {
            let labels = RoleLabels { role: role.to_string() };
            let gauge = ConstGauge::new(u64::from(state.role == role));
            gauge.encode(roles.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_stand_in_their_places_under_names_of_their_own() {
        assert!(Method::ALL.iter().enumerate().all(|(place, method)| *method as usize == place));
        let names: std::collections::BTreeSet<_> = Method::ALL.iter().map(|method| method.name()).collect();
        assert_eq!(names.len(), Method::ALL.len());
    }

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
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), names.len());
        for reason in Reason::all() {
            let failure = Failure { reason: reason.into(), ..Default::default() };
            let name = &names[place_of(&Err::<(), _>(failure))];
            assert_eq!(name.to_uppercase(), reason.name());
        }
    }
}
