//! The plain HTTP doors: `/livez`, `/readyz`, `/metrics`, and those of [`replication`].
//!
//! `/livez` asks whether restarting the process would help, so it does not depend on the quorum. `/readyz` asks
//! whether to send requests here, and answers with a word that says why not, and what there is to add. With `?for=reads` a
//! disk that is full or hangs is no reason.

use std::sync::Arc;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::door::rights::table::Page;
use crate::engine::{NodeState, NotReady};
use crate::shown::Shown;
use crate::types::Role;

use super::exposition::Exposition;
use super::operated::OperatedNode;
use super::settings::NodeSettings;
use super::subscriptions::Subscribers;
use super::{StatusPart, metrics, replication};

/// What the pages show beside what the node is.
pub(super) struct Pages<N> {
    pub(super) settings: NodeSettings<N>,
    /// What the guest adds to the status.
    pub(super) status: Vec<(&'static str, StatusPart)>,
    pub(super) registry: Arc<Registry>,
    pub(super) followers: Subscribers,
}

/// The routes over `node`, which is `draining` once it was told to stop.
pub(super) fn router<N: OperatedNode>(node: &N, pages: Pages<N>, draining: watch::Receiver<bool>) -> Router {
    let Pages { settings, status, registry, followers } = pages;
    let answer = |assessed: Result<(), NotReady>| match assessed {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    };
    let (living, readying) = (node.clone(), node.clone());
    let mut live = Some(get(async move || answer(alive(&living.state()))));
    let mut ready = Some(get(async move |RawQuery(query): RawQuery| {
        let reads_only = query.as_deref() == Some(FOR_READS);
        answer(self::ready(&readying.state(), *draining.borrow(), reads_only))
    }));
    let mut metrics = Some(get(scrape).with_state(registry));
    // What is a page here has a right in the table, and the other way round.
    let pages = Page::ALL.into_iter().filter_map(|page| {
        let handler = match page {
            Page::Livez => live.take(),
            Page::Readyz => ready.take(),
            Page::Metrics => metrics.take(),
            Page::Stats
            | Page::ReplicationStatus
            | Page::ReplicationStats
            | Page::ReplicationReplicas
            | Page::ReplicationConfigure => None,
        };
        Some((page.path(), handler?))
    });
    pages
        .fold(Router::new(), |router, (path, handler)| router.route(path, handler))
        .merge(replication::router(node.clone(), settings, status, followers))
        .fallback(async |headers: HeaderMap, uri: Uri| unknown(&headers, &uri))
}

/// Asks `/readyz` about reads only.
const FOR_READS: &str = "for=reads";

/// Whether the node runs; else why not.
fn alive(state: &NodeState) -> Result<(), NotReady> {
    match (&state.fatal, state.role) {
        (Some(fatal), _) => Err(NotReady::Stopped(fatal.clone())),
        (None, Role::Stopped) => Err(NotReady::Stopping),
        (None, Role::Learner | Role::Follower | Role::Candidate | Role::Leader) => Ok(()),
    }
}

/// Whether requests should be sent to the node, or only reads; else why not.
fn ready(state: &NodeState, draining: bool, reads_only: bool) -> Result<(), NotReady> {
    alive(state)?;
    if draining {
        return Err(NotReady::Stopping);
    }
    match reads_only {
        true => state.readiness_for_reads(),
        false => state.readiness(),
    }
}

async fn scrape(State(registry): State<Arc<Registry>>, headers: HeaderMap) -> Response {
    let accepts = headers.get_all(header::ACCEPT).iter().filter_map(|accept| accept.to_str().ok());
    let exposition = Exposition::preferred(&accepts.collect::<Vec<_>>().join(","));
    match metrics::encode(&registry) {
        Ok(text) => (
            [(header::CONTENT_TYPE, exposition.content_type()), (header::VARY, "accept")],
            exposition.write(text),
        )
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// gRPC callers of an unknown service expect a gRPC status, everyone else a 404.
pub(super) fn unknown(headers: &HeaderMap, uri: &Uri) -> Response {
    let content_type = headers.get(header::CONTENT_TYPE).map(|value| value.as_bytes());
    if content_type.is_some_and(|value| value.starts_with(b"application/grpc")) {
        return tonic::Status::unimplemented(format!("there is no {}", Shown(uri.path()))).into_http();
    }
    (
        StatusCode::NOT_FOUND,
        format!(
            "there is no {}; try /livez, /readyz, /metrics, /stats or /replication/status\n",
            Shown(uri.path())
        ),
    )
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{FatalError, Leader};
    use crate::storage::DiskState;
    use crate::types::{Divergence, LogId, Membership};

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
            overdue: false,
            snapshot: None,
            purged: None,
            membership: Membership::default(),
            disk: DiskState::Ok,
            diverged: None,
            forming: None,
            fatal: None,
        }
    }

    /// Every reason has its word; the words are documented, and automata rely on them.
    #[test]
    fn every_reason_is_told_apart_and_liveness_depends_on_none_of_them() {
        use crate::engine::Forming;
        let missing = [(2, ("b:7902".to_owned(), "connection refused".to_owned()))].into();
        let forming = |forming| NodeState { forming: Some(forming), leader: None, ..state() };
        let follower = || NodeState { in_touch: false, ..state() };
        let cases = [
            (state(), None, ""),
            (
                NodeState { leader: None, role: Role::Candidate, ..state() },
                Some("no_leader"),
                "no leader is known",
            ),
            (follower(), Some("out_of_touch"), "node 2 leads, as far as is known, but has not been heard of"),
            (
                NodeState { node_id: 2, ..follower() },
                Some("out_of_touch"),
                "a majority of the voters does not answer",
            ),
            (NodeState { applied: None, ..state() }, Some("behind"), "applied 0 of 9000 committed entries"),
            (
                NodeState { applied: Some(LogId::new(3, 8999)), overdue: true, ..state() },
                Some("behind"),
                "applied 8999 of 9000",
            ),
            (NodeState { disk: DiskState::Full, ..state() }, Some("disk_full"), "answers reads"),
            (NodeState { disk: DiskState::Stalled, ..state() }, Some("disk_stalled"), "does not come back"),
            (NodeState { disk: DiskState::Stalled, ..follower() }, Some("disk_stalled"), "hears its leader"),
            (NodeState { disk: DiskState::Full, ..follower() }, Some("out_of_touch"), "not been heard of"),
            (NodeState { disk: DiskState::Low, ..state() }, None, ""),
            (
                forming(Forming::Founders { missing }),
                Some("forming"),
                "missing: node 2 at b:7902 (connection refused)",
            ),
            (
                forming(Forming::FirstFounder { node_id: 1 }),
                Some("forming"),
                "node 1 writes the founding membership",
            ),
            (forming(Forming::ToBeAdded), Some("forming"), "waits to be added"),
        ];
        for (state, word, said) in cases {
            assert_eq!(alive(&state), Ok(()));
            let told = ready(&state, false, false).err().map(|reason| reason.to_string());
            assert_eq!(told.as_deref().and_then(|told| told.split(':').next()), word, "{told:?}");
            assert!(told.unwrap_or_default().contains(said), "{said}");
            let disk = word.is_some_and(|word| word.starts_with("disk_")) && state.is_ready();
            assert_eq!(ready(&state, false, true).is_ok(), disk || word.is_none(), "{word:?}");
            assert_eq!(ready(&state, true, true), Err(NotReady::Stopping), "{word:?}");
        }
    }

    #[test]
    fn a_node_whose_state_differs_is_alive_and_not_ready_and_says_why() {
        let divergence = Divergence { at: LogId::new(3, 8960), own: 7, majority: Some(8) };
        let diverged = NodeState { diverged: Some(divergence), ..state() };
        assert_eq!(alive(&diverged), Ok(()));
        let why = ready(&diverged, false, true).unwrap_err().to_string();
        for part in ["diverged: ", "3:8960", "0000000000000007", "0000000000000008"] {
            assert!(why.contains(part), "{why}");
        }
    }

    #[test]
    fn a_stopped_node_is_not_alive_and_says_why() {
        let stopped = NodeState { fatal: Some(FatalError::Core("fsync failed".to_owned())), ..state() };
        assert_eq!(alive(&stopped).unwrap_err().to_string(), "stopped: fsync failed");
        assert_eq!(ready(&stopped, false, false), alive(&stopped));
        assert_eq!(alive(&NodeState { role: Role::Stopped, ..state() }), Err(NotReady::Stopping));
    }
}
