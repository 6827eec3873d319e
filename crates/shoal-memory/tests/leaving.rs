//! Memory that cannot leave when it is given up, under what asks for memory at the same addresses: nothing is mapped there,
//! and nobody hears of an error of the device's for it. torch's segments come elsewhere.

mod common;

use std::sync::Arc;
use std::time::Instant;

use common::{PAGE, WAIT, World, open, until, world_on};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_device::device::Verb;
use shoal_device::{Device, DeviceError, FaultDevice, VirtAddr};
use shoal_memory::{
    Backing, ErrorKind, KvBacking, ManagerOptions, MemoryError, MemoryManager, PoolOptions, Segments,
};

const ALL: ByteCount = ByteCount(u64::MAX);

/// 32 MiB on a device that refuses to unmap from here on when it is told to.
fn faulty() -> (World, Arc<FaultDevice>) {
    let dir = tempfile::tempdir().expect("a directory");
    let faults = FaultDevice::new(open(dir.path(), 64));
    let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 32, 64);
    (world, faults)
}

/// The same, where memory that is to leave is waited for, if it is, for far longer than a busy machine is away.
fn patient() -> (World, Arc<FaultDevice>) {
    let (World { dir, device, budget, .. }, faults) = faulty();
    let options = ManagerOptions {
        lease_wait: WAIT,
        pool: Some(PoolOptions::off()),
        ..ManagerOptions::new(ByteCount::mib(64), Arc::clone(&budget) as _)
    };
    let manager = MemoryManager::new(Arc::clone(&device), options).expect("a manager");
    (World { dir, device, budget, manager }, faults)
}

fn refuse(faults: &FaultDevice) {
    faults.fail_all(Verb::Unmap, DeviceError::Injected { call: 0, verb: Verb::Unmap });
}

#[test]
fn a_range_is_committed_again_once_the_device_has_unmapped_it() {
    let (world, faults) = patient();
    let region = world.region("range", 8, LeaseKind::Overhead);
    let (all, half) = (ByteCount(8 * PAGE), ByteCount(4 * PAGE));
    region.commit(ByteCount::ZERO, all).expect("room");
    region.write(ByteCount::ZERO, &[7; 4096]).expect("committed");
    refuse(&faults);
    assert_eq!(region.decommit(ByteCount::ZERO, half).expect_err("refused").kind(), ErrorKind::Device);
    let (before, start) = (region.usage(), Instant::now());
    let error = region.commit(ByteCount::ZERO, all).expect_err("mapped still");
    assert!(matches!(&error, MemoryError::StillMapped { region, .. } if region == "range"), "{error}");
    assert!(start.elapsed() < WAIT / 2, "to wait is no use");
    assert_eq!(region.usage(), before);
    world.check();
    assert_eq!(region.commit(half, half).expect("committed"), ByteCount::ZERO, "the rest is as it was");
    faults.heal();
    assert_eq!(region.commit(ByteCount::ZERO, all).expect("unmapped by now"), half);
    let mut read = [1; 4096];
    region.read(ByteCount::ZERO, &mut read).expect("committed");
    assert_eq!(read, [0; 4096], "new memory is zero");
    world.check();
}

#[test]
fn blocks_are_backed_later_while_the_device_refuses_to_unmap_their_memory() {
    let (world, faults) = faulty();
    let region = world.region("kv", 8, LeaseKind::Kv);
    let kv = KvBacking::new(&region, ByteCount(PAGE), 8).expect("fits");
    assert!(kv.back(&[0, 1, 7]).expect("room"));
    kv.unback(&[0, 1]).expect("backed");
    refuse(&faults);
    assert_eq!(kv.trim(ALL).expect("nothing runs").error.expect("refused").kind(), ErrorKind::Device);
    for ids in [&[0_u32][..], &[1], &[3, 0]] {
        assert!(!kv.back(ids).expect("not now is no error"));
    }
    assert_eq!(kv.live_bytes(), ByteCount(PAGE));
    world.check();
    faults.heal();
    assert!(kv.back(&[0, 1, 3]).expect("unmapped by now"));
    assert_eq!(kv.live_bytes(), ByteCount(4 * PAGE));
    world.check();
}

#[test]
fn segments_come_elsewhere_while_the_device_refuses_to_unmap() {
    let (world, faults) = faulty();
    let segments = Segments::new(&world.manager, "torch".to_owned(), LeaseKind::Overhead, Backing::Keep)
        .expect("addresses");
    let take = || {
        let at = segments.allocate(ByteCount::mib(2), None).expect("room elsewhere");
        segments.check_invariants().expect("invariants");
        at
    };
    let first: Vec<VirtAddr> = (0..4).map(|_| take()).collect();
    refuse(&faults);
    for at in &first {
        segments.free(*at, None).expect("a segment");
    }
    // Whoever asks the device for it again has it in hand for a moment.
    until("all of it is out of the books, and kept", || {
        segments.usage().retired.is_zero() && world.manager.leaked_bytes() >= ByteCount::mib(8)
    });
    let second: Vec<VirtAddr> = (0..4).map(|_| take()).collect();
    let reaches = |at: &VirtAddr| first.contains(at);
    assert!(!second.iter().any(reaches), "{second:?} among {first:?}");
    world.check();
    faults.heal();
    for at in second {
        segments.free(at, None).expect("a segment");
    }
    until("all of it goes back", || segments.usage().retired.is_zero() && world.device_used().is_zero());
    assert_eq!(take(), first[0], "its addresses are free again");
    world.check();
}
