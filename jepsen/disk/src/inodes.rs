//! Numbers for files: what the kernel calls them by, and where they are.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuser::{Errno, FileHandle, INodeNo};

/// Known files and open ones. A number is never used again.
#[derive(Debug)]
pub(crate) struct Inodes {
    /// Absolute, in the backing directory.
    paths: HashMap<u64, PathBuf>,
    numbers: HashMap<PathBuf, u64>,
    open: HashMap<u64, Arc<File>>,
    next: u64,
}

impl Inodes {
    pub(crate) fn new(root: &Path) -> Self {
        let root_number = INodeNo::ROOT.0;
        Self {
            paths: HashMap::from([(root_number, root.to_owned())]),
            numbers: HashMap::from([(root.to_owned(), root_number)]),
            open: HashMap::new(),
            next: root_number + 1,
        }
    }

    fn next(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(crate) fn path(&self, ino: INodeNo) -> Result<PathBuf, Errno> {
        self.paths.get(&ino.0).cloned().ok_or(Errno::ENOENT)
    }

    /// The number of the file at `path`, a new one if it has none.
    pub(crate) fn number(&mut self, path: &Path) -> INodeNo {
        if let Some(number) = self.numbers.get(path) {
            return INodeNo(*number);
        }
        let number = self.next();
        self.paths.insert(number, path.to_owned());
        self.numbers.insert(path.to_owned(), number);
        INodeNo(number)
    }

    /// The file at `path` is gone; open handles of it stay.
    pub(crate) fn forget(&mut self, path: &Path) {
        if let Some(number) = self.numbers.remove(path) {
            self.paths.remove(&number);
        }
    }

    /// What was at `from`, and below it, is at `to` now.
    pub(crate) fn rename(&mut self, from: &Path, to: &Path) {
        self.forget(to);
        let moved: Vec<_> = self.numbers.keys().filter(|path| path.starts_with(from)).cloned().collect();
        for path in moved {
            let Some(number) = self.numbers.remove(&path) else { continue };
            let rest = path.strip_prefix(from).unwrap_or(Path::new(""));
            let new = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            self.paths.insert(number, new.clone());
            self.numbers.insert(new, number);
        }
    }

    pub(crate) fn opened(&mut self, file: File) -> FileHandle {
        let handle = self.next();
        self.open.insert(handle, Arc::new(file));
        FileHandle(handle)
    }

    pub(crate) fn file(&self, handle: FileHandle) -> Result<Arc<File>, Errno> {
        self.open.get(&handle.0).cloned().ok_or(Errno::EBADF)
    }

    pub(crate) fn closed(&mut self, handle: FileHandle) {
        self.open.remove(&handle.0);
    }
}
