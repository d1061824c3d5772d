//! The client and its commands against a real cluster: what fake servers cannot show.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use futures::StreamExt;
use futures::future::join_all;
use quorate::client::{Compare, EventKind, Range, ReadPreference, Scope, Txn, TxnOp, TxnResult};
use quorate::{AckLevel, ReadLevel};

use crate::support::{DEADLINE, QUORATE, TestCluster};

/// A command that goes on until it is told to stop. Killed when dropped.
struct Running(Child);

impl Running {
    fn start(nodes: &TestCluster, args: &[&str]) -> (Self, mpsc::Receiver<String>) {
        let endpoints = nodes.cluster.endpoints().join(",");
        let mut command = Command::new(QUORATE);
        command.args(["--endpoints", &endpoints]).args(args).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        (Self(child), lines)
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

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_write_is_applied_and_watched_exactly_once_while_leaders_are_killed() {
    const CALLERS: usize = 8;
    let nodes = TestCluster::start(&[]);
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
    let nodes = TestCluster::start(&[]);
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
    let nodes = TestCluster::start(&[]);
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
    assert!(health.contains("leader"), "{health}");

    let line = || lines.recv_timeout(DEADLINE).expect("the watch hangs");
    let seen: Vec<_> = (0..5).map(|_| line()).collect();
    for (line, what) in seen.iter().zip(["put", "put", "delete", "put", "expire"]) {
        assert_eq!(line.split_whitespace().nth(1), Some(what), "{seen:#?}");
    }
    assert_eq!(watching.interrupt(), Some(0));

    nodes.node(1).kill().unwrap();
    nodes.quorate(&["health", "--timeout", "2s"]).assert_refused(1, &["1 of 3 nodes are not healthy"]);
}
