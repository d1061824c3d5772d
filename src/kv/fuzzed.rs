//! What a caller, a log or a snapshot may hold of keys and values, from any bytes: see [`crate::fuzzing`].

use bytes::Bytes;

use super::api::Method;
use super::calls;
use super::codec;
use super::machine::KvMachine;
use crate::door::Call;
use crate::machine::{StateMachine, encode};

const METHODS: [Method; 6] =
    [Method::Put, Method::Get, Method::Delete, Method::DeleteRange, Method::Range, Method::Txn];

/// A request: its method, then what a pipeline carries of it. What is taken is a command that the machine takes, too.
pub(crate) fn call(bytes: &[u8]) {
    let Some((method, payload)) = bytes.split_first() else { return };
    let method = METHODS[usize::from(*method) % METHODS.len()];
    let Ok(mut message) = codec::parse(method, Bytes::copy_from_slice(payload)) else { return };
    let _ = codec::take_options(&mut message);
    let Ok(decoded) = codec::decode(message) else { return };
    if let Ok((Call::Write(command), _)) = calls::call(decoded) {
        let encoded = encode(&command).expect("invariant: a command within the limits is encoded");
        let again = KvMachine::decode_command(KvMachine::VERSION, &encoded);
        assert_eq!(again.expect("invariant: what was encoded decodes"), command);
    }
}

/// A stored command: its version, then its bytes.
pub(crate) fn command(bytes: &[u8]) {
    let Some((version, encoded)) = bytes.split_first() else { return };
    let _ = KvMachine::decode_command(u32::from(*version), encoded);
}

/// A machine's part of a snapshot.
pub(crate) fn snapshot(mut bytes: &[u8]) {
    let _ = KvMachine::read_snapshot(KvMachine::VERSION, &mut bytes);
}
