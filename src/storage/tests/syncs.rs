//! What a thread has made of a directory whenever it syncs something.
//!
//! Between two syncs a file system may keep changes in any order, so what lies between is shown as one step. What is seen are the
//! real calls and the real files: the linker prefers a definition in the program to the one in the C library, and std's calls arrive
//! here.

#![allow(unsafe_code)] // the two system calls that are looked at; nothing else may live here

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use libc::{c_int, c_long};

thread_local! {
    static RECORD: RefCell<Option<Record>> = const { RefCell::new(None) };
}

/// The directory, and what has been seen of it.
struct Record {
    root: PathBuf,
    /// By inode.
    files: BTreeMap<u64, Found>,
    lines: Vec<String>,
}

#[derive(Clone, PartialEq, Eq)]
struct Found {
    path: PathBuf,
    /// 0 for a directory.
    length: u64,
}

#[unsafe(no_mangle)]
extern "C" fn fsync(descriptor: c_int) -> c_int {
    note(descriptor);
    // SAFETY: no memory is passed, and the kernel checks the descriptor.
    answer(unsafe { libc::syscall(libc::SYS_fsync, descriptor) })
}

#[unsafe(no_mangle)]
extern "C" fn fdatasync(descriptor: c_int) -> c_int {
    note(descriptor);
    // SAFETY: as above.
    answer(unsafe { libc::syscall(libc::SYS_fdatasync, descriptor) })
}

fn answer(answer: c_long) -> c_int {
    if answer == 0 { 0 } else { -1 }
}

/// Notes a sync, if this thread records and what is synced is below its directory.
fn note(descriptor: c_int) {
    // A thread that is about to end has no record any more.
    let _ = RECORD.try_with(|record| {
        if let Some(record) = &mut *record.borrow_mut()
            && let Ok(path) = fs::read_link(format!("/proc/self/fd/{descriptor}"))
            && let Ok(path) = path.strip_prefix(&record.root)
            && !path.iter().any(|part| part == LOG)
        {
            let path = path.to_owned();
            record.look();
            record.lines.push(format!("sync {}", shown(&path)));
        }
    });
}

/// The directory of the log. What happens there is left out: much of it is sled's, and in no certain order.
const LOG: &str = "log";

/// What `work` does to the files below `root`, in order.
pub(super) fn recorded<T>(root: &Path, work: impl FnOnce() -> T) -> (T, Vec<String>) {
    let root = root.canonicalize().unwrap();
    let files = found(&root);
    RECORD.set(Some(Record { root, files, lines: Vec::new() }));
    let done = work();
    let mut record = RECORD.take().unwrap();
    record.look();
    (done, record.lines)
}

impl Record {
    /// Adds what has become of the files since the last look.
    fn look(&mut self) {
        let now = found(&self.root);
        let before = std::mem::replace(&mut self.files, now);
        let mut step = Vec::new();
        let replaced = |path: &Path| before.values().any(|found| found.path == path);
        for (inode, found) in &self.files {
            let name = shown(&found.path);
            match before.get(inode) {
                Some(same) if same == found => {}
                Some(same) if same.path == found.path => step.push(format!("write {name}")),
                Some(same) => {
                    let place = if replaced(&found.path) { ", in the place of the one before" } else { "" };
                    step.push(format!("rename {} to {name}{place}", shown(&same.path)));
                }
                None => step.push(format!("make {name}")),
            }
        }
        let is_there = |path: &Path| self.files.values().any(|found| found.path == path);
        for (inode, found) in &before {
            if !self.files.contains_key(inode) && !is_there(&found.path) {
                step.push(format!("remove {}", shown(&found.path)));
            }
        }
        // Their order is nobody's.
        step.sort();
        self.lines.extend(step);
    }
}

/// All files and directories below `root`, by inode.
fn found(root: &Path) -> BTreeMap<u64, Found> {
    let mut found = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap().map(Result::unwrap) {
            let metadata = entry.metadata().unwrap();
            let path = entry.path().strip_prefix(root).unwrap().to_owned();
            let length = if metadata.is_dir() { 0 } else { metadata.len() };
            if metadata.is_dir() && !path.ends_with(LOG) {
                directories.push(entry.path());
            }
            found.insert(metadata.ino(), Found { path, length });
        }
    }
    found
}

/// Without numbers that are drawn at random.
fn shown(path: &Path) -> String {
    const RANDOM: usize = 16;
    let text = if path == Path::new("") { ".".to_owned() } else { path.display().to_string() };
    let parts = text.split('.').map(|part| {
        let is_random = part.len() == RANDOM && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_random { "*" } else { part }
    });
    parts.collect::<Vec<_>>().join(".")
}
