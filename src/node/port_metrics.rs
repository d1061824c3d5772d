//! What the client port holds for its callers, for Prometheus.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Unit;

use super::families::{EncodeResult, Families};
use crate::door::Credentials;
use crate::door::limits::DoorLimits;
use crate::incoming::{Held, Places};
use crate::trust::port::PortSecurity;

/// Reads the port's counts at every scrape.
#[derive(Debug)]
pub(super) struct PortCollector {
    places: Arc<Places>,
    limits: Arc<DoorLimits>,
    security: Option<Arc<PortSecurity>>,
    credentials: Option<Credentials>,
}

impl PortCollector {
    /// Of the port with these places, secured by this, whose callers show these.
    pub(super) fn of(
        places: &Arc<Places>,
        limits: &Arc<DoorLimits>,
        security: &Option<Arc<PortSecurity>>,
        credentials: &Option<Credentials>,
    ) -> Box<Self> {
        let (security, credentials) = (security.clone(), credentials.clone());
        Box::new(Self { places: places.clone(), limits: limits.clone(), security, credentials })
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
        if let Some(security) = &self.security {
            let failed = "Connections that ended before their handshake was complete";
            families.counter("quorate_server_handshakes_failed", failed, security.failed())?;
            let unusable = "Times that TLS files on disk could not be used, and those before stayed in force";
            families.counter("quorate_server_credentials_unusable", unusable, security.reloads_failed())?;
            if let Some(seconds) = security.certificate_expires_seconds() {
                let help = "Until the certificate for clients expires; less than 0 once it has";
                families.gauge("quorate_server_certificate_expires", help, Some(Unit::Seconds), seconds)?;
            }
        }
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
