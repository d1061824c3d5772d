//! Which sessions each client has open, so that one cannot take them all.
//!
//! An opener is a client's address with its port: one connection. Its host is what comes before the port: one machine, or
//! one network behind an address. Both are counted, because connections are cheaper than machines.

use std::sync::Arc;

use imbl::{OrdMap, OrdSet};

/// Counts by name. Cloning it costs two reference counts.
#[derive(Debug, Clone, Default)]
struct Tally {
    counts: OrdMap<Arc<str>, usize>,
    ranks: OrdSet<(usize, Arc<str>)>,
}

impl Tally {
    fn count(&self, name: &str) -> usize {
        self.counts.get(name).copied().unwrap_or(0)
    }

    fn set(&mut self, name: Arc<str>, count: usize) {
        if let Some(before) = self.counts.remove(&name) {
            self.ranks.remove(&(before, name.clone()));
        }
        if count > 0 {
            self.ranks.insert((count, name.clone()));
            self.counts.insert(name, count);
        }
    }

    fn largest(&self) -> Option<(usize, &Arc<str>)> {
        self.ranks.get_max().map(|(count, name)| (*count, name))
    }
}

/// See the [module](self).
#[derive(Debug, Clone, Default)]
pub(super) struct Openers {
    connections: Tally,
    hosts: Tally,
    /// All sessions, by opener.
    sessions: OrdSet<(Arc<str>, u64)>,
}

/// The host of `opener`.
pub(super) fn host(opener: &str) -> &str {
    opener.rsplit_once(':').map_or(opener, |(host, _)| host)
}

impl Openers {
    /// `opener` has opened session `id`.
    pub(super) fn add(&mut self, opener: &Arc<str>, id: u64) {
        self.sessions.insert((opener.clone(), id));
        let (connections, hosts) = (self.count(opener) + 1, self.hosts.count(host(opener)) + 1);
        self.connections.set(opener.clone(), connections);
        self.hosts.set(host(opener).into(), hosts);
    }

    /// Session `id` of `opener` is gone.
    pub(super) fn remove(&mut self, opener: &Arc<str>, id: u64) {
        self.sessions.remove(&(opener.clone(), id));
        let connections = self.count(opener).checked_sub(1).expect("invariant: what is removed was added");
        let hosts = self.hosts.count(host(opener)).checked_sub(1).expect("invariant: as above");
        self.connections.set(opener.clone(), connections);
        self.hosts.set(host(opener).into(), hosts);
    }

    /// The sessions of `largest`.
    pub(super) fn sessions_of<'a>(&'a self, largest: Largest<'a>) -> impl Iterator<Item = u64> + 'a {
        let (Largest::Connection(first) | Largest::Host(first)) = largest;
        let may_belong = move |opener: &str| match largest {
            Largest::Connection(name) => opener == name,
            // All that begin with it, those of other hosts among them: `10.0.0.1` begins `10.0.0.12:7`.
            Largest::Host(name) => opener.starts_with(name),
        };
        let belongs = move |opener: &str| match largest {
            Largest::Connection(_) => true,
            Largest::Host(name) => host(opener) == name,
        };
        let from: (Arc<str>, u64) = (first.into(), 0);
        self.sessions
            .range(from..)
            .take_while(move |(opener, _)| may_belong(opener))
            .filter(move |(opener, _)| belongs(opener))
            .map(|(_, id)| *id)
    }

    /// How many `opener` has.
    pub(super) fn count(&self, opener: &str) -> usize {
        self.connections.count(opener)
    }

    /// How many the opener with most of them has.
    pub(super) fn largest(&self) -> usize {
        self.connections.largest().map_or(0, |(count, _)| count)
    }

    /// Whose session should give way to one of `opener`: the connection with most sessions, if that has at least two more
    /// than the opener has; else the host with most, by the same measure. `None` when the opener has its share.
    pub(super) fn should_give_way_to(&self, opener: &str) -> Option<Largest<'_>> {
        let (most, connection) = self.connections.largest()?;
        if most > self.connections.count(opener) + 1 {
            return Some(Largest::Connection(connection));
        }
        let (most, largest) = self.hosts.largest()?;
        (most > self.hosts.count(host(opener)) + 1).then_some(Largest::Host(largest))
    }
}

/// Who has most sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Largest<'a> {
    Connection(&'a str),
    Host(&'a str),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_most_gives_way() {
        let mut openers = Openers::default();
        let names: Vec<Arc<str>> =
            ["192.0.2.1:1", "192.0.2.1:2", "192.0.2.1:3", "[2001:db8::1]:1", ""].map(Arc::from).to_vec();
        assert_eq!(openers.should_give_way_to(""), None);
        for (name, ids) in names.iter().zip([1..2, 11..14, 21..22, 31..33, 41..42]) {
            ids.for_each(|id| openers.add(name, id));
        }
        assert_eq!((openers.count("192.0.2.1:2"), openers.largest()), (3, 3));
        let connection = Largest::Connection("192.0.2.1:2");
        assert_eq!(openers.should_give_way_to("new:1"), Some(connection));
        assert_eq!(openers.should_give_way_to("192.0.2.1:1"), Some(connection));
        assert_eq!(openers.sessions_of(connection).collect::<Vec<_>>(), [11, 12, 13]);
        // Its connection has nearly as many as any, its host has not.
        let host = Largest::Host("192.0.2.1");
        assert_eq!(openers.should_give_way_to("[2001:db8::1]:1"), Some(host));
        assert_eq!(openers.sessions_of(host).collect::<Vec<_>>(), [1, 11, 12, 13, 21]);
        assert_eq!(openers.sessions_of(Largest::Host("")).collect::<Vec<_>>(), [41]);
        assert_eq!(openers.should_give_way_to("192.0.2.1:2"), None);
        (11..14).for_each(|id| openers.remove(&names[1], id));
        (31..33).for_each(|id| openers.remove(&names[3], id));
        assert_eq!((openers.count("192.0.2.1:2"), openers.largest()), (0, 1));
        assert_eq!(openers.should_give_way_to("new:1"), Some(host));
        for (name, id) in [(0, 1), (2, 21), (4, 41)] {
            openers.remove(&names[name], id);
        }
        assert_eq!(openers.should_give_way_to("new:1"), None);
        assert_eq!(openers.sessions_of(host).count(), 0);
    }

    #[test]
    fn a_host_is_no_other_one_that_begins_alike() {
        let mut openers = Openers::default();
        for (id, name) in (1..).zip(["10.0.0.1:9", "10.0.0.12:1", "10.0.0.1:1", "10.0.0.1"]) {
            openers.add(&name.into(), id);
        }
        assert_eq!(openers.sessions_of(Largest::Host("10.0.0.1")).collect::<Vec<_>>(), [4, 3, 1]);
    }
}
