use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::bytes::PAGE_BYTES;

const ALL: ByteCount = ByteCount(u64::MAX);

fn small(pages: u64) -> RegionTable {
    RegionTable::carved(pages, ExtentRule::default(), Backing::Keep)
}

fn run_all(table: &mut RegionTable, moves: &[PlannedMove]) {
    for planned in moves {
        table.begin(*planned).expect("planned");
        table.finish(planned.extent).expect("begun");
    }
}

#[test]
fn evicts_from_the_end_and_restores_from_the_start() {
    let mut table = small(8);
    for index in 0..8 {
        table.add_copy(ExtentIndex(index), Tier::Host).expect("exists");
    }
    let restore = table.plan_restore(ByteCount(5 * PAGE_BYTES.0 + 1));
    assert_eq!(restore.moves.iter().map(|m| m.extent.0).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    run_all(&mut table, &restore.moves);
    assert_eq!(table.device_bytes(), ByteCount::mib(10));

    let evict = table.plan_evict(ByteCount(1), ByteCount::ZERO);
    assert_eq!(evict.moves, [PlannedMove { extent: ExtentIndex(4), step: Move::Drop, bytes: PAGE_BYTES }]);
    run_all(&mut table, &evict.moves);
    assert_eq!(table.missing_bytes(), ByteCount::mib(8));
}

#[test]
fn what_left_the_device_is_counted_each_time_and_what_was_discarded_is_not() {
    let mut table = small(4);
    for index in 0..4 {
        table.add_copy(ExtentIndex(index), Tier::Host).expect("exists");
    }
    assert_eq!(table.usage().left, ByteCount::ZERO);
    for turn in 1..=2 {
        let restore = table.plan_restore(ALL);
        run_all(&mut table, &restore.moves);
        let evict = table.plan_evict(ByteCount::mib(6), ByteCount::ZERO);
        run_all(&mut table, &evict.moves);
        assert_eq!((table.usage().left, table.device_bytes()), (ByteCount::mib(6 * turn), ByteCount::mib(2)));
    }
    table.take_out(ExtentIndex(0)).expect("it is there");
    assert_eq!((table.usage().left, table.device_bytes()), (ByteCount::mib(12), ByteCount::ZERO));
}

#[test]
fn an_order_of_use_goes_before_that_of_addresses() {
    let mut table = small(4);
    for index in 0..4 {
        table.add_copy(ExtentIndex(index), Tier::Host).expect("exists");
    }
    let page = |first| PageRun { first, count: 1 };
    let order_of = |moves: &[PlannedMove]| moves.iter().map(|m| m.extent.0).collect::<Vec<_>>();
    table.set_order(UseOrder::new(4, [page(2), page(0)]));
    let restore = table.plan_restore(ALL);
    assert_eq!(order_of(&restore.moves), [2, 0, 1, 3]);
    let other = UseOrder::new(4, [page(3)]);
    assert_eq!(order_of(&table.plan_restore_by(ByteCount::mib(4), &other).moves), [3, 0]);
    run_all(&mut table, &restore.moves);
    assert_eq!(order_of(&table.plan_evict(ALL, ByteCount::ZERO).moves), [3, 1, 0, 2]);
}

#[test]
fn what_has_no_other_copy_goes_to_the_host_while_there_is_room() {
    let mut table = small(4);
    for index in 0..4 {
        let zero = PlannedMove { extent: ExtentIndex(index), step: Move::Zero, bytes: PAGE_BYTES };
        run_all(&mut table, &[zero]);
    }
    table.add_copy(ExtentIndex(2), Tier::Source).expect("exists");
    let plan = table.plan_evict(ALL, PAGE_BYTES);
    assert_eq!(
        plan.moves.iter().map(|m| m.step).collect::<Vec<_>>(),
        [Move::Offload(Tier::Host), Move::Drop]
    );
    let reason = RefusedReason::NoHostRoom { needed: PAGE_BYTES, free: ByteCount::ZERO };
    assert_eq!(plan.refused, [(ExtentIndex(1), reason), (ExtentIndex(0), reason)]);
    assert_eq!((plan.freed, plan.copied), (ByteCount::mib(4), PAGE_BYTES));
}

#[test]
fn what_is_on_its_way_is_still_missing() {
    let mut table = small(1);
    table.add_copy(ExtentIndex(0), Tier::Host).expect("exists");
    let restore = table.plan_restore(ALL).moves[0];
    table.begin(restore).expect("planned");
    assert!(table.plan_restore(ALL).moves.is_empty(), "planned once");
    assert_eq!(table.missing_bytes(), PAGE_BYTES, "a step must not start yet (I13)");
    table.finish(restore.extent).expect("begun");
    assert_eq!(table.missing_bytes(), ByteCount::ZERO);
}

#[test]
fn discarding_needs_the_regions_word() {
    let mut kept = small(1);
    let zero = PlannedMove { extent: ExtentIndex(0), step: Move::Zero, bytes: PAGE_BYTES };
    run_all(&mut kept, &[zero]);
    let discard = PlannedMove { step: Move::Discard, ..zero };
    assert!(matches!(kept.begin(discard), Err(TableError::Residency { .. })), "I6");

    let mut scratch = RegionTable::carved(1, ExtentRule::default(), Backing::Discard);
    run_all(&mut scratch, &[zero]);
    let plan = scratch.plan_evict(ALL, ByteCount::ZERO);
    run_all(&mut scratch, &plan.moves);
    assert_eq!(scratch.plan_restore(ALL).moves, [zero]);
}

#[test]
fn pages_have_one_extent() {
    let mut table = RegionTable::empty(100, ExtentRule::default(), Backing::Keep);
    let grown = table.insert(PageRun { first: 10, count: 7 }).expect("free");
    assert_eq!(grown.len(), 3);
    assert!(matches!(
        table.insert(PageRun { first: 16, count: 2 }),
        Err(TableError::Overlap { page: 16, .. })
    ));
    assert!(matches!(table.insert(PageRun { first: 99, count: 2 }), Err(TableError::OutOfRange { .. })));
    assert!(matches!(
        table.insert(PageRun { first: u64::MAX, count: 2 }),
        Err(TableError::OutOfRange { .. })
    ));
    assert_eq!(table.extents_within(PageRun { first: 11, count: 6 }).expect("in range").len(), 2);
    assert_eq!(table.extents_touching(PageRun { first: 11, count: 6 }).expect("in range").len(), 3);
    assert_eq!(
        table.uncovered(PageRun { first: 8, count: 10 }).expect("in range"),
        [PageRun { first: 8, count: 2 }, PageRun { first: 17, count: 1 }]
    );
    table.take_out(grown[0]).expect("there");
    assert_eq!(table.take_out(grown[0]), Err(TableError::UnknownExtent { extent: grown[0] }));
    assert_eq!(table.extent_at(10), None);
    table.insert(PageRun { first: 10, count: 1 }).expect("free again");
}

#[derive(Clone, Debug)]
enum Op {
    Evict { pages: u64, host_pages: u64, fail: bool },
    Restore { pages: u64, fail: bool },
    Write { extent: u32 },
    ForgetHost { extent: u32 },
    TakeOut { extent: u32 },
    Insert { first: u64, count: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0_u64..20, 0_u64..20, any::<bool>()).prop_map(|(pages, host_pages, fail)| Op::Evict {
            pages,
            host_pages,
            fail
        }),
        (0_u64..20, any::<bool>()).prop_map(|(pages, fail)| Op::Restore { pages, fail }),
        (0_u32..24).prop_map(|extent| Op::Write { extent }),
        (0_u32..24).prop_map(|extent| Op::ForgetHost { extent }),
        (0_u32..24).prop_map(|extent| Op::TakeOut { extent }),
        (0_u64..24, 1_u64..6).prop_map(|(first, count)| Op::Insert { first, count }),
    ]
}

/// A page in the plain model: a version number per tier; the highest one ever written is the truth.
#[derive(Clone, Debug, Default)]
struct PlainPage {
    truth: u64,
    device: Option<u64>,
    host: Option<u64>,
}

proptest! {
    /// Whatever is asked and whatever fails, the newest bytes of every page stay somewhere, and the table knows where.
    #[test]
    fn agrees_with_plain_pages(ops in proptest::collection::vec(op(), 1..60)) {
        let mut table = RegionTable::empty(24, ExtentRule { pieces_min: 4, ..ExtentRule::default() }, Backing::Keep);
        let mut plain: BTreeMap<u64, PlainPage> = BTreeMap::new();
        let mut version = 0;
        for op in ops {
            match op {
                Op::Insert { first, count } => {
                    if let Ok(grown) = table.insert(PageRun { first, count }) {
                        for index in grown {
                            let (extent, _) = table.extent(index).expect("just entered");
                            let zero = PlannedMove { extent: index, step: Move::Zero, bytes: extent.bytes() };
                            run_all(&mut table, &[zero]);
                        }
                        for page in first..first + count {
                            let fresh = PlainPage { truth: 0, device: Some(0), host: None };
                            prop_assert!(plain.insert(page, fresh).is_none());
                        }
                    }
                }
                Op::TakeOut { extent } => {
                    if let Ok((extent, _)) = table.take_out(ExtentIndex(extent)) {
                        for page in extent.run().first..extent.run().end() {
                            prop_assert!(plain.remove(&page).is_some());
                        }
                    }
                }
                Op::Evict { pages, host_pages, fail } => {
                    let plan = table.plan_evict(PageRun { first: 0, count: pages }.bytes(), PageRun { first: 0, count: host_pages }.bytes());
                    let host_free = PageRun { first: 0, count: host_pages }.bytes();
                    prop_assert!(plan.copied <= host_free);
                    for planned in plan.moves {
                        let extent = table.begin(planned).expect("planned");
                        if fail {
                            table.abort(planned.extent).expect("begun");
                            continue;
                        }
                        table.finish(planned.extent).expect("begun");
                        for page in extent.run().first..extent.run().end() {
                            let page = plain.get_mut(&page).expect("covered");
                            let bytes = page.device.take().expect("was on the device");
                            if planned.step == Move::Offload(Tier::Host) {
                                page.host = Some(bytes);
                            }
                            prop_assert_eq!(page.host, Some(page.truth));
                        }
                    }
                }
                Op::Restore { pages, fail } => {
                    for planned in table.plan_restore(PageRun { first: 0, count: pages }.bytes()).moves {
                        let extent = table.begin(planned).expect("planned");
                        if fail {
                            table.abort(planned.extent).expect("begun");
                            continue;
                        }
                        table.finish(planned.extent).expect("begun");
                        for page in extent.run().first..extent.run().end() {
                            let page = plain.get_mut(&page).expect("covered");
                            prop_assert!(page.device.is_none());
                            page.device = page.host;
                        }
                    }
                }
                Op::Write { extent } => {
                    let index = ExtentIndex(extent);
                    if table.written(index).is_ok() {
                        version += 1;
                        let (extent, _) = table.extent(index).expect("written");
                        for page in extent.run().first..extent.run().end() {
                            plain.insert(page, PlainPage { truth: version, device: Some(version), host: None });
                        }
                    }
                }
                Op::ForgetHost { extent } => {
                    let index = ExtentIndex(extent);
                    if table.remove_copy(index, Tier::Host).is_ok() {
                        let (extent, _) = table.extent(index).expect("changed");
                        for page in extent.run().first..extent.run().end() {
                            plain.get_mut(&page).expect("covered").host = None;
                        }
                    }
                }
            }
            for (page, state) in &plain {
                let index = table.extent_at(*page).expect("covered");
                let valid = table.extent(index).expect("exists").1.valid();
                prop_assert_eq!(valid.has(Tier::Device), state.device == Some(state.truth));
                prop_assert_eq!(valid.has(Tier::Host), state.host == Some(state.truth));
                prop_assert!(!valid.is_empty(), "page {} is lost (I6)", page);
            }
            let on_device = plain.values().filter(|page| page.device.is_some()).count() as u64;
            prop_assert_eq!(table.device_bytes(), PageRun { first: 0, count: on_device }.bytes());
        }
    }
}
