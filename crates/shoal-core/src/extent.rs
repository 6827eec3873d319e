//! Extents: power-of-two runs of pages, and the rule that picks their sizes.
//!
//! Apart because two questions meet only here: the driver's price is per frame, whatever its size, so extents want to
//! be large; giving memory up happens by whole extents, so they want to be small. The rule settles it with numbers.
//! Keeps I4 (an extent is backed by exactly one frame of its own length). Where the bytes of an extent lie is the
//! subject of [`crate::residency`].

use crate::bytes::{ByteCount, PAGE_BYTES};

/// The longest extent any rule makes (256 MiB).
pub const EXTENT_PAGES_MAX: u64 = ByteCount::mib(256).0 / PAGE_BYTES.0;
const _: () = assert!(EXTENT_PAGES_MAX.is_power_of_two());

/// A run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// The first page.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl PageRun {
    /// The page after the last.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.first + self.count
    }

    /// The smallest run of whole pages that covers `bytes` bytes from `offset`; empty for no bytes.
    #[must_use]
    pub const fn covering(offset: ByteCount, bytes: ByteCount) -> Self {
        if bytes.0 == 0 {
            return Self { first: offset.0 / PAGE_BYTES.0, count: 0 };
        }
        let first = offset.0 / PAGE_BYTES.0;
        Self { first, count: (offset.0 + bytes.0).div_ceil(PAGE_BYTES.0) - first }
    }

    /// Its length in bytes.
    #[must_use]
    pub const fn bytes(self) -> ByteCount {
        ByteCount(self.count * PAGE_BYTES.0)
    }

    /// Sorted pages as runs.
    ///
    /// # Panics
    /// In debug builds, if `pages` is not strictly ascending (a caller's bug).
    #[must_use]
    pub fn from_sorted(pages: impl IntoIterator<Item = u64>) -> Vec<Self> {
        let mut runs: Vec<Self> = Vec::new();
        for page in pages {
            match runs.last_mut() {
                Some(run) if run.end() == page => run.count += 1,
                Some(run) => {
                    debug_assert!(run.end() < page, "pages not ascending: {page} after {run:?}");
                    runs.push(Self { first: page, count: 1 });
                }
                None => runs.push(Self { first: page, count: 1 }),
            }
        }
        runs
    }
}

/// A power-of-two run of pages backed by exactly one frame: the unit of mapping, of eviction and of copying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    first_page: u64,
    pages: u64,
}

impl Extent {
    /// An extent of `pages` pages from `first_page`; `None` unless `pages` is a power of two and at most
    /// [`EXTENT_PAGES_MAX`].
    #[must_use]
    pub const fn new(first_page: u64, pages: u64) -> Option<Self> {
        if pages.is_power_of_two() && pages <= EXTENT_PAGES_MAX {
            Some(Self { first_page, pages })
        } else {
            None
        }
    }

    /// Its pages.
    #[must_use]
    pub const fn run(self) -> PageRun {
        PageRun { first: self.first_page, count: self.pages }
    }

    /// Where it starts in its region, in bytes.
    #[must_use]
    pub const fn offset(self) -> ByteCount {
        ByteCount(self.first_page * PAGE_BYTES.0)
    }

    /// Its length in bytes.
    #[must_use]
    pub const fn bytes(self) -> ByteCount {
        ByteCount(self.pages * PAGE_BYTES.0)
    }
}

/// Picks the sizes of extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentRule {
    /// Shortest extent in pages (a power of two).
    pub pages_min: u64,
    /// Longest extent in pages (a power of two, at most [`EXTENT_PAGES_MAX`]).
    pub pages_max: u64,
    /// A region is cut into at least this many pieces where its pages allow, so that a part can be given up.
    pub pieces_min: u64,
}

impl Default for ExtentRule {
    fn default() -> Self {
        Self { pages_min: 1, pages_max: EXTENT_PAGES_MAX, pieces_min: 16 }
    }
}

impl ExtentRule {
    /// The longest extent in a region of `region_pages` pages: the largest power of two that still leaves
    /// `pieces_min` pieces, within the rule's bounds.
    #[must_use]
    pub fn pages_cap(&self, region_pages: u64) -> u64 {
        let wanted = (region_pages / self.pieces_min.max(1)).max(1);
        let floor = 1 << wanted.ilog2();
        floor.min(self.pages_max.min(EXTENT_PAGES_MAX)).max(self.pages_min)
    }

    /// Cuts a whole region: equal extents of the cap, then a tail of falling powers of two.
    #[must_use]
    pub fn carve(&self, region_pages: u64) -> Vec<Extent> {
        Self::cut(PageRun { first: 0, count: region_pages }, self.pages_cap(region_pages))
    }

    /// Cuts pages that are wanted now, in a region of `region_pages` pages. Who asks for many at once gets long
    /// extents, who asks for few gets short ones, and none is longer than the region's cap.
    #[must_use]
    pub fn grow(&self, wanted: PageRun, region_pages: u64) -> Vec<Extent> {
        Self::cut(wanted, self.pages_cap(region_pages))
    }

    fn cut(run: PageRun, pages_cap: u64) -> Vec<Extent> {
        let mut extents = Vec::with_capacity(usize::try_from(run.count / pages_cap).unwrap_or(0) + 8);
        let (mut first_page, mut left) = (run.first, run.count);
        while left > 0 {
            let pages = pages_cap.min(1 << left.ilog2());
            extents.push(Extent { first_page, pages });
            first_page += pages;
            left -= pages;
        }
        extents
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sizes(extents: &[Extent]) -> Vec<u64> {
        extents.iter().map(|extent| extent.run().count).collect()
    }

    #[test]
    fn small_regions_stay_divisible_and_large_ones_use_long_extents() {
        let rule = ExtentRule::default();
        assert_eq!(sizes(&rule.carve(3)), [1, 1, 1]);
        assert_eq!(sizes(&rule.carve(16)), [1; 16]);
        assert_eq!(rule.carve(64).len(), 16); // 128 MiB: 16 pieces of 8 MiB
        assert_eq!(sizes(&rule.carve(67)), [vec![4; 16], vec![2, 1]].concat());
        let sixteen_gib = rule.carve(ByteCount::gib(16).pages());
        assert_eq!(sixteen_gib.len(), 64);
        assert_eq!(sixteen_gib[0].bytes(), ByteCount::mib(256));
        assert!(rule.carve(0).is_empty());
    }

    #[test]
    fn fast_growth_takes_longer_extents() {
        let rule = ExtentRule::default();
        let region_pages = 1024;
        assert_eq!(sizes(&rule.grow(PageRun { first: 5, count: 1 }, region_pages)), [1]);
        assert_eq!(sizes(&rule.grow(PageRun { first: 5, count: 7 }, region_pages)), [4, 2, 1]);
        assert_eq!(sizes(&rule.grow(PageRun { first: 0, count: 200 }, region_pages)), [64, 64, 64, 8]);
    }

    proptest! {
        #[test]
        fn extents_tile_what_was_asked(first in 0_u64..9999, count in 0_u64..9999, region in 1_u64..99_999) {
            let mut next = first;
            for extent in ExtentRule::default().grow(PageRun { first, count }, region) {
                let run = extent.run();
                prop_assert_eq!(run.first, next);
                prop_assert!(run.count.is_power_of_two() && run.count <= EXTENT_PAGES_MAX);
                next = run.end();
            }
            prop_assert_eq!(next, first + count);
            let pieces = ExtentRule::default().carve(region).len() as u64;
            prop_assert!(pieces >= 16.min(region), "{pieces} pieces of {region} pages");
        }
    }
}
