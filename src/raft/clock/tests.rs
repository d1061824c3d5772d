//! Lifetimes by these clocks, whatever the wall clocks say and whoever leads.

mod script;

use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn reading(term: u64, counted_ms: u64, wall_ms: u64) -> Stamp {
    Stamp::Reading(Reading { wall_ms, term, counted_ms })
}

#[test]
fn a_log_begins_at_the_wall_clock_and_goes_on_by_what_is_counted() {
    let mut clock = ClusterClock::default();
    clock.advance(1, reading(1, 400, 50_000));
    assert_eq!((clock.elapsed_ms, clock.log_time_ms()), (50_000, 50_000));
    clock.advance(1, reading(1, 1_400, 51_200));
    assert_eq!((clock.elapsed_ms, clock.log_time_ms()), (51_000, 51_000), "200 ms are tolerated");
    clock.advance(1, reading(1, 1_300, 51_200));
    assert_eq!(clock.elapsed_ms, 51_000, "another one overtook it");
    clock.advance(1, reading(1, 1_500, 51_200));
    assert_eq!(clock.elapsed_ms, 51_100);
}

#[test]
fn a_wall_clock_that_jumps_moves_log_time_there_and_back_and_no_lifetime() {
    const HOUR_MS: u64 = 3_600_000;
    let mut clock = ClusterClock::default();
    clock.advance(1, reading(1, 0, 10 * HOUR_MS));
    let deadline = clock.elapsed_ms + 600_000;
    clock.advance(1, reading(1, 3_000, 11 * HOUR_MS + 3_000));
    assert_eq!(clock.elapsed_ms, 10 * HOUR_MS + 3_000, "three seconds have passed");
    assert_eq!(clock.log_time_ms(), 11 * HOUR_MS + 3_000);
    assert_eq!(clock.log_time_at(deadline), 11 * HOUR_MS + 600_000, "as the leader's clock will show then");
    clock.advance(1, reading(1, 6_000, 10 * HOUR_MS + 6_000));
    assert_eq!(clock.log_time_ms(), 10 * HOUR_MS + 6_000);
    assert_eq!(clock.log_time_at(deadline), 10 * HOUR_MS + 600_000);
    // Before the epoch a clock is taken to show 0.
    clock.advance(1, reading(1, 6_001, 0));
    assert_eq!((clock.elapsed_ms, clock.log_time_ms()), (10 * HOUR_MS + 6_001, 1));
    clock.advance(1, reading(1, 6_002, u64::MAX));
    assert_eq!(clock.elapsed_ms, 10 * HOUR_MS + 6_002);
    assert!(clock.log_time_ms() >= i64::MAX as u64);
}

#[test]
fn a_new_leader_adds_what_it_has_counted_and_nobody_s_wall_clock() {
    let mut clock = ClusterClock::default();
    clock.advance(1, reading(1, 0, 100_000));
    clock.advance(2, reading(2, 700, 145_700));
    assert_eq!((clock.elapsed_ms, clock.log_time_ms()), (100_700, 145_700));
    // Two terms without a command in between.
    clock.advance(5, reading(5, 300, 101_000));
    assert_eq!((clock.elapsed_ms, clock.log_time_ms()), (101_000, 101_000));
}

#[test]
fn a_reading_of_another_term_adds_nothing_and_hides_what_comes_before_the_next() {
    let mut clock = ClusterClock::default();
    clock.advance(1, reading(1, 0, 100_000));
    clock.advance(3, reading(1, 9_000, 109_000));
    assert_eq!(clock.elapsed_ms, 100_000);
    let next = Reading { wall_ms: 109_000, term: 3, counted_ms: 9_000 };
    assert!(!clock.goes_on_at(&next));
    assert_eq!(clock.elapsed_at(&next), 100_000);
    clock.advance(3, Stamp::Reading(next));
    assert_eq!(clock.elapsed_ms, 100_000, "a key written by the entry before must not age by this");
    assert!(clock.goes_on_at(&next));
    clock.advance(3, reading(3, 9_500, 109_500));
    assert_eq!(clock.elapsed_ms, 100_500);
    let stale = Reading { term: 2, ..next };
    assert!(!clock.goes_on_at(&stale));
    assert_eq!(clock.elapsed_at(&stale), 100_500);
}

#[test]
fn log_time_of_an_older_build_is_taken_for_elapsed_time() {
    let mut clock = ClusterClock::default();
    clock.advance(1, Stamp::LogTime(7_000));
    clock.advance(2, Stamp::LogTime(6_000));
    assert_eq!((clock.elapsed_ms, clock.log_time_ms()), (7_000, 7_000));
    clock.advance(3, reading(3, 250, 7_300));
    assert_eq!((clock.elapsed_ms, clock.log_time_ms()), (7_250, 7_250));
}

#[tokio::test(start_paused = true)]
async fn a_leader_counts_from_the_last_command_that_another_one_sent() {
    let clock = LeaderClock::default();
    let counted = |term, counted_ms| Reading { wall_ms: 5, term, counted_ms };
    let pause = |ms| tokio::time::sleep(Duration::from_millis(ms));
    let commands = |first, last| clock.entries_received(Batch { first_command: Some(first), last });
    let blank = |last| clock.entries_received(Batch { first_command: None, last });
    pause(100).await;
    assert_eq!(clock.reading(5), counted(0, 100));
    commands(1, 1);
    assert_eq!(clock.reading(5), counted(1, 100), "its log may hold older ones, from before the start");
    pause(1_000).await;
    commands(2, 2);
    assert_eq!(clock.reading(5), counted(2, 1_000));
    pause(10).await;
    commands(2, 2);
    assert_eq!(clock.reading(5), counted(2, 1_010), "its own entries change nothing");
    // As a follower it catches up on two terms at once, and then leads.
    pause(10).await;
    commands(3, 4);
    assert_eq!(clock.reading(5), counted(4, 0));
    // Leaders that fail before they have written a command.
    for (term, since_ms) in [(5, 30), (6, 60), (7, 90)] {
        pause(30).await;
        blank(term);
        assert_eq!(clock.reading(5), counted(term, since_ms), "nothing that was written before is younger");
    }
    commands(7, 7);
    assert_eq!(clock.reading(5), counted(7, 90));
    // A command of an earlier term, and after it the blank entry of the next leader.
    pause(20).await;
    commands(7, 8);
    assert_eq!(clock.reading(5), counted(8, 0));
    pause(30).await;
    clock.snapshot_received();
    pause(7).await;
    blank(9);
    assert_eq!(clock.reading(5), counted(9, 7));
    assert_eq!(clock.reading(u64::MAX).wall_ms, LARGEST_TIME_MS, "what all take");
}

#[test]
fn of_a_batch_the_first_command_and_the_last_entry_count() {
    let entry = |(term, command): &(u64, bool)| {
        let payload = if *command { Payload::Command(Default::default()) } else { Payload::Blank };
        Entry { log_id: crate::types::LogId::new(*term, 0), payload }
    };
    let batch = |entries: &[(u64, bool)]| Batch::of(&entries.iter().map(entry).collect::<Vec<_>>());
    assert_eq!(batch(&[]), None);
    assert_eq!(batch(&[(3, false)]), Some(Batch { first_command: None, last: 3 }));
    let mixed = batch(&[(3, false), (4, true), (5, true), (6, false)]);
    assert_eq!(mixed, Some(Batch { first_command: Some(4), last: 6 }));
}

/// An entry, with the true times at which it was proposed and came into the log.
struct Logged {
    term: u64,
    stamp: Stamp,
    proposed_ms: u64,
    logged_ms: u64,
}

/// What a node knows of its log: the term of the last entry, since when no earlier leader has sent a command, and when it received one last.
#[derive(Clone, Copy)]
struct Node {
    term: u64,
    since_ms: u64,
    last_ms: u64,
}

impl Node {
    /// The blank entry of a new leader.
    fn follow(&mut self, term: u64) {
        if self.term != term {
            (self.term, self.since_ms) = (term, self.last_ms);
        }
    }

    /// A command.
    fn receive(&mut self, term: u64, now_ms: u64) {
        self.follow(term);
        self.last_ms = now_ms;
    }

    fn reading(&self, now_ms: u64, wall: u32) -> Stamp {
        let counted_ms = now_ms - self.since_ms;
        Stamp::Reading(Reading { wall_ms: u64::from(wall), term: self.term, counted_ms })
    }
}

proptest! {
    /// Leaders come and go, proposals get into later terms, nodes restart, wall clocks jump: between any two
    /// entries no more elapsed time passes than true time.
    #[test]
    fn no_history_lets_time_run_fast(
        steps in prop::collection::vec((0..6_u8, 0..3_usize, 0..40_000_u64, any::<u32>()), 1..60),
    ) {
        let mut now_ms = 1_000_000_u64;
        let mut nodes = [Node { term: 0, since_ms: now_ms, last_ms: now_ms }; 3];
        let (mut leader, mut term) = (0, 1);
        nodes[0].follow(1);
        let mut log: Vec<Logged> = Vec::new();
        // A proposal that waits at a node until that leads.
        let mut waiting = None;
        for (step, node, pause_ms, wall) in steps {
            now_ms += pause_ms;
            let elected = match step {
                0 => Some(node),
                1 => {
                    nodes[node] = Node { term: 0, since_ms: now_ms, last_ms: now_ms };
                    (node == leader).then_some((node + 1) % 3)
                }
                2 => {
                    waiting = Some((nodes[node].reading(now_ms, wall), now_ms, node));
                    None
                }
                _ => {
                    let ready = waiting.take_if(|(_, _, at)| *at == leader);
                    let (stamp, proposed_ms) = ready
                        .map_or((nodes[leader].reading(now_ms, wall), now_ms), |(stamp, at_ms, _)| (stamp, at_ms));
                    log.push(Logged { term, stamp, proposed_ms, logged_ms: now_ms });
                    nodes.iter_mut().for_each(|node| node.receive(term, now_ms));
                    None
                }
            };
            if let Some(node) = elected {
                (leader, term) = (node, term + 1);
                // Of the others, some hear of it before it fails.
                nodes[node].follow(term);
                nodes[(node + wall as usize % 3) % 3].follow(term);
            }
        }
        let mut clock = ClusterClock::default();
        let mut applied: Vec<(u64, u64)> = Vec::new();
        for Logged { term, stamp, proposed_ms, logged_ms } in log {
            let before_ms = clock.elapsed_ms;
            clock.advance(term, stamp);
            prop_assert!(clock.elapsed_ms >= before_ms);
            for (earlier_ms, elapsed_ms) in &applied {
                let (real_ms, counted_ms) = (logged_ms - earlier_ms, clock.elapsed_ms - elapsed_ms);
                prop_assert!(counted_ms <= real_ms, "{counted_ms} ms were counted in {real_ms} ms");
            }
            applied.push((proposed_ms, clock.elapsed_ms));
        }
    }

    /// While one leader goes on, or nodes that were running take over, nothing is lost.
    #[test]
    fn leaders_that_were_running_lose_no_time(
        terms in prop::collection::vec((0..10_000_u64, prop::collection::vec(0..10_000_u64, 0..5)), 1..10),
    ) {
        let (mut clock, mut now_ms) = (ClusterClock::default(), 5_000_u64);
        let mut nodes = [Node { term: 0, since_ms: now_ms, last_ms: now_ms }; 2];
        clock.advance(1, reading(1, 0, now_ms));
        nodes.iter_mut().for_each(|node| node.receive(1, now_ms));
        for (term, (election_ms, pauses)) in (2_u64..).zip(terms) {
            let leader = usize::try_from(term).unwrap() % 2;
            now_ms += election_ms;
            // It may fail before it has written more than that.
            nodes.iter_mut().for_each(|node| node.follow(term));
            for pause_ms in pauses {
                now_ms += pause_ms;
                clock.advance(term, nodes[leader].reading(now_ms, 0));
                nodes.iter_mut().for_each(|node| node.receive(term, now_ms));
                prop_assert_eq!(clock.elapsed_ms, now_ms);
            }
        }
    }
}
