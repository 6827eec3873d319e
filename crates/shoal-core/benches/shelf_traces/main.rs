//! The policies on seeded traces in virtual time: how long requests wait for their model, and how much moves for nothing.
//!
//! Each trace is an hour on a device of 72 GiB whose host link takes 19 us a MiB (54 GB/s); what is read from files takes
//! 170 (6 GB/s). The peer is the policy `lru` (whole models, the one not used for longest), which is what other managers of
//! models do, with our fairness and our limits. Prints a line for each figure: `trace TAB policy TAB metric TAB value`.

#![expect(clippy::print_stdout, reason = "a bench prints")]

use shoal_core::bytes::ByteCount;
use shoal_core::policy::thrash::ThrashFigures;
use shoal_core::policy::{Lru, Policy, Value};
use shoal_core::simulate::seeded::Random;
use shoal_core::simulate::{Arrival, Kind, Settings, World};

const BUDGET: ByteCount = ByteCount::gib(72);
/// The extent in which memory is taken.
const EXTENT: ByteCount = ByteCount::mib(64);
const HOUR_MS: u64 = 3_600_000;
const SEEDS: u64 = 5;
const HOST_US_PER_MIB: u64 = 19;
const SOURCE_US_PER_MIB: u64 = 170;

fn runs_ms(random: &mut Random) -> u64 {
    300 + random.after(1_500.0)
}

/// What is measured is the wait for a model, so its first token comes at once.
fn asked(random: &mut Random, at_ms: u64, model: usize) -> Arrival {
    Arrival { at_ms, model, first_ms: 0, runs_ms: runs_ms(random) }
}

type Trace = (Vec<Kind>, Vec<Arrival>);

fn of(place: u64, gib: u64, restore_us_per_mib: u64) -> Kind {
    Kind::new(format!("model-{place}"), ByteCount::gib(gib), restore_us_per_mib)
}

/// Sixteen models of 4 to 24 GiB, twice what fits; a quarter of them too large for host memory, so read from files.
fn kinds(random: &mut Random) -> Vec<Kind> {
    let kind = |place: u64| {
        let weights = [4, 6, 8, 14, 16, 24][usize::try_from(random.below(6)).unwrap_or(0)];
        of(place, weights, if place % 4 == 3 { SOURCE_US_PER_MIB } else { HOST_US_PER_MIB })
    };
    (0..16).map(kind).collect()
}

fn sorted(kinds: Vec<Kind>, mut arrivals: Vec<Arrival>) -> Trace {
    arrivals.sort_by_key(|arrival| (arrival.at_ms, arrival.model));
    (kinds, arrivals)
}

/// Independent requests, some models asked for much more often than others (Zipf).
fn popular(random: &mut Random) -> Trace {
    let kinds = kinds(random);
    let mut arrivals = Vec::new();
    // Which are popular has nothing to do with how large they are.
    let shift = usize::try_from(random.below(16)).unwrap_or(0);
    for rank in 0..kinds.len() {
        let mean_ms = 4_000.0 * (rank + 1) as f64;
        let model = (rank * 7 + shift) % kinds.len();
        let mut at_ms = random.after(mean_ms);
        while at_ms < HOUR_MS {
            arrivals.push(asked(random, at_ms, model));
            at_ms += 1 + random.after(mean_ms);
        }
    }
    sorted(kinds, arrivals)
}

/// Conversations: a model is talked to for a minute or two, then not for ten.
fn conversations(random: &mut Random) -> Trace {
    let kinds = kinds(random);
    let mut arrivals = Vec::new();
    for model in 0..kinds.len() {
        let mut at_ms = random.after(300_000.0);
        while at_ms < HOUR_MS {
            let ends_ms = at_ms + random.after(90_000.0);
            while at_ms < ends_ms.min(HOUR_MS) {
                arrivals.push(asked(random, at_ms, model));
                at_ms += 1 + random.after(8_000.0);
            }
            at_ms += random.after(600_000.0);
        }
    }
    sorted(kinds, arrivals)
}

/// One model after the other, again and again, more than fit: a nightly job over all of them, beside two that are used
/// all the time.
fn rounds(random: &mut Random) -> Trace {
    let kinds = kinds(random);
    let mut arrivals = Vec::new();
    let (mut at_ms, mut model) = (0, 2);
    while at_ms < HOUR_MS {
        arrivals.push(asked(random, at_ms, model));
        at_ms += 3_000 + random.below(3_000);
        model = if model + 1 == kinds.len() { 2 } else { model + 1 };
    }
    for model in 0..2 {
        let mut at_ms = 0;
        while at_ms < HOUR_MS {
            arrivals.push(asked(random, at_ms, model));
            at_ms += 1 + random.after(15_000.0);
        }
    }
    sorted(kinds, arrivals)
}

/// Three large models, all busy all the time, of which two fit.
fn all_busy(random: &mut Random) -> Trace {
    let kinds = [0, 1, 2].map(|place| of(place, 30, HOST_US_PER_MIB)).to_vec();
    let mut arrivals = Vec::new();
    for model in 0..kinds.len() {
        let mut at_ms = 0;
        while at_ms < HOUR_MS / 6 {
            arrivals.push(asked(random, at_ms, model));
            at_ms += 1 + random.after(900.0);
        }
    }
    sorted(kinds, arrivals)
}

/// Three models of which not two fit, used one after the other by somebody who hands work on.
fn in_turn(random: &mut Random) -> Trace {
    let kinds = [0, 1, 2].map(|place| of(place, 44, HOST_US_PER_MIB)).to_vec();
    let mut arrivals = Vec::new();
    let (mut at_ms, mut model) = (0, 0);
    while at_ms < HOUR_MS {
        let arrival = asked(random, at_ms, model);
        arrivals.push(arrival);
        // It has come back by then, and has answered.
        at_ms += 1_200 + arrival.runs_ms + random.below(1_000);
        model = (model + 1) % kinds.len();
    }
    sorted(kinds, arrivals)
}

fn figures(name: &str, policy: &dyn Policy, make: fn(&mut Random) -> Trace) {
    let (mut waits_ms, mut moved, mut evictions) = (Vec::new(), ByteCount::ZERO, 0);
    let mut thrash = ThrashFigures::default();
    let settings = Settings { extent: EXTENT, ..Settings::new(BUDGET) };
    let mut all = 0;
    for seed in 0..SEEDS {
        let (kinds, trace) = make(&mut Random(seed));
        all += trace.len() as u64;
        let outcome = World::new(policy, settings.clone(), &kinds).play(&trace, &mut |_, _| {});
        assert!(outcome.held_max <= BUDGET && outcome.plans_refused == 0, "what the policy says can be done");
        for model in outcome.models {
            waits_ms.extend(model.first_ms);
            moved += model.moved;
            evictions += model.evictions;
            thrash = [thrash, model.thrash].into_iter().sum();
        }
        assert_eq!(waits_ms.len() as u64, all, "every request is served");
    }
    waits_ms.sort_unstable();
    let count = waits_ms.len();
    let at = |percent: usize| waits_ms[(count * percent / 100).min(count - 1)] as f64 / 1e3;
    let mean = waits_ms.iter().sum::<u64>() as f64 / count as f64 / 1e3;
    let rows = [
        ("requests", count as f64),
        ("wait p50", at(50)),
        ("wait p99", at(99)),
        ("wait mean", mean),
        ("moved", moved.0 as f64 / (1u64 << 30) as f64),
        ("evictions", evictions as f64),
        ("thrash index", thrash.index()),
    ];
    for (metric, value) in rows {
        println!("{name}\t{}\t{metric}\t{value}", policy.name());
    }
}

fn main() {
    type Make = fn(&mut Random) -> Trace;
    let traces: [(&str, Make); 5] = [
        ("popular", popular),
        ("conversations", conversations),
        ("rounds", rounds),
        ("in turn", in_turn),
        ("all busy", all_busy),
    ];
    for (name, make) in traces {
        figures(name, &Value, make);
        figures(name, &Lru, make);
    }
}
