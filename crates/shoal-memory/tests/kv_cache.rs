//! A KV cache with memory behind it: growth, limits, reclaims, fences, threads, and a failure at every device call.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{PAGE, WAIT, World, open, unless_busy, until, world, world_on};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::blocks::{BlockError, BlockState};
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::prefix::{Found, Start};
use shoal_core::kv::state::KvError;
use shoal_core::protocol::LeaseKind;
use shoal_device::device::{DeviceKind, Verb};
use shoal_device::{Device, DeviceError, FaultDevice, Stream};
use shoal_memory::kv_cache::{Attempt, Stray};
use shoal_memory::{ErrorKind, KvCache, KvCacheSpec, MemoryError};

const ALL: ByteCount = ByteCount(u64::MAX);
const TRIES: usize = 50;

fn group(name: &str, layers: u32, layer_kib: u32) -> GroupSpec {
    let shape = BlockShape::State { elements: layer_kib << 10 };
    GroupSpec { name: name.to_owned(), layers, shape, element_bytes: 1 }
}

fn spec(groups: Vec<GroupSpec>, order: PlaneOrder, mib: u64) -> KvCacheSpec {
    let cache = CacheSpec { groups, order, bytes: ByteCount::mib(mib), granule_bytes_max: ByteCount::mib(8) };
    // Long enough for a busy machine: what is refused then is refused for a reason.
    KvCacheSpec { patience: Duration::from_secs(5), ..KvCacheSpec::new("kv", cache) }
}

/// Blocks of 512 KiB in two layers.
fn cache(world: &World, mib: u64) -> KvCache {
    world.manager.kv_cache(spec(vec![group("full", 2, 256)], PlaneOrder::BlockMajor, mib)).expect("addresses")
}

/// The same, and nothing is mapped ahead: for who compares how much is.
fn cache_as_asked(world: &World, mib: u64) -> KvCache {
    let wanted = spec(vec![group("full", 2, 256)], PlaneOrder::BlockMajor, mib);
    world.manager.kv_cache(KvCacheSpec { spare_bytes_max: ByteCount::ZERO, ..wanted }).expect("addresses")
}

fn alloc(cache: &KvCache, count: usize) -> Option<Vec<u32>> {
    let mut ids = vec![u32::MAX; count];
    cache.alloc(0, &mut ids).expect("the device works").then_some(ids)
}

/// Fills each piece of a block with a byte.
fn write(cache: &KvCache, group: usize, block: u32, byte: u8) {
    let layout = cache.layout(group).expect("a group");
    for (at, bytes) in layout.pieces(block) {
        let length = usize::try_from(bytes.0).expect("small");
        cache.region().write(at, &vec![byte; length]).expect("it has memory");
    }
}

fn holds(cache: &KvCache, group: usize, block: u32, byte: u8) -> bool {
    let layout = cache.layout(group).expect("a group");
    layout.pieces(block).all(|(at, bytes)| {
        let mut read = vec![!byte; usize::try_from(bytes.0).expect("small")];
        cache.region().read(at, &mut read).expect("it has memory");
        read.iter().all(|found| *found == byte)
    })
}

fn check(world: &World, cache: &KvCache) {
    cache.check_invariants().expect("invariants");
    world.check();
}

#[test]
fn blocks_of_every_layout_have_memory_of_their_own() {
    for order in [PlaneOrder::BlockMajor, PlaneOrder::LayerMajor] {
        let world = world(64, 64);
        let groups = vec![group("full", 3, 100), group("window", 2, 64), group("state", 1, 3 << 10)];
        let cache = world.manager.kv_cache(spec(groups, order, 40)).expect("addresses");
        let _guard = world.manager.guard(WAIT).expect("nothing is missing");
        let mut owned = Vec::new();
        for (group, count) in [(0, 20), (1, 30), (2, 2)] {
            let mut ids = vec![0_i64; count];
            assert!(cache.alloc(group, &mut ids).expect("the device works"), "{order:?} {group}");
            owned.extend(ids.into_iter().map(|id| (group, u32::try_from(id).expect("a block"))));
        }
        for (number, (group, block)) in owned.iter().enumerate() {
            assert!(holds(&cache, *group, *block, 0), "new memory is zero");
            write(&cache, *group, *block, u8::try_from(number + 1).expect("few"));
        }
        for (number, (group, block)) in owned.iter().enumerate() {
            assert!(holds(&cache, *group, *block, u8::try_from(number + 1).expect("few")), "{order:?}");
        }
        check(&world, &cache);
    }
}

#[test]
fn only_the_cache_gives_and_takes_its_memory() {
    let world = world(64, 64);
    let cache = cache(&world, 32);
    let ids = alloc(&cache, 6).expect("room");
    write(&cache, 0, ids[0], 7);
    let (region, bytes) = (cache.region(), ByteCount::mib(4));
    let refused = [
        region.decommit(ByteCount::ZERO, bytes).map(drop),
        region.commit(ByteCount::ZERO, bytes).map(drop),
        region.stage(ByteCount::mib(16), &[1; 64], None),
    ];
    for outcome in refused {
        let error = outcome.expect_err("blocks lie there");
        assert!(matches!(error, MemoryError::State { .. }), "{error:?}");
        assert!(error.to_string().contains("a KV cache lies in it"), "{error}");
    }
    assert!(holds(&cache, 0, ids[0], 7));
    cache.free(0, &ids).expect("owned");
    check(&world, &cache);
}

#[test]
fn not_now_is_an_answer_and_changes_nothing() {
    let world = world(8, 64);
    let cache = cache_as_asked(&world, 64);
    let ids = alloc(&cache, 12).expect("6 of 8 MiB");
    let was = cache.usage();
    assert_eq!(alloc(&cache, 8), None, "4 MiB more are not in the budget");
    let now = cache.usage();
    assert_eq!((now.live, now.mapped), (was.live, was.mapped));
    assert_eq!(alloc(&cache, 4).map(|ids| ids.len()), Some(4));
    cache.free(0, &ids).expect("owned");
    assert_eq!(alloc(&cache, 12).map(|ids| ids.len()), Some(12), "without mapping");
    check(&world, &cache);
}

#[test]
fn an_allocation_waits_for_memory_that_is_just_leaving() {
    let world = world(1024, 16);
    let wanted = spec(vec![group("full", 2, 256)], PlaneOrder::BlockMajor, 256);
    let cache = world.manager.kv_cache(KvCacheSpec { patience: WAIT, ..wanted }).expect("addresses");
    let all = cache.available(0).expect("there is a group") as usize;
    for round in 0..30_u64 {
        let ids = alloc(&cache, all).unwrap_or_else(|| panic!("round {round}: the limit allows them all"));
        cache.free(0, &ids).expect("they are owned");
        thread::sleep(Duration::from_millis(round % 5));
    }
}

#[test]
fn refused_calls_change_nothing() {
    let world = world(32, 64);
    let cache = cache_as_asked(&world, 32);
    let ids = alloc(&cache, 6).expect("room");
    let was = cache.usage();
    let refused =
        |result: Result<(), MemoryError>| matches!(result, Err(MemoryError::Kv(KvError::Blocks(_))));
    assert!(refused(cache.free(0, &[ids[0], ids[1], ids[0]])), "named twice");
    assert!(refused(cache.free(0, &[i64::from(ids[0]), -1])));
    assert!(refused(cache.free(0, &[ids[0], 64])), "there are 64 blocks");
    assert!(refused(cache.free(0, &[ids[0], 40])), "never allocated");
    assert!(refused(cache.fork(0, &[ids[0], 40])));
    assert!(matches!(
        cache.free(1, &ids),
        Err(MemoryError::Kv(KvError::UnknownGroup { group: 1, groups: 1 }))
    ));
    assert_eq!(cache.usage(), was);
    cache.fork(0, &ids[..2]).expect("owned");
    cache.free(0, &ids).expect("owned");
    cache.free(0, &ids[..2]).expect("twice owned");
    let again = cache.free(0, &ids[..1]).expect_err("a double free");
    assert!(matches!(again, MemoryError::Kv(KvError::Blocks(BlockError::NotOwned { .. }))), "{again}");
    assert_eq!((cache.usage().live, again.kind()), (ByteCount::ZERO, ErrorKind::Blocks));
}

#[test]
fn memory_goes_back_when_it_is_empty_and_nothing_is_expected() {
    let world = world(64, 64);
    let mut spec = spec(vec![group("full", 2, 256)], PlaneOrder::BlockMajor, 64);
    spec.spare_bytes_max = ByteCount::mib(64);
    let cache = world.manager.kv_cache(spec).expect("addresses");
    // What was just used may come back, so it stays for a moment; on a busy machine that moment may be over at once.
    let mut stays = false;
    let mut ids = Vec::new();
    for _ in 0..10 {
        ids = alloc(&cache, 40).expect("20 MiB");
        cache.free(0, &ids[4..]).expect("owned");
        stays = world.device_used() >= ByteCount::mib(20);
        if stays {
            break;
        }
        cache.free(0, &ids[..4]).expect("owned");
    }
    assert!(stays, "it may come back");
    until("what is empty goes", || world.device_used() <= ByteCount::mib(10));
    let report = cache.trim(ALL).expect("no step runs");
    assert!(report.error.is_none());
    let usage = cache.usage();
    assert_eq!((usage.live, usage.empty), (ByteCount::mib(2), ByteCount::ZERO));
    cache.free(0, &ids[..4]).expect("owned");
    until("all of it goes", || world.device_used().is_zero());
    check(&world, &cache);
}

#[test]
fn a_limit_shrinks_by_itself_and_grows_back_exactly() {
    let world = world(64, 64);
    let cache = cache(&world, 32);
    assert_eq!(cache.available(0).expect("a group"), 64);
    let ids = alloc(&cache, 64).expect("all");
    cache.set_limit(ByteCount::mib(8), Some(3)).expect("newer");
    assert!(cache.set_limit(ByteCount::mib(32), Some(2)).is_err(), "a late word");
    assert!(cache.set_limit(ByteCount::mib(320), Some(9)).is_err(), "above the reservation");
    assert_eq!(alloc(&cache, 1), None);
    cache.free(0, &ids[8..]).expect("owned");
    until("it is under its limit", || cache.usage().mapped <= ByteCount::mib(8));
    assert_eq!(cache.available(0).expect("a group"), 8);
    assert_eq!(alloc(&cache, 9), None);
    assert_eq!(alloc(&cache, 8).map(|ids| ids.len()), Some(8));
    cache.set_limit(ByteCount::mib(32), Some(4)).expect("newer");
    assert_eq!(cache.available(0).expect("a group"), 48);
    assert_eq!(alloc(&cache, 48).map(|ids| ids.len()), Some(48));
    assert_eq!(alloc(&cache, 1), None);
    check(&world, &cache);
}

#[test]
fn a_reclaim_takes_what_is_unused_first_and_contents_come_back() {
    let world = world(16, 64);
    let mut spec = spec(vec![group("full", 2, 256)], PlaneOrder::BlockMajor, 64);
    spec.cache.granule_bytes_max = ByteCount::mib(2);
    let cache = world.manager.kv_cache(spec).expect("addresses");
    let ids = alloc(&cache, 16).expect("8 MiB");
    {
        let _guard = world.manager.guard(WAIT).expect("in");
        ids.iter().zip(1_u8..).for_each(|(id, byte)| write(&cache, 0, *id, byte));
    }
    cache.free(0, &ids[4..]).expect("owned");
    let report = world.manager.reclaim(ByteCount::mib(2), WAIT, "a test").expect("no step runs");
    assert!(report.freed >= ByteCount::mib(2) && report.copied.is_zero(), "{report:?}");
    let report = world.manager.reclaim(ALL, WAIT, "a test").expect("no step runs");
    assert_eq!(report.copied, world.manager.usage().host);
    assert!(world.device_used().is_zero());
    // New blocks come together with what is on the host, or not at all.
    let other = LeaseKind::Overhead;
    let lease = world.manager.lease();
    lease.acquire(other, ByteCount::mib(14), ByteCount::mib(14), WAIT, "").expect("free");
    assert_eq!(alloc(&cache, 40), None);
    lease.give_back(other, ByteCount::mib(14));
    let more = alloc(&cache, 20).expect("12 of 16 MiB");
    assert!(cache.region().missing_bytes().is_zero());
    let _guard = world.manager.guard(WAIT).expect("in");
    for (id, byte) in ids[..4].iter().zip(1_u8..) {
        assert!(holds(&cache, 0, *id, byte), "block {id} came back wrong");
    }
    cache.free(0, &more).expect("owned");
    check(&world, &cache);
}

#[test]
fn what_became_empty_on_the_host_is_not_brought_back() {
    let world = world(16, 64);
    let cache = cache(&world, 64);
    let ids = alloc(&cache, 16).expect("8 MiB");
    world.manager.reclaim(ALL, WAIT, "a test").expect("no step runs");
    assert_eq!(cache.region().missing_bytes(), ByteCount::mib(8));
    cache.free(0, &ids).expect("owned");
    let _guard = world.manager.guard(WAIT).expect("nothing is wanted");
    assert!(world.device_used().is_zero());
    check(&world, &cache);
}

/// A slow kernel on a stream of the engine's own that writes to a block, and holds nothing of it.
#[test]
fn memory_goes_only_after_the_newest_step() {
    let world = world(64, 64);
    if world.device.info().kind != DeviceKind::Sim {
        return; // A GPU's host functions may not call the driver.
    }
    let cache = Arc::new(cache(&world, 64));
    let engine = Stream::create(&world.device).expect("a stream");
    let ids = alloc(&cache, 4).expect("2 MiB");
    let go = Arc::new(AtomicBool::new(false));
    let kernel = {
        let (region, go) = (cache.region().clone(), Arc::clone(&go));
        let at = cache.layout(0).expect("a group").pieces(ids[0]).next().expect("one").0;
        move || {
            while !go.load(Ordering::Acquire) {
                thread::sleep(Duration::from_millis(1));
            }
            region.write(at, &[7; 4096]).expect("mapped while the kernel runs");
        }
    };
    engine.launch_host((), kernel).expect("launched");
    cache.record_step_event(engine.record().expect("marked"));
    cache.free(0, &ids).expect("owned");
    let again = unless_busy(|| cache.try_alloc(0, &mut [0_u32; 4]));
    assert_eq!(again, Attempt::Done, "the ids can be had while the kernel runs");
    cache.free(0, &ids).expect("owned");
    thread::sleep(Duration::from_millis(300));
    assert!(world.device_used() >= ByteCount::mib(2));
    thread::sleep(Duration::from_millis(2500));
    // Long after the demand has gone the kernel still holds everything up.
    assert!(world.device_used() >= ByteCount::mib(2));
    go.store(true, Ordering::Release);
    until("the step has ended", || world.device_used().is_zero());
    check(&world, &cache);
}

#[test]
fn eight_threads_never_share_a_block_unasked() {
    let world = world(64, 64);
    let cache = Arc::new(cache(&world, 48));
    let owners: Arc<Vec<AtomicU32>> = Arc::new((0..96).map(|_| AtomicU32::new(0)).collect());
    let threads: Vec<_> = (1..=8_u32)
        .map(|me| {
            let (cache, owners) = (Arc::clone(&cache), Arc::clone(&owners));
            thread::spawn(move || {
                let mut seed = u64::from(me);
                let mut held: Vec<u32> = Vec::new();
                let mut done = 0;
                for _ in 0..600 {
                    seed =
                        seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let count = usize::try_from(seed >> 33).expect("32 bits") % 12;
                    if seed >> 63 == 0 {
                        let mut ids = vec![0_u32; count];
                        if cache.alloc(0, &mut ids).expect("the device works") {
                            for id in &ids {
                                let was = owners[*id as usize].swap(me, Ordering::AcqRel);
                                assert_eq!(was, 0, "block {id} is another thread's");
                            }
                            held.extend(ids);
                            done += count;
                        }
                    } else {
                        let ids: Vec<u32> = held.drain(held.len().saturating_sub(count)..).collect();
                        for id in &ids {
                            assert_eq!(owners[*id as usize].swap(0, Ordering::AcqRel), me);
                        }
                        cache.free(0, &ids).expect("owned");
                    }
                }
                for id in &held {
                    owners[*id as usize].store(0, Ordering::Release);
                }
                cache.free(0, &held).expect("owned");
                done
            })
        })
        .collect();
    let reclaims = {
        let manager = Arc::clone(&world.manager);
        thread::spawn(move || {
            for _ in 0..20 {
                manager.reclaim(ByteCount::mib(6), WAIT, "a test").expect("no step runs");
                thread::sleep(Duration::from_millis(3));
            }
        })
    };
    let done: usize = threads.into_iter().map(|thread| thread.join().expect("no panic")).sum();
    reclaims.join().expect("no panic");
    assert!(done > 1000, "only {done} blocks were ever had");
    assert_eq!(cache.usage().live, ByteCount::ZERO);
    until("nothing is on its way", || cache.check_invariants().is_ok());
    cache.trim(ALL).expect("no step runs");
    check(&world, &cache);
}

#[test]
fn a_cache_that_is_dropped_gives_everything_back() {
    let world = world(32, 64);
    let cache = cache(&world, 32);
    alloc(&cache, 10).expect("room");
    cache.hint(0, 30).expect("a group");
    drop(cache);
    until("its memory is back", || world.device_used().is_zero());
    world.check();
}

/// The n-th device call of a growth, a shrink and a reclaim fails, for every n, as an error and as a full device.
#[test]
fn a_failure_at_any_device_call_leaves_everything_consistent() {
    for is_full in [false, true] {
        let mut failures = 0;
        for n in 1..200_u64 {
            let dir = tempfile::tempdir().expect("a directory");
            let faults = FaultDevice::new(open(dir.path(), 64));
            let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 32, 64);
            let order = if n % 2 == 0 { PlaneOrder::LayerMajor } else { PlaneOrder::BlockMajor };
            let mut spec = spec(vec![group("full", 2, 256)], order, 24);
            // Its thread does nothing, so that which call is the n-th does not depend on time.
            spec.spare_bytes_max = ByteCount::ZERO;
            // Short, as it is often waited for in vain here: who is refused for being busy asks again.
            spec.patience = Duration::from_millis(100);
            let cache = world.manager.kv_cache(spec).expect("addresses");
            let kept = (0..TRIES).find_map(|_| alloc(&cache, 5)).expect("room");
            kept.iter().zip(1_u8..).for_each(|(id, byte)| write(&cache, 0, *id, byte));
            let device = world.device.info().id;
            let mut left = n;
            faults.fail_when(move |call| {
                left = left.checked_sub(1)?;
                let (free, capacity) = (ByteCount::ZERO, ByteCount(PAGE));
                let injected = DeviceError::Injected { call: call.number, verb: call.verb };
                let full = DeviceError::OutOfMemory { device, requested: call.bytes, free, capacity };
                (left == 0).then_some(if is_full { full } else { injected })
            });
            let before = faults.injected();
            let was = cache.usage();
            let mut ids = [0_u32; 20];
            match cache.alloc(0, &mut ids) {
                Ok(true) => cache.free(0, &ids).expect("owned"),
                Ok(false) => assert!(is_full, "a failure was taken for a lack of memory"),
                Err(error) => assert!(matches!(error.kind(), ErrorKind::Device), "{error}"),
            }
            assert_eq!(cache.usage().live, was.live);
            drop(cache.trim(ALL));
            drop(world.manager.reclaim(ALL, WAIT, "a test"));
            let failed = faults.injected() > before;
            faults.heal();
            until("nothing is on its way", || cache.check_invariants().is_ok());
            // What could not be given back is asked for again by the next operation.
            cache.trim(ALL).expect("the device works again");
            let mut again = || cache.alloc(0, &mut ids).expect("the device works again");
            assert!((0..TRIES).any(|_| again()), "call {n}");
            {
                let _guard = world.manager.guard(WAIT).expect("in");
                for (id, byte) in kept.iter().zip(1_u8..) {
                    assert!(holds(&cache, 0, *id, byte), "block {id} is wrong after a failure at call {n}");
                }
            }
            check(&world, &cache);
            if !failed {
                failures = n - 1;
                break;
            }
        }
        assert!(failures > 20, "only {failures} calls were ever failed");
    }
}

/// Blocks of 512 KiB with one token each; nothing is mapped ahead, as that would go before what is cached.
fn tokens_cache(world: &World, mib: u64) -> KvCache {
    let shape = BlockShape::Latent { tokens: 1, dim: 512 << 10 };
    let group = GroupSpec { name: "full".to_owned(), layers: 1, shape, element_bytes: 1 };
    let mut spec = spec(vec![group], PlaneOrder::BlockMajor, mib);
    (spec.spare_bytes_max, spec.cache.granule_bytes_max) = (ByteCount::ZERO, ByteCount::mib(2));
    world.manager.kv_cache(spec).expect("addresses")
}

#[test]
fn cached_blocks_yield_before_anything_that_is_owned() {
    let world = world(16, 64);
    let cache = tokens_cache(&world, 64);
    let tokens: Vec<u32> = (0..16).collect();
    let ids = alloc(&cache, 16).expect("8 MiB");
    {
        let _guard = world.manager.guard(WAIT).expect("in");
        ids.iter().zip(1_u8..).for_each(|(id, byte)| write(&cache, 0, *id, byte));
    }
    cache.seal(Start::Salt(b""), &tokens, &[&ids]).expect("owned");
    cache.free(0, &ids).expect("owned");
    let usage = cache.usage();
    assert_eq!((usage.live, usage.cached), (ByteCount::ZERO, ByteCount::mib(8)));
    let mut found = Found::default();
    cache.find(b"", &tokens[..6], &mut found).expect("an index");
    assert_eq!((found.tokens, found.groups[0].blocks.as_slice()), (6, &ids[..6]));
    assert_eq!(world.manager.usage().kv_live, ByteCount::mib(4), "two granules are owned in part");

    let report = world.manager.reclaim(ByteCount::mib(1), WAIT, "a test").expect("no step runs");
    assert!(report.copied.is_zero(), "what is cached goes without a copy: {report:?}");
    assert!(cache.usage().cached < ByteCount::mib(5), "{:?}", cache.usage());
    // More blocks than there is memory for, but for what is cached.
    let left = usize::try_from((ByteCount::mib(16) - cache.usage().live).0 >> 19).expect("small");
    let more = alloc(&cache, left - 2).expect("what is cached is evicted");
    assert!(cache.usage().cached <= ByteCount::mib(1));
    let _guard = world.manager.guard(WAIT).expect("in");
    for (id, byte) in found.groups[0].blocks.iter().zip(1_u8..) {
        assert!(holds(&cache, 0, *id, byte), "block {id} was written by somebody else");
    }
    cache.free(0, &more).expect("owned");
    check(&world, &cache);
}

#[test]
fn a_lower_limit_evicts_what_is_only_cached() {
    let world = world(64, 64);
    let cache = tokens_cache(&world, 32);
    let ids = alloc(&cache, 32).expect("16 MiB");
    cache.seal(Start::Salt(b"tenant"), &(0..32).collect::<Vec<u32>>(), &[&ids]).expect("owned");
    cache.free(0, &ids).expect("owned");
    cache.set_limit(ByteCount::mib(4), None).expect("newer");
    until("it is under its limit", || cache.usage().mapped <= ByteCount::mib(4));
    let events = cache.events_since(0, 100).expect("an index").events.len();
    assert!(events >= 32 + 24, "{events} events");
    cache.forget_all().expect("an index");
    until("nothing is kept", || cache.usage().mapped.is_zero());
    check(&world, &cache);
}

#[test]
fn one_group_grows_into_what_another_has_no_use_for() {
    let world = world(64, 64);
    let groups = vec![group("one", 1, 512), group("two", 1, 1024)];
    let cache = world.manager.kv_cache(spec(groups, PlaneOrder::BlockMajor, 16)).expect("addresses");
    let ids = alloc(&cache, 32).expect("all 16 MiB");
    cache.free(0, &ids).expect("owned");
    let mut others = [0_u32; 10];
    assert!(cache.alloc(1, &mut others).expect("the device works"), "{:?}", cache.usage());
    assert!(cache.usage().mapped <= ByteCount::mib(16));
    check(&world, &cache);
}

#[test]
fn compaction_moves_contents_and_gives_memory_back() {
    for order in [PlaneOrder::BlockMajor, PlaneOrder::LayerMajor] {
        let world = world(64, 64);
        let shape = BlockShape::Latent { tokens: 1, dim: 200 << 10 };
        let group = GroupSpec { name: "full".to_owned(), layers: 2, shape, element_bytes: 1 };
        let mut spec = spec(vec![group], order, 32);
        spec.cache.granule_bytes_max = ByteCount::mib(2);
        let cache = world.manager.kv_cache(spec).expect("addresses");
        let ids = alloc(&cache, 60).expect("room");
        let (mut kept, free): (Vec<u32>, Vec<u32>) = ids.into_iter().partition(|id| id % 7 == 3);
        {
            let _guard = world.manager.guard(WAIT).expect("in");
            kept.iter().zip(1_u8..).for_each(|(id, byte)| write(&cache, 0, *id, byte));
        }
        cache.seal(Start::Salt(b""), &[1, 2, 3], &[&kept[..3]]).expect("owned");
        cache.free(0, &free).expect("owned");
        // All but what is expected, which changes with time.
        let usage_now = || {
            let mut usage = cache.usage();
            usage.groups.iter_mut().for_each(|group| group.spare_target = 0);
            usage
        };
        let before = usage_now();
        let planned = cache.plan_compaction(0, 1000).expect("a group");
        assert_eq!(usage_now(), before, "a plan changes nothing");
        let moves = cache.compact(0, 1000, WAIT).expect("no step runs");
        assert!(!planned.is_empty() && !moves.is_empty());
        for planned in moves {
            for id in &mut kept {
                if *id == planned.from {
                    *id = planned.to;
                }
            }
        }
        cache.trim(ALL).expect("no step runs");
        let usage = cache.usage();
        assert!(usage.mapped < before.mapped && usage.live == before.live, "{order:?}: {usage:?}");
        let _guard = world.manager.guard(WAIT).expect("in");
        for (id, byte) in kept.iter().zip(1_u8..) {
            assert!(holds(&cache, 0, *id, byte), "block {id} moved wrong");
        }
        let mut found = Found::default();
        cache.find(b"", &[1, 2, 3], &mut found).expect("an index");
        assert_eq!(found.groups[0].blocks, kept[..3], "found where it is now");
        cache.free(0, &kept[..3]).expect("owned");
        check(&world, &cache);
    }
}

#[test]
fn a_refused_unmap_loses_no_memory_and_hangs_nobody() {
    let dir = tempfile::tempdir().expect("a directory");
    let faults = FaultDevice::new(open(dir.path(), 64));
    let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 16, 64);
    let cache = cache_as_asked(&world, 16);
    let ids = alloc(&cache, 32).expect("all of it");
    faults.fail_when(|call| {
        let refused = DeviceError::Injected { call: call.number, verb: call.verb };
        (call.verb == Verb::Unmap).then_some(refused)
    });
    cache.free(0, &ids).expect("owned");
    until("it tries", || faults.injected() > 0);
    // What is still mapped is leased still, so nothing can be had: an answer, and soon.
    let start = Instant::now();
    let had = cache.alloc(0, &mut [0_u32; 32]);
    assert!(matches!(had, Ok(false)), "{had:?}");
    assert!(start.elapsed() < WAIT / 2);
    assert!(!world.manager.leaked_bytes().is_zero());
    faults.heal();
    until("all of it can be had again", || alloc(&cache, 32).is_some());
    check(&world, &cache);
}

#[test]
fn in_debug_mode_what_nobody_owns_is_nan_and_a_write_to_it_is_found() {
    for order in [PlaneOrder::BlockMajor, PlaneOrder::LayerMajor] {
        let world = world(64, 64);
        let mut spec = spec(vec![group("full", 2, 1500)], order, 48);
        spec.is_debug = true;
        let cache = world.manager.kv_cache(spec).expect("addresses");
        assert_eq!(cache.try_alloc(0, &mut [0_u32]).expect("a group"), Attempt::Busy);
        let ids = alloc(&cache, 8).expect("room");
        for id in &ids {
            write(&cache, 0, *id, 3);
        }
        // One stays in each granule, so that none goes.
        let freed = [ids[1], ids[2], ids[3], ids[5], ids[6]];
        cache.free(0, &freed).expect("owned");
        assert!(holds(&cache, 0, ids[0], 3), "its owner has it still");
        for id in freed {
            assert!(holds(&cache, 0, id, 0xFF), "block {id} is not filled");
        }
        assert_eq!(cache.strays().expect("debug mode"), [], "nobody wrote");
        let layout = cache.layout(0).expect("a group");
        let (at, bytes) = layout.pieces(ids[3]).last().expect("a piece");
        let place = at + bytes - ByteCount(9);
        cache.region().write(place, &[0]).expect("it has memory");
        let stray = Stray { group: 0, block: ids[3], offset: place };
        assert_eq!(cache.strays().expect("debug mode"), [stray]);
        assert_eq!(cache.strays().expect("debug mode"), [], "told once");
        // Found by the next one who is given it, too.
        let (at, _) = layout.pieces(ids[5]).next().expect("a piece");
        cache.region().write(at, &[7]).expect("it has memory");
        alloc(&cache, 5).expect("room");
        let found = cache.strays().expect("debug mode");
        assert_eq!(found, [Stray { group: 0, block: ids[5], offset: at }]);
        check(&world, &cache);
    }
    let world = world(64, 64);
    assert!(cache(&world, 8).strays().is_err(), "not in debug mode");
}

#[test]
fn debug_mode_goes_together_with_memory_that_comes_and_goes() {
    let world = world(32, 64);
    let mut spec = spec(vec![group("full", 2, 700)], PlaneOrder::BlockMajor, 32);
    (spec.is_debug, spec.spare_bytes_max) = (true, ByteCount::ZERO);
    spec.cache.granule_bytes_max = ByteCount::mib(4);
    let cache = world.manager.kv_cache(spec).expect("addresses");
    for round in 0..6 {
        let ids = alloc(&cache, 14 - round).expect("room");
        for id in &ids {
            write(&cache, 0, *id, 1);
        }
        cache.free(0, &ids[3..]).expect("owned");
        if round % 2 == 0 {
            cache.trim(ALL).expect("no step runs");
        } else {
            cache.compact(0, 100, WAIT).expect("no step runs");
        }
        world.manager.reclaim(ByteCount::mib(4), WAIT, "a test").expect("no step runs");
        drop(world.manager.guard(WAIT).expect("in"));
        let left: Vec<u32> =
            (0..22).filter(|id| matches!(cache.state_of(0, *id), Ok(BlockState::Owned(_)))).collect();
        cache.free(0, &left).expect("owned");
        assert_eq!(
            cache.strays().expect("debug mode"),
            [],
            "round {round}: nobody wrote to what was not its own"
        );
    }
    check(&world, &cache);
}

#[test]
fn a_compaction_that_fails_at_any_call_has_moved_nothing_or_says_what() {
    let mut failures = 0;
    for n in 1..120_u64 {
        let dir = tempfile::tempdir().expect("a directory");
        let faults = FaultDevice::new(open(dir.path(), 64));
        let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 32, 64);
        let mut spec = spec(vec![group("full", 2, 350)], PlaneOrder::BlockMajor, 24);
        (spec.spare_bytes_max, spec.cache.granule_bytes_max) = (ByteCount::ZERO, ByteCount::mib(4));
        let cache = world.manager.kv_cache(spec).expect("addresses");
        let ids = alloc(&cache, 20).expect("room");
        let (mut kept, free): (Vec<u32>, Vec<u32>) = ids.into_iter().partition(|id| id % 3 == 0);
        for (id, byte) in kept.iter().zip(1_u8..) {
            write(&cache, 0, *id, byte);
        }
        cache.free(0, &free).expect("owned");
        let live = cache.usage().live;
        faults.fail_nth(n);
        let before = faults.injected();
        let moves = cache.compact(0, 1000, WAIT).unwrap_or_default();
        let failed = faults.injected() > before;
        faults.heal();
        for id in &mut kept {
            *id = moves.iter().find(|planned| planned.from == *id).map_or(*id, |planned| planned.to);
        }
        assert_eq!(cache.usage().live, live, "call {n}");
        {
            let _guard = world.manager.guard(WAIT).expect("in");
            for (id, byte) in kept.iter().zip(1_u8..) {
                assert!(holds(&cache, 0, *id, byte), "block {id} is wrong after a failure at call {n}");
            }
        }
        cache.compact(0, 1000, WAIT).expect("the device works again");
        cache.trim(ALL).expect("the device works again");
        check(&world, &cache);
        if !failed {
            break;
        }
        failures = n;
    }
    assert!(failures > 10, "only {failures} calls were ever failed");
}
