//! The space against a plain map of pages, and room against counting.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Each page of each slab: who has it.
#[derive(Default)]
struct Model {
    pages: BTreeMap<(SlabId, u64), Option<u64>>,
    parts: BTreeMap<u64, Part>,
}

impl Model {
    fn put(&mut self, who: u64, part: Part) {
        for page in part.first_page..part.first_page + part.pages() {
            let owner = self.pages.get_mut(&(part.slab, page)).expect("a page of a slab");
            assert_eq!(owner.replace(who), None, "given away twice");
        }
        assert!(part.first_page.is_multiple_of(part.pages()));
        self.parts.insert(who, part);
    }

    fn free(&mut self, who: u64) -> Part {
        let part = self.parts.remove(&who).expect("has one");
        for page in part.first_page..part.first_page + part.pages() {
            assert_eq!(self.pages.insert((part.slab, page), None), Some(Some(who)));
        }
        part
    }

    fn free_pages(&self) -> u64 {
        self.pages.values().filter(|owner| owner.is_none()).count() as u64
    }

    /// Whether an aligned run of this length is all free.
    fn has(&self, order: Order) -> bool {
        let starts = self.pages.keys().filter(|(_, page)| page.is_multiple_of(1 << order));
        starts.copied().any(|(slab, page)| {
            (page..page + (1 << order)).all(|page| self.pages.get(&(slab, page)) == Some(&None))
        })
    }

    /// Does what a plan says, one by one.
    fn follow(&mut self, space: &mut SlabSpace, plan: &RoomPlan) {
        for PartMove { from, to } in &plan.moves {
            let (who, _) = self.parts.iter().find(|(_, part)| *part == from).expect("a part in use");
            let who = *who;
            assert!(space.take_at(*to), "{to:?} is not free");
            self.put_moved(who, *to);
            assert!(space.give(*from));
        }
        for slab in &plan.slabs_given_back {
            assert!(space.remove(*slab), "{slab} is not empty");
            self.pages.retain(|(of, _), _| of != slab);
        }
    }

    fn put_moved(&mut self, who: u64, to: Part) {
        self.free(who);
        self.put(who, to);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Take(Order),
    Give(usize),
    Remove,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0_u32..5).prop_map(Step::Take),
        4 => any::<usize>().prop_map(Step::Give),
        1 => Just(Step::Remove),
    ];
    prop::collection::vec(step, 1..120)
}

/// As the arena does it: a part, else a slab within the budget, else room; nothing if it does not fit.
fn obtain(
    space: &mut SlabSpace,
    model: &mut Model,
    (budget, order, next): (u64, Order, &mut u64),
    is_movable: impl Fn(Part) -> bool,
) -> Option<Part> {
    // Each step but the last makes the slabs fewer or what is left less.
    for _ in 0..200 {
        if let Some(part) = space.take(order) {
            return Some(part);
        }
        let left = budget - space.pages();
        let slab = if left >> order > 0 {
            Some(order)
        } else {
            let plan = space.plan_room(order, left, &is_movable)?;
            model.follow(space, &plan);
            plan.slab_made
        };
        if let Some(order) = slab {
            assert!((budget - space.pages()) >> order > 0, "a slab beyond the budget");
            add(space, model, order, next);
        }
    }
    panic!("no end");
}

fn add(space: &mut SlabSpace, model: &mut Model, order: Order, next: &mut u64) {
    *next += 1;
    let slab = SlabId(*next);
    assert!(space.add(slab, order));
    model.pages.extend((0..1 << order).map(|page| ((slab, page), None)));
}

#[test]
fn orders_hold_what_they_are_asked_for() {
    assert_eq!(order_of(ByteCount::ZERO), 0);
    assert_eq!(order_of(PAGE_BYTES), 0);
    assert_eq!(order_of(ByteCount(PAGE_BYTES.0 + 1)), 1);
    assert_eq!(order_of(ByteCount::mib(6)), 2);
    assert_eq!(bytes_of(order_of(ByteCount::gib(1))), ByteCount::gib(1));
}

proptest! {
    #[test]
    fn parts_never_meet_and_whole_slabs_come_back(orders in prop::collection::vec(0_u32..5, 1..5), steps in steps()) {
        let (mut space, mut model, mut next) = (SlabSpace::default(), Model::default(), 0);
        for order in orders {
            add(&mut space, &mut model, order, &mut next);
        }
        for (who, step) in (0_u64..).zip(steps) {
            match step {
                Step::Take(order) => match space.take(order) {
                    Some(part) => {
                        prop_assert_eq!(part.order, order);
                        model.put(who, part);
                    }
                    None => prop_assert!(!model.has(order), "free, and not found"),
                },
                Step::Give(index) if !model.parts.is_empty() => {
                    let who = *model.parts.keys().nth(index % model.parts.len()).expect("not empty");
                    let part = model.free(who);
                    prop_assert!(space.give(part));
                    prop_assert!(!space.give(part), "given back twice");
                }
                Step::Give(_) => {}
                Step::Remove => {
                    let empty: Vec<_> = space.empty_slabs().collect();
                    let slabs: Vec<_> = space.slabs.keys().copied().collect();
                    for slab in slabs {
                        let is_empty = model.pages.range((slab, 0)..=(slab, u64::MAX)).all(|(_, who)| who.is_none());
                        prop_assert_eq!(empty.iter().any(|(id, _)| *id == slab), is_empty);
                    }
                    if let Some((slab, order)) = empty.first().copied() {
                        prop_assert!(space.remove(slab) && !space.remove(slab));
                        model.pages.retain(|(id, _), _| *id != slab);
                        prop_assert!(!space.take_at(Part::whole(slab, order)));
                    }
                }
            }
            prop_assert_eq!(space.free_pages(), model.free_pages());
            prop_assert_eq!(space.pages(), model.pages.len() as u64);
        }
    }

    /// As long as nothing is held in place, only what is used up counts: no budget is lost to fragments.
    #[test]
    fn what_is_free_in_all_can_be_had_in_one_part(budget in 1_u64..70, steps in steps()) {
        let (mut space, mut model, mut next) = (SlabSpace::default(), Model::default(), 0);
        for (who, step) in (0_u64..).zip(steps) {
            match step {
                Step::Take(order) => {
                    let used = space.pages() - space.free_pages();
                    let fits = used + (1 << order) <= budget;
                    if !fits {
                        continue;
                    }
                    let part = obtain(&mut space, &mut model, (budget, order, &mut next), |_| true);
                    let part = part.unwrap_or_else(|| panic!("{used} of {budget} used, and {order} found no room: {space:?}"));
                    model.put(who, part);
                }
                Step::Give(index) if !model.parts.is_empty() => {
                    let who = *model.parts.keys().nth(index % model.parts.len()).expect("not empty");
                    prop_assert!(space.give(model.free(who)));
                }
                Step::Give(_) | Step::Remove => {}
            }
            prop_assert!(space.pages() <= budget, "I1");
        }
    }

    #[test]
    fn what_is_held_stays(budget in 4_u64..70, steps in steps(), held in any::<u64>()) {
        let (mut space, mut model, mut next) = (SlabSpace::default(), Model::default(), 0);
        let is_held = |who: u64| held >> (who % 64) & 1 == 1;
        for (who, step) in (0_u64..).zip(steps) {
            match step {
                Step::Take(order) => {
                    let places: BTreeMap<Part, u64> = model.parts.iter().map(|(who, part)| (*part, *who)).collect();
                    let before: Vec<_> = model.parts.clone().into_iter().filter(|(who, _)| is_held(*who)).collect();
                    let may_move = |part: Part| places.get(&part).is_none_or(|who| !is_held(*who));
                    if let Some(part) = obtain(&mut space, &mut model, (budget, order, &mut next), may_move) {
                        model.put(who, part);
                    }
                    for (who, part) in before {
                        prop_assert_eq!(model.parts.get(&who), Some(&part));
                    }
                }
                Step::Give(index) if !model.parts.is_empty() => {
                    let who = *model.parts.keys().nth(index % model.parts.len()).expect("not empty");
                    prop_assert!(space.give(model.free(who)));
                }
                Step::Give(_) | Step::Remove => {}
            }
            prop_assert!(space.pages() <= budget, "I1");
        }
    }
}
