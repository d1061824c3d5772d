//! Changes that are cut in two, in scripts: `tests/golden/scripts/half-made`. Each command shows the membership after the first entry
//! of a change; `settle` is what the next leader makes of it. Node 1 leads, and proposes.

use std::fmt::Write as _;

use goldenscript::{Context, Runner};

use super::*;
use crate::golden::{Told, scripts};

#[derive(goldenscript::Command)]
enum Step {
    /// Nodes 1 to 3 vote, node 4 does not.
    Begin,
    Add {
        node_id: NodeId,
        /// What it is to be in another one's place: `voter` or `learner`.
        #[arg(key)]
        to_be: Option<String>,
    },
    Promote(NodeId),
    Demote(NodeId),
    Remove {
        node_id: NodeId,
        /// What is to come in its place under the same id.
        #[arg(key)]
        to_be: Option<String>,
    },
    Swap {
        #[arg(key)]
        old: NodeId,
        #[arg(key)]
        new: NodeId,
    },
    /// Another leader ends what it has found.
    Settle,
}

fn intent(to_be: Option<&String>) -> Option<Intent> {
    Some(match to_be?.as_str() {
        "voter" => Intent::Voter,
        "learner" => Intent::Learner,
        other => panic!("nobody is to be {other}"),
    })
}

struct Found(Membership);

impl Found {
    fn in_words(&self) -> String {
        let Self(membership) = self;
        let sets: Vec<_> = membership.voters.iter().map(|set| format!("{set:?}")).collect();
        let learners: Vec<_> = membership.members.keys().filter(|id| !membership.is_voter(**id)).collect();
        let mut told = format!("voters {}", sets.join(" and "));
        if !learners.is_empty() {
            let _ = write!(told, ", learners {learners:?}");
        }
        for (holder, about, intent) in membership.intents() {
            let to_be = match intent {
                Intent::Voter => "vote",
                Intent::Learner => "be a learner",
            };
            let _ = write!(told, ", note on the record of {holder}: {about} is to {to_be}");
        }
        told
    }
}

impl Runner for Found {
    type Command = Step;

    fn run(&mut self, step: &Step, _: &Context) -> Told {
        let change = match step {
            Step::Begin => {
                self.0 = four();
                return Ok(self.in_words());
            }
            Step::Add { node_id, to_be } => {
                let member = Member { peer: format!("n{node_id}:1"), ..Member::default() };
                MembershipChange::AddLearner { node_id: *node_id, member, intent: intent(to_be.as_ref()) }
            }
            Step::Promote(node_id) => MembershipChange::Promote(*node_id),
            Step::Demote(node_id) => MembershipChange::Demote(*node_id),
            Step::Remove { node_id, to_be } => {
                MembershipChange::Remove { node_id: *node_id, intent: intent(to_be.as_ref()) }
            }
            Step::Swap { old, new } => MembershipChange::Swap { old: *old, new: *new },
            Step::Settle => MembershipChange::Settle,
        };
        self.0 = first_entry(&self.0, change);
        Ok(self.in_words())
    }
}

#[test]
fn scripts_of_half_made_changes() {
    scripts("half-made", || Found(four()));
}
