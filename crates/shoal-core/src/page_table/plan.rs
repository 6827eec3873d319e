//! What should move: evict plans and restore plans of one region.
//!
//! Apart from the table because a plan reads it and changes nothing; how it is carried out, and in what it can fail, is
//! for others.

use super::{RegionTable, UseOrder};
use crate::bytes::ByteCount;
use crate::extent::Extent;
use crate::ids::ExtentIndex;
use crate::residency::{Move, Residency, TierSet};
use crate::tier::Tier;

/// What happens to bytes whose device memory is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Backing {
    /// They are kept in another tier.
    #[default]
    Keep,
    /// They are discarded; the memory comes back zeroed.
    Discard,
}

/// One step for one extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PlannedMove {
    /// The extent.
    pub extent: ExtentIndex,
    /// The step.
    pub step: Move,
    /// Bytes of the extent.
    pub bytes: ByteCount,
}

/// Why an extent that lies on the device is not part of an evict plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedReason {
    /// It has no other copy and the host tier has no room for one.
    NoHostRoom {
        /// What it needs.
        needed: ByteCount,
        /// What is left after the copies planned before it.
        free: ByteCount,
    },
    /// It is moving.
    Moving,
}

/// What to do to free device memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EvictPlan {
    /// The steps, in order.
    pub moves: Vec<PlannedMove>,
    /// Device bytes free when all succeed.
    pub freed: ByteCount,
    /// Bytes to copy to the host tier.
    pub copied: ByteCount,
    /// Extents passed over.
    pub refused: Vec<(ExtentIndex, RefusedReason)>,
}

impl EvictPlan {
    /// Bytes that the host tier lacks room for; `None` if it has room for all that must be copied.
    #[must_use]
    pub fn host_room_lacking(&self) -> Option<ByteCount> {
        let lacking = |(_, reason): &(ExtentIndex, RefusedReason)| match reason {
            RefusedReason::NoHostRoom { needed, .. } => Some(*needed),
            RefusedReason::Moving => None,
        };
        let bytes: ByteCount = self.refused.iter().filter_map(lacking).sum();
        (!bytes.is_zero()).then_some(bytes)
    }
}

/// What to do to bring bytes back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestorePlan {
    /// The steps, in order of use.
    pub moves: Vec<PlannedMove>,
    /// Device bytes it takes.
    pub bytes: ByteCount,
}

impl RegionTable {
    /// Plans to free at least `bytes` of device memory, as far as there is any: from the last extent in order of use
    /// backwards. What has another valid copy is dropped, what has none is copied to the host tier while `host_free`
    /// lasts, else passed over with the reason.
    #[must_use]
    pub fn plan_evict(&self, bytes: ByteCount, host_free: ByteCount) -> EvictPlan {
        let mut plan = EvictPlan::default();
        let mut free = host_free;
        for (index, extent, residency) in self.extents_by(self.order()).rev() {
            if plan.freed >= bytes {
                break;
            }
            let valid = residency.valid();
            if !valid.has(Tier::Device) {
                continue;
            }
            if residency.under_way().is_some() {
                plan.refused.push((index, RefusedReason::Moving));
                continue;
            }
            let needed = extent.bytes();
            let step = if self.backing() == Backing::Discard {
                Move::Discard
            } else if !valid.without(Tier::Device).is_empty() {
                Move::Drop
            } else if needed <= free {
                free -= needed;
                plan.copied += needed;
                Move::Offload(Tier::Host)
            } else {
                plan.refused.push((index, RefusedReason::NoHostRoom { needed, free }));
                continue;
            };
            plan.moves.push(PlannedMove { extent: index, step, bytes: needed });
            plan.freed += needed;
        }
        plan
    }

    /// What an eviction would have to copy, in the order in which evictions take it. None of it where bytes may be discarded.
    #[must_use]
    pub fn plan_flush(&self) -> Vec<(ExtentIndex, Extent)> {
        let is_dirty = |residency: Residency| {
            self.backing() == Backing::Keep
                && residency.valid() == TierSet::of(Tier::Device)
                && residency.under_way().is_none()
        };
        let extents = self.extents_by(self.order()).rev().filter(|(_, _, residency)| is_dirty(*residency));
        extents.map(|(index, extent, _)| (index, extent)).collect()
    }

    /// Plans to bring back what is missing on the device, in order of use: whole extents while they fit into `bytes`.
    /// Extents without bytes are left alone, unless they were discarded: those come back zeroed.
    #[must_use]
    pub fn plan_restore(&self, bytes: ByteCount) -> RestorePlan {
        self.plan_restore_by(bytes, self.order())
    }

    /// The same, in another order of use.
    #[must_use]
    pub fn plan_restore_by(&self, bytes: ByteCount, order: &UseOrder) -> RestorePlan {
        let mut plan = RestorePlan::default();
        for (index, extent, residency) in self.extents_by(order) {
            let valid = residency.valid();
            if valid.has(Tier::Device) || residency.under_way().is_some() {
                continue;
            }
            let step = match valid.fastest() {
                Some(tier) => Move::Restore(tier),
                None if residency.is_discarded() => Move::Zero,
                None => continue,
            };
            if plan.bytes + extent.bytes() > bytes {
                break;
            }
            plan.bytes += extent.bytes();
            plan.moves.push(PlannedMove { extent: index, step, bytes: extent.bytes() });
        }
        plan
    }

    /// Bytes that should be on the device and are not (yet): what a full restore would bring, and what is on its way.
    #[must_use]
    pub fn missing_bytes(&self) -> ByteCount {
        self.extents()
            .filter(|(_, _, residency)| {
                let valid = residency.valid();
                !valid.has(Tier::Device)
                    && (!valid.is_empty() || residency.is_discarded() || residency.under_way().is_some())
            })
            .map(|(_, extent, _)| extent.bytes())
            .sum()
    }
}
