//! Settings that cannot be right are refused, with a message that says what to do, and nothing is lost: the
//! node starts again with the right ones.

use std::fs;
use std::net::TcpListener;
use std::process::Command;

use quorate_cluster::Cluster;

use crate::support::{DEADLINE, QUORATE, TestCluster, eventually, outcome, output, spec, start};

/// Some keys, so that losing them would show.
async fn with_keys() -> (TestCluster, Vec<quorate_testkit::processes::set::Attempt>) {
    let nodes = start(&[]);
    let mut writers = nodes.writers(4);
    assert!(writers.reached(50, DEADLINE).await);
    let attempts = writers.finish().await;
    (nodes, attempts)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_in_use() {
    let (nodes, attempts) = with_keys().await;
    let node = nodes.node(2);
    node.stop(DEADLINE).unwrap();
    for address in [node.client_address(), node.peer_address()] {
        let _holder = TcpListener::bind(&address).unwrap();
        let text = format!("cannot listen on {address}");
        // A child that another test is just starting holds the port that was given back for a moment longer.
        eventually("the port in use is named", async || {
            let refused = outcome(nodes.cluster.spec().command(2));
            refused.assert_refused(1, &["cannot listen on"]);
            refused.stderr.contains(&text)
        })
        .await;
    }
    node.start().unwrap();
    node.wait_ready(DEADLINE).unwrap();
    nodes.check(&attempts).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_data_directory_of_another_cluster_or_node_or_process() {
    let (nodes, attempts) = with_keys().await;
    let node = nodes.node(2);
    node.stop(DEADLINE).unwrap();
    let mut other_cluster = nodes.cluster.spec().clone();
    other_cluster.cluster = "other".to_owned();
    outcome(other_cluster.command(2)).assert_refused(
        1,
        &["belongs to cluster \"quorate\", not \"other\"", "choose another --data-dir", "--cluster quorate"],
    );

    let run_as_3 = |data_dir: &std::path::Path| {
        let ports = spec().0;
        let mut command = Command::new(QUORATE);
        command.args(["serve", "--node-id", "3", "--data-dir"]).arg(data_dir);
        command.args(["--client-listen", &ports.client_address(1)]);
        command.args(["--peer-listen", &ports.peer_address(1)]);
        outcome(command)
    };
    run_as_3(&node.data_dir())
        .assert_refused(1, &["belongs to node 2, not node 3", "choose another --data-dir", "--node-id 2"]);

    node.start().unwrap();
    node.wait_ready(DEADLINE).unwrap();
    run_as_3(&nodes.node(3).data_dir()).assert_refused(1, &["in use by another process", "stop it first"]);
    nodes.check(&attempts).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_disk_under_a_known_identity() {
    let (nodes, attempts) = with_keys().await;
    let node = nodes.node(2);
    node.stop(DEADLINE).unwrap();
    let kept = nodes.dir.path().join("kept");
    fs::rename(node.data_dir(), &kept).unwrap();
    node.start().unwrap();
    let exit = node.wait_exit(DEADLINE).unwrap();
    assert_eq!(exit.status.code(), Some(1), "{}", node.log_tail(20));
    let log = output(node);
    for text in
        ["node 2 is known to its cluster by data directory", "wiped or replaced", "quorate member replace 2"]
    {
        assert!(log.contains(text), "\"{text}\" is not in {log}");
    }

    // The others need nobody to go on.
    nodes.put("during", "the absence of node 2").await;
    assert_eq!(nodes.quorate(&["get", "during"]).stdout.trim(), "the absence of node 2");
    nodes.quorate(&["del", "during"]);

    fs::remove_dir_all(node.data_dir()).unwrap();
    fs::rename(&kept, node.data_dir()).unwrap();
    node.start().unwrap();
    node.wait_ready(DEADLINE).unwrap();
    nodes.check(&attempts).await;
}

#[test]
fn an_unknown_key_or_a_bad_value_in_a_configuration_file() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text, expected) in [
        ("a.toml", "node_id = 1\nnode_nmae = \"x\"\n", "node_nmae"),
        ("b.yaml", "node_id: 1\nnode_nmae: x\n", "node_nmae"),
        ("c.toml", "node_id = \"one\"\n", "node_id"),
        ("d.json", "{}", ".toml, .yaml or .yml"),
    ] {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        let mut command = Command::new(QUORATE);
        command.arg("serve").arg("--config").arg(&path).arg("--data-dir").arg(dir.path().join("data"));
        outcome(command).assert_refused(3, &[expected, &path.display().to_string()]);
    }
    assert!(!dir.path().join("data").exists(), "a refused start leaves something behind");
}

/// The files in `cluster/config` hold nothing that is refused: only the setting added here is.
#[test]
fn the_example_configurations_are_accepted() {
    for name in ["node.toml", "node.yaml"] {
        let path = format!("{}/cluster/config/{name}", env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new(QUORATE);
        command.args(["serve", "--config", &path, "--append-message-bytes", "0"]);
        outcome(command).assert_refused(3, &["--append-message-bytes"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_over_the_limit() {
    let (nodes, attempts) = with_keys().await;
    let file = nodes.dir.path().join("big");
    // Over the server's limit, and over the client's own.
    for bytes in [2 << 20, 4 << 20] {
        fs::write(&file, vec![b'x'; bytes]).unwrap();
        nodes.quorate(&["put", "big", "--file", &file.display().to_string()]).assert_refused(3, &["limit"]);
    }
    assert_eq!(nodes.quorate(&["get", "big"]).status.code(), Some(4));
    nodes.check(&attempts).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_no_member() {
    let (nodes, attempts) = with_keys().await;
    let mut stranger = nodes.cluster.spec().clone();
    stranger.nodes = 4;
    stranger.data_dir = nodes.dir.path().join("stranger");
    let stranger = Cluster::prepare(stranger).unwrap();
    let node = stranger.node(4);
    node.start().unwrap();
    eventually("the stranger is told", async || {
        output(node).contains("node 4 is not a member of the cluster")
    })
    .await;
    eventually("the stranger stops", async || node.pid().is_none()).await;
    assert_eq!(node.exit().unwrap().status.code(), Some(1));
    let readings = nodes.check(&attempts).await;
    assert_eq!(readings.len(), 3);
    for node_id in 1..=3 {
        let members = nodes.status(node_id).await.unwrap().members;
        assert_eq!(members.len(), 3, "node {node_id} knows {members:?}");
    }
}
