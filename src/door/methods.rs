//! What can be called on one port, by name and by path.

use std::sync::Arc;

/// A call that is counted and timed by itself: every call of the services but pipelines, whose requests count one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Method {
    /// Its name in metrics, and on a pipeline: `delete_range` for a call `DeleteRange`.
    pub name: &'static str,
    /// Whether it changes anything that its caller would have to look for when its answer does not come.
    pub changes: bool,
    /// As how many requests in flight it counts on a pipeline.
    pub permits: u32,
    /// Whether its requests are asked for [what they may bring](super::Guest::expected_bytes).
    pub is_weighed: bool,
}

impl Method {
    /// A call that changes the state.
    pub const fn write(name: &'static str) -> Self {
        Self { name, changes: true, permits: 1, is_weighed: false }
    }

    /// A call that does not.
    pub const fn read(name: &'static str) -> Self {
        Self { name, changes: false, permits: 1, is_weighed: false }
    }

    /// The same, of which each request is asked for what it may bring.
    #[must_use]
    pub const fn weighed(self) -> Self {
        Self { is_weighed: true, ..self }
    }

    /// The same, counted as `permits` requests: its answer may be that much larger than others.
    #[must_use]
    pub const fn counted_as(self, permits: u32) -> Self {
        Self { permits, ..self }
    }
}

/// Calls of sessions, which are the same for all guests. They come behind the guest's own.
pub(crate) const OPEN_SESSION: Method = Method::write("open_session");
/// See [`OPEN_SESSION`].
pub(crate) const CLOSE_SESSION: Method = Method::write("close_session");

/// A method, as the number of its place among [`Methods`]. A guest's own come first, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MethodId(pub(crate) usize);

/// All that can be called on a port. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Methods {
    list: Arc<[Method]>,
    /// The paths of pipelines.
    pipelines: Arc<[String]>,
}

impl Methods {
    /// Those of a guest, of sessions, and `others`. Requests also come on pipelines at `pipelines`.
    ///
    /// # Panics
    /// When two have the same name.
    pub(crate) fn new(
        guest: &[Method],
        others: &[Method],
        pipelines: impl IntoIterator<Item = String>,
    ) -> Self {
        let sessions = [OPEN_SESSION, CLOSE_SESSION];
        let list: Arc<[Method]> = guest.iter().chain(&sessions).chain(others).copied().collect();
        for (place, method) in list.iter().enumerate() {
            let is_taken = list[..place].iter().any(|other| other.name == method.name);
            assert!(
                !is_taken,
                "two methods of one port are called {}: give the guest's another name",
                method.name
            );
        }
        Self { list, pipelines: pipelines.into_iter().collect() }
    }

    /// In the order of their numbers.
    pub(crate) fn list(&self) -> &[Method] {
        &self.list
    }

    /// The method called `name`.
    ///
    /// # Panics
    /// When there is none: names are known beforehand.
    pub(crate) fn id(&self, name: &str) -> MethodId {
        let found = self.list.iter().position(|method| method.name == name);
        MethodId(found.unwrap_or_else(|| panic!("invariant: {name} is among the methods")))
    }

    pub(crate) fn get(&self, id: MethodId) -> Method {
        self.list[id.0]
    }

    /// Whether requests come one after the other at `path`, each of its own.
    pub(crate) fn is_pipeline(&self, path: &str) -> bool {
        self.pipelines.iter().any(|pipeline| pipeline == path)
    }

    /// The call at `path`, if it is one of those that are counted.
    pub(crate) fn at(&self, path: &str) -> Option<MethodId> {
        let service = ["/quorate.v1.", "/replication."].iter().find_map(|package| path.strip_prefix(package));
        let called = service?.split_once('/')?.1;
        let mut name = String::new();
        for c in called.chars() {
            if c.is_ascii_uppercase() && !name.is_empty() {
                name.push('_');
            }
            name.push(c.to_ascii_lowercase());
        }
        self.list.iter().position(|method| method.name == name).map(MethodId)
    }

    /// Whether a call at `path` that ends unexpectedly may have changed something.
    pub(crate) fn may_change(&self, path: &str) -> bool {
        self.is_pipeline(path) || self.at(path).is_some_and(|id| self.get(id).changes)
    }
}
