//! Cases of the order of things: streams, events, waits.

use core::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};

use super::{Factory, NOT_NOW, SOON, buffer, content, hold, mapped, pattern, whole};
use crate::device::{ForeignStream, ForeignWork, RawEvent};
use crate::error::DeviceError;
use crate::owned::{Event, HostBuffer, Span, Stream};

/// Jobs of one stream happen in the order of their queueing.
pub(super) fn a_stream_keeps_its_order(factory: Factory<'_>) {
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
pub(super) fn events_complete_in_their_time(factory: Factory<'_>) {
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
pub(super) fn all_work_can_be_marked(factory: Factory<'_>) {
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
pub(super) fn streams_of_others_wait_for_ours(factory: Factory<'_>) {
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
pub(super) fn streams_wait_for_one_another(factory: Factory<'_>) {
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

/// A host function that panics is somebody's bug; the stream goes on and the panic is told.
pub(super) fn a_panic_on_a_stream_is_recorded(factory: Factory<'_>) {
    let device = factory();
    let stream = Stream::create(&device).expect("stream");
    stream.launch_host((), || panic!("on purpose")).expect("launch");
    assert!(stream.synchronize(SOON).expect("synchronize"));
    match device.take_errors().as_slice() {
        [DeviceError::HostFunctionPanicked { message, .. }] => assert_eq!(message, "on purpose"),
        other => panic!("{other:?}"),
    }
}
