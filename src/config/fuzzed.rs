//! What a configuration may say, from any bytes: see [`crate::fuzzing`].

use std::path::Path;

use super::{GivenSettings, ServeConfig};

/// A file, as TOML and as YAML. What is taken is judged, too.
pub(crate) fn file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for name in ["node.toml", "node.yaml"] {
        let Ok(settings) = GivenSettings::parse(Path::new(name), text) else { continue };
        if let Ok(config) = ServeConfig::resolve(settings) {
            let _ = config.validate();
        }
    }
}
