//! Wall clocks that jump, one thing at a time: how long what was promised to end does live.

use std::time::Duration;

use quorate::Engine;
use quorate::kv::machine::KvMachine;

use quorate_testkit::kv::{Registers, get, put};
use quorate_testkit::simulation::{LIVENESS, POLL, Scenario, World, in_world};
use tokio::time::Instant;

/// A leader writes down the time at least so often while a key waits for its end.
const TICK: Duration = Duration::from_secs(10);
/// What the end of a key may take beyond that: a proposal, and looking at it.
const SLACK: Duration = Duration::from_millis(400);
/// How far log time may be from the leader's wall clock.
const TOLERANCE_MS: u64 = 1_100;

/// Nodes whose wall clocks a test sets.
struct Clocks(World<Registers>);

impl Clocks {
    async fn leader(&self) -> Engine<KvMachine> {
        let deadline = Instant::now() + LIVENESS;
        loop {
            match self.0.leading() {
                Some(leader) if leader.state().in_touch => return leader,
                _ => assert!(Instant::now() < deadline, "nobody leads: {:?}", self.0.states()),
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn write(&self, key: &str, ttl: Duration) -> Instant {
        let deadline = Instant::now() + LIVENESS;
        loop {
            let began = Instant::now();
            match self.leader().await.write(put(key, ttl)).await {
                Ok(_) => return began,
                Err(error) => assert!(Instant::now() < deadline, "{key}: {error}"),
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until `key`, written at `began` for `ttl`, is gone, and tells how long it has lived.
    async fn lifetime(&self, key: &str, began: Instant, ttl: Duration) -> Duration {
        // Not looked at until shortly before; if it is gone by then, it has not lived for long enough.
        tokio::time::sleep_until(began + ttl - Duration::from_millis(100)).await;
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            if get(&self.leader().await, key).await == Some(None) {
                return began.elapsed();
            }
            assert!(Instant::now() < deadline, "{key} does not end");
            tokio::time::sleep(2 * POLL).await;
        }
    }

    /// How far what is shown as the end of a key is ahead of the true one, in milliseconds.
    async fn shown_ahead_ms(&self, key: &str, began_ms: u64, ttl: Duration) -> i64 {
        let leader = self.leader().await;
        let item = get(&leader, key).await.flatten().expect("the key is there");
        let shown_ms = leader.log_time_at(item.expires_ms);
        i64::try_from(shown_ms).unwrap() - i64::try_from(began_ms).unwrap() - ttl.as_millis() as i64
    }

    /// The leader's clock jumps by an hour, and is set right again.
    async fn leader_jumps(mut self, shift_ms: i64) {
        self.0.start_all().await;
        let (long, short) = (Duration::from_secs(600), Duration::from_secs(30));
        let began_ms = quorate::testkit::runtime::unix_time_ms();
        self.write("long", long).await;
        let began = self.write("short", short).await;
        let leads = self.leader().await.state().node_id;
        self.0.shift(leads, shift_ms);
        tokio::time::sleep(Duration::from_secs(3)).await;
        self.write("meanwhile", short).await;
        let ahead_ms = self.shown_ahead_ms("long", began_ms, long).await;
        assert!(
            ahead_ms.abs_diff(shift_ms) <= TOLERANCE_MS,
            "shown as the leader's clock has it: {ahead_ms} ms"
        );
        assert_eq!(self.leader().await.counters().clock_jumps.load(std::sync::atomic::Ordering::Relaxed), 1);
        self.0.shift(leads, 0);
        self.write("afterwards", short).await;
        let ahead_ms = self.shown_ahead_ms("long", began_ms, long).await;
        assert!(ahead_ms.unsigned_abs() <= TOLERANCE_MS, "{ahead_ms} ms ahead when the clock is right again");
        let lived = self.lifetime("short", began, short).await;
        assert!(lived >= short && lived <= short + SLACK, "{lived:?} of {short:?}");
        assert!(get(&self.leader().await, "long").await.flatten().is_some());
    }

    /// A follower's clock is ahead for a while, and right again; then that node leads.
    async fn follower_jumps(mut self) {
        self.0.start_all().await;
        let ttl = Duration::from_secs(30);
        let leads = self.leader().await.state().node_id;
        let follower = self.0.ids().into_iter().find(|id| *id != leads).unwrap();
        self.write("before", ttl).await;
        self.0.shift(follower, 45_000);
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        self.write("meanwhile", ttl).await;
        self.0.shift(follower, 0);
        tokio::time::sleep(Duration::from_secs(15)).await;
        let began_ms = quorate::testkit::runtime::unix_time_ms();
        let began = self.write("key", ttl).await;
        let session = self.leader().await.open_session(Duration::from_secs(10)).await.unwrap();
        let deadline = Instant::now() + LIVENESS;
        while self.leader().await.state().node_id != follower {
            assert!(Instant::now() < deadline, "node {follower} does not lead");
            let _ = self.leader().await.transfer_leader(Some(follower)).await;
        }
        let ahead_ms = self.shown_ahead_ms("key", began_ms, ttl).await;
        assert!(ahead_ms.unsigned_abs() <= TOLERANCE_MS, "{ahead_ms} ms ahead");
        tokio::time::sleep(Duration::from_secs(8)).await;
        let ticket = session.begin().unwrap();
        self.leader().await.write_in(&ticket, put("in the session", ttl)).await.unwrap();
        let lived = self.lifetime("key", began, ttl).await;
        assert!(lived >= ttl && lived <= ttl + SLACK, "{lived:?} of {ttl:?}");
    }

    /// Leaders fail one after the other, each with another wall clock: the time without a leader counts.
    async fn leaders_fail(mut self) {
        self.0.start_all().await;
        let ttl = Duration::from_secs(40);
        for (id, shift_ms) in self.0.ids().into_iter().zip([3_600_000, -86_400_000, 7_000]) {
            self.0.shift(id, shift_ms);
        }
        let began = self.write("key", ttl).await;
        for _ in 0..4 {
            // Nothing is written meanwhile but what the leader writes by itself.
            tokio::time::sleep(Duration::from_secs(6)).await;
            let leads = self.leader().await.state().node_id;
            self.0.crash(leads).await;
            self.leader().await;
            self.0.start(leads).await;
        }
        let lived = self.lifetime("key", began, ttl).await;
        assert!(lived >= ttl && lived <= ttl + SLACK, "{lived:?} of {ttl:?}");
    }

    /// Leaders fail so soon that none of them writes anything but its blank entry.
    async fn leaders_hardly_lead(mut self) {
        self.0.start_all().await;
        let (ttl, failures) = (Duration::from_secs(200), 12);
        let began = self.write("key", ttl).await;
        for _ in 0..failures {
            tokio::time::sleep(Duration::from_secs(3)).await;
            let leads = self.leader().await.state().node_id;
            self.0.crash(leads).await;
            self.leader().await;
            self.0.start(leads).await;
        }
        let lived = self.lifetime("key", began, ttl).await;
        // A node that was restarted has not counted what lies between the last entry and its start.
        let latest = ttl + SLACK + failures * Duration::from_millis(200);
        assert!(lived >= ttl && lived <= latest, "{lived:?} of {ttl:?}");
    }

    /// Every wall clock is set beyond the year 9999, as by a battery that fails.
    async fn clocks_beyond_all_years(mut self, shift_ms: i64) {
        self.0.start_all().await;
        let ttl = Duration::from_secs(20);
        let began = self.write("key", ttl).await;
        for id in self.0.ids() {
            self.0.shift(id, shift_ms);
        }
        self.write("meanwhile", ttl).await;
        let leads = self.leader().await.state().node_id;
        self.0.crash(leads).await;
        self.0.start(leads).await;
        self.write("afterwards", ttl).await;
        let lived = self.lifetime("key", began, ttl).await;
        assert!(lived >= ttl && lived <= ttl + SLACK, "{lived:?} of {ttl:?}");
        for id in self.0.ids() {
            self.0.shift(id, 0);
        }
        self.write("right again", ttl).await;
        self.0.expect_agreement().await;
    }

    /// All nodes fail at once, and are down for a while.
    async fn all_fail(mut self, down: Duration) {
        self.0.start_all().await;
        let ttl = Duration::from_secs(60);
        let began = self.write("key", ttl).await;
        tokio::time::sleep(Duration::from_secs(35)).await;
        for id in self.0.ids() {
            self.0.crash(id).await;
        }
        tokio::time::sleep(down).await;
        let up = Instant::now();
        self.0.start_all().await;
        self.leader().await;
        let election = up.elapsed();
        let lived = self.lifetime("key", began, ttl).await;
        let latest = ttl + down + TICK + election + SLACK;
        assert!(lived >= ttl && lived <= latest, "{lived:?} of {ttl:?}, at most {latest:?}");
    }
}

fn with_clocks<F: Future<Output = ()>>(seed: u64, test: impl FnOnce(Clocks) -> F) {
    in_world(seed, async {
        test(Clocks(World::new(seed, Scenario::default(), Registers::default()))).await;
    });
}

#[test]
fn a_leader_whose_wall_clock_jumps_ends_nothing_early_or_late() {
    for seed in 0..2 {
        for shift_ms in [3_600_000, -3_600_000, 86_400_000 * 365 * 10] {
            with_clocks(seed, |clocks| clocks.leader_jumps(shift_ms));
        }
    }
}

#[test]
fn what_a_follower_s_wall_clock_once_showed_counts_for_nothing() {
    for seed in 0..3 {
        with_clocks(seed, Clocks::follower_jumps);
    }
}

#[test]
fn lifetimes_go_on_while_nobody_leads() {
    for seed in 0..3 {
        with_clocks(seed, Clocks::leaders_fail);
    }
}

#[test]
fn leaders_that_hardly_lead_lengthen_no_lifetime() {
    for seed in 0..3 {
        with_clocks(seed, Clocks::leaders_hardly_lead);
    }
}

#[test]
fn a_wall_clock_beyond_all_years_holds_up_nothing() {
    for seed in 0..2 {
        with_clocks(seed, |clocks| clocks.clocks_beyond_all_years(i64::MAX));
    }
}

#[test]
fn after_the_loss_of_all_nodes_lifetimes_are_longer_by_little_more_than_that() {
    for seed in 0..2 {
        for down_s in [0, 3_600] {
            with_clocks(seed, |clocks| clocks.all_fail(Duration::from_secs(down_s)));
        }
    }
}
