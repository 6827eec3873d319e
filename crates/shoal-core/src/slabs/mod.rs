//! Which part of which slab of host memory is whose.
//!
//! Apart because dividing memory is arithmetic, while making it is slow and can fail: the arena in shoal-memory makes
//! slabs and asks here which part to use. Slabs and parts are powers of two of pages, as extents are, so parts are cut
//! and joined in halves (the buddy system of Knowlton, "A fast storage allocator", 1965). The sum of the slabs is at most
//! the budget, so what is given away is too (I1).
//!
//! A large part can find no place although enough is free in all. [`SlabSpace::plan_room`] then says which small parts
//! move where; what is held by somebody stays where it is (I5).

mod room;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

pub use room::{PartMove, RoomPlan};

use crate::bytes::{ByteCount, PAGE_BYTES};
use crate::ids::SlabId;

/// A length of `1 << order` pages.
pub type Order = u32;

/// The shortest order that holds so many bytes.
#[must_use]
pub const fn order_of(bytes: ByteCount) -> Order {
    let pages = bytes.pages();
    if pages <= 1 { 0 } else { (pages - 1).ilog2() + 1 }
}

/// The bytes of an order.
#[must_use]
pub const fn bytes_of(order: Order) -> ByteCount {
    ByteCount(PAGE_BYTES.0 << order)
}

/// A part of a slab: it begins at a multiple of its own length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Part {
    /// The slab.
    pub slab: SlabId,
    /// Its first page in the slab.
    pub first_page: u64,
    /// Its length.
    pub order: Order,
}

impl Part {
    /// Its pages.
    #[must_use]
    pub const fn pages(self) -> u64 {
        1 << self.order
    }

    /// Where it begins in its slab.
    #[must_use]
    pub const fn offset(self) -> ByteCount {
        ByteCount(self.first_page * PAGE_BYTES.0)
    }

    /// Its length in bytes.
    #[must_use]
    pub const fn bytes(self) -> ByteCount {
        bytes_of(self.order)
    }

    const fn whole(slab: SlabId, order: Order) -> Self {
        Self { slab, first_page: 0, order }
    }

    /// The part of length `order` that it lies in, or begins.
    const fn around(self, order: Order) -> Self {
        Self { slab: self.slab, first_page: self.first_page >> order << order, order }
    }

    const fn buddy(self) -> Self {
        Self { first_page: self.first_page ^ self.pages(), ..self }
    }

    fn meets(self, other: Self) -> bool {
        let order = self.order.max(other.order);
        self.around(order) == other.around(order)
    }
}

/// The slabs and what is free of them.
#[derive(Clone, Debug, Default)]
pub struct SlabSpace {
    slabs: BTreeMap<SlabId, Order>,
    /// Free parts by length. No two buddies are both in it.
    free: BTreeMap<Order, BTreeSet<Part>>,
    taken: BTreeSet<Part>,
    pages: u64,
    free_pages: u64,
}

impl SlabSpace {
    /// Pages of all slabs.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages that nobody has.
    #[must_use]
    pub const fn free_pages(&self) -> u64 {
        self.free_pages
    }

    /// The longest part that could be taken now.
    #[must_use]
    pub fn longest_free(&self) -> Option<Order> {
        self.free.iter().rev().find(|(_, parts)| !parts.is_empty()).map(|(order, _)| *order)
    }

    /// Adds a slab, all free. False: there is one of that name.
    pub fn add(&mut self, slab: SlabId, order: Order) -> bool {
        if self.slabs.contains_key(&slab) {
            return false;
        }
        self.slabs.insert(slab, order);
        self.free.entry(order).or_default().insert(Part::whole(slab, order));
        self.pages += 1 << order;
        self.free_pages += 1 << order;
        true
    }

    /// Takes a slab away. False: it is not there, or not all free.
    pub fn remove(&mut self, slab: SlabId) -> bool {
        if !self.is_empty(slab) {
            return false;
        }
        let Some(order) = self.slabs.remove(&slab) else { return false };
        self.unlist(Part::whole(slab, order));
        self.pages -= 1 << order;
        self.free_pages -= 1 << order;
        true
    }

    /// Whether all of a slab is free.
    #[must_use]
    pub fn is_empty(&self, slab: SlabId) -> bool {
        self.slabs.get(&slab).is_some_and(|order| self.is_free(Part::whole(slab, *order)))
    }

    /// Slabs of which nobody has anything, with their lengths.
    pub fn empty_slabs(&self) -> impl Iterator<Item = (SlabId, Order)> {
        let slabs = self.slabs.iter().map(|(slab, order)| (*slab, *order));
        slabs.filter(|(slab, order)| self.is_free(Part::whole(*slab, *order)))
    }

    /// A free part, from the shortest run that holds one: so long runs stay whole and slabs drain.
    pub fn take(&mut self, order: Order) -> Option<Part> {
        let found = self.free.range(order..).find_map(|(_, parts)| parts.first().copied())?;
        let part = Part { order, ..found };
        self.cut(found, part);
        Some(part)
    }

    /// Exactly this part, if it is free.
    pub fn take_at(&mut self, part: Part) -> bool {
        let Some(limit) = self.slabs.get(&part.slab).copied() else { return false };
        let found = (part.order..=limit).map(|order| part.around(order)).find(|around| self.is_free(*around));
        let Some(found) = found.filter(|_| part == part.around(part.order)) else { return false };
        self.cut(found, part);
        true
    }

    /// Gives a part back. False: nobody has it.
    pub fn give(&mut self, part: Part) -> bool {
        if !self.taken.remove(&part) {
            return false;
        }
        self.free_pages += part.pages();
        let limit = self.slabs.get(&part.slab).copied().unwrap_or(part.order);
        let mut whole = part;
        while whole.order < limit && self.unlist(whole.buddy()) {
            whole = whole.around(whole.order + 1);
        }
        self.free.entry(whole.order).or_default().insert(whole);
        true
    }

    /// Takes `part` out of the free run `found` around it.
    fn cut(&mut self, found: Part, part: Part) {
        self.unlist(found);
        let mut left = found;
        while left.order > part.order {
            let half = part.around(left.order - 1);
            self.free.entry(half.order).or_default().insert(half.buddy());
            left = half;
        }
        self.free_pages -= part.pages();
        self.taken.insert(part);
    }

    fn is_free(&self, part: Part) -> bool {
        self.free.get(&part.order).is_some_and(|parts| parts.contains(&part))
    }

    fn unlist(&mut self, part: Part) -> bool {
        self.free.get_mut(&part.order).is_some_and(|parts| parts.remove(&part))
    }
}
