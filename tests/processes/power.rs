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
use std::thread;
use std::time::Instant;

use bytes::Bytes;
use quorate::LogId;
use quorate::StorageError;
use quorate::store::{DataDir, LogBounds, LogStore, SledOptions, SledStore};
use quorate::store::{Entry, Payload};
use quorate_cluster::{Cluster, ClusterError};
use quorate_testkit::disk::{Cut, ForgetfulDisk, Image, Names, Part, Read, mounted};

use crate::support::{DEADLINE, QUORATE, TestCluster, client, eventually, outcome, spec};
use quorate_testkit::processes::observe;
use quorate_testkit::processes::set::{self, Attempt};

/// Where the store of a [`store_process`] is.
const DIRECTORY: &str = "QUORATE_TEST_STORE";
/// What it does there: `write`, `churn` or `read`.
const DUTY: &str = "QUORATE_TEST_STORE_DUTY";

pub(crate) const CUTS: [Cut; 6] = [
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
    let mut payload = index.to_le_bytes().repeat(bytes.div_ceil(8));
    payload.truncate(bytes);
    Entry { log_id: LogId::new(1, index), payload: Payload::Command(Bytes::from(payload)) }
}

/// Not a test: what the tests below run in a process of its own.
#[test]
#[ignore = "a process that other tests start"]
fn store_process() {
    let (Some(directory), Ok(duty)) = (std::env::var_os(DIRECTORY), std::env::var(DUTY)) else { return };
    // sled's flush may hang after an error; a process that is gone does not.
    let options = SledOptions {
        on_failure: Arc::new(|failure| {
            say(&format!("failed {}", failure.reason));
            std::process::exit(0);
        }),
        // Less than the log, so that entries are read from the disk too.
        tail_bytes: 2 * 1024 * 1024,
        ..SledOptions::default()
    };
    match SledStore::open(&Path::new(&directory).join("log"), options) {
        Err(error) => say(&format!("refused {error}")),
        Ok(store) if duty == "write" => write(&store, &|_| {}),
        Ok(store) if duty == "churn" => write(&store, &|last| churn(&store, last)),
        Ok(store) => say(&read(&store)),
    }
}

/// On a line of its own: the harness prints too.
fn say(line: &str) {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "\n{line}").and_then(|()| stdout.flush()).unwrap();
}

/// Appends until the power is cut. Does something between two appends, which is told the last entry acknowledged.
fn write(store: &SledStore, between: &dyn Fn(u64)) {
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
            Ok(last) => {
                say(&format!("acknowledged {last}"));
                between(last);
            }
            Err(_) => return,
        }
        in_flight -= 1;
    }
}

/// Purges now and then, so that sled has segments to use again, and removes entries that nobody was told of.
fn churn(store: &SledStore, acknowledged: u64) {
    const KEPT: u64 = 300;
    let Some(last) = store.bounds().last else { return };
    if acknowledged % (BATCH * 8) == BATCH - 1 && acknowledged > KEPT {
        store.purge(LogId::new(1, acknowledged - KEPT), Box::new(|_| {}));
    }
    if acknowledged % (BATCH * 5) == BATCH - 1 {
        let after = last.index + 1..=last.index + 3 * BATCH;
        store.append(after.map(entry).collect(), Box::new(|_| {}));
        store.truncate(Some(last), Box::new(|_| {}));
    }
}

/// What a store holds, if that is what was written.
fn read(store: &SledStore) -> String {
    let LogBounds { purged, last: Some(last) } = store.bounds() else { return "holds nothing".to_owned() };
    let mut next = purged.map_or(0, |purged| purged.index + 1);
    while next <= last.index {
        let entries = match store.read(next, last.index + 1, 1024 * 1024) {
            Ok(entries) => entries,
            Err(error) => return format!("refused {error}"),
        };
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
    fn round(&mut self, duty: &str, cut: Cut, seed: u64) {
        let enough = self.acknowledged + ENTRIES;
        let mut child =
            process(&self.disk, duty).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
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
        written.round("write", cut, seed);
        written.round("write", cut, seed + 1);
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
        match (said("holds "), said("refused ").or(said("failed "))) {
            (Some(last), _) if last.parse().is_ok_and(|last: u64| last >= self.acknowledged) => {
                Start::Complete
            }
            (None, Some(why)) => Start::Refused(why.to_owned()),
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
    /// Refused starts after which the disk shows what it showed before. The next start is then the one without an error
    /// again, which is not repeated.
    untouched: usize,
    /// How often a start was refused for want of this file.
    files: BTreeMap<PathBuf, usize>,
    /// What must not be.
    wrong: Vec<String>,
}

/// Has one read of a start fail, for each that `chosen` picks by number, on the same image each time.
async fn probe(
    disk: &ForgetfulDisk,
    image: &Image,
    chosen: fn(&[Read]) -> Vec<usize>,
    mut start: impl AsyncFnMut() -> Start,
) -> Tally {
    disk.restore(image);
    disk.count_reads(None);
    assert_eq!(start().await, Start::Complete, "no read has failed");
    let reads = disk.reads();
    let mut tally = Tally::default();
    let chosen = chosen(&reads);
    for failing in chosen.iter().copied() {
        if tally.probed % 100 == 99 {
            eprintln!("{}: {} of {} reads", disk.path().display(), tally.probed, chosen.len());
        }
        disk.restore(image);
        disk.count_reads(Some(failing));
        let first = start().await;
        let Some(failed) = disk.reads().get(failing).cloned() else { continue };
        disk.count_reads(None);
        let next = match disk.image().shows_the_same(image) {
            true => {
                tally.untouched += 1;
                Start::Complete
            }
            false => start().await,
        };
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
                // sled does not tell what it was doing when it lists a directory after its first write, nor which page it
                // read while it was written to.
                let is_called_that = ["cannot be read", "sled cannot use", "Input/output error"]
                    .iter()
                    .any(|text| why.contains(text));
                if !is_called_that || why.contains("corrupt") {
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

/// Every read of bytes and of names.
fn each(reads: &[Read]) -> Vec<usize> {
    (0..reads.len()).filter(|n| reads[*n].part != Part::Attributes).collect()
}

/// Every question whether a file is there, and what it is.
fn attributes(reads: &[Read]) -> Vec<usize> {
    (0..reads.len()).filter(|n| reads[*n].part == Part::Attributes).collect()
}

/// Some reads by which sled finds out where its log ends, which are the dangerous ones, and a few of the others.
fn some(reads: &[Read]) -> Vec<usize> {
    const HEADER_BYTES: u32 = 20;
    const CHUNK_BYTES: u32 = 100_000;
    let finds = |read: &Read| match read.part {
        Part::Bytes { count, .. } if read.path == Path::new("log/db") => {
            count == HEADER_BYTES || count > CHUNK_BYTES
        }
        _ => false,
    };
    let names: Vec<usize> = (0..reads.len()).filter(|n| reads[*n].part == Part::Names).collect();
    let (finding, other): (Vec<usize>, Vec<usize>) = each(reads).into_iter().partition(|n| finds(&reads[*n]));
    let every = |numbers: &[usize], count: usize| -> Vec<usize> {
        numbers.iter().copied().step_by(numbers.len().div_ceil(count).max(1)).collect()
    };
    [every(&finding, 12), every(&other, 4), every(&attributes(reads), 4), names].concat()
}

/// Without an error nothing is lost either.
#[tokio::test]
async fn a_read_that_fails_after_a_power_cut_costs_one_start() {
    let Some(written) = Written::rounds(Names::WithFile, Cut::Torn { sector_bytes: 512 }, 11) else { return };
    let image = written.disk.image();
    let tally = probe(&written.disk, &image, some, async || written.start()).await;
    tally.assert_harmless(10);
}

/// Has one write, sync or rename of a start fail, for some of each kind, and starts again.
async fn probe_changes(written: &Written, image: &Image, every: usize) {
    written.disk.restore(image);
    written.disk.count_changes(None);
    assert_eq!(written.start(), Start::Complete);
    let changes = written.disk.changes();
    let mut refused = 0;
    for failing in (0..changes).step_by(every) {
        written.disk.restore(image);
        written.disk.count_changes(Some(failing));
        let first = written.start();
        written.disk.count_changes(None);
        let next = written.start();
        let change = format!("change {failing} of {changes} failed");
        assert_eq!(next, Start::Complete, "{change}: {first:?}");
        match first {
            Start::Complete => {}
            Start::Refused(why) => {
                refused += 1;
                assert!(!why.contains("corrupt") && !why.contains("gone"), "{change}: {why}");
            }
            Start::Wrong(what) => panic!("{change}: {what}"),
        }
    }
    eprintln!("{changes} changes, every {every}th failed: {refused} starts were refused");
    assert!(refused > 0);
}

#[tokio::test]
async fn a_write_that_fails_after_a_power_cut_costs_one_start() {
    let Some(written) = Written::rounds(Names::WithFile, Cut::Subset, 12) else { return };
    probe_changes(&written, &written.disk.image(), 5).await;
}

/// A directory of a new node whose parts are mount points, of which one cannot be looked at, is not one that has lost
/// anything.
#[test]
fn what_cannot_be_looked_at_is_not_called_lost() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = mounted(ForgetfulDisk::mount(dir.path(), Names::WithFile)) else { return };
    for mounted in ["log", "snapshots"] {
        std::fs::create_dir(disk.path().join(mounted)).unwrap();
    }
    // A child that another test is just starting has the lock's file open as well, until it runs its program.
    let open = || {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match DataDir::open(disk.path(), "test", 1).map(drop) {
                Err(StorageError::InUse { .. }) if Instant::now() < deadline => thread::yield_now(),
                opened => return opened,
            }
        }
    };
    let image = disk.image();
    disk.count_reads(None);
    open().unwrap();
    let mut refused = 0;
    for failing in 0..disk.reads().len() {
        disk.restore(&image);
        disk.count_reads(Some(failing));
        let first = open();
        if let Err(error) = &first {
            refused += 1;
            let is_called_that = matches!(error, StorageError::Unreadable { .. } | StorageError::Io { .. });
            assert!(is_called_that, "{:?}: {error}", disk.reads().get(failing));
        }
        disk.count_reads(None);
        open().unwrap();
        assert!(DataDir::exists(disk.path()));
    }
    assert!(refused > 3, "{refused}");
}

/// What the start finds by reading sled's files itself has to be what sled finds, whatever is left of them.
async fn cut_over_and_over(names: Names, seed: u64, rounds: u64) {
    let Some(mut written) = Written::mount(names) else { return };
    for round in 0..rounds {
        let seed = seed * 1000 + round;
        let cut = CUTS[(seed * 7919 / 13 % CUTS.len() as u64) as usize];
        written.round("churn", cut, seed);
        assert_eq!(written.start(), Start::Complete, "{names:?}, seed {seed}, {cut:?}");
    }
    eprintln!("{names:?}, seed {seed}: {rounds} cuts, {} entries", written.acknowledged);
}

#[tokio::test]
async fn a_store_survives_some_power_cuts() {
    cut_over_and_over(Names::WithFile, 1, 4).await;
}

#[tokio::test]
#[ignore = "hundreds of power cuts"]
async fn a_store_survives_many_power_cuts() {
    for seed in 2..12 {
        for names in [Names::WithFile, Names::WithDirectoryOnly] {
            cut_over_and_over(names, seed, 15).await;
        }
    }
}

async fn each_read_of_a_store(names: Names, cut: Cut, seed: u64) {
    let Some(written) = Written::rounds(names, cut, seed * 5) else { return };
    let image = written.disk.image();
    for chosen in [each, attributes] {
        let tally = probe(&written.disk, &image, chosen, async || written.start()).await;
        eprintln!("a store, {names:?}, {cut:?}: {tally:#?}");
        tally.assert_harmless(10);
    }
    probe_changes(&written, &image, 1).await;
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

async fn each_read_of_a_node(cut: Cut, seed: u64) {
    const ARGS: [&str; 4] = ["--snapshot-every-entries", "600", "--snapshot-keep-entries", "300"];
    let (mut spec, dir) = spec();
    spec.nodes = 1;
    spec.extra_args = ARGS.iter().map(Into::into).collect();
    let path = spec.node_data_dir(1);
    std::fs::create_dir_all(&path).unwrap();
    let Some(disk) = mounted(ForgetfulDisk::mount(&path, Names::WithFile)) else { return };
    let cluster = Cluster::start(spec).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let nodes = TestCluster { client: client(&cluster), cluster, dir, program: QUORATE.into() };
    let mut writers = nodes.writers(16);
    assert!(writers.reached(2_000, 4 * DEADLINE).await);
    disk.cut_after(seed * 7);
    eventually("the power is cut", async || disk.is_off()).await;
    let _ = nodes.node(1).kill();
    let attempts = writers.finish().await;
    disk.cut(cut, seed);
    let (image, node) = (disk.image(), Alone { nodes, attempts });
    for chosen in [each, attributes] {
        let tally = probe(&disk, &image, chosen, async || node.start().await).await;
        eprintln!("a node, {cut:?}: {tally:#?}");
        tally.assert_harmless(10);
    }
    drop(node); // before its disk
}

/// Tests for each kind of power cut, with a seed, that may run side by side.
macro_rules! after {
    ($($name:ident: $cut:expr, $seed:expr;)*) => { $(mod $name {
        use super::*;

        #[tokio::test]
        #[ignore = "two starts of a store for each of many hundred reads"]
        async fn each_read_of_a_store_that_fails_costs_one_start() {
            each_read_of_a_store(Names::WithFile, $cut, $seed).await;
        }

        #[tokio::test]
        #[ignore = "two starts of a store for each of many hundred reads"]
        async fn each_read_of_a_store_whose_names_were_not_synced_costs_one_start() {
            each_read_of_a_store(Names::WithDirectoryOnly, $cut, $seed).await;
        }

        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        #[ignore = "two starts of a node for each of some hundred reads"]
        async fn each_read_of_a_node_that_fails_costs_one_start() {
            each_read_of_a_node($cut, $seed).await;
        }
    })* };
}

after! {
    nothing_unsynced_is_kept: CUTS[0], 1;
    some_of_it_is_kept: CUTS[1], 2;
    some_sectors_are_kept: CUTS[2], 3;
    some_pages_are_kept: CUTS[3], 4;
    all_before_a_moment_is_kept: CUTS[4], 5;
    all_but_lengths_is_kept: CUTS[5], 6;
}
