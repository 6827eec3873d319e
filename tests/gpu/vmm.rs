//! What virtual memory, hashing and page-locked memory cost on this GPU; one JSON file in the form of
//! `benches/results`. Run by `tests/gpu/run.sh vmm`.
//!
//! A row's ceiling is measured in the same run: for the hash, a copy inside the device (read and write counted, since
//! a copy does both and a hash only reads); for the hash on the host, plain xxh3.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program")]

use std::env;
use std::fs;
use std::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use shoal_core::bytes::ByteCount;
use shoal_device::{CudaDevice, Device, Frame, HostBuffer, Mapping, Reservation, Span, Stream, hash_bytes};
use xxhash_rust::xxh3::xxh3_64;

const GIB: f64 = (1_u64 << 30) as f64;
/// Long enough for the driver to scrub 16 GiB, and for clocks to fall.
const REST: Duration = Duration::from_millis(200);
const LONG: Duration = Duration::from_mins(1);

/// Measured values of one thing.
struct Samples(Vec<f64>);

impl Samples {
    /// Runs `once` so many times; it says what it measured.
    fn take(count: usize, mut once: impl FnMut() -> f64) -> Self {
        let mut values: Vec<f64> = (0..count).map(|_| once()).collect();
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }
}

#[derive(Default)]
struct Report {
    rows: Vec<Value>,
}

impl Report {
    fn add(&mut self, case: &str, metric: &str, unit: &str, samples: &Samples, bounds: Bounds) {
        let value = samples.median();
        let better = if unit == "us" || unit == "ms" { "lower" } else { "higher" };
        let met =
            bounds.target.map(|target| if better == "lower" { value <= target } else { value >= target });
        println!("{case:50} {metric:12} {value:10.2} {unit:6} {}", shown(bounds));
        let (first, last) = (samples.0[0], samples.0[samples.0.len() - 1]);
        self.rows.push(json!({
            "case": case, "metric": metric, "value": round(value), "unit": unit, "better": better,
            "ceiling": bounds.ceiling.map(round), "peer": bounds.peer.map(|peer| peer.0),
            "peer_value": bounds.peer.map(|peer| peer.1), "target": bounds.target, "met": met,
            "samples": samples.0.len(), "spread": [round(first), round(last)],
        }));
    }
}

/// What a value is held against.
#[derive(Clone, Copy, Default)]
struct Bounds {
    ceiling: Option<f64>,
    peer: Option<(&'static str, f64)>,
    target: Option<f64>,
}

fn shown(bounds: Bounds) -> String {
    let ceiling = bounds.ceiling.map(|value| format!("ceiling {value:.2} "));
    let target = bounds.target.map(|value| format!("target {value:.2}"));
    ceiling.unwrap_or_default() + &target.unwrap_or_default()
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn micros(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}

/// Single calls: each verb by size of handle.
fn calls(report: &mut Report, device: &Arc<dyn Device>) {
    for mib in [2_u64, 16, 64, 256, 1024] {
        let bytes = ByteCount::mib(mib);
        let count = if mib >= 256 { 12 } else { 40 };
        let at = device.reserve(bytes).unwrap();
        let mut times: [Vec<f64>; 4] = Default::default();
        for _ in 0..count {
            let start = Instant::now();
            let frame = device.create_frame(bytes).unwrap();
            times[0].push(micros(start));
            let start = Instant::now();
            device.map(at, frame).unwrap();
            times[1].push(micros(start));
            let start = Instant::now();
            device.unmap(at, bytes).unwrap();
            times[2].push(micros(start));
            let start = Instant::now();
            device.destroy_frame(frame).unwrap();
            times[3].push(micros(start));
        }
        device.release(at, bytes).unwrap();
        for (verb, mut values) in ["create", "map", "unmap", "release"].into_iter().zip(times) {
            values.sort_by(f64::total_cmp);
            report.add(&format!("{verb} {mib} MiB"), "time", "us", &Samples(values), Bounds::default());
        }
    }
}

/// What one growth to [`GROWTH`] and back measured.
struct Growth {
    /// GiB/s of creating and mapping new frames.
    new: f64,
    /// GiB/s of mapping them again.
    pooled: f64,
    unmap_ms: f64,
}

const GROWTH: ByteCount = ByteCount::gib(16);

fn grow_once(device: &Arc<dyn Device>, reservation: &Arc<Reservation>, bytes: ByteCount) -> Growth {
    let count = GROWTH.0 / bytes.0;
    let rate = |start: Instant| GROWTH.0 as f64 / GIB / start.elapsed().as_secs_f64();
    let place = |index: u64, frame| Mapping::new(reservation, ByteCount(bytes.0 * index), frame).unwrap();
    let start = Instant::now();
    let mappings: Vec<_> =
        (0..count).map(|index| place(index, Frame::create(device, bytes).unwrap())).collect();
    let new = rate(start);
    let frames: Vec<_> = mappings.iter().map(|mapping| Arc::clone(mapping.frame())).collect();
    let start = Instant::now();
    drop(mappings);
    let unmap_ms = start.elapsed().as_secs_f64() * 1e3;
    let start = Instant::now();
    let mappings: Vec<_> =
        frames.iter().zip(0..).map(|(frame, index)| place(index, Arc::clone(frame))).collect();
    let pooled = rate(start);
    drop((mappings, frames));
    Growth { new, pooled, unmap_ms }
}

/// 16 GiB from nothing, by frames of one size: new ones, then the same ones mapped again. Again and again without a
/// pause, and each time after a rest, in which the GPU's clocks fall.
fn growth(report: &mut Report, device: &Arc<dyn Device>) {
    let reservation = Reservation::new(device, GROWTH).unwrap();
    // The bare calls: what grows from new memory is held to a share of them (docs/decisions/0014), and they to nothing.
    for (mib, samples) in [(2, 1), (64, 9), (256, 9)] {
        let bytes = ByteCount::mib(mib);
        let of = |values: &[Growth], pick: fn(&Growth) -> f64| {
            let mut picked = values.iter().map(pick);
            Samples::take(values.len(), || picked.next().unwrap())
        };
        let in_a_row: Vec<_> = (0..samples).map(|_| grow_once(device, &reservation, bytes)).collect();
        let peer = Some(("kvcached e8e6406, 128 MiB granule", 1016.0));
        let bounds = Bounds { peer, ..Bounds::default() };
        let (new, case) = (of(&in_a_row, |growth| growth.new), format!("grow 16 GiB, new {mib} MiB frames"));
        report.add(&case, "rate", "GiB/s", &new, bounds);
        let pooled = of(&in_a_row, |growth| growth.pooled);
        let case = format!("grow 16 GiB, pooled {mib} MiB frames");
        let target = (mib == 64).then_some(1300.0);
        report.add(&case, "rate", "GiB/s", &pooled, Bounds { target, ..Bounds::default() });
        let unmap = of(&in_a_row, |growth| growth.unmap_ms);
        report.add(&format!("unmap 16 GiB of {mib} MiB"), "time", "ms", &unmap, Bounds::default());
        if samples > 1 {
            let rested: Vec<_> = (0..samples)
                .map(|_| {
                    thread::sleep(REST);
                    grow_once(device, &reservation, bytes)
                })
                .collect();
            let case = format!("grow 16 GiB, new {mib} MiB frames, after a rest");
            report.add(&case, "rate", "GiB/s", &of(&rested, |growth| growth.new), Bounds::default());
        }
    }
}

/// 13 GiB of device memory full of a pattern, as 52 extents, and the pattern in host memory.
struct Scene {
    mappings: Vec<Arc<Mapping>>,
    buffer: Arc<HostBuffer>,
    stream: Arc<Stream>,
    /// Bytes a second inside the device, read and written.
    inside: f64,
}

const PIECE: ByteCount = ByteCount::mib(256);
const PIECES: u64 = 52;

impl Scene {
    fn new(device: &Arc<dyn Device>) -> Self {
        let reservation = Reservation::new(device, ByteCount(PIECE.0 * PIECES)).unwrap();
        let place = |index| {
            let frame = Frame::create(device, PIECE).unwrap();
            Mapping::new(&reservation, ByteCount(PIECE.0 * index), frame).unwrap()
        };
        let mappings: Vec<_> = (0..PIECES).map(place).collect();
        let (stream, buffer) =
            (Stream::create(device).unwrap(), HostBuffer::allocate(device, PIECE).unwrap());
        let mut state = 1_u64;
        let fill = |bytes: &mut [u8]| {
            for word in bytes.chunks_exact_mut(8) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                word.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
            }
        };
        buffer.access_mut(ByteCount::ZERO, PIECE, fill).unwrap();
        let scene = Self { mappings, buffer, stream, inside: 0.0 };
        for mapping in &scene.mappings {
            scene.stream.copy(scene.host(), Span::mapping(mapping)).unwrap();
        }
        assert!(scene.stream.synchronize(LONG).unwrap());
        scene
    }

    fn host(&self) -> Span {
        Span::host(&self.buffer, ByteCount::ZERO, PIECE)
    }

    fn part(&self, offset: u64, bytes: u64) -> Span {
        let (mapping, offset) = (Arc::clone(&self.mappings[0]), ByteCount(offset));
        Span::Device { mapping, offset, bytes: ByteCount(bytes) }
    }

    /// GB/s of ten copies of a piece.
    fn rate(&self, copy: impl Fn(usize)) -> Samples {
        Samples::take(7, || {
            let start = Instant::now();
            (0..10).for_each(&copy);
            assert!(self.stream.synchronize(LONG).unwrap());
            10.0 * PIECE.0 as f64 / 1e9 / start.elapsed().as_secs_f64()
        })
    }
}

/// Copies of 256 MiB both ways, and inside the device.
fn links(report: &mut Report, scene: &mut Scene) {
    let stream = Arc::clone(&scene.stream);
    let device_span = |index: usize| Span::mapping(&scene.mappings[index]);
    let up = scene.rate(|i| stream.copy(scene.host(), device_span(i)).unwrap());
    report.add("H2D 256 MiB x 10, pinned", "rate", "GB/s", &up, Bounds::default());
    let down = scene.rate(|i| stream.copy(device_span(i), scene.host()).unwrap());
    report.add("D2H 256 MiB x 10, pinned", "rate", "GB/s", &down, Bounds::default());
    let mut inside = scene.rate(|i| stream.copy(device_span(i), device_span(i + 20)).unwrap());
    inside.0.iter_mut().for_each(|value| *value *= 2.0);
    report.add("copy inside the device, read + write", "rate", "GB/s", &inside, Bounds::default());
    scene.inside = inside.median();
}

/// The hash of all 13 GiB in parts of a size, queued on so many streams.
fn hash_all(report: &mut Report, scene: &Scene, streams: &[Arc<Stream>], mib: u64, target_ms: Option<f64>) {
    let part = ByteCount::mib(mib);
    let parts_of = |mapping: &Arc<Mapping>| {
        let mapping = Arc::clone(mapping);
        (0..PIECE.0 / part.0).map(move |index| Span::Device {
            mapping: Arc::clone(&mapping),
            offset: ByteCount(part.0 * index),
            bytes: part,
        })
    };
    let parts: Vec<_> = scene.mappings.iter().flat_map(parts_of).collect();
    let expected = scene.buffer.access(ByteCount::ZERO, PIECE, hash_bytes).unwrap();
    let total = (PIECE.0 * PIECES) as f64;
    let mut durations = Vec::new();
    let rates = Samples::take(9, || {
        let start = Instant::now();
        let tickets: Vec<_> = parts
            .iter()
            .zip(streams.iter().cycle())
            .map(|(span, stream)| stream.hash(span.clone()).unwrap())
            .collect();
        for ticket in tickets {
            let hash = ticket.wait(LONG).unwrap();
            assert!(part != PIECE || hash == expected, "a wrong hash");
        }
        let seconds = start.elapsed().as_secs_f64();
        durations.push(seconds * 1e3);
        total / 1e9 / seconds
    });
    durations.sort_by(f64::total_cmp);
    let case = format!("hash 13 GiB by {mib} MiB, streams: {}", streams.len());
    report.add(&case, "rate", "GB/s", &rates, Bounds { ceiling: Some(scene.inside), ..Bounds::default() });
    let ceiling = Some(total / 1e6 / scene.inside);
    let bounds = Bounds { target: target_ms, ceiling, ..Bounds::default() };
    report.add(&case, "time", "ms", &Samples(durations), bounds);
}

/// The hash, and what single small things cost.
fn hashes(report: &mut Report, device: &Arc<dyn Device>, scene: &Scene) {
    let streams: Vec<_> = (0..4).map(|_| Stream::create(device).unwrap()).collect();
    hash_all(report, scene, &streams[..1], 256, Some(6.0));
    hash_all(report, scene, &streams[..1], 64, None);
    hash_all(report, scene, &streams, 64, Some(6.0));
    hash_all(report, scene, &streams[..1], 2, None);
    hash_all(report, scene, &streams, 2, None);
    let of_host = Samples::take(3, || {
        let start = Instant::now();
        scene.buffer.access(ByteCount::ZERO, PIECE, |bytes| black_box(hash_bytes(bytes))).unwrap();
        PIECE.0 as f64 / 1e9 / start.elapsed().as_secs_f64()
    });
    let plain = Samples::take(3, || {
        let start = Instant::now();
        scene.buffer.access(ByteCount::ZERO, PIECE, |bytes| black_box(xxh3_64(bytes))).unwrap();
        PIECE.0 as f64 / 1e9 / start.elapsed().as_secs_f64()
    });
    let bounds = Bounds { ceiling: Some(plain.median()), ..Bounds::default() };
    report.add("hash on the host, one thread", "rate", "GB/s", &of_host, bounds);
    let stream = &scene.stream;
    let one = Samples::take(100, || {
        let start = Instant::now();
        stream.hash(scene.part(0, 4096)).unwrap().wait(LONG).unwrap();
        micros(start)
    });
    report.add("hash 4 KiB, asked and answered", "time", "us", &one, Bounds::default());
    let idle = Samples::take(200, || {
        let start = Instant::now();
        assert!(stream.synchronize(LONG).unwrap());
        micros(start)
    });
    report.add("record and wait, idle stream", "time", "us", &idle, Bounds::default());
    let queued = Samples::take(5, || {
        let start = Instant::now();
        for _ in 0..500 {
            let source = Span::host(&scene.buffer, ByteCount::ZERO, ByteCount(4096));
            stream.copy(source, scene.part(0, 4096)).unwrap();
        }
        let each = micros(start) / 500.0;
        assert!(stream.synchronize(LONG).unwrap());
        each
    });
    report.add("queue a copy of 4 KiB", "time", "us", &queued, Bounds::default());
}

/// Page-locked memory made by us, and what the driver's own allocation gives is known from MEASURED: 1.35 GiB/s.
fn host_arena(report: &mut Report, device: &Arc<dyn Device>) {
    for gib in [1_u64, 8] {
        let mut frees = Vec::new();
        let rates = Samples::take(if gib == 1 { 5 } else { 3 }, || {
            let start = Instant::now();
            let buffer = HostBuffer::allocate(device, ByteCount::gib(gib)).unwrap();
            let rate = gib as f64 / start.elapsed().as_secs_f64();
            let start = Instant::now();
            drop(buffer);
            frees.push(gib as f64 / start.elapsed().as_secs_f64());
            rate
        });
        frees.sort_by(f64::total_cmp);
        let peer = Some(("cuMemHostAlloc", 1.35));
        let target = (gib == 8).then_some(18.0);
        let bounds = Bounds { target, peer, ceiling: None };
        report.add(&format!("host memory, {gib} GiB"), "rate", "GiB/s", &rates, bounds);
        let case = format!("host memory, {gib} GiB, given back");
        report.add(&case, "rate", "GiB/s", &Samples(frees), Bounds::default());
    }
}

/// Days since the epoch as a date (Howard Hinnant's algorithm).
fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let days = i64::try_from(seconds / 86_400).unwrap() + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
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
    let mut report = Report::default();
    calls(&mut report, &device);
    growth(&mut report, &device);
    let mut scene = Scene::new(&device);
    links(&mut report, &mut scene);
    hashes(&mut report, &device, &scene);
    drop(scene);
    host_arena(&mut report, &device);
    if let Some(reason) = cuda.host_fallback() {
        println!("not page-locked: {reason}");
    }
    assert_eq!(cuda.take_errors(), [], "errors without a caller");
    let from_environment = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let (major, minor) = cuda.facts().cuda;
    let text = json!({
        "device": cuda.info().name, "driver": from_environment("SHOAL_DRIVER"),
        "cuda": format!("{major}.{minor}"), "torch": null, "python": null,
        "shoal_commit": from_environment("SHOAL_COMMIT"), "date": today(), "rows": report.rows,
    });
    if let Some(path) = from_environment("SHOAL_RESULT") {
        fs::write(path, format!("{text:#}\n")).unwrap();
    }
}
