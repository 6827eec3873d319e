//! How fast blocks of each size go over the link, up, down and both ways at once, against the link and against a call of
//! the driver for each block, measured in the same run; one JSON file in the form of `benches/results`. Run by
//! `tests/gpu/run.sh copies`.
//!
//! Blocks are scattered on both sides. They come in lists, as an engine has them, several in the stream at once. The link
//! is what 64 MiB at a time give, from the same memory.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program")]

#[path = "../../crates/shoal-memory/benches/sleep_wake/report.rs"]
mod report;

use std::collections::VecDeque;
use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use peer::Peer;
use report::{Bounds, Report};
use shoal_core::bytes::ByteCount;
use shoal_core::copy_plan::costs::{Costs, SIZES};
use shoal_device::{CudaDevice, Device, Frame, HostBuffer, Mapping, Reservation, Span, Stream};

const LONG: Duration = Duration::from_mins(1);
/// Memory of each direction on each side.
const POOL: ByteCount = ByteCount::mib(512);
/// Extents that a pool consists of.
const EXTENT: ByteCount = ByteCount::mib(64);
/// What one sample moves in each direction.
const MOVED: u64 = 256 << 20;
/// Bytes and copies of one list, at most.
const LIST_BYTES: u64 = 32 << 20;
const LIST_COPIES: u64 = 4096;
const SAMPLES: usize = 7;
/// What the target says of the link.
const SHARE: f64 = 0.88;
/// And of a kernel beside a decode.
const MULTIPROCESSORS: f64 = 16.0;
/// The share of a core that waiting for a copy may take.
const CORES_WAITING: f64 = 0.05;

type Pair = (Span, Span);

/// Device and host memory for one direction.
struct Pool {
    extents: Vec<Arc<Mapping>>,
    host: Arc<HostBuffer>,
    stream: Arc<Stream>,
    is_up: bool,
}

impl Pool {
    fn new(device: &Arc<dyn Device>, is_up: bool) -> Self {
        let reservation = Reservation::new(device, POOL).unwrap();
        let place = |index| {
            let frame = Frame::create(device, EXTENT).unwrap();
            Mapping::new(&reservation, ByteCount(EXTENT.0 * index), frame).unwrap()
        };
        let extents = (0..POOL.0 / EXTENT.0).map(place).collect();
        let host = HostBuffer::allocate(device, POOL).unwrap();
        assert!(host.is_locked(), "a machine that may not lock memory measures nothing");
        Self { extents, host, stream: Stream::create(device).unwrap(), is_up }
    }

    fn pair(&self, in_host: u64, on_device: u64, bytes: u64) -> Pair {
        let host = Span::host(&self.host, ByteCount(in_host), ByteCount(bytes));
        let mapping = Arc::clone(&self.extents[usize::try_from(on_device / EXTENT.0).unwrap()]);
        let offset = ByteCount(on_device % EXTENT.0);
        let device = Span::Device { mapping, offset, bytes: ByteCount(bytes) };
        if self.is_up { (host, device) } else { (device, host) }
    }

    /// So many blocks, scattered, in lists.
    fn lists(&self, block: u64, moved: u64) -> Vec<Vec<Pair>> {
        let places = POOL.0 / block;
        let blocks: Vec<Pair> = (0..moved / block)
            .map(|index| {
                let (one, other) = ((index * 7_919 + 13) % places, (index * 104_729 + 7) % places);
                self.pair(one * block, other * block, block)
            })
            .collect();
        let copies = usize::try_from((LIST_BYTES / block).clamp(1, LIST_COPIES)).unwrap();
        blocks.chunks(copies).map(<[Pair]>::to_vec).collect()
    }

    /// Waits for all that is queued, asking all the time: a wait that sleeps is late by a few per cent.
    fn finish(&self) {
        let (event, start) = (self.stream.record().unwrap(), Instant::now());
        while !event.is_complete().unwrap() {
            assert!(start.elapsed() < LONG, "copies took longer than {LONG:?}");
            spin_loop();
        }
    }

    fn queue(&self, lists: &[Vec<Pair>]) {
        for list in lists {
            self.stream.copy_many(list).unwrap();
        }
    }

    /// Addresses of the same copies: in the host, on the device, lengths.
    fn addresses(&self, lists: &[Vec<Pair>]) -> Vec<(u64, u64, usize)> {
        let base = self.host.access(ByteCount::ZERO, ByteCount(1), |bytes| bytes.as_ptr().addr()).unwrap();
        let address = |span: &Span| match span {
            Span::Device { mapping, offset, .. } => mapping.address().0 + offset.0,
            Span::Host { offset, .. } => base as u64 + offset.0,
        };
        let pairs = lists.iter().flatten().map(|(source, target)| {
            let (host, device) = if self.is_up { (source, target) } else { (target, source) };
            (address(host), address(device), usize::try_from(source.bytes().0).unwrap())
        });
        pairs.collect()
    }
}

/// What one writes without us: a call of the driver for each block.
mod peer {
    #![expect(unsafe_code, reason = "calls the driver as a stranger would")]

    use std::ptr;

    use cudarc::driver::sys;

    fn done(code: sys::CUresult) {
        assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
    }

    pub(super) struct Peer(sys::CUstream);

    impl Peer {
        /// In the primary context, which is this thread's from now on.
        pub(super) fn new() -> Self {
            let (mut device, mut context, mut stream) = (0, ptr::null_mut(), ptr::null_mut());
            // SAFETY: writes one number of ours; the driver was initialised when the device was opened.
            done(unsafe { sys::cuDeviceGet(&raw mut device, 0) });
            // SAFETY: writes one pointer of ours.
            done(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) });
            // SAFETY: retained just above.
            done(unsafe { sys::cuCtxSetCurrent(context) });
            let non_blocking = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            // SAFETY: writes one pointer of ours.
            done(unsafe { sys::cuStreamCreate(&raw mut stream, non_blocking) });
            Self(stream)
        }

        /// Copies blocks and waits. The caller keeps them, and looks at none of them meanwhile.
        pub(super) fn copy(&self, is_up: bool, blocks: &[(u64, u64, usize)]) {
            for (host, device, bytes) in blocks.iter().copied() {
                let host = ptr::with_exposed_provenance_mut(usize::try_from(host).unwrap());
                let code = if is_up {
                    // SAFETY: live blocks of this length, which the caller keeps.
                    unsafe { sys::cuMemcpyHtoDAsync_v2(device, host, bytes, self.0) }
                } else {
                    // SAFETY: as above.
                    unsafe { sys::cuMemcpyDtoHAsync_v2(host, device, bytes, self.0) }
                };
                done(code);
            }
            // SAFETY: a live stream.
            done(unsafe { sys::cuStreamSynchronize(self.0) });
        }
    }
}

/// GB/s of several samples, the first not counted.
fn rates(bytes: u64, mut run: impl FnMut()) -> Vec<f64> {
    run();
    let mut sample = || {
        let start = Instant::now();
        run();
        bytes as f64 / 1e9 / start.elapsed().as_secs_f64()
    };
    (0..SAMPLES).map(|_| sample()).collect()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

struct Link {
    up: f64,
    down: f64,
    both: f64,
}

fn link(report: &mut Report, up: &Pool, down: &Pool) -> Link {
    let large = |pool: &Pool| -> Vec<Pair> {
        (0..2 * MOVED / EXTENT.0).map(|i| pool.pair(i * EXTENT.0, i * EXTENT.0, EXTENT.0)).collect()
    };
    let (ups, downs) = (large(up), large(down));
    let run = |pools: &[(&Pool, &[Pair])]| {
        for index in 0..ups.len() {
            for (pool, pairs) in pools {
                let (source, target) = pairs[index].clone();
                pool.stream.copy(source, target).unwrap();
            }
        }
        for (pool, _) in pools {
            pool.finish();
        }
    };
    let up_rates = rates(2 * MOVED, || run(&[(up, &ups)]));
    let down_rates = rates(2 * MOVED, || run(&[(down, &downs)]));
    let both_rates = rates(4 * MOVED, || run(&[(up, &ups), (down, &downs)]));
    let link = Link { up: median(&up_rates), down: median(&down_rates), both: median(&both_rates) };
    report.add("link, host to device", "GB/s", up_rates, Bounds::default());
    report.add("link, device to host", "GB/s", down_rates, Bounds::default());
    report.add("link, both ways at once, sum", "GB/s", both_rates, Bounds::default());
    link
}

fn name(bytes: u64) -> String {
    if bytes < 1 << 20 { format!("{} KiB", bytes >> 10) } else { format!("{} MiB", bytes >> 20) }
}

/// One size, up, down, and both at once.
fn size(report: &mut Report, stranger: &Peer, [up, down]: [&Pool; 2], link: &Link, block: u64) {
    let what = name(block);
    for (pool, way, ceiling) in [(up, "host to device", link.up), (down, "device to host", link.down)] {
        // A call for each takes long where there are many.
        let few = MOVED.min(block * 4096);
        let blocks = pool.addresses(&pool.lists(block, few));
        let peer = rates(few, || stranger.copy(pool.is_up, &blocks));
        let lists = pool.lists(block, MOVED);
        let ours = rates(MOVED, || {
            pool.queue(&lists);
            pool.finish();
        });
        let bounds = Bounds {
            ceiling: Some(ceiling),
            peer: Some(("cuMemcpyAsync for each", median(&peer))),
            target: Some(SHARE * ceiling),
        };
        report.add(&format!("blocks of {what}, {way}"), "GB/s", ours, bounds);
    }
    let (ups, downs) = (up.lists(block, MOVED), down.lists(block, MOVED));
    let both = rates(2 * MOVED, || {
        for (one, other) in ups.iter().zip(&downs) {
            up.stream.copy_many(one).unwrap();
            down.stream.copy_many(other).unwrap();
        }
        up.finish();
        down.finish();
    });
    let bounds = Bounds { ceiling: Some(link.both), target: Some(SHARE * link.both), ..Bounds::default() };
    report.add(&format!("blocks of {what}, both ways at once, sum"), "GB/s", both, bounds);
}

/// What loads have left of their rate while another thread stores all the time, two lists ahead of the device as a
/// background copy is, and what the stores have meanwhile. Stores yield, so loads are to get their half of the link at least.
fn loads_beside_stores(report: &mut Report, [up, down]: [&Pool; 2], link: &Link, block: u64) {
    let (ups, downs) = (up.lists(block, 2 * MOVED), down.lists(block, MOVED));
    let load = || {
        up.queue(&ups);
        up.finish();
    };
    let alone = median(&rates(2 * MOVED, load));
    let (is_over, stored) = (AtomicBool::new(false), AtomicU64::new(0));
    let (beside, meanwhile) = thread::scope(|scope| {
        scope.spawn(|| {
            let mut queued = VecDeque::new();
            for list in downs.iter().cycle() {
                if is_over.load(Ordering::Acquire) {
                    break;
                }
                down.stream.copy_many(list).unwrap();
                let bytes: u64 = list.iter().map(|(source, _)| source.bytes().0).sum();
                queued.push_back((down.stream.record().unwrap(), bytes));
                while queued.len() > 2 {
                    if queued.front().is_some_and(|(event, _)| event.is_complete().unwrap()) {
                        stored.fetch_add(queued.pop_front().map_or(0, |(_, bytes)| bytes), Ordering::Relaxed);
                    } else {
                        thread::yield_now();
                    }
                }
            }
        });
        let (before, start) = (stored.load(Ordering::Relaxed), Instant::now());
        let beside = rates(2 * MOVED, load);
        let seconds = start.elapsed().as_secs_f64();
        let meanwhile = (stored.load(Ordering::Relaxed) - before) as f64 / 1e9 / seconds;
        is_over.store(true, Ordering::Release);
        (beside, meanwhile)
    });
    down.finish();
    let bounds = Bounds { ceiling: Some(alone), target: Some(SHARE * link.both / 2.0), ..Bounds::default() };
    let what = name(block);
    report.add(&format!("loads of {what}, stores of {what} under way"), "GB/s", beside, bounds);
    let case = format!("those stores of {what} meanwhile");
    report.add(&case, "GB/s", vec![meanwhile], Bounds::default());
}

/// What waiting takes of the host's cores, and how late it hears of the end of what it waits for.
fn waiting(report: &mut Report, up: &Pool) {
    let large: Vec<Pair> = (0..8).map(|i| up.pair(i * EXTENT.0, i * EXTENT.0, EXTENT.0)).collect();
    let queue = |rounds: usize| {
        for (source, target) in large.iter().cycle().take(rounds * large.len()).cloned() {
            up.stream.copy(source, target).unwrap();
        }
    };
    let cpu = || {
        let spent = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9
    };
    // 20 GiB, some 0.4 s.
    let mut cores = Vec::new();
    for _ in 0..SAMPLES {
        queue(40);
        let event = up.stream.record().unwrap();
        let (start, before) = (Instant::now(), cpu());
        assert!(event.wait(LONG).unwrap());
        cores.push((cpu() - before) / start.elapsed().as_secs_f64());
    }
    let bounds = Bounds { ceiling: Some(1.0), target: Some(CORES_WAITING), ..Bounds::default() };
    report.add(
        "waiting for copies of 20 GiB, what it takes of a core that asks all the time",
        "cores",
        cores,
        bounds,
    );
    let timed = |finish: &dyn Fn()| -> Vec<f64> {
        let sample = || {
            let start = Instant::now();
            queue(2);
            finish();
            ms(start)
        };
        (0..=SAMPLES).map(|_| sample()).skip(1).collect()
    };
    let asking = timed(&|| up.finish());
    let ceiling = Some(median(&asking));
    report.add("copies of 1 GiB, asked for all the time", "ms", asking, Bounds::default());
    let waited = timed(&|| assert!(up.stream.record().unwrap().wait(LONG).unwrap()));
    report.add("copies of 1 GiB, waited for", "ms", waited, Bounds { ceiling, ..Bounds::default() });
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn asked_and_done(pool: &Pool, list: &[Pair]) -> Vec<f64> {
    let mut samples: Vec<f64> = (0..60)
        .map(|_| {
            let start = Instant::now();
            pool.stream.copy_many(list).unwrap();
            let event = pool.stream.record().unwrap();
            while !event.is_complete().unwrap() {}
            ms(start)
        })
        .collect();
    samples.split_off(10)
}

/// Work bound by the device's memory, as a decode is: hashes of 2 GiB again and again, beside copies.
fn beside_work(report: &mut Report, device: &Arc<dyn Device>, pools: [(&Pool, &str); 2]) {
    let extent = ByteCount::mib(256);
    let reservation = Reservation::new(device, ByteCount(extent.0 * 8)).unwrap();
    let place = |index| {
        let frame = Frame::create(device, extent).unwrap();
        Mapping::new(&reservation, ByteCount(extent.0 * index), frame).unwrap()
    };
    let extents: Vec<_> = (0..8).map(place).collect();
    let stream = Stream::create(device).unwrap();
    let start_work = |rounds: usize| {
        let pieces = extents.iter().cycle().take(rounds * extents.len());
        let tickets: Vec<_> = pieces.map(|piece| stream.hash(Span::mapping(piece)).unwrap()).collect();
        tickets
    };
    let time = |before: &dyn Fn(), run: &dyn Fn(), after: &dyn Fn()| {
        let sample = || {
            before();
            let start = Instant::now();
            run();
            let time = ms(start);
            after();
            time
        };
        sample();
        (0..5).map(|_| sample()).collect::<Vec<f64>>()
    };
    let work = || {
        start_work(8).last().unwrap().wait(LONG).unwrap();
    };
    let nothing = || ();
    let alone = time(&nothing, &work, &nothing);
    let ceiling = Some(median(&alone));
    report.add("work bound by memory, alone", "ms", alone, Bounds::default());
    for (pool, way) in pools {
        for block in [4096, 64 << 10, 64 << 20] {
            let what = name(block);
            // More than the work lasts; then more work than the copies last.
            let (long, short) = (pool.lists(block, 12 * MOVED), pool.lists(block, 2 * MOVED));
            let beside = time(&|| pool.queue(&long), &work, &|| pool.finish());
            let bounds = Bounds { ceiling, ..Bounds::default() };
            report.add(&format!("the same work beside blocks of {what} {way}"), "ms", beside, bounds);
            let copies = time(
                &|| drop(start_work(30)),
                &|| {
                    pool.queue(&short);
                    pool.finish();
                },
                &|| assert!(stream.synchronize(LONG).unwrap()),
            );
            let rates = copies.iter().map(|time| 2.0 * MOVED as f64 / 1e6 / time).collect();
            report.add(&format!("blocks of {what} {way} beside that work"), "GB/s", rates, Bounds::default());
        }
    }
}

fn show(way: &str, costs: &Costs) {
    let all = [
        ("one by one", Some(&costs.dma)),
        ("batch", costs.batch.as_ref()),
        ("kernel", costs.kernel.as_ref()),
    ];
    for (name, method) in all {
        let Some(method) = method else { continue };
        let each = SIZES
            .iter()
            .zip(method.each)
            .map(|(size, nanos)| format!("{}K {:.1}", size >> 10, *size as f64 / nanos as f64));
        println!(
            "    {way} {name}: start {} us, GB/s {}",
            method.start / 1000,
            each.collect::<Vec<_>>().join(", ")
        );
    }
}

fn main() {
    let cuda = match CudaDevice::open(0) {
        Ok(cuda) => cuda,
        Err(error) => {
            println!("skipped: {error}");
            let is_required = std::env::var_os("SHOAL_REQUIRE_GPU").is_some_and(|value| value == "1");
            assert!(!is_required, "SHOAL_REQUIRE_GPU=1: {error}");
            return;
        }
    };
    let device: Arc<dyn Device> = Arc::clone(&cuda) as _;
    let mut report = Report::default();
    let start = Instant::now();
    let costs = cuda.copy_costs();
    report.add("the table of costs, measured or read", "ms", vec![ms(start)], Bounds::default());
    show("up", &costs.up);
    show("down", &costs.down);
    let (up, down) = (Pool::new(&device, true), Pool::new(&device, false));
    let link = link(&mut report, &up, &down);
    let stranger = Peer::new();
    let sizes = [12, 13, 14, 15, 16, 17, 18, 20, 22, 23, 24, 26].map(|power| 1_u64 << power);
    for block in sizes {
        size(&mut report, &stranger, [&up, &down], &link, block);
    }
    for (pool, way) in [(&up, "up"), (&down, "down")] {
        for count in [1, 16, 256, 4096] {
            let list = &pool.lists(4096, 4096 * count)[0];
            report.add(
                &format!("one list of {count} x 4 KiB {way}, asked and done"),
                "ms",
                asked_and_done(pool, list),
                Bounds::default(),
            );
        }
    }
    loads_beside_stores(&mut report, [&up, &down], &link, 16 << 10);
    loads_beside_stores(&mut report, [&up, &down], &link, 1 << 20);
    waiting(&mut report, &up);
    let (taken_up, taken_down) = cuda.copy_multiprocessors();
    for (way, taken) in [("host to device", taken_up), ("device to host", taken_down)] {
        let bounds = Bounds {
            ceiling: Some(f64::from(cuda.facts().multiprocessors)),
            target: Some(MULTIPROCESSORS),
            ..Bounds::default()
        };
        let taken = vec![f64::from(taken)];
        report.add(&format!("what a list's kernel takes, {way}"), "multiprocessors", taken, bounds);
    }
    beside_work(&mut report, &device, [(&up, "host to device"), (&down, "device to host")]);
    drop((up, down));
    assert_eq!(device.take_errors(), [], "errors without a caller");
    report.write(&cuda);
}
