//! A node that was away for longer than the log reaches back.

use crate::support::{DEADLINE, eventually, start};

/// A snapshot every so many entries, and almost no log behind it.
const EVERY: u64 = 200;
const SMALL_SNAPSHOTS: [&str; 4] = ["--snapshot-every-entries", "200", "--snapshot-keep-entries", "10"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_was_away_past_the_purge_comes_back_by_snapshot() {
    let nodes = start(&SMALL_SNAPSHOTS);
    let mut writers = nodes.writers(8);
    assert!(writers.reached(20, DEADLINE).await);
    let away = nodes.follower().await;
    let last_log = nodes.status(away).await.unwrap().offsets.last_log.unwrap();
    nodes.node(away).kill().unwrap();

    // What it lacks is gone from the logs of both others.
    let others: Vec<_> = nodes.cluster.spec().node_ids().filter(|node_id| *node_id != away).collect();
    eventually("the others have purged what the absent node lacks", async || {
        let mut purged = true;
        for node_id in &others {
            let status = nodes.status(*node_id).await;
            // Beyond the entries that were under way when it was killed.
            purged &= status.and_then(|s| s.offsets.purged).is_some_and(|p| p.index > last_log + EVERY);
        }
        purged
    })
    .await;
    nodes.node(away).start().unwrap();
    nodes.node(away).wait_ready(DEADLINE).unwrap();
    let served = writers.acknowledged() + 100;
    assert!(writers.reached(served, DEADLINE).await);

    nodes.check(&writers.finish().await).await;
    let status = nodes.status(away).await.unwrap();
    let snapshot = status.offsets.snapshot.expect("it has received a snapshot").index;
    assert!(snapshot > last_log, "its snapshot ends at {snapshot}, its log ended at {last_log}");
}
