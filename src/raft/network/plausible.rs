//! What a peer may say: everything that no member of a working cluster can have said is refused before the core hears it.
//!
//! The core takes what it is told for true. A term of 2^64 - 1 leaves no term for another election, and the addition that
//! looks for one ends the core; a position that contradicts what is committed breaks its assertions; an entry that does not
//! decode ends the node when it is applied, at this start and at every other one. To refuse a message is the same as
//! to lose it, and Raft stays safe whatever is lost.
//!
//! # Terms
//!
//! A term is believed up to [`TERM_LEAP`] beyond this node's own. Terms grow by elections, and with pre-vote by those only that
//! a majority would have granted: a node that is cut off asks for years without growing one. So a gap of that size
//! takes twelve days of an election every second while this node was away the whole time; it then says in its log that it
//! is to be rebuilt. Each step costs a vote written to the disk, and it takes 2^42 of them from nothing to
//! [`LARGEST_TERM`], years of a caller that does nothing else.
//!
//! A node with an empty log has no bearings: it was started to join a cluster that may be of any age. It believes
//! a leader any term up to [`LARGEST_TERM`]. When that was a lie, the cluster does not believe that node's answers, by the same
//! rule, and the node is wiped and added again.
//!
//! # Positions
//!
//! All logs agree up to what is committed, and terms do not fall along a log. So of two positions the one with the smaller
//! index has no larger term, and what does not fit to a committed position of this node is refused. Memberships follow
//! each other in steps that share a majority.
//!
//! What it does not do: tell a member from someone that knows a member's identity. What such a caller says and is possible
//! is believed.

mod statements;

use std::collections::BTreeSet;

use openraft::EntryPayload;
use openraft::raft::AppendEntriesRequest;

pub(super) use self::statements::Statements;
use super::wire::Malformed;
use crate::machine::StateMachine;
use crate::raft::clock::{LARGEST_TIME_MS, Reading, Stamp};
use crate::raft::envelope::{self, Unusable};
use crate::raft::type_config::{self, TypeConfig};
use crate::types::{LogId, Membership, NodeId};

/// How far a term may be ahead of this node's own.
pub(crate) const TERM_LEAP: u64 = 1 << 20;
/// No term is larger: an election every millisecond takes 146 million years to get there.
pub(crate) const LARGEST_TERM: u64 = 1 << 62;
/// No entry has a larger index: at a million entries a second that takes 146 thousand years.
pub(crate) const LARGEST_INDEX: u64 = 1 << 62;

/// What this node knows for certain, and judges others by.
#[derive(Debug, Clone, Default)]
pub(super) struct Bearings {
    /// The term of its vote.
    pub(super) term: u64,
    /// Whether it holds no entry at all.
    pub(super) is_empty: bool,
    /// Up to where it knows the log to be committed.
    pub(super) committed: Option<LogId>,
    /// The membership in effect and the one before it, each with where it stands. Older ones do not matter: they are
    /// committed.
    pub(super) memberships: Vec<(LogId, Voters)>,
}

/// The sets of voters of a membership.
pub(super) type Voters = Vec<BTreeSet<NodeId>>;

type Checked = Result<(), Malformed>;

fn ensure(holds: bool, otherwise: &'static str) -> Checked {
    match holds {
        true => Ok(()),
        false => Err(Malformed(otherwise)),
    }
}

/// Whether an entry can stand there.
pub(super) fn position(at: LogId) -> Checked {
    ensure(at.term <= LARGEST_TERM && at.index <= LARGEST_INDEX, "no entry has such a position")
}

/// Whether a membership can be in effect.
pub(super) fn membership(membership: &Membership) -> Checked {
    let Membership { voters, members } = membership;
    ensure((1..=2).contains(&voters.len()), "a membership has one set of voters or two")?;
    ensure(voters.iter().all(|set| !set.is_empty()), "a set of voters is empty")?;
    ensure(membership.intents().count() <= Membership::MOST_INTENTS, "it has too many notes")?;
    let known = voters.iter().flatten().all(|voter| members.contains_key(voter));
    ensure(known, "a voter is not among the members")?;
    ensure(!members.contains_key(&0), "node id 0 is no member's")?;
    ensure(members.values().all(|member| member.fits()), "an address is too long")
}

/// Whether the membership with these voters can follow directly on the other: majorities of both share a member.
fn follows(voters: &Voters, before: &Voters) -> bool {
    match (voters.as_slice(), before.as_slice()) {
        (_, []) => true,
        ([one], [other]) => one.symmetric_difference(other).count() <= 1,
        _ => voters.iter().any(|set| before.contains(set)),
    }
}

/// Whether a command can be applied when its turn comes.
pub(super) fn command<M: StateMachine>(bytes: &[u8]) -> Result<(), Unusable> {
    let stamp = envelope::check::<M>(bytes)?;
    let is_possible = match stamp {
        Stamp::LogTime(time_ms) => time_ms <= LARGEST_TIME_MS,
        Stamp::Reading(Reading { wall_ms, term, counted_ms }) => {
            wall_ms <= LARGEST_TIME_MS && counted_ms <= LARGEST_TIME_MS && term <= LARGEST_TERM
        }
    };
    match is_possible {
        true => Ok(()),
        false => {
            let reason = "its leader's clocks were beyond the year 9999".to_owned();
            Err(Unusable { reason, unsupported: None })
        }
    }
}

impl Bearings {
    /// Whether a candidate, or a member that answers, can have got to this term.
    pub(super) fn term(&self, term: u64) -> Checked {
        let largest = self.term.saturating_add(TERM_LEAP).min(LARGEST_TERM);
        ensure(term <= largest, "its term is too far ahead to have come from elections")
    }

    /// Whether a leader can lead this term.
    fn leader_term(&self, term: u64) -> Checked {
        match self.is_empty {
            true => ensure(term <= LARGEST_TERM, "there is no such term"),
            false => self.term(term),
        }
    }

    /// Whether a candidate for `term` can have a log that ends there.
    pub(super) fn candidate(&self, term: u64, last_log: Option<LogId>) -> Checked {
        self.term(term)?;
        let Some(last) = last_log else { return Ok(()) };
        position(last)?;
        ensure(last.term < term, "a candidate has no entry of the term it stands for")
    }

    /// Whether `at` can be in the same log as what is committed here.
    fn agrees(&self, at: LogId) -> Checked {
        position(at)?;
        ensure(
            self.committed.is_none_or(|committed| in_one_log(at, committed)),
            "it contradicts what is committed",
        )
    }

    /// Whether a leader of `term` can have taken a snapshot at `at`, of a log with this membership.
    pub(super) fn snapshot(&self, term: u64, at: LogId) -> Checked {
        self.leader_term(term)?;
        ensure(at.term <= term, "the snapshot is newer than its sender's term")?;
        self.agrees(at)
    }

    /// Whether a leader can have sent this. That its entries follow each other has been checked.
    pub(super) fn append(&self, append: &AppendEntriesRequest<TypeConfig>) -> Checked {
        let term = append.vote.leader_id.term;
        self.leader_term(term)?;
        let committed = self.committed.map(|committed| committed.index);
        // They ascend: what lies between two that agree agrees too, on one side of what is committed and on the other.
        let (first, last) = ends(append);
        let borders = append.entries.iter().map(position_of).filter(|at| Some(at.index) == committed);
        for at in borders.chain(first).chain(last) {
            self.agrees(at)?;
            ensure(at.term <= term, "an entry is newer than its sender's term")?;
        }
        if let Some(commit) = append.leader_commit.as_ref().map(type_config::from_log_id) {
            self.agrees(commit)?;
            ensure(commit.term <= term, "what is said to be committed is newer than its sender's term")?;
            let fits = first.into_iter().chain(last).all(|at| in_one_log(commit, at));
            ensure(fits, "what is said to be committed contradicts the entries")?;
        }
        self.memberships(append)
    }

    /// Whether the memberships in a message follow on those known here.
    fn memberships(&self, append: &AppendEntriesRequest<TypeConfig>) -> Checked {
        let mut newest: Option<Voters> = None;
        for entry in &append.entries {
            let EntryPayload::Membership(change) = &entry.payload else { continue };
            let at = type_config::from_log_id(&entry.log_id);
            let voters = change.get_joint_config().clone();
            // What is committed has been judged before, and is not taken again.
            let is_new = self.committed.is_none_or(|committed| at.index > committed.index);
            let mut before = self.memberships.iter().filter(|(known, _)| known.index < at.index).peekable();
            let fits = match &newest {
                Some(newest) => follows(&voters, newest),
                // The one in effect may be about to be taken back, and then the one before it counts.
                None => before.peek().is_none() || before.any(|(_, known)| follows(&voters, known)),
            };
            ensure(!is_new || fits, "a membership does not follow on the one before it")?;
            newest = Some(voters);
        }
        Ok(())
    }
}

fn position_of(entry: &type_config::Entry) -> LogId {
    type_config::from_log_id(&entry.log_id)
}

/// The first and the last position that `append` names: where it begins may be the end of what is there already.
fn ends(append: &AppendEntriesRequest<TypeConfig>) -> (Option<LogId>, Option<LogId>) {
    let previous = append.prev_log_id.as_ref().map(type_config::from_log_id);
    let first = previous.or_else(|| append.entries.first().map(position_of));
    (first, append.entries.last().map(position_of).or(previous))
}

/// Whether one log can hold entries at both positions.
fn in_one_log(one: LogId, other: LogId) -> bool {
    match one.index.cmp(&other.index) {
        std::cmp::Ordering::Less => one.term <= other.term,
        std::cmp::Ordering::Equal => one.term == other.term,
        std::cmp::Ordering::Greater => one.term >= other.term,
    }
}

#[cfg(test)]
mod tests {
    mod script;

    use super::*;
    use crate::kv::machine::{KvCommand, KvMachine};
    use crate::proto::peer as proto;
    use crate::raft::network::wire;
    use crate::raft::type_config::vote;
    use crate::types::{self, Member, SessionSlot};

    pub(super) const HERE: LogId = LogId::new(5, 50);

    fn bearings() -> Bearings {
        Bearings { term: 6, committed: Some(HERE), ..Bearings::default() }
    }

    fn id(term: u64, index: u64) -> proto::LogId {
        proto::LogId { term, index }
    }

    /// Sent by node 2, which leads `term`.
    pub(super) fn append(
        term: u64,
        previous: Option<(u64, u64)>,
        entries: &[(u64, u64)],
        commit: Option<(u64, u64)>,
    ) -> Result<AppendEntriesRequest<TypeConfig>, Malformed> {
        let entry = |(term, index): &(u64, u64)| proto::Entry { term: *term, index: *index, payload: None };
        let request = proto::AppendRequest {
            vote: Some(proto::Vote { term, node_id: 2, committed: true }),
            previous: previous.map(|(term, index)| id(term, index)),
            entries: entries.iter().map(entry).collect(),
            leader_commit: commit.map(|(term, index)| id(term, index)),
        };
        wire::from_append(2, request)
    }

    #[test]
    fn terms_are_believed_as_far_as_elections_can_have_got() {
        let young = bearings();
        for term in [0, 5, 6, 7, 6 + TERM_LEAP] {
            assert_eq!(young.term(term), Ok(()), "{term}");
        }
        for term in [7 + TERM_LEAP, 1 << 40, LARGEST_TERM, u64::MAX] {
            assert!(young.term(term).is_err() && young.leader_term(term).is_err(), "{term}");
        }
        let joining = Bearings { is_empty: true, ..Bearings::default() };
        assert_eq!(joining.leader_term(1_000_000_000), Ok(()), "a cluster of any age");
        assert!(joining.term(1_000_000_000).is_err(), "a candidate is not followed, it is elected");
        assert!(joining.leader_term(LARGEST_TERM + 1).is_err());
        // However far it was led, there is always a next one.
        let old = Bearings { term: LARGEST_TERM - 1, ..Bearings::default() };
        assert_eq!(old.term(LARGEST_TERM), Ok(()));
        assert!(old.term(LARGEST_TERM + 1).is_err());
    }

    #[test]
    fn a_candidate_has_nothing_of_its_own_term() {
        assert_eq!(bearings().candidate(7, Some(LogId::new(6, 60))), Ok(()));
        assert_eq!(bearings().candidate(7, None), Ok(()));
        assert!(bearings().candidate(7, Some(LogId::new(7, 60))).is_err());
        assert!(bearings().candidate(7, Some(LogId::new(u64::MAX, 60))).is_err());
        assert!(bearings().candidate(7, Some(LogId::new(6, u64::MAX))).is_err());
    }

    #[test]
    fn what_contradicts_the_committed_log_or_itself_is_refused() {
        // Term of the leader, previous, entries, committed.
        type Case<'a> = (u64, Option<(u64, u64)>, &'a [(u64, u64)], Option<(u64, u64)>);
        let possible: [Case<'_>; 9] = [
            (6, Some((5, 50)), &[(5, 51), (6, 52)], Some((5, 50))),
            (6, Some((5, 60)), &[(6, 61)], Some((6, 61))),
            (6, Some((5, 60)), &[(6, 61)], Some((6, 70))),
            (6, Some((3, 10)), &[(4, 11)], Some((5, 50))),
            (6, None, &[(0, 0), (1, 1)], Some((5, 50))),
            (6, None, &[], None),
            (6, None, &[], Some((5, 40))),
            (6, Some((5, 49)), &[(5, 50), (6, 51)], None),
            (5, Some((5, 50)), &[], Some((5, 50))),
        ];
        for (number, (term, previous, entries, commit)) in possible.into_iter().enumerate() {
            let append = append(term, previous, entries, commit).unwrap();
            assert_eq!(bearings().append(&append), Ok(()), "possible case {number}");
        }
        let impossible: [Case<'_>; 15] = [
            (6, Some((6, 50)), &[], None),
            (6, Some((4, 51)), &[], None),
            (6, Some((6, 10)), &[], None),
            (6, Some((5, 49)), &[(6, 50)], None),
            (6, Some((5, 48)), &[(5, 49), (6, 50), (6, 51)], None),
            (6, Some((4, 48)), &[(4, 49), (4, 50)], None),
            (6, Some((7, 60)), &[], None),
            (6, Some((5, u64::MAX)), &[], None),
            (6, None, &[], Some((0, u64::MAX))),
            (6, None, &[], Some((4, 60))),
            (6, None, &[], Some((7, 60))),
            (6, Some((6, 60)), &[], Some((5, 70))),
            (6, Some((5, 60)), &[], Some((6, 55))),
            (6, Some((5, 60)), &[(6, 61)], Some((5, 61))),
            (1 << 40, Some((5, 50)), &[], None),
        ];
        for (number, (term, previous, entries, commit)) in impossible.into_iter().enumerate() {
            let judged =
                append(term, previous, entries, commit).and_then(|append| bearings().append(&append));
            assert!(judged.is_err(), "impossible case {number}");
        }
        // These do not even follow each other.
        for entries in
            [&[(6, 52)][..], &[(6, 51), (6, 53)], &[(6, 51), (5, 52)], &[(7, 51)], &[(6, 51), (6, 51)]]
        {
            assert!(append(6, Some((5, 50)), entries, None).is_err(), "{entries:?}");
        }
        assert!(append(6, Some((5, u64::MAX)), &[(6, 0)], None).is_err());
        assert!(append(6, None, &[(6, 1)], None).is_err());
    }

    #[test]
    fn snapshots_are_as_old_as_their_leader_and_agree_with_what_is_committed() {
        for at in [LogId::new(5, 50), LogId::new(3, 10), LogId::new(6, 51), LogId::new(5, 51)] {
            assert_eq!(bearings().snapshot(6, at), Ok(()), "{at}");
        }
        for at in [LogId::new(6, 50), LogId::new(6, 10), LogId::new(4, 51), LogId::new(7, 60)] {
            assert!(bearings().snapshot(6, at).is_err(), "{at}");
        }
    }

    fn voters(sets: &[&[NodeId]]) -> Voters {
        sets.iter().map(|set| set.iter().copied().collect()).collect()
    }

    #[test]
    fn memberships_go_step_by_step() {
        let of = voters;
        let three = of(&[&[1, 2, 3]]);
        for next in [of(&[&[1, 2, 3]]), of(&[&[1, 2]]), of(&[&[1, 2, 3, 4]]), of(&[&[1, 2, 3], &[7, 8, 9]])] {
            assert!(follows(&next, &three), "{next:?}");
        }
        for next in [of(&[&[1]]), of(&[&[1, 2, 4]]), of(&[&[7, 8, 9]]), of(&[&[1, 2], &[7, 8, 9]])] {
            assert!(!follows(&next, &three), "{next:?}");
        }
        let joint = of(&[&[1, 2, 3], &[1, 2, 4]]);
        assert!(follows(&of(&[&[1, 2, 4]]), &joint) && follows(&of(&[&[1, 2, 3]]), &joint));
        assert!(!follows(&of(&[&[1, 2]]), &joint));
        assert!(follows(&three, &Voters::new()), "nothing is known yet");

        let change = |index: u64, sets: &[&[NodeId]]| {
            let members = sets.iter().copied().flatten().map(|id| (*id, Member::default())).collect();
            let payload = types::Payload::Membership(Membership { voters: voters(sets), members });
            type_config::entry(types::Entry { log_id: LogId::new(6, index), payload }).unwrap()
        };
        let judged = |entries: Vec<type_config::Entry>, known: &[(LogId, Voters)]| {
            let append = AppendEntriesRequest {
                vote: vote(types::Vote { term: 6, node_id: 2, committed: true }),
                prev_log_id: Some(type_config::log_id(LogId::new(5, 60))),
                entries,
                leader_commit: None,
            };
            Bearings { memberships: known.to_vec(), ..bearings() }.append(&append)
        };
        let known = [(LogId::new(5, 55), joint.clone()), (LogId::new(0, 0), three.clone())];
        assert_eq!(judged(vec![change(61, &[&[1, 2, 4]])], &known), Ok(()));
        // The one in effect may be taken back.
        assert_eq!(judged(vec![change(61, &[&[1, 2]])], &known), Ok(()));
        assert!(judged(vec![change(61, &[&[7, 8, 9]])], &known).is_err());
        let chain = vec![change(61, &[&[1, 2, 3], &[7, 8, 9]]), change(62, &[&[7, 8, 9]])];
        assert_eq!(judged(chain, &known), Ok(()));
        assert!(judged(vec![change(61, &[&[1, 2, 4]]), change(62, &[&[8, 9]])], &known).is_err());
        assert_eq!(judged(vec![change(61, &[&[7, 8, 9]])], &[]), Ok(()));
    }

    /// Two messages of one leader may arrive before the core has looked at the first.
    #[test]
    fn a_membership_may_follow_on_one_that_is_still_under_way() {
        let members = |sets: &[&[NodeId]]| {
            let voters = sets.iter().map(|set| proto::VoterSet { node_ids: set.to_vec() }).collect();
            let member = proto::Member { incarnation: "7".to_owned(), ..proto::Member::default() };
            let ids = sets.iter().copied().flatten();
            proto::Membership { voters, members: ids.map(|id| (*id, member.clone())).collect() }
        };
        let sent = |term, index, sets| {
            let payload = Some(proto::entry::Payload::Membership(members(sets)));
            let request = proto::AppendRequest {
                vote: Some(proto::Vote { term, node_id: 2, committed: true }),
                previous: Some(id(term, index - 1)),
                entries: vec![proto::Entry { term, index, payload }],
                leader_commit: None,
            };
            wire::from_append(2, request).unwrap()
        };
        let statements = Statements::default();
        let before = (LogId::new(0, 0), voters(&[&[1, 2, 3]]));
        let judge = |append: &mut AppendEntriesRequest<TypeConfig>| {
            let memberships =
                [before.clone()].into_iter().chain(statements.membership(append.vote)).collect();
            Bearings { memberships, ..bearings() }.append(append)?;
            statements.take(append, Some(HERE), |_| None)
        };
        let mut last = sent(6, 62, &[&[1, 2, 4]]);
        assert!(judge(&mut last).is_err(), "two voters at once");
        assert_eq!(judge(&mut sent(6, 61, &[&[1, 2, 3], &[1, 2, 4]])), Ok(()));
        assert_eq!(judge(&mut last), Ok(()));
        assert!(judge(&mut sent(7, 63, &[&[1, 5, 4]])).is_err(), "of another leader nothing is known");
    }

    #[test]
    fn memberships_make_sense_in_themselves() {
        let with = |sets: &[&[NodeId]], members: &[NodeId]| Membership {
            voters: voters(sets),
            members: members.iter().map(|id| (*id, Member::default())).collect(),
        };
        assert_eq!(membership(&with(&[&[1, 2], &[2, 3]], &[1, 2, 3, 4])), Ok(()));
        for wrong in [
            with(&[], &[1]),
            with(&[&[]], &[1]),
            with(&[&[1], &[]], &[1]),
            with(&[&[1, 2]], &[1]),
            with(&[&[0, 1]], &[0, 1]),
            with(&[&[1], &[1], &[1]], &[1]),
        ] {
            assert!(membership(&wrong).is_err(), "{wrong:?}");
        }
        let mut long = with(&[&[1]], &[1]);
        long.members.insert(2, Member { peer: "x".repeat(10_000), ..Member::default() });
        assert!(membership(&long).is_err());
        let noted = |count: usize| {
            let notes = (0..count as u64).map(|about| (about % 2 + 1, about, types::Intent::Voter));
            with(&[&[1]], &[1, 2]).with_intents(notes)
        };
        assert_eq!(membership(&noted(Membership::MOST_INTENTS)), Ok(()));
        assert!(membership(&noted(Membership::MOST_INTENTS + 1)).is_err());
    }

    #[test]
    fn only_commands_that_can_be_applied_pass() {
        let slot = SessionSlot { session: 1, sequence: 1, first_unanswered: 1 };
        let put = |value: &'static [u8]| KvCommand::Put {
            tenant: "t".to_owned(),
            collection: "c".to_owned(),
            key: "k".into(),
            value: value.into(),
        };
        let at = |wall_ms| Reading { wall_ms, ..Reading::default() };
        for sealed in [KvCommand::Expire, put(b"v")] {
            for slot in [None, Some(slot)] {
                for wall_ms in [0, LARGEST_TIME_MS] {
                    let sealed = envelope::seal::<KvMachine>(at(wall_ms), &sealed, slot).unwrap();
                    assert_eq!(command::<KvMachine>(&sealed), Ok(()));
                }
                let whole = envelope::seal::<KvMachine>(at(0), &sealed, slot).unwrap();
                for length in 0..whole.len() {
                    assert!(command::<KvMachine>(&whole[..length]).is_err(), "{length} bytes");
                }
                assert!(
                    command::<KvMachine>(&envelope::seal::<KvMachine>(at(u64::MAX), &sealed, slot).unwrap())
                        .is_err()
                );
            }
        }
        assert_eq!(command::<KvMachine>(&envelope::seal_close_session(at(0), 1)), Ok(()));
        assert!(command::<KvMachine>(&envelope::seal_close_session(at(u64::MAX), 1)).is_err());
    }
}
