//! The owned layer over the simulated device: lifetimes, fences that jobs bring themselves, errors of Drop.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;
use std::time::Duration;

use shoal_core::bytes::ByteCount;
use shoal_device::sim::LiveObjects;
use shoal_device::{
    Device, DeviceError, Frame, HostBacking, HostBuffer, HostSlab, Mapping, Reservation, SimDevice,
    SimOptions, Span, Stream, hash_bytes,
};

const MIB2: ByteCount = ByteCount::mib(2);
const SOON: Duration = Duration::from_secs(20);

fn open(dir: &tempfile::TempDir, capacity: ByteCount) -> (Arc<SimDevice>, Arc<dyn Device>) {
    let sim = SimDevice::open(SimOptions::new(capacity, dir.path())).unwrap();
    let device: Arc<dyn Device> = Arc::clone(&sim) as _;
    (sim, device)
}

#[test]
fn bytes_survive_a_trip_through_the_device_and_everything_goes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (sim, device) = open(&dir, ByteCount::mib(16));
    let reservation = Reservation::new(&device, ByteCount::mib(8)).unwrap();
    let frame = Frame::create(&device, ByteCount::mib(4)).unwrap();
    let mapping = Mapping::new(&reservation, MIB2, frame).unwrap();
    assert_eq!(mapping.address(), reservation.address().offset(MIB2));
    let buffer = HostBuffer::allocate(&device, ByteCount::mib(8)).unwrap();
    let pattern: Vec<u8> = (0..4 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    buffer.write(ByteCount::ZERO, &pattern).unwrap();
    let stream = Stream::create(&device).unwrap();
    let part = |offset| Span::host(&buffer, ByteCount::mib(offset), ByteCount::mib(4));
    stream.copy(part(0), Span::mapping(&mapping)).unwrap();
    let ticket = stream.hash(Span::mapping(&mapping)).unwrap();
    stream.copy(Span::mapping(&mapping), part(4)).unwrap();
    drop(mapping);
    let event = stream.record().unwrap();
    assert!(event.wait(SOON).unwrap());
    assert_eq!(ticket.wait(SOON).unwrap(), hash_bytes(&pattern));
    let mut back = vec![0; pattern.len()];
    buffer.read(ByteCount::mib(4), &mut back).unwrap();
    assert!(back == pattern);
    // The jobs held the last Arcs of the mapping; seen complete, they hold nothing.
    assert_eq!(device.memory().unwrap().free, ByteCount::mib(16));
    drop((reservation, buffer, event, ticket, stream));
    assert_eq!(sim.live_objects(), LiveObjects::default());
    assert_eq!(device.take_errors(), []);
}

#[test]
fn a_device_dropped_with_jobs_queued_lives_until_they_are_done() {
    let dir = tempfile::tempdir().unwrap();
    let (sim, device) = open(&dir, ByteCount::mib(16));
    let reservation = Reservation::new(&device, MIB2).unwrap();
    let mapping = Mapping::new(&reservation, ByteCount::ZERO, Frame::create(&device, MIB2).unwrap()).unwrap();
    let buffer = HostBuffer::allocate(&device, MIB2).unwrap();
    let stream = Stream::create(&device).unwrap();
    let (release, held) = std::sync::mpsc::channel::<()>();
    let wait = move || {
        // Either answer ends the wait.
        let _ = held.recv_timeout(SOON);
    };
    stream.launch_host((), wait).unwrap();
    stream.copy(Span::host(&buffer, ByteCount::ZERO, MIB2), Span::mapping(&mapping)).unwrap();
    let weak = Arc::downgrade(&sim);
    drop((stream, buffer, mapping, reservation, device, sim));
    assert_eq!(weak.upgrade().unwrap().live_objects().mappings, 1, "gone before its job");
    drop(release);
    // The last holder is the job; the device goes on the stream's own thread.
    let gone = (0..2000).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        weak.strong_count() == 0
    });
    assert!(gone, "the device outlived its last job");
    let (_, again) = open(&dir, ByteCount::mib(16));
    assert_eq!(again.memory().unwrap().free, ByteCount::mib(16));
}

#[test]
fn parts_of_a_slab_never_overlap_and_are_free_when_their_last_job_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = SimOptions::new(ByteCount::mib(16), dir.path());
    options.lock_limit = Some(ByteCount::mib(9));
    let sim = SimDevice::open(options).unwrap();
    let device: Arc<dyn Device> = Arc::clone(&sim) as _;
    let slab = HostSlab::allocate(&device, ByteCount::mib(8), HostBacking::HugePages).unwrap();
    assert!(!slab.is_locked());
    slab.lock().unwrap();
    assert!(slab.is_locked() && matches!(slab.lock(), Err(DeviceError::InUse { .. })));
    // Past the limit a buffer is there all the same, and says so.
    let over = HostBuffer::allocate(&device, MIB2).unwrap();
    assert!(!over.is_locked());
    over.write(ByteCount::ZERO, &[1, 2]).unwrap();

    let claim = Arc::new(());
    let part = slab.buffer(MIB2, MIB2, Arc::clone(&claim)).unwrap();
    for (offset, bytes) in [(1, 4), (2, 2), (3, 1), (2, 1), (0, 3), (0, 8)] {
        let refused = slab.buffer(ByteCount::mib(offset), ByteCount::mib(bytes), ()).map(|_| ());
        assert!(matches!(refused, Err(DeviceError::InUse { .. })), "{offset} {bytes}");
    }
    assert!(matches!(slab.buffer(ByteCount::mib(7), MIB2, ()), Err(DeviceError::OutOfRange { .. })));
    let (before, after) = (slab.buffer(ByteCount::ZERO, MIB2, ()), slab.buffer(ByteCount::mib(4), MIB2, ()));
    let (before, after) = (before.unwrap(), after.unwrap());
    part.access_mut(ByteCount::ZERO, MIB2, |bytes| bytes.fill(7)).unwrap();
    for neighbour in [before, after] {
        neighbour
            .access(ByteCount::ZERO, MIB2, |bytes| assert!(bytes.iter().all(|byte| *byte == 0)))
            .unwrap();
    }

    let stream = Stream::create(&device).unwrap();
    let (go, held) = std::sync::mpsc::channel::<()>();
    let wait = move || {
        let _ = held.recv_timeout(SOON);
    };
    stream.launch_host((), wait).unwrap();
    let reservation = Reservation::new(&device, MIB2).unwrap();
    let frame = Frame::create(&device, MIB2).unwrap();
    let mapping = Mapping::new(&reservation, ByteCount::ZERO, frame).unwrap();
    stream.copy(Span::host(&part, ByteCount::ZERO, MIB2), Span::mapping(&mapping)).unwrap();
    drop((part, slab, over));
    assert_eq!(Arc::strong_count(&claim), 2, "free before its job was done");
    assert_eq!(sim.live_objects().host_buffers, 1, "the slab went before its part");
    go.send(()).unwrap();
    assert!(stream.synchronize(SOON).unwrap());
    assert_eq!(Arc::strong_count(&claim), 1);
    assert_eq!(sim.live_objects().host_buffers, 0);
    assert_eq!(device.take_errors(), []);
}
