//! A device and its models in virtual time: requests come by a trace, weights move over one link, a policy decides.
//!
//! The policy sees the states that the server would show it and its plans are carried out as the server and its workers
//! would, but in no time: only copies, yielding and answering take any. Every plan is [checked](check()); one that must not
//! be obeyed is replaced by that of [`Value`], as the server does.

use std::collections::BTreeMap;

use super::kind::{Arrival, Kind, Settings};
use super::report::{Outcome, Tally};
use crate::bytes::ByteCount;
use crate::ids::ModelId;
use crate::policy::thrash::{Thrash, ThrashFigures};
use crate::policy::{
    Action, ModelState, PendingRequest, Plan, Policy, Rhythm, ShelfState, Turns, UseRate, Value, check,
};
use crate::protocol::LeaseKind;

/// A policy that lets requests stand still for so long, while nothing else happens, will do so for ever.
const GIVE_UP_MS: u64 = 3_600_000;

/// How often a policy may decide at one moment, for each model: to evict, to wake, to grant and to deny.
const ROUNDS_OF_A_MODEL: usize = 4;

/// Who is told of every action, with the time.
pub type Told<'a> = &'a mut dyn FnMut(u64, &Action);

struct Model {
    kind: Kind,
    state: ModelState,
    uses: UseRate,
    rhythm: Rhythm,
    idle_since_ms: Option<u64>,
    parked: Vec<Arrival>,
    ends_ms: Vec<u64>,
    /// What is left of requests that stand still until the weights are back (milliseconds).
    stopped_ms: Vec<u64>,
    arrives_ms: Option<u64>,
    /// Orders: when they are carried out, and bytes.
    orders: Vec<(u64, ByteCount)>,
    thrash: Thrash,
    served: ByteCount,
    tally: Tally,
}

/// The shelf.
pub struct World<'a> {
    policy: &'a dyn Policy,
    settings: Settings,
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
    /// A shelf whose models all sleep.
    #[must_use]
    pub fn new(policy: &'a dyn Policy, settings: Settings, kinds: &[Kind]) -> Self {
        Self {
            policy,
            settings,
            now_ms: 0,
            link_free_ms: 0,
            models: (0..).zip(kinds).map(|(id, kind)| Model::new(id, kind)).collect(),
            turns: Turns::default(),
            asked: BTreeMap::new(),
            requests: 0,
            again_at_ms: None,
            outcome: Outcome::default(),
        }
    }

    /// Plays a trace, which is in order of time, to its end.
    ///
    /// # Panics
    /// An arrival names a model that there is not.
    pub fn play(mut self, trace: &[Arrival], told: Told<'_>) -> Outcome {
        let mut coming = trace.iter().copied().peekable();
        let mut quiet_since_ms = 0;
        loop {
            while let Some(arrival) = coming.next_if(|arrival| arrival.at_ms <= self.now_ms) {
                self.come(arrival);
            }
            (0..self.models.len()).for_each(|place| self.happen(place));
            self.settle(told);
            let next = self.next_ms().into_iter().chain(coming.peek().map(|arrival| arrival.at_ms)).min();
            if next.is_some() {
                quiet_since_ms = self.now_ms;
            } else if !self.is_under_way() || self.now_ms - quiet_since_ms > GIVE_UP_MS {
                // Where nobody comes any more, time alone changes nothing for anybody.
                break;
            }
            let Some(next) = next.into_iter().chain(self.again_at_ms).min() else { break };
            self.pass(next.max(self.now_ms + 1));
        }
        self.end()
    }

    /// Somebody waits, or stands still.
    fn is_under_way(&self) -> bool {
        self.models.iter().any(|model| !model.parked.is_empty() || model.running() > 0)
    }

    fn end(mut self) -> Outcome {
        for model in &mut self.models {
            // Only where they would have waited for ever.
            model.tally.refused += model.parked.len() as u64;
            model.tally.broken_off += model.stopped_ms.len() as u64;
            model.tally.thrash = ThrashFigures { thrashed: model.thrash.total(), served: model.served };
            model.tally.first_ms.sort_unstable();
        }
        self.outcome.ended_ms = self.now_ms;
        self.outcome.models = self.models.into_iter().map(|model| model.tally).collect();
        self.outcome
    }

    fn come(&mut self, arrival: Arrival) {
        let parked_max = self.settings.parked_max;
        let model = &mut self.models[arrival.model];
        model.tally.requests += 1;
        let is_full = model.parked.len() >= parked_max;
        if is_full {
            model.tally.refused += 1;
        } else {
            model.parked.push(arrival);
        }
    }

    /// When something happens that is not only time.
    fn next_ms(&self) -> Option<u64> {
        let of = |model: &Model| model.next_ms(self.settings.wait_max_ms);
        self.models.iter().filter_map(of).min()
    }

    /// Time passes until `to_ms`.
    fn pass(&mut self, to_ms: u64) {
        let by_ms = to_ms - self.now_ms;
        let mut held = ByteCount::ZERO;
        for model in &mut self.models {
            held += model.state.held();
            if model.state.up {
                model.tally.up_ms += by_ms;
            }
        }
        self.outcome.held_max = self.outcome.held_max.max(held);
        self.now_ms = to_ms;
    }

    fn happen(&mut self, place: usize) {
        let now_ms = self.now_ms;
        let model = &mut self.models[place];
        if let Some(wait_max_ms) = self.settings.wait_max_ms {
            let before = model.parked.len();
            model.parked.retain(|arrival| arrival.at_ms + wait_max_ms > now_ms);
            model.tally.timed_out += (before - model.parked.len()) as u64;
        }
        let due: ByteCount =
            model.orders.iter().filter(|(due, _)| *due <= now_ms).map(|(_, bytes)| *bytes).sum();
        if !due.is_zero() {
            model.orders.retain(|(due, _)| *due > now_ms);
            model.state.weights_held = model.state.weights_held.saturating_sub(due);
            model.thrash.left(due, now_ms);
            (model.state.up, model.arrives_ms) = (false, None);
            model.stopped_ms.extend(model.ends_ms.drain(..).map(|at| at.saturating_sub(now_ms)));
        }
        if !due.is_zero()
            && let Some(asked) = self.asked.get_mut(&model.state.id)
        {
            // It asks for all that it lacks by now: with a part of it it could not run.
            asked.bytes = model.state.weights_total.saturating_sub(model.state.weights_held);
            asked.bytes_min = asked.bytes;
        }
        let is_there = model.arrives_ms.is_some_and(|at| at <= now_ms);
        if is_there {
            model.arrives_ms = None;
        }
        if is_there && model.state.is_whole() {
            (model.state.up, model.state.wake_ordered) = (true, false);
            (model.state.restored_ms, model.state.preload) = (Some(now_ms), false);
            model.ends_ms.extend(model.stopped_ms.drain(..).map(|left| now_ms + left));
        }
        let before = model.ends_ms.len();
        model.ends_ms.retain(|at| *at > now_ms);
        if model.ends_ms.len() < before {
            model.state.last_used_ms = now_ms;
            if model.running() == 0 {
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
            let places = model.kind.parallel_max.saturating_sub(model.running());
            for arrival in model.parked.drain(..places.min(model.parked.len())) {
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
                model.served = ByteCount(model.served.0.saturating_add(model.kind.weights.0));
                model.tally.first_ms.push(waited + arrival.first_ms);
            }
        }
        let running = model.running();
        let state = &mut model.state;
        state.active = u32::try_from(running).unwrap_or(u32::MAX);
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

    fn settle(&mut self, told: Told<'_>) {
        // Nothing that is decided here takes time, as it does in a server: a policy could go on at one moment for ever.
        let rounds_max = ROUNDS_OF_A_MODEL * (self.models.len() + 4);
        for round in 0.. {
            (0..self.models.len()).for_each(|place| self.begin(place));
            for model in &mut self.models {
                model.state.expected_ms = model.rhythm.next_ms(&self.turns, self.now_ms);
            }
            let said = self.decide(round < rounds_max);
            self.again_at_ms = said.again_at_ms.filter(|at| *at > self.now_ms && *at < u64::MAX);
            let acts = said.actions.iter().any(|action| !matches!(action, Action::Wait { .. }));
            for action in said.actions {
                told(self.now_ms, &action);
                self.obey(action);
            }
            if !acts {
                return;
            }
        }
    }

    /// What is done now. Where the policy may not say it any more, the one that the server falls back to does.
    fn decide(&mut self, may_go_on: bool) -> Plan {
        let state = ShelfState {
            budget: self.settings.budget,
            extent: self.settings.extent,
            quantum_ms: self.settings.quantum_ms,
            is_manual: self.settings.is_manual,
            models: self.models.iter().map(|model| model.state.clone()).collect(),
            requests: self.asked.values().cloned().collect(),
            ..ShelfState::default()
        };
        self.outcome.plans += 1;
        let said = may_go_on.then(|| self.policy.plan(&state, self.now_ms));
        let said = said.ok_or_else(|| format!("it went on and on at {} ms", self.now_ms));
        match said.and_then(|said| check(&state, &said).map(|()| said)) {
            Ok(said) => said,
            Err(why) => {
                self.outcome.plans_refused += 1;
                self.outcome.refused_why.get_or_insert(why);
                Value.plan(&state, self.now_ms)
            }
        }
    }

    fn obey(&mut self, action: Action) {
        let now_ms = self.now_ms;
        match action {
            Action::Evict { model, bytes, requester, .. } => {
                let model = &mut self.models[model.0 as usize];
                model.orders.push((now_ms + self.settings.yield_ms, bytes));
                model.state.turn_since_ms = None;
                // What left for somebody's sake comes back by itself.
                model.state.preload = requester.is_some() && model.kind.preload;
                model.tally.evictions += 1;
            }
            Action::Restore { model, .. } => self.models[model.0 as usize].state.wake_ordered = true,
            Action::Grant { model, bytes, .. } => {
                self.asked.remove(&model);
                let model = &mut self.models[model.0 as usize];
                model.state.weights_held += bytes;
                model.thrash.came_back(bytes, now_ms);
                model.tally.moved += bytes;
                model.tally.wakes += 1;
                let took_ms = (bytes.0 >> 20) * model.kind.restore_us_per_mib / 1_000 + 1;
                let there_ms = if model.kind.uses_link {
                    self.link_free_ms = self.link_free_ms.max(now_ms) + took_ms;
                    self.link_free_ms
                } else {
                    now_ms + took_ms
                };
                model.arrives_ms = Some(there_ms);
            }
            Action::Deny { model, reason, .. } => {
                self.asked.remove(&model);
                let model = &mut self.models[model.0 as usize];
                (model.state.wake_ordered, model.state.preload) = (false, false);
                model.tally.refused += model.parked.len() as u64;
                model.tally.refused_why.get_or_insert(reason);
                model.parked.clear();
                // It will not be there again for those who had begun.
                model.tally.broken_off += model.running() as u64;
                model.ends_ms.clear();
                model.stopped_ms.clear();
            }
            Action::Wait { .. } => {}
        }
    }
}

impl Model {
    fn new(id: u32, kind: &Kind) -> Self {
        let apart = kind.apart.iter().filter_map(|place| u32::try_from(*place).ok()).map(ModelId);
        let state = ModelState {
            id: ModelId(id),
            name: kind.name.clone(),
            ready: true,
            weights_total: kind.weights,
            overhead_held: kind.overhead,
            pinned: kind.pinned,
            is_rigid: kind.is_rigid,
            keeps_weights: kind.keeps_weights,
            min: kind.min,
            max: kind.max,
            priority: kind.priority,
            keep_alive_ms: kind.keep_alive_ms,
            restore_us_per_mib: kind.restore_us_per_mib,
            preload: kind.preload,
            apart: apart.collect(),
            ..ModelState::default()
        };
        Self {
            kind: kind.clone(),
            state,
            uses: UseRate::default(),
            rhythm: Rhythm::default(),
            idle_since_ms: None,
            parked: Vec::new(),
            ends_ms: Vec::new(),
            stopped_ms: Vec::new(),
            arrives_ms: None,
            orders: Vec::new(),
            thrash: Thrash::default(),
            served: ByteCount::ZERO,
            tally: Tally::default(),
        }
    }

    /// Requests that were begun and have not ended.
    fn running(&self) -> usize {
        self.ends_ms.len() + self.stopped_ms.len()
    }

    /// When something of it comes to an end by itself.
    fn next_ms(&self, wait_max_ms: Option<u64>) -> Option<u64> {
        let orders = self.orders.iter().map(|(due, _)| *due).min();
        let patience = wait_max_ms.and_then(|most| Some(self.parked.first()?.at_ms + most));
        [orders, self.arrives_ms, self.ends_ms.iter().copied().min(), patience].into_iter().flatten().min()
    }
}
