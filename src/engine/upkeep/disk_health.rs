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
//!   quorum: nothing that it took would be committed ([`QuorumDisks`]). What it says of them is what an operator has to
//!   see to: disks that are full want room, disks that hang do not.
//!
//! # Invariants
//! - Leadership is never offered to a node whose disk is known to be unwell, so it does not go round among full
//!   ones; leaving the state "full" takes more room than entering it.
//! - A leader that has begun to hand over proposes nothing more (that is openraft's rule, and it has no way back);
//!   `hand_over` goes on until somebody else leads, and then offers the lead to an unwell voter as well.
//! - Nobody takes the lead back when its disk is well again. A node whose disk hangs cannot save a vote, hence
//!   neither stand for election nor grant one.
//!
//! What it does not do: stop the node. A write that does not come back at all is the log's watchdog's to end.
//!
//! The protocol, with a figure: `docs/design/disk.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::watch;

use crate::engine::cluster::hand_over::Others;
use crate::engine::cluster::membership::lag;
use crate::engine::{Inner, NodeState};
use crate::error::WriteError;
use crate::machine::StateMachine;
use crate::raft::core::{Core, CoreMetrics};
use crate::storage::{DiskState, DiskWatch};
use crate::types::{Membership, NodeId, Role};

/// How often the disk is looked at while it is written to, or while it or a voter's is unwell: the time a stalled disk goes
/// unnoticed beyond its limit.
const PACE: Duration = Duration::from_millis(50);
/// Looks in a row that must find nothing before the next write is waited for: a store may tidy up after a write.
const QUIET_LOOKS: u32 = 20;

/// Why the disks of this leader's quorum cannot take writes, as of the last look.
#[derive(Debug, Default)]
pub(in crate::engine) struct QuorumDisks {
    /// [`AMPLE`], [`FULL`] or [`STALLED`].
    lack: AtomicU8,
}

const AMPLE: u8 = 0;
const FULL: u8 = 1;
const STALLED: u8 = 2;

/// What so many voters' disks have in common that the others are no quorum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lack {
    /// They are full, some of them perhaps hang.
    Full,
    /// With those that hang there would be a quorum.
    Stalled,
}

impl QuorumDisks {
    fn note(&self, lack: Option<Lack>) {
        let new = match lack {
            None => AMPLE,
            Some(Lack::Full) => FULL,
            Some(Lack::Stalled) => STALLED,
        };
        let old = self.lack.swap(new, Relaxed);
        if old == new {
            return;
        }
        match lack {
            Some(Lack::Full) => {
                tracing::error!("the disks of so many voters are full that no writes are taken");
            }
            Some(Lack::Stalled) => {
                tracing::error!("the disks of so many voters hang that no writes are taken");
            }
            None => tracing::info!("writes are taken again, or are not this node's to take"),
        }
    }

    fn lack(&self) -> Option<Lack> {
        match self.lack.load(Relaxed) {
            AMPLE => None,
            STALLED => Some(Lack::Stalled),
            lack => {
                debug_assert_eq!(lack, FULL, "invariant: no other value is stored");
                Some(Lack::Full)
            }
        }
    }
}

/// Refuses a write that the disk, or those of too many others, could not take.
///
/// # Errors
/// [`WriteError::DiskFull`], [`WriteError::DiskStalled`], [`WriteError::VotersStalled`].
fn admit(disk: &DiskWatch, quorum_disks: &QuorumDisks) -> Result<(), WriteError> {
    let full = || {
        let available_bytes = disk.status().available_bytes.unwrap_or_default();
        Err(WriteError::DiskFull { available_bytes })
    };
    match disk.state() {
        DiskState::Ok | DiskState::Low => match quorum_disks.lack() {
            None => Ok(()),
            Some(Lack::Full) => full(),
            Some(Lack::Stalled) => Err(WriteError::VotersStalled),
        },
        DiskState::Full => full(),
        DiskState::Stalled => {
            let writing_for = disk.status().writing_for.unwrap_or_default();
            Err(WriteError::DiskStalled { writing_for })
        }
    }
}

impl<M: StateMachine> Inner<M> {
    /// Refuses writes while the disks cannot take any; see [`admit`].
    pub(in crate::engine) fn check_disks(&self) -> Result<(), WriteError> {
        admit(&self.disk, &self.quorum_disks)
    }
}

/// Who is in touch, and whether its disk is well.
type InTouch = BTreeMap<NodeId, bool>;

/// Looks at the disk, and hands the lead over when it is unwell.
pub(in crate::engine) struct DiskHealth<M: StateMachine> {
    pub(in crate::engine) core: Core<M>,
    pub(in crate::engine) own: NodeId,
    pub(in crate::engine) disk: DiskWatch,
    pub(in crate::engine) quorum_disks: Arc<QuorumDisks>,
    /// How long the core may take to begin a hand-over.
    pub(in crate::engine) patience: Duration,
    /// What the node is.
    pub(in crate::engine) state: watch::Receiver<NodeState>,
}

impl<M: StateMachine> DiskHealth<M> {
    /// Looks for as long as the node runs: while the log is written to, and when something has changed.
    pub(in crate::engine) async fn run(mut self) {
        let (mut disk, mut peers) = (self.disk.changes(), self.core.peer_changes());
        let mut quiet_looks = 0;
        loop {
            let is_written = self.core.was_written() || self.disk.status().writing_for.is_some();
            let is_well = self.look().await;
            quiet_looks = if is_written || !is_well { 0 } else { quiet_looks + 1 };
            if quiet_looks >= QUIET_LOOKS {
                tokio::select! {
                    () = self.core.write_submitted() => {}
                    () = disk.changed() => {}
                    Ok(()) = peers.changed() => {}
                    Ok(()) = self.state.changed() => {}
                }
            }
            tokio::time::sleep(PACE).await;
        }
    }

    /// Looks at this node's disk and, if it leads, at what the others say of theirs, and does what follows. Whether all is
    /// well, as far as it is this node's to see to it.
    async fn look(&self) -> bool {
        let state = self.disk.look();
        let is_stalled = state == DiskState::Stalled;
        if self.state.borrow().role != Role::Leader {
            self.quorum_disks.note(None);
            return !is_stalled;
        }
        if self.core.is_handing_over() {
            return false;
        }
        let in_touch = self.core.peers_in_touch();
        if state.takes_writes() && in_touch.values().all(|is_well| *is_well) {
            self.quorum_disks.note(None);
            return true;
        }
        let metrics = self.core.metrics();
        let stalled = self.core.peers_stalled();
        self.quorum_disks.note(lack(&metrics.membership, self.own, &in_touch, &stalled));
        if !state.takes_writes() {
            self.hand_over(&metrics, state).await;
        }
        false
    }

    async fn hand_over(&self, metrics: &CoreMetrics, state: DiskState) {
        let fit_to_lead = self.core.peers_fit_to_lead();
        let Some(to) = successor(metrics, self.own, &fit_to_lead) else { return };
        tracing::warn!(to, disk = %state, "handing over the lead: the disk is unwell");
        // A core that waits for the disk takes no orders.
        if tokio::time::timeout(self.patience, self.core.transfer_leader(to, false)).await.is_err() {
            tracing::warn!(to, "the core does not hand over");
        }
    }
}

/// Why those of the voters in touch whose disks are well are no quorum, `own` included, if all in touch are one.
fn lack(
    membership: &Membership,
    own: NodeId,
    in_touch: &InTouch,
    stalled: &BTreeSet<NodeId>,
) -> Option<Lack> {
    let quorum_of = |counts: &dyn Fn(&NodeId) -> bool| {
        let is_majority = |voters: &BTreeSet<NodeId>| {
            let count = voters.iter().filter(|id| **id == own || counts(id)).count();
            count > voters.len() / 2
        };
        membership.voters.iter().all(is_majority)
    };
    let is_well = |id: &NodeId| in_touch.get(id) == Some(&true);
    match quorum_of(&|id| in_touch.contains_key(id)) && !quorum_of(&is_well) {
        false => None,
        true if quorum_of(&|id| is_well(id) || stalled.contains(id)) => Some(Lack::Stalled),
        true => Some(Lack::Full),
    }
}

/// Who is to lead instead of `own`: a voter in touch that is fit and holds the whole log.
fn successor(metrics: &CoreMetrics, own: NodeId, in_touch: &InTouch) -> Option<NodeId> {
    let others = Others { metrics, in_touch };
    let fit = in_touch.keys().copied().filter(|id| *id != own && others.may_lead(*id).is_ok());
    fit.filter(|id| lag(metrics, *id) == 0).min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{LogId, Member};

    fn leader(matched: &[(NodeId, u64)]) -> CoreMetrics {
        let at = |index| Some(LogId::new(1, index));
        CoreMetrics {
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
            let full = lack(&membership, 1, &in_touch, &BTreeSet::new());
            assert_eq!(full, expected.then_some(Lack::Full), "case {number}");
        }
    }

    #[test]
    fn what_keeps_a_quorum_from_writing_is_named_for_what_it_is() {
        let voters = |ids: &[NodeId]| Membership {
            voters: vec![ids.iter().copied().collect()],
            members: BTreeMap::new(),
        };
        // The voters, who else is in touch and fit, whose disks hang, what is lacking.
        type Case<'a> = (&'a [NodeId], &'a [(NodeId, bool)], &'a [NodeId], Option<Lack>);
        let cases: [Case<'_>; 5] = [
            (&[1, 2, 3], &[(2, false), (3, false)], &[2, 3], Some(Lack::Stalled)),
            (&[1, 2, 3], &[(2, false), (3, false)], &[3], Some(Lack::Stalled)),
            (&[1, 2, 3], &[(2, false), (3, true)], &[2], None),
            // Were they only to answer again, the full ones would still be too many.
            (&[1, 2, 3, 4, 5], &[(2, false), (3, false), (4, false), (5, false)], &[5], Some(Lack::Full)),
            (&[1, 2, 3, 4, 5], &[(2, true), (3, false), (4, false), (5, false)], &[5], Some(Lack::Stalled)),
        ];
        for (number, (ids, in_touch, stalled, expected)) in cases.into_iter().enumerate() {
            let in_touch = in_touch.iter().copied().collect();
            let stalled = stalled.iter().copied().collect();
            assert_eq!(lack(&voters(ids), 1, &in_touch, &stalled), expected, "case {number}");
        }
        let (disk, quorum_disks) = (DiskWatch::default(), QuorumDisks::default());
        quorum_disks.note(Some(Lack::Full));
        assert!(matches!(admit(&disk, &quorum_disks), Err(WriteError::DiskFull { .. })));
        quorum_disks.note(Some(Lack::Stalled));
        let stalled = admit(&disk, &quorum_disks).unwrap_err();
        assert!(matches!(stalled, WriteError::VotersStalled) && !stalled.maybe_applied());
        assert!(!stalled.to_string().contains("space"), "{stalled}");
        quorum_disks.note(None);
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
