//! What a run has shown.

use serde::Serialize;

/// The outcome of a run, from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// What must hold, held.
    Valid,
    /// The run proves nothing.
    Unknown,
    /// Something that must never happen has.
    Invalid,
}

impl Verdict {
    pub(crate) fn exit_code(self) -> u8 {
        match self {
            Self::Valid => 0,
            Self::Invalid => 1,
            Self::Unknown => 2,
        }
    }
}
