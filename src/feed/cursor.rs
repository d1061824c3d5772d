//! One who follows: a position, and nothing else.

use std::sync::Arc;

use tokio::sync::watch;

use super::record::FeedRecord;
use super::{Feed, FeedHold, FoundPage};
use crate::runtime::offload;
use crate::types::HistoryEpoch;

/// Why what comes next cannot be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FeedError {
    /// It is not kept any more. Another node may have it.
    #[error("what was applied before position {first} is not kept any more on this node")]
    Compacted {
        /// The first position that is.
        first: u64,
    },
    /// The node has taken over a state of another history.
    #[error("this node follows another history now: {known}")]
    OtherHistory {
        /// Which.
        known: HistoryEpoch,
    },
    /// Nothing more is applied.
    #[error("the node has stopped or is stopping")]
    Stopped,
    /// The event log cannot be read.
    #[error("the event log of this node cannot be read: {reason}. Another node may have what is in it")]
    Unreadable {
        /// Why.
        reason: String,
    },
}

/// What was applied from one position on.
#[derive(Debug, Clone, Default)]
pub struct FeedPage {
    /// In order. Positions at which nothing happened have none.
    pub records: Vec<FeedRecord>,
    /// Everything below this position is told: where the next page begins.
    pub next: u64,
    /// The position after the last one that was applied when the page was taken.
    pub applied_next: u64,
}

impl FeedPage {
    /// Whether there was nothing more at that time.
    pub fn is_last(&self) -> bool {
        self.next == self.applied_next
    }
}

/// Follows what a node applies, from a position on. It costs nothing while nothing happens, and holds up nobody.
#[derive(Debug)]
pub struct FeedCursor {
    pub(super) feed: Arc<Feed>,
    history: HistoryEpoch,
    next: u64,
    changes: watch::Receiver<u64>,
    lives: watch::Receiver<u64>,
    /// Until it has come to the end for the first time: what it needs next stays in the event log.
    hold: Option<FeedHold>,
}

impl FeedCursor {
    /// From position `next` of `history` on.
    pub(super) fn new(feed: Arc<Feed>, history: HistoryEpoch, next: u64) -> Self {
        let (changes, lives) = (feed.changes(), feed.lives.subscribe());
        let hold = feed.hold(next);
        Self { feed, history, next, changes, lives, hold }
    }

    /// The history that positions belong to.
    pub fn history(&self) -> HistoryEpoch {
        self.history
    }

    /// The first position that was not told yet.
    pub fn next_position(&self) -> u64 {
        self.next
    }

    /// Has the next page begin at `next`, which the follower has come to by other means.
    pub fn move_to(&mut self, next: u64) {
        self.next = next;
        self.hold.iter().for_each(|hold| hold.move_to(next));
    }

    /// The position after the last one that was applied; the largest there is when nothing more will be.
    #[cfg(feature = "server")]
    pub(crate) fn applied_next(&self) -> u64 {
        *self.changes.borrow()
    }

    /// Waits until something more has been applied than was told, the node follows another history, or nothing more will be applied.
    pub async fn changed(&mut self) {
        let Self { changes, lives, next, .. } = self;
        // Errors would mean that the feed is gone, and it is in `self`.
        tokio::select! {
            biased;
            _ = changes.wait_for(|applied| *applied > *next) => {}
            _ = lives.changed() => {}
        }
    }

    /// What there is, in about `max_bytes`; no records and the same position if there is nothing new. Nothing is lost if it is dropped
    /// while it waits for the disk.
    ///
    /// # Errors
    /// See [`FeedError`].
    pub async fn page(&mut self, max_bytes: usize) -> Result<FeedPage, FeedError> {
        if self.history == HistoryEpoch::UNKNOWN {
            self.history = self.feed.reach().history;
        }
        let page = match self.feed.find(self.history, self.next, max_bytes)? {
            FoundPage::Page(page) => page,
            FoundPage::OnDisk => {
                let (feed, history, next) = (self.feed.clone(), self.history, self.next);
                offload(move || feed.read_log(history, next, max_bytes)).await?
            }
        };
        debug_assert!(page.next >= self.next, "invariant: a cursor does not go back");
        self.next = page.next;
        match page.is_last() {
            true => self.hold = None,
            false => self.hold.iter().for_each(|hold| hold.move_to(page.next)),
        }
        Ok(page)
    }

    /// Waits for something to tell.
    ///
    /// # Errors
    /// See [`FeedError`].
    pub async fn next_page(&mut self, max_bytes: usize) -> Result<FeedPage, FeedError> {
        self.changed().await;
        self.page(max_bytes).await
    }
}
