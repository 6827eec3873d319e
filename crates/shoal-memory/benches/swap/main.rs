//! How fast one region of 13 GiB takes the place of another in the room of one, against both directions of the link at once,
//! measured in the same run. One JSON file in the form of `benches/results`. Run by `tests/gpu/run.sh swap`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program")]

#[path = "../sleep_wake/profile.rs"]
mod profile;
#[path = "../sleep_wake/report.rs"]
mod report;
#[path = "../sleep_wake/scene.rs"]
mod scene;

use std::time::Instant;

use profile::profile;
use report::{Bounds, Report};
use scene::{
    LONG, ROUNDS, World, device_or_skip, link, ms, places, rate, size, sleep, wake, write_everywhere,
};
use shoal_core::bytes::ByteCount;
use shoal_memory::Region;

fn swap(world: &World, out: &Region, into: &Region) -> (f64, ByteCount) {
    let start = Instant::now();
    let report = world.manager.swap(out, into, false, LONG).unwrap();
    (ms(start), report.out.copied + report.into.copied)
}

/// The bytes that `write_everywhere` left.
fn check(region: &Region, value: u8) {
    for place in places() {
        let mut found = [0; 4];
        region.read(place, &mut found).unwrap();
        assert_eq!(found, [value, 1, 2, 3], "{} at {place}", region.name());
    }
}

fn main() {
    let Some((device, cuda)) = device_or_skip() else { return };
    let mut report = Report::default();
    let link = link(&mut report, &device);
    println!("up {:.1}, down {:.1}, both {:.1}", link.up, link.down, link.both);
    // The room of one.
    let world = World::new(&device, size());
    let regions = [world.staged("one"), world.staged("two")];
    let both = Bounds { ceiling: Some(link.both), target: Some(0.94 * link.both), ..Bounds::default() };
    wake(&regions[0]);
    // Each is written while it is on the device, so that each leaves dirty.
    let (mut on, mut values) = (0, [1, 0]);
    write_everywhere(&regions[on], values[on]);
    let (mut rates, mut times) = (Vec::new(), Vec::new());
    for round in 0..=2 * ROUNDS {
        let (time, moved) = swap(&world, &regions[on], &regions[1 - on]);
        assert_eq!(moved, size() + size());
        on = 1 - on;
        if values[on] != 0 {
            check(&regions[on], values[on]);
        }
        values[on] = 10 + u8::try_from(round).unwrap();
        write_everywhere(&regions[on], values[on]);
        println!("    swap {round}: {time:.1} ms, {:.2} GB/s", rate(moved, time));
        rates.push(rate(moved, time));
        times.push(time);
    }
    report.add("swap, dirty out, first, both directions", "GB/s", rates.drain(..1).collect(), both);
    report.add("swap, dirty out, later, both directions", "GB/s", rates, both);
    report.add("swap, dirty out, later", "ms", times.split_off(1), Bounds::default());
    profile("a swap", &world.faults, || {
        swap(&world, &regions[on], &regions[1 - on]);
    });
    on = 1 - on;
    write_everywhere(&regions[on], 90);
    let after: Vec<f64> = (0..3).map(|_| one_after_the_other(&regions[on], &regions[1 - on])).collect();
    report.add("sleep, dirty, then wake, of the same", "ms", after, Bounds::default());
    let up = Bounds { ceiling: Some(link.up), target: Some(0.95 * link.up), ..Bounds::default() };
    swap(&world, &regions[on], &regions[1 - on]);
    on = 1 - on;
    let mut clean = Vec::new();
    for _ in 0..ROUNDS {
        let (time, moved) = swap(&world, &regions[on], &regions[1 - on]);
        assert_eq!(moved, size(), "nothing is written, so nothing is copied down");
        clean.push(rate(moved, time));
        on = 1 - on;
    }
    report.add("swap, clean out, hash checked", "GB/s", clean, up);
    drop((regions, world));
    assert_eq!(device.take_errors(), [], "errors without a caller");
    if let Some(cuda) = cuda {
        report.write(&cuda);
    }
}

/// What a swap replaces; afterwards the first is on the device again, written.
fn one_after_the_other(one: &Region, two: &Region) -> f64 {
    let start = Instant::now();
    sleep(one, false);
    wake(two);
    let time = ms(start);
    sleep(two, true);
    wake(one);
    write_everywhere(one, 51);
    time
}
