//! Sections and surroundings to a [`ServerConfig`]: defaults, directories, the device, sums that must hold.
//!
//! **Defaults of the budgets.** The simulated device takes its bytes from the same RAM as the host tier, so it gets a
//! quarter of what may be used and the host tier half, the rest stays for the workers themselves. A GPU gets what is free
//! on it now, less the headroom: a gibibyte, if nothing else is said. Where a budget is given, the headroom is at most half of
//! what the GPU has beside it, so that it does not eat into what was asked for. The simulated device has none by itself.

use std::path::{Path, PathBuf};
use std::time::Duration;

use shoal_core::bytes::ByteCount;

use super::disk::{check_disk, check_key};
use super::error::{Problem, ProblemKind};
use super::gpu::{DRIVER_MIN, Gpu};
use super::models::{unservable, weights_of};
use super::parse::{ModelSection, ServerSection, ShoalFile, Sited};
use super::remote::RemoteConfig;
use super::sharing::{both_ways, check_apart, check_host};
use super::surroundings::Surroundings;
use super::{
    Budgets, DISK_WAIT_DEFAULT, DeviceChoice, DiskTier, Engine, HostTier, LISTEN_DEFAULT, Limits,
    ModelConfig, ORPHAN_WAIT_DEFAULT, PARALLEL_DEFAULT, QUANTUM_DEFAULT, ServerConfig, TierUse, host_tier,
};

const BUDGET_UNIT: ByteCount = ByteCount::mib(64);
/// What is left of a GPU's free memory, for what nobody foresees, where nothing is said.
const HEADROOM: ByteCount = ByteCount::gib(1);
/// What `separate_keys` costs where blocks outlive the server.
const FOUND_UNTIL_THE_END: &str = "separate_keys: what `disk` and `tier_remote` keep is found until this server ends; the next one has other \
     salts";

fn round_down(bytes: ByteCount) -> ByteCount {
    ByteCount(bytes.0 / BUDGET_UNIT.0 * BUDGET_UNIT.0)
}

impl ShoalFile {
    /// Fills in what the file leaves open. `file` must be absolute: relative paths are relative to its directory.
    ///
    /// # Errors
    /// Every mistake found; at least one.
    pub fn resolve(self, file: &Path, surroundings: &Surroundings) -> Result<ServerConfig, Vec<Problem>> {
        let mut problems = Vec::new();
        let directory = file.parent().unwrap_or(Path::new("/"));
        let home = surroundings.home.as_deref();
        let mut server = self.server;
        let separate_keys = separates_keys(&server, &mut problems);
        let limits = limits_of(&server);

        let unsited = LISTEN_DEFAULT.parse().unwrap_or(([127, 0, 0, 1], 8000).into());
        let listen = server.listen.unwrap_or(Sited { value: unsited, line: 0, column: 0 });
        if !listen.value.ip().to_canonical().is_loopback() && server.api_key_file.is_none() {
            problems.push(listen.problem(ProblemKind::OpenToAll { listen: listen.value.to_string() }));
        }

        let device = server.device.unwrap_or(Sited { value: DeviceChoice::Auto, line: 0, column: 0 });
        let gpu = match usable_device(device.value, surroundings) {
            Ok(gpu) => gpu,
            Err(why) => {
                problems.push(device.problem(ProblemKind::Device { why }));
                None
            }
        };

        let usable = surroundings.memory.usable();
        let mut notes = Vec::new();
        let by_default = default_budgets(surroundings, gpu, server.headroom.unwrap_or(HEADROOM));
        let device_budget = server.device_budget.as_ref().map_or(by_default.device, |bytes| bytes.value);
        let host_budget = server.host_budget.as_ref().map_or(by_default.host, |bytes| bytes.value);
        if let Some((_, gpu)) = gpu {
            if device_budget > gpu.free {
                notes.push(format!(
                    "device_budget is {device_budget}, but only {} of {} is free on {} now",
                    gpu.free, gpu.total, gpu.name
                ));
            }
        } else if device_budget > usable && !usable.is_zero() {
            notes.push(format!(
                "device_budget is {device_budget}, but only {usable} of RAM may be used, and the simulated device \
                 lives in RAM"
            ));
        }
        let disk = with_absolute_paths(server.disk, directory, home);
        check_disk(&disk, &self.models, server.disk_key_file.is_some(), &mut problems);
        let disk_key = server.disk_key_file;
        let disk_key_file = key_files(disk_key, &mut server.tiers, directory, home, &mut problems);
        host_tier::check(server.host_tier.as_ref(), host_budget, &self.models, &mut problems);

        check_minimums(&self.models, device_budget, server.device_budget.as_ref(), &mut problems);
        check_apart(&self.models, &mut problems);
        let depths: Vec<_> = self.models.iter().map(|model| model.sharing.sleep.clone()).collect();
        let mut models: Vec<ModelConfig> =
            self.models.into_iter().map(|model| resolve_model(model, directory, home)).collect();
        // The others can be served, so this is no reason to serve none.
        let device = gpu.map_or(DeviceChoice::Sim, |(ordinal, _)| DeviceChoice::Cuda(ordinal));
        let cache_dir = surroundings.cache_home.join("shoal");
        for model in &mut models {
            model.weights = weights_of(model, device, &cache_dir);
        }
        both_ways(&mut models);
        check_host(&models, &depths, host_budget, &mut problems);
        if separate_keys {
            notes.extend(models.iter().filter_map(shares_prefixes));
            notes.extend(found_until_the_end(&disk, server.tiers.remote()));
        }
        let unservable: Vec<String> =
            models.iter().filter_map(|model| unservable(model, device, device_budget, &cache_dir)).collect();
        if !problems.is_empty() {
            problems.sort_by_key(|problem| (problem.line, problem.column));
            return Err(problems);
        }

        let state_dir = surroundings.state_home.join("shoal");
        Ok(ServerConfig {
            file: file.to_owned(),
            listen: listen.value,
            api_key_file: server.api_key_file.map(|path| absolute(&path.value, directory, home)),
            allowed_hosts: server.allowed_hosts,
            separate_keys,
            device,
            device_uuid: gpu.map(|(_, gpu)| gpu.uuid.clone()),
            device_budget,
            headroom: headroom_of(server.headroom, server.device_budget.is_some(), device_budget, gpu),
            host_budget,
            host_memory: server.host_memory.unwrap_or_default().backing(surroundings.shared_memory),
            host_tier: server.host_tier.map_or_else(HostTier::default, |tier| tier.value),
            disk: disk.into_iter().map(|entry| entry.value).collect(),
            disk_key_file,
            disk_wait: server.disk_wait.unwrap_or(DISK_WAIT_DEFAULT),
            tiers: server.tiers,
            models,
            runtime_dir: surroundings.runtime_dir.clone(),
            log_dir: state_dir.join("logs"),
            state_dir,
            cache_dir,
            python: surroundings.python.clone(),
            limits,
            quantum: server.quantum.unwrap_or(QUANTUM_DEFAULT),
            sharing: server.sharing,
            patience: server.patience,
            fork_workers: server.fork_workers.unwrap_or(true),
            orphan_wait: server.orphan_s_max.map_or(ORPHAN_WAIT_DEFAULT, Duration::from_secs),
            notes,
            unservable,
        })
    }
}

fn limits_of(server: &ServerSection) -> Limits {
    let defaults = Limits::default();
    Limits {
        request_bytes_max: server.request_bytes_max.unwrap_or(defaults.request_bytes_max),
        wait_max: server.wait_s_max.map_or(defaults.wait_max, Duration::from_secs),
        parked_max: server.parked_max.unwrap_or(defaults.parked_max),
    }
}

fn separates_keys(server: &ServerSection, problems: &mut Vec<Problem>) -> bool {
    let Some(key) = server.separate_keys.as_ref().filter(|key| key.value) else { return false };
    if server.api_key_file.is_none() {
        let why = "there are no keys to tell apart without `api_key_file`".to_owned();
        problems.push(key.problem(ProblemKind::BadValue { key: "separate_keys".to_owned(), why }));
    }
    true
}

/// What to know of a model whose cached prefixes `separate_keys` does not keep apart.
fn shares_prefixes(model: &ModelConfig) -> Option<String> {
    let shares = !matches!(model.engine, Engine::Transformers | Engine::Vllm);
    shares.then(|| {
        let (name, engine) = (&model.name, model.engine.name());
        format!("separate_keys: {name} (engine = \"{engine}\") is not told of keys; prefixes that it caches are for all of them")
    })
}

/// What to know of blocks that outlive the server, where its keys do not.
fn found_until_the_end(disk: &[Sited<DiskTier>], remote: Option<&RemoteConfig>) -> Option<String> {
    (!disk.is_empty() || remote.is_some()).then(|| FOUND_UNTIL_THE_END.to_owned())
}

/// What is to stay free beside the budget. They are added to each other, so the sum has to be a number.
fn headroom_of(
    said: Option<ByteCount>,
    is_budgeted: bool,
    budget: ByteCount,
    gpu: Option<(u32, &Gpu)>,
) -> ByteCount {
    let by_default = match (gpu, is_budgeted) {
        (None, _) => ByteCount::ZERO,
        (Some(_), false) => HEADROOM,
        (Some((_, gpu)), true) => HEADROOM.min(ByteCount(gpu.total.saturating_sub(budget).0 / 2)),
    };
    said.unwrap_or(by_default).min(ByteCount(u64::MAX - budget.0))
}

/// Budgets of a file that says none: those of the server before where workers of it live, because what they hold is not
/// free and is theirs to share as before; else parts of what is free.
fn default_budgets(surroundings: &Surroundings, gpu: Option<(u32, &Gpu)>, headroom: ByteCount) -> Budgets {
    if let Some(before) = surroundings.budgets_before {
        return before;
    }
    let usable = surroundings.memory.usable();
    let part = |part: u64| round_down(ByteCount(usable.0 / part)).max(BUDGET_UNIT);
    let device = match gpu {
        Some((_, gpu)) => round_down(gpu.free.saturating_sub(headroom)).max(BUDGET_UNIT),
        None => part(4),
    };
    Budgets { device, host: part(2) }
}

/// The GPU to use and its ordinal, or none for the simulated device. `auto` never falls back silently where an NVIDIA
/// device exists but cannot be used.
fn usable_device(choice: DeviceChoice, surroundings: &Surroundings) -> Result<Option<(u32, &Gpu)>, String> {
    const REMEDY: &str =
        "`shoal doctor` tells more; device = \"sim\" under [server] is the simulated device, in RAM";
    let (ordinal, there) = match (choice, &surroundings.nvidia) {
        (DeviceChoice::Sim, _) | (DeviceChoice::Auto, None) => return Ok(None),
        (DeviceChoice::Cuda(_), None) => {
            return Err(format!("device = \"{choice}\", but there is no NVIDIA device here; {REMEDY}"));
        }
        (DeviceChoice::Auto, Some(sign)) => {
            (0, format!("there is an NVIDIA device here ({})", sign.display()))
        }
        (DeviceChoice::Cuda(ordinal), Some(_)) => (ordinal, format!("device = \"{choice}\"")),
    };
    let found = match &surroundings.gpus {
        Some(gpus) => gpus.find(ordinal),
        None => Err("nobody asked for the GPUs".to_owned()),
    };
    let gpu = found.map_err(|why| format!("{there}, but it cannot be used: {why}; {REMEDY}"))?;
    if !gpu.has_driver() {
        let driver = &gpu.driver;
        return Err(format!("{there}, but its driver is {driver} and {DRIVER_MIN} is the least; {REMEDY}"));
    }
    Ok(Some((ordinal, gpu)))
}

fn check_minimums(
    models: &[ModelSection],
    budget: ByteCount,
    budget_key: Option<&Sited<ByteCount>>,
    problems: &mut Vec<Problem>,
) {
    let mut sum = 0u128;
    for min in models.iter().filter_map(|model| model.min.as_ref()) {
        sum += u128::from(min.value.0);
        if min.value > budget {
            let why = format!("{} is more than the device budget of {budget}", min.value);
            problems.push(min.problem(ProblemKind::BadValue { key: "min".to_owned(), why }));
            return;
        }
    }
    if sum > u128::from(budget.0) {
        let sum = ByteCount(u64::try_from(sum).unwrap_or(u64::MAX));
        let kind = ProblemKind::MinimumsExceedBudget { sum, budget };
        problems.push(match budget_key {
            Some(key) => key.problem(kind),
            None => Problem { line: 0, column: 0, kind },
        });
    }
}

fn resolve_model(model: ModelSection, directory: &Path, home: Option<&Path>) -> ModelConfig {
    let command = model.command.map(|section| section.resolve(|path| absolute(path, directory, home)));
    let source = match &command {
        // What people see in its place.
        Some(command) if model.source.value.is_empty() => {
            let words =
                std::iter::once(command.program.to_string_lossy().into_owned()).chain(model.args.clone());
            words.collect::<Vec<_>>().join(" ")
        }
        Some(_) => model.source.value,
        None => resolve_source(&model.source.value, directory, home),
    };
    ModelConfig {
        name: model.name.value,
        source,
        revision: model.revision,
        engine: model.engine.map_or_else(Default::default, |engine| engine.value),
        // A bare command is looked up in PATH; anything with a slash is a file.
        python: model.python.map(|python| {
            let command = python.components().count() == 1 && !python.starts_with("~");
            if command { python } else { absolute(&python, directory, home) }
        }),
        env: model.env,
        args: model.args,
        dtype: model.dtype,
        context: model.context,
        prefix_caching: model.prefix_caching,
        wake_check: model.wake_check,
        pin: model.pin,
        min: model.min.map(|min| min.value),
        max: model.max.map(|max| max.value),
        priority: model.priority,
        keep_alive_s: model.keep_alive_s,
        command,
        parallel_max: model.parallel_max.unwrap_or(PARALLEL_DEFAULT),
        preload: model.sharing.preload,
        sleep: model.sharing.sleep.map_or_else(Default::default, |sleep| sleep.value),
        apart: model.sharing.apart.into_iter().map(|name| name.value).collect(),
        weights: None,
    }
}

/// A path where it looks like one (`/`, `./`, `../`, `~`) or where such a directory exists; else an id, left as it is.
fn resolve_source(source: &str, directory: &Path, home: Option<&Path>) -> String {
    let looks_like_path =
        source.starts_with(['/', '~']) || matches!(source.split('/').next(), Some("." | ".."));
    let path = absolute(Path::new(source), directory, home);
    if looks_like_path || path.is_dir() { path.to_string_lossy().into_owned() } else { source.to_owned() }
}

fn with_absolute_paths(
    mut disk: Vec<Sited<DiskTier>>,
    directory: &Path,
    home: Option<&Path>,
) -> Vec<Sited<DiskTier>> {
    for entry in &mut disk {
        entry.value.path = absolute(&entry.value.path, directory, home);
    }
    disk
}

/// Where the key is that what is on disk is encrypted with; the files of the remote tier are looked into too.
fn key_files(
    file: Option<Sited<PathBuf>>,
    tiers: &mut TierUse,
    directory: &Path,
    home: Option<&Path>,
    problems: &mut Vec<Problem>,
) -> Option<PathBuf> {
    if let Some(remote) = &mut tiers.remote {
        RemoteConfig::resolve(remote, |path| absolute(path, directory, home), problems);
    }
    let file = file.map(|path| Sited { value: absolute(&path.value, directory, home), ..path })?;
    check_key(&file, problems);
    Some(file.value)
}

/// `~` and relative paths filled in, `.` and `..` folded without looking at the disk.
fn absolute(path: &Path, directory: &Path, home: Option<&Path>) -> PathBuf {
    let whole = match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => directory.join(path),
    };
    let mut folded = PathBuf::new();
    for part in whole.components() {
        match part {
            std::path::Component::CurDir => {}
            std::path::Component::ParentDir => {
                folded.pop();
            }
            part => folded.push(part),
        }
    }
    folded
}
