//! What status pages, metrics and settings need of the node they are about, beside what [`ClusterNode`] has.

use super::members::ClusterNode;
use crate::engine::{Activity, Counters, DiskStatus, Engine, InFlight, Lag, PeerState, Settings};
use crate::error::ConfigureError;
use crate::machine::kv::KvMachine;
use crate::storage::LogStats;

/// A node that tells how it is. The methods promise what those of [`Engine`] do.
pub(super) trait ObservedNode: ClusterNode {
    fn peers(&self) -> Vec<PeerState>;

    fn lag(&self) -> Lag;

    fn in_flight(&self) -> InFlight;

    /// Sessions open, and bytes of answers kept for them.
    fn sessions(&self) -> (usize, usize);

    /// Sessions of the client connection that has most of them.
    fn largest_opener(&self) -> usize;

    fn disk(&self) -> DiskStatus;

    fn activity(&self) -> &Activity;

    fn counters(&self) -> &Counters;

    fn log_stats(&self) -> Option<&LogStats>;

    fn settings(&self) -> Settings;

    fn configure(&self, change: impl FnOnce(&mut Settings)) -> Result<Settings, ConfigureError>;
}

impl ObservedNode for Engine<KvMachine> {
    fn peers(&self) -> Vec<PeerState> {
        Engine::peers(self)
    }

    fn lag(&self) -> Lag {
        Engine::lag(self)
    }

    fn in_flight(&self) -> InFlight {
        Engine::in_flight(self)
    }

    fn sessions(&self) -> (usize, usize) {
        Engine::sessions(self)
    }

    fn largest_opener(&self) -> usize {
        Engine::largest_opener(self)
    }

    fn disk(&self) -> DiskStatus {
        Engine::disk(self)
    }

    fn activity(&self) -> &Activity {
        Engine::activity(self)
    }

    fn counters(&self) -> &Counters {
        Engine::counters(self)
    }

    fn log_stats(&self) -> Option<&LogStats> {
        Engine::log_stats(self).map(|stats| &**stats)
    }

    fn settings(&self) -> Settings {
        Engine::settings(self)
    }

    fn configure(&self, change: impl FnOnce(&mut Settings)) -> Result<Settings, ConfigureError> {
        Engine::configure(self, change)
    }
}
