//! `quorate.v1.Kv`: one call per request, or a [`pipeline`](super::pipeline) of many.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::Stream;
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};

use crate::incoming::Caller;
use crate::proto::v1;
use crate::proto::v1::Failure;
use crate::proto::v1::kv_server::Kv;
use crate::proto::v1::tagged_request::Request as Asked;
use crate::proto::v1::tagged_response::Response as Answer;

use super::bodies::{self, Built};
use super::failure;
use super::limits::DoorLimits;
use super::metrics::{Metrics, StreamCall};
use super::moments::Moments;
use super::node::KvNode;
use super::pipeline::{self, RESPONSE_BYTES, answer_bytes};
use super::streams;
use super::watches::{self, Feed, Place};
use super::wire::{self, Answerer, Asked as AskedFor, Call, Method};

/// The answer to a write is given however little room there is, if it is no larger.
const SMALL_ANSWER_BYTES: usize = 16 * 1024;

type Pipelined = Pin<Box<dyn Stream<Item = Result<v1::PipelineResponse, Status>> + Send>>;

/// The service, over whatever node it is given.
pub(super) struct KvService<N> {
    pub(super) node: N,
    pub(super) by: Answerer,
    pub(super) metrics: Arc<Metrics>,
    pub(super) limits: Arc<DoorLimits>,
    pub(super) feed: Feed,
    /// What long ranges are read from.
    pub(super) moments: Arc<Moments>,
    /// True once pipelines are to end.
    pub(super) draining: watch::Receiver<bool>,
}

impl<N: KvNode> KvService<N> {
    /// Answers what `ask` makes of `request` with what `take` finds in the answer to that.
    async fn call<T, R>(
        &self,
        request: Request<T>,
        ask: fn(T) -> Asked,
        take: fn(Answer) -> Option<R>,
    ) -> Result<Response<R>, Status> {
        let caller = request.extensions().get::<Arc<Caller>>().cloned();
        let opener = client_address(caller.as_deref());
        let (started, asked) = (Instant::now(), ask(request.into_inner()));
        let method = wire::method(&asked);
        let outcome = self.outcome(method, &opener, asked, caller.as_deref()).await;
        self.metrics.observe(method, started, &outcome);
        let answer = outcome?;
        let built = caller.map(|caller| Built::new(caller, RESPONSE_BYTES + answer_bytes(&answer)));
        // The machine answers a put as a put; if it ever did not, the caller would learn of it and nobody else.
        let mut response = Response::new(take(answer).ok_or_else(|| failure::unexpected(true))?);
        if let Some(built) = built {
            response.extensions_mut().insert(built);
        }
        Ok(response)
    }

    /// What a client at `opener` is answered, which is of interest if it opens a session. It is not read before its
    /// connection has room for it.
    async fn outcome(
        &self,
        method: Method,
        opener: &str,
        asked: Asked,
        caller: Option<&Caller>,
    ) -> Result<Answer, Failure> {
        let bound = self.limits.unsent_bytes;
        let has_room = || caller.is_none_or(|caller| caller.has_room(bound));
        match wire::decode(asked)? {
            Call::Write(command, options) => {
                let asked = AskedFor::new(method, &command);
                let answer = wire::written(&self.by, asked, self.node.write(command, options).await)?;
                match has_room() || answer_bytes(&answer) <= SMALL_ANSWER_BYTES {
                    true => Ok(answer),
                    false => Err(failure::no_room_for_answer(bound)),
                }
            }
            Call::OpenSession { ttl_ms } => {
                wire::opened(&self.by, ttl_ms, self.node.open_session(opener, ttl_ms).await)
            }
            Call::CloseSession { session, history } => {
                wire::closed(&self.by, self.node.close_session(session, history).await)
            }
            Call::Read(query, options) => {
                let key = wire::asked_key(&query);
                loop {
                    let outcome = self.node.read(query.clone(), options).await;
                    match caller {
                        Some(caller) if !has_room() => {
                            // What was read is let go, and read again.
                            drop(outcome);
                            bodies::room(caller, &self.limits).await;
                        }
                        _ => return wire::answered(&self.by, key, outcome),
                    }
                }
            }
        }
    }
}

macro_rules! answer {
    ($kind:ident) => {
        |answer| match answer {
            Answer::$kind(answer) => Some(answer),
            _ => None,
        }
    };
}

#[tonic::async_trait]
impl<N: KvNode> Kv for KvService<N> {
    async fn put(&self, request: Request<v1::PutRequest>) -> Result<Response<v1::PutResponse>, Status> {
        self.call(request, Asked::Put, answer!(Put)).await
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        self.call(request, Asked::Get, answer!(Get)).await
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        self.call(request, Asked::Delete, answer!(Delete)).await
    }

    async fn range(&self, request: Request<v1::RangeRequest>) -> Result<Response<v1::RangeResponse>, Status> {
        self.call(request, Asked::Range, answer!(Range)).await
    }

    async fn delete_range(
        &self,
        request: Request<v1::DeleteRangeRequest>,
    ) -> Result<Response<v1::DeleteRangeResponse>, Status> {
        self.call(request, Asked::DeleteRange, answer!(DeleteRange)).await
    }

    async fn txn(&self, request: Request<v1::TxnRequest>) -> Result<Response<v1::TxnResponse>, Status> {
        self.call(request, Asked::Txn, answer!(Txn)).await
    }

    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionResponse>, Status> {
        self.call(request, Asked::OpenSession, answer!(OpenSession)).await
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        self.call(request, Asked::CloseSession, answer!(CloseSession)).await
    }

    async fn range_stream(
        &self,
        request: Request<v1::RangeRequest>,
    ) -> Result<Response<streams::Responses<v1::RangeResponse>>, Status> {
        let call = StreamCall::new(self.metrics.clone(), Method::RangeStream);
        let (node, by, moments) = (self.node.clone(), self.by.clone(), self.moments.clone());
        let own = caller_of(&request).and_then(streams::Place::take);
        Ok(Response::new(streams::range(node, by, moments, own, request.into_inner(), call).await?))
    }

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<streams::Responses<v1::WatchResponse>>, Status> {
        let call = StreamCall::new(self.metrics.clone(), Method::Watch);
        let (node, draining) = (self.node.clone(), self.draining.clone());
        let place = caller_of(&request).and_then(|caller| Place::take(caller, self.limits.watches));
        let feed = self.feed.clone();
        let watch = watches::watch(node, self.by.clone(), draining, feed, request.into_inner(), place, call);
        Ok(Response::new(watch.await?))
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
            caller: request.extensions().get().cloned(),
            limits: self.limits.clone(),
        };
        Ok(Response::new(Box::pin(pipeline::start(service, request.into_inner()))))
    }
}

fn caller_of<T>(request: &Request<T>) -> Result<&Arc<Caller>, Failure> {
    request.extensions().get().ok_or_else(|| failure::invalid("the connection of this call is not known"))
}

/// Where `caller` is, to tell whose sessions are whose; empty if that is not known. What tonic tells as the remote address of
/// a request is of connections that it has accepted itself.
fn client_address(caller: Option<&Caller>) -> String {
    caller.and_then(Caller::address).map(|address| address.to_string()).unwrap_or_default()
}
