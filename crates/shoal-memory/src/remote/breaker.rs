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
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    health: Health,
    state: State,
    /// For how long it was set aside the last time.
    retry: Duration,
    asides: u64,
}

impl Breaker {
    /// It is tried again after `retry_max` at the latest; a trial that says nothing for `trial_max` is another's.
    pub(super) fn new(rule: HealthRule, retry_max: Duration, trial_max: Duration) -> Self {
        let inner =
            Inner { health: Health::new(rule), state: State::Asked, retry: Duration::ZERO, asides: 0 };
        Self { begun: Instant::now(), retry_max, trial_max, inner: Mutex::new(inner) }
    }

    /// Whether a request may be made now, and whether it is the one that finds out: then it has to end with one of
    /// [`served`](Self::served), [`failed`](Self::failed) and [`undecided`](Self::undecided).
    pub(super) fn may_ask(&self, now: Instant) -> Result<bool, Miss> {
        let mut inner = self.inner.lock();
        let (since, reason) = match &inner.state {
            State::Asked => return Ok(false),
            State::Aside { until, reason } => (*until, reason.clone()),
            State::Trying { since, reason } => (*since + self.trial_max, reason.clone()),
        };
        if now < since {
            return Err(Miss::Aside { reason });
        }
        inner.state = State::Trying { since: now, reason };
        Ok(true)
    }

    /// Why nothing is asked, if so.
    pub(super) fn aside(&self, now: Instant) -> Option<String> {
        match &self.inner.lock().state {
            State::Asked => None,
            State::Aside { until, .. } if *until <= now => None,
            // It has not said anything for too long: the next request finds out.
            State::Trying { since, .. } if *since + self.trial_max <= now => None,
            State::Aside { reason, .. } | State::Trying { reason, .. } => Some(reason.clone()),
        }
    }

    /// The request that was to find out had no time for it. Set aside for as long as before, or each request in turn would
    /// wait in vain.
    pub(super) fn undecided(&self, now: Instant) {
        let mut inner = self.inner.lock();
        if let State::Trying { reason, .. } = &inner.state {
            inner.state = State::Aside { until: now + inner.retry, reason: reason.clone() };
        }
    }

    /// It answered as it should.
    pub(super) fn served(&self) {
        let mut inner = self.inner.lock();
        if !matches!(inner.state, State::Asked) {
            tracing::info!("the remote tier answers again");
            inner.state = State::Asked;
        }
        inner.health.served();
    }

    /// It did not.
    pub(super) fn failed(&self, reason: &str, now: Instant) {
        let now_ms = u64::try_from(now.saturating_duration_since(self.begun).as_millis()).unwrap_or(u64::MAX);
        let mut inner = self.inner.lock();
        let is_too_much = inner.health.failed(now_ms) || matches!(inner.state, State::Trying { .. });
        if is_too_much && !matches!(inner.state, State::Aside { .. }) {
            let retry = Duration::from_millis(inner.health.set_aside()).min(self.retry_max);
            tracing::warn!(reason, ?retry, "the remote tier is set aside");
            inner.state = State::Aside { until: now + retry, reason: reason.to_owned() };
            inner.retry = retry;
            inner.asides += 1;
        }
    }

    /// Times it was set aside.
    pub(super) fn asides(&self) -> u64 {
        self.inner.lock().asides
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
        assert_eq!(breaker.may_ask(at(1)), Ok(false));
        breaker.failed("two", at(2));
        assert_eq!(breaker.may_ask(at(3)), Err(Miss::Aside { reason: "two".to_owned() }));
        breaker.failed("still under way", at(4));
        assert_eq!(breaker.may_ask(at(102)), Ok(true), "this one tries");
        assert!(breaker.may_ask(at(103)).is_err(), "and no other");
        breaker.failed("three", at(104));
        assert!(breaker.may_ask(at(303)).is_err(), "twice as long");
        assert_eq!(breaker.may_ask(at(304)), Ok(true));
        assert!(breaker.aside(at(304 + 8999)).is_some());
        assert_eq!(breaker.aside(at(304 + 9000)), None, "callers are told, or nobody would ask");
        assert_eq!(breaker.may_ask(at(304 + 9000)), Ok(true), "a trial that never ends is another's");
        breaker.served();
        assert_eq!((breaker.aside(at(9305)), breaker.may_ask(at(9305))), (None, Ok(false)));
        assert_eq!(breaker.asides(), 2);
        for round in 0..10 {
            breaker.failed("again", at(10_000 + 1000 * round));
            breaker.failed("again", at(10_000 + 1000 * round));
            assert_eq!(breaker.may_ask(at(10_300 + 1000 * round)), Ok(true), "never longer than the longest");
        }
    }

    #[test]
    fn a_trial_that_had_no_time_is_no_verdict() {
        let rule = HealthRule { failures_max: 1, window_ms: 1000, retry_ms: 100 };
        let breaker = Breaker::new(rule, Duration::from_secs(9), Duration::from_secs(9));
        let at = |ms: u64| breaker.begun + Duration::from_millis(ms);
        breaker.undecided(at(0));
        assert_eq!(breaker.may_ask(at(0)), Ok(false), "nobody was to find out");
        breaker.failed("it hangs", at(0));
        for round in 1..5 {
            let now = 100 * round + round;
            assert_eq!(breaker.may_ask(at(now)), Ok(true));
            breaker.undecided(at(now));
            assert_eq!(breaker.aside(at(now + 99)), Some("it hangs".to_owned()));
            assert_eq!(breaker.aside(at(now + 100)), None, "neither for ever nor for longer each time");
        }
        assert_eq!(breaker.asides(), 1);
    }
}
