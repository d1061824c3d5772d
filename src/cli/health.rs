//! `quorate health`.

use std::time::Duration;

use clap::Args;
use futures::future::join_all;
use serde::Serialize;
use tokio::time::Instant;

use super::endpoints::{self, NodeKind};
use super::{CliError, Common, Format, output, status};
use crate::kv::client::{Client, ClientError, Endpoint, NodeReport};
use crate::report::millis;
use crate::types::{DiskState, DiskStatus, NodeId, Role};

/// Arguments of `quorate health`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate health\n  quorate health -o json | jq '.[] | select(.ready | not) | .endpoint'\n  quorate health --all                    members and replicas that were not given, too\n  until quorate health --timeout 1s; do sleep 1; done\n\nAsks the given endpoints, which may be those of replicas. Exits with 0 when every one of them answers and is ready, and a leader is known; with 2 when none answers; else with 1. LATENCY is the second of two round trips: the first one connects."
)]
pub struct HealthArgs {
    /// Ask also the members and replicas that were not given as endpoints
    #[arg(long)]
    pub all: bool,
}

/// One node, as shown.
#[derive(Debug, Serialize)]
struct HealthRow {
    endpoint: String,
    reachable: bool,
    /// Null when it does not answer.
    ready: Option<bool>,
    node_id: Option<NodeId>,
    role: Option<Role>,
    /// What it is to the cluster.
    kind: Option<NodeKind>,
    /// How much older the state of a replica is than that of the node that it follows.
    lag_ms: Option<f64>,
    /// Who leads, as the node says.
    leader: Option<NodeId>,
    latency_us: Option<u64>,
    error: Option<String>,
}

/// Lists the nodes' health.
///
/// # Errors
/// After the list: [`CliError::NoNodeAnswers`], or [`CliError::Unhealthy`] when not all is well.
pub async fn run(common: &Common, args: HealthArgs) -> Result<(), CliError> {
    let client = common.client()?;
    let asked = match args.all {
        false => common.endpoints.clone(),
        true => endpoints::ask_all(&client).await.into_iter().map(|(endpoint, _)| endpoint).collect(),
    };
    let rows = join_all(asked.iter().map(|endpoint| ask(&client, endpoint))).await;
    let printed = match common.output {
        Format::Json => output::json(&rows),
        Format::Table => {
            let cells: Vec<_> = rows.iter().map(cells).collect();
            let printed = output::raw(output::table(&HEADINGS, &cells).as_bytes());
            for row in &rows {
                if let Some(error) = &row.error {
                    output::remark(&format!("{}: {error}", row.endpoint));
                }
            }
            printed
        }
    };
    // What is wrong is told by the exit code, whether or not the list can be printed.
    verdict(&rows).and(printed)
}

async fn ask(client: &Client, endpoint: &Endpoint) -> HealthRow {
    let deadline = client.deadline();
    let left = || deadline.saturating_duration_since(Instant::now());
    // The first question connects.
    let asked = Instant::now();
    let first = client.status_within(endpoint, left()).await;
    let connected = asked.elapsed();
    if first.is_err() {
        return row(endpoint, connected, &first);
    }
    let asked = Instant::now();
    match client.status_within(endpoint, left()).await {
        // There was no time left for it.
        Err(_) if left().is_zero() => row(endpoint, connected, &first),
        second => row(endpoint, asked.elapsed(), &second),
    }
}

fn row(endpoint: &Endpoint, latency: Duration, answer: &Result<NodeReport, ClientError>) -> HealthRow {
    let endpoint = endpoint.to_string();
    match answer {
        Ok(status) => HealthRow {
            endpoint,
            reachable: true,
            ready: Some(status.healthy()),
            node_id: Some(status.node_id).filter(|node_id| *node_id != 0),
            role: status.role,
            kind: Some(NodeKind::of(status)),
            lag_ms: status.replica.as_ref().and_then(|replica| replica.lag).map(millis),
            leader: status.leader.as_ref().map(|leader| leader.node_id),
            latency_us: u64::try_from(latency.as_micros()).ok(),
            error: status.fatal.clone().or_else(|| disk(status)),
        },
        Err(error) => {
            let answers = matches!(error, ClientError::Failed { .. });
            HealthRow {
                endpoint,
                reachable: answers,
                ready: answers.then_some(false),
                node_id: None,
                role: None,
                kind: None,
                lag_ms: None,
                leader: None,
                latency_us: None,
                error: Some(status::why(error)),
            }
        }
    }
}

/// What keeps a node's disk from taking writes.
fn disk(status: &NodeReport) -> Option<String> {
    let disk = status.disk.as_ref().filter(|disk| !disk.state.takes_writes())?;
    Some(format!("it takes no writes: {}", disk_in_words(disk)))
}

/// What a disk is like that takes no writes, and how much room it has and should have.
pub(super) fn disk_in_words(disk: &DiskStatus) -> String {
    let size = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    match (disk.state, disk.available_bytes, disk.reserve_bytes, disk.needed_bytes) {
        (DiskState::Full, Some(available), Some(reserve), Some(needed)) => format!(
            "its disk is full: {} are free and {} are set aside for the log, and {} are needed together",
            size(available),
            size(reserve),
            size(needed)
        ),
        (DiskState::Stalled, ..) => "its disk hangs: a write has been under way for too long".to_owned(),
        (state, ..) => format!("its disk is {state}"),
    }
}

const HEADINGS: [&str; 6] = ["ENDPOINT", "REACHABLE", "READY", "NODE", "ROLE", "LATENCY"];

fn cells(row: &HealthRow) -> Vec<String> {
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    vec![
        row.endpoint.clone(),
        yes(row.reachable),
        row.ready.map_or_else(|| "-".to_owned(), yes),
        or_dash(row.node_id.map(|node_id| node_id.to_string())),
        or_dash(match row.kind {
            Some(kind @ (NodeKind::Replica | NodeKind::PartialReplica)) => Some(kind.name().to_owned()),
            Some(NodeKind::Member) | None => row.role.map(|role| role.to_string()),
        }),
        or_dash(row.latency_us.map(|us| format!("{:.1} ms", us as f64 / 1000.0))),
    ]
}

fn verdict(rows: &[HealthRow]) -> Result<(), CliError> {
    let silent = rows.iter().filter(|row| !row.reachable).count();
    let unready = rows.iter().filter(|row| row.reachable && row.ready != Some(true)).count();
    let leads = |row: &HealthRow| row.role == Some(Role::Leader);
    // A node that is ready is in touch with the leader that it names, whether that one was asked or not.
    let leader = rows.iter().any(|row| leads(row) || (row.ready == Some(true) && row.leader.is_some()));
    match silent + unready {
        _ if silent == rows.len() => Err(CliError::NoNodeAnswers),
        0 if leader => Ok(()),
        _ => Err(CliError::Unhealthy { nodes: rows.len(), unready, silent, leader }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::golden;
    use crate::kv::client::ClientConfig;
    use crate::kv::client::tests::fake::{Fake, leader, told};
    use crate::reason::Reason;

    fn node(reachable: bool, ready: bool, role: Role) -> HealthRow {
        let role = reachable.then_some(role);
        let endpoint = "n:1".to_owned();
        HealthRow {
            endpoint,
            reachable,
            ready: reachable.then_some(ready),
            node_id: None,
            role,
            kind: None,
            lag_ms: None,
            leader: None,
            latency_us: None,
            error: None,
        }
    }

    #[test]
    fn what_is_not_well_is_said_in_words_and_has_its_reason() {
        let verdict = |rows: &[HealthRow]| verdict(rows).map_err(|error| (error.to_string(), error.reason()));
        let follower = || HealthRow { leader: Some(7), ..node(true, true, Role::Follower) };
        assert_eq!(verdict(&[follower()]), Ok(()), "the leader need not be among those that are asked");
        let of = |text: &str, reason| Err((text.to_owned(), reason));
        let lone = HealthRow { leader: None, ..follower() };
        assert_eq!(verdict(&[lone]), of("no leader is known", Reason::NoQuorum));
        let unready = || node(true, false, Role::Follower);
        assert_eq!(verdict(&[follower(), unready()]), of("1 of 2 nodes is not ready", Reason::Behind));
        let silent = || node(false, false, Role::Follower);
        assert_eq!(verdict(&[follower(), silent()]), of("1 of 2 nodes does not answer", Reason::Unspecified));
        assert_eq!(
            verdict(&[follower(), silent(), silent(), unready(), unready()]),
            of("2 of 5 nodes do not answer, and 2 of 5 nodes are not ready", Reason::Unspecified)
        );
        assert_eq!(
            verdict(&[unready(), silent()]),
            of(
                "1 of 2 nodes does not answer, and 1 of 2 nodes is not ready, and no leader is known",
                Reason::NoQuorum
            )
        );
    }

    #[test]
    fn a_full_disk_is_told_with_what_it_has_and_what_it_needs() {
        let mut disk = DiskStatus { state: DiskState::Full, ..DiskStatus::default() };
        assert_eq!(disk_in_words(&disk), "its disk is full", "of an earlier version");
        (disk.available_bytes, disk.reserve_bytes, disk.needed_bytes) =
            (Some(2_400_256), Some(38_801_081), Some(58_195_968));
        assert_eq!(
            disk_in_words(&disk),
            "its disk is full: 2.3 MiB are free and 37.0 MiB are set aside for the log, and 55.5 MiB are needed together"
        );
    }

    #[tokio::test]
    async fn what_nodes_tell_is_shown_as_ever() {
        let (mut rows, endpoint) = (Vec::new(), Endpoint::parse("n1:1").unwrap());
        for status in told() {
            let node = Fake::start(leader);
            node.set_status(status);
            let client = Client::new([node.endpoint()], ClientConfig::default()).unwrap();
            let asked = Endpoint::parse(&node.endpoint()).unwrap();
            rows.push(row(&endpoint, Duration::from_micros(1500), &client.status(&asked).await));
        }
        let cells: Vec<_> = rows.iter().map(cells).collect();
        let json = serde_json::to_string_pretty(&rows).unwrap();
        let table = output::table(&HEADINGS, &cells);
        golden("cli-health.txt", &format!("{table}{json}\n{:?}\n", verdict(&rows)));
    }

    /// One that is being opened answers, and says how far it is.
    #[test]
    fn a_node_that_cannot_say_its_status_yet_is_not_unreachable() {
        let endpoint = Endpoint::parse("n1:1").unwrap();
        let (reason, message) = (Reason::Stopped, "recovering".to_owned());
        let refused =
            ClientError::Failed { endpoint: endpoint.clone(), reason, message, maybe_applied: false };
        let row = row(&endpoint, Duration::ZERO, &Err(refused));
        assert_eq!((row.reachable, row.ready, row.error.as_deref()), (true, Some(false), Some("recovering")));
        assert_eq!(verdict(&[row]).unwrap_err().exit_code(), 1);
    }

    #[test]
    fn all_is_well_only_when_everybody_is_ready_and_somebody_leads() {
        let code = |rows: &[HealthRow]| verdict(rows).map_or_else(|error| error.exit_code(), |()| 0);
        assert_eq!(code(&[node(true, true, Role::Leader), node(true, true, Role::Follower)]), 0);
        assert_eq!(code(&[node(true, true, Role::Follower), node(true, true, Role::Follower)]), 1);
        assert_eq!(code(&[node(true, true, Role::Leader), node(true, false, Role::Follower)]), 1);
        assert_eq!(code(&[node(true, true, Role::Leader), node(false, false, Role::Follower)]), 1);
        assert_eq!(code(&[node(false, false, Role::Follower), node(false, false, Role::Follower)]), 2);
    }
}
