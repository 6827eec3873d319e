//! How a list of copies is carried out: sorted, neighbours joined, and each run given to the method that is cheapest for
//! its size on this device.
//!
//! Apart because it is arithmetic on addresses: the device carries a plan out, and a model of bytes can check one. What
//! the methods cost is measured by the device ([`costs`]); nothing here assumes that one of them is fast.
//!
//! The copies of a list have no order among them, so no target of one may overlap another's target or source.

pub mod costs;

use costs::{Costs, Method};

/// Both ends of what a kernel copies lie alike in a unit of this many bytes.
pub const WIDE_BYTES: u64 = 16;

/// One copy, by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// First byte read.
    pub source: u64,
    /// First byte written.
    pub target: u64,
    /// How many.
    pub bytes: u64,
    /// Runs are joined only where this is equal: neighbours by address may belong to different things, and the driver
    /// refuses a copy across two pieces of page-locked memory.
    pub seam: u64,
}

impl Run {
    const fn joins(&self, next: &Self) -> bool {
        self.seam == next.seam
            && self.target + self.bytes == next.target
            && self.source + self.bytes == next.source
    }

    /// Whether a kernel can copy it in wide steps.
    #[must_use]
    pub const fn is_wide(&self) -> bool {
        (self.source ^ self.target).is_multiple_of(WIDE_BYTES)
    }

    /// Whether every method takes as long for another: the runs of a list are mostly alike.
    #[must_use]
    pub const fn costs_as(&self, other: &Self) -> bool {
        self.bytes == other.bytes && self.is_wide() == other.is_wide()
    }

    /// Its parts: each ends where the target is a multiple of `unit_bytes`, or with the run.
    pub fn units(self, unit_bytes: u64) -> impl Iterator<Item = Self> {
        let mut left = self;
        core::iter::from_fn(move || {
            let bytes = (unit_bytes - left.target % unit_bytes).min(left.bytes);
            let unit = Self { bytes, ..left };
            left.source += bytes;
            left.target += bytes;
            left.bytes -= bytes;
            (bytes > 0).then_some(unit)
        })
    }
}

/// Bits of a place in a list that is sorted by one number each.
const PLACE_BITS: u32 = 16;
/// Bits of a target that one pass of a sort by digits looks at.
const DIGIT_BITS: u32 = 11;
/// So many passes still take less time than comparing does, where there are so many runs.
const PASSES_MAX: u32 = 3;
const DIGITS_COUNT_MIN: usize = 256;

/// Sorts runs by target. Numbers sort in half the time that runs do, and what tells targets apart leaves room for a place
/// beside it: they lie in few reservations, and begin at multiples of a block. So few digits are enough, and a pass over
/// all runs for each of them takes a fourth of the time that comparing takes.
fn sort(runs: &mut Vec<Run>) {
    if runs.is_sorted_by_key(|run| run.target) {
        return;
    }
    let first = runs.iter().map(|run| run.target).min().unwrap_or(0);
    let set = runs.iter().fold(0, |set, run| set | (run.target - first));
    let shift = set.trailing_zeros();
    let bits = 64 - (set >> shift).leading_zeros();
    if runs.len() > 1 << PLACE_BITS || bits > 64 - PLACE_BITS {
        runs.sort_unstable_by_key(|run| run.target);
        return;
    }
    let key = |(place, run): (u64, &Run)| ((run.target - first) >> shift) << PLACE_BITS | place;
    let mut keys: Vec<u64> = (0..).zip(runs.iter()).map(key).collect();
    let passes = bits.div_ceil(DIGIT_BITS);
    if runs.len() >= DIGITS_COUNT_MIN && passes <= PASSES_MAX {
        sort_by_digits(&mut keys, passes);
    } else {
        keys.sort_unstable();
    }
    let places = keys.into_iter().map(|key| usize::from((key & 0xFFFF) as u16));
    *runs = places.map(|place| runs[place]).collect();
}

/// Sorts by what stands above the place, the lowest digit first; each pass keeps the order of the one before.
fn sort_by_digits(keys: &mut Vec<u64>, passes: u32) {
    const DIGITS: usize = 1 << DIGIT_BITS;
    let mut sorted = vec![0; keys.len()];
    for pass in 0..passes {
        let digit = |key: u64| usize::from(((key >> (PLACE_BITS + pass * DIGIT_BITS)) & 0x7FF) as u16);
        let mut ends = [0_u32; DIGITS];
        for key in keys.iter() {
            ends[digit(*key)] += 1;
        }
        let mut sum = 0;
        for end in &mut ends {
            sum += *end;
            *end = sum;
        }
        // From the last on, so that equal digits keep their order.
        for key in keys.iter().rev() {
            let end = &mut ends[digit(*key)];
            *end -= 1;
            sorted[*end as usize] = *key;
        }
        core::mem::swap(keys, &mut sorted);
    }
}

/// Sorts runs by target, joins neighbours and drops what is empty.
pub fn coalesce(runs: &mut Vec<Run>) {
    runs.retain(|run| run.bytes > 0);
    sort(runs);
    runs.dedup_by(|next, run| {
        let joins = run.joins(next);
        if joins {
            run.bytes += next.bytes;
        }
        joins
    });
}

/// What to do for a list of copies in one direction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyPlan {
    /// One by one, by the copy engine.
    pub dma: Vec<Run>,
    /// By the copy engine, handed over together.
    pub batch: Vec<Run>,
    /// By a kernel: runs cut into units that one warp copies.
    pub units: Vec<Run>,
}

impl CopyPlan {
    /// Plans a list. `unit_bytes` (a power of two) is the longest unit of the kernel's.
    #[must_use]
    pub fn new(mut runs: Vec<Run>, costs: &Costs, unit_bytes: u64) -> Self {
        coalesce(&mut runs);
        let methods = costs.best_methods(&runs);
        let mut plan = Self::default();
        if methods.is_only(Method::Dma) {
            plan.dma = runs;
            return plan;
        }
        let mut choose = costs.chooser(methods);
        for alike in runs.chunk_by(Run::costs_as) {
            let Some(first) = alike.first() else { continue };
            match choose.method(first) {
                Method::Dma => plan.dma.extend_from_slice(alike),
                Method::Batch => plan.batch.extend_from_slice(alike),
                Method::Kernel => {
                    plan.units.reserve(alike.len());
                    for run in alike {
                        // Most of them are one unit already.
                        if run.target % unit_bytes + run.bytes <= unit_bytes {
                            plan.units.push(*run);
                        } else {
                            plan.units.extend(run.units(unit_bytes));
                        }
                    }
                }
            }
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn run(source: u64, target: u64, bytes: u64) -> Run {
        Run { source, target, bytes, seam: 0 }
    }

    #[test]
    fn neighbours_at_both_ends_join_whatever_their_order() {
        let mut runs = vec![run(300, 1300, 50), run(100, 1100, 100), run(0, 0, 0), run(200, 1200, 100)];
        coalesce(&mut runs);
        assert_eq!(runs, [run(100, 1100, 250)]);
    }

    #[test]
    fn addresses_of_any_size_are_sorted() {
        let high = 1 << 63;
        let mut runs = vec![run(300, high + 200, 100), run(100, 7, 1), run(200, high + 100, 100)];
        coalesce(&mut runs);
        assert_eq!(runs, [run(100, 7, 1), run(200, high + 100, 200)]);
    }

    #[test]
    fn many_are_sorted_by_their_digits_as_by_comparing() {
        let mut state = 7_u64;
        for (count, block, places) in [
            (255, 4096, 1 << 18),
            (8192, 4096, 1 << 18),
            (3000, 1, 1 << 33),
            (3000, 1 << 20, 1 << 36),
            (300, 24, 5),
        ] {
            let mut random = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 20) % places
            };
            let mut runs: Vec<Run> = (0..count)
                .map(|source| Run { seam: source, ..run(source, (1 << 40) + random() * block, 1) })
                .collect();
            let mut expected = runs.clone();
            expected.sort_by_key(|run| run.target);
            sort(&mut runs);
            let targets = |runs: &[Run]| runs.iter().map(|run| run.target).collect::<Vec<_>>();
            assert_eq!(targets(&runs), targets(&expected), "{count} of {block}");
            runs.sort_by_key(|run| (run.target, run.source));
            expected.sort_by_key(|run| (run.target, run.source));
            assert_eq!(runs, expected, "one was lost or doubled");
        }
    }

    #[test]
    fn neighbours_at_one_end_only_do_not_join() {
        let apart = vec![run(100, 1000, 100), run(200, 1101, 100), run(301, 1201, 100)];
        let mut runs = apart.clone();
        coalesce(&mut runs);
        assert_eq!(runs, apart);
    }

    #[test]
    fn a_seam_keeps_neighbours_apart() {
        let mut runs = vec![run(100, 1000, 100), Run { seam: 1, ..run(200, 1100, 100) }];
        coalesce(&mut runs);
        assert_eq!(runs.len(), 2);
    }

    #[test]
    fn units_end_where_the_target_is_aligned() {
        let parts: Vec<_> = run(40, 1000, 100).units(64).collect();
        assert_eq!(parts, [run(40, 1000, 24), run(64, 1024, 64), run(128, 1088, 12)]);
    }
}
