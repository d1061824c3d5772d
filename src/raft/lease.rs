//! For how long a leader may act as one without having heard from a quorum.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use openraft::Instant as _;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::type_config::alias::WatchReceiverOf;
use openraft::{RaftMetrics, ServerState};
use tokio::sync::watch;
use tokio::time::Instant;

use super::type_config::TypeConfig;

/// How much of the time for which voters elect nobody else a leader relies on.
pub(super) const LEASE_SHARE: f64 = 0.9;

/// Whether a leader may still act as one.
pub(super) struct Admission {
    metrics: WatchReceiverOf<TypeConfig, RaftMetrics<TypeConfig>>,
    /// For how long after it was heard a quorum elects nobody else.
    pub(super) lease: Duration,
    /// Since when this node has been seen to lead in which term.
    since: Mutex<(u64, Instant)>,
    /// The term in which this node has asked another one to take the lead.
    void_lease_term: AtomicU64,
    /// Told each time that this node asks another one.
    hand_overs: watch::Sender<()>,
}

/// Why no proposal is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Closed {
    /// The core is gone, or will be.
    Stopped,
    /// This leader has lost touch with its quorum.
    NoQuorum,
}

impl Admission {
    pub(super) fn new(
        metrics: WatchReceiverOf<TypeConfig, RaftMetrics<TypeConfig>>,
        lease: Duration,
    ) -> Self {
        let (since, void_lease_term) = (Mutex::new((0, Instant::now())), AtomicU64::new(0));
        Self { metrics, lease, since, void_lease_term, hand_overs: watch::Sender::new(()) }
    }

    /// Whether proposals are taken. Not by a core that has stopped, nor by a leader that has not heard from a quorum for the
    /// length of its lease: others may be electing a new one, and what it accepts has little chance of being committed.
    pub(super) fn check(&self) -> Result<(), Closed> {
        let metrics = self.metrics.borrow_watched();
        if metrics.running_state.is_err() || metrics.state == ServerState::Shutdown {
            return Err(Closed::Stopped);
        }
        match self.is_in_touch(&metrics) {
            true => Ok(()),
            false => Err(Closed::NoQuorum),
        }
    }

    fn is_in_touch(&self, metrics: &RaftMetrics<TypeConfig>) -> bool {
        if metrics.state != ServerState::Leader || metrics.membership_config.voter_ids().nth(1).is_none() {
            return true;
        }
        match &metrics.last_quorum_acked {
            Some(acked) if acked.elapsed() <= self.lease => true,
            // Not heard from yet, or not for too long; but a new leader must be given the time.
            _ => {
                let term = metrics.current_term;
                let mut since = self.since.lock().expect("invariant: no panic under this lock");
                if since.0 != term {
                    *since = (term, Instant::now());
                }
                since.1.elapsed() <= self.lease && metrics.last_quorum_acked.is_none()
            }
        }
    }

    pub(super) fn void_lease(&self) {
        let term = self.metrics.borrow_watched().current_term;
        self.void_lease_term.fetch_max(term, Ordering::SeqCst);
        self.hand_overs.send_replace(());
    }

    pub(super) fn hand_overs(&self) -> watch::Receiver<()> {
        self.hand_overs.subscribe()
    }

    pub(super) fn is_lease_void(&self) -> bool {
        let term = self.metrics.borrow_watched().current_term;
        self.void_lease_term.load(Ordering::SeqCst) >= term
    }
}
