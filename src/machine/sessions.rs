//! The replicated table of sessions: which writes have been applied, and what they were answered.
//!
//! It stands between the log and the state machine. A write that carries a [`SessionSlot`] is looked up
//! before it is applied: if its sequence has an answer already, that is given again and the machine does
//! not see the command (Raft thesis, §6.3). The table changes by log entries only, so it is the same on every
//! node, and it travels inside snapshots: a retry is recognised after any fail-over.
//!
//! # Invariants
//!
//! - A sequence is applied at most once. Below `first_unanswered` nothing is applied any more, whether or
//!   not it was before: a write that was given up cannot surface late.
//! - Time is [elapsed time](super::ApplyContext::elapsed_ms). No clock is read, so a session expires at the same entry everywhere.
//! - The limits below are part of the protocol: nodes that disagreed on them would diverge.
//!
//! # Bounds
//!
//! Sessions are bounded in number, the window of one session in sequences and bytes, all answers together in
//! bytes. A session that has reached its bytes takes no write but its first unanswered one before some of its answers are
//! settled; when the table
//! exceeds its bytes, the largest sessions are closed. A writer whose session is gone is told so, and never applied
//! twice.
//!
//! No client can take all sessions. One [opener](openers), a connection of a client, has at most
//! [`MAX_OPENER_SESSIONS`]. When the table is full, the idlest session of the opener with most of them gives way to one that
//! has fewer; if all openers have about as many, that of the host with most. Else a session that was not used for
//! [`MIN_IDLE_MS`] does, whoever has it. The program that the engine is embedded in opens as many as it likes.
//!
//! # Counts
//!
//! What became of sessions is counted for whoever [takes the counts](SessionTable::take_counts). They belong to this
//! process, not to the replicated state: they are in no snapshot, and tables that differ in nothing else are equal.
//!
//! The protocol, with a figure: `docs/design/sessions.md`.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use imbl::OrdMap;

use crate::types::{LogId, SessionSlot};
use openers::Openers;

mod openers;
mod stored;

/// Sessions open at a time.
pub(crate) const MAX_SESSIONS: usize = 16_384;
/// Sessions that one connection of a client has open at a time.
pub(crate) const MAX_OPENER_SESSIONS: usize = 1_024;
/// How far a sequence may be ahead of the first unanswered one of its session.
pub(crate) const WINDOW: u64 = 65_536;
/// Shortest time after which an unused session may be closed to make room for a new one.
pub(crate) const MIN_IDLE_MS: u64 = 60_000;
/// Bounds on how long a session may stay unused.
pub(crate) const MIN_TTL_MS: u64 = 10_000;
/// See [`MIN_TTL_MS`].
pub(crate) const MAX_TTL_MS: u64 = 24 * 3_600_000;
/// How long a session may stay unused if its owner does not say.
pub(crate) const DEFAULT_TTL_MS: u64 = 600_000;
/// Bytes of answers kept for one session; the last answer may exceed it.
const MAX_SESSION_BYTES: usize = 16 * 1024 * 1024;
/// Bytes of answers kept for all.
const MAX_TABLE_BYTES: usize = 256 * 1024 * 1024;
/// Where there is a quota on the state, all answers take no more than one in so many bytes of it.
const QUOTA_SHARE: u64 = 8;
/// They may take this much even then.
const MIN_TABLE_BYTES: usize = 16 * 1024 * 1024;
/// And those of one session one in so many bytes of that.
const SESSION_SHARE: usize = 4;
/// What an answer counts beyond its own bytes.
const ANSWER_BYTES: usize = 64;
/// Expired sessions are looked for when elapsed time has advanced by this much.
const SWEEP_MS: u64 = 1_000;

/// What a write was answered the first time.
#[derive(Debug, Clone, PartialEq, Eq)]
struct KeptAnswer {
    log_id: LogId,
    reply: Bytes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct OpenSession {
    /// Whose connection opened it; empty if that is not known, or the program that the engine is embedded in.
    opener: Arc<str>,
    /// Elapsed time when it was opened.
    opened_ms: u64,
    ttl_ms: u64,
    /// Elapsed time at the last entry that named this session.
    used_ms: u64,
    /// Everything below is settled.
    first_unanswered: u64,
    /// From `first_unanswered` on; never ends with none.
    answers: VecDeque<Option<KeptAnswer>>,
    bytes: usize,
}

impl OpenSession {
    fn is_expired(&self, elapsed_ms: u64) -> bool {
        elapsed_ms.saturating_sub(self.used_ms) > self.ttl_ms
    }

    /// Forgets answers below `first_unanswered`; returns the bytes given back.
    fn forget_below(&mut self, first_unanswered: u64) -> usize {
        let before = self.bytes;
        while self.first_unanswered < first_unanswered {
            match self.answers.pop_front() {
                Some(answer) => {
                    self.bytes -= answer.map_or(0, |answer| answer.reply.len()) + ANSWER_BYTES;
                    self.first_unanswered += 1;
                }
                None => self.first_unanswered = first_unanswered,
            }
        }
        assert!(self.first_unanswered >= first_unanswered, "invariant: what is settled stays settled");
        before - self.bytes
    }
}

/// What to do with a write of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Apply it, and [record](SessionTable::record) the answer.
    Apply,
    /// It was applied before, at this position, and this was the answer.
    Repeat {
        /// Where it stands.
        log_id: LogId,
        /// The encoded reply.
        reply: Bytes,
    },
    /// Do not apply it.
    Refuse(SessionRefusal),
}

/// Why a session's entry was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionRefusal {
    /// There is no such session, or no more.
    Expired,
    /// The sequence is too far ahead.
    WindowExceeded,
    /// The sequence was settled before.
    AnswerForgotten,
    /// No room for another session.
    TooManySessions,
    /// The opener has as many as one may have.
    TooManyOfOpener,
}

/// What a session is, for whoever operates the cluster. Times are in elapsed time.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionInfo {
    /// Its id.
    pub session: u64,
    /// The address of the client that opened it; empty if that is not known, or the program that the engine is embedded in.
    pub opener: String,
    /// When it was opened.
    pub opened_ms: u64,
    /// When it was last used.
    pub used_ms: u64,
    /// From when on it may be closed, unless it is used.
    pub expires_ms: u64,
    /// What its answers take, in bytes.
    pub bytes: usize,
    /// Writes that were answered, and of whose answers the client has not said yet that it has them.
    pub unsettled: usize,
}

/// What became of sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct SessionCounts {
    /// Opened.
    pub opened: u64,
    /// Closed by their owners, or by operators.
    pub closed: u64,
    /// Closed because they were not used for as long as they had been granted.
    pub expired: u64,
    /// Closed to make room: idle ones for a new one, the largest because of their answers.
    pub evicted: u64,
}

/// See the [module](self). Cloning it costs a reference count; what is changed afterwards is copied once.
#[derive(Debug, Clone, Default)]
pub(crate) struct SessionTable {
    sessions: OrdMap<u64, Arc<OpenSession>>,
    openers: Openers,
    bytes: usize,
    /// `None` for [`MAX_TABLE_BYTES`]. Follows from the quota, and is not stored.
    max_bytes: Option<usize>,
    swept_ms: u64,
    /// Before that no session can have been unused for [`MIN_IDLE_MS`]. Not part of the state: it only spares a look.
    none_idle_before_ms: u64,
    counts: SessionCounts,
}

impl PartialEq for SessionTable {
    fn eq(&self, other: &Self) -> bool {
        // The openers follow from the sessions.
        let Self { sessions, openers: _, bytes, max_bytes: _, swept_ms, none_idle_before_ms: _, counts: _ } =
            self;
        (sessions, bytes, swept_ms) == (&other.sessions, &other.bytes, &other.swept_ms)
    }
}

impl Eq for SessionTable {}

impl SessionTable {
    /// Sessions open.
    pub(crate) fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Bytes of answers kept.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sessions of the opener that has most.
    pub(crate) fn largest_opener(&self) -> usize {
        self.openers.largest()
    }

    /// The sessions with ids above `after`, at most `limit`, in the order of their ids.
    pub(crate) fn list(&self, after: u64, limit: usize) -> Vec<SessionInfo> {
        let Some(first) = after.checked_add(1) else { return Vec::new() };
        let info = |(id, entry): (&u64, &Arc<OpenSession>)| SessionInfo {
            session: *id,
            opener: entry.opener.to_string(),
            opened_ms: entry.opened_ms,
            used_ms: entry.used_ms,
            expires_ms: entry.used_ms.saturating_add(entry.ttl_ms),
            bytes: entry.bytes,
            unsettled: entry.answers.iter().flatten().count(),
        };
        self.sessions.range(first..).take(limit).map(info).collect()
    }

    /// Bounds the answers so that they fit beside a state of `quota_bytes`; `None` for the bound that always holds. The
    /// quota is part of the state, so the bound is the same on every node. What is too much already goes with the next
    /// answer.
    pub(crate) fn fit_quota(&mut self, quota_bytes: Option<u64>) {
        self.max_bytes = quota_bytes.map(|quota| {
            let share = usize::try_from(quota / QUOTA_SHARE).unwrap_or(usize::MAX);
            share.clamp(MIN_TABLE_BYTES, MAX_TABLE_BYTES)
        });
    }

    /// Most bytes of answers.
    fn max_bytes(&self) -> usize {
        self.max_bytes.unwrap_or(MAX_TABLE_BYTES)
    }

    /// Most bytes of answers of one session, the last answer apart.
    fn max_session_bytes(&self) -> usize {
        MAX_SESSION_BYTES.min(self.max_bytes() / SESSION_SHARE)
    }

    /// Opens session `id` for `opener`. `ttl_ms` is how long it may stay unused; 0
    /// and what is out of bounds are taken to the default and the bounds.
    ///
    /// # Errors
    /// [`SessionRefusal::TooManySessions`] when the table is full of sessions in use, and nobody has more than the opener;
    /// [`SessionRefusal::TooManyOfOpener`] when it has [`MAX_OPENER_SESSIONS`].
    pub(crate) fn open(
        &mut self,
        id: u64,
        ttl_ms: u64,
        opener: &str,
        elapsed_ms: u64,
    ) -> Result<(), SessionRefusal> {
        self.expire(elapsed_ms);
        if self.sessions.contains_key(&id) {
            // Drawn twice: as good as never.
            return Err(SessionRefusal::TooManySessions);
        }
        if !opener.is_empty() && self.openers.count(opener) >= MAX_OPENER_SESSIONS {
            return Err(SessionRefusal::TooManyOfOpener);
        }
        if self.sessions.len() >= MAX_SESSIONS {
            let gives_way = self.gives_way_to(opener, elapsed_ms).ok_or(SessionRefusal::TooManySessions)?;
            self.counts.evicted += self.remove(gives_way);
        }
        let opener: Arc<str> = opener.into();
        self.openers.add(&opener, id);
        let entry = OpenSession {
            opener,
            opened_ms: elapsed_ms,
            ttl_ms: granted_ttl_ms(ttl_ms),
            used_ms: elapsed_ms,
            first_unanswered: 1,
            answers: VecDeque::new(),
            bytes: 0,
        };
        let taken = self.sessions.insert(id, Arc::new(entry));
        assert!(taken.is_none(), "invariant: no session takes the place of another");
        assert!(self.sessions.len() <= MAX_SESSIONS, "invariant: the table has a bound");
        self.counts.opened += 1;
        Ok(())
    }

    /// The session to close in a full table so that `opener` can open one.
    fn gives_way_to(&mut self, opener: &str, elapsed_ms: u64) -> Option<u64> {
        if let Some(largest) = self.openers.should_give_way_to(opener) {
            let ids = self.openers.sessions_of(largest);
            return ids.min_by_key(|id| (self.sessions.get(id).map(|entry| entry.used_ms), *id));
        }
        // Without a look through the table, which others could have taken again and again.
        if elapsed_ms < self.none_idle_before_ms {
            return None;
        }
        let idlest = self.sessions.iter().min_by_key(|(id, entry)| (entry.used_ms, **id));
        let (id, idle_from_ms) =
            idlest.map(|(id, entry)| (*id, entry.used_ms.saturating_add(MIN_IDLE_MS)))?;
        // Until then sessions can only be used again, or go.
        self.none_idle_before_ms = idle_from_ms;
        (elapsed_ms >= idle_from_ms).then_some(id)
    }

    /// Closes session `id`, if it is open, because its owner or an operator asks for it. Tells whether it was.
    pub(crate) fn close(&mut self, id: u64) -> bool {
        let closed = self.remove(id);
        self.counts.closed += closed;
        closed > 0
    }

    /// What became of sessions since this was asked for the last time.
    pub(crate) fn take_counts(&mut self) -> SessionCounts {
        std::mem::take(&mut self.counts)
    }

    /// Removes session `id`. Returns how many that were: one, or none.
    fn remove(&mut self, id: u64) -> u64 {
        let Some(entry) = self.sessions.remove(&id) else { return 0 };
        self.bytes -= entry.bytes;
        self.openers.remove(&entry.opener, id);
        assert!(
            self.bytes == 0 || !self.sessions.is_empty(),
            "invariant: no answers are counted without a session"
        );
        1
    }

    /// What to do with the write at `slot`.
    pub(crate) fn admit(&mut self, slot: SessionSlot, elapsed_ms: u64) -> Admission {
        self.expire(elapsed_ms);
        let max_session_bytes = self.max_session_bytes();
        let Some(entry) = self.sessions.get_mut(&slot.session) else {
            return Admission::Refuse(SessionRefusal::Expired);
        };
        if entry.is_expired(elapsed_ms) {
            self.counts.expired += self.remove(slot.session);
            return Admission::Refuse(SessionRefusal::Expired);
        }
        let entry = Arc::make_mut(entry);
        entry.used_ms = elapsed_ms;
        // A sequence below what its own write calls unanswered makes no sense; it counts as unanswered.
        self.bytes -= entry.forget_below(slot.first_unanswered.min(slot.sequence));
        let Some(place) = slot.sequence.checked_sub(entry.first_unanswered) else {
            return Admission::Refuse(SessionRefusal::AnswerForgotten);
        };
        if place >= WINDOW {
            return Admission::Refuse(SessionRefusal::WindowExceeded);
        }
        match entry.answers.get(place as usize) {
            Some(Some(KeptAnswer { log_id, reply })) => {
                Admission::Repeat { log_id: *log_id, reply: reply.clone() }
            }
            // Not the first one: while it is refused nothing can be settled, and it would be refused for ever.
            Some(None) | None if place > 0 && entry.bytes >= max_session_bytes => {
                Admission::Refuse(SessionRefusal::WindowExceeded)
            }
            Some(None) | None => Admission::Apply,
        }
    }

    /// The write at `slot`, just [admitted](Self::admit), was applied at `log_id` and answered with `reply`. Returns how
    /// many sessions had to be closed because their answers take too many bytes.
    pub(crate) fn record(&mut self, slot: SessionSlot, log_id: LogId, reply: Bytes) -> u64 {
        let entry = self.sessions.get_mut(&slot.session).expect("invariant: just admitted");
        let entry = Arc::make_mut(entry);
        assert!(slot.sequence >= entry.first_unanswered, "invariant: a settled write is not applied again");
        let place = (slot.sequence - entry.first_unanswered) as usize;
        assert!((place as u64) < WINDOW, "invariant: a session has a bounded window");
        let before = entry.bytes;
        while entry.answers.len() <= place {
            entry.answers.push_back(None);
            entry.bytes += ANSWER_BYTES;
        }
        entry.bytes += reply.len();
        assert!(entry.answers[place].is_none(), "invariant: a write of a session is applied once");
        entry.answers[place] = Some(KeptAnswer { log_id, reply });
        let bytes = entry.bytes;
        self.bytes += bytes - before;
        assert!(bytes <= self.bytes, "invariant: no session takes more than all of them");
        let mut evicted = 0;
        if bytes > 2 * self.max_session_bytes() {
            evicted += self.remove(slot.session);
        }
        if self.bytes > self.max_bytes() {
            evicted += self.evict();
        }
        self.counts.evicted += evicted;
        evicted
    }

    /// Closes the largest sessions, until an eighth of the bytes is free again: the others are not to pay for them.
    /// Returns how many.
    fn evict(&mut self) -> u64 {
        let mut evicted = 0;
        let mut by_size: Vec<_> = self.sessions.iter().map(|(id, entry)| (entry.bytes, *id)).collect();
        by_size.sort_unstable();
        for (_, id) in by_size.into_iter().rev() {
            if self.bytes <= self.max_bytes() / 8 * 7 {
                break;
            }
            evicted += self.remove(id);
        }
        evicted
    }

    /// Closes expired sessions, unless that was done less than a second ago.
    pub(crate) fn expire(&mut self, elapsed_ms: u64) {
        if elapsed_ms < self.swept_ms.saturating_add(SWEEP_MS) {
            return;
        }
        self.swept_ms = elapsed_ms;
        let expired: Vec<u64> = self
            .sessions
            .iter()
            .filter(|(_, entry)| entry.is_expired(elapsed_ms))
            .map(|(id, _)| *id)
            .collect();
        for id in expired {
            self.counts.expired += self.remove(id);
        }
    }
}

/// The time that a session is granted when `ttl_ms` is asked for.
pub(crate) fn granted_ttl_ms(ttl_ms: u64) -> u64 {
    match ttl_ms {
        0 => DEFAULT_TTL_MS,
        asked => asked.clamp(MIN_TTL_MS, MAX_TTL_MS),
    }
}

#[cfg(test)]
mod tests;
