//! The examples do what they say.

#![allow(missing_docs)]

#[path = "../docs/examples/counter.rs"]
mod counter;
#[path = "../docs/examples/lease.rs"]
mod lease;
#[path = "../docs/examples/queue.rs"]
mod queue;

#[test]
fn counter() {
    counter::main().unwrap();
}

#[test]
fn lease() {
    lease::main().unwrap();
}

#[test]
fn queue() {
    queue::main().unwrap();
}
