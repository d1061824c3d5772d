//! The generated protocol code. The crate in `proto/` writes it.

#![allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)] // generated

#[cfg(any(feature = "peers", feature = "client"))]
pub mod codec;
#[cfg(any(feature = "peers", feature = "client"))]
pub mod details;

#[cfg(any(feature = "peers", feature = "client"))]
pub mod google {
    pub mod rpc {
        include!("../proto/generated/google.rpc.rs");
    }
}

pub mod peer {
    include!("../proto/generated/quorate.peer.v1.rs");
}

#[cfg(any(feature = "peers", feature = "client"))]
pub mod v1 {
    include!("../proto/generated/quorate.v1.rs");

    pub use crate::reason::Reason;
}

#[cfg(any(feature = "peers", feature = "client"))]
pub mod replication {
    include!("../proto/generated/replication.rs");
}

/// What can be called at a client port.
#[cfg(feature = "server")]
pub mod rpc {
    include!("../proto/generated/rpc.rs");
}

/// Descriptors of all services, for server reflection.
#[cfg(feature = "server")]
pub const DESCRIPTORS: &[u8] = include_bytes!("../proto/generated/descriptors.bin");
