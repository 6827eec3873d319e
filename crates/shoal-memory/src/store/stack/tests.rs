//! Stacks of tiers that fail, hang and forget, against a plain map: what is served is what was put (I8), what was removed
//! is not served, every ticket is answered (I10), and nothing is left over.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use super::super::dice::{Random, key};
use super::super::{Aligned, HostOptions, HostTier, Promise};
use super::*;

const WAIT: Duration = Duration::from_mins(1);

fn content(block: u64) -> Vec<u8> {
    let length = 1 + usize::try_from(block * 977 % 8000).unwrap();
    (0..length).map(|at| u8::try_from((block * 31 + at as u64) % 251).unwrap()).collect()
}

fn source(block: u64) -> (Buffer, usize) {
    let bytes = content(block);
    (Buffer::Own(Aligned::copy_of(&bytes)), bytes.len())
}

fn ask(store: &dyn Store, block: u64) -> Result<Vec<u8>, Miss> {
    store.get(key(block), Buffer::zeroed(8192), WAIT).wait().map(|fetched| fetched.as_slice().to_vec())
}

fn keep(store: &dyn Store, block: u64) -> Result<Stored, Miss> {
    let (source, bytes) = source(block);
    store.put(key(block), source, bytes, WAIT).wait()
}

/// Waits for what threads do, for as long as it takes on a busy machine.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let by = Instant::now() + WAIT;
    while !is_so() {
        assert!(Instant::now() < by, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How often, of a hundred requests.
#[derive(Clone, Copy, Default)]
struct Faults {
    failed: u64,
    /// Answered as late, while memory is kept until [`Odd::let_go`].
    hangs: u64,
    refuses: u64,
}

type Work = Box<dyn FnOnce() + Send>;

/// A tier in memory that answers from threads of its own, in any order, and errs.
struct Odd {
    name: &'static str,
    blocks: Arc<Mutex<HashMap<StoreKey, Vec<u8>>>>,
    faults: Faults,
    random: Mutex<Random>,
    hung: Mutex<Vec<Buffer>>,
    /// While it is held, nothing is answered.
    gate: Arc<Mutex<()>>,
    gets: Mutex<usize>,
    crew: Crew<Work>,
}

impl std::fmt::Debug for Odd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Odd").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Odd {
    fn new(name: &'static str, seed: u64, faults: Faults) -> Arc<Self> {
        Arc::new(Self {
            name,
            blocks: Arc::default(),
            faults,
            random: Mutex::new(Random(seed | 1)),
            hung: Mutex::default(),
            gate: Arc::default(),
            gets: Mutex::default(),
            crew: Crew::start("odd", 2, usize::MAX, |_| |work: Work| work()).unwrap(),
        })
    }

    fn sound(name: &'static str) -> Arc<Self> {
        Self::new(name, 1, Faults::default())
    }

    fn has(&self, block: u64) -> bool {
        self.contains(&key(block))
    }

    fn give(&self, block: u64) {
        self.blocks.lock().insert(key(block), content(block));
    }

    fn let_go(&self) {
        self.hung.lock().clear();
    }

    fn chance(&self, percent: u64) -> bool {
        self.random.lock().below(100) < percent
    }

    fn later<T: Send + 'static>(
        &self,
        promise: Promise<T>,
        work: impl FnOnce() -> Result<T, Miss> + Send + 'static,
    ) {
        let gate = Arc::clone(&self.gate);
        self.crew.desk().go_on(Box::new(move || {
            drop(gate.lock());
            let answer = work();
            promise.answer(answer);
        }));
    }
}

fn failed() -> Miss {
    Miss::Failed { doing: "a test", reason: "it says so".to_owned() }
}

impl Store for Odd {
    fn name(&self) -> &str {
        self.name
    }

    fn contains(&self, key: &StoreKey) -> bool {
        self.blocks.lock().contains_key(key)
    }

    fn offer(&self, _key: &StoreKey, offer: &Offer) -> Verdict {
        if self.chance(self.faults.refuses) {
            Verdict::WornOut { bytes: offer.bytes, writable_bytes: 0 }
        } else {
            Verdict::Admit
        }
    }

    fn put(&self, key: StoreKey, source: Buffer, bytes: usize, deadline: Duration) -> Ticket<Stored> {
        let (ticket, promise) = Ticket::new(deadline);
        if self.chance(self.faults.failed) {
            drop(source);
            promise.answer(Err(failed()));
            return ticket;
        }
        // In the order of requests, as a queue would.
        let had = self.blocks.lock().insert(key, source.as_slice()[..bytes].to_vec());
        self.later(promise, move || {
            drop(source);
            Ok(if had.is_some() { Stored::Already } else { Stored::Written })
        });
        ticket
    }

    fn get(&self, key: StoreKey, target: Buffer, deadline: Duration) -> Ticket<Fetched> {
        let (ticket, promise) = Ticket::new(deadline);
        *self.gets.lock() += 1;
        if self.chance(self.faults.hangs) {
            self.hung.lock().push(target);
            self.later(promise, || Err(Miss::Deadline));
            return ticket;
        }
        let is_failed = self.chance(self.faults.failed);
        let blocks = Arc::clone(&self.blocks);
        self.later(promise, move || {
            let mut target = target;
            let block = blocks.lock().get(&key).cloned().ok_or(Miss::Absent)?;
            let memory = target.as_mut_slice().unwrap();
            let room = memory.len() as u64;
            if is_failed {
                // What was half read is in there.
                memory.fill(0xee);
                return Err(failed());
            }
            let place = memory.get_mut(..block.len());
            let place = place.ok_or(Miss::TooLong { bytes: block.len() as u64, bytes_max: room })?;
            place.copy_from_slice(&block);
            Ok(Fetched { buffer: target, bytes: block.len() })
        });
        ticket
    }

    fn remove(&self, key: StoreKey, deadline: Duration) -> Ticket<bool> {
        let (ticket, promise) = Ticket::new(deadline);
        let had = self.blocks.lock().remove(&key).is_some();
        self.later(promise, move || Ok(had));
        ticket
    }

    fn flush(&self, deadline: Duration) -> Ticket<()> {
        let (ticket, promise) = Ticket::new(deadline);
        let is_failed = self.chance(self.faults.failed);
        self.later(promise, move || if is_failed { Err(failed()) } else { Ok(()) });
        ticket
    }
}

fn stack(tiers: &[Arc<dyn Store>]) -> Stack {
    Stack::new(tiers.to_vec(), StackOptions::default()).unwrap()
}

/// Nothing waits and nothing is counted any more.
fn is_idle(stack: &Stack) -> bool {
    let state = stack.shared.state.lock();
    state.flights.is_empty() && state.waiting == 0 && state.copy_bytes == 0 && state.coming.is_empty()
}

/// One driver, many tickets at a time.
fn play(seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let faults = |random: &mut Random| Faults {
        failed: [0, 10, 60][usize::try_from(random.below(3)).unwrap()],
        hangs: [0, 0, 5][usize::try_from(random.below(3)).unwrap()],
        refuses: [0, 50][usize::try_from(random.below(2)).unwrap()],
    };
    let odd =
        [("disk", 1), ("remote", 2)].map(|(name, more)| Odd::new(name, seed + more, faults(&mut random)));
    let host = Arc::new(HostTier::new(HostOptions::new(ByteCount(40 << 10))));
    let mut tiers: Vec<Arc<dyn Store>> = odd.iter().map(|tier| Arc::clone(tier) as Arc<dyn Store>).collect();
    if random.below(2) == 0 {
        tiers.insert(0, Arc::clone(&host) as Arc<dyn Store>);
    }
    let options =
        StackOptions { copy_bytes_max: ByteCount(20 << 10), requests_max: 40, ..StackOptions::default() };
    let stack = Stack::new(tiers, options).unwrap();
    let mut ever: HashSet<u64> = HashSet::new();
    // Removed, and not put since.
    let mut gone: HashSet<u64> = HashSet::new();
    for _ in 0..20 {
        let mut gets = Vec::new();
        let (mut puts, mut removals) = (Vec::new(), Vec::new());
        for _ in 0..random.below(30) {
            let block = random.below(12);
            match random.below(10) {
                0..4 => {
                    // While it may come back, nothing can be said.
                    if random.below(2) == 0 {
                        let (bytes, recompute_us) = (content(block).len() as u64, None);
                        let _ = stack.offer(&key(block), &Offer { bytes, recompute_us });
                    }
                    let (source, bytes) = source(block);
                    puts.push(stack.put(key(block), source, bytes, WAIT));
                    ever.insert(block);
                    gone.remove(&block);
                }
                4 => {
                    removals.push(stack.remove(key(block), WAIT));
                    gone.insert(block);
                }
                _ => {
                    let room = if random.below(8) == 0 { 4096 } else { 8192 };
                    let ticket = stack.get(key(block), Buffer::zeroed(room), WAIT);
                    if random.below(10) == 0 {
                        ticket.cancel();
                    }
                    gets.push((block, gone.contains(&block), ticket));
                }
            }
        }
        for (block, is_gone, ticket) in gets {
            match ticket.wait() {
                Ok(fetched) => {
                    assert!(
                        ever.contains(&block) && !is_gone,
                        "seed {seed}: {block} was removed, and served"
                    );
                    assert_eq!(fetched.as_slice(), content(block), "seed {seed}");
                    assert!(
                        matches!(fetched.buffer, Buffer::Own(_)),
                        "seed {seed}: the memory that was given"
                    );
                }
                Err(miss) => assert_ne!(miss, Miss::Closed, "seed {seed}"),
            }
        }
        for ticket in puts {
            assert_ne!(ticket.wait().err(), Some(Miss::Closed), "seed {seed}");
        }
        for ticket in removals {
            ticket.wait().unwrap();
        }
        until("everything ends", || is_idle(&stack));
        for block in &gone {
            assert_eq!(ask(&stack, *block), Err(Miss::Absent), "seed {seed}: {block} came back");
        }
        let _ = stack.flush(WAIT).wait();
        for tier in &odd {
            tier.let_go();
        }
    }
}

#[test]
fn histories_with_faults() {
    for seed in 0..80 {
        play(seed);
    }
}

#[test]
fn several_who_want_one_block_share_a_transfer() {
    let disk = Odd::sound("disk");
    disk.give(1);
    let stack = stack(&[Arc::clone(&disk) as _]);
    let gate = Arc::clone(&disk.gate);
    let closed = gate.lock();
    let tickets: Vec<_> = (0..8).map(|_| stack.get(key(1), Buffer::zeroed(8192), WAIT)).collect();
    drop(closed);
    for ticket in tickets {
        assert_eq!(ticket.wait().unwrap().as_slice(), content(1));
    }
    assert_eq!(*disk.gets.lock(), 1);
    let counts = stack.counts();
    assert_eq!((counts.shared, counts.tiers[0].hits, counts.misses), (7, 1, 0));
    until("nothing is left", || is_idle(&stack));
}

#[test]
fn who_leads_and_gives_up_takes_nobody_with_it() {
    let disk = Odd::sound("disk");
    disk.give(5);
    let stack = stack(&[Arc::clone(&disk) as _]);
    let gate = Arc::clone(&disk.gate);
    let closed = gate.lock();
    // Block 5 is longer than a page.
    let short = stack.get(key(5), Buffer::zeroed(4096), WAIT);
    until("the first one leads", || *disk.gets.lock() == 1);
    let late = stack.get(key(5), Buffer::zeroed(8192), Duration::ZERO);
    let good = stack.get(key(5), Buffer::zeroed(8192), WAIT);
    drop(closed);
    assert_eq!(short.wait().unwrap_err(), Miss::TooLong { bytes: 4886, bytes_max: 4096 });
    assert_eq!(late.wait().unwrap_err(), Miss::Deadline);
    assert_eq!(good.wait().unwrap().as_slice(), content(5));
    until("nothing is left", || is_idle(&stack));
}

#[test]
fn a_tier_that_fails_costs_only_what_it_alone_had() {
    let broken = Odd::new("disk", 1, Faults { failed: 100, ..Faults::default() });
    let remote = Odd::sound("remote");
    for block in 0..20 {
        broken.give(block);
        if block % 2 == 0 {
            remote.give(block);
        }
    }
    let stack = stack(&[Arc::clone(&broken) as _, Arc::clone(&remote) as _]);
    for block in 0..20 {
        let target = Buffer::zeroed(8192);
        let address = target.as_slice().as_ptr();
        let answer = stack.get(key(block), target, WAIT).wait();
        if block % 2 == 0 {
            let fetched = answer.unwrap();
            assert_eq!(fetched.as_slice(), content(block));
            assert_eq!(fetched.as_slice().as_ptr(), address, "to the memory that was given");
        } else {
            assert_eq!(answer.unwrap_err(), failed());
        }
    }
    let counts = stack.counts();
    assert_eq!((counts.tiers[0].missed, counts.tiers[1].hits, counts.misses), (20, 10, 10));
}

#[test]
fn what_a_slow_tier_gives_comes_up() {
    let host = Arc::new(HostTier::new(HostOptions::new(ByteCount::mib(1))));
    let (disk, remote) =
        (Odd::new("disk", 1, Faults { refuses: 100, ..Faults::default() }), Odd::sound("remote"));
    remote.give(7);
    let stack = stack(&[Arc::clone(&host) as _, Arc::clone(&disk) as _, Arc::clone(&remote) as _]);
    assert_eq!(ask(&stack, 7), Ok(content(7)));
    assert!(host.contains(&key(7)), "it was there before the answer was");
    assert!(!disk.has(7), "it was not worth a write");
    assert_eq!(ask(&stack, 7), Ok(content(7)));
    assert_eq!(*remote.gets.lock(), 1);
    let counts = stack.counts();
    assert_eq!((counts.tiers[0].hits, counts.tiers[0].promoted, counts.tiers[2].hits), (1, 1, 1));
    assert_eq!(stack.hold(&key(7)).unwrap().as_slice(), content(7));
}

#[test]
fn a_put_goes_to_the_tiers_that_admitted_it() {
    let (fast, picky, slow) = (
        Odd::sound("host"),
        Odd::new("disk", 1, Faults { refuses: 100, ..Faults::default() }),
        Odd::sound("remote"),
    );
    let stack = stack(&[Arc::clone(&fast) as _, Arc::clone(&picky) as _, Arc::clone(&slow) as _]);
    let offer = Offer { bytes: 100, recompute_us: None };
    assert!(stack.offer(&key(1), &offer).is_admitted());
    assert_eq!(keep(&stack, 1), Ok(Stored::Written));
    // The others go on after the first one has it.
    until("both have it", || fast.has(1) && slow.has(1) && is_idle(&stack));
    assert!(!picky.has(1));
    assert_eq!(keep(&stack, 2), Ok(Stored::Written));
    until("nobody asked whether it is worth it", || fast.has(2) && picky.has(2) && slow.has(2));
    assert_eq!(keep(&stack, 2), Ok(Stored::Already));

    let refusing = stack_of_refusals();
    assert!(!refusing.offer(&key(3), &offer).is_admitted());
    assert!(matches!(keep(&refusing, 3), Err(Miss::NoRoom { .. })));
    assert_eq!(stack.remove(key(2), WAIT).wait(), Ok(true));
    assert_eq!(ask(&stack, 2), Err(Miss::Absent));
    assert_eq!(stack.flush(WAIT).wait(), Ok(()));
}

/// What only memory has is offered again, to the disk alone; what the disk has is not copied down once more.
#[test]
fn what_the_slowest_tier_lacks_is_not_kept() {
    let (host, disk) = (Odd::sound("host"), Odd::sound("disk"));
    let both = stack(&[Arc::clone(&host) as _, Arc::clone(&disk) as _]);
    let offer = Offer { bytes: 100, recompute_us: None };
    host.give(1);
    assert!(both.contains(&key(1)) && !both.is_kept(&key(1)));
    assert!(both.offer(&key(1), &offer).is_admitted());
    assert_eq!(keep(&both, 1), Ok(Stored::Written));
    until("the disk has it", || disk.has(1) && is_idle(&both));
    assert!(both.is_kept(&key(1)));
    let counts = both.counts().tiers;
    assert_eq!((counts[0].written, counts[1].written), (0, 1), "memory is given nothing that it has");
    assert_eq!(counts[1].written_bytes, content(1).len() as u64);
    assert_eq!(ask(&both, 1), Ok(content(1)));
    assert_eq!(both.counts().tiers[0].hit_bytes, content(1).len() as u64);

    let picky = Odd::new("disk", 1, Faults { refuses: 100, ..Faults::default() });
    let host = Odd::sound("host");
    let other = stack(&[Arc::clone(&host) as _, picky as _]);
    assert!(other.offer(&key(2), &offer).is_admitted());
    host.give(2);
    assert!(!other.offer(&key(2), &offer).is_admitted(), "memory has it, and the disk does not want it");
    let declined: Vec<u64> = other.counts().tiers.iter().map(|tier| tier.declined).collect();
    assert_eq!(declined, [0, 2]);
}

fn stack_of_refusals() -> Stack {
    stack(&[Odd::new("disk", 1, Faults { refuses: 100, ..Faults::default() }) as _])
}

#[test]
fn a_stack_of_none_has_nothing_and_one_that_is_gone_answers() {
    let none = stack(&[]);
    assert_eq!(ask(&none, 1), Err(Miss::Absent));
    assert!(matches!(keep(&none, 1), Err(Miss::NoRoom { .. })));
    assert_eq!(none.remove(key(1), WAIT).wait(), Ok(false));
    assert_eq!(none.flush(WAIT).wait(), Ok(()));

    let disk = Odd::sound("disk");
    disk.give(1);
    let stack = stack(&[Arc::clone(&disk) as _]);
    let gate = Arc::clone(&disk.gate);
    let closed = gate.lock();
    let ticket = stack.get(key(1), Buffer::zeroed(8192), WAIT);
    until("it is asked for", || *disk.gets.lock() == 1);
    drop(stack);
    drop(closed);
    assert_eq!(ticket.wait().unwrap_err(), Miss::Closed);
}

#[test]
fn more_than_may_wait_is_refused() {
    let disk = Odd::sound("disk");
    (0..4).for_each(|block| disk.give(block));
    let options = StackOptions { requests_max: 2, ..StackOptions::default() };
    let stack = Stack::new(vec![Arc::clone(&disk) as _], options).unwrap();
    let gate = Arc::clone(&disk.gate);
    let closed = gate.lock();
    let waiting: Vec<_> = (0..2).map(|block| stack.get(key(block), Buffer::zeroed(8192), WAIT)).collect();
    let refused = stack.get(key(3), Buffer::zeroed(8192), WAIT).wait();
    assert_eq!(refused.unwrap_err(), Miss::Busy { waiting: 2 });
    drop(closed);
    assert!(waiting.into_iter().all(|ticket| ticket.wait().is_ok()));
    assert_eq!(stack.counts().refused, 1);
}
