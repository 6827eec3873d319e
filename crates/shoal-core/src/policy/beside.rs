//! Plans for engines whose steps take memory beside their weights, which goes with the last of those.

use super::tests::{MIB, evicted, model, reasons, shelf, wake};
use super::*;
use crate::bytes::ByteCount;
use crate::protocol::LeaseKind;

/// An engine of 60 MiB on the device that keeps 8 MiB asleep and takes 16 more in steps.
fn awake(id: u32, name: &str) -> ModelState {
    ModelState { overhead_held: MIB(24), overhead_leaves: MIB(16), ..model(id, name, 60, 60) }
}

/// The same, asleep.
fn asleep(id: u32, name: &str) -> ModelState {
    ModelState { overhead_held: MIB(8), overhead_lacking: MIB(16), ..model(id, name, 60, 0) }
}

/// Two of them share 100 MiB: each fits beside the other asleep.
fn two(there: ModelState) -> ShelfState {
    shelf(100, vec![there, asleep(1, "asks")], vec![wake(1, 76, 5_000)])
}

#[test]
fn what_steps_take_is_counted_with_the_last_of_the_weights() {
    let said = plan(&two(awake(0, "idle")), 10_000);
    assert_eq!(evicted(&said), [(0, 60)], "{}", reasons(&said));
    // On its way, and gone with the rest to come: nobody else is asked, and nobody younger is let in.
    let orders = [(MIB(60), MIB(60)), (ByteCount::ZERO, ByteCount::ZERO)];
    for (weights_held, ordered) in orders {
        let mut state = two(ModelState { weights_held, ordered, ..awake(0, "goes") });
        state.budget += MIB(10);
        state.models.push(model(2, "other", 10, 10));
        state.models.push(model(3, "young", 6, 0));
        state.requests.push(wake(3, 6, 6_000));
        let said = plan(&state, 10_000);
        assert_eq!(evicted(&said), [], "{}", reasons(&said));
        assert!(
            !said.actions.iter().any(|action| matches!(action, Action::Deny { .. })),
            "{}",
            reasons(&said)
        );
    }
    // It is back: all of it is free.
    let said = plan(
        &two(ModelState {
            overhead_held: MIB(8),
            overhead_leaves: ByteCount::ZERO,
            ..model(0, "gone", 60, 0)
        }),
        10_000,
    );
    assert!(
        matches!(&said.actions[..], [Action::Grant { bytes, .. }] if *bytes == MIB(76)),
        "{}",
        reasons(&said)
    );
}

#[test]
fn it_comes_where_weights_have_left_and_kv_has_not_and_where_others_took_memory() {
    let there = ModelState { kv_held: MIB(4), kv_cached: MIB(4), ..awake(0, "goes") };
    let mut state = two(ModelState { weights_held: ByteCount::ZERO, ..there });
    let said = plan(&state, 10_000);
    // 100 less 24, 4 and 8 are free, and 16 are coming.
    assert_eq!(evicted(&said), [], "{}", reasons(&said));
    // Others took 76: what one gives with its weights is enough.
    state.requests.clear();
    state.models = vec![awake(0, "idle"), model(1, "other", 16, 16)];
    (state.budget, state.taken) = (MIB(24), MIB(76));
    assert_eq!(evicted(&plan(&state, 10_000)), [(0, 60)], "{}", reasons(&plan(&state, 10_000)));
}

#[test]
fn what_steps_take_stays_with_weights_that_stay() {
    let kept = [
        ModelState { pinned: true, ..awake(0, "stays") },
        ModelState { keeps_weights: true, ..awake(0, "stays") },
        ModelState { min: MIB(30), ..awake(0, "stays") },
    ];
    for there in kept {
        let said = plan(&two(there), 10_000);
        assert!(matches!(&said.actions[..], [Action::Deny { never: true, .. }]), "{}", reasons(&said));
    }
    // A minimum that overhead alone is more than, is kept all the same.
    let said = plan(&two(ModelState { min: MIB(20), ..awake(0, "stays") }), 10_000);
    assert!(
        matches!(&said.actions[..], [Action::Deny { never: true, reason, .. }] if reason.contains("stays keeps 20 MiB")),
        "{}",
        reasons(&said)
    );
}

#[test]
fn a_part_of_the_weights_frees_nothing_of_what_steps_take() {
    let mut state = two(awake(0, "idle"));
    (state.models[1].weights_total, state.requests[0]) = (MIB(40), wake(1, 56, 5_000));
    let said = plan(&state, 10_000);
    assert_eq!(evicted(&said), [(0, 48)], "{}", reasons(&said));
}

#[test]
fn kv_is_not_granted_into_the_room_of_what_steps_take() {
    let mut state = shelf(100, vec![asleep(0, "asks")], vec![]);
    state.requests.push(PendingRequest { kind: LeaseKind::Kv, ..wake(0, 20, 5_000) });
    let said = plan(&state, 10_000);
    assert!(
        matches!(&said.actions[..], [Action::Deny { reason, .. }]
            if reason.contains("lacks 76 MiB of its weights and of what its steps take besides")),
        "{}",
        reasons(&said)
    );
}

#[test]
fn nobody_gives_anything_up_for_what_the_steps_of_a_preload_take() {
    let preloaded = ModelState { preload: true, ..asleep(0, "preload") };
    let state = |free: u64| shelf(68 + free, vec![preloaded.clone(), model(1, "idle", 60, 60)], vec![]);
    let restores = |plan: &Plan| plan.actions.iter().any(|action| matches!(action, Action::Restore { .. }));
    assert!(!restores(&plan(&state(75), 10_000)));
    assert!(restores(&plan(&state(76), 10_000)));
}
