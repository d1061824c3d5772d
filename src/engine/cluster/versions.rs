//! What of its machine the whole cluster reads: who proposes agreements, and commands that wait for one.
//!
//! A node that meets a committed command which its build does not read has to stop. So a new version of a command is not
//! proposed before all members read it. Every member tells its leader what its build reads, with each answer. Once all of
//! them, learners included, read a version that is newer than what was agreed before, the leader writes that into the log
//! (`raft/agreed_versions.rs`). From there on any leader proposes such commands, whoever is down.
//!
//! A member that is added later, or given back an older build, is not asked again: it stops at what it does not read, says so, and keeps
//! its data.
//!
//! The protocol, with a figure: `docs/design/composition.md`.

use std::collections::BTreeMap;
use std::sync::Weak;
use std::time::Duration;

use crate::engine::write::Writer;
use crate::engine::{Engine, Inner};
use crate::error::WriteError;
use crate::machine::StateMachine;
use crate::raft::envelope;
use crate::types::{MachineVersion, NodeId, ReadableVersions, Role, check_version};

/// The members are looked at this often while they or what is applied change.
const PACE: Duration = Duration::from_millis(50);
/// How long a command waits for the agreement that it needs: all members may just have been upgraded, or have met.
const PATIENCE: Duration = Duration::from_secs(2);
/// A leader that has lost its quorum is not waited for any longer.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);

/// What each member's build reads; `None` for a member that has not said so.
type ReadsTold = BTreeMap<NodeId, Option<Vec<ReadableVersions>>>;

/// What is to be agreed on next, when `agreed` is. One machine at a time, the newest version that all read.
fn due(
    own: &[ReadableVersions],
    agreed: impl Fn(MachineVersion) -> bool,
    told: &ReadsTold,
) -> Option<MachineVersion> {
    own.iter().find_map(|own| {
        let read = |reads: &Option<Vec<ReadableVersions>>| {
            reads.as_ref()?.iter().find(|reads| reads.machine == own.machine).copied()
        };
        let all: Option<Vec<ReadableVersions>> = told.values().map(read).collect();
        let version = all?.iter().map(|reads| reads.newest).fold(own.newest, u32::min);
        let version = MachineVersion { machine: own.machine, version };
        let is_read = |reads: &Option<Vec<ReadableVersions>>| {
            read(reads).is_some_and(|reads| reads.contains(version.version))
        };
        (!agreed(version) && own.contains(version.version) && told.values().all(is_read)).then_some(version)
    })
}

/// Proposes agreements while this node leads, for as long as there is a handle to it. Ends at once for a machine that needs
/// none.
pub(in crate::engine) async fn run<M: StateMachine>(node: Weak<Inner<M>>) {
    if M::MACHINES == [ReadableVersions::FIRST] {
        return;
    }
    let Some((mut state, mut peers)) =
        node.upgrade().map(|inner| (inner.state.clone(), inner.core.peer_changes()))
    else {
        return;
    };
    loop {
        // Before anything is looked at.
        peers.borrow_and_update();
        let leads = state.borrow_and_update().role == Role::Leader;
        let Some(inner) = node.upgrade() else { return };
        if !leads {
            inner.core.forget_peer_reads();
        }
        match inner.version_due().filter(|_| leads) {
            Some(version) => agree(&Engine::within(inner), version).await,
            None => {
                drop(inner);
                // Who leads, who is a member, what is applied, and what members say.
                tokio::select! {
                    Ok(()) = state.changed() => {}
                    Ok(()) = peers.changed() => {}
                    else => return,
                }
            }
        }
        tokio::time::sleep(PACE).await;
    }
}

async fn agree<M: StateMachine>(engine: &Engine<M>, version: MachineVersion) {
    let envelope = envelope::seal_agreement(engine.inner.reading(), version);
    let written = engine.write_envelope(Writer::Node, envelope);
    match tokio::time::timeout(WRITE_PATIENCE, written).await {
        Ok(Ok(written)) => {
            let log_id = written.log_id;
            tracing::info!(%version, %log_id, "all members read this version: commands of it are taken from now on");
        }
        Ok(Err(error)) => tracing::debug!(%error, "nothing was agreed on; it is proposed again"),
        Err(_) => tracing::debug!("nothing is agreed on in time; it is proposed again"),
    }
}

impl<M: StateMachine> Engine<M> {
    /// The versions up to which the members have agreed to take commands, one for each machine that has any, as far as this
    /// node has applied them. Commands of [newer ones](StateMachine::command_version) are refused.
    pub fn agreed_versions(&self) -> Vec<MachineVersion> {
        self.inner.core.agreed_versions().versions()
    }
}

impl<M: StateMachine> Inner<M> {
    fn version_due(&self) -> Option<MachineVersion> {
        let agreed = self.core.agreed_versions();
        due(M::MACHINES, |version| agreed.contain(version), &self.reads_told())
    }

    /// What each member's build reads, as far as it has told this node, its leader.
    fn reads_told(&self) -> ReadsTold {
        let told = self.core.peer_reads();
        let members = self.core.metrics().membership.members;
        let reads = |node_id: &NodeId, incarnation| match *node_id == self.config.node_id {
            true => Some(M::MACHINES.to_vec()),
            false => told.get(node_id).filter(|(by, _)| *by == incarnation).map(|(_, reads)| reads.clone()),
        };
        members.iter().map(|(node_id, member)| (*node_id, reads(node_id, member.incarnation))).collect()
    }

    fn leads(&self) -> bool {
        self.state.borrow().role == Role::Leader
    }

    /// Waits for a while in which it may be agreed what a machine `wrote`. To be called where nobody but the caller waits.
    pub(in crate::engine) async fn until_agreed(&self, wrote: MachineVersion) {
        let agreed = self.core.agreed_versions();
        if !agreed.contain(wrote) && self.leads() {
            agreed.wait_for(wrote, PATIENCE).await;
        }
    }

    /// Refuses a command that a machine `wrote` in a version that not all members read.
    pub(in crate::engine) fn check_agreed(&self, wrote: MachineVersion) -> Result<(), WriteError> {
        if self.core.agreed_versions().contain(wrote) {
            return Ok(());
        }
        // Not for the core to say: it may lead by now.
        if !self.leads() {
            let leader = self.state.borrow().leader.clone();
            return Err(WriteError::NotLeader { leader });
        }
        // A leader before it may not have applied the agreement that its log holds: it cannot tell yet.
        let applied = self.core.published().progress().log_id;
        if applied.is_none_or(|applied| applied.term < self.core.metrics().term) {
            return Err(WriteError::NotLeader { leader: None });
        }
        let lacks = |reads: &Option<Vec<ReadableVersions>>| {
            reads.as_ref().is_none_or(|reads| check_version(wrote, reads).is_err())
        };
        let told = self.reads_told();
        let missing = told.iter().filter(|(_, reads)| lacks(reads)).map(|(node_id, _)| *node_id).collect();
        Err(WriteError::VersionNotAgreed { wrote, missing })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads(machine: u16, oldest: u32, newest: u32) -> ReadableVersions {
        ReadableVersions { machine, oldest, newest }
    }

    fn of(machine: u16, version: u32) -> MachineVersion {
        MachineVersion { machine, version }
    }

    fn next(
        own: &[ReadableVersions],
        agreed: MachineVersion,
        others: &[Option<&[ReadableVersions]>],
    ) -> Option<MachineVersion> {
        let others = others.iter().map(|reads| reads.map(<[ReadableVersions]>::to_vec));
        let told = (1..).zip(std::iter::once(Some(own.to_vec())).chain(others)).collect();
        due(own, |version| version == MachineVersion::FIRST || version <= agreed, &told)
    }

    #[test]
    fn a_version_is_agreed_on_once_all_read_it() {
        let own = [reads(0, 0, 3)];
        let first = MachineVersion::FIRST;
        assert_eq!(next(&own, first, &[]), Some(of(0, 3)), "it is alone");
        assert_eq!(next(&own, first, &[None, Some(&own)]), None, "one has not said");
        assert_eq!(next(&own, first, &[Some(&[reads(0, 0, 2)]), Some(&own)]), Some(of(0, 2)));
        assert_eq!(next(&own, of(0, 2), &[Some(&[reads(0, 0, 2)]), Some(&own)]), None);
        assert_eq!(next(&own, of(0, 2), &[Some(&[reads(0, 0, 9)]), Some(&own)]), Some(of(0, 3)));
        assert_eq!(next(&own, first, &[Some(&[ReadableVersions::FIRST])]), None, "of before");
        assert_eq!(next(&own, first, &[Some(&[reads(0, 4, 9)])]), None, "nothing that both read");
    }

    #[test]
    fn a_machine_that_one_member_does_not_have_is_not_agreed_on() {
        let own = [reads(0, 0, 0), reads(4, 0, 1)];
        assert_eq!(next(&own, MachineVersion::FIRST, &[Some(&[ReadableVersions::FIRST])]), None);
        assert_eq!(next(&own, MachineVersion::FIRST, &[Some(&own)]), Some(of(4, 1)));
        assert_eq!(
            next(&own, MachineVersion::FIRST, &[Some(&[reads(0, 0, 0), reads(4, 0, 0)])]),
            Some(of(4, 0))
        );
        assert_eq!(next(&own, of(4, 1), &[Some(&own)]), None);
    }
}
