//! Frames, from any bytes: see [`crate::fuzzing`].

use super::codec::{self, FirstFrame, HEAD_BYTES, Head, MAX_FIRST_BYTES, MAX_LATER_BYTES};
use crate::proto::replication::SubscribeRequest;

/// What a follower may have asked for that sent these messages, each behind its length in two bytes. The heads of their frames are made here, or nearly
/// everything would end at a checksum; a head as it comes is tried besides.
pub(in crate::node) fn read_all(mut bytes: &[u8]) -> Vec<SubscribeRequest> {
    if let Some(head) = bytes.first_chunk() {
        let _ = Head::read(*head, MAX_FIRST_BYTES);
    }
    let mut requests = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let (message, rest) = rest.split_at(rest.len().min(u16::from_le_bytes(*length).into()));
        bytes = rest;
        let most = if requests.is_empty() { MAX_FIRST_BYTES } else { MAX_LATER_BYTES };
        let Ok(head) = Head::read(head_of(message), most) else { continue };
        if !requests.is_empty() {
            requests.extend(codec::read_later(head, message));
        } else if let Ok(FirstFrame::Subscribe(request)) = codec::read_first(head, message) {
            requests.push(*request);
        }
    }
    requests
}

fn head_of(message: &[u8]) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    let length = u32::try_from(message.len() + 4).expect("invariant: a length of two bytes");
    head[..4].copy_from_slice(&length.to_le_bytes());
    head[4..].copy_from_slice(&crc32fast::hash(message).to_le_bytes());
    head
}
