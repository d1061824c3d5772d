//! The leader's side: carries out what members pass on.
//!
//! What arrives was encoded by others. It is looked at only by a node that leads, decoded before it is proposed, and proposed
//! as it was encoded, with this node's clocks: a member of an older build may have written a version that others still need.
//! What cannot be decoded is refused, and nothing more.
//!
//! Calls of members take at most half of `max_inflight_bytes` from when they arrive until they are answered, in each
//! [`CallRoom`](crate::raft::network::calls::room::CallRoom), and what they propose counts like this node's own. One that is alone is always taken,
//! however large it may be. Once a call is done its answer counts instead, until that is sent: no more are taken while answers that nobody
//! reads take the room.
//!
//! A call ends with its node, also where it is the last that knows it: it holds the node, and does not keep it running.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, ready};
use tokio::time::timeout;

use crate::engine::write::{EntryOutcome, Writer};
use crate::engine::{Engine, Inner, NewAddresses, NewMember, RequestedChange};
use crate::error::WriteError;
use crate::machine::StateMachine;
use crate::raft::envelope::{self, Content, QuotaChange, Unusable};
use crate::raft::network::calls::room::{Level, Rooms, TakenRoom};
use crate::raft::network::calls::{CallDone, CallError, LeaderCall, MembershipCall, answer_bytes};
use crate::raft::network::service::{CallOutcome, Desk};
use crate::report::MemberList;
use crate::types::{Quota, WriteOptions};

/// Where members find this node once it is one. Holds no handle to it.
pub(in crate::engine) struct LeaderDesk<M: StateMachine> {
    node: OnceLock<Weak<Inner<M>>>,
    /// Bytes of the calls that are under way, and of answers.
    bytes: Rooms<Level>,
}

impl<M: StateMachine> LeaderDesk<M> {
    pub(in crate::engine) fn new() -> Arc<Self> {
        Arc::new(Self { node: OnceLock::new(), bytes: Rooms::default() })
    }

    /// From now on calls are for `node`.
    pub(in crate::engine) fn open(&self, node: Weak<Inner<M>>) {
        assert!(self.node.set(node).is_ok(), "invariant: a desk is one node's");
    }
}

impl<M: StateMachine> Desk for LeaderDesk<M> {
    fn carry_out(&self, call: LeaderCall, patience: Duration) -> BoxFuture<'static, CallOutcome> {
        let operation = call.operation();
        let Some(inner) = self.node.get().and_then(Weak::upgrade) else {
            // It does not lead yet, or not any more.
            return ready(CallOutcome::from(operation.not_leader(None))).boxed();
        };
        let limit = {
            let settings = inner.settings.borrow();
            (settings.max_inflight_bytes / 2).max(settings.max_command_bytes)
        };
        let Some(mut taken) = TakenRoom::of(call.size_bytes(), self.bytes.of(call.room()), limit) else {
            return ready(CallOutcome::from(operation.too_many())).boxed();
        };
        async move {
            let engine = Engine::within(inner);
            let outcome = tokio::select! {
                biased;
                outcome = engine.carry_out(call, patience) => outcome,
                reason = engine.inner.ended() => Err(operation.stopped(reason)),
            };
            taken.becomes(answer_bytes(&outcome));
            CallOutcome { outcome, taken: Some(taken) }
        }
        .boxed()
    }
}

impl<M: StateMachine> Engine<M> {
    /// Does `call`, if this node leads, within `patience`. What was begun by then may go on.
    pub(super) async fn carry_out(
        &self,
        call: LeaderCall,
        patience: Duration,
    ) -> Result<CallDone, CallError> {
        if !self.inner.core.leads() {
            return Err(call.operation().not_leader(self.inner.core.metrics().leader));
        }
        match timeout(patience, self.lead(call, patience).boxed()).await {
            Ok(outcome) => outcome,
            Err(_) => Err(CallError::Other {
                message: format!("it was not done within {} ms", patience.as_millis()),
                maybe_applied: true,
            }),
        }
    }

    async fn lead(&self, call: LeaderCall, patience: Duration) -> Result<CallDone, CallError> {
        match call {
            LeaderCall::Write { envelope, ack, ack_timeout, history } => {
                let options = WriteOptions { slot: None, ack, ack_timeout, history };
                let written = self.write_for_member(&envelope, options, patience).await;
                let written = written.map_err(CallError::Write)?;
                Ok(CallDone::Written {
                    log_id: written.log_id,
                    reply: written.reply,
                    held_by: written.held_by,
                    repeated: written.repeated,
                    history: self.history(),
                })
            }
            LeaderCall::Membership(call) => {
                // What is not proposed in time is said to be so while its caller still listens.
                let changed = self.change_members(change(call), Some(patience - patience / 10)).await;
                let MemberList { position, unchanged, .. } = changed.map_err(CallError::Membership)?;
                Ok(CallDone::Changed { membership_at: position, unchanged })
            }
            LeaderCall::TransferLeader { to } => {
                self.transfer_leader(to).await.map(CallDone::Leads).map_err(CallError::Transfer)
            }
        }
    }

    /// Proposes what another member has sealed. What only a leader writes for itself is refused.
    async fn write_for_member(
        &self,
        sealed: &Bytes,
        options: WriteOptions,
        patience: Duration,
    ) -> EntryOutcome {
        let inner = &self.inner;
        inner.check_size(sealed.len())?;
        let opened = envelope::try_open::<M>(sealed).map_err(|unusable| self.unreadable(unusable))?;
        // Its bytes are what others have to read, in whichever version this build would write the same.
        let sealed_as = envelope::sealed_as(sealed);
        let sealed_as = sealed_as.map_err(|error| WriteError::Undecodable { reason: error.to_string() })?;
        let options_of = |slot| WriteOptions { slot, ..options };
        let plain = WriteOptions { history: options.history, ..WriteOptions::default() };
        match opened.content {
            Content::Command(command, slot) => {
                let wrote = sealed_as.expect("invariant: what holds a command says who wrote it");
                // It is not to take all the time that there is: whether it was proposed would not be known.
                let _ = timeout(patience / 2, inner.until_agreed(wrote)).await;
                self.write_sealed(sealed, (wrote, command), options_of(slot)).await
            }
            Content::OpenSession { .. } | Content::CloseSession { .. } => {
                self.write_envelope_with(Writer::Session, self.stamped(sealed)?, plain).await
            }
            Content::Quota(QuotaChange::Release | QuotaChange::Set(Quota::MIN_BYTES..=Quota::MAX_BYTES)) => {
                self.write_envelope_with(Writer::Node, self.stamped(sealed)?, plain).await
            }
            Content::Quota(QuotaChange::Follow(_) | QuotaChange::Set(_))
            | Content::Clock
            | Content::Agreement(_) => {
                let reason = "it is nothing that members pass on".to_owned();
                Err(WriteError::Undecodable { reason })
            }
        }
    }

    /// What to say of a command that this node cannot open.
    fn unreadable(&self, unusable: Unusable) -> WriteError {
        match unusable.unsupported {
            Some(unsupported) => {
                let missing = vec![self.inner.config.node_id];
                WriteError::VersionNotAgreed { wrote: unsupported.wrote, missing }
            }
            None => WriteError::Undecodable { reason: unusable.reason },
        }
    }
}

fn change(call: MembershipCall) -> RequestedChange {
    match call {
        MembershipCall::Add { node_id, peer, promote, timeout } => {
            RequestedChange::Add { new: NewMember { node_id, peer }, promote, timeout }
        }
        MembershipCall::Promote { node_id, timeout } => RequestedChange::Promote { node_id, timeout },
        MembershipCall::Demote { node_id, force } => RequestedChange::Demote { node_id, force },
        MembershipCall::Remove { node_id, force } => RequestedChange::Remove { node_id, force },
        MembershipCall::Replace { old, node_id, peer, timeout } => {
            RequestedChange::Replace { old, new: NewMember { node_id, peer }, timeout }
        }
        MembershipCall::Update { node_id, peer, client } => {
            RequestedChange::Update { node_id, addresses: NewAddresses { peer, client } }
        }
    }
}

#[cfg(test)]
mod tests;
