//! A gate that many may share or one may have alone, with deadlines (I13, I10).
//!
//! Apart because a pass is held across calls of a foreign language and given back on another thread, which the usual
//! locks forbid. Who wants the gate alone is not starved: while one waits, nobody new may share it.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

#[derive(Debug, Default)]
struct State {
    shared: usize,
    alone: bool,
    waiting_alone: usize,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// A pass through a [`Gate`]; dropping it leaves.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
    alone: bool,
}

impl Gate {
    /// Shares the gate; `None` if the deadline passes first.
    pub(crate) fn share(self: &Arc<Self>, deadline: Instant) -> Option<Pass> {
        let mut state = self.state.lock();
        while state.alone || state.waiting_alone > 0 {
            if self.changed.wait_until(&mut state, deadline).timed_out()
                && (state.alone || state.waiting_alone > 0)
            {
                return None;
            }
        }
        state.shared += 1;
        Some(Pass { gate: Arc::clone(self), alone: false })
    }

    /// Whether somebody shares it at this moment.
    pub(crate) fn is_shared(&self) -> bool {
        self.state.lock().shared > 0
    }

    /// Takes the gate alone; `None` if the deadline passes first.
    pub(crate) fn alone(self: &Arc<Self>, deadline: Instant) -> Option<Pass> {
        let mut state = self.state.lock();
        state.waiting_alone += 1;
        while state.alone || state.shared > 0 {
            if self.changed.wait_until(&mut state, deadline).timed_out() && (state.alone || state.shared > 0)
            {
                state.waiting_alone -= 1;
                self.changed.notify_all();
                return None;
            }
        }
        state.waiting_alone -= 1;
        state.alone = true;
        Some(Pass { gate: Arc::clone(self), alone: true })
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = self.gate.state.lock();
        if self.alone {
            state.alone = false;
        } else {
            state.shared -= 1;
        }
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(30)
    }

    #[test]
    fn alone_means_alone_and_a_waiting_one_comes_first() {
        let gate = Arc::new(Gate::default());
        let first = gate.share(soon()).expect("free");
        let second = gate.share(soon()).expect("shared");
        assert!(gate.alone(soon()).is_none());
        drop(second);
        let waiting = {
            let gate = Arc::clone(&gate);
            thread::spawn(move || gate.alone(Instant::now() + Duration::from_secs(10)).is_some())
        };
        while gate.state.lock().waiting_alone == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(gate.share(soon()).is_none(), "the one that waits is not starved");
        drop(first);
        assert!(waiting.join().expect("no panic"));
        assert!(gate.share(soon()).is_some());
        let alone = gate.alone(soon()).expect("free");
        assert!(gate.share(soon()).is_none());
        drop(alone);
    }
}
