//! What one decision costs from end to end: who gives up how much (1,000 models), and which of their 100,000 extents.
//!
//! The policy plans in bytes; which extents those are is planned by each victim from its own page table, last layer first.
//! Both are timed together, for one model that wants to come back to a full device, under each policy.

use criterion::{Criterion, criterion_group, criterion_main};
use shoal_core::bytes::ByteCount;
use shoal_core::extent::ExtentRule;
use shoal_core::ids::ModelId;
use shoal_core::page_table::{Backing, RegionTable};
use shoal_core::policy::{Action, ModelState, PendingRequest, Policy, ShelfState, builtin};
use shoal_core::protocol::LeaseKind;
use shoal_core::tier::Tier;

const NOW_MS: u64 = 600_000;
const MODELS: u32 = 1_000;
const EXTENTS: u64 = 100;
const ALL: ByteCount = ByteCount(u64::MAX);

fn awake() -> RegionTable {
    let rule = ExtentRule { pages_max: 1, ..ExtentRule::default() };
    let mut table = RegionTable::carved(EXTENTS, rule, Backing::Keep);
    let indices: Vec<_> = table.extents().map(|(index, ..)| index).collect();
    for index in indices {
        table.add_copy(index, Tier::Host).expect("it exists");
    }
    for planned in table.plan_restore(ALL).moves {
        table.begin(planned).expect("planned");
        table.finish(planned.extent).expect("begun");
    }
    table
}

/// All awake and idle but the first, which wants to come back, and every fifth, which is busy.
fn shelf() -> ShelfState {
    let weights = ByteCount::mib(2 * EXTENTS);
    let models: Vec<ModelState> = (0..MODELS)
        .map(|number| ModelState {
            id: ModelId(number),
            name: format!("model-{number}"),
            ready: true,
            weights_total: weights,
            weights_held: if number == 0 { ByteCount::ZERO } else { weights },
            up: number != 0,
            wake_ordered: number == 0,
            parked: u32::from(number == 0),
            wanting_since_ms: (number == 0).then_some(NOW_MS - 5),
            active: u32::from(number % 5 == 4),
            turn_since_ms: (number % 5 == 4).then_some(NOW_MS - 500),
            restore_us_per_mib: 19 + u64::from(number % 7) * 10,
            last_used_ms: NOW_MS - 1_000 - u64::from(number % 97) * 500,
            uses_milli: 1_000 + u64::from(number % 31) * 700,
            uses_window_ms: u64::from(number % 31) * 20_000,
            ..ModelState::default()
        })
        .collect();
    let request = PendingRequest {
        model: ModelId(0),
        request: 1,
        kind: LeaseKind::Weights,
        bytes: weights,
        bytes_min: weights,
        asked_ms: NOW_MS - 5,
        deadline_ms: NOW_MS + 60_000,
    };
    let budget = models.iter().map(ModelState::held).sum();
    ShelfState {
        budget,
        extent: ByteCount::mib(2),
        quantum_ms: 3_000,
        models,
        requests: vec![request],
        ..ShelfState::default()
    }
}

/// Decides, and gives how many extents have to go.
fn decide(policy: &dyn Policy, state: &ShelfState, tables: &[RegionTable]) -> usize {
    let orders = policy.plan(state, NOW_MS).actions.into_iter().filter_map(|action| match action {
        Action::Evict { model, bytes, .. } => Some((model.0 as usize, bytes)),
        _ => None,
    });
    orders.map(|(place, bytes)| tables[place].plan_evict(bytes, ByteCount::ZERO).moves.len()).sum()
}

fn decisions(criterion: &mut Criterion) {
    let (state, tables) = (shelf(), vec![awake(); MODELS as usize]);
    let mut group = criterion.benchmark_group("decision/1000 models, 100000 extents");
    for name in ["value", "lru"] {
        let policy = builtin(name).expect("ours");
        let extents = decide(policy.as_ref(), &state, &tables);
        assert_eq!(extents as u64, EXTENTS, "one model's worth of extents goes");
        group.bench_function(name, |bencher| bencher.iter(|| decide(policy.as_ref(), &state, &tables)));
    }
    group.finish();
}

criterion_group!(benches, decisions);
criterion_main!(benches);
