//! The turn among real threads; `tests/turn_model.rs` tries every order of a few.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::turn::Turn;

#[test]
fn those_who_wait_come_in_their_order_and_one_who_gives_up_blocks_nobody() {
    let turn = Arc::new(Turn::default());
    let far = || Instant::now() + Duration::from_mins(1);
    let held = turn.take(far()).expect("free");
    assert!(turn.take(Instant::now() + Duration::from_millis(5)).is_none());
    let (send, order) = mpsc::channel();
    let waiters: Vec<_> = (0..4)
        .map(|number| {
            let (waiting, send) = (Arc::clone(&turn), send.clone());
            let patience = if number == 1 { Duration::from_millis(20) } else { Duration::from_mins(1) };
            let waiter = thread::spawn(move || {
                let taken = waiting.take(Instant::now() + patience);
                if taken.is_some() {
                    send.send(number).expect("heard");
                }
            });
            while turn.asked_and_waiting().0 < number + 3 {
                thread::sleep(Duration::from_millis(1));
            }
            waiter
        })
        .collect();
    while turn.asked_and_waiting().1 > 3 {
        thread::sleep(Duration::from_millis(1));
    }
    drop(held);
    for waiter in waiters {
        waiter.join().expect("no panic");
    }
    drop(send);
    assert_eq!(order.iter().collect::<Vec<_>>(), [0, 2, 3]);
}
