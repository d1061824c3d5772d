//! One write that its caller may ask for again, after any error, without its being applied twice.
//!
//! An ordinary write is repeated by the client until its deadline. A caller that gets an error then and calls again
//! makes another write. This is for those who must not: they hold on to the write, and ask for it until they know.

use std::sync::Arc;

use bytes::Bytes;
use tokio::time::Instant;

use super::error::ClientError;
use super::execute::{self, Ask};
use super::frame::Payload;
use super::options::{CallOptions, WriteOptions};
use super::router::Router;
use super::sessions::{Place, Sessions};
use super::{Answer, Client};
use crate::call::Header;

/// A place for one write in the client's session. Dropping it gives the write up: it is then applied once, or not
/// at all.
#[derive(Debug)]
pub struct Once {
    router: Arc<Router>,
    sessions: Arc<Sessions>,
    place: Place,
    /// Whether an attempt has been applied, or may have been.
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
    /// Calls `method` with the request in `payload`, which must be the same every time. However often it is called, the
    /// write is applied at most once, and every call that succeeds returns what that once returned.
    ///
    /// # Errors
    /// See [`ClientError`]. Unless the error [is final](ClientError::is_final) the call may be repeated.
    pub async fn write(
        &mut self,
        method: &'static str,
        payload: impl Into<Bytes>,
        options: impl Into<WriteOptions>,
    ) -> Result<Answer, ClientError> {
        self.call(method, payload.into(), options.into(), super::answer).await
    }

    /// The same; `decode` makes of the answer what was asked for.
    pub(crate) async fn call<T>(
        &mut self,
        method: &'static str,
        payload: impl Payload,
        options: WriteOptions,
        decode: impl Fn(Header, Bytes) -> Option<T>,
    ) -> Result<T, ClientError> {
        let ask = Ask { method, payload, options: CallOptions::Write(options) };
        let (router, undecided) = (&self.router, &mut self.undecided);
        let outcome = execute::execute_in(router, &self.place, &ask, decode, undecided).await;
        if let Err(error) = &outcome
            && execute::session_is_gone(&self.place, &options, error)
        {
            self.sessions.forget(self.place.slot().session);
        }
        outcome
    }
}
