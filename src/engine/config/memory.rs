//! How much memory this node may use, and how it divides it.
//!
//! The least of what the machine has, what the control groups of the process allow, and what its resource limits allow.
//! The state gets a quarter of what is left beside the base, because at times it is there more than once: while a
//! snapshot is written or a view is read, what changes meanwhile is kept as it was, and the allocator rounds up.

use std::path::{Path, PathBuf};

use rustix::process::{Resource, getrlimit};

use super::{Limits, SnapshotPolicy};
use crate::types::Quota;

/// What a node takes without any state: the program, its tables, the buffers of the log.
const BASE_BYTES: u64 = 160 * 1024 * 1024;

/// The state may take one in so many bytes of what is left beside the base.
const STATE_SHARE: u64 = 4;

/// Each buffer with a default may take one in so many bytes of the memory, where the default is more.
const BUFFER_SHARE: u64 = 16;

/// The log after the newest snapshot may take one in so many bytes, where the default is more.
const LOG_SHARE: u64 = 8;

/// The least that the log is given.
const MIN_LOG_BYTES: u64 = 16 * 1024 * 1024;

/// The least that a buffer is given.
const MIN_BUFFER_BYTES: u64 = 4 * 1024 * 1024;

/// Most bytes of what has been replaced that are kept.
const MAX_PINNED_BYTES: u64 = 1024 * 1024 * 1024;

/// Memory of one node, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Memory(pub(in crate::engine) u64);

impl Memory {
    /// What this process may use.
    pub(in crate::engine) fn of_this_process() -> Self {
        let limits = [physical(Path::new("/proc/meminfo")), control_groups(), resource_limit()];
        // A system that tells nothing is taken for a small one.
        const UNKNOWN: u64 = 1024 * 1024 * 1024;
        Self(limits.into_iter().flatten().min().unwrap_or(UNKNOWN))
    }

    /// The quota on the state that this node can bear.
    pub(in crate::engine) fn quota_bytes(self) -> u64 {
        (self.0.saturating_sub(BASE_BYTES) / STATE_SHARE).clamp(Quota::MIN_BYTES, Quota::MAX_BYTES)
    }

    /// A buffer that takes `default` where there is enough memory.
    fn buffer(self, default: usize) -> usize {
        share_bytes(self.0, default, MIN_BUFFER_BYTES as usize)
    }

    /// Has limits that nobody set fit the memory: those that are what they are by default. The log is bounded too, because
    /// sled keeps much of it in memory.
    pub(in crate::engine) fn fit(self, limits: &mut Limits, snapshots: &mut SnapshotPolicy) {
        let log = SnapshotPolicy::default();
        if (snapshots.every_bytes, snapshots.keep_bytes) == (log.every_bytes, log.keep_bytes) {
            snapshots.every_bytes = log.every_bytes.min((self.0 / LOG_SHARE).max(MIN_LOG_BYTES));
            snapshots.keep_bytes = log.keep_bytes.min((self.0 / BUFFER_SHARE).max(MIN_LOG_BYTES));
        }
        let usual = Limits::default();
        if limits.max_inflight_bytes == usual.max_inflight_bytes {
            limits.max_inflight_bytes = self.buffer(usual.max_inflight_bytes).max(limits.max_command_bytes);
        }
        if limits.log_tail_bytes == usual.log_tail_bytes {
            limits.log_tail_bytes = self.buffer(usual.log_tail_bytes).max(limits.append_message_bytes);
        }
    }

    /// How many bytes of what has been replaced may be kept by a snapshot that is being written, or by those who read for long.
    pub(in crate::engine) fn pinned_bytes(self) -> u64 {
        (self.0 / BUFFER_SHARE).clamp(MIN_BUFFER_BYTES, MAX_PINNED_BYTES)
    }
}

/// Memory that this process may use, in bytes: the least of what the machine has and its limits allow.
pub(crate) fn available_bytes() -> u64 {
    Memory::of_this_process().0
}

/// What something that takes `default` bytes by default may take on a node with `memory_bytes` of memory: a sixteenth, at least `least`.
pub(crate) fn share_bytes(memory_bytes: u64, default: usize, least: usize) -> usize {
    let share = usize::try_from(memory_bytes / BUFFER_SHARE).unwrap_or(usize::MAX);
    default.min(share.max(least))
}

/// The memory of the machine.
fn physical(meminfo: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(meminfo).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib.saturating_mul(1024))
}

/// What a limit on address space or data has to allow beside what is in use: stacks of threads, the program, what is mapped, and what the
/// allocator has reserved and not used, which comes in pieces of 128 MiB.
const RESERVED_BYTES: u64 = 256 * 1024 * 1024;

/// The least that a limit on address space or data may be for a node.
pub(crate) const MIN_ADDRESS_SPACE_BYTES: u64 = RESERVED_BYTES + super::MIN_MEMORY_BYTES;

/// What the least of the limits on address space and data leaves to use; `None` for no limit.
fn resource_limit() -> Option<u64> {
    let limits =
        [Resource::As, Resource::Data].into_iter().filter_map(|resource| getrlimit(resource).current);
    limits.min().map(usable)
}

/// What may be in use where so much may be reserved.
fn usable(limit: u64) -> u64 {
    limit.saturating_sub(RESERVED_BYTES)
}

/// The least limit of the control groups that this process is in, of either version.
fn control_groups() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let limits = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let (roots, file): (&[&str], _) = match controllers {
            "" => (&["/sys/fs/cgroup", "/sys/fs/cgroup/unified"], "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                (&["/sys/fs/cgroup/memory"], "memory.limit_in_bytes")
            }
            _ => return None,
        };
        roots.iter().filter_map(|root| least_limit(Path::new(root), path, file)).min()
    });
    limits.min()
}

/// The least of the limits from the group at `path` up to the `root` of all groups. A limit binds all groups below it.
/// In a container, the path may be one that only its host knows, and the root the container's own.
fn least_limit(root: &Path, path: &str, file: &str) -> Option<u64> {
    /// What version 1 has for no limit is a little less than 2^63.
    const UNLIMITED: u64 = 1 << 62;
    let mut group: PathBuf = root.join(path.trim_start_matches('/'));
    let mut least = None;
    while group.starts_with(root) {
        let limit = std::fs::read_to_string(group.join(file)).ok().and_then(|text| text.trim().parse().ok());
        least = least.into_iter().chain(limit.filter(|limit| *limit < UNLIMITED)).min();
        if !group.pop() {
            break;
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    #[test]
    fn a_small_node_has_a_small_quota_and_small_buffers() {
        assert_eq!(Memory(400 * MIB).quota_bytes(), 60 * MIB);
        assert_eq!(
            Memory(10 * MIB).quota_bytes(),
            Quota::MIN_BYTES,
            "too small to be of use, but never none"
        );
        assert!((Quota::MIN_BYTES..=Quota::MAX_BYTES).contains(&Memory(u64::MAX).quota_bytes()));
        let (mut limits, mut snapshots) = (Limits::default(), SnapshotPolicy::default());
        Memory(400 * MIB).fit(&mut limits, &mut snapshots);
        assert_eq!(limits.max_inflight_bytes as u64, 25 * MIB);
        assert_eq!((snapshots.every_bytes, snapshots.keep_bytes), (50 * MIB, 25 * MIB));
        let (mut limits, mut snapshots) = (Limits::default(), SnapshotPolicy::default());
        Memory(24 * 1024 * MIB).fit(&mut limits, &mut snapshots);
        assert_eq!((limits, snapshots), (Limits::default(), SnapshotPolicy::default()));
    }

    #[test]
    fn what_was_set_stays() {
        let set = Limits { max_inflight_bytes: 50 << 20, log_tail_bytes: 7 << 20, ..Limits::default() };
        let kept = SnapshotPolicy { keep_bytes: 1, ..SnapshotPolicy::default() };
        let (mut limits, mut snapshots) = (set.clone(), kept.clone());
        Memory(200 * MIB).fit(&mut limits, &mut snapshots);
        assert_eq!((limits, snapshots), (set, kept));
    }

    #[test]
    fn the_least_limit_of_all_groups_above_counts() {
        let root = tempfile::tempdir().unwrap();
        let (outer, inner) = (root.path().join("a"), root.path().join("a/b"));
        std::fs::create_dir_all(&inner).unwrap();
        let least = || least_limit(root.path(), "/a/b", "memory.max");
        assert_eq!(least(), None);
        std::fs::write(inner.join("memory.max"), "max\n").unwrap();
        std::fs::write(outer.join("memory.max"), "5000\n").unwrap();
        assert_eq!(least(), Some(5000));
        std::fs::write(inner.join("memory.max"), "400\n").unwrap();
        assert_eq!(least(), Some(400));
        std::fs::write(root.path().join("memory.max"), "300\n").unwrap();
        assert_eq!(least(), Some(300));
        std::fs::write(root.path().join("memory.max"), format!("{}\n", i64::MAX)).unwrap();
        assert_eq!(least(), Some(400), "that is how version 1 says none");
        assert_eq!(least_limit(root.path(), "/elsewhere/c", "memory.max"), None, "the root has no limit");
    }

    #[test]
    fn a_limit_on_address_space_is_not_all_for_use() {
        assert_eq!(usable(1024 * MIB), 768 * MIB);
        assert_eq!(usable(MIN_ADDRESS_SPACE_BYTES), crate::engine::MIN_MEMORY_BYTES);
        assert_eq!(usable(MIB), 0);
    }

    #[test]
    fn this_machine_has_memory() {
        let memory = Memory::of_this_process().0;
        assert!(memory > MIB && memory <= physical(Path::new("/proc/meminfo")).unwrap());
    }
}
