//! Cases of what moves and reads bytes: copies, hashes, and what they hold meanwhile.

use std::sync::Arc;

use shoal_core::bytes::ByteCount;

use super::{Factory, NOT_NOW, SOON, buffer, content, download, hold, mapped, pattern, upload, used, whole};
use crate::error::DeviceError;
use crate::owned::{HostBuffer, Span, Stream};

/// Every byte arrives, at odd offsets and lengths too, between all pairs of spaces.
pub(super) fn copies_are_exact_both_ways(factory: Factory<'_>) {
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

/// What was written is gone after a zeroing, in the stream's order, and the neighbours are as they were; the job holds
/// its mapping.
pub(super) fn used_frames_are_zeroed_in_order(factory: Factory<'_>) {
    let device = factory();
    let bytes = ByteCount(device.info().granularity.0 * 2);
    let stream = Stream::create(&device).expect("stream");
    let (addresses, first) = mapped(&device, bytes);
    let (_second, second) = mapped(&device, bytes);
    let (before, after) = (pattern(21, bytes), pattern(22, bytes));
    upload(&stream, &before, &first);
    upload(&stream, &before, &second);
    stream.zero(&first).expect("zero");
    assert!(download(&stream, &first).iter().all(|byte| *byte == 0), "bytes of before are left");
    assert!(download(&stream, &second) == before, "another mapping was zeroed");
    // Ordered: what is copied behind it stays.
    let source = buffer(&device, &after);
    let release = hold(&stream);
    stream.zero(&second).expect("zero");
    stream.copy(whole(&source), Span::mapping(&second)).expect("copy up");
    drop(release);
    assert!(download(&stream, &second) == after, "a zeroing came after what was queued behind it");
    let held = used(&device);
    let release = hold(&stream);
    stream.zero(&first).expect("zero");
    drop((first, addresses));
    assert_eq!(used(&device), held, "the frame went while a job needed it");
    drop(release);
    assert!(stream.synchronize(SOON).expect("synchronize"));
    assert_eq!(used(&device), held - bytes, "a finished job still holds memory");
}

/// One definition of the hash on both sides.
pub(super) fn hashes_equal_the_hosts(factory: Factory<'_>) {
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
pub(super) fn jobs_hold_what_they_touch(factory: Factory<'_>) {
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
pub(super) fn host_buffers_refuse_races(factory: Factory<'_>) {
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
