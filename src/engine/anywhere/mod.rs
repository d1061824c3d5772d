//! Calls that only the leader carries out, from whichever node.
//!
//! On the leader they are what the methods of the same names are. Any other node passes them on over its own line to its
//! leader (`raft/network/leader_line.rs`) and answers what the leader answers; there, `desk` carries them out. What was passed on
//! is not passed on again: a node that does not lead says who does.
//!
//! # Outcomes
//!
//! An error says as truly as that of a local call whether the call may have been carried out. What never left this node, and what
//! the leader refused, was not. What left, and has no answer, may have been. A leader of a build that knows no such calls has
//! not carried one out, and is not asked again.
//!
//! # Repetitions
//!
//! Within its patience a call is repeated, with whoever leads then, as long as certainly nothing was done: no leader is known, none is
//! reached, or the one that was asked does not lead or has lost its quorum. What may have been done is repeated only where the
//! log tells a repetition from another call: a write in its place in a session, and the opening and the end of a session. These are
//! then repeated where there is no room for them at present, too: their callers could do nothing else. A call whose leader has been
//! replaced is given up a little later: it may hang.
//!
//! # Bounds
//!
//! Commands that are passed on count as in flight on this node, in `max_inflight_bytes`, while they wait for a leader too. At
//! most [`MOST_CALLS`](crate::raft::network::calls::MOST_CALLS) calls are on their way. Writes that wait for all voters have both bounds
//! for themselves: a voter that is down keeps out no others. The leader bounds both again, for it cannot know what others keep to.
//!
//! The protocol, with a figure: `docs/design/forwarding.md`.

pub(super) mod desk;
mod passing;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use self::passing::Repeats;
use super::cluster::membership::check_address;
use super::write::{applied, check_ack, decoded};
use super::{Acknowledged, ClosedSession, Engine, NewAddresses, NewMember, QuotaError, Written};
use crate::error::{Leader, MembershipError, TransferError, WriteError};
use crate::machine::StateMachine;
use crate::machine::sessions::WINDOW;
use crate::raft::envelope::{self, UNSTAMPED};
use crate::raft::network::calls::{CallDone, LONGEST_PATIENCE, LeaderCall, MembershipCall};
use crate::report::MemberList;
use crate::runtime;
use crate::session::{Session, Ticket};
use crate::types::{AckLevel, HistoryEpoch, LogId, NodeId, SessionSlot, WriteOptions};

/// For how long a call from anywhere looks for a leader that carries it out, unless it says otherwise.
pub const ANYWHERE_PATIENCE: Duration = Duration::from_secs(10);

/// What only the leader carries out, from whichever node: see [`Engine::anywhere`].
pub struct Anywhere<M: StateMachine> {
    engine: Engine<M>,
    patience: Duration,
}

impl<M: StateMachine> Clone for Anywhere<M> {
    fn clone(&self) -> Self {
        Self { engine: self.engine.clone(), patience: self.patience }
    }
}

impl<M: StateMachine> std::fmt::Debug for Anywhere<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Anywhere").field("patience", &self.patience).finish_non_exhaustive()
    }
}

impl<M: StateMachine> Engine<M> {
    /// This node's calls to whoever leads, itself included. Cheap; a call that does not say otherwise has [`ANYWHERE_PATIENCE`].
    ///
    /// # Promises
    ///
    /// - Each method is what the engine's method of the same name is on the leader, with the same errors; those that speak of
    ///   "this node" speak of the leader. A [`ForwardError`](crate::ForwardError) is added: that the leader was not reached, or its answer lost.
    /// - A hand-over or the loss of a leader on the way loses nothing that was acknowledged and does nothing twice. A write without a session
    ///   whose outcome is not known is not repeated; its error says that it [may have been applied](WriteError::maybe_applied).
    /// - Once a call returns, this node has applied what it has written, and knows the membership that it has made, so that whatever is asked
    ///   here next sees that. A node that is behind is waited for until the call's patience is over, and at least for twice the longest
    ///   election timeout; then the outcome is returned all the same, with `applied_here` false, or a list that
    ///   [is behind](MemberList::is_behind).
    /// - Nothing else is waited for beyond the call's patience: a leader that hangs, or has not finished by then, is [lost](crate::ForwardError::Lost).
    ///
    /// [`list_sessions`](Self::list_sessions), [`members`](Self::members) and all reads answer on every node by themselves.
    ///
    /// ```no_run
    /// # use quorate::{Engine, kv::machine::{KvCommand, KvMachine}};
    /// # async fn of(node: Engine<KvMachine>, put: KvCommand) -> Result<(), Box<dyn std::error::Error>> {
    /// let anywhere = node.anywhere();
    /// let session = anywhere.open_session(std::time::Duration::ZERO).await?;
    /// let ticket = session.begin().ok_or("the window is full")?;
    /// let written = anywhere.write_in(&ticket, put).await?;
    /// let members = anywhere.remove_member(3, false).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn anywhere(&self) -> Anywhere<M> {
        Anywhere { engine: self.clone(), patience: ANYWHERE_PATIENCE }
    }

    /// As [`write`](Self::write), from whichever node: [`anywhere`](Self::anywhere) says what that promises.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn write_anywhere(&self, command: M::Command) -> Result<Written<M::Reply>, WriteError> {
        self.anywhere().write(command).await
    }

    /// As [`write_with`](Self::write_with), from whichever node: [`anywhere`](Self::anywhere) says what that promises.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn write_anywhere_with(
        &self,
        command: M::Command,
        options: WriteOptions,
    ) -> Result<Acknowledged<M::Reply>, WriteError> {
        self.anywhere().write_with(command, options).await
    }
}

impl<M: StateMachine> Anywhere<M> {
    /// The same calls, with another patience, a day at most. What a call asks for by itself, the time for which a learner may catch up or
    /// the slowest voter is waited for, comes on top. Changes of the membership and hand-overs take seconds where voters are slow: with less
    /// patience than that their outcome may not be known, and to call them again completes what they have begun.
    #[must_use]
    pub fn within(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// As [`Engine::write`].
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn write(&self, command: M::Command) -> Result<Written<M::Reply>, WriteError> {
        self.write_with(command, WriteOptions::default()).await.map(applied)
    }

    /// As [`Engine::write_in`]: it is repeated, whatever has become of it, until it is answered or the patience is over.
    ///
    /// # Errors
    /// See [`WriteError`]. After any of them the call may be repeated with the same ticket; only [`WriteError::SessionExpired`] and
    /// [`WriteError::AnswerForgotten`] are final. They say that this call has applied nothing: when it has met them after an attempt
    /// whose outcome is not known, its error is that attempt's.
    pub async fn write_in(
        &self,
        ticket: &Ticket,
        command: M::Command,
    ) -> Result<Written<M::Reply>, WriteError> {
        let (slot, history) = (Some(ticket.slot()), ticket.session().history());
        let options = WriteOptions { slot, history, ..WriteOptions::default() };
        self.write_sealed(command, options, || Some(ticket.slot())).await.map(applied)
    }

    /// As [`Engine::write_with`]. One that has a place in a session is repeated as by [`write_in`](Self::write_in).
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn write_with(
        &self,
        command: M::Command,
        options: WriteOptions,
    ) -> Result<Acknowledged<M::Reply>, WriteError> {
        self.write_sealed(command, options, || options.slot).await
    }

    async fn write_sealed(
        &self,
        command: M::Command,
        options: WriteOptions,
        slot: impl Fn() -> Option<SessionSlot> + Send + Sync,
    ) -> Result<Acknowledged<M::Reply>, WriteError> {
        check_ack(&options)?;
        let machine = M::wrote(&command).machine;
        let sealed = envelope::seal::<M>(UNSTAMPED, &command, options.slot);
        let sealed = sealed.map_err(|error| WriteError::Unencodable { reason: error.to_string() })?;
        drop(command);
        let WriteOptions { ack, ack_timeout, history, .. } = options;
        let call = || {
            let envelope = slot().map_or_else(|| sealed.clone(), |slot| envelope::in_place(&sealed, slot));
            LeaderCall::Write { envelope, ack, ack_timeout, history }
        };
        let extra = if ack == AckLevel::All { ack_timeout } else { Duration::ZERO };
        let repeats = if options.slot.is_some() { Repeats::Everything } else { Repeats::Refusals };
        decoded::<M>(self.written(call, ack, repeats, extra).await.map(|(written, _)| written), machine)
    }

    /// As [`Engine::open_session`].
    ///
    /// # Errors
    /// See [`WriteError`]. When the outcome is unknown a session may have been opened that nobody uses; it expires.
    pub async fn open_session(&self, ttl: Duration) -> Result<Arc<Session>, WriteError> {
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        let mut session = 0;
        let call = || {
            // Another one each time: a request that arrives late is not to meet a session that is in use.
            session = runtime::random_u64().max(1);
            plain_write(envelope::seal_open_session(UNSTAMPED, session, ttl_ms, ""))
        };
        let (_, history) = self.written(call, AckLevel::Quorum, Repeats::Everything, Duration::ZERO).await?;
        Ok(Session::new(session, WINDOW, history))
    }

    /// As [`Engine::close_session`]. A call that had to be repeated may find closed what it has closed itself.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn close_session(&self, session: u64) -> Result<ClosedSession, WriteError> {
        let call = || plain_write(envelope::seal_close_session(UNSTAMPED, session));
        let (closed, _) = self.written(call, AckLevel::Quorum, Repeats::Everything, Duration::ZERO).await?;
        let was_open = closed.reply.is_some_and(|reply| reply.first() == Some(&1));
        Ok(ClosedSession { log_id: closed.log_id, was_open })
    }

    /// As [`Engine::set_state_quota`].
    ///
    /// # Errors
    /// See [`QuotaError`].
    pub async fn set_state_quota(&self, bytes: Option<u64>) -> Result<LogId, QuotaError> {
        let change = self.engine.quota_change(bytes)?;
        let call = || plain_write(envelope::seal_quota(UNSTAMPED, change));
        // Repeated late, it could undo what others have set since.
        let (written, _) = self.written(call, AckLevel::Quorum, Repeats::Refusals, Duration::ZERO).await?;
        Ok(written.log_id)
    }

    /// As [`Engine::add_member`]. The list is what this node knows then: see [`MemberList::is_behind`].
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn add_member(
        &self,
        new: NewMember,
        promote: bool,
        timeout: Duration,
    ) -> Result<MemberList, MembershipError> {
        let timeout = timeout.min(LONGEST_PATIENCE);
        let NewMember { node_id, peer } = new;
        check_address(&peer)?;
        self.changed(MembershipCall::Add { node_id, peer, promote, timeout }, timeout).await
    }

    /// As [`Engine::promote_member`]. The list is what this node knows then: see [`MemberList::is_behind`].
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn promote_member(
        &self,
        node_id: NodeId,
        timeout: Duration,
    ) -> Result<MemberList, MembershipError> {
        let timeout = timeout.min(LONGEST_PATIENCE);
        self.changed(MembershipCall::Promote { node_id, timeout }, timeout).await
    }

    /// As [`Engine::demote_member`]; of the leader too, which hands over first. The list is what this node knows then: see [`MemberList::is_behind`].
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn demote_member(&self, node_id: NodeId, force: bool) -> Result<MemberList, MembershipError> {
        self.changed(MembershipCall::Demote { node_id, force }, Duration::ZERO).await
    }

    /// As [`Engine::remove_member`]; of the leader too, which hands over first. The list is what this node knows then: see [`MemberList::is_behind`].
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn remove_member(&self, node_id: NodeId, force: bool) -> Result<MemberList, MembershipError> {
        self.changed(MembershipCall::Remove { node_id, force }, Duration::ZERO).await
    }

    /// As [`Engine::replace_member`]. The list is what this node knows then: see [`MemberList::is_behind`].
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn replace_member(
        &self,
        old: NodeId,
        new: NewMember,
        timeout: Duration,
    ) -> Result<MemberList, MembershipError> {
        let timeout = timeout.min(LONGEST_PATIENCE);
        let NewMember { node_id, peer } = new;
        check_address(&peer)?;
        self.changed(MembershipCall::Replace { old, node_id, peer, timeout }, timeout).await
    }

    /// As [`Engine::update_member`]. The list is what this node knows then: see [`MemberList::is_behind`].
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn update_member(
        &self,
        node_id: NodeId,
        addresses: NewAddresses,
    ) -> Result<MemberList, MembershipError> {
        let NewAddresses { peer, client } = addresses;
        peer.iter().chain(&client).try_for_each(|address| check_address(address))?;
        self.changed(MembershipCall::Update { node_id, peer, client }, Duration::ZERO).await
    }

    /// As [`Engine::transfer_leader`].
    ///
    /// # Errors
    /// See [`TransferError`].
    pub async fn transfer_leader(&self, to: Option<NodeId>) -> Result<Leader, TransferError> {
        let deadline = self.deadline(Duration::ZERO);
        let call = || LeaderCall::TransferLeader { to };
        let outcome = self.engine.carried_out::<TransferError>(call, Repeats::Refusals, deadline).await?;
        match outcome.done {
            CallDone::Leads(leader) => Ok(leader),
            CallDone::Written { .. } | CallDone::Changed { .. } => Err(outcome.is_strange()),
        }
    }

    /// Has a write carried out, which may take `extra` time by itself, and waits until this node has applied it. Returns the
    /// history that its position belongs to as well. Only one that is acknowledged at `ack` level leader may have no reply.
    async fn written(
        &self,
        call: impl FnMut() -> LeaderCall + Send,
        ack: AckLevel,
        repeats: Repeats,
        extra: Duration,
    ) -> Result<(Acknowledged<Bytes>, HistoryEpoch), WriteError> {
        let deadline = self.deadline(extra);
        let applied_here =
            async |log_id: LogId| self.engine.inner.has_applied(log_id.index, self.until(deadline)).await;
        let outcome = match self.engine.carried_out::<WriteError>(call, repeats, deadline).await {
            Err(WriteError::AckTimeout { log_id, missing, reply: Some(mut reply) }) => {
                // This node may be the one that all waited for; its caller has waited long enough.
                reply.applied_here = self.engine.inner.has_applied(log_id.index, Instant::now()).await;
                return Err(WriteError::AckTimeout { log_id, missing, reply: Some(reply) });
            }
            outcome => outcome?,
        };
        if lacks_reply(&outcome.done, ack) {
            return Err(outcome.is_strange());
        }
        let CallDone::Written { log_id, reply, held_by, repeated, history } = outcome.done else {
            return Err(outcome.is_strange());
        };
        // What is not committed may never be applied.
        let applied_here = reply.is_some() && applied_here(log_id).await;
        Ok((Acknowledged { log_id, reply, ack, held_by, repeated, applied_here }, history))
    }

    /// Has a change of the membership made, which may take `extra` time by itself, and waits until this node knows it.
    async fn changed(&self, call: MembershipCall, extra: Duration) -> Result<MemberList, MembershipError> {
        let deadline = self.deadline(extra);
        let call = || LeaderCall::Membership(call.clone());
        let outcome = self.engine.carried_out::<MembershipError>(call, Repeats::Refusals, deadline).await?;
        let CallDone::Changed { membership_at, unchanged } = outcome.done else {
            return Err(outcome.is_strange());
        };
        self.engine.inner.knows_membership(membership_at, self.until(deadline)).await;
        Ok(MemberList { unchanged, changed_at: membership_at, ..self.engine.members() })
    }

    /// Until when a call is repeated that may take `extra` time by itself.
    fn deadline(&self, extra: Duration) -> Instant {
        Instant::now() + self.patience.saturating_add(extra).min(LONGEST_PATIENCE)
    }

    /// Until when this node is waited for once the leader has answered: it hears of what is committed a little later.
    fn until(&self, deadline: Instant) -> Instant {
        deadline.max(Instant::now() + self.engine.inner.config.timing.patience())
    }
}

/// A write that asks for nothing in particular.
fn plain_write(envelope: Bytes) -> LeaderCall {
    let WriteOptions { ack, ack_timeout, history, .. } = WriteOptions::default();
    LeaderCall::Write { envelope, ack, ack_timeout, history }
}

/// Whether what a leader says of a write is not all that it must have known to acknowledge it at this level.
fn lacks_reply(done: &CallDone, ack: AckLevel) -> bool {
    matches!(done, CallDone::Written { reply: None, .. }) && ack != AckLevel::Leader
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_waits_for_no_quorum_may_have_no_reply() {
        let written = |reply| CallDone::Written {
            log_id: LogId::new(1, 2),
            reply,
            held_by: vec![1],
            repeated: false,
            history: HistoryEpoch::UNKNOWN,
        };
        for ack in AckLevel::ALL {
            assert_eq!(lacks_reply(&written(None), ack), ack != AckLevel::Leader, "{ack:?}");
            assert!(!lacks_reply(&written(Some(Bytes::new())), ack), "{ack:?}");
        }
    }
}
