//! [`KvState`]: all that a cache knows, and every decision about it, without a byte of memory.
//!
//! Apart from [`super::blocks`] because here groups meet: they share one limit and one reservation. Whoever maps asks
//! what should come ([`plan_growth`](KvState::plan_growth), [`plan_spare`](KvState::plan_spare)) and go
//! ([`plan_release`](KvState::plan_release)), does it, and says so. Time is an argument.

use core::time::Duration;

use super::blocks::{BlockError, BlockFigures, BlockPool, Freed, GranuleError};
use super::demand::Demand;
use super::ids::BlockId;
use super::layout::{CacheLayout, GroupLayout};
use super::limit::{Limit, LimitError};
use super::prefix::PrefixError;
use super::reuse::{Reuse, ReuseOptions};
use crate::bytes::ByteCount;
use crate::extent::PageRun;

/// Why a call was refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KvError {
    /// There is no such group.
    #[error("group {group} does not exist: there are {groups}")]
    UnknownGroup {
        /// The number given.
        group: usize,
        /// How many there are.
        groups: usize,
    },
    /// Wrong block ids.
    #[error(transparent)]
    Blocks(#[from] BlockError),
    /// A granule is not where it should be: a bug of whoever maps.
    #[error(transparent)]
    Granule(#[from] GranuleError),
    /// A limit that does not hold.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// Blocks that cannot be sealed or looked for like this.
    #[error(transparent)]
    Prefix(#[from] PrefixError),
    /// What blocks hold is not remembered in this cache.
    #[error(
        "this cache finds nothing again: it was made without an eviction policy, or no group's blocks stand for tokens"
    )]
    NoReuse,
    /// Prefixes cannot be found where a step along the sequence is not one block of each group.
    #[error(
        "blocks of {first} and of {other} tokens in one cache: prefixes are found only where the blocks of all groups stand for equally many; give the groups the same block_tokens, or make the cache without an eviction policy"
    )]
    MixedTokens {
        /// Tokens of a block of the first group that has any.
        first: u32,
        /// Tokens of a block of another.
        other: u32,
    },
    /// Nobody looks for writes to blocks without an owner in this cache.
    #[error("this cache was not made in debug mode")]
    NoDebug,
}

/// Names one granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GranuleId {
    /// Its group.
    pub group: usize,
    /// Its slot there.
    pub slot: u32,
}

/// The moments up to which granules are looked at, one a group ([`KvState::clocks`]).
pub type Clocks = Vec<u64>;

#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) pool: BlockPool,
    pub(super) demand: Demand,
    pub(super) block_bytes: u64,
    pub(super) unit_bytes: u64,
    /// Free and mapped blocks to have.
    spare: u32,
    /// Below so many available blocks, and above so many empty units, somebody should look.
    low: u32,
    high_units: u32,
}

impl Group {
    /// Units of granules in which nothing is owned.
    pub(super) fn unowned_units(&self) -> u64 {
        let figures = self.pool.figures();
        let cached = if figures.cached > 0 { self.pool.evictable() } else { Vec::new() };
        let cached = cached.iter().filter_map(|(slot, _)| self.pool.units_of(*slot));
        u64::from(figures.units_empty) + cached.map(|(_, units)| u64::from(units)).sum::<u64>()
    }
}

/// One group's figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupUsage {
    /// How many blocks are what.
    pub blocks: BlockFigures,
    /// Free blocks that are kept mapped for what is expected.
    pub spare_target: u32,
    /// Its memory, mapped or on its way.
    pub mapped: ByteCount,
}

/// Bytes of a whole cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvUsage {
    /// The most memory it may have now.
    pub limit: ByteCount,
    /// The revision of that.
    pub revision: u64,
    /// The most a limit can be.
    pub reservation: ByteCount,
    /// Memory that is mapped or on its way; above the limit until blocks in use become free.
    pub mapped: ByteCount,
    /// Bytes of blocks that somebody owns.
    pub live: ByteCount,
    /// Bytes of blocks that nobody owns and whose content can be found again.
    pub cached: ByteCount,
    /// Memory in which nothing lies.
    pub empty: ByteCount,
    /// By group.
    pub groups: Vec<GroupUsage>,
}

/// See the module's text.
#[derive(Debug)]
pub struct KvState {
    layout: CacheLayout,
    pub(super) groups: Vec<Group>,
    limit: Limit,
    /// The most that is kept ahead of need by what demand foretells, of each group.
    spare_bytes_max: ByteCount,
    /// What sealed blocks hold.
    pub(super) reuse: Option<Reuse>,
    /// Blocks that a free leaves cached.
    pub(super) scratch: Vec<u32>,
}

impl KvState {
    /// A cache without memory. It keeps at most `spare_bytes_max` mapped ahead of need, and what is [hinted](Self::hint); with
    /// `reuse`, what blocks hold can be found again ([`seal`](Self::seal)).
    ///
    /// # Errors
    /// [`KvError::MixedTokens`] for `reuse` where the groups' blocks stand for different numbers of tokens, [`KvError::Prefix`] for
    /// options that make no index.
    pub fn new(
        layout: CacheLayout,
        spare_bytes_max: ByteCount,
        reuse: Option<ReuseOptions>,
    ) -> Result<Self, KvError> {
        let reuse = reuse.map(|options| Reuse::new(&layout, options)).transpose()?.flatten();
        let group = |layout: &GroupLayout| Group {
            pool: BlockPool::new(layout),
            demand: Demand::default(),
            block_bytes: layout.block_bytes().0,
            unit_bytes: layout.unit_bytes().0,
            spare: 0,
            low: 0,
            high_units: 0,
        };
        let groups = layout.groups().iter().map(group).collect();
        let limit = Limit::new(layout.bytes());
        Ok(Self { limit, layout, groups, spare_bytes_max, reuse, scratch: Vec::new() })
    }

    /// Where everything lies.
    #[must_use]
    pub const fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// The blocks of one group.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn pool(&self, group: usize) -> Result<&BlockPool, KvError> {
        let groups = self.groups.len();
        self.groups.get(group).map(|group| &group.pool).ok_or(KvError::UnknownGroup { group, groups })
    }

    #[inline]
    pub(super) fn group_mut(&mut self, group: usize) -> Result<&mut Group, KvError> {
        let groups = self.groups.len();
        self.groups.get_mut(group).ok_or(KvError::UnknownGroup { group, groups })
    }

    /// Fills `ids` with blocks of a group. False, and nothing is changed: so many cannot be had now, because fewer have
    /// memory or because of the limit.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    #[inline]
    pub fn alloc<T: BlockId>(&mut self, group: usize, ids: &mut [T]) -> Result<bool, KvError> {
        let owned = self.owned_bytes();
        let limit = self.limit.bytes().0;
        let group = self.group_mut(group)?;
        if owned + group.block_bytes * ids.len() as u64 > limit || !group.pool.alloc(ids) {
            return Ok(false);
        }
        group.demand.rose_to(group.pool.used());
        Ok(true)
    }

    /// Takes one owner from each of these blocks. What nobody owns any more is free, or cached if it was sealed: give the
    /// blocks of a sequence in its order, so that its end is evicted before its beginning.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`], [`KvError::Blocks`]; nothing is changed.
    #[inline]
    pub fn free<T: BlockId>(&mut self, group: usize, ids: &[T]) -> Result<Freed, KvError> {
        let mut cached = core::mem::take(&mut self.scratch);
        let at = group;
        let group = self.group_mut(group)?;
        let freed = group.pool.free(ids, |block| cached.push(block));
        group.demand.fell_to(group.pool.used());
        self.scratch = cached;
        if !self.scratch.is_empty() {
            self.released(at);
        }
        Ok(freed?)
    }

    /// One owner more for each of these blocks.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`], [`KvError::Blocks`]; nothing is changed.
    pub fn fork<T: BlockId>(&mut self, group: usize, ids: &[T]) -> Result<(), KvError> {
        Ok(self.group_mut(group)?.pool.fork(ids)?)
    }

    /// Whether somebody should look at what is mapped: too little is free for what is expected, or too much.
    #[inline]
    #[must_use]
    pub fn wants_attention(&self, group: usize) -> bool {
        self.groups.get(group).is_some_and(|group| {
            group.pool.available() < group.low || group.pool.figures().units_empty > group.high_units
        })
    }

    /// Whether anything is kept ahead of need by what demand foretells.
    #[must_use]
    pub const fn keeps_ahead(&self) -> bool {
        self.spare_bytes_max.0 > 0
    }

    /// The next step will take so many blocks.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn hint(&mut self, group: usize, blocks: u32, now: Duration) -> Result<(), KvError> {
        let group = self.group_mut(group)?;
        group.demand.hint(blocks, group.pool.used(), now);
        self.advance(now);
        Ok(())
    }

    /// Goes on to the time `now`. True if nothing has been asked for lately: it need not be called again before something
    /// is.
    pub fn advance(&mut self, now: Duration) -> bool {
        let mut is_quiet = true;
        let most = self.spare_bytes_max.0;
        for group in &mut self.groups {
            group.demand.advance(now, group.pool.used());
            let blocks_max = u32::try_from(most / group.block_bytes).unwrap_or(u32::MAX);
            let left = group.pool.blocks() - group.pool.used();
            // What was announced is no forecast: an engine that wants no more than that ahead sets the most to zero.
            let expected = group.demand.target(group.pool.used()).min(blocks_max);
            group.spare = expected.max(group.demand.hinted(group.pool.used())).min(left);
            group.low = group.spare.div_ceil(2);
            let units = u64::from(group.spare) * group.block_bytes / group.unit_bytes;
            group.high_units = u32::try_from(2 * units).unwrap_or(u32::MAX);
            is_quiet &= group.demand.is_quiet(group.pool.used());
        }
        is_quiet
    }

    /// Sets the limit on the memory of all groups together.
    ///
    /// # Errors
    /// [`KvError::Limit`]; nothing is changed.
    pub fn set_limit(&mut self, limit: ByteCount, revision: Option<u64>) -> Result<(), KvError> {
        self.limit.set(limit, revision)?;
        Ok(())
    }

    /// The limit.
    #[must_use]
    pub const fn limit(&self) -> &Limit {
        &self.limit
    }

    /// Memory that is mapped or on its way.
    #[must_use]
    pub fn mapped_bytes(&self) -> ByteCount {
        let bytes = |group: &Group| u64::from(group.pool.figures().units) * group.unit_bytes;
        ByteCount(self.groups.iter().map(bytes).sum())
    }

    #[inline]
    pub(super) fn owned_bytes(&self) -> u64 {
        self.groups.iter().map(|group| u64::from(group.pool.figures().owned) * group.block_bytes).sum()
    }

    /// Memory above the limit, which goes when blocks in use become free.
    #[must_use]
    pub fn overage(&self) -> ByteCount {
        self.mapped_bytes().saturating_sub(self.limit.bytes())
    }

    /// Whether so many more blocks of a group may be owned.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn fits_limit(&self, group: usize, blocks: u32) -> Result<bool, KvError> {
        self.pool(group)?;
        let owned = self.owned_bytes() + u64::from(blocks) * self.groups[group].block_bytes;
        Ok(owned <= self.limit.bytes().0)
    }

    /// Whether memory is leaving that would be room under the limit once it is gone.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.groups.iter().any(|group| group.pool.is_leaving())
    }

    /// How many more blocks of a group an allocation could be given, with memory that is mapped, that the limit allows, or
    /// that other groups would give up: exactly so many where blocks do not straddle granules, at most so many where they do.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn allocatable(&self, group: usize) -> Result<u32, KvError> {
        let figures = self.pool(group)?.figures();
        let open =
            (self.limit.bytes().0 + self.unowned_beside(group).0).saturating_sub(self.mapped_bytes().0);
        let owned = self.owned_bytes();
        let (units, group) = (self.layout.groups()[group].units(), &self.groups[group]);
        let units = (u64::from(figures.units) + open / group.unit_bytes).min(units);
        let with_memory = (units * group.unit_bytes / group.block_bytes).min(u64::from(group.pool.blocks()));
        let by_limit = self.limit.bytes().0.saturating_sub(owned) / group.block_bytes;
        let most = with_memory.saturating_sub(u64::from(figures.owned)).min(by_limit);
        Ok(u32::try_from(most).unwrap_or(u32::MAX))
    }

    /// Granules that must come before `blocks` blocks of a group can be had; none needed is an empty list. `None`, and
    /// nothing is changed: not all of them would find room under the limit. They are on their way from now on: say of each
    /// that it is [mapped](Self::mapped) or [gone](Self::gone).
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn plan_growth(&mut self, group: usize, blocks: u32) -> Result<Option<Vec<GranuleId>>, KvError> {
        let pool = self.pool(group)?;
        let missing = blocks.saturating_sub(pool.available());
        if !self.fits_limit(group, blocks)? {
            return Ok(None);
        }
        let (planned, yielded) = self.plan(group, missing)?;
        if yielded >= missing {
            return Ok(Some(planned));
        }
        for granule in planned {
            self.gone(granule)?;
        }
        Ok(None)
    }

    /// Granules that should come so that what is expected finds memory, as far as there is room: none more once they are
    /// `enough` together, and of at most `bytes_max` together, or one of the least length.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn plan_spare(&mut self, enough: ByteCount, bytes_max: ByteCount) -> Result<Vec<GranuleId>, KvError> {
        let mut planned = Vec::new();
        let mut bytes = ByteCount::ZERO;
        for at in 0..self.groups.len() {
            let group = &self.groups[at];
            let missing = group.spare.saturating_sub(group.pool.available());
            if missing == 0 {
                continue;
            }
            let least = if planned.is_empty() { group.unit_bytes } else { 0 };
            let most = bytes_max.saturating_sub(bytes).max(ByteCount(least));
            let before = self.mapped_bytes();
            planned.extend(self.plan_within(at, missing, enough.saturating_sub(bytes), most)?.0);
            bytes += self.mapped_bytes().saturating_sub(before);
            if bytes >= enough {
                break;
            }
        }
        Ok(planned)
    }

    /// The length of the shortest granule that is missing for what is expected.
    #[must_use]
    pub fn spare_unit(&self) -> Option<ByteCount> {
        let missing = self.groups.iter().filter(|group| group.pool.available() < group.spare);
        missing.map(|group| ByteCount(group.unit_bytes)).min()
    }

    /// Plans granules for `missing` blocks, each as long as what is still missing, the limit and the addresses allow.
    /// Returns them and the blocks they will bring.
    pub(super) fn plan(&mut self, at: usize, missing: u32) -> Result<(Vec<GranuleId>, u32), KvError> {
        self.plan_within(at, missing, ByteCount(u64::MAX), ByteCount(u64::MAX))
    }

    /// The same, none more once they are `enough` together, and of at most `bytes_max` together.
    fn plan_within(
        &mut self,
        at: usize,
        missing: u32,
        enough: ByteCount,
        bytes_max: ByteCount,
    ) -> Result<(Vec<GranuleId>, u32), KvError> {
        let layout = &self.layout.groups()[at];
        let (piece, planes) = (layout.piece_bytes().0, u64::from(layout.planes()));
        let units_max = layout.granule_units_max();
        let before = self.mapped_bytes();
        let limit = self.limit.bytes().min(ByteCount(before.0.saturating_add(bytes_max.0)));
        let (mut planned, mut yielded) = (Vec::new(), 0_u32);
        while yielded < missing && self.mapped_bytes().saturating_sub(before) < enough {
            let room = limit.saturating_sub(self.mapped_bytes()).0;
            let group = &mut self.groups[at];
            let plane_unit = group.unit_bytes / planes;
            let wanted = (u64::from(missing - yielded) * piece).div_ceil(plane_unit);
            let most = wanted.min(units_max).min(room / group.unit_bytes);
            if most == 0 {
                break;
            }
            let found = (0..=most.ilog2()).rev().find_map(|log| {
                let units = 1_u32 << log;
                Some((group.pool.open_run(units)?, units))
            });
            let Some((first, units)) = found else { break };
            yielded += group.pool.yields(first, units);
            planned.push(GranuleId { group: at, slot: group.pool.coming(first, units)? });
        }
        Ok((planned, yielded))
    }

    /// The pages of a granule, one run a plane.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`], [`KvError::Granule`].
    pub fn runs(&self, granule: GranuleId) -> Result<Vec<PageRun>, KvError> {
        let pool = self.pool(granule.group)?;
        let stage = GranuleError::Stage { slot: granule.slot, wanted: "there" };
        let (first, units) = pool.units_of(granule.slot).ok_or(stage)?;
        Ok(self.layout.groups()[granule.group].runs(u64::from(first), u64::from(units)))
    }

    /// Its memory in all planes.
    #[must_use]
    pub fn bytes_of(&self, granule: GranuleId) -> ByteCount {
        let units = self.groups.get(granule.group).and_then(|group| {
            let (_, units) = group.pool.units_of(granule.slot)?;
            Some(u64::from(units) * group.unit_bytes)
        });
        ByteCount(units.unwrap_or(0))
    }

    /// A granule that was coming has its memory.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`], [`KvError::Granule`]; nothing is changed.
    pub fn mapped(&mut self, granule: GranuleId) -> Result<(), KvError> {
        Ok(self.group_mut(granule.group)?.pool.mapped(granule.slot)?)
    }

    /// A granule that was coming did not come, or one that was leaving has left.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`], [`KvError::Granule`]; nothing is changed.
    pub fn gone(&mut self, granule: GranuleId) -> Result<(), KvError> {
        Ok(self.group_mut(granule.group)?.pool.gone(granule.slot)?)
    }

    /// This moment, for [`plan_release`](Self::plan_release): what is empty now.
    #[must_use]
    pub fn clocks(&self) -> Clocks {
        self.groups.iter().map(|group| group.pool.clock()).collect()
    }

    /// Whether [`plan_release`](Self::plan_release) of this moment would find something.
    #[must_use]
    pub fn has_surplus(&self) -> bool {
        let clocks = self.clocks();
        self.groups.iter().zip(&clocks).any(|(group, clock)| {
            group.pool.figures().units_empty > 0
                && Self::surplus(group, *clock, self.overage().0 > 0).next().is_some()
        })
    }

    fn surplus(group: &Group, clock: u64, is_over: bool) -> impl Iterator<Item = u32> + '_ {
        let mut left = if is_over { u32::MAX } else { group.pool.available().saturating_sub(group.spare) };
        group.pool.empty(clock).filter(move |slot| {
            let free = group.pool.free_count(*slot);
            let is_surplus = free <= left;
            if is_surplus {
                left -= free;
            }
            is_surplus
        })
    }

    /// Granules in which nothing lies since `clocks` and that nothing is expected for; above the limit, all of them. They
    /// are leaving from now on: say of each that it is [gone](Self::gone) when its memory is.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn plan_release(&mut self, clocks: &[u64]) -> Result<Vec<GranuleId>, KvError> {
        let mut planned = Vec::new();
        let mut overage = self.overage().0;
        for (at, clock) in (0..self.groups.len()).zip(clocks) {
            let group = &mut self.groups[at];
            let slots: Vec<u32> = Self::surplus(group, *clock, overage > 0).collect();
            for slot in slots {
                let units = group.pool.units_of(slot).map_or(0, |(_, units)| u64::from(units));
                group.pool.leaving(slot)?;
                overage = overage.saturating_sub(units * group.unit_bytes);
                planned.push(GranuleId { group: at, slot });
            }
        }
        Ok(planned)
    }

    /// Granules in which nothing lies since `clocks`, of at least `bytes` as far as there are any, whatever is expected. They
    /// are leaving from now on.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn plan_reclaim(&mut self, bytes: ByteCount, clocks: &[u64]) -> Result<Vec<GranuleId>, KvError> {
        self.plan_empty(bytes, clocks, |_| true)
    }

    /// Granules in which nothing lies and whose pages `is_had` takes. They are leaving from now on.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn plan_drop(&mut self, is_had: impl Fn(&[PageRun]) -> bool) -> Result<Vec<GranuleId>, KvError> {
        let mut planned = Vec::new();
        for at in 0..self.groups.len() {
            let slots: Vec<u32> = self.groups[at].pool.empty(u64::MAX).collect();
            for slot in slots {
                let granule = GranuleId { group: at, slot };
                if is_had(&self.runs(granule)?) {
                    self.groups[at].pool.leaving(slot)?;
                    planned.push(granule);
                }
            }
        }
        Ok(planned)
    }

    /// Figures.
    #[must_use]
    pub fn usage(&self) -> KvUsage {
        let mut usage = KvUsage {
            limit: self.limit.bytes(),
            revision: self.limit.revision(),
            reservation: self.limit.reservation(),
            mapped: self.mapped_bytes(),
            live: ByteCount(self.owned_bytes()),
            cached: ByteCount::ZERO,
            empty: ByteCount::ZERO,
            groups: Vec::with_capacity(self.groups.len()),
        };
        for group in &self.groups {
            let blocks = group.pool.figures();
            usage.cached += ByteCount(u64::from(blocks.cached) * group.block_bytes);
            usage.empty += ByteCount(u64::from(blocks.units_empty) * group.unit_bytes);
            let mapped = ByteCount(u64::from(blocks.units) * group.unit_bytes);
            usage.groups.push(GroupUsage { blocks, spare_target: group.spare, mapped });
        }
        usage
    }

    /// Says what is wrong, if anything is.
    ///
    /// # Errors
    /// A sentence that names the first contradiction.
    pub fn check_invariants(&self) -> Result<(), String> {
        for (at, group) in self.groups.iter().enumerate() {
            group.pool.check_invariants().map_err(|wrong| format!("group {at}: {wrong}"))?;
        }
        if let Some(reuse) = &self.reuse {
            reuse.check_invariants(&self.groups)?;
        }
        if self.limit.bytes() > self.limit.reservation() {
            return Err(format!("limit {} above {}", self.limit.bytes(), self.limit.reservation()));
        }
        Ok(())
    }
}
