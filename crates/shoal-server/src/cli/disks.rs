//! What `shoal doctor` says of the tiers that keep KV: host memory and disks.
//!
//! Apart because of a disk it tries: a file is made and removed in each directory that is there, by the means that a
//! worker will use.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use shoal_core::bytes::ByteCount;
use shoal_memory::disk::{Engine, raw_medium};

use super::doctor::{Check, Level};
use crate::config::{DiskTier, HostTier, ServerConfig};

/// What each model has in host memory, where any has a use for it.
pub(super) fn host_tier(config: &ServerConfig) -> Option<Check> {
    let tiers = config.host_tiers();
    if config.host_tier == HostTier::Off || tiers.is_empty() {
        return None;
    }
    let each = |(name, bytes): &(&str, ByteCount)| {
        if bytes.is_zero() { format!("{name} none") } else { format!("{name} {bytes}") }
    };
    let found = format!("for KV: {}", tiers.iter().map(each).collect::<Vec<_>>().join(", "));
    // A model whose weights are not known yet gets its part at a later start.
    let known = |name: &str| config.model(name).is_some_and(|model| model.weights.is_some());
    let is_enough = tiers.iter().all(|(name, bytes)| !bytes.is_zero() || !known(name));
    let remedy = "copies of weights leave too little of host_budget: raise it, or write host_tier = \"off\"";
    Some(Check::of(is_enough, Level::Warn, "host tier", found, remedy))
}

/// The tier's directories, each with what is wrong with it.
pub(super) fn disk_tier(config: &ServerConfig) -> Vec<Check> {
    config.disk.iter().flat_map(of_disk).collect()
}

fn of_disk(disk: &DiskTier) -> Vec<Check> {
    let DiskTier { path, bytes, weights, .. } = disk;
    let name = format!("disk tier ({})", path.display());
    let most = ByteCount(bytes.0.saturating_add(weights.unwrap_or_default().0));
    let mut checks = vec![room(&name, path, most)];
    if path.is_dir() {
        checks.push(means(&name, path));
    } else {
        let there = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let may_write = rustix::fs::access(there, rustix::fs::Access::WRITE_OK).is_ok();
        let remedy =
            format!("no permission to make it in {}: make it, and give it to this user", there.display());
        checks.push(Check::of(may_write, Level::Warn, &name, "to be made".to_owned(), &remedy));
    }
    checks
}

/// Whether there is room for all that it may hold, beside what it holds.
fn room(name: &str, path: &Path, bytes: ByteCount) -> Check {
    let there = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(there) {
        Ok(stat) => {
            let free = ByteCount(stat.f_bavail.saturating_mul(stat.f_frsize));
            let held = held(path);
            let found = format!("{free} free and {held} in use, of at most {bytes}");
            let remedy = "make room, or lower `bytes` or `weights`; until then less is kept";
            Check::of(free.0.saturating_add(held.0) >= bytes.0, Level::Warn, name, found, remedy)
        }
        Err(error) => Check::not_ok(Level::Warn, name, error.to_string(), "check the directory"),
    }
}

/// What the logs of models take there, and weights.
fn held(path: &Path) -> ByteCount {
    let entries =
        |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let logs = entries(path).map(|entry| entry.join("log"));
    logs.chain(entries(&path.join("weights/packs")))
        .filter_map(|log| Some(ByteCount(std::fs::metadata(log).ok()?.blocks().saturating_mul(512))))
        .sum()
}

/// How a file there is read and written.
fn means(name: &str, path: &Path) -> Check {
    let probe = Probe(path.join(format!(".doctor-{}", std::process::id())));
    match raw_medium(&probe.0, Engine::Auto, 4) {
        Ok(medium) => {
            let means = medium.means();
            let direct = if means.is_direct { "past the page cache" } else { "through the page cache" };
            let mut found = format!("{}, {direct}", means.engine);
            if !means.reasons.is_empty() {
                found = format!("{found}: {}", means.reasons.join("; "));
            }
            let remedy = "it works, only slower: allow io_uring (in a container, by its seccomp profile), and use a file system \
                          with direct I/O, such as ext4 or XFS";
            Check::of(means.reasons.is_empty(), Level::Warn, name, found, remedy)
        }
        Err(error) => {
            let remedy =
                format!("no file can be made there: chown or chmod {}, or name another path", path.display());
            Check::not_ok(Level::Warn, name, error.to_string(), remedy)
        }
    }
}

/// A file that goes with this.
struct Probe(PathBuf);

impl Drop for Probe {
    fn drop(&mut self) {
        // It may never have been made.
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn directories_are_judged() {
        let folder = tempfile::tempdir().expect("a directory");
        let disk =
            |path: PathBuf, bytes| DiskTier { path, bytes, write_bytes_per_hour: bytes, weights: None };
        let worst = |disk: &DiskTier| of_disk(disk).into_iter().map(|check| check.level).max();
        let here = folder.path().to_owned();

        let checks = of_disk(&disk(here.clone(), ByteCount::mib(64)));
        assert_eq!(checks.len(), 2);
        assert!(checks[1].found.contains("page cache"), "{checks:?}");
        assert_eq!(std::fs::read_dir(&here).expect("it is there").count(), 0, "nothing is left");
        assert_eq!(worst(&disk(here.join("a/b"), ByteCount::mib(64))), Some(Level::Ok), "to be made");
        assert_eq!(
            worst(&disk(here.clone(), ByteCount(u64::MAX / 2))),
            Some(Level::Warn),
            "no disk is so large"
        );
        if rustix::process::geteuid().is_root() {
            // Nothing is forbidden to it.
            return;
        }
        std::fs::set_permissions(&here, std::fs::Permissions::from_mode(0o500)).expect("set");
        for path in [here.clone(), here.join("a")] {
            let checks = of_disk(&disk(path, ByteCount::mib(64)));
            assert_eq!(checks[1].level, Level::Warn, "{checks:?}");
            assert!(checks[1].remedy.is_some());
        }
    }
}
