//! Where the time of one operation goes: a wrapping device that notes when each call begins.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use shoal_device::FaultDevice;

/// Calls that take so long are listed one by one.
const LONG_MS: f64 = 1.0;

/// Prints what `act` calls: per verb how often, and how long until the next call of anything.
pub(crate) fn profile(what: &str, device: &FaultDevice, act: impl FnOnce()) {
    let calls = Arc::new(Mutex::new(Vec::with_capacity(1 << 14)));
    let noted = Arc::clone(&calls);
    device.fail_when(move |call| {
        noted.lock().push((Instant::now(), call.verb));
        None
    });
    let start = Instant::now();
    act();
    let end = Instant::now();
    device.heal();
    let calls = calls.lock();
    let mut sums: BTreeMap<_, (u32, f64, f64)> = BTreeMap::new();
    for (index, (at, verb)) in calls.iter().enumerate() {
        let next = calls.get(index + 1).map_or(end, |(next, _)| *next);
        let gap = (next - *at).as_secs_f64() * 1e3;
        let sum = sums.entry(*verb).or_default();
        *sum = (sum.0 + 1, sum.1 + gap, sum.2.max(gap));
    }
    let first = calls.first().map_or(end, |(at, _)| *at);
    println!(
        "profile of {what}: {:.2} ms, of which {:.2} before the first call",
        (end - start).as_secs_f64() * 1e3,
        (first - start).as_secs_f64() * 1e3
    );
    let long = calls.iter().enumerate().filter_map(|(index, (at, verb))| {
        let next = calls.get(index + 1).map_or(end, |(next, _)| *next);
        let gap = (next - *at).as_secs_f64() * 1e3;
        (gap >= LONG_MS).then(|| format!("{:.1} {verb} {gap:.1}", (*at - start).as_secs_f64() * 1e3))
    });
    println!("    at, what and how long, of {LONG_MS} ms and more: {}", long.collect::<Vec<_>>().join(", "));
    for (verb, (count, total, longest)) in sums {
        println!("    {:14} {count:6} calls {total:9.3} ms, longest {longest:.3}", verb.to_string());
    }
}
