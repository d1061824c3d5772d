//! What the crate promises about processes, on a stand-in for the binary.

#![allow(clippy::unwrap_used)] // a test file: clippy exempts only the functions marked as tests

use std::fs;
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use quorate_cluster::{Cluster, ClusterError, ClusterSpec, NodeRecord};

const DEADLINE: Duration = Duration::from_secs(10);

fn spec(dir: &Path) -> ClusterSpec {
    let binary = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/stand-in.sh");
    ClusterSpec::new(binary, dir).with_free_ports().unwrap()
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "in vain waited until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The state letter of a process in /proc: `T` is stopped; `None` when it is gone.
fn process_state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

fn record(dir: &Path) -> Vec<Option<u32>> {
    let nodes: Vec<NodeRecord> =
        serde_json::from_slice(&fs::read(dir.join("cluster.json")).unwrap()).unwrap();
    nodes.iter().map(|node| node.pid).collect()
}

#[test]
fn a_node_is_killed_stopped_paused_and_restarted() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(spec(dir.path())).unwrap();
    let pids: Vec<_> = cluster.nodes().iter().map(|node| node.pid()).collect();
    assert!(pids.iter().all(Option::is_some));
    assert_eq!(record(dir.path()), pids);

    let node = cluster.node(2);
    assert_eq!(node.kill().unwrap().status.signal(), Some(9));
    assert_eq!(node.pid(), None);
    assert_eq!(record(dir.path()), [pids[0], None, pids[2]]);
    assert!(matches!(node.kill(), Err(ClusterError::NotRunning { node_id: 2 })));

    let printed = || fs::read_to_string(node.log_path()).unwrap().matches("serve --node-id 2").count();
    let before = printed();
    let pid = node.start().unwrap();
    assert!(matches!(node.start(), Err(ClusterError::AlreadyRunning { node_id: 2, .. })));
    wait_until("the node prints", || printed() > before);
    node.pause().unwrap();
    wait_until("the node is stopped", || process_state(pid) == Some('T'));
    assert!(node.is_paused());
    assert!(matches!(
        node.wait_ready(Duration::from_millis(1)),
        Err(ClusterError::NotReady { node_id: 2, .. })
    ));
    // Only a resumed process can take notice of SIGTERM.
    let exit = node.stop(DEADLINE).unwrap();
    assert_eq!((exit.pid, exit.status.code()), (pid, Some(0)));

    assert_ne!(node.restart(DEADLINE).unwrap(), pid);
    wait_until("both runs are in the log", || printed() > before + 1);
    cluster.stop(&[1], DEADLINE).unwrap();
    assert_eq!(record(dir.path()), [None; 3]);
}

#[test]
fn a_node_that_ends_by_itself_is_noticed_with_its_last_words() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::prepare(spec(dir.path())).unwrap();
    cluster.node(1).start_with(&["--exit-with"]).unwrap();
    let error = cluster.node(1).wait_ready(DEADLINE).unwrap_err();
    let ClusterError::Exited { status, ref tail, .. } = error else { panic!("{error}") };
    assert_eq!(status.code(), Some(3));
    assert!(tail.contains("serve --node-id 1"), "{tail}");
    assert_eq!(record(dir.path()), [None; 3]);
}

#[test]
fn a_port_in_use_is_named_and_nothing_starts() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let address = spec.peer_address(3);
    let _holder = TcpListener::bind(&address).unwrap();
    let error = Cluster::start(spec).unwrap_err();
    assert!(error.to_string().contains(&address), "{error}");
    assert!(error.to_string().contains("--peer-port"), "{error}");
    assert!(!dir.path().join("node-1").exists());
}

#[test]
fn dropping_a_cluster_ends_all_its_processes() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(spec(dir.path())).unwrap();
    let pids: Vec<_> = cluster.nodes().iter().filter_map(|node| node.pid()).collect();
    cluster.node(1).pause().unwrap();
    drop(cluster);
    assert_eq!(pids.into_iter().filter_map(process_state).count(), 0);
    // The lock went with it: what is refused now is the difference in ports.
    assert!(matches!(Cluster::prepare(spec(dir.path())), Err(ClusterError::Addresses { .. })));
}

#[test]
fn a_node_outlives_the_thread_that_started_it() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let cluster = std::thread::spawn(|| Cluster::start(spec).unwrap()).join().unwrap();
    for node in cluster.nodes() {
        wait_until("the node prints", || node.log_tail(1).contains("serve"));
        assert!(node.pid().is_some(), "node {} died with its thread", node.node_id());
    }
}
