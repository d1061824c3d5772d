//! The plain HTTP doors: `/livez`, `/readyz`, `/metrics`, and those of [`replication`].
//!
//! `/livez` asks whether restarting the process would help, so it does not depend on the quorum. `/readyz` asks
//! whether to send requests here.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::engine::NodeState;
use crate::types::Role;

use super::door_metrics::History;
use super::exposition::Exposition;
use super::metrics::Metrics;
use super::observed::ObservedNode;
use super::replication;
use super::settings::NodeSettings;

/// The routes over `node`.
pub(super) fn router<N: ObservedNode>(
    node: &N,
    settings: NodeSettings<N>,
    metrics: Arc<Metrics>,
    history: Option<History>,
) -> Router {
    let probe = |assess: fn(&NodeState) -> Result<(), String>| {
        let node = node.clone();
        get(async move || match assess(&node.state()) {
            Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
            Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
        })
    };
    Router::new()
        .route("/livez", probe(alive))
        .route("/readyz", probe(ready))
        .route("/metrics", get(scrape).with_state(metrics))
        .merge(replication::router(node.clone(), settings, history))
        .fallback(unknown)
}

/// Whether the node runs; else why not.
fn alive(state: &NodeState) -> Result<(), String> {
    match (&state.fatal, state.role) {
        (Some(fatal), _) => Err(fatal.to_string()),
        (None, Role::Stopped) => Err("the node is shutting down".to_owned()),
        _ => Ok(()),
    }
}

/// Whether requests should be sent to the node; else why not.
fn ready(state: &NodeState) -> Result<(), String> {
    alive(state)?;
    if state.leader.is_none() {
        return Err("no leader is known".to_owned());
    }
    if !state.is_ready() {
        let index = |position: Option<crate::types::LogId>| position.map_or(0, |log_id| log_id.index);
        let (applied, committed) = (index(state.applied), index(state.committed));
        return Err(format!("catching up: applied {applied} of {committed} committed entries"));
    }
    Ok(())
}

async fn scrape(State(metrics): State<Arc<Metrics>>, headers: HeaderMap) -> Response {
    let accepts = headers.get_all(header::ACCEPT).iter().filter_map(|accept| accept.to_str().ok());
    let exposition = Exposition::preferred(&accepts.collect::<Vec<_>>().join(","));
    match metrics.encode() {
        Ok(text) => (
            [(header::CONTENT_TYPE, exposition.content_type()), (header::VARY, "accept")],
            exposition.write(text),
        )
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// gRPC callers of an unknown service expect a gRPC status, everyone else a 404.
async fn unknown(headers: HeaderMap, uri: Uri) -> Response {
    let content_type = headers.get(header::CONTENT_TYPE).map(|value| value.as_bytes());
    if content_type.is_some_and(|value| value.starts_with(b"application/grpc")) {
        return tonic::Status::unimplemented(format!("there is no {}", uri.path())).into_http();
    }
    (
        StatusCode::NOT_FOUND,
        format!("there is no {}; try /livez, /readyz, /metrics, /stats or /replication/status\n", uri.path()),
    )
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{FatalError, Leader};
    use crate::storage::DiskState;
    use crate::types::{LogId, Membership};

    fn state() -> NodeState {
        NodeState {
            node_id: 1,
            role: Role::Follower,
            term: 3,
            in_touch: true,
            leader: Some(Leader { node_id: 2, client: "b:7802".to_owned() }),
            last_log: Some(9000),
            committed: Some(LogId::new(3, 9000)),
            applied: Some(LogId::new(3, 9000)),
            snapshot: None,
            purged: None,
            membership: Membership::default(),
            disk: DiskState::Ok,
            fatal: None,
        }
    }

    #[test]
    fn liveness_does_not_depend_on_a_quorum() {
        assert_eq!((alive(&state()), ready(&state())), (Ok(()), Ok(())));
        let alone = NodeState { leader: None, role: Role::Candidate, ..state() };
        assert_eq!((alive(&alone), ready(&alone)), (Ok(()), Err("no leader is known".to_owned())));
        let behind = NodeState { applied: None, ..state() };
        let reason = "catching up: applied 0 of 9000 committed entries";
        assert_eq!((alive(&behind), ready(&behind)), (Ok(()), Err(reason.to_owned())));
    }

    #[test]
    fn a_stopped_node_is_not_alive_and_says_why() {
        let stopped = NodeState { fatal: Some(FatalError::Core("fsync failed".to_owned())), ..state() };
        assert_eq!(alive(&stopped), Err("fsync failed".to_owned()));
        assert_eq!(ready(&stopped), alive(&stopped));
        assert!(alive(&NodeState { role: Role::Stopped, ..state() }).is_err());
    }
}
