//! The turn that those who map take, in every order in which a few threads may meet (loom): the same source as the crate's,
//! with loom's locks. A wait without end is a deadlock that loom tells of; a deadline that has passed may be heard of at any
//! later moment.

use std::sync::Arc;
use std::time::{Duration, Instant};

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

#[path = "../src/turn.rs"]
#[expect(dead_code, reason = "the crate uses more of it")]
mod turn;

/// What `crate::sync` of the crate is, over loom.
mod sync {
    use std::fmt;
    use std::ops::{Deref, DerefMut};
    use std::time::Instant;

    #[derive(Default)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn lock(&self) -> Guard<'_, T> {
            Guard { mutex: &self.0, held: Some(self.0.lock().expect("no panic")) }
        }
    }

    impl<T> fmt::Debug for Mutex<T> {
        fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
            to.write_str("Mutex")
        }
    }

    pub(crate) struct Guard<'a, T> {
        mutex: &'a loom::sync::Mutex<T>,
        held: Option<loom::sync::MutexGuard<'a, T>>,
    }

    impl<T> Deref for Guard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.held.as_ref().expect("held but while it waits")
        }
    }

    impl<T> DerefMut for Guard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.held.as_mut().expect("held but while it waits")
        }
    }

    #[derive(Debug)]
    pub(crate) struct Condvar(loom::sync::Condvar);

    impl Default for Condvar {
        fn default() -> Self {
            Self(loom::sync::Condvar::new())
        }
    }

    pub(crate) struct Waited(bool);

    impl Waited {
        pub(crate) fn timed_out(&self) -> bool {
            self.0
        }
    }

    impl Condvar {
        /// Waits without end for a deadline that lies ahead; one that has passed is heard of at some later moment.
        pub(crate) fn wait_until<T>(&self, guard: &mut Guard<'_, T>, deadline: Instant) -> Waited {
            let held = guard.held.take().expect("held");
            if deadline <= Instant::now() {
                drop(held);
                loom::thread::yield_now();
                guard.held = Some(guard.mutex.lock().expect("no panic"));
                return Waited(true);
            }
            guard.held = Some(self.0.wait(held).expect("no panic"));
            Waited(false)
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}

use turn::Turn;

fn far() -> Instant {
    Instant::now() + Duration::from_hours(1)
}

/// All orders with at most so many changes of thread where none would have had to be.
fn explore(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// Takes the turn, and is alone with it.
fn take(turn: &Arc<Turn>, inside: &AtomicUsize, deadline: Instant) -> bool {
    let Some(taken) = turn.take(deadline) else { return false };
    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two have the turn");
    thread::yield_now();
    assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
    drop(taken);
    true
}

#[test]
fn one_has_it_at_a_time_and_nobody_waits_for_ever() {
    explore(5, || {
        let (turn, inside) = (Arc::new(Turn::default()), Arc::new(AtomicUsize::new(0)));
        let others: Vec<_> = (0..2)
            .map(|_| {
                let (turn, inside) = (Arc::clone(&turn), Arc::clone(&inside));
                thread::spawn(move || assert!(take(&turn, &inside, far())))
            })
            .collect();
        assert!(take(&turn, &inside, far()));
        for other in others {
            other.join().expect("no panic");
        }
        assert!(turn.is_free());
        assert_eq!(turn.asked_and_waiting(), (3, 0));
    });
}

#[test]
fn who_gives_up_keeps_nobody_waiting() {
    explore(5, || {
        let (turn, inside) = (Arc::new(Turn::default()), Arc::new(AtomicUsize::new(0)));
        let past = Instant::now();
        let hasty = {
            let (turn, inside) = (Arc::clone(&turn), Arc::clone(&inside));
            // It may have it, or give up while others have it or wait behind it.
            thread::spawn(move || take(&turn, &inside, past))
        };
        let patient = {
            let (turn, inside) = (Arc::clone(&turn), Arc::clone(&inside));
            thread::spawn(move || assert!(take(&turn, &inside, far())))
        };
        assert!(take(&turn, &inside, far()));
        hasty.join().expect("no panic");
        patient.join().expect("no panic");
        assert!(turn.is_free());
        assert_eq!(turn.asked_and_waiting(), (3, 0));
    });
}
