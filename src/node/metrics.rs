//! What the node tells Prometheus.
//!
//! Requests are [counted](crate::door::metrics) at the doors; positions, term and role are read from the node at every
//! scrape. Other rooms add theirs with [`Server::with_collector`](super::Server::with_collector).

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::door::ServedNode;
use crate::engine::NodeState;
use crate::types::Role;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleLabels {
    role: String,
}

/// Has `registry` export what `node` is, and what `collectors` have.
pub(super) fn register(registry: &mut Registry, node: impl ServedNode, collectors: Vec<Box<dyn Collector>>) {
    registry.register_collector(Box::new(NodeCollector(move || node.state())));
    for collector in collectors {
        registry.register_collector(collector);
    }
}

/// Everything, in the OpenMetrics text format.
///
/// # Errors
/// When a collector fails.
pub(crate) fn encode(registry: &Registry) -> Result<String, fmt::Error> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry)?;
    Ok(text)
}

/// Reads the node's state at every scrape.
struct NodeCollector<F>(F);

impl<F> fmt::Debug for NodeCollector<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeCollector")
    }
}

impl<F: Fn() -> NodeState + Send + Sync + 'static> Collector for NodeCollector<F> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let state = (self.0)();
        let index = |position: Option<crate::types::LogId>| position.map(|log_id| log_id.index);
        let is_leader = u64::from(state.role == Role::Leader);
        let gauges = [
            ("quorate_raft_term", "Current term", Some(state.term)),
            ("quorate_raft_is_leader", "1 on the leader, else 0", Some(is_leader)),
            (
                "quorate_raft_is_ready",
                "1 when /readyz?for=reads answers 200, else 0",
                Some(state.is_ready().into()),
            ),
            (
                "quorate_raft_diverged",
                "1 while this node's state differs from the others' and it serves nothing, else 0",
                Some(state.diverged.is_some().into()),
            ),
            ("quorate_raft_last_log_index", "Index of the last log entry", state.last_log),
            ("quorate_raft_committed_index", "Index known to be committed", index(state.committed)),
            ("quorate_raft_applied_index", "Index applied to the state machine", index(state.applied)),
            ("quorate_raft_snapshot_index", "Last index in the newest snapshot", index(state.snapshot)),
            ("quorate_raft_purged_index", "Last index purged from the log", index(state.purged)),
        ];
        for (name, help, value) in gauges {
            // Absent rather than 0, which is a valid index.
            if let Some(value) = value {
                let gauge = ConstGauge::new(value);
                gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
            }
        }
        let mut roles = encoder.encode_descriptor(
            "quorate_raft_role",
            "1 for the present role",
            None,
            MetricType::Gauge,
        )?;
        for role in [Role::Learner, Role::Follower, Role::Candidate, Role::Leader, Role::Stopped] {
            let labels = RoleLabels { role: role.to_string() };
            let gauge = ConstGauge::new(u64::from(state.role == role));
            gauge.encode(roles.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
