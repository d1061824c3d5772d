//! The connections of one port: how many there may be, which of them gives way, and what each of them holds.
//!
//! A connection is *busy* while a request on it is under way, on the peer port from its handshake on. One that is not
//! busy costs its caller nothing to lose. So when all places are taken, the one that has been idle for the longest gives
//! way to the newcomer; nothing that is done is cut off. When all are busy, newcomers get one of a few places that are
//! kept back: there only probes and operators are served (the door sees to that), and of these the one whose request
//! takes longest gives way.
//!
//! What callers make a node hold (answers that they do not read, requests that they do not finish, watches) is counted
//! by connection and for all together. The bound for one connection shrinks as the rest of what there is for all
//! shrinks: however many callers take what they can get, something is left for the next one.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Waker;
use std::thread::panicking;
use std::time::Duration;

use futures::task::AtomicWaker;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::trust::wire::{Proof, Proven, ProvenCertificate};

/// A place that is kept back is given to a newcomer although a request is under way on it, when that takes longer.
const RESERVED_PATIENCE: Duration = Duration::from_secs(1);

/// What a connection makes its node hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Held {
    /// Bytes of answers that are encoded, and that the caller has not taken.
    Unsent,
    /// Bytes of requests that have not arrived as a whole.
    Unfinished,
    /// Watches.
    Watches,
    /// Ranges that are sent from a state which the node keeps for them.
    LongRanges,
}

impl Held {
    const COUNT: usize = 4;
}

/// How much of something may be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// Most for one connection (or pipeline, where it says so).
    pub each: usize,
    /// Most for all together.
    pub all: usize,
}

impl Bound {
    /// Most for one while all together hold `held`: no more than what is left. So many who take what they can get leave as
    /// much for the next one as each of them has.
    pub(crate) fn share(self, held: usize) -> usize {
        self.each.min(self.all.saturating_sub(held))
    }
}

/// Counts of a port, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PlaceCounts {
    pub(crate) open: usize,
    /// Of these, in places that are kept back.
    pub(crate) reserved: usize,
    pub(crate) limit: usize,
    pub(crate) accepted: u64,
    /// Closed for a newcomer, or because they held too much.
    pub(crate) evicted: u64,
}

/// The places of one port.
#[derive(Debug)]
pub(crate) struct Places {
    ordinary: usize,
    reserved: usize,
    table: Mutex<Table>,
    /// Notified when a connection goes, or has nothing to do any more.
    changed: Notify,
    held: [AtomicUsize; Held::COUNT],
    /// Notified when less is unsent.
    sent: Notify,
    accepted: AtomicU64,
    evicted: AtomicU64,
    started: Instant,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    callers: HashMap<u64, Arc<Caller>>,
    /// Of these, in places that are kept back.
    reserved: usize,
}

impl Places {
    /// Room for `ordinary` connections, and for `reserved` more when all of them are busy.
    pub(crate) fn new(ordinary: usize, reserved: usize) -> Arc<Self> {
        Arc::new(Self {
            ordinary,
            reserved,
            table: Mutex::default(),
            changed: Notify::new(),
            held: Default::default(),
            sent: Notify::new(),
            accepted: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
            started: Instant::now(),
        })
    }

    /// A place for a connection from `address`, as soon as there is one.
    pub(crate) async fn admit(self: &Arc<Self>, address: Option<SocketAddr>) -> Arc<Caller> {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(caller) = self.try_admit(address) {
                return caller;
            }
            // A request on a place that is kept back grows old without anybody saying so.
            let _ = tokio::time::timeout(RESERVED_PATIENCE, changed).await;
        }
    }

    fn try_admit(self: &Arc<Self>, address: Option<SocketAddr>) -> Option<Arc<Caller>> {
        let mut table = self.table();
        let reserve = match self.ordinary_place(&mut table) {
            true => false,
            false if table.reserved < self.reserved => true,
            false => match self.longest_in_reserve(&table) {
                Some(caller) => {
                    self.close(&mut table, &caller);
                    true
                }
                None => return None,
            },
        };
        let id = table.next;
        table.next += 1;
        table.reserved += usize::from(reserve);
        let caller = Arc::new(Caller {
            id,
            address,
            proof: OnceLock::new(),
            places: self.clone(),
            reserve: AtomicBool::new(reserve),
            begun: AtomicBool::new(false),
            under_way: AtomicUsize::new(0),
            since_ms: AtomicU64::new(self.now_ms()),
            progress_ms: AtomicU64::new(self.now_ms()),
            held: Default::default(),
            sent: Notify::new(),
            closed: AtomicBool::new(false),
            reader: AtomicWaker::new(),
            writer: AtomicWaker::new(),
        });
        table.callers.insert(id, caller.clone());
        self.accepted.fetch_add(1, Ordering::Relaxed);
        Some(caller)
    }

    /// Whether there is an ordinary place, be it one that an idle connection has to give up.
    fn ordinary_place(&self, table: &mut Table) -> bool {
        if table.callers.len() - table.reserved < self.ordinary {
            return true;
        }
        let ordinary = table.callers.values().filter(|caller| !caller.is_reserved());
        match longest_idle(ordinary) {
            Some(idle) => {
                self.close(table, &idle);
                true
            }
            None => false,
        }
    }

    fn longest_in_reserve(&self, table: &Table) -> Option<Arc<Caller>> {
        let reserved = || table.callers.values().filter(|caller| caller.is_reserved());
        longest_idle(reserved()).or_else(|| {
            let patience = u64::try_from(RESERVED_PATIENCE.as_millis()).unwrap_or(u64::MAX);
            let oldest =
                reserved().min_by_key(|caller| (caller.since_ms.load(Ordering::Relaxed), caller.id))?;
            let age = self.now_ms().saturating_sub(oldest.since_ms.load(Ordering::Relaxed));
            (age >= patience).then(|| oldest.clone())
        })
    }

    /// Closes the connection that has been idle for the longest. False if there is none.
    pub(super) fn close_longest_idle(&self) -> bool {
        let mut table = self.table();
        let idle = longest_idle(table.callers.values());
        idle.map(|idle| self.close(&mut table, &idle)).is_some()
    }

    /// Closes the connection that holds the most of what its caller does not take, of those from which nothing was taken
    /// for as long as `patience`.
    pub(crate) fn close_largest_stalled(&self, patience: Duration) {
        let patience = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        let before = self.now_ms().saturating_sub(patience);
        let mut table = self.table();
        let stalled = table.callers.values().filter(|caller| {
            caller.holds(Held::Unsent) > 0 && caller.progress_ms.load(Ordering::Relaxed) <= before
        });
        if let Some(caller) = stalled.max_by_key(|caller| (caller.holds(Held::Unsent), caller.id)).cloned() {
            self.close(&mut table, &caller);
        }
    }

    /// Its place is free from now on, although its socket takes a moment longer.
    fn close(&self, table: &mut Table, caller: &Caller) {
        tracing::debug!(address = caller.address.map(tracing::field::display), "a connection gives way");
        self.evicted.fetch_add(1, Ordering::Relaxed);
        Self::remove(table, caller);
        caller.close();
    }

    fn remove(table: &mut Table, caller: &Caller) {
        if table.callers.remove(&caller.id).is_some() {
            table.reserved -= usize::from(caller.is_reserved());
        }
    }

    /// What all connections hold.
    pub(crate) fn held(&self, what: Held) -> usize {
        self.held[what as usize].load(Ordering::Relaxed)
    }

    pub(crate) fn counts(&self) -> PlaceCounts {
        let table = self.table();
        PlaceCounts {
            open: table.callers.len(),
            reserved: table.reserved,
            limit: self.ordinary,
            accepted: self.accepted.load(Ordering::Relaxed),
            evicted: self.evicted.load(Ordering::Relaxed),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The one that has been idle for the longest, of those from the address that has the most idle ones: whoever floods a port makes room for itself.
fn longest_idle<'a>(callers: impl Iterator<Item = &'a Arc<Caller>>) -> Option<Arc<Caller>> {
    let idle: Vec<_> = callers.filter(|caller| caller.under_way.load(Ordering::Relaxed) == 0).collect();
    let mut by_address: HashMap<Option<IpAddr>, usize> = HashMap::new();
    let from = |caller: &Caller| caller.address.map(|address| address.ip());
    idle.iter().for_each(|caller| *by_address.entry(from(caller)).or_default() += 1);
    let age = |caller: &&&Arc<Caller>| (caller.since_ms.load(Ordering::Relaxed), caller.id);
    let most = by_address.values().max().copied().unwrap_or_default();
    let candidates = idle.iter().filter(|caller| by_address.get(&from(caller)) == Some(&most));
    candidates.min_by_key(age).map(|caller| Arc::clone(caller))
}

/// The other end of a connection. What it holds is given back by those who took it.
#[derive(Debug)]
pub(crate) struct Caller {
    id: u64,
    address: Option<SocketAddr>,
    proof: OnceLock<Arc<Proof>>,
    places: Arc<Places>,
    reserve: AtomicBool,
    /// Whether a request has ever been read from it.
    begun: AtomicBool,
    /// Requests.
    under_way: AtomicUsize,
    /// When the last request began or ended, or the connection was accepted; in milliseconds of the port.
    since_ms: AtomicU64,
    /// When it last took something.
    progress_ms: AtomicU64,
    held: [AtomicUsize; Held::COUNT],
    /// Notified when it has taken something.
    sent: Notify,
    closed: AtomicBool,
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl Caller {
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// It proves who it is, and that is found in `proof` then.
    pub(super) fn is_to_prove(&self, proof: Arc<Proof>) {
        // A connection is secured once.
        let _ = self.proof.set(proof);
    }

    /// What it has proven; nothing on a port at which nothing is to be proven. One that has not proven anything yet is anonymous.
    pub(crate) fn proven(&self) -> Option<&Proven> {
        self.proof.get().map(|proof| proof.proven().unwrap_or(&Proven::Anonymous))
    }

    /// The certificate that it has shown, if it has shown one. One that is not signed as it should be is never shown here.
    pub(crate) fn certificate(&self) -> Option<&ProvenCertificate> {
        match self.proven()? {
            Proven::Certificate(shown) => Some(shown),
            Proven::Plain | Proven::Anonymous | Proven::Secret => None,
        }
    }

    pub(crate) fn places(&self) -> &Arc<Places> {
        &self.places
    }

    /// Whether it has a place that is kept back for probes and operators.
    pub(crate) fn is_reserved(&self) -> bool {
        self.reserve.load(Ordering::Relaxed)
    }

    /// Moves it to an ordinary place, if there is one by now.
    pub(crate) fn promote(&self) -> bool {
        let mut table = self.places.table();
        if !self.is_reserved() || !table.callers.contains_key(&self.id) {
            return !self.is_reserved();
        }
        let found = self.places.ordinary_place(&mut table);
        if found {
            self.reserve.store(false, Ordering::Relaxed);
            table.reserved -= 1;
        }
        found
    }

    /// A request has been read, and is under way until the guard goes.
    pub(crate) fn begin(self: &Arc<Self>) -> UnderWay {
        self.begun.store(true, Ordering::Relaxed);
        self.under_way.fetch_add(1, Ordering::Relaxed);
        self.since_ms.store(self.places.now_ms(), Ordering::Relaxed);
        UnderWay(self.clone())
    }

    /// The caller has said who it is: it keeps its place for as long as it likes.
    pub(crate) fn stays(&self) {
        self.begun.store(true, Ordering::Relaxed);
        self.under_way.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    pub(crate) fn holds(&self, what: Held) -> usize {
        self.held[what as usize].load(Ordering::Relaxed)
    }

    /// It holds so much more.
    pub(crate) fn take(&self, what: Held, amount: usize) {
        let before = self.held[what as usize].fetch_add(amount, Ordering::Relaxed);
        if what == Held::Unsent && before == 0 {
            // From here on it may be slow.
            self.progresses();
        }
        self.places.held[what as usize].fetch_add(amount, Ordering::Relaxed);
    }

    /// The same, if it does not hold more than `most` then.
    pub(crate) fn try_take(&self, what: Held, amount: usize, most: usize) -> bool {
        let taken = self.held[what as usize].fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
            Some(held.saturating_add(amount)).filter(|after| *after <= most)
        });
        if taken.is_ok() {
            self.places.held[what as usize].fetch_add(amount, Ordering::Relaxed);
        }
        taken.is_ok()
    }

    /// It holds so much less.
    pub(crate) fn give_back(&self, what: Held, amount: usize) {
        let held = self.held[what as usize].fetch_sub(amount, Ordering::Relaxed);
        assert!(held >= amount || panicking(), "invariant: a caller gives back no more than it holds");
        let all = self.places.held[what as usize].fetch_sub(amount, Ordering::Relaxed);
        assert!(all >= amount || panicking(), "invariant: all callers hold no less than one of them");
        if what == Held::Unsent {
            self.progresses();
            self.sent.notify_one();
            self.places.sent.notify_one();
        }
    }

    /// It has taken something of what it is sent.
    /// When it last took a part of an answer: changes whenever it does.
    pub(crate) fn progress_ms(&self) -> u64 {
        self.progress_ms.load(Ordering::Relaxed)
    }

    pub(crate) fn progresses(&self) {
        self.progress_ms.store(self.places.now_ms(), Ordering::Relaxed);
    }

    /// Whether it may be sent more within `bound`.
    pub(crate) fn has_room(&self, bound: Bound) -> bool {
        self.holds(Held::Unsent) < bound.share(self.places.held(Held::Unsent))
    }

    /// Waits until it may be sent more within `bound`. Meanwhile connections give way whose callers take nothing: this
    /// one when they take nothing for `patience`, and others, when it is their answers that leave no room for this one,
    /// after `shortage`.
    pub(crate) async fn room(&self, bound: Bound, patience: Duration, shortage: Duration) {
        loop {
            let (own, all) = (self.sent.notified(), self.places.sent.notified());
            let mut woken = std::pin::pin!(async {
                tokio::select! {
                    () = own => {}
                    () = all => {}
                }
            });
            // Registers before the condition is looked at.
            let first = futures::poll!(woken.as_mut());
            if self.has_room(bound) {
                // One notification stands for one waiter; there may be room for more.
                self.sent.notify_one();
                self.places.sent.notify_one();
                return;
            }
            if first.is_pending() && tokio::time::timeout(shortage, woken).await.is_err() {
                self.close_the_stalled(bound, patience, shortage);
            }
        }
    }

    fn close_the_stalled(&self, bound: Bound, patience: Duration, shortage: Duration) {
        let own = self.holds(Held::Unsent);
        if own < bound.each && own < self.places.held(Held::Unsent) {
            return self.places.close_largest_stalled(shortage);
        }
        let patience = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        let silent = self.places.now_ms().saturating_sub(self.progress_ms.load(Ordering::Relaxed));
        if silent >= patience {
            let mut table = self.places.table();
            self.places.close(&mut table, self);
        }
    }

    /// Ends the connection, whatever is under way on it.
    pub(crate) fn end(&self) {
        Places::remove(&mut self.places.table(), self);
        self.close();
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.reader.wake();
        self.writer.wake();
    }

    /// Whether the connection has to end. Wakes the reader when that changes.
    pub(super) fn is_closed(&self, reader: &Waker) -> bool {
        self.reader.register(reader);
        self.closed.load(Ordering::Acquire)
    }

    /// The same for the writer.
    pub(super) fn is_closed_to(&self, writer: &Waker) -> bool {
        self.writer.register(writer);
        self.closed.load(Ordering::Acquire)
    }

    /// The connection is gone.
    pub(super) fn left(&self) {
        Places::remove(&mut self.places.table(), self);
        self.places.changed.notify_one();
    }
}

/// A request under way.
#[derive(Debug)]
pub(crate) struct UnderWay(Arc<Caller>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.since_ms.store(self.0.places.now_ms(), Ordering::Relaxed);
        if self.0.under_way.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.places.changed.notify_one();
        }
    }
}
