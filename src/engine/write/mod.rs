//! Writes: admission, and when a write counts as acknowledged.
//!
//! openraft cannot take back what it has accepted. What must not be in the log is therefore refused here, before it is proposed, and
//! such a refusal is certain: nothing was applied. `docs/design/write-path.md` has the way of a write from here on.
//!
//! ```text
//! command --> level --> quota --> version --> seal --> history --> state --> size --> disk --> bytes in flight --> propose
//!               each may refuse: nothing was proposed                                                                 |
//!      done <-- held by all voters (level all) <-- answer decoded <-- applied, or flushed (level leader), or lost <-----+
//! ```
//!
//! # Promises
//!
//! - `done` is called exactly once, whatever becomes of the node.
//! - An error says whether the write may have been applied ([`WriteError::maybe_applied`]).
//! - What is admitted counts as in flight until it is applied here, or lost to this node: at level `leader` too, so that a leader
//!   without a quorum does not take on more and more.
//! - A write in a session is not refused for the quota before it is proposed: an earlier attempt may have been applied, and only
//!   the log knows.
//! - What the node writes for itself ([`Writer::Node`]) is not refused by the limits on what callers write.
//!
//! What it does not do: repeat anything, pass anything on ([`anywhere`](super::anywhere) does), or decide for a session, which is done
//! where the entry is applied.

mod acknowledge;
mod admission;
pub(super) mod sessions;

use bytes::Bytes;
use tokio::sync::oneshot;

pub use self::acknowledge::{Acknowledged, Written};
pub(super) use self::acknowledge::{applied, decoded};
pub(super) use self::admission::{Admitted, Writer};
use crate::engine::{Engine, Inner};
use crate::error::{OperationError, WriteError};
use crate::machine::StateMachine;
use crate::raft::envelope::{self, EnvelopeError};
use crate::runtime;
use crate::session::Ticket;
use crate::types::{AckLevel, HistoryEpoch, MachineVersion, WriteOptions};

/// What happened to an entry.
pub(super) type EntryOutcome = Result<Acknowledged<Bytes>, WriteError>;

impl<M: StateMachine> Engine<M> {
    /// Writes: returns once `command` is committed by a quorum and applied here.
    ///
    /// # Errors
    /// See [`WriteError`]; [`WriteError::maybe_applied`] says whether a retry could apply twice.
    pub async fn write(&self, command: M::Command) -> Result<Written<M::Reply>, WriteError> {
        self.write_with(command, WriteOptions::default()).await.map(applied)
    }

    /// As [`write`](Self::write), at most once however often it is called with the same `ticket`, on whichever
    /// node of the cluster: a repeated write returns what the first one did.
    ///
    /// # Errors
    /// See [`WriteError`]. After any of them the call may be repeated, on the node that leads; only
    /// [`WriteError::SessionExpired`] and [`WriteError::AnswerForgotten`] are final, and then earlier attempts may
    /// have been applied, once.
    pub async fn write_in(
        &self,
        ticket: &Ticket,
        command: M::Command,
    ) -> Result<Written<M::Reply>, WriteError> {
        let (slot, history) = (Some(ticket.slot()), ticket.session().history());
        let options = WriteOptions { slot, history, ..WriteOptions::default() };
        self.write_with(command, options).await.map(applied)
    }

    /// As [`write`](Self::write), in the way that `options` ask for.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn write_with(
        &self,
        command: M::Command,
        options: WriteOptions,
    ) -> Result<Acknowledged<M::Reply>, WriteError> {
        self.inner.until_agreed(M::wrote(&command)).await;
        let (done, outcome) = oneshot::channel();
        self.propose(command, options, move |result| {
            // The caller may have given up.
            let _ = done.send(result);
        })
        .await;
        outcome.await.unwrap_or_else(|_| Err(self.inner.stopped_write()))
    }

    /// Proposes `command` and returns; `done` is called exactly once with the outcome, on an engine task
    /// that must not be blocked. Waits only while the queue of proposals is full. Commands proposed one
    /// after the other by one task enter the log in that order.
    pub async fn propose<F>(&self, command: M::Command, options: WriteOptions, done: F)
    where
        F: FnOnce(Result<Acknowledged<M::Reply>, WriteError>) + Send + 'static,
    {
        self.propose_for(Writer::Caller, command, options, done).await;
    }

    /// As [`propose`](Self::propose), a command of the machine's own.
    pub(super) async fn propose_own<F>(&self, command: M::Command, done: F)
    where
        F: FnOnce(Result<Acknowledged<M::Reply>, WriteError>) + Send + 'static,
    {
        self.propose_for(Writer::Node, command, WriteOptions::default(), done).await;
    }

    async fn propose_for<F>(&self, writer: Writer, command: M::Command, options: WriteOptions, done: F)
    where
        F: FnOnce(Result<Acknowledged<M::Reply>, WriteError>) + Send + 'static,
    {
        if let Err(refusal) = check_ack(&options) {
            return done(Err(refusal));
        }
        let wrote = M::wrote(&command);
        let command = match self.admit_command(wrote, command, options.slot.is_some()).await {
            Ok(command) => command,
            Err(refusal) => return done(Err(refusal)),
        };
        let envelope = match envelope::seal::<M>(self.inner.reading(), &command, options.slot) {
            Ok(envelope) => envelope,
            Err(error) => return done(Err(WriteError::Unencodable { reason: error.to_string() })),
        };
        if !M::COMMANDS_ROUND_TRIP
            && let Err(unusable) = envelope::try_open::<M>(&envelope)
        {
            return done(Err(WriteError::Undecodable { reason: unusable.reason }));
        }
        let engine = self.inner.clone();
        let done = move |outcome: EntryOutcome| {
            if let Ok(acknowledged) = &outcome {
                engine.counters.acknowledge(acknowledged.ack);
            }
            done(decoded::<M>(outcome, wrote.machine));
        };
        self.propose_envelope(writer, envelope, options, done).await;
    }

    /// Refuses a command that is not to be proposed, and gives back any other. The log is to hold what a machine `wrote`.
    async fn admit_command(
        &self,
        wrote: MachineVersion,
        command: M::Command,
        in_session: bool,
    ) -> Result<M::Command, WriteError> {
        // Of a write of a session an earlier attempt may have been applied, and only the log knows.
        if !in_session && let Some(state) = self.inner.nearly_full(M::most_growth_bytes(&command)).await {
            self.inner.admit_growth(&state, &command)?;
        }
        self.inner.check_agreed(wrote)?;
        Ok(command)
    }

    /// Writes a command that another member has sealed as what a machine `wrote`, and that was opened here. What is proposed is what was
    /// sealed, stamped with this node's clocks.
    pub(super) async fn write_sealed(
        &self,
        sealed: &[u8],
        (wrote, command): (MachineVersion, M::Command),
        options: WriteOptions,
    ) -> EntryOutcome {
        check_ack(&options)?;
        self.admit_command(wrote, command, options.slot.is_some()).await?;
        let written = self.write_envelope_with(Writer::Caller, self.stamped(sealed)?, options).await?;
        self.inner.counters.acknowledge(written.ack);
        Ok(written)
    }

    /// An envelope that another member has sealed, with this node's clocks.
    pub(super) fn stamped(&self, sealed: &[u8]) -> Result<Bytes, WriteError> {
        let undecodable = |error: EnvelopeError| WriteError::Undecodable { reason: error.to_string() };
        envelope::restamp(sealed, self.inner.reading()).map_err(undecodable)
    }

    pub(super) async fn write_envelope(&self, writer: Writer, envelope: Bytes) -> EntryOutcome {
        self.write_envelope_with(writer, envelope, WriteOptions::default()).await
    }

    pub(super) async fn write_envelope_with(
        &self,
        writer: Writer,
        envelope: Bytes,
        options: WriteOptions,
    ) -> EntryOutcome {
        let (done, outcome) = oneshot::channel();
        self.propose_envelope(writer, envelope, options, move |result| {
            let _ = done.send(result);
        })
        .await;
        outcome.await.unwrap_or_else(|_| Err(self.inner.stopped_write()))
    }

    async fn propose_envelope<F>(&self, writer: Writer, envelope: Bytes, options: WriteOptions, done: F)
    where
        F: FnOnce(EntryOutcome) + Send + 'static,
    {
        let inner = &self.inner;
        let admitted = inner.check_history(options.history);
        let in_flight = match admitted.and_then(|()| inner.admit(writer, envelope.len())) {
            Ok(in_flight) => in_flight,
            Err(refusal) => return done(Err(refusal)),
        };
        let (engine, session) = (self.inner.clone(), options.slot.map(|slot| slot.session));
        let finish = move |outcome| match engine.acknowledge(writer, outcome, options.ack, session) {
            Ok((acknowledged, entry)) if options.ack == AckLevel::All => {
                runtime::spawn(async move {
                    let outcome = engine.wait_for_all(acknowledged, entry, options.ack_timeout).await;
                    done(outcome);
                });
            }
            outcome => done(outcome.map(|(acknowledged, _)| acknowledged)),
        };
        match options.ack {
            // Acknowledged long before it is committed: a leader without a quorum must not take on more and more.
            AckLevel::Leader => inner.core.propose_to_leader(envelope, finish, move || drop(in_flight)).await,
            AckLevel::Quorum | AckLevel::All => {
                let finish = move |outcome| {
                    drop(in_flight);
                    finish(outcome);
                };
                inner.core.propose(envelope, finish).await;
            }
        }
    }
}

/// Refuses an acknowledgement that would promise what is not known.
pub(super) fn check_ack(options: &WriteOptions) -> Result<(), WriteError> {
    match options.slot.is_some() && options.ack == AckLevel::Leader {
        // Whether the session lets it through is known only when it is applied, which nobody waits for.
        true => Err(WriteError::LeaderAckInSession),
        false => Ok(()),
    }
}

/// Refuses what belongs to the history `given`, if that is not the one that is `known`. `has_begun` when something has been
/// applied.
fn check_history(given: HistoryEpoch, known: HistoryEpoch, has_begun: bool) -> Result<(), WriteError> {
    if given.differs_from(known) {
        return Err(WriteError::OtherHistory { given, known });
    }
    // This node leads, but has not applied again what its log begins with: it cannot tell yet. If it has, and still
    // does not know, it was restored from a snapshot of a version without histories, and will never be able to tell.
    if given != HistoryEpoch::UNKNOWN && known == HistoryEpoch::UNKNOWN && !has_begun {
        return Err(WriteError::NotLeader { leader: None });
    }
    Ok(())
}

impl<M: StateMachine> Inner<M> {
    /// Refuses what belongs to another history than this node's.
    pub(super) fn check_history(&self, given: HistoryEpoch) -> Result<(), WriteError> {
        let published = self.core.published();
        check_history(given, published.history().epoch(), published.progress().log_id.is_some())
    }

    /// Counts a refusal by its reason, if a caller is told of it.
    fn counted(&self, writer: Writer, refusal: WriteError) -> WriteError {
        if writer != Writer::Node {
            self.counters.refuse(refusal.reason());
        }
        refusal
    }

    /// A command that may have reached the log, and a peer, before.
    pub(super) fn stopped_write(&self) -> WriteError {
        self.stopped(true)
    }

    fn stopped(&self, maybe_applied: bool) -> WriteError {
        let reason = self.fatal.in_words().unwrap_or_else(|| "the node is shutting down".to_owned());
        WriteError::Stopped { reason, maybe_applied }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::engine::REFUSALS;
    use crate::engine::tests::lone;
    use crate::kv::machine::{KvCommand, KvMachine, KvReply};
    use crate::machine::ApplyContext;
    use crate::reason::Reason;
    use crate::types::Quota;

    const DEADLINE: Duration = Duration::from_secs(30);

    /// Keeps nothing, and replies with what it was given. `Value` cannot be read from a format that does not describe itself.
    struct Echo<C>(std::marker::PhantomData<C>);

    impl<C> StateMachine for Echo<C>
    where
        C: serde::Serialize + serde::de::DeserializeOwned + Into<Value> + Send + Sync + 'static,
    {
        type Command = C;
        type Reply = Value;
        type Query = ();
        type Answer = ();
        type View = ();

        fn apply(&mut self, _: &ApplyContext, command: C) -> Value {
            command.into()
        }

        fn view(&self) {}

        fn query((): &(), (): ()) {}

        fn write_snapshot((): &(), _: &mut dyn Write) -> io::Result<()> {
            Ok(())
        }

        fn read_snapshot(_: u32, _: &mut dyn Read) -> io::Result<Self> {
            Ok(Self(std::marker::PhantomData))
        }
    }

    async fn engine<C>() -> Engine<Echo<C>>
    where
        Echo<C>: StateMachine,
    {
        let engine = lone::engine_of(false, Echo(std::marker::PhantomData)).await;
        assert!(engine.ready(DEADLINE).await);
        engine
    }

    #[tokio::test(start_paused = true)]
    async fn a_command_that_cannot_be_decoded_again_is_not_proposed() {
        let engine = engine::<Value>().await;
        let before = engine.state().last_log;
        for command in [json!({"a": 1}), json!(null), json!([1, "two"])] {
            let refused = engine.write(command).await.unwrap_err();
            assert!(
                matches!(refused, WriteError::Undecodable { .. }) && !refused.maybe_applied(),
                "{refused}"
            );
        }
        let state = engine.state();
        assert_eq!((state.last_log, state.fatal), (before, None));
        engine.shutdown().await;
    }

    #[test]
    fn only_a_history_that_is_known_to_be_another_one_is_refused_for_good() {
        let (one, other, unknown) = (HistoryEpoch(1), HistoryEpoch(2), HistoryEpoch::UNKNOWN);
        for has_begun in [false, true] {
            assert!(check_history(one, one, has_begun).is_ok());
            assert!(check_history(unknown, one, has_begun).is_ok());
            assert!(check_history(unknown, unknown, has_begun).is_ok());
            assert!(matches!(check_history(one, other, has_begun), Err(WriteError::OtherHistory { .. })));
        }
        assert!(matches!(check_history(one, unknown, false), Err(WriteError::NotLeader { .. })), "not yet");
        assert!(check_history(one, unknown, true).is_ok(), "it will never know");
    }

    #[tokio::test(start_paused = true)]
    async fn a_reply_that_cannot_be_decoded_is_an_error_of_a_write_that_was_applied() {
        let engine = engine::<u8>().await;
        let session = engine.open_session(Duration::ZERO).await.unwrap();
        let ticket = session.begin().unwrap();
        let mut positions = Vec::new();
        // The second time it is what the table of sessions has kept.
        for _ in 0..2 {
            let refused = engine.write_in(&ticket, 7).await.unwrap_err();
            let WriteError::UnreadableReply { log_id, .. } = &refused else { panic!("{refused}") };
            assert!(refused.maybe_applied());
            positions.push(*log_id);
        }
        assert_eq!(positions[0], positions[1], "applied once");
        assert!(engine.state().applied >= Some(positions[1]));
        assert_eq!(engine.state().fatal, None);
        engine.shutdown().await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_written_to_a_node_that_has_stopped_is_not_called_perhaps_applied() {
        let engine = engine::<u8>().await;
        let session = engine.open_session(Duration::ZERO).await.unwrap();
        let ticket = session.begin().unwrap();
        engine.shutdown().await;
        let by_leader = WriteOptions { ack: AckLevel::Leader, ..WriteOptions::default() };
        for refused in [
            engine.write(7).await.map(drop),
            engine.write_in(&ticket, 7).await.map(drop),
            engine.write_with(7, by_leader).await.map(drop),
            engine.open_session(Duration::ZERO).await.map(drop),
        ] {
            let refused = refused.unwrap_err();
            assert!(matches!(refused, WriteError::Stopped { .. }), "{refused}");
            assert!(!refused.maybe_applied(), "{refused}");
        }
        assert_eq!(engine.inner.inflight_commands.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_every_voter_holds_has_not_timed_out() {
        let engine = lone::engine(false).await;
        assert!(engine.ready(DEADLINE).await);
        let (tenant, collection) = ("t".to_owned(), "c".to_owned());
        let command =
            || KvCommand::Delete { tenant: tenant.clone(), collection: collection.clone(), key: "k".into() };
        for _ in 0..10 {
            let all =
                WriteOptions { ack: AckLevel::All, ack_timeout: Duration::ZERO, ..WriteOptions::default() };
            match engine.write_with(command(), all).await {
                Ok(written) => assert_eq!((written.ack, written.held_by), (AckLevel::All, vec![1])),
                // This node may not have noted its own flush yet; but somebody is missing.
                Err(error @ WriteError::AckTimeout { .. }) => {
                    let WriteError::AckTimeout { log_id, missing, .. } = &error else { unreachable!() };
                    assert_eq!(missing, &[1]);
                    let written = Engine::<KvMachine>::unconfirmed(&error).unwrap();
                    assert_eq!((written.log_id, written.ack), (*log_id, AckLevel::Quorum));
                    assert!(matches!(written.reply, Some(KvReply::Deleted { existed: false, .. })));
                }
                Err(other) => panic!("{other}"),
            }
        }
        engine.shutdown().await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_node_writes_for_itself_is_not_refused_by_the_limits_on_what_callers_write() {
        let engine = lone::engine(false).await;
        assert!(engine.ready(DEADLINE).await);
        let put = |value: &'static str| KvCommand::PutExpiring {
            tenant: "t".to_owned(),
            collection: "c".to_owned(),
            key: "k".into(),
            value: value.into(),
            ttl_ms: 5_000,
        };
        engine.write(put("it is gone in time")).await.unwrap();
        // Less than may be set: what a node writes for itself is small.
        engine.inner.settings.send_modify(|settings| settings.max_command_bytes = 1);
        let refused = || {
            let counted = REFUSALS.into_iter().zip(engine.counters().refused());
            let of = |why| counted.clone().find(|(reason, _)| *reason == why).unwrap().1;
            (of(Reason::TooLarge), of(Reason::Overloaded))
        };
        assert!(matches!(engine.write(put("")).await, Err(WriteError::TooLarge { .. })));
        // As much is in flight as may be, and more will not come to its end.
        let inflight = &engine.inner.inflight_bytes;
        let full = engine.settings().max_inflight_bytes;
        inflight.fetch_add(full, Ordering::Relaxed);

        engine.set_state_quota(Some(Quota::MIN_BYTES)).await.unwrap();
        let expired = async {
            while engine.report().state.bytes != Some(0) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(DEADLINE, expired).await.expect("the key expires");
        assert!(engine.counters().clock_entries.load(Ordering::Relaxed) > 0);
        assert_eq!(refused(), (1, 0));
        // A session is a caller's, but no command that could be too large.
        let session = engine.open_session(Duration::ZERO).await;
        assert!(matches!(session, Err(WriteError::Overloaded)), "{session:?}");
        inflight.fetch_sub(full, Ordering::Relaxed);
        engine.open_session(Duration::ZERO).await.unwrap();
        assert_eq!(refused(), (1, 1));
        engine.shutdown().await;
    }
}
