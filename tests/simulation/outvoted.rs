//! A node whose state is known to differ, where its log and its vote are needed all the same.

use std::collections::BTreeSet;
use std::time::Duration;

use quorate::{NodeId, ReadLevel, SnapshotPolicy};
use quorate_testkit::Sum;
use quorate_testkit::simulation::{Calm, in_world};

const NODES: [NodeId; 3] = [1, 2, 3];
/// The node that counts one too many, until it is sent a snapshot.
const ODD: NodeId = 3;

struct Cluster {
    calm: Calm<Sum>,
    written: u64,
}

impl Cluster {
    async fn start(seed: u64, snapshots: SnapshotPolicy) -> Self {
        let machine = |node_id| Sum { once: u64::from(node_id == ODD), hashed: true, ..Sum::default() };
        let calm = Calm::start_as(seed, machine, |config| config.snapshots = snapshots.clone()).await;
        Self { calm, written: 0 }
    }

    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        self.calm.until(what, |_| condition(self)).await;
    }

    fn leader(&self) -> Option<NodeId> {
        self.calm.leading().map(|node| node.state().node_id)
    }

    async fn write(&mut self, count: u64) {
        for _ in 0..count {
            self.calm.write(|| 1).await;
        }
        self.written += count;
    }

    /// Cuts these nodes off from all others.
    fn cut_off(&self, ids: &[NodeId]) {
        let pairs = NODES.iter().flat_map(|from| NODES.iter().map(move |to| (*from, *to)));
        let cuts: BTreeSet<_> =
            pairs.filter(|(from, to)| from != to && (ids.contains(from) || ids.contains(to))).collect();
        self.calm.hosts.network.set_cuts(cuts);
    }

    fn differs(&self, id: NodeId) -> bool {
        self.calm.engine(id).state().diverged.is_some()
    }

    /// A cluster in which all know that the odd one differs. Returns who leads, and who else is right.
    async fn with_an_odd_one(seed: u64, snapshots: SnapshotPolicy) -> (Self, NodeId, NodeId) {
        let mut cluster = Self::start(seed, snapshots).await;
        cluster.until("somebody leads", |cluster| cluster.leader().is_some()).await;
        cluster.write(3).await;
        cluster
            .until("the odd one is found, and does not lead", |cluster| {
                cluster.differs(ODD) && cluster.leader().is_some_and(|leader| leader != ODD)
            })
            .await;
        // Its word counts for nothing from now on.
        tokio::time::sleep(Duration::from_secs(5)).await;
        let leader = cluster.leader().unwrap();
        let other = NODES.into_iter().find(|id| ![leader, ODD].contains(id)).unwrap();
        assert!(!cluster.differs(leader) && !cluster.differs(other));
        (cluster, leader, other)
    }
}

fn run<F: Future<Output = ()>>(test: impl Fn(u64) -> F) {
    for seed in 0..3 {
        in_world(seed, test(seed));
    }
}

#[test]
fn with_the_longest_log_that_is_left_it_leads_until_others_have_it() {
    run(async |seed| {
        let (mut cluster, leader, other) = Cluster::with_an_odd_one(seed, SnapshotPolicy::default()).await;
        cluster.cut_off(&[other]);
        // Only these two hold them; the leader's state is beyond doubt all the same.
        cluster.write(10).await;
        cluster.cut_off(&[leader]);
        cluster.until("the right one leads", |cluster| cluster.leader() == Some(other)).await;
        cluster.write(1).await;
        let read = cluster.calm.engine(other).read((), ReadLevel::Linearizable).await.unwrap();
        assert_eq!(read.answer, cluster.written, "nothing is lost");
        cluster.cut_off(&[]);
        cluster.until("one leads", |cluster| !cluster.differs(leader)).await;
        assert!(cluster.differs(ODD) && !cluster.calm.engine(ODD).state().is_ready());
    });
}

#[test]
fn a_snapshot_makes_it_a_node_like_any_other() {
    run(async |seed| {
        let snapshots = SnapshotPolicy { every_entries: 40, keep_entries: 10, ..SnapshotPolicy::default() };
        let (mut cluster, leader, other) = Cluster::with_an_odd_one(seed, snapshots).await;
        cluster.cut_off(&[ODD]);
        cluster.write(200).await;
        cluster.cut_off(&[]);
        cluster.until("it is right again", |cluster| cluster.calm.engine(ODD).state().is_ready()).await;
        cluster.write(10).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(NODES.iter().all(|id| !cluster.differs(*id)));
        // It has the longest log of those that are left, and is elected like any other.
        let leader = cluster.leader().unwrap_or(leader);
        if leader != ODD {
            let other = NODES.into_iter().find(|id| ![leader, ODD].contains(id)).unwrap_or(other);
            cluster.cut_off(&[other]);
            cluster.write(10).await;
            cluster.cut_off(&[leader]);
            cluster.until("it leads", |cluster| cluster.leader() == Some(ODD)).await;
        }
        cluster.write(1).await;
        let read = cluster.calm.engine(ODD).read((), ReadLevel::Linearizable).await.unwrap();
        assert_eq!(read.answer, cluster.written);
    });
}
