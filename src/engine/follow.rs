//! Following what is applied: from which position, on this node.

use std::sync::Arc;

use super::Engine;
use crate::error::ReadError;
use crate::feed::{Feed, FeedCursor, FeedReach};
use crate::machine::StateMachine;
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

    /// How far back what was applied can be told by this node.
    pub fn feed_reach(&self) -> FeedReach {
        self.feed().reach()
    }
}
