//! What callers of the client port may make a node hold: so much each, and so much all together.

pub use crate::incoming::Bound;
pub use crate::machine::kv::HistoryLimits;

const MIB: usize = 1024 * 1024;

/// Bounds of the client port. Where a caller wants more it waits, or is refused with `REASON_LIMIT_REACHED`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoorLimits {
    /// Most connections; `None` for a share of the files that the process may open. A few more are kept back for probes
    /// and operators.
    pub connections: Option<usize>,
    /// Watches, by connection.
    pub watches: Bound,
    /// Bytes of answers that are encoded and that their callers do not take, by connection. Calls with more to answer wait.
    pub unsent_bytes: Bound,
    /// Bytes of requests that have not arrived as a whole, by connection. What exceeds them is refused.
    pub unfinished_bytes: Bound,
    /// Bytes of answers that wait on pipelines to be encoded, by pipeline. A pipeline that has more is not read.
    pub queued_bytes: Bound,
}

impl Default for DoorLimits {
    fn default() -> Self {
        Self {
            connections: None,
            watches: Bound { each: 2_048, all: 16_384 },
            unsent_bytes: Bound { each: 32 * MIB, all: 256 * MIB },
            unfinished_bytes: Bound { each: 64 * MIB, all: 256 * MIB },
            queued_bytes: Bound { each: 64 * MIB, all: 256 * MIB },
        }
    }
}

impl DoorLimits {
    /// What a bound in bytes cannot be less than: the largest message there is must pass.
    pub const MIN_BYTES: usize = super::MAX_MESSAGE_BYTES;

    /// Refuses what cannot work.
    ///
    /// # Errors
    /// The setting, and what it must be.
    pub fn validate(&self) -> Result<(), String> {
        if self.connections == Some(0) {
            return Err("max_connections must be at least 1".to_owned());
        }
        if self.watches.each == 0 || self.watches.all < self.watches.each {
            return Err("max_watches must be at least max_connection_watches, and that at least 1".to_owned());
        }
        let bytes = [
            ("unsent_bytes", self.unsent_bytes),
            ("unfinished_bytes", self.unfinished_bytes),
            ("queued_bytes", self.queued_bytes),
        ];
        for (name, Bound { each, all }) in bytes {
            if each < Self::MIN_BYTES || all / 2 < each {
                let (owner, least) =
                    (if name == "queued_bytes" { "pipeline" } else { "connection" }, Self::MIN_BYTES);
                return Err(format!(
                    "max_{owner}_{name} ({each}) must be at least {least}, and max_{name} ({all}) twice as much or more"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_refused() {
        let limits = DoorLimits::default();
        assert_eq!(limits.validate(), Ok(()));
        type Break = fn(&mut DoorLimits);
        let broken: [(Break, &str); 5] = [
            (|limits| limits.connections = Some(0), "max_connections"),
            (|limits| limits.watches.all = 1, "max_watches"),
            (|limits| limits.unsent_bytes.each = 1, "max_connection_unsent_bytes"),
            (
                |limits| limits.unfinished_bytes.all = limits.unfinished_bytes.each,
                "max_connection_unfinished_bytes",
            ),
            (|limits| limits.queued_bytes.each = 0, "max_pipeline_queued_bytes"),
        ];
        for (break_it, name) in broken {
            let mut limits = limits.clone();
            break_it(&mut limits);
            assert!(limits.validate().unwrap_err().contains(name), "{limits:?}");
        }
    }
}
