//! Which way requests go, in numbers that are made up.

use proptest::prelude::*;

use super::*;

const BLOCK: u32 = 16;
const TOKEN_BYTES: u64 = 128 << 10;

fn run(tokens: u32, tier: usize) -> Run {
    Run { tokens, bytes: u64::from(tokens) * TOKEN_BYTES, tier }
}

fn asked(runs: &[Run]) -> Asked<'_> {
    let tokens = runs.iter().map(|run| run.tokens).sum::<u32>() + 10;
    Asked { tokens, ready: 0, runs, queued_bytes: &[], block_tokens: BLOCK }
}

/// Host memory and a disk of these bytes a second, and an engine of so many tokens a second in steps of 512.
fn learned(host_per_s: f64, disk_per_s: f64, tokens_per_s: f64) -> Learned {
    let mut learned = Learned::new(["host".to_owned(), "disk".to_owned()]);
    for round in 1..=8_u64 {
        let bytes = round * (16 << 20);
        learned.loaded(0, bytes, bytes as f64 / host_per_s * 1e6, 0);
        learned.loaded(1, bytes, bytes as f64 / disk_per_s * 1e6, 0);
        let tokens = 64 * round;
        learned.computed(tokens, tokens as f64 / tokens_per_s * 1e6);
    }
    learned
}

#[test]
fn nothing_is_computed_for_a_guess() {
    let mut learned = Learned::new(["disk".to_owned()]);
    learned.loaded(0, 1 << 20, 1e9, 0);
    let runs = [run(4096, 0)];
    let decision = learned.decide(&asked(&runs), 0);
    assert_eq!((decision.load_end, decision.because, decision.choice), (4096, Because::Unmeasured, None));
}

#[test]
fn a_mib_comes_from_the_fastest_tier_that_was_read() {
    let mut learned = Learned::new(["host".to_owned(), "disk".to_owned()]);
    learned.computed(512, 1e4);
    assert_eq!(learned.load_us_per_mib(), None, "a guess is no measurement");
    learned.loaded(1, 1 << 20, 1e6, 0);
    assert!(learned.load_us_per_mib().is_some_and(|us| us > 1e5), "the disk's: nobody has read the other");
    let learned = self::learned(20e9, 0.4e9, 10_000.0);
    let us = learned.load_us_per_mib().expect("both were read");
    assert!((52.0..53.0).contains(&us), "a MiB of 20 GB a second: {us}");
}

#[test]
fn a_fast_tier_is_loaded_and_a_slow_one_is_not() {
    // A token is 128 KiB: 10,000 computed in a second are as good as 1.22 GiB.
    for (disk_per_s, load_end) in [(4e9, 16_384), (0.4e9, 0)] {
        let learned = learned(20e9, disk_per_s, 10_000.0);
        let runs = [run(16_384, 1)];
        let decision = learned.decide(&asked(&runs), 0);
        assert_eq!(
            (decision.load_end, decision.there_end, decision.because),
            (load_end, 16_384, Because::Fastest),
            "{decision}"
        );
        let choice = decision.choice.clone().expect("it was measured");
        assert!(choice.total_us <= choice.all_load_us && choice.total_us <= choice.all_compute_us);
    }
}

#[test]
fn a_request_is_split_where_the_fast_tier_ends() {
    let learned = learned(20e9, 0.4e9, 10_000.0);
    let runs = [run(8192, 0), run(8192, 1)];
    let decision = learned.decide(&asked(&runs), 0);
    // A little of the disk's arrives beside what memory has.
    assert!((8192..8448).contains(&decision.load_end), "{decision}");
    assert_eq!(decision.there_end, 16_384);
    assert!(decision.to_string().contains("8192 from host"), "{decision}");
    // What is on the device already is neither loaded nor computed.
    let rest = Asked { ready: 8192, runs: &runs[1..], ..asked(&runs) };
    assert_eq!(learned.decide(&rest, 0).load_end, 8192);
}

#[test]
fn what_waits_in_a_tier_counts() {
    let learned = learned(20e9, 2e9, 10_000.0);
    let runs = [run(16_384, 1)];
    assert_eq!(learned.decide(&asked(&runs), 0).load_end, 16_384);
    let queued = Asked { queued_bytes: &[0, 8 << 30], ..asked(&runs) };
    assert_eq!(learned.decide(&queued, 0).load_end, 0, "8 GiB are written before it is read");
}

#[test]
fn what_saves_little_is_not_computed() {
    // The disk is a tenth slower than the engine.
    let learned = learned(20e9, 0.9 * 10_000.0 * TOKEN_BYTES as f64, 10_000.0);
    let runs = [run(16_384, 1)];
    let decision = learned.decide(&asked(&runs), 0);
    assert_eq!((decision.load_end, decision.because), (16_384, Because::Close), "{decision}");
    // Much slower, but for a block: it is not worth the trouble.
    let learned = self::learned(20e9, 0.4e9, 10_000.0);
    let runs = [run(BLOCK, 1)];
    assert_eq!(learned.decide(&asked(&runs), 0).because, Because::Close);
}

#[test]
fn what_is_passed_over_is_measured_again() {
    let mut learned = learned(20e9, 0.4e9, 10_000.0);
    let runs = [run(16_384, 1)];
    assert_eq!(learned.decide(&asked(&runs), 59_999).load_end, 0);
    let probe = learned.decide(&asked(&runs), 60_000);
    assert_eq!((probe.load_end, probe.because), (32, Because::Stale), "4 MiB of it");
    learned.loaded(1, 4 << 20, 1e3, 60_000);
    assert_eq!(learned.decide(&asked(&runs), 60_001).load_end, 0, "one sample among many");
    for _ in 0..16 {
        learned.loaded(1, 4 << 20, 1e3, 60_000);
    }
    assert_eq!(learned.decide(&asked(&runs), 60_001).load_end, 16_384, "it is fast by now");
}

#[test]
fn a_long_prompt_takes_many_steps() {
    // 20 ms for each step of 512 tokens, whatever is in it: 25,600 tokens a second at most.
    let mut learned = Learned::new(["disk".to_owned()]);
    for tokens in [64, 128, 256, 512, 64, 128, 256, 512] {
        learned.computed(tokens, 20_000.0);
    }
    for bytes in (1..=8_u64).map(|round| round << 24) {
        // 40,000 tokens a second.
        learned.loaded(0, bytes, bytes as f64 / (40_000.0 * TOKEN_BYTES as f64) * 1e6, 0);
    }
    let runs = [run(16_384, 0)];
    let decision = learned.decide(&asked(&runs), 0);
    assert_eq!(decision.load_end, 16_384, "{decision}");
    let choice = decision.choice.clone().expect("it was measured");
    assert!((600e3..700e3).contains(&choice.all_compute_us), "32 steps: {decision}");
}

proptest! {
    #[test]
    fn what_is_loaded_is_there_and_ends_at_a_block(
        costs in prop::collection::vec((1e7..1e11_f64, 1e7..1e11_f64, 10.0..1e6_f64), 1..4),
        lengths in prop::collection::vec((0_u32..200, 0_usize..3), 0..5),
        ready in 0_u32..50,
        now_ms in 0_u64..200_000,
    ) {
        let mut learned = Learned::new(["host".to_owned(), "disk".to_owned()]);
        for (host, disk, engine) in costs {
            learned.loaded(0, 1 << 24, f64::from(1 << 24) / host * 1e6, 0);
            learned.loaded(1, 1 << 24, f64::from(1 << 24) / disk * 1e6, 0);
            learned.computed(512, 512.0 / engine * 1e6);
        }
        let runs: Vec<_> = lengths.iter().map(|(blocks, tier)| run(blocks * BLOCK, *tier)).collect();
        let asked = Asked { ready: ready * BLOCK, tokens: asked(&runs).tokens + ready * BLOCK, ..asked(&runs) };
        let decision = learned.decide(&asked, now_ms);
        prop_assert!(decision.load_end >= asked.ready && decision.load_end <= decision.there_end);
        prop_assert_eq!(decision.load_end % BLOCK, 0);
        prop_assert_eq!(decision.there_end, asked.tokens - 10);
        prop_assert_eq!(learned.decide(&asked, now_ms), decision.clone());
        prop_assert!(!decision.to_string().is_empty());
    }
}
