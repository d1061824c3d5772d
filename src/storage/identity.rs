//! The data directory: who it belongs to, and that only one process uses it.
//!
//! A node's promises are on its disk. So the directory carries the cluster's name, the node's id and a
//! random *incarnation*, drawn once when the directory is made; a node that presents another incarnation
//! than its cluster knows has lost what it promised.
//!
//! # Invariants
//! - The identity is durable before anything else is put into the directory, and is never written again.
//! - It is never made anew beside a log or snapshots: a node whose identity is lost must not vote again
//!   under its old id.
//! - A directory whose log was never ready says so itself, by a file that is there before the identity and goes once
//!   the log is ready. So one of which only the identity is left is not taken for a new one.
//! - Before a log in here may acknowledge anything, the directory says durably that it has one
//!   ([`DataDir::record_log`]). From then on a missing log is a lost one: it is never made anew under the same
//!   incarnation.
//! - One process at a time holds the lock, until its [`DataDir`] is dropped or the process ends.
//!
//! The protocol, with a figure: `docs/design/identity.md`.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::StorageError;
use crate::runtime;
use crate::types::{Incarnation, NodeId};

use super::files::{self, exists, io_error};
use super::lease::FILE as LEASE;
use super::space::RESERVE;
use super::{is_of_a_log, snapshots};

/// The newest format of the whole directory this build knows.
const FORMAT_VERSION: u32 = 1;

const LOCK: &str = "lock";
const IDENTITY: &str = "identity.json";
const LOG: &str = "log";
const READY: &str = "log.ready";
/// There since the log was ready for the first time.
const FORMED: &str = "log.formed";
/// There from before the identity until the log was ready for the first time.
const UNFORMED: &str = "log.unformed";
const SNAPSHOTS: &str = "snapshots";
const EVENTS: &str = "events";
/// What is put beside the identity, and never before it.
const CONTENTS: [&str; 7] = [LOG, READY, FORMED, SNAPSHOTS, EVENTS, LEASE, RESERVE];

/// Who a data directory belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Name of the cluster.
    pub cluster: String,
    /// Id of the node.
    pub node_id: NodeId,
    /// Drawn when the directory was made.
    pub incarnation: Incarnation,
}

/// `identity.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IdentityFile {
    format_version: u32,
    cluster: String,
    node_id: NodeId,
    /// 32 hexadecimal digits.
    incarnation: String,
    /// Of the other fields; see [`IdentityFile::checksum`].
    crc32: u32,
}

/// Read first, so that a newer format is called that instead of corrupt.
#[derive(Deserialize)]
pub(super) struct FormatVersion {
    pub(super) format_version: u32,
}

/// Whom a directory belongs to whose identity is `bytes`.
#[cfg(any(test, fuzzing))]
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Identity, StorageError> {
    IdentityFile::parse(path, bytes)
}

impl IdentityFile {
    fn new(identity: &Identity) -> Self {
        let mut file = Self {
            format_version: FORMAT_VERSION,
            cluster: identity.cluster.clone(),
            node_id: identity.node_id,
            incarnation: identity.incarnation.to_string(),
            crc32: 0,
        };
        file.crc32 = file.checksum();
        file
    }

    /// Over the values, separated by NUL, so that the file may be reformatted but not edited.
    fn checksum(&self) -> u32 {
        let text =
            format!("{}\0{}\0{}\0{}", self.format_version, self.cluster, self.node_id, self.incarnation);
        crc32fast::hash(text.as_bytes())
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Identity, StorageError> {
        let corrupt = |detail: String| StorageError::Corrupt { path: path.to_owned(), detail };
        let not_json = |error: serde_json::Error| corrupt(format!("it does not parse: {error}"));
        let version: FormatVersion = serde_json::from_slice(bytes).map_err(not_json)?;
        if version.format_version > FORMAT_VERSION {
            return Err(StorageError::Version {
                path: path.to_owned(),
                found: version.format_version,
                supported: FORMAT_VERSION,
            });
        }
        let file: Self = serde_json::from_slice(bytes).map_err(not_json)?;
        if file.crc32 != file.checksum() {
            return Err(corrupt("its checksum does not match".to_owned()));
        }
        let incarnation = u128::from_str_radix(&file.incarnation, 16)
            .map_err(|error| corrupt(format!("its incarnation does not parse: {error}")))?;
        Ok(Identity { cluster: file.cluster, node_id: file.node_id, incarnation: Incarnation(incarnation) })
    }
}

/// A data directory that this process has locked.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    identity: Identity,
    is_new: bool,
    /// Holds the lock.
    _lock: File,
}

impl DataDir {
    /// Whether the directory at `path` has been used by a node before, or looks so.
    ///
    /// A directory in it that is empty is no sign of use: it may be a mount point. One that cannot be looked at counts as used.
    pub fn exists(path: &Path) -> bool {
        let identity = path.join(IDENTITY);
        !matches!((files::exists(&identity), content(path)), (Ok(false), Ok(None)))
    }

    /// Locks the directory at `path` and checks that it belongs to `node_id` of `cluster`; creates it, with a
    /// fresh incarnation, if it is not there or empty.
    ///
    /// # Errors
    /// [`StorageError::InUse`] if another process holds it, [`StorageError::OtherCluster`] and
    /// [`StorageError::OtherNode`] if it belongs to somebody else, [`StorageError::Lost`] if there is a log or a
    /// snapshot but no identity, or no log although there was one, [`StorageError::Corrupt`] if the identity is damaged.
    pub fn open(path: &Path, cluster: &str, node_id: NodeId) -> Result<Self, StorageError> {
        files::create_directory(path)?;
        let lock = lock(path)?;
        let identity_path = path.join(IDENTITY);
        let (identity, is_new) = match fs::read(&identity_path) {
            Ok(bytes) => (IdentityFile::parse(&identity_path, &bytes)?, false),
            Err(error) if error.kind() == ErrorKind::NotFound => (create(path, cluster, node_id)?, true),
            Err(error) => return Err(files::unreadable(&identity_path, error)),
        };
        if identity.cluster != cluster {
            return Err(StorageError::OtherCluster {
                path: path.to_owned(),
                found: identity.cluster,
                expected: cluster.to_owned(),
            });
        }
        if identity.node_id != node_id {
            return Err(StorageError::OtherNode {
                path: path.to_owned(),
                found: identity.node_id,
                expected: node_id,
            });
        }
        check_log(path)?;
        Ok(Self { path: path.to_owned(), identity, is_new, _lock: lock })
    }

    /// Reads whom the directory at `path` belongs to, without a lock and without changing anything. None if it
    /// has no identity.
    ///
    /// # Errors
    /// As [`open`](Self::open), for a damaged or unreadable identity.
    pub fn inspect(path: &Path) -> Result<Option<Identity>, StorageError> {
        let path = path.join(IDENTITY);
        match fs::read(&path) {
            Ok(bytes) => IdentityFile::parse(&path, &bytes).map(Some),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(files::unreadable(&path, error)),
        }
    }

    /// Notes durably that the log has been made, and may be relied upon from now on.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn record_log(&self) -> Result<(), StorageError> {
        let (formed, unformed) = (self.path.join(FORMED), self.path.join(UNFORMED));
        if !exists(&formed)? {
            let text =
                b"The log of this node has been made. If it is missing, it is lost: do not remove this file.\n";
            files::write_durably(&formed, text)?;
        }
        match exists(&unformed)? {
            true => files::remove(&unformed),
            false => Ok(()),
        }
    }

    /// Who the directory belongs to.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether this call has made the identity: the node has never promised anything.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the log goes; not created here.
    pub fn log_dir(&self) -> PathBuf {
        self.path.join(LOG)
    }

    /// Where snapshots go; not created here.
    pub fn snapshot_dir(&self) -> PathBuf {
        self.path.join(SNAPSHOTS)
    }

    /// Where the event log is, which the node can do without.
    pub fn event_dir(&self) -> PathBuf {
        self.path.join(EVENTS)
    }
}

fn lock(path: &Path) -> Result<File, StorageError> {
    let lock_path = path.join(LOCK);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock_path)
        .map_err(|error| io_error("cannot open", &lock_path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StorageError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(error)) => Err(io_error("cannot lock", &lock_path, error)),
    }
}

/// Refuses a directory whose log was there once, and is not.
fn check_log(path: &Path) -> Result<(), StorageError> {
    let ready = path.join(READY);
    if exists(&ready)? {
        return Ok(()); // whether it keeps what it promises is for the log to say
    }
    let (formed, taken) = (path.join(FORMED), path.join(SNAPSHOTS));
    let lost = |marker: PathBuf| Err(StorageError::Lost { missing: ready.clone(), marker });
    if exists(&formed)? {
        return lost(formed);
    }
    // A snapshot is taken of a log only.
    if exists(&taken)?
        && let Some(snapshot) = files::list(&taken)?.into_iter().find(|path| snapshots::is_complete(path))
    {
        return lost(snapshot);
    }
    // Nothing is left that a log would leave; but then the directory says itself that there never was one.
    match exists(&path.join(UNFORMED))? {
        true => Ok(()),
        false => lost(path.join(IDENTITY)),
    }
}

/// Something in the directory at `path` that a node has put there after its identity. A directory of its own may be a mount
/// point, and hold what the file system keeps there: only what a node calls so is a node's.
fn content(path: &Path) -> Result<Option<PathBuf>, StorageError> {
    for name in CONTENTS {
        let found = path.join(name);
        if !exists(&found)? {
            continue;
        }
        let is_ours: fn(&Path) -> bool = match name {
            LOG => is_of_a_log,
            SNAPSHOTS => snapshots::is_snapshot,
            _ => |_| true,
        };
        if !files::is_directory(&found)? || files::list(&found)?.iter().any(|path| is_ours(path)) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn create(path: &Path, cluster: &str, node_id: NodeId) -> Result<Identity, StorageError> {
    if let Some(marker) = content(path)? {
        return Err(StorageError::Lost { missing: path.join(IDENTITY), marker });
    }
    let text = b"This directory is being made: its log was never ready, and nothing has been promised.\n";
    files::write_durably(&path.join(UNFORMED), text)?;
    let random = || u128::from(runtime::random_u64());
    let identity = Identity {
        cluster: cluster.to_owned(),
        node_id,
        incarnation: Incarnation(random() << 64 | random()),
    };
    let mut json = serde_json::to_vec_pretty(&IdentityFile::new(&identity))
        .expect("invariant: an identity is plain values");
    json.push(b'\n');
    files::write_durably(&path.join(IDENTITY), &json)?;
    files::sync(files::parent(path))?;
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> Result<DataDir, StorageError> {
        DataDir::open(path, "test", 1)
    }

    #[test]
    fn an_identity_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let first = open(&path).unwrap();
        assert!(first.is_new());
        let identity = first.identity().clone();
        drop(first);
        let second = open(&path).unwrap();
        assert!(!second.is_new());
        assert_eq!(*second.identity(), identity);
        assert_eq!(DataDir::inspect(&path).unwrap(), Some(identity));
        let other = DataDir::open(&dir.path().join("c"), "test", 1).unwrap();
        assert_ne!(other.identity().incarnation, second.identity().incarnation);
    }

    #[test]
    fn a_second_process_is_kept_out() {
        let dir = tempfile::tempdir().unwrap();
        let held = open(dir.path()).unwrap();
        assert!(matches!(open(dir.path()), Err(StorageError::InUse { .. })));
        drop(held);
        open(dir.path()).unwrap();
    }

    #[test]
    fn other_clusters_and_nodes_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()).unwrap());
        let error = DataDir::open(dir.path(), "prod", 1).unwrap_err();
        assert!(matches!(error, StorageError::OtherCluster { found, .. } if found == "test"));
        let error = DataDir::open(dir.path(), "test", 2).unwrap_err();
        assert!(matches!(error, StorageError::OtherNode { found: 1, expected: 2, .. }));
    }

    #[test]
    fn no_identity_is_made_beside_a_log() {
        for existing in [
            "log/db",
            "log/snap.00000000000000ff",
            "log.ready",
            "log.formed",
            "snapshots/x.snapshot",
            "snapshots/x.snapshot.7.unfinished",
            "lease.json",
            "reserve",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let existing = dir.path().join(existing);
            fs::create_dir_all(existing.parent().unwrap()).unwrap();
            fs::write(&existing, b"x").unwrap();
            assert!(DataDir::exists(dir.path()));
            assert!(matches!(open(dir.path()), Err(StorageError::Lost { .. })));
            assert!(!dir.path().join(IDENTITY).exists());
        }
    }

    /// The root of a file system is never empty.
    #[test]
    fn a_mount_point_is_no_sign_of_use() {
        use crate::storage::{SledOptions, SledStore};
        let dir = tempfile::tempdir().unwrap();
        let kept = ["lost+found/#7", ".snapshot/hourly.0", ".Trash-0/files/a", "System Volume Information/x"];
        for mounted in ["", "log", "snapshots"] {
            let mounted = dir.path().join(mounted);
            for kept in kept {
                fs::create_dir_all(mounted.join(kept)).unwrap();
            }
            fs::write(mounted.join("aquota.user"), b"x").unwrap();
            std::os::unix::fs::symlink("/nowhere", mounted.join(".nowhere")).unwrap();
        }
        assert!(!DataDir::exists(dir.path()));
        for _ in 0..2 {
            let data = open(dir.path()).unwrap();
            drop(SledStore::open_in(data, SledOptions::default(), None).unwrap());
        }
        for kept in kept {
            assert!(dir.path().join("log").join(kept).exists());
        }
    }

    /// Whatever of a used directory is missing, it is never taken for a new one.
    #[test]
    fn a_directory_of_which_a_part_is_left_is_refused() {
        use crate::storage::{SledOptions, SledStore};
        let made = || {
            let dir = tempfile::tempdir().unwrap();
            let data = open(dir.path()).unwrap();
            drop(SledStore::open_in(data, SledOptions::default(), None).unwrap());
            assert!(!dir.path().join(UNFORMED).exists());
            dir
        };
        let remove = |path: PathBuf| match path.is_dir() {
            true => fs::remove_dir_all(path).unwrap(),
            false => fs::remove_file(path).unwrap(),
        };
        // Every combination of what an identity can be left with, but for a whole directory.
        for kept in 0..8_u32 {
            let dir = made();
            let parts = [LOG, READY, FORMED];
            for (number, part) in parts.into_iter().enumerate() {
                if kept & (1 << number) == 0 {
                    remove(dir.path().join(part));
                }
            }
            let whole = |name: &str| dir.path().join(name).exists();
            let opened = open(dir.path())
                .and_then(|data| SledStore::open_in(data, SledOptions::default(), None).map(drop));
            match whole(LOG) && whole(READY) {
                true => opened.unwrap(),
                false => assert!(matches!(opened, Err(StorageError::Lost { .. })), "{kept:03b}: {opened:?}"),
            }
        }
        let dir = made();
        remove(dir.path().join(IDENTITY));
        assert!(matches!(open(dir.path()), Err(StorageError::Lost { .. })));
    }

    #[test]
    fn a_log_that_is_gone_is_not_made_anew() {
        use crate::storage::{SledOptions, SledStore};
        let dir = tempfile::tempdir().unwrap();
        // A crash after the identity was made, or while the first log was: nothing was promised.
        drop(open(dir.path()).unwrap());
        fs::create_dir(dir.path().join(LOG)).unwrap();
        let data = open(dir.path()).unwrap();
        drop(SledStore::open_in(data, SledOptions::default(), None).unwrap());
        drop(open(dir.path()).unwrap());

        fs::remove_dir_all(dir.path().join(LOG)).unwrap();
        let data = open(dir.path()).unwrap();
        let error = SledStore::open_in(data, SledOptions::default(), None).unwrap_err();
        assert!(matches!(error, StorageError::Lost { .. }));
        fs::remove_file(dir.path().join(READY)).unwrap();
        let error = open(dir.path()).unwrap_err();
        assert!(matches!(error, StorageError::Lost { marker, .. } if marker.ends_with(FORMED)));
        // Without the note, snapshots tell; and at last, that nothing says that there never was a log.
        fs::remove_file(dir.path().join(FORMED)).unwrap();
        fs::create_dir(dir.path().join(SNAPSHOTS)).unwrap();
        let error = open(dir.path()).unwrap_err();
        assert!(matches!(error, StorageError::Lost { marker, .. } if marker.ends_with(IDENTITY)));
        fs::write(dir.path().join(SNAPSHOTS).join("1-1.snapshot"), b"x").unwrap();
        assert!(matches!(open(dir.path()), Err(StorageError::Lost { .. })));
    }

    #[test]
    fn a_half_written_identity_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("identity.json.unfinished"), b"{").unwrap();
        assert!(open(dir.path()).unwrap().is_new());
    }

    #[test]
    fn any_damage_is_corrupt_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()).unwrap());
        let path = dir.path().join(IDENTITY);
        let good = fs::read(&path).unwrap();
        let text = String::from_utf8(good.clone()).unwrap();
        let edited = text.replace("\"node_id\": 1", "\"node_id\": 2").into_bytes();
        for bad in [Vec::new(), good[..good.len() / 2].to_vec(), edited] {
            fs::write(&path, &bad).unwrap();
            assert!(matches!(open(dir.path()), Err(StorageError::Corrupt { .. })));
            assert_eq!(fs::read(&path).unwrap(), bad);
        }
        let newer = text.replace("\"format_version\": 1", "\"format_version\": 9").into_bytes();
        fs::write(&path, newer).unwrap();
        assert!(matches!(open(dir.path()), Err(StorageError::Version { found: 9, .. })));
    }
}
