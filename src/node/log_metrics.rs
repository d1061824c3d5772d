//! The durable log's counters, for Prometheus.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use crate::storage::{FLUSH_BUCKETS_US, LogStats};

/// Reads the counters at every scrape.
#[derive(Debug)]
pub(super) struct LogCollector(pub(super) Arc<LogStats>);

impl Collector for LogCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let stats = &*self.0;
        let counters = [
            ("quorate_log_flushes", "Flushes that made writes durable", &stats.flushes),
            ("quorate_log_entries", "Entries written to the log", &stats.entries),
            ("quorate_log_record_bytes", "Bytes of records written to the log", &stats.bytes_written),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value.load(Relaxed));
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        let gauges = [
            (
                "quorate_log_queued_bytes",
                "Bytes of entries not yet flushed",
                stats.queued_bytes.load(Relaxed),
            ),
            ("quorate_log_queued_writes", "Writes not yet flushed", stats.queued_writes.load(Relaxed)),
            ("quorate_log_failed", "1 once the log has failed for good", stats.failed.load(Relaxed).into()),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let seconds = Unit::Seconds;
        let help = "Time a flush of the log took";
        let histogram = MetricType::Histogram;
        encoder
            .encode_descriptor("quorate_log_flush_duration", help, Some(&seconds), histogram)?
            .encode_histogram::<[(&str, &str); 0]>(
                micros(&stats.flush_us_sum),
                stats.flushes.load(Relaxed),
                &buckets(stats),
                None,
            )
    }
}

fn micros(value: &AtomicU64) -> f64 {
    value.load(Relaxed) as f64 / 1e6
}

/// Upper bound in seconds, and how many flushes took no longer than it and longer than the one before.
fn buckets(stats: &LogStats) -> Vec<(f64, u64)> {
    let bounds = FLUSH_BUCKETS_US.iter().map(|us| *us as f64 / 1e6).chain([f64::INFINITY]);
    bounds.zip(stats.flush_us_buckets.iter().map(|count| count.load(Relaxed))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::registry::Registry;

    #[test]
    fn the_last_bucket_holds_what_exceeds_all_bounds() {
        let stats = Arc::new(LogStats::default());
        stats.flush_us_buckets.last().unwrap().store(3, Relaxed);
        let mut registry = Registry::default();
        registry.register_collector(Box::new(LogCollector(stats)));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("quorate_log_flush_duration_seconds_bucket{le=\"+Inf\"} 3"), "{text}");
    }
}
