//! One suite that every device must pass, the simulated one and a GPU alike.
//!
//! Apart because it is what [`Device`] means: a promise that is not tested here is none. Each case takes a
//! factory of fresh devices and panics with its reason, as a test does. The capacity of a device is never
//! filled (a GPU may be in use by others); cases take a few dozen MiB.

#![expect(clippy::missing_panics_doc, reason = "a panic is how a case says that the device failed it")]

use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::sync::{Arc, mpsc};
use std::thread;

use shoal_core::bytes::ByteCount;

use crate::device::{
    Device, ForeignStream, ForeignWork, HostBacking, RawEvent, RawFrame, RawStream, VirtAddr,
};
use crate::error::{DeviceError, ErrorKind};
use crate::owned::{Event, Frame, HostBuffer, Mapping, Reservation, Span, Stream};

/// Makes a fresh device object; called once or twice by a case.
pub type Factory<'a> = &'a dyn Fn() -> Arc<dyn Device>;

/// A named case.
pub type Case = (&'static str, fn(Factory<'_>));

const SOON: Duration = Duration::from_secs(30);
const NOT_NOW: Duration = Duration::from_millis(30);

/// All cases.
pub const CASES: &[Case] = &[
    ("describes_itself", describes_itself),
    ("addresses_stay_across_unmap_and_map", addresses_stay_across_unmap_and_map),
    ("frames_are_zeroed", frames_are_zeroed),
    ("handles_are_indivisible", handles_are_indivisible),
    ("wrong_arguments_change_nothing", wrong_arguments_change_nothing),
    ("unknown_handles_are_refused", unknown_handles_are_refused),
    ("double_map_is_refused", double_map_is_refused),
    ("capacity_is_respected", capacity_is_respected),
    ("freed_capacity_is_reusable", freed_capacity_is_reusable),
    ("copies_are_exact_both_ways", copies_are_exact_both_ways),
    ("a_stream_keeps_its_order", a_stream_keeps_its_order),
    ("events_complete_in_their_time", events_complete_in_their_time),
    ("all_work_can_be_marked", all_work_can_be_marked),
    ("streams_wait_for_one_another", streams_wait_for_one_another),
    ("streams_of_others_wait_for_ours", streams_of_others_wait_for_ours),
    ("hashes_equal_the_hosts", hashes_equal_the_hosts),
    ("jobs_hold_what_they_touch", jobs_hold_what_they_touch),
    ("host_buffers_refuse_races", host_buffers_refuse_races),
    ("a_panic_on_a_stream_is_recorded", a_panic_on_a_stream_is_recorded),
    ("any_order_of_dropping_is_safe", any_order_of_dropping_is_safe),
    ("devices_are_independent", devices_are_independent),
    ("many_threads", many_threads),
];

/// Runs every case. A panic names the case in the thread's output.
pub fn run(factory: impl Fn() -> Arc<dyn Device>) {
    for (name, case) in CASES {
        tracing::info!(name, "conformance");
        case(&factory);
    }
}

/// A reservation with one frame mapped at its begin.
fn mapped(device: &Arc<dyn Device>, bytes: ByteCount) -> (Arc<Reservation>, Arc<Mapping>) {
    let reservation = Reservation::new(device, bytes).expect("reserve");
    let frame = Frame::create(device, bytes).expect("create");
    let mapping = Mapping::new(&reservation, ByteCount::ZERO, frame).expect("map");
    (reservation, mapping)
}

fn buffer(device: &Arc<dyn Device>, content: &[u8]) -> Arc<HostBuffer> {
    let buffer = HostBuffer::allocate(device, ByteCount(content.len() as u64)).expect("host buffer");
    buffer.write(ByteCount::ZERO, content).expect("write");
    buffer
}

fn whole(buffer: &Arc<HostBuffer>) -> Span {
    Span::host(buffer, ByteCount::ZERO, buffer.bytes())
}

fn content(buffer: &HostBuffer) -> Vec<u8> {
    buffer.access(ByteCount::ZERO, buffer.bytes(), <[u8]>::to_vec).expect("read")
}

fn pattern(seed: u64, bytes: ByteCount) -> Vec<u8> {
    let mut state = seed | 1;
    let words = (0..bytes.0.div_ceil(8)).flat_map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state ^ (state >> 29)).to_le_bytes()
    });
    words.take(usize::try_from(bytes.0).expect("fits")).collect()
}

fn upload(stream: &Stream, bytes: &[u8], mapping: &Arc<Mapping>) {
    let source = buffer(stream.device(), bytes);
    stream.copy(whole(&source), Span::mapping(mapping)).expect("copy up");
    assert!(stream.synchronize(SOON).expect("synchronize"), "a copy took longer than {SOON:?}");
}

fn download(stream: &Stream, mapping: &Arc<Mapping>) -> Vec<u8> {
    let target = HostBuffer::allocate(stream.device(), mapping.bytes()).expect("host buffer");
    stream.copy(Span::mapping(mapping), whole(&target)).expect("copy down");
    assert!(stream.synchronize(SOON).expect("synchronize"), "a copy took longer than {SOON:?}");
    content(&target)
}

/// What this device object holds now.
fn used(device: &Arc<dyn Device>) -> ByteCount {
    device.memory().expect("memory").used_by_this_process
}

/// Stops a stream at a host function until the sender sends or is dropped.
fn hold(stream: &Stream) -> mpsc::Sender<()> {
    let (release, held) = mpsc::channel::<()>();
    let wait = move || {
        // Either answer ends the wait.
        let _ = held.recv_timeout(SOON);
    };
    stream.launch_host((), wait).expect("launch");
    release
}

/// The device says what it is, and its figures fit together.
pub fn describes_itself(factory: Factory<'_>) {
    let device = factory();
    let info = device.info();
    assert!(info.granularity.0.is_power_of_two(), "granularity {} is no power of two", info.granularity);
    assert!(!info.name.is_empty(), "no name");
    let memory = device.memory().expect("memory");
    assert_eq!(memory.total, info.capacity);
    assert!(memory.free <= memory.total && memory.used_by_this_process <= memory.total, "{memory:?}");
}

/// I3: an address stays the caller's through any number of maps and unmaps.
pub fn addresses_stay_across_unmap_and_map(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let stream = Stream::create(&device).expect("stream");
    let reservation = Reservation::new(&device, ByteCount(page.0 * 4)).expect("reserve");
    assert!(reservation.address().0.is_multiple_of(page.0), "a reservation is aligned to the granularity");
    let at = reservation.address().offset(page);
    for round in 0..4 {
        let frame = Frame::create(&device, page).expect("create");
        let mapping = Mapping::new(&reservation, page, frame).expect("map");
        assert_eq!(mapping.address(), at, "round {round}");
        let bytes = pattern(round, page);
        upload(&stream, &bytes, &mapping);
        assert!(download(&stream, &mapping) == bytes, "round {round}");
        drop(mapping);
        // Others may reserve meanwhile; none gets this address.
        let other = Reservation::new(&device, page).expect("reserve another");
        let range = reservation.address()..reservation.address().offset(reservation.bytes());
        assert!(!range.contains(&other.address()), "an address was given out twice");
    }
    // The bytes belong to the frame: mapped elsewhere, they are there.
    let frame = Frame::create(&device, page).expect("create");
    let mapping = Mapping::new(&reservation, ByteCount::ZERO, Arc::clone(&frame)).expect("map");
    let bytes = pattern(77, page);
    upload(&stream, &bytes, &mapping);
    drop(mapping);
    let mapping = Mapping::new(&reservation, ByteCount(page.0 * 3), frame).expect("map elsewhere");
    assert!(download(&stream, &mapping) == bytes, "the frame lost its bytes when it was unmapped");
}

/// I12: a frame never shows what was there before.
pub fn frames_are_zeroed(factory: Factory<'_>) {
    let device = factory();
    let bytes = ByteCount(device.info().granularity.0 * 2);
    let stream = Stream::create(&device).expect("stream");
    for round in 0..4 {
        let (_reservation, mapping) = mapped(&device, bytes);
        assert!(download(&stream, &mapping).iter().all(|byte| *byte == 0), "round {round}: not zeroed");
        upload(&stream, &pattern(round, bytes), &mapping);
    }
}

/// I4: what was mapped whole is unmapped whole.
pub fn handles_are_indivisible(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let stream = Stream::create(&device).expect("stream");
    let reservation = Reservation::new(&device, ByteCount(page.0 * 4)).expect("reserve");
    let frame = Frame::create(&device, ByteCount(page.0 * 2)).expect("create");
    let mapping = Mapping::new(&reservation, page, frame).expect("map");
    let bytes = pattern(5, mapping.bytes());
    upload(&stream, &bytes, &mapping);
    let at = mapping.address();
    let before = VirtAddr(at.0 - page.0);
    for (at, pages) in [(at, 1), (at.offset(page), 1), (at, 3), (before, 2), (before, 4)] {
        let refused = device.unmap(at, ByteCount(page.0 * pages));
        assert!(matches!(refused, Err(DeviceError::PartialMapping { .. })), "{at} {pages}: {refused:?}");
    }
    assert!(download(&stream, &mapping) == bytes, "a refused unmap changed something");
    drop(mapping);
    assert_eq!(device.take_errors(), []);
}

/// A refused call changes nothing.
pub fn wrong_arguments_change_nothing(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let held = used(&device);
    for wrong in [0, 1, page.0 - 1, page.0 + 1] {
        let wrong = ByteCount(wrong);
        let reserved = device.reserve(wrong);
        assert!(matches!(reserved, Err(DeviceError::Misaligned { .. })), "reserve {wrong}: {reserved:?}");
        let created = device.create_frame(wrong);
        assert!(matches!(created, Err(DeviceError::Misaligned { .. })), "create {wrong}: {created:?}");
    }
    assert!(matches!(
        device.allocate_host(ByteCount::ZERO, HostBacking::SmallPages),
        Err(DeviceError::Misaligned { .. })
    ));
    assert_eq!(used(&device), held);

    let reservation = Reservation::new(&device, ByteCount(page.0 * 2)).expect("reserve");
    let at = reservation.address();
    let frame = device.create_frame(page).expect("create");
    for wrong in [1, page.0 / 2] {
        let refused = device.map(VirtAddr(at.0 + wrong), frame);
        assert!(matches!(refused, Err(DeviceError::Misaligned { .. })), "{refused:?}");
    }
    for wrong in [VirtAddr(at.0 + page.0 * 2), VirtAddr(at.0.wrapping_sub(page.0))] {
        // A neighbour may belong to a reservation of the process's other objects, never to this test.
        let refused = device.map(wrong, frame);
        assert!(matches!(refused, Err(DeviceError::NotReserved { .. })), "{refused:?}");
    }
    let long = Frame::create(&device, ByteCount(page.0 * 2)).expect("create");
    let refused = Mapping::new(&reservation, page, Arc::clone(&long)).map(|_| ());
    assert!(matches!(refused, Err(DeviceError::OutOfRange { .. })), "{refused:?}");

    device.map(at, frame).expect("map after all the refusals");
    let busy = device.destroy_frame(frame);
    assert!(matches!(busy, Err(DeviceError::InUse { .. })), "destroyed a mapped frame: {busy:?}");
    let busy = device.release(at, reservation.bytes());
    assert!(matches!(busy, Err(DeviceError::InUse { .. })), "released with a mapping: {busy:?}");
    device.unmap(at, page).expect("unmap");
    device.destroy_frame(frame).expect("destroy");
    let refused = device.release(at, page);
    assert!(matches!(refused, Err(DeviceError::NotReserved { .. })), "released a part: {refused:?}");

    let mapping = Mapping::new(&reservation, ByteCount::ZERO, long).expect("map");
    let stream = Stream::create(&device).expect("stream");
    let small = buffer(&device, &[1, 2, 3]);
    let refused = stream.copy(whole(&small), Span::mapping(&mapping));
    assert!(matches!(refused, Err(DeviceError::LengthMismatch { .. })), "{refused:?}");
    for (offset, bytes) in [(0, 4), (3, 1), (u64::MAX, 2), (4, 0)] {
        let outside = Span::host(&small, ByteCount(offset), ByteCount(bytes));
        let target = Span::Device { mapping: Arc::clone(&mapping), offset: page, bytes: ByteCount(bytes) };
        let refused = stream.copy(outside, target);
        assert!(matches!(refused, Err(DeviceError::OutOfRange { .. })), "{offset} {bytes}: {refused:?}");
    }
    let outside =
        Span::Device { mapping: Arc::clone(&mapping), offset: mapping.bytes(), bytes: ByteCount(3) };
    let refused = stream.copy(whole(&small), outside);
    assert!(matches!(refused, Err(DeviceError::OutOfRange { .. })), "{refused:?}");
}

/// What was never given out, or is gone, is recognised.
pub fn unknown_handles_are_refused(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let reservation = Reservation::new(&device, page).expect("reserve");
    let at = reservation.address();
    let unknown = |answer: Result<(), DeviceError>| match answer {
        Err(DeviceError::UnknownHandle { device: id, .. }) => assert_eq!(id, device.info().id),
        other => panic!("taken for a live handle: {other:?}"),
    };
    let frame = device.create_frame(page).expect("create");
    device.destroy_frame(frame).expect("destroy");
    for frame in [frame, RawFrame(0), RawFrame(u64::MAX)] {
        unknown(device.destroy_frame(frame));
        unknown(device.map(at, frame));
    }
    assert!(matches!(device.unmap(at, page), Err(DeviceError::NotMapped { .. })));
    let event = device.create_event().expect("event");
    assert!(device.query_event(event).expect("query"), "an event never recorded is complete");
    device.destroy_event(event).expect("destroy event");
    let stream = device.create_stream().expect("stream");
    device.destroy_stream(stream).expect("destroy stream");
    for (stream, event) in [(stream, event), (RawStream(u64::MAX), RawEvent(u64::MAX))] {
        unknown(device.destroy_stream(stream));
        unknown(device.destroy_event(event));
        unknown(device.record(stream, event));
        unknown(device.stream_wait(stream, event));
        unknown(device.query_event(event).map(|_| ()));
        unknown(device.launch_host(stream, Box::new(|| ()), Box::new(())));
    }
}

/// One address, one mapping.
pub fn double_map_is_refused(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let stream = Stream::create(&device).expect("stream");
    let reservation = Reservation::new(&device, ByteCount(page.0 * 3)).expect("reserve");
    let first = Frame::create(&device, ByteCount(page.0 * 2)).expect("create");
    let mapping = Mapping::new(&reservation, ByteCount::ZERO, first).expect("map");
    let bytes = pattern(9, mapping.bytes());
    upload(&stream, &bytes, &mapping);
    for offset in [ByteCount::ZERO, page] {
        let second = Frame::create(&device, ByteCount(page.0 * 2)).expect("create");
        let refused = Mapping::new(&reservation, offset, second).map(|_| ());
        assert!(matches!(refused, Err(DeviceError::AlreadyMapped { .. })), "{refused:?}");
    }
    assert!(download(&stream, &mapping) == bytes, "a refused map changed something");
}

/// What does not fit is refused with figures, and only that is `OutOfMemory`.
pub fn capacity_is_respected(factory: Factory<'_>) {
    let device = factory();
    let info = device.info().clone();
    let held = used(&device);
    let requested = (info.capacity + info.granularity).round_up_to(info.granularity);
    match device.create_frame(requested) {
        Err(error @ DeviceError::OutOfMemory { device: id, requested: told, free, capacity }) => {
            assert_eq!((id, told, capacity), (info.id, requested, info.capacity));
            assert!(free < requested, "{free} free, and yet refused");
            assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        }
        other => panic!("{requested} of {}: {other:?}", info.capacity),
    }
    assert_eq!(used(&device), held, "a refused frame is charged");
}

/// What is destroyed can be taken again, for ever.
pub fn freed_capacity_is_reusable(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let held = used(&device);
    for _ in 0..64 {
        let frames: Vec<_> =
            [1, 4, 2].map(|n| Frame::create(&device, ByteCount(page.0 * n)).expect("create")).into();
        assert_eq!(used(&device), held + ByteCount(page.0 * 7));
        drop(frames);
        assert_eq!(used(&device), held);
    }
}

/// Every byte arrives, at odd offsets and lengths too, between all pairs of spaces.
pub fn copies_are_exact_both_ways(factory: Factory<'_>) {
    let device = factory();
    let bytes = ByteCount(device.info().granularity.0 * 4);
    let stream = Stream::create(&device).expect("stream");
    let (_first, first) = mapped(&device, bytes);
    let (_second, second) = mapped(&device, bytes);
    let mut expected = pattern(1, bytes);
    upload(&stream, &expected, &first);
    stream.copy(Span::mapping(&first), Span::mapping(&second)).expect("copy across");
    assert!(download(&stream, &second) == expected, "a copy inside the device");

    let patch = pattern(2, ByteCount(12_345));
    let small = buffer(&device, &patch);
    for offset in [1_u64, 4095, bytes.0 / 2 - 77, bytes.0 - 12_345] {
        let span = || Span::Device {
            mapping: Arc::clone(&second),
            offset: ByteCount(offset),
            bytes: ByteCount(12_345),
        };
        stream.copy(whole(&small), span()).expect("copy a part up");
        let back = HostBuffer::allocate(&device, ByteCount(12_345)).expect("host buffer");
        stream.copy(span(), whole(&back)).expect("copy a part down");
        assert!(stream.synchronize(SOON).expect("synchronize"));
        assert!(content(&back) == patch, "at {offset}");
        let offset = usize::try_from(offset).expect("fits");
        expected[offset..offset + patch.len()].copy_from_slice(&patch);
    }
    assert!(download(&stream, &second) == expected, "a copy of a part changed its neighbours");
    let empty = Span::host(&small, ByteCount::ZERO, ByteCount::ZERO);
    stream.copy(empty.clone(), empty).expect("an empty copy is one too");
}

/// Jobs of one stream happen in the order of their queueing.
pub fn a_stream_keeps_its_order(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let stream = Stream::create(&device).expect("stream");
    let (_reservation, mapping) = mapped(&device, page);
    let release = hold(&stream);
    let ran = Arc::new(AtomicU32::new(0));
    let targets: Vec<_> = (0..32_u32)
        .map(|i| {
            let source = buffer(&device, &pattern(u64::from(i), page));
            stream.copy(whole(&source), Span::mapping(&mapping)).expect("copy up");
            let seen = Arc::clone(&ran);
            let step = move || {
                assert_eq!(seen.fetch_add(1, Ordering::SeqCst), i, "a host function out of order");
            };
            stream.launch_host((), step).expect("launch");
            let target = HostBuffer::allocate(&device, page).expect("host buffer");
            stream.copy(Span::mapping(&mapping), whole(&target)).expect("copy down");
            target
        })
        .collect();
    assert_eq!(ran.load(Ordering::SeqCst), 0, "a job overtook the one before it");
    drop(release);
    assert!(stream.synchronize(SOON).expect("synchronize"));
    assert_eq!(ran.load(Ordering::SeqCst), 32);
    for (i, target) in targets.iter().enumerate() {
        assert!(content(target) == pattern(i as u64, page), "copy {i} out of order");
    }
    assert_eq!(device.take_errors(), []);
}

/// An event is complete when what was queued before it is done, not earlier, and may be recorded again.
pub fn events_complete_in_their_time(factory: Factory<'_>) {
    let device = factory();
    let stream = Stream::create(&device).expect("stream");
    let idle = stream.record().expect("record");
    assert!(idle.wait(SOON).expect("wait"), "an idle stream's event");
    let release = hold(&stream);
    let event = stream.record().expect("record");
    assert!(!event.is_complete().expect("query"));
    assert!(!event.wait(NOT_NOW).expect("wait"), "complete before its work");
    assert!(idle.is_complete().expect("query"), "a complete event stays so");
    drop(release);
    assert!(event.wait(SOON).expect("wait"));

    let (raw_stream, raw_event) =
        (device.create_stream().expect("stream"), device.create_event().expect("event"));
    device.record(raw_stream, raw_event).expect("record");
    assert!(device.wait_event(raw_event, SOON).expect("wait"));
    let (release, held) = mpsc::channel::<()>();
    let wait = move || {
        // Either answer ends the wait.
        let _ = held.recv_timeout(SOON);
    };
    device.launch_host(raw_stream, Box::new(wait), Box::new(())).expect("launch");
    device.record(raw_stream, raw_event).expect("record again");
    assert!(!device.query_event(raw_event).expect("query"), "stands for its first mark still");
    drop(release);
    assert!(device.wait_event(raw_event, SOON).expect("wait"));
    device.destroy_event(raw_event).expect("destroy event");
    device.destroy_stream(raw_stream).expect("destroy stream");
}

/// A mark of everybody's work stands behind what every stream has queued, and behind nothing later.
pub fn all_work_can_be_marked(factory: Factory<'_>) {
    let device = factory();
    let idle = Event::of_foreign(&device, ForeignWork::All).expect("record");
    assert!(idle.wait(SOON).expect("wait"), "nothing is queued");
    let streams = [(); 2].map(|()| Stream::create(&device).expect("stream"));
    let release = hold(&streams[1]);
    let all = Event::of_foreign(&device, ForeignWork::All).expect("record");
    assert!(!all.is_complete().expect("query") && !all.wait(NOT_NOW).expect("wait"), "a job still runs");
    drop(release);
    assert!(all.wait(SOON).expect("wait"), "the job has ended");
}

/// A stream of others does nothing before our event, or the device says that the caller has to wait itself.
pub fn streams_of_others_wait_for_ours(factory: Factory<'_>) {
    let device = factory();
    let stream = Stream::create(&device).expect("stream");
    let theirs = ForeignStream::DEFAULT;
    let release = hold(&stream);
    let ours = stream.record().expect("record");
    if ours.foreign_wait(theirs).expect("foreign_wait") {
        let after = Event::of_foreign(&device, ForeignWork::Of(theirs)).expect("record");
        assert!(!after.wait(NOT_NOW).expect("wait"), "did not wait for our stream");
        drop((release, ours));
        assert!(after.wait(SOON).expect("wait"));
    } else {
        assert!(!ours.is_complete().expect("query"), "said no although there was nothing to wait for");
    }
    let refused = device.foreign_wait(theirs, RawEvent(u64::MAX));
    assert!(matches!(refused, Err(DeviceError::UnknownHandle { .. })), "{refused:?}");
}

/// A stream that waits for another's event does nothing before it; the others go on.
pub fn streams_wait_for_one_another(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let streams: Vec<_> = (0..3).map(|_| Stream::create(&device).expect("stream")).collect();
    let (_reservation, mapping) = mapped(&device, page);
    let source = buffer(&device, &pattern(3, page));
    let target = HostBuffer::allocate(&device, page).expect("host buffer");
    let release = hold(&streams[0]);
    streams[0].copy(whole(&source), Span::mapping(&mapping)).expect("copy up");
    let uploaded = streams[0].record().expect("record");
    streams[1].wait_for(&uploaded).expect("wait_for");
    drop(uploaded);
    streams[1].copy(Span::mapping(&mapping), whole(&target)).expect("copy down");
    let done = streams[1].record().expect("record");
    assert!(!done.wait(NOT_NOW).expect("wait"), "did not wait for the other stream");
    assert!(streams[2].synchronize(SOON).expect("synchronize"), "a third stream waits too");
    drop(release);
    assert!(done.wait(SOON).expect("wait"));
    assert!(content(&target) == pattern(3, page));
}

/// One definition of the hash on both sides.
pub fn hashes_equal_the_hosts(factory: Factory<'_>) {
    let device = factory();
    let bytes = ByteCount(device.info().granularity.0 * 2);
    let stream = Stream::create(&device).expect("stream");
    let (_reservation, mapping) = mapped(&device, bytes);
    let zeroes = stream.hash(Span::mapping(&mapping)).expect("hash");
    let expected = pattern(11, bytes);
    let source = buffer(&device, &expected);
    stream.copy(whole(&source), Span::mapping(&mapping)).expect("copy up");
    let filled = stream.hash(Span::mapping(&mapping)).expect("hash");
    let of_host = stream.hash(whole(&source)).expect("hash of host memory");
    assert_eq!(filled.wait(SOON).expect("hash"), crate::hash_bytes(&expected));
    assert_eq!(of_host.wait(SOON).expect("hash"), crate::hash_bytes(&expected));
    let zero_bytes = vec![0; expected.len()];
    assert_eq!(zeroes.wait(SOON).expect("hash"), crate::hash_bytes(&zero_bytes), "hashed too late");
    for (offset, length) in [(1_usize, 0_usize), (0, 1), (13, 240), (7, 4097), (3, 65_537)] {
        let (part, bytes) = (ByteCount(offset as u64), ByteCount(length as u64));
        let span = Span::Device { mapping: Arc::clone(&mapping), offset: part, bytes };
        let ticket = stream.hash(span).expect("hash");
        let of_part = crate::hash_bytes(&expected[offset..offset + length]);
        assert_eq!(ticket.wait(SOON).expect("hash"), of_part, "{offset} {length}");
        assert_eq!(ticket.try_get().expect("hash"), Some(of_part));
    }
    let release = hold(&stream);
    let late = stream.hash(Span::mapping(&mapping)).expect("hash");
    assert_eq!(late.try_get().expect("hash"), None);
    assert!(matches!(late.wait(NOT_NOW), Err(DeviceError::Timeout { .. })));
    drop(release);
}

/// I5, as far as it is ours: a queued job's ends live until it has finished, and not longer.
pub fn jobs_hold_what_they_touch(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let held = used(&device);
    let stream = Stream::create(&device).expect("stream");
    let (reservation, mapping) = mapped(&device, page);
    let expected = pattern(4, page);
    let (source, target) =
        (buffer(&device, &expected), HostBuffer::allocate(&device, page).expect("host buffer"));
    let release = hold(&stream);
    stream.copy(whole(&source), Span::mapping(&mapping)).expect("copy up");
    stream.copy(Span::mapping(&mapping), whole(&target)).expect("copy down");
    let done = stream.record().expect("record");
    drop((source, mapping, reservation));
    assert_eq!(used(&device), held + page, "the frame went while jobs needed it");
    // Closing a stream drops nothing that is queued.
    drop(stream);
    drop(release);
    assert!(done.wait(SOON).expect("wait"));
    assert_eq!(used(&device), held, "a finished job still holds memory");
    assert!(content(&target) == expected);
    assert_eq!(device.take_errors(), []);
}

/// Host memory that a job or a thread is using is not given to another.
pub fn host_buffers_refuse_races(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let stream = Stream::create(&device).expect("stream");
    let (_reservation, mapping) = mapped(&device, page);
    let host = HostBuffer::allocate(&device, ByteCount(page.0 * 2)).expect("host buffer");
    let part = |offset| Span::host(&host, offset, page);
    let is_busy = |answer: Result<(), DeviceError>| {
        assert!(matches!(answer, Err(DeviceError::Busy { .. })), "{answer:?}");
    };
    let mut byte = [0];
    assert!(content(&host).iter().all(|byte| *byte == 0), "a host buffer starts zeroed");
    let release = hold(&stream);
    stream.copy(part(ByteCount::ZERO), Span::mapping(&mapping)).expect("copy up");
    host.read(ByteCount(1), &mut byte).expect("a job that reads admits readers");
    is_busy(host.write(ByteCount(page.0 - 1), &[1]));
    stream.copy(Span::mapping(&mapping), part(page)).expect("copy down");
    is_busy(host.read(page, &mut byte));
    stream.copy(part(page), Span::mapping(&mapping)).expect("jobs are ordered by their stream");
    drop(release);
    assert!(stream.synchronize(SOON).expect("synchronize"));
    host.write(ByteCount(page.0 - 1), &[1, 2]).expect("write when all is done");
    host.access_mut(ByteCount::ZERO, page, |_| {
        is_busy(stream.copy(part(ByteCount::ZERO), Span::mapping(&mapping)));
        stream.copy(part(page), Span::mapping(&mapping)).expect("the other half is free");
    })
    .expect("access");
    assert!(stream.synchronize(SOON).expect("synchronize"));
}

/// A host function that panics is somebody's bug; the stream goes on and the panic is told.
pub fn a_panic_on_a_stream_is_recorded(factory: Factory<'_>) {
    let device = factory();
    let stream = Stream::create(&device).expect("stream");
    stream.launch_host((), || panic!("on purpose")).expect("launch");
    assert!(stream.synchronize(SOON).expect("synchronize"));
    match device.take_errors().as_slice() {
        [DeviceError::HostFunctionPanicked { message, .. }] => assert_eq!(message, "on purpose"),
        other => panic!("{other:?}"),
    }
}

/// Children hold their parents, so any order will do.
pub fn any_order_of_dropping_is_safe(factory: Factory<'_>) {
    let page = factory().info().granularity;
    for order in 0..24_usize {
        let device = factory();
        let held = used(&device);
        let (reservation, mapping) = mapped(&device, page);
        let (frame, stream) = (Arc::clone(mapping.frame()), Stream::create(&device).expect("stream"));
        let mut parts: Vec<Box<dyn Send>> =
            vec![Box::new(reservation), Box::new(mapping), Box::new(frame), Box::new(stream)];
        let mut rest = order;
        for left in (1..=4).rev() {
            drop(parts.remove(rest % left));
            rest /= left;
        }
        assert_eq!(used(&device), held, "order {order}");
        assert_eq!(device.take_errors(), [], "order {order}");
    }
}

/// Two device objects share no handle and no address.
pub fn devices_are_independent(factory: Factory<'_>) {
    let (one, two) = (factory(), factory());
    let page = one.info().granularity;
    let (reservation, kept) = mapped(&one, page);
    let stream = Stream::create(&one).expect("stream");
    let expected = pattern(21, page);
    upload(&stream, &expected, &kept);
    let foreign = Frame::create(&two, page).expect("create");
    let refused = Mapping::new(&reservation, ByteCount::ZERO, foreign).map(|_| ());
    assert!(matches!(refused, Err(DeviceError::UnknownHandle { .. })), "{refused:?}");
    let refused = two.unmap(kept.address(), page);
    assert!(matches!(refused, Err(DeviceError::NotMapped { .. })), "{refused:?}");
    let refused = two.release(reservation.address(), page);
    assert!(matches!(refused, Err(DeviceError::NotReserved { .. })), "{refused:?}");
    let (_other, other) = mapped(&two, page);
    let refused = stream.copy(Span::mapping(&other), Span::mapping(&kept));
    assert!(matches!(refused, Err(DeviceError::UnknownHandle { .. })), "{refused:?}");
    assert!(download(&stream, &kept) == expected);
}

/// Every verb from many threads at once; nothing is left and nothing is mixed up.
pub fn many_threads(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let held = used(&device);
    let reservation = Reservation::new(&device, ByteCount(page.0 * 8)).expect("reserve");
    thread::scope(|scope| {
        for slot in 0..4_u64 {
            let (device, reservation) = (&device, &reservation);
            scope.spawn(move || {
                let stream = Stream::create(device).expect("stream");
                let host = HostBuffer::allocate(device, page).expect("host buffer");
                for round in 0..12_u64 {
                    let frame = Frame::create(device, page).expect("create");
                    let offset = ByteCount(page.0 * (slot * 2 + round % 2));
                    let mapping = Mapping::new(reservation, offset, frame).expect("map");
                    let expected = pattern(slot * 1000 + round, page);
                    host.write(ByteCount::ZERO, &expected).expect("write");
                    stream.copy(whole(&host), Span::mapping(&mapping)).expect("copy up");
                    let ticket = stream.hash(Span::mapping(&mapping)).expect("hash");
                    stream.copy(Span::mapping(&mapping), whole(&host)).expect("copy down");
                    drop(mapping);
                    assert!(stream.synchronize(SOON).expect("synchronize"));
                    assert_eq!(ticket.wait(SOON).expect("hash"), crate::hash_bytes(&expected));
                    assert!(content(&host) == expected, "slot {slot} round {round}");
                }
            });
        }
    });
    assert_eq!(used(&device), held);
    assert_eq!(device.take_errors(), []);
}
