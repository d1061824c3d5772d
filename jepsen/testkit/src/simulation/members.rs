//! Members that come and go while everything else goes wrong: added, promoted, removed, wiped and taken back.
//!
//! A disk is wiped only while all voters of the present membership still have theirs: losing the disks of a majority
//! loses data, whatever the code does.

use std::collections::BTreeSet;
use std::time::Duration;

use quorate::{Engine, MemberList, NewMember};
use quorate::{FatalError, MembershipError};
use quorate::{NodeId, Role};
use rand::RngExt;
use tokio::time::Instant;

use super::disk::Disk;
use super::network::address;
use super::subject::{MachineOf, Subject};
use super::world::{LIVENESS, POLL, World};

/// An operator waits this long for a change.
const PATIENCE: Duration = Duration::from_secs(4);
/// How long a learner may take to catch up.
const CATCH_UP: Duration = Duration::from_secs(2);
/// A change goes on when its operator has given up, but not for longer than this.
const UNDER_WAY: Duration = Duration::from_secs(40);
/// Fewer voters are left alone, so that crashes leave a majority now and then.
const FEWEST_VOTERS: usize = 3;

impl<S: Subject> World<S> {
    /// The node that leads the highest term, as it says itself.
    pub fn leading(&self) -> Option<Engine<MachineOf<S>>> {
        let engines = self.engines.lock().unwrap();
        let leading = engines.values().filter(|engine| engine.state().role == Role::Leader);
        leading.max_by_key(|engine| engine.state().term).cloned()
    }

    fn pick(&mut self, ids: &[NodeId]) -> Option<NodeId> {
        (!ids.is_empty()).then(|| ids[self.rng.random_range(0..ids.len())])
    }

    /// Makes one change of the membership, if somebody leads.
    pub(super) async fn change_members(&mut self) {
        let Some(leader) = self.leading() else { return };
        let list = leader.members();
        let own = leader.state().node_id;
        let voters: Vec<NodeId> = list.members.iter().filter(|m| m.voter).map(|m| m.node_id).collect();
        let members: Vec<NodeId> = list.members.iter().map(|member| member.node_id).collect();
        let others: Vec<NodeId> = members.iter().copied().filter(|id| *id != own).collect();
        let spare: Vec<NodeId> = self.ids().into_iter().filter(|id| !members.contains(id)).collect();
        match (self.wiped, self.rng.random_range(0..10)) {
            (Some(id), 0..5) => self.take_back(&leader, id).await,
            (None, 0..2) if voters.len() >= FEWEST_VOTERS => {
                let Some(id) = self.pick(&others) else { return };
                self.wipe(id).await;
                self.wiped = Some(id);
                self.take_back(&leader, id).await;
            }
            (_, 2..6) => {
                let Some(id) = self.pick(&spare) else { return };
                self.prepare_to_join(id).await;
                let promote = self.rng.random_bool(0.8);
                let added =
                    leader.add_member(NewMember { node_id: id, peer: address(id) }, promote, CATCH_UP);
                self.attempt("add", id, added).await;
            }
            (_, 6..8) if voters.len() > FEWEST_VOTERS => {
                // The leader too: it hands over.
                let Some(id) = self.pick(&members) else { return };
                if self.attempt("remove", id, leader.remove_member(id, false)).await {
                    self.retired.insert(id);
                }
            }
            (_, 8) if voters.len() > FEWEST_VOTERS => {
                let Some(id) = self.pick(&voters) else { return };
                self.attempt("demote", id, leader.demote_member(id, false)).await;
            }
            (_, _) => {
                let learners: Vec<_> = members.iter().copied().filter(|id| !voters.contains(id)).collect();
                let Some(id) = self.pick(&learners) else { return };
                self.attempt("promote", id, leader.promote_member(id, CATCH_UP)).await;
            }
        }
    }

    /// The cluster takes a wiped node back under its old id.
    async fn take_back(&mut self, leader: &Engine<MachineOf<S>>, id: NodeId) {
        if !self.engines.lock().unwrap().contains_key(&id) {
            self.start(id).await;
        }
        let new = NewMember { node_id: id, peer: address(id) };
        if self.attempt("replace", id, leader.replace_member(id, new, CATCH_UP)).await {
            self.wiped = None;
            self.outcome.count("wiped nodes taken back", 1);
        }
    }

    async fn attempt(
        &mut self,
        what: &str,
        id: NodeId,
        change: impl Future<Output = Result<MemberList, MembershipError>>,
    ) -> bool {
        let outcome = tokio::time::timeout(PATIENCE, change).await;
        self.trace.record(format_args!("{what} {id}: {outcome:?}"));
        let done = matches!(outcome, Ok(Ok(_)));
        self.outcome.count("changes of the membership", u64::from(done));
        done
    }

    /// Loses a node's disk; it comes back with an empty one.
    async fn wipe(&mut self, id: NodeId) {
        self.crash(id).await;
        let lying = self.scenario.lying_disk;
        let node = self.nodes.get_mut(&id).unwrap();
        node.incarnation += 1 << 32;
        node.disk = Disk::new(self.seed ^ id ^ node.incarnation as u64, lying);
        node.joins = true;
        self.trace.record(format_args!("wipe {id}"));
        self.start(id).await;
    }

    /// A node that is no member waits to be added: with an empty disk, if it is certain that it was removed.
    async fn prepare_to_join(&mut self, id: NodeId) {
        if self.retired.remove(&id) {
            self.wipe(id).await;
            return;
        }
        let stopped =
            self.engines.lock().unwrap().get(&id).is_none_or(|engine| engine.state().fatal.is_some());
        self.nodes.get_mut(&id).unwrap().joins = true;
        if stopped {
            self.crash(id).await;
            self.start(id).await;
        }
    }

    /// Whether a node may have stopped like this: the membership was changed, and it is to notice.
    pub(super) fn may_stop(&self, fatal: &FatalError) -> bool {
        self.scenario.spare > 0 && matches!(fatal, FatalError::Removed { .. })
    }

    /// On a healed cluster every change succeeds. Only members are left in the end.
    pub(super) async fn settle_members(&mut self) {
        if self.scenario.spare == 0 {
            return;
        }
        // What was begun under faults may be made yet, and change who is a member after that was looked at.
        tokio::time::sleep(UNDER_WAY).await;
        let deadline = Instant::now() + LIVENESS;
        loop {
            assert!(Instant::now() < deadline, "healed, but members are not settled: {:?}", self.states());
            tokio::time::sleep(POLL).await;
            let Some(leader) = self.leading() else { continue };
            if let Some(id) = self.wiped {
                self.take_back(&leader, id).await;
                continue;
            }
            let list = leader.members();
            let all_answer = list.members.iter().all(|member| member.reachable == Some(true));
            if list.joint == Some(false) && all_answer {
                let members: BTreeSet<NodeId> = list.members.iter().map(|member| member.node_id).collect();
                for id in self.ids() {
                    if !members.contains(&id) {
                        self.crash(id).await;
                        self.nodes.remove(&id);
                    }
                }
                return;
            }
            // A member that took itself for removed, and was added again since.
            for member in list.members {
                self.prepare_to_join(member.node_id).await;
            }
        }
    }
}
