//! Memory of a KV cache that cannot leave when it is to: the device refuses, or something still holds it. Its addresses are
//! nobody's meanwhile, so an allocation finds others, or is told "not now"; it is no error of the engine's.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{WAIT, World, open, until, world, world_on};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_device::device::Verb;
use shoal_device::{Device, DeviceError, FaultDevice, HostBuffer, Stream};
use shoal_memory::region::BlockCopy;
use shoal_memory::{KvCache, KvCacheSpec};

const ALL: ByteCount = ByteCount(u64::MAX);

/// Blocks of 512 KiB in two layers, 32 MiB of them, in granules of 8 MiB at most; nothing is mapped ahead.
fn cache(world: &World, order: PlaneOrder) -> KvCache {
    let shape = BlockShape::State { elements: 256 << 10 };
    let group = GroupSpec { name: "full".to_owned(), layers: 2, shape, element_bytes: 1 };
    let (bytes, granule_bytes_max) = (ByteCount::mib(32), ByteCount::mib(8));
    let cache = CacheSpec { groups: vec![group], order, bytes, granule_bytes_max };
    let spec = KvCacheSpec { spare_bytes_max: ByteCount::ZERO, ..KvCacheSpec::new("kv", cache) };
    world.manager.kv_cache(spec).expect("addresses")
}

fn alloc(cache: &KvCache, count: usize) -> Option<Vec<u32>> {
    let mut ids = vec![u32::MAX; count];
    cache.alloc(0, &mut ids).expect("not now is no error").then_some(ids)
}

/// All of it can be had again, and nothing is left of what could not leave.
fn check(world: &World, cache: &KvCache, held: &[u32]) {
    cache.free(0, held).expect("owned");
    until("all of it can be had again", || alloc(cache, 64).is_some_and(|ids| cache.free(0, &ids).is_ok()));
    until("all of it goes back", || cache.trim(ALL).is_ok() && cache.usage().mapped.is_zero());
    cache.check_invariants().expect("invariants");
    world.check();
    assert!(world.device_used().is_zero());
}

#[test]
fn blocks_come_elsewhere_while_the_device_refuses_to_unmap() {
    // Often: the cache's own thread, which is called by what cannot leave, gives nothing back that was mapped at that moment and
    // whose blocks are not taken yet, or it could not leave either.
    let orders = [PlaneOrder::BlockMajor, PlaneOrder::LayerMajor];
    for order in orders.into_iter().cycle().take(30) {
        let dir = tempfile::tempdir().expect("a directory");
        let faults = FaultDevice::new(open(dir.path(), 64));
        let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 32, 64);
        let cache = cache(&world, order);
        let ids = alloc(&cache, 16).expect("8 MiB");
        faults.fail_when(|call| {
            let refused = DeviceError::Injected { call: call.number, verb: call.verb };
            (call.verb == Verb::Unmap).then_some(refused)
        });
        cache.free(0, &ids).expect("owned");
        drop(cache.trim(ALL));
        assert_eq!(world.manager.leaked_bytes(), ByteCount::mib(8));
        let more = alloc(&cache, 48).expect("24 MiB elsewhere");
        assert_eq!(alloc(&cache, 1), None, "the other 8 MiB are leased still");
        cache.check_invariants().expect("invariants");
        faults.heal();
        check(&world, &cache, &more);
    }
}

#[test]
fn blocks_come_elsewhere_while_something_holds_what_is_to_leave() {
    let world = world(32, 64);
    let cache = cache(&world, PlaneOrder::BlockMajor);
    let engine = Stream::create(&world.device).expect("a stream");
    cache.record_step_event(engine.record().expect("marked"));
    let ids = alloc(&cache, 16).expect("8 MiB");
    // A copy to a block that waits for somebody, as the zeroing of memory does beside a long kernel.
    let is_over = Arc::new(AtomicBool::new(false));
    let go = Arc::clone(&is_over);
    let wait_for_it = move || {
        while !go.load(Ordering::Acquire) {
            thread::sleep(Duration::from_millis(1));
        }
    };
    engine.launch_host((), wait_for_it).expect("launched");
    let after = engine.record().expect("marked");
    let bytes = ByteCount(4096);
    let host = HostBuffer::allocate(&world.device, bytes).expect("host memory");
    let layout = cache.layout(0).expect("a group");
    let (offset, _) = layout.pieces(ids[0]).next().expect("one");
    let copy = BlockCopy { offset, bytes, host, host_offset: ByteCount::ZERO };
    let copied = cache.region().load_blocks(&[copy], Some(&after)).expect("queued");

    cache.free(0, &ids).expect("owned");
    drop(cache.trim(ALL));
    assert_eq!(world.device_used(), ByteCount::mib(8), "it is held");
    let more = alloc(&cache, 48).expect("24 MiB elsewhere");
    assert_eq!(alloc(&cache, 1), None, "the other 8 MiB are leased still");
    cache.check_invariants().expect("invariants");
    is_over.store(true, Ordering::Release);
    assert!(copied.wait(WAIT).expect("a device"));
    check(&world, &cache, &more);
}
