//! The transport between real nodes: one bidirectional gRPC stream per connection, over tonic, secured as [`trust`](crate::trust)
//! says.

mod dial;

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Status, Streaming};

use self::dial::PeerDialler;
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
use crate::trust::peers::{Handshakes, PeerAuthenticator, may_speak_for};
use crate::trust::wire::Proven;
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
    authenticator: Option<Arc<PeerAuthenticator>>,
}

impl GrpcTransport {
    /// One whose connections `authenticator` secures, if there is one.
    pub(crate) fn secured(authenticator: Option<Arc<PeerAuthenticator>>) -> Self {
        Self { authenticator, ..Self::default() }
    }

    /// Where it counts; the answering side counts there too.
    pub fn counts(&self) -> Arc<Traffic> {
        self.traffic.clone()
    }

    /// To node `wanted` at an address, or to any member there; and what the other end has proven, where it proves anything.
    async fn open(
        &self,
        address: &str,
        wanted: Option<NodeId>,
    ) -> Result<(PeerClient<Channel>, Option<Proven>), DialError> {
        let unreachable = |error: tonic::transport::Error| DialError::Unreachable(in_words(&error));
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(unreachable)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        let (channel, proven) = match &self.authenticator {
            None => (endpoint.connect().await, Arc::<OnceLock<Proven>>::default()),
            Some(authenticator) => {
                let (dialler, proven) = PeerDialler::to(wanted, authenticator.clone());
                (endpoint.connect_with_connector(dialler).await, proven)
            }
        };
        let client = PeerClient::new(channel.map_err(unreachable)?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok((client, proven.get().cloned()))
    }

    async fn dial(
        &self,
        target: &Target,
        hello: Hello,
        traffic: Arc<PeerTraffic>,
    ) -> Result<Connection, DialError> {
        let (mut client, _) = self.open(&target.address, Some(target.node_id)).await?;
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
            let dialled = this.dial(&target, hello, traffic.clone()).await;
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
            let hello = request.hello.as_ref();
            let caller = hello.map_or(0, |hello| hello.from_node);
            let cluster = hello.map(|hello| hello.cluster.clone()).unwrap_or_default();
            let (mut client, proven) = this.open(&address, None).await?;
            let response = client.identify(request).await.map_err(|status| dial_error(caller, &status))?;
            let response = response.into_inner();
            match may_speak_for(proven.as_ref(), &cluster, response.node_id) {
                true => Ok(response),
                false => Err(DialError::Unreachable(format!(
                    "what answers there says that it is node {}, and its certificate is not that node's",
                    response.node_id
                ))),
            }
        }
        .boxed()
    }

    fn traffic(&self) -> Option<Arc<Traffic>> {
        Some(self.counts())
    }

    fn handshakes(&self) -> Option<Arc<Handshakes>> {
        self.authenticator.as_ref().map(|authenticator| authenticator.handshakes())
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

/// Refuses a caller that says something else of itself than it has proven. It is told what every stranger is, and nothing that it has said is
/// looked into.
fn check_proven(caller: Option<&Arc<Caller>>, hello: Option<&Hello>) -> Result<(), Status> {
    let (cluster, node_id) = hello.map_or(("", 0), |hello| (hello.cluster.as_str(), hello.from_node));
    let proven = caller.and_then(|caller| caller.proven());
    if may_speak_for(proven, cluster, node_id) {
        return Ok(());
    }
    let address = caller.and_then(|caller| caller.address()).map(tracing::field::display);
    tracing::debug!(
        node = node_id,
        address,
        "a caller's certificate is not that of the node it says that it is"
    );
    Err(refused(&Refusal::Stranger))
}

#[tonic::async_trait]
impl Peer for GrpcDoor {
    async fn identify(
        &self,
        request: tonic::Request<IdentifyRequest>,
    ) -> Result<tonic::Response<IdentifyResponse>, Status> {
        check_proven(request.extensions().get::<Arc<Caller>>(), request.get_ref().hello.as_ref())?;
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
        check_proven(caller.as_ref(), Some(&hello))?;
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
/// when `stop` changes. Counts what is carried in `traffic`. Callers prove to `authenticator`, if there is one, who they are.
///
/// # Errors
/// When the listener cannot be used.
pub(crate) fn serve(
    listener: std::net::TcpListener,
    door: Arc<dyn PeerDoor>,
    traffic: Arc<Traffic>,
    authenticator: Option<Arc<PeerAuthenticator>>,
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
    let arrivals = incoming::arrivals_at(listener, TCP_KEEP_ALIVE);
    let arrivals = match authenticator {
        None => arrivals,
        Some(authenticator) => incoming::secured(arrivals, move |wire| authenticator.accepting(wire)),
    };
    let incoming = incoming::bounded(arrivals, places, beginning);
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
