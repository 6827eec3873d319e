//! Random histories of a KV cache against a plain model: blocks that are taken, shared, sealed, found, moved and given
//! back, under limits, reclaims and another's lease, while device calls fail. Whatever happens, each block has the owners
//! that the model counts, and holds the bytes that its owner wrote.

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
use shoal_core::kv::prefix::{Found, Start};
use shoal_core::kv::reuse::ReuseOptions;
use shoal_device::{Device, FaultDevice};
use shoal_memory::{KvCache, KvCacheSpec};

const ALL: ByteCount = ByteCount(u64::MAX);
const BLOCK_TOKENS: u32 = 2;
const CACHE_MIB: u64 = 12;
const DEVICE_MIB: u64 = 20;

#[derive(Clone, Debug)]
enum Op {
    /// Take so many blocks for the sequence of that number, write them, and seal them if it says so.
    Take {
        sequence: u8,
        blocks: usize,
        is_sealed: bool,
    },
    /// Find the sequence of that number again.
    Find {
        sequence: u8,
    },
    Fork {
        which: usize,
    },
    Give {
        which: usize,
        blocks: usize,
    },
    Forget {
        which: usize,
    },
    ForgetAll,
    Limit {
        mib: u64,
    },
    Hint {
        blocks: u32,
    },
    Trim,
    Reclaim {
        pages: u64,
    },
    Compact,
    /// Somebody else takes memory, or gives it back.
    Ballast,
}

fn op() -> impl Strategy<Value = Op> {
    let which = || 0_usize..8;
    prop_oneof![
        6 => (0_u8..6, 1_usize..20, any::<bool>())
            .prop_map(|(sequence, blocks, is_sealed)| Op::Take { sequence, blocks, is_sealed }),
        4 => (0_u8..6).prop_map(|sequence| Op::Find { sequence }),
        2 => which().prop_map(|which| Op::Fork { which }),
        6 => (which(), 1_usize..20).prop_map(|(which, blocks)| Op::Give { which, blocks }),
        1 => which().prop_map(|which| Op::Forget { which }),
        1 => Just(Op::ForgetAll),
        2 => (0_u64..=CACHE_MIB).prop_map(|mib| Op::Limit { mib }),
        1 => (0_u32..20).prop_map(|blocks| Op::Hint { blocks }),
        1 => Just(Op::Trim),
        2 => (0_u64..8).prop_map(|pages| Op::Reclaim { pages }),
        4 => Just(Op::Compact),
        1 => Just(Op::Ballast),
    ]
}

/// The n-th device call of an operation fails, as an error or as a full device.
fn fault() -> impl Strategy<Value = Option<(u64, bool)>> {
    let nth = prop_oneof![2 => 1_u64..12, 1 => 1_u64..40];
    prop_oneof![2 => Just(None), 1 => (nth, any::<bool>()).prop_map(Some)]
}

/// Blocks that somebody owns, in order, and what was written to each.
#[derive(Clone, Debug)]
struct Holding {
    sequence: u8,
    blocks: Vec<u32>,
}

struct Model {
    world: World,
    faults: Arc<FaultDevice>,
    cache: KvCache,
    held: Vec<Holding>,
    /// The byte of each block that was ever written, until it is taken anew.
    bytes: BTreeMap<u32, u8>,
    /// What sealed blocks were sealed as: they may be found, or may have been evicted.
    sealed: BTreeMap<u32, (u8, usize)>,
    limit: ByteCount,
    ballast: Ballast,
    stamp: u8,
}

/// The tokens of the first blocks of a sequence.
fn tokens(sequence: u8, blocks: usize) -> Vec<u32> {
    let count = u32::try_from(blocks).expect("few") * BLOCK_TOKENS;
    (0..count).map(|at| u32::from(sequence) * 1000 + at).collect()
}

impl Model {
    fn new(order: PlaneOrder, kib: u32) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let faults = FaultDevice::new(open(dir.path(), 64));
        let device = Arc::clone(&faults) as Arc<dyn Device>;
        let world = pooled_world_on(dir, device, DEVICE_MIB, 64, keeping(4));
        let shape = BlockShape::Latent { tokens: BLOCK_TOKENS, dim: (kib << 10) / BLOCK_TOKENS };
        let group = GroupSpec { name: "full".to_owned(), layers: 2, shape, element_bytes: 1 };
        let bytes = ByteCount::mib(CACHE_MIB);
        let spec = CacheSpec { groups: vec![group], order, bytes, granule_bytes_max: ByteCount::mib(4) };
        let mut spec = KvCacheSpec::new("kv", spec);
        spec.reuse = Some(ReuseOptions::default());
        // Long enough for a busy machine: what is refused then is refused for a reason.
        spec.patience = Duration::from_secs(5);
        let cache = world.manager.kv_cache(spec).expect("addresses");
        let limit = cache.usage().limit;
        let held = Vec::new();
        Self {
            world,
            faults,
            cache,
            held,
            bytes: BTreeMap::new(),
            sealed: BTreeMap::new(),
            limit,
            ballast: Ballast::default(),
            stamp: 0,
        }
    }

    fn owners(&self) -> BTreeMap<u32, u32> {
        let mut owners = BTreeMap::new();
        for block in self.held.iter().flat_map(|held| &held.blocks) {
            *owners.entry(*block).or_insert(0) += 1;
        }
        owners
    }

    fn arm(&self, fault: Option<(u64, bool)>) {
        arm(&self.faults, self.world.device.info().id, fault);
    }

    fn piece(&self, block: u32) -> ByteCount {
        self.cache.layout(0).expect("a group").pieces(block).next().expect("one").0
    }

    fn take(&mut self, sequence: u8, count: usize, is_sealed: bool) {
        let mut ids = vec![u32::MAX; count];
        let owners = self.owners();
        let outcome = self.cache.alloc(0, &mut ids);
        if !is_given(outcome) {
            return;
        }
        for id in &ids {
            assert!(!owners.contains_key(id), "block {id} has an owner");
            // What it held cannot be found any more.
            self.sealed.remove(id);
            self.bytes.remove(id);
        }
        // Somebody else's lease may be in the way of what lies on the host; then nothing is written.
        let manager = Arc::clone(&self.world.manager);
        if let Ok(_guard) = manager.guard(WAIT) {
            for id in &ids {
                self.stamp = self.stamp.wrapping_add(1).max(1);
                if self.cache.region().write(self.piece(*id), &[self.stamp; 64]).is_ok() {
                    self.bytes.insert(*id, self.stamp);
                }
            }
        }
        let is_written = ids.iter().all(|id| self.bytes.contains_key(id));
        if is_sealed && is_written {
            let sealed = self.cache.seal(Start::Salt(b""), &tokens(sequence, count), &[&ids]).expect("owned");
            assert_eq!(sealed.blocks, count, "no hole, and room in the index");
            for (_, block) in &sealed.stored {
                let at = ids.iter().position(|id| id == block).expect("of these");
                self.sealed.insert(*block, (sequence, at));
            }
        }
        self.held.push(Holding { sequence, blocks: ids });
    }

    fn find(&mut self, sequence: u8) {
        let mut found = Found::default();
        self.cache.find(b"", &tokens(sequence, 20), &mut found).expect("an index");
        let blocks = found.groups[0].blocks.clone();
        assert_eq!(blocks.len(), found.blocks);
        for (at, block) in blocks.iter().enumerate() {
            assert_eq!(self.sealed.get(block), Some(&(sequence, at)), "block {block} was sealed as that");
        }
        if !blocks.is_empty() {
            self.held.push(Holding { sequence, blocks });
        }
    }

    fn apply(&mut self, op: &Op) {
        let count = self.held.len().max(1);
        match *op {
            Op::Take { sequence, blocks, is_sealed } => self.take(sequence, blocks, is_sealed),
            Op::Find { sequence } => self.find(sequence),
            Op::Fork { which } => {
                if let Some(held) = self.held.get(which % count).cloned() {
                    self.cache.fork(0, &held.blocks).expect("owned");
                    self.held.push(held);
                }
            }
            Op::Give { which, blocks } => {
                if let Some(held) = self.held.get_mut(which % count) {
                    // From its end, or every second one of it, so that there is something to compact.
                    let kept = held.blocks.len().saturating_sub(blocks);
                    let given = if blocks % 2 == 0 && held.blocks.len() > 1 {
                        let every = held.blocks.clone();
                        held.blocks = every.iter().copied().step_by(2).collect();
                        every.into_iter().skip(1).step_by(2).collect()
                    } else {
                        held.blocks.split_off(kept)
                    };
                    self.cache.free(0, &given).expect("owned");
                }
                self.held.retain(|held| !held.blocks.is_empty());
            }
            Op::Forget { which } => {
                if let Some(block) = self.held.get(which % count).map(|held| held.blocks[0]) {
                    let could = self.cache.forget(0, block).expect("a block");
                    assert_eq!(could, self.sealed.remove(&block).is_some());
                }
            }
            Op::ForgetAll => {
                self.cache.forget_all().expect("an index");
                self.sealed.clear();
            }
            Op::Limit { mib } => {
                self.cache.set_limit(ByteCount::mib(mib), None).expect("below the reservation");
                self.limit = ByteCount::mib(mib);
            }
            Op::Hint { blocks } => self.cache.hint(0, blocks).expect("a group"),
            Op::Trim => drop(may_fail(self.cache.trim(ALL))),
            Op::Reclaim { pages } => {
                let bytes = if pages == 7 { ALL } else { ByteCount(pages * PAGE) };
                drop(may_fail(self.world.manager.reclaim(bytes, WAIT, "a test")));
            }
            Op::Compact => {
                let moves = may_fail(self.cache.compact(0, usize::MAX, WAIT));
                let moves: BTreeMap<u32, u32> =
                    moves.into_iter().flatten().map(|one| (one.from, one.to)).collect();
                for block in self.held.iter_mut().flat_map(|held| &mut held.blocks) {
                    *block = moves.get(block).copied().unwrap_or(*block);
                }
                let (bytes, sealed) = (self.bytes.clone(), self.sealed.clone());
                for (from, to) in &moves {
                    match bytes.get(from) {
                        Some(byte) => drop(self.bytes.insert(*to, *byte)),
                        None => drop(self.bytes.remove(to)),
                    }
                    if !moves.values().any(|target| target == from) {
                        self.sealed.remove(from);
                    }
                    match sealed.get(from) {
                        Some(content) => drop(self.sealed.insert(*to, *content)),
                        None => drop(self.sealed.remove(to)),
                    }
                }
            }
            Op::Ballast => self.ballast.toggle(&self.world.budget),
        }
    }

    /// The owners and figures are the model's, and so are the bytes where a guard can be had.
    fn check(&self, must_enter: bool) {
        settle(&self.cache);
        let owners = self.owners();
        let blocks = self.cache.layout(0).expect("a group").blocks();
        for block in 0..blocks {
            let state = self.cache.state_of(0, block).expect("a block");
            match (owners.get(&block), state) {
                (Some(owners), BlockState::Owned(counted)) => assert_eq!(counted, *owners, "block {block}"),
                (None, BlockState::Free | BlockState::Cached) => {}
                (expected, state) => unreachable!("block {block} is {state:?}, its owners are {expected:?}"),
            }
        }
        let usage = self.cache.usage();
        let block_bytes = self.cache.layout(0).expect("a group").block_bytes();
        assert_eq!(usage.live, ByteCount(block_bytes.0 * owners.len() as u64));
        assert_eq!(usage.limit, self.limit);
        let manager = Arc::clone(&self.world.manager);
        let entered = manager.guard(if must_enter { WAIT } else { Duration::from_millis(20) });
        match entered {
            Ok(_guard) => {
                for (block, owners) in &owners {
                    if let Some(byte) = self.bytes.get(block) {
                        let mut read = [0; 64];
                        self.cache.region().read(self.piece(*block), &mut read).expect("on the device");
                        assert_eq!(read, [*byte; 64], "block {block} of {owners} owners");
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
            assert!(held.sequence < 6);
            self.cache.free(0, &held.blocks).expect("owned");
        }
        self.cache.forget_all().expect("an index");
        self.world.manager.reclaim(ALL, WAIT, "the end").expect("the device works again");
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
    #![proptest_config(ProptestConfig { cases: 100, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn whatever_fails_each_block_has_its_owners_and_its_bytes(
        is_layered in any::<bool>(),
        // In each of two layers; the second lies across the edges of granules.
        kib in prop_oneof![Just(128_u32), Just(88)],
        ops in proptest::collection::vec((op(), fault()), 1..60),
    ) {
        let order = if is_layered { PlaneOrder::LayerMajor } else { PlaneOrder::BlockMajor };
        let mut model = Model::new(order, kib);
        for (op, fault) in &ops {
            model.arm(*fault);
            model.apply(op);
            model.faults.heal();
            model.check(false);
        }
        model.end();
    }
}
