//! What a node tells of itself, on every interface, word for word: other people's programs read it.

use std::fmt::Write as _;
use std::sync::atomic::Ordering::Relaxed;

use serde_json::Value;
use tonic::Request;

use super::*;
use crate::golden::golden;
use crate::proto::v1::admin_server::Admin;
use crate::types::Divergence;

/// A leader of whom everything is known.
fn leads(state: &mut NodeState) {
    state.last_log = Some(10);
    (state.committed, state.applied) = (Some(LogId::new(3, 9)), Some(LogId::new(3, 8)));
    (state.snapshot, state.purged) = (Some(LogId::new(2, 4)), Some(LogId::new(1, 2)));
    state.disk = DiskState::Low;
}

/// A follower that is not well.
fn follows(state: &mut NodeState) {
    leads(state);
    (state.role, state.disk) = (Role::Follower, DiskState::Full);
    state.leader = Some(Leader { node_id: 2, client: "10.0.0.2:7801".to_owned() });
    state.diverged = Some(Divergence { at: LogId::new(3, 8), own: 7, majority: Some(8) });
}

/// One that has met its end, and has never had anything.
fn stopped(state: &mut NodeState) {
    (state.role, state.leader, state.disk) = (Role::Stopped, None, DiskState::Stalled);
    state.last_log = None;
    state.fatal = Some(FatalError::Core("fsync failed".to_owned()));
}

/// Makes a node one of those.
type Become = fn(&mut NodeState);

const STATES: [(&str, Become); 3] = [("leader", leads), ("follower", follows), ("stopped", stopped)];

/// A port before a node that has counted something of everything.
async fn told(state: Become) -> Port {
    let port = Port::open().await;
    port.node.state.send_modify(state);
    let observed = &port.node.observed;
    let (activity, counters) = (&observed.activity, &observed.counters);
    let snapshots = [&activity.snapshots_built, &activity.snapshots_sent, &activity.snapshots_installed];
    let latencies = [&activity.commit, &activity.apply];
    let counts = [
        &activity.elections_started,
        &activity.elections_won,
        &activity.leader_changes,
        &activity.apply_batches,
        &activity.applied_entries,
        &activity.apply_us,
        &activity.read_confirmations,
        &activity.confirmed_reads,
        &activity.snapshots_not_begun,
        &activity.snapshots_not_written,
        &activity.snapshots_not_received,
        &activity.snapshots_resumed,
        &activity.snapshot_bytes,
        &activity.purges,
        &activity.repeated_answers,
        &activity.quota_refusals,
        &activity.expired_sessions,
        &activity.sessions.opened,
        &activity.sessions.closed,
        &activity.sessions.expired,
        &activity.sessions.evicted,
        &activity.transfers_begun,
        &activity.transfers_succeeded,
        &activity.transfers_failed,
        &counters.wake_ups,
        &counters.clock_entries,
        &counters.clock_jumps,
    ]
    .into_iter()
    .chain(snapshots.into_iter().flat_map(|of| [&of.count, &of.bytes, &of.us]))
    .chain(latencies.into_iter().flat_map(|of| [&of.count, &of.sum_us, &of.buckets[3]]));
    for (count, value) in counts.zip(101..) {
        count.store(value, Relaxed);
    }
    *observed.quota.lock().unwrap() = Some(QUOTA);
    port
}

/// Times of day, and since the port was opened.
const PASSING: [&str; 3] = ["last_heartbeat", "last_sync", "uptime_ms"];

fn without_what_passes(value: &mut Value) {
    match value {
        Value::Object(object) => {
            for (name, value) in object.iter_mut() {
                match PASSING.contains(&&**name) && !value.is_null() {
                    true => *value = "at some time".into(),
                    false => without_what_passes(value),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(without_what_passes),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[tokio::test]
async fn the_pages() {
    for (name, state) in STATES {
        let port = told(state).await;
        let mut text = String::new();
        for path in ["/replication/status", "/replication/stats", "/replication/replicas", "/stats"] {
            let (code, body) = port.http(path).await;
            let mut value: Value = serde_json::from_str(&body).unwrap();
            without_what_passes(&mut value);
            writeln!(text, "GET {path} → {code}\n{value:#}\n").unwrap();
        }
        for path in ["/livez", "/readyz", "/readyz?for=reads"] {
            let (code, body) = port.http(path).await;
            writeln!(text, "GET {path} → {code}\n{body}").unwrap();
        }
        golden(&format!("pages-{name}.txt"), &text);
    }
}

#[tokio::test]
async fn the_admin_service() {
    for (name, state) in STATES {
        let port = told(state).await;
        let admin = members::admin_of(port.node.clone(), None);
        let status = admin.status(Request::new(v1::StatusRequest {})).await.unwrap().into_inner();
        let list = admin.member_list(Request::new(v1::MemberListRequest {})).await.unwrap().into_inner();
        golden(&format!("admin-{name}.txt"), &format!("{status:#?}\n{list:#?}\n"));
    }
}

/// Sorted, as which comes first says nothing. Requests of one method stand for all.
#[tokio::test]
async fn the_metrics() {
    for (name, state) in STATES {
        let port = told(state).await;
        let (_, text) = port.http("/metrics").await;
        // Each with what is said of it, and its samples.
        let mut families: Vec<(String, Vec<&str>)> = Vec::new();
        for line in text.lines() {
            let is_of_others = line.contains("method=\"") && !line.contains("method=\"get\"");
            let passes =
                ["quorate_server_connections", "quorate_server_limit{limit=\"max_conn", "quorate_process"];
            if is_of_others || passes.iter().any(|metric| line.starts_with(metric)) {
                continue;
            }
            match line.strip_prefix("# ") {
                Some(help) if help.starts_with("HELP") => families.push((format!("# {help}\n"), Vec::new())),
                Some(comment) => writeln!(families.last_mut().unwrap().0, "# {comment}").unwrap(),
                None => families.last_mut().unwrap().1.push(line),
            }
        }
        families.sort();
        let mut sorted = String::new();
        for (comments, mut samples) in families {
            samples.sort_unstable();
            writeln!(sorted, "{comments}{}", samples.join("\n")).unwrap();
        }
        golden(&format!("metrics-{name}.txt"), &sorted);
    }
}
