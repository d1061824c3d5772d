//! What a caller may do: roles, and rights to parts of the state. Pure.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What may be done with a part of the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DataRight {
    /// Read it, and be told of its changes while watching it.
    Read,
    /// Change it. Answers to changes tell whether a key was there, and no value.
    Write,
    /// Follow all that happens to it, as a replica does.
    Subscribe,
}

impl DataRight {
    /// As files call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Subscribe => "subscribe",
        }
    }
}

/// A part of the state that a request touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Touched<'a> {
    /// All of it.
    Everything,
    /// All of a tenant.
    Tenant(&'a str),
    /// A collection of a tenant.
    Collection {
        /// The tenant.
        tenant: &'a str,
        /// The collection.
        collection: &'a str,
    },
}

/// Is told each part that a request touches, and with which right.
pub type Touch<'a> = dyn FnMut(DataRight, Touched<'_>) + 'a;

/// Stands for every tenant.
const EVERY_TENANT: &str = "*";

/// Rights to a part of the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Grant {
    /// A tenant, or `*` for all.
    pub(crate) tenant: String,
    /// Collections whose names begin with this: all of them if it is empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) prefix: String,
    /// This collection, and none whose name only begins like this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) collection: Option<String>,
    pub(crate) rights: Vec<DataRight>,
}

/// As `quorate token` is given one: `acme/orders:read,write`, `acme:read` or `*:subscribe`.
impl FromStr for Grant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "a grant is TENANT[/PREFIX]:RIGHTS, such as acme/orders:read,write or *:subscribe";
        let (part, rights) = text.rsplit_once(':').ok_or(FORM)?;
        let (tenant, prefix) = part.split_once('/').unwrap_or((part, ""));
        let right = |right: &str| match right {
            "read" => Ok(DataRight::Read),
            "write" => Ok(DataRight::Write),
            "subscribe" => Ok(DataRight::Subscribe),
            _ => Err(format!("\"{right}\" is no right; there are read, write and subscribe")),
        };
        let rights = rights.split(',').map(right).collect::<Result<Vec<_>, _>>()?;
        match tenant.is_empty() {
            true => Err(FORM.to_owned()),
            false => {
                Ok(Self { tenant: tenant.to_owned(), prefix: prefix.to_owned(), collection: None, rights })
            }
        }
    }
}

impl Grant {
    fn covers(&self, right: DataRight, touched: Touched<'_>) -> bool {
        let Self { tenant: own, prefix, collection: only, rights } = self;
        let is_every = own == EVERY_TENANT;
        let is_own = |tenant: &str| is_every || own == tenant;
        let is_whole = prefix.is_empty() && only.is_none();
        rights.contains(&right)
            && match touched {
                Touched::Everything => is_every && is_whole,
                Touched::Tenant(tenant) => is_own(tenant) && is_whole,
                Touched::Collection { tenant, collection } => {
                    is_own(tenant)
                        && collection.starts_with(prefix.as_str())
                        && only.as_ref().is_none_or(|only| only == collection)
                }
            }
    }
}

/// What a caller may do beside what it may do with keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AccessRole {
    /// See how the node and the cluster are, and no value.
    Observe,
    /// Change how they are. Who may do that may see it.
    Operate,
    /// Answer reads of others: clients are told where it is reached, and show their credentials there.
    Replica,
}

/// How much a caller may make of what is granted to it, at each node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct CallerLimits {
    /// Calls under way at a time; a pipeline, a watch and a subscription are one each for as long as they last.
    pub(crate) max_calls: Option<u32>,
    /// Requests in a second, each of a pipeline counting. What is more is refused, and on a pipeline read later.
    pub(crate) requests_per_second: Option<u32>,
}

impl CallerLimits {
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// All that is granted to one caller.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Granted {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) roles: Vec<AccessRole>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) grants: Vec<Grant>,
    #[serde(skip_serializing_if = "CallerLimits::is_none")]
    pub(crate) limits: CallerLimits,
}

impl Granted {
    /// Everything there is.
    pub(crate) fn everything() -> Self {
        let rights = vec![DataRight::Read, DataRight::Write, DataRight::Subscribe];
        let all = Grant { tenant: EVERY_TENANT.to_owned(), prefix: String::new(), collection: None, rights };
        let (roles, limits) = (vec![AccessRole::Observe, AccessRole::Operate], CallerLimits::default());
        Self { roles, grants: vec![all], limits }
    }

    /// Whether it is more than nothing.
    pub(crate) fn is_something(&self) -> bool {
        !self.roles.is_empty() || self.has_data()
    }

    /// Whether any right to a part of the state is among it.
    pub(crate) fn has_data(&self) -> bool {
        self.grants.iter().any(|grant| !grant.rights.is_empty())
    }

    /// Whether something may be changed.
    pub(crate) fn writes_something(&self) -> bool {
        self.grants.iter().any(|grant| grant.rights.contains(&DataRight::Write))
    }

    pub(crate) fn has(&self, role: AccessRole) -> bool {
        self.roles.contains(&role) || (role != AccessRole::Operate && self.operates())
    }

    fn operates(&self) -> bool {
        self.roles.contains(&AccessRole::Operate)
    }

    /// Whether one of the grants covers all of what is `touched`. Several together do not count as one.
    pub(crate) fn covers(&self, right: DataRight, touched: Touched<'_>) -> bool {
        self.grants.iter().any(|grant| grant.covers(right, touched))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn grant(tenant: &str, prefix: &str, rights: &[DataRight]) -> Grant {
        Grant { tenant: tenant.into(), prefix: prefix.into(), collection: None, rights: rights.to_vec() }
    }

    fn of(grants: &[Grant]) -> Granted {
        Granted { grants: grants.to_vec(), ..Granted::default() }
    }

    fn at<'a>(tenant: &'a str, collection: &'a str) -> Touched<'a> {
        Touched::Collection { tenant, collection }
    }

    #[test]
    fn a_prefix_covers_what_begins_with_it_and_nothing_larger() {
        let granted = of(&[grant("acme", "orders", &[DataRight::Read])]);
        for (tenant, collection, is_covered) in [
            ("acme", "orders", true),
            ("acme", "orders-old", true),
            ("acme", "order", false),
            ("acme", "", false),
            ("acme", "Orders", false),
            ("acme2", "orders", false),
            ("", "orders", false),
            ("*", "orders", false),
        ] {
            let covered = granted.covers(DataRight::Read, at(tenant, collection));
            assert_eq!(covered, is_covered, "{tenant}/{collection}");
            assert!(!granted.covers(DataRight::Write, at(tenant, collection)), "{tenant}/{collection}");
        }
        assert!(!granted.covers(DataRight::Read, Touched::Tenant("acme")));
        assert!(!granted.covers(DataRight::Read, Touched::Everything));
    }

    #[test]
    fn an_empty_prefix_is_a_whole_tenant_and_a_star_all_of_them() {
        let tenant = of(&[grant("acme", "", &[DataRight::Subscribe])]);
        assert!(tenant.covers(DataRight::Subscribe, Touched::Tenant("acme")));
        assert!(tenant.covers(DataRight::Subscribe, at("acme", "anything")));
        assert!(!tenant.covers(DataRight::Subscribe, Touched::Tenant("other")));
        assert!(!tenant.covers(DataRight::Subscribe, Touched::Everything));
        let all = of(&[grant("*", "", &[DataRight::Subscribe])]);
        assert!(all.covers(DataRight::Subscribe, Touched::Everything));
        assert!(all.covers(DataRight::Subscribe, Touched::Tenant("")));
        let part = of(&[grant("*", "p", &[DataRight::Subscribe])]);
        assert!(part.covers(DataRight::Subscribe, at("any", "pq")));
        assert!(!part.covers(DataRight::Subscribe, Touched::Everything));
    }

    #[test]
    fn one_collection_is_not_what_begins_like_it() {
        let only = Grant { collection: Some("orders".into()), ..grant("acme", "", &[DataRight::Write]) };
        let granted = of(&[only]);
        assert!(granted.covers(DataRight::Write, at("acme", "orders")));
        assert!(!granted.covers(DataRight::Write, at("acme", "orders-old")));
        assert!(!granted.covers(DataRight::Write, Touched::Tenant("acme")));
    }

    #[test]
    fn who_operates_observes_and_who_observes_reads_nothing() {
        let of = |role| Granted { roles: vec![role], ..Granted::default() };
        let (operator, observer) = (of(AccessRole::Operate), of(AccessRole::Observe));
        assert!(operator.has(AccessRole::Observe) && operator.has(AccessRole::Operate));
        assert!(observer.has(AccessRole::Observe) && !observer.has(AccessRole::Operate));
        for granted in [operator, observer, Granted::default()] {
            assert!(!granted.covers(DataRight::Read, at("default", "default")));
            assert!(!granted.has_data() && !granted.writes_something());
        }
        assert!(!Granted::default().is_something());
    }

    proptest! {
        /// Whatever is granted, what a larger part is covered by covers each smaller part in it.
        #[test]
        fn a_part_of_what_is_covered_is_covered(
            tenants in proptest::collection::vec("[ab*]{1,2}", 1..4),
            prefixes in proptest::collection::vec("[ab]{0,2}", 1..4),
            tenant in "[ab]{1,2}",
            collection in "[ab]{0,3}",
        ) {
            let rights = [DataRight::Read];
            let grants: Vec<_> =
                tenants.iter().zip(&prefixes).map(|(tenant, prefix)| grant(tenant, prefix, &rights)).collect();
            let granted = of(&grants);
            let parts = [Touched::Everything, Touched::Tenant(&tenant), at(&tenant, &collection)];
            let covered = parts.map(|part| granted.covers(DataRight::Read, part));
            prop_assert!(covered[0] <= covered[1] && covered[1] <= covered[2], "{grants:?} {covered:?}");
            let by_hand = grants.iter().any(|grant| {
                (grant.tenant == "*" || grant.tenant == tenant) && collection.starts_with(&grant.prefix)
            });
            prop_assert_eq!(covered[2], by_hand);
            prop_assert!(!granted.covers(DataRight::Write, parts[2]));
        }
    }
}
