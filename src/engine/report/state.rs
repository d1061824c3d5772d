//! A node's state: what there is to watch, and what follows from it for those who send requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use crate::engine::cluster::formation::Forming;
use crate::engine::stop::fatal::Fatal;
use crate::engine::stop::until_ended;
use crate::error::{FatalError, Leader};
use crate::machine::StateMachine;
use crate::raft::core::{Core, CoreMetrics};
use crate::storage::{DiskState, DiskWatch};
use crate::types::{Divergence, LogId, Membership, NodeId, Role};

/// Changes closer together than this are reported as one.
const PACE: Duration = Duration::from_millis(5);

/// A state that has just changed, or that is to get better, is looked at again after this long even when nothing is told.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// A committed entry that has waited for so long to be applied is not just under way.
const OVERDUE_AFTER: Duration = Duration::from_secs(10);

/// A node's view of itself and its cluster. Cheap: nothing is computed to tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NodeState {
    /// This node.
    pub node_id: NodeId,
    /// What it is at present.
    pub role: Role,
    /// Its term.
    pub term: u64,
    /// Whom it follows.
    pub leader: Option<Leader>,
    /// Whether it has heard from its leader, or as the leader from a quorum, a short while ago.
    pub in_touch: bool,
    /// Index of its last log entry, durable or not.
    pub last_log: Option<u64>,
    /// Up to where it knows the log to be committed.
    pub committed: Option<LogId>,
    /// Up to where it has applied.
    pub applied: Option<LogId>,
    /// Whether it has heard of a committed entry ten seconds ago that it has not applied yet.
    pub overdue: bool,
    /// Last position covered by its newest snapshot.
    pub snapshot: Option<LogId>,
    /// Up to where it has purged its log.
    pub purged: Option<LogId>,
    /// The membership in effect.
    pub membership: Membership,
    /// What its disk is good for.
    pub disk: DiskState,
    /// Set while this node's state is known to differ from the others': it serves nothing then.
    pub diverged: Option<Divergence>,
    /// What it waits for before it belongs to a cluster; none once it does.
    pub forming: Option<Forming>,
    /// Set when the node has stopped because of an error.
    pub fatal: Option<FatalError>,
}

/// Why no requests should be sent to a node at present. Shown as a word, which stays what it is, and what there is to say.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotReady {
    /// It has met an error that ended it.
    #[error("stopped: {0}")]
    Stopped(FatalError),
    /// It is being stopped.
    #[error("stopping: the node was told to stop")]
    Stopping,
    /// It belongs to no cluster yet.
    #[error("forming: {0}")]
    Forming(Forming),
    /// It knows of no leader.
    #[error("no_leader: no leader is known; a majority of the voters must reach each other to elect one")]
    NoLeader,
    /// It has not heard from its leader, or as the leader from a quorum, for a while.
    #[error("out_of_touch: node {leader} leads, as far as is known, but {}", if *.own { "a majority of the voters does not answer it" } else { "has not been heard of for a while" })]
    OutOfTouch {
        /// Who leads.
        leader: NodeId,
        /// Whether that is the node itself.
        own: bool,
    },
    /// Its state is not that of the other nodes at the same position: it serves nothing.
    #[error("diverged: {0}; rebuild this node from its peers")]
    Diverged(Divergence),
    /// It has not applied what it knows to be committed.
    #[error("behind: applied {applied} of {committed} committed entries")]
    Behind {
        /// Index of the last entry applied.
        applied: u64,
        /// Index of the last entry known to be committed.
        committed: u64,
    },
    /// Its disk is full. It answers reads.
    #[error("disk_full: the disk is full: the node answers reads, and takes no writes until there is room")]
    DiskFull,
    /// Its disk hangs. It answers reads while it hears its leader.
    #[error(
        "disk_stalled: a write to the disk does not come back: the node takes no writes meanwhile, and answers reads while it hears its leader"
    )]
    DiskStalled,
}

impl NodeState {
    /// That of one who is no member of the cluster that it follows, and has applied nothing.
    pub(crate) fn of_no_member() -> Self {
        Self {
            node_id: 0,
            role: Role::Learner,
            term: 0,
            leader: None,
            in_touch: false,
            last_log: None,
            committed: None,
            applied: None,
            overdue: false,
            snapshot: None,
            purged: None,
            membership: Membership::default(),
            disk: DiskState::Ok,
            diverged: None,
            forming: None,
            fatal: None,
        }
    }

    /// Whether requests of every kind should be sent to the node.
    ///
    /// # Errors
    /// Why not. A node whose disk is full or hangs may still be [ready](Self::is_ready) to answer reads.
    pub fn readiness(&self) -> Result<(), NotReady> {
        let waits = |why: &NotReady| {
            matches!(why, NotReady::NoLeader | NotReady::OutOfTouch { .. } | NotReady::Behind { .. })
        };
        match (self.readiness_for_reads(), self.disk) {
            // A vote for another leader waits for the disk as well, and whoever led believes that it still does.
            (Err(why), DiskState::Stalled) if waits(&why) => Err(NotReady::DiskStalled),
            (Err(why), _) => Err(why),
            (Ok(()), DiskState::Full) => Err(NotReady::DiskFull),
            (Ok(()), DiskState::Stalled) => Err(NotReady::DiskStalled),
            (Ok(()), DiskState::Ok | DiskState::Low) => Ok(()),
        }
    }

    /// Whether reads should be sent to the node.
    pub(crate) fn readiness_for_reads(&self) -> Result<(), NotReady> {
        let index = |position: Option<LogId>| position.map_or(0, |log_id| log_id.index);
        if let (None, Some(divergence)) = (&self.fatal, &self.diverged) {
            return Err(NotReady::Diverged(divergence.clone()));
        }
        match (&self.fatal, &self.forming, &self.leader) {
            (Some(fatal), _, _) => return Err(NotReady::Stopped(fatal.clone())),
            (None, _, _) if self.role == Role::Stopped => return Err(NotReady::Stopping),
            (None, Some(forming), _) => return Err(NotReady::Forming(forming.clone())),
            (None, None, None) => return Err(NotReady::NoLeader),
            (None, None, Some(leader)) if !self.in_touch => {
                let (leader, own) = (leader.node_id, leader.node_id == self.node_id);
                return Err(NotReady::OutOfTouch { leader, own });
            }
            (None, None, Some(_)) => {}
        }
        if !self.is_ready() {
            let (applied, committed) = (index(self.applied), index(self.committed));
            return Err(NotReady::Behind { applied, committed });
        }
        Ok(())
    }

    /// Whether the node follows or leads, and has applied what it knows to be committed, give or take what
    /// is just under way.
    pub fn is_ready(&self) -> bool {
        /// Entries that may wait to be applied on a node under load.
        const UNDER_WAY: u64 = 1_000;
        let committed = self.committed.map_or(0, |log_id| log_id.index);
        let applied = self.applied.map_or(0, |log_id| log_id.index);
        self.fatal.is_none()
            && self.role != Role::Stopped
            && self.diverged.is_none()
            && self.leader.is_some()
            && self.in_touch
            && !self.overdue
            && applied + UNDER_WAY >= committed
    }
}

/// The node's state at this moment.
pub(in crate::engine) fn observe<M: StateMachine>(
    core: &Core<M>,
    metrics: &CoreMetrics,
    node_id: NodeId,
    disk: &DiskWatch,
    forming: &watch::Receiver<Option<Forming>>,
    fatal: Option<FatalError>,
) -> NodeState {
    let fatal = fatal.or_else(|| metrics.fatal.clone().map(FatalError::Core));
    let progress = core.published().progress();
    let waits = core.told_committed(progress.next_index());
    NodeState {
        node_id,
        role: if fatal.is_some() { Role::Stopped } else { metrics.role },
        term: metrics.term,
        // openraft goes on naming the leader that it had, after an error and after it was stopped.
        leader: metrics.leader.clone().filter(|_| fatal.is_none() && metrics.role != Role::Stopped),
        in_touch: metrics.in_touch,
        last_log: metrics.last_log,
        committed: metrics.committed.max(metrics.cluster_committed),
        applied: progress.log_id,
        overdue: waits.is_some_and(|waits| waits > OVERDUE_AFTER),
        snapshot: metrics.snapshot,
        purged: metrics.purged,
        membership: metrics.membership.clone(),
        disk: disk.state(),
        diverged: core.agreement().divergence(),
        forming: forming.borrow().clone(),
        fatal,
    }
}

/// Sees the node's state where there is no handle to ask: while the node is assembled, and when it ends.
pub(in crate::engine) struct StateObserver<M: StateMachine> {
    pub(in crate::engine) core: Core<M>,
    pub(in crate::engine) node_id: NodeId,
    pub(in crate::engine) disk: DiskWatch,
    pub(in crate::engine) forming: watch::Receiver<Option<Forming>>,
}

impl<M: StateMachine> StateObserver<M> {
    pub(in crate::engine) fn observe(&self, fatal: Option<FatalError>) -> NodeState {
        observe(&self.core, &self.core.metrics(), self.node_id, &self.disk, &self.forming, fatal)
    }

    /// After how long to look again although nothing has been told, because what `now` shows may change by itself.
    fn look_again(&self, now: &NodeState, is_news: bool) -> Option<Duration> {
        if now.role == Role::Stopped {
            return None;
        }
        // What has changed may have changed only in part. And that the leader is heard again is no event.
        if is_news || now.role == Role::Candidate || now.leader.is_none() || !now.in_touch {
            return Some(LOOK_AGAIN);
        }
        let waits = self.core.told_committed(self.core.published().progress().next_index());
        let overdue_in = waits.map(|waits| OVERDUE_AFTER.saturating_sub(waits)).filter(|_| !now.overdue);
        // At that moment it is still so.
        let past = |due: Duration| due + Duration::from_millis(1);
        [self.core.in_touch_for(), overdue_in].into_iter().flatten().min().map(past)
    }
}

/// Waits for so long, or for ever.
pub(in crate::engine) async fn after(pause: Option<Duration>) {
    match pause {
        Some(pause) => tokio::time::sleep(pause).await,
        None => std::future::pending().await,
    }
}

/// Whom a node knows as its leader, and in which term. Many may wait for another one, and few of the changes of a state are
/// that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::engine) struct TermLeader {
    pub(in crate::engine) term: u64,
    pub(in crate::engine) node_id: Option<NodeId>,
}

impl TermLeader {
    fn of(state: &NodeState) -> Self {
        Self { term: state.term, node_id: state.leader.as_ref().map(|leader| leader.node_id) }
    }
}

/// Keeps `state` up to date, and with it `leader`, and turns a core that failed into a fatal error.
pub(in crate::engine) async fn run<M: StateMachine>(
    observer: StateObserver<M>,
    (state, leader): (watch::Sender<NodeState>, watch::Sender<TermLeader>),
    fatal: Fatal,
    stopping: Arc<AtomicBool>,
) {
    let (core, mut forming) = (&observer.core, observer.forming.clone());
    let mut changes = core.changes();
    let mut progress = core.published().watch();
    let mut divergence = core.agreement().changes();
    let mut disk = observer.disk.changes();
    let mut fatal_rx = fatal.subscribe();
    let mut was_told = true;
    loop {
        let now = observer.observe(fatal_rx.borrow_and_update().clone());
        if let Some(error) = &now.fatal {
            fatal.report(error.clone());
        }
        let look_again = observer.look_again(&now, was_told || *state.borrow() != now);
        leader.send_if_modified(|known| std::mem::replace(known, TermLeader::of(&now)) != *known);
        state.send_if_modified(|current| {
            // An end that was told meanwhile is not taken back.
            let is_older = current.fatal.is_some() && now.fatal.is_none();
            let changed = !is_older && *current != now;
            if changed {
                *current = now;
            }
            changed
        });
        let (alive, is_told) = tokio::select! {
            biased;
            alive = changes.changed() => (alive, true),
            changed = progress.changed() => (changed.is_ok(), true),
            _ = fatal_rx.changed() => (true, true),
            // Its end is the end of the forming.
            Ok(()) = forming.changed() => (true, true),
            Ok(()) = divergence.changed() => (true, true),
            () = disk.changed() => (true, true),
            () = core.noticed() => (true, true),
            () = after(look_again) => (true, false),
        };
        if !alive {
            if !stopping.load(Ordering::Acquire) {
                fatal.report(FatalError::Core(core.cause_of_death().await));
            }
            let now = observer.observe(fatal.reason());
            state.send_replace(NodeState { role: Role::Stopped, leader: None, ..now });
            return until_ended().await;
        }
        was_told = is_told;
        if is_told {
            tokio::time::sleep(PACE).await;
        }
    }
}
