//! Compiles the protocol definitions with protox, so that no `protoc` is needed.

use std::{env, fs, path::PathBuf};

const FILES: [&str; 7] = [
    "peer.proto",
    "call.proto",
    "sessions.proto",
    "pipeline.proto",
    "kv.proto",
    "admin.proto",
    "google/rpc/status.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .generate_default_stubs(true)
        // One list of reasons for all interfaces, with what each is there.
        .extern_path(".quorate.v1.Reason", "crate::reason::Reason")
        .codec_path("crate::proto::codec::BoundedCodec")
        .bytes(".")
        .compile_fds(descriptors)?;
    Ok(())
}
