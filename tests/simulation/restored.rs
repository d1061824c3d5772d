//! The state that a cluster begins with: the same on all founders, and received by whoever joins.

use std::time::Duration;

use quorate::{Engine, FatalError, NewMember, NodeId, OpenError, ReadLevel};
use quorate_testkit::Sum;
use quorate_testkit::simulation::{Calm, address, in_world};

const PATIENCE: Duration = Duration::from_secs(60);
const NODES: [NodeId; 3] = [1, 2, 3];
/// What was restored.
const RESTORED: u64 = 12_040;

/// How a node is started.
#[derive(Debug, Clone, Copy)]
struct Start {
    state: u64,
    restore: bool,
}

const RESTORE: Start = Start { state: RESTORED, restore: true };
const DEFAULT: Start = Start { state: 0, restore: false };

struct Cluster(Calm<Sum>);

impl Cluster {
    async fn start(&mut self, node_id: NodeId, start: Start) -> Result<(), OpenError> {
        self.0
            .start_node(node_id, Sum { sum: start.state, ..Sum::default() }, |config| {
                config.restore = start.restore
            })
            .await
    }

    async fn add_one(&self) -> u64 {
        self.0.write(|| 1).await
    }

    async fn add_member(&self, node_id: NodeId, promote: bool) {
        let member = NewMember { node_id, peer: address(node_id) };
        let leader = self.0.leader().await;
        leader.add_member(member, promote, PATIENCE).await.unwrap();
    }
}

fn simulated<T>(seed: u64, test: impl AsyncFnOnce(Cluster) -> T) -> T {
    in_world(seed, async { test(Cluster(Calm::new(seed))).await })
}

#[test]
fn a_machine_that_joins_receives_what_was_restored() {
    for seed in 0..4 {
        simulated(seed, async |mut cluster| {
            for node_id in NODES {
                cluster.start(node_id, RESTORE).await.unwrap();
            }
            cluster.0.leader().await;
            cluster.start(4, DEFAULT).await.unwrap();
            // At once, or after some writes.
            let mut sum = RESTORED;
            if seed % 2 == 0 {
                sum = cluster.add_one().await;
            }
            cluster.add_member(4, true).await;
            assert_eq!(cluster.add_one().await, sum + 1);
            for engine in cluster.0.engines() {
                let node_id = engine.state().node_id;
                let read = engine.read((), ReadLevel::Linearizable).await.unwrap();
                assert_eq!(read.answer, sum + 1, "node {node_id}");
                assert!(engine.state().snapshot.is_some(), "node {node_id} has it in a snapshot");
            }
            // From then on it takes no special call.
            for node_id in NODES {
                cluster.0.kill(node_id).await;
                cluster.start(node_id, DEFAULT).await.unwrap();
            }
            assert_eq!(cluster.add_one().await, sum + 2);
        });
    }
}

#[test]
fn founders_that_begin_with_other_states_form_nothing() {
    for odd in [DEFAULT, Start { state: 5, restore: true }, Start { state: RESTORED, restore: false }] {
        for place in NODES {
            simulated(place, async |mut cluster| {
                for node_id in NODES {
                    let start = if node_id == place { odd } else { RESTORE };
                    cluster.start(node_id, start).await.unwrap();
                }
                tokio::time::sleep(Duration::from_secs(10)).await;
                let words = |forming: String| forming.contains("begins with another state");
                let told = |engine: &Engine<Sum>| engine.state().forming.map(|forming| forming.to_string());
                let said = cluster.0.engines().filter_map(told).filter(|text| words(text.clone()));
                assert!(said.count() >= 2, "{odd:?} at {place}");
                assert!(cluster.0.engines().all(|engine| engine.state().last_log.is_none()));
                cluster.0.kill(place).await;
                cluster.start(place, RESTORE).await.unwrap();
                assert_eq!(cluster.add_one().await, RESTORED + 1);
            });
        }
    }
}

#[test]
fn who_joins_a_cluster_that_restored_nothing_with_another_state_is_told_and_holds_nothing() {
    simulated(3, async |mut cluster| {
        for node_id in NODES {
            cluster.start(node_id, Start { state: RESTORED, restore: false }).await.unwrap();
        }
        cluster.0.leader().await;
        cluster.start(4, DEFAULT).await.unwrap();
        cluster.add_member(4, false).await;
        cluster
            .0
            .until("it stops", |cluster| {
                let fatal = cluster.engine(4).state().fatal;
                matches!(fatal, Some(FatalError::Outdated { reason }) if reason.contains("another initial state"))
            })
            .await;
        assert_eq!(cluster.0.engine(4).state().last_log, None);
        cluster.0.kill(4).await;
        cluster.start(4, Start { state: RESTORED, restore: false }).await.unwrap();
        let sum = cluster.add_one().await;
        cluster.0.until("it has caught up", |cluster| cluster.engine(4).state().applied.is_some()).await;
        let read = cluster.0.engine(4).read((), ReadLevel::Linearizable).await.unwrap();
        assert_eq!((sum, read.answer), (RESTORED + 1, RESTORED + 1));
    });
}

#[test]
fn before_there_is_a_snapshot_a_node_is_started_with_the_same_state_again() {
    simulated(5, async |mut cluster| {
        for node_id in NODES {
            cluster.start(node_id, Start { state: RESTORED, restore: false }).await.unwrap();
        }
        let sum = cluster.add_one().await;
        cluster.0.kill(2).await;
        // Without a snapshot, its log begins with the founding membership.
        let error = match cluster.start(2, DEFAULT).await {
            Err(error) => error.to_string(),
            Ok(()) => {
                cluster.0.until("it stops", |cluster| cluster.engine(2).state().fatal.is_some()).await;
                cluster.0.engine(2).state().fatal.unwrap().to_string()
            }
        };
        assert!(error.contains("another initial state"), "{error}");
        cluster.0.kill(2).await;
        cluster.start(2, RESTORE).await.unwrap();
        assert_eq!(cluster.add_one().await, sum + 1);
        cluster.0.until("it has caught up", |cluster| cluster.engine(2).state().is_ready()).await;
        let read = cluster.0.engine(2).read((), ReadLevel::Linearizable).await.unwrap();
        assert_eq!(read.answer, sum + 1);
    });
}
