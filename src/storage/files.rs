//! The few file operations that durability rests on, each written once.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::error::StorageError;

/// Ends the name of a file that is still being written; such files mean nothing and are removed at open.
pub(crate) const UNFINISHED: &str = "unfinished";

pub(crate) fn io_error(operation: &'static str, path: &Path, source: io::Error) -> StorageError {
    StorageError::Io { operation, path: path.to_owned(), source }
}

/// For a read of what is there already: unlike damage, that it fails says nothing about what is on the disk.
pub(crate) fn unreadable(path: &Path, source: io::Error) -> StorageError {
    StorageError::Unreadable { path: path.to_owned(), source }
}

/// Whether an IO error of this kind says that there is no room, on the disk or within a quota.
pub(crate) fn is_full(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// Makes the content of a file, or the entries of a directory, durable.
pub(crate) fn sync(path: &Path) -> Result<(), StorageError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| io_error("cannot sync", path, error))
}

/// Whether there is a directory at `path`; that it cannot be told is an error, not a no.
pub(crate) fn is_directory(path: &Path) -> Result<bool, StorageError> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(metadata.is_dir()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(unreadable(path, error)),
    }
}

/// Whether there is anything at `path`; that it cannot be told is an error, not a no.
pub(crate) fn exists(path: &Path) -> Result<bool, StorageError> {
    path.try_exists().map_err(|error| unreadable(path, error))
}

/// The directory that holds `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Creates a directory and those above it, and makes its entry durable, also if it was there already: a crash may
/// have come between its creation and the sync.
pub(crate) fn create_directory(path: &Path) -> Result<(), StorageError> {
    if is_directory(path)? {
        return match sync(parent(path)) {
            // Then it was not made here either.
            Err(StorageError::Io { source, .. }) if source.kind() == ErrorKind::PermissionDenied => Ok(()),
            outcome => outcome,
        };
    }
    create_directory(parent(path))?;
    match fs::create_dir(path) {
        Ok(()) => sync(parent(path)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists && is_directory(path)? => sync(parent(path)),
        Err(error) => Err(io_error("cannot create", path, error)),
    }
}

/// Removes a file if it is there.
pub(crate) fn remove(path: &Path) -> Result<(), StorageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io_error("cannot remove", path, error)),
        _ => Ok(()),
    }
}

/// The name a file has until it is complete.
pub(crate) fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(UNFINISHED);
    name.into()
}

/// Gives a complete and synced file its name, durably.
pub(crate) fn rename_durably(from: &Path, to: &Path) -> Result<(), StorageError> {
    fs::rename(from, to).map_err(|error| io_error("cannot rename to", to, error))?;
    sync(parent(to))
}

/// Writes a small file so that after a crash it is there as a whole, or as it was before.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), StorageError> {
    let aside = unfinished(path);
    File::create(&aside)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .map_err(|error| io_error("cannot write", &aside, error))?;
    rename_durably(&aside, path)
}

/// Paths of what is in a directory, in the order of their names. Where it is the root of a file system, that keeps things of
/// its own there, such as `lost+found`, `.snapshot` or `aquota.user`: they are nobody's, and may not even be read.
pub(crate) fn list(directory: &Path) -> Result<Vec<PathBuf>, StorageError> {
    let list = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.path())).collect()
    };
    let mut paths = list().map_err(|error| unreadable(directory, error))?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_looked_at_is_not_taken_for_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), b"").unwrap();
        std::os::unix::fs::symlink("loop", path("loop")).unwrap();
        assert!(is_directory(dir.path()).unwrap() && exists(dir.path()).unwrap());
        assert!(!is_directory(&path("file")).unwrap() && exists(&path("file")).unwrap());
        assert!(!is_directory(&path("none")).unwrap() && !exists(&path("none")).unwrap());
        for outcome in [
            is_directory(&path("loop")).map(drop),
            exists(&path("loop")).map(drop),
            create_directory(&path("loop")),
            create_directory(&path("loop/below")),
        ] {
            assert!(matches!(outcome, Err(StorageError::Unreadable { .. })), "{outcome:?}");
        }
        create_directory(&path("a/b")).unwrap();
        assert!(is_directory(&path("a/b")).unwrap());
    }

    /// Who must only be let in would move a healthy directory aside.
    #[test]
    fn what_to_do_depends_on_why_it_cannot_be_read() {
        let advice =
            |number| unreadable(Path::new("identity.json"), io::Error::from_raw_os_error(number)).to_string();
        assert!(advice(libc::EIO).contains("move the whole data directory aside"));
        assert!(
            advice(libc::EACCES).contains("the right to read") && !advice(libc::EACCES).contains("aside")
        );
        assert!(advice(libc::EMFILE).contains("open files") && !advice(libc::EMFILE).contains("aside"));
    }
}
