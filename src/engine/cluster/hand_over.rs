//! Handing over the lead.
//!
//! A leader hands over to a voter that answers, whose disk is well, and that has all the leader had when it was asked to:
//! so its log takes entries, and lacks no more than what is just under way. openraft then stops writes, tells that voter
//! to stand at once, and the voters to let it.
//!
//! A leader that has offered the lead takes no writes, answers no reads and sends no heartbeats any more, and openraft
//! has no way back. Whoever has begun it, [`follow_up`] therefore sees to its end: the lead is offered to the other
//! voters in turn, in touch or not, until somebody else leads. When nobody takes it, because those that could be elected
//! lack entries that they do not take, this node gives the lead up and stands for election like any other. If not
//! even that ends its term, it stops with an error, so that it is started anew.
//!
//! The protocol, with a figure: `docs/design/membership.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::membership::lag;
use crate::engine::stop::fatal::Fatal;
use crate::engine::stop::until_ended;
use crate::engine::{Engine, Inner};
use crate::error::{FatalError, Leader, TransferError};
use crate::machine::StateMachine;
use crate::raft::core::{Core, CoreMetrics};
use crate::types::{NodeId, Role};

/// Pause between two looks at something that is awaited.
const PAUSE: Duration = Duration::from_millis(20);
/// How long the lead is offered before it is given up: this often as long as an election may take.
const OFFER_ELECTIONS: u32 = 6;
/// How long giving it up may take: a vote is written to the disk.
const GIVE_UP_PATIENCE: Duration = Duration::from_secs(10);

/// What a leader knows of those that could lead in its place.
pub(in crate::engine) struct Others<'a> {
    pub(in crate::engine) metrics: &'a CoreMetrics,
    /// Who has answered a short while ago, and whether its disk is well and its state the others'.
    pub(in crate::engine) in_touch: &'a BTreeMap<NodeId, bool>,
}

impl Others<'_> {
    /// Whether `node_id` may be offered the lead, wherever its log ends.
    pub(in crate::engine) fn may_lead(&self, node_id: NodeId) -> Result<(), TransferError> {
        let membership = &self.metrics.membership;
        if !membership.members.contains_key(&node_id) {
            return Err(TransferError::UnknownMember { node_id });
        }
        // Of a joint membership: a voter that is about to go is none to hand over to.
        if !membership.voters.iter().all(|voters| voters.contains(&node_id)) {
            return Err(TransferError::NotAVoter { node_id });
        }
        match self.in_touch.get(&node_id) {
            None => Err(TransferError::NotInTouch { node_id }),
            Some(false) => Err(TransferError::Unfit { node_id }),
            Some(true) => Ok(()),
        }
    }

    /// The same, and its log must reach to `goal`.
    fn could_lead(&self, node_id: NodeId, goal: Option<u64>) -> Result<(), TransferError> {
        self.may_lead(node_id)?;
        let matched = self.metrics.matched.get(&node_id).copied().flatten();
        match matched.map(|matched| matched.index) >= goal {
            true => Ok(()),
            false => Err(TransferError::NotCaughtUp { node_id, lag: lag(self.metrics, node_id) }),
        }
    }

    /// The voter that the lead is best handed to.
    fn furthest(&self, own: NodeId, goal: Option<u64>) -> Option<NodeId> {
        let others = self.metrics.membership.members.keys().filter(|node_id| **node_id != own);
        let fit = others.filter(|node_id| self.could_lead(**node_id, goal).is_ok());
        fit.min_by_key(|node_id| lag(self.metrics, **node_id)).copied()
    }

    /// Whom to offer a lead that is to go in any case: who was not `offered` it yet, the likeliest first.
    fn next(&self, own: NodeId, offered: &BTreeSet<NodeId>) -> Option<NodeId> {
        let voters = self.metrics.membership.members.keys().copied().filter(|node_id| {
            *node_id != own && self.metrics.membership.voters.iter().all(|voters| voters.contains(node_id))
        });
        voters.min_by_key(|node_id| {
            let is_fit = self.in_touch.get(node_id).copied();
            (offered.contains(node_id), lag(self.metrics, *node_id), is_fit != Some(true), *node_id)
        })
    }
}

impl<M: StateMachine> Engine<M> {
    /// Hands the lead to `to`, or to the voter that is furthest ahead, and waits until another node leads. Returns who
    /// does: an election may have had another outcome than was asked for.
    ///
    /// Writes are refused meanwhile with [`WriteError::NotLeader`](crate::error::WriteError::NotLeader), for as long
    /// as an election takes; those in flight are committed first.
    ///
    /// # Errors
    /// See [`TransferError`].
    pub async fn transfer_leader(&self, to: Option<NodeId>) -> Result<Leader, TransferError> {
        self.transfer(to, false).await
    }

    /// As [`transfer_leader`](Self::transfer_leader), because the other node `wants_lead` or for another reason.
    pub(in crate::engine) async fn transfer(
        &self,
        to: Option<NodeId>,
        wants_lead: bool,
    ) -> Result<Leader, TransferError> {
        let inner = &self.inner;
        let own = inner.config.node_id;
        let metrics = self.leading_for_transfer()?;
        if to == Some(own) {
            return metrics.leader.ok_or(TransferError::NobodyElse);
        }
        let begun = Instant::now();
        // One that has begun already goes on by itself.
        if !inner.core.is_handing_over() {
            let successor = self.successor(to, own).await?;
            tracing::info!(successor, "handing over the lead");
            inner.core.transfer_leader(successor, wants_lead).await;
        }
        let patience = inner.config.timing.patience().saturating_mul(2);
        let mut state = self.watch();
        let changed = state.wait_for(|state| {
            state.role == Role::Stopped || state.leader.as_ref().is_some_and(|leader| leader.node_id != own)
        });
        match tokio::time::timeout(patience, changed).await {
            Ok(Ok(state)) => match state.leader.clone().filter(|leader| leader.node_id != own) {
                Some(leader) => {
                    tracing::info!(
                        leader = leader.node_id,
                        took_ms = crate::runtime::whole_ms(begun.elapsed()),
                        "another node leads"
                    );
                    Ok(leader)
                }
                None => Err(inner.transfer_stopped(true)),
            },
            Ok(Err(_)) => Err(inner.transfer_stopped(true)),
            Err(_) => {
                tracing::warn!("nobody took the lead in time");
                Err(TransferError::Timeout {
                    waited_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
                })
            }
        }
    }

    /// The voter to hand over to. A leader that was elected just now has not heard from all of them yet: they have as
    /// long to answer, and to take what this leader has by now, as they have to be counted as answering.
    async fn successor(&self, to: Option<NodeId>, own: NodeId) -> Result<NodeId, TransferError> {
        let deadline = Instant::now() + self.inner.config.timing.patience();
        let goal = self.leading_for_transfer()?.last_log;
        loop {
            let metrics = self.leading_for_transfer()?;
            let others = Others { metrics: &metrics, in_touch: &self.inner.core.peers_fit_to_lead() };
            let found = match to {
                Some(node_id) => others.could_lead(node_id, goal).map(|()| node_id),
                None => others.furthest(own, goal).ok_or(TransferError::NobodyElse),
            };
            let others_vote = metrics.membership.voters.iter().flatten().any(|voter| *voter != own);
            let may_come = match &found {
                Err(TransferError::NobodyElse) => others_vote,
                Err(TransferError::NotInTouch { .. } | TransferError::NotCaughtUp { .. }) => true,
                Err(
                    TransferError::NotLeader { .. }
                    | TransferError::UnknownMember { .. }
                    | TransferError::NotAVoter { .. }
                    | TransferError::Unfit { .. }
                    | TransferError::Timeout { .. }
                    | TransferError::Stopped { .. }
                    | TransferError::Forward(_),
                )
                | Ok(_) => false,
            };
            if !may_come || Instant::now() >= deadline {
                return found;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn leading_for_transfer(&self) -> Result<CoreMetrics, TransferError> {
        if self.inner.fatal.in_words().is_some() {
            return Err(self.inner.transfer_stopped(false));
        }
        let metrics = self.inner.core.metrics();
        match metrics.role {
            Role::Leader => Ok(metrics),
            Role::Stopped => Err(self.inner.transfer_stopped(false)),
            Role::Learner | Role::Follower | Role::Candidate => {
                Err(TransferError::NotLeader { leader: metrics.leader })
            }
        }
    }
}

impl<M: StateMachine> Inner<M> {
    fn transfer_stopped(&self, maybe_applied: bool) -> TransferError {
        let reason = self.fatal.in_words().unwrap_or_else(|| "the node is shutting down".to_owned());
        TransferError::Stopped { reason, maybe_applied }
    }
}

/// Sees every transfer that this node begins to its end, for as long as the core runs. `election` is how long an
/// election may take.
pub(in crate::engine) async fn follow_up<M: StateMachine>(
    core: Core<M>,
    own: NodeId,
    election: Duration,
    fatal: Fatal,
) {
    let mut begun = core.hand_overs();
    loop {
        if !core.is_handing_over() {
            match begun.changed().await {
                Ok(()) => continue,
                Err(_) => return until_ended().await,
            }
        }
        if core.has_stopped() {
            return until_ended().await;
        }
        tokio::time::sleep(PAUSE).await;
        let metrics = core.metrics();
        if metrics.role != Role::Leader || ends(&core, metrics.term, election).await {
            continue;
        }
        offer(&core, own, metrics.term, election).await;
        if core.metrics().role != Role::Leader || core.metrics().term != metrics.term {
            continue;
        }
        tracing::warn!("nobody takes the lead: giving it up");
        // The other voters may have been removed meanwhile: any id will do that is not this node's.
        let other = core.voters().into_keys().find(|voter| *voter != own);
        core.give_up_lead(other.unwrap_or(own.wrapping_add(1))).await;
        if !ends(&core, metrics.term, GIVE_UP_PATIENCE).await {
            fatal.report(FatalError::StuckTransfer);
            return until_ended().await;
        }
    }
}

/// Offers the lead to one voter after the other, until somebody leads or it takes too long.
async fn offer<M: StateMachine>(core: &Core<M>, own: NodeId, term: u64, election: Duration) {
    let mut offered = BTreeSet::new();
    for _ in 0..OFFER_ELECTIONS {
        let metrics = core.metrics();
        let others = Others { metrics: &metrics, in_touch: &core.peers_fit_to_lead() };
        let Some(to) = others.next(own, &offered) else { return };
        if !offered.insert(to) {
            // Everybody was asked.
            offered = BTreeSet::from([to]);
        }
        tracing::warn!(to, "nobody took the lead in time: offering it again");
        core.transfer_leader(to, false).await;
        if ends(core, term, election).await {
            return;
        }
    }
}

/// Waits until this node no longer leads `term`. False when `patience` has passed before.
async fn ends<M: StateMachine>(core: &Core<M>, term: u64, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let metrics = core.metrics();
        if metrics.role != Role::Leader || metrics.term != term {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use bytes::Bytes;

    use super::*;
    use crate::engine::tests::lone;
    use crate::error::{OperationError, WriteError};
    use crate::kv::machine::KvCommand;
    use crate::reason::Reason;
    use crate::types::{LogId, Member, Membership};

    /// Node 1 leads, its last entry is 9, and the others' logs match as given.
    fn leader(voters: &[&[NodeId]], matched: &[(NodeId, u64)]) -> CoreMetrics {
        let at = |index| Some(LogId::new(1, index));
        let voters: Vec<BTreeSet<NodeId>> = voters.iter().map(|set| set.iter().copied().collect()).collect();
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
            membership: Membership { voters, members: (1..=4).map(|id| (id, Member::default())).collect() },
            membership_at: at(0),
            committed_membership: Membership::default(),
            committed_membership_at: at(0),
            reachable: BTreeSet::new(),
            matched: matched.iter().map(|(id, index)| (*id, at(*index))).collect(),
            fatal: None,
        }
    }

    #[test]
    fn the_lead_goes_to_a_fit_voter_of_all_sets_that_takes_entries() {
        let metrics = leader(&[&[1, 2, 3]], &[(2, 8), (3, 9), (4, 9)]);
        let well = BTreeMap::from([(2, true), (3, true), (4, true)]);
        let others = Others { metrics: &metrics, in_touch: &well };
        assert_eq!(others.furthest(1, Some(8)), Some(3));
        assert_eq!(others.could_lead(2, Some(8)), Ok(()));
        assert_eq!(others.could_lead(2, Some(9)), Err(TransferError::NotCaughtUp { node_id: 2, lag: 1 }));
        assert_eq!(others.could_lead(4, Some(9)), Err(TransferError::NotAVoter { node_id: 4 }));
        assert_eq!(others.could_lead(5, Some(9)), Err(TransferError::UnknownMember { node_id: 5 }));

        let unwell = BTreeMap::from([(3, false)]);
        let others = Others { metrics: &metrics, in_touch: &unwell };
        assert_eq!(others.could_lead(3, Some(9)), Err(TransferError::Unfit { node_id: 3 }));
        assert_eq!(others.could_lead(2, Some(8)), Err(TransferError::NotInTouch { node_id: 2 }));
        assert_eq!(others.furthest(1, Some(0)), None);

        let joint = leader(&[&[1, 2, 3], &[1, 2]], &[(2, 9), (3, 9)]);
        let others = Others { metrics: &joint, in_touch: &well };
        assert_eq!(others.could_lead(3, Some(9)), Err(TransferError::NotAVoter { node_id: 3 }));
        assert_eq!(others.furthest(1, Some(9)), Some(2));
    }

    #[test]
    fn a_lead_that_is_to_go_is_offered_to_every_voter_in_turn() {
        let metrics = leader(&[&[1, 2, 3]], &[(2, 5), (3, 9), (4, 9)]);
        let nobody = BTreeMap::new();
        let others = Others { metrics: &metrics, in_touch: &nobody };
        assert_eq!(others.next(1, &BTreeSet::new()), Some(3));
        assert_eq!(others.next(1, &BTreeSet::from([3])), Some(2));
        assert_eq!(others.next(1, &BTreeSet::from([2, 3])), Some(3), "and again");
        let alone = leader(&[&[1]], &[]);
        assert_eq!(Others { metrics: &alone, in_touch: &nobody }.next(1, &BTreeSet::new()), None);
    }

    const DEADLINE: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn a_lead_that_was_offered_may_move_after_the_caller_was_answered() {
        let told = |error: &TransferError| (error.told().reason, error.told().maybe_applied);
        let engine = lone::engine(false).await;
        assert!(engine.ready(DEADLINE).await);
        let alone = engine.transfer_leader(None).await.unwrap_err();
        assert_eq!(told(&alone), (Reason::Membership, false), "{alone}");

        // Offered to one that does not take it.
        engine.inner.core.transfer_leader(2, false).await;
        let waited = engine.transfer_leader(None).await.unwrap_err();
        assert!(matches!(waited, TransferError::Timeout { .. }), "{waited}");
        assert_eq!(told(&waited), (Reason::Membership, true));
        engine.shutdown().await;

        let engine = lone::engine(false).await;
        assert!(engine.ready(DEADLINE).await);
        engine.inner.core.transfer_leader(2, false).await;
        let (cut_short, ()) = tokio::join!(engine.transfer_leader(None), engine.inner.core.shutdown());
        assert_eq!(told(&cut_short.unwrap_err()), (Reason::Stopped, true));
        engine.shutdown().await;
        let after = engine.transfer_leader(None).await.unwrap_err();
        assert_eq!(told(&after), (Reason::Stopped, false), "{after}");
    }

    #[tokio::test]
    async fn a_lead_that_nobody_takes_is_given_up_and_won_again() {
        let engine = lone::engine(false).await;
        assert!(engine.ready(DEADLINE).await);
        let (tenant, collection) = ("t".to_owned(), "c".to_owned());
        let (key, value) = (Bytes::from("k"), Bytes::from("v"));
        let put = KvCommand::Put { tenant, collection, key, value };
        engine.write(put.clone()).await.unwrap();

        let core = &engine.inner.core;
        let term = core.metrics().term;
        core.transfer_leader(2, false).await;
        let refused = engine.write(put.clone()).await.unwrap_err();
        assert!(matches!(refused, WriteError::NotLeader { .. }), "{refused:?}");
        assert!(core.is_handing_over());
        let election = engine.inner.config.timing.patience();
        assert!(!ends(core, term, election).await, "openraft has no way back of its own");

        core.give_up_lead(2).await;
        assert!(ends(core, term, DEADLINE).await);
        let mut state = engine.watch();
        let leads = state.wait_for(|state| state.role == Role::Leader && state.term > term);
        assert!(tokio::time::timeout(DEADLINE, leads).await.is_ok(), "elected again");
        assert!(!core.is_handing_over());
        let transfers = [&core.activity().transfers_begun, &core.activity().transfers_failed];
        assert_eq!(transfers.map(|count| count.load(Relaxed)), [1, 1]);
        engine.write(put).await.unwrap();
        engine.shutdown().await;
    }
}
