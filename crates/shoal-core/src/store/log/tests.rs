use super::super::key::Fingerprint;
use super::*;

const OPTIONS: LogOptions =
    LogOptions { segment_bytes: 64 * UNIT, segments_max: 4, record_bytes: 16 * UNIT, entries_max: 1000 };

fn key(block: u128) -> StoreKey {
    StoreKey { fingerprint: Fingerprint(1), tenant: 0, block }
}

/// Drives a log as a disk without faults does.
fn put(log: &mut Log, block: u128) {
    let item = [(key(block), 8 * 4096)];
    for _ in 0..20 {
        if let Some(placed) = log.place(&item) {
            log.commit(&placed, &[Some(0)]);
            break;
        }
        if log.needs_growth() {
            log.grown();
        }
        log.open_next();
        while let Some(unsealed) = log.next_unsealed() {
            log.sealed(unsealed.slot);
        }
        while let Some(victim) = log.next_victim() {
            let mut again = 0;
            for entry in victim.hot {
                let uses = log.uses_left(&entry.key);
                if let Some(placed) = log.place(&[(entry.key, entry.bytes)]) {
                    log.commit(&placed, &[Some(uses)]);
                    again += 1;
                }
            }
            log.cleaned(victim.slot, again);
        }
    }
    log.check().expect("what must hold");
}

#[test]
fn old_cold_blocks_make_room_and_hot_ones_stay() {
    let mut log = Log::new(OPTIONS, 0, 1);
    for block in 0..200 {
        put(&mut log, block);
        assert!(log.contains(&key(block)), "{block}");
        if let Some((slot, _)) = log.find(&key(3)) {
            log.unpin(slot);
        }
    }
    assert!(log.contains(&key(3)), "used all the time");
    assert!(!log.contains(&key(4)), "written with it, and never used");
    let usage = log.usage();
    assert!(usage.reinserted > 3 && usage.evicted > 150 && usage.segments == 4, "{usage:?}");
}

#[test]
fn what_is_read_is_not_written_over() {
    let mut log = Log::new(OPTIONS, 0, 1);
    put(&mut log, 0);
    let (slot, entry) = log.find(&key(0)).expect("just put");
    for block in 1..100 {
        put(&mut log, block);
    }
    assert!(log.segments[slot as usize].readers == 1);
    if !log.is_at(slot, &entry) {
        assert!(matches!(log.segments[slot as usize].state, State::Draining | State::Cleaning));
    }
    log.unpin(slot);
    log.check().expect("what must hold");
}

#[test]
fn a_full_disk_goes_on_with_what_it_has() {
    let mut log = Log::new(OPTIONS, 0, 1);
    assert!(log.can_write());
    log.stop_growing();
    assert!(!log.can_write(), "not one segment");
    log.resume_growing();
    put(&mut log, 0);
    log.stop_growing();
    for block in 1..50 {
        put(&mut log, block);
        assert!(log.contains(&key(block)));
    }
    assert!(log.is_cut_short() && log.usage().segments == 1);
}
