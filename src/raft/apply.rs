//! Committed entries into the state machine.
//!
//! A reader that saw half a batch would see a state that no position explains. If a caller were told of a write too early,
//! its next read would not find the write. So one task applies, in batches, and in this order:
//!
//! ```text
//! entry -> envelope -> clocks -> sessions -> quota -> machine -> answer kept        per entry
//!                                                                  |
//!                             publish position, sizes, wakes; a view if a reader waits  per batch
//!                                                                  |
//!                                                       answers to the callers
//! ```
//!
//! The machine, the table of sessions, the position, the clocks, the agreed versions and the membership change together, in memory,
//! between two awaits.
//!
//! # Invariants
//!
//! - No entry is applied twice (asserted), and none is left out ([`RaftLog`](super::log::RaftLog) sees to that).
//! - What an entry does follows from the log alone: a refusal by a session or the quota is the same on every node.
//! - A panic of the machine is an error of the batch, which stops the node. It leaves no half of an entry published.
//! - A batch has a bound in entries, in bytes of commands and in bytes of replies, also at a start, when the whole log waits.
//! - A snapshot that comes from the leader replaces all of it between two batches, and what was known of the old state begins anew.
//!
//! What it does not do: make anything durable. After a restart the state is rebuilt from the newest snapshot and the log.
//! `docs/design/write-path.md` has the whole way of a write.

mod quota;
mod recover;
mod state_machine;
mod told;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use openraft::entry::RaftPayload as _;
use openraft::storage::{ApplyResponder, EntryResponder};
use tokio::sync::watch;
use tokio::time::Instant;

use super::activity::Activity;
use super::agreed_versions::AgreedVersions;
use super::agreement::Agreement;
use super::envelope::{self, CommandAsSealed, Content};
use super::log::{WRITES, position};
use super::published::{Applied, Progress, Published};
use super::snapshot::{Restored, SnapshotBuilder};
use super::type_config::{self, Entry, EntryAnswer, Payload, StoredMembership, TypeConfig};
use crate::feed::{Feed, Recorder};
use crate::machine::sessions::{Admission, SessionRefusal, SessionTable};
use crate::machine::{self, ApplyContext, StateMachine, Wakes};
use crate::storage::SnapshotStore;
use crate::types::{self, InitialState, MachineVersion, Quota, check_agreed, check_initial_state};

/// Where a log holds the membership that its cluster was founded with.
const FOUNDING_INDEX: u64 = 0;
/// Most bytes of commands taken into memory for that; the last command may exceed it.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Most bytes of replies before that; the last reply may exceed it.
const REPLY_BYTES: usize = 4 * 1024 * 1024;

/// The user's machine with all that must change together with it.
pub(crate) struct Applier<M: StateMachine> {
    node_id: types::NodeId,
    machine: M,
    sessions: SessionTable,
    progress: Progress,
    membership: StoredMembership,
    published: Arc<Published<M::View>>,
    snapshots: Arc<dyn SnapshotStore>,
    activity: Arc<Activity>,
    agreement: Arc<Agreement>,
    agreed: Arc<AgreedVersions>,
    /// Where those who follow find what was applied.
    recorder: Recorder,
    /// The state that it began with, while it has applied nothing.
    begun_with: Option<InitialState>,
    /// See [`bound_snapshot_lag`](Self::bound_snapshot_lag).
    snapshot_lag_bytes: u64,
    /// The snapshot that is being written, if one is, and the bytes of commands that it covers.
    writing: Option<(watch::Receiver<()>, u64)>,
}

fn wakes<M: StateMachine>(machine: &M) -> Wakes {
    let mut wakes = Wakes::default();
    machine.wakes(&mut wakes);
    wakes
}

impl<M: StateMachine> Applier<M> {
    /// Has entries wait for a snapshot that is being written once so many bytes of commands have been applied since it was
    /// begun: whatever they replace or remove is in memory until it is written. A leader whose entries wait refuses more
    /// when what is in flight reaches its limit.
    pub(crate) fn bound_snapshot_lag(&mut self, bytes: u64) {
        self.snapshot_lag_bytes = bytes;
    }

    async fn wait_for_snapshot(&mut self) {
        let Some((mut writing, covered)) = self.writing.clone() else { return };
        if writing.has_changed().is_err() {
            self.writing = None;
        } else if self.progress.command_bytes.saturating_sub(covered) >= self.snapshot_lag_bytes {
            tracing::debug!("entries wait for the snapshot that is being written");
            // Readers find all that is applied meanwhile.
            self.published.advance(self.progress);
            self.published.publish(self.applied());
            // Nothing is sent: it ends when the view is gone.
            while writing.changed().await.is_ok() {}
            self.writing = None;
        }
    }

    /// Where the state can be read while it is being applied to.
    pub(crate) fn published(&self) -> Arc<Published<M::View>> {
        self.published.clone()
    }

    /// What this node counts of its own work.
    pub(crate) fn activity(&self) -> Arc<Activity> {
        self.activity.clone()
    }

    /// The table of sessions as it is, and up to where that is applied.
    pub(crate) fn sessions(&self) -> (Progress, SessionTable) {
        (self.progress, self.sessions.clone())
    }

    /// What it notes of its states.
    pub(crate) fn agreement(&self) -> Arc<Agreement> {
        self.agreement.clone()
    }

    /// What it has applied, for those who follow.
    pub(crate) fn feed(&self) -> Arc<Feed> {
        self.recorder.feed().clone()
    }

    /// The versions of its machine that the members have agreed on.
    pub(crate) fn agreed_versions(&self) -> Arc<AgreedVersions> {
        self.agreed.clone()
    }

    fn replace(&mut self, content: Restored<M>, meta: &crate::storage::SnapshotMeta) {
        let newer =
            |applied: types::LogId| meta.log_id.index > applied.index && meta.log_id.term >= applied.term;
        assert!(
            self.progress.log_id.is_none_or(newer),
            "invariant: a snapshot that is installed is newer than the state"
        );
        self.set_membership(super::snapshot::stored_membership(meta));
        self.set_quota(Quota::from_stored(meta.quota_bytes));
        self.agreed.replace(&meta.machines.agreed);
        self.begin_anew(content, (meta.log_id, meta.clock), meta.history);
    }

    /// The state is that of `content` from now on, as of `log_id` of `history`.
    fn begin_anew(
        &mut self,
        content: Restored<M>,
        (log_id, clock): (types::LogId, types::ClusterClock),
        history: types::HistoryEpoch,
    ) {
        let mut machine = content.machine;
        machine.replaces(&self.machine);
        self.machine = machine;
        self.sessions = content.sessions;
        self.progress.log_id = Some(log_id);
        self.progress.clock = clock;
        self.progress.history = history;
        self.measure();
        self.progress.installed_bytes += self.progress.state_bytes.unwrap_or_default();
        self.recorder.begin(history, self.progress.next_index());
        self.published.advance(self.progress);
        // The last view would keep the state before alive.
        self.published.publish(self.applied());
        // Last: whoever asks for the present life before it looks at what is published finds no older state in it.
        self.agreement.begin_anew();
    }

    fn set_membership(&mut self, membership: StoredMembership) {
        self.activity.saw_members(membership.membership().nodes().map(|(node_id, _)| *node_id));
        self.membership = membership;
    }

    fn measure(&mut self) {
        self.progress.state_hash = self.machine.running_hash();
        self.progress.wakes = wakes(&self.machine);
        self.progress.sessions = self.sessions.len();
        self.progress.session_bytes = self.sessions.bytes();
        self.progress.largest_opener = self.sessions.largest_opener();
        self.progress.state_bytes = self.machine.state_bytes();
    }

    fn applied(&self) -> Applied<M::View> {
        Applied { progress: self.progress, view: self.machine.view() }
    }

    pub(super) fn snapshot_builder(&mut self) -> SnapshotBuilder<M> {
        let builder = SnapshotBuilder::new(
            self.applied(),
            self.sessions.clone(),
            (self.membership.clone(), self.agreed.versions()),
            self.snapshots.clone(),
            (self.activity.clone(), self.feed()),
        );
        self.writing = Some((builder.written(), self.progress.command_bytes));
        builder
    }

    /// Tells how far the machine is, and leaves a view if somebody waits for one.
    pub(crate) fn publish_if_wanted(&mut self) {
        self.measure();
        if self.published.advance(self.progress) {
            self.published.publish(self.applied());
        }
        // Last: whoever follows finds in the state what it was told.
        self.recorder.publish();
    }

    /// Applies entries off `batch` and publishes how far that is. The replies may be sent afterwards, not before. Stops
    /// early when they are many bytes.
    fn apply_batch(
        &mut self,
        batch: &mut impl Iterator<Item = io::Result<EntryResponder<TypeConfig>>>,
    ) -> io::Result<Vec<(ApplyResponder<TypeConfig>, EntryAnswer)>> {
        let begun = Instant::now();
        let traced = tracing::enabled!(target: WRITES, tracing::Level::TRACE);
        let (mut replies, mut bytes, mut entries) = (Vec::with_capacity(batch.size_hint().0), 0, 0);
        while bytes < REPLY_BYTES
            && let Some(item) = batch.next()
        {
            let (entry, responder) = item?;
            let command = matches!(entry.payload, Payload::Normal(_));
            let answer = self.apply_entry(entry)?;
            entries += 1;
            bytes += answer.reply.as_ref().map_or(0, Bytes::len);
            if traced
                && command
                && let Some(log_id) = self.progress.log_id
            {
                tracing::trace!(target: WRITES, node_id = self.node_id, %log_id, "applied");
            }
            replies.extend(responder.map(|responder| (responder, answer)));
        }
        self.publish_if_wanted();
        self.activity.sessions.add(self.sessions.take_counts());
        if let Some(applied) = self.progress.log_id {
            self.activity.applied(entries, applied.index, begun.elapsed());
        }
        Ok(replies)
    }

    /// Applies one entry.
    fn apply_entry(&mut self, entry: Entry) -> io::Result<EntryAnswer> {
        let log_id = position(&entry);
        if let Some(applied) = self.progress.log_id {
            // That none is left out is the log's part: see `RaftLog::entries_stream`.
            assert!(log_id.index > applied.index, "invariant: no entry is applied twice");
            assert!(log_id.term >= applied.term, "invariant: terms do not fall along the log");
        }
        let answer = match &entry.payload {
            Payload::Blank => EntryAnswer::empty(),
            Payload::Membership(_) => {
                let membership = entry.payload.get_membership().expect("invariant: just matched");
                if log_id.index == FOUNDING_INDEX {
                    self.found(&type_config::from_membership(&membership)).map_err(|error| {
                        io::Error::new(io::ErrorKind::InvalidData, format!("entry {log_id}: {error}"))
                    })?;
                }
                self.set_membership(StoredMembership::new(Some(type_config::log_id(log_id)), membership));
                EntryAnswer::empty()
            }
            Payload::Normal(command) => {
                self.progress.command_bytes += command.bytes.len() as u64;
                let (opened, sealed) = envelope::open_sealed::<M>(&command.bytes).map_err(|error| {
                    io::Error::new(io::ErrorKind::InvalidData, format!("entry {log_id}: {error}"))
                })?;
                self.progress.clock.advance(log_id.term, opened.stamp);
                self.carry_out(log_id, opened.content, sealed)?
            }
        };
        self.progress.log_id = Some(log_id);
        self.recorder.applied(log_id.index);
        self.agreement.applied(&self.machine, log_id);
        Ok(answer)
    }

    /// Begins the history of a cluster, with what its founders agreed on.
    fn found(
        &mut self,
        founders: &types::Membership,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let history = types::HistoryEpoch::founded_by(founders);
        self.progress.history = history;
        let founding = founders.founding().map(|(_, founding)| founding);
        let is_restored = founding.is_some_and(|founding| founding.state.is_restored);
        // What a restored state holds was never told.
        self.recorder.begin(history, if is_restored { FOUNDING_INDEX + 1 } else { FOUNDING_INDEX });
        // The hash of a large state takes its time, and others wait meanwhile.
        let own = self.begun_with.take().or_else(|| self.initial_state(is_restored));
        check_initial_state(founding, own)?;
        let versions = founding.map_or(&[][..], |founding| &founding.versions);
        self.machine.begins_with(&|number| {
            number == MachineVersion::FIRST.machine || versions.iter().any(|known| known.machine == number)
        });
        let Some(founding) = founding else { return Ok(()) };
        for version in &founding.versions {
            check_agreed(*version, M::MACHINES)?;
            self.agreed.raise(*version);
        }
        self.progress.is_restored = is_restored;
        Ok(())
    }

    /// Applies what an entry asks for, whose command is `sealed`.
    fn carry_out(
        &mut self,
        log_id: types::LogId,
        content: Content<M::Command>,
        sealed: CommandAsSealed<'_>,
    ) -> io::Result<EntryAnswer> {
        let (elapsed_ms, time_ms) = (self.progress.clock.elapsed_ms, self.progress.clock.log_time_ms());
        let (command, slot) = match content {
            Content::Command(command, slot) => (command, slot),
            Content::OpenSession { session, ttl_ms, opener } => {
                let opened = self.sessions.open(session, ttl_ms, &opener, elapsed_ms);
                return Ok(EntryAnswer {
                    reply: opened.map(|()| Bytes::new()).map_err(Into::into),
                    first: None,
                });
            }
            Content::CloseSession { session } => {
                let closed = u8::from(self.sessions.close(session));
                return Ok(EntryAnswer { reply: Ok(Bytes::copy_from_slice(&[closed])), first: None });
            }
            Content::Clock => {
                self.sessions.expire(elapsed_ms);
                return Ok(EntryAnswer::empty());
            }
            Content::Quota(change) => {
                self.change_quota(change);
                return Ok(EntryAnswer::empty());
            }
            Content::Agreement(version) => {
                self.agreed.raise(version);
                return Ok(EntryAnswer::empty());
            }
        };
        match slot.map(|slot| self.sessions.admit(slot, elapsed_ms)) {
            Some(Admission::Refuse(refusal)) => {
                let expired = u64::from(refusal == SessionRefusal::Expired);
                self.activity.expired_sessions.fetch_add(expired, Relaxed);
                Ok(EntryAnswer { reply: Err(refusal.into()), first: None })
            }
            Some(Admission::Repeat { log_id: first, reply }) => {
                assert!(first < log_id, "invariant: a write is repeated after it was applied");
                self.activity.repeated_answers.fetch_add(1, Relaxed);
                Ok(EntryAnswer { reply: Ok(reply), first: Some(first) })
            }
            Some(Admission::Apply) | None => {
                if let Some(refusal) = self.over_quota(&command) {
                    self.activity.quota_refusals.fetch_add(1, Relaxed);
                    return Ok(EntryAnswer { reply: Err(refusal), first: None });
                }
                let context = ApplyContext { log_id, elapsed_ms, time_ms };
                let reply = self.apply_command(&context, command, sealed);
                // What cannot be encoded is kept as nothing, which its caller cannot read: it was applied all the same, here
                // and on every other node.
                let reply =
                    machine::encode(&M::reply_content(&reply)).map(Bytes::from).unwrap_or_else(|error| {
                        tracing::error!(%log_id, %error, "the reply to a command cannot be encoded");
                        Bytes::new()
                    });
                if let Some(slot) = slot {
                    self.record(slot, log_id, reply.clone());
                }
                Ok(EntryAnswer { reply: Ok(reply), first: None })
            }
        }
    }

    /// Applies a command, and records what it does for those who follow.
    fn apply_command(
        &mut self,
        context: &ApplyContext,
        command: M::Command,
        sealed: CommandAsSealed<'_>,
    ) -> M::Reply {
        if M::tells_events(&command) {
            let machine = &mut self.machine;
            return self.recorder.tell(context, |events| machine.apply_telling(context, command, events));
        }
        let reply = self.machine.apply(context, command);
        self.recorder.command(context, sealed.wrote, sealed.encoded);
        reply
    }

    /// Keeps the answer to the write at `slot` for its session.
    fn record(&mut self, slot: types::SessionSlot, log_id: types::LogId, reply: Bytes) {
        let evicted = self.sessions.record(slot, log_id, reply);
        if evicted > 0 {
            let bytes = self.sessions.bytes();
            tracing::warn!(%log_id, evicted, bytes, "closed the largest sessions: too many bytes of answers are kept");
        }
    }
}

#[cfg(test)]
mod tests;
