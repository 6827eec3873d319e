//! Whether a remote is asked at all.
//!
//! Apart because an outage must cost misses and no waiting: after a few failures nothing is asked for a while, then one
//! request tries (M. Nygard, "Release It!", 2007: circuit breaker). The counting is shoal-core's (`store::health`).

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_core::store::health::{Health, HealthRule};

use crate::store::Miss;

#[derive(Debug)]
enum State {
    Asked,
    /// Nothing is asked until then.
    Aside {
        until: Instant,
        reason: String,
    },
    /// One request finds out.
    Trying {
        since: Instant,
        reason: String,
    },
}

/// See the module.
#[derive(Debug)]
pub(super) struct Breaker {
    begun: Instant,
    retry_max: Duration,
    trial_max: Duration,
    inner: Mutex<(Health, State, u64)>,
}

impl Breaker {
    /// It is tried again after `retry_max` at the latest; a trial that says nothing for `trial_max` is another's.
    pub(super) fn new(rule: HealthRule, retry_max: Duration, trial_max: Duration) -> Self {
        let inner = Mutex::new((Health::new(rule), State::Asked, 0));
        Self { begun: Instant::now(), retry_max, trial_max, inner }
    }

    /// Whether a request may be made now.
    pub(super) fn may_ask(&self, now: Instant) -> Result<(), Miss> {
        let mut inner = self.inner.lock();
        let (since, reason) = match &inner.1 {
            State::Asked => return Ok(()),
            State::Aside { until, reason } => (*until, reason.clone()),
            State::Trying { since, reason } => (*since + self.trial_max, reason.clone()),
        };
        if now < since {
            return Err(Miss::Aside { reason });
        }
        inner.1 = State::Trying { since: now, reason };
        Ok(())
    }

    /// Why nothing is asked, if so.
    pub(super) fn aside(&self, now: Instant) -> Option<String> {
        match &self.inner.lock().1 {
            State::Asked => None,
            State::Aside { until, .. } if *until <= now => None,
            State::Aside { reason, .. } | State::Trying { reason, .. } => Some(reason.clone()),
        }
    }

    /// It answered as it should.
    pub(super) fn served(&self) {
        let mut inner = self.inner.lock();
        if !matches!(inner.1, State::Asked) {
            tracing::info!("the remote tier answers again");
            inner.1 = State::Asked;
        }
        inner.0.served();
    }

    /// It did not.
    pub(super) fn failed(&self, reason: &str, now: Instant) {
        let now_ms = u64::try_from(now.saturating_duration_since(self.begun).as_millis()).unwrap_or(u64::MAX);
        let mut inner = self.inner.lock();
        let is_too_much = inner.0.failed(now_ms) || matches!(inner.1, State::Trying { .. });
        if is_too_much && !matches!(inner.1, State::Aside { .. }) {
            let retry = Duration::from_millis(inner.0.set_aside()).min(self.retry_max);
            tracing::warn!(reason, ?retry, "the remote tier is set aside");
            inner.1 = State::Aside { until: now + retry, reason: reason.to_owned() };
            inner.2 += 1;
        }
    }

    /// Times it was set aside.
    pub(super) fn asides(&self) -> u64 {
        self.inner.lock().2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_finds_out_whether_it_is_back() {
        let rule = HealthRule { failures_max: 2, window_ms: 1000, retry_ms: 100 };
        let breaker = Breaker::new(rule, Duration::from_millis(300), Duration::from_secs(9));
        let at = |ms: u64| breaker.begun + Duration::from_millis(ms);
        breaker.failed("one", at(0));
        assert_eq!(breaker.may_ask(at(1)), Ok(()));
        breaker.failed("two", at(2));
        assert_eq!(breaker.may_ask(at(3)), Err(Miss::Aside { reason: "two".to_owned() }));
        breaker.failed("still under way", at(4));
        assert_eq!(breaker.may_ask(at(102)), Ok(()), "this one tries");
        assert!(breaker.may_ask(at(103)).is_err(), "and no other");
        breaker.failed("three", at(104));
        assert!(breaker.may_ask(at(303)).is_err(), "twice as long");
        assert_eq!(breaker.may_ask(at(304)), Ok(()));
        assert_eq!(breaker.may_ask(at(304 + 9000)), Ok(()), "a trial that never ends is another's");
        breaker.served();
        assert_eq!((breaker.aside(at(9305)), breaker.may_ask(at(9305))), (None, Ok(())));
        assert_eq!(breaker.asides(), 2);
        for round in 0..10 {
            breaker.failed("again", at(10_000 + 1000 * round));
            breaker.failed("again", at(10_000 + 1000 * round));
            assert_eq!(breaker.may_ask(at(10_300 + 1000 * round)), Ok(()), "never longer than the longest");
        }
    }
}
