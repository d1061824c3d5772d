//! What a cluster shows from outside: who leads, and what every node holds.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use quorate::ReadLevel;
use quorate::kv::client::{Client, ClientError, Endpoint, NodeStatus, Range, Request, Response, Scope};

use crate::set::{Item, Reading};

/// Pause between two looks at the cluster.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The status of the node that leads the highest term, or `None` if no node leads within `deadline`.
/// `newer_than` excludes leaders of that term and earlier ones.
pub(crate) async fn leader(client: &Client, newer_than: u64, deadline: Duration) -> Option<NodeStatus> {
    let end = Instant::now() + deadline;
    loop {
        let answers = client.status_all().await;
        let leading = answers.into_iter().filter_map(|(_, answer)| answer.ok());
        let leading = leading.filter(|status| status.role == "leader" && status.term > newer_than);
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
pub(crate) async fn converged(client: &Client, deadline: Duration) -> Result<Vec<Reading>, String> {
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
async fn positions(client: &Client) -> Result<Vec<NodeStatus>, String> {
    let answers = client.status_all().await;
    let nodes: Vec<NodeStatus> = answers
        .into_iter()
        .map(|(endpoint, answer)| answer.map_err(|error| format!("{endpoint}: {error}")))
        .collect::<Result<_, _>>()?;
    // Equal positions mean little while a node may hold more than it has applied.
    let settled = |status: &NodeStatus| status.applied.map(|applied| applied.index) == status.last_log;
    let equal = nodes.windows(2).all(|pair| pair[0].applied == pair[1].applied);
    if equal && nodes.iter().all(|status| settled(status) && status.applied.is_some()) {
        return Ok(nodes);
    }
    let applied: Vec<_> = nodes
        .iter()
        .map(|status| {
            let applied = status.applied.map_or("nothing".to_owned(), |position| position.to_string());
            format!("node {} has applied {applied}, last log entry {:?}", status.node_id, status.last_log)
        })
        .collect();
    Err(applied.join("; "))
}

fn stood_still(before: &[NodeStatus], after: &[NodeStatus]) -> bool {
    before.len() == after.len() && before.iter().zip(after).all(|(a, b)| a.applied == b.applied)
}

async fn read_all(client: &Client, nodes: &[NodeStatus]) -> Result<Vec<Reading>, String> {
    let mut readings = Vec::new();
    for status in nodes {
        let items = read(client, &status.endpoint).await;
        readings.push(Reading {
            node_id: status.node_id,
            applied: status.applied.map_or(0, |position| position.index),
            state_hash: status.state_hash.unwrap_or_default(),
            items: items.map_err(|error| format!("{}: {error}", status.endpoint))?,
        });
    }
    Ok(readings)
}

/// Everything that one node has applied, asked of that node alone.
pub(crate) async fn read(
    client: &Client,
    endpoint: &Endpoint,
) -> Result<BTreeMap<String, Item>, ClientError> {
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
