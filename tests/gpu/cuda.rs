//! The CUDA device on a real GPU: the suite of every device, and what only a GPU can show.
//!
//! Without a usable GPU each test says why and passes; with `SHOAL_REQUIRE_GPU=1` it fails instead. Run by
//! `tests/gpu/run.sh conformance`, or `cargo test -p shoal-device --features cuda --test cuda`.

#![expect(clippy::unwrap_used, reason = "a test")]

mod lists;

use std::env;
use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_device::conformance::{CASES, Case};
use shoal_device::cuda::device_count;
use shoal_device::sim::LiveObjects;
use shoal_device::{
    CudaDevice, Device, DeviceError, ErrorKind, Event, FaultDevice, Frame, HostBuffer, Mapping, Reservation,
    Span, Stream, hash_bytes,
};

const SOON: Duration = Duration::from_secs(30);
const MIB2: ByteCount = ByteCount::mib(2);

/// The GPU, or why there is none (then the test is over).
fn gpu() -> Option<Arc<CudaDevice>> {
    match CudaDevice::open(0) {
        Ok(device) => Some(device),
        Err(error) if env::var_os("SHOAL_REQUIRE_GPU").is_none_or(|value| value != "1") => {
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("SHOAL_REQUIRE_GPU=1: {error}"),
    }
}

fn as_dyn(device: &Arc<CudaDevice>) -> Arc<dyn Device> {
    Arc::clone(device) as _
}

fn mapped(device: &Arc<dyn Device>, bytes: ByteCount) -> Arc<Mapping> {
    let reservation = Reservation::new(device, bytes).unwrap();
    Mapping::new(&reservation, ByteCount::ZERO, Frame::create(device, bytes).unwrap()).unwrap()
}

fn pattern(seed: u64, bytes: ByteCount) -> Vec<u8> {
    let mut state = seed | 1;
    let words = (0..bytes.0.div_ceil(8)).flat_map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state ^ (state >> 29)).to_le_bytes()
    });
    words.take(usize::try_from(bytes.0).unwrap()).collect()
}

fn host(device: &Arc<dyn Device>, bytes: &[u8]) -> Arc<HostBuffer> {
    let buffer = HostBuffer::allocate(device, ByteCount(bytes.len() as u64)).unwrap();
    buffer.write(ByteCount::ZERO, bytes).unwrap();
    buffer
}

fn whole(buffer: &Arc<HostBuffer>) -> Span {
    Span::host(buffer, ByteCount::ZERO, buffer.bytes())
}

/// Objects may be held by jobs of closed streams for a moment.
fn settle(device: &CudaDevice) -> LiveObjects {
    let until = Instant::now() + Duration::from_secs(5);
    while device.live_objects() != LiveObjects::default() && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
    }
    device.live_objects()
}

/// Runs the suite's cases whose name `choose` takes, each on fresh device objects.
fn conform(choose: impl Fn(&str) -> bool, open: impl Fn(Arc<dyn Device>) -> Arc<dyn Device>) {
    if gpu().is_none() {
        return;
    }
    let chosen: Vec<&Case> = CASES.iter().filter(|(name, _)| choose(name)).collect();
    assert!(!chosen.is_empty());
    for (name, case) in chosen {
        let start = Instant::now();
        case(&|| open(CudaDevice::open_dyn(0).unwrap()));
        eprintln!("case {name} passed in {:?}", start.elapsed());
    }
}

#[test]
fn the_cuda_device_conforms() {
    conform(|_| true, |device| device);
}

#[test]
fn behind_the_fault_wrapper_it_conforms_too() {
    conform(|_| true, |device| FaultDevice::new(device) as _);
}

#[test]
fn without_a_device_the_answer_is_typed() {
    let count = device_count();
    let refused = CudaDevice::open(4096).map(|_| ()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused}");
    match count {
        Ok(count) => {
            assert!(refused.to_string().contains(&format!("sees {count} CUDA devices")), "{refused}");
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
            assert!(error.to_string().contains("driver"), "{error}");
        }
    }
}

#[test]
fn hashes_are_the_hosts_at_every_size_and_place() {
    let Some(cuda) = gpu() else { return };
    let device = as_dyn(&cuda);
    let bytes = ByteCount::mib(16);
    let content = pattern(9, bytes);
    let (mapping, source) = (mapped(&device, bytes), host(&device, &content));
    let stream = Stream::create(&device).unwrap();
    stream.copy(whole(&source), Span::mapping(&mapping)).unwrap();
    let tile = 4096_u64;
    let lengths =
        [0, 1, 15, 16, 17, 63, tile - 1, tile, tile + 1, 513 * tile - 5, 2 << 20, (8 << 20) + 3, 12 << 20];
    let mut tickets = Vec::new();
    for length in lengths {
        for offset in [0, 1, 8, 16, 4096, 12_345] {
            let (at, bytes) = (ByteCount(offset), ByteCount(length));
            let on_device = Span::Device { mapping: Arc::clone(&mapping), offset: at, bytes };
            let in_host = Span::host(&source, at, bytes);
            tickets.push((offset, length, stream.hash(on_device).unwrap(), stream.hash(in_host).unwrap()));
        }
    }
    for (offset, length, on_device, in_host) in tickets {
        let (start, end) = (usize::try_from(offset).unwrap(), usize::try_from(offset + length).unwrap());
        let expected = hash_bytes(&content[start..end]);
        assert_eq!(on_device.wait(SOON).unwrap(), expected, "{length} at {offset}");
        assert_eq!(in_host.wait(SOON).unwrap(), expected, "{length} at {offset} of the host");
    }
    // One byte, written by a copy that nobody announced, is found.
    let flip = host(&device, &[content[7_000_000] ^ 1]);
    let place =
        Span::Device { mapping: Arc::clone(&mapping), offset: ByteCount(7_000_000), bytes: ByteCount(1) };
    stream.copy(whole(&flip), place).unwrap();
    assert_ne!(stream.hash(Span::mapping(&mapping)).unwrap().wait(SOON).unwrap(), hash_bytes(&content));
}

#[test]
fn a_closed_stream_gives_back_what_its_jobs_held() {
    let Some(cuda) = gpu() else { return };
    let device = as_dyn(&cuda);
    let bytes = ByteCount::mib(64);
    let stream = Stream::create(&device).unwrap();
    let (mapping, target) = (mapped(&device, bytes), HostBuffer::allocate(&device, bytes).unwrap());
    for _ in 0..20 {
        stream.copy(Span::mapping(&mapping), whole(&target)).unwrap();
    }
    drop((stream, mapping, target, device));
    // Nobody asks any more; the janitor does.
    assert_eq!(settle(&cuda), LiveObjects::default());
    assert_eq!(cuda.take_errors(), []);
}

#[test]
fn a_full_queue_makes_submitters_wait_and_loses_nothing() {
    let Some(cuda) = gpu() else { return };
    let device = as_dyn(&cuda);
    let stream = Stream::create(&device).unwrap();
    let mapping = mapped(&device, MIB2);
    let source = host(&device, &pattern(3, MIB2));
    for _ in 0..5000 {
        stream.copy(whole(&source), Span::mapping(&mapping)).unwrap();
    }
    let hash = stream.hash(Span::mapping(&mapping)).unwrap();
    assert_eq!(hash.wait(SOON).unwrap(), hash_bytes(&pattern(3, MIB2)));
}

fn cpu_time_of_this_thread() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

#[test]
fn waiting_costs_no_core_and_keeps_its_deadline() {
    let Some(cuda) = gpu() else { return };
    let device = as_dyn(&cuda);
    let stream = Stream::create(&device).unwrap();
    let hold = Duration::from_millis(600);
    stream.launch_host((), move || thread::sleep(hold)).unwrap();
    let event: Event = stream.record().unwrap();
    let (start, before) = (Instant::now(), cpu_time_of_this_thread());
    assert!(!event.wait(Duration::from_millis(100)).unwrap());
    let late = start.elapsed().saturating_sub(Duration::from_millis(100));
    assert!(late < Duration::from_millis(20), "{late:?} past the deadline");
    assert!(event.wait(SOON).unwrap());
    let (waited, worked) = (start.elapsed(), cpu_time_of_this_thread().saturating_sub(before));
    eprintln!("waited {waited:?}, worked {worked:?}, late {late:?}");
    assert!(worked < waited / 20, "{worked:?} of work in {waited:?}");
}

#[test]
fn running_out_of_memory_is_typed_and_passes() {
    let Some(cuda) = gpu() else { return };
    let device = as_dyn(&cuda);
    let size = ByteCount::gib(1);
    let mut frames = Vec::new();
    let refused = loop {
        match Frame::create(&device, size) {
            Ok(frame) => frames.push(frame),
            Err(error) => break error,
        }
        assert!(frames.len() < 1024, "memory without end");
    };
    let held = ByteCount(size.0 * frames.len() as u64);
    assert_eq!(device.memory().unwrap().used_by_this_process, held);
    let DeviceError::OutOfMemory { requested, free, capacity, .. } = refused else { panic!("{refused:?}") };
    assert_eq!((requested, capacity), (size, device.info().capacity));
    assert!(free < size, "{free}");
    frames.pop();
    frames.push(Frame::create(&device, size).unwrap());
    drop(frames);
    assert_eq!(cuda.live_objects(), LiveObjects::default());
    assert_eq!(device.memory().unwrap().used_by_this_process, ByteCount::ZERO);
}

#[test]
fn a_region_sleeps_and_wakes_at_its_address() {
    let Some(cuda) = gpu() else { return };
    let device = as_dyn(&cuda);
    let (extent, count) = (ByteCount::mib(32), 8_u64);
    let reservation = Reservation::new(&device, ByteCount(extent.0 * count)).unwrap();
    let stream = Stream::create(&device).unwrap();
    let free_before = device.memory().unwrap().free;
    let copies: Vec<_> = (0..count).map(|index| host(&device, &pattern(index, extent))).collect();
    for cycle in 0..3 {
        let mappings: Vec<_> = (0..count)
            .map(|index| {
                let frame = Frame::create(&device, extent).unwrap();
                Mapping::new(&reservation, ByteCount(extent.0 * index), frame).unwrap()
            })
            .collect();
        for (mapping, copy) in mappings.iter().zip(&copies) {
            stream.copy(whole(copy), Span::mapping(mapping)).unwrap();
        }
        let hashes: Vec<_> = mappings.iter().map(|m| stream.hash(Span::mapping(m)).unwrap()).collect();
        for (index, hash) in hashes.iter().enumerate() {
            let expected = hash_bytes(&pattern(index as u64, extent));
            assert_eq!(hash.wait(SOON).unwrap(), expected, "cycle {cycle}, extent {index}");
        }
        assert_eq!(mappings[0].address(), reservation.address());
    }
    if let Some(reason) = cuda.host_fallback() {
        eprintln!("host memory is not page-locked: {reason}");
    }
    drop(copies);
    let free_after = device.memory().unwrap().free;
    // The scratch of the hash stays with the stream.
    assert!(free_after + ByteCount::mib(8) >= free_before, "{free_before} before, {free_after} after");
}

#[test]
fn two_devices_objects_share_the_primary_context() {
    let (Some(one), Some(two)) = (gpu(), gpu()) else { return };
    let (one, two) = (as_dyn(&one), as_dyn(&two));
    drop(mapped(&one, MIB2));
    drop(one);
    // The context lives as long as anybody needs it.
    drop(mapped(&two, MIB2));
    thread::spawn(move || drop(mapped(&two, MIB2))).join().unwrap();
}

/// A graph that somebody captures, in the mode that forbids most calls to every thread of the process.
mod capture {
    #![expect(unsafe_code, reason = "calls the driver as a stranger would")]

    use std::ptr;

    use cudarc::driver::sys;

    fn done(code: sys::CUresult) {
        assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
    }

    /// Captures an empty graph on a stream of its own while `meanwhile` runs.
    pub(super) fn during(meanwhile: impl FnOnce()) {
        let (mut device, mut context, mut stream) = (0, ptr::null_mut(), ptr::null_mut());
        // SAFETY: writes one number of ours; the driver was initialised when the device was opened.
        done(unsafe { sys::cuDeviceGet(&raw mut device, 0) });
        // SAFETY: writes one pointer of ours.
        done(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) });
        // SAFETY: retained just above.
        done(unsafe { sys::cuCtxPushCurrent_v2(context) });
        let non_blocking = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes one pointer of ours.
        done(unsafe { sys::cuStreamCreate(&raw mut stream, non_blocking) });
        let global = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        // SAFETY: a live stream.
        done(unsafe { sys::cuStreamBeginCapture_v2(stream, global) });
        meanwhile();
        let mut graph = ptr::null_mut();
        // SAFETY: a live stream under capture; writes one pointer of ours.
        done(unsafe { sys::cuStreamEndCapture(stream, &raw mut graph) });
        assert!(!graph.is_null(), "the capture was broken");
        // SAFETY: a live graph.
        done(unsafe { sys::cuGraphDestroy(graph) });
        // SAFETY: a live stream.
        done(unsafe { sys::cuStreamDestroy_v2(stream) });
        let mut popped = ptr::null_mut();
        // SAFETY: pushed above.
        done(unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) });
        assert_eq!(popped, context, "our calls left another context behind");
        // SAFETY: retained above.
        done(unsafe { sys::cuDevicePrimaryCtxRelease_v2(device) });
    }
}

#[test]
fn every_verb_works_while_somebody_captures_a_graph() {
    let Some(cuda) = gpu() else { return };
    let device = as_dyn(&cuda);
    let content = pattern(6, MIB2);
    let work = || {
        let (mapping, source) = (mapped(&device, MIB2), host(&device, &content));
        let stream = Stream::create(&device).unwrap();
        stream.copy(whole(&source), Span::mapping(&mapping)).unwrap();
        let hash = stream.hash(Span::mapping(&mapping)).unwrap();
        stream.launch_host((), || ()).unwrap();
        let other = Stream::create(&device).unwrap();
        other.wait_for(&stream.record().unwrap()).unwrap();
        assert!(other.synchronize(SOON).unwrap());
        assert_eq!(hash.wait(SOON).unwrap(), hash_bytes(&content));
        assert!(device.memory().unwrap().free > ByteCount::ZERO);
    };
    capture::during(|| {
        work();
        thread::scope(|scope| scope.spawn(work).join().unwrap());
    });
    assert_eq!(settle(&cuda), LiveObjects::default());
}
