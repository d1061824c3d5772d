//! What a call carries beside its content, whichever guest it is for, and what its answer is headed by: in this program's
//! words, and on the wire. Clients and servers translate here, each in its direction.

use std::time::Duration;

use crate::proto::v1;
use crate::reason::Reason;
use crate::types::{
    AckLevel, Bookmark, DEFAULT_ACK_TIMEOUT, HistoryEpoch, Leader, LogId, NodeId, ReadLevel, ReadOptions,
    SessionSlot, WriteOptions,
};

/// Longest time that a write may ask to wait for the slowest voter.
const MAX_ACK_TIMEOUT: Duration = Duration::from_secs(60);

/// Of a stream whose calls one node passes on to another: a header in the metadata.
pub(crate) const RELAYED: &str = "quorate-relayed";

/// A call that is at fault itself, or that the state machine has turned down: it fails again wherever it is sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
#[non_exhaustive]
pub struct Rejected {
    /// Which fault.
    pub reason: Reason,
    /// The fault in words.
    pub message: String,
    /// Whether it may have changed something nevertheless: never, but for a defect of the server.
    pub maybe_applied: bool,
}

impl Rejected {
    /// For `reason`, with nothing changed.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), maybe_applied: false }
    }

    /// The call makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Reason::Invalid, message)
    }

    /// A write came with the sequence of another one, which was applied before: that one's answer is none to this one.
    pub fn other_request() -> Self {
        Self::invalid(
            "the sequence number of this write was another request's of the same session: that earlier one was applied, and this one was not; every write has a number of its own",
        )
    }

    /// A machine answers every command and query in kind; if it ever did not, the caller would learn of it.
    pub fn unexpected(maybe_applied: bool) -> Self {
        let message = "the machine answered another question: this is a defect of the server";
        Self { maybe_applied, ..Self::new(Reason::Unspecified, message) }
    }
}

/// How a call is to be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Options {
    Write(WriteOptions),
    Read(ReadOptions),
}

/// Who answered, and from which state.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Header {
    /// The node that answered.
    pub node_id: NodeId,
    /// Of a write: its place in the log. Of a read: up to where the answering state had been applied.
    pub position: Option<LogId>,
    /// The history that `position` belongs to.
    pub history: HistoryEpoch,
    /// Of a write: what the acknowledgement promises.
    pub ack: AckLevel,
    /// Of a write: the nodes known to hold it on disk when it was acknowledged.
    pub held_by: Vec<NodeId>,
    /// Of a write: an earlier attempt of it had been applied already, and this is the first one's answer.
    pub repeated_write: bool,
}

impl Header {
    /// What to ask for to read the state of this answer or a later one, on whatever node: one's own write, or
    /// never less than what was read before.
    pub fn then_read(&self, level: ReadLevel) -> ReadOptions {
        ReadOptions::from(level).after(self.bookmark())
    }

    /// The position, to be kept and come back with: index 0 where there is none.
    pub fn bookmark(&self) -> Bookmark {
        Bookmark { index: self.position.map_or(0, |position| position.index), history: self.history }
    }

    /// From the wire; one that is left out says nothing.
    pub(crate) fn decode(header: Option<v1::Header>) -> Self {
        let Some(header) = header else { return Self::default() };
        Self {
            ack: match header.ack() {
                v1::AckLevel::Quorum => AckLevel::Quorum,
                v1::AckLevel::All => AckLevel::All,
                v1::AckLevel::Leader => AckLevel::Leader,
            },
            node_id: header.node_id,
            history: HistoryEpoch(header.position.map_or(0, |position| position.history)),
            position: header.position.map(decode_position),
            held_by: header.held_by,
            repeated_write: header.repeated_write,
        }
    }

    /// To the wire. A node has no need of it: it makes the message at once.
    #[cfg(test)]
    pub(crate) fn encode(self) -> v1::Header {
        let Self { node_id, position, history, ack, held_by, repeated_write } = self;
        v1::Header {
            node_id,
            position: position.map(|at| encode_position(at, history)),
            ack: encode_ack(ack).into(),
            held_by,
            repeated_write,
        }
    }
}

/// A position, without the history that it belongs to.
pub(crate) fn decode_position(at: v1::Position) -> LogId {
    LogId::new(at.term, at.index)
}

pub(crate) fn decode_leader(v1::LeaderHint { node_id, client }: v1::LeaderHint) -> Leader {
    Leader { node_id, client }
}

pub(crate) fn encode_leader(Leader { node_id, client }: Leader) -> v1::LeaderHint {
    v1::LeaderHint { node_id, client }
}

/// A position of `history`.
pub(crate) fn encode_position(at: LogId, history: HistoryEpoch) -> v1::Position {
    v1::Position { term: at.term, index: at.index, history: history.0 }
}

pub(crate) fn encode_ack(ack: AckLevel) -> v1::AckLevel {
    match ack {
        AckLevel::Quorum => v1::AckLevel::Quorum,
        AckLevel::All => v1::AckLevel::All,
        AckLevel::Leader => v1::AckLevel::Leader,
    }
}

/// Level and freshness; the latter is left out when it says nothing.
pub(crate) fn encode_read(read: ReadOptions) -> (i32, Option<v1::Freshness>) {
    let (level, max_lag_ms) = match read.level {
        ReadLevel::Linearizable => (v1::ReadLevel::Linearizable, 0),
        ReadLevel::Local => (v1::ReadLevel::Local, 0),
        ReadLevel::Lease => (v1::ReadLevel::Lease, 0),
        ReadLevel::Bounded { max_lag_ms } => (v1::ReadLevel::Bounded, max_lag_ms),
    };
    let freshness = v1::Freshness { max_lag_ms, after_index: read.after_index, history: read.history.0 };
    (level.into(), (freshness != v1::Freshness::default()).then_some(freshness))
}

/// # Errors
/// When the level is none that this version knows.
pub(crate) fn decode_read(level: i32, freshness: Option<v1::Freshness>) -> Result<ReadOptions, Rejected> {
    let v1::Freshness { max_lag_ms, after_index, history } = freshness.unwrap_or_default();
    let level = match v1::ReadLevel::try_from(level) {
        Ok(v1::ReadLevel::Linearizable) => ReadLevel::Linearizable,
        Ok(v1::ReadLevel::Lease) => ReadLevel::Lease,
        Ok(v1::ReadLevel::Bounded) => ReadLevel::Bounded { max_lag_ms },
        Ok(v1::ReadLevel::Local) => ReadLevel::Local,
        // Never answer more weakly than was asked for.
        Err(_) => return Err(Rejected::invalid("this node does not know the read level asked for")),
    };
    Ok(ReadOptions { level, after_index, history: HistoryEpoch(history) })
}

/// Left out when it says nothing, which saves its bytes in every request.
pub(crate) fn encode_write(options: &WriteOptions) -> Option<v1::WriteOptions> {
    let WriteOptions { slot, ack, ack_timeout, history } = *options;
    if slot.is_none() && ack == AckLevel::Quorum && history == HistoryEpoch::UNKNOWN {
        return None;
    }
    let slot = slot.unwrap_or(SessionSlot { session: 0, sequence: 0, first_unanswered: 0 });
    Some(v1::WriteOptions {
        session: slot.session,
        sequence: slot.sequence,
        first_unanswered: slot.first_unanswered,
        ack: encode_ack(ack).into(),
        ack_timeout_ms: if ack == AckLevel::All { whole_ms(ack_timeout) } else { 0 },
        history: history.0,
    })
}

/// # Errors
/// When they contradict each other, or ask for what this version does not know.
pub(crate) fn decode_write(options: Option<v1::WriteOptions>) -> Result<WriteOptions, Rejected> {
    let Some(options) = options else { return Ok(WriteOptions::default()) };
    let ack = match v1::AckLevel::try_from(options.ack) {
        Ok(v1::AckLevel::Quorum) => AckLevel::Quorum,
        Ok(v1::AckLevel::All) => AckLevel::All,
        Ok(v1::AckLevel::Leader) => AckLevel::Leader,
        // Never promise less than was asked for.
        Err(_) => {
            return Err(Rejected::invalid("this node does not know the acknowledgement level asked for"));
        }
    };
    let v1::WriteOptions { session, sequence, first_unanswered, .. } = options;
    let slot = match (session, sequence) {
        (0, 0) => None,
        (0, _) | (_, 0) => {
            return Err(Rejected::invalid("a session and a sequence belong together, each from 1"));
        }
        _ if ack == AckLevel::Leader => {
            return Err(Rejected::invalid(
                "a write of a session cannot be acknowledged at level leader; choose another level, or no session",
            ));
        }
        // 0: nothing was answered yet.
        _ => Some(SessionSlot { session, sequence, first_unanswered: first_unanswered.max(1) }),
    };
    let ack_timeout = match options.ack_timeout_ms {
        0 => DEFAULT_ACK_TIMEOUT,
        ack_timeout_ms => Duration::from_millis(ack_timeout_ms).min(MAX_ACK_TIMEOUT),
    };
    Ok(WriteOptions { slot, ack, ack_timeout, history: HistoryEpoch(options.history) })
}

/// Milliseconds, rounded up, and never zero: zero means something else on the wire.
pub(crate) fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_say_nothing_are_not_sent() {
        assert_eq!(encode_write(&WriteOptions::default()), None);
        assert_eq!(encode_read(ReadLevel::Linearizable.into()), (0, None));
        let bookmark = "9@b".parse().unwrap();
        let read = ReadOptions::from(ReadLevel::Bounded { max_lag_ms: 7 }).after(bookmark);
        let (level, freshness) = encode_read(read);
        assert_eq!(level, v1::ReadLevel::Bounded as i32);
        assert_eq!(freshness, Some(v1::Freshness { max_lag_ms: 7, after_index: 9, history: 0xb }));
    }

    #[test]
    fn what_is_encoded_is_decoded_as_it_was() {
        let history = HistoryEpoch(0xabc);
        for level in [
            ReadLevel::Linearizable,
            ReadLevel::Lease,
            ReadLevel::Local,
            ReadLevel::Bounded { max_lag_ms: 3 },
        ] {
            let read = ReadOptions { level, after_index: 7, history };
            let (level, freshness) = encode_read(read);
            assert_eq!(decode_read(level, freshness), Ok(read));
        }
        let slot = Some(SessionSlot { session: 5, sequence: 7, first_unanswered: 6 });
        let all = (AckLevel::All, Duration::from_millis(1_500));
        for (slot, (ack, ack_timeout)) in [
            (None, (AckLevel::Quorum, DEFAULT_ACK_TIMEOUT)),
            (slot, (AckLevel::Quorum, DEFAULT_ACK_TIMEOUT)),
            (slot, all),
            (None, all),
            (None, (AckLevel::Leader, DEFAULT_ACK_TIMEOUT)),
        ] {
            for history in [history, HistoryEpoch::UNKNOWN] {
                let write = WriteOptions { slot, ack, ack_timeout, history };
                assert_eq!(decode_write(encode_write(&write)), Ok(write));
            }
        }
        let header = Header {
            node_id: 7,
            position: Some(LogId::new(3, 9)),
            history,
            ack: AckLevel::All,
            held_by: vec![1, 2],
            repeated_write: true,
        };
        assert_eq!(Header::decode(Some(header.clone().encode())), header);
    }

    #[test]
    fn options_that_make_no_sense_are_refused() {
        let decoded = |options| decode_write(Some(options)).map_err(|rejected| rejected.reason);
        let slot = |session, sequence| v1::WriteOptions { session, sequence, ..Default::default() };
        assert_eq!(decoded(slot(0, 0)), Ok(WriteOptions::default()));
        let expected = SessionSlot { session: 5, sequence: 7, first_unanswered: 1 };
        assert_eq!(decoded(slot(5, 7)).unwrap().slot, Some(expected));
        assert_eq!(decoded(slot(0, 7)), Err(Reason::Invalid));
        assert_eq!(decoded(slot(5, 0)), Err(Reason::Invalid));
        let at_leader = v1::AckLevel::Leader.into();
        assert_eq!(decoded(v1::WriteOptions { ack: at_leader, ..slot(5, 7) }), Err(Reason::Invalid));
        assert_eq!(decoded(v1::WriteOptions { ack: 99, ..Default::default() }), Err(Reason::Invalid));
        let all = v1::WriteOptions { ack: 1, ack_timeout_ms: u64::MAX, ..Default::default() };
        let decoded = decoded(all).unwrap();
        assert_eq!((decoded.ack, decoded.ack_timeout), (AckLevel::All, MAX_ACK_TIMEOUT));
        assert_eq!(decode_read(99, None).unwrap_err().reason, Reason::Invalid);
    }

    #[test]
    fn milliseconds_are_whole_and_never_none() {
        assert_eq!(whole_ms(Duration::from_micros(1)), 1);
        assert_eq!(whole_ms(Duration::ZERO), 1);
        assert_eq!(whole_ms(Duration::from_micros(1_001)), 2);
    }
}
