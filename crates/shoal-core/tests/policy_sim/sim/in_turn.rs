//! Models that one client uses one after the other, again and again, and nothing that fails.

use super::{ByteCount, Job, LOAD_ENDS_MS, Policy, Sim};

/// Between an answer and the next question.
pub(super) const PAUSE_MS: u64 = 200;
/// The client knows what each is to do: some take three times as long as others.
const WORK_MS: [u64; 5] = [200, 500, 300, 600, 400];

impl<'a> Sim<'a> {
    /// Three alike, with so much of the memory that they need.
    pub(crate) fn in_turn(policy: &'a dyn Policy, percent: u64) -> Self {
        let mut sim = Self::busy(policy, percent, true);
        sim.workers.iter_mut().for_each(|worker| worker.parked.clear());
        sim.in_turn = Some(Vec::new());
        sim
    }

    /// What each turn moved.
    pub(crate) fn moved(&self) -> &[ByteCount] {
        self.in_turn.as_deref().unwrap_or_default()
    }

    pub(super) fn ask_next(&mut self) {
        let Some(moved) = self.in_turn.as_mut().filter(|_| self.next_load_ms <= self.now_ms) else { return };
        if self.now_ms >= LOAD_ENDS_MS {
            return;
        }
        let turn = moved.len();
        moved.push(ByteCount::ZERO);
        self.next_load_ms = u64::MAX;
        let worker = &mut self.workers[turn % 3];
        let kv = worker.state.kv_min;
        worker.parked.push(Job { left_ms: WORK_MS[turn % WORK_MS.len()], kv, runs: false });
    }
}
