//! `/replication/*` and `/stats`: how replication goes, as JSON, and settings of the running node.
//!
//! | path | what |
//! |---|---|
//! | `GET /replication/status` | this node: role, offsets, lag, health |
//! | `GET /replication/stats` | this node's counters since it started |
//! | `GET /replication/replicas` | the other members; what only the leader knows of them is null elsewhere |
//! | `GET`, `POST /replication/configure` | settings that can change while the node runs, and the others ([`settings`](super::settings)) |
//! | `GET /stats` | the most asked for of the first three, flat |
//!
//! Every node answers for itself, and names the leader for callers who want to know more. Errors are JSON too:
//! the object that `docs/OPERATIONS.md` has for them, with who leads.
//!
//! # How far behind
//!
//! In operations: entries of the log, memberships and the like included. In milliseconds: for how long the first entry
//! that is missing has been in the leader's log, by the leader's own clock. No two clocks are compared. A replica's lag
//! is therefore what would be lost if it took over now, in time, and includes the way of its last answer back to the
//! leader. On a follower it is how long ago the first entry that it has not applied was heard to be committed; null
//! when it has lost touch with the leader, because then nobody here knows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Bytes, to_bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Serialize;
use serde_json::{Value, json};

use crate::engine::{Carried, Counters, NodeState, PeerStanding, PeerState, Snapshots};
use crate::error::Leader;
use crate::proto::v1::Failure;
use crate::reason::Reason;
use crate::runtime;
use crate::shown::{MESSAGE_BYTES, shortened};
use crate::storage::LogStats;
use crate::types::{AckLevel, LogId, Quota, QuotaSource};

use super::StatusPart;
use super::operated::OperatedNode;
use super::settings::{NodeSettings, NotChanged, Refused};

/// Largest body of a request.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// A body that is too long is read all the same, if it is no longer than this.
const MAX_IGNORED_BYTES: usize = 1024 * 1024;

/// What the routes work with.
#[derive(Clone)]
struct Door<N> {
    node: N,
    settings: NodeSettings<N>,
    /// What the guest adds to the status.
    status: Arc<[(&'static str, StatusPart)]>,
    started: Instant,
}

/// The routes over `node`.
pub(super) fn router<N: OperatedNode>(
    node: N,
    settings: NodeSettings<N>,
    parts: Vec<(&'static str, StatusPart)>,
) -> Router {
    let door = Door { node, settings, status: parts.into(), started: Instant::now() };
    Router::new()
        .route("/replication/status", get(status::<N>))
        .route("/replication/stats", get(stats::<N>))
        .route("/replication/replicas", get(replicas::<N>))
        .route("/replication/configure", get(settings_now::<N>).post(configure::<N>))
        .route("/stats", get(summary::<N>))
        .method_not_allowed_fallback(wrong_method::<N>)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn_with_state(door.clone(), check_length::<N>))
        .with_state(door)
}

fn document(code: StatusCode, value: &impl Serialize) -> Response {
    match serde_json::to_string(value) {
        Ok(mut text) => {
            text.push('\n');
            (code, [(header::CONTENT_TYPE, "application/json")], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// The object that every failure is, as `docs/OPERATIONS.md` has it; `error` is what earlier versions called the message.
pub(crate) fn refusal(
    code: StatusCode,
    reason: Reason,
    leading: Option<&Leader>,
    refused: &Refused,
) -> Response {
    let message = shortened(&refused.error, MESSAGE_BYTES);
    let object = json!({
        "reason": reason.name(),
        "message": message,
        "hint": refused.hint,
        "maybe_applied": false,
        "leader": leader(leading),
        "error": message,
    });
    document(code, &object)
}

/// The same of a failure that says more than that a request makes no sense.
fn failed(failure: &Failure, leading: Option<&Leader>, hint: &str) -> Response {
    let code = StatusCode::from_u16(failure.reason().http_status(failure.maybe_applied));
    let code = code.expect("invariant: the table holds statuses of HTTP");
    let told =
        failure.leader.as_ref().map(|hint| Leader { node_id: hint.node_id, client: hint.client.clone() });
    let object = json!({
        "reason": failure.reason().name(),
        "message": failure.message,
        "hint": hint,
        "maybe_applied": failure.maybe_applied,
        "leader": leader(told.as_ref().or(leading)),
        "error": failure.message,
    });
    document(code, &object)
}

async fn wrong_method<N: OperatedNode>(State(door): State<Door<N>>) -> Response {
    let refused = Refused::new("this method is not allowed here", "use GET, or POST to change settings");
    let leading = door.node.state().leader;
    refusal(StatusCode::METHOD_NOT_ALLOWED, Reason::Invalid, leading.as_ref(), &refused)
}

fn too_long(leading: Option<&Leader>) -> Response {
    let refused = Refused::new(
        format!("the settings take more than {MAX_BODY_BYTES} bytes"),
        "send a JSON object of names and values",
    );
    refusal(StatusCode::PAYLOAD_TOO_LARGE, Reason::TooLarge, leading, &refused)
}

/// Refuses a body that says that it is too long. Of one that is much too long nothing is waited for; another is read to its
/// end first, because a connection that is closed before may cost its client the answer.
async fn check_length<N: OperatedNode>(
    State(door): State<Door<N>>,
    headers: HeaderMap,
    request: Request,
    next: Next,
) -> Response {
    let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    // One that is no number was refused before.
    match length.and_then(|length| length.parse::<usize>().ok()) {
        Some(length) if length > MAX_BODY_BYTES => {
            if length <= MAX_IGNORED_BYTES {
                // However that ends, the answer is the same.
                let _ = to_bytes(request.into_body(), MAX_IGNORED_BYTES).await;
            }
            too_long(door.node.state().leader.as_ref())
        }
        _ => next.run(request).await,
    }
}

async fn settings_now<N: OperatedNode>(State(door): State<Door<N>>) -> Response {
    let object = |settings: &[(&str, Value)]| {
        let members = settings.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
        Value::Object(members.collect())
    };
    let (settings, fixed) = (object(&door.settings.list()), object(door.settings.fixed()));
    document(StatusCode::OK, &json!({ "settings": settings, "fixed": fixed }))
}

async fn configure<N: OperatedNode>(
    State(door): State<Door<N>>,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let body = match body {
        Ok(body) => body,
        Err(rejection) if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => {
            return too_long(door.node.state().leader.as_ref());
        }
        Err(rejection) => {
            let refused = Refused::new("the settings did not arrive as a whole", "send them again");
            let leading = door.node.state().leader;
            return refusal(rejection.status(), Reason::Invalid, leading.as_ref(), &refused);
        }
    };
    match door.settings.configure_json(&body).await {
        Ok(()) => settings_now(State(door)).await,
        Err(NotChanged::Refused(refused)) => {
            let leading = door.node.state().leader;
            refusal(StatusCode::BAD_REQUEST, Reason::Invalid, leading.as_ref(), &refused)
        }
        Err(error) => {
            let hint = error.hint();
            failed(&error.into(), door.node.state().leader.as_ref(), &hint)
        }
    }
}

async fn status<N: OperatedNode>(State(door): State<Door<N>>) -> Response {
    document(StatusCode::OK, &door.status().await)
}

async fn stats<N: OperatedNode>(State(door): State<Door<N>>) -> Response {
    document(StatusCode::OK, &door.stats())
}

async fn replicas<N: OperatedNode>(State(door): State<Door<N>>) -> Response {
    let state = door.node.state();
    let replicas: Vec<_> = door.node.peers().iter().map(Replica::of).collect();
    let answer = json!({
        "node_id": state.node_id,
        "role": state.role,
        "term": state.term,
        "leader": leader(state.leader.as_ref()),
        "replicas": replicas,
    });
    document(StatusCode::OK, &answer)
}

async fn summary<N: OperatedNode>(State(door): State<Door<N>>) -> Response {
    let (status, stats) = (door.status().await, door.stats());
    let answer = json!({
        "node_id": status.node_id,
        "cluster": status.cluster,
        "role": status.role,
        "term": status.term,
        "leader": status.leader,
        "healthy": status.healthy,
        "diverged": status.diverged,
        "last_log": status.offsets.last_log,
        "committed": status.offsets.committed,
        "applied": status.offsets.applied,
        "lag_operations": status.lag.operations,
        "lag_ms": status.lag.ms,
        "connected_replicas": status.connected_replicas,
        "disk": status.disk.state,
        "sessions": status.sessions.open,
        "pending_operations": stats.pending_operations,
        "pending_bytes": stats.pending_bytes,
        "applied_operations": stats.applied_operations,
        "sent_bytes": stats.sent.bytes,
        "received_bytes": stats.received.bytes,
        "snapshot_bytes": stats.snapshot_bytes,
        "uptime_ms": stats.uptime_ms,
        "version": status.version,
    });
    document(StatusCode::OK, &answer)
}

#[derive(Debug, Serialize)]
struct Status {
    node_id: u64,
    cluster: String,
    role: crate::types::Role,
    term: u64,
    leader: Value,
    /// As `/readyz`: it runs, follows or leads, has applied nearly everything, and its disk takes writes.
    healthy: bool,
    /// As `/readyz?for=reads`.
    ready: bool,
    fatal: Option<String>,
    /// How its state differs from the others'; null while it does not.
    diverged: Option<String>,
    offsets: Offsets,
    /// Null where the node does not keep it up to date.
    state_hash: Option<String>,
    state: StateSize,
    lag: LagNow,
    /// Members that answer, on the leader.
    connected_replicas: Option<usize>,
    /// Members other than this one.
    replicas: usize,
    disk: Disk,
    sessions: Sessions,
    /// What the guest adds.
    #[serde(flatten)]
    guest: serde_json::Map<String, Value>,
    uptime_ms: u64,
    version: &'static str,
}

/// Bytes of state; null where they are not known.
#[derive(Debug, Serialize)]
struct StateSize {
    bytes: Option<u64>,
    quota_bytes: Option<u64>,
    /// `memory` or `operator`.
    quota_source: Option<QuotaSource>,
}

impl StateSize {
    fn of(bytes: Option<u64>, quota: Option<Quota>) -> Self {
        let (quota_bytes, quota_source) = quota.map(|quota| (quota.bytes, quota.source)).unzip();
        Self { bytes, quota_bytes, quota_source }
    }
}

/// Indexes in the log; null where there is none.
#[derive(Debug, Serialize)]
struct Offsets {
    last_log: Option<u64>,
    committed: Option<u64>,
    applied: Option<u64>,
    snapshot: Option<u64>,
    purged: Option<u64>,
}

#[derive(Debug, Serialize)]
struct LagNow {
    /// Known to be committed and not yet applied.
    operations: u64,
    ms: Option<f64>,
    /// How long ago the leader was heard; null on the leader.
    leader_heard_ms: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Disk {
    state: &'static str,
    available_bytes: Option<u64>,
    reserve_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Sessions {
    open: usize,
    bytes: usize,
}

#[derive(Debug, Serialize)]
struct Stats {
    node_id: u64,
    uptime_ms: u64,
    sent: Amount,
    received: Amount,
    peers: Vec<PeerTraffic>,
    /// Proposed on this node and not yet applied.
    pending_operations: usize,
    pending_bytes: usize,
    acknowledged: Acknowledged,
    applied_operations: u64,
    apply_batches: u64,
    snapshot_bytes: u64,
    snapshots_built: SnapshotCount,
    snapshots_sent: SnapshotCount,
    snapshots_installed: SnapshotCount,
    elections_started: u64,
    elections_won: u64,
    leader_changes: u64,
    /// Null without a disk.
    log: Option<Log>,
}

#[derive(Debug, Default, Serialize)]
struct Amount {
    bytes: u64,
    messages: u64,
}

/// Writes acknowledged on this node, by what that promises.
#[derive(Debug, Serialize)]
struct Acknowledged {
    quorum: u64,
    all: u64,
    /// Not durable on a quorum when they were acknowledged.
    leader: u64,
}

#[derive(Debug, Serialize)]
struct PeerTraffic {
    node_id: u64,
    sent: Amount,
    received: Amount,
    connections: u64,
    connections_failed: u64,
}

#[derive(Debug, Serialize)]
struct SnapshotCount {
    count: u64,
    bytes: u64,
    ms: f64,
}

#[derive(Debug, Serialize)]
struct Log {
    flushes: u64,
    /// Null before the first flush, as the next.
    flush_ms_mean: Option<f64>,
    flush_ms_max: Option<f64>,
    entries: u64,
    record_bytes: u64,
    queued_bytes: u64,
    queued_writes: u64,
}

/// One of the other members.
#[derive(Debug, Serialize)]
struct Replica {
    id: u64,
    host: String,
    port: Option<u16>,
    /// Null until it has told.
    client: Option<String>,
    role: &'static str,
    /// Null on a node that does not lead, as all that follows.
    status: Option<&'static str>,
    last_heartbeat_ms: Option<f64>,
    last_heartbeat: Option<String>,
    matched: Option<u64>,
    operations_behind: Option<u64>,
    ms_behind: Option<f64>,
    /// Accepted from this leader since its process started.
    operations_synced: Option<u64>,
    /// Null when none is under way.
    snapshot: Option<Sending>,
}

#[derive(Debug, Serialize)]
struct Sending {
    sent_bytes: u64,
    total_bytes: u64,
}

impl<N: OperatedNode> Door<N> {
    fn uptime_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    async fn status(&self) -> Status {
        let node = &self.node;
        let told = node.status().await;
        let (state, lag, disk, peers) = (told.state, node.lag(), node.disk(), node.peers());
        let (open, bytes) = node.sessions();
        let connected = |peers: &[PeerState]| {
            let standings = peers.iter().filter_map(|peer| peer.led.as_ref()).map(|led| led.standing());
            standings.filter(|standing| *standing != PeerStanding::Disconnected).count()
        };
        Status {
            node_id: state.node_id,
            cluster: told.cluster,
            role: state.role,
            term: state.term,
            leader: leader(state.leader.as_ref()),
            healthy: state.is_ready() && state.disk.takes_writes(),
            ready: state.is_ready(),
            fatal: state.fatal.as_ref().map(ToString::to_string),
            diverged: state.diverged.as_ref().map(ToString::to_string),
            offsets: Offsets::of(&state),
            state_hash: told.state_hash.map(|hash| format!("{hash:016x}")),
            state: StateSize::of(told.state_bytes, told.quota),
            lag: LagNow {
                operations: lag.entries,
                ms: lag.time.map(ms),
                leader_heard_ms: lag.leader_heard.map(ms),
            },
            connected_replicas: (state.role == crate::types::Role::Leader).then(|| connected(&peers)),
            replicas: peers.len(),
            disk: Disk {
                state: disk.state.name(),
                available_bytes: disk.available_bytes,
                reserve_bytes: disk.reserve_bytes,
            },
            sessions: Sessions { open, bytes },
            guest: self.status.iter().map(|(name, part)| ((*name).to_owned(), part())).collect(),
            uptime_ms: self.uptime_ms(),
            version: env!("CARGO_PKG_VERSION"),
        }
    }

    fn stats(&self) -> Stats {
        let node = &self.node;
        let (in_flight, activity, peers) = (node.in_flight(), node.activity(), node.peers());
        let total = |bytes: fn(&Carried) -> u64| peers.iter().map(|peer| bytes(&peer.carried)).sum();
        let count = |counter: &AtomicU64| counter.load(Relaxed);
        let snapshots = |snapshots: &Snapshots| SnapshotCount {
            count: count(&snapshots.count),
            bytes: count(&snapshots.bytes),
            ms: count(&snapshots.us) as f64 / 1e3,
        };
        Stats {
            node_id: node.state().node_id,
            uptime_ms: self.uptime_ms(),
            sent: Amount {
                bytes: total(|carried| carried.sent_bytes),
                messages: total(|carried| carried.sent_messages),
            },
            received: Amount {
                bytes: total(|carried| carried.received_bytes),
                messages: total(|carried| carried.received_messages),
            },
            peers: peers.iter().map(PeerTraffic::of).collect(),
            pending_operations: in_flight.commands,
            pending_bytes: in_flight.bytes,
            acknowledged: Acknowledged::of(node.counters()),
            applied_operations: count(&activity.applied_entries),
            apply_batches: count(&activity.apply_batches),
            snapshot_bytes: count(&activity.snapshot_bytes),
            snapshots_built: snapshots(&activity.snapshots_built),
            snapshots_sent: snapshots(&activity.snapshots_sent),
            snapshots_installed: snapshots(&activity.snapshots_installed),
            elections_started: count(&activity.elections_started),
            elections_won: count(&activity.elections_won),
            leader_changes: count(&activity.leader_changes),
            log: node.log_stats().map(Log::of),
        }
    }
}

impl Offsets {
    fn of(state: &NodeState) -> Self {
        let index = |position: Option<LogId>| position.map(|log_id| log_id.index);
        Self {
            last_log: state.last_log,
            committed: index(state.committed),
            applied: index(state.applied),
            snapshot: index(state.snapshot),
            purged: index(state.purged),
        }
    }
}

impl Acknowledged {
    fn of(counters: &Counters) -> Self {
        let [quorum, all, leader] =
            [AckLevel::Quorum, AckLevel::All, AckLevel::Leader].map(|level| counters.acknowledged(level));
        Self { quorum, all, leader }
    }
}

impl PeerTraffic {
    fn of(peer: &PeerState) -> Self {
        let carried = peer.carried;
        Self {
            node_id: peer.node_id,
            sent: Amount { bytes: carried.sent_bytes, messages: carried.sent_messages },
            received: Amount { bytes: carried.received_bytes, messages: carried.received_messages },
            connections: carried.dialled,
            connections_failed: carried.dials_failed,
        }
    }
}

impl Log {
    fn of(stats: &LogStats) -> Self {
        let flushes = stats.flushes.load(Relaxed);
        let us = |counter: &AtomicU64| counter.load(Relaxed) as f64 / 1e3;
        Self {
            flushes,
            flush_ms_mean: (flushes > 0).then(|| us(&stats.flush_us_sum) / flushes as f64),
            flush_ms_max: (flushes > 0).then(|| us(&stats.flush_us_max)),
            entries: stats.entries.load(Relaxed),
            record_bytes: stats.bytes_written.load(Relaxed),
            queued_bytes: stats.queued_bytes.load(Relaxed),
            queued_writes: stats.queued_writes.load(Relaxed),
        }
    }
}

impl Replica {
    fn of(peer: &PeerState) -> Self {
        let (host, port) = peer.member.peer.rsplit_once(':').unwrap_or((&peer.member.peer, ""));
        let led = peer.led.as_ref();
        Self {
            id: peer.node_id,
            host: host.to_owned(),
            port: port.parse().ok(),
            client: Some(peer.member.client.clone()).filter(|client| !client.is_empty()),
            role: if peer.voter { "voter" } else { "learner" },
            status: led.map(|led| standing(led.standing())),
            last_heartbeat_ms: led.and_then(|led| led.heard).map(ms),
            last_heartbeat: led.and_then(|led| led.heard).map(ago),
            matched: led.and_then(|led| led.matched),
            operations_behind: led.map(|led| led.behind_entries),
            ms_behind: led.map(|led| ms(led.behind)),
            operations_synced: led.map(|led| led.accepted_entries),
            snapshot: led
                .and_then(|led| led.snapshot)
                .map(|(sent_bytes, total_bytes)| Sending { sent_bytes, total_bytes }),
        }
    }
}

fn standing(standing: PeerStanding) -> &'static str {
    match standing {
        PeerStanding::Connected => "Connected",
        PeerStanding::Syncing => "Syncing",
        PeerStanding::Lagging => "Lagging",
        PeerStanding::Disconnected => "Disconnected",
    }
}

fn leader(leader: Option<&Leader>) -> Value {
    leader.map_or(Value::Null, |leader| json!({ "node_id": leader.node_id, "client": leader.client }))
}

fn ms(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

/// The wall clock `time` ago, as RFC 3339 in UTC.
fn ago(time: Duration) -> String {
    let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    rfc3339(runtime::unix_time_ms().saturating_sub(ms))
}

fn rfc3339(unix_ms: u64) -> String {
    let timestamp = prost_types::Timestamp {
        seconds: i64::try_from(unix_ms / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(unix_ms % 1000 * 1_000_000).expect("invariant: less than a second"),
    };
    timestamp.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339_in_utc() {
        assert_eq!(rfc3339(1_767_225_600_123), "2026-01-01T00:00:00.123Z");
        assert_eq!(rfc3339(951_782_400_000), "2000-02-29T00:00:00Z");
    }
}
