//! The turn that those who map take, in every order in which a few threads may meet (loom): the same source as the crate's,
//! with loom's locks. A wait without end is a deadlock that loom tells of; a deadline that has passed may be heard of at any
//! later moment.

use std::sync::Arc;
use std::time::Instant;

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

#[path = "../src/turn.rs"]
#[expect(dead_code, reason = "the crate uses more of it")]
mod turn;

#[path = "common/explore.rs"]
mod explore;
#[path = "common/loom_sync.rs"]
#[expect(unused, reason = "the gate uses more of it")]
mod sync;

use explore::{explore, far};
use turn::Turn;

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
fn what_is_lent_is_one_others_at_a_time_and_is_back_before_it_is_used() {
    explore(3, || {
        let (turn, inside) = (Arc::new(Turn::default()), Arc::new(AtomicUsize::new(0)));
        let maps = {
            let (turn, inside) = (Arc::clone(&turn), Arc::clone(&inside));
            thread::spawn(move || {
                let taken = turn.take_or_borrow(far()).expect("lent or free");
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "another has it");
                thread::yield_now();
                assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                drop(taken);
            })
        };
        let evicts = {
            let (turn, inside) = (Arc::clone(&turn), Arc::clone(&inside));
            thread::spawn(move || assert!(take(&turn, &inside, far())))
        };
        let taken = turn.take(far()).expect("comes");
        drop(taken.lend());
        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "it is not back");
        thread::yield_now();
        assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
        drop(taken);
        maps.join().expect("no panic");
        evicts.join().expect("no panic");
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
