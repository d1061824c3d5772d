//! `quorate status`.

use clap::Args;
use serde::Serialize;

use super::endpoints::AskedNode;
use super::{CliError, Common, Format, endpoints, output};
use crate::kv::client::{ClientError, Endpoint, NodeReport, Reason, ReplicaReport};
use crate::types::{NodeId, QuotaSource, Role};

/// Arguments of `quorate status`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate status\n  quorate status --endpoints 10.0.0.1:7801 --members\n  quorate status -o json | jq '.[] | select(.role == \"leader\") | .endpoint'\n\nA node that does not answer is listed as unreachable. Exits with 2 when none answers."
)]
pub struct StatusArgs {
    /// Ask also the members that were not given as endpoints
    #[arg(long)]
    pub members: bool,
}

/// One node, as shown. Everything but the endpoint is null when it does not answer, or cannot say it yet.
#[derive(Debug, Default, Serialize)]
struct StatusRow {
    node_id: Option<NodeId>,
    endpoint: String,
    /// Of a replica this says what it is, and not as what it counts among members.
    role: Option<&'static str>,
    term: Option<u64>,
    leader: Option<NodeId>,
    last_log: Option<u64>,
    committed: Option<u64>,
    committed_term: Option<u64>,
    applied: Option<u64>,
    applied_term: Option<u64>,
    state_hash: Option<String>,
    state_bytes: Option<u64>,
    state_quota_bytes: Option<u64>,
    state_quota_set: Option<bool>,
    /// What was applied from this position on can be followed and watched.
    feed_first_position: Option<u64>,
    /// Whether the event log cannot be written.
    event_log_failing: Option<bool>,
    /// What is to be known of a replica, which is no member.
    replica: Option<ReplicaRow>,
    reachable: bool,
    /// How its state differs from the others', for which it serves nothing.
    diverged: Option<String>,
    /// Why it has stopped by itself, or does not tell its status.
    error: Option<String>,
}

/// How a replica stands to what it follows.
#[derive(Debug, Serialize)]
struct ReplicaRow {
    id: String,
    /// Whether it has a part of the state only.
    partial: bool,
    /// Null while it has none.
    source: Option<String>,
    state: String,
    position: Option<u64>,
    lag_operations: u64,
    lag_ms: Option<u64>,
}

impl ReplicaRow {
    fn of(replica: &ReplicaReport, position: Option<u64>) -> Self {
        Self {
            id: replica.id.clone(),
            partial: replica.partial,
            source: Some(replica.source.clone()).filter(|source| !source.is_empty()),
            state: replica.state.clone(),
            position,
            lag_operations: replica.lag_entries,
            lag_ms: replica.lag.map(|lag| u64::try_from(lag.as_millis()).unwrap_or(u64::MAX)),
        }
    }
}

/// Lists the nodes.
///
/// # Errors
/// [`CliError::NoNodeAnswers`], after the list, when no node answers; others see [`CliError`].
pub async fn run(common: &Common, args: StatusArgs) -> Result<(), CliError> {
    let client = common.client()?;
    let mut answers = client.status_all().await;
    if args.members {
        let others = endpoints::ask_others(&client, &answers, false).await;
        answers.extend(others);
    }
    let rows: Vec<StatusRow> = answers.iter().map(|(endpoint, answer)| row(endpoint, answer)).collect();
    let printed = match common.output {
        Format::Json => output::json(&rows),
        Format::Table => {
            let printed = output::raw(tables(&rows).as_bytes());
            for row in &rows {
                if let Some(error) = &row.error {
                    output::remark(&format!("{}: {error}", row.endpoint));
                }
                if let Some(diverged) = &row.diverged {
                    output::remark(&format!("{}: diverged: {diverged}", row.endpoint));
                }
                if row.event_log_failing == Some(true) {
                    output::remark(&format!("{}: its event log cannot be written", row.endpoint));
                }
            }
            printed
        }
    };
    if let Some(refused) = refused(&answers) {
        return Err(refused.into());
    }
    if rows.iter().any(|row| row.reachable) { printed } else { Err(CliError::NoNodeAnswers) }
}

/// Why this caller is told nothing, if no node tells it anything.
fn refused(answers: &[AskedNode]) -> Option<ClientError> {
    let is_refusal =
        |error: &ClientError| matches!(error.reason(), Reason::Unauthenticated | Reason::PermissionDenied);
    let refusals = answers.iter().filter_map(|(_, answer)| answer.as_ref().err());
    let refused = refusals.into_iter().find(|error| is_refusal(error)).cloned();
    refused.filter(|_| answers.iter().all(|(_, answer)| answer.is_err()))
}

fn row(endpoint: &Endpoint, answer: &Result<NodeReport, ClientError>) -> StatusRow {
    let endpoint = endpoint.to_string();
    match answer {
        Ok(status) => StatusRow {
            // A replica has none: it is no member.
            node_id: status.replica.is_none().then_some(status.node_id),
            endpoint,
            role: match &status.replica {
                Some(_) => Some(REPLICA),
                None => status.role.map(Role::name),
            },
            // Of a node that has never met its cluster nothing is known yet.
            term: Some(status.term).filter(|term| *term > 0),
            leader: status.leader.as_ref().map(|leader| leader.node_id),
            last_log: status.offsets.last_log,
            committed: status.offsets.committed.map(|position| position.index),
            committed_term: status.offsets.committed.map(|position| position.term),
            applied: status.offsets.applied.map(|position| position.index),
            applied_term: status.offsets.applied.map(|position| position.term),
            state_hash: status
                .state_hash
                .filter(|_| status.offsets.applied.is_some())
                .map(|hash| format!("{hash:016x}")),
            state_bytes: status.state.bytes,
            state_quota_bytes: status.state.quota_bytes,
            state_quota_set: status.state.quota_source.map(|source| source == QuotaSource::Operator),
            feed_first_position: status.feed.map(|feed| feed.first_position),
            event_log_failing: status.feed.map(|feed| feed.event_log_failing),
            replica: status
                .replica
                .as_ref()
                .map(|replica| ReplicaRow::of(replica, status.offsets.applied.map(|at| at.index))),
            reachable: true,
            diverged: status.diverged.clone(),
            error: status.fatal.clone(),
        },
        Err(error) => StatusRow {
            endpoint,
            reachable: matches!(error, ClientError::Failed { .. }),
            error: Some(why(error)),
            ..StatusRow::default()
        },
    }
}

/// Why the one node that was asked has not told its status.
pub(super) fn why(error: &ClientError) -> String {
    match error {
        ClientError::Unavailable { tried } if !tried.is_empty() => tried[0].1.clone(),
        ClientError::Failed { message, .. } => message.clone(),
        error => error.to_string(),
    }
}

/// What a replica is called in the place of a role.
const REPLICA: &str = "replica";

/// The nodes, and below them how the replicas among them stand to what they follow.
fn tables(rows: &[StatusRow]) -> String {
    let nodes: Vec<_> = rows.iter().map(cells).collect();
    let replicas: Vec<_> = rows
        .iter()
        .filter_map(|row| row.replica.as_ref().map(|replica| replica_cells(&row.endpoint, replica)))
        .collect();
    let mut tables = output::table(&HEADINGS, &nodes);
    if !replicas.is_empty() {
        tables.push('\n');
        tables.push_str(&output::table(&REPLICA_HEADINGS, &replicas));
    }
    tables
}

const REPLICA_HEADINGS: [&str; 8] =
    ["REPLICA", "ENDPOINT", "OF", "SOURCE", "STATE", "POSITION", "BEHIND", "BEHIND MS"];

fn replica_cells(endpoint: &str, replica: &ReplicaRow) -> Vec<String> {
    let dash = || "-".to_owned();
    let number = |number: Option<u64>| number.map_or_else(dash, |number| number.to_string());
    let named = |text: &str| if text.is_empty() { dash() } else { output::printable(text.as_bytes()) };
    vec![
        named(&replica.id),
        endpoint.to_owned(),
        if replica.partial { "a part" } else { "all" }.to_owned(),
        named(replica.source.as_deref().unwrap_or_default()),
        named(&replica.state),
        number(replica.position),
        replica.lag_operations.to_string(),
        number(replica.lag_ms),
    ]
}

const HEADINGS: [&str; 12] = [
    "NODE",
    "ENDPOINT",
    "ROLE",
    "TERM",
    "LEADER",
    "LAST LOG",
    "COMMITTED",
    "APPLIED",
    "STATE HASH",
    "STATE BYTES",
    "QUOTA",
    "FEED FROM",
];

fn cells(row: &StatusRow) -> Vec<String> {
    let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let role = match (row.role, &row.diverged) {
        (Some(role), Some(_)) => format!("{role}, diverged"),
        (Some(role), None) => role.to_string(),
        // Of a newer version.
        (None, _) if row.node_id.is_some() => "-".to_owned(),
        (None, _) if row.reachable => "not open".to_owned(),
        (None, _) => "unreachable".to_owned(),
    };
    vec![
        number(row.node_id),
        row.endpoint.clone(),
        role,
        number(row.term),
        number(row.leader),
        number(row.last_log),
        number(row.committed),
        number(row.applied),
        row.state_hash.clone().unwrap_or_else(|| "-".to_owned()),
        number(row.state_bytes),
        number(row.state_quota_bytes),
        number(row.feed_first_position),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::golden;
    use crate::kv::client::tests::fake::{Fake, leader, told};
    use crate::kv::client::{Client, ClientConfig};
    use crate::proto::v1;
    use crate::reason::Reason;

    #[test]
    fn an_unreachable_node_has_every_field_and_they_are_null() {
        let endpoint = Endpoint::parse("n1:1").unwrap();
        let why = ClientError::Unavailable { tried: vec![(endpoint.clone(), "refused".to_owned())] };
        let json = serde_json::to_value(row(&endpoint, &Err(why))).unwrap();
        let expected = serde_json::json!({
            "node_id": null, "endpoint": "n1:1", "role": null, "term": null, "leader": null, "last_log": null,
            "committed": null, "committed_term": null, "applied": null, "applied_term": null, "state_hash": null,
            "state_bytes": null, "state_quota_bytes": null, "state_quota_set": null, "feed_first_position": null,
            "event_log_failing": null, "replica": null,
            "reachable": false, "diverged": null, "error": "refused",
        });
        assert_eq!(json, expected);
        let (reason, message) = (Reason::Stopped, "recovering".to_owned());
        let refused =
            ClientError::Failed { endpoint: endpoint.clone(), reason, message, maybe_applied: false };
        let opening = row(&endpoint, &Err(refused));
        assert_eq!((opening.reachable, opening.error.as_deref()), (true, Some("recovering")));
        assert_eq!(cells(&opening)[2], "not open");
    }

    #[tokio::test]
    async fn what_nodes_tell_is_shown_as_ever() {
        let (mut rows, endpoint) = (Vec::new(), Endpoint::parse("n1:1").unwrap());
        for status in told() {
            let node = Fake::start(leader);
            node.set_status(status);
            let client = Client::new([node.endpoint()], ClientConfig::default()).unwrap();
            let asked = Endpoint::parse(&node.endpoint()).unwrap();
            rows.push(row(&endpoint, &client.status(&asked).await));
        }
        let json = serde_json::to_string_pretty(&rows).unwrap();
        golden("cli-status.txt", &format!("{}{json}\n", tables(&rows)));
    }

    #[tokio::test]
    async fn what_a_node_that_waits_for_its_cluster_does_not_know_is_null() {
        let node = Fake::start(leader);
        let waiting = v1::StatusResponse {
            node_id: 4,
            role: "learner".to_owned(),
            state_hash: Some(0),
            ..Default::default()
        };
        node.set_status(waiting);
        let endpoint = Endpoint::parse(&node.endpoint()).unwrap();
        let client = Client::new([node.endpoint()], ClientConfig::default()).unwrap();
        let row = serde_json::to_value(row(&endpoint, &client.status(&endpoint).await)).unwrap();
        for unknown in ["term", "leader", "state_hash", "committed", "applied", "last_log"] {
            assert!(row[unknown].is_null(), "{unknown}: {row}");
        }
        assert_eq!(row["node_id"], 4);
    }

    #[test]
    fn a_node_whose_state_differs_is_told_by_its_role() {
        let role = Some(Role::Follower.name());
        let well = StatusRow { role, ..StatusRow::default() };
        let diverged = StatusRow { role, diverged: Some("differs".to_owned()), ..StatusRow::default() };
        assert_eq!((&*cells(&well)[2], &*cells(&diverged)[2]), ("follower", "follower, diverged"));
    }

    /// Among members it would count as a learner, which it is not.
    #[test]
    fn a_replica_is_shown_as_what_it_is() {
        let replica = ReplicaReport {
            id: "r".to_owned(),
            source: "n1:1".to_owned(),
            state: "Synced".to_owned(),
            lag_entries: 3,
            lag: Some(std::time::Duration::from_millis(40)),
            ..ReplicaReport::default()
        };
        let mut report =
            NodeReport { role: Some(Role::Learner), replica: Some(replica), ..NodeReport::default() };
        report.offsets.applied = Some(crate::types::LogId::new(2, 70));
        let row = row(&Endpoint::parse("r1:1").unwrap(), &Ok(report));
        let json = serde_json::to_value(&row).unwrap();
        let expected = serde_json::json!({
            "id": "r", "partial": false, "source": "n1:1", "state": "Synced", "position": 70,
            "lag_operations": 3, "lag_ms": 40,
        });
        assert_eq!((&json["role"], &json["replica"]), (&serde_json::json!("replica"), &expected));
        assert!(json["node_id"].is_null(), "it is no member");
        assert_eq!(cells(&row)[2], "replica");
        let shown = tables(&[row]);
        let last: Vec<_> = shown.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(last, ["r", "r1:1", "all", "n1:1", "Synced", "70", "3", "40"]);
    }
}
