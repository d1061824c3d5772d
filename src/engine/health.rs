//! The disk's health drives leadership: a leader that cannot write hands over before it wedges.
//!
//! What the disk is good for, [`DiskWatch`] knows. Here is what follows from it:
//!
//! - No proposal is taken on while the disk is full or hangs ([`admit`]): openraft, once it has accepted an
//!   entry, cannot be told that it did not fit.
//! - A leader in that state hands over to a voter that is in touch, says in its answers to heartbeats that its own
//!   disk is well, and holds the whole log. Handing over needs no disk on this side. Where there is none such, the
//!   leader stays, refuses writes and answers reads: a cluster whose disks are all full is still read.
//! - A leader refuses writes as well while so many voters say that their disks are full or hang that the others are no
//!   quorum: nothing that it took would be committed ([`QuorumDisks`]).
//!
//! # Invariants
//! - Leadership is never offered to a node whose disk is known to be unwell, so it does not go round among full
//!   ones; leaving the state "full" takes more room than entering it.
//! - A leader that has begun to hand over proposes nothing more and sends no more heartbeats (that is openraft's rule,
//!   and it has no way back): the others elect a leader after an election timeout, if the one that was asked does
//!   not stand before. Until then it is asked again, or another one, also an unwell one, of those that were in touch when
//!   the hand-over began: nobody answers this node any more, so it learns nothing newer.
//! - Nobody takes the lead back when its disk is well again. A node whose disk hangs cannot save a vote, hence
//!   neither stand for election nor grant one.
//!
//! What it does not do: stop the node. A write that does not come back at all is the log's watchdog's to end.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use crate::error::WriteError;
use crate::machine::StateMachine;
use crate::raft::core::{Core, Metrics};
use crate::storage::{DiskState, DiskWatch};
use crate::types::{Membership, NodeId, Role};

/// How often the disk is looked at: the time a stalled disk goes unnoticed beyond its limit.
const PACE: Duration = Duration::from_millis(50);

/// Whether the disks of this leader's quorum can take writes, as of the last look.
#[derive(Debug, Default)]
pub(super) struct QuorumDisks {
    unwell: AtomicBool,
}

impl QuorumDisks {
    fn note(&self, unwell: bool) {
        match (self.unwell.swap(unwell, Relaxed), unwell) {
            (false, true) => {
                tracing::error!("the disks of so many voters are full or hang that no writes are taken");
            }
            (true, false) => tracing::info!("writes are taken again, or are not this node's to take"),
            _ => {}
        }
    }
}

/// Refuses a write that the disk, or those of too many others, could not take.
///
/// # Errors
/// [`WriteError::DiskFull`], [`WriteError::DiskStalled`].
pub(super) fn admit(disk: &DiskWatch, quorum_disks: &QuorumDisks) -> Result<(), WriteError> {
    let full = || {
        let available_bytes = disk.status().available_bytes.unwrap_or_default();
        Err(WriteError::DiskFull { available_bytes })
    };
    match disk.state() {
        DiskState::Ok | DiskState::Low if quorum_disks.unwell.load(Relaxed) => full(),
        DiskState::Ok | DiskState::Low => Ok(()),
        DiskState::Full => full(),
        DiskState::Stalled => {
            let writing_for = disk.status().writing_for.unwrap_or_default();
            Err(WriteError::DiskStalled { writing_for })
        }
    }
}

/// Who is in touch, and whether its disk is well.
type InTouch = BTreeMap<NodeId, bool>;

/// Looks at the disk, and hands the lead over when it is unwell.
pub(super) struct Health<M: StateMachine> {
    pub(super) core: Core<M>,
    pub(super) own: NodeId,
    pub(super) disk: DiskWatch,
    pub(super) quorum_disks: Arc<QuorumDisks>,
    /// How long a hand-over may take before there is another attempt.
    pub(super) patience: Duration,
}

/// A hand-over that has begun, and cannot be taken back.
#[derive(Debug)]
struct Begun {
    term: u64,
    /// Who was in touch then.
    in_touch: InTouch,
}

impl<M: StateMachine> Health<M> {
    /// Looks for as long as the core runs.
    pub(super) async fn run(self) {
        if !self.disk.watches() {
            return;
        }
        let mut begun: Option<Begun> = None;
        loop {
            tokio::time::sleep(PACE).await;
            let state = self.disk.look();
            let metrics = self.core.metrics();
            if metrics.role == Role::Stopped {
                return;
            }
            let leads = metrics.role == Role::Leader;
            begun = begun.filter(|begun| leads && begun.term == metrics.term);
            if !leads {
                self.quorum_disks.note(false);
                continue;
            }
            let in_touch = self.core.peers_in_touch();
            self.quorum_disks.note(lacks_disks(&metrics.membership, self.own, &in_touch));
            if state.takes_writes() && begun.is_none() {
                continue;
            }
            // Once it has begun, nobody answers any more.
            let candidates = begun.as_ref().map_or(&in_touch, |begun| &begun.in_touch);
            let Some(to) = successor(&metrics, self.own, candidates, begun.is_some()) else { continue };
            tracing::warn!(to, disk = %state, "handing over the lead: the disk is unwell");
            let term = metrics.term;
            begun.get_or_insert(Begun { term, in_touch });
            self.hand_over(to, term).await;
        }
    }

    async fn hand_over(&self, to: NodeId, term: u64) {
        let handing_over = async {
            self.core.transfer_leader(to).await;
            while self.core.metrics().role == Role::Leader && self.core.metrics().term == term {
                self.disk.look();
                tokio::time::sleep(PACE).await;
            }
        };
        // A core that waits for the disk, or a successor that is not elected; another attempt follows.
        if tokio::time::timeout(self.patience, handing_over).await.is_err() {
            tracing::warn!(to, "nobody took the lead in time");
        }
    }
}

/// Whether the voters in touch are a quorum, `own` included, but those of them whose disks are well are none.
fn lacks_disks(membership: &Membership, own: NodeId, in_touch: &InTouch) -> bool {
    let quorum_of = |counts: &dyn Fn(&NodeId) -> bool| {
        let is_majority = |voters: &BTreeSet<NodeId>| {
            let count = voters.iter().filter(|id| **id == own || counts(id)).count();
            count > voters.len() / 2
        };
        membership.voters.iter().all(is_majority)
    };
    quorum_of(&|id| in_touch.contains_key(id)) && !quorum_of(&|id| in_touch.get(id) == Some(&true))
}

/// Who is to lead instead of `own`: a voter in touch that holds the whole log, is `fit`, or is any at all once
/// there is no way back.
fn successor(metrics: &Metrics, own: NodeId, in_touch: &InTouch, no_way_back: bool) -> Option<NodeId> {
    let holds_all = |id: &NodeId| {
        let matched = metrics.matched.get(id).copied().flatten();
        matched.map(|matched| matched.index) >= metrics.last_log
    };
    in_touch
        .iter()
        .filter(|(id, fit)| **id != own && metrics.membership.is_voter(**id) && (**fit || no_way_back))
        .filter(|(id, _)| holds_all(id))
        .min_by_key(|(id, fit)| (Reverse(**fit), **id))
        .map(|(id, _)| *id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::LogId;

    fn leader(matched: &[(NodeId, u64)]) -> Metrics {
        let at = |index| Some(LogId::new(1, index));
        Metrics {
            role: Role::Leader,
            term: 1,
            leader: None,
            in_touch: true,
            last_log: Some(9),
            committed: at(9),
            cluster_committed: at(9),
            snapshot: None,
            purged: None,
            membership: Membership { voters: vec![[1, 2, 3].into()], members: BTreeMap::new() },
            membership_at: at(0),
            committed_membership: Membership::default(),
            committed_membership_at: at(0),
            reachable: Default::default(),
            matched: matched.iter().map(|(id, index)| (*id, at(*index))).collect(),
            fatal: None,
        }
    }

    #[test]
    fn the_lead_goes_to_a_fit_voter_that_holds_the_whole_log() {
        // Matched positions, who is in touch and whether it is fit, whether there is no way back, who it is.
        type Case<'a> = (&'a [(NodeId, u64)], &'a [(NodeId, bool)], bool, Option<NodeId>);
        let cases: [Case<'_>; 9] = [
            (&[(1, 9), (2, 9), (3, 9)], &[(2, true), (3, true)], false, Some(2)),
            (&[(1, 9), (2, 8), (3, 9)], &[(2, true), (3, true)], false, Some(3)),
            (&[(1, 9), (2, 9), (3, 9)], &[(2, false), (3, true)], false, Some(3)),
            (&[(1, 9), (2, 9), (3, 9)], &[(3, true)], false, Some(3)),
            (&[(1, 9), (2, 9), (3, 9)], &[(2, false), (3, false)], false, None),
            (&[(1, 9), (2, 9), (3, 9)], &[(2, false), (3, false)], true, Some(2)),
            (&[(1, 9), (2, 9), (3, 9)], &[(2, false), (3, true)], true, Some(3)),
            (&[(1, 9), (2, 8), (3, 8)], &[(2, true), (3, true)], true, None),
            // A learner, and this node itself.
            (&[(1, 9), (4, 9)], &[(1, true), (4, true)], true, None),
        ];
        for (number, (matched, in_touch, no_way_back, expected)) in cases.into_iter().enumerate() {
            let in_touch = in_touch.iter().copied().collect();
            let found = successor(&leader(matched), 1, &in_touch, no_way_back);
            assert_eq!(found, expected, "case {number}");
        }
    }

    #[test]
    fn writes_need_a_quorum_of_disks_that_are_well() {
        // The voters, who else is in touch and whether it is fit, whether that is too few disks.
        type Case<'a> = (&'a [&'a [NodeId]], &'a [(NodeId, bool)], bool);
        let cases: [Case<'_>; 9] = [
            (&[&[1]], &[], false),
            (&[&[1, 2, 3]], &[(2, true), (3, false)], false),
            (&[&[1, 2, 3]], &[(2, false), (3, false)], true),
            // The one that is not in touch might have helped.
            (&[&[1, 2, 3]], &[(2, false)], true),
            // Too few are in touch whatever their disks: not the disks' fault.
            (&[&[1, 2, 3]], &[], false),
            (&[&[1, 2, 3, 4, 5]], &[(2, false)], false),
            // Learners do not count, and both halves of a joint membership do.
            (&[&[1, 2, 3]], &[(2, false), (3, false), (4, true)], true),
            (&[&[1, 2, 3], &[1, 4, 5]], &[(2, true), (3, true), (4, false), (5, false)], true),
            (&[&[1, 2, 3], &[1, 4, 5]], &[(2, true), (3, false), (4, true), (5, false)], false),
        ];
        for (number, (voters, in_touch, expected)) in cases.into_iter().enumerate() {
            let voters = voters.iter().map(|set| set.iter().copied().collect()).collect();
            let membership = Membership { voters, members: BTreeMap::new() };
            let in_touch = in_touch.iter().copied().collect();
            assert_eq!(lacks_disks(&membership, 1, &in_touch), expected, "case {number}");
        }
        let (disk, quorum_disks) = (DiskWatch::default(), QuorumDisks::default());
        quorum_disks.note(true);
        assert!(matches!(admit(&disk, &quorum_disks), Err(WriteError::DiskFull { .. })));
        quorum_disks.note(false);
        assert!(admit(&disk, &quorum_disks).is_ok());
    }

    #[test]
    fn writes_are_refused_while_the_disk_is_unwell() {
        let stall = Some(Duration::from_millis(1));
        let disk = DiskWatch::new(None, || Some(Duration::from_secs(5)), || 0, stall);
        let admit = |disk| admit(disk, &QuorumDisks::default());
        assert!(admit(&disk).is_ok(), "nobody has looked yet");
        disk.look();
        let refused = admit(&disk).unwrap_err();
        assert!(matches!(refused, WriteError::DiskStalled { writing_for } if writing_for.as_secs() == 5));
        assert!(!refused.maybe_applied());
        assert!(admit(&DiskWatch::default()).is_ok());
    }
}
