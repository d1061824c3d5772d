//! What a transport has carried, per peer, counted where messages are handed to it and taken from it.
//!
//! Bytes are those of the messages, without frames, compression or TLS. Both directions of all connections with a peer
//! count, whoever dialled.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use crate::report::Carried;
use crate::types::NodeId;

/// What was carried between this node and one peer since this node started.
#[derive(Debug, Default)]
pub(crate) struct PeerTraffic {
    pub(super) sent_bytes: AtomicU64,
    pub(super) sent_messages: AtomicU64,
    pub(super) received_bytes: AtomicU64,
    pub(super) received_messages: AtomicU64,
    pub(super) dialled: AtomicU64,
    pub(super) dials_failed: AtomicU64,
}

impl PeerTraffic {
    pub(super) fn sent(&self, bytes: usize) {
        self.sent_messages.fetch_add(1, Relaxed);
        self.sent_bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn received(&self, bytes: usize) {
        self.received_messages.fetch_add(1, Relaxed);
        self.received_bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn dialled(&self, well: bool) {
        let counter = if well { &self.dialled } else { &self.dials_failed };
        counter.fetch_add(1, Relaxed);
    }

    fn carried(&self) -> Carried {
        Carried {
            sent_bytes: self.sent_bytes.load(Relaxed),
            sent_messages: self.sent_messages.load(Relaxed),
            received_bytes: self.received_bytes.load(Relaxed),
            received_messages: self.received_messages.load(Relaxed),
            dialled: self.dialled.load(Relaxed),
            dials_failed: self.dials_failed.load(Relaxed),
        }
    }
}

/// The traffic with every peer. A peer has a place from its first connection on; only who was admitted, or is
/// dialled, gets one, so there are no more than members over the life of the process.
#[derive(Debug, Default)]
pub struct Traffic(Mutex<BTreeMap<NodeId, Arc<PeerTraffic>>>);

impl Traffic {
    /// Where to count what goes to and comes from `peer`. Asked for once per connection.
    pub(super) fn with(&self, peer: NodeId) -> Arc<PeerTraffic> {
        self.0.lock().expect("invariant: no panic under this lock").entry(peer).or_default().clone()
    }

    /// What was carried, by peer.
    pub fn carried(&self) -> BTreeMap<NodeId, Carried> {
        let peers = self.0.lock().expect("invariant: no panic under this lock");
        peers.iter().map(|(node_id, traffic)| (*node_id, traffic.carried())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_counted_apart_and_both_ways() {
        let traffic = Traffic::default();
        traffic.with(2).sent(10);
        traffic.with(2).sent(5);
        traffic.with(2).received(1);
        traffic.with(3).dialled(false);
        let carried = traffic.carried();
        let expected = Carried {
            sent_bytes: 15,
            sent_messages: 2,
            received_bytes: 1,
            received_messages: 1,
            ..Carried::default()
        };
        assert_eq!(carried[&2], expected);
        assert_eq!(carried[&3], Carried { dials_failed: 1, ..Carried::default() });
    }
}
