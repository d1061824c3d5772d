//! What every writing command can be told: when the write counts as done.

use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value};

use super::{CliError, Format, output};
use crate::duration;
use crate::kv::client::{ClientError, Header, WriteOptions};
use crate::types::AckLevel;

/// When a write is acknowledged.
#[derive(Debug, Clone, Args)]
pub struct WriteArgs {
    /// Who must have the write on disk before it is acknowledged
    #[arg(long, value_enum, value_name = "WHO", default_value_t = Ack::Quorum)]
    pub ack: Ack,
    /// With --ack all: how long to wait for the slowest voter
    #[arg(long, value_name = "TIME", value_parser = duration::parse, allow_hyphen_values = true, default_value = "5s")]
    pub ack_timeout: Duration,
}

/// Who must have a write on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Ack {
    /// A majority of the voters
    Quorum,
    /// Every voter
    All,
    /// Only the leader: lost if it fails before a majority has it, and printed before it is applied
    Leader,
}

impl WriteArgs {
    pub(super) fn options(&self) -> WriteOptions {
        let ack = match self.ack {
            Ack::Quorum => AckLevel::Quorum,
            Ack::All => AckLevel::All,
            Ack::Leader => AckLevel::Leader,
        };
        WriteOptions::from(ack).with_ack_timeout(self.ack_timeout)
    }
}

/// Adds who holds the write, and where it stands, to a result for programs.
pub(super) fn insert_header(object: &mut Map<String, Value>, header: &Header) {
    object.insert("node_id".to_owned(), header.node_id.into());
    object.insert("term".to_owned(), header.position.map(|position| position.term).into());
    object.insert("index".to_owned(), header.position.map(|position| position.index).into());
    object.insert("bookmark".to_owned(), header.position.map(|_| header.bookmark().to_string()).into());
    object.insert("ack".to_owned(), header.ack.name().into());
    object.insert("held_by".to_owned(), header.held_by.clone().into());
    object.insert("repeated_write".to_owned(), header.repeated_write.into());
}

/// What is known of a write whose answer is there.
pub(super) struct WriteTold {
    /// Who answered.
    pub(super) header: Header,
    /// For people; none where the error says it all.
    pub(super) text: Option<String>,
    /// For programs.
    pub(super) object: Map<String, Value>,
    /// Why nothing was changed, if that is no success.
    pub(super) nothing: Option<CliError>,
}

impl WriteTold {
    /// Tells it, and how it ended: with `error` if not every voter has confirmed it.
    pub(super) fn tell(self, format: Format, error: Option<ClientError>) -> Result<(), CliError> {
        let Self { header, text, object, nothing } = self;
        let printed = match (format, text) {
            (Format::Table, Some(text)) => output::raw(text.as_bytes()),
            (Format::Table, None) => Ok(()),
            // Whole, however large it is: the error has room for less.
            (Format::Json, _) => output::json(&object),
        };
        match (error, nothing) {
            (Some(error), nothing) => Err(unconfirmed(error, object, nothing)),
            // That is told, whether or not the result can be printed.
            (None, Some(nothing)) => Err(nothing),
            (None, None) => output::after(done(&header), printed),
        }
    }
}

/// What is told of a write that not every voter has confirmed.
pub(super) fn unconfirmed(
    error: ClientError,
    mut result: Map<String, Value>,
    nothing: Option<CliError>,
) -> CliError {
    if let ClientError::AckTimeout { missing, .. } = &error {
        result.insert("missing".to_owned(), missing.clone().into());
    }
    CliError::Unconfirmed { error, result, nothing: nothing.map(Box::new) }
}

/// The reply to a write: of one that not every voter has confirmed, what `unconfirmed` makes of the error, and that.
pub(super) fn reply<R>(
    outcome: Result<R, ClientError>,
    unconfirmed: impl FnOnce(&ClientError) -> Option<R>,
) -> Result<(R, Option<ClientError>), ClientError> {
    match outcome {
        Ok(reply) => Ok((reply, None)),
        Err(error) => match unconfirmed(&error) {
            Some(reply) => Ok((reply, Some(error))),
            None => Err(error),
        },
    }
}

/// What has come of a write whose answer is there.
pub(super) fn done(header: &Header) -> &'static str {
    match header.ack {
        AckLevel::Leader => "the leader has the write",
        AckLevel::Quorum | AckLevel::All => "the write was applied",
    }
}

/// What is printed of a write that is not applied yet.
pub(super) fn not_applied(header: &Header) -> String {
    let index = header.position.map_or_else(|| "?".to_owned(), |position| position.index.to_string());
    format!("index {index}, on the leader's disk only")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{HistoryEpoch, LogId};

    #[test]
    fn a_write_is_named_by_term_and_index() {
        let mut object = Map::new();
        let (position, history) = (Some(LogId::new(3, 7)), HistoryEpoch(0xb));
        let header = Header { node_id: 1, position, history, ..Header::default() };
        insert_header(&mut object, &header);
        let expected = serde_json::json!({
            "node_id": 1, "term": 3, "index": 7, "bookmark": "7@000000000000000b", "ack": "quorum", "held_by": [], "repeated_write": false,
        });
        assert_eq!(Value::Object(object), expected);
    }
}
