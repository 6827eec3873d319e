//! Workers that say nothing, on the core alone, in virtual time.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use shoal_core::bytes::ByteCount;
use shoal_core::drift::{ProcessReading, Reading};
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind, WorkerUsage};

use super::turn_tests::{Bench, WEIGHTS, caller};
use super::{Begun, Core, Life, Looked, OVERHEAD_REQUEST, Wanted};
use crate::config::{Patience, ServerConfig};
use crate::supervisor::Exit;

fn patience(core: &mut Core, silent: Option<u64>, stuck: Option<u64>) {
    let patience =
        Patience { silent_max: silent.map(Duration::from_secs), stuck_max: stuck.map(Duration::from_secs) };
    core.config = Arc::new(ServerConfig { patience, ..ServerConfig::clone(&core.config) });
}

/// Both answer when asked, and have their weights where they may.
fn bench() -> Bench {
    let mut bench = Bench::new();
    patience(&mut bench.core, Some(60), Some(900));
    bench.core.pulse_at_ms = 5_000;
    for place in [0, 1] {
        bench.core.handle_answers(place, 0);
    }
    bench
}

/// Time goes by in which timers ring when they want to; those in `answers` answer.
fn pass(bench: &mut Bench, from_ms: u64, until_ms: u64, answers: &[usize]) {
    let mut now_ms = from_ms;
    while let Some(at_ms) = bench.core.timer_ms.filter(|at| *at <= until_ms) {
        now_ms = now_ms.max(at_ms);
        bench.core.handle_timer(now_ms);
        for place in answers {
            for said in bench.told(*place) {
                if let FromServer::Ping { ping } = said {
                    bench.say(*place, FromWorker::Pong { ping }, now_ms);
                }
            }
        }
    }
}

fn kinds(core: &Core, of: &str) -> Vec<&'static str> {
    let about = core.events.kept().filter(|event| event.model.as_deref() == Some(of));
    let names = about.map(|event| event.what.name());
    names
        .filter(|name| ["worker_silent", "worker_heard", "worker_hung", "worker_exited"].contains(name))
        .collect()
}

fn is_ended(core: &Core, place: usize) -> bool {
    Arc::clone(&core.models[place].end).notified().now_or_never().is_some()
}

pub(super) fn exits(core: &mut Core, place: usize, now_ms: u64) {
    let exit = Exit { status: Some(ExitStatus::from_raw(9)), lived: Duration::from_mins(2) };
    core.handle_exited(place, &exit, None, now_ms);
}

#[test]
fn a_process_that_does_not_answer_is_told_of_ended_and_its_memory_comes_back_with_its_end() {
    let mut bench = bench();
    let wake = bench.wanted(0, WEIGHTS, 10);
    bench.usage(0, WEIGHTS, 20);
    bench.done(0, wake, WEIGHTS, 20);
    // A request is at it when it stops.
    pass(&mut bench, 20, 24_000, &[1]);
    assert_eq!(bench.core.snapshot(24_000).model("m0").expect("there").silent_ms, Some(24_000 - 10_000));
    let why = bench.core.why(0, 10, 24_000).now.join(" ");
    assert!(why.contains("Its worker has not answered for 14.0 s; at 60.0 s it is ended"), "{why}");
    assert_eq!(kinds(&bench.core, "m0"), ["worker_silent"], "told once");
    assert!(!is_ended(&bench.core, 0));
    pass(&mut bench, 24_000, 69_000, &[1]);
    assert!(!is_ended(&bench.core, 0), "it has its minute");
    pass(&mut bench, 69_000, 72_000, &[1]);
    assert_eq!(kinds(&bench.core, "m0"), ["worker_silent", "worker_hung"]);
    assert!(is_ended(&bench.core, 0));
    assert_eq!(bench.core.book.leased(), WEIGHTS, "what it holds counts until it is gone (I1)");
    assert_eq!(
        bench.core.trouble_of("m0").as_deref(),
        Some("it has answered nothing for 60 s, and was ended"),
        "those whose requests it had hear why"
    );
    exits(&mut bench.core, 0, 75_000);
    assert_eq!(bench.core.book.leased(), ByteCount::ZERO);
    assert!(matches!(bench.core.models[0].life(), Life::Waiting { .. }), "another is started");
    let error = bench.core.snapshot(75_000).model("m0").expect("there").error.clone().expect("told");
    assert!(error.contains("it has answered nothing for 60 s"), "{error}");
    assert_eq!(kinds(&bench.core, "m1"), [] as [&str; 0], "who answers is left alone");
}

#[test]
fn who_answers_in_the_end_goes_on_and_who_was_never_asked_too() {
    let mut bench = bench();
    pass(&mut bench, 0, 40_000, &[1]);
    assert_eq!(kinds(&bench.core, "m0"), ["worker_silent"]);
    bench.usage(0, ByteCount::ZERO, 40_500);
    assert_eq!(kinds(&bench.core, "m0"), ["worker_silent", "worker_heard"], "anything it says will do");
    assert_eq!(bench.core.snapshot(40_500).model("m0").expect("there").silent_ms, None);
    pass(&mut bench, 40_500, 90_000, &[1]);
    assert!(!is_ended(&bench.core, 0), "its minute began anew");

    // Those of an earlier version say nothing of pings.
    let mut quiet = Bench::new();
    pass(&mut quiet, 0, 500_000, &[]);
    assert!(quiet.told(0).iter().all(|said| !matches!(said, FromServer::Ping { .. })));
    assert!(!is_ended(&quiet.core, 0));

    // And where silence is allowed for ever, nobody is asked, and the server has no reason to wake up.
    let mut patient = Bench::new();
    patience(&mut patient.core, None, None);
    patient.core.handle_answers(0, 0);
    assert_eq!(patient.core.timer_ms, None);
}

#[test]
fn a_server_that_did_not_run_itself_holds_no_silence_against_anybody() {
    let mut bench = bench();
    pass(&mut bench, 0, 30_000, &[1]);
    assert_eq!(kinds(&bench.core, "m0"), ["worker_silent"]);
    // It was stopped for ten minutes; what the others said meanwhile is still to be read.
    bench.core.handle_timer(630_000);
    assert!(!is_ended(&bench.core, 0) && !is_ended(&bench.core, 1));
    pass(&mut bench, 630_000, 685_000, &[1]);
    assert!(!is_ended(&bench.core, 0), "it has a whole minute from then on");
    pass(&mut bench, 685_000, 700_000, &[1]);
    assert!(is_ended(&bench.core, 0) && !is_ended(&bench.core, 1));
}

#[test]
fn one_whose_work_does_not_go_on_is_ended_for_a_request_that_waits() {
    let mut bench = bench();
    let wake = bench.wanted(0, WEIGHTS, 10);
    bench.core.handle_no_byte(0, 1_000_000, 1_000_000);
    assert!(!is_ended(&bench.core, 0), "it has an order, and waits for an answer of ours");
    bench.usage(0, WEIGHTS, 1_000_020);
    bench.done(0, wake, WEIGHTS, 1_000_020);
    let at = |ms: u64| 1_000_020 + ms;
    pass(&mut bench, at(0), at(890_000), &[0, 1]);
    bench.core.handle_no_byte(0, 890_000, at(890_000));
    assert!(!is_ended(&bench.core, 0), "not yet");
    let usage = WorkerUsage { tokens_out: 1, ..WorkerUsage::default() };
    bench.say(0, FromWorker::Usage { usage }, at(895_000));
    bench.core.handle_no_byte(0, 905_000, at(905_000));
    assert!(!is_ended(&bench.core, 0), "something came of another's");
    // That it lives, that more requests came to it, and that it cannot do what it is told, is no work.
    pass(&mut bench, at(905_000), at(1_990_000), &[0, 1]);
    bench.core.handle_no_byte(0, 20_000, at(1_990_000));
    assert!(!is_ended(&bench.core, 0), "that request has only just come");
    let usage = WorkerUsage { tokens_out: 1, requests_waiting: 7, ..WorkerUsage::default() };
    bench.say(0, FromWorker::Usage { usage }, at(1_990_000));
    bench.core.handle_sleep("m0", 0.0, at(1_990_000)).expect("it is there");
    let orders = bench.told(0).into_iter().filter_map(|said| match said {
        FromServer::Reclaim { order, .. } => Some(order),
        _ => None,
    });
    for order in orders.collect::<Vec<_>>() {
        let error = Some("a step runs".to_owned());
        let said = FromWorker::OrderDone {
            order,
            bytes: ByteCount::ZERO,
            copied: ByteCount::ZERO,
            duration_us: 1,
            error,
        };
        bench.say(0, said, at(1_995_000));
    }
    bench.core.handle_no_byte(0, 1_000_000, at(2_000_000));
    assert!(is_ended(&bench.core, 0));
    assert_eq!(kinds(&bench.core, "m0"), ["worker_hung"]);
    let why = bench.core.trouble_of("m0").expect("told");
    assert_eq!(why, "it has 1 request, and nothing came of it for 1000 s, and was ended");
}

#[test]
fn a_server_that_did_not_run_itself_ends_nobody_for_a_request_that_waits() {
    for silent in [Some(60), None] {
        let mut bench = bench();
        patience(&mut bench.core, silent, Some(900));
        let wake = bench.wanted(0, WEIGHTS, 10);
        bench.usage(0, WEIGHTS, 20);
        bench.done(0, wake, WEIGHTS, 20);
        pass(&mut bench, 20, 300_000, &[0, 1]);
        // It was stopped for half an hour; who waits for a byte rings before the timer does, and the worker's tokens are
        // still to be read.
        bench.core.handle_no_byte(0, 2_090_000, 2_100_000);
        assert!(!is_ended(&bench.core, 0), "{silent:?}");
        pass(&mut bench, 2_100_000, 2_995_000, &[0, 1]);
        bench.core.handle_no_byte(0, 2_985_000, 2_995_000);
        assert!(!is_ended(&bench.core, 0), "it has its whole time from then on: {silent:?}");
        pass(&mut bench, 2_995_000, 3_001_000, &[0, 1]);
        bench.core.handle_no_byte(0, 2_991_000, 3_001_000);
        assert!(is_ended(&bench.core, 0), "{silent:?}");
        // The timer first comes to the same.
        let mut bench = self::bench();
        patience(&mut bench.core, silent, Some(900));
        let wake = bench.wanted(0, WEIGHTS, 10);
        bench.usage(0, WEIGHTS, 20);
        bench.done(0, wake, WEIGHTS, 20);
        pass(&mut bench, 20, 300_000, &[0, 1]);
        bench.core.handle_timer(2_100_000);
        bench.core.handle_no_byte(0, 2_090_000, 2_100_000);
        assert!(!is_ended(&bench.core, 0), "{silent:?}");
    }
}

#[test]
fn one_that_makes_vectors_works_and_one_that_stopped_making_them_does_not() {
    let mut bench = bench();
    let wake = bench.wanted(0, WEIGHTS, 10);
    bench.usage(0, WEIGHTS, 20);
    bench.done(0, wake, WEIGHTS, 20);
    let mut now_ms = 20;
    for tokens_embedded in 1..=5 {
        pass(&mut bench, now_ms, now_ms + 800_000, &[0, 1]);
        now_ms += 800_000;
        let usage = WorkerUsage {
            weights_device: WEIGHTS,
            weights_total: WEIGHTS,
            tokens_embedded,
            ..WorkerUsage::default()
        };
        bench.say(0, FromWorker::Usage { usage }, now_ms);
        // One request of many texts; nothing is answered before the last.
        bench.core.handle_no_byte(0, now_ms - 20, now_ms + 1_000);
        assert!(!is_ended(&bench.core, 0), "after {tokens_embedded} texts");
    }
    pass(&mut bench, now_ms, now_ms + 905_000, &[0, 1]);
    bench.core.handle_no_byte(0, now_ms + 905_000 - 20, now_ms + 905_000);
    assert!(is_ended(&bench.core, 0));
}

#[test]
fn what_the_server_asks_for_in_its_name_is_nothing_that_it_waits_for() {
    let mut bench = bench();
    let wake = bench.wanted(0, WEIGHTS, 10);
    bench.usage(0, WEIGHTS, 20);
    bench.done(0, wake, WEIGHTS, 20);
    pass(&mut bench, 20, 950_000, &[0, 1]);
    // Its process was measured to take more than it leased, and there is nothing free yet.
    bench.core.cover_overhead(0, ByteCount::mib(8), 950_500);
    assert!(bench.core.asked.iter().any(|asked| asked.pending.request == OVERHEAD_REQUEST));
    bench.core.handle_no_byte(0, 950_000, 951_000);
    assert!(is_ended(&bench.core, 0));
}

#[test]
fn what_a_request_waited_for_is_known_when_its_worker_gave_up_first() {
    let mut bench = Bench::new();
    // The second is in its turn.
    let wake = bench.wanted(1, WEIGHTS, 10);
    bench.usage(1, WEIGHTS, 20);
    bench.done(1, wake, WEIGHTS, 20);
    let begun = bench.core.handle_wanted("m0", Wanted::Route(caller()), 30, 100).expect("parked");
    let Begun::Parked { place, ticket, .. } = begun else { panic!("it sleeps") };
    bench.request(0, LeaseKind::Weights, WEIGHTS, 40);
    let asked = bench.core.asked.first().expect("it waits for the other's turn to end");
    let (request, waits_for) = (asked.pending.request, asked.waits_for.clone());
    assert!(!waits_for.is_empty());
    bench.say(0, FromWorker::LeaseCancel { request }, 99);
    assert_eq!(bench.core.handle_too_late(place, ticket, 100), waits_for);
}

/// The driver shows these processes, twice, so that it counts.
fn look(core: &mut Core, shown: &[(u32, u64)], now_ms: u64) {
    let used = ByteCount::mib(shown.iter().map(|(_, mib)| mib).sum());
    let total = ByteCount::mib(100);
    let of =
        |(process, mib): &(u32, u64)| ProcessReading { process: *process, bytes: Some(ByteCount::mib(*mib)) };
    for at_ms in [now_ms, now_ms + 1] {
        let processes = shown.iter().map(of).collect();
        let reading = Reading { total, free: total - used, processes };
        let begun_ms = core.begin_look(at_ms);
        core.handle_looked(Looked { reading, begun_ms, ..Looked::default() }, at_ms);
    }
}

/// Others came, and what one was leased beyond what is left is owed by a process that does not obey. It is ended where it
/// does not live, and its memory comes back with its end; one that shows that it lives is asked again and again, and keeps it.
#[test]
fn what_is_owed_comes_back_with_the_end_of_one_that_does_not_live() {
    for lives in [false, true] {
        let mut bench = bench();
        let wake = bench.wanted(0, WEIGHTS, 10);
        bench.usage(0, WEIGHTS, 20);
        bench.done(0, wake, WEIGHTS, 20);
        bench.core.handle_route_ended(0, &caller(), 30);
        // It declared what it does not take, so that others find room.
        bench.request(0, LeaseKind::Overhead, ByteCount::mib(30), 40);
        bench.told(0);
        look(&mut bench.core, &[(100, 60), (1, 30)], 50);
        assert_eq!(bench.core.book.owed(), ByteCount::mib(20));
        for from_ms in (100..120_100).step_by(5_000) {
            if lives {
                bench.usage(0, WEIGHTS, from_ms);
            }
            pass(&mut bench, from_ms, from_ms + 5_000, &[1]);
        }
        let told = bench.told(0);
        let asked = told.iter().filter(|said| matches!(said, FromServer::Reclaim { .. })).count();
        assert_eq!(is_ended(&bench.core, 0), !lives);
        if lives {
            assert!(asked >= 5, "it is asked again and again: {asked}");
            assert_eq!(bench.core.book.owed(), ByteCount::mib(20));
        } else {
            exits(&mut bench.core, 0, 121_000);
            look(&mut bench.core, &[(1, 30)], 121_100);
            assert_eq!(
                (bench.core.book.owed(), bench.core.book.leased()),
                (ByteCount::ZERO, ByteCount::ZERO)
            );
        }
    }
}
