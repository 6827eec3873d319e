//! Histories of one disk, step by step in a time of their own, against a plain model: what is served is what was put (I8),
//! every ticket is answered (I10), and what a crash may cost is bounded.
//!
//! `SHOAL_HISTORIES=5000 cargo test --release -p shoal-memory --lib disk::` plays that many of each kind; a failure names
//! its seed, and `SHOAL_SEED=N` plays that one alone.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests, which report what they played")]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::store::format::Secret;
use shoal_core::store::health::{Health, HealthRule};

use super::options::{DiskOptions, DiskSpec};
use super::queue::{DiskState, Request, Shared};
use super::recover::{Plan, recover};
use super::seal::{Codec, DiskKey};
use super::sim::{FaultRates, SimDisk};
use super::worker::Worker;
use crate::store::dice::{Random, key};
use crate::store::{Buffer, Fetched, Miss, Stored, Ticket};

const SECRET: Secret = Secret(99);
const SEGMENT: u64 = 512 << 10;
const HOUR: Duration = Duration::from_hours(1);

/// What a block holds: decided by its name, so that anybody can tell whether it is right.
fn content(block: u64, are_odd: bool) -> Vec<u8> {
    let units = match block % 16 {
        0 => 24,
        rest => 1 + rest % 9,
    };
    let length = units * 4096 - if are_odd { block % 4000 } else { 0 };
    let mut random = Random(block.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut bytes = vec![0; usize::try_from(length).unwrap()];
    for chunk in bytes.chunks_mut(64) {
        let [first, rest, ..] = random.below(u64::MAX).to_le_bytes();
        chunk.fill(rest);
        chunk[0] = first;
    }
    bytes
}

/// What a history is about.
#[expect(clippy::struct_excessive_bools, reason = "each is a kind of history of its own")]
#[derive(Clone, Copy, Default)]
struct Plot {
    segments: u64,
    rates: FaultRates,
    crashes: bool,
    power_cuts: bool,
    are_odd: bool,
    /// A disk that lies may bring back what was removed: right bytes that the disk counts as damage.
    removes: bool,
    capacity: usize,
}

#[derive(Default)]
struct Tally {
    hits: u64,
    misses: u64,
    corrupt_reported: u64,
    corrupt_found: u64,
    damaged: u64,
    injected: u64,
    wrong: u64,
    asides: u64,
    restarts: u64,
    reinserted: u64,
    evicted: u64,
}

struct Scene {
    plot: Plot,
    disk: SimDisk,
    shared: Arc<Shared>,
    worker: Option<Worker>,
    options: DiskOptions,
    now: Instant,
    tally: Tally,
    /// What was acknowledged since it was last removed; `true`: and flushed.
    model: HashMap<u64, bool>,
    damage_before: u64,
    boots: u64,
}

impl Scene {
    fn new(plot: Plot, seed: u64) -> Self {
        let disk = SimDisk::new(plot.capacity, seed);
        let options = DiskOptions {
            segment_bytes: ByteCount(SEGMENT),
            record_bytes: ByteCount(64 << 10),
            depth: 8,
            requests_max: 64,
            health: HealthRule { failures_max: 6, window_ms: 5_000, retry_ms: 1_000 },
            // Every fourth history is encrypted.
            key: seed.is_multiple_of(4).then(|| DiskKey::new([seed.to_le_bytes()[0]; 32])),
            ..DiskOptions::default()
        };
        let shared = Arc::new(Shared::new(64, 8 << 20, 64, None));
        let tally = Tally::default();
        let (model, now) = (HashMap::new(), Instant::now());
        let mut scene =
            Self { plot, disk, shared, worker: None, options, now, tally, model, damage_before: 0, boots: 0 };
        scene.open();
        scene
    }

    fn open(&mut self) {
        self.shared = Arc::new(Shared::new(64, 8 << 20, 64, None));
        let spec = DiskSpec::new("simulated", ByteCount(self.plot.segments * SEGMENT));
        let log = self.options.log(&spec, SEGMENT).unwrap();
        // Reading back is tried until it works, as the disk's thread does, with requests that hang taken out.
        let rates = self.plot.rates;
        self.disk.set_rates(FaultRates { hang: 0, ..rates });
        let codec = Codec::new(SECRET, self.options.key.as_ref()).unwrap();
        let (medium, log) = loop {
            let mut medium = self.disk.open(self.options.depth);
            self.boots += 1;
            let boot = self.boots.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let plan = Plan { codec: Arc::clone(&codec), log, boot, deadline: HOUR, failures_max: 4 };
            if let Ok((log, _)) = recover(medium.as_mut(), &plan) {
                break (medium, log);
            }
        };
        self.disk.set_rates(rates);
        self.damage_before = self.disk.counts().damaged_reads;
        self.shared.queue.lock().state = DiskState::Ready;
        let health = Health::new(self.options.health);
        let shared = Arc::clone(&self.shared);
        self.worker = Some(Worker::new(medium, shared, self.options.clone(), codec, health, log, self.now));
    }

    /// What the last run found damaged has to be what the disk knows it damaged.
    fn count_run(&mut self) {
        let counts = self.shared.notes.lock().counts;
        self.tally.corrupt_found += counts.corrupt;
        self.tally.damaged += self.disk.counts().damaged_reads - self.damage_before;
        let usage = self.shared.log.lock().usage();
        self.tally.reinserted += usage.reinserted;
        self.tally.evicted += usage.evicted;
    }

    /// Some steps; whether the disk had to be set aside and opened anew.
    fn steps(&mut self, count: u64) -> bool {
        for _ in 0..count {
            self.now += Duration::from_millis(3);
            let stepped = self.worker.as_mut().unwrap().step(self.now);
            self.shared.log.lock().check().unwrap();
            if stepped.is_err() {
                self.tally.asides += 1;
                self.count_run();
                let miss = Miss::Aside { reason: "test".to_owned() };
                self.worker.take().unwrap().end(&miss);
                self.open();
                return true;
            }
        }
        false
    }

    fn finish<T>(&mut self, ticket: Ticket<T>) -> Result<T, Miss> {
        for _ in 0..2_000 {
            if ticket.is_done() {
                return ticket.wait();
            }
            self.steps(1);
        }
        // Only a disk that hangs takes longer: then the caller's own deadline counts.
        self.now += 2 * HOUR;
        self.steps(10);
        assert!(ticket.is_done(), "a ticket is not answered");
        ticket.wait()
    }

    /// An hour in the history's own time, which runs ahead.
    fn deadline(&self) -> Duration {
        self.now.saturating_duration_since(Instant::now()) + HOUR
    }

    fn put(&mut self, block: u64) -> Ticket<Stored> {
        let bytes = content(block, self.plot.are_odd);
        let (ticket, promise) = Ticket::new(self.deadline());
        let source = Buffer::Own(crate::store::Aligned::copy_of(&bytes));
        let bytes = u32::try_from(bytes.len()).unwrap();
        self.shared.ask(Request::Put { key: key(block), source, bytes, promise });
        ticket
    }

    fn get(&mut self, block: u64) -> Ticket<Fetched> {
        let (ticket, promise) = Ticket::new(self.deadline());
        self.shared.ask(Request::Get { key: key(block), target: Buffer::zeroed(24 * 4096), promise });
        ticket
    }

    fn got(&mut self, block: u64, fetched: &Result<Fetched, Miss>) {
        match fetched {
            Ok(fetched) => {
                self.tally.hits += 1;
                self.tally.wrong += u64::from(fetched.as_slice() != content(block, self.plot.are_odd));
            }
            Err(miss) => {
                self.tally.misses += 1;
                self.tally.corrupt_reported += u64::from(*miss == Miss::Corrupt);
            }
        }
    }

    fn restart(&mut self, random: &mut Random) {
        self.tally.restarts += 1;
        self.count_run();
        if random.below(3) == 0 {
            let worker = self.worker.as_mut().unwrap();
            worker.close();
            for _ in 0..1_000 {
                if self.worker.as_ref().unwrap().is_closed() || self.steps(1) {
                    break;
                }
            }
        }
        // Dropped with all that is under way.
        drop(self.worker.take());
        if self.plot.power_cuts && random.below(2) == 0 {
            self.disk.cut_power();
            self.model.retain(|_, is_flushed| *is_flushed);
        }
        self.open();
    }

    fn has_no_faults(&self) -> bool {
        self.plot.rates == FaultRates::default()
    }
}

fn play(plot: Plot, seed: u64) -> Tally {
    let mut random = Random(seed.wrapping_mul(0xd129_0d3f_8a5b_7c31) | 1);
    let mut scene = Scene::new(plot, seed);
    let is_roomy = plot.segments > 20;
    // In a roomy log each name is put once, so what was acknowledged has to be there.
    let names = if is_roomy { 60 } else { 200 };
    for _ in 0..random.below(150) + 20 {
        let block = random.below(names);
        match random.below(20) {
            0..=7 => {
                let several = random.below(6) + 1;
                let blocks: Vec<u64> = (0..several).map(|_| random.below(names)).collect();
                let tickets: Vec<_> = blocks.iter().map(|block| (*block, scene.put(*block))).collect();
                scene.steps(random.below(4));
                for (block, ticket) in tickets {
                    if scene.finish(ticket).is_ok() {
                        scene.model.entry(block).or_insert(false);
                    }
                }
            }
            8..=14 => {
                let blocks: Vec<u64> = (0..=random.below(6)).map(|_| random.below(names)).collect();
                let tickets: Vec<_> = blocks.iter().map(|block| (*block, scene.get(*block))).collect();
                for (block, ticket) in tickets {
                    let fetched = scene.finish(ticket);
                    scene.got(block, &fetched);
                    let is_there = scene.model.contains_key(&block);
                    // Power cuts may take what was not flushed, or leave it.
                    if is_roomy && scene.has_no_faults() && (is_there || !plot.power_cuts) {
                        assert_eq!(fetched.is_ok(), is_there, "seed {seed}: block {block}: {fetched:?}");
                    }
                }
            }
            15 if plot.removes => {
                // While puts and gets of the same name are under way.
                let (put, get) = (scene.put(block), scene.get(block));
                scene.steps(random.below(3));
                let (ticket, promise) = Ticket::new(scene.deadline());
                scene.shared.ask(Request::Remove { key: key(block), promise });
                let removed = scene.finish(ticket);
                let fetched = scene.finish(get);
                scene.got(block, &fetched);
                let _ = scene.finish(put);
                if removed.is_ok() {
                    scene.model.remove(&block);
                    let ticket = scene.get(block);
                    let after = scene.finish(ticket);
                    assert!(after.is_err(), "seed {seed}: block {block} was removed");
                } else if !scene.has_no_faults() {
                    scene.model.remove(&block);
                }
            }
            16 => {
                let (ticket, promise) = Ticket::new(scene.deadline());
                scene.shared.ask(Request::Flush { promise });
                if scene.finish(ticket).is_ok() {
                    scene.model.values_mut().for_each(|is_flushed| *is_flushed = true);
                }
            }
            17 if plot.crashes => {
                // With puts under way, of which nobody knows what becomes.
                for _ in 0..random.below(5) {
                    let block = names + random.below(1000);
                    drop(scene.put(block));
                }
                scene.steps(random.below(6));
                scene.restart(&mut random);
            }
            _ => {
                scene.now += Duration::from_millis(random.below(3_000));
                scene.steps(random.below(5));
            }
        }
    }
    scene.restart(&mut random);
    for block in scene.model.clone().into_keys() {
        let ticket = scene.get(block);
        let fetched = scene.finish(ticket);
        scene.got(block, &fetched);
        if is_roomy && scene.has_no_faults() {
            assert!(fetched.is_ok(), "seed {seed}: block {block} is lost: {fetched:?}");
        }
    }
    scene.count_run();
    scene.tally.injected = scene.disk.counts().injected;
    scene.tally
}

fn histories(name: &str, plot: Plot) -> Tally {
    let read = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let count = read("SHOAL_HISTORIES").unwrap_or(50);
    let seeds = match read("SHOAL_SEED") {
        Some(seed) => seed..seed + 1,
        None => 1..count + 1,
    };
    let mut sum = Tally::default();
    for seed in seeds {
        let tally = play(plot, seed);
        assert_eq!(tally.wrong, 0, "seed {seed}: wrong bytes were served");
        if !plot.are_odd && !plot.power_cuts && !plot.removes {
            assert_eq!(tally.corrupt_found, tally.damaged, "seed {seed}: damaged reads found, and made");
        }
        sum.hits += tally.hits;
        sum.misses += tally.misses;
        sum.corrupt_reported += tally.corrupt_reported;
        sum.corrupt_found += tally.corrupt_found;
        sum.damaged += tally.damaged;
        sum.injected += tally.injected;
        sum.asides += tally.asides;
        sum.restarts += tally.restarts;
        sum.reinserted += tally.reinserted;
        sum.evicted += tally.evicted;
    }
    println!(
        "{name}: {count} histories, {} faults, {} restarts, set aside {} times; {} hits, {} misses, {} evicted, {} written \
         again; {} damaged reads, {} found damaged, {} wrong served",
        sum.injected,
        sum.restarts,
        sum.asides,
        sum.hits,
        sum.misses,
        sum.evicted,
        sum.reinserted,
        sum.damaged,
        sum.corrupt_found,
        sum.wrong,
    );
    sum
}

const ROOMY: Plot = Plot {
    segments: 64,
    capacity: 64 << 20,
    rates: FaultRates {
        read_error: 0,
        read_short: 0,
        read_flip: 0,
        write_error: 0,
        write_short: 0,
        write_torn: 0,
        write_astray: 0,
        write_flip: 0,
        sync_error: 0,
        hang: 0,
        full: 0,
    },
    crashes: true,
    power_cuts: false,
    are_odd: true,
    removes: true,
};

#[test]
fn what_was_acknowledged_survives_a_kill() {
    let sum = histories("kills", ROOMY);
    assert!(sum.hits > 1000 && sum.restarts > 100);
}

#[test]
fn what_was_flushed_survives_a_power_cut() {
    histories("power cuts", Plot { power_cuts: true, ..ROOMY });
}

#[test]
fn a_small_log_evicts_and_never_serves_what_it_wrote_over() {
    let sum = histories("evictions", Plot { segments: 4, are_odd: false, ..ROOMY });
    assert!(sum.evicted > 100 && sum.reinserted > 10, "{} {}", sum.evicted, sum.reinserted);
}

#[test]
fn a_disk_that_is_full_goes_on() {
    let full = FaultRates { full: 500, ..ROOMY.rates };
    let sum = histories("full disks", Plot { capacity: 3 << 19, rates: full, ..ROOMY });
    assert!(sum.hits > 100);
}

#[test]
fn damage_of_every_kind_is_detected() {
    let damage =
        FaultRates { read_flip: 20, write_torn: 20, write_astray: 10, write_flip: 100, ..ROOMY.rates };
    for segments in [64, 5] {
        let sum =
            histories("damage", Plot { segments, rates: damage, are_odd: false, removes: false, ..ROOMY });
        println!("detected: {:.2} % of damage", 100.0 * sum.corrupt_found as f64 / sum.damaged as f64);
        assert!(sum.damaged > 100 && sum.corrupt_found == sum.damaged);
        assert!(sum.hits > 1000);
    }
}

#[test]
fn everything_at_once() {
    let rates = FaultRates {
        read_error: 10,
        read_short: 10,
        read_flip: 10,
        write_error: 10,
        write_short: 10,
        write_torn: 10,
        write_astray: 5,
        write_flip: 50,
        sync_error: 50,
        hang: 5,
        full: 200,
    };
    for segments in [64, 5] {
        let plot = Plot { segments, rates, power_cuts: true, ..ROOMY };
        let sum = histories("everything", plot);
        assert!(sum.hits > 500 && sum.asides > 0);
    }
}
