//! What the cache's own thread is told: that there is something to look at, to keep still for a while, to end.
//!
//! Apart from [`super::ahead`], which does what is told, so that `tests/kv_model.rs` can put loom's locks in the place of
//! [`crate::sync`]'s and try every order in which threads may meet here. A call is never lost: what comes while the thread
//! works is heard when it would sleep.

use std::time::Instant;

use crate::sync::{Condvar, Mutex};

#[derive(Debug, Default)]
struct State {
    is_called: bool,
    is_over: bool,
    /// It maps nothing before.
    paused_until: Option<Instant>,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    state: Mutex<State>,
    changed: Condvar,
}

impl Signal {
    /// Calls the thread.
    #[inline]
    pub(crate) fn call(&self) {
        // Nobody holds it for longer than it takes to look at it. Not tried but taken: a call that comes while the thread
        // is about to sleep must be heard.
        let mut state = self.state.lock();
        if !state.is_called {
            state.is_called = true;
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Ends the thread when it looks next.
    pub(crate) fn end(&self) {
        self.state.lock().is_over = true;
        self.changed.notify_all();
    }

    /// Keeps the thread from mapping until then, or for longer if that was said before.
    pub(crate) fn pause(&self, until: Instant) {
        let mut state = self.state.lock();
        state.paused_until = state.paused_until.max(Some(until));
    }

    /// Whether the thread is to map nothing now: the cache ends, or memory was just taken from it.
    pub(crate) fn is_stopped(&self) -> bool {
        let state = self.state.lock();
        state.is_over || state.paused_until.is_some_and(|until| until > Instant::now())
    }

    /// Sleeps until it is called, or until the deadline. False: it is over.
    pub(crate) fn wait(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        while !state.is_called && !state.is_over {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        state.is_called = false;
        !state.is_over
    }
}
