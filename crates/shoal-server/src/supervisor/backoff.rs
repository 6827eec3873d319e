//! How long to wait before a worker that ended is started again.

use std::time::Duration;

/// Doubles with every failure in a row, up to a bound; a worker that lived long enough starts afresh.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    bound: Duration,
    forgiven_after: Duration,
    failures: u32,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new(Duration::from_millis(200), Duration::from_secs(30), Duration::from_mins(1))
    }
}

impl Backoff {
    /// Wait `first` after one failure, twice as long after each further one, `bound` at most; a life of `forgiven_after`
    /// wipes the record.
    #[must_use]
    pub const fn new(first: Duration, bound: Duration, forgiven_after: Duration) -> Self {
        Self { first, bound, forgiven_after, failures: 0 }
    }

    /// A worker ended after `lived`: how long to wait before the next one.
    pub fn ended(&mut self, lived: Duration) -> Duration {
        if lived >= self.forgiven_after {
            self.failures = 0;
        }
        let wait = self.first.saturating_mul(1 << self.failures.min(20)).min(self.bound);
        self.failures = self.failures.saturating_add(1);
        wait
    }

    /// Failures in a row so far.
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_the_bound_and_forgives() {
        let mut backoff =
            Backoff::new(Duration::from_secs(1), Duration::from_secs(6), Duration::from_mins(1));
        let waits: Vec<u64> = (0..5).map(|_| backoff.ended(Duration::ZERO).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 6, 6]);
        assert_eq!(backoff.ended(Duration::from_mins(2)).as_secs(), 1);
        assert_eq!(backoff.failures(), 1);
    }
}
