//! Who is let in, in scripts: `tests/golden/scripts/handshake`. Node 1 of the cluster "c" is called; its directory is 10.

use goldenscript::{Context, Runner};

use super::*;
use crate::golden::{Told, scripts};

/// Directories are named by hexadecimal digits.
#[derive(goldenscript::Command)]
enum Step {
    /// What node 1 knows of its cluster: a membership at an index of term 1, and each member's directory. It is committed.
    Members {
        #[arg(key)]
        at: u64,
        members: BTreeMap<NodeId, String>,
    },
    /// A newer one, which may be taken back yet.
    Uncommitted {
        #[arg(key)]
        at: u64,
        members: BTreeMap<NodeId, String>,
    },
    /// What every stranger is told.
    Stranger,
    /// A node calls.
    Hello {
        from: NodeId,
        #[arg(key)]
        directory: String,
        /// The directory that it expects to meet.
        #[arg(key)]
        expects: Option<String>,
        /// To `identify` node 1, or to `found` a cluster with it, and not to exchange messages.
        #[arg(key)]
        wish: Option<String>,
        /// The index, in term 1, of the membership in which it knows itself.
        #[arg(key)]
        membership: Option<u64>,
        #[arg(key)]
        cluster: Option<String>,
        /// The node that it expects to meet.
        #[arg(key)]
        to: Option<NodeId>,
        #[arg(key)]
        version: Option<u32>,
    },
}

#[derive(Default)]
struct Callee {
    /// In effect, and the newest that is committed.
    known: [Option<(u64, BTreeMap<NodeId, Incarnation>)>; 2],
}

fn directory(digits: &str) -> Incarnation {
    Incarnation(u128::from_str_radix(digits, 16).expect("hexadecimal digits"))
}

/// For a refusal that may end the caller: where the membership stands that says so, if it is committed.
fn standing(refusal: &Refusal) -> String {
    match refusal {
        Refusal::CallerFenced { at: Some(at), .. } | Refusal::UnknownPeer { at: Some(at), .. } => {
            format!(" (by the committed membership {at})")
        }
        _ => String::new(),
    }
}

impl Callee {
    fn known_of(&self, caller: NodeId) -> KnownCluster {
        let at = |known: &Option<(u64, _)>| known.as_ref().map(|(at, _)| LogId::new(1, *at));
        let [in_effect, committed] = &self.known;
        KnownCluster {
            members: in_effect.as_ref().map(|(_, members)| members.clone()).unwrap_or_default(),
            at: at(in_effect),
            committed_caller: committed.as_ref().and_then(|(_, members)| members.get(&caller).copied()),
            committed_at: at(committed),
        }
    }

    fn answer(&self, hello: &Hello, wish: Wish) -> String {
        let Err(refused) = check(OWN, &self.known_of(hello.from_node), hello, wish) else {
            return "admitted".to_owned();
        };
        let CallerRefused { told, why, claim } = *refused;
        let mut answer = match told {
            Refusal::Stranger => "refused as a stranger".to_owned(),
            _ => format!("refused{}: {told}", standing(&told)),
        };
        if why != told {
            answer += &format!("\nnode 1 logs{}: {why}", standing(&why));
        }
        if let Some(Claim { node_id, incarnation, peer, expected }) = claim {
            answer += &format!(
                "\nnode 1 asks at {peer}: are you node {node_id} in directory {:x}, and was I in {:x}?",
                incarnation.0, expected.0
            );
        }
        answer
    }
}

impl Runner for Callee {
    type Command = Step;

    fn run(&mut self, step: &Step, _: &Context) -> Told {
        let with_directories = |members: &BTreeMap<NodeId, String>| {
            members.iter().map(|(node_id, digits)| (*node_id, directory(digits))).collect()
        };
        match step {
            Step::Members { at, members } => {
                let known = Some((*at, with_directories(members)));
                self.known = [known.clone(), known];
                Ok(String::new())
            }
            Step::Uncommitted { at, members } => {
                self.known[0] = Some((*at, with_directories(members)));
                Ok(String::new())
            }
            Step::Stranger => Ok(Refusal::Stranger.to_string()),
            Step::Hello { from, directory: own, expects, wish, membership, cluster, to, version } => {
                let wish = match wish.as_deref() {
                    None => Wish::Exchange,
                    Some("identify") => Wish::Identity,
                    Some("found") => Wish::Founding,
                    Some(other) => return Err(format!("nobody wishes to {other}").into()),
                };
                let hello = Hello {
                    protocol_version: version.unwrap_or(PROTOCOL_VERSION),
                    cluster: cluster.clone().unwrap_or_else(|| OWN.cluster.to_owned()),
                    from_node: *from,
                    from_incarnation: directory(own).to_string(),
                    to_node: to.unwrap_or(OWN.node_id),
                    to_incarnation: expects
                        .as_deref()
                        .map(|to| directory(to).to_string())
                        .unwrap_or_default(),
                    membership: membership.map(|at| wire::plain_log_id(LogId::new(1, at))),
                    from_peer: format!("n{from}:1"),
                };
                Ok(self.answer(&hello, wish))
            }
        }
    }
}

#[test]
fn scripts_of_handshakes() {
    scripts("handshake", Callee::default);
}
