//! Why something was not done: the one list of reasons, and what each is on every interface.
//!
//! A reason has a number and a name (`Reason` of `proto/call.proto` *is* this type), a label in metrics, a gRPC code, an HTTP
//! status and an exit code. [`Reason::row`] is the table; servers, clients and the command line encode it and add nothing.
//! Which reason an error has is said by its enum, in one match ([`OperationError`](crate::error::OperationError)). Whoever
//! adds a reason adds a variant here and a value with the same number there: a test compares the two.
//!
//! # The outcome of a write goes before its reason
//!
//! A write that may have been applied must not look like one that was refused. Whatever the reason, its gRPC code is
//! then never `UNAVAILABLE`, which generic clients repeat by themselves, its HTTP status never 503, for proxies do the
//! same, and the exit code is [`EXIT_UNKNOWN`].

/// All went well.
pub const EXIT_OK: u8 = 0;
/// It failed, and a write was not applied.
pub const EXIT_ERROR: u8 = 1;
/// No node can be connected to.
pub const EXIT_UNREACHABLE: u8 = 2;
/// An argument, a file or a value cannot be used.
pub const EXIT_INVALID: u8 = 3;
/// What was asked for does not exist, or a condition does not hold.
pub const EXIT_NOT_FOUND: u8 = 4;
/// A write may have been applied, or may still be.
pub const EXIT_UNKNOWN: u8 = 5;

/// Why something was not done. The numbers are those on the wire; 28 is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Reason {
    /// None that this version knows.
    Unspecified = 0,
    /// The node does not lead, and only the leader can do it.
    NotLeader = 1,
    /// It exceeds a limit on the size of a request.
    TooLarge = 2,
    /// Too much is under way at present.
    Overloaded = 3,
    /// Leadership or the connection was lost while it was under way.
    Interrupted = 4,
    /// A quorum does not answer.
    NoQuorum = 5,
    /// The node has stopped or is stopping.
    Stopped = 6,
    /// The request makes no sense.
    Invalid = 7,
    /// The disk is full; writes are accepted again once there is room.
    DiskFull = 8,
    /// The disk hangs.
    DiskStalled = 9,
    /// The session was never opened, was closed, or was not used for too long.
    SessionExpired = 10,
    /// The sequence is too far ahead of the first unanswered one.
    WindowExceeded = 11,
    /// All sessions are in use.
    TooManySessions = 12,
    /// Committed and applied, but not every voter was known to hold it in time.
    AckTimeout = 13,
    /// The node's state is not as recent as was asked for.
    Behind = 14,
    /// The history does not reach back to the revision asked for.
    Compacted = 15,
    /// A change of the cluster that cannot be made, or only with force.
    Membership = 16,
    /// The first answer to a repeated write has been forgotten.
    AnswerForgotten = 17,
    /// The state has as many bytes as it may have; reads and deletions go on.
    QuotaExceeded = 18,
    /// As many watches, streams, connections or unread bytes as are allowed.
    LimitReached = 19,
    /// A position of another cluster, or of another history of this one.
    OtherHistory = 20,
    /// A position beyond what the cluster has.
    Ahead = 21,
    /// The node's state differs from that of the others, so it serves nothing.
    Diverged = 22,
    /// A command that encodes, but cannot be decoded again.
    Undecodable = 23,
    /// The deadline of the request passed.
    DeadlineExceeded = 24,
    /// It does not exist.
    NotFound = 25,
    /// A condition does not hold.
    ConditionFailed = 26,
    /// No node can be connected to.
    Unreachable = 27,
    /// Not all members are known to read this version of the command yet.
    VersionNotAgreed = 29,
    /// The follower of a stream has acknowledged nothing for too long.
    Lagged = 30,
    /// The caller has shown no credential that is valid.
    Unauthenticated = 31,
    /// What was asked for is not granted to the caller.
    PermissionDenied = 32,
}

/// The gRPC codes in use, by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
#[allow(missing_docs)] // gRPC's own names
pub enum GrpcCode {
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    OutOfRange = 11,
    Unavailable = 14,
    Unauthenticated = 16,
}

impl GrpcCode {
    /// As gRPC writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "UNKNOWN",
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::NotFound => "NOT_FOUND",
            Self::PermissionDenied => "PERMISSION_DENIED",
            Self::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Self::FailedPrecondition => "FAILED_PRECONDITION",
            Self::OutOfRange => "OUT_OF_RANGE",
            Self::Unavailable => "UNAVAILABLE",
            Self::Unauthenticated => "UNAUTHENTICATED",
        }
    }
}

/// What a reason is on each interface, when nothing was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// As `proto/call.proto` and JSON name it, without `REASON_`.
    pub name: &'static str,
    /// As metrics that count failures label it.
    pub counter: &'static str,
    /// On gRPC.
    pub grpc: GrpcCode,
    /// On HTTP.
    pub http_status: u16,
    /// Of the command line.
    pub exit_code: u8,
    /// Whether a write that is answered so may have been applied by this attempt; `None` where it depends.
    pub maybe_applied: Option<bool>,
}

impl Reason {
    /// All reasons, in the order of their numbers.
    pub fn all() -> impl Iterator<Item = Self> {
        /// No reason has a larger number.
        const LARGEST: i32 = 63;
        (0..=LARGEST).filter_map(|number| Self::try_from(number).ok())
    }

    /// The table.
    pub const fn row(self) -> Row {
        use GrpcCode::{
            DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound, OutOfRange, PermissionDenied,
            ResourceExhausted, Unauthenticated, Unavailable, Unknown,
        };
        const NO: Option<bool> = Some(false);
        const YES: Option<bool> = Some(true);
        let (name, counter, grpc, http_status, exit_code, maybe_applied) = match self {
            Self::Unspecified => ("UNSPECIFIED", "unspecified", Unknown, 500, EXIT_ERROR, None),
            Self::NotLeader => ("NOT_LEADER", "not_leader", Unavailable, 503, EXIT_ERROR, NO),
            Self::TooLarge => ("TOO_LARGE", "too_large", InvalidArgument, 413, EXIT_INVALID, None),
            Self::Overloaded => ("OVERLOADED", "overloaded", ResourceExhausted, 503, EXIT_ERROR, NO),
            Self::Interrupted => ("INTERRUPTED", "interrupted", Unknown, 500, EXIT_ERROR, None),
            Self::NoQuorum => ("NO_QUORUM", "no_quorum", Unavailable, 503, EXIT_ERROR, NO),
            Self::Stopped => ("STOPPED", "stopped", Unavailable, 503, EXIT_ERROR, None),
            Self::Invalid => ("INVALID", "invalid", InvalidArgument, 400, EXIT_INVALID, NO),
            Self::DiskFull => ("DISK_FULL", "disk_full", ResourceExhausted, 507, EXIT_ERROR, NO),
            Self::DiskStalled => ("DISK_STALLED", "disk_stalled", Unavailable, 503, EXIT_ERROR, NO),
            Self::SessionExpired => {
                ("SESSION_EXPIRED", "session_expired", FailedPrecondition, 410, EXIT_ERROR, NO)
            }
            Self::WindowExceeded => {
                ("WINDOW_EXCEEDED", "window_exceeded", ResourceExhausted, 429, EXIT_ERROR, NO)
            }
            Self::TooManySessions => {
                ("TOO_MANY_SESSIONS", "too_many_sessions", ResourceExhausted, 429, EXIT_ERROR, NO)
            }
            Self::AckTimeout => ("ACK_TIMEOUT", "ack_timeout", DeadlineExceeded, 504, EXIT_UNKNOWN, YES),
            Self::Behind => ("BEHIND", "behind", Unavailable, 503, EXIT_ERROR, NO),
            Self::Compacted => ("COMPACTED", "compacted", OutOfRange, 410, EXIT_ERROR, NO),
            Self::Membership => ("MEMBERSHIP", "membership", FailedPrecondition, 409, EXIT_ERROR, None),
            Self::AnswerForgotten => {
                ("ANSWER_FORGOTTEN", "answer_forgotten", FailedPrecondition, 410, EXIT_ERROR, NO)
            }
            Self::QuotaExceeded => {
                ("QUOTA_EXCEEDED", "quota_exceeded", ResourceExhausted, 507, EXIT_ERROR, NO)
            }
            Self::LimitReached => {
                ("LIMIT_REACHED", "limit_reached", ResourceExhausted, 429, EXIT_ERROR, None)
            }
            Self::OtherHistory => ("OTHER_HISTORY", "other_history", FailedPrecondition, 409, EXIT_ERROR, NO),
            Self::Ahead => ("AHEAD", "ahead", OutOfRange, 416, EXIT_ERROR, NO),
            Self::Diverged => ("DIVERGED", "diverged", Unavailable, 503, EXIT_ERROR, NO),
            Self::Undecodable => ("UNDECODABLE", "undecodable", InvalidArgument, 400, EXIT_INVALID, None),
            Self::DeadlineExceeded => {
                ("DEADLINE_EXCEEDED", "deadline_exceeded", DeadlineExceeded, 504, EXIT_ERROR, None)
            }
            Self::NotFound => ("NOT_FOUND", "not_found", NotFound, 404, EXIT_NOT_FOUND, NO),
            Self::ConditionFailed => {
                ("CONDITION_FAILED", "condition_failed", FailedPrecondition, 412, EXIT_NOT_FOUND, NO)
            }
            Self::Unreachable => ("UNREACHABLE", "unreachable", Unavailable, 503, EXIT_UNREACHABLE, NO),
            Self::VersionNotAgreed => {
                ("VERSION_NOT_AGREED", "version_not_agreed", Unavailable, 503, EXIT_ERROR, NO)
            }
            Self::Lagged => ("LAGGED", "lagged", Unavailable, 503, EXIT_ERROR, NO),
            Self::Unauthenticated => {
                ("UNAUTHENTICATED", "unauthenticated", Unauthenticated, 401, EXIT_ERROR, NO)
            }
            Self::PermissionDenied => {
                ("PERMISSION_DENIED", "permission_denied", PermissionDenied, 403, EXIT_ERROR, NO)
            }
        };
        Row { name, counter, grpc, http_status, exit_code, maybe_applied }
    }

    /// Its name on every interface, in capitals.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// Its label in metrics that count failures.
    pub const fn counter(self) -> &'static str {
        self.row().counter
    }

    /// The gRPC code of an answer with this reason. One that names the leader is no use to repeat here.
    pub fn grpc_code(self, maybe_applied: bool, leader_known: bool) -> GrpcCode {
        let row = self.row();
        match row.grpc {
            GrpcCode::DeadlineExceeded => GrpcCode::DeadlineExceeded,
            _ if maybe_applied => GrpcCode::Unknown,
            _ if self == Self::NotLeader && leader_known => GrpcCode::FailedPrecondition,
            code => code,
        }
    }

    /// The HTTP status of an answer with this reason.
    pub fn http_status(self, maybe_applied: bool) -> u16 {
        match self.row().http_status {
            504 => 504,
            _ if maybe_applied => 500,
            status => status,
        }
    }

    /// The exit code of a command that ended with this reason.
    pub fn exit_code(self, maybe_applied: bool) -> u8 {
        if maybe_applied { EXIT_UNKNOWN } else { self.row().exit_code }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_and_names_are_those_of_the_protocol() {
        let files: prost_types::FileDescriptorSet =
            prost::Message::decode(crate::proto::DESCRIPTORS).unwrap();
        let values: Vec<(i32, String)> = files
            .file
            .iter()
            .filter(|file| file.package() == "quorate.v1")
            .flat_map(|file| &file.enum_type)
            .filter(|declared| declared.name() == "Reason")
            .flat_map(|declared| &declared.value)
            .map(|value| (value.number(), value.name().to_owned()))
            .collect();
        let ours: Vec<_> =
            Reason::all().map(|reason| (reason as i32, format!("REASON_{}", reason.name()))).collect();
        assert_eq!(values, ours);
        assert_eq!(ours.len(), 32);
    }

    /// Operators read the table there.
    #[test]
    fn the_documentation_holds_the_same_table() {
        let documented: Vec<Vec<&str>> = include_str!("../docs/OPERATIONS.md")
            .lines()
            .filter_map(|line| line.strip_prefix("| `"))
            .map(|line| line.split(" | ").map(|cell| cell.trim_matches(['`', ' ', '|'])).collect())
            .filter(|cells: &Vec<_>| {
                cells.len() == 6 && Reason::all().any(|reason| reason.name() == cells[0])
            })
            .collect();
        assert_eq!(documented.len(), Reason::all().count());
        for (reason, cells) in Reason::all().zip(documented) {
            let row = reason.row();
            let grpc = Reason::grpc_code(reason, false, false).name();
            let applied = match row.maybe_applied {
                Some(false) => "no",
                Some(true) => "yes",
                None => "perhaps",
            };
            let (exit_code, http_status) = (row.exit_code.to_string(), row.http_status.to_string());
            assert_eq!(cells[..5], [row.name, &exit_code, grpc, &http_status, applied]);
        }
    }

    #[test]
    fn what_may_have_been_applied_looks_like_nothing_else() {
        for reason in Reason::all() {
            let (grpc, http) = (reason.grpc_code(true, true), reason.http_status(true));
            assert!(matches!(grpc, GrpcCode::Unknown | GrpcCode::DeadlineExceeded), "{reason:?}: {grpc:?}");
            assert!(matches!(http, 500 | 504), "{reason:?}: {http}");
            assert_eq!(reason.exit_code(true), EXIT_UNKNOWN, "{reason:?}");
            let certain = reason.exit_code(false);
            assert_eq!(certain == EXIT_UNKNOWN, reason == Reason::AckTimeout, "{reason:?}: {certain}");
            assert_ne!(certain, EXIT_OK, "{reason:?}");
            assert!(reason.http_status(false) >= 400, "{reason:?}");
        }
    }

    #[test]
    fn a_name_belongs_to_one_reason_and_is_written_in_capitals() {
        for reason in Reason::all() {
            assert_eq!(reason.counter(), reason.name().to_lowercase());
        }
        let mut names: Vec<_> = Reason::all().map(Reason::name).collect();
        assert!(names.iter().all(|name| name.chars().all(|c| c.is_ascii_uppercase() || c == '_')));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Reason::all().count());
    }
}
