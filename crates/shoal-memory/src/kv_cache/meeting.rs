//! Where reclaims meet an engine that keeps books of its own: questions, one after another or several at once, and answers.
//!
//! Apart from [`super::keeper`], which says what they mean, so that `tests/kv_model.rs` can put loom's locks in the place of
//! [`crate::sync`]'s and try every order in which threads may meet here. Every wait has a deadline (I10).

use std::time::Instant;

use shoal_core::bytes::ByteCount;

use crate::sync::{Condvar, Mutex};

#[derive(Debug, Default)]
struct State {
    /// Somebody has waited for a question.
    is_served: bool,
    /// Numbers of the newest question and of the newest answer.
    asked: u64,
    answered: u64,
    /// How many wait for an answer.
    askers: u32,
    /// What all of them want that the engine has not heard of.
    wanted: Option<ByteCount>,
    freed: ByteCount,
    /// Bytes that the engine says it only remembers.
    kept: ByteCount,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

impl Meeting {
    /// Asks the engine; what it freed since somebody was told last, zero where none serves or none answers in time.
    pub(crate) fn ask(&self, bytes: ByteCount, deadline: Instant) -> ByteCount {
        let mut state = self.state.lock();
        if !state.is_served {
            return ByteCount::ZERO;
        }
        if state.askers == 0 {
            // An answer that came too late is none to this question.
            state.freed = ByteCount::ZERO;
        }
        state.asked += 1;
        state.askers += 1;
        let number = state.asked;
        // Whoever wants all there is says the largest number.
        state.wanted = Some(ByteCount(state.wanted.map_or(0, |wanted| wanted.0).saturating_add(bytes.0)));
        self.changed.notify_all();
        let mut is_late = false;
        while state.answered < number && !is_late {
            is_late = self.changed.wait_until(&mut state, deadline).timed_out();
        }
        state.askers -= 1;
        if state.answered >= number {
            return std::mem::take(&mut state.freed);
        }
        if state.askers == 0 {
            // Else others still wait for what they asked together with this.
            state.wanted = None;
        }
        ByteCount::ZERO
    }

    /// Waits for a question: its number, and what is wanted in all. From the first call on the engine serves.
    pub(crate) fn next(&self, deadline: Instant) -> Option<(u64, ByteCount)> {
        let mut state = self.state.lock();
        state.is_served = true;
        while state.wanted.is_none() {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        let bytes = state.wanted.take()?;
        Some((state.asked, bytes))
    }

    /// Answers the question of a number, and all before it.
    pub(crate) fn answer(&self, number: u64, freed: ByteCount) {
        let mut state = self.state.lock();
        if number > state.answered && number <= state.asked {
            state.answered = number;
            state.freed = ByteCount(state.freed.0.saturating_add(freed.0));
        }
        drop(state);
        self.changed.notify_all();
    }

    #[cfg(test)]
    pub(crate) fn is_served(&self) -> bool {
        self.state.lock().is_served
    }

    pub(crate) fn kept(&self) -> ByteCount {
        self.state.lock().kept
    }

    pub(crate) fn set_kept(&self, bytes: ByteCount) {
        self.state.lock().kept = bytes;
    }
}
