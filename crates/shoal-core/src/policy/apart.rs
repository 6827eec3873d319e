//! Plans for models that may not stand beside others: beside more than one, or beside one that is there already.

use super::tests::{MIB, evicted, model, reasons, shelf, wake};
use super::*;
use crate::ids::ModelId;
use crate::protocol::LeaseKind;

/// `one` may stand beside neither `left` nor `right`, which may stand beside each other. All would fit.
fn between(left: ModelState, right: ModelState, requests: Vec<PendingRequest>) -> ShelfState {
    let mut models = vec![ModelState { parked: 1, ..model(0, "one", 40, 0) }, left, right];
    models[0].apart = vec![ModelId(1), ModelId(2)];
    models[1].apart = vec![ModelId(0)];
    models[2].apart = vec![ModelId(0)];
    shelf(200, models, requests)
}

/// Granted in this plan: models.
fn granted(plan: &Plan) -> Vec<u32> {
    let granted = plan.actions.iter().filter_map(|action| match action {
        Action::Grant { model, .. } => Some(model.0),
        _ => None,
    });
    granted.collect()
}

#[test]
fn of_two_that_one_may_not_stand_beside_none_comes_back_before_it() {
    let gone = ModelState { parked: 1, ..model(1, "left", 40, 0) };
    let runs = ModelState { active: 1, turn_since_ms: Some(9_000), ..model(2, "right", 40, 40) };
    let state = between(gone.clone(), runs.clone(), vec![wake(0, 40, 5_000), wake(1, 40, 6_000)]);
    let said = plan(&state, 10_000);
    assert_eq!((granted(&said), evicted(&said)), (vec![], vec![]), "{}", reasons(&said));
    assert!(
        reasons(&said).contains("left may not stand beside one, which asked before it and still waits"),
        "{}",
        reasons(&said)
    );
    assert_eq!(check(&state, &said), Ok(()));
    // Then the other's turn is over, and nobody is in the way.
    assert_eq!(evicted(&plan(&state, 12_000)), [(2, 40)]);
    let idle = ModelState { active: 0, turn_since_ms: None, weights_held: MIB(0), up: false, ..runs.clone() };
    let mut free = between(gone.clone(), idle, vec![wake(0, 40, 5_000), wake(1, 40, 6_000)]);
    assert_eq!(granted(&plan(&free, 12_000)), [0]);
    // Who asked before it does not wait for it, and where nothing yields by itself nobody waits for nothing.
    let older = between(gone.clone(), runs.clone(), vec![wake(0, 40, 5_000), wake(1, 40, 4_000)]);
    assert_eq!(granted(&plan(&older, 10_000)), [1]);
    free = ShelfState { is_manual: true, ..state.clone() };
    assert_eq!(granted(&plan(&free, 10_000)), [1]);
    // In its turn it may grow, and its process may take what it takes anywhere.
    let kv = PendingRequest { kind: LeaseKind::Kv, ..wake(2, 10, 9_500) };
    let overhead = PendingRequest { kind: LeaseKind::Overhead, ..wake(1, 2, 9_500) };
    let grows = between(gone, runs, vec![wake(0, 40, 5_000), kv, overhead]);
    assert_eq!(granted(&plan(&grows, 10_000)).len(), 2, "{}", reasons(&plan(&grows, 10_000)));
}

/// Two that were set apart while both were there, and a third that nothing is the matter with.
fn together(one: ModelState, other: ModelState) -> ShelfState {
    let mut models = vec![one, other, ModelState { last_used_ms: 1, ..model(2, "third", 40, 40) }];
    models[0].apart = vec![ModelId(1)];
    models[1].apart = vec![ModelId(0)];
    shelf(200, models, vec![])
}

fn idle(id: u32, name: &str, last_used_ms: u64) -> ModelState {
    ModelState { last_used_ms, ..model(id, name, 40, 40) }
}

fn runs(id: u32, name: &str, turn_since_ms: u64) -> ModelState {
    ModelState { active: 1, turn_since_ms: Some(turn_since_ms), ..model(id, name, 40, 40) }
}

#[test]
fn of_two_that_are_set_apart_while_both_are_there_the_one_worth_less_leaves_whole() {
    let state = together(
        ModelState { kv_held: MIB(6), overhead_held: MIB(4), ..idle(0, "one", 2_000) },
        idle(1, "other", 8_000),
    );
    let said = plan(&state, 10_000);
    assert_eq!(evicted(&said), [(0, 46)], "with its KV, and without what its process takes anywhere");
    assert!(
        matches!(&said.actions[..], [Action::Evict { requester: Some(ModelId(1)), reason, .. }]
            if reason == "other may not stand beside one, which holds 46 MiB; it has been idle for 8.0 s"),
        "{}",
        reasons(&said)
    );
    assert_eq!(check(&state, &said), Ok(()));
    // What was ordered already is not ordered again, and what is left of an order is.
    let mut ordered = state.clone();
    ordered.models[0].ordered = MIB(46);
    assert_eq!(evicted(&plan(&ordered, 10_000)), []);
    ordered.models[0].ordered = MIB(6);
    assert_eq!(evicted(&plan(&ordered, 10_000)), [(0, 40)]);
    let by_hand = ShelfState { is_manual: true, ..state };
    assert_eq!(evicted(&plan(&by_hand, 10_000)), [], "nothing is evicted by itself");
}

#[test]
fn of_two_that_are_set_apart_while_both_run_one_leaves_when_its_turn_is_over() {
    let state = together(runs(0, "one", 8_500), runs(1, "other", 9_000));
    let said = plan(&state, 10_000);
    assert_eq!((evicted(&said), said.again_at_ms), (vec![], Some(10_500)), "both are in their turns");
    let said = plan(&state, 10_500);
    assert_eq!(evicted(&said), [(0, 40)]);
    assert!(reasons(&said).contains("one, which holds 40 MiB; its turn is over"), "{}", reasons(&said));
    // One that is idle leaves at once.
    assert_eq!(evicted(&plan(&together(runs(0, "one", 9_500), idle(1, "other", 9_900)), 10_000)), [(1, 40)]);
    // One that waits with a part that it cannot run with goes before one that runs.
    let waits = ModelState { weights_held: MIB(10), turn_since_ms: None, up: false, ..runs(1, "other", 0) };
    let said = plan(&together(runs(0, "one", 0), waits), 10_000);
    assert_eq!(evicted(&said), [(1, 10)]);
    assert!(reasons(&said).contains("it waits, and cannot run with the part that it holds"));
}

/// What it has is taken for the other's sake, and it is wanted: its wake is for all that will be missing then.
#[test]
fn one_that_leaves_in_this_plan_is_woken_for_what_it_gives_up_as_well() {
    let waits = |ordered| ModelState {
        weights_held: MIB(10),
        kv_held: MIB(4),
        ordered: MIB(ordered),
        parked: 1,
        wanting_since_ms: Some(9_000),
        up: false,
        ..model(1, "other", 40, 10)
    };
    for ordered in [0, 4, 6] {
        let said = plan(&together(runs(0, "one", 9_000), waits(ordered)), 10_000);
        assert_eq!(evicted(&said), [(1, 14 - ordered)], "{ordered}: {}", reasons(&said));
        let restored = said.actions.iter().find_map(|action| match action {
            Action::Restore { model, bytes, .. } => Some((model.0, *bytes)),
            _ => None,
        });
        assert_eq!(restored, Some((1, MIB(40))), "{ordered}: {}", reasons(&said));
    }
}

#[test]
fn of_two_that_are_set_apart_the_other_leaves_where_one_cannot_or_does_not_answer() {
    let leaves = |change: fn(&mut ModelState)| {
        let mut one = idle(0, "one", 2_000);
        change(&mut one);
        evicted(&plan(&together(one, idle(1, "other", 8_000)), 10_000))
    };
    assert_eq!(leaves(|one| one.pinned = true), [(1, 40)]);
    assert_eq!(leaves(|one| one.min = MIB(10)), [(1, 40)], "all but its minimum would be of no use");
    assert_eq!(leaves(|one| one.keeps_weights = true), [(1, 40)]);
    assert_eq!(leaves(|one| one.skip_until_ms = 20_000), [(1, 40)]);
    assert_eq!(leaves(|one| one.ready = false), [], "its process is ending, and it is gone soon");
}
