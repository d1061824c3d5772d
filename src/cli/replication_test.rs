//! `quorate replication-test`: writes, and sees at every node and replica that each write comes once, in order, and how late.
//!
//! Each caller writes keys of its own, one after the other. A member is followed by a subscription, which brings every entry. A replica is
//! asked by local reads, which bring the state: there the keys of each caller must appear from the first to the last without a gap, each as
//! it was written. A write is late by the time from its acknowledgement until it was seen.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use futures::StreamExt;
use futures::future::{join_all, try_join_all};
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until, timeout};

use super::endpoints::{self, NodeKind};
use super::{CliError, Common, Format, output};
use crate::duration;
use crate::kv::client::{
    Client, ClientError, Endpoint, EntryFilter, FollowedChange, FollowedOperation, Item, Range,
    ReadPreference, ReplicaReads, Request, Response, Scope, SubscribeOptions, Subscription,
};
use crate::report::millis;
use crate::runtime;
use crate::types::ReadLevel;

/// Whose keys are written, in a collection of its own for each test.
const TENANT: &str = "replication-test";
/// How often a replica is asked: what it has is seen as much too late at most.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// How long it is waited for what should not come, after everything has.
const SETTLE: Duration = Duration::from_millis(200);
/// Keys that are looked at at a time.
const LOOK_KEYS: u32 = 500;

/// Arguments of `quorate replication-test`.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  quorate replication-test\n  quorate replication-test --writes 10000 --rate 0\n  quorate replication-test --writes 50000 --rate 5000 --callers 16\n  quorate replication-test --endpoints 10.0.0.1:7801 -o json | jq '.nodes[] | {endpoint, p99_ms}'\n\nWrites values, each caller one after the other, and sees, at every member and replica of which the given nodes tell, that each comes once and in its caller's order. Members are followed by subscriptions, replicas are asked by local reads, every 2 ms. A write is late by the time from its acknowledgement until it was seen. Writes in the tenant `replication-test`, in a collection of its own, and removes it in the end. Exits with 0 when every node got every write, with 1 when one did not within --patience, and with 2 when no node answers."
)]
pub struct ReplicationTestArgs {
    /// How many values are written
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=1_000_000), allow_negative_numbers = true)]
    pub writes: u32,
    /// How many of them in a second; 0 for one after the other without a pause
    #[arg(long, value_name = "N", default_value_t = 100, allow_negative_numbers = true)]
    pub rate: u32,
    /// How many write at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024), allow_negative_numbers = true)]
    pub callers: u32,
    /// Size of the values
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(0..=1_048_576), allow_negative_numbers = true)]
    pub value_bytes: u32,
    /// How long a node may take for what is missing after the last write
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration::parse, allow_hyphen_values = true)]
    pub patience: Duration,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct ReplicationTestReport {
    passed: bool,
    writes: u32,
    callers: u32,
    writes_per_second: f64,
    nodes: Vec<SeenRow>,
}

/// What was seen at one node.
#[derive(Debug, Serialize)]
struct SeenRow {
    endpoint: String,
    /// Null where it does not answer.
    kind: Option<NodeKind>,
    /// Null where nothing was looked at, and so the next.
    seen: Option<u32>,
    p50_ms: Option<f64>,
    p90_ms: Option<f64>,
    p99_ms: Option<f64>,
    max_ms: Option<f64>,
    /// What is wrong.
    error: Option<String>,
}

/// What is written, and when it was acknowledged.
#[derive(Debug)]
struct TestWrites {
    scope: Scope,
    writes: u32,
    callers: u32,
    value: Bytes,
    /// Of each caller.
    acknowledged: Mutex<Vec<Vec<Instant>>>,
    /// Until when nodes are waited for, once everything is written.
    deadline: watch::Sender<Option<Instant>>,
}

/// The key with this number of a caller.
fn key(caller: u32, number: u32) -> Bytes {
    format!("w-{caller:04}-{number:08}").into()
}

/// Whose key it is.
fn caller_of(key: &Bytes) -> Option<u32> {
    std::str::from_utf8(key.get(2..6)?).ok()?.parse().ok()
}

impl TestWrites {
    fn note(&self, caller: u32) {
        let mut acknowledged = self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
        acknowledged[caller as usize].push(Instant::now());
    }

    /// How many of the writes are a caller's.
    fn share(&self, caller: u32) -> u32 {
        self.writes / self.callers + u32::from(caller < self.writes % self.callers)
    }

    /// Waits until everything was written and nodes have had their time.
    async fn over(&self) {
        let mut told = self.deadline.subscribe();
        let Ok(deadline) = told.wait_for(Option::is_some).await.map(|deadline| *deadline) else { return };
        sleep_until(deadline.unwrap_or_else(Instant::now)).await;
    }

    async fn write(&self, client: &Client, rate: u32) -> Result<(), ClientError> {
        let callers = (0..self.callers).map(|caller| self.write_as(caller, client, rate));
        try_join_all(callers).await.map(drop)
    }

    async fn write_as(&self, caller: u32, client: &Client, rate: u32) -> Result<(), ClientError> {
        let pause =
            (Duration::from_secs(1) * self.callers).checked_div(rate).filter(|pause| !pause.is_zero());
        let mut due = pause.map(|pause| {
            // Not all of them at the same moment.
            let first = Instant::now() + pause * caller / self.callers;
            let mut due = interval_at(first, pause);
            // What was late is caught up: the rate is what was asked for, unless the cluster cannot do it.
            due.set_missed_tick_behavior(MissedTickBehavior::Burst);
            due
        });
        for number in 0..self.share(caller) {
            if let Some(due) = &mut due {
                due.tick().await;
            }
            client.put(&self.scope, key(caller, number), self.value.clone()).await?;
            self.note(caller);
        }
        Ok(())
    }
}

/// When the writes of each caller were seen at one node, in their order; the next is that of the number after them.
#[derive(Debug)]
struct SeenWrites {
    at: Vec<Vec<Instant>>,
    error: Option<String>,
}

impl SeenWrites {
    fn of(callers: u32) -> Self {
        Self { at: vec![Vec::new(); callers as usize], error: None }
    }

    /// The number of a caller's write that should come next.
    fn due(&self, caller: u32) -> u32 {
        u32::try_from(self.at[caller as usize].len()).unwrap_or(u32::MAX)
    }

    /// The write with the next number of its caller must be `seen`, as it was written.
    ///
    /// # Errors
    /// What is wrong instead, in words.
    fn next(
        &mut self,
        written: &TestWrites,
        seen: &Bytes,
        value: &Bytes,
        version: u64,
    ) -> Result<(), String> {
        let shown = |key: &Bytes| output::printable(key);
        let caller = caller_of(seen).filter(|caller| *caller < written.callers);
        let caller = caller.ok_or_else(|| format!("{} was not written", shown(seen)))?;
        let number = self.due(caller);
        if *seen != key(caller, number) {
            let already = (0..number).any(|before| key(caller, before) == *seen);
            let how = if already { "again, or changed" } else { "too early" };
            let due = key(caller, number);
            return Err(format!("{} came {how}: {} should come next", shown(seen), shown(&due)));
        }
        if *value != written.value || version != 1 {
            return Err(format!("{} is not as it was written once", shown(seen)));
        }
        self.at[caller as usize].push(Instant::now());
        Ok(())
    }

    fn count(&self) -> usize {
        self.at.iter().map(Vec::len).sum()
    }

    fn is_complete(&self, written: &TestWrites) -> bool {
        self.count() >= written.writes as usize
    }
}

/// Sees what a member applies, by a subscription that was opened before the first write.
async fn follow(
    written: &TestWrites,
    subscription: &mut Subscription,
    endpoint: &Endpoint,
    seen: &mut SeenWrites,
) {
    let outcome = async {
        loop {
            let next = match seen.is_complete(written) {
                false => subscription.next().await,
                // What comes twice would come by then.
                true => match timeout(SETTLE, subscription.next()).await {
                    Ok(next) => next,
                    Err(_) => return Ok(()),
                },
            };
            let entry = next.ok_or("the subscription has ended")?.map_err(|error| error.to_string())?;
            let FollowedChange::Event { operation, key, value, version, .. } = &entry.change else {
                return Err("what it tells is no event".to_owned());
            };
            match operation {
                FollowedOperation::Insert | FollowedOperation::Update => {
                    seen.next(written, key, value, *version)?;
                }
                other => return Err(format!("{} was told: {}", output::printable(key), other.name())),
            }
            let source = subscription.progress().borrow().source.clone();
            if source != endpoint.as_str() {
                return Err(format!("it was lost, and {source} went on"));
            }
        }
    };
    let ended: Result<(), String> = tokio::select! {
        outcome = outcome => outcome,
        () = written.over() => Ok(()),
    };
    seen.error = ended.err();
}

/// Sees what a replica has.
async fn look(written: &TestWrites, client: &Client, endpoint: &Endpoint, seen: &mut SeenWrites) {
    let outcome = async {
        loop {
            let callers = (0..written.callers).filter(|caller| seen.due(*caller) < written.share(*caller));
            let asked = callers.map(|caller| look_at(written, client, endpoint, caller, seen.due(caller)));
            let items = try_join_all(asked).await?.concat();
            let is_all = items.is_empty();
            for Item { key, value, version, .. } in items {
                seen.next(written, &key, &value, version)?;
            }
            if seen.is_complete(written) {
                return Ok(());
            }
            if is_all {
                sleep(LOOK_EVERY).await;
            }
        }
    };
    let ended: Result<(), String> = tokio::select! {
        outcome = outcome => outcome,
        () = written.over() => Ok(()),
    };
    seen.error = ended.err();
}

/// What a replica has of a caller from number `next` on, or the beginning of it.
async fn look_at(
    written: &TestWrites,
    client: &Client,
    endpoint: &Endpoint,
    caller: u32,
    next: u32,
) -> Result<Vec<Item>, String> {
    let range = Range::prefix(format!("w-{caller:04}-"));
    let range = Range { start: key(caller, next), ..range }.with_limit(LOOK_KEYS);
    let request = Request::Range { scope: written.scope.clone(), range };
    match client.execute_at(endpoint, request, ReadLevel::Local).await {
        Ok(Response::Range(reply)) => Ok(reply.items),
        Ok(_) => unreachable!("invariant: a response answers its request"),
        Err(error) => Err(error.to_string()),
    }
}

/// A node whose writes are looked at.
struct TestedNode {
    endpoint: Endpoint,
    kind: NodeKind,
    /// Of a member.
    subscription: Option<Subscription>,
    seen: SeenWrites,
}

impl TestedNode {
    async fn begin(client: &Client, written: &TestWrites, endpoint: Endpoint, kind: NodeKind) -> Self {
        let (scope, seen) = (&written.scope, SeenWrites::of(written.callers));
        let mut watched = Self { endpoint, kind, subscription: None, seen };
        if kind == NodeKind::Member {
            let mut options = SubscribeOptions::from_now();
            options.filters = vec![EntryFilter::collection(&scope.tenant, &scope.collection)];
            options.id = "replication-test".to_owned();
            options.heartbeat = Duration::from_secs(1);
            options.preference = Some(ReadPreference::weighted([(watched.endpoint.clone(), 1)]));
            match client.subscribe(options).await {
                Ok(subscription) => watched.subscription = Some(subscription),
                Err(error) => watched.seen.error = Some(error.to_string()),
            }
        }
        watched
    }

    async fn watch(&mut self, written: &TestWrites, client: &Client) {
        match (self.kind, &mut self.subscription) {
            (NodeKind::Member, Some(subscription)) => {
                follow(written, subscription, &self.endpoint, &mut self.seen).await;
            }
            (NodeKind::Replica, _) => look(written, client, &self.endpoint, &mut self.seen).await,
            (NodeKind::Member, None) | (NodeKind::PartialReplica, _) => {}
        }
    }

    fn row(&self, written: &TestWrites) -> SeenRow {
        let acknowledged = written.acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
        let late = self.seen.at.iter().zip(&*acknowledged).flat_map(|(seen, by)| seen.iter().zip(by));
        let late: Vec<_> = late.map(|(seen, acknowledged)| seen.duration_since(*acknowledged)).collect();
        let quantiles = quantiles(late);
        let looked_at = self.kind != NodeKind::PartialReplica;
        let seen = self.seen.count();
        let missing = written.writes as usize - seen.min(written.writes as usize);
        let lacks = (missing > 0).then(|| format!("{missing} of {} writes did not come", written.writes));
        let [p50_ms, p90_ms, p99_ms, max_ms] = quantiles.map(|late| late.map(millis));
        SeenRow {
            endpoint: self.endpoint.to_string(),
            kind: Some(self.kind),
            seen: looked_at.then(|| u32::try_from(seen).unwrap_or(u32::MAX)),
            p50_ms,
            p90_ms,
            p99_ms,
            max_ms,
            error: self.seen.error.clone().or(lacks).filter(|_| looked_at),
        }
    }
}

/// Half of `times`, nine tenths, 99 of a hundred, and all are no longer than these.
fn quantiles(mut times: Vec<Duration>) -> [Option<Duration>; 4] {
    times.sort_unstable();
    [50, 90, 99, 100].map(|percent| {
        let rank = (times.len() * percent).div_ceil(100);
        rank.checked_sub(1).map(|at| times[at])
    })
}

/// Writes, looks, and prints what was seen.
///
/// # Errors
/// After the report: [`CliError::TestFailed`]. Before it: no node answers, or a write has failed.
pub async fn run(common: &Common, args: ReplicationTestArgs) -> Result<(), CliError> {
    let client = common.client_with(|config| config.replica_reads = ReplicaReads::Never)?;
    let asked = endpoints::ask_all(&client).await;
    if asked.iter().all(|(_, answer)| answer.is_err()) {
        return Err(CliError::NoNodeAnswers);
    }
    let silent: Vec<_> = asked
        .iter()
        .filter_map(|(endpoint, answer)| answer.as_ref().err().map(|error| (endpoint.clone(), error.clone())))
        .collect();
    let scope = Scope { tenant: TENANT.to_owned(), collection: format!("{:016x}", runtime::random_u64()) };
    let written = TestWrites {
        scope: scope.clone(),
        writes: args.writes,
        callers: args.callers,
        value: vec![b'v'; args.value_bytes as usize].into(),
        acknowledged: Mutex::new(vec![Vec::new(); args.callers as usize]),
        deadline: watch::Sender::new(None),
    };
    let nodes = endpoints::each_once(asked).into_iter();
    let mut watched = join_all(
        nodes.map(|(endpoint, report)| TestedNode::begin(&client, &written, endpoint, NodeKind::of(&report))),
    )
    .await;
    let begun = Instant::now();
    let writing = async {
        let outcome = written.write(&client, args.rate).await;
        let patience = if outcome.is_ok() { args.patience } else { Duration::ZERO };
        written.deadline.send_replace(Some(Instant::now() + patience));
        (outcome, begun.elapsed())
    };
    let looking = join_all(watched.iter_mut().map(|watched| watched.watch(&written, &client)));
    let ((outcome, took), _) = tokio::join!(writing, looking);
    let cleaned = client.delete_prefix(&scope, "w-").await;
    client.close().await;
    outcome?;
    let mut rows: Vec<_> = watched.iter().map(|watched| watched.row(&written)).collect();
    rows.extend(silent.into_iter().map(|(endpoint, error)| SeenRow {
        endpoint: endpoint.to_string(),
        kind: None,
        seen: None,
        p50_ms: None,
        p90_ms: None,
        p99_ms: None,
        max_ms: None,
        error: Some(error.to_string()),
    }));
    let report = ReplicationTestReport {
        passed: rows.iter().all(|row| row.error.is_none()),
        writes: args.writes,
        callers: args.callers,
        writes_per_second: (f64::from(args.writes) / took.as_secs_f64() * 10.0).round() / 10.0,
        nodes: rows,
    };
    tell(common.output, &report)?;
    if let Err(error) = cleaned {
        output::remark(&format!("what was written is not removed: {error}"));
    }
    match report.passed {
        true => Ok(()),
        false => {
            let failed = report.nodes.iter().filter(|row| row.error.is_some()).count();
            let of = report.nodes.len();
            Err(CliError::TestFailed(format!("{failed} of {of} nodes did not get every write as it should")))
        }
    }
}

fn tell(format: Format, report: &ReplicationTestReport) -> Result<(), CliError> {
    match format {
        Format::Json => output::json(report),
        Format::Table => {
            output::raw(table(report).as_bytes())?;
            for row in &report.nodes {
                if let Some(error) = &row.error {
                    output::remark(&format!("{}: {error}", row.endpoint));
                }
            }
            Ok(())
        }
    }
}

fn table(report: &ReplicationTestReport) -> String {
    let row = |row: &SeenRow| {
        let ms = |ms: Option<f64>| ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1} ms"));
        let result = match (&row.error, row.seen) {
            (Some(_), _) => "FAILED",
            (None, None) => "not looked at",
            (None, Some(_)) => "ok",
        };
        vec![
            row.endpoint.clone(),
            row.kind.map_or("-", NodeKind::name).to_owned(),
            row.seen.map_or_else(|| "-".to_owned(), |seen| seen.to_string()),
            ms(row.p50_ms),
            ms(row.p90_ms),
            ms(row.p99_ms),
            ms(row.max_ms),
            result.to_owned(),
        ]
    };
    let rows: Vec<_> = report.nodes.iter().map(row).collect();
    let headings = ["ENDPOINT", "KIND", "SEEN", "LATE P50", "P90", "P99", "MAX", "RESULT"];
    let verdict = if report.passed { "passed" } else { "FAILED" };
    let ReplicationTestReport { writes, callers, writes_per_second: rate, .. } = report;
    let seen = output::table(&headings, &rows);
    format!("{seen}{verdict}: {writes} writes, {rate:.0} per second, by {callers}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::golden;

    fn written(writes: u32) -> TestWrites {
        TestWrites {
            scope: Scope::default(),
            writes,
            callers: 2,
            value: "v".into(),
            acknowledged: Mutex::new(vec![Vec::new(); 2]),
            deadline: watch::Sender::new(None),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_write_must_come_once_in_order_and_as_it_was() {
        let written = written(3);
        let value = || Bytes::from("v");
        for (keys, version, words) in [
            (&[(0, 0), (1, 0), (0, 1)][..], 1, None),
            (&[(1, 0), (0, 0), (0, 1)], 1, None),
            (&[(0, 0), (0, 0)], 1, Some("again")),
            (&[(0, 0), (1, 1)], 1, Some("too early")),
            (&[(0, 0)], 2, Some("not as it was")),
            (&[(2, 0)], 1, Some("was not written")),
        ] {
            let mut seen = SeenWrites::of(2);
            let outcome = keys.iter().try_for_each(|(caller, number)| {
                seen.next(&written, &key(*caller, *number), &value(), version)
            });
            match words {
                None => assert!(outcome.is_ok() && seen.is_complete(&written)),
                Some(words) => assert!(outcome.unwrap_err().contains(words), "{keys:?}"),
            }
        }
        let mut seen = SeenWrites::of(2);
        assert!(seen.next(&written, &key(0, 0), &Bytes::from("w"), 1).is_err());
        assert!(seen.next(&written, &Bytes::from("k"), &value(), 1).is_err());
        assert_eq!([written.share(0), written.share(1)], [2, 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_seen_is_shown() {
        let written = written(4);
        let watched = |endpoint: &str, kind, late_ms: &[u64], error: Option<&str>| {
            let endpoint = Endpoint::parse(endpoint).unwrap();
            let at = late_ms.iter().map(|ms| Instant::now() + Duration::from_millis(*ms)).collect();
            let seen = SeenWrites { at: vec![at, Vec::new()], error: error.map(str::to_owned) };
            TestedNode { endpoint, kind, subscription: None, seen }
        };
        (0..4).for_each(|_| written.note(0));
        let nodes = [
            watched("n1:1", NodeKind::Member, &[0, 1, 2, 10], None),
            watched("n2:1", NodeKind::Member, &[1, 2], None),
            watched("r1:1", NodeKind::Replica, &[3], Some("w-0000-00000000 came again, or changed")),
            watched("r2:1", NodeKind::PartialReplica, &[], None),
        ];
        let nodes: Vec<_> = nodes.iter().map(|watched| watched.row(&written)).collect();
        let report =
            ReplicationTestReport { passed: false, writes: 4, callers: 2, writes_per_second: 99.5, nodes };
        let json = serde_json::to_string_pretty(&report).unwrap();
        golden("cli-replication-test.txt", &format!("{}{json}\n", table(&report)));
    }
}
