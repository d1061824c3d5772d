//! What the errors of operations say of themselves beside their words.

use super::Leader;
use crate::reason::Reason;
use crate::types::{LogId, NodeId};

/// What every interface is told of an error beside its words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told<'a> {
    /// Which of the reasons that all interfaces share.
    pub reason: Reason,
    /// Whether what was asked for may have been done, all or half, or may be yet.
    pub maybe_applied: bool,
    /// Where to go instead, as far as the failure itself says so.
    pub leader: Option<&'a Leader>,
    /// Of a write that is applied: where it stands, and which voters are not known to hold it.
    pub standing: Option<(LogId, &'a [NodeId])>,
}

impl<'a> Told<'a> {
    /// For `reason`, with nothing done.
    pub fn of(reason: Reason) -> Self {
        Self { reason, maybe_applied: false, leader: None, standing: None }
    }

    pub(crate) fn led_by(self, leader: &'a Option<Leader>) -> Self {
        Self { leader: leader.as_ref(), ..self }
    }

    pub(crate) fn undecided(self, maybe_applied: bool) -> Self {
        Self { maybe_applied, ..self }
    }
}

/// Why an operation failed. Each operation has an enum of its own, whose variants say here what they are on every interface,
/// in one match without a catch-all: the rest is in the table of [`Reason`].
pub trait OperationError: std::error::Error {
    /// What every interface is told.
    fn told(&self) -> Told<'_>;

    /// Which of the reasons that all interfaces share.
    fn reason(&self) -> Reason {
        self.told().reason
    }
}
