//! Entries from a leader: examined before the core hears of them, and answered with what this node says of itself.

use openraft::EntryPayload;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse};

use super::PeerService;
use super::refusals::Unanswered;
use crate::machine::StateMachine;
use crate::proto::peer::{self as proto, response};
use crate::raft::envelope::Unusable;
use crate::raft::network::plausible::{self, Bearings};
use crate::raft::network::wire;
use crate::raft::type_config::{self, TypeConfig, Vote};
use crate::storage::{DiskState, DiskWatch, Origin, Taken};
use crate::types::{self, LogId, NodeId, check_agreed, check_initial_state};

/// What a leader is told that sends more than there is room for; it tries again.
pub(super) const DISK_FULL: &str = "the disk is full";

impl<M: StateMachine> PeerService<M> {
    pub(super) async fn append(
        &self,
        from: NodeId,
        append: proto::AppendRequest,
    ) -> Result<response::Body, Unanswered> {
        let mut append = wire::from_append(from, append)?;
        let leader_commit = append.leader_commit.as_ref().map(|committed| committed.index);
        let previous = append.prev_log_id;
        let last = append.entries.last().map(|entry| entry.log_id).or(previous);
        let result = match self.deposed(append.vote) {
            // It may well contradict what has been committed since, and is to hear of the newer term.
            Some(newer) => AppendEntriesResponse::HigherVote(newer),
            None => {
                self.examine(&mut append)?;
                // Until they are written.
                let taken = take_entries(&self.callee.disk, &append);
                let _taken = taken.ok_or_else(|| Unanswered::Failed(DISK_FULL.to_owned()))?;
                self.raft.append_entries(append).await.map_err(Unanswered::failed)?
            }
        };
        if !matches!(result, AppendEntriesResponse::HigherVote(_)) {
            self.heard.now();
            if let Some(index) = leader_commit {
                self.activity.told_committed(index);
            }
        }
        let disk = self.callee.disk.state();
        let (unfit_to_lead, disk_stalled) = (!disk.takes_writes(), disk == DiskState::Stalled);
        let response = wire::append_response(result, previous, last);
        let own = proto::AppendResponse {
            unfit_to_lead,
            disk_stalled,
            lease_ms: self.lease_ms(),
            quota_bytes: self.callee.quota_bytes,
            state_differs: self.agreement.is_outvoted(),
            machines: wire::readable_versions(M::MACHINES),
            ..response
        };
        Ok(response::Body::Append(own))
    }

    /// Refuses what the sender of `append` cannot have meant, or what this node could not apply.
    fn examine(&self, append: &mut AppendEntriesRequest<TypeConfig>) -> Result<(), Unanswered> {
        let has_memberships =
            append.entries.iter().any(|entry| matches!(entry.payload, EntryPayload::Membership(_)));
        let bearings = if has_memberships { self.full_bearings(append.vote) } else { self.bearings() };
        bearings.append(append)?;
        // What is known here to be committed is the same there, and is not taken again: this build may have left its version
        // behind, and this node may begin with a snapshot.
        let is_new = |entry: &&type_config::Entry| {
            bearings.committed.is_none_or(|upto| entry.log_id.index > upto.index)
        };
        for entry in append.entries.iter().filter(is_new) {
            if let (EntryPayload::Membership(founders), 0) = (&entry.payload, entry.log_id.index) {
                self.check_founding(&type_config::from_membership(founders))?;
            }
            if let EntryPayload::Normal(command) = &entry.payload {
                let at = type_config::from_log_id(&entry.log_id);
                let examined = plausible::command::<M>(&command.bytes);
                examined.map_err(|why| self.refuse_entry(at, why, append))?;
            }
        }
        let term_at = |index: u64| {
            let found = self.log.upgrade()?.read(index, index + 1, usize::MAX).ok()?;
            found.first().filter(|entry| entry.log_id.index == index).map(|entry| entry.log_id.term)
        };
        Ok(self.statements.take(append, bearings.committed, term_at)?)
    }

    /// Refuses to begin with the log of a cluster that was founded with another state than this node's. One that was restored comes as
    /// a snapshot, a moment later; any other one this node will never have.
    fn check_founding(&self, founders: &types::Membership) -> Result<(), Unanswered> {
        let founding = founders.founding().map(|(_, founding)| founding);
        let versions = founding.map_or(&[][..], |founding| &founding.versions);
        if let Err(unsupported) = versions.iter().try_for_each(|agreed| check_agreed(*agreed, M::MACHINES)) {
            (self.callee.outdated)(unsupported.to_string());
            return Err(Unanswered::failed(unsupported));
        }
        let Err(other) = check_initial_state(founding, self.callee.initial_state) else { return Ok(()) };
        if founding.is_some_and(|founding| !founding.state.is_restored) {
            (self.callee.outdated)(other.to_string());
        }
        Err(Unanswered::failed(other))
    }

    /// Refuses the entry of `append` that stands `at`. One that this build does not read ends the node, if it is committed: all that
    /// follows in the log is out of its reach. Until then it may be taken back, and its leader is not to have proposed it.
    fn refuse_entry(
        &self,
        at: LogId,
        why: Unusable,
        append: &AppendEntriesRequest<TypeConfig>,
    ) -> Unanswered {
        let is_committed = append.leader_commit.as_ref().is_some_and(|committed| committed.index >= at.index);
        if why.unsupported.is_some() && is_committed && append.vote == self.vote() {
            (self.callee.outdated)(format!("entry {at}: {why}"));
        }
        Unanswered::Undecodable { at, why }
    }

    /// The same, with the memberships known here and the last one that the leader with this `vote` has sent, which may not
    /// have got to the core yet.
    fn full_bearings(&self, vote: Vote) -> Bearings {
        let bearings = self.bearings();
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let stored = [&metrics.membership_config, &metrics.committed_membership_config];
        let memberships = stored.into_iter().filter_map(|stored| {
            let at = type_config::from_log_id(stored.log_id().as_ref()?);
            Some((at, stored.membership().get_joint_config().clone()))
        });
        Bearings { memberships: memberships.chain(self.statements.membership(vote)).collect(), ..bearings }
    }
}

/// Takes the commands of `append`, if the disk has room for them. Blank entries and memberships are small, and a new
/// leader answers no read before its first entry is committed: they always pass, and what they have to follow may use
/// room that is not for its own commands.
fn take_entries(disk: &DiskWatch, append: &AppendEntriesRequest<TypeConfig>) -> Option<Taken> {
    let commands = append.entries.iter().filter_map(|entry| match &entry.payload {
        EntryPayload::Normal(command) => Some((entry.log_id.leader_id.term, command.bytes.len())),
        EntryPayload::Blank | EntryPayload::Membership(_) => None,
    });
    let (mut bytes, mut origin) = (0, Origin::EarlierLeaders);
    for (term, length) in commands {
        bytes += length as u64;
        if term == append.vote.leader_id.term {
            origin = Origin::ThisLeader;
        }
    }
    match bytes {
        0 => Some(Taken::default()),
        _ => disk.take_entries(bytes, origin),
    }
}
