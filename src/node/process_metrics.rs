//! What the process itself counts, for Prometheus.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;

use crate::logging;

/// Reads the counters at every scrape.
#[derive(Debug)]
pub(super) struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counter = ConstCounter::new(logging::dropped_lines());
        let help = "Lines of the process's log that could not be written to standard error";
        let name = "quorate_process_log_lines_dropped";
        counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)
    }
}
