//! The disk tier through its public face, on real files and on simulated disks.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::store::health::HealthRule;
use shoal_device::{Device, HostBuffer, SimDevice, SimOptions};
use shoal_memory::disk::{
    DiskError, DiskKey, DiskOptions, DiskSpec, DiskState, DiskTier, Engine, FaultRates, SimDisk,
};
use shoal_memory::store::{Aligned, Buffer, Fingerprint, Miss, Offer, Store, StoreKey, Stored, Verdict};

const WAIT: Duration = Duration::from_mins(1);
const MIB: usize = 1 << 20;

fn key(block: u128) -> StoreKey {
    StoreKey { fingerprint: Fingerprint(7), tenant: 1, block }
}

fn content(block: u128, bytes: usize) -> Vec<u8> {
    (0..bytes as u128).map(|i| (i * 31 + block * 7 + (i >> 9)).to_le_bytes()[0]).collect()
}

fn small() -> DiskOptions {
    DiskOptions { segment_bytes: ByteCount::mib(8), ..DiskOptions::default() }
}

fn spec(path: &Path, mib: u64) -> DiskSpec {
    DiskSpec::new(path, ByteCount::mib(mib))
}

fn put(tier: &DiskTier, block: u128, bytes: usize) -> Result<Stored, Miss> {
    tier.put(key(block), Buffer::Own(Aligned::copy_of(&content(block, bytes))), bytes, WAIT).wait()
}

fn get(tier: &DiskTier, block: u128, bytes: usize) -> Result<(), Miss> {
    let fetched = tier.get(key(block), Buffer::zeroed(bytes), WAIT).wait()?;
    assert!(fetched.as_slice() == content(block, bytes), "block {block} is not what was put");
    Ok(())
}

/// Sizes on both sides of every border: parts of a unit, packed, direct.
const SIZES: [usize; 7] = [1, 4096, 5000, 64 << 10, (64 << 10) + 1, MIB, 2 * MIB];

#[test]
fn blocks_outlive_the_process_by_every_means() {
    for (engine, wants_direct) in [(Engine::Auto, true), (Engine::Auto, false), (Engine::Threads, true)] {
        let folder = tempfile::tempdir().unwrap();
        let options = DiskOptions { engine, wants_direct, ..small() };
        let tier = DiskTier::open(&[spec(folder.path(), 64)], options.clone()).unwrap();
        for (block, bytes) in SIZES.into_iter().enumerate() {
            assert_eq!(put(&tier, block as u128, bytes), Ok(Stored::Written));
            assert_eq!(put(&tier, block as u128, bytes), Ok(Stored::Already));
            assert!(tier.contains(&key(block as u128)));
            get(&tier, block as u128, bytes).unwrap();
        }
        assert_eq!(tier.remove(key(0), WAIT).wait(), Ok(true));
        assert_eq!(tier.remove(key(0), WAIT).wait(), Ok(false));
        assert_eq!(get(&tier, 0, 1), Err(Miss::Absent));
        let too_short = tier.get(key(5), Buffer::zeroed(4096), WAIT).wait().unwrap_err();
        assert_eq!(too_short, Miss::TooLong { bytes: MIB as u64, bytes_max: 4096 });
        tier.flush(WAIT).wait().unwrap();
        let usage = &tier.usage()[0];
        assert_eq!(
            usage.means.engine,
            if engine == Engine::Threads { "threads" } else { usage.means.engine }
        );
        assert!(wants_direct || !usage.means.is_direct);
        drop(tier);
        let tier = DiskTier::open(&[spec(folder.path(), 64)], options).unwrap();
        assert_eq!(tier.usage()[0].recovered.blocks, SIZES.len() as u64 - 1);
        assert_eq!(tier.usage()[0].recovered.scanned, 0, "closed with a footer");
        assert!(!tier.contains(&key(0)), "removed for good");
        for (block, bytes) in SIZES.into_iter().enumerate().skip(1) {
            get(&tier, block as u128, bytes).unwrap();
        }
    }
}

#[test]
fn the_arena_is_read_and_written_without_a_copy_between() {
    let runtime = tempfile::tempdir().unwrap();
    let device = SimDevice::open(SimOptions::new(ByteCount::mib(64), runtime.path())).unwrap();
    let device: Arc<dyn Device> = device;
    let arena = HostBuffer::allocate(&device, ByteCount::mib(4)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let tier = DiskTier::open(&[spec(folder.path(), 64)], small()).unwrap();
    let bytes = content(1, 2 * MIB);
    arena.write(ByteCount::ZERO, &bytes).unwrap();
    let source = arena.view(ByteCount::ZERO, ByteCount::mib(2)).unwrap();
    tier.put(key(1), Buffer::Host(source), 2 * MIB, WAIT).wait().unwrap();
    let target = arena.view_mut(ByteCount::mib(2), ByteCount::mib(2)).unwrap();
    let fetched = tier.get(key(1), Buffer::HostMut(target), WAIT).wait().unwrap();
    assert!(
        arena.read(ByteCount::mib(3), &mut [0; 8]).is_err(),
        "nobody else reads while it is lent for writing"
    );
    assert!(fetched.as_slice() == bytes);
    drop(fetched);
    let mut found = vec![0; 2 * MIB];
    arena.read(ByteCount::mib(2), &mut found).unwrap();
    assert!(found == bytes);
}

#[test]
fn many_threads_share_a_tier() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let tier = DiskTier::open(&[spec(one.path(), 64), spec(other.path(), 64)], small()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8_u128 {
            let tier = &tier;
            scope.spawn(move || {
                for round in 0..40 {
                    // Half of them are everybody's.
                    let block = if round % 2 == 0 { round } else { 1000 * (thread + 1) + round };
                    put(tier, block, 20_000 + block as usize % 9000).unwrap();
                    get(tier, block, 20_000 + block as usize % 9000).unwrap();
                }
            });
        }
    });
    let usage = tier.usage();
    assert_eq!(usage.iter().map(|disk| disk.log.blocks).sum::<u64>(), 20 + 8 * 20);
    assert!(usage.iter().all(|disk| disk.log.blocks > 20), "both disks are used: {usage:?}");
    tier.flush(WAIT).wait().unwrap();
}

#[test]
fn a_cap_is_kept_by_making_room() {
    let folder = tempfile::tempdir().unwrap();
    let tier = DiskTier::open(&[spec(folder.path(), 32)], small()).unwrap();
    for block in 0..100 {
        put(&tier, block, MIB).unwrap();
        get(&tier, 3, MIB)
            .unwrap_or_else(|miss| assert!(block < 3, "the hot one is gone at {block}: {miss}"));
    }
    let usage = &tier.usage()[0];
    assert!(usage.log.evicted > 50 && usage.log.reinserted > 0 && usage.counts.corrupt == 0, "{usage:?}");
    assert!(fs::metadata(folder.path().join("log")).unwrap().len() <= 32 << 20);
    assert!(!tier.contains(&key(5)));
    // A lower cap cuts the rest off.
    drop(tier);
    let tier = DiskTier::open(&[spec(folder.path(), 16)], small()).unwrap();
    assert!(fs::metadata(folder.path().join("log")).unwrap().len() <= 16 << 20);
    put(&tier, 5000, MIB).unwrap();
    get(&tier, 5000, MIB).unwrap();
}

#[test]
fn directories_that_are_not_to_be_had_are_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let tier = DiskTier::open(&[spec(folder.path(), 64)], small()).unwrap();
    let twice = DiskTier::open(&[spec(folder.path(), 64)], small());
    assert!(matches!(twice, Err(DiskError::InUse { .. })), "{twice:?}");
    put(&tier, 1, MIB).unwrap();
    drop(tier);
    let marker = folder.path().join("tier.json");
    let ours = fs::read_to_string(&marker).unwrap();
    fs::write(&marker, ours.replace("\"format\": 1", "\"format\": 2")).unwrap();
    let other = DiskTier::open(&[spec(folder.path(), 64)], small());
    assert!(matches!(other, Err(DiskError::OtherVersion { found: 2, ours: 1, .. })), "{other:?}");
    fs::write(&marker, ours).unwrap();
    let tier = DiskTier::open(&[spec(folder.path(), 64)], small()).unwrap();
    get(&tier, 1, MIB).unwrap();
    drop(tier);
    let little = DiskTier::open(&[spec(folder.path(), 8)], small()).unwrap_err().to_string();
    assert!(little.contains("16.0 MiB") || little.contains("16 MiB"), "{little}");
}

#[test]
fn a_directory_that_cannot_be_written_gives_misses_only() {
    // Where not even root makes directories.
    let tier = DiskTier::open(&[spec(Path::new("/proc/shoal-tier"), 64)], small()).unwrap();
    assert!(matches!(put(&tier, 1, 4096), Err(Miss::Aside { .. })));
    assert_eq!(get(&tier, 1, 4096), Err(Miss::Absent));
    let DiskState::Aside { reason, .. } = &tier.usage()[0].state else { panic!("{:?}", tier.usage()) };
    assert!(reason.contains("/proc/shoal-tier"), "{reason}");
    let offer = tier.offer(&key(1), &Offer { bytes: 4096, recompute_us: None });
    assert!(!offer.is_admitted());
}

#[test]
fn damage_on_real_files_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let tier = DiskTier::open(&[spec(folder.path(), 64)], small()).unwrap();
    for block in 0..20 {
        put(&tier, block, 256 << 10).unwrap();
    }
    drop(tier);
    // Every hundred kilobytes a bit.
    let log = folder.path().join("log");
    let mut bytes = fs::read(&log).unwrap();
    for at in (5000..6 << 20).step_by(100_000) {
        bytes[at] ^= 4;
    }
    fs::write(&log, bytes).unwrap();
    let tier = DiskTier::open(&[spec(folder.path(), 64)], small()).unwrap();
    let misses = (0..20).filter(|block| get(&tier, *block, 256 << 10).is_err()).count();
    assert_eq!(misses, 20);
}

#[test]
fn with_a_key_a_disk_says_nothing_without_it() {
    let folder = tempfile::tempdir().unwrap();
    let key_of = |byte| Some(DiskKey::new([byte; 32]));
    let options = DiskOptions { key: key_of(1), ..small() };
    let open = |options: &DiskOptions| DiskTier::open(&[spec(folder.path(), 64)], options.clone());
    let tier = open(&options).unwrap();
    for (block, bytes) in SIZES.into_iter().enumerate() {
        assert_eq!(put(&tier, block as u128, bytes), Ok(Stored::Written));
        assert_eq!(put(&tier, block as u128, bytes), Ok(Stored::Already));
        assert!(tier.contains(&key(block as u128)));
        get(&tier, block as u128, bytes).unwrap();
    }
    // Killed: the segment that is written has no footer, and is read through.
    drop(tier);
    let log = fs::read(folder.path().join("log")).unwrap();
    for (block, bytes) in SIZES.into_iter().enumerate().filter(|(_, bytes)| *bytes >= 64) {
        let content = content(block as u128, bytes);
        let has = |what: &[u8]| log.windows(what.len()).any(|there| there == what);
        assert!(!has(&content[..64]), "block {block} lies there as it is");
        assert!(!has(&key(block as u128).to_bytes()), "its name lies there as it is");
    }
    for (key, is_right) in [
        (None, (|error| matches!(error, DiskError::Encrypted { .. })) as fn(&DiskError) -> bool),
        (key_of(2), |error| matches!(error, DiskError::OtherKey { .. })),
    ] {
        let error = open(&DiskOptions { key, ..small() }).unwrap_err();
        assert!(is_right(&error), "{error}");
    }
    assert!(fs::read(folder.path().join("log")).unwrap() == log, "nothing was touched");
    let tier = open(&options).unwrap();
    for (block, bytes) in SIZES.into_iter().enumerate() {
        get(&tier, block as u128, bytes).unwrap();
    }
    assert_eq!(tier.remove(key(2), WAIT).wait(), Ok(true));
    assert_eq!(get(&tier, 2, SIZES[2]), Err(Miss::Absent));
    assert!(tier.close(WAIT));
}

fn simulated(count: u64, options: DiskOptions) -> (Vec<SimDisk>, DiskTier) {
    let disks: Vec<_> = (0..count).map(|seed| SimDisk::new(64 << 20, seed + 1)).collect();
    let sized: Vec<_> = disks.iter().map(|disk| (disk.clone(), ByteCount::mib(64))).collect();
    let tier = DiskTier::on_simulated(&sized, options).unwrap();
    (disks, tier)
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < WAIT, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_disk_that_fails_is_set_aside_and_comes_back_and_the_others_go_on() {
    let health = HealthRule { failures_max: 3, window_ms: 60_000, retry_ms: 50 };
    let (disks, tier) = simulated(3, DiskOptions { health, ..small() });
    for block in 0..60 {
        put(&tier, block, 50_000).unwrap();
    }
    let held = |tier: &DiskTier| (0..60).filter(|block| get(tier, *block, 50_000).is_ok()).count();
    assert_eq!(held(&tier), 60);
    disks[1].set_rates(FaultRates { read_error: 1000, ..FaultRates::default() });
    held(&tier);
    until("it is set aside", || tier.usage()[1].counts.asides > 0);
    let left = held(&tier);
    assert!((20..60).contains(&left), "{left} of 60 on two of three disks");
    for block in 100..130 {
        put(&tier, block, 50_000).unwrap();
    }
    disks[1].set_rates(FaultRates::default());
    until("it comes back", || tier.usage()[1].state == DiskState::Ready);
    assert_eq!(held(&tier), 60, "with all that it had");
}

#[test]
fn a_disk_that_hangs_costs_misses_and_no_waiting() {
    let health = HealthRule { failures_max: 4, window_ms: 60_000, retry_ms: 50 };
    let io_deadline = Duration::from_millis(100);
    let (disks, tier) = simulated(1, DiskOptions { health, io_deadline, depth: 4, ..small() });
    until("it is written, be it not at once", || put(&tier, 1, 50_000).is_ok());
    disks[0].set_rates(FaultRates { hang: 1000, ..FaultRates::default() });
    let ask = |tier: &DiskTier| -> Vec<_> {
        (0..8).map(|_| tier.get(key(1), Buffer::zeroed(50_000), WAIT)).collect()
    };
    let begun = Instant::now();
    let tickets = ask(&tier);
    assert!(tickets.into_iter().all(|ticket| ticket.wait().is_err()));
    assert!(begun.elapsed() < WAIT / 2, "whoever waits hears of it long before its own deadline");
    disks[0].set_rates(FaultRates::default());
    until("it comes back", || get(&tier, 1, 50_000).is_ok());

    // Whoever has less time than that hears of it at its own deadline: on a disk that is not set aside before.
    let (disks, tier) = simulated(1, DiskOptions { io_deadline: WAIT, depth: 4, ..small() });
    put(&tier, 1, 50_000).unwrap();
    disks[0].set_rates(FaultRates { hang: 1000, ..FaultRates::default() });
    let before = ask(&tier);
    let short = tier.get(key(1), Buffer::zeroed(50_000), Duration::from_millis(20));
    assert_eq!(short.wait().unwrap_err(), Miss::Deadline);
    drop(before);
    tier.close(Duration::from_millis(50));
}

#[test]
fn a_queue_has_its_bound_and_a_closed_tier_says_so() {
    let options = DiskOptions { requests_max: 4, depth: 1, linger: WAIT, ..small() };
    let (disks, tier) = simulated(1, options);
    disks[0].set_rates(FaultRates { hang: 1000, ..FaultRates::default() });
    let tickets: Vec<_> = (0..200)
        .map(|block| tier.put(key(block), Buffer::zeroed(4096), 4096, Duration::from_millis(50)))
        .collect();
    let busy = tickets.into_iter().map(shoal_memory::store::Ticket::wait);
    let busy = busy.filter(|answer| matches!(answer, Err(Miss::Busy { .. }))).count();
    assert!(busy > 100, "{busy} of 200 were refused");
    tier.close(Duration::from_millis(50));
    assert_eq!(put(&tier, 1, 4096), Err(Miss::Closed));
    // Also once the disk's thread has ended, so that no disk is there to ask.
    until("the disk is closed", || tier.usage().iter().all(|disk| disk.state == DiskState::Closed));
    assert_eq!(put(&tier, 1, 4096), Err(Miss::Closed));
}

#[test]
fn the_second_sight_of_a_block_is_worth_a_write() {
    let (_disks, tier) = simulated(1, small());
    let offer = Offer { bytes: MIB as u64, recompute_us: Some(1_000_000) };
    assert_eq!(tier.offer(&key(1), &offer), Verdict::TooFewUses { uses: 1, uses_min: 2 });
    assert_eq!(tier.offer(&key(1), &offer), Verdict::Admit);
    let cheap = Offer { recompute_us: Some(1), ..offer };
    assert!(matches!(tier.offer(&key(1), &cheap), Verdict::CheaperToRecompute { .. }));
}

#[test]
fn what_is_removed_does_not_come_back_with_a_disk() {
    let disks = [SimDisk::new(32 << 20, 1), SimDisk::new(32 << 20, 2)];
    let health = HealthRule { failures_max: 2, window_ms: 600_000, retry_ms: 2000 };
    let options = DiskOptions { health, ..small() };
    let bytes = ByteCount::mib(32);
    let tier = DiskTier::on_simulated(&disks.each_ref().map(|disk| (disk.clone(), bytes)), options).unwrap();
    let is_ready = |at: usize| tier.usage()[at].state == DiskState::Ready;
    assert_eq!(put(&tier, 1, 4096), Ok(Stored::Written));
    assert_eq!(tier.flush(WAIT).wait(), Ok(()));
    let at = usize::from(tier.usage()[0].log.blocks == 0);
    let mut others = 100..;
    until("the block was removed and put while its disk was away", || {
        disks[at].set_rates(FaultRates { write_error: 1000, ..FaultRates::default() });
        until("its disk is set aside", || put(&tier, others.next().unwrap(), 4096).is_ok() && !is_ready(at));
        // What it has can be read again as soon as it is tried again; on a busy machine that may be before the next line.
        disks[at].set_rates(FaultRates::default());
        let removed = tier.remove(key(1), WAIT).wait();
        let again = put(&tier, 1, 4096);
        // It is away with the block, so nobody can say that the block is gone; the other one stands in meanwhile.
        matches!(removed, Err(Miss::Aside { .. })) && again == Ok(Stored::Written)
    });
    get(&tier, 1, 4096).unwrap();
    until("it is there again", || is_ready(at));
    assert_eq!(tier.remove(key(1), WAIT).wait(), Ok(true));
    assert!(!tier.contains(&key(1)), "the copy of the other one too");
    assert_eq!(get(&tier, 1, 4096), Err(Miss::Absent));
    assert_eq!(tier.remove(key(1), WAIT).wait(), Ok(false));
}
