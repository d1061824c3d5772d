//! The table of sessions in a snapshot.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{ANSWER_BYTES, KeptAnswer, MAX_SESSION_BYTES, MAX_SESSIONS, OpenSession, SessionTable};
use crate::types::LogId;

/// What a session is in a snapshot. Positional: fields are only added under a new version.
#[derive(Serialize, Deserialize)]
struct StoredSession {
    id: u64,
    ttl_ms: u64,
    used_ms: u64,
    first_unanswered: u64,
    answers: Vec<Option<(u64, u64, Bytes)>>,
    opener: String,
    opened_ms: u64,
}

/// The same in version 1.
#[derive(Deserialize)]
struct StoredSessionV1 {
    id: u64,
    ttl_ms: u64,
    used_ms: u64,
    first_unanswered: u64,
    answers: Vec<Option<(u64, u64, Bytes)>>,
}

impl From<StoredSessionV1> for StoredSession {
    fn from(stored: StoredSessionV1) -> Self {
        let StoredSessionV1 { id, ttl_ms, used_ms, first_unanswered, answers } = stored;
        // It was opened at that time or before.
        Self { id, ttl_ms, used_ms, first_unanswered, answers, opener: String::new(), opened_ms: used_ms }
    }
}

/// The version of the table that this build writes.
const VERSION: u32 = 2;
/// The oldest that it reads.
const OLDEST_VERSION: u32 = 1;

impl SessionTable {
    /// Writes the table: version (u32), elapsed time at the last look for expired sessions (u64), count (u32), then for each session, in
    /// the order of ids, its length (u32) and its bytes in bincode. Numbers are little-endian.
    ///
    /// # Errors
    /// Passes on what `out` returns.
    pub(crate) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let count = u32::try_from(self.sessions.len()).expect("invariant: sessions are bounded");
        out.write_all(&VERSION.to_le_bytes())?;
        out.write_all(&self.swept_ms.to_le_bytes())?;
        out.write_all(&count.to_le_bytes())?;
        for (id, entry) in &self.sessions {
            let answer =
                |answer: &KeptAnswer| (answer.log_id.term, answer.log_id.index, answer.reply.clone());
            let stored = StoredSession {
                id: *id,
                ttl_ms: entry.ttl_ms,
                used_ms: entry.used_ms,
                first_unanswered: entry.first_unanswered,
                answers: entry.answers.iter().map(|slot| slot.as_ref().map(answer)).collect(),
                opener: entry.opener.to_string(),
                opened_ms: entry.opened_ms,
            };
            let bytes = bincode::serde::encode_to_vec(&stored, bincode::config::standard())
                .map_err(io::Error::other)?;
            let length = u32::try_from(bytes.len()).expect("invariant: a session's bytes are bounded");
            out.write_all(&length.to_le_bytes())?;
            out.write_all(&bytes)?;
        }
        Ok(())
    }

    /// Reads what [`write`](Self::write) wrote.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] when it is something else.
    pub(crate) fn read(input: &mut dyn Read) -> io::Result<Self> {
        /// No stored session is longer: its answers, and what encodes them.
        const MAX_STORED_BYTES: usize = 4 * MAX_SESSION_BYTES;
        let version = u32::from_le_bytes(read_array(input)?);
        if !(OLDEST_VERSION..=VERSION).contains(&version) {
            return Err(invalid(format!("has version {version}, this build reads up to {VERSION}")));
        }
        let mut table = Self { swept_ms: u64::from_le_bytes(read_array(input)?), ..Self::default() };
        let count = u32::from_le_bytes(read_array(input)?);
        if count as usize > MAX_SESSIONS {
            return Err(invalid(format!("holds {count} sessions, more than {MAX_SESSIONS}")));
        }
        for _ in 0..count {
            let length = u32::from_le_bytes(read_array(input)?) as usize;
            if length > MAX_STORED_BYTES {
                return Err(invalid(format!("holds a session of {length} bytes")));
            }
            let mut bytes = vec![0; length];
            input.read_exact(&mut bytes)?;
            let stored = match version {
                OLDEST_VERSION => decode::<StoredSessionV1>(&bytes)?.into(),
                _ => decode::<StoredSession>(&bytes)?,
            };
            if table.sessions.contains_key(&stored.id) {
                return Err(invalid(format!("holds session {} twice", stored.id)));
            }
            let answer = |(term, index, reply): (u64, u64, Bytes)| KeptAnswer {
                log_id: LogId::new(term, index),
                // Decoding may have taken a slice of the whole buffer, which would stay alive with it.
                reply: Bytes::copy_from_slice(&reply),
            };
            let answers: VecDeque<_> = stored.answers.into_iter().map(|slot| slot.map(answer)).collect();
            let replies = answers.iter().flatten().map(|answer| answer.reply.len());
            let bytes = replies.sum::<usize>() + answers.len() * ANSWER_BYTES;
            let opener: Arc<str> = stored.opener.into();
            table.openers.add(&opener, stored.id);
            let entry = OpenSession {
                opener,
                opened_ms: stored.opened_ms,
                ttl_ms: stored.ttl_ms,
                used_ms: stored.used_ms,
                first_unanswered: stored.first_unanswered,
                answers,
                bytes,
            };
            table.bytes += bytes;
            table.sessions.insert(stored.id, Arc::new(entry));
        }
        Ok(table)
    }
}

/// What all of `bytes` are.
fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    crate::machine::decode(bytes)
        .map_err(|error| invalid(format!("holds a session that cannot be read: {error}")))
}

fn read_array<const N: usize>(input: &mut dyn Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn invalid(detail: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the table of sessions {detail}"))
}
