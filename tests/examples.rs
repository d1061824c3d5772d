//! The examples do what they say.

#![allow(missing_docs)]

#[path = "../docs/examples/counter.rs"]
mod counter;

#[test]
fn counter() {
    counter::main().unwrap();
}
