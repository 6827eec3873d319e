//! How many blocks to keep mapped ahead of need, from how many were needed lately.
//!
//! Apart because it is a forecast: it can be wrong without anything else being wrong. Mapping takes a tenth of a
//! millisecond, a step of an engine ten, so what the next moments need is mapped before; and since mapping again what was
//! given back a moment ago is waste, memory that was in use within the window stays. With no demand for a whole window
//! nothing is kept. Time is an argument: whatever clock the caller has, from any start.

use core::time::Duration;

/// Moments that are remembered.
const MOMENTS: usize = 8;
/// How long one of them is.
pub const MOMENT: Duration = Duration::from_millis(250);
/// A hint counts for as long: it speaks of the next step, and a step that has not come by then will not.
const HINT_LASTS: Duration = Duration::from_secs(2);

/// What was in use during a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Moment {
    /// The most blocks that were in use.
    peak: u32,
    /// How far use rose above what it was before.
    rise: u32,
}

/// What was announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hint {
    blocks: u32,
    /// What will be in use when all of them are taken: what was taken since is announced no more.
    level: u32,
    given: Duration,
}

/// The demand for the blocks of one group.
#[derive(Clone, Debug, Default)]
pub struct Demand {
    past: [Moment; MOMENTS],
    now: Moment,
    /// The lowest use since the moment began.
    low: u32,
    /// Which moment `now` is.
    number: u64,
    hint: Option<Hint>,
}

impl Demand {
    /// So many blocks are in use after some were taken.
    #[inline]
    pub fn rose_to(&mut self, used: u32) {
        if used > self.now.peak {
            self.now.peak = used;
        }
        let rise = used.saturating_sub(self.low);
        if rise > self.now.rise {
            self.now.rise = rise;
        }
    }

    /// So many are in use after some were given back.
    #[inline]
    pub const fn fell_to(&mut self, used: u32) {
        if used < self.low {
            self.low = used;
        }
    }

    /// The next step will take so many blocks, beside the `used` ones.
    pub const fn hint(&mut self, blocks: u32, used: u32, now: Duration) {
        self.hint = Some(Hint { blocks, level: used.saturating_add(blocks), given: now });
    }

    /// Goes on to the time `now`; `used` blocks are in use.
    pub fn advance(&mut self, now: Duration, used: u32) {
        let number = u64::try_from(now.as_millis() / MOMENT.as_millis()).unwrap_or(u64::MAX);
        let ended = number.saturating_sub(self.number).min(MOMENTS as u64);
        for _ in 0..ended {
            self.past.rotate_right(1);
            self.past[0] = self.now;
            self.now = Moment { peak: used, rise: 0 };
            self.low = used;
        }
        self.number = self.number.max(number);
        if self.hint.is_some_and(|hint| now.saturating_sub(hint.given) > HINT_LASTS) {
            self.hint = None;
        }
    }

    /// How many blocks should be free and mapped while `used` are in use: as many as were taken in the busiest of the last
    /// moments, or as lead back to the last peak, or as was announced, whichever is most.
    #[must_use]
    pub fn target(&self, used: u32) -> u32 {
        let all = self.past.iter().chain([&self.now]);
        let (peak, rise) =
            all.fold((0, 0), |(peak, rise), moment| (moment.peak.max(peak), moment.rise.max(rise)));
        rise.max(peak.saturating_sub(used)).max(self.hinted(used))
    }

    /// How many of those that were announced for the next step are still to be taken while `used` are in use.
    #[must_use]
    pub fn hinted(&self, used: u32) -> u32 {
        self.hint.map_or(0, |hint| hint.level.saturating_sub(used).min(hint.blocks))
    }

    /// Whether nothing would change by waiting.
    #[must_use]
    pub fn is_quiet(&self, used: u32) -> bool {
        self.target(used) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(moments: u64) -> Duration {
        MOMENT * u32::try_from(moments).expect("few")
    }

    #[test]
    fn churn_in_place_asks_for_little_and_a_burst_for_as_much_again() {
        let mut demand = Demand::default();
        for _ in 0..1000 {
            demand.rose_to(116);
            demand.fell_to(100);
        }
        demand.advance(at(1), 100);
        for _ in 0..1000 {
            demand.rose_to(116);
            demand.fell_to(100);
        }
        demand.advance(at(12), 100);
        assert_eq!(demand.target(100), 16);
        demand.rose_to(400);
        assert_eq!(demand.target(400), 300, "as much again");
        demand.fell_to(0);
        assert_eq!(demand.target(0), 400, "it may come back");
    }

    #[test]
    fn after_a_window_without_demand_nothing_is_kept() {
        let mut demand = Demand::default();
        demand.rose_to(500);
        demand.fell_to(20);
        demand.hint(50, 20, at(0));
        for moment in 1..=8 {
            demand.advance(at(moment), 20);
            assert_eq!(demand.target(20), 500, "moment {moment}");
        }
        demand.advance(at(9), 20);
        assert_eq!(demand.target(20), 0);
        assert!(demand.is_quiet(20));
        demand.hint(64, 20, at(9));
        assert_eq!(demand.target(20), 64);
        assert_eq!(demand.target(60), 24, "40 of them were taken");
        assert_eq!(demand.target(5), 64, "no more than was said");
        demand.advance(at(18), 20);
        assert_eq!(demand.target(20), 0, "the step did not come");
    }
}
