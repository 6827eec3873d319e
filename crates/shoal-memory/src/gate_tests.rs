//! The gate among real threads; `tests/gate_model.rs` tries every order of a few.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shoal_core::ids::RegionId;

use crate::gate::{Gate, Scope};

const A: Scope = Scope::Region(RegionId(1));
const B: Scope = Scope::Region(RegionId(2));

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(30)
}

fn far() -> Instant {
    Instant::now() + Duration::from_mins(1)
}

/// Runs `work` on a thread of its own; returns once `has_begun`.
fn aside<T: Send + 'static>(
    gate: &Arc<Gate>,
    has_begun: impl Fn(&Gate) -> bool,
    work: impl FnOnce(Arc<Gate>) -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let own = Arc::clone(gate);
    let worker = thread::spawn(move || work(own));
    while !has_begun(gate) {
        thread::sleep(Duration::from_millis(1));
    }
    worker
}

fn elsewhere<T: Send + 'static>(gate: &Arc<Gate>, work: impl FnOnce(Arc<Gate>) -> T + Send + 'static) -> T {
    aside(gate, |_| true, work).join().expect("no panic")
}

#[test]
fn alone_means_alone_and_a_waiting_one_comes_before_newcomers() {
    let gate = Arc::new(Gate::default());
    let first = gate.share(Scope::All, soon()).expect("free");
    let second = gate.share(Scope::All, soon()).expect("shared");
    assert!(gate.alone(Scope::All, soon()).is_none());
    drop(second);
    let waiting = aside(&gate, |gate| gate.counts().2 > 0, |gate| gate.alone(Scope::All, far()).is_some());
    assert!(elsewhere(&gate, |gate| gate.share(Scope::All, soon()).is_none()), "who waits is not starved");
    assert!(elsewhere(&gate, |gate| gate.share_first(Scope::All, soon()).is_some()));
    drop(first);
    assert!(waiting.join().expect("no panic"));
    assert!(gate.share(Scope::All, soon()).is_some());
    let alone = gate.alone(Scope::All, soon()).expect("free");
    assert!(gate.share(Scope::All, soon()).is_none());
    assert!(gate.share_first(Scope::All, soon()).is_none());
    drop(alone);
    assert_eq!(gate.counts(), (0, 0, 0));
}

#[test]
fn who_waits_to_share_comes_before_the_next_one_alone() {
    let gate = Arc::new(Gate::default());
    let alone = gate.alone(Scope::All, soon()).expect("free");
    let sharer = aside(&gate, |gate| gate.counts().1 > 0, |gate| gate.share(Scope::All, far()).map(Some));
    let next = aside(&gate, |gate| gate.counts().2 > 0, |gate| gate.alone(Scope::All, far()).is_some());
    drop(alone);
    let pass = sharer.join().expect("no panic").expect("it came in although another waited to be alone");
    assert_eq!(gate.counts().2, 1);
    drop(pass);
    assert!(next.join().expect("no panic"));
}

#[test]
fn a_pair_meets_its_two_regions_and_all() {
    let gate = Arc::new(Gate::default());
    let (pair, c) = (Scope::Pair(RegionId(1), RegionId(2)), Scope::Region(RegionId(3)));
    for scope in [A, B, Scope::All] {
        let shared = gate.share(scope, soon()).expect("free");
        assert!(gate.alone(pair, soon()).is_none(), "{scope:?}");
        drop(shared);
    }
    let beside = gate.share(c, soon()).expect("free");
    let alone = gate.alone(pair, soon()).expect("a third region is no hindrance");
    for scope in [A, B, Scope::All] {
        assert!(elsewhere(&gate, move |gate| gate.share(scope, soon()).is_none()), "{scope:?}");
    }
    assert!(elsewhere(&gate, move |gate| gate.share(c, soon()).is_some()));
    drop((alone, beside));
    assert!(gate.share(Scope::All, soon()).is_some());
}

#[test]
fn one_thread_may_share_again_while_another_waits_for_it() {
    let gate = Arc::new(Gate::default());
    let outer = gate.share(A, soon()).expect("free");
    assert!(gate.is_held_here() && !elsewhere(&gate, |gate| gate.is_held_here()));
    let waiting = aside(&gate, |gate| gate.counts().2 > 0, |gate| gate.alone(A, far()).is_some());
    for scope in [A, B, Scope::All] {
        assert!(gate.share(scope, soon()).is_some(), "{scope:?}");
    }
    drop(outer);
    assert!(waiting.join().expect("no panic"));
}

#[test]
fn regions_do_not_meet_and_a_sparing_one_waits_only_for_all() {
    let gate = Arc::new(Gate::default());
    let a = gate.share(A, soon()).expect("free");
    assert!(gate.alone(A, soon()).is_none() && gate.alone(Scope::All, soon()).is_none());
    drop(gate.alone(B, soon()).expect("another region"));
    let (alone, spared) = gate.alone_sparing(soon()).expect("nobody shares all");
    assert_eq!(spared, [RegionId(1)]);
    assert!(elsewhere(&gate, |gate| {
        gate.share(A, soon()).is_some()
            && gate.share(B, soon()).is_none()
            && gate.share(Scope::All, soon()).is_none()
    }));
    drop(alone);
    drop(a);
    let all = gate.share(Scope::All, soon()).expect("free");
    assert!(gate.alone_sparing(soon()).is_none());
    drop(all);
}
