//! Groups of one cache take memory from one another: an allocation that can be served so is, and one that cannot, or not
//! now, says so and has changed nothing.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{PAGE, World, open, until};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::prefix::{Found, Start};
use shoal_core::kv::reuse::ReuseOptions;
use shoal_core::protocol::LeaseKind;
use shoal_device::Stream;
use shoal_memory::{
    KvCache, KvCacheSpec, LeaseError, LeaseSource, LocalBudget, ManagerOptions, MemoryManager, PoolOptions,
};

const TOKENS: u32 = 8;

/// A budget whose memory for weights comes back only when it may: until then whoever unmaps it has the turn.
#[derive(Debug)]
struct Slow {
    budget: Arc<LocalBudget>,
    is_open: AtomicBool,
    is_waiting: AtomicBool,
}

impl LeaseSource for Slow {
    fn acquire(
        &self,
        kind: LeaseKind,
        bytes: ByteCount,
        bytes_min: ByteCount,
        deadline: Duration,
        reason: &str,
    ) -> Result<ByteCount, LeaseError> {
        self.budget.acquire(kind, bytes, bytes_min, deadline, reason)
    }

    fn give_back(&self, kind: LeaseKind, bytes: ByteCount) {
        while kind == LeaseKind::Weights && !self.is_open.load(Ordering::Acquire) {
            self.is_waiting.store(true, Ordering::Release);
            thread::sleep(Duration::from_millis(1));
        }
        self.budget.give_back(kind, bytes);
    }

    fn held(&self, kind: LeaseKind) -> ByteCount {
        self.budget.held(kind)
    }
}

fn slow_world(mib: u64) -> (World, Arc<Slow>) {
    let dir = tempfile::tempdir().expect("a directory");
    let (device, budget) = (open(dir.path(), 64), LocalBudget::new(ByteCount::mib(mib)));
    let (is_open, is_waiting) = (AtomicBool::new(false), AtomicBool::new(false));
    let lease = Arc::new(Slow { budget: Arc::clone(&budget), is_open, is_waiting });
    let mut options = ManagerOptions::new(ByteCount::mib(64), Arc::clone(&lease) as _);
    options.operation_wait = Duration::from_secs(10);
    options.pool = Some(PoolOptions::off());
    let manager = MemoryManager::new(Arc::clone(&device), options).expect("a manager");
    (World { dir, device, budget, manager }, lease)
}

/// Groups of blocks of 512 KiB in granules of 2 MiB; nothing is mapped ahead.
fn cache(world: &World, groups: usize, mib: u64) -> KvCache {
    let shape = BlockShape::Latent { tokens: TOKENS, dim: 64 << 10 };
    let group = |name: usize| GroupSpec { name: name.to_string(), layers: 1, shape, element_bytes: 1 };
    let groups = (0..groups).map(group).collect();
    let (bytes, granule_bytes_max) = (ByteCount::mib(mib), ByteCount(PAGE));
    let cache = CacheSpec { groups, order: PlaneOrder::BlockMajor, bytes, granule_bytes_max };
    let mut spec = KvCacheSpec { spare_bytes_max: ByteCount::ZERO, ..KvCacheSpec::new("kv", cache) };
    spec.reuse = Some(ReuseOptions::default());
    spec.patience = Duration::from_millis(50);
    world.manager.kv_cache(spec).expect("addresses")
}

fn alloc(cache: &KvCache, group: usize, count: usize) -> Option<Vec<u32>> {
    let mut ids = vec![u32::MAX; count];
    cache.alloc(group, &mut ids).expect("not now is no error").then_some(ids)
}

/// So many blocks of each group hold a prefix, and nobody owns them.
fn remember(cache: &KvCache, groups: usize, blocks: usize) {
    let ids: Vec<Vec<u32>> =
        (0..groups).map(|group| alloc(cache, group, blocks).expect("there is room")).collect();
    let lists: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
    cache.seal(Start::Salt(b""), &tokens(blocks), &lists).expect("owned");
    for (group, ids) in ids.iter().enumerate() {
        cache.free(group, ids).expect("owned");
    }
}

fn tokens(blocks: usize) -> Vec<u32> {
    (0..u32::try_from(blocks).expect("few") * TOKENS).collect()
}

/// How many blocks of the prefix are found.
fn found(cache: &KvCache, blocks: usize) -> usize {
    let mut found = Found::default();
    cache.find(b"", &tokens(blocks), &mut found).expect("an index");
    for (group, part) in found.groups.iter().enumerate() {
        cache.free(group, &part.blocks).expect("owned");
    }
    found.blocks
}

#[test]
fn what_another_operation_is_in_the_way_of_is_not_now() {
    let (world, lease) = slow_world(20);
    let other = world.region("weights", 2, LeaseKind::Weights);
    other.commit(ByteCount::ZERO, ByteCount(2 * PAGE)).expect("room");
    let cache = cache(&world, 2, 16);
    // Known steps have ended, so only the turn is waited for.
    let engine = Stream::create(&world.device).expect("a stream");
    cache.record_step_event(engine.record().expect("marked"));
    remember(&cache, 2, 16);
    thread::scope(|scope| {
        let leaves = scope.spawn(|| other.decommit(ByteCount::ZERO, ByteCount(2 * PAGE)));
        until("the other operation has the turn", || lease.is_waiting.load(Ordering::Acquire));
        for _ in 0..3 {
            assert_eq!(alloc(&cache, 1, 20), None, "memory of the other group would do, but not now");
        }
        lease.is_open.store(true, Ordering::Release);
        leaves.join().expect("no panic").expect("it is gone");
    });
    let ids = alloc(&cache, 1, 20).expect("what is cached goes now");
    cache.free(1, &ids).expect("owned");
    cache.check_invariants().expect("invariants");
    world.check();
}
