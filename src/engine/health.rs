//! The disk's health drives leadership: a leader that cannot write hands over before it wedges.
//!
//! What the disk is good for, [`DiskWatch`] knows. Here is what follows from it:
//!
//! - No proposal is taken on while the disk is full or hangs ([`admit`]): openraft, once it has accepted an
//!   entry, cannot be told that it did not fit.
//! - A leader in that state hands over to a voter that is in touch, says in its answers to heartbeats that its own
//!   disk is well, and holds the whole log. Handing over needs no disk on this side. Where there is none such, the
//!   leader stays, refuses writes and answers reads: a cluster whose disks are all full is still read.
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

use std::collections::BTreeMap;
use std::time::Duration;

use super::membership::lag;
use super::transfer::Others;
use crate::error::WriteError;
use crate::machine::StateMachine;
use crate::raft::core::{Core, Metrics};
use crate::storage::{DiskState, DiskWatch};
use crate::types::{NodeId, Role};

/// How often the disk is looked at: the time a stalled disk goes unnoticed beyond its limit.
const PACE: Duration = Duration::from_millis(50);

/// Refuses a write that the disk could not take.
///
/// # Errors
/// [`WriteError::DiskFull`], [`WriteError::DiskStalled`].
pub(super) fn admit(disk: &DiskWatch) -> Result<(), WriteError> {
    match disk.state() {
        DiskState::Ok | DiskState::Low => Ok(()),
        DiskState::Full => {
            let available_bytes = disk.status().available_bytes.unwrap_or_default();
            Err(WriteError::DiskFull { available_bytes })
        }
        DiskState::Stalled => {
            let writing_for = disk.status().writing_for.unwrap_or_default();
            Err(WriteError::DiskStalled { writing_for })
        }
    }
}

/// Looks at the disk, and hands the lead over when it is unwell, for as long as the core runs.
pub(super) async fn run<M: StateMachine>(core: Core<M>, own: NodeId, disk: DiskWatch, patience: Duration) {
    if !disk.watches() {
        return;
    }
    loop {
        tokio::time::sleep(PACE).await;
        let state = disk.look();
        let metrics = core.metrics();
        if metrics.role == Role::Stopped {
            return;
        }
        if metrics.role != Role::Leader || state.takes_writes() || core.is_handing_over() {
            continue;
        }
        let Some(to) = successor(&metrics, own, &core.peers_in_touch()) else { continue };
        tracing::warn!(to, disk = %state, "handing over the lead: the disk is unwell");
        // A core that waits for the disk takes no orders.
        if tokio::time::timeout(patience, core.transfer_leader(to)).await.is_err() {
            tracing::warn!(to, "the core does not hand over");
        }
    }
}

/// Who is to lead instead of `own`: a voter in touch that is fit and holds the whole log.
fn successor(metrics: &Metrics, own: NodeId, in_touch: &BTreeMap<NodeId, bool>) -> Option<NodeId> {
    let others = Others { metrics, in_touch };
    let fit = in_touch.keys().copied().filter(|id| *id != own && others.may_lead(*id).is_ok());
    fit.filter(|id| lag(metrics, *id) == 0).min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{LogId, Member, Membership};

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
    fn writes_are_refused_while_the_disk_is_unwell() {
        let stall = Some(Duration::from_millis(1));
        let disk = DiskWatch::new(None, || Some(Duration::from_secs(5)), stall);
        assert!(admit(&disk).is_ok(), "nobody has looked yet");
        disk.look();
        let refused = admit(&disk).unwrap_err();
        assert!(matches!(refused, WriteError::DiskStalled { writing_for } if writing_for.as_secs() == 5));
        assert!(!refused.maybe_applied());
        assert!(admit(&DiskWatch::default()).is_ok());
    }
}
