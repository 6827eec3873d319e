//! Groups of one cache take memory from one another: an allocation that can be served so is, and one that cannot, or not
//! now, says so and has changed nothing.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{PAGE, WAIT, World, open, until, world};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::prefix::{Found, PrefixStats, Start};
use shoal_core::kv::reuse::ReuseOptions;
use shoal_core::protocol::LeaseKind;
use shoal_device::Stream;
use shoal_memory::{
    KvCache, KvCacheSpec, LeaseError, LeaseSource, LocalBudget, ManagerOptions, MemoryManager, PoolOptions,
};

const ALL: ByteCount = ByteCount(u64::MAX);
const TOKENS: u32 = 8;
/// How long an allocation waits that shall not get what it waits for.
const SHORT: Duration = Duration::from_millis(200);

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
fn cache(world: &World, groups: usize, mib: u64, patience: Duration) -> KvCache {
    let shape = BlockShape::Latent { tokens: TOKENS, dim: 64 << 10 };
    let group = |name: usize| GroupSpec { name: name.to_string(), layers: 1, shape, element_bytes: 1 };
    let groups = (0..groups).map(group).collect();
    let (bytes, granule_bytes_max) = (ByteCount::mib(mib), ByteCount(PAGE));
    let cache = CacheSpec { groups, order: PlaneOrder::BlockMajor, bytes, granule_bytes_max };
    let mut spec = KvCacheSpec { spare_bytes_max: ByteCount::ZERO, ..KvCacheSpec::new("kv", cache) };
    spec.reuse = Some(ReuseOptions::default());
    spec.patience = patience;
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

fn check(world: &World, cache: &KvCache) {
    cache.check_invariants().expect("invariants");
    world.manager.check_invariants().expect("invariants");
    // The cache's own thread may be giving memory back, which is leased a moment longer than it is mapped.
    until("as much is leased as is mapped (I1)", || world.device_used() == world.leased());
}

struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most
    }
}

#[test]
fn what_another_operation_is_in_the_way_of_is_not_now() {
    let (world, lease) = slow_world(20);
    let other = world.region("weights", 2, LeaseKind::Weights);
    other.commit(ByteCount::ZERO, ByteCount(2 * PAGE)).expect("room");
    let cache = cache(&world, 2, 16, SHORT);
    // Known steps have ended, so only the turn is waited for.
    let engine = Stream::create(&world.device).expect("a stream");
    cache.record_step_event(engine.record().expect("marked"));
    remember(&cache, 2, 16);
    let was = kept(&cache);
    thread::scope(|scope| {
        let leaves = scope.spawn(|| other.decommit(ByteCount::ZERO, ByteCount(2 * PAGE)));
        until("the other operation has the turn", || lease.is_waiting.load(Ordering::Acquire));
        for _ in 0..3 {
            assert_eq!(alloc(&cache, 1, 20), None, "memory of the other group would do, but not now");
        }
        assert_eq!(kept(&cache), was);
        lease.is_open.store(true, Ordering::Release);
        leaves.join().expect("no panic").expect("it is gone");
    });
    until("what is cached goes", || alloc(&cache, 1, 20).is_some_and(|ids| cache.free(1, &ids).is_ok()));
    check(&world, &cache);
}

/// It has evicted what it needs, and a step that was recorded while it waited for the turn may use that: others have their
/// turn while that step runs.
#[test]
fn nobody_waits_for_the_turn_of_one_that_waits_for_a_long_step() {
    let (world, lease) = slow_world(20);
    let other = world.region("weights", 2, LeaseKind::Weights);
    other.commit(ByteCount::ZERO, ByteCount(2 * PAGE)).expect("room");
    let cache = cache(&world, 2, 16, WAIT);
    let engine = Stream::create(&world.device).expect("a stream");
    cache.record_step_event(engine.record().expect("marked"));
    remember(&cache, 2, 16);
    let was = kept(&cache);
    let is_over = Arc::new(AtomicBool::new(false));
    thread::scope(|scope| {
        let leaves = scope.spawn(|| other.decommit(ByteCount::ZERO, ByteCount(2 * PAGE)));
        until("the other operation has the turn", || lease.is_waiting.load(Ordering::Acquire));
        let grows = scope.spawn(|| alloc(&cache, 1, 20));
        // Whether it has looked at the steps by then or looks again, the long one is there before anything goes.
        thread::sleep(SHORT);
        let go = Arc::clone(&is_over);
        let step = move || {
            while !go.load(Ordering::Acquire) {
                thread::sleep(Duration::from_millis(1));
            }
        };
        engine.launch_host((), step).expect("launched");
        cache.record_step_event(engine.record().expect("marked"));
        lease.is_open.store(true, Ordering::Release);
        leaves.join().expect("no panic").expect("it is gone");
        until("what is cached goes", || cache.usage().cached < was.1);
        other.commit(ByteCount::ZERO, ByteCount(PAGE)).expect("its turn, while the step runs");
        is_over.store(true, Ordering::Release);
        let ids = grows.join().expect("no panic").expect("what it evicted for");
        cache.free(1, &ids).expect("owned");
    });
    check(&world, &cache);
}

/// What a refused allocation leaves as it was.
fn kept(cache: &KvCache) -> (ByteCount, ByteCount, PrefixStats, u64) {
    let (usage, stats) = (cache.usage(), cache.prefix_stats().expect("an index"));
    (usage.live, usage.cached, stats, cache.events_since(0, 10_000).expect("an index").next)
}

#[test]
fn not_now_costs_nothing_that_is_cached() {
    // By the budget, by the limit, and by both.
    for (budget, limit) in [(32, 64), (64, 32), (32, 32)] {
        let world = world(budget, 64);
        let cache = cache(&world, 2, 64, WAIT);
        cache.set_limit(ByteCount::mib(limit), None).expect("below the reservation");
        remember(&cache, 2, 12);
        let was = kept(&cache);
        assert_eq!(was.1, ByteCount::mib(12));
        for blocks in [65, 80, 128] {
            for _ in 0..3 {
                assert_eq!(alloc(&cache, 1, blocks), None, "{blocks} of {budget} MiB, {limit} MiB");
            }
        }
        assert_eq!(kept(&cache), was);
        assert_eq!(found(&cache, 12), 12, "all of it");
        let ids = alloc(&cache, 1, 64).expect("all there is");
        assert_eq!(cache.usage().cached, ByteCount::ZERO);
        assert_eq!(alloc(&cache, 0, 1), None);
        cache.free(1, &ids).expect("owned");
        check(&world, &cache);
    }
}

#[test]
fn a_step_that_runs_costs_nothing_that_is_cached() {
    let world = world(16, 64);
    let cache = cache(&world, 2, 16, SHORT);
    remember(&cache, 2, 16);
    let was = kept(&cache);
    let engine = Stream::create(&world.device).expect("a stream");
    let is_over = Arc::new(AtomicBool::new(false));
    let go = Arc::clone(&is_over);
    let step = move || {
        while !go.load(Ordering::Acquire) {
            thread::sleep(Duration::from_millis(1));
        }
    };
    engine.launch_host((), step).expect("launched");
    cache.record_step_event(engine.record().expect("marked"));
    assert_eq!(alloc(&cache, 1, 20), None, "the step may use what the other group has");
    assert_eq!(kept(&cache), was);
    assert_eq!(found(&cache, 16), 16);
    is_over.store(true, Ordering::Release);
    until("the step has ended", || alloc(&cache, 1, 20).is_some());
    check(&world, &cache);
}

/// Whatever is owned, cached, empty and free: what is refused could not be had without anything cached either.
#[test]
fn an_allocation_takes_what_it_needs_or_nothing() {
    let (mut refused, mut evicted) = (0, 0);
    for seed in 0..200_u64 {
        let mut random = Random(seed);
        let world = world(16 + 2 * random.below(9), 64);
        let cache = cache(&world, 3, 48, WAIT);
        cache.set_limit(ByteCount::mib(16 + random.below(16)), None).expect("below the reservation");
        let mut held: Vec<(usize, Vec<u32>)> = Vec::new();
        for salt in 0..4_u8 {
            let count = usize::try_from(1 + random.below(6)).expect("few");
            let mut lists = Vec::new();
            for group in 0..3 {
                let Some(ids) = alloc(&cache, group, count) else { break };
                lists.push(ids);
            }
            if let [a, b, c] = lists.as_slice() {
                cache.seal(Start::Salt(&[salt]), &tokens(count), &[a, b, c]).expect("owned");
            }
            for (group, ids) in lists.into_iter().enumerate() {
                if random.below(4) == 0 {
                    held.push((group, ids));
                } else {
                    cache.free(group, &ids).expect("owned");
                }
            }
        }
        let (group, count) = (usize::try_from(random.below(3)).expect("few"), 1 + random.below(56));
        let count = usize::try_from(count).expect("few");
        let was = kept(&cache);
        if let Some(ids) = alloc(&cache, group, count) {
            evicted += u64::from(kept(&cache).1 < was.1);
            cache.free(group, &ids).expect("owned");
        } else {
            refused += 1;
            assert_eq!(kept(&cache), was, "seed {seed}: {count} of group {group} were refused");
            cache.forget_all().expect("an index");
            cache.trim(ALL).expect("no step runs");
            assert_eq!(alloc(&cache, group, count), None, "seed {seed}: they could be had");
        }
        for (group, ids) in held {
            cache.free(group, &ids).expect("owned");
        }
        check(&world, &cache);
    }
    assert!(refused > 20 && evicted > 20, "{refused} refused, {evicted} by evicting");
}
