use super::*;
use crate::bytes::ByteCount;
use crate::ids::ModelId;
use crate::protocol::LeaseKind;

const MIB: fn(u64) -> ByteCount = ByteCount::mib;

fn model(id: u32, name: &str, total: u64, held: u64) -> ModelState {
    ModelState {
        id: ModelId(id),
        name: name.to_owned(),
        ready: true,
        weights_total: MIB(total),
        weights_held: MIB(held),
        up: total == held,
        restore_us_per_mib: 100,
        ..ModelState::default()
    }
}

fn wake(model: u32, mib: u64, asked_ms: u64) -> PendingRequest {
    PendingRequest {
        model: ModelId(model),
        request: asked_ms,
        kind: LeaseKind::Weights,
        bytes: MIB(mib),
        bytes_min: MIB(mib),
        asked_ms,
        deadline_ms: 1_000_000,
    }
}

fn shelf(budget: u64, models: Vec<ModelState>, requests: Vec<PendingRequest>) -> ShelfState {
    ShelfState { budget: MIB(budget), extent: MIB(2), quantum_ms: 2_000, models, requests }
}

fn evicted(plan: &Plan) -> Vec<(u32, u64)> {
    plan.actions
        .iter()
        .filter_map(|action| match action {
            Action::Evict { model, bytes, .. } => Some((model.0, bytes.0 >> 20)),
            _ => None,
        })
        .collect()
}

fn reasons(plan: &Plan) -> String {
    serde_json::to_string_pretty(plan).expect("plain data")
}

#[test]
fn free_bytes_come_first() {
    let state = shelf(100, vec![model(0, "chat", 60, 0), model(1, "code", 40, 40)], vec![wake(0, 60, 5)]);
    let plan = plan(&state, 10);
    assert!(
        matches!(&plan.actions[..], [Action::Grant { bytes, reason, .. }]
            if *bytes == MIB(60) && reason == "chat needs 60 MiB for weights and gets it: 60 MiB were free"),
        "{}",
        reasons(&plan)
    );
}

#[test]
fn surplus_yields_before_idle_models_and_only_what_is_needed() {
    let mut busy = model(1, "code", 40, 40);
    (busy.kv_held, busy.kv_live, busy.active, busy.turn_since_ms) = (MIB(20), MIB(4), 1, Some(9_000));
    let mut idle = model(2, "documents", 30, 30);
    idle.last_used_ms = 1_000;
    let state = shelf(100, vec![model(0, "chat", 31, 0), busy, idle], vec![wake(0, 31, 9_500)]);
    let plan = plan(&state, 10_000);
    // 10 MiB are free, 16 are surplus; the other 5 are rounded up to three extents.
    assert_eq!(evicted(&plan), [(1, 16), (2, 6)], "{}", reasons(&plan));
    let said = reasons(&plan);
    assert!(said.contains(
        "chat needs 31 MiB for weights, 10 MiB are free; code holds 16 MiB of KV that no request uses"
    ));
    assert!(said.contains("documents has been idle for 9.0 s"), "{said}");
}

#[test]
fn the_least_valuable_idle_byte_goes_first() {
    let mut old = model(1, "old", 40, 40);
    let mut dear = model(2, "dear", 40, 40);
    (old.last_used_ms, dear.last_used_ms) = (5_000, 1_000);
    let pick = |dear: &ModelState, old: &ModelState| {
        let state = shelf(80, vec![model(0, "chat", 10, 0), old.clone(), dear.clone()], vec![wake(0, 10, 1)]);
        evicted(&plan(&state, 10_000))
    };
    assert_eq!(pick(&dear, &old), [(2, 10)], "the one not used for longest");
    dear.priority = 3;
    assert_eq!(pick(&dear, &old), [(1, 10)], "priority makes bytes dearer");
    dear.priority = 0;
    dear.restore_us_per_mib = 10_000;
    assert_eq!(pick(&dear, &old), [(1, 10)], "so does the way back");
    old.keep_alive_ms = Some(60_000);
    assert_eq!(pick(&dear, &old), [(2, 10)], "and keep_alive most of all");
}

#[test]
fn pins_and_minimums_hold_and_what_can_never_be_is_denied_at_once() {
    let mut pinned = model(1, "pinned", 40, 40);
    pinned.pinned = true;
    let mut floor = model(2, "floor", 30, 30);
    floor.min = MIB(20);
    let state = shelf(100, vec![model(0, "chat", 60, 0), pinned, floor], vec![wake(0, 60, 1)]);
    let denied = plan(&state, 10_000);
    assert!(
        matches!(&denied.actions[..], [Action::Deny { never: true, reason, .. }]
            if reason == "chat needs 60 MiB for weights, and there are 40 MiB at most: the budget is 100 MiB, \
                          chat holds 0 B itself; pinned keeps 40 MiB (pinned), floor keeps 20 MiB (its minimum)"),
        "{}",
        reasons(&denied)
    );
    let state = ShelfState { requests: vec![wake(0, 40, 1)], ..state };
    assert_eq!(evicted(&plan(&state, 10_000)), [(2, 10)]);
}

#[test]
fn a_busy_model_yields_only_after_its_turn_longest_first() {
    let mut first = model(1, "first", 50, 50);
    let mut second = model(2, "second", 50, 50);
    (first.active, first.turn_since_ms) = (1, Some(1_000));
    (second.active, second.turn_since_ms) = (1, Some(500));
    let state = shelf(100, vec![model(0, "chat", 30, 0), first, second], vec![wake(0, 30, 2_000)]);
    let early = plan(&state, 2_400);
    assert_eq!(evicted(&early), []);
    assert_eq!(early.again_at_ms, Some(2_500), "{}", reasons(&early));
    let late = plan(&state, 3_100);
    assert_eq!(evicted(&late), [(2, 30)], "{}", reasons(&late));
    assert!(
        reasons(&late).contains("second has had the longest turn (2.6 s of 2.0 s)"),
        "{}",
        reasons(&late)
    );
}

#[test]
fn younger_requests_do_not_take_what_an_older_one_waits_for() {
    let mut busy = model(1, "busy", 60, 60);
    (busy.active, busy.turn_since_ms) = (1, Some(1_000));
    let models = vec![model(0, "large", 90, 0), busy, model(2, "small", 20, 0), model(3, "tiny", 10, 0)];
    let state = shelf(100, models, vec![wake(0, 90, 1_500), wake(2, 20, 1_600), wake(3, 10, 1_700)]);
    let said = plan(&state, 2_000);
    let granted: Vec<u32> = said
        .actions
        .iter()
        .filter_map(|action| if let Action::Grant { model, .. } = action { Some(model.0) } else { None })
        .collect();
    assert_eq!(granted, [3], "40 are free, but only 10 are left over in the end: {}", reasons(&said));
}

#[test]
fn a_model_in_its_turn_may_grow_while_others_wait() {
    let mut busy = model(1, "busy", 60, 60);
    (busy.active, busy.turn_since_ms) = (1, Some(1_000));
    let grow = PendingRequest { kind: LeaseKind::Kv, bytes_min: MIB(2), ..wake(1, 8, 1_900) };
    let state = shelf(100, vec![model(0, "large", 100, 0), busy], vec![wake(0, 100, 1_500), grow]);
    let said = plan(&state, 2_000);
    assert!(
        said.actions.iter().any(|action| matches!(action, Action::Grant { model: ModelId(1), .. })),
        "{}",
        reasons(&said)
    );
}

#[test]
fn a_wake_counts_what_was_ordered_away_as_missing() {
    let mut asked_again = model(0, "chat", 60, 60);
    (asked_again.up, asked_again.parked) = (false, 1);
    (asked_again.kv_held, asked_again.kv_live, asked_again.ordered) = (MIB(6), MIB(2), MIB(24));
    let plan = plan(&shelf(100, vec![asked_again], vec![]), 10);
    assert!(
        matches!(&plan.actions[..], [Action::Restore { bytes, reason, .. }]
            if *bytes == MIB(20) && reason == "1 request waits for chat; 20 MiB of its 60 MiB are missing"),
        "{}",
        reasons(&plan)
    );
}

#[test]
fn a_rigid_model_gives_all_or_nothing() {
    let rigid = ModelState { is_rigid: true, ..model(1, "command", 60, 60) };
    let shelf = |rigid: ModelState| shelf(100, vec![model(0, "chat", 50, 0), rigid], vec![wake(0, 50, 5)]);
    assert_eq!(
        evicted(&plan(&shelf(rigid.clone()), 10)),
        [(1, 60)],
        "10 MiB would do, and it has no part of that size"
    );
    let kept = ModelState { min: MIB(2), ..rigid.clone() };
    let refused = plan(&shelf(kept), 10);
    assert!(matches!(&refused.actions[..], [Action::Deny { never: true, .. }]), "{}", reasons(&refused));
    let leaving = ModelState { ordered: MIB(60), ..rigid };
    assert_eq!(evicted(&plan(&shelf(leaving), 10)), [], "it is on its way already");
}

#[test]
fn what_is_ordered_is_not_ordered_twice() {
    let mut idle = model(1, "idle", 80, 80);
    idle.ordered = MIB(40);
    let state = shelf(100, vec![model(0, "chat", 60, 0), idle], vec![wake(0, 60, 1)]);
    let said = plan(&state, 10);
    assert_eq!(evicted(&said), [], "{}", reasons(&said));
    assert!(matches!(&said.actions[..], [Action::Wait { .. }]));
}

#[test]
fn the_silent_are_passed_over_and_deadlines_end_the_wait() {
    let mut silent = model(1, "silent", 50, 50);
    silent.skip_until_ms = 20_000;
    let other = ModelState { last_used_ms: 9_000, ..model(2, "other", 50, 50) };
    let mut state = shelf(100, vec![model(0, "chat", 30, 0), silent, other.clone()], vec![wake(0, 30, 1)]);
    assert_eq!(evicted(&plan(&state, 10_000)), [(2, 30)]);
    state.models[2].pinned = true;
    let waiting = plan(&state, 10_000);
    assert!(matches!(&waiting.actions[..], [Action::Wait { until_ms: 20_000, .. }]), "{}", reasons(&waiting));
    state.requests[0].deadline_ms = 10_000;
    let said = plan(&state, 10_000);
    assert!(
        matches!(&said.actions[..], [Action::Deny { never: false, reason, .. }]
            if reason.contains("waited 10.0 s") && reason.contains("silent holds 50 MiB (did not answer when asked)")),
        "{}",
        reasons(&said)
    );
}

#[test]
fn parked_requests_wake_their_model_once_and_keep_alive_puts_it_to_sleep() {
    let mut wanted = model(0, "chat", 60, 20);
    wanted.parked = 3;
    let mut state = shelf(100, vec![wanted], vec![]);
    let said = plan(&state, 10);
    assert!(
        matches!(&said.actions[..], [Action::Restore { bytes, reason, .. }]
            if *bytes == MIB(40) && reason == "3 requests wait for chat; 40 MiB of its 60 MiB are missing"),
        "{}",
        reasons(&said)
    );
    state.models[0].wake_ordered = true;
    assert_eq!(plan(&state, 10), Plan::default());
    let idle = ModelState { keep_alive_ms: Some(5_000), last_used_ms: 1_000, ..model(0, "chat", 60, 60) };
    let state = shelf(100, vec![idle], vec![]);
    assert_eq!(plan(&state, 5_999), Plan { actions: vec![], again_at_ms: Some(6_000) });
    assert_eq!(evicted(&plan(&state, 6_000)), [(0, 60)]);
}

#[test]
fn a_plan_is_made_again_from_its_logged_state() {
    let mut idle = model(1, "idle", 80, 80);
    idle.last_used_ms = 3;
    let state = shelf(100, vec![model(0, "chat", 60, 0), idle], vec![wake(0, 60, 1)]);
    let logged = serde_json::to_string(&state).expect("plain data");
    let read: ShelfState = serde_json::from_str(&logged).expect("own text");
    assert_eq!(plan(&read, 77), plan(&state, 77));
}

#[test]
fn two_requests_in_one_plan_do_not_pass_the_maximum_together() {
    let capped = ModelState { max: Some(MIB(50)), ..model(0, "chat", 40, 0) };
    let kv = PendingRequest { kind: LeaseKind::Kv, bytes_min: MIB(2), ..wake(0, 20, 2) };
    let said = plan(&shelf(100, vec![capped], vec![wake(0, 40, 1), kv]), 10);
    let granted: Vec<_> = said
        .actions
        .iter()
        .filter_map(|action| if let Action::Grant { bytes, .. } = action { Some(*bytes) } else { None })
        .collect();
    assert_eq!(granted, [MIB(40), MIB(10)], "{}", reasons(&said));
}

#[test]
fn turns_that_began_since_do_not_let_more_of_the_young_in() {
    let mut old = model(1, "old", 60, 60);
    (old.active, old.turn_since_ms) = (1, Some(1_000));
    let mut let_in = model(3, "let in", 10, 10);
    (let_in.active, let_in.turn_since_ms) = (1, Some(1_800));
    let models = vec![model(0, "large", 90, 0), old, model(2, "small", 10, 0), let_in];
    let state = shelf(100, models, vec![wake(0, 90, 1_500), wake(2, 10, 1_900)]);
    let said = plan(&state, 2_000);
    assert!(
        said.actions.iter().all(|action| matches!(action, Action::Wait { .. })),
        "large would wait for the turn of small as well: {}",
        reasons(&said)
    );
}
