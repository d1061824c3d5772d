//! Every task that a node cannot do without, made to panic in turn: the node ends, says which task it was, and the others
//! go on.

use std::collections::BTreeSet;
use std::time::Duration;

use quorate::{Engine, FatalError, NodeId, Role};
use quorate_testkit::Sum;
use quorate_testkit::simulation::{Calm, in_world};

const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(1);
const NODES: [NodeId; 3] = [1, 2, 3];

struct Cluster(Calm<Sum>);

impl Cluster {
    async fn start() -> Self {
        let mut calm = Calm::new(0);
        for node_id in NODES {
            calm.start_node(node_id, Sum::default(), |_| {}).await.unwrap();
        }
        Self(calm)
    }

    /// What `look` finds, looking at every node again and again from its start on.
    async fn find<T>(&self, what: &str, look: impl Fn(&Engine<Sum>) -> Option<T>) -> T {
        let found = async {
            loop {
                if let Some(found) = self.0.engines().find_map(&look) {
                    return found;
                }
                tokio::time::sleep(POLL).await;
            }
        };
        let found = tokio::time::timeout(PATIENCE, found).await;
        found.unwrap_or_else(|_| panic!("in vain waited for {what}"))
    }

    /// A write that is taken by a node that leads and is not `without`.
    async fn write(&self, without: Option<NodeId>) {
        let written = async {
            loop {
                for node in self.0.engines() {
                    if Some(node.state().node_id) != without
                        && node.state().role == Role::Leader
                        && node.write(1).await.is_ok()
                    {
                        return;
                    }
                }
                tokio::time::sleep(POLL).await;
            }
        };
        tokio::time::timeout(PATIENCE, written).await.expect("a write is taken");
    }
}

fn simulated<T>(test: impl Future<Output = T>) -> T {
    in_world(0, test)
}

/// All tasks of nodes without a disk and without a machine that counts its bytes; no snapshot is sent.
const TASKS: [&str; 22] = [
    "agreement",
    "compaction",
    "consensus-apply",
    "consensus-core",
    "consensus-flushed",
    "consensus-heartbeat",
    "consensus-read-deadlines",
    "consensus-replication",
    "consensus-step-down",
    "consensus-tick",
    "flushed-writes",
    "formation",
    "hand-over",
    "held-by-all",
    "leader-reads",
    "leadership",
    "quota",
    "read-indexes",
    "standing",
    "state",
    "wake-ups",
    "wall-clock",
];

/// All tasks that any node is seen to run, from its start until it serves.
fn all_names() -> BTreeSet<&'static str> {
    simulated(async {
        let cluster = Cluster::start().await;
        let mut names = BTreeSet::new();
        let served = async {
            loop {
                names.extend(cluster.0.engines().flat_map(Engine::tasks));
                if cluster.0.engines().all(|node| node.state().is_ready()) {
                    return;
                }
                tokio::time::sleep(POLL).await;
            }
        };
        tokio::time::timeout(PATIENCE, served).await.expect("the nodes serve");
        cluster.write(None).await;
        names.extend(cluster.0.engines().flat_map(Engine::tasks));
        names
    })
}

/// A cluster one of whose nodes has a task of this name panic: one that serves, or, if the task runs only before that, one that
/// was just started. That node, and whether the cluster served.
async fn with_panic(name: &str) -> (Cluster, Engine<Sum>, bool) {
    let panics = |node: &Engine<Sum>| node.panic_in(name).then(|| node.clone());
    let cluster = Cluster::start().await;
    let ready = async {
        while !cluster.0.engines().all(|node| node.state().is_ready()) {
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(PATIENCE, ready).await.expect("the nodes serve");
    cluster.write(None).await;
    let broken = cluster.0.engines().find_map(panics);
    if let Some(broken) = broken {
        return (cluster, broken, true);
    }
    let cluster = Cluster::start().await;
    let broken = cluster.find(name, panics).await;
    (cluster, broken, false)
}

#[test]
fn a_panic_in_any_task_ends_the_node_and_names_the_task() {
    let names = all_names();
    // A task that runs outside the set is not seen here, and its panic by nobody.
    assert_eq!(names, BTreeSet::from(TASKS), "is the table in `engine/mod.rs` right?");
    for name in names {
        simulated(async {
            let (cluster, broken, served) = with_panic(name).await;
            let fatal = broken.wait_for(|state| state.fatal.is_some());
            let told = tokio::time::timeout(PATIENCE, fatal).await;
            let told = told.unwrap_or_else(|_| panic!("nothing came of a panic in {name}")).unwrap();
            let failure = format!("has panicked: task {name} was made to panic");
            assert_eq!(told.fatal, Some(FatalError::Task { name, failure }));
            assert_eq!((told.role, told.leader.is_some()), (Role::Stopped, false), "{name}");
            let refused = async {
                while !broken.write(1).await.is_err_and(|error| error.to_string().contains(name)) {
                    tokio::time::sleep(POLL).await;
                }
            };
            let refused = tokio::time::timeout(PATIENCE, refused).await;
            assert!(refused.is_ok(), "{name}: writes are not refused with the reason");
            if served {
                // The others have lost no more than a member.
                cluster.write(Some(told.node_id)).await;
            }
            let stopped = tokio::time::timeout(PATIENCE, broken.shutdown()).await;
            assert!(stopped.is_ok(), "{name}: the node does not stop");
        });
    }
}

/// Nobody writes, reads, fails or leaves: what is left to do is to hear each other, and to look at the wall clock.
#[test]
fn an_idle_node_waits() {
    const IDLE: Duration = Duration::from_secs(60);
    simulated(async {
        let cluster = Cluster::start().await;
        cluster.write(None).await;
        // The quota is agreed on, and states are compared.
        tokio::time::sleep(Duration::from_secs(10)).await;
        let before: Vec<_> = cluster.0.engines().map(Engine::task_polls).collect();
        tokio::time::sleep(IDLE).await;
        for (node, before) in cluster.0.engines().zip(before) {
            assert!(node.state().is_ready());
            for (task, polls) in node.task_polls() {
                // Ours to keep quiet: openraft ticks a hundred times a second.
                if task.starts_with("consensus-") {
                    continue;
                }
                let most_per_s = match task {
                    // By when the leader, or a quorum, must have been heard again.
                    "state" => 2,
                    "wall-clock" => 1,
                    _ => 0,
                };
                let polls = polls - before.get(task).copied().unwrap_or_default();
                let most = most_per_s * IDLE.as_secs() + 2;
                assert!(polls <= most, "{task} of node {} was polled {polls} times", node.state().node_id);
            }
        }
    });
}
