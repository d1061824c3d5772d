//! `quorate.v1.Kv`: one call per request, or a [`pipeline`](super::pipeline) of many.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::Stream;
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};

use crate::proto::v1;
use crate::proto::v1::kv_server::Kv;
use crate::proto::v1::tagged_request::Request as Asked;
use crate::proto::v1::tagged_response::Response as Answer;

use super::failure;
use super::limits::DoorLimits;
use super::metrics::{Metrics, StreamCall};
use super::moments::Moments;
use super::node::KvNode;
use super::pipeline;
use super::streams;
use super::watches::{self, Feed, Place};
use super::wire::{self, Answerer, Asked as AskedFor, Call, Method};

type Pipelined = Pin<Box<dyn Stream<Item = Result<v1::PipelineResponse, Status>> + Send>>;

/// The service, over whatever node it is given.
pub(super) struct KvService<N> {
    pub(super) node: N,
    pub(super) by: Answerer,
    pub(super) metrics: Arc<Metrics>,
    pub(super) limits: Arc<DoorLimits>,
    pub(super) feed: Arc<Feed>,
    /// What long ranges are read from.
    pub(super) moments: Arc<Moments>,
    /// True once pipelines are to end.
    pub(super) draining: watch::Receiver<bool>,
}

impl<N: KvNode> KvService<N> {
    async fn call(&self, request: Asked) -> Result<Answer, Status> {
        self.call_of("", request).await
    }

    /// Answers `request` of the client at `opener`, which is of interest if it opens a session.
    async fn call_of(&self, opener: &str, request: Asked) -> Result<Answer, Status> {
        let (started, method) = (Instant::now(), wire::method(&request));
        let outcome = match wire::decode(request) {
            Ok(Call::Write(command, options)) => {
                let asked = AskedFor::new(method, &command);
                wire::written(&self.by, asked, self.node.write(command, options).await)
            }
            Ok(Call::OpenSession { ttl_ms }) => {
                wire::opened(&self.by, ttl_ms, self.node.open_session(opener, ttl_ms).await)
            }
            Ok(Call::CloseSession { session, history }) => {
                wire::closed(&self.by, self.node.close_session(session, history).await)
            }
            Ok(Call::Read(query, options)) => {
                let key = wire::asked_key(&query);
                wire::answered(&self.by, key, self.node.read(query, options).await)
            }
            Err(failure) => Err(failure),
        };
        self.metrics.observe(method, started, &outcome);
        Ok(outcome?)
    }
}

#[tonic::async_trait]
impl<N: KvNode> Kv for KvService<N> {
    async fn put(&self, request: Request<v1::PutRequest>) -> Result<Response<v1::PutResponse>, Status> {
        match self.call(Asked::Put(request.into_inner())).await? {
            Answer::Put(response) => Ok(Response::new(response)),
            _ => Err(unexpected()),
        }
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        match self.call(Asked::Get(request.into_inner())).await? {
            Answer::Get(response) => Ok(Response::new(response)),
            _ => Err(unexpected()),
        }
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        match self.call(Asked::Delete(request.into_inner())).await? {
            Answer::Delete(response) => Ok(Response::new(response)),
            _ => Err(unexpected()),
        }
    }

    async fn range(&self, request: Request<v1::RangeRequest>) -> Result<Response<v1::RangeResponse>, Status> {
        match self.call(Asked::Range(request.into_inner())).await? {
            Answer::Range(response) => Ok(Response::new(response)),
            _ => Err(unexpected()),
        }
    }

    async fn delete_range(
        &self,
        request: Request<v1::DeleteRangeRequest>,
    ) -> Result<Response<v1::DeleteRangeResponse>, Status> {
        match self.call(Asked::DeleteRange(request.into_inner())).await? {
            Answer::DeleteRange(response) => Ok(Response::new(response)),
            _ => Err(unexpected()),
        }
    }

    async fn txn(&self, request: Request<v1::TxnRequest>) -> Result<Response<v1::TxnResponse>, Status> {
        match self.call(Asked::Txn(request.into_inner())).await? {
            Answer::Txn(response) => Ok(Response::new(response)),
            _ => Err(unexpected()),
        }
    }

    async fn range_stream(
        &self,
        request: Request<v1::RangeRequest>,
    ) -> Result<Response<streams::Responses<v1::RangeResponse>>, Status> {
        let call = StreamCall::new(self.metrics.clone(), Method::RangeStream);
        let (node, moments) = (self.node.clone(), self.moments.clone());
        Ok(Response::new(streams::range(node, self.by.clone(), moments, request.into_inner(), call).await?))
    }

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<streams::Responses<v1::WatchResponse>>, Status> {
        let call = StreamCall::new(self.metrics.clone(), Method::Watch);
        let (node, draining) = (self.node.clone(), self.draining.clone());
        let place = match request.extensions().get() {
            Some(caller) => Place::take(caller, self.limits.watches),
            None => Err(super::failure::invalid("the connection of this call is not known")),
        };
        let feed = self.feed.clone();
        let watch = watches::watch(node, self.by.clone(), draining, feed, request.into_inner(), place, call);
        Ok(Response::new(watch.await?))
    }

    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionResponse>, Status> {
        let opener = client_address(&request);
        match self.call_of(&opener, Asked::OpenSession(request.into_inner())).await? {
            Answer::OpenSession(response) => Ok(Response::new(response)),
            _ => Err(unexpected()),
        }
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        match self.call(Asked::CloseSession(request.into_inner())).await? {
            Answer::CloseSession(response) => Ok(Response::new(response)),
            _ => Err(unexpected()),
        }
    }

    async fn pipeline(
        &self,
        request: Request<Streaming<v1::PipelineRequest>>,
    ) -> Result<Response<Pipelined>, Status> {
        let service = pipeline::Service {
            node: self.node.clone(),
            by: self.by.clone(),
            metrics: self.metrics.clone(),
            draining: self.draining.clone(),
            client: client_address(&request).into(),
            bound: self.limits.queued_bytes,
        };
        Ok(Response::new(Box::pin(pipeline::start(service, request.into_inner()))))
    }
}

/// Where `request` comes from, to tell whose sessions are whose; empty if that is not known.
fn client_address<T>(request: &Request<T>) -> String {
    request.remote_addr().map(|address| address.to_string()).unwrap_or_default()
}

/// The machine answers a put as a put; if it ever did not, the caller would learn of it and nobody else.
fn unexpected() -> Status {
    failure::unexpected(true).into()
}
