//! A disk that forgets what was not synced, and that fails single reads.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use std::collections::HashMap;

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::FallocateFlags;

use crate::image::{Cut, Image, Kind, Names, ROOT, Refusal};

/// The kernel is to ask again every time.
const TTL: Duration = Duration::ZERO;
/// What a disk writes whole, and what files occupy multiples of.
const BLOCK_BYTES: u32 = 4096;
/// More than any test fills.
const BLOCKS: u64 = 16 * 1024 * 1024;
/// What the kernel may write at once.
const MAX_WRITE_BYTES: u32 = 1024 * 1024;

/// A mounted directory on a disk of its own, in memory, that the power can be taken from.
///
/// What a program has read is never kept by the kernel, so every read of a program is one of the disk.
#[derive(Debug)]
pub struct ForgetfulDisk {
    state: Arc<Mutex<State>>,
    session: Option<fuser::BackgroundSession>,
    path: PathBuf,
}

/// A read that the disk was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// Of what, seen from the root.
    pub path: PathBuf,
    /// What of it.
    pub part: Part,
}

/// What a read is after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The bytes of a file.
    Bytes {
        /// From where on.
        offset: u64,
        /// How many at most.
        count: u32,
    },
    /// The names in a directory.
    Names,
    /// Whether it is there, and what it is. Not counted of the root, which always answers: there would be nothing to unmount.
    Attributes,
}

#[derive(Debug)]
struct State {
    image: Image,
    open: HashMap<u64, u64>,
    next_handle: u64,
    /// Changes until the power goes.
    remaining: Option<u64>,
    changes: u64,
    /// Of which number the change is that fails.
    failing_change: Option<u64>,
    is_off: bool,
    reads: Vec<Read>,
    /// Of which number the read is that fails.
    failing: Option<usize>,
}

impl ForgetfulDisk {
    /// Mounts an empty disk at `path`, an existing directory.
    ///
    /// # Errors
    /// When this process may not mount, or there is no FUSE.
    pub fn mount(path: &Path, names: Names) -> io::Result<Self> {
        let state = Arc::new(Mutex::new(State {
            image: Image::new(names),
            open: HashMap::new(),
            next_handle: 1,
            remaining: None,
            changes: 0,
            failing_change: None,
            is_off: false,
            reads: Vec::new(),
            failing: None,
        }));
        let mut config = fuser::Config::default();
        config.mount_options = vec![fuser::MountOption::FSName("quorate-forgetful-disk".to_owned())];
        config.n_threads = Some(crate::THREADS);
        let session = fuser::spawn_mount(Files(state.clone()), path, &config)?;
        Ok(Self { state, session: Some(session), path: path.to_owned() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes, syncs and changes of names so far, or since [`count_changes`](Self::count_changes).
    pub fn changes(&self) -> u64 {
        self.state().changes
    }

    /// Counts changes from here on, and has the one of number `failing`, from 0 on, fail with EIO.
    pub fn count_changes(&self, failing: Option<u64>) {
        let mut state = self.state();
        state.changes = 0;
        state.failing_change = failing;
    }

    /// The power goes after so many more changes. From then on everything fails with EIO.
    pub fn cut_after(&self, changes: u64) {
        self.state().remaining = Some(changes);
    }

    /// Whether the power is gone.
    pub fn is_off(&self) -> bool {
        self.state().is_off
    }

    /// Takes the power away, and gives it back. What is there then is what `cut` has left; the same seed leaves
    /// the same. The processes that used the disk must be gone.
    pub fn cut(&self, cut: Cut, seed: u64) {
        let left = self.state().image.after(cut, seed);
        self.restore(&left);
    }

    /// What the disk holds.
    pub fn image(&self) -> Image {
        self.state().image.clone()
    }

    /// Puts back what the disk once held, and turns it on. The processes that used it must be gone.
    pub fn restore(&self, image: &Image) {
        let mut state = self.state();
        state.image = image.clone();
        state.open.clear();
        (state.remaining, state.is_off) = (None, false);
    }

    /// Counts reads from here on, and has the one of number `failing`, from 0 on, fail with EIO.
    pub fn count_reads(&self, failing: Option<usize>) {
        let mut state = self.state();
        state.reads.clear();
        state.failing = failing;
    }

    /// The reads since [`count_reads`](Self::count_reads).
    pub fn reads(&self) -> Vec<Read> {
        self.state().reads.clone()
    }
}

impl Drop for ForgetfulDisk {
    fn drop(&mut self) {
        crate::small::unmount(&self.path);
        drop(self.session.take());
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("invariant: no panic under this lock")
}

impl State {
    fn check_power(&self) -> Result<(), Errno> {
        if self.is_off { Err(Errno::EIO) } else { Ok(()) }
    }

    /// Counts a change, unless the power goes before it.
    fn meet_change(&mut self) -> Result<(), Errno> {
        self.is_off |= self.remaining == Some(0);
        self.check_power()?;
        self.remaining = self.remaining.map(|remaining| remaining - 1);
        let fails = self.failing_change == Some(self.changes);
        self.changes += 1;
        if fails { Err(Errno::EIO) } else { Ok(()) }
    }

    /// Counts a read, unless it is to fail.
    fn meet_read(&mut self, inode: u64, part: Part) -> Result<(), Errno> {
        let path = self.image.path(inode).unwrap_or_default();
        self.meet_read_of(path, part)
    }

    fn meet_read_of(&mut self, path: PathBuf, part: Part) -> Result<(), Errno> {
        self.check_power()?;
        let fails = self.failing == Some(self.reads.len());
        self.reads.push(Read { path, part });
        if fails { Err(Errno::EIO) } else { Ok(()) }
    }

    fn open(&mut self, inode: u64) -> FileHandle {
        let handle = self.next_handle;
        self.next_handle += 1;
        self.open.insert(handle, inode);
        FileHandle(handle)
    }

    fn file(&self, handle: FileHandle) -> Result<u64, Errno> {
        self.open.get(&handle.0).copied().ok_or(Errno::EIO) // from before a cut
    }

    fn attributes(&self, inode: u64) -> Result<FileAttr, Errno> {
        let (kind, size, perm) = match self.image.kind(inode)? {
            Kind::Directory => (FileType::Directory, 0, 0o755),
            Kind::File { bytes } => (FileType::RegularFile, bytes, 0o644),
        };
        Ok(FileAttr {
            ino: INodeNo(inode),
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: BLOCK_BYTES,
            flags: 0,
        })
    }
}

impl From<Refusal> for Errno {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Missing => Self::ENOENT,
            Refusal::Exists => Self::EEXIST,
            Refusal::NotADirectory => Self::ENOTDIR,
            Refusal::IsADirectory => Self::EISDIR,
            Refusal::NotEmpty => Self::ENOTEMPTY,
        }
    }
}

fn length(bytes: u64) -> Result<usize, Errno> {
    usize::try_from(bytes).map_err(|_| Errno::EFBIG)
}

fn answer(reply: ReplyEmpty, outcome: Result<(), Errno>) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

fn answer_entry(reply: ReplyEntry, outcome: Result<FileAttr, Errno>) {
    match outcome {
        Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
        Err(errno) => reply.error(errno),
    }
}

fn answer_attributes(reply: ReplyAttr, outcome: Result<FileAttr, Errno>) {
    match outcome {
        Ok(attributes) => reply.attr(&TTL, &attributes),
        Err(errno) => reply.error(errno),
    }
}

struct Files(Arc<Mutex<State>>);

impl Files {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    fn make(&self, parent: INodeNo, name: &OsStr, kind: Kind) -> Result<(u64, FileAttr), Errno> {
        let mut state = self.state();
        state.meet_change()?;
        let inode = state.image.create(parent.0, name, kind)?;
        Ok((inode, state.attributes(inode)?))
    }

    fn remove(&self, parent: INodeNo, name: &OsStr) -> Result<(), Errno> {
        let mut state = self.state();
        state.meet_change()?;
        Ok(state.image.remove(parent.0, name)?)
    }

    fn sync(&self, inode: INodeNo) -> Result<(), Errno> {
        let mut state = self.state();
        state.meet_change()?;
        Ok(state.image.sync(inode.0)?)
    }
}

impl Filesystem for Files {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Less is right too.
        let _ = config.set_max_write(MAX_WRITE_BYTES);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.state();
        let path = state.image.path(parent.0).unwrap_or_default().join(name);
        let found = state.meet_read_of(path, Part::Attributes).and_then(|()| {
            let inode = state.image.lookup(parent.0, name)?;
            state.attributes(inode)
        });
        answer_entry(reply, found);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let mut state = self.state();
        // The root answers always: else there would be nothing to unmount.
        let on = if ino.0 == ROOT { Ok(()) } else { state.meet_read(ino.0, Part::Attributes) };
        answer_attributes(reply, on.and_then(|()| state.attributes(ino.0)));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.state();
        let mut change = || {
            state.meet_change()?;
            if let Some(size) = size {
                state.image.set_length(ino.0, length(size)?)?;
            }
            state.attributes(ino.0)
        };
        answer_attributes(reply, change());
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        answer_entry(reply, self.make(parent, name, Kind::Directory).map(|(_, attributes)| attributes));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(reply, self.remove(parent, name));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(reply, self.remove(parent, name));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !flags.is_empty() {
            return reply.error(Errno::EINVAL);
        }
        let mut state = self.state();
        let renamed = state
            .meet_change()
            .and_then(|()| Ok(state.image.rename((parent.0, name), (newparent.0, newname))?));
        answer(reply, renamed);
    }

    fn open(&self, _: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let mut state = self.state();
        match state.check_power() {
            Ok(()) => reply.opened(state.open(ino.0), FopenFlags::FOPEN_DIRECT_IO),
            Err(errno) => reply.error(errno),
        }
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        match self.make(parent, name, Kind::File { bytes: 0 }) {
            Ok((inode, attributes)) => {
                let handle = self.state().open(inode);
                reply.created(&TTL, &attributes, Generation(0), handle, FopenFlags::FOPEN_DIRECT_IO);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut state = self.state();
        let allowed = state.file(fh).and_then(|inode| {
            state.meet_read(inode, Part::Bytes { offset, count: size })?;
            Ok(inode)
        });
        match allowed.and_then(|inode| Ok(state.image.read(inode, offset, size as usize)?)) {
            Ok(bytes) => reply.data(bytes),
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = self.state();
        let mut write = || -> Result<(), Errno> {
            state.meet_change()?;
            let inode = state.file(fh)?;
            Ok(state.image.write(inode, length(offset)?, data)?)
        };
        match write() {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.state().open.remove(&fh.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        answer(reply, self.sync(ino));
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        answer(reply, self.sync(ino));
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut state = self.state();
        // The kernel asks until nothing comes; the first answer holds all there is in a test.
        let counted = if offset == 0 { state.meet_read(ino.0, Part::Names) } else { state.check_power() };
        let entries = match counted.and_then(|()| Ok(state.image.list(ino.0)?)) {
            Ok(entries) => entries,
            Err(errno) => return reply.error(errno),
        };
        let itself = [(OsStr::new(".").to_owned(), ino.0), (OsStr::new("..").to_owned(), ino.0)];
        for (place, (name, inode)) in itself.into_iter().chain(entries).enumerate().skip(offset as usize) {
            let kind = match state.image.kind(inode) {
                Ok(Kind::File { .. }) => FileType::RegularFile,
                Ok(Kind::Directory) | Err(_) => FileType::Directory,
            };
            if reply.add(INodeNo(inode), place as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        reply.statfs(BLOCKS, BLOCKS, BLOCKS, BLOCKS, BLOCKS, BLOCK_BYTES, 255, BLOCK_BYTES);
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        bytes: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let flags = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        let mut state = self.state();
        let mut allocate = || -> Result<(), Errno> {
            state.meet_change()?;
            let end = length(offset.saturating_add(bytes))?;
            match (flags.is_empty(), state.image.kind(ino.0)?) {
                (true, Kind::File { bytes }) if bytes < end as u64 => {
                    Ok(state.image.set_length(ino.0, end)?)
                }
                // There is always room.
                (true, _) => Ok(()),
                (false, _) if flags == FallocateFlags::KEEP_SIZE => Ok(()),
                (false, _) => Err(Errno::EOPNOTSUPP),
            }
        };
        answer(reply, allocate());
    }
}
