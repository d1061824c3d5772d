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
//! of a second, which doubles up to a minute.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::state::{ReplicaState, SyncState};
use super::{ReplicaConfig, Told};
use crate::client::{
    ClientError, FollowFrom, FollowedChange, FollowedEntry, FollowedOperation, FollowedProgress,
    SnapshotPart, Subscription,
};
use crate::feed::{FeedContent, FeedRecord};
use crate::machine::{AppliedEvent, EventOperation, StateMachine};
use crate::raft::told::ToldState;
use crate::reason::Reason;
use crate::types::{ClusterClock, HistoryEpoch, LogId, MachineVersion};

/// The first pause after all sources were lost; each one after it is twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Most entries that are applied before readers learn of them.
const BATCH_ENTRIES: usize = 4096;
/// Most bytes of them.
const BATCH_BYTES: usize = 4 * 1024 * 1024;

/// How the pause grows with attempts in vain, of which there was at least one.
pub(super) fn pause(retries: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << retries.saturating_sub(1).min(6)).min(LONGEST_PAUSE)
}

/// Why one subscription is over.
enum Over {
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
    pub(super) shared: Told<M>,
    /// A whole state that is being told: the machine that takes it in, and its position.
    pub(super) receiving: Option<(M, LogId)>,
}

impl<M: StateMachine> Follower<M> {
    /// Follows for as long as it may.
    pub(super) async fn run(mut self) {
        loop {
            let config = self.config.borrow_and_update().clone();
            self.state.send_modify(|state| state.enter(SyncState::Connecting));
            let over = self.subscription(&config).await;
            if let Err(error) = self.settle().await {
                return self.give_up(error);
            }
            let (why, retries) = match over {
                Over::Repointed => {
                    self.state.send_modify(|state| state.retries = 0);
                    continue;
                }
                Over::Fatal(why) => return self.give_up(why),
                Over::NeedsState(why) | Over::Lost(why) => {
                    (why, self.state.borrow().retries.saturating_add(1))
                }
            };
            tracing::warn!(retries, "the replica hears from no source: {why}");
            self.state.send_modify(|state| {
                state.enter(SyncState::Disconnected);
                (state.retries, state.error) = (retries, Some(why.clone()));
            });
            if config.retries.is_some_and(|most| retries > most) {
                return self.give_up(format!("it was tried {retries} times in vain; the last time: {why}"));
            }
            tokio::select! {
                () = sleep(pause(retries)) => {}
                // Dropped with the replica.
                _ = self.config.changed() => {}
            }
        }
    }

    fn give_up(&self, why: String) {
        tracing::error!(
            "the replica follows no more: {why}. Reads go on as of position {}",
            self.told.bookmark().index
        );
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

    /// One subscription, to its end.
    async fn subscription(&mut self, config: &ReplicaConfig) -> Over {
        let client = match config.connect() {
            Ok(client) => client,
            Err(error) => return Over::Fatal(error.to_string()),
        };
        *self.shared.client.lock().expect("invariant: no panic under this lock") = Some(client.clone());
        let bookmark = self.told.bookmark();
        let from = match bookmark.index {
            0 => FollowFrom::Beginning,
            _ => FollowFrom::After(bookmark),
        };
        let mut subscription = match client.subscribe(config.options(from)).await {
            Ok(subscription) => subscription,
            Err(error) => return over(error),
        };
        let mut progress = subscription.progress();
        let wait = config.patience;
        loop {
            // Nothing of a half is told: what is received while this waits stays in the subscription.
            tokio::select! {
                biased;
                () = self.shared.reader.view_wanted() => if let Err(error) = self.settle().await {
                    return Over::Fatal(error);
                },
                changed = self.config.changed() => if changed.is_ok() { return Over::Repointed },
                entry = subscription.next() => {
                    let outcome = match entry {
                        Some(Ok(entry)) => self.entries(entry, &mut subscription, &progress).await,
                        Some(Err(error)) => Err(over(error)),
                        None => Err(Over::Lost("the subscription has ended".to_owned())),
                    };
                    if let Err(over) = outcome {
                        return over;
                    }
                }
                changed = progress.changed() => if changed.is_ok() {
                    self.heard(&mut progress);
                },
                () = sleep(Duration::from_secs(1).min(wait)) => if self.is_unheard(wait) {
                    return Over::Lost(format!("no source was heard for {} s", wait.as_secs()));
                },
            }
        }
    }

    fn is_unheard(&self, wait: Duration) -> bool {
        self.state.borrow().heard.is_none_or(|heard| heard.elapsed() >= wait)
    }

    /// Notes what a source has said of itself.
    fn heard(&mut self, progress: &mut watch::Receiver<FollowedProgress>) {
        let told = progress.borrow_and_update().clone();
        if self.receiving.is_none() && self.told.bookmark().index < told.upto {
            if self.told.bookmark().history == HistoryEpoch::UNKNOWN {
                self.told.begin(told.history);
            }
            let is_all = told.upto >= told.applied_seq;
            self.told.pass(told.upto, is_all.then_some((told.applied_elapsed_ms, told.applied_time_ms)));
            self.told.tell();
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

    /// Takes in `first`, and what has come with it.
    async fn entries(
        &mut self,
        first: FollowedEntry,
        subscription: &mut Subscription,
        progress: &watch::Receiver<FollowedProgress>,
    ) -> Result<(), Over> {
        let (mut records, mut bytes, mut count) = (Vec::new(), 0, 0);
        let mut next = Some(first);
        while let Some(entry) = next.take() {
            let history = progress.borrow().history;
            count += 1;
            let more = entry.more;
            if entry.snapshot == SnapshotPart::None {
                // A state that broke off is void.
                self.receiving = None;
                if self.told.bookmark().history == HistoryEpoch::UNKNOWN {
                    self.told.begin(history);
                }
                bytes += add(&mut records, entry)?;
            } else {
                self.take(&mut records)?;
                self.take_part(entry, history).await?;
            }
            if !more && (count >= BATCH_ENTRIES || bytes >= BATCH_BYTES) {
                break;
            }
            next =
                match more {
                    // A position is taken in whole.
                    true => Some(subscription.next().await.transpose().map_err(over)?.ok_or_else(|| {
                        Over::Lost("the subscription has ended within a position".to_owned())
                    })?),
                    false => futures::FutureExt::now_or_never(subscription.next())
                        .flatten()
                        .transpose()
                        .map_err(over)?,
                };
        }
        self.take(&mut records)?;
        self.settle().await.map_err(Over::Fatal)?;
        let (local, clock) = (self.told.bookmark(), self.shared.reader.progress().clock);
        self.state.send_modify(|state| {
            state.local = local;
            state.local_time_ms = clock.log_time_ms();
            state.primary_seq = state.primary_seq.max(local.index);
            state.primary_time_ms = state.primary_time_ms.max(state.local_time_ms);
            state.received_entries += count as u64;
            state.received_bytes += bytes as u64;
            state.heard = Some(Instant::now());
            if !state.is_connected() {
                state.enter(SyncState::Syncing);
            }
        });
        Ok(())
    }

    fn take(&mut self, records: &mut Vec<FeedRecord>) -> Result<(), Over> {
        let taken = self.told.take_in(records);
        records.clear();
        taken.map_err(|error| Over::Fatal(format!("{error}. Its state is not that of its source: delete its data directory, and it is told the whole state")))
    }

    /// Takes in a part of a whole state.
    async fn take_part(&mut self, entry: FollowedEntry, history: HistoryEpoch) -> Result<(), Over> {
        match entry.snapshot {
            SnapshotPart::Begin => {
                tracing::info!(upto = entry.seq, "the replica is told the whole state");
                self.receiving = Some(((self.initial)(), LogId::new(entry.term, entry.seq)));
            }
            SnapshotPart::Item => {
                let Some((machine, _)) = &mut self.receiving else {
                    return Err(Over::Lost("an item of a state that has not begun".to_owned()));
                };
                let seq = entry.seq;
                if let Some(event) = event(entry.change) {
                    machine.take_event(seq, &event).map_err(Over::Fatal)?;
                }
            }
            SnapshotPart::End => {
                let Some((machine, log_id)) = self.receiving.take() else {
                    return Err(Over::Lost("a state has ended that has not begun".to_owned()));
                };
                let clock = ClusterClock {
                    elapsed_ms: entry.elapsed_ms,
                    wall_offset_ms: entry.time_ms.cast_signed().wrapping_sub(entry.elapsed_ms.cast_signed()),
                    term: log_id.term,
                    counted_ms: None,
                };
                let taken = self.told.take_state(machine, log_id, clock, history);
                taken.map_err(|error| Over::Lost(error.to_string()))?;
                self.state.send_modify(|state| state.full_syncs += 1);
                self.told.snapshot(true).await.map_err(|error| Over::Fatal(error.to_string()))?;
                tracing::info!(upto = log_id.index, "the replica has the whole state");
            }
            SnapshotPart::None => unreachable!("invariant: it is no part of a state"),
        }
        Ok(())
    }
}

/// Puts `entry` into the record of its position.
fn add(records: &mut Vec<FeedRecord>, entry: FollowedEntry) -> Result<usize, Over> {
    let FollowedEntry { seq, term, time_ms, elapsed_ms, change, .. } = entry;
    let log_id = LogId::new(term, seq);
    match change {
        FollowedChange::Command { machine, version, command } => {
            let bytes = command.len();
            let machine = u16::try_from(machine).map_err(|_| {
                Over::Fatal(format!("position {seq} is a command of machine {machine}, which no program has"))
            })?;
            let content = FeedContent::Command { wrote: MachineVersion { machine, version }, command };
            records.push(FeedRecord { log_id, time_ms, elapsed_ms, content });
            Ok(bytes)
        }
        change => {
            let Some(event) = event(change) else { return Ok(0) };
            let bytes = event.key.len() + event.value.len();
            match records.last_mut() {
                Some(FeedRecord { log_id: last, content: FeedContent::Events(events), .. })
                    if *last == log_id =>
                {
                    events.push(event);
                }
                _ => {
                    let content = FeedContent::Events(vec![event]);
                    records.push(FeedRecord { log_id, time_ms, elapsed_ms, content });
                }
            }
            Ok(bytes)
        }
    }
}

/// The event that an entry tells, if it does.
fn event(change: FollowedChange) -> Option<AppliedEvent> {
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
        ..
    } = change
    else {
        return None;
    };
    let operation = match operation {
        FollowedOperation::Insert => EventOperation::Insert,
        FollowedOperation::Update => EventOperation::Update,
        FollowedOperation::Delete => EventOperation::Delete,
        FollowedOperation::Expire => EventOperation::Expire,
    };
    Some(AppliedEvent {
        operation,
        tenant: tenant.into(),
        collection: collection.into(),
        key,
        value,
        created: create_seq,
        previous: previous_seq,
        version,
        deadline_ms: (deadline_elapsed_ms != 0).then_some(deadline_elapsed_ms),
    })
}

/// What it means that a subscription has ended with `error`.
fn over(error: ClientError) -> Over {
    let why = error.to_string();
    match error {
        ClientError::Compacted { .. } => Over::NeedsState(why),
        error if matches!(error.reason(), Reason::OtherHistory | Reason::Ahead) => Over::Fatal(format!(
            "{why}. What it follows is not what it has followed before: delete its data directory to follow that from the beginning"
        )),
        error if matches!(error.reason(), Reason::Invalid) => Over::Fatal(why),
        _ => Over::Lost(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_minute() {
        let pauses: Vec<_> = (1..=9).map(|retries| pause(retries).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }
}
