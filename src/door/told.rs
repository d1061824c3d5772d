//! What every failed gRPC call is told: why, in a [`Failure`], and who leads where the node knows it.
//!
//! Failures begin in many places: the engine, the doors, and tonic, which refuses what it cannot decode and methods that it
//! does not know. So their answers are completed on the way out, wherever the status is: in the headers of an answer
//! without a body, or behind it. A stream that is still open at its caller's deadline ends there a little earlier, so that
//! the caller hears of it from the node.
//!
//! Failures of single requests of a pipeline are in its messages; they are completed where they are sent.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::{Code, Status};

use super::failure;
use super::methods::Methods;
use super::{bodies, deadline};
use crate::call::encode_leader;
use crate::engine::NodeState;
use crate::proto::details;
use crate::proto::v1::{Failure, Reason};

/// What the node knows at present, which is nothing before it is open, and what can be called there. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    methods: Methods,
    state: Arc<OnceLock<watch::Receiver<NodeState>>>,
}

impl Known {
    /// Nothing but the `methods`.
    pub(crate) fn new(methods: Methods) -> Self {
        Self { methods, state: Arc::default() }
    }

    /// From now on it is what `state` says.
    pub(crate) fn follow(&self, state: watch::Receiver<NodeState>) {
        // There is one node behind a port.
        let _ = self.state.set(state);
    }

    fn name_leader(&self, failure: &mut Failure) {
        if let Some(state) = self.state.get() {
            name_leader(failure, &state.borrow());
        }
    }
}

/// Has `failure` say who leads, if it does not and `state` knows. Whoever is refused because this node does not lead is told
/// by what the refusal itself knows: a state may be older.
pub(crate) fn name_leader(failure: &mut Failure, state: &NodeState) {
    let leads = || state.leader.as_ref().is_some_and(|leader| leader.node_id == state.node_id);
    let reason = failure.reason();
    let is_older = reason == Reason::NotLeader || (reason == Reason::Interrupted && leads());
    // It is told nothing of the cluster.
    let is_unwelcome = matches!(reason, Reason::Unauthenticated | Reason::PermissionDenied);
    if failure.leader.is_none() && !is_older && !is_unwelcome {
        failure.leader = state.leader.clone().map(encode_leader);
    }
}

/// Completes the answer to `request`.
pub(crate) async fn complete(State(known): State<Known>, request: Request, next: Next) -> Response {
    if !bodies::is_grpc(request.headers()) {
        return next.run(request).await;
    }
    let path = request.uri().path().to_owned();
    let ends_at = deadline::limit(request.headers()).map(|limit| Instant::now() + limit);
    let mut response = next.run(request).await;
    if response.headers().contains_key(Status::GRPC_STATUS) {
        // Nothing was answered, so nothing was begun that does not say so itself.
        fill(response.headers_mut(), &known, &path, false);
        return response;
    }
    let maybe_applied = known.methods.may_change(&path);
    response.map(|body| {
        let timer = ends_at.map(|at| Box::pin(sleep_until(at)));
        Body::new(Completed { body, known, path, maybe_applied, timer, ended: false })
    })
}

/// Completes a status in `headers`, if it is one of a failure. What comes without a [`Failure`] is tonic's; a call that it
/// ends `maybe_applied`.
fn fill(headers: &mut HeaderMap, known: &Known, path: &str, maybe_applied: bool) {
    let Some(status) = Status::from_header_map(headers).filter(|status| status.code() != Code::Ok) else {
        return;
    };
    let found = details::failure(status.details());
    let mut failure = found.clone().unwrap_or_else(|| failure::of_transport(&status, path, maybe_applied));
    known.name_leader(&mut failure);
    if found.as_ref() != Some(&failure) {
        // Only what cannot be a header fails, and then what was there stays.
        let _ = Status::from(failure).add_header(headers);
    }
}

/// The body of an answer, with what is behind it.
struct Completed {
    body: Body,
    known: Known,
    path: String,
    /// Whether a call that does not end by itself may have changed something.
    maybe_applied: bool,
    /// Ends the answer.
    timer: Option<Pin<Box<Sleep>>>,
    ended: bool,
}

impl HttpBody for Completed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        if this.ended {
            return Poll::Ready(None);
        }
        let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) else {
            let Some(timer) = &mut this.timer else { return Poll::Pending };
            ready!(timer.as_mut().poll(cx));
            this.ended = true;
            // Nobody takes the rest.
            this.body = Body::empty();
            let mut trailers = HeaderMap::new();
            let _ = Status::from(failure::deadline_exceeded(this.maybe_applied)).add_header(&mut trailers);
            fill(&mut trailers, &this.known, &this.path, this.maybe_applied);
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        };
        let complete = |frame: Frame<Bytes>| match frame.into_trailers() {
            Ok(mut trailers) => {
                fill(&mut trailers, &this.known, &this.path, this.maybe_applied);
                Frame::trailers(trailers)
            }
            Err(data) => data,
        };
        Poll::Ready(frame.map(|frame| frame.map(complete)))
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match self.ended {
            true => SizeHint::with_exact(0),
            false => self.body.size_hint(),
        }
    }
}
