//! The remote tier over real sockets, against fakes that are slow, wrong and gone: what is served is what was put (I8),
//! every ticket is answered (I10), and an outage costs misses only.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests, which report what they played")]

mod fakes;

use std::collections::HashSet;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fakes::{FAULTS, Fake, Fault, Protocol};
use shoal_core::bytes::ByteCount;
use shoal_core::store::health::HealthRule;
use shoal_memory::remote::{HEAD_BYTES, RedisSpec, RemoteKey, RemoteOptions, RemoteSpec, RemoteTier, S3Spec};
use shoal_memory::store::{
    AdmissionRule, Aligned, Buffer, Fingerprint, HostOptions, HostTier, Miss, Offer, Stack, StackOptions,
    Store, StoreKey, Stored,
};

const WAIT: Duration = Duration::from_mins(1);
const ROOM: usize = 24 << 10;

fn key(block: u64) -> StoreKey {
    StoreKey { fingerprint: Fingerprint(1), tenant: 2, block: block.into() }
}

fn content(block: u64) -> Vec<u8> {
    let length = 1 + usize::try_from(block * 4099 % 20_000).unwrap();
    (0..length).map(|at| u8::try_from((block * 31 + at as u64) % 251).unwrap()).collect()
}

fn put(store: &dyn Store, block: u64) -> Result<Stored, Miss> {
    let bytes = content(block);
    store.put(key(block), Buffer::Own(Aligned::copy_of(&bytes)), bytes.len(), WAIT).wait()
}

fn get(store: &dyn Store, block: u64) -> Result<Vec<u8>, Miss> {
    store.get(key(block), Buffer::zeroed(ROOM), WAIT).wait().map(|fetched| fetched.as_slice().to_vec())
}

/// Waits for what threads do, for as long as it takes on a busy machine.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let by = Instant::now() + WAIT;
    while !is_so() {
        assert!(Instant::now() < by, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn spec(protocol: Protocol, address: &str) -> RemoteSpec {
    match protocol {
        Protocol::S3 => RemoteSpec::S3(S3Spec {
            address: address.to_owned(),
            bucket: "blocks".to_owned(),
            prefix: "here/".to_owned(),
            region: "us-east-1".to_owned(),
            access_key: "someone".to_owned(),
            secret_key: "a secret".to_owned(),
        }),
        Protocol::Redis => RemoteSpec::Redis(RedisSpec {
            address: address.to_owned(),
            login: Some((String::new(), "a secret".to_owned())),
            database: 3,
            prefix: "shoal/".to_owned(),
            keep: None,
        }),
    }
}

/// Patient, and never set aside.
fn patient() -> RemoteOptions {
    RemoteOptions {
        try_deadline: WAIT,
        tries_max: 10,
        backoff: Duration::from_millis(2),
        health: HealthRule { failures_max: u32::MAX, ..HealthRule::default() },
        admission: AdmissionRule { uses_min: 1 },
        ..RemoteOptions::new(RemoteKey([7; 32]))
    }
}

fn open(protocol: Protocol, fake: &Fake, options: RemoteOptions) -> RemoteTier {
    RemoteTier::open(&spec(protocol, &fake.address), options).unwrap()
}

fn serves_what_was_put(spec: &RemoteSpec) {
    let tier = RemoteTier::open(spec, patient()).unwrap();
    for block in 0..12 {
        assert_eq!(get(&tier, block), Err(Miss::Absent));
        assert_eq!(put(&tier, block), Ok(Stored::Written));
        assert_eq!(put(&tier, block), Ok(Stored::Already));
        assert_eq!(get(&tier, block), Ok(content(block)));
        assert!(tier.contains(&key(block)));
    }
    assert_eq!(tier.flush(WAIT).wait(), Ok(()));
    let short = tier.get(key(7), Buffer::zeroed(4096), WAIT).wait().unwrap_err();
    assert_eq!(short, Miss::TooLong { bytes: content(7).len() as u64, bytes_max: 4096 });
    assert_eq!(tier.remove(key(3), WAIT).wait(), Ok(true));
    assert_eq!(get(&tier, 3), Err(Miss::Absent));

    // Another server with the same key.
    let other = RemoteTier::open(spec, patient()).unwrap();
    assert_eq!(other.look(key(3), WAIT).wait(), Ok(false));
    assert!(!other.contains(&key(4)), "nobody has looked yet");
    until("it was looked for in the background", || other.contains(&key(4)));
    assert_eq!(get(&other, 4), Ok(content(4)));
    // And one that holds another.
    let stranger = RemoteTier::open(spec, RemoteOptions { key: RemoteKey([8; 32]), ..patient() }).unwrap();
    assert_eq!(get(&stranger, 4), Err(Miss::Corrupt));
    assert_eq!(get(&other, 4), Ok(content(4)), "it is left as it is");
    let counts = tier.usage().counts;
    assert_eq!((counts.written, counts.hits, counts.corrupt), (12, 12, 0));
}

#[test]
fn all_kinds_serve_what_was_put() {
    for protocol in [Protocol::S3, Protocol::Redis] {
        let fake = Fake::start(protocol, |_| Fault::None);
        serves_what_was_put(&spec(protocol, &fake.address));
        fake.stop();
    }
    let directory = tempfile::tempdir().unwrap();
    serves_what_was_put(&RemoteSpec::Directory(directory.path().to_owned()));
    let is_part = |path: &Path| path.extension().is_some_and(|extension| extension == "part");
    let mut paths = vec![directory.path().to_owned()];
    while let Some(path) = paths.pop() {
        assert!(!is_part(&path), "{} is left over", path.display());
        if path.is_dir() {
            paths.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
}

/// A server that was started a moment ago knows of nothing, and a sequence is of no use block by block.
#[test]
fn what_others_have_of_a_sequence_is_known_when_it_was_looked_for() {
    for protocol in [Protocol::S3, Protocol::Redis] {
        let fake = Fake::start(protocol, |_| Fault::None);
        let keys: Vec<StoreKey> = (0..200).map(key).collect();
        let before = open(protocol, &fake, patient());
        for block in (0..200).filter(|block| *block != 150) {
            assert_eq!(put(&before, block), Ok(Stored::Written));
        }
        let host: Arc<dyn Store> = Arc::new(HostTier::new(HostOptions::new(ByteCount::mib(64))));
        for block in 0..3 {
            assert_eq!(put(&*host, block), Ok(Stored::Written));
        }
        let remote: Arc<dyn Store> = Arc::new(open(protocol, &fake, patient()));
        let stack = Stack::new(vec![host, Arc::clone(&remote)], StackOptions::default()).unwrap();
        assert!(stack.must_look());
        let asked = fake.count(|_, _| true);
        stack.look_for(&keys, WAIT);
        // What the host has is not looked for; the first block of the rest is, and then 64 at a time up to the gap.
        assert_eq!(fake.count(|_, _| true) - asked, 1 + 3 * 64);
        let parts = stack.parts_of(&keys);
        assert_eq!((parts.len(), &parts[..5]), (150, &[0, 0, 0, 1, 1][..]));
        // Of a sequence that nobody has one is asked for, once.
        let asked = fake.count(|_, _| true);
        let others: Vec<StoreKey> = (1000..1200).map(key).collect();
        stack.look_for(&others, WAIT);
        stack.look_for(&others, WAIT);
        assert_eq!(fake.count(|_, _| true) - asked, 1);
        assert!(stack.parts_of(&others).is_empty());
        fake.stop();
        // Nobody waits for one that is gone for longer than was said.
        let gone =
            open(protocol, &fake, RemoteOptions { try_deadline: Duration::from_millis(50), ..patient() });
        let begun = Instant::now();
        gone.look_for(&keys, Duration::from_millis(100));
        assert!(begun.elapsed() < WAIT, "{:?}", begun.elapsed());
        assert!(gone.parts_of(&keys).is_empty());
    }
}

#[test]
fn what_passes_is_tried_again() {
    for protocol in [Protocol::S3, Protocol::Redis] {
        for fault in [Fault::Close, Fault::Fail, Fault::Cut, Fault::Noise, Fault::Hang, Fault::Trickle] {
            let count = AtomicUsize::new(0);
            let is_first = move |_: &str| {
                if count.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) { fault } else { Fault::None }
            };
            let fake = Fake::start(protocol, is_first);
            // What hangs is waited for as long as a try may take.
            let is_hanging = fault == Fault::Hang;
            let try_deadline = if is_hanging { Duration::from_millis(200) } else { WAIT };
            let tier = open(protocol, &fake, RemoteOptions { try_deadline, tries_max: 200, ..patient() });
            assert_eq!(put(&tier, 5), Ok(Stored::Written), "{fault:?}");
            assert_eq!(get(&tier, 5), Ok(content(5)), "{fault:?}");
            assert!(fake.count(|_, given| given == fault) > 0);
            assert_eq!(tier.usage().counts.corrupt, 0);
            fake.stop();
        }
    }
}

#[test]
fn a_refusal_is_not_repeated() {
    for protocol in [Protocol::S3, Protocol::Redis] {
        let fake = Fake::start(protocol, |_| Fault::Deny);
        let tier = open(protocol, &fake, patient());
        let Err(Miss::Failed { reason, .. }) = put(&tier, 1) else { panic!("it was refused") };
        assert!(reason.contains("AccessDenied") || reason.contains("NOAUTH"), "{reason}");
        assert_eq!(fake.count(|_, _| true), 1);
        fake.stop();
    }
}

#[test]
fn nothing_is_served_that_is_not_what_was_put() {
    for protocol in [Protocol::S3, Protocol::Redis] {
        for fault in [Fault::Flip, Fault::Short, Fault::Other] {
            let fake = Fake::start(protocol, move |verb| if verb == "GET" { fault } else { Fault::None });
            let tier = open(protocol, &fake, patient());
            for block in 1..5 {
                put(&tier, block).unwrap();
            }
            for block in 1..5 {
                let read = get(&tier, block);
                let is_found = matches!(read, Err(Miss::Corrupt | Miss::TooLong { .. }));
                assert!(is_found, "{fault:?}: {read:?}");
            }
            assert!(!tier.contains(&key(1)), "it is not asked for again for now");
            fake.stop();
        }
    }
    // Every bit of an object counts.
    let fake = Fake::start(Protocol::S3, |_| Fault::None);
    put(&open(Protocol::S3, &fake, patient()), 0).unwrap();
    let (name, object) = fake.objects.lock().drain().next().unwrap();
    assert_eq!(object.len(), HEAD_BYTES + content(0).len());
    for bit in 0..object.len() * 8 {
        let mut wrong = object.clone();
        wrong[bit / 8] ^= 1 << (bit % 8);
        fake.objects.lock().insert(name.clone(), wrong);
        // Nothing is remembered of one that is damaged.
        if bit % 64 == 0 || bit / 8 >= HEAD_BYTES {
            let tier = open(Protocol::S3, &fake, RemoteOptions { connections: 1, ..patient() });
            assert_eq!(get(&tier, 0), Err(Miss::Corrupt), "bit {bit}");
        }
    }
    fake.stop();
}

#[test]
fn an_outage_costs_misses_and_no_waiting() {
    for protocol in [Protocol::S3, Protocol::Redis] {
        let is_out = Arc::new(AtomicBool::new(false));
        let out = Arc::clone(&is_out);
        let fake =
            Fake::start(
                protocol,
                move |_| {
                    if out.load(Ordering::Relaxed) { Fault::Close } else { Fault::None }
                },
            );
        let health = HealthRule { failures_max: 3, window_ms: 600_000, retry_ms: 1 };
        let retry_max = Duration::from_millis(1);
        let tier = open(protocol, &fake, RemoteOptions { health, retry_max, tries_max: 1, ..patient() });
        put(&tier, 1).unwrap();
        is_out.store(true, Ordering::Relaxed);
        let before = fake.count(|_, _| true);
        while tier.usage().counts.asides == 0 {
            let miss = get(&tier, 1).unwrap_err();
            assert!(matches!(miss, Miss::Failed { .. }), "{miss}");
        }
        assert_eq!(tier.usage().counts.failed, 3);
        assert!(fake.count(|_, _| true) >= before + 3);
        is_out.store(false, Ordering::Relaxed);
        until("it is asked again", || get(&tier, 1) == Ok(content(1)));
        assert_eq!(tier.usage().aside, None);
        fake.stop();
    }
    // Where nobody listens; for so long that it is not asked again here.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let health = HealthRule { failures_max: 2, window_ms: 600_000, retry_ms: 3_600_000 };
    let options = RemoteOptions { health, retry_max: Duration::from_hours(1), tries_max: 1, ..patient() };
    let tier = RemoteTier::open(&spec(Protocol::Redis, &address), options).unwrap();
    for _ in 0..2 {
        assert!(matches!(get(&tier, 1), Err(Miss::Failed { .. })));
    }
    for block in 0..100 {
        let ticket = tier.get(key(block), Buffer::zeroed(ROOM), WAIT);
        assert!(ticket.is_done(), "nobody is asked");
        assert!(matches!(ticket.wait(), Err(Miss::Aside { .. })));
        assert!(!tier.contains(&key(block)));
        assert!(matches!(put(&tier, block), Err(Miss::Aside { .. })));
    }
    assert!(!tier.offer(&key(1), &Offer { bytes: 1, recompute_us: None }).is_admitted());
    let usage = tier.usage();
    assert_eq!((usage.counts.asides, usage.put_bytes), (1, 0));
    assert!(usage.aside.is_some());
}

#[test]
fn an_outage_ends_although_the_one_that_found_out_had_no_time() {
    for protocol in [Protocol::S3, Protocol::Redis] {
        let now = Arc::new(parking_lot::Mutex::new(Fault::None));
        let given = Arc::clone(&now);
        let fake = Fake::start(protocol, move |_| *given.lock());
        let health = HealthRule { failures_max: 1, window_ms: 600_000, retry_ms: 1 };
        let tier = open(protocol, &fake, RemoteOptions { health, tries_max: 1, ..patient() });
        put(&tier, 1).unwrap();
        *now.lock() = Fault::Close;
        until("it is set aside", || get(&tier, 1).is_err() && tier.usage().counts.asides > 0);
        *now.lock() = Fault::Hang;
        // Far less than a try may take: this says nothing of the remote, and whoever asks next finds out.
        until("one has tried and heard nothing", || {
            let _ = tier.get(key(1), Buffer::zeroed(ROOM), Duration::from_millis(50)).wait();
            fake.count(|_, fault| fault == Fault::Hang) > 0
        });
        *now.lock() = Fault::None;
        until("it is asked again", || get(&tier, 1) == Ok(content(1)));
        fake.stop();
    }
}

#[test]
fn times_without_an_end_are_no_harm() {
    let fake = Fake::start(Protocol::Redis, |verb| if verb == "GET" { Fault::Close } else { Fault::None });
    let [try_deadline, backoff, retry_max, absent_for] = [Duration::MAX; 4];
    let health = HealthRule { failures_max: 1, window_ms: u64::MAX, retry_ms: u64::MAX };
    let options = RemoteOptions { try_deadline, backoff, retry_max, absent_for, health, ..patient() };
    let tier = open(Protocol::Redis, &fake, options);
    put(&tier, 1).unwrap();
    let soon = Duration::from_secs(1);
    assert!(tier.get(key(1), Buffer::zeroed(ROOM), soon).wait().is_err());
    until("it is set aside", || tier.usage().aside.is_some());
    assert!(matches!(get(&tier, 1), Err(Miss::Aside { .. })));
    fake.stop();
}

#[test]
fn what_waits_has_a_bound() {
    let fake = Fake::start(Protocol::Redis, |_| Fault::Hang);
    let options = RemoteOptions {
        connections: 1,
        requests_max: 2,
        put_bytes_max: ByteCount(30_000),
        try_deadline: WAIT,
        ..patient()
    };
    let tier = open(Protocol::Redis, &fake, options);
    let first = tier.get(key(1), Buffer::zeroed(ROOM), WAIT);
    until("the first one hangs", || fake.count(|_, _| true) == 1);
    let bytes = content(4).len();
    let source = || Buffer::Own(Aligned::copy_of(&content(4)));
    let waiting = tier.put(key(4), source(), bytes, WAIT);
    let too_much = tier.put(key(5), source(), bytes, WAIT);
    assert!(matches!(too_much.wait(), Err(Miss::Busy { .. })), "more bytes than may wait");
    let small = || Buffer::Own(Aligned::copy_of(&content(0)));
    let also_waiting = tier.put(key(6), small(), 1, WAIT);
    assert_eq!(tier.put(key(7), small(), 1, WAIT).wait(), Err(Miss::Busy { waiting: 2 }), "two puts wait");
    let second = tier.get(key(2), Buffer::zeroed(ROOM), WAIT);
    let third = tier.get(key(3), Buffer::zeroed(ROOM), WAIT);
    let fourth = tier.get(key(8), Buffer::zeroed(ROOM), WAIT).wait();
    assert_eq!(
        fourth.unwrap_err(),
        Miss::Busy { waiting: 2 },
        "puts take no room of theirs, nor they of puts"
    );
    let late = tier.flush(Duration::from_millis(1)).wait();
    assert_eq!(late, Err(Miss::Deadline), "a put is under way");
    drop(tier);
    for ticket in [first, second, third] {
        // The one that hangs has its time; nobody waits for it here.
        ticket.cancel();
        drop(ticket);
    }
    for put in [waiting, also_waiting] {
        assert_eq!(put.wait(), Err(Miss::Closed));
    }
    fake.stop();
}

#[test]
fn what_nobody_waits_for_keeps_nobody_waiting() {
    let is_slow = Arc::new(AtomicBool::new(true));
    let slow = Arc::clone(&is_slow);
    let fake = Fake::start(Protocol::Redis, move |verb| {
        if verb == "EXISTS" && slow.load(Ordering::Relaxed) { Fault::Hang } else { Fault::None }
    });
    let options = RemoteOptions { connections: 2, requests_max: 20, tries_max: 1, ..patient() };
    let options = RemoteOptions { try_deadline: Duration::from_millis(500), ..options };
    let tier = open(Protocol::Redis, &fake, options);
    for block in 100..300 {
        assert!(!tier.contains(&key(block)));
    }
    assert!(tier.usage().counts.probes <= 16, "no more are looked for at a time");
    // A try may be too short on a busy machine; room in the queue there always is.
    let puts = |block| match put(&tier, block) {
        Err(Miss::Busy { .. }) => panic!("there is room in the queue"),
        other => other.is_ok(),
    };
    until("it is written", || puts(1));
    is_slow.store(false, Ordering::Relaxed);
    until("it is written", || puts(299));
    let other = open(Protocol::Redis, &fake, patient());
    until("it is found in the end", || other.contains(&key(299)));
    fake.stop();
}

#[test]
fn who_asks_does_not_wait_for_what_is_being_put() {
    for protocol in [Protocol::S3, Protocol::Redis] {
        let is_put = |verb: &str| matches!(verb, "PUT" | "SET" | "SETEX");
        let (may_hang, begun) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let gate = Arc::new(parking_lot::Mutex::new(()));
        let (hangs, puts_begun, passes) = (Arc::clone(&may_hang), Arc::clone(&begun), Arc::clone(&gate));
        let fake = Fake::start(protocol, move |verb| {
            if !is_put(verb) {
                return Fault::None;
            }
            puts_begun.fetch_add(1, Ordering::Relaxed);
            drop(passes.lock());
            if hangs.load(Ordering::Relaxed) { Fault::Hang } else { Fault::None }
        });
        let put_all = |tier: &RemoteTier, blocks: std::ops::Range<u64>| -> Vec<_> {
            let put = |block| {
                let bytes = content(block);
                tier.put(key(block), Buffer::Own(Aligned::copy_of(&bytes)), bytes.len(), WAIT)
            };
            blocks.map(put).collect()
        };
        // By one connection: whoever asks comes before all puts but the one that is under way.
        let alone = open(protocol, &fake, RemoteOptions { connections: 1, ..patient() });
        put(&alone, 1).unwrap();
        for waiting in [10, 200] {
            let (before, closed) = (begun.load(Ordering::Relaxed), gate.lock());
            let puts = put_all(&alone, 1000 * waiting..1000 * waiting + waiting);
            until("a put is under way", || begun.load(Ordering::Relaxed) > before);
            let given_before = fake.count(|_, _| true);
            let looked = alone.look(key(2), WAIT);
            let got = alone.get(key(1), Buffer::zeroed(ROOM), WAIT);
            drop(closed);
            assert_eq!(looked.wait(), Ok(false));
            assert_eq!(got.wait().unwrap().as_slice(), content(1));
            let given: Vec<bool> =
                fake.given.lock()[given_before..].iter().map(|(verb, _)| is_put(verb)).collect();
            assert_eq!(given[..3], [true, false, false], "however many wait");
            for put in puts {
                assert_eq!(put.wait(), Ok(Stored::Written), "they are written in the end");
            }
        }
        // By two: not even for one that hangs.
        may_hang.store(true, Ordering::Relaxed);
        let tier = open(protocol, &fake, RemoteOptions { connections: 2, ..patient() });
        let puts = put_all(&tier, 0..50);
        until("one hangs", || fake.count(|_, fault| fault == Fault::Hang) > 0);
        for _ in 0..20 {
            assert_eq!(tier.look(key(2), WAIT).wait(), Ok(false));
            assert_eq!(get(&tier, 1), Ok(content(1)));
        }
        assert!(puts.iter().all(|put| !put.is_done()));
        assert_eq!(fake.count(|_, fault| fault == Fault::Hang), 1, "one connection is left to who asks");
        fake.stop();
    }
}

/// It does not even read: what is written to it stays in buffers until those are full.
#[test]
fn a_deadline_holds_when_the_remote_takes_connections_and_no_more() {
    for protocol in [Protocol::S3, Protocol::Redis] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            let mut taken = Vec::new();
            for stream in listener.incoming().flatten() {
                taken.push(stream);
            }
        });
        let (deadline, long) = (Duration::from_millis(50), 16 << 20);
        let options = RemoteOptions { connections: 3, try_deadline: deadline, tries_max: 2, ..patient() };
        let tier = RemoteTier::open(&spec(protocol, &address), options).unwrap();
        let begun = Instant::now();
        let got = tier.get(key(1), Buffer::zeroed(ROOM), 4 * deadline);
        let written = tier.put(key(2), Buffer::zeroed(long), long, 4 * deadline);
        let looked = tier.look(key(3), 4 * deadline);
        let removed = tier.remove(key(4), 4 * deadline);
        let is_over = |miss: Miss| matches!(miss, Miss::Failed { .. } | Miss::Deadline);
        assert!(got.wait().is_err_and(is_over));
        assert!(written.wait().is_err_and(is_over));
        assert!(looked.wait().is_err_and(is_over));
        assert!(removed.wait().is_err_and(is_over));
        // Not only who waits: the threads are free again, and nobody has the memory.
        until("the put is given up", || tier.usage().put_bytes == 0);
        println!("all was given up in {:?}", begun.elapsed());
        let begun = Instant::now();
        drop(tier);
        assert!(begun.elapsed() < WAIT);
        // Set aside after a while: then nobody waits at all.
        let health = HealthRule { failures_max: 2, window_ms: 600_000, retry_ms: 3_600_000 };
        let retry_max = Duration::from_hours(1);
        let options = RemoteOptions { health, retry_max, try_deadline: deadline, tries_max: 2, ..patient() };
        let tier = RemoteTier::open(&spec(protocol, &address), options).unwrap();
        assert!(get(&tier, 1).is_err());
        until("it is set aside", || tier.usage().aside.is_some());
        assert!(matches!(get(&tier, 1), Err(Miss::Aside { .. })));
    }
}

#[test]
fn a_deadline_holds_when_the_remote_hangs() {
    for protocol in [Protocol::S3, Protocol::Redis] {
        let fake = Fake::start(protocol, |_| Fault::Hang);
        let tier = open(protocol, &fake, patient());
        let tickets: Vec<_> = (0..20)
            .map(|block| tier.get(key(block), Buffer::zeroed(ROOM), Duration::from_millis(50)))
            .collect();
        for ticket in tickets {
            assert_eq!(ticket.wait().unwrap_err(), Miss::Deadline);
        }
        fake.stop();
    }
}

#[test]
fn what_was_removed_while_it_was_written_is_gone() {
    let fake = Fake::start(Protocol::S3, |verb| if verb == "PUT" { Fault::Trickle } else { Fault::None });
    let tier = open(Protocol::S3, &fake, patient());
    for block in 0..30 {
        let bytes = content(block);
        let put = tier.put(key(block), Buffer::Own(Aligned::copy_of(&bytes)), bytes.len(), WAIT);
        let removed = tier.remove(key(block), WAIT);
        removed.wait().unwrap();
        assert_eq!(get(&tier, block), Err(Miss::Absent));
        let _ = put.wait();
        until("what was put before is gone", || fake.objects.lock().is_empty());
        assert_eq!(get(&tier, block), Err(Miss::Absent));
    }
    fake.stop();
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % end
    }
}

/// One history of a stack of host and remote, with faults of all kinds. How many objects were given wrong.
fn play(protocol: Protocol, seed: u64) -> usize {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut faults = Random(random.below(u64::MAX) | 1);
    let percent = [5, 30, 70][usize::try_from(random.below(3)).unwrap()];
    let fake = Fake::start(protocol, move |_| {
        let is_fault = faults.below(100) < percent;
        let index = usize::try_from(faults.below(FAULTS.len() as u64)).unwrap();
        if is_fault { FAULTS[index] } else { Fault::None }
    });
    let options = RemoteOptions {
        try_deadline: Duration::from_millis(20),
        tries_max: 3,
        connections: 3,
        health: HealthRule { failures_max: 6, window_ms: 1000, retry_ms: 1 },
        retry_max: Duration::from_millis(5),
        absent_for: Duration::from_millis(1),
        ..patient()
    };
    let remote = Arc::new(open(protocol, &fake, options));
    let host = Arc::new(HostTier::new(HostOptions::new(ByteCount(60_000))));
    let stack =
        Stack::new(vec![host as Arc<dyn Store>, Arc::clone(&remote) as _], StackOptions::default()).unwrap();
    let mut ever = HashSet::new();
    for _ in 0..6 {
        let (mut gets, mut puts) = (Vec::new(), Vec::new());
        for _ in 0..random.below(20) {
            let block = random.below(12);
            match random.below(8) {
                0..3 => {
                    let bytes = content(block);
                    let source = Buffer::Own(Aligned::copy_of(&bytes));
                    puts.push(stack.put(key(block), source, bytes.len(), WAIT));
                    ever.insert(block);
                }
                3 => drop(stack.remove(key(block), WAIT)),
                4 => gets.push((block, remote.get(key(block), Buffer::zeroed(ROOM), WAIT))),
                _ => gets.push((block, stack.get(key(block), Buffer::zeroed(ROOM), WAIT))),
            }
        }
        for (block, ticket) in gets {
            match ticket.wait() {
                Ok(fetched) => {
                    assert!(ever.contains(&block), "seed {seed}");
                    assert_eq!(fetched.as_slice(), content(block), "seed {seed}: block {block}");
                }
                Err(miss) => assert!(!matches!(miss, Miss::Closed), "seed {seed}"),
            }
        }
        for ticket in puts {
            assert_ne!(ticket.wait().err(), Some(Miss::Closed), "seed {seed}");
        }
    }
    until("all that waited is over", || remote.usage().put_bytes == 0);
    fake.stop();
    let wrong =
        |verb: &str, fault| verb == "GET" && matches!(fault, Fault::Flip | Fault::Short | Fault::Other);
    fake.count(wrong)
}

#[test]
fn histories_with_faults() {
    let mut wrong = 0;
    let histories = std::env::var("SHOAL_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    for seed in 0..histories {
        wrong += play(Protocol::S3, seed) + play(Protocol::Redis, seed);
    }
    println!("asked {wrong} times while objects were given wrong; none of them was served");
    assert!(wrong > 0);
}

#[test]
fn a_place_that_is_written_wrongly_is_refused() {
    let s3 = |address: &str, prefix: &str| match spec(Protocol::S3, address) {
        RemoteSpec::S3(spec) => RemoteSpec::S3(S3Spec { prefix: prefix.to_owned(), ..spec }),
        other => other,
    };
    for (spec, word) in [
        (s3("https://store.example", ""), "proxy"),
        (s3("store.example:80", "with space/"), "prefix"),
        (s3("", ""), "address"),
        (s3("store.example:80", "a/../b/"), "no names"),
        (s3("store.example:80", "/a/"), "no names"),
        (RemoteSpec::Directory("here".into()), "absolute"),
    ] {
        let error = RemoteTier::open(&spec, patient()).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
    let shown = format!("{:?} {:?}", spec(Protocol::S3, "a"), spec(Protocol::Redis, "a"));
    assert!(!shown.contains("a secret"), "{shown}");
}

/// A Redis or Valkey of this machine, on a port of its own.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_real_redis_serves_what_was_put() {
    let directory = tempfile::tempdir().unwrap();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let started = ["redis-server", "valkey-server"].into_iter().find_map(|program| {
        let mut command = Command::new(program);
        command.args(["--bind", "127.0.0.1", "--port", &address.port().to_string(), "--save", ""]);
        command.args(["--requirepass", "a secret", "--dir", directory.path().to_str().unwrap()]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()
    });
    let Some(server) = started else {
        println!("skipped: neither redis-server nor valkey-server is installed");
        return;
    };
    let _server = Server(server);
    let spec = spec(Protocol::Redis, &address.to_string());
    let tier = RemoteTier::open(&spec, patient()).unwrap();
    until("the server answers", || tier.look(key(99), WAIT).wait() == Ok(false));
    serves_what_was_put(&spec);
}

#[test]
fn a_real_object_store_serves_what_was_put() {
    // `SHOAL_S3=host:port/bucket/access-key/secret-key`, of a store that may be written to.
    let Ok(place) = std::env::var("SHOAL_S3") else {
        println!("skipped: SHOAL_S3 names no object store");
        return;
    };
    let [address, bucket, access_key, secret_key] =
        place.splitn(4, '/').map(str::to_owned).collect::<Vec<_>>().try_into().unwrap();
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    serves_what_was_put(&RemoteSpec::S3(S3Spec {
        address,
        bucket,
        prefix: format!("shoal-test-{}/", since.as_nanos()),
        region: "us-east-1".to_owned(),
        access_key,
        secret_key,
    }));
}
