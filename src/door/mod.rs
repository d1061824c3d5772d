//! What every service of the client port has in common, whichever [guest](Guest) it is for.
//!
//! A door decodes a request, asks the engine, and encodes what came of it. Here is all of that but the guest's own part:
//!
//! - [`services`]: those that all guests have;
//! - [`pipeline`]: many requests on one stream, answered in whatever order they are done; [`unary`]: one by one;
//!   [`streams`]: answers that come in pieces;
//! - [`answerer`]: what an answer is headed by, and whom a failure names;
//! - [`failure`]: every error as what callers are told; [`told`] completes what the transport says;
//! - [`rights`]: who calls, and what each may do; [`permitted`]: whether that covers a request, and streams that end with it;
//! - [`deadline`]: calls that outlive theirs;
//! - [`limits`] and [`bodies`]: what callers may make a node hold, and the bytes on their way;
//! - `machine_guest`: any machine, served as it is; `composition`: several guests behind one door;
//! - [`methods`] and [`metrics`]: what can be called, and how often it was.
//!
//! # Promises
//!
//! - Everything is bounded, for each caller and for all together: requests in flight, bytes of requests that do not end and
//!   of answers that nobody reads.
//! - No message exceeds [`MAX_ANSWER_BYTES`], what gRPC clients accept unless they are told otherwise.
//! - A request that makes no sense fails alone; the pipeline it came on goes on.
//!
//! A node that does not lead answers with who does, unless it has a [`relay`] that takes changes there.

pub(crate) mod answerer;
pub(crate) mod bodies;
mod composition;
pub(crate) mod deadline;
pub(crate) mod failure;
mod guest;
pub(crate) mod limits;
mod machine_guest;
pub(crate) mod methods;
pub(crate) mod metrics;
pub(crate) mod permitted;
pub(crate) mod pipeline;
pub(crate) mod relay;
pub(crate) mod rights;
pub(crate) mod served;
pub(crate) mod services;
pub(crate) mod streams;
pub(crate) mod told;
pub(crate) mod unary;

use std::sync::Arc;

use tokio::sync::watch;

pub use guest::{Call, CallOf, Guest};
pub use machine_guest::MachineGuest;
pub use methods::Method;
pub use rights::grants::{DataRight, Touch, Touched};
pub use rights::{ClientAuth, Credentials, CredentialsError, token_hash};

use limits::DoorLimits;
use metrics::DoorMetrics;

pub(crate) use answerer::Answerer;
pub(crate) use served::ServedNode;

/// Largest message that the port sends: what gRPC clients accept unless they are told otherwise.
pub const MAX_ANSWER_BYTES: usize = 4 * 1024 * 1024;

/// Largest message that it accepts.
pub const MAX_MESSAGE_BYTES: usize = 8 * 1024 * 1024;

/// What every service of a node works with. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Door<N> {
    pub(crate) node: N,
    pub(crate) by: Answerer,
    pub(crate) metrics: Arc<DoorMetrics>,
    pub(crate) limits: Arc<DoorLimits>,
    /// True once pipelines and streams are to end.
    pub(crate) draining: watch::Receiver<bool>,
    /// Whether another node passes on what comes here.
    pub(crate) is_relayed: bool,
}
