//! A short smoke run, as `cargo test --workspace` makes it.
//!
//! The nodes are those of the `quorate` binary that the same build has put beside this suite's own; or of
//! the one that `QUORATE_BIN` names. `cargo test -p quorate-jepsen` alone does not build it: then it is built
//! here, if it is not there.

#![allow(clippy::unwrap_used)] // a test file: clippy exempts only the functions marked as tests

use std::path::{Path, PathBuf};
use std::process::Command;

const SUITE: &str = env!("CARGO_BIN_EXE_quorate-jepsen");

fn quorate() -> PathBuf {
    if let Some(named) = std::env::var_os("QUORATE_BIN") {
        return named.into();
    }
    let beside = Path::new(SUITE).with_file_name("quorate");
    if !beside.is_file() {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--package", "quorate", "--bin", "quorate"]);
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success(), "the quorate binary cannot be built");
    }
    beside
}

/// Makes a run that must be valid, and returns what it printed.
fn valid_run(args: &[&str], store: &Path) -> serde_json::Value {
    let mut run = Command::new(SUITE);
    let output = run.args(args).arg("--binary").arg(quorate()).arg("--store").arg(store).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stdout}\n{stderr}");
    let printed: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(printed["verdict"], "valid");
    printed
}

#[test]
fn a_short_run_is_valid_and_leaves_its_record() {
    let store = tempfile::tempdir().unwrap();
    let printed = valid_run(&["smoke", "--kills", "2", "--writes", "1000", "--seed", "7"], store.path());
    assert_eq!(printed["kills"].as_array().unwrap().len(), 2);

    let runs: Vec<_> = std::fs::read_dir(store.path().join("smoke")).unwrap().collect();
    assert_eq!(runs.len(), 1);
    let run = runs.into_iter().next().unwrap().unwrap().path();
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(run.join(name)).unwrap()).unwrap()
    };
    assert_eq!(json("results.json"), printed);
    assert_eq!(json("test.json")["seed"], 7);
    assert!(json("test.json")["command"].as_str().unwrap().contains("--seed 7"));
    let history = std::fs::read_to_string(run.join("history.jsonl")).unwrap();
    let acknowledged = history.lines().filter(|line| line.contains("\"acknowledged\"")).count();
    assert_eq!(printed["findings"]["acknowledged"], acknowledged);
    assert!(acknowledged >= 1000);
    assert!(run.join("cluster/node-1/output.log").is_file());
    assert!(!run.join("cluster/node-1/data").exists());
}

/// Increments that are sent again after every error, while leaders are killed and paused.
#[test]
fn a_short_count_is_exact() {
    let store = tempfile::tempdir().unwrap();
    let printed =
        valid_run(&["counter", "--increments", "2000", "--faults", "4", "--seed", "7"], store.path());
    assert_eq!(printed["counters"], serde_json::json!({"1": 2000, "2": 2000, "3": 2000}));
    assert_eq!(printed["faults"].as_array().unwrap().len(), 4);
}
