//! What a node is told of how far its follower is.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::proto::replication::SubscribeRequest;

/// What was delivered, taken and acknowledged. Shared with the handle of the subscription, which may close it.
#[derive(Debug)]
pub(super) struct Acks(Mutex<AckProgress>);

/// Whether the caller wants to hear how far the node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProgressWish {
    No,
    /// The open stream is to say so.
    Wanted,
    /// The open stream has said so, and nothing has come of it yet.
    Said,
}

#[derive(Debug)]
struct AckProgress {
    /// Which stream is open: the first is 1.
    stream: u64,
    /// To the open stream. Only the newest is worth sending.
    to: Option<watch::Sender<SubscribeRequest>>,
    /// Everything up to here was delivered.
    delivered: u64,
    /// And the caller has asked for more.
    taken: u64,
    /// What the open stream has been told.
    acked: u64,
    /// Delivered since.
    unacked_bytes: u64,
    /// Whether the node waits to hear that somebody is there.
    asked: bool,
    wish: ProgressWish,
    /// How many bytes are acknowledged at a time.
    step_bytes: u64,
}

impl Acks {
    pub(super) fn new(from: u64, window_bytes: u64) -> Self {
        const WITHOUT_WINDOW_BYTES: u64 = 4 * 1024 * 1024;
        let window_bytes = if window_bytes == 0 { WITHOUT_WINDOW_BYTES } else { window_bytes };
        Self(Mutex::new(AckProgress {
            stream: 0,
            to: None,
            delivered: from,
            taken: from,
            acked: from,
            unacked_bytes: 0,
            asked: false,
            wish: ProgressWish::No,
            step_bytes: (window_bytes / 4).max(1),
        }))
    }

    fn progress(&self) -> MutexGuard<'_, AckProgress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream begins after `from`: its number, and what it is to be told comes out there.
    pub(super) fn begin(&self, from: u64) -> (u64, watch::Receiver<SubscribeRequest>) {
        let (to, acks) = watch::channel(SubscribeRequest::default());
        let mut progress = self.progress();
        progress.stream += 1;
        (progress.acked, progress.unacked_bytes, progress.asked) = (from, 0, false);
        if progress.wish != ProgressWish::No {
            // What the node of before has heard of it is lost with its stream.
            progress.wish = ProgressWish::Wanted;
            to.send_replace(SubscribeRequest { progress: true, ..SubscribeRequest::default() });
        }
        progress.to = Some(to);
        (progress.stream, acks)
    }

    /// An entry of `bytes` was delivered, and with it everything up to `upto`.
    pub(super) fn delivered(&self, upto: u64, bytes: u64) {
        let mut progress = self.progress();
        progress.delivered = progress.delivered.max(upto);
        progress.unacked_bytes = progress.unacked_bytes.saturating_add(bytes);
    }

    /// Everything up to `upto` was delivered, and the caller asks for more: acknowledges it if that is due.
    pub(super) fn taken(&self, upto: u64) {
        let mut progress = self.progress();
        progress.delivered = progress.delivered.max(upto);
        progress.taken = progress.taken.max(upto);
        let is_due = progress.unacked_bytes >= progress.step_bytes && progress.taken > progress.acked;
        if is_due || progress.asked {
            progress.send();
        }
    }

    /// The node wants to hear that somebody is there.
    pub(super) fn ask(&self) {
        self.progress().asked = true;
    }

    /// The caller wants to hear how far the node is.
    pub(super) fn want_progress(&self) {
        let mut progress = self.progress();
        progress.wish = ProgressWish::Wanted;
        progress.send();
    }

    /// The stream of this number has taken `message`, to send it.
    pub(super) fn sent(&self, stream: u64, message: &SubscribeRequest) {
        let mut progress = self.progress();
        if message.progress && progress.stream == stream && progress.wish == ProgressWish::Wanted {
            progress.wish = ProgressWish::Said;
        }
    }

    /// The node has said how far it is.
    pub(super) fn progress_came(&self) {
        let mut progress = self.progress();
        if progress.wish == ProgressWish::Said {
            progress.wish = ProgressWish::No;
        }
    }

    /// Whether something was taken that is not acknowledged.
    pub(super) fn owes(&self) -> bool {
        let progress = self.progress();
        progress.taken > progress.acked
    }

    /// Acknowledges what was taken.
    pub(super) fn settle(&self) {
        self.progress().send();
    }

    /// The caller is done with everything that was delivered. Acknowledges it, and says how far that is.
    pub(super) fn finish(&self) -> u64 {
        let mut progress = self.progress();
        progress.taken = progress.delivered;
        progress.send();
        progress.taken
    }
}

impl AckProgress {
    fn send(&mut self) {
        let heartbeat = std::mem::take(&mut self.asked);
        self.acked = self.acked.max(self.taken);
        self.unacked_bytes = 0;
        if let Some(to) = &self.to {
            // 0 acknowledges nothing, and says that the follower lives.
            let (ack_seq, progress) = (self.taken, self.wish == ProgressWish::Wanted);
            let message = SubscribeRequest { ack_seq, heartbeat, progress, ..SubscribeRequest::default() };
            to.send_replace(message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the stream is to send, taken by it.
    fn told(acks: &mut watch::Receiver<SubscribeRequest>) -> Option<SubscribeRequest> {
        acks.has_changed().unwrap().then(|| acks.borrow_and_update().clone())
    }

    #[test]
    fn a_wish_for_progress_lives_until_progress_has_come() {
        let acks = Acks::new(4, 0);
        acks.want_progress();
        let (first, mut to) = acks.begin(4);
        let message = told(&mut to).expect("the stream says it at once");
        assert_eq!((message.progress, message.ack_seq), (true, 0));
        // A heartbeat that was sent before the node could know.
        acks.progress_came();
        acks.settle();
        assert!(told(&mut to).unwrap().progress);
        acks.sent(first, &message);
        acks.settle();
        assert!(!told(&mut to).unwrap().progress, "it is said once on a stream");

        // The connection breaks before the node has heard it.
        let (second, mut to) = acks.begin(4);
        assert!(told(&mut to).unwrap().progress);
        acks.sent(first, &message);
        acks.settle();
        assert!(told(&mut to).unwrap().progress, "what a stream of before takes is said to nobody");
        acks.sent(second, &message);
        acks.progress_came();
        let (_, mut to) = acks.begin(4);
        assert_eq!(told(&mut to), None, "the wish was fulfilled");
    }
}
