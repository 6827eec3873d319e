//! Plans where others took memory of the device.

use super::tests::{MIB, evicted, model, reasons, shelf, wake};
use super::*;
use crate::ids::ModelId;
use crate::protocol::LeaseKind;

/// Who has come, and how much is left: 100 MiB in all, so much of it others'.
fn crowded(taken: u64, models: Vec<ModelState>, requests: Vec<PendingRequest>) -> ShelfState {
    ShelfState { taken: MIB(taken), ..shelf(100 - taken, models, requests) }
}

fn busy(model: ModelState, turn_since_ms: u64) -> ModelState {
    ModelState { active: 1, turn_since_ms: Some(turn_since_ms), ..model }
}

#[test]
fn what_others_took_comes_back_from_the_idle_and_only_as_much_as_is_owed() {
    let idle = ModelState { last_used_ms: 10, ..model(0, "chat", 40, 40) };
    let runs = busy(model(1, "code", 40, 40), 9_000);
    let state = crowded(30, vec![idle, runs], vec![]);
    let said = plan(&state, 10_000);
    assert_eq!(evicted(&said), [(0, 10)]);
    assert!(
        reasons(&said).contains(
            "others have 30 MiB of the device that models share, 70 MiB is left and 80 MiB is leased"
        )
    );
    assert!(matches!(&said.actions[..], [Action::Evict { requester: None, .. }]));
    assert_eq!(check(&state, &said), Ok(()));
    // What was ordered already is not ordered again; where nothing is owed, nothing is.
    let mut ordered = state.clone();
    ordered.models[0].ordered = MIB(10);
    assert_eq!(evicted(&plan(&ordered, 10_000)), []);
    assert_eq!(evicted(&plan(&crowded(20, state.models, vec![]), 10_000)), []);
}

#[test]
fn one_that_runs_yields_to_others_only_if_it_can_come_back() {
    let two = |taken| {
        crowded(taken, vec![busy(model(0, "chat", 40, 40), 0), busy(model(1, "code", 40, 40), 1)], vec![])
    };
    // Turns are over: in the 70 left they take turns.
    assert_eq!(evicted(&plan(&two(30), 10_000)), [(0, 10)]);
    // In their turns they keep what they run with.
    assert_eq!(evicted(&plan(&two(30), 1_000)), []);
    // In 30 neither could run again.
    assert_eq!(evicted(&plan(&two(70), 10_000)), []);
    let mut pinned = two(30);
    pinned.models[0].pinned = true;
    assert_eq!(evicted(&plan(&pinned, 10_000)), [], "with the other pinned there is no room to come back to");
    let by_hand = ShelfState { is_manual: true, ..crowded(70, vec![model(0, "chat", 40, 40)], vec![]) };
    assert_eq!(evicted(&plan(&by_hand, 10_000)), [], "nothing is evicted by itself");
}

#[test]
fn one_that_does_not_answer_is_passed_over_for_the_next() {
    let silent = ModelState { skip_until_ms: 20_000, last_used_ms: 10, ..model(0, "chat", 40, 40) };
    let next = ModelState { last_used_ms: 500, ..model(1, "code", 40, 40) };
    assert_eq!(evicted(&plan(&crowded(30, vec![silent, next], vec![]), 10_000)), [(1, 10)]);
}

#[test]
fn a_request_that_only_others_stand_against_waits_and_holds_nobody_up() {
    let away = |id, name, total| model(id, name, total, 0);
    let models = vec![away(0, "chat", 80), away(1, "code", 40)];
    let state = crowded(30, models, vec![wake(0, 80, 1), wake(1, 40, 2)]);
    let said = plan(&state, 10_000);
    assert!(
        matches!(&said.actions[..], [Action::Wait { model: ModelId(0), reason, .. }, Action::Grant { model: ModelId(1), .. }]
            if reason.contains("while others have 30 MiB of the device")),
        "{}",
        reasons(&said)
    );
    // Its time is over, or it would not do even without them.
    let late = PendingRequest { deadline_ms: 9_000, ..wake(0, 80, 1) };
    let said = plan(&ShelfState { requests: vec![late], ..state.clone() }, 10_000);
    assert!(matches!(&said.actions[..], [Action::Deny { never: false, .. }]), "{}", reasons(&said));
    let said = plan(&ShelfState { requests: vec![wake(0, 120, 1)], ..state }, 10_000);
    assert!(matches!(&said.actions[..], [Action::Deny { never: true, .. }]), "{}", reasons(&said));
}

/// A lease for overhead of which less is measured by now is no reason to turn anybody away for good.
#[test]
fn a_request_that_falling_overhead_stands_against_waits_and_holds_nobody_up() {
    let state = |falling| ShelfState {
        falling: MIB(falling),
        ..shelf(
            100,
            vec![
                ModelState { overhead_held: MIB(60), ..model(0, "chat", 20, 0) },
                model(1, "code", 60, 0),
                model(2, "mail", 30, 0),
            ],
            vec![wake(1, 60, 1), wake(2, 30, 2)],
        )
    };
    let said = plan(&state(50), 10_000);
    assert!(
        matches!(
            &said.actions[..],
            [Action::Wait { model: ModelId(1), .. }, Action::Grant { model: ModelId(2), .. }]
        ),
        "{}",
        reasons(&said)
    );
    assert!(
        reasons(&said).contains("50 MiB that processes took beside weights and KV come back"),
        "{}",
        reasons(&said)
    );
    let said = plan(&state(18), 10_000);
    assert!(
        matches!(&said.actions[..], [Action::Deny { never: true, .. }, Action::Grant { .. }]),
        "{}",
        reasons(&said)
    );
}

#[test]
fn kv_of_one_that_starts_waits_for_what_others_take_and_of_one_that_serves_is_denied() {
    let asks = |ready| {
        let birch = ModelState { ready, ..model(0, "birch", 8, 8) };
        let kv = PendingRequest { kind: LeaseKind::Kv, ..wake(0, 12, 1) };
        plan(&ShelfState { taken: MIB(16), ..shelf(18, vec![birch], vec![kv]) }, 10_000)
    };
    let said = asks(false);
    assert!(
        matches!(&said.actions[..], [Action::Wait { reason, .. }] if reason.contains("while others have 16 MiB")),
        "a worker that ended holds it, or another process: {}",
        reasons(&said)
    );
    let said = asks(true);
    assert!(matches!(&said.actions[..], [Action::Deny { never: true, .. }]), "{}", reasons(&said));
}

#[test]
fn what_is_owed_and_what_keep_alive_sends_away_are_not_ordered_twice() {
    let idle = ModelState { kv_held: MIB(22), keep_alive_ms: Some(0), ..model(0, "chat", 1, 0) };
    for is_manual in [false, true] {
        let state = ShelfState { is_manual, ..crowded(79, vec![idle.clone()], vec![]) };
        let said = plan(&state, 10_000);
        assert_eq!(check(&state, &said), Ok(()), "{}", reasons(&said));
        assert_eq!(evicted(&said).iter().map(|(_, mib)| mib).sum::<u64>(), 22);
    }
}

/// What a process had that is gone comes back for whoever asked first: somebody who asked later and needs less than that is
/// not let in before, or the first would never have its turn.
#[test]
fn what_comes_back_from_the_dead_is_for_who_asked_first_and_nobody_has_it_before() {
    let away = |id, name, total| model(id, name, total, 0);
    let state = |returning, second| ShelfState {
        returning: MIB(returning),
        ..shelf(
            100,
            vec![away(0, "chat", 40), away(1, "code", second), model(2, "mail", 26, 26)],
            vec![wake(0, 40, 1), wake(1, second, 2)],
        )
    };
    // 38 are free, and 36 come back: enough for the first, and then for 34.
    let mut pinned = state(36, 36);
    pinned.models[2].pinned = true;
    let said = plan(&pinned, 10_000);
    assert!(
        matches!(
            &said.actions[..],
            [Action::Wait { model: ModelId(0), reason, .. }, Action::Wait { model: ModelId(1), .. }]
                if reason.contains("waits for 2 MiB") && reason.contains("36 MiB of processes that ended come back")
        ),
        "{}",
        reasons(&said)
    );
    // It is enough for the first: nobody is disturbed for it.
    let mut alone = state(36, 36);
    alone.requests.truncate(1);
    assert!(evicted(&plan(&alone, 10_000)).is_empty(), "{}", reasons(&plan(&alone, 10_000)));
    // Once it is there, both are met, or the first and whom it leaves enough.
    pinned.returning = MIB(0);
    let said = plan(&pinned, 10_000);
    assert!(
        matches!(
            &said.actions[..],
            [Action::Grant { model: ModelId(0), .. }, Action::Wait { model: ModelId(1), .. }]
        ),
        "{}",
        reasons(&said)
    );
    // A plan that grants it before is not obeyed.
    let reason = String::new();
    let grant = Action::Grant { model: ModelId(0), request: 1, bytes: MIB(40), reason };
    let early = check(&state(36, 36), &Plan { actions: vec![grant], ..Plan::default() });
    assert!(early.as_ref().is_err_and(|why| why.contains("36 MiB of processes that ended")), "{early:?}");
}
