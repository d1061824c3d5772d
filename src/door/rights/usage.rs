//! What one caller takes of a node at a time, within what its credential allows. Callers with credentials of one kind and the same name are one caller.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::grants::CallerLimits;

/// Callers that are remembered; with one more those are forgotten that have nothing under way and have not asked for long.
const MOST_CALLERS: usize = 4096;
/// A caller that has been silent may ask for what is allowed in this time at once.
const BURST: Duration = Duration::from_secs(1);

/// What a caller has under way, and how much it has asked for of late.
#[derive(Debug)]
pub(crate) struct CallerUsage {
    calls: AtomicU32,
    /// When what has been asked for is paid for, at so many requests a second.
    paid: Mutex<Instant>,
}

/// A call that counts for its caller as long as this is there.
#[derive(Debug)]
pub(crate) struct CountedCall(Arc<CallerUsage>);

impl Drop for CountedCall {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

/// As far back as what was not asked for counts.
fn before(now: Instant) -> Instant {
    now.checked_sub(BURST).unwrap_or(now)
}

impl CallerUsage {
    fn new() -> Self {
        Self { calls: AtomicU32::new(0), paid: Mutex::new(before(Instant::now())) }
    }

    /// One more call; none if there are as many as there may be.
    pub(super) fn begin(self: &Arc<Self>, limits: CallerLimits) -> Option<CountedCall> {
        let most = limits.max_calls.unwrap_or(u32::MAX);
        let begun = self.calls.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |calls| {
            calls.checked_add(1).filter(|calls| *calls <= most)
        });
        begun.is_ok().then(|| CountedCall(self.clone()))
    }

    /// One more request; or how long to wait before it may be made, and then it counts as made.
    pub(super) fn ask(&self, limits: CallerLimits) -> Duration {
        let Some(rate) = limits.requests_per_second.filter(|rate| *rate > 0) else { return Duration::ZERO };
        let now = Instant::now();
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        *paid = (*paid).max(before(now)) + Duration::from_secs(1) / rate;
        paid.saturating_duration_since(now)
    }

    /// Takes back the last of them.
    pub(super) fn unask(&self, limits: CallerLimits) {
        if let Some(rate) = limits.requests_per_second.filter(|rate| *rate > 0) {
            let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
            *paid -= Duration::from_secs(1) / rate;
        }
    }

    fn is_idle(&self) -> bool {
        let paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        self.calls.load(Ordering::Relaxed) == 0 && paid.elapsed() >= BURST
    }
}

/// The kind of a credential, and the name that it gives.
type CallerName = (&'static str, Arc<str>);

/// Callers by the kinds of their credentials and their names.
#[derive(Debug)]
pub(super) struct Usages {
    known: Mutex<HashMap<CallerName, Arc<CallerUsage>>>,
    /// Of all those together for whom there is no room, so that many names are no way around a limit.
    others: Arc<CallerUsage>,
}

impl Default for Usages {
    fn default() -> Self {
        Self { known: Mutex::default(), others: Arc::new(CallerUsage::new()) }
    }
}

impl Usages {
    /// That of the caller called `name`, known by a credential of this `kind`.
    pub(super) fn of(&self, kind: &'static str, name: &Arc<str>) -> Arc<CallerUsage> {
        let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (kind, name.clone());
        if let Some(known) = all.get(&key) {
            return known.clone();
        }
        if all.len() >= MOST_CALLERS {
            all.retain(|_, usage| !usage.is_idle());
        }
        if all.len() >= MOST_CALLERS {
            return self.others.clone();
        }
        let new = Arc::new(CallerUsage::new());
        all.insert(key, new.clone());
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(max_calls: Option<u32>, requests_per_second: Option<u32>) -> CallerLimits {
        CallerLimits { max_calls, requests_per_second }
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_has_so_many_calls_under_way_whichever_way_it_comes() {
        let (usages, name) = (Usages::default(), "app".into());
        let most = limits(Some(2), None);
        let first = usages.of("token", &name).begin(most).unwrap();
        let _second = usages.of("token", &name).begin(most).unwrap();
        assert!(usages.of("token", &name).begin(most).is_none());
        assert!(usages.of("token", &"other".into()).begin(most).is_some(), "others have their own");
        assert!(usages.of("jwt", &name).begin(most).is_some(), "a name of another kind is another one");
        drop(first);
        assert!(usages.of("token", &name).begin(most).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_asks_for_so_much_in_a_second_and_for_a_second_at_once() {
        tokio::time::advance(Duration::from_secs(10)).await;
        let (usage, rate) = (Arc::new(CallerUsage::new()), limits(None, Some(10)));
        let asked = (0..100)
            .filter(|_| {
                usage.ask(rate).is_zero() || {
                    usage.unask(rate);
                    false
                }
            })
            .count();
        assert_eq!(asked, 10);
        tokio::time::advance(Duration::from_millis(500)).await;
        let asked = (0..100)
            .filter(|_| {
                usage.ask(rate).is_zero() || {
                    usage.unask(rate);
                    false
                }
            })
            .count();
        assert_eq!(asked, 5);
        // One that waits for its turn has it later and later.
        let waits: Vec<_> = (0..3).map(|_| usage.ask(rate).as_millis()).collect();
        assert_eq!(waits, [100, 200, 300]);
        assert_eq!(usage.ask(limits(None, None)), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn callers_that_are_gone_are_forgotten() {
        tokio::time::advance(Duration::from_secs(10)).await;
        let usages = Usages::default();
        let kept = usages.of("token", &"kept".into()).begin(limits(Some(1), None)).unwrap();
        for caller in 0..2 * MOST_CALLERS {
            usages.of("token", &caller.to_string().into()).ask(limits(None, Some(1000)));
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert!(usages.known.lock().unwrap().len() <= MOST_CALLERS);
        assert!(
            usages.of("token", &"kept".into()).begin(limits(Some(1), None)).is_none(),
            "it has one under way"
        );
        drop(kept);
    }
}
