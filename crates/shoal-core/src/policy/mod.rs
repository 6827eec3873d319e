//! Who gives bytes up for whom: a pure function from the shelf's state to actions in bytes, each with its reason.
//!
//! [`plan`] reads no clock and remembers nothing, so a decision can be made again from its logged state (I11), and the
//! same code runs in the server, in tests and over traces.
//!
//! # How a request for bytes is met
//! Requests are served by age. A model that wants to come back counts from when it began to want, not from its newest
//! request; each step of priority counts as [`PRIORITY_HEAD_START_MS`] of age, within [`PRIORITY_STEPS_MAX`] steps.
//! 1. **Free bytes**, if they do for the least that is of use.
//! 2. **KV that nobody uses and that holds nothing**; the asking model's own first, then that of any model.
//! 3. **What is worth least**, in one currency ([`worth`]): weights of idle models, and KV of any model that holds prefixes
//!    which no request uses. Idle models that were brought back only just now come after those, and models within their
//!    `keep_alive` after all others. Where uses come in rounds ([`Rhythm`]), what is used last is worth least, also where
//!    it was brought back only just now.
//! 4. **Models that wait behind** the request and hold bytes they cannot run with. For KV of a model in its turn, any that
//!    wait and hold a part of their weights, however old: they cannot run before that turn is over, and whoever runs would
//!    stand still beside bytes that nobody can use.
//! 5. **Busy models whose turn is over**, longest turn first, and only for the least that is of use. Where one has to stop,
//!    it gives before those who wait: it comes back after them. A turn is a
//!    quantum, or twice the time that bringing the model back takes where that is longer (at most a minute), counted from
//!    the moment a model became wholly resident, had the KV of a request and was used; the caller does not begin a new one
//!    while somebody waits. Until then a model is as old as its wake, and has no turn: weights without KV would wear the
//!    turn out in waiting.
//!
//! A model whose requests follow each other sooner than it could be brought back counts as busy in the pause between
//! two, within its turn: the pauses of a few clients do not end it.
//!
//! KV never takes the room of weights that its own model lacks: what is in use is not given up for them, so the model could
//! not run again. Such a request is denied, as one that comes while the weights are there.
//!
//! A model that gave weights up while it waited for others is granted all that it lacks by then, and nothing while it still
//! gives some up, KV included: with a part it could not run. So a model whose turn just ended takes nothing from the one
//! that comes next.
//!
//! Only what is needed is taken, in whole extents; of a rigid model all or nothing. Pinned models give nothing, no model is
//! taken below its minimum, of one that does not sleep only KV is taken. Two models that may not stand beside each other
//! ([`ModelState::apart`]) never hold weights or KV at the same time: who asks second waits until the other, once it is
//! idle or its turn is over, has given all of it up, and does not come back before that. Where both are there when they are set
//! apart, one of them goes though nobody asks: who would be asked first if it were for a request, and not within its turn.
//! Where nothing is to be evicted by itself ([`ShelfState::is_manual`]) only step 1 and 2 are taken, and requests wait for
//! somebody to act.
//!
//! # When others take memory of the device
//! What they have comes off the budget ([`ShelfState::taken`]). Where more is leased by then, that comes back in the same
//! order, before any request is met; nobody asked for it, so nobody's age counts. A model in its turn keeps what it runs
//! with, and so does one that could not run with what is left. A request that cannot be met only because of it waits, for
//! others may leave, and holds nobody up. So does one for which leases for overhead are in the way that may fall
//! ([`ShelfState::falling`]).
//!
//! What a process had that is gone is granted to nobody until the device is seen to have it back
//! ([`ShelfState::returning`]). Until then it counts as coming, for whoever asked first, as if its holder had been ordered to
//! give it up. What the driver still shows after some seconds is not waited for any more: it counts as others' then, and is off
//! the budget.
//!
//! # What only steps take
//! An engine may take memory in its steps that it asks nobody for. It is leased with its weights: a request for them has
//! [`ModelState::overhead_lacking`] in it. With the last of its weights it is free again
//! ([`ModelState::overhead_leaves`]), and counts as coming from whoever is asked for all of them. Where that was a guess and
//! less came, the next plan knows.
//!
//! # Against thrashing
//! What is brought back runs for a turn, is asked last for a while when it is idle, and is not taken for the sake of what
//! nobody asked for: a model is preloaded only into what is free. How much moves for nothing all the same is the
//! [thrash index](thrash).
//!
//! # Why nobody starves
//! The oldest request that cannot be met yet keeps what it needs: younger ones get what is left over once all turns have
//! ended that had begun when it was asked, and nothing else (models in their turn may still grow, because that memory
//! can be taken back when their turn is over). A turn that began later does not count towards what is left over: small
//! models let in on the strength of one another would keep a large one out for ever.
//!
//! A model that was resident already may begin one turn while a request waits, since nothing is taken before all can
//! be. So with `k` requests before it, now or later (priority lets younger ones pass), and `r` models wholly resident
//! when it was asked, a request waits for at most `k + r + 1` turns, each as long as the longest turn, bringing the largest
//! model back, and an answer of a victim. Pins, starts and deaths begin the count anew. A request that could not be met
//! even with everything that may be taken is denied at once. One whose deadline is there is granted from what is free, or
//! denied: nobody is disturbed for it.
//!
//! # Other policies
//! All this is the policy [`Value`]. Others are a [`Policy`] too; each plan of one that is not ours is [checked](check())
//! before it is obeyed, and any can watch as a [`Shadow`].

mod check;
mod decide;
mod links;
mod policies;
mod reason;
mod rounds;
mod shadow;
mod state;
pub mod thrash;
mod victims;
pub mod worth;

#[cfg(test)]
mod apart;
#[cfg(test)]
mod beside;
#[cfg(test)]
mod crowded;
#[cfg(test)]
mod growth;
#[cfg(test)]
mod in_turn;
#[cfg(test)]
mod prefixes;
#[cfg(test)]
mod tests;

pub use check::check;
pub use decide::plan;
pub use links::LinkSpeeds;
pub use policies::{BUILTIN, Lru, Policy, Value, builtin};
pub use rounds::{Rhythm, Turns};
pub use shadow::{Shadow, ShadowCounts};
pub use state::{Action, ModelState, PendingRequest, Plan, ShelfState};
pub use victims::turn_ms;
pub use worth::UseRate;

/// How much older a request counts for each step of its model's priority.
pub const PRIORITY_HEAD_START_MS: i64 = 1_000;
/// Steps of priority, up or down, that make a difference.
pub const PRIORITY_STEPS_MAX: i32 = 8;
