//! Processes die, acknowledged writes do not.

use crate::support::{DEADLINE, eventually, start};

/// Acknowledged writes in each of these tests, at least.
const WRITES: u64 = 1000;
const CALLERS: u32 = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_write_is_lost_when_the_leader_is_killed_twice() {
    let nodes = start(&[]);
    let mut writers = nodes.writers(CALLERS);
    let mut term = 0;
    for kill in 1..=2 {
        assert!(writers.reached(kill * WRITES / 4, DEADLINE).await, "no progress before kill {kill}");
        let leader = nodes.leader(term).await;
        term = leader.term;
        nodes.node(leader.node_id).kill().unwrap();

        // The others go on without it, and with it again.
        let served = writers.acknowledged() + WRITES / 8;
        assert!(writers.reached(served, DEADLINE).await, "no progress after kill {kill}");
        assert!(nodes.leader(term).await.term > term);
        nodes.node(leader.node_id).start().unwrap();
        nodes.node(leader.node_id).wait_ready(DEADLINE).unwrap();
    }
    assert!(writers.reached(WRITES, DEADLINE).await);
    nodes.check(&writers.finish().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_write_is_lost_when_all_nodes_are_killed_at_once() {
    let nodes = start(&[]);
    let mut writers = nodes.writers(CALLERS);
    assert!(writers.reached(WRITES / 2, DEADLINE).await);
    nodes.cluster.kill_all().unwrap();
    nodes.cluster.start_all().unwrap();
    nodes.cluster.wait_ready(DEADLINE).unwrap();
    assert!(writers.reached(WRITES, DEADLINE).await, "no progress after the restart");
    nodes.check(&writers.finish().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_leader_is_replaced_and_follows_when_it_wakes() {
    let nodes = start(&[]);
    let mut writers = nodes.writers(CALLERS);
    assert!(writers.reached(100, DEADLINE).await);
    let leader = nodes.leader(0).await;
    nodes.node(leader.node_id).pause().unwrap();
    let served = writers.acknowledged() + 100;
    assert!(writers.reached(served, DEADLINE).await, "a paused leader holds the cluster up");
    nodes.node(leader.node_id).resume().unwrap();
    eventually("the paused node follows", async || {
        nodes.status(leader.node_id).await.is_some_and(|status| status.term > leader.term)
    })
    .await;
    nodes.check(&writers.finish().await).await;
}
