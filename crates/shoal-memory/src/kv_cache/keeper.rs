//! KV that an engine keeps for itself: what it only remembers goes by the engine's own hand, and not while it looks at it.
//!
//! Apart from [`super::reuse`], where the cache remembers and can forget by itself. An engine with books of its own owns
//! such blocks here, so a reclaim sees them as used. Where it says that it serves ([`KvCache::next_wanted`]), a reclaim asks
//! it before it takes anything else that is worth something, and waits for its answer, for a bounded time and with neither
//! lock nor gate: what the engine does to answer may need them.

use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;

use super::{KvCache, Shared};

/// The longest that a reclaim waits for an engine's answer.
const ANSWER_WAIT: Duration = Duration::from_secs(1);

impl Shared {
    /// Asks the engine for memory of what it only remembers; gives what it says it freed, zero where none serves or none
    /// answers in time. Hold neither turn, gate nor data lock.
    pub(crate) fn ask_keeper(&self, bytes: ByteCount, deadline: Instant) -> ByteCount {
        // What the engine gives up is not for the cache's own thread to map again.
        self.pause();
        self.keeper.ask(bytes, deadline.min(Instant::now() + ANSWER_WAIT))
    }

    /// What the engine says it only remembers.
    pub(super) fn kept(&self) -> ByteCount {
        self.keeper.kept()
    }
}

impl KvCache {
    /// Waits until a reclaim wants memory of what the engine only remembers; gives the question's number and how many bytes,
    /// none where nothing was wanted in time. From the first call on reclaims ask, and each is to be answered soon, by
    /// [`answer_wanted`](Self::answer_wanted).
    #[must_use]
    pub fn next_wanted(&self, timeout: Duration) -> Option<(u64, ByteCount)> {
        self.shared.keeper.next(Instant::now() + timeout)
    }

    /// Answers a question: so many bytes went. Nobody hears it where the time was up.
    pub fn answer_wanted(&self, number: u64, freed: ByteCount) {
        self.shared.keeper.answer(number, freed);
    }

    /// Says how many bytes the engine only remembers: they count as cached and not as used.
    pub fn set_kept(&self, bytes: ByteCount) {
        self.shared.keeper.set_kept(bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
    use shoal_device::{SimDevice, SimOptions};

    use super::*;
    use crate::kv_cache::KvCacheSpec;
    use crate::{LocalBudget, ManagerOptions, MemoryManager};

    fn manager() -> (tempfile::TempDir, Arc<MemoryManager>) {
        let scratch = tempfile::tempdir().expect("a directory");
        let options = SimOptions::new(ByteCount::mib(64), scratch.path().to_owned());
        let device = SimDevice::open_dyn(options).expect("a device");
        let budget = LocalBudget::new(ByteCount::mib(64));
        let manager =
            MemoryManager::new(device, ManagerOptions::new(ByteCount::mib(64), budget)).expect("a manager");
        (scratch, manager)
    }

    fn cache(manager: &Arc<MemoryManager>) -> KvCache {
        let shape = BlockShape::State { elements: 64 << 10 };
        let group = GroupSpec { name: "kv".to_owned(), layers: 2, shape, element_bytes: 1 };
        // As much as 64 blocks take: where all of it is mapped, nothing more can be mapped ahead before it is counted.
        let (bytes, granule_bytes_max) = (ByteCount::mib(8), ByteCount::mib(8));
        let cache =
            CacheSpec { groups: vec![group], order: PlaneOrder::LayerMajor, bytes, granule_bytes_max };
        manager.kv_cache(KvCacheSpec { reuse: None, ..KvCacheSpec::new("kv", cache) }).expect("a cache")
    }

    #[test]
    fn a_reclaim_asks_an_engine_that_serves_first() {
        let (_scratch, manager) = manager();
        let cache = Arc::new(cache(&manager));
        let mut ids = [0u32; 64];
        assert!(cache.alloc(0, &mut ids).expect("memory"));
        let mapped = manager.usage().kv_device;
        assert_eq!(manager.usage().kv_live, mapped);
        cache.set_kept(mapped);
        assert_eq!((manager.usage().kv_live, manager.usage().kv_cached), (ByteCount::ZERO, mapped));
        let engine = Arc::clone(&cache);
        let serving = std::thread::spawn(move || {
            let (number, wanted) = engine.next_wanted(Duration::from_secs(20)).expect("a question");
            assert!(engine.shared.is_stopped(), "nothing is mapped ahead meanwhile");
            engine.free(0, &ids).expect("owned");
            let report = engine.trim(wanted).expect("nothing runs");
            engine.set_kept(ByteCount::ZERO);
            engine.answer_wanted(number, report.freed);
            (wanted, report.freed)
        });
        while !cache.shared.keeper.is_served() {
            std::thread::yield_now();
        }
        let report =
            manager.reclaim(ByteCount::mib(4), Duration::from_secs(20), "a test").expect("nothing runs");
        let (wanted, freed) = serving.join().expect("it served");
        assert_eq!((wanted, report.freed), (ByteCount::mib(4), freed));
        assert_eq!(manager.usage().kv_device + freed, mapped);
    }

    #[test]
    fn nobody_waits_for_an_engine_that_does_not_serve_or_does_not_answer() {
        let (_scratch, manager) = manager();
        let cache = cache(&manager);
        let far = Instant::now() + Duration::from_secs(20);
        assert_eq!(cache.shared.ask_keeper(ByteCount::mib(4), far), ByteCount::ZERO);
        assert_eq!(cache.next_wanted(Duration::ZERO), None, "what was asked before it served is over");
        let soon = Instant::now() + Duration::from_millis(5);
        assert_eq!(cache.shared.ask_keeper(ByteCount::mib(4), soon), ByteCount::ZERO);
        // An answer that comes late is none to the next question.
        cache.answer_wanted(1, ByteCount::mib(4));
        let soon = Instant::now() + Duration::from_millis(5);
        assert_eq!(cache.shared.ask_keeper(ByteCount::mib(2), soon), ByteCount::ZERO);
    }
}
