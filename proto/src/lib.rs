//! The protocol of quorate: its definitions in `proto/`, and the code of them in `proto/generated`, which quorate includes.
//!
//! The code is kept under version control, so that programs that embed quorate, and those who only want to try it, build neither a
//! compiler of protocols nor its forty crates. For the same reason this is no member of the workspace. Whoever changes a
//! definition writes the code anew: `QUORATE_WRITE_PROTOCOL=1 cargo test --manifest-path proto/Cargo.toml`. Without the variable the
//! same test finds code that is out of date; `cargo test --test formats` in the workspace finds definitions that are newer.
