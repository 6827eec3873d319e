//! Plays requests in virtual time against a policy: what a shelf would do, before there is one.
//!
//! The policy is the one that the server uses, [`crate::policy`]; only the world around it is simulated. So it shows who
//! waits for whom, how long, and how much moves for it; it says nothing of how fast anything computes.
//!
//! | module | subject |
//! |---|---|
//! | [`kind`] | a shelf's limits, its models, the requests that come |
//! | [`trace`] | requests as text |
//! | [`seeded`] | requests from a seed |
//! | [`world`] | time passes |
//! | [`report`] | what came of it |
//!
//! **Taken as it is:** every decision, the age and the turns of models, what their weights cost to bring back, limits,
//! priorities, pins, `keep_alive`, places (`parallel_max`), deadlines, one link over which one model comes after another. A
//! request whose model is taken while it runs stands still until the weights are back.
//!
//! **Not modelled:** memory for KV and what it takes from weights; that requests which run together slow each other down,
//! in one model or in several on one device; starts and deaths of workers; memory that others take of the device; requests
//! that overlap with the copies of their own wake.

pub mod kind;
pub mod report;
pub mod seeded;
#[cfg(test)]
mod tests;
pub mod trace;
pub mod world;

pub use kind::{Arrival, Kind, Settings};
pub use report::{Figures, Outcome, Report, Spread};
pub use seeded::{Pattern, seeded};
pub use trace::{Asked, Service, TraceError};
pub use world::{Told, World};

use crate::policy::Policy;

/// Plays a trace, which is in order of time, and gives its figures; `told` hears of every action.
#[must_use]
pub fn play(
    policy: &dyn Policy,
    settings: &Settings,
    kinds: &[Kind],
    trace: &[Arrival],
    told: Told<'_>,
) -> Report {
    World::new(policy, settings.clone(), kinds).play(trace, told).report(policy.name(), kinds)
}
