//! A turn: one holder at a time, first come first served, with deadlines (I10).
//!
//! Apart from [`crate::gate`] because nobody shares it. First come first served, so that one who takes it again and
//! again does not keep others out.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn those_who_wait_come_in_their_order_and_one_who_gives_up_blocks_nobody() {
        let turn = Arc::new(Turn::default());
        let far = || Instant::now() + Duration::from_secs(10);
        let held = turn.take(far()).expect("free");
        assert!(turn.take(Instant::now() + Duration::from_millis(5)).is_none());
        let (send, order) = mpsc::channel();
        let waiters: Vec<_> = (0..4)
            .map(|number| {
                let (waiting, send) = (Arc::clone(&turn), send.clone());
                let patience = if number == 1 { Duration::from_millis(20) } else { Duration::from_secs(10) };
                let waiter = thread::spawn(move || {
                    let taken = waiting.take(Instant::now() + patience);
                    if taken.is_some() {
                        send.send(number).expect("heard");
                    }
                });
                while turn.state.lock().tickets < number + 3 {
                    thread::sleep(Duration::from_millis(1));
                }
                waiter
            })
            .collect();
        while turn.state.lock().waiting.len() > 3 {
            thread::sleep(Duration::from_millis(1));
        }
        drop(held);
        for waiter in waiters {
            waiter.join().expect("no panic");
        }
        drop(send);
        assert_eq!(order.iter().collect::<Vec<_>>(), [0, 2, 3]);
    }
}
