//! What eviction costs at 1,000 to 1,000,000 cached blocks (it should not depend on it), and what each policy keeps.
//!
//! The first part times evicting 64 blocks, and one whole extent of 64, of which new ones are cached in between. The second prints
//! the part of prompt tokens found in a seeded trace of conversations, system prompts and one-off documents: figures of a
//! made-up trace, good for seeing that a policy does what it is meant to, not for choosing one for your users.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use shoal_core::kv::eviction::{CostModel, EvictionKind, ExtentSpan};
use shoal_core::kv::prefix::{Found, PrefixCache, PrefixOptions, Sealed, Start};

const BLOCK_TOKENS: u32 = 16;
const CHAIN: u32 = 64;
const KINDS: [(&str, EvictionKind); 3] = [
    ("lru", EvictionKind::Lru),
    ("s3fifo", EvictionKind::S3Fifo),
    ("cost", EvictionKind::CostAware(CostModel { attention_tokens_equal: 30_000 })),
];

struct Full {
    cache: PrefixCache,
    sealed: Sealed,
    number: u32,
    tokens: Vec<u32>,
}

impl Full {
    fn new(kind: EvictionKind, blocks: u32) -> Self {
        let options = PrefixOptions { events_max: 0, ..PrefixOptions::full(BLOCK_TOKENS, blocks) };
        let cache = PrefixCache::new(options, kind).expect("good options");
        let mut full = Self { cache, sealed: Sealed::default(), number: 0, tokens: Vec::new() };
        for first in (0..blocks).step_by(CHAIN as usize) {
            let chain: Vec<u32> = (first..(first + CHAIN).min(blocks)).collect();
            full.add(&chain);
        }
        for extent in 0..blocks.div_ceil(CHAIN) {
            full.cache.set_allocated(0, extent, CHAIN);
        }
        full
    }

    fn add(&mut self, blocks: &[u32]) {
        self.number += 1;
        let number = self.number;
        self.tokens.clear();
        let count = u32::try_from(blocks.len()).expect("few") * BLOCK_TOKENS;
        self.tokens.extend((0..count).map(|at| number.wrapping_mul(2_654_435_761).wrapping_add(at)));
        self.cache.seal(Start::Salt(b""), &self.tokens, &[blocks], &mut self.sealed).expect("free blocks");
        self.cache.released(0, blocks, |block| ExtentSpan::one(block / CHAIN));
    }
}

fn evict(criterion: &mut Criterion) {
    for (name, kind) in KINDS {
        let mut group = criterion.benchmark_group(format!("evict_64_blocks/{name}"));
        group.throughput(Throughput::Elements(u64::from(CHAIN)));
        for blocks in [1_000, 10_000, 100_000, 1_000_000] {
            let mut full = Full::new(kind, blocks);
            let mut evicted = Vec::new();
            group.bench_function(BenchmarkId::from_parameter(blocks), |bencher| {
                bencher.iter_custom(|rounds| {
                    let mut timed = Duration::ZERO;
                    for _ in 0..rounds {
                        evicted.clear();
                        let start = Instant::now();
                        full.cache.evict(0, CHAIN, &mut evicted);
                        timed += start.elapsed();
                        assert_eq!(evicted.len(), CHAIN as usize);
                        evicted.reverse();
                        full.add(&evicted);
                    }
                    timed
                });
            });
        }
        group.finish();
        let mut group = criterion.benchmark_group(format!("evict_an_extent_of_64/{name}"));
        group.throughput(Throughput::Elements(u64::from(CHAIN)));
        for blocks in [10_000, 100_000, 1_000_000] {
            let mut full = Full::new(kind, blocks / CHAIN * CHAIN);
            let mut evicted = Vec::new();
            group.bench_function(BenchmarkId::from_parameter(blocks), |bencher| {
                bencher.iter_custom(|rounds| {
                    let mut timed = Duration::ZERO;
                    for _ in 0..rounds {
                        evicted.clear();
                        let start = Instant::now();
                        let extent = full.cache.victim_extent(0).expect("all are cached");
                        full.cache.evict_blocks(0, extent * CHAIN..(extent + 1) * CHAIN, &mut evicted);
                        timed += start.elapsed();
                        assert_eq!(evicted.len(), CHAIN as usize);
                        evicted.reverse();
                        full.add(&evicted);
                    }
                    timed
                });
            });
        }
        group.finish();
    }
}

/// Numbers that are the same on every machine (splitmix64: Steele, Lea, Flood, OOPSLA 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u32) -> u32 {
        u32::try_from(self.next() % u64::from(bound.max(1))).expect("below a u32")
    }

    fn tokens(&mut self, count: u32) -> impl Iterator<Item = u32> + '_ {
        (0..count).map(|_| self.below(128_000))
    }
}

/// Prompts in the order in which they come, each with its answer: (tokens of the prompt, all tokens).
fn trace() -> Vec<(usize, Vec<u32>)> {
    let mut random = Random(20);
    let systems: Vec<Vec<u32>> = (0..12).map(|number| random.tokens(256 + number * 128).collect()).collect();
    let mut talks: Vec<(Vec<u32>, u32)> = Vec::new();
    let mut trace = Vec::new();
    for _ in 0..6000 {
        let kind = random.below(100);
        if kind < 15 {
            // A document that nobody sends again.
            let length = 1000 + random.below(5000);
            let prompt: Vec<u32> = random.tokens(length).collect();
            trace.push((prompt.len(), prompt));
            continue;
        }
        if kind < 35 || talks.is_empty() {
            // Some system prompts are far more common than others.
            let system = random.below(12).min(random.below(12)).min(random.below(12)) as usize;
            talks.push((systems[system].clone(), 2 + random.below(14)));
        }
        // Those who spoke lately are likelier to speak again.
        let last = u32::try_from(talks.len()).expect("few");
        let back = random.below(last).min(random.below(last)).min(200);
        let at = (last - 1 - back) as usize;
        let (mut tokens, turns) = talks.remove(at);
        let (asked, answered) = (30 + random.below(300), 50 + random.below(400));
        tokens.extend(random.tokens(asked));
        let prompt = tokens.len();
        tokens.extend(random.tokens(answered));
        trace.push((prompt, tokens.clone()));
        if turns > 1 {
            talks.push((tokens, turns - 1));
        }
    }
    trace
}

/// Part of all prompt tokens found, and part of what computing them would have cost.
fn play(trace: &[(usize, Vec<u32>)], kind: EvictionKind, blocks: u32) -> (f64, f64) {
    let options = PrefixOptions { events_max: 0, ..PrefixOptions::full(BLOCK_TOKENS, blocks) };
    let mut cache = PrefixCache::new(options, kind).expect("good options");
    let (mut found, mut sealed, mut evicted) = (Found::default(), Sealed::default(), Vec::new());
    let mut free: Vec<u32> = (0..blocks).rev().collect();
    let (mut hit, mut asked, mut saved, mut cost) = (0.0, 0.0, 0.0, 0.0);
    let price = |tokens: usize| tokens as f64 * (1.0 + tokens as f64 / 2.0 / 30_000.0);
    for (prompt, tokens) in trace {
        cache.find(b"", &tokens[..prompt - 1], &mut found);
        hit += found.tokens as f64;
        asked += *prompt as f64;
        saved += price(found.tokens);
        cost += price(*prompt);
        let mut held = found.groups[0].blocks.clone();
        for block in &held {
            cache.used(0, *block);
        }
        let missing = (tokens.len() / BLOCK_TOKENS as usize).saturating_sub(held.len());
        if free.len() < missing {
            evicted.clear();
            cache.evict(0, u32::try_from(missing - free.len()).expect("few"), &mut evicted);
            free.append(&mut evicted);
        }
        let missing = missing.min(free.len());
        held.extend(free.drain(free.len() - missing..));
        let sealable = &tokens[..held.len() * BLOCK_TOKENS as usize];
        cache.seal(Start::Salt(b""), sealable, &[&held], &mut sealed).expect("free blocks");
        for duplicate in &sealed.duplicates {
            free.push(duplicate.given);
        }
        cache.released(0, &held, |block| ExtentSpan::one(block / CHAIN));
    }
    (hit / asked, saved / cost)
}

#[expect(clippy::print_stdout, reason = "it is what the program is for")]
fn print_hits() {
    let trace = trace();
    println!("\nprompt tokens found (prefill cost saved), {} requests", trace.len());
    println!("{:>14}  {:>18}  {:>18}  {:>18}", "cached tokens", "lru", "s3fifo", "cost");
    for blocks in [2_000, 5_000, 10_000, 20_000, 50_000, 100_000] {
        let cells: Vec<String> = KINDS
            .iter()
            .map(|(_, kind)| {
                let (hit, saved) = play(&trace, *kind, blocks);
                format!("{:>7.1} % ({:>4.1} %)", hit * 100.0, saved * 100.0)
            })
            .collect();
        println!("{:>14}  {:>18}  {:>18}  {:>18}", blocks * BLOCK_TOKENS, cells[0], cells[1], cells[2]);
    }
}

criterion_group!(benches, evict);

fn main() {
    print_hits();
    benches();
    Criterion::default().configure_from_args().final_summary();
}
