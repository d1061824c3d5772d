//! What a peer may say, in scripts: `tests/golden/scripts/messages`. Node 2 sends; positions are written as `term:index`.

use std::collections::BTreeMap;
use std::num::ParseIntError;
use std::str::FromStr;

use goldenscript::{Context, Runner};

use super::*;
use crate::golden::{Told, scripts};

#[derive(goldenscript::Command)]
enum Step {
    /// What the node knows for certain: the term of its vote, and up to where its log is committed. Without a position it holds no
    /// entry at all. What a leader has said before counts no more.
    Here {
        #[arg(key)]
        term: u64,
        #[arg(key)]
        committed: Option<At>,
    },
    /// The membership in effect, and where it stands: the voters of each of its sets.
    Voters { at: At, sets: Vec<Set> },
    /// A candidate asks for a vote.
    Vote {
        #[arg(key)]
        term: u64,
        /// The end of its log.
        #[arg(key)]
        last: Option<At>,
    },
    /// A leader sends entries.
    Append {
        #[arg(key)]
        term: u64,
        /// The entry that they follow on.
        #[arg(key)]
        after: Option<At>,
        /// What it says to be committed.
        #[arg(key)]
        committed: Option<At>,
        #[arg(optional)]
        entries: Vec<At>,
    },
    /// A leader sends a membership with these sets of voters, as one entry.
    Change {
        #[arg(key)]
        term: u64,
        at: At,
        sets: Vec<Set>,
    },
    /// A leader sends a snapshot.
    Snapshot {
        #[arg(key)]
        term: u64,
        at: At,
    },
}

#[derive(Debug, Clone, Copy)]
struct At(LogId);

impl FromStr for At {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (term, index) = text.split_once(':').ok_or("write term:index")?;
        let number = |digits: &str| digits.parse().map_err(|error: ParseIntError| error.to_string());
        Ok(Self(LogId::new(number(term)?, number(index)?)))
    }
}

/// Voters, with spaces between them.
struct Set(BTreeSet<NodeId>);

impl FromStr for Set {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        text.split_whitespace().map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

#[derive(Default)]
struct Node {
    bearings: Bearings,
    statements: Statements,
    /// Of the last leader, whose entries are in this node's log.
    entries: BTreeMap<u64, u64>,
}

fn told(checked: Checked) -> String {
    match checked {
        Ok(()) => "goes on to the core".to_owned(),
        Err(error) => format!("refused: {error}"),
    }
}

fn voters_of(sets: &[Set]) -> Voters {
    sets.iter().map(|set| set.0.clone()).collect()
}

impl Node {
    /// As `PeerService` does.
    fn append(
        &mut self,
        term: u64,
        after: Option<At>,
        committed: Option<At>,
        entries: Vec<proto::Entry>,
    ) -> String {
        let on_wire = |at: At| id(at.0.term, at.0.index);
        let request = proto::AppendRequest {
            vote: Some(proto::Vote { term, node_id: 2, committed: true }),
            previous: after.map(on_wire),
            entries,
            leader_commit: committed.map(on_wire),
        };
        let said = request.leader_commit.is_some();
        let mut append = match wire::from_append(2, request) {
            Ok(append) => append,
            Err(error) => return told(Err(error)),
        };
        let memberships = self.bearings.memberships.iter().cloned();
        let memberships = memberships.chain(self.statements.membership(append.vote)).collect();
        let bearings = Bearings { memberships, ..self.bearings.clone() };
        let entries = &self.entries;
        let checked = bearings.append(&append).and_then(|()| {
            self.statements.take(&mut append, bearings.committed, |index| entries.get(&index).copied())
        });
        if checked.is_ok() {
            let sent = append.entries.iter().map(position_of).map(|at| (at.index, at.term));
            self.entries.extend(sent);
        }
        match checked {
            Ok(()) if said && append.leader_commit.is_none() => {
                "goes on to the core, without what is said to be committed".to_owned()
            }
            checked => told(checked),
        }
    }
}

impl Runner for Node {
    type Command = Step;

    fn run(&mut self, step: &Step, _: &Context) -> Told {
        let bearings = &mut self.bearings;
        Ok(match step {
            Step::Here { term, committed } => {
                let committed = committed.map(|at| at.0);
                let bearings =
                    Bearings { term: *term, is_empty: committed.is_none(), committed, ..Bearings::default() };
                *self = Self { bearings, ..Self::default() };
                String::new()
            }
            Step::Voters { at, sets } => {
                bearings.memberships.push((at.0, voters_of(sets)));
                String::new()
            }
            Step::Vote { term, last } => told(bearings.candidate(*term, last.map(|at| at.0))),
            Step::Append { term, after, committed, entries } => {
                let entry = |at: &At| proto::Entry { term: at.0.term, index: at.0.index, payload: None };
                self.append(*term, *after, *committed, entries.iter().map(entry).collect())
            }
            Step::Change { term, at, sets } => {
                let voters =
                    sets.iter().map(|set| proto::VoterSet { node_ids: set.0.iter().copied().collect() });
                let ids = sets.iter().flat_map(|set| set.0.iter().copied());
                let member = proto::Member { incarnation: "7".to_owned(), ..proto::Member::default() };
                let membership = proto::Membership {
                    voters: voters.collect(),
                    members: ids.map(|id| (id, member.clone())).collect(),
                };
                let payload = Some(proto::entry::Payload::Membership(membership));
                let before = At(LogId::new(*term, at.0.index - 1));
                let entry = proto::Entry { term: at.0.term, index: at.0.index, payload };
                self.append(*term, Some(before), None, vec![entry])
            }
            Step::Snapshot { term, at } => told(bearings.snapshot(*term, at.0)),
        })
    }
}

#[test]
fn scripts_of_messages() {
    scripts("messages", Node::default);
}
