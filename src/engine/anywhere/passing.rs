//! Finding whoever carries a call out: given to this node or passed on, and repeated where that can do no harm.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::engine::report::state::TermLeader;
use crate::engine::write::Admitted;
use crate::engine::{Engine, Inner};
use crate::error::{ForwardError, Leader, Told, WriteError};
use crate::machine::StateMachine;
use crate::raft::network::calls::{CallDone, CallError, LeaderCall, OfCall};
use crate::raft::network::leader_line::LeaderLineError;
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

/// The leader that a call is given to.
#[derive(Debug, Clone)]
struct AskedLeader {
    leader: Leader,
    /// Where it is reached; none for this node itself.
    member: Option<Member>,
}

impl AskedLeader {
    fn lost<E: OfCall>(&self, reason: impl ToString) -> E {
        ForwardError::Lost { leader: self.leader.clone(), reason: reason.to_string() }.into()
    }

    fn not_taken<E: OfCall>(&self, reason: impl ToString) -> E {
        ForwardError::NotTaken { leader: self.leader.clone(), reason: reason.to_string() }.into()
    }

    fn overloaded<E: OfCall>(&self) -> FailedAttempt<E> {
        FailedAttempt {
            error: ForwardError::Overloaded { leader: self.leader.clone() }.into(),
            may_pass: true,
        }
    }

    /// This node has no room for `call`, which is not given away.
    fn not_given<E: OfCall>(&self, call: &LeaderCall) -> FailedAttempt<E> {
        match E::answered(call.operation().too_many()) {
            Ok(error) => FailedAttempt { error, may_pass: true },
            Err(_) => self.overloaded(),
        }
    }

    /// What it has answered.
    fn answered<E: OfCall>(&self, error: CallError) -> FailedAttempt<E> {
        match error {
            // Another node's room is not this one's.
            CallError::Write(WriteError::Overloaded) if self.member.is_some() => self.overloaded(),
            CallError::Overloaded => self.overloaded(),
            CallError::Other { message, maybe_applied } => FailedAttempt {
                error: if maybe_applied { self.lost(message) } else { self.not_taken(message) },
                may_pass: maybe_applied,
            },
            CallError::Write(_) | CallError::Membership(_) | CallError::Transfer(_) => FailedAttempt {
                error: E::answered(error).unwrap_or_else(|_| self.lost(ANSWERS_OTHERWISE)),
                may_pass: true,
            },
        }
    }

    /// Why there is no answer.
    fn unanswered<E: OfCall>(&self, error: &LeaderLineError, call: &LeaderCall) -> FailedAttempt<E> {
        let may_pass = match error {
            LeaderLineError::Overloaded { .. } => return self.not_given(call),
            // A build that does not know the call: it will not know it in a moment either.
            LeaderLineError::Failed { .. } => false,
            LeaderLineError::NotConnected { .. }
            | LeaderLineError::Broken { .. }
            | LeaderLineError::Timeout { .. }
            | LeaderLineError::Unintelligible { .. } => true,
        };
        let error = if error.maybe_done() { self.lost(error) } else { self.not_taken(error) };
        FailedAttempt { error, may_pass }
    }
}

const ANSWERS_OTHERWISE: &str = "it answers something else than was asked";

/// Why an attempt has failed.
struct FailedAttempt<E> {
    error: E,
    /// Whether another attempt may have another outcome.
    may_pass: bool,
}

/// What has come of a call, and who has carried it out.
pub(super) struct CarriedOut {
    pub(super) done: CallDone,
    by: AskedLeader,
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
        mut call: impl FnMut() -> LeaderCall + Send,
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
                    FailedAttempt { error: E::stopped(reason, target.is_some()), may_pass: false }
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
        target: Option<&AskedLeader>,
        call: &LeaderCall,
        held: &mut Option<Admitted<M>>,
        deadline: Instant,
    ) -> Result<CarriedOut, FailedAttempt<E>> {
        let inner = &self.inner;
        let left = deadline.saturating_duration_since(Instant::now());
        if let Some(target) = target
            && target.member.is_none()
        {
            // Here it is counted when it is proposed.
            *held = None;
            let done = self.carry_out(call.clone(), left).await.map_err(|error| target.answered(error))?;
            return Ok(CarriedOut { done, by: target.clone() });
        }
        if held.is_none() {
            let counted = inner.hold(call, false);
            *held = counted.map_err(|refusal| FailedAttempt { error: refused(refusal), may_pass: true })?;
        }
        let Some((target, member)) = target.and_then(|target| Some((target, target.member.as_ref()?))) else {
            return Err(FailedAttempt { error: E::not_leader(None), may_pass: true });
        };
        let Ok(_place) = inner.passed_on.of(call.room()).try_acquire() else {
            return Err(target.not_given(call));
        };
        let leader = target.leader.node_id;
        let answer = inner.leader_line.forward(leader, member, call, left, inner.superseded(leader));
        match answer.await {
            Ok(Ok(done)) => Ok(CarriedOut { done, by: target.clone() }),
            Ok(Err(error)) => Err(target.answered(error)),
            Err(error) => Err(target.unanswered(&error, call)),
        }
    }
}

impl<M: StateMachine> Inner<M> {
    /// Whom to give a call to: this node, if it leads; else the node of the `hint`, or the leader that is known here.
    fn target(&self, hint: Option<NodeId>) -> Option<AskedLeader> {
        let own = self.config.node_id;
        if self.core.leads() {
            let leader = Leader { node_id: own, client: self.own.client.clone() };
            return Some(AskedLeader { leader, member: None });
        }
        let others = [hint, self.core.leader()].into_iter().flatten().filter(|node_id| *node_id != own);
        others.into_iter().find_map(|node_id| {
            let member = self.core.member(node_id)?;
            let leader = Leader { node_id, client: member.client.clone() };
            Some(AskedLeader { leader, member: Some(member) })
        })
    }

    /// Counts what a call takes on this node, for as long as what is returned is kept. One that was let in before is not refused.
    fn hold(
        self: &Arc<Self>,
        call: &LeaderCall,
        was_let_in: bool,
    ) -> Result<Option<Admitted<M>>, WriteError> {
        let LeaderCall::Write { envelope, .. } = call else { return Ok(None) };
        let (room, bytes) = (call.room(), envelope.len());
        match was_let_in {
            true => Ok(Some(self.readmit_passed_on(room, bytes))),
            false => self.admit_passed_on(room, bytes).map(Some),
        }
    }

    /// Waits for a moment, and then until something else is known of the leader than was, or for as long as `pause` says.
    async fn another_leads(&self, known: TermLeader, pause: Duration) {
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
            |now: &TermLeader| now.term > term && now.node_id.is_some_and(|leader| leader != asked);
        if now.wait_for(is_another).await.is_err() {
            return std::future::pending().await;
        }
        sleep(self.config.timing.patience() * 2).await;
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
