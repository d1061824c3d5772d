//! The examples do what they say.

#![allow(missing_docs)]

#[path = "../docs/examples/counter.rs"]
mod counter;
#[path = "../docs/examples/lease.rs"]
mod lease;

#[test]
fn counter() {
    counter::main().unwrap();
}

#[test]
fn lease() {
    lease::main().unwrap();
}
