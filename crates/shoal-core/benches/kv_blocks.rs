//! What taking and giving back KV blocks costs, in a fresh cache and in one whose 400 granules are all part-filled.

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::compact;
use shoal_core::kv::layout::{BlockShape, CacheLayout, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::state::KvState;

const GRANULES: u32 = 800;

/// 64 blocks of 32 KiB in each granule of 2 MiB, all of it mapped.
fn mapped() -> KvState {
    let group = GroupSpec {
        name: "full".to_owned(),
        layers: 1,
        shape: BlockShape::Attention { tokens: 16, kv_heads: 4, head_dim: 128, window: None },
        element_bytes: 2,
    };
    let spec = CacheSpec {
        groups: vec![group],
        order: PlaneOrder::BlockMajor,
        bytes: ByteCount::mib(u64::from(GRANULES) * 2),
        granule_bytes_max: ByteCount::mib(2),
    };
    let mut state =
        KvState::new(CacheLayout::new(&spec).expect("a layout"), ByteCount::ZERO, None).expect("no index");
    let blocks = state.pool(0).expect("a group").blocks();
    for granule in state.plan_growth(0, blocks).expect("a group").expect("room") {
        state.mapped(granule).expect("coming");
    }
    state
}

/// 400 granules of which every third block is free.
fn fragmented() -> KvState {
    let mut state = mapped();
    let mut ids = vec![0_u32; 400 * 64];
    assert!(state.alloc(0, &mut ids).expect("a group"));
    let free: Vec<u32> = ids.into_iter().step_by(3).collect();
    state.free(0, &free).expect("owned");
    state
}

fn blocks(criterion: &mut Criterion) {
    for (name, mut state) in [("fresh", mapped()), ("fragmented", fragmented())] {
        let mut group = criterion.benchmark_group(format!("alloc_and_free/{name}"));
        for count in [1_usize, 16, 256, 4096] {
            let mut ids = vec![0_i64; count];
            group.throughput(Throughput::Elements(count as u64));
            group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
                bencher.iter(|| {
                    assert!(state.alloc(0, &mut ids).expect("a group"));
                    state.free(0, &ids).expect("owned")
                });
            });
        }
        group.finish();
    }
}

fn plans(criterion: &mut Criterion) {
    let state = fragmented();
    criterion.bench_function("plan_compaction/400_granules", |bencher| {
        bencher.iter(|| compact::plan(state.pool(0).expect("a group"), usize::MAX));
    });
    let group = || {
        let mut state = mapped();
        for granule in state.plan_reclaim(ByteCount(u64::MAX), &state.clocks()).expect("planned") {
            state.gone(granule).expect("leaving");
        }
        state
    };
    criterion.bench_function("plan_growth/800_granules", |bencher| {
        bencher.iter_batched_ref(group, |state| state.plan_growth(0, 51_200), BatchSize::LargeInput);
    });
}

criterion_group!(benches, blocks, plans);
criterion_main!(benches);
