//! What something costs, learned from what it took.
//!
//! Apart because one rule serves reading and computing: so much to begin, so much for each byte or token.

use core::fmt;

use serde::Serialize;

/// Samples that count; older ones are forgotten.
const SAMPLES: usize = 16;
/// Shorter than anything takes.
const UNIT_US_MIN: f64 = 1e-9;
/// Longer than anybody waits: eleven days.
const US_MAX: f64 = 1e12;

/// So much to begin, and so much for each unit, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cost {
    /// To begin.
    pub fixed_us: f64,
    /// For each unit. Infinite where it cannot be done at all.
    pub unit_us: f64,
}

impl Cost {
    /// Of what cannot be done.
    pub const NEVER: Self = Self { fixed_us: 0.0, unit_us: f64::INFINITY };

    /// From a latency and units a second. Nothing a second, or what is no number, is never.
    #[must_use]
    pub fn of_rate(latency_us: f64, per_s: f64) -> Self {
        Self { fixed_us: latency_us, unit_us: if per_s > 0.0 { 1e6 / per_s } else { f64::INFINITY } }
    }

    /// Of so many units. Nothing costs nothing; what is no sensible number is never.
    #[must_use]
    pub fn of(&self, units: f64) -> f64 {
        if units <= 0.0 {
            return 0.0;
        }
        let us = self.fixed_us.max(0.0) + units * self.unit_us;
        if us.is_nan() || self.fixed_us.is_nan() || self.unit_us < 0.0 { f64::INFINITY } else { us }
    }

    /// Units a second, once it has begun.
    #[must_use]
    pub fn per_s(&self) -> f64 {
        1e6 / self.unit_us
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} us and then {:.0} a second", self.fixed_us, self.per_s())
    }
}

/// A cost as far as it is known: a line through the last samples by the medians of Theil (1950) and Sen (1968), so that
/// a quarter of them may be far off. Until there are enough, a guess fills up what is missing.
#[derive(Clone, Debug)]
pub struct Estimate {
    guess: Cost,
    samples: Vec<(f64, f64)>,
    next: usize,
    seen: u64,
    cost: Cost,
}

impl Estimate {
    /// One that has seen nothing and guesses.
    #[must_use]
    pub fn new(guess: Cost) -> Self {
        let guess =
            Cost { fixed_us: bounded(guess.fixed_us, 0.0), unit_us: bounded(guess.unit_us, UNIT_US_MIN) };
        Self { guess, samples: Vec::with_capacity(SAMPLES), next: 0, seen: 0, cost: guess }
    }

    /// Learns that `units` took `us`. What is no sensible number (none, nothing, negative, infinite) teaches nothing.
    pub fn saw(&mut self, units: u64, us: f64) {
        if units == 0 || !us.is_finite() || us <= 0.0 {
            return;
        }
        let sample = (units as f64, us.min(US_MAX));
        match self.samples.get_mut(self.next) {
            Some(place) => *place = sample,
            None => self.samples.push(sample),
        }
        self.next = (self.next + 1) % SAMPLES;
        self.seen = self.seen.saturating_add(1);
        self.cost = self.fitted();
    }

    /// What is known.
    #[must_use]
    pub const fn cost(&self) -> Cost {
        self.cost
    }

    /// How many samples it saw.
    #[must_use]
    pub const fn seen(&self) -> u64 {
        self.seen
    }

    fn fitted(&self) -> Cost {
        let mut points = self.samples.clone();
        // The guess counts as one sample among few, of a length that was seen, and as none among many.
        if points.len() < SAMPLES / 4 {
            let units = points[0].0;
            points.push((units, self.guess.of(units)));
        }
        let slopes = points.iter().enumerate().flat_map(|(index, one)| {
            let later = &points[index + 1..];
            // Lengths that are close say nothing of the slope: the noise of a time would be divided by little.
            let apart = |other: &&(f64, f64)| (other.0 - one.0).abs() >= 0.25 * other.0.max(one.0);
            later.iter().filter(apart).map(|other| (other.1 - one.1) / (other.0 - one.0))
        });
        let rates = points.iter().map(|(units, us)| us / units);
        let slopes: Vec<f64> = slopes.collect();
        // With lengths all alike there is no telling what is fixed: the guess says, at most half of what was seen.
        let alike = || {
            let rate = median(rates.clone().collect());
            let units = median(points.iter().map(|(units, _)| *units).collect());
            let fixed = self.guess.fixed_us.min(rate * units / 2.0);
            rate - fixed / units
        };
        let is_enough = slopes.len() >= points.len();
        let unit_us = if is_enough { median(slopes) } else { alike() };
        // Where longer ones took no longer, what they took is all fixed, but no unit is for nothing.
        let least = median(rates.clone().collect()) / 1000.0;
        let unit_us = bounded(unit_us.max(least), UNIT_US_MIN);
        let fixed = median(points.iter().map(|(units, us)| us - unit_us * units).collect());
        Cost { fixed_us: bounded(fixed, 0.0), unit_us }
    }
}

/// Between `least` and the longest that is believed; what is no number is the longest.
fn bounded(us: f64, least: f64) -> f64 {
    if us.is_nan() { US_MAX } else { us.clamp(least, US_MAX) }
}

/// The middle one, or between the middle two. Of none: zero.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle.wrapping_sub(1)), values.get(middle)) {
        (Some(low), Some(high)) if values.len().is_multiple_of(2) => f64::midpoint(*low, *high),
        (_, Some(value)) => *value,
        (_, None) => 0.0,
    }
}
