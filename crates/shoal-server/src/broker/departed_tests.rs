//! What the dead had, by how they were seen while they lived, on the core alone.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use shoal_core::bytes::ByteCount;
use shoal_core::drift::{ProcessReading, Reading};
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind, WorkerCapabilities, WorkerUsage};
use tokio::sync::mpsc;

use super::departed::STUCK_MS;
use super::histories::{config, program};
use super::turn_tests::{Bench, caller};
use super::{Core, Looked, Timing, Wanted};
use crate::config::{DeviceChoice, ModelConfig, ServerConfig};
use crate::shelf::Target;
use crate::state::EventKind;
use crate::supervisor::Exit;

const MIB: fn(u64) -> ByteCount = ByteCount::mib;
pub(super) const STEWARD: u32 = 1;
pub(super) const PROGRAM: u32 = 700;
/// What it declares.
pub(super) const DECLARED: ByteCount = ByteCount::mib(30);

/// A program that runs and answers, on a GPU of 100 MiB.
pub(super) struct Scene {
    pub(super) core: Core,
    /// What its steward is told.
    pub(super) heard: mpsc::Receiver<FromServer>,
}

pub(super) fn scene() -> Scene {
    let device = DeviceChoice::Cuda(0);
    let models = vec![program("m0"), ModelConfig::new("m1", "/none")];
    let config = ServerConfig { device, models, ..config(0) };
    let mut core = Core::new(Arc::new(config), Timing::default(), 1_000_000, None);
    core.handle_timer(0);
    assert!(Arc::clone(&core.models[0].start).notified().now_or_never().is_some(), "it is to start");
    core.handle_started(0, STEWARD, 0);
    let (sender, mut heard) = mpsc::channel(64);
    core.handle_greeted("m0", STEWARD, sender, None, 0).expect("it is expected");
    let capabilities = WorkerCapabilities { weights_bytes: DECLARED, ..WorkerCapabilities::default() };
    core.handle_message(0, STEWARD, FromWorker::Ready { capabilities }, 0);
    std::mem::forget(core.handle_wanted("m0", Wanted::Route(caller()), 10, 60_000).expect("parked"));
    let told: Vec<FromServer> = std::iter::from_fn(|| heard.try_recv().ok()).collect();
    let wake = told.into_iter().find_map(|said| match said {
        FromServer::Wake { order, .. } => Some(order),
        _ => None,
    });
    let mut say = |message| core.handle_message(0, STEWARD, message, 20);
    say(FromWorker::LeaseRequest {
        request: 1,
        kind: LeaseKind::Weights,
        bytes: DECLARED,
        bytes_min: DECLARED,
        deadline_ms: 5_000,
        reason: "a test".to_owned(),
    });
    core.handle_command_started(0, PROGRAM, Target::Unix(PathBuf::from("/none/command.sock")), 20);
    let mut say = |message| core.handle_message(0, STEWARD, message, 30);
    let usage = WorkerUsage { weights_device: DECLARED, weights_total: DECLARED, ..WorkerUsage::default() };
    say(FromWorker::Usage { usage });
    let (order, copied) = (wake.expect("it is woken"), ByteCount::ZERO);
    say(FromWorker::OrderDone { order, bytes: DECLARED, copied, duration_us: 1, error: None });
    core.handle_route_ended(0, &caller(), 40);
    assert_eq!(core.book.leased(), DECLARED);
    Scene { core, heard }
}

impl Scene {
    /// The driver says that so much is used, and that the program has so much of it, where it shows that.
    pub(super) fn look(&mut self, used: u64, shown: Option<u64>, now_ms: u64) {
        let shown = shown.map(|mib| ProcessReading { process: PROGRAM, bytes: Some(MIB(mib)) });
        let reading =
            Reading { total: MIB(100), free: MIB(100 - used), processes: shown.into_iter().collect() };
        let begun_ms = self.core.begin_look(now_ms);
        self.core.handle_looked(Looked { reading, begun_ms, ..Looked::default() }, now_ms);
    }

    /// The program ends, as its steward tells.
    pub(super) fn end(&mut self, now_ms: u64) {
        self.core.handle_command_ended(0, "exit code 0".to_owned(), None, now_ms);
        let back = FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: DECLARED };
        self.core.handle_message(0, STEWARD, back, now_ms);
        assert_eq!(self.core.book.total(self.core.models[0].id), ByteCount::ZERO, "it has nothing any more");
        assert_eq!(self.core.book.leased(), DECLARED, "and nobody else has it yet");
    }

    fn returned(&self) -> Vec<bool> {
        let seen = self.core.events.kept().filter_map(|event| match event.what {
            EventKind::MemoryReturned { seen, .. } => Some(seen),
            _ => None,
        });
        seen.collect()
    }
}

/// The driver shows no process, and the program used a third of what it declared: what others have looked like a part of that,
/// and cannot be told from its end. It is free with the first reading after, less what is seen to be taken then.
#[test]
fn what_a_hidden_program_declared_is_free_once_it_is_gone_less_what_others_turn_out_to_have() {
    let mut scene = scene();
    for at_ms in [1_000, 2_000, 3_000] {
        scene.look(30, None, at_ms);
    }
    assert_eq!(scene.core.book.charged(), ByteCount::ZERO, "10 of it and 20 of others look like its 30");
    scene.end(3_500);
    scene.look(20, None, 3_600);
    assert_eq!((scene.core.book.leased(), scene.core.book.charged()), (ByteCount::ZERO, MIB(20)));
    assert_eq!(scene.returned(), [false]);
}

/// Something of it that is in no process of ours has its memory still: that is charged before anybody is granted it, and free
/// once it is.
#[test]
fn what_of_a_hidden_program_stays_behind_is_charged_by_the_first_reading() {
    let mut scene = scene();
    scene.look(30, None, 1_000);
    scene.end(1_500);
    scene.look(30, None, 1_600);
    assert_eq!((scene.core.book.leased(), scene.core.book.charged()), (ByteCount::ZERO, MIB(30)));
    for at_ms in [1_700, 1_800, 1_900] {
        scene.look(0, None, at_ms);
    }
    assert_eq!(scene.core.book.charged(), ByteCount::ZERO);
}

/// One that the driver showed is free when it is shown no more, whatever others have. Is it shown for long, nobody is to wait
/// for it.
#[test]
fn what_a_shown_program_had_comes_back_until_it_has_not_for_a_while() {
    let mut scene = scene();
    scene.look(40, Some(30), 1_000);
    scene.end(1_500);
    for at_ms in [1_600, 2_500, 3_900] {
        scene.look(40, Some(30), at_ms);
        assert_eq!(scene.core.departed_bytes(), (DECLARED, ByteCount::ZERO), "at {at_ms}");
    }
    scene.look(40, Some(30), 4_000);
    assert_eq!(scene.core.departed_bytes(), (ByteCount::ZERO, DECLARED));
    assert_eq!(scene.core.book.leased(), DECLARED, "it is there");
    scene.look(35, None, 20_000);
    assert_eq!((scene.core.book.leased(), scene.returned()), (ByteCount::ZERO, vec![true]));
}

/// A child of it lives on, with less than it had itself: the rest is free, and nobody yields for that.
#[test]
fn of_what_a_shown_program_had_only_what_is_still_shown_is_others() {
    let mut scene = scene();
    scene.look(40, Some(30), 1_000);
    scene.end(1_500);
    for at_ms in [1_600, 3_900] {
        scene.look(13, Some(3), at_ms);
        assert_eq!(scene.core.departed_bytes(), (DECLARED, ByteCount::ZERO), "at {at_ms}");
    }
    for at_ms in [4_000, 4_250] {
        scene.look(13, Some(3), at_ms);
        assert_eq!(scene.core.departed_bytes(), (ByteCount::ZERO, MIB(4)), "whole pages, at {at_ms}");
        assert_eq!((scene.core.book.leased(), scene.returned()), (MIB(4), vec![true]));
    }
    scene.look(10, None, 9_000);
    assert_eq!((scene.core.book.leased(), scene.returned()), (ByteCount::ZERO, vec![true; 2]));
}

/// A request has five seconds, and what a child of a dead worker keeps has not come back for half of them: the idle model
/// yields, in time. It was asked only after ten.
#[test]
fn who_has_little_time_waits_for_the_dead_only_for_a_while_before_an_idle_model_yields() {
    let sizes = [MIB(30), MIB(50), MIB(40)];
    let mut bench = Bench::of(&sizes);
    for (place, at_ms) in [(0, 10), (1, 50)] {
        let bytes = sizes[place];
        let wake = bench.wanted(place, bytes, at_ms);
        bench.usage(place, bytes, at_ms + 10);
        bench.done(place, wake, bytes, at_ms + 10);
        bench.end_route(place, at_ms + 20);
        assert!(bench.core.models[place].is_up());
    }
    let look = |bench: &mut Bench, at_ms| {
        let shown = |process, bytes| ProcessReading { process, bytes: Some(bytes) };
        let processes = vec![shown(100, sizes[0]), shown(101, sizes[1])];
        let reading = Reading { total: MIB(100), free: MIB(20), processes };
        let begun_ms = bench.core.begin_look(at_ms);
        bench.core.handle_looked(Looked { reading, begun_ms, ..Looked::default() }, at_ms);
    };
    look(&mut bench, 1_000);
    let exit = Exit { status: Some(ExitStatus::from_raw(9)), lived: Duration::from_secs(1) };
    bench.core.handle_exited(0, &exit, None, 1_500);
    bench.told(1);
    bench.wanted(2, sizes[2], 1_600);
    for at_ms in [1_700, 3_900] {
        look(&mut bench, at_ms);
        assert!(bench.told(1).is_empty(), "it is on its way back, and enough, at {at_ms}");
    }
    look(&mut bench, 4_000);
    let said = bench.told(1);
    let [FromServer::Reclaim { order, bytes, .. }] = said.as_slice() else { panic!("it is idle: {said:?}") };
    assert_eq!(*bytes, MIB(20), "what is free is enough for the rest");
    bench.say(1, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: *bytes }, 4_100);
    bench.done(1, *order, *bytes, 4_100);
    let granted =
        |said: &FromServer| matches!(said, FromServer::LeaseGrant { bytes, .. } if *bytes == MIB(40));
    assert!(bench.told(2).iter().any(granted), "long before its time is over");
}

/// A reading from before its end says nothing, not even where both are of the same millisecond.
#[test]
fn a_reading_that_was_begun_before_the_end_does_not_count() {
    for begun_ms in [1_400, 1_500] {
        let mut scene = scene();
        scene.look(30, Some(30), 1_000);
        let begun_ms = scene.core.begin_look(begun_ms);
        scene.end(1_500);
        let reading = Reading { total: MIB(100), free: MIB(100), processes: vec![] };
        scene.core.handle_looked(Looked { reading, begun_ms, ..Looked::default() }, 1_600);
        assert_eq!(scene.core.book.leased(), DECLARED);
        scene.look(0, None, 1_700);
        assert_eq!(scene.core.book.leased(), ByteCount::ZERO);
    }
}

/// An end asks for a reading at once. That is begun within the end's own millisecond as often as not, and counts.
#[test]
fn the_reading_that_an_end_asks_for_counts_in_the_same_millisecond() {
    let mut scene = scene();
    scene.look(30, Some(30), 1_000);
    scene.end(1_500);
    scene.look(0, None, 1_500);
    assert_eq!(scene.core.book.leased(), ByteCount::ZERO);
    assert_eq!(scene.returned(), [true]);
}

/// Where the driver does not show the process, free memory alone tells, and that may lack what went within the millisecond.
#[test]
fn where_processes_are_hidden_it_does_not() {
    let mut scene = scene();
    scene.look(30, None, 1_000);
    scene.end(1_500);
    scene.look(30, None, 1_500);
    assert_eq!(scene.core.book.leased(), DECLARED);
    scene.look(0, None, 1_501);
    assert_eq!(scene.core.book.leased(), ByteCount::ZERO);
}

/// What a driver shows that answers late was so when it was asked, and that was just after the end.
#[test]
fn a_late_answer_about_the_dead_is_of_when_it_was_asked_for() {
    let mut scene = scene();
    scene.look(30, Some(30), 1_000);
    scene.end(1_500);
    let begun_ms = scene.core.begin_look(1_501);
    let shown = ProcessReading { process: PROGRAM, bytes: Some(DECLARED) };
    let reading = Reading { total: MIB(100), free: MIB(70), processes: vec![shown] };
    let at_ms = 1_500 + STUCK_MS + 100;
    scene.core.handle_looked(Looked { reading, begun_ms, ..Looked::default() }, at_ms);
    assert_eq!(scene.core.departed_bytes(), (DECLARED, ByteCount::ZERO), "it is on its way back");
    scene.look(0, None, at_ms + 100);
    assert_eq!(scene.core.book.leased(), ByteCount::ZERO);
}
