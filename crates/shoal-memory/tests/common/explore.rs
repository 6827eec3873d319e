//! How the tests with loom go through the orders in which a few threads may meet.

use std::time::{Duration, Instant};

/// A deadline that is not the matter of the test.
pub(crate) fn far() -> Instant {
    Instant::now() + Duration::from_hours(1)
}

/// All orders with at most so many changes of thread where none would have had to be.
pub(crate) fn explore(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}
