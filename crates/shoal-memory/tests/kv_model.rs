//! Where the threads of a KV cache meet, in every order in which a few of them may (loom): the signal of the cache's own
//! thread, and reclaims that ask an engine for what it only remembers. The same source as the crate's, with loom's locks. A
//! wait without end is a deadlock that loom tells of: a call or an answer that was lost.

use std::sync::Arc;
use std::time::Instant;

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use shoal_core::bytes::ByteCount;

#[path = "common/explore.rs"]
mod explore;
#[path = "../src/kv_cache/meeting.rs"]
#[expect(dead_code, reason = "the crate uses more of it")]
mod meeting;
#[path = "../src/kv_cache/signal.rs"]
mod signal;
#[path = "common/loom_sync.rs"]
#[expect(unused, reason = "the gate uses more of it")]
mod sync;

use explore::{explore, far};
use meeting::Meeting;
use signal::Signal;

#[test]
fn no_call_is_lost_whenever_it_comes() {
    explore(4, || {
        // Each caller leaves one piece of work and calls, as an allocation, a hint or a new limit does.
        let (signal, work) = (Arc::new(Signal::default()), Arc::new(AtomicUsize::new(0)));
        let callers: Vec<_> = (0..2)
            .map(|_| {
                let (signal, work) = (Arc::clone(&signal), Arc::clone(&work));
                thread::spawn(move || {
                    work.fetch_add(1, Ordering::SeqCst);
                    signal.call();
                })
            })
            .collect();
        let mut done = 0;
        while done < 2 {
            assert!(signal.wait(far()), "nobody has ended it");
            done += work.swap(0, Ordering::SeqCst);
        }
        for caller in callers {
            caller.join().expect("no panic");
        }
    });
}

#[test]
fn the_thread_ends_whatever_it_is_doing_and_maps_nothing_from_then_on() {
    explore(4, || {
        let signal = Arc::new(Signal::default());
        let ending = {
            let signal = Arc::clone(&signal);
            thread::spawn(move || {
                signal.pause(far());
                signal.end();
            })
        };
        let calling = {
            let signal = Arc::clone(&signal);
            thread::spawn(move || signal.call())
        };
        while signal.wait(far()) {}
        assert!(signal.is_stopped());
        ending.join().expect("no panic");
        calling.join().expect("no panic");
    });
}

#[test]
fn a_refusal_does_not_shorten_the_pause_after_a_reclaim() {
    explore(4, || {
        let signal = Arc::new(Signal::default());
        let reclaiming = {
            let signal = Arc::clone(&signal);
            thread::spawn(move || signal.pause(far()))
        };
        signal.pause(Instant::now());
        reclaiming.join().expect("no panic");
        signal.pause(Instant::now());
        assert!(signal.is_stopped(), "what was taken is not to be taken again yet");
    });
}

/// An engine that serves until it has said how many bytes it freed in all.
fn serve(meeting: &Meeting, wanted: ByteCount) {
    let mut freed = ByteCount::ZERO;
    while freed < wanted {
        let (number, bytes) = meeting.next(far()).expect("asked");
        freed += bytes;
        meeting.answer(number, bytes);
    }
}

fn served() -> Arc<Meeting> {
    let meeting = Arc::new(Meeting::default());
    assert_eq!(meeting.next(Instant::now()), None, "it serves from here on");
    meeting
}

#[test]
fn each_question_is_answered_and_no_byte_is_counted_twice() {
    explore(4, || {
        let meeting = served();
        let asking: Vec<_> = [1, 2]
            .into_iter()
            .map(|pages| {
                let meeting = Arc::clone(&meeting);
                thread::spawn(move || meeting.ask(ByteCount(pages), far()))
            })
            .collect();
        serve(&meeting, ByteCount(3));
        let told: ByteCount = asking.into_iter().map(|asked| asked.join().expect("no panic")).sum();
        assert_eq!(told, ByteCount(3), "all that was freed is told, once");
    });
}

#[test]
fn who_gives_up_takes_nobodys_question_along() {
    explore(4, || {
        let meeting = served();
        let hasty = {
            let (meeting, past) = (Arc::clone(&meeting), Instant::now());
            thread::spawn(move || meeting.ask(ByteCount(2), past))
        };
        let engine = {
            let meeting = Arc::clone(&meeting);
            thread::spawn(move || {
                // Until the patient one's byte is among what was asked for.
                loop {
                    let (number, bytes) = meeting.next(far()).expect("asked");
                    meeting.answer(number, bytes);
                    if bytes.0 % 2 == 1 {
                        return;
                    }
                }
            })
        };
        assert!(meeting.ask(ByteCount(1), far()) <= ByteCount(3));
        hasty.join().expect("no panic");
        engine.join().expect("no panic");
    });
}
