//! A wake under way: memory and copies hand in hand, the order of use, steps that run beside it, and what is left of it
//! when it fails.

mod common;

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use common::{PAGE, WAIT, World, noise, open, open_slow, piece, source_file, world, world_on};
use shoal_core::bytes::ByteCount;
use shoal_core::extent::ExtentRule;
use shoal_core::protocol::LeaseKind;
use shoal_device::device::{DeviceKind, Verb};
use shoal_device::{Device, DeviceError, FaultDevice, ForeignStream, Stream};
use shoal_memory::{
    Backing, ErrorKind, Guard, LocalBudget, ManagerOptions, MemoryError, MemoryManager, Region, RegionSpec,
    Transfer,
};

const PAGES: u64 = 8;
const SOON: Duration = Duration::from_millis(30);

fn faulty(device_mib: u64) -> (World, Arc<FaultDevice>) {
    let dir = tempfile::tempdir().expect("a directory");
    let faults = FaultDevice::new(open(dir.path(), 64));
    let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, device_mib, 64);
    (world, faults)
}

fn at(page: u64) -> ByteCount {
    ByteCount(page * PAGE)
}

fn read(region: &Region, page: u64, pages: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(pages * PAGE).expect("small")];
    region.read(at(page), &mut bytes).expect("on the device");
    bytes
}

fn part(bytes: &[u8], page: u64, pages: u64) -> &[u8] {
    let index = |page| usize::try_from(page * PAGE).expect("small");
    &bytes[index(page)..index(page + pages)]
}

/// Stops the device at the `n`-th copy until the sender is dropped; says when it has.
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
fn the_first_copy_runs_before_the_last_extent_has_memory() {
    let (world, faults) = faulty(32);
    let region = world.weights(PAGES, &noise(PAGES * PAGE, 1));
    faults.clear_history();
    region.wake(WAIT).expect("a thread").wait(WAIT).expect("room");
    let verbs: Vec<Verb> = faults.history().iter().map(|call| call.verb).collect();
    let first_copy = verbs.iter().position(|verb| *verb == Verb::Copy).expect("copies");
    let maps = |verbs: &[Verb]| verbs.iter().filter(|verb| **verb == Verb::Map).count();
    let extents = maps(&verbs);
    assert!(extents > 2);
    assert_eq!(maps(&verbs[..first_copy]), 1, "{verbs:?}");
    world.check();
}

#[test]
fn without_memory_for_any_of_its_extents_a_wake_changes_nothing() {
    let (world, faults) = faulty(32);
    let bytes = noise(PAGES * PAGE, 2);
    let region = world.weights(PAGES, &bytes);
    region.wake(WAIT).expect("a thread").wait(WAIT).expect("room");
    region.sleep(0.25, false, WAIT).expect("clean");
    let before = region.usage();
    let missing = before.missing.0 / before.total.0.div_ceil(4);
    assert!(missing >= 2 && before.device > ByteCount::ZERO, "{before:?}");
    let full = DeviceError::OutOfMemory {
        device: world.device.info().id,
        requested: ByteCount(PAGE),
        free: ByteCount::ZERO,
        capacity: ByteCount(PAGE),
    };
    for k in 1.. {
        let (full, mut left) = (full.clone(), k);
        faults.fail_when(move |call| {
            left -= i32::from(call.verb == Verb::CreateFrame);
            (call.verb == Verb::CreateFrame && left <= 0).then(|| full.clone())
        });
        let outcome = region.wake(WAIT).expect("a thread").wait(WAIT);
        faults.heal();
        let Err(error) = outcome else {
            assert!(k > 2, "a wake made only {k} frames");
            break;
        };
        assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
        // What came in vain has left again, and is counted.
        let now = region.usage();
        assert_eq!(now, shoal_memory::RegionUsage { left: now.left, ..before }, "frame {k}");
        world.check();
    }
    assert_eq!(read(&region, 0, PAGES), bytes);
    world.check();
}

#[test]
fn a_step_runs_beside_a_wake_in_order_of_use() {
    let (world, faults) = faulty(32);
    let bytes = noise(PAGES * PAGE, 3);
    let region = world.weights(PAGES, &bytes);
    // The last page is used first.
    let order: Vec<_> = (0..PAGES).rev().map(|page| (at(page), ByteCount(PAGE))).collect();
    region.set_order(&order).expect("within");
    let pages_of_extent = {
        faults.clear_history();
        region.wake(WAIT).expect("a thread").wait(WAIT).expect("room");
        let copy = faults.history().into_iter().find(|call| call.verb == Verb::Copy).expect("copies");
        copy.bytes.0 / PAGE
    };
    region.sleep(0.0, false, WAIT).expect("clean");
    let extents = PAGES / pages_of_extent;
    let (release, stopped) = hold_copy(&faults, extents);
    let wake = region.wake(WAIT).expect("a thread");
    stopped.recv_timeout(WAIT).expect("the last copy");
    // What comes first is on its way, what comes last is not.
    wake.wait_host(at(PAGES - 1), ByteCount(PAGE), WAIT).expect("queued");
    let early = wake.wait_host(at(0), ByteCount(PAGE), SOON).expect_err("not queued");
    assert!(matches!(early, MemoryError::Deadline { .. }), "{early}");
    assert!(!wake.progress().is_finished);
    let (guard, beside) = region.guard_in_order(WAIT).expect("room");
    let beside = beside.expect("a wake");
    assert_eq!(beside.id(), wake.id());
    let evicted = {
        let region = region.clone();
        thread::spawn(move || region.sleep(0.0, false, WAIT).map(|report| report.freed))
    };
    // A guard inside this one waits for the wake to end, as does one of another thread.
    assert!(region.usage().missing > ByteCount::ZERO);
    drop(release);
    let stream = ForeignStream::DEFAULT;
    for page in (0..PAGES).rev() {
        beside.wait_stream(at(page), ByteCount(PAGE), stream, WAIT).expect("comes");
    }
    drop(region.guard(WAIT).expect("the same thread"));
    assert!(!evicted.is_finished(), "evicted beside a step");
    assert_eq!(read(&region, 0, PAGES), bytes);
    drop(guard);
    // What it was to free was counted when it was asked for, in the middle of the wake.
    evicted.join().expect("no panic").expect("clean");
    region.sleep(0.0, false, WAIT).expect("clean");
    // It has ended and what it brought is gone again.
    let gone = beside.wait_host(at(0), ByteCount(PAGE), WAIT).expect_err("evicted");
    assert!(matches!(gone, MemoryError::State { .. }), "{gone}");
    let outside = beside.wait_host(at(PAGES), ByteCount(PAGE), WAIT).expect_err("outside");
    assert!(matches!(outside, MemoryError::OutOfRange { .. }), "{outside}");
    world.check();
}

#[test]
fn what_has_come_can_be_read_before_the_wake_has_counted_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let faults = FaultDevice::new(open_slow(dir.path(), 64, ByteCount::mib(100)));
    let world = world_on(dir, Arc::clone(&faults) as Arc<dyn Device>, 32, 64);
    let bytes = noise(PAGES * PAGE, 9);
    let region = world.weights(PAGES, &bytes);
    // Four extents, so that none has come when the last copy is queued; then the wake's thread stands still.
    let (release, stopped) = hold_copy(&faults, 4);
    let wake = region.wake(WAIT).expect("a thread");
    stopped.recv_timeout(WAIT).expect("the last copy");
    let (guard, beside) = region.guard_in_order(WAIT).expect("room");
    beside.expect("a wake").wait_host(at(0), ByteCount(PAGE), WAIT).expect("queued");
    thread::sleep(Duration::from_millis(200));
    let reader = {
        let region = region.clone();
        thread::spawn(move || {
            let mut read = vec![0; usize::try_from(PAGE).expect("small")];
            region.read(at(0), &mut read).map(|()| read)
        })
    };
    // What has not been queued is refused all the same.
    let error = region.read(at(PAGES - 1), &mut [0; 1]).expect_err("not on its way");
    assert_eq!(error.kind(), ErrorKind::Region, "{error}");
    thread::sleep(SOON);
    drop(release);
    assert!(reader.join().expect("no panic").expect("it has come") == part(&bytes, 0, 1));
    wake.wait(WAIT).expect("room");
    drop(guard);
    world.check();
}

#[test]
fn a_copy_from_a_file_that_takes_too_long_is_a_deadline_and_frees_nothing_under_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let device = open_slow(dir.path(), 64, ByteCount::mib(1));
    if device.info().kind != DeviceKind::Sim {
        eprintln!("not run: a GPU's link is too fast for a copy to be late");
        return;
    }
    let bytes = noise(PAGES * PAGE, 10);
    let path = source_file(dir.path(), &bytes);
    let mut options = ManagerOptions::new(ByteCount::mib(4), LocalBudget::new(ByteCount::mib(32)) as _);
    options.operation_wait = Duration::from_millis(80);
    let manager = MemoryManager::new(Arc::clone(&device), options).expect("a manager");
    let spec = RegionSpec {
        name: "weights".to_owned(),
        bytes: at(PAGES),
        kind: LeaseKind::Weights,
        extent_rule: ExtentRule { pieces_min: 4, ..ExtentRule::default() },
        backing: Backing::Keep,
    };
    let region = manager.region(spec).expect("addresses");
    region.stage(ByteCount::ZERO, &bytes, Some(piece(&path, 0, PAGES * PAGE))).expect("verified");
    region.seal().expect("sealed");
    let error = region.wake(WAIT).expect("a thread").wait(WAIT).expect_err("250 ms a chunk");
    let is_late = matches!(&error, MemoryError::Device { source: DeviceError::Timeout { .. }, .. });
    assert!(is_late, "{error}");
    assert_eq!(region.usage().device, ByteCount::ZERO);
    manager.check_invariants().expect("invariants");
}

#[test]
fn a_guard_in_order_starts_the_wake_and_needs_none_when_all_is_there() {
    let world = world(32, 64);
    let bytes = noise(PAGES * PAGE, 4);
    let region = world.weights(PAGES, &bytes);
    for _ in 0..20 {
        let (guard, wake) = region.guard_in_order(WAIT).expect("room");
        let wait = |page| match &wake {
            Some(wake) => wake.wait_stream(at(page), ByteCount(PAGE), ForeignStream::DEFAULT, WAIT),
            None => Ok(()),
        };
        for page in 0..PAGES {
            wait(page).expect("comes");
        }
        // Inside it, all is waited for.
        drop(region.guard(WAIT).expect("the same thread"));
        assert!(region.missing_bytes().is_zero());
        assert!(region.guard_in_order(WAIT).expect("nested").1.is_none());
        assert_eq!(read(&region, 0, PAGES), bytes);
        drop(guard);
        region.sleep(0.0, false, WAIT).expect("clean");
    }
    world.check();
}

/// A region whose last copy failed while a step ran beside its wake: the outcome, and the step's guard.
fn fail_the_last_copy(region: &Region, faults: &FaultDevice) -> (Transfer, MemoryError, Guard) {
    let count = {
        faults.clear_history();
        region.wake(WAIT).expect("a thread").wait(WAIT).expect("room");
        region.sleep(0.0, false, WAIT).expect("clean");
        faults.history().iter().filter(|call| call.verb == Verb::Copy).count() as u64
    };
    // The last copy fails, once a step runs beside the wake.
    let (release, stopped) = hold_copy(faults, count);
    faults.fail_nth_matching(count, |call| call.verb == Verb::Copy);
    let wake = region.wake(WAIT).expect("a thread");
    stopped.recv_timeout(WAIT).expect("the last copy");
    let (guard, _) = region.guard_in_order(WAIT).expect("room");
    drop(release);
    let error = wake.wait(WAIT).expect_err("injected");
    faults.heal();
    (wake, error, guard)
}

#[test]
fn a_copy_that_fails_under_a_step_leaves_what_came_and_says_so() {
    let (world, faults) = faulty(32);
    let bytes = noise(PAGES * PAGE, 5);
    let region = world.weights(PAGES, &bytes);
    let (wake, error, guard) = fail_the_last_copy(&region, &faults);
    assert_eq!(error.kind(), ErrorKind::Device, "{error}");
    wake.wait_host(at(0), ByteCount(PAGE), WAIT).expect("it came, and stays under the step");
    assert_eq!(read(&region, 0, 1), part(&bytes, 0, 1));
    let missed = wake.wait_host(at(PAGES - 1), ByteCount(PAGE), WAIT).expect_err("did not come");
    assert_eq!(missed.kind(), ErrorKind::Device, "{missed}");
    drop(guard);
    drop(region.guard(WAIT).expect("again"));
    assert_eq!(read(&region, 0, PAGES), bytes);
    world.check();
}

#[test]
fn a_wake_waits_for_what_steps_may_still_touch_of_one_that_failed() {
    let (world, faults) = faulty(32);
    let bytes = noise(PAGES * PAGE, 6);
    let region = world.weights(PAGES, &bytes);
    let (_, _, guard) = fail_the_last_copy(&region, &faults);
    // What the step queued runs on when it has ended.
    let engine = Stream::create(&world.device).expect("a stream");
    let (end, ended) = mpsc::channel::<()>();
    let kernel = move || {
        let _ = ended.recv_timeout(WAIT);
    };
    engine.launch_host((), kernel).expect("launched");
    drop(guard);
    let wake = region.wake(WAIT).expect("a thread");
    thread::sleep(Duration::from_millis(200));
    assert!(!wake.progress().is_finished, "the kernel runs: {:?}", wake.wait(Duration::ZERO));
    assert_eq!(wake.progress().done, ByteCount::ZERO);
    // Whoever has something to do that needs none of it is not kept waiting.
    let other = world.weights(1, &noise(PAGE, 7));
    other.wake(WAIT).expect("a thread").wait(WAIT).expect("room");
    drop(end);
    wake.wait(WAIT).expect("the memory is free");
    assert_eq!(read(&region, 0, PAGES), bytes);
    world.check();
}

#[test]
fn a_wake_does_not_wait_for_memory_that_the_device_refuses_to_unmap() {
    let (world, faults) = faulty(32);
    let bytes = noise(PAGES * PAGE, 8);
    let region = world.weights(PAGES, &bytes);
    region.wake(WAIT).expect("a thread").wait(WAIT).expect("room");
    faults.fail_all(Verb::Unmap, DeviceError::Injected { call: 0, verb: Verb::Unmap });
    let refused = region.sleep(0.0, false, WAIT).expect_err("refused");
    assert_eq!(refused.kind(), ErrorKind::Device, "{refused}");
    let start = Instant::now();
    let error = region.wake(WAIT).expect("a thread").wait(WAIT).expect_err("mapped still");
    assert!(matches!(error, MemoryError::StillMapped { .. }), "{error}");
    assert!(start.elapsed() < WAIT / 2, "to wait is no use");
    world.check();
    faults.heal();
    region.wake(WAIT).expect("a thread").wait(WAIT).expect("unmapped by now");
    assert_eq!(read(&region, 0, PAGES), bytes);
    world.check();
}

#[test]
fn a_wake_that_waits_for_its_lease_lets_no_step_in_and_evictions_go_on() {
    let world = world(16, 64);
    let other = world.weights(PAGES, &noise(PAGES * PAGE, 6));
    other.wake(WAIT).expect("a thread").wait(WAIT).expect("room");
    let region = world.weights(PAGES, &noise(PAGES * PAGE, 7));
    let start = Instant::now();
    let error = region.guard_in_order(WAIT).map(drop).expect_err("no room beside the other");
    assert_eq!(error.kind(), ErrorKind::Lease, "{error}");
    assert!(start.elapsed() < WAIT);
    other.sleep(0.0, false, WAIT).expect("not held up");
    let (guard, _) = region.guard_in_order(WAIT).expect("room");
    drop(guard);
    world.check();
}

#[test]
fn a_cancelled_wake_tells_those_who_wait_for_the_rest() {
    let (world, faults) = faulty(32);
    let region = world.weights(PAGES, &noise(PAGES * PAGE, 8));
    let (release, stopped) = hold_copy(&faults, 1);
    let wake = region.wake(WAIT).expect("a thread");
    stopped.recv_timeout(WAIT).expect("a copy");
    wake.cancel();
    let waiter = {
        let wake = wake.clone();
        thread::spawn(move || wake.wait_host(at(PAGES - 1), ByteCount(PAGE), WAIT))
    };
    drop(release);
    let error = waiter.join().expect("no panic").expect_err("cancelled");
    assert!(matches!(error, MemoryError::Cancelled { .. }), "{error}");
    assert!(wake.wait(WAIT).is_err());
    assert!(region.waking().is_none());
    world.check();
}
