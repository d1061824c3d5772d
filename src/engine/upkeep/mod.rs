//! What a node sees to by itself while it runs. Nobody asks for it, and each has a task.
//!
//! - `compaction`: when snapshots are taken; `retention`: how much of the log is kept behind them;
//! - `disk_health`: a leader whose disk is full or hangs hands over, and takes no writes meanwhile;
//! - `event_log`: what was applied is written behind whoever applies it, for those who follow;
//! - `quota`: how large the state may become;
//! - `agreement`: a node whose state differs from the others' serves no more;
//! - `wake`: commands that the machine asked for in advance, such as the expiry of keys;
//! - `wall_clock`: the cluster's clocks as this node knows them, and wall clocks that jump.

pub(super) mod agreement;
pub(super) mod compaction;
pub(super) mod disk_health;
pub(super) mod event_log;
pub(super) mod quota;
mod retention;
pub(super) mod wake;
pub(super) mod wall_clock;
