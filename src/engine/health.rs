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
//! - A leader that has begun to hand over proposes nothing more (that is openraft's rule, and it has no way back);
//!   `transfer` goes on until somebody else leads, and then offers the lead to an unwell voter as well.
//! - Nobody takes the lead back when its disk is well again. A node whose disk hangs cannot save a vote, hence
//!   neither stand for election nor grant one.
//!
//! What it does not do: stop the node. A write that does not come back at all is the log's watchdog's to end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use super::membership::lag;
use super::transfer::Others;
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
    /// How long the core may take to begin a hand-over.
    pub(super) patience: Duration,
}

impl<M: StateMachine> Health<M> {
    /// Looks for as long as the core runs.
    pub(super) async fn run(self) {
        if !self.disk.watches() {
            return;
        }
        loop {
            tokio::time::sleep(PACE).await;
            let state = self.disk.look();
            let metrics = self.core.metrics();
            if metrics.role == Role::Stopped {
                return;
            }
            if metrics.role != Role::Leader {
                self.quorum_disks.note(false);
                continue;
            }
            if self.core.is_handing_over() {
                continue;
            }
            let in_touch = self.core.peers_in_touch();
            self.quorum_disks.note(lacks_disks(&metrics.membership, self.own, &in_touch));
            if state.takes_writes() {
                continue;
            }
            let Some(to) = successor(&metrics, self.own, &in_touch) else { continue };
            tracing::warn!(to, disk = %state, "handing over the lead: the disk is unwell");
            // A core that waits for the disk takes no orders.
            if tokio::time::timeout(self.patience, self.core.transfer_leader(to, false)).await.is_err() {
                tracing::warn!(to, "the core does not hand over");
            }
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

/// Who is to lead instead of `own`: a voter in touch that is fit and holds the whole log.
fn successor(metrics: &Metrics, own: NodeId, in_touch: &InTouch) -> Option<NodeId> {
    let others = Others { metrics, in_touch };
    let fit = in_touch.keys().copied().filter(|id| *id != own && others.may_lead(*id).is_ok());
    fit.filter(|id| lag(metrics, *id) == 0).min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{LogId, Member};

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
            membership: Membership {
                voters: vec![[1, 2, 3].into()],
                members: (1..=4).map(|id| (id, Member::default())).collect(),
            },
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
        // Matched positions, who is in touch and whether it is fit, who it is.
        type Case<'a> = (&'a [(NodeId, u64)], &'a [(NodeId, bool)], Option<NodeId>);
        let cases: [Case<'_>; 7] = [
            (&[(1, 9), (2, 9), (3, 9)], &[(2, true), (3, true)], Some(2)),
            (&[(1, 9), (2, 8), (3, 9)], &[(2, true), (3, true)], Some(3)),
            (&[(1, 9), (2, 9), (3, 9)], &[(2, false), (3, true)], Some(3)),
            (&[(1, 9), (2, 9), (3, 9)], &[(3, true)], Some(3)),
            (&[(1, 9), (2, 9), (3, 9)], &[(2, false), (3, false)], None),
            (&[(1, 9), (2, 8), (3, 8)], &[(2, true), (3, true)], None),
            // A learner, and this node itself.
            (&[(1, 9), (4, 9)], &[(1, true), (4, true)], None),
        ];
        for (number, (matched, in_touch, expected)) in cases.into_iter().enumerate() {
            let in_touch = in_touch.iter().copied().collect();
            let found = successor(&leader(matched), 1, &in_touch);
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
