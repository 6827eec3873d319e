//! What a decision costs: plans for full shelves on which some models want room that others must give up.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use shoal_core::bytes::ByteCount;
use shoal_core::ids::ModelId;
use shoal_core::policy::{Action, ModelState, PendingRequest, ShelfState, plan};
use shoal_core::protocol::LeaseKind;

const NOW_MS: u64 = 600_000;
const MODELS: [u32; 3] = [10, 100, 1_000];
/// One model in so many asks.
const ASKS_ONE_IN: u32 = 5;

/// One model of each kind that a full shelf has: asleep and asking, idle, busy with some surplus, busy in its turn.
fn model(number: u32) -> ModelState {
    let whole = ByteCount::mib(512);
    let base = ModelState {
        id: ModelId(number),
        name: format!("model-{number}"),
        ready: true,
        weights_total: whole,
        weights_held: whole,
        overhead_held: ByteCount::mib(64),
        up: true,
        restore_us_per_mib: 100 + u64::from(number % 7) * 30,
        last_used_ms: NOW_MS - 1_000 - u64::from(number % 97) * 500,
        priority: i32::try_from(number % 3).unwrap_or(0) - 1,
        ..ModelState::default()
    };
    match number % ASKS_ONE_IN {
        0 => ModelState {
            weights_held: ByteCount::ZERO,
            up: false,
            parked: 2,
            wake_ordered: true,
            wanting_since_ms: Some(NOW_MS - 500 - u64::from(number % 89)),
            ..base
        },
        1 | 2 => base,
        3 => ModelState {
            kv_held: ByteCount::mib(128),
            kv_live: ByteCount::mib(96),
            active: 3,
            turn_since_ms: Some(NOW_MS - 5_000),
            ..base
        },
        _ => ModelState { active: 1, turn_since_ms: Some(NOW_MS - 100), ..base },
    }
}

/// Nothing is free, and every fifth model asks for all its weights.
fn full_shelf(models: u32) -> ShelfState {
    let models: Vec<_> = (0..models).map(model).collect();
    let requests = models
        .iter()
        .filter(|model| !model.is_whole())
        .map(|model| PendingRequest {
            model: model.id,
            request: 1,
            kind: LeaseKind::Weights,
            bytes: model.weights_total,
            bytes_min: model.weights_total,
            asked_ms: model.wanting_since_ms.unwrap_or(NOW_MS),
            deadline_ms: NOW_MS + 60_000,
        })
        .collect();
    let budget = models.iter().map(ModelState::held).sum();
    ShelfState {
        budget,
        extent: ByteCount::mib(2),
        quantum_ms: 2_000,
        models,
        requests,
        ..ShelfState::default()
    }
}

fn plans(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    for models in MODELS {
        let state = full_shelf(models);
        let orders = plan(&state, NOW_MS);
        let evicts = orders.actions.iter().filter(|action| matches!(action, Action::Evict { .. })).count();
        assert!(evicts >= state.requests.len(), "each request needs a victim: {evicts}");
        group.throughput(Throughput::Elements(u64::from(models)));
        group.bench_with_input(BenchmarkId::from_parameter(models), &state, |bencher, state| {
            bencher.iter(|| plan(state, NOW_MS));
        });
    }
    group.finish();
}

criterion_group!(benches, plans);
criterion_main!(benches);
