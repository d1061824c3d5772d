//! Who a caller is, what it may do, and for how long.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::audit::{self, AuditedCall, RefusedCallers};
use super::grants::{AccessRole, DataRight, Granted, Touched};
use super::in_force::{CredentialKey, Identified, InForce};
use super::table::CallRight;
use super::usage::{CallerUsage, CountedCall, Usages};
use crate::door::failure;
use crate::proto::v1::Failure;

/// A caller that has been identified. A stream ends when what it was begun by is no more.
#[derive(Clone)]
pub(crate) struct Principal {
    name: Arc<str>,
    key: CredentialKey,
    granted: Arc<Granted>,
    /// In seconds since the Unix epoch, and by the clock of this process.
    expires: Option<(u64, Instant)>,
    in_force: Option<watch::Receiver<Arc<InForce>>>,
    /// What it takes, where that is limited.
    usage: Option<Arc<CallerUsage>>,
    address: Option<SocketAddr>,
    /// Where it is counted that it was refused.
    refused: Option<Arc<RefusedCallers>>,
}

/// Without what may be secret.
impl fmt::Debug for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Principal")
            .field("name", &self.name)
            .field("kind", &self.key.kind())
            .finish_non_exhaustive()
    }
}

/// A caller asks for more than its credential allows at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooMuchAsked;

/// What ends a stream whose caller is not identified any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RightEnded {
    Expired,
    Withdrawn,
}

impl Principal {
    /// A caller of a node that asks for no credentials.
    pub(crate) fn everyone() -> Arc<Self> {
        // Made once: every request of such a node has it.
        static EVERYONE: LazyLock<Arc<Principal>> = LazyLock::new(|| {
            let granted = Arc::new(Granted::everything());
            Arc::new(Principal::lasting("everyone", CredentialKey::Unneeded, granted))
        });
        EVERYONE.clone()
    }

    /// A caller of whom nothing is known, who may do nothing.
    pub(crate) fn nobody() -> Arc<Self> {
        static NOBODY: LazyLock<Arc<Principal>> = LazyLock::new(|| {
            Arc::new(Principal::lasting("nobody", CredentialKey::Anonymous, Arc::default()))
        });
        NOBODY.clone()
    }

    /// One that does not end.
    fn lasting(name: &str, key: CredentialKey, granted: Arc<Granted>) -> Self {
        let name = name.into();
        Self { name, key, granted, expires: None, in_force: None, usage: None, address: None, refused: None }
    }

    /// The one that was `identified` at `now`, in seconds since the Unix epoch, by what `in_force` showed then.
    pub(super) fn new(
        identified: Identified,
        now: u64,
        in_force: watch::Receiver<Arc<InForce>>,
        usages: &Usages,
        (address, refused): (Option<SocketAddr>, Arc<RefusedCallers>),
    ) -> Self {
        /// A clock of this process does not reach further.
        const LONGEST: Duration = Duration::from_hours(24 * 365);
        let Identified { name, key, granted, expires } = identified;
        let left = |at: u64| Duration::from_secs(at.saturating_sub(now)).min(LONGEST);
        let expires = expires.map(|at| (at, Instant::now() + left(at)));
        let usage = (!granted.limits.is_none()).then(|| usages.of(key.kind(), &name));
        let (in_force, refused) = (Some(in_force), Some(refused));
        Self { name, key, granted, expires, in_force, usage, address, refused }
    }

    /// What the node calls it.
    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// It has asked for `call`, which is not granted to it. What it is told.
    pub(crate) fn deny(&self, call: &str) -> Failure {
        let asked = AuditedCall { path: call, address: self.address };
        match &self.refused {
            Some(refused) => refused.denied(&asked, &self.name, self.key.kind()),
            None => failure::permission_denied(),
        }
    }

    /// It has asked for `call`, which changes how the cluster is. The log tells, with the `outcome`.
    pub(crate) fn operated(&self, call: &AuditedCall<'_>, outcome: &str) {
        audit::operated(call, &self.name, self.key.kind(), outcome);
    }

    /// Whether it may do everything, so that it need not be found out what it asks for.
    pub(crate) fn is_everyone(&self) -> bool {
        self.key == CredentialKey::Unneeded
    }

    /// Whether it has `right`, as far as that does not depend on what it asks for.
    pub(crate) fn may(&self, right: CallRight) -> bool {
        match right {
            CallRight::Nothing => true,
            CallRight::Anything => self.granted.is_something(),
            CallRight::Observe | CallRight::Settings => self.granted.has(AccessRole::Observe),
            CallRight::Operate => self.operates(),
            CallRight::Data => self.granted.has_data(),
            CallRight::Session => self.granted.writes_something(),
        }
    }

    pub(crate) fn operates(&self) -> bool {
        self.granted.has(AccessRole::Operate)
    }

    /// Whether clients may be sent to it for reads.
    pub(crate) fn answers_reads(&self) -> bool {
        self.is_everyone() || self.granted.has(AccessRole::Replica)
    }

    /// One more call of it, which counts until the guard goes; none if nothing is to be counted.
    ///
    /// # Errors
    /// When it has as many under way as it may have.
    pub(crate) fn begin(&self) -> Result<Option<CountedCall>, TooMuchAsked> {
        let Some(usage) = &self.usage else { return Ok(None) };
        usage.begin(self.granted.limits).map(Some).ok_or(TooMuchAsked)
    }

    /// One more request of it.
    ///
    /// # Errors
    /// When it asks for more in a second than it may.
    pub(crate) fn ask(&self) -> Result<(), TooMuchAsked> {
        let Some(usage) = &self.usage else { return Ok(()) };
        match usage.ask(self.granted.limits).is_zero() {
            true => Ok(()),
            false => {
                usage.unask(self.granted.limits);
                Err(TooMuchAsked)
            }
        }
    }

    /// One more request of it, which is to wait for so long; none if it need not.
    pub(crate) fn ask_later(&self) -> Option<Duration> {
        let wait = self.usage.as_ref()?.ask(self.granted.limits);
        Some(wait).filter(|wait| !wait.is_zero())
    }

    /// Whether it may open and close sessions.
    pub(crate) fn writes_something(&self) -> bool {
        self.granted.writes_something()
    }

    /// Whether it has `right` to all of what is `touched`.
    pub(crate) fn covers(&self, right: DataRight, touched: Touched<'_>) -> bool {
        self.is_everyone() || self.granted.covers(right, touched)
    }

    /// Whether this can come to an end.
    pub(crate) fn can_end(&self) -> bool {
        self.in_force.is_some()
    }

    /// Whether the credential has expired or is withdrawn, or something else is granted by it.
    pub(crate) fn has_ended(&self) -> bool {
        let Some(in_force) = &self.in_force else { return false };
        let is_over = self.expires.is_some_and(|(_, at)| at <= Instant::now());
        let until = self.expires.map(|(at, _)| at);
        is_over || !in_force.borrow().still_grants(&self.key, &self.granted, until)
    }

    /// Waits until the credential expires or is withdrawn, or less or more is granted by it.
    pub(crate) async fn ended(&self) -> RightEnded {
        let Some(mut in_force) = self.in_force.clone() else { return std::future::pending().await };
        let until = self.expires.map(|(at, _)| at);
        loop {
            if !in_force.borrow_and_update().still_grants(&self.key, &self.granted, until) {
                return RightEnded::Withdrawn;
            }
            let expired = async {
                match self.expires {
                    Some((_, at)) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = expired => return RightEnded::Expired,
                changed = in_force.changed() => if changed.is_err() {
                    // The port is gone, and its streams with it.
                    return RightEnded::Withdrawn;
                },
            }
        }
    }
}
