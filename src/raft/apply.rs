//! Committed entries into the state machine.
//!
//! A reader that saw half a batch would see a state that no position explains. A caller that was told of a write before it can be
//! read would not find it. So one task applies, in batches, and in this order:
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

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use futures::{FutureExt, Stream, StreamExt};
use openraft::OptionalSend;
use openraft::entry::RaftPayload as _;
use openraft::storage::{ApplyResponder, EntryResponder, RaftStateMachine, Snapshot};
use tokio::sync::watch;
use tokio::time::Instant;

use super::activity::Activity;
use super::agreed_versions::AgreedVersions;
use super::agreement::Agreement;
use super::envelope::{self, Content, QuotaChange};
use super::log::{WRITES, position};
use super::published::{Applied, Progress, Published};
use super::snapshot::{Restored, SnapshotBuilder, SnapshotData, install};
use super::type_config::{
    self, Answer, Entry, LogId, NotApplied, Payload, SnapshotMeta, StoredMembership, TypeConfig,
};
use crate::machine::sessions::{Admission, SessionRefusal, SessionTable};
use crate::machine::{self, ApplyContext, StateMachine, Wakes};
use crate::runtime::whole_ms;
use crate::storage::{LogStore, SnapshotStore};
use crate::types::{
    self, InitialState, MachineVersion, Quota, QuotaSource, check_agreed, check_initial_state,
};

/// Most entries applied before readers and callers are told. After a restart the whole log may be waiting.
const PUBLISH_ENTRIES: usize = 4096;
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
    /// The state of the newest snapshot in `snapshots`, or `machine` when there is none, on node `node_id`.
    ///
    /// # Errors
    /// When the newest snapshot is corrupt, or not one of this machine.
    pub(crate) fn recover(
        node_id: types::NodeId,
        machine: M,
        snapshots: Arc<dyn SnapshotStore>,
    ) -> Result<Self, crate::error::StorageError> {
        let progress = Progress {
            state_hash: machine.running_hash(),
            wakes: wakes(&machine),
            state_bytes: machine.state_bytes(),
            ..Progress::default()
        };
        let mut this = Self {
            node_id,
            published: Published::new(Applied { progress, view: machine.view() }),
            machine,
            sessions: SessionTable::default(),
            progress,
            membership: StoredMembership::default(),
            snapshots,
            activity: Arc::default(),
            agreement: Arc::default(),
            agreed: Arc::default(),
            begun_with: None,
            snapshot_lag_bytes: u64::MAX,
            writing: None,
        };
        if let Some(handle) = this.snapshots.newest()? {
            let (begun, upto, bytes) = (Instant::now(), handle.meta().log_id, handle.len_bytes());
            tracing::info!(%upto, bytes, "reading the snapshot");
            let content = super::snapshot::read::<M>(&handle)?;
            tracing::info!(%upto, took_ms = whole_ms(begun.elapsed()), "read the snapshot");
            this.replace(content, handle.meta());
            this.activity.snapshot_bytes.store(handle.len_bytes(), Relaxed);
        }
        Ok(this)
    }

    /// The state that the machine begins with: it has applied nothing yet. None if it cannot be hashed: then it is compared as
    /// little as any later one.
    pub(crate) fn initial_state(&mut self, is_restored: bool) -> Option<InitialState> {
        debug_assert!(self.progress.log_id.is_none(), "invariant: it has applied nothing");
        let hashed = super::snapshot::catch("hashing the state", || Ok(M::state_hash(&self.machine.view())));
        let hash = hashed
            .inspect_err(|error| tracing::warn!(%error, "the initial state is not compared with the others'"))
            .ok()?;
        self.begun_with = Some(InitialState { hash_version: M::HASH_VERSION, hash, is_restored });
        self.begun_with
    }

    /// The log still holds what its cluster was founded with: a state that was restored.
    pub(crate) fn begins_restored(&mut self) {
        self.progress.is_restored = true;
        self.published.advance(self.progress);
    }

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

    /// Applies what `log` knows to be committed, piece by piece. The core would do the same when it starts, with 64 entries
    /// in memory at a time, however large they are.
    ///
    /// # Errors
    /// What the log says that cannot be read, or the machine that cannot be applied.
    pub(crate) fn replay(&mut self, log: &dyn LogStore) -> io::Result<()> {
        let Some(committed) = log.committed() else { return Ok(()) };
        let begun = Instant::now();
        let first = self.progress.next_index();
        while self.progress.next_index() <= committed.index {
            let next = self.progress.next_index();
            let entries = log.read(next, committed.index + 1, BATCH_BYTES)?;
            if entries.first().is_none_or(|entry| entry.log_id.index != next) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("entry {next} is missing")));
            }
            let last = entries.last().filter(|last| last.log_id.index == committed.index);
            if let Some(last) = last.filter(|last| last.log_id != committed) {
                let message = format!("the log holds {} where {committed} is committed", last.log_id);
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
            let piece = entries.into_iter().map(|entry| {
                let entry = type_config::entry(entry)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                Ok((entry, None))
            });
            let mut piece = piece.peekable();
            while piece.peek().is_some() {
                super::snapshot::catch("applying a command", || self.apply_batch(&mut piece))?;
            }
        }
        let entries = self.progress.next_index() - first;
        if entries > 0 {
            let took_ms = whole_ms(begun.elapsed());
            tracing::info!(first, upto = committed.index, took_ms, "applied the log");
        }
        Ok(())
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
        let mut machine = content.machine;
        machine.replaces(&self.machine);
        self.machine = machine;
        self.sessions = content.sessions;
        self.set_membership(super::snapshot::stored_membership(meta));
        self.progress.log_id = Some(meta.log_id);
        self.progress.clock = meta.clock;
        self.progress.history = meta.history;
        self.set_quota(Quota::from_stored(meta.quota_bytes));
        self.agreed.replace(&meta.machines.agreed);
        self.measure();
        self.progress.installed_bytes += self.progress.state_bytes.unwrap_or_default();
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

    /// The answers kept for sessions are bounded by the quota as well: both count on the same memory.
    fn set_quota(&mut self, quota: Option<Quota>) {
        self.progress.quota = quota;
        self.sessions.fit_quota(quota.map(|quota| quota.bytes));
    }

    fn change_quota(&mut self, change: QuotaChange) {
        let current = self.progress.quota;
        let by_operator = current.is_some_and(|quota| quota.source == QuotaSource::Operator);
        let quota = match change {
            QuotaChange::Follow(_) if by_operator => return,
            QuotaChange::Follow(bytes) => Some(Quota { bytes, source: QuotaSource::Memory }),
            QuotaChange::Set(bytes) => Some(Quota { bytes, source: QuotaSource::Operator }),
            QuotaChange::Release => current.map(|quota| Quota { source: QuotaSource::Memory, ..quota }),
        };
        // As it is stored: in a snapshot, and on the nodes that are restored from it.
        self.set_quota(quota.and_then(|quota| Quota::from_stored(quota.to_stored())));
    }

    /// Why `command` must not be applied: it would have the state outgrow its quota.
    fn over_quota(&self, command: &M::Command) -> Option<NotApplied> {
        let (quota, state_bytes) = self.progress.quota.zip(self.machine.state_bytes())?;
        let room = quota.bytes.saturating_sub(state_bytes);
        // The view is gone before the machine changes again, so nothing needs to be copied for it.
        let exceeds =
            M::most_growth_bytes(command) > room && M::growth_bytes(&self.machine.view(), command) > room;
        exceeds.then_some(NotApplied::QuotaExceeded { state_bytes, quota_bytes: quota.bytes })
    }

    fn applied(&self) -> Applied<M::View> {
        Applied { progress: self.progress, view: self.machine.view() }
    }

    fn snapshot_builder(&mut self) -> SnapshotBuilder<M> {
        let builder = SnapshotBuilder::new(
            self.applied(),
            self.sessions.clone(),
            (self.membership.clone(), self.agreed.versions()),
            self.snapshots.clone(),
            self.activity.clone(),
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
    }

    /// Applies entries off `batch` and publishes how far that is. The replies may be sent afterwards, not before. Stops
    /// early when they are many bytes.
    fn apply_batch(
        &mut self,
        batch: &mut impl Iterator<Item = io::Result<EntryResponder<TypeConfig>>>,
    ) -> io::Result<Vec<(ApplyResponder<TypeConfig>, Answer)>> {
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
    fn apply_entry(&mut self, entry: Entry) -> io::Result<Answer> {
        let log_id = position(&entry);
        if let Some(applied) = self.progress.log_id {
            // That none is left out is the log's part: see `RaftLog::entries_stream`.
            assert!(log_id.index > applied.index, "invariant: no entry is applied twice");
            assert!(log_id.term >= applied.term, "invariant: terms do not fall along the log");
        }
        let answer = match &entry.payload {
            Payload::Blank => Answer::empty(),
            Payload::Membership(_) => {
                let membership = entry.payload.get_membership().expect("invariant: just matched");
                if log_id.index == FOUNDING_INDEX {
                    self.found(&type_config::from_membership(&membership)).map_err(|error| {
                        io::Error::new(io::ErrorKind::InvalidData, format!("entry {log_id}: {error}"))
                    })?;
                }
                self.set_membership(StoredMembership::new(Some(type_config::log_id(log_id)), membership));
                Answer::empty()
            }
            Payload::Normal(command) => {
                self.progress.command_bytes += command.bytes.len() as u64;
                let opened = envelope::open::<M>(&command.bytes).map_err(|error| {
                    io::Error::new(io::ErrorKind::InvalidData, format!("entry {log_id}: {error}"))
                })?;
                self.progress.clock.advance(log_id.term, opened.stamp);
                self.carry_out(log_id, opened.content)?
            }
        };
        self.progress.log_id = Some(log_id);
        self.agreement.applied(&self.machine, log_id);
        Ok(answer)
    }

    /// Begins the history of a cluster, with what its founders agreed on.
    fn found(
        &mut self,
        founders: &types::Membership,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.progress.history = types::HistoryEpoch::founded_by(founders);
        let founding = founders.founding().map(|(_, founding)| founding);
        let is_restored = founding.is_some_and(|founding| founding.state.is_restored);
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

    fn carry_out(&mut self, log_id: types::LogId, content: Content<M::Command>) -> io::Result<Answer> {
        let (elapsed_ms, time_ms) = (self.progress.clock.elapsed_ms, self.progress.clock.log_time_ms());
        let (command, slot) = match content {
            Content::Command(command, slot) => (command, slot),
            Content::OpenSession { session, ttl_ms, opener } => {
                let opened = self.sessions.open(session, ttl_ms, &opener, elapsed_ms);
                return Ok(Answer { reply: opened.map(|()| Bytes::new()).map_err(Into::into), first: None });
            }
            Content::CloseSession { session } => {
                let closed = u8::from(self.sessions.close(session));
                return Ok(Answer { reply: Ok(Bytes::copy_from_slice(&[closed])), first: None });
            }
            Content::Clock => {
                self.sessions.expire(elapsed_ms);
                return Ok(Answer::empty());
            }
            Content::Quota(change) => {
                self.change_quota(change);
                return Ok(Answer::empty());
            }
            Content::Agreement(version) => {
                self.agreed.raise(version);
                return Ok(Answer::empty());
            }
        };
        match slot.map(|slot| self.sessions.admit(slot, elapsed_ms)) {
            Some(Admission::Refuse(refusal)) => {
                let expired = u64::from(refusal == SessionRefusal::Expired);
                self.activity.expired_sessions.fetch_add(expired, Relaxed);
                Ok(Answer { reply: Err(refusal.into()), first: None })
            }
            Some(Admission::Repeat { log_id, reply }) => {
                self.activity.repeated_answers.fetch_add(1, Relaxed);
                Ok(Answer { reply: Ok(reply), first: Some(log_id) })
            }
            Some(Admission::Apply) | None => {
                if let Some(refusal) = self.over_quota(&command) {
                    self.activity.quota_refusals.fetch_add(1, Relaxed);
                    return Ok(Answer { reply: Err(refusal), first: None });
                }
                let context = ApplyContext { log_id, elapsed_ms, time_ms };
                let reply = self.machine.apply(&context, command);
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
                Ok(Answer { reply: Ok(reply), first: None })
            }
        }
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

/// The entries of `entries` that are there, at least one unless it has ended. Not more than fit in memory: a node that
/// starts, or catches up, has all of its log there.
async fn next_batch<S>(entries: &mut S) -> Vec<io::Result<EntryResponder<TypeConfig>>>
where
    S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin,
{
    let (mut batch, mut bytes) = (Vec::new(), 0);
    let mut next = entries.next().await;
    while let Some(item) = next {
        if let Ok((Entry { payload: Payload::Normal(command), .. }, _)) = &item {
            bytes += command.bytes.len();
        }
        batch.push(item);
        if batch.len() >= PUBLISH_ENTRIES || bytes >= BATCH_BYTES {
            break;
        }
        next = entries.next().now_or_never().flatten();
    }
    batch
}

impl<M: StateMachine> RaftStateMachine<TypeConfig> for Applier<M> {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder<M>;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.progress.log_id.map(type_config::log_id), self.membership.clone()))
    }

    async fn apply<S>(&mut self, entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        let mut entries = entries.fuse();
        loop {
            self.wait_for_snapshot().await;
            let batch = next_batch(&mut entries).await;
            if batch.is_empty() {
                return Ok(());
            }
            let mut batch = batch.into_iter().peekable();
            while batch.peek().is_some() {
                let replies = super::snapshot::catch("applying a command", || self.apply_batch(&mut batch))?;
                for (responder, reply) in replies {
                    responder.send(reply);
                }
                tokio::task::consume_budget().await;
            }
        }
    }

    /// A snapshot of nothing is refused, unless the core insists.
    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<SnapshotBuilder<M>> {
        if self.progress.log_id.is_none() && !force {
            return None;
        }
        Some(self.snapshot_builder())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder<M> {
        self.snapshot_builder()
    }

    async fn install_snapshot(&mut self, _meta: &SnapshotMeta, snapshot: SnapshotData) -> io::Result<()> {
        let begun = Instant::now();
        let (content, handle) = install::<M>(snapshot, self.snapshots.clone()).await?;
        let (upto, bytes, took) = (handle.meta().log_id, handle.len_bytes(), begun.elapsed());
        self.activity.snapshots_installed.add(bytes, took);
        self.activity.snapshot_bytes.store(bytes, Relaxed);
        tracing::info!(%upto, bytes, took_ms = crate::runtime::whole_ms(took), "installed the leader's snapshot");
        self.replace(content, handle.meta());
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> io::Result<
        Option<Snapshot<type_config::CommittedLeaderId, types::NodeId, types::Member, SnapshotData>>,
    > {
        let newest = self.snapshots.newest().map_err(io::Error::other)?;
        Ok(newest.map(|handle| Snapshot {
            meta: super::snapshot::meta(handle.meta()),
            snapshot: SnapshotData::Placed(handle),
        }))
    }
}

#[cfg(test)]
mod quota_tests;
#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::machine::sessions::MIN_TTL_MS;
    use crate::raft::clock::Reading;
    use crate::storage::MemorySnapshots;
    use crate::types::SessionSlot;

    /// Answers with as many bytes as it is asked for.
    #[derive(Debug, Default)]
    struct Talkative;

    impl StateMachine for Talkative {
        type Command = usize;
        type Reply = Bytes;
        type Query = ();
        type Answer = ();
        type View = ();

        fn apply(&mut self, _: &ApplyContext, bytes: usize) -> Bytes {
            vec![0; bytes].into()
        }

        fn view(&self) {}

        fn query((): &(), (): ()) {}

        fn write_snapshot((): &(), _: &mut dyn Write) -> io::Result<()> {
            Ok(())
        }

        fn read_snapshot(_: u32, _: &mut dyn Read) -> io::Result<Self> {
            Ok(Self)
        }
    }

    fn entry(index: u64, command: Bytes) -> io::Result<EntryResponder<TypeConfig>> {
        let payload = types::Payload::Command(command);
        let entry = types::Entry { log_id: types::LogId::new(1, index), payload };
        Ok((type_config::entry(entry).unwrap(), None))
    }

    #[test]
    fn what_becomes_of_sessions_is_counted_as_it_is_applied() {
        /// More than the answers of one session may take.
        const HUGE: usize = 40 * 1024 * 1024;
        let mut applier = Applier::recover(1, Talkative, Arc::new(MemorySnapshots::default())).unwrap();
        let at = |counted_ms| Reading { wall_ms: 7_000, term: 1, counted_ms };
        let write = |session, counted_ms, bytes: usize| {
            let slot = SessionSlot { session, sequence: 1, first_unanswered: 1 };
            envelope::seal::<Talkative>(at(counted_ms), &bytes, Some(slot)).unwrap()
        };
        let commands = [
            envelope::seal_open_session(at(0), 1, MIN_TTL_MS, ""),
            envelope::seal_open_session(at(0), 2, MIN_TTL_MS, ""),
            envelope::seal_open_session(at(0), 3, MIN_TTL_MS, ""),
            envelope::seal_close_session(at(0), 1),
            write(2, 0, HUGE),
            write(3, MIN_TTL_MS + 1, 1),
        ];
        let mut batch = (1..).zip(commands).map(|(index, command)| entry(index, command));
        applier.apply_batch(&mut batch).unwrap();
        applier.apply_batch(&mut batch).unwrap();
        let activity = applier.activity();
        let totals = &activity.sessions;
        let totals = [&totals.opened, &totals.closed, &totals.evicted, &totals.expired];
        assert_eq!(totals.map(|total| total.load(Relaxed)), [3, 1, 1, 1]);
        assert_eq!(activity.expired_sessions.load(Relaxed), 1);
        assert_eq!(applier.sessions.len(), 0);
    }
}
