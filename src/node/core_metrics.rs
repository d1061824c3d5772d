//! What the core and the engine count, for Prometheus: elections, commits, reads, snapshots, sessions, writes.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use crate::engine::{Activity, LATENCY_BUCKETS_US, Latency, READ_LEVELS, ReadWait, Refused};

use super::operated::OperatedNode;
use crate::types::AckLevel;

/// Reads the node's counters at every scrape.
pub(super) struct CoreCollector<N>(pub(super) N);

impl<N> fmt::Debug for CoreCollector<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CoreCollector")
    }
}

type Encoded = Result<(), fmt::Error>;

impl<N: OperatedNode> Collector for CoreCollector<N> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Encoded {
        let node = &self.0;
        let encoder = &mut encoder;
        encode_activity(encoder, node.activity())?;
        encode_snapshots(encoder, node.activity())?;
        let lag = node.lag();
        gauge(
            encoder,
            "quorate_raft_lag_entries",
            "Entries known to be committed, not applied",
            lag.entries,
        )?;
        if let Some(time) = lag.time {
            let help = "How long ago the first of them was heard to be committed; absent without a leader";
            seconds(encoder, "quorate_raft_lag", help, time.as_secs_f64())?;
        }
        if let Some(heard) = lag.leader_heard {
            let help = "How long ago the leader was heard; absent on the leader";
            seconds(encoder, "quorate_raft_leader_heard", help, heard.as_secs_f64())?;
        }
        let (sessions, answer_bytes) = node.sessions();
        gauge(encoder, "quorate_session_open", "Sessions open", sessions as u64)?;
        let help = "Sessions of the client connection that has most of them";
        gauge(encoder, "quorate_session_largest_opener", help, node.largest_opener() as u64)?;
        let help = "Answers kept for sessions";
        bytes(encoder, "quorate_session_answer", help, answer_bytes as u64)?;
        encode_state(encoder, node)?;
        let in_flight = node.in_flight();
        let help = "Commands proposed and not yet applied";
        gauge(encoder, "quorate_write_in_flight", help, in_flight.commands as u64)?;
        bytes(encoder, "quorate_write_in_flight", "Bytes of them", in_flight.bytes as u64)?;
        let help = "Writes that are applied and wait until every voter holds them";
        gauge(encoder, "quorate_write_waiting_for_all", help, in_flight.waiting_for_all as u64)?;
        let counters = node.counters();
        let waiting = ReadWait::ALL.map(|on| (on.name(), counters.waiting(on)));
        gauges(encoder, "quorate_read_waiting", "Reads that wait for this", "on", waiting)?;
        let refused = Refused::ALL.map(|why| (why.name(), counters.refused(why)));
        labelled(encoder, "quorate_write_refusals", "Commands refused", None, "reason", refused)?;
        let acknowledged = AckLevel::ALL.map(|level| (level.name(), counters.acknowledged(level)));
        let help = "Commands acknowledged, by who had them on disk: a quorum, all voters, or only the leader";
        labelled(encoder, "quorate_write_acknowledged", help, None, "ack", acknowledged)?;
        let reads = counters.reads();
        let reads = READ_LEVELS.into_iter().zip(reads);
        labelled(encoder, "quorate_read_requests", "Reads asked of the engine", None, "level", reads)?;
        let help = "Commands proposed because the machine had asked to be woken, for the expiry of keys";
        counter(encoder, "quorate_machine_wake_ups", help, &counters.wake_ups)?;
        let help = "Entries proposed so that time is in the log while something waits for it";
        counter(encoder, "quorate_clock_entries", help, &counters.clock_entries)?;
        let help = "Jumps of this node's wall clock by a second or more, in either direction";
        counter(encoder, "quorate_clock_jumps", help, &counters.clock_jumps)
    }
}

fn encode_state<N: OperatedNode>(encoder: &mut DescriptorEncoder<'_>, node: &N) -> Encoded {
    let (state_bytes, quota) = node.state_size();
    if let Some(state_bytes) = state_bytes {
        bytes(encoder, "quorate_state", "State, as its quota counts", state_bytes)?;
    }
    if let Some(quota) = quota {
        bytes(encoder, "quorate_state_quota", "The most that the state may be", quota.bytes)?;
    }
    let help = "Committed commands that were not applied because the state would have outgrown its quota";
    counter(encoder, "quorate_state_quota_refusals", help, &node.activity().quota_refusals)
}

fn encode_activity(encoder: &mut DescriptorEncoder<'_>, activity: &Activity) -> Encoded {
    let counters = [
        ("quorate_raft_elections_started", "Elections this node stood in", &activity.elections_started),
        ("quorate_raft_elections_won", "Elections this node won", &activity.elections_won),
        ("quorate_raft_leader_changes", "Leaders this node has seen take over", &activity.leader_changes),
        ("quorate_raft_apply_batches", "Batches applied", &activity.apply_batches),
        ("quorate_raft_applied_entries", "Entries applied", &activity.applied_entries),
        ("quorate_read_confirmations", "Rounds that confirmed this leader", &activity.read_confirmations),
        ("quorate_read_confirmed_reads", "Reads that shared those rounds", &activity.confirmed_reads),
        ("quorate_log_purges", "Purges of the log behind a snapshot", &activity.purges),
        ("quorate_raft_transfers_begun", "Times it began to hand over the lead", &activity.transfers_begun),
        ("quorate_raft_transfers_succeeded", "Those that another node took", &activity.transfers_succeeded),
        ("quorate_raft_transfers_failed", "Those that nobody took", &activity.transfers_failed),
        (
            "quorate_session_repeated_answers",
            "Repeated writes given their first answer",
            &activity.repeated_answers,
        ),
        ("quorate_session_opened", "Sessions opened", &activity.sessions.opened),
        (
            "quorate_session_closed",
            "Sessions closed by their owners or by operators",
            &activity.sessions.closed,
        ),
        ("quorate_session_expired", "Sessions closed as unused for too long", &activity.sessions.expired),
        ("quorate_session_evicted", "Sessions closed to make room", &activity.sessions.evicted),
        ("quorate_session_expired_refusals", "Writes of sessions that are gone", &activity.expired_sessions),
    ];
    for (name, help, value) in counters {
        counter(encoder, name, help, value)?;
    }
    let metric = ConstCounter::new(activity.apply_us.load(Relaxed) as f64 / 1e6);
    let help = "Time spent applying";
    let unit = Some(&Unit::Seconds);
    metric.encode(encoder.encode_descriptor(
        "quorate_raft_apply_time",
        help,
        unit,
        metric.metric_type(),
    )?)?;
    let help = "On the leader, from append to commit; one batch at a time is sampled";
    latency(encoder, "quorate_raft_commit_duration", help, &activity.commit)?;
    let help = "On the leader, from append to application; one batch at a time is sampled";
    latency(encoder, "quorate_raft_apply_duration", help, &activity.apply)
}

fn encode_snapshots(encoder: &mut DescriptorEncoder<'_>, activity: &Activity) -> Encoded {
    let steps = [
        ("built", &activity.snapshots_built),
        ("sent", &activity.snapshots_sent),
        ("installed", &activity.snapshots_installed),
    ];
    let count = steps.map(|(step, snapshots)| (step, snapshots.count.load(Relaxed)));
    labelled(encoder, "quorate_snapshot_files", "Snapshots built, sent and installed", None, "step", count)?;
    let size = steps.map(|(step, snapshots)| (step, snapshots.bytes.load(Relaxed)));
    labelled(encoder, "quorate_snapshot", "Bytes of them", Some(&Unit::Bytes), "step", size)?;
    let time = steps.map(|(step, snapshots)| (step, snapshots.us.load(Relaxed) as f64 / 1e6));
    labelled(encoder, "quorate_snapshot_time", "Time they took", Some(&Unit::Seconds), "step", time)?;
    let failures = [
        ("begin", &activity.snapshots_not_begun),
        ("write", &activity.snapshots_not_written),
        ("receive", &activity.snapshots_not_received),
    ];
    let failures = failures.map(|(step, count)| (step, count.load(Relaxed)));
    let help = "Snapshots refused or given up, by the step";
    labelled(encoder, "quorate_snapshot_failures", help, None, "step", failures)?;
    let newest = activity.snapshot_bytes.load(Relaxed);
    bytes(encoder, "quorate_snapshot_newest", "Size of the newest snapshot's file; 0 for none", newest)
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> Encoded {
    let metric = ConstGauge::new(value);
    metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
}

/// A gauge for each value of a label.
fn gauges(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &'static str,
    values: impl IntoIterator<Item = (&'static str, u64)>,
) -> Encoded {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (value, count) in values {
        ConstGauge::new(count).encode(family.encode_family(&[(label, value)])?)?;
    }
    Ok(())
}

fn bytes(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> Encoded {
    let metric = ConstGauge::new(value);
    metric.encode(encoder.encode_descriptor(name, help, Some(&Unit::Bytes), metric.metric_type())?)
}

fn seconds(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> Encoded {
    let metric = ConstGauge::new(value);
    metric.encode(encoder.encode_descriptor(name, help, Some(&Unit::Seconds), metric.metric_type())?)
}

fn counter(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: &AtomicU64) -> Encoded {
    let metric = ConstCounter::new(value.load(Relaxed));
    metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
}

/// A counter for each value of a label.
fn labelled<V>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    label: &'static str,
    values: impl IntoIterator<Item = (&'static str, V)>,
) -> Encoded
where
    ConstCounter<V>: EncodeMetric,
{
    let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
    for (value, count) in values {
        let metric = ConstCounter::new(count);
        metric.encode(family.encode_family(&[(label, value)])?)?;
    }
    Ok(())
}

fn latency(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, latency: &Latency) -> Encoded {
    let bounds = LATENCY_BUCKETS_US.iter().map(|us| *us as f64 / 1e6).chain([f64::INFINITY]);
    let buckets: Vec<_> = bounds.zip(latency.buckets.iter().map(|count| count.load(Relaxed))).collect();
    let unit = Some(&Unit::Seconds);
    encoder.encode_descriptor(name, help, unit, MetricType::Histogram)?.encode_histogram::<[(&str, &str); 0]>(
        latency.sum_us.load(Relaxed) as f64 / 1e6,
        latency.count.load(Relaxed),
        &buckets,
        None,
    )
}
