//! A cluster that was wiped and made anew on the same addresses, or restored there from a backup: whoever comes back with a position or a
//! session of the one before is told so.

use std::collections::BTreeMap;
use std::process::Command;

use futures::StreamExt;
use quorate::Reason;
use quorate::client::{FollowedChange, SnapshotPart, SubscribeOptions, Subscription};
use quorate::kv::client::{Client, ClientConfig, ClientError, Range, Scope};
use quorate::kv::machine::KvMachine;
use quorate::testkit::runtime;
use quorate::{Bookmark, Engine, EngineConfig, ReadLevel, ReadOptions};

use crate::replicas::{ReplicaProcess, position};
use crate::support::{DEADLINE, QUORATE, TestCluster, eventually, free_address, get_at, start};
use crate::transfer::Running;

async fn reason_of_read(client: &Client, after: Bookmark, level: ReadLevel) -> Option<Reason> {
    let read = ReadOptions::from(level).after(after);
    client.get(&Scope::default(), "k", read).await.err().map(|error| error.reason())
}

/// Has another cluster in the place of this one.
fn make_anew(nodes: &TestCluster) {
    nodes.cluster.kill_all().unwrap();
    for node in nodes.cluster.nodes() {
        std::fs::remove_dir_all(node.data_dir()).unwrap();
    }
    nodes.cluster.start_all().unwrap();
    nodes.cluster.wait_ready(DEADLINE).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn positions_of_the_cluster_before_are_refused() {
    let nodes = start(&[]);
    let (client, scope) = (&nodes.client, Scope::default());
    for _ in 0..20 {
        nodes.put("k", "old").await;
    }
    let old = client.put(&scope, "k", "last").await.unwrap().header.bookmark();
    let mut watch = client.watch(&scope, Range::prefix(""), Some(1.into())).await.unwrap();
    for _ in 0..21 {
        watch.next().await.unwrap().unwrap();
    }
    assert_eq!(watch.resume_from().history, old.history);

    make_anew(&nodes);

    // The client's session is of the old cluster: a write in it is refused, and the next one goes on in this one.
    let refused = client.put(&scope, "k", "new").await.unwrap_err();
    assert_eq!((refused.reason(), refused.maybe_applied()), (Reason::OtherHistory, false), "{refused}");
    let new = client.put(&scope, "k", "new").await.unwrap().header.bookmark();
    assert_ne!(new.history, old.history);

    let ended = tokio::time::timeout(DEADLINE, watch.next()).await.expect("the watch is silent");
    let ended: ClientError = ended.expect("the watch just ends").unwrap_err();
    assert_eq!(ended.reason(), Reason::OtherHistory, "{ended}");

    let far = 100_000_000;
    for level in [ReadLevel::Local, ReadLevel::Linearizable, ReadLevel::Bounded { max_lag_ms: 1000 }] {
        assert_eq!(reason_of_read(client, old, level).await, Some(Reason::OtherHistory), "{level:?}");
        assert_eq!(reason_of_read(client, new, level).await, None, "{level:?}");
        assert_eq!(reason_of_read(client, far.into(), level).await, Some(Reason::Ahead), "{level:?}");
    }
    let mut watch = client.watch(&scope, Range::prefix(""), Some(far.into())).await.unwrap();
    let ended = tokio::time::timeout(DEADLINE, watch.next()).await.expect("the watch is silent");
    assert_eq!(ended.unwrap().unwrap_err().reason(), Reason::Ahead);

    let (old, other) = (old.to_string(), format!("history {}", old.history));
    let said = ["watch", "k", "--from", &old];
    nodes.quorate(&said).assert_refused(1, &[&other]);
    nodes.quorate(&["get", "k", "--after", &old]).assert_refused(1, &[&other]);
    nodes.quorate(&["put", "k", "v", "--if-revision", &old]).assert_refused(1, &[&other]);
    nodes.quorate(&["watch", "k", "--from", "100000000"]).assert_refused(1, &["ahead of the cluster"]);
    nodes.quorate(&["get", "k", "--after", "100000000"]).assert_refused(1, &["ahead of the cluster"]);
    nodes.quorate(&["watch", "k", "--from", "5@zz"]).assert_refused(3, &["42@"]);
}

/// Why a subscription ends.
async fn reason(subscription: &mut Subscription) -> Reason {
    let ended = tokio::time::timeout(DEADLINE, subscription.next()).await.expect("it is silent");
    ended.expect("it just ends").unwrap_err().reason()
}

/// L2, L10: their positions are no places of this cluster, be it behind or beyond them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_of_the_cluster_before_are_told_so() {
    let nodes = start(&[]);
    let (scope, dir) = (Scope::default(), tempfile::tempdir().unwrap());
    let (serves, log) = (free_address(), dir.path().join("replica.log"));
    let begin = || ReplicaProcess::start(&nodes, &dir.path().join("state"), &serves, &log);
    let mut replica = begin();
    for _ in 0..20 {
        nodes.put("k", "old").await;
    }
    let mut subscription = nodes.client.subscribe(SubscribeOptions::from_beginning()).await.unwrap();
    let mut last = 0;
    for _ in 0..20 {
        last = subscription.next().await.unwrap().unwrap().seq;
    }
    let old = subscription.position();
    eventually("the replica has it", async || position(&serves).is_some_and(|(applied, _)| applied >= last))
        .await;
    make_anew(&nodes);
    // The client's session is of the old cluster.
    let _ = nodes.client.put(&scope, "k", "new").await;
    let mut next = 0;
    // Further than they are, so that nothing but the history tells them.
    while next <= last {
        next = nodes.client.put(&scope, "k", "new").await.unwrap().revision;
    }
    assert_eq!(reason(&mut subscription).await, Reason::OtherHistory);
    for (after, expected) in [(old, Reason::OtherHistory), (100_000_000.into(), Reason::Ahead)] {
        let mut subscription = nodes.client.subscribe(SubscribeOptions::after(after)).await.unwrap();
        assert_eq!(reason(&mut subscription).await, expected, "{after:?}");
    }
    let refused = "not what it has followed before";
    let times = || std::fs::read_to_string(&log).unwrap().matches(refused).count();
    eventually("the replica ends", async || replica.ended().is_some()).await;
    assert!(!replica.ended().unwrap().success() && times() > 0);
    // Nor does it take a restart for a reason to begin anew.
    let before = times();
    let mut replica = begin();
    eventually("the replica ends again", async || replica.ended().is_some()).await;
    assert!(!replica.ended().unwrap().success() && times() > before);
}

/// L11: the source has another past at the same positions, as a copy of its directory has that went another way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_told_what_does_not_fit_stops_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (listens, peers, serves) = (free_address(), free_address(), free_address());
    let log = dir.path().join("replica.log");
    let serve = async |data: &str| {
        let mut command = Command::new(QUORATE);
        command.args(["serve", "--single", "--data-dir"]).arg(dir.path().join(data));
        let node = Running::start(command.args(["--client-listen", &listens, "--peer-listen", &peers]));
        let is_ready = async || get_at(&listens, "/readyz").is_some_and(|(code, _)| code == 200);
        eventually("the node serves", is_ready).await;
        node
    };
    let write = async |key: &str, times: u64| {
        let client = Client::new([&listens], ClientConfig::default()).unwrap();
        let mut last = 0;
        for n in 0..times {
            last = client.put(&Scope::default(), key.to_owned(), n.to_string()).await.unwrap().revision;
        }
        last
    };
    let node = serve("one").await;
    write("k", 5).await;
    drop(node);
    let copied =
        Command::new("cp").arg("-r").args([dir.path().join("one"), dir.path().join("other")]).status();
    assert!(copied.unwrap().success());

    let node = serve("one").await;
    let mut replica = ReplicaProcess::following(&listens, &dir.path().join("state"), &serves, &log);
    let last = write("k", 10).await;
    let has_it = async || position(&serves).is_some_and(|(applied, _)| applied >= last);
    eventually("the replica has it", has_it).await;
    let (applied, hash) = position(&serves).unwrap();
    replica.kill();
    drop(node);
    let _other = serve("other").await;
    write("something else", 20).await;
    let upto = write("k", 20).await;
    for _ in 0..2 {
        let before = std::fs::metadata(&log).unwrap().len() as usize;
        let mut replica = ReplicaProcess::following(&listens, &dir.path().join("state"), &serves, &log);
        let is_as_it_was = async || {
            if let Some(seen) = position(&serves) {
                assert_eq!(seen, (applied, hash.clone()), "nothing of another past is shown");
            }
            replica.ended().is_some()
        };
        eventually("the replica ends", is_as_it_was).await;
        assert!(!replica.ended().unwrap().success());
        let said = std::fs::read_to_string(&log).unwrap();
        assert!(said[before..].contains("delete its data directory"), "{}", &said[before..]);
    }
    // As it was advised.
    std::fs::remove_dir_all(dir.path().join("state")).unwrap();
    let _replica = ReplicaProcess::following(&listens, &dir.path().join("state"), &serves, &log);
    let is_same = async || position(&serves).is_some_and(|at| at.0 >= upto && position(&listens) == Some(at));
    eventually("a new one has the state of its source", is_same).await;
}

/// A key and its value for each item of the state that a follower is sent, and for what comes after it, up to `last`.
async fn state_and_after(client: &Client, last: u64) -> BTreeMap<String, String> {
    let mut options = SubscribeOptions::from_beginning();
    options.accept_snapshot = true;
    let mut subscription = client.subscribe(options).await.unwrap();
    let (mut keys, mut has_state, mut seq) = (BTreeMap::new(), false, 0);
    while seq < last || !has_state {
        let entry = tokio::time::timeout(DEADLINE, subscription.next()).await.expect("it is silent");
        let entry = entry.unwrap().unwrap();
        match (entry.snapshot, entry.change) {
            (SnapshotPart::End, _) => (has_state, seq) = (true, entry.seq),
            (part, FollowedChange::Event { key, value, .. }) => {
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                keys.insert(text(&key), text(&value));
                seq = if part == SnapshotPart::Item { seq } else { entry.seq };
            }
            _ => {}
        }
    }
    keys
}

/// L2, L10: a cluster that begins with the state of a backup has positions of its own, be they below those of before or beyond them. Nobody goes
/// on at them: they are told so, and may have the state that was restored, and what came after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_of_a_cluster_that_was_restored_from_a_backup_are_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let (listens, peers, serves) = (free_address(), free_address(), free_address());
    let log = dir.path().join("replica.log");
    let mut command = Command::new(QUORATE);
    command.args(["serve", "--single", "--data-dir"]).arg(dir.path().join("one"));
    let node = Running::start(command.args(["--client-listen", &listens, "--peer-listen", &peers]));
    let is_ready = async || get_at(&listens, "/readyz").is_some_and(|(code, _)| code == 200);
    eventually("the node serves", is_ready).await;
    let (client, scope) = (Client::new([&listens], ClientConfig::default()).unwrap(), Scope::default());
    for n in 0..20 {
        client.put(&scope, format!("k{n}"), "before the backup").await.unwrap();
    }
    let backed_up = client.put(&scope, "k0", "before the backup").await.unwrap().header.bookmark();
    client.take_snapshot(None).await.unwrap();
    let (snapshots, backup) = (dir.path().join("one/snapshots"), dir.path().join("backup"));
    assert!(Command::new("cp").arg("-r").args([&snapshots, &backup]).status().unwrap().success());

    // What comes after it is not in the backup, and followers have it.
    let begin = || ReplicaProcess::following(&listens, &dir.path().join("state"), &serves, &log);
    let mut replica = begin();
    let mut subscription = client.subscribe(SubscribeOptions::from_beginning()).await.unwrap();
    let mut last = 0;
    for n in 0..20 {
        last = client.put(&scope, format!("k{n}"), "lost").await.unwrap().revision;
    }
    client.put(&scope, "lost", "lost").await.unwrap();
    while subscription.next().await.unwrap().unwrap().seq <= last {}
    let old = subscription.position();
    eventually("the replica has it", async || position(&serves).is_some_and(|(applied, _)| applied > last))
        .await;
    drop(node);

    let machine = Engine::<KvMachine>::read_backup(&backup).unwrap();
    let mut config = EngineConfig::new(1, dir.path().join("two"), &peers);
    config.client_advertise.clone_from(&listens);
    let engine = Engine::restore(config, machine).await.unwrap();
    assert!(engine.ready(DEADLINE).await);
    let server = quorate::kv::bind(&listens).await.unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = runtime::spawn(server.serve(engine.clone(), async { drop(stopped.await) }));

    let new = Client::new([&listens], ClientConfig::default()).unwrap();
    let mut next = 0;
    // Further than they are, so that nothing but the history tells them.
    while next <= old.index {
        next = new.put(&scope, "k0", "after the restore").await.unwrap().revision;
    }
    assert_eq!(reason(&mut subscription).await, Reason::OtherHistory);
    let told = [
        (old, Reason::OtherHistory),
        (backed_up, Reason::OtherHistory),
        (Bookmark { index: 100_000_000, ..old }, Reason::OtherHistory),
        (100_000_000.into(), Reason::Ahead),
    ];
    for (after, expected) in told {
        for accept_snapshot in [false, true] {
            let mut options = SubscribeOptions::after(after);
            options.accept_snapshot = accept_snapshot;
            let mut subscription = new.subscribe(options).await.unwrap();
            assert_eq!(reason(&mut subscription).await, expected, "{after:?} {accept_snapshot}");
        }
    }
    let mut watch = new.watch(&scope, Range::all(), Some(old)).await.unwrap();
    let ended = tokio::time::timeout(DEADLINE, watch.next()).await.expect("the watch is silent");
    assert_eq!(ended.unwrap().unwrap_err().reason(), Reason::OtherHistory);
    // What was restored was never told here: without the state there is no beginning.
    let mut beginning = new.subscribe(SubscribeOptions::from_beginning()).await.unwrap();
    assert_eq!(reason(&mut beginning).await, Reason::Compacted);
    let mut expected: BTreeMap<_, _> =
        (0..20).map(|n| (format!("k{n}"), "before the backup".to_owned())).collect();
    expected.insert("k0".to_owned(), "after the restore".to_owned());
    assert_eq!(state_and_after(&new, next).await, expected);

    let refused = || std::fs::read_to_string(&log).unwrap().contains("not what it has followed before");
    eventually("the replica ends", async || replica.ended().is_some()).await;
    assert!(!replica.ended().unwrap().success() && refused());
    // As it was advised.
    std::fs::remove_dir_all(dir.path().join("state")).unwrap();
    let _replica = begin();
    let is_same = async || position(&serves).is_some_and(|at| at.0 >= next && position(&listens) == Some(at));
    eventually("a new one has the state that was restored, and what came after it", is_same).await;
    stop.send(()).unwrap();
    serving.await.unwrap().unwrap();
    engine.shutdown().await;
}
