//! The client and its commands against a real cluster: what fake servers cannot show.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::join_all;
use quorate::kv::client::{
    Client, ClientConfig, ClientError, Compare, EventKind, Range, ReadPreference, Scope, Txn, TxnOp,
    TxnResult,
};
use quorate::{AckLevel, ReadLevel};

use crate::support::{DEADLINE, QUORATE, TestCluster, Unlisted, eventually, outcome, spec, start};

/// A command that goes on until it is told to stop. Killed when dropped.
struct Running(Child);

impl Running {
    fn start(nodes: &TestCluster, args: &[&str]) -> (Self, mpsc::Receiver<String>) {
        let (running, lines, _) = Self::start_with_remarks(nodes, args);
        (running, lines)
    }

    /// The lines of standard output, and those of standard error.
    fn start_with_remarks(
        nodes: &TestCluster,
        args: &[&str],
    ) -> (Self, mpsc::Receiver<String>, mpsc::Receiver<String>) {
        let endpoints = nodes.cluster.endpoints().join(",");
        let mut command = Command::new(QUORATE);
        command.args(["--endpoints", &endpoints]).args(args).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = lines_of(child.stdout.take().unwrap());
        let remarks = lines_of(child.stderr.take().unwrap());
        (Self(child), lines, remarks)
    }

    /// The exit code after Ctrl-C.
    fn interrupt(&mut self) -> Option<i32> {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "Ctrl-C does not end it");
            std::thread::yield_now();
        }
    }
}

fn lines_of(output: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let output = BufReader::new(output);
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    lines
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_write_is_applied_and_watched_exactly_once_while_leaders_are_killed() {
    const CALLERS: usize = 8;
    let nodes = start(&[]);
    let scope = Scope::default();
    let stop = AtomicBool::new(false);
    let writer = |_| async {
        let mut acknowledged = 0;
        while !stop.load(Ordering::Relaxed) {
            nodes.client.put(&scope, "counted", "x").await.unwrap();
            acknowledged += 1;
        }
        acknowledged
    };
    let killing = async {
        let mut term = 0;
        for _ in 0..2 {
            let leader = nodes.leader(term).await;
            term = leader.term;
            nodes.node(leader.node_id).kill().unwrap();
            assert!(nodes.leader(term).await.term > term);
            nodes.node(leader.node_id).start().unwrap();
            nodes.node(leader.node_id).wait_ready(DEADLINE).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    };
    let mut watch = nodes.client.watch(&scope, Range::key("counted"), None).await.unwrap();
    let writing = async {
        let (acknowledged, ()) = tokio::join!(join_all((0..CALLERS).map(writer)), killing);
        acknowledged.into_iter().sum::<u64>()
    };
    tokio::pin!(writing);
    let (mut seen, mut written) = (0, None);
    while written != Some(seen) {
        tokio::select! {
            event = watch.next() => {
                seen += 1;
                assert_eq!(event.unwrap().unwrap().item.version, seen, "each put shows, in order and once");
            }
            acknowledged = &mut writing, if written.is_none() => written = Some(acknowledged),
            () = tokio::time::sleep(DEADLINE) => panic!("the watch hangs at {seen} of {written:?}"),
        }
    }
    let item = nodes.client.get(&scope, "counted", ReadLevel::Linearizable).await.unwrap().item.unwrap();
    assert_eq!(item.version, seen, "puts applied");
    let metrics = nodes.client.metrics();
    assert!(metrics.fail_overs >= 2 && metrics.retries > 0, "the writers met no failure: {metrics:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_library_reaches_everything_that_the_server_offers() {
    let nodes = start(&[]);
    let (client, scope) = (&nodes.client, Scope::default());
    let reply = client.put_with(&scope, "a", "1", AckLevel::All).await.unwrap();
    assert_eq!((reply.header.ack, reply.header.held_by.len()), (AckLevel::All, 3));
    let own = client.preferring(ReadPreference::RoundRobin);
    for _ in 0..6 {
        let read = own.get(&scope, "a", reply.header.then_read(ReadLevel::Local)).await.unwrap();
        assert_eq!(read.item.unwrap().value, "1");
        let read = own.get(&scope, "a", ReadLevel::Linearizable).await.unwrap();
        assert_eq!(read.item.unwrap().value, "1");
    }
    assert!(!client.put_if_absent(&scope, "a", "2").await.unwrap().succeeded);
    assert!(client.compare_and_set(&scope, "a", "1", "2").await.unwrap().succeeded);
    let txn = Txn::new()
        .when(Compare::value("a").equals("2"))
        .then(TxnOp::put("b", "3"))
        .then(TxnOp::get("b"))
        .then(TxnOp::delete("a"));
    let done = client.txn(&scope, txn).await.unwrap();
    assert!(done.succeeded);
    let TxnResult::Get(Some(item)) = &done.results[1] else { panic!("{done:?}") };
    assert_eq!((&item.value[..], item.mod_revision), (&b"3"[..], done.revision));

    let puts = (0..3000).map(|n| client.put(&scope, format!("many/{n:04}"), vec![7; 1000]));
    for put in join_all(puts).await {
        put.unwrap();
    }
    let stream = client.range_stream(&scope, Range::prefix("many/"), ReadLevel::Linearizable).await.unwrap();
    let keys: Vec<_> = stream.map(|item| item.unwrap().key).collect().await;
    assert_eq!(keys.len(), 3000);
    assert!(keys.is_sorted());
    let mut watch = client.watch(&scope, Range::prefix("many/"), None).await.unwrap();
    assert_eq!(client.delete_prefix(&scope, "many/").await.unwrap().deleted, 3000);
    for _ in 0..3000 {
        let event = tokio::time::timeout(DEADLINE, watch.next()).await.expect("the watch hangs").unwrap();
        assert_eq!(event.unwrap().kind, EventKind::Delete);
    }
    let old = client.watch(&scope, Range::prefix(""), Some(1.into())).await.unwrap().next().await.unwrap();
    assert!(old.is_ok(), "{old:?}");
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_do_what_their_help_says() {
    let nodes = start(&[]);
    let run = |args: &[&str]| {
        let outcome = nodes.quorate(args);
        assert!(outcome.status.success(), "{args:?}: {outcome:#?}");
        outcome.stdout
    };
    let (mut watching, lines) = Running::start(&nodes, &["watch", "--prefix", "", "--from", "1"]);
    run(&["put", "lock", "me", "--if-absent", "--ack", "all"]);
    nodes.quorate(&["put", "lock", "you", "--if-absent"]).assert_refused(4, &["lock was not set"]);
    let done = run(&[
        "txn",
        "--when",
        "lock = me",
        "--then",
        "put lock \"not me\"",
        "--then",
        "get lock",
        "--else",
        "get lock",
    ]);
    assert!(done.starts_with("all comparisons hold"), "{done}");
    assert!(done.contains("lock  not me"), "{done}");
    assert_eq!(run(&["get", "lock", "--level", "bounded:10000", "--prefer", "nearest"]), "not me");
    assert!(run(&["range", "--all"]).contains("not me"));
    assert_eq!(run(&["del", "--prefix", "lo"]), "deleted 1\n");
    run(&["put", "brief", "x", "--ttl", "100ms"]);
    let health = run(&["health"]);
    assert!(health.contains(quorate::Role::Leader.name()), "{health}");

    let line = || lines.recv_timeout(DEADLINE).expect("the watch hangs");
    let seen: Vec<_> = (0..5).map(|_| line()).collect();
    for (line, what) in seen.iter().zip(["put", "put", "delete", "put", "expire"]) {
        assert_eq!(line.split_whitespace().nth(1), Some(what), "{seen:#?}");
    }
    assert_eq!(watching.interrupt(), Some(0));

    nodes.node(1).kill().unwrap();
    nodes.quorate(&["health", "--timeout", "2s"]).assert_refused(1, &["1 of 3 nodes does not answer"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_says_when_it_has_no_cluster() {
    // Nobody is there, and nobody ever was.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let hole = TcpListener::bind("127.0.0.1:0").unwrap();
    for endpoint in [nobody, hole.local_addr().unwrap().to_string()] {
        for extra in [&[][..], &["--from", "1"], &["-o", "json", "--from", "1"]] {
            let mut command = Command::new(QUORATE);
            command.args(["watch", "k", "--timeout", "2s", "--endpoints", &endpoint]).args(extra);
            outcome(command).assert_refused(2, &[&endpoint]);
        }
    }
    let nodes = start(&[]);
    nodes.put("k", "1").await;
    let (mut watching, lines, remarks) = Running::start_with_remarks(&nodes, &["watch", "k", "--from", "1"]);
    let line = || lines.recv_timeout(DEADLINE).expect("the watch hangs");
    assert!(line().ends_with("put     k  1"));
    nodes.cluster.kill_all().unwrap();
    let remark = || remarks.recv_timeout(DEADLINE).expect("the watch says nothing");
    let lost = remark();
    assert!(lost.contains("lost the cluster") && lost.contains("127.0.0.1:"), "{lost}");
    for node in nodes.cluster.nodes() {
        node.start().unwrap();
    }
    nodes.cluster.wait_ready(DEADLINE).unwrap();
    nodes.put("k", "2").await;
    assert!(line().ends_with("put     k  2"), "it goes on where it was");
    let mut found = remark();
    // It may have met nodes that were not ready yet.
    while found.contains("lost the cluster") {
        found = remark();
    }
    assert!(found.contains("found the cluster again"), "{found}");
    assert_eq!(watching.interrupt(), Some(0));
}

/// Every node advertises a client address that leads nowhere from here; the endpoints that are given lead to them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn advertised_addresses_that_lead_nowhere_hold_up_nobody() {
    let hole = TcpListener::bind("127.0.0.1:0").unwrap();
    let nowhere = hole.local_addr().unwrap().to_string();
    let (spec, dir) = spec();
    let cluster = quorate_cluster::Cluster::prepare(spec).unwrap();
    let nodes =
        TestCluster { client: crate::support::client(&cluster), cluster, dir, program: QUORATE.into() };
    let start = |id| Unlisted::start(nodes.cluster.spec(), id, "--client-advertise", &nowhere, &[]);
    let _running: Vec<_> = nodes.cluster.spec().node_ids().map(start).collect();
    eventually("somebody leads", async || {
        nodes
            .client
            .status_all()
            .await
            .iter()
            .any(|(_, status)| status.as_ref().is_ok_and(|status| status.leads() && status.client == nowhere))
    })
    .await;
    for value in 0..12 {
        let client = Client::new(nodes.cluster.endpoints(), ClientConfig::default()).unwrap();
        client.put(&Scope::default(), "k", value.to_string()).await.unwrap();
        let asked = client.metrics().nodes.into_iter().find(|node| node.endpoint.as_str() == nowhere);
        assert!(asked.as_ref().is_none_or(|node| node.attempts == 0), "{asked:?}");
        client.close().await;
    }
    // A client that reaches one follower only is told which address it could not reach.
    let follower = nodes.node(nodes.follower().await).client_address();
    let mut config = ClientConfig::default();
    config.timeout = Duration::from_secs(2);
    let client = Client::new([follower.clone()], config).unwrap();
    let error = client.put(&Scope::default(), "k", "v").await.unwrap_err();
    assert!(matches!(error, ClientError::DeadlineExceeded { maybe_applied: false, .. }), "{error:?}");
    assert!(error.to_string().contains(&nowhere), "{error}");
    let mut command = Command::new(QUORATE);
    command.args(["put", "k", "v", "--timeout", "2s", "--endpoints", &follower]);
    let refused = outcome(command);
    assert!(!refused.status.success() && refused.stderr.contains(&nowhere), "{refused:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_string_of_bytes_goes_in_and_out() {
    use base64::Engine;
    let base64 = base64::prelude::BASE64_STANDARD;
    let (mut one, dir) = spec();
    one.nodes = 1;
    let cluster = quorate_cluster::Cluster::start(one).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let nodes =
        TestCluster { client: crate::support::client(&cluster), cluster, dir, program: QUORATE.into() };
    let run = |args: &[&str]| {
        let outcome = nodes.quorate(args);
        assert!(outcome.status.success(), "{args:?}: {outcome:#?}");
        outcome.stdout
    };
    let all: Vec<u8> = (0..=u8::MAX).collect();
    for (key, value) in [
        (&b"\xff\xfe"[..], &b"\0\xff"[..]),
        (&all, &all),
        ("\u{202e}x".as_bytes(), b"-"),
        (b" ", b""),
        (b"\"a\\n", b"two\nlines\r\n"),
    ] {
        let (key_text, value_text) = (base64.encode(key), base64.encode(value));
        run(&["put", "--key-base64", &key_text, "--value-base64", &value_text]);
        let read: serde_json::Value =
            serde_json::from_str(&run(&["get", "--key-base64", &key_text, "-o", "json"])).unwrap();
        for (name, bytes) in [("key", key), ("value", value)] {
            let found = match (read[name].as_str(), read[format!("{name}_base64")].as_str()) {
                (Some(text), None) => text.as_bytes().to_vec(),
                (None, Some(text)) => base64.decode(text).unwrap(),
                other => panic!("{other:?} of {read}"),
            };
            assert_eq!(found, bytes, "{name} of {read}");
        }
        // As a transaction, from a file that holds the bytes as they are.
        let quote = |bytes: &[u8]| {
            let mut quoted = b"\"".to_vec();
            for byte in bytes {
                if matches!(byte, b'"' | b'\\') {
                    quoted.push(b'\\');
                }
                quoted.push(*byte);
            }
            quoted.push(b'"');
            quoted
        };
        let mut text = b"\xef\xbb\xbf# with a byte-order mark\r\nwhen ".to_vec();
        text.extend(
            [&quote(key)[..], b" = ", &quote(value), b"\r\nthen put copy ", &quote(value), b"\n"].concat(),
        );
        let file = nodes.dir.path().join("transaction");
        std::fs::write(&file, text).unwrap();
        assert!(run(&["txn", file.to_str().unwrap()]).starts_with("all comparisons hold"));
        let copy = nodes.client.get(&Scope::default(), "copy", ReadLevel::Linearizable).await.unwrap();
        assert_eq!(copy.item.unwrap().value, value);
        assert_eq!(run(&["del", "--key-base64", &key_text]), "deleted\n");
    }
    run(&["put", "k", "v"]);
    // Nothing empty means everything, where something is removed.
    for args in [
        &["del", "--prefix", ""][..],
        &["del", ""],
        &["txn", "--then", "del-prefix \"\""],
        &["txn", "--then", "del-range a"],
    ] {
        nodes.quorate(args).assert_refused(3, &[]);
    }
    nodes.quorate(&["del", "--prefix", ""]).assert_refused(3, &["--all"]);
    nodes.quorate(&["watch", ""]).assert_refused(3, &["--all"]);
    nodes.quorate(&["range", "a", ""]).assert_refused(3, &["END"]);
    assert_eq!(run(&["get", "k"]), "v", "all of it is there");
    assert_eq!(run(&["del", "--all"]), "deleted 2\n");
    run(&["put", "k", "v", "--ttl", "400d"]);
    run(&["put", "k", "v", "--ttl", "18446744073709551615ms"]);
}

/// As under `| head -1`, of which a watch hears before the next change.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_whose_reader_has_gone_away_end_quietly() {
    let nodes = start(&[]);
    nodes.put("k", "v").await;
    let endpoints = nodes.cluster.endpoints().join(",");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    for (args, code) in [
        (&["get", "k"][..], 0),
        (&["range"], 0),
        (&["range", "--all"], 0),
        (&["watch", "--all"], 0),
        (&["watch", "--all", "--from", "1", "-o", "json"], 0),
        (&["status"], 0),
        (&["health"], 0),
        (&["member", "list"], 0),
        (&["session", "list"], 0),
        (&["configure"], 0),
        (&["snapshot"], 0),
        (&["completion", "bash"], 0),
        (&["put", "--help"], 0),
        (&["put", "k", "w"], 0),
        (&["txn", "--then", "put k x"], 0),
        (&["del", "k"], 0),
        // What is told by the exit code is told all the same.
        (&["get", "k"], 4),
        (&["del", "k", "-o", "json"], 4),
        (&["put", "k", "v", "--if-revision", "1"], 4),
        (&["status", "--endpoints", "127.0.0.1:1"], 2),
        (&["health", "--endpoints", "127.0.0.1:1"], 2),
    ] {
        let mut command = Command::new(QUORATE);
        command.env("QUORATE_ENDPOINTS", &endpoints).args(args).stdin(Stdio::null());
        let child = command.stdout(writer.try_clone().unwrap()).stderr(Stdio::piped()).spawn().unwrap();
        let mut running = Running(child);
        eventually("it ends", async || running.0.try_wait().unwrap().is_some()).await;
        let mut told = String::new();
        running.0.stderr.take().unwrap().read_to_string(&mut told).unwrap();
        assert_eq!(running.0.wait().unwrap().code(), Some(code), "{args:?}: {told}");
        assert!(code != 0 || told.is_empty(), "{args:?}: {told}");
        assert!(!told.contains("panicked") && !told.contains("Broken pipe"), "{args:?}: {told}");
    }
}
