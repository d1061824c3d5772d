//! Compares this node's state with the others', and what follows when it differs.
//!
//! Once a second every member tells the leader the hashes that it has noted, hears what all others have told, and judges
//! itself ([`agreement`](crate::raft::agreement)); once a majority is known to have its newest state it waits until it has
//! applied something, or another node leads. A machine that is not deterministic, a bit that flipped in memory, or a
//! snapshot that was changed on disk all show like this, and nothing else would: the log is the same everywhere.
//!
//! A node whose state is not the majority's says so in its log and its probes, answers no reads, takes no writes, hands
//! over the lead, sends no snapshots, and leaves elections to the others. Its log and its vote are as good as before, so it goes on replicating
//! and voting; and where its log is the longest of those that are left, nobody but it can be elected: then it stands after
//! a while, brings the others up to date, and hands over. It stays like this until it is restarted or sent a snapshot: what it would answer is wrong, and nothing that
//! it applies makes that right. Where no majority has the same state, or two of three differ and the third is silent for some seconds,
//! all that have spoken do the same until a majority agrees, but may lead: somebody must, for the operator to replace members.

use std::collections::BTreeSet;
use std::sync::Weak;
use std::time::Duration;

use tokio::time::Instant;

use crate::engine::stop::until_ended;
use crate::engine::{Engine, Inner};
use crate::machine::StateMachine;
use crate::raft::agreement::{Check, HashesTold, StateLife, StateVerdict, judge};
use crate::raft::core::CoreMetrics;
use crate::raft::snapshot::catch;
use crate::runtime::offload;
use crate::types::{Divergence, LogId, NodeId, Role};

/// How often states are compared, while there is something to find out.
const PACE: Duration = Duration::from_secs(1);
/// Comparisons after which a doubt counts, if nothing has decided it.
const DOUBTS: u32 = 3;
/// A node whose state differs leaves elections to the others until there has been no leader for this often as long as one may
/// take to show up.
const RELUCTANCE: u32 = 4;

/// What this node did the last time.
struct AgreementMemory {
    /// Index of the next entry to apply, then.
    next_index: u64,
    at: Instant,
    /// Where a state was hashed because nothing was written.
    idle_at: Option<LogId>,
    /// Since when this node has known no leader.
    leaderless_since: Option<Instant>,
    /// Where the voters were first found to differ without a decision since, in which life, and how often it was looked at.
    doubted: Option<(StateLife, LogId, u32)>,
}

impl AgreementMemory {
    /// A doubt that has not been decided for so long that it will not be by those that are late.
    fn lasting(
        &mut self,
        life: StateLife,
        decided: &Option<Result<LogId, Divergence>>,
        doubt: Option<Divergence>,
    ) -> Option<Divergence> {
        let Some(doubt) = doubt else {
            self.doubted = None;
            return None;
        };
        let decided =
            decided.as_ref().map(|decided| decided.as_ref().map_or_else(|wrong| wrong.at, |at| *at));
        let before = self.doubted.filter(|(then, at, _)| *then == life && decided < Some(*at));
        let (_, at, times) = before.unwrap_or((life, doubt.at, 0));
        self.doubted = Some((life, at, times + 1));
        (times + 1 >= DOUBTS).then_some(doubt)
    }
}

/// Compares until the node is gone. Holds no handle, so that dropping the last one ends the node.
pub(in crate::engine) async fn run<M: StateMachine>(node: Weak<Inner<M>>) {
    let mut memory = AgreementMemory {
        next_index: 0,
        at: Instant::now(),
        idle_at: None,
        leaderless_since: None,
        doubted: None,
    };
    let Some(mut state) = node.upgrade().map(|inner| inner.state.clone()) else {
        return until_ended().await;
    };
    loop {
        state.borrow_and_update();
        let Some(inner) = node.upgrade() else { return until_ended().await };
        let is_settled = Engine::within(inner).compare(&mut memory).await;
        // Nothing more is to be found out before this node applies something, or another one leads.
        if is_settled {
            if state.changed().await.is_err() {
                return until_ended().await;
            }
            // How often to hash follows from what is applied from now on.
            memory.at = Instant::now();
        }
        tokio::time::sleep(PACE).await;
    }
}

impl<M: StateMachine> Engine<M> {
    /// Whether all is well, and another comparison of the same states would say the same.
    async fn compare(&self, memory: &mut AgreementMemory) -> bool {
        let (core, own) = (&self.inner.core, self.inner.config.node_id);
        let metrics = core.metrics();
        if metrics.role == Role::Stopped {
            return true;
        }
        let agreement = core.agreement();
        // Before anything is looked at that this is about.
        let life = agreement.life();
        let is_hashed = self.hash(memory).await;
        self.stand(&metrics, memory);
        let Some(told) = self.told(&metrics).await else { return false };
        // Of a joint membership, those that are to vote.
        let voters = metrics.membership.voters.last().cloned().unwrap_or_default();
        let StateVerdict { decided, doubt } = judge(own, &voters, &told);
        let newest = told.get(&own).and_then(|own| own.iter().map(|check| check.log_id).max());
        let is_decided = doubt.is_none() && newest.is_some_and(|newest| decided == Some(Ok(newest)));
        let doubt = memory.lasting(life, &decided, doubt);
        if let Some(Ok(at)) = decided
            && agreement.agrees(life, at)
        {
            tracing::info!(%at, "this node's state is the same as a majority's again");
        }
        for divergence in decided.and_then(Result::err).into_iter().chain(doubt) {
            if agreement.differs(life, &divergence) {
                tracing::error!(%divergence, "this node answers no reads any more");
            }
        }
        if agreement.is_outvoted() {
            self.stand(&metrics, memory);
            self.leave_the_lead().await;
        }
        is_decided && is_hashed && agreement.divergence().is_none() && memory.leaderless_since.is_none()
    }

    /// Decides whether this node may stand for election.
    fn stand(&self, metrics: &CoreMetrics, memory: &mut AgreementMemory) {
        let core = &self.inner.core;
        let has_leader = metrics.role == Role::Leader || metrics.in_touch;
        let since = memory.leaderless_since.filter(|_| !has_leader);
        memory.leaderless_since = (!has_leader).then(|| since.unwrap_or_else(Instant::now));
        let reluctance = self.inner.config.timing.patience().saturating_mul(RELUCTANCE);
        let is_needed = since.is_some_and(|since| since.elapsed() >= reluctance);
        core.may_stand(!core.agreement().is_outvoted() || is_needed);
    }

    /// Hashes the state of a machine that keeps no hash, if it is time to. Whether the state as it is has been hashed.
    async fn hash(&self, memory: &mut AgreementMemory) -> bool {
        let core = &self.inner.core;
        let (progress, agreement) = (core.published().progress(), core.agreement());
        if progress.state_hash.is_some() {
            return true;
        }
        let entries = progress.next_index().saturating_sub(memory.next_index);
        agreement.choose_step(entries, memory.at.elapsed());
        (memory.next_index, memory.at) = (progress.next_index(), Instant::now());
        if progress.log_id.is_none() || progress.log_id == memory.idle_at {
            return true;
        }
        if entries > 0 || !agreement.may_hash() {
            return false;
        }
        let (life, deadline) = (agreement.life(), Instant::now() + self.inner.config.timing.patience());
        let Ok(applied) = self.inner.view(None, deadline).await else { return false };
        let Some(log_id) = applied.progress.log_id else { return false };
        let begun = Instant::now();
        let hash = offload(move || catch("hashing the state", || Ok(M::state_hash(&applied.view)))).await;
        // Not again for the same state, whose hash would panic again.
        memory.idle_at = Some(log_id);
        match hash {
            Ok(hash) => agreement.hashed(life, Check { log_id, hash }, begun.elapsed()),
            Err(error) => tracing::warn!(%error, "the state is not compared with the others'"),
        }
        false
    }

    /// What all members have said, this one included, as far as the leader knows.
    async fn told(&self, metrics: &CoreMetrics) -> Option<HashesTold> {
        let (inner, own) = (&self.inner, self.inner.config.node_id);
        let agreement = inner.core.agreement();
        let progress = inner.core.published().progress();
        let mut mine = agreement.own();
        if let (Some(log_id), Some(hash)) = (progress.log_id, progress.state_hash) {
            mine.retain(|check| check.log_id != log_id);
            mine.push(Check { log_id, hash });
        }
        // A state that is known to be wrong casts no doubt on others: one of them may be the last that is left.
        if agreement.is_outvoted() {
            mine.clear();
        }
        let members: BTreeSet<NodeId> = metrics.membership.members.keys().copied().collect();
        if metrics.role == Role::Leader {
            agreement.told(own, mine);
            return Some(agreement.all_told(&members));
        }
        agreement.forget_told();
        let leader = metrics.leader.as_ref()?.node_id;
        let member = metrics.membership.members.get(&leader).filter(|_| leader != own)?;
        let patience = inner.config.timing.patience();
        match inner.leader_line.compare::<M>(leader, member, &mine, patience).await {
            Ok(mut told) => {
                told.retain(|node_id, _| members.contains(node_id));
                told.insert(own, mine);
                Some(told)
            }
            Err(error) => {
                tracing::debug!(leader, %error, "this node's state was not compared with the others'");
                None
            }
        }
    }

    async fn leave_the_lead(&self) {
        let core = &self.inner.core;
        if core.metrics().role != Role::Leader || core.is_handing_over() {
            return;
        }
        if let Err(error) = self.transfer_leader(None).await {
            tracing::error!(%error, "this node's state is wrong, and it could not hand over the lead; trying again");
        }
    }
}

#[cfg(test)]
mod tests {

    #[test]
    fn a_doubt_counts_once_it_has_lasted() {
        let mut memory = AgreementMemory {
            next_index: 0,
            at: Instant::now(),
            idle_at: None,
            leaderless_since: None,
            doubted: None,
        };
        let life = StateLife::default();
        let at = |index| LogId::new(1, index);
        let doubt = |index| Some(Divergence { at: at(index), own: 1, majority: None });
        // The third voter is late, and decides each time.
        for index in [10, 20, 30, 40, 50] {
            assert_eq!(memory.lasting(life, &Some(Ok(at(index - 10))), doubt(index)), None);
        }
        // It has stopped.
        let decided = Some(Ok(at(50)));
        assert_eq!(memory.lasting(life, &decided, doubt(60)), None);
        assert_eq!(memory.lasting(life, &decided, doubt(60)), None);
        assert_eq!(memory.lasting(life, &decided, doubt(60)), doubt(60));
        assert_eq!(memory.lasting(life, &decided, None), None);
        assert_eq!(memory.lasting(life, &decided, doubt(70)), None);
    }

    use super::*;
    use crate::engine::tests::lone;
    use crate::error::{ReadError, WriteError};
    use crate::machine::counting::Count;
    use crate::types::ReadLevel;

    /// A machine without a running hash, where nothing is written any more, and what others say of the same position.
    #[tokio::test(start_paused = true)]
    async fn a_node_whose_state_is_not_the_majoritys_serves_no_more() {
        let engine = lone::engine_of(false, Count::default()).await;
        assert!(engine.ready(Duration::from_secs(30)).await);
        let written = engine.write(()).await.unwrap();
        let agreement = engine.inner.core.agreement().clone();
        let noted = async {
            while !agreement.own().iter().any(|check| check.log_id == written.log_id) {
                tokio::time::sleep(PACE).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), noted).await.expect("an idle state is hashed");

        let own = agreement.own();
        let others: Vec<Check> =
            own.iter().map(|check| Check { hash: check.hash.wrapping_add(1), ..*check }).collect();
        let told = HashesTold::from([(1, own), (2, others.clone()), (3, others)]);
        let divergence = judge(1, &[1, 2, 3].into(), &told).decided.unwrap().unwrap_err();
        engine.inner.settings.send_modify(|settings| settings.preferred_leader = true);
        assert!(engine.inner.wants_lead());
        let life = agreement.life();
        assert!(agreement.differs(life, &divergence) && agreement.is_outvoted());
        assert!(!engine.inner.wants_lead(), "whatever it prefers");
        assert!(!agreement.differs(life, &divergence), "told once");
        assert!(!agreement.agrees(life, written.log_id), "nothing that it applies makes it right");

        let text = divergence.to_string();
        for part in [divergence.at.to_string(), format!("{:016x}", divergence.own)] {
            assert!(text.contains(&part), "{text}");
        }
        let state = engine.state();
        assert_eq!(
            (state.diverged.as_ref(), state.is_ready(), state.fatal),
            (Some(&divergence), false, None)
        );
        for level in [ReadLevel::Local, ReadLevel::Linearizable, ReadLevel::Lease] {
            let refused = engine.read((), level).await.unwrap_err();
            assert!(matches!(refused, ReadError::Diverged { .. }), "{refused}");
        }
        let refused = engine.write(()).await.unwrap_err();
        assert!(matches!(refused, WriteError::Diverged { .. }) && !refused.maybe_applied(), "{refused}");
        engine.shutdown().await;
    }
}
