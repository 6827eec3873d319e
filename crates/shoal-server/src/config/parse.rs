//! Text to sections: pure, total, and with a line for every complaint.
//!
//! The TOML tree is walked by hand instead of through serde, because serde stops at the first mistake and knows neither
//! the line of an unknown key nor the key that was meant.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use shoal_core::bytes::ByteCount;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{Problem, ProblemKind};
use super::keys::{MODEL_KEYS, SERVER_KEYS, TOP_KEYS};
use super::patience::Patience;
use super::sharing::{Sharing, SharingSection};
use super::tier_use::TierUse;
use super::{
    CommandSection, DISK_WAIT_MAX, DeviceChoice, DiskTier, Engine, HostMemory, HostTier,
    MODEL_NAME_BYTES_MAX, ORPHAN_WAIT_MAX, QUANTUM_MAX, QUANTUM_MIN, host_tier, vllm,
};

/// A value and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sited<T> {
    /// The value.
    pub value: T,
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
}

impl<T> Sited<T> {
    pub(super) fn problem(&self, kind: ProblemKind) -> Problem {
        Problem { line: self.line, column: self.column, kind }
    }
}

/// What the file says, before defaults, directories and the machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ShoalFile {
    /// `[server]`.
    pub server: ServerSection,
    /// Every `[[model]]`, in order.
    pub models: Vec<ModelSection>,
}

/// `[server]` as written.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "each field is the key of the same name; see ServerConfig")]
pub struct ServerSection {
    pub listen: Option<Sited<SocketAddr>>,
    pub api_key_file: Option<Sited<PathBuf>>,
    pub allowed_hosts: Vec<String>,
    pub separate_keys: Option<Sited<bool>>,
    pub device: Option<Sited<DeviceChoice>>,
    pub device_budget: Option<Sited<ByteCount>>,
    pub headroom: Option<ByteCount>,
    pub host_budget: Option<Sited<ByteCount>>,
    pub host_memory: Option<HostMemory>,
    pub host_tier: Option<Sited<HostTier>>,
    pub disk: Vec<Sited<DiskTier>>,
    pub disk_key_file: Option<Sited<PathBuf>>,
    pub disk_wait: Option<Duration>,
    pub tiers: TierUse,
    pub request_bytes_max: Option<ByteCount>,
    pub wait_s_max: Option<u64>,
    pub parked_max: Option<u32>,
    pub quantum: Option<Duration>,
    pub sharing: Sharing,
    pub orphan_s_max: Option<u64>,
    pub fork_workers: Option<bool>,
    pub patience: Patience,
}

/// `[[model]]` as written.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each field is the key of the same name; see ModelConfig")]
pub struct ModelSection {
    pub name: Sited<String>,
    pub source: Sited<String>,
    pub revision: Option<String>,
    pub engine: Option<Sited<Engine>>,
    pub python: Option<PathBuf>,
    pub env: BTreeMap<String, String>,
    pub args: Vec<String>,
    pub dtype: Option<String>,
    pub context: Option<u32>,
    pub prefix_caching: bool,
    pub wake_check: bool,
    pub pin: bool,
    pub min: Option<Sited<ByteCount>>,
    pub max: Option<Sited<ByteCount>>,
    pub priority: i32,
    pub keep_alive_s: Option<u64>,
    pub command: Option<CommandSection>,
    pub parallel_max: Option<u32>,
    pub sharing: SharingSection,
}

const DISK_KEYS: [&str; 4] = ["path", "bytes", "write_bytes_per_hour", "weights"];
const DISK_KEYS_NEEDED: [&str; 2] = ["path", "bytes"];
const DTYPES: [&str; 4] = ["auto", "float32", "bfloat16", "float16"];

/// Reads a `shoal.toml`. Pure: the same text always gives the same answer, and no text makes it panic.
///
/// # Errors
/// Every mistake found, in the file's order; at least one.
pub fn parse(text: &str) -> Result<ShoalFile, Vec<Problem>> {
    let mut reader = Reader { text, problems: Vec::new() };
    let mut file = ShoalFile::default();
    match DeTable::parse(text) {
        Err(error) => {
            let span = error.span().unwrap_or(0..0);
            reader.complain(span, ProblemKind::Syntax { message: error.message().to_owned() });
        }
        Ok(root) => reader.file(root.get_ref(), &mut file),
    }
    let mut problems = reader.problems;
    if problems.is_empty() {
        return Ok(file);
    }
    problems.sort_by_key(|problem| (problem.line, problem.column));
    Err(problems)
}

pub(super) type Value<'i> = Spanned<DeValue<'i>>;

pub(super) struct Reader<'i> {
    text: &'i str,
    problems: Vec<Problem>,
}

impl<'i> Reader<'i> {
    pub(super) fn sited<T>(&self, span: &Range<usize>, value: T) -> Sited<T> {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Sited {
            value,
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }

    pub(super) fn complain(&mut self, span: Range<usize>, kind: ProblemKind) {
        let problem = self.sited(&span, ()).problem(kind);
        self.problems.push(problem);
    }

    pub(super) fn bad(&mut self, value: &Value<'i>, key: &str, why: impl Into<String>) {
        self.complain(value.span(), ProblemKind::BadValue { key: key.to_owned(), why: why.into() });
    }

    pub(super) fn wrong_type(&mut self, value: &Value<'i>, key: &str, expected: &'static str) {
        let found = match value.get_ref() {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "a whole number",
            DeValue::Float(_) => "a number with a point",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        self.complain(value.span(), ProblemKind::WrongType { key: key.to_owned(), expected, found });
    }

    fn check_keys(&mut self, table: &DeTable<'i>, section: &str, known: &'static [&'static str]) {
        for key in table.keys().filter(|key| !known.contains(&key.get_ref().as_ref())) {
            let name = key.get_ref().as_ref();
            let kind = ProblemKind::UnknownKey {
                key: name.to_owned(),
                section: section.to_owned(),
                nearest: nearest(name, known),
            };
            self.complain(key.span(), kind);
        }
    }

    fn file(&mut self, root: &DeTable<'i>, file: &mut ShoalFile) {
        self.check_keys(root, "the file", &TOP_KEYS);
        if let Some(server) = root.get("server") {
            match server.get_ref() {
                DeValue::Table(table) => file.server = self.server(table),
                _ => self.wrong_type(server, "server", "a table: write [server]"),
            }
        }
        let mut models: &[Value<'i>] = &[];
        if let Some(model) = root.get("model") {
            match model.get_ref() {
                DeValue::Array(array) => models = array,
                _ => self.wrong_type(model, "model", "a list of tables: write [[model]], with two brackets"),
            }
        }
        if models.is_empty() && self.problems.is_empty() {
            self.problems.push(Problem { line: 0, column: 0, kind: ProblemKind::NoModel });
        }
        let mut first_lines: BTreeMap<String, usize> = BTreeMap::new();
        for model in models {
            let DeValue::Table(table) = model.get_ref() else {
                self.wrong_type(model, "model", "a list of tables: write [[model]], with two brackets");
                continue;
            };
            let Some(model) = self.model(model, table) else { continue };
            if let Some(&first_line) = first_lines.get(&model.name.value) {
                let name = model.name.value.clone();
                self.problems.push(model.name.problem(ProblemKind::TwoOfOneName { name, first_line }));
            } else {
                first_lines.insert(model.name.value.clone(), model.name.line);
            }
            file.models.push(model);
        }
    }

    fn server(&mut self, table: &DeTable<'i>) -> ServerSection {
        self.check_keys(table, "[server]", &SERVER_KEYS);
        ServerSection {
            listen: self.parsed(table, "listen", |text| {
                SocketAddr::from_str(text)
                    .map_err(|_| format!("{text:?} is not an address and a port, such as \"127.0.0.1:8000\""))
            }),
            api_key_file: self.parsed(table, "api_key_file", path),
            allowed_hosts: self.strings(table, "allowed_hosts"),
            separate_keys: table.get("separate_keys").map(|value| {
                let separate = self.boolean(table, "separate_keys");
                self.sited(&value.span(), separate)
            }),
            device: self.parsed(table, "device", device),
            device_budget: self.size(table, "device_budget"),
            headroom: self.size(table, "headroom").map(|size| size.value),
            host_budget: self.size(table, "host_budget"),
            host_memory: self.parsed(table, "host_memory", host_memory).map(|choice| choice.value),
            host_tier: host_tier::read(self, table),
            disk: self.disk(table),
            disk_key_file: self.parsed(table, "disk_key_file", path),
            disk_wait: self.duration(table, "disk_wait", Duration::from_millis(1), DISK_WAIT_MAX),
            tiers: TierUse::read(self, table),
            request_bytes_max: self.size(table, "request_bytes_max").map(|size| size.value),
            wait_s_max: self.seconds(table, "wait_s_max"),
            parked_max: self.whole(table, "parked_max"),
            quantum: self.duration(table, "quantum", QUANTUM_MIN, QUANTUM_MAX),
            sharing: Sharing::read(self, table),
            orphan_s_max: self.orphan(table),
            fork_workers: table.contains_key("fork_workers").then(|| self.boolean(table, "fork_workers")),
            patience: Patience::read(self, table),
        }
    }

    fn model(&mut self, whole: &Value<'i>, table: &DeTable<'i>) -> Option<ModelSection> {
        let problems_before = self.problems.len();
        let section = match table.get("name").and_then(|name| name.get_ref().as_str()) {
            Some(name) => format!("[[model]] {name:?}"),
            None => "[[model]]".to_owned(),
        };
        self.check_keys(table, &section, &MODEL_KEYS);
        let name = self.parsed(table, "name", model_name);
        let source = self.parsed(table, "source", |text| nonempty(text).map(str::to_owned));
        let engine = self.parsed(table, "engine", engine);
        let kind = engine.as_ref().map(|engine| engine.value).unwrap_or_default();
        for key in ["name", "source"] {
            // A command has its model in its arguments.
            if !table.contains_key(key) && (key == "name" || kind != Engine::Command) {
                self.complain(whole.span(), ProblemKind::Missing { key, section: section.clone() });
            }
        }
        let args = self.strings(table, "args");
        if let Some(engine) = engine.as_ref().filter(|engine| engine.value == Engine::Worker)
            && args.is_empty()
        {
            let why = "\"worker\" needs the command in `args`".to_owned();
            self.problems.push(engine.problem(ProblemKind::BadValue { key: "engine".to_owned(), why }));
        }
        vllm::check_args(self, table, kind);
        let command = CommandSection::read(self, whole, table, kind, &args, &section);
        let (min, max) = (self.size(table, "min"), self.size(table, "max"));
        if let (Some(min), Some(max)) = (&min, &max)
            && min.value > max.value
        {
            let why = format!("{} is more than `max`, {}", min.value, max.value);
            self.problems.push(min.problem(ProblemKind::BadValue { key: "min".to_owned(), why }));
        }
        let section = ModelSection {
            name: name.unwrap_or(Sited { value: String::new(), line: 0, column: 0 }),
            source: source.unwrap_or(Sited { value: String::new(), line: 0, column: 0 }),
            revision: self.parsed(table, "revision", |text| nonempty(text).map(str::to_owned)).map(bare),
            engine,
            python: self.parsed(table, "python", path).map(bare),
            env: self.env(table),
            args,
            dtype: self.parsed(table, "dtype", dtype).map(bare).filter(|name| name != "auto"),
            context: self.whole(table, "context"),
            prefix_caching: !table.contains_key("prefix_caching") || self.boolean(table, "prefix_caching"),
            wake_check: vllm::wake_check(self, table, kind),
            pin: self.boolean(table, "pin"),
            min,
            max,
            priority: self.priority(table),
            keep_alive_s: self.seconds(table, "keep_alive"),
            command,
            parallel_max: self.whole(table, "parallel_max"),
            sharing: SharingSection::read(self, table, kind),
        };
        // A model with a name is kept even if something else is wrong with it, so that its double is found too.
        (self.problems.len() == problems_before || !section.name.value.is_empty()).then_some(section)
    }

    fn disk(&mut self, table: &DeTable<'i>) -> Vec<Sited<DiskTier>> {
        let Some(list) = table.get("disk") else { return Vec::new() };
        let DeValue::Array(entries) = list.get_ref() else {
            self.wrong_type(
                list,
                "disk",
                "a list of tables: disk = [{ path = \"...\", bytes = \"200GiB\" }]",
            );
            return Vec::new();
        };
        let mut tiers = Vec::new();
        for entry in entries {
            let DeValue::Table(table) = entry.get_ref() else {
                self.wrong_type(
                    entry,
                    "disk",
                    "a list of tables: disk = [{ path = \"...\", bytes = \"200GiB\" }]",
                );
                continue;
            };
            self.check_keys(table, "`disk`", &DISK_KEYS);
            for key in DISK_KEYS_NEEDED {
                if !table.contains_key(key) {
                    self.complain(entry.span(), ProblemKind::Missing { key, section: "`disk`".to_owned() });
                }
            }
            let writes = self.size(table, "write_bytes_per_hour");
            let weights = self.size(table, "weights");
            if let (Some(path), Some(bytes)) = (self.parsed(table, "path", path), self.size(table, "bytes")) {
                let weights = weights.map(|weights| weights.value);
                let all = ByteCount(bytes.value.0.saturating_add(weights.unwrap_or_default().0));
                let write_bytes_per_hour = writes.map_or(all, |writes| writes.value);
                let tier = DiskTier { path: path.value, bytes: bytes.value, write_bytes_per_hour, weights };
                tiers.push(Sited { value: tier, line: path.line, column: path.column });
            }
        }
        tiers
    }

    pub(super) fn parsed<T>(
        &mut self,
        table: &DeTable<'i>,
        key: &str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<Sited<T>> {
        let value = table.get(key)?;
        let Some(text) = value.get_ref().as_str() else {
            self.wrong_type(value, key, "a string");
            return None;
        };
        match read(text) {
            Ok(read) => Some(self.sited(&value.span(), read)),
            Err(why) => {
                self.bad(value, key, why);
                None
            }
        }
    }

    pub(super) fn size(&mut self, table: &DeTable<'i>, key: &str) -> Option<Sited<ByteCount>> {
        let value = table.get(key)?;
        let read = match value.get_ref() {
            DeValue::String(text) => text.parse::<ByteCount>().map_err(|error| error.to_string()),
            DeValue::Integer(_) => match whole(value.get_ref()).and_then(|bytes| u64::try_from(bytes).ok()) {
                Some(bytes) => Ok(ByteCount(bytes)),
                None => Err("a size cannot be negative".to_owned()),
            },
            _ => {
                self.wrong_type(value, key, "a size, such as \"512MiB\" or \"48GiB\"");
                return None;
            }
        };
        match read {
            Ok(bytes) if bytes.is_zero() => self.bad(value, key, "must be more than zero"),
            Ok(bytes) => return Some(self.sited(&value.span(), bytes)),
            Err(why) => self.bad(value, key, why),
        }
        None
    }

    /// Whole seconds, or a string with a unit.
    pub(super) fn seconds(&mut self, table: &DeTable<'i>, key: &str) -> Option<u64> {
        let value = table.get(key)?;
        let read = match value.get_ref() {
            DeValue::Integer(_) => whole(value.get_ref()).and_then(|seconds| u64::try_from(seconds).ok()),
            DeValue::String(text) => seconds_of(text),
            _ => {
                self.wrong_type(value, key, "seconds, or a string such as \"90s\", \"10m\" or \"1h\"");
                return None;
            }
        };
        if read.is_none() {
            self.bad(value, key, "write whole seconds, or a string such as \"90s\", \"10m\" or \"1h\"");
        }
        read
    }

    fn orphan(&mut self, table: &DeTable<'i>) -> Option<u64> {
        const KEY: &str = "orphan_s_max";
        let seconds = self.seconds(table, KEY)?;
        if seconds > ORPHAN_WAIT_MAX.as_secs() {
            let most = ORPHAN_WAIT_MAX.as_secs() / 3_600;
            table
                .get(KEY)
                .into_iter()
                .for_each(|value| self.bad(value, KEY, format!("must be {most} h at most")));
            return None;
        }
        Some(seconds)
    }

    /// Whole seconds, or a string with a unit of milliseconds or more.
    pub(super) fn duration(
        &mut self,
        table: &DeTable<'i>,
        key: &str,
        least: Duration,
        most: Duration,
    ) -> Option<Duration> {
        const FORMS: &str = "seconds, or a string such as \"500ms\", \"3s\" or \"1m\"";
        let value = table.get(key)?;
        let read = match value.get_ref() {
            DeValue::Integer(_) => whole(value.get_ref()).and_then(|seconds| u64::try_from(seconds).ok()),
            DeValue::String(text) => {
                let text = text.trim();
                if let Some(ms) = text.strip_suffix("ms").and_then(|ms| ms.trim().parse().ok()) {
                    return self.within(value, key, Duration::from_millis(ms), (least, most));
                }
                seconds_of(text)
            }
            _ => {
                self.wrong_type(value, key, FORMS);
                return None;
            }
        };
        let Some(seconds) = read else {
            self.bad(value, key, format!("write whole {FORMS}"));
            return None;
        };
        self.within(value, key, Duration::from_secs(seconds), (least, most))
    }

    fn within(
        &mut self,
        value: &Value<'i>,
        key: &str,
        read: Duration,
        (least, most): (Duration, Duration),
    ) -> Option<Duration> {
        if (least..=most).contains(&read) {
            return Some(read);
        }
        let told = |bound: Duration| match bound.as_secs() {
            0 => format!("{} ms", bound.as_millis()),
            seconds if seconds % 3_600 == 0 => format!("{} h", seconds / 3_600),
            seconds => format!("{seconds} s"),
        };
        self.bad(value, key, format!("{read:?} does not lie between {} and {}", told(least), told(most)));
        None
    }

    pub(super) fn whole(&mut self, table: &DeTable<'i>, key: &str) -> Option<u32> {
        let value = table.get(key)?;
        if !value.get_ref().is_integer() {
            self.wrong_type(value, key, "a whole number");
            return None;
        }
        let read = whole(value.get_ref()).and_then(|number| u32::try_from(number).ok());
        let read = read.filter(|number| *number > 0);
        if read.is_none() {
            self.bad(value, key, format!("must lie between 1 and {}", u32::MAX));
        }
        read
    }

    /// A number as a port of TCP.
    pub(super) fn port(&mut self, table: &DeTable<'i>, number: u32) -> Option<u16> {
        let port = u16::try_from(number).ok();
        if let (None, Some(value)) = (port, table.get("port")) {
            self.bad(value, "port", format!("must lie between 1 and {}", u16::MAX));
        }
        port
    }

    fn priority(&mut self, table: &DeTable<'i>) -> i32 {
        let Some(value) = table.get("priority") else { return 0 };
        if !value.get_ref().is_integer() {
            self.wrong_type(value, "priority", "a whole number");
            return 0;
        }
        whole(value.get_ref()).and_then(|number| i32::try_from(number).ok()).unwrap_or_else(|| {
            self.bad(value, "priority", format!("must lie between {} and {}", i32::MIN, i32::MAX));
            0
        })
    }

    pub(super) fn boolean(&mut self, table: &DeTable<'i>, key: &str) -> bool {
        let Some(value) = table.get(key) else { return false };
        value.get_ref().as_bool().unwrap_or_else(|| {
            self.wrong_type(value, key, "true or false");
            false
        })
    }

    fn strings(&mut self, table: &DeTable<'i>, key: &str) -> Vec<String> {
        let Some(value) = table.get(key) else { return Vec::new() };
        let DeValue::Array(items) = value.get_ref() else {
            self.wrong_type(value, key, "a list of strings");
            return Vec::new();
        };
        let mut texts = Vec::new();
        for item in items {
            match item.get_ref().as_str() {
                Some(text) => texts.push(text.to_owned()),
                None => self.wrong_type(item, key, "a list of strings"),
            }
        }
        texts
    }

    fn env(&mut self, table: &DeTable<'i>) -> BTreeMap<String, String> {
        let Some(value) = table.get("env") else { return BTreeMap::new() };
        let DeValue::Table(pairs) = value.get_ref() else {
            self.wrong_type(value, "env", "a table of strings: env = { NAME = \"value\" }");
            return BTreeMap::new();
        };
        let mut env = BTreeMap::new();
        for (name, value) in pairs {
            let name = name.get_ref().as_ref();
            if name.is_empty() || name.contains(['=', '\0']) {
                self.bad(value, "env", format!("{name:?} cannot be the name of a variable"));
            } else if let Some(text) = value.get_ref().as_str().filter(|text| !text.contains('\0')) {
                env.insert(name.to_owned(), text.to_owned());
            } else {
                self.wrong_type(value, &format!("env.{name}"), "a string without zero bytes");
            }
        }
        env
    }
}

fn bare<T>(sited: Sited<T>) -> T {
    sited.value
}

fn whole(value: &DeValue<'_>) -> Option<i64> {
    value.as_integer().and_then(|number| i64::from_str_radix(number.as_str(), number.radix()).ok())
}

fn seconds_of(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let scale = match text[digits..].trim() {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    text[..digits].parse::<u64>().ok()?.checked_mul(scale)
}

pub(super) fn nonempty(text: &str) -> Result<&str, String> {
    let text = text.trim();
    if text.is_empty() || text.contains('\0') { Err("must not be empty".to_owned()) } else { Ok(text) }
}

pub(super) fn path(text: &str) -> Result<PathBuf, String> {
    nonempty(text).map(PathBuf::from)
}

fn model_name(text: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-:".contains(c);
    if text.is_empty()
        || text.len() > MODEL_NAME_BYTES_MAX
        || !text.chars().all(good)
        || text.starts_with(['.', '-'])
    {
        return Err(format!(
            "{text:?} is not a name: use 1 to {MODEL_NAME_BYTES_MAX} letters, digits, '.', '_', '-', ':', \
             not beginning with '.' or '-'"
        ));
    }
    Ok(text.to_owned())
}

fn device(text: &str) -> Result<DeviceChoice, String> {
    match text {
        "auto" => Ok(DeviceChoice::Auto),
        "sim" => Ok(DeviceChoice::Sim),
        _ => text
            .strip_prefix("cuda:")
            .and_then(|ordinal| ordinal.parse().ok())
            .map(DeviceChoice::Cuda)
            .ok_or_else(|| format!("{text:?} is not a device: write \"auto\", \"sim\" or \"cuda:0\"")),
    }
}

const ENGINES: [&str; 4] = ["transformers", "vllm", "command", "worker"];

fn host_memory(text: &str) -> Result<HostMemory, String> {
    match text {
        "auto" => Ok(HostMemory::Auto),
        "shared" => Ok(HostMemory::Shared),
        "private" => Ok(HostMemory::Private),
        _ => Err(format!("{text:?} is none of \"auto\", \"shared\" and \"private\"")),
    }
}

fn engine(text: &str) -> Result<Engine, String> {
    match text {
        "transformers" => Ok(Engine::Transformers),
        "command" => Ok(Engine::Command),
        "worker" => Ok(Engine::Worker),
        "vllm" => Ok(Engine::Vllm),
        _ => Err(one_of(text, &ENGINES)),
    }
}

fn dtype(text: &str) -> Result<String, String> {
    if DTYPES.contains(&text) { Ok(text.to_owned()) } else { Err(one_of(text, &DTYPES)) }
}

pub(super) fn one_of(text: &str, known: &'static [&'static str]) -> String {
    let list = known.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
    let meant = nearest(text, known).map_or_else(String::new, |name| format!("; did you mean {name:?}?"));
    format!("{text:?} is none of {list}{meant}")
}

/// The name spelt most like `text`, if it is like enough to have been meant.
fn nearest(text: &str, known: &'static [&'static str]) -> Option<&'static str> {
    let alike = |name: &&&str| strsim::jaro_winkler(text, name);
    let best = known.iter().max_by(|a, b| alike(a).total_cmp(&alike(b)))?;
    (alike(&best) >= 0.75).then_some(best)
}
