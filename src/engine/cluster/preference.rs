//! When a node that prefers to lead may ask for the lead: pure, given what the node is and when.

use std::time::Duration;

use tokio::time::Instant;

/// How long a disk must have been well, after it was not, before its node asks for the lead.
pub(super) const WELL_FOR: Duration = Duration::from_secs(60);
/// The pause after a lead that did not come, or did not last.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// A lead that has lasted this long is no failure when it ends.
const LASTS: Duration = Duration::from_secs(60);

/// When a node that prefers to lead may ask for the lead, so that the lead does not go to and fro between a node that
/// prefers it and others that are fit for it.
#[derive(Debug)]
pub(super) struct Preference {
    not_before: Option<Instant>,
    pause: Duration,
    /// Since when this node leads.
    leads_since: Option<Instant>,
    /// The term in which it has asked for the lead.
    pub(super) asked_in: Option<u64>,
}

impl Preference {
    pub(super) fn new() -> Self {
        Self { not_before: None, pause: FIRST_PAUSE, leads_since: None, asked_in: None }
    }

    /// Takes in what the node is at `now`.
    pub(super) fn look(&mut self, now: Instant, leads: bool, term: u64, is_well: bool) {
        if !is_well {
            self.wait_until(now + WELL_FOR);
        }
        match (leads, self.leads_since) {
            (true, None) => (self.leads_since, self.asked_in) = (Some(now), None),
            (true, Some(_)) => {}
            (false, Some(since)) => {
                if now.duration_since(since) >= LASTS {
                    self.pause = FIRST_PAUSE;
                }
                self.leads_since = None;
                self.back_off(now);
            }
            (false, None) if self.asked_in.is_some_and(|asked| asked < term) => {
                // An election came of it, and another outcome.
                self.asked_in = None;
                self.back_off(now);
            }
            (false, None) => {}
        }
    }

    pub(super) fn may_ask(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|at| now >= at)
    }

    fn back_off(&mut self, now: Instant) {
        self.wait_until(now + self.pause);
        self.pause = self.pause.saturating_mul(2).min(LONGEST_PAUSE);
    }

    fn wait_until(&mut self, at: Instant) {
        self.not_before = self.not_before.max(Some(at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_disk_must_have_been_well_for_a_while() {
        let (mut preference, start) = (Preference::new(), Instant::now());
        preference.look(start, false, 1, true);
        assert!(preference.may_ask(start), "nothing was wrong yet");
        preference.look(start, false, 1, false);
        preference.look(start + SECOND, false, 1, true);
        assert!(!preference.may_ask(start + WELL_FOR - SECOND));
        assert!(preference.may_ask(start + WELL_FOR));
    }

    #[test]
    fn a_lead_that_does_not_last_or_does_not_come_makes_the_pause_longer() {
        let (mut preference, start) = (Preference::new(), Instant::now());
        preference.look(start, true, 2, true);
        preference.look(start + SECOND, false, 3, true);
        let lost = start + SECOND;
        assert!(!preference.may_ask(lost + FIRST_PAUSE - SECOND));
        assert!(preference.may_ask(lost + FIRST_PAUSE));
        // It asks, and somebody else is elected.
        preference.asked_in = Some(3);
        let asked = lost + FIRST_PAUSE;
        preference.look(asked, false, 3, true);
        assert!(preference.may_ask(asked), "no election yet");
        preference.look(asked, false, 4, true);
        assert!(!preference.may_ask(asked + FIRST_PAUSE * 2 - SECOND));
        assert!(preference.may_ask(asked + FIRST_PAUSE * 2));
        for _ in 0..20 {
            preference.back_off(asked);
        }
        assert!(preference.may_ask(asked + LONGEST_PAUSE));
    }

    #[test]
    fn a_lead_that_has_lasted_is_no_failure() {
        let (mut preference, start) = (Preference::new(), Instant::now());
        preference.back_off(start);
        let asked = start + FIRST_PAUSE;
        preference.look(asked, true, 2, true);
        preference.look(asked + LASTS, true, 2, true);
        preference.look(asked + LASTS, false, 3, true);
        assert!(preference.may_ask(asked + LASTS + FIRST_PAUSE));
    }
}
