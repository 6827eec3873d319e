//! A shelf of workers in virtual time, which obey plans as real ones do: late, in parts, not at all, and with a life of
//! their own. Bursts, kills, sleeps and pins by hand, a budget that others take from, wakes and orders that fail.

use std::collections::BTreeSet;

use shoal_core::bytes::ByteCount;
use shoal_core::ids::ModelId;
use shoal_core::policy::{
    Action, ModelState, PendingRequest, Policy, Rhythm, ShelfState, Turns, UseRate, check,
};
use shoal_core::protocol::LeaseKind;

use crate::random::Random;
use crate::seen::Seen;
use waits::age;
use worker::{Job, Order, Worker};

mod busy;
mod in_turn;
mod waits;
mod worker;

/// The longest that a worker takes to answer an order.
const ANSWER_MS_MAX: u64 = 200;
/// What bringing a MiB back takes.
const RESTORE_US_PER_MIB: u64 = 5_000;
/// Load ends here, and nothing may be left to do so much later.
const LOAD_ENDS_MS: u64 = 40_000;
const QUIET_BY_MS: u64 = LOAD_ENDS_MS + 3_600_000;
/// Plans for one moment; more would mean that carrying plans out never comes to rest.
const PLANS_PER_MOMENT_MAX: usize = 64;

/// How long a worker that did not carry an order out is passed over.
const SKIP_MS: u64 = 700;

/// A request for bytes, and whom it had to let pass.
struct Asked {
    pending: PendingRequest,
    /// Since when it waits under the rules of today: pins, starts and deaths begin the count anew.
    since_ms: u64,
    older: BTreeSet<(ModelId, u64)>,
    /// Models that were wholly resident then: each may begin one turn while this waits.
    resident: u64,
}

impl Asked {
    fn is(&self, model: ModelId, request: u64) -> bool {
        (self.pending.model, self.pending.request) == (model, request)
    }
}

pub(crate) struct Sim<'a> {
    policy: &'a dyn Policy,
    random: Random,
    now_ms: u64,
    budget: ByteCount,
    /// What others leave of the budget.
    budget_now: ByteCount,
    quantum_ms: u64,
    workers: Vec<Worker>,
    asked: Vec<Asked>,
    requests: u64,
    next_load_ms: u64,
    again_at_ms: Option<u64>,
    /// Each client asks anew when it is answered, and nothing fails: so long it works on one request.
    closed_ms: Option<u64>,
    /// The only client asks the next model when it is answered, and what each of its turns moved.
    in_turn: Option<Vec<ByteCount>>,
    turns: Turns,
    /// Figures of the history, for what a test wants to have seen.
    pub(crate) seen: Seen,
}

impl<'a> Sim<'a> {
    pub(crate) fn new(seed: u64, policy: &'a dyn Policy) -> Self {
        let mut random = Random(seed);
        let count = 2 + random.below(7);
        let budget = random.mib(100, 400);
        let mut workers: Vec<Worker> = (0..count).map(|number| worker(&mut random, number, budget)).collect();
        for place in 1..workers.len() {
            if random.one_in(8) {
                let (one, other) = (workers[place - 1].state.id, workers[place].state.id);
                workers[place - 1].state.apart.push(other);
                workers[place].state.apart.push(one);
            }
        }
        let quantum_ms = 100 + random.below(3_000);
        Self {
            policy,
            random,
            now_ms: 1_000,
            budget,
            budget_now: budget,
            quantum_ms,
            workers,
            asked: Vec::new(),
            requests: 0,
            next_load_ms: 1_000,
            again_at_ms: None,
            closed_ms: None,
            in_turn: None,
            turns: Turns::default(),
            seen: Seen::default(),
        }
    }

    /// Runs a history to its end; what broke, if something did.
    pub(crate) fn run(&mut self) -> Result<(), String> {
        loop {
            self.happen();
            self.settle().map_err(|broken| format!("at {} ms: {broken}", self.now_ms))?;
            let Some(next_ms) = self.next_ms() else { break };
            if next_ms > QUIET_BY_MS {
                return Err(format!("an hour after the load ended there is still work: {}", self.unserved()));
            }
            self.advance(next_ms.max(self.now_ms + 1));
        }
        if self.workers.iter().any(|worker| !worker.jobs.is_empty() || !worker.parked.is_empty())
            || !self.asked.is_empty()
        {
            return Err(format!("at {} ms nothing will ever happen again: {}", self.now_ms, self.unserved()));
        }
        Ok(())
    }

    fn unserved(&self) -> String {
        let models = self.workers.iter().filter(|worker| worker.state.is_busy());
        let models: Vec<_> = models
            .map(|worker| {
                let state = &worker.state;
                format!(
                    "{} holds {}+{} of {}",
                    state.name, state.weights_held, state.kv_held, state.weights_total
                )
            })
            .collect();
        let said = self.policy.plan(&self.shelf(), self.now_ms);
        let said: Vec<_> = said.actions.iter().map(|action| format!("{action:?}")).collect();
        format!("{} ({} requests for bytes); {}", models.join(", "), self.asked.len(), said.join("; "))
    }

    /// Time passes for those who run.
    fn advance(&mut self, to_ms: u64) {
        let passed = to_ms - self.now_ms;
        for worker in self.workers.iter_mut().filter(|worker| worker.state.up) {
            for job in worker.jobs.iter_mut().filter(|job| job.runs) {
                job.left_ms = job.left_ms.saturating_sub(passed);
            }
        }
        self.now_ms = to_ms;
    }

    fn next_ms(&self) -> Option<u64> {
        let comes = (self.closed_ms.is_none() || self.in_turn.is_some()) && self.next_load_ms < LOAD_ENDS_MS;
        let load = comes.then_some(self.next_load_ms);
        let workers = self.workers.iter().flat_map(|worker| {
            let runs = worker.jobs.iter().filter(|job| job.runs && worker.state.up);
            let ends = runs.map(|job| self.now_ms + job.left_ms);
            let orders = worker.orders.iter().map(|order| order.due_ms);
            ends.chain(orders).chain(worker.copied_at_ms).chain(worker.dead_until_ms)
        });
        workers.chain(load).chain(self.again_at_ms).min()
    }

    /// All that is due now.
    fn happen(&mut self) {
        for place in 0..self.workers.len() {
            self.happen_to(place);
        }
        if self.closed_ms.is_some() {
            return self.ask_next();
        }
        if self.next_load_ms <= self.now_ms && self.now_ms < LOAD_ENDS_MS {
            self.next_load_ms = self.now_ms + 1 + self.random.below(800);
            self.load();
        }
        if self.next_load_ms >= LOAD_ENDS_MS {
            // With the load go the pins: what is left must be served by what there is.
            self.next_load_ms = u64::MAX;
            for worker in &mut self.workers {
                (worker.state.pinned, worker.state.keeps_weights) = (false, false);
            }
            self.budget_now = self.budget;
            self.count_anew();
        }
    }

    fn happen_to(&mut self, place: usize) {
        let now_ms = self.now_ms;
        let worker = &mut self.workers[place];
        if worker.dead_until_ms.is_some_and(|until| until <= now_ms) {
            worker.dead_until_ms = None;
            let state = &mut worker.state;
            state.weights_held = ByteCount::ZERO;
            state.kv_held = ByteCount::ZERO;
            state.kv_live = ByteCount::ZERO;
            state.kv_cached = ByteCount::ZERO;
            state.ready = true;
            state.preload = worker.preloads;
            self.count_anew();
            return;
        }
        let mut skipped = false;
        while let Some(due) = worker.orders.iter().position(|order| order.due_ms <= now_ms) {
            let order = worker.orders.remove(due);
            if order.fails {
                worker.state.skip_until_ms = now_ms + SKIP_MS;
                self.seen.accidents += 1;
                skipped = true;
            } else {
                let before = worker.state.weights_held;
                let (left, cached_last) = (order.left, order.cached_last);
                worker.orders.insert(due, order);
                worker.obey(left, cached_last);
                worker.orders.remove(due);
                // As the server has it: who waits for weights waits for these as well.
                let (id, gone) = (worker.state.id, before - worker.state.weights_held);
                let stays = cached_last && !worker.state.kv_cached.is_zero();
                self.seen.outlasted += u64::from(stays && !gone.is_zero());
                let mine = self
                    .asked
                    .iter_mut()
                    .find(|asked| (asked.pending.model, asked.pending.kind) == (id, LeaseKind::Weights));
                if let Some(asked) = mine {
                    asked.pending.bytes += gone;
                    asked.pending.bytes_min += gone;
                }
            }
        }
        let mut fails = false;
        if worker.copied_at_ms.is_some_and(|at| at <= now_ms) {
            worker.copied_at_ms = None;
            worker.state.wake_ordered = false;
            fails = self.closed_ms.is_none() && self.random.one_in(25);
            if fails {
                // A wake that fails gives back what it brought.
                let held = worker.state.weights_held;
                worker.state.weights_held = ByteCount::ZERO;
                worker.returned(held);
                self.seen.accidents += 1;
            } else {
                worker.loaded = true;
                worker.state.restored_ms = Some(now_ms);
                worker.state.preload = false;
            }
        }
        let before = worker.jobs.len();
        worker.jobs.retain(|job| job.left_ms > 0);
        let ended = before - worker.jobs.len();
        if ended > 0 {
            self.seen.served += ended as u64;
            worker.state.last_used_ms = now_ms;
            worker.settle_kv();
            if self.in_turn.is_some() {
                self.next_load_ms = now_ms + in_turn::PAUSE_MS;
            } else if let Some(left_ms) = self.closed_ms.filter(|_| now_ms < LOAD_ENDS_MS) {
                let kv = worker.state.kv_min;
                worker.parked.extend((0..ended).map(|_| Job { left_ms, kv, runs: false }));
                self.seen.served_of[place] += ended as u64;
            }
            if self.closed_ms.is_some() || self.random.one_in(3) {
                let surplus = worker.state.kv_held - worker.state.kv_live;
                worker.state.kv_held -= surplus;
                worker.returned(surplus);
            }
            let spare = worker.state.kv_held - worker.state.kv_live;
            worker.state.kv_cached = ByteCount(spare.0 / (1 + self.random.below(4)));
        }
        if fails || skipped {
            self.count_anew();
        }
        if skipped {
            // Until it is asked again nothing counts.
            self.asked.iter_mut().for_each(|asked| asked.since_ms = now_ms + SKIP_MS);
        }
    }

    /// Something from outside: mostly requests of clients.
    fn load(&mut self) {
        let place = usize::try_from(self.random.below(self.workers.len() as u64)).unwrap_or(0);
        let kv = self.random.mib(1, 24).max(self.workers[place].state.kv_min);
        let job = Job { left_ms: 1 + self.random.below(2_500), kv, runs: false };
        let dies = self.random.one_in(40);
        let pin = self.random.one_in(20).then(|| self.random.one_in(3));
        let comes_back_ms = self.now_ms + 1 + self.random.below(1_500);
        let changes = self.random.one_in(60).then(|| 70 + self.random.below(31));
        let sleeps = self.random.one_in(30);
        let burst = if self.random.one_in(12) { 1 + self.random.below(12) } else { 0 };
        let due_ms = self.now_ms + 1 + self.random.below(ANSWER_MS_MAX);
        let worker = &mut self.workers[place];
        if !worker.state.ready {
            return;
        }
        if dies {
            worker.parked.clear();
            worker.jobs.clear();
            worker.orders.clear();
            (worker.loaded, worker.copied_at_ms) = (false, None);
            worker.state.ready = false;
            worker.state.wake_ordered = false;
            worker.dead_until_ms = Some(comes_back_ms);
            let id = worker.state.id;
            self.asked.retain(|asked| asked.pending.model != id);
            self.seen.accidents += 1;
            self.count_anew();
        } else if let Some(pin) = pin {
            worker.state.pinned = pin;
            self.count_anew();
        } else if let Some(percent) = changes {
            self.budget_now = ByteCount(self.budget.0 / 100 * percent);
            self.seen.accidents += 1;
            self.count_anew();
        } else if sleeps {
            let left = worker.state.weights_held + worker.state.kv_held;
            worker.state.turn_since_ms = None;
            worker.orders.push(Order { due_ms, left, takes_weights: true, cached_last: false, fails: false });
            self.seen.accidents += 1;
            self.count_anew();
        } else {
            worker.note_use(&mut self.turns, self.now_ms);
            for _ in 0..burst {
                worker.parked.push(Job { ..job });
            }
            worker.parked.push(job);
        }
    }

    fn leased(&self) -> ByteCount {
        self.workers.iter().map(|worker| worker.state.held()).sum()
    }

    fn resident(&self) -> u64 {
        self.workers.iter().filter(|worker| worker.state.is_whole()).count() as u64
    }

    fn count_anew(&mut self) {
        let resident = self.resident();
        for asked in &mut self.asked {
            asked.since_ms = self.now_ms;
            asked.resident = resident;
        }
    }

    /// Plans and obeys until nothing follows any more.
    fn settle(&mut self) -> Result<(), String> {
        for _ in 0..PLANS_PER_MOMENT_MAX {
            for place in 0..self.workers.len() {
                self.refresh(place);
            }
            let state = self.shelf();
            self.note_older(&state);
            let said = self.policy.plan(&state, self.now_ms);
            if said != self.policy.plan(&state.clone(), self.now_ms) {
                return Err("the same state gave another plan".to_owned());
            }
            check(&state, &said)?;
            self.seen.plans += 1;
            self.again_at_ms = said.again_at_ms.filter(|at| *at > self.now_ms && *at < u64::MAX);
            let is_at_rest = said.actions.iter().all(|action| matches!(action, Action::Wait { .. }));
            for action in said.actions {
                self.obey(action)?;
            }
            if self.leased() > self.budget_now {
                self.count_anew();
            }
            if is_at_rest {
                return Ok(());
            }
        }
        Err(format!("plans for one moment never come to rest: {}", self.unserved()))
    }

    fn shelf(&self) -> ShelfState {
        ShelfState {
            budget: self.budget_now,
            extent: ByteCount::mib(2),
            quantum_ms: self.quantum_ms,
            is_manual: false,
            taken: self.budget.saturating_sub(self.budget_now),
            falling: ByteCount::ZERO,
            returning: ByteCount::ZERO,
            models: self.workers.iter().map(|worker| worker.state.clone()).collect(),
            requests: self.asked.iter().map(|asked| asked.pending.clone()).collect(),
        }
    }

    /// What the server derives for a model, and what its worker does next.
    fn refresh(&mut self, place: usize) {
        let now_ms = self.now_ms;
        let contended = !self.asked.is_empty();
        let resident = self.resident();
        let worker = &mut self.workers[place];
        let id = worker.state.id;
        let mine =
            |kind| self.asked.iter().any(|asked| asked.pending.model == id && asked.pending.kind == kind);
        let (asks_weights, asks_kv) = (mine(LeaseKind::Weights), mine(LeaseKind::Kv));
        let whole = worker.state.is_whole();
        worker.state.ordered = worker.orders.iter().map(|order| order.left).sum();
        worker.state.ordered_cached_last = worker.orders.iter().any(|order| order.cached_last);
        worker.state.up = worker.loaded && !worker.orders.iter().any(|order| order.takes_weights);
        if worker.state.up {
            let was_idle = worker.jobs.is_empty();
            if !worker.parked.is_empty() {
                worker.jobs.append(&mut worker.parked);
                worker.state.last_used_ms = now_ms;
                if was_idle && self.in_turn.is_some() {
                    worker.note_use(&mut self.turns, now_ms);
                }
                if was_idle && !contended {
                    worker.state.turn_since_ms = None;
                }
                worker.settle_kv();
            }
        }
        let state = &mut worker.state;
        state.active = u32::try_from(worker.jobs.len()).unwrap_or(u32::MAX);
        state.parked = u32::try_from(worker.parked.len()).unwrap_or(u32::MAX);
        state.expected_ms = worker.rhythm.next_ms(&self.turns, now_ms);
        let wants = state.ready && !state.can_run() && (asks_weights || asks_kv || state.is_busy());
        state.wanting_since_ms = wants.then(|| state.wanting_since_ms.unwrap_or(now_ms));
        if !whole {
            state.turn_since_ms = None;
        } else if worker.loaded && state.is_busy() && state.can_run() && state.turn_since_ms.is_none() {
            state.turn_since_ms = Some(now_ms);
        }
        let comes_back = state.wake_ordered || state.active > 0;
        let mut ask = None;
        if state.ready && comes_back && !worker.loaded && !asks_weights && worker.copied_at_ms.is_none() {
            let missing = state.weights_total.saturating_sub(state.weights_held);
            if missing.is_zero() {
                worker.copied_at_ms = Some(now_ms + restore_ms(state.weights_total));
            } else {
                ask = Some((LeaseKind::Weights, missing));
            }
        }
        state.rising_until_ms = worker.copied_at_ms;
        if state.up && !asks_kv {
            let short = worker.jobs.iter().find(|job| !job.runs);
            ask = ask.or_else(|| {
                let lacks = (state.kv_live + short?.kv).saturating_sub(state.kv_held);
                Some((LeaseKind::Kv, lacks))
            });
        }
        if let Some((kind, bytes)) = ask {
            self.requests += 1;
            let pending = PendingRequest {
                model: id,
                request: self.requests,
                kind,
                bytes,
                bytes_min: bytes,
                asked_ms: now_ms,
                deadline_ms: u64::MAX,
            };
            self.asked.push(Asked { pending, since_ms: now_ms, older: BTreeSet::new(), resident });
        }
    }

    /// Every request notes whom it must let pass.
    fn note_older(&mut self, state: &ShelfState) {
        let ages: Vec<_> = self.asked.iter().map(|asked| age(state, &asked.pending)).collect();
        for (asked, own) in self.asked.iter_mut().zip(&ages) {
            asked.older.extend(ages.iter().filter(|other| *other < own).map(|other| (other.1, other.3)));
        }
    }

    fn obey(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::Evict { model, bytes, reason, requester, cached_last } => {
                let asking = requester.filter(|asking| *asking != model);
                if let Some(asking) = asking.filter(|asking| self.gives_weights_up(*asking)) {
                    // Most of all not from the one that comes next: it would have to bring that back.
                    return Err(format!("{asking} gives weights up and takes from {model}: {reason}"));
                }
                let due_ms = self.now_ms + 1 + self.random.below(ANSWER_MS_MAX);
                let worker = &mut self.workers[model.0 as usize];
                let state = &worker.state;
                let ordered: ByteCount = worker.orders.iter().map(|order| order.left).sum();
                let kept = if state.keeps_weights { state.weights_held } else { ByteCount::ZERO };
                let floor = state.min.max(state.overhead_held + kept);
                if state.pinned || !state.ready || bytes.is_zero() || floor + ordered + bytes > state.held() {
                    let held = state.held();
                    return Err(format!("{model} must not be ordered {bytes} (holds {held}): {reason}"));
                }
                let cached = if cached_last { state.kv_cached } else { ByteCount::ZERO };
                let takes_weights = bytes > state.kv_held.saturating_sub(state.kv_live + cached);
                if takes_weights {
                    worker.state.turn_since_ms = None;
                }
                let fails = self.closed_ms.is_none() && self.random.one_in(40);
                worker.orders.push(Order { due_ms, left: bytes, takes_weights, cached_last, fails });
                if reason.contains("may not stand beside") {
                    self.seen.apart += 1;
                }
                self.seen.evicts += 1;
            }
            Action::Restore { model, .. } => {
                let worker = &mut self.workers[model.0 as usize];
                worker.state.wake_ordered = true;
                self.seen.preloads += u64::from(worker.parked.is_empty());
            }
            Action::Grant { model, request, bytes, .. } => {
                let asked = self.answered(model, request)?;
                self.check_wait(&asked)?;
                let state = &mut self.workers[model.0 as usize].state;
                match asked.pending.kind {
                    LeaseKind::Weights => {
                        state.weights_held += bytes;
                        self.in_turn
                            .iter_mut()
                            .filter_map(|turns| turns.last_mut())
                            .for_each(|moved| *moved += bytes);
                    }
                    LeaseKind::Kv => state.kv_held += bytes,
                    LeaseKind::Overhead => state.overhead_held += bytes,
                }
                let (held, max) = (state.held(), state.max);
                self.workers[model.0 as usize].settle_kv();
                let leased = self.leased();
                if bytes < asked.pending.bytes_min || bytes > asked.pending.bytes {
                    return Err(format!("{model} was granted {bytes}, which it did not ask for"));
                }
                if let Some(beside) = self.beside(model) {
                    return Err(format!("{model} stands beside {beside}"));
                }
                if leased > self.budget_now || max.is_some_and(|max| held > max) {
                    let budget = self.budget_now;
                    return Err(format!("{model} was granted {bytes}: {leased} of {budget} leased"));
                }
                self.seen.grants += 1;
            }
            Action::Deny { model, request, never, reason } => {
                self.answered(model, request)?;
                if !never {
                    return Err(format!("{model} was turned away for a deadline it did not set: {reason}"));
                }
                let worker = &mut self.workers[model.0 as usize];
                worker.parked.clear();
                worker.jobs.clear();
                worker.state.wake_ordered = false;
                worker.state.preload = false;
                worker.settle_kv();
                self.seen.denied += 1;
            }
            // It cannot be met before others leave the device.
            Action::Wait { model, request, reason, .. } if reason.contains(" at most: ") => {
                let now_ms = self.now_ms;
                self.asked
                    .iter_mut()
                    .filter(|asked| asked.is(model, request))
                    .for_each(|asked| asked.since_ms = now_ms);
            }
            Action::Wait { .. } => {}
        }
        Ok(())
    }

    /// One that has something on the device although it may not beside `model`, which has.
    fn beside(&self, model: ModelId) -> Option<ModelId> {
        let one = &self.workers[model.0 as usize].state;
        let stands = |other: &&ModelId| !self.workers[other.0 as usize].state.stands().is_zero();
        one.apart.iter().find(stands).copied().filter(|_| !one.stands().is_zero())
    }

    /// Takes the question that an answer is to.
    fn answered(&mut self, model: ModelId, request: u64) -> Result<Asked, String> {
        let place = self
            .asked
            .iter()
            .position(|asked| asked.is(model, request))
            .ok_or_else(|| format!("an answer to {model} without a question"))?;
        Ok(self.asked.remove(place))
    }
}

fn restore_ms(bytes: ByteCount) -> u64 {
    (bytes.0 >> 20) * RESTORE_US_PER_MIB / 1_000 + 1
}

fn worker(random: &mut Random, number: u64, budget: ByteCount) -> Worker {
    let weights_total = random.mib(10, 2 + (budget.0 >> 20) * 3 / 4);
    let overhead_held = random.mib(0, 4);
    let min = if random.one_in(4) { random.mib(0, 12) } else { ByteCount::ZERO };
    let max = random.one_in(3).then(|| weights_total + random.mib(2, 40));
    let priority = if random.one_in(2) { 0 } else { i32::try_from(random.below(7)).unwrap_or(0) - 3 };
    let keep_alive_ms = random.one_in(4).then(|| random.below(4_000));
    let (preloads, keeps_weights) = (random.one_in(6), random.one_in(12));
    let state = ModelState {
        keeps_weights,
        preload: preloads,
        kv_back_us_per_mib: random.below(20_000),
        kv_found_milli: random.below(1_001),
        id: ModelId(u32::try_from(number).unwrap_or(0)),
        name: format!("model-{number}"),
        ready: true,
        weights_total,
        kv_min: random.mib(0, 4),
        overhead_held,
        min,
        max,
        priority,
        pause_ms: random.one_in(2).then(|| random.below(200)),
        keep_alive_ms,
        restore_us_per_mib: RESTORE_US_PER_MIB,
        ..ModelState::default()
    };
    Worker {
        state,
        loaded: false,
        parked: Vec::new(),
        jobs: Vec::new(),
        orders: Vec::new(),
        copied_at_ms: None,
        dead_until_ms: None,
        preloads,
        uses: UseRate::default(),
        rhythm: Rhythm::default(),
    }
}
