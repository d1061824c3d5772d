//! Families of metrics, written as the tables of those who have them say.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelValue, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

pub(crate) type EncodeResult = Result<(), fmt::Error>;

/// Writes families to whoever scrapes.
pub(crate) struct Families<'a>(pub(crate) DescriptorEncoder<'a>);

impl Families<'_> {
    /// One gauge.
    pub(crate) fn gauge<V>(&mut self, name: &str, help: &str, unit: Option<Unit>, value: V) -> EncodeResult
    where
        ConstGauge<V>: EncodeMetric,
    {
        let metric = ConstGauge::new(value);
        metric.encode(self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?)
    }

    /// One counter without a unit.
    pub(crate) fn counter(&mut self, name: &str, help: &str, value: u64) -> EncodeResult {
        self.counter_in(name, help, None, value)
    }

    /// One counter.
    pub(crate) fn counter_in<V>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        value: V,
    ) -> EncodeResult
    where
        ConstCounter<V>: EncodeMetric,
    {
        let metric = ConstCounter::new(value);
        metric.encode(self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?)
    }

    /// A gauge for each value of a label.
    pub(crate) fn gauges<L: EncodeLabelValue, V>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        label: &'static str,
        samples: impl IntoIterator<Item = (L, V)>,
    ) -> EncodeResult
    where
        ConstGauge<V>: EncodeMetric,
    {
        let mut family = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        for (of, value) in samples {
            ConstGauge::new(value).encode(family.encode_family(&[(label, of)])?)?;
        }
        Ok(())
    }

    /// A counter for each value of a label.
    pub(crate) fn counters<L: EncodeLabelValue, V>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        label: &'static str,
        samples: impl IntoIterator<Item = (L, V)>,
    ) -> EncodeResult
    where
        ConstCounter<V>: EncodeMetric,
    {
        let mut family = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        for (of, value) in samples {
            ConstCounter::new(value).encode(family.encode_family(&[(label, of)])?)?;
        }
        Ok(())
    }

    /// A histogram of durations, all of it counted in microseconds: a count for each of `bounds_us`, not of those before, and
    /// a last one for what exceeds them all.
    pub(crate) fn durations(
        &mut self,
        name: &str,
        help: &str,
        (sum_us, count): (&AtomicU64, &AtomicU64),
        (bounds_us, counts): (&[u64], &[AtomicU64]),
    ) -> EncodeResult {
        let bounds = bounds_us.iter().map(|us| *us as f64 / 1e6).chain([f64::INFINITY]);
        let buckets: Vec<_> = bounds.zip(counts.iter().map(|count| count.load(Relaxed))).collect();
        let (sum, count) = (sum_us.load(Relaxed) as f64 / 1e6, count.load(Relaxed));
        let unit = Some(&Unit::Seconds);
        self.0
            .encode_descriptor(name, help, unit, MetricType::Histogram)?
            .encode_histogram::<[(&str, &str); 0]>(sum, count, &buckets, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::collector::Collector;
    use prometheus_client::registry::Registry;

    #[derive(Debug)]
    struct Durations;

    impl Collector for Durations {
        fn encode(&self, encoder: DescriptorEncoder<'_>) -> EncodeResult {
            let (none, counts) = (AtomicU64::new(0), [AtomicU64::new(2), AtomicU64::new(3)]);
            Families(encoder).durations("took", "It took", (&none, &none), (&[100], &counts))
        }
    }

    #[test]
    fn the_last_bucket_holds_what_exceeds_all_bounds() {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Durations));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in ["took_seconds_bucket{le=\"0.0001\"} 2", "took_seconds_bucket{le=\"+Inf\"} 5"] {
            assert!(text.contains(line), "{text}");
        }
    }
}
