//! Decides when a node that has ended is reported and started again. Pure: it is told the time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use quorate_cluster::Exit;

use crate::types::NodeId;

/// Pause before the first restart; doubled with every further one.
const BACKOFF_MIN_S: u64 = 1;
/// Longest pause. A node that cannot start is tried at this rate for ever, and costs next to nothing.
const BACKOFF_MAX_S: u64 = 30;
/// A node that ran for this long has started well: its next failure is a first one.
const STABLE_S: u64 = 60;

/// What to do about a node now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum SupervisorEvent {
    /// It has ended: say so, once.
    Ended {
        /// How.
        exit: Exit,
        /// When [`SupervisorEvent::Restart`] will follow, if it will.
        restart_in: Option<Duration>,
    },
    /// Start it.
    Restart,
}

/// The memory of what has ended when.
#[derive(Debug)]
pub(super) struct Supervisor {
    restart: bool,
    nodes: BTreeMap<NodeId, WatchedNode>,
}

#[derive(Debug)]
struct WatchedNode {
    running_since: Option<Instant>,
    failures: u32,
    restart_at: Option<Instant>,
}

impl Supervisor {
    pub(super) fn new(restart: bool) -> Self {
        Self { restart, nodes: BTreeMap::new() }
    }

    pub(super) fn restarts(&self) -> bool {
        self.restart
    }

    /// `exit` is how the node's process ended, or `None` while it runs. Call it regularly for every node.
    pub(super) fn observe(
        &mut self,
        now: Instant,
        node_id: NodeId,
        exit: Option<Exit>,
    ) -> Option<SupervisorEvent> {
        let node = self.nodes.entry(node_id).or_insert(WatchedNode {
            running_since: Some(now),
            failures: 0,
            restart_at: None,
        });
        let Some(exit) = exit else {
            node.running_since.get_or_insert(now);
            return None;
        };
        if let Some(since) = node.running_since.take() {
            if now - since >= Duration::from_secs(STABLE_S) {
                node.failures = 0;
            }
            let restart_in = self.restart.then(|| backoff(node.failures));
            node.failures = node.failures.saturating_add(1);
            node.restart_at = restart_in.map(|pause| now + pause);
            return Some(SupervisorEvent::Ended { exit, restart_in });
        }
        if node.restart_at.is_some_and(|at| now >= at) {
            // Should starting fail, the node stays ended, and this is the next attempt's time.
            node.restart_at = Some(now + backoff(node.failures));
            node.failures = node.failures.saturating_add(1);
            return Some(SupervisorEvent::Restart);
        }
        None
    }
}

fn backoff(failures: u32) -> Duration {
    let doubled = BACKOFF_MIN_S.checked_shl(failures.min(16)).unwrap_or(BACKOFF_MAX_S);
    Duration::from_secs(doubled.min(BACKOFF_MAX_S))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    fn ended(pid: u32) -> Option<Exit> {
        Some(Exit { pid, status: ExitStatus::from_raw(9) })
    }

    #[test]
    fn an_end_is_reported_once_and_left_to_the_user() {
        let mut supervisor = Supervisor::new(false);
        let now = Instant::now();
        assert_eq!(supervisor.observe(now, 1, None), None);
        let event = supervisor.observe(now, 1, ended(7));
        assert!(matches!(
            event,
            Some(SupervisorEvent::Ended { exit: Exit { pid: 7, .. }, restart_in: None })
        ));
        for seconds in [1, 100, 10_000] {
            assert_eq!(supervisor.observe(now + Duration::from_secs(seconds), 1, ended(7)), None);
        }
    }

    #[test]
    fn a_crash_loop_slows_down_and_a_long_run_forgives() {
        let mut supervisor = Supervisor::new(true);
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for pid in 1..8 {
            assert_eq!(supervisor.observe(now, 1, None), None);
            let Some(SupervisorEvent::Ended { restart_in: Some(pause), .. }) =
                supervisor.observe(now, 1, ended(pid))
            else {
                panic!("not reported")
            };
            pauses.push(pause.as_secs());
            assert_eq!(supervisor.observe(now, 1, ended(pid)), None, "before its time");
            now += pause;
            assert_eq!(supervisor.observe(now, 1, ended(pid)), Some(SupervisorEvent::Restart));
        }
        assert!(pauses.windows(2).all(|pair| pair[0] < pair[1] || pair[1] == BACKOFF_MAX_S), "{pauses:?}");
        assert_eq!((pauses[0], pauses[6]), (BACKOFF_MIN_S, BACKOFF_MAX_S));

        assert_eq!(supervisor.observe(now, 1, None), None);
        now += Duration::from_secs(STABLE_S);
        let event = supervisor.observe(now, 1, ended(9));
        let expected = Duration::from_secs(BACKOFF_MIN_S);
        assert!(
            matches!(event, Some(SupervisorEvent::Ended { restart_in: Some(pause), .. }) if pause == expected)
        );
    }
}
