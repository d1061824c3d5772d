//! The examples do what they say.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // a test that cannot go on fails, on a real clock

#[path = "../../docs/examples/counter.rs"]
mod counter;
mod from_any_node;
mod guide;
#[allow(dead_code)] // a program has a main, which these tests do without
#[path = "../../docs/examples/jobs.rs"]
mod jobs;
mod machine;
mod operated;
mod pages;
#[path = "../../docs/examples/queue.rs"]
mod queue;
mod three_processes;

#[test]
fn counter() {
    counter::main().unwrap();
}

#[test]
fn queue() {
    queue::main().unwrap();
}
