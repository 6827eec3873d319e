//! The moment between a model's return and its first KV, on the core alone.

use std::sync::Arc;

use futures_util::FutureExt;
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind, WorkerCapabilities, WorkerUsage};
use tokio::sync::mpsc;

use super::histories::config;
use super::orders::Reclaim;
use super::{Begun, Core, Timing, Wanted};
use crate::shelf::Caller;

pub(super) const WEIGHTS: ByteCount = ByteCount::mib(60);
const KV: ByteCount = ByteCount::mib(16);

pub(super) fn caller() -> Caller {
    Caller::new("alice", false)
}

/// The core with workers that are ready, and what each was told.
pub(super) struct Bench {
    pub(super) core: Core,
    heard: Vec<mpsc::Receiver<FromServer>>,
    requests: u64,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self::of(&[WEIGHTS; 2])
    }

    /// With models of so many bytes of weights.
    pub(super) fn of(weights: &[ByteCount]) -> Self {
        let mut core = Core::new(Arc::new(config(0)), Timing::default(), 1_000_000, None);
        core.handle_timer(0);
        let mut heard = Vec::new();
        for (place, (pid, bytes)) in (100..).zip(weights).enumerate() {
            assert!(
                Arc::clone(&core.models[place].start).notified().now_or_never().is_some(),
                "it is to start"
            );
            core.handle_started(place, pid, 0);
            let (sender, receiver) = mpsc::channel(64);
            core.handle_greeted(&format!("m{place}"), pid, sender, None, 0).expect("it is expected");
            heard.push(receiver);
            let capabilities = WorkerCapabilities {
                weights_bytes: *bytes,
                kv_bytes_min: KV,
                ..WorkerCapabilities::default()
            };
            core.handle_message(place, pid, FromWorker::Ready { capabilities }, 0);
        }
        Self { core, heard, requests: 0 }
    }

    pub(super) fn say(&mut self, place: usize, message: FromWorker, now_ms: u64) {
        let pid = self.core.models[place].pid.expect("it runs");
        self.core.handle_message(place, pid, message, now_ms);
    }

    pub(super) fn told(&mut self, place: usize) -> Vec<FromServer> {
        std::iter::from_fn(|| self.heard[place].try_recv().ok()).collect()
    }

    pub(super) fn request(&mut self, place: usize, kind: LeaseKind, bytes: ByteCount, now_ms: u64) {
        self.request_for(place, kind, bytes, 5_000, now_ms);
    }

    /// A request that may wait for so long.
    pub(super) fn request_for(
        &mut self,
        place: usize,
        kind: LeaseKind,
        bytes: ByteCount,
        deadline_ms: u64,
        now_ms: u64,
    ) {
        self.requests += 1;
        let (request, reason) = (self.requests, "a test".to_owned());
        let said = FromWorker::LeaseRequest { request, kind, bytes, bytes_min: bytes, deadline_ms, reason };
        self.say(place, said, now_ms);
    }

    /// The request that was routed to a model is over.
    pub(super) fn end_route(&mut self, place: usize, now_ms: u64) {
        self.core.handle_route_ended(place, &caller(), now_ms);
    }

    pub(super) fn done(&mut self, place: usize, order: u64, bytes: ByteCount, now_ms: u64) {
        let said =
            FromWorker::OrderDone { order, bytes, copied: ByteCount::ZERO, duration_us: 1, error: None };
        self.say(place, said, now_ms);
    }

    pub(super) fn usage(&mut self, place: usize, weights: ByteCount, now_ms: u64) {
        let usage = WorkerUsage { weights_device: weights, weights_total: WEIGHTS, ..WorkerUsage::default() };
        self.say(place, FromWorker::Usage { usage }, now_ms);
    }

    /// A client waits for a model, whose worker asks for what is missing of its weights; the number of that wake.
    pub(super) fn wanted(&mut self, place: usize, missing: ByteCount, now_ms: u64) -> u64 {
        let begun = self
            .core
            .handle_wanted(&format!("m{place}"), Wanted::Route(caller()), now_ms, 60_000)
            .expect("parked");
        assert!(matches!(begun, Begun::Parked { .. }), "it sleeps");
        std::mem::forget(begun);
        let wake = self.told(place).into_iter().find_map(|said| match said {
            FromServer::Wake { order, .. } => Some(order),
            _ => None,
        });
        self.request(place, LeaseKind::Weights, missing, now_ms);
        wake.expect("it is woken")
    }

    /// The second model has been here, and 28 MiB of it are left.
    fn leave_a_part_of_the_second(&mut self) {
        let wake = self.wanted(1, WEIGHTS, 10);
        self.usage(1, WEIGHTS, 20);
        self.done(1, wake, WEIGHTS, 20);
        self.core.handle_route_ended(1, &caller(), 30);
        self.core.handle_sleep("m1", 28.0 / 60.0, 40).expect("it is idle");
        let Some(FromServer::Reclaim { order, bytes, .. }) =
            self.told(1).into_iter().find(|said| matches!(said, FromServer::Reclaim { .. }))
        else {
            panic!("it is asked for the rest")
        };
        assert_eq!(bytes, ByteCount::mib(32));
        self.usage(1, ByteCount::mib(28), 50);
        self.say(1, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes }, 50);
        self.done(1, order, bytes, 50);
    }
}

#[test]
fn who_asks_for_its_first_kv_is_as_old_as_its_wake() {
    let mut bench = Bench::new();
    bench.leave_a_part_of_the_second();
    // The first comes back; meanwhile somebody wants the second, which waits for the first's turn to end.
    let wake = bench.wanted(0, WEIGHTS, 100);
    bench.wanted(1, ByteCount::mib(32), 110);
    bench.usage(0, WEIGHTS, 120);
    bench.done(0, wake, WEIGHTS, 120);
    bench.request(0, LeaseKind::Kv, KV, 122);
    let orders = |told: Vec<FromServer>| {
        told.into_iter().filter(|said| matches!(said, FromServer::Reclaim { .. })).collect::<Vec<_>>()
    };
    assert!(orders(bench.told(0)).is_empty(), "what it was given just now is not taken by who came later");
    assert_eq!(orders(bench.told(1)).len(), 1, "who came later gives what the first lacks of its KV");
}

/// Who waits for the rest of its weights, and gives up for another what it had, is given all of it once its time comes. It
/// got what it had asked for at first, could not run with that, and the others' memory stood idle meanwhile.
#[test]
fn who_gave_weights_up_while_it_waited_is_granted_all_that_it_lacks() {
    let mut bench = Bench::new();
    bench.leave_a_part_of_the_second();
    let first = bench.wanted(0, WEIGHTS, 100);
    let second = bench.wanted(1, ByteCount::mib(32), 110);
    bench.usage(0, WEIGHTS, 120);
    bench.done(0, first, WEIGHTS, 120);
    bench.request(0, LeaseKind::Kv, KV, 122);
    let Some(FromServer::Reclaim { order, bytes, .. }) = bench.told(1).pop() else { panic!("it is asked") };
    bench.usage(1, ByteCount::mib(28) - bytes, 130);
    bench.say(1, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes }, 130);
    bench.done(1, order, bytes, 130);
    bench.core.handle_route_ended(0, &caller(), 140);
    let mut told = bench.told(0);
    assert!(told.iter().any(|said| matches!(said, FromServer::LeaseGrant { kind: LeaseKind::Kv, .. })));
    let Some(FromServer::Reclaim { order, bytes: more, .. }) = told.pop() else { panic!("it is idle") };
    bench.say(0, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: more }, 150);
    bench.done(0, order, more, 150);
    let granted = bench.told(1).into_iter().find_map(|said| match said {
        FromServer::LeaseGrant { bytes, .. } => Some(bytes),
        _ => None,
    });
    assert_eq!(granted, Some(ByteCount::mib(32) + bytes));
    bench.usage(1, WEIGHTS, 160);
    bench.done(1, second, ByteCount::mib(32) + bytes, 160);
    assert!(bench.core.models[1].is_up());
}

/// The same where nobody asks for anything when its weights come: that its client goes to the worker is no turn either. A
/// turn that ends because others need its weights was one, with KV or without.
#[test]
fn a_single_client_keeps_the_age_of_its_wake_too() {
    for has_run in [false, true] {
        let mut bench = Bench::new();
        bench.leave_a_part_of_the_second();
        let wake = bench.wanted(0, WEIGHTS, 100);
        assert_eq!(bench.core.models[0].wanting_since_ms, Some(100));
        bench.usage(0, WEIGHTS, 120);
        bench.done(0, wake, WEIGHTS, 120);
        bench.core.handle_timer(121);
        assert_eq!(bench.core.models[0].wanting_since_ms, None, "it may need no KV at all");
        if has_run {
            let bytes = ByteCount::mib(2);
            bench.say(0, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes }, 122);
        } else {
            bench.request(0, LeaseKind::Kv, KV, 122);
        }
        let since = if has_run { 122 } else { 100 };
        assert_eq!(bench.core.models[0].wanting_since_ms, Some(since));
    }
}

/// A reload takes away some of what a model fills with its weights and the KV of its requests. Who comes then waits until a
/// request ends or is put off; it was refused, with figures that could not change.
#[test]
fn who_comes_while_the_models_own_kv_is_in_the_way_of_its_weights_is_kept_waiting() {
    let mut bench = Bench::new();
    let wake = bench.wanted(0, WEIGHTS, 10);
    bench.usage(0, WEIGHTS, 20);
    bench.done(0, wake, WEIGHTS, 20);
    bench.request(0, LeaseKind::Kv, KV, 22);
    bench.core.models[0].config.max = Some(WEIGHTS + KV - ByteCount::mib(2));
    // A part of its weights leaves, for whomever.
    let part = ByteCount::mib(20);
    bench.say(0, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes: part }, 30);
    let usage = |kv: ByteCount| WorkerUsage {
        weights_device: WEIGHTS - part,
        weights_total: WEIGHTS,
        kv_device: kv,
        kv_live: kv,
        ..WorkerUsage::default()
    };
    bench.say(0, FromWorker::Usage { usage: usage(KV) }, 30);
    bench.wanted(0, part, 40);
    let denied = bench.told(0).into_iter().any(|said| matches!(said, FromServer::LeaseDeny { .. }));
    assert!(!denied, "its engine has the time to put a request off");
    assert_eq!(bench.core.models[0].queue.len(), 1, "who came waits");
    bench.say(0, FromWorker::LeaseReturn { kind: LeaseKind::Kv, bytes: ByteCount::mib(4) }, 50);
    bench.say(0, FromWorker::Usage { usage: usage(KV - ByteCount::mib(4)) }, 50);
    let granted = bench
        .told(0)
        .into_iter()
        .any(|said| matches!(said, FromServer::LeaseGrant { kind: LeaseKind::Weights, .. }));
    assert!(granted, "a request was put off");
}

/// What a model's weights need is not taken from these very weights: its worker is told that only spare KV may go. It gave
/// its weights up, in larger and larger pieces, where less KV could go than was thought.
#[test]
fn who_makes_room_for_its_own_weights_gives_only_spare_kv() {
    let mut bench = Bench::new();
    let spare = ByteCount::mib(8);
    bench.told(1);
    for (requester, wanted) in [(Some(1), true), (Some(0), false), (None, false)] {
        let reclaim = Reclaim { bytes: spare, requester, ..Reclaim::default() };
        bench.core.order_reclaim(1, reclaim, "a test".to_owned(), None, 10);
        let said = bench.told(1);
        let [FromServer::Reclaim { order, bytes, is_own, .. }] = said.as_slice() else { panic!("{said:?}") };
        assert_eq!((*bytes, *is_own), (spare, wanted), "for {requester:?}");
        let takes_weights = bench.core.models[1].orders[order].takes_weights();
        assert_eq!(takes_weights, !wanted, "all it has is weights, for {requester:?}");
    }
}

/// Agents that hand work on: who comes next was not used for longest, and the policy is told when it is expected.
#[test]
fn models_that_are_used_in_turn_are_expected_back() {
    let mut bench = Bench::new();
    let mut now_ms = 10;
    for turn in 0..10 {
        let place = turn % 2;
        let wake = bench.wanted(place, WEIGHTS, now_ms);
        bench.usage(place, WEIGHTS, now_ms + 50);
        bench.done(place, wake, WEIGHTS, now_ms + 50);
        bench.core.handle_route_ended(place, &caller(), now_ms + 100);
        assert_eq!(
            bench.core.policy_model(place, now_ms + 100).expected_ms.is_some(),
            turn >= 8,
            "use {turn}"
        );
        // The other gets its room, as long as each of them takes.
        bench.core.handle_sleep(&format!("m{place}"), 0.0, now_ms + 110).expect("it is idle");
        let Some(FromServer::Reclaim { order, bytes, .. }) =
            bench.told(place).into_iter().find(|said| matches!(said, FromServer::Reclaim { .. }))
        else {
            panic!("it is asked for all")
        };
        bench.usage(place, ByteCount::ZERO, now_ms + 120);
        bench.say(place, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes }, now_ms + 120);
        bench.done(place, order, bytes, now_ms + 120);
        now_ms += 200 + 130 * (turn as u64 % 3);
    }
    let expected = |place| bench.core.policy_model(place, now_ms).expected_ms.expect("it comes in turn");
    assert!(expected(0) < expected(1), "the second was used last");
}
