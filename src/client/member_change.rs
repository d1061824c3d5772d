//! Changes of the membership, as a client asks for them.

use std::time::Duration;

use tonic::{Request, Response, Status};

use super::token::NodeChannel;
use crate::proto::v1::{self, admin_client::AdminClient};
use crate::types::NodeId;

/// A change of the membership.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemberChange {
    /// Adds a node that was started to join, as a learner or, with `promote`, as a voter.
    Add {
        /// Its id.
        node_id: NodeId,
        /// `host:port` of its peer port.
        peer: String,
        /// Whether to make it a voter.
        promote: bool,
        /// How long it may take to catch up before that.
        catch_up: Duration,
    },
    /// Makes a learner a voter.
    Promote {
        /// Which.
        node_id: NodeId,
        /// How long it may take to catch up before that.
        catch_up: Duration,
    },
    /// Makes a voter a learner.
    Demote {
        /// Which.
        node_id: NodeId,
        /// Although too few voters that answer would be left.
        force: bool,
    },
    /// Removes a member.
    Remove {
        /// Which.
        node_id: NodeId,
        /// Although too few voters that answer would be left.
        force: bool,
    },
    /// Puts a node in the place of another one, or of itself with another data directory.
    Replace {
        /// Who goes.
        node_id: NodeId,
        /// Who comes.
        new_node_id: NodeId,
        /// `host:port` of the new one's peer port.
        peer: String,
        /// How long it may take to catch up.
        catch_up: Duration,
    },
    /// Corrects addresses; what is `None` stays.
    Update {
        /// Whose.
        node_id: NodeId,
        /// `host:port` of its peer port.
        peer: Option<String>,
        /// `host:port` of its client port.
        client: Option<String>,
    },
}

/// `message`, to be answered within `left`.
fn within<T>(left: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(left);
    request
}

/// Asks for `change`.
///
/// # Errors
/// What the node answers instead, or the transport.
pub(super) async fn send(
    mut admin: AdminClient<NodeChannel>,
    change: MemberChange,
    left: Duration,
) -> Result<Response<v1::MemberChangeResponse>, Status> {
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    match change {
        MemberChange::Add { node_id, peer, promote, catch_up } => {
            let timeout_ms = ms(catch_up);
            admin.add_member(within(left, v1::AddMemberRequest { node_id, peer, promote, timeout_ms })).await
        }
        MemberChange::Promote { node_id, catch_up } => {
            admin
                .promote_member(within(left, v1::PromoteMemberRequest { node_id, timeout_ms: ms(catch_up) }))
                .await
        }
        MemberChange::Demote { node_id, force } => {
            admin.demote_member(within(left, v1::DemoteMemberRequest { node_id, force })).await
        }
        MemberChange::Remove { node_id, force } => {
            admin.remove_member(within(left, v1::RemoveMemberRequest { node_id, force })).await
        }
        MemberChange::Replace { node_id, new_node_id, peer, catch_up } => {
            let timeout_ms = ms(catch_up);
            admin
                .replace_member(within(
                    left,
                    v1::ReplaceMemberRequest { node_id, new_node_id, peer, timeout_ms },
                ))
                .await
        }
        MemberChange::Update { node_id, peer, client } => {
            let (peer, client) = (peer.unwrap_or_default(), client.unwrap_or_default());
            admin.update_member(within(left, v1::UpdateMemberRequest { node_id, peer, client })).await
        }
    }
}
