//! What is known of a write whose acknowledgement is missing.

use bytes::Bytes;

use super::NodeId;

/// What came of a write that is committed and applied, and that not every voter has confirmed in time. It is encoded, because an error
/// does not know the machine: [`Engine::unconfirmed`](crate::Engine::unconfirmed) decodes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UnconfirmedReply {
    /// The machine that replied, by its number in the composition.
    pub(crate) machine: u16,
    /// What it replied.
    pub(crate) reply: Bytes,
    /// The members known to hold the entry on disk.
    pub(crate) held_by: Vec<NodeId>,
    /// Whether an earlier attempt of the same session and sequence had applied it.
    pub(crate) repeated: bool,
    /// Whether the node that was called has applied it.
    pub(crate) applied_here: bool,
}
