//! How far the history of a node reaches, for Prometheus and for those who ask for the status.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Unit;
use serde::Serialize;

use super::super::machine::{HistoryLimits, HistoryReach};
use crate::node::port_metrics::{gauge, limits};

/// How far the history of a node reaches, and how far it may.
#[derive(Debug, Clone)]
pub(super) struct History {
    pub(super) limits: HistoryLimits,
    pub(super) reach: Arc<HistoryReach>,
}

impl Collector for History {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (encoder, reach) = (&mut encoder, &self.reach);
        if let Some(first) = reach.first_revision() {
            let help = "First revision that can be watched from";
            gauge(encoder, "quorate_history_first_revision", help, None, first)?;
        }
        gauge(encoder, "quorate_history_events", "Changes kept for watches", None, reach.events() as u64)?;
        let help = "Bytes kept for them, shared with the state where that still holds them";
        gauge(encoder, "quorate_history", help, Some(&Unit::Bytes), reach.bytes() as u64)?;
        let HistoryLimits { events, bytes, age_ms } = self.limits;
        let all =
            [("history_events", events as u64), ("history_bytes", bytes as u64), ("history_age_ms", age_ms)];
        limits(encoder, "quorate_history_limit", "How much of the history is kept; an age of 0 is none", &all)
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
    pub(super) fn of(History { limits, reach }: &History) -> Self {
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
