//! A program that ended while what it started lives on, on the core alone: nobody is told that nothing is missing of it, or that
//! nothing came back.

use std::path::PathBuf;

use shoal_core::bytes::ByteCount;
use shoal_core::drift::{ProcessReading, Reading};
use shoal_core::protocol::{FromServer, FromWorker};

use super::departed::STUCK_MS;
use super::departed_tests::{DECLARED, PROGRAM, STEWARD, Scene, scene};
use super::turn_tests::caller;
use super::{Looked, Wanted};
use crate::shelf::Target;
use crate::state::{EventKind, ModelStatus};

const BROKE_MS: u64 = 100;

/// The program was seen, and has just crashed.
fn crashed() -> Scene {
    let mut scene = scene();
    scene.look(30, Some(30), 50);
    scene.core.handle_command_broke(0, "was ended by signal 9", BROKE_MS);
    while scene.heard.try_recv().is_ok() {}
    scene
}

impl Scene {
    fn told(&self) -> Vec<EventKind> {
        self.core.events.kept().map(|event| event.what.clone()).collect()
    }
}

#[test]
fn a_wake_of_one_whose_children_still_end_brings_all_of_it_back() {
    let mut scene = crashed();
    let (now_ms, wait_ms) = (BROKE_MS + 10, 60_000);
    std::mem::forget(
        scene.core.handle_wanted("m0", Wanted::Route(caller()), now_ms, wait_ms).expect("parked"),
    );
    assert!(matches!(scene.heard.try_recv(), Ok(FromServer::Wake { .. })), "it is to start again");
    let mut wakes = scene.told().into_iter().filter_map(|what| match what {
        EventKind::WakeStarted { bytes, reason } => Some((bytes, reason)),
        _ => None,
    });
    let (bytes, reason) = wakes.next_back().expect("told");
    assert_eq!(bytes, DECLARED, "{reason}");
    assert!(reason.contains("30 MiB of its 30 MiB are missing, 30 MiB of which"), "{reason}");
    // Until they have, it says why it is not there.
    assert_eq!(scene.core.status_of(0), ModelStatus::Draining);
    let said = scene.core.why(0, 5, now_ms).now.join(" ");
    assert!(said.contains("a command that ended") && said.contains("30 MiB come back with it"), "{said}");
    let changed = scene.told().into_iter().any(|what| {
        matches!(what, EventKind::StatusChanged { to: ModelStatus::Draining, reason, .. }
            if reason.contains("its command was ended by signal 9"))
    });
    assert!(changed, "{:?}", scene.told());
    let waits_for = scene.core.what_it_waits_for(0, now_ms);
    assert!(waits_for.contains("what it started has not"), "{waits_for}");
    scene.end(BROKE_MS + 500);
    assert_eq!(scene.core.status_of(0), ModelStatus::Waking);
}

#[test]
fn an_order_to_give_up_what_came_back_by_itself_says_how_much_that_was() {
    let mut scene = crashed();
    let (_, told) = scene.core.handle_sleep("m0", 0.0, BROKE_MS + 10).expect("it is told to");
    let Ok(FromServer::Reclaim { order, bytes, .. }) = scene.heard.try_recv() else {
        panic!("it is ordered")
    };
    assert_eq!(bytes, DECLARED);
    scene.end(BROKE_MS + 500);
    // Its steward reads the order after that, and has nothing any more.
    let (bytes, copied) = (ByteCount::ZERO, ByteCount::ZERO);
    let said = FromWorker::OrderDone { order, bytes, copied, duration_us: 1, error: None };
    scene.core.handle_message(0, STEWARD, said, BROKE_MS + 510);
    let told = told.expect("somebody waits").try_recv().expect("answered");
    assert_eq!((told.bytes, told.error), (DECLARED, None));
    let gave = |what: &EventKind| matches!(what, EventKind::EvictDone { bytes, .. } if *bytes == DECLARED);
    assert!(scene.told().iter().any(gave), "{:?}", scene.told());
    assert_eq!(scene.core.models[0].counts.evicted, DECLARED);
}

/// What it had comes back without an order, so nobody else is asked for that. If it has not for a while, others are.
#[test]
fn what_a_crashed_program_had_is_on_its_way_back_and_is_not_waited_for_for_long() {
    let mut scene = crashed();
    let known = |scene: &Scene, now_ms| {
        let model = scene.core.policy_model(0, now_ms);
        (model.ready, model.ordered)
    };
    assert_eq!(known(&scene, BROKE_MS + 10), (true, DECLARED));
    let over_ms = BROKE_MS + STUCK_MS;
    assert_eq!(known(&scene, over_ms), (false, ByteCount::ZERO), "as while a worker ends");
    assert!(scene.core.timer_ms.is_some_and(|at_ms| at_ms <= over_ms), "whoever waits for it hears of that");
    scene.end(over_ms + 10);
    assert_eq!(known(&scene, over_ms + 20), (true, ByteCount::ZERO));
}

/// What a program takes is read with all else: what it has now, with all that it started, and the most that it had. Nothing is
/// said of one that is not shown, of the next one before it is, or while the driver is not heard.
#[test]
fn a_program_is_measured_by_the_readings_of_the_driver() {
    let mut scene = scene();
    assert_eq!(scene.core.program_seen(0), None, "there was no reading");
    scene.look(60, None, 1_000);
    assert_eq!(scene.core.program_seen(0), None, "it is hidden, which is not nothing");
    let of = |process, mib| ProcessReading { process, bytes: Some(ByteCount::mib(mib)) };
    let processes = vec![of(PROGRAM, 30), of(PROGRAM + 1, 14), of(9, 6)];
    let reading = Reading { total: ByteCount::mib(100), free: ByteCount::mib(50), processes };
    let begun_ms = scene.core.begin_look(2_000);
    let groups = [(PROGRAM, PROGRAM), (PROGRAM + 1, PROGRAM), (9, 9)].into();
    scene.core.handle_looked(Looked { reading, groups, begun_ms, ..Looked::default() }, 2_000);
    assert_eq!(scene.core.program_seen(0), Some((ByteCount::mib(44), ByteCount::mib(44))));
    scene.look(33, Some(33), 3_000);
    assert_eq!(scene.core.program_seen(0), Some((ByteCount::mib(33), ByteCount::mib(44))));
    scene.core.handle_driver_lost("a test".to_owned(), 4_000);
    assert_eq!(scene.core.program_seen(0), None);
    scene.look(33, Some(33), 5_000);
    scene.end(6_000);
    assert_eq!(scene.core.program_seen(0), None, "it is gone");
    let target = Target::Unix(PathBuf::from("/none/command.sock"));
    scene.core.handle_command_started(0, PROGRAM + 9, target, 6_000);
    scene.look(33, Some(33), 7_000);
    assert_eq!(scene.core.program_seen(0), None, "that is the one before");
}
