//! Bytes that change on a disk are noticed before anything is served from them.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{DEADLINE, data_files, outcome, start};
use quorate_testkit::processes::set::{Attempt, Outcome};

/// Flips all bits of the middle byte of every place in `file` where `pattern` stands.
fn flip_each(file: &Path, pattern: &[u8]) -> usize {
    let mut bytes = fs::read(file).unwrap();
    let found: Vec<_> = bytes
        .windows(pattern.len())
        .enumerate()
        .filter(|(_, window)| *window == pattern)
        .map(|(at, _)| at)
        .collect();
    for at in &found {
        bytes[at + pattern.len() / 2] ^= 0xff;
    }
    fs::write(file, bytes).unwrap();
    found.len()
}

/// The key in the middle of the log.
fn middle(attempts: &[Attempt]) -> &str {
    let mut written: Vec<_> = attempts
        .iter()
        .filter_map(|attempt| match attempt.outcome {
            Outcome::Acknowledged { index, .. } => Some((index, attempt.key.as_str())),
            _ => None,
        })
        .collect();
    written.sort_unstable();
    written[written.len() / 2].1
}

/// Stops node 2, damages it, and expects it to refuse the damage and to serve again after its repair.
async fn damaged(
    args: &[&str],
    writes: u64,
    files: impl Fn(&str) -> bool,
    damage: impl Fn(&[PathBuf], &str),
) {
    let nodes = start(args);
    let mut writers = nodes.writers(4);
    assert!(writers.reached(writes, DEADLINE).await);
    let attempts = writers.finish().await;
    nodes.check(&attempts).await;

    let node = nodes.node(2);
    node.stop(DEADLINE).unwrap();
    let damaged = data_files(node, files);
    let intact: Vec<_> = damaged.iter().map(|path| fs::read(path).unwrap()).collect();
    damage(&damaged, middle(&attempts));
    let spoilt: Vec<_> = damaged.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(spoilt != intact, "the damage is not there");

    // However often it is tried. sled cuts its own file at the damage when it opens it; that what is left
    // passes for a log must not be.
    for _ in 0..2 {
        let refused = outcome(nodes.cluster.spec().command(2));
        refused.assert_refused(1, &["is corrupt", "rebuild this node from its peers"]);
    }

    // The others serve meanwhile.
    nodes.put("during", "the repair").await;
    nodes.quorate(&["del", "during"]);

    for (path, bytes) in damaged.iter().zip(intact) {
        fs::write(path, bytes).unwrap();
    }
    node.start().unwrap();
    node.wait_ready(DEADLINE).unwrap();
    nodes.check(&attempts).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_in_the_middle_of_the_log() {
    damaged(
        &[],
        400,
        |file| file == "log/db",
        |files, key| {
            assert!(flip_each(&files[0], key.as_bytes()) > 0, "{key} is not in the log");
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot() {
    let args = ["--snapshot-every-entries", "100", "--snapshot-keep-entries", "10"];
    damaged(
        &args,
        400,
        |file| file.ends_with(".snapshot"),
        |files, _| {
            assert!(!files.is_empty());
            for file in files {
                let mut bytes = fs::read(file).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0xff;
                fs::write(file, bytes).unwrap();
            }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_identity() {
    damaged(
        &[],
        20,
        |file| file == "identity.json",
        |files, _| {
            assert_eq!(flip_each(&files[0], b"quorate"), 1);
        },
    )
    .await;
}
