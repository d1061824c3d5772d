//! Changes of members in scripts: `tests/golden/scripts/membership`. The nodes are whole ones, on virtual time. Each command
//! shows the memberships that it has put into the leader's log, and then how it has ended.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard};

use goldenscript::{Context, Runner};
use tokio::runtime::{Builder, RngSeed, Runtime};
use tokio::sync::mpsc;

use super::*;
use crate::engine::{EngineConfig, EngineParts, Timing};
use crate::golden::{Told, scripts};
use crate::raft::network::{CONNECTION_REQUESTS, PeerDoor};
use crate::runtime::{SimulationGuard, TaskGroup};
use crate::storage::{LogStore, MemoryDisk, MemorySnapshots, MemoryStore, SyncMode};
use crate::types::Payload;

/// A node listens at `n<id>:1` unless something else is said.
#[derive(goldenscript::Command)]
enum Step {
    /// Starts a node. With an empty directory the first one founds the cluster, and the others wait to be added.
    Start {
        node_id: NodeId,
        /// Which directory, in hexadecimal digits. It is empty the first time.
        #[arg(key)]
        directory: String,
        /// Where it listens.
        #[arg(key)]
        at: Option<String>,
        /// Where it says that it is reached.
        #[arg(key)]
        advertises: Option<String>,
    },
    /// Ends a node without any notice. Its directory stays.
    Kill(NodeId),
    /// The node at this address says who it is, and takes no connection that is begun from now on.
    Mute(String),
    /// It does again.
    Unmute(String),
    Add {
        node_id: NodeId,
        #[arg(key)]
        at: Option<String>,
        #[arg(key, optional)]
        promote: bool,
    },
    Promote(NodeId),
    Demote {
        node_id: NodeId,
        #[arg(key, optional)]
        force: bool,
    },
    Remove {
        node_id: NodeId,
        #[arg(key, optional)]
        force: bool,
    },
    Replace {
        old: NodeId,
        #[arg(key)]
        by: NodeId,
        #[arg(key)]
        at: Option<String>,
    },
    Update {
        node_id: NodeId,
        #[arg(key)]
        peer: String,
    },
    /// The members as the leader knows them, each with its directory.
    Members,
    /// So much time passes.
    Wait {
        #[arg(key)]
        seconds: u64,
    },
    /// Which nodes run, and which have ended by themselves.
    Running,
}

/// A network that loses and delays nothing.
#[derive(Default)]
struct Network(Mutex<BTreeMap<String, Listener>>);

/// Who listens at an address, and the tasks that answer there.
#[derive(Clone)]
struct Listener {
    door: Arc<dyn PeerDoor>,
    tasks: Arc<TaskGroup>,
    is_mute: bool,
}

fn refused() -> DialError {
    DialError::Unreachable("connection refused".to_owned())
}

impl Network {
    fn listeners(&self) -> MutexGuard<'_, BTreeMap<String, Listener>> {
        self.0.lock().unwrap()
    }

    fn at(&self, address: &str) -> Result<Listener, DialError> {
        self.listeners().get(address).cloned().ok_or_else(refused)
    }

    fn mute(&self, address: &str, is_mute: bool) {
        self.listeners().get_mut(address).expect("a node listens there").is_mute = is_mute;
    }
}

impl Transport for Network {
    fn connect(
        &self,
        target: Target,
        hello: Hello,
        _purpose: Purpose,
    ) -> BoxFuture<'static, Result<Connection, DialError>> {
        let dialled = self.at(&target.address).and_then(|Listener { door, tasks, is_mute }| {
            if is_mute {
                return Err(refused());
            }
            door.admit(&hello).map_err(DialError::Refused)?;
            let (requests, accepted) = mpsc::channel(CONNECTION_REQUESTS);
            let (responses, received) = mpsc::channel(CONNECTION_REQUESTS);
            drop(tasks.spawn(door.serve(hello.from_node, accepted.into(), responses)));
            Ok(Connection { requests, responses: received.into() })
        });
        async { dialled }.boxed()
    }

    fn identify(
        &self,
        address: String,
        request: IdentifyRequest,
    ) -> BoxFuture<'static, Result<IdentifyResponse, DialError>> {
        let told = self
            .at(&address)
            .and_then(|listener| listener.door.identify(request).map_err(DialError::Refused));
        async { told }.boxed()
    }
}

struct Running {
    at: String,
    engine: Engine<KvMachine>,
    log: Arc<MemoryStore>,
    tasks: Arc<TaskGroup>,
}

struct Cluster {
    network: Arc<Network>,
    /// What nodes have left behind.
    disks: BTreeMap<Incarnation, MemoryDisk>,
    nodes: BTreeMap<NodeId, Running>,
    world: Option<SimulationGuard>,
    runtime: Option<Runtime>,
}

impl Cluster {
    fn new() -> Self {
        let seed = RngSeed::from_bytes(&[0; 8]);
        let builder = &mut Builder::new_current_thread();
        let runtime = builder.enable_time().start_paused(true).rng_seed(seed).build().unwrap();
        let world = runtime.block_on(async { runtime::simulate(0) });
        Self {
            network: Arc::default(),
            disks: BTreeMap::new(),
            nodes: BTreeMap::new(),
            world: Some(world),
            runtime: Some(runtime),
        }
    }

    async fn start(&mut self, (node_id, incarnation): (NodeId, Incarnation), at: String, advertises: String) {
        let founds = self.disks.is_empty();
        let disk = self.disks.entry(incarnation).or_insert_with(|| MemoryDisk::new(SyncMode::Immediate));
        let mut config = EngineConfig::new(node_id, "", advertises);
        config.client_advertise = format!("c{node_id}:1");
        // What an idle node does is not looked at.
        config.timing = Timing {
            heartbeat_interval_ms: 250,
            election_timeout_min_ms: 1_000,
            election_timeout_max_ms: 2_000,
        };
        config.join = !founds;
        if !founds {
            config.initial_members.clear();
        }
        let log = Arc::new(MemoryStore::open(disk));
        let parts = EngineParts {
            config,
            incarnation,
            log: log.clone(),
            snapshots: Arc::new(MemorySnapshots::new()),
            transport: self.network.clone(),
            promised_lease_ms: 0,
            memory_bytes: None,
            event_log: None,
        };
        let tasks = Arc::new(TaskGroup::default());
        let engine = tasks.spawn(Engine::start(parts, KvMachine::default())).await.unwrap().unwrap();
        let listener = Listener { door: engine.peer_door(), tasks: tasks.clone(), is_mute: false };
        self.network.listeners().insert(at.clone(), listener);
        assert!(!founds || engine.ready(DEADLINE).await);
        self.nodes.insert(node_id, Running { at, engine, log, tasks });
    }

    async fn kill(&mut self, node_id: NodeId) {
        let Running { at, engine, tasks, .. } = self.nodes.remove(&node_id).expect("it runs");
        self.network.listeners().remove(&at);
        tasks.abort();
        drop(engine);
        // Lets its tasks go.
        tokio::time::sleep(PAUSE).await;
    }

    /// Waits for a node that leads.
    async fn leader(&self) -> &Running {
        let find = async {
            loop {
                match self.nodes.values().find(|node| node.engine.leading().is_ok()) {
                    Some(leader) => return leader,
                    None => tokio::time::sleep(PAUSE).await,
                }
            }
        };
        tokio::time::timeout(DEADLINE, find).await.expect("a majority runs")
    }

    async fn change(&self, change: RequestedChange) -> String {
        let Running { engine, log, .. } = self.leader().await;
        let begun = log.bounds().last.map_or(0, |last| last.index + 1);
        let outcome = engine.change_members(change, None).await;
        let mut told = String::new();
        for entry in log.read(begun, u64::MAX, usize::MAX).unwrap() {
            if let Payload::Membership(membership) = entry.payload {
                let _ = writeln!(told, "{}", in_short(&membership));
            }
        }
        told + &match outcome {
            Ok(MemberList { unchanged: true, .. }) => "nothing had to be changed".to_owned(),
            Ok(_) => "done".to_owned(),
            Err(error) if error.told().maybe_applied => format!("made in part, perhaps: {error}"),
            Err(error) => format!("refused: {error}"),
        }
    }

    fn running(&self) -> String {
        self.nodes.iter().fold(String::new(), |mut told, (node_id, node)| {
            let _ = match &node.engine.state().fatal {
                None => writeln!(told, "node {node_id} runs"),
                Some(fatal) => writeln!(told, "node {node_id} has stopped: {fatal}"),
            };
            told
        })
    }
}

/// Those who vote, in each set of voters; those who do not; and what is noted of what a member is to be.
fn in_short(membership: &Membership) -> String {
    let sets: Vec<_> = membership.voters.iter().map(|set| format!("{set:?}")).collect();
    let mut told = format!("voters {}", sets.join(" and "));
    let learners: Vec<_> = membership.members.keys().filter(|id| !membership.is_voter(**id)).collect();
    if !learners.is_empty() {
        let _ = write!(told, ", learners {learners:?}");
    }
    for (_, about, intent) in membership.intents() {
        let _ = match intent {
            Intent::Voter => write!(told, ", note: {about} is to vote"),
            Intent::Learner => write!(told, ", note: {about} is to be a learner"),
        };
    }
    told
}

fn new_at(node_id: NodeId, at: Option<&String>) -> NewMember {
    NewMember { node_id, peer: at.cloned().unwrap_or_else(|| format!("n{node_id}:1")) }
}

/// What is given to a learner to catch up.
const CATCH_UP: Duration = Duration::from_secs(5);

impl Cluster {
    async fn step(&mut self, step: &Step) -> String {
        let timeout = CATCH_UP;
        let change = match step {
            Step::Start { node_id, directory, at, advertises } => {
                let at = at.clone().unwrap_or_else(|| format!("n{node_id}:1"));
                let advertises = advertises.clone().unwrap_or_else(|| at.clone());
                let incarnation = Incarnation(u128::from_str_radix(directory, 16).expect("digits"));
                self.start((*node_id, incarnation), at, advertises).await;
                return String::new();
            }
            Step::Kill(node_id) => {
                self.kill(*node_id).await;
                return String::new();
            }
            Step::Mute(address) | Step::Unmute(address) => {
                self.network.mute(address, matches!(step, Step::Mute(_)));
                return String::new();
            }
            Step::Members => {
                let membership = self.leader().await.engine.inner.core.metrics().membership;
                return membership.members.iter().fold(String::new(), |mut told, (node_id, member)| {
                    let kind = if membership.is_voter(*node_id) { "voter" } else { "learner" };
                    let directory = member.incarnation.0;
                    let _ =
                        writeln!(told, "node {node_id} at {}: {kind}, directory {directory:x}", member.peer);
                    told
                });
            }
            Step::Wait { seconds } => {
                tokio::time::sleep(Duration::from_secs(*seconds)).await;
                return String::new();
            }
            Step::Running => return self.running(),
            Step::Add { node_id, at, promote } => {
                RequestedChange::Add { new: new_at(*node_id, at.as_ref()), promote: *promote, timeout }
            }
            Step::Promote(node_id) => RequestedChange::Promote { node_id: *node_id, timeout },
            Step::Demote { node_id, force } => RequestedChange::Demote { node_id: *node_id, force: *force },
            Step::Remove { node_id, force } => RequestedChange::Remove { node_id: *node_id, force: *force },
            Step::Replace { old, by, at } => {
                RequestedChange::Replace { old: *old, new: new_at(*by, at.as_ref()), timeout }
            }
            Step::Update { node_id, peer } => {
                let addresses = NewAddresses { peer: Some(peer.clone()), client: None };
                RequestedChange::Update { node_id: *node_id, addresses }
            }
        };
        self.change(change).await
    }
}

impl Runner for Cluster {
    type Command = Step;

    fn run(&mut self, step: &Step, _: &Context) -> Told {
        let runtime = self.runtime.take().expect("given back after every step");
        let told = runtime.block_on(self.step(step));
        self.runtime = Some(runtime);
        Ok(told)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(runtime) = &self.runtime {
            let _context = runtime.enter();
            self.nodes.clear();
            self.network.listeners().clear();
        }
        // The next script's world begins after this one has ended.
        self.runtime = None;
        self.world = None;
    }
}

#[test]
fn scripts_of_members() {
    scripts("membership", Cluster::new);
}
