//! What the world does in small cases that can be counted by hand, and what must hold in any.

use proptest::prelude::*;

use super::*;
use crate::bytes::ByteCount;
use crate::policy::{Action, Lru, Plan, ShelfState, Value};

const GIB: fn(u64) -> ByteCount = ByteCount::gib;
/// A GiB in 0.1 s.
const COST: u64 = 98;

fn kind(name: &str, gib: u64) -> Kind {
    Kind::new(name, GIB(gib), COST)
}

fn at(at_ms: u64, model: usize) -> Arrival {
    Arrival { at_ms, model, first_ms: 50, runs_ms: 1_000 }
}

fn played(budget: u64, change: impl Fn(&mut Settings), kinds: &[Kind], trace: &[Arrival]) -> Outcome {
    let mut settings = Settings::new(GIB(budget));
    change(&mut settings);
    let outcome = World::new(&Value, settings, kinds).play(trace, &mut |_, _| {});
    assert_eq!(outcome.plans_refused, 0, "{:?}", outcome.refused_why);
    assert!(outcome.held_max <= GIB(budget), "{outcome:?}");
    outcome
}

fn unchanged(_: &mut Settings) {}

#[test]
fn a_request_waits_for_its_wake_and_the_next_one_does_not() {
    let kinds = [kind("chat", 10), kind("code", 10)];
    let outcome = played(20, unchanged, &kinds, &[at(0, 0), at(5_000, 0), at(6_000, 1)]);
    // 10 GiB at 98 us a MiB are 1,003 ms and one more.
    assert_eq!(outcome.models[0].first_ms, [50, 1_004 + 50]);
    assert_eq!(outcome.models[1].first_ms, [1_004 + 50]);
    let report = outcome.report("value", &kinds);
    assert_eq!((report.total.wakes, report.total.evictions, report.total.moved_bytes), (2, 0, GIB(20)));
    assert_eq!(report.held_bytes_max, GIB(20));
    assert!((report.played_s - 8.004).abs() < 1e-9, "{report:?}");
    assert!((report.models[0].resident - 7.0 / 8.004).abs() < 1e-9, "there from its wake to the end");
    assert_eq!(report.models[0].first_token_s.map(|spread| spread.max), Some(1.054));
}

#[test]
fn only_what_is_missing_is_taken_and_comes_back() {
    let kinds = [kind("chat", 10), kind("code", 10)];
    let trace = [at(0, 0), at(20_000, 1), at(100_000, 0)];
    let outcome = played(15, unchanged, &kinds, &trace);
    assert_eq!(outcome.models[0].moved, GIB(15), "10, and the 5 that the other needed");
    assert_eq!(outcome.models[1].moved, GIB(10));
    let settings = Settings::new(GIB(15));
    let lru = play(&Lru, &settings, &kinds, &trace, &mut |_, _| {});
    assert_eq!(lru.total.moved_bytes, GIB(30), "whole models");
}

#[test]
fn a_request_stands_still_while_its_model_is_away() {
    let kinds = [kind("chat", 10), kind("code", 10)];
    let long = Arrival { at_ms: 0, model: 0, first_ms: 0, runs_ms: 60_000 };
    let outcome = played(10, unchanged, &kinds, &[long, at(10_000, 1)]);
    let (chat, code) = (&outcome.models[0], &outcome.models[1]);
    assert_eq!((chat.wakes, code.wakes), (2, 1));
    // It ran from 1,004 on, lost at least a second and what two copies take, and went on to its end.
    assert!(outcome.ended_ms > 61_004 + 2 * 1_004, "{outcome:?}");
    assert_eq!(chat.broken_off, 0);
}

#[test]
fn whoever_waits_for_turns_waits_for_no_more_than_the_policy_says() {
    let mut kinds = [kind("chat", 15), kind("code", 8), kind("big", 14)];
    for kind in &mut kinds {
        kind.overhead = ByteCount::mib(832);
    }
    let asked = seeded(0, Pattern::Conversations, 3, 3_600_000, 30.0, 10_000);
    let trace: Vec<Arrival> = asked.iter().map(|one| Service::default().arrival(one)).collect();
    let outcome = played(24, unchanged, &kinds, &trace);
    // Two before it and three that were there: six turns, each with the longest way back.
    for (tally, kind) in outcome.models.iter().zip(&kinds) {
        let longest_ms = tally.first_ms.last().copied().unwrap_or(0);
        assert!(longest_ms < 6 * (3_000 + 15 * 101 + 10) + 2_000, "{} waited for {longest_ms} ms", kind.name);
    }
}

#[test]
fn who_cannot_be_there_is_refused_and_told_why() {
    let kinds = [kind("chat", 30), kind("code", 10)];
    let outcome = played(20, unchanged, &kinds, &[at(0, 0), at(1, 1), at(9_000, 0)]);
    assert_eq!((outcome.models[0].refused, outcome.models[1].refused), (2, 0));
    let report = outcome.report("value", &kinds);
    let why = report.models[0].refused_why.as_deref().unwrap_or_default();
    assert!(why.contains("chat needs 30 GiB for weights") && why.contains("the budget is 20 GiB"), "{why}");
    assert_eq!(report.models[0].first_token_s, None);
    assert_eq!((report.total.requests, report.total.served), (3, 1));
}

#[test]
fn patience_and_the_queue_have_an_end() {
    let mut pinned = kind("chat", 10);
    pinned.pinned = true;
    let kinds = [pinned, kind("code", 10)];
    let trace = [at(0, 0), at(5_000, 1), at(5_001, 1), at(5_002, 1)];
    let manual = |settings: &mut Settings| {
        (settings.is_manual, settings.wait_max_ms, settings.parked_max) = (true, Some(30_000), 2);
    };
    let mut idle = kinds.clone();
    idle[0].pinned = false;
    let outcome = played(15, manual, &idle, &trace);
    assert_eq!((outcome.models[1].timed_out, outcome.models[1].refused), (2, 1), "{outcome:?}");
    assert_eq!(outcome.ended_ms, 35_001);
    let endless = played(15, |settings| settings.is_manual = true, &idle, &trace);
    assert_eq!(endless.models[1].refused, 3, "where nobody loses patience the end does it");
    let outcome = played(15, unchanged, &kinds, &trace);
    assert_eq!(outcome.models[1].refused, 3, "a pin stays");
    assert_eq!(outcome.models[0].evictions, 0);
}

#[test]
fn places_are_kept_to() {
    let mut one = kind("chat", 10);
    one.parallel_max = 1;
    let outcome = played(10, unchanged, &[one], &[at(0, 0), at(0, 0), at(0, 0)]);
    assert_eq!(outcome.models[0].first_ms, [1_054, 2_054, 3_054]);
}

#[test]
fn limits_of_a_model_are_kept_to() {
    let mut early = kind("early", 10);
    (early.preload, early.keep_alive_ms) = (true, Some(5_000));
    let outcome = played(10, unchanged, &[early], &[at(2_000, 0), at(30_000, 0)]);
    assert_eq!(outcome.models[0].first_ms, [50, 1_054], "there before it was asked for, put to sleep after");

    let (mut one, mut other) = (kind("one", 10), kind("other", 10));
    (one.apart, other.apart) = (vec![1], vec![0]);
    let mut program = kind("program", 4);
    (program.is_rigid, program.uses_link, program.restore_us_per_mib) = (true, false, COST * 10);
    let kinds = [one, other, program];
    let mut there = [false; 3];
    let trace: Vec<Arrival> =
        (0..60).map(|n| at(n * 2_500, usize::try_from(n % 3).expect("small"))).collect();
    let mut told = |_: u64, action: &Action| match action {
        Action::Grant { model, .. } => {
            there[model.0 as usize] = true;
            assert!(!(there[0] && there[1]), "both are there");
        }
        Action::Evict { model, .. } => there[model.0 as usize] = false,
        _ => {}
    };
    let outcome = World::new(&Value, Settings::new(GIB(40)), &kinds).play(&trace, &mut told);
    assert_eq!(outcome.models.iter().map(|model| model.first_ms.len()).sum::<usize>(), 60);
    assert_eq!(outcome.models[2].first_ms[19], 4_096 * COST / 100 + 1 + 50, "a start of its own");
    assert!(outcome.models[0].evictions >= 19, "each goes for the other");
}

/// Says what must not be done.
#[derive(Debug)]
struct Wild;

impl Policy for Wild {
    fn name(&self) -> &'static str {
        "wild"
    }

    fn plan(&self, state: &ShelfState, _: u64) -> Plan {
        let evict = |model: &crate::policy::ModelState| Action::Evict {
            model: model.id,
            requester: None,
            cached_last: false,
            bytes: GIB(1_000),
            reason: "because".to_owned(),
        };
        Plan { actions: state.models.iter().map(evict).collect(), again_at_ms: None }
    }
}

#[test]
fn a_plan_that_must_not_be_obeyed_is_not() {
    let kinds = [kind("chat", 10)];
    let report = play(&Wild, &Settings::new(GIB(10)), &kinds, &[at(0, 0)], &mut |_, _| {});
    assert_eq!((report.total.served, report.plans_refused), (1, report.plans));
    assert!(report.plan_refused_why.is_some_and(|why| why.contains("chat cannot give up")));
}

/// Lets everybody wait, and wants to be asked again.
#[derive(Debug)]
struct Idler;

impl Policy for Idler {
    fn name(&self) -> &'static str {
        "idler"
    }

    fn plan(&self, state: &ShelfState, now_ms: u64) -> Plan {
        let restore = |model: &crate::policy::ModelState| Action::Restore {
            model: model.id,
            bytes: ByteCount::ZERO,
            reason: "it is wanted".to_owned(),
        };
        let wanted = state.models.iter().filter(|model| model.parked > 0 && !model.wake_ordered);
        Plan { actions: wanted.map(restore).collect(), again_at_ms: Some(now_ms + 1_000) }
    }
}

#[test]
fn a_policy_that_does_nothing_for_ever_is_given_up() {
    let kinds = [kind("chat", 10)];
    let report = play(&Idler, &Settings::new(GIB(10)), &kinds, &[at(0, 0)], &mut |_, _| {});
    assert_eq!((report.total.refused, report.total.served), (1, 0));
    assert!((3_600.0..3_700.0).contains(&report.played_s), "{report:?}");
}

fn kinds() -> impl Strategy<Value = Vec<Kind>> {
    let one = (
        1u64..30,
        10u64..400,
        any::<[bool; 5]>(),
        -3i32..4,
        prop::option::of(0u64..9_000),
        0u64..600,
        1usize..9,
    );
    prop::collection::vec(one, 1..6).prop_map(|all| {
        let mut kinds: Vec<Kind> = Vec::new();
        for (place, (gib, cost, flags, priority, keep_alive_ms, overhead, parallel_max)) in
            all.into_iter().enumerate()
        {
            let mut kind = Kind::new(format!("model-{place}"), GIB(gib), cost);
            (kind.pinned, kind.is_rigid) = (flags[0] && flags[1], flags[1] && flags[2]);
            (kind.keeps_weights, kind.preload) = (flags[2] && flags[3], flags[3]);
            (kind.priority, kind.keep_alive_ms, kind.parallel_max) = (priority, keep_alive_ms, parallel_max);
            (kind.overhead, kind.uses_link) = (ByteCount::mib(overhead), !kind.is_rigid);
            if flags[4] && flags[0] && place > 0 {
                kind.apart = vec![0];
                kinds[0].apart.push(place);
            }
            kinds.push(kind);
        }
        kinds
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_comes_is_served_or_refused_within_the_budget(
        kinds in kinds(),
        budget in 4u64..60,
        seed in any::<u64>(),
        pattern in prop::sample::select(&Pattern::ALL[..]),
        is_manual in any::<bool>(),
        quantum_ms in 50u64..5_000,
    ) {
        let asked = seeded(seed, pattern, kinds.len(), 300_000, 60.0, 10_000);
        let trace: Vec<Arrival> = asked.iter().map(|one| Service::default().arrival(one)).collect();
        let settings = Settings {
            is_manual,
            quantum_ms,
            wait_max_ms: Some(60_000),
            parked_max: 20,
            ..Settings::new(GIB(budget))
        };
        for policy in [&Value as &dyn Policy, &Lru] {
            let once = World::new(policy, settings.clone(), &kinds).play(&trace, &mut |_, _| {});
            let again = World::new(policy, settings.clone(), &kinds).play(&trace, &mut |_, _| {});
            prop_assert_eq!(&once, &again, "the same trace, played twice");
            prop_assert!(once.held_max <= settings.budget);
            prop_assert_eq!(once.plans_refused, 0, "{:?}", once.refused_why);
            prop_assert_eq!(once.models.iter().map(|model| model.requests).sum::<u64>(), trace.len() as u64);
            for (tally, kind) in once.models.iter().zip(&kinds) {
                let served = tally.first_ms.len() as u64;
                prop_assert_eq!(tally.requests, served + tally.refused + tally.timed_out, "{}: {:?}", kind.name, tally);
                prop_assert!(tally.broken_off <= served && tally.up_ms <= once.ended_ms);
                prop_assert!(!kind.pinned || tally.evictions == 0);
                prop_assert!(tally.first_ms.last().is_none_or(|longest| *longest <= 60_000 + 10_000));
            }
        }
    }
}

/// Wakes what it refuses, and refuses what it woke.
#[derive(Debug)]
struct Endless;

impl Policy for Endless {
    fn name(&self) -> &'static str {
        "endless"
    }

    fn plan(&self, state: &ShelfState, now_ms: u64) -> Plan {
        let mut plan = Value.plan(state, now_ms);
        plan.actions.clear();
        for request in &state.requests {
            let (model, request, reason) = (request.model, request.request, "no".to_owned());
            plan.actions.push(Action::Deny { model, request, reason, never: false });
        }
        for model in state.models.iter().filter(|model| !model.is_whole() && !model.wake_ordered) {
            let (model, bytes) = (model.id, model.weights_total);
            plan.actions.push(Action::Restore { model, bytes, reason: "yes".to_owned() });
        }
        plan
    }
}

#[test]
fn a_policy_that_goes_on_at_one_moment_for_ever_is_replaced_there() {
    let kinds = [kind("chat", 10), kind("code", 10)];
    let mut actions = 0u64;
    let trace = [at(0, 0), at(5_000, 1)];
    let report = play(&Endless, &Settings::new(GIB(20)), &kinds, &trace, &mut |_, _| actions += 1);
    let why = report.plan_refused_why.expect("it was stopped");
    assert_eq!(why, "it went on and on at 0 ms");
    assert!(actions < 10_000, "{actions}");
    assert_eq!(report.total.requests, 2);
}
