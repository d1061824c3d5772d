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
    /// Whether it is another one, as far as that can be told: hashes that were found in different ways cannot be compared. Where
    /// one of the two was restored, they must be known to be the same: nobody could make up for a state that is lost.
    pub fn differs_from(&self, other: &Self) -> bool {
        match self.hash_version == other.hash_version {
            true => self.hash != other.hash,
            false => self.is_restored || other.is_restored,
        }
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

/// A node was started with another initial state than its cluster has been founded with, or with one that cannot be compared
/// with a restored one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the cluster was founded with another initial state ({}) than this node was started with ({}): start it with the one that the cluster was founded with; where that was restored, a node that joins receives it once the members have taken a snapshot",
    told(.founded),
    told(.own)
)]
pub struct OtherInitialState {
    /// The cluster's, if its founding membership tells.
    pub founded: Option<InitialState>,
    /// This node's, if it could be hashed.
    pub own: Option<InitialState>,
}

fn told(state: &Option<InitialState>) -> String {
    state.map_or_else(|| "not told".to_owned(), |state| state.to_string())
}

/// Refuses to go on with the initial state `own` in a cluster of this `founding`.
pub(crate) fn check_initial_state(
    founding: Option<&Founding>,
    own: Option<InitialState>,
) -> Result<(), OtherInitialState> {
    let founded = founding.map(|founding| founding.state);
    let differ = match (founded, own) {
        (Some(founded), Some(own)) => founded.differs_from(&own),
        (Some(one), None) | (None, Some(one)) => one.is_restored,
        (None, None) => false,
    };
    match differ {
        true => Err(OtherInitialState { founded, own }),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_state_must_be_known_to_be_the_same() {
        let state = |hash_version, hash, is_restored| InitialState { hash_version, hash, is_restored };
        let check = |founded: Option<InitialState>, own| {
            let founding = founded.map(|state| Founding { state, versions: Vec::new() });
            check_initial_state(founding.as_ref(), own).is_ok()
        };
        let (restored, default) = (state(1, 7, true), state(1, 7, false));
        assert!(check(Some(restored), Some(restored)) && check(Some(restored), Some(default)));
        assert!(!check(Some(restored), Some(state(1, 8, false))), "another one");
        assert!(!check(Some(restored), Some(state(2, 7, false))), "it cannot be compared");
        assert!(!check(Some(default), Some(state(2, 7, true))), "it cannot be compared");
        assert!(!check(Some(restored), None) && !check(None, Some(restored)), "one does not tell");
        assert!(!check(Some(default), Some(state(1, 8, false))), "another one");
        assert!(check(Some(default), Some(state(2, 8, false))), "it cannot be compared, and nothing is lost");
        assert!(check(Some(default), None) && check(None, Some(default)) && check(None, None));
    }
}
