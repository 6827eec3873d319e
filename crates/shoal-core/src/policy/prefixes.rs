//! Prefixes and the weights of the model that they are of, in one currency.

use super::tests::{MIB, evicted, model, reasons, shelf, wake};
use super::*;

/// Used at 9 s: 20 MiB of weights that cost 100 us a MiB, and as much of prefixes, 4,950 (half of 9,900) in two seconds.
fn chat() -> ModelState {
    let weights = model(1, "chat", 20, 20);
    ModelState {
        last_used_ms: 9_000,
        kv_held: MIB(20),
        kv_cached: MIB(20),
        kv_back_us_per_mib: 9_900,
        kv_found_milli: 500,
        ..weights
    }
}

/// What is taken for somebody who needs so many MiB of 60, from `chat` and from one that costs so much a MiB: who gives how
/// much, and whether weights go before prefixes; and why.
fn picked(chat: &ModelState, needed: u64, other_us: u64) -> (Vec<(u32, u64, bool)>, String) {
    let other = ModelState { last_used_ms: 9_000, restore_us_per_mib: other_us, ..model(2, "other", 20, 20) };
    let asking = model(0, "new", needed, 0);
    let state = shelf(60, vec![asking, chat.clone(), other], vec![wake(0, needed, 9_500)]);
    let said = plan(&state, 10_000);
    assert_eq!(check(&state, &said), Ok(()));
    let orders = said.actions.iter().filter_map(|action| match action {
        Action::Evict { model, bytes, cached_last, .. } => Some((model.0, bytes.0 >> 20, *cached_last)),
        _ => None,
    });
    (orders.collect(), reasons(&said))
}

/// An idle model's weights go before its prefixes, where those would cost more to bring back; both are compared with what
/// others have by their own price.
#[test]
fn cheap_weights_go_before_dear_prefixes() {
    let (said, why) = picked(&chat(), 10, 300);
    assert_eq!(said, [(1, 10, true)], "{why}");
    let sentence = "chat has been idle for 1.0 s and its weights are worth least (50 us a second for each MiB: 100 us to bring it \
                    back, 1.0 uses in 2.0 s); 20 MiB of KV for prompts that may come again cost more and go last";
    assert!(why.contains(sentence), "{why}");
    // Others' weights are cheaper than its prefixes, so these stay.
    let (said, why) = picked(&chat(), 40, 300);
    assert_eq!(said, [(1, 20, true), (2, 20, false)], "{why}");
    // Others' are dearer than its prefixes, and those go as well, in the same order.
    let (said, why) = picked(&chat(), 30, 6_000);
    assert_eq!(said, [(1, 30, true)], "{why}");
    let sentence = "chat holds 20 MiB of KV for prompts that may come again, worth least (2475 us a second for each MiB: 9900 us \
                    to bring it back, a use finds 50.0% of it again, 1.0 uses in 2.0 s)";
    assert!(why.contains(sentence), "{why}");
    // Memory that nobody uses goes before both.
    let roomy = ModelState { kv_held: MIB(20), kv_cached: MIB(10), ..chat() };
    let (said, why) = picked(&roomy, 30, 300);
    assert_eq!(said, [(1, 30, true)], "10 of each, and all weights: {why}");
    let (said, why) = picked(&roomy, 40, 300);
    assert_eq!(said, [(1, 30, true), (2, 10, false)], "{why}");
}

/// What was granted a moment ago counts as in use. It is no weight: a model offers at their price what it has of them, and which
/// goes first is known all the same.
#[test]
fn what_is_in_use_is_not_offered_as_weights() {
    let live = ModelState { kv_cached: MIB(15), kv_live: MIB(5), ..chat() };
    let (said, why) = picked(&live, 30, 300);
    assert_eq!(said, [(1, 20, true), (2, 10, false)], "{why}");
    let fresh = ModelState { kv_live: MIB(20), ..chat() };
    let (said, why) = picked(&fresh, 30, 300);
    assert_eq!(said, [(1, 20, true), (2, 10, false)], "{why}");
    // Nor is it where the model keeps its weights, of which nothing may go.
    let kept = ModelState { keeps_weights: true, ..live };
    let (said, why) = picked(&kept, 10, 6_000);
    assert_eq!(said, [(1, 10, false)], "{why}");
    let order = Action::Evict {
        model: kept.id,
        requester: None,
        bytes: MIB(10),
        cached_last: true,
        reason: "a test".to_owned(),
    };
    let state = shelf(60, vec![model(0, "new", 0, 0), kept], vec![]);
    let refused =
        check(&state, &Plan { actions: vec![order], again_at_ms: None }).expect_err("weights would go");
    assert_eq!(refused, "chat keeps its weights, so no prefix can go after them");
}

/// What leaves by an order of before is counted as that was: its weights are gone then, and its prefixes are not.
#[test]
fn what_leaves_already_leaves_the_prefixes() {
    let leaving = |mib| ModelState { ordered: MIB(mib), ordered_cached_last: true, ..chat() };
    let (said, why) = picked(&leaving(20), 30, 300);
    assert_eq!(said, [(2, 10, false)], "{why}");
    let (said, why) = picked(&leaving(10), 30, 300);
    assert_eq!(said, [(1, 10, true), (2, 10, false)], "{why}");
    let first = ModelState { ordered_cached_last: false, ..leaving(10) };
    let (said, why) = picked(&first, 40, 300);
    assert_eq!(said, [(1, 20, true), (2, 10, false)], "10 of prefixes leave, and 10 stay: {why}");
}

/// Whoever takes whole models has nothing to rank prefixes by: a model's own go for its own weights, as ever.
#[test]
fn whole_models_do_not_go_for_prefixes_of_the_one_that_asks() {
    let asks = ModelState { weights_held: MIB(10), parked: 1, wake_ordered: true, ..chat() };
    let other = ModelState { last_used_ms: 1_000, ..model(2, "other", 20, 20) };
    let state = shelf(50, vec![other, asks], vec![wake(1, 10, 9_950)]);
    let said = Lru.plan(&state, 10_000);
    assert_eq!(evicted(&said), [(1, 20)], "all that it does not use: {}", reasons(&said));
}

/// As before, where prefixes are the cheaper ones, and of a model that keeps its weights or has none on the device.
#[test]
fn cheap_prefixes_go_before_weights() {
    let cheap = ModelState { kv_back_us_per_mib: 150, ..chat() };
    let (said, why) = picked(&cheap, 30, 300);
    assert_eq!(said, [(1, 30, false)], "{why}");
    let unknown = ModelState { kv_back_us_per_mib: 0, kv_found_milli: 0, ..chat() };
    let (said, why) = picked(&unknown, 10, 300);
    assert_eq!(said, [(1, 10, false)], "nobody knows what they cost: {why}");
    let kept = ModelState { keeps_weights: true, ..chat() };
    let (said, why) = picked(&kept, 30, 6_000);
    assert_eq!(said, [(1, 20, false), (2, 10, false)], "{why}");
    // Asleep, it has nothing beside them.
    let asleep = ModelState { weights_held: MIB(0), ..chat() };
    let state = shelf(20, vec![model(0, "new", 10, 0), asleep], vec![wake(0, 10, 9_500)]);
    let said = plan(&state, 10_000);
    assert_eq!(evicted(&said), [(1, 10)]);
    let why = reasons(&said);
    assert!(
        why.contains("worth least (2475 us a second for each MiB: 9900 us to bring it back, a use"),
        "{why}"
    );
}

/// While somebody wants the model its weights are no cheaper than its prefixes: no prefix is of use without all of them.
#[test]
fn prefixes_go_first_while_somebody_wants_the_model() {
    let waits = ModelState { weights_held: MIB(10), parked: 1, wanting_since_ms: Some(9_900), ..chat() };
    let state = shelf(30, vec![model(0, "new", 20, 0), waits.clone()], vec![wake(0, 20, 9_500)]);
    let said = plan(&state, 10_000);
    let first = said.actions.iter().find_map(|action| match action {
        Action::Evict { model, cached_last, .. } => Some((model.0, *cached_last)),
        _ => None,
    });
    assert_eq!(first, Some((1, false)), "{}", reasons(&said));
    // When it comes back itself, what others do not miss as much goes first, and its prefixes are there when it is.
    let other = ModelState { last_used_ms: 1_000, ..model(2, "other", 20, 20) };
    let asks = ModelState { wake_ordered: true, ..waits };
    let state = shelf(50, vec![other.clone(), asks.clone()], vec![wake(1, 10, 9_950)]);
    let said = plan(&state, 10_000);
    assert_eq!(evicted(&said), [(2, 10)], "{}", reasons(&said));
    // Nobody else can give anything: its own have to go.
    let pinned = ModelState { pinned: true, ..other };
    let said = plan(&shelf(50, vec![pinned, asks], vec![wake(1, 10, 9_950)]), 10_000);
    assert_eq!(evicted(&said), [(1, 10)], "{}", reasons(&said));
}

/// An order under way that takes weights before prefixes is counted so: what the model asks for meanwhile waits until they
/// are gone, and what only steps take is free with the last of them.
#[test]
fn an_order_that_leaves_prefixes_is_counted_as_it_is() {
    let ordered = |ordered_cached_last| ModelState {
        ordered: MIB(10),
        ordered_cached_last,
        parked: 1,
        weights_held: MIB(20),
        ..chat()
    };
    let kinds = |chat: ModelState| {
        let said = plan(&shelf(80, vec![model(0, "new", 0, 0), chat], vec![wake(1, 5, 9_950)]), 10_000);
        said.actions.iter().any(|action| matches!(action, Action::Grant { .. }))
    };
    assert!(kinds(ordered(false)), "prefixes leave, and weights do not");
    assert!(!kinds(ordered(true)), "weights leave");
    // 20 of weights and 4 of what their steps take are free once 20 were given up, with 20 of prefixes still there.
    let chat = ModelState { overhead_held: MIB(6), overhead_leaves: MIB(4), ..chat() };
    let state = shelf(46, vec![model(0, "new", 24, 0), chat.clone()], vec![wake(0, 24, 9_500)]);
    assert_eq!(evicted(&plan(&state, 10_000)), [(1, 20)]);
    let cheap = ModelState { kv_back_us_per_mib: 50, ..chat };
    let state = shelf(46, vec![model(0, "new", 24, 0), cheap], vec![wake(0, 24, 9_500)]);
    assert_eq!(evicted(&plan(&state, 10_000)), [(1, 24)]);
}
