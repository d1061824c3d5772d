//! What a cluster shows from outside: who leads, and what every node holds.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use quorate::Offsets;
use quorate::ReadLevel;
use quorate::kv::client::{Client, ClientError, Endpoint, NodeReport, Range, Request, Response, Scope};

use super::set::{Item, Reading};

/// Pause between two looks at the cluster.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The status of the node that leads the highest term, or `None` if no node leads within `deadline`.
/// `newer_than` excludes leaders of that term and earlier ones.
pub async fn leader(client: &Client, newer_than: u64, deadline: Duration) -> Option<NodeReport> {
    let end = Instant::now() + deadline;
    loop {
        let answers = client.status_all().await;
        let leading = answers.into_iter().filter_map(|(_, answer)| answer.ok());
        let leading = leading.filter(|status| status.leads() && status.term > newer_than);
        match leading.max_by_key(|status| status.term) {
            Some(leader) => return Some(leader),
            None if Instant::now() >= end => return None,
            None => tokio::time::sleep(POLL_INTERVAL).await,
        }
    }
}

/// What every node holds, once all have applied the same entry.
///
/// # Errors
/// Says which node is behind or cannot be read, if that is so until `deadline`.
pub async fn converged(client: &Client, deadline: Duration) -> Result<Vec<Reading>, String> {
    let end = Instant::now() + deadline;
    loop {
        let why = match positions(client).await {
            Ok(before) => {
                let readings = read_all(client, &before).await;
                // What was read belongs to one position only if the node stood still meanwhile.
                match (readings, positions(client).await) {
                    (Ok(readings), Ok(after)) if stood_still(&before, &after) => return Ok(readings),
                    (Ok(_), Ok(_)) => "the nodes go on applying entries".to_owned(),
                    (Err(why), _) | (_, Err(why)) => why,
                }
            }
            Err(why) => why,
        };
        if Instant::now() >= end {
            return Err(why);
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// The status of all nodes, if they have applied the same entry.
async fn positions(client: &Client) -> Result<Vec<(Endpoint, NodeReport)>, String> {
    let answers = client.status_all().await;
    let nodes: Vec<(Endpoint, NodeReport)> = answers
        .into_iter()
        .map(|(endpoint, answer)| match answer {
            Ok(report) => Ok((endpoint, report)),
            Err(error) => Err(format!("{endpoint}: {error}")),
        })
        .collect::<Result<_, _>>()?;
    // Equal positions mean little while a node may hold more than it has applied.
    let offsets = || nodes.iter().map(|(_, report)| report.offsets);
    let settled = |of: Offsets| of.applied.is_some_and(|applied| Some(applied.index) == of.last_log);
    let first = offsets().next().and_then(|of| of.applied);
    if offsets().all(|of| settled(of) && of.applied == first) {
        return Ok(nodes);
    }
    let applied: Vec<_> = nodes
        .iter()
        .map(|(_, NodeReport { node_id, offsets, .. })| {
            let applied = offsets.applied.map_or("nothing".to_owned(), |position| position.to_string());
            format!("node {node_id} has applied {applied}, last log entry {:?}", offsets.last_log)
        })
        .collect();
    Err(applied.join("; "))
}

fn stood_still(before: &[(Endpoint, NodeReport)], after: &[(Endpoint, NodeReport)]) -> bool {
    let applied = |nodes: &[(Endpoint, NodeReport)]| -> Vec<_> {
        nodes.iter().map(|(_, report)| report.offsets.applied).collect()
    };
    applied(before) == applied(after)
}

async fn read_all(client: &Client, nodes: &[(Endpoint, NodeReport)]) -> Result<Vec<Reading>, String> {
    let mut readings = Vec::new();
    for (endpoint, status) in nodes {
        let items = read(client, endpoint).await;
        readings.push(Reading {
            node_id: status.node_id,
            applied: status.offsets.applied.map_or(0, |position| position.index),
            state_hash: status.state_hash.unwrap_or_default(),
            items: items.map_err(|error| format!("{endpoint}: {error}"))?,
        });
    }
    Ok(readings)
}

/// Everything that one node has applied, asked of that node alone.
pub async fn read(client: &Client, endpoint: &Endpoint) -> Result<BTreeMap<String, Item>, ClientError> {
    let mut items = BTreeMap::new();
    let mut range = Range::default();
    loop {
        let (scope, level) = (Scope::default(), ReadLevel::Local);
        let request = Request::Range { scope, range: range.clone() };
        let Response::Range(reply) = client.execute_at(endpoint, request, level).await? else {
            unreachable!("invariant: a response answers its request")
        };
        for item in reply.items {
            let key = String::from_utf8_lossy(&item.key).into_owned();
            let value = String::from_utf8_lossy(&item.value).into_owned();
            items.insert(key, Item { value, index: item.mod_revision, writes: item.version });
        }
        match reply.next {
            Some(next) => range.start = next,
            None => return Ok(items),
        }
    }
}
