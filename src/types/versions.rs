//! Which machine of a node wrote something, in which version, and what a build reads. `docs/design/composition.md` has the rules.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The machine that wrote a command or its part of a snapshot, and the version of that machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct MachineVersion {
    /// Its number among the machines of a node; 0 for one that is alone.
    pub machine: u16,
    /// Its version.
    pub version: u32,
}

impl MachineVersion {
    /// What has no number and no version was written by this one: every log and snapshot before there were any.
    pub const FIRST: Self = Self { machine: 0, version: 0 };
}

impl fmt::Display for MachineVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.machine {
            0 => write!(f, "version {} of the machine", self.version),
            number => write!(f, "version {} of machine {number}", self.version),
        }
    }
}

/// The versions of one machine that a build reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ReadableVersions {
    /// The machine's number.
    pub machine: u16,
    /// The oldest version.
    pub oldest: u32,
    /// The newest version, which is the one that the build writes.
    pub newest: u32,
}

impl ReadableVersions {
    /// What every build reads that says nothing of itself.
    pub const FIRST: Self = Self { machine: 0, oldest: 0, newest: 0 };

    /// Whether it reads `version`.
    pub const fn contains(&self, version: u32) -> bool {
        self.oldest <= version && version <= self.newest
    }
}

/// What `reads` has of the machine that `wrote`.
///
/// # Errors
/// When it does not read that.
pub(crate) fn check_version(
    wrote: MachineVersion,
    reads: &[ReadableVersions],
) -> Result<(), UnsupportedVersion> {
    let reads = reads.iter().find(|reads| reads.machine == wrote.machine).copied();
    match reads.is_some_and(|reads| reads.contains(wrote.version)) {
        true => Ok(()),
        false => Err(UnsupportedVersion { wrote, reads }),
    }
}

/// Whether what follows an agreement on a version can be read. A build that has left that version behind finds out about each
/// command by itself: there may be none.
///
/// # Errors
/// When `reads` has nothing that is as new.
pub(crate) fn check_agreed(
    agreed: MachineVersion,
    reads: &[ReadableVersions],
) -> Result<(), UnsupportedVersion> {
    check_version(agreed, reads).or_else(|refused| match refused.reads {
        Some(reads) if agreed.version < reads.oldest => Ok(()),
        _ => Err(refused),
    })
}

/// Something was written by a machine, or by a version of it, that this build does not read. Nothing is wrong with what was
/// written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnsupportedVersion {
    /// The writer.
    pub wrote: MachineVersion,
    /// What this build reads of that machine; `None` when it does not have it.
    pub reads: Option<ReadableVersions>,
}

impl std::error::Error for UnsupportedVersion {}

impl fmt::Display for UnsupportedVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wrote, reads } = self;
        write!(f, "written by {wrote}, ")?;
        match reads {
            None => f.write_str("which this build does not have: upgrade this node"),
            Some(ReadableVersions { oldest, newest, .. }) => {
                match oldest == newest {
                    true => write!(f, "this build reads {oldest} only")?,
                    false => write!(f, "this build reads {oldest} to {newest}")?,
                }
                f.write_str(match wrote.version > *newest {
                    true => ": upgrade this node",
                    false => ": run a build between the two first, until it has taken a snapshot",
                })
            }
        }
    }
}

/// What a snapshot says of the machines in it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SnapshotMachines {
    /// Which wrote it, in the order of their parts. Empty for a machine that is alone and has [no
    /// version](MachineVersion::FIRST).
    pub parts: Vec<MachineVersion>,
    /// Up to which version each machine's commands may stand in the log. Nothing is said of the first version.
    pub agreed: Vec<MachineVersion>,
}

impl SnapshotMachines {
    /// Whether there is nothing to say that builds without versions would have to know.
    pub fn is_plain(&self) -> bool {
        self.parts.is_empty() && self.agreed.is_empty()
    }

    /// Refuses a snapshot that a build does not read.
    ///
    /// # Errors
    /// With the first machine of which it does not read the part, or what may follow in the log.
    pub fn check(&self, reads: &[ReadableVersions]) -> Result<(), UnsupportedVersion> {
        let alone = [MachineVersion::FIRST];
        let parts = if self.parts.is_empty() { &alone } else { self.parts.as_slice() };
        parts.iter().try_for_each(|wrote| check_version(*wrote, reads))?;
        self.agreed.iter().try_for_each(|agreed| check_agreed(*agreed, reads))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(machine: u16, version: u32, reads: &[ReadableVersions]) -> String {
        check_version(MachineVersion { machine, version }, reads).unwrap_err().to_string()
    }

    #[test]
    fn a_refusal_says_who_wrote_and_what_to_do() {
        let reads = [ReadableVersions { machine: 0, oldest: 3, newest: 5 }];
        for version in 3..=5 {
            assert_eq!(check_version(MachineVersion { machine: 0, version }, &reads), Ok(()));
        }
        assert_eq!(
            refused(0, 7, &reads),
            "written by version 7 of the machine, this build reads 3 to 5: upgrade this node"
        );
        assert_eq!(
            refused(0, 2, &reads),
            "written by version 2 of the machine, this build reads 3 to 5: run a build between the two first, until it has taken a snapshot"
        );
        assert_eq!(
            refused(4, 0, &reads),
            "written by version 0 of machine 4, which this build does not have: upgrade this node"
        );
    }

    #[test]
    fn a_snapshot_that_says_nothing_is_of_the_first_version() {
        let plain = SnapshotMachines::default();
        assert!(plain.is_plain() && plain.check(&[ReadableVersions::FIRST]).is_ok());
        let newer = [ReadableVersions { machine: 0, oldest: 1, newest: 2 }];
        assert!(plain.check(&newer).is_err());
        let agreed = vec![MachineVersion { machine: 0, version: 3 }];
        let ahead = SnapshotMachines { parts: vec![MachineVersion { machine: 0, version: 2 }], agreed };
        assert!(!ahead.is_plain() && ahead.check(&newer).is_err(), "what may follow cannot be read");
    }
}
