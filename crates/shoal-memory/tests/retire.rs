//! Memory that the device does not give back at once: asked for again, told of the region whose it is, never forgotten.

mod common;

use std::sync::Arc;

use common::{PAGE, WAIT, World, noise, open, world_on};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_device::device::Verb;
use shoal_device::{Device, DeviceError, FaultDevice};
use shoal_memory::{ErrorKind, KvBacking, MemoryError, Region};

const PAGES: u64 = 8;
const ALL: ByteCount = ByteCount(PAGES * PAGE);

fn faulty() -> (World, Arc<FaultDevice>) {
    let dir = tempfile::tempdir().expect("a directory");
    let faults = FaultDevice::new(open(dir.path(), 64));
    let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 64, 64);
    (world, faults)
}

fn refuse(faults: &FaultDevice, verb: Verb) {
    faults.fail_all(verb, DeviceError::Injected { call: 0, verb });
}

fn awake(world: &World, seed: u64) -> Region {
    let region = world.weights(PAGES, &noise(PAGES * PAGE, seed));
    region.wake(WAIT).expect("begun").wait(WAIT).expect("room");
    region
}

fn holds(region: &Region, seed: u64) {
    let mut read = vec![0; usize::try_from(PAGES * PAGE).expect("small")];
    region.read(ByteCount::ZERO, &mut read).expect("on the device");
    assert!(read == noise(PAGES * PAGE, seed), "bytes were lost");
}

#[test]
fn what_the_device_refuses_to_give_back_is_asked_for_again() {
    for verb in [Verb::Unmap, Verb::DestroyFrame] {
        let (world, faults) = faulty();
        let region = awake(&world, 1);
        refuse(&faults, verb);
        let error = region.sleep(0.0, false, WAIT).expect_err("refused");
        assert!(matches!(error, MemoryError::Device { doing: "give device memory back", .. }), "{error}");
        assert_eq!((world.device_used(), world.manager.leaked_bytes()), (ALL, ALL), "{verb}");
        world.check();
        if verb == Verb::Unmap {
            // Its addresses are taken: it stays asleep, and is not lost.
            let woken = region.wake(WAIT).expect("begun").wait(WAIT).expect_err("taken");
            assert!(matches!(woken, MemoryError::StillMapped { .. }), "{woken}");
            world.check();
        }
        faults.heal();
        region.wake(WAIT).expect("begun").wait(WAIT).expect("room");
        holds(&region, 1);
        assert_eq!((world.device_used(), world.manager.leaked_bytes()), (ALL, ByteCount::ZERO), "{verb}");
        world.check();
        refuse(&faults, verb);
        drop(region);
        assert_eq!(world.device_used(), ALL);
        faults.heal();
        // Whatever is done next asks for it.
        world.region("other", 1, LeaseKind::Overhead).commit(ByteCount::ZERO, ByteCount(PAGE)).expect("room");
        assert_eq!(world.manager.leaked_bytes(), ByteCount::ZERO);
        assert_eq!(world.device_used(), ByteCount::ZERO, "{verb}");
        world.check();
    }
}

#[test]
fn an_error_is_told_of_the_region_whose_memory_it_is() {
    let (world, faults) = faulty();
    let (first, second) = (awake(&world, 2), awake(&world, 3));
    // Something else could not be given back, by nobody here.
    let cause = Box::new(DeviceError::Injected { call: 0, verb: Verb::DestroyFrame });
    world.device.record_error(DeviceError::Leaked { what: "frame", handle: 7, cause });
    assert_eq!(first.sleep(0.0, false, WAIT).expect("its own memory is free").freed, ALL);
    assert_eq!(world.manager.leaked_bytes(), ByteCount::ZERO);
    // What one region could not give back is not told of the next.
    refuse(&faults, Verb::Unmap);
    second.sleep(0.0, false, WAIT).expect_err("refused");
    faults.heal();
    first.wake(WAIT).expect("begun").wait(WAIT).expect("room");
    assert_eq!(first.sleep(0.0, false, WAIT).expect("its own memory is free").freed, ALL);
    assert_eq!(world.device_used(), ByteCount::ZERO);
    world.check();
}

#[test]
fn a_reclaim_and_a_swap_say_what_was_refused_and_go_on_from_there() {
    for verb in [Verb::Unmap, Verb::DestroyFrame] {
        let (world, faults) = faulty();
        let out = awake(&world, 4);
        // Shorter extents than the other's, so that frames are given back and made.
        let into = world.weights(PAGES - 1, &noise((PAGES - 1) * PAGE, 5));
        faults.fail_nth_matching(1, move |call| call.verb == verb);
        let error = world.manager.swap(&out, &into, false, WAIT).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Device, "{error}");
        world.check();
        world.manager.swap(&out, &into, false, WAIT).expect("again");
        assert_eq!((into.usage().missing, out.usage().device), (ByteCount::ZERO, ByteCount::ZERO));
        assert_eq!(world.manager.leaked_bytes(), ByteCount::ZERO);
        world.check();

        let region = world.region("kv", 4, LeaseKind::Kv);
        let kv = KvBacking::new(&region, ByteCount(PAGE), 4).expect("fits");
        assert!(kv.back(&[0, 1]).expect("room"));
        kv.unback(&[0, 1]).expect("backed");
        refuse(&faults, verb);
        let report = world.manager.reclaim(ByteCount(PAGE), WAIT, "a test").expect("no step runs");
        assert_eq!(report.error.expect("refused").kind(), ErrorKind::Device);
        world.check();
        faults.heal();
        world.manager.reclaim(ALL, WAIT, "a test").expect("no step runs");
        assert_eq!(world.device_used(), ByteCount::ZERO);
        world.check();
    }
}
