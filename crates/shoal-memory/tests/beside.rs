//! What goes on beside a wake whose bytes are still coming: blocks for the step that begins, what a tier has for them, that
//! step's guard, and reclaims, which wait for both.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{PAGE, WAIT, World, noise, open_slow, world_on};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::prefix::Start;
use shoal_core::protocol::LeaseKind;
use shoal_device::ForeignStream;
use shoal_memory::store::{HostOptions, HostTier};
use shoal_memory::{KvBacking, KvCache, KvCacheSpec, KvTier, KvTierOptions, Region, Transfer};

const PAGES: u64 = 8;
/// What is to happen while bytes are coming is tried so often: a thread may sleep for as long as they take.
const TRIES: usize = 10;

/// Weights on a link that takes two seconds for them, and a cache of KV beside them.
fn slow() -> (World, Region, KvCache, Vec<u8>) {
    let dir = tempfile::tempdir().expect("a directory");
    let device = open_slow(dir.path(), 64, ByteCount::mib(8));
    let world = world_on(dir, device, 64, 64);
    let bytes = noise(PAGES * PAGE, 1);
    let region = world.weights(PAGES, &bytes);
    let shape = BlockShape::State { elements: 256 << 10 };
    let group = GroupSpec { name: "full".to_owned(), layers: 2, shape, element_bytes: 1 };
    let (all, granule_bytes_max) = (ByteCount::mib(16), ByteCount::mib(2));
    let spec =
        CacheSpec { groups: vec![group], order: PlaneOrder::BlockMajor, bytes: all, granule_bytes_max };
    let cache = world
        .manager
        .kv_cache(KvCacheSpec {
            patience: WAIT,
            spare_bytes_max: ByteCount::ZERO,
            ..KvCacheSpec::new("kv", spec)
        })
        .expect("addresses");
    (world, region, cache, bytes)
}

fn is_coming(wake: &Transfer) -> bool {
    !wake.progress().is_finished
}

/// Begins a wake, and gives it once all of its memory is there.
fn backed(region: &Region) -> Transfer {
    let wake = region.wake(WAIT).expect("a thread");
    wake.wait_host(ByteCount::ZERO, ByteCount(PAGE), WAIT).expect("queued");
    wake
}

#[test]
fn a_step_gets_its_blocks_and_its_guard_while_the_bytes_are_coming() {
    let (world, region, cache, bytes) = slow();
    let came_in_time = (0..TRIES).any(|_| {
        let wake = backed(&region);
        let mut blocks = [u32::MAX; 2];
        assert!(cache.alloc(0, &mut blocks).expect("the device works"), "there is room");
        let (guard, beside) = world.manager.guard_in_order(&region, WAIT).expect("there is room");
        let was_coming = is_coming(&wake) && beside.as_ref().is_some_and(|beside| beside.id() == wake.id());
        let mut read = vec![0; usize::try_from(PAGE).expect("small")];
        for page in 0..PAGES {
            let at = ByteCount(page * PAGE);
            if let Some(beside) = &beside {
                beside.wait_stream(at, ByteCount(PAGE), ForeignStream::DEFAULT, WAIT).expect("comes");
            }
            region.read(at, &mut read).expect("there");
            let from = usize::try_from(page * PAGE).expect("small");
            assert_eq!(read, bytes[from..from + read.len()]);
        }
        drop(guard);
        wake.wait(WAIT).expect("it ends");
        cache.free(0, &blocks).expect("its own");
        cache.trim(ByteCount(u64::MAX)).expect("nothing runs");
        region.sleep(0.0, false, WAIT).expect("clean");
        world.check();
        was_coming
    });
    assert!(came_in_time, "each time the wake was waited for");
}

#[test]
fn what_a_tier_has_comes_to_its_blocks_while_the_bytes_are_coming() {
    let (world, region, ..) = slow();
    let group = GroupSpec {
        name: "kv".to_owned(),
        layers: 2,
        shape: BlockShape::Latent { tokens: 4, dim: 16 << 10 },
        element_bytes: 1,
    };
    let (bytes, granule_bytes_max) = (ByteCount::mib(4), ByteCount::mib(2));
    let spec = CacheSpec { groups: vec![group], order: PlaneOrder::BlockMajor, bytes, granule_bytes_max };
    let spec =
        KvCacheSpec { patience: WAIT, spare_bytes_max: ByteCount::ZERO, ..KvCacheSpec::new("kept", spec) };
    let cache = Arc::new(world.manager.kv_cache(spec).expect("addresses"));
    let store = Arc::new(HostTier::new(HostOptions::new(ByteCount::mib(4))));
    // Half of what a wake takes, so that no load can wait for the whole of one.
    let options = KvTierOptions { load_wait: Duration::from_secs(1), ..KvTierOptions::new(Vec::new()) };
    let tier = KvTier::new(&cache, store, options).expect("a cache of one group");
    let tokens: Vec<u32> = (0..8).collect();
    let places: Vec<(ByteCount, ByteCount)> = {
        let mut blocks = [0; 2];
        assert!(cache.alloc(0, &mut blocks).expect("the device works"), "there is room");
        let layout = cache.layout(0).expect("a group");
        let places = blocks.iter().flat_map(|block| layout.pieces(*block)).collect::<Vec<_>>();
        for (seed, (at, bytes)) in (1..).zip(&places) {
            cache.region().write(*at, &noise(bytes.0, seed)).expect("it has memory");
        }
        cache.seal(Start::Salt(b""), &tokens, &[&blocks]).expect("owned");
        tier.save(b"", &tokens, 0);
        assert!(tier.flush(WAIT));
        cache.free(0, &blocks).expect("its own");
        cache.forget_all().expect("an index");
        places
    };
    let came_in_time = (0..TRIES).any(|_| {
        let wake = backed(&region);
        let was_coming = is_coming(&wake);
        let blocks = tier.load(b"", &tokens, &[]);
        wake.wait(WAIT).expect("it ends");
        let layout = cache.layout(0).expect("a group");
        let pieces: Vec<_> = blocks.iter().flat_map(|block| layout.pieces(*block)).collect();
        for (seed, (at, bytes)) in (1..).zip(&pieces) {
            let mut read = vec![0; usize::try_from(bytes.0).expect("small")];
            cache.region().read(*at, &mut read).expect("it has memory");
            assert_eq!(read, noise(bytes.0, seed));
        }
        cache.free(0, &blocks).expect("its own");
        cache.forget_all().expect("an index");
        cache.trim(ByteCount(u64::MAX)).expect("nothing runs");
        region.sleep(0.0, false, WAIT).expect("clean");
        world.check();
        was_coming && pieces.len() == places.len()
    });
    assert!(came_in_time, "each time the wake was waited for, or nothing came");
}

#[test]
fn a_reclaim_waits_for_the_step_and_for_the_wake_that_it_runs_beside() {
    let (world, region, _cache, _) = slow();
    let wake = backed(&region);
    let (guard, _) = world.manager.guard_in_order(&region, WAIT).expect("there is room");
    let reclaims = {
        let manager = world.manager.clone();
        thread::spawn(move || manager.reclaim(ByteCount(u64::MAX), WAIT, "a test"))
    };
    // It has begun, or will: nothing may have left while the guard is held.
    thread::sleep(Duration::from_millis(50));
    wake.wait(WAIT).expect("it ends");
    assert_eq!(region.missing_bytes(), ByteCount::ZERO, "under a guard nothing leaves (I13)");
    drop(guard);
    let report = reclaims.join().expect("no panic").expect("in time");
    assert_eq!(report.freed, ByteCount(PAGES * PAGE));
    world.check();
}

#[test]
fn kv_that_was_evicted_too_comes_back_beside_the_wake_and_the_step_with_it() {
    let (world, region, ..) = slow();
    let other = world.region("other", 2, LeaseKind::Kv);
    let kv = KvBacking::new(&other, ByteCount(PAGE), 2).expect("fits");
    assert!(kv.back(&[0]).expect("ids"));
    other.write(ByteCount::ZERO, b"kept").expect("backed");
    let came_in_time = (0..TRIES).any(|_| {
        world.manager.reclaim(ByteCount(u64::MAX), WAIT, "a test").expect("no step runs");
        assert!(!other.missing_bytes().is_zero() && !region.missing_bytes().is_zero());
        let (guard, beside) = world.manager.guard_in_order(&region, WAIT).expect("there is room");
        let was_coming = beside.as_ref().is_some_and(is_coming);
        assert_eq!(
            other.missing_bytes(),
            ByteCount::ZERO,
            "under a guard all is there but what the wake brings"
        );
        let mut read = [0; 4];
        other.read(ByteCount::ZERO, &mut read).expect("back");
        assert_eq!(&read, b"kept");
        if let Some(beside) = beside {
            beside.wait(WAIT).expect("it ends");
        }
        assert_eq!(region.missing_bytes(), ByteCount::ZERO);
        drop(guard);
        world.check();
        was_coming
    });
    assert!(came_in_time, "each time the wake was waited for");
}

#[test]
fn blocks_are_had_beside_a_wake_where_others_of_their_cache_were_evicted() {
    let (world, region, cache, _) = slow();
    let mut held = [u32::MAX; 1];
    assert!(cache.alloc(0, &mut held).expect("the device works"), "there is room");
    let (at, bytes) = cache.layout(0).expect("a group").pieces(held[0]).next().expect("a piece");
    let kept = noise(bytes.0, 7);
    cache.region().write(at, &kept).expect("it has memory");
    let came_in_time = (0..TRIES).any(|_| {
        world.manager.reclaim(ByteCount(u64::MAX), WAIT, "a test").expect("no step runs");
        assert!(!cache.region().missing_bytes().is_zero());
        let wake = backed(&region);
        // More than there is room for where the first one lies.
        let mut blocks = [u32::MAX; 8];
        assert!(cache.alloc(0, &mut blocks).expect("the device works"), "there is room");
        let was_coming = is_coming(&wake);
        let mut read = vec![0; kept.len()];
        cache.region().read(at, &mut read).expect("back");
        assert_eq!(read, kept);
        wake.wait(WAIT).expect("it ends");
        cache.free(0, &blocks).expect("its own");
        world.check();
        was_coming
    });
    assert!(came_in_time, "each time the wake was waited for");
}

#[test]
fn where_other_weights_are_missing_all_is_waited_for() {
    let (world, region, ..) = slow();
    let bytes = noise(PAGE, 3);
    let other = world.weights(1, &bytes);
    world.manager.reclaim(ByteCount(u64::MAX), WAIT, "a test").expect("no step runs");
    assert!(!other.missing_bytes().is_zero());
    let (guard, beside) = world.manager.guard_in_order(&region, WAIT).expect("there is room");
    assert!(beside.is_none());
    assert!(region.missing_bytes().is_zero() && other.missing_bytes().is_zero());
    drop(guard);
    world.check();
}

#[test]
fn who_waits_for_a_wake_of_all_weights_hears_of_its_memory_first() {
    let (world, region, ..) = slow();
    let mut was_coming = false;
    for _ in 0..TRIES {
        let backed = || was_coming |= region.waking().is_some_and(|wake| is_coming(&wake));
        let report = world.manager.wake_weights_telling(WAIT, "a test", backed).expect("there is room");
        assert_eq!(report.requested, ByteCount(PAGES * PAGE));
        if was_coming {
            break;
        }
        region.sleep(0.0, false, WAIT).expect("clean");
    }
    assert!(was_coming, "it was told of too late each time");
    // Nothing is missing now, so nothing is said.
    world.manager.wake_weights_telling(WAIT, "a test", || panic!("all is there")).expect("all is there");
    // A wake that is under way is joined.
    region.sleep(0.0, false, WAIT).expect("clean");
    let wake = region.wake(WAIT).expect("a thread");
    let report = world.manager.wake_weights_telling(WAIT, "a test", || {}).expect("there is room");
    assert!(report.requested.is_zero() || report.requested == ByteCount(PAGES * PAGE));
    assert!(!is_coming(&wake));
    world.check();
}
