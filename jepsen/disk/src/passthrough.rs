//! The file system: every operation, passed on.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::FallocateFlags;

use crate::faults::{Deed, Faults};
use crate::inodes::Inodes;

/// The kernel is to ask again every time.
const TTL: Duration = Duration::ZERO;

/// A directory of the host, seen through faults.
pub(crate) struct Passthrough {
    root: PathBuf,
    inodes: Mutex<Inodes>,
    faults: Arc<Faults>,
}

impl Passthrough {
    pub(crate) fn new(root: &Path, faults: Arc<Faults>) -> io::Result<Self> {
        let root = root.canonicalize()?;
        Ok(Self { inodes: Mutex::new(Inodes::new(&root)), root, faults })
    }

    fn inodes(&self) -> MutexGuard<'_, Inodes> {
        self.inodes.lock().expect("invariant: no panic under this lock")
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> Result<PathBuf, Errno> {
        Ok(self.inodes().path(parent)?.join(name))
    }

    fn entry(&self, path: &Path) -> Result<FileAttr, Errno> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(attributes(self.inodes().number(path), &metadata))
    }

    /// Of an open file if there is a handle: its name may be gone.
    fn metadata(&self, ino: INodeNo, fh: Option<FileHandle>) -> Result<Metadata, Errno> {
        match fh.and_then(|fh| self.inodes().file(fh).ok()) {
            Some(file) => Ok(file.metadata()?),
            None => Ok(fs::symlink_metadata(self.inodes().path(ino)?)?),
        }
    }

    fn open_for_writing(&self, ino: INodeNo, fh: Option<FileHandle>) -> Result<Arc<File>, Errno> {
        match fh.and_then(|fh| self.inodes().file(fh).ok()) {
            Some(file) => Ok(file),
            None => Ok(Arc::new(OpenOptions::new().write(true).open(self.inodes().path(ino)?)?)),
        }
    }
}

fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let seconds = u64::try_from(seconds).unwrap_or_default();
    UNIX_EPOCH + Duration::new(seconds, u32::try_from(nanoseconds).unwrap_or_default())
}

fn kind(file_type: fs::FileType) -> FileType {
    if file_type.is_dir() {
        FileType::Directory
    } else if file_type.is_symlink() {
        FileType::Symlink
    } else if file_type.is_socket() {
        FileType::Socket
    } else {
        FileType::RegularFile
    }
}

fn attributes(ino: INodeNo, metadata: &Metadata) -> FileAttr {
    FileAttr {
        ino,
        size: metadata.len(),
        blocks: metadata.blocks(),
        atime: time(metadata.atime(), metadata.atime_nsec()),
        mtime: time(metadata.mtime(), metadata.mtime_nsec()),
        ctime: time(metadata.ctime(), metadata.ctime_nsec()),
        crtime: UNIX_EPOCH,
        kind: kind(metadata.file_type()),
        perm: (metadata.mode() & 0o7777) as u16,
        nlink: u32::try_from(metadata.nlink()).unwrap_or(u32::MAX),
        uid: metadata.uid(),
        gid: metadata.gid(),
        rdev: 0,
        blksize: u32::try_from(metadata.blksize()).unwrap_or(4096),
        flags: 0,
    }
}

fn options(flags: i32) -> OpenOptions {
    const ACCESS_MODE: i32 = 0o3;
    let access = flags & ACCESS_MODE;
    let mut options = OpenOptions::new();
    // Both, whatever was asked for: the kernel has checked it, and may itself read what is only written to.
    options.read(true).write(access != 0);
    options
}

fn answer(reply: ReplyEmpty, outcome: Result<(), Errno>) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for Passthrough {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.child(parent, name).and_then(|path| self.entry(&path)) {
            Ok(found) => reply.entry(&TTL, &found, Generation(0)),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.metadata(ino, fh) {
            Ok(metadata) => reply.attr(&TTL, &attributes(ino, &metadata)),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let file = match self.open_for_writing(ino, fh) {
            Ok(file) => file,
            Err(errno) => return reply.error(errno),
        };
        let change = move |outcome: Result<(), Errno>| {
            let change = || -> Result<Metadata, Errno> {
                outcome?;
                if let Some(mode) = mode {
                    file.set_permissions(fs::Permissions::from_mode(mode))?;
                }
                if let Some(size) = size {
                    file.set_len(size)?;
                }
                Ok(file.metadata()?)
            };
            match change() {
                Ok(metadata) => reply.attr(&TTL, &attributes(ino, &metadata)),
                Err(errno) => reply.error(errno),
            }
        };
        // A full disk can be freed.
        let deed = if size.is_some() && !self.faults.is_full() { Some(Deed::Write) } else { None };
        match deed {
            Some(deed) => self.faults.meet(deed, change),
            None => change(Ok(())),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let made = self.child(parent, name).and_then(|path| {
            fs::DirBuilder::new().mode(mode & !umask).create(&path)?;
            self.entry(&path)
        });
        match made {
            Ok(found) => reply.entry(&TTL, &found, Generation(0)),
            Err(errno) => reply.error(errno),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.child(parent, name).and_then(|path| {
            fs::remove_file(&path)?;
            self.inodes().forget(&path);
            Ok(())
        });
        answer(reply, removed);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.child(parent, name).and_then(|path| {
            fs::remove_dir(&path)?;
            self.inodes().forget(&path);
            Ok(())
        });
        answer(reply, removed);
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
        let renamed = self.child(parent, name).and_then(|from| {
            let to = self.child(newparent, newname)?;
            fs::rename(&from, &to)?;
            self.inodes().rename(&from, &to);
            Ok(())
        });
        answer(reply, renamed);
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let path = self.inodes().path(ino);
        match path.and_then(|path| Ok(options(flags.0).open(path)?)) {
            Ok(file) => reply.opened(self.inodes().opened(file), FopenFlags::empty()),
            Err(errno) => reply.error(errno),
        }
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let created = self.child(parent, name).and_then(|path| {
            let file = options(flags | 1).create(true).truncate(false).mode(mode & !umask).open(&path)?;
            Ok((self.entry(&path)?, file))
        });
        match created {
            Ok((found, file)) => {
                let handle = self.inodes().opened(file);
                reply.created(&TTL, &found, Generation(0), handle, FopenFlags::empty());
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
        let read = || -> Result<Vec<u8>, Errno> {
            let file = self.inodes().file(fh)?;
            let mut buffer = vec![0; size as usize];
            let mut length = 0;
            while length < buffer.len() {
                match file.read_at(&mut buffer[length..], offset + length as u64)? {
                    0 => break,
                    bytes => length += bytes,
                }
            }
            buffer.truncate(length);
            Ok(buffer)
        };
        match read() {
            Ok(bytes) => reply.data(&bytes),
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
        let file = match self.inodes().file(fh) {
            Ok(file) => file,
            Err(errno) => return reply.error(errno),
        };
        let data = data.to_vec();
        self.faults.meet(Deed::Write, move |outcome| {
            let written = outcome.and_then(|()| Ok(file.write_all_at(&data, offset)?));
            match written {
                Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
                Err(errno) => reply.error(errno),
            }
        });
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
        self.inodes().closed(fh);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _ino: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        let file = match self.inodes().file(fh) {
            Ok(file) => file,
            Err(errno) => return reply.error(errno),
        };
        self.faults.meet(Deed::Sync, move |outcome| {
            let sync = || if datasync { file.sync_data() } else { file.sync_all() };
            answer(reply, outcome.and_then(|()| Ok(sync()?)));
        });
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let path = match self.inodes().path(ino) {
            Ok(path) => path,
            Err(errno) => return reply.error(errno),
        };
        self.faults.meet(Deed::Sync, move |outcome| {
            let sync = || File::open(&path).and_then(|directory| directory.sync_all());
            answer(reply, outcome.and_then(|()| Ok(sync()?)));
        });
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let list = || -> Result<Vec<(INodeNo, FileType, std::ffi::OsString)>, Errno> {
            let path = self.inodes().path(ino)?;
            let mut entries =
                vec![(ino, FileType::Directory, ".".into()), (ino, FileType::Directory, "..".into())];
            let mut names: Vec<_> = fs::read_dir(&path)?.collect::<io::Result<_>>()?;
            names.sort_by_key(fs::DirEntry::file_name);
            for entry in names {
                let number = self.inodes().number(&entry.path());
                entries.push((number, kind(entry.file_type()?), entry.file_name()));
            }
            Ok(entries)
        };
        match list() {
            Ok(entries) => {
                for (place, (number, kind, name)) in entries.into_iter().enumerate().skip(offset as usize) {
                    if reply.add(number, place as u64 + 1, kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn statfs(&self, _: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let full = self.faults.is_full();
        match rustix::fs::statvfs(&self.root) {
            Ok(stat) => {
                let free = |blocks: u64| if full { 0 } else { blocks };
                let size = u32::try_from(stat.f_frsize).unwrap_or(4096);
                let (free, available) = (free(stat.f_bfree), free(stat.f_bavail));
                reply.statfs(stat.f_blocks, free, available, stat.f_files, stat.f_ffree, size, 255, size);
            }
            Err(errno) => reply.error(io::Error::from(errno).into()),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let file = match self.inodes().file(fh) {
            Ok(file) => file,
            Err(errno) => return reply.error(errno),
        };
        self.faults.meet(Deed::Write, move |outcome| {
            let flags = FallocateFlags::from_bits_retain(mode.cast_unsigned());
            let allocate = || rustix::fs::fallocate(&*file, flags, offset, length).map_err(io::Error::from);
            answer(reply, outcome.and_then(|()| Ok(allocate()?)));
        });
    }
}
