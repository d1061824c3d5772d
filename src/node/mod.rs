//! One process's client port: gRPC and HTTP on one socket, in front of an engine, whichever machine it has.
//!
//! | door | what for |
//! |---|---|
//! | `quorate.v1.Pipeline`, `Sessions` | calls of the [guest](crate::door::Guest), whatever it is |
//! | services that the guest has besides | reads and writes |
//! | `quorate.v1.Admin` | status, members, who leads, snapshots |
//! | `replication.ReplicationService` | what is applied, for followers ([`subscriptions`]) |
//! | `grpc.health.v1.Health` | serving when the node is ready |
//! | server reflection, v1 and v1alpha | `grpcurl … list` |
//! | `/livez`, `/readyz`, `/metrics` | probes and Prometheus ([`http`]) |
//! | `/replication/…`, `/stats` | how replication goes, and settings, as JSON ([`replication`]) |
//!
//! Beside it there may be a port for followers without gRPC ([`frames`]).
//!
//! Before every door stands the [`entrance`]: it asks who calls, and whether that is granted ([`identified`]), refuses what a page in somebody's browser could send, and counts what is
//! on its way through each connection. What all doors have in common is in [`door`](crate::door); a guest brings its
//! services, its part of the status page and its metrics, and this room names none of them.
//!
//! # Promises
//!
//! - Served by [`Server::serve_opening`], the port answers from the first moment: a node that is being opened says so, and how
//!   far it is.
//! - Connections, watches, requests in flight, bytes of requests that do not end and of answers that nobody reads are
//!   [bounded](crate::door::limits). Probes and operators get through all the same.
//! - [`Server::run_until_signal`] is the whole life of a process that is a node. It returns the reason for which the node
//!   ended.
//! - On shutdown nothing new is accepted, requests in flight are answered, and [`Server::serve`] returns
//!   within [`DRAIN`], whatever clients do.

pub(crate) mod admin;
mod entrance;
mod exposition;
pub(crate) mod families;
mod frames;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
mod gate;
mod http;
mod identified;
pub(crate) mod metrics;
pub(crate) mod operated;
mod port_metrics;
mod reconfigure;
pub(crate) mod replication;
mod routes;
mod running;
pub(crate) mod settings;
mod subscriptions;

use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{OptionFuture, join};
use futures::{FutureExt as _, Stream};
use prometheus_client::collector::Collector;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::door::limits::DoorLimits;
use crate::door::methods::Methods;
use crate::door::{Credentials, Door, Guest, ServedNode, deadline, services, told};
use crate::engine::{Engine, StartProgress};
use crate::error::OpenError;
use crate::incoming::{self, Arrivals, Beginning, Places};
use crate::trust::port::{PlainAnswer, PortSecurity, PortTls};

use entrance::Entrance;
pub use entrance::Names;
use frames::{FramesGate, FramesPort};
use gate::Gate;
pub use metrics::metrics;
use operated::OperatedNode;
use port_metrics::PortCollector;
use routes::NodeRoutes;
pub use running::{RunError, StoppedBy};
use settings::LogLevel;

/// How long requests in flight may take to be answered once the server is told to stop.
pub const DRAIN: Duration = Duration::from_secs(5);

/// Calls in flight per connection, pipelines included.
const MAX_STREAMS: u32 = 4096;

/// What a client may send on one stream before it must wait: several messages, so that a pipeline over a
/// slow link keeps flowing. A pipeline that is not read holds this much.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;

/// The same for all streams of a connection together.
const CONNECTION_WINDOW_BYTES: u32 = 8 * 1024 * 1024;

/// Largest HTTP/2 frame accepted.
const MAX_FRAME_BYTES: u32 = 256 * 1024;

/// A connection that has been silent for this long is pinged, and closed when nobody answers.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// One in so many of the files that the process may open beside its own is for clients.
const FILES_SHARE: usize = 2;

/// Connections beside those, for probes and operators.
const RESERVED_CONNECTIONS: usize = 8;

/// What a guest has to say on the status page, asked whenever somebody looks at it.
pub(crate) type StatusPart = Arc<dyn Fn() -> Value + Send + Sync>;

/// The services of a guest.
pub(crate) struct Services<N> {
    /// Their full names.
    pub(crate) names: Vec<&'static str>,
    /// Those of their paths at which requests come one after the other, each of its own.
    pub(crate) pipelines: Vec<String>,
    /// Adds them to the others.
    pub(crate) add: Box<dyn FnOnce(Door<N>, Routes) -> Routes + Send>,
}

impl<N> Services<N> {
    /// What `grpc.health.v1` is asked for: the server as a whole, and each service.
    fn health_names(&self) -> Vec<&'static str> {
        let names = self.names.iter().copied().chain(services::NAMES);
        [""].into_iter().chain(names).chain([ADMIN, subscriptions::NAME]).collect()
    }

    /// All that can be called on the port of a node that serves `G`.
    fn methods<G: Guest>(&self) -> Methods {
        let pipelines = self.pipelines.iter().cloned().chain([services::PIPELINE.to_owned()]);
        let others = [&admin::METHODS[..], &subscriptions::METHODS].concat();
        Methods::new(G::METHODS, &others, pipelines)
    }
}

impl<N> Default for Services<N> {
    fn default() -> Self {
        Self { names: Vec::new(), pipelines: Vec::new(), add: Box::new(|_, routes| routes) }
    }
}

/// A client port that is bound and not yet served: connections wait in the socket's backlog.
///
/// `G` is what is served, `N` the node that it is asked of.
pub struct Server<G: Guest, N = Engine<<G as Guest>::Machine>> {
    arrivals: Arrivals,
    local_addr: SocketAddr,
    collectors: Vec<Box<dyn Collector>>,
    log_level: Option<LogLevel>,
    fixed_settings: Vec<(&'static str, Value)>,
    limits: DoorLimits,
    names: Names,
    status: Vec<(&'static str, StatusPart)>,
    services: Services<N>,
    frames: Option<FramesPort>,
    security: Option<Arc<PortSecurity>>,
    credentials: Option<Credentials>,
    guest: PhantomData<fn() -> G>,
}

impl<G: Guest, N> fmt::Debug for Server<G, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("local_addr", &self.local_addr).finish_non_exhaustive()
    }
}

/// Serving ended although nobody asked for it.
#[derive(Debug, thiserror::Error)]
#[error("the client port failed: {source}")]
pub struct ServeError {
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl<G: Guest, N> Server<G, N> {
    /// Listens on `address`, a `host:port`; port 0 takes a free one.
    ///
    /// # Errors
    /// [`OpenError::Listen`] when the address is in use or not this host's.
    pub async fn bind(address: &str) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Listen { address: address.to_owned(), source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let local_addr = listener.local_addr().map_err(failed)?;
        let names = Names::default().and_host_of(address);
        Ok(Self::new(incoming::arrivals_at(listener, KEEPALIVE), local_addr, names))
    }

    /// Serves `connections`, which the program makes by other means than a socket of its own: through a tunnel, or in a
    /// simulated world. They are bounded as those of a socket are. When there are no more, the port ends as it does when it is
    /// told to stop. `local_addr` is where callers believe the port to be; requests that call it by a name are refused unless
    /// it is [one of its names](Self::with_names).
    pub fn over<W>(local_addr: SocketAddr, connections: impl Stream<Item = W> + Send + 'static) -> Self
    where
        W: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        Self::new(incoming::arrivals_of(connections), local_addr, Names::default())
    }

    fn new(arrivals: Arrivals, local_addr: SocketAddr, names: Names) -> Self {
        Self {
            arrivals,
            local_addr,
            collectors: Vec::new(),
            log_level: None,
            fixed_settings: Vec::new(),
            limits: DoorLimits::default(),
            names,
            status: Vec::new(),
            services: Services::default(),
            frames: None,
            security: None,
            credentials: None,
            guest: PhantomData,
        }
    }

    /// The address that is listened on.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves those who follow what is applied also over plain TCP, in frames, on `address`, a `host:port`; port 0 takes a free one. `docs/FORMAT.md` has
    /// the protocol. Connections to both ports are bounded together.
    ///
    /// # Errors
    /// [`OpenError::Listen`] when the address is in use or not this host's.
    pub async fn with_frames(mut self, address: &str) -> Result<Self, OpenError> {
        self.frames = Some(FramesPort::bind(address).await?);
        Ok(self)
    }

    /// Speaks TLS to clients, and nothing else; also to followers that speak frames. The files are read here, and again when they change.
    ///
    /// # Errors
    /// [`OpenError::Config`] when they cannot be used.
    pub async fn with_tls(mut self, tls: PortTls) -> Result<Self, OpenError> {
        let opened = PortSecurity::open(tls).await;
        self.security = Some(opened.map_err(|error| OpenError::Config(error.to_string()))?);
        Ok(self)
    }

    /// The address that is listened on for followers that speak frames, if any is.
    pub fn frames_addr(&self) -> Option<SocketAddr> {
        self.frames.as_ref().map(FramesPort::local_addr)
    }

    /// Adds metrics to `/metrics`. The collector is asked at every scrape and must not block.
    #[must_use]
    pub(crate) fn with_collector(mut self, collector: Box<dyn Collector>) -> Self {
        self.collectors.push(collector);
        self
    }

    /// Lets clients change the filter of the process's log. Without this `log_level` is none of the settings.
    #[must_use]
    pub fn with_log_level(mut self, log_level: LogLevel) -> Self {
        self.log_level = Some(log_level);
        self
    }

    /// Shows those who ask for settings also these, which only a restart changes.
    #[must_use]
    pub fn with_fixed_settings(mut self, settings: Vec<(&'static str, Value)>) -> Self {
        self.fixed_settings = settings;
        self
    }

    /// What callers may make the node hold, instead of the defaults. Limits that do not
    /// [hold together](DoorLimits::validate) may have callers wait for ever.
    #[must_use]
    pub fn with_limits(mut self, limits: DoorLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Identifies callers of both ports by `credentials`, and refuses each what is not granted to it. Without this everybody may do
    /// everything.
    #[must_use]
    pub fn with_credentials(mut self, credentials: Credentials) -> Self {
        self.credentials = Some(credentials);
        self
    }

    /// The names that requests may call the node by, beside addresses and loopback names. Without this it is the one that
    /// it was told to listen on, if it listens.
    #[must_use]
    pub fn with_names(mut self, names: Names) -> Self {
        self.names = names;
        self
    }

    /// Shows `part` on the status page, as `name`.
    #[must_use]
    pub(crate) fn with_status(mut self, name: &'static str, part: StatusPart) -> Self {
        self.status.push((name, part));
        self
    }

    /// Serves these for the guest.
    #[must_use]
    pub(crate) fn with_services(mut self, services: Services<N>) -> Self {
        self.services = services;
        self
    }
}

impl<G: Guest> Server<G> {
    /// Serves `engine` until `shutdown` resolves and requests in flight are answered, [`DRAIN`] at most. Does
    /// not stop the engine.
    ///
    /// # Errors
    /// [`ServeError`] when the transport fails; clients' failures are their own.
    pub async fn serve<F>(self, engine: Engine<G::Machine>, shutdown: F) -> Result<(), ServeError>
    where
        F: Future<Output = ()> + Send,
    {
        self.serve_opening(std::future::ready(engine), StartProgress::default(), shutdown).await
    }

    /// As [`serve`](Self::serve), for an engine that is still being opened: until `opening` gives it, probes are answered,
    /// with how far `progress` is, and all else is refused as unavailable.
    ///
    /// # Errors
    /// As [`serve`](Self::serve).
    pub async fn serve_opening<O, F>(
        self,
        opening: O,
        progress: StartProgress,
        shutdown: F,
    ) -> Result<(), ServeError>
    where
        O: Future<Output = Engine<G::Machine>> + Send,
        F: Future<Output = ()> + Send,
    {
        self.serve_gated(opening, progress, DRAIN, shutdown).await
    }
}

impl<G: Guest, N> Server<G, N> {
    #[cfg(test)]
    pub(crate) async fn serve_node<F>(
        self,
        node: N,
        patience: Duration,
        shutdown: F,
    ) -> Result<(), ServeError>
    where
        N: OperatedNode<Machine = G::Machine>,
        F: Future<Output = ()> + Send,
    {
        self.serve_gated(std::future::ready(node), StartProgress::default(), patience, shutdown).await
    }

    /// As [`serve`](Server::serve), for a `node` that is no member.
    pub(crate) async fn serve_told<F>(self, node: N, shutdown: F) -> Result<(), ServeError>
    where
        N: OperatedNode<Machine = G::Machine>,
        F: Future<Output = ()> + Send,
    {
        self.serve_gated(std::future::ready(node), StartProgress::default(), DRAIN, shutdown).await
    }

    /// The port, before and after `opening` gives the node.
    pub(crate) async fn serve_gated<O, F>(
        mut self,
        opening: O,
        progress: StartProgress,
        patience: Duration,
        shutdown: F,
    ) -> Result<(), ServeError>
    where
        N: OperatedNode<Machine = G::Machine>,
        O: Future<Output = N> + Send,
        F: Future<Output = ()> + Send,
    {
        let Self { arrivals, limits, names, services: own, frames: port, security, credentials, .. } = self;
        let (limits, methods, health_names) = (Arc::new(limits), own.methods::<G>(), own.health_names());
        let places = places(&limits);
        let entrance = Entrance::new(names, limits.clone(), methods.clone(), credentials.clone());
        let entrance = || axum::middleware::from_fn_with_state(entrance.clone(), entrance::enter);
        let (drain, draining) = watch::channel(false);
        let (reporter, health) = tonic_health::server::health_reporter();
        nothing_served(&reporter, &health_names).await;
        let frames = FramesGate::new(progress.clone(), draining.clone(), credentials.clone());
        let before = Routes::from(gate::before(progress, draining.clone())).add_service(health.clone());
        let known = told::Known::new(methods.clone());
        let completed = || axum::middleware::from_fn_with_state(known.clone(), told::complete);
        let gate = Gate::new(before.into_axum_router().layer(entrance()).layer(completed()));
        let behind = gate.clone();
        self.collectors.push(PortCollector::of(&places, &limits, &security, &credentials));
        let later = NodeRoutes::<G, N> {
            collectors: self.collectors,
            log_level: self.log_level,
            fixed_settings: self.fixed_settings,
            status: self.status,
            services: own,
            limits,
            methods,
            draining: draining.clone(),
            frames: frames.clone(),
            guest: PhantomData,
        };
        let attend = async {
            let followed = async {
                let node = opening.await;
                let (routes, metrics) = later.of(&node);
                let limited = axum::middleware::from_fn_with_state(metrics, deadline::answer_in_time);
                let routes = routes.add_service(health).into_axum_router().layer(limited);
                known.follow(node.watch());
                behind.open(routes.layer(entrance()).layer(completed()));
                report_health(node, reporter.clone(), &health_names).await;
            };
            until_drained(draining.clone(), followed).await;
            retire(reporter.clone(), &health_names).await;
            std::future::pending::<Infallible>().await
        };
        let (arrivals, no_more) = incoming::telling_the_end(secured(arrivals, &security));
        let fresh = keep_fresh(security.clone(), credentials);
        let followed = port.map(|port| port.secured(security).serve(frames, places.clone()));
        let incoming = incoming::bounded(arrivals, places, Beginning::Request);
        let stop = shutdown.map(|()| _ = drain.send_replace(true));
        // Once there are no more connections nobody asks for the signal to stop.
        let all_came = join(no_more.map(|_| _ = drain.send_replace(true)), fresh);
        let serving = both(builder().serve_with_incoming_shutdown(gate, incoming, stop), followed);
        tokio::select! {
            biased;
            // First: a node that is there already is behind the gate before anybody is let in.
            never = attend => match never {},
            (_, never) = all_came => match never {},
            served = serving => served.map_err(|error| ServeError { source: error.into() }),
            () = overdue(draining.clone(), patience) => Ok(()),
        }
    }
}

/// `arrivals`, by TLS if the port speaks it.
fn secured(arrivals: Arrivals, security: &Option<Arc<PortSecurity>>) -> Arrivals {
    match security.clone() {
        None => arrivals,
        Some(security) => {
            incoming::secured(arrivals, move |wire| security.accepting(wire, PlainAnswer::Http))
        }
    }
}

/// Keeps certificates and credentials as their files are, where there are any.
async fn keep_fresh(security: Option<Arc<PortSecurity>>, credentials: Option<Credentials>) -> Infallible {
    let certificates = async {
        if let Some(security) = security {
            security.keep_fresh().await;
        }
    };
    let credentials = async {
        if let Some(credentials) = credentials {
            match credentials.keep().await {}
        }
    };
    join(certificates, credentials).await;
    std::future::pending().await
}

/// The places of those who connect to a node, whichever port they come to.
fn places(limits: &DoorLimits) -> Arc<Places> {
    let connections = limits.connections.unwrap_or_else(|| incoming::connections(FILES_SHARE));
    Places::new(connections, RESERVED_CONNECTIONS)
}

/// Serves callers and followers until there are none of either, or their port fails.
fn both<E>(
    served: impl Future<Output = Result<(), E>>,
    followed: Option<impl Future<Output = ()>>,
) -> impl Future<Output = Result<(), E>> {
    // Together they are large.
    let (served, followed) = (Box::pin(served), followed.map(Box::pin));
    async move { tokio::try_join!(served, OptionFuture::from(followed).map(Ok)).map(drop) }
}

/// Does `work` until the port drains, whether or not it ends by itself. The sender of `draining` lives as long as this does.
async fn until_drained(mut draining: watch::Receiver<bool>, work: impl Future<Output = ()>) {
    tokio::select! {
        biased;
        _ = draining.wait_for(|draining| *draining) => {}
        () = work.then(|()| std::future::pending()) => {}
    }
}

/// Waits until clients have had `patience` to leave, once the port drains. The sender of `draining` lives as long as this does.
async fn overdue(mut draining: watch::Receiver<bool>, patience: Duration) {
    let _ = draining.wait_for(|draining| *draining).await;
    tokio::time::sleep(patience).await;
    let waited_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
    tracing::warn!(waited_ms, "clients still hold connections; leaving them");
}

fn builder() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .accept_http1(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(MAX_STREAMS)
        .max_frame_size(MAX_FRAME_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE))
}

const ADMIN: &str = admin::NAME;
const HEALTH: &str = "grpc.health.v1.Health";

/// Keeps `grpc.health.v1` in step with readiness, for the server as a whole and each service. Status is also served by a
/// node that is not ready.
async fn report_health<N: ServedNode>(node: N, reporter: HealthReporter, names: &[&'static str]) {
    let mut changes = node.watch();
    let mut reported = None;
    loop {
        let ready = changes.borrow_and_update().readiness().is_ok();
        if reported != Some(ready) {
            reported = Some(ready);
            let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
            for name in names {
                let status = if *name == ADMIN { ServingStatus::Serving } else { status };
                reporter.set_service_status(*name, status).await;
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Reporters begin with "serving"; nothing is served yet, and nobody knows whether it can be.
async fn nothing_served(reporter: &HealthReporter, names: &[&'static str]) {
    for name in names {
        reporter.set_service_status(*name, ServingStatus::NotServing).await;
    }
}

/// Tells health watchers that the server goes, and ends their streams, which would hold up the drain.
async fn retire(mut reporter: HealthReporter, names: &[&'static str]) {
    for name in names {
        reporter.set_service_status(*name, ServingStatus::NotServing).await;
        reporter.clear_service_status(name).await;
    }
}
