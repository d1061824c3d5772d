//! Messages between simulated nodes: lost, delayed, duplicated, reordered, cut off.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use quorate::NodeId;
use quorate::testkit::proto::peer::request::Body;
use quorate::testkit::runtime::TaskGroup;
use quorate::transport::{
    CONNECTION_REQUESTS, Connection, DialError, Hello, IdentifyRequest, IdentifyResponse, PeerDoor, Purpose,
    Request, Response, Target, Transport,
};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::trace::Trace;

/// What the network does to messages at present.
#[derive(Debug, Clone)]
pub struct Weather {
    /// How many of them are lost, of one.
    pub loss: f64,
    /// How many of them arrive twice, of one.
    pub duplication: f64,
    /// How late they are at most.
    pub delay_max: Duration,
    /// Whether messages of one connection may overtake each other.
    pub reorder: bool,
}

impl Weather {
    /// Nothing is lost, and little is late.
    pub const FAIR: Self =
        Self { loss: 0.0, duplication: 0.0, delay_max: Duration::from_millis(2), reorder: false };
}

#[derive(Default)]
struct Counts {
    pub lost: u64,
    pub duplicated: u64,
}

/// The network between the nodes of a world.
pub struct Network {
    state: Mutex<State>,
    trace: Arc<Trace>,
}

struct State {
    doors: BTreeMap<String, Door>,
    cut: BTreeSet<(NodeId, NodeId)>,
    weather: Weather,
    rng: SmallRng,
    counts: Counts,
    /// See [`Network::renumber_copies`].
    renumbers: bool,
    /// Nodes of a build that knows no forwarded calls.
    old_builds: BTreeSet<NodeId>,
}

#[derive(Clone)]
struct Door {
    node_id: NodeId,
    door: Arc<dyn PeerDoor>,
    group: Arc<TaskGroup>,
}

/// Where its peers find a node.
pub fn address(node_id: NodeId) -> String {
    format!("node-{node_id}:7901")
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Network").finish_non_exhaustive()
    }
}

impl Network {
    /// One without nodes.
    pub fn new(seed: u64, trace: Arc<Trace>) -> Arc<Self> {
        let state = State {
            doors: BTreeMap::new(),
            cut: BTreeSet::new(),
            weather: Weather::FAIR,
            rng: SmallRng::seed_from_u64(seed ^ 0x006e_6574_776f_726b),
            counts: Counts::default(),
            renumbers: false,
            old_builds: BTreeSet::new(),
        };
        Arc::new(Self { state: Mutex::new(state), trace })
    }

    /// From now on others reach the node, by this door. What they ask of it is done by tasks of its group.
    pub fn open_door(&self, node_id: NodeId, door: Arc<dyn PeerDoor>, group: Arc<TaskGroup>) {
        self.state.lock().unwrap().doors.insert(address(node_id), Door { node_id, door, group });
    }

    /// From now on nobody reaches the node.
    pub fn close_door(&self, node_id: NodeId) {
        self.state.lock().unwrap().doors.remove(&address(node_id));
    }

    /// Changes what happens to messages from now on.
    pub fn set_weather(&self, weather: Weather) {
        self.state.lock().unwrap().weather = weather;
    }

    /// Cuts these links, and only these; each one way.
    pub fn set_cuts(&self, cuts: BTreeSet<(NodeId, NodeId)>) {
        self.state.lock().unwrap().cut = cuts;
    }

    /// Has forwarded calls that are duplicated arrive under a number of their own, so that nobody can tell that they are the same:
    /// as if the callee did not look.
    pub fn renumber_copies(&self, renumbers: bool) {
        self.state.lock().unwrap().renumbers = renumbers;
    }

    /// Has these nodes, and only these, not know forwarded calls: what arrives there is what a build reads that does not know
    /// the field.
    pub fn set_old_builds(&self, nodes: impl IntoIterator<Item = NodeId>) {
        self.state.lock().unwrap().old_builds = nodes.into_iter().collect();
    }

    /// What arrives at `to` of a request, of which this is copy number `copy`.
    fn arriving(&self, to: NodeId, request: &mut Request, copy: u32) {
        if !matches!(request.body, Some(Body::Forward(_))) {
            return;
        }
        let state = self.state.lock().unwrap();
        if state.renumbers && copy > 0 {
            // Not so far ahead that those after it would look late.
            request.id += 30_000;
        }
        if state.old_builds.contains(&to) {
            request.body = None;
        }
    }

    /// Messages that were lost, and that were duplicated.
    pub fn counts(&self) -> (u64, u64) {
        let state = self.state.lock().unwrap();
        (state.counts.lost, state.counts.duplicated)
    }

    fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.state.lock().unwrap().cut.contains(&(from, to))
    }

    fn delay(&self) -> Duration {
        let mut state = self.state.lock().unwrap();
        let max = u64::try_from(state.weather.delay_max.as_micros()).unwrap();
        Duration::from_micros(state.rng.random_range(100..=max))
    }

    /// How many copies of a message arrive, and whether each on its own.
    fn copies(&self, from: NodeId, to: NodeId) -> (u32, bool) {
        let mut state = self.state.lock().unwrap();
        let State { weather, rng, counts, cut, .. } = &mut *state;
        if cut.contains(&(from, to)) || rng.random_bool(weather.loss) {
            counts.lost += 1;
            return (0, weather.reorder);
        }
        if rng.random_bool(weather.duplication) {
            counts.duplicated += 1;
            return (2, weather.reorder);
        }
        (1, weather.reorder)
    }

    async fn reach(self: &Arc<Self>, from: NodeId, address: &str) -> Result<Door, DialError> {
        tokio::time::sleep(self.delay()).await;
        let door = self.state.lock().unwrap().doors.get(address).cloned();
        let unreachable = |why: &str| DialError::Unreachable(why.to_owned());
        let door = door.ok_or_else(|| unreachable("connection refused"))?;
        if self.is_cut(from, door.node_id) || self.is_cut(door.node_id, from) {
            return Err(unreachable("no route"));
        }
        Ok(door)
    }

    /// Carries messages one way until either end is gone.
    async fn carry<T: Clone + Send + 'static>(
        self: Arc<Self>,
        link: Link,
        mut from: mpsc::Receiver<T>,
        to: mpsc::Sender<T>,
        id: fn(&T) -> u64,
        arriving: fn(&Self, NodeId, &mut T, u32),
    ) {
        loop {
            let message = tokio::select! {
                biased;
                () = to.closed() => return,
                message = from.recv() => message,
            };
            let Some(message) = message else { return };
            let (copies, reorder) = self.copies(link.from, link.to);
            self.trace.record(format_args!("{link} #{} x{copies}", id(&message)));
            for copy in 0..copies {
                let arrival = Instant::now() + self.delay();
                let mut message = message.clone();
                arriving(&self, link.to, &mut message, copy);
                let delivery = self.clone().deliver(link, arrival, message, to.clone());
                if reorder {
                    tokio::spawn(delivery);
                } else {
                    delivery.await;
                }
            }
        }
    }

    async fn deliver<T>(self: Arc<Self>, link: Link, arrival: Instant, message: T, to: mpsc::Sender<T>) {
        tokio::time::sleep_until(arrival).await;
        // What was under way when the link was cut is lost.
        if !self.is_cut(link.from, link.to) {
            let _ = to.send(message).await;
        }
    }
}

#[derive(Clone, Copy)]
struct Link {
    from: NodeId,
    to: NodeId,
    purpose: Purpose,
    back: bool,
}

impl std::fmt::Display for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let arrow = if self.back { "answers" } else { "asks" };
        write!(f, "{} {arrow} {} {:?}", self.from, self.to, self.purpose)
    }
}

/// One node's way to its peers.
#[derive(Debug)]
pub struct SimTransport {
    /// The network that all nodes share.
    pub network: Arc<Network>,
    /// Whose way it is.
    pub node_id: NodeId,
}

impl Transport for SimTransport {
    fn connect(
        &self,
        target: Target,
        hello: Hello,
        purpose: Purpose,
    ) -> BoxFuture<'static, Result<Connection, DialError>> {
        let (network, own) = (self.network.clone(), self.node_id);
        async move {
            let peer = network.reach(own, &target.address).await?;
            peer.door.admit(&hello).map_err(DialError::Refused)?;
            let (requests, sent) = mpsc::channel::<Request>(CONNECTION_REQUESTS);
            let (arriving, accepted) = mpsc::channel(CONNECTION_REQUESTS);
            let (responses, answered) = mpsc::channel::<Response>(CONNECTION_REQUESTS);
            let (returning, received) = mpsc::channel(CONNECTION_REQUESTS);
            let there = Link { from: own, to: peer.node_id, purpose, back: false };
            let back = Link { from: peer.node_id, to: own, purpose, back: true };
            tokio::spawn(network.clone().carry(
                there,
                sent,
                arriving,
                |request| request.id,
                Network::arriving,
            ));
            tokio::spawn(network.carry(back, answered, returning, |response| response.id, |_, _, _, _| {}));
            peer.group.spawn(peer.door.serve(own, accepted.into(), responses));
            Ok(Connection { requests, responses: received.into() })
        }
        .boxed()
    }

    fn identify(
        &self,
        address: String,
        request: IdentifyRequest,
    ) -> BoxFuture<'static, Result<IdentifyResponse, DialError>> {
        let (network, own) = (self.network.clone(), self.node_id);
        async move {
            let peer = network.reach(own, &address).await?;
            peer.door.identify(request).map_err(DialError::Refused)
        }
        .boxed()
    }
}
