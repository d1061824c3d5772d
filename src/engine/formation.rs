//! How a cluster comes into being, once.
//!
//! Every founder waits until it has spoken to every other one and knows which data directory each of
//! them holds. Only then does it write the founding membership, incarnations included, as the first entry
//! of its log; all founders write the same. From then on a member that comes back with another data
//! directory is recognised by all of them, whatever else has been lost.
//!
//! A founder that is told by a peer that the cluster already knows it with another directory stops: its
//! disk was wiped, and with it the log and vote it had promised to keep.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::machine::StateMachine;
use crate::raft::core::Core;
use crate::raft::network::client::Caller;
use crate::raft::network::wire;
use crate::raft::network::{DialError, IdentifyRequest, Refusal, Transport};
use crate::types::{Member, NodeId};

/// Pause between two rounds of calls.
const PAUSE: Duration = Duration::from_millis(50);
/// How long one call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Rounds between two messages about who is missing: every five seconds or so.
const ROUNDS_PER_MESSAGE: u32 = 100;

/// A founder's part in forming its cluster.
pub(super) struct Formation<M: StateMachine> {
    pub(super) core: Core<M>,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) caller: Caller,
    /// This node as a member.
    pub(super) own: Member,
    /// All founders with their peer addresses.
    pub(super) founders: BTreeMap<NodeId, String>,
}

impl<M: StateMachine> Formation<M> {
    /// Returns once this node belongs to a cluster.
    pub(super) async fn run(self) {
        let mut members = BTreeMap::from([(self.caller.node_id, self.own.clone())]);
        let mut round = 0;
        while !self.core.is_initialized().await {
            for (node_id, address) in &self.founders {
                if members.contains_key(node_id) {
                    continue;
                }
                match self.identify(*node_id, address).await {
                    Ok(member) => {
                        tracing::info!(node = node_id, %address, "met a founding member");
                        members.insert(*node_id, member);
                    }
                    Err(error) if round % ROUNDS_PER_MESSAGE == ROUNDS_PER_MESSAGE - 1 => {
                        tracing::info!(node = node_id, %address, %error, "waiting for a founding member");
                    }
                    Err(_) => {}
                }
            }
            if members.len() == self.founders.len() {
                match self.core.initialize(members.clone()).await {
                    Ok(()) => tracing::info!(members = members.len(), "the cluster has formed"),
                    Err(error) => tracing::error!(%error, "the cluster cannot form"),
                }
                return;
            }
            round += 1;
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn identify(&self, node_id: NodeId, address: &str) -> Result<Member, DialError> {
        let request = IdentifyRequest {
            hello: Some(self.caller.hello(node_id, None)),
            founders: self.founders.clone().into_iter().collect(),
        };
        let call = self.transport.identify(address.to_owned(), request);
        let response = tokio::time::timeout(CALL_TIMEOUT, call)
            .await
            .unwrap_or_else(|_| Err(DialError::Unreachable(format!("no answer within {CALL_TIMEOUT:?}"))))
            .inspect_err(|error| {
                if let DialError::Refused(refusal) = error {
                    tracing::warn!(node = node_id, %address, %refusal, "a founding member refused this node");
                    if let Refusal::CallerFenced { known, .. } = refusal {
                        (self.caller.fenced)(*known);
                    }
                }
            })?;
        let malformed = |error: wire::Malformed| DialError::Refused(Refusal::Malformed(error.to_string()));
        Ok(Member {
            peer: response.peer_address,
            client: response.client_address,
            incarnation: wire::incarnation(&response.incarnation).map_err(malformed)?,
        })
    }
}
