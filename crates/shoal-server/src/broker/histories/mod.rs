//! Seeded histories of the core in virtual time, against the production policy and with workers that are numbers: requests,
//! orders by hand, pins, kills of workers and of the server, failures, orders that are refused or ignored, workers that stop
//! and answer nothing, programs that start, drain and end, overhead that was declared too low and too high, a configuration
//! that is read again and again, a policy in a process that answers late, wrongly or not at all, others that come to the
//! device and leave it, a driver that answers late, hides processes or is silent; and engines whose KV grows with their requests
//! and shrinks by order.
//!
//! After every step the rules of [`checks`] hold; when the disorder ends, every model serves again, and when all of them
//! are busy at once, nobody waits longer than [`STARVES_MS`]. A seed replays exactly.

mod checks;
mod clients;
mod device;
mod disorder;
mod kv;
mod long;
mod overhead;
mod policies;
mod processes;
mod programs;
mod reloads;
mod shelf;
mod wakes;
mod worker;
mod world;

use shoal_core::bytes::ByteCount;

pub(super) use shelf::{config, program};
use world::World;

/// Models of a shelf before it is configured otherwise.
const MODELS: usize = 3;
/// Models that it has at most.
const MODELS_MAX: usize = 5;
const WEIGHTS: ByteCount = ByteCount::mib(40);
/// All that the device has.
const DEVICE: ByteCount = ByteCount::mib(100);
const STEPS: usize = 200;
/// As long as a model can be kept waiting by others that use their whole turns, and by retries of wakes.
const CALM_MS: u64 = 60_000;
/// The longest that a request waits while all models are busy: as the policy states, a turn for each of the others that
/// asked before, for each that was resident then, and one more. A turn is 300 ms here; with bringing a model back and the
/// answers of victims (steps of 20 ms each) none takes longer than a second, but for the requests of a model's own line.
const STARVES_MS: u64 = 1_000 * (2 * MODELS_MAX as u64 + 1);

/// Histories that are played unless `SHOAL_HISTORIES` says how many.
const HISTORIES: u64 = 80;
/// Of so many histories one is played twice.
const REPLAYED_PART: u64 = 100;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a whole number"))
}

/// More of them with `SHOAL_HISTORIES`, one with `SHOAL_SEED`.
#[test]
fn whatever_happens_leases_hold_and_all_models_serve_again() {
    let seeds = match number("SHOAL_SEED") {
        Some(seed) => seed..=seed,
        None => 1..=number("SHOAL_HISTORIES").unwrap_or(HISTORIES),
    };
    let is_whole = seeds.end() - seeds.start() + 1 >= HISTORIES;
    let mut seen = world::Seen::default();
    for seed in seeds.clone() {
        // A failure names its seed, wherever in the core it is, and tells what happened last.
        eprintln!("SHOAL_SEED={seed}");
        let mut world = World::new(seed);
        let over = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.whole()));
        if let Err(over) = over {
            world.tell_the_end();
            std::panic::resume_unwind(over);
        }
        seen.add(&world.seen);
    }
    eprintln!("{seeds:?}: {seen:?}");
    if is_whole {
        seen.is_enough();
    }
}

#[test]
fn a_seed_replays_exactly() {
    let story = |seed| {
        let mut world = World::new(seed);
        world.story = Some(Vec::new());
        world.whole();
        world.story.expect("it was kept")
    };
    // With a program and a policy in a process that decides, and with one that watches and engines with KV.
    let chosen = [6, 29];
    let more = number("SHOAL_HISTORIES").unwrap_or_default() / REPLAYED_PART;
    for seed in chosen.into_iter().chain(HISTORIES..HISTORIES + more) {
        let (one, other) = (story(seed), story(seed));
        // Among many there are quiet ones: models that fit beside each other, and a server that is killed again and again.
        let least = if chosen.contains(&seed) { 500 } else { STEPS };
        assert!(one.len() > least, "seed {seed} hardly tells anything: {} lines", one.len());
        let differs = one.iter().zip(&other).position(|(one, other)| one != other);
        assert_eq!(
            differs.map(|line| (&one[line], &other[line])),
            None,
            "seed {seed} went another way the second time"
        );
        assert_eq!(one.len(), other.len(), "seed {seed}");
        assert_ne!(one, story(seed + 1), "seeds make no difference");
    }
}
