//! Which pages of a region must have memory so that given KV blocks can be used.
//!
//! Apart from the page table because blocks are of any size and straddle pages, and because somebody else (an engine)
//! chooses the block ids: here is only the counting. A page is wanted while at least one backed block touches it. Keeps
//! I7: a block is backed once; backing it twice or taking it away twice is an error that changes nothing.
//!
//! Memory outlives want: a committed page that no block wants stays committed (*idle*) until
//! [`idle_runs`](BlockBacking::idle_runs) are decommitted.

use crate::bytes::{ByteCount, PAGE_BYTES};
use crate::extent::PageRun;

/// Why a set of block ids was refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BackingError {
    /// There is no such block.
    #[error("block {block} does not exist: there are {blocks} blocks")]
    UnknownBlock {
        /// The id given.
        block: u32,
        /// How many there are.
        blocks: u32,
    },
    /// The block is backed already, or named twice.
    #[error("block {block} is backed already")]
    AlreadyBacked {
        /// The id given.
        block: u32,
    },
    /// The block is not backed, or named twice.
    #[error("block {block} is not backed")]
    NotBacked {
        /// The id given.
        block: u32,
    },
    /// A page that the blocks need has no memory.
    #[error("page {page} has no memory")]
    NotCommitted {
        /// The page.
        page: u64,
    },
    /// A page that is to lose its memory is wanted by blocks, or has none.
    #[error("page {page} is wanted by {wanted} blocks or has no memory")]
    NotIdle {
        /// The page.
        page: u64,
        /// Blocks that want it.
        wanted: u32,
    },
    /// Blocks and pages of a size that cannot be counted.
    #[error("{blocks} blocks of {block_bytes} are not a layout")]
    Layout {
        /// Blocks asked for.
        blocks: u32,
        /// Bytes of each.
        block_bytes: ByteCount,
    },
}

#[derive(Clone, Copy, Debug, Default)]
struct PageState {
    wanted: u32,
    committed: bool,
}

/// Counts which blocks are backed and which pages they want.
#[derive(Clone, Debug)]
pub struct BlockBacking {
    block_bytes: ByteCount,
    backed: Vec<bool>,
    backed_count: u32,
    pages: Vec<PageState>,
    committed_pages: u64,
    wanted_pages: u64,
}

impl BlockBacking {
    /// `blocks` blocks of `block_bytes` each, one after another from the start of a region.
    ///
    /// # Errors
    /// [`BackingError::Layout`] for empty blocks or a size past `u64`.
    pub fn new(block_bytes: ByteCount, blocks: u32) -> Result<Self, BackingError> {
        let wrong = BackingError::Layout { blocks, block_bytes };
        let bytes = block_bytes.0.checked_mul(u64::from(blocks)).ok_or(wrong)?;
        let pages = usize::try_from(bytes.div_ceil(PAGE_BYTES.0)).map_err(|_| wrong)?;
        if block_bytes.is_zero() || pages > u32::MAX as usize {
            return Err(wrong);
        }
        Ok(Self {
            block_bytes,
            backed: vec![false; blocks as usize],
            backed_count: 0,
            pages: vec![PageState::default(); pages],
            committed_pages: 0,
            wanted_pages: 0,
        })
    }

    /// Bytes from the first block's start to the last block's end.
    #[must_use]
    pub fn bytes(&self) -> ByteCount {
        ByteCount(self.block_bytes.0 * self.backed.len() as u64)
    }

    /// How many blocks there are.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        u32::try_from(self.backed.len()).unwrap_or(u32::MAX)
    }

    /// Whether a block is backed.
    #[must_use]
    pub fn is_backed(&self, block: u32) -> bool {
        self.backed.get(block as usize).copied().unwrap_or(false)
    }

    /// Bytes of committed pages.
    #[must_use]
    pub fn backed_bytes(&self) -> ByteCount {
        PageRun { first: 0, count: self.committed_pages }.bytes()
    }

    /// Bytes of blocks that are backed.
    #[must_use]
    pub fn live_bytes(&self) -> ByteCount {
        ByteCount(self.block_bytes.0 * u64::from(self.backed_count))
    }

    /// Bytes of committed pages that no block wants.
    #[must_use]
    pub fn idle_bytes(&self) -> ByteCount {
        PageRun { first: 0, count: self.committed_pages - self.wanted_pages }.bytes()
    }

    /// The runs of pages that must be committed before these blocks can be backed: all or nothing. Changes nothing.
    ///
    /// # Errors
    /// [`BackingError::UnknownBlock`], [`BackingError::AlreadyBacked`].
    pub fn plan_back(&self, blocks: &[u32]) -> Result<Vec<PageRun>, BackingError> {
        self.check_blocks(blocks, false)?;
        let mut pages: Vec<u64> = blocks
            .iter()
            .flat_map(|block| self.pages_of(*block))
            .filter(|page| !self.page(*page).committed)
            .collect();
        pages.sort_unstable();
        pages.dedup();
        Ok(PageRun::from_sorted(pages))
    }

    /// Backs the blocks: their pages are wanted from now on.
    ///
    /// # Errors
    /// As [`plan_back`](Self::plan_back), and [`BackingError::NotCommitted`]; nothing is changed.
    pub fn back(&mut self, blocks: &[u32]) -> Result<(), BackingError> {
        if let Some(run) = self.plan_back(blocks)?.first() {
            return Err(BackingError::NotCommitted { page: run.first });
        }
        for block in blocks {
            self.backed[*block as usize] = true;
            for page in self.pages_of(*block) {
                let page = self.page_mut(page);
                page.wanted += 1;
                if page.wanted == 1 {
                    self.wanted_pages += 1;
                }
            }
        }
        self.backed_count += u32::try_from(blocks.len()).unwrap_or(0);
        self.check_in_debug();
        Ok(())
    }

    /// Takes the blocks away; returns the runs of pages that became idle by it.
    ///
    /// # Errors
    /// [`BackingError::UnknownBlock`], [`BackingError::NotBacked`]; nothing is changed.
    pub fn unback(&mut self, blocks: &[u32]) -> Result<Vec<PageRun>, BackingError> {
        self.check_blocks(blocks, true)?;
        let mut idle = Vec::new();
        for block in blocks {
            self.backed[*block as usize] = false;
            for number in self.pages_of(*block) {
                let page = self.page_mut(number);
                page.wanted -= 1;
                if page.wanted == 0 {
                    self.wanted_pages -= 1;
                    idle.push(number);
                }
            }
        }
        self.backed_count -= u32::try_from(blocks.len()).unwrap_or(0);
        idle.sort_unstable();
        self.check_in_debug();
        Ok(PageRun::from_sorted(idle))
    }

    /// These pages have memory now. Pages that had it already are left as they are.
    ///
    /// # Errors
    /// [`BackingError::NotIdle`] for a page beyond the last; nothing is changed.
    pub fn committed(&mut self, run: PageRun) -> Result<(), BackingError> {
        self.check_pages(run)?;
        for number in run.first..run.end() {
            let page = self.page_mut(number);
            if !page.committed {
                page.committed = true;
                self.committed_pages += 1;
            }
        }
        self.check_in_debug();
        Ok(())
    }

    /// These pages are about to lose their memory: from now on no block is backed by them.
    ///
    /// # Errors
    /// [`BackingError::NotIdle`] if a block wants one, or one has no memory; nothing is changed.
    pub fn decommitted(&mut self, run: PageRun) -> Result<(), BackingError> {
        self.check_pages(run)?;
        for number in run.first..run.end() {
            let page = self.page(number);
            if page.wanted > 0 || !page.committed {
                return Err(BackingError::NotIdle { page: number, wanted: page.wanted });
            }
        }
        for number in run.first..run.end() {
            self.page_mut(number).committed = false;
        }
        self.committed_pages -= run.count;
        self.check_in_debug();
        Ok(())
    }

    /// Whether every page of the run is committed and wanted by no block.
    #[must_use]
    pub fn is_idle(&self, run: PageRun) -> bool {
        self.check_pages(run).is_ok()
            && (run.first..run.end()).all(|page| self.page(page).committed && self.page(page).wanted == 0)
    }

    /// All runs of committed pages that no block wants, by address.
    #[must_use]
    pub fn idle_runs(&self) -> Vec<PageRun> {
        let idle = |page: &&(u64, &PageState)| page.1.committed && page.1.wanted == 0;
        let numbered: Vec<(u64, &PageState)> = (0..).zip(&self.pages).collect();
        PageRun::from_sorted(numbered.iter().filter(idle).map(|(number, _)| *number))
    }

    /// Says what is wrong with the counts, if anything is.
    ///
    /// # Errors
    /// A sentence that names the first contradiction.
    pub fn check_invariants(&self) -> Result<(), String> {
        let mut wanted = vec![0_u32; self.pages.len()];
        for block in 0..self.blocks() {
            if self.is_backed(block) {
                for page in self.pages_of(block) {
                    wanted[usize::try_from(page).unwrap_or(usize::MAX)] += 1;
                }
            }
        }
        for (number, (page, wanted)) in self.pages.iter().zip(&wanted).enumerate() {
            if page.wanted != *wanted {
                return Err(format!("page {number} counts {} blocks, {wanted} want it (I7)", page.wanted));
            }
            if page.wanted > 0 && !page.committed {
                return Err(format!("page {number} is wanted but has no memory"));
            }
        }
        let committed = self.pages.iter().filter(|page| page.committed).count() as u64;
        let wanted = self.pages.iter().filter(|page| page.wanted > 0).count() as u64;
        let backed = self.backed.iter().filter(|backed| **backed).count() as u64;
        let counted = (self.committed_pages, self.wanted_pages, u64::from(self.backed_count));
        if counted != (committed, wanted, backed) {
            return Err(format!("counted {counted:?}, are {:?}", (committed, wanted, backed)));
        }
        Ok(())
    }

    fn check_in_debug(&self) {
        if cfg!(debug_assertions)
            && let Err(wrong) = self.check_invariants()
        {
            unreachable!("{wrong}");
        }
    }

    fn check_blocks(&self, blocks: &[u32], backed: bool) -> Result<(), BackingError> {
        let mut seen = std::collections::HashSet::with_capacity(blocks.len());
        for block in blocks {
            let Some(state) = self.backed.get(*block as usize) else {
                return Err(BackingError::UnknownBlock { block: *block, blocks: self.blocks() });
            };
            if *state != backed || !seen.insert(*block) {
                let block = *block;
                return Err(if backed {
                    BackingError::NotBacked { block }
                } else {
                    BackingError::AlreadyBacked { block }
                });
            }
        }
        Ok(())
    }

    fn check_pages(&self, run: PageRun) -> Result<(), BackingError> {
        if run.first.checked_add(run.count).is_none_or(|end| end > self.pages.len() as u64) {
            return Err(BackingError::NotIdle { page: run.first, wanted: 0 });
        }
        Ok(())
    }

    const fn pages_of(&self, block: u32) -> core::ops::Range<u64> {
        let run = PageRun::covering(ByteCount(self.block_bytes.0 * block as u64), self.block_bytes);
        run.first..run.end()
    }

    fn page(&self, number: u64) -> PageState {
        usize::try_from(number).ok().and_then(|number| self.pages.get(number)).copied().unwrap_or_default()
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "there are at most u32::MAX pages, checked when made"
    )]
    fn page_mut(&mut self, number: u64) -> &mut PageState {
        &mut self.pages[number as usize]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn blocks_that_share_a_page_keep_it() {
        let mut backing = BlockBacking::new(ByteCount(PAGE_BYTES.0 * 3 / 4), 8).expect("a layout");
        assert_eq!(backing.plan_back(&[1, 0]), Ok(vec![PageRun { first: 0, count: 2 }]));
        assert_eq!(backing.back(&[0]), Err(BackingError::NotCommitted { page: 0 }));
        backing.committed(PageRun { first: 0, count: 2 }).expect("in range");
        backing.back(&[1, 0]).expect("committed");
        assert_eq!(backing.unback(&[0]), Ok(vec![]), "block 1 straddles both pages");
        assert_eq!(backing.unback(&[0]), Err(BackingError::NotBacked { block: 0 }));
        assert_eq!(backing.unback(&[1, 1]), Err(BackingError::NotBacked { block: 1 }));
        assert_eq!(backing.back(&[1]), Err(BackingError::AlreadyBacked { block: 1 }));
        assert_eq!(backing.back(&[0, 8]), Err(BackingError::UnknownBlock { block: 8, blocks: 8 }));
        assert_eq!(backing.unback(&[1]), Ok(vec![PageRun { first: 0, count: 2 }]));
        assert_eq!(backing.idle_bytes(), ByteCount::mib(4));
        backing.decommitted(PageRun { first: 1, count: 1 }).expect("idle");
        assert_eq!(
            backing.decommitted(PageRun { first: 0, count: 2 }),
            Err(BackingError::NotIdle { page: 1, wanted: 0 })
        );
        assert_eq!(backing.idle_runs(), [PageRun { first: 0, count: 1 }]);
    }

    #[test]
    fn sizes_that_are_no_layout_are_refused() {
        assert!(BlockBacking::new(ByteCount::ZERO, 4).is_err());
        assert!(BlockBacking::new(ByteCount(u64::MAX), 2).is_err());
        assert!(BlockBacking::new(ByteCount(1), 0).is_ok_and(|none| none.bytes().is_zero()));
    }

    proptest! {
        #[test]
        fn agrees_with_plain_sets(
            block_kib in 1_u64..5000,
            ops in proptest::collection::vec((0_u8..4, proptest::collection::vec(0_u32..13, 0..5)), 1..50),
        ) {
            let block_bytes = ByteCount(block_kib << 10);
            let mut backing = BlockBacking::new(block_bytes, 12).expect("a layout");
            let (mut blocks, mut pages) = (BTreeSet::new(), BTreeSet::new());
            for (kind, ids) in ops {
                let distinct = ids.iter().collect::<BTreeSet<_>>().len() == ids.len();
                match kind {
                    0 => {
                        let legal = distinct && ids.iter().all(|id| *id < 12 && !blocks.contains(id));
                        let plan = backing.plan_back(&ids);
                        prop_assert_eq!(plan.is_ok(), legal);
                        for run in plan.unwrap_or_default() {
                            for page in run.first..run.end() {
                                prop_assert!(pages.insert(page), "page {} planned although committed", page);
                            }
                            backing.committed(run).expect("in range");
                        }
                        prop_assert_eq!(backing.back(&ids).is_ok(), legal);
                        if legal {
                            blocks.extend(ids);
                        }
                    }
                    1 => {
                        let legal = distinct && ids.iter().all(|id| blocks.contains(id));
                        prop_assert_eq!(backing.unback(&ids).is_ok(), legal);
                        if legal {
                            blocks.retain(|block| !ids.contains(block));
                        }
                    }
                    2 => if let Some(run) = backing.idle_runs().first() {
                        backing.decommitted(*run).expect("idle");
                        pages.retain(|page| *page < run.first || *page >= run.end());
                    },
                    _ => {
                        let run = PageRun { first: u64::from(ids.first().copied().unwrap_or(0)), count: 2 };
                        let was = (backing.committed_pages, backing.wanted_pages);
                        let idle = backing.is_idle(run);
                        prop_assert_eq!(backing.decommitted(run).is_ok(), idle);
                        if idle {
                            pages.retain(|page| *page < run.first || *page >= run.end());
                        } else {
                            prop_assert_eq!(was, (backing.committed_pages, backing.wanted_pages));
                        }
                    }
                }
                let mut wanted: BTreeMap<u64, u32> = BTreeMap::new();
                for block in &blocks {
                    let (from, to) = (u64::from(*block) * block_bytes.0, (u64::from(*block) + 1) * block_bytes.0);
                    for page in from / PAGE_BYTES.0..to.div_ceil(PAGE_BYTES.0) {
                        *wanted.entry(page).or_default() += 1;
                    }
                }
                prop_assert!(wanted.keys().all(|page| pages.contains(page)), "a wanted page lost its memory");
                prop_assert_eq!(backing.backed_bytes().0, pages.len() as u64 * PAGE_BYTES.0);
                prop_assert_eq!(backing.live_bytes().0, blocks.len() as u64 * block_bytes.0);
                prop_assert_eq!(backing.idle_bytes().0, (pages.len() - wanted.len()) as u64 * PAGE_BYTES.0);
            }
        }
    }
}
