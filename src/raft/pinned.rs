//! What a view that is read for long keeps alive.
//!
//! A view shares with the machine what has not changed since it was taken, and keeps alive the rest: what has been
//! overwritten or removed. That is not seen in the size of the state. It is bounded by what came into the state since,
//! less what the state has grown: commands bring no more than their bytes and a little for each entry. Whatever several
//! views keep alive together was all replaced since the oldest of them was taken, so the oldest bounds them all.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use super::published::Progress;

/// What an entry may put into the state beyond the bytes of its command.
const ENTRY_BYTES: u64 = 256;
/// How long a view may keep too much before that is noticed. Batches come faster, and there may be many views.
const NOTICED_WITHIN: Duration = Duration::from_millis(20);

/// How much a view that was taken at some point keeps alive, and how much it may.
#[derive(Debug, Clone)]
pub(crate) struct Pinned {
    taken: Progress,
    now: watch::Receiver<Progress>,
    most_bytes: u64,
}

impl Pinned {
    /// By a view taken at `taken` of the state whose progress is `now`.
    pub(crate) fn new(taken: Progress, now: watch::Receiver<Progress>, most_bytes: u64) -> Self {
        Self { taken, now, most_bytes }
    }

    /// At most so many bytes are kept alive at present.
    pub(crate) fn bytes(&self) -> u64 {
        let now = *self.now.borrow();
        let come = |progress: &Progress| {
            progress.command_bytes + progress.installed_bytes + ENTRY_BYTES * progress.next_index()
        };
        let size = |progress: &Progress| progress.state_bytes.unwrap_or_default();
        (come(&now) + size(&self.taken)).saturating_sub(come(&self.taken) + size(&now))
    }

    /// How many there may be.
    pub(crate) fn most_bytes(&self) -> u64 {
        self.most_bytes
    }

    /// Whether the view must be let go of.
    pub(crate) fn is_too_much(&self) -> bool {
        self.bytes() > self.most_bytes
    }

    /// Returns a moment after the view must be let go of, or when there is no state any more.
    pub(crate) async fn too_much(&mut self) {
        while !self.is_too_much() {
            if self.now.changed().await.is_err() {
                return;
            }
            sleep(NOTICED_WITHIN).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::LogId;

    fn at(index: u64, command_bytes: u64, state_bytes: u64) -> Progress {
        Progress {
            log_id: Some(LogId::new(1, index)),
            command_bytes,
            state_bytes: Some(state_bytes),
            ..Progress::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_replaced_or_removed_counts_and_what_is_added_hardly_does() {
        let taken = at(10, 5_000, 1_000);
        let now = watch::Sender::new(taken);
        let mut pinned = Pinned::new(taken, now.subscribe(), 1_000_000);
        assert_eq!(pinned.bytes(), 0);
        now.send_replace(at(11, 6_000, 2_000));
        assert_eq!(pinned.bytes(), ENTRY_BYTES, "a thousand bytes more");
        now.send_replace(at(12, 6_100, 2_000));
        assert_eq!(pinned.bytes(), 100 + 2 * ENTRY_BYTES, "a hundred overwritten");
        now.send_replace(at(13, 6_100, 0));
        assert_eq!(pinned.bytes(), 2_100 + 3 * ENTRY_BYTES, "all removed");
        now.send_replace(Progress { installed_bytes: 700, ..at(13, 6_100, 700) });
        assert_eq!(pinned.bytes(), 2_100 + 3 * ENTRY_BYTES, "another node's state is not what was removed");
        assert!(!pinned.is_too_much());

        let waiting = async {
            pinned.too_much().await;
            pinned
        };
        let writing = async {
            for bytes in 1..=10 {
                tokio::time::sleep(NOTICED_WITHIN * 2).await;
                now.send_replace(at(13, 6_100 + bytes * 200_000, 0));
            }
        };
        let (pinned, ()) = tokio::join!(waiting, writing);
        assert!(pinned.is_too_much());
    }

    #[tokio::test]
    async fn nothing_is_kept_of_a_state_that_is_gone() {
        let (now, seen) = watch::channel(at(1, 0, 0));
        drop(now);
        Pinned::new(at(1, 0, 0), seen, 1).too_much().await;
    }
}
