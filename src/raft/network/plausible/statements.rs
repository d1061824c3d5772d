//! What leaders have said of their logs, so that one leader's words fit together.

use std::sync::{Mutex, MutexGuard};

use openraft::EntryPayload;
use openraft::raft::AppendEntriesRequest;

use super::{Checked, Voters, ends, ensure, in_one_log, position_of};
use crate::raft::network::wire::Malformed;
use crate::raft::type_config::{self, TypeConfig};
use crate::types::LogId;

/// What leaders have said of their logs.
///
/// The core commits up to whichever is smaller, what it was told to be committed or what it has of the same leader's log,
/// and takes that for the position of an entry. So one leader's words must fit together, and what is committed must name
/// an entry that is there. Where that cannot be told yet, the core is not told either: the leader says it again.
#[derive(Debug, Default)]
pub(in crate::raft::network) struct Statements(Mutex<Option<Statement>>);

/// What the leader with this vote has said.
#[derive(Debug, Clone)]
struct Statement {
    vote: type_config::Vote,
    /// The furthest position that it has named.
    furthest: LogId,
    /// The last membership that it has sent.
    membership: Option<(LogId, Voters)>,
    /// Up to where the core was told to commit. The core knows it before what it shows of itself does, and gives up entries for
    /// others by what it knows: a leader that contradicts itself in between would have it give up what is committed.
    committed: Option<LogId>,
}

impl Statements {
    /// Takes down what `append` says, and takes out of it what cannot be told to be true. `term_at` is the term of this
    /// node's own entry at an index.
    ///
    /// # Errors
    /// When its sender has said something else before.
    pub(in crate::raft::network) fn take(
        &self,
        append: &mut AppendEntriesRequest<TypeConfig>,
        committed: Option<LogId>,
        term_at: impl FnOnce(u64) -> Option<u64>,
    ) -> Checked {
        let (first, last) = ends(append);
        let told =
            self.lock().as_ref().filter(|before| before.vote == append.vote).and_then(|told| told.committed);
        let mut named = append.entries.iter().map(position_of).chain(first);
        ensure(
            told.is_none_or(|told| named.all(|at| in_one_log(at, told))),
            "its sender has said before that something else is committed",
        )?;
        let furthest = self.note(append.vote, first, last)?;
        self.note_membership(append);
        let Some(commit) = append.leader_commit.as_ref().map(type_config::from_log_id) else { return Ok(()) };
        let Some(furthest) = furthest else { return Ok(()) };
        let is_known = committed.is_some_and(|committed| commit.index <= committed.index);
        let is_true = match (first, last) {
            _ if commit.index > furthest.index => commit.term >= furthest.term,
            _ if is_known => true,
            (Some(first), _) if commit.index == first.index => commit == first,
            (Some(first), Some(last)) if (first.index..=last.index).contains(&commit.index) => {
                append.entries.iter().any(|entry| position_of(entry) == commit)
            }
            // Between two positions of one term there is no other.
            (Some(first), _)
                if commit.index < first.index && committed.is_some_and(|known| known.term == first.term) =>
            {
                commit.term == first.term
            }
            _ => term_at(commit.index) == Some(commit.term),
        };
        match is_true {
            true => self
                .note_committed(append.vote, if commit.index < furthest.index { commit } else { furthest }),
            false => append.leader_commit = None,
        }
        Ok(())
    }

    /// A leader has named these positions. Returns the furthest it has, if nobody leads a later term.
    pub(in crate::raft::network) fn note(
        &self,
        vote: type_config::Vote,
        first: Option<LogId>,
        last: Option<LogId>,
    ) -> Result<Option<LogId>, Malformed> {
        let mut statement = self.lock();
        let same = statement.as_ref().filter(|before| before.vote == vote);
        let before = same.map(|before| before.furthest);
        let is_outdated = statement.as_ref().is_some_and(|before| before.vote > vote);
        for at in first.into_iter().chain(last) {
            ensure(
                before.is_none_or(|before| in_one_log(at, before)),
                "its sender has said something else before",
            )?;
        }
        let furthest = last.into_iter().chain(before).max_by_key(|at| at.index);
        if let Some(furthest) = furthest
            && !is_outdated
        {
            match statement.as_mut().filter(|before| before.vote == vote) {
                Some(same) => same.furthest = furthest,
                None => *statement = Some(Statement { vote, furthest, membership: None, committed: None }),
            }
        }
        Ok(furthest)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Statement>> {
        self.0.lock().expect("invariant: no panic under this lock")
    }

    fn note_committed(&self, vote: type_config::Vote, upto: LogId) {
        if let Some(statement) = self.lock().as_mut().filter(|statement| statement.vote == vote)
            && statement.committed.is_none_or(|before| before.index < upto.index)
        {
            statement.committed = Some(upto);
        }
    }

    fn note_membership(&self, append: &AppendEntriesRequest<TypeConfig>) {
        let memberships = append.entries.iter().filter_map(|entry| match &entry.payload {
            EntryPayload::Membership(membership) => {
                Some((position_of(entry), membership.get_joint_config().clone()))
            }
            EntryPayload::Blank | EntryPayload::Normal(_) => None,
        });
        let Some(newest) = memberships.last() else { return };
        if let Some(statement) = self.lock().as_mut().filter(|statement| statement.vote == append.vote) {
            statement.membership = Some(newest);
        }
    }

    /// The last membership that the leader with this vote has sent.
    pub(in crate::raft::network) fn membership(&self, vote: type_config::Vote) -> Option<(LogId, Voters)> {
        self.lock().as_ref().filter(|statement| statement.vote == vote)?.membership.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{HERE, append};
    use super::*;

    #[test]
    fn what_is_committed_is_told_on_when_it_is_certain() {
        let statements = Statements::default();
        let told = |term, previous, entries: &[(u64, u64)], commit, own: Option<u64>| {
            let mut append = append(term, previous, entries, Some(commit)).unwrap();
            statements.take(&mut append, Some(HERE), |_| own)?;
            Ok::<_, Malformed>(append.leader_commit.is_some())
        };
        assert_eq!(told(6, Some((5, 60)), &[(6, 61)], (6, 61), None), Ok(true), "an entry of the message");
        assert_eq!(told(6, Some((5, 60)), &[(6, 61)], (6, 90), None), Ok(true), "beyond all it has named");
        assert_eq!(told(6, Some((6, 61)), &[(6, 62)], (5, 45), None), Ok(true), "known before");
        assert_eq!(told(6, Some((6, 62)), &[], (5, 55), None), Ok(false), "this node cannot tell");
        assert_eq!(told(6, Some((6, 62)), &[], (5, 55), Some(5)), Ok(true), "it has that entry");
        assert_eq!(told(6, Some((6, 62)), &[], (5, 55), Some(6)), Ok(false), "it has another one there");
        assert_eq!(told(6, Some((5, 60)), &[], (5, 55), None), Ok(true), "one term, one entry");
        assert_eq!(told(6, None, &[], (5, 70), None), Ok(false), "older than what it has named before it");
        assert!(told(6, Some((5, 62)), &[], (5, 50), None).is_err(), "it has named another entry there");
        // It was told on that (6, 61) is committed.
        assert!(
            told(6, Some((5, 60)), &[(5, 61)], (5, 50), None).is_err(),
            "another entry is committed there"
        );
        assert!(told(6, Some((5, 61)), &[], (5, 50), None).is_err(), "another entry is committed there");
        assert!(told(6, Some((6, 60)), &[(6, 61), (6, 62)], (6, 61), None).is_ok());
        // Another leader has another log.
        assert_eq!(told(7, Some((5, 62)), &[], (5, 62), None), Ok(true));
    }
}
