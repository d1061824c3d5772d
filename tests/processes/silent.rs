//! Nodes whose standard error cannot be written any more lose their log, and nothing else.

use std::fs;

use quorate_cluster::{Cluster, Stderr};
use quorate_testkit::disk::{Fault, FaultyDisk, mounted};

use crate::support::{DEADLINE, QUORATE, TestCluster, client, eventually, get, outcome, spec, start};

const KINDS: [Stderr; 3] = [Stderr::NoReader, Stderr::Unread, Stderr::FullDisk];

/// Three nodes, ready.
fn with_stderr(stderr: Stderr) -> TestCluster {
    let (mut spec, dir) = spec();
    spec.stderr = stderr;
    let cluster = Cluster::start(spec).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() }
}

/// A metric of a node.
fn metric(nodes: &TestCluster, node_id: u64, name: &str) -> f64 {
    let (_, page) = get(nodes.node(node_id), "/metrics").unwrap();
    let line =
        page.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {page}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// A follower restarts, then the other one is killed: two of three nodes are alive, so writes go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_goes_on_through_restarts_and_kills() {
    for kind in KINDS {
        let nodes = with_stderr(kind);
        let mut writers = nodes.writers(4);
        assert!(writers.reached(50, DEADLINE).await, "{kind:?}");
        let leader = nodes.leader(0).await.node_id;
        let followers: Vec<u64> = nodes.cluster.spec().node_ids().filter(|id| *id != leader).collect();
        let (restarts, dies) = (nodes.node(followers[0]), nodes.node(followers[1]));

        assert_eq!(restarts.stop(DEADLINE).unwrap().status.code(), Some(0), "{kind:?}");
        let served = writers.acknowledged() + 50;
        assert!(writers.reached(served, DEADLINE).await, "{kind:?}: without a follower");
        restarts.start().unwrap();
        restarts.wait_ready(DEADLINE).unwrap();
        dies.kill().unwrap();
        let served = writers.acknowledged() + 50;
        assert!(
            writers.reached(served, DEADLINE).await,
            "{kind:?}: the returned follower is not replicated to"
        );
        dies.start().unwrap();
        dies.wait_ready(DEADLINE).unwrap();
        nodes.check(&writers.finish().await).await;

        if kind != Stderr::Unread {
            // A write that never comes back is not lost yet.
            assert!(metric(&nodes, leader, "quorate_process_log_lines_dropped_total") > 0.0, "{kind:?}");
        }
        // The second signal would end it with 1, a panic with 101.
        let leader = nodes.leader(0).await.node_id;
        nodes.cluster.stop(&[leader], DEADLINE).unwrap();
        for node in nodes.cluster.nodes() {
            assert_eq!(node.exit().unwrap().status.code(), Some(0), "{kind:?}, node {}", node.node_id());
        }
    }
}

/// An error of the disk ends the process of the leader, with its code, and the others go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fatal_error_ends_the_process() {
    for kind in KINDS {
        let (mut spec, dir) = spec();
        spec.stderr = kind;
        let (backing, path) = (dir.path().join("backing"), spec.node_data_dir(1));
        fs::create_dir_all(&backing).unwrap();
        fs::create_dir_all(&path).unwrap();
        let Some(disk) = mounted(FaultyDisk::mount(&backing, &path)) else { return };
        let cluster = Cluster::start(spec).unwrap();
        cluster.wait_ready(DEADLINE).unwrap();
        let nodes = TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() };
        nodes.put("before", "x").await;
        disk.set(Fault::FailSyncs);
        let mut writers = nodes.writers(2);
        let exit = nodes.node(1).wait_exit(DEADLINE).unwrap();
        assert_eq!(exit.status.code(), Some(1), "{kind:?}");
        let served = writers.acknowledged() + 50;
        assert!(writers.reached(served, DEADLINE).await, "{kind:?}: the others do not go on");
        writers.finish().await;
        disk.mend();
        drop(nodes);
    }
}

/// A start that fails ends, with its code, though nobody can be told why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_start_ends_with_its_code() {
    for kind in KINDS {
        let (mut spec, _dir) = spec();
        spec.stderr = kind;
        let cluster = Cluster::prepare(spec).unwrap();
        let node = cluster.node(1);
        let _holder = std::net::TcpListener::bind(node.peer_address()).unwrap();
        node.start().unwrap();
        assert_eq!(node.wait_exit(DEADLINE).unwrap().status.code(), Some(1), "{kind:?}");
        node.start_with(&["--node-id", "7"]).unwrap();
        let ended = node.wait_exit(DEADLINE).unwrap();
        assert!(ended.status.code().is_some_and(|code| code != 101), "{kind:?}: {ended:?}");
    }
}

/// Commands, and `quorate cluster`, whose output nobody reads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_end_with_their_codes() {
    let nodes = start(&[]);
    nodes.put("k", "v").await;
    let endpoints = nodes.cluster.endpoints().join(",");
    for (args, code) in [
        (&["--endpoints", &*endpoints, "get", "k"][..], 0),
        (&["--endpoints", &*endpoints, "status"], 0),
        (&["--endpoints", &*endpoints, "status", "-o", "json"], 0),
        (&["--endpoints", "127.0.0.1:1", "get", "k", "--timeout", "1s"], 2),
        (&["--endpoints", "nowhere", "get", "k"], 3),
        (&["cluster", "--nodes", "0"], 3),
        (&["--help"], 0),
    ] {
        let mut command = std::process::Command::new(crate::support::QUORATE);
        command.args(args).stdin(std::process::Stdio::null());
        // Both without a reader.
        command.stdout(std::io::pipe().unwrap().1).stderr(std::io::pipe().unwrap().1);
        let mut child = command.spawn().unwrap();
        drop(command);
        eventually("the command ends", async || child.try_wait().unwrap().is_some()).await;
        assert_eq!(child.wait().unwrap().code(), Some(code), "{args:?}");
    }

    let (spec, _dir) = spec();
    let mut command = std::process::Command::new(crate::support::QUORATE);
    command.arg("cluster").arg("--data-dir").arg(&spec.data_dir).stdin(std::process::Stdio::null());
    command.args(["--client-port", &spec.client_port.to_string()]);
    command.args(["--peer-port", &spec.peer_port.to_string()]);
    command.stdout(std::io::pipe().unwrap().1).stderr(std::io::pipe().unwrap().1);
    let mut child = command.spawn().unwrap();
    eventually("the cluster leads", async || {
        let mut status = std::process::Command::new(crate::support::QUORATE);
        status.args(["--endpoints", &spec.endpoints().join(","), "status"]);
        outcome(status).stdout.contains(quorate::Role::Leader.name())
    })
    .await;
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-HUP", &pid]).status().unwrap().success());
    eventually("quorate cluster ends", async || child.try_wait().unwrap().is_some()).await;
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
