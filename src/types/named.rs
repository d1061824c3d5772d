//! Enums whose variants have names: one word each, the same on every interface, and never compared as text.

use std::fmt;

use serde::{Serialize, Serializer};

/// Declares such an enum, from its variants and their names.
macro_rules! named {
    (
        $(#[$about:meta])*
        pub enum $type:ident { $($(#[$of:meta])* $variant:ident = $name:literal,)+ }
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $type { $($(#[$of])* $variant,)+ }

        impl $type {
            /// All of them, in order.
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$variant),+];

            /// Its name on every interface.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// Whose name this is; none of those that this version knows, if `None`.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.into_iter().find(|known| known.name() == name)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }
    };
}

named! {
    /// What a node is to its cluster at this moment.
    pub enum Role {
        /// Has joined no cluster yet, or receives the log without a vote.
        Learner = "learner",
        /// Votes and follows.
        Follower = "follower",
        /// Asks for votes.
        Candidate = "candidate",
        /// Leads its term.
        Leader = "leader",
        /// Stopped, in order or by a fatal error.
        Stopped = "stopped",
    }
}

named! {
    /// What a member is in the membership.
    pub enum MemberKind {
        /// It votes.
        Voter = "voter",
        /// It receives the log, and does not vote.
        Learner = "learner",
    }
}

named! {
    /// What the disk is good for at present, in the order of badness.
    #[derive(Default)]
    pub enum DiskState {
        /// Writes are taken.
        #[default]
        Ok = "ok",
        /// Writes are taken, but room is getting short: less than the size of the reserve is left beside it.
        Low = "low",
        /// No new writes are taken; reads go on.
        Full = "full",
        /// A write has been under way for too long. No new writes are taken.
        Stalled = "stalled",
    }
}

impl DiskState {
    /// Whether a node in this state may take on writes.
    pub fn takes_writes(self) -> bool {
        match self {
            Self::Ok | Self::Low => true,
            Self::Full | Self::Stalled => false,
        }
    }
}

named! {
    /// What a leader makes of a peer.
    pub enum PeerStanding {
        /// It answers, and has nearly everything.
        Connected = "Connected",
        /// It answers, and is being sent a snapshot or many entries.
        Syncing = "Syncing",
        /// Its first missing entry is old, or it has not answered for as long: then what it has is what it last said.
        Lagging = "Lagging",
        /// It has not answered for a long time, or never.
        Disconnected = "Disconnected",
    }
}

named! {
    /// What a read may have to wait for.
    pub enum ReadWait {
        /// A leader, and its confirmation that it leads.
        ReadIndex = "read_index",
        /// That this node has applied as much as the read needs, and a view of it.
        Apply = "apply",
    }
}

named! {
    /// Who says how many bytes the state may take.
    pub enum QuotaSource {
        /// The leader took it from the memory of the smallest member. It follows the members.
        Memory = "memory",
        /// An operator set it. It stays until an operator changes it.
        Operator = "operator",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_it_is_written() {
        for role in Role::ALL {
            assert_eq!(Role::from_name(role.name()), Some(role));
            assert_eq!(serde_json::to_value(role).unwrap(), role.to_string());
        }
        assert_eq!(Role::from_name("emperor"), None);
        assert_eq!(format!("{:<7}|", DiskState::Low), "low    |");
    }

    /// Whoever compares a text with one of the names has not read it as what it is.
    #[test]
    fn no_name_is_compared_as_text() {
        fn walk(path: &std::path::Path, names: &[&str]) {
            if path.is_dir() {
                let within = std::fs::read_dir(path).unwrap();
                return within.for_each(|entry| walk(&entry.unwrap().path(), names));
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                return;
            }
            let text = std::fs::read_to_string(path).unwrap();
            for name in names {
                for comparison in
                    [format!("== \"{name}\""), format!("!= \"{name}\""), format!("contains(\"{name}\")")]
                {
                    let is_one = |line: &&str| line.contains(&comparison);
                    assert_eq!(text.lines().find(is_one), None, "{}", path.display());
                }
            }
        }
        let roles = Role::ALL.map(Role::name).into_iter().chain(MemberKind::ALL.map(MemberKind::name));
        let states =
            DiskState::ALL.map(DiskState::name).into_iter().chain(PeerStanding::ALL.map(PeerStanding::name));
        let names: Vec<_> = roles.chain(states).collect();
        for part in ["src", "cluster", "jepsen", "tests"] {
            walk(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(part), &names);
        }
    }
}
