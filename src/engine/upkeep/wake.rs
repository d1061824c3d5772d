//! Proposes the command that the state machine asked for in advance, once its time has come, and lets time into the log.
//!
//! Time passes in the log: nothing happens on any node until the leader has proposed the machine's
//! [`wake`](StateMachine::wake) command and it is applied, at the same position everywhere.
//!
//! What has passed since the last entry is known to nodes that were running meanwhile, and to no others. If all nodes stopped
//! at once, keys and sessions would live longer by all of it. So while anything waits for its end, and nothing else is
//! written, the leader writes an entry that says nothing but the time: after a tenth of what the first of them has
//! left, from [`CLOCK_MIN`] to [`CLOCK_MAX`]. It also does so as soon as it leads, and before it is stopped in order.

use std::collections::BTreeMap;
use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::engine::report::state::after;
use crate::engine::stop::until_ended;
use crate::engine::write::Writer;
use crate::engine::{Engine, Inner};
use crate::machine::StateMachine;
use crate::raft::clock::Reading;
use crate::raft::envelope;
use crate::raft::published::Progress;
use crate::types::Role;

/// Between two proposals: what is due close together goes into one.
const PACE: Duration = Duration::from_millis(10);
/// After a proposal that failed.
const PAUSE: Duration = Duration::from_millis(250);
/// Bounds on how long nothing is written before an entry is for its time.
const CLOCK_MIN: Duration = Duration::from_secs(1);
/// See [`CLOCK_MIN`].
const CLOCK_MAX: Duration = Duration::from_secs(10);
/// How long a node tries to write such an entry when it is being stopped, or its wall clock was set.
const NOTE_PATIENCE: Duration = Duration::from_secs(1);

/// What is to be proposed next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NextProposal {
    /// The wake-up of the machine in this place, after this long.
    WakeUp(usize, Duration),
    /// An entry for its time, after this long.
    Clock(Duration),
}

/// What a leader has to propose next, when it has applied `progress` and its clocks show `reading`. `may_wake` tells whether
/// the machine in a place has a wake-up command, which is not to wait.
fn next(progress: &Progress, reading: &Reading, may_wake: impl Fn(usize) -> bool) -> Option<NextProposal> {
    let Progress { clock, wakes, sessions, .. } = progress;
    if wakes.first_ms().is_none() && *sessions == 0 {
        return None;
    }
    if !clock.goes_on_at(reading) {
        return Some(NextProposal::Clock(Duration::ZERO));
    }
    let now_ms = clock.elapsed_at(reading);
    // One millisecond later, because readings are rounded down.
    let left = |wake_ms: u64| {
        Duration::from_millis(wake_ms.saturating_sub(now_ms).saturating_add(u64::from(wake_ms >= now_ms)))
    };
    let unwritten = Duration::from_millis(now_ms - clock.elapsed_ms);
    let pause = wakes
        .first_ms()
        .map_or(CLOCK_MAX, |first| (left(first).saturating_add(unwritten) / 10).clamp(CLOCK_MIN, CLOCK_MAX));
    // What a new leader has counted goes into the log at once: should it fail, and one lead that was restarted, nobody else may
    // have counted it.
    let is_first = reading.term > clock.term;
    let clock_in = if is_first { Duration::ZERO } else { pause.saturating_sub(unwritten) };
    let first = wakes.iter().filter(|(place, _)| may_wake(*place)).min_by_key(|(_, at_ms)| *at_ms);
    match first.map(|(place, at_ms)| (place, left(at_ms))) {
        Some((place, left)) if left <= clock_in => Some(NextProposal::WakeUp(place, left)),
        _ => Some(NextProposal::Clock(clock_in)),
    }
}

/// Runs for as long as there is a handle to the node.
pub(in crate::engine) async fn run<M: StateMachine>(node: Weak<Inner<M>>) {
    let Some((mut progress, mut state)) =
        node.upgrade().map(|inner| (inner.core.published().watch(), inner.state.clone()))
    else {
        return until_ended().await;
    };
    // Machines whose wake-ups were refused, and until when others have their turn.
    let mut refused: BTreeMap<usize, Instant> = BTreeMap::new();
    loop {
        let leads = state.borrow_and_update().role == Role::Leader;
        let applied = *progress.borrow_and_update();
        let Some(reading) = node.upgrade().map(|inner| inner.reading()) else { return until_ended().await };
        refused.retain(|_, until| Instant::now() < *until);
        let may_wake = |place| !refused.contains_key(&place) && wake_of::<M>(place).is_some();
        let next = if leads { next(&applied, &reading, may_wake) } else { None };
        let due_in = match next {
            Some(NextProposal::WakeUp(place, Duration::ZERO)) => {
                let Some(inner) = node.upgrade() else { return until_ended().await };
                if !wake(&Engine::within(inner), place).await {
                    refused.insert(place, Instant::now() + PAUSE);
                }
                tokio::time::sleep(PACE).await;
                continue;
            }
            Some(NextProposal::Clock(Duration::ZERO)) => {
                let Some(inner) = node.upgrade() else { return until_ended().await };
                let pause = if write_clock(&Engine::within(inner)).await { PACE } else { CLOCK_MIN };
                tokio::time::sleep(pause).await;
                continue;
            }
            Some(NextProposal::WakeUp(_, due_in) | NextProposal::Clock(due_in)) => Some(due_in),
            None => None,
        };
        let turn_in = refused.values().min().map(|until| until.saturating_duration_since(Instant::now()));
        let due_in = due_in.map(|due_in| turn_in.map_or(due_in, |turn_in| due_in.min(turn_in)));
        let alive = tokio::select! {
            changed = progress.changed() => changed.is_ok(),
            changed = state.changed() => changed.is_ok(),
            () = after(due_in) => true,
        };
        if !alive {
            return until_ended().await;
        }
        // A busy machine advances with every batch; that often the deadline need not be looked at.
        tokio::time::sleep(PACE.min(due_in.unwrap_or(PACE))).await;
    }
}

/// The wake-up command of the machine in a `place`.
fn wake_of<M: StateMachine>(place: usize) -> Option<M::Command> {
    M::wake_of(M::MACHINES.get(place)?.machine)
}

/// Whether the command of the machine in this `place` was applied.
async fn wake<M: StateMachine>(engine: &Engine<M>, place: usize) -> bool {
    let Some(command) = wake_of::<M>(place) else { return false };
    engine.inner.counters.wake_ups.fetch_add(1, Ordering::Relaxed);
    let (done, outcome) = oneshot::channel();
    engine
        .propose_own(command, move |result| {
            let _ = done.send(result.map(|_| ()));
        })
        .await;
    match outcome.await {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            tracing::debug!(%error, "the machine's wake-up was not applied; it is proposed again");
            false
        }
        Err(_) => false,
    }
}

/// Writes the time into the log. Whether that was applied.
async fn write_clock<M: StateMachine>(engine: &Engine<M>) -> bool {
    engine.inner.counters.clock_entries.fetch_add(1, Ordering::Relaxed);
    let written = engine.write_envelope(Writer::Node, envelope::seal_clock(engine.inner.reading())).await;
    if let Err(error) = &written {
        tracing::debug!(%error, "the time is not in the log; it is written again");
    }
    written.is_ok()
}

impl<M: StateMachine> Engine<M> {
    /// Writes into the log how much time has passed, and what the wall clock shows, if this node leads and anything waits for its
    /// end: before the node stops, and when its wall clock was set.
    pub(in crate::engine) async fn note_time(&self) {
        let core = &self.inner.core;
        let Progress { wakes, sessions, .. } = core.published().progress();
        let leads = core.metrics().role == Role::Leader && !core.is_handing_over();
        if leads && (wakes.first_ms().is_some() || sessions > 0) {
            let written = tokio::time::timeout(NOTE_PATIENCE, write_clock(self)).await;
            if !matches!(written, Ok(true)) {
                tracing::debug!("the time could not be written into the log");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Wakes;
    use crate::types::ClusterClock;

    fn progress(wake_ms: Option<u64>, sessions: usize) -> Progress {
        let clock = ClusterClock { elapsed_ms: 100_000, wall_offset_ms: 0, term: 2, counted_ms: Some(5_000) };
        let mut wakes = Wakes::default();
        wakes.set(0, wake_ms);
        Progress { clock, wakes, sessions, ..Progress::default() }
    }

    fn at(counted_ms: u64) -> Reading {
        Reading { wall_ms: 0, term: 2, counted_ms }
    }

    fn all(_: usize) -> bool {
        true
    }

    fn none(_: usize) -> bool {
        false
    }

    #[test]
    fn one_that_is_refused_does_not_hold_up_the_others() {
        let mut both = progress(Some(90_000), 0);
        both.wakes.set(3, Some(99_000));
        assert_eq!(next(&both, &at(5_000), all), Some(NextProposal::WakeUp(0, Duration::ZERO)));
        let second = |place| place == 3;
        assert_eq!(next(&both, &at(5_000), second), Some(NextProposal::WakeUp(3, Duration::ZERO)));
        assert_eq!(
            next(&both, &at(5_000), none),
            Some(NextProposal::Clock(CLOCK_MIN)),
            "time goes on all the same"
        );
    }

    #[test]
    fn time_is_written_while_something_waits_for_it() {
        let millis = Duration::from_millis;
        assert_eq!(next(&progress(None, 0), &at(5_000), all), None, "nothing waits");
        let sessions = progress(None, 3);
        assert_eq!(next(&sessions, &at(5_000), all), Some(NextProposal::Clock(CLOCK_MAX)));
        assert_eq!(next(&sessions, &at(11_000), all), Some(NextProposal::Clock(millis(4_000))));
        assert_eq!(next(&sessions, &at(15_000), all), Some(NextProposal::Clock(Duration::ZERO)));
        let hour = progress(Some(3_700_000), 0);
        assert_eq!(next(&hour, &at(5_000), all), Some(NextProposal::Clock(CLOCK_MAX)));
        let soon = progress(Some(130_000), 0);
        assert_eq!(
            next(&soon, &at(5_000), all),
            Some(NextProposal::Clock(Duration::from_micros(3_000_100))),
            "a tenth"
        );
        assert_eq!(next(&soon, &at(7_000), all), Some(NextProposal::Clock(Duration::from_micros(1_000_100))));
        let next_second = progress(Some(100_600), 0);
        assert_eq!(next(&next_second, &at(5_000), all), Some(NextProposal::WakeUp(0, millis(601))));
        assert_eq!(
            next(&next_second, &at(5_000), none),
            Some(NextProposal::Clock(CLOCK_MIN)),
            "it has no wake-up"
        );
        assert_eq!(next(&next_second, &at(5_600), all), Some(NextProposal::WakeUp(0, millis(1))));
        assert_eq!(next(&next_second, &at(5_601), all), Some(NextProposal::WakeUp(0, Duration::ZERO)));
        assert_eq!(next(&next_second, &at(9_000), all), Some(NextProposal::WakeUp(0, Duration::ZERO)));
        assert_eq!(next(&progress(Some(u64::MAX), 0), &at(5_000), all), Some(NextProposal::Clock(CLOCK_MAX)));
    }

    #[test]
    fn time_that_does_not_go_on_is_written_at_once() {
        let mut stuck = progress(Some(200_000), 0);
        stuck.clock.counted_ms = None;
        assert_eq!(next(&stuck, &at(9_000), all), Some(NextProposal::Clock(Duration::ZERO)));
        let later = Reading { term: 3, ..at(9_000) };
        assert_eq!(next(&stuck, &later, all), Some(NextProposal::Clock(Duration::ZERO)), "a new leader");
        assert_eq!(next(&progress(None, 1), &later, all), Some(NextProposal::Clock(Duration::ZERO)));
        assert_eq!(
            next(&progress(Some(100_000), 0), &later, all),
            Some(NextProposal::WakeUp(0, Duration::ZERO))
        );
    }
}
