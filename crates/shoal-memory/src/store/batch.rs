//! Many blocks at once, from and to memory that is not a tier's own.
//!
//! Apart because an engine that has its own table of blocks asks for a request's blocks together, and a disk gives its
//! speed only to those who ask for several at a time. As many are under way as fit into a number of bytes; all is done by
//! the caller's thread, and is over at the deadline (I10). A block that does not come is one block fewer, and no error of
//! the others.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;

use super::{Aligned, Buffer, Fetched, Miss, Offer, Store, StoreKey, Stored, Ticket};

/// Bounds of a batch.
#[derive(Clone, Copy, Debug)]
pub struct BatchOptions {
    /// Most bytes of blocks that are under way; one block is, whatever its length.
    pub bytes_max: ByteCount,
    /// How long all of it may take.
    pub deadline: Duration,
}

impl Default for BatchOptions {
    fn default() -> Self {
        Self { bytes_max: ByteCount::mib(32), deadline: Duration::from_secs(30) }
    }
}

/// What became of a block that was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// It is there now.
    Written,
    /// It was there.
    Already,
    /// The tier does not find it worth a write.
    Declined,
}

/// Gets blocks by name, each of so many bytes, and hands each to `take` with its place in `wanted` as soon as it is there
/// and verified; what lies in memory comes at once, where it lies.
///
/// Gives for each whether it was handed over. One of another length is not, and counts as damaged: under its name there is
/// something else.
pub fn get_all(
    store: &dyn Store,
    wanted: &[(StoreKey, usize)],
    options: BatchOptions,
    take: impl FnMut(usize, &[u8]),
) -> Vec<Result<(), Miss>> {
    let results = wanted.iter().map(|_| Err(Miss::Absent)).collect();
    let until = Instant::now() + options.deadline;
    let mut batch =
        Getting { wanted, take, results, under_way: VecDeque::new(), bytes: 0, spare: Vec::new() };
    for (at, (key, bytes)) in wanted.iter().enumerate() {
        if !store.contains(key) {
            continue;
        }
        if let Some(held) = store.hold(key) {
            batch.end(at, held.as_slice());
            continue;
        }
        while batch.bytes > 0 && batch.bytes + *bytes as u64 > options.bytes_max.0 {
            batch.wait();
        }
        let buffer = batch.buffer(*bytes);
        batch.bytes += *bytes as u64;
        let left = until.saturating_duration_since(Instant::now());
        batch.under_way.push_back((at, store.get(*key, buffer, left)));
    }
    while !batch.under_way.is_empty() {
        batch.wait();
    }
    batch.results
}

/// A batch that is being got.
struct Getting<'a, F> {
    wanted: &'a [(StoreKey, usize)],
    take: F,
    results: Vec<Result<(), Miss>>,
    under_way: VecDeque<(usize, Ticket<Fetched>)>,
    /// Of what is under way.
    bytes: u64,
    /// Memory that is used again.
    spare: Vec<Buffer>,
}

impl<F: FnMut(usize, &[u8])> Getting<'_, F> {
    /// Waits for what is under way for the longest time.
    fn wait(&mut self) {
        let Some((at, ticket)) = self.under_way.pop_front() else { return };
        self.bytes -= self.wanted[at].1 as u64;
        match ticket.wait() {
            Ok(fetched) => {
                self.end(at, fetched.as_slice());
                self.spare.push(fetched.buffer);
            }
            Err(miss) => self.results[at] = Err(miss),
        }
    }

    fn end(&mut self, at: usize, block: &[u8]) {
        self.results[at] = if block.len() == self.wanted[at].1 {
            (self.take)(at, block);
            Ok(())
        } else {
            Err(Miss::Corrupt)
        };
    }

    fn buffer(&mut self, bytes: usize) -> Buffer {
        match self.spare.iter().position(|buffer| buffer.as_slice().len() >= bytes) {
            Some(place) => self.spare.swap_remove(place),
            None => Buffer::zeroed(bytes),
        }
    }
}

/// Puts blocks that the tier lacks and finds worth it. Each is copied before this comes back, and gives for each what
/// became of it.
pub fn put_all(
    store: &dyn Store,
    blocks: &[(StoreKey, &[u8])],
    options: BatchOptions,
) -> Vec<Result<Offered, Miss>> {
    let until = Instant::now() + options.deadline;
    let mut results: Vec<Result<Offered, Miss>> = blocks.iter().map(|_| Ok(Offered::Already)).collect();
    let mut under_way: VecDeque<(usize, Ticket<Stored>)> = VecDeque::new();
    let mut bytes = 0;
    let mut wait = |under_way: &mut VecDeque<(usize, Ticket<Stored>)>, bytes: &mut u64| {
        let Some((at, ticket)) = under_way.pop_front() else { return };
        *bytes -= blocks[at].1.len() as u64;
        results[at] = ticket.wait().map(|stored| match stored {
            Stored::Written => Offered::Written,
            Stored::Already => Offered::Already,
        });
    };
    let mut declined = Vec::new();
    for (at, (key, block)) in blocks.iter().enumerate() {
        let length = block.len() as u64;
        if store.is_kept(key) {
            continue;
        }
        if !store.offer(key, &Offer { bytes: length, recompute_us: None }).is_admitted() {
            declined.push(at);
            continue;
        }
        while bytes > 0 && bytes + length > options.bytes_max.0 {
            wait(&mut under_way, &mut bytes);
        }
        let left = until.saturating_duration_since(Instant::now());
        bytes += length;
        let copy = Buffer::Own(Aligned::copy_of(block));
        under_way.push_back((at, store.put(*key, copy, block.len(), left)));
    }
    while !under_way.is_empty() {
        wait(&mut under_way, &mut bytes);
    }
    for at in declined {
        results[at] = Ok(Offered::Declined);
    }
    results
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{HostOptions, HostTier, Stack, StackOptions};
    use super::*;
    use crate::store::Fingerprint;
    use shoal_core::kv::prefix::BlockKey;

    fn key(number: u64) -> StoreKey {
        let facts = Fingerprint::of(&[("model", "a")]);
        StoreKey::new(facts, b"", &BlockKey::Engine(number.to_le_bytes().into()))
    }

    fn block(number: u64, bytes: usize) -> Vec<u8> {
        (0..bytes).map(|at| u8::try_from((number * 31 + at as u64 * 7) % 251).expect("below 251")).collect()
    }

    fn put(store: &dyn Store, numbers: std::ops::Range<u64>, bytes: usize) -> Vec<Result<Offered, Miss>> {
        let blocks: Vec<Vec<u8>> = numbers.clone().map(|number| block(number, bytes)).collect();
        let offered: Vec<(StoreKey, &[u8])> =
            numbers.map(key).zip(blocks.iter().map(Vec::as_slice)).collect();
        put_all(store, &offered, BatchOptions { bytes_max: ByteCount(3 * 5000), ..BatchOptions::default() })
    }

    /// Gets blocks and checks every byte; gives which came.
    fn get(store: &dyn Store, numbers: std::ops::Range<u64>, bytes: usize) -> Vec<Result<(), Miss>> {
        let wanted: Vec<(StoreKey, usize)> = numbers.clone().map(|number| (key(number), bytes)).collect();
        let mut found = vec![None; wanted.len()];
        let options = BatchOptions { bytes_max: ByteCount(3 * 5000), ..BatchOptions::default() };
        let results = get_all(store, &wanted, options, |at, block| {
            assert!(found[at].replace(block.to_vec()).is_none(), "handed over twice");
        });
        for ((number, found), result) in numbers.zip(found).zip(&results) {
            assert_eq!(found, result.as_ref().ok().map(|()| block(number, bytes)));
        }
        results
    }

    #[test]
    fn what_was_put_comes_back_and_what_was_not_is_a_miss() {
        let host = HostTier::new(HostOptions::new(ByteCount::mib(4)));
        assert!(put(&host, 0..20, 5000).iter().all(|one| *one == Ok(Offered::Written)));
        assert!(put(&host, 10..20, 5000).iter().all(|one| *one == Ok(Offered::Already)));
        let results = get(&host, 0..25, 5000);
        assert!(results[..20].iter().all(Result::is_ok));
        assert!(results[20..].iter().all(|one| *one == Err(Miss::Absent)));
        let shorter = get(&host, 0..1, 4999);
        assert_eq!(shorter, [Err(Miss::Corrupt)], "of another length");
    }

    #[test]
    fn what_has_to_be_copied_comes_by_the_window() {
        // A tier that cannot hold: each block is a request with memory of ours.
        let host = Arc::new(HostTier::new(HostOptions::new(ByteCount::mib(4))));
        let tiers: Vec<Arc<dyn Store>> = vec![Arc::new(NoHold(Arc::clone(&host)))];
        let stack = Stack::new(tiers, StackOptions::default()).expect("threads start");
        assert!(put(&stack, 0..40, 5000).iter().all(|one| *one == Ok(Offered::Written)));
        assert!(host.damage(&key(7), 1234));
        let results = get(&stack, 0..42, 5000);
        let missed: Vec<usize> = (0..42).filter(|at| results[*at].is_err()).collect();
        assert_eq!(missed, [7, 40, 41], "{results:?}");
    }

    #[test]
    fn what_is_not_worth_it_is_not_put() {
        let host = HostTier::new(HostOptions::new(ByteCount(8192)));
        assert_eq!(put(&host, 0..1, 9000), [Ok(Offered::Declined)]);
        assert_eq!(host.usage().blocks, 0);
    }

    #[derive(Debug)]
    struct NoHold(Arc<HostTier>);

    impl Store for NoHold {
        fn name(&self) -> &'static str {
            "no hold"
        }

        fn contains(&self, key: &StoreKey) -> bool {
            self.0.contains(key)
        }

        fn offer(&self, key: &StoreKey, offer: &Offer) -> super::super::Verdict {
            self.0.offer(key, offer)
        }

        fn put(&self, key: StoreKey, source: Buffer, bytes: usize, deadline: Duration) -> Ticket<Stored> {
            self.0.put(key, source, bytes, deadline)
        }

        fn get(&self, key: StoreKey, target: Buffer, deadline: Duration) -> Ticket<Fetched> {
            self.0.get(key, target, deadline)
        }

        fn remove(&self, key: StoreKey, deadline: Duration) -> Ticket<bool> {
            self.0.remove(key, deadline)
        }

        fn flush(&self, deadline: Duration) -> Ticket<()> {
            self.0.flush(deadline)
        }
    }
}
