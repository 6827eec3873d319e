//! A device and its models in virtual time: requests come by a trace, weights move over one link, a policy decides.

use std::collections::BTreeMap;

use shoal_core::bytes::ByteCount;
use shoal_core::ids::ModelId;
use shoal_core::policy::thrash::{Thrash, ThrashFigures};
use shoal_core::policy::{
    Action, ModelState, PendingRequest, Policy, Rhythm, ShelfState, Turns, UseRate, check,
};
use shoal_core::protocol::LeaseKind;

/// What giving memory up takes: a fence between two steps and unmapping.
const YIELD_MS: u64 = 10;
/// The extent in which memory is taken.
const EXTENT: ByteCount = ByteCount::mib(64);

/// One model of a trace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) weights: ByteCount,
    /// What bringing a MiB back takes.
    pub(crate) restore_us_per_mib: u64,
}

/// A request of a trace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) at_ms: u64,
    pub(crate) model: usize,
    /// How long it runs once its model is there.
    pub(crate) runs_ms: u64,
}

/// What came of a trace.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// How long each request waited for its model (milliseconds), sorted.
    pub(crate) waits_ms: Vec<u64>,
    pub(crate) moved: ByteCount,
    pub(crate) evictions: u64,
    /// Over the whole trace.
    pub(crate) thrash: ThrashFigures,
    pub(crate) plans: u64,
}

struct Model {
    kind: Kind,
    state: ModelState,
    uses: UseRate,
    rhythm: Rhythm,
    idle_since_ms: Option<u64>,
    parked: Vec<Arrival>,
    ends_ms: Vec<u64>,
    arrives_ms: Option<u64>,
    /// Orders: when they are carried out, and bytes.
    orders: Vec<(u64, ByteCount)>,
    thrash: Thrash,
    served: ByteCount,
}

pub(crate) struct World<'a> {
    policy: &'a dyn Policy,
    budget: ByteCount,
    quantum_ms: u64,
    now_ms: u64,
    link_free_ms: u64,
    models: Vec<Model>,
    turns: Turns,
    asked: BTreeMap<ModelId, PendingRequest>,
    requests: u64,
    again_at_ms: Option<u64>,
    outcome: Outcome,
}

impl<'a> World<'a> {
    pub(crate) fn new(policy: &'a dyn Policy, budget: ByteCount, quantum_ms: u64, kinds: &[Kind]) -> Self {
        let model = |(id, kind): (u32, &Kind)| Model {
            kind: *kind,
            state: ModelState {
                id: ModelId(id),
                name: format!("model-{id}"),
                ready: true,
                weights_total: kind.weights,
                restore_us_per_mib: kind.restore_us_per_mib,
                ..ModelState::default()
            },
            uses: UseRate::default(),
            rhythm: Rhythm::default(),
            idle_since_ms: None,
            parked: Vec::new(),
            ends_ms: Vec::new(),
            arrives_ms: None,
            orders: Vec::new(),
            thrash: Thrash::default(),
            served: ByteCount::ZERO,
        };
        Self {
            policy,
            budget,
            quantum_ms,
            now_ms: 0,
            link_free_ms: 0,
            models: (0..).zip(kinds).map(model).collect(),
            turns: Turns::default(),
            asked: BTreeMap::new(),
            requests: 0,
            again_at_ms: None,
            outcome: Outcome::default(),
        }
    }

    /// Plays a trace to its end.
    pub(crate) fn play(mut self, trace: &[Arrival]) -> Outcome {
        let mut coming = trace.iter().copied().peekable();
        loop {
            while let Some(arrival) = coming.next_if(|arrival| arrival.at_ms <= self.now_ms) {
                self.models[arrival.model].parked.push(arrival);
            }
            (0..self.models.len()).for_each(|place| self.happen(place));
            self.settle();
            let next = self.next_ms().into_iter().chain(coming.peek().map(|arrival| arrival.at_ms)).min();
            let Some(next) = next else { break };
            self.now_ms = next.max(self.now_ms + 1);
        }
        assert_eq!(self.outcome.waits_ms.len(), trace.len(), "every request is served");
        self.outcome.waits_ms.sort_unstable();
        let figures = |model: &Model| ThrashFigures { thrashed: model.thrash.total(), served: model.served };
        self.outcome.thrash = self.models.iter().map(figures).sum();
        self.outcome
    }

    fn next_ms(&self) -> Option<u64> {
        let of = |model: &Model| {
            let orders = model.orders.iter().map(|(due, _)| *due).min();
            [orders, model.arrives_ms, model.ends_ms.iter().copied().min()].into_iter().flatten().min()
        };
        self.models.iter().filter_map(of).chain(self.again_at_ms).min()
    }

    fn happen(&mut self, place: usize) {
        let now_ms = self.now_ms;
        let model = &mut self.models[place];
        let due: ByteCount =
            model.orders.iter().filter(|(due, _)| *due <= now_ms).map(|(_, bytes)| *bytes).sum();
        if !due.is_zero() {
            model.orders.retain(|(due, _)| *due > now_ms);
            model.state.weights_held = model.state.weights_held.saturating_sub(due);
            model.thrash.left(due, now_ms);
            (model.state.up, model.arrives_ms) = (false, None);
        }
        if model.arrives_ms.is_some_and(|at| at <= now_ms) {
            model.arrives_ms = None;
            (model.state.up, model.state.wake_ordered) = (true, false);
            model.state.restored_ms = Some(now_ms);
        }
        let before = model.ends_ms.len();
        model.ends_ms.retain(|at| *at > now_ms);
        if model.ends_ms.len() < before {
            model.state.last_used_ms = now_ms;
            if model.ends_ms.is_empty() {
                model.idle_since_ms = Some(now_ms);
            }
        }
    }

    /// Those who can begin do.
    fn begin(&mut self, place: usize) {
        let (now_ms, contended) = (self.now_ms, !self.asked.is_empty());
        let model = &mut self.models[place];
        model.state.ordered = model.orders.iter().map(|(_, bytes)| *bytes).sum();
        if model.state.up && model.state.ordered.is_zero() {
            for arrival in std::mem::take(&mut model.parked) {
                let was_idle = model.ends_ms.is_empty();
                let waited = now_ms - arrival.at_ms;
                let pause = model.idle_since_ms.take().map(|since| now_ms - since);
                if was_idle && (waited > 0 || pause.is_none_or(|pause| pause > model.state.restore_ms())) {
                    model.uses.note(now_ms);
                    self.turns.note(model.state.id);
                    model.rhythm.note(&self.turns, now_ms);
                    model.state.uses_milli = model.uses.uses_milli;
                    model.state.uses_window_ms = model.uses.window_ms;
                }
                if let Some(pause) = pause {
                    let known = model.state.pause_ms.unwrap_or(pause);
                    model.state.pause_ms = Some(known.midpoint(pause));
                }
                if was_idle && !contended {
                    model.state.turn_since_ms = None;
                }
                model.ends_ms.push(now_ms + arrival.runs_ms);
                model.state.last_used_ms = now_ms;
                model.served += model.kind.weights;
                self.outcome.waits_ms.push(waited);
            }
        }
        let state = &mut model.state;
        state.active = u32::try_from(model.ends_ms.len()).unwrap_or(u32::MAX);
        state.parked = u32::try_from(model.parked.len()).unwrap_or(u32::MAX);
        if !state.is_whole() {
            state.turn_since_ms = None;
        } else if state.up && state.is_busy() && state.turn_since_ms.is_none() {
            state.turn_since_ms = Some(now_ms);
        }
        let asks = self.asked.contains_key(&state.id);
        let wants = !state.can_run() && (asks || state.is_busy());
        state.wanting_since_ms = wants.then(|| state.wanting_since_ms.unwrap_or(now_ms));
        state.rising_until_ms = model.arrives_ms;
        // One whose weights were taken while it ran goes on when they are back.
        let comes = state.wake_ordered || state.active > 0;
        let missing = state.weights_total.saturating_sub(state.weights_held);
        if comes && !state.up && model.arrives_ms.is_none() && !asks && state.ordered.is_zero() {
            if missing.is_zero() {
                model.arrives_ms = Some(now_ms);
                state.rising_until_ms = model.arrives_ms;
                return;
            }
            self.requests += 1;
            let request = PendingRequest {
                model: state.id,
                request: self.requests,
                kind: LeaseKind::Weights,
                bytes: missing,
                bytes_min: missing,
                asked_ms: now_ms,
                deadline_ms: u64::MAX,
            };
            self.asked.insert(request.model, request);
        }
    }

    fn settle(&mut self) {
        loop {
            (0..self.models.len()).for_each(|place| self.begin(place));
            for model in &mut self.models {
                model.state.expected_ms = model.rhythm.next_ms(&self.turns, self.now_ms);
            }
            let state = ShelfState {
                budget: self.budget,
                extent: EXTENT,
                quantum_ms: self.quantum_ms,
                models: self.models.iter().map(|model| model.state.clone()).collect(),
                requests: self.asked.values().cloned().collect(),
                ..ShelfState::default()
            };
            let said = self.policy.plan(&state, self.now_ms);
            debug_assert_eq!(check(&state, &said), Ok(()));
            self.outcome.plans += 1;
            self.again_at_ms = said.again_at_ms.filter(|at| *at > self.now_ms && *at < u64::MAX);
            let acts = said.actions.iter().any(|action| !matches!(action, Action::Wait { .. }));
            said.actions.into_iter().for_each(|action| self.obey(action));
            if !acts {
                return;
            }
        }
    }

    fn obey(&mut self, action: Action) {
        let now_ms = self.now_ms;
        match action {
            Action::Evict { model, bytes, .. } => {
                let model = &mut self.models[model.0 as usize];
                model.orders.push((now_ms + YIELD_MS, bytes));
                model.state.turn_since_ms = None;
                self.outcome.evictions += 1;
            }
            Action::Restore { model, .. } => self.models[model.0 as usize].state.wake_ordered = true,
            Action::Grant { model, bytes, .. } => {
                self.asked.remove(&model);
                let model = &mut self.models[model.0 as usize];
                model.state.weights_held += bytes;
                model.thrash.came_back(bytes, now_ms);
                self.outcome.moved += bytes;
                let took_ms = (bytes.0 >> 20) * model.kind.restore_us_per_mib / 1_000 + 1;
                self.link_free_ms = self.link_free_ms.max(now_ms) + took_ms;
                model.arrives_ms = Some(self.link_free_ms);
            }
            Action::Deny { reason, .. } => panic!("everything fits: {reason}"),
            Action::Wait { .. } => {}
        }
    }
}
