//! Up to which version the members have agreed that each machine's commands may stand in the log.
//!
//! An agreement is an entry, which a leader proposes once every member has told it that it reads that version
//! (`engine/cluster/versions.rs`). So it outlives leaders and members that are down: whoever leads later goes by what it has applied, and asks
//! nobody. It is part of the state, and in every snapshot. It is never taken back.

use std::time::Duration;

use tokio::sync::watch;

use crate::types::MachineVersion;

/// See the [module](self). The first version of a machine that is alone needs no agreement: every build reads it that does not
/// say otherwise.
#[derive(Debug, Default)]
pub(crate) struct AgreedVersions(watch::Sender<Vec<MachineVersion>>);

impl AgreedVersions {
    /// Whether commands that a machine `wrote` may stand in the log.
    pub(crate) fn contain(&self, wrote: MachineVersion) -> bool {
        wrote == MachineVersion::FIRST || contain(&self.0.borrow(), wrote)
    }

    /// As [`contain`](Self::contain), after it has come about or this much time has passed.
    pub(crate) async fn wait_for(&self, wrote: MachineVersion, patience: Duration) -> bool {
        let mut changes = self.0.subscribe();
        let agreed = changes.wait_for(|agreed| contain(agreed, wrote));
        matches!(tokio::time::timeout(patience, agreed).await, Ok(Ok(_)))
    }

    /// All of them, one for each machine, in the order of their numbers.
    pub(crate) fn versions(&self) -> Vec<MachineVersion> {
        self.0.borrow().clone()
    }

    /// The members have agreed on `version`.
    pub(super) fn raise(&self, version: MachineVersion) {
        self.0.send_if_modified(|agreed| {
            match agreed.iter_mut().find(|agreed| agreed.machine == version.machine) {
                Some(before) if before.version >= version.version => return false,
                Some(before) => *before = version,
                None => {
                    agreed.push(version);
                    agreed.sort_unstable();
                }
            }
            assert!(
                agreed.is_sorted_by(|one, next| one.machine < next.machine),
                "invariant: each machine has one agreed version"
            );
            true
        });
    }

    /// The state is another one, at which these were agreed.
    pub(super) fn replace(&self, agreed: &[MachineVersion]) {
        self.0.send_replace(agreed.to_vec());
    }
}

fn contain(agreed: &[MachineVersion], wrote: MachineVersion) -> bool {
    agreed.iter().any(|agreed| agreed.machine == wrote.machine && agreed.version >= wrote.version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_agreed_only_grows() {
        let of = |machine, version| MachineVersion { machine, version };
        let agreed = AgreedVersions::default();
        assert!(
            agreed.contain(MachineVersion::FIRST) && !agreed.contain(of(0, 1)) && !agreed.contain(of(1, 0))
        );
        for version in [of(3, 2), of(0, 4), of(3, 1)] {
            agreed.raise(version);
        }
        assert_eq!(agreed.versions(), [of(0, 4), of(3, 2)]);
        assert!(agreed.contain(of(3, 2)) && !agreed.contain(of(3, 3)) && !agreed.contain(of(1, 0)));
        let patience = Duration::from_millis(10);
        assert!(agreed.wait_for(of(0, 1), patience).await && !agreed.wait_for(of(0, 5), patience).await);
        agreed.replace(&[]);
        assert!(!agreed.contain(of(0, 1)), "another state");
    }
}
