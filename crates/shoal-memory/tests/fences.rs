//! Nothing is copied down or unmapped while what steps have queued still runs (I5, I13): leaving a guard says that the
//! calls have ended, not the kernels. The kernels here begin with a slow host function on a stream of the engine's own.

mod common;

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::{PAGE, WAIT, World, noise, world};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_device::device::DeviceKind;
use shoal_device::{Device, ForeignStream, HostBuffer, Stream};
use shoal_memory::region::BlockCopy;
use shoal_memory::{KvBacking, MemoryError, Region};

const ALL: ByteCount = ByteCount(u64::MAX);
const SLOW: Duration = Duration::from_millis(150);

/// What stands for a kernel that writes to a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    /// A slow host function, then a copy that waits for it. It holds the memory that it writes to.
    Copy,
    /// A slow host function that writes by itself and holds nothing, as a kernel does. Not on a GPU, whose driver forbids
    /// calls of it in a host function.
    HostFunction,
}

impl Kernel {
    fn of(device: &Arc<dyn Device>) -> Vec<Self> {
        match device.info().kind {
            DeviceKind::Sim => vec![Self::Copy, Self::HostFunction],
            _ => vec![Self::Copy],
        }
    }
}

/// Queues a slow kernel that writes `bytes` at the region's start, inside a guard that ends before it does.
fn step(world: &World, stream: &Stream, kernel: Kernel, region: &Region, bytes: Vec<u8>) {
    let guard = world.manager.guard(WAIT).expect("in");
    match kernel {
        Kernel::Copy => {
            let length = ByteCount(bytes.len() as u64);
            let host = HostBuffer::allocate(&world.device, length).expect("host memory");
            host.write(ByteCount::ZERO, &bytes).expect("not in use");
            stream.launch_host((), || thread::sleep(SLOW)).expect("launched");
            let after = stream.record().expect("marked");
            let (offset, host_offset) = (ByteCount::ZERO, ByteCount::ZERO);
            let block = BlockCopy { offset, bytes: length, host, host_offset };
            drop(region.load_blocks(&[block], Some(&after)).expect("queued"));
        }
        Kernel::HostFunction => {
            let region = region.clone();
            let kernel = move || {
                thread::sleep(SLOW);
                region.write(ByteCount::ZERO, &bytes).expect("mapped while the kernel runs");
            };
            stream.launch_host((), kernel).expect("launched");
        }
    }
    drop(guard);
}

#[test]
fn an_eviction_right_after_a_step_waits_for_its_kernels() {
    let world = world(64, 64);
    let engine = Stream::create(&world.device).expect("a stream");
    let bytes = noise(6 * PAGE, 1);
    let weights = world.weights(6, &bytes);
    let kv = world.region("kv", 4, LeaseKind::Kv);
    kv.commit(ByteCount::ZERO, ByteCount(4 * PAGE)).expect("room");
    for (seed, kernel) in
        (2..5).flat_map(|seed| Kernel::of(&world.device).into_iter().map(move |k| (seed, k)))
    {
        let written = noise(3 * PAGE, seed + 10 * (kernel as u64));
        for region in [&weights, &kv] {
            step(&world, &engine, kernel, region, written.clone());
            match seed {
                2 => drop(region.evict(ALL, WAIT).expect("evicted")),
                3 => drop(region.sleep(0.0, false, WAIT).expect("asleep")),
                _ => drop(world.manager.reclaim(ALL, WAIT, "a test").expect("reclaimed")),
            }
            let _guard = world.manager.guard(WAIT).expect("in");
            let mut read = vec![0; written.len()];
            region.read(ByteCount::ZERO, &mut read).expect("there");
            assert!(read == written, "what the kernel wrote was lost: {kernel:?}");
        }
    }
    world.check();
    assert_eq!(world.device.take_errors(), []);
}

#[test]
fn an_eviction_that_kernels_outlast_changes_nothing() {
    let world = world(64, 64);
    let engine = Stream::create(&world.device).expect("a stream");
    let weights = world.weights(4, &noise(4 * PAGE, 1));
    drop(weights.wake(WAIT).expect("begun").wait(WAIT).expect("awake"));
    let (release, held) = mpsc::channel::<()>();
    let kernel = move || {
        // Either answer ends the wait.
        let _ = held.recv_timeout(WAIT);
    };
    engine.launch_host((), kernel).expect("launched");
    let late = weights.sleep(0.0, false, Duration::from_millis(30)).expect_err("the kernel runs");
    assert!(matches!(late, MemoryError::Deadline { doing: "waiting for running kernels", .. }), "{late}");
    assert_eq!(weights.missing_bytes(), ByteCount::ZERO);
    drop(release);
    assert_eq!(weights.sleep(0.0, false, WAIT).expect("asleep").freed, ByteCount(4 * PAGE));
    world.check();
}

#[test]
fn a_region_that_was_told_of_its_streams_waits_for_these_alone() {
    let world = world(64, 64);
    let theirs = Stream::create(&world.device).expect("a stream");
    let weights = world.weights(4, &noise(4 * PAGE, 1));
    let other = world.weights(2, &noise(2 * PAGE, 2));
    drop(weights.wake(WAIT).expect("begun").wait(WAIT).expect("awake"));
    drop(other.wake(WAIT).expect("begun").wait(WAIT).expect("awake"));
    let (release, held) = mpsc::channel::<()>();
    theirs.launch_host((), move || held.recv_timeout(WAIT).unwrap_or(())).expect("launched");
    let short = Duration::from_millis(30);
    weights.sleep(0.0, false, short).expect_err("by default it waits for all");
    weights.record_use(ForeignStream::DEFAULT);
    assert_eq!(weights.sleep(0.0, false, WAIT).expect("asleep").freed, ByteCount(4 * PAGE));
    other.sleep(0.0, false, short).expect_err("nobody vouched for the other region");
    world.manager.swap(&other, &weights, false, short).expect_err("nor for both");
    drop(weights.wake(WAIT).expect("begun").wait(WAIT).expect("awake"));
    world.manager.reclaim(ALL, short, "a test").expect_err("of all regions: all work");
    drop(release);
    world.manager.reclaim(ALL, WAIT, "a test").expect("reclaimed");
    world.check();
}

#[test]
fn memory_of_blocks_and_regions_that_are_gone_outlives_the_kernels_on_it() {
    let world = world(64, 64);
    let engine = Stream::create(&world.device).expect("a stream");
    let kv = world.region("kv", 8, LeaseKind::Kv);
    let backing = KvBacking::new(&kv, ByteCount(PAGE), 8).expect("a layout");
    for kernel in Kernel::of(&world.device) {
        assert!(backing.back(&[0, 1, 2]).expect("asked"));
        let start = Instant::now();
        step(&world, &engine, kernel, &kv, noise(PAGE, 2));
        backing.unback(&[0, 1, 2]).expect("backed");
        assert_eq!(backing.trim(ALL).expect("trimmed").freed, ByteCount(3 * PAGE));
        assert!(start.elapsed() >= SLOW, "it did not wait");
    }

    let dropped = world.region("dropped", 2, LeaseKind::Overhead);
    dropped.commit(ByteCount::ZERO, ByteCount(2 * PAGE)).expect("room");
    let (address, bytes) = (dropped.address(), noise(PAGE, 3));
    let guard = world.manager.guard(WAIT).expect("in");
    let other = world.region("other", 2, LeaseKind::Overhead);
    other.commit(ByteCount::ZERO, ByteCount(PAGE)).expect("room");
    // While a step runs, what is dropped is kept.
    drop(other);
    assert_eq!(world.device_used(), ByteCount(3 * PAGE));
    let (sender, receiver) = mpsc::channel();
    let kernel = move || {
        thread::sleep(SLOW);
        sender.send(address ^ bytes.len() as u64).expect("waited for");
    };
    engine.launch_host((), kernel).expect("launched");
    drop(guard);
    drop(dropped);
    assert!(receiver.try_recv().is_ok(), "freed before the kernel had ended");
    drop(world.manager.reclaim(ALL, WAIT, "a test").expect("reclaimed"));
    assert_eq!(world.device_used(), ByteCount::ZERO);
    world.check();
}
