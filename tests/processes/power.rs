//! Power cuts under load, and then a disk that fails one read of the start that follows.
//!
//! Whichever read it is: either the start has everything that was acknowledged, or it is refused and the next one has it.
//! What a power cut leaves makes this hard: sled itself has to tell a torn end of its log from one that it cannot read.
//!
//! The store runs in a process of its own, this test binary again, since an injected error may abort it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};

use bytes::Bytes;
use quorate::LogId;
use quorate::storage::{LogStore, SledOptions, SledStore};
use quorate::types::{Entry, Payload};
use quorate_cluster::{Cluster, ClusterError};
use quorate_disk::{Cut, ForgetfulDisk, Image, Names, Read, mounted};

use crate::observe;
use crate::set::{self, Attempt};
use crate::support::{DEADLINE, TestCluster, client, eventually, outcome, spec};

/// Where the store of a [`store_process`] is.
const DIRECTORY: &str = "QUORATE_TEST_STORE";
/// What it does there: `write` or `read`.
const DUTY: &str = "QUORATE_TEST_STORE_DUTY";

const CUTS: [Cut; 6] = [
    Cut::DropUnsynced,
    Cut::Subset,
    Cut::Torn { sector_bytes: 512 },
    Cut::Torn { sector_bytes: 4096 },
    Cut::Prefix,
    Cut::DataWithoutLength,
];

/// Entries in one append, and appends that are not acknowledged.
const BATCH: u64 = 16;
const IN_FLIGHT: usize = 4;
/// Entries of a round, the last of which is cut off: some segments of sled.
const ENTRIES: u64 = 500;

fn entry(index: u64) -> Entry {
    let bytes = 200 + (index * 7919 % 24_000) as usize;
    let payload: Vec<u8> = index.to_le_bytes().into_iter().cycle().take(bytes).collect();
    Entry { log_id: LogId::new(1, index), payload: Payload::Command(Bytes::from(payload)) }
}

/// Not a test: what the tests below run in a process of its own.
#[test]
#[ignore = "a process that other tests start"]
fn store_process() {
    let (Some(directory), Ok(duty)) = (std::env::var_os(DIRECTORY), std::env::var(DUTY)) else { return };
    // sled's flush may hang after an error; a process that is gone does not.
    let options = SledOptions { on_failure: Arc::new(|_| std::process::exit(0)), ..SledOptions::default() };
    match SledStore::open(&Path::new(&directory).join("log"), options) {
        Err(error) => say(&format!("refused {error}")),
        Ok(store) if duty == "write" => write(&store),
        Ok(store) => say(&read(&store)),
    }
}

/// On a line of its own: the harness prints too.
fn say(line: &str) {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "\n{line}").and_then(|()| stdout.flush()).unwrap();
}

/// Appends until the power is cut.
fn write(store: &SledStore) {
    let (done, ended) = mpsc::channel();
    let mut next = store.bounds().last.map_or(0, |last| last.index + 1);
    let mut in_flight = 0;
    loop {
        while in_flight < IN_FLIGHT {
            let last = next + BATCH - 1;
            let done = done.clone();
            store.append(
                (next..=last).map(entry).collect(),
                Box::new(move |outcome| {
                    let _ = done.send(outcome.map(|()| last));
                }),
            );
            next = last + 1;
            in_flight += 1;
        }
        match ended.recv().unwrap() {
            Ok(last) => say(&format!("acknowledged {last}")),
            Err(_) => return,
        }
        in_flight -= 1;
    }
}

/// What a store holds, if that is what was written.
fn read(store: &SledStore) -> String {
    let Some(last) = store.bounds().last else { return "holds nothing".to_owned() };
    let mut next = 0;
    while next <= last.index {
        let entries = store.read(next, last.index + 1, 1024 * 1024).unwrap();
        for found in &entries {
            if *found != entry(next) {
                return format!("holds something else as entry {next}");
            }
            next += 1;
        }
    }
    format!("holds {}", last.index)
}

fn process(disk: &ForgetfulDisk, duty: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["power::store_process", "--exact", "--ignored", "--nocapture"]);
    command.env(DIRECTORY, disk.path()).env(DUTY, duty);
    command
}

/// A store on a disk, and the last entry that it has acknowledged.
struct Written {
    disk: ForgetfulDisk,
    _dir: tempfile::TempDir,
    acknowledged: u64,
}

/// Ends a process, also when a test has failed.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Written {
    fn mount(names: Names) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let disk = mounted(ForgetfulDisk::mount(dir.path(), names))?;
        Some(Self { disk, _dir: dir, acknowledged: 0 })
    }

    /// Has the store write, and cuts the power in the midst of it.
    fn round(&mut self, cut: Cut, seed: u64) {
        let enough = self.acknowledged + ENTRIES;
        let mut child =
            process(&self.disk, "write").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let _ended = Ended(child);
        let mut armed = false;
        // Ends when the process does, which meets an error soon after the cut.
        for line in stdout.lines().map_while(Result::ok) {
            assert!(!line.starts_with("refused"), "{line}");
            let Some(last) = line.strip_prefix("acknowledged ") else { continue };
            self.acknowledged = last.parse().unwrap();
            if self.acknowledged >= enough && !armed {
                self.disk.cut_after(seed % 23);
                armed = true;
            }
        }
        assert!(self.disk.is_off(), "the process has ended before the power was cut");
        self.disk.cut(cut, seed);
    }

    /// Rounds that leave a log of some segments and a snapshot of sled's.
    fn rounds(names: Names, cut: Cut, seed: u64) -> Option<Self> {
        let mut written = Self::mount(names)?;
        written.round(cut, seed);
        written.round(cut, seed + 1);
        Some(written)
    }

    /// Starts the store once.
    fn start(&self) -> Start {
        let found = outcome({
            let mut command = process(&self.disk, "read");
            command.env("RUST_BACKTRACE", "0");
            command
        });
        let said = |prefix: &str| found.stdout.lines().find_map(|line| line.strip_prefix(prefix));
        match (said("refused "), said("holds ")) {
            (Some(why), None) => Start::Refused(why.to_owned()),
            (None, Some(last)) if last.parse().is_ok_and(|last: u64| last >= self.acknowledged) => {
                Start::Complete
            }
            _ => Start::Wrong(format!("{} were acknowledged: {found:#?}", self.acknowledged)),
        }
    }
}

/// How a start ended.
#[derive(Debug, PartialEq, Eq)]
enum Start {
    /// With all that was acknowledged.
    Complete,
    /// With this error.
    Refused(String),
    /// With anything else.
    Wrong(String),
}

/// What came of reads that failed.
#[derive(Debug, Default)]
struct Tally {
    probed: usize,
    complete: usize,
    refused: usize,
    /// How often a start was refused for want of this file.
    files: BTreeMap<PathBuf, usize>,
    /// What must not be.
    wrong: Vec<String>,
}

/// Has one read of a start fail, for each that `chosen` picks by number, on the same image each time.
async fn probe(
    disk: &ForgetfulDisk,
    image: &Image,
    chosen: impl FnOnce(&[Read]) -> Vec<usize>,
    mut start: impl AsyncFnMut() -> Start,
) -> Tally {
    disk.restore(image);
    disk.count_reads(None);
    assert_eq!(start().await, Start::Complete, "no read has failed");
    let reads = disk.reads();
    let mut tally = Tally::default();
    for failing in chosen(&reads) {
        disk.restore(image);
        disk.count_reads(Some(failing));
        let first = start().await;
        let Some(failed) = disk.reads().get(failing).cloned() else { continue };
        disk.count_reads(None);
        let next = start().await;
        tally.count(&format!("read {failing} of {}, {failed:?}", reads.len()), failed.path, &first, &next);
    }
    tally
}

impl Tally {
    fn count(&mut self, read: &str, file: PathBuf, first: &Start, next: &Start) {
        self.probed += 1;
        match first {
            Start::Complete => self.complete += 1,
            Start::Refused(why) => {
                self.refused += 1;
                *self.files.entry(file).or_default() += 1;
                if !why.contains("cannot be read") || why.contains("corrupt") {
                    self.wrong.push(format!("{read}, failed, and is not called that: {why}"));
                }
            }
            Start::Wrong(what) => self.wrong.push(format!("{read}, failed, and was not noticed: {what}")),
        }
        if *next != Start::Complete {
            self.wrong.push(format!("{read}, had failed before ({first:?}), and now: {next:?}"));
        }
    }

    /// Asserts that each of at least `reads` did no harm, and that it was noticed.
    fn assert_harmless(&self, reads: usize) {
        assert!(self.wrong.is_empty(), "{self:#?}");
        assert!(self.probed >= reads && self.refused > 0, "{self:#?}");
    }
}

fn each(reads: &[Read]) -> Vec<usize> {
    (0..reads.len()).collect()
}

/// Some reads by which sled finds out where its log ends, which are the dangerous ones, and a few of the others.
fn some(reads: &[Read]) -> Vec<usize> {
    const HEADER_BYTES: u32 = 20;
    const CHUNK_BYTES: u32 = 100_000;
    let finds = |read: &Read| {
        read.path == Path::new("log/db") && (read.bytes == HEADER_BYTES || read.bytes > CHUNK_BYTES)
    };
    let (finding, other): (Vec<usize>, Vec<usize>) = each(reads).into_iter().partition(|n| finds(&reads[*n]));
    let every = |numbers: &[usize], count: usize| -> Vec<usize> {
        numbers.iter().copied().step_by(numbers.len().div_ceil(count).max(1)).collect()
    };
    [every(&finding, 12), every(&other, 4)].concat()
}

/// Without an error nothing is lost either.
#[tokio::test]
async fn a_read_that_fails_after_a_power_cut_costs_one_start() {
    let Some(written) = Written::rounds(Names::WithFile, Cut::Torn { sector_bytes: 512 }, 11) else { return };
    let image = written.disk.image();
    let tally = probe(&written.disk, &image, some, async || written.start()).await;
    tally.assert_harmless(10);
}

#[tokio::test]
#[ignore = "all reads after all kinds of power cuts: many minutes"]
async fn each_read_that_fails_after_a_power_cut_costs_one_start() {
    for names in [Names::WithFile, Names::WithDirectoryOnly] {
        for (cut, seed) in CUTS.into_iter().zip(1..) {
            let Some(written) = Written::rounds(names, cut, seed * 5) else { return };
            let image = written.disk.image();
            let tally = probe(&written.disk, &image, each, async || written.start()).await;
            eprintln!("{names:?}, {cut:?}: {tally:#?}");
            tally.assert_harmless(10);
        }
    }
}

/// A node that is its own quorum, on a disk that forgets.
struct Alone {
    nodes: TestCluster,
    attempts: Vec<Attempt>,
}

impl Alone {
    /// Starts the node and waits until it serves.
    async fn start(&self) -> Start {
        let node = self.nodes.node(1);
        node.start().unwrap();
        let start = match node.wait_ready(DEADLINE) {
            Ok(()) => match observe::converged(&self.nodes.client, DEADLINE).await {
                Ok(readings) => {
                    let findings = set::check(&self.attempts, &readings);
                    if findings.is_valid() { Start::Complete } else { Start::Wrong(format!("{findings:?}")) }
                }
                Err(why) => Start::Wrong(why),
            },
            Err(ClusterError::Exited { tail, .. }) => {
                Start::Refused(tail.trim_end().lines().next_back().unwrap_or_default().to_owned())
            }
            Err(error) => Start::Wrong(error.to_string()),
        };
        // It may have ended by itself.
        let _ = node.kill();
        start
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "some hundred starts of a node: many minutes"]
async fn each_read_of_a_node_that_fails_after_a_power_cut_costs_one_start() {
    const ARGS: [&str; 4] = ["--snapshot-every-entries", "2000", "--snapshot-keep-entries", "1000"];
    for (cut, seed) in CUTS.into_iter().zip(1..) {
        let (mut spec, dir) = spec();
        spec.nodes = 1;
        spec.extra_args = ARGS.iter().map(Into::into).collect();
        let path = spec.node_data_dir(1);
        std::fs::create_dir_all(&path).unwrap();
        let Some(disk) = mounted(ForgetfulDisk::mount(&path, Names::WithFile)) else { return };
        let cluster = Cluster::start(spec).unwrap();
        cluster.wait_ready(DEADLINE).unwrap();
        let nodes = TestCluster { client: client(&cluster), cluster, dir };
        let mut writers = nodes.writers(16);
        assert!(writers.reached(7_000, 4 * DEADLINE).await);
        disk.cut_after(seed * 7);
        eventually("the power is cut", async || disk.is_off()).await;
        let _ = nodes.node(1).kill();
        let attempts = writers.finish().await;
        disk.cut(cut, seed);
        let (image, node) = (disk.image(), Alone { nodes, attempts });
        let tally = probe(&disk, &image, each, async || node.start().await).await;
        eprintln!("{cut:?}: {tally:#?}");
        tally.assert_harmless(10);
        drop(node); // before its disk
    }
}
