//! One write that its caller may ask for again, after any error, without its being applied twice.
//!
//! An ordinary write is repeated by the client until its deadline. A caller that gets an error then and calls again
//! makes another write. This is for those who must not: they hold on to the write, and ask for it until they know.

use std::sync::Arc;

use bytes::Bytes;
use tokio::time::Instant;

use super::error::ClientError;
use super::reply::{PutReply, Response};
use super::request::{Method, Request, Scope, WriteOptions};
use super::router::Router;
use super::sessions::{Place, Sessions};
use super::{Client, operation};
use crate::reason::Reason;

/// A place for one write in the client's session. Dropping it gives the write up: it is then applied once, or not
/// at all.
#[derive(Debug)]
pub struct Once {
    router: Arc<Router>,
    sessions: Arc<Sessions>,
    place: Place,
    /// Whether an attempt may have been applied.
    undecided: bool,
}

impl Client {
    /// A place for one write, which may be asked for as often as it takes. Opens a session if there is none.
    ///
    /// # Errors
    /// See [`ClientError`]; nothing was written.
    pub async fn once(&self) -> Result<Once, ClientError> {
        let deadline = Instant::now() + self.router.config.timeout;
        let place = self.sessions.begin(&self.router, deadline).await?;
        let (router, sessions) = (self.router.clone(), self.sessions.clone());
        Ok(Once { router, sessions, place, undecided: false })
    }
}

impl Once {
    /// Executes `request`, a write, which must be the same every time. However often it is
    /// called, the write is applied at most once, and every call that succeeds returns what that once returned.
    ///
    /// # Errors
    /// See [`ClientError`]. Unless the error [is final](ClientError::is_final) the call may be repeated.
    ///
    /// # Panics
    /// Panics when `request` is a read.
    pub async fn execute(&mut self, request: Request) -> Result<Response, ClientError> {
        assert!(
            !matches!(request.method(), Method::Get | Method::Range),
            "invariant: only writes have a place in a session"
        );
        let outcome = operation::execute_in(&self.router, &self.place, &request, &mut self.undecided).await;
        if let Err(ClientError::Failed { reason: Reason::SessionExpired, .. }) = &outcome {
            self.sessions.forget(self.place.slot().session);
        }
        outcome
    }

    /// Sets `key` to `value`; see [`execute`](Self::execute).
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub async fn put(
        &mut self,
        scope: &Scope,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
    ) -> Result<PutReply, ClientError> {
        let options = WriteOptions::default();
        let request = Request::Put { scope: scope.clone(), key: key.into(), value: value.into(), options };
        match self.execute(request).await? {
            Response::Put(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }
}
