//! Several tiers as one: looked through from the fastest to the slowest.
//!
//! Apart because whoever demotes and restores blocks should know of one store. Who asks for a block that is on its way
//! already waits for that transfer instead of beginning another. What a slow tier gives is put into the faster ones that
//! say it is worth it. A tier that fails costs only what it alone had: the next one is asked, with the memory that came
//! back. A [`Store::put`] goes to the tiers that admitted the block when it was last offered, to all if it was not.
//!
//! | file | subject |
//! |---|---|
//! | `mod` | the store that callers see |
//! | `fetch` | one block on its way up, and all who wait for it |
//! | `keep` | one block on its way down, to several tiers |

mod fetch;
mod keep;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_device::HostBuffer;

use self::fetch::{Arrival, Asker, Flight};
use self::keep::{Coming, PutJob};
use super::crew::{Crew, Desk};
use super::ticket::gather;
use super::{Buffer, Fetched, Held, Lent, Miss, Offer, Store, StoreKey, Stored, Ticket, Verdict};

/// How long a stack that is dropped waits for its threads, which only copy.
const DROP_WAIT: Duration = Duration::from_secs(5);
/// Verdicts remembered between an offer and its put.
const VERDICTS_MAX: usize = 1 << 16;

/// Blocks of which is asked at a time which tier has them.
const LOOKED_UP_AT_ONCE: usize = 256;

/// Bounds of a stack.
#[derive(Clone, Copy, Debug)]
pub struct StackOptions {
    /// Threads that copy.
    pub threads: usize,
    /// Most requests that wait, those for one block counted one by one.
    pub requests_max: usize,
    /// Most bytes of copies that are on their way to several tiers.
    pub copy_bytes_max: ByteCount,
    /// How long a copy to a faster tier may take.
    pub promote_deadline: Duration,
}

impl Default for StackOptions {
    fn default() -> Self {
        Self {
            threads: 2,
            requests_max: 4096,
            copy_bytes_max: ByteCount::mib(256),
            promote_deadline: Duration::from_secs(30),
        }
    }
}

/// What one tier did for a stack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TierCounts {
    /// The tier.
    pub name: String,
    /// Blocks it served, once for each transfer.
    pub hits: u64,
    /// Blocks it said it had and did not serve.
    pub missed: u64,
    /// Blocks it was given.
    pub written: u64,
    /// Of those, blocks that a slower tier had served.
    pub promoted: u64,
    /// Blocks it did not take.
    pub refused: u64,
    /// Blocks that were offered to it and that it did not want.
    pub declined: u64,
    /// Bytes of blocks it served.
    pub hit_bytes: u64,
    /// Bytes of blocks it was given.
    pub written_bytes: u64,
}

/// A stack's figures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StackCounts {
    /// The tiers, fastest first.
    pub tiers: Vec<TierCounts>,
    /// Requests that no tier served.
    pub misses: u64,
    /// Requests that waited for somebody else's transfer.
    pub shared: u64,
    /// Requests that were refused because too many waited.
    pub refused: u64,
    /// Copies that were not made because too many were under way.
    pub copies_refused: u64,
}

#[derive(Default)]
struct State {
    flights: HashMap<StoreKey, Flight>,
    /// Requests of all flights.
    waiting: usize,
    /// Puts that have not reached the tiers.
    coming: HashMap<StoreKey, Coming>,
    put_next: u64,
    /// Bytes of copies on their way.
    copy_bytes: u64,
    /// Which tiers admitted a block, by bits; the oldest first.
    verdicts: HashMap<StoreKey, u64>,
    order: VecDeque<StoreKey>,
    counts: StackCounts,
}

impl State {
    fn remember(&mut self, key: StoreKey, admitted: u64) {
        if self.verdicts.insert(key, admitted).is_none() {
            self.order.push_back(key);
        }
        // What was put meanwhile is in the order still; it goes when its turn comes.
        while self.order.len() > VERDICTS_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.verdicts.remove(&oldest);
            }
        }
    }
}

/// What the threads do.
enum Job {
    Begin { key: StoreKey, asker: Asker },
    Arrived(Arrival),
    Put(PutJob),
}

struct Shared {
    tiers: Vec<Arc<dyn Store>>,
    options: StackOptions,
    /// Apart from the tiers: answers that come late hold it, and must not hold those.
    state: Arc<Mutex<State>>,
}

impl Shared {
    /// The fastest tier that has each block. Each tier is asked once, for those that no faster one has.
    fn parts_of(&self, keys: &[StoreKey]) -> Vec<Option<usize>> {
        let mut parts = vec![None; keys.len()];
        let mut lacking: Vec<usize> = (0..keys.len()).collect();
        for (part, tier) in self.tiers.iter().enumerate() {
            if lacking.is_empty() {
                break;
            }
            let asked: Vec<StoreKey> = lacking.iter().map(|at| keys[*at]).collect();
            let mut found = tier.contains_each(&asked).into_iter();
            lacking.retain(|at| {
                let is_there = found.next().unwrap_or(false);
                if is_there {
                    parts[*at] = Some(part);
                }
                !is_there
            });
        }
        parts
    }
}

/// See the module.
pub struct Stack {
    shared: Arc<Shared>,
    crew: Crew<Job>,
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack").field("tiers", &self.shared.tiers).finish_non_exhaustive()
    }
}

impl Drop for Stack {
    /// Lets go of the tiers: what is under way in them goes on, and is answered as closed.
    fn drop(&mut self) {
        if !self.crew.close(DROP_WAIT) {
            tracing::warn!("a stack of tiers did not end in time; its tiers are held a while longer");
        }
    }
}

impl Stack {
    /// Of these tiers, the fastest first; at most 64.
    ///
    /// # Errors
    /// No thread could be started, or there are more tiers than that.
    pub fn new(tiers: Vec<Arc<dyn Store>>, options: StackOptions) -> io::Result<Self> {
        if tiers.len() > 64 {
            let reason = format!("{} tiers, and at most 64 make a stack", tiers.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        let named =
            |tier: &Arc<dyn Store>| TierCounts { name: tier.name().to_owned(), ..TierCounts::default() };
        let counts = StackCounts { tiers: tiers.iter().map(named).collect(), ..StackCounts::default() };
        let state = Arc::new(Mutex::new(State { counts, ..State::default() }));
        let shared = Arc::new(Shared { tiers, options, state });
        let crew = Crew::start("shoal-tiers", options.threads, options.requests_max, |desk: Desk<Job>| {
            let shared = Arc::clone(&shared);
            move |job| match job {
                Job::Begin { key, asker } => shared.begin(&desk, key, asker),
                Job::Arrived(arrival) => shared.arrived(&desk, arrival),
                Job::Put(put) => shared.keep(put),
            }
        })?;
        Ok(Self { shared, crew })
    }

    /// The tiers, fastest first.
    #[must_use]
    pub fn tiers(&self) -> &[Arc<dyn Store>] {
        &self.shared.tiers
    }

    /// What it did.
    #[must_use]
    pub fn counts(&self) -> StackCounts {
        self.shared.state.lock().counts.clone()
    }
}

impl Store for Stack {
    fn name(&self) -> &'static str {
        "tiers"
    }

    fn contains(&self, key: &StoreKey) -> bool {
        self.shared.tiers.iter().any(|tier| tier.contains(key))
    }

    /// By the slowest tier: what only faster ones have is lost with this process.
    fn is_kept(&self, key: &StoreKey) -> bool {
        self.shared.tiers.last().is_some_and(|tier| tier.is_kept(key))
    }

    fn would_rise(&self, key: &StoreKey) -> bool {
        let Some((fastest, slower)) = self.shared.tiers.split_first() else { return false };
        !fastest.contains(key) && slower.iter().any(|tier| tier.contains(key))
    }

    fn parts(&self) -> Vec<String> {
        self.shared.tiers.iter().map(|tier| tier.name().to_owned()).collect()
    }

    fn part_of(&self, key: &StoreKey) -> Option<usize> {
        self.shared.tiers.iter().position(|tier| tier.contains(key))
    }

    fn contains_each(&self, keys: &[StoreKey]) -> Vec<bool> {
        self.shared.parts_of(keys).iter().map(Option::is_some).collect()
    }

    /// A few blocks at a time: a tier may look for what it does not know, and what comes after a gap is of no use.
    fn parts_of(&self, keys: &[StoreKey]) -> Vec<usize> {
        let mut parts = Vec::with_capacity(keys.len());
        for some in keys.chunks(LOOKED_UP_AT_ONCE) {
            let before = parts.len();
            parts.extend(self.shared.parts_of(some).into_iter().map_while(|part| part));
            if parts.len() < before + some.len() {
                break;
            }
        }
        parts
    }

    fn must_look(&self) -> bool {
        self.shared.tiers.iter().any(|tier| tier.must_look())
    }

    /// Of each tier that must look, from the first block on that no faster one has.
    fn look_for(&self, keys: &[StoreKey], deadline: Duration) {
        let until = Instant::now() + deadline;
        for (part, tier) in self.shared.tiers.iter().enumerate().filter(|(_, tier)| tier.must_look()) {
            let faster = &self.shared.tiers[..part];
            let is_lacking = |key: &StoreKey| !faster.iter().any(|tier| tier.contains(key));
            let Some(first) = keys.iter().position(is_lacking) else { continue };
            tier.look_for(&keys[first..], until.saturating_duration_since(Instant::now()));
        }
    }

    fn queued_bytes(&self, part: usize) -> u64 {
        self.shared.tiers.get(part).map_or(0, |tier| {
            let parts = tier.parts().len();
            (0..parts).map(|part| tier.queued_bytes(part)).fold(0, u64::saturating_add)
        })
    }

    /// Offered to every tier that lacks it. Admitted if one of them admits it; else the answer of the slowest.
    fn offer(&self, key: &StoreKey, offer: &Offer) -> Verdict {
        let mut admitted = 0;
        let mut declined = 0;
        let mut answer = Verdict::WornOut { bytes: offer.bytes, writable_bytes: 0 };
        for (index, tier) in self.shared.tiers.iter().enumerate().filter(|(_, tier)| !tier.contains(key)) {
            let verdict = tier.offer(key, offer);
            let bit = 1 << index;
            if verdict.is_admitted() {
                admitted |= bit;
            } else {
                declined |= bit;
            }
            answer = verdict;
        }
        let mut state = self.shared.state.lock();
        for (index, counts) in state.counts.tiers.iter_mut().enumerate() {
            counts.declined += declined >> index & 1;
        }
        state.remember(*key, admitted);
        drop(state);
        if admitted == 0 { answer } else { Verdict::Admit }
    }

    /// Done as soon as one tier has it; the others go on.
    fn put(&self, key: StoreKey, source: Buffer, bytes: usize, deadline: Duration) -> Ticket<Stored> {
        let room = source.as_slice().len();
        if bytes == 0 || bytes > room {
            return Ticket::ready(Err(Miss::TooLong { bytes: bytes as u64, bytes_max: room as u64 }));
        }
        let (ticket, promise) = Ticket::new(deadline);
        let mut state = self.shared.state.lock();
        let admitted = state.verdicts.remove(&key).unwrap_or(u64::MAX);
        let number = state.begin_put(key);
        drop(state);
        let job = Job::Put(PutJob { key, source, bytes, admitted, number, promise });
        if let Err((Job::Put(put), waiting)) = self.crew.desk().ask(job) {
            let mut state = self.shared.state.lock();
            state.counts.refused += 1;
            state.end_put(&key);
            drop(state);
            put.refuse(Miss::Busy { waiting });
        }
        ticket
    }

    fn get(&self, key: StoreKey, target: Buffer, deadline: Duration) -> Ticket<Fetched> {
        let (ticket, promise) = Ticket::new(deadline);
        let asker = Asker { target, promise };
        let is_anywhere = self.contains(&key);
        let mut state = self.shared.state.lock();
        let is_removed =
            state.flights.get(&key).is_some_and(|flight| flight.is_removed) || state.is_going(&key);
        if !is_anywhere || is_removed {
            state.counts.misses += 1;
            drop(state);
            asker.refuse(Miss::Absent);
            return ticket;
        }
        if state.waiting >= self.shared.options.requests_max {
            let waiting = state.waiting;
            state.counts.refused += 1;
            drop(state);
            asker.refuse(Miss::Busy { waiting });
            return ticket;
        }
        state.waiting += 1;
        if let Some(flight) = state.flights.get_mut(&key) {
            flight.waiting.push_back(asker);
            state.counts.shared += 1;
            return ticket;
        }
        state.flights.insert(key, Flight::default());
        drop(state);
        // Bounded by what waits.
        self.crew.desk().go_on(Job::Begin { key, asker });
        ticket
    }

    fn hold(&self, key: &StoreKey) -> Option<Held> {
        self.shared.tiers.iter().find_map(|tier| tier.hold(key))
    }

    /// Of the fastest tier that has the block.
    fn lend(&self, key: &StoreKey) -> Option<Lent<'_>> {
        let mut tiers = self.shared.tiers.iter().enumerate();
        let (index, tier) = tiers.find(|(_, tier)| tier.contains(key))?;
        Some(tier.lend(key)?.counted(move |bytes| self.shared.count_hit(index, bytes)))
    }

    /// Of what the fastest tier does not lend, each by itself: no other tier is in memory, mostly.
    fn lend_each(&self, keys: &[StoreKey]) -> Vec<Option<Lent<'_>>> {
        let Some(fastest) = self.shared.tiers.first() else { return keys.iter().map(|_| None).collect() };
        let lent = fastest.lend_each(keys).into_iter().zip(keys);
        lent.map(|(lent, key)| match lent {
            Some(lent) => Some(lent.counted(move |bytes| self.shared.count_hit(0, bytes))),
            None => self.lend(key),
        })
        .collect()
    }

    fn is_own(&self, memory: &HostBuffer) -> bool {
        self.shared.tiers.iter().any(|tier| tier.is_own(memory))
    }

    /// Of the fastest tier that has such.
    fn room(&self, bytes: usize) -> Option<Arc<HostBuffer>> {
        self.shared.tiers.iter().find_map(|tier| tier.room(bytes))
    }

    /// From every tier. An error of one is the answer, because it may serve the block later.
    fn remove(&self, key: StoreKey, deadline: Duration) -> Ticket<bool> {
        let (ticket, promise) = Ticket::new(deadline);
        let mut state = self.shared.state.lock();
        state.verdicts.remove(&key);
        state.remove_coming(&key);
        if let Some(flight) = state.flights.get_mut(&key) {
            flight.is_removed = true;
        }
        drop(state);
        let asked = self.shared.tiers.iter().map(|tier| tier.remove(key, deadline)).collect();
        gather(asked, promise, |found| found.into_iter().any(|found| found));
        ticket
    }

    fn flush(&self, deadline: Duration) -> Ticket<()> {
        let (ticket, promise) = Ticket::new(deadline);
        let asked = self.shared.tiers.iter().map(|tier| tier.flush(deadline)).collect();
        gather(asked, promise, |_| ());
        ticket
    }
}
