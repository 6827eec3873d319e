//! `engine = "command"`: any program that speaks OpenAI's API, and what it takes to start and stop it.
//!
//! Apart because none of it is said of other engines, and all of it is said of this one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use shoal_core::bytes::ByteCount;
use toml::de::DeTable;

use super::Engine;
use super::error::ProblemKind;
use super::parse::{Reader, Sited, Value, nonempty};

/// Keys of `[[model]]` that only a command has.
pub(super) const COMMAND_KEYS: [&str; 7] =
    ["command", "port", "socket", "health", "ready_s_max", "stop_s_max", "device_bytes"];
const HEALTH_DEFAULT: &str = "/health";
const READY_DEFAULT: Duration = Duration::from_mins(10);
const STOP_DEFAULT: Duration = Duration::from_secs(10);
/// Longer would only hide that it does not end.
const STOP_S_MAX: u64 = 600;

/// As written.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "each field is the key of the same name; see CommandConfig")]
pub struct CommandSection {
    pub command: Option<Sited<String>>,
    pub port: Option<u16>,
    pub socket: bool,
    pub health: Option<String>,
    pub ready_s_max: Option<u64>,
    pub stop_s_max: Option<u64>,
    pub device_bytes: Option<ByteCount>,
}

/// A program that speaks OpenAI's API.
///
/// `{port}`, `{socket}` and `{model}` in its arguments and its environment are filled in when it is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandConfig {
    /// Looked up in `PATH`, or absolute.
    pub program: PathBuf,
    /// The port it listens at on 127.0.0.1; by default a free one at each start.
    pub port: Option<u16>,
    /// It listens at a Unix socket instead.
    pub socket: bool,
    /// What answers 200 to a GET once it is ready.
    pub health: String,
    /// The longest from its start to that.
    pub ready_max: Duration,
    /// How long it may take to end after SIGTERM.
    pub stop_max: Duration,
    /// Device bytes it is charged with while it runs.
    pub device_bytes: ByteCount,
}

impl CommandSection {
    /// Reads the keys; says which are missing, and which belong to no other engine.
    pub(super) fn read<'i>(
        reader: &mut Reader<'i>,
        whole: &Value<'i>,
        table: &DeTable<'i>,
        engine: Engine,
        args: &[String],
        section: &str,
    ) -> Option<Self> {
        if engine != Engine::Command {
            for key in COMMAND_KEYS {
                if let Some(value) = table.get(key) {
                    let why = format!("is for engine = \"command\", and this engine is {:?}", engine.name());
                    reader.bad(value, key, why);
                }
            }
            return None;
        }
        for key in ["command", "device_bytes"] {
            if !table.contains_key(key) {
                reader.complain(whole.span(), ProblemKind::Missing { key, section: section.to_owned() });
            }
        }
        let read = Self {
            command: reader.parsed(table, "command", |text| nonempty(text).map(str::to_owned)),
            port: reader.whole(table, "port").and_then(|port| reader.port(table, port)),
            socket: reader.boolean(table, "socket"),
            health: reader.parsed(table, "health", health).map(|health| health.value),
            ready_s_max: reader.seconds(table, "ready_s_max"),
            stop_s_max: reader.seconds(table, "stop_s_max"),
            device_bytes: reader.size(table, "device_bytes").map(|bytes| bytes.value),
        };
        let env = table.get("env").map(|env| format!("{:?}", env.get_ref())).unwrap_or_default();
        let mentions = |word: &str| env.contains(word) || args.iter().any(|arg| arg.contains(word));
        let complaint = if read.socket && read.port.is_some() {
            Some("`socket` and `port` exclude each other")
        } else if read.socket && !mentions("{socket}") {
            Some(
                "nothing tells the command its socket: write {socket} where its path belongs, in `args` or `env`",
            )
        } else if !read.socket && read.port.is_none() && !mentions("{port}") {
            Some(
                "nothing tells the command its port: write {port} where it belongs, in `args` or `env`, or set `port`",
            )
        } else if read.stop_s_max.is_some_and(|seconds| seconds > STOP_S_MAX) {
            Some("`stop_s_max` may be ten minutes at most")
        } else {
            None
        };
        if let (Some(why), Some(value)) = (complaint, table.get("command")) {
            reader.bad(value, "command", why);
        }
        Some(read)
    }

    /// Fills in what is open; the program's path as the file's directory has it.
    pub(super) fn resolve(self, absolute: impl Fn(&Path) -> PathBuf) -> CommandConfig {
        let program = PathBuf::from(self.command.map(|command| command.value).unwrap_or_default());
        let is_bare = program.components().count() == 1 && !program.starts_with("~");
        CommandConfig {
            program: if is_bare { program } else { absolute(&program) },
            port: self.port,
            socket: self.socket,
            health: self.health.unwrap_or_else(|| HEALTH_DEFAULT.to_owned()),
            ready_max: self.ready_s_max.map_or(READY_DEFAULT, Duration::from_secs),
            stop_max: self.stop_s_max.map_or(STOP_DEFAULT, Duration::from_secs),
            device_bytes: self.device_bytes.unwrap_or_default(),
        }
    }
}

fn health(text: &str) -> Result<String, String> {
    let text = nonempty(text)?;
    if text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err(format!("{text:?} is not a path, such as \"/health\""))
    }
}
