//! What planning a list of copies costs: a block of 4 KiB takes the link 80 ns, and planning has to keep up with it.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use shoal_core::copy_plan::costs::Costs;
use shoal_core::copy_plan::{CopyPlan, Run};

const COUNT: u64 = 8192;

fn runs(place: impl Fn(u64) -> (u64, u64)) -> Vec<Run> {
    let run = |index| {
        let (source, target) = place(index);
        Run { source: source << 12, target: target << 12, bytes: 4096, seam: 0 }
    };
    (0..COUNT).map(run).collect()
}

fn plans(c: &mut Criterion) {
    let costs = Costs::guess(true, true);
    let scattered = runs(|index| (index * 7919 % COUNT, index * 104_729 % COUNT));
    let neighbours = runs(|index| (index, index + COUNT));
    for (name, runs) in [("scattered", scattered), ("neighbours", neighbours)] {
        c.bench_function(&format!("copy_plan/8k_{name}"), |bencher| {
            let plan = |runs| black_box(CopyPlan::new(runs, &costs, 8192));
            bencher.iter_batched(|| runs.clone(), plan, BatchSize::LargeInput);
        });
    }
}

criterion_group!(benches, plans);
criterion_main!(benches);
