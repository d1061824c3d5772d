//! Ports that nobody else uses, for tests.
//!
//! The usual trick, to bind port 0 and take what the kernel gives, is not good enough for nodes that are
//! killed and restarted: those ports come from the range that outgoing connections use, so while a node
//! is down its port can be taken by any client, even by one that tries to reach that very node and
//! connects to itself. Blocks here lie below that range, and a lock file per block keeps other test
//! processes of this machine off it for as long as it is held.

use std::fs::{self, File, OpenOptions};
use std::net::TcpListener;
use std::process;
use std::sync::atomic::{AtomicU16, Ordering};

use crate::error::ClusterError;
use crate::spec::MAX_NODES;

/// Ports in one block: a client and a peer port for each node.
const BLOCK_PORTS: u16 = 2 * MAX_NODES as u16;
/// The first port of the first block.
const FIRST_PORT: u16 = 10_240;
/// Where the outgoing range begins when the kernel does not say.
const OUTGOING_PORT: u16 = 32_768;

/// A run of free ports, held until dropped.
#[derive(Debug)]
pub(crate) struct PortBlock {
    first: u16,
    /// Locked for as long as this value lives; the kernel releases it however the process ends.
    _lock: File,
}

impl PortBlock {
    /// Reserves a block in which every port of `host` is free at this moment.
    pub(crate) fn reserve(host: &str) -> Result<Self, ClusterError> {
        let dir = std::env::temp_dir().join("quorate-ports");
        fs::create_dir_all(&dir).map_err(ClusterError::io("cannot create", &dir))?;
        let end = outgoing_port().unwrap_or(OUTGOING_PORT).max(FIRST_PORT + BLOCK_PORTS);
        let blocks = (end - FIRST_PORT) / BLOCK_PORTS;

        // Different processes begin at different blocks, and one process does not return to the last one.
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let start = (process::id() % u32::from(blocks)) as u16;
        for _ in 0..blocks {
            let turn = NEXT.fetch_add(1, Ordering::Relaxed);
            let first = FIRST_PORT + (start.wrapping_add(turn) % blocks) * BLOCK_PORTS;
            let lock = OpenOptions::new().create(true).append(true).open(dir.join(first.to_string()));
            // A file of another user counts as taken.
            let Ok(lock) = lock else { continue };
            if lock.try_lock().is_ok() && all_free(host, first) {
                return Ok(Self { first, _lock: lock });
            }
        }
        Err(ClusterError::NoFreePorts { ports: BLOCK_PORTS, from: FIRST_PORT, to: end })
    }

    /// The first client port.
    pub(crate) fn client_port(&self) -> u16 {
        self.first
    }

    /// The first peer port.
    pub(crate) fn peer_port(&self) -> u16 {
        self.first + BLOCK_PORTS / 2
    }
}

fn all_free(host: &str, first: u16) -> bool {
    (first..first + BLOCK_PORTS).all(|port| TcpListener::bind((host, port)).is_ok())
}

/// The first port that this kernel gives to outgoing connections.
fn outgoing_port() -> Option<u16> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    range.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_held_together_do_not_overlap() {
        let blocks: Vec<_> = (0..4).map(|_| PortBlock::reserve("127.0.0.1").unwrap()).collect();
        let mut firsts: Vec<_> = blocks.iter().map(PortBlock::client_port).collect();
        firsts.sort_unstable();
        assert!(firsts.windows(2).all(|pair| pair[1] - pair[0] >= BLOCK_PORTS), "{firsts:?}");
    }
}
