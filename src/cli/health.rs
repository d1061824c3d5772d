//! `quorate health`.

use std::time::Duration;

use clap::Args;
use futures::future::join_all;
use serde::Serialize;
use tokio::time::Instant;

use super::{CliError, Common, Format, output};
use crate::client::{Client, ClientError, Endpoint, NodeStatus};
use crate::types::NodeId;

/// Arguments of `quorate health`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate health\n  quorate health -o json | jq '.[] | select(.ready | not) | .endpoint'\n  until quorate health --timeout 1s; do sleep 1; done\n\nAsks the given endpoints. Exits with 0 when every one of them answers and is ready, and one leads; with 2 when none answers; else with 1. LATENCY is the second of two round trips: the first one connects."
)]
pub struct HealthArgs {}

/// One node, as shown.
#[derive(Debug, Serialize)]
struct Row {
    endpoint: String,
    reachable: bool,
    /// Null when it does not answer.
    ready: Option<bool>,
    node_id: Option<NodeId>,
    role: Option<String>,
    latency_us: Option<u64>,
    error: Option<String>,
}

/// Lists the nodes' health.
///
/// # Errors
/// After the list: [`CliError::NoNodeAnswers`], or [`CliError::Unhealthy`] when not all is well.
pub async fn run(common: &Common, _: HealthArgs) -> Result<(), CliError> {
    let client = common.client()?;
    let rows = join_all(common.endpoints.iter().map(|endpoint| ask(&client, endpoint))).await;
    match common.output {
        Format::Json => output::json(&rows)?,
        Format::Table => {
            let cells: Vec<_> = rows.iter().map(cells).collect();
            let headings = ["ENDPOINT", "REACHABLE", "READY", "NODE", "ROLE", "LATENCY"];
            output::raw(output::table(&headings, &cells).as_bytes())?;
            for row in &rows {
                if let Some(error) = &row.error {
                    output::remark(&format!("{}: {error}", row.endpoint));
                }
            }
        }
    }
    verdict(&rows)
}

async fn ask(client: &Client, endpoint: &Endpoint) -> Row {
    // The first question connects.
    let _ = client.status(endpoint).await;
    let asked = Instant::now();
    let answer = client.status(endpoint).await;
    row(endpoint, asked.elapsed(), &answer)
}

fn row(endpoint: &Endpoint, latency: Duration, answer: &Result<NodeStatus, ClientError>) -> Row {
    let endpoint = endpoint.to_string();
    match answer {
        Ok(status) => Row {
            endpoint,
            reachable: true,
            ready: Some(status.ready),
            node_id: Some(status.node_id),
            role: Some(status.role.clone()),
            latency_us: u64::try_from(latency.as_micros()).ok(),
            error: (!status.fatal.is_empty()).then(|| status.fatal.clone()),
        },
        Err(error) => {
            let why = match error {
                ClientError::Unavailable { tried } => tried.iter().map(|(_, why)| why.clone()).next(),
                _ => None,
            };
            let error = Some(why.unwrap_or_else(|| error.to_string()));
            Row {
                endpoint,
                reachable: false,
                ready: None,
                node_id: None,
                role: None,
                latency_us: None,
                error,
            }
        }
    }
}

fn cells(row: &Row) -> Vec<String> {
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    vec![
        row.endpoint.clone(),
        yes(row.reachable),
        row.ready.map_or_else(|| "-".to_owned(), yes),
        or_dash(row.node_id.map(|node_id| node_id.to_string())),
        or_dash(row.role.clone()),
        or_dash(row.latency_us.map(|us| format!("{:.1} ms", us as f64 / 1000.0))),
    ]
}

fn verdict(rows: &[Row]) -> Result<(), CliError> {
    let unhealthy = rows.iter().filter(|row| row.ready != Some(true)).count();
    let leader = rows.iter().any(|row| row.role.as_deref() == Some("leader"));
    match unhealthy {
        _ if rows.iter().all(|row| !row.reachable) => Err(CliError::NoNodeAnswers),
        0 if leader => Ok(()),
        _ => Err(CliError::Unhealthy { nodes: rows.len(), unhealthy, leader }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(reachable: bool, ready: bool, role: &str) -> Row {
        let role = reachable.then(|| role.to_owned());
        let endpoint = "n:1".to_owned();
        Row {
            endpoint,
            reachable,
            ready: reachable.then_some(ready),
            node_id: None,
            role,
            latency_us: None,
            error: None,
        }
    }

    #[test]
    fn all_is_well_only_when_everybody_is_ready_and_somebody_leads() {
        let code = |rows: &[Row]| verdict(rows).map_or_else(|error| error.exit_code(), |()| 0);
        assert_eq!(code(&[node(true, true, "leader"), node(true, true, "follower")]), 0);
        assert_eq!(code(&[node(true, true, "follower"), node(true, true, "follower")]), 1);
        assert_eq!(code(&[node(true, true, "leader"), node(true, false, "follower")]), 1);
        assert_eq!(code(&[node(true, true, "leader"), node(false, false, "")]), 1);
        assert_eq!(code(&[node(false, false, ""), node(false, false, "")]), 2);
    }
}
