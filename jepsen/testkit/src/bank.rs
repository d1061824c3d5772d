//! Transfers between accounts: a machine that is not the key-value one, and callers that use it through the client port.
//!
//! No transfer makes or loses money, so every answer shows the same sum. Each teller makes one transfer after the other, asks
//! for each until it is answered, and is told how many of its transfers were applied: exactly as many as it has made.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quorate::client::MachineClient;
use quorate::server::MachineGuest;
use quorate::{ApplyContext, Engine, NodeId, ReadLevel, StateMachine};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::kv::is_for_the_weather;
use crate::simulation::{Cluster, LIVENESS, Outcome, Shared, Subject, Trace, Workload};

const ACCOUNTS: usize = 6;
const OPENING_BALANCE: u64 = 100;
const TELLERS: u64 = 4;
/// How long an operation of a client may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// The accounts, and how many transfers of each teller were applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bank {
    balances: [u64; ACCOUNTS],
    done: BTreeMap<u64, u64>,
}

/// Moves as much of `amount` as there is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Transfer {
    teller: u64,
    from: usize,
    to: usize,
    amount: u64,
}

impl Default for Bank {
    fn default() -> Self {
        Self { balances: [OPENING_BALANCE; ACCOUNTS], done: BTreeMap::new() }
    }
}

impl StateMachine for Bank {
    type Command = Transfer;
    /// How many transfers of this teller were applied.
    type Reply = u64;
    type Query = ();
    type Answer = Bank;
    type View = Arc<Bank>;

    fn apply(&mut self, _: &ApplyContext, transfer: Transfer) -> u64 {
        let Transfer { teller, from, to, amount } = transfer;
        let amount = amount.min(self.balances[from]);
        self.balances[from] -= amount;
        self.balances[to] += amount;
        let done = self.done.entry(teller).or_default();
        *done += 1;
        *done
    }

    fn view(&self) -> Arc<Bank> {
        Arc::new(self.clone())
    }

    fn query(view: &Arc<Bank>, (): ()) -> Bank {
        (**view).clone()
    }

    fn write_snapshot(view: &Arc<Bank>, out: &mut dyn Write) -> io::Result<()> {
        for balance in view.balances {
            out.write_all(&balance.to_le_bytes())?;
        }
        for (teller, done) in &view.done {
            out.write_all(&teller.to_le_bytes())?;
            out.write_all(&done.to_le_bytes())?;
        }
        Ok(())
    }

    fn read_snapshot(_: u32, input: &mut dyn Read) -> io::Result<Self> {
        let mut bytes = Vec::new();
        input.read_to_end(&mut bytes)?;
        let numbers: Vec<u64> =
            bytes.chunks_exact(8).map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap())).collect();
        let (balances, done) = numbers.split_at(ACCOUNTS);
        let done = done.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        Ok(Self { balances: balances.try_into().unwrap(), done })
    }
}

/// Tellers and auditors of a [`Bank`]. To be run with [`ports`](crate::simulation::Scenario::ports).
#[derive(Debug, Clone, Copy, Default)]
pub struct Banking;

impl Subject for Banking {
    type Guest = MachineGuest<Bank>;
    type Workload = Staff;

    fn machine(&self) -> Bank {
        Bank::default()
    }

    fn start(&self, cluster: &Cluster<Bank>) -> Staff {
        let (ledger, stop) = (Arc::new(Mutex::new(Ledger::default())), Arc::new(AtomicBool::new(false)));
        let mut config = cluster.client_config();
        config.timeout = PATIENCE;
        let member = |id: u64| Member {
            id,
            rng: SmallRng::seed_from_u64(cluster.seed.wrapping_mul(1000).wrapping_add(700 + id)),
            client: MachineClient::new(cluster.endpoints(), config.clone()).unwrap(),
            trace: cluster.trace.clone(),
            ledger: ledger.clone(),
            stop: stop.clone(),
        };
        let mut tasks: Vec<_> = (0..TELLERS).map(|id| tokio::spawn(member(id).transfer())).collect();
        tasks.push(tokio::spawn(member(TELLERS).audit()));
        Staff { ledger, stop, tasks }
    }
}

/// What tellers were told.
#[derive(Debug, Default)]
struct Ledger {
    done: BTreeMap<u64, u64>,
    repeated: u64,
    audits: u64,
    violations: Vec<String>,
}

/// What [`Banking`] has running.
pub struct Staff {
    ledger: Shared<Ledger>,
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Staff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Staff").finish_non_exhaustive()
    }
}

impl Workload<Bank> for Staff {
    fn acknowledged(&self) -> u64 {
        self.ledger.lock().unwrap().done.values().sum()
    }

    async fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks.drain(..) {
            timeout(LIVENESS, task).await.expect("calls end in a healed cluster").unwrap();
        }
    }

    async fn scan(&self, node_id: NodeId, engine: &Engine<Bank>) {
        let bank = engine.read((), ReadLevel::Local).await.unwrap().answer;
        let ledger = self.ledger.lock().unwrap();
        assert_eq!(
            bank.done, ledger.done,
            "node {node_id} has applied other transfers than were acknowledged"
        );
        assert_eq!(bank.balances.iter().sum::<u64>(), OPENING_BALANCE * ACCOUNTS as u64, "node {node_id}");
        assert!(ledger.violations.is_empty(), "{}", ledger.violations.join("\n"));
    }

    fn count(&self, outcome: &mut Outcome) {
        let ledger = self.ledger.lock().unwrap();
        outcome.count("transfers", ledger.done.values().sum());
        outcome.count("transfers that had to be repeated", ledger.repeated);
        outcome.count("audits", ledger.audits);
    }
}

struct Member {
    id: u64,
    rng: SmallRng,
    client: MachineClient<Bank>,
    trace: Arc<Trace>,
    ledger: Shared<Ledger>,
    stop: Arc<AtomicBool>,
}

impl Member {
    async fn pause(&mut self) {
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(1..60))).await;
    }

    async fn transfer(mut self) {
        let mut made = 0;
        while !self.stop.load(Ordering::Relaxed) {
            self.pause().await;
            let Ok(mut once) = self.client.once().await else { continue };
            let transfer = Transfer {
                teller: self.id,
                from: self.rng.random_range(0..ACCOUNTS),
                to: self.rng.random_range(0..ACCOUNTS),
                amount: self.rng.random_range(1..50),
            };
            let mut attempts = 0;
            let told = loop {
                attempts += 1;
                match once.write(&transfer).await {
                    Ok(written) => break written.reply,
                    Err(error) if error.is_final() => {
                        self.ledger.lock().unwrap().violations.push(format!("a transfer ends with {error}"));
                        return;
                    }
                    Err(_) => self.pause().await,
                }
            };
            made += 1;
            self.trace.record(format_args!("teller {} was told {told}", self.id));
            let mut ledger = self.ledger.lock().unwrap();
            ledger.repeated += u64::from(attempts > 1);
            ledger.done.insert(self.id, made);
            if told != made {
                let id = self.id;
                ledger.violations.push(format!("teller {id} has made {made} transfers, and was told {told}"));
            }
        }
    }

    async fn audit(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            self.pause().await;
            let before = self.ledger.lock().unwrap().done.clone();
            let answered = self.client.read((), ReadLevel::Linearizable).await;
            let bank = match answered {
                Ok(answered) => answered.answer,
                Err(error) if is_for_the_weather(&error) => continue,
                Err(error) => {
                    self.ledger.lock().unwrap().violations.push(format!("an audit fails with {error}"));
                    return;
                }
            };
            let mut ledger = self.ledger.lock().unwrap();
            ledger.audits += 1;
            let sum: u64 = bank.balances.iter().sum();
            if sum != OPENING_BALANCE * ACCOUNTS as u64 {
                ledger.violations.push(format!("an audit finds {sum}"));
            }
            for (teller, done) in before {
                let found = bank.done.get(&teller).copied().unwrap_or(0);
                if found < done {
                    ledger.violations.push(format!(
                        "an audit finds {found} transfers of teller {teller}, who has made {done}"
                    ));
                }
            }
        }
    }
}
