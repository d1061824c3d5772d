//! The code in `proto/generated` is that of the definitions.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use prost_types::FileDescriptorSet;

const FILES: [&str; 8] = [
    "peer.proto",
    "call.proto",
    "sessions.proto",
    "pipeline.proto",
    "kv.proto",
    "admin.proto",
    "replication.proto",
    "google/rpc/status.proto",
];

const SOURCES: &str = env!("CARGO_MANIFEST_DIR");

/// Writes the code, the descriptors that servers tell, and of which definitions they are, to the directory `out`.
fn generate(out: &Path) {
    let source = |name| (name, crc32fast::hash(&fs::read(Path::new(SOURCES).join(name)).unwrap()));
    let sources: String = FILES.map(source).iter().map(|(name, crc)| format!("{name} {crc:08x}\n")).collect();
    fs::write(out.join("sources.txt"), sources).unwrap();
    let descriptors = protox::compile(FILES, [SOURCES]).unwrap();
    fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors)).unwrap();
    fs::write(out.join("rpc.rs"), rpcs(&descriptors)).unwrap();
    tonic_prost_build::configure()
        .out_dir(out)
        .emit_rerun_if_changed(false)
        .generate_default_stubs(true)
        // One list of reasons for all interfaces, with what each is there.
        .extern_path(".quorate.v1.Reason", "crate::reason::Reason")
        // Rare, and large where it would be in every failure.
        .boxed(".quorate.v1.Failure.unconfirmed")
        .codec_path("crate::proto::codec::BoundedCodec")
        // The messages are always there, for any transport; what needs tonic is not.
        .client_mod_attribute("quorate.peer.v1", "#[cfg(feature = \"peers\")]")
        .server_mod_attribute("quorate.peer.v1", "#[cfg(feature = \"peers\")]")
        .client_mod_attribute("quorate.v1", "#[cfg(feature = \"client\")]")
        .server_mod_attribute("quorate.v1", "#[cfg(feature = \"server\")]")
        .client_mod_attribute("replication", "#[cfg(feature = \"client\")]")
        .server_mod_attribute("replication", "#[cfg(feature = \"server\")]")
        .bytes(".")
        .compile_fds(descriptors)
        .unwrap();
}

/// An enum of all that can be called at a client port, so that what is said of calls is said of each.
fn rpcs(descriptors: &FileDescriptorSet) -> String {
    let mut found = Vec::new();
    // Peers have a port of their own.
    for file in descriptors.file.iter().filter(|file| file.package() != "quorate.peer.v1") {
        for service in &file.service {
            for method in &service.method {
                let name = format!("{}{}", service.name(), method.name());
                found.push((name, format!("/{}.{}/{}", file.package(), service.name(), method.name())));
            }
        }
    }
    let lines = |line: fn(&(String, String)) -> String| found.iter().map(line).collect::<String>();
    let mut code = "/// A method of a service at the client port.\n".to_owned();
    code += "#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]\npub enum Rpc {\n";
    code += &lines(|(name, _)| format!("    {name},\n"));
    code += "}\n\nimpl Rpc {\n    /// All of them.\n    pub const ALL: &'static [Self] = &[\n";
    code += &lines(|(name, _)| format!("        Self::{name},\n"));
    code += "    ];\n\n    /// Where it is called.\n    pub const fn path(self) -> &'static str {\n        match self {\n";
    code += &lines(|(name, path)| format!("            Self::{name} => \"{path}\",\n"));
    code += "        }\n    }\n\n    /// The one that is called at `path`.\n    pub fn of_path(path: &str) -> Option<Self> {\n        match path {\n";
    code += &lines(|(name, path)| format!("            \"{path}\" => Some(Self::{name}),\n"));
    code + "            _ => None,\n        }\n    }\n}\n"
}

fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn the_code_is_that_of_the_definitions() {
    let kept = Path::new(SOURCES).join("generated");
    if std::env::var_os("QUORATE_WRITE_PROTOCOL").is_some() {
        generate(&kept);
    }
    let now = tempfile::tempdir().unwrap();
    generate(now.path());
    let (now, kept) = (files(now.path()), files(&kept));
    assert_eq!(kept.keys().collect::<Vec<_>>(), now.keys().collect::<Vec<_>>());
    for (name, bytes) in kept {
        assert!(bytes == now[&name], "{name} is out of date; see proto/src/lib.rs");
    }
}
