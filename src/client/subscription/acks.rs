//! What a node is told of how far its follower is.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::proto::replication::SubscribeRequest;

/// What was delivered, taken and acknowledged. Shared with the handle of the subscription, which may close it.
#[derive(Debug)]
pub(super) struct Acks(Mutex<AckProgress>);

#[derive(Debug)]
struct AckProgress {
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
    /// Whether the caller wants to hear how far the node is, and it was not told so yet.
    wants_progress: bool,
    /// How many bytes are acknowledged at a time.
    step_bytes: u64,
}

impl Acks {
    pub(super) fn new(from: u64, window_bytes: u64) -> Self {
        const WITHOUT_WINDOW_BYTES: u64 = 4 * 1024 * 1024;
        let window_bytes = if window_bytes == 0 { WITHOUT_WINDOW_BYTES } else { window_bytes };
        Self(Mutex::new(AckProgress {
            to: None,
            delivered: from,
            taken: from,
            acked: from,
            unacked_bytes: 0,
            asked: false,
            wants_progress: false,
            step_bytes: (window_bytes / 4).max(1),
        }))
    }

    fn progress(&self) -> MutexGuard<'_, AckProgress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream begins after `from`; what it is to be told comes out there.
    pub(super) fn begin(&self, from: u64) -> watch::Receiver<SubscribeRequest> {
        let (to, acks) = watch::channel(SubscribeRequest::default());
        let mut progress = self.progress();
        progress.to = Some(to);
        (progress.acked, progress.unacked_bytes, progress.asked) = (from, 0, false);
        acks
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
        progress.wants_progress = true;
        progress.send();
    }

    /// The stream has taken `message`, to send it.
    pub(super) fn sent(&self, message: &SubscribeRequest) {
        if message.progress {
            self.progress().wants_progress = false;
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
            let (ack_seq, progress) = (self.taken, self.wants_progress);
            let message = SubscribeRequest { ack_seq, heartbeat, progress, ..SubscribeRequest::default() };
            to.send_replace(message);
        }
    }
}
