//! What this machine allows for host memory, read once when asked, with the remedy for each thing that is short.
//!
//! Apart because two ask: the arena, which chooses its backing by it, and `shoal doctor`, which shows it to a person.

use std::fs;
use std::path::Path;

use rustix::process::{Resource, getrlimit};
use shoal_core::bytes::ByteCount;

use crate::sim::ram;

/// One of the kernel's switches for huge pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PageSetting {
    /// Every mapping gets them.
    Always,
    /// Those that ask for them get them, which ours do.
    OnRequest,
    /// Nobody gets them.
    Never,
    /// The kernel does not say.
    Unknown,
}

impl PageSetting {
    /// The bracketed word of a setting's file.
    fn parse(text: &str) -> Self {
        let word = text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(word, _)| word);
        match word {
            Some("always" | "force") => Self::Always,
            Some("advise" | "madvise" | "within_size") => Self::OnRequest,
            Some("never" | "deny") => Self::Never,
            _ => Self::Unknown,
        }
    }

    fn read(root: &Path, name: &str) -> Self {
        let path = root.join("sys/kernel/mm/transparent_hugepage").join(name);
        fs::read_to_string(path).map_or(Self::Unknown, |text| Self::parse(&text))
    }
}

/// What a machine allows for host memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSurvey {
    /// Huge pages for private memory.
    pub private_huge_pages: PageSetting,
    /// Huge pages for memory files, which several processes can map.
    pub shared_huge_pages: PageSetting,
    /// Huge pages that an administrator set aside and nobody uses.
    pub reserved_huge_pages: ByteCount,
    /// How much this process may lock (`RLIMIT_MEMLOCK`); `None`: no limit.
    pub lock_limit: Option<ByteCount>,
    /// RAM that can still be taken, by the machine and by the control group; `None`: the kernel does not say.
    pub available: Option<ByteCount>,
    /// How many mappings a process may have (`vm.max_map_count`).
    pub mappings_max: Option<u64>,
    /// How many files a process may have open.
    pub files_max: Option<u64>,
}

/// Reads this machine's settings.
#[must_use]
pub fn survey() -> HostSurvey {
    HostSurvey::of(Path::new("/"))
}

impl HostSurvey {
    fn of(root: &Path) -> Self {
        let number = |name: &str| fs::read_to_string(root.join(name)).ok()?.trim().parse::<u64>().ok();
        let reserved = number("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        Self {
            private_huge_pages: PageSetting::read(root, "enabled"),
            shared_huge_pages: PageSetting::read(root, "shmem_enabled"),
            reserved_huge_pages: ByteCount::mib(2 * reserved.unwrap_or(0)),
            lock_limit: getrlimit(Resource::Memlock).current.map(ByteCount),
            available: ram::available(),
            mappings_max: number("proc/sys/vm/max_map_count"),
            files_max: getrlimit(Resource::Nofile).current,
        }
    }

    /// What a person can do to make host memory faster or larger, a sentence each; nothing where all is well.
    #[must_use]
    pub fn remedies(&self) -> Vec<String> {
        let mut remedies = Vec::new();
        let has_shared = matches!(self.shared_huge_pages, PageSetting::Always | PageSetting::OnRequest);
        if !has_shared && self.reserved_huge_pages.is_zero() && self.shared_huge_pages != PageSetting::Unknown
        {
            remedies.push(
                "memory that processes share has small pages: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
                    .to_owned(),
            );
        }
        if self.private_huge_pages == PageSetting::Never {
            remedies.push(
                "huge pages are off: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled".to_owned(),
            );
        }
        if let Some(limit) = self.lock_limit {
            remedies.push(format!(
                "this process may lock {limit} of memory: raise it (ulimit -l unlimited, LimitMEMLOCK=infinity, docker run --ulimit memlock=-1)"
            ));
        }
        remedies
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_missing_ones_are_unknown() {
        let root = tempfile::tempdir().unwrap();
        let empty = HostSurvey::of(root.path());
        assert_eq!((empty.private_huge_pages, empty.mappings_max), (PageSetting::Unknown, None));
        let pages = root.path().join("sys/kernel/mm/transparent_hugepage");
        let reserved = root.path().join("sys/kernel/mm/hugepages/hugepages-2048kB");
        for folder in [&pages, &reserved] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::write(pages.join("enabled"), "always [madvise] never\n").unwrap();
        fs::write(pages.join("shmem_enabled"), "always within_size advise [never] deny force\n").unwrap();
        fs::write(reserved.join("free_hugepages"), "3\n").unwrap();
        let found = HostSurvey::of(root.path());
        assert_eq!(found.private_huge_pages, PageSetting::OnRequest);
        assert_eq!(found.shared_huge_pages, PageSetting::Never);
        assert_eq!(found.reserved_huge_pages, ByteCount::mib(6));
        let none = HostSurvey { reserved_huge_pages: ByteCount::ZERO, lock_limit: None, ..found };
        assert!(matches!(none.remedies().as_slice(), [one] if one.contains("shmem_enabled")), "{none:?}");
    }
}
