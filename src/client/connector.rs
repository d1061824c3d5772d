//! How a client gets its connections.

use std::fmt;
use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tonic::codegen::Service;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};

use crate::trust::client::ClientTls;
use crate::wire::Wire;

/// How a client gets a connection to an address: over TCP by default, or by whatever a program brings, such as a tunnel or a
/// simulated network.
///
/// ```
/// use quorate::client::{ClientConfig, Connector};
/// use tokio::net::UnixStream;
///
/// let mut config = ClientConfig::default();
/// config.connector = Connector::new(|address| async move { UnixStream::connect(format!("/run/{address}")).await });
/// ```
#[derive(Clone, Default)]
pub struct Connector(Option<Arc<Dial>>);

type Dialling = BoxFuture<'static, io::Result<TokioIo<Box<dyn Wire>>>>;
type Dial = dyn Fn(String) -> Dialling + Send + Sync;

impl Connector {
    /// Connects by `dial`, which is given an endpoint as `host:port`. It may take
    /// [`connect_timeout`](super::ClientConfig::connect_timeout), and is dropped then. One that panics has failed. What a socket
    /// needs besides, such as `TCP_NODELAY`, is for `dial` to set.
    pub fn new<F, C, W>(dial: F) -> Self
    where
        F: Fn(String) -> C + Send + Sync + 'static,
        C: Future<Output = io::Result<W>> + Send + 'static,
        W: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let dial = Arc::new(dial);
        let boxed = move |address| {
            let dial = dial.clone();
            let dialling = AssertUnwindSafe(async move { dial(address).await }).catch_unwind();
            let panicked = |_| Err(io::Error::other("what was to connect has panicked"));
            let boxed = |wire| TokioIo::new(Box::new(wire) as Box<dyn Wire>);
            dialling.map(move |dialled| dialled.unwrap_or_else(panicked).map(boxed)).boxed()
        };
        Self(Some(Arc::new(boxed)))
    }

    /// A channel that connects when it is used, and again after a break; by `tls` if there is any.
    pub(crate) fn connect_lazy(&self, endpoint: &Endpoint, tls: Option<&ClientTls>) -> Channel {
        match (&self.0, tls) {
            (None, None) => endpoint.connect_lazy(),
            (dial, tls) => {
                let dial = dial.clone().unwrap_or_else(|| Arc::new(over_tcp));
                endpoint.connect_with_connector_lazy(Dialler { dial, tls: tls.cloned() })
            }
        }
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Connector(own)" } else { "Connector(tcp)" })
    }
}

/// The same way, not one that does the same.
impl PartialEq for Connector {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

impl Eq for Connector {}

/// As it is without a connector, and below TLS.
fn over_tcp(address: String) -> Dialling {
    async move {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(TokioIo::new(Box::new(stream) as Box<dyn Wire>))
    }
    .boxed()
}

struct Dialler {
    dial: Arc<Dial>,
    tls: Option<ClientTls>,
}

impl Service<Uri> for Dialler {
    type Response = TokioIo<Box<dyn Wire>>;
    type Error = io::Error;
    type Future = Dialling;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, address: Uri) -> Dialling {
        match address.authority() {
            Some(authority) => {
                let (address, tls) = (authority.to_string(), self.tls.clone());
                let dialling = (self.dial)(address.clone());
                match tls {
                    None => dialling,
                    Some(tls) => async move {
                        let wire = dialling.await?.into_inner();
                        Ok(TokioIo::new(tls.secure(wire, &address).await?))
                    }
                    .boxed(),
                }
            }
            None => std::future::ready(Err(io::ErrorKind::InvalidInput.into())).boxed(),
        }
    }
}
