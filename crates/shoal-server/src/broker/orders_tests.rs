//! Orders that nothing comes of, on the core alone.

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind};

use super::Wanted;
use super::orders::OVERDUE_MAX;
use super::turn_tests::{Bench, WEIGHTS, caller};

/// A worker that reads its orders and does nothing is asked again and again. What is kept of that has a bound, whoever waits
/// for an order that is given up hears of it, and a late answer is no breach.
#[test]
fn of_a_worker_that_ignores_its_orders_few_are_kept() {
    let mut bench = Bench::new();
    let wake = bench.wanted(0, WEIGHTS, 10);
    bench.usage(0, WEIGHTS, 20);
    bench.done(0, wake, WEIGHTS, 20);
    bench.core.handle_route_ended(0, &caller(), 30);
    bench.told(0);
    let (mut orders, mut waiters, mut now_ms) = (Vec::new(), Vec::new(), 40);
    for _ in 0..3 * OVERDUE_MAX {
        let (_, waiter) = bench.core.handle_sleep("m0", 0.0, now_ms).expect("it is idle");
        waiters.push(waiter.expect("it has all its weights"));
        let told = bench.told(0);
        let [FromServer::Reclaim { order, .. }] = told.as_slice() else { panic!("{told:?}") };
        orders.push(*order);
        now_ms += 20_000;
        bench.core.handle_timer(now_ms);
        let kept = bench.core.models[0].orders.len();
        assert!(kept <= OVERDUE_MAX, "{kept} orders after {}", orders.len());
    }
    let told = waiters[0].try_recv().expect("it was given up");
    assert_eq!((told.bytes, told.error.is_some()), (ByteCount::ZERO, true));
    assert!(waiters.last_mut().expect("some").try_recv().is_err(), "the newest may still be answered");

    // At last it obeys, and answers all of them.
    bench.say(0, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: WEIGHTS }, now_ms);
    bench.usage(0, ByteCount::ZERO, now_ms);
    for (place, order) in orders.iter().enumerate() {
        let bytes = if place == 0 { WEIGHTS } else { ByteCount::ZERO };
        bench.done(0, *order, bytes, now_ms);
    }
    let model = &bench.core.models[0];
    assert!(model.connection.is_some() && model.orders.is_empty(), "all are answered");
    assert_eq!(waiters.last_mut().expect("some").try_recv().expect("answered").error, None);
    assert_eq!(bench.core.book.held(model.id, LeaseKind::Weights), ByteCount::ZERO);
}

/// What a link costs is known from what a worker took, less what its leases were waited for. The way of an order and of a
/// lease's question counted as waiting too, and so did the copies of all parts but the last.
#[test]
fn the_price_of_a_wake_leaves_out_the_waits_for_its_leases_and_nothing_else() {
    let half = ByteCount::mib(30);
    let mut bench = Bench::new();
    let wake = bench.wanted(1, WEIGHTS, 10);
    bench.usage(1, WEIGHTS, 20);
    bench.done(1, wake, WEIGHTS, 20);
    bench.end_route(1, 30);
    bench.told(1);
    // Ordered at 1,000 ms; its worker is slow to begin and asks at 1,040, and for the rest once the first half is there.
    let begun = bench.core.handle_wanted("m0", Wanted::Route(caller()), 1_000, 60_000).expect("parked");
    let wake = bench.told(0).into_iter().find_map(|said| match said {
        FromServer::Wake { order, .. } => Some(order),
        _ => None,
    });
    bench.request(0, LeaseKind::Weights, half, 1_040);
    bench.request(0, LeaseKind::Weights, half, 1_070);
    // The other gives way 50 ms later.
    let left = ByteCount::mib(20);
    let told = bench.told(1);
    let [FromServer::Reclaim { order, bytes, .. }] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(*bytes, left, "40 of 100 MiB were free");
    bench.say(1, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: left }, 1_120);
    bench.done(1, *order, left, 1_120);
    bench.usage(0, WEIGHTS, 1_150);
    let done = FromWorker::OrderDone {
        order: wake.expect("it is woken"),
        bytes: WEIGHTS,
        copied: WEIGHTS,
        // From 1,040 to 1,150.
        duration_us: 110_000,
        error: None,
    };
    bench.say(0, done, 1_150);
    drop(begun);
    assert_eq!(bench.core.restore_cost(0), 1_000, "60 ms for 60 MiB");
}

/// An engine may have asked for its weights by itself, before it was ordered to bring them back.
#[test]
fn what_a_lease_was_waited_for_before_the_wake_is_not_taken_off_it() {
    let mut bench = Bench::new();
    let wake = bench.wanted(1, WEIGHTS, 10);
    bench.usage(1, WEIGHTS, 20);
    bench.done(1, wake, WEIGHTS, 20);
    bench.end_route(1, 30);
    bench.told(1);
    bench.request(0, LeaseKind::Weights, WEIGHTS, 900);
    let told = bench.told(1);
    let [FromServer::Reclaim { order, bytes: left, .. }] = told.as_slice() else { panic!("{told:?}") };
    let begun = bench.core.handle_wanted("m0", Wanted::Route(caller()), 1_000, 60_000).expect("parked");
    let wake = bench.told(0).into_iter().find_map(|said| match said {
        FromServer::Wake { order, .. } => Some(order),
        _ => None,
    });
    bench.say(1, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: *left }, 1_100);
    bench.done(1, *order, *left, 1_100);
    bench.usage(0, WEIGHTS, 1_160);
    let done = FromWorker::OrderDone {
        order: wake.expect("it is woken"),
        bytes: WEIGHTS,
        copied: WEIGHTS,
        // From 1,000 to 1,160.
        duration_us: 160_000,
        error: None,
    };
    bench.say(0, done, 1_160);
    drop(begun);
    assert_eq!(bench.core.restore_cost(0), 1_000, "60 ms for 60 MiB");
}
