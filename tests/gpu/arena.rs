//! How fast memory for host copies is made and page-locked, what it is made of on this machine, and that copies begin
//! before it is all there; one JSON file in the form of `benches/results`. Run by `tests/gpu/run.sh arena`.
//!
//! The peer is the driver's own allocation. The ceiling of making and locking is making alone, of the same kind of memory.
//! Copies are held against copies from the driver's memory. All of it is measured in this run.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program")]

#[path = "../../crates/shoal-memory/benches/sleep_wake/report.rs"]
mod report;

use std::env;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use peer::DriverMemory;
use report::{Bounds, Report, Samples};
use shoal_core::bytes::ByteCount;
use shoal_core::extent::ExtentRule;
use shoal_core::protocol::LeaseKind;
use shoal_device::host::{HostFile, PageSetting, survey};
use shoal_device::{CudaDevice, Device, Frame, HostBacking, HostSlab, Mapping, Reservation, Span, Stream};
use shoal_memory::{Backing, LocalBudget, ManagerOptions, MemoryManager, Region, RegionSpec};

const GIB: u64 = 1 << 30;
/// What is made, in slabs of a GiB, as the arena makes them ahead.
const TOTAL: u64 = 8;
/// The driver needs seconds for it.
const OF_DRIVER: u64 = 4;
const PIECE: ByteCount = ByteCount::mib(256);
const LONG: Duration = Duration::from_mins(1);
const TARGET: f64 = 18.0;
const PEER: &str = "cuMemHostAlloc";

/// What one writes without us.
mod peer {
    #![expect(unsafe_code, reason = "calls the driver as a stranger would")]

    use std::ffi::c_void;
    use std::ptr;

    use cudarc::driver::sys;

    fn done(code: sys::CUresult) {
        assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
    }

    /// Page-locked memory by the driver.
    pub(super) struct DriverMemory {
        at: *mut c_void,
        stream: sys::CUstream,
    }

    impl DriverMemory {
        /// In the primary context, which is this thread's from now on.
        pub(super) fn new(bytes: u64) -> Self {
            let (mut device, mut context, mut stream) = (0, ptr::null_mut(), ptr::null_mut());
            let mut at = ptr::null_mut();
            // SAFETY: writes one number of ours; the driver was initialised when the device was opened.
            done(unsafe { sys::cuDeviceGet(&raw mut device, 0) });
            // SAFETY: writes one pointer of ours.
            done(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) });
            // SAFETY: retained just above.
            done(unsafe { sys::cuCtxSetCurrent(context) });
            let non_blocking = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            // SAFETY: writes one pointer of ours.
            done(unsafe { sys::cuStreamCreate(&raw mut stream, non_blocking) });
            let bytes = usize::try_from(bytes).unwrap();
            // SAFETY: writes one pointer of ours.
            done(unsafe { sys::cuMemHostAlloc(&raw mut at, bytes, sys::CU_MEMHOSTALLOC_PORTABLE) });
            Self { at, stream }
        }

        /// Copies all pieces one after another and waits. The caller keeps the device memory.
        pub(super) fn copy(&self, is_up: bool, pieces: &[u64], bytes: u64) {
            let bytes = usize::try_from(bytes).unwrap();
            for (index, on_device) in pieces.iter().enumerate() {
                let host = self.at.wrapping_byte_add(index * bytes);
                let code = if is_up {
                    // SAFETY: live memory of this length on both sides.
                    unsafe { sys::cuMemcpyHtoDAsync_v2(*on_device, host, bytes, self.stream) }
                } else {
                    // SAFETY: as above.
                    unsafe { sys::cuMemcpyDtoHAsync_v2(host, *on_device, bytes, self.stream) }
                };
                done(code);
            }
            // SAFETY: a live stream.
            done(unsafe { sys::cuStreamSynchronize(self.stream) });
        }
    }

    impl Drop for DriverMemory {
        fn drop(&mut self) {
            // SAFETY: allocated in `new`, and no copy runs.
            done(unsafe { sys::cuMemFreeHost(self.at) });
            // SAFETY: made in `new`.
            done(unsafe { sys::cuStreamDestroy_v2(self.stream) });
        }
    }
}

fn gib_per_s(gib: u64, seconds: f64) -> f64 {
    gib as f64 / seconds
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn median(values: &[f64]) -> f64 {
    Samples::new(values.to_vec()).median()
}

/// The driver's own, and what it gives to copies: GiB/s of making, GB/s up and down.
fn driver(report: &mut Report, extents: &[Arc<Mapping>]) -> (f64, [f64; 2]) {
    let (mut made, mut freed) = (Vec::new(), Vec::new());
    let mut rates = [Vec::new(), Vec::new()];
    let pieces: Vec<u64> = extents.iter().map(|extent| extent.address().0).collect();
    for _ in 0..2 {
        let start = Instant::now();
        let memory = DriverMemory::new(OF_DRIVER * GIB);
        made.push(gib_per_s(OF_DRIVER, start.elapsed().as_secs_f64()));
        for (is_up, rates) in [true, false].into_iter().zip(&mut rates) {
            memory.copy(is_up, &pieces, PIECE.0);
            for _ in 0..3 {
                let time = seconds(|| memory.copy(is_up, &pieces, PIECE.0));
                rates.push((OF_DRIVER * GIB) as f64 / 1e9 / time);
            }
        }
        freed.push(gib_per_s(OF_DRIVER, seconds(|| drop(memory))));
    }
    let (peer, links) = (median(&made), [median(&rates[0]), median(&rates[1])]);
    report.add("cuMemHostAlloc, 4 GiB", "GiB/s", made, Bounds::default());
    report.add("cuMemFreeHost, 4 GiB", "GiB/s", freed, Bounds::default());
    let [up, down] = rates;
    report.add("host to device, from cuMemHostAlloc", "GB/s", up, Bounds::default());
    report.add("device to host, to cuMemHostAlloc", "GB/s", down, Bounds::default());
    (peer, links)
}

fn name_of(backing: HostBacking) -> &'static str {
    let has_huge = matches!(survey().shared_huge_pages, PageSetting::Always | PageSetting::OnRequest);
    match backing {
        HostBacking::ReservedHugePages => "huge pages set aside, shared",
        HostBacking::SharedHugePages if has_huge => "huge pages, shared",
        HostBacking::SharedHugePages => "small pages, shared (shmem_enabled does not allow huge ones)",
        HostBacking::HugePages => "huge pages, private",
        _ => "small pages, private",
    }
}

/// One kind of memory: made, locked, given back. None: this machine does not have it. Else how fast it is made.
fn kind(report: &mut Report, device: &Arc<dyn Device>, backing: HostBacking, peer: f64) -> Option<f64> {
    let name = name_of(backing);
    let rounds = if name.starts_with("huge") { 5 } else { 2 };
    let (mut made, mut locked, mut both, mut freed) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (mut making, mut locking, mut slabs) = (0.0, 0.0, Vec::new());
        for _ in 0..TOTAL {
            let start = Instant::now();
            let slab = match HostSlab::allocate(device, ByteCount(GIB), backing) {
                Ok(slab) => slab,
                Err(error) => {
                    println!("{name}: not here: {error}");
                    return None;
                }
            };
            making += start.elapsed().as_secs_f64();
            locking += seconds(|| slab.lock().unwrap());
            slabs.push(slab);
        }
        made.push(gib_per_s(TOTAL, making));
        locked.push(gib_per_s(TOTAL, locking));
        both.push(gib_per_s(TOTAL, making + locking));
        freed.push(gib_per_s(TOTAL, seconds(|| drop(slabs))));
    }
    let rate = median(&made);
    let bounds = Bounds { ceiling: Some(median(&made)), peer: Some((PEER, peer)), target: None };
    report.add(&format!("made and locked, 8 GiB, {name}"), "GiB/s", both, bounds);
    report.add(&format!("made only, {name}"), "GiB/s", made, Bounds::default());
    report.add(&format!("locked only, {name}"), "GiB/s", locked, Bounds::default());
    report.add(&format!("given back, {name}"), "GiB/s", freed, Bounds::default());
    Some(rate)
}

/// As the arena does it ahead of use: each slab is made while the one before is locked.
fn pipelined(report: &mut Report, device: &Arc<dyn Device>, backing: HostBacking, peer: f64, making: f64) {
    let rate = |_| {
        let start = Instant::now();
        let slabs = thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel::<Arc<HostSlab>>();
            let locker = scope
                .spawn(move || receiver.into_iter().inspect(|slab| slab.lock().unwrap()).collect::<Vec<_>>());
            for _ in 0..TOTAL {
                sender.send(HostSlab::allocate(device, ByteCount(GIB), backing).unwrap()).unwrap();
            }
            drop(sender);
            locker.join().unwrap()
        });
        let seconds = start.elapsed().as_secs_f64();
        drop(slabs);
        gib_per_s(TOTAL, seconds)
    };
    let rates = (0..5).map(rate).collect();
    let bounds = Bounds { target: Some(TARGET), peer: Some((PEER, peer)), ceiling: Some(making) };
    let case = format!("made while the one before is locked, 8 GiB, {}", name_of(backing));
    report.add(&case, "GiB/s", rates, bounds);
}

/// A slab that one worker made, mapped and locked by another: the same memory at other addresses.
fn second_mapping(report: &mut Report, device: &Arc<dyn Device>, backing: HostBacking) {
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..2 {
        let files: Vec<HostFile> =
            (0..TOTAL).map_while(|_| HostFile::create(ByteCount(GIB), backing).ok()).collect();
        if files.len() as u64 != TOTAL {
            return println!("{}: not here", name_of(backing));
        }
        let mut held = Vec::new();
        for rates in &mut rates {
            let start = Instant::now();
            for file in &files {
                let Ok(slab) = HostSlab::adopt(device, file) else {
                    return println!("{}: not here", name_of(backing));
                };
                slab.lock().unwrap();
                held.push(slab);
            }
            rates.push(gib_per_s(TOTAL, start.elapsed().as_secs_f64()));
        }
    }
    let [first, second] = rates;
    let bounds = Bounds { peer: Some(("the first time", median(&first))), ..Bounds::default() };
    let case = format!("mapped and locked a second time, 8 GiB, {}", name_of(backing));
    report.add(&case, "GiB/s", second, bounds);
}

/// Device memory to copy from and to.
fn extents(device: &Arc<dyn Device>) -> Vec<Arc<Mapping>> {
    let reservation = Reservation::new(device, ByteCount(OF_DRIVER * GIB)).unwrap();
    let place = |index| {
        let frame = Frame::create(device, PIECE).unwrap();
        Mapping::new(&reservation, ByteCount(PIECE.0 * index), frame).unwrap()
    };
    (0..OF_DRIVER * GIB / PIECE.0).map(place).collect()
}

/// Copies from and to slabs, against those of the driver's memory.
fn copies(report: &mut Report, device: &Arc<dyn Device>, extents: &[Arc<Mapping>], links: [f64; 2]) {
    let stream = Stream::create(device).unwrap();
    let backing = [HostBacking::SharedHugePages, HostBacking::HugePages]
        .into_iter()
        .find(|backing| name_of(*backing).starts_with("huge"))
        .unwrap_or(HostBacking::SmallPages);
    let buffers: Vec<_> = (0..OF_DRIVER)
        .flat_map(|_| {
            let slab = HostSlab::allocate(device, ByteCount(GIB), backing).unwrap();
            slab.lock().unwrap();
            let part = |index| slab.buffer(ByteCount(index * PIECE.0), PIECE, ()).unwrap();
            (0..GIB / PIECE.0).map(part).collect::<Vec<_>>()
        })
        .collect();
    let copy_all = |is_up: bool| {
        for (extent, buffer) in extents.iter().zip(&buffers) {
            let (host, on_device) = (Span::host(buffer, ByteCount::ZERO, PIECE), Span::mapping(extent));
            let (source, target) = if is_up { (host, on_device) } else { (on_device, host) };
            stream.copy(source, target).unwrap();
        }
        assert!(stream.synchronize(LONG).unwrap());
    };
    let ways = [(true, "host to device, from slabs"), (false, "device to host, to slabs")];
    for ((is_up, case), link) in ways.into_iter().zip(links) {
        copy_all(is_up);
        let rate = |_| (OF_DRIVER * GIB) as f64 / 1e9 / seconds(|| copy_all(is_up));
        let bounds = Bounds { ceiling: Some(link), ..Bounds::default() };
        report.add(case, "GB/s", (0..5).map(rate).collect(), bounds);
    }
}

fn written(manager: &Arc<MemoryManager>) -> Region {
    let spec = RegionSpec {
        name: "written".to_owned(),
        bytes: ByteCount(TOTAL * GIB),
        kind: LeaseKind::Weights,
        extent_rule: ExtentRule::default(),
        backing: Backing::Keep,
    };
    let region = manager.region(spec).unwrap();
    region.commit(ByteCount::ZERO, region.bytes()).unwrap();
    let pattern: Vec<u8> = (0..PIECE.0).map(|index| (index % 251) as u8).collect();
    for index in 0..TOTAL * GIB / PIECE.0 {
        region.write(ByteCount(index * PIECE.0), &pattern).unwrap();
    }
    region
}

/// The arena as a manager drives it, from nothing: when the first copy counts, when all memory is there, when all copies
/// are.
fn through_a_manager(report: &mut Report, device: &Arc<dyn Device>, peer: f64) {
    let (mut first_copy, mut all_made, mut all_copied, mut rates) = (vec![], vec![], vec![], vec![]);
    let mut reasons = Vec::new();
    for _ in 0..3 {
        let lease = LocalBudget::new(ByteCount((TOTAL + 2) * GIB));
        let options = ManagerOptions::new(ByteCount((TOTAL + 4) * GIB), lease as _);
        let manager = MemoryManager::new(Arc::clone(device), options).unwrap();
        let region = written(&manager);
        let start = Instant::now();
        let ms = || start.elapsed().as_secs_f64() * 1e3;
        let flush = region.freeze(LONG).unwrap();
        let (mut first, mut made) = (None, None);
        while !flush.progress().is_finished || made.is_none() {
            if first.is_none() && !flush.progress().done.is_zero() {
                first = Some(ms());
            }
            if made.is_none() && manager.host_usage().locked >= ByteCount(TOTAL * GIB) {
                made = Some(ms());
                rates.push(gib_per_s(TOTAL, ms() / 1e3));
            }
            assert!(start.elapsed() < LONG, "{:?}", manager.host_usage());
            thread::sleep(Duration::from_micros(200));
        }
        flush.wait(LONG).unwrap();
        all_copied.push(flush.wait(LONG).unwrap().duration.as_secs_f64() * 1e3);
        first_copy.push(first.unwrap());
        all_made.push(made.unwrap());
        reasons = manager.host_usage().reasons;
        region.sleep(0.0, false, LONG).unwrap();
    }
    println!("reasons: {reasons:#?}");
    let bounds = Bounds { target: Some(TARGET), peer: Some((PEER, peer)), ceiling: None };
    report.add("arena of a manager, 8 GiB made and locked beside copies", "GiB/s", rates, bounds);
    let whole = median(&all_made);
    let bounds = Bounds { target: Some(whole), ..Bounds::default() };
    report.add(
        "first extent of 256 MiB copied and counted (target: before all memory is there)",
        "ms",
        first_copy,
        bounds,
    );
    report.add("all memory there", "ms", all_made, Bounds::default());
    report.add("all 8 GiB copied, hashed and counted", "ms", all_copied, Bounds::default());
}

fn main() {
    let cuda = match CudaDevice::open(0) {
        Ok(device) => device,
        Err(error) => {
            println!("skipped: {error}");
            let is_required = env::var_os("SHOAL_REQUIRE_GPU").is_some_and(|value| value == "1");
            assert!(!is_required, "SHOAL_REQUIRE_GPU=1: {error}");
            return;
        }
    };
    let device: Arc<dyn Device> = Arc::clone(&cuda) as _;
    println!("{:?}, {:?} cores", survey(), thread::available_parallelism());
    let mut report = Report::default();
    let on_device = extents(&device);
    let (peer, links) = driver(&mut report, &on_device);
    let kinds = [
        HostBacking::HugePages,
        HostBacking::SharedHugePages,
        HostBacking::ReservedHugePages,
        HostBacking::SmallPages,
    ];
    let mut rates = Vec::new();
    for backing in kinds {
        rates.extend(kind(&mut report, &device, backing, peer).map(|rate| (backing, rate)));
    }
    // The kind that the arena takes on this machine.
    let choices = survey().backings(ByteCount(GIB));
    let chosen = choices.iter().find_map(|(choice, _)| rates.iter().find(|(backing, _)| backing == choice));
    if let Some((backing, making)) = chosen {
        pipelined(&mut report, &device, *backing, peer, *making);
    }
    second_mapping(&mut report, &device, HostBacking::SharedHugePages);
    second_mapping(&mut report, &device, HostBacking::ReservedHugePages);
    copies(&mut report, &device, &on_device, links);
    drop(on_device);
    through_a_manager(&mut report, &device, peer);
    assert_eq!(cuda.take_errors(), [], "errors without a caller");
    report.write(&cuda);
}
