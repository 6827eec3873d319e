//! Plans for models that are used one after the other, again and again: who is used last gives first.

use super::tests::{evicted, model, reasons, shelf, wake};
use super::*;

/// Three of 60 MiB in room for one and a half, of which the first is asked for. Of the second 30 MiB are left; the third has
/// just answered, half a second after it was brought back.
fn in_turn(expected_ms: [Option<u64>; 2]) -> ShelfState {
    let idle = |id, name, held, last_used_ms, restored_ms, expected_ms| ModelState {
        last_used_ms,
        restored_ms: Some(restored_ms),
        restore_us_per_mib: 5_000,
        uses_milli: 4_000,
        uses_window_ms: 6_000,
        expected_ms,
        ..model(id, name, 60, held)
    };
    let models = vec![
        model(0, "plans", 60, 0),
        idle(1, "writes", 30, 9_100, 8_500, expected_ms[0]),
        idle(2, "reads", 60, 9_900, 9_500, expected_ms[1]),
    ];
    shelf(90, models, vec![wake(0, 60, 10_000)])
}

#[test]
fn who_is_used_last_gives_before_who_comes_next() {
    // Nobody knows: the one that was not used for longest, and what was brought back only just now after it.
    assert_eq!(evicted(&plan(&in_turn([None, None]), 10_000)), [(1, 30), (2, 30)]);
    let known = in_turn([Some(10_800), Some(12_200)]);
    let said = plan(&known, 10_000);
    assert_eq!(evicted(&said), [(2, 60)], "{}", reasons(&said));
    assert!(
        reasons(&said).contains("5000 us to bring it back, expected to be used in 2.2 s)"),
        "{}",
        reasons(&said)
    );
    assert_eq!(check(&known, &said), Ok(()));
}

#[test]
fn who_comes_back_before_that_is_worth_while_keeps_what_it_was_just_given() {
    // It takes 0.3 s to bring it back, so for 1.2 s it is asked after others.
    let soon = in_turn([Some(14_000), Some(10_600)]);
    assert_eq!(evicted(&plan(&soon, 10_000)), [(1, 30), (2, 30)]);
}

#[test]
fn cost_and_priority_count_beside_the_time() {
    let mut dear = in_turn([Some(11_000), Some(13_000)]);
    dear.models[2].restore_us_per_mib = 50_000;
    // A second later, ten times as dear.
    dear.models[2].restored_ms = None;
    assert_eq!(evicted(&plan(&dear, 10_000)), [(1, 30), (2, 30)]);
    let mut important = in_turn([Some(10_800), Some(12_200)]);
    important.models[2].priority = 4;
    assert_eq!(evicted(&plan(&important, 10_000)), [(1, 30), (2, 30)]);
}
