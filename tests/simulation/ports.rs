//! Clients of the client library, through the client port: the way that programs elsewhere take.

use quorate_testkit::bank::Banking;
use quorate_testkit::kv::Clients;
use quorate_testkit::simulation::{Scenario, expect_to_hold, run, seeds};

fn ports() -> Scenario {
    Scenario { ports: true, ..Scenario::default() }
}

#[test]
fn clients_are_told_the_truth() {
    expect_to_hold(
        seeds(6, 100),
        &ports(),
        &Clients,
        &[
            ("acknowledged writes", 50.0),
            ("reads", 10.0),
            ("reads of what was just written", 20.0),
            ("exactly-once writes", 20.0),
            ("exactly-once writes that had to be repeated", 0.2),
            ("watched changes", 20.0),
            ("mirrored changes", 50.0),
            ("mirrored changes that told the value before", 10.0),
            ("subscriptions of a mirror", 2.0),
            ("ports that stood still", 0.5),
            ("broken connections", 0.5),
            ("crashes", 1.0),
            ("orderly stops", 0.25),
            ("leader changes", 1.0),
        ],
    );
}

#[test]
fn members_come_and_go_and_clients_go_on() {
    let scenario = Scenario { spare: 2, hand_overs: true, ..ports() };
    expect_to_hold(
        seeds(1, 30),
        &scenario,
        &Clients,
        &[
            ("acknowledged writes", 50.0),
            ("changes of the membership", 1.0),
            ("watched changes", 20.0),
            ("mirrored changes", 50.0),
        ],
    );
}

#[test]
fn a_bank_loses_no_money() {
    expect_to_hold(
        seeds(4, 60),
        &ports(),
        &Banking,
        &[
            ("transfers", 50.0),
            ("transfers that had to be repeated", 0.2),
            ("audits", 5.0),
            ("crashes", 1.0),
            ("snapshots installed", 0.05),
        ],
    );
}

#[test]
fn the_same_seed_gives_the_same_trace_through_ports_too() {
    for seed in 0..seeds(1, 4) {
        assert_eq!(run(seed, ports(), Clients), run(seed, ports(), Clients), "seed {seed}");
        assert_eq!(run(seed, ports(), Banking), run(seed, ports(), Banking), "seed {seed}, another machine");
    }
}
