//! What growing and shrinking costs through [`Region::commit`] and [`Region::decommit`], with the frame pool and without,
//! against the driver's own price of mapping and unmapping, measured in the same run. One JSON file in the form of
//! `benches/results`. Run by `tests/gpu/run.sh churn`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program")]

#[path = "../sleep_wake/profile.rs"]
mod profile;
#[path = "../sleep_wake/report.rs"]
mod report;
#[expect(dead_code, reason = "shared with programs that use more of it")]
#[path = "../sleep_wake/scene.rs"]
mod scene;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use profile::profile;
use report::{Bounds, Report};
use scene::{device_or_skip, size};
use shoal_core::bytes::ByteCount;
use shoal_core::extent::ExtentRule;
use shoal_core::protocol::LeaseKind;
use shoal_device::{Device, FaultDevice, Frame, Mapping, Reservation};
use shoal_memory::{Backing, LocalBudget, ManagerOptions, MemoryManager, PoolOptions, Region, RegionSpec};

const GIB: f64 = (1_u64 << 30) as f64;
/// Long enough for the driver to scrub 16 GiB that were released, which takes it some 26 ms (decision 10), and too short
/// for clocks to fall.
const SCRUB: Duration = Duration::from_millis(60);
/// More than the memory of the device holds, so that a growth time and again meets its end of scrubbed memory.
const ROUNDS: usize = 9;
/// What growing from new memory is to reach of the bare calls, in turn with it (docs/decisions/0014).
const SHARE: f64 = 0.95;
/// GiB/s of growing from the pool.
const POOLED: f64 = 1300.0;
const HOUR: Duration = Duration::from_hours(1);

fn manager(device: &Arc<dyn Device>, has_pool: bool) -> Arc<MemoryManager> {
    let mut options = ManagerOptions::new(ByteCount::gib(1), LocalBudget::new(ByteCount::gib(64)) as _);
    let all = PoolOptions { bytes_max: ByteCount::gib(64), idle: HOUR };
    options.pool = Some(if has_pool { all } else { PoolOptions::off() });
    MemoryManager::new(Arc::clone(device), options).unwrap()
}

fn region(manager: &Arc<MemoryManager>, bytes: ByteCount, extent: ByteCount) -> Region {
    let spec = RegionSpec {
        name: "churn".to_owned(),
        bytes,
        kind: LeaseKind::Kv,
        extent_rule: ExtentRule { pages_max: extent.pages(), pieces_min: 1, ..ExtentRule::default() },
        backing: Backing::Keep,
    };
    manager.region(spec).unwrap()
}

fn us(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}

/// One extent given up and taken again and again: microseconds of a commit and of a decommit.
fn churn(region: &Region, bytes: ByteCount, rounds: u32) -> (Vec<f64>, Vec<f64>) {
    let (mut up, mut down) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let start = Instant::now();
        region.commit(ByteCount::ZERO, bytes).unwrap();
        let committed = us(start);
        let start = Instant::now();
        region.decommit(ByteCount::ZERO, bytes).unwrap();
        // The first ones fill the pool and load kernels.
        if round >= 3 {
            up.push(committed);
            down.push(us(start));
        }
    }
    (up, down)
}

/// Microseconds of mapping and of unmapping a frame that is there: what no pool can do without.
fn bare(device: &Arc<dyn Device>, bytes: ByteCount, rounds: u32) -> (f64, f64) {
    let reservation = Reservation::new(device, bytes).unwrap();
    let frame = Frame::create(device, bytes).unwrap();
    let (mut up, mut down) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let start = Instant::now();
        let mapping = Mapping::new(&reservation, ByteCount::ZERO, Arc::clone(&frame)).unwrap();
        up.push(us(start));
        let start = Instant::now();
        drop(mapping);
        down.push(us(start));
    }
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    (median(up), median(down))
}

fn churn_all(report: &mut Report, device: &Arc<dyn Device>) {
    for mib in [2, 16, 64, 256] {
        let bytes = ByteCount::mib(mib);
        let rounds = if mib > 64 { 43 } else { 103 };
        let (map, unmap) = bare(device, bytes, rounds);
        let mut before: Option<(f64, f64)> = None;
        for has_pool in [false, true] {
            let manager = manager(device, has_pool);
            let region = region(&manager, bytes, bytes);
            let (up, down) = churn(&region, bytes, rounds);
            let medians = [&up, &down].map(|values| report::Samples::new(values.clone()).median());
            let with = if has_pool { "with the pool" } else { "without a pool" };
            let bounds = |ceiling, peer: Option<f64>| Bounds {
                ceiling: Some(ceiling),
                peer: peer.map(|peer| ("without a pool", peer)),
                target: None,
            };
            report.add(&format!("commit {mib} MiB, {with}"), "us", up, bounds(map, before.map(|p| p.0)));
            report.add(
                &format!("decommit {mib} MiB, {with}"),
                "us",
                down,
                bounds(unmap, before.map(|p| p.1)),
            );
            before = Some((medians[0], medians[1]));
        }
    }
}

/// GiB/s of growing by `total` in one call.
fn grow(region: &Region, total: ByteCount) -> f64 {
    let start = Instant::now();
    region.commit(ByteCount::ZERO, total).unwrap();
    total.0 as f64 / GIB / start.elapsed().as_secs_f64()
}

fn shrink(region: &Region, total: ByteCount) {
    region.decommit(ByteCount::ZERO, total).unwrap();
}

/// What the driver takes for it: creating and mapping, or mapping alone.
fn grow_bare(device: &Arc<dyn Device>, total: ByteCount, extent: ByteCount) -> (f64, f64) {
    let reservation = Reservation::new(device, total).unwrap();
    let rate = |start: Instant| total.0 as f64 / GIB / start.elapsed().as_secs_f64();
    let place = |index: u64, frame| Mapping::new(&reservation, ByteCount(extent.0 * index), frame).unwrap();
    let count = total.0 / extent.0;
    let start = Instant::now();
    let mappings: Vec<_> =
        (0..count).map(|index| place(index, Frame::create(device, extent).unwrap())).collect();
    let new = rate(start);
    let frames: Vec<_> = mappings.iter().map(|mapping| Arc::clone(mapping.frame())).collect();
    drop(mappings);
    let start = Instant::now();
    let mappings: Vec<_> =
        frames.iter().zip(0..).map(|(frame, index)| place(index, Arc::clone(frame))).collect();
    let pooled = rate(start);
    drop((mappings, frames));
    (new, pooled)
}

/// Without a pool each growth comes from memory that the driver has scrubbed, or at once after a shrink, time and again:
/// then the device runs out of scrubbed memory, and making a frame waits for it.
fn growth(report: &mut Report, device: &Arc<dyn Device>) {
    let total = ByteCount::gib((size().0 / ByteCount::gib(1).0).next_multiple_of(16));
    let gib = total.0 / ByteCount::gib(1).0;
    let peer = Some(("kvcached e8e6406, 128 MiB granule", 1016.0));
    for mib in [64, 256] {
        let extent = ByteCount::mib(mib);
        let mut pooled_ceiling = None;
        for (when, rest) in [("", SCRUB), (", time and again", Duration::ZERO)] {
            let manager = manager(device, false);
            let region = region(&manager, total, extent);
            let (mut bare, mut new, mut shares) = (Vec::new(), Vec::new(), Vec::new());
            thread::sleep(SCRUB);
            for _ in 0..ROUNDS {
                thread::sleep(rest);
                let alone = grow_bare(device, total, extent);
                thread::sleep(rest);
                let rate = grow(&region, total);
                shrink(&region, total);
                new.push(rate);
                shares.push(rate / alone.0);
                bare.push(alone);
            }
            let median = |values: Vec<f64>| report::Samples::new(values).median();
            let ceiling = Some(median(bare.iter().map(|pair| pair.0).collect()));
            pooled_ceiling.get_or_insert_with(|| median(bare.iter().map(|pair| pair.1).collect()));
            let case = format!("{gib} GiB, new {mib} MiB frames{when}");
            report.add(&format!("grow {case}"), "GiB/s", new, Bounds { ceiling, peer, target: None });
            let target = (!rest.is_zero()).then_some(SHARE);
            let bounds = Bounds { ceiling: Some(1.0), peer: None, target };
            report.add(&format!("grow over bare calls, {case}"), "share", shares, bounds);
        }
        growth_calls(device, total, extent);
        let manager = manager(device, true);
        let region = region(&manager, total, extent);
        for _ in 0..2 {
            grow(&region, total);
            shrink(&region, total);
        }
        let pooled = (0..ROUNDS).map(|_| {
            let rate = grow(&region, total);
            shrink(&region, total);
            rate
        });
        let bounds = Bounds { ceiling: pooled_ceiling, peer, target: Some(POOLED) };
        report.add(&format!("grow {gib} GiB, pooled {mib} MiB frames"), "GiB/s", pooled.collect(), bounds);
        assert!(manager.pool_usage().taken > 0, "the pool was not used");
    }
}

/// Where the time of growing from new frames goes, call by call.
fn growth_calls(device: &Arc<dyn Device>, total: ByteCount, extent: ByteCount) {
    let noted = FaultDevice::new(Arc::clone(device));
    let manager = manager(&(Arc::clone(&noted) as Arc<dyn Device>), false);
    let region = region(&manager, total, extent);
    for round in 0..4 {
        profile(&format!("growth {round} by frames of {extent}"), &noted, || {
            grow(&region, total);
        });
        profile(&format!("shrinking {round}"), &noted, || shrink(&region, total));
    }
}

/// Room for blocks of an engine that comes and goes while a region of another size does too: what a pool of the usual size
/// is worth.
fn mixed(report: &mut Report, device: &Arc<dyn Device>) {
    for has_pool in [false, true] {
        let mut options = ManagerOptions::new(ByteCount::gib(1), LocalBudget::new(ByteCount::gib(64)) as _);
        options.pool = (!has_pool).then(PoolOptions::off);
        let manager = MemoryManager::new(Arc::clone(device), options).unwrap();
        let region = region(&manager, ByteCount::gib(4), ByteCount::mib(64));
        let mut state = 7_u64;
        let mut steps = Vec::new();
        for step in 0..400_u64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (from, bytes) = ((state >> 33) % 60, 2 + (state >> 50) % 60);
            let from = ByteCount(from * ByteCount::mib(64).0);
            let start = Instant::now();
            if step % 2 == 0 {
                region.commit(from, ByteCount::mib(bytes)).unwrap();
            } else {
                region.decommit(from, ByteCount::mib(128)).unwrap();
            }
            steps.push(us(start));
        }
        let with = if has_pool { "with the usual pool" } else { "without a pool" };
        report.add(&format!("random growths and shrinks, {with}"), "us", steps, Bounds::default());
        manager.check_invariants().unwrap();
    }
}

fn main() {
    let Some((device, cuda)) = device_or_skip() else { return };
    let mut report = Report::default();
    churn_all(&mut report, &device);
    mixed(&mut report, &device);
    growth(&mut report, &device);
    assert!(device.memory().unwrap().used_by_this_process.is_zero(), "memory is left");
    assert_eq!(device.take_errors(), [], "errors without a caller");
    if let Some(cuda) = cuda {
        report.write(&cuda);
    }
}
