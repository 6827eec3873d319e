//! Plans for those who grow in their turn, for those who wait and hold what they cannot run with, and for those whose own
//! KV is in the way of their weights.

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

/// A model of 60 MiB of which 20 have left, with 8 MiB of KV, beside one that keeps its minimum of 2 in a budget of 68.
fn beside_its_kv(live: u64) -> ShelfState {
    let waits = ModelState {
        active: 1,
        kv_held: MIB(8),
        kv_live: MIB(live),
        kv_cached: MIB(8 - live),
        ..model(0, "waits", 60, 40)
    };
    let floor = ModelState { min: MIB(2), kv_held: MIB(2), ..model(1, "floor", 4, 0) };
    shelf(68, vec![waits, floor], vec![wake(0, 20, 5_000)])
}

#[test]
fn weights_that_do_not_fit_beside_what_the_models_own_requests_use_wait_for_it() {
    let said = plan(&beside_its_kv(8), 10_000);
    assert!(
        matches!(&said.actions[..], [Action::Wait { reason, .. }]
            if reason.contains("waits holds 48 MiB itself (8 MiB of it is KV that its requests use)")
                && reason.contains("floor keeps 2 MiB (its minimum)")),
        "{}",
        reasons(&said)
    );
    // What nobody uses of it is taken.
    assert_eq!(evicted(&plan(&beside_its_kv(2), 10_000)), [(0, 2)]);
    // Without any KV they would not fit either.
    let mut large = beside_its_kv(8);
    large.models[1].min = MIB(10);
    large.models[1].kv_held = MIB(10);
    let said = plan(&large, 10_000);
    assert!(matches!(&said.actions[..], [Action::Deny { never: true, .. }]), "{}", reasons(&said));
}

#[test]
fn weights_that_do_not_fit_under_a_maximum_have_the_models_own_kv_put_off() {
    let under = |live: u64, max: u64| {
        let mut state = beside_its_kv(live);
        (state.budget, state.models[0].max) = (MIB(200), Some(MIB(max)));
        state
    };
    let said = plan(&under(8, 66), 10_000);
    assert!(
        matches!(&said.actions[..], [Action::Wait { reason, .. }]
            if reason.contains("(8 MiB of it is KV that its requests use) and may hold 66 MiB at most")),
        "{}",
        reasons(&said)
    );
    let said = plan(&under(2, 66), 10_000);
    assert_eq!(evicted(&said), [(0, 2)], "{}", reasons(&said));
    assert!(matches!(&said.actions[..], [_, Action::Wait { .. }]), "{}", reasons(&said));
    // Ordered already, it is waited for.
    let mut ordered = under(2, 66);
    ordered.models[0].ordered = MIB(2);
    let said = plan(&ordered, 10_000);
    assert!(matches!(&said.actions[..], [Action::Wait { .. }]), "{}", reasons(&said));
    let said = plan(&under(8, 59), 10_000);
    assert!(matches!(&said.actions[..], [Action::Deny { never: true, .. }]), "{}", reasons(&said));
}
