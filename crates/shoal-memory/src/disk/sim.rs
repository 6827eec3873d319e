//! A disk in memory that fails on request, and that remembers what it should have held.
//!
//! Apart because faults are a medium like another: what is tested above it is what ships. Requests are done in a random
//! order, by a seed. Each fault has a rate; each is counted, and so is every read that gave other bytes than were last
//! written there, which is what a tier has to notice.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::medium::{Done, Means, Medium, Op, Verb, Waker};

/// What a disk writes at once or not at all.
const SECTOR: usize = 512;

/// How often what goes wrong, in thousandths of the requests that it can happen to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultRates {
    /// A read fails.
    pub read_error: u32,
    /// A read stops early.
    pub read_short: u32,
    /// A read gives a flipped bit.
    pub read_flip: u32,
    /// A write fails, having written some of its sectors.
    pub write_error: u32,
    /// A write stops early.
    pub write_short: u32,
    /// A write is acknowledged with only some of its sectors written.
    pub write_torn: u32,
    /// A write is acknowledged and lands elsewhere.
    pub write_astray: u32,
    /// A bit on the disk flips as a write is done nearby.
    pub write_flip: u32,
    /// A sync fails.
    pub sync_error: u32,
    /// A request is never done.
    pub hang: u32,
    /// The disk is full when the log grows.
    pub full: u32,
}

/// What went wrong so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts {
    /// Faults of any kind.
    pub injected: u64,
    /// Reads that were acknowledged with other bytes than should be there.
    pub damaged_reads: u64,
    /// Requests that will never be done.
    pub hung: u64,
}

struct Platter {
    bytes: Vec<u8>,
    /// What `bytes` would be if every acknowledged write were done as told.
    intended: Vec<u8>,
    /// What lay under writes that no sync followed yet.
    unsynced: Vec<(usize, Vec<u8>)>,
    capacity: usize,
    rates: FaultRates,
    counts: FaultCounts,
    random: u64,
    is_woken: bool,
}

impl Platter {
    fn next(&mut self) -> u64 {
        // splitmix64 (Steele, Lea and Flood, 2014).
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % (end.max(1) as u64)).unwrap_or(0)
    }

    fn happens(&mut self, rate: u32) -> bool {
        let happens = rate > 0 && self.next() % 1000 < u64::from(rate);
        self.counts.injected += u64::from(happens);
        happens
    }

    /// Writes a random part of the sectors.
    fn write_some(&mut self, offset: usize, bytes: &[u8]) {
        for (index, sector) in bytes.chunks(SECTOR).enumerate() {
            if self.next().is_multiple_of(2) {
                let at = offset + index * SECTOR;
                self.bytes[at..at + sector.len()].copy_from_slice(sector);
            }
        }
    }
}

/// The disk itself, which outlives whoever has it open.
#[derive(Clone)]
pub struct SimDisk {
    platter: Arc<Mutex<Platter>>,
    news: Arc<Condvar>,
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDisk").field("counts", &self.counts()).finish_non_exhaustive()
    }
}

impl SimDisk {
    /// An empty disk with room for `capacity` bytes.
    #[must_use]
    pub fn new(capacity: usize, seed: u64) -> Self {
        let platter = Platter {
            bytes: Vec::new(),
            intended: Vec::new(),
            unsynced: Vec::new(),
            capacity,
            rates: FaultRates::default(),
            counts: FaultCounts::default(),
            random: seed,
            is_woken: false,
        };
        Self { platter: Arc::new(Mutex::new(platter)), news: Arc::default() }
    }

    /// How often what goes wrong from now on.
    pub fn set_rates(&self, rates: FaultRates) {
        self.platter.lock().rates = rates;
    }

    /// What went wrong so far.
    #[must_use]
    pub fn counts(&self) -> FaultCounts {
        self.platter.lock().counts
    }

    /// Looks at the disk's bytes, or changes them behind everybody's back.
    pub fn with_bytes<R>(&self, change: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        change(&mut self.platter.lock().bytes)
    }

    /// The power fails: of what was written since the last sync, some sectors are as they were before. From now on what lies
    /// there is what should.
    pub fn cut_power(&self) {
        let mut platter = self.platter.lock();
        while let Some((offset, before)) = platter.unsynced.pop() {
            platter.write_some(offset, &before);
        }
        let now = platter.bytes.clone();
        platter.intended = now;
    }

    /// Opens it. What an earlier one had under way is done in part.
    #[must_use]
    pub fn open(&self, depth: usize) -> Box<dyn Medium> {
        let disk = self.clone();
        Box::new(SimMedium { disk, depth, in_flight: Vec::new(), hung: Vec::new() })
    }
}

#[derive(Debug)]
struct SimMedium {
    disk: SimDisk,
    depth: usize,
    in_flight: Vec<Op>,
    hung: Vec<Op>,
}

impl SimMedium {
    fn carry_out(platter: &mut Platter, op: Op) -> Done {
        let Op { token, verb, offset, mut buffer, bytes } = op;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(bytes);
        let result = match (verb, buffer.as_mut()) {
            (Verb::Sync, _) => {
                if platter.happens(platter.rates.sync_error) {
                    Err(io::Error::other("injected"))
                } else {
                    platter.unsynced.clear();
                    Ok(0)
                }
            }
            (Verb::Read, Some(buffer)) => match buffer.as_mut_slice() {
                Some(memory) => read(platter, start, &mut memory[..bytes]),
                None => Err(io::ErrorKind::InvalidInput.into()),
            },
            (Verb::Write, Some(buffer)) if end <= platter.bytes.len() => {
                write(platter, start, &buffer.as_slice()[..bytes])
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        };
        Done { token, result, buffer }
    }
}

fn read(platter: &mut Platter, start: usize, memory: &mut [u8]) -> io::Result<usize> {
    if platter.happens(platter.rates.read_error) {
        return Err(io::Error::other("injected"));
    }
    let mut bytes = memory.len().min(platter.bytes.len().saturating_sub(start));
    if platter.happens(platter.rates.read_short) {
        bytes = platter.below(bytes) / SECTOR * SECTOR;
    }
    memory[..bytes].copy_from_slice(&platter.bytes[start..start + bytes]);
    if bytes > 0 && platter.happens(platter.rates.read_flip) {
        let bit = platter.below(8 * bytes);
        memory[bit / 8] ^= 1 << (bit % 8);
    }
    if bytes == memory.len() && memory[..] != platter.intended[start..start + bytes] {
        platter.counts.damaged_reads += 1;
    }
    Ok(bytes)
}

fn write(platter: &mut Platter, start: usize, memory: &[u8]) -> io::Result<usize> {
    let end = start + memory.len();
    if platter.happens(platter.rates.write_error) {
        platter.write_some(start, memory);
        // Nobody was told that these are written, so nobody may rely on what lay there before either.
        platter.intended[start..end].copy_from_slice(memory);
        return Err(io::Error::other("injected"));
    }
    if platter.happens(platter.rates.write_short) {
        let bytes = platter.below(memory.len()) / SECTOR * SECTOR;
        platter.bytes[start..start + bytes].copy_from_slice(&memory[..bytes]);
        platter.intended[start..end].copy_from_slice(memory);
        return Ok(bytes);
    }
    let before = platter.bytes[start..end].to_vec();
    platter.unsynced.push((start, before));
    platter.intended[start..end].copy_from_slice(memory);
    if platter.happens(platter.rates.write_torn) {
        platter.write_some(start, memory);
    } else if platter.happens(platter.rates.write_astray) {
        let units = (platter.bytes.len() - memory.len()) / 4096;
        let at = platter.below(units + 1) * 4096;
        platter.bytes[at..at + memory.len()].copy_from_slice(memory);
    } else {
        platter.bytes[start..end].copy_from_slice(memory);
    }
    if platter.happens(platter.rates.write_flip) {
        let bit = platter.below(8 * platter.bytes.len());
        platter.bytes[bit / 8] ^= 1 << (bit % 8);
    }
    Ok(memory.len())
}

impl Medium for SimMedium {
    fn bytes(&mut self) -> io::Result<u64> {
        Ok(self.disk.platter.lock().bytes.len() as u64)
    }

    fn grow(&mut self, bytes: u64) -> io::Result<()> {
        let mut platter = self.disk.platter.lock();
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let rate = platter.rates.full;
        if bytes > platter.capacity || platter.happens(rate) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        platter.bytes.resize(bytes, 0);
        platter.intended.resize(bytes, 0);
        Ok(())
    }

    fn shrink(&mut self, bytes: u64) -> io::Result<()> {
        let mut platter = self.disk.platter.lock();
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        platter.bytes.truncate(bytes);
        platter.intended.truncate(bytes);
        Ok(())
    }

    fn submit(&mut self, op: Op) -> Result<(), Op> {
        if self.in_flight() >= self.depth {
            return Err(op);
        }
        let mut platter = self.disk.platter.lock();
        let rate = platter.rates.hang;
        if platter.happens(rate) {
            platter.counts.hung += 1;
            drop(platter);
            self.hung.push(op);
        } else {
            drop(platter);
            self.in_flight.push(op);
        }
        Ok(())
    }

    fn wait(&mut self, timeout: Duration) {
        let until = Instant::now() + timeout;
        let mut platter = self.disk.platter.lock();
        while self.in_flight.is_empty() && !platter.is_woken {
            if self.disk.news.wait_until(&mut platter, until).timed_out() {
                break;
            }
        }
        platter.is_woken = false;
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        let mut platter = self.disk.platter.lock();
        // Some of them, in any order, and at least one, so that whoever waits comes on.
        let count = if self.in_flight.is_empty() { 0 } else { 1 + platter.below(self.in_flight.len()) };
        for _ in 0..count {
            let index = platter.below(self.in_flight.len());
            let op = self.in_flight.swap_remove(index);
            done.push(Self::carry_out(&mut platter, op));
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight.len() + self.hung.len()
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn waker(&self) -> Waker {
        let disk = self.disk.clone();
        Arc::new(move || {
            disk.platter.lock().is_woken = true;
            disk.news.notify_one();
        })
    }

    fn means(&self) -> Means {
        Means { engine: "simulated", is_direct: true, reasons: Vec::new() }
    }
}

impl Drop for SimMedium {
    fn drop(&mut self) {
        // The process is gone; what was on its way is there in part.
        let mut platter = self.disk.platter.lock();
        for op in self.in_flight.drain(..).chain(self.hung.drain(..)).filter(|op| op.verb == Verb::Write) {
            let start = usize::try_from(op.offset).unwrap_or(usize::MAX);
            let bytes = op.buffer.as_ref().map(|buffer| &buffer.as_slice()[..op.bytes]).unwrap_or_default();
            if start.saturating_add(bytes.len()) <= platter.bytes.len() {
                platter.write_some(start, bytes);
                let range = start..start + bytes.len();
                let now = platter.bytes[range.clone()].to_vec();
                platter.intended[range].copy_from_slice(&now);
            }
        }
    }
}
