//! Plans for those who grow in their turn, and for those who wait and hold what they cannot run with.

use super::tests::{MIB, evicted, model, reasons, shelf, wake};
use super::*;
use crate::bytes::ByteCount;
use crate::protocol::LeaseKind;

fn kv(model: u32, mib: u64, asked_ms: u64) -> PendingRequest {
    PendingRequest { kind: LeaseKind::Kv, ..wake(model, mib, asked_ms) }
}

/// A model of 60 MiB in its turn, and one of 60 that has waited for longer and holds a part.
fn beside_a_part(turn_since_ms: u64, part: u64) -> ShelfState {
    let runs = ModelState {
        active: 4,
        kv_held: MIB(4),
        kv_live: MIB(4),
        turn_since_ms: Some(turn_since_ms),
        ..model(0, "runs", 60, 60)
    };
    let waits = ModelState {
        parked: 4,
        wake_ordered: true,
        wanting_since_ms: Some(5_000),
        ..model(1, "waits", 60, part)
    };
    let missing = (60 - part).max(1);
    shelf(64 + part, vec![runs, waits], vec![wake(1, missing, 5_000), kv(0, 6, 9_500)])
}

#[test]
fn who_runs_grows_into_what_an_older_one_cannot_run_with() {
    let said = plan(&beside_a_part(9_000, 30), 10_000);
    assert_eq!(evicted(&said), [(1, 6)], "{}", reasons(&said));
    assert!(reasons(&said).contains("waits behind it and cannot run with the part that it holds"));
}

#[test]
fn who_runs_takes_nothing_from_an_older_one_once_its_turn_is_over() {
    let said = plan(&beside_a_part(7_000, 30), 10_000);
    assert_eq!(evicted(&said), [(0, 30)], "{}", reasons(&said));
}

#[test]
fn who_runs_takes_nothing_from_an_older_one_that_has_all_its_weights() {
    // It waits for its first KV.
    let mut whole = beside_a_part(9_000, 60);
    (whole.models[1].kv_min, whole.requests[0].kind) = (MIB(4), LeaseKind::Kv);
    assert_eq!(evicted(&plan(&whole, 10_000)), []);
    // Nor where this very plan gives it the last of them.
    let mut nearly = beside_a_part(9_000, 58);
    nearly.budget += MIB(4);
    let said = plan(&nearly, 10_000);
    assert_eq!(evicted(&said), [], "{}", reasons(&said));
    assert!(matches!(&said.actions[..], [Action::Grant { .. }, Action::Wait { .. }]), "{}", reasons(&said));
}

#[test]
fn who_runs_takes_nothing_from_an_older_one_that_is_about_to_run() {
    // A third one gives up all that the older one lacks.
    let mut state = beside_a_part(9_000, 30);
    state.models.push(ModelState { ordered: MIB(30), ..model(2, "goes", 60, 30) });
    state.budget += MIB(30);
    let said = plan(&state, 10_000);
    assert_eq!(evicted(&said), [], "{}", reasons(&said));
}

/// Of two who take turns with a third, the one that stops now runs last.
#[test]
fn who_has_to_stop_anyway_gives_before_those_who_wait() {
    let over = ModelState { active: 1, turn_since_ms: Some(1_000), ..model(0, "over", 60, 60) };
    let wanting = |id, name, held, since| ModelState {
        parked: 1,
        wake_ordered: true,
        wanting_since_ms: Some(since),
        ..model(id, name, 60, held)
    };
    let shelf = |held| {
        let models = vec![over.clone(), wanting(1, "next", 0, 2_000), wanting(2, "after", held, 3_000)];
        shelf(60 + held, models, vec![wake(1, 60, 2_000), wake(2, 60 - held, 3_000)])
    };
    let said = plan(&shelf(30), 10_000);
    assert_eq!(evicted(&said), [(0, 60)], "{}", reasons(&said));
    // One that need not stop does not.
    let mut small = shelf(30);
    (small.requests[0], small.models[1].weights_total) = (wake(1, 20, 2_000), MIB(20));
    assert_eq!(evicted(&plan(&small, 10_000)), [(2, 20)]);
}

/// It was given 40 of its 60 MiB to give up, and what it asked for before is the other 20: with that it could not run.
#[test]
fn who_still_gives_weights_up_is_not_granted_a_part() {
    let mut gives = ModelState {
        parked: 1,
        wake_ordered: true,
        wanting_since_ms: Some(3_000),
        ordered: MIB(40),
        ..model(0, "gives", 60, 40)
    };
    let state = |gives: &ModelState| shelf(100, vec![gives.clone()], vec![wake(0, 20, 3_000)]);
    let said = plan(&state(&gives), 10_000);
    assert!(
        matches!(&said.actions[..], [Action::Wait { reason, .. }] if reason.contains("still giving weights up")),
        "{}",
        reasons(&said)
    );
    gives.ordered = ByteCount::ZERO;
    assert!(matches!(&plan(&state(&gives), 10_000).actions[..], [Action::Grant { .. }]));
    // KV that nobody uses goes before weights: then none of these leave.
    (gives.kv_held, gives.ordered) = (MIB(10), MIB(10));
    assert!(matches!(&plan(&state(&gives), 10_000).actions[..], [Action::Grant { .. }]));
}
