//! What travels in `grpc-status-details-bin`: a `google.rpc.Status`, as generic clients expect, with our message in it.
//!
//! Versions before this one wrote the message alone, so both forms are read.

use bytes::Bytes;
use prost::Message;

use super::google::rpc::Status;
use super::{peer, v1};

/// Begins the name of every message in an `Any`.
const TYPE_URL: &str = "type.googleapis.com/";
const FAILURE: &str = "quorate.v1.Failure";
const REFUSAL: &str = "quorate.peer.v1.Refusal";

/// The details of a status with `failure`.
pub fn of_failure(failure: &v1::Failure) -> Bytes {
    pack(failure.code, &failure.message, FAILURE, failure)
}

/// The failure in the details of a status, if there is one.
pub fn failure(details: &[u8]) -> Option<v1::Failure> {
    unpack(details, FAILURE).filter(|failure| *failure != v1::Failure::default())
}

/// The details of a status of `code` with `refusal`.
pub fn of_refusal(code: i32, refusal: &peer::Refusal) -> Bytes {
    pack(code, &refusal.detail, REFUSAL, refusal)
}

/// The refusal in the details of a status, if there is one.
pub fn refusal(details: &[u8]) -> Option<peer::Refusal> {
    unpack(details, REFUSAL)
}

fn pack(code: i32, message: &str, name: &str, detail: &impl Message) -> Bytes {
    let detail = prost_types::Any { type_url: format!("{TYPE_URL}{name}"), value: detail.encode_to_vec() };
    Status { code, message: message.to_owned(), details: vec![detail] }.encode_to_vec().into()
}

fn unpack<M: Message + Default>(details: &[u8], name: &str) -> Option<M> {
    if details.is_empty() {
        return None;
    }
    let named = |any: &&prost_types::Any| any.type_url.contains('/');
    let ours = |any: &&prost_types::Any| any.type_url.rsplit('/').next() == Some(name);
    // The bare form may happen to read like a status, but not like one whose details have names.
    match Status::decode(details) {
        Ok(status) if status.details.iter().any(|any| named(&any)) => {
            M::decode(&*status.details.iter().find(ours)?.value).ok()
        }
        Ok(_) | Err(_) => M::decode(details).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent() -> v1::Failure {
        v1::Failure {
            code: 9,
            reason: v1::Reason::NotLeader.into(),
            message: "node 2 leads".to_owned(),
            leader: Some(v1::LeaderHint { node_id: 2, client: "b:7802".to_owned() }),
            first_revision: 7,
            ..Default::default()
        }
    }

    #[test]
    fn both_forms_of_a_failure_are_read() {
        assert_eq!(failure(&of_failure(&sent())), Some(sent()));
        assert_eq!(failure(&sent().encode_to_vec()), Some(sent()));
        // With as little in it as can be: nothing may make the bare form look like a status.
        for bare in [
            v1::Failure { message: "x".to_owned(), ..Default::default() },
            v1::Failure { code: 2, message: "type.googleapis.com/x".to_owned(), ..Default::default() },
            v1::Failure { code: 2, maybe_applied: true, ..Default::default() },
        ] {
            assert_eq!(failure(&bare.encode_to_vec()), Some(bare.clone()));
            assert_eq!(failure(&of_failure(&bare)), Some(bare));
        }
    }

    #[test]
    fn a_generic_client_finds_the_failure_in_the_status() {
        let status = Status::decode(of_failure(&sent())).unwrap();
        assert_eq!((status.code, status.message.as_str()), (9, "node 2 leads"));
        assert_eq!(status.details.len(), 1);
        assert_eq!(status.details[0].type_url, "type.googleapis.com/quorate.v1.Failure");
        assert_eq!(v1::Failure::decode(&*status.details[0].value).unwrap(), sent());
    }

    #[test]
    fn what_is_neither_is_nothing() {
        assert_eq!(failure(b""), None);
        assert_eq!(failure(&[255; 9]), None);
        let other = pack(3, "x", "google.rpc.BadRequest", &sent());
        assert_eq!(failure(&other), None);
    }

    #[test]
    fn both_forms_of_a_refusal_are_read() {
        let sent = peer::Refusal {
            reason: peer::refusal::Reason::CallerFenced.into(),
            detail: "fenced".to_owned(),
            known_incarnation: "00ff".to_owned(),
            membership_index: Some(4),
        };
        assert_eq!(refusal(&of_refusal(7, &sent)), Some(sent.clone()));
        assert_eq!(refusal(&sent.encode_to_vec()), Some(sent));
    }
}
