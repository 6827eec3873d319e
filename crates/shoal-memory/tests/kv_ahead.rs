//! Where the memory of blocks comes from, and whom it keeps waiting: what a KV cache's own thread maps ahead of need keeps
//! nobody from a block, and takes what there is; and no block waits for a step that runs.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{PAGE, WAIT, World, keeping, open, pooled_world_on, unless_busy, until, world, world_on};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::demand::MOMENT;
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::prefix::Start;
use shoal_core::protocol::LeaseKind;
use shoal_device::device::Verb;
use shoal_device::{FaultDevice, Stream};
use shoal_memory::kv_cache::Attempt;
use shoal_memory::{KvCache, KvCacheSpec};

/// After so long without demand nothing is expected.
const WINDOW: Duration = MOMENT.saturating_mul(9);
/// What is to be so within a window is tried so often: a thread may be away for longer.
const TRIES: usize = 3;

/// Blocks of 512 KiB in two layers; as much ahead as is asked for.
fn spec(mib: u64) -> KvCacheSpec {
    let shape = BlockShape::State { elements: 256 << 10 };
    let group = GroupSpec { name: "full".to_owned(), layers: 2, shape, element_bytes: 1 };
    let (bytes, granule_bytes_max) = (ByteCount::mib(mib), ByteCount::mib(8));
    let cache = CacheSpec { groups: vec![group], order: PlaneOrder::BlockMajor, bytes, granule_bytes_max };
    // Long enough for a busy machine: what is refused then is refused for a reason.
    let patience = Duration::from_secs(5);
    KvCacheSpec { spare_bytes_max: bytes, patience, ..KvCacheSpec::new("kv", cache) }
}

fn alloc(cache: &KvCache, count: usize) -> Option<Vec<u32>> {
    let mut ids = vec![u32::MAX; count];
    cache.alloc(0, &mut ids).expect("the device works").then_some(ids)
}

fn check(world: &World, cache: &KvCache) {
    cache.check_invariants().expect("invariants");
    world.check();
}

/// A cache on a device that takes a while for each frame, and makes no more than `frames` of them before it is let.
fn slow_cache(mib: u64, each: Duration, frames: usize) -> (World, KvCache, Arc<AtomicBool>) {
    let dir = tempfile::tempdir().expect("a directory");
    let faults = FaultDevice::new(open(dir.path(), mib));
    let (may_go_on, mut made) = (Arc::new(AtomicBool::new(false)), 0);
    let is_let = Arc::clone(&may_go_on);
    faults.fail_when(move |call| {
        if call.verb == Verb::CreateFrame {
            thread::sleep(each);
            made += 1;
            let deadline = Instant::now() + WAIT;
            while made > frames && !is_let.load(Ordering::Acquire) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(1));
            }
        }
        None
    });
    let world = world_on(dir, faults, mib, 64);
    let cache = world.manager.kv_cache(spec(mib)).expect("addresses");
    (world, cache, may_go_on)
}

#[test]
fn what_is_mapped_ahead_keeps_nobody_from_a_block() {
    // 24 frames of 8 MiB, of which half come before the block is had: whoever waits for all of them does so in vain.
    let (world, cache, may_go_on) = slow_cache(256, Duration::from_millis(50), 12);
    cache.hint(0, 384).expect("a group");
    until("the thread maps", || !cache.usage().mapped.is_zero());
    assert!(alloc(&cache, 1).is_some(), "while others map ahead");
    assert!(cache.usage().mapped < ByteCount::mib(192), "it did not wait for all of it");
    may_go_on.store(true, Ordering::Release);
    until("the rest comes", || cache.usage().mapped >= ByteCount::mib(192));
    check(&world, &cache);
}

/// Takes 8 blocks a step, and finds them mapped: an allocation that waits for nothing has them. Where this thread was away
/// for so long that what it took is rightly forgotten, it asks once more, and that is no step.
fn grow_steadily(cache: &KvCache, steps: usize) -> Vec<u32> {
    let (mut held, mut step, mut forgotten, mut since) = (Vec::new(), 0, 0, Instant::now());
    while step < steps {
        until("the next step's blocks are mapped", || {
            let group = &cache.usage().groups[0];
            group.blocks.available >= 8 || (group.spare_target == 0 && since.elapsed() >= WINDOW)
        });
        let (mut ids, now) = ([u32::MAX; 8], Instant::now());
        let attempt = unless_busy(|| cache.try_alloc(0, &mut ids));
        if attempt == Attempt::Done {
            step += 1;
        } else {
            assert!(since.elapsed() >= WINDOW, "step {step}: {attempt:?}");
            forgotten += 1;
            assert!(forgotten <= TRIES, "step {step}: nothing is mapped for what is taken");
            assert!(cache.alloc(0, &mut ids).expect("the device works"), "room");
        }
        since = now;
        held.extend(ids);
    }
    held
}

#[test]
fn growth_that_nobody_announced_finds_memory_after_its_first_step() {
    let world = world(256, 64);
    let cache = world.manager.kv_cache(spec(256)).expect("addresses");
    assert_eq!(cache.usage().mapped, ByteCount::ZERO, "quiet");
    // These take just what was mapped for them, so no spare block is left by which the thread would hear of them.
    let mut held = alloc(&cache, 8).expect("room");
    held.extend(grow_steadily(&cache, 12));
    check(&world, &cache);

    let is_kept = (0..TRIES).any(|_| {
        // After two seconds without demand nothing is kept, and the thread sleeps; the blocks stay.
        until("nothing is expected", || cache.usage().groups[0].spare_target == 0);
        until("the spare memory goes", || cache.usage().empty.is_zero());
        thread::sleep(WINDOW);
        let (left, since) = (cache.usage().groups[0].blocks.available as usize, Instant::now());
        held.extend(alloc(&cache, left + 8).expect("room"));
        // This is demand of now, not of when the thread fell asleep: it is not forgotten with the next look at the clock.
        let is_mapped = || cache.usage().groups[0].blocks.available >= 8;
        until("as much again is mapped", || is_mapped() || since.elapsed() >= WINDOW);
        thread::sleep(2 * MOMENT);
        is_mapped()
    });
    assert!(is_kept, "nothing was mapped, or it went at once, each time");
    held.extend(grow_steadily(&cache, 12));
    cache.free(0, &held).expect("owned");
    until("all of it goes", || world.device_used().is_zero());
    check(&world, &cache);
}

#[test]
fn what_was_just_given_back_is_not_mapped_again() {
    let world = world(64, 64);
    let cache = world.manager.kv_cache(spec(64)).expect("addresses");
    let ids = alloc(&cache, 8).expect("room");
    until("as much again is mapped", || cache.usage().groups[0].blocks.available >= 8);
    // The demand is still there, and the thread looks at it four times a second.
    cache.trim(ByteCount(u64::MAX)).expect("no step runs");
    let deadline = Instant::now() + Duration::from_millis(800);
    while Instant::now() < deadline {
        assert_eq!(cache.usage().mapped, ByteCount::mib(4), "others can have it");
        thread::sleep(Duration::from_millis(10));
    }
    cache.free(0, &ids).expect("owned");
    until("all of it goes", || world.device_used().is_zero());
    check(&world, &cache);
}

#[test]
fn what_one_cache_keeps_ahead_is_there_for_blocks_of_another() {
    let world = world(24, 64);
    let ahead = world.manager.kv_cache(spec(24)).expect("addresses");
    let plain = KvCacheSpec { spare_bytes_max: ByteCount::ZERO, ..spec(24) };
    let plain = world.manager.kv_cache(plain).expect("addresses");
    let held = alloc(&ahead, 16).expect("room");
    until("as much again is mapped", || ahead.usage().mapped == ByteCount::mib(16));
    let others = alloc(&plain, 28).expect("nobody uses what was mapped ahead");
    assert_eq!(ahead.usage().mapped, ByteCount::mib(8));
    assert_eq!(alloc(&plain, 8), None, "what is owned stays");
    for (cache, ids) in [(&ahead, held), (&plain, others)] {
        cache.free(0, &ids).expect("owned");
        check(&world, cache);
    }
    until("all of it goes", || world.device_used().is_zero());
}

#[test]
fn a_cache_that_keeps_nothing_ahead_maps_what_is_taken_and_no_more() {
    let world = world(64, 64);
    let spec = KvCacheSpec { spare_bytes_max: ByteCount::ZERO, ..spec(64) };
    let cache = world.manager.kv_cache(spec).expect("addresses");
    for step in 1..=3 {
        assert!(alloc(&cache, 8).is_some(), "room");
        thread::sleep(Duration::from_millis(50));
        assert_eq!(cache.usage().mapped, ByteCount::mib(4 * step));
    }
    check(&world, &cache);
}

#[test]
fn what_is_expected_comes_as_far_as_the_lease_goes() {
    let world = world(13, 64);
    let cache = world.manager.kv_cache(spec(64)).expect("addresses");
    cache.hint(0, 60).expect("a group");
    until("12 of the 30 MiB come", || cache.usage().mapped == ByteCount::mib(12));
    assert_eq!(alloc(&cache, 24).map(|ids| ids.len()), Some(24));
    assert_eq!(alloc(&cache, 1), None);
    check(&world, &cache);
}

#[test]
fn a_hint_maps_before_anybody_asks() {
    let world = world(64, 64);
    let cache = world.manager.kv_cache(spec(64)).expect("addresses");
    cache.hint(0, 16).expect("a group");
    until("it is mapped", || cache.usage().groups[0].blocks.available >= 16);
    let mut ids = [0_i32; 16];
    assert_eq!(unless_busy(|| cache.try_alloc(0, &mut ids)), Attempt::Done);
    let mut more = [0_i32; 60];
    assert_eq!(unless_busy(|| cache.try_alloc(0, &mut more)), Attempt::Unmapped);
    assert_eq!(unless_busy(|| cache.try_free(0, &ids)), Attempt::Done);
    until("the step did not come", || world.device_used().is_zero());
}

/// New memory, memory of the pool that somebody has written to, what is mapped already, and what is only cached.
#[test]
fn blocks_come_while_a_step_runs() {
    let dir = tempfile::tempdir().expect("a directory");
    let device = open(dir.path(), 64);
    let world = pooled_world_on(dir, device, 16, 64, keeping(64));
    let before = world.region("before", 1, LeaseKind::Kv);
    before.commit(ByteCount::ZERO, ByteCount(PAGE)).expect("room");
    before.write(ByteCount::ZERO, &[7; 4096]).expect("committed");
    before.decommit(ByteCount::ZERO, ByteCount(PAGE)).expect("nothing runs");
    assert_eq!(world.manager.usage().pooled, ByteCount(PAGE));

    // Blocks of 512 KiB; nothing is mapped ahead.
    let shape = BlockShape::Latent { tokens: 2, dim: 128 << 10 };
    let group = GroupSpec { name: "full".to_owned(), layers: 2, shape, element_bytes: 1 };
    let spec = KvCacheSpec::new("kv", CacheSpec { groups: vec![group], ..spec(16).cache });
    let spec = KvCacheSpec { spare_bytes_max: ByteCount::ZERO, patience: Duration::from_secs(5), ..spec };
    let cache = world.manager.kv_cache(spec).expect("addresses");
    let (engine, is_over) =
        (Stream::create(&world.device).expect("a stream"), Arc::new(AtomicBool::new(false)));
    let kernel = Arc::clone(&is_over);
    let wait_for_it = move || {
        while !kernel.load(Ordering::Acquire) {
            thread::sleep(Duration::from_millis(1));
        }
    };
    engine.launch_host((), wait_for_it).expect("launched");
    let step = engine.record().expect("marked");
    cache.record_step_event(engine.record().expect("marked"));

    let pooled = alloc(&cache, 4).expect("what the pool has");
    assert_eq!(world.manager.usage().pooled, ByteCount::ZERO);
    let rest = alloc(&cache, 28).expect("all the memory there is");
    cache.free(0, &pooled).expect("owned");
    let mapped = alloc(&cache, 4).expect("what is mapped");
    cache.seal(Start::Salt(b""), &[1; 56], &[&rest]).expect("owned");
    cache.free(0, &rest).expect("owned");
    let evicted = alloc(&cache, 28).expect("what is only cached");
    assert!(!step.wait(Duration::ZERO).expect("a device"), "the step has ended");
    is_over.store(true, Ordering::Release);
    assert!(step.wait(WAIT).expect("a device"));
    cache.free(0, &[mapped, evicted].concat()).expect("owned");
    check(&world, &cache);
}
