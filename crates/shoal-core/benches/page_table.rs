//! What planning costs: evict and restore on 100,000 extents, and backing of KV blocks.

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use shoal_core::bytes::ByteCount;
use shoal_core::extent::{ExtentRule, PageRun};
use shoal_core::kv::backing::BlockBacking;
use shoal_core::page_table::{Backing, RegionTable};
use shoal_core::tier::Tier;

const EXTENTS: u64 = 100_000;
const ALL: ByteCount = ByteCount(u64::MAX);

fn asleep() -> RegionTable {
    let rule = ExtentRule { pages_max: 1, ..ExtentRule::default() };
    let mut table = RegionTable::carved(EXTENTS, rule, Backing::Keep);
    let indices: Vec<_> = table.extents().map(|(index, ..)| index).collect();
    for index in indices {
        table.add_copy(index, Tier::Host).expect("it exists");
    }
    table
}

fn run(table: &mut RegionTable) {
    for planned in table.plan_restore(ALL).moves {
        table.begin(planned).expect("planned");
        table.finish(planned.extent).expect("begun");
    }
}

fn plans(criterion: &mut Criterion) {
    let sleeping = asleep();
    let mut awake = sleeping.clone();
    run(&mut awake);
    criterion.bench_function("plan_restore/100k", |bencher| bencher.iter(|| sleeping.plan_restore(ALL)));
    criterion
        .bench_function("plan_evict/100k", |bencher| bencher.iter(|| awake.plan_evict(ALL, ByteCount::ZERO)));
    criterion.bench_function("plan_evict/16_of_100k", |bencher| {
        bencher.iter(|| awake.plan_evict(ByteCount::mib(32), ByteCount::ZERO));
    });
    criterion.bench_function("restore/100k", |bencher| {
        bencher.iter_batched_ref(|| sleeping.clone(), run, BatchSize::LargeInput);
    });
}

fn blocks(criterion: &mut Criterion) {
    let mut backing = BlockBacking::new(ByteCount(720 << 10), 100_000).expect("a layout");
    backing.committed(PageRun::covering(ByteCount::ZERO, backing.bytes())).expect("in range");
    let ids: Vec<u32> = (0..16).map(|id| id * 37).collect();
    criterion.bench_function("back_and_unback/16", |bencher| {
        bencher.iter(|| {
            backing.back(&ids).expect("free");
            backing.unback(&ids).expect("backed")
        });
    });
}

criterion_group!(benches, plans, blocks);
criterion_main!(benches);
