//! torch's segments on a simulated device: where they lie, when their memory goes, what a shortage does.

mod common;

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use common::{PAGE, WAIT, World, noise, until, world};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_device::{Stream, VirtAddr};
use shoal_memory::{Backing, ErrorKind, Segments};

fn growing(world: &World, name: &str) -> Arc<Segments> {
    Segments::new(&world.manager, name.to_owned(), LeaseKind::Weights, Backing::Keep).expect("addresses")
}

fn offset(segments: &Segments, at: VirtAddr) -> ByteCount {
    ByteCount(at.0 - segments.region().address())
}

fn take(segments: &Segments, mib: u64) -> VirtAddr {
    let at = segments.allocate(ByteCount::mib(mib), None).expect("room");
    segments.check_invariants().expect("invariants");
    at
}

#[test]
fn giving_back_waits_for_nothing_and_the_memory_comes_back_by_itself() {
    let world = world(64, 64);
    let segments = growing(&world, "weights");
    let other = world.weights(4, &noise(4 * PAGE, 1));
    let stream = Stream::create(&world.device).expect("a stream of torch's");
    let taken: Vec<_> = (0..8).map(|_| take(&segments, 2)).collect();
    let (release, held) = mpsc::channel::<()>();
    stream.launch_host((), move || held.recv_timeout(WAIT).unwrap_or(())).expect("queued");
    // An operation that waits for the same kernel has the turn or waits for it.
    let sleeper = thread::spawn(move || other.sleep(0.0, false, WAIT));
    let start = Instant::now();
    for at in taken {
        segments.free(at, None).expect("a segment");
    }
    // An operation waits for its turn for 10 s, and the kernel is there for longer.
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(segments.is_empty(), "torch has none of them");
    assert_eq!(segments.usage().retired, ByteCount::mib(16));
    assert!(world.device_used() >= ByteCount::mib(16), "still used (I5)");
    drop(release);
    until("nobody asks, and yet it is freed", || world.device_used().is_zero());
    sleeper.join().expect("no panic").expect("asleep");
    world.check();
}

#[test]
fn what_is_frozen_keeps_little_that_nothing_lives_in() {
    let world = world(512, 64);
    let segments = growing(&world, "weights");
    let (mut live, mut dead) = (ByteCount::ZERO, Vec::new());
    for turn in 0..40 {
        let mib = [2, 20, 6, 14][turn % 4];
        let at = take(&segments, mib);
        if turn % 5 == 4 {
            dead.push(at);
        } else {
            live += ByteCount::mib(mib);
        }
    }
    segments.freeze(&dead, WAIT).expect("frozen");
    let committed = segments.usage().committed;
    // Four stretches died, and an extent is never cut.
    assert!(committed <= live + ByteCount::mib(128), "{committed} for {live}");
    world.check();
}

#[test]
fn segments_lie_one_after_another_and_outlive_a_sleep() {
    let world = world(64, 128);
    let segments = growing(&world, "weights");
    let all: Vec<_> = [2, 6, 20].map(|mib| take(&segments, mib)).into();
    assert_eq!(all[1].0, all[0].0 + 2 * 1024 * 1024);
    assert_eq!(all[2].0, all[1].0 + 6 * 1024 * 1024);
    let bytes = noise(20 * 1024 * 1024, 7);
    segments.region().write(offset(&segments, all[2]), &bytes).expect("on the device");
    assert!(world.device_used() <= ByteCount::mib(28 + 4), "{} for 28 MiB", world.device_used());
    segments.freeze(&[], WAIT).expect("frozen");
    assert_eq!(world.device_used(), ByteCount::mib(28), "what was committed ahead went back");
    for _ in 0..3 {
        segments.region().sleep(0.0, false, WAIT).expect("asleep");
        assert_eq!(world.device_used(), ByteCount::ZERO);
        let refused = segments.allocate(ByteCount::mib(2), None).expect_err("asleep");
        assert_eq!(refused.kind(), ErrorKind::Region);
        segments.region().wake(WAIT).expect("begun").wait(WAIT).expect("awake");
        let mut read = vec![0; bytes.len()];
        segments.region().read(offset(&segments, all[2]), &mut read).expect("there");
        assert!(read == bytes, "the same bytes");
    }
    world.check();
    for at in all {
        segments.free(at, None).expect("a segment");
    }
    assert!(segments.is_empty());
    until("its memory comes back by itself", || world.device_used().is_zero());
    world.check();
}

#[test]
fn a_segment_is_used_again_only_after_its_fence() {
    let world = world(64, 64);
    let segments = growing(&world, "weights");
    let stream = Stream::create(&world.device).expect("a stream of torch's");
    let first = take(&segments, 4);
    let (release, held) = mpsc::channel::<()>();
    stream.launch_host((), move || held.recv_timeout(WAIT).unwrap_or(())).expect("queued");
    segments.free(first, None).expect("a segment");
    assert_eq!(segments.usage().retired, ByteCount::mib(4), "its work still runs");
    assert!(world.device_used() >= ByteCount::mib(4), "and its memory is still there (I5)");
    assert!(segments.free(first, None).is_err(), "freed twice (I7)");
    let second = take(&segments, 4);
    assert_ne!(first, second);
    drop(release);
    assert!(stream.synchronize(WAIT).expect("asked"));
    let start = Instant::now();
    while !segments.usage().retired.is_zero() {
        assert!(start.elapsed() < WAIT, "its work has ended");
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(take(&segments, 4), first, "the hole is filled first");
    assert!(segments.free(VirtAddr(first.0 + PAGE), None).is_err(), "no segment starts there");
    world.check();
}

#[test]
fn a_shortage_takes_from_frozen_regions_and_else_says_no() {
    let world = world(32, 64);
    let old = growing(&world, "old");
    let kept = take(&old, 20);
    let bytes = noise(20 * 1024 * 1024, 3);
    old.region().write(offset(&old, kept), &bytes).expect("there");
    let new = growing(&world, "new");
    let refused = new.allocate(ByteCount::mib(20), None).expect_err("nobody yields");
    assert_eq!(refused.kind(), ErrorKind::Lease);
    assert!(new.last_error().is_some() && new.usage().refusals == 1);
    old.freeze(&[], WAIT).expect("frozen");
    {
        let _step = world.manager.guard(WAIT).expect("all is there");
        assert!(
            new.allocate(ByteCount::mib(20), None).is_err(),
            "a step runs: nothing is taken from under it (I13)"
        );
    }
    take(&new, 20);
    assert!(!old.region().missing_bytes().is_zero());
    world.check();
    assert!(new.allocate(ByteCount::mib(64), None).is_err(), "more than the device has");
    new.check_invariants().expect("as before");
    new.free(VirtAddr(new.region().address()), None).expect("a segment");
    old.region().wake(WAIT).expect("begun").wait(WAIT).expect("awake");
    let mut read = vec![0; bytes.len()];
    old.region().read(offset(&old, kept), &mut read).expect("there");
    assert!(read == bytes);
    world.check();
}

#[test]
fn freezing_drops_what_nothing_lives_in_and_takes_in_what_comes_later() {
    let world = world(64, 64);
    let segments = growing(&world, "weights");
    let (dead, live) = (take(&segments, 20), take(&segments, 2));
    let report = segments.freeze(&[dead], WAIT).expect("frozen");
    assert_eq!(report.sealed().bytes, ByteCount::mib(2));
    assert_eq!((segments.usage().dropped, world.device_used()), (ByteCount::mib(20), ByteCount::mib(2)));
    let later = take(&segments, 4);
    assert!(later.0 >= live.0, "torch still has the dropped addresses in its books");
    assert_eq!(segments.freeze(&[], WAIT).expect("again").sealed().bytes, ByteCount::mib(4));
    assert_eq!(segments.freeze(&[], WAIT).expect("and again").sealed().bytes, ByteCount::ZERO);
    segments.free(dead, None).expect("torch lets go of it at last");
    until("its addresses come back", || segments.usage().retired.is_zero());
    assert_eq!(take(&segments, 20), dead);
    world.check();
}

#[test]
fn who_fills_a_region_keeps_it_awake() {
    let world = world(64, 64);
    let segments = growing(&world, "weights");
    take(&segments, 2);
    let using = segments.region().begin_use(WAIT).expect("awake");
    assert_eq!(segments.region().sleep(0.0, false, WAIT).expect_err("in use").kind(), ErrorKind::Region);
    drop(using);
    segments.region().sleep(0.0, false, WAIT).expect("asleep");
    assert_eq!(segments.region().begin_use(WAIT).expect_err("asleep").kind(), ErrorKind::Region);
}

#[test]
fn what_is_discarded_loses_its_memory_and_keeps_its_addresses_until_torch_gives_it_back() {
    let world = world(64, 64);
    let segments = growing(&world, "weights");
    let (dead, live) = (take(&segments, 8), take(&segments, 8));
    segments.discard(&[dead, VirtAddr(live.0 + PAGE), VirtAddr(1)]);
    until("its memory goes", || segments.usage().dropped == ByteCount::mib(8));
    until("and the device has it back", || world.device_used() <= ByteCount::mib(8));
    assert_eq!(segments.usage().segments, 2, "torch has both in its books");
    assert_ne!(take(&segments, 8), dead, "its addresses are taken");
    segments.discard(&[dead]);
    segments.free(dead, None).expect("torch gives it back");
    segments.free(dead, None).expect_err("once");
    until("its addresses are free", || segments.usage().retired.is_zero());
    assert_eq!(take(&segments, 8), dead);
    segments.check_invariants().expect("what came later at its addresses has memory");
    world.check();
}

#[test]
fn freezing_takes_in_nothing_that_another_thread_is_freeing() {
    let world = world(64, 64);
    let segments = growing(&world, "weights");
    for turn in 0..1200 {
        let dead = take(&segments, 2);
        // A thread frees it, and is at some point of that when the freeze begins.
        segments.discard(&[dead]);
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(turn / 4) {}
        segments.freeze(&[], WAIT).expect("awake");
        assert_eq!(segments.region().usage().total, ByteCount::ZERO, "turn {turn}");
        segments.free(dead, None).expect("torch gives it back");
    }
    world.check();
}
