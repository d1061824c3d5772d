//! Whole clusters in one process, on virtual time, from one seed.
//!
//! Engine, formation, consensus, snapshots, the machine, and on request the client port and the client are the production
//! code. Replaced are: the clock (tokio's, paused), randomness, the disk (a log that forgets what was not synced when its
//! node crashes) and the network (a router that loses, delays, duplicates and reorders messages, and cuts links one way or
//! both; and for clients, connections that stand still or break).
//!
//! Every seed runs a *safety* phase under faults, then a *liveness* phase on a healed cluster, then a scan by the workload: a
//! [`Subject`] says which machine is put into the cluster, who uses it, and what must be true in the end.
//!
//! | variable | effect |
//! |---|---|
//! | `QUORATE_SIM_SEEDS` | how many seeds each test runs |
//! | `QUORATE_SIM_FIRST` | the first of them (0) |
//! | `QUORATE_SIM_TRACE` | files to write the trace of each seed to: this and the number of the seed |
//! | `QUORATE_SIM_FINDS` | only failures with one of these words count, and the first ends the test; for planted bugs |

mod calm;
mod disk;
mod faults;
mod members;
mod network;
mod outcome;
mod ports;
mod subject;
mod trace;
mod world;

use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once};

pub use calm::{Calm, Hosts};
pub use network::{Network, SimTransport, Weather, address};
pub use outcome::Outcome;
pub use ports::Ports;
pub use subject::{Cluster, Engines, MachineOf, Subject, Workload};
pub use trace::Trace;
pub use world::{LIVENESS, POLL, SAFETY, Scenario, World};

/// What tasks of a world share.
pub type Shared<T> = Arc<Mutex<T>>;

/// Runs `run` in a world of its own, drawn from `seed`, until it ends.
pub fn in_world<T>(seed: u64, run: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()))
        .build()
        .unwrap();
    runtime.block_on(async move {
        let _guard = quorate::testkit::runtime::simulate(seed);
        run.await
    })
}

/// Runs one seed to its end.
///
/// # Panics
/// When an invariant is violated.
pub fn run<S: Subject>(seed: u64, scenario: Scenario, subject: S) -> Outcome {
    in_world(seed, async move { World::new(seed, scenario, subject).run().await })
}

/// Runs `seeds` on all cores. Returns what they did, or the failures.
pub fn run_all<S: Subject>(seeds: Range<u64>, scenario: &Scenario, subject: &S) -> (Outcome, Vec<String>) {
    run_on_all_cores(seeds, scenario, subject, true)
}

thread_local! {
    /// Whether it is of no interest that this thread panics: somebody looks for a seed that does.
    static IS_UNHEARD: Cell<bool> = const { Cell::new(false) };
}

/// From now on nobody is told of panics on this thread. Those of other threads are told as before.
fn let_panics_be_unheard() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !IS_UNHEARD.get() {
                tell(panic);
            }
        }));
    });
    IS_UNHEARD.set(true);
}

fn run_on_all_cores<S: Subject>(
    seeds: Range<u64>,
    scenario: &Scenario,
    subject: &S,
    panics_are_told: bool,
) -> (Outcome, Vec<String>) {
    let next = AtomicU64::new(seeds.start);
    let results = Mutex::new((Outcome::default(), Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                if !panics_are_told {
                    let_panics_be_unheard();
                }
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let one = || run(seed, scenario.clone(), subject.clone());
                    let outcome = catch_unwind(AssertUnwindSafe(one));
                    let mut results = results.lock().unwrap();
                    match outcome {
                        Ok(outcome) => results.0.add(&outcome),
                        Err(panic) => results.1.push(format!("seed {seed}: {}", reason_of(&*panic))),
                    }
                }
            });
        }
    });
    results.into_inner().unwrap()
}

fn reason_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Runs the first `most` seeds of a scenario that is to fail, until one fails with `word`. Returns all failures if none does.
///
/// # Errors
/// All failures, if none has the word.
pub fn run_until<S: Subject>(
    word: &str,
    most: u64,
    scenario: &Scenario,
    subject: &S,
) -> Result<(), Vec<String>> {
    const AT_ONCE: u64 = 6;
    let mut all = Vec::new();
    let mut found = false;
    for first in (0..most).step_by(AT_ONCE as usize) {
        all.extend(run_on_all_cores(first..first + AT_ONCE, scenario, subject, false).1);
        found = all.iter().any(|failure| failure.contains(word));
        if found {
            break;
        }
    }
    if found { Ok(()) } else { Err(all) }
}

/// How many seeds to run: what the environment says, or `all`, or a `few` where the program is not optimised, which takes ten
/// times as long for each.
pub fn seeds(few: u64, all: u64) -> u64 {
    from_env("QUORATE_SIM_SEEDS").unwrap_or(if cfg!(debug_assertions) { few } else { all })
}

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

/// Runs `count` seeds of a scenario that is to hold, and tells what they did.
///
/// # Panics
/// When one fails, or when they did less of something than `at_least` asks for each seed: a run in which nothing goes wrong
/// proves nothing.
pub fn expect_to_hold<S: Subject>(
    count: u64,
    scenario: &Scenario,
    subject: &S,
    at_least: &[(&'static str, f64)],
) -> Outcome {
    if let Ok(words) = std::env::var("QUORATE_SIM_FINDS") {
        return expect_not_to_find(&words, count, scenario, subject);
    }
    let first = from_env("QUORATE_SIM_FIRST").unwrap_or(0);
    let (did, failures) = run_all(first..first + count, scenario, subject);
    assert!(failures.is_empty(), "{} of {count} seeds failed:\n{}", failures.len(), failures.join("\n"));
    eprintln!("{count} seeds: {did:?}");
    for (what, each) in at_least {
        let expected = (each * count as f64) as u64;
        let happened = did.of(what);
        assert!(
            happened >= expected.max(1),
            "only {happened} {what} in {count} seeds, expected {expected}: {did:?}"
        );
    }
    did
}

/// Goes on until a seed fails with one of `words`, which `|` divides; other failures are not what is looked for.
fn expect_not_to_find<S: Subject>(words: &str, count: u64, scenario: &Scenario, subject: &S) -> Outcome {
    const AT_ONCE: u64 = 4;
    let mut did = Outcome::default();
    for first in (0..count).step_by(AT_ONCE as usize) {
        let (some, failures) = run_all(first..count.min(first + AT_ONCE), scenario, subject);
        let found = failures.iter().find(|failure| words.split('|').any(|word| failure.contains(word)));
        assert!(found.is_none(), "found by {}", found.map_or("", |failure| failure));
        did.add(&some);
    }
    did
}
