//! Client ports of simulated nodes, and the connections to them: bytes in order, late, and standing still or cut off at times.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::stream::{self, Stream};
use quorate::NodeId;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use super::Trace;

/// What a connection holds of either direction before its writer waits.
const BUFFER_BYTES: usize = 64 * 1024;
/// What is carried at a time: all that is there, so that it does not depend on how answers were divided.
const CHUNK_BYTES: usize = BUFFER_BYTES;
/// Connections that a port has not accepted yet.
const BACKLOG: usize = 64;
const LONGEST_DELAY: Duration = Duration::from_millis(3);

/// The client ports of all nodes.
#[derive(Debug)]
pub struct Ports {
    state: Mutex<State>,
    /// Ports that nothing reaches or leaves at present.
    silent: watch::Sender<BTreeSet<NodeId>>,
    trace: Arc<Trace>,
}

#[derive(Debug)]
struct State {
    open: BTreeMap<SocketAddr, Open>,
    rng: SmallRng,
    broken: u64,
}

#[derive(Debug)]
struct Open {
    node_id: NodeId,
    accept: mpsc::Sender<DuplexStream>,
    carriers: Vec<AbortHandle>,
}

impl Ports {
    pub(super) fn new(seed: u64, trace: Arc<Trace>) -> Arc<Self> {
        let rng = SmallRng::seed_from_u64(seed ^ 0x0070_6f72_7473);
        let state = Mutex::new(State { open: BTreeMap::new(), rng, broken: 0 });
        Arc::new(Self { state, silent: watch::Sender::default(), trace })
    }

    /// Where clients find a node.
    pub fn address(node_id: NodeId) -> SocketAddr {
        let host = u8::try_from(node_id).expect("a node of a small cluster");
        (Ipv4Addr::new(10, 0, 0, host), 7801).into()
    }

    /// Opens the port of a node. What it accepts is to be served.
    pub(super) fn open(&self, node_id: NodeId) -> impl Stream<Item = DuplexStream> + use<> {
        let (accept, accepted) = mpsc::channel(BACKLOG);
        let open = Open { node_id, accept, carriers: Vec::new() };
        self.state.lock().unwrap().open.insert(Self::address(node_id), open);
        stream::unfold(accepted, async |mut accepted| Some((accepted.recv().await?, accepted)))
    }

    /// Closes the port of a node, and breaks all connections to it.
    pub(super) fn close(&self, node_id: NodeId) {
        if let Some(open) = self.state.lock().unwrap().open.remove(&Self::address(node_id)) {
            open.carriers.iter().for_each(AbortHandle::abort);
        }
    }

    /// Breaks all connections to a node, which goes on listening.
    pub(super) fn break_connections(&self, node_id: NodeId) {
        let mut state = self.state.lock().unwrap();
        let State { open, broken, .. } = &mut *state;
        if let Some(open) = open.get_mut(&Self::address(node_id)) {
            *broken += open.carriers.iter().filter(|carrier| !carrier.is_finished()).count() as u64 / 2;
            open.carriers.drain(..).for_each(|carrier| carrier.abort());
        }
    }

    /// Has nothing reach these ports, and nothing leave them, until it is called again: what is under way is late.
    pub(super) fn silence(&self, nodes: BTreeSet<NodeId>) {
        self.silent.send_replace(nodes);
    }

    /// How many connections were broken although their node went on.
    pub(super) fn broken(&self) -> u64 {
        self.state.lock().unwrap().broken
    }

    fn delay(&self) -> Duration {
        let most = u64::try_from(LONGEST_DELAY.as_micros()).unwrap();
        Duration::from_micros(self.state.lock().unwrap().rng.random_range(50..=most))
    }

    /// Waits until something may pass to or from a node.
    async fn pass(&self, node_id: NodeId) {
        // The sender lives as long as `self`.
        let _ = self.silent.subscribe().wait_for(|silent| !silent.contains(&node_id)).await;
    }

    /// Connects to the port at `address`.
    pub(super) async fn dial(self: &Arc<Self>, address: &str) -> io::Result<DuplexStream> {
        tokio::time::sleep(self.delay()).await;
        let address: SocketAddr = address.parse().map_err(|_| io::ErrorKind::AddrNotAvailable)?;
        let found =
            self.state.lock().unwrap().open.get(&address).map(|open| (open.node_id, open.accept.clone()));
        let Some((node_id, accept)) = found else { return Err(io::ErrorKind::ConnectionRefused.into()) };
        self.pass(node_id).await;
        let (ours, outer) = duplex(BUFFER_BYTES);
        let (inner, theirs) = duplex(BUFFER_BYTES);
        accept.send(theirs).await.map_err(|_| io::ErrorKind::ConnectionRefused)?;
        let (from_client, to_client) = split(outer);
        let (from_node, to_node) = split(inner);
        let carriers = [(from_client, to_node), (from_node, to_client)]
            .map(|(from, to)| tokio::spawn(self.clone().carry(node_id, from, to)).abort_handle());
        let mut state = self.state.lock().unwrap();
        let Some(open) = state.open.get_mut(&address) else {
            carriers.iter().for_each(AbortHandle::abort);
            return Err(io::ErrorKind::ConnectionReset.into());
        };
        open.carriers.retain(|carrier| !carrier.is_finished());
        open.carriers.extend(carriers);
        self.trace.record(format_args!("a client connects to {node_id}"));
        Ok(ours)
    }

    /// Carries bytes one way until either end is gone.
    async fn carry(
        self: Arc<Self>,
        node_id: NodeId,
        mut from: ReadHalf<DuplexStream>,
        mut to: WriteHalf<DuplexStream>,
    ) {
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Ok(bytes @ 1..) = from.read(&mut chunk).await {
            tokio::time::sleep(self.delay()).await;
            self.pass(node_id).await;
            if to.write_all(&chunk[..bytes]).await.is_err() {
                return;
            }
        }
        // Not an error if the other end has gone first.
        let _ = to.shutdown().await;
    }
}
