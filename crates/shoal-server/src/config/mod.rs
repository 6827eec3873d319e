//! What `shoal.toml` says, typed.
//!
//! Two steps, apart so that the first can be fuzzed and the second tested without a machine: [`parse()`] turns text into
//! a [`ShoalFile`] and finds every mistake that the text alone shows; [`ShoalFile::resolve`] turns that into a
//! [`ServerConfig`] with the help of [`Surroundings`] (directories, memory, devices), which is all the rest of the server
//! sees. Every mistake is named with its line, all of them at once, and an unknown key with the nearest right one.
//!
//! Leaves to others: whether a model's files are good (the worker says; only their sizes are looked at here), whether the
//! address is free (the server binds).

mod command;
mod directories;
mod disk;
mod error;
mod fingerprint;
mod gpu;
mod host_tier;
mod keys;
mod locate;
mod models;
mod parse;
mod patience;
mod remote;
mod resolve;
mod sharing;
mod simulation;
mod surroundings;
mod template;
#[cfg(test)]
mod tests;
mod tier_use;
mod vllm;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shoal_core::bytes::ByteCount;
use shoal_device::HostBacking;

pub use command::{CommandConfig, CommandSection};
pub use directories::make_private;
pub use error::{ConfigError, Problem, ProblemKind};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use gpu::read_listing;
pub use gpu::{DRIVER_MIN, Gpu, Gpus};
pub use host_tier::HostTier;
pub(crate) use host_tier::with_parts;
pub use locate::{SAMPLE, find_file};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use models::tensor_bytes;
pub use parse::{ModelSection, ServerSection, ShoalFile, Sited, parse};
pub use patience::Patience;
pub use remote::RemoteConfig;
pub(crate) use sharing::OUTSIDE;
pub use sharing::{Sharing, SharingSection, SleepDepth, is_outside};
pub(crate) use simulation::SimulatedConfig;
pub use surroundings::{Budgets, MachineMemory, Surroundings};
pub(crate) use template::TemplateKind;
pub use tier_use::TierUse;

/// The address served by default.
pub const LISTEN_DEFAULT: &str = "127.0.0.1:8000";
/// How long a busy model runs, by default, before it yields to one that waits.
pub const QUANTUM_DEFAULT: Duration = Duration::from_secs(3);
/// The shortest quantum: below it, models would do little but move.
pub const QUANTUM_MIN: Duration = Duration::from_millis(50);
/// The longest quantum.
pub const QUANTUM_MAX: Duration = Duration::from_hours(1);
/// How long workers wait, by default, for another server when theirs was killed.
pub const ORPHAN_WAIT_DEFAULT: Duration = Duration::from_secs(30);
/// The longest such wait.
pub const ORPHAN_WAIT_MAX: Duration = Duration::from_hours(1);
/// How long a prompt waits, by default, for what is on disk of it; what has not come by then is computed.
pub const DISK_WAIT_DEFAULT: Duration = Duration::from_secs(1);
/// The longest such wait: all requests of the model wait with it.
pub const DISK_WAIT_MAX: Duration = Duration::from_mins(1);
/// The name of the journal in the runtime directory.
const JOURNAL: &str = "journal";
/// How many requests a model answers at the same time, by default, while others wait for their turn.
pub const PARALLEL_DEFAULT: u32 = 64;
/// The longest model name.
pub const MODEL_NAME_BYTES_MAX: usize = 64;

/// Everything a server needs to begin. All paths are absolute, all defaults filled in.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// The file this came from.
    pub file: PathBuf,
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Keys that clients must show, one a line. Required for anything but loopback.
    pub api_key_file: Option<PathBuf>,
    /// Names by which the server may be called in a Host header, besides loopback's and the listening address.
    pub allowed_hosts: Vec<String>,
    /// What a request with one key has computed is not used again for requests with another.
    pub separate_keys: bool,
    /// The device; never [`DeviceChoice::Auto`] here.
    pub device: DeviceChoice,
    /// The GPU that workers see as [`device`](Self::device), by the driver's name for it; none for the simulated device.
    pub device_uuid: Option<String>,
    /// Device bytes that all models together may hold.
    pub device_budget: ByteCount,
    /// Device bytes beside those that are to stay free, for what nobody foresees.
    pub headroom: ByteCount,
    /// Host bytes that all models together may use for copies.
    pub host_budget: ByteCount,
    /// What memory of host copies is made of that the server lends to workers; `None`: they make their own.
    pub host_memory: Option<HostBacking>,
    /// How much of the host budget keeps KV that the device forgot.
    pub host_tier: HostTier,
    /// Directories of the disk tier.
    pub disk: Vec<DiskTier>,
    /// The key that what is on disk is encrypted with; none where it is not.
    pub disk_key_file: Option<PathBuf>,
    /// How long a prompt waits for what is on disk of it.
    pub disk_wait: Duration,
    /// How workers use the tiers below the device.
    pub tiers: TierUse,
    /// The models, in the file's order; names are unique.
    pub models: Vec<ModelConfig>,
    /// Sockets and `server.json` (0700).
    pub runtime_dir: PathBuf,
    /// What outlives a run.
    pub state_dir: PathBuf,
    /// What can be made again.
    pub cache_dir: PathBuf,
    /// Output of the workers, one file each.
    pub log_dir: PathBuf,
    /// The interpreter for models that name none: `SHOAL_PYTHON`, else `python3`.
    pub python: PathBuf,
    /// Bounds on what clients may ask.
    pub limits: Limits,
    /// How long a busy model runs before it yields to one that waits.
    pub quantum: Duration,
    /// Who decides how memory is shared.
    pub sharing: Sharing,
    /// How long workers wait for another server when this one was killed; zero: they end with it.
    pub orphan_wait: Duration,
    /// Our own workers are forked from a process that has imported what they need.
    pub fork_workers: bool,
    /// How long a worker may be silent before it is ended.
    pub patience: Patience,
    /// What the user should be told at start, a sentence each.
    pub notes: Vec<String>,
    /// Which models cannot be served and why, a sentence each, as far as their directories show.
    pub unservable: Vec<String>,
}

impl ServerConfig {
    /// Reads, parses and resolves `file`.
    ///
    /// # Errors
    /// [`ConfigError`], with every mistake found.
    pub fn load(file: &Path, surroundings: &Surroundings) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(file)
            .map_err(|source| ConfigError::Unreadable { file: file.to_owned(), source })?;
        let file = std::path::absolute(file)
            .map_err(|source| ConfigError::Unreadable { file: file.to_owned(), source })?;
        parse(&text)
            .and_then(|sections| sections.resolve(&file, surroundings))
            .map_err(|problems| ConfigError::Wrong { file, problems })
    }

    /// The socket where workers speak to the server.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.runtime_dir.join("control.sock")
    }

    /// The file that says which workers there are, for a server after this one.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.runtime_dir.join(JOURNAL)
    }

    /// The file that tells commands where the server is.
    #[must_use]
    pub fn server_json(&self) -> PathBuf {
        self.runtime_dir.join("server.json")
    }

    /// The model of that name.
    #[must_use]
    pub fn model(&self, name: &str) -> Option<&ModelConfig> {
        self.models.iter().find(|model| model.name == name)
    }

    /// What `model`'s worker is told of it (`WorkerSpec` in python/shoal/worker/spec.py).
    #[must_use]
    pub fn spec_of(&self, model: &ModelConfig) -> serde_json::Value {
        serde_json::json!({
            "source": model.source,
            "revision": model.revision,
            "dtype": model.dtype,
            "context": model.context,
            "prefix_caching": model.prefix_caching,
            "wake_check": model.wake_check,
            "device": self.device.to_string(),
            "device_bytes": self.device_budget,
            "device_bytes_max": model.max,
            "disk": self.disk_of(model),
            "disk_key_file": self.disk_key_file,
            "disk_wait_s": self.disk_wait.as_secs_f64(),
            "weights": self.weights_of(model),
            "remote": self.remote_of(model),
            "tier_load": self.tiers.load(),
            "tier_idle_s": self.tiers.idle.map(|idle| idle.as_secs_f64()),
        })
    }

    /// The interpreter that runs `model`'s worker.
    #[must_use]
    pub fn python_of<'a>(&'a self, model: &'a ModelConfig) -> &'a Path {
        model.python.as_deref().unwrap_or(&self.python)
    }
}

/// One `[[model]]`.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "keys that do not exclude one another")]
pub struct ModelConfig {
    /// What clients call it: letters, digits, `.`, `_`, `-`, `:`; safe as part of a file's name.
    pub name: String,
    /// A directory (absolute by now) or a hub id.
    pub source: String,
    /// Branch, tag or commit of a hub id.
    pub revision: Option<String>,
    /// What runs it.
    pub engine: Engine,
    /// The interpreter for its worker, where it brings its own.
    pub python: Option<PathBuf>,
    /// Environment added for its worker.
    pub env: BTreeMap<String, String>,
    /// Arguments added for its worker; vLLM's own for [`Engine::Vllm`], those of the program for [`Engine::Command`], the
    /// whole command for [`Engine::Worker`].
    pub args: Vec<String>,
    /// `"float32"`, `"bfloat16"`, `"float16"`; what its files say by default.
    pub dtype: Option<String>,
    /// Longest prompt plus answer, in tokens.
    pub context: Option<u32>,
    /// KV of a prompt's beginning is used again for prompts that begin alike.
    pub prefix_caching: bool,
    /// Once its weights have come back, a token is computed that is known; only [`Engine::Vllm`] does it.
    pub wake_check: bool,
    /// Its weights stay on the device.
    pub pin: bool,
    /// Device bytes it can always have.
    pub min: Option<ByteCount>,
    /// Device bytes it can have at most.
    pub max: Option<ByteCount>,
    /// Higher yields later; 0 by default.
    pub priority: i32,
    /// Put to sleep after so many idle seconds; by default only when another model needs the memory.
    pub keep_alive_s: Option<u64>,
    /// The program, for [`Engine::Command`].
    pub command: Option<CommandConfig>,
    /// The most requests that it has at the same time; others wait for their turn.
    pub parallel_max: u32,
    /// Brought to the device before anybody asks for it, as long as nobody has to give anything up for it.
    pub preload: bool,
    /// How deep it may sleep.
    pub sleep: SleepDepth,
    /// Models that are never on the device beside it; holds both ways.
    pub apart: Vec<String>,
    /// What its weights take, where the headers of its files tell before any worker starts.
    pub weights: Option<ByteCount>,
}

impl ModelConfig {
    /// A model of which only this much is said.
    #[must_use]
    pub fn new(name: impl Into<String>, source: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            source: source.into(),
            revision: None,
            engine: Engine::default(),
            python: None,
            env: BTreeMap::new(),
            args: Vec::new(),
            dtype: None,
            context: None,
            prefix_caching: true,
            wake_check: false,
            pin: false,
            min: None,
            max: None,
            priority: 0,
            keep_alive_s: None,
            command: None,
            parallel_max: PARALLEL_DEFAULT,
            preload: false,
            sleep: SleepDepth::default(),
            apart: Vec::new(),
            weights: None,
        }
    }
}

/// What runs a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// `python -m shoal.worker`, transformers underneath.
    #[default]
    Transformers,
    /// `python -m shoal.vllm.serve`, vLLM's own API server and engine underneath.
    Vllm,
    /// Any program that speaks OpenAI's API: started and stopped as it is needed.
    Command,
    /// `args` is a command that speaks the control protocol, as our own workers do.
    Worker,
}

impl Engine {
    /// As written in the file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Transformers => "transformers",
            Self::Vllm => "vllm",
            Self::Command => "command",
            Self::Worker => "worker",
        }
    }
}

/// `device = "auto|sim|cuda:N"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The GPU where there is one, else the simulated device.
    #[default]
    Auto,
    /// The simulated device: RAM.
    Sim,
    /// An NVIDIA GPU by its ordinal.
    Cuda(u32),
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Sim => f.write_str("sim"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// `host_memory = "auto|shared|private"`: who makes memory for host copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostMemory {
    /// The server where the machine has huge pages for shared memory, else each worker.
    #[default]
    Auto,
    /// The server, with small pages where there are no huge ones.
    Shared,
    /// Each worker.
    Private,
}

impl HostMemory {
    /// What the server makes it of. `huge` is what there is with huge pages.
    #[must_use]
    pub fn backing(self, huge: Option<HostBacking>) -> Option<HostBacking> {
        match self {
            Self::Auto => huge,
            Self::Shared => Some(huge.unwrap_or(HostBacking::SharedHugePages)),
            Self::Private => None,
        }
    }
}

/// One entry of `disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskTier {
    /// A directory of the tier's own.
    pub path: PathBuf,
    /// The most it may hold there, all models together.
    pub bytes: ByteCount,
    /// The most that is written to it in an hour, so that the disk lasts.
    pub write_bytes_per_hour: ByteCount,
    /// The most that weights take there beside `bytes`, so that models start from it; none where they are not kept.
    pub weights: Option<ByteCount>,
}

/// Bounds on what clients may ask; every one has a default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest request body under `/v1`.
    pub request_bytes_max: ByteCount,
    /// The longest a request may wait for its model.
    pub wait_max: Duration,
    /// The most requests that may wait for one model.
    pub parked_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { request_bytes_max: ByteCount::mib(32), wait_max: Duration::from_mins(5), parked_max: 256 }
    }
}
