//! Changes of the cluster: who belongs to it, and who votes.
//!
//! # Promises
//!
//! - Only the leader changes the membership, one change after the other; who must wait too long is told so.
//! - A node becomes a voter only once it answers and has nearly the whole log: before that it would make a majority
//!   larger without helping to form one.
//! - A change is refused unless a majority of the voters before it, and one of those after it, answers: it could not be
//!   committed, and would leave a cluster that cannot undo it. Losing a voter is also refused when too few of those left
//!   have caught up or have a disk that is well; that may be overridden.
//! - A change that was interrupted, by the loss of the leader or of its caller, is completed by repeating it: what is
//!   already as it is to be succeeds and changes nothing, the removal of a member that was removed included. That it was one
//!   is known to a node that has had it among the members since it was started; else the id is taken for a mistake. What an interrupted
//!   change meant to make of a member is noted in the membership itself ([`Intent`]), so that neither the repetition nor
//!   a leader that ends it by itself has to guess.
//! - An address comes into the membership only if the member answers there.
//! - A change goes on when its caller goes away, so there are only so many at a time. While a learner
//!   catches up others may change the membership.
//! - A change of which a part is made says so, whatever keeps it from being made as a whole.
//! - A leader that is to be removed, demoted or replaced hands over first, and the caller is told who leads now. It
//!   never leads a cluster that it is not a voter of.
//!
//! # Ids and data directories
//!
//! A member is an id and a data directory. A node that lost its directory may come back under its old id only through
//! [`Engine::replace_member`], which removes the old member by one committed entry and adds the new one by another. From
//! the first of them on, handshakes with the old directory are refused by everybody who has that entry, and nothing
//! is committed without a majority that does. So the old one may come back at any time and changes nothing: the two
//! are as different as nodes with different ids. Until the new one has caught up the cluster has one voter less,
//! which replacing a node by one with another id avoids.
//!
//! The protocol, with a figure: `docs/design/membership.md`.

mod changes;
mod identify;
mod quorum;
mod replace;
mod steps;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::MutexGuard;
use tokio::time::Instant;

pub(in crate::engine) use self::changes::MemberChanges;
pub(crate) use self::changes::RequestedChange;
use self::changes::{ChangeWaits, Stage};
pub(in crate::engine) use self::identify::check_address;
use self::quorum::{Strength, check_quorum};
use crate::engine::Engine;
use crate::error::{MembershipError, ReadError, TransferError};
use crate::machine::StateMachine;
use crate::raft::core::CoreMetrics;
use crate::raft::membership::{ChangeError, MembershipChange};
use crate::report::MemberList;
use crate::runtime;
use crate::types::{Incarnation, Intent, Member, NodeId, Role};

/// How long a change waits for the one before it.
const TURN_PATIENCE: Duration = Duration::from_secs(10);
/// How long an entry may take to be committed.
const COMMIT_PATIENCE: Duration = Duration::from_secs(10);
/// Pause between two looks at something that is awaited.
const PAUSE: Duration = Duration::from_millis(20);
/// A learner that has all but this many entries has caught up: under load nobody has them all.
const CAUGHT_UP_ENTRIES: u64 = 1_000;
/// And lacks none that is older than this.
const CAUGHT_UP_AGE: Duration = Duration::from_secs(2);
/// The longest that a learner is waited for, however long it was given: more than any log takes to be sent.
const MOST_CATCH_UP_PATIENCE: Duration = Duration::from_secs(24 * 60 * 60);
/// How long to wait for a learner to catch up when nothing else is said.
pub const CATCH_UP_PATIENCE: Duration = Duration::from_secs(60);

/// A node to be added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMember {
    /// Its id.
    pub node_id: NodeId,
    /// `host:port` of its peer port. It tells its identity and what it advertises itself.
    pub peer: String,
}

/// New addresses of a member; what is `None` stays.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NewAddresses {
    /// `host:port` of its peer port.
    pub peer: Option<String>,
    /// `host:port` of its client port.
    pub client: Option<String>,
}

impl<M: StateMachine> Engine<M> {
    /// Adds `new`, which was started to join, as a learner; with `promote` also makes it a voter, once it has caught
    /// up, for which it has `timeout`, a day at most.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn add_member(
        &self,
        new: NewMember,
        promote: bool,
        timeout: Duration,
    ) -> Result<MemberList, MembershipError> {
        self.change_members(RequestedChange::Add { new, promote, timeout }, None).await
    }

    /// Makes a learner a voter, once it has caught up, for which it has `timeout`, a day at most.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn promote_member(
        &self,
        node_id: NodeId,
        timeout: Duration,
    ) -> Result<MemberList, MembershipError> {
        self.change_members(RequestedChange::Promote { node_id, timeout }, None).await
    }

    /// Makes a voter a learner. `force` does so although too few voters that have caught up and whose disks are well
    /// would be left; a majority must answer in any case.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn demote_member(&self, node_id: NodeId, force: bool) -> Result<MemberList, MembershipError> {
        self.change_members(RequestedChange::Demote { node_id, force }, None).await
    }

    /// Removes a member; succeeds when it was removed before, as far as this node knows it. `force` does so although too few voters that have caught up and whose disks are well would be
    /// left; a majority must answer in any case. A node that still runs learns of it from the others and stops.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn remove_member(&self, node_id: NodeId, force: bool) -> Result<MemberList, MembershipError> {
        self.change_members(RequestedChange::Remove { node_id, force }, None).await
    }

    /// Puts `new` in the place of `old`, which may be dead or wiped: a voter if the old one was, once it has caught up,
    /// for which it has `timeout`, a day at most. The two may have the same id; see the [module](self) for what that means.
    ///
    /// Repeated after an interruption it completes what is missing. When the old member of the same id is gone by then, and
    /// what it was is not noted any more, because the leader that noted it was removed as well, it is taken to have been
    /// a voter.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn replace_member(
        &self,
        old: NodeId,
        new: NewMember,
        timeout: Duration,
    ) -> Result<MemberList, MembershipError> {
        self.change_members(RequestedChange::Replace { old, new, timeout }, None).await
    }

    /// Corrects the addresses of a member. A member that starts with new ones does this by itself, so it must answer at
    /// them and advertise them already: what it does not advertise it would correct again.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn update_member(
        &self,
        node_id: NodeId,
        addresses: NewAddresses,
    ) -> Result<MemberList, MembershipError> {
        self.change_members(RequestedChange::Update { node_id, addresses }, None).await
    }

    /// Makes `change`. Where its caller waits for `limit` at most and no part of it is proposed by then, none is any more.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub(crate) async fn change_members(
        &self,
        change: RequestedChange,
        limit: Option<Duration>,
    ) -> Result<MemberList, MembershipError> {
        change.check()?;
        self.change(change.waits(), limit, move |engine, stage| async move {
            match change {
                RequestedChange::Add { new, promote, timeout } => {
                    engine.add(&new, promote, timeout, &stage).await
                }
                RequestedChange::Promote { node_id, timeout } => {
                    engine.promote(node_id, caught_up_by(timeout), &stage).await
                }
                RequestedChange::Demote { node_id, force } => engine.demote(node_id, force, &stage).await,
                RequestedChange::Remove { node_id, force } => engine.remove(node_id, force, &stage).await,
                RequestedChange::Replace { old, new, timeout } => {
                    let deadline = caught_up_by(timeout);
                    match old == new.node_id {
                        true => engine.replace_in_place(&new, deadline, &stage).await,
                        false => engine.replace_by_other(old, &new, deadline, &stage).await,
                    }
                }
                RequestedChange::Update { node_id, addresses } => {
                    engine.update(node_id, addresses, &stage).await
                }
            }
        })
        .await
    }

    /// Ends a change that was left half made; called where nobody asked for it.
    pub(in crate::engine) async fn settle_member_change(&self) -> Result<MemberList, MembershipError> {
        self.change(ChangeWaits::ForItsTurn, None, move |engine, stage| async move {
            let _turn = engine.turn(&stage).await?;
            engine.settle(&stage).await
        })
        .await
    }

    /// Waits until no other change is being made here. What was known before may not hold any more.
    async fn turn(&self, stage: &Stage) -> Result<MutexGuard<'_, ()>, MembershipError> {
        stage.waits_for(|| "an earlier change to end".to_owned());
        let turn = tokio::time::timeout(TURN_PATIENCE, self.inner.changes.turn());
        turn.await.map_err(|_| MembershipError::AnotherChange)
    }

    /// Does `work` to its end even if the caller goes away; but it ends with `limit`, with its caller or without, if it has proposed
    /// nothing by then.
    async fn change<W>(
        &self,
        waits: ChangeWaits,
        limit: Option<Duration>,
        work: impl FnOnce(Self, Arc<Stage>) -> W + Send + 'static,
    ) -> Result<MemberList, MembershipError>
    where
        W: Future<Output = Result<(), MembershipError>> + Send,
    {
        let before = self.leading()?.membership_at;
        let place = self.inner.changes.place(waits)?;
        // It goes on without its caller, and does not keep the node running without anybody.
        let (engine, stage) = (Self::within(self.inner.clone()), Arc::new(Stage::default()));
        let task = runtime::spawn(async move {
            let _place = place;
            let mut stop = engine.inner.stop.subscribe();
            let done = async {
                work(engine.clone(), stage.clone()).await?;
                // A leader that is cut off does not know whether what was asked for is so.
                if engine.inner.core.metrics().membership_at == before {
                    stage.waits_for(|| "a majority to confirm that this node leads".to_owned());
                    engine.confirm().await?;
                }
                let list = engine.members();
                Ok(MemberList { unchanged: list.position == before, changed_at: list.position, ..list })
            };
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => Err(stopped("the node is shutting down").after(true)),
                members = done => members,
                // It has its turn, for nothing.
                error = out_of_time(&stage, limit) => Err(error),
            }
        });
        let outcome = task.await;
        match outcome {
            Ok(outcome) => outcome,
            Err(_) => Err(stopped("the change was abandoned").after(true)),
        }
    }

    /// What the core knows, if this node leads.
    fn leading(&self) -> Result<CoreMetrics, MembershipError> {
        let metrics = self.inner.core.metrics();
        match (self.inner.fatal.in_words(), metrics.role) {
            (Some(reason), _) => Err(stopped(&reason)),
            (None, Role::Leader) => Ok(metrics),
            (None, Role::Stopped) => Err(stopped("the node is shutting down")),
            (None, _) => Err(MembershipError::NotLeader { leader: metrics.leader }),
        }
    }

    /// That this node leads, as of now.
    async fn confirm(&self) -> Result<(), MembershipError> {
        let deadline = Instant::now() + self.inner.config.timing.patience();
        match self.inner.read_index(deadline).await {
            Ok(_) => Ok(()),
            Err(ReadError::NotLeader { leader }) => Err(MembershipError::NotLeader { leader }),
            Err(ReadError::Stopped { reason }) => Err(stopped(&reason)),
            Err(error) => Err(MembershipError::Unconfirmed { reason: error.to_string() }),
        }
    }

    fn known(&self, metrics: &CoreMetrics, node_id: NodeId) -> Result<Member, MembershipError> {
        let known = metrics.membership.members.get(&node_id);
        known.cloned().ok_or(MembershipError::UnknownMember { node_id })
    }

    /// Commits `change`, a part of what was asked for, unless that was given up.
    async fn propose_change(
        &self,
        step: &'static str,
        change: MembershipChange,
        stage: &Stage,
    ) -> Result<(), MembershipError> {
        // Nobody is told of this: whoever asked has been told that nothing is proposed.
        stage.propose().then_some(()).ok_or(MembershipError::AnotherChange)?;
        self.commit(step, change).await
    }

    /// Commits `change`.
    async fn commit(&self, step: &'static str, change: MembershipChange) -> Result<(), MembershipError> {
        let begun = Instant::now();
        let timeout = || MembershipError::Timeout {
            step: step.to_owned(),
            waited_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        tracing::info!(%change, "changing the membership");
        loop {
            let attempt = self.inner.core.change_membership(change.clone());
            let outcome = tokio::time::timeout(COMMIT_PATIENCE, attempt).await.map_err(|_| timeout())?;
            match outcome {
                Ok(at) => {
                    tracing::info!(%change, %at, "the membership has changed");
                    return Ok(());
                }
                // An entry of an earlier leader, or of one whose caller gave up.
                Err(ChangeError::UnderWay) if begun.elapsed() < COMMIT_PATIENCE => {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(ChangeError::UnderWay) => return Err(MembershipError::AnotherChange),
                Err(ChangeError::NotLeader(leader)) => return Err(MembershipError::NotLeader { leader }),
                Err(ChangeError::Interrupted(leader)) => return Err(MembershipError::Interrupted { leader }),
                Err(ChangeError::Stopped(reason)) => return Err(stopped(&reason).after(true)),
                Err(ChangeError::Invalid(reason)) => {
                    // The membership is not what it was when the change was decided on.
                    tracing::warn!(%change, reason, "the core refuses a change of the membership");
                    return Err(MembershipError::AnotherChange);
                }
            }
        }
    }

    /// Completes what an earlier leader has left half made. Who does not vote afterwards leaves that to another leader.
    async fn settle(&self, stage: &Stage) -> Result<(), MembershipError> {
        let metrics = self.leading()?;
        if metrics.membership.voters.len() <= 1 {
            return Ok(());
        }
        let own = self.inner.config.node_id;
        if !voters(&metrics).contains(&own) {
            return self.step_aside(own, stage).await;
        }
        // The change that was left may be the same as what is asked for now.
        self.propose_change("the end of an earlier change", MembershipChange::Settle, stage).await
    }

    /// Makes `new` a member, and tells whether it was none. With an `intent` it takes another one's place.
    async fn join(
        &self,
        new: &NewMember,
        intent: Option<Intent>,
        stage: &Stage,
    ) -> Result<bool, MembershipError> {
        stage.waits_for(|| asking(new.node_id, &new.peer));
        let found = self.identify_reached(new).await?;
        let metrics = self.leading()?;
        let node_id = new.node_id;
        match metrics.membership.members.get(&node_id) {
            Some(known) if known.incarnation == found.incarnation => Ok(false),
            Some(known) => Err(MembershipError::AlreadyMember {
                node_id,
                known: known.incarnation,
                presented: found.incarnation,
                peer: new.peer.clone(),
            }),
            None => {
                stage.waits_for(|| "a snapshot of what the cluster was restored with".to_owned());
                self.has_snapshot_to_begin_with().await?;
                let change = MembershipChange::AddLearner { node_id, member: found, intent };
                self.propose_change("the addition", change, stage).await.map(|()| true)
            }
        }
    }

    /// Waits until this node's log does not begin any more with a state that was restored, which whoever is added does not have.
    async fn has_snapshot_to_begin_with(&self) -> Result<(), MembershipError> {
        let begun = Instant::now();
        let core = &self.inner.core;
        while core.published().progress().is_restored && core.metrics().purged.is_none() {
            self.leading()?;
            if begun.elapsed() > COMMIT_PATIENCE {
                let waited_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                return Err(MembershipError::Timeout {
                    step: "the snapshot of the restored state".to_owned(),
                    waited_ms,
                });
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    /// Makes a learner a voter, once it has caught up. Others may change the membership meanwhile.
    async fn promote(
        &self,
        node_id: NodeId,
        deadline: Instant,
        stage: &Stage,
    ) -> Result<(), MembershipError> {
        let metrics = self.leading()?;
        let incarnation = self.known(&metrics, node_id)?.incarnation;
        loop {
            if !voters(&self.leading()?).contains(&node_id) {
                stage.waits_for(|| format!("node {node_id} to catch up"));
                self.caught_up(node_id, incarnation, deadline).await?;
            }
            let _turn = self.turn(stage).await?;
            self.settle(stage).await?;
            let metrics = self.leading()?;
            if metrics.membership.is_voter(node_id) {
                return Ok(());
            }
            // It may have fallen behind, or been replaced, while others had their turn.
            if !self.has_caught_up(&metrics, node_id, incarnation)? {
                continue;
            }
            let with = |voters: &mut BTreeSet<NodeId>| {
                voters.insert(node_id);
            };
            self.keeps_quorum(with, Strength::Answers, stage).await?;
            return self.propose_change("the promotion", MembershipChange::Promote(node_id), stage).await;
        }
    }

    /// Waits until a learner answers and has nearly all entries.
    async fn caught_up(
        &self,
        node_id: NodeId,
        incarnation: Incarnation,
        deadline: Instant,
    ) -> Result<(), MembershipError> {
        loop {
            let metrics = self.leading()?;
            if self.has_caught_up(&metrics, node_id, incarnation)? {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let address = self.known(&metrics, node_id)?.peer;
                return Err(match metrics.reachable.contains(&node_id) {
                    true => MembershipError::NotCaughtUp { node_id, lag: lag(&metrics, node_id) },
                    false => MembershipError::NotReached { node_id, address },
                });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Whether the member with this data directory answers and has nearly all entries.
    fn has_caught_up(
        &self,
        metrics: &CoreMetrics,
        node_id: NodeId,
        incarnation: Incarnation,
    ) -> Result<bool, MembershipError> {
        match self.known(metrics, node_id)?.incarnation == incarnation {
            true => Ok(metrics.reachable.contains(&node_id) && self.follows(metrics, node_id)),
            // Somebody else has replaced it.
            false => Err(MembershipError::AnotherChange),
        }
    }

    /// Whether a member takes the log as it comes: it lacks little, and nothing that is old, and is not sent a snapshot. Behind
    /// a slow link few entries may be many bytes.
    fn follows(&self, metrics: &CoreMetrics, node_id: NodeId) -> bool {
        let core = &self.inner.core;
        let missing = lag(metrics, node_id);
        let receives = core.peer_progress().get(&node_id).is_some_and(|peer| peer.snapshot_upto.is_some());
        let oldest = metrics.last_log.map(|last| last.saturating_sub(missing.saturating_sub(1)));
        let age = oldest.filter(|_| missing > 0).and_then(|oldest| core.entry_age(oldest));
        Behind { receives_snapshot: receives, missing, age }.is_little()
    }

    /// Refuses to lose the voter `node_id` when too few would be left; by force only when those could not even commit it.
    async fn may_lose(&self, node_id: NodeId, force: bool, stage: &Stage) -> Result<(), MembershipError> {
        if voters(&self.leading()?).iter().all(|voter| *voter == node_id) {
            return Err(MembershipError::LastVoter { node_id });
        }
        let without = |voters: &mut BTreeSet<NodeId>| {
            voters.remove(&node_id);
        };
        match self.keeps_quorum(without, Strength::IsWell, stage).await {
            Err(error @ MembershipError::WouldWeakenQuorum { .. }) if force => {
                tracing::warn!(node_id, %error, "losing a voter by force");
                Ok(())
            }
            checked => checked,
        }
    }

    /// Whether a majority of the voters, and one of those after `change`, is as asked for. A leader that was elected just
    /// now has not heard from all of them yet: they have as long to answer as they have to be counted as answering.
    async fn keeps_quorum(
        &self,
        change: impl Fn(&mut BTreeSet<NodeId>),
        asked: Strength,
        stage: &Stage,
    ) -> Result<(), MembershipError> {
        let deadline = Instant::now() + self.inner.config.timing.patience();
        loop {
            let metrics = self.leading()?;
            let mut after = voters(&metrics);
            change(&mut after);
            let checked = check_quorum(&metrics, &self.inner.core.peers_in_touch(), &after, asked);
            match &checked {
                Err(lack) if Instant::now() < deadline => {
                    stage.waits_for(|| format!("a majority to answer: {lack}"))
                }
                Ok(()) | Err(_) => return checked,
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// When this node itself is to go: hands over, and sends the caller to whoever leads then.
    async fn step_aside(&self, node_id: NodeId, stage: &Stage) -> Result<(), MembershipError> {
        if node_id != self.inner.config.node_id {
            return Ok(());
        }
        stage.waits_for(|| "another node to take the lead, which it may yet do".to_owned());
        match self.transfer_leader(None).await {
            Ok(leader) => Err(MembershipError::NotLeader { leader: Some(leader) }),
            Err(TransferError::NotLeader { leader }) => Err(MembershipError::NotLeader { leader }),
            Err(source) => Err(MembershipError::HandOver { node_id, source }),
        }
    }
}

/// Ends when the caller's `limit` is over and nothing is proposed, which from then on never is.
async fn out_of_time(stage: &Stage, limit: Option<Duration>) -> MembershipError {
    let Some(limit) = limit else { return std::future::pending().await };
    tokio::time::sleep(limit).await;
    match stage.give_up() {
        Some(waited_for) => {
            let waited_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
            MembershipError::OutOfTime { waited_for, waited_ms }
        }
        None => std::future::pending().await,
    }
}

/// What is waited for while a node is asked who it is.
fn asking(node_id: NodeId, peer: &str) -> String {
    format!("node {node_id} to answer at {peer}")
}

/// What a member lacks.
#[derive(Debug, Clone, Copy)]
struct Behind {
    receives_snapshot: bool,
    /// Entries.
    missing: u64,
    /// How old the oldest of them is, if that is known.
    age: Option<Duration>,
}

impl Behind {
    /// Whether it follows the log, so that it can help to form a majority.
    fn is_little(self) -> bool {
        let Self { receives_snapshot, missing, age } = self;
        !receives_snapshot && missing <= CAUGHT_UP_ENTRIES && age.is_none_or(|age| age <= CAUGHT_UP_AGE)
    }
}

/// When a learner that has `timeout` from now on must have caught up.
fn caught_up_by(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(MOST_CATCH_UP_PATIENCE)
}

/// Of a change of which nothing is made.
fn stopped(reason: &str) -> MembershipError {
    MembershipError::Stopped { reason: reason.to_owned(), maybe_applied: false }
}

/// The voters in effect; of a joint membership, those that are to be.
fn voters(metrics: &CoreMetrics) -> BTreeSet<NodeId> {
    metrics.membership.voters.last().cloned().unwrap_or_default()
}

/// Entries that a member is not known to have.
pub(in crate::engine) fn lag(metrics: &CoreMetrics, node_id: NodeId) -> u64 {
    let next = metrics.last_log.map_or(0, |last| last + 1);
    let matched = metrics.matched.get(&node_id).copied().flatten();
    next.saturating_sub(matched.map_or(0, |matched| matched.index + 1))
}

#[cfg(test)]
mod tests;
