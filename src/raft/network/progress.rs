//! What a node learns of its peers by talking to them: when they answered, what they accepted, whether they could lead.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::wire;
use crate::proto::peer::{self as proto, AppendResponse};
use crate::types::{Incarnation, NodeId, ReadableVersions};

/// What peers have said of themselves in their answers to appends and heartbeats, and what they were sent.
#[derive(Debug, Default)]
pub(crate) struct PeerFitness {
    peers: Mutex<BTreeMap<NodeId, PeerProgress>>,
    /// What the builds of peers read, and in which data directories they said so.
    reads: Mutex<BTreeMap<NodeId, (Incarnation, Vec<proto::ReadableVersions>)>>,
    /// Told when a peer has said something else than before.
    changed: watch::Sender<()>,
}

/// What is known of one peer, from this node's own messages to it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PeerProgress {
    /// When it last answered this node as its leader.
    pub heard: Option<Instant>,
    /// Whether its disk is well, as it said then.
    pub fit: bool,
    /// Whether its disk hangs, as it said then.
    pub stalled: bool,
    /// Whether its state is not the majority's, as it said then.
    pub differs: bool,
    /// For how long after an answer it elects nobody else.
    lease: Option<Lease>,
    /// Entries it has accepted from this node.
    pub accepted_entries: u64,
    /// Bytes sent, and bytes in all, of the snapshot that is being sent to it.
    pub snapshot: Option<(u64, u64)>,
    /// Index of the last entry in that snapshot: what follows it is what the peer needs next.
    pub snapshot_upto: Option<u64>,
    /// The quota on the state that it could bear, as it said last.
    pub quota_bytes: Option<u64>,
}

/// What a peer said of its lease.
#[derive(Debug, Clone, Copy)]
struct Lease {
    /// In which data directory it said so.
    incarnation: Incarnation,
    length: Duration,
    /// When it last said no more than that.
    said: Instant,
}

/// An answer is not under way for longer than this. So for as long a longer lease does not replace a shorter one: what
/// says it may be from before a restart.
const OUTLIVED: Duration = Duration::from_secs(10);

impl PeerFitness {
    pub(super) fn update(&self, node_id: NodeId, change: impl FnOnce(&mut PeerProgress)) {
        let mut peers = self.peers.lock().expect("invariant: no panic under this lock");
        let unknown = PeerProgress {
            heard: None,
            fit: false,
            stalled: false,
            differs: false,
            lease: None,
            accepted_entries: 0,
            snapshot: None,
            snapshot_upto: None,
            quota_bytes: None,
        };
        change(peers.entry(node_id).or_insert(unknown));
    }

    /// A peer has answered. Must be called before the core learns of it, which may rely on the peer from then on.
    pub(super) fn note(&self, (node_id, incarnation): (NodeId, Incarnation), answer: &AppendResponse) {
        let mut is_news = false;
        self.update(node_id, |peer| {
            let before = (peer.heard.is_some(), peer.fit, peer.stalled, peer.differs, peer.quota_bytes);
            peer.heard = Some(Instant::now());
            peer.fit = !answer.unfit_to_lead;
            peer.stalled = answer.disk_stalled;
            peer.differs = answer.state_differs;
            peer.quota_bytes = answer.quota_bytes;
            is_news = before != (true, peer.fit, peer.stalled, peer.differs, peer.quota_bytes);
        });
        is_news |= self.note_reads((node_id, incarnation), &answer.machines);
        if is_news {
            self.changed.send_replace(());
        }
        self.note_lease((node_id, incarnation), answer.lease_ms);
    }

    /// A peer's build reads this. Whether that is news.
    fn note_reads(
        &self,
        (node_id, incarnation): (NodeId, Incarnation),
        machines: &[proto::ReadableVersions],
    ) -> bool {
        let mut all = self.reads.lock().expect("invariant: no panic under this lock");
        let is_known = all.get(&node_id).is_some_and(|(by, said)| *by == incarnation && said == machines);
        if !is_known {
            all.insert(node_id, (incarnation, machines.to_vec()));
        }
        !is_known
    }

    /// What peers' builds read counts for as long as this node leads: later they may have been given others.
    pub(crate) fn forget_reads(&self) {
        self.reads.lock().expect("invariant: no panic under this lock").clear();
    }

    /// What the builds of peers read, as they said last, and in which data directories.
    pub(crate) fn reads(&self) -> BTreeMap<NodeId, (Incarnation, Vec<ReadableVersions>)> {
        let all = self.reads.lock().expect("invariant: no panic under this lock");
        let read = |said: &Vec<proto::ReadableVersions>| wire::from_readable_versions(said);
        all.iter().map(|(node_id, (by, said))| (*node_id, (*by, read(said)))).collect()
    }

    /// A peer has said what it promises. Must be called before the core learns of the answer.
    pub(super) fn note_lease(&self, (node_id, incarnation): (NodeId, Incarnation), lease_ms: u64) {
        let new = Lease { incarnation, length: Duration::from_millis(lease_ms), said: Instant::now() };
        self.update(node_id, |peer| {
            let stays = peer.lease.is_some_and(|lease| {
                lease.incarnation == incarnation
                    && lease.length < new.length
                    && lease.said.elapsed() < OUTLIVED
            });
            if !stays {
                peer.lease = Some(new);
            }
        });
    }

    /// For how long after an answer none of `voters` elects somebody else, as far as they have answered, if that is less
    /// than `own`.
    pub(crate) fn shortest_lease(&self, own: Duration, voters: &BTreeMap<NodeId, Incarnation>) -> Duration {
        let peers = self.peers.lock().expect("invariant: no panic under this lock");
        let leases = voters.iter().filter_map(|(voter, incarnation)| {
            peers.get(voter)?.lease.filter(|lease| lease.incarnation == *incarnation)
        });
        leases.map(|lease| lease.length).fold(own, Duration::min)
    }

    /// Peers that answered within `time`, and whether their disks are well.
    pub(crate) fn within(&self, time: Duration) -> BTreeMap<NodeId, bool> {
        self.told_within(time, |peer| peer.fit)
    }

    /// Peers that answered within `time`, and whether they could lead: their disks are well, and their states are the others'.
    pub(crate) fn fit_within(&self, time: Duration) -> BTreeMap<NodeId, bool> {
        self.told_within(time, |peer| peer.fit && !peer.differs)
    }

    fn told_within(&self, time: Duration, what: impl Fn(&PeerProgress) -> bool) -> BTreeMap<NodeId, bool> {
        let peers = self.peers.lock().expect("invariant: no panic under this lock");
        let heard = |peer: &PeerProgress| peer.heard.is_some_and(|at| at.elapsed() <= time);
        peers.iter().filter(|(_, peer)| heard(peer)).map(|(id, peer)| (*id, what(peer))).collect()
    }

    /// Peers that answered within `time` and said that their disks hang.
    pub(crate) fn stalled_within(&self, time: Duration) -> BTreeSet<NodeId> {
        let peers = self.peers.lock().expect("invariant: no panic under this lock");
        let stalls = |peer: &PeerProgress| peer.stalled && peer.heard.is_some_and(|at| at.elapsed() <= time);
        peers.iter().filter(|(_, peer)| stalls(peer)).map(|(id, _)| *id).collect()
    }

    /// Tells when a peer has said something else of itself than before, other than that it is still there.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// All that is known, by peer.
    pub(crate) fn progress(&self) -> BTreeMap<NodeId, PeerProgress> {
        self.peers.lock().expect("invariant: no panic under this lock").clone()
    }
}

/// A snapshot on its way to a peer, for as long as this lives.
pub(super) struct SendingSnapshot {
    fitness: Arc<PeerFitness>,
    node_id: NodeId,
    total: u64,
}

impl SendingSnapshot {
    /// Begins to send a snapshot of `total` bytes up to the entry at `upto`.
    pub(super) fn new(fitness: Arc<PeerFitness>, node_id: NodeId, (total, upto): (u64, u64)) -> Self {
        fitness.update(node_id, |peer| peer.snapshot_upto = Some(upto));
        Self { fitness, node_id, total }
    }

    pub(super) fn reached(&self, offset: u64) {
        self.fitness.update(self.node_id, |peer| peer.snapshot = Some((offset, self.total)));
    }
}

impl Drop for SendingSnapshot {
    fn drop(&mut self) {
        self.fitness.update(self.node_id, |peer| (peer.snapshot, peer.snapshot_upto) = (None, None));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(lease_ms: u64) -> AppendResponse {
        AppendResponse { lease_ms, ..AppendResponse::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_as_short_as_the_shortest_of_the_voters() {
        let fitness = PeerFitness::default();
        let own = Duration::from_millis(1500);
        let (first, second) = (Incarnation(1), Incarnation(2));
        let voters = BTreeMap::from([(1, first), (2, first), (3, first)]);
        fitness.update(2, |peer| peer.snapshot = Some((0, 1)));
        assert_eq!(fitness.shortest_lease(own, &voters), own, "who has answered nothing supports no lease");
        fitness.note((2, first), &answer(2000));
        fitness.note((3, first), &answer(300));
        fitness.note((4, first), &answer(100));
        assert_eq!(fitness.shortest_lease(own, &voters), Duration::from_millis(300), "4 has no vote");
        fitness.note((3, first), &answer(0));
        assert_eq!(fitness.shortest_lease(own, &voters), Duration::ZERO, "who does not say promises nothing");
        let replaced = BTreeMap::from([(1, first), (2, first), (3, second)]);
        assert_eq!(fitness.shortest_lease(own, &replaced), own, "the new one has not answered");
        fitness.note((3, second), &answer(600));
        assert_eq!(fitness.shortest_lease(own, &replaced), Duration::from_millis(600));
    }

    /// An answer from before a restart may come after one from after it.
    #[tokio::test(start_paused = true)]
    async fn a_longer_lease_counts_when_the_shorter_one_is_long_ago() {
        let fitness = PeerFitness::default();
        let (own, voters) = (Duration::from_millis(1500), BTreeMap::from([(2, Incarnation(1))]));
        let short = Duration::from_millis(300);
        fitness.note_lease((2, Incarnation(1)), 300);
        tokio::time::advance(OUTLIVED / 2).await;
        fitness.note_lease((2, Incarnation(1)), 1500);
        assert_eq!(fitness.shortest_lease(own, &voters), short);
        fitness.note_lease((2, Incarnation(1)), 300);
        tokio::time::advance(OUTLIVED / 2).await;
        fitness.note_lease((2, Incarnation(1)), 1500);
        assert_eq!(fitness.shortest_lease(own, &voters), short, "said again meanwhile");
        tokio::time::advance(OUTLIVED / 2).await;
        fitness.note_lease((2, Incarnation(1)), 1500);
        assert_eq!(fitness.shortest_lease(own, &voters), own);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_is_known_by_its_answers_and_a_snapshot_only_while_it_is_sent() {
        let fitness = Arc::new(PeerFitness::default());
        let sending = SendingSnapshot::new(fitness.clone(), 2, (100, 7));
        sending.reached(30);
        let sent = fitness.progress()[&2];
        assert_eq!((sent.snapshot, sent.snapshot_upto), (Some((30, 100)), Some(7)));
        // Being sent something is no sign of life.
        assert!(fitness.within(Duration::MAX).is_empty());
        fitness.note((2, Incarnation(1)), &answer(300));
        fitness.update(2, |peer| peer.accepted_entries += 5);
        drop(sending);
        tokio::time::advance(Duration::from_millis(10)).await;
        assert_eq!(fitness.within(Duration::from_millis(10)), BTreeMap::from([(2, true)]));
        assert!(fitness.within(Duration::from_millis(9)).is_empty());
        fitness.note((2, Incarnation(1)), &AppendResponse { state_differs: true, ..answer(300) });
        assert_eq!(fitness.within(Duration::ZERO), BTreeMap::from([(2, true)]), "its disk takes entries");
        assert_eq!(fitness.fit_within(Duration::ZERO), BTreeMap::from([(2, false)]), "and it is not to lead");
        let peer = fitness.progress()[&2];
        assert_eq!((peer.snapshot, peer.snapshot_upto, peer.accepted_entries), (None, None, 5));
    }
}
