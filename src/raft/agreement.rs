//! Whether the nodes' states are the same at the same positions.
//!
//! Every node notes hashes of its state at positions that all nodes pass, and tells them to the leader, which tells every
//! member what the others have said. Each judges itself: the one whose state is not what the majority of the voters has
//! is the one that is wrong. Where no majority has the same, all are in doubt.
//!
//! # Positions
//!
//! A machine with a [running hash](StateMachine::running_hash) is noted at every index that is a multiple of
//! [`STEP`], which costs it nothing, and where it stands when nothing is written. Of those positions the last few are kept
//! for every power of two: two nodes have some in common however far apart they are.
//!
//! For other machines a view is taken, and hashed off the apply path, one at a time. How often depends on what it costs:
//! the multiples are those of a power of two that comes about once a second, and no more than one in
//! [`COST_SHARE`] of the time is spent. Nodes that apply the same entries at about the same pace choose the same powers, or
//! neighbouring ones, whose multiples they share.
//!
//! # What it does not do
//!
//! Repair. What is noted is in memory; after a restart a node is judged anew by what it applies from then on.
//!
//! The protocol, with a figure: `docs/design/agreement.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::machine::StateMachine;
use crate::runtime;
use crate::types::{Divergence, LogId, NodeId};

/// Hashes are noted at multiples of this index, or of larger powers of two.
pub(crate) const STEP: u64 = 64;
/// Of a second, or of any other time, the part that is spent on hashing states at most: one in so many.
pub(crate) const COST_SHARE: u32 = 50;
/// A state is hashed no more often than this.
const LEAST_PAUSE: Duration = Duration::from_secs(1);
/// Positions kept for every power of two.
const KEPT_PER_POWER: usize = 4;
/// Kept positions are thinned out once there are so many.
const MOST_KEPT: usize = 320;
/// Hashes that one member may tell at a time.
pub(super) const MOST_TOLD: usize = 512;

/// The hash of the state after an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Check {
    /// Which entry.
    pub log_id: LogId,
    /// The hash.
    pub hash: u64,
}

/// What members have said, each for itself.
pub(crate) type HashesTold = BTreeMap<NodeId, Vec<Check>>;

/// The hashes of this node, and those it was told while it led.
#[derive(Debug, Default)]
pub(crate) struct Agreement {
    own: Mutex<OwnHashes>,
    told: Mutex<HashesTold>,
    /// For machines without a running hash: multiples of this index are hashed; 0 for none.
    step: AtomicU64,
    is_hashing: AtomicBool,
    /// When a state was last hashed, and how long that took.
    hashed: Mutex<Option<(Instant, Duration)>>,
    /// Told when a divergence is found, or is none any more.
    changed: watch::Sender<()>,
}

/// One state of this node after another: a snapshot that it is sent begins a new one. What is found of one says nothing of
/// the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct StateLife(u64);

/// What is known of this node's state.
#[derive(Debug, Default)]
struct OwnHashes {
    life: StateLife,
    noted: BTreeMap<u64, Check>,
    divergence: Option<Divergence>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("invariant: no panic under this lock")
}

impl Agreement {
    /// The machine has applied `log_id`.
    pub(super) fn applied<M: StateMachine>(self: &Arc<Self>, machine: &M, log_id: LogId) {
        if !log_id.index.is_multiple_of(STEP) {
            return;
        }
        let life = self.life();
        match machine.running_hash() {
            Some(hash) => self.note(life, Check { log_id, hash }),
            None => {
                let step = self.step.load(Relaxed);
                if step > 0 && log_id.index.is_multiple_of(step) && !self.is_hashing.swap(true, Relaxed) {
                    let (this, view) = (self.clone(), machine.view());
                    runtime::spawn(async move { this.hash::<M>(life, log_id, view).await });
                }
            }
        }
    }

    /// Notes the hash of `view`, the state after `log_id`. Hashing has been begun.
    async fn hash<M: StateMachine>(&self, life: StateLife, log_id: LogId, view: M::View) {
        let begun = Instant::now();
        let hash = runtime::offload(move || {
            let view = view;
            super::snapshot::catch("hashing the state", || Ok(M::state_hash(&view)))
        });
        match hash.await {
            Ok(hash) => self.note(life, Check { log_id, hash }),
            Err(error) => tracing::warn!(%error, "the state is not compared with the others'"),
        }
        *lock(&self.hashed) = Some((Instant::now(), begun.elapsed()));
        self.is_hashing.store(false, Relaxed);
    }

    /// Whether a state may be hashed now that is not at a chosen position.
    pub(crate) fn may_hash(&self) -> bool {
        let hashed = *lock(&self.hashed);
        hashed.is_none_or(|(at, took)| at.elapsed() >= pause_after(took)) && !self.is_hashing.load(Relaxed)
    }

    /// In `life`, the state had this hash, which took some time to find.
    pub(crate) fn hashed(&self, life: StateLife, check: Check, took: Duration) {
        self.note(life, check);
        *lock(&self.hashed) = Some((Instant::now(), took));
    }

    /// Chooses the positions to hash at, where `entries` were applied in `time`.
    pub(crate) fn choose_step(&self, entries: u64, time: Duration) {
        let took = lock(&self.hashed).map_or(Duration::ZERO, |(_, took)| took);
        let entries = u128::from(entries) * pause_after(took).as_millis() / time.as_millis().max(1);
        let entries = u64::try_from(entries).unwrap_or(u64::MAX).min(1 << 48);
        self.step.store(entries.next_power_of_two().max(STEP), Relaxed);
    }

    /// The present state, to be asked for before anything is found of it: what is found of an earlier one does not count.
    pub(crate) fn life(&self) -> StateLife {
        lock(&self.own).life
    }

    fn note(&self, life: StateLife, check: Check) {
        let mut own = lock(&self.own);
        if own.life != life {
            return;
        }
        own.noted.insert(check.log_id.index, check);
        if own.noted.len() > MOST_KEPT {
            thin_out(&mut own.noted);
        }
    }

    /// This node has another state than before, and has published it.
    pub(super) fn begin_anew(&self) {
        let mut own = lock(&self.own);
        *own = OwnHashes { life: StateLife(own.life.0 + 1), ..OwnHashes::default() };
        drop(own);
        self.changed.send_replace(());
    }

    /// Tells when [`divergence`](Self::divergence) may have changed.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// That this node's state differs, if it is known to.
    pub(crate) fn divergence(&self) -> Option<Divergence> {
        lock(&self.own).divergence.clone()
    }

    /// Whether a majority of the voters has another state.
    pub(crate) fn is_outvoted(&self) -> bool {
        lock(&self.own).divergence.as_ref().is_some_and(|divergence| divergence.majority.is_some())
    }

    /// This node's state differed in `life`. Whether that is news.
    pub(crate) fn differs(&self, life: StateLife, found: &Divergence) -> bool {
        let mut own = lock(&self.own);
        let is_news = own.life == life
            && match &own.divergence {
                None => true,
                Some(known) => known.majority.is_none() && found.majority.is_some(),
            };
        if is_news {
            own.divergence = Some(found.clone());
            drop(own);
            self.changed.send_replace(());
        }
        is_news
    }

    /// This node's state was a majority's in `life`, as of `at`. Whether that ends a doubt.
    pub(crate) fn agrees(&self, life: StateLife, at: LogId) -> bool {
        let mut own = lock(&self.own);
        let doubt = own.divergence.as_ref().filter(|known| known.majority.is_none());
        let ends = own.life == life && doubt.is_some_and(|known| known.at <= at);
        if ends {
            own.divergence = None;
            drop(own);
            self.changed.send_replace(());
        }
        ends
    }

    /// What this node has noted.
    pub(crate) fn own(&self) -> Vec<Check> {
        lock(&self.own).noted.values().copied().collect()
    }

    /// This node does not lead: what it was told when it did may be out of date when it does again.
    pub(crate) fn forget_told(&self) {
        lock(&self.told).clear();
    }

    /// A member has said this of itself.
    pub(crate) fn told(&self, node_id: NodeId, mut checks: Vec<Check>) {
        // Whoever says two things of one position has one voice.
        checks.sort_by_key(|check| check.log_id);
        checks.dedup_by_key(|check| check.log_id);
        lock(&self.told).insert(node_id, checks);
    }

    /// What `members` have said of themselves.
    pub(crate) fn all_told(&self, members: &BTreeSet<NodeId>) -> HashesTold {
        let mut told = lock(&self.told);
        told.retain(|node_id, _| members.contains(node_id));
        told.clone()
    }
}

fn pause_after(took: Duration) -> Duration {
    took.saturating_mul(COST_SHARE).max(LEAST_PAUSE)
}

/// Keeps, for every power of two, the newest positions that are multiples of it.
fn thin_out(own: &mut BTreeMap<u64, Check>) {
    // Newer positions, by how often two divides them.
    let mut newer = [0; 65];
    let mut kept = BTreeMap::new();
    for (index, check) in own.iter().rev() {
        let power = index.trailing_zeros() as usize;
        if newer[power..].iter().sum::<usize>() < KEPT_PER_POWER {
            kept.insert(*index, *check);
        }
        newer[power] += 1;
    }
    *own = kept;
}

/// What members' hashes say of a node's state.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct StateVerdict {
    /// Where it was last found to differ from the voters', or that it does not, as of the newest position of which enough of them
    /// have spoken to decide.
    pub decided: Option<Result<LogId, Divergence>>,
    /// The oldest position after that where voters differ and those that have not spoken yet may decide. They usually do a
    /// moment later.
    pub doubt: Option<Divergence>,
}

/// What `told` says of node `own`.
pub(crate) fn judge(own: NodeId, voters: &BTreeSet<NodeId>, told: &HashesTold) -> StateVerdict {
    let majority = voters.len() / 2 + 1;
    let mut verdict = StateVerdict::default();
    let mut by_position: BTreeMap<LogId, BTreeMap<u64, usize>> = BTreeMap::new();
    for check in voters.iter().filter_map(|voter| told.get(voter)).flatten() {
        *by_position.entry(check.log_id).or_default().entry(check.hash).or_default() += 1;
    }
    let mut newest = told.get(&own).cloned().unwrap_or_default();
    newest.sort_by_key(|check| std::cmp::Reverse(check.log_id));
    for check in newest {
        let Some(hashes) = by_position.get(&check.log_id) else { continue };
        let spoken: usize = hashes.values().sum();
        let most = hashes.iter().max_by_key(|(_, count)| **count);
        let Some((hash, count)) = most.filter(|_| spoken >= majority) else { continue };
        let differs = |majority| Divergence { at: check.log_id, own: check.hash, majority };
        let may_have_majority = count + voters.len().saturating_sub(spoken) >= majority;
        verdict.decided = Some(match *count >= majority {
            true if *hash == check.hash => Ok(check.log_id),
            true => Err(differs(Some(*hash))),
            false if may_have_majority => {
                verdict.doubt = Some(differs(None));
                continue;
            }
            false => Err(differs(None)),
        });
        break;
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(index: u64, hash: u64) -> Check {
        Check { log_id: LogId::new(1, index), hash }
    }

    fn told(all: &[(NodeId, &[(u64, u64)])]) -> HashesTold {
        let checks = |list: &[(u64, u64)]| list.iter().map(|(index, hash)| check(*index, *hash)).collect();
        all.iter().map(|(node_id, list)| (*node_id, checks(list))).collect()
    }

    const THREE: [NodeId; 3] = [1, 2, 3];

    fn verdicts(voters: &[NodeId], told: &HashesTold) -> Vec<Option<Result<u64, Option<u64>>>> {
        let voters = voters.iter().copied().collect();
        let judged = told.keys().map(|node_id| judge(*node_id, &voters, told).decided);
        judged.map(|judged| judged.map(|v| v.map(|at| at.index).map_err(|d| d.majority))).collect()
    }

    #[test]
    fn the_minority_is_wrong() {
        let equal = told(&[(1, &[(64, 7)]), (2, &[(64, 7)]), (3, &[(64, 7)])]);
        assert_eq!(verdicts(&THREE, &equal), [Some(Ok(64)); 3]);
        let one_differs = told(&[(1, &[(64, 7)]), (2, &[(64, 8)]), (3, &[(64, 7)])]);
        assert_eq!(verdicts(&THREE, &one_differs), [Some(Ok(64)), Some(Err(Some(7))), Some(Ok(64))]);
        // The third need not have spoken.
        let two = told(&[(1, &[(64, 7)]), (2, &[(64, 7)])]);
        assert_eq!(verdicts(&THREE, &two), [Some(Ok(64)); 2]);
        // A learner is judged, and does not judge.
        let learner = told(&[(1, &[(64, 7)]), (2, &[(64, 7)]), (3, &[(64, 7)]), (4, &[(64, 9)])]);
        assert_eq!(verdicts(&THREE, &learner)[3], Some(Err(Some(7))));
    }

    #[test]
    fn without_a_majority_all_are_in_doubt() {
        let all_differ = told(&[(1, &[(64, 7)]), (2, &[(64, 8)]), (3, &[(64, 9)])]);
        assert_eq!(verdicts(&THREE, &all_differ), [Some(Err(None)); 3]);
        let two_differ = told(&[(1, &[(64, 7)]), (2, &[(64, 8)])]);
        assert_eq!(verdicts(&THREE, &two_differ), [None; 2], "the third may decide");
        assert_eq!(verdicts(&[1, 2], &two_differ), [Some(Err(None)); 2]);
        assert_eq!(verdicts(&[1], &told(&[(1, &[(64, 7)])])), [Some(Ok(64))]);
    }

    /// A position of which not all have spoken takes nothing back that is known of an older one.
    #[test]
    fn a_doubt_stands_beside_what_is_decided() {
        let told = told(&[
            (1, &[(64, 7), (128, 8), (192, 9)]),
            (2, &[(64, 7), (128, 5), (192, 5)]),
            (3, &[(64, 7)]),
        ]);
        let verdict = judge(1, &THREE.into(), &told);
        assert_eq!(verdict.decided, Some(Ok(LogId::new(1, 64))));
        assert_eq!(verdict.doubt.map(|doubt| (doubt.at.index, doubt.majority)), Some((128, None)));
        assert_eq!(judge(3, &THREE.into(), &told).doubt, None);
        assert_eq!(judge(4, &THREE.into(), &told), StateVerdict::default());
    }

    #[test]
    fn only_equal_positions_of_which_enough_have_spoken_count() {
        let one_alone = told(&[(1, &[(64, 7)]), (2, &[(128, 8)])]);
        assert_eq!(verdicts(&THREE, &one_alone), [None; 2]);
        // The newest that is common decides.
        let healed = told(&[(1, &[(64, 7), (128, 5)]), (2, &[(64, 8), (128, 5)]), (3, &[(64, 7)])]);
        assert_eq!(verdicts(&THREE, &healed)[..2], [Some(Ok(128)); 2]);
        let other_term = HashesTold::from([
            (1, vec![check(64, 7)]),
            (2, vec![Check { log_id: LogId::new(2, 64), hash: 8 }]),
        ]);
        assert_eq!(verdicts(&THREE, &other_term), [None; 2]);
    }

    /// What is found of a state may come to light when a snapshot has taken its place.
    #[test]
    fn what_was_found_of_an_earlier_state_does_not_count() {
        let agreement = Agreement::default();
        let life = agreement.life();
        let wrong = Divergence { at: LogId::new(1, 64), own: 7, majority: Some(8) };
        agreement.note(life, check(64, 7));
        assert!(agreement.differs(life, &wrong) && agreement.is_outvoted());
        agreement.begin_anew();
        assert_eq!((agreement.divergence(), agreement.own().len()), (None, 0));
        agreement.note(life, check(64, 7));
        assert!(!agreement.differs(life, &wrong));
        assert_eq!((agreement.divergence(), agreement.own().len()), (None, 0));
        let doubt = Divergence { majority: None, ..wrong };
        assert!(agreement.differs(agreement.life(), &doubt));
        assert!(!agreement.agrees(life, doubt.at) && agreement.divergence().is_some());
        assert!(agreement.agrees(agreement.life(), doubt.at));
    }

    #[test]
    fn nodes_that_are_far_apart_have_positions_in_common() {
        let at = |last: u64| {
            let agreement = Agreement::default();
            (0..=last / STEP).for_each(|n| agreement.note(StateLife(0), check(n * STEP, n)));
            assert!(agreement.own().len() <= MOST_KEPT);
            agreement.own().into_iter().map(|check| check.log_id.index).collect::<BTreeSet<_>>()
        };
        let newest = at(1_000_000);
        for behind in [1, 64, 1_000, 20_000, 300_000] {
            let older = at(1_000_000 - behind);
            assert!(newest.intersection(&older).any(|index| *index > 0), "{behind} entries behind");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_hashing_costs_decides_how_often() {
        let agreement = Agreement::default();
        let second = Duration::from_secs(1);
        agreement.choose_step(10, second);
        assert_eq!(agreement.step.load(Relaxed), STEP);
        agreement.choose_step(10_000, second);
        assert_eq!(agreement.step.load(Relaxed), 16_384);
        assert!(agreement.may_hash());
        agreement.hashed(agreement.life(), check(5, 5), second);
        agreement.choose_step(10_000, second);
        assert_eq!(agreement.step.load(Relaxed), 524_288, "a hash takes a second: fifty pass to the next");
        assert!(!agreement.may_hash());
        tokio::time::advance(second * COST_SHARE).await;
        assert!(agreement.may_hash());
    }
}
