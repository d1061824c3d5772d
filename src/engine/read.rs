//! Reads: how fresh the state must be that answers, and how that is made sure on any node.
//!
//! A linearizable read needs a *read index*: a position such that a state that has applied it has seen every
//! write acknowledged before the read began (Raft thesis, §6.4). The leader learns one from a round of
//! heartbeats; a follower asks the leader and waits until it has applied that far itself. Reads that wait at the
//! same time share one confirmation, on the leader and on its way there.
//!
//! A bounded read uses the last read index again for as long as that is fresh enough. Its age is measured on
//! this node's own clock, from before the index was asked for: no message that was under way for long, and
//! no pause of this process, makes a state look fresher than it is.
//!
//! The protocol, with a figure: `docs/design/reads-and-leases.md`.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::{Engine, Inner};
use crate::error::ReadError;
use crate::machine::StateMachine;
use crate::raft::core::{Core, NoReadIndex};
use crate::raft::network::leader_line::{LeaderLine, ReadIndexAnswer};
use crate::raft::pinned::Pinned;
use crate::raft::published::Applied;
use crate::raft::read_index::IndexWaiter;
use crate::runtime::Tasks;
use crate::types::{ClusterClock, HistoryEpoch, LogId, ReadLevel, ReadOptions, ReadWait, Role};

/// Most reads that share one question to the leader; more wait for their turn.
const MAX_SHARED: usize = 65_536;
/// Before a leader is asked or looked for again.
const PAUSE: Duration = Duration::from_millis(10);

/// An answered read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadOutcome<A> {
    /// The position up to which the answering state had been applied.
    pub applied: Option<LogId>,
    /// What the state machine answered.
    pub answer: A,
}

/// Where this node's readers get their read indexes.
#[derive(Debug)]
pub(super) struct ReaderIndexes {
    /// To the task that asks the leader when this node is not it.
    remote: mpsc::Sender<IndexWaiter>,
    /// The freshest read index known, and when it was asked for.
    freshest: Mutex<Option<(u64, Instant)>>,
}

impl ReaderIndexes {
    /// Starts the task that asks leaders, over `leader_line`, and gives up on one after `patience`.
    pub(super) fn start<M: StateMachine>(
        core: Core<M>,
        leader_line: LeaderLine,
        patience: Duration,
        tasks: &Tasks,
    ) -> Self {
        let (remote, arrivals) = mpsc::channel(MAX_SHARED);
        tasks.passing("leader-reads", ask_leader(core, leader_line, arrivals, patience));
        Self { remote, freshest: Mutex::default() }
    }

    /// A read index that was asked for at most `max_lag` ago, if there is one.
    fn within(&self, max_lag: Duration) -> Option<u64> {
        let freshest = self.freshest.lock().expect("invariant: no panic under this lock");
        freshest.filter(|(_, asked)| asked.elapsed() <= max_lag).map(|(index, _)| index)
    }

    fn note(&self, index: u64, asked: Instant) {
        let mut freshest = self.freshest.lock().expect("invariant: no panic under this lock");
        if freshest.is_none_or(|(_, before)| before < asked) {
            *freshest = Some((index, asked));
        }
    }

    /// A read index that covers every write acknowledged before this call.
    async fn next<M: StateMachine>(&self, core: &Core<M>) -> Result<u64, NoReadIndex> {
        let asked = Instant::now();
        let index = match core.shared_read_index().await {
            Err(NoReadIndex::NotLeader(_)) => self.next_remote().await?,
            outcome => outcome?,
        };
        self.note(index, asked);
        Ok(index)
    }

    async fn next_remote(&self) -> Result<u64, NoReadIndex> {
        let stopped = || NoReadIndex::Stopped("the node is shutting down".to_owned());
        let (done, outcome) = oneshot::channel();
        self.remote.send(done).await.map_err(|_| stopped())?;
        outcome.await.map_err(|_| stopped())?
    }
}

/// One question after the other, each for all reads that arrived before it was asked.
async fn ask_leader<M: StateMachine>(
    core: Core<M>,
    leader_line: LeaderLine,
    mut arrivals: mpsc::Receiver<IndexWaiter>,
    patience: Duration,
) {
    let mut waiters = Vec::new();
    while arrivals.recv_many(&mut waiters, MAX_SHARED).await > 0 {
        let outcome = ask_once(&core, &leader_line, patience).await;
        for waiter in waiters.drain(..) {
            // A reader that gave up does not matter.
            let _ = waiter.send(outcome.clone());
        }
    }
}

async fn ask_once<M: StateMachine>(
    core: &Core<M>,
    leader_line: &LeaderLine,
    patience: Duration,
) -> Result<u64, NoReadIndex> {
    let metrics = core.metrics();
    // A leader that hands over still takes itself for one.
    let own = metrics.role == Role::Leader;
    let Some(leader) = metrics.leader.filter(|_| !own) else { return Err(NoReadIndex::NotLeader(None)) };
    let Some(member) = metrics.membership.members.get(&leader.node_id) else {
        return Err(NoReadIndex::NotLeader(None));
    };
    match leader_line.read_index(leader.node_id, member, patience).await {
        Ok(ReadIndexAnswer::Index(index)) => Ok(index),
        Ok(ReadIndexAnswer::NotLeader(_)) => Err(NoReadIndex::NotLeader(None)),
        Ok(ReadIndexAnswer::NoQuorum(reason)) => Err(NoReadIndex::NoQuorum(reason)),
        // Whoever asks may reach the leader although this node does not.
        Err(error) => {
            tracing::debug!(%error, "no read index from the leader");
            Err(NoReadIndex::NotLeader(Some(leader)))
        }
    }
}

/// A state that is read for long, and how much that keeps alive. Clones are of the same state.
#[derive(Debug)]
pub(crate) struct HeldState<V> {
    applied: Arc<Applied<V>>,
    /// How much of what has been replaced since it keeps alive.
    pub(crate) pinned: Pinned,
}

impl<V> Clone for HeldState<V> {
    fn clone(&self) -> Self {
        Self { applied: self.applied.clone(), pinned: self.pinned.clone() }
    }
}

impl<V> HeldState<V> {
    /// `applied`, which keeps alive what `pinned` says.
    pub(crate) fn new(applied: Arc<Applied<V>>, pinned: Pinned) -> Self {
        Self { applied, pinned }
    }

    /// The last entry that was applied.
    pub(crate) fn at(&self) -> LogId {
        self.applied.progress.log_id.unwrap_or_default()
    }

    /// The cluster's clocks there.
    pub(crate) fn clock(&self) -> ClusterClock {
        self.applied.progress.clock
    }

    /// The history that it belongs to.
    pub(crate) fn history(&self) -> HistoryEpoch {
        self.applied.progress.history
    }

    /// The machine.
    pub(crate) fn view(&self) -> &V {
        &self.applied.view
    }
}

impl<M: StateMachine> Engine<M> {
    /// Answers `query` from a state that is as fresh as `options` ask for; a plain [`ReadLevel`] will do.
    ///
    /// Waits for a leader, or for this node to have applied what is needed, for twice the longest election
    /// timeout.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn read(
        &self,
        query: M::Query,
        options: impl Into<ReadOptions>,
    ) -> Result<ReadOutcome<M::Answer>, ReadError> {
        let applied = self.state_at(options.into()).await?;
        Ok(ReadOutcome { applied: applied.progress.log_id, answer: M::query(&applied.view, query) })
    }

    /// Answers `query` from the newest state that anybody has asked for, which costs the machine nothing. `None` when that is
    /// so old that the node no longer has it.
    pub fn read_last(&self, query: M::Query) -> Option<ReadOutcome<M::Answer>> {
        let applied = self.inner.core.published().last_view()?;
        Some(ReadOutcome { applied: applied.progress.log_id, answer: M::query(&applied.view, query) })
    }

    /// A state that is as fresh as `options` ask for, and its position. Any number of queries can be answered from it,
    /// all from the same point in time. Holding it keeps memory that the machine no longer needs.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn view(&self, options: impl Into<ReadOptions>) -> Result<(Option<LogId>, M::View), ReadError>
    where
        M::View: Clone,
    {
        let applied = self.state_at(options.into()).await?;
        Ok((applied.progress.log_id, applied.view.clone()))
    }

    /// [`view`](Self::view), and how much it keeps alive from then on.
    pub(crate) async fn pinned_view(
        &self,
        options: ReadOptions,
    ) -> Result<(Option<LogId>, M::View, Pinned), ReadError>
    where
        M::View: Clone,
    {
        let applied = self.state_at(options).await?;
        let now = self.inner.core.published().watch();
        let pinned = Pinned::new(applied.progress, now, self.inner.pinned_bytes);
        Ok((applied.progress.log_id, applied.view.clone(), pinned))
    }

    /// The present state of this node, of any machine, for who reads it for long.
    pub(crate) async fn held_state(&self) -> Result<HeldState<M::View>, ReadError> {
        let applied = self.state_at(ReadLevel::Local.into()).await?;
        let now = self.inner.core.published().watch();
        let pinned = Pinned::new(applied.progress, now, self.inner.pinned_bytes);
        Ok(HeldState { applied, pinned })
    }

    /// The last entry that this node has applied, and the cluster's clocks there.
    pub(crate) fn applied_clock(&self) -> (Option<LogId>, ClusterClock) {
        let progress = self.inner.core.published().progress();
        (progress.log_id, progress.clock)
    }

    /// A position that includes every write acknowledged before this call, from the leader; this node may not have applied
    /// as much yet. Waits for a leader as a read does.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn present(&self) -> Result<u64, ReadError> {
        let inner = &self.inner;
        if let Some(reason) = inner.fatal.in_words() {
            return Err(ReadError::Stopped { reason });
        }
        inner.counters.read(ReadLevel::Linearizable);
        inner.read_index(Instant::now() + inner.config.timing.patience()).await
    }

    pub(super) async fn state_at(&self, options: ReadOptions) -> Result<Arc<Applied<M::View>>, ReadError> {
        let inner = &self.inner;
        if let Some(reason) = inner.fatal.in_words() {
            return Err(ReadError::Stopped { reason });
        }
        if let Some(divergence) = inner.core.agreement().divergence() {
            return Err(ReadError::Diverged { divergence });
        }
        inner.counters.read(options.level);
        let deadline = Instant::now() + inner.config.timing.patience();
        let index = match options.level {
            ReadLevel::Local => None,
            ReadLevel::Lease => Some(inner.core.lease_index().await.map_err(read_error)?),
            ReadLevel::Linearizable => Some(inner.read_index(deadline).await?),
            ReadLevel::Bounded { max_lag_ms } => {
                match inner.reads.within(Duration::from_millis(max_lag_ms)) {
                    Some(index) => Some(index),
                    None => Some(inner.read_index(deadline).await?),
                }
            }
        };
        let after = (options.after_index > 0).then_some(options.after_index);
        check_history(options.history, inner.core.published().history().epoch())?;
        let applied = match inner.view(index.max(after), deadline).await {
            Err(ReadError::Behind { wanted, .. }) if after == Some(wanted) => {
                return Err(inner.why_not_reached(wanted).await);
            }
            outcome => outcome?,
        };
        assert!(
            index.max(after).is_none_or(|index| index < applied.progress.next_index()),
            "invariant: a state that is read from has all that the read waited for"
        );
        // A node that was just started may have learnt meanwhile which history it holds.
        check_history(options.history, applied.progress.history)?;
        Ok(applied)
    }
}

fn check_history(given: HistoryEpoch, known: HistoryEpoch) -> Result<(), ReadError> {
    match given.differs_from(known) {
        true => Err(ReadError::OtherHistory { given, known }),
        false => Ok(()),
    }
}

impl<M: StateMachine> Inner<M> {
    /// A read index, once there is a leader to get it from.
    pub(super) async fn read_index(&self, deadline: Instant) -> Result<u64, ReadError> {
        let _waiting = self.counters.wait(ReadWait::ReadIndex);
        loop {
            let error = match timeout_at(deadline, self.reads.next(&self.core)).await {
                Ok(Ok(index)) => return Ok(index),
                Ok(Err(error)) => error,
                Err(_) => NoReadIndex::NoQuorum("no leader answered in time".to_owned()),
            };
            // Only the absence of a leader may pass; who is sent elsewhere should go there at once.
            let may_pass = matches!(error, NoReadIndex::NotLeader(None));
            if !may_pass || Instant::now() + PAUSE >= deadline {
                return Err(read_error(error));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Why no state with entry `wanted` was to be had: this node lags, or there is no such entry in the whole cluster.
    async fn why_not_reached(&self, wanted: u64) -> ReadError {
        let applied = self.core.published().progress().log_id.map(|log_id| log_id.index);
        match self.read_index(Instant::now() + self.config.timing.patience()).await {
            Ok(last) if last < wanted => ReadError::Ahead { wanted, last },
            Ok(_) | Err(_) => ReadError::Behind { applied, wanted },
        }
    }

    /// A view of what is applied now, or once entry `index` is, which a leader may have read before it was
    /// committed.
    pub(super) async fn view(
        &self,
        index: Option<u64>,
        deadline: Instant,
    ) -> Result<Arc<Applied<M::View>>, ReadError> {
        let published = self.core.published();
        let ready = index.is_none_or(|index| published.progress().next_index() > index);
        if ready && let Some(view) = published.view_from(published.progress().next_index()) {
            return Ok(view);
        }
        let _waiting = self.counters.wait(ReadWait::Apply);
        let (mut fatal, mut stop) = (self.fatal.subscribe(), self.stop.subscribe());
        let view = async {
            if let Some(index) = index {
                published.wait_applied(index).await;
            }
            self.core.view().await
        };
        tokio::select! {
            biased;
            view = view => Ok(view),
            _ = fatal.wait_for(Option::is_some) => {
                Err(ReadError::Stopped { reason: self.fatal.in_words().unwrap_or_default() })
            }
            _ = stop.wait_for(|stop| *stop) => {
                Err(ReadError::Stopped { reason: "the node is shutting down".to_owned() })
            }
            () = tokio::time::sleep_until(deadline) => {
                let applied = published.progress().log_id.map(|log_id| log_id.index);
                let behind = ReadError::Behind { applied, wanted: index.or(applied).unwrap_or_default() };
                match index {
                    // Whatever there is will do: the apply task is busy.
                    None => published.last_view().ok_or(behind),
                    Some(_) => Err(behind),
                }
            }
        }
    }
}

fn read_error(error: NoReadIndex) -> ReadError {
    match error {
        NoReadIndex::NotLeader(leader) => ReadError::NotLeader { leader },
        NoReadIndex::NoQuorum(reason) => ReadError::NoQuorum { reason },
        NoReadIndex::Stopped(reason) => ReadError::Stopped { reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::WriteOptions;
    use crate::engine::tests::lone;
    use crate::error::WriteError;
    use crate::kv::machine::{KvCommand, KvQuery};

    #[tokio::test]
    async fn reads_that_wait_are_counted_by_what_they_wait_for() {
        // A node that is in no cluster knows no leader and applies nothing.
        let engine = lone::engine(true).await;
        let waiting = || ReadWait::ALL.map(|on| engine.counters().waiting(on));
        let query = || KvQuery::Get { tenant: "t".into(), collection: "c".into(), key: "k".into() };
        let no_leader = engine.read(query(), ReadLevel::Linearizable);
        let not_applied = engine.read(query(), ReadOptions { after_index: 9, ..ReadLevel::Local.into() });
        let reads = async { tokio::join!(no_leader, not_applied) };
        let mut reads = std::pin::pin!(reads);
        assert!(futures::poll!(&mut reads).is_pending());
        assert_eq!(waiting(), [1, 1]);
        let (no_leader, not_applied) = reads.await;
        assert!(no_leader.is_err(), "{no_leader:?}");
        assert!(matches!(not_applied, Err(ReadError::Behind { wanted: 9, .. })));
        assert_eq!(waiting(), [0, 0]);
        engine.shutdown().await;
    }

    #[tokio::test]
    async fn positions_that_are_not_of_this_history_are_refused() {
        let engine = lone::engine(false).await;
        assert!(engine.ready(Duration::from_secs(30)).await);
        let query = || KvQuery::Get { tenant: "t".into(), collection: "c".into(), key: "k".into() };
        let own = engine.history();
        assert_ne!(own, HistoryEpoch::UNKNOWN);
        let other = HistoryEpoch(own.0 ^ 2);
        for level in [ReadLevel::Local, ReadLevel::Lease, ReadLevel::Linearizable] {
            let read = async |after_index, history| {
                engine.read(query(), ReadOptions { level, after_index, history }).await.map(|_| ())
            };
            assert_eq!(read(1, own).await, Ok(()));
            assert_eq!(read(0, HistoryEpoch::UNKNOWN).await, Ok(()));
            assert_eq!(read(1, other).await, Err(ReadError::OtherHistory { given: other, known: own }));
            let ahead = read(1_000_000, own).await;
            assert!(
                matches!(ahead, Err(ReadError::Ahead { wanted: 1_000_000, last }) if last < 10),
                "{ahead:?}"
            );
        }
        let write = async |history| {
            let command = KvCommand::Delete { tenant: "t".into(), collection: "c".into(), key: "k".into() };
            engine.write_with(command, WriteOptions { history, ..WriteOptions::default() }).await.map(|_| ())
        };
        assert!(write(own).await.is_ok());
        let refused = write(other).await.unwrap_err();
        assert!(matches!(refused, WriteError::OtherHistory { given, .. } if given == other), "{refused:?}");
        assert!(!refused.maybe_applied());
        engine.shutdown().await;
    }
}
