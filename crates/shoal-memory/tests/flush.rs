//! Freezing: sealed at once, copied to the host in the background. Writes meanwhile are found, nothing is lost, and
//! whatever else is asked of the region goes first.

mod common;

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use common::{PAGE, World, noise, open, open_slow, world, world_on};
use shoal_core::bytes::ByteCount;
use shoal_core::extent::ExtentRule;
use shoal_core::protocol::LeaseKind;
use shoal_device::device::{DeviceKind, Verb};
use shoal_device::{Device, DeviceError, FaultDevice};
use shoal_memory::{Backing, ErrorKind, MemoryError, Region, RegionSpec};

const PAGES: u64 = 24;
const ALL: ByteCount = ByteCount(PAGES * PAGE);
/// How soon bytes are moved and hashed is not asked here, and a machine that builds meanwhile has taken half a minute.
const WAIT: Duration = Duration::from_mins(5);
/// What is to happen while bytes are copied is tried so often: a thread may be away for as long as they take.
const TRIES: usize = 10;

fn faulty(device_mib: u64, host_mib: u64) -> (World, Arc<FaultDevice>) {
    let dir = tempfile::tempdir().expect("a directory");
    let faults = FaultDevice::new(open(dir.path(), device_mib));
    let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, device_mib, host_mib);
    (world, faults)
}

/// A world whose link moves so many MiB a second.
fn slow(device_mib: u64, host_mib: u64, link_mib: u64) -> World {
    let dir = tempfile::tempdir().expect("a directory");
    let device = open_slow(dir.path(), device_mib, ByteCount::mib(link_mib));
    world_on(dir, device, device_mib, host_mib)
}

/// Whether its link is as slow as asked for, and not a GPU's.
fn is_slow(world: &World) -> bool {
    world.device.info().kind == DeviceKind::Sim
}

/// A region that was written on the device and has no copy anywhere, in extents of several chunks.
fn filled(world: &World, name: &str, bytes: &[u8]) -> Region {
    let spec = RegionSpec {
        name: name.to_owned(),
        bytes: ALL,
        kind: LeaseKind::Overhead,
        extent_rule: ExtentRule { pieces_min: 1, ..ExtentRule::default() },
        backing: Backing::Keep,
    };
    let region = world.manager.region(spec).expect("addresses");
    region.commit(ByteCount::ZERO, ALL).expect("room");
    region.write(ByteCount::ZERO, bytes).expect("there");
    region
}

fn holds(region: &Region, bytes: &[u8]) {
    region.wake(WAIT).expect("begun").wait(WAIT).expect("room");
    let mut read = vec![0; bytes.len()];
    region.read(ByteCount::ZERO, &mut read).expect("on the device");
    assert!(read == bytes, "bytes were lost");
}

/// Stops the device at the `n`-th copy to the host until the sender is dropped; says when it has.
fn hold_copy(faults: &FaultDevice, n: u64) -> (mpsc::Sender<()>, mpsc::Receiver<()>) {
    let ((release, held), (say, stopped)) = (mpsc::channel(), mpsc::channel());
    let mut left = n;
    faults.fail_when(move |call| {
        if call.verb == Verb::Copy && left > 0 {
            left -= 1;
            if left == 0 {
                let _ = say.send(());
                let _ = held.recv_timeout(WAIT);
            }
        }
        None
    });
    (release, stopped)
}

#[test]
fn the_first_sleep_after_a_freeze_copies_nothing() {
    let world = world(64, 64);
    let bytes = noise(PAGES * PAGE, 1);
    let region = filled(&world, "weights", &bytes);
    let flush = region.freeze(WAIT).expect("sealed");
    assert!(region.usage().sealed);
    assert_eq!(flush.sealed().bytes, ALL);
    let report = flush.wait(WAIT).expect("copied");
    assert_eq!((report.copied, report.dirty), (ALL, ByteCount::ZERO));
    assert!(report.error.is_none());
    let progress = flush.progress();
    assert_eq!((progress.done, progress.total, progress.is_finished), (ALL, ALL, true));
    assert_eq!((region.usage().host, region.usage().device), (ALL, ALL));
    let slept = region.sleep(0.0, false, WAIT).expect("clean");
    assert_eq!((slept.freed, slept.copied), (ALL, ByteCount::ZERO));
    holds(&region, &bytes);
    // What is clean is not copied again.
    let again = region.freeze(WAIT).expect("again").wait(WAIT).expect("nothing to do");
    assert_eq!((again.sealed.bytes, again.copied), (ByteCount::ZERO, ByteCount::ZERO));
    world.check();
}

#[test]
fn a_write_in_place_at_any_moment_of_the_copy_is_found() {
    // Two chunks an extent at least, so that a copy may be torn; a chunk takes 16 ms.
    for (delay_ms, page) in [(0, 0), (5, PAGES - 1), (20, 0), (35, 10), (60, 14), (120, 3)] {
        let world = slow(64, 64, 512);
        let mut bytes = noise(PAGES * PAGE, 2);
        let region = filled(&world, "weights", &bytes);
        let flush = region.freeze(WAIT).expect("sealed");
        thread::sleep(Duration::from_millis(delay_ms));
        // Somebody writes without telling anyone.
        let at = usize::try_from(page * PAGE).expect("small");
        let written = noise(PAGE, 3);
        bytes[at..at + written.len()].copy_from_slice(&written);
        region.write(ByteCount(page * PAGE), &written).expect("there");
        let report = flush.wait(WAIT).expect("copied");
        assert_eq!(report.copied + report.dirty, ALL, "{delay_ms} {page}");
        region.sleep(0.0, false, WAIT).expect("room");
        holds(&region, &bytes);
        // And after the copy.
        region.write(ByteCount(page * PAGE), b"again").expect("there");
        bytes[at..at + 5].copy_from_slice(b"again");
        let slept = region.sleep(0.0, false, WAIT).expect("room");
        assert!(slept.copied > ByteCount::ZERO, "{delay_ms} {page}: taken for clean");
        holds(&region, &bytes);
        world.check();
    }
}

#[test]
fn a_region_written_all_the_time_stays_dirty_where_it_is() {
    let was_dirty = (0..TRIES).any(|_| {
        let world = slow(64, 64, 64);
        let mut bytes = noise(PAGES * PAGE, 4);
        let region = filled(&world, "weights", &bytes);
        let flush = region.freeze(WAIT).expect("sealed");
        let mut count = 0_u8;
        while !flush.progress().is_finished {
            // In the first chunk of the longest extent; each write waits for the chunks that are queued.
            bytes[0] = count;
            region.write(ByteCount::ZERO, &[count]).expect("there");
            count = count.wrapping_add(1);
        }
        let report = flush.wait(WAIT).expect("no failure");
        assert!(report.error.is_none(), "{report:?}");
        assert_eq!(report.copied + report.dirty, ALL);
        assert_eq!(world.manager.usage().host, report.copied, "nothing is kept of what does not count");
        region.sleep(0.0, false, WAIT).expect("room");
        holds(&region, &bytes);
        world.check();
        // A GPU may be quicker than the writer.
        report.dirty > ByteCount::ZERO || !is_slow(&world)
    });
    assert!(was_dirty, "all of it was taken for copied each time");
}

#[test]
fn what_finds_no_host_room_stays_dirty_and_the_report_says_so() {
    let world = world(64, 32);
    let bytes = noise(PAGES * PAGE, 5);
    let region = filled(&world, "weights", &bytes);
    let report = region.freeze(WAIT).expect("sealed").wait(WAIT).expect("no failure");
    assert!(!report.copied.is_zero() && !report.dirty.is_zero());
    assert_eq!(report.copied + report.dirty, ALL);
    assert_eq!(report.error.expect("no room").kind(), ErrorKind::HostBudget);
    assert!(world.manager.usage().host <= ByteCount::mib(32));
    assert_eq!(world.manager.usage().host, report.copied);
    // What is clean goes without a copy; the rest finds no room now either.
    let error = region.sleep(0.0, false, WAIT).expect_err("no room");
    assert_eq!(error.kind(), ErrorKind::HostBudget);
    assert_eq!(region.usage().device, report.dirty);
    holds(&region, &bytes);
    world.check();
}

#[test]
fn a_sleep_meanwhile_goes_first_and_gets_the_host_memory_of_what_is_not_whole() {
    let (world, faults) = faulty(64, 56);
    let bytes = noise(PAGES * PAGE, 6);
    for n in 1..6 {
        let region = filled(&world, "weights", &bytes);
        let (release, stopped) = hold_copy(&faults, n);
        let flush = region.freeze(WAIT).expect("sealed");
        stopped.recv_timeout(WAIT).expect("a copy");
        let sleeper = {
            let region = region.clone();
            thread::spawn(move || region.sleep(0.0, false, WAIT).map(|report| report.freed))
        };
        thread::sleep(Duration::from_millis(30));
        drop(release);
        // The host has room for the region once, and not for an extent more.
        assert_eq!(sleeper.join().expect("no panic").expect("room"), ALL, "copy {n}");
        let report = flush.wait(WAIT).expect("no failure");
        assert_eq!(report.dirty, ByteCount::ZERO);
        assert_eq!(region.usage().host, ALL);
        faults.heal();
        holds(&region, &bytes);
        world.check();
        drop(region);
        assert_eq!(world.manager.usage().host, ByteCount::ZERO);
    }
}

#[test]
fn evictions_wakes_and_swaps_meanwhile_lose_nothing() {
    let (world, faults) = faulty(160, 200);
    let bytes = [noise(PAGES * PAGE, 7), noise(PAGES * PAGE, 8)];
    for n in 1..6 {
        let [first, second] = [0, 1].map(|index: usize| filled(&world, "weights", &bytes[index]));
        second.freeze(WAIT).expect("sealed").wait(WAIT).expect("copied");
        second.sleep(0.0, false, WAIT).expect("clean");
        let (release, stopped) = hold_copy(&faults, n);
        let flush = first.freeze(WAIT).expect("sealed");
        stopped.recv_timeout(WAIT).expect("a copy");
        let (region, other, manager) = (first.clone(), second.clone(), Arc::clone(&world.manager));
        let others = thread::spawn(move || {
            match n {
                1 => drop(region.evict(ByteCount(3 * PAGE), WAIT)?),
                2 => drop(manager.reclaim(ALL, WAIT, "a test")?),
                3 => drop(manager.swap(&region, &other, false, WAIT)?),
                4 => drop(other.wake(WAIT)?.wait(WAIT)?),
                _ => {
                    region.sleep(0.5, false, WAIT)?;
                    region.wake(WAIT)?.wait(WAIT)?;
                }
            }
            Ok::<(), MemoryError>(())
        });
        thread::sleep(Duration::from_millis(20));
        drop(release);
        others.join().expect("no panic").expect("room");
        flush.wait(WAIT).expect("no failure");
        faults.heal();
        world.check();
        holds(&first, &bytes[0]);
        holds(&second, &bytes[1]);
        world.check();
        for region in [&first, &second] {
            assert_eq!(region.sleep(0.0, false, WAIT).expect("clean").copied, ByteCount::ZERO, "{n}");
        }
    }
}

#[test]
fn who_waits_for_the_turn_waits_for_a_chunk_and_not_for_the_copy() {
    let dir = tempfile::tempdir().expect("a directory");
    // 31 ms a chunk, 24 chunks.
    let faults = FaultDevice::new(open_slow(dir.path(), 256, ByteCount::mib(256)));
    let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 256, 256);
    let region = world.region("weights", 4 * PAGES, LeaseKind::Overhead);
    region.commit(ByteCount::ZERO, ByteCount(4 * PAGES * PAGE)).expect("room");
    let other = world.weights(2, &noise(2 * PAGE, 10));
    let flush = region.freeze(WAIT).expect("sealed");
    faults.clear_history();
    other.wake(WAIT).expect("begun").wait(WAIT).expect("room");
    if !is_slow(&world) {
        return;
    }
    assert!(!flush.progress().is_finished, "it was to be slow");
    flush.wait(WAIT).expect("copied");
    let verbs: Vec<Verb> = faults.history().iter().map(|call| call.verb).collect();
    let first_map = verbs.iter().position(|verb| *verb == Verb::Map).expect("a wake maps");
    let copies = |verbs: &[Verb]| verbs.iter().filter(|verb| **verb == Verb::Copy).count();
    // It takes the turn twice, and finds at most three chunks before it each time.
    assert!(copies(&verbs[..first_map]) <= 6, "too many copies went before the wake: {verbs:?}");
    assert!(copies(&verbs[first_map..]) >= 12);
    world.check();
}

#[test]
fn a_cancelled_freeze_keeps_what_was_copied_and_a_dropped_region_ends_it() {
    let (world, faults) = faulty(64, 64);
    let bytes = noise(PAGES * PAGE, 11);
    let region = filled(&world, "weights", &bytes);
    let (release, stopped) = hold_copy(&faults, 3);
    let flush = region.freeze(WAIT).expect("sealed");
    stopped.recv_timeout(WAIT).expect("a copy");
    flush.cancel();
    drop(release);
    let error = flush.wait(WAIT).expect_err("cancelled");
    assert!(matches!(error, MemoryError::Cancelled { total: ALL, .. }), "{error}");
    assert_eq!(flush.progress().done, region.usage().host);
    assert_eq!(world.manager.usage().host, region.usage().host, "nothing is kept of what does not count");
    let report = region.freeze(WAIT).expect("again").wait(WAIT).expect("copied");
    assert_eq!(report.dirty, ByteCount::ZERO);
    region.sleep(0.0, false, WAIT).expect("clean");
    holds(&region, &bytes);
    drop(region);
    faults.heal();

    let region = filled(&world, "weights", &bytes);
    let (release, stopped) = hold_copy(&faults, 2);
    let flush = region.freeze(WAIT).expect("sealed");
    stopped.recv_timeout(WAIT).expect("a copy");
    drop(region);
    drop(release);
    flush.wait(WAIT).expect("nobody needs it");
    assert_eq!(world.device_used(), ByteCount::ZERO);
    assert_eq!(world.manager.usage().host, ByteCount::ZERO);
    world.check();
}

#[test]
fn freezes_of_several_regions_go_one_after_another() {
    let world = world(160, 160);
    let bytes = noise(PAGES * PAGE, 12);
    let regions = ["one", "two", "three"].map(|name| filled(&world, name, &bytes));
    let flushes = regions.each_ref().map(|region| region.freeze(WAIT).expect("sealed"));
    for (region, flush) in regions.iter().zip(&flushes) {
        assert_eq!(flush.wait(WAIT).expect("copied").copied, ALL);
        assert_eq!(region.sleep(0.0, false, WAIT).expect("clean").copied, ByteCount::ZERO);
    }
    world.check();
}

#[test]
fn a_failure_is_told_and_changes_nothing() {
    let (world, faults) = faulty(128, 64);
    let bytes = noise(PAGES * PAGE, 13);
    let region = filled(&world, "weights", &bytes);
    let flush = {
        let count = 2;
        faults.fail_nth_matching(count, |call| call.verb == Verb::Copy);
        region.freeze(WAIT).expect("sealed")
    };
    let error = flush.wait(WAIT).expect_err("injected");
    assert!(matches!(error, MemoryError::Device { source: DeviceError::Injected { .. }, .. }), "{error}");
    faults.heal();
    assert_eq!(world.manager.usage().host, region.usage().host);
    region.sleep(0.0, false, WAIT).expect("room");
    holds(&region, &bytes);
    let used = {
        let dropped = filled(&world, "other", &[]);
        let using = dropped.begin_use(WAIT).expect("awake");
        let refused = dropped.freeze(WAIT).expect_err("it is being filled");
        drop(using);
        refused
    };
    assert_eq!(used.kind(), ErrorKind::Region);
    world.check();
}
