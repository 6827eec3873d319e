//! How fast 13 GiB sleep and wake on this GPU, against the link measured in the same run. One JSON file in the form of
//! `benches/results`. Run by `tests/gpu/run.sh sleep_wake`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program")]

mod profile;
mod report;
mod scene;

use profile::profile;
use report::{Bounds, Report};
use scene::{Link, ROUNDS, World, device_or_skip, link, rate, size, sleep, wake, write_everywhere};
use shoal_core::bytes::ByteCount;
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
    let world = World::new(&device, ByteCount(3 * size().0));
    staged_region(&mut report, &world, &link);
    written_region(&mut report, &world, &link);
    drop(world);
    assert_eq!(device.take_errors(), [], "errors without a caller");
    if let Some(cuda) = cuda {
        report.write(&cuda);
    }
}
