//! What a write is told, once it is known how its proposal ended and, at level `all`, which voters hold it.

use std::time::Duration;

use bytes::Bytes;

use super::{EntryOutcome, Writer};
use crate::engine::{Engine, Inner};
use crate::error::{OperationError, WriteError};
use crate::machine::StateMachine;
use crate::machine::sessions::{MAX_OPENER_SESSIONS, SessionRefusal};
use crate::raft::core::Proposed;
use crate::raft::envelope;
use crate::raft::type_config::NotApplied;
use crate::types::{AckLevel, LogId, NodeId, UnconfirmedReply};

/// A write that was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Written<R> {
    /// Where in the log the command stands.
    pub log_id: LogId,
    /// What the state machine answered.
    pub reply: R,
    /// Whether the node that was called has applied it, so that whatever is read there next sees it. False only for a write
    /// [from anywhere](Engine::anywhere), on a node that was far behind.
    pub applied_here: bool,
}

/// A write that was acknowledged, at whichever level.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Acknowledged<R> {
    /// Where in the log the command stands.
    pub log_id: LogId,
    /// What the state machine answered; at [`AckLevel::Leader`], which does not wait for it, only if it had by then.
    pub reply: Option<R>,
    /// What the acknowledgement promises.
    pub ack: AckLevel,
    /// The members known to hold the entry on disk when it was acknowledged. There may be more.
    pub held_by: Vec<NodeId>,
    /// Whether an earlier attempt of the same session and sequence had applied it. Then `log_id` and `reply` are
    /// that attempt's.
    pub repeated: bool,
    /// Whether the node that was called has applied it, so that whatever is read there next sees it. At
    /// [`AckLevel::Leader`], which does not wait for it, only if it had by then; else false only for a write [from
    /// anywhere](Engine::anywhere), on a node that was far behind.
    pub applied_here: bool,
}

impl<M: StateMachine> Engine<M> {
    /// What came of a write that ended with `error`, if that says that not every voter has confirmed it: the write as it would have
    /// been acknowledged at [`AckLevel::Quorum`]. `None` for any other error, and where the reply [is not known](WriteError::AckTimeout)
    /// or cannot be decoded.
    pub fn unconfirmed(error: &WriteError) -> Option<Acknowledged<M::Reply>> {
        let WriteError::AckTimeout { log_id, reply: Some(reply), .. } = error else { return None };
        let UnconfirmedReply { machine, reply, held_by, repeated, applied_here } = &**reply;
        Some(Acknowledged {
            log_id: *log_id,
            reply: Some(envelope::try_decode_reply::<M>(*machine, reply).ok()?),
            ack: AckLevel::Quorum,
            held_by: held_by.clone(),
            repeated: *repeated,
            applied_here: *applied_here,
        })
    }
}

pub(in crate::engine) fn applied<R>(acknowledged: Acknowledged<R>) -> Written<R> {
    let reply = acknowledged.reply.expect("invariant: a write acknowledged by a quorum was applied");
    Written { log_id: acknowledged.log_id, reply, applied_here: acknowledged.applied_here }
}

/// The same outcome in the words of the `machine` that was written to.
pub(in crate::engine) fn decoded<M: StateMachine>(
    outcome: EntryOutcome,
    machine: u16,
) -> Result<Acknowledged<M::Reply>, WriteError> {
    let Acknowledged { log_id, reply, ack, held_by, repeated, applied_here } =
        outcome.map_err(|error| error.of_machine(machine))?;
    let reply = reply.map(|reply| envelope::try_decode_reply::<M>(machine, &reply)).transpose();
    let reply = reply.map_err(|reason| WriteError::UnreadableReply { log_id, reason })?;
    Ok(Acknowledged { log_id, reply, ack, held_by, repeated, applied_here })
}

impl<M: StateMachine> Inner<M> {
    /// What to tell the caller, and the position of the entry itself, which for a repeated write is not the
    /// position of the command.
    pub(super) fn acknowledge(
        &self,
        writer: Writer,
        outcome: Proposed,
        ack: AckLevel,
        session: Option<u64>,
    ) -> Result<(Acknowledged<Bytes>, LogId), WriteError> {
        let (entry, answer) = match outcome {
            Proposed::Applied { log_id, answer } => (log_id, answer),
            Proposed::Flushed { log_id } => {
                let held_by = self.core.durable_positions().holders(log_id);
                let flushed =
                    Acknowledged { log_id, reply: None, ack, held_by, repeated: false, applied_here: false };
                return Ok((flushed, log_id));
            }
            Proposed::NotLeader(leader) => return Err(self.counted(writer, WriteError::NotLeader { leader })),
            Proposed::NoQuorum => return Err(self.counted(writer, WriteError::NoQuorum)),
            Proposed::Interrupted(leader) => return Err(WriteError::Interrupted { leader }),
            Proposed::Gone => return Err(self.stopped(false)),
            Proposed::Stopped => return Err(self.stopped_write()),
        };
        let reply = answer.reply.map_err(|refusal| {
            let refusal = not_applied(refusal, session.unwrap_or_default());
            self.counters.refuse(refusal.reason());
            refusal
        })?;
        let acknowledged = Acknowledged {
            log_id: answer.first.unwrap_or(entry),
            reply: Some(reply),
            ack,
            held_by: self.core.durable_positions().holders(entry),
            repeated: answer.first.is_some(),
            applied_here: true,
        };
        Ok((acknowledged, entry))
    }

    /// Waits until every voter holds `entry`, and with it everything before, or this node ends.
    pub(super) async fn wait_for_all(
        &self,
        acknowledged: Acknowledged<Bytes>,
        entry: LogId,
        patience: Duration,
    ) -> EntryOutcome {
        let (core, positions) = (&self.core, self.core.durable_positions());
        let all_hold = tokio::time::timeout(patience, positions.wait_for_all(entry));
        let in_time = tokio::select! {
            biased;
            told = all_hold => matches!(told, Ok(Ok(()))),
            _ = self.ended() => false,
        };
        // Those who wait are told a little later than the last voter has it: the time may be over in between.
        let missing = if in_time { Vec::new() } else { positions.missing(entry, &core.voters()) };
        let held_by = positions.holders(entry);
        if missing.is_empty() {
            return Ok(Acknowledged { held_by, ..acknowledged });
        }
        let Acknowledged { log_id, reply, repeated, applied_here, .. } = acknowledged;
        let reply =
            reply.map(|reply| UnconfirmedReply { machine: 0, reply, held_by, repeated, applied_here });
        Err(WriteError::AckTimeout { log_id, missing, reply: reply.map(Box::new) })
    }
}

/// What to tell the owner of `session` whose command was not carried out. That a session has expired is counted where it is
/// applied, by every node ([`Activity::expired_sessions`](crate::engine::Activity)).
fn not_applied(refusal: NotApplied, session: u64) -> WriteError {
    match refusal {
        NotApplied::QuotaExceeded { state_bytes, quota_bytes } => {
            WriteError::QuotaExceeded { state_bytes, quota_bytes }
        }
        NotApplied::Session(SessionRefusal::Expired) => WriteError::SessionExpired { session },
        NotApplied::Session(SessionRefusal::AnswerForgotten) => WriteError::AnswerForgotten,
        NotApplied::Session(SessionRefusal::WindowExceeded) => WriteError::WindowExceeded,
        NotApplied::Session(SessionRefusal::TooManySessions) => WriteError::TooManySessions,
        NotApplied::Session(SessionRefusal::TooManyOfOpener) => {
            WriteError::TooManyOfOpener { limit: MAX_OPENER_SESSIONS }
        }
    }
}
