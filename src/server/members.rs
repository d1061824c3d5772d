//! What the admin service needs of the node it serves, beside what [`KvNode`] has.

use std::time::Duration;

use super::node::KvNode;
use crate::engine::{Engine, MemberList, NewAddresses, NewMember};
use crate::error::{Leader, MembershipError, SnapshotError, TransferError};
use crate::machine::kv::KvMachine;
use crate::types::{LogId, NodeId};

/// A change that the admin service was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Add { new: NewMember, promote: bool, timeout: Duration },
    Promote { node_id: NodeId, timeout: Duration },
    Demote { node_id: NodeId, force: bool },
    Remove { node_id: NodeId, force: bool },
    Replace { old: NodeId, new: NewMember, timeout: Duration },
    Update { node_id: NodeId, addresses: NewAddresses },
}

/// A member of a cluster. The methods promise what those of [`Engine`] do.
pub(super) trait ClusterNode: KvNode {
    fn members(&self) -> MemberList;

    fn change(&self, change: Change) -> impl Future<Output = Result<MemberList, MembershipError>> + Send;

    fn transfer_leader(
        &self,
        to: Option<NodeId>,
    ) -> impl Future<Output = Result<Leader, TransferError>> + Send;

    fn take_snapshot(&self) -> impl Future<Output = Result<LogId, SnapshotError>> + Send;
}

impl ClusterNode for Engine<KvMachine> {
    fn members(&self) -> MemberList {
        Engine::members(self)
    }

    async fn change(&self, change: Change) -> Result<MemberList, MembershipError> {
        match change {
            Change::Add { new, promote, timeout } => self.add_member(new, promote, timeout).await,
            Change::Promote { node_id, timeout } => self.promote_member(node_id, timeout).await,
            Change::Demote { node_id, force } => self.demote_member(node_id, force).await,
            Change::Remove { node_id, force } => self.remove_member(node_id, force).await,
            Change::Replace { old, new, timeout } => self.replace_member(old, new, timeout).await,
            Change::Update { node_id, addresses } => self.update_member(node_id, addresses).await,
        }
    }

    async fn transfer_leader(&self, to: Option<NodeId>) -> Result<Leader, TransferError> {
        Engine::transfer_leader(self, to).await
    }

    async fn take_snapshot(&self) -> Result<LogId, SnapshotError> {
        Engine::take_snapshot(self).await
    }
}
