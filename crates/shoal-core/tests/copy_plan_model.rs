//! Plans of copies against a model that copies byte by byte.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use shoal_core::copy_plan::costs::{CopyCosts, Costs, Method, MethodCosts, SIZES};
use shoal_core::copy_plan::{CopyPlan, Run, coalesce};

/// Where each byte written comes from.
fn bytes_of(runs: &[Run]) -> BTreeMap<u64, u64> {
    let mut bytes = BTreeMap::new();
    for run in runs {
        for i in 0..run.bytes {
            let before = bytes.insert(run.target + i, run.source + i);
            assert_eq!(before, None, "a byte is written twice");
        }
    }
    bytes
}

/// Runs whose targets do not overlap, in any order: many of them neighbours, some empty, some across a seam.
fn runs() -> impl Strategy<Value = Vec<Run>> {
    let step = (0..3_u64, 0..70_u64, any::<bool>(), 0..40_u64);
    prop::collection::vec(step, 0..60)
        .prop_map(|steps| {
            let (mut source, mut target, mut seam) = (1000, 5000, 0);
            let mut runs = Vec::new();
            for (gap, bytes, jumps, far) in steps {
                target += gap;
                source += gap;
                if jumps {
                    source += far;
                    seam += far % 2;
                }
                runs.push(Run { source, target, bytes, seam });
                target += bytes;
                source += bytes;
            }
            runs
        })
        .prop_shuffle()
}

fn method() -> impl Strategy<Value = MethodCosts> {
    let each = prop::array::uniform11(1..100_000_u64);
    (0..50_000_u64, each).prop_map(|(start, each)| MethodCosts { start, each })
}

fn costs() -> impl Strategy<Value = Costs> {
    (method(), prop::option::of(method()), prop::option::of(method()))
        .prop_map(|(dma, batch, kernel)| Costs { dma, batch, kernel })
}

/// What a set of methods costs, the plain way.
fn total(costs: &Costs, runs: &[Run], has_batch: bool, has_kernel: bool) -> Option<u64> {
    let price = |method: &MethodCosts, bytes: u64| {
        // Runs of the model are shorter than the least size.
        assert!(bytes < SIZES[0]);
        method.each[0]
    };
    let batch = has_batch.then_some(costs.batch.as_ref());
    let kernel = has_kernel.then_some(costs.kernel.as_ref());
    if batch == Some(None) || kernel == Some(None) {
        return None;
    }
    let (batch, kernel) = (batch.flatten(), kernel.flatten());
    let starts = costs.dma.start + batch.map_or(0, |m| m.start) + kernel.map_or(0, |m| m.start);
    let each = runs.iter().map(|run| {
        let mut least = price(&costs.dma, run.bytes);
        if let Some(batch) = batch {
            least = least.min(price(batch, run.bytes));
        }
        if let Some(kernel) = kernel.filter(|_| run.source % 16 == run.target % 16) {
            // It has to be better by a sixteenth.
            least = least.min(price(kernel, run.bytes) + price(kernel, run.bytes) / 16);
        }
        least
    });
    Some(starts + each.sum::<u64>())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn coalescing_moves_the_same_bytes_in_the_fewest_runs(runs in runs()) {
        let mut joined = runs.clone();
        coalesce(&mut joined);
        prop_assert_eq!(bytes_of(&joined), bytes_of(&runs));
        prop_assert!(joined.iter().all(|run| run.bytes > 0));
        for pair in joined.windows(2) {
            let (one, two) = (pair[0], pair[1]);
            prop_assert!(one.target < two.target);
            let are_neighbours = one.target + one.bytes == two.target
                && one.source + one.bytes == two.source
                && one.seam == two.seam;
            prop_assert!(!are_neighbours, "{:?} {:?} could be one", one, two);
        }
        // No run reaches over a seam.
        for run in runs.iter().filter(|run| run.bytes > 0) {
            let holder = joined.iter().find(|one| {
                one.target <= run.target && run.target + run.bytes <= one.target + one.bytes
            });
            prop_assert_eq!(holder.unwrap().seam, run.seam);
        }
    }

    #[test]
    fn a_plan_moves_the_same_bytes_by_methods_that_there_are(
        runs in runs(), costs in costs(), unit in prop::sample::select(vec![16_u64, 32, 64, 4096])
    ) {
        let plan = CopyPlan::new(runs.clone(), &costs, unit);
        let all: Vec<_> = [&plan.dma, &plan.batch, &plan.units].into_iter().flatten().copied().collect();
        prop_assert_eq!(bytes_of(&all), bytes_of(&runs));
        prop_assert!(plan.batch.is_empty() || costs.batch.is_some());
        prop_assert!(plan.units.is_empty() || costs.kernel.is_some());
        for part in &plan.units {
            prop_assert!(part.is_wide() && part.bytes <= unit, "{:?}", part);
            prop_assert!(part.target / unit == (part.target + part.bytes - 1) / unit, "{:?}", part);
        }
    }

    #[test]
    fn no_other_set_of_methods_is_cheaper(runs in runs(), costs in costs()) {
        let mut joined = runs;
        coalesce(&mut joined);
        joined.retain(|run| run.bytes < SIZES[0]);
        let chosen = costs.best_methods(&joined);
        let price = total(&costs, &joined, chosen.has(Method::Batch), chosen.has(Method::Kernel)).unwrap();
        for (has_batch, has_kernel) in [(false, false), (true, false), (false, true), (true, true)] {
            if let Some(other) = total(&costs, &joined, has_batch, has_kernel) {
                prop_assert!(price <= other, "{} for {:?}, {} for {} {}", price, chosen, other, has_batch, has_kernel);
            }
        }
    }

    #[test]
    fn a_table_comes_back_as_it_was_written(up in costs(), down in costs()) {
        let table = CopyCosts::new(up, down);
        prop_assert_eq!(CopyCosts::parse(&table.text().unwrap()).unwrap(), table);
    }

    #[test]
    fn any_text_is_refused_or_holds_the_rules(
        up in costs(), at in any::<prop::sample::Index>(), with in any::<u8>(), cut in any::<bool>()
    ) {
        let mut bytes = CopyCosts::new(up.clone(), up).text().unwrap().into_bytes();
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] = with;
        }
        if let Ok(table) = CopyCosts::parse(&String::from_utf8_lossy(&bytes)) {
            prop_assert!(!cut);
            // What was taken can be written and read again.
            prop_assert_eq!(CopyCosts::parse(&table.text().unwrap()).unwrap(), table);
        }
    }

    #[test]
    fn noise_is_no_table(text in ".{0,200}") {
        prop_assert!(CopyCosts::parse(&text).is_err());
    }
}
