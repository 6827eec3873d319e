//! A policy as a value: what can be chosen, replaced, and run beside another.
//!
//! [`Value`] is the default. [`Lru`] is what most managers of models do (whole models, the one that was not used for
//! longest first), with the same fairness and the same limits; it is the peer in benchmarks. Whatever else implements
//! [`Policy`] is checked by [`super::check`] before it is obeyed.

use core::fmt::Debug;

use super::decide::{plan, plan_by};
use super::state::{Plan, ShelfState};
use super::victims::Choice;

/// Decides who gives bytes up for whom.
///
/// Pure: the same state and time give the same plan, so that a decision can be made again from its log (I11).
pub trait Policy: Debug + Send + Sync {
    /// As in the configuration and in the decision log.
    fn name(&self) -> &str;

    /// What to do at `now_ms`, a time of the same clock as those in `state`.
    fn plan(&self, state: &ShelfState, now_ms: u64) -> Plan;
}

/// By what each byte is worth: [`super::worth`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Value;

impl Policy for Value {
    fn name(&self) -> &'static str {
        "value"
    }

    fn plan(&self, state: &ShelfState, now_ms: u64) -> Plan {
        plan(state, now_ms)
    }
}

/// Whole models, the one that was not used for longest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lru;

impl Policy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn plan(&self, state: &ShelfState, now_ms: u64) -> Plan {
        plan_by(state, now_ms, Choice::WholeLru)
    }
}

/// The names of [`builtin`] policies, the default first.
pub const BUILTIN: [&str; 2] = ["value", "lru"];

/// The policy of that name, where it is one of ours.
#[must_use]
pub fn builtin(name: &str) -> Option<Box<dyn Policy>> {
    match name {
        "value" => Some(Box::new(Value)),
        "lru" => Some(Box::new(Lru)),
        _ => None,
    }
}
