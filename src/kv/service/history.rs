//! How far the history of a node reaches, for Prometheus and for those who ask for the status.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Unit;
use serde::Serialize;

use super::super::machine::{HistoryLimits, HistoryReach};
use crate::node::families::{EncodeResult, Families};

/// How far the history of a node reaches, and how far it may.
#[derive(Debug, Clone)]
pub(super) struct ServedHistory {
    pub(super) limits: HistoryLimits,
    pub(super) reach: Arc<HistoryReach>,
}

impl Collector for ServedHistory {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> EncodeResult {
        let (mut families, reach) = (Families(encoder), &self.reach);
        if let Some(first) = reach.first_revision() {
            let help = "First revision that can be watched from";
            families.gauge("quorate_history_first_revision", help, None, first)?;
        }
        let help = "Changes kept for watches";
        families.gauge("quorate_history_events", help, None, reach.events() as u64)?;
        let help = "Bytes kept for them, shared with the state where that still holds them";
        families.gauge("quorate_history", help, Some(Unit::Bytes), reach.bytes() as u64)?;
        let HistoryLimits { events, bytes, age_ms } = self.limits;
        let all =
            [("history_events", events as u64), ("history_bytes", bytes as u64), ("history_age_ms", age_ms)];
        let help = "How much of the history is kept; an age of 0 is none";
        families.gauges("quorate_history_limit", help, None, "limit", all)
    }
}

/// The same on the status page.
#[derive(Debug, Serialize)]
pub(super) struct HistoryNow {
    /// Null while that is not known.
    first_revision: Option<u64>,
    events: usize,
    bytes: usize,
    max_events: usize,
    max_bytes: usize,
    /// 0: of any age.
    max_age_ms: u64,
}

impl HistoryNow {
    pub(super) fn of(ServedHistory { limits, reach }: &ServedHistory) -> Self {
        Self {
            first_revision: reach.first_revision(),
            events: reach.events(),
            bytes: reach.bytes(),
            max_events: limits.events,
            max_bytes: limits.bytes,
            max_age_ms: limits.age_ms,
        }
    }
}
