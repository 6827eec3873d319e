//! Cases of addresses, frames and mappings.

use std::sync::Arc;

use shoal_core::bytes::ByteCount;

use super::{Factory, buffer, download, mapped, pattern, upload, used, whole};
use crate::device::{HostBacking, RawEvent, RawFrame, RawStream, VirtAddr};
use crate::error::{DeviceError, ErrorKind};
use crate::owned::{Frame, Mapping, Reservation, Span, Stream};

/// The device says what it is, and its figures fit together.
pub(super) fn describes_itself(factory: Factory<'_>) {
    let device = factory();
    let info = device.info();
    assert!(info.granularity.0.is_power_of_two(), "granularity {} is no power of two", info.granularity);
    assert!(!info.name.is_empty(), "no name");
    let memory = device.memory().expect("memory");
    assert_eq!(memory.total, info.capacity);
    assert!(memory.free <= memory.total && memory.used_by_this_process <= memory.total, "{memory:?}");
}

/// I3: an address stays the caller's through any number of maps and unmaps.
pub(super) fn addresses_stay_across_unmap_and_map(factory: Factory<'_>) {
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
pub(super) fn frames_are_zeroed(factory: Factory<'_>) {
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
pub(super) fn handles_are_indivisible(factory: Factory<'_>) {
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
pub(super) fn wrong_arguments_change_nothing(factory: Factory<'_>) {
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
pub(super) fn unknown_handles_are_refused(factory: Factory<'_>) {
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
pub(super) fn double_map_is_refused(factory: Factory<'_>) {
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
pub(super) fn capacity_is_respected(factory: Factory<'_>) {
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
pub(super) fn freed_capacity_is_reusable(factory: Factory<'_>) {
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
