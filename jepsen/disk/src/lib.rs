//! Disks for tests: one that fails on demand, one that forgets, and one that is small.
//!
//! [`FaultyDisk`] is a file system of its own (FUSE) that passes everything on to a directory of the host, and each
//! operation past a [`Fault`] first. [`ForgetfulDisk`] is another, in memory: the power can be [cut](Cut), which costs what was not
//! synced, and a single read can fail. [`SmallDisk`] is a tmpfs of a given size. All need the right to
//! mount, and unmount when dropped, also when the test has failed.
//!
//! It knows nothing of `quorate`. Linux only; elsewhere the crate is empty.
//!
//! # Adding a fault
//! Every operation that changes something asks `Faults::judge` before it reaches the backing
//! directory, naming what it is about to do. A new kind of failure is a new [`Fault`] and its verdict there.
//! A new way to lose what was not synced is a new [`Cut`], and says in `image` what becomes of a change.

#![cfg(target_os = "linux")]

mod faults;
mod forgetful;
mod image;
mod inodes;
mod passthrough;
mod random;
mod small;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use faults::Fault;
use faults::Faults;
pub use forgetful::{ForgetfulDisk, Part, Read};
pub use image::{Cut, Image, Names};
use passthrough::Passthrough;
pub use small::SmallDisk;

/// What was mounted, or `None` when it could not be and `QUORATE_TEST_WITHOUT_MOUNT` allows that its tests are left out: a
/// check that did not run must not look like one that passed.
///
/// # Panics
/// Panics when it could not be mounted and that was not allowed.
pub fn mounted<T>(mount: io::Result<T>) -> Option<T> {
    match mount {
        Ok(mounted) => Some(mounted),
        Err(error) if std::env::var_os("QUORATE_TEST_WITHOUT_MOUNT").is_some() => {
            eprintln!("NOT TESTED: cannot mount a file system here: {error}");
            None
        }
        Err(error) => panic!(
            "this test mounts file systems and cannot: {error}. Run it as root with /dev/fuse, or set QUORATE_TEST_WITHOUT_MOUNT to leave it out"
        ),
    }
}

/// Threads that answer the kernel. An operation that is held occupies none.
const THREADS: usize = 4;

/// A mounted directory whose disk fails on demand.
#[derive(Debug)]
pub struct FaultyDisk {
    faults: Arc<Faults>,
    session: Option<fuser::BackgroundSession>,
    path: PathBuf,
}

impl FaultyDisk {
    /// Mounts `backing` at `path`; both are existing directories.
    ///
    /// # Errors
    /// When this process may not mount, or there is no FUSE.
    pub fn mount(backing: &Path, path: &Path) -> io::Result<Self> {
        let faults = Arc::new(Faults::default());
        let mut config = fuser::Config::default();
        config.mount_options = vec![fuser::MountOption::FSName("quorate-disk".to_owned())];
        config.n_threads = Some(THREADS);
        let session = fuser::spawn_mount(Passthrough::new(backing, faults.clone())?, path, &config)?;
        Ok(Self { faults, session: Some(session), path: path.to_owned() })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// From now on, operations meet `fault`. Those that an earlier fault holds stay held.
    pub fn set(&self, fault: Fault) {
        self.faults.set(fault);
    }

    /// Mends the disk: operations succeed again, and those that were held are carried out, in their order.
    pub fn mend(&self) {
        self.faults.mend();
    }

    /// Operations that are held at present.
    pub fn held(&self) -> usize {
        self.faults.held()
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        small::unmount(&self.path);
        self.mend();
        drop(self.session.take());
    }
}
