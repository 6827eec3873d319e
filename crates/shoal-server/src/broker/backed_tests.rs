//! Requests that go to a worker while the bytes of its wake are still coming, on the core alone.

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind};
use tokio::sync::oneshot;

use super::requests::Reached;
use super::turn_tests::{Bench, WEIGHTS, caller};
use super::{Begun, Wanted};
use crate::shelf::RouteError;
use crate::state::{EventKind, ModelStatus};

type Answer = oneshot::Receiver<Result<Reached, RouteError>>;

/// Somebody wants the first model; waits, if it is not to be had at once.
fn want(bench: &mut Bench, wanted: Wanted, now_ms: u64) -> Option<Answer> {
    match bench.core.handle_wanted("m0", wanted, now_ms, now_ms + 60_000).expect("room to wait") {
        Begun::Reached(_) => None,
        Begun::Parked { answer, .. } => Some(answer),
    }
}

fn route() -> Wanted {
    Wanted::Route(caller())
}

fn is_answered(answer: &mut Answer) -> bool {
    matches!(answer.try_recv(), Ok(Ok(_)))
}

/// A request waits for the first model, which has the lease for its weights; the number of its wake.
fn leased(bench: &mut Bench) -> (Answer, u64) {
    let answer = want(bench, route(), 10).expect("it sleeps");
    let said = bench.told(0);
    let wake = said.iter().find_map(|said| match said {
        FromServer::Wake { order, .. } => Some(*order),
        _ => None,
    });
    bench.request(0, LeaseKind::Weights, WEIGHTS, 11);
    assert!(bench.told(0).iter().any(|said| matches!(said, FromServer::LeaseGrant { .. })));
    (answer, wake.expect("it is woken"))
}

fn status(bench: &Bench) -> ModelStatus {
    bench.core.models[0].cycle.shown()
}

#[test]
fn requests_go_to_a_worker_whose_bytes_are_coming_and_orders_wait_for_the_last() {
    let mut bench = Bench::new();
    let (mut first, wake) = leased(&mut bench);
    let mut order = want(&mut bench, Wanted::Wake, 12).expect("it sleeps");
    assert!(!is_answered(&mut first), "it has no memory yet");
    bench.say(0, FromWorker::WakeBacked { order: wake }, 20);
    assert!(is_answered(&mut first), "its bytes are coming");
    assert!(!is_answered(&mut order), "it is not awake");
    bench.core.handle_route_ended(0, &caller(), 21);
    assert!(want(&mut bench, route(), 21).is_none(), "the next goes there at once");
    assert_eq!(status(&bench), ModelStatus::Waking);
    let why = bench.core.why(0, 1, 22).now.join(" ");
    assert!(why.contains("requests go to its worker already"), "{why}");
    let events: Vec<_> = bench.core.events.kept().map(|event| event.what.clone()).collect();
    let backed = EventKind::WakeBacked { bytes: WEIGHTS, after_ms: 10, parked: 1 };
    assert!(events.contains(&backed), "{events:?}");
    bench.usage(0, WEIGHTS, 30);
    assert_eq!(status(&bench), ModelStatus::Waking, "the order is answered by its answer");
    bench.done(0, wake, WEIGHTS, 30);
    assert!(is_answered(&mut order));
    assert_eq!(status(&bench), ModelStatus::Awake);
}

#[test]
fn nothing_more_goes_to_a_worker_that_gives_weights_up_or_whose_wake_failed() {
    for ending in ["sleep", "return", "failure"] {
        let mut bench = Bench::new();
        let (mut first, wake) = leased(&mut bench);
        bench.say(0, FromWorker::WakeBacked { order: wake }, 20);
        assert!(is_answered(&mut first));
        match ending {
            "sleep" => drop(bench.core.handle_sleep("m0", 0.0, 21).expect("it holds weights")),
            "return" => {
                let bytes = ByteCount::mib(2);
                bench.say(0, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes }, 21);
            }
            _ => {
                let (bytes, copied) = (ByteCount::ZERO, ByteCount::ZERO);
                let error = Some("a copy failed".to_owned());
                let done = FromWorker::OrderDone { order: wake, bytes, copied, duration_us: 1, error };
                bench.say(0, done, 21);
            }
        }
        let mut second = want(&mut bench, route(), 22).expect(ending);
        assert!(!is_answered(&mut second), "{ending}");
        assert_ne!(status(&bench), ModelStatus::Awake, "{ending}");
    }
}

#[test]
fn a_word_of_a_wake_that_is_over_or_lacks_its_lease_changes_nothing() {
    let mut bench = Bench::new();
    let mut first = want(&mut bench, route(), 10).expect("it sleeps");
    let said = bench.told(0);
    let Some(FromServer::Wake { order, .. }) =
        said.into_iter().find(|said| matches!(said, FromServer::Wake { .. }))
    else {
        panic!("it is woken")
    };
    bench.say(0, FromWorker::WakeBacked { order }, 11);
    assert!(!is_answered(&mut first), "nothing was leased to it");
    bench.request(0, LeaseKind::Weights, WEIGHTS, 12);
    bench.done(0, order, WEIGHTS, 20);
    assert!(is_answered(&mut first));
    bench.say(0, FromWorker::WakeBacked { order }, 21);
    assert!(bench.core.models[0].is_ready(), "late, not wrong");
    bench.say(0, FromWorker::WakeBacked { order: 1 << 40 }, 22);
    assert!(!bench.core.models[0].is_ready(), "no such order was given");
}

fn wakes(said: &[FromServer]) -> usize {
    said.iter().filter(|said| matches!(said, FromServer::Wake { .. })).count()
}

#[test]
fn what_is_about_to_leave_is_not_woken_again_and_again() {
    let mut bench = Bench::new();
    let (mut first, wake) = leased(&mut bench);
    bench.usage(0, WEIGHTS, 20);
    bench.done(0, wake, WEIGHTS, 20);
    assert!(is_answered(&mut first));
    bench.core.handle_route_ended(0, &caller(), 30);
    drop(bench.core.handle_sleep("m0", 0.0, 40).expect("it is idle"));
    let said = bench.told(0);
    let Some(FromServer::Reclaim { order: reclaim, bytes, .. }) =
        said.into_iter().find(|said| matches!(said, FromServer::Reclaim { .. }))
    else {
        panic!("it is to sleep")
    };
    let mut second = want(&mut bench, route(), 50).expect("it is on its way out");
    let mut ordered = 0;
    for now_ms in (50..1_050).step_by(5) {
        bench.core.handle_timer(now_ms);
        for said in bench.told(0) {
            if let FromServer::Wake { order, .. } = said {
                ordered += 1;
                // All is still there.
                bench.done(0, order, ByteCount::ZERO, now_ms);
            }
        }
    }
    assert!(ordered <= 1, "{ordered} wakes that had nothing to bring");
    bench.say(0, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes }, 1_060);
    bench.done(0, reclaim, bytes, 1_060);
    let mut said = bench.told(0);
    for now_ms in (1_060..1_100).step_by(5) {
        bench.core.handle_timer(now_ms);
        said.extend(bench.told(0));
    }
    assert_eq!(wakes(&said), 1, "it is woken once it has left");
    assert!(!is_answered(&mut second));
}
