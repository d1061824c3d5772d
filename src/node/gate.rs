//! What stands behind the port: nothing but words while the node is being opened, then the node.
//!
//! A node with much to recover takes a while. It is alive all that time, so `/livez` says so from the first moment;
//! `/readyz` says how far it is, health is "not serving", and every other request is refused as one that another node
//! may answer.

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::future::RouteFuture;
use axum::routing::get;
use tokio::sync::watch;
use tonic::codegen::Service;

use super::replication;
use super::settings::Refused;
use crate::door::failure;
use crate::engine::{NotReady, StartProgress};
use crate::proto::v1::Failure;
use crate::reason::Reason;

/// Hands requests to what there is behind the port at the moment. Cheap to clone; all clones are the same gate.
#[derive(Clone)]
pub(super) struct Gate {
    /// Until the node is there.
    before: Router,
    node: Arc<OnceLock<Router>>,
}

impl Gate {
    /// A gate with nothing behind it but `before`.
    pub(super) fn new(before: Router) -> Self {
        Self { before, node: Arc::default() }
    }

    /// From now on requests are for the node behind `routes`.
    pub(super) fn open(&self, routes: Router) {
        // There is one node behind a port; a second one would not be asked.
        let _ = self.node.set(routes);
    }
}

impl Service<Request<tonic::body::Body>> for Gate {
    type Response = Response;
    type Error = Infallible;
    type Future = RouteFuture<Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let mut routes = self.node.get().unwrap_or(&self.before).clone();
        Service::call(&mut routes, request.map(Body::new))
    }
}

/// What is said while a node is being opened that has come as far as `progress`, or has been told to stop.
pub(super) fn before(progress: StartProgress, draining: watch::Receiver<bool>) -> Router {
    let reason = move || reason(&progress, &draining);
    let ready = reason.clone();
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(async move || (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", ready()))))
        .fallback(async move |headers: HeaderMap, uri: Uri| refused(&headers, &uri, &reason()))
}

/// Why the node is not there.
pub(super) fn reason(progress: &StartProgress, draining: &watch::Receiver<bool>) -> String {
    match *draining.borrow() {
        true => NotReady::Stopping.to_string(),
        false => format!("recovering: {}", progress.now()),
    }
}

/// The same for callers.
pub(super) fn not_open(reason: &str) -> Failure {
    failure::stopped(format!("the node is not open yet; {reason}"))
}

fn refused(headers: &HeaderMap, uri: &Uri, reason: &str) -> Response {
    let failure = not_open(reason);
    let content_type = headers.get(header::CONTENT_TYPE).map(|value| value.as_bytes());
    if content_type.is_some_and(|value| value.starts_with(b"application/grpc")) {
        return tonic::Status::from(failure).into_http();
    }
    let code = StatusCode::SERVICE_UNAVAILABLE;
    match uri.path() {
        "/metrics" => (code, format!("{}\n", failure.message)).into_response(),
        _ => {
            let refused = Refused::new(failure.message, "try again, or ask another node");
            replication::refusal(code, Reason::Stopped, None, &refused)
        }
    }
}
