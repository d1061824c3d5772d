//! Whole clusters in one process, on virtual time, from one seed.
//!
//! Engine, formation, consensus, snapshots and the key-value machine are the production code. Replaced
//! are: the clock (tokio's, paused), randomness, the disk (a log that forgets what was not synced when its
//! node crashes) and the network (a router that loses, delays, duplicates and reorders messages, and cuts
//! links one way or both).
//!
//! Every seed runs a *safety* phase under faults, then a *liveness* phase on a healed cluster, then a scan:
//! no acknowledged write is lost, no linearizable read went back in time, all nodes hold equal state.
//!
//! | variable | effect |
//! |---|---|
//! | `QUORATE_SIM_SEEDS` | how many seeds each test runs (the main one 200; 20 where the program is not optimised) |
//! | `QUORATE_SIM_FIRST` | the first of them (0) |
//! | `QUORATE_SIM_TRACE` | a file to write the trace of the first seed to |

#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs, unreachable_pub)] // the simulated world itself runs on plain tokio

mod anywhere;
mod disk;
mod divergence;
mod faults;
mod hostile;
mod lifetimes;
mod network;
mod outvoted;
mod restored;
mod tasks;
mod trace;
mod upgrade;
mod workload;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use world::{Outcome, Scenario, World};

/// Runs one seed to its end.
///
/// # Panics
/// When an invariant is violated.
fn run(seed: u64, scenario: Scenario) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()))
        .build()
        .unwrap();
    runtime.block_on(async move {
        let _guard = quorate::testkit::runtime::simulate(seed);
        World::new(seed, scenario).run().await
    })
}

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect("a number"))
}

/// How many seeds to run: what the environment says, or `all`, or a few where the program is not optimised, which takes ten
/// times as long for each.
fn seeds(few: u64, all: u64) -> u64 {
    from_env("QUORATE_SIM_SEEDS", if cfg!(debug_assertions) { few } else { all })
}

/// Runs the first `most` seeds of a scenario that is to fail, until one fails with `word`. Returns all failures.
fn run_until(word: &str, most: u64, scenario: Scenario) -> Result<(), Vec<String>> {
    const AT_ONCE: u64 = 6;
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut all = Vec::new();
    for first in (0..most).step_by(AT_ONCE as usize) {
        all.extend(run_all(first..first + AT_ONCE, scenario.clone()).1);
        if all.iter().any(|failure| failure.contains(word)) {
            break;
        }
    }
    std::panic::set_hook(hook);
    match all.iter().any(|failure| failure.contains(word)) {
        true => Ok(()),
        false => Err(all),
    }
}

/// Runs `seeds` on all cores. Returns what they did, or the first failures.
fn run_all(seeds: std::ops::Range<u64>, scenario: Scenario) -> (Outcome, Vec<String>) {
    let next = AtomicU64::new(seeds.start);
    let results = Mutex::new((Outcome::default(), Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let outcome = catch_unwind(AssertUnwindSafe(|| run(seed, scenario.clone())));
                    let mut results = results.lock().unwrap();
                    match outcome {
                        Ok(outcome) => results.0.add(&outcome),
                        Err(panic) => {
                            let reason = panic
                                .downcast_ref::<String>()
                                .cloned()
                                .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                                .unwrap_or_default();
                            results.1.push(format!("seed {seed}: {reason}"));
                        }
                    }
                }
            });
        }
    });
    results.into_inner().unwrap()
}

#[test]
fn no_seed_loses_a_write() {
    let first = from_env("QUORATE_SIM_FIRST", 0);
    let count = seeds(20, 200);
    let (did, failures) = run_all(first..first + count, Scenario::default());
    assert!(failures.is_empty(), "{} of {count} seeds failed:\n{}", failures.len(), failures.join("\n"));
    eprintln!("{count} seeds: {did:?}");
    // A run in which nothing went wrong would prove nothing.
    for (what, happened, at_least) in [
        ("acknowledged writes", did.acknowledged, 50 * count),
        ("reads", did.reads, 10 * count),
        ("linearizable reads on followers", did.follower_reads, 5 * count),
        ("lease reads", did.lease_reads, count),
        ("bounded reads", did.bounded_reads, count),
        ("exactly-once writes", did.counted, 20 * count),
        ("exactly-once writes that had to be repeated", did.repeated, count / 4),
        ("crashes", did.crashes, count),
        ("orderly stops", did.stops, count / 4),
        ("lost messages", did.lost, 10 * count),
        ("duplicated messages", did.duplicated, count),
        ("cut links", did.cuts, count),
        ("leader changes", did.leader_changes, count),
        ("snapshots built", did.snapshots_built, count),
        ("snapshots installed", did.snapshots_installed, count / 20),
        ("writes forgotten by a disk", did.forgotten, count / 2),
    ] {
        assert!(
            happened >= at_least,
            "only {happened} {what} in {count} seeds, expected {at_least}: {did:?}"
        );
    }
}

#[test]
fn one_node_and_five_nodes_hold_as_well() {
    let count = seeds(8, 30);
    for nodes in [1, 5] {
        let (did, failures) = run_all(0..count, Scenario { nodes, ..Scenario::default() });
        assert!(failures.is_empty(), "{nodes} nodes: {}", failures.join("\n"));
        assert!(did.acknowledged > 33 * count && did.crashes > count, "{nodes} nodes: {did:?}");
    }
}

#[test]
fn members_come_and_go_and_nothing_is_lost() {
    let count = seeds(5, 60);
    let (did, failures) = run_all(0..count, Scenario { spare: 2, ..Scenario::default() });
    assert!(failures.is_empty(), "{} of {count} seeds failed:\n{}", failures.len(), failures.join("\n"));
    eprintln!("{count} seeds: {did:?}");
    for (what, happened, at_least) in [
        ("acknowledged writes", did.acknowledged, 50 * count),
        ("changes of the membership", did.changes, count),
        ("wiped nodes taken back", did.replaced, count / 4),
        ("crashes", did.crashes, count),
        ("leader changes", did.leader_changes, count),
    ] {
        assert!(happened >= at_least, "only {happened} {what} in {count} seeds: {did:?}");
    }
}

#[test]
fn nothing_ends_early_whatever_wall_clocks_do() {
    let count = seeds(8, 40);
    let (did, failures) = run_all(0..count, Scenario { clocks: true, ..Scenario::default() });
    assert!(failures.is_empty(), "{} of {count} seeds failed:\n{}", failures.len(), failures.join("\n"));
    eprintln!("{count} seeds: {did:?}");
    for (what, happened, at_least) in [
        ("jumps of a wall clock", did.jumps, 5 * count),
        ("keys that ended", did.ended, 10 * count),
        ("sessions used shortly before their end", did.kept, count / 2),
        ("leader changes", did.leader_changes, count),
    ] {
        assert!(happened >= at_least, "only {happened} {what} in {count} seeds: {did:?}");
    }
}

/// In a simulated world with this seed.
fn in_world<F: Future<Output = ()>>(seed: u64, run: impl FnOnce(World) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()))
        .build()
        .unwrap();
    runtime.block_on(async move {
        let _guard = quorate::testkit::runtime::simulate(seed);
        run(World::new(seed, Scenario::default())).await;
    });
}

#[test]
fn a_leader_whose_wall_clock_jumps_ends_nothing_early_or_late() {
    for seed in 0..2 {
        for shift_ms in [3_600_000, -3_600_000, 86_400_000 * 365 * 10] {
            in_world(seed, |world| world.leader_jumps(shift_ms));
        }
    }
}

#[test]
fn what_a_follower_s_wall_clock_once_showed_counts_for_nothing() {
    for seed in 0..3 {
        in_world(seed, World::follower_jumps);
    }
}

#[test]
fn lifetimes_go_on_while_nobody_leads() {
    for seed in 0..3 {
        in_world(seed, World::leaders_fail);
    }
}

#[test]
fn leaders_that_hardly_lead_lengthen_no_lifetime() {
    for seed in 0..3 {
        in_world(seed, World::leaders_hardly_lead);
    }
}

#[test]
fn a_wall_clock_beyond_all_years_holds_up_nothing() {
    for seed in 0..2 {
        in_world(seed, |world| world.clocks_beyond_all_years(i64::MAX));
    }
}

#[test]
fn after_the_loss_of_all_nodes_lifetimes_are_longer_by_little_more_than_that() {
    for seed in 0..2 {
        for down_s in [0, 3_600] {
            in_world(seed, |world| world.all_fail(std::time::Duration::from_secs(down_s)));
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 0..seeds(1, 4) {
        let (first, second) = (run(seed, Scenario::default()), run(seed, Scenario::default()));
        assert_eq!(first, second, "seed {seed}");
    }
    let moving = Scenario { spare: 2, ..Scenario::default() };
    assert_eq!(run(3, moving.clone()), run(3, moving), "with members that come and go");
    let (one, other) = (run(1, Scenario::default()), run(2, Scenario::default()));
    assert_ne!(one.trace_hash, other.trace_hash, "different seeds should differ");
}

#[test]
fn a_disk_that_lies_about_its_syncs_is_caught() {
    let caught = run_until("acknowledged", 60, Scenario { lying_disk: true, ..Scenario::default() });
    assert!(
        caught.is_ok(),
        "60 seeds on a disk that acknowledges before it syncs lost nothing: the check is blind. {caught:?}"
    );
}

#[test]
fn retries_without_a_session_are_caught() {
    let caught = run_until("increments", 60, Scenario { no_sessions: true, ..Scenario::default() });
    assert!(
        caught.is_ok(),
        "60 seeds of retries without a session applied nothing twice: the check is blind. {caught:?}"
    );
}

/// Keeps `Arc` in the prelude of the modules below short.
type Shared<T> = Arc<Mutex<T>>;
