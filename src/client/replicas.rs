//! Replicas that a client reads at: which reads, and what is known of each.
//!
//! A replica is no member. Members tell of those that follow them, by addresses that the replicas themselves have named. So an address
//! is used only once it has answered a probe there as a replica of this cluster: of its name, and of the history that
//! the members have. It is given reads and nothing else. Whatever goes wrong at one, the read goes on to the members, and the replica rests
//! for a while. One of which no member tells any more is forgotten.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::report::NodeReport;
use crate::types::{HistoryEpoch, ReadLevel};

/// Replicas that were learnt of, at most: members must not be crowded out.
pub(super) const MAX_REPLICAS: usize = 32;
/// A replica that is further behind is asked for nothing, whatever a read allows.
const MOST_LAG: Duration = Duration::from_secs(5);
/// How long a replica at which a read went wrong is not asked.
const RESTS_FOR: Duration = Duration::from_secs(2);
/// A replica is forgotten when no member has told of it for as many health intervals.
const INTERVALS_UNTOLD: u32 = 3;

const MEMBER: u8 = 1;
const WHOLE: u8 = 2;
const PART: u8 = 3;

/// Which reads replicas may answer, beside the members.
///
/// A replica answers a `local` read from what it has, and asks a member for the position that a `bounded` or
/// `linearizable` one needs. So the latter takes a round trip more, or a long one where the replica is far from its source.
/// `lease` reads are the leader's, always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum ReplicaReads {
    /// None. Replicas are not looked for.
    Never,
    /// Those at the levels `local` and `bounded`.
    #[default]
    Relaxed,
    /// Also linearizable ones, where a [`ReadPreference`](super::ReadPreference) lets them go to others than the leader.
    Always,
}

impl ReplicaReads {
    /// How far behind a replica may be that answers a read at `level`; `None` when none may.
    pub(super) fn most_lag(self, level: ReadLevel) -> Option<Duration> {
        match (self, level) {
            (Self::Never, _) | (_, ReadLevel::Lease) | (Self::Relaxed, ReadLevel::Linearizable) => None,
            (Self::Relaxed | Self::Always, ReadLevel::Bounded { max_lag_ms }) => {
                Some(MOST_LAG.min(Duration::from_millis(max_lag_ms)))
            }
            (Self::Relaxed, ReadLevel::Local)
            | (Self::Always, ReadLevel::Local | ReadLevel::Linearizable) => Some(MOST_LAG),
        }
    }
}

/// What is known of a node that is, or may be, a replica.
#[derive(Debug, Default)]
pub(super) struct KnownReplica {
    /// What it says that it is: [`MEMBER`], a replica of the [`WHOLE`] or of a [`PART`]; 0 until it has said so.
    kind: AtomicU8,
    /// Whether it is known only because a member has told of it as a replica.
    announced: AtomicBool,
    /// When a member has told of it last.
    told: Mutex<Option<Instant>>,
    /// How far behind it is, as it says; `u64::MAX` where it does not know.
    lag_ms: AtomicU64,
    /// The history of its state, as it says.
    history: AtomicU64,
    /// When a read has failed at it last.
    failed: Mutex<Option<Instant>>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KnownReplica {
    /// A member tells of it, at an address that was not known before.
    pub(super) fn announced() -> Self {
        Self { announced: AtomicBool::new(true), told: Mutex::new(Some(Instant::now())), ..Self::default() }
    }

    /// It has told of itself.
    pub(super) fn heard(&self, status: &NodeReport) {
        let kind = match &status.replica {
            None => MEMBER,
            Some(replica) if replica.partial => PART,
            Some(_) => WHOLE,
        };
        let lag = status.replica.as_ref().and_then(|replica| replica.lag);
        let lag_ms = lag.and_then(|lag| u64::try_from(lag.as_millis()).ok()).unwrap_or(u64::MAX);
        self.lag_ms.store(lag_ms, Ordering::Relaxed);
        self.history.store(status.history.0, Ordering::Relaxed);
        self.kind.store(kind, Ordering::Relaxed);
    }

    /// A member tells of it again.
    pub(super) fn told_again(&self) {
        *locked(&self.told) = Some(Instant::now());
    }

    /// It is a member, as one of them says.
    pub(super) fn is_told_to_be_a_member(&self) {
        self.announced.store(false, Ordering::Relaxed);
    }

    /// Whether it is known only because a member has told of it as a replica.
    pub(super) fn is_announced(&self) -> bool {
        self.announced.load(Ordering::Relaxed)
    }

    /// Whether it is none of the members, as far as is known.
    pub(super) fn is_replica(&self) -> bool {
        self.is_announced() || matches!(self.kind.load(Ordering::Relaxed), WHOLE | PART)
    }

    /// Whether no member has told of it for too long.
    pub(super) fn is_gone(&self, health_interval: Duration) -> bool {
        let untold = health_interval.saturating_mul(INTERVALS_UNTOLD);
        self.is_announced() && locked(&self.told).is_none_or(|told| told.elapsed() >= untold)
    }

    /// A read went wrong at it.
    pub(super) fn note_failed(&self) {
        *locked(&self.failed) = Some(Instant::now());
    }

    /// Whether it has the whole state of `history`, not older than `most_lag`, and no read has failed at it lately.
    pub(super) fn may_answer(&self, history: HistoryEpoch, most_lag: Duration) -> bool {
        let lag_ms = self.lag_ms.load(Ordering::Relaxed);
        self.kind.load(Ordering::Relaxed) == WHOLE
            && history != HistoryEpoch::UNKNOWN
            && self.history.load(Ordering::Relaxed) == history.0
            && u128::from(lag_ms) <= most_lag.as_millis()
            && locked(&self.failed).is_none_or(|failed| failed.elapsed() >= RESTS_FOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::ReplicaReport;

    const OURS: HistoryEpoch = HistoryEpoch(7);

    fn status(history: HistoryEpoch, partial: bool, lag_ms: Option<u64>) -> NodeReport {
        let lag = lag_ms.map(Duration::from_millis);
        let replica = Some(ReplicaReport { partial, lag, ..ReplicaReport::default() });
        NodeReport { replica, history, ..NodeReport::default() }
    }

    #[test]
    fn each_level_says_how_far_behind_a_replica_may_be() {
        let bounded = |max_lag_ms| ReadLevel::Bounded { max_lag_ms };
        let secs = |secs| Some(Duration::from_secs(secs));
        for (level, never, relaxed, always) in [
            (ReadLevel::Local, None, secs(5), secs(5)),
            (bounded(2_000), None, secs(2), secs(2)),
            (bounded(60_000), None, secs(5), secs(5)),
            (ReadLevel::Linearizable, None, None, secs(5)),
            (ReadLevel::Lease, None, None, None),
        ] {
            let each = [ReplicaReads::Never, ReplicaReads::Relaxed, ReplicaReads::Always];
            assert_eq!(each.map(|reads| reads.most_lag(level)), [never, relaxed, always], "{level:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_one_that_has_the_whole_state_and_is_not_too_far_behind_may_answer() {
        let replica = KnownReplica::announced();
        let within = |ms| replica.may_answer(OURS, Duration::from_millis(ms));
        assert!(replica.is_replica() && !within(5_000), "nothing is known of it");
        for (status, may) in [
            (status(OURS, false, Some(10)), true),
            (status(OURS, false, Some(11)), false),
            (status(OURS, false, None), false),
            (status(OURS, true, Some(0)), false),
            (status(HistoryEpoch(8), false, Some(0)), false),
            (status(HistoryEpoch::UNKNOWN, false, Some(0)), false),
            (NodeReport { history: OURS, ..NodeReport::default() }, false),
        ] {
            replica.heard(&status);
            assert_eq!(within(10), may, "{status:?}");
        }
        replica.heard(&status(OURS, false, Some(0)));
        assert!(!replica.may_answer(HistoryEpoch::UNKNOWN, MOST_LAG), "the members' history is not known");
        replica.note_failed();
        assert!(!within(10));
        tokio::time::advance(RESTS_FOR).await;
        assert!(within(10));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_nobody_tells_of_any_more_is_gone() {
        let interval = Duration::from_secs(2);
        let replica = KnownReplica::announced();
        for _ in 0..4 {
            tokio::time::advance(interval).await;
            assert!(!replica.is_gone(interval));
            replica.told_again();
        }
        tokio::time::advance(interval * INTERVALS_UNTOLD).await;
        assert!(replica.is_gone(interval));
        replica.is_told_to_be_a_member();
        assert!(!replica.is_gone(interval) && !replica.is_replica());
        let given = KnownReplica::default();
        given.heard(&status(OURS, false, Some(0)));
        assert!(given.is_replica() && !given.is_gone(interval), "what the user has given is never forgotten");
    }
}
