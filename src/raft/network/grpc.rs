//! The transport between real nodes: one bidirectional gRPC stream per connection, over tonic.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Status, Streaming};

use super::calls::MOST_REPLY_BYTES;
use super::traffic::{PeerTraffic, Traffic};
use super::wire;
use super::{
    CONNECTION_REQUESTS, Connection, DialError, Hello, IdentifyRequest, IdentifyResponse, Incoming, PeerDoor,
    Purpose, Refusal, Request, Response, Target, Transport,
};
use crate::incoming::{self, Beginning, Caller, Places};
use crate::proto::peer::peer_client::PeerClient;
use crate::proto::peer::peer_server::{Peer, PeerServer};
use crate::proto::{details, peer as proto};
use crate::runtime;
use crate::shown;
use crate::types::NodeId;

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a silent connection is probed, and how long the answer may take.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// How long a connection may be silent before the system looks whether its other end is still there.
const TCP_KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long a caller may take to begin.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest message between members. Not derived from this node's limits: another node, or this one before it
/// was configured anew, may have larger entries in its log.
const MAX_MESSAGE_BYTES: usize = 64 * 1024 * 1024;
const _: () = assert!(MOST_REPLY_BYTES < MAX_MESSAGE_BYTES, "an answer breaks no connection");
/// Most bytes that a connection carries, frames included, before its caller has said who it is: room for a handshake,
/// or for a question who this node is with a long list of founders.
const HANDSHAKE_BYTES: usize = 16 * 1024;
/// One in so many of the files that the process may open is for peers.
const FILES_SHARE: usize = 8;
/// Streams one peer may open on one connection.
const MAX_STREAMS: u32 = 64;
/// Bytes that may be under way before the receiver has taken them.
const WINDOW_BYTES: u32 = 8 * 1024 * 1024;

/// Connects to peers over TCP.
#[derive(Debug, Clone, Default)]
pub struct GrpcTransport {
    traffic: Arc<Traffic>,
}

impl GrpcTransport {
    /// Where it counts; the answering side counts there too.
    pub fn counts(&self) -> Arc<Traffic> {
        self.traffic.clone()
    }

    async fn open(&self, address: &str) -> Result<PeerClient<Channel>, DialError> {
        let unreachable = |error: tonic::transport::Error| DialError::Unreachable(in_words(&error));
        let channel = Endpoint::from_shared(format!("http://{address}"))
            .map_err(unreachable)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .connect()
            .await
            .map_err(unreachable)?;
        Ok(PeerClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }

    async fn dial(
        &self,
        address: &str,
        hello: Hello,
        traffic: Arc<PeerTraffic>,
    ) -> Result<Connection, DialError> {
        let mut client = self.open(address).await?;
        let caller = hello.from_node;
        let (requests, outgoing) = mpsc::channel(CONNECTION_REQUESTS);
        let hello = Request { id: 0, body: Some(proto::request::Body::Hello(hello)) };
        requests.try_send(hello).expect("invariant: an empty queue takes the handshake");
        let incoming = client
            .exchange(counted(outgoing, traffic.clone()))
            .await
            .map_err(|status| dial_error(caller, &status))?
            .into_inner();
        Ok(Connection { requests, responses: arriving(incoming, traffic) })
    }
}

/// An error by its innermost cause: tonic's own message is only "transport error".
fn in_words(error: &(dyn std::error::Error + 'static)) -> String {
    shown::cause(error).unwrap_or_else(|| error.to_string())
}

fn dial_error(caller: NodeId, status: &Status) -> DialError {
    if status.code() == Code::PermissionDenied
        && let Some(refusal) = details::refusal(status.details())
    {
        return DialError::Refused(wire::from_refusal(caller, refusal));
    }
    DialError::Unreachable(match status.code() {
        Code::Unimplemented => "what answers there is no peer port of a node".to_owned(),
        _ => shown::cause(status).unwrap_or_else(|| status.message().to_owned()),
    })
}

fn refused(refusal: &Refusal) -> Status {
    let code = Code::PermissionDenied;
    let details = details::of_refusal(code.into(), &wire::refusal(refusal));
    Status::with_details(code, refusal.to_string(), details)
}

impl Transport for GrpcTransport {
    fn connect(
        &self,
        target: Target,
        hello: Hello,
        _purpose: Purpose,
    ) -> BoxFuture<'static, Result<Connection, DialError>> {
        let this = self.clone();
        let traffic = self.traffic.with(target.node_id);
        async move {
            let dialled = this.dial(&target.address, hello, traffic.clone()).await;
            traffic.dialled(dialled.is_ok());
            dialled
        }
        .boxed()
    }

    fn identify(
        &self,
        address: String,
        request: IdentifyRequest,
    ) -> BoxFuture<'static, Result<IdentifyResponse, DialError>> {
        let this = self.clone();
        async move {
            let caller = request.hello.as_ref().map_or(0, |hello| hello.from_node);
            let mut client = this.open(&address).await?;
            let response = client.identify(request).await.map_err(|status| dial_error(caller, &status))?;
            Ok(response.into_inner())
        }
        .boxed()
    }

    fn traffic(&self) -> Option<Arc<Traffic>> {
        Some(self.counts())
    }
}

/// Counts messages on their way out.
fn counted<T>(outgoing: mpsc::Receiver<T>, traffic: Arc<PeerTraffic>) -> impl Stream<Item = T> + Send
where
    T: Message + Send + 'static,
{
    ReceiverStream::new(outgoing).inspect(move |message| traffic.sent(message.encoded_len()))
}

/// Messages of a gRPC stream until it ends or breaks, counted.
fn arriving<T>(incoming: Streaming<T>, traffic: Arc<PeerTraffic>) -> Incoming<T>
where
    T: Message + Send + 'static,
{
    Incoming::new(incoming.scan((), move |(), next| {
        std::future::ready(match next {
            Ok(message) => {
                traffic.received(message.encoded_len());
                Some(message)
            }
            Err(status) => {
                tracing::debug!(error = status.message(), "a peer connection broke");
                None
            }
        })
    }))
}

type ResponseStream = Pin<Box<dyn Stream<Item = Result<Response, Status>> + Send>>;

struct GrpcDoor {
    door: Arc<dyn PeerDoor>,
    traffic: Arc<Traffic>,
    stop: watch::Receiver<bool>,
}

#[tonic::async_trait]
impl Peer for GrpcDoor {
    async fn identify(
        &self,
        request: tonic::Request<IdentifyRequest>,
    ) -> Result<tonic::Response<IdentifyResponse>, Status> {
        self.door.identify(request.into_inner()).map(tonic::Response::new).map_err(|r| refused(&r))
    }

    async fn exchange(
        &self,
        request: tonic::Request<Streaming<Request>>,
    ) -> Result<tonic::Response<ResponseStream>, Status> {
        let caller = request.extensions().get::<Arc<Caller>>().cloned();
        let from = caller.as_ref().and_then(|caller| caller.address());
        let mut incoming = request.into_inner();
        let first = tokio::time::timeout(HANDSHAKE_TIMEOUT, incoming.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no handshake came"))?;
        let hello = match first? {
            Some(Request { body: Some(proto::request::Body::Hello(hello)), .. }) => hello,
            _ => return Err(Status::invalid_argument("a connection begins with a handshake")),
        };
        if let Err(refusal) = self.door.admit(&hello) {
            let address = from.map(tracing::field::display);
            tracing::debug!(node = hello.from_node, address, %refusal, "refused a peer");
            return Err(refused(&refusal));
        }
        if let Some(caller) = caller {
            caller.stays();
        }
        let (responses, outgoing) = mpsc::channel(CONNECTION_REQUESTS);
        let traffic = self.traffic.with(hello.from_node);
        let requests = arriving(incoming, traffic.clone());
        let (serve, mut stop) = (self.door.serve(hello.from_node, requests, responses), self.stop.clone());
        runtime::spawn(async move {
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => {}
                () = serve => {}
            }
        });
        Ok(tonic::Response::new(counted(outgoing, traffic).map(Ok).boxed()))
    }
}

/// What serves peers on `listener` for as long as it is polled, or until the port fails. Connections that were accepted end
/// when `stop` changes. Counts what is carried in `traffic`.
///
/// # Errors
/// When the listener cannot be used.
pub(crate) fn serve(
    listener: std::net::TcpListener,
    door: Arc<dyn PeerDoor>,
    traffic: Arc<Traffic>,
    stop: watch::Receiver<bool>,
) -> io::Result<impl Future<Output = ()> + Send + 'static> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let service = PeerServer::new(GrpcDoor { door, traffic, stop })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    // A caller that has not said who it is gives way to the next one, so strangers keep no member out.
    let places = Places::new(incoming::connections(FILES_SHARE), 0);
    let beginning = Beginning::Identify { max_bytes: HANDSHAKE_BYTES };
    let incoming = incoming::bounded(incoming::arrivals_at(listener, TCP_KEEP_ALIVE), places, beginning);
    Ok(async move {
        let server = Server::builder()
            .max_concurrent_streams(MAX_STREAMS)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .http2_keepalive_interval(Some(KEEP_ALIVE))
            .http2_keepalive_timeout(Some(KEEP_ALIVE))
            .add_service(service)
            .serve_with_incoming(incoming);
        // Peers keep their connections open for ever: nobody waits for them to go when the node stops.
        if let Err(error) = server.await {
            tracing::error!(error = in_words(&error), "the peer port failed");
        }
    })
}
