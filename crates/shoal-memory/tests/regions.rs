//! Regions end to end on the simulated device.

mod common;

use std::time::Duration;

use common::{PAGE, WAIT, noise, piece, source_file, world};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_memory::{Conversion, ErrorKind, KvBacking, MemoryError, SourcePiece};

const ALL: ByteCount = ByteCount(u64::MAX);

fn contents(region: &shoal_memory::Region, bytes: u64) -> Vec<u8> {
    let mut read = vec![0; usize::try_from(bytes).expect("small")];
    region.read(ByteCount::ZERO, &mut read).expect("on the device");
    read
}

#[test]
fn staging_takes_no_device_memory_and_waking_brings_the_bytes_to_the_same_address() {
    let world = world(32, 64);
    let bytes = noise(9 * PAGE - 100, 1);
    let region = world.weights(9, &bytes);
    assert_eq!(world.device_used(), ByteCount::ZERO);
    let address = region.address();
    for _ in 0..2 {
        let report = region.wake(WAIT).expect("started").wait(WAIT).expect("awake");
        assert_eq!(report.copied, ByteCount(9 * PAGE));
        world.check();
        assert_eq!(contents(&region, bytes.len() as u64), bytes);
        let report = region.sleep(0.0, false, WAIT).expect("asleep");
        assert_eq!(
            (report.freed, report.copied),
            (ByteCount(9 * PAGE), ByteCount::ZERO),
            "clean: only unmapping"
        );
        assert_eq!(world.device_used(), ByteCount::ZERO);
        assert_eq!(region.address(), address);
        world.check();
    }
}

#[test]
fn a_part_is_kept_and_only_what_is_missing_comes_back() {
    let world = world(32, 64);
    let bytes = noise(8 * PAGE, 2);
    let region = world.weights(8, &bytes);
    region.wake(WAIT).expect("started").wait(WAIT).expect("awake");
    region.sleep(0.5, false, WAIT).expect("half");
    assert_eq!(region.usage().device, ByteCount(4 * PAGE));
    let transfer = region.wake(WAIT).expect("started");
    assert_eq!(transfer.wait(WAIT).expect("awake").copied, ByteCount(4 * PAGE));
    assert_eq!(transfer.progress().done, ByteCount(4 * PAGE));
    assert_eq!(contents(&region, 8 * PAGE), bytes);
}

#[test]
fn what_was_written_after_sealing_is_found_and_kept() {
    let world = world(32, 64);
    let mut bytes = noise(8 * PAGE, 3);
    let region = world.weights(8, &bytes);
    region.wake(WAIT).expect("started").wait(WAIT).expect("awake");
    region.write(ByteCount(3 * PAGE + 7), b"changed").expect("on the device");
    let at = usize::try_from(3 * PAGE + 7).expect("small");
    bytes[at..at + 7].copy_from_slice(b"changed");
    let report = region.sleep(0.0, false, WAIT).expect("asleep");
    assert_eq!(report.copied, ByteCount(2 * PAGE), "one extent of two pages was dirty");
    region.wake(WAIT).expect("started").wait(WAIT).expect("awake");
    assert_eq!(contents(&region, 8 * PAGE), bytes);
    world.check();
}

#[test]
fn what_takes_the_place_of_a_refused_extent_is_compared_too() {
    let world = world(64, 8);
    let mut bytes = noise(8 * PAGE, 31);
    let path = source_file(world.dir.path(), &bytes);
    let region = world.region("read from a file", 8, LeaseKind::Weights);
    let step = 300_000;
    for (index, part) in bytes.chunks(step).enumerate() {
        let at = (index * step) as u64;
        region.stage(ByteCount(at), part, Some(piece(&path, at, part.len() as u64))).expect("staged");
    }
    region.seal().expect("sealed");
    region.wake(WAIT).expect("started").wait(WAIT).expect("awake");

    // The host is full of what has no other copy; the two extents that would go first are written in place.
    let other = noise(3 * PAGE, 32);
    let keeper = world.weights(3, &other);
    for page in [4, 6] {
        region.write(ByteCount(page * PAGE + 5), b"changed").expect("on the device");
        let at = usize::try_from(page * PAGE + 5).expect("small");
        bytes[at..at + 7].copy_from_slice(b"changed");
    }
    let report = region.evict(ByteCount(2 * PAGE), WAIT).expect("another extent is clean");
    assert_eq!((report.freed, report.copied), (ByteCount(2 * PAGE), ByteCount::ZERO));
    assert_eq!(region.usage().device, ByteCount(6 * PAGE));
    let mut kept = vec![0; usize::try_from(4 * PAGE).expect("small")];
    region.read(ByteCount(4 * PAGE), &mut kept).expect("still there");
    assert_eq!(kept, bytes[bytes.len() / 2..], "what was written is lost (I6)");

    // What is left but the first extent has no other copy: that is said, with the figures, and nothing is lost.
    let error = region.sleep(0.0, false, WAIT).expect_err("no host room");
    let MemoryError::HostBudget { needed, free, budget } = error else { panic!("{error}") };
    assert_eq!((needed, budget), (ByteCount(2 * PAGE), ByteCount(4 * PAGE)));
    assert!(free < needed, "{free} free");
    assert_eq!(region.usage().device, ByteCount(4 * PAGE));
    world.check();

    drop(keeper);
    let report = region.evict(ByteCount(2 * PAGE), WAIT).expect("room for one of the two");
    assert_eq!((report.freed, report.copied), (ByteCount(2 * PAGE), ByteCount(2 * PAGE)));
    region.wake(WAIT).expect("started").wait(WAIT).expect("awake");
    assert_eq!(contents(&region, 8 * PAGE), bytes);
    world.check();
}

#[test]
fn a_host_budget_smaller_than_the_weights_works_through_the_file() {
    let world = world(32, 8);
    let bytes = noise(8 * PAGE, 4);
    let path = source_file(world.dir.path(), &bytes);
    let region = world.region("weights", 8, LeaseKind::Weights);
    let step = 300_000;
    for (index, part) in bytes.chunks(step).enumerate() {
        let at = (index * step) as u64;
        region.stage(ByteCount(at), part, Some(piece(&path, at, part.len() as u64))).expect("staged");
    }
    let error = region.wake(WAIT).expect("started").wait(WAIT).expect_err("nothing to verify by (I8)");
    assert_eq!(error.kind(), ErrorKind::Region);
    world.check();
    let sealed = region.seal().expect("sealed");
    assert_eq!(sealed.in_source, ByteCount(8 * PAGE));
    let usage = region.usage();
    assert!(usage.host <= ByteCount::mib(8) && !usage.host.is_zero(), "{usage:?}");
    assert_eq!(usage.host + usage.source_only, ByteCount(8 * PAGE));
    region.wake(WAIT).expect("started").wait(WAIT).expect("awake");
    assert_eq!(contents(&region, 8 * PAGE), bytes);
    region.sleep(0.0, false, WAIT).expect("asleep");

    // The file changes: the region stays asleep, and says which file. What the host holds is not touched.
    let mut other = bytes.clone();
    let last = other.len() - 1;
    other[last] ^= 1;
    std::fs::write(path.as_path(), &other).expect("written");
    let error = region.wake(WAIT).expect("started").wait(WAIT).expect_err("I8");
    assert_eq!(error.kind(), ErrorKind::Source);
    assert!(error.to_string().contains("model.safetensors"), "{error}");
    assert_eq!(region.usage().device, ByteCount::ZERO);
    world.check();
    std::fs::write(path.as_path(), &bytes).expect("written");
    region.wake(WAIT).expect("started").wait(WAIT).expect("awake");
    assert_eq!(contents(&region, 8 * PAGE), bytes);
}

#[test]
fn a_source_is_compared_before_it_is_believed_and_bf16_is_widened() {
    let world = world(32, 0);
    let narrow = noise(PAGE / 2, 5);
    let wide: Vec<u8> = narrow.chunks_exact(2).flat_map(|two| [0, 0, two[0], two[1]]).collect();
    let path = source_file(world.dir.path(), &narrow);
    let wrong = piece(&path, 0, PAGE / 2);
    let region = world.region("weights", 1, LeaseKind::Weights);
    let error = region.stage(ByteCount::ZERO, &wide[..narrow.len()], Some(wrong)).expect_err("other bytes");
    assert_eq!(error.kind(), ErrorKind::Source);
    let right = SourcePiece { conversion: Conversion::Bf16ToF32, ..piece(&path, 0, PAGE) };
    assert_eq!(
        region.stage(ByteCount(2), &wide[..8], None).expect_err("no host").kind(),
        ErrorKind::HostBudget
    );
    region.stage(ByteCount::ZERO, &wide, Some(right)).expect("verified");
    region.seal().expect("sealed");
    let error =
        region.wake(WAIT).expect("started").wait(WAIT).expect_err("no read buffers without a host budget");
    assert_eq!(error.kind(), ErrorKind::HostBudget);
    world.check();
}

#[test]
fn a_wake_that_gets_no_lease_changes_nothing() {
    let world = world(8, 64);
    let region = world.weights(8, &noise(8 * PAGE, 6));
    let error = region.wake(WAIT).expect("started").wait(WAIT).expect_err("8 of 16 MiB");
    assert_eq!(error.kind(), ErrorKind::Lease);
    assert_eq!(region.usage().missing, ByteCount(8 * PAGE));
    world.check();
    let part = region.restore(ByteCount::mib(8), WAIT).expect("started").wait(WAIT).expect("a part");
    assert_eq!(part.copied, ByteCount::mib(8));
    world.check();
}

#[test]
fn a_cancelled_wake_keeps_what_it_brought_and_goes_on_later() {
    let world = world(32, 64);
    let bytes = noise(8 * PAGE, 7);
    let region = world.weights(8, &bytes);
    let transfer = region.wake(WAIT).expect("started");
    transfer.cancel();
    match transfer.wait(WAIT) {
        Err(error) => assert_eq!(error.kind(), ErrorKind::Transfer),
        Ok(report) => assert_eq!(report.copied, ByteCount(8 * PAGE)),
    }
    world.check();
    region.wake(WAIT).expect("started").wait(WAIT).expect("awake");
    assert_eq!(contents(&region, 8 * PAGE), bytes);
}

#[test]
fn what_is_used_first_comes_first_and_leaves_last_and_writes_are_found_all_the_same() {
    let world = world(32, 64);
    let mut bytes = noise(8 * PAGE, 10);
    let region = world.weights(8, &bytes);
    assert!(region.set_order(&[(ByteCount(7 * PAGE), ByteCount(2 * PAGE))]).is_err(), "past the end");
    region.set_order(&[(ByteCount(6 * PAGE + 1), ByteCount(1))]).expect("inside");
    region.restore(ByteCount(2 * PAGE), WAIT).expect("started").wait(WAIT).expect("a part");
    let mut last = [0; 8];
    region.read(ByteCount(7 * PAGE), &mut last).expect("the last extent came first");
    assert_eq!(last, bytes[bytes.len() - usize::try_from(PAGE).expect("small")..][..8]);
    assert!(region.read(ByteCount::ZERO, &mut last).is_err(), "the first one did not");
    region.wake(WAIT).expect("started").wait(WAIT).expect("awake");
    // In the extent that is now evicted first.
    region.write(ByteCount(5 * PAGE), b"changed").expect("on the device");
    let at = usize::try_from(5 * PAGE).expect("small");
    bytes[at..at + 7].copy_from_slice(b"changed");
    let report = region.evict(ByteCount(PAGE), WAIT).expect("free");
    assert_eq!((report.freed, report.copied), (ByteCount(2 * PAGE), ByteCount(2 * PAGE)));
    region.sleep(0.25, false, WAIT).expect("a part stays");
    region.read(ByteCount(7 * PAGE), &mut last).expect("used first, so it stayed");
    region.wake(WAIT).expect("started").wait(WAIT).expect("awake");
    assert_eq!(contents(&region, 8 * PAGE), bytes);
    world.check();
}

#[test]
fn a_guard_brings_back_what_is_missing_and_keeps_it() {
    let world = world(32, 64);
    let bytes = noise(4 * PAGE, 8);
    let region = world.weights(4, &bytes);
    let guard = world.manager.guard(WAIT).expect("restored");
    assert_eq!(contents(&region, 4 * PAGE), bytes);
    let error = region.sleep(0.0, true, Duration::from_millis(50)).expect_err("a step runs");
    assert_eq!(error.kind(), ErrorKind::Transfer);
    let reclaimed = world.manager.reclaim(ALL, Duration::from_millis(50), "a test");
    assert!(reclaimed.is_err() && region.usage().missing.is_zero());
    drop(guard);
    assert_eq!(world.manager.reclaim(ByteCount(1), WAIT, "a test").expect("free").freed, ByteCount(PAGE));
    assert_eq!(world.manager.reclaim(ALL, WAIT, "a test").expect("free").freed, ByteCount(3 * PAGE));
    assert_eq!(world.device_used(), ByteCount::ZERO);
}

#[test]
fn kv_blocks_take_memory_when_backed_and_give_it_up_in_order() {
    let world = world(16, 64);
    let weights = world.weights(4, &noise(4 * PAGE, 9));
    weights.wake(WAIT).expect("started").wait(WAIT).expect("awake");
    let region = world.region("kv", 16, LeaseKind::Kv);
    let kv = KvBacking::new(&region, ByteCount(PAGE * 3 / 4), 20).expect("fits");
    assert!(kv.back(&[0, 1]).expect("ids"));
    assert_eq!(kv.backed_bytes(), ByteCount(2 * PAGE));
    assert!(!kv.back(&(2..20).collect::<Vec<_>>()).expect("ids"), "not now is a value");
    assert_eq!(kv.backed_bytes(), ByteCount(2 * PAGE), "all or nothing");
    assert_eq!(kv.back(&[1]).expect_err("twice").kind(), ErrorKind::Blocks);
    region.write(ByteCount(10), b"tokens").expect("backed");
    assert!(kv.back(&[4]).expect("ids"), "block 4 takes pages 3");
    kv.unback(&[4]).expect("backed");
    world.check();

    // Idle KV first, then weights, then live KV by way of the host.
    let used = world.device_used();
    assert_eq!(world.manager.reclaim(ByteCount(1), WAIT, "a test").expect("done").freed, ByteCount(PAGE));
    assert_eq!(kv.idle_bytes(), ByteCount::ZERO);
    world.manager.reclaim(ByteCount(1), WAIT, "a test").expect("done");
    assert_eq!(weights.usage().device, ByteCount(3 * PAGE));
    let rest = world.manager.reclaim(ALL, WAIT, "a test").expect("done");
    assert_eq!(rest.copied, ByteCount(2 * PAGE));
    assert_eq!(world.device_used(), ByteCount::ZERO);
    assert!(used > ByteCount::ZERO);
    world.check();
    let _guard = world.manager.guard(WAIT).expect("all back");
    let mut read = [0; 6];
    region.read(ByteCount(10), &mut read).expect("backed");
    assert_eq!(&read, b"tokens");
    // What is reported as live is what a reclaim of idle KV would leave: whole pages.
    assert_eq!(kv.live_bytes(), ByteCount(PAGE * 3 / 2));
    assert_eq!(world.manager.usage().kv_live, ByteCount(PAGE * 2));
    world.check();
}

#[test]
fn committed_memory_is_zero_and_goes_with_its_region() {
    let world = world(16, 16);
    let region = world.region("workspace", 6, LeaseKind::Overhead);
    region.commit(ByteCount(PAGE + 5), ByteCount(PAGE)).expect("room");
    assert_eq!(world.device_used(), ByteCount(2 * PAGE));
    region.write(ByteCount(PAGE), &[7; 64]).expect("there");
    region.decommit(ByteCount(PAGE), ByteCount(2 * PAGE)).expect("whole extents");
    assert_eq!(world.device_used(), ByteCount::ZERO);
    region.commit(ByteCount(PAGE), ByteCount(64)).expect("room");
    let mut read = [1; 64];
    region.read(ByteCount(PAGE), &mut read).expect("there");
    assert_eq!(read, [0; 64]);
    assert!(region.commit(ByteCount(5 * PAGE), ByteCount(2 * PAGE)).is_err(), "past the end");
    drop(region);
    assert_eq!(world.device_used(), ByteCount::ZERO);
    world.check();
}

/// Making host room must never take the only copy of what came from the device.
#[test]
fn host_copies_of_what_no_file_holds_are_never_dropped() {
    let world = world(16, 10);
    let region = world.region("kv", 4, LeaseKind::Kv);
    let kv = KvBacking::new(&region, ByteCount(PAGE), 4).expect("fits");
    assert!(kv.back(&[0, 1, 2, 3]).expect("room"));
    for page in 0..4 {
        region.write(ByteCount(page * PAGE), &[7]).expect("backed");
    }
    for _ in 0..4 {
        let report = world.manager.reclaim(ByteCount(1), WAIT, "a test").expect("no step runs");
        assert!(report.freed == ByteCount(PAGE) || report.error.is_some(), "{report:?}");
    }
    let error = world.manager.reclaim(ALL, WAIT, "a test").expect("no step runs").error;
    assert_eq!(region.usage().source_only, ByteCount::ZERO);
    assert!(error.is_some() || region.usage().device.is_zero());
    let _guard = world.manager.guard(WAIT).expect("restored");
    for page in 0..4 {
        let mut byte = [0];
        region.read(ByteCount(page * PAGE), &mut byte).expect("restored");
        assert_eq!(byte, [7], "page {page}");
    }
    world.check();
}
