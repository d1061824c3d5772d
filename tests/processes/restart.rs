//! Stops and starts that somebody asked for.

use std::time::Instant;

use crate::support::{DEADLINE, output, said, start};
use quorate_testkit::processes::set::Outcome;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_continues_from_its_directory_and_forms_only_once() {
    let nodes = start(&[]);
    let mut writers = nodes.writers(4);
    assert!(writers.reached(100, DEADLINE).await);
    let attempts = writers.finish().await;
    let before = nodes.check(&attempts).await;

    let leader = nodes.leader(0).await;
    nodes.cluster.stop(&[leader.node_id], DEADLINE).unwrap();
    for node in nodes.cluster.nodes() {
        let exit = node.exit().unwrap();
        assert_eq!(exit.status.code(), Some(0), "node {}: {}", node.node_id(), node.log_tail(20));
    }
    nodes.cluster.start_all().unwrap();
    nodes.cluster.wait_ready(DEADLINE).unwrap();

    let after = nodes.check(&attempts).await;
    assert_eq!(after[0].items, before[0].items);
    assert_eq!(after[0].state_hash, before[0].state_hash, "an election changes positions, not the state");
    // A log that had begun anew would be shorter and of an earlier term.
    assert!(after[0].applied > before[0].applied);
    assert!(nodes.leader(leader.term).await.term > leader.term);
    for node in nodes.cluster.nodes() {
        let formed = output(node).matches("the cluster has formed").count();
        assert!(formed <= 1, "node {} formed the cluster {formed} times", node.node_id());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orderly_stop_hands_leadership_over() {
    let nodes = start(&[]);
    let mut writers = nodes.writers(4);
    assert!(writers.reached(50, DEADLINE).await);
    let leader = nodes.leader(0).await;
    let began = Instant::now();
    let exit = nodes.node(leader.node_id).stop(DEADLINE).unwrap();
    assert_eq!(exit.status.code(), Some(0), "{}", nodes.node(leader.node_id).log_tail(20));

    let next = nodes.leader(leader.term).await;
    assert_ne!(next.node_id, leader.node_id);
    // Without a hand-over there would be an election timeout, and more than one term in an unlucky one.
    assert_eq!(next.term, leader.term + 1, "handed over within {:?}", began.elapsed());
    let log = output(nodes.node(leader.node_id));
    assert!(said(nodes.node(leader.node_id), "handing over the lead"), "{log}");
    assert!(!log.contains("nobody took the lead in time"), "{log}");

    let served = writers.acknowledged() + 50;
    assert!(writers.reached(served, DEADLINE).await);
    nodes.node(leader.node_id).start().unwrap();
    nodes.node(leader.node_id).wait_ready(DEADLINE).unwrap();
    nodes.check(&writers.finish().await).await;
}

/// One node after the other, as an upgrade does it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_interrupts_nobody_for_long() {
    let nodes = start(&[]);
    let mut writers = nodes.writers(4);
    for node in nodes.cluster.nodes() {
        let served = writers.acknowledged() + 30;
        assert!(writers.reached(served, DEADLINE).await);
        node.restart(DEADLINE).unwrap();
        node.wait_ready(DEADLINE).unwrap();
    }
    let served = writers.acknowledged() + 30;
    assert!(writers.reached(served, DEADLINE).await);
    let attempts = writers.finish().await;
    nodes.check(&attempts).await;
    // With the client's default retries.
    let failed: Vec<_> =
        attempts.iter().filter(|attempt| !matches!(attempt.outcome, Outcome::Acknowledged { .. })).collect();
    assert!(failed.is_empty(), "calls failed: {failed:?}");
}
