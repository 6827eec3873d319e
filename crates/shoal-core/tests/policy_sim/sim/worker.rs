//! A worker: what it has, what it was told, and how it gives up what it is ordered to.

use shoal_core::bytes::ByteCount;
use shoal_core::policy::{ModelState, Rhythm, Turns, UseRate};

/// Work inside a worker.
#[derive(Clone, Copy)]
pub(super) struct Job {
    pub(super) left_ms: u64,
    pub(super) kv: ByteCount,
    /// It has its KV.
    pub(super) runs: bool,
}

pub(super) struct Order {
    pub(super) due_ms: u64,
    pub(super) left: ByteCount,
    pub(super) takes_weights: bool,
    pub(super) cached_last: bool,
    /// Nothing comes of it.
    pub(super) fails: bool,
}

pub(super) struct Worker {
    pub(super) state: ModelState,
    pub(super) loaded: bool,
    pub(super) parked: Vec<Job>,
    pub(super) jobs: Vec<Job>,
    pub(super) orders: Vec<Order>,
    pub(super) copied_at_ms: Option<u64>,
    /// Its process ended; all it held is back then, and it starts anew.
    pub(super) dead_until_ms: Option<u64>,
    pub(super) preloads: bool,
    pub(super) uses: UseRate,
    pub(super) rhythm: Rhythm,
}

impl Worker {
    /// Bytes came back, by order or not: open orders count them, the oldest first.
    pub(super) fn returned(&mut self, mut bytes: ByteCount) {
        for order in &mut self.orders {
            let part = order.left.min(bytes);
            order.left -= part;
            bytes -= part;
        }
    }

    /// Gives up what an order asks for: KV that nobody uses, weights, KV that is used. What is cached goes before or after the
    /// weights.
    pub(super) fn obey(&mut self, bytes: ByteCount, cached_last: bool) {
        let state = &mut self.state;
        let spare = state.kv_held.saturating_sub(state.kv_live);
        let first = if cached_last { spare.saturating_sub(state.kv_cached) } else { spare };
        let mut unused = first.min(bytes);
        let weights = state.weights_held.min(bytes - unused);
        unused += (spare - unused).min(bytes - unused - weights);
        state.kv_held -= unused;
        state.weights_held -= weights;
        if !weights.is_zero() {
            self.loaded = false;
            self.copied_at_ms = None;
        }
        let used = state.kv_held.min(bytes - unused - weights);
        state.kv_held -= used;
        self.returned(unused + weights + used);
        self.settle_kv();
    }

    pub(super) fn note_use(&mut self, turns: &mut Turns, now_ms: u64) {
        turns.note(self.state.id);
        self.rhythm.note(turns, now_ms);
        self.uses.note(now_ms);
        (self.state.uses_milli, self.state.uses_window_ms) = (self.uses.uses_milli, self.uses.window_ms);
    }

    /// Jobs run as far as there is KV for them, the first ones first.
    pub(super) fn settle_kv(&mut self) {
        let mut live = ByteCount::ZERO;
        for job in &mut self.jobs {
            job.runs = live + job.kv <= self.state.kv_held;
            if job.runs {
                live += job.kv;
            }
        }
        self.state.kv_live = live;
        self.state.kv_cached = self.state.kv_cached.min(self.state.kv_held - live);
    }
}
