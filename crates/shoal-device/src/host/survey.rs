//! What this machine allows for host memory, read once when asked, and what is therefore made of what.
//!
//! Apart because two ask: the arena, which chooses its backing by it, and `shoal doctor`, which shows it to a person.

use std::fs;
use std::path::Path;

use rustix::process::{Resource, getrlimit};
use shoal_core::bytes::ByteCount;

use crate::device::HostBacking;
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
    /// Whether memory that asks for huge pages gets them.
    #[must_use]
    pub const fn is_allowed(&self) -> bool {
        matches!(self, Self::Always | Self::OnRequest)
    }

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

    /// What a piece of host memory of so many bytes can be made of here, in the order in which it is worth trying, each
    /// with the reason for it in words. Shared memory with huge pages comes first: it is the fastest to make, and the only
    /// kind that another process can map. Pages that an administrator set aside come after it, since somebody else may
    /// count on them.
    #[must_use]
    pub fn backings(&self, bytes: ByteCount) -> Vec<(HostBacking, String)> {
        let mut found = Vec::new();
        if self.shared_huge_pages.is_allowed() {
            let reason = "shared memory with huge pages, as shmem_enabled allows";
            found.push((HostBacking::SharedHugePages, reason.to_owned()));
        }
        if self.reserved_huge_pages >= bytes {
            let reason = "huge pages that were set aside (vm.nr_hugepages)";
            found.push((HostBacking::ReservedHugePages, reason.to_owned()));
        }
        let shared = match self.shared_huge_pages {
            PageSetting::Never => "shmem_enabled is never",
            PageSetting::Unknown => "the kernel has no setting shmem_enabled",
            PageSetting::Always | PageSetting::OnRequest => "shared memory was refused",
        };
        if self.private_huge_pages != PageSetting::Never {
            found.push((HostBacking::HugePages, format!("private memory with huge pages, since {shared}")));
        }
        let reason = format!("small pages, which are slow to make, since {shared} and huge pages are off");
        found.push((HostBacking::SmallPages, reason));
        found
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
    }

    fn of(private: PageSetting, shared: PageSetting, reserved_mib: u64) -> Vec<HostBacking> {
        let survey = HostSurvey {
            private_huge_pages: private,
            shared_huge_pages: shared,
            reserved_huge_pages: ByteCount::mib(reserved_mib),
            lock_limit: None,
            available: None,
            mappings_max: None,
            files_max: None,
        };
        survey.backings(ByteCount::mib(64)).into_iter().map(|(backing, _)| backing).collect()
    }

    #[test]
    fn the_fastest_that_is_allowed_comes_first_and_small_pages_always_do() {
        use HostBacking::{HugePages, ReservedHugePages, SharedHugePages, SmallPages};
        use PageSetting::{Always, Never, OnRequest, Unknown};
        assert_eq!(of(OnRequest, Never, 0), [HugePages, SmallPages]);
        assert_eq!(of(OnRequest, OnRequest, 0), [SharedHugePages, HugePages, SmallPages]);
        assert_eq!(of(Always, Always, 64), [SharedHugePages, ReservedHugePages, HugePages, SmallPages]);
        assert_eq!(of(Never, Never, 63), [SmallPages]);
        assert_eq!(of(Never, Never, 64), [ReservedHugePages, SmallPages]);
        assert_eq!(of(Unknown, Unknown, 0), [HugePages, SmallPages]);
    }
}
