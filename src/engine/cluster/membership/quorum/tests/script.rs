//! Which voters may be lost, in scripts: `tests/golden/scripts/quorum`. The leader's log has 5000 entries.

use goldenscript::{Context, Runner};

use super::*;
use crate::golden::{Told, scripts};

#[derive(goldenscript::Command)]
enum Step {
    /// These nodes vote, answer, have the whole log, and their disks are well. Node 1 leads.
    Voters(BTreeSet<NodeId>),
    /// A change is half made: these are to vote.
    Joint(BTreeSet<NodeId>),
    Silent(NodeId),
    /// A node lacks so many entries.
    Behind {
        node_id: NodeId,
        #[arg(key)]
        entries: u64,
    },
    /// The disk of a node is full or hangs.
    Unwell(NodeId),
    /// A voter is to be removed or demoted.
    Lose(NodeId),
    /// A learner that answers and has the whole log is to vote.
    Gain(NodeId),
}

#[derive(Default)]
struct Cluster {
    sets: Vec<BTreeSet<NodeId>>,
    /// The last entry that each node has that answers.
    has: BTreeMap<NodeId, u64>,
    unwell: BTreeSet<NodeId>,
}

impl Cluster {
    fn check(&self, after: &BTreeSet<NodeId>, asked: Strength) -> Result<(), MembershipError> {
        let sets: Vec<Vec<NodeId>> = self.sets.iter().map(|set| set.iter().copied().collect()).collect();
        let sets: Vec<&[NodeId]> = sets.iter().map(Vec::as_slice).collect();
        let has: Vec<_> = self.has.iter().map(|(node_id, index)| (*node_id, *index)).collect();
        let disks = self.has.keys().map(|node_id| (*node_id, !self.unwell.contains(node_id))).collect();
        check_quorum(&leader(&sets, &has), &disks, after, asked)
    }

    /// The voters in effect; of a half made change, those that are to be.
    fn voters(&self) -> BTreeSet<NodeId> {
        self.sets.last().cloned().unwrap_or_default()
    }
}

impl Runner for Cluster {
    type Command = Step;

    fn run(&mut self, step: &Step, _: &Context) -> Told {
        let mut after = self.voters();
        match step {
            Step::Voters(voters) => {
                let has = voters.iter().map(|node_id| (*node_id, 4_999)).collect();
                *self = Self { sets: vec![voters.clone()], has, unwell: BTreeSet::new() };
            }
            Step::Joint(voters) => {
                self.has.extend(voters.iter().map(|node_id| (*node_id, 4_999)));
                self.sets.push(voters.clone());
            }
            Step::Silent(node_id) => drop(self.has.remove(node_id)),
            Step::Behind { node_id, entries } => drop(self.has.insert(*node_id, 4_999 - entries)),
            Step::Unwell(node_id) => drop(self.unwell.insert(*node_id)),
            Step::Lose(node_id) => {
                after.remove(node_id);
                return Ok(match self.check(&after, Strength::IsWell) {
                    Ok(()) => "enough are left".to_owned(),
                    Err(error) => match self.check(&after, Strength::Answers) {
                        Ok(()) => format!("by force only: {error}"),
                        Err(_) => format!("refused: {error}"),
                    },
                });
            }
            Step::Gain(node_id) => {
                // Or it would not be made one.
                self.has.insert(*node_id, 4_999);
                after.insert(*node_id);
                return Ok(match self.check(&after, Strength::Answers) {
                    Ok(()) => "enough answer".to_owned(),
                    Err(error) => format!("refused: {error}"),
                });
            }
        }
        Ok(String::new())
    }
}

#[test]
fn scripts_of_quorums() {
    scripts("quorum", Cluster::default);
}
