//! What was sent to a follower and what of it is acknowledged: how much more may be sent.

use std::collections::VecDeque;

/// What was sent is remembered in so many stretches at most: an acknowledgement in the middle of one counts with the next.
const MAX_STRETCHES: usize = 256;

/// Bytes of some positions, one after the other.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    /// The last position.
    upto: u64,
    bytes: u64,
    /// Log time there.
    time_ms: u64,
}

/// How far a follower is, as far as it says, and what may be sent.
///
/// What there is to say of one position may be more than the window. It is sent all the same once everything before that position is
/// acknowledged: the follower cannot acknowledge a position that it does not have as a whole.
#[derive(Debug)]
pub(super) struct Credit {
    /// 0 for none.
    window_bytes: u64,
    /// The last position of which something was sent, and the last one before it.
    sent: u64,
    before: u64,
    /// The last position that may be acknowledged.
    told: u64,
    acked: u64,
    acked_time_ms: u64,
    has_acked: bool,
    unacked: VecDeque<Stretch>,
    unacked_bytes: u64,
}

/// An acknowledgement of what was not sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotSent {
    pub(super) told: u64,
}

impl Credit {
    /// One for whom everything up to `from` is acknowledged.
    pub(super) fn new(window_bytes: u64, from: u64) -> Self {
        Self {
            window_bytes,
            sent: from,
            before: from,
            told: from,
            acked: from,
            acked_time_ms: 0,
            has_acked: false,
            unacked: VecDeque::new(),
            unacked_bytes: 0,
        }
    }

    /// Whether `bytes` may be sent that begin with position `seq`.
    pub(super) fn may_begin(&self, seq: u64, bytes: usize) -> bool {
        let before = if seq == self.sent { self.before } else { self.sent };
        self.acked >= before || self.unacked_bytes == 0 || self.fits(bytes)
    }

    /// Whether `bytes` fit into the window.
    pub(super) fn fits(&self, bytes: usize) -> bool {
        self.window_bytes == 0 || self.unacked_bytes.saturating_add(bytes as u64) <= self.window_bytes
    }

    /// Whether so much of the window is free that it is worth while to go on: acknowledgements come in small pieces.
    pub(super) fn is_roomy(&self) -> bool {
        let most = self.window_bytes - self.window_bytes / 4;
        self.window_bytes == 0 || self.unacked_bytes <= most || self.acked >= self.before
    }

    /// Sent: `bytes` up to position `upto`, of log time `time_ms`; `before` it another one may have been in them.
    pub(super) fn sent(&mut self, before: Option<u64>, upto: u64, bytes: usize, time_ms: u64) {
        if let Some(before) = before {
            self.step(before);
        }
        self.step(upto);
        self.tell(upto);
        let bytes = bytes as u64;
        self.unacked_bytes += bytes;
        let is_small = |last: &Stretch| last.bytes < self.window_bytes / MAX_STRETCHES as u64;
        let is_full = self.unacked.len() >= MAX_STRETCHES;
        match self.unacked.back_mut().filter(|last| last.upto == upto || is_small(last) || is_full) {
            Some(last) => *last = Stretch { upto, bytes: last.bytes + bytes, time_ms },
            None => self.unacked.push_back(Stretch { upto, bytes, time_ms }),
        }
    }

    fn step(&mut self, seq: u64) {
        if seq > self.sent {
            (self.before, self.sent) = (self.sent, seq);
        }
    }

    /// The follower was told that it has everything up to `upto`.
    pub(super) fn tell(&mut self, upto: u64) {
        self.told = self.told.max(upto);
    }

    /// Everything up to `seq` is acknowledged. Whether that is more than before.
    ///
    /// # Errors
    /// When it was not sent.
    pub(super) fn ack(&mut self, seq: u64) -> Result<bool, NotSent> {
        if seq > self.told {
            return Err(NotSent { told: self.told });
        }
        let before = (self.acked, self.unacked_bytes);
        self.acked = self.acked.max(seq);
        self.has_acked = true;
        while let Some(first) = self.unacked.front().filter(|first| first.upto <= self.acked) {
            self.unacked_bytes -= first.bytes;
            self.acked_time_ms = first.time_ms;
            self.unacked.pop_front();
        }
        Ok((self.acked, self.unacked_bytes) != before)
    }

    /// How far the follower is, and the log time there. `upto` is what it was sent, of `time_ms`. One that never acknowledges and
    /// has no window is believed to have that.
    pub(super) fn position(&self, upto: u64, time_ms: u64) -> (u64, u64) {
        let acks = self.window_bytes > 0 || self.has_acked;
        match acks && !self.unacked.is_empty() {
            true => (self.acked, self.acked_time_ms),
            false => (upto, time_ms),
        }
    }

    #[cfg(test)]
    pub(super) fn unacked_bytes(&self) -> u64 {
        self.unacked_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: u64 = 64 * 1024;

    #[test]
    fn a_window_holds_back_until_something_is_acknowledged() {
        let mut credit = Credit::new(WINDOW, 7);
        for seq in 8..72 {
            assert!(credit.may_begin(seq, 1024));
            credit.sent(None, seq, 1024, seq);
        }
        assert!(!credit.may_begin(72, 1024) && !credit.is_roomy());
        assert_eq!(credit.position(71, 71).0, 7);
        assert_eq!(credit.ack(20), Ok(true));
        assert_eq!(credit.position(71, 71), (20, 20));
        assert!(credit.may_begin(72, 1024));
        assert_eq!(credit.ack(20), Ok(false));
        assert_eq!(credit.ack(72), Err(NotSent { told: 71 }));
        credit.tell(90);
        assert_eq!(credit.ack(90), Ok(true), "a heartbeat's position can be acknowledged");
        assert_eq!((credit.unacked_bytes(), credit.position(90, 5)), (0, (90, 5)));
    }

    #[test]
    fn one_position_passes_whatever_the_window_says_once_all_before_is_acknowledged() {
        let mut credit = Credit::new(WINDOW, 0);
        credit.sent(None, 5, 10, 0);
        assert!(!credit.may_begin(6, 1 << 20), "something else is not acknowledged");
        credit.ack(5).unwrap();
        for _ in 0..10 {
            assert!(credit.may_begin(6, 1 << 20), "it cannot be acknowledged before it is there");
            credit.sent(None, 6, 1 << 20, 0);
        }
        assert!(!credit.may_begin(7, 1));
        credit.ack(6).unwrap();
        assert!(credit.may_begin(7, 1));
        assert_eq!(credit.unacked_bytes(), 0);
    }

    /// Small stretches are put together: what is before a position may be in one with it.
    #[test]
    fn what_is_remembered_together_holds_up_nothing() {
        let mut credit = Credit::new(WINDOW, 0);
        credit.sent(None, 1, 10, 0);
        credit.sent(None, 2, 2 * WINDOW as usize, 0);
        assert!(!credit.may_begin(2, 10));
        credit.ack(1).unwrap();
        assert!(credit.may_begin(2, 10) && credit.is_roomy());
    }

    #[test]
    fn little_is_remembered_of_a_follower_that_never_acknowledges() {
        let mut credit = Credit::new(0, 0);
        for seq in 1..10_000 {
            assert!(credit.may_begin(seq, usize::MAX));
            credit.sent(None, seq, 100, seq);
        }
        assert_eq!(credit.unacked.len(), MAX_STRETCHES);
        assert_eq!(credit.position(9_999, 1), (9_999, 1));
        credit.ack(9_999).unwrap();
        assert!(credit.unacked.is_empty());
    }
}
