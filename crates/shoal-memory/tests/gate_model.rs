//! The gate between steps and those who evict, move or unmap, in every order in which a few threads may meet (loom): the same
//! source as the crate's, with loom's locks. A wait without end is a deadlock that loom tells of; a deadline that has passed
//! may be heard of at any later moment.

use std::sync::Arc;
use std::time::Instant;

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use shoal_core::ids::RegionId;

#[path = "common/explore.rs"]
mod explore;
#[path = "../src/gate.rs"]
#[expect(dead_code, reason = "the crate uses more of it")]
mod gate;
#[path = "common/loom_sync.rs"]
mod sync;

use explore::{explore, far};
use gate::{Gate, Scope};

const A: Scope = Scope::Region(RegionId(1));
const B: Scope = Scope::Region(RegionId(2));

/// Steps, and those who have the gate alone, that are inside.
#[derive(Default)]
struct Inside {
    steps: AtomicUsize,
    alone: AtomicUsize,
}

impl Inside {
    fn step(&self) {
        self.steps.fetch_add(1, Ordering::SeqCst);
        assert_eq!(self.alone.load(Ordering::SeqCst), 0, "a step beside one who has the gate alone");
        thread::yield_now();
        self.steps.fetch_sub(1, Ordering::SeqCst);
    }

    fn alone(&self) {
        assert_eq!(self.alone.fetch_add(1, Ordering::SeqCst), 0, "two have the gate alone");
        assert_eq!(self.steps.load(Ordering::SeqCst), 0, "a step runs beside one who has the gate alone");
        thread::yield_now();
        self.alone.fetch_sub(1, Ordering::SeqCst);
    }
}

fn scene() -> (Arc<Gate>, Arc<Inside>) {
    (Arc::default(), Arc::default())
}

/// Runs `work` on a thread of its own.
fn aside(
    gate: &Arc<Gate>,
    inside: &Arc<Inside>,
    work: impl FnOnce(&Arc<Gate>, &Inside) + 'static,
) -> thread::JoinHandle<()> {
    let (gate, inside) = (Arc::clone(gate), Arc::clone(inside));
    thread::spawn(move || work(&gate, &inside))
}

/// Everybody has left.
fn check(gate: &Arc<Gate>) {
    assert_eq!(gate.counts(), (0, 0, 0));
    assert!(gate.alone(Scope::All, Instant::now()).is_some(), "somebody is left");
}

#[test]
fn no_step_runs_beside_one_who_has_it_alone_and_nobody_waits_for_ever() {
    explore(2, || {
        let (gate, inside) = scene();
        let step = |scope: Scope| {
            move |gate: &Arc<Gate>, inside: &Inside| {
                let pass = gate.share(scope, far()).expect("comes in");
                inside.step();
                drop(pass);
            }
        };
        let steps = [aside(&gate, &inside, step(A)), aside(&gate, &inside, step(Scope::All))];
        let pass = gate.alone(A, far()).expect("comes in");
        inside.alone();
        drop(pass);
        for step in steps {
            step.join().expect("no panic");
        }
        check(&gate);
    });
}

#[test]
fn two_who_want_it_alone_and_a_step_come_in_one_after_another() {
    explore(2, || {
        let (gate, inside) = scene();
        let alone = |gate: &Arc<Gate>, inside: &Inside| {
            let pass = gate.alone(Scope::All, far()).expect("comes in");
            inside.alone();
            drop(pass);
        };
        let others = [aside(&gate, &inside, alone), aside(&gate, &inside, alone)];
        let pass = gate.share(A, far()).expect("comes in");
        inside.step();
        drop(pass);
        for other in others {
            other.join().expect("no panic");
        }
        check(&gate);
    });
}

#[test]
fn who_shares_it_may_share_it_again_whoever_waits() {
    explore(2, || {
        let (gate, inside) = scene();
        let moves = aside(&gate, &inside, |gate, inside| {
            let pass = gate.alone(A, far()).expect("comes in");
            inside.alone();
            drop(pass);
        });
        let first = aside(&gate, &inside, |gate, inside| {
            let pass = gate.share_first(A, far()).expect("comes in ahead");
            inside.step();
            drop(pass);
        });
        let outer = gate.share(A, far()).expect("comes in");
        let inner = gate.share(Scope::All, far()).expect("it is inside already");
        inside.step();
        drop((outer, inner));
        moves.join().expect("no panic");
        first.join().expect("no panic");
        check(&gate);
    });
}

#[test]
fn who_gives_up_keeps_nobody_waiting() {
    explore(2, || {
        let (gate, inside) = scene();
        let at_once = Instant::now();
        let pass = gate.share(A, far()).expect("comes in");
        // It keeps newcomers out for as long as it waits, and it cannot come in.
        let hasty = aside(&gate, &inside, move |gate, _| assert!(gate.alone(A, at_once).is_none()));
        let step = aside(&gate, &inside, |gate, inside| {
            let pass = gate.share(A, far()).expect("comes in");
            inside.step();
            drop(pass);
        });
        step.join().expect("no panic");
        hasty.join().expect("no panic");
        drop(pass);
        check(&gate);
    });
}

#[test]
fn a_step_that_gives_up_keeps_nobody_waiting() {
    explore(2, || {
        let (gate, inside) = scene();
        let at_once = Instant::now();
        let hasty = aside(&gate, &inside, move |gate, inside| {
            if let Some(pass) = gate.share(A, at_once) {
                inside.step();
                drop(pass);
            }
        });
        let moves = aside(&gate, &inside, |gate, inside| {
            let pass = gate.alone(A, far()).expect("comes in");
            inside.alone();
            drop(pass);
        });
        let pass = gate.alone(A, far()).expect("comes in");
        inside.alone();
        drop(pass);
        hasty.join().expect("no panic");
        moves.join().expect("no panic");
        check(&gate);
    });
}

#[test]
fn what_is_spared_is_not_had_and_all_else_is() {
    explore(2, || {
        let (gate, inside) = scene();
        let beside = aside(&gate, &inside, |gate, _| drop(gate.share(A, far()).expect("comes in")));
        let step = aside(&gate, &inside, |gate, inside| {
            let pass = gate.share(B, far()).expect("comes in");
            inside.steps.fetch_add(1, Ordering::SeqCst);
            thread::yield_now();
            inside.steps.fetch_sub(1, Ordering::SeqCst);
            drop(pass);
        });
        let (pass, spared) = gate.alone_sparing(far()).expect("comes in");
        let has_b = !spared.contains(&RegionId(2));
        assert!(!has_b || inside.steps.load(Ordering::SeqCst) == 0, "a step runs in what is had");
        thread::yield_now();
        assert!(!has_b || inside.steps.load(Ordering::SeqCst) == 0, "a step has begun in what is had");
        drop(pass);
        beside.join().expect("no panic");
        step.join().expect("no panic");
        check(&gate);
    });
}
