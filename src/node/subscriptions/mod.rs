//! What is applied, for everybody who follows, from any node.
//!
//! - [`grpc`]: followers that come by `replication.ReplicationService`; [`frames`](super::frames) has the others, over plain TCP;
//! - [`transport`]: what is asked of either; a stream itself knows nothing of what carries it;
//! - [`begin`]: where a follower begins, with or without a state before; [`kept_states`]: those that broke off;
//! - [`stream`]: the task that sends to one follower; [`credit`]: how much it may send; [`rest`]: what is left of a page;
//! - [`entry`]: what is told; [`wire`]: the same as messages of gRPC; [`wishes`]: what a follower asks for; [`failures`]: why it is told nothing more;
//! - [`looks`]: single answers; [`files`]: the whole state as a file;
//! - [`registry`]: who follows, for pages and metrics.
//!
//! # Promises
//!
//! - Entries come in the order of their positions, from the position that was asked for on, none left out and none twice.
//! - A follower that does not read costs its place and some hundred kilobytes, which count as unsent answers of its connection. It
//!   holds up nobody. It loses its stream after minutes.
//! - Nothing is kept for a follower that has gone.
//!
//! The protocol, with a figure: `docs/design/subscribe.md`.

mod begin;
mod credit;
mod entry;
mod failures;
mod files;
mod grpc;
mod kept_states;
mod looks;
mod registry;
mod rest;
mod stream;
mod transport;
mod wire;
mod wishes;

use std::sync::Arc;

pub(super) use self::begin::{FIRST_PATIENCE, serve};
pub(super) use self::entry::{EntryAt, EntryContent, SentEntry};
pub(super) use self::failures::{draining, says_nothing};
pub(super) use self::registry::{FollowerReport, SubscriberCollector, Subscribers};
pub(super) use self::stream::drained;
pub(super) use self::transport::{
    Chunk, EntryBatch, FollowerEncoding, FollowerLine, FollowerProgress, PartMark, StateMark, SyncBegin,
    SyncKind,
};
use super::operated::OperatedNode;
use crate::door::metrics::StreamCall;
use crate::door::streams::WatchPlace;
use crate::door::{Door, Method};
use crate::incoming::Caller;
use crate::proto::v1::Failure;

/// The service's name.
pub(super) const NAME: &str = "replication.ReplicationService";
/// The path at which followers say more after their first message.
pub(super) const SUBSCRIBE_PATH: &str = "/replication.ReplicationService/Subscribe";

const SUBSCRIBE: Method = Method::read("subscribe");
const GET_STATUS: Method = Method::read("get_status");
const READ_SNAPSHOT: Method = Method::read("read_snapshot");
const GET_ENTRIES_AFTER: Method = Method::read("get_entries_after");

/// What can be called.
pub(super) const METHODS: [Method; 4] = [SUBSCRIBE, GET_STATUS, READ_SNAPSHOT, GET_ENTRIES_AFTER];

/// The largest command of all there may be, and what surrounds it.
pub(super) const MAX_ENTRY_BYTES: usize = 32 * 1024 * 1024;

/// What followers are served from, over whatever node it is given. Cheap to clone.
#[derive(Clone)]
pub(super) struct SubscriptionService<N> {
    pub(super) door: Door<N>,
    pub(super) subscribers: Subscribers,
}

impl<N: OperatedNode> SubscriptionService<N> {
    /// One more subscription, which counts once it is known what comes of it.
    pub(super) fn call(&self) -> StreamCall {
        let metrics = &self.door.metrics;
        StreamCall::new(metrics.clone(), metrics.methods().id(SUBSCRIBE.name), self.subscribers.gauge())
    }

    /// The place of one on the connection of `caller`.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn place(&self, caller: &Arc<Caller>) -> Result<WatchPlace, Failure> {
        WatchPlace::take(caller, self.door.limits.watches)
    }
}

/// Judges what a follower asks for; for [`crate::fuzzing`].
#[cfg(any(test, fuzzing))]
pub(super) fn judge(request: crate::proto::replication::SubscribeRequest) {
    let _ = wishes::Wishes::parse(request.clone(), true);
    let _ = wishes::Wishes::parse(request, false);
}
