//! What the core has done since it started, counted for metrics and for those who operate the node.
//!
//! Counting is an atomic addition per batch, never per entry where batches exist. Latencies are sampled: of the
//! batches that this leader appends, one at a time is followed to its commit and its application, and then the next one
//! that is appended. What is slow is therefore sampled less often than what is fast, and the histograms' counts
//! are numbers of samples.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::AcqRel, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::clock::LeaderClock;
use super::entry_ages::EntryAges;
pub use super::succession::Succession;
use super::succession::Successions;
use crate::machine::sessions::SessionCounts;
use crate::types::{NodeId, Vote};

/// Upper bounds of a [`Latency`]'s buckets, in microseconds; a last bucket takes what is longer.
pub const LATENCY_BUCKETS_US: [u64; 13] =
    [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 102_400, 409_600, 1_638_400, 6_553_600];

/// Durations, counted by length.
#[derive(Debug, Default)]
pub struct Latency {
    /// How many.
    pub count: AtomicU64,
    /// Summed up, in microseconds.
    pub sum_us: AtomicU64,
    /// By length; see [`LATENCY_BUCKETS_US`].
    pub buckets: [AtomicU64; LATENCY_BUCKETS_US.len() + 1],
}

impl Latency {
    fn observe(&self, duration: Duration) {
        let us = micros(duration);
        let bucket = LATENCY_BUCKETS_US.iter().position(|bound| us <= *bound);
        self.count.fetch_add(1, Relaxed);
        self.sum_us.fetch_add(us, Relaxed);
        self.buckets[bucket.unwrap_or(LATENCY_BUCKETS_US.len())].fetch_add(1, Relaxed);
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Snapshots that were written, sent or installed.
#[derive(Debug, Default)]
pub struct Snapshots {
    /// How many.
    pub count: AtomicU64,
    /// Bytes of their files.
    pub bytes: AtomicU64,
    /// Time they took, in microseconds.
    pub us: AtomicU64,
}

impl Snapshots {
    pub(super) fn add(&self, bytes: u64, took: Duration) {
        self.count.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
        self.us.fetch_add(micros(took), Relaxed);
    }
}

/// What became of sessions; see [`SessionCounts`].
#[derive(Debug, Default)]
pub struct SessionTotals {
    /// Opened.
    pub opened: AtomicU64,
    /// Closed by their owners, or by operators.
    pub closed: AtomicU64,
    /// Closed because they were not used for too long.
    pub expired: AtomicU64,
    /// Closed to make room.
    pub evicted: AtomicU64,
}

impl SessionTotals {
    pub(super) fn add(&self, counts: SessionCounts) {
        let SessionCounts { opened, closed, expired, evicted } = counts;
        self.opened.fetch_add(opened, Relaxed);
        self.closed.fetch_add(closed, Relaxed);
        self.expired.fetch_add(expired, Relaxed);
        self.evicted.fetch_add(evicted, Relaxed);
    }
}

/// Counters of one node since it started. Read at any time; each is exact, but two read one after the other may belong
/// to different moments.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Activity {
    /// What this node counts time by when it leads.
    pub(crate) leader_clock: LeaderClock,
    /// Elections in which this node asked for votes; rounds that ended before, because nobody would have voted for it,
    /// do not count.
    pub elections_started: AtomicU64,
    /// Elections that it won.
    pub elections_won: AtomicU64,
    /// Leaders that it has seen take over, itself included.
    pub leader_changes: AtomicU64,
    /// Batches applied.
    pub apply_batches: AtomicU64,
    /// Entries applied.
    pub applied_entries: AtomicU64,
    /// Time spent applying, in microseconds.
    pub apply_us: AtomicU64,
    /// From this leader's append to the commit of the same entry.
    pub commit: Latency,
    /// From this leader's append to the application of the same entry.
    pub apply: Latency,
    /// Rounds of heartbeats that confirmed this leader for its readers, or failed to.
    pub read_confirmations: AtomicU64,
    /// Reads that shared them.
    pub confirmed_reads: AtomicU64,
    /// Snapshots written from this node's state.
    pub snapshots_built: Snapshots,
    /// Snapshots sent to peers.
    pub snapshots_sent: Snapshots,
    /// Times that sending one went on over another connection.
    pub snapshots_resumed: AtomicU64,
    /// Snapshots taken over from leaders.
    pub snapshots_installed: Snapshots,
    /// Snapshots of this node's state that were refused before they began, for lack of space.
    pub snapshots_not_begun: AtomicU64,
    /// Those that were given up midway, for lack of space.
    pub snapshots_not_written: AtomicU64,
    /// Snapshots of leaders that were not taken: refused, broken off, or not valid.
    pub snapshots_not_received: AtomicU64,
    /// Size of the newest snapshot's file; 0 while there is none.
    pub snapshot_bytes: AtomicU64,
    /// Purges of the log.
    pub purges: AtomicU64,
    /// Writes that were answered with what an earlier attempt had been answered.
    pub repeated_answers: AtomicU64,
    /// Commands that were committed and not applied, because the state would have outgrown its quota.
    pub quota_refusals: AtomicU64,
    /// Writes refused because their session had expired or never was.
    pub expired_sessions: AtomicU64,
    /// What became of sessions, as far as this node has applied it since it started.
    pub sessions: SessionTotals,
    /// Times this node has begun to hand over the lead.
    pub transfers_begun: AtomicU64,
    /// Those after which another node led.
    pub transfers_succeeded: AtomicU64,
    /// Those after which this node gave the lead up, because nobody took it, or won it again.
    pub transfers_failed: AtomicU64,
    /// The ids of all that have been members, as far as this node has applied it since it started. They are as few as changes of
    /// the membership.
    members_seen: Mutex<BTreeSet<NodeId>>,
    leads: AtomicBool,
    hands_over: AtomicBool,
    sample: Mutex<Option<Sample>>,
    /// The term of this node's vote.
    term: AtomicU64,
    successions: Successions,
    pub(super) appended: EntryAges,
    /// Positions that a leader has said to be committed.
    pub(super) told_committed: EntryAges,
    /// Notified of what openraft's progress does not tell.
    pub(super) noticed: Notify,
    pub(super) writes: Writes,
}

/// Whether the log is written to, for one that looks while it is and sleeps while it is not.
#[derive(Debug, Default)]
pub(super) struct Writes {
    since_look: AtomicBool,
    begun: Notify,
}

impl Writes {
    /// A write is about to be submitted. Costs next to nothing when there was another since the last look.
    pub(super) fn submit(&self) {
        if !self.since_look.swap(true, AcqRel) {
            self.begun.notify_one();
        }
    }

    /// A look: whether there was a write since the one before.
    pub(super) fn take(&self) -> bool {
        self.since_look.swap(false, AcqRel)
    }

    /// Waits for the first write after a look that has found none.
    pub(super) async fn submitted(&self) {
        self.begun.notified().await;
    }
}

/// A batch that is followed.
#[derive(Debug, Clone, Copy)]
struct Sample {
    last: u64,
    appended: Instant,
    committed: bool,
}

impl Activity {
    /// The membership that is applied has these members.
    pub(super) fn saw_members(&self, members: impl Iterator<Item = NodeId>) {
        self.members_seen.lock().expect("invariant: no panic under this lock").extend(members);
    }

    /// Whether `node_id` is a member, or was one while this node ran.
    pub fn has_seen_member(&self, node_id: NodeId) -> bool {
        self.members_seen.lock().expect("invariant: no panic under this lock").contains(&node_id)
    }

    /// `vote` is about to be saved by `own`, in the order in which the core decides.
    pub(super) fn voted(&self, own: NodeId, vote: Vote) {
        let won = vote.committed && vote.node_id == own;
        self.term.fetch_max(vote.term, Relaxed);
        let succession = self.successions.voted(vote);
        if !vote.committed {
            self.elections_started.fetch_add(u64::from(vote.node_id == own), Relaxed);
        }
        if let Some((before, why)) = succession {
            let (term, leader) = (vote.term, vote.node_id);
            tracing::info!(node_id = own, term, leader, before, %why, "another leader");
            self.leader_changes.fetch_add(1, Relaxed);
            self.elections_won.fetch_add(u64::from(won), Relaxed);
            self.transfer_ended(if won { &self.transfers_failed } else { &self.transfers_succeeded });
        }
        if !won {
            *self.sample() = None;
        }
        self.leads.store(won, Relaxed);
    }

    /// The term of this node's vote, also when that is just being saved.
    pub(super) fn term(&self) -> u64 {
        self.term.load(Relaxed)
    }

    /// The vote that this node had when it was started.
    pub(super) fn had_voted(&self, vote: Vote) {
        self.term.fetch_max(vote.term, Relaxed);
        if let Some(leader) = self.successions.returns(vote) {
            tracing::info!(
                term = vote.term,
                leader,
                "who led when this node was stopped, and may lead still"
            );
        }
    }

    /// The leader of `term` asks `to` to stand.
    pub(super) fn offered(&self, term: u64, to: NodeId, why: Succession) {
        self.successions.offered(term, to, why);
    }

    /// Why the leader of `term` has asked `to` to stand, if it has.
    pub(super) fn offer(&self, term: u64, to: NodeId) -> Option<Succession> {
        self.successions.offer(term, to)
    }

    /// Why `node_id` leads in `term`, if it is the last leader that this node has heard of.
    pub(crate) fn why_leads(&self, term: u64, node_id: NodeId) -> Option<Succession> {
        self.successions.why(term, node_id)
    }

    /// This node, which leads, offers the lead to another. To offer it to a second one goes on with the same transfer.
    pub(super) fn transfer_begun(&self) {
        if !self.hands_over.swap(true, Relaxed) {
            self.transfers_begun.fetch_add(1, Relaxed);
        }
    }

    /// Nobody took the lead, and this node lets go of it.
    pub(super) fn lead_given_up(&self) {
        self.transfer_ended(&self.transfers_failed);
    }

    fn transfer_ended(&self, how: &AtomicU64) {
        if self.hands_over.swap(false, Relaxed) {
            how.fetch_add(1, Relaxed);
        }
    }

    /// Whether this node's last vote says that it leads.
    pub(super) fn leads(&self) -> bool {
        self.leads.load(Relaxed)
    }

    fn sample(&self) -> std::sync::MutexGuard<'_, Option<Sample>> {
        self.sample.lock().expect("invariant: no panic under this lock")
    }

    /// Entries up to `last` are in the log from now on.
    pub(super) fn appended(&self, last: u64) {
        self.appended.note(last);
        if self.leads() {
            self.sample().get_or_insert_with(|| Sample { last, appended: Instant::now(), committed: false });
        }
    }

    /// Entries after `last` are gone.
    pub(super) fn truncated(&self, last: Option<u64>) {
        self.appended.cut(last);
        *self.sample() = None;
    }

    /// Entries up to `index` are committed.
    pub(super) fn committed(&self, index: u64) {
        if !self.leads() {
            return;
        }
        if let Some(sample) = &mut *self.sample()
            && !sample.committed
            && sample.last <= index
        {
            sample.committed = true;
            self.commit.observe(sample.appended.elapsed());
        }
    }

    /// A leader says that entries up to `index` are committed.
    pub(super) fn told_committed(&self, index: u64) {
        if self.told_committed.note(index) {
            self.noticed.notify_one();
        }
    }

    /// A batch of `entries` up to `index` was applied, which took `took`.
    pub(super) fn applied(&self, entries: usize, index: u64, took: Duration) {
        self.apply_batches.fetch_add(1, Relaxed);
        self.applied_entries.fetch_add(entries as u64, Relaxed);
        self.apply_us.fetch_add(micros(took), Relaxed);
        if !self.leads() {
            return;
        }
        let mut sample = self.sample();
        if let Some(followed) = *sample
            && followed.last <= index
        {
            *sample = None;
            // The core may hand entries over before it notes that they are committed.
            if !followed.committed {
                self.commit.observe(followed.appended.elapsed());
            }
            self.apply.observe(followed.appended.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(latency: &Latency) -> (u64, u64) {
        (latency.count.load(Relaxed), latency.sum_us.load(Relaxed))
    }

    #[test]
    fn elections_are_told_from_the_votes() {
        let activity = Activity::default();
        let vote = |term, node_id, committed| Vote { term, node_id, committed };
        activity.voted(1, vote(1, 2, false));
        activity.voted(1, vote(1, 2, true));
        activity.voted(1, vote(2, 1, false));
        assert!(!activity.leads());
        activity.voted(1, vote(2, 1, true));
        activity.voted(1, vote(2, 1, true));
        assert!(activity.leads());
        activity.voted(1, vote(3, 3, false));
        assert!(!activity.leads());
        let counts = [&activity.elections_started, &activity.elections_won, &activity.leader_changes];
        assert_eq!(counts.map(|count| count.load(Relaxed)), [1, 1, 2]);
    }

    #[test]
    fn a_transfer_ends_once_and_in_one_of_two_ways() {
        let activity = Activity::default();
        let elected = |term, node_id| Vote { term, node_id, committed: true };
        let counts = || {
            let counts =
                [&activity.transfers_begun, &activity.transfers_succeeded, &activity.transfers_failed];
            counts.map(|count| count.load(Relaxed))
        };
        activity.transfer_begun();
        activity.transfer_begun();
        assert_eq!(counts(), [1, 0, 0], "offered to one voter after the other");
        activity.voted(1, elected(2, 2));
        activity.voted(1, elected(3, 3));
        assert_eq!(counts(), [1, 1, 0]);
        activity.transfer_begun();
        activity.lead_given_up();
        activity.voted(1, elected(4, 1));
        assert_eq!(counts(), [2, 1, 1]);
        activity.transfer_begun();
        activity.voted(1, elected(5, 1));
        assert_eq!(counts(), [3, 1, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_batch_at_a_time_is_followed() {
        let activity = Activity::default();
        let ms = Duration::from_millis(1);
        activity.appended(5);
        activity.applied(6, 5, ms);
        assert_eq!(counted(&activity.apply), (0, 0), "a follower measures nothing");
        activity.voted(1, Vote { term: 1, node_id: 1, committed: true });
        activity.appended(7);
        tokio::time::advance(ms).await;
        activity.appended(9);
        activity.committed(6);
        assert_eq!(counted(&activity.commit), (0, 0));
        activity.committed(9);
        tokio::time::advance(ms).await;
        activity.committed(10);
        activity.applied(2, 7, ms);
        assert_eq!((counted(&activity.commit), counted(&activity.apply)), ((1, 1_000), (1, 2_000)));
        activity.appended(11);
        activity.truncated(Some(9));
        activity.applied(2, 11, ms);
        assert_eq!(counted(&activity.apply), (1, 2_000), "what was cut off is not followed");
        assert_eq!(activity.applied_entries.load(Relaxed), 10);
    }
}
