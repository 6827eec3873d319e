//! Cases of many copies in one job.

use std::sync::Arc;
use std::thread;

use shoal_core::bytes::ByteCount;

use super::{Factory, NOT_NOW, SOON, buffer, content, download, hold, mapped, pattern, upload, used, whole};
use crate::device::{Device, HostBacking};
use crate::error::DeviceError;
use crate::owned::{HostBuffer, HostSlab, Mapping, Span, Stream};

fn at(mapping: &Arc<Mapping>, offset: u64, bytes: u64) -> Span {
    Span::Device { mapping: Arc::clone(mapping), offset: ByteCount(offset), bytes: ByteCount(bytes) }
}

fn of(buffer: &Arc<HostBuffer>, offset: u64, bytes: u64) -> Span {
    Span::host(buffer, ByteCount(offset), ByteCount(bytes))
}

/// Numbers below `count`, each once, in an order without neighbours (`count` is a power of two).
fn shuffled(count: u64) -> impl Iterator<Item = u64> {
    (0..count).map(move |index| (index * 1_234_567 + 89) % count)
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("fits")
}

/// Host memory that nobody locked.
fn unlocked(device: &Arc<dyn Device>, bytes: ByteCount) -> Arc<HostBuffer> {
    let slab = HostSlab::allocate(device, bytes, HostBacking::SmallPages).expect("slab");
    slab.buffer(ByteCount::ZERO, bytes, ()).expect("buffer")
}

/// Every byte of every block arrives and none beside it, for blocks of each size, scattered on both sides.
pub(super) fn lists_are_exact_for_every_size(factory: Factory<'_>) {
    let device = factory();
    let stream = Stream::create(&device).expect("stream");
    let bytes = ByteCount(device.info().granularity.0 * 8);
    let (_reservation, mapping) = mapped(&device, bytes);
    let expected = pattern(31, bytes);
    let source = buffer(&device, &expected);
    let back = HostBuffer::allocate(&device, bytes).expect("host buffer");
    for block in [512_u64, 4096, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20] {
        // Short of a block by a little at its end, so that what lies between blocks can be seen.
        let (count, length) = ((bytes.0 / block).min(2048), block - 48);
        upload(&stream, &vec![0xEE; index(bytes.0)], &mapping);
        back.write(ByteCount::ZERO, &vec![0x77; index(bytes.0)]).expect("write");
        let places: Vec<(u64, u64)> = shuffled(count).zip(0..count).collect();
        let up: Vec<_> = places
            .iter()
            .map(|(one, other)| (of(&source, one * block, length), at(&mapping, other * block, length)))
            .collect();
        let down: Vec<_> = places
            .iter()
            .map(|(one, other)| (at(&mapping, other * block, length), of(&back, one * block, length)))
            .collect();
        stream.copy_many(&up).expect("copy up");
        stream.copy_many(&down).expect("copy down");
        assert!(stream.synchronize(SOON).expect("synchronize"));
        let mut on_device = vec![0xEE; index(bytes.0)];
        let mut in_host = vec![0x77; index(bytes.0)];
        for (one, other) in places {
            let (from, to) = (index(one * block), index(other * block));
            let part = &expected[from..from + index(length)];
            on_device[to..to + index(length)].copy_from_slice(part);
            in_host[from..from + index(length)].copy_from_slice(part);
        }
        assert!(download(&stream, &mapping) == on_device, "blocks of {block} on the device");
        assert!(content(&back) == in_host, "blocks of {block} in the host");
    }
    assert_eq!(device.take_errors(), []);
}

/// Odd lengths and places, memory that is not page-locked, every pair of spaces, all in one list.
pub(super) fn lists_may_hold_anything(factory: Factory<'_>) {
    let device = factory();
    let stream = Stream::create(&device).expect("stream");
    let bytes = ByteCount(device.info().granularity.0 * 2);
    let (_one, one) = mapped(&device, bytes);
    let (_two, two) = mapped(&device, bytes);
    let (expected, other) = (pattern(41, bytes), pattern(42, bytes));
    let (source, loose) = (buffer(&device, &expected), unlocked(&device, bytes));
    loose.write(ByteCount::ZERO, &other).expect("write");
    let (back, loose_back) =
        (HostBuffer::allocate(&device, bytes).expect("host buffer"), unlocked(&device, bytes));
    upload(&stream, &expected, &two);

    let (mut list, mut place) = (Vec::new(), 0_u64);
    let mut model = vec![0_u8; index(bytes.0)];
    let lengths = [0_u64, 1, 2, 3, 15, 16, 17, 31, 64, 511, 513, 4095, 4096, 4097, 5000];
    for (round, length) in lengths.into_iter().cycle().take(600).enumerate() {
        // Alike modulo 16 at both ends, and not.
        let (gap, skew) = (round as u64 % 7, (round as u64 % 3) * 5);
        let (from, to) = (place + gap + skew, place + gap);
        let is_loose = round % 4 == 0;
        let content = if is_loose { &other } else { &expected };
        let held = if is_loose { &loose } else { &source };
        list.push((of(held, from, length), at(&one, to, length)));
        model[index(to)..index(to + length)].copy_from_slice(&content[index(from)..index(from + length)]);
        place += length + 16;
    }
    let half = bytes.0 / 2;
    assert!(place < half, "the first half is for these");
    // Inside the device, inside the host, and down to both kinds of host memory.
    list.push((at(&two, 5, 100_000), at(&one, half + 3, 100_000)));
    model[index(half + 3)..index(half + 100_003)].copy_from_slice(&expected[5..100_005]);
    list.push((of(&source, 17, 5000), of(&back, half + 1, 5000)));
    for block in 0..200 {
        list.push((at(&two, block * 4096, 4000), of(&back, (199 - block) * 4096, 4000)));
    }
    list.push((at(&two, 3, 77_777), of(&loose_back, 1, 77_777)));
    stream.copy_many(&list).expect("copy all");
    stream.copy_many(&[]).expect("an empty list is one too");
    assert!(stream.synchronize(SOON).expect("synchronize"));

    assert!(download(&stream, &one) == model, "what came to the device");
    let came = content(&back);
    assert!(came[index(half + 1)..][..5000] == expected[17..5017], "inside the host");
    for block in 0..200 {
        let (from, to) = (block * 4096, (199 - block) * 4096);
        assert!(came[to..to + 4000] == expected[from..from + 4000], "block {block}");
        assert!(came[to + 4000..to + 4096].iter().all(|byte| *byte == 0), "beside block {block}");
    }
    assert!(content(&loose_back)[1..77_778] == expected[3..77_780], "down to unlocked memory");
    assert_eq!(device.take_errors(), []);
}

/// A list is done after what was queued before it and before what is queued later.
pub(super) fn lists_keep_the_streams_order(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let stream = Stream::create(&device).expect("stream");
    let (_reservation, mapping) = mapped(&device, page);
    let blocks = page.0 / 4096;
    let release = hold(&stream);
    let mut backs = Vec::new();
    for round in 0..6 {
        let source = buffer(&device, &pattern(round, page));
        let back = HostBuffer::allocate(&device, page).expect("host buffer");
        let pairs = shuffled(blocks).map(|block| block * 4096);
        if round % 2 == 0 {
            let up: Vec<_> =
                pairs.map(|place| (of(&source, place, 4096), at(&mapping, place, 4096))).collect();
            stream.copy_many(&up).expect("copy up");
            stream.copy(Span::mapping(&mapping), whole(&back)).expect("copy down");
        } else {
            stream.copy(whole(&source), Span::mapping(&mapping)).expect("copy up");
            let down: Vec<_> =
                pairs.map(|place| (at(&mapping, place, 4096), of(&back, place, 4096))).collect();
            stream.copy_many(&down).expect("copy down");
        }
        backs.push(back);
    }
    let done = stream.record().expect("record");
    assert!(!done.wait(NOT_NOW).expect("wait"), "a list overtook the job before it");
    drop(release);
    assert!(done.wait(SOON).expect("wait"));
    for (round, back) in backs.iter().enumerate() {
        assert!(content(back) == pattern(round as u64, page), "round {round}");
    }
}

/// A list that is refused has entered nothing as in use, copied nothing and holds nothing.
pub(super) fn refused_lists_change_nothing(factory: Factory<'_>) {
    let (device, other) = (factory(), factory());
    let page = device.info().granularity;
    let held = used(&device);
    let stream = Stream::create(&device).expect("stream");
    let (reservation, mapping) = mapped(&device, page);
    let (_foreign, foreign) = mapped(&other, page);
    let source = buffer(&device, &pattern(5, page));
    let good = || (of(&source, 0, 4096), at(&mapping, 0, 4096));
    let wrong_length = stream.copy_many(&[good(), (of(&source, 0, 5), at(&mapping, 4096, 6))]);
    assert!(matches!(wrong_length, Err(DeviceError::LengthMismatch { .. })), "{wrong_length:?}");
    for (offset, bytes) in [(page.0, 1), (page.0 - 1, 2), (u64::MAX, 2)] {
        let outside = stream.copy_many(&[good(), (of(&source, 0, bytes), at(&mapping, offset, bytes))]);
        assert!(matches!(outside, Err(DeviceError::OutOfRange { .. })), "{offset} {bytes}: {outside:?}");
    }
    let elsewhere = stream.copy_many(&[good(), (of(&source, 0, 16), at(&foreign, 0, 16))]);
    assert!(matches!(elsewhere, Err(DeviceError::UnknownHandle { .. })), "{elsewhere:?}");
    source
        .access_mut(ByteCount(8192), ByteCount(1), |_| {
            let busy = stream.copy_many(&[good(), (of(&source, 8000, 4096), at(&mapping, 8192, 4096))]);
            assert!(matches!(busy, Err(DeviceError::Busy { .. })), "{busy:?}");
        })
        .expect("access");
    source.access_mut(ByteCount::ZERO, page, |_| ()).expect("nothing is in use");
    assert!(download(&stream, &mapping).iter().all(|byte| *byte == 0), "something was copied");
    drop((mapping, reservation));
    assert_eq!(used(&device), held);
    assert_eq!(device.take_errors(), []);
}

/// I5, as far as it is ours: blocks of a list that waits are in use, what lies between them is not, and all of it lives
/// until the list is done and not longer.
pub(super) fn lists_hold_what_they_touch(factory: Factory<'_>) {
    let device = factory();
    let page = device.info().granularity;
    let held = used(&device);
    let stream = Stream::create(&device).expect("stream");
    let (reservation, mapping) = mapped(&device, page);
    let expected = pattern(6, page);
    let (source, back) =
        (buffer(&device, &expected), HostBuffer::allocate(&device, page).expect("host buffer"));
    let release = hold(&stream);
    let blocks = || (0..page.0 / 8192).map(|block| block * 8192);
    let up: Vec<_> = blocks().map(|place| (of(&source, place, 4096), at(&mapping, place, 4096))).collect();
    let down: Vec<_> = blocks().map(|place| (at(&mapping, place, 4096), of(&back, place, 4096))).collect();
    stream.copy_many(&up).expect("copy up");
    stream.copy_many(&down).expect("copy down");
    let done = stream.record().expect("record");
    let is_busy = |answer: Result<(), DeviceError>| {
        assert!(matches!(answer, Err(DeviceError::Busy { .. })), "{answer:?}");
    };
    is_busy(source.write(ByteCount(8192 + 4095), &[1]));
    is_busy(back.read(ByteCount(8192), &mut [0]));
    source.write(ByteCount(8192 + 4096), &[1]).expect("between the blocks");
    source.read(ByteCount(8192), &mut [0]).expect("a list that reads admits readers");
    drop((up, down, mapping, reservation));
    assert_eq!(used(&device), held + page, "the frame went while a list needed it");
    drop(stream);
    drop(release);
    assert!(done.wait(SOON).expect("wait"));
    assert_eq!(used(&device), held, "a finished list still holds memory");
    source.write(ByteCount::ZERO, &[1]).expect("nothing is in use");
    let came = content(&back);
    for place in blocks().map(index) {
        assert!(came[place..place + 4096] == expected[place..place + 4096], "{place}");
    }
    assert_eq!(device.take_errors(), []);
}

/// Long lists on several streams at once, both ways.
pub(super) fn lists_of_many_threads(factory: Factory<'_>) {
    let device = factory();
    let held = used(&device);
    let bytes = ByteCount(device.info().granularity.0 * 4);
    thread::scope(|scope| {
        for slot in 0..3_u64 {
            let device = &device;
            scope.spawn(move || {
                let (up, down) =
                    (Stream::create(device).expect("stream"), Stream::create(device).expect("stream"));
                let (_reservation, mapping) = mapped(device, bytes);
                let back = HostBuffer::allocate(device, bytes).expect("host buffer");
                let blocks = bytes.0 / 4096;
                for round in 0..3_u64 {
                    let expected = pattern(slot * 100 + round, bytes);
                    let source = buffer(device, &expected);
                    let there = shuffled(blocks).zip(0..blocks);
                    let there: Vec<_> = there
                        .map(|(one, other)| (of(&source, one * 4096, 4096), at(&mapping, other * 4096, 4096)))
                        .collect();
                    let here = shuffled(blocks).zip(0..blocks);
                    let here: Vec<_> = here
                        .map(|(one, other)| (at(&mapping, other * 4096, 4096), of(&back, one * 4096, 4096)))
                        .collect();
                    // The next round's list waits for this one's way back.
                    up.copy_many(&there).expect("copy up");
                    down.wait_for(&up.record().expect("record")).expect("wait_for");
                    down.copy_many(&here).expect("copy down");
                    let done = down.record().expect("record");
                    up.wait_for(&done).expect("wait_for");
                    // The loads too have ended then, not only finished.
                    assert!(done.wait(SOON).expect("wait") && up.synchronize(SOON).expect("synchronize"));
                    assert!(content(&back) == expected, "slot {slot} round {round}");
                }
            });
        }
    });
    assert_eq!(used(&device), held);
    assert_eq!(device.take_errors(), []);
}
