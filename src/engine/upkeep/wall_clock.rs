//! The cluster's clocks as this node knows them, and a watch over its wall clock.
//!
//! Lifetimes do not depend on wall clocks ([`crate::raft::clock`]). People do: a clock that jumps makes log lines, certificates and
//! shown times wrong, and is often the first sign of a machine in trouble. So a jump is logged and counted, on
//! whichever node it happens.

use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use crate::engine::stop::until_ended;
use crate::engine::{Engine, Inner};
use crate::machine::StateMachine;
use crate::raft::clock::Reading;
use crate::runtime::WallClock;
use crate::types::{ClusterClock, NodeId};

/// How often the wall clock is compared with the monotonic one. There is nothing to wait for that tells of every jump.
const LOOK: Duration = Duration::from_secs(1);
/// A difference that is a jump, in milliseconds.
const JUMP_MS: u64 = 1_000;
/// The two clocks are read one after the other; if this passes between, they are read again.
const READ_TOGETHER: Duration = Duration::from_millis(50);

impl<M: StateMachine> Engine<M> {
    /// The cluster's clocks at the last entry that this node has applied.
    pub fn clock(&self) -> ClusterClock {
        self.inner.core.published().progress().clock
    }

    /// What wall clocks show, as far as this node knows, when elapsed time is `elapsed_ms`: milliseconds since the Unix epoch.
    /// It is another one after the wall clock of the leader was set.
    pub fn log_time_at(&self, elapsed_ms: u64) -> u64 {
        self.clock().log_time_at(elapsed_ms)
    }
}

impl<M: StateMachine> Inner<M> {
    /// What this node's clocks show, for an entry that is proposed now.
    pub(in crate::engine) fn reading(&self) -> Reading {
        self.core.reading(self.wall_clock.unix_time_ms())
    }
}

/// The wall clock next to the monotonic one.
#[derive(Debug, Clone, Copy)]
struct Sight {
    wall_ms: u64,
    at: Instant,
}

impl Sight {
    /// `None` when the two could not be read together, because this thread was held up.
    fn take(clock: &WallClock) -> Option<Self> {
        let at = Instant::now();
        let wall_ms = clock.unix_time_ms();
        (at.elapsed() <= READ_TOGETHER).then_some(Self { wall_ms, at })
    }

    /// By how many milliseconds the wall clock went forward beyond what has passed since `earlier`; negative if it went back.
    fn ahead_ms(&self, earlier: &Self) -> i64 {
        // Before 1970 it seems to stand still.
        if (self.wall_ms, earlier.wall_ms) == (0, 0) {
            return 0;
        }
        let passed_ms = self.at.duration_since(earlier.at).as_millis();
        let expected_ms = u64::try_from(passed_ms).unwrap_or(u64::MAX).saturating_add(earlier.wall_ms);
        let size_ms = i64::try_from(self.wall_ms.abs_diff(expected_ms)).unwrap_or(i64::MAX);
        if self.wall_ms < expected_ms { -size_ms } else { size_ms }
    }
}

/// Logs and counts jumps of the wall clock for as long as there is a handle to the node.
pub(in crate::engine) async fn watch_wall_clock<M: StateMachine>(node: Weak<Inner<M>>) {
    let Some((clock, node_id)) = node.upgrade().map(|inner| (inner.wall_clock.clone(), inner.config.node_id))
    else {
        return until_ended().await;
    };
    let mut before = None;
    loop {
        match (before, Sight::take(&clock)) {
            (None, Some(now)) => {
                before = Some(now);
                if now.wall_ms == 0 {
                    tracing::warn!(
                        node_id,
                        "this machine's wall clock is set to before 1970: times are shown as if it was 1970 until the clock is set; lifetimes of keys and sessions do not depend on it"
                    );
                }
            }
            (Some(then), Some(now)) if now.ahead_ms(&then).unsigned_abs() >= JUMP_MS => {
                before = Some(now);
                let Some(inner) = node.upgrade() else { return until_ended().await };
                inner.counters.clock_jumps.fetch_add(1, Ordering::Relaxed);
                log_jump(node_id, now.ahead_ms(&then));
                // What is shown follows with the next entry; this is for when there is none.
                Engine::within(inner).note_time().await;
            }
            // Small differences add up until they are a jump.
            (_, None) | (Some(_), Some(_)) => {}
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn log_jump(node_id: NodeId, jump_ms: i64) {
    let direction = if jump_ms < 0 { "back" } else { "forward" };
    let by_ms = jump_ms.unsigned_abs();
    tracing::warn!(
        node_id,
        jump_ms,
        "this machine's wall clock jumped {direction} by {by_ms} ms, or the machine was suspended; lifetimes of keys and sessions do not depend on it"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_jump_is_what_monotonic_time_does_not_explain() {
        let at = Instant::now();
        let earlier = Sight { wall_ms: 50_000, at };
        let later = |wall_ms| Sight { wall_ms, at: at + Duration::from_millis(250) };
        assert_eq!(later(50_250).ahead_ms(&earlier), 0);
        assert_eq!(later(95_250).ahead_ms(&earlier), 45_000);
        assert_eq!(later(250).ahead_ms(&earlier), -50_000);
        assert_eq!(later(u64::MAX).ahead_ms(&earlier), i64::MAX);
        let before_1970 = Sight { wall_ms: 0, at };
        assert_eq!(later(0).ahead_ms(&before_1970), 0, "told once");
    }
}
