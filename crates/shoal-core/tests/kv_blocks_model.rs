//! Long random histories of one group's blocks, against a plain model: sets of ids, and units with or without memory.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::kv::blocks::{BlockError, BlockPool, BlockState};
use shoal_core::kv::compact;
use shoal_core::kv::layout::{BlockShape, CacheLayout, CacheSpec, GroupLayout, GroupSpec, PlaneOrder};

const UNITS: u64 = 12;

fn layout(piece_kib: u64) -> GroupLayout {
    let group = GroupSpec {
        name: "full".to_owned(),
        layers: 1,
        shape: BlockShape::State { elements: u32::try_from(piece_kib << 10).expect("small") },
        element_bytes: 1,
    };
    let unit = (piece_kib << 10).div_ceil(PAGE_BYTES.0).next_power_of_two() * PAGE_BYTES.0;
    let spec = CacheSpec {
        groups: vec![group],
        order: PlaneOrder::BlockMajor,
        bytes: ByteCount(UNITS * unit),
        granule_bytes_max: ByteCount::mib(256),
    };
    CacheLayout::new(&spec).expect("a layout").groups()[0].clone()
}

#[derive(Debug, Default)]
struct Model {
    owners: BTreeMap<u32, u32>,
    sealed: BTreeSet<u32>,
    cached: BTreeSet<u32>,
    /// First unit -> units.
    granules: BTreeMap<u32, u32>,
}

impl Model {
    fn units(&self) -> BTreeSet<u32> {
        self.granules.iter().flat_map(|(first, count)| *first..first + count).collect()
    }

    fn is_used(&self, block: u32) -> bool {
        self.owners.contains_key(&block) || self.cached.contains(&block)
    }

    /// The units that a block touches.
    fn touched(layout: &GroupLayout, block: u32) -> std::ops::RangeInclusive<u32> {
        let unit = layout.unit_pages() * PAGE_BYTES.0;
        let first = u64::from(block) * layout.piece_bytes().0;
        let last = first + layout.piece_bytes().0 - 1;
        u32::try_from(first / unit).expect("few")..=u32::try_from(last / unit).expect("few")
    }

    fn available(&self, layout: &GroupLayout) -> BTreeSet<u32> {
        let units = self.units();
        (0..layout.blocks())
            .filter(|block| !self.is_used(*block))
            .filter(|block| Self::touched(layout, *block).all(|unit| units.contains(&unit)))
            .collect()
    }

    fn is_empty(&self, layout: &GroupLayout, first: u32) -> bool {
        let count = self.granules[&first];
        !(0..layout.blocks()).any(|block| {
            self.is_used(block)
                && Self::touched(layout, block).any(|unit| (first..first + count).contains(&unit))
        })
    }

    fn free(&mut self, ids: &[u32]) {
        for id in ids {
            let owners = self.owners.get_mut(id).expect("owned");
            *owners -= 1;
            if *owners == 0 {
                self.owners.remove(id);
                if self.sealed.contains(id) {
                    self.cached.insert(*id);
                }
            }
        }
    }

    fn may_free(&self, ids: &[u32]) -> bool {
        let mut left = self.owners.clone();
        ids.iter().all(|id| match left.get_mut(id) {
            Some(owners) if *owners > 0 => {
                *owners -= 1;
                true
            }
            _ => false,
        })
    }
}

#[derive(Clone, Debug)]
enum Op {
    Alloc(usize),
    Free(Vec<u32>),
    FreeOwned(usize, usize),
    Fork(Vec<u32>),
    Seal(u32),
    Unseal(u32),
    Share(u32),
    Map(u32, u32),
    FailToMap(u32, u32),
    Unmap(usize),
    Compact(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let ids = || proptest::collection::vec(0_u32..60, 0..5);
    prop_oneof![
        4 => (0_usize..20).prop_map(Op::Alloc),
        2 => ids().prop_map(Op::Free),
        4 => (0_usize..60, 0_usize..12).prop_map(|(skip, count)| Op::FreeOwned(skip, count)),
        1 => ids().prop_map(Op::Fork),
        2 => (0_u32..60).prop_map(Op::Seal),
        1 => (0_u32..60).prop_map(Op::Unseal),
        1 => (0_u32..60).prop_map(Op::Share),
        4 => (0_u32..12, 0_u32..4).prop_map(|(at, log)| Op::Map(at, 1 << log)),
        1 => (0_u32..12, 0_u32..3).prop_map(|(at, log)| Op::FailToMap(at, 1 << log)),
        2 => (0_usize..8).prop_map(Op::Unmap),
        1 => (0_usize..12).prop_map(Op::Compact),
    ]
}

/// Everything that a refused call must leave alone.
fn shown(pool: &BlockPool) -> (String, Vec<Result<BlockState, BlockError>>) {
    (format!("{:?}", pool.figures()), (0..pool.blocks()).map(|block| pool.state(block)).collect())
}

#[expect(clippy::too_many_lines, reason = "one arm for each operation")]
fn play(piece_kib: u64, ops: Vec<Op>) -> Result<(), TestCaseError> {
    let layout = layout(piece_kib);
    let (mut pool, mut model) = (BlockPool::new(&layout), Model::default());
    for op in ops {
        let was = shown(&pool);
        let mut is_refused = false;
        match op {
            Op::Alloc(count) => {
                let mut ids = vec![-7_i64; count];
                let available = model.available(&layout);
                is_refused = !pool.alloc(&mut ids);
                prop_assert_eq!(is_refused, count > available.len());
                if is_refused {
                    prop_assert!(ids.iter().all(|id| *id == -7));
                } else {
                    for id in ids {
                        let id = u32::try_from(id).expect("a block");
                        prop_assert!(available.contains(&id), "block {} has an owner or no memory", id);
                        prop_assert!(model.owners.insert(id, 1).is_none(), "block {} twice", id);
                    }
                }
            }
            Op::Free(ids) => {
                is_refused = pool.free(&ids, |_| ()).is_err();
                prop_assert_eq!(is_refused, !model.may_free(&ids));
                if !is_refused {
                    model.free(&ids);
                }
            }
            Op::FreeOwned(skip, count) => {
                let ids: Vec<u32> = model.owners.keys().copied().skip(skip).take(count).collect();
                let mut cached = BTreeSet::new();
                pool.free(&ids, |block| {
                    cached.insert(block);
                })
                .expect("each is owned");
                let was = model.cached.clone();
                model.free(&ids);
                prop_assert!(cached.iter().eq(model.cached.difference(&was)));
            }
            Op::Fork(ids) => {
                is_refused = pool.fork(&ids).is_err();
                prop_assert_eq!(is_refused, ids.iter().any(|id| !model.owners.contains_key(id)));
                if !is_refused {
                    for id in ids {
                        *model.owners.get_mut(&id).expect("owned") += 1;
                    }
                }
            }
            Op::Seal(id) => {
                is_refused = pool.seal(id).is_err();
                prop_assert_eq!(is_refused, !model.owners.contains_key(&id));
                if !is_refused {
                    model.sealed.insert(id);
                }
            }
            Op::Unseal(id) => {
                is_refused = pool.unseal(id).is_err();
                prop_assert_eq!(is_refused, !model.sealed.remove(&id));
                model.cached.remove(&id);
            }
            Op::Share(id) => {
                let shared = pool.share(id);
                is_refused = shared.is_err();
                prop_assert_eq!(is_refused, !model.is_used(id));
                if let Ok(was_cached) = shared {
                    prop_assert_eq!(was_cached, model.cached.remove(&id));
                    *model.owners.entry(id).or_default() += 1;
                }
            }
            Op::Map(at, count) | Op::FailToMap(at, count) => {
                let units = model.units();
                let is_open = u64::from(at + count) <= layout.units()
                    && (at..at + count).all(|unit| !units.contains(&unit));
                let coming = pool.coming(at, count);
                is_refused = coming.is_err();
                prop_assert_eq!(is_refused, !is_open);
                if let Ok(slot) = coming {
                    let available = pool.available();
                    let yields = pool.yields(at, count);
                    if matches!(op, Op::Map(..)) {
                        pool.mapped(slot).expect("coming");
                        model.granules.insert(at, count);
                        prop_assert_eq!(pool.available(), available + yields);
                    } else {
                        pool.gone(slot).expect("coming");
                        prop_assert_eq!(&was, &shown(&pool));
                    }
                }
            }
            Op::Unmap(place) => {
                let Some(first) = model.granules.keys().copied().nth(place) else { continue };
                let slot = pool.granule_at(first).expect("mapped");
                let is_empty = model.is_empty(&layout, first);
                prop_assert_eq!(pool.empty(pool.clock()).any(|other| other == slot), is_empty);
                is_refused = pool.leaving(slot).is_err();
                prop_assert_eq!(is_refused, !is_empty);
                if !is_refused {
                    pool.gone(slot).expect("leaving");
                    model.granules.remove(&first);
                }
            }
            Op::Compact(most) => {
                let empty = pool.figures().units_empty;
                let moves = compact::plan(&pool, most);
                prop_assert!(moves.len() <= most);
                for planned in &moves {
                    pool.take(planned.to).expect("free");
                    pool.share(planned.from).expect("used");
                }
                for planned in &moves {
                    pool.renumber(planned.from, planned.to).expect("taken for it");
                    pool.free(&[planned.to], |_| ()).expect("owned");
                    if let Some(owners) = model.owners.remove(&planned.from) {
                        model.owners.insert(planned.to, owners);
                    }
                    for set in [&mut model.sealed, &mut model.cached] {
                        if set.remove(&planned.from) {
                            set.insert(planned.to);
                        }
                    }
                }
                prop_assert!(moves.is_empty() || pool.figures().units_empty > empty);
            }
        }
        if is_refused {
            prop_assert_eq!(&was, &shown(&pool), "a refused call changed something");
        }
        pool.check_invariants().map_err(TestCaseError::fail)?;
        let available = model.available(&layout);
        prop_assert_eq!(pool.available() as usize, available.len());
        for block in 0..pool.blocks() {
            let wanted = match model.owners.get(&block) {
                Some(owners) => BlockState::Owned(*owners),
                None if model.cached.contains(&block) => BlockState::Cached,
                None => BlockState::Free,
            };
            prop_assert_eq!(pool.state(block), Ok(wanted));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn blocks_of_any_size_agree_with_plain_sets(
        piece_kib in prop_oneof![Just(512_u64), Just(2048), Just(4096), 300_u64..9000],
        ops in proptest::collection::vec(op(), 1..120),
    ) {
        play(piece_kib, ops)?;
    }
}
