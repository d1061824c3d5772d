//! The task of a replica: it is told, applies, and keeps on its disk.
//!
//! ```text
//! Disconnected -> Connecting -> Syncing -> Synced
//!      ^              |            |  ^       |  a source has applied more
//!      |  none answers|   all lost |  +-------+
//!      +--- pause ----+------------+----------+
//! ```
//!
//! The subscription goes from source to source by itself; it is given up when no source is heard for a while, and taken up again after a pause
//! ([`first_pause`](ReplicaConfig::first_pause)) which doubles up to a minute.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::watch;
use tokio::time::{Instant, interval, sleep};

use super::fetch::Fetched;
use super::state::{ReplicaState, SyncState};
use super::{ReplicaConfig, SharedTold};
use crate::client::{
    ClientError, FollowFrom, FollowedChange, FollowedEntry, FollowedOperation, FollowedProgress,
    SnapshotPart, Subscription,
};
use crate::feed::{FeedContent, FeedRecord};
use crate::machine::{AppliedEvent, EventOperation, StateMachine};
use crate::raft::told::ToldState;
use crate::reason::Reason;
use crate::types::{ClusterClock, HistoryEpoch, LogId, MachineVersion};

/// The longest pause.
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How often it is looked whether any source was heard.
const LOOK: Duration = Duration::from_secs(1);
/// How often its disk is told how far it is where nothing happens that it follows.
const MARK_EVERY: Duration = Duration::from_secs(10);
/// Most entries that are applied before readers learn of them.
const BATCH_ENTRIES: usize = 4096;
/// Most bytes of them.
const BATCH_BYTES: usize = 4 * 1024 * 1024;

/// How the pause grows from the `first` with attempts in vain, of which there was at least one.
pub(super) fn pause(first: Duration, retries: u32) -> Duration {
    first.saturating_mul(1 << retries.saturating_sub(1).min(6)).min(LONGEST_PAUSE)
}

/// Why one subscription is over.
pub(super) enum SubscriptionEnd {
    /// It has the whole state, and follows from there.
    HasState,
    /// No source answers; another attempt may.
    Lost(String),
    /// What comes next is nowhere any more, or the position is no place of this cluster: it needs the whole state.
    NeedsState(String),
    /// It cannot go on.
    Fatal(String),
    /// It was told to follow others.
    Repointed,
}

/// What follows, and where it is told to.
pub(super) struct Follower<M: StateMachine> {
    pub(super) told: ToldState<M>,
    pub(super) initial: Arc<dyn Fn() -> M + Send + Sync>,
    pub(super) config: watch::Receiver<ReplicaConfig>,
    pub(super) state: watch::Sender<ReplicaState>,
    pub(super) shared: SharedTold<M>,
    /// A whole state that is being told: the machine that takes it in, and its position.
    pub(super) receiving: Option<(M, LogId)>,
    /// Entries of a position of which more is to come.
    pub(super) partial: Vec<FollowedEntry>,
    /// When its disk was told last how far it is.
    pub(super) marked: Instant,
}

impl<M: StateMachine> Follower<M> {
    /// Follows for as long as it may, and answers for as long as it is asked.
    pub(super) async fn run(mut self) {
        loop {
            let config = self.config.borrow_and_update().clone();
            self.state.send_modify(|state| {
                state.enter(SyncState::Connecting);
                (state.gave_up, state.heartbeat) = (None, config.heartbeat);
            });
            let over = self.follow(&config).await;
            let over = self.settle().await.map_or_else(SubscriptionEnd::Fatal, |()| over);
            let pause = match self.after(over, &config) {
                Some(pause) => pause,
                // Only whoever points it elsewhere has it go on.
                None => Duration::MAX,
            };
            self.rest(pause).await;
        }
    }

    /// How long to wait after a subscription is over; none to follow no more.
    fn after(&self, over: SubscriptionEnd, config: &ReplicaConfig) -> Option<Duration> {
        let why = match over {
            SubscriptionEnd::HasState => return Some(Duration::ZERO),
            SubscriptionEnd::Repointed => {
                self.state.send_modify(|state| state.retries = 0);
                return Some(Duration::ZERO);
            }
            SubscriptionEnd::Fatal(why) => {
                self.give_up(why);
                return None;
            }
            SubscriptionEnd::NeedsState(why) | SubscriptionEnd::Lost(why) => why,
        };
        let retries = self.state.borrow().retries.saturating_add(1);
        tracing::warn!(retries, "the replica hears from no source: {why}");
        self.state.send_modify(|state| {
            state.enter(SyncState::Disconnected);
            (state.retries, state.error) = (retries, Some(why.clone()));
        });
        if config.retries.is_some_and(|most| retries > most) {
            self.give_up(format!("it was tried {retries} times in vain; the last time: {why}"));
            return None;
        }
        Some(pause(config.first_pause, retries))
    }

    /// Waits, or until it is to follow others. Whoever reads is answered meanwhile.
    pub(super) async fn rest(&mut self, pause: Duration) {
        let mut pause = pin!(sleep(pause));
        loop {
            tokio::select! {
                biased;
                changed = self.config.changed() => match changed {
                    Ok(()) => return,
                    // It ends with its last handle.
                    Err(_) => std::future::pending().await,
                },
                () = self.shared.reader.view_wanted() => self.told.tell(),
                () = &mut pause => return,
            }
        }
    }

    fn give_up(&self, why: String) {
        let position = self.told.bookmark().index;
        tracing::error!("the replica follows no more: {why}. Reads go on as of position {position}");
        self.state.send_modify(|state| {
            state.enter(SyncState::Disconnected);
            state.gave_up = Some(why);
        });
    }

    /// What was taken in can be read, and is on its way to the disk.
    async fn settle(&mut self) -> Result<(), String> {
        self.told.tell();
        self.told.write().await;
        self.told.snapshot(false).await.map_err(|error| format!("its snapshot cannot be written: {error}"))
    }

    /// One subscription, to its end. If what comes next is nowhere any more, the whole state, as a file; as items where a part is followed,
    /// and of sources that send no files.
    async fn follow(&mut self, config: &ReplicaConfig) -> SubscriptionEnd {
        let sends_items = M::TELLS_EVENTS && M::TELLS_STATE;
        let is_part = !config.filters.is_empty();
        match self.subscription(config, is_part).await {
            SubscriptionEnd::NeedsState(why) if !is_part => match self.fetch(config).await {
                Ok(Fetched::Taken) => SubscriptionEnd::HasState,
                Ok(Fetched::Unable) if sends_items => self.subscription(config, true).await,
                Ok(Fetched::Unable) => SubscriptionEnd::NeedsState(why),
                Err(over) => over,
            },
            over => over,
        }
    }

    /// One subscription, to its end. The whole state comes on it as items, if it has to and the replica `takes_items`.
    async fn subscription(&mut self, config: &ReplicaConfig, takes_items: bool) -> SubscriptionEnd {
        let client = match config.connect() {
            Ok(client) => client,
            Err(error) => return SubscriptionEnd::Fatal(error.to_string()),
        };
        *self.shared.client.lock().expect("invariant: no panic under this lock") = Some(client.clone());
        // What an earlier subscription has told a part of is told again.
        (self.receiving, self.partial) = (None, Vec::new());
        let bookmark = self.told.bookmark();
        let from = match bookmark.history == HistoryEpoch::UNKNOWN {
            true => FollowFrom::Beginning,
            false => FollowFrom::After(bookmark),
        };
        let mut subscription = match client.subscribe(config.options(from, takes_items)).await {
            Ok(subscription) => subscription,
            Err(error) => return over(error),
        };
        let mut progress = subscription.progress();
        let wait = config.patience;
        let begun = Instant::now();
        let mut look = interval(LOOK.min(wait));
        loop {
            // Nothing of a half is told: what is received while this waits stays in the subscription.
            tokio::select! {
                biased;
                () = self.shared.reader.view_wanted() => if let Err(error) = self.settle().await {
                    return SubscriptionEnd::Fatal(error);
                },
                changed = self.config.changed() => if changed.is_ok() { return SubscriptionEnd::Repointed },
                entry = subscription.next() => {
                    let outcome = match entry {
                        Some(Ok(entry)) => self.entries(entry, &mut subscription, &mut progress).await,
                        Some(Err(error)) => Err(over(error)),
                        None => Err(SubscriptionEnd::Lost("the subscription has ended".to_owned())),
                    };
                    if let Err(over) = outcome {
                        return over;
                    }
                }
                changed = progress.changed() => if changed.is_ok() {
                    self.heard(&mut progress).await;
                },
                _ = look.tick() => if begun.elapsed() >= wait && self.is_unheard(wait) {
                    return SubscriptionEnd::Lost(format!("no source was heard for {} s", wait.as_secs()));
                },
            }
        }
    }

    fn is_unheard(&self, wait: Duration) -> bool {
        self.state.borrow().heard.is_none_or(|heard| heard.elapsed() >= wait)
    }

    /// Notes what a source has said of itself.
    async fn heard(&mut self, progress: &mut watch::Receiver<FollowedProgress>) {
        let told = progress.borrow_and_update().clone();
        // None comes within a state: what was told of one is void.
        self.receiving = None;
        if self.told.bookmark().index < told.upto {
            if self.told.bookmark().history == HistoryEpoch::UNKNOWN {
                self.told.begin(told.history);
            }
            let is_all = told.upto >= told.applied_seq;
            self.told.pass(told.upto, is_all.then_some((told.applied_elapsed_ms, told.applied_time_ms)));
            self.told.tell();
            if self.marked.elapsed() >= MARK_EVERY {
                self.marked = Instant::now();
                self.told.mark().await;
            }
        }
        let local = self.told.bookmark();
        let clock = self.shared.reader.progress().clock;
        self.state.send_modify(|state| {
            state.local = local;
            state.local_time_ms = clock.log_time_ms();
            state.primary_seq = state.primary_seq.max(told.applied_seq);
            state.primary_time_ms = told.applied_time_ms.max(state.local_time_ms);
            state.source = told.source;
            state.heard = Some(Instant::now());
            state.retries = 0;
            let is_synced = state.lag_entries() == 0;
            state.enter(if is_synced { SyncState::Synced } else { SyncState::Syncing });
        });
    }

    /// Takes in `first`, and what has come with it, as far as it is whole positions.
    async fn entries(
        &mut self,
        first: FollowedEntry,
        subscription: &mut Subscription,
        progress: &mut watch::Receiver<FollowedProgress>,
    ) -> Result<(), SubscriptionEnd> {
        let (mut records, mut bytes, mut count) = (Vec::new(), 0, 0);
        let mut next = Some(first);
        while let Some(entry) = next.take() {
            let history = progress.borrow().history;
            count += 1;
            if entry.snapshot == SnapshotPart::None {
                // A state that broke off is void.
                self.receiving = None;
                if self.told.bookmark().history == HistoryEpoch::UNKNOWN {
                    self.told.begin(history);
                }
                let more = entry.more;
                bytes += size(&entry);
                self.partial.push(entry);
                if !more {
                    self.partial.drain(..).try_for_each(|entry| add(&mut records, entry))?;
                }
            } else {
                self.take(&mut records)?;
                if entry.snapshot == SnapshotPart::Begin {
                    // What is said of what was before it is of no interest; what comes next means that the state has broken off.
                    progress.mark_unchanged();
                }
                self.take_part(entry, history).await?;
            }
            if count >= BATCH_ENTRIES || bytes >= BATCH_BYTES {
                break;
            }
            next = subscription.next().now_or_never().flatten().transpose().map_err(over)?;
        }
        self.take(&mut records)?;
        self.settle().await.map_err(SubscriptionEnd::Fatal)?;
        self.note(count as u64, bytes as u64);
        Ok(())
    }

    /// Notes that so much was told.
    fn note(&self, entries: u64, bytes: u64) {
        let (local, clock) = (self.told.bookmark(), self.shared.reader.progress().clock);
        self.state.send_modify(|state| {
            state.local = local;
            state.local_time_ms = clock.log_time_ms();
            state.primary_seq = state.primary_seq.max(local.index);
            state.primary_time_ms = state.primary_time_ms.max(state.local_time_ms);
            state.received_entries += entries;
            state.received_bytes += bytes;
            state.heard = Some(Instant::now());
            if !state.is_connected() {
                state.enter(SyncState::Syncing);
            }
        });
    }

    fn take(&mut self, records: &mut Vec<FeedRecord>) -> Result<(), SubscriptionEnd> {
        let taken = self.told.take_in(records);
        records.clear();
        taken.map_err(|error| SubscriptionEnd::Fatal(format!("{error}. Its state is not that of its source: delete its data directory, and it is told the whole state")))
    }

    /// Takes in a part of a whole state.
    async fn take_part(
        &mut self,
        entry: FollowedEntry,
        history: HistoryEpoch,
    ) -> Result<(), SubscriptionEnd> {
        match entry.snapshot {
            SnapshotPart::Begin => {
                tracing::info!(upto = entry.seq, "the replica is told the whole state");
                self.receiving = Some(((self.initial)(), LogId::new(entry.term, entry.seq)));
            }
            SnapshotPart::Item => {
                let Some((machine, _)) = &mut self.receiving else {
                    return Err(SubscriptionEnd::Lost("an item of a state that has not begun".to_owned()));
                };
                let seq = entry.seq;
                if let Some(event) = event(entry.change).map_err(SubscriptionEnd::Fatal)? {
                    machine.take_event(seq, &event).map_err(SubscriptionEnd::Fatal)?;
                }
            }
            SnapshotPart::End => {
                let Some((machine, log_id)) = self.receiving.take() else {
                    return Err(SubscriptionEnd::Lost("a state has ended that has not begun".to_owned()));
                };
                let clock = ClusterClock {
                    elapsed_ms: entry.elapsed_ms,
                    wall_offset_ms: entry.time_ms.cast_signed().wrapping_sub(entry.elapsed_ms.cast_signed()),
                    term: log_id.term,
                    counted_ms: None,
                };
                let taken = self.told.take_state(machine, log_id, clock, history);
                taken.map_err(|error| SubscriptionEnd::Lost(error.to_string()))?;
                self.state.send_modify(|state| state.full_syncs += 1);
                self.told.snapshot(true).await.map_err(|error| SubscriptionEnd::Fatal(error.to_string()))?;
                tracing::info!(upto = log_id.index, "the replica has the whole state");
            }
            SnapshotPart::None => unreachable!("invariant: it is no part of a state"),
        }
        Ok(())
    }
}

/// Bytes of what an entry tells.
fn size(entry: &FollowedEntry) -> usize {
    match &entry.change {
        FollowedChange::Event { key, value, .. } => key.len() + value.len(),
        FollowedChange::Command { command, .. } => command.len(),
        FollowedChange::Nothing => 0,
    }
}

/// Puts `entry` into the record of its position.
fn add(records: &mut Vec<FeedRecord>, entry: FollowedEntry) -> Result<(), SubscriptionEnd> {
    let FollowedEntry { seq, term, time_ms, elapsed_ms, change, .. } = entry;
    let log_id = LogId::new(term, seq);
    let content = match change {
        FollowedChange::Command { machine, version, command } => {
            let machine = u16::try_from(machine).map_err(|_| {
                let why = format!("position {seq} is a command of machine {machine}, which no program has");
                SubscriptionEnd::Fatal(why)
            })?;
            FeedContent::Command { wrote: MachineVersion { machine, version }, command }
        }
        change => {
            let event =
                event(change).map_err(|why| SubscriptionEnd::Fatal(format!("position {seq}: {why}")))?;
            let Some(event) = event else { return Ok(()) };
            if let Some(FeedRecord { log_id: last, content: FeedContent::Events(events), .. }) =
                records.last_mut()
                && *last == log_id
            {
                events.push(event);
                return Ok(());
            }
            FeedContent::Events(vec![event])
        }
    };
    records.push(FeedRecord { log_id, time_ms, elapsed_ms, content });
    Ok(())
}

/// The event that an entry tells, if it does.
fn event(change: FollowedChange) -> Result<Option<AppliedEvent>, String> {
    let FollowedChange::Event {
        operation,
        tenant,
        collection,
        key,
        value,
        create_seq,
        previous_seq,
        version,
        deadline_elapsed_ms,
        machine,
        ..
    } = change
    else {
        return Ok(None);
    };
    let machine = u16::try_from(machine)
        .map_err(|_| format!("something happened to machine {machine}, which no program has"))?;
    let operation = match operation {
        FollowedOperation::Insert => EventOperation::Insert,
        FollowedOperation::Update => EventOperation::Update,
        FollowedOperation::Delete => EventOperation::Delete,
        FollowedOperation::Expire => EventOperation::Expire,
    };
    Ok(Some(AppliedEvent {
        machine,
        operation,
        tenant: tenant.into(),
        collection: collection.into(),
        key,
        value,
        created: create_seq,
        previous: previous_seq,
        version,
        deadline_ms: (deadline_elapsed_ms != 0).then_some(deadline_elapsed_ms),
    }))
}

/// What it means that a subscription has ended with `error`.
fn over(error: ClientError) -> SubscriptionEnd {
    let why = error.to_string();
    match error {
        ClientError::Compacted { .. } => SubscriptionEnd::NeedsState(why),
        error if matches!(error.reason(), Reason::OtherHistory | Reason::Ahead) => {
            SubscriptionEnd::Fatal(format!(
                "{why}. What it follows is not what it has followed before: delete its data directory to follow that from the beginning"
            ))
        }
        error if matches!(error.reason(), Reason::Invalid | Reason::PermissionDenied) => {
            SubscriptionEnd::Fatal(why)
        }
        _ => SubscriptionEnd::Lost(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_minute() {
        let pauses: Vec<_> =
            (1..=9).map(|retries| pause(Duration::from_secs(1), retries).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(pause(Duration::from_secs(5), u32::MAX), LONGEST_PAUSE);
        assert_eq!(pause(Duration::from_secs(5), 2), Duration::from_secs(10));
    }
}
