//! What a worker says that its cached prefixes cost, and who yields by that, on the core alone.

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind, WorkerUsage};

use super::orders::Order;
use super::turn_tests::{Bench, caller};

const WEIGHTS: [ByteCount; 3] = [ByteCount::mib(40), ByteCount::mib(10), ByteCount::mib(50)];
const KV: ByteCount = ByteCount::mib(20);

/// The model is used, and is idle from then on. Its steps leave so much KV, of prompts that may come again.
fn use_and_leave(bench: &mut Bench, place: usize, kv: ByteCount, price: (u64, u64), now_ms: u64) {
    let wake = bench.wanted(place, WEIGHTS[place], now_ms);
    let usage = WorkerUsage {
        weights_device: WEIGHTS[place],
        weights_total: WEIGHTS[place],
        ..WorkerUsage::default()
    };
    bench.say(place, FromWorker::Usage { usage: usage.clone() }, now_ms + 20);
    bench.done(place, wake, WEIGHTS[place], now_ms + 20);
    if !kv.is_zero() {
        bench.request(place, LeaseKind::Kv, kv, now_ms + 21);
        let (kv_back_us_per_mib, kv_found_milli) = price;
        let usage = WorkerUsage { kv_device: kv, kv_cached: kv, kv_back_us_per_mib, kv_found_milli, ..usage };
        bench.say(place, FromWorker::Usage { usage }, now_ms + 30);
    }
    bench.core.handle_route_ended(place, &caller(), now_ms + 40);
    bench.told(place);
}

/// What is taken of it, whether its weights go before its prefixes, and why.
fn taken(bench: &mut Bench, place: usize) -> Option<(ByteCount, bool, String)> {
    bench.told(place).into_iter().find_map(|said| match said {
        FromServer::Reclaim { bytes, cached_last, reason, .. } => Some((bytes, cached_last, reason)),
        _ => None,
    })
}

/// The model with the prefix was used long before the other. Its prefix goes first where nobody knows what that costs, or that is
/// low, and after its weights where it is dearer than they. Where it is dear by far, the other's weights go for it too.
#[test]
fn a_dear_prefix_outlives_cheap_weights() {
    let half = ByteCount(KV.0 / 2);
    let cases = [
        ((0, 0), KV, false),
        ((1, 500), KV, false),
        ((3, 0), KV, true),
        ((10_000, 1), KV, true),
        ((10_000, 1_000), half, true),
        ((1_000_000, 500), half, true),
        ((1_000_000, 0), half, true),
    ];
    for (price, of_it, cached_last) in cases {
        let mut bench = Bench::of(&WEIGHTS);
        use_and_leave(&mut bench, 1, KV, price, 10);
        use_and_leave(&mut bench, 0, ByteCount::ZERO, (0, 0), 30_000);
        bench.wanted(2, WEIGHTS[2], 32_000);
        let of_other = taken(&mut bench, 0).map_or(ByteCount::ZERO, |(bytes, ..)| bytes);
        let (bytes, is_last, why) = taken(&mut bench, 1).expect("it was not used for longest");
        assert_eq!((bytes, of_other, is_last), (of_it, KV - of_it, cached_last), "at {price:?}: {why}");
        let takes_weights = bench.core.models[1].orders.values().any(Order::takes_weights);
        assert_eq!(takes_weights, cached_last, "at {price:?}");
        if of_it < KV {
            assert!(
                why.contains("20 MiB of KV for prompts that may come again cost more and go last"),
                "{why}"
            );
        } else {
            assert!(why.contains("m1 holds 20 MiB of KV for prompts that may come again"), "{why}");
        }
        if price == (3, 0) {
            assert!(why.contains("3 us to bring it back, 1.0 uses in"), "{why}");
        }
        if price == (10_000, 1) {
            assert!(
                why.contains("10000 us to bring it back, a use finds 0.1% of it again, 1.0 uses in"),
                "{why}"
            );
        }
    }
}

/// A cache that grows with every prompt holds prefixes, as its worker says, and not what is in use for ever.
#[test]
fn what_grows_all_the_time_is_cached_where_its_worker_says_so() {
    let mut bench = Bench::of(&WEIGHTS);
    use_and_leave(&mut bench, 1, ByteCount::ZERO, (0, 0), 10);
    let part = ByteCount::mib(2);
    let mut kv = ByteCount::ZERO;
    for prompt in 0..30 {
        let now_ms = 1_000 + prompt * 400;
        bench.request(1, LeaseKind::Kv, part, now_ms);
        kv += part;
        let usage = WorkerUsage {
            weights_device: WEIGHTS[1],
            weights_total: WEIGHTS[1],
            kv_device: kv,
            kv_live: part,
            kv_cached: kv - part,
            kv_back_us_per_mib: 10_000,
            kv_found_milli: 500,
            ..WorkerUsage::default()
        };
        bench.say(1, FromWorker::Usage { usage }, now_ms + 100);
    }
    bench.told(1);
    bench.wanted(2, WEIGHTS[2], 13_000);
    let (bytes, cached_last, why) = taken(&mut bench, 1).expect("it holds what the other needs");
    assert_eq!((bytes, cached_last), (KV, true), "{why}");
    assert!(why.contains("m1 holds 58 MiB of KV for prompts") && why.contains("a use finds 50.0%"), "{why}");
}
