//! The tasks of a node with a disk and a port: whichever panics, the node ends and names it.

use std::collections::BTreeSet;
use std::path::Path;

use futures::future::join_all;
use quorate::FatalError;
use quorate::Role;
use quorate::kv::machine::KvMachine;
use quorate::{Engine, EngineConfig};
use tokio::time::timeout;

use crate::{DEADLINE, POLL};

async fn open(dir: &Path) -> Engine<KvMachine> {
    let peer = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    peer.set_nonblocking(true).unwrap();
    let mut config = EngineConfig::new(1, dir, peer.local_addr().unwrap().to_string());
    config.peer_listener = Some(peer);
    Engine::open(config, KvMachine::default()).await.unwrap()
}

/// All tasks of a node that serves, is alone, and has been started for the first time.
const TASKS: [&str; 22] = [
    "agreement",
    "compaction",
    "consensus-apply",
    "consensus-core",
    "consensus-flushed",
    "consensus-read-deadlines",
    "consensus-step-down",
    "consensus-tick",
    "disk-health",
    "event-log",
    "flushed-writes",
    "hand-over",
    "held-by-all",
    "leader-reads",
    "leadership",
    "peer-port",
    "quota",
    "read-indexes",
    "standing",
    "state",
    "wake-ups",
    "wall-clock",
];

/// What runs on a node that serves.
async fn names() -> Vec<&'static str> {
    let dir = tempfile::tempdir().unwrap();
    let node = open(dir.path()).await;
    assert!(node.ready(DEADLINE).await);
    let formed = async {
        while node.tasks().contains(&"formation") {
            tokio::time::sleep(POLL).await;
        }
    };
    timeout(DEADLINE, formed).await.expect("it has formed its cluster");
    let names = node.tasks();
    node.shutdown().await;
    names
}

async fn panics(name: &'static str) {
    let dir = tempfile::tempdir().unwrap();
    let node = open(dir.path()).await;
    let found = async {
        while !node.panic_in(name) {
            tokio::time::sleep(POLL).await;
        }
    };
    timeout(DEADLINE, found).await.unwrap_or_else(|_| panic!("{name} does not run"));
    let told = timeout(DEADLINE, node.wait_for(|state| state.fatal.is_some())).await;
    let told = told.unwrap_or_else(|_| panic!("nothing came of a panic in {name}")).unwrap();
    let failure = format!("has panicked: task {name} was made to panic");
    assert_eq!(told.fatal, Some(FatalError::Task { name, failure }));
    assert_eq!(told.role, Role::Stopped);
    timeout(DEADLINE, node.shutdown()).await.unwrap_or_else(|_| panic!("{name}: the node does not stop"));
    // It has let go of everything.
    drop(node);
    let again = open(dir.path()).await;
    assert!(again.ready(DEADLINE).await, "{name}: {:?}", again.state());
    again.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_any_task_of_a_node_with_a_disk_ends_it() {
    let names = names().await;
    // A task that runs outside the set is not seen here, and its panic by nobody.
    assert_eq!(
        BTreeSet::from_iter(names.clone()),
        BTreeSet::from(TASKS),
        "is the table in `engine/mod.rs` right?"
    );
    join_all(names.into_iter().map(panics)).await;
}
