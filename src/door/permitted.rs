//! Whether what is asked for is granted to its caller, and answers that end when that ends.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{Extensions, HeaderMap};
use http_body::{Frame, SizeHint};
use tonic::Status;

use super::failure;
use super::guest::{Guest, guarded};
use super::rights::grants::{DataRight, Touched};
use super::rights::{CountedCall, Principal};
use crate::incoming::Caller;
use crate::proto::v1::Failure;
use crate::runtime;

/// The caller of the request with these `extensions`. One that the entrance has not let in may do nothing.
pub(crate) fn caller(extensions: &Extensions) -> Arc<Principal> {
    extensions.get().cloned().unwrap_or_else(Principal::nobody)
}

/// Whether all that `request` touches is granted to `principal`.
///
/// # Errors
/// The failure to answer instead.
pub(crate) fn request<G: Guest>(
    principal: &Principal,
    method: usize,
    request: &G::Request,
) -> Result<(), Failure> {
    if principal.is_everyone() {
        return Ok(());
    }
    let (mut is_granted, mut is_named) = (true, false);
    guarded(false, || {
        G::touches(method, request, &mut |right, touched| {
            is_named = true;
            is_granted &= principal.covers(right, touched);
        });
    })?;
    match is_granted && is_named {
        true => Ok(()),
        // What names nothing is taken for everything.
        false if !is_named => everything(principal, G::METHODS[method].name),
        false => Err(principal.deny(G::METHODS[method].name)),
    }
}

fn everything(principal: &Principal, method: &str) -> Result<(), Failure> {
    let rights = [DataRight::Read, DataRight::Write];
    match rights.into_iter().all(|right| principal.covers(right, Touched::Everything)) {
        true => Ok(()),
        false => Err(principal.deny(method)),
    }
}

/// Whether sessions may be opened and closed by `principal`.
///
/// # Errors
/// The failure to answer instead.
pub(crate) fn session(principal: &Principal) -> Result<(), Failure> {
    match principal.writes_something() {
        true => Ok(()),
        false => Err(principal.deny("session")),
    }
}

/// Whether `right` to `touched` is granted to `principal`.
///
/// # Errors
/// The failure to answer instead.
pub(crate) fn part(principal: &Principal, right: DataRight, touched: Touched<'_>) -> Result<(), Failure> {
    match principal.covers(right, touched) {
        true => Ok(()),
        false => Err(principal.deny(right.name())),
    }
}

/// Whether the settings of the node may be changed by `principal`.
///
/// # Errors
/// The failure to answer instead.
pub(crate) fn operation(principal: &Principal) -> Result<(), Failure> {
    match principal.operates() {
        true => Ok(()),
        false => Err(principal.deny("configure")),
    }
}

/// For so long a caller may take to read the end of a stream.
const UNREAD_PATIENCE: Duration = Duration::from_secs(15);

/// The body of an answer that ends when the credential of its caller does. Whatever makes it is dropped then.
pub(crate) struct PermittedBody {
    body: Body,
    ended: Pin<Box<dyn Future<Output = ()> + Send>>,
    is_over: bool,
    _counted: Option<CountedCall>,
    _unread: Option<UnreadEnd>,
}

/// Ends the connection of a caller that takes nothing, once what it takes nothing of should have ended.
struct UnreadEnd(tokio::task::JoinHandle<()>);

impl UnreadEnd {
    fn after(principal: Arc<Principal>, patience: Duration, caller: Arc<Caller>) -> Self {
        Self(runtime::spawn(async move {
            principal.ended().await;
            tokio::time::sleep(patience).await;
            caller.end();
        }))
    }
}

impl Drop for UnreadEnd {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl PermittedBody {
    /// `body` as an answer to `principal`, which may go on for so long after that has ended. The call counts until all of it is sent. A body is asked for
    /// nothing while its caller takes nothing, so of a stream the connection of such a caller, `unread`, is ended soon after.
    pub(crate) fn new(
        body: Body,
        principal: Arc<Principal>,
        grace: Duration,
        counted: Option<CountedCall>,
        unread: Option<Arc<Caller>>,
    ) -> Self {
        let unread =
            unread.map(|caller| UnreadEnd::after(principal.clone(), grace + UNREAD_PATIENCE, caller));
        let ended = Box::pin(async move {
            principal.ended().await;
            tokio::time::sleep(grace).await;
        });
        Self { body, ended, is_over: false, _counted: counted, _unread: unread }
    }
}

impl HttpBody for PermittedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        if this.is_over {
            return Poll::Ready(None);
        }
        // First: one that always has something to send would never be looked at.
        if this.ended.as_mut().poll(cx).is_ready() {
            this.is_over = true;
            this.body = Body::empty();
            // Its trailers are all that is left.
            let mut trailers = HeaderMap::new();
            let _ = Status::from(failure::no_longer_authenticated()).add_header(&mut trailers);
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match self.is_over {
            true => SizeHint::with_exact(0),
            false => self.body.size_hint(),
        }
    }
}
