//! What slabs are made of on this machine, and why.
//!
//! Apart because it is the one place that weighs the machine's settings. Shared memory with huge pages comes first: it is
//! the fastest to make, and the only kind that another process could map. Pages that an administrator set aside come after
//! it, since somebody else may count on them. What a machine refuses is not tried again.

use shoal_core::bytes::ByteCount;
use shoal_device::HostBacking;
use shoal_device::host::{HostSurvey, PageSetting};

/// In the order in which they are tried, each with the reason for it.
pub(super) fn candidates(survey: &HostSurvey, bytes: ByteCount) -> Vec<(HostBacking, String)> {
    let is_on = |setting: &PageSetting| matches!(setting, PageSetting::Always | PageSetting::OnRequest);
    let mut found = Vec::new();
    if is_on(&survey.shared_huge_pages) {
        let reason = "memory is shared memory with huge pages (shmem_enabled allows it)";
        found.push((HostBacking::SharedHugePages, reason.to_owned()));
    }
    if survey.reserved_huge_pages >= bytes {
        let reason = "memory is taken from huge pages that were set aside (vm.nr_hugepages)";
        found.push((HostBacking::ReservedHugePages, reason.to_owned()));
    }
    let shared = match survey.shared_huge_pages {
        PageSetting::Never => "shmem_enabled is never",
        PageSetting::Unknown => "the kernel has no setting shmem_enabled",
        PageSetting::Always | PageSetting::OnRequest => "shared memory was refused",
    };
    if survey.private_huge_pages != PageSetting::Never {
        let reason = format!("memory is private memory with huge pages: {shared}");
        found.push((HostBacking::HugePages, reason));
    }
    let reason = format!("memory has small pages, which are slow to make: {shared}, and huge pages are off");
    found.push((HostBacking::SmallPages, reason));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

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
        candidates(&survey, ByteCount::mib(64)).into_iter().map(|(backing, _)| backing).collect()
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
