//! What a KV cache only remembers gives way: to a wake, to a trim, to a guard, and before others give anything up for it.

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{PAGE, WAIT, World, noise, open, world};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::blocks::BlockState;
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::prefix::{Found, Start};
use shoal_core::protocol::LeaseKind;
use shoal_memory::kv_cache::Stray;
use shoal_memory::{
    KvCache, KvCacheSpec, LeaseError, LeaseSource, LocalBudget, ManagerOptions, MemoryManager, PoolOptions,
};

const ALL: ByteCount = ByteCount(u64::MAX);

/// Blocks of 512 KiB with one token each, and nothing mapped ahead.
fn cache(manager: &Arc<MemoryManager>, mib: u64) -> KvCache {
    let shape = BlockShape::Latent { tokens: 1, dim: 512 << 10 };
    let groups = vec![GroupSpec { name: "full".to_owned(), layers: 1, shape, element_bytes: 1 }];
    let (bytes, granule_bytes_max) = (ByteCount::mib(mib), ByteCount::mib(2));
    let cache = CacheSpec { groups, order: PlaneOrder::BlockMajor, bytes, granule_bytes_max };
    let spec = KvCacheSpec { spare_bytes_max: ByteCount::ZERO, ..KvCacheSpec::new("kv", cache) };
    manager.kv_cache(spec).expect("addresses")
}

/// Blocks that hold a prefix and that nobody owns.
fn remember(cache: &KvCache, blocks: u32) -> Vec<u32> {
    let mut ids = vec![0; blocks as usize];
    assert!(cache.alloc(0, &mut ids).expect("the device works"));
    cache.seal(Start::Salt(b""), &(0..blocks).collect::<Vec<u32>>(), &[&ids]).expect("owned");
    cache.free(0, &ids).expect("owned");
    ids
}

fn found(cache: &KvCache, tokens: u32) -> usize {
    let mut found = Found::default();
    cache.find(b"", &(0..tokens).collect::<Vec<u32>>(), &mut found).expect("an index");
    cache.free(0, &found.groups[0].blocks).expect("owned");
    found.tokens
}

fn check(world: &World, cache: &KvCache) {
    cache.check_invariants().expect("invariants");
    world.check();
}

#[test]
fn a_trim_takes_what_is_cached_only_where_that_is_said() {
    let world = world(64, 64);
    let cache = cache(&world.manager, 32);
    let ids = remember(&cache, 16);
    let mut owned = [0_u32; 2];
    assert!(cache.alloc(0, &mut owned).expect("the device works"));
    cache.trim(ALL).expect("no step runs");
    assert_eq!(cache.usage().mapped, ByteCount::mib(10));
    assert_eq!(found(&cache, 16), 16);
    // At least as much as was asked for, in whole granules, and the end of the prefix first.
    assert_eq!(cache.trim_cached(ByteCount::mib(1)).expect("no step runs").freed, ByteCount::mib(2));
    assert!((4..16).contains(&found(&cache, 16)), "{ids:?}");
    cache.trim_cached(ALL).expect("no step runs");
    let usage = cache.usage();
    assert_eq!(
        (usage.mapped, usage.live, usage.cached),
        (ByteCount::mib(2), ByteCount::mib(1), ByteCount::ZERO)
    );
    check(&world, &cache);
}

#[test]
fn weights_wake_although_prefixes_had_all_the_memory() {
    let world = world(16, 64);
    let weights = world.weights(5, &noise(5 * PAGE, 1));
    let cache = cache(&world.manager, 64);
    remember(&cache, 32);
    assert_eq!(world.device_used(), ByteCount::mib(16));
    let guard = world.manager.guard(WAIT).expect("what is only remembered goes");
    assert_eq!(weights.usage().device, ByteCount::mib(10));
    assert_eq!(cache.usage().mapped, ByteCount::mib(6), "no more than was needed");
    drop(guard);
    check(&world, &cache);
}

/// Where it is dearer than weights it goes after them, and before what somebody owns.
#[test]
fn what_is_only_remembered_outlasts_weights_where_that_is_said() {
    let world = world(64, 64);
    let weights = world.weights(4, &noise(4 * PAGE, 1));
    let cache = cache(&world.manager, 32);
    remember(&cache, 8);
    let mut owned = [0_u32; 4];
    assert!(cache.alloc(0, &mut owned).expect("the device works"));
    drop(world.manager.guard(WAIT).expect("room"));
    assert_eq!(world.device_used(), ByteCount::mib(8 + 4 + 2));
    let reclaim =
        |bytes| world.manager.reclaim_cached_last(bytes, WAIT, "a test").expect("no step runs").freed;
    assert_eq!(reclaim(ByteCount(1)), ByteCount::mib(2));
    assert_eq!((weights.usage().device, found(&cache, 8)), (ByteCount::mib(6), 8));
    assert_eq!(reclaim(ByteCount::mib(8)), ByteCount::mib(8));
    let usage = cache.usage();
    assert_eq!((weights.usage().device, usage.mapped), (ByteCount::ZERO, ByteCount::mib(4)));
    assert_eq!((usage.live, usage.cached), (ByteCount::mib(2), ByteCount::mib(2)), "what is owned is there");
    check(&world, &cache);
    // Without that it goes first.
    drop(world.manager.guard(WAIT).expect("room"));
    world.manager.reclaim(ByteCount(1), WAIT, "a test").expect("no step runs");
    assert_eq!((weights.usage().device, cache.usage().cached), (ByteCount::mib(8), ByteCount::ZERO));
    check(&world, &cache);
}

#[test]
fn no_guard_waits_for_what_is_only_remembered() {
    let world = world(16, 64);
    let cache = cache(&world.manager, 32);
    let mut ids = [0_u32; 16];
    assert!(cache.alloc(0, &mut ids).expect("the device works"));
    cache.seal(Start::Salt(b""), &(0..16).collect::<Vec<u32>>(), &[&ids]).expect("owned");
    world.manager.reclaim(ALL, WAIT, "a test").expect("no step runs");
    assert_eq!(cache.region().missing_bytes(), ByteCount::mib(8));
    // From here on nobody owns the end of it.
    cache.free(0, &ids[4..]).expect("owned");
    let guard = world.manager.guard(WAIT).expect("room");
    assert_eq!(world.device_used(), ByteCount::mib(2), "the granule that is owned");
    assert_eq!(found(&cache, 16), 4);
    drop(guard);
    check(&world, &cache);
}

/// A budget that remembers how long each lease might have been waited for.
#[derive(Debug)]
struct Asked {
    budget: Arc<LocalBudget>,
    waits: Mutex<Vec<Duration>>,
}

impl LeaseSource for Asked {
    fn acquire(
        &self,
        kind: LeaseKind,
        bytes: ByteCount,
        bytes_min: ByteCount,
        deadline: Duration,
        reason: &str,
    ) -> Result<ByteCount, LeaseError> {
        self.waits.lock().expect("whole").push(deadline);
        self.budget.acquire(kind, bytes, bytes_min, deadline, reason)
    }

    fn give_back(&self, kind: LeaseKind, bytes: ByteCount) {
        self.budget.give_back(kind, bytes);
    }

    fn held(&self, kind: LeaseKind) -> ByteCount {
        self.budget.held(kind)
    }
}

#[test]
fn nobody_gives_memory_up_for_a_cache_that_has_something_to_forget() {
    let dir = tempfile::tempdir().expect("a directory");
    let device = open(dir.path(), 64);
    let lease = Arc::new(Asked { budget: LocalBudget::new(ByteCount::mib(16)), waits: Mutex::default() });
    let mut options = ManagerOptions::new(ByteCount::mib(64), Arc::clone(&lease) as _);
    options.pool = Some(PoolOptions::off());
    let manager = MemoryManager::new(device, options).expect("a manager");
    let cache = cache(&manager, 64);
    let waits = || std::mem::take(&mut *lease.waits.lock().expect("whole"));
    remember(&cache, 8);
    assert!(waits().iter().all(|wait| !wait.is_zero()), "there was nothing to forget");
    // What is free is taken first, then what is cached.
    remember_more(&cache, 24);
    assert!(waits().iter().all(Duration::is_zero));
    assert_eq!(cache.usage().cached, ByteCount::mib(16), "all fits");
    remember_more(&cache, 8);
    let asked = waits();
    assert!(!asked.is_empty() && asked.iter().all(Duration::is_zero), "{asked:?}");
    assert_eq!(cache.usage().cached, ByteCount::mib(16));
    // Only when all of that would not do is somebody else asked.
    let mut all = [0_u32; 32];
    assert!(cache.alloc(0, &mut all).expect("the device works"));
    waits();
    assert!(!cache.alloc(0, &mut [0_u32; 4]).expect("the device works"));
    assert!(waits().iter().any(|wait| !wait.is_zero()));
    cache.check_invariants().expect("invariants");
}

fn remember_more(cache: &KvCache, blocks: u32) {
    let mut ids = vec![0_u32; blocks as usize];
    assert!(cache.alloc(0, &mut ids).expect("the device works"));
    let tokens: Vec<u32> = (0..blocks).map(|token| 1000 * blocks + token).collect();
    cache.seal(Start::Salt(b"more"), &tokens, &[&ids]).expect("owned");
    cache.free(0, &ids).expect("owned");
}

#[test]
fn room_for_ones_own_weights_is_made_of_what_nobody_uses() {
    let world = world(64, 64);
    let cache = cache(&world.manager, 32);
    let mut owned = [0_u32; 6];
    assert!(cache.alloc(0, &mut owned).expect("the device works"));
    remember(&cache, 16);
    let used = world.manager.usage().kv_live;
    assert_eq!(used, ByteCount::mib(4), "two granules, the second in part");
    let report = world.manager.reclaim_spare(ALL, WAIT, "a test").expect("no step runs");
    assert!(report.copied.is_zero(), "{report:?}");
    assert_eq!((world.device_used(), cache.region().missing_bytes()), (used, ByteCount::ZERO));
    check(&world, &cache);
}

fn debug_cache(manager: &Arc<MemoryManager>) -> KvCache {
    let shape = BlockShape::Latent { tokens: 1, dim: 512 << 10 };
    let groups = vec![GroupSpec { name: "full".to_owned(), layers: 1, shape, element_bytes: 1 }];
    let (bytes, granule_bytes_max) = (ByteCount::mib(32), ByteCount::mib(2));
    let cache = CacheSpec { groups, order: PlaneOrder::BlockMajor, bytes, granule_bytes_max };
    let spec =
        KvCacheSpec { spare_bytes_max: ByteCount::ZERO, is_debug: true, ..KvCacheSpec::new("kv", cache) };
    manager.kv_cache(spec).expect("addresses")
}

/// Where a block begins.
fn place(cache: &KvCache, block: u32) -> ByteCount {
    cache.layout(0).expect("a group").pieces(block).next().expect("a piece").0
}

fn scribble(cache: &KvCache, block: u32) {
    cache.region().write(place(cache, block) + ByteCount(4097), &[9]).expect("it has memory");
}

#[test]
fn in_debug_mode_a_write_to_what_is_only_cached_is_found() {
    let world = world(64, 64);
    let cache = debug_cache(&world.manager);
    let ids = remember(&cache, 8);
    let strays = |cache: &KvCache| cache.strays().expect("debug mode");
    let stray = |block: u32| Stray { group: 0, block, offset: place(&cache, block) };
    assert_eq!(strays(&cache), [], "nobody wrote");
    scribble(&cache, ids[1]);
    assert_eq!(strays(&cache), [stray(ids[1])]);
    assert_eq!(strays(&cache), [], "told once");
    // By the next request that finds it.
    scribble(&cache, ids[2]);
    assert_eq!(found(&cache, 8), 8, "it is told, not refused");
    assert_eq!(strays(&cache), [stray(ids[2])]);
    // What was found, read and freed again is watched as before.
    assert_eq!(found(&cache, 8), 8);
    assert_eq!(strays(&cache), []);
    scribble(&cache, ids[3]);
    assert_eq!(strays(&cache), [stray(ids[3])]);
    // After it was evicted, too: its neighbours keep its memory there. By whoever is given it, here.
    assert!(cache.forget(0, ids[4]).expect("a block"));
    scribble(&cache, ids[4]);
    let mut given = vec![0; 1];
    assert!(cache.alloc(0, &mut given).expect("the device works"));
    assert_eq!(given, [ids[4]]);
    assert_eq!(strays(&cache), [stray(ids[4])]);
    cache.free(0, &given).expect("owned");
    assert_eq!(strays(&cache), []);
    check(&world, &cache);
}

#[test]
fn in_debug_mode_owners_may_write_and_moves_and_sleeps_are_no_writes() {
    let world = world(64, 64);
    let cache = debug_cache(&world.manager);
    for round in 0..4_u32 {
        let ids = remember(&cache, 10);
        let mut owned = vec![0; 6];
        assert!(cache.alloc(0, &mut owned).expect("the device works"));
        for block in &owned {
            scribble(&cache, *block);
        }
        cache.free(0, &owned[2..]).expect("owned");
        if round % 2 == 0 {
            cache.compact(0, 100, WAIT).expect("no step runs");
        } else {
            world.manager.reclaim(ByteCount::mib(4), WAIT, "a test").expect("no step runs");
            drop(world.manager.guard(WAIT).expect("in"));
        }
        assert_eq!(cache.strays().expect("debug mode"), [], "round {round}");
        let known = found(&cache, 10);
        assert_eq!(cache.strays().expect("debug mode"), [], "round {round}, {known} found of {ids:?}");
        let left: Vec<u32> =
            (0..64).filter(|id| matches!(cache.state_of(0, *id), Ok(BlockState::Owned(_)))).collect();
        cache.free(0, &left).expect("owned");
        cache.forget_all().expect("an index");
    }
    check(&world, &cache);
}
