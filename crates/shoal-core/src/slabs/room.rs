//! What moves, and which slabs go, so that a part of a length fits although what is free lies scattered.
//!
//! Apart because it tries: each try is made on a copy of the space, and the answer is a list of moves that the arena
//! carries out one by one, or gives up on (somebody may take hold of a part meanwhile), without losing anything.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::{Order, Part, SlabSpace};
use crate::ids::SlabId;

/// Windows that are tried at most for one plan.
const TRIES_MAX: u32 = 64;
/// Windows of one length that are tried, least occupied first.
const WINDOWS_MAX: usize = 4;

/// One part's content goes to another place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartMove {
    /// From here.
    pub from: Part,
    /// To here, which is free when the moves before have been made.
    pub to: Part,
}

/// How room comes about, or the next step to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoomPlan {
    /// To be made in this order.
    pub moves: Vec<PartMove>,
    /// Slabs that are empty then and are to be given back.
    pub slabs_given_back: Vec<SlabId>,
    /// The slab to be made in their stead. Where it is shorter than what was asked for, ask again afterwards.
    pub slab_made: Option<Order>,
}

/// One attempt: the space as it would be.
#[derive(Clone)]
struct Attempt {
    space: SlabSpace,
    moves: Vec<PartMove>,
    /// What must stay empty.
    kept: Vec<Part>,
}

impl SlabSpace {
    /// What to do so that a part of length `order` fits: moves within the slabs, or moves that empty slabs which together
    /// with `left_pages` (what may still be made) are as long as a new one. `is_movable` says of a part in somebody's
    /// hands whether it can be moved now. `None`: it does not fit.
    #[must_use]
    pub fn plan_room(
        &self,
        order: Order,
        left_pages: u64,
        is_movable: impl Fn(Part) -> bool,
    ) -> Option<RoomPlan> {
        let mut tries = TRIES_MAX;
        let start = Attempt { space: self.clone(), moves: Vec::new(), kept: Vec::new() };
        if let Some((attempt, _)) = start.make_window(order, &is_movable, &mut tries) {
            return Some(RoomPlan { moves: attempt.moves, ..RoomPlan::default() });
        }
        // What cannot make way for want of a slab as long as itself can once short slabs have become a longer one.
        (0..=order).rev().find_map(|order| start.empty_slabs_for(order, left_pages, &is_movable))
    }
}

impl Attempt {
    /// A free part of this length, kept empty: one that is there, or the window with the least in it, emptied.
    fn make_window(
        &self,
        order: Order,
        is_movable: &impl Fn(Part) -> bool,
        tries: &mut u32,
    ) -> Option<(Self, Part)> {
        let mut attempt = self.clone();
        if let Some(part) = attempt.space.take(order) {
            return Some((attempt, part));
        }
        self.windows(order, is_movable).into_iter().take(WINDOWS_MAX).find_map(|window| {
            *tries = tries.checked_sub(1)?;
            self.empty(window, is_movable, tries).map(|attempt| (attempt, window))
        })
    }

    /// Windows of this length in which all is shorter and can move, those with the least in them first.
    fn windows(&self, order: Order, is_movable: &impl Fn(Part) -> bool) -> Vec<Part> {
        let mut windows: BTreeMap<Part, Option<u64>> = BTreeMap::new();
        for part in &self.space.taken {
            if self.space.slabs.get(&part.slab).is_none_or(|limit| *limit < order) {
                continue;
            }
            let window = windows.entry(part.around(order)).or_insert(Some(0));
            let may_go = part.order < order && is_movable(*part);
            *window = window.filter(|_| may_go).map(|pages| pages + part.pages());
        }
        windows.retain(|window, pages| pages.is_some() && !self.kept.iter().any(|kept| kept.meets(*window)));
        let mut sorted: Vec<_> = windows.into_iter().collect();
        sorted.sort_by_key(|(window, pages)| (*pages, *window));
        sorted.into_iter().map(|(window, _)| window).collect()
    }

    /// Moves all that lies in a window elsewhere, the longest first. The window is taken then.
    fn empty(&self, window: Part, is_movable: &impl Fn(Part) -> bool, tries: &mut u32) -> Option<Self> {
        let mut attempt = self.clone();
        attempt.kept.push(window);
        let mut inside: Vec<Part> =
            attempt.space.taken.iter().copied().filter(|part| part.meets(window)).collect();
        inside.sort_by_key(|part| (Reverse(part.order), *part));
        // What is free in it must not be a target.
        let free: Vec<Part> = {
            let parts = attempt.space.free.range(..window.order).flat_map(|(_, parts)| parts.iter().copied());
            parts.filter(|part| part.meets(window)).collect()
        };
        for part in &free {
            attempt.space.take_at(*part);
        }
        for from in &inside {
            let (next, to) = attempt.make_window(from.order, is_movable, tries)?;
            attempt = next;
            attempt.moves.push(PartMove { from: *from, to });
        }
        for part in inside.into_iter().chain(free) {
            attempt.space.give(part);
        }
        attempt.space.take_at(window).then_some(attempt)
    }

    /// Empties slabs until they make up for one of this length: those with the least in them, or, where small slabs are
    /// needed for what is small, the longest.
    fn empty_slabs_for(
        &self,
        order: Order,
        left_pages: u64,
        is_movable: &impl Fn(Part) -> bool,
    ) -> Option<RoomPlan> {
        let mut used: BTreeMap<SlabId, Option<u64>> =
            self.space.slabs.keys().map(|slab| (*slab, Some(0))).collect();
        for part in &self.space.taken {
            if let Some(pages) = used.get_mut(&part.slab) {
                *pages = pages.filter(|_| is_movable(*part)).map(|pages| pages + part.pages());
            }
        }
        let slabs = self.space.slabs.iter().filter(|(_, length)| **length < order);
        let mut slabs: Vec<(u64, Order, SlabId)> = slabs
            .filter_map(|(slab, length)| {
                used.get(slab).copied().flatten().map(|pages| (pages, *length, *slab))
            })
            .collect();
        slabs.sort_unstable();
        if let Some(plan) = self.empty_in_turn(&slabs, order, left_pages, is_movable) {
            return Some(plan);
        }
        slabs.sort_by_key(|(pages, length, slab)| (Reverse(*length), *pages, *slab));
        self.empty_in_turn(&slabs, order, left_pages, is_movable)
    }

    fn empty_in_turn(
        &self,
        slabs: &[(u64, Order, SlabId)],
        order: Order,
        left_pages: u64,
        is_movable: &impl Fn(Part) -> bool,
    ) -> Option<RoomPlan> {
        let (mut attempt, mut pages, mut slabs_given_back) = (self.clone(), left_pages, Vec::new());
        for (_, length, slab) in slabs {
            if pages >> order > 0 {
                break;
            }
            let mut tries = TRIES_MAX;
            if let Some(next) = attempt.empty(Part::whole(*slab, *length), is_movable, &mut tries) {
                attempt = next;
                pages += 1 << length;
                slabs_given_back.push(*slab);
            }
        }
        let plan = RoomPlan { moves: attempt.moves, slabs_given_back, slab_made: Some(order) };
        (pages >> order > 0).then_some(plan)
    }
}
