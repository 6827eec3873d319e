//! How a budget that nobody gives back is divided among those who need parts of it.
//!
//! Apart from [`crate::lease`] because host memory for copies is divided once, when a worker starts, and stays with it:
//! there is nothing to reclaim and nothing to decide later. The shares are max-min fair (D. Bertsekas and R. Gallager,
//! "Data Networks", 1987, section 6.5): whoever needs little gets it, and the others get as much as each other.
//!
//! Keeps I1: the sum of shares is at most the budget.

use crate::bytes::ByteCount;

/// The shares of `budget`, one for each of `needs`, in their order. Who does not know its need (`None`) gets as much as
/// whoever gets most. What is left when all have what they need is divided evenly among all.
#[must_use]
pub fn fair_shares(budget: ByteCount, needs: &[Option<ByteCount>]) -> Vec<ByteCount> {
    let mut order: Vec<usize> = (0..needs.len()).collect();
    order.sort_by_key(|place| needs[*place].map_or((true, 0), |need| (false, need.0)));
    let mut shares = vec![ByteCount::ZERO; needs.len()];
    let mut left = budget.0;
    for (done, place) in order.iter().enumerate() {
        let even = left / (needs.len() - done) as u64;
        let share = needs[*place].map_or(even, |need| need.0.min(even));
        shares[*place] = ByteCount(share);
        left -= share;
    }
    // Only where all needs are known and met is more left than a division's rest.
    let rest = left.checked_div(needs.len() as u64).unwrap_or(0);
    shares.iter().map(|share| *share + ByteCount(rest)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Needs in MiB; 0 stands for one that is not known.
    fn shares(budget: u64, needs: &[u64]) -> Vec<u64> {
        let needs: Vec<_> =
            needs.iter().map(|need| Some(ByteCount::mib(*need)).filter(|need| !need.is_zero())).collect();
        fair_shares(ByteCount::mib(budget), &needs).iter().map(|share| share.0 >> 20).collect()
    }

    #[test]
    fn small_needs_are_met_and_large_ones_get_the_rest() {
        assert_eq!(shares(768, &[514, 88, 4]), [568, 142, 58], "what is left is for all");
        assert_eq!(shares(400, &[514, 88, 4]), [308, 88, 4]);
        assert_eq!(shares(400, &[514, 400, 4]), [198, 198, 4]);
        assert_eq!(shares(300, &[0, 20, 0]), [140, 20, 140]);
        assert_eq!(shares(90, &[0, 500, 0]), [30, 30, 30]);
        assert_eq!(shares(90, &[]), [0u64; 0]);
    }

    proptest! {
        #[test]
        fn shares_are_within_the_budget_and_fair(
            budget in 0..1u64 << 50,
            needs in proptest::collection::vec(proptest::option::of(0..1u64 << 50), 1..12),
        ) {
            let needs: Vec<_> = needs.into_iter().map(|need| need.map(ByteCount)).collect();
            let shares = fair_shares(ByteCount(budget), &needs);
            let sum: u64 = shares.iter().map(|share| share.0).sum();
            prop_assert!(sum <= budget);
            prop_assert!(budget - sum < 2 * needs.len() as u64, "{} of {} lie idle", budget - sum, budget);
            let most = shares.iter().max().copied().unwrap_or_default();
            for (share, need) in shares.iter().zip(&needs) {
                let is_met = need.is_some_and(|need| *share >= need);
                // Whoever lacks something has as much as anybody, but for the rest of a division.
                prop_assert!(is_met || share.0 + needs.len() as u64 >= most.0, "{share} of {need:?}, and {most}");
            }
        }
    }
}
