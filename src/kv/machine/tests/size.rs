//! How large the state is, and what commands add to it: which commands fit the quota depends on nothing else.

use super::*;

/// What an item of collection `c` of tenant `t` counts. Nodes must not differ in it, whatever their build.
fn counted(key: &[u8], value: &[u8], expires: bool) -> u64 {
    (4 + key.len() + 32 + value.len() + 128 + if expires { 64 } else { 0 }) as u64
}

fn grown(machine: &mut KvMachine, command: KvCommand) -> (u64, u64) {
    let growth = KvMachine::growth_bytes(&machine.view(), &command);
    assert!(growth <= KvMachine::most_growth_bytes(&command));
    let before = machine.view().state_bytes();
    machine.apply(&context(machine.state.next_revision + 1), command);
    assert_consistent(machine);
    (growth, machine.view().state_bytes().saturating_sub(before))
}

#[test]
fn an_item_counts_what_it_takes() {
    let mut machine = KvMachine::default();
    assert_eq!(machine.state_bytes(), Some(0));
    let item = counted(b"key", b"value", false);
    assert_eq!(grown(&mut machine, put("t", "c", b"key", b"value")), (item, item));
    assert_eq!(grown(&mut machine, put("t", "c", b"key", b"other")), (0, 0));
    assert_eq!(grown(&mut machine, put("t", "c", b"key", b"longer one")), (5, 5));
    assert_eq!(grown(&mut machine, put_expiring("c", b"key", b"longer one", 9)), (64, 64));
    assert_eq!(machine.state_bytes(), Some(counted(b"key", b"longer one", true)));
    assert_eq!(grown(&mut machine, put("t", "c", b"key", b"")), (0, 0));
    assert_eq!(machine.state_bytes(), Some(counted(b"key", b"", false)));
    assert_eq!(grown(&mut machine, delete("t", "c", b"key")), (0, 0));
    assert_eq!(machine.state_bytes(), Some(0));
}

#[test]
fn what_only_removes_always_fits() {
    for command in [delete("t", "c", b"k"), delete_range("c", b"", b"", 0), KvCommand::Expire] {
        assert_eq!(KvMachine::most_growth_bytes(&command), 0);
    }
    let mut machine = KvMachine::default();
    machine.apply(&context(1), put_expiring("c", b"a", b"v", 5));
    machine.apply(&context(2), put_expiring("c", b"b", b"v", 500));
    machine.apply(&at(3, 10), KvCommand::Expire);
    assert_eq!(machine.state_bytes(), Some(counted(b"b", b"v", true)));
}

#[test]
fn a_transaction_counts_the_branch_it_takes() {
    let exists = |key: &[u8]| compare(key, Condition::Version(Comparison::Greater, 0));
    let mut machine = KvMachine::default();
    machine.apply(&context(1), put("t", "c", b"a", &[0; 100]));
    let both =
        |key: &[u8]| txn(vec![exists(key)], vec![op_put(b"x", b"", 0)], vec![op_put(b"y", &[1; 50], 7)]);
    let (small, large) = (counted(b"x", b"", false), counted(b"y", &[1; 50], true));
    assert_eq!(KvMachine::most_growth_bytes(&both(b"a")), large);
    assert_eq!(grown(&mut machine, both(b"a")), (small, small));
    assert_eq!(grown(&mut machine, both(b"none")), (large, large));
    // What it deletes makes room, and a key that is written twice counts once.
    let exchange = vec![op_delete(b"a"), op_put(b"z", &[1; 99], 0), op_put(b"z", &[1; 100], 0)];
    assert_eq!(grown(&mut machine, txn(vec![], exchange, vec![])), (0, 0));
    let grows = vec![op_delete(b"z"), op_put(b"a", &[1; 103], 0)];
    assert_eq!(grown(&mut machine, txn(vec![], grows, vec![])), (3, 3));
}

#[test]
fn a_rejected_transaction_leaves_the_size_as_it_was() {
    let mut machine = KvMachine::default();
    machine.apply(&context(1), put("t", "c", b"a", &vec![0; MAX_VALUE_BYTES]));
    let before = machine.state_bytes();
    let reads = || op_get(b"a");
    let reply =
        machine.apply(&context(2), txn(vec![], vec![op_put(b"b", b"1", 0), reads(), reads()], vec![]));
    assert_eq!(reply, KvReply::Rejected(KvRejection::ResultsTooLong));
    assert_eq!(machine.state_bytes(), before);
    assert_consistent(&machine);
}

#[test]
fn a_snapshot_has_the_same_size() {
    let mut machine = KvMachine::default();
    machine.apply(&context(1), put("t", "c", b"a", b"value"));
    machine.apply(&context(2), put_expiring("c", b"b", b"value", 5));
    let restored = KvMachine::read_snapshot(0, &mut &*snapshot_of(&machine.view())).unwrap();
    assert_eq!(restored.state_bytes(), machine.state_bytes());
}
