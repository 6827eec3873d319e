//! How fast a KV cache grows by 16 GiB (32 layers, 2 MiB a block), from new memory and from the pool, in both layouts, against
//! the bare driver calls in the same run, in turn with them; what a caller waits whose memory is mapped ahead; and what
//! memory stays after bursts. One JSON file in the form of `benches/results`. Run by `tests/gpu/run.sh kv_grow`.
//!
//! Driver calls may take another time on a thread that has slept than on one that was busy, as an engine's is that needs
//! much memory: either is measured. What growing from new memory is held to is a share of the bare calls (docs/decisions/0014).

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
/// What growing from new memory is to reach of the bare calls.
const SHARE: f64 = 0.95;
/// An engine's steps, and what each of them takes: 25 GiB/s.
const STEP: Duration = Duration::from_millis(5);
const STEP_BYTES: ByteCount = ByteCount::mib(128);
/// How many times less an engine shall wait whose memory is mapped ahead.
const AHEAD_TIMES: f64 = 2.0;
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

/// What is measured is what the caller waits for, so nobody maps ahead.
fn cache(manager: &Arc<MemoryManager>, order: PlaneOrder, granule: ByteCount) -> KvCache {
    spared(manager, order, granule, ByteCount::ZERO)
}

fn spared(manager: &Arc<MemoryManager>, order: PlaneOrder, granule: ByteCount, spare: ByteCount) -> KvCache {
    let shape = BlockShape::Attention { tokens: 16, kv_heads: 8, head_dim: 128, window: None };
    let group = GroupSpec { name: "full".to_owned(), layers: 32, shape, element_bytes: 2 };
    let bytes = ByteCount(growth().0 + growth().0 / 2);
    let spec = CacheSpec { groups: vec![group], order, bytes, granule_bytes_max: granule };
    let mut spec = KvCacheSpec::new("kv", spec);
    spec.patience = LONG;
    spec.spare_bytes_max = spare;
    manager.kv_cache(spec).unwrap()
}

/// Milliseconds to be given all blocks at once, and what was mapped for them.
fn grow(cache: &KvCache) -> (f64, Vec<u32>) {
    let mut ids = vec![0_u32; usize::try_from(growth().0 / BLOCK.0).unwrap()];
    let start = Instant::now();
    assert!(cache.alloc(0, &mut ids).unwrap(), "no room");
    (ms(start), ids)
}

/// What the thread that grows did before.
#[derive(Clone, Copy)]
enum Thread {
    Busy,
    Asleep,
}

impl Thread {
    const fn name(self) -> &'static str {
        match self {
            Self::Busy => "busy thread",
            Self::Asleep => "thread that slept",
        }
    }

    fn pass(self, time: Duration) {
        match self {
            Self::Asleep => thread::sleep(time),
            Self::Busy => {
                let start = Instant::now();
                while start.elapsed() < time {
                    std::hint::spin_loop();
                }
            }
        }
    }
}

/// The driver's calls alone: GiB/s of making frames and mapping them, or of mapping those that are made already.
fn bare(
    device: &Arc<dyn Device>,
    reservation: &Arc<Reservation>,
    frame: ByteCount,
    is_pooled: bool,
    thread: Thread,
) -> f64 {
    let count = growth().0 / frame.0;
    let create = || Frame::create(device, frame).unwrap();
    let mut made: Vec<_> = (0..if is_pooled { count } else { 0 }).map(|_| create()).collect();
    thread.pass(SCRUB);
    let start = Instant::now();
    let mappings: Vec<_> = (0..count)
        .map(|index| {
            let place = ByteCount(index * frame.0);
            Mapping::new(reservation, place, made.pop().unwrap_or_else(create)).unwrap()
        })
        .collect();
    let time = ms(start);
    drop(mappings);
    gib_per_second(growth(), time)
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
    /// GiB/s. What is new is held to a share of the bare calls beside it, as a rate says which machine it was (decision 14).
    target: Option<f64>,
}

fn measure(report: &mut Report, device: &Arc<dyn Device>, case: &Case) {
    let what = if case.is_pooled { "mapped" } else { "made and mapped" };
    let peer = peer(case.order);
    let manager = manager(device, if case.is_pooled { growth() } else { ByteCount::ZERO });
    let cache = cache(&manager, case.order, case.granule);
    let reservation = Reservation::new(device, growth()).unwrap();
    for thread in [Thread::Busy, Thread::Asleep] {
        let (mut bares, mut rates, mut shares) = (Vec::new(), Vec::new(), Vec::new());
        // The first fills the pool.
        for round in 0..=ROUNDS {
            let alone = bare(device, &reservation, case.extent, case.is_pooled, thread);
            thread.pass(SCRUB);
            let (time, ids) = grow(&cache);
            let rate = gib_per_second(growth(), time);
            cache.free(0, &ids).unwrap();
            wait_for_its_memory(&cache);
            println!("    {} round {round}: {time:.2} ms, {rate:.0} of {alone:.0} GiB/s", case.name);
            if round > 0 {
                bares.push(alone);
                rates.push(rate);
                shares.push(rate / alone);
            }
        }
        let (granule, said) = (case.granule, thread.name());
        let bounds = Bounds { ceiling: Some(median(&bares)), target: case.target, peer: Some(peer) };
        report.add(&format!("bare calls, {} {what}, {said}", case.extent), "GiB/s", bares, Bounds::default());
        report.add(&format!("grow, {}, granule {granule}, {said}", case.name), "GiB/s", rates, bounds);
        let target = (!case.is_pooled).then_some(SHARE);
        let bounds = Bounds { ceiling: Some(1.0), target, peer: None };
        report.add(
            &format!("grow over bare calls, {}, granule {granule}, {said}", case.name),
            "share",
            shares,
            bounds,
        );
    }
    drop(cache);
    // What the pool holds goes, so that the next case begins with nothing.
    manager.reclaim(ALL, LONG, "the next case").unwrap();
}

fn wait_for_its_memory(cache: &KvCache) {
    let start = Instant::now();
    while !cache.usage().mapped.is_zero() {
        assert!(start.elapsed() < LONG, "its memory does not go back");
        thread::sleep(Duration::from_millis(2));
    }
}

/// What longer handles would bring: extents end at 256 MiB.
fn longer(report: &mut Report, device: &Arc<dyn Device>) {
    let reservation = Reservation::new(device, growth()).unwrap();
    for frame in [ByteCount::mib(512), ByteCount::gib(1)] {
        if growth() < frame {
            continue;
        }
        let rates = (0..ROUNDS).map(|_| bare(device, &reservation, frame, false, Thread::Busy)).collect();
        report.add(
            &format!("bare calls, {frame} made and mapped, busy thread"),
            "GiB/s",
            rates,
            Bounds::default(),
        );
    }
}

/// One growth of an engine that takes 128 MiB every 5 ms until it has all, from nothing: microseconds of each call.
fn steps(manager: &Arc<MemoryManager>, spare: ByteCount) -> Vec<f64> {
    let cache = spared(manager, PlaneOrder::BlockMajor, ByteCount::mib(256), spare);
    let mut ids = vec![0_u32; usize::try_from(STEP_BYTES.0 / BLOCK.0).unwrap()];
    let waits = (0..growth().0 / STEP_BYTES.0).map(|_| {
        let start = Instant::now();
        assert!(cache.alloc(0, &mut ids).unwrap(), "no room");
        let wait = ms(start) * 1e3;
        Thread::Busy.pass(STEP.saturating_sub(start.elapsed()));
        wait
    });
    waits.collect()
}

/// What the first call of a growth pays that later ones do not: the bare calls of one step, first and second in addresses that
/// are new, with as much memory given back a moment before as a round of [`ahead`] leaves, and with none.
fn firsts(report: &mut Report, device: &Arc<dyn Device>) {
    for (said, given_back) in [("", ByteCount::ZERO), (", as much given back before", growth())] {
        // By call: first made, first mapped, second made, second mapped.
        let mut times: [Vec<f64>; 4] = Default::default();
        for round in 0..=ROUNDS {
            if !given_back.is_zero() {
                let before = Reservation::new(device, given_back).unwrap();
                bare(device, &before, ByteCount::mib(256), false, Thread::Busy);
            }
            Thread::Busy.pass(SCRUB);
            let reservation = Reservation::new(device, ByteCount(growth().0 + growth().0 / 2)).unwrap();
            let mut mappings = Vec::new();
            for call in 0..2 {
                let start = Instant::now();
                let frame = Frame::create(device, STEP_BYTES).unwrap();
                let made = Instant::now();
                mappings.push(Mapping::new(&reservation, ByteCount(call * STEP_BYTES.0), frame).unwrap());
                let spans = [made - start, made.elapsed()];
                for (at, span) in spans.into_iter().enumerate().filter(|_| round > 0) {
                    times[2 * usize::try_from(call).unwrap() + at].push(span.as_secs_f64() * 1e6);
                }
            }
        }
        let calls =
            ["first", "second"].into_iter().flat_map(|call| ["made", "mapped"].map(|what| (call, what)));
        for ((call, what), times) in calls.zip(times) {
            let case = format!("bare calls, {STEP_BYTES} {what}, the {call} in new addresses{said}");
            report.add(&case, "us", times, Bounds::default());
        }
    }
}

/// What an engine waits that grows steadily and says nothing of it: mapped when it asks, and ahead of that, in turn.
fn ahead(report: &mut Report, device: &Arc<dyn Device>) {
    let manager = manager(device, ByteCount::ZERO);
    let arms = [("nothing mapped ahead", ByteCount::ZERO), ("mapped ahead", ByteCount::gib(2))];
    let mut waits = [Vec::new(), Vec::new()];
    let mut rates = [Vec::new(), Vec::new()];
    let mut firsts = [Vec::new(), Vec::new()];
    for round in 0..=ROUNDS {
        for (arm, (_, spare)) in arms.iter().enumerate() {
            // A cache of its own: what the round before has taken is no demand of this one.
            let calls = steps(&manager, *spare);
            manager.reclaim(ALL, LONG, "the next round").unwrap();
            Thread::Busy.pass(SCRUB);
            if round > 0 {
                rates[arm].push(gib_per_second(growth(), calls.iter().sum::<f64>() / 1e3));
                firsts[arm].push(calls[0]);
                waits[arm].extend(calls);
            }
        }
    }
    // What mapping ahead is held to: a call, and all of them together, wait half as long as without.
    let alone = (median(&waits[0]), median(&rates[0]));
    let is_ahead = |arm: usize| arm > 0;
    for (arm, ((said, _), (waits, rates))) in arms.into_iter().zip(waits.into_iter().zip(rates)).enumerate() {
        let case = format!("{STEP_BYTES} every {} ms up to {}, {said}", STEP.as_millis(), growth());
        let against = |value: f64, times: f64| Bounds {
            peer: is_ahead(arm).then_some((arms[0].0, value)),
            target: is_ahead(arm).then_some(times * value),
            ceiling: None,
        };
        let longest = |waits: &[f64]| waits.iter().copied().fold(0.0, f64::max);
        let steps = usize::try_from(growth().0 / STEP_BYTES.0).unwrap();
        let later: Vec<f64> = waits.chunks(steps).map(|calls| longest(&calls[1..])).collect();
        let all = longest(&waits);
        report.add(&format!("{case}: a call"), "us", waits, against(alone.0, 1.0 / AHEAD_TIMES));
        report.add(&format!("{case}: the longest call"), "us", vec![all], Bounds::default());
        report.add(
            &format!("{case}: the first call"),
            "us",
            std::mem::take(&mut firsts[arm]),
            Bounds::default(),
        );
        report.add(&format!("{case}: the longest call but the first"), "us", later, Bounds::default());
        let bounds = against(alone.1, AHEAD_TIMES);
        report.add(&format!("{case}: what calls wait together"), "GiB/s", rates, bounds);
    }
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
    let of_peer = Some(LAYERS_OVER_PEER * peer(PlaneOrder::LayerMajor).1);
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
            target: of_peer,
            ..plain
        },
        Case {
            name: "pooled memory, a plane a layer",
            order: PlaneOrder::LayerMajor,
            granule: mib(512),
            extent: mib(16),
            is_pooled: true,
            target: of_peer,
        },
    ];
    for case in std::iter::once(&plain).chain(&cases) {
        measure(&mut report, &device, case);
    }
    longer(&mut report, &device);
    firsts(&mut report, &device);
    ahead(&mut report, &device);
    footprint(&mut report, &device);
    assert_eq!(device.take_errors(), [], "errors without a caller");
    if let Some(cuda) = cuda {
        report.write(&cuda);
    }
}
