//! How fast 13 GiB sleep and wake on this GPU, against the link measured in the same run. One JSON file in the form of
//! `benches/results`. Run by `tests/gpu/run.sh sleep_wake`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program")]

mod profile;
mod report;
mod scene;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use profile::profile;
use report::{Bounds, Report};
use scene::{
    LONG, Link, PIECE, ROUNDS, World, device_or_skip, link, ms, rate, size, sleep, wake, write_everywhere,
};
use shoal_core::bytes::ByteCount;
use shoal_device::{Device, Frame, HostBuffer, Mapping, Reservation, Span, Stream};
use shoal_memory::Region;

fn staged_region(report: &mut Report, world: &World, link: &Link) {
    let region = world.staged("staged");
    let wake_bounds = Bounds {
        ceiling: Some(link.up),
        target: Some(0.95 * link.up),
        peer: Some(("torch_memory_saver 0.0.10, retained", 50.0)),
    };
    let sleep_bounds = Bounds {
        target: Some(30.0),
        peer: Some(("torch_memory_saver 0.0.10, retained", 290.0)),
        ceiling: None,
    };
    report.add("wake, first", "GB/s", vec![rate(size(), wake(&region))], wake_bounds);
    report.add("sleep, clean, hash checked, first", "ms", vec![sleep(&region, false)], sleep_bounds);
    let (mut wakes, mut sleeps, mut trusting) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        wakes.push(rate(size(), wake(&region)));
        sleeps.push(sleep(&region, false));
        wakes.push(rate(size(), wake(&region)));
        trusting.push(sleep(&region, true));
    }
    report.add("wake, later", "GB/s", wakes, wake_bounds);
    report.add("sleep, clean, hash checked, later", "ms", sleeps, sleep_bounds);
    report.add("sleep, trusted to be clean", "ms", trusting, Bounds::default());
    profile("a wake", &world.faults, || {
        wake(&region);
    });
    profile("a clean sleep", &world.faults, || {
        sleep(&region, false);
    });
    after_sleeps(report, &region, link);
    let mut dirty = Vec::new();
    for value in 0..4 {
        wake(&region);
        write_everywhere(&region, 10 + value);
        dirty.push(rate(size(), sleep(&region, false)));
    }
    let dirty_bounds =
        Bounds { ceiling: Some(link.down), target: Some(0.92 * link.down), ..Bounds::default() };
    report.add("sleep, dirty, later", "GB/s", dirty, dirty_bounds);
    wake(&region);
    write_everywhere(&region, 30);
    profile("a dirty sleep", &world.faults, || {
        sleep(&region, false);
    });
}

/// The driver scrubs memory that was given back, after the call that gave it back: a wake that comes at once shares the
/// device's copy engines with that.
fn after_sleeps(report: &mut Report, region: &Region, link: &Link) {
    for pause_ms in [0, 20, 250] {
        let rates = (0..ROUNDS).map(|_| {
            wake(region);
            sleep(region, true);
            thread::sleep(Duration::from_millis(pause_ms));
            let rate = rate(size(), wake(region));
            sleep(region, true);
            rate
        });
        let bounds = Bounds { ceiling: Some(link.up), ..Bounds::default() };
        report.add(&format!("wake, {pause_ms} ms after a sleep"), "GB/s", rates.collect(), bounds);
    }
}

/// What the driver's scrubbing costs by itself: loads into memory that stays, and the making of as much memory, at once
/// after as much was given back.
fn beside_scrubbing(report: &mut Report, device: &Arc<dyn Device>) {
    let count = size().0 / PIECE.0;
    let reservation = Reservation::new(device, ByteCount(2 * size().0)).unwrap();
    let place = |index: u64| {
        let frame = Frame::create(device, PIECE).unwrap();
        Mapping::new(&reservation, ByteCount(PIECE.0 * index), frame).unwrap()
    };
    let kept: Vec<_> = (0..count).map(place).collect();
    let buffers: Vec<_> = (0..count).map(|_| HostBuffer::allocate(device, PIECE).unwrap()).collect();
    let stream = Stream::create(device).unwrap();
    let fill = || {
        let start = Instant::now();
        for (buffer, mapping) in buffers.iter().zip(&kept) {
            stream.copy(Span::host(buffer, ByteCount::ZERO, PIECE), Span::mapping(mapping)).unwrap();
        }
        assert!(stream.synchronize(LONG).unwrap());
        rate(size(), ms(start))
    };
    fill();
    let quiet: Vec<_> = (0..ROUNDS).map(|_| fill()).collect();
    let (mut beside, mut makes) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        drop((count..2 * count).map(place).collect::<Vec<_>>());
        beside.push(fill());
        thread::sleep(Duration::from_millis(500));
        drop((count..2 * count).map(place).collect::<Vec<_>>());
        let start = Instant::now();
        let made: Vec<_> = (count..2 * count).map(place).collect();
        makes.push(ms(start));
        drop(made);
        thread::sleep(Duration::from_millis(500));
    }
    report.add("loads, quiet", "GB/s", quiet, Bounds::default());
    report.add("loads, at once after as much was given back", "GB/s", beside, Bounds::default());
    report.add("making and mapping as much, at once after it was given back", "ms", makes, Bounds::default());
}

/// Written on the device, as an engine does.
fn written(world: &World, name: &str) -> Region {
    let region = world.region(name);
    region.commit(ByteCount::ZERO, size()).unwrap();
    write_everywhere(&region, 1);
    region
}

fn written_region(report: &mut Report, world: &World, link: &Link) {
    let region = written(world, "written");
    let bounds = Bounds { ceiling: Some(link.down), ..Bounds::default() };
    let mut first = 0.0;
    profile("the first sleep of what was written", &world.faults, || first = sleep(&region, false));
    report.add("sleep, written on the device, unsealed, first", "GB/s", vec![rate(size(), first)], bounds);
    let mut later = Vec::new();
    for _ in 0..3 {
        wake(&region);
        later.push(rate(size(), sleep(&region, false)));
    }
    report.add("sleep, written on the device, unsealed, later", "GB/s", later, bounds);
}

fn main() {
    let Some((device, cuda)) = device_or_skip() else { return };
    let mut report = Report::default();
    let link = link(&mut report, &device);
    println!("both {:.1}", link.both);
    beside_scrubbing(&mut report, &device);
    let world = World::new(&device, ByteCount(3 * size().0));
    staged_region(&mut report, &world, &link);
    written_region(&mut report, &world, &link);
    drop(world);
    assert_eq!(device.take_errors(), [], "errors without a caller");
    if let Some(cuda) = cuda {
        report.write(&cuda);
    }
}
