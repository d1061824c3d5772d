//! Whose errors tell what has come of a call: the one list of the operations that members pass on.

use crate::error::{ForwardError, Leader, MembershipError, OperationError, TransferError, WriteError};

/// The error of an operation that only the leader carries out.
pub(crate) trait OfCall: OperationError + From<ForwardError> + Send + Sized {
    /// No leader carries it out.
    fn not_leader(leader: Option<Leader>) -> Self;
    /// The node that was to carry it out ends.
    fn stopped(reason: String, maybe_applied: bool) -> Self;
    /// What a leader has answered, unless that is no error of this operation.
    ///
    /// # Errors
    /// What was answered, where it is none.
    fn answered(error: CallError) -> Result<Self, CallError>;
}

macro_rules! operations {
    ($($(#[$of:meta])* $operation:ident: $error:ident,)+) => {
        /// What a call asks for, as far as its errors differ.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum LeaderOperation {
            $($(#[$of])* $operation,)+
        }

        /// Why the leader has not done what it was asked to.
        #[derive(Debug)]
        pub(crate) enum CallError {
            $($(#[$of])* $operation($error),)+
            /// The leader has no room for the call at present, and has done nothing.
            Overloaded,
            /// Any of them, for a reason that this build has no variant for.
            Other {
                /// In words.
                message: String,
                /// Whether it may have been done.
                maybe_applied: bool,
            },
        }

        impl LeaderOperation {
            /// That this node does not lead. Nothing is done.
            pub(crate) fn not_leader(self, leader: Option<Leader>) -> CallError {
                match self {
                    $(Self::$operation => CallError::$operation($error::not_leader(leader)),)+
                }
            }

            /// That this node ends. What was asked for may be done.
            pub(crate) fn stopped(self, reason: String) -> CallError {
                match self {
                    $(Self::$operation => CallError::$operation($error::stopped(reason, true)),)+
                }
            }
        }

        $(impl OfCall for $error {
            fn not_leader(leader: Option<Leader>) -> Self {
                Self::NotLeader { leader }
            }

            fn stopped(reason: String, maybe_applied: bool) -> Self {
                Self::Stopped { reason, maybe_applied }
            }

            fn answered(error: CallError) -> Result<Self, CallError> {
                let CallError::$operation(error) = error else { return Err(error) };
                Ok(error)
            }
        })+
    };
}

operations! {
    /// A write.
    Write: WriteError,
    /// A change of the membership.
    Membership: MembershipError,
    /// A hand-over.
    Transfer: TransferError,
}

impl LeaderOperation {
    /// That this leader has no room for the call at present. Nothing is done.
    pub(crate) fn too_many(self) -> CallError {
        match self {
            // Which is what builds know that know nothing of `CallError::Overloaded`.
            Self::Write => CallError::Write(WriteError::Overloaded),
            Self::Membership | Self::Transfer => CallError::Overloaded,
        }
    }
}
