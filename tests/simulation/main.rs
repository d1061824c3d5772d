//! Whole clusters in one process, on virtual time, from one seed: see [`quorate_testkit::simulation`].

#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // the simulated world itself runs on plain tokio

mod anywhere;
mod clocks;
mod divergence;
mod hostile;
mod outvoted;
mod ports;
mod restored;
mod tasks;
mod upgrade;

use quorate_testkit::kv::{Registers, Way};
use quorate_testkit::simulation::{Scenario, expect_to_hold, run, run_until, seeds};

#[test]
fn no_seed_loses_a_write() {
    expect_to_hold(
        seeds(20, 200),
        &Scenario::default(),
        &Registers::default(),
        &[
            ("acknowledged writes", 50.0),
            ("reads", 10.0),
            ("linearizable reads on followers", 5.0),
            ("lease reads", 1.0),
            ("bounded reads", 1.0),
            ("exactly-once writes", 20.0),
            ("exactly-once writes that had to be repeated", 0.25),
            ("crashes", 1.0),
            ("orderly stops", 0.25),
            ("lost messages", 10.0),
            ("duplicated messages", 1.0),
            ("cut links", 1.0),
            ("leader changes", 1.0),
            ("snapshots built", 1.0),
            ("snapshots installed", 0.05),
            ("writes forgotten by a disk", 0.5),
        ],
    );
}

#[test]
fn one_node_and_five_nodes_hold_as_well() {
    for nodes in [1, 5] {
        let scenario = Scenario { nodes, ..Scenario::default() };
        expect_to_hold(
            seeds(8, 30),
            &scenario,
            &Registers::default(),
            &[("acknowledged writes", 33.0), ("crashes", 1.0)],
        );
    }
}

#[test]
fn members_come_and_go_and_nothing_is_lost() {
    let scenario = Scenario { spare: 2, ..Scenario::default() };
    expect_to_hold(
        seeds(5, 60),
        &scenario,
        &Registers::default(),
        &[
            ("acknowledged writes", 50.0),
            ("changes of the membership", 1.0),
            ("wiped nodes taken back", 0.25),
            ("crashes", 1.0),
            ("leader changes", 1.0),
        ],
    );
}

#[test]
fn nothing_ends_early_whatever_wall_clocks_do() {
    let scenario = Scenario { clocks: true, ..Scenario::default() };
    let subject = Registers { lifetimes: true, ..Registers::default() };
    expect_to_hold(
        seeds(8, 40),
        &scenario,
        &subject,
        &[
            ("jumps of a wall clock", 5.0),
            ("keys that ended", 10.0),
            ("sessions used shortly before their end", 0.5),
            ("leader changes", 1.0),
        ],
    );
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let (plain, subject) = (Scenario::default(), Registers::default());
    for seed in 0..seeds(1, 4) {
        let (first, second) = (run(seed, plain.clone(), subject), run(seed, plain.clone(), subject));
        assert_eq!(first, second, "seed {seed}");
    }
    let moving = Scenario { spare: 2, ..Scenario::default() };
    assert_eq!(run(3, moving.clone(), subject), run(3, moving, subject), "with members that come and go");
    let (one, other) = (run(1, plain.clone(), subject), run(2, plain, subject));
    assert_ne!(one.trace_hash, other.trace_hash, "different seeds should differ");
}

#[test]
fn a_disk_that_lies_about_its_syncs_is_caught() {
    let lying = Scenario { lying_disk: true, ..Scenario::default() };
    let caught = run_until("acknowledged", 60, &lying, &Registers::default());
    assert!(
        caught.is_ok(),
        "60 seeds on a disk that acknowledges before it syncs lost nothing: the check is blind. {caught:?}"
    );
}

#[test]
fn retries_without_a_session_are_caught() {
    let way = Way { sessions: false, anywhere: false };
    let subject = Registers { way, ..Registers::default() };
    let caught = run_until("increments", 60, &Scenario::default(), &subject);
    assert!(
        caught.is_ok(),
        "60 seeds of retries without a session applied nothing twice: the check is blind. {caught:?}"
    );
}
