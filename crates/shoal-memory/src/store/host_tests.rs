//! The host tier against a plain map, with damage and with blocks that somebody holds.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;

use proptest::prelude::*;
use shoal_core::bytes::PAGE_BYTES;
use shoal_device::{SimDevice, SimOptions};

use super::*;
use crate::arena::HostArena;
use crate::store::{Fingerprint, dice};

const WAIT: Duration = Duration::from_mins(1);
const UNIT: u64 = 4096;

fn key(block: u8) -> StoreKey {
    dice::key(block.into())
}

/// Up to four units, decided by the name.
fn content(block: u8) -> Vec<u8> {
    let length = 1 + usize::from(block) * 977 % 16_384;
    (0..length).map(|at| block.wrapping_mul(31).wrapping_add(u8::try_from(at % 251).unwrap())).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Put { block: u8, is_exact: bool },
    Get(u8),
    Hold(u8),
    LetGo,
    Remove(u8),
    Damage(u8, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let block = || 0..24_u8;
    prop_oneof![
        4 => (block(), any::<bool>()).prop_map(|(block, is_exact)| Step::Put { block, is_exact }),
        4 => block().prop_map(Step::Get),
        1 => block().prop_map(Step::Hold),
        1 => Just(Step::LetGo),
        1 => block().prop_map(Step::Remove),
        1 => (block(), any::<usize>()).prop_map(|(block, bit)| Step::Damage(block, bit)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn what_is_served_is_what_was_put(
        steps in prop::collection::vec(step(), 1..200),
        units in 4..40_u64,
        blocks_max in prop::option::of(1..12_u32),
        eviction in prop_oneof![Just(EvictionKind::Lru), Just(EvictionKind::S3Fifo)],
    ) {
        let tier = HostTier::new(HostOptions { bytes_max: ByteCount(units * UNIT), blocks_max, eviction });
        // What may be there, and whether it is damaged.
        let mut model: HashMap<u8, bool> = HashMap::new();
        let mut held: Vec<(u8, Held)> = Vec::new();
        let (mut found_damage, mut damaged) = (0, 0);
        for step in steps {
            match step {
                Step::Put { block, is_exact } => {
                    let bytes = content(block);
                    let mut source = Buffer::zeroed(bytes.len() + if is_exact { 0 } else { 20_000 });
                    source.as_mut_slice().unwrap()[..bytes.len()].copy_from_slice(&bytes);
                    match tier.put(key(block), source, bytes.len(), WAIT).wait() {
                        Ok(Stored::Written) => {
                            model.insert(block, false);
                        }
                        Ok(Stored::Already) => prop_assert!(model.contains_key(&block)),
                        Err(Miss::NoRoom { .. }) => prop_assert!(!held.is_empty(), "there is always room"),
                        Err(Miss::TooLong { .. }) => prop_assert!(bytes.len() as u64 > units * UNIT - UNIT),
                        Err(other) => prop_assert!(false, "{other}"),
                    }
                }
                Step::Get(block) => match tier.get(key(block), Buffer::zeroed(16_384), WAIT).wait() {
                    Ok(fetched) => {
                        prop_assert_eq!(model.get(&block), Some(&false));
                        prop_assert_eq!(fetched.as_slice(), content(block));
                    }
                    Err(Miss::Corrupt) => {
                        prop_assert_eq!(model.remove(&block), Some(true));
                        found_damage += 1;
                    }
                    Err(miss) => prop_assert_eq!(miss, Miss::Absent),
                },
                Step::Hold(block) => {
                    if let Some(block_held) = tier.hold(&key(block)) {
                        prop_assert_eq!(model.get(&block), Some(&false));
                        held.push((block, block_held));
                    } else if model.get(&block) == Some(&true) && !tier.contains(&key(block)) {
                        // Damaged and dropped, or evicted before.
                        model.remove(&block);
                    }
                }
                Step::LetGo => drop(held.pop()),
                Step::Remove(block) => {
                    let was_there = tier.contains(&key(block));
                    prop_assert_eq!(tier.remove(key(block), WAIT).wait(), Ok(was_there));
                    model.remove(&block);
                }
                Step::Damage(block, bit) => {
                    if model.get(&block) == Some(&false) && tier.damage(&key(block), bit) {
                        model.insert(block, true);
                        damaged += 1;
                    }
                }
            }
            let usage = tier.usage();
            prop_assert!(usage.bytes <= usage.bytes_max, "{usage:?}");
            prop_assert!(usage.blocks <= u64::from(blocks_max.unwrap_or(u32::MAX)));
            for (block, held) in &held {
                prop_assert_eq!(held.as_slice(), content(*block), "what is held stays");
            }
            model.retain(|block, _| tier.contains(&key(*block)));
        }
        prop_assert!(found_damage <= damaged && tier.usage().corrupt >= found_damage);
        drop(held);
        for block in 0..24 {
            drop(tier.remove(key(block), WAIT));
        }
        prop_assert_eq!(tier.usage().bytes, 0, "every byte is given back");
        tier.state.lock().policy.check_invariants().unwrap();
    }
}

/// Page-locked memory of a simulated device, of so many pages of 2 MiB.
fn locked(pages: u64) -> (HostTier, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let device = SimDevice::open_dyn(SimOptions::new(ByteCount::mib(16), dir.path())).unwrap();
    let bytes = ByteCount(pages * PAGE_BYTES.0);
    let arena = HostArena::new(device, bytes, WAIT, None);
    (HostTier::with_memory(HostOptions::new(bytes), Memory::Locked(SlotPool::new(arena, bytes))), dir)
}

/// A block of 5 MiB lies in a piece of 8.
#[test]
fn what_can_never_have_room_makes_none() {
    let (tier, _dir) = locked(3);
    let put = |block, bytes: usize| tier.put(key(block), Buffer::zeroed(bytes), bytes, WAIT).wait();
    assert_eq!(put(1, 4096), Ok(Stored::Written));
    let bytes = 5 << 20;
    assert_eq!(put(2, bytes), Err(Miss::TooLong { bytes: bytes as u64, bytes_max: 6 << 20 }));
    assert!(tier.room(bytes).is_none());
    assert!(tier.contains(&key(1)) && tier.usage().evicted == 0, "for nothing");
}

/// Of three lengths, up to some hundred KiB.
fn long_content(block: u8) -> Vec<u8> {
    let mut bytes = vec![block.wrapping_mul(31); [70_000, 300_000, 900_000][usize::from(block % 3)]];
    bytes[usize::from(block) * 97] = block;
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// As above, in slots: also what is written to memory of the tier's own, kept where it lies, and lent before it is verified.
    #[test]
    fn what_page_locked_memory_serves_is_what_was_put(
        steps in prop::collection::vec(step(), 1..120),
        pages in 1..5_u64,
    ) {
        let (tier, _dir) = locked(pages);
        let mut model: HashMap<u8, bool> = HashMap::new();
        let mut held: Vec<(u8, Held)> = Vec::new();
        for step in steps {
            match step {
                Step::Put { block, is_exact } => {
                    let bytes = long_content(block);
                    let room = if is_exact { tier.room(bytes.len()) } else { None };
                    let source = match room {
                        Some(room) => {
                            prop_assert!(tier.is_own(&room));
                            let mut memory = room.view_mut(ByteCount::ZERO, room.bytes()).unwrap();
                            memory.as_mut_slice()[..bytes.len()].copy_from_slice(&bytes);
                            Buffer::HostMut(memory)
                        }
                        None => Buffer::Own(Aligned::copy_of(&bytes)),
                    };
                    // Making room for it may have taken the block itself.
                    let was_there = tier.contains(&key(block));
                    match tier.put(key(block), source, bytes.len(), WAIT).wait() {
                        Ok(Stored::Written) => {
                            model.insert(block, false);
                        }
                        Ok(Stored::Already) => prop_assert!(was_there),
                        // One page may be too little for two lengths at a time.
                        Err(Miss::NoRoom { .. }) => prop_assert!(!held.is_empty(), "there is always room"),
                        Err(other) => prop_assert!(false, "{other}"),
                    }
                }
                Step::Get(block) => match tier.lend(&key(block)) {
                    Some(lent) => match lent.verify() {
                        Ok(()) => {
                            prop_assert_eq!(model.get(&block), Some(&false));
                            prop_assert!(lent.as_slice() == long_content(block));
                            let first = lent.buffer().access(ByteCount::ZERO, ByteCount(1), |bytes| bytes[0]);
                            prop_assert_eq!(first.unwrap(), lent.as_slice()[0]);
                        }
                        Err(miss) => {
                            prop_assert_eq!(miss, Miss::Corrupt);
                            prop_assert_eq!(model.remove(&block), Some(true));
                            prop_assert!(!tier.contains(&key(block)));
                        }
                    },
                    None => prop_assert!(!tier.contains(&key(block))),
                },
                Step::Hold(block) => held.extend(tier.hold(&key(block)).map(|one| (block, one))),
                Step::LetGo => drop(held.pop()),
                Step::Remove(block) => {
                    let was_there = tier.contains(&key(block));
                    prop_assert_eq!(tier.remove(key(block), WAIT).wait(), Ok(was_there));
                }
                Step::Damage(block, bit) => {
                    if model.get(&block) == Some(&false) && tier.damage(&key(block), bit) {
                        model.insert(block, true);
                    }
                }
            }
            let usage = tier.usage();
            prop_assert!(usage.bytes <= usage.bytes_max, "{usage:?}");
            for (block, held) in &held {
                prop_assert!(held.as_slice() == long_content(*block), "what is held stays");
            }
            model.retain(|block, _| tier.contains(&key(*block)));
        }
        drop(held);
        for block in 0..24 {
            drop(tier.remove(key(block), WAIT));
        }
        prop_assert_eq!(tier.usage().bytes, 0, "every slot is given back");
        tier.state.lock().policy.check_invariants().unwrap();
    }
}

#[test]
fn every_flipped_bit_is_found() {
    let tier = HostTier::new(HostOptions::new(ByteCount::mib(1)));
    let bytes = content(1);
    for bit in 0..bytes.len() * 8 {
        tier.put(key(1), Buffer::Own(Aligned::copy_of(&bytes)), bytes.len(), WAIT).wait().unwrap();
        assert!(tier.damage(&key(1), bit));
        let read = tier.get(key(1), Buffer::zeroed(16_384), WAIT).wait();
        assert_eq!(read.unwrap_err(), Miss::Corrupt, "bit {bit}");
        assert!(!tier.contains(&key(1)), "it is not asked again");
    }
}

#[test]
fn threads_agree_on_what_is_there() {
    let tier = Arc::new(HostTier::new(HostOptions::new(ByteCount(40 * UNIT))));
    let work = |seed: u8| {
        let tier = Arc::clone(&tier);
        move || {
            for turn in 0..2000_u16 {
                let block = u8::try_from((turn / 3 * 7 + u16::from(seed) * 3) % 24).unwrap();
                match turn % 3 {
                    0 => {
                        let bytes = content(block);
                        drop(tier.put(key(block), Buffer::Own(Aligned::copy_of(&bytes)), bytes.len(), WAIT));
                    }
                    1 if turn % 31 == 1 => drop(tier.remove(key(block), WAIT)),
                    _ => match tier.get(key(block), Buffer::zeroed(16_384), WAIT).wait() {
                        Ok(fetched) => assert_eq!(fetched.as_slice(), content(block)),
                        Err(miss) => assert_eq!(miss, Miss::Absent),
                    },
                }
            }
        }
    };
    let threads: Vec<_> = (0..4).map(|seed| std::thread::spawn(work(seed))).collect();
    for thread in threads {
        thread.join().unwrap();
    }
    let usage = tier.usage();
    assert!(usage.hits > 0 && usage.corrupt == 0 && usage.bytes <= usage.bytes_max, "{usage:?}");
    tier.state.lock().policy.check_invariants().unwrap();
}

#[test]
fn what_is_found_again_stays() {
    // Room for a hundred: each takes a unit beside its own.
    let options = HostOptions::new(ByteCount(200 * UNIT));
    let tier = HostTier::new(HostOptions { blocks_max: Some(1000), ..options });
    let put = |block: u128| {
        let key = StoreKey { fingerprint: Fingerprint(1), tenant: 2, block };
        tier.put(key, Buffer::zeroed(100), 100, WAIT).wait().unwrap();
        key
    };
    let hot: Vec<_> = (0..50).map(put).collect();
    for _ in 0..3 {
        assert!(hot.iter().all(|key| tier.hold(key).is_some()));
    }
    for once in 1000..2000 {
        put(once);
    }
    assert!(hot.iter().all(|key| tier.contains(key)), "what was never asked for makes room");
    assert_eq!(tier.usage().evicted, 950);
}

#[test]
fn what_somebody_holds_does_not_go_for_others() {
    let (tier, _dir) = locked(1);
    let put = |number: u64| {
        let block = vec![u8::try_from(number).unwrap(); 200_000];
        tier.put(dice::key(number), Buffer::Own(Aligned::copy_of(&block)), block.len(), WAIT).wait()
    };
    // Ten slots of 49 units are all of a page of 2 MiB.
    for number in 0..10 {
        put(number).unwrap();
    }
    let lent = tier.lend(&dice::key(0)).unwrap();
    let held = tier.hold(&dice::key(1)).unwrap();
    // As a disk does that still writes it.
    let view = tier.lend(&dice::key(2)).unwrap().buffer().view(ByteCount::ZERO, ByteCount(4096)).unwrap();
    for number in 10..30 {
        put(number).unwrap();
    }
    assert!((0..3).all(|number| tier.contains(&dice::key(number))), "they would have gone in vain");
    assert_eq!((tier.usage().blocks, tier.usage().evicted), (10, 20));
    lent.verify().unwrap();
    assert_eq!((held.as_slice()[0], view.as_slice()[0]), (1, 2));
    tier.state.lock().policy.check_invariants().unwrap();
}

#[test]
fn nothing_goes_for_a_block_that_finds_no_room_all_the_same() {
    // Each takes a unit beside its own.
    let tier = HostTier::new(HostOptions::new(ByteCount(8 * UNIT)));
    let put = |number: u64, units: u64| {
        let bytes = usize::try_from(units * UNIT).unwrap();
        tier.put(dice::key(number), Buffer::zeroed(bytes), bytes, WAIT).wait()
    };
    let held: Vec<Held> = (0..3)
        .map(|number| {
            put(number, 1).unwrap();
            let held = tier.hold(&dice::key(number)).unwrap();
            assert_eq!(tier.remove(dice::key(number), WAIT).wait(), Ok(true));
            held
        })
        .collect();
    assert_eq!(put(3, 1), Ok(Stored::Written));
    assert!(matches!(put(4, 2), Err(Miss::NoRoom { .. })), "six of eight units are held");
    assert!(tier.contains(&dice::key(3)), "it would have gone in vain");
    assert_eq!((tier.usage().bytes, tier.usage().evicted), (8 * UNIT, 0));
    assert_eq!(put(5, 1), Ok(Stored::Written), "what fits takes its place");
    drop(held);
    assert_eq!(put(4, 2), Ok(Stored::Written));
    assert!(tier.contains(&dice::key(5)));
}
