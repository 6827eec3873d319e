//! The one currency: what a byte on the device is worth, whatever it holds.
//!
//! A MiB is worth the **time to first token that it saves, per second that it is kept**:
//!
//! ```text
//! worth = cost x part x use            (us of somebody's waiting, per second and MiB)
//! cost  = us to bring a MiB back       (its link: host copy, source file; a KV prefix: a link or computing it again)
//! part  = what one use needs of it     (of weights: all; of KV prefixes: what is found again, as measured)
//! use   = uses / (window + idle + 1 s) (how often somebody came, over the time that was watched)
//! ```
//!
//! or, where it is known when somebody comes next ([`Rhythm`](super::Rhythm)), one use over the time until then,
//! doubled with each step of the model's priority. All bytes of a model's weights are worth the same, because a first
//! token needs the last of them; which of them go first (the last layer) is the page table's part. KV that nobody uses
//! and that holds nothing is worth nothing. KV that holds prefixes is worth what bringing back costs that part of them which a
//! use finds again: of ten conversations one goes on, and the other nine would not be missed.
//!
//! **Source.** Dividing cost by size and weighting it with use is GreedyDual-Size with frequency (P. Cao, S. Irani,
//! "Cost-Aware WWW Proxy Caching Algorithms", USITS 1997; L. Cherkasova, HPL-98-69, 1998), which for files that may be held
//! in part is Landlord (N. E. Young, "On-Line File Caching", SODA 1998): rent is taken from every byte, and bytes leave where
//! their credit is used up. Use over the time since it was first seen, instead of a clock that is raised with each
//! eviction, is hyperbolic caching (A. Blankstein, S. Sen, M. J. Freedman, "Hyperbolic Caching", USENIX ATC 2017). It needs
//! no state beside a model's own, so that a decision can be made again from its log (I11).
//!
//! Apart from [`super::victims`], which orders who is asked by this and by who may be asked at all.

use core::fmt;

use serde::{Deserialize, Serialize};

use super::PRIORITY_STEPS_MAX;
use super::state::ModelState;

/// How long a use is remembered: after this, it counts for 37 of 100. Of half a minute to half an hour, what serves
/// conversations best on the traces of `benches/shelf_traces` (independent requests do not care).
pub const USE_MEMORY_MS: u64 = 120_000;
/// Added to the time that uses are spread over, so that a model just used is not worth infinitely much.
const IDLE_FLOOR_MS: u64 = 1_000;
/// A cost above this is as good as this (18 minutes for a MiB).
const COST_US_MAX: u64 = 1 << 30;
/// A use needs all of it, in thousandths.
const WHOLE_MILLI: u64 = 1_000;

/// How often a model has been used, as far as it is remembered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UseRate {
    /// Uses, in thousandths; older ones count less.
    pub uses_milli: u64,
    /// The time from the first to the last of them, faded alike (milliseconds).
    pub window_ms: u64,
    /// When the last one was.
    pub last_ms: Option<u64>,
}

impl UseRate {
    /// Somebody came at `now_ms` to whom it mattered that the bytes were there: not each request of a conversation, but
    /// each one that came after a pause in which the bytes might have gone.
    pub fn note(&mut self, now_ms: u64) {
        let gap_ms = self.last_ms.map_or(0, |last| now_ms.saturating_sub(last));
        let kept = (-(gap_ms as f64) / USE_MEMORY_MS as f64).exp();
        self.uses_milli = faded(self.uses_milli, kept) + 1_000;
        self.window_ms = faded(self.window_ms.saturating_add(gap_ms), kept);
        self.last_ms = Some(now_ms);
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a part of a u64 that is not negative"
)]
fn faded(value: u64, kept: f64) -> u64 {
    (value as f64 * kept) as u64
}

/// What keeping a MiB for a second is worth: microseconds of waiting, in 256ths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Worth(pub u64);

impl Worth {
    /// The worth of bytes of `model` that cost so many microseconds a MiB to bring back, and of which a use needs so many
    /// thousandths.
    #[must_use]
    pub fn of(model: &ModelState, cost_us_per_mib: u64, part_milli: u64, now_ms: u64) -> Self {
        let steps = model.priority.clamp(-PRIORITY_STEPS_MAX, PRIORITY_STEPS_MAX) + PRIORITY_STEPS_MAX;
        let cost = u128::from(cost_us_per_mib.clamp(1, COST_US_MAX)) << steps.unsigned_abs();
        let used = u128::from(uses_milli(model)) * u128::from(part_milli.min(WHOLE_MILLI));
        let spread = u128::from(spread_ms(model, now_ms)) * u128::from(WHOLE_MILLI);
        Self(u64::try_from(cost * used / spread).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Worth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0 as f64 / 256.0;
        if micros < 10.0 { write!(f, "{micros:.2} us") } else { write!(f, "{micros:.0} us") }
    }
}

/// The uses that are counted of a model, in thousandths: one, where it is known when that comes.
pub(super) fn uses_milli(model: &ModelState) -> u64 {
    if model.expected_ms.is_some() { 1_000 } else { model.uses_milli.max(1_000) }
}

/// The time that a model's uses are spread over: until the next one, where it is known when that comes.
pub(super) fn spread_ms(model: &ModelState, now_ms: u64) -> u64 {
    if let Some(expected_ms) = model.expected_ms {
        return expected_ms.saturating_sub(now_ms).saturating_add(IDLE_FLOOR_MS);
    }
    let idle_ms = now_ms.saturating_sub(model.last_used_ms);
    model.uses_window_ms.saturating_add(idle_ms).saturating_add(IDLE_FLOOR_MS)
}

/// What the weights of `model` are worth.
#[must_use]
pub fn of_weights(model: &ModelState, now_ms: u64) -> Worth {
    Worth::of(model, model.restore_us_per_mib, WHOLE_MILLI, now_ms)
}

/// What the KV of `model` that holds prefixes and that no request uses is worth. Where nobody knows what computing it
/// again costs, it is taken to cost what weights do, and where nobody knows what is found again of it, that is all.
#[must_use]
pub fn of_cached_kv(model: &ModelState, now_ms: u64) -> Worth {
    let cost =
        if model.kv_back_us_per_mib == 0 { model.restore_us_per_mib } else { model.kv_back_us_per_mib };
    let part = if model.kv_found_milli == 0 { WHOLE_MILLI } else { model.kv_found_milli };
    Worth::of(model, cost, part, now_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(cost: u64, uses_milli: u64, uses_window_ms: u64, last_used_ms: u64) -> ModelState {
        ModelState {
            restore_us_per_mib: cost,
            uses_milli,
            uses_window_ms,
            last_used_ms,
            ..ModelState::default()
        }
    }

    #[test]
    fn worth_is_cost_times_use() {
        // 100 us a MiB, used once, 9 s ago: 10 us for every second that it is kept.
        let once = of_weights(&model(100, 1_000, 0, 1_000), 10_000);
        assert_eq!((once.0, once.to_string()), (10 << 8, "10 us".to_owned()));
        assert_eq!(of_weights(&model(200, 1_000, 0, 1_000), 10_000).0, 20 << 8, "twice the way back");
        assert_eq!(
            of_weights(&model(100, 4_000, 30_000, 1_000), 10_000).0,
            10 << 8,
            "4 in 40 s as 1 in 10 s"
        );
        assert_eq!(of_weights(&ModelState { priority: 1, ..model(100, 1_000, 0, 1_000) }, 10_000).0, 20 << 8);
        assert!(of_weights(&model(u64::MAX, u64::MAX, 0, 0), 0).0 == u64::MAX, "and does not overflow");
    }

    #[test]
    fn a_prefix_is_worth_what_bringing_it_back_costs() {
        let mut cached = model(100, 1_000, 0, 1_000);
        assert_eq!(
            of_cached_kv(&cached, 10_000),
            of_weights(&cached, 10_000),
            "as weights, where nobody knows"
        );
        cached.kv_back_us_per_mib = 3_000;
        assert_eq!(of_cached_kv(&cached, 10_000).0, 300 << 8);
        cached.kv_found_milli = 20;
        assert_eq!(of_cached_kv(&cached, 10_000).0, 6 << 8, "what a use finds again of it");
        assert_eq!(of_weights(&cached, 10_000).0, 10 << 8, "of weights it needs all");
        cached.kv_found_milli = 4_000;
        assert_eq!(of_cached_kv(&cached, 10_000).0, 300 << 8, "more than all there is not");
    }

    #[test]
    fn steady_use_is_told_from_a_burst_long_ago() {
        let (mut steady, mut burst) = (UseRate::default(), UseRate::default());
        for second in 0..60 {
            steady.note(second * 60_000);
        }
        for second in 0..20 {
            burst.note(second * 1_000);
        }
        let at = |rate: &UseRate, now_ms| {
            let used = rate.last_ms.expect("used");
            of_weights(&model(100, rate.uses_milli, rate.window_ms, used), now_ms).0
        };
        assert!(at(&burst, 25_000) > at(&steady, 25_000), "the burst while it lasts");
        assert!(at(&burst, 3_600_000) < at(&steady, 3_600_000), "but not an hour later");
        assert!(
            (2_000..=3_000).contains(&steady.uses_milli),
            "one a minute, two minutes remembered: {steady:?}"
        );
    }
}
