//! The order in which the pages of a region are used, where it is not that of their addresses.
//!
//! Apart because it is a wish and no fact: it decides what a restore brings first and what an eviction takes last, and
//! whatever it says, every extent comes and goes.

use crate::extent::{Extent, PageRun};

const UNUSED: u32 = u32::MAX;

/// Page -> position of its first use. Empty: by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UseOrder {
    ranks: Vec<u32>,
}

impl UseOrder {
    /// The order in which `runs` come; what is in none of them comes last. Runs past the region's end are cut.
    #[must_use]
    pub fn new(region_pages: u64, runs: impl IntoIterator<Item = PageRun>) -> Self {
        let mut ranks = Vec::new();
        for (position, run) in runs.into_iter().enumerate() {
            if ranks.is_empty() {
                ranks = vec![UNUSED; usize::try_from(region_pages).unwrap_or(0)];
            }
            let position = u32::try_from(position).unwrap_or(UNUSED);
            let (first, end) = (run.first.min(region_pages), run.end().min(region_pages));
            for page in first..end {
                if let Some(rank) = usize::try_from(page).ok().and_then(|page| ranks.get_mut(page)) {
                    *rank = position.min(*rank);
                }
            }
        }
        Self { ranks }
    }

    /// True if it says nothing: by address.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranks.is_empty()
    }

    /// When an extent is used first: earlier ranks come before later ones.
    #[must_use]
    pub fn rank(&self, extent: Extent) -> u32 {
        let run = extent.run();
        let pages = run.first..run.end();
        pages.filter_map(|page| self.ranks.get(usize::try_from(page).ok()?)).copied().min().unwrap_or(UNUSED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_is_as_early_as_its_earliest_page() {
        let run = |first, count| PageRun { first, count };
        let order = UseOrder::new(8, [run(6, 1), run(0, 2), run(6, 9)]);
        let rank = |first, pages| order.rank(Extent::new(first, pages).expect("a power of two"));
        assert_eq!((rank(6, 1), rank(0, 1), rank(7, 1)), (0, 1, 2));
        assert_eq!((rank(4, 4), rank(2, 2)), (0, UNUSED));
        assert!(UseOrder::new(8, []).is_empty() && !order.is_empty());
    }
}
