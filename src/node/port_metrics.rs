//! What the client port holds for its callers, for Prometheus.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use crate::door::limits::DoorLimits;
use crate::incoming::{Held, Places};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitLabels {
    limit: &'static str,
}

/// One gauge.
pub(crate) fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    value: u64,
) -> Result<(), fmt::Error> {
    let gauge = ConstGauge::new(value);
    gauge.encode(encoder.encode_descriptor(name, help, unit, gauge.metric_type())?)
}

fn counter(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: u64,
) -> Result<(), fmt::Error> {
    let counter = ConstCounter::new(value);
    counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)
}

/// A gauge for each of `limits`.
pub(crate) fn limits(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    limits: &[(&'static str, u64)],
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (limit, value) in limits {
        let gauge = ConstGauge::new(*value);
        gauge.encode(family.encode_family(&LimitLabels { limit })?)?;
    }
    Ok(())
}

/// Reads the port's counts at every scrape.
#[derive(Debug)]
pub(super) struct PortCollector {
    pub(super) places: Arc<Places>,
    pub(super) limits: Arc<DoorLimits>,
}

impl Collector for PortCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (encoder, counts, bounds) = (&mut encoder, self.places.counts(), &*self.limits);
        let held = |what| self.places.held(what) as u64;
        gauge(
            encoder,
            "quorate_server_connections_open",
            "Connections of clients",
            None,
            counts.open as u64,
        )?;
        gauge(
            encoder,
            "quorate_server_connections_reserved",
            "Of these, in the places that are kept back for probes and operators",
            None,
            counts.reserved as u64,
        )?;
        counter(encoder, "quorate_server_connections_accepted", "Connections accepted", counts.accepted)?;
        counter(
            encoder,
            "quorate_server_connections_evicted",
            "Connections closed because others needed their places or their memory",
            counts.evicted,
        )?;
        let bytes = Some(&Unit::Bytes);
        gauge(
            encoder,
            "quorate_server_unsent",
            "Encoded answers that clients have not taken",
            bytes,
            held(Held::Unsent),
        )?;
        gauge(
            encoder,
            "quorate_server_unfinished",
            "Requests that have not arrived as a whole",
            bytes,
            held(Held::Unfinished),
        )?;
        let all = [
            ("max_connections", counts.limit as u64),
            ("max_connection_watches", bounds.watches.each as u64),
            ("max_watches", bounds.watches.all as u64),
            ("max_connection_unsent_bytes", bounds.unsent_bytes.each as u64),
            ("max_unsent_bytes", bounds.unsent_bytes.all as u64),
            ("max_connection_unfinished_bytes", bounds.unfinished_bytes.each as u64),
            ("max_unfinished_bytes", bounds.unfinished_bytes.all as u64),
            ("max_pipeline_queued_bytes", bounds.queued_bytes.each as u64),
            ("max_queued_bytes", bounds.queued_bytes.all as u64),
        ];
        limits(encoder, "quorate_server_limit", "What clients may make the node hold", &all)
    }
}
