//! What is known of the node's disk, for Prometheus.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use crate::storage::{DiskState, DiskWatch};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

/// Reads the watch at every scrape; it never waits for the disk.
#[derive(Debug)]
pub(super) struct DiskCollector(pub(super) DiskWatch);

impl Collector for DiskCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let status = self.0.status();
        let gauges = [
            ("quorate_disk_available", "Bytes free on the data directory's disk", status.available_bytes),
            (
                "quorate_disk_reserve",
                "Bytes set aside for the log, in the reserve and beyond its end",
                status.reserve_bytes,
            ),
        ];
        for (name, help, value) in gauges {
            if let Some(value) = value {
                let gauge = ConstGauge::new(value);
                let bytes = Unit::Bytes;
                gauge.encode(encoder.encode_descriptor(name, help, Some(&bytes), gauge.metric_type())?)?;
            }
        }
        let writing = status.writing_for.unwrap_or_default().as_secs_f64();
        let gauge = ConstGauge::new(writing);
        let help = "How long the present write of the log has been under way";
        let seconds = Unit::Seconds;
        gauge.encode(encoder.encode_descriptor(
            "quorate_disk_write_under_way",
            help,
            Some(&seconds),
            gauge.metric_type(),
        )?)?;
        let help = "1 for the present state of the disk";
        let mut states = encoder.encode_descriptor("quorate_disk_state", help, None, MetricType::Gauge)?;
        for state in DiskState::ALL {
            let gauge = ConstGauge::new(u64::from(status.state == state));
            gauge.encode(states.encode_family(&StateLabels { state: state.name() })?)?;
        }
        Ok(())
    }
}
