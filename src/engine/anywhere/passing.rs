//! Finding whoever carries a call out: given to this node or passed on, and repeated where that can do no harm.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::engine::membership::CHANGE_PATIENCE;
use crate::engine::report::state::KnownLeader;
use crate::engine::writes::Admitted;
use crate::engine::{Engine, Inner};
use crate::error::{ForwardError, Leader, MembershipError, OperationError, Told, TransferError, WriteError};
use crate::machine::StateMachine;
use crate::raft::network::calls::{Call, CallError, Done};
use crate::raft::network::upstream::UpstreamError;
use crate::reason::Reason;
use crate::types::{LogId, Member, NodeId};

/// Before a call is repeated; it doubles each time that nothing new is known.
const PAUSE: Duration = Duration::from_millis(10);
/// The longest of these.
const LONGEST_PAUSE: Duration = Duration::from_millis(320);

/// Which attempts may be followed by another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeats {
    /// Those that have certainly done nothing.
    Refusals,
    /// Those with an unknown outcome too: to do it twice is to do it once.
    Everything,
}

impl Repeats {
    /// Whether another attempt follows one that is `told` so. `is_undecided` where one before it may have done what was asked for:
    /// its caller could only send the same again.
    fn allow(self, told: &Told<'_>, is_undecided: bool) -> bool {
        match told.maybe_applied {
            // There may be room, or other writes settled, in a moment.
            false if is_undecided && self == Self::Everything && is_full(told.reason) => true,
            // Another node may lead by now.
            false => matches!(told.reason, Reason::NotLeader | Reason::NoQuorum | Reason::Stopped),
            true => self == Self::Everything && matches!(told.reason, Reason::Interrupted | Reason::Stopped),
        }
    }
}

fn is_full(reason: Reason) -> bool {
    matches!(reason, Reason::Overloaded | Reason::DiskFull | Reason::DiskStalled | Reason::WindowExceeded)
}

/// The error of an operation that only the leader carries out.
pub(super) trait OfCall: OperationError + From<ForwardError> + Send + Sized {
    /// No leader carries it out.
    fn not_leader(leader: Option<Leader>) -> Self;
    /// This node ends.
    fn stopped(reason: String, maybe_applied: bool) -> Self;
    /// What a leader has answered, unless that is the error of another operation.
    fn answered(error: CallError) -> Result<Self, CallError>;
}

impl OfCall for WriteError {
    fn not_leader(leader: Option<Leader>) -> Self {
        Self::NotLeader { leader }
    }

    fn stopped(reason: String, maybe_applied: bool) -> Self {
        Self::Stopped { reason, maybe_applied }
    }

    fn answered(error: CallError) -> Result<Self, CallError> {
        match error {
            CallError::Write(error) => Ok(error),
            CallError::Membership(_) | CallError::Transfer(_) | CallError::Other { .. } => Err(error),
        }
    }
}

impl OfCall for MembershipError {
    fn not_leader(leader: Option<Leader>) -> Self {
        Self::NotLeader { leader }
    }

    fn stopped(reason: String, maybe_applied: bool) -> Self {
        Self::Stopped { reason, maybe_applied }
    }

    fn answered(error: CallError) -> Result<Self, CallError> {
        match error {
            CallError::Membership(error) => Ok(error),
            CallError::Write(_) | CallError::Transfer(_) | CallError::Other { .. } => Err(error),
        }
    }
}

impl OfCall for TransferError {
    fn not_leader(leader: Option<Leader>) -> Self {
        Self::NotLeader { leader }
    }

    fn stopped(reason: String, maybe_applied: bool) -> Self {
        Self::Stopped { reason, maybe_applied }
    }

    fn answered(error: CallError) -> Result<Self, CallError> {
        match error {
            CallError::Transfer(error) => Ok(error),
            CallError::Write(_) | CallError::Membership(_) | CallError::Other { .. } => Err(error),
        }
    }
}

/// Whom a call is given to.
#[derive(Debug, Clone)]
struct Target {
    leader: Leader,
    /// Where it is reached; none for this node itself.
    member: Option<Member>,
}

impl Target {
    fn lost<E: OfCall>(&self, reason: impl ToString) -> E {
        ForwardError::Lost { leader: self.leader.clone(), reason: reason.to_string() }.into()
    }

    fn not_taken<E: OfCall>(&self, reason: impl ToString) -> E {
        ForwardError::NotTaken { leader: self.leader.clone(), reason: reason.to_string() }.into()
    }

    /// What it has answered.
    fn answered<E: OfCall>(&self, error: CallError) -> Failed<E> {
        match E::answered(error) {
            Ok(error) => Failed { error, may_pass: true },
            Err(CallError::Other { message, maybe_applied }) => Failed {
                error: if maybe_applied { self.lost(message) } else { self.not_taken(message) },
                may_pass: maybe_applied,
            },
            Err(CallError::Write(_) | CallError::Membership(_) | CallError::Transfer(_)) => {
                Failed { error: self.lost(ANSWERS_OTHERWISE), may_pass: true }
            }
        }
    }

    /// Why there is no answer.
    fn unanswered<E: OfCall>(&self, error: &UpstreamError, call: &Call) -> Failed<E> {
        let may_pass = match error {
            UpstreamError::Overloaded { .. } => return self.answered(call.refused_as_too_many()),
            // A build that does not know the call: it will not know it in a moment either.
            UpstreamError::Failed { .. } => false,
            UpstreamError::NotConnected { .. }
            | UpstreamError::Broken { .. }
            | UpstreamError::Timeout { .. }
            | UpstreamError::Unintelligible { .. } => true,
        };
        let error = if error.maybe_done() { self.lost(error) } else { self.not_taken(error) };
        Failed { error, may_pass }
    }
}

const ANSWERS_OTHERWISE: &str = "it answers something else than was asked";

/// An attempt has failed.
struct Failed<E> {
    error: E,
    /// Whether another attempt may have another outcome.
    may_pass: bool,
}

/// What has come of a call, and who has carried it out.
pub(super) struct CarriedOut {
    pub(super) done: Done,
    by: Target,
}

impl CarriedOut {
    /// It is not what was asked for.
    pub(super) fn is_strange<E: OfCall>(&self) -> E {
        self.by.lost(ANSWERS_OTHERWISE)
    }
}

/// What this node itself says of a write that it has no room for.
fn refused<E: OfCall>(refusal: WriteError) -> E {
    E::answered(CallError::Write(refusal)).expect("invariant: only writes are refused")
}

/// Which error is told when there is no further attempt: `last`, unless an attempt before it had an `unknown` outcome and `last` says
/// that nothing was done, which is true of that one attempt only: whoever asked has made one call, and may make it again in
/// another session.
fn told_of<E: OfCall>(unknown: Option<E>, last: E) -> E {
    match unknown {
        Some(unknown) if !last.told().maybe_applied => unknown,
        Some(_) | None => last,
    }
}

impl<M: StateMachine> Engine<M> {
    /// Has whoever leads do what `call` says, which is asked anew for each attempt, until `deadline`.
    pub(super) async fn carried_out<E: OfCall>(
        &self,
        mut call: impl FnMut() -> Call + Send,
        repeats: Repeats,
        deadline: Instant,
    ) -> Result<CarriedOut, E> {
        let (inner, own) = (&self.inner, self.inner.config.node_id);
        let (mut pause, mut hint, mut unknown) = (PAUSE, None, None);
        // What is counted of it, whenever it is not one of this node's own proposals.
        let mut held = None;
        loop {
            let known = *inner.known_leader.borrow();
            let target = inner.target(hint.take());
            let call = call();
            let failed = tokio::select! {
                biased;
                outcome = self.attempt(target.as_ref(), &call, &mut held, deadline) => match outcome {
                    Ok(carried_out) => return Ok(carried_out),
                    Err(failed) => failed,
                },
                reason = inner.ended() => {
                    Failed { error: E::stopped(reason, target.is_some()), may_pass: false }
                }
            };
            let told = failed.error.told();
            let is_repeated =
                failed.may_pass && repeats.allow(&told, unknown.is_some()) && Instant::now() < deadline;
            let (is_unknown, asked) = (told.maybe_applied, target.map(|target| target.leader.node_id));
            hint = told.leader.map(|leader| leader.node_id);
            hint = hint.filter(|leader| *leader != own && Some(*leader) != asked);
            if !is_repeated {
                return Err(told_of(unknown, failed.error));
            }
            if held.is_none() {
                held = match inner.hold(&call, is_unknown || unknown.is_some()) {
                    Ok(held) => held,
                    Err(refusal) => return Err(told_of(unknown, refused(refusal))),
                };
            }
            tokio::select! {
                biased;
                reason = inner.ended() => {
                    let unknown = unknown.or(is_unknown.then_some(failed.error));
                    return Err(told_of(unknown, E::stopped(reason, false)));
                }
                () = inner.another_leads(known, pause) => {}
                () = sleep_until(deadline) => return Err(told_of(unknown, failed.error)),
            }
            if is_unknown {
                unknown.get_or_insert(failed.error);
            }
            if *inner.known_leader.borrow() == known {
                pause = (pause * 2).min(LONGEST_PAUSE);
            } else {
                // What this node has heard since is newer than what it was told before.
                (pause, hint) = (PAUSE, None);
            }
        }
    }

    async fn attempt<E: OfCall>(
        &self,
        target: Option<&Target>,
        call: &Call,
        held: &mut Option<Admitted<M>>,
        deadline: Instant,
    ) -> Result<CarriedOut, Failed<E>> {
        let inner = &self.inner;
        let left = deadline.saturating_duration_since(Instant::now()) + inner.own_time(call);
        if let Some(target) = target
            && target.member.is_none()
        {
            // Here it is counted when it is proposed.
            *held = None;
            let done =
                self.carry_out_here(call.clone(), left).await.map_err(|error| target.answered(error))?;
            return Ok(CarriedOut { done, by: target.clone() });
        }
        if held.is_none() {
            let counted = inner.hold(call, false);
            *held = counted.map_err(|refusal| Failed { error: refused(refusal), may_pass: true })?;
        }
        let Some((target, member)) = target.and_then(|target| Some((target, target.member.as_ref()?))) else {
            return Err(Failed { error: E::not_leader(None), may_pass: true });
        };
        let Ok(_place) = inner.passed_on.try_acquire() else {
            return Err(target.answered(call.refused_as_too_many()));
        };
        let leader = target.leader.node_id;
        let answer = inner.upstream.forward(leader, member, call, left, inner.superseded(leader));
        match answer.await {
            Ok(Ok(done)) => Ok(CarriedOut { done, by: target.clone() }),
            Ok(Err(error)) => Err(target.answered(error)),
            Err(error) => Err(target.unanswered(&error, call)),
        }
    }
}

impl<M: StateMachine> Inner<M> {
    /// Whom to give a call to: this node, if it leads; else the node of the `hint`, or the leader that is known here.
    fn target(&self, hint: Option<NodeId>) -> Option<Target> {
        let own = self.config.node_id;
        if self.core.leads() {
            let leader = Leader { node_id: own, client: self.own.client.clone() };
            return Some(Target { leader, member: None });
        }
        let others = [hint, self.core.leader()].into_iter().flatten().filter(|node_id| *node_id != own);
        others.into_iter().find_map(|node_id| {
            let member = self.core.member(node_id)?;
            let leader = Leader { node_id, client: member.client.clone() };
            Some(Target { leader, member: Some(member) })
        })
    }

    /// Counts what a call takes on this node, for as long as what is returned is kept. One that was let in before is not refused.
    fn hold(self: &Arc<Self>, call: &Call, was_let_in: bool) -> Result<Option<Admitted<M>>, WriteError> {
        match call {
            Call::Write { envelope, .. } if was_let_in => Ok(Some(self.readmit_passed_on(envelope.len()))),
            Call::Write { envelope, .. } => self.admit_passed_on(envelope.len()).map(Some),
            Call::AddMember { .. }
            | Call::PromoteMember { .. }
            | Call::DemoteMember { .. }
            | Call::RemoveMember { .. }
            | Call::ReplaceMember { .. }
            | Call::UpdateMember { .. }
            | Call::TransferLeader { .. } => Ok(None),
        }
    }

    /// How much longer than its caller's patience an attempt may take, because the leader sets itself limits: cut off before those
    /// it could not say what has come of the call.
    fn own_time(&self, call: &Call) -> Duration {
        let hand_over = self.config.timing.patience().saturating_mul(3);
        match call {
            Call::Write { .. } => Duration::ZERO,
            Call::TransferLeader { .. } => hand_over,
            Call::AddMember { .. }
            | Call::PromoteMember { .. }
            | Call::DemoteMember { .. }
            | Call::RemoveMember { .. }
            | Call::ReplaceMember { .. }
            | Call::UpdateMember { .. } => CHANGE_PATIENCE + hand_over,
        }
    }

    /// Waits for a moment, and then until something else is known of the leader than was, or for as long as `pause` says.
    async fn another_leads(&self, known: KnownLeader, pause: Duration) {
        let mut now = self.known_leader.clone();
        sleep(PAUSE).await;
        let _ = timeout(pause.saturating_sub(PAUSE), now.wait_for(|now| *now != known)).await;
    }

    /// Waits until another node than the one that was `asked` is known to lead, and then for as long as an answer may take
    /// that is under way.
    async fn superseded(&self, asked: NodeId) {
        let mut now = self.known_leader.clone();
        let term = now.borrow().term;
        let is_another =
            |now: &KnownLeader| now.term > term && now.node_id.is_some_and(|leader| leader != asked);
        if now.wait_for(is_another).await.is_err() {
            return std::future::pending().await;
        }
        sleep(self.config.timing.patience() * 2).await;
    }

    /// Waits until this node ends; why it does.
    async fn ended(&self) -> String {
        let (mut fatal, mut stop) = (self.fatal.subscribe(), self.stop.subscribe());
        tokio::select! {
            biased;
            _ = fatal.wait_for(Option::is_some) => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        self.fatal.in_words().unwrap_or_else(|| "the node is shutting down".to_owned())
    }

    /// Waits until this node has applied the entry at `index`. False when it ends, or has not by `deadline`.
    pub(super) async fn has_applied(&self, index: u64, deadline: Instant) -> bool {
        tokio::select! {
            biased;
            () = self.core.published().wait_applied(index) => true,
            _ = self.ended() => false,
            () = sleep_until(deadline) => false,
        }
    }

    /// Waits until this node knows the membership that stands there, or a later one; or it ends, or it is `deadline`.
    pub(super) async fn knows_membership(&self, membership_at: Option<LogId>, deadline: Instant) {
        let mut changes = self.core.changes();
        let known =
            async { while self.core.metrics().membership_at < membership_at && changes.changed().await {} };
        tokio::select! {
            biased;
            () = known => {}
            _ = self.ended() => {}
            () = sleep_until(deadline) => {}
        }
    }
}

#[cfg(test)]
mod tests;
