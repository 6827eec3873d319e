//! How much RAM is left, for the machine and for the control groups this process is in.
//!
//! Apart because RAM is the real limit behind the simulated one, and the limit of page-locked memory; the kernel's
//! answer to taking too much is to kill somebody: asking first makes it an error that names the remedy. Figures are
//! a moment's; two processes that ask at once may both be told yes, which the headroom is for.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use shoal_core::bytes::ByteCount;

use crate::error::DeviceError;

/// RAM that is never taken, for everything else.
const RAM_HEADROOM: ByteCount = ByteCount::mib(128);
/// Version 1 says "no limit" by a number near the largest; no machine has a pebibyte.
const NO_LIMIT: u64 = 1 << 50;

/// Names of a control group's files: limit, usage, and the statistic of the file cache that can go.
struct Names {
    limit: &'static str,
    usage: &'static str,
    reclaimable: &'static str,
}

const VERSION_1: Names = Names {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
};
const VERSION_2: Names = Names { limit: "memory.max", usage: "memory.current", reclaimable: "inactive_file" };

/// A control group with a limit.
struct Group {
    directory: PathBuf,
    names: &'static Names,
}

impl Group {
    /// The group at `directory`, if there is one and it has a limit.
    fn limited(directory: &Path, names: &'static Names) -> Option<Self> {
        let group = Self { directory: directory.to_owned(), names };
        (group.number(names.limit)? < NO_LIMIT).then_some(group)
    }

    fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.directory.join(file)).ok()?.trim().parse().ok()
    }

    fn available(&self) -> Option<u64> {
        let (limit, usage) = (self.number(self.names.limit)?, self.number(self.names.usage)?);
        let statistics = fs::read_to_string(self.directory.join("memory.stat")).unwrap_or_default();
        let reclaimable = statistics.lines().find_map(|line| {
            let (name, value) = line.split_once(' ')?;
            (name == self.names.reclaimable).then(|| value.trim().parse::<u64>().ok())?
        });
        Some(limit.saturating_sub(usage.saturating_sub(reclaimable.unwrap_or(0))))
    }
}

/// The limited groups of this process, its own and those above, by the text of `/proc/self/cgroup`.
fn groups(membership: &str, root: &Path) -> Vec<Group> {
    let mut found = Vec::new();
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (base, names) = match controllers {
            "" => (root.to_owned(), &VERSION_2),
            list if list.split(',').any(|name| name == "memory") => (root.join("memory"), &VERSION_1),
            _ => continue,
        };
        // In a container the path may be the host's, which is not seen there; the root of the tree always is.
        let mut directory = base.join(path.trim_start_matches('/'));
        loop {
            found.extend(Group::limited(&directory, names));
            if directory == base || !directory.pop() {
                break;
            }
        }
    }
    found
}

fn available_of_machine() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// RAM that could be taken now, or `None` where the kernel does not say.
pub(crate) fn available() -> Option<ByteCount> {
    static GROUPS: OnceLock<Vec<Group>> = OnceLock::new();
    let of_groups = GROUPS.get_or_init(|| {
        let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        groups(&membership, Path::new("/sys/fs/cgroup"))
    });
    let figures = of_groups.iter().map(Group::available).chain([available_of_machine()]);
    figures.flatten().min().map(ByteCount)
}

/// The error for a shortage of RAM, with what is left now.
pub(crate) fn shortage(call: &'static str, requested: ByteCount) -> DeviceError {
    DeviceError::HostMemory {
        call,
        requested,
        available: available().unwrap_or_default().saturating_sub(RAM_HEADROOM),
        remedy: "lower device_budget or host_budget, or free memory on this machine (or raise its memory limit)",
    }
}

/// Refuses what would leave the machine without memory.
pub(crate) fn check_available(call: &'static str, bytes: ByteCount) -> Result<(), DeviceError> {
    match available() {
        Some(available) if bytes > available.saturating_sub(RAM_HEADROOM) => Err(shortage(call, bytes)),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;

    fn put(directory: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(directory).unwrap();
        for (name, text) in files {
            fs::write(directory.join(name), text).unwrap();
        }
    }

    #[test]
    fn the_narrowest_group_counts_in_both_versions() {
        let root = tempfile::tempdir().unwrap();
        let (outer, inner) = (root.path().join("a"), root.path().join("a/b"));
        put(
            &outer,
            &[
                ("memory.max", "1000\n"),
                ("memory.current", "900\n"),
                ("memory.stat", "anon 1\ninactive_file 50\n"),
            ],
        );
        put(&inner, &[("memory.max", "max\n"), ("memory.current", "10\n")]);
        let old = root.path().join("memory/c");
        put(&old, &[("memory.limit_in_bytes", "500\n"), ("memory.usage_in_bytes", "600\n")]);
        put(&root.path().join("memory"), &[("memory.limit_in_bytes", "9223372036854771712\n")]);
        let membership = "4:cpu,memory:/c\n2:cpuset:/\n0::/a/b\n";
        let found: Vec<_> = groups(membership, root.path()).iter().map(|g| g.available().unwrap()).collect();
        assert_eq!(found, [0, 150]);
        assert_eq!(groups("0::/not/seen/here\nrubbish", root.path()).len(), 0);
    }

    #[test]
    fn the_machine_says_what_is_available() {
        let available = available().unwrap();
        assert!(available > ByteCount::mib(1) && available < ByteCount(NO_LIMIT), "{available}");
        assert!(matches!(
            check_available("a test", ByteCount(NO_LIMIT)),
            Err(DeviceError::HostMemory { .. })
        ));
        check_available("a test", ByteCount::ZERO).unwrap();
    }
}
