//! One write that its caller may ask for again, after any error, without its being applied twice: see [`client::Once`].

use bytes::Bytes;

use super::super::api::{PutReply, Request, Response, Scope, WriteOptions};
use super::{Client, decode, encode};
use crate::client::{self, ClientError};

/// A place for one write in the client's session. Dropping it gives the write up: it is then applied once, or not
/// at all.
#[derive(Debug)]
pub struct Once(client::Once);

impl Client {
    /// A place for one write, which may be asked for as often as it takes. Opens a session if there is none.
    ///
    /// # Errors
    /// See [`ClientError`]; nothing was written.
    pub async fn once(&self) -> Result<Once, ClientError> {
        self.client.once().await.map(Once)
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
        self.execute_with(request, client::WriteOptions::default()).await
    }

    /// The same, acknowledged as `options` say: [`WriteOptions`](client::WriteOptions), or an [`AckLevel`](crate::AckLevel) other than
    /// [`Leader`](crate::AckLevel::Leader). When not every voter has confirmed it in time the error [tells](Response::unconfirmed) what
    /// came of it all the same.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    ///
    /// # Panics
    /// As [`execute`](Self::execute).
    pub async fn execute_with(
        &mut self,
        request: Request,
        options: impl Into<client::WriteOptions>,
    ) -> Result<Response, ClientError> {
        let method = request.method();
        assert!(method.is_write(), "invariant: only writes have a place in a session");
        let options = options.into();
        self.0.call(method.name(), encode(request)?, options, decode(method)).await
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
        let request = Request::put(scope.clone(), key, value, &WriteOptions::default());
        match self.execute(request).await? {
            Response::Put(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }
}
