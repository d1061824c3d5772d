//! Where a node keeps its data when it was not told.
//!
//! Not in the directory that it happens to be started in: started in another one, it would form another cluster, and
//! nobody would notice that the data are not there.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{SettingsError, invalid};

/// Where earlier versions kept it: in the directory they were started in.
const FORMER: &str = "quorate-node";

/// The data directory called `name` of the user whose environment `variable` shows: below `XDG_DATA_HOME`, or
/// below `HOME/.local/share`.
///
/// # Errors
/// [`SettingsError::Invalid`] when neither is set, or when an earlier version's directory is in the present one: then it
/// must be said which is meant.
pub(super) fn usual(
    name: &str,
    variable: impl Fn(&str) -> Option<OsString>,
    here: &Path,
) -> Result<PathBuf, SettingsError> {
    let former = here.join(FORMER);
    let is_there = match former.join("identity.json").try_exists() {
        // This user cannot have kept anything there.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => false,
        Err(error) => {
            return Err(invalid(format!(
                "it cannot be told whether {} holds the data of a node: {error}; name a directory with --data-dir",
                former.display()
            )));
        }
        Ok(is_there) => is_there,
    };
    if is_there {
        return Err(invalid(format!(
            "{} holds the data of a node, from when that was the place for it; name it with --data-dir {FORMER}, or move it away",
            former.display()
        )));
    }
    let absolute = |set: &str| variable(set).map(PathBuf::from).filter(|path| path.is_absolute());
    let data = absolute("XDG_DATA_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/share")));
    match data {
        Some(data) => Ok(data.join("quorate").join(name)),
        None => Err(invalid(
            "--data-dir is not given, and neither XDG_DATA_HOME nor HOME says where this user keeps data; name a directory",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_directory_is_the_same_wherever_a_node_is_started() {
        let here = tempfile::tempdir().unwrap();
        let of = |set: &'static [(&str, &str)]| {
            let variable =
                |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
            usual("node-3", variable, here.path())
        };
        assert_eq!(of(&[("HOME", "/home/u")]).unwrap(), Path::new("/home/u/.local/share/quorate/node-3"));
        let both = of(&[("HOME", "/home/u"), ("XDG_DATA_HOME", "/data")]).unwrap();
        assert_eq!(both, Path::new("/data/quorate/node-3"));
        let relative = of(&[("HOME", "/home/u"), ("XDG_DATA_HOME", "data")]).unwrap();
        assert_eq!(relative, Path::new("/home/u/.local/share/quorate/node-3"));
        assert!(of(&[]).unwrap_err().to_string().contains("--data-dir"));
        std::fs::create_dir(here.path().join(FORMER)).unwrap();
        assert!(of(&[("HOME", "/h")]).is_ok(), "an empty directory of that name says nothing");
        let identity = here.path().join(FORMER).join("identity.json");
        std::os::unix::fs::symlink("identity.json", &identity).unwrap();
        let unknown = of(&[("HOME", "/h")]).unwrap_err().to_string();
        assert!(unknown.contains("cannot be told") && unknown.contains("--data-dir"), "{unknown}");
        std::fs::remove_file(&identity).unwrap();
        std::fs::write(identity, "{}").unwrap();
        assert!(of(&[("HOME", "/h")]).unwrap_err().to_string().contains("--data-dir quorate-node"));
    }
}
