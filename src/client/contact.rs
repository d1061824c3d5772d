//! Whether a client, or one of its watches, hears from its cluster: for those who want to know while it tries again.
//!
//! An operation ends by its deadline and says what it met. A watch has none, and a client as a whole has neither
//! beginning nor end: they go on trying, and tell here how that goes.

use tokio::sync::watch;

use super::endpoint::Endpoint;

/// Whether the cluster is heard from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Contact {
    /// Nobody has answered yet, and nobody has failed to.
    Seeking,
    /// The node at this endpoint answers.
    Heard {
        /// Which.
        endpoint: Endpoint,
    },
    /// Nobody answers, or only nodes that are cut off from their cluster. The client goes on trying.
    Lost {
        /// What was met last, with the address that was tried.
        why: String,
    },
}

/// Follows a [`Contact`]. Cheap to clone; each clone has its own idea of what is new.
#[derive(Debug, Clone)]
pub struct Contacts(watch::Receiver<Contact>);

impl Contacts {
    /// What is known at this moment.
    pub fn now(&self) -> Contact {
        self.0.borrow().clone()
    }

    /// Waits until it is another than this handle has told, or than it was when the handle was made; `None` once it cannot
    /// change any more, because the watch or the client is gone. What lasts shorter than its caller looks away may be left
    /// out. Safe to drop: nothing is lost with the future.
    pub async fn changed(&mut self) -> Option<Contact> {
        self.0.changed().await.ok()?;
        Some(self.0.borrow_and_update().clone())
    }

    /// Waits until `condition` holds, and returns for what it did; `None` once that cannot be any more.
    pub async fn wait_for(&mut self, mut condition: impl FnMut(&Contact) -> bool) -> Option<Contact> {
        self.0.wait_for(|contact| condition(contact)).await.ok().map(|contact| contact.clone())
    }
}

/// The other end: where contact is noted.
#[derive(Debug)]
pub(crate) struct ContactNote(watch::Sender<Contact>);

impl ContactNote {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(Contact::Seeking))
    }

    pub(crate) fn follow(&self) -> Contacts {
        Contacts(self.0.subscribe())
    }

    /// Whether somebody answers.
    pub(crate) fn is_heard(&self) -> bool {
        matches!(*self.0.borrow(), Contact::Heard { .. })
    }

    /// `endpoint` answers. True when nobody did before.
    pub(crate) fn heard(&self, endpoint: &Endpoint) -> bool {
        let mut first = false;
        self.0.send_if_modified(|contact| {
            first = !matches!(contact, Contact::Heard { .. });
            let is_news = !matches!(contact, Contact::Heard { endpoint: known } if known == endpoint);
            if is_news {
                *contact = Contact::Heard { endpoint: endpoint.clone() };
            }
            is_news
        });
        first
    }

    /// Nobody answers, for the reason that `why` tells. True when that was not so before.
    pub(crate) fn lost(&self, why: impl FnOnce() -> String) -> bool {
        self.0.send_if_modified(|contact| {
            let is_news = !matches!(contact, Contact::Lost { .. });
            if is_news {
                *contact = Contact::Lost { why: why() };
            }
            is_news
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_change_is_told_once() {
        let endpoint = |text| Endpoint::parse(text).unwrap();
        let note = ContactNote::new();
        let mut contacts = note.follow();
        assert_eq!(contacts.now(), Contact::Seeking);
        assert!(note.lost(|| "refused".to_owned()));
        assert!(!note.lost(|| "refused again".to_owned()));
        assert_eq!(contacts.changed().await, Some(Contact::Lost { why: "refused".to_owned() }));
        assert!(note.heard(&endpoint("a:1")));
        assert!(!note.heard(&endpoint("a:1")) && !note.heard(&endpoint("b:1")));
        assert_eq!(contacts.changed().await, Some(Contact::Heard { endpoint: endpoint("b:1") }));
        let heard = contacts.clone().wait_for(|contact| matches!(contact, Contact::Heard { .. })).await;
        assert_eq!(heard, Some(contacts.now()));
        drop(note);
        assert_eq!(contacts.changed().await, None);
        assert_eq!(contacts.now(), Contact::Heard { endpoint: endpoint("b:1") });
    }
}
