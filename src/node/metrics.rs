//! What the node tells Prometheus: its [report](crate::report), and what is counted, each metric by a row of a table.
//!
//! Requests are [counted](crate::door::metrics) at the doors; all else is read from the node at every scrape, without waiting.
//! Other rooms of this crate add theirs with [`Server::with_collector`](super::Server::with_collector).

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::{Registry, Unit};

use super::exposition::Exposition;
use super::families::{EncodeResult, Families};
use super::operated::OperatedNode;
use crate::engine::{Activity, Counters, Engine, LATENCY_BUCKETS_US, READ_LEVELS, REFUSALS};
use crate::logging;
use crate::machine::StateMachine;
use crate::reason::Reason;
use crate::report::{Carried, LedPeer, MemberReport, NodeReport};
use crate::storage::{FLUSH_BUCKETS_US, LogStats};
use crate::trust::peers::Handshakes;
use crate::types::{AckLevel, DiskState, DiskStatus, LogId, PeerStanding, ReadWait, Role};

/// Everything, in the OpenMetrics text format.
///
/// # Errors
/// When a collector fails.
pub(crate) fn encode(registry: &Registry) -> Result<String, fmt::Error> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry)?;
    Ok(text)
}

/// The metrics of a node, in the text format of Prometheus: for the page of a program that has one of its own. What
/// [`Server`](super::Server) tells at `/metrics` has those of its port besides.
pub fn metrics<M: StateMachine>(engine: &Engine<M>) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(NodeCollector(engine.clone())));
    let text = encode(&registry).expect("invariant: a String takes all that is written to it");
    Exposition::Text.write(text)
}

/// Asks the node for its report, and reads its counters, at every scrape.
pub(super) struct NodeCollector<N>(pub(super) N);

impl<N> fmt::Debug for NodeCollector<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeCollector")
    }
}

impl<N: OperatedNode> Collector for NodeCollector<N> {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> EncodeResult {
        let (node, families) = (&self.0, &mut Families(encoder));
        let report = node.report();
        encode_report(families, &report)?;
        encode_peers(families, report.peers())?;
        if let Some(disk) = report.disk.filter(|disk| disk.is_watched) {
            encode_disk(families, &disk)?;
        }
        if let Some(stats) = node.log_stats() {
            encode_log(families, stats)?;
        }
        if let Some(handshakes) = node.handshakes() {
            encode_handshakes(families, &handshakes)?;
        }
        encode_activity(families, node.activity())?;
        encode_snapshots(families, node.activity())?;
        encode_counters(families, node.counters())?;
        let help = "Lines of the process's log that could not be written to standard error";
        families.counter("quorate_process_log_lines_dropped", help, logging::dropped_lines())
    }
}

/// A gauge of the node: name, help, unit, value where there is one. Absent rather than 0, which is a valid index.
type NodeGauge<T> = (&'static str, &'static str, Option<Unit>, fn(&NodeReport) -> Option<T>);

fn index(position: Option<LogId>) -> Option<u64> {
    position.map(|at| at.index)
}

fn gauges() -> [NodeGauge<u64>; 23] {
    let bytes = || Some(Unit::Bytes);
    [
        ("quorate_raft_term", "Current term", None, |r| Some(r.term)),
        ("quorate_raft_is_leader", "1 on the leader, else 0", None, |r| Some(r.leads().into())),
        ("quorate_raft_is_ready", "1 when /readyz?for=reads answers 200, else 0", None, |r| {
            Some(r.ready.into())
        }),
        (
            "quorate_raft_diverged",
            "1 while this node's state differs from the others' and it serves nothing, else 0",
            None,
            |r| Some(r.diverged.is_some().into()),
        ),
        ("quorate_raft_last_log_index", "Index of the last log entry", None, |r| r.offsets.last_log),
        ("quorate_raft_committed_index", "Index known to be committed", None, |r| index(r.offsets.committed)),
        ("quorate_raft_applied_index", "Index applied to the state machine", None, |r| {
            index(r.offsets.applied)
        }),
        ("quorate_raft_snapshot_index", "Last index in the newest snapshot", None, |r| {
            index(r.offsets.snapshot)
        }),
        ("quorate_raft_purged_index", "Last index purged from the log", None, |r| index(r.offsets.purged)),
        ("quorate_raft_lag_entries", "Entries known to be committed, not applied", None, |r| {
            Some(r.lag?.entries)
        }),
        ("quorate_session_open", "Sessions open", None, |r| Some(r.sessions.open)),
        (
            "quorate_session_largest_opener",
            "Sessions of the client connection that has most of them",
            None,
            |r| r.sessions.largest_opener,
        ),
        ("quorate_session_answer", "Answers kept for sessions", bytes(), |r| Some(r.sessions.bytes)),
        ("quorate_state", "State, as its quota counts", bytes(), |r| r.state.bytes),
        ("quorate_state_quota", "The most that the state may be", bytes(), |r| r.state.quota_bytes),
        ("quorate_write_in_flight", "Commands proposed and not yet applied", None, |r| {
            Some(r.in_flight?.commands)
        }),
        ("quorate_write_in_flight", "Bytes of them", bytes(), |r| Some(r.in_flight?.bytes)),
        (
            "quorate_write_waiting_for_all",
            "Writes that are applied and wait until every voter holds them",
            None,
            |r| Some(r.in_flight?.waiting_for_all),
        ),
        (
            "quorate_feed_first_position",
            "What was applied from this position on can be followed and watched",
            None,
            |r| Some(r.feed?.first_position),
        ),
        ("quorate_feed_next_position", "Position after the last one that was applied", None, |r| {
            Some(r.feed?.next_position)
        }),
        ("quorate_event_log_operations", "Operations in the event log", None, |r| {
            Some(r.feed?.event_log_operations)
        }),
        ("quorate_event_log", "Bytes of the event log on disk", bytes(), |r| Some(r.feed?.event_log_bytes)),
        ("quorate_event_log_failing", "1 while the event log cannot be written, else 0", None, |r| {
            Some(r.feed?.event_log_failing.into())
        }),
    ]
}

fn times() -> [NodeGauge<f64>; 2] {
    [
        (
            "quorate_raft_lag",
            "How long ago the first of them was heard to be committed; absent without a leader",
            Some(Unit::Seconds),
            |r| Some(r.lag?.time?.as_secs_f64()),
        ),
        (
            "quorate_raft_leader_heard",
            "How long ago the leader was heard; absent on the leader",
            Some(Unit::Seconds),
            |r| Some(r.lag?.leader_heard?.as_secs_f64()),
        ),
    ]
}

fn encode_report(families: &mut Families<'_>, report: &NodeReport) -> EncodeResult {
    for (name, help, unit, value) in gauges() {
        if let Some(value) = value(report) {
            families.gauge(name, help, unit, value)?;
        }
    }
    for (name, help, unit, value) in times() {
        if let Some(value) = value(report) {
            families.gauge(name, help, unit, value)?;
        }
    }
    if let Some(feed) = report.feed {
        let help = "Times the event log had to begin anew, so that who was behind could not be told";
        families.counter("quorate_event_log_restarts", help, feed.event_log_restarts)?;
    }
    let roles = Role::ALL.map(|role| (role.name(), u64::from(report.role == Some(role))));
    families.gauges("quorate_raft_role", "1 for the present role", None, "role", roles)
}

/// A counter of every peer: name, help, unit, value.
type PeerCount = (&'static str, &'static str, Option<Unit>, fn(&Carried) -> u64);
/// A gauge of peers, on the leader only: name, help, unit, value if there is one.
type Measure = (&'static str, &'static str, Option<Unit>, fn(&LedPeer) -> Option<f64>);

fn encode_peers<'a>(
    families: &mut Families<'_>,
    peers: impl Iterator<Item = &'a MemberReport> + Clone,
) -> EncodeResult {
    let bytes = || Some(Unit::Bytes);
    let counts: [PeerCount; 6] = [
        ("quorate_peer_sent", "Sent to the peer", bytes(), |c| c.sent_bytes),
        ("quorate_peer_sent_messages", "Messages sent to the peer", None, |c| c.sent_messages),
        ("quorate_peer_received", "Received from the peer", bytes(), |c| c.received_bytes),
        ("quorate_peer_received_messages", "Messages received from it", None, |c| c.received_messages),
        ("quorate_peer_connections", "Connections made to the peer", None, |c| c.dialled),
        ("quorate_peer_connections_failed", "Attempts that failed", None, |c| c.dials_failed),
    ];
    for (name, help, unit, value) in counts {
        let of_each = |peer: &MemberReport| Some((peer.node_id.to_string(), value(peer.carried.as_ref()?)));
        families.counters(name, help, unit, "peer", peers.clone().filter_map(of_each))?;
    }
    let measures: [Measure; 5] = [
        ("quorate_peer_lag_entries", "Entries the peer is not known to have", None, |led| {
            Some(led.behind_entries as f64)
        }),
        ("quorate_peer_lag", "Age of the first of them", Some(Unit::Seconds), |led| {
            Some(led.behind.as_secs_f64())
        }),
        ("quorate_peer_heard", "How long ago it answered; absent if never", Some(Unit::Seconds), |led| {
            Some(led.heard?.as_secs_f64())
        }),
        ("quorate_peer_connected", "0 once it counts as disconnected", None, |led| {
            Some(f64::from(u8::from(led.standing != PeerStanding::Disconnected)))
        }),
        ("quorate_peer_snapshot_left", "Left of the snapshot being sent", bytes(), |led| {
            led.snapshot.map(|(sent, total)| total.saturating_sub(sent) as f64)
        }),
    ];
    for (name, help, unit, value) in measures {
        let of_each = |peer: &MemberReport| Some((peer.node_id.to_string(), value(peer.led.as_ref()?)?));
        families.gauges(name, help, unit, "peer", peers.clone().filter_map(of_each))?;
    }
    Ok(())
}

fn encode_handshakes(families: &mut Families<'_>, handshakes: &Handshakes) -> EncodeResult {
    let failed = "Connections at the peer port that ended before their caller had proven who it is";
    let unusable = "Times that peer credentials on disk could not be used, and those before stayed in force";
    for (name, help, value) in [
        ("quorate_peer_handshakes_failed", failed, handshakes.failed()),
        (
            "quorate_peer_connections_plain",
            "Connections with members that are not secured",
            handshakes.plain(),
        ),
        ("quorate_peer_credentials_unusable", unusable, handshakes.reloads_failed()),
    ] {
        families.counter(name, help, value)?;
    }
    if let Some(seconds) = handshakes.certificate_expires_seconds() {
        let help = "Until this node's certificate for other members expires; less than 0 once it has";
        families.gauge("quorate_certificate_expires", help, Some(Unit::Seconds), seconds)?;
    }
    Ok(())
}

fn encode_disk(families: &mut Families<'_>, disk: &DiskStatus) -> EncodeResult {
    let reserved = "Bytes set aside for the log, in the reserve and beyond its end";
    for (name, help, value) in [
        ("quorate_disk_available", "Bytes free on the data directory's disk", disk.available_bytes),
        ("quorate_disk_reserve", reserved, disk.reserve_bytes),
    ] {
        if let Some(value) = value {
            families.gauge(name, help, Some(Unit::Bytes), value)?;
        }
    }
    let help = "How long the present write of the log has been under way";
    let writing = disk.writing_for.unwrap_or_default().as_secs_f64();
    families.gauge("quorate_disk_write_under_way", help, Some(Unit::Seconds), writing)?;
    let states = DiskState::ALL.map(|state| (state.name(), u64::from(disk.state == state)));
    families.gauges("quorate_disk_state", "1 for the present state of the disk", None, "state", states)
}

fn encode_log(families: &mut Families<'_>, stats: &LogStats) -> EncodeResult {
    for (name, help, value) in [
        ("quorate_log_flushes", "Flushes that made writes durable", &stats.flushes),
        ("quorate_log_entries", "Entries written to the log", &stats.entries),
        ("quorate_log_record_bytes", "Bytes of records written to the log", &stats.bytes_written),
    ] {
        families.counter(name, help, value.load(Relaxed))?;
    }
    for (name, help, value) in [
        ("quorate_log_queued_bytes", "Bytes of entries not yet flushed", stats.queued_bytes.load(Relaxed)),
        ("quorate_log_queued_writes", "Writes not yet flushed", stats.queued_writes.load(Relaxed)),
        ("quorate_log_failed", "1 once the log has failed for good", stats.failed.load(Relaxed).into()),
    ] {
        families.gauge(name, help, None, value)?;
    }
    let (total, buckets) = ((&stats.flush_us_sum, &stats.flushes), &stats.flush_us_buckets);
    let help = "Time a flush of the log took";
    families.durations("quorate_log_flush_duration", help, total, (&FLUSH_BUCKETS_US, buckets))
}

fn encode_activity(families: &mut Families<'_>, activity: &Activity) -> EncodeResult {
    let sessions = &activity.sessions;
    for (name, help, value) in [
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
        ("quorate_session_opened", "Sessions opened", &sessions.opened),
        ("quorate_session_closed", "Sessions closed by their owners or by operators", &sessions.closed),
        ("quorate_session_expired", "Sessions closed as unused for too long", &sessions.expired),
        ("quorate_session_evicted", "Sessions closed to make room", &sessions.evicted),
        ("quorate_session_expired_refusals", "Writes of sessions that are gone", &activity.expired_sessions),
        (
            "quorate_state_quota_refusals",
            "Committed commands that were not applied because the state would have outgrown its quota",
            &activity.quota_refusals,
        ),
    ] {
        families.counter(name, help, value.load(Relaxed))?;
    }
    let applying = activity.apply_us.load(Relaxed) as f64 / 1e6;
    families.counter_in("quorate_raft_apply_time", "Time spent applying", Some(Unit::Seconds), applying)?;
    for (name, help, of) in [
        (
            "quorate_raft_commit_duration",
            "On the leader, from append to commit; one batch at a time is sampled",
            &activity.commit,
        ),
        (
            "quorate_raft_apply_duration",
            "On the leader, from append to application; one batch at a time is sampled",
            &activity.apply,
        ),
    ] {
        families.durations(name, help, (&of.sum_us, &of.count), (&LATENCY_BUCKETS_US, &of.buckets))?;
    }
    Ok(())
}

fn encode_snapshots(families: &mut Families<'_>, activity: &Activity) -> EncodeResult {
    let steps = [
        ("built", &activity.snapshots_built),
        ("sent", &activity.snapshots_sent),
        ("installed", &activity.snapshots_installed),
    ];
    let of = |count: &AtomicU64| count.load(Relaxed);
    let count = steps.map(|(step, snapshots)| (step, of(&snapshots.count)));
    families.counters(
        "quorate_snapshot_files",
        "Snapshots built, sent and installed",
        None,
        "step",
        count,
    )?;
    let size = steps.map(|(step, snapshots)| (step, of(&snapshots.bytes)));
    families.counters("quorate_snapshot", "Bytes of them", Some(Unit::Bytes), "step", size)?;
    let time = steps.map(|(step, snapshots)| (step, of(&snapshots.us) as f64 / 1e6));
    families.counters("quorate_snapshot_time", "Time they took", Some(Unit::Seconds), "step", time)?;
    let failures = [
        ("begin", of(&activity.snapshots_not_begun)),
        ("write", of(&activity.snapshots_not_written)),
        ("receive", of(&activity.snapshots_not_received)),
    ];
    let help = "Snapshots refused or given up, by the step";
    families.counters("quorate_snapshot_failures", help, None, "step", failures)?;
    let help = "Times that sending a snapshot went on over another connection";
    families.counter("quorate_snapshot_resumptions", help, of(&activity.snapshots_resumed))?;
    let help = "Size of the newest snapshot's file; 0 for none";
    families.gauge("quorate_snapshot_newest", help, Some(Unit::Bytes), of(&activity.snapshot_bytes))
}

fn encode_counters(families: &mut Families<'_>, counters: &Counters) -> EncodeResult {
    let waiting = ReadWait::ALL.map(|on| (on.name(), counters.waiting(on)));
    families.gauges("quorate_read_waiting", "Reads that wait for this", None, "on", waiting)?;
    let refused = REFUSALS.map(Reason::counter).into_iter().zip(counters.refused());
    families.counters("quorate_write_refusals", "Commands refused", None, "reason", refused)?;
    let acknowledged = AckLevel::ALL.map(|level| (level.name(), counters.acknowledged(level)));
    let help = "Commands acknowledged, by who had them on disk: a quorum, all voters, or only the leader";
    families.counters("quorate_write_acknowledged", help, None, "ack", acknowledged)?;
    let reads = READ_LEVELS.into_iter().zip(counters.reads());
    families.counters("quorate_read_requests", "Reads asked of the engine", None, "level", reads)?;
    for (name, help, value) in [
        (
            "quorate_machine_wake_ups",
            "Commands proposed because the machine had asked to be woken, for the expiry of keys",
            &counters.wake_ups,
        ),
        (
            "quorate_clock_entries",
            "Entries proposed so that time is in the log while something waits for it",
            &counters.clock_entries,
        ),
        (
            "quorate_clock_jumps",
            "Jumps of this node's wall clock by a second or more, in either direction",
            &counters.clock_jumps,
        ),
    ] {
        families.counter(name, help, value.load(Relaxed))?;
    }
    Ok(())
}
