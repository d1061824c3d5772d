//! The key-value guest at a node's client port: `quorate.v1.Kv`, one call per request or a pipeline of many.

mod dispatch;
mod failure;
mod message;
mod moments;
mod pipeline;
mod progress;
mod range_tree;
mod ranges;
#[cfg(test)]
mod tests;
mod watches;
mod wishes;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::Stream;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::gauge::Gauge;
use prost::Message;
use serde::Serialize;
use tonic::server::NamedService;
use tonic::{Extensions, Request, Response, Status, Streaming};

use super::api::Method as KvMethod;
use super::calls::{self, Asked};
use super::codec::{self, RequestMessage, ResponseMessage};
use super::machine::{KvAnswer, KvMachine, KvReply};
use crate::call::Rejected;
use crate::door::deadline::AnswerBy;
use crate::door::failure::invalid;
use crate::door::methods::MethodId;
use crate::door::metrics::StreamCall;
use crate::door::services::counted;
use crate::door::streams::{Responses, WatchPlace};
use crate::door::{
    CallOf, Door, Guest, MAX_ANSWER_BYTES, MAX_MESSAGE_BYTES, Method, ServedNode, Touch, permitted,
};
use crate::engine::Engine;
use crate::error::OpenError;
use crate::incoming::Caller;
use crate::node::families::{EncodeResult, Families};
use crate::node::{Server, Services};
use crate::proto::v1::kv_server::{Kv as KvCalls, KvServer};
use crate::proto::v1::{self, Failure, Item};
use crate::types::LogId;

use dispatch::Dispatch;
use moments::{MAX_LONG_RANGES, Moments};
use pipeline::KvFraming;
use progress::AskedWatches;

/// A range or a transaction counts as this many requests: its answer may be thousands of times larger than others.
const RANGE_PERMITS: u32 = 64;

/// The key-value guest.
#[derive(Debug)]
#[non_exhaustive]
pub enum Kv {}

/// Where what is no request of a pipeline stands among the methods.
const RANGE_STREAM: usize = KvMethod::ALL.len();
const WATCH: usize = RANGE_STREAM + 1;
const WATCH_PROGRESS: usize = WATCH + 1;

impl Guest for Kv {
    type Machine = KvMachine;
    type Request = RequestMessage;
    type Response = ResponseMessage;
    type Asked = Asked;

    /// In the order of [`KvMethod::ALL`], then those that streams answer, and what is asked of those.
    const METHODS: &'static [Method] = &[
        Method::write(KvMethod::Put.name()),
        Method::read(KvMethod::Get.name()),
        Method::write(KvMethod::Delete.name()),
        Method::write(KvMethod::DeleteRange.name()),
        Method::read(KvMethod::Range.name()).counted_as(RANGE_PERMITS),
        Method::write(KvMethod::Txn.name()).counted_as(RANGE_PERMITS).weighed(),
        Method::read("range_stream"),
        Method::read("watch"),
        Method::read("watch_progress"),
    ];

    fn parse(method: usize, payload: Bytes) -> Result<RequestMessage, Rejected> {
        match KvMethod::ALL.get(method) {
            Some(method) => codec::parse(*method, payload),
            None => Err(Rejected::invalid("it is answered by a stream, which only the service Kv has")),
        }
    }

    fn touches(_: usize, request: &RequestMessage, touch: &mut Touch<'_>) {
        calls::touches(request, touch);
    }

    fn encode(response: ResponseMessage) -> Bytes {
        codec::payload(response)
    }

    fn expected_bytes(request: &RequestMessage) -> usize {
        calls::expected_bytes(request)
    }

    fn call(request: RequestMessage) -> Result<(CallOf<Self>, Asked), Rejected> {
        calls::call(codec::decode(request)?)
    }

    fn written(asked: Asked, at: LogId, reply: Option<KvReply>) -> Result<ResponseMessage, Rejected> {
        calls::written(asked, at, reply).map(codec::encode_response)
    }

    fn answered(asked: Asked, answer: KvAnswer) -> Result<ResponseMessage, Rejected> {
        calls::answered(asked, answer).map(codec::encode_response)
    }

    fn response_bytes(response: &ResponseMessage) -> usize {
        match response {
            ResponseMessage::Get(get) => get.encoded_len(),
            ResponseMessage::Range(range) => range.encoded_len() + range.items.len() * size_of::<Item>(),
            ResponseMessage::Txn(txn) => txn.encoded_len(),
            ResponseMessage::Put(_)
            | ResponseMessage::Delete(_)
            | ResponseMessage::DeleteRange(_)
            | ResponseMessage::Failure(_)
            | ResponseMessage::OpenSession(_)
            | ResponseMessage::CloseSession(_) => 0,
        }
    }

    fn tells_times(asked: &Asked) -> bool {
        asked.is_txn()
    }

    fn tell_reply_times(reply: &mut KvReply, time_at: &dyn Fn(u64) -> u64) {
        reply.map_expiry(time_at);
    }

    fn tell_answer_times(answer: &mut KvAnswer, time_at: &dyn Fn(u64) -> u64) {
        answer.map_expiry(time_at);
    }
}

/// A node with a key-value machine.
pub(crate) trait KvNode: ServedNode<Machine = KvMachine> {}

impl<N: ServedNode<Machine = KvMachine>> KvNode for N {}

/// Listens on `address`, a `host:port`, for a node with a key-value machine; port 0 takes a free one.
///
/// # Errors
/// [`OpenError::Listen`] when the address is in use or not this host's.
pub async fn bind(address: &str) -> Result<Server<Kv>, OpenError> {
    Ok(serve(Server::bind(address).await?))
}

/// As [`bind`], for a `server` that listens already, or has its connections from elsewhere.
pub fn serve(server: Server<Kv>) -> Server<Kv> {
    with_services(server)
}

/// With this guest's services, for whatever node has the machine.
pub(crate) fn with_services<N: KvNode>(server: Server<Kv, N>) -> Server<Kv, N> {
    let (open, moments) = (Streams::default(), Arc::<Moments>::default());
    let now = open.clone();
    let shown = ShownStreams { streams: open.clone(), moments: moments.clone() };
    let services = Services {
        names: vec![NAME],
        pipelines: vec![format!("/{NAME}/Pipeline")],
        add: Box::new(move |door, routes| {
            let service = KvServer::new(KvService {
                door,
                dispatch: Dispatch::default(),
                asked: AskedWatches::default(),
                moments,
                open,
            })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_ANSWER_BYTES);
            routes.add_service(service)
        }),
    };
    let part = move || serde_json::to_value(now.shown()).unwrap_or_default();
    server.with_services(services).with_collector(Box::new(shown)).with_status("streams", Arc::new(part))
}

/// How many streams of each kind are open.
#[derive(Debug, Clone, Default)]
struct Streams {
    watches: Gauge,
    long_ranges: Gauge,
}

/// The same on the status page.
#[derive(Debug, Serialize)]
struct OpenStreams {
    watches: u64,
    long_ranges: u64,
}

impl Streams {
    fn shown(&self) -> OpenStreams {
        let count = |gauge: &Gauge| u64::try_from(gauge.get()).unwrap_or_default();
        OpenStreams { watches: count(&self.watches), long_ranges: count(&self.long_ranges) }
    }
}

/// What pages show of the streams.
#[derive(Debug)]
struct ShownStreams {
    streams: Streams,
    moments: Arc<Moments>,
}

impl Collector for ShownStreams {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> EncodeResult {
        let (mut families, OpenStreams { watches, long_ranges }) = (Families(encoder), self.streams.shown());
        families.gauge("quorate_server_watches_open", "Watches open", None, watches)?;
        let help = format!("Long ranges being sent, {MAX_LONG_RANGES} at most");
        families.gauge("quorate_server_long_ranges_open", &help, None, long_ranges)?;
        let help = "Bytes overwritten or removed that long ranges keep, and those that may go on";
        families.gauge("quorate_server_long_ranges_pinned_bytes", help, None, self.moments.pinned_bytes())
    }
}

const NAME: &str = <KvServer<KvService<Engine<KvMachine>>> as NamedService>::NAME;

type Pipelined = Pin<Box<dyn Stream<Item = Result<v1::PipelineResponse, Status>> + Send>>;

/// The service, over whatever node it is given.
struct KvService<N> {
    door: Door<N>,
    dispatch: Dispatch,
    asked: AskedWatches,
    /// What long ranges are read from.
    moments: Arc<Moments>,
    open: Streams,
}

impl<N: KvNode> KvService<N> {
    /// Answers what `ask` makes of `request` with what `take` finds in the answer to that.
    async fn call<T, R>(
        &self,
        request: Request<T>,
        ask: fn(T) -> RequestMessage,
        take: fn(ResponseMessage) -> Option<R>,
    ) -> Result<Response<R>, Status> {
        let (_, extensions, request) = request.into_parts();
        let caller = extensions.get::<Arc<Caller>>().cloned();
        let within = extensions.get::<AnswerBy>().map(AnswerBy::left);
        let mut message = ask(request);
        let method = MethodId(pipeline::method(&message).unwrap_or_default());
        self.door.permit::<Kv>(method, &message, &permitted::caller(&extensions))?;
        let options = codec::take_options(&mut message);
        let relay = self.door.relay().filter(|_| Kv::METHODS[method.0].changes);
        let ((header, mut answer), built) = match relay {
            Some(relay) => {
                let asked = (codec::request_payload(&message), options);
                let decode = |header, payload| {
                    Some((header, codec::parse_response(*KvMethod::ALL.get(method.0)?, payload)?))
                };
                self.door.relayed::<Kv, _>(relay, method, asked, within, caller, decode).await?
            }
            None => self.door.call::<Kv>(method, message, options, caller).await?,
        };
        codec::set_header(&mut answer, header);
        // The machine answers a put as a put; if it ever did not, the caller would learn of it and nobody else.
        let answer = take(answer).ok_or_else(|| Failure::from(Rejected::unexpected(true)))?;
        Ok(counted(answer, built))
    }

    /// Whether the caller may read the range that it asks for.
    fn permit_range(&self, request: &Request<v1::RangeRequest>) -> Result<(), Failure> {
        let v1::RangeRequest { tenant, collection, .. } = request.get_ref();
        permit_reading(request.extensions(), tenant, collection)
    }

    /// The same of what it watches: all its ranges are of one collection.
    fn permit_watch(&self, request: &Request<v1::WatchRequest>) -> Result<(), Failure> {
        let v1::WatchRequest { tenant, collection, .. } = request.get_ref();
        permit_reading(request.extensions(), tenant, collection)
    }

    fn stream_call(&self, method: usize, open: &Gauge) -> StreamCall {
        StreamCall::new(self.door.metrics.clone(), MethodId(method), open)
    }
}

macro_rules! answer {
    ($kind:ident) => {
        |answer| match answer {
            ResponseMessage::$kind(answer) => Some(answer),
            _ => None,
        }
    };
}

#[tonic::async_trait]
impl<N: KvNode> KvCalls for KvService<N> {
    async fn put(&self, request: Request<v1::PutRequest>) -> Result<Response<v1::PutResponse>, Status> {
        self.call(request, RequestMessage::Put, answer!(Put)).await
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        self.call(request, RequestMessage::Get, answer!(Get)).await
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        self.call(request, RequestMessage::Delete, answer!(Delete)).await
    }

    async fn range(&self, request: Request<v1::RangeRequest>) -> Result<Response<v1::RangeResponse>, Status> {
        self.call(request, RequestMessage::Range, answer!(Range)).await
    }

    async fn delete_range(
        &self,
        request: Request<v1::DeleteRangeRequest>,
    ) -> Result<Response<v1::DeleteRangeResponse>, Status> {
        self.call(request, RequestMessage::DeleteRange, answer!(DeleteRange)).await
    }

    async fn txn(&self, request: Request<v1::TxnRequest>) -> Result<Response<v1::TxnResponse>, Status> {
        self.call(request, RequestMessage::Txn, answer!(Txn)).await
    }

    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionResponse>, Status> {
        let caller = request.extensions().get().cloned();
        let (opened, built) = self.door.open_session(request.into_inner(), caller).await?;
        Ok(counted(opened, built))
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        let caller = request.extensions().get().cloned();
        let (closed, built) = self.door.close_session(request.into_inner(), caller).await?;
        Ok(counted(closed, built))
    }

    async fn range_stream(
        &self,
        request: Request<v1::RangeRequest>,
    ) -> Result<Response<Responses<v1::RangeResponse>>, Status> {
        let call = self.stream_call(RANGE_STREAM, &self.open.long_ranges);
        let Door { node, by, .. } = self.door.clone();
        let own =
            self.permit_range(&request).and_then(|()| caller_of(&request).and_then(ranges::RangePlace::take));
        let range = ranges::range(node, by, self.moments.clone(), own, request.into_inner(), call);
        Ok(Response::new(range.await?))
    }

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Responses<v1::WatchResponse>>, Status> {
        let call = self.stream_call(WATCH, &self.open.watches);
        let Door { node, by, limits, draining, .. } = self.door.clone();
        let place = self
            .permit_watch(&request)
            .and_then(|()| caller_of(&request).and_then(|caller| WatchPlace::take(caller, limits.watches)));
        let own = self.asked.of(permitted::caller(request.extensions()).name());
        let dispatching = (self.dispatch.clone(), own);
        let watch = watches::watch(node, by, draining, dispatching, request.into_inner(), place, call);
        Ok(Response::new(watch.await?))
    }

    async fn watch_progress(
        &self,
        request: Request<v1::WatchProgressRequest>,
    ) -> Result<Response<v1::WatchProgressResponse>, Status> {
        let (started, Door { node, by, metrics, .. }) = (Instant::now(), &self.door);
        let own = self.asked.of(permitted::caller(request.extensions()).name());
        let outcome = progress::ask(node, by, &own, request.into_inner()).await;
        metrics.observe(MethodId(WATCH_PROGRESS), started, &outcome);
        Ok(Response::new(outcome?))
    }

    async fn pipeline(
        &self,
        request: Request<Streaming<v1::PipelineRequest>>,
    ) -> Result<Response<Pipelined>, Status> {
        let caller = request.extensions().get().cloned();
        let principal = permitted::caller(request.extensions());
        let (door, requests) = (self.door.clone(), request.into_inner());
        let outgoing = crate::door::pipeline::start::<KvFraming, _, _>(door, caller, principal, requests);
        Ok(Response::new(Box::pin(outgoing)))
    }
}

/// Whether a caller may read a collection for as long as it likes.
fn permit_reading(extensions: &Extensions, tenant: &str, collection: &str) -> Result<(), Failure> {
    let principal = permitted::caller(extensions);
    let mut permitted = Ok(());
    calls::range_touches(tenant, collection, &mut |right, touched| {
        permitted = permitted::part(&principal, right, touched);
    });
    permitted
}

fn caller_of<T>(request: &Request<T>) -> Result<&Arc<Caller>, Failure> {
    request.extensions().get().ok_or_else(|| invalid("the connection of this call is not known"))
}
