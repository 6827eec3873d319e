//! Leases for overhead in virtual time: they rise at once and fall late, and what a sleeping engine gave up is asked for
//! before its weights come back.

use shoal_core::bytes::ByteCount;
use shoal_core::drift::{ProcessReading, Reading};
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind, WorkerUsage};

use super::driver::Looked;
use super::overhead::{KEPT_MS, LEAVES_MS};
use super::turn_tests::{Bench, WEIGHTS};
use crate::config::DeviceChoice;

const MIB: fn(u64) -> ByteCount = ByteCount::mib;

/// What a worker says of its memory: weights, and beside them what it has now and what its steps may take.
fn usage(weights: ByteCount, now: u64, peak: u64) -> FromWorker {
    let usage = WorkerUsage {
        weights_device: weights,
        weights_total: WEIGHTS,
        overhead_device: MIB(now),
        overhead_peak: MIB(peak),
        ..WorkerUsage::default()
    };
    FromWorker::Usage { usage }
}

fn overhead(bench: &Bench, place: usize) -> u64 {
    bench.core.book.held(bench.core.models[place].id, LeaseKind::Overhead).0 >> 20
}

/// Time goes by, and the core's timers ring.
fn pass(bench: &mut Bench, from_ms: u64, to_ms: u64) {
    let mut now_ms = from_ms;
    while let Some(at_ms) = bench.core.timer_ms.filter(|at| *at <= to_ms) {
        now_ms = now_ms.max(at_ms);
        bench.core.handle_timer(now_ms);
    }
}

#[test]
fn what_a_process_has_given_back_is_others_after_a_while() {
    let mut bench = Bench::new();
    bench.say(0, usage(ByteCount::ZERO, 60, 0), 1_000);
    assert_eq!(overhead(&bench, 0), 60, "measured, so leased");
    // It has 60 for a minute, and then 10.
    bench.say(0, usage(ByteCount::ZERO, 10, 0), 60_000);
    // The other's 60 do not fit beside it, and are waited for.
    bench.wanted(1, WEIGHTS, 60_010);
    assert!(!bench.told(1).iter().any(|said| matches!(said, FromServer::LeaseGrant { .. })));
    pass(&mut bench, 60_010, 60_000 + KEPT_MS - 1);
    assert_eq!(overhead(&bench, 0), 60, "it may take that again any moment");
    pass(&mut bench, 60_010, 60_002 + KEPT_MS);
    assert_eq!(overhead(&bench, 0), 10);
    bench.core.book.check_invariants();
}

#[test]
fn a_neighbour_that_waits_gets_what_falls() {
    let mut bench = Bench::new();
    bench.say(0, usage(ByteCount::ZERO, 60, 0), 1_000);
    bench.say(0, usage(ByteCount::ZERO, 10, 0), 2_000);
    bench.request_for(1, LeaseKind::Weights, WEIGHTS, 90_000, 2_010);
    pass(&mut bench, 2_010, 2_000 + KEPT_MS - 1);
    assert!(bench.told(1).iter().all(|said| !matches!(said, FromServer::LeaseGrant { .. })));
    pass(&mut bench, 2_010, 2_002 + KEPT_MS);
    let granted = bench.told(1).into_iter().any(|said| matches!(said, FromServer::LeaseGrant { .. }));
    assert!(granted, "as soon as it is there");
}

#[test]
fn a_figure_that_goes_up_and_down_moves_no_lease_and_one_that_rises_moves_it_at_once() {
    let mut bench = Bench::new();
    let mut now_ms = 1_000;
    for _ in 0..20 {
        for mib in [40, 12] {
            bench.say(0, usage(ByteCount::ZERO, mib, 0), now_ms);
            pass(&mut bench, now_ms, now_ms + KEPT_MS / 2);
            now_ms += KEPT_MS / 2;
            assert_eq!(overhead(&bench, 0), 40, "at {now_ms}");
        }
    }
    let told = bench.core.events.kept().filter(|event| event.what.name() == "overhead_corrected").count();
    assert_eq!(told, 1, "nothing of it is news");
    bench.say(0, usage(ByteCount::ZERO, 44, 0), now_ms);
    assert_eq!(overhead(&bench, 0), 44);
    // A little less is not worth a word.
    bench.say(0, usage(ByteCount::ZERO, 43, 0), now_ms + 1);
    pass(&mut bench, now_ms + 1, now_ms + 3 * KEPT_MS);
    assert_eq!(overhead(&bench, 0), 44);
}

#[test]
fn what_was_declared_is_its_workers_to_give_back_and_what_it_has_stays_leased() {
    let mut bench = Bench::new();
    bench.request(0, LeaseKind::Overhead, MIB(30), 10);
    bench.say(0, usage(ByteCount::ZERO, 20, 0), 1_000);
    pass(&mut bench, 1_000, 1_000 + 2 * KEPT_MS);
    assert_eq!(overhead(&bench, 0), 30, "nobody else may take it back");
    let back = FromWorker::LeaseReturn { kind: LeaseKind::Overhead, bytes: MIB(25) };
    bench.say(0, back, 1_000 + 2 * KEPT_MS);
    assert_eq!(overhead(&bench, 0), 20, "less is not there, whatever it says");
}

/// Two engines of 60 MiB that keep 8 MiB asleep and take 16 more in steps: the second awake and idle, the first asleep.
fn two_engines() -> Bench {
    let mut bench = Bench::new();
    for place in 0..2 {
        bench.say(place, usage(ByteCount::ZERO, 8, 24), 10);
    }
    let other = bench.wanted(1, WEIGHTS, 20);
    bench.say(1, usage(WEIGHTS, 20, 24), 30);
    bench.done(1, other, WEIGHTS, 30);
    bench.end_route(1, 40);
    assert_eq!((overhead(&bench, 0), overhead(&bench, 1)), (8, 24));
    bench.told(1);
    bench
}

#[test]
fn two_engines_that_each_fit_beside_the_other_asleep_take_turns() {
    // Of one that another server woke it is not known what it has asleep.
    for is_known in [true, false] {
        let mut bench = two_engines();
        if !is_known {
            bench.core.models[1].overhead_without_weights = None;
        }
        // 60 and 16 more, beside 8 of the other's: what its steps took comes back with its weights, which go whole.
        bench.wanted(0, WEIGHTS, 9_000);
        let Some(FromServer::Reclaim { order, bytes, .. }) = bench.told(1).pop() else {
            panic!("it is idle")
        };
        assert_eq!(bytes, WEIGHTS);
        bench.say(1, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes }, 9_010);
        bench.done(1, order, bytes, 9_010);
        // It has that still, and is waited for.
        assert_eq!((bench.told(0), overhead(&bench, 1)), (vec![], 20));
        bench.say(1, usage(ByteCount::ZERO, 8, 24), 9_020);
        assert_eq!((granted(&mut bench, 0), overhead(&bench, 1)), (vec![WEIGHTS], 8));
        assert_eq!((overhead(&bench, 0), bench.core.book.leased()), (24, MIB(92)));
    }
}

#[test]
fn what_is_not_given_up_in_time_is_not_waited_for() {
    let mut bench = two_engines();
    bench.wanted(0, WEIGHTS, 9_000);
    bench.core.asked[0].pending.deadline_ms = 60_000;
    let Some(FromServer::Reclaim { order, bytes, .. }) = bench.told(1).pop() else { panic!("it is idle") };
    bench.say(1, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes }, 9_010);
    bench.done(1, order, bytes, 9_010);
    // It keeps more than it did when it last slept.
    bench.say(1, usage(ByteCount::ZERO, 20, 24), 9_020);
    let denied = |told: &[FromServer]| told.iter().any(|said| matches!(said, FromServer::LeaseDeny { .. }));
    pass(&mut bench, 9_020, 9_010 + LEAVES_MS - 1);
    assert!(!denied(&bench.told(0)), "it may come yet");
    pass(&mut bench, 9_020, 9_010 + LEAVES_MS);
    assert!(denied(&bench.told(0)), "before its own time is over");
}

#[test]
fn what_leaves_with_weights_leaves_nothing_behind() {
    let mut bench = Bench::new();
    bench.say(0, usage(ByteCount::ZERO, 34, 40), 10);
    let wake = bench.wanted(0, WEIGHTS, 20);
    bench.say(0, usage(WEIGHTS, 38, 40), 30);
    bench.done(0, wake, WEIGHTS, 30);
    bench.end_route(0, 40);
    bench.core.handle_sleep("m0", 0.0, 1_000).expect("it is idle");
    let Some(FromServer::Reclaim { order, .. }) = bench.told(0).pop() else { panic!("it is to sleep") };
    bench.say(0, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: WEIGHTS }, 1_005);
    // In two steps, of which the second is less than a correction is lowered by otherwise.
    for mib in [36, 34] {
        bench.say(0, usage(ByteCount::ZERO, mib, 40), 1_010);
        assert_eq!(overhead(&bench, 0), mib);
    }
    bench.done(0, order, WEIGHTS, 1_010);
    bench.say(1, usage(ByteCount::ZERO, 6, 0), 1_020);
    bench.request(1, LeaseKind::Weights, WEIGHTS, 1_030);
    assert_eq!(granted(&mut bench, 1), [WEIGHTS], "all of it is free");
}

#[test]
fn what_an_engine_has_without_weights_is_learnt_when_it_is_true() {
    let mut bench = Bench::new();
    // It starts: what it says it has is what it declared.
    bench.say(0, usage(ByteCount::ZERO, 30, 0), 10);
    let wake = bench.wanted(0, WEIGHTS, 20);
    bench.say(0, usage(WEIGHTS, 20, 24), 30);
    bench.done(0, wake, WEIGHTS, 30);
    bench.end_route(0, 40);
    assert_eq!(bench.core.models[0].overhead_without_weights, None);
    // Put to sleep, and woken before it has given its steps' memory up.
    let mut bench = two_engines();
    assert_eq!(bench.core.models[1].overhead_without_weights, Some(MIB(8)));
    bench.core.handle_sleep("m1", 0.0, 1_000).expect("it is idle");
    let Some(FromServer::Reclaim { order, .. }) = bench.told(1).pop() else { panic!("it is to sleep") };
    bench.say(1, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: WEIGHTS }, 1_005);
    bench.done(1, order, WEIGHTS, 1_010);
    bench.request(1, LeaseKind::Weights, WEIGHTS, 1_100);
    assert_eq!(granted(&mut bench, 1), [WEIGHTS]);
    assert_eq!(bench.core.models[1].overhead_without_weights, Some(MIB(8)));
}

#[test]
fn a_return_of_nothing_is_no_news() {
    let mut bench = Bench::new();
    bench.request(0, LeaseKind::Overhead, MIB(30), 10);
    let told = |bench: &Bench| bench.core.events.kept().count();
    let before = told(&bench);
    for bytes in [ByteCount::ZERO, MIB(1)] {
        bench.say(0, FromWorker::LeaseReturn { kind: LeaseKind::Overhead, bytes }, 20);
        assert_eq!(told(&bench) - before, usize::from(!bytes.is_zero()));
    }
}

/// A reading is of another moment than what the worker says of its weights. So a single one that shows less is none.
#[test]
fn what_the_driver_shows_less_of_is_given_back_once_readings_agree() {
    let mut bench = Bench::new();
    let pid = bench.core.models[0].pid.expect("it runs");
    let look = |bench: &mut Bench, mib: u64, now_ms: u64| {
        let processes = vec![ProcessReading { process: pid, bytes: Some(MIB(mib)) }];
        let reading = Reading { total: MIB(1_024), free: MIB(1_024 - mib), processes };
        bench.core.handle_looked(Looked { reading, ..Looked::default() }, now_ms);
    };
    for now_ms in [1_000, 2_000, 3_000] {
        look(&mut bench, 50, now_ms);
    }
    assert_eq!(overhead(&bench, 0), 50, "it has them, leased or not");
    for (place, mib) in [10, 50, 10, 10, 50].into_iter().enumerate() {
        look(&mut bench, mib, 4_000 + 1_000 * place as u64);
    }
    pass(&mut bench, 8_000, 9_000 + 2 * KEPT_MS);
    assert_eq!(overhead(&bench, 0), 50);
    let now_ms = 10_000 + 2 * KEPT_MS;
    for later in [0, 1_000, 2_000] {
        look(&mut bench, 10, now_ms + later);
    }
    pass(&mut bench, now_ms + 2_000, now_ms + 1_999 + KEPT_MS);
    assert_eq!(overhead(&bench, 0), 50, "it may take that again any moment");
    pass(&mut bench, now_ms + 2_000, now_ms + 2_002 + KEPT_MS);
    assert_eq!(overhead(&bench, 0), 10);
}

/// An engine that takes what it likes in a step keeps its peak while it can run. Asleep it cannot.
#[test]
fn an_engine_that_does_not_ask_keeps_its_peak_while_it_has_weights_and_gets_it_back_with_them() {
    let mut bench = Bench::new();
    let wake = bench.wanted(0, WEIGHTS, 10);
    bench.say(0, usage(WEIGHTS, 8, 24), 20);
    bench.done(0, wake, WEIGHTS, 20);
    pass(&mut bench, 20, 10 * KEPT_MS);
    assert_eq!(overhead(&bench, 0), 24, "a step may take it");
    bench.end_route(0, 10 * KEPT_MS);
    let now_ms = 10 * KEPT_MS;
    bench.core.handle_sleep("m0", 0.0, now_ms).expect("it is idle");
    let Some(FromServer::Reclaim { order, .. }) = bench.told(0).pop() else { panic!("it is to sleep") };
    bench.say(0, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: WEIGHTS }, now_ms + 5);
    bench.say(0, usage(ByteCount::ZERO, 8, 24), now_ms + 5);
    bench.done(0, order, WEIGHTS, now_ms + 5);
    assert_eq!(overhead(&bench, 0), 8, "no step runs without weights");
    // The other comes, and takes all that is left but 32 MiB.
    let other = bench.wanted(1, WEIGHTS, now_ms + 10);
    bench.say(1, usage(WEIGHTS, 0, 0), now_ms + 20);
    bench.done(1, other, WEIGHTS, now_ms + 20);
    bench.end_route(1, now_ms + 30);
    // It is asked for again, with what its steps need: the weights are not granted into it, nor it before them.
    bench.told(1);
    bench.wanted(0, WEIGHTS, now_ms + 4_000);
    let orders = bench.told(1);
    let Some(FromServer::Reclaim { order, bytes, .. }) = orders.first() else { panic!("{orders:?}") };
    let (order, bytes) = (*order, *bytes);
    assert_eq!(bytes, WEIGHTS + MIB(24) + WEIGHTS - MIB(100), "both together");
    assert_eq!(overhead(&bench, 0), 8);
    bench.say(1, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes }, now_ms + 4_010);
    bench.done(1, order, bytes, now_ms + 4_010);
    assert_eq!((granted(&mut bench, 0), overhead(&bench, 0)), (vec![WEIGHTS], 24));
    assert_eq!(bench.core.book.leased(), MIB(100));
}

fn granted(bench: &mut Bench, place: usize) -> Vec<ByteCount> {
    let of = |said| if let FromServer::LeaseGrant { bytes, .. } = said { Some(bytes) } else { None };
    bench.told(place).into_iter().filter_map(of).collect()
}

/// A step took more than was leased, and that was leased as measured. Before the next of its size its worker asks for the
/// same bytes: others have given them up already.
#[test]
fn what_was_measured_is_not_asked_of_others_once_more() {
    let mut bench = Bench::new();
    bench.request(0, LeaseKind::Overhead, MIB(10), 10);
    bench.wanted(1, WEIGHTS, 20);
    bench.say(0, usage(ByteCount::ZERO, 40, 0), 30);
    for place in 0..2 {
        bench.told(place);
    }
    let leased = bench.core.book.leased();
    bench.request(0, LeaseKind::Overhead, MIB(30), 40);
    assert_eq!(granted(&mut bench, 0), [MIB(30)], "at once");
    assert!(bench.told(1).is_empty(), "nobody gives anything up for it");
    assert_eq!((overhead(&bench, 0), bench.core.book.leased()), (40, leased));
    let id = bench.core.models[0].id;
    assert_eq!(bench.core.book.corrected(id), ByteCount::ZERO, "it is its worker's to give back now");
    bench.core.book.check_invariants();
}

#[test]
fn what_a_hidden_process_gave_up_while_the_driver_was_asked_is_nobody_elses() {
    let mut bench = Bench::new();
    std::sync::Arc::make_mut(&mut bench.core.config).device = DeviceChoice::Cuda(0);
    for now_ms in [1_000, 2_000, 3_000, 4_000] {
        bench.say(0, usage(ByteCount::ZERO, 20, 0), now_ms);
        let begun_ms = bench.core.begin_look(now_ms);
        let reading = Reading { total: MIB(100), free: MIB(80), processes: Vec::new() };
        bench.say(0, usage(ByteCount::ZERO, 10, 0), now_ms + 10);
        bench.core.handle_looked(Looked { reading, begun_ms, ..Looked::default() }, now_ms + 20);
        assert_eq!(bench.core.book.charged(), ByteCount::ZERO, "at {now_ms}");
    }
}

/// The dead are back when others seem to have no more than before: what a living one gave up meanwhile is not theirs.
#[test]
fn what_a_hidden_process_gave_up_is_not_taken_for_what_a_dead_one_had() {
    let mut bench = Bench::new();
    std::sync::Arc::make_mut(&mut bench.core.config).device = DeviceChoice::Cuda(0);
    let look = |bench: &mut Bench, used: u64, then: u64, now_ms: u64| {
        let begun_ms = bench.core.begin_look(now_ms);
        bench.say(1, usage(ByteCount::ZERO, then, 0), now_ms + 10);
        let reading = Reading { total: MIB(100), free: MIB(100 - used), processes: Vec::new() };
        bench.core.handle_looked(Looked { reading, begun_ms, ..Looked::default() }, now_ms + 20);
    };
    bench.say(0, usage(ByteCount::ZERO, 30, 0), 10);
    bench.say(1, usage(ByteCount::ZERO, 30, 0), 20);
    look(&mut bench, 60, 30, 1_000);
    super::pulse_tests::exits(&mut bench.core, 0, 1_500);
    let departed = |bench: &Bench| bench.core.book.departed().next().is_some();
    assert!(departed(&bench));
    // The dead one's 30 MiB are there still; the other gave 30 back before the driver answered.
    look(&mut bench, 30, 0, 2_000);
    assert!(departed(&bench), "what it had is seen yet");
    look(&mut bench, 0, 0, 3_000);
    assert!(!departed(&bench), "all is free");
}

/// An engine of 60 MiB that keeps 8 asleep and takes 24 in steps, asleep, beside a busy one that leaves 18 MiB.
fn asleep_beside_a_busy_one() -> Bench {
    let mut bench = Bench::new();
    bench.say(0, usage(ByteCount::ZERO, 8, 24), 10);
    let other = bench.wanted(1, WEIGHTS, 20);
    bench.say(1, usage(WEIGHTS, 14, 0), 30);
    bench.done(1, other, WEIGHTS, 30);
    assert_eq!((overhead(&bench, 0), overhead(&bench, 1)), (8, 14));
    for place in 0..2 {
        bench.told(place);
    }
    bench
}

#[test]
fn what_steps_take_is_leased_when_the_turn_of_its_weights_has_come() {
    let mut bench = asleep_beside_a_busy_one();
    bench.wanted(0, WEIGHTS, 100);
    bench.say(0, usage(ByteCount::ZERO, 8, 24), 110);
    // There is room for it, and not for the weights: several that held it so would keep each other's out for ever.
    assert_eq!(overhead(&bench, 0), 8);
    // The other's answer is there, so it gives way: for both.
    bench.end_route(1, 4_000);
    let Some(FromServer::Reclaim { order, bytes, .. }) = bench.told(1).pop() else { panic!("it is idle") };
    bench.say(1, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes }, 4_010);
    bench.done(1, order, bytes, 4_010);
    assert_eq!((granted(&mut bench, 0), overhead(&bench, 0)), (vec![WEIGHTS], 24));
    bench.say(0, usage(ByteCount::ZERO, 8, 24), 4_020);
    assert_eq!(overhead(&bench, 0), 24, "its weights are coming");
}

#[test]
fn what_steps_take_goes_with_the_wish_for_weights() {
    let mut bench = asleep_beside_a_busy_one();
    let wake = bench.wanted(0, WEIGHTS, 100);
    let request = bench.core.asked.iter().map(|asked| asked.pending.request).min().expect("it waits");
    bench.say(0, FromWorker::LeaseCancel { request }, 110);
    let error = Some("nobody gave it its memory".to_owned());
    let (bytes, copied) = (ByteCount::ZERO, ByteCount::ZERO);
    bench.say(0, FromWorker::OrderDone { order: wake, bytes, copied, duration_us: 1, error }, 120);
    let left: Vec<_> = bench.core.asked.iter().map(|asked| asked.pending.kind).collect();
    assert_eq!((overhead(&bench, 0), left), (8, vec![]));
    // Granted, and given back because the wake failed.
    let mut bench = Bench::new();
    bench.say(0, usage(ByteCount::ZERO, 8, 24), 10);
    let wake = bench.wanted(0, WEIGHTS, 100);
    assert_eq!((granted(&mut bench, 0), overhead(&bench, 0)), (vec![WEIGHTS], 24));
    bench.say(0, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: WEIGHTS }, 110);
    let error = Some("the device failed".to_owned());
    bench.say(0, FromWorker::OrderDone { order: wake, bytes, copied, duration_us: 1, error }, 110);
    bench.say(0, usage(ByteCount::ZERO, 8, 24), 120);
    assert_eq!(overhead(&bench, 0), 8);
}

/// What it is refused for is named: both.
#[test]
fn a_refusal_says_what_steps_take_beside_the_weights() {
    let mut bench = Bench::new();
    bench.say(0, usage(ByteCount::ZERO, 8, 52), 10);
    bench.wanted(0, WEIGHTS, 20);
    let why = bench.told(0).into_iter().find_map(|said| match said {
        FromServer::LeaseDeny { reason, .. } => Some(reason),
        _ => None,
    });
    let why = why.expect("60 and 52 are more than there is");
    assert!(
        why.starts_with("m0 needs 104 MiB for weights and what its steps take besides (44 MiB)"),
        "{why}"
    );
}

/// Figures come several times a second: that they say the same again is no news, and makes nobody younger.
#[test]
fn what_could_not_be_covered_keeps_its_age_and_is_told_once() {
    let mut bench = Bench::new();
    let wake = bench.wanted(1, WEIGHTS, 10);
    bench.usage(1, WEIGHTS, 20);
    bench.done(1, wake, WEIGHTS, 20);
    let mut asked = Vec::new();
    for now_ms in (100..2_100).step_by(200) {
        bench.say(0, usage(ByteCount::ZERO, 90, 0), now_ms);
        let open = bench.core.asked.iter().find(|asked| asked.pending.kind == LeaseKind::Overhead);
        asked.extend(open.map(|open| (open.pending.asked_ms, open.pending.bytes)));
    }
    assert!(asked.len() > 3, "{asked:?}");
    assert!(asked.iter().all(|open| open.0 == 100), "{asked:?}");
    let told = bench.core.events.kept().filter(|event| event.what.name() == "overhead_corrected").count();
    assert!(told <= 2, "{told} events of one thing");
}

#[test]
fn nobody_gives_up_anything_for_overhead_that_is_leased_already() {
    let mut bench = Bench::new();
    bench.say(0, usage(ByteCount::ZERO, 30, 0), 1_000);
    let wake = bench.wanted(1, WEIGHTS, 1_010);
    bench.usage(1, WEIGHTS, 1_020);
    bench.done(1, wake, WEIGHTS, 1_020);
    bench.end_route(1, 1_030);
    bench.told(1);
    let free = bench.core.book.free();
    assert!(free > ByteCount::ZERO && free < MIB(30), "{free}");
    // So much beyond what was measured: there is room for that, and not for all of it once more.
    bench.request(0, LeaseKind::Overhead, MIB(30) + free, 1_040);
    let said = bench.told(0);
    let is_whole =
        |said: &FromServer| matches!(said, FromServer::LeaseGrant { bytes, .. } if *bytes == MIB(30) + free);
    assert!(said.iter().any(is_whole), "{said:?}");
    assert_eq!(bench.core.book.held(bench.core.models[0].id, LeaseKind::Overhead), MIB(30) + free);
    let yields = bench.told(1).into_iter().any(|said| matches!(said, FromServer::Reclaim { .. }));
    assert!(!yields, "nobody was in the way");
    bench.core.book.check_invariants();
}

/// Whoever asked a server that was killed asks the next one again, before that knows all that is held.
#[test]
fn what_steps_take_comes_with_weights_that_were_asked_for_before_all_was_known() {
    let mut bench = Bench::new();
    bench.say(0, usage(ByteCount::ZERO, 8, 24), 10);
    bench.say(1, usage(ByteCount::ZERO, 16, 0), 10);
    bench.core.models[1].is_unaccounted = true;
    bench.request(0, LeaseKind::Weights, WEIGHTS, 20);
    assert_eq!(overhead(&bench, 0), 8, "nothing is leased before all is known");
    bench.core.models[1].is_unaccounted = false;
    bench.core.settled(30);
    bench.say(1, usage(ByteCount::ZERO, 16, 0), 40);
    assert_eq!(granted(&mut bench, 0), [WEIGHTS]);
    assert_eq!(overhead(&bench, 0), 24, "and with them what its steps will take");
}

#[test]
fn what_steps_may_take_comes_back_with_weights_that_were_asked_for_before_all_had_left() {
    let mut bench = Bench::new();
    let wake = bench.wanted(0, WEIGHTS, 10);
    bench.say(0, usage(WEIGHTS, 8, 24), 20);
    bench.done(0, wake, WEIGHTS, 20);
    bench.end_route(0, 30);
    bench.say(0, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: MIB(52) }, 40);
    bench.say(0, usage(MIB(8), 8, 24), 40);
    // The other has what it lacks.
    let wake = bench.wanted(1, WEIGHTS, 50);
    bench.usage(1, WEIGHTS, 55);
    bench.done(1, wake, WEIGHTS, 55);
    bench.told(0);
    bench.request(0, LeaseKind::Weights, MIB(52), 60);
    bench.say(0, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: MIB(8) }, 70);
    bench.say(0, usage(ByteCount::ZERO, 8, 24), 70);
    assert_eq!(overhead(&bench, 0), 8, "no step runs");
    bench.end_route(1, 4_000);
    let orders = bench.told(1);
    let reclaim = orders.iter().find_map(|said| match said {
        FromServer::Reclaim { order, bytes, .. } => Some((*order, *bytes)),
        _ => None,
    });
    let (order, bytes) = reclaim.unwrap_or_else(|| panic!("{orders:?}"));
    bench.say(1, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes }, 4_010);
    bench.done(1, order, bytes, 4_010);
    assert_eq!((granted(&mut bench, 0), overhead(&bench, 0)), (vec![WEIGHTS], 24));
    bench.core.book.check_invariants();
}

#[test]
fn a_worker_that_takes_a_number_of_the_servers_own_hears_which_it_may_take() {
    let number = u64::MAX;
    let mut bench = Bench::new();
    let (kind, bytes) = (LeaseKind::Overhead, MIB(4));
    let (deadline_ms, reason) = (5_000, "a test".to_owned());
    let said =
        FromWorker::LeaseRequest { request: number, kind, bytes, bytes_min: bytes, deadline_ms, reason };
    bench.say(0, said, 10);
    let told: Vec<String> = bench.core.events.kept().map(|event| event.what.to_string()).collect();
    let expected =
        format!("lease request {number} has a number of the server's own: the highest is {}", u64::MAX - 1);
    assert!(told.iter().any(|words| words.contains(&expected)), "{told:?}");
}
