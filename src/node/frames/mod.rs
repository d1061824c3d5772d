//! What is applied, for followers without gRPC: the subscription of [`subscriptions`](super::subscriptions) over TCP, as frames.
//!
//! - [`codec`]: frames as bytes; [`encoding`]: what a follower is told, as frames;
//! - [`connection`]: one follower;
//! - here: the port.
//!
//! # Promises
//!
//! - Those of subscriptions. A stream is the same stream, with another encoding.
//! - A connection counts among those of the client port, and so does what it holds: the bounds are the same ones.
//! - What is no follower is told so in a frame, and costs its connection for some seconds.
//! - The port is shut unless it is asked for.
//!
//! A follower says who it is as a caller of the client port does, in a frame before its first; with TLS it is as the other port for clients
//! ([`Server::with_tls`](super::Server::with_tls)). A page in a browser cannot follow: what a browser sends begins with the name of a method, and
//! that is no length that is taken.
//!
//! The protocol, byte by byte: `docs/FORMAT.md`.

mod codec;
mod connection;
mod encoding;
#[cfg(any(test, fuzzing))]
mod fuzzed;

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::StreamExt as _;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

use self::connection::BEGINNING_BYTES;
#[cfg(any(test, fuzzing))]
pub(in crate::node) use self::fuzzed::read_all;
use super::gate;
use super::operated::OperatedNode;
use super::subscriptions::{SubscriptionService, drained};
use crate::door::{Credentials, failure};
use crate::engine::StartProgress;
use crate::error::OpenError;
use crate::incoming::{self, Accepted, Arrivals, Beginning, Places};
use crate::proto::v1::Failure;
use crate::runtime;
use crate::trust::port::{PlainAnswer, PortSecurity};

/// A connection that has been silent for this long is probed.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// What was sent is confirmed by the other end's system within this time, or the connection is dead. There is no ping in the protocol: a follower need not
/// say anything.
const DEAD_AFTER: Duration = Duration::from_secs(30);

/// A port that is bound and not served yet.
pub(super) struct FramesPort {
    arrivals: Arrivals,
    local_addr: SocketAddr,
}

impl fmt::Debug for FramesPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FramesPort").field("local_addr", &self.local_addr).finish_non_exhaustive()
    }
}

impl FramesPort {
    /// Listens on `address`, a `host:port`; port 0 takes a free one.
    ///
    /// # Errors
    /// [`OpenError::Listen`].
    pub(super) async fn bind(address: &str) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Listen { address: address.to_owned(), source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let local_addr = listener.local_addr().map_err(failed)?;
        let arrivals = incoming::arrivals_that_confirm(listener, KEEPALIVE, DEAD_AFTER);
        Ok(Self { arrivals, local_addr })
    }

    pub(super) fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// The same, by TLS if `security` is given. A follower that does not speak it is told so in a frame.
    pub(super) fn secured(mut self, security: Option<Arc<PortSecurity>>) -> Self {
        if let Some(security) = security {
            let failure =
                failure::invalid("this port speaks TLS: connect with it, and with the node's authority");
            let answer: Arc<[u8]> = codec::end(&failure)[..].into();
            let secure = move |wire| security.accepting(wire, PlainAnswer::Bytes(answer.clone()));
            self.arrivals = incoming::secured(self.arrivals, secure);
        }
        self
    }

    /// Serves followers from what is behind `gate` until the node drains and all of them have ended. Their connections take `places`.
    pub(super) async fn serve<N: OperatedNode>(self, gate: Arc<FramesGate<N>>, places: Arc<Places>) {
        let (alive, mut all_ended) = mpsc::channel::<Infallible>(1);
        {
            let mut draining = gate.draining.clone();
            let beginning = Beginning::Identify { max_bytes: BEGINNING_BYTES };
            let mut connections = pin!(incoming::bounded(self.arrivals, places, beginning));
            loop {
                let accepted: Accepted = tokio::select! {
                    biased;
                    () = drained(&mut draining) => break,
                    accepted = connections.next() => match accepted {
                        Some(Ok(accepted)) => accepted,
                        // It is tried again where accepting fails.
                        Some(Err(_)) => continue,
                        None => break,
                    },
                };
                let (gate, alive) = (gate.clone(), alive.clone());
                runtime::spawn(async move {
                    connection::serve(accepted, gate.service(), gate.credentials.clone()).await;
                    drop(alive);
                });
            }
        }
        drop(alive);
        // None is ever sent: this is the end of the last that could.
        all_ended.recv().await;
    }
}

/// What is behind the port: nothing while the node is being opened, then what followers are served from.
pub(super) struct FramesGate<N> {
    service: OnceLock<SubscriptionService<N>>,
    progress: StartProgress,
    draining: watch::Receiver<bool>,
    credentials: Option<Credentials>,
}

impl<N: OperatedNode> FramesGate<N> {
    /// One with a node behind it that has come as far as `progress`.
    pub(super) fn new(
        progress: StartProgress,
        draining: watch::Receiver<bool>,
        credentials: Option<Credentials>,
    ) -> Arc<Self> {
        Arc::new(Self { service: OnceLock::new(), progress, draining, credentials })
    }

    /// The node is there.
    pub(super) fn open(&self, service: SubscriptionService<N>) {
        // There is one node behind a port; a second one would not be asked.
        let _ = self.service.set(service);
    }

    fn service(&self) -> Result<SubscriptionService<N>, Failure> {
        let not_open = || match self.credentials {
            // Whoever asks has not said who it is.
            Some(_) => gate::not_open("try again"),
            None => gate::not_open(&gate::reason(&self.progress, &self.draining)),
        };
        self.service.get().cloned().ok_or_else(not_open)
    }
}
