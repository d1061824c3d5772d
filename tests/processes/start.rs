//! From the start of a process to the first answer: what probes are told, how it is stopped, what is refused.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use quorate::store::DiskState;
use quorate::testkit::proto::v1::GetRequest;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate_cluster::{Cluster, Node};
use quorate_testkit::disk::{SmallDisk, mounted};

use crate::support::{
    DEADLINE, Outcome, QUORATE, TestCluster, client, eventually, get, outcome, spec, start,
};

const MIB: u64 = 1024 * 1024;

/// A pipe in the place of a file: whoever reads it waits until somebody writes to it.
fn put_pipe_in_place_of(path: &Path) {
    fs::remove_file(path).unwrap();
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

fn signal(node: &Node, signal: &str) {
    let pid = node.pid().unwrap().to_string();
    assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
}

/// Waits until `/readyz` answers 503 with a text that begins with `word` and holds all of `texts`.
async fn waits_for(node: &Node, word: &str, texts: &[&str]) {
    let mut last = None;
    eventually(&format!("node {} says {word}", node.node_id()), async || {
        last = get(node, "/readyz");
        last.as_ref().is_some_and(|(code, text)| {
            *code == 503
                && text.starts_with(&format!("{word}: "))
                && texts.iter().all(|part| text.contains(part))
        })
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_recovers_says_so_from_the_first_moment_and_stops_at_once() {
    let nodes = start(&[]);
    nodes.put("k", "v").await;
    let node = nodes.node(nodes.follower().await);
    node.stop(DEADLINE).unwrap();
    let identity = node.data_dir().join("identity.json");
    let kept = fs::read(&identity).unwrap();
    put_pipe_in_place_of(&identity);

    for name in ["-TERM", "-HUP", "-INT"] {
        node.start().unwrap();
        waits_for(node, "recovering", &["opening the data directory"]).await;
        assert_eq!(get(node, "/livez"), Some((200, "ok\n".to_owned())));
        assert_eq!(get(node, "/metrics").map(|(code, _)| code), Some(503));
        let (code, body) = get(node, "/replication/status").unwrap();
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert!(code == 503 && body["error"].as_str().unwrap().contains("recovering"), "{body}");
        let address = format!("http://{}", node.client_address());
        let mut kv = KvClient::connect(address).await.unwrap();
        let refused = kv.get(GetRequest { key: "k".into(), ..Default::default() }).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
        assert!(refused.message().contains("recovering"), "{refused}");
        signal(node, name);
        let exit = node.wait_exit(DEADLINE).unwrap();
        assert_eq!(exit.status.code(), Some(0), "{name}: {}", node.log_tail(20));
    }

    // Nothing was damaged by that, and what it waits for may come.
    node.start().unwrap();
    waits_for(node, "recovering", &[]).await;
    fs::write(&identity, &kept).unwrap();
    node.wait_ready(DEADLINE).unwrap();
    fs::remove_file(&identity).unwrap();
    fs::write(&identity, &kept).unwrap();
    nodes.put("k", "w").await;
    nodes.converged().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_waited_for_is_told_apart() {
    let (spec, dir) = spec();
    let cluster = Cluster::prepare(spec).unwrap();
    let (first, second, third) = (cluster.node(1), cluster.node(2), cluster.node(3));
    first.start().unwrap();
    let named = |node: &Node| format!("node {} at {}", node.node_id(), node.peer_address());
    waits_for(first, "forming", &[&named(second), &named(third)]).await;
    assert_eq!(get(first, "/livez").unwrap().0, 200);
    second.start().unwrap();
    waits_for(second, "forming", &[&named(third)]).await;
    assert!(!get(second, "/readyz").unwrap().1.contains("node 1 at"), "it answers");
    third.start().unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    assert_eq!(get(first, "/readyz"), Some((200, "ok\n".to_owned())));

    second.kill().unwrap();
    third.kill().unwrap();
    // As the leader it first finds out that nobody answers.
    eventually("nobody leads", async || {
        get(first, "/readyz").is_some_and(|(code, text)| {
            code == 503 && (text.starts_with("no_leader: ") || text.starts_with("out_of_touch: "))
        })
    })
    .await;
    assert_eq!(get(first, "/livez").unwrap().0, 200);
    drop(cluster);
    drop(dir);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_terminal_ends_hands_over() {
    let nodes = start(&[]);
    nodes.put("k", "v").await;
    let leader = nodes.leader(0).await;
    let node = nodes.node(leader.node_id);
    signal(node, "-HUP");
    assert_eq!(node.wait_exit(DEADLINE).unwrap().status.code(), Some(0), "{}", node.log_tail(20));
    let next = nodes.leader(leader.term).await;
    assert_eq!(next.term, leader.term + 1, "handed over");
}

/// `quorate serve` with `args`, on ports of its own.
fn serve(args: &[&str]) -> Command {
    let ports = spec().0;
    let mut command = Command::new(QUORATE);
    command.args(["serve", "--client-listen", &ports.client_address(1)]);
    command.args(["--peer-listen", &ports.peer_address(1)]).args(args);
    command.env_remove("QUORATE_DATA_DIR");
    command
}

/// Ends once the node says that it serves.
async fn serves(command: &mut Command) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut child = command.stdin(Stdio::null()).stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
    let text = || fs::read_to_string(&log).unwrap();
    eventually("it serves, or has ended", async || {
        text().contains("serving") || child.try_wait().unwrap().is_some()
    })
    .await;
    let pid = child.id().to_string();
    let _ = Command::new("kill").args(["-TERM", &pid]).status();
    eventually("it ends", async || child.try_wait().unwrap().is_some()).await;
    Outcome { status: child.wait().unwrap(), stdout: String::new(), stderr: text() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_not_told_where_keeps_its_data_in_one_place() {
    let home = tempfile::tempdir().unwrap();
    let expected = home.path().join("quorate/node-1");
    let mut incarnations = Vec::new();
    for _ in 0..2 {
        let here = tempfile::tempdir().unwrap();
        let mut command = serve(&["--single"]);
        command.env("XDG_DATA_HOME", home.path()).current_dir(here.path());
        let run = serves(&mut command).await;
        assert_eq!(run.status.code(), Some(0), "{run:#?}");
        let first = run.stderr.lines().next().unwrap();
        assert!(first.contains(&format!("the data directory is {}", expected.display())), "{first}");
        assert_eq!(fs::read_dir(here.path()).unwrap().count(), 0, "nothing is left where it was started");
        incarnations.push(fs::read(expected.join("identity.json")).unwrap());
    }
    assert_eq!(incarnations[0], incarnations[1]);
}

#[test]
fn where_the_data_are_is_said_first_whatever_is_logged() {
    let home = tempfile::tempdir().unwrap();
    let expected = home.path().join("quorate/node-1");
    for log in [
        &["--log-level", "off"][..],
        &["--log-level", "error"],
        &["--log-level", "warn,quorate=off", "--log-format", "json"],
    ] {
        let mut command = Command::new(QUORATE);
        // It ends by itself: there is no such address.
        command.args(["serve", "--single", "--client-listen", "192.0.2.1:7801", "--insecure"]).args(log);
        command.env_remove("QUORATE_DATA_DIR").env("XDG_DATA_HOME", home.path());
        let run = outcome(command);
        let first = run.stderr.lines().next().unwrap_or_default();
        assert!(first.contains(&format!("the data directory is {}", expected.display())), "{run:#?}");
        assert_eq!(first.starts_with('{'), log.contains(&"json"), "{first}");
        assert_eq!(run.stderr.matches("data directory").count(), 1, "{run:#?}");
    }
}

#[test]
fn what_cannot_be_is_refused_with_what_could() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let data = data.to_str().unwrap();
    for (args, code, text) in [
        (&["--single", "--disk-reserve-bytes", "18446744073709551615"][..], 3, "must be from 33554432 to"),
        (&["--single", "--log-level", "loud"], 3, "\"loud\" is no level; the levels are"),
        (&["--single", "--peer-advertise", "127.0.0.1:0"], 3, "port 0"),
        (&["--single", "--election-timeout-max-ms", "99999999999"], 3, "must be from 3 to 600000"),
        (&["--single", "--snapshot-every-bytes", "0"], 3, "snapshot_every_bytes (0) must be from 1 to"),
        (
            &["--single", "--insecure", "--client-listen", "nowhere.invalid:7801"],
            1,
            "with a host that this machine can resolve",
        ),
        (
            &["--single", "--insecure", "--peer-listen", "192.0.2.1:7801"],
            1,
            "this machine has no such address",
        ),
    ] {
        let mut command = Command::new(QUORATE);
        command.args(["serve", "--data-dir", data]);
        for listen in ["--client-listen", "--peer-listen"] {
            if !args.contains(&listen) {
                command.args([listen, "127.0.0.1:0"]);
            }
        }
        command.args(args);
        outcome(command).assert_refused(code, &[text]);
        assert!(!Path::new(data).exists(), "{args:?} leaves something behind");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_of_which_only_the_identity_is_left_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let args = ["--single", "--data-dir", data.to_str().unwrap()];
    let run = serves(&mut serve(&args)).await;
    assert_eq!(run.status.code(), Some(0), "{run:#?}");
    for entry in fs::read_dir(&data).unwrap() {
        let path = entry.unwrap().path();
        match (path.is_dir(), path.ends_with("identity.json")) {
            (true, _) => fs::remove_dir_all(path).unwrap(),
            (false, true) => {}
            (false, false) => fs::remove_file(path).unwrap(),
        }
    }
    let own = format!("1={}", spec().0.peer_address(1));
    for way in
        [&["--single"][..], &["--join"], &["--peers", &own, "--node-id", "1", "--peer-advertise", &own[2..]]]
    {
        let mut command = serve(&["--data-dir", data.to_str().unwrap()]);
        command.args(way);
        outcome(command)
            .assert_refused(1, &["log.ready is gone", "identity.json shows", "rejoin as a new node"]);
    }
    assert!(!data.join("log").exists());
}

/// A process that is not given what it needs says so; it neither panics nor calls its data corrupt.
#[test]
fn too_little_memory_or_too_few_threads_are_told() {
    let dir = tempfile::tempdir().unwrap();
    for limit in ["-v 100000", "-v 150000", "-v 200000", "-v 409600", "-d 409600"] {
        let data = dir.path().join("data");
        let script = format!("ulimit {limit}; exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script, QUORATE, "serve", "--single", "--data-dir"]).arg(&data);
        command.args(["--client-listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"]);
        let refused = outcome(command);
        assert!(!refused.stderr.contains("panicked"), "{limit}: {refused:#?}");
        assert!(!refused.stderr.contains("corrupt"), "{limit}: {refused:#?}");
        refused
            .assert_refused(3, &[&format!("ulimit {}", &limit[..2]), "at least 469762048", "control group"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_share_a_small_disk() {
    let (mut spec, dir) = spec();
    let path = dir.path().join("disk");
    fs::create_dir(&path).unwrap();
    let Some(disk) = mounted(SmallDisk::mount(&path, 400 * MIB)) else { return };
    spec.data_dir = path.join("cluster");
    let cluster = Cluster::start(spec).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let nodes = TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() };
    let mut writers = nodes.writers(4);
    assert!(writers.reached(200, DEADLINE).await);
    let attempts = writers.finish().await;
    for node in nodes.cluster.nodes() {
        let status = nodes.status(node.node_id()).await.unwrap();
        assert_eq!(status.disk.map(|disk| disk.state), Some(DiskState::Ok), "node {}", node.node_id());
        assert_eq!(get(node, "/readyz"), Some((200, "ok\n".to_owned())));
    }
    nodes.check(&attempts).await;

    // What does not fit is refused before anything is taken.
    let free = || free_bytes(&path);
    let before = free();
    let data = path.join("alone");
    let args = ["--single", "--disk-reserve-bytes", "1099511627776", "--data-dir", data.to_str().unwrap()];
    outcome(serve(&args)).assert_refused(3, &["must be at most", "half of the file system"]);
    assert!(free() + MIB > before);
    drop(nodes);
    drop(disk);
}

/// Bytes free at `path`, as `df` tells.
fn free_bytes(path: &Path) -> u64 {
    let told = Command::new("df").args(["--output=avail", "-B1"]).arg(path).output().unwrap();
    let told = String::from_utf8(told.stdout).unwrap();
    told.lines().nth(1).unwrap().trim().parse().unwrap()
}
