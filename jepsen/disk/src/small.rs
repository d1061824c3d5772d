//! A disk of a given size.

use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

/// A tmpfs, mounted for as long as this lives.
#[derive(Debug)]
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// Mounts `bytes` of empty space at `path`, an existing directory.
    ///
    /// # Errors
    /// When this process may not mount.
    pub fn mount(path: &Path, bytes: u64) -> io::Result<Self> {
        let options = std::ffi::CString::new(format!("size={bytes}")).map_err(io::Error::other)?;
        rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::empty(), Some(options.as_c_str()))?;
        Ok(Self { path: path.to_owned() })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes to `name` until nothing fits any more. Returns how many bytes did.
    ///
    /// # Errors
    /// Whatever else than a full disk ends it.
    pub fn fill(&self, name: &str) -> io::Result<u64> {
        use std::io::Write;
        const CHUNK_BYTES: usize = 4 * 1024 * 1024;
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(self.path.join(name))?;
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut written = 0;
        while !chunk.is_empty() {
            match file.write(&chunk) {
                Ok(bytes) => written += bytes as u64,
                // The rest may take less than that.
                Err(error) if error.kind() == io::ErrorKind::StorageFull => chunk.truncate(chunk.len() / 2),
                Err(error) => return Err(error),
            }
        }
        Ok(written)
    }

    /// Removes what [`fill`](Self::fill) has written.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn empty(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        unmount(&self.path);
    }
}

/// Unmounts now, whoever still uses it. Operations under way in a FUSE file system are aborted: a process that waits
/// for one could not be killed.
pub(crate) fn unmount(path: &Path) {
    // It may be gone already, and a test that is over can do nothing about an error.
    let _ = rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::FORCE);
}
