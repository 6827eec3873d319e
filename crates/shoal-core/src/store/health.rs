//! When a disk has failed too often to be asked for now.
//!
//! Apart because it is a rule about times and counts, and times are arguments here.

use std::collections::VecDeque;

/// How much failing is too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthRule {
    /// So many failures ..
    pub failures_max: u32,
    /// .. within this time set a disk aside.
    pub window_ms: u64,
    /// How long before it is tried again; doubled by each return that fails, up to [`RETRY_MS_MAX`].
    pub retry_ms: u64,
}

/// The longest that a disk is left alone: an hour.
pub const RETRY_MS_MAX: u64 = 3_600_000;

impl Default for HealthRule {
    fn default() -> Self {
        Self { failures_max: 8, window_ms: 60_000, retry_ms: 30_000 }
    }
}

/// The failures of one disk.
#[derive(Clone, Debug)]
pub struct Health {
    rule: HealthRule,
    recent_ms: VecDeque<u64>,
    returns_failed: u32,
}

impl Health {
    /// A disk that has not failed.
    #[must_use]
    pub fn new(rule: HealthRule) -> Self {
        Self { rule, recent_ms: VecDeque::new(), returns_failed: 0 }
    }

    /// Notes a failure at `now_ms`; whether the disk is to be set aside.
    pub fn failed(&mut self, now_ms: u64) -> bool {
        while self.recent_ms.front().is_some_and(|at| now_ms.saturating_sub(*at) >= self.rule.window_ms) {
            self.recent_ms.pop_front();
        }
        self.recent_ms.push_back(now_ms);
        self.recent_ms.len() >= self.rule.failures_max.max(1) as usize
    }

    /// The disk was set aside: in how many milliseconds it is tried again.
    pub fn set_aside(&mut self) -> u64 {
        self.recent_ms.clear();
        let doublings = self.returns_failed.min(20);
        self.returns_failed = self.returns_failed.saturating_add(1);
        self.rule.retry_ms.saturating_mul(1 << doublings).min(RETRY_MS_MAX.max(self.rule.retry_ms))
    }

    /// The disk served a request after its return.
    pub fn served(&mut self) {
        self.returns_failed = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_close_together_count_and_waits_double() {
        let mut health = Health::new(HealthRule { failures_max: 3, window_ms: 100, retry_ms: 10 });
        for now in [0, 60, 120, 180, 240] {
            assert!(!health.failed(now), "{now}");
        }
        assert!(health.failed(250));
        assert_eq!([health.set_aside(), health.set_aside(), health.set_aside()], [10, 20, 40]);
        health.served();
        assert_eq!(health.set_aside(), 10);
        assert!(!health.failed(251), "the old ones are forgotten");
        for _ in 0..100 {
            assert!(health.set_aside() <= RETRY_MS_MAX);
        }
    }
}
