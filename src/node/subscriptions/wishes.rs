//! What a follower asks for in its first message, within bounds.

use std::time::Duration;

use bytes::Bytes;

use crate::address::{Address, FORM};
use crate::door::failure::invalid;
use crate::door::rights::Principal;
use crate::door::{DataRight, Touched, permitted};
use crate::machine::AppliedEvent;
use crate::proto::replication::{Compression, Filter, SubscribeRequest};
use crate::proto::v1::Failure;
use crate::shown::Shown;
use crate::types::{Bookmark, HistoryEpoch};

/// Most filters of one follower.
const MAX_FILTERS: usize = 64;
/// Longest name in a filter.
const MAX_NAME_BYTES: usize = 1024;
/// Longest name of a follower.
const MAX_ID_BYTES: usize = 128;
const MIN_WINDOW_BYTES: u64 = 64 * 1024;
const MAX_WINDOW_BYTES: u64 = 64 * 1024 * 1024;
const MIN_HEARTBEAT_MS: u32 = 100;
const MAX_HEARTBEAT_MS: u32 = 60_000;
const DEFAULT_HEARTBEAT_MS: u32 = 5_000;

/// Where to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StartAt {
    /// After this position.
    After(Bookmark),
    /// With what is new from now on, in this history.
    Now(HistoryEpoch),
}

impl StartAt {
    /// Whether it may be a position of `history`.
    pub(super) fn is_in(self, history: HistoryEpoch) -> bool {
        let (Self::After(Bookmark { history: given, .. }) | Self::Now(given)) = self;
        !given.differs_from(history)
    }
}

/// What is sent, and how.
#[derive(Debug)]
pub(super) struct Wishes {
    pub(super) start: StartAt,
    pub(super) choice: Choice,
    /// Bytes that may be sent before they are acknowledged; 0 for no window.
    pub(super) window_bytes: u64,
    pub(super) batched: bool,
    pub(super) compressed: bool,
    pub(super) heartbeat: Duration,
    pub(super) id: String,
    pub(super) accept_snapshot: bool,
    /// Whether it is told which part of a state it has.
    pub(super) resumable: bool,
    /// The part of a state that it has: which state, and which part.
    pub(super) state: Option<(u64, u64)>,
    /// Whether events are told with what their keys were before.
    pub(super) previous: bool,
    /// Where the follower answers reads, if it does.
    pub(super) serves: Option<String>,
}

impl Wishes {
    /// What `request` asks for, of a machine that `tells_events` or does not.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn parse(request: SubscribeRequest, tells_events: bool) -> Result<Self, Failure> {
        let SubscribeRequest { from_seq, history, from_now, filters, window_bytes, batched, .. } = request;
        let history = HistoryEpoch(history);
        let start = match (from_now, from_seq) {
            (false, index) => StartAt::After(Bookmark { index, history }),
            (true, 0) => StartAt::Now(history),
            (true, _) => {
                return Err(invalid("it asks for what is new from now on, and for a position: say one"));
            }
        };
        if window_bytes != 0 && !(MIN_WINDOW_BYTES..=MAX_WINDOW_BYTES).contains(&window_bytes) {
            return Err(invalid(&format!(
                "window_bytes ({window_bytes}) must be 0 or from {MIN_WINDOW_BYTES} to {MAX_WINDOW_BYTES}"
            )));
        }
        let compressed = match Compression::try_from(request.compression) {
            Ok(Compression::None) => false,
            Ok(Compression::Zstd) if batched => true,
            Ok(Compression::Zstd) => {
                return Err(invalid("only batches are compressed: ask for batched, too"));
            }
            Err(_) => return Err(invalid("this node does not know that compression; it knows zstd")),
        };
        let heartbeat_ms = match request.heartbeat_ms {
            0 => DEFAULT_HEARTBEAT_MS,
            given if (MIN_HEARTBEAT_MS..=MAX_HEARTBEAT_MS).contains(&given) => given,
            given => {
                return Err(invalid(&format!(
                    "heartbeat_ms ({given}) must be 0 or from {MIN_HEARTBEAT_MS} to {MAX_HEARTBEAT_MS}"
                )));
            }
        };
        let id = request.id;
        if id.len() > MAX_ID_BYTES || id.chars().any(char::is_control) {
            return Err(invalid(&format!(
                "the id of a follower has at most {MAX_ID_BYTES} bytes, all of them printable"
            )));
        }
        Ok(Self {
            start,
            choice: Choice::parse(filters, tells_events)?,
            window_bytes,
            batched,
            compressed,
            heartbeat: Duration::from_millis(heartbeat_ms.into()),
            id,
            accept_snapshot: request.accept_snapshot,
            resumable: request.accept_snapshot && request.resumable,
            state: request.state.filter(|_| request.accept_snapshot).map(|state| (state.id, state.part)),
            previous: request.previous,
            serves: serving_at(request.serves)?,
        })
    }

    /// Whether a state that was begun for `other` is what this asks for: chosen alike, and in the place of what comes after the same position.
    pub(super) fn goes_on_with_state_of(&self, other: &Self) -> bool {
        let is_after_the_same = match (self.start, other.start) {
            (StartAt::After(after), StartAt::After(before)) => {
                after.index == before.index && !after.history.differs_from(before.history)
            }
            _ => false,
        };
        is_after_the_same && self.choice == other.choice
    }
}

/// Where a follower answers reads, as it says: clients will be told, so it must be an address that they can connect to.
fn serving_at(serves: String) -> Result<Option<String>, Failure> {
    if serves.is_empty() {
        return Ok(None);
    }
    let is_one = |address: &Address<'_>| {
        address.port != 0 && !address.is_unspecified() && address.check_host().is_ok()
    };
    match Address::parse(&serves).filter(is_one) {
        Some(_) => Ok(Some(serves)),
        None => Err(invalid(&format!(
            "clients cannot connect to \"{}\": where a replica answers reads is {FORM}",
            Shown(&serves)
        ))),
    }
}

/// Which entries are wanted: all, or those of some tenants and collections.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Choice(Vec<(Bytes, Option<Bytes>)>);

impl Choice {
    /// What `filters` let pass, of a machine that `tells_events` or does not.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(super) fn parse(filters: Vec<Filter>, tells_events: bool) -> Result<Self, Failure> {
        if !filters.is_empty() && !tells_events {
            return Err(invalid(
                "what this node serves tells no events, only its commands as they are, and they cannot be filtered: ask without filters",
            ));
        }
        if filters.len() > MAX_FILTERS {
            return Err(invalid(&format!("there are {} filters, more than {MAX_FILTERS}", filters.len())));
        }
        let names = filters.iter().flat_map(|filter| [&filter.tenant_id, &filter.collection]);
        if let Some(name) = names.into_iter().find(|name| name.len() > MAX_NAME_BYTES) {
            return Err(invalid(&format!(
                "a filter has a name of {} bytes, more than {MAX_NAME_BYTES}",
                name.len()
            )));
        }
        let filters = filters.into_iter().map(|Filter { tenant_id, collection }| {
            let collection = (!collection.is_empty()).then(|| Bytes::from(collection));
            (Bytes::from(tenant_id), collection)
        });
        Ok(Self(filters.collect()))
    }

    /// Whether `principal` may follow all of that.
    ///
    /// # Errors
    /// The failure to answer instead.
    pub(super) fn permit(&self, principal: &Principal) -> Result<(), Failure> {
        let follow = |touched: Touched<'_>| permitted::part(principal, DataRight::Subscribe, touched);
        if self.is_all() {
            return follow(Touched::Everything);
        }
        self.0.iter().try_for_each(|(tenant, within)| {
            let text = |name| std::str::from_utf8(name).expect("invariant: names come as text");
            let tenant = text(tenant);
            match within {
                Some(within) => follow(Touched::Collection { tenant, collection: text(within) }),
                None => follow(Touched::Tenant(tenant)),
            }
        })
    }

    pub(super) fn is_all(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether events of `tenant` in `collection` are wanted.
    pub(super) fn has(&self, tenant: &[u8], collection: &[u8]) -> bool {
        let is_named = |(of, within): &(Bytes, Option<Bytes>)| {
            *of == tenant && within.as_ref().is_none_or(|within| *within == collection)
        };
        self.is_all() || self.0.iter().any(is_named)
    }

    pub(super) fn wants(&self, event: &AppliedEvent) -> bool {
        self.has(&event.tenant, &event.collection)
    }

    /// As a page shows it: `tenant` or `tenant/collection`.
    pub(super) fn shown(&self) -> Vec<String> {
        let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
        let shown = |(tenant, collection): &(Bytes, Option<Bytes>)| match collection {
            Some(collection) => format!("{}/{}", text(tenant), text(collection)),
            None => text(tenant),
        };
        self.0.iter().map(shown).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reason::Reason;

    fn filter(tenant: &str, collection: &str) -> Filter {
        Filter { tenant_id: tenant.to_owned(), collection: collection.to_owned() }
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_words() {
        let valid = SubscribeRequest::default();
        let serving = |serves: &str| SubscribeRequest { serves: serves.to_owned(), ..valid.clone() };
        let cases: [(SubscribeRequest, &str); 15] = [
            (serving("nowhere"), "cannot connect"),
            (serving("0.0.0.0:7811"), "cannot connect"),
            (serving("[::]:7811"), "cannot connect"),
            (serving("10.0.0.1:0"), "cannot connect"),
            (serving("224.0.0.1:7811"), "cannot connect"),
            (serving(&"a".repeat(1 << 20)), "cannot connect"),
            (SubscribeRequest { from_now: true, from_seq: 1, ..valid.clone() }, "say one"),
            (SubscribeRequest { window_bytes: 1, ..valid.clone() }, "window_bytes (1)"),
            (SubscribeRequest { window_bytes: u64::MAX, ..valid.clone() }, "window_bytes"),
            (SubscribeRequest { compression: 1, ..valid.clone() }, "batched"),
            (SubscribeRequest { compression: 9, batched: true, ..valid.clone() }, "zstd"),
            (SubscribeRequest { heartbeat_ms: 1, ..valid.clone() }, "heartbeat_ms (1)"),
            (SubscribeRequest { id: "a\nb".to_owned(), ..valid.clone() }, "printable"),
            (SubscribeRequest { filters: vec![filter("t", ""); 65], ..valid.clone() }, "65 filters"),
            (
                SubscribeRequest { filters: vec![filter(&"t".repeat(1025), "")], ..valid.clone() },
                "1025 bytes",
            ),
        ];
        for (request, words) in cases {
            let failure = Wishes::parse(request, true).unwrap_err();
            assert_eq!(failure.reason(), Reason::Invalid);
            assert!(failure.message.contains(words), "{}", failure.message);
        }
        let filtered = SubscribeRequest { filters: vec![filter("t", "")], ..valid.clone() };
        assert!(Wishes::parse(filtered.clone(), false).unwrap_err().message.contains("no events"));
        Wishes::parse(filtered, true).unwrap();
        let serving = Wishes::parse(serving("replica-1:7811"), true).unwrap();
        assert_eq!(serving.serves.as_deref(), Some("replica-1:7811"));
        let wishes = Wishes::parse(valid, false).unwrap();
        assert_eq!(wishes.serves, None);
        assert_eq!(wishes.heartbeat, Duration::from_secs(5));
        assert!(wishes.choice.is_all() && wishes.choice.has(b"any", b"thing"));
    }

    #[test]
    fn a_state_is_gone_on_with_by_who_asks_for_the_same() {
        let first = SubscribeRequest {
            from_seq: 5,
            accept_snapshot: true,
            filters: vec![filter("a", "")],
            ..SubscribeRequest::default()
        };
        let goes_on = |again: &SubscribeRequest| {
            let parse = |request: &SubscribeRequest| Wishes::parse(request.clone(), true).unwrap();
            parse(again).goes_on_with_state_of(&parse(&first))
        };
        let again = SubscribeRequest { heartbeat_ms: 200, history: 3, ..first.clone() };
        assert!(goes_on(&first) && goes_on(&again), "it knows the history by now");
        for other in [
            SubscribeRequest { filters: vec![filter("b", "")], ..first.clone() },
            SubscribeRequest { filters: vec![filter("a", "x")], ..first.clone() },
            SubscribeRequest { filters: Vec::new(), ..first.clone() },
            SubscribeRequest { from_seq: 6, ..first.clone() },
            SubscribeRequest { from_seq: 0, from_now: true, ..first.clone() },
        ] {
            assert!(!goes_on(&other), "{other:?}");
        }
    }

    #[test]
    fn a_filter_names_a_tenant_and_maybe_a_collection() {
        let choice = Choice::parse(vec![filter("a", ""), filter("b", "x")], true).unwrap();
        let wanted = [("a", "x"), ("a", ""), ("b", "x"), ("b", "y"), ("ab", "x"), ("", "x")];
        let wanted = wanted.map(|(tenant, collection)| choice.has(tenant.as_bytes(), collection.as_bytes()));
        assert_eq!(wanted, [true, true, true, false, false, false]);
        assert_eq!(choice.shown(), ["a", "b/x"]);
    }
}
