//! What it costs to find and to seal a prompt of 4,096 tokens (256 blocks of 16), with 100,000 blocks in the index.
//!
//! The ceiling of both is the time to compute the keys alone, in the same run: a search may beat it, because it compares
//! tokens along the way it went last time instead of hashing.

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use shoal_core::kv::eviction::{EvictionKind, ExtentSpan};
use shoal_core::kv::prefix::{Found, KeyChain, PrefixCache, PrefixOptions, Sealed, Start};

const BLOCK_TOKENS: u32 = 16;
const PROMPT_TOKENS: u32 = 4096;
const PROMPT_BLOCKS: u32 = PROMPT_TOKENS / BLOCK_TOKENS;
const BLOCKS: u32 = 100_000;

/// A prompt of its own: no two share a block.
fn prompt(number: u32) -> Vec<u32> {
    (0..PROMPT_TOKENS)
        .map(|at| number.wrapping_mul(2_654_435_761).wrapping_add(at * 40_503) % 128_000)
        .collect()
}

fn blocks_of(number: u32) -> Vec<u32> {
    (number * PROMPT_BLOCKS..(number + 1) * PROMPT_BLOCKS).collect()
}

fn filled(events_max: usize) -> PrefixCache {
    let options = PrefixOptions { events_max, ..PrefixOptions::full(BLOCK_TOKENS, BLOCKS + PROMPT_BLOCKS) };
    let mut cache = PrefixCache::new(options, EvictionKind::Lru).expect("good options");
    let mut sealed = Sealed::default();
    for number in 0..BLOCKS / PROMPT_BLOCKS {
        let blocks = blocks_of(number);
        cache.seal(Start::Salt(b"tenant"), &prompt(number), &[&blocks], &mut sealed).expect("free blocks");
        cache.released(0, &blocks, |block| ExtentSpan::one(block / 64));
    }
    cache
}

fn prefix(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("prefix_4k");
    group.throughput(Throughput::Elements(u64::from(PROMPT_BLOCKS)));
    let prompts: Vec<Vec<u32>> = (0..BLOCKS / PROMPT_BLOCKS).map(prompt).collect();
    group.bench_function("keys alone", |bencher| {
        bencher.iter(|| KeyChain::keys(0, b"tenant", &prompts[0], BLOCK_TOKENS));
    });
    let mut cache = filled(4096);
    let (mut found, mut sealed) = (Found::default(), Sealed::default());
    for tokens in &prompts {
        cache.find(b"tenant", tokens, &mut found);
        assert_eq!(found.tokens, tokens.len());
    }
    group.bench_function("find, the same prompt", |bencher| {
        bencher.iter(|| cache.find(b"tenant", &prompts[0], &mut found));
    });
    let mut next = 0;
    group.bench_function("find, a prompt not seen for long", |bencher| {
        bencher.iter(|| {
            next = (next + 131) % prompts.len();
            cache.find(b"tenant", &prompts[next], &mut found);
        });
    });
    let missed = prompt(1_000_000);
    group.bench_function("find, nothing", |bencher| {
        bencher.iter(|| cache.find(b"tenant", &missed, &mut found));
    });
    group.bench_function("take what was found and give it up", |bencher| {
        cache.find(b"tenant", &prompts[7], &mut found);
        bencher.iter(|| {
            for block in &found.groups[0].blocks {
                cache.used(0, *block);
            }
            cache.released(0, &found.groups[0].blocks, |block| ExtentSpan::one(block / 64));
        });
    });
    for (name, events_max) in [("no events", 0), ("events", 4096)] {
        let mut cache = filled(events_max);
        let spare: Vec<u32> = (BLOCKS - BLOCKS % PROMPT_BLOCKS..).take(PROMPT_BLOCKS as usize).collect();
        let mut number = 1_000_000;
        // What is sealed is taken out again, so that the next can come.
        let mut seal = |rounds: u64, sealing: bool| {
            let mut timed = Duration::ZERO;
            for _ in 0..rounds {
                number += 1;
                let tokens = prompt(number);
                let start = Instant::now();
                cache.seal(Start::Salt(b"tenant"), &tokens, &[&spare], &mut sealed).expect("free blocks");
                let between = Instant::now();
                for block in spare.iter().rev() {
                    cache.forget(0, *block);
                }
                timed += if sealing { between - start } else { between.elapsed() };
            }
            timed
        };
        group.bench_function(format!("seal, new, {name}"), |bencher| {
            bencher.iter_custom(|rounds| seal(rounds, true));
        });
        group.bench_function(format!("forget, {name}"), |bencher| {
            bencher.iter_custom(|rounds| seal(rounds, false));
        });
    }
    let own = blocks_of(3);
    group.bench_function("seal, sealed already", |bencher| {
        bencher.iter(|| {
            cache.seal(Start::Salt(b"tenant"), &prompts[3], &[&own], &mut sealed).expect("its own blocks");
        });
    });
    group.finish();
}

criterion_group!(benches, prefix);
criterion_main!(benches);
