//! Real processes: clusters of them, callers, and what both are held against.

mod cluster;
mod line;
pub mod observe;
pub mod set;
mod writers;

pub use cluster::{
    DEADLINE, Outcome, TestCluster, Unlisted, client, data_files, eventually, eventually_within, get, get_at,
    outcome, output, said, spec,
};
pub use line::Line;
pub use writers::Writers;
