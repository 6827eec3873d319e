//! The `shoal` command.
//!
//! [`run`] is the whole program but for the process: it takes arguments, writes to the handles it is given and answers
//! with an exit code, so that a test, the `shoal` binary and the Python package's launcher all call the same thing.
//! Exit codes: 0 done, 1 could not be done, 2 asked for wrongly or no configuration.

mod client;
mod disks;
mod doctor;
mod log;
mod orders;
mod serve;
mod simulate;

use std::io::Write;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Virtual memory for GPUs that serve language models.
#[derive(Debug, Parser)]
#[command(name = "shoal", version, disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the models of a configuration
    Serve {
        /// The configuration; by default ./shoal.toml, then shoal/shoal.toml in the user's config directory
        file: Option<PathBuf>,
        /// Only read the configuration and say what would be served
        #[arg(long)]
        check: bool,
    },
    /// Show the models: what they do, for how long, and where their bytes are
    #[command(visible_alias = "status")]
    Ps {
        #[command(flatten)]
        at: At,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Bring a model to the device
    Wake {
        model: String,
        #[command(flatten)]
        order: Order,
    },
    /// Take a model off the device
    Sleep {
        model: String,
        /// The part of its weights that stays, 0 to 1
        #[arg(long, default_value_t = 0.0, value_parser = part)]
        keep: f64,
        #[command(flatten)]
        order: Order,
    },
    /// Keep a model on the device; one that is asleep is brought back meanwhile (`ps` shows when it is there)
    Pin {
        model: String,
        #[command(flatten)]
        order: Order,
    },
    /// Let a pinned model go again
    Unpin {
        model: String,
        #[command(flatten)]
        order: Order,
    },
    /// Say why a model is as it is: how it stands, and what was decided about it
    Why {
        model: String,
        /// The newest so many decisions
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(0..=1000))]
        last: u16,
        #[command(flatten)]
        at: At,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Have the server read its configuration again; only what changed is touched
    Reload {
        #[command(flatten)]
        order: Order,
    },
    /// Print everything the server knows, as JSON
    State {
        #[command(flatten)]
        at: At,
    },
    /// Play requests in virtual time against a configuration: who would wait, and how much would move
    Simulate(Box<simulate::SimulateArguments>),
    /// Check this machine, each thing with its remedy
    Doctor {
        /// The configuration to check too; looked for as `serve` does
        file: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Which server.
#[derive(Debug, clap::Args)]
struct At {
    /// The server's address, such as `http://127.0.0.1:8000`; by default the one of this runtime directory
    #[arg(long, value_name = "URL", env = "SHOAL_SERVER")]
    server: Option<String>,
    /// A file whose first key is shown to the server; else `SHOAL_API_KEY`
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct Order {
    #[command(flatten)]
    at: At,
    /// How long to wait for it, in seconds
    #[arg(long, default_value_t = 120.0, value_parser = seconds)]
    wait: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn between(text: &str, most: f64) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    if (0.0..=most).contains(&value) { Ok(value) } else { Err(format!("must lie between 0 and {most}")) }
}

fn part(text: &str) -> Result<f64, String> {
    between(text, 1.0)
}

fn seconds(text: &str) -> Result<f64, String> {
    between(text, 3600.0)
}

/// Where a command writes.
type Out<'a> = &'a mut (dyn Write + Send);

/// Why a command could not be carried out, in a sentence.
#[derive(Debug)]
struct Failure {
    code: i32,
    message: String,
}

impl Failure {
    fn new(message: impl Into<String>) -> Self {
        Self { code: 1, message: message.into() }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        // Whoever closed our output has read enough.
        let code = i32::from(error.kind() != std::io::ErrorKind::BrokenPipe);
        Self { code, message: error.to_string() }
    }
}

/// Carries a command out; `args` begins with the program's name. Never ends the process.
#[must_use]
pub fn run(args: Vec<String>) -> i32 {
    run_to(args, &mut std::io::stdout(), &mut std::io::stderr())
}

/// [`run`] with other handles.
pub fn run_to(args: Vec<String>, out: &mut (dyn Write + Send), errors: &mut (dyn Write + Send)) -> i32 {
    let arguments = match Arguments::try_parse_from(args) {
        Ok(arguments) => arguments,
        Err(error) => {
            let text = error.render();
            let _ = if error.use_stderr() { write!(errors, "{text}") } else { write!(out, "{text}") };
            return error.exit_code();
        }
    };
    let done = match arguments.command {
        Command::Serve { file, check } => serve::serve(file.as_deref(), check, out, errors),
        Command::Ps { at, json } => orders::ps(&at, json, out),
        Command::Why { model, last, at, json } => orders::why(&model, last, &at, json, out),
        Command::Reload { order } => orders::reload(&order, out),
        Command::State { at } => orders::state(&at, out),
        Command::Wake { model, order } => orders::wake(&model, &order, out),
        Command::Sleep { model, keep, order } => orders::sleep(&model, keep, &order, out),
        Command::Pin { model, order } => orders::pin(&model, true, &order, out),
        Command::Unpin { model, order } => orders::pin(&model, false, &order, out),
        Command::Simulate(asked) => simulate::simulate(&asked, out, errors),
        Command::Doctor { file, json } => doctor::doctor(file.as_deref(), json, out),
    };
    let flushed = out.flush().map_err(Failure::from);
    match done.and(flushed) {
        Ok(()) => 0,
        Err(failure) => {
            if failure.code != 0 && !failure.message.is_empty() {
                let _ = writeln!(errors, "shoal: {}", failure.message);
            }
            failure.code
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(args: &[&str]) -> (i32, String, String) {
        let (mut out, mut errors) = (Vec::new(), Vec::new());
        let args = std::iter::once("shoal").chain(args.iter().copied()).map(str::to_owned).collect();
        let code = run_to(args, &mut out, &mut errors);
        (code, String::from_utf8_lossy(&out).into_owned(), String::from_utf8_lossy(&errors).into_owned())
    }

    #[test]
    fn arguments_are_what_they_should_be() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
        let (code, out, _) = said(&["--help"]);
        assert_eq!(code, 0);
        for command in
            ["serve", "ps", "wake", "sleep", "pin", "unpin", "why", "reload", "doctor", "state", "simulate"]
        {
            assert!(out.contains(&format!("\n  {command} ")), "{command} is not in\n{out}");
        }
        assert_eq!(said(&["--version"]).1.trim(), format!("shoal {}", env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn wrong_arguments_are_refused_with_a_reason() {
        for (args, expected) in [
            (vec![], "Usage: shoal <COMMAND>"),
            (vec!["sing"], "unrecognized subcommand 'sing'"),
            (vec!["wake"], "<MODEL>"),
            (vec!["sleep", "chat", "--keep", "2"], "must lie between 0 and 1"),
            (vec!["sleep", "chat", "--keep", "x"], "is not a number"),
            (vec!["wake", "chat", "--wait=-1"], "must lie between 0 and 3600"),
            (vec!["slep", "chat"], "a similar subcommand exists: 'sleep'"),
        ] {
            let (code, out, errors) = said(&args);
            assert_eq!((code, out.as_str()), (2, ""), "{args:?}");
            assert!(errors.contains(expected), "{args:?} said {errors}");
        }
    }

    #[test]
    fn a_server_that_is_not_there_is_told_apart() {
        let (code, _, errors) = said(&["ps", "--server", "http://127.0.0.1:1"]);
        assert_eq!(code, 1);
        assert!(errors.contains("nothing answers at http://127.0.0.1:1"), "{errors}");
        for wrong in ["https://127.0.0.1:1", "127.0.0.1", "http://", "http://host/path?x"] {
            let (code, _, errors) = said(&["ps", "--server", wrong]);
            assert_eq!(code, 1, "{wrong}");
            assert!(errors.contains("is not a server's address"), "{wrong}: {errors}");
        }
    }

    #[test]
    fn a_check_tells_of_models_that_cannot_be_served() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("shelf.toml");
        let header = r#"{"w":{"dtype":"F32","shape":[25165824],"data_offsets":[0,100663296]}}"#;
        let mut weights = (header.len() as u64).to_le_bytes().to_vec();
        weights.extend(header.as_bytes());
        std::fs::create_dir(dir.path().join("big")).expect("made");
        std::fs::write(dir.path().join("big/model.safetensors"), weights).expect("written");
        let check = |budget: &str, models: &str| {
            let text = format!("[server]\ndevice = 'sim'\ndevice_budget = '{budget}'\n{models}");
            std::fs::write(&file, text).expect("written");
            said(&["serve", "--check", file.to_str().expect("text")])
        };
        let big = "[[model]]\nname = 'big'\nsource = './big'\n";
        let gone = "[[model]]\nname = 'gone'\nsource = './gone'\n";
        let (code, _, errors) = check("96MiB", big);
        assert_eq!(code, 0, "exactly enough: {errors}");
        let (code, out, errors) = check("64MiB", &format!("{big}{gone}"));
        assert_eq!(code, 2, "{errors}");
        for expected in [
            "need 100663296 bytes of device memory (96 MiB), and device_budget is 67108864 bytes",
            "there is no /",
        ] {
            assert!(errors.contains(expected) && out.contains(expected), "{out}{errors}");
        }
        let (code, _, errors) = check("96MiB", &format!("{big}max = '90MiB'\n"));
        assert_eq!(code, 2, "{errors}");
        assert!(errors.contains("and its max is 94371840 bytes (90 MiB)"), "{errors}");
    }

    #[test]
    fn a_configuration_can_be_checked_without_serving_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("shelf.toml");
        std::fs::write(
            &file,
            "[server]\ndevice = 'sim'\ndevice_budget='64MiB'\n[[model]]\nname='a'\nsource='x/y'\n",
        )
        .expect("written");
        let path = file.to_str().expect("text");
        let (code, out, errors) = said(&["serve", "--check", path]);
        assert_eq!(code, 0, "{errors}");
        assert!(out.contains("64 MiB") && out.contains("simulated"), "{out}");
        std::fs::write(&file, "[server]\ndevise = 'sim'\n").expect("written");
        let (code, _, errors) = said(&["serve", path]);
        assert_eq!(code, 2);
        assert!(
            errors.contains("shelf.toml:2:1: unknown key `devise`") && errors.contains("`device`?"),
            "{errors}"
        );
        let (code, _, errors) = said(&["serve", "/nowhere/shelf.toml"]);
        assert_eq!(code, 2);
        assert!(errors.contains("/nowhere/shelf.toml: No such file"), "{errors}");
    }
}
