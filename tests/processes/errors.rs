//! How every command fails: its exit code, and with `-o json` one object on standard error. `docs/OPERATIONS.md` holds the
//! table.

use std::net::TcpListener;
use std::process::Command;

use quorate::Reason;
use quorate_cluster::Cluster;
use serde_json::{Value, json};

use crate::support::{DEADLINE, Outcome, QUORATE, TestCluster, client, eventually, outcome, spec, start};

/// Nobody listens there: the port is reserved, and ports below 1024 are given to nobody.
const NOWHERE: &str = "127.0.0.1:1";

fn run(endpoints: &str, args: &[&str]) -> Outcome {
    let mut command = Command::new(QUORATE);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("QUORATE_")) {
        command.env_remove(name);
    }
    command.args(args).args(["--endpoints", endpoints, "-o", "json"]);
    outcome(command)
}

/// The object on standard error, after what else is there; its form is checked.
fn failure(args: &[&str], outcome: &Outcome) -> Value {
    let last = outcome.stderr.lines().last().unwrap_or_default();
    let object: Value = serde_json::from_str(last).unwrap_or_else(|_| panic!("{args:?}: {outcome:#?}"));
    let mut fields: Vec<_> = object.as_object().unwrap().keys().cloned().collect();
    fields.sort();
    assert_eq!(
        fields,
        ["code", "hint", "leader", "maybe_applied", "message", "reason", "result"],
        "{args:?}"
    );
    let reason = object["reason"].as_str().unwrap();
    let reason = Reason::all().find(|known| known.name() == reason).unwrap_or_else(|| panic!("{object}"));
    let maybe_applied = object["maybe_applied"].as_bool().unwrap();
    assert_eq!(object["code"], json!(reason.exit_code(maybe_applied)), "{args:?}: {object}");
    assert_eq!(object["code"], json!(outcome.status.code()), "{args:?}: {object}");
    let message = object["message"].as_str().unwrap();
    assert!(!message.is_empty() && message.len() < 1000, "{args:?}: {object}");
    for debug in ["Some(", "None", "LogId", "Member {", "{voters", "Error {", "Err("] {
        assert!(!message.contains(debug), "{args:?} shows Rust's own form: {object}");
    }
    object
}

/// Runs each command and compares reason and exit code; no reason means that it succeeds.
fn check(endpoints: &str, cases: &[(&[&str], Option<Reason>)]) {
    for (args, expected) in cases {
        let outcome = run(endpoints, args);
        match expected {
            None => assert_eq!(outcome.status.code(), Some(0), "{args:?}: {outcome:#?}"),
            Some(reason) => {
                let object = failure(args, &outcome);
                assert_eq!(object["reason"], json!(reason.name()), "{args:?}: {object}");
                assert_eq!(object["maybe_applied"], json!(false), "{args:?}: {object}");
            }
        }
    }
}

#[test]
fn without_a_cluster_every_command_that_needs_one_says_that_it_cannot_connect() {
    const UNREACHABLE: Option<Reason> = Some(Reason::Unreachable);
    check(
        NOWHERE,
        &[
            (&["put", "k", "v"], UNREACHABLE),
            (&["put", "k", "v", "--if-absent"], UNREACHABLE),
            (&["get", "k"], UNREACHABLE),
            (&["get", "k", "--local"], UNREACHABLE),
            (&["del", "k"], UNREACHABLE),
            (&["del", "k", "--prefix"], UNREACHABLE),
            (&["range"], UNREACHABLE),
            (&["range", "--all"], UNREACHABLE),
            (&["txn", "--then", "put k v"], UNREACHABLE),
            (&["health"], UNREACHABLE),
            (&["status"], UNREACHABLE),
            (&["member", "list"], UNREACHABLE),
            (&["member", "add", "4", "--peer", NOWHERE], UNREACHABLE),
            (&["member", "remove", "2"], UNREACHABLE),
            (&["transfer-leader"], UNREACHABLE),
            (&["snapshot"], UNREACHABLE),
            (&["snapshot", "--endpoint", NOWHERE], UNREACHABLE),
            (&["configure"], UNREACHABLE),
            (&["configure", "preferred_leader=true"], UNREACHABLE),
            (&["configure", "--endpoint", NOWHERE, "preferred_leader=true"], UNREACHABLE),
            (&["bench", "--callers", "1", "--seconds", "1", "--warmup-seconds", "0"], UNREACHABLE),
            (&["bench", "--timeout", "2s"], UNREACHABLE),
            (&["session", "list"], UNREACHABLE),
            (&["session", "close", "7"], UNREACHABLE),
            (&["completion", "bash"], None),
        ],
    );
    let snapshot = failure(&[], &run(NOWHERE, &["snapshot", "--endpoint", NOWHERE]));
    for text in ["applied", "read the key"] {
        assert!(!snapshot.to_string().replace("maybe_applied", "").contains(text), "{snapshot}");
    }
}

#[test]
fn bad_input_is_told_apart_by_every_command() {
    const INVALID: Option<Reason> = Some(Reason::Invalid);
    let long = "9".repeat(100_000);
    check(
        NOWHERE,
        &[
            (&[], INVALID),
            (&["frobnicate"], INVALID),
            (&["put", "k"], INVALID),
            (&["put", "k", "--file", "/nonexistent"], INVALID),
            (&["get"], INVALID),
            (&["get", "k", "--timeout", &long], INVALID),
            (&["get", "k", "--level", &long], INVALID),
            (&["del"], INVALID),
            (&["range", "--limit", &long], INVALID),
            (&["txn"], INVALID),
            (&["txn", "--then", &long], INVALID),
            (&["txn", "/nonexistent"], INVALID),
            (&["watch", "k", "--from", "x"], INVALID),
            (&["health", "--nothing"], INVALID),
            (&["status", "--nothing"], INVALID),
            (&["member", "add", &long, "--peer", NOWHERE], INVALID),
            (&["transfer-leader", &long], INVALID),
            (&["snapshot", "--endpoint", &long], INVALID),
            (&["configure", &long], INVALID),
            (&["bench", "--callers", "0"], INVALID),
            (&["serve", "--single", "--node-id", "0"], INVALID),
            (&["serve", "--single", "--peer-listen", &long], INVALID),
            (&["serve", "--single", "--cluster", &format!("a {long}")], INVALID),
            (&["serve", "--peers", &long], INVALID),
            (&["cluster", "--nodes", "0"], INVALID),
            (&["completion", &long], INVALID),
        ],
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_a_node_every_command_says_what_is_wrong_in_its_own_words() {
    let (mut spec, dir) = spec();
    spec.nodes = 1;
    let cluster = Cluster::start(spec).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let nodes = TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() };
    let endpoint = nodes.node(1).client_address();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let data = nodes.dir.path().join("other");
    let long = "k".repeat(100_000);
    check(
        &endpoint,
        &[
            (&["put", "k", "v"], None),
            (&["put", "k", "w", "--if-absent"], Some(Reason::ConditionFailed)),
            (&["put", "k", "w", "--if-revision", "1000000"], Some(Reason::ConditionFailed)),
            (&["put", &long, "v"], Some(Reason::Invalid)),
            (&["get", "k"], None),
            (&["get", "missing"], Some(Reason::NotFound)),
            (&["get", "missing", "--local"], Some(Reason::NotFound)),
            (&["get", &long], Some(Reason::Invalid)),
            (&["get", "k", "--after", "1000000"], Some(Reason::Ahead)),
            (&["get", "k", "--after", "1000000", "--local"], Some(Reason::Ahead)),
            (&["range", "--after", "1000000"], Some(Reason::Ahead)),
            (&["range"], None),
            (&["range", "nothing", "nothinh"], None),
            (&["txn", "--when", "k = other", "--then", "del k", "--else", "get k"], None),
            (&["txn", "--when", "missing k", "--then", "del k"], None),
            (&["del", "k"], None),
            (&["del", "k"], Some(Reason::NotFound)),
            (&["del", "k", "--prefix"], None),
            (&["status"], None),
            (&["member", "list"], None),
            (&["member", "remove", "9"], Some(Reason::NotFound)),
            (&["member", "promote", "9"], Some(Reason::NotFound)),
            (&["member", "add", "9", "--peer", NOWHERE], Some(Reason::Membership)),
            (&["member", "add", "9", "--peer", "nowhere"], Some(Reason::Invalid)),
            (&["member", "remove", "1"], Some(Reason::Membership)),
            (&["transfer-leader", "9"], Some(Reason::NotFound)),
            (&["transfer-leader"], Some(Reason::Membership)),
            (&["snapshot"], None),
            (&["configure"], None),
            (&["configure", "snapshot_every_entries=x"], Some(Reason::Invalid)),
            (&["configure", &format!("{long}=1")], Some(Reason::Invalid)),
            (&["bench", "--callers", "1", "--seconds", "1", "--warmup-seconds", "0"], None),
            (
                &[
                    "serve",
                    "--single",
                    "--client-listen",
                    &taken,
                    "--peer-listen",
                    "127.0.0.1:0",
                    "--data-dir",
                    data.to_str().unwrap(),
                ],
                Some(Reason::Stopped),
            ),
        ],
    );
    // On a busy machine a leader may have been out of touch a moment ago.
    eventually("the node is healthy", async || run(&endpoint, &["health"]).status.success()).await;
    let missing = failure(&[], &run(&endpoint, &["get", "missing"]));
    eventually("the leader is named", async || {
        let missing = failure(&[], &run(&endpoint, &["get", "missing"]));
        missing["leader"] == json!({ "node_id": 1, "client": endpoint })
    })
    .await;
    assert_eq!(missing["maybe_applied"], json!(false), "{missing}");
    let ahead = failure(&[], &run(&endpoint, &["get", "k", "--after", "1000000"]));
    assert!(!ahead.to_string().contains("majority"), "{ahead}");
    let removed = run(&endpoint, &["del", "k"]);
    assert_eq!(serde_json::from_str::<Value>(&removed.stdout).unwrap()["deleted"], json!(false));
    let absent = run(&endpoint, &["put", "absent", "v", "--if-absent"]);
    let absent: Value = serde_json::from_str(&absent.stdout).unwrap();
    assert_eq!(
        (&absent["version"], &absent["create_revision"]),
        (&json!(1), &absent["revision"]),
        "{absent}"
    );
    let ahead = failure(&[], &run(&endpoint, &["watch", "k", "--from", "1000000"]));
    assert!(ahead["message"].as_str().unwrap().contains("revision 1000000"), "{ahead}");
    // Something answers there, and it is no node for clients.
    let peer_port = nodes.cluster.spec().peer_address(1);
    for args in [&["get", "k"][..], &["put", "k", "v"], &["member", "list"], &["watch", "k", "--from", "1"]] {
        let wrong = failure(args, &run(&peer_port, args));
        assert_eq!(wrong["code"], json!(2), "{args:?}: {wrong}");
        assert!(wrong["message"].as_str().unwrap().contains("peer port"), "{args:?}: {wrong}");
    }
    // What is done is done, whether or not that can be written.
    for args in [&["put", "full", "v"][..], &["txn", "--then", "put full w"], &["del", "full"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut command = Command::new(QUORATE);
        command.args(args).args(["--endpoints", &endpoint, "-o", "json"]).stdout(full);
        let output = command.output().unwrap();
        let object: Value = serde_json::from_slice(&output.stderr).unwrap();
        assert_eq!((output.status.code(), &object["maybe_applied"]), (Some(5), &json!(true)), "{object}");
        assert!(object["message"].as_str().unwrap().contains("was applied"), "{object}");
    }
    assert_eq!(failure(&[], &run(&endpoint, &["get", "full"]))["reason"], json!("NOT_FOUND"), "deleted");
    let unknown = run(&endpoint, &["txn", "--ack", "leader", "--then", "put k v"]);
    let unknown: Value = serde_json::from_str(&unknown.stdout).unwrap();
    assert_eq!((&unknown["succeeded"], &unknown["ack"]), (&Value::Null, &json!("leader")), "{unknown}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_a_write_is_undecided_only_while_it_may_have_been_proposed() {
    let nodes = start(&[]);
    let leader = nodes.leader(0).await.node_id;
    nodes.put("k", "before").await;
    let others = nodes.cluster.spec().node_ids().filter(|node_id| *node_id != leader);
    others.for_each(|node_id| {
        nodes.node(node_id).kill().unwrap();
    });
    let endpoints = nodes.cluster.endpoints().join(",");
    let args = ["put", "k", "after", "--timeout", "2s"];
    let first = failure(&args, &run(&endpoints, &args));
    let expected = if first["maybe_applied"] == json!(true) { 5 } else { 1 };
    assert_eq!(first["code"], json!(expected), "{first}");
    // By now the leader knows: nothing more is proposed.
    let second = failure(&args, &run(&endpoints, &args));
    assert_eq!((&second["code"], &second["maybe_applied"]), (&json!(1), &json!(false)), "{second}");
    for args in [&["get", "k", "--timeout", "2s"][..], &["member", "remove", "9", "--timeout", "2s"]] {
        let failed = failure(args, &run(&endpoints, args));
        assert_ne!(failed["code"], json!(0), "{failed}");
    }
}

/// A node that says nothing is waited for longer than these commands have time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_the_members_that_is_not_proposed_in_time_is_certainly_not_made() {
    let nodes = start(&[]);
    nodes.leader(0).await;
    let endpoints = nodes.cluster.endpoints().join(",");
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    for args in
        [&["member", "add", "4", "--peer", &address][..], &["member", "update", "2", "--peer", &address]]
    {
        let args = [args, &["--timeout", "1s"]].concat();
        let told = failure(&args, &run(&endpoints, &args));
        let (code, reason) = (json!(1), json!("DEADLINE_EXCEEDED"));
        assert_eq!(
            (&told["code"], &told["reason"], &told["maybe_applied"]),
            (&code, &reason, &json!(false)),
            "{told}"
        );
        assert!(told["message"].as_str().unwrap().contains(&format!("to answer at {address}")), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_not_every_voter_confirms_is_told_with_what_came_of_it() {
    let nodes = start(&[]);
    let paused = nodes.follower().await;
    nodes.node(paused).pause().unwrap();
    let endpoints = nodes.cluster.endpoints().join(",");
    fn all<'a>(args: &[&'a str]) -> Vec<&'a str> {
        [args, &["--ack", "all", "--ack-timeout", "300ms"]].concat()
    }
    let voter = format!("not known to be on disk at node {paused}");
    for (args, code, printed) in [
        (&["put", "lock", "me", "--if-absent"][..], 5, ", version 1\n"),
        (&["put", "lock", "you", "--if-absent"], 4, ""),
        (
            &["txn", "--when", "missing lock", "--then", "put lock you"],
            5,
            "not all comparisons hold, revision ",
        ),
        (&["del", "lock"], 5, "deleted\n"),
        (&["del", "lock"], 4, ""),
    ] {
        let told = nodes.quorate(&all(args));
        told.assert_refused(code, &[&voter]);
        assert!(told.stdout.contains(printed) && told.stdout.is_empty() == printed.is_empty(), "{told:#?}");
    }
    for (args, code, reason, field, expected) in [
        (&["put", "lock", "me", "--if-absent"][..], 5, "ACK_TIMEOUT", "succeeded", json!(true)),
        (&["put", "lock", "you", "--if-absent"], 4, "CONDITION_FAILED", "succeeded", json!(false)),
        (&["put", "lock", "you"], 5, "ACK_TIMEOUT", "version", json!(2)),
        (
            &["txn", "--when", "missing lock", "--then", "put lock you"],
            5,
            "ACK_TIMEOUT",
            "succeeded",
            json!(false),
        ),
        (&["del", "lock", "--prefix"], 5, "ACK_TIMEOUT", "deleted", json!(1)),
        (&["del", "lock"], 4, "NOT_FOUND", "deleted", json!(false)),
    ] {
        let told = failure(args, &run(&endpoints, &all(args)));
        assert_eq!((&told["code"], &told["reason"]), (&json!(code), &json!(reason)), "{args:?}: {told}");
        assert_eq!(told["maybe_applied"], json!(code == 5), "{args:?}: {told}");
        assert_eq!(told["result"][field], expected, "{args:?}: {told}");
        assert_eq!(told["result"]["missing"], json!([paused]), "{args:?}: {told}");
        assert!(told["result"]["index"].is_u64(), "{args:?}: {told}");
    }
    nodes.node(paused).resume().unwrap();
}
