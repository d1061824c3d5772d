//! What a data directory says about the cluster in it: `cluster.lock` while it runs, `cluster.json`
//! always.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::error::ClusterError;
use crate::spec::ClusterSpec;

/// One node in `cluster.json`, which is a list of these.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its id.
    pub node_id: u64,
    /// Its process, or null while it does not run.
    pub pid: Option<u32>,
    /// `host:port` for clients.
    pub client: String,
    /// `host:port` for peers.
    pub peer: String,
}

/// The record of a cluster, and the sole right to run it.
#[derive(Debug)]
pub(crate) struct Record {
    path: PathBuf,
    nodes: Mutex<Vec<NodeRecord>>,
    /// Locked for as long as this value lives; the kernel releases it however the process ends.
    lock: File,
}

impl Drop for Record {
    fn drop(&mut self) {
        // Closing would do, but for a child that another thread forks in this moment: until its exec it has
        // a copy of the descriptor, and with it the lock.
        let _ = self.lock.unlock();
    }
}

impl Record {
    /// Locks the directory and checks that what it holds is what `spec` asks for.
    pub(crate) fn open(spec: &ClusterSpec) -> Result<Self, ClusterError> {
        let lock = lock(&spec.data_dir)?;
        let path = spec.data_dir.join("cluster.json");
        let nodes = expected(spec);
        if let Some(found) = read(&path)? {
            check(spec, &found, &nodes)?;
        }
        Ok(Self { path, nodes: Mutex::new(nodes), lock })
    }

    /// Notes that `node_id` runs as `pid`, or does not run.
    pub(crate) fn set_pid(&self, node_id: u64, pid: Option<u32>) -> Result<(), ClusterError> {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        for node in nodes.iter_mut().filter(|node| node.node_id == node_id) {
            node.pid = pid;
        }
        // Under the lock, so that an older list never replaces a newer one.
        replace(&self.path, &nodes).map_err(ClusterError::io("cannot write", &self.path))
    }
}

fn lock(data_dir: &Path) -> Result<File, ClusterError> {
    let path = data_dir.join("cluster.lock");
    let mut file = OpenOptions::new()
        .create(true)
        .read(true)
        .write(true)
        .truncate(false)
        .open(&path)
        .map_err(ClusterError::io("cannot open", &path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let pid = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
            return Err(ClusterError::InUse { data_dir: data_dir.to_owned(), pid });
        }
        Err(TryLockError::Error(source)) => {
            return Err(ClusterError::Io { operation: "cannot lock", path, source });
        }
    }
    // For the message to whoever finds the directory locked.
    let write_pid = file.set_len(0).and_then(|()| writeln!(file, "{}", process::id()));
    match write_pid {
        // A cluster whose disk is full can be read, and what is in the way be removed.
        Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(file),
        written => written.map(|()| file).map_err(ClusterError::io("cannot write", &path)),
    }
}

fn expected(spec: &ClusterSpec) -> Vec<NodeRecord> {
    let node = |node_id| NodeRecord {
        node_id,
        pid: None,
        client: spec.client_address(node_id),
        peer: spec.peer_address(node_id),
    };
    spec.node_ids().map(node).collect()
}

fn read(path: &Path) -> Result<Option<Vec<NodeRecord>>, ClusterError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(ClusterError::Io { operation: "cannot read", path: path.to_owned(), source });
        }
    };
    match serde_json::from_slice(&text) {
        Ok(nodes) => Ok(Some(nodes)),
        Err(source) => Err(ClusterError::Record { path: path.to_owned(), source }),
    }
}

/// The members of a formed cluster know each other by address, and their number is agreed in the log:
/// neither can be changed by starting differently.
fn check(spec: &ClusterSpec, found: &[NodeRecord], expected: &[NodeRecord]) -> Result<(), ClusterError> {
    if found.len() != expected.len() {
        return Err(ClusterError::NodeCount {
            data_dir: spec.data_dir.clone(),
            found: found.len() as u64,
            expected: spec.nodes,
        });
    }
    for (found, expected) in found.iter().zip(expected) {
        let pairs = [(&found.peer, &expected.peer), (&found.client, &expected.client)];
        if let Some((found, expected_address)) = pairs.into_iter().find(|(found, expected)| found != expected)
        {
            return Err(ClusterError::Addresses {
                data_dir: spec.data_dir.clone(),
                node_id: expected.node_id,
                found: found.clone(),
                expected: expected_address.clone(),
            });
        }
    }
    Ok(())
}

/// A reader sees the old list or the new one, also after a power cut.
fn replace(path: &Path, nodes: &[NodeRecord]) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(nodes)?;
    text.push(b'\n');
    let temporary = path.with_extension("json.tmp");
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(&text)?;
        file.sync_all()
    });
    match written {
        Ok(()) => fs::rename(temporary, path),
        // In its place it needs no room that it does not have. Whoever is cut off meanwhile reads an error.
        Err(error) if error.kind() == io::ErrorKind::StorageFull && path.exists() => {
            let _ = fs::remove_file(&temporary);
            let mut file = OpenOptions::new().write(true).open(path)?;
            file.write_all(&text)?;
            file.set_len(text.len() as u64)?;
            file.sync_all()
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(dir: &Path) -> ClusterSpec {
        ClusterSpec::new("quorate", dir)
    }

    #[test]
    fn the_record_follows_every_change() {
        let dir = tempfile::tempdir().unwrap();
        let record = Record::open(&spec(dir.path())).unwrap();
        record.set_pid(2, Some(77)).unwrap();
        let pids = |nodes: Vec<NodeRecord>| nodes.iter().map(|node| node.pid).collect::<Vec<_>>();
        let path = dir.path().join("cluster.json");
        assert_eq!(pids(read(&path).unwrap().unwrap()), [None, Some(77), None]);
        record.set_pid(2, None).unwrap();
        assert_eq!(pids(read(&path).unwrap().unwrap()), [None, None, None]);
    }

    #[test]
    fn a_directory_in_use_is_refused_until_it_is_released() {
        let dir = tempfile::tempdir().unwrap();
        let first = Record::open(&spec(dir.path())).unwrap();
        let error = Record::open(&spec(dir.path())).unwrap_err();
        assert!(matches!(&error, ClusterError::InUse { pid: Some(pid), .. } if *pid == process::id()));
        assert!(error.to_string().contains("stop that one first"), "{error}");
        drop(first);
        Record::open(&spec(dir.path())).unwrap();
    }

    #[test]
    fn a_directory_of_other_nodes_or_addresses_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        Record::open(&spec(dir.path())).unwrap().set_pid(1, None).unwrap();
        let mut five = spec(dir.path());
        five.nodes = 5;
        let error = Record::open(&five).unwrap_err();
        assert!(error.to_string().contains("start with --nodes 3"), "{error}");
        let mut moved = spec(dir.path());
        moved.peer_port = 8901;
        let error = Record::open(&moved).unwrap_err();
        assert!(error.to_string().contains("at 127.0.0.1:7901, not 127.0.0.1:8901"), "{error}");
        fs::write(dir.path().join("cluster.json"), "[{").unwrap();
        assert!(matches!(Record::open(&spec(dir.path())), Err(ClusterError::Record { .. })));
    }
}
