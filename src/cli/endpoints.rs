//! All nodes of a cluster, for the commands that are about each of them: those that were given, and members and replicas that those tell of.

use std::collections::BTreeSet;

use futures::future::join_all;

use crate::kv::client::{Client, ClientError, Endpoint, NodeReport};
use crate::types::NodeId;

/// A node that was asked, and what it tells of itself.
pub(super) type AskedNode = (Endpoint, Result<NodeReport, ClientError>);

/// What a node is to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum NodeKind {
    /// It belongs to the cluster.
    Member,
    /// It follows the cluster, all of it.
    Replica,
    /// It follows a part.
    PartialReplica,
}

impl NodeKind {
    pub(super) fn of(report: &NodeReport) -> Self {
        match &report.replica {
            None => Self::Member,
            Some(replica) if replica.partial => Self::PartialReplica,
            Some(_) => Self::Replica,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Member => "member",
            Self::Replica => "replica",
            Self::PartialReplica => "partial replica",
        }
    }
}

/// Asks the members that those who have answered tell of, and were not asked; with `replicas`, also the replicas.
pub(super) async fn ask_others(client: &Client, answers: &[AskedNode], replicas: bool) -> Vec<AskedNode> {
    let reports = || answers.iter().filter_map(|(_, answer)| answer.as_ref().ok());
    let known: BTreeSet<NodeId> = reports().map(|report| report.node_id).collect();
    let members = reports().flat_map(|report| &report.members);
    let members =
        members.filter(|member| !known.contains(&member.node_id)).map(|member| member.client.as_str());
    let told = reports().flat_map(|report| &report.replicas).filter(|_| replicas);
    let others: BTreeSet<Endpoint> = members
        .chain(told.map(|replica| replica.client.as_str()))
        .filter_map(|address| Endpoint::parse(address).ok())
        .filter(|endpoint| answers.iter().all(|(asked, _)| asked != endpoint))
        .collect();
    let ask = |endpoint: Endpoint| async move {
        let status = client.status(&endpoint).await;
        (endpoint, status)
    };
    join_all(others.into_iter().map(ask)).await
}

/// Asks the given endpoints, and then the members and replicas that they tell of.
pub(super) async fn ask_all(client: &Client) -> Vec<AskedNode> {
    let mut answers = client.status_all().await;
    for _ in 0..2 {
        // A member that only another one has told of may have replicas of its own.
        let others = ask_others(client, &answers, true).await;
        answers.extend(others);
    }
    answers
}

/// Those that answer, each once, whatever it is called.
pub(super) fn each_once(answers: Vec<AskedNode>) -> Vec<(Endpoint, NodeReport)> {
    let mut seen = BTreeSet::new();
    let answered = answers.into_iter().filter_map(|(endpoint, answer)| Some((endpoint, answer.ok()?)));
    answered.filter(|(_, report)| report.node_id == 0 || seen.insert(report.node_id)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::parse;

    #[test]
    fn the_commands_that_are_about_every_node_can_be_said() {
        let is_one = |line: &str| parse(std::iter::once("quorate").chain(line.split(' '))).is_ok();
        for line in [
            "health --all",
            "load-test --callers 8 --seconds 1 --max-errors 3 --max-p99 50ms",
            "replication-test --writes 10 --rate 0 -o json",
            "config-test",
            "config-test --config quorate.toml",
            "watch --all",
            "watch --prefix a --prefix b --kind put",
            "replica --data-dir d --advertise 10.0.0.9:7811",
        ] {
            assert!(is_one(line), "{line}");
        }
        for line in [
            "load-test --seconds 0",
            "load-test --reads 2",
            "replication-test --writes 0",
            "watch a --kind get",
            "replica --data-dir d --advertise nowhere",
        ] {
            assert!(!is_one(line), "{line}");
        }
    }
}
