//! Where settings come from, and what is refused, in scripts: `tests/golden/scripts/settings`.

use goldenscript::{Context, Runner};

use super::*;
use crate::golden::{Told, scripts};

#[derive(goldenscript::Command)]
enum Step {
    /// From now on there is a file of settings with this name, and these lines.
    File { name: String, lines: Vec<String> },
    /// From now on the environment says this.
    Environment(BTreeMap<String, String>),
    /// A node is started with these flags: which settings are not as by default.
    Serve(#[arg(optional)] Vec<String>),
}

#[derive(Default)]
struct Shell {
    file: Option<(tempfile::TempDir, PathBuf)>,
    environment: BTreeMap<String, String>,
}

impl Shell {
    /// What the command line makes of flags and environment. A value of the environment is given as a default, which stands below a
    /// flag as well: the environment itself is that of all tests.
    fn args(&self, given: &[String]) -> Result<ServeArgs, clap::Error> {
        let mut command = ServeArgs::augment_args(Command::new("serve").no_binary_name(true));
        for id in command.get_arguments().map(|arg| arg.get_id().clone()).collect::<Vec<_>>() {
            command = command.mut_arg(id, |arg| {
                let name = arg.get_env().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                let arg = arg.env(None::<&str>);
                match self.environment.get(&name).cloned() {
                    Some(value) => arg.default_value(value),
                    None => arg,
                }
            });
        }
        let config =
            self.file.iter().flat_map(|(_, path)| ["--config".to_owned(), path.display().to_string()]);
        let matches = command.try_get_matches_from(config.chain(given.iter().cloned()))?;
        ServeArgs::from_arg_matches(&matches)
    }

    fn serve(&self, given: &[String]) -> String {
        let args = match self.args(given) {
            Ok(args) => args,
            Err(error) => {
                return format!("refused: {}", error.to_string().lines().next().unwrap_or_default());
            }
        };
        match ServeConfig::load(args) {
            Ok(config) => {
                let default = lines(&ServeConfig::resolve(GivenSettings::default()).unwrap());
                let told: Vec<_> =
                    lines(&config).into_iter().filter(|line| !default.contains(line)).collect();
                if told.is_empty() { "all as by default".to_owned() } else { told.join("\n") }
            }
            Err(error) => {
                let directory = self.file.as_ref().map(|(dir, _)| format!("{}/", dir.path().display()));
                let told = error.to_string().replace(&directory.unwrap_or_default(), "");
                // All keys that there are would follow.
                let told = told.split_once(", expected one of").map_or(&*told, |(told, _)| told);
                format!("refused: {told}")
            }
        }
    }
}

/// A line for each setting, without where the data goes, which depends on the user.
fn lines(config: &ServeConfig) -> Vec<String> {
    let all = format!("{config:#?}");
    let of_interest = |line: &&str| line.contains(": ") && !line.ends_with('{') && !line.contains("data_dir");
    all.lines().map(|line| line.trim().trim_end_matches(',')).filter(of_interest).map(str::to_owned).collect()
}

impl Runner for Shell {
    type Command = Step;

    fn run(&mut self, step: &Step, _: &Context) -> Told {
        match step {
            Step::File { name, lines } => self.file = Some(file(name, &lines.join("\n"))),
            Step::Environment(said) => self.environment.extend(said.clone()),
            Step::Serve(given) => return Ok(self.serve(given)),
        }
        Ok(String::new())
    }
}

#[test]
fn scripts_of_settings() {
    scripts("settings", Shell::default);
}
