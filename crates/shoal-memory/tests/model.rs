//! Random operations on three regions under budgets too small for them, against plain byte vectors.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use common::{PAGE, WAIT, World, noise, piece, source_file, world};
use proptest::prelude::*;
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_memory::{ErrorKind, KvBacking, LeaseSource, MemoryError, Region};

const ALL: ByteCount = ByteCount(u64::MAX);
const WEIGHTS_PAGES: u64 = 4;
const BLOCK: u64 = PAGE * 5 / 8;
const BLOCKS: u32 = 6;
const DEVICE_MIB: u64 = 40;
/// What somebody else holds until the end.
const BALLAST: ByteCount = ByteCount::mib(28);

#[derive(Clone, Debug)]
enum Op {
    Wake { region: usize, pages: u64 },
    Sleep { region: usize, keep: f64 },
    Evict { region: usize, pages: u64 },
    Write { region: usize, at: u64, byte: u8 },
    Reclaim { pages: u64 },
    Back { ids: Vec<u32> },
    Unback { ids: Vec<u32> },
    WriteBlock { block: u32, byte: u8 },
    Trim,
    Guard,
}

fn op() -> impl Strategy<Value = Op> {
    let ids = || proptest::collection::vec(0..BLOCKS, 1..4);
    prop_oneof![
        (0_usize..2, 0_u64..6).prop_map(|(region, pages)| Op::Wake { region, pages }),
        (0_usize..2, 0.0_f64..1.0).prop_map(|(region, keep)| Op::Sleep { region, keep }),
        (0_usize..3, 0_u64..4).prop_map(|(region, pages)| Op::Evict { region, pages }),
        (0_usize..2, 0_u64..WEIGHTS_PAGES * PAGE, any::<u8>()).prop_map(|(region, at, byte)| Op::Write {
            region,
            at,
            byte
        }),
        (0_u64..8).prop_map(|pages| Op::Reclaim { pages }),
        ids().prop_map(|ids| Op::Back { ids }),
        ids().prop_map(|ids| Op::Unback { ids }),
        (0..BLOCKS, any::<u8>()).prop_map(|(block, byte)| Op::WriteBlock { block, byte }),
        Just(Op::Trim),
        Just(Op::Guard),
    ]
}

struct Model {
    world: World,
    regions: Vec<Region>,
    plain: Vec<Vec<u8>>,
    kv: Arc<KvBacking>,
    blocks: BTreeSet<u32>,
    /// Blocks written since they were backed: their byte is known.
    written: BTreeSet<u32>,
}

fn may_fail(result: Result<(), MemoryError>) {
    if let Err(error) = result {
        assert!(matches!(error.kind(), ErrorKind::Lease | ErrorKind::HostBudget), "{error}");
    }
}

impl Model {
    fn new() -> Self {
        let world = world(DEVICE_MIB, 16);
        world
            .budget
            .acquire(LeaseKind::Overhead, BALLAST, BALLAST, Duration::ZERO, "somebody else")
            .expect("nothing is held yet");
        let plain = vec![noise(WEIGHTS_PAGES * PAGE, 1), noise(WEIGHTS_PAGES * PAGE, 2)];
        let path = source_file(world.dir.path(), &plain[1]);
        let first = world.weights(WEIGHTS_PAGES, &plain[0]);
        let second = world.region("sourced", WEIGHTS_PAGES, LeaseKind::Weights);
        second
            .stage(ByteCount::ZERO, &plain[1], Some(piece(&path, 0, WEIGHTS_PAGES * PAGE)))
            .expect("verified");
        second.seal().expect("sealed");
        let region = world.region("kv", 4, LeaseKind::Kv);
        let kv = KvBacking::new(&region, ByteCount(BLOCK), BLOCKS).expect("fits");
        let kv_plain = vec![0; usize::try_from(4 * PAGE).expect("small")];
        let plain = [plain, vec![kv_plain]].concat();
        Self {
            world,
            regions: vec![first, second, region],
            plain,
            kv,
            blocks: BTreeSet::new(),
            written: BTreeSet::new(),
        }
    }

    fn write(&mut self, region: usize, at: u64, byte: u8) -> bool {
        let written = self.regions[region].write(ByteCount(at), &[byte]);
        match written {
            Ok(()) => self.plain[region][usize::try_from(at).expect("small")] = byte,
            Err(ref error) => assert_eq!(error.kind(), ErrorKind::Region, "{error}"),
        }
        written.is_ok()
    }

    fn apply(&mut self, op: Op) {
        let manager = &self.world.manager;
        match op {
            Op::Wake { region, pages } => {
                let bytes = if pages == 5 { ALL } else { ByteCount(pages * PAGE) };
                may_fail(
                    self.regions[region].restore(bytes, WAIT).and_then(|wake| wake.wait(WAIT)).map(drop),
                );
            }
            Op::Sleep { region, keep } => may_fail(self.regions[region].sleep(keep, false, WAIT).map(drop)),
            Op::Evict { region, pages } => {
                may_fail(self.regions[region].evict(ByteCount(pages * PAGE), WAIT).map(drop));
            }
            Op::Write { region, at, byte } => drop(self.write(region, at, byte)),
            Op::Reclaim { pages } => {
                let report = manager.reclaim(ByteCount(pages * PAGE), WAIT, "a test").expect("no step runs");
                may_fail(report.error.map_or(Ok(()), |error| Err(*error)));
            }
            Op::Back { ids } => {
                let is_legal = ids.iter().collect::<BTreeSet<_>>().len() == ids.len()
                    && ids.iter().all(|id| !self.blocks.contains(id));
                match self.kv.back(&ids) {
                    Ok(true) => {
                        assert!(is_legal);
                        self.blocks.extend(ids);
                    }
                    Ok(false) => assert!(is_legal),
                    Err(error) => assert!(error.kind() == ErrorKind::Blocks && !is_legal, "{error}"),
                }
            }
            Op::Unback { ids } => {
                let is_legal = ids.iter().collect::<BTreeSet<_>>().len() == ids.len()
                    && ids.iter().all(|id| self.blocks.contains(id));
                assert_eq!(self.kv.unback(&ids).is_ok(), is_legal);
                if is_legal {
                    self.blocks.retain(|block| !ids.contains(block));
                    self.written.retain(|block| !ids.contains(block));
                }
            }
            Op::WriteBlock { block, byte } => {
                if self.blocks.contains(&block) && self.write(2, u64::from(block) * BLOCK + 17, byte) {
                    self.written.insert(block);
                }
            }
            Op::Trim => drop(self.kv.trim(ALL).expect("the turn is free")),
            Op::Guard => match manager.guard(WAIT) {
                Ok(_guard) => assert!(self.regions.iter().all(|region| region.missing_bytes().is_zero())),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Lease, "{error}"),
            },
        }
    }

    fn check(&self) {
        self.world.manager.check_invariants().expect("invariants");
        let held: ByteCount = LeaseKind::ALL.into_iter().map(|kind| self.world.budget.held(kind)).sum();
        assert!(held <= self.world.budget.budget(), "I1");
        assert!(self.world.device_used() + BALLAST == held || self.world.device_used() == held, "I1: {held}");
        assert!(self.world.manager.usage().host <= ByteCount::mib(16), "I1 on the host");
    }

    /// With room for everything, every byte that anybody wrote is there.
    fn compare(self) {
        self.world.budget.give_back(LeaseKind::Overhead, BALLAST);
        let _guard = self.world.manager.guard(WAIT).expect("room for all");
        for (region, plain) in self.regions.iter().zip(&self.plain).take(2) {
            let mut bytes = vec![0; plain.len()];
            region.read(ByteCount::ZERO, &mut bytes).expect("awake");
            assert!(bytes == *plain, "{} lost bytes", region.name());
        }
        for block in &self.written {
            let at = usize::try_from(u64::from(*block) * BLOCK + 17).expect("small");
            let mut byte = [0];
            self.regions[2].read(ByteCount(at as u64), &mut byte).expect("backed");
            assert_eq!(byte[0], self.plain[2][at], "block {block}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn no_byte_is_lost_whatever_is_asked(ops in proptest::collection::vec(op(), 1..25)) {
        let mut model = Model::new();
        for op in ops {
            model.apply(op);
            model.check();
        }
        model.compare();
    }
}
