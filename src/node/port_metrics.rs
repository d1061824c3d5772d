//! What the client port holds for its callers, for Prometheus.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Unit;

use super::families::{EncodeResult, Families};
use crate::door::Credentials;
use crate::door::limits::DoorLimits;
use crate::incoming::{Held, Places};

/// Reads the port's counts at every scrape.
#[derive(Debug)]
pub(super) struct PortCollector {
    places: Arc<Places>,
    limits: Arc<DoorLimits>,
    credentials: Option<Credentials>,
}

impl PortCollector {
    pub(super) fn boxed(
        places: &Arc<Places>,
        limits: &Arc<DoorLimits>,
        credentials: Option<Credentials>,
    ) -> Box<dyn Collector> {
        Box::new(Self { places: places.clone(), limits: limits.clone(), credentials })
    }
}

impl Collector for PortCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> EncodeResult {
        let (mut families, counts, bounds) = (Families(encoder), self.places.counts(), &*self.limits);
        let held = |what| self.places.held(what) as u64;
        let reserved = "Of these, in the places that are kept back for probes and operators";
        for (name, help, unit, value) in [
            ("quorate_server_connections_open", "Connections of clients", None, counts.open as u64),
            ("quorate_server_connections_reserved", reserved, None, counts.reserved as u64),
            (
                "quorate_server_unsent",
                "Encoded answers that clients have not taken",
                Some(Unit::Bytes),
                held(Held::Unsent),
            ),
            (
                "quorate_server_unfinished",
                "Requests that have not arrived as a whole",
                Some(Unit::Bytes),
                held(Held::Unfinished),
            ),
        ] {
            families.gauge(name, help, unit, value)?;
        }
        families.counter("quorate_server_connections_accepted", "Connections accepted", counts.accepted)?;
        let help = "Connections closed because others needed their places or their memory";
        families.counter("quorate_server_connections_evicted", help, counts.evicted)?;
        let limit = counts.limit;
        let counts = self.credentials.as_ref().map(Credentials::counts).unwrap_or_default();
        let refused = [("unauthenticated", counts.unidentified), ("permission_denied", counts.denied)];
        let help = "Requests refused for want of a credential that is valid, and of a right";
        families.counters("quorate_server_refused_requests", help, None, "reason", refused)?;
        for (name, help, value) in [
            (
                "quorate_server_credentials_reloads",
                "Times that what the files of credentials hold has changed",
                counts.reloads,
            ),
            (
                "quorate_server_credentials_failures",
                "Times that they could not be used, and the credentials stayed as they were",
                counts.failures,
            ),
        ] {
            families.counter(name, help, value)?;
        }
        let all = [
            ("max_connections", limit),
            ("max_connection_watches", bounds.watches.each),
            ("max_watches", bounds.watches.all),
            ("max_connection_unsent_bytes", bounds.unsent_bytes.each),
            ("max_unsent_bytes", bounds.unsent_bytes.all),
            ("max_connection_unfinished_bytes", bounds.unfinished_bytes.each),
            ("max_unfinished_bytes", bounds.unfinished_bytes.all),
            ("max_pipeline_queued_bytes", bounds.queued_bytes.each),
            ("max_queued_bytes", bounds.queued_bytes.all),
        ];
        let all = all.map(|(limit, value)| (limit, value as u64));
        families.gauges("quorate_server_limit", "What clients may make the node hold", None, "limit", all)
    }
}
