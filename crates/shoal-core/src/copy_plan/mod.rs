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

/// Sorts runs by target. Numbers sort in half the time that runs do, and addresses leave room for a place beside them.
fn sort(runs: &mut Vec<Run>) {
    if runs.is_sorted_by_key(|run| run.target) {
        return;
    }
    let fits = runs.len() <= 1 << PLACE_BITS && runs.iter().all(|run| run.target >> (64 - PLACE_BITS) == 0);
    if !fits {
        runs.sort_unstable_by_key(|run| run.target);
        return;
    }
    let mut keys: Vec<u64> =
        (0..).zip(runs.iter()).map(|(place, run): (u64, _)| run.target << PLACE_BITS | place).collect();
    keys.sort_unstable();
    let places = keys.into_iter().map(|key| usize::from((key & 0xFFFF) as u16));
    *runs = places.map(|place| runs[place]).collect();
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
        for run in runs {
            match choose.method(&run) {
                Method::Dma => plan.dma.push(run),
                Method::Batch => plan.batch.push(run),
                // Most of them are one unit already.
                Method::Kernel if run.target % unit_bytes + run.bytes <= unit_bytes => plan.units.push(run),
                Method::Kernel => plan.units.extend(run.units(unit_bytes)),
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
