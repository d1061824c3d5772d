//! Who leads, told whenever that changes.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use tokio::sync::watch;

use super::state::NodeState;
use crate::engine::Engine;
use crate::error::Leader;
use crate::machine::StateMachine;
use crate::raft::activity::{Activity, Succession};
use crate::types::Role;

/// Who leads, as one node knows.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LeaderChange {
    /// The node's term.
    pub term: u64,
    /// Who leads, and its client address. None while an election goes on, and once the node has stopped. A leader that is
    /// not heard of any more is named until another election begins.
    pub leader: Option<Leader>,
    /// The leader's peer address, `host:port`.
    pub peer: Option<String>,
    /// Whether the leader is the node itself.
    pub is_this_node: bool,
    /// Why it leads, if the node has seen it come to lead.
    pub why: Option<Succession>,
}

impl LeaderChange {
    fn of(state: &NodeState, activity: &Activity) -> Self {
        // One that is being stopped goes on naming the leader that it had for a moment.
        let leader = state.leader.clone().filter(|_| state.role != Role::Stopped);
        let node_id = leader.as_ref().map(|leader| leader.node_id);
        let member = node_id.and_then(|node_id| state.membership.members.get(&node_id));
        Self {
            term: state.term,
            peer: member.map(|member| member.peer.clone()),
            is_this_node: node_id == Some(state.node_id),
            why: node_id.and_then(|node_id| activity.why_leads(state.term, node_id)),
            leader,
        }
    }

    /// Whether it says the same as another one. What is known of the reason is no change.
    fn is_same(&self, other: &Self) -> bool {
        (self.term, &self.leader, &self.peer) == (other.term, &other.leader, &other.peer)
    }
}

/// Who leads now, and then every change of it, as a [`Stream`]. Holds nothing of the node, and ends with it.
pub struct LeaderChanges(BoxStream<'static, LeaderChange>);

impl std::fmt::Debug for LeaderChanges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LeaderChanges").finish_non_exhaustive()
    }
}

impl Stream for LeaderChanges {
    type Item = LeaderChange;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<LeaderChange>> {
        self.0.poll_next_unpin(context)
    }
}

impl<M: StateMachine> Engine<M> {
    /// Who leads now, and then every change of it: another leader or term, none, or other addresses of the same one.
    ///
    /// The first is there at once. Of changes that follow each other more closely than they are taken, only the last is
    /// told, and that always: nothing is kept for a reader that is slow. When the node has stopped, that it knows no leader
    /// is the last, and the stream ends.
    pub fn leader_changes(&self) -> LeaderChanges {
        let activity = self.inner.core.activity().clone();
        let reader = LeaderReader { state: self.watch(), activity, told: None, has_ended: false };
        let changes = stream::unfold(reader, |mut reader| async move {
            let change = reader.next().await?;
            Some((change, reader))
        });
        LeaderChanges(changes.fuse().boxed())
    }
}

struct LeaderReader {
    state: watch::Receiver<NodeState>,
    activity: Arc<Activity>,
    /// What was told last.
    told: Option<LeaderChange>,
    has_ended: bool,
}

impl LeaderReader {
    async fn next(&mut self) -> Option<LeaderChange> {
        while !self.has_ended {
            let (now, role) = {
                let state = self.state.borrow_and_update();
                (LeaderChange::of(&state, &self.activity), state.role)
            };
            self.has_ended = role == Role::Stopped;
            if self.told.as_ref().is_none_or(|told| !told.is_same(&now)) {
                self.told = Some(now.clone());
                return Some(now);
            }
            if !self.has_ended && self.state.changed().await.is_err() {
                // The node is gone without having been stopped.
                self.has_ended = true;
                let none =
                    |told| LeaderChange { leader: None, peer: None, is_this_node: false, why: None, ..told };
                return self.told.take().filter(|told| told.leader.is_some()).map(none);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt;

    use super::*;
    use crate::engine::tests::lone;

    const DEADLINE: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn the_present_leader_is_told_at_once_and_the_end_of_the_node_is_told_last() {
        let engine = lone::engine(false).await;
        assert!(engine.ready(DEADLINE).await);
        let mut changes = engine.leader_changes();
        let first = changes.next().now_or_never().flatten().expect("it is there at once");
        assert!(first.is_this_node && first.why == Some(Succession::Start), "{first:?}");
        assert_eq!(first.leader.as_ref().map(|leader| leader.node_id), Some(1));
        assert_eq!(first.peer.as_deref(), Some("nowhere:1"));
        assert_eq!(first.term, engine.state().term);
        assert!(changes.next().now_or_never().is_none(), "nothing has changed");

        let idle = engine.leader_changes();
        engine.shutdown().await;
        let last = changes.next().await.unwrap();
        assert_eq!((last.leader, last.peer, last.is_this_node), (None, None, false));
        assert_eq!(changes.next().await, None);
        assert_eq!(changes.next().await, None, "and ever after");
        let told: Vec<_> = idle.collect().await;
        assert_eq!(told.len(), 1, "what was not taken in time is told as one: {told:?}");
        assert_eq!(told[0].leader, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_is_dropped_ends_the_stream_without_a_leader() {
        let engine = lone::engine(false).await;
        assert!(engine.ready(DEADLINE).await);
        let mut changes = engine.leader_changes();
        assert!(changes.next().await.unwrap().leader.is_some());
        drop(engine);
        let rest: Vec<_> = tokio::time::timeout(DEADLINE, changes.collect()).await.unwrap();
        assert_eq!(rest.iter().map(|change| change.leader.clone()).collect::<Vec<_>>(), [None]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_term_of_the_same_leader_is_a_change() {
        let engine = lone::engine(false).await;
        assert!(engine.ready(DEADLINE).await);
        let mut changes = engine.leader_changes();
        let first = changes.next().await.unwrap();
        engine.inner.core.give_up_lead(2).await;
        let newest = tokio::time::timeout(DEADLINE, async {
            loop {
                let change = changes.next().await.unwrap();
                if change.is_this_node {
                    return change;
                }
            }
        });
        let newest = newest.await.unwrap();
        assert!(newest.term > first.term && newest.leader == first.leader, "{newest:?}");
        assert!(newest.why.is_some_and(|why| why != Succession::Start), "{newest:?}");
        engine.shutdown().await;
    }
}
