//! A cache's decisions as a whole: growth, limits, spare memory and release, over random histories and by example.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::{BlockShape, CacheLayout, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::limit::LimitError;
use shoal_core::kv::reuse::ReuseOptions;
use shoal_core::kv::state::{GranuleId, KvError, KvState};

const MIB: u64 = 1 << 20;

fn group(name: &str, layers: u32, layer_kib: u32) -> GroupSpec {
    let shape = BlockShape::State { elements: layer_kib << 10 };
    GroupSpec { name: name.to_owned(), layers, shape, element_bytes: 1 }
}

fn state(groups: Vec<GroupSpec>, order: PlaneOrder, mib: u64) -> KvState {
    let spec = CacheSpec { groups, order, bytes: ByteCount::mib(mib), granule_bytes_max: ByteCount::mib(16) };
    KvState::new(CacheLayout::new(&spec).expect("a layout"), ByteCount::mib(32), None).expect("no index")
}

/// Grows until `count` blocks can be had, as whoever maps does.
fn alloc(state: &mut KvState, group: usize, count: usize) -> Option<Vec<u32>> {
    let mut ids = vec![0; count];
    for _ in 0..2 {
        if state.alloc(group, &mut ids).expect("a group") {
            return Some(ids);
        }
        let wanted = u32::try_from(count).expect("few");
        for granule in state.plan_growth(group, wanted).expect("a group")? {
            state.mapped(granule).expect("coming");
        }
    }
    None
}

fn release(state: &mut KvState) -> u64 {
    let leaving = state.plan_release(&state.clocks()).expect("planned");
    let bytes = leaving.iter().map(|granule| state.bytes_of(*granule).0).sum();
    for granule in leaving {
        state.gone(granule).expect("leaving");
    }
    bytes
}

#[test]
fn a_limit_shrinks_as_blocks_become_free_and_grows_back_exactly() {
    let mut state = state(vec![group("full", 2, 512)], PlaneOrder::BlockMajor, 100);
    assert_eq!(state.allocatable(0), Ok(100));
    let ids = alloc(&mut state, 0, 100).expect("all of them");
    state.set_limit(ByteCount::mib(50), Some(1)).expect("newer");
    assert_eq!((state.overage(), state.allocatable(0)), (ByteCount::mib(50), Ok(0)));
    assert_eq!(alloc(&mut state, 0, 1), None);
    assert_eq!(release(&mut state), 0, "everything is in use");
    state.free(0, &ids[..70]).expect("owned");
    release(&mut state);
    assert!(state.mapped_bytes().0 <= 50 * MIB, "{:?}", state.usage());
    assert!(alloc(&mut state, 0, 20).is_some());
    assert_eq!(alloc(&mut state, 0, 1), None, "50 are owned");
    state.set_limit(ByteCount::mib(100), Some(2)).expect("newer");
    assert_eq!(state.allocatable(0), Ok(50));
    assert_eq!(alloc(&mut state, 0, 50).map(|ids| ids.len()), Some(50), "back to exactly what it was");
    assert_eq!(alloc(&mut state, 0, 1), None);
    state.check_invariants().expect("figures");
}

#[test]
fn limits_above_the_reservation_and_late_ones_change_nothing() {
    let mut state = state(vec![group("full", 2, 512)], PlaneOrder::BlockMajor, 100);
    let was = state.usage();
    let above = state.set_limit(ByteCount::mib(1000), Some(1));
    assert!(matches!(above, Err(KvError::Limit(LimitError::AboveReservation { .. }))));
    assert_eq!(state.usage(), was);
    state.set_limit(ByteCount::mib(10), Some(5)).expect("newer");
    assert!(state.set_limit(ByteCount::mib(20), Some(4)).is_err());
    assert_eq!(state.usage().limit, ByteCount::mib(10));
    // An id beyond what the limit leaves is no owned one.
    assert!(state.free(0, &[90_u32]).is_err());
}

#[test]
fn groups_share_the_memory_and_none_can_starve_the_limit() {
    let groups = vec![group("full", 4, 64), group("window", 2, 64), group("state", 1, 5 << 10)];
    let mut state = state(groups, PlaneOrder::BlockMajor, 64);
    let full = alloc(&mut state, 0, 200).expect("50 MiB");
    assert_eq!(alloc(&mut state, 2, 3), None, "15 MiB in units of 8");
    assert_eq!(alloc(&mut state, 2, 1).map(|ids| ids.len()), Some(1));
    assert!(state.mapped_bytes() <= ByteCount::mib(64));
    state.free(0, &full).expect("owned");
    release(&mut state);
    assert!(alloc(&mut state, 2, 7).is_some());
    assert!(matches!(state.alloc(3, &mut [0_u32]), Err(KvError::UnknownGroup { group: 3, groups: 3 })));
    state.check_invariants().expect("figures");
}

#[test]
fn granules_are_long_where_much_is_asked_for_and_short_where_little_is() {
    let mut state = state(vec![group("full", 32, 64)], PlaneOrder::BlockMajor, 256);
    let sizes = |state: &KvState, planned: &[GranuleId]| -> Vec<u64> {
        planned.iter().map(|granule| state.bytes_of(*granule).0 / MIB).collect()
    };
    let few = state.plan_growth(0, 1).expect("a group").expect("room");
    assert_eq!(sizes(&state, &few), [2]);
    let many = state.plan_growth(0, 26).expect("a group").expect("room");
    assert_eq!(sizes(&state, &many), [16, 16, 16, 4], "52 MiB");
    for granule in few.into_iter().chain(many) {
        state.gone(granule).expect("coming");
    }
    assert_eq!(state.mapped_bytes(), ByteCount::ZERO);
}

#[test]
fn what_was_needed_lately_is_kept_and_then_goes() {
    let mut state = state(vec![group("full", 32, 64)], PlaneOrder::BlockMajor, 256);
    let at = |seconds: f64| Duration::from_secs_f64(seconds);
    let ids = alloc(&mut state, 0, 12).expect("24 MiB");
    state.free(0, &ids).expect("owned");
    assert!(!state.advance(at(0.3)));
    assert_eq!(release(&mut state), 0, "it may come back");
    assert!(state.advance(at(4.0)));
    assert_eq!(release(&mut state), 24 * MIB);
    state.hint(0, 10, at(4.1)).expect("a group");
    for granule in state.plan_spare(ByteCount(u64::MAX), ByteCount(u64::MAX)).expect("planned") {
        state.mapped(granule).expect("coming");
    }
    assert!(state.pool(0).expect("a group").available() >= 10);
    state.advance(at(9.0));
    release(&mut state);
    assert_eq!(state.mapped_bytes(), ByteCount::ZERO, "the step did not come");
}

#[test]
fn what_is_announced_comes_whatever_is_kept_ahead() {
    let spec = CacheSpec {
        groups: vec![group("full", 32, 64)],
        order: PlaneOrder::BlockMajor,
        bytes: ByteCount::mib(64),
        granule_bytes_max: ByteCount::mib(16),
    };
    let layout = CacheLayout::new(&spec).expect("a layout");
    let mut state = KvState::new(layout, ByteCount::ZERO, None).expect("no index");
    let everything = ByteCount(u64::MAX);
    let ids = alloc(&mut state, 0, 4).expect("8 MiB");
    assert_eq!(state.plan_spare(everything, everything).expect("planned"), [], "nothing is foretold");
    state.hint(0, 6, Duration::ZERO).expect("a group");
    for granule in state.plan_spare(everything, everything).expect("planned") {
        state.mapped(granule).expect("coming");
    }
    assert!(state.pool(0).expect("a group").available() >= 6);
    assert_eq!(release(&mut state), 0, "it is expected");
    let more = alloc(&mut state, 0, 5).expect("they have memory");
    state.advance(Duration::ZERO);
    assert_eq!(state.usage().groups[0].spare_target, 1, "five of the six have come");
    state.free(0, &more).expect("owned");
    state.hint(0, 1000, Duration::ZERO).expect("a group");
    assert_eq!(state.usage().groups[0].spare_target, 28, "no more than there is");
    state.hint(0, 0, Duration::ZERO).expect("a group");
    assert!(release(&mut state) > 0, "nothing is announced any more");
    state.free(0, &ids).expect("owned");
}

#[test]
fn groups_whose_blocks_have_different_tokens_find_no_prefixes_and_say_so() {
    let latent = |name: &str, tokens| GroupSpec {
        name: name.to_owned(),
        layers: 1,
        shape: BlockShape::Latent { tokens, dim: 4096 },
        element_bytes: 2,
    };
    let layout = |second| {
        let spec = CacheSpec {
            groups: vec![latent("a", 16), latent("b", second)],
            order: PlaneOrder::BlockMajor,
            bytes: ByteCount::mib(64),
            granule_bytes_max: ByteCount::mib(16),
        };
        CacheLayout::new(&spec).expect("a layout")
    };
    let reuse = Some(ReuseOptions::default());
    let refused = KvState::new(layout(48), ByteCount::ZERO, reuse).expect_err("no common step");
    assert_eq!(refused, KvError::MixedTokens { first: 16, other: 48 });
    assert_eq!(KvState::new(layout(48), ByteCount::ZERO, None).expect("no index").block_tokens(), None);
    assert_eq!(KvState::new(layout(16), ByteCount::ZERO, reuse).expect("an index").block_tokens(), Some(16));
}

#[test]
fn what_is_expected_can_come_in_parts() {
    let mut state = KvState::new(
        CacheLayout::new(&CacheSpec {
            groups: vec![group("full", 32, 64), group("other", 16, 64)],
            order: PlaneOrder::BlockMajor,
            bytes: ByteCount::mib(256),
            granule_bytes_max: ByteCount::mib(16),
        })
        .expect("a layout"),
        ByteCount::mib(256),
        None,
    )
    .expect("no index");
    state.hint(0, 26, Duration::ZERO).expect("a group");
    state.hint(1, 8, Duration::ZERO).expect("a group");
    let everything = ByteCount(u64::MAX);
    let sizes = |state: &mut KvState, enough, most| -> Vec<(usize, u64)> {
        let planned = state.plan_spare(enough, most).expect("planned");
        let sizes = planned.iter().map(|granule| (granule.group, state.bytes_of(*granule).0 / MIB)).collect();
        for granule in planned {
            state.gone(granule).expect("coming");
        }
        sizes
    };
    let all = sizes(&mut state, everything, everything);
    assert_eq!(all[..3], [(0, 16), (0, 16), (0, 16)]);
    assert_eq!(all.iter().filter(|(group, _)| *group == 1).map(|(_, mib)| mib).sum::<u64>(), 8);
    assert_eq!(
        sizes(&mut state, ByteCount::mib(20), everything),
        [(0, 16), (0, 16)],
        "long ones, and no more"
    );
    assert_eq!(sizes(&mut state, everything, ByteCount::mib(6)), [(0, 4), (0, 2)], "as much as there is");
    assert_eq!(sizes(&mut state, everything, ByteCount(1)), [(0, 2)], "one at least");
    assert_eq!(state.spare_unit(), Some(ByteCount::mib(2)));
    assert_eq!(state.mapped_bytes(), ByteCount::ZERO);
}

#[test]
fn a_long_granule_that_holds_little_is_given_up_for_short_ones() {
    for kib in [512, 700] {
        let mut state = state(vec![group("full", 2, kib)], PlaneOrder::BlockMajor, 64);
        let ids = alloc(&mut state, 0, 20).expect("room");
        state.free(0, &[&ids[..12], &ids[15..]].concat()).expect("owned");
        release(&mut state);
        let before = state.usage();
        let repack =
            state.plan_repack(0, 100).expect("a group").expect("three blocks in a granule of 16 MiB");
        assert_eq!(state.plan_repack(0, 2).expect("a group"), None, "fewer moves than it takes");
        for granule in &repack.planned {
            state.mapped(*granule).expect("coming");
        }
        let moves = state.repack_moves(&repack).expect("a group");
        assert_eq!(moves.len(), 3);
        state.begin_moves(0, &moves).expect("free targets");
        state.end_moves(0, &moves, true).expect("begun");
        for granule in state.plan_reclaim(ByteCount(u64::MAX), &state.clocks()).expect("planned") {
            state.gone(granule).expect("leaving");
        }
        let after = state.usage();
        assert!(after.live == before.live && after.mapped <= ByteCount::mib(6), "{before:?} {after:?}");
        assert_eq!(state.plan_repack(0, 100).expect("a group"), None, "nothing to gain");
        state.check_invariants().expect("figures");
    }
}

#[test]
fn moves_that_cannot_all_begin_change_nothing() {
    let mut state = state(vec![group("full", 2, 512)], PlaneOrder::BlockMajor, 32);
    let ids = alloc(&mut state, 0, 12).expect("room");
    state.free(0, &[ids[1], ids[5]]).expect("owned");
    let was = state.usage();
    let moves = |pairs: &[(u32, u32)]| -> Vec<_> {
        let pair = |(from, to): &(u32, u32)| shoal_core::kv::compact::BlockMove { from: *from, to: *to };
        pairs.iter().map(pair).collect()
    };
    for wrong in [vec![(ids[0], ids[1]), (ids[2], ids[1])], vec![(ids[0], ids[1]), (ids[5], ids[1])]] {
        assert!(state.begin_moves(0, &moves(&wrong)).is_err());
        assert_eq!(state.usage(), was);
    }
    let good = moves(&[(ids[0], ids[1])]);
    state.begin_moves(0, &good).expect("free target");
    state.free(0, &[ids[0]]).expect("its owner leaves while it moves");
    state.end_moves(0, &good, true).expect("begun");
    assert_eq!(state.usage().live, was.live - ByteCount::mib(1), "freed at its new place");
    state.check_invariants().expect("figures");
}

#[derive(Clone, Debug)]
enum Op {
    Alloc(usize, usize),
    Free(usize, usize),
    Fork(usize),
    Limit(u64),
    Release,
    Reclaim(u64),
    Fail(usize, u32),
    Compact(usize),
    Time(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0_usize..2, 1_usize..30).prop_map(|(group, count)| Op::Alloc(group, count)),
        4 => (0_usize..8, 1_usize..30).prop_map(|(skip, count)| Op::Free(skip, count)),
        1 => (0_usize..8).prop_map(Op::Fork),
        2 => (0_u64..=64).prop_map(Op::Limit),
        2 => Just(Op::Release),
        1 => (0_u64..40).prop_map(Op::Reclaim),
        1 => (0_usize..2, 1_u32..40).prop_map(|(group, count)| Op::Fail(group, count)),
        1 => (0_usize..40).prop_map(Op::Compact),
        1 => (0_u64..4000).prop_map(Op::Time),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn memory_follows_use_and_never_passes_the_limit(
        is_layer_major: bool,
        kib in prop_oneof![Just(512_u32), 100_u32..1500],
        ops in proptest::collection::vec(op(), 1..80),
    ) {
        let order = if is_layer_major { PlaneOrder::LayerMajor } else { PlaneOrder::BlockMajor };
        let mut state = state(vec![group("one", 2, kib), group("two", 1, 3 << 10)], order, 64);
        let block_bytes: Vec<u64> = state.layout().groups().iter().map(|group| group.block_bytes().0).collect();
        let mut owned: BTreeMap<(usize, u32), u32> = BTreeMap::new();
        let (mut now, mut limit) = (Duration::ZERO, 64);
        for op in ops {
            let before = state.mapped_bytes();
            match op {
                Op::Alloc(group, count) => {
                    let allocatable = state.allocatable(group).expect("a group") as usize;
                    let ids = alloc(&mut state, group, count);
                    prop_assert!(ids.is_none() || count <= allocatable);
                    for id in ids.into_iter().flatten() {
                        prop_assert_eq!(owned.insert((group, id), 1), None, "block {} twice", id);
                    }
                    let live: u64 = owned.keys().map(|(group, _)| block_bytes[*group]).sum();
                    prop_assert_eq!(state.usage().live.0, live);
                }
                Op::Free(skip, count) => {
                    let ids: Vec<_> = owned.keys().copied().skip(skip).take(count).collect();
                    for (group, id) in ids {
                        state.free(group, &[i64::from(id)]).expect("owned");
                        let owners = owned.get_mut(&(group, id)).expect("owned");
                        *owners -= 1;
                        owned.retain(|_, owners| *owners > 0);
                    }
                }
                Op::Fork(skip) => if let Some(((group, id), owners)) = owned.iter_mut().nth(skip) {
                    state.fork(*group, &[*id]).expect("owned");
                    *owners += 1;
                },
                Op::Limit(mib) => {
                    limit = mib;
                    state.set_limit(ByteCount::mib(mib), None).expect("within the reservation");
                }
                Op::Release => { release(&mut state); }
                Op::Reclaim(mib) => {
                    let empty = state.usage().empty.0;
                    let leaving = state.plan_reclaim(ByteCount::mib(mib), &state.clocks()).expect("planned");
                    let bytes: u64 = leaving.iter().map(|granule| state.bytes_of(*granule).0).sum();
                    prop_assert!(bytes >= empty.min(mib * MIB));
                    for granule in leaving {
                        state.gone(granule).expect("leaving");
                    }
                }
                Op::Fail(group, count) => {
                    for granule in state.plan_growth(group, count).expect("a group").into_iter().flatten() {
                        state.gone(granule).expect("coming");
                    }
                    prop_assert_eq!(state.mapped_bytes(), before);
                }
                Op::Compact(most) => {
                    let moves = state.plan_compaction(0, most).expect("a group");
                    let empty = state.usage().empty;
                    state.begin_moves(0, &moves).expect("planned just now");
                    state.end_moves(0, &moves, true).expect("begun");
                    for planned in &moves {
                        let owners = owned.remove(&(0, planned.from)).expect("owned");
                        owned.insert((0, planned.to), owners);
                    }
                    prop_assert!(moves.is_empty() || state.usage().empty > empty);
                }
                Op::Time(millis) => {
                    now += Duration::from_millis(millis);
                    state.advance(now);
                }
            }
            state.check_invariants().map_err(TestCaseError::fail)?;
            let mapped = state.mapped_bytes();
            prop_assert!(mapped <= before || mapped.0 <= limit * MIB, "grew to {} over {} MiB", mapped, limit);
            for (group, id) in owned.keys() {
                let layout = &state.layout().groups()[*group];
                let unit = layout.unit_bytes().0 / u64::from(layout.planes());
                let first = u64::from(*id) * layout.piece_bytes().0;
                let last = first + layout.piece_bytes().0 - 1;
                let pool = state.pool(*group).expect("a group");
                let units: BTreeSet<u64> = [first / unit, last / unit].into();
                for unit in units {
                    let unit = u32::try_from(unit).expect("few");
                    prop_assert!(pool.granule_at(unit).is_some(), "block {} lies in unit {} without memory", id, unit);
                }
            }
        }
    }
}
