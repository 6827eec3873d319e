//! `shoal doctor`: what this machine has, and what to do about what it lacks.

use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;
use shoal_core::bytes::ByteCount;
use shoal_device::HostBacking;
use shoal_device::host::{HostSurvey, survey};

use super::{Failure, Out};
use crate::config::{ConfigError, DRIVER_MIN, DeviceChoice, ServerConfig, Surroundings, find_file};

const PYTHON_WAIT_MAX: Duration = Duration::from_secs(30);
const PYTHON_OUTPUT_BYTES_MAX: u64 = 1 << 16;
/// A Unix socket's path has 107 bytes; ours need a name below the runtime directory.
const RUNTIME_DIR_BYTES_MAX: usize = 60;
/// Room for the mappings that a worker has beside its extents: libraries, threads, slabs.
const MAPPINGS_OF_A_PROCESS: u64 = 8_192;
/// Of the server: 256 streams take two each, workers a few.
const FILES_MIN: u64 = 1024;
const ASK_PYTHON: &str = "\
import importlib.metadata as m, json, sys
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return None
names = ('torch', 'transformers', 'aiohttp', 'safetensors', 'shoal')
print(json.dumps({'python': '%d.%d.%d' % sys.version_info[:3], **{n: version(n) for n in names}}))
";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Serialize)]
pub(super) struct Check {
    pub(super) name: String,
    pub(super) level: Level,
    pub(super) found: String,
    pub(super) remedy: Option<String>,
}

impl Check {
    pub(super) fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self { name: name.into(), level: Level::Ok, found: found.into(), remedy: None }
    }

    pub(super) fn not_ok(
        level: Level,
        name: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { name: name.into(), level, found: found.into(), remedy: Some(remedy.into()) }
    }

    /// `remedy` where `good` is false.
    pub(super) fn of(good: bool, level: Level, name: &str, found: String, remedy: &str) -> Self {
        if good { Self::ok(name, found) } else { Self::not_ok(level, name, found, remedy) }
    }
}

pub(super) fn doctor(file: Option<&Path>, json: bool, out: Out<'_>) -> Result<(), Failure> {
    let surroundings = Surroundings::of_this_process();
    let (config_check, config) = configuration(file, &surroundings);
    let mut checks = vec![config_check];
    let pythons: BTreeSet<PathBuf> = match &config {
        Some(config) => config.models.iter().map(|model| config.python_of(model).to_owned()).collect(),
        None => BTreeSet::from([surroundings.python.clone()]),
    };
    let on_gpu = matches!(config.as_ref().map(|config| config.device), Some(DeviceChoice::Cuda(_)));
    for python in &pythons {
        checks.extend(python_checks(python, on_gpu));
    }
    checks.extend(nvidia(&surroundings, config.as_ref()));
    checks.extend(memory(&surroundings, config.as_ref()));
    checks.push(disk(&surroundings.cache_home));
    checks.extend(config.iter().filter_map(super::disks::host_tier));
    checks.extend(config.iter().flat_map(super::disks::disk_tier));
    checks.extend(limits(&survey(), surroundings.nvidia.is_some(), config.as_ref()));
    checks.push(runtime_dir(&surroundings.runtime_dir));

    let worst = checks.iter().map(|check| check.level).max().unwrap_or(Level::Ok);
    if json {
        let text = serde_json::json!({"ok": worst != Level::Fail, "checks": checks});
        writeln!(out, "{text:#}")?;
    } else {
        for check in &checks {
            let level = match check.level {
                Level::Ok => "ok  ",
                Level::Warn => "warn",
                Level::Fail => "FAIL",
            };
            writeln!(out, "{level}  {}: {}", check.name, check.found)?;
            if let Some(remedy) = &check.remedy {
                writeln!(out, "      -> {remedy}")?;
            }
        }
    }
    // What failed has been said above.
    if worst == Level::Fail { Err(Failure::new("")) } else { Ok(()) }
}

fn configuration(file: Option<&Path>, surroundings: &Surroundings) -> (Check, Option<ServerConfig>) {
    let loaded = find_file(file, surroundings).and_then(|file| ServerConfig::load(&file, surroundings));
    match loaded {
        Ok(config) => {
            let found = format!("{}, {} models", config.file.display(), config.models.len());
            (Check::ok("configuration", found), Some(config))
        }
        Err(error @ ConfigError::NotFound { .. }) => {
            let remedy =
                "write one, or name one: shoal doctor FILE (`shoal serve` without a file prints a sample)";
            (Check::not_ok(Level::Warn, "configuration", error.to_string(), remedy), None)
        }
        Err(error) => {
            (Check::not_ok(Level::Fail, "configuration", error.to_string(), "correct the lines named"), None)
        }
    }
}

/// Runs a program for at most [`PYTHON_WAIT_MAX`] and reads the beginning of what it writes.
fn output_of(mut command: Command) -> Result<String, String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot be started: {error}"))?;
    let deadline = Instant::now() + PYTHON_WAIT_MAX;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("did not answer within {} s", PYTHON_WAIT_MAX.as_secs()));
            }
            Err(error) => return Err(error.to_string()),
        }
    };
    let mut text = String::new();
    if let Some(stdout) = child.stdout.take() {
        let _ = stdout.take(PYTHON_OUTPUT_BYTES_MAX).read_to_string(&mut text);
    }
    if status.success() { Ok(text) } else { Err(format!("ended with {status}")) }
}

fn python_checks(python: &Path, on_gpu: bool) -> Vec<Check> {
    let name = format!("python ({})", python.display());
    let mut command = Command::new(python);
    command.args(["-c", ASK_PYTHON]);
    let found = output_of(command).and_then(|text| {
        serde_json::from_str::<serde_json::Value>(&text).map_err(|_| "said something else".to_owned())
    });
    let found = match found {
        Ok(found) => found,
        Err(why) => {
            let remedy = "install Python 3.11 or newer, or name one: `python` of a model, or SHOAL_PYTHON";
            return vec![Check::not_ok(Level::Fail, name, why, remedy)];
        }
    };
    let version = found["python"].as_str().unwrap_or("?").to_owned();
    let minor = version.split('.').nth(1).and_then(|minor| minor.parse::<u32>().ok()).unwrap_or(0);
    let mut checks = vec![Check::of(
        minor >= 11,
        Level::Fail,
        &name,
        version,
        "Python 3.11 or newer is needed for the workers",
    )];
    for package in ["torch", "transformers", "aiohttp", "safetensors", "shoal"] {
        let Some(version) = found[package].as_str() else {
            let remedy = format!("{} -m pip install \"shoal[serve]\"", python.display());
            checks.push(Check::not_ok(Level::Fail, package, "not installed", remedy));
            continue;
        };
        if package == "torch" && on_gpu && version.ends_with("+cpu") {
            let remedy = format!("{} -m pip install torch, in a build with CUDA", python.display());
            checks.push(Check::not_ok(Level::Fail, package, format!("{version}, which has no CUDA"), remedy));
            continue;
        }
        let fits = package != "transformers" || version.starts_with("5.17.");
        let remedy = "the worker hooks into transformers 5.17; install \"transformers==5.17.*\"";
        checks.push(Check::of(fits, Level::Warn, package, version.to_owned(), remedy));
    }
    checks
}

/// The GPUs, each with its driver and memory, and the one that would be served from.
fn nvidia(surroundings: &Surroundings, config: Option<&ServerConfig>) -> Vec<Check> {
    const NAME: &str = "NVIDIA device";
    let (Some(sign), Some(gpus)) = (&surroundings.nvidia, &surroundings.gpus) else {
        return vec![Check::ok(NAME, "none: the device is simulated in RAM")];
    };
    let is_wanted = config.is_none_or(|config| config.device != DeviceChoice::Sim);
    let level = if is_wanted { Level::Fail } else { Level::Warn };
    let listed = match &gpus.listed {
        Ok(listed) => listed,
        Err(why) => {
            let remedy = format!(
                "install NVIDIA's driver {DRIVER_MIN} or newer with nvidia-smi; in a container, give it the GPU and its \
                 utilities (--gpus all); or write device = \"sim\" under [server]"
            );
            return vec![Check::not_ok(level, NAME, format!("{}, but {why}", sign.display()), remedy)];
        }
    };
    let mut checks = Vec::new();
    for gpu in listed {
        let name = format!("GPU {}", gpu.index);
        checks.push(Check::ok(&name, format!("{}, {} of {} free", gpu.name, gpu.free, gpu.total)));
    }
    if let Some(gpu) = listed.first() {
        let remedy = format!("install NVIDIA's driver {DRIVER_MIN} or newer");
        let found = format!("{} ({DRIVER_MIN} is the least)", gpu.driver);
        checks.push(Check::of(gpu.has_driver(), level, "NVIDIA driver", found, &remedy));
    }
    let ordinal = match config.map(|config| config.device) {
        Some(DeviceChoice::Cuda(ordinal)) => ordinal,
        _ => 0,
    };
    if let Some(visible) = &gpus.visible {
        let (good, found) = match gpus.find(ordinal) {
            Ok(gpu) => (true, format!("{visible:?}: workers see GPU {} as cuda:{ordinal}", gpu.index)),
            Err(why) => (false, why),
        };
        let remedy = "unset it, or name GPUs by number or by their GPU-... id";
        checks.push(Check::of(good, level, "CUDA_VISIBLE_DEVICES", found, remedy));
    }
    checks
}

fn memory(surroundings: &Surroundings, config: Option<&ServerConfig>) -> Vec<Check> {
    let memory = surroundings.memory;
    let usable = memory.usable();
    let mut checks = vec![Check::of(
        usable >= ByteCount::gib(2),
        Level::Warn,
        "memory",
        format!("{} of {} available", memory.available, memory.total),
        "the demo's models need about 2 GiB; close something, or serve smaller models",
    )];
    if let Some(left) = memory.cgroup_left {
        checks.push(Check::of(
            left >= ByteCount::gib(2),
            Level::Warn,
            "control group",
            format!("{left} left of its memory limit"),
            "raise the limit of the container or service",
        ));
    }
    if let Some(config) = config {
        let is_simulated = config.device == DeviceChoice::Sim;
        let on_device = if is_simulated { config.device_budget } else { ByteCount::ZERO };
        let wanted = ByteCount(on_device.0.saturating_add(config.host_budget.0));
        checks.push(Check::of(
            wanted <= usable,
            Level::Warn,
            "budgets",
            format!("{on_device} of it for a simulated device, {} host, {usable} usable", config.host_budget),
            "lower device_budget or host_budget, or the kernel may end a worker",
        ));
        let gpu = match config.device {
            DeviceChoice::Cuda(ordinal) => {
                surroundings.gpus.as_ref().and_then(|gpus| gpus.find(ordinal).ok())
            }
            _ => None,
        };
        if let Some(gpu) = gpu {
            checks.push(Check::of(
                config.device_budget <= gpu.free,
                Level::Warn,
                "device budget",
                format!("{} of {} free on {}", config.device_budget, gpu.free, gpu.name),
                "lower device_budget, or end what else uses the GPU (nvidia-smi lists it)",
            ));
        }
    }
    checks
}

fn disk(cache_home: &Path) -> Check {
    let there = cache_home.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(there) {
        Ok(stat) => {
            let free = ByteCount(stat.f_bavail.saturating_mul(stat.f_frsize));
            Check::of(
                free >= ByteCount::gib(5),
                Level::Warn,
                "disk",
                format!("{free} free at {}", there.display()),
                "models are kept in the cache directory; make room there, or set XDG_CACHE_HOME",
            )
        }
        Err(error) => Check::not_ok(Level::Warn, "disk", error.to_string(), "check the cache directory"),
    }
}

/// What this machine allows for host copies, and the limits of a process.
fn limits(found: &HostSurvey, has_gpu: bool, config: Option<&ServerConfig>) -> Vec<Check> {
    let mut checks = Vec::new();
    let host_budget = config.map(|config| config.host_budget);
    let slab = ByteCount::gib(1);
    if let Some((backing, made_of)) = found.backings(slab).into_iter().next() {
        let (is_good, remedy) = match backing {
            HostBacking::SharedHugePages | HostBacking::ReservedHugePages => (true, ""),
            HostBacking::HugePages => (
                !has_gpu,
                "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled (as root; faster)",
            ),
            _ => (
                false,
                "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root), or memory for copies is made \
                 several times slower",
            ),
        };
        checks.push(Check::of(is_good, Level::Warn, "memory for host copies", made_of, remedy));
    }
    // Page-locked memory matters to a GPU's copies, not to the simulated device.
    let is_enough = found.lock_limit.is_none_or(|limit| host_budget.is_some_and(|budget| limit >= budget));
    let limit = found.lock_limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    let wanted = host_budget.map(|budget| format!(", {budget} wanted for host_budget")).unwrap_or_default();
    checks.push(Check::of(
        is_enough || !has_gpu,
        Level::Warn,
        "locked memory",
        if found.lock_limit.is_none() { limit } else { limit + &wanted },
        "ulimit -l unlimited (LimitMEMLOCK=infinity for a service, docker run --ulimit memlock=-1), or copies to the GPU \
         may be slow",
    ));
    if let Some(count) = found.mappings_max {
        // Each extent on a simulated device is a mapping, the least of them a page.
        let simulated = config.filter(|config| config.device == DeviceChoice::Sim);
        let extents = simulated.map_or(0, |config| config.device_budget.pages());
        let needed = extents.saturating_add(MAPPINGS_OF_A_PROCESS);
        let remedy = format!(
            "sysctl -w vm.max_map_count={} (each extent on a simulated device is a mapping, and so is each slab of host memory)",
            needed.next_power_of_two().max(262_144)
        );
        let found = format!("{count}, {needed} wanted");
        checks.push(Check::of(count >= needed, Level::Warn, "vm.max_map_count", found, &remedy));
    }
    checks.push(Check::of(
        found.files_max.is_none_or(|files| files >= FILES_MIN),
        Level::Warn,
        "open files",
        found.files_max.map_or_else(|| "unlimited".to_owned(), |files| files.to_string()),
        "ulimit -n 65536 (LimitNOFILE=65536 for a service; each connection takes one)",
    ));
    checks
}

fn runtime_dir(dir: &Path) -> Check {
    let name = "runtime directory";
    let shown = dir.display().to_string();
    if shown.len() > RUNTIME_DIR_BYTES_MAX {
        let found = format!("{shown} is {} bytes long", shown.len());
        return Check::not_ok(
            Level::Fail,
            name,
            found,
            "sockets lie in it; set SHOAL_RUNTIME_DIR to a shorter path",
        );
    }
    match std::fs::symlink_metadata(dir) {
        Ok(found) if !found.is_dir() => Check::not_ok(
            Level::Fail,
            name,
            format!("{shown} is no directory"),
            "remove it, or set SHOAL_RUNTIME_DIR",
        ),
        Ok(found) if found.uid() != rustix::process::geteuid().as_raw() => Check::not_ok(
            Level::Fail,
            name,
            format!("{shown} belongs to user {}", found.uid()),
            "set SHOAL_RUNTIME_DIR to a directory of your own",
        ),
        Ok(found) if found.mode() & 0o077 != 0 => Check::not_ok(
            Level::Warn,
            name,
            format!("{shown} has mode {:o}", found.mode() & 0o777),
            format!("others can reach the sockets: chmod 700 {shown}"),
        ),
        Ok(_) => Check::ok(name, shown),
        Err(_) => {
            let parent = dir.parent().unwrap_or(Path::new("/"));
            let there = parent.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
            let writable = rustix::fs::access(there, rustix::fs::Access::WRITE_OK).is_ok();
            let remedy = format!("no permission to write in {}; set SHOAL_RUNTIME_DIR", there.display());
            Check::of(writable, Level::Fail, name, format!("{shown}, to be made"), &remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_device::host::PageSetting;

    use super::*;

    #[test]
    fn everything_that_is_not_ok_has_a_remedy() {
        let mut out = Vec::new();
        let _ = doctor(Some(Path::new("/nowhere/shoal.toml")), true, &mut out);
        let said: serde_json::Value = serde_json::from_slice(&out).expect("JSON");
        let checks = said["checks"].as_array().expect("a list");
        assert!(checks.len() > 8, "{said}");
        assert_eq!((&checks[0]["name"], &checks[0]["level"]), (&"configuration".into(), &"fail".into()));
        assert_eq!(said["ok"], false);
        for check in checks {
            assert_eq!(check["level"] != "ok", check["remedy"].is_string(), "{check}");
        }
    }

    #[test]
    fn what_is_short_for_host_copies_has_a_remedy_with_the_command() {
        let good = HostSurvey {
            private_huge_pages: PageSetting::OnRequest,
            shared_huge_pages: PageSetting::OnRequest,
            reserved_huge_pages: ByteCount::ZERO,
            lock_limit: None,
            available: None,
            mappings_max: Some(65_530),
            files_max: Some(1024),
        };
        let levels = |found: &HostSurvey, has_gpu| -> Vec<(String, Level)> {
            limits(found, has_gpu, None).into_iter().map(|check| (check.name, check.level)).collect()
        };
        assert!(
            levels(&good, true).iter().all(|(_, level)| *level == Level::Ok),
            "{:?}",
            levels(&good, true)
        );
        let short = HostSurvey {
            shared_huge_pages: PageSetting::Never,
            lock_limit: Some(ByteCount::mib(8)),
            mappings_max: Some(1000),
            files_max: Some(256),
            ..good.clone()
        };
        let found = limits(&short, true, None);
        assert!(found.len() == 4 && found.iter().all(|check| check.level == Level::Warn), "{found:?}");
        let remedies: Vec<_> = found.into_iter().filter_map(|check| check.remedy).collect();
        for command in ["shmem_enabled", "ulimit -l", "sysctl -w vm.max_map_count=", "ulimit -n"] {
            assert!(remedies.iter().any(|remedy| remedy.contains(command)), "{command}: {remedies:?}");
        }
        // Without a GPU nothing is gained by locking, and little by sharing.
        let simulated = levels(&HostSurvey { mappings_max: None, files_max: None, ..short }, false);
        assert!(simulated.iter().all(|(_, level)| *level == Level::Ok), "{simulated:?}");
        let off = HostSurvey {
            private_huge_pages: PageSetting::Never,
            shared_huge_pages: PageSetting::Never,
            ..good
        };
        assert_eq!(levels(&off, false)[0].1, Level::Warn, "small pages are slow everywhere");
    }

    #[test]
    fn a_python_that_is_none_fails_with_a_remedy() {
        for python in ["/nowhere/python", "/bin/false", "/bin/echo"] {
            let checks = python_checks(Path::new(python), false);
            assert_eq!((checks.len(), checks[0].level), (1, Level::Fail), "{checks:?}");
        }
    }

    #[test]
    fn runtime_directories_are_judged() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir_in("/tmp").expect("a directory");
        let level = |path: &Path| runtime_dir(path).level;
        for (mode, expected) in [(0o700, Level::Ok), (0o755, Level::Warn), (0o700, Level::Ok)] {
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).expect("set");
            assert_eq!(level(dir.path()), expected, "{mode:o}");
        }
        assert_eq!(level(&dir.path().join("new")), Level::Ok);
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("written");
        assert_eq!(level(&file), Level::Fail);
        assert_eq!(level(Path::new(&format!("/tmp/{}", "x".repeat(80)))), Level::Fail);
    }
}
