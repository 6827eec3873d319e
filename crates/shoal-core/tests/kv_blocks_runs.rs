//! Long lists of blocks, as engines give them back: whole words of neighbours, rising, falling and scattered, shared and
//! sealed ones among them, and wrong ones anywhere, against a plain count of owners that takes one id after another.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use shoal_core::bytes::ByteCount;
use shoal_core::kv::blocks::{BlockError, BlockPool, BlockState};
use shoal_core::kv::ids::BlockId;
use shoal_core::kv::layout::{BlockShape, CacheLayout, CacheSpec, GroupSpec, PlaneOrder};

/// All blocks of 16 MiB, mapped in granules of two lengths.
fn pool(piece_kib: u32) -> BlockPool {
    let group = GroupSpec {
        name: "full".to_owned(),
        layers: 1,
        shape: BlockShape::State { elements: piece_kib << 10 },
        element_bytes: 1,
    };
    let spec = CacheSpec {
        groups: vec![group],
        order: PlaneOrder::BlockMajor,
        bytes: ByteCount::mib(16),
        granule_bytes_max: ByteCount::mib(4),
    };
    let layout = CacheLayout::new(&spec).expect("a layout");
    let mut pool = BlockPool::new(&layout.groups()[0]);
    let units = pool.units();
    let mut first = 0;
    while first < units {
        let count = if first % 4 == 0 { 2.min(units - first) } else { 1 };
        let slot = pool.coming(first, count).expect("open");
        pool.mapped(slot).expect("coming");
        first += count;
    }
    pool
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Rising,
    Falling,
    /// By steps of so many.
    Strided(usize),
}

#[derive(Clone, Copy, Debug)]
enum Wrong {
    Negative,
    Beyond,
    /// The first one again.
    Twice,
    Free,
}

#[derive(Clone, Debug)]
enum Op {
    Alloc(usize),
    Fork(usize, usize),
    Seal(usize, usize),
    Free { from: usize, count: usize, order: Order, wrong: Option<(Wrong, usize)> },
}

fn op() -> impl Strategy<Value = Op> {
    let order = prop_oneof![
        2 => Just(Order::Rising),
        1 => Just(Order::Falling),
        1 => (2_usize..70).prop_map(Order::Strided),
    ];
    let wrong =
        prop_oneof![Just(Wrong::Negative), Just(Wrong::Beyond), Just(Wrong::Twice), Just(Wrong::Free)];
    let wrong = proptest::option::weighted(0.3, (wrong, 0_usize..900));
    prop_oneof![
        3 => (0_usize..900).prop_map(Op::Alloc),
        1 => (0_usize..900, 0_usize..200).prop_map(|(from, count)| Op::Fork(from, count)),
        1 => (0_usize..900, 0_usize..200).prop_map(|(from, count)| Op::Seal(from, count)),
        4 => (0_usize..900, 0_usize..900, order, wrong)
            .prop_map(|(from, count, order, wrong)| Op::Free { from, count, order, wrong }),
    ]
}

fn ordered(mut ids: Vec<i64>, order: Order) -> Vec<i64> {
    match order {
        Order::Rising => ids,
        Order::Falling => {
            ids.reverse();
            ids
        }
        Order::Strided(step) => (0..step)
            .flat_map(|from| ids.iter().copied().skip(from).step_by(step).collect::<Vec<_>>())
            .collect(),
    }
}

#[derive(Debug, Default)]
struct Model {
    owners: BTreeMap<u32, u32>,
    sealed: BTreeSet<u32>,
    cached: BTreeSet<u32>,
}

impl Model {
    fn owned(&self, from: usize, count: usize) -> Vec<u32> {
        self.owners.keys().copied().skip(from).take(count).collect()
    }

    /// What a free comes to: who is cached by it, in turn, or what is wrong.
    fn free(&mut self, ids: &[i64], blocks: u32) -> Result<Vec<u32>, BlockError> {
        let (before, mut cached) = (self.owners.clone(), Vec::new());
        for id in ids {
            let known = u32::try_from(*id).ok().filter(|block| *block < blocks);
            let wrong = match known {
                None => BlockError::Unknown { block: *id, blocks },
                Some(block) => match self.owners.get_mut(&block) {
                    None | Some(0) => BlockError::NotOwned { block },
                    Some(owners) => {
                        *owners -= 1;
                        continue;
                    }
                },
            };
            self.owners = before;
            return Err(wrong);
        }
        for id in ids {
            let block = u32::try_from(*id).expect("known");
            if self.owners.get(&block) == Some(&0) {
                self.owners.remove(&block);
                if self.sealed.contains(&block) {
                    self.cached.insert(block);
                    cached.push(block);
                }
            }
        }
        Ok(cached)
    }

    fn state(&self, block: u32) -> BlockState {
        match self.owners.get(&block) {
            Some(owners) => BlockState::Owned(*owners),
            None if self.cached.contains(&block) => BlockState::Cached,
            None => BlockState::Free,
        }
    }
}

fn freed<T: BlockId>(
    pool: &mut BlockPool,
    ids: &[i64],
    to: impl Fn(i64) -> Option<T>,
) -> Result<Vec<u32>, BlockError> {
    let ids: Vec<T> = ids.iter().map(|id| to(*id).expect("it fits")).collect();
    let mut cached = Vec::new();
    pool.free(&ids, |block| cached.push(block)).map(|_| cached)
}

fn alloced<T: BlockId>(pool: &mut BlockPool, count: usize) -> Option<Vec<i64>> {
    let mut ids = vec![T::of(0); count];
    pool.alloc(&mut ids).then(|| ids.into_iter().map(BlockId::shown).collect())
}

fn play(piece_kib: u32, ops: Vec<Op>) -> Result<(), TestCaseError> {
    let (mut pool, mut model) = (pool(piece_kib), Model::default());
    let blocks = pool.blocks();
    for (round, op) in ops.into_iter().enumerate() {
        match op {
            Op::Alloc(count) => {
                let available = pool.available();
                let ids = match round % 4 {
                    0 => alloced::<i32>(&mut pool, count),
                    1 => alloced::<i64>(&mut pool, count),
                    2 => alloced::<u32>(&mut pool, count),
                    _ => alloced::<u64>(&mut pool, count),
                };
                prop_assert_eq!(ids.is_some(), count <= available as usize);
                for id in ids.into_iter().flatten() {
                    let block = u32::try_from(id).expect("a block");
                    prop_assert_eq!(model.state(block), BlockState::Free);
                    model.owners.insert(block, 1);
                }
            }
            Op::Fork(from, count) => {
                let ids = model.owned(from, count);
                pool.fork(&ids).expect("owned");
                for block in ids {
                    *model.owners.get_mut(&block).expect("owned") += 1;
                }
            }
            Op::Seal(from, count) => {
                for block in model.owned(from, count) {
                    pool.seal(block).expect("owned");
                    model.sealed.insert(block);
                }
            }
            Op::Free { from, count, order, wrong } => {
                let ids = model.owned(from, count).into_iter().map(i64::from).collect();
                let mut ids = ordered(ids, order);
                if let Some((wrong, at)) = wrong {
                    let given = match wrong {
                        Wrong::Negative => Some(-1),
                        Wrong::Beyond => Some(i64::from(blocks)),
                        Wrong::Twice => ids.first().copied(),
                        Wrong::Free => {
                            (0..blocks).find(|block| model.state(*block) == BlockState::Free).map(i64::from)
                        }
                    };
                    if let Some(id) = given {
                        ids.insert(at.min(ids.len()), id);
                    }
                }
                let wanted = model.free(&ids, blocks);
                let is_negative = ids.iter().any(|id| *id < 0);
                let found = match round % 4 {
                    0 => freed(&mut pool, &ids, |id| i32::try_from(id).ok()),
                    1 if !is_negative => freed(&mut pool, &ids, |id| u32::try_from(id).ok()),
                    2 if !is_negative => freed(&mut pool, &ids, |id| u64::try_from(id).ok()),
                    _ => freed(&mut pool, &ids, Some),
                };
                prop_assert_eq!(found, wanted, "of {:?}", ids);
            }
        }
        pool.check_invariants().map_err(TestCaseError::fail)?;
        for block in 0..blocks {
            prop_assert_eq!(pool.state(block), Ok(model.state(block)));
        }
        let free = (0..blocks).filter(|block| model.state(*block) == BlockState::Free).count();
        prop_assert_eq!(pool.available() as usize, free, "all memory is there");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn lists_of_any_order_agree_with_one_id_after_another(
        piece_kib in prop_oneof![Just(8_u32), Just(16), 9_u32..70],
        ops in proptest::collection::vec(op(), 1..40),
    ) {
        play(piece_kib, ops)?;
    }
}
