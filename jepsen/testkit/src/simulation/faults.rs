//! What goes wrong, and when.
//!
//! A new fault is a kind, a share of the hundred in [`next`], what `World::suffer` does, what `World::heal` undoes, a count of how
//! often it happened, and a least number of that in the tests. It changes what every seed draws: `quorate-jepsen planted` shows
//! whether the seeds still find what they are to find.

use std::collections::BTreeSet;
use std::time::Duration;

use quorate::NodeId;
use rand::{RngExt, rngs::SmallRng};

use super::network::Weather;

#[derive(Debug, Clone)]
pub(super) enum Fault {
    /// A node dies where it stands.
    Crash(NodeId),
    /// A node hands over its lead, if it has it, and stops.
    Stop(NodeId),
    /// All nodes die at once.
    CrashAll,
    /// Every node that is down starts again.
    StartAll,
    /// Whoever leads hears nobody and is heard by nobody.
    Isolate,
    /// The same, and all others die and start again at once: what they promised, they have to remember.
    IsolateAndRestart,
    /// These links are cut, each one way.
    Cut(BTreeSet<(NodeId, NodeId)>),
    /// All links work again.
    Join,
    /// The network turns bad, or fair again.
    Weather(Weather),
}

/// Draws the next fault and how long to wait before it.
pub(super) fn next(rng: &mut SmallRng, nodes: &[NodeId]) -> (Duration, Fault) {
    let pause = Duration::from_millis(rng.random_range(50..1200));
    let one = nodes[rng.random_range(0..nodes.len())];
    let fault = match rng.random_range(0..100) {
        0..20 => Fault::Crash(one),
        20..24 => Fault::CrashAll,
        24..30 => Fault::Stop(one),
        30..50 => Fault::StartAll,
        50..62 => Fault::Cut(cuts(rng, nodes, one)),
        62..67 => Fault::Isolate,
        67..70 => Fault::IsolateAndRestart,
        70..85 => Fault::Join,
        85..95 => Fault::Weather(Weather {
            loss: rng.random_range(0.0..0.15),
            duplication: rng.random_range(0.0..0.10),
            delay_max: Duration::from_millis(rng.random_range(1..60)),
            reorder: rng.random_bool(0.5),
        }),
        _ => Fault::Weather(Weather::FAIR),
    };
    (pause, fault)
}

/// One node isolated, one link cut, or everything to or from one node.
fn cuts(rng: &mut SmallRng, nodes: &[NodeId], one: NodeId) -> BTreeSet<(NodeId, NodeId)> {
    if nodes.len() == 1 {
        return BTreeSet::new();
    }
    let others: Vec<NodeId> = nodes.iter().copied().filter(|id| *id != one).collect();
    let other = others[rng.random_range(0..others.len())];
    match rng.random_range(0..4) {
        0 => others.iter().flat_map(|id| [(one, *id), (*id, one)]).collect(),
        1 => [(one, other), (other, one)].into(),
        2 => others.iter().map(|id| (one, *id)).collect(),
        _ => others.iter().map(|id| (*id, one)).collect(),
    }
}
