//! The generated protocol code.

#![allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)] // generated

pub mod codec;
pub mod details;

pub mod google {
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
}

pub mod peer {
    tonic::include_proto!("quorate.peer.v1");
}

pub mod v1 {
    tonic::include_proto!("quorate.v1");

    pub use crate::reason::Reason;
}

/// Descriptors of all services, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
