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
//! - A leader that has begun to hand over proposes nothing more (that is openraft's rule, and it has no way back),
//!   so it goes on until somebody else leads; then it may offer the lead to an unwell voter as well.
//! - Nobody takes the lead back when its disk is well again. A node whose disk hangs cannot save a vote, hence
//!   neither stand for election nor grant one.
//!
//! What it does not do: stop the node. A write that does not come back at all is the log's watchdog's to end.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

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
    // The term in which this node has begun to hand over.
    let mut begun = None;
    loop {
        tokio::time::sleep(PACE).await;
        let state = disk.look();
        let metrics = core.metrics();
        if metrics.role == Role::Stopped {
            return;
        }
        if metrics.role != Role::Leader || begun.is_some_and(|term| term != metrics.term) {
            begun = None;
        }
        if metrics.role != Role::Leader || (state.takes_writes() && begun.is_none()) {
            continue;
        }
        let Some(to) = successor(&metrics, own, &core.peers_in_touch(), begun.is_some()) else { continue };
        tracing::warn!(to, disk = %state, "handing over the lead: the disk is unwell");
        begun = Some(metrics.term);
        let handing_over = async {
            core.transfer_leader(to).await;
            while core.metrics().role == Role::Leader && core.metrics().term == metrics.term {
                disk.look();
                tokio::time::sleep(PACE).await;
            }
        };
        // A core that waits for the disk, or a successor that is not elected; another attempt follows.
        if tokio::time::timeout(patience, handing_over).await.is_err() {
            tracing::warn!(to, "nobody took the lead in time");
        }
    }
}

/// Who is to lead instead of `own`: a voter in touch that holds the whole log, is `fit`, or is any at all once
/// there is no way back.
fn successor(
    metrics: &Metrics,
    own: NodeId,
    in_touch: &BTreeMap<NodeId, bool>,
    no_way_back: bool,
) -> Option<NodeId> {
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
    use crate::types::{LogId, Membership};

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
