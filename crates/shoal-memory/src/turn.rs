//! A turn: one holder at a time, first come first served, with deadlines (I10).
//!
//! Apart from [`crate::gate`] because nobody shares it. First come first served, so that one who takes it again and
//! again does not keep others out. Its locks come from [`crate::sync`], so that `tests/turn_model.rs` can put loom's in their
//! place and try every order in which threads may meet here.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crate::sync::{Condvar, Mutex};

#[derive(Debug, Default)]
struct State {
    is_taken: bool,
    waiting: VecDeque<u64>,
    tickets: u64,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    state: Mutex<State>,
    changed: Condvar,
}

/// The turn; dropping it lets the next one have it.
#[derive(Debug)]
pub(crate) struct Taken {
    turn: Arc<Turn>,
}

impl Turn {
    /// Takes the turn; `None` if the deadline passes first.
    pub(crate) fn take(self: &Arc<Self>, deadline: Instant) -> Option<Taken> {
        let mut state = self.state.lock();
        state.tickets += 1;
        let ticket = state.tickets;
        state.waiting.push_back(ticket);
        while state.is_taken || state.waiting.front() != Some(&ticket) {
            if self.changed.wait_until(&mut state, deadline).timed_out()
                && (state.is_taken || state.waiting.front() != Some(&ticket))
            {
                state.waiting.retain(|waiting| *waiting != ticket);
                drop(state);
                self.changed.notify_all();
                return None;
            }
        }
        state.waiting.pop_front();
        state.is_taken = true;
        Some(Taken { turn: Arc::clone(self) })
    }
}

impl Turn {
    /// Whether nobody has it at this moment.
    pub(crate) fn is_free(&self) -> bool {
        !self.state.lock().is_taken
    }

    /// How many have ever asked for it, and how many wait.
    #[cfg(test)]
    pub(crate) fn asked_and_waiting(&self) -> (u64, usize) {
        let state = self.state.lock();
        (state.tickets, state.waiting.len())
    }
}

impl Taken {
    /// Whether somebody waits for it.
    pub(crate) fn is_wanted(&self) -> bool {
        !self.turn.state.lock().waiting.is_empty()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.turn.state.lock().is_taken = false;
        self.turn.changed.notify_all();
    }
}
