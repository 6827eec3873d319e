//! What the configuration is resolved against, read once, so that tests can bring their own.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use shoal_core::bytes::ByteCount;
use shoal_device::HostBacking;
use shoal_device::host::survey;

use super::JOURNAL;
use super::gpu::Gpus;
use crate::supervisor::Journal;

/// The process's surroundings.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// The current directory.
    pub working_dir: PathBuf,
    /// The user's home.
    pub home: Option<PathBuf>,
    /// `XDG_CONFIG_HOME` or its default.
    pub config_home: Option<PathBuf>,
    /// `XDG_STATE_HOME` or its default.
    pub state_home: PathBuf,
    /// `XDG_CACHE_HOME` or its default.
    pub cache_home: PathBuf,
    /// Shoal's own: `SHOAL_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/shoal`, else `/tmp/shoal-UID`.
    pub runtime_dir: PathBuf,
    /// `SHOAL_PYTHON`, else `python3`.
    pub python: PathBuf,
    /// Memory, where it can be read.
    pub memory: MachineMemory,
    /// What memory that processes share can be made of, with huge pages.
    pub shared_memory: Option<HostBacking>,
    /// What shows that there is an NVIDIA device, if there is one.
    pub nvidia: Option<PathBuf>,
    /// Its GPUs, asked for where there is such a sign.
    pub gpus: Option<Gpus>,
    /// What a server shares, or shared, in this runtime directory among workers that live.
    pub budgets_before: Option<Budgets>,
}

/// What a server shares among its workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budgets {
    /// Device bytes.
    pub device: ByteCount,
    /// Host bytes.
    pub host: ByteCount,
}

/// Memory at the moment of asking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MachineMemory {
    /// All of it.
    pub total: ByteCount,
    /// What could be used without swapping.
    pub available: ByteCount,
    /// What the control group still allows, where it sets a limit.
    pub cgroup_left: Option<ByteCount>,
}

impl MachineMemory {
    /// Reads `/proc/meminfo` and the control group; zeros where they cannot be read.
    #[must_use]
    pub fn now() -> Self {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Self {
            total: meminfo(&text, "MemTotal:"),
            available: meminfo(&text, "MemAvailable:"),
            cgroup_left: cgroup_left(),
        }
    }

    /// What may be used: the smaller of what is available and what the control group allows.
    #[must_use]
    pub fn usable(&self) -> ByteCount {
        self.cgroup_left.map_or(self.available, |left| left.min(self.available))
    }
}

pub(crate) fn meminfo(text: &str, field: &str) -> ByteCount {
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let kib =
        line.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse::<u64>().ok());
    ByteCount(kib.unwrap_or(0).saturating_mul(1024))
}

/// What the nearest memory limit of the control groups above this process leaves (version 2, then version 1).
fn cgroup_left() -> Option<ByteCount> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut least: Option<u64> = None;
    for line in own.lines() {
        let mut fields = line.splitn(3, ':');
        let (controllers, path) = (fields.nth(1)?, fields.next()?);
        let (root, limit, usage) = match controllers {
            "" => (Path::new("/sys/fs/cgroup"), "memory.max", "memory.current"),
            "memory" => {
                (Path::new("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
            }
            _ => continue,
        };
        let number = |file: PathBuf| std::fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
        for group in Path::new(path.trim_start_matches('/')).ancestors() {
            let group = root.join(group);
            // Version 1 writes "no limit" as a number near 2^63.
            if let Some(limit) = number(group.join(limit)).filter(|limit| *limit < 1 << 60) {
                let left = limit.saturating_sub(number(group.join(usage)).unwrap_or(0));
                least = Some(least.map_or(left, |least| least.min(left)));
            }
        }
    }
    least.map(ByteCount)
}

impl Surroundings {
    /// Those of this process.
    #[must_use]
    pub fn of_this_process() -> Self {
        let set = |name: &str| {
            std::env::var_os(name).filter(|value: &OsString| !value.is_empty()).map(PathBuf::from)
        };
        // The XDG specification: a relative path is to be ignored.
        let absolute = |name: &str| set(name).filter(|path| path.is_absolute());
        let uid = rustix::process::getuid().as_raw();
        let fallback = PathBuf::from(format!("/tmp/shoal-{uid}"));
        let home = absolute("HOME");
        let under_home =
            |tail: &str| home.as_ref().map_or_else(|| fallback.join(tail), |home| home.join(tail));
        let nvidia = nvidia_sign();
        let runtime_dir = absolute("SHOAL_RUNTIME_DIR")
            .or_else(|| absolute("XDG_RUNTIME_DIR").map(|dir| dir.join("shoal")))
            .unwrap_or_else(|| fallback.clone());
        Self {
            working_dir: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
            config_home: absolute("XDG_CONFIG_HOME")
                .or_else(|| home.as_ref().map(|home| home.join(".config"))),
            state_home: absolute("XDG_STATE_HOME").unwrap_or_else(|| under_home(".local/state")),
            cache_home: absolute("XDG_CACHE_HOME").unwrap_or_else(|| under_home(".cache")),
            budgets_before: Journal::read(&runtime_dir.join(JOURNAL)).budgets_in_use(),
            runtime_dir,
            python: set("SHOAL_PYTHON").unwrap_or_else(|| PathBuf::from("python3")),
            memory: MachineMemory::now(),
            shared_memory: shared_memory(),
            gpus: nvidia.is_some().then(|| Gpus::ask(std::env::var_os("CUDA_VISIBLE_DEVICES"))),
            nvidia,
            home,
        }
    }
}

/// Huge pages that processes can share, if there are any worth the name.
fn shared_memory() -> Option<HostBacking> {
    let (best, _) = survey().backings(ByteCount::gib(1)).into_iter().next()?;
    matches!(best, HostBacking::SharedHugePages | HostBacking::ReservedHugePages).then_some(best)
}

/// What shows that there is an NVIDIA device, whether or not it can be used. The Python package looks for the same.
fn nvidia_sign() -> Option<PathBuf> {
    let fixed = ["/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1"].map(PathBuf::from);
    if let Some(sign) = fixed.into_iter().find(|path| path.exists()) {
        return Some(sign);
    }
    let entries = std::fs::read_dir("/dev").ok()?;
    let is_gpu = |path: &PathBuf| {
        let number = path.file_name().and_then(|name| name.to_str()?.strip_prefix("nvidia"));
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_gpu).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       24689012 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(meminfo(text, "MemAvailable:"), ByteCount(1 << 20));
        assert_eq!(meminfo(text, "SwapFree:"), ByteCount::ZERO);
        assert!(MachineMemory::now().available > ByteCount::ZERO);
    }
}
