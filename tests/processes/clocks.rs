//! Wall clocks that are set while nodes run: lifetimes go on, what is shown follows.
//!
//! Each node gets a wall clock of its own by a small library that `cc` makes of `clock.c`.

use std::ops::Deref;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use quorate::ReadLevel;
use quorate::kv::client::{Item, Scope, WriteOptions};
use quorate_cluster::Cluster;

use crate::support::{DEADLINE, QUORATE, TestCluster, client, eventually, outcome, output, spec};

const HOUR_MS: i64 = 3_600_000;
/// How far what is shown may be from the leader's wall clock: the tolerance of log time, and what a call takes.
const TOLERANCE_MS: u64 = 4_000;

/// The clocks of the nodes, by their ids.
struct Clocks(PathBuf);

impl Clocks {
    /// Sets the clock of a node to be ahead of the machine's.
    fn set(&self, node_id: u64, ahead_ms: i64) {
        use std::os::unix::fs::FileExt as _;
        let file = std::fs::OpenOptions::new().write(true).open(self.path(node_id)).unwrap();
        file.write_all_at(&(ahead_ms * 1_000_000).to_ne_bytes(), 0).unwrap();
    }

    fn path(&self, node_id: u64) -> PathBuf {
        self.0.join(format!("clock-{node_id}"))
    }
}

/// Makes the library in `dir`, and a script that starts `quorate` with it.
fn with_clocks(dir: &Path, nodes: u64) -> (PathBuf, Clocks) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/processes/clock.c");
    let (library, script) = (dir.join("clock.so"), dir.join("quorate-with-a-clock"));
    let made = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).status();
    assert!(made.is_ok_and(|status| status.success()), "this test needs a C compiler, `cc`");
    let clocks = Clocks(dir.to_owned());
    for node_id in 1..=nodes {
        std::fs::write(clocks.path(node_id), 0_i64.to_ne_bytes()).unwrap();
    }
    let text = format!(
        "#!/bin/sh\nfor argument in \"$@\"; do\n  [ \"$before\" = --node-id ] && id=$argument\n  before=$argument\ndone\n\
         export LD_PRELOAD='{}' QUORATE_TEST_CLOCK='{}'/clock-$id\nexec '{QUORATE}' \"$@\"\n",
        library.display(),
        dir.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    (script, clocks)
}

fn start(nodes: u64, first: impl FnOnce(&Clocks)) -> (Nodes, Clocks) {
    let (mut spec, dir) = spec();
    let (script, clocks) = with_clocks(dir.path(), nodes);
    first(&clocks);
    (spec.binary, spec.nodes) = (script, nodes);
    let cluster = Cluster::start(spec).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    (Nodes(TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() }), clocks)
}

#[allow(clippy::disallowed_methods)] // of this process, not of a node
fn unix_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// Nodes whose wall clocks a test sets.
struct Nodes(TestCluster);

impl Deref for Nodes {
    type Target = TestCluster;

    fn deref(&self) -> &TestCluster {
        &self.0
    }
}

impl Nodes {
    async fn put_for(&self, key: &str, ttl: Duration) -> Instant {
        let began = Instant::now();
        let options = WriteOptions::default().with_ttl(ttl);
        self.client.put_with(&Scope::default(), key.to_owned(), "v", options).await.unwrap();
        began
    }

    async fn item(&self, key: &str) -> Option<Item> {
        self.client.get(&Scope::default(), key.to_owned(), ReadLevel::Linearizable).await.unwrap().item
    }

    /// How far ahead of the true time `key`, which has so long left, is shown to end.
    async fn shown_ahead_ms(&self, key: &str, ends_ms: u64) -> i64 {
        let shown_ms = self.item(key).await.unwrap().expires_ms;
        i64::try_from(shown_ms).unwrap() - i64::try_from(ends_ms).unwrap()
    }

    fn jumps(&self, node_id: u64) -> Vec<String> {
        let log = output(self.node(node_id));
        log.lines().filter(|line| line.contains("wall clock jumped")).map(str::to_owned).collect()
    }

    async fn jumped(&self, node_id: u64, times: usize) {
        eventually("the jump is logged", async || self.jumps(node_id).len() >= times).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wall_clocks_that_jump_end_nothing_and_are_logged() {
    let (nodes, clocks) = start(3, |_| ());
    let (short, long) = (Duration::from_secs(8), Duration::from_secs(600));
    let leader = nodes.leader(0).await.node_id;
    let ends_ms = unix_ms() + 600_000;
    nodes.put_for("long", long).await;
    let began = nodes.put_for("short", short).await;

    clocks.set(leader, HOUR_MS);
    nodes.jumped(leader, 1).await;
    nodes.put_for("meanwhile", long).await;
    let ahead_ms = nodes.shown_ahead_ms("long", ends_ms).await;
    assert!(ahead_ms.abs_diff(HOUR_MS) < TOLERANCE_MS, "shown as the leader's clock has it: {ahead_ms}");
    clocks.set(leader, 0);
    nodes.jumped(leader, 2).await;
    nodes.put_for("afterwards", long).await;
    let ahead_ms = nodes.shown_ahead_ms("long", ends_ms).await;
    assert!(ahead_ms.unsigned_abs() < TOLERANCE_MS, "{ahead_ms} ms ahead although the clock is right again");

    let follower = nodes.follower().await;
    clocks.set(follower, 45_000);
    nodes.jumped(follower, 1).await;
    nodes.put_for("with a follower ahead", long).await;
    clocks.set(follower, 0);
    nodes.jumped(follower, 2).await;
    let transfer = nodes.quorate(&["transfer-leader", &follower.to_string()]);
    assert!(transfer.status.success(), "{transfer:?}");
    nodes.put_for("that follower leads", long).await;
    let ahead_ms = nodes.shown_ahead_ms("long", ends_ms).await;
    assert!(ahead_ms.unsigned_abs() < TOLERANCE_MS, "{ahead_ms} ms ahead: a follower's clock once was");

    // It ends, and not early.
    eventually("the key has ended", async || nodes.item("short").await.is_none()).await;
    let lived = began.elapsed();
    assert!(lived >= short, "{lived:?} of {short:?}");
    for key in ["long", "meanwhile", "afterwards", "with a follower ahead", "that follower leads"] {
        assert!(nodes.item(key).await.is_some(), "{key} is gone");
    }

    for (node_id, jumps) in [(leader, ["forward", "back"]), (follower, ["forward", "back"])] {
        let logged = nodes.jumps(node_id);
        assert_eq!(logged.len(), 2, "each is logged once: {logged:#?}");
        for (line, direction) in logged.iter().zip(jumps) {
            assert!(line.contains(&format!("jumped {direction}")), "{line}");
        }
    }
    let bystander = nodes.cluster.spec().node_ids().find(|id| ![leader, follower].contains(id)).unwrap();
    assert_eq!(nodes.jumps(bystander), Vec::<String>::new());
}

#[test]
fn a_node_whose_clock_is_in_1960_says_so_and_does_not_start() {
    let since_epoch_ms = i64::try_from(unix_ms()).unwrap();
    let ten_years_ms = 10 * 365 * 24 * HOUR_MS;
    let dir = tempfile::tempdir().unwrap();
    let (script, clocks) = with_clocks(dir.path(), 1);
    clocks.set(1, -since_epoch_ms - ten_years_ms);
    let data_dir = dir.path().join("data");
    let mut command = Command::new(script);
    command.args(["serve", "--node-id", "1", "--single", "--client-listen", "127.0.0.1:0"]);
    command.args(["--peer-listen", "127.0.0.1:0", "--data-dir"]).arg(data_dir);
    let refused = outcome(command);
    refused.assert_refused(3, &["before 1970", "start the node again"]);
    assert!(!refused.stderr.contains("panicked"), "{}", refused.stderr);
}
