//! What a voter has promised its leaders, across restarts.
//!
//! A leader that a voter has confirmed relies on not being replaced for the length of a lease. A voter that is restarted
//! keeps silent for as long, and if it is started with a shorter lease than before, for as long as *before*. So the
//! longest lease that may still bind is in the data directory, written before the first promise of that length is
//! made.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::StorageError;

use super::files;
use super::identity::FormatVersion;

/// The file's name.
pub(super) const FILE: &str = "lease.json";
const FORMAT_VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LeaseFile {
    format_version: u32,
    lease_ms: u64,
    /// Of the other fields, in decimal, with NUL between them.
    crc32: u32,
}

impl LeaseFile {
    fn new(lease_ms: u64) -> Self {
        let crc32 = crc32fast::hash(format!("{FORMAT_VERSION}\0{lease_ms}").as_bytes());
        Self { format_version: FORMAT_VERSION, lease_ms, crc32 }
    }
}

/// The longest lease, in milliseconds, that the node in `directory` may have promised, `lease_ms` included, which it may
/// promise from now on.
///
/// # Errors
/// When the disk fails, or the file is damaged or of a newer version.
pub(crate) fn promise(directory: &Path, lease_ms: u64) -> Result<u64, StorageError> {
    let path = directory.join(FILE);
    let longest = read(&path)?.map_or(lease_ms, |before| before.max(lease_ms));
    settle(directory, longest)?;
    Ok(longest)
}

/// Longer leases than `lease_ms` have run out.
///
/// # Errors
/// As [`promise`].
pub(crate) fn settle(directory: &Path, lease_ms: u64) -> Result<(), StorageError> {
    let path: PathBuf = directory.join(FILE);
    if read(&path)? == Some(lease_ms) {
        return Ok(());
    }
    let text = serde_json::to_vec(&LeaseFile::new(lease_ms)).expect("invariant: numbers can be encoded");
    files::write_durably(&path, &text)
}

fn read(path: &Path) -> Result<Option<u64>, StorageError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(files::unreadable(path, error)),
    };
    let corrupt = |detail: String| StorageError::Corrupt { path: path.to_owned(), detail };
    let not_json = |error: serde_json::Error| corrupt(format!("it does not parse: {error}"));
    let version: FormatVersion = serde_json::from_slice(&bytes).map_err(not_json)?;
    if version.format_version > FORMAT_VERSION {
        return Err(StorageError::Version {
            path: path.to_owned(),
            found: version.format_version,
            supported: FORMAT_VERSION,
        });
    }
    let file: LeaseFile = serde_json::from_slice(&bytes).map_err(not_json)?;
    match file.crc32 == LeaseFile::new(file.lease_ms).crc32 {
        true => Ok(Some(file.lease_ms)),
        false => Err(corrupt("its checksum does not match".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_lease_binds_until_it_has_run_out() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(promise(dir.path(), 300).unwrap(), 300);
        assert_eq!(promise(dir.path(), 1500).unwrap(), 1500, "raised");
        assert_eq!(promise(dir.path(), 300).unwrap(), 1500, "lowered, and the old one may bind");
        assert_eq!(promise(dir.path(), 300).unwrap(), 1500, "still");
        settle(dir.path(), 300).unwrap();
        assert_eq!(promise(dir.path(), 300).unwrap(), 300);
    }

    #[test]
    fn damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        promise(dir.path(), 300).unwrap();
        let path = dir.path().join(FILE);
        let text = fs::read_to_string(&path).unwrap();
        for wrong in [text.replace("300", "301"), String::new(), text.replace("lease_ms", "least_ms")] {
            fs::write(&path, wrong).unwrap();
            assert!(matches!(promise(dir.path(), 300), Err(StorageError::Corrupt { .. })));
        }
        for fields in ["\"format_version\":2", "\"format_version\":2,\"since\":7"] {
            fs::write(&path, text.replace("\"format_version\":1", fields)).unwrap();
            let error = promise(dir.path(), 300).unwrap_err();
            assert!(matches!(error, StorageError::Version { found: 2, .. }), "{error}");
        }
    }
}
