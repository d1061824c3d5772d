//! Views of the state into snapshot files, off the apply path, and back.
//!
//! The protocol, with a figure: `docs/design/snapshots.md`.

use std::any::Any;
use std::io::{self, BufWriter, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use openraft::storage::{RaftSnapshotBuilder, Snapshot};
use tokio::sync::watch;
use tokio::time::Instant;

use super::activity::Activity;
use super::published::Applied;
use super::type_config::{self, CommittedLeaderId, StoredMembership, TypeConfig};
use crate::error::{StorageError, is_out_of_files};
use crate::feed::Feed;
use crate::machine::sessions::SessionTable;
use crate::machine::{SnapshotParts, StateMachine};
use crate::runtime::panic_message;
use crate::runtime::{offload, whole_ms};
use crate::storage::{self, ReceivedSnapshot, SnapshotHandle, SnapshotStore, SnapshotWriter};
use crate::types::{MachineVersion, Member, NodeId, Quota, ReadableVersions, SnapshotMachines};

/// A snapshot on its way through openraft.
pub(crate) enum SnapshotData {
    /// In its final place.
    Placed(SnapshotHandle),
    /// Received from the leader, complete, verified and read, but not in its place before openraft accepts it:
    /// a rejected snapshot must not be found at the next start. With what it holds, a [`Restored`] machine.
    Received(ReceivedSnapshot, Box<dyn Any + Send>),
    /// Of a machine that has applied nothing, or for which the disk has no room: there is no file.
    Empty,
}

impl std::fmt::Debug for SnapshotData {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Placed(_) => "Placed",
            Self::Received(..) => "Received",
            Self::Empty => "Empty",
        })
    }
}

/// What a snapshot holds, to be written.
struct SnapshotContent<V> {
    applied: Applied<V>,
    sessions: SessionTable,
    /// Closed when this is gone.
    held: watch::Sender<()>,
}

/// What a snapshot held.
pub(crate) struct Restored<M> {
    /// The machine.
    pub machine: M,
    /// The sessions at this point.
    pub sessions: SessionTable,
}

/// Writes one view into a snapshot file.
pub(crate) struct SnapshotBuilder<M: StateMachine> {
    content: Arc<SnapshotContent<M::View>>,
    membership: StoredMembership,
    machines: SnapshotMachines,
    snapshots: Arc<dyn SnapshotStore>,
    activity: Arc<Activity>,
    feed: Arc<Feed>,
}

impl<M: StateMachine> SnapshotBuilder<M> {
    /// A builder for the state `applied` with its `sessions`, at which `membership` was in effect, and these versions were
    /// agreed. Counts in `activity`. The event log of `feed` is durable before the snapshot is.
    pub(crate) fn new(
        applied: Applied<M::View>,
        sessions: SessionTable,
        (membership, agreed): (StoredMembership, Vec<MachineVersion>),
        snapshots: Arc<dyn SnapshotStore>,
        (activity, feed): (Arc<Activity>, Arc<Feed>),
    ) -> Self {
        let content = Arc::new(SnapshotContent { applied, sessions, held: watch::Sender::new(()) });
        let machines = SnapshotMachines { parts: parts::<M>(), agreed };
        Self { content, membership, machines, snapshots, activity, feed }
    }

    /// Closed when the snapshot is written or given up, and the state that it is taken of held no more.
    pub(crate) fn written(&self) -> watch::Receiver<()> {
        self.content.held.subscribe()
    }
}

impl<M: StateMachine> RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder<M> {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(
        &mut self,
    ) -> io::Result<Snapshot<CommittedLeaderId, NodeId, Member, SnapshotData>> {
        let progress = self.content.applied.progress;
        let Some(log_id) = progress.log_id else { return Ok(nothing()) };
        let membership_log_id = self.membership.log_id().as_ref().map(type_config::from_log_id);
        assert!(
            membership_log_id <= Some(log_id),
            "invariant: a snapshot's membership is no newer than its state"
        );
        let meta = crate::storage::SnapshotMeta {
            log_id,
            clock: progress.clock,
            membership_log_id,
            membership: type_config::from_membership(self.membership.membership()),
            history: progress.history,
            quota_bytes: progress.quota.map_or(0, Quota::to_stored),
            machines: self.machines.clone(),
        };
        let begun = Instant::now();
        let (content, snapshots, activity, feed) =
            (self.content.clone(), self.snapshots.clone(), self.activity.clone(), self.feed.clone());
        let built = offload(move || {
            // openraft waits for ever for a build that panics.
            catch("writing a snapshot", || {
                // With the snapshot the log may be purged, and what it says of these positions is gone.
                feed.sync_log(log_id.index);
                let writer = unless_it_passes(snapshots.begin(&meta), &activity.snapshots_not_begun)?;
                let Some(writer) = writer else { return Ok(None) };
                unless_it_passes(write::<M>(&content, writer), &activity.snapshots_not_written)
            })
        })
        .await?;
        // An error would be the node's end. openraft ignores a snapshot that is not newer than the last.
        let Some(handle) = built else { return Ok(nothing()) };
        self.activity.snapshots_built.add(handle.len_bytes(), begun.elapsed());
        self.activity.snapshot_bytes.store(handle.len_bytes(), Relaxed);
        tracing::info!(upto = %log_id, bytes = handle.len_bytes(), took_ms = whole_ms(begun.elapsed()), "wrote a snapshot");
        Ok(Snapshot { meta: self::meta(handle.meta()), snapshot: SnapshotData::Placed(handle) })
    }
}

/// The machines that write a snapshot, as it says itself.
fn parts<M: StateMachine>() -> Vec<MachineVersion> {
    let newest = |reads: &ReadableVersions| MachineVersion { machine: reads.machine, version: reads.newest };
    let parts: Vec<_> = M::MACHINES.iter().map(newest).collect();
    if parts == [MachineVersion::FIRST] { Vec::new() } else { parts }
}

/// A snapshot of nothing.
fn nothing() -> Snapshot<CommittedLeaderId, NodeId, Member, SnapshotData> {
    Snapshot { meta: type_config::SnapshotMeta::default(), snapshot: SnapshotData::Empty }
}

/// What came of `step`; nothing, which is counted in `without`, if what kept it from being done will pass.
fn unless_it_passes<T>(step: Result<T, StorageError>, without: &AtomicU64) -> io::Result<Option<T>> {
    match step {
        Ok(done) => Ok(Some(done)),
        Err(error) if passes(&error) => {
            without.fetch_add(1, Relaxed);
            tracing::warn!(%error, "no snapshot; the next one may succeed");
            Ok(None)
        }
        Err(error) => Err(io::Error::other(error)),
    }
}

/// Whether the disk had no room, or too many files are open.
fn passes(error: &StorageError) -> bool {
    matches!(error, StorageError::Io { source, .. } | StorageError::Unreadable { source, .. }
        if storage::is_full(source.kind()) || is_out_of_files(source))
}

fn write<M: StateMachine>(
    content: &SnapshotContent<M::View>,
    writer: SnapshotWriter,
) -> Result<SnapshotHandle, StorageError> {
    /// Machines write small pieces; the store wants frames.
    const BUFFER_BYTES: usize = 256 * 1024;
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, writer);
    let failed = |source| StorageError::Io {
        operation: "cannot write a snapshot to",
        path: PathBuf::from("the snapshot directory"),
        source,
    };
    content.sessions.write(&mut out).map_err(failed)?;
    M::write_snapshot(&content.applied.view, &mut out).map_err(failed)?;
    out.into_inner().map_err(|error| failed(error.into_error()))?.finish()
}

/// What `handle` holds. The sessions come first, then the machine; before version 2 there were no sessions.
///
/// # Errors
/// [`StorageError::Corrupt`] when a checksum does not match, [`StorageError::Unreadable`] when the file cannot be read: then
/// nothing is known of what it holds. [`StorageError::Version`] and [`StorageError::Undecodable`] when it is whole, and not
/// for this program; [`StorageError::Machine`] when that is for a machine, or a version of it, that this build does not read.
pub(crate) fn read<M: StateMachine>(handle: &SnapshotHandle) -> Result<Restored<M>, StorageError> {
    check_machines::<M>(handle)?;
    let (version, input) = match handle.open() {
        Ok(opened) => opened,
        Err(error) => return Err(handle.refuse(error)),
    };
    let mut input = WatchedReader { input, failed: None };
    let machines = &handle.meta().machines;
    let read = catch("reading it", || read_from(version, machines, &mut input));
    read.map_err(|error| unreadable(handle, input.failed, error))
}

/// Refuses a snapshot before anything of it is read.
fn check_machines<M: StateMachine>(handle: &SnapshotHandle) -> Result<(), StorageError> {
    let checked = handle.meta().machines.check(M::MACHINES);
    checked.map_err(|source| StorageError::Machine { path: handle.path().to_owned(), source })
}

fn read_from<M: StateMachine>(
    version: u32,
    machines: &SnapshotMachines,
    input: &mut impl Read,
) -> io::Result<Restored<M>> {
    /// The first version of a snapshot file with sessions in its payload.
    const SESSIONS_SINCE: u32 = 2;
    let sessions = match version {
        ..SESSIONS_SINCE => SessionTable::default(),
        _ => SessionTable::read(input)?,
    };
    let mut parts = SnapshotParts::new(&machines.parts, input);
    let machine = M::read_parts(&mut parts)?;
    if !parts.are_read() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its parts are in another order"));
    }
    // What the machine left unread must still be checked.
    io::copy(input, &mut io::sink())?;
    Ok(Restored { machine, sessions })
}

/// What it means that reading `handle` ended with `error`, after its file had `failed` to be read, or to be whole.
fn unreadable(handle: &SnapshotHandle, failed: Option<io::Error>, error: io::Error) -> StorageError {
    let path = handle.path().to_owned();
    match failed {
        Some(failed) => handle.refuse(failed),
        // What the system says has a number; what a decoder says has none.
        None if error.raw_os_error().is_some() => StorageError::Unreadable { path, source: error },
        None => StorageError::Undecodable { path, detail: error.to_string() },
    }
}

/// Remembers that the file could not be read, or is damaged, whatever whoever reads makes of it: a decoder may wrap the
/// error in one of its own.
struct WatchedReader<R> {
    input: R,
    failed: Option<io::Error>,
}

impl<R: Read> Read for WatchedReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.input.read(buffer).inspect_err(|error| {
            if error.kind() != io::ErrorKind::Interrupted {
                self.failed.get_or_insert_with(|| match error.raw_os_error() {
                    Some(number) => io::Error::from_raw_os_error(number),
                    None => io::Error::new(error.kind(), error.to_string()),
                });
            }
        })
    }
}

/// Turns a panic of the user's machine into an error, which stops the node in order.
pub(crate) fn catch<T>(what: &str, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let message = panic_message(&*panic);
        Err(io::Error::other(format!("{what} panicked: {message}")))
    })
}

/// Loads `snapshot`, and makes it durable in its place.
///
/// # Errors
/// Whatever placing and reading return; the node must stop.
pub(crate) async fn install<M: StateMachine>(
    snapshot: SnapshotData,
    snapshots: Arc<dyn SnapshotStore>,
) -> io::Result<(Restored<M>, SnapshotHandle)> {
    offload(move || {
        // Read first: one that this build cannot read must not be found at the next start.
        let (received, content) = match snapshot {
            SnapshotData::Received(received, content) => match content.downcast::<Restored<M>>() {
                Ok(content) => (received, *content),
                Err(_) => return Err(io::Error::other("the snapshot was read as another machine's")),
            },
            SnapshotData::Placed(handle) => {
                let received = copy(&handle, &*snapshots)?;
                let content =
                    catch("reading a snapshot", || read(received.handle()).map_err(io::Error::other))?;
                (received, content)
            }
            SnapshotData::Empty => return Err(io::Error::other("an empty snapshot cannot be installed")),
        };
        let handle = received.place().map_err(io::Error::other)?;
        Ok((content, handle))
    })
    .await
}

/// Copies a snapshot, perhaps of another node, into `snapshots`.
fn copy(handle: &SnapshotHandle, snapshots: &dyn SnapshotStore) -> io::Result<ReceivedSnapshot> {
    const PIECE_BYTES: usize = 1024 * 1024;
    let mut receiver = snapshots.receive(handle.meta().log_id).map_err(io::Error::other)?;
    let mut offset = 0;
    while offset < handle.len_bytes() {
        let piece = handle.read_at(offset, PIECE_BYTES)?;
        receiver.write(offset, &piece)?;
        offset += piece.len() as u64;
    }
    receiver.finish().map_err(io::Error::other)
}

/// openraft's form of a snapshot's meta data.
pub(crate) fn meta(meta: &crate::storage::SnapshotMeta) -> type_config::SnapshotMeta {
    type_config::SnapshotMeta {
        last_log_id: Some(type_config::log_id(meta.log_id)),
        last_membership: stored_membership(meta),
    }
}

/// The membership in effect at the snapshot.
pub(crate) fn stored_membership(meta: &crate::storage::SnapshotMeta) -> StoredMembership {
    if meta.membership.members.is_empty() {
        return StoredMembership::default();
    }
    let membership = type_config::membership(meta.membership.clone())
        .expect("invariant: a snapshot's membership was in effect when it was written");
    StoredMembership::new(meta.membership_log_id.map(type_config::log_id), membership)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::kv::machine::KvMachine;
    use crate::machine::ApplyContext;
    use crate::raft::published::Progress;
    use crate::storage::{MemorySnapshots, SnapshotReceiver};
    use crate::types::LogId;

    const FULL: io::ErrorKind = io::ErrorKind::StorageFull;

    /// A machine whose snapshot finds the disk full, and that panics over any that it is to read.
    #[derive(Debug, Default)]
    struct Large;

    impl StateMachine for Large {
        type Command = ();
        type Reply = ();
        type Query = ();
        type Answer = ();
        type View = ();

        fn apply(&mut self, _: &ApplyContext, (): ()) {}

        fn view(&self) {}

        fn query((): &(), (): ()) {}

        fn write_snapshot((): &(), _: &mut dyn Write) -> io::Result<()> {
            Err(FULL.into())
        }

        fn read_snapshot(_: u32, _: &mut dyn Read) -> io::Result<Self> {
            panic!("not one of mine")
        }
    }

    /// A disk that is full before anything is written.
    struct NoRoom;

    impl SnapshotStore for NoRoom {
        fn begin(&self, _: &crate::storage::SnapshotMeta) -> Result<SnapshotWriter, StorageError> {
            let path = PathBuf::from("nowhere");
            Err(StorageError::Io { operation: "cannot write to", path, source: FULL.into() })
        }

        fn receive(&self, _: LogId) -> Result<SnapshotReceiver, StorageError> {
            unreachable!("nothing is received")
        }

        fn newest(&self) -> Result<Option<SnapshotHandle>, StorageError> {
            Ok(None)
        }
    }

    /// A machine whose decoder says of every error that something is wrong with what it reads.
    #[derive(Debug, Default)]
    struct Strict;

    impl StateMachine for Strict {
        type Command = ();
        type Reply = ();
        type Query = ();
        type Answer = ();
        type View = ();

        fn apply(&mut self, _: &ApplyContext, (): ()) {}

        fn view(&self) {}

        fn query((): &(), (): ()) {}

        fn write_snapshot((): &(), _: &mut dyn Write) -> io::Result<()> {
            Ok(())
        }

        fn read_snapshot(_: u32, input: &mut dyn Read) -> io::Result<Self> {
            let mut all = Vec::new();
            let outcome = input.read_to_end(&mut all);
            outcome
                .map(|_| Self)
                .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it does not decode"))
        }
    }

    /// Fails with `error` after so many bytes.
    struct Failing(usize, io::Error);

    impl Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let bytes = self.0.min(buffer.len());
            if bytes == 0 {
                let again = self.1.raw_os_error().map(io::Error::from_raw_os_error);
                return Err(again.unwrap_or_else(|| self.1.kind().into()));
            }
            buffer[..bytes].fill(0);
            self.0 -= bytes;
            Ok(bytes)
        }
    }

    fn some_meta() -> crate::storage::SnapshotMeta {
        crate::storage::SnapshotMeta {
            log_id: LogId::new(1, 1),
            clock: Default::default(),
            membership_log_id: None,
            membership: crate::types::Membership::default(),
            history: crate::types::HistoryEpoch(1),
            quota_bytes: 0,
            machines: SnapshotMachines::default(),
        }
    }

    #[test]
    fn what_cannot_be_read_is_not_called_corrupt_whatever_the_decoder_says() {
        let handle = MemorySnapshots::new().begin(&some_meta()).unwrap().finish().unwrap();
        let fails = |version, bytes, error| {
            let mut input = WatchedReader { input: Failing(bytes, error), failed: None };
            let error = read_from::<Strict>(version, &SnapshotMachines::default(), &mut input).err().unwrap();
            unreadable(&handle, input.failed, error)
        };
        for version in [1, 2] {
            for bytes in [0, 3] {
                let error = fails(version, bytes, io::Error::from_raw_os_error(libc::EIO));
                assert!(
                    matches!(&error, StorageError::Unreadable { source, .. }
                    if source.raw_os_error() == Some(libc::EIO)),
                    "{error}"
                );
                let error = error.to_string();
                assert!(error.contains("cannot be read") && !error.contains("corrupt"), "{error}");
            }
            let damaged = fails(version, 0, io::ErrorKind::InvalidData.into());
            assert!(matches!(damaged, StorageError::Corrupt { .. }), "{damaged}");
            let short = fails(version, 0, io::ErrorKind::UnexpectedEof.into());
            assert!(matches!(short, StorageError::Unreadable { .. }), "{short}");
        }
    }

    /// After an upgrade of all nodes, the advice to move their data aside would be the end of the cluster.
    #[test]
    fn what_is_whole_is_not_called_corrupt_although_this_machine_cannot_read_it() {
        let store = MemorySnapshots::new();
        let mut writer = store.begin(&some_meta()).unwrap();
        SessionTable::default().write(&mut writer).unwrap();
        writer.write_all(b"of another machine").unwrap();
        let error = read::<KvMachine>(&writer.finish().unwrap()).err().unwrap();
        assert!(matches!(error, StorageError::Undecodable { .. }), "{error}");
        let error = error.to_string();
        assert!(!error.contains("corrupt") && !error.contains("aside"), "{error}");
    }

    #[test]
    fn a_machine_that_panics_over_a_snapshot_is_quoted() {
        let mut writer = MemorySnapshots::new().begin(&some_meta()).unwrap();
        SessionTable::default().write(&mut writer).unwrap();
        let error = read::<Large>(&writer.finish().unwrap()).err().unwrap();
        assert!(
            matches!(&error, StorageError::Undecodable { detail, .. } if detail.contains("not one of mine")),
            "{error}"
        );
    }

    #[test]
    fn too_many_open_files_pass_whatever_was_to_be_opened() {
        let path = PathBuf::from("snapshots");
        let source = || io::Error::from_raw_os_error(libc::EMFILE);
        assert!(passes(&StorageError::Io {
            operation: "cannot create",
            path: path.clone(),
            source: source()
        }));
        assert!(passes(&StorageError::Unreadable { path: path.clone(), source: source() }));
        let source = io::Error::from_raw_os_error(libc::EIO);
        assert!(!passes(&StorageError::Unreadable { path, source }));
    }

    #[tokio::test]
    async fn snapshots_without_room_are_counted_and_stop_nothing() {
        let activity = Arc::new(Activity::default());
        let stores: [Arc<dyn SnapshotStore>; 2] = [Arc::new(NoRoom), Arc::new(MemorySnapshots::new())];
        for (store, counts) in stores.into_iter().zip([[1, 0], [1, 1]]) {
            let progress = Progress { log_id: Some(LogId::new(1, 1)), ..Progress::default() };
            let applied = Applied { progress, view: () };
            let sessions = SessionTable::default();
            let membership = StoredMembership::default();
            let mut builder = SnapshotBuilder::<Large>::new(
                applied,
                sessions,
                (membership, Vec::new()),
                store,
                (activity.clone(), Feed::new(None)),
            );
            let built = builder.build_snapshot().await.unwrap();
            assert!(matches!(built.snapshot, SnapshotData::Empty));
            let counted = [&activity.snapshots_not_begun, &activity.snapshots_not_written];
            assert_eq!(counted.map(|count| count.load(Relaxed)), counts);
        }
        assert_eq!(activity.snapshots_built.count.load(Relaxed), 0);
    }
}
