//! Who a node is that is to be a member: what it says itself, at the address that was given.

use std::time::Duration;

use super::{NewMember, PAUSE};
use crate::address::Address;
use crate::engine::{Engine, check_node_id};
use crate::error::MembershipError;
use crate::machine::StateMachine;
use crate::raft::network::{DialError, IdentifyRequest, wire};
use crate::types::{Member, NodeId, check_agreed};

/// How long a node to be added may take to say who it is.
const IDENTIFY_PATIENCE: Duration = Duration::from_secs(3);

impl<M: StateMachine> Engine<M> {
    /// Refuses addresses of a member at which it does not answer, or which are not what it advertises.
    pub(in crate::engine) async fn check_advertised(
        &self,
        node_id: NodeId,
        member: &Member,
    ) -> Result<(), MembershipError> {
        let metrics = self.inner.core.metrics();
        let alone = metrics.membership.members.keys().all(|id| *id == self.inner.config.node_id);
        let found = match alone && node_id == self.inner.config.node_id {
            // Nobody else is to reach it yet, and the next member is told the address only when it is added.
            true => self.inner.own.clone(),
            false => self.ask(&NewMember { node_id, peer: member.peer.clone() }).await?,
        };
        if found.incarnation != member.incarnation {
            return Err(MembershipError::AlreadyMember {
                node_id,
                known: member.incarnation,
                presented: found.incarnation,
                peer: member.peer.clone(),
            });
        }
        // An embedded node may serve no clients; then it does not mind.
        let same_client = found.client == member.client || found.client.is_empty();
        match found.peer == member.peer && same_client {
            true => Ok(()),
            false => Err(MembershipError::Advertises { node_id, peer: found.peer, client: found.client }),
        }
    }

    /// Asks the node at an address who it is, and at the address that it advertises whether it is there, too: that is the
    /// one that the members are told.
    pub(super) async fn identify_reached(&self, new: &NewMember) -> Result<Member, MembershipError> {
        let node_id = new.node_id;
        let found = self.identify(new).await?;
        if found.peer == new.peer {
            return Ok(found);
        }
        let (address, advertised) = (new.peer.clone(), found.peer.clone());
        let there = self.ask(&NewMember { node_id, peer: advertised.clone() }).await;
        let reason = match there {
            Ok(there) if there.incarnation == found.incarnation => return Ok(found),
            Ok(there) => format!("a node with another data directory answers there, {}", there.incarnation),
            Err(MembershipError::Unreachable { reason, .. }) => reason,
            Err(MembershipError::Address { .. }) => {
                "it is no address that others could connect to".to_owned()
            }
            Err(MembershipError::Identity { detail, .. }) => detail,
            Err(error) => return Err(error),
        };
        Err(MembershipError::AdvertisedUnreachable { node_id, address, advertised, reason })
    }

    /// Asks the node at an address who it is; another one than this.
    async fn identify(&self, new: &NewMember) -> Result<Member, MembershipError> {
        let (node_id, address) = (new.node_id, new.peer.clone());
        if node_id == self.inner.config.node_id {
            let detail = "this is the leader's own id".to_owned();
            return Err(MembershipError::Identity { node_id, address, detail });
        }
        self.ask(new).await
    }

    /// Asks the node at an address who it is. Of this node that tells whether its address leads here.
    async fn ask(&self, new: &NewMember) -> Result<Member, MembershipError> {
        let (node_id, address) = (new.node_id, new.peer.clone());
        check_address(&address)?;
        let refused =
            |detail: String| Err(MembershipError::Identity { node_id, address: address.clone(), detail });
        let handshake = &self.inner.handshake;
        let hello =
            Some(handshake.towards(node_id, (node_id == handshake.node_id).then_some(handshake.incarnation)));
        let request = IdentifyRequest { hello, ..IdentifyRequest::default() };
        let mut failed = format!("no answer within {} s", IDENTIFY_PATIENCE.as_secs());
        let asking = async {
            loop {
                match self.inner.transport.identify(address.clone(), request.clone()).await {
                    // It may have been started a moment ago.
                    Err(DialError::Unreachable(reason)) => failed = reason,
                    answer => return answer,
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        let answer = tokio::time::timeout(IDENTIFY_PATIENCE, asking).await;
        let answer = answer.unwrap_or(Err(DialError::Unreachable(failed)));
        let answer = match answer {
            Ok(answer) => answer,
            Err(DialError::Refused(refusal)) => return refused(refusal.to_string()),
            Err(DialError::Unreachable(reason)) => {
                return Err(MembershipError::Unreachable { node_id, address, reason });
            }
        };
        let reads = wire::from_readable_versions(&answer.machines);
        let agreed = self.agreed_versions();
        if let Err(unsupported) = agreed.iter().try_for_each(|agreed| check_agreed(*agreed, &reads)) {
            // It would stop at the first entry that it cannot read, and a member that it replaces would be gone.
            let wrote = unsupported.wrote;
            return refused(format!(
                "its build does not read {wrote}, on which the members have agreed: start it with theirs"
            ));
        }
        match wire::incarnation(&answer.incarnation) {
            Ok(incarnation) if answer.node_id == node_id => {
                let (peer, client) = (answer.peer_address, answer.client_address);
                let found = Member { peer, client, incarnation, ..Member::default() };
                match found.fits() {
                    true => Ok(found),
                    false => refused(format!(
                        "it advertises an address of more than {} bytes",
                        Member::MAX_ADDRESS_BYTES
                    )),
                }
            }
            Ok(_) => refused(format!("it is node {}; check the id and the address", answer.node_id)),
            Err(error) => refused(error.to_string()),
        }
    }
}

/// Refuses what can be no member's id.
pub(super) fn check_number(node_id: NodeId) -> Result<(), MembershipError> {
    check_node_id(node_id).map_err(|detail| MembershipError::NodeId { detail })
}

pub(in crate::engine) fn check_address(address: &str) -> Result<(), MembershipError> {
    let parsed = Address::parse(address)
        .filter(|parsed| parsed.port != 0 && !parsed.is_unspecified() && parsed.check_host().is_ok());
    match parsed {
        Some(_) if address.len() <= Member::MAX_ADDRESS_BYTES => Ok(()),
        _ => Err(MembershipError::Address { address: address.to_owned() }),
    }
}
