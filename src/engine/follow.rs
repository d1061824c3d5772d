//! Following what is applied: from which position, on this node.

use std::sync::Arc;

use super::Engine;
use crate::error::ReadError;
#[cfg(feature = "server")]
use crate::error::SnapshotError;
#[cfg(feature = "server")]
use crate::feed::FeedHold;
use crate::feed::{Feed, FeedCursor, FeedReach};
use crate::machine::StateMachine;
#[cfg(feature = "server")]
use crate::runtime::offload;
#[cfg(feature = "server")]
use crate::storage::SnapshotHandle;
use crate::types::{Bookmark, ReadLevel, ReadOptions};

/// Why a position cannot be followed from on this node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FollowError {
    /// What comes after the position is not kept any more. Another node may have it.
    #[error(
        "what was applied after position {after} is not kept any more on this node, which goes back to position {first}; another node may have it"
    )]
    Compacted {
        /// The position that was given.
        after: u64,
        /// The first position that can be told.
        first: u64,
    },
    /// The position is none of this cluster, or the node could not find out.
    #[error(transparent)]
    Position(#[from] ReadError),
}

/// A snapshot, and what keeps that which comes after it.
#[cfg(feature = "server")]
#[derive(Debug)]
pub(crate) struct LeadingSnapshot {
    pub(crate) handle: SnapshotHandle,
    /// None where nothing is kept on disk.
    pub(crate) hold: Option<FeedHold>,
}

/// Why there is none to begin with.
#[cfg(feature = "server")]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LeadError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

impl<M: StateMachine> Engine<M> {
    pub(super) fn feed(&self) -> &Arc<Feed> {
        self.inner.core.feed()
    }

    /// Follows what was applied after the position `after`, 0 for the beginning: what the machine [tells](StateMachine::apply_telling), or its commands. Costs
    /// nothing while nothing is applied. [`FeedCursor`] says how it goes on.
    ///
    /// # Errors
    /// [`FollowError::Compacted`] when this node does not go back so far, [`ReadError::OtherHistory`] and [`ReadError::Ahead`] when the position
    /// is none of this cluster. A position that this node has not applied yet is waited for.
    pub async fn follow(&self, after: Bookmark) -> Result<FeedCursor, FollowError> {
        let applied = self.inner.core.published().progress().next_index();
        // A state with the position is needed of nobody; that there is one tells that the position is of this cluster.
        let level = if after.index < applied { ReadLevel::Local } else { ReadLevel::Linearizable };
        self.state_at(ReadOptions::from(level).after(after)).await?;
        // Nothing comes before the first entry, which tells nothing.
        let next = if after.index == 0 { 0 } else { after.index + 1 };
        // What it holds is not purged from here on.
        let cursor = self.feed().follow(next);
        let reach = self.feed_reach();
        if next < reach.first {
            return Err(FollowError::Compacted { after: after.index, first: reach.first });
        }
        Ok(cursor)
    }

    /// Follows from position `next` on, whether or not this node has it. The first [page](FeedCursor::page) tells if it has not.
    #[cfg(feature = "server")]
    pub(crate) fn feed_from(&self, next: u64) -> FeedCursor {
        self.feed().follow(next)
    }

    /// Follows what is applied from now on: after the [present](Self::present) position of the cluster, which is known before anything that a caller
    /// does next.
    ///
    /// # Errors
    /// As [`present`](Self::present).
    pub async fn follow_from_now(&self) -> Result<FeedCursor, FollowError> {
        let present = self.present().await?;
        Ok(self.feed().follow(present + 1))
    }

    /// A snapshot behind which this node can tell everything: the newest one, or one that is taken now.
    ///
    /// # Errors
    /// See [`LeadError`].
    #[cfg(feature = "server")]
    pub(crate) async fn leading_snapshot(&self) -> Result<LeadingSnapshot, LeadError> {
        // A node that may not be read sends nothing either.
        self.state_at(ReadLevel::Local.into()).await?;
        /// With another one what comes after it may be gone again before it is written.
        const ATTEMPTS: usize = 3;
        for _ in 0..ATTEMPTS {
            let snapshots = self.inner.snapshots.clone();
            let newest = offload(move || snapshots.newest()).await;
            let newest = newest.map_err(|error| SnapshotError::Unreadable { reason: error.to_string() })?;
            if let Some(handle) = newest {
                let next = handle.meta().log_id.index + 1;
                // Before it is looked whether it is there: from here on it stays.
                let hold = self.feed().hold(next);
                if self.feed_reach().first <= next {
                    return Ok(LeadingSnapshot { handle, hold });
                }
            }
            self.take_snapshot().await?;
        }
        let reason = "what comes after it is not kept for as long as it takes to write one".to_owned();
        Err(SnapshotError::Unreadable { reason }.into())
    }

    /// How far back what was applied can be told by this node.
    pub fn feed_reach(&self) -> FeedReach {
        self.feed().reach()
    }
}
