//! How a call is carried out, as its caller says.

use std::time::Duration;

use crate::types::{AckLevel, DEFAULT_ACK_TIMEOUT, HistoryEpoch, ReadLevel, ReadOptions};

/// How a write is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct WriteOptions {
    /// When the write is acknowledged. Default [`AckLevel::Quorum`].
    pub ack: AckLevel,
    /// [`AckLevel::All`]: how long to wait for the slowest voter, before
    /// [`ClientError::AckTimeout`](super::ClientError::AckTimeout). Default 5 s. Shortened to what is left of the
    /// operation's time.
    pub ack_timeout: Duration,
    /// The history that positions in the write were read in:
    /// [`Reason::OtherHistory`](crate::reason::Reason::OtherHistory), and nothing is done, where it is another one by now.
    /// Default: not checked.
    pub history: HistoryEpoch,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self { ack: AckLevel::default(), ack_timeout: DEFAULT_ACK_TIMEOUT, history: HistoryEpoch::UNKNOWN }
    }
}

impl WriteOptions {
    /// The same with another patience for the slowest voter.
    #[must_use]
    pub fn with_ack_timeout(self, ack_timeout: Duration) -> Self {
        Self { ack_timeout, ..self }
    }

    /// The same, of positions that were read in this history.
    #[must_use]
    pub fn with_history(self, history: HistoryEpoch) -> Self {
        Self { history, ..self }
    }
}

impl From<AckLevel> for WriteOptions {
    fn from(ack: AckLevel) -> Self {
        Self { ack, ..Self::default() }
    }
}

/// How a call is carried out: which of the two it is says whether it is a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallOptions {
    /// As a write, acknowledged like this.
    Write(WriteOptions),
    /// As a read, as fresh as this.
    Read(ReadOptions),
}

impl From<WriteOptions> for CallOptions {
    fn from(write: WriteOptions) -> Self {
        Self::Write(write)
    }
}

impl From<AckLevel> for CallOptions {
    fn from(ack: AckLevel) -> Self {
        Self::Write(ack.into())
    }
}

impl From<ReadOptions> for CallOptions {
    fn from(read: ReadOptions) -> Self {
        Self::Read(read)
    }
}

impl From<ReadLevel> for CallOptions {
    fn from(level: ReadLevel) -> Self {
        Self::Read(level.into())
    }
}
