//! Plans for models that may not stand beside more than one other.

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
