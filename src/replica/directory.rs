//! What a replica keeps, and where.
//!
//! ```text
//! <data-dir>/
//!   replica.json   what is followed
//!   events/        what it was told; its lock is that of the whole directory
//!   snapshots/     the state, now and then
//! ```

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::ReplicaConfig;
use crate::error::{OpenError, StorageError};
use crate::feed::EventLog;
use crate::machine::StateMachine;
use crate::raft::told::ToldState;
use crate::storage::{DataDir, create_directory, write_durably};

/// The file that says what is followed.
const ABOUT: &str = "replica.json";
/// The newest form of it that this build knows.
const FORMAT_VERSION: u32 = 1;

/// What is in that file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct AboutReplica {
    format_version: u32,
    /// Tenants that are followed, and the collection if only that is.
    filters: Vec<(String, Option<String>)>,
}

/// Locks the directory and reads it, or makes it. Blocks.
///
/// # Errors
/// See [`Replica::open`](super::Replica::open).
pub(super) fn open<M: StateMachine>(config: &ReplicaConfig, machine: M) -> Result<ToldState<M>, OpenError> {
    let dir = &config.data_dir;
    if !dir.join(ABOUT).exists() && DataDir::exists(dir) {
        return Err(OpenError::Config(format!(
            "{} is not a replica's: it holds something else; choose another data directory",
            dir.display()
        )));
    }
    create_directory(dir)?;
    // Its lock first: another process may be about to make the rest.
    let event_log = EventLog::open(&dir.join("events"), config.event_log)?;
    claim(dir, config)?;
    Ok(ToldState::open(dir, event_log, machine)?)
}

/// Sees to it that the directory is of one that follows the same.
fn claim(dir: &Path, config: &ReplicaConfig) -> Result<(), OpenError> {
    let path = dir.join(ABOUT);
    let filters = config.filters.iter().map(|filter| (filter.tenant.clone(), filter.collection.clone()));
    let own = AboutReplica { format_version: FORMAT_VERSION, filters: filters.collect() };
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let text = serde_json::to_vec_pretty(&own).expect("invariant: it has only texts and numbers");
            return Ok(write_durably(&path, &text)?);
        }
        Err(source) => return Err(StorageError::Unreadable { path, source }.into()),
    };
    let found: AboutReplica = serde_json::from_slice(&bytes)
        .map_err(|error| StorageError::Corrupt { path: path.clone(), detail: error.to_string() })?;
    if found.format_version > FORMAT_VERSION {
        let (found, supported) = (found.format_version, FORMAT_VERSION);
        return Err(StorageError::Version { path, found, supported }.into());
    }
    match found.filters == own.filters {
        true => Ok(()),
        false => Err(OpenError::Config(format!(
            "the replica in {} follows other tenants or collections: give it the same ones, choose another data directory, or delete this one to begin anew",
            dir.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::EntryFilter;
    use crate::kv::machine::KvMachine;

    fn config(dir: &Path) -> ReplicaConfig {
        ReplicaConfig::new(["127.0.0.1:1"], dir)
    }

    #[test]
    fn a_directory_is_of_one_replica_that_follows_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let open = |config: &ReplicaConfig| super::open(config, KvMachine::default());
        let first = open(&config(dir.path())).map_err(|error| error.to_string());
        assert!(first.is_ok());
        let busy = open(&config(dir.path())).err().unwrap();
        assert!(busy.to_string().contains("in use"), "{busy}");
        drop(first);
        assert!(open(&config(dir.path())).is_ok());
        let part = ReplicaConfig { filters: vec![EntryFilter::tenant("a")], ..config(dir.path()) };
        let other = open(&part).err().unwrap();
        assert!(matches!(other, OpenError::Config(_)), "{other}");
        fs::write(dir.path().join(ABOUT), "{").unwrap();
        let corrupt = open(&config(dir.path())).err().unwrap();
        assert!(matches!(corrupt, OpenError::Storage(StorageError::Corrupt { .. })), "{corrupt}");
    }

    #[test]
    fn a_members_directory_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        drop(DataDir::open(dir.path(), "c", 1).unwrap());
        let refused = super::open(&config(dir.path()), KvMachine::default()).err().unwrap();
        assert!(refused.to_string().contains("not a replica's"), "{refused}");
    }
}
