//! What the founders of a cluster agree on beside who they are.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::MachineVersion;

/// The state that a machine begins with, as far as it can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct InitialState {
    /// How its hash was found: only hashes that were found in the same way can be compared.
    pub hash_version: u32,
    /// The hash.
    pub hash: u64,
    /// Whether it was [restored](crate::Engine::restore): members that come later do not have it, and are sent it.
    pub is_restored: bool,
}

impl InitialState {
    /// Whether it is known to be another one.
    pub fn differs_from(&self, other: &Self) -> bool {
        self.hash_version == other.hash_version && self.hash != other.hash
    }
}

impl fmt::Display for InitialState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let restored = if self.is_restored { ", restored" } else { "" };
        write!(f, "hash {:016x}{restored}", self.hash)
    }
}

/// What the founders of a cluster agreed on. Stands in its founding membership, on the record of one of them; of no effect
/// anywhere else. Clusters that were founded by builds that did not write it have none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Founding {
    /// The state that all of them began with.
    pub state: InitialState,
    /// The versions of their machines that all of them read: agreed from the beginning.
    pub versions: Vec<MachineVersion>,
}

/// A node was started with another initial state than its cluster has been founded with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the cluster was founded with another initial state ({founded}) than this node was started with ({own}): start it with the one that the cluster was founded with; where that was restored, a node that joins receives it once the members have taken a snapshot"
)]
pub struct OtherInitialState {
    /// The cluster's.
    pub founded: InitialState,
    /// This node's.
    pub own: InitialState,
}
