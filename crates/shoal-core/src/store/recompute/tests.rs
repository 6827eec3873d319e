//! The decision against every way tried one by one, and the estimate against lines that are known.

use proptest::prelude::*;

use super::*;

const LAYERS: u32 = 32;

fn overlap() -> impl Strategy<Value = Overlap> {
    prop_oneof![Just(Overlap::None), Just(Overlap::ByLayer { layers: LAYERS }), Just(Overlap::BothEnds)]
}

fn cost() -> impl Strategy<Value = Cost> {
    (0.0..1e4_f64, 1e-5..10.0_f64).prop_map(|(fixed_us, unit_us)| Cost { fixed_us, unit_us })
}

/// Anything that a measurement or a division may have left.
fn odd() -> impl Strategy<Value = f64> {
    prop_oneof![
        Just(0.0),
        Just(-1.0),
        Just(f64::NAN),
        Just(f64::INFINITY),
        Just(f64::NEG_INFINITY),
        Just(f64::MAX),
        Just(f64::MIN_POSITIVE),
        0.0..1e9_f64,
    ]
}

#[derive(Clone, Debug)]
struct Asked {
    tokens: u32,
    ready: u32,
    runs: Vec<Run>,
    costs: Vec<(Cost, u64)>,
    link: Option<Cost>,
    prefill: Cost,
    block_tokens: u32,
    overlap: Overlap,
}

impl Asked {
    fn with<R>(&self, look: impl FnOnce(&Question<'_>) -> R) -> R {
        let names = ["host", "disk", "remote"];
        let tiers: Vec<_> = self
            .costs
            .iter()
            .zip(names)
            .map(|((cost, queued), name)| TierNow { name, cost: *cost, queued_bytes: *queued })
            .collect();
        look(&Question {
            tokens: self.tokens,
            ready: self.ready,
            runs: &self.runs,
            tiers: &tiers,
            link: self.link,
            prefill: self.prefill,
            block_tokens: self.block_tokens,
            overlap: self.overlap,
        })
    }

    /// Until the last token when `load` is loaded, said once more and without a thought for speed.
    fn price(&self, load: core::ops::Range<u32>, is_overlapped: bool) -> f64 {
        let mut bytes = vec![0.0; self.costs.len()];
        for token in load.clone() {
            let mut at = self.ready;
            let run = self.runs.iter().find(|run| {
                at += run.tokens;
                token < at
            });
            let run = run.expect("only what is there is loaded");
            bytes[run.tier] += run.bytes as f64 / f64::from(run.tokens);
        }
        let of_tier = |(bytes, (cost, queued)): (&f64, &(Cost, u64))| {
            if *bytes > 0.0 { cost.of(bytes + *queued as f64) } else { 0.0 }
        };
        let loading = bytes.iter().zip(&self.costs).map(of_tier).fold(0.0, f64::max);
        let loading = loading.max(self.link.map_or(0.0, |link| link.of(bytes.iter().sum())));
        let compute = |tokens: u32| self.prefill.of(f64::from(tokens));
        let tail = compute(self.tokens - load.end.max(self.ready));
        match self.overlap {
            _ if load.is_empty() => compute(self.tokens - self.ready),
            Overlap::ByLayer { layers } => {
                let layers = f64::from(layers);
                (loading + tail / layers).max(loading / layers + tail)
            }
            Overlap::BothEnds if is_overlapped => loading.max(compute(load.start - self.ready)) + tail,
            Overlap::None | Overlap::BothEnds => loading + tail,
        }
    }
}

fn asked(tiers: usize) -> impl Strategy<Value = Asked> {
    let run = (1..80_u32, 1..5000_u64, 0..tiers).prop_map(|(tokens, token_bytes, tier)| Run {
        tokens,
        bytes: u64::from(tokens) * token_bytes,
        tier,
    });
    (
        1..300_u32,
        0..300_u32,
        prop::collection::vec(run, 0..6),
        prop::collection::vec((cost(), 0..100_000_u64), tiers),
        prop::option::of(cost()),
        cost(),
        prop_oneof![Just(1), Just(7), Just(16)],
        overlap(),
    )
        .prop_map(|(tokens, ready, runs, costs, link, prefill, block_tokens, overlap)| Asked {
            tokens,
            ready: ready % tokens,
            runs,
            costs,
            link,
            prefill: Cost { unit_us: prefill.unit_us * 1000.0, ..prefill },
            block_tokens,
            overlap,
        })
}

fn is_close(one: f64, other: f64) -> bool {
    (one - other).abs() <= 1e-6 * one.abs().max(other.abs()).max(1.0)
}

proptest! {
    #[test]
    fn no_way_is_faster(asked in asked(3)) {
        let choice = asked.with(choose);
        let found = asked.ready + asked.runs.iter().map(|run| run.tokens).sum::<u32>();
        let last = (asked.tokens - 1) / asked.block_tokens * asked.block_tokens;
        let is_cut = |token: &u32| token.is_multiple_of(asked.block_tokens) && *token <= found.min(last);
        let cuts: Vec<u32> = (asked.ready + 1..asked.tokens).filter(is_cut).collect();

        let own = asked.price(choice.load.clone(), choice.is_overlapped);
        prop_assert!(is_close(choice.total_us, own), "{choice:?}: {own}");
        prop_assert!(choice.total_us <= choice.all_load_us && choice.total_us <= choice.all_compute_us);
        let mut best = asked.price(asked.ready..asked.ready, false);
        prop_assert!(is_close(choice.all_compute_us, best));
        for cut in &cuts {
            best = best.min(asked.price(asked.ready..*cut, false));
            if asked.overlap == Overlap::BothEnds {
                best = best.min(asked.price(*cut..*cuts.last().unwrap_or(cut), true));
            }
        }
        prop_assert!(is_close(choice.total_us, best), "{choice}: {best} would do");

        let counted: u32 = choice.from.iter().map(|(_, tokens)| tokens).sum();
        prop_assert_eq!(counted, choice.load.end - choice.load.start);
        prop_assert!(choice.computed() >= 1, "nothing follows from tokens of which none is computed");
    }

    #[test]
    fn a_faster_tier_never_makes_it_slower(asked in asked(3), tier in 0..3_usize, faster in 1.0..20.0_f64) {
        let mut better = asked.clone();
        better.costs[tier].0.unit_us /= faster;
        let (before, after) = (asked.with(choose), better.with(choose));
        prop_assert!(after.total_us <= before.total_us * (1.0 + 1e-9), "{before}\n{after}");
        let mut shorter = asked.clone();
        shorter.costs[tier].1 /= 2;
        prop_assert!(shorter.with(choose).total_us <= before.total_us * (1.0 + 1e-9));
    }

    #[test]
    fn more_is_loaded_from_a_faster_tier(mut asked in asked(1), faster in 1.0..20.0_f64) {
        // With both at once the meeting point may jump from one end to the other.
        (asked.link, asked.overlap) = (None, Overlap::None);
        let before = asked.with(choose);
        asked.costs[0].0.unit_us /= faster;
        let after = asked.with(choose);
        // Two ways that are as fast as each other may change places by a rounding.
        let is_tie = is_close(before.total_us, after.total_us);
        prop_assert!(after.computed() <= before.computed() || is_tie, "{before}\n{after}");
    }

    #[test]
    fn no_number_is_too_odd(
        mut asked in asked(3),
        odd in prop::collection::vec((odd(), odd()), 5),
        wrong in 0..9_usize,
        ready in 0..1000_u32,
    ) {
        for (place, (fixed_us, unit_us)) in asked.costs.iter_mut().zip(&odd) {
            *place = (Cost { fixed_us: *fixed_us, unit_us: *unit_us }, u64::MAX);
        }
        asked.prefill = Cost { fixed_us: odd[3].0, unit_us: odd[3].1 };
        asked.link = Some(Cost { fixed_us: odd[4].0, unit_us: odd[4].1 });
        asked.ready = ready;
        if let Some(run) = asked.runs.first_mut() {
            run.tier = wrong;
            run.bytes = u64::MAX;
        }
        let choice = asked.with(choose);
        prop_assert!(!choice.total_us.is_nan() && choice.total_us >= 0.0);
        prop_assert!(choice.total_us <= choice.all_compute_us);
        prop_assert!(!choice.to_string().contains("NaN"));
    }

    #[test]
    fn a_few_wild_samples_change_nothing(
        fixed_us in 1.0..1000.0_f64,
        unit_us in 1e-4..1e-1_f64,
        wild in prop::collection::vec((0..16_usize, odd(), 0..1_000_000_u64), 0..4),
    ) {
        let mut estimate = Estimate::new(Cost { fixed_us: 5e5, unit_us: 5.0 });
        let line = Cost { fixed_us, unit_us };
        for number in 0..16_u32 {
            if let Some((_, us, units)) = wild.iter().find(|(at, ..)| *at == number as usize) {
                estimate.saw(*units, *us);
            } else {
                // Lengths from 4 KiB to 128 MiB, in no order.
                let units = 4096_u64 << (number * 7 % 16);
                estimate.saw(units, line.of(units as f64));
            }
        }
        for units in [4096.0, 1e6, 1e8] {
            let (is, should) = (estimate.cost().of(units), line.of(units));
            prop_assert!(is > should / 1.2 && is < should * 1.2, "{units}: {is} us, not {should}; {wild:?}");
        }
    }

    #[test]
    fn an_estimate_is_always_a_number(guess in (odd(), odd()), samples in prop::collection::vec((any::<u64>(), odd()), 0..40)) {
        let mut estimate = Estimate::new(Cost { fixed_us: guess.0, unit_us: guess.1 });
        for (units, us) in samples {
            estimate.saw(units, us);
            let cost = estimate.cost();
            prop_assert!(cost.fixed_us.is_finite() && cost.fixed_us >= 0.0, "{cost:?}");
            prop_assert!(cost.unit_us.is_finite() && cost.unit_us > 0.0, "{cost:?}");
        }
    }
}

/// An 8B model: 128 KiB a token, computed at 28,000 tokens a second.
fn eight_b(tiers: &[TierNow<'_>], runs: &[Run], overlap: Overlap) -> Choice {
    choose(&Question {
        tokens: 16_384,
        ready: 0,
        runs,
        tiers,
        link: None,
        prefill: Cost::of_rate(0.0, 28_000.0),
        block_tokens: 16,
        overlap,
    })
}

fn run(tokens: u32, tier: usize) -> Run {
    Run { tokens, bytes: u64::from(tokens) * 131_072, tier }
}

#[test]
fn what_is_known_of_an_8b_model_comes_out() {
    let tier = |name, per_s| TierNow { name, cost: Cost::of_rate(100.0, per_s), queued_bytes: 0 };
    let fast = [tier("host", 50e9), tier("disk", 6e9)];
    let slow = [tier("host", 50e9), tier("disk", 2e9)];

    let choice = eight_b(&fast, &[run(16_384, 1)], Overlap::None);
    assert_eq!(choice.load, 0..16_368, "6 GB/s is more than 28,000 tokens a second: {choice}");
    let choice = eight_b(&slow, &[run(16_384, 1)], Overlap::None);
    assert_eq!(choice.load, 0..0, "2 GB/s is less: {choice}");
    let choice = eight_b(&slow, &[run(4096, 0), run(12_288, 1)], Overlap::None);
    assert_eq!(choice.from[0], ("host".to_owned(), 4096));
    assert!(choice.load.end < 4400, "only what the disk gives while the host loads as well: {choice}");

    for overlap in [Overlap::ByLayer { layers: 32 }, Overlap::BothEnds] {
        let choice = eight_b(&fast, &[run(16_384, 1)], overlap);
        let better = choice.all_load_us.min(choice.all_compute_us);
        assert!(choice.is_overlapped && better / choice.total_us > 1.4, "both at once: {choice}");
        let choice = eight_b(&slow, &[run(16_384, 1)], overlap);
        assert!(!choice.load.is_empty() && choice.computed() > 8_000, "each does its part: {choice}");
    }
    let mut busy = fast;
    busy[1].queued_bytes = 4 << 30;
    let choice = eight_b(&busy, &[run(16_384, 1)], Overlap::None);
    assert_eq!(choice.load, 0..0, "others wait for the disk: {choice}");
}

#[test]
fn the_reason_has_its_numbers() {
    let tiers = [TierNow { name: "host", cost: Cost::of_rate(0.0, 50e9), queued_bytes: 0 }];
    let choice = eight_b(&tiers, &[run(4096, 0)], Overlap::None);
    assert_eq!(
        choice.to_string(),
        "tokens 0 to 4096 are loaded in 11 ms (4096 from host) and then 12288 computed in 439 ms: 450 ms in all, \
         against 450 ms with all loaded that is there and 585 ms with nothing loaded"
    );
    let choice = eight_b(&[], &[], Overlap::None);
    assert_eq!(
        choice.to_string(),
        "16384 tokens are computed in 585 ms: 585 ms in all, against 585 ms with all loaded that is there and 585 ms \
         with nothing loaded"
    );
}

#[test]
fn the_first_samples_move_a_guess_and_the_next_replace_it() {
    let mut estimate = Estimate::new(Cost { fixed_us: 0.0, unit_us: 100.0 });
    assert!((estimate.cost().of(10.0) - 1000.0).abs() < 1e-9);
    estimate.saw(10, 200.0);
    let first = estimate.cost().of(10.0);
    assert!(first > 200.0 && first < 1000.0, "{first}");
    for _ in 0..3 {
        estimate.saw(10, 200.0);
    }
    assert!((estimate.cost().of(10.0) - 200.0).abs() < 1.0);
    // An engine that became twice as fast is believed once most of what is remembered says so.
    for _ in 0..12 {
        estimate.saw(10, 100.0);
    }
    assert!((estimate.cost().of(10.0) - 100.0).abs() < 1.0);
    assert_eq!(estimate.seen(), 16);
}
