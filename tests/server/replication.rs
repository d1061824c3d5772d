//! `/replication/*` and metrics in front of a real engine.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use quorate::kv::machine::KvMachine;
use quorate::testkit::proto::peer::{LogId, Request, SnapshotPiece, Vote, request, response};
use quorate::testkit::proto::v1::SnapshotRequest;
use quorate::testkit::proto::v1::admin_client::AdminClient;
use quorate::{Engine, EngineConfig, Role};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::{DEADLINE, channel, put_many, with_node};

/// Code and body of an answer.
pub(crate) async fn http(address: SocketAddr, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

pub(crate) async fn json_of(address: SocketAddr, method: &str, path: &str, body: &str) -> (u16, Value) {
    let (code, text) = http(address, method, path, body).await;
    (code, serde_json::from_str(&text).unwrap())
}

/// The value of a metric without labels, or with those that are part of `name`.
pub(crate) fn metric(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("there is no {name} in {text}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_shows_in_status_stats_and_metrics() {
    const PUTS: u64 = 500;
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        put_many(address, PUTS).await;
        // A node alone has things to agree on with itself too, at any time.
        let settled = async {
            loop {
                let told = json_of(address, "GET", "/replication/status", "").await;
                let offsets = &told.1["offsets"];
                if offsets["applied"] == offsets["committed"] {
                    return told;
                }
            }
        };
        let (code, status) = tokio::time::timeout(DEADLINE, settled).await.unwrap();
        assert_eq!((code, &status["role"], &status["healthy"]), (200, &json!(Role::Leader), &json!(true)));
        assert_eq!(status["lag"], json!({"operations": 0, "ms": 0.0, "leader_heard_ms": null}));
        assert_eq!((&status["connected_replicas"], &status["replicas"]), (&json!(0), &json!([])));
        assert_eq!((&status["stats"]["role"], &status["enabled"]), (&json!(Role::Leader), &json!(true)));
        assert_ne!(status["disk"]["state"], Value::Null);

        let settled = async {
            loop {
                let (_, stats) = json_of(address, "GET", "/replication/stats", "").await;
                if (&stats["pending_operations"], &stats["pending_bytes"]) == (&json!(0), &json!(0)) {
                    return stats;
                }
            }
        };
        let stats = tokio::time::timeout(DEADLINE, settled).await.unwrap();
        assert!(stats["applied_operations"].as_u64().unwrap() >= PUTS, "{stats}");
        assert!(stats["log"]["flush_ms_mean"].as_f64().unwrap() > 0.0);
        let (_, union) = json_of(address, "GET", "/stats", "").await;
        assert!(union["applied"].as_u64() >= status["offsets"]["applied"].as_u64(), "{union} {status}");

        let settled = async {
            loop {
                let (_, text) = http(address, "GET", "/metrics", "").await;
                let samples = metric(&text, "quorate_raft_commit_duration_seconds_count");
                if metric(&text, "quorate_write_in_flight") == 0.0
                    && metric(&text, "quorate_raft_apply_duration_seconds_count") == samples
                {
                    return (text, samples);
                }
            }
        };
        let (text, samples) = tokio::time::timeout(DEADLINE, settled).await.unwrap();
        assert!(metric(&text, "quorate_raft_applied_entries_total") >= PUTS as f64);
        assert_eq!(metric(&text, "quorate_raft_elections_won_total"), 1.0);
        assert!(samples >= 1.0, "batches are followed to their commit");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_takes_effect_at_once_and_shows() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        let path = "/replication/configure";
        let (code, answer) = json_of(address, "POST", path, r#"{"max_command_bytes": 1024}"#).await;
        assert_eq!((code, &answer["settings"]["max_command_bytes"]), (200, &json!(1024)));
        let mut kv = quorate::testkit::proto::v1::kv_client::KvClient::new(crate::channel(address).await);
        let put = quorate::testkit::proto::v1::PutRequest {
            key: "k".into(),
            value: vec![0; 1024].into(),
            ..Default::default()
        };
        assert_eq!(kv.put(put.clone()).await.unwrap_err().code(), tonic::Code::InvalidArgument);
        let (_, text) = http(address, "GET", "/metrics", "").await;
        assert_eq!(metric(&text, "quorate_write_refusals_total{reason=\"too_large\"}"), 1.0);
        assert_eq!(metric(&text, "quorate_server_requests_total{method=\"put\",outcome=\"too_large\"}"), 1.0);

        let (code, answer) = json_of(address, "POST", path, r#"{"snapshot_every_entries": 0}"#).await;
        assert_eq!((code, answer["hint"].is_string()), (400, true), "{answer}");
        let (code, _) = json_of(address, "POST", path, r#"{"max_command_bytes": 2048}"#).await;
        assert_eq!(code, 200);
        kv.put(put).await.unwrap();
        assert!(
            !json_of(address, "GET", path, "").await.1["settings"]["preferred_leader"].as_bool().unwrap()
        );
    })
    .await;
}

/// What a leader is told that sends a snapshot which makes no sense shows where it was to be received.
#[tokio::test(flavor = "multi_thread")]
async fn snapshots_that_are_not_taken_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::open(EngineConfig::new(1, dir.path(), "127.0.0.1:0"), KvMachine::default());
    let engine = engine.await.unwrap();
    let (requests, arrivals) = mpsc::channel(8);
    let (answers, mut responses) = mpsc::channel(8);
    let serving = quorate::testkit::runtime::spawn(engine.peer_door().serve(2, arrivals.into(), answers));
    for (id, offset) in [(1, 0), (2, 5)] {
        let body = Some(request::Body::Snapshot(SnapshotPiece { offset, ..Default::default() }));
        requests.send(Request { id, body }).await.unwrap();
        let answer = responses.recv().await.unwrap();
        assert!(matches!(answer.body, Some(response::Body::Failure(_))), "{answer:?}");
    }
    // One that says nothing impossible, and is damaged: whoever sent it is not told where it would have been.
    let piece = SnapshotPiece {
        vote: Some(Vote { term: 2, node_id: 2, committed: true }),
        last_log: Some(LogId { term: 2, index: 1_000 }),
        bytes: b"no snapshot".as_slice().into(),
        last: true,
        ..Default::default()
    };
    let body = Some(request::Body::Snapshot(piece));
    requests.send(Request { id: 3, body }).await.unwrap();
    let Some(response::Body::Failure(told)) = responses.recv().await.unwrap().body else {
        panic!("it was taken")
    };
    assert!(!told.contains('/'), "{told}");
    assert!(told.contains("snapshot") && told.contains("byte"), "{told}");
    drop(requests);
    serving.await.unwrap();
    let failed = engine.activity().snapshots_not_received.load(Ordering::Relaxed);
    assert_eq!(failed, 2, "the second piece fails with the first");
    engine.shutdown().await;
}

/// The guide's alarms name metrics; one that does not exist would never ring.
#[tokio::test(flavor = "multi_thread")]
async fn every_metric_that_the_guide_names_exists() {
    let guide = include_str!("../../docs/OPERATIONS.md");
    let words = guide.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let named: Vec<_> = words.filter(|word| word.starts_with("quorate_") && !word.ends_with('_')).collect();
    assert!(named.len() > 10);
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        // Some tell of a snapshot, and there is none before somebody asks for one.
        put_many(address, 1).await;
        let mut admin = AdminClient::new(channel(address).await);
        admin.snapshot(SnapshotRequest {}).await.unwrap();
        // The leader agrees with itself on a quota a moment after it leads.
        let agreed = async {
            loop {
                let (_, text) = http(address, "GET", "/metrics", "").await;
                if text.contains("\nquorate_state_quota_bytes ") {
                    return text;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let text = tokio::time::timeout(DEADLINE, agreed).await.expect("there is no quota");
        let declared: Vec<_> =
            text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        // What only nodes tell that have certificates or a secret, as it is written down.
        let sources =
            [include_str!("../../src/node/metrics.rs"), include_str!("../../src/node/port_metrics.rs")];
        let of_secured = |name: &str| {
            let plain =
                ["_total", "_seconds"].iter().find_map(|unit| name.strip_suffix(unit)).unwrap_or(name);
            let is_theirs = ["certificate", "credentials", "handshakes", "connections_plain"]
                .iter()
                .any(|word| name.contains(word));
            is_theirs && sources.iter().any(|source| source.contains(&format!("\"{plain}\"")))
        };
        for name in named {
            assert!(
                // The one format names counters with their suffix, the other without.
                declared.contains(&name)
                    || declared.contains(&name.strip_suffix("_total").unwrap_or(name))
                    || of_secured(name),
                "{name} is none of {declared:?}"
            );
        }
    })
    .await;
}

/// Those that need a disk are among them, and no name is given up by accident.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_has_all_its_metrics() {
    let dir = tempfile::tempdir().unwrap();
    with_node(dir.path(), async |address| {
        put_many(address, 1).await;
        let mut text = String::new();
        // The quota is agreed on a little later than the node is ready.
        while !text.contains("quorate_state_quota_bytes") {
            text = http(address, "GET", "/metrics", "").await.1;
        }
        let names = text.lines().filter(|line| !line.contains("method=\""));
        let mut names: Vec<_> = names
            .map(|line| match line.starts_with('#') {
                true => line,
                false => line.rsplit_once(' ').unwrap().0,
            })
            .collect();
        names.sort_unstable();
        let names = names.join("\n") + "\n";
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/metrics-names.txt");
        if std::env::var_os("QUORATE_GOLDEN").is_some() {
            std::fs::write(path, &names).unwrap();
        }
        assert!(names == std::fs::read_to_string(path).unwrap(), "{names}");
    })
    .await;
}
