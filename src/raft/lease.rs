//! For how long a leader may act as one without having heard from a quorum: the lease, and the admission of proposals.
//!
//! # The danger
//!
//! A leader that was deposed without knowing it answers reads from an old state, and takes writes that are never committed. A
//! lease that is one moment too long serves a stale read, and no test of a healthy cluster shows it.
//!
//! # The rule
//!
//! A voter that has confirmed a leader elects no other for the length `L` of its longest election timeout, and says `L` in every
//! answer. A leader answers lease reads until `t0 + 0.9 × min(L)`: `t0` is before it sent what a quorum has answered, and `min` is over
//! its own `L` and those of the voters that have answered ([`LEASE_SHARE`], [`Core::lease_index`](super::core::Core::lease_index)).
//!
//! ```text
//! leader    t0 send ........................ lease: until t0 + 0.9 L ....|
//!                \             /
//! voter v         t1 confirm  answer ............ elects no other until t1 + L ........|  may vote
//! ```
//!
//! # Why it holds
//!
//! Suppose that another node is elected while the lease lasts. Its quorum shares a voter `v` with the quorum that answered, because
//! memberships that are in effect at the same time have intersecting quorums. So `v` confirmed at `t1`, and granted its vote later.
//!
//! 1. `t0 <= t1`: the core stamps a request when it sends it, and credits the answer with that stamp.
//! 2. `v` granted no vote and no pre-vote before `t1 + L`, to itself neither. Here openraft keeps the time; [`raft_config`](super::core)
//!    gives it the same timeout that `v` says.
//! 3. The leader's lease ended at `t0 + 0.9 L` on its own clock, so before `t1 + L` on `v`'s, unless the rates of the two clocks differ by
//!    more than a tenth.
//!
//! Two things end the promise of `v` early, and each is answered elsewhere: a restart, after which `v` is silent for as long as it may
//! have promised ([`VoterPromise`](super::network::service::VoterPromise), `storage/lease.rs`), and a hand-over, before which the leader voids its lease.
//!
//! # Orders that the proof needs
//!
//! A change that swaps one of these breaks the lease in silence.
//!
//! | order | where |
//! |---|---|
//! | an answer's `L` is noted before the core hears of the answer | `network/appends.rs`, `network/client.rs`: `PeerFitness::note`, `note_lease` |
//! | the shortest `L` is looked at, the core is asked, the shortest `L` is looked at again | `Core::lease_index` |
//! | the lease is voided, then the offer is noted, then the core hands over | `Core::transfer_leader` |
//! | whether the lease is void is looked at last | `Core::lease_index` |
//! | the core hears of an acceptance after the last request that ends at the same entry is answered | `network/appends.rs` |
//! | `lease.json` holds `L` before a peer can connect | `engine/open/directory.rs`: `read_directory`, then `grpc::serve` |
//! | elections are off until it is known whether this node must be silent | `enable_elect` in `core.rs`, `core/candidacy.rs` |
//! | the core takes the time, then the index; the state is read after that | openraft's `handle_get_linearizer`; `engine/read.rs` |
//!
//! # Proposals
//!
//! The same length, without the tenth, bounds proposals: [`LeaderLease::check`] refuses them once no quorum has answered for `L`. That is not
//! for safety, which is Raft's, but for the callers: what such a leader takes on has little chance of being committed. A new leader has
//! `L` from the first look at it in its term.
//!
//! # What it does not do
//!
//! Notice a clock that stands still while its machine is suspended, or one that runs a tenth too fast. Renew a lease: heartbeats do.
//!
//! Source: Ongaro, *Consensus: Bridging Theory and Practice*, §6.4.1, §3.10, §4.2.3. `docs/design/reads-and-leases.md` has the other levels.

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

/// How much of a voter's promise a leader relies on: the rest is for clocks that differ in rate.
pub(super) const LEASE_SHARE: f64 = 0.9;

/// Whether a leader may still act as one.
pub(super) struct LeaderLease {
    metrics: WatchReceiverOf<TypeConfig, RaftMetrics<TypeConfig>>,
    /// For how long after it was heard a quorum elects no other leader.
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
pub(super) enum NotProposed {
    /// The core is gone, or will be.
    Stopped,
    /// This leader has lost touch with its quorum.
    NoQuorum,
}

impl LeaderLease {
    pub(super) fn new(
        metrics: WatchReceiverOf<TypeConfig, RaftMetrics<TypeConfig>>,
        lease: Duration,
    ) -> Self {
        let (since, void_lease_term) = (Mutex::new((0, Instant::now())), AtomicU64::new(0));
        Self { metrics, lease, since, void_lease_term, hand_overs: watch::Sender::new(()) }
    }

    /// Whether proposals are taken. Not by a core that has stopped, nor by a leader that has not heard from a quorum for the
    /// length of its lease: others may be electing a new one, and what it accepts has little chance of being committed.
    pub(super) fn check(&self) -> Result<(), NotProposed> {
        let metrics = self.metrics.borrow_watched();
        if metrics.running_state.is_err() || metrics.state == ServerState::Shutdown {
            return Err(NotProposed::Stopped);
        }
        match self.is_in_touch(&metrics) {
            true => Ok(()),
            false => Err(NotProposed::NoQuorum),
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
