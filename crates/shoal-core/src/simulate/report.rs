//! What came of a trace: counts as they are made, and the figures that people read.

use serde::Serialize;

use super::kind::Kind;
use crate::bytes::ByteCount;
use crate::policy::thrash::ThrashFigures;

/// What happened to one model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that came.
    pub requests: u64,
    /// From when each came to its first token (milliseconds), sorted; of those that had one.
    pub first_ms: Vec<u64>,
    /// Requests refused: the model can never be there, or too many waited for it.
    pub refused: u64,
    /// Why its weights were first turned down.
    pub refused_why: Option<String>,
    /// Requests that waited too long.
    pub timed_out: u64,
    /// Answers that ended before their time, because their model could not come back.
    pub broken_off: u64,
    /// How often weights were brought back.
    pub wakes: u64,
    /// How often it was ordered to give some up.
    pub evictions: u64,
    /// Bytes brought back.
    pub moved: ByteCount,
    /// Of the whole trace.
    pub thrash: ThrashFigures,
    /// How long it was wholly there.
    pub up_ms: u64,
}

/// What came of a trace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Each model, in the order they were given.
    pub models: Vec<Tally>,
    /// When the last thing happened.
    pub ended_ms: u64,
    /// The most bytes held at any time.
    pub held_max: ByteCount,
    /// How often the policy was asked.
    pub plans: u64,
    /// How often it said what must not be done, and `value` decided.
    pub plans_refused: u64,
    /// What was wrong the first time.
    pub refused_why: Option<String>,
}

/// The figures of a trace under one policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The policy.
    pub policy: String,
    /// Virtual time played, in seconds.
    pub played_s: f64,
    /// The most bytes held at any time.
    pub held_bytes_max: ByteCount,
    /// How often the policy was asked.
    pub plans: u64,
    /// How often it said what must not be done, and `value` decided in its place.
    pub plans_refused: u64,
    /// What was wrong the first time.
    pub plan_refused_why: Option<String>,
    /// Each model, in the configuration's order.
    pub models: Vec<Figures>,
    /// All together.
    pub total: Figures,
}

/// The figures of one model, or of all.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Its name; `total` for all.
    pub name: String,
    /// Requests that came.
    pub requests: u64,
    /// Requests that had a first token.
    pub served: u64,
    /// Requests refused.
    pub refused: u64,
    /// Why, the first time that it was because the model can never be there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused_why: Option<String>,
    /// Requests that waited too long.
    pub timed_out: u64,
    /// Answers that ended before their time.
    pub broken_off: u64,
    /// From a request to its first token, in seconds; none where nobody had one.
    pub first_token_s: Option<Spread>,
    /// How often weights were brought back.
    pub wakes: u64,
    /// How often memory was ordered back.
    pub evictions: u64,
    /// Bytes brought back.
    pub moved_bytes: ByteCount,
    /// Of those, what had left within the minute before.
    pub thrashed_bytes: ByteCount,
    /// That over the weights that requests were answered with.
    pub thrash_index: f64,
    /// The part of the time in which it was wholly there; for all, the mean of the models'.
    pub resident: f64,
}

/// A distribution, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// Half are no longer.
    pub p50: f64,
    /// 99 of 100 are no longer.
    pub p99: f64,
    /// The mean.
    pub mean: f64,
    /// The longest.
    pub max: f64,
}

impl Spread {
    /// Of milliseconds that are sorted; none of none.
    #[must_use]
    pub fn of(sorted_ms: &[u64]) -> Option<Self> {
        let last = sorted_ms.len().checked_sub(1)?;
        let at = |percent: usize| sorted_ms[(sorted_ms.len() * percent / 100).min(last)] as f64 / 1e3;
        let mean = sorted_ms.iter().sum::<u64>() as f64 / sorted_ms.len() as f64 / 1e3;
        Some(Self { p50: at(50), p99: at(99), mean, max: sorted_ms[last] as f64 / 1e3 })
    }
}

impl Outcome {
    /// Its figures.
    #[must_use]
    pub fn report(&self, policy: &str, kinds: &[Kind]) -> Report {
        let figures = |(kind, tally): (&Kind, &Tally)| Figures::of(&kind.name, tally, self.ended_ms);
        let models: Vec<Figures> = kinds.iter().zip(&self.models).map(figures).collect();
        let mut all = Tally::default();
        for tally in &self.models {
            all.add(tally);
        }
        all.first_ms.sort_unstable();
        let mut total = Figures::of("total", &all, self.ended_ms);
        total.resident /= models.len().max(1) as f64;
        total.refused_why = None;
        Report {
            policy: policy.to_owned(),
            played_s: self.ended_ms as f64 / 1e3,
            held_bytes_max: self.held_max,
            plans: self.plans,
            plans_refused: self.plans_refused,
            plan_refused_why: self.refused_why.clone(),
            models,
            total,
        }
    }
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.first_ms.extend(&other.first_ms);
        self.refused += other.refused;
        self.timed_out += other.timed_out;
        self.broken_off += other.broken_off;
        self.wakes += other.wakes;
        self.evictions += other.evictions;
        self.moved += other.moved;
        self.thrash = [self.thrash, other.thrash].into_iter().sum();
        self.up_ms += other.up_ms;
    }
}

impl Figures {
    fn of(name: &str, tally: &Tally, ended_ms: u64) -> Self {
        Self {
            name: name.to_owned(),
            requests: tally.requests,
            served: tally.first_ms.len() as u64,
            refused: tally.refused,
            refused_why: tally.refused_why.clone(),
            timed_out: tally.timed_out,
            broken_off: tally.broken_off,
            first_token_s: Spread::of(&tally.first_ms),
            wakes: tally.wakes,
            evictions: tally.evictions,
            moved_bytes: tally.moved,
            thrashed_bytes: tally.thrash.thrashed,
            thrash_index: tally.thrash.index(),
            resident: tally.up_ms as f64 / ended_ms.max(1) as f64,
        }
    }
}
