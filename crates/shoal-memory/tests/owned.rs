//! Growing regions that sleep by their owner's word alone, are never declared whole, and grow between.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{PAGE, WAIT, World, noise, until, world};
use proptest::prelude::*;
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_device::VirtAddr;
use shoal_memory::{Backing, ErrorKind, Segments};

const MIB: u64 = 1 << 20;

fn growing(world: &World, backing: Backing) -> Arc<Segments> {
    let made =
        Segments::new(&world.manager, "tag".to_owned(), LeaseKind::Weights, backing).expect("addresses");
    made.region().set_yields(false);
    made
}

fn offset(segments: &Segments, at: VirtAddr) -> ByteCount {
    ByteCount(at.0 - segments.region().address())
}

fn pause(segments: &Segments) -> ByteCount {
    segments.region().record_checksums(WAIT).expect("recorded");
    let copied = segments.region().sleep(0.0, false, WAIT).expect("asleep").copied;
    assert_eq!(segments.region().usage().device, ByteCount::ZERO);
    copied
}

fn resume(segments: &Segments, retain: bool) {
    segments.region().wake(WAIT).expect("begun").wait(WAIT).expect("awake");
    if !retain {
        segments.region().forget_copies().expect("all is on the device");
        assert_eq!(segments.region().usage().host, ByteCount::ZERO);
    }
}

/// Whether no device memory is left. What a copy that has just ended still held is freed by the next operation.
fn is_free(world: &World, segments: &Segments) -> bool {
    let _ = segments.region().forget_copies();
    world.device_used().is_zero() && world.manager.lease().held(LeaseKind::Weights).is_zero()
}

#[test]
fn it_sleeps_wakes_and_grows_again() {
    let world = world(64, 128);
    let segments = growing(&world, Backing::Keep);
    let first = segments.allocate(ByteCount::mib(6), None).expect("room");
    let bytes = noise(6 * MIB, 1);
    segments.region().write(offset(&segments, first), &bytes).expect("there");
    for turn in 0..3_u64 {
        pause(&segments);
        assert_eq!(segments.allocate(ByteCount::mib(2), None).expect_err("asleep").kind(), ErrorKind::Region);
        resume(&segments, turn == 1);
        let later = segments.allocate(ByteCount::mib(4), None).expect("it grows");
        segments.region().write(offset(&segments, later), &noise(4 * MIB, turn + 2)).expect("there");
        let mut read = vec![0; bytes.len()];
        segments.region().read(offset(&segments, first), &mut read).expect("there");
        assert!(read == bytes, "turn {turn}");
        world.check();
    }
}

#[test]
fn a_retained_copy_stays_where_it_is_and_only_what_changed_is_copied_again() {
    let world = world(64, 128);
    let segments = growing(&world, Backing::Keep);
    let at = segments.allocate(ByteCount::mib(32), None).expect("room");
    let zero = ByteCount::ZERO;
    let place = |segments: &Segments, at: ByteCount| {
        let view = segments.region().host_view(at, ByteCount(64)).expect("read").expect("a copy");
        (view.as_slice().as_ptr() as usize, view.as_slice().to_vec())
    };
    segments.region().write(zero, &noise(32 * MIB, 3)).expect("there");
    assert!(segments.region().host_view(zero, ByteCount(1)).expect("read").is_none(), "no copy yet");
    assert!(pause(&segments) >= ByteCount::mib(32));
    let before = place(&segments, zero);
    assert!(before.1 == noise(64, 3)[..], "the first bytes");
    resume(&segments, true);
    assert_eq!(pause(&segments), zero, "nothing was written");
    resume(&segments, true);
    segments.region().write(zero, &[9; 64]).expect("there");
    let copied = pause(&segments);
    assert!(copied > zero && copied < ByteCount::mib(32), "one extent: {copied}");
    assert_eq!(place(&segments, zero), (before.0, vec![9; 64]), "the same place, the new bytes");
    resume(&segments, false);
    assert!(segments.region().host_view(zero, ByteCount(1)).expect("read").is_none());
    assert!(pause(&segments) >= ByteCount::mib(32), "all of it again");
    resume(&segments, false);
    segments.free(at, None).expect("a segment");
    until("it is free", || is_free(&world, &segments));
    assert!(world.manager.trim_host() >= ByteCount::mib(32));
    assert_eq!(world.manager.trim_host(), zero);
    world.check();
}

#[test]
fn a_copy_that_somebody_reads_is_left_alone() {
    let world = world(64, 128);
    let segments = growing(&world, Backing::Keep);
    segments.allocate(ByteCount::mib(4), None).expect("room");
    segments.region().write(ByteCount::ZERO, &[1; 4096]).expect("there");
    pause(&segments);
    let view = segments.region().host_view(ByteCount::ZERO, ByteCount(4096)).expect("read").expect("a copy");
    resume(&segments, true);
    segments.region().write(ByteCount::ZERO, &[2; 4096]).expect("there");
    pause(&segments);
    assert!(view.as_slice().iter().all(|byte| *byte == 1), "as it was");
    let now = segments.region().host_view(ByteCount::ZERO, ByteCount(8)).expect("read").expect("a copy");
    assert_eq!(now.as_slice(), [2; 8]);
    resume(&segments, false);
    assert!(view.as_slice().iter().all(|byte| *byte == 1), "also after it was let go of");
    world.check();
}

#[test]
fn nothing_is_forgotten_that_is_nowhere_else() {
    let world = world(64, 128);
    let segments = growing(&world, Backing::Keep);
    segments.allocate(ByteCount::mib(4), None).expect("room");
    segments.region().write(ByteCount::ZERO, &[5; 100]).expect("there");
    pause(&segments);
    assert_eq!(segments.region().forget_copies().expect_err("asleep").kind(), ErrorKind::Region);
    assert_eq!(segments.region().record_checksums(WAIT).expect_err("asleep").kind(), ErrorKind::Region);
    let used = segments.region().begin_use(WAIT).expect_err("asleep");
    assert_eq!(used.kind(), ErrorKind::Region);
    resume(&segments, false);
    let _used = segments.region().begin_use(WAIT).expect("awake");
    assert_eq!(segments.region().record_checksums(WAIT).expect_err("filled").kind(), ErrorKind::Region);
    let mut read = [0; 100];
    segments.region().read(ByteCount::ZERO, &mut read).expect("there");
    assert_eq!(read, [5; 100]);
}

#[test]
fn it_yields_to_nobody() {
    let world = world(64, 128);
    let segments = growing(&world, Backing::Keep);
    segments.allocate(ByteCount::mib(40), None).expect("room");
    segments.region().record_checksums(WAIT).expect("recorded");
    let other = Segments::new(&world.manager, "other".to_owned(), LeaseKind::Weights, Backing::Keep)
        .expect("addresses");
    other.allocate(ByteCount::mib(40), None).expect_err("nobody yields");
    assert_eq!(
        world.manager.reclaim(ByteCount::mib(8), WAIT, "a test").expect("asked").freed,
        ByteCount::ZERO
    );
    segments.region().set_yields(true);
    other.allocate(ByteCount::mib(40), None).expect("now it does");
    world.check();
}

#[test]
fn what_is_freed_while_it_sleeps_is_gone() {
    let world = world(64, 128);
    for backing in [Backing::Keep, Backing::Discard] {
        let segments = growing(&world, backing);
        let (kept, freed) =
            (segments.allocate(ByteCount::mib(8), None), segments.allocate(ByteCount::mib(8), None));
        let (kept, freed) = (kept.expect("room"), freed.expect("room"));
        segments.region().write(offset(&segments, kept), &[7; 4096]).expect("there");
        pause(&segments);
        segments.free(freed, None).expect("a segment");
        until("its copies are gone", || segments.region().usage().total <= ByteCount::mib(8));
        resume(&segments, backing == Backing::Discard);
        let mut read = [0; 4096];
        segments.region().read(offset(&segments, kept), &mut read).expect("there");
        let expected = if backing == Backing::Keep { 7 } else { 0 };
        assert!(read.iter().all(|byte| *byte == expected), "{backing:?}");
        let again = segments.allocate(ByteCount::mib(8), None).expect("its addresses are used again");
        assert_eq!(again, freed);
        segments.free(kept, None).expect("a segment");
        segments.free(again, None).expect("a segment");
        until("all is free", || is_free(&world, &segments));
        world.check();
    }
}

#[test]
fn what_is_freed_while_its_memory_is_held_keeps_it() {
    let world = world(64, 64);
    let segments = growing(&world, Backing::Discard);
    let at = segments.allocate(ByteCount::mib(8), None).expect("room");
    let held = segments.region().hold_memory(WAIT).expect("held");
    segments.free(at, None).expect("a segment");
    thread::sleep(Duration::from_millis(50));
    assert!(segments.region().usage().device >= ByteCount::mib(8), "somebody copies");
    segments.region().write(ByteCount::ZERO, &[1; 64]).expect("it has memory");
    drop(held);
    until("then it goes", || is_free(&world, &segments));
    world.check();
}

#[test]
fn a_margin_is_left_free() {
    let world = world(64, 128);
    let segments = growing(&world, Backing::Discard);
    let free = world.device.memory().expect("asked").free;
    world.manager.set_margin(free - ByteCount::mib(8));
    let first = segments.allocate(ByteCount::mib(8), None).expect("room");
    let refused = segments.allocate(ByteCount::mib(2), None).expect_err("the margin");
    assert_eq!(refused.kind(), ErrorKind::OutOfMemory);
    assert!(refused.to_string().contains("margin"), "{refused}");
    segments.free(first, None).expect("a segment");
    until("it is no segment's", || segments.region().usage().total.is_zero());
    segments.allocate(ByteCount::mib(4), None).expect("what is pooled counts as free");
    world.manager.set_margin(ByteCount::ZERO);
    segments.allocate(ByteCount::mib(16), None).expect("no margin");
    world.check();
}

#[test]
fn what_lies_on_the_device_is_told_by_address() {
    let world = world(64, 128);
    let segments = growing(&world, Backing::Discard);
    segments.allocate(ByteCount::mib(26), None).expect("room");
    let ranges = segments.region().resident_ranges();
    assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{ranges:?}");
    assert_eq!(ranges.iter().map(|range| range.1).sum::<ByteCount>(), segments.region().usage().device);
    pause(&segments);
    assert!(segments.region().resident_ranges().is_empty());
}

#[derive(Clone, Debug)]
enum Op {
    Allocate { pages: u64 },
    Free { which: usize },
    Write { which: usize, at: u64, byte: u8 },
    Pause,
    Resume { retain: bool },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (1_u64..5).prop_map(|pages| Op::Allocate { pages }),
        2 => any::<usize>().prop_map(|which| Op::Free { which }),
        4 => (any::<usize>(), any::<u64>(), any::<u8>())
            .prop_map(|(which, at, byte)| Op::Write { which, at, byte }),
        2 => Just(Op::Pause),
        3 => any::<bool>().prop_map(|retain| Op::Resume { retain }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever is allocated, freed and written between pauses: what lives has its bytes, and what was paused last is
    /// what its copies say.
    #[test]
    fn random_pauses_lose_nothing(ops in proptest::collection::vec(op(), 1..40)) {
        let world = world(64, 96);
        let segments = growing(&world, Backing::Keep);
        let mut plain: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        let mut is_paused = false;
        let pick = |plain: &BTreeMap<u64, Vec<u8>>, which: usize| {
            (!plain.is_empty()).then(|| *plain.keys().nth(which % plain.len()).expect("one"))
        };
        for op in ops {
            match op {
                Op::Allocate { pages } => {
                    let made = segments.allocate(ByteCount(pages * PAGE), None);
                    if let Ok(at) = made {
                        // Once nothing of it is left it is awake, as a region is that never had anything.
                        prop_assert!(!is_paused || plain.is_empty(), "it sleeps");
                        is_paused = false;
                        let bytes = noise(pages * PAGE, at.0 + pages);
                        segments.region().write(offset(&segments, at), &bytes).expect("there");
                        plain.insert(at.0, bytes);
                    }
                }
                Op::Free { which } => {
                    if let Some(at) = pick(&plain, which) {
                        segments.free(VirtAddr(at), None).expect("a segment");
                        plain.remove(&at);
                    }
                }
                Op::Write { which, at, byte } => {
                    if let Some(first) = pick(&plain, which).filter(|_| !is_paused) {
                        let bytes = plain.get_mut(&first).expect("it lives");
                        let at = at % bytes.len() as u64;
                        let from = offset(&segments, VirtAddr(first)) + ByteCount(at);
                        segments.region().write(from, &[byte]).expect("there");
                        bytes[usize::try_from(at).expect("small")] = byte;
                    }
                }
                Op::Pause if !is_paused => {
                    // A region without memory has nothing that could sleep.
                    if !segments.region().usage().total.is_zero() {
                        pause(&segments);
                        is_paused = !segments.region().missing_bytes().is_zero();
                    }
                }
                Op::Resume { retain } if is_paused => {
                    resume(&segments, retain);
                    is_paused = false;
                }
                Op::Pause | Op::Resume { .. } => {}
            }
            segments.check_invariants().map_err(TestCaseError::fail)?;
            for (at, bytes) in &plain {
                let (from, mut read) = (offset(&segments, VirtAddr(*at)), vec![0; bytes.len()]);
                if is_paused {
                    prop_assert!(segments.region().read_host_copy(from, &mut read).expect("read"));
                } else {
                    segments.region().read(from, &mut read).expect("there");
                }
                prop_assert!(&read == bytes, "segment at {at:#x}");
            }
        }
        // What was freed goes by itself, its memory before its lease.
        for at in plain.into_keys() {
            segments.free(VirtAddr(at), None).expect("a segment");
        }
        until("all of it is free", || is_free(&world, &segments));
        world.check();
    }
}
