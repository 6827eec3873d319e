//! Random histories of several groups in one cache: full attention, a sliding window and states, whose blocks are of
//! unlike sizes and lie across granules. They take memory from one another under one limit while device calls fail, memory
//! is reclaimed and somebody else leases; each block keeps the owners that a plain model counts and the bytes that its owner
//! wrote, and what is found was sealed as that.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::history::{Ballast, arm, is_given, may_fail, settle};
use common::{PAGE, WAIT, World, keeping, open, pooled_world_on};
use proptest::prelude::*;
use shoal_core::bytes::ByteCount;
use shoal_core::kv::blocks::BlockState;
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::prefix::{Found, NO_BLOCK, Start};
use shoal_device::{Device, FaultDevice};
use shoal_memory::{KvCache, KvCacheSpec};

const ALL: ByteCount = ByteCount(u64::MAX);
const BLOCK_TOKENS: u32 = 2;
/// The window needs the last two blocks.
const WINDOW: u32 = 4;
const CACHE_MIB: u64 = 16;
const FULL: usize = 0;
const STATES: usize = 2;
const GROUPS: usize = 3;

#[derive(Clone, Debug)]
enum Op {
    /// So many blocks in the first two groups and the state at their end, written, and sealed if it says so.
    Take {
        sequence: u8,
        blocks: usize,
        is_sealed: bool,
    },
    Find {
        sequence: u8,
    },
    Fork {
        which: usize,
    },
    Give {
        which: usize,
        group: usize,
    },
    Forget {
        which: usize,
        group: usize,
    },
    ForgetAll,
    Limit {
        mib: u64,
    },
    Hint {
        group: usize,
        blocks: u32,
    },
    Trim {
        is_all: bool,
    },
    Reclaim {
        pages: u64,
    },
    Compact {
        group: usize,
    },
    Ballast,
}

fn op() -> impl Strategy<Value = Op> {
    let (which, group) = (|| 0_usize..8, || 0..GROUPS);
    prop_oneof![
        6 => (0_u8..4, 1_usize..12, any::<bool>())
            .prop_map(|(sequence, blocks, is_sealed)| Op::Take { sequence, blocks, is_sealed }),
        4 => (0_u8..4).prop_map(|sequence| Op::Find { sequence }),
        1 => which().prop_map(|which| Op::Fork { which }),
        6 => (which(), 0..=GROUPS).prop_map(|(which, group)| Op::Give { which, group }),
        1 => (which(), group()).prop_map(|(which, group)| Op::Forget { which, group }),
        1 => Just(Op::ForgetAll),
        2 => (0_u64..=CACHE_MIB).prop_map(|mib| Op::Limit { mib }),
        1 => (group(), 0_u32..12).prop_map(|(group, blocks)| Op::Hint { group, blocks }),
        1 => any::<bool>().prop_map(|is_all| Op::Trim { is_all }),
        2 => (0_u64..8).prop_map(|pages| Op::Reclaim { pages }),
        3 => group().prop_map(|group| Op::Compact { group }),
        1 => Just(Op::Ballast),
    ]
}

/// The n-th device call of an operation fails, as an error or as a full device.
fn fault() -> impl Strategy<Value = Option<(u64, bool)>> {
    prop_oneof![2 => Just(None), 1 => (1_u64..24, any::<bool>()).prop_map(Some)]
}

/// A block of a group.
type Place = (usize, u32);

/// Blocks that somebody owns, of each group in order.
#[derive(Clone, Debug, Default)]
struct Holding {
    blocks: [Vec<u32>; GROUPS],
}

impl Holding {
    fn all(&self) -> impl Iterator<Item = Place> + '_ {
        self.blocks.iter().enumerate().flat_map(|(group, ids)| ids.iter().map(move |id| (group, *id)))
    }
}

struct Model {
    world: World,
    faults: Arc<FaultDevice>,
    cache: KvCache,
    held: Vec<Holding>,
    /// The byte of each block that was written, until it is taken anew.
    bytes: BTreeMap<Place, u8>,
    /// What blocks were sealed as: they may be found, or may have been evicted.
    sealed: BTreeMap<Place, (u8, usize)>,
    limit: ByteCount,
    ballast: Ballast,
    stamp: u8,
}

fn tokens(sequence: u8, blocks: usize) -> Vec<u32> {
    let count = u32::try_from(blocks).expect("few") * BLOCK_TOKENS;
    (0..count).map(|at| u32::from(sequence) * 1000 + at).collect()
}

impl Model {
    fn new(order: PlaneOrder) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let faults = FaultDevice::new(open(dir.path(), 64));
        let device = Arc::clone(&faults) as Arc<dyn Device>;
        let world = pooled_world_on(dir, device, 24, 64, keeping(4));
        let group =
            |name: &str, layers, shape| GroupSpec { name: name.to_owned(), layers, shape, element_bytes: 1 };
        let tokens = BLOCK_TOKENS;
        let groups = vec![
            group("full", 2, BlockShape::Latent { tokens, dim: 64 << 10 }),
            // 88 KiB: some lie across two granules.
            group(
                "window",
                1,
                BlockShape::Attention { tokens, kv_heads: 1, head_dim: 22 << 10, window: Some(WINDOW) },
            ),
            group("states", 1, BlockShape::State { elements: 700 << 10 }),
        ];
        let bytes = ByteCount::mib(CACHE_MIB);
        let spec = CacheSpec { groups, order, bytes, granule_bytes_max: ByteCount::mib(4) };
        let mut spec = KvCacheSpec::new("kv", spec);
        spec.patience = Duration::from_secs(5);
        let cache = world.manager.kv_cache(spec).expect("addresses");
        let limit = cache.usage().limit;
        Self {
            world,
            faults,
            cache,
            held: Vec::new(),
            bytes: BTreeMap::new(),
            sealed: BTreeMap::new(),
            limit,
            ballast: Ballast::default(),
            stamp: 0,
        }
    }

    fn owners(&self) -> BTreeMap<Place, u32> {
        let mut owners = BTreeMap::new();
        for place in self.held.iter().flat_map(Holding::all) {
            *owners.entry(place).or_insert(0) += 1;
        }
        owners
    }

    fn arm(&self, fault: Option<(u64, bool)>) {
        arm(&self.faults, self.world.device.info().id, fault);
    }

    fn offset(&self, (group, block): Place) -> ByteCount {
        self.cache.layout(group).expect("a group").pieces(block).next().expect("one").0
    }

    fn free(&self, holding: &Holding) {
        for (group, ids) in holding.blocks.iter().enumerate() {
            self.cache.free(group, ids).expect("owned");
        }
    }

    fn take(&mut self, sequence: u8, count: usize, is_sealed: bool) {
        let owners = self.owners();
        let mut taken = Holding::default();
        for (group, count) in [count, count, 1].into_iter().enumerate() {
            let mut ids = vec![u32::MAX; count];
            if !is_given(self.cache.alloc(group, &mut ids)) {
                // What the other groups gave is forgotten: somebody else's bytes may have been there.
                self.free(&taken);
                return;
            }
            for id in &ids {
                assert!(!owners.contains_key(&(group, *id)), "block {id} of group {group} has an owner");
                self.sealed.remove(&(group, *id));
                self.bytes.remove(&(group, *id));
            }
            taken.blocks[group] = ids;
        }
        let manager = Arc::clone(&self.world.manager);
        if let Ok(_guard) = manager.guard(WAIT) {
            for place in taken.all() {
                self.stamp = self.stamp.wrapping_add(1).max(1);
                if self.cache.region().write(self.offset(place), &[self.stamp; 64]).is_ok() {
                    self.bytes.insert(place, self.stamp);
                }
            }
        }
        if is_sealed && taken.all().all(|place| self.bytes.contains_key(&place)) {
            let mut states = vec![NO_BLOCK; count];
            states[count - 1] = taken.blocks[STATES][0];
            let lists: [&[u32]; GROUPS] = [&taken.blocks[0], &taken.blocks[1], &states];
            let sealed = self.cache.seal(Start::Salt(b""), &tokens(sequence, count), &lists).expect("owned");
            assert_eq!(sealed.blocks, count, "the group that needs all has all");
            for (group, block) in &sealed.stored {
                let at = lists[*group].iter().position(|id| id == block).expect("of these");
                self.sealed.insert((*group, *block), (sequence, at));
            }
        }
        self.held.push(taken);
    }

    fn find(&mut self, sequence: u8) {
        let mut found = Found::default();
        self.cache.find(b"", &tokens(sequence, 12), &mut found).expect("an index");
        let length = found.blocks;
        let mut holding = Holding::default();
        for (group, needed) in [length, length.min(2), length.min(1)].into_iter().enumerate() {
            let part = &found.groups[group];
            assert_eq!((part.first, part.blocks.len()), (length - needed, needed), "group {group}");
            for (at, block) in part.blocks.iter().enumerate() {
                let content = self.sealed.get(&(group, *block));
                assert_eq!(content, Some(&(sequence, part.first + at)), "block {block} of group {group}");
            }
            holding.blocks[group].clone_from(&part.blocks);
        }
        if length > 0 {
            self.held.push(holding);
        }
    }

    fn compact(&mut self, group: usize) {
        let moves = may_fail(self.cache.compact(group, usize::MAX, WAIT));
        let moves: BTreeMap<u32, u32> = moves.into_iter().flatten().map(|one| (one.from, one.to)).collect();
        for block in self.held.iter_mut().flat_map(|held| &mut held.blocks[group]) {
            *block = moves.get(block).copied().unwrap_or(*block);
        }
        let (bytes, sealed) = (self.bytes.clone(), self.sealed.clone());
        for (from, to) in &moves {
            self.bytes.remove(&(group, *to));
            self.sealed.remove(&(group, *to));
            if !moves.values().any(|target| target == from) {
                self.sealed.remove(&(group, *from));
            }
        }
        for (from, to) in &moves {
            if let Some(byte) = bytes.get(&(group, *from)) {
                self.bytes.insert((group, *to), *byte);
            }
            if let Some(content) = sealed.get(&(group, *from)) {
                self.sealed.insert((group, *to), *content);
            }
        }
    }

    fn apply(&mut self, op: &Op) {
        let count = self.held.len().max(1);
        match *op {
            Op::Take { sequence, blocks, is_sealed } => self.take(sequence, blocks, is_sealed),
            Op::Find { sequence } => self.find(sequence),
            Op::Fork { which } => {
                if let Some(held) = self.held.get(which % count).cloned() {
                    for (group, ids) in held.blocks.iter().enumerate() {
                        self.cache.fork(group, ids).expect("owned");
                    }
                    self.held.push(held);
                }
            }
            Op::Give { which, group: GROUPS } => {
                if which % count < self.held.len() {
                    let held = self.held.swap_remove(which % count);
                    self.free(&held);
                }
            }
            Op::Give { which, group } => {
                if let Some(held) = self.held.get_mut(which % count) {
                    // Every second one of one group, so that there is something to compact.
                    let every = std::mem::take(&mut held.blocks[group]);
                    held.blocks[group] = every.iter().copied().step_by(2).collect();
                    let given: Vec<u32> = every.into_iter().skip(1).step_by(2).collect();
                    self.cache.free(group, &given).expect("owned");
                }
            }
            Op::Forget { which, group } => {
                let block = self.held.get(which % count).and_then(|held| held.blocks[group].first().copied());
                if let Some(block) = block {
                    let could = self.cache.forget(group, block).expect("a block");
                    let was_sealed = self.sealed.remove(&(group, block)).is_some();
                    assert!(was_sealed || !could, "block {block} of group {group} was never sealed");
                }
            }
            Op::ForgetAll => {
                self.cache.forget_all().expect("an index");
                self.sealed.clear();
            }
            Op::Limit { mib } => {
                self.limit = ByteCount::mib(mib);
                self.cache.set_limit(self.limit, None).expect("below the reservation");
            }
            Op::Hint { group, blocks } => self.cache.hint(group, blocks).expect("a group"),
            Op::Trim { is_all: false } => drop(may_fail(self.cache.trim(ALL))),
            Op::Trim { is_all: true } => drop(may_fail(self.cache.trim_cached(ALL))),
            Op::Reclaim { pages } => {
                let bytes = if pages == 7 { ALL } else { ByteCount(pages * PAGE) };
                drop(may_fail(self.world.manager.reclaim(bytes, WAIT, "a test")));
            }
            Op::Compact { group } => self.compact(group),
            Op::Ballast => self.ballast.toggle(&self.world.budget),
        }
    }

    fn check(&self, must_enter: bool) {
        settle(&self.cache);
        let owners = self.owners();
        let mut live = 0;
        for group in 0..GROUPS {
            let layout = self.cache.layout(group).expect("a group");
            for block in 0..layout.blocks() {
                let state = self.cache.state_of(group, block).expect("a block");
                let expected = owners.get(&(group, block));
                live += u64::from(expected.is_some()) * layout.block_bytes().0;
                match (expected, state) {
                    (Some(owners), BlockState::Owned(counted)) => {
                        assert_eq!(counted, *owners, "{group}: {block}");
                    }
                    (None, BlockState::Free | BlockState::Cached) => {}
                    (owners, state) => {
                        unreachable!("group {group}: block {block} is {state:?} of {owners:?}")
                    }
                }
            }
        }
        let usage = self.cache.usage();
        assert_eq!((usage.live, usage.limit), (ByteCount(live), self.limit));
        let manager = Arc::clone(&self.world.manager);
        match manager.guard(if must_enter { WAIT } else { Duration::from_millis(20) }) {
            Ok(_guard) => {
                for place in owners.keys() {
                    if let Some(byte) = self.bytes.get(place) {
                        let mut read = [0; 64];
                        self.cache.region().read(self.offset(*place), &mut read).expect("on the device");
                        assert_eq!(read, [*byte; 64], "block {place:?}");
                    }
                }
            }
            Err(error) => assert!(!must_enter, "{error}"),
        }
    }

    fn end(mut self) {
        self.faults.heal();
        self.ballast.let_go(&self.world.budget);
        self.apply(&Op::Limit { mib: CACHE_MIB });
        // What could not be given back is asked for again.
        self.cache.trim(ALL).expect("the device works again");
        self.check(true);
        for held in std::mem::take(&mut self.held) {
            self.free(&held);
        }
        self.cache.forget_all().expect("an index");
        let deadline = Instant::now() + WAIT;
        while !self.cache.usage().mapped.is_zero() {
            assert!(Instant::now() < deadline, "{:?} stays", self.cache.usage());
            drop(self.cache.trim(ALL));
        }
        drop(self.cache);
        self.world.manager.reclaim(ALL, WAIT, "the end").expect("the device works again");
        self.world.check();
        assert_eq!(self.world.device_used(), ByteCount::ZERO);
        assert_eq!(self.world.manager.usage().host, ByteCount::ZERO, "a copy is left");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn whatever_fails_the_blocks_of_all_groups_have_their_owners_and_their_bytes(
        is_layered in any::<bool>(),
        ops in proptest::collection::vec((op(), fault()), 1..60),
    ) {
        let order = if is_layered { PlaneOrder::LayerMajor } else { PlaneOrder::BlockMajor };
        let mut model = Model::new(order);
        for (op, fault) in &ops {
            model.arm(*fault);
            model.apply(op);
            model.faults.heal();
            model.check(false);
        }
        model.end();
    }

    #[test]
    fn groups_take_memory_from_one_another_under_one_limit(
        // Which group grows next; what it took before is sealed and given back, so that only caching keeps it.
        turns in proptest::collection::vec((0_u8..4, 2_usize..12), 4..20),
    ) {
        let mut model = Model::new(PlaneOrder::BlockMajor);
        // Each turn fits by itself, and no two do.
        model.apply(&Op::Limit { mib: 10 });
        for (sequence, blocks) in &turns {
            model.apply(&Op::Take { sequence: *sequence, blocks: *blocks, is_sealed: true });
            prop_assert_eq!(model.held.len(), 1, "nothing but cached blocks is in the way");
            prop_assert_eq!(model.held[0].blocks[FULL].len(), *blocks);
            model.check(true);
            model.apply(&Op::Give { which: 0, group: GROUPS });
            model.apply(&Op::Find { sequence: *sequence });
            if !model.held.is_empty() {
                model.check(true);
                model.apply(&Op::Give { which: 0, group: GROUPS });
            }
        }
        model.end();
    }
}
