//! Status pages, metrics and settings over a node whose state the test sets.

use std::sync::atomic::Ordering::Relaxed;

use serde_json::{Value, json};

use super::*;
use crate::node::settings::LogLevel;
use crate::proto::v1::admin_server::Admin;

/// `/metrics`, as `accept` has it.
async fn metrics_for(address: SocketAddr, accept: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head =
        format!("GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAccept: {accept}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut text = String::new();
    within(stream.read_to_string(&mut text)).await.unwrap();
    assert!(text.contains("application/openmetrics-text"), "{text}");
    text
}

async fn json(port: &Port, method: &str, path: &str, body: &str) -> (u16, Value) {
    let (code, content_type, body) = port.ask(method, path, body).await;
    assert_eq!(content_type, "application/json", "{path}: {body}");
    (code, serde_json::from_str(&body).unwrap())
}

#[tokio::test]
async fn the_leader_tells_of_every_replica_and_followers_tell_where_to_ask() {
    let port = Port::open().await;
    let (code, answer) = json(&port, "GET", "/replication/replicas", "").await;
    assert_eq!((code, &answer["role"], &answer["leader"]["node_id"]), (200, &json!(Role::Leader), &json!(7)));
    let mut well = answer["replicas"][0].clone();
    let heartbeat = well["last_heartbeat"].take();
    assert!(heartbeat.as_u64().is_some(), "{heartbeat}");
    let expected = json!({
        "kind": "member", "id": 2, "host": "10.0.0.2", "port": 7901, "address": "10.0.0.2:7901",
        "client": "10.0.0.2:7801", "role": MemberKind::Voter,
        "status": PeerStanding::Connected, "last_heartbeat_ms": 30.0, "last_heartbeat": null, "matched": 8,
        "operations_behind": 2, "ms_behind": 1.5, "operations_synced": 5, "snapshot": null,
        "offset": 8, "lag_operations": 2, "lag_ms": 1.5,
    });
    assert_eq!(well, expected);
    let gone = &answer["replicas"][1];
    assert_eq!(
        (&gone["status"], &gone["role"]),
        (&json!(PeerStanding::Disconnected), &json!(MemberKind::Learner))
    );

    port.node.state.send_modify(|state| state.role = Role::Follower);
    let (code, answer) = json(&port, "GET", "/replication/replicas", "").await;
    assert_eq!((code, &answer["leader"]["client"]), (200, &json!("here:7801")));
    assert_eq!(answer["replicas"][0]["status"], Value::Null);
    assert_eq!(answer["replicas"][0]["host"], "10.0.0.2");
}

#[tokio::test]
async fn status_stats_and_their_union() {
    let port = Port::open().await;
    port.node.state.send_modify(|state| {
        (state.last_log, state.committed) = (Some(10), Some(LogId::new(3, 9)));
        state.applied = Some(LogId::new(3, 8));
    });
    let (_, status) = json(&port, "GET", "/replication/status", "").await;
    let offsets = json!({"last_log": 10, "committed": 9, "applied": 8, "snapshot": null, "purged": null});
    assert_eq!(status["offsets"], offsets);
    assert_eq!((&status["lag"]["operations"], &status["lag"]["ms"]), (&json!(1), &json!(0.25)));
    assert_eq!((&status["connected_replicas"], &status["other_members"]), (&json!(1), &json!(2)));
    assert_eq!(status["replicas"].as_array().map(Vec::len), Some(2));
    assert_eq!((&status["healthy"], &status["disk"]["state"]), (&json!(true), &json!(DiskState::Ok)));
    assert_eq!(status["sessions"], json!({"open": 4, "bytes": 400}));

    let (_, stats) = json(&port, "GET", "/replication/stats", "").await;
    assert_eq!(
        (&stats["sent"]["bytes"], &stats["received"]["bytes"]),
        (&json!(100), &json!(3)),
        "no member, but not forgotten"
    );
    assert_eq!((&stats["pending_operations"], &stats["pending_bytes"]), (&json!(3), &json!(300)));
    assert_eq!(stats["peers"][1]["connections_failed"], 2);

    port.node.state.send_modify(|state| state.disk = DiskState::Full);
    let (_, union) = json(&port, "GET", "/stats", "").await;
    assert_eq!((&union["healthy"], &union["applied"]), (&json!(false), &json!(8)));
    assert_eq!((&union["sent_bytes"], &union["cluster"]), (&json!(100), &json!("c")));
}

#[tokio::test]
async fn settings_are_changed_all_or_none() {
    let port = Port::open().await;
    let path = "/replication/configure";
    let before = port.node.settings();
    for (body, error, hint) in [
        (r#"{"max_command_bytes": 50, "nonsense": 1}"#, "no setting \"nonsense\"", "max_command_bytes"),
        (r#"{"max_command_bytes": 50, "node_id": 2}"#, "node_id cannot change", "restart the node"),
        (r#"{"max_command_bytes": 50, "max_inflight_bytes": 1001}"#, "too large", "nothing was changed"),
        (r#"{"max_command_bytes": "a lot"}"#, "whole number, not \"a lot\"", "1048576"),
        (r#"{"max_command_bytes": [1]}"#, "must be a number", "send an object"),
        (r#"{"preferred_leader": 1}"#, "true or false", "true or false"),
        (r#"{"max_command_bytes": 50, "log_level": "info"}"#, "log_level cannot be changed", "by itself"),
        ("[]", "not a JSON object", "send an object"),
        ("", "not a JSON object", "send an object"),
    ] {
        let (code, answer) = json(&port, "POST", path, body).await;
        assert_eq!(code, 400, "{body}");
        assert!(answer["error"].as_str().unwrap().contains(error), "{body}: {answer}");
        assert!(answer["hint"].as_str().unwrap().contains(hint), "{body}: {answer}");
        assert_eq!(port.node.settings(), before, "{body}");
        assert_eq!((&answer["success"], &answer["role"]), (&json!(false), &json!(Role::Leader)), "{answer}");
    }
    let (code, answer) =
        json(&port, "POST", path, r#"{"snapshot_keep_entries": "7", "preferred_leader": true}"#).await;
    assert_eq!(code, 200);
    assert_eq!(answer["settings"]["snapshot_keep_entries"], 7);
    assert_eq!(answer["fixed"], json!({"node_id": 7}), "what the process was told");
    assert_eq!((&answer["success"], &answer["role"]), (&json!(true), &json!(Role::Leader)));
    let (_, now) = json(&port, "GET", path, "").await;
    assert_eq!((&now["settings"], &now["fixed"]), (&answer["settings"], &answer["fixed"]));
    assert!(port.node.settings().preferred_leader);

    let (code, answer) = json(&port, "DELETE", path, "").await;
    assert_eq!((code, answer["hint"].is_string()), (405, true));
    let (code, answer) = json(&port, "POST", path, &" ".repeat(70_000)).await;
    assert_eq!((code, &answer["reason"]), (413, &json!("TOO_LARGE")), "{answer}");
    assert_eq!(answer["success"], false, "{answer}");
    assert_eq!(answer["leader"]["node_id"], 7);
}

/// Whoever announces a body that nobody would take is told at once.
#[tokio::test]
async fn an_absurd_length_is_refused_before_the_body_comes() {
    let port = Port::open().await;
    let mut stream = TcpStream::connect(port.address).await.unwrap();
    let head = "POST /replication/configure HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    within(stream.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer, *b"HTTP/1.1 413");
}

#[tokio::test]
async fn a_node_whose_state_differs_says_so_everywhere() {
    use crate::types::Divergence;
    let port = Port::open().await;
    let (_, status) = json(&port, "GET", "/replication/status", "").await;
    assert_eq!(status["diverged"], Value::Null);
    let divergence = Divergence { at: LogId::new(3, 8), own: 7, majority: Some(8) };
    let said = divergence.to_string();
    port.node.state.send_modify(|state| state.diverged = Some(divergence));
    for path in ["/replication/status", "/stats"] {
        let (_, answer) = json(&port, "GET", path, "").await;
        assert_eq!((&answer["diverged"], &answer["healthy"]), (&json!(said), &json!(false)), "{path}");
    }
    let (_, metrics) = port.http("/metrics").await;
    assert!(metrics.lines().any(|line| line == "quorate_raft_diverged 1"), "{metrics}");
    let admin = members::admin_of(port.node.clone(), None);
    let status = admin.status(tonic::Request::new(v1::StatusRequest {})).await.unwrap().into_inner();
    assert_eq!(status.diverged, said);
}

#[tokio::test]
async fn the_quota_is_changed_by_itself_and_by_the_cluster() {
    let port = Port::open().await;
    let path = "/replication/configure";
    for (body, expected, reason, error, hint) in [
        (
            r#"{"state_quota_bytes": 5000, "max_command_bytes": 50}"#,
            400,
            "INVALID",
            "the cluster's",
            "by itself",
        ),
        (r#"{"state_quota_bytes": "much"}"#, 400, "INVALID", "whole number, not \"much\"", "1048576"),
        (r#"{"state_quota_bytes": 999}"#, 400, "INVALID", "must be from", "leader"),
        (r#"{"state_quota_bytes": 9999}"#, 503, "NO_QUORUM", "lost touch with its quorum", "leader"),
        (r#"{"state_quota_bytes": 9998}"#, 503, "NOT_LEADER", "node 2 at b:7802 leads", "leader"),
        (r#"{"state_quota_bytes": 9997}"#, 500, "INTERRUPTED", "may have been applied", "leader"),
    ] {
        let (code, answer) = json(&port, "POST", path, body).await;
        assert_eq!((code, &answer["reason"]), (expected, &json!(reason)), "{body}: {answer}");
        assert_eq!(answer["maybe_applied"], json!(reason == "INTERRUPTED"), "{body}");
        let leads = if reason == "NOT_LEADER" { 2 } else { 7 };
        assert_eq!(answer["leader"]["node_id"], json!(leads), "{body}");
        assert!(answer["error"].as_str().unwrap().contains(error), "{body}: {answer}");
        assert!(answer["hint"].as_str().unwrap().contains(hint), "{body}: {answer}");
        assert_eq!(port.node.report().state.quota_bytes, None, "{body}");
    }
    let (code, answer) = json(&port, "POST", path, r#"{"state_quota_bytes": 5000}"#).await;
    assert_eq!((code, &answer["settings"]["state_quota_bytes"]), (200, &json!(5000)));
    let quota = || {
        let state = port.node.report().state;
        (state.quota_bytes, state.quota_source)
    };
    assert_eq!(quota(), (Some(5000), Some(QuotaSource::Operator)));
    json(&port, "POST", path, r#"{"state_quota_bytes": 0}"#).await;
    assert_eq!(quota(), (Some(QUOTA.bytes), Some(QUOTA.source)), "the leader's again");
    let (_, metrics) = port.http("/metrics").await;
    for line in
        ["quorate_state_bytes 1000", "quorate_state_quota_bytes 2000", "quorate_state_quota_refusals_total 0"]
    {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in {metrics}");
    }
    let (_, status) = json(&port, "GET", "/replication/status", "").await;
    assert_eq!(status["state"], json!({ "bytes": 1000, "quota_bytes": 2000, "quota_source": "memory" }));
}

#[tokio::test]
async fn the_admin_service_configures_the_log_too() {
    let node = FakeNode::new();
    let applied = Arc::new(Mutex::new(Vec::new()));
    let log = LogLevel::new("info", {
        let applied = applied.clone();
        move |filter: &str| match filter {
            "error" => Err("the log is gone".to_owned()),
            _ => {
                applied.lock().unwrap().push(filter.to_owned());
                Ok(())
            }
        }
    });
    let admin = members::admin_of(node.clone(), Some(log));
    let ask = async |settings: &[(&str, &str)]| {
        let setting = |(name, value): &(&str, &str)| v1::Setting {
            name: (*name).to_owned(),
            value: (*value).to_owned(),
            ..Default::default()
        };
        let request = v1::ConfigureRequest { settings: settings.iter().map(setting).collect() };
        let mut request = tonic::Request::new(request);
        // As the entrance of a node without credentials lets it in.
        request.extensions_mut().insert(crate::door::rights::Principal::everyone());
        admin.configure(request).await.map(tonic::Response::into_inner)
    };
    let mut listed = ask(&[]).await.unwrap().settings;
    let fixed = listed.pop().unwrap();
    assert_eq!((&*fixed.name, &*fixed.value, fixed.changeable), ("node_id", "7", false));
    assert!(listed.iter().all(|setting| setting.changeable));
    let names: Vec<_> = listed.into_iter().map(|setting| setting.name).collect();
    assert_eq!(names, settings::CHANGEABLE);
    let changed =
        ask(&[("log_level", "info,quorate::write=trace"), ("max_command_bytes", "50")]).await.unwrap();
    assert!(changed.settings.iter().any(|setting| setting.value == "info,quorate::write=trace"));
    assert_eq!(*applied.lock().unwrap(), ["info,quorate::write=trace"]);

    for refused in [
        &[("max_command_bytes", "60"), ("log_level", "quorate=loud")][..],
        &[("max_command_bytes", "60"), ("log_level", "error")],
        &[("max_command_bytes", "60"), ("max_command_bytes", "70")],
        &[("log_level", "debug"), ("max_inflight_bytes", "1001")],
    ] {
        let status = ask(refused).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{refused:?}");
        assert_eq!(node.settings().max_command_bytes, 50, "{refused:?}");
    }
    assert_eq!(applied.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn metrics_cover_peers_writes_reads_and_snapshots() {
    let port = Port::open().await;
    let activity = &port.node.observed.activity;
    let counts = [
        &activity.transfers_begun,
        &activity.transfers_succeeded,
        &activity.transfers_failed,
        &activity.snapshots_not_begun,
        &activity.snapshots_not_written,
        &activity.snapshots_not_received,
        &activity.sessions.opened,
        &activity.sessions.closed,
        &activity.sessions.expired,
        &activity.sessions.evicted,
    ];
    for (count, value) in counts.into_iter().zip(1..) {
        count.store(value, Relaxed);
    }
    let (_, text) = port.http("/metrics").await;
    for line in [
        "quorate_peer_lag_entries{peer=\"2\"} 2",
        "quorate_peer_heard_seconds{peer=\"2\"} 0.03",
        "quorate_peer_sent_bytes_total{peer=\"3\"} 30",
        "quorate_peer_connections_failed_total{peer=\"2\"} 2",
        "quorate_peer_connected{peer=\"3\"} 0",
        "quorate_raft_elections_won_total 0",
        "quorate_raft_commit_duration_seconds_count 0",
        "quorate_raft_lag_seconds 0.00025",
        "quorate_write_in_flight 3",
        "quorate_write_in_flight_bytes 300",
        "quorate_write_waiting_for_all 2",
        "quorate_write_acknowledged_total{ack=\"leader\"} 0",
        "quorate_read_waiting{on=\"read_index\"} 0",
        "quorate_read_waiting{on=\"apply\"} 0",
        "quorate_raft_transfers_begun_total 1",
        "quorate_raft_transfers_succeeded_total 2",
        "quorate_raft_transfers_failed_total 3",
        "quorate_snapshot_failures_total{step=\"begin\"} 4",
        "quorate_snapshot_failures_total{step=\"write\"} 5",
        "quorate_snapshot_failures_total{step=\"receive\"} 6",
        "quorate_session_opened_total 7",
        "quorate_session_closed_total 8",
        "quorate_session_expired_total 9",
        "quorate_session_evicted_total 10",
        "quorate_write_refusals_total{reason=\"disk_full\"} 0",
        "quorate_read_requests_total{level=\"lease\"} 0",
        "quorate_session_open 4",
        "quorate_snapshot_bytes_total{step=\"sent\"} 0",
        "quorate_snapshot_time_seconds_total{step=\"built\"} 0",
        "quorate_server_watches_open 0",
        "quorate_server_requests_total{method=\"put\",outcome=\"answer_forgotten\"} 0",
    ] {
        assert!(
            text.lines().any(|shown| shown.strip_suffix(".0").unwrap_or(shown) == line),
            "{line}\n{text}"
        );
    }
    // Each histogram ends with what exceeds all bounds, in both formats.
    let counts = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" histogram"));
    let counts: Vec<_> = counts.collect();
    assert!(counts.contains(&"quorate_raft_commit_duration_seconds"), "{counts:?}");
    let open_metrics = metrics_for(port.address, "application/openmetrics-text").await;
    for (name, text) in counts.iter().flat_map(|name| [(name, &text), (name, &open_metrics)]) {
        let of = format!("{name}_bucket{{");
        let last = text.lines().rfind(|line| line.starts_with(&of)).unwrap();
        assert!(last.contains("le=\"+Inf\""), "{last}");
    }
    // What was never heard has no age.
    assert!(!text.contains("quorate_peer_heard_seconds{peer=\"3\"}"));
    let mut families: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
    let all = families.len();
    families.sort_unstable();
    families.dedup();
    assert_eq!(families.len(), all, "a metric is declared twice");
}
