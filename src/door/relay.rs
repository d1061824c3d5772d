//! Calls that a node does not carry out itself, and passes on to the one that does.
//!
//! A [relay](Relay) carries the bytes of a call as they came, with the options that it came with, and brings the answer as it was given: outcome,
//! session and sequence stay the caller's. What has been passed on once is not passed on again, or two nodes that take each other for the leader
//! would do so for ever; its stream says so in a header.
//!
//! Only changes are passed on: writes, and the opening and closing of sessions. Who carries them is the [node's](super::ServedNode::relay) affair.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tonic::metadata::MetadataMap;

use crate::call::{self, Rejected};
use crate::proto::v1::call::Content;
use crate::proto::v1::{self, Failure};

/// What becomes of a call that was passed on.
pub(crate) type RelayedOutcome = Pin<Box<dyn Future<Output = Result<v1::Answer, Failure>> + Send>>;

/// Carries calls to the node that carries them out.
pub(crate) trait Relay: Send + Sync + 'static {
    /// Passes `call` on, whose tag does not count. The answer is none of a failure. It is given up after `within`, if that is less than the relay's own
    /// patience. Dropped, it does not recall what was sent.
    fn relay(self: Arc<Self>, call: v1::Call, within: Option<Duration>) -> RelayedOutcome;
}

/// A change that came on a pipeline, to be passed on.
pub(crate) struct RelayedCall {
    /// Under which its answer is waited for.
    pub(crate) tag: u64,
    /// The number of its method among the guest's; none for one about a session.
    pub(crate) method: Option<usize>,
    pub(crate) call: v1::Call,
}

/// Whether the calls that come with `metadata` have been passed on already.
pub(crate) fn is_relayed(metadata: &MetadataMap) -> bool {
    metadata.contains_key(call::RELAYED)
}

/// The write `method` with the request in `payload`, as a call.
pub(crate) fn write(method: &'static str, payload: Bytes, options: Option<v1::WriteOptions>) -> v1::Call {
    v1::Call {
        content: Some(Content::Payload(payload)),
        method: method.to_owned(),
        write: options,
        ..v1::Call::default()
    }
}

/// What a leader has answered is no answer to what it was asked.
pub(crate) fn unexpected() -> Failure {
    Rejected::unexpected(true).into()
}
