//! Nodes whose machines are not deterministic: found, and out of service.

use std::time::Duration;

use quorate::{Divergence, NodeId, ReadError, ReadLevel, Role};
use quorate_testkit::Sum;
use quorate_testkit::simulation::{Calm, in_world};

/// Adds numbers, whoever leads.
async fn add(nodes: &Calm<Sum>, count: u64) {
    for _ in 0..count {
        nodes.write(|| 1).await;
    }
}

/// Three nodes, each of which adds something more.
fn run<T>(seed: u64, more: [u64; 3], test: impl AsyncFnOnce(Calm<Sum>) -> T) -> T {
    in_world(seed, async {
        test(Calm::start(seed, |node_id| Sum { more: more[node_id as usize - 1], ..Sum::default() }).await)
            .await
    })
}

#[test]
fn the_one_that_differs_serves_no_more_and_the_others_go_on() {
    let mut led = 0;
    for (seed, odd) in [(0, 1), (1, 3), (2, 1), (3, 2)] {
        let mut more = [0; 3];
        more[odd as usize - 1] = 1;
        led += run(seed, more, async |nodes| goes_on_without(&nodes, odd, seed).await);
    }
    assert!(led > 0, "it never led: that it hands over was not tested");
}

/// Whether `odd`, which differs, led at first.
async fn goes_on_without(nodes: &Calm<Sum>, odd: NodeId, seed: u64) -> u64 {
    add(nodes, 1).await;
    let led = nodes.leading().is_some_and(|leader| leader.state().node_id == odd);
    // Also in the middle of a load, at positions that the nodes choose by themselves.
    add(nodes, 200).await;
    // While only two have spoken of a position, both are in doubt.
    let outvoted = |divergence: Divergence| divergence.majority.is_some_and(|hash| hash != divergence.own);
    nodes.until("it is found", |nodes| nodes.engine(odd).state().diverged.is_some_and(outvoted)).await;
    nodes
        .until("another one leads", |nodes| {
            nodes.leading().is_some_and(|leader| leader.state().node_id != odd)
        })
        .await;
    add(nodes, 10).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let mut answers = Vec::new();
    for node in nodes.engines() {
        let node_id = node.state().node_id;
        let (state, read) = (node.state(), node.read((), ReadLevel::Linearizable).await);
        assert_eq!(state.fatal, None, "seed {seed}, node {node_id}");
        if node_id == odd {
            assert!(!state.is_ready() && state.role == Role::Follower, "seed {seed}: {state:?}");
            assert!(matches!(read, Err(ReadError::Diverged { .. })), "seed {seed}: {read:?}");
        } else {
            assert_eq!(state.diverged, None, "seed {seed}, node {node_id}");
            answers.push(read.unwrap().answer);
        }
    }
    assert!(answers[0] == answers[1] && answers[0] >= 211, "seed {seed}: {answers:?}");
    led.into()
}

#[test]
fn where_no_two_are_the_same_all_say_so() {
    run(1, [0, 1, 2], async |nodes| {
        add(&nodes, 1).await;
        nodes.until("it is found", |nodes| nodes.engines().all(|node| node.state().diverged.is_some())).await;
        for node in nodes.engines() {
            let state = node.state();
            assert_eq!(state.diverged.unwrap().majority, None);
            assert!(matches!(node.read((), ReadLevel::Local).await, Err(ReadError::Diverged { .. })));
        }
        assert!(nodes.leading().is_some(), "members can still be replaced");
    });
}

#[test]
fn where_all_are_the_same_none_does() {
    run(2, [1, 1, 1], async |nodes| {
        for _ in 0..4 {
            add(&nodes, 125).await;
            tokio::time::sleep(Duration::from_secs(2)).await;
            assert!(nodes.engines().all(|node| node.state().diverged.is_none()));
        }
        for node in nodes.engines() {
            assert!(node.read((), ReadLevel::Linearizable).await.unwrap().answer >= 1000);
        }
    });
}
