//! What a disk holds: what a program sees, and what would be left if the power went now.
//!
//! Every file has a *current* and a *durable* content, and a list of the changes between them; an fsync carries them
//! out on the durable one. Names are the same, per directory. A [`Cut`] decides what becomes of the changes that no fsync covers.
//!
//! It knows nothing of FUSE, and does no IO.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::random::Random;

/// What a power cut does to the changes that no fsync covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cut {
    /// All of them are lost.
    DropUnsynced,
    /// Each is lost or not, by chance.
    Subset,
    /// As `Subset`, and of each write a subset of its sectors.
    Torn {
        /// What the disk writes whole, in bytes.
        sector_bytes: usize,
    },
    /// Those before a moment of the past are kept, over all files, and half of the one at that moment.
    Prefix,
    /// What was written is there as far as the file went at its last fsync, and no file has grown.
    DataWithoutLength,
}

/// What, besides an fsync of its directory, makes the name of a file durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// An fsync of the file too, as on ext4.
    WithFile,
    /// Nothing.
    WithDirectoryOnly,
}

pub(crate) const ROOT: u64 = 1;

/// The content of a disk. A clone can be put back any time.
#[derive(Debug, Clone)]
pub struct Image {
    names: Names,
    nodes: HashMap<u64, Node>,
    unsynced: Vec<Renaming>,
    /// Counts changes of any kind, so that they have an order.
    sequence: u64,
    next: u64,
}

#[derive(Debug, Clone)]
enum Node {
    File(Content),
    Directory(Entries),
}

/// Clones share their bytes until one of them is changed.
#[derive(Debug, Clone, Default)]
struct Content {
    current: Arc<Vec<u8>>,
    durable: Arc<Vec<u8>>,
    unsynced: Vec<(u64, Change)>,
}

#[derive(Debug, Clone)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Length(usize),
}

#[derive(Debug, Clone, Default)]
struct Entries {
    current: BTreeMap<OsString, u64>,
    durable: BTreeMap<OsString, u64>,
}

/// A change of names that happens as a whole.
#[derive(Debug, Clone)]
struct Renaming {
    sequence: u64,
    /// The file that it is about.
    inode: u64,
    edits: Vec<Edit>,
}

#[derive(Debug, Clone)]
struct Edit {
    directory: u64,
    name: OsString,
    now: Option<u64>,
}

/// What a program sees of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File { bytes: u64 },
    Directory,
}

/// Why an operation is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    Missing,
    Exists,
    NotADirectory,
    IsADirectory,
    NotEmpty,
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Write { offset, bytes } => {
                let end = offset + bytes.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*offset..end].copy_from_slice(bytes);
            }
            Self::Length(length) => content.resize(*length, 0),
        }
    }

    /// What is left of it when each sector of the disk is written or not.
    fn torn(&self, sector_bytes: usize, random: &mut Random) -> Vec<Self> {
        let Self::Write { offset, bytes } = self else {
            return if random.chance() { vec![self.clone()] } else { Vec::new() };
        };
        let mut left = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let in_sector = sector_bytes - (offset + at) % sector_bytes;
            let end = bytes.len().min(at + in_sector);
            if random.chance() {
                left.push(Self::Write { offset: offset + at, bytes: bytes[at..end].to_vec() });
            }
            at = end;
        }
        left
    }

    fn first_half(&self) -> Option<Self> {
        match self {
            Self::Write { offset, bytes } => {
                Some(Self::Write { offset: *offset, bytes: bytes[..bytes.len() / 2].to_vec() })
            }
            Self::Length(_) => None,
        }
    }
}

impl Image {
    pub(crate) fn new(names: Names) -> Self {
        let nodes = HashMap::from([(ROOT, Node::Directory(Entries::default()))]);
        Self { names, nodes, unsynced: Vec::new(), sequence: 0, next: ROOT + 1 }
    }

    fn entries(&self, directory: u64) -> Result<&Entries, Refusal> {
        match self.nodes.get(&directory) {
            Some(Node::Directory(entries)) => Ok(entries),
            Some(Node::File(_)) => Err(Refusal::NotADirectory),
            None => Err(Refusal::Missing),
        }
    }

    fn content(&mut self, file: u64) -> Result<&mut Content, Refusal> {
        match self.nodes.get_mut(&file) {
            Some(Node::File(content)) => Ok(content),
            Some(Node::Directory(_)) => Err(Refusal::IsADirectory),
            None => Err(Refusal::Missing),
        }
    }

    pub(crate) fn lookup(&self, directory: u64, name: &OsStr) -> Result<u64, Refusal> {
        self.entries(directory)?.current.get(name).copied().ok_or(Refusal::Missing)
    }

    pub(crate) fn kind(&self, inode: u64) -> Result<Kind, Refusal> {
        match self.nodes.get(&inode) {
            Some(Node::File(content)) => Ok(Kind::File { bytes: content.current.len() as u64 }),
            Some(Node::Directory(_)) => Ok(Kind::Directory),
            None => Err(Refusal::Missing),
        }
    }

    pub(crate) fn list(&self, directory: u64) -> Result<Vec<(OsString, u64)>, Refusal> {
        let current = &self.entries(directory)?.current;
        Ok(current.iter().map(|(name, inode)| (name.clone(), *inode)).collect())
    }

    /// Where a file is, seen from the root.
    pub(crate) fn path(&self, inode: u64) -> Option<PathBuf> {
        let mut directories = vec![(ROOT, PathBuf::new())];
        while let Some((directory, path)) = directories.pop() {
            if directory == inode {
                return Some(path);
            }
            for (name, child) in &self.entries(directory).ok()?.current {
                match self.nodes.get(child)? {
                    Node::Directory(_) => directories.push((*child, path.join(name))),
                    Node::File(_) if *child == inode => return Some(path.join(name)),
                    Node::File(_) => {}
                }
            }
        }
        None
    }

    /// Whether a program would see the same in both: the same names, and the same bytes under each.
    pub fn shows_the_same(&self, other: &Self) -> bool {
        self.nodes_are_the_same(ROOT, other, ROOT)
    }

    fn nodes_are_the_same(&self, own: u64, other: &Self, theirs: u64) -> bool {
        match (self.nodes.get(&own), other.nodes.get(&theirs)) {
            (Some(Node::File(own)), Some(Node::File(theirs))) => {
                Arc::ptr_eq(&own.current, &theirs.current) || own.current == theirs.current
            }
            (Some(Node::Directory(own)), Some(Node::Directory(theirs))) => {
                own.current.len() == theirs.current.len()
                    && own.current.iter().zip(&theirs.current).all(|((name, own), (other_name, theirs))| {
                        name == other_name && self.nodes_are_the_same(*own, other, *theirs)
                    })
            }
            _ => false,
        }
    }

    /// The current content of the file at `path`.
    pub fn content_at(&self, path: &Path) -> Option<&[u8]> {
        let mut inode = ROOT;
        for name in path {
            inode = self.lookup(inode, name).ok()?;
        }
        match self.nodes.get(&inode)? {
            Node::File(content) => Some(&content.current),
            Node::Directory(_) => None,
        }
    }

    pub(crate) fn read(&self, file: u64, offset: u64, bytes: usize) -> Result<&[u8], Refusal> {
        match self.nodes.get(&file) {
            Some(Node::File(content)) => {
                let length = content.current.len();
                let start = usize::try_from(offset).map_or(length, |offset| offset.min(length));
                Ok(&content.current[start..length.min(start.saturating_add(bytes))])
            }
            Some(Node::Directory(_)) => Err(Refusal::IsADirectory),
            None => Err(Refusal::Missing),
        }
    }

    fn change(&mut self, file: u64, change: Change) -> Result<(), Refusal> {
        self.sequence += 1;
        let sequence = self.sequence;
        let content = self.content(file)?;
        change.apply(Arc::make_mut(&mut content.current));
        content.unsynced.push((sequence, change));
        Ok(())
    }

    pub(crate) fn write(&mut self, file: u64, offset: usize, bytes: &[u8]) -> Result<(), Refusal> {
        self.change(file, Change::Write { offset, bytes: bytes.to_vec() })
    }

    pub(crate) fn set_length(&mut self, file: u64, length: usize) -> Result<(), Refusal> {
        self.change(file, Change::Length(length))
    }

    /// Makes a file, or a directory, under a name that is free.
    pub(crate) fn create(&mut self, directory: u64, name: &OsStr, kind: Kind) -> Result<u64, Refusal> {
        if self.entries(directory)?.current.contains_key(name) {
            return Err(Refusal::Exists);
        }
        let inode = self.next;
        self.next += 1;
        let node = match kind {
            Kind::File { .. } => Node::File(Content::default()),
            Kind::Directory => Node::Directory(Entries::default()),
        };
        self.nodes.insert(inode, node);
        self.rename_as(inode, vec![Edit { directory, name: name.to_owned(), now: Some(inode) }]);
        Ok(inode)
    }

    /// Takes away a name; what is open stays readable.
    pub(crate) fn remove(&mut self, directory: u64, name: &OsStr) -> Result<(), Refusal> {
        let inode = self.lookup(directory, name)?;
        if let Ok(entries) = self.entries(inode)
            && !entries.current.is_empty()
        {
            return Err(Refusal::NotEmpty);
        }
        self.rename_as(inode, vec![Edit { directory, name: name.to_owned(), now: None }]);
        Ok(())
    }

    pub(crate) fn rename(&mut self, from: (u64, &OsStr), to: (u64, &OsStr)) -> Result<(), Refusal> {
        let inode = self.lookup(from.0, from.1)?;
        self.entries(to.0)?;
        let edit = |(directory, name): (u64, &OsStr), now| Edit { directory, name: name.to_owned(), now };
        self.rename_as(inode, vec![edit(from, None), edit(to, Some(inode))]);
        Ok(())
    }

    fn rename_as(&mut self, inode: u64, edits: Vec<Edit>) {
        self.sequence += 1;
        let renaming = Renaming { sequence: self.sequence, inode, edits };
        self.carry_out(&renaming, |entries| &mut entries.current);
        self.unsynced.push(renaming);
    }

    fn carry_out(&mut self, renaming: &Renaming, on: impl Fn(&mut Entries) -> &mut BTreeMap<OsString, u64>) {
        for Edit { directory, name, now } in &renaming.edits {
            let Some(Node::Directory(entries)) = self.nodes.get_mut(directory) else { continue };
            match now {
                Some(inode) => on(entries).insert(name.clone(), *inode),
                None => on(entries).remove(name),
            };
        }
    }

    /// Makes the content of a file durable, or the names in a directory.
    pub(crate) fn sync(&mut self, inode: u64) -> Result<(), Refusal> {
        let names = self.names;
        let is_directory = match self.nodes.get_mut(&inode).ok_or(Refusal::Missing)? {
            Node::Directory(_) => true,
            Node::File(content) => {
                for (_, change) in content.unsynced.drain(..) {
                    change.apply(Arc::make_mut(&mut content.durable));
                }
                false
            }
        };
        let is_covered = |renaming: &Renaming| match names {
            Names::WithFile if renaming.inode == inode => true,
            Names::WithFile | Names::WithDirectoryOnly => {
                is_directory && renaming.edits.iter().any(|edit| edit.directory == inode)
            }
        };
        let (covered, rest) = std::mem::take(&mut self.unsynced).into_iter().partition(is_covered);
        self.unsynced = rest;
        for renaming in Vec::<Renaming>::into_iter(covered) {
            self.carry_out(&renaming, |entries| &mut entries.durable);
        }
        Ok(())
    }

    /// Changes that no fsync covers.
    #[cfg(test)]
    fn unsynced(&self) -> usize {
        let of = |node: &Node| match node {
            Node::File(content) => content.unsynced.len(),
            Node::Directory(_) => 0,
        };
        self.nodes.values().map(of).sum::<usize>() + self.unsynced.len()
    }

    /// What is left after a power cut. Files have other numbers than before.
    #[must_use]
    pub fn after(&self, cut: Cut, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut left = self.clone();
        let moment = self.moment(&mut random);
        let renamings = std::mem::take(&mut left.unsynced);
        for renaming in renamings {
            let kept = match cut {
                Cut::DropUnsynced => false,
                Cut::Subset | Cut::Torn { .. } | Cut::DataWithoutLength => random.chance(),
                Cut::Prefix => renaming.sequence < moment,
            };
            if kept {
                left.carry_out(&renaming, |entries| &mut entries.durable);
            }
        }
        let mut inodes: Vec<u64> = left.nodes.keys().copied().collect();
        inodes.sort_unstable(); // so that chance is the seed's alone
        for inode in inodes {
            match left.nodes.get_mut(&inode) {
                Some(Node::File(content)) => content.cut(cut, moment, &mut random),
                Some(Node::Directory(entries)) => entries.current = entries.durable.clone(),
                None => {}
            }
        }
        left.renumbered()
    }

    /// Between two unsynced changes.
    fn moment(&self, random: &mut Random) -> u64 {
        let mut sequences: Vec<u64> = self.unsynced.iter().map(|renaming| renaming.sequence).collect();
        for node in self.nodes.values() {
            if let Node::File(content) = node {
                sequences.extend(content.unsynced.iter().map(|(sequence, _)| sequence));
            }
        }
        sequences.sort_unstable();
        sequences.push(self.sequence + 1);
        sequences[random.below(sequences.len())]
    }

    /// What can be reached from the root, under new numbers.
    fn renumbered(mut self) -> Self {
        let mut nodes = HashMap::new();
        let mut found = vec![(ROOT, ROOT)];
        while let Some((old, new)) = found.pop() {
            let Some(mut node) = self.nodes.remove(&old) else { continue };
            if let Node::Directory(entries) = &mut node {
                entries.current.retain(|_, inode| self.nodes.contains_key(inode));
                for inode in entries.current.values_mut() {
                    found.push((*inode, self.next));
                    *inode = self.next;
                    self.next += 1;
                }
                entries.durable = entries.current.clone();
            }
            nodes.insert(new, node);
        }
        self.nodes = nodes;
        self
    }
}

impl Content {
    fn cut(&mut self, cut: Cut, moment: u64, random: &mut Random) {
        let durable = self.durable.len();
        for (sequence, change) in std::mem::take(&mut self.unsynced) {
            let left: Vec<Change> = match cut {
                Cut::DropUnsynced => Vec::new(),
                Cut::Subset if random.chance() => vec![change],
                Cut::Subset => Vec::new(),
                Cut::Torn { sector_bytes } => change.torn(sector_bytes, random),
                Cut::Prefix if sequence < moment => vec![change],
                Cut::Prefix if sequence == moment => change.first_half().into_iter().collect(),
                Cut::Prefix => Vec::new(),
                Cut::DataWithoutLength => vec![change],
            };
            for change in left {
                change.apply(Arc::make_mut(&mut self.durable));
            }
        }
        if cut == Cut::DataWithoutLength {
            Arc::make_mut(&mut self.durable).resize(durable, 0);
        }
        self.current = self.durable.clone();
    }
}

#[cfg(test)]
mod tests;
