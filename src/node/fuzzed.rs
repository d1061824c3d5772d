//! What a caller may send, from any bytes: see [`crate::fuzzing`].

use prost::Message;

use super::frames;
use super::reconfigure::AskedChange;
use super::subscriptions;
use crate::proto::replication::SubscribeRequest;

/// Frames of a follower, the first one and those behind it. The checksum is mended.
pub(crate) fn frames(bytes: &[u8]) {
    frames::read_all(bytes).into_iter().for_each(subscriptions::judge);
}

/// What a follower asks for by gRPC.
pub(crate) fn subscribe(bytes: &[u8]) {
    if let Ok(request) = SubscribeRequest::decode(bytes) {
        subscriptions::judge(request);
    }
}

/// The body of `POST /replication/configure`.
pub(crate) fn configure(bytes: &[u8]) {
    let _ = AskedChange::read(bytes, &[]);
}
