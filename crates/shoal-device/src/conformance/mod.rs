//! One suite that every device must pass, the simulated one and a GPU alike.
//!
//! Apart because it is what [`Device`] means: a promise that is not tested here is none. Each case takes a
//! factory of fresh devices and panics with its reason, as a test does. The capacity of a device is never
//! filled (a GPU may be in use by others); cases take a few dozen MiB.

mod copies;
mod lists;
mod lives;
mod memory;
mod streams;

use core::time::Duration;
use std::sync::{Arc, mpsc};

use shoal_core::bytes::ByteCount;

use crate::device::Device;
use crate::owned::{Frame, HostBuffer, Mapping, Reservation, Span, Stream};

/// Makes a fresh device object; called once or twice by a case.
pub type Factory<'a> = &'a dyn Fn() -> Arc<dyn Device>;

/// A named case.
pub type Case = (&'static str, fn(Factory<'_>));

const SOON: Duration = Duration::from_secs(30);
const NOT_NOW: Duration = Duration::from_millis(30);

/// All cases.
pub const CASES: &[Case] = &[
    ("describes_itself", memory::describes_itself),
    ("addresses_stay_across_unmap_and_map", memory::addresses_stay_across_unmap_and_map),
    ("frames_are_zeroed", memory::frames_are_zeroed),
    ("handles_are_indivisible", memory::handles_are_indivisible),
    ("wrong_arguments_change_nothing", memory::wrong_arguments_change_nothing),
    ("unknown_handles_are_refused", memory::unknown_handles_are_refused),
    ("double_map_is_refused", memory::double_map_is_refused),
    ("capacity_is_respected", memory::capacity_is_respected),
    ("freed_capacity_is_reusable", memory::freed_capacity_is_reusable),
    ("copies_are_exact_both_ways", copies::copies_are_exact_both_ways),
    ("a_stream_keeps_its_order", streams::a_stream_keeps_its_order),
    ("events_complete_in_their_time", streams::events_complete_in_their_time),
    ("all_work_can_be_marked", streams::all_work_can_be_marked),
    ("streams_wait_for_one_another", streams::streams_wait_for_one_another),
    ("streams_of_others_wait_for_ours", streams::streams_of_others_wait_for_ours),
    ("used_frames_are_zeroed_in_order", copies::used_frames_are_zeroed_in_order),
    ("hashes_equal_the_hosts", copies::hashes_equal_the_hosts),
    ("jobs_hold_what_they_touch", copies::jobs_hold_what_they_touch),
    ("host_buffers_refuse_races", copies::host_buffers_refuse_races),
    ("lists_are_exact_for_every_size", lists::lists_are_exact_for_every_size),
    ("lists_may_hold_anything", lists::lists_may_hold_anything),
    ("lists_keep_the_streams_order", lists::lists_keep_the_streams_order),
    ("refused_lists_change_nothing", lists::refused_lists_change_nothing),
    ("lists_hold_what_they_touch", lists::lists_hold_what_they_touch),
    ("lists_of_many_threads", lists::lists_of_many_threads),
    ("a_panic_on_a_stream_is_recorded", streams::a_panic_on_a_stream_is_recorded),
    ("any_order_of_dropping_is_safe", lives::any_order_of_dropping_is_safe),
    ("devices_are_independent", lives::devices_are_independent),
    ("many_threads", lives::many_threads),
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
