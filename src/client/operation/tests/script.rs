//! What the client does after a failed attempt, in scripts: `tests/golden/scripts/client-retries`.
//!
//! It was given the nodes `n1:1`, `n2:1` and `n3:1`, and probes none of them: what it knows of them is what a script says.

use goldenscript::{Context, Runner};
use tokio::runtime::{Builder, Runtime};

use super::*;
use crate::client::ClientConfig;
use crate::golden::{Told, scripts};
use crate::proto::v1;
use crate::types::NodeId;

#[derive(goldenscript::Command)]
enum Step {
    /// A write begins, which has 10 seconds.
    Write {
        /// Whether it has a number in a session.
        #[arg(key)]
        session: bool,
    },
    /// A read that only the leader answers, or any node.
    Read {
        #[arg(key)]
        anywhere: bool,
    },
    /// A node has answered as the leader.
    Leads(String),
    /// A node cannot be connected to any more.
    Down(String),
    /// Whatever is done takes so long.
    Wait { ms: u64 },
    /// The attempt was not sent.
    NotSent,
    /// The stream broke after it was sent.
    Lost,
    /// It was sent, and another node leads by now.
    LeaderChanged,
    /// The attempt had no answer in its time.
    Expired,
    /// The node has answered that it was not done.
    Failed {
        reason: String,
        /// The node says that it may have been done.
        #[arg(key, optional)]
        maybe: bool,
        /// The node that leads, as it says.
        #[arg(key)]
        leader: Option<NodeId>,
    },
}

struct Caller {
    runtime: Runtime,
    /// Of the whole script; an operation borrows it.
    router: &'static Arc<Router>,
    operation: Option<Operation<'static>>,
    /// Where the present attempt went.
    link: Option<Arc<Link>>,
}

fn endpoint(node_id: NodeId) -> Endpoint {
    Endpoint::parse(&format!("n{node_id}:1")).unwrap()
}

fn reason(name: &str) -> Reason {
    let named = Reason::all().find(|reason| reason.row().name.eq_ignore_ascii_case(name));
    named.unwrap_or_else(|| panic!("there is no reason {name}"))
}

impl Caller {
    fn new() -> Self {
        let router = Router::new((1..=3).map(endpoint).collect(), ClientConfig::default());
        for node_id in 1..=3 {
            // As if a probe were under way: no other one begins.
            router.at(&endpoint(node_id)).node.asking.store(true, Ordering::Relaxed);
        }
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        Self { runtime, router: Box::leak(Box::new(Arc::new(router))), operation: None, link: None }
    }

    fn named(&self, name: &str) -> Arc<Link> {
        self.router.at(&Endpoint::parse(&format!("{name}:1")).unwrap())
    }

    fn begin(&mut self, kind: Kind, in_session: bool) -> String {
        let _context = self.runtime.enter();
        let mut operation = Operation::new(self.router, kind, None, Instant::now());
        operation.in_session = in_session;
        let told = format!("to {}", self.next(&operation));
        self.operation = Some(operation);
        told
    }

    fn next(&mut self, operation: &Operation<'_>) -> Endpoint {
        let link = operation.link();
        let endpoint = link.node.endpoint.clone();
        self.link = Some(link);
        endpoint
    }

    fn after(&mut self, failure: Failure) -> String {
        let mut operation = self.operation.take().expect("an operation is under way");
        let link = self.link.take().expect("an attempt is under way");
        let (pauses, config) = (operation.pauses, &self.router.config);
        let (outcome, waited) = self.runtime.block_on(async {
            let failed_at = Instant::now();
            let outcome = operation.after(&link, failure).await;
            (outcome, failed_at.elapsed())
        });
        let paused = match operation.pauses - pauses {
            0 => {
                assert_eq!(waited, Duration::ZERO);
                "at once".to_owned()
            }
            _ => {
                let most = config
                    .retry_backoff_min
                    .saturating_mul(1 << pauses.min(20))
                    .min(config.retry_backoff_max);
                let left = operation.deadline.saturating_duration_since(Instant::now());
                // The clock goes in steps of a millisecond.
                let fits = waited >= most / 2 && waited <= most + Duration::from_millis(1);
                assert!(fits || left.is_zero(), "{waited:?} of {most:?}");
                format!("after {} to {} ms", most.as_secs_f64() * 500.0, most.as_millis())
            }
        };
        let next = match outcome {
            Ok(Next::Again) => "again",
            Ok(Next::InNewSession) => {
                operation.in_session = true;
                "again, in a new session,"
            }
            Err(error) => {
                let is_known = if error.maybe_applied() { "may have been applied" } else { "not applied" };
                return format!("the caller is told ({is_known}): {error}");
            }
        };
        let told = format!("{next} {paused}, to {}", self.next(&operation));
        self.operation = Some(operation);
        told
    }
}

impl Runner for Caller {
    type Command = Step;

    fn run(&mut self, step: &Step, _: &Context) -> Told {
        Ok(match step {
            Step::Write { session } => self.begin(Kind::Write, *session),
            Step::Read { anywhere } => {
                self.begin(if *anywhere { Kind::Anywhere } else { Kind::AtLeader }, false)
            }
            Step::Leads(name) => {
                let link = self.named(name);
                link.node.set_up();
                if let Some(before) = self.router.leader() {
                    self.router.lost_leader(&before.node.endpoint);
                }
                self.router.answered_as_leader(&link);
                String::new()
            }
            Step::Down(name) => {
                let link = self.named(name);
                link.node.set_down("connection refused".into());
                self.router.lost_leader(&link.node.endpoint);
                String::new()
            }
            Step::Wait { ms } => {
                self.runtime.block_on(tokio::time::advance(Duration::from_millis(*ms)));
                String::new()
            }
            Step::NotSent => self.after(Failure::Attempt(AttemptError::NotSent("connection refused".into()))),
            Step::Lost => self.after(Failure::Attempt(AttemptError::Lost("connection reset".into()))),
            Step::LeaderChanged => self.after(Failure::Attempt(AttemptError::LeaderChanged)),
            Step::Expired => self.after(Failure::Attempt(AttemptError::Expired { sent: true })),
            Step::Failed { reason: name, maybe, leader } => {
                let reason = reason(name);
                let leader =
                    leader.map(|node_id| v1::LeaderHint { node_id, client: endpoint(node_id).to_string() });
                self.after(Failure::Answered(v1::Failure {
                    reason: reason.into(),
                    code: reason.row().grpc as i32,
                    message: format!("node says {name}"),
                    maybe_applied: *maybe,
                    leader,
                    missing: vec![3],
                    ..v1::Failure::default()
                }))
            }
        })
    }
}

#[test]
fn scripts_of_retries() {
    scripts("client-retries", Caller::new);
}
