//! Who could yield, in which order, and how much of each is left while a plan is made.
//!
//! What a byte is worth is [`super::worth`]'s part; here is who may be asked at all, and when.

use std::collections::BTreeMap;

use super::state::{ModelState, PendingRequest, ShelfState};
use super::worth::{Worth, of_cached_kv, of_weights};
use super::{PRIORITY_HEAD_START_MS, PRIORITY_STEPS_MAX};
use crate::bytes::ByteCount;
use crate::ids::ModelId;
use crate::protocol::LeaseKind;

/// How much longer than twice its usual pause an idle model in its turn is waited for.
const LINGER_SLACK_MS: u64 = 10;

/// A model just brought back is asked after other idle ones for so many times what bringing it back took, and runs for
/// at least twice that: so that at most a third of the time goes into moving.
const SETTLED_RESTORES: u64 = 4;
const TURN_RESTORES: u64 = 2;
/// The longest that this makes a turn or that protection.
const SETTLED_MS_MAX: u64 = 60_000;

/// How victims are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// By what their bytes are worth, and only as much as is needed.
    Worth,
    /// Whole models, the one that was not used for longest first.
    WholeLru,
}

/// Why a model may be asked, the first before the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    Surplus,
    Idle,
    IdleFresh,
    IdleKept,
    WaitsBehind,
    TurnOver,
}

/// What of a model a candidate stands for. A worker gives up the unused, then the cached, then weights; where the cached would
/// cost more to bring back than weights do, and nobody wants the model, the weights go before it. So each includes those
/// before it of the two ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// KV that nobody uses and that holds nothing.
    Unused,
    /// KV that nobody uses.
    Cached,
    /// The unused and weights: the cached goes after these.
    Weights,
    /// Everything that may be taken.
    All,
}

/// One entry of the order in which models are asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) class: Class,
    pub(super) part: Part,
    pub(super) model: usize,
    /// What a MiB is worth of what it has beyond the parts before it, or of that with the prefixes that go with it.
    pub(super) worth: Worth,
    /// Compared within the class, least first.
    rank: (u64, u64),
}

/// What is left of a model to be ordered.
#[derive(Clone, Copy, Debug, Default)]
struct Left {
    all: ByteCount,
    /// Of that, weights.
    weights: ByteCount,
    /// Of that, KV that no request uses, and of it what holds nothing.
    spare: ByteCount,
    unused: ByteCount,
    /// What holds prefixes goes after the weights.
    cached_last: bool,
}

impl Left {
    /// KV that nobody uses and that holds prefixes.
    fn cached(&self) -> ByteCount {
        self.spare.saturating_sub(self.unused)
    }

    /// What goes before that, where it goes after the weights.
    fn before_cached(&self) -> ByteCount {
        (self.unused + self.weights).min(self.all)
    }

    /// So much goes, in the order in which a worker gives it up: the unused, the cached and weights, one of these two before
    /// the other, and what requests use.
    fn take(&mut self, bytes: ByteCount) {
        fn part(rest: &mut ByteCount, of: ByteCount) -> ByteCount {
            let part = of.min(*rest);
            *rest -= part;
            part
        }
        let mut rest = bytes;
        let mut cached = self.cached();
        self.unused -= part(&mut rest, self.unused);
        if self.cached_last {
            self.weights -= part(&mut rest, self.weights);
            cached -= part(&mut rest, cached);
        } else {
            cached -= part(&mut rest, cached);
            self.weights -= part(&mut rest, self.weights);
        }
        self.all = self.all.saturating_sub(bytes);
        self.unused = self.unused.min(self.all);
        self.spare = (self.unused + cached).min(self.all);
        self.weights = self.weights.min(self.all);
    }
}

/// An age: less is older.
pub(super) type Seniority = (i64, ModelId, u64, u64);

/// Working figures of one plan.
#[derive(Debug)]
pub(super) struct Field<'a> {
    pub(super) state: &'a ShelfState,
    pub(super) now_ms: u64,
    pub(super) choice: Choice,
    index: BTreeMap<ModelId, usize>,
    left: Vec<Left>,
    /// What this plan took of each model.
    took: Vec<ByteCount>,
    /// The model's request for weights is met by this plan: granted, or by what others give up already.
    met: Vec<bool>,
    candidates: Vec<Candidate>,
    /// The oldest request of each model that waits.
    senior: Vec<Option<Seniority>>,
    /// A request of the model's cannot be met before others leave the device: its age protects nothing.
    stuck: Vec<bool>,
    pub(super) free: ByteCount,
    pub(super) incoming: ByteCount,
    /// When time alone may change something: a turn ends, or a model may be asked again.
    pub(super) next_change_ms: u64,
    /// What is to come back because others took memory, and was not ordered yet.
    pub(super) owed: ByteCount,
    kept_by_all: ByteCount,
}

impl<'a> Field<'a> {
    pub(super) fn new(state: &'a ShelfState, now_ms: u64, choice: Choice) -> Self {
        let index: BTreeMap<_, _> =
            state.models.iter().enumerate().map(|(place, model)| (model.id, place)).collect();
        let held = state.models.iter().map(ModelState::held).sum::<ByteCount>() + state.returning;
        // With the last of its weights goes what only its steps take.
        let goes = |model: &&ModelState| loses_weights(model, model.ordered, model.ordered_cached_last);
        let incoming: ByteCount = state.models.iter().map(|model| model.ordered.min(model.held())).sum();
        let incoming = incoming + state.models.iter().filter(goes).map(leaves).sum::<ByteCount>();
        let incoming = incoming + state.returning;
        let over = held.saturating_sub(state.budget);
        let owed = over.min(state.taken);
        let mut field = Self {
            state,
            now_ms,
            choice,
            left: state.models.iter().map(|model| left_of(model, state.is_manual)).collect(),
            took: vec![ByteCount::ZERO; state.models.len()],
            met: vec![false; state.models.len()],
            candidates: Vec::new(),
            senior: vec![None; state.models.len()],
            stuck: vec![false; state.models.len()],
            free: state.budget.saturating_sub(held),
            // What was ordered already is owed first, or fills the headroom again.
            incoming: incoming.saturating_sub(over),
            owed: owed.saturating_sub(incoming),
            next_change_ms: u64::MAX,
            kept_by_all: state.models.iter().map(kept_for_good).sum(),
            index,
        };
        let changes = state.models.iter().flat_map(|model| {
            let skip_until = Some(model.skip_until_ms).filter(|until| *until > now_ms);
            [field.protected_until(model), field.lingers_until(model), skip_until]
        });
        let next_change_ms = changes.flatten().min().unwrap_or(u64::MAX);
        field.next_change_ms = next_change_ms;
        for request in &state.requests {
            let Some(&place) = field.index.get(&request.model) else { continue };
            if request.bytes_min > field.most(request) {
                field.stuck[place] = true;
                continue;
            }
            let age = field.seniority(request);
            field.senior[place] = Some(field.senior[place].map_or(age, |old| old.min(age)));
        }
        for place in 0..state.models.len() {
            field.left[place].cached_last = field.gives_cached_last(place);
        }
        field.candidates = field.rank_all();
        field
    }

    /// Its prefixes would cost more to bring back than its weights, so these go first. Not while somebody wants the model:
    /// whoever has begun with it, or waits for it, needs all of the weights before the first prefix is of use.
    fn gives_cached_last(&self, place: usize) -> bool {
        let model = &self.state.models[place];
        // What was granted a moment ago counts as in use, but how much holds prefixes is as its worker says.
        self.choice == Choice::Worth
            && !model.is_rigid
            && !model.keeps_weights
            && !model.kv_cached.is_zero()
            && !self.left[place].weights.is_zero()
            && !self.is_wanted(place)
            // It asks for what it cannot have yet: its own order takes what no request uses.
            && !self.stuck[place]
            && of_cached_kv(model, self.now_ms) > of_weights(model, self.now_ms)
    }

    pub(super) fn model(&self, id: ModelId) -> Option<&'a ModelState> {
        self.index.get(&id).map(|place| &self.state.models[*place])
    }

    pub(super) fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    /// Less is older; age, head start of the priority, then names, so that the order is total.
    pub(super) fn seniority(&self, request: &PendingRequest) -> Seniority {
        let asked = request.asked_ms;
        let (since, priority) = self.model(request.model).map_or((asked, 0), |model| {
            let since = if model.can_run() { None } else { model.wanting_since_ms };
            (since.unwrap_or(asked).min(asked), model.priority)
        });
        (head_start(since, priority), request.model, asked, request.request)
    }

    fn rank_all(&self) -> Vec<Candidate> {
        let mut candidates = Vec::with_capacity(2 * self.state.models.len());
        for (place, model) in self.state.models.iter().enumerate() {
            let left = self.left[place];
            if left.all.is_zero() || self.skipped(model) {
                continue;
            }
            let mut add = |class, part, worth, rank| {
                candidates.push(Candidate { class, part, model: place, worth: Worth(worth), rank });
            };
            let (cached, weights) = (of_cached_kv(model, self.now_ms).0, of_weights(model, self.now_ms).0);
            if !left.unused.is_zero() {
                let rank = (u64::from(model.is_busy()), model.last_used_ms);
                add(Class::Surplus, Part::Unused, 0, rank);
            }
            if self.state.is_manual {
                continue;
            }
            let demand = self.is_wanted(place);
            let kept = kept_until(model).is_some_and(|until| until > self.now_ms);
            let is_cached_first = !left.cached().is_zero() && !left.cached_last;
            if is_cached_first && self.choice == Choice::Worth {
                let class = if kept && !demand { Class::IdleKept } else { Class::Idle };
                add(class, Part::Cached, cached, (cached, model.last_used_ms));
            }
            let worth = match () {
                () if left.cached_last => cached,
                // Whoever is asked for more than is unused gives the two together.
                () if is_cached_first && cached > weights => {
                    blended((cached, left.cached()), (weights, left.all.saturating_sub(left.spare)))
                }
                () => weights,
            };
            let (class, rank) = if !demand {
                let class = match (kept, self.settles_until(model)) {
                    _ if self.choice == Choice::WholeLru => Class::Idle,
                    (true, _) => Class::IdleKept,
                    (false, Some(_)) => Class::IdleFresh,
                    (false, None) => Class::Idle,
                };
                (class, self.by_choice((worth, model.last_used_ms), model))
            } else if model.can_run() || self.protected_until(model).is_some() {
                (Class::TurnOver, self.by_choice((model.turn_since_ms.unwrap_or(0), worth), model))
            } else {
                // The youngest first: it would come back last.
                (Class::WaitsBehind, (u64::MAX - self.waits_since(place), worth))
            };
            if left.cached_last {
                add(class, Part::Weights, weights, (weights, model.last_used_ms));
            }
            add(class, Part::All, worth, rank);
        }
        candidates
            .sort_by_key(|candidate| (candidate.class, candidate.rank, candidate.model, candidate.part));
        candidates
    }

    /// Somebody uses the model, waits for it, or is about to.
    fn is_wanted(&self, place: usize) -> bool {
        let model = &self.state.models[place];
        model.is_busy()
            || self.senior[place].is_some()
            || model.wake_ordered
            || self.lingers_until(model).is_some()
    }

    fn by_choice(&self, rank: (u64, u64), model: &ModelState) -> (u64, u64) {
        if self.choice == Choice::WholeLru { (model.last_used_ms, 0) } else { rank }
    }

    fn waits_since(&self, place: usize) -> u64 {
        let asked = self.senior[place].map_or(self.now_ms, |(_, _, asked, _)| asked);
        self.state.models[place].wanting_since_ms.unwrap_or(asked).min(asked)
    }

    fn skipped(&self, model: &ModelState) -> bool {
        !model.ready || model.skip_until_ms > self.now_ms
    }

    /// Since when `request`, or the wake that it belongs to, has waited.
    fn since(&self, request: &PendingRequest) -> u64 {
        let wanting = self
            .model(request.model)
            .filter(|model| !model.can_run())
            .and_then(|model| model.wanting_since_ms);
        wanting.unwrap_or(request.asked_ms).min(request.asked_ms)
    }

    /// The seniority of a model that wants to come back, whether or not it asks for something now.
    fn standing(&self, model: &ModelState) -> Seniority {
        let since = model.wanting_since_ms.unwrap_or(self.now_ms);
        (head_start(since, model.priority), model.id, u64::MAX, u64::MAX)
    }

    /// How much `candidate` may give for `request`, which is so old, now.
    pub(super) fn offer(&self, candidate: Candidate, request: &PendingRequest, age: Seniority) -> ByteCount {
        let model = &self.state.models[candidate.model];
        let left = self.left[candidate.model];
        if candidate.part != Part::All {
            // A model that asks for KV is about to use its own surplus.
            let own_kv = model.id == request.model && request.kind == LeaseKind::Kv;
            // Whoever takes whole models takes from others nothing less.
            let only_own = self.choice == Choice::WholeLru && model.id != request.model;
            let bytes = match candidate.part {
                Part::Unused => left.unused,
                // Its own weights are what it asks for.
                Part::Weights if model.id != request.model => left.before_cached(),
                _ => left.spare,
            };
            return if own_kv || only_own { ByteCount::ZERO } else { bytes };
        }
        if model.id == request.model {
            // Its own weights are what it asks for; of its KV, whatever is not in use.
            return if request.kind == LeaseKind::Kv { ByteCount::ZERO } else { left.spare };
        }
        let younger = self.senior[candidate.model].is_none_or(|senior| senior > age);
        let now = match candidate.class {
            Class::Surplus | Class::Idle | Class::IdleFresh | Class::IdleKept => true,
            // Between two requests of one wake it waits as well.
            Class::WaitsBehind if younger => self.stuck[candidate.model] || self.standing(model) > age,
            // It cannot run before this turn is over, however long it has waited; whoever runs would stand still beside
            // bytes that nobody can use. It gets them back with all that the turn has.
            Class::WaitsBehind => {
                request.kind == LeaseKind::Kv
                    && !model.is_whole()
                    && !self.met[candidate.model]
                    && self.model(request.model).is_some_and(|asking| self.in_turn(asking))
            }
            Class::TurnOver => younger && self.protected_until(model).is_none(),
        };
        if now { left.all } else { ByteCount::ZERO }
    }

    /// How much `candidate` may give now because others took memory of the device. One that runs, and could not run with
    /// what is left, keeps what it runs with: it would be stopped for good, and what it has is there.
    pub(super) fn offer_for_room(&self, candidate: Candidate) -> ByteCount {
        let model = &self.state.models[candidate.model];
        let left = self.left[candidate.model];
        match (candidate.part, candidate.class) {
            (Part::Unused, _) => left.unused,
            (Part::Cached, _) => left.spare,
            (Part::Weights, _) => left.before_cached(),
            (Part::All, Class::TurnOver | Class::WaitsBehind) if model.is_rigid => ByteCount::ZERO,
            (Part::All, Class::TurnOver)
                if self.protected_until(model).is_some() || !self.could_return(model) =>
            {
                left.spare
            }
            (Part::All, _) => left.all,
        }
    }

    /// How much `candidate` may give now because one that it may not stand beside is there as well.
    pub(super) fn offer_to_part(&self, candidate: Candidate) -> ByteCount {
        let model = &self.state.models[candidate.model];
        let runs = candidate.class == Class::TurnOver && self.protected_until(model).is_some();
        if candidate.part != Part::All || runs { ByteCount::ZERO } else { self.left[candidate.model].all }
    }

    /// All that it takes to run `model` fits into the budget as it is now.
    fn could_return(&self, model: &ModelState) -> bool {
        let kept = self.kept_by_all.saturating_sub(kept_for_good(model));
        let overhead = model.overhead_held + model.overhead_lacking;
        let needed = model.weights_total + model.kv_min.max(model.kv_live) + overhead;
        kept + needed <= self.state.budget
    }

    /// See [`turn_ms`].
    pub(super) fn turn_ms(&self, model: &ModelState) -> u64 {
        turn_ms(self.state, model)
    }

    /// Until when an idle model was brought back too lately to be sent away before others; none once it was not.
    fn settles_until(&self, model: &ModelState) -> Option<u64> {
        let settled_ms = model.restore_ms().saturating_mul(SETTLED_RESTORES).min(SETTLED_MS_MAX);
        let until = model.restored_ms?.saturating_add(settled_ms);
        // Who is known to come back only after that loses nothing by going before.
        let is_needed = model.expected_ms.is_none_or(|expected| expected <= until);
        Some(until).filter(|until| *until > self.now_ms && model.is_whole() && is_needed)
    }

    /// Until when a busy, whole model cannot be taken; none once it can.
    pub(super) fn protected_until(&self, model: &ModelState) -> Option<u64> {
        let turn = model.turn_since_ms.map(|since| since.saturating_add(self.turn_ms(model)));
        [turn, model.rising_until_ms].into_iter().flatten().max().filter(|until| *until > self.now_ms)
    }

    /// Until when an idle model in its turn counts as busy, because its requests have followed each other sooner than
    /// it could be brought back; none where it does not.
    pub(super) fn lingers_until(&self, model: &ModelState) -> Option<u64> {
        let pause_ms = model.pause_ms.filter(|pause| pause.saturating_mul(2) <= model.restore_ms())?;
        if model.is_busy() || !model.up {
            return None;
        }
        let turn_ends = model.turn_since_ms?.saturating_add(self.turn_ms(model));
        let linger_ms = (2 * pause_ms + LINGER_SLACK_MS).min(model.restore_ms());
        Some(model.last_used_ms.saturating_add(linger_ms).min(turn_ends)).filter(|until| *until > self.now_ms)
    }

    /// Weights of the model at `place` that it was ordered to give up and has not yet. Unused KV goes before them, and what is
    /// cached where it is not to go last.
    pub(super) fn leaving_at(&self, place: usize) -> ByteCount {
        let model = &self.state.models[place];
        let cached_last =
            model.ordered_cached_last || self.left[place].cached_last && !self.took[place].is_zero();
        (model.ordered + self.took[place])
            .saturating_sub(before_weights(model, cached_last))
            .min(model.weights_held)
    }

    /// The model at `place` asks for bytes.
    pub(super) fn asks(&self, place: usize) -> bool {
        self.senior[place].is_some()
    }

    /// The most that `request` could ever be given: the budget less what others cannot be made to yield and what the
    /// asking model holds itself, and beside KV the weights that it lacks.
    pub(super) fn most(&self, request: &PendingRequest) -> ByteCount {
        let own = self.model(request.model).map_or(ByteCount::ZERO, |model| {
            let kept = self.kept_by_all.saturating_sub(kept_for_good(model)) + owed(model, request);
            let surplus = model.kv_held.saturating_sub(model.kv_live);
            let yields = request.kind != LeaseKind::Kv && model.ready && !model.pinned;
            kept + if yields { model.held().saturating_sub(surplus) } else { model.held() }
        });
        self.state.budget.saturating_sub(own)
    }

    /// Everything that could be taken for `request` beyond what this plan gave away already, if all turns were over that
    /// had begun when it was asked, and everybody answered. A turn that began since does not count: were younger models
    /// let in on the strength of one another, some turn would always be running, and `request` would wait for ever.
    pub(super) fn eventual(&self, request: &PendingRequest) -> ByteCount {
        let asked_ms = self.since(request);
        let others = self.state.models.iter().zip(&self.left).enumerate().map(|(place, (model, left))| {
            if !model.ready {
                // Its process is ending: all it holds comes back.
                model.held().saturating_sub(model.ordered)
            } else if model.id == request.model {
                if request.kind == LeaseKind::Kv { ByteCount::ZERO } else { left.spare }
            } else if self.in_turn(model) && model.turn_since_ms.is_none_or(|since| since >= asked_ms) {
                left.spare
            } else {
                left.all + self.leaves_with(place, left.all)
            }
        });
        self.free + self.incoming_for(request) + others.sum()
    }

    /// What is on its way for `request`: not what the asking model's own steps took, which it will need again.
    pub(super) fn incoming_for(&self, request: &PendingRequest) -> ByteCount {
        let own = self.model(request.model);
        let own = own.filter(|model| loses_weights(model, model.ordered, model.ordered_cached_last));
        self.incoming.saturating_sub(own.map_or(ByteCount::ZERO, leaves))
    }

    /// What else is free before long if the model at `place` is ordered to give up `bytes` more: what its steps take, if that is
    /// the last of its weights.
    pub(super) fn leaves_with(&self, place: usize, bytes: ByteCount) -> ByteCount {
        let model = &self.state.models[place];
        let before = self.ordered_at(place);
        let cached_last =
            self.left[place].cached_last && (model.ordered.is_zero() || model.ordered_cached_last);
        let loses = |ordered| loses_weights(model, ordered, cached_last);
        let is_last = !loses(before) && loses(before + bytes);
        if is_last { leaves(model) } else { ByteCount::ZERO }
    }

    /// Marks `request` as met. Who has all its weights, or is about to, is not kept waiting by those who run.
    pub(super) fn meet(&mut self, request: &PendingRequest) {
        if let Some(place) = self.place(request.model) {
            self.met[place] |= request.kind == LeaseKind::Weights;
        }
    }

    /// Marks bytes of the model at `place` as taken. Workers give unused KV up first, whatever the order was for.
    pub(super) fn take(&mut self, place: usize, bytes: ByteCount) {
        self.took[place] += bytes;
        self.left[place].take(bytes);
    }

    /// Whether an order to the model at `place` takes weights before what is cached.
    pub(super) fn cached_last(&self, place: usize) -> bool {
        self.left[place].cached_last
    }

    /// What the model at `place` was ordered to give up and has not yet, this plan's orders included.
    pub(super) fn ordered_at(&self, place: usize) -> ByteCount {
        self.state.models[place].ordered + self.took[place]
    }

    /// What could still be ordered of the KV that no request of the model at `place` uses.
    pub(super) fn spare_at(&self, place: usize) -> ByteCount {
        if self.skipped(&self.state.models[place]) { ByteCount::ZERO } else { self.left[place].spare }
    }

    /// What could still be ordered of the model at `place`.
    pub(super) fn takeable_at(&self, place: usize) -> ByteCount {
        self.left[place].all
    }

    /// [`takeable_at`](Self::takeable_at), whether or not anything is evicted by itself.
    pub(super) fn takeable_by_hand_at(&self, place: usize) -> ByteCount {
        takeable(&self.state.models[place]).all.saturating_sub(self.took[place])
    }

    pub(super) fn place(&self, id: ModelId) -> Option<usize> {
        self.index.get(&id).copied()
    }

    /// The whole of the model at `place`, as a candidate to be asked for `request` now; none where it cannot be asked.
    pub(super) fn whole(&self, place: usize) -> Option<Candidate> {
        let is_it = |candidate: &&Candidate| candidate.model == place && candidate.part == Part::All;
        self.candidates.iter().find(is_it).copied()
    }

    /// True where the model is running in its turn.
    pub(super) fn in_turn(&self, model: &ModelState) -> bool {
        model.is_whole()
            && (model.is_busy() || self.lingers_until(model).is_some())
            && self.protected_until(model).is_some()
    }
}

/// Weights, and what steps take beside them, that `model` still needs before it can use what `request` asks for. KV in the
/// room of them would keep them out for ever, since KV that is in use is not given up for one's own weights.
pub(super) fn owed(model: &ModelState, request: &PendingRequest) -> ByteCount {
    match request.kind {
        LeaseKind::Kv => model.weights_total.saturating_sub(model.weights_held) + model.overhead_lacking,
        LeaseKind::Weights | LeaseKind::Overhead => ByteCount::ZERO,
    }
}

/// KV that the model asking for something else has itself, and that [`Field::most`] counts as held for good: its requests
/// use it, or nobody may order it away.
pub(super) fn in_use(model: &ModelState, request: &PendingRequest) -> ByteCount {
    match request.kind {
        LeaseKind::Kv => ByteCount::ZERO,
        _ if !model.ready => ByteCount::ZERO,
        _ if model.pinned => model.kv_held,
        _ => model.kv_live.min(model.kv_held),
    }
}

/// `since_ms`, moved by what a priority counts.
fn head_start(since_ms: u64, priority: i32) -> i64 {
    let steps = i64::from(priority.clamp(-PRIORITY_STEPS_MAX, PRIORITY_STEPS_MAX));
    i64::try_from(since_ms).unwrap_or(i64::MAX) - steps * PRIORITY_HEAD_START_MS
}

/// When `keep_alive` ends for an idle model.
pub(super) fn kept_until(model: &ModelState) -> Option<u64> {
    model.keep_alive_ms.map(|kept| model.last_used_ms.saturating_add(kept))
}

/// What a model cannot be made to yield. The bytes of one that is ending all come back.
pub(super) fn kept(model: &ModelState) -> ByteCount {
    if !model.ready {
        ByteCount::ZERO
    } else if model.pinned || keeps_all(model) {
        model.held()
    } else {
        floor(model).min(model.held())
    }
}

/// [`kept`] once it has no weights any more, where it can be made to give up all of them.
pub(super) fn kept_for_good(model: &ModelState) -> ByteCount {
    let all_weights_may_go = !model.pinned && !keeps_all(model) && floor(model) <= model.overhead_held;
    let rest = kept(model).saturating_sub(model.overhead_leaves).max(model.min);
    if all_weights_may_go { rest.min(kept(model)) } else { kept(model) }
}

/// It has no weights, or none any more once it has given up `ordered`, what is cached last or before them.
fn loses_weights(model: &ModelState, ordered: ByteCount, cached_last: bool) -> bool {
    let all = if cached_last { model.weights_held + before_weights(model, true) } else { model.stands() };
    model.weights_held.is_zero() || ordered >= all
}

/// What a model gives up before its weights: KV that no request uses, of which what is cached may go after them.
fn before_weights(model: &ModelState, cached_last: bool) -> ByteCount {
    let spare = model.kv_held.saturating_sub(model.kv_live);
    if cached_last { spare.saturating_sub(model.kv_cached) } else { spare }
}

/// What of its overhead is free before long once it has no weights any more.
fn leaves(model: &ModelState) -> ByteCount {
    kept(model).saturating_sub(kept_for_good(model))
}

/// It has a minimum, and cannot give up what is above it alone.
fn keeps_all(model: &ModelState) -> bool {
    model.is_rigid && (!model.min.is_zero() || model.keeps_weights)
}

/// What is never ordered of a model that is not pinned.
pub(super) fn floor(model: &ModelState) -> ByteCount {
    let weights = if model.keeps_weights { model.weights_held } else { ByteCount::ZERO };
    model.min.max(model.overhead_held + weights)
}

/// How long `model` may run before it can be made to yield: the quantum, or twice the time that bringing it back takes
/// where that is longer, and that at most a minute.
#[must_use]
pub fn turn_ms(state: &ShelfState, model: &ModelState) -> u64 {
    state.quantum_ms.max(model.restore_ms().saturating_mul(TURN_RESTORES).min(SETTLED_MS_MAX))
}

/// What may be ordered of a model at all. Where nothing is evicted by itself, only what nobody misses.
fn left_of(model: &ModelState, is_manual: bool) -> Left {
    let left = takeable(model);
    if !is_manual {
        return left;
    }
    Left { all: left.unused, weights: ByteCount::ZERO, spare: left.unused, ..left }
}

/// What a model could give up, whether or not it may be asked by itself.
fn takeable(model: &ModelState) -> Left {
    // Whoever is rigid and was ordered to go is on its way with all it has.
    let is_leaving = model.is_rigid && !model.ordered.is_zero();
    if model.pinned || !model.ready || keeps_all(model) || is_leaving {
        return Left::default();
    }
    let all = model.held().saturating_sub(floor(model));
    let spare = model.kv_held.saturating_sub(model.kv_live);
    let unused = spare.saturating_sub(model.kv_cached).min(all);
    let spare = spare.min(all);
    let weights = if model.keeps_weights { ByteCount::ZERO } else { model.weights_held.min(all) };
    let mut left = Left { all, weights, spare, unused, cached_last: model.ordered_cached_last };
    // On its way already, in the order that it was told.
    left.take(model.ordered);
    Left { cached_last: false, ..left }
}

/// What two kinds of bytes are worth together, each with how many there are.
fn blended((one, one_bytes): (u64, ByteCount), (other, other_bytes): (u64, ByteCount)) -> u64 {
    let sum = u128::from(one) * u128::from(one_bytes.0) + u128::from(other) * u128::from(other_bytes.0);
    let bytes = u128::from(one_bytes.0) + u128::from(other_bytes.0);
    sum.checked_div(bytes).map_or(one.max(other), |worth| u64::try_from(worth).unwrap_or(u64::MAX))
}
