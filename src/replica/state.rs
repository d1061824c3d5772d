//! How a replica stands to what it follows.

use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use crate::types::{Bookmark, Leader};

/// What a replica is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
#[non_exhaustive]
pub enum SyncState {
    /// It reaches none of its sources, and waits before it tries again.
    #[default]
    Disconnected,
    /// It tries to reach one.
    Connecting,
    /// It is being told what it lacks.
    Syncing,
    /// It has all that its source has told it to have applied.
    Synced,
}

impl SyncState {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Disconnected => "Disconnected",
            Self::Connecting => "Connecting",
            Self::Syncing => "Syncing",
            Self::Synced => "Synced",
        }
    }
}

/// How a replica stands to what it follows, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplicaState {
    /// What it is doing.
    pub sync: SyncState,
    /// Since when.
    pub since: Instant,
    /// Attempts in vain since it last heard from a source.
    pub retries: u32,
    /// The last position that it has applied, and the history that this belongs to.
    pub local: Bookmark,
    /// The last position that its source has said to have applied; 0 until it has said so.
    pub primary_seq: u64,
    /// Log time at `local`, in milliseconds since the Unix epoch.
    pub local_time_ms: u64,
    /// Log time at `primary_seq`.
    pub primary_time_ms: u64,
    /// When it last heard from a source.
    pub heard: Option<Instant>,
    /// How often a source says that it is there.
    pub heartbeat: Duration,
    /// The source that it hears from, as `host:port`.
    pub source: String,
    /// Who leads the cluster, as far as a source knows.
    pub leader: Option<Leader>,
    /// Bytes of what it was told.
    pub received_bytes: u64,
    /// Entries that it was told.
    pub received_entries: u64,
    /// Whole states that it was told.
    pub full_syncs: u64,
    /// Why it went wrong last, if it has since it was started.
    pub error: Option<String>,
    /// Why it follows no more, if it has given up.
    pub gave_up: Option<String>,
}

impl ReplicaState {
    pub(super) fn new(local: Bookmark) -> Self {
        Self {
            sync: SyncState::Disconnected,
            since: Instant::now(),
            retries: 0,
            local,
            primary_seq: 0,
            local_time_ms: 0,
            primary_time_ms: 0,
            heard: None,
            heartbeat: Duration::from_secs(5),
            source: String::new(),
            leader: None,
            received_bytes: 0,
            received_entries: 0,
            full_syncs: 0,
            error: None,
            gave_up: None,
        }
    }

    /// Whether it hears from a source.
    pub fn is_connected(&self) -> bool {
        matches!(self.sync, SyncState::Syncing | SyncState::Synced)
    }

    /// Positions that its source has applied, and it has not.
    pub fn lag_entries(&self) -> u64 {
        self.primary_seq.saturating_sub(self.local.index)
    }

    /// How much older the state is than that of its source, in log time: nothing while it has all that its source has told of. For as long as it has
    /// heard nothing, although its source should have said so, it may be behind. `None` while that is not known.
    pub fn lag(&self) -> Option<Duration> {
        let unheard = self.heard?.elapsed().saturating_sub(self.heartbeat * 2);
        let told = match self.lag_entries() {
            0 => Duration::ZERO,
            _ => Duration::from_millis(self.primary_time_ms.saturating_sub(self.local_time_ms)),
        };
        Some(told.max(unheard))
    }

    pub(super) fn enter(&mut self, sync: SyncState) {
        if self.sync != sync {
            (self.sync, self.since) = (sync, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_time_in_a_state_begins_with_the_state() {
        let mut state = ReplicaState::new(Bookmark::default());
        let begun = state.since;
        tokio::time::advance(Duration::from_secs(5)).await;
        state.enter(SyncState::Disconnected);
        assert_eq!(state.since, begun);
        state.enter(SyncState::Connecting);
        assert_eq!(state.since, begun + Duration::from_secs(5));
    }

    #[test]
    fn lag_is_what_the_source_has_and_the_replica_lacks() {
        let mut state = ReplicaState::new(Bookmark::from(7));
        assert_eq!((state.lag_entries(), state.lag()), (0, None));
        (state.primary_seq, state.primary_time_ms, state.local_time_ms) = (10, 5_000, 3_500);
        state.heard = Some(Instant::now());
        assert_eq!((state.lag_entries(), state.lag()), (3, Some(Duration::from_millis(1_500))));
        state.local.index = 10;
        assert_eq!((state.lag_entries(), state.lag()), (0, Some(Duration::ZERO)));
    }
}
