use super::*;
use crate::bytes::ByteCount;
use crate::ids::ModelId;
use crate::protocol::LeaseKind;

pub(super) const MIB: fn(u64) -> ByteCount = ByteCount::mib;

pub(super) fn model(id: u32, name: &str, total: u64, held: u64) -> ModelState {
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

pub(super) fn wake(model: u32, mib: u64, asked_ms: u64) -> PendingRequest {
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

pub(super) fn shelf(budget: u64, models: Vec<ModelState>, requests: Vec<PendingRequest>) -> ShelfState {
    ShelfState {
        budget: MIB(budget),
        extent: MIB(2),
        quantum_ms: 2_000,
        models,
        requests,
        ..ShelfState::default()
    }
}

pub(super) fn evicted(plan: &Plan) -> Vec<(u32, u64)> {
    plan.actions
        .iter()
        .filter_map(|action| match action {
            Action::Evict { model, bytes, .. } => Some((model.0, bytes.0 >> 20)),
            _ => None,
        })
        .collect()
}

pub(super) fn reasons(plan: &Plan) -> String {
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
            if *bytes == MIB(20)
                && reason == "1 request waits for chat; 20 MiB of its 60 MiB are missing, 20 MiB of which are still \
                              on their way out"),
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
fn who_has_no_patience_gets_what_is_free_and_disturbs_nobody() {
    let models = vec![model(0, "chat", 30, 30), ModelState { last_used_ms: 1, ..model(1, "other", 60, 60) }];
    let mut request = PendingRequest { kind: LeaseKind::Kv, deadline_ms: 10_000, ..wake(0, 10, 1) };
    let said = plan(&shelf(100, models.clone(), vec![request.clone()]), 10_000);
    assert!(
        matches!(&said.actions[..], [Action::Grant { bytes, .. }] if *bytes == MIB(10)),
        "{}",
        reasons(&said)
    );
    request.bytes = MIB(20);
    request.bytes_min = MIB(20);
    let hasty = plan(&shelf(100, models.clone(), vec![request.clone()]), 10_000);
    assert!(matches!(&hasty.actions[..], [Action::Deny { never: false, .. }]), "{}", reasons(&hasty));
    request.deadline_ms = 20_000;
    assert_eq!(evicted(&plan(&shelf(100, models, vec![request]), 10_000)), [(1, 10)]);
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
fn overhead_and_kv_in_one_plan_do_not_pass_the_maximum_together() {
    // Found by `policy_sim::a_plan_for_any_shelf_keeps_the_rules` in 20,000 cases.
    let mut capped = ModelState { max: Some(MIB(33)), ..model(0, "chat", 1, 0) };
    capped.kv_held = MIB(15);
    let overhead = PendingRequest { kind: LeaseKind::Overhead, bytes_min: MIB(0), ..wake(0, 2, 1) };
    let kv = PendingRequest { kind: LeaseKind::Kv, bytes_min: MIB(0), ..wake(0, 17, 2) };
    let state = shelf(34, vec![capped], vec![overhead, kv]);
    let said = plan(&state, 10);
    assert_eq!(check(&state, &said), Ok(()), "{}", reasons(&said));
    let granted: Vec<_> = said
        .actions
        .iter()
        .filter_map(|action| if let Action::Grant { bytes, .. } = action { Some(*bytes) } else { None })
        .collect();
    assert_eq!(granted, [MIB(2), MIB(15)], "a MiB of its 33 is for the weights: {}", reasons(&said));
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

fn apart(mut models: Vec<ModelState>) -> Vec<ModelState> {
    (models[0].apart, models[1].apart) = (vec![models[1].id], vec![models[0].id]);
    models
}

#[test]
fn a_prefix_competes_with_weights_in_one_currency() {
    let mut busy = model(1, "busy", 40, 40);
    (busy.kv_held, busy.kv_live, busy.kv_cached) = (MIB(20), MIB(4), MIB(12));
    (busy.active, busy.turn_since_ms, busy.last_used_ms) = (1, Some(9_000), 9_000);
    let idle = ModelState { last_used_ms: 1_000, ..model(2, "idle", 20, 20) };
    let pick = |busy: &ModelState, idle: &ModelState| {
        let state =
            shelf(80, vec![model(0, "chat", 10, 0), busy.clone(), idle.clone()], vec![wake(0, 10, 9_500)]);
        let said = plan(&state, 10_000);
        (evicted(&said), reasons(&said))
    };
    // 4 MiB hold nothing and go first. Then a byte of the prefix is worth 50 us a second (100 us, used a second ago), one of
    // the idle model 10 (100 us, 9 s ago).
    assert_eq!(pick(&busy, &idle).0, [(1, 4), (2, 6)]);
    let dear = ModelState { restore_us_per_mib: 1_000, ..idle.clone() };
    let (said, why) = pick(&busy, &dear);
    assert_eq!(said, [(1, 10)], "a prefix that is computed faster than weights are read: {why}");
    assert!(
        why.contains("busy holds 12 MiB of KV for prompts that may come again, worth least (50 us a second"),
        "{why}"
    );
    busy.kv_back_us_per_mib = 5_000;
    assert_eq!(pick(&busy, &dear).0, [(1, 4), (2, 6)], "and one that takes long to compute stays");
    // 2,500 us a second, where the idle model's bytes are worth 100.
    busy.kv_found_milli = 25;
    let (said, why) = pick(&busy, &dear);
    assert_eq!(
        said,
        [(1, 10)],
        "but not where it is one of forty, and the others would not be missed: {why}"
    );
    assert!(
        why.contains("(62 us a second for each MiB: 5000 us to bring it back, a use finds 2.5% of it again"),
        "{why}"
    );
    busy.kv_found_milli = 500;
    assert_eq!(pick(&busy, &dear).0, [(1, 4), (2, 6)], "half of it is found again: it stays");
}

#[test]
fn use_counts_beside_the_last_time() {
    let last = |id, name: &str, uses_milli, last_used_ms| ModelState {
        uses_milli,
        uses_window_ms: 60_000,
        last_used_ms,
        ..model(id, name, 40, 40)
    };
    let models =
        vec![model(0, "chat", 10, 0), last(1, "often", 20_000, 60_000), last(2, "seldom", 1_000, 80_000)];
    let said = plan(&shelf(80, models, vec![wake(0, 10, 1)]), 90_000);
    assert_eq!(evicted(&said), [(2, 10)], "often used, though longer ago: {}", reasons(&said));
    assert!(reasons(&said).contains("1.0 uses in 71.0 s"), "{}", reasons(&said));
}

#[test]
fn what_was_just_brought_back_goes_after_other_idle_ones_and_runs_long_enough() {
    let fresh = ModelState {
        restore_us_per_mib: 10_000,
        last_used_ms: 1_000,
        restored_ms: Some(9_000),
        ..model(1, "fresh", 40, 40)
    };
    let models = vec![
        model(0, "chat", 10, 0),
        fresh.clone(),
        ModelState { last_used_ms: 9_500, ..model(2, "other", 40, 40) },
    ];
    let mut state = shelf(80, models, vec![wake(0, 10, 1)]);
    state.models[2].restore_us_per_mib = 1_000_000;
    assert_eq!(evicted(&plan(&state, 10_000)), [(2, 10)], "though its bytes are worth more");
    assert_eq!(evicted(&plan(&state, 10_700)), [(1, 10)], "four times the 400 ms that it takes are over");
    state.models[2].pinned = true;
    let said = plan(&state, 10_000);
    assert!(reasons(&said).contains("brought back only just now"), "{}", reasons(&said));
    assert_eq!(turn_ms(&state, &fresh), 2_000, "the quantum is longer");
    let slow = ModelState { restore_us_per_mib: 50_000, ..fresh };
    assert_eq!(turn_ms(&state, &slow), 4_000, "twice what bringing it back takes");
    assert_eq!(
        turn_ms(&state, &ModelState { restore_us_per_mib: 10_000_000, ..slow }),
        60_000,
        "a minute at most"
    );
}

#[test]
fn who_may_not_stand_beside_another_waits_until_it_is_gone() {
    let rival = ModelState { kv_held: MIB(4), overhead_held: MIB(2), ..model(1, "code", 30, 30) };
    let state = |rival: ModelState| {
        shelf(
            100,
            apart(vec![model(0, "chat", 20, 0), rival, model(2, "third", 10, 10)]),
            vec![wake(0, 20, 5_000)],
        )
    };
    let said = plan(&state(rival.clone()), 10_000);
    assert_eq!(evicted(&said), [(1, 34)], "although 54 MiB are free: {}", reasons(&said));
    assert!(
        reasons(&said)
            .contains("chat may not stand beside code, which holds 34 MiB; it has been idle for 10.0 s")
    );
    assert!(!reasons(&said).contains("grant"), "{}", reasons(&said));
    let busy = ModelState { active: 1, turn_since_ms: Some(9_000), ..rival.clone() };
    assert_eq!(evicted(&plan(&state(busy.clone()), 10_000)), [], "not in its turn");
    assert_eq!(evicted(&plan(&state(busy), 11_000)), [(1, 34)], "but after it");
    let mut starting = state(rival.clone());
    starting.requests[0].kind = LeaseKind::Overhead;
    let said = plan(&starting, 10_000);
    assert!(matches!(&said.actions[..], [Action::Grant { .. }]), "a process may start: {}", reasons(&said));
    assert_eq!(check(&starting, &said), Ok(()));
    let gone = ModelState { weights_held: MIB(0), kv_held: MIB(0), up: false, ..rival };
    let said = plan(&state(gone.clone()), 10_000);
    assert!(matches!(&said.actions[..], [Action::Grant { .. }]), "its process may stay: {}", reasons(&said));
    let pinned = ModelState { pinned: true, ..state(gone.clone()).models[1].clone() };
    assert!(
        matches!(&plan(&state(pinned), 10_000).actions[..], [Action::Grant { .. }]),
        "it has nothing there"
    );
    let stays = ModelState { min: MIB(8), weights_held: MIB(10), ..gone.clone() };
    let said = plan(&state(stays), 10_000);
    assert!(
        matches!(&said.actions[..], [Action::Deny { never: true, reason, .. }]
            if reason.ends_with("code, which holds 10 MiB; code keeps 8 MiB (its minimum)")),
        "{}",
        reasons(&said)
    );
    let both = ShelfState { requests: vec![wake(0, 20, 5_000), wake(1, 30, 5_001)], ..state(gone) };
    let said = plan(&both, 10_000);
    assert!(
        matches!(
            &said.actions[..],
            [Action::Grant { model: ModelId(0), .. }, Action::Wait { model: ModelId(1), .. }]
        ),
        "one of two that ask at once: {}",
        reasons(&said)
    );
}

#[test]
fn nothing_is_evicted_by_itself_where_that_was_asked_for() {
    let mut idle = model(1, "idle", 60, 60);
    (idle.kv_held, idle.kv_cached) = (MIB(10), MIB(4));
    let mut state = shelf(80, vec![model(0, "chat", 16, 0), idle], vec![wake(0, 16, 1)]);
    assert_eq!(evicted(&plan(&state, 10_000)), [(1, 6)], "what nobody misses is taken");
    state.is_manual = true;
    assert_eq!(evicted(&plan(&state, 10_000)), [(1, 6)], "also then");
    state.requests = vec![wake(0, 17, 1)];
    let said = plan(&state, 10_000);
    assert_eq!(evicted(&said), [], "{}", reasons(&said));
    assert!(reasons(&said).contains("evict = \\\"never\\\""), "{}", reasons(&said));
    state.models[1].keep_alive_ms = Some(5_000);
    assert_eq!(evicted(&plan(&state, 10_000)), [(1, 70)], "and what a model's own keys say still holds");
}

#[test]
fn a_model_that_does_not_sleep_gives_only_kv() {
    let mut awake = ModelState { keeps_weights: true, ..model(1, "awake", 60, 60) };
    (awake.kv_held, awake.kv_live) = (MIB(20), MIB(12));
    let state = |mib| shelf(80, vec![model(0, "chat", mib, 0), awake.clone()], vec![wake(0, mib, 1)]);
    assert_eq!(evicted(&plan(&state(20), 10_000)), [(1, 20)]);
    let refused = plan(&state(21), 10_000);
    assert!(reasons(&refused).contains("awake keeps 60 MiB (it does not sleep)"), "{}", reasons(&refused));
}

#[test]
fn preloading_takes_from_nobody() {
    let wanted = |id, name: &str, priority| ModelState { preload: true, priority, ..model(id, name, 40, 0) };
    let woken = |state: &ShelfState| -> Vec<u32> {
        let said = plan(state, 10_000);
        let woken =
            |action: &Action| if let Action::Restore { model, .. } = action { Some(model.0) } else { None };
        said.actions.iter().filter_map(woken).collect()
    };
    let mut state = shelf(100, vec![wanted(0, "a", 0), wanted(1, "b", 0), wanted(2, "c", 1)], vec![]);
    assert_eq!(woken(&state), [2, 0], "as many as fit, the most important first");
    state.models[2].wake_ordered = true;
    assert_eq!(woken(&state), [0], "what is on its way counts");
    state.models = apart(state.models);
    (state.models[1].weights_held, state.models[1].up) = (MIB(40), true);
    state.models[2].wake_ordered = false;
    assert_eq!(woken(&state), [2], "a must not stand beside b");
    state.requests = vec![wake(0, 90, 1)];
    assert_eq!(woken(&state), [0; 0], "not while somebody waits");
}

#[test]
fn lru_takes_whole_models_by_their_last_use_alone() {
    let dear = ModelState {
        last_used_ms: 1_000,
        priority: 8,
        restore_us_per_mib: 90_000,
        ..model(1, "dear", 40, 40)
    };
    let state =
        shelf(80, vec![model(0, "chat", 10, 0), dear, model(2, "other", 40, 40)], vec![wake(0, 10, 1)]);
    let said = Lru.plan(&ShelfState { models: state.models.clone(), ..state.clone() }, 10_000);
    assert_eq!(evicted(&said), [(2, 40)]);
    let mut used = state;
    used.models[2].last_used_ms = 2_000;
    assert_eq!(evicted(&Lru.plan(&used, 10_000)), [(1, 40)]);
    assert_eq!(evicted(&Value.plan(&used, 10_000)), [(2, 10)]);
    for name in BUILTIN {
        assert_eq!(builtin(name).expect("named").name(), name);
    }
    assert!(builtin("fifo").is_none());
}

#[test]
fn a_shadow_counts_where_it_would_have_done_otherwise() {
    let models = |first, second| {
        let used = |id, name: &str, last_used_ms| ModelState { last_used_ms, ..model(id, name, 40, 40) };
        vec![model(0, "chat", 40, 0), used(1, "one", first), used(2, "two", second)]
    };
    let mut shadow = Shadow::new(Box::new(Lru));
    let mut watch = |state: &ShelfState| shadow.watch(state, &Value.plan(state, 10_000), 10_000);
    assert_eq!(watch(&shelf(80, models(1_000, 2_000), vec![wake(0, 40, 1)])), None, "the same");
    assert_eq!(watch(&shelf(80, models(1_000, 2_000), vec![])), None, "nothing to decide");
    let mut state = shelf(80, models(1_000, 2_000), vec![wake(0, 40, 1)]);
    state.models[1].priority = 5;
    assert_eq!(
        watch(&state).expect("differs"),
        "lru would have taken 40 MiB of one instead of 40 MiB of two"
    );
    let counts = ShadowCounts { decisions: 2, differing: 1, evicted_live: MIB(80), evicted_shadow: MIB(80) };
    assert_eq!(shadow.counts(), counts);
}

/// Lets nobody run longer than a second.
#[derive(Debug)]
struct Impatient;

impl Policy for Impatient {
    fn name(&self) -> &'static str {
        "impatient"
    }

    fn plan(&self, state: &ShelfState, now_ms: u64) -> Plan {
        Value.plan(&ShelfState { quantum_ms: 1_000, ..state.clone() }, now_ms)
    }
}

#[test]
fn what_a_shadow_wants_again_and_again_is_counted_once() {
    let mut busy = model(1, "one", 80, 80);
    (busy.active, busy.turn_since_ms) = (1, Some(7_500));
    let state = shelf(80, vec![model(0, "chat", 40, 0), busy], vec![wake(0, 40, 1)]);
    let mut shadow = Shadow::new(Box::new(Impatient));
    for _ in 0..3 {
        shadow.watch(&state, &Value.plan(&state, 9_000), 9_000);
    }
    assert_eq!((shadow.counts().decisions, shadow.counts().differing), (1, 1));
}

#[test]
fn a_plan_that_must_not_be_obeyed_is_told_from_one_that_may() {
    let mut idle = model(1, "idle", 60, 60);
    idle.min = MIB(20);
    let pinned = ModelState { pinned: true, ..model(2, "pinned", 20, 20) };
    let rival = ModelState { apart: vec![ModelId(1)], ..model(3, "rival", 5, 0) };
    let models = vec![model(0, "chat", 40, 0), idle, pinned, rival];
    let state = shelf(100, models, vec![wake(0, 40, 1), PendingRequest { request: 9, ..wake(3, 5, 1) }]);
    assert_eq!(check(&state, &plan(&state, 10_000)), Ok(()));
    let evict = |model, mib| Action::Evict {
        model: ModelId(model),
        requester: None,
        bytes: MIB(mib),
        cached_last: false,
        reason: String::new(),
    };
    let grant = |model, request, mib| Action::Grant {
        model: ModelId(model),
        request,
        bytes: MIB(mib),
        reason: String::new(),
    };
    let wait = |request| Action::Wait { model: ModelId(0), request, until_ms: 0, reason: String::new() };
    let restore = |model| Action::Restore { model: ModelId(model), bytes: MIB(1), reason: String::new() };
    for (actions, says) in [
        (vec![evict(9, 1)], "there is no"),
        (vec![evict(2, 1)], "it is pinned"),
        (vec![evict(1, 0)], "asked for nothing"),
        (
            vec![evict(1, 30), evict(1, 11)],
            "idle cannot give up 41 MiB in all: it holds 60 MiB and keeps 20 MiB",
        ),
        (vec![grant(0, 1, 39)], "chat asked for 40 MiB to 40 MiB, and is granted 39 MiB"),
        (vec![grant(0, 1, 40)], "would be leased, and the budget is 100 MiB"),
        (vec![grant(0, 7, 40)], "chat has no request 7"),
        (vec![grant(3, 9, 5)], "rival may not stand beside idle"),
        (vec![wait(1), wait(1)], "answered twice"),
        (vec![restore(8)], "there is no"),
        (
            vec![Action::Wait { model: ModelId(9), request: 1, until_ms: 0, reason: String::new() }],
            "no request 1",
        ),
        (
            vec![Action::Deny { model: ModelId(9), request: 1, never: true, reason: String::new() }],
            "no request 1",
        ),
    ] {
        let said = check(&state, &Plan { actions, again_at_ms: None }).expect_err(says);
        assert!(said.contains(says), "{said}");
    }
    let fine = vec![evict(1, 40), wait(1), restore(0)];
    assert_eq!(check(&state, &Plan { actions: fine, again_at_ms: None }), Ok(()));
}

/// A model that gave a part of its weights up while requests run in it: were its KV to grow into their room, they could not
/// come back before those requests end, and those cannot go on without them.
#[test]
fn kv_never_takes_the_room_of_ones_own_missing_weights() {
    let kv = |request, bytes, least| PendingRequest {
        request,
        kind: LeaseKind::Kv,
        bytes: MIB(bytes),
        bytes_min: MIB(least),
        ..wake(0, 0, request)
    };
    let of = |held: u64, kv_held: u64, max: Option<u64>, requests: Vec<PendingRequest>| {
        let mut chat = model(0, "chat", 80, held);
        (chat.kv_held, chat.kv_live, chat.active, chat.max) = (MIB(kv_held), MIB(kv_held), 1, max.map(MIB));
        shelf(100, vec![chat], requests)
    };
    let granted = |state: &ShelfState| -> Vec<u64> {
        let plan = plan(state, 10_000);
        check(state, &plan).expect("a plan of ours");
        let bytes = plan.actions.iter().filter_map(|action| match action {
            Action::Grant { bytes, .. } => Some(bytes.0 >> 20),
            _ => None,
        });
        bytes.collect()
    };
    for max in [None, Some(100)] {
        assert_eq!(granted(&of(80, 16, max, vec![kv(1, 4, 2)])), [4], "whole, it may have what is left");
        assert_eq!(
            granted(&of(30, 16, max, vec![kv(1, 4, 2)])),
            [4],
            "and as much where weights are missing"
        );
        assert_eq!(granted(&of(30, 18, max, vec![kv(1, 4, 2)])), [2], "but no more");
        assert_eq!(
            granted(&of(30, 14, max, vec![kv(1, 4, 2), kv(2, 4, 2)])),
            [4, 2],
            "all requests together"
        );
        let with_weights = vec![wake(0, 50, 0), kv(1, 4, 2)];
        assert_eq!(
            granted(&of(30, 16, max, with_weights)),
            [50, 4],
            "weights that are on their way count once"
        );
    }
    let state = of(30, 20, None, vec![kv(1, 4, 2)]);
    let denied = plan(&state, 10_000);
    assert!(
        matches!(&denied.actions[..], [Action::Deny { never: true, reason, .. }]
            if reason == "chat needs 4 MiB (at least 2 MiB) for KV, and there are 0 B at most: the budget is 100 MiB, \
                          chat holds 50 MiB itself, lacks 50 MiB of its weights"),
        "{}",
        reasons(&denied)
    );
}
