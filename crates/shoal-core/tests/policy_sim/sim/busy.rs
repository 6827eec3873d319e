//! Models that are always busy: clients who ask anew when they are answered, and nothing that fails.

use super::{ByteCount, Job, ModelId, ModelState, Policy, RESTORE_US_PER_MIB, Sim, Worker, worker};

impl<'a> Sim<'a> {
    /// Three alike, all busy as long as the load lasts or only the first of them, with so much of the memory that they need.
    pub(crate) fn busy(policy: &'a dyn Policy, percent: u64, all: bool) -> Self {
        const CLIENTS: u64 = 4;
        let (weights_total, kv) = (ByteCount::mib(100), ByteCount::mib(4));
        let mut sim = Self::new(0, policy);
        sim.workers.truncate(3);
        for (number, place) in (0..3_u32).zip(0..) {
            let state = ModelState {
                id: ModelId(number),
                name: format!("model-{number}"),
                ready: true,
                weights_total,
                kv_min: kv,
                restore_us_per_mib: RESTORE_US_PER_MIB,
                ..ModelState::default()
            };
            let left_ms = 300;
            let parked = if all || number == 0 { CLIENTS } else { 0 };
            let parked = (0..parked).map(|_| Job { left_ms, kv, runs: false }).collect();
            let worker = Worker { state, parked, ..worker(&mut sim.random, 0, sim.budget) };
            if place < sim.workers.len() {
                sim.workers[place] = worker;
            } else {
                sim.workers.push(worker);
            }
        }
        let need = ByteCount(3 * (weights_total.0 + CLIENTS * kv.0));
        sim.budget = ByteCount(need.0 / 100 * percent);
        sim.budget_now = sim.budget;
        sim.quantum_ms = 3_000;
        sim.closed_ms = Some(300);
        sim
    }

    /// It was ordered to give weights up and has not yet: it cannot run with what it is given. That somebody may not stand
    /// beside it is another matter.
    pub(super) fn gives_weights_up(&self, model: ModelId) -> bool {
        let Worker { state, orders, .. } = &self.workers[model.0 as usize];
        let ordered: ByteCount = orders.iter().map(|order| order.left).sum();
        state.apart.is_empty()
            && ordered > state.kv_held.saturating_sub(state.kv_live)
            && !state.weights_held.is_zero()
    }
}
