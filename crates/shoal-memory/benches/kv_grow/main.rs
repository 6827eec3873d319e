//! How fast a KV cache grows by 16 GiB (32 layers, 2 MiB a block), from new memory and from the pool, in both layouts, against
//! the bare driver calls in the same run; and what memory stays after bursts. One JSON file in the form of `benches/results`.
//! Run by `tests/gpu/run.sh kv_grow`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program")]
#![expect(dead_code, reason = "other programs use more of what they share")]

#[path = "../sleep_wake/report.rs"]
mod report;
#[path = "../sleep_wake/scene.rs"]
mod scene;

use std::env;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use report::{Bounds, Report};
use scene::{LONG, ROUNDS, device_or_skip, ms};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_device::{Device, Frame, Mapping, Reservation};
use shoal_memory::{KvCache, KvCacheSpec, LocalBudget, ManagerOptions, MemoryManager, PoolOptions};

const BLOCK: ByteCount = ByteCount::mib(2);
/// Long enough for the driver to scrub 16 GiB that were released (decision 10).
const SCRUB: Duration = Duration::from_millis(60);
const ALL: ByteCount = ByteCount(u64::MAX);
/// How many times faster than the peer a cache with a plane a layer is to grow.
const LAYERS_OVER_PEER: f64 = 5.0;

/// kvcached's GiB/s in that layout: in the same run, where `tests/gpu/run.sh kv_peer` went before.
fn peer(order: PlaneOrder) -> (&'static str, f64) {
    let of_run = |name: &str| env::var(name).ok().and_then(|text| text.parse::<f64>().ok());
    match order {
        PlaneOrder::BlockMajor => of_run("SHOAL_KVCACHED_GROW_BLOCK")
            .map_or(("kvcached e8e6406, contiguous, 128 MiB a granule, on another day", 1016.0), |rate| {
                ("kvcached, contiguous, 128 MiB a granule, in the same run", rate)
            }),
        PlaneOrder::LayerMajor => of_run("SHOAL_KVCACHED_GROW_LAYER")
            .map_or(("kvcached e8e6406, per layer, on another day", 22.5), |rate| {
                ("kvcached, per layer, in the same run", rate)
            }),
    }
}

/// 16 GiB, or what `$SHOAL_BENCH_GIB` says.
fn growth() -> ByteCount {
    let gib = env::var("SHOAL_BENCH_GIB").ok().and_then(|text| text.parse().ok());
    ByteCount::gib(gib.unwrap_or(16))
}

fn gib_per_second(bytes: ByteCount, ms: f64) -> f64 {
    bytes.0 as f64 / f64::from(1 << 30) / ms * 1e3
}

fn manager(device: &Arc<dyn Device>, pool: ByteCount) -> Arc<MemoryManager> {
    let budget = LocalBudget::new(ByteCount(2 * growth().0));
    let mut options = ManagerOptions::new(ByteCount::mib(64), budget as _);
    options.pool = Some(PoolOptions { bytes_max: pool, idle: Duration::from_secs(30) });
    MemoryManager::new(Arc::clone(device), options).unwrap()
}

fn cache(manager: &Arc<MemoryManager>, order: PlaneOrder, granule: ByteCount) -> KvCache {
    let shape = BlockShape::Attention { tokens: 16, kv_heads: 8, head_dim: 128, window: None };
    let group = GroupSpec { name: "full".to_owned(), layers: 32, shape, element_bytes: 2 };
    let bytes = ByteCount(growth().0 + growth().0 / 2);
    let spec = CacheSpec { groups: vec![group], order, bytes, granule_bytes_max: granule };
    let mut spec = KvCacheSpec::new("kv", spec);
    spec.patience = LONG;
    // What is measured is what the caller waits for, so nobody maps ahead.
    spec.spare_bytes_max = ByteCount::ZERO;
    manager.kv_cache(spec).unwrap()
}

/// Milliseconds to be given all blocks at once, and what was mapped for them.
fn grow(cache: &KvCache) -> (f64, Vec<u32>) {
    let mut ids = vec![0_u32; usize::try_from(growth().0 / BLOCK.0).unwrap()];
    let start = Instant::now();
    assert!(cache.alloc(0, &mut ids).unwrap(), "no room");
    (ms(start), ids)
}

/// The driver's calls alone: GiB/s of making frames and mapping them, or of mapping them only.
fn bare(device: &Arc<dyn Device>, frame: ByteCount, is_made: bool) -> Vec<f64> {
    let reservation = Reservation::new(device, growth()).unwrap();
    let count = growth().0 / frame.0;
    let measure = || {
        thread::sleep(SCRUB);
        let made: Vec<_> = if is_made {
            (0..count).map(|_| Frame::create(device, frame).unwrap()).collect()
        } else {
            Vec::new()
        };
        let start = Instant::now();
        let mappings: Vec<_> = (0..count)
            .map(|index| {
                let place = ByteCount(index * frame.0);
                let taken = made.get(usize::try_from(index).unwrap()).map(Arc::clone);
                let taken = taken.unwrap_or_else(|| Frame::create(device, frame).unwrap());
                Mapping::new(&reservation, place, taken).unwrap()
            })
            .collect();
        let time = ms(start);
        drop(mappings);
        gib_per_second(growth(), time)
    };
    (0..ROUNDS).map(|_| measure()).collect()
}

fn median(values: &[f64]) -> f64 {
    report::Samples::new(values.to_vec()).median()
}

struct Case {
    name: &'static str,
    order: PlaneOrder,
    granule: ByteCount,
    /// One extent of it.
    extent: ByteCount,
    is_pooled: bool,
    /// Without one, what the layout's peer asks for.
    target: Option<f64>,
}

fn measure(report: &mut Report, device: &Arc<dyn Device>, case: &Case) {
    let ceilings = bare(device, case.extent, case.is_pooled);
    let ceiling = median(&ceilings);
    let what = if case.is_pooled { "mapped" } else { "made and mapped" };
    report.add(&format!("bare calls, {} {what}", case.extent), "GiB/s", ceilings, Bounds::default());
    let manager = manager(device, if case.is_pooled { growth() } else { ByteCount::ZERO });
    let cache = cache(&manager, case.order, case.granule);
    let mut rates = Vec::new();
    // The first fills the pool.
    for round in 0..=ROUNDS {
        thread::sleep(SCRUB);
        let (time, ids) = grow(&cache);
        if round > 0 {
            rates.push(gib_per_second(growth(), time));
        }
        cache.free(0, &ids).unwrap();
        let start = Instant::now();
        while !cache.usage().mapped.is_zero() {
            assert!(start.elapsed() < LONG, "its memory does not go back");
            thread::sleep(Duration::from_millis(2));
        }
        println!("    {} round {round}: {time:.2} ms", case.name);
    }
    let peer = peer(case.order);
    let target = case.target.unwrap_or(LAYERS_OVER_PEER * peer.1);
    let bounds = Bounds { ceiling: Some(ceiling), target: Some(target), peer: Some(peer) };
    let granule = case.granule;
    report.add(&format!("grow, {}, granule {granule}", case.name), "GiB/s", rates, bounds);
    drop(cache);
    // What the pool holds goes, so that the next case begins with nothing.
    manager.reclaim(ALL, LONG, "the next case").unwrap();
}

/// What is mapped over what is live, without and with compaction.
fn footprint(report: &mut Report, device: &Arc<dyn Device>) {
    let manager = manager(device, ByteCount::ZERO);
    let live = usize::try_from(ByteCount::gib(1).0 / BLOCK.0).unwrap();
    let most = usize::try_from(growth().0 / BLOCK.0).unwrap().min(6 * live);
    for trace in ["every second block leaves", "whole requests leave", "blocks leave at random"] {
        let mut seed = 7_u64;
        let mut random = move |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(seed >> 33).unwrap() % below
        };
        let cache = cache(&manager, PlaneOrder::BlockMajor, ByteCount::mib(256));
        let mut requests: Vec<Vec<u32>> = Vec::new();
        let peak = if trace.starts_with("every") { (2 * live).min(most) } else { most };
        while requests.iter().map(Vec::len).sum::<usize>() < peak {
            let mut ids = vec![0; 4 + random(60)];
            assert!(cache.alloc(0, &mut ids).unwrap(), "no room");
            requests.push(ids);
        }
        let mut order: Vec<u32> = requests.concat();
        if trace.starts_with("every") {
            order = order.into_iter().enumerate().filter(|(at, _)| at % 2 == 1).map(|(_, id)| id).collect();
        } else {
            if trace.starts_with("whole") {
                for at in (1..requests.len()).rev() {
                    requests.swap(at, random(at + 1));
                }
                order = requests.concat();
            } else {
                for at in (1..order.len()).rev() {
                    order.swap(at, random(at + 1));
                }
            }
            order.truncate(order.len() - live);
        }
        cache.free(0, &order).unwrap();
        let settled = |cache: &KvCache| {
            let start = Instant::now();
            let mut before = ByteCount::ZERO;
            loop {
                let usage = cache.usage();
                // What is on its way out counts as mapped, and not as empty.
                if (usage.empty.is_zero() && usage.mapped == before) || start.elapsed() > LONG {
                    return usage.mapped.0 as f64 / usage.live.0 as f64;
                }
                before = usage.mapped;
                thread::sleep(Duration::from_millis(400));
            }
        };
        let ceiling = Some(1.0);
        let plain = settled(&cache);
        let at = cache.usage().live;
        let bounds = Bounds { ceiling, ..Bounds::default() };
        report.add(&format!("mapped over live of {at}, {trace}"), "x", vec![plain], bounds);
        let start = Instant::now();
        let moves = cache.compact(0, usize::MAX, LONG).unwrap();
        let time = ms(start);
        println!("    {} blocks moved in {time:.1} ms", moves.len());
        let target = (at >= ByteCount::gib(1)).then_some(1.05);
        let bounds = Bounds { ceiling, target, ..Bounds::default() };
        report.add(&format!("the same with compaction, {trace}"), "x", vec![settled(&cache)], bounds);
        report.add(&format!("compaction, {trace}"), "ms", vec![time], Bounds::default());
        cache.check_invariants().unwrap();
        drop(cache);
    }
}

fn main() {
    let Some((device, cuda)) = device_or_skip() else { return };
    let mut report = Report::default();
    let (block, mib) = (PlaneOrder::BlockMajor, ByteCount::mib);
    let plain = Case {
        name: "new memory",
        order: block,
        granule: mib(256),
        extent: mib(256),
        is_pooled: false,
        target: Some(2000.0),
    };
    let cases = [
        Case { granule: mib(64), extent: mib(64), target: Some(1000.0), ..plain },
        Case {
            name: "pooled memory",
            granule: mib(64),
            extent: mib(64),
            is_pooled: true,
            target: Some(1300.0),
            ..plain
        },
        Case { name: "pooled memory", is_pooled: true, target: Some(1300.0), ..plain },
        Case {
            name: "new memory, a plane a layer",
            order: PlaneOrder::LayerMajor,
            granule: mib(512),
            extent: mib(16),
            target: None,
            ..plain
        },
        Case {
            name: "pooled memory, a plane a layer",
            order: PlaneOrder::LayerMajor,
            granule: mib(512),
            extent: mib(16),
            is_pooled: true,
            target: None,
        },
    ];
    for case in std::iter::once(&plain).chain(&cases) {
        measure(&mut report, &device, case);
    }
    footprint(&mut report, &device);
    assert_eq!(device.take_errors(), [], "errors without a caller");
    if let Some(cuda) = cuda {
        report.write(&cuda);
    }
}
