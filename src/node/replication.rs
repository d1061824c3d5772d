//! `/replication/*` and `/stats`: how replication goes, as JSON, and settings of the running node.
//!
//! | path | what |
//! |---|---|
//! | `GET /replication/status` | this node: role, offsets, lag, health |
//! | `GET /replication/stats` | this node's counters since it started |
//! | `GET /replication/replicas` | the other members, and who follows this node; what only the leader knows of members is null elsewhere |
//! | `GET`, `POST /replication/configure` | settings that can change while the node runs, and the others ([`settings`](super::settings)); what others ask for by the names that they know ([`reconfigure`]) |
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
use serde_json::{Map, Value, json};

use crate::call::decode_leader;
use crate::door::rights::table::Page;
use crate::engine::Snapshots;
use crate::error::Leader;
use crate::proto::v1::Failure;
use crate::reason::Reason;
use crate::report::{Carried, MemberReport, NodeReport, millis};
use crate::runtime;
use crate::shown::{MESSAGE_BYTES, shortened};
use crate::storage::LogStats;
use crate::types::{AckLevel, LogId, PeerStanding};

use super::StatusPart;
use super::operated::OperatedNode;
use super::reconfigure::{self, NotConfigured};
use super::settings::{NodeSettings, Refused};
use super::subscriptions::{FollowerReport, Subscribers};

/// Largest body of a request.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// A body that is too long is read all the same, if it is no longer than this.
const MAX_IGNORED_BYTES: usize = 1024 * 1024;

/// What the routes work with.
#[derive(Clone)]
struct RouteState<N> {
    node: N,
    settings: NodeSettings<N>,
    /// What the guest adds to the status.
    status: Arc<[(&'static str, StatusPart)]>,
    followers: Subscribers,
    started: Instant,
}

/// The routes over `node`.
pub(super) fn router<N: OperatedNode>(
    node: N,
    settings: NodeSettings<N>,
    parts: Vec<(&'static str, StatusPart)>,
    followers: Subscribers,
) -> Router {
    let door = RouteState { node, settings, status: parts.into(), followers, started: Instant::now() };
    let pages = Page::ALL.into_iter().filter_map(|page| {
        let handler = match page {
            Page::Stats => get(summary::<N>),
            Page::ReplicationStatus => get(status::<N>),
            Page::ReplicationStats => get(stats::<N>),
            Page::ReplicationReplicas => get(replicas::<N>),
            Page::ReplicationConfigure => get(settings_now::<N>).post(configure::<N>),
            // See `http`.
            Page::Livez | Page::Readyz | Page::Metrics => return None,
        };
        Some((page.path(), handler))
    });
    pages
        .fold(Router::new(), |router, (path, handler)| router.route(path, handler))
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
    document(code, &refusal_object(reason, leading, refused))
}

fn refusal_object(reason: Reason, leading: Option<&Leader>, refused: &Refused) -> Value {
    let message = shortened(&refused.error, MESSAGE_BYTES);
    json!({
        "reason": reason.name(),
        "message": message,
        "hint": refused.hint,
        "maybe_applied": false,
        "leader": leading,
        "error": message,
    })
}

/// The same of a failure that says more than that a request makes no sense, and its code.
fn failure_object(failure: &Failure, leading: Option<&Leader>, hint: &str) -> (StatusCode, Value) {
    let code = StatusCode::from_u16(failure.reason().http_status(failure.maybe_applied));
    let code = code.expect("invariant: the table holds statuses of HTTP");
    let told = failure.leader.clone().map(decode_leader);
    let object = json!({
        "reason": failure.reason().name(),
        "message": failure.message,
        "hint": hint,
        "maybe_applied": failure.maybe_applied,
        "leader": told.as_ref().or(leading),
        "error": failure.message,
    });
    (code, object)
}

async fn wrong_method<N: OperatedNode>(State(door): State<RouteState<N>>) -> Response {
    let refused = Refused::new("this method is not allowed here", "use GET, or POST to change settings");
    let leading = door.node.state().leader;
    refusal(StatusCode::METHOD_NOT_ALLOWED, Reason::Invalid, leading.as_ref(), &refused)
}

fn too_long<N: OperatedNode>(door: &RouteState<N>) -> Response {
    let refused = Refused::new(
        format!("the settings take more than {MAX_BODY_BYTES} bytes"),
        "send a JSON object of names and values",
    );
    let leading = door.node.state().leader;
    let object = refusal_object(Reason::TooLarge, leading.as_ref(), &refused);
    configured(door, StatusCode::PAYLOAD_TOO_LARGE, false, object)
}

/// Refuses a body that says that it is too long. Of one that is much too long nothing is waited for; another is read to its
/// end first, because a connection that is closed before may cost its client the answer.
async fn check_length<N: OperatedNode>(
    State(door): State<RouteState<N>>,
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
            too_long(&door)
        }
        _ => next.run(request).await,
    }
}

async fn settings_now<N: OperatedNode>(State(door): State<RouteState<N>>) -> Response {
    document(StatusCode::OK, &door.settings_object())
}

impl<N: OperatedNode> RouteState<N> {
    fn settings_object(&self) -> Value {
        let object = |settings: &[(&str, Value)]| {
            let members = settings.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
            Value::Object(members.collect())
        };
        let (settings, fixed) = (object(&self.settings.list()), object(self.settings.fixed()));
        json!({ "settings": settings, "fixed": fixed })
    }

    /// What its role is called: a replica has one of its own.
    fn role(&self, report: &NodeReport) -> Value {
        match self.node.following() {
            Some(_) => "replica".into(),
            None => json!(report.role),
        }
    }
}

/// The answer of `configure`: `object`, whether all was done, and the role then.
fn configured<N: OperatedNode>(
    door: &RouteState<N>,
    code: StatusCode,
    success: bool,
    mut object: Value,
) -> Response {
    if let Value::Object(members) = &mut object {
        members.insert("success".to_owned(), success.into());
        members.insert("role".to_owned(), door.role(&door.node.report()));
    }
    document(code, &object)
}

async fn configure<N: OperatedNode>(
    State(door): State<RouteState<N>>,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let leading = || door.node.state().leader;
    let refused = |code, reason, refused: &Refused| {
        configured(&door, code, false, refusal_object(reason, leading().as_ref(), refused))
    };
    let body = match body {
        Ok(body) => body,
        Err(rejection) if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => {
            return too_long(&door);
        }
        Err(rejection) => {
            let why = Refused::new("the settings did not arrive as a whole", "send them again");
            return refused(rejection.status(), Reason::Invalid, &why);
        }
    };
    let failed = |failure: &Failure, hint: &str| {
        let (code, object) = failure_object(failure, leading().as_ref(), hint);
        configured(&door, code, false, object)
    };
    match reconfigure::configure(&door.node, &door.settings, &body).await {
        Ok(message) => {
            let mut object = door.settings_object();
            object["message"] = message.into();
            configured(&door, StatusCode::OK, true, object)
        }
        Err(NotConfigured::Invalid(why)) => refused(StatusCode::BAD_REQUEST, Reason::Invalid, &why),
        Err(NotConfigured::NotHere(why)) => refused(StatusCode::CONFLICT, Reason::Invalid, &why),
        Err(NotConfigured::Settings(error)) => {
            let hint = error.hint();
            failed(&error.into(), &hint)
        }
        Err(NotConfigured::Lead(error)) => {
            let hint = "nothing was changed; `quorate status` shows who leads and what the others lack";
            failed(&error.into(), hint)
        }
    }
}

async fn status<N: OperatedNode>(State(door): State<RouteState<N>>) -> Response {
    let report = door.node.report();
    let role = door.role(&report);
    let status = door.status(report);
    let is_replica = door.node.following().is_some();
    match serde_json::to_value(&status) {
        // Its report knows the roles of members only.
        Ok(mut shown) if is_replica => {
            shown["role"] = role;
            document(StatusCode::OK, &shown)
        }
        _ => document(StatusCode::OK, &status),
    }
}

async fn stats<N: OperatedNode>(State(door): State<RouteState<N>>) -> Response {
    document(StatusCode::OK, &door.stats(&door.node.report()))
}

async fn replicas<N: OperatedNode>(State(door): State<RouteState<N>>) -> Response {
    let report = door.node.report();
    let replicas = door.replicas(&report);
    let answer = json!({
        "node_id": report.node_id,
        "role": door.role(&report),
        "term": report.term,
        "leader": report.leader,
        "count": replicas.len(),
        "message": match (report.leads(), door.node.following().is_some()) {
            (true, _) => "all members but this one, and the followers of this node",
            (false, true) => "this node is a replica, which nobody follows: ask a member; what this one follows is on /replication/status",
            (false, false) => "this node does not lead: only the leader knows how far other members are; followers are this node's",
        },
        "replicas": replicas,
    });
    document(StatusCode::OK, &answer)
}

async fn summary<N: OperatedNode>(State(door): State<RouteState<N>>) -> Response {
    let report = door.node.report();
    let (lag, stats) = (report.lag.unwrap_or_default(), door.stats(&report));
    let answer = json!({
        "node_id": report.node_id,
        "cluster": report.cluster,
        "role": door.role(&report),
        "term": report.term,
        "leader": report.leader,
        "healthy": report.healthy(),
        "diverged": report.diverged,
        "last_log": report.offsets.last_log,
        "committed": report.offsets.committed.map(|at| at.index),
        "applied": report.offsets.applied.map(|at| at.index),
        "lag_operations": lag.entries,
        "lag_ms": lag.time.map(millis),
        "connected_replicas": report.connected(),
        "disk": report.disk.map(|disk| disk.state),
        "sessions": report.sessions.open,
        "pending_operations": stats["pending_operations"],
        "pending_bytes": stats["pending_bytes"],
        "applied_operations": stats["applied_operations"],
        "sent_bytes": stats["sent"]["bytes"],
        "received_bytes": stats["received"]["bytes"],
        "snapshot_bytes": stats["snapshot_bytes"],
        "uptime_ms": stats["uptime_ms"],
        "version": report.version,
    });
    document(StatusCode::OK, &answer)
}

/// The status page: the node's report, and what the port knows besides.
#[derive(Debug, Serialize)]
struct Status {
    #[serde(flatten)]
    report: NodeReport,
    /// As `/readyz`: it runs, follows or leads, has applied nearly everything, and its disk takes writes.
    healthy: bool,
    /// Members that answer, on the leader.
    connected_replicas: Option<usize>,
    /// Members other than this one.
    other_members: usize,
    /// Whether it takes part in replication, which it always does.
    enabled: bool,
    /// The most asked for of what it counts.
    stats: Value,
    /// As on `/replication/replicas`.
    replicas: Vec<Value>,
    /// What the guest adds.
    #[serde(flatten)]
    guest: Map<String, Value>,
    uptime_ms: u64,
}

impl<N: OperatedNode> RouteState<N> {
    fn uptime_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn status(&self, report: NodeReport) -> Status {
        Status {
            healthy: report.healthy(),
            connected_replicas: report.connected(),
            other_members: report.peers().count(),
            enabled: true,
            stats: self.totals(&report),
            replicas: self.replicas(&report),
            guest: self.status.iter().map(|(name, part)| ((*name).to_owned(), part())).collect(),
            uptime_ms: self.uptime_ms(),
            report,
        }
    }

    /// Everybody who is sent what is applied, as far as this node knows.
    fn replicas(&self, report: &NodeReport) -> Vec<Value> {
        let followers = self.followers.reports(&self.node);
        report.peers().map(replica).chain(followers.iter().map(follower)).collect()
    }

    /// Totals by the names that they have in other systems. Of a node that does not lead, `master_offset` is what it knows to be committed.
    fn totals(&self, report: &NodeReport) -> Value {
        let lag = report.lag.unwrap_or_default();
        let index = |at: Option<LogId>| at.map(|at| at.index);
        let (applied, committed) = (index(report.offsets.applied), index(report.offsets.committed));
        let count = |counter: &AtomicU64| counter.load(Relaxed);
        let activity = self.node.activity();
        let told = self.node.received();
        let carried = |of: fn(&Carried) -> u64| report.carried.as_ref().map(of);
        let rows = self.replicas(report);
        let is_connected = |row: &&Value| {
            let status = &row["status"];
            !status.is_null() && *status != json!(PeerStanding::Disconnected)
        };
        json!({
            "role": self.role(report),
            "lag_ms": lag.time.map(millis),
            "lag_operations": lag.entries,
            // A replica sends nothing of what is replicated.
            "bytes_sent": told.map(|_| 0).or_else(|| carried(|carried| carried.sent_bytes)),
            "bytes_received": told.map(|told| told.bytes).or_else(|| carried(|carried| carried.received_bytes)),
            // When it last heard from its leader, or led, in seconds since the Unix epoch.
            "last_sync": if report.leads() { Some(ago(Duration::ZERO)) } else { lag.leader_heard.map(ago) },
            // Of a replica those that it has heard of, and not been told.
            "operations_pending": told
                .map(|_| lag.entries)
                .or_else(|| report.in_flight.map(|in_flight| in_flight.commands)),
            "snapshot_size": count(&activity.snapshot_bytes),
            // Members and those who follow this node, as far as it knows.
            "connected_replicas": rows.iter().filter(is_connected).count(),
            "master_offset": if report.leads() { applied } else { committed },
            "replica_offset": applied,
            "total_replicated": told.map_or_else(|| count(&activity.applied_entries), |told| told.entries),
        })
    }

    /// What this node has counted since it started.
    fn stats(&self, report: &NodeReport) -> Value {
        let (activity, counters) = (self.node.activity(), self.node.counters());
        let total = |count: fn(&Carried) -> u64| report.carried.as_ref().map(count);
        let count = |counter: &AtomicU64| counter.load(Relaxed);
        let snapshots = |of: &Snapshots| json!({ "count": count(&of.count), "bytes": count(&of.bytes), "ms": count(&of.us) as f64 / 1e3 });
        // By what the acknowledgement promises; the leader's writes were not durable on a quorum then.
        let acknowledged =
            AckLevel::ALL.map(|level| (level.name().to_owned(), Value::from(counters.acknowledged(level))));
        let mut stats = json!({
            "node_id": report.node_id,
            "uptime_ms": self.uptime_ms(),
            "sent": { "bytes": total(|c| c.sent_bytes), "messages": total(|c| c.sent_messages) },
            "received": { "bytes": total(|c| c.received_bytes), "messages": total(|c| c.received_messages) },
            "peers": report.peers().map(traffic).collect::<Vec<_>>(),
            // Proposed on this node and not yet applied.
            "pending_operations": report.in_flight.map(|in_flight| in_flight.commands),
            "pending_bytes": report.in_flight.map(|in_flight| in_flight.bytes),
            "acknowledged": Map::from_iter(acknowledged),
            "applied_operations": count(&activity.applied_entries),
            "apply_batches": count(&activity.apply_batches),
            "snapshot_bytes": count(&activity.snapshot_bytes),
            "snapshots_built": snapshots(&activity.snapshots_built),
            "snapshots_sent": snapshots(&activity.snapshots_sent),
            "snapshots_installed": snapshots(&activity.snapshots_installed),
            "elections_started": count(&activity.elections_started),
            "elections_won": count(&activity.elections_won),
            "leader_changes": count(&activity.leader_changes),
            // Null without a disk.
            "log": self.node.log_stats().map(log),
        });
        if let (Value::Object(stats), Value::Object(totals)) = (&mut stats, self.totals(report)) {
            stats.extend(totals);
        }
        stats
    }
}

fn traffic(peer: &MemberReport) -> Value {
    let count = |count: fn(&Carried) -> u64| peer.carried.as_ref().map(count);
    json!({
        "node_id": peer.node_id,
        "sent": { "bytes": count(|c| c.sent_bytes), "messages": count(|c| c.sent_messages) },
        "received": { "bytes": count(|c| c.received_bytes), "messages": count(|c| c.received_messages) },
        "connections": count(|c| c.dialled),
        "connections_failed": count(|c| c.dials_failed),
    })
}

fn log(stats: &LogStats) -> Value {
    let count = |counter: &AtomicU64| counter.load(Relaxed);
    let flushes = count(&stats.flushes);
    let ms = |us: &AtomicU64| count(us) as f64 / 1e3;
    json!({
        "flushes": flushes,
        // Null before the first flush, as the next.
        "flush_ms_mean": (flushes > 0).then(|| ms(&stats.flush_us_sum) / flushes as f64),
        "flush_ms_max": (flushes > 0).then(|| ms(&stats.flush_us_max)),
        "entries": count(&stats.entries),
        "record_bytes": count(&stats.bytes_written),
        "queued_bytes": count(&stats.queued_bytes),
        "queued_writes": count(&stats.queued_writes),
    })
}

/// One of the other members. What only the leader knows is null on a node that does not lead.
fn replica(peer: &MemberReport) -> Value {
    let (host, port) = peer.peer.rsplit_once(':').unwrap_or((&peer.peer, ""));
    let led = peer.led.as_ref();
    let heard = led.and_then(|led| led.heard);
    json!({
        "kind": "member",
        "id": peer.node_id,
        "host": host,
        "port": port.parse::<u16>().ok(),
        "address": peer.peer,
        "client": Some(&peer.client).filter(|client| !client.is_empty()),
        "role": peer.kind(),
        "status": led.map(|led| led.standing),
        "last_heartbeat_ms": heard.map(millis),
        "last_heartbeat": heard.map(ago),
        "matched": led.and(peer.matched),
        "operations_behind": led.map(|led| led.behind_entries),
        "ms_behind": led.map(|led| millis(led.behind)),
        // The same three, as every row has them.
        "offset": led.and(peer.matched),
        "lag_operations": led.map(|led| led.behind_entries),
        "lag_ms": led.map(|led| millis(led.behind)),
        // Accepted from this leader since its process started.
        "operations_synced": led.map(|led| led.accepted_entries),
        // Null when none is under way.
        "snapshot": led.and_then(|led| led.snapshot).map(|(sent_bytes, total_bytes)| {
            json!({ "sent_bytes": sent_bytes, "total_bytes": total_bytes })
        }),
    })
}

/// One who follows this node. What a row of a member has is there, too.
fn follower(follower: &FollowerReport) -> Value {
    // Of one that answers reads, where it does; of others, where they come from.
    let from = follower.address.map(|address| address.to_string());
    let address = follower.serves.clone().or_else(|| from.clone());
    let (host, port) = address.as_deref().and_then(|address| address.rsplit_once(':')).unzip();
    let kind = if follower.serves.is_some() { "replica" } else { "subscriber" };
    json!({
        "kind": kind,
        // What carries it: grpc, or frames.
        "transport": follower.transport,
        // One without a name has the number of its connection to this node.
        "id": match follower.name.is_empty() {
            true => Value::from(follower.number),
            false => Value::from(follower.name.as_str()),
        },
        "host": host.map(|host| host.trim_matches(['[', ']'])),
        "port": port.and_then(|port| port.parse::<u16>().ok()),
        "address": address,
        "client": follower.serves,
        "role": kind,
        "connected_from": from,
        "status": follower.standing,
        "last_heartbeat_ms": millis(follower.heard),
        "last_heartbeat": ago(follower.heard),
        "matched": follower.position,
        "operations_behind": follower.lag_operations,
        "ms_behind": millis(follower.lag),
        "offset": follower.position,
        "lag_operations": follower.lag_operations,
        "lag_ms": millis(follower.lag),
        "operations_synced": follower.operations,
        "snapshot": null,
        "sent": follower.sent,
        "sent_bytes": follower.sent_bytes,
        "filters": follower.filters,
        "in_snapshot": follower.in_snapshot,
        "connected_ms": millis(follower.connected),
    })
}

/// The wall clock `time` ago, in seconds since the Unix epoch.
fn ago(time: Duration) -> u64 {
    let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    runtime::unix_time_ms().saturating_sub(ms) / 1000
}
