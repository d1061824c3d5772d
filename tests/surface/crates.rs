//! The crates that are built, as cargo tells them.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Lines of `cargo tree` for an embedding program that brings its own transport and store: about a hundred crates, those that the
/// consensus needs for the most part.
const EMBEDDED_CRATES: usize = 120;

fn cargo_tree(args: &[&str]) -> BTreeSet<String> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["tree", "--offline", "--locked", "--prefix", "none"]).args(args);
    let output = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    lines.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

#[test]
fn the_bare_library_brings_neither_doors_nor_commands() {
    let crates = cargo_tree(&["--no-default-features", "--edges", "normal"]);
    assert!(crates.len() <= EMBEDDED_CRATES, "{} crates", crates.len());
    for absent in [
        "axum",
        "clap",
        "hyper",
        "prometheus-client",
        "quorate-cluster",
        "sled",
        "tonic",
        "tracing-subscriber",
    ] {
        let found = crates.iter().find(|line| line.split(' ').next() == Some(absent));
        assert_eq!(found, None);
    }
}

/// The features of every crate, as seen by a build of what `args` select.
fn features(args: &[&str]) -> BTreeMap<String, BTreeSet<String>> {
    let mut features: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for line in cargo_tree(&[args, &["--format", "{p}|{f}|"]].concat()) {
        let mut parts = line.split('|');
        let (name, on) = (parts.next().unwrap().to_owned(), parts.next().unwrap().to_owned());
        features.entry(name).or_default().insert(on);
    }
    features
}

/// A crate with other features is built a second time, and all that stands on it: whoever has run the tests would wait again
/// for the program, and the other way round.
#[test]
fn whatever_is_built_shares_its_dependencies() {
    let program = features(&["--package", "quorate", "--edges", "normal,build"]);
    assert!(program.len() > 100);
    for selected in [
        &["--workspace", "--edges", "normal,build"][..],
        &["--package", "quorate", "--edges", "normal,build,dev"],
        &["--workspace", "--edges", "normal,build,dev"],
    ] {
        let other = features(selected);
        for (name, on) in &program {
            // A crate may be needed for this program and for what builds it, with features of its own for each.
            let missing: Vec<_> = on.difference(&other[name]).collect();
            assert!(
                missing.is_empty(),
                "{name} is built with {missing:?}, and with {:?} for {selected:?}",
                other[name]
            );
        }
    }
}
