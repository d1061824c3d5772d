//! What is special about the store on sled: how it recovers, how it fails, how fast it is. What it has in
//! common with other stores is in [`conformance`](crate::storage::conformance).

mod damage;
mod failure;
mod prefix;
mod ready;
mod script;
mod size;

use std::fs;
use std::sync::atomic::Ordering::Relaxed;

use super::disk::Trees;
use super::marker::Marker;
use super::record::Key;
use super::*;
use crate::storage::conformance::{command, completion};
use crate::storage::durable_log::first_index;
use crate::storage::files;

/// Opens with everything in memory.
fn open(directory: &Path) -> Result<SledStore, StorageError> {
    SledStore::open(directory, SledOptions::default())
}

/// Opens with nothing in memory, so that every read goes to sled.
fn open_without_tail(directory: &Path) -> Result<SledStore, StorageError> {
    SledStore::open(directory, SledOptions { tail_bytes: 0, ..SledOptions::default() })
}

fn append(store: &SledStore, entries: Vec<Entry>) -> io::Result<()> {
    let (done, outcome) = completion();
    store.append(entries, done);
    outcome.recv().expect("every write is completed")
}

fn purge(store: &SledStore, upto: LogId) -> io::Result<()> {
    let (done, outcome) = completion();
    store.purge(upto, done);
    outcome.recv().expect("every write is completed")
}

fn save_vote(store: &SledStore, term: u64) -> io::Result<()> {
    let (done, outcome) = completion();
    store.save_vote(Vote { term, node_id: 1, committed: false }, done);
    outcome.recv().expect("every write is completed")
}

fn all(store: &SledStore) -> io::Result<Vec<Entry>> {
    store.read(0, u64::MAX, usize::MAX)
}

fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for path in files::list(from).unwrap() {
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_directory(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// sled itself, to damage what the store has written.
fn raw(directory: &Path) -> Trees {
    recovery::wait_until_unlocked(directory).unwrap();
    let db = sled::Config::new()
        .path(directory)
        .segment_size(8 * 1024 * 1024)
        .flush_every_ms(None)
        .open()
        .unwrap();
    let (log, meta) = (db.open_tree("log").unwrap(), db.open_tree("meta").unwrap());
    Trees { db, log, meta }
}

/// What the `log` tree holds from `from` on, without the fences.
fn records(trees: &Trees, from: u64) -> Vec<(Key, sled::IVec)> {
    let pairs = trees.log.range(Key::first(from).encode()..).map(Result::unwrap);
    let pairs = pairs.map(|(key, record)| (Key::decode(&key).unwrap(), record));
    pairs.filter(|(key, _)| !key.is_fence()).collect()
}

/// A directory with a log in it.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn log(&self) -> PathBuf {
        self.0.path().join("log")
    }

    fn copy(&self) -> Self {
        let copy = Self::new();
        copy_directory(self.0.path(), copy.0.path());
        copy
    }
}
