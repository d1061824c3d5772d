//! The other members, for Prometheus: what each has, and what goes to and comes from it.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use crate::engine::{Carried, LedPeer, PeerStanding, PeerState};

use super::operated::OperatedNode;

/// Reads what is known of the peers at every scrape.
pub(super) struct PeerCollector<N>(pub(super) N);

impl<N> fmt::Debug for PeerCollector<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PeerCollector")
    }
}

/// A counter of every node: name, help, unit, value.
type Count = (&'static str, &'static str, Option<Unit>, fn(&Carried) -> u64);
/// A gauge of the leader only: name, help, unit, value if there is one.
type Measure = (&'static str, &'static str, Option<Unit>, fn(&LedPeer) -> Option<f64>);

impl<N: OperatedNode> Collector for PeerCollector<N> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let peers = self.0.peers();
        let counts: [Count; 6] = [
            ("quorate_peer_sent", "Sent to the peer", Some(Unit::Bytes), |c| c.sent_bytes),
            ("quorate_peer_sent_messages", "Messages sent to the peer", None, |c| c.sent_messages),
            ("quorate_peer_received", "Received from the peer", Some(Unit::Bytes), |c| c.received_bytes),
            ("quorate_peer_received_messages", "Messages received from it", None, |c| c.received_messages),
            ("quorate_peer_connections", "Connections made to the peer", None, |c| c.dialled),
            ("quorate_peer_connections_failed", "Attempts that failed", None, |c| c.dials_failed),
        ];
        for (name, help, unit, value) in counts {
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            for peer in &peers {
                let metric = ConstCounter::new(value(&peer.carried));
                metric.encode(family.encode_family(&label(peer))?)?;
            }
        }
        let measures: [Measure; 5] = [
            ("quorate_peer_lag_entries", "Entries the peer is not known to have", None, |led| {
                Some(led.behind_entries as f64)
            }),
            ("quorate_peer_lag", "Age of the first of them", Some(Unit::Seconds), |led| {
                Some(led.behind.as_secs_f64())
            }),
            ("quorate_peer_heard", "How long ago it answered; absent if never", Some(Unit::Seconds), |led| {
                led.heard.map(|heard| heard.as_secs_f64())
            }),
            ("quorate_peer_connected", "0 once it counts as disconnected", None, |led| {
                Some(f64::from(u8::from(led.standing() != PeerStanding::Disconnected)))
            }),
            ("quorate_peer_snapshot_left", "Left of the snapshot being sent", Some(Unit::Bytes), |led| {
                led.snapshot.map(|(sent, total)| total.saturating_sub(sent) as f64)
            }),
        ];
        for (name, help, unit, value) in measures {
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            for peer in &peers {
                let Some(value) = peer.led.as_ref().and_then(value) else { continue };
                let metric = ConstGauge::new(value);
                metric.encode(family.encode_family(&label(peer))?)?;
            }
        }
        Ok(())
    }
}

fn label(peer: &PeerState) -> [(&'static str, String); 1] {
    [("peer", peer.node_id.to_string())]
}
