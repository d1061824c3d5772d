//! A store of somebody's own, written against what the library shows of itself, and checked by the suite that comes with it: on a
//! disk that forgets what was not synced. The same store without its fsync is found out.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use quorate::LogId;
use quorate::Membership;
use quorate::store::{Completion, LogBounds, LogStore};
use quorate::store::{Entry, Payload, Vote};
use quorate::testkit::conformance::{self, Broken, Effort, Promise, Rig};
use quorate_testkit::disk::{Cut, ForgetfulDisk, Names, mounted};
use serde::{Deserialize, Serialize};

/// One write, and how far the log was committed by then.
#[derive(Serialize, Deserialize)]
struct Frame {
    change: Change,
    committed: Option<LogId>,
}

#[derive(Serialize, Deserialize)]
enum Change {
    Append(Vec<(LogId, Content)>),
    Vote(u64, u64, bool),
    Truncate(Option<LogId>),
    Purge(LogId),
}

#[derive(Serialize, Deserialize)]
enum Content {
    Blank,
    Command(Vec<u8>),
    Membership(Membership),
}

impl From<Payload> for Content {
    fn from(payload: Payload) -> Self {
        match payload {
            Payload::Blank => Self::Blank,
            Payload::Command(command) => Self::Command(command.to_vec()),
            Payload::Membership(membership) => Self::Membership(membership),
        }
    }
}

impl From<Content> for Payload {
    fn from(content: Content) -> Self {
        match content {
            Content::Blank => Self::Blank,
            Content::Command(command) => Self::Command(Bytes::from(command)),
            Content::Membership(membership) => Self::Membership(membership),
        }
    }
}

/// The log in memory.
#[derive(Default)]
struct Log {
    entries: VecDeque<Entry>,
    purged: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    failure: Option<String>,
}

fn after(position: Option<LogId>) -> u64 {
    position.map_or(0, |position| position.index + 1)
}

impl Log {
    fn last(&self) -> Option<LogId> {
        self.entries.back().map(|entry| entry.log_id).or(self.purged)
    }

    fn take(&mut self, change: Change) -> Result<(), String> {
        match change {
            Change::Append(entries) => {
                for (log_id, content) in entries {
                    if log_id.index != after(self.last()) {
                        return Err(format!("{log_id} does not follow"));
                    }
                    self.entries.push_back(Entry { log_id, payload: content.into() });
                }
            }
            Change::Vote(term, node_id, committed) => self.vote = Some(Vote { term, node_id, committed }),
            Change::Truncate(last) => {
                let same = |entry: &&Entry| last.is_some_and(|last| last.index == entry.log_id.index);
                if let Some(found) = self.entries.iter().find(same)
                    && Some(found.log_id) != last
                {
                    return Err(format!("there is {} where {last:?} should be", found.log_id));
                }
                self.entries.retain(|entry| entry.log_id.index < after(last));
            }
            Change::Purge(upto) if upto.index >= after(self.purged) => {
                self.entries.retain(|entry| entry.log_id.index > upto.index);
                self.purged = Some(upto);
            }
            Change::Purge(_) => {}
        }
        Ok(())
    }
}

/// A log in one file of frames. The newest are lost if they are not whole.
struct Journal {
    log: Arc<Mutex<Log>>,
    queue: Option<Sender<(Vec<u8>, Completion)>>,
    writer: Option<JoinHandle<()>>,
}

impl Journal {
    fn open(directory: &Path, syncs: bool) -> io::Result<Self> {
        let path = directory.join("journal");
        let mut file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let mut log = Log::default();
        let mut rest = bytes.as_slice();
        while let Some((frame, after)) = decode(rest) {
            log.take(frame.change).map_err(io::Error::other)?;
            if after_is_within(frame.committed, log.last()) {
                log.committed = frame.committed;
            }
            rest = after;
        }
        file.set_len((bytes.len() - rest.len()) as u64)?;
        io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        if syncs {
            file.sync_all()?;
            File::open(directory)?.sync_all()?;
        }
        let log = Arc::new(Mutex::new(log));
        let (queue, queued) = channel();
        let of_writer = log.clone();
        let writer = std::thread::spawn(move || write(&mut file, syncs, &of_writer, &queued));
        Ok(Self { log, queue: Some(queue), writer: Some(writer) })
    }

    fn submit(&self, change: Change, done: Completion) {
        let mut log = self.log.lock().unwrap();
        let frame = Frame { change, committed: log.committed };
        let encoded = encode(&frame);
        if log.failure.is_none()
            && let Err(failure) = log.take(frame.change)
        {
            log.failure = Some(failure);
        }
        if let Some(failure) = &log.failure {
            let error = io::Error::other(failure.clone());
            drop(log);
            return done(Err(error));
        }
        // Under the lock, so that the order is the same in the file.
        self.queue.as_ref().unwrap().send((encoded, done)).unwrap();
    }
}

/// Whether a position that was committed is in a log that ends with `last`.
fn after_is_within(committed: Option<LogId>, last: Option<LogId>) -> bool {
    after(committed) <= after(last)
}

fn encode(frame: &Frame) -> Vec<u8> {
    let body = bincode::serde::encode_to_vec(frame, bincode::config::standard()).unwrap();
    let mut encoded = (body.len() as u32).to_le_bytes().to_vec();
    encoded.extend(crc32fast::hash(&body).to_le_bytes());
    encoded.extend(body);
    encoded
}

/// The first frame, and what follows it.
fn decode(bytes: &[u8]) -> Option<(Frame, &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (checksum, rest) = rest.split_first_chunk::<4>()?;
    let (body, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    if body.is_empty() || crc32fast::hash(body) != u32::from_le_bytes(*checksum) {
        return None;
    }
    let (frame, _) = bincode::serde::decode_from_slice(body, bincode::config::standard()).ok()?;
    Some((frame, rest))
}

/// Body of the writer thread: one sync for all that is queued.
fn write(file: &mut File, syncs: bool, log: &Mutex<Log>, queued: &Receiver<(Vec<u8>, Completion)>) {
    while let Ok((mut frames, done)) = queued.recv() {
        let mut completions = vec![done];
        for (more, done) in queued.try_iter() {
            frames.extend(more);
            completions.push(done);
        }
        let failed = log.lock().unwrap().failure.clone();
        let written = match failed {
            Some(failure) => Err(io::Error::other(failure)),
            None => file.write_all(&frames).and_then(|()| if syncs { file.sync_data() } else { Ok(()) }),
        };
        if let Err(error) = &written {
            log.lock().unwrap().failure.get_or_insert_with(|| error.to_string());
        }
        for done in completions {
            done(written.as_ref().map(drop).map_err(|error| io::Error::other(error.to_string())));
        }
    }
}

impl LogStore for Journal {
    fn bounds(&self) -> LogBounds {
        let log = self.log.lock().unwrap();
        LogBounds { purged: log.purged, last: log.last() }
    }

    fn vote(&self) -> Option<Vote> {
        self.log.lock().unwrap().vote
    }

    fn committed(&self) -> Option<LogId> {
        self.log.lock().unwrap().committed
    }

    fn read(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        let log = self.log.lock().unwrap();
        let mut read: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        for entry in log.entries.iter().filter(|entry| (start..end).contains(&entry.log_id.index)) {
            bytes += entry.size_bytes();
            if bytes > max_bytes && !read.is_empty() {
                break;
            }
            read.push(entry.clone());
        }
        Ok(read)
    }

    fn append(&self, entries: Vec<Entry>, done: Completion) {
        let entries = entries.into_iter().map(|entry| (entry.log_id, entry.payload.into()));
        self.submit(Change::Append(entries.collect()), done);
    }

    fn save_vote(&self, vote: Vote, done: Completion) {
        self.submit(Change::Vote(vote.term, vote.node_id, vote.committed), done);
    }

    fn save_committed(&self, committed: Option<LogId>) {
        self.log.lock().unwrap().committed = committed;
    }

    fn truncate(&self, last: Option<LogId>, done: Completion) {
        self.submit(Change::Truncate(last), done);
    }

    fn purge(&self, upto: LogId, done: Completion) {
        self.submit(Change::Purge(upto), done);
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.queue = None;
        self.writer.take().unwrap().join().unwrap();
    }
}

const CUTS: [Cut; 4] = [Cut::DropUnsynced, Cut::Subset, Cut::Torn { sector_bytes: 512 }, Cut::Prefix];

/// A journal on a disk that forgets.
struct JournalRig {
    journal: Option<Journal>,
    syncs: bool,
    crashes: u64,
    disk: ForgetfulDisk,
    _dir: tempfile::TempDir,
}

impl JournalRig {
    fn mount(names: Names, syncs: bool) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let disk = mounted(ForgetfulDisk::mount(dir.path(), names))?;
        let mut rig = Self { journal: None, syncs, crashes: 0, disk, _dir: dir };
        rig.open();
        Some(rig)
    }

    fn open(&mut self) {
        self.journal = None;
        self.journal = Some(Journal::open(self.disk.path(), self.syncs).unwrap());
    }
}

impl Rig for JournalRig {
    fn store(&self) -> &dyn LogStore {
        self.journal.as_ref().unwrap()
    }

    fn sync(&mut self) {}

    fn reopen(&mut self) {
        self.open();
    }

    /// The power goes after so many more changes to the disk.
    fn crash(&mut self, keep: usize) {
        self.disk.cut_after(keep as u64);
        self.journal = None;
        self.crashes += 1;
        self.disk.cut(CUTS[(self.crashes % CUTS.len() as u64) as usize], self.crashes);
        self.open();
    }

    fn fail_next_write(&mut self) -> bool {
        self.disk.count_changes(Some(0));
        true
    }
}

fn check(names: Names, syncs: bool) -> Option<Result<(), Broken>> {
    drop(JournalRig::mount(names, syncs)?);
    let open = || -> Box<dyn Rig> { Box::new(JournalRig::mount(names, syncs).unwrap()) };
    let effort = Effort { runs: 20, patience: Duration::from_secs(20), ..Effort::default() };
    Some(conformance::check(open, effort))
}

#[test]
fn a_store_of_ones_own_can_be_checked() {
    for names in [Names::WithFile, Names::WithDirectoryOnly] {
        let Some(checked) = check(names, true) else { return };
        checked.unwrap();
    }
}

#[test]
fn a_store_that_forgets_to_sync_is_found_out() {
    let Some(checked) = check(Names::WithFile, false) else { return };
    let broken = checked.unwrap_err();
    assert_eq!(broken.promise, Promise::Durability, "{broken}");
}
