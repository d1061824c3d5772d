//! The client: one handle on a cluster, for any number of concurrent callers.
//!
//! A [`Client`] is given some endpoints and finds the rest: it learns the members and the leader from
//! whoever answers, sends writes and linearizable reads to the leader, follows it through a fail-over, and
//! spreads local reads over all nodes. All callers share one stream per node; many requests travel in one
//! message and are answered out of order.
//!
//! # What it promises
//!
//! - An operation ends by its deadline, with an answer or a [`ClientError`].
//! - A read is repeated until it is answered. A write is repeated only when it is certain that it was not
//!   applied; otherwise the caller gets an error for which [`ClientError::maybe_applied`] is true.
//! - A leader whose process is gone is noticed at once, one that hangs within a second or two, and one that
//!   was deposed without knowing it as soon as another node tells of its successor.
//!
//! # What it does not do
//!
//! It does not make writes exactly-once yet: that takes sessions. It does not cache, and it does not order
//! the operations of concurrent callers. It has no TLS yet.
//!
//! # Where things are
//!
//! `admin` operates the cluster. `operation` decides about retries, `router` knows who leads, `connection` owns the stream to one
//! node, `node` is what the others share about that node. Tasks: one per node that was used, and
//! short-lived probes; none per request.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::join_all;

pub use admin::{Member, MemberChange, Members};
pub use config::{ClientConfig, Endpoint};
pub use error::{Cause, ClientError, ConfigError, Rejection};
pub use request::{
    DeleteReply, GetReply, Header, Item, PutReply, Range, RangeReply, Request, Response, Scope,
};
pub use status::{MemberStatus, NodeStatus};

use crate::types::ReadLevel;
use router::Router;

mod admin;
mod config;
mod connection;
mod error;
mod in_flight;
mod node;
mod operation;
mod request;
mod router;
mod status;
#[cfg(test)]
pub(crate) mod tests;

/// A handle on a cluster. Cheap to clone; all clones share their connections.
///
/// Connections are made when they are first needed, on the tokio runtime of the caller that needs them;
/// they end with that runtime. Dropping the future of an operation does not recall what was sent: a write
/// may be applied all the same.
#[derive(Clone)]
pub struct Client {
    router: Arc<Router>,
}

impl Client {
    /// A client of the cluster that the nodes at `endpoints` (`host:port` or `http://host:port`) belong to.
    /// One endpoint is enough as long as it answers; more are better. Connects to nothing yet.
    ///
    /// # Errors
    /// [`ConfigError`] when there is no endpoint, or one or a setting is invalid.
    pub fn new<I>(endpoints: I, config: ClientConfig) -> Result<Self, ConfigError>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        config.validate()?;
        let mut parsed = Vec::new();
        for endpoint in endpoints {
            let endpoint = Endpoint::parse(endpoint.as_ref())?;
            if !parsed.contains(&endpoint) {
                parsed.push(endpoint);
            }
        }
        if parsed.is_empty() {
            return Err(ConfigError::NoEndpoints);
        }
        Ok(Self { router: Arc::new(Router::new(parsed, config)) })
    }

    /// Sets `key` to `value`.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::maybe_applied`] says whether the value may be set all the same.
    pub async fn put(
        &self,
        scope: &Scope,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
    ) -> Result<PutReply, ClientError> {
        let request = Request::Put { scope: scope.clone(), key: key.into(), value: value.into() };
        match self.execute(request).await? {
            Response::Put(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }

    /// Reads `key`. The reply holds no item when the key does not exist.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get(
        &self,
        scope: &Scope,
        key: impl Into<Bytes>,
        level: ReadLevel,
    ) -> Result<GetReply, ClientError> {
        let request = Request::Get { scope: scope.clone(), key: key.into(), level };
        match self.execute(request).await? {
            Response::Get(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }

    /// Removes `key`. The reply says whether it existed.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::maybe_applied`] says whether the key may be gone all the same.
    pub async fn delete(&self, scope: &Scope, key: impl Into<Bytes>) -> Result<DeleteReply, ClientError> {
        let request = Request::Delete { scope: scope.clone(), key: key.into() };
        match self.execute(request).await? {
            Response::Delete(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }

    /// Reads the keys in `range`, in order. A reply with `next` set holds only the first of them.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn range(
        &self,
        scope: &Scope,
        range: Range,
        level: ReadLevel,
    ) -> Result<RangeReply, ClientError> {
        let request = Request::Range { scope: scope.clone(), range, level };
        match self.execute(request).await? {
            Response::Range(reply) => Ok(reply),
            _ => unreachable!("invariant: a response answers its request"),
        }
    }

    /// Executes `request`: on the leader, or on any node in turn for a local read. The response is of the
    /// request's kind.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn execute(&self, request: Request) -> Result<Response, ClientError> {
        operation::execute(&self.router, request, None).await
    }

    /// Executes `request` on the node at `endpoint` and on no other.
    ///
    /// # Errors
    /// See [`ClientError`]; [`Cause::NotLeader`] when the node does not lead and the request needs the leader.
    pub async fn execute_at(&self, endpoint: &Endpoint, request: Request) -> Result<Response, ClientError> {
        operation::execute(&self.router, request, Some(endpoint)).await
    }

    /// Asks the node at `endpoint` for its status; once, without retries.
    ///
    /// # Errors
    /// [`ClientError::Unavailable`] when it does not answer in time.
    pub async fn status(&self, endpoint: &Endpoint) -> Result<NodeStatus, ClientError> {
        let config = &self.router.config;
        let patience = config.timeout.min(config.connect_timeout + config.attempt_timeout);
        let link = self.router.at(endpoint);
        match link.node.status(patience).await {
            Ok(status) => Ok(NodeStatus::from_wire(endpoint.clone(), status)),
            Err(why) => Err(ClientError::Unavailable { tried: vec![(endpoint.clone(), why.to_string())] }),
        }
    }

    /// Asks all endpoints that the client was made with, at the same time.
    pub async fn status_all(&self) -> Vec<(Endpoint, Result<NodeStatus, ClientError>)> {
        let ask = |endpoint: Endpoint| async move {
            let status = self.status(&endpoint).await;
            (endpoint, status)
        };
        join_all(self.router.endpoints(true).into_iter().map(ask)).await
    }

    /// All endpoints known at present: those given, then those learnt.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.router.endpoints(false)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("endpoints", &self.endpoints()).finish_non_exhaustive()
    }
}
