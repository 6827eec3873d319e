//! A turn: one holder at a time, first come first served, with deadlines (I10).
//!
//! Who has it may lend it while all that it does is wait for copies ([`Taken::lend`]): then those who map memory elsewhere,
//! or fill what they have there, have it one at a time ([`Turn::take_or_borrow`]), past those who need it whole, who could
//! not have it anyway. What was lent is had back before anything else is done with it.
//!
//! Apart from [`crate::gate`] because nobody shares it. First come first served, so that one who takes it again and
//! again does not keep others out. Its locks come from [`crate::sync`], so that `tests/turn_model.rs` can put loom's in their
//! place and try every order in which threads may meet here.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::sync::{Condvar, Mutex};

/// How often who has lent the turn looks whether it is back; it is told, too.
const LOOK_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct State {
    is_taken: bool,
    /// Who has it lends it.
    is_lent: bool,
    is_borrowed: bool,
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
    is_borrowed: bool,
}

/// The turn is lent as long as this lives; dropping it waits for who has borrowed it.
#[derive(Debug)]
pub(crate) struct Lent<'a> {
    turn: &'a Turn,
}

impl Turn {
    /// Takes the turn; `None` if the deadline passes first.
    pub(crate) fn take(self: &Arc<Self>, deadline: Instant) -> Option<Taken> {
        self.take_as(false, deadline)
    }

    /// Takes the turn, or borrows it from who lends it: for mapping memory, or filling it, and nothing else. `None` if the
    /// deadline passes first.
    pub(crate) fn take_or_borrow(self: &Arc<Self>, deadline: Instant) -> Option<Taken> {
        self.take_as(true, deadline)
    }

    fn take_as(self: &Arc<Self>, may_borrow: bool, deadline: Instant) -> Option<Taken> {
        let mut state = self.state.lock();
        state.tickets += 1;
        let ticket = state.tickets;
        state.waiting.push_back(ticket);
        let mut is_late = false;
        let is_borrowed = loop {
            if !state.is_taken && state.waiting.front() == Some(&ticket) {
                break Some(false);
            }
            if may_borrow && state.is_lent && !state.is_borrowed {
                break Some(true);
            }
            if is_late {
                break None;
            }
            is_late = self.changed.wait_until(&mut state, deadline).timed_out();
        };
        state.waiting.retain(|waiting| *waiting != ticket);
        match is_borrowed {
            Some(true) => state.is_borrowed = true,
            Some(false) => state.is_taken = true,
            None => {}
        }
        drop(state);
        if is_borrowed != Some(false) {
            // Those behind it have moved up.
            self.changed.notify_all();
        }
        is_borrowed.map(|is_borrowed| Taken { turn: Arc::clone(self), is_borrowed })
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

    /// Lends it to those who map memory, until what this gives is dropped. What was borrowed is not lent again.
    pub(crate) fn lend(&self) -> Option<Lent<'_>> {
        if self.is_borrowed {
            return None;
        }
        self.turn.state.lock().is_lent = true;
        self.turn.changed.notify_all();
        Some(Lent { turn: &self.turn })
    }

    /// Whether it is another's, who only waits for copies meanwhile.
    pub(crate) const fn is_borrowed(&self) -> bool {
        self.is_borrowed
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        {
            let mut state = self.turn.state.lock();
            if self.is_borrowed {
                state.is_borrowed = false;
            } else {
                state.is_taken = false;
            }
        }
        self.turn.changed.notify_all();
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut state = self.turn.state.lock();
        state.is_lent = false;
        // Who maps has deadlines of its own, so this ends; without it nothing can go on.
        while state.is_borrowed {
            self.turn.changed.wait_until(&mut state, Instant::now() + LOOK_EVERY);
        }
    }
}
