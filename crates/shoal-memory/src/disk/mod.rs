//! The disk tier: blocks that outlive the process, on one disk or several.
//!
//! Apart because it is the one tier with a format, and the one whose medium lies: short reads, torn writes, flipped bits,
//! disks that hang or fill. What it serves is what was put, or nothing (I8). docs/tiers.md tells how it is used and what the
//! format is; shoal-core (`store`) decides what goes where.
//!
//! | module | subject |
//! |---|---|
//! | `directory` | whose a directory is, of which version |
//! | `recover` | what a log holds, read at start |
//! | `seal` | checksums, and encryption at rest |
//! | `worker` | one disk at work |
//! | `queue` | what callers and a disk's thread share |
//! | `medium`, `ring`, `threads`, `file` | how requests reach a disk |
//! | `sim` | a disk in memory that fails on request |
//!
//! A disk has one thread, which alone touches its medium. Callers put requests in its queue and wait on tickets. A disk
//! that fails too often, or cannot be opened, is set aside with its reason and tried again later; the others go on.

pub(crate) mod directory;
mod error;
mod file;
mod medium;
mod options;
mod queue;
mod recover;
mod ring;
mod seal;
mod sim;
mod threads;
mod worker;
#[cfg(test)]
mod worker_tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;
use shoal_core::bytes::ByteCount;
use shoal_core::store::format::Secret;
use shoal_core::store::health::Health;
use shoal_core::store::log::{Log, LogUsage};
use shoal_device::HostSlab;
use xxhash_rust::xxh3::xxh3_64_with_seed;

pub use self::directory::Engine;
pub use self::error::DiskError;
pub use self::medium::{Done, Means, Medium, Op, Verb, Waker};
pub use self::options::{DiskOptions, DiskSpec};
pub use self::queue::{DiskCounts, DiskSpeed, DiskState};
pub use self::recover::Recovered;
pub use self::seal::DiskKey;
pub use self::sim::{FaultCounts, FaultRates, SimDisk};

use self::directory::Directory;
use self::queue::{Queue, Request, Shared};
use self::seal::{Codec, Names};
use self::worker::Worker;
use crate::store::ticket::gather;
use crate::store::{Buffer, Fetched, Miss, Offer, Store, StoreKey, Stored, Ticket, Verdict};

/// How long a tier that is dropped writes out what it has.
const DROP_WAIT: Duration = Duration::from_secs(5);

/// One disk, for figures.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskUsage {
    /// Its directory.
    pub path: PathBuf,
    /// How it is.
    pub state: DiskState,
    /// The cap on its bytes.
    pub bytes_max: ByteCount,
    /// What its log holds.
    pub log: LogUsage,
    /// What it did.
    pub counts: DiskCounts,
    /// What it is read and written by.
    pub means: Means,
    /// What was found at start.
    pub recovered: Recovered,
    /// How fast it answers.
    pub speed: DiskSpeed,
}

/// A file alone, by the means that a tier would use: what a tier is measured against.
///
/// # Errors
/// The system's.
pub fn raw_medium(path: &Path, engine: Engine, depth: usize) -> io::Result<Box<dyn Medium>> {
    directory::medium(path, engine, depth, true)
}

/// A disk that can be worked on.
type Opened = (Box<dyn Medium>, Arc<Codec>, Log);
/// Where a disk's medium comes from: its directory, or a test.
type Open = Box<dyn FnMut() -> Result<(Box<dyn Medium>, Secret, u64), DiskError> + Send>;

#[derive(Debug)]
struct Disk {
    spec: DiskSpec,
    shared: Arc<Shared>,
    salt: u64,
}

/// A tier of blocks on disks. Dropping it writes out what it has, for a few seconds at most.
#[derive(Debug)]
pub struct DiskTier {
    disks: Vec<Disk>,
    options: DiskOptions,
    names: Names,
    begun: Instant,
}

impl DiskTier {
    /// Opens directories, making those that are not there, and reads what they hold. A disk that fails is set aside and
    /// tried again; with no disk left every get is a miss.
    ///
    /// # Errors
    /// A directory that has to be left alone: in use, of another version, not a tier's, damaged; or wrong options. Nothing
    /// is changed in it, and no disk is opened.
    pub fn open(disks: &[DiskSpec], options: DiskOptions) -> Result<Self, DiskError> {
        Self::open_through(disks, options, |medium| medium)
    }

    /// As [`DiskTier::open`], with something around each disk's file: what counts, delays or fails its requests.
    ///
    /// # Errors
    /// As [`DiskTier::open`].
    pub fn open_through(
        disks: &[DiskSpec],
        options: DiskOptions,
        wrap: impl Fn(Box<dyn Medium>) -> Box<dyn Medium> + Clone + Send + 'static,
    ) -> Result<Self, DiskError> {
        let opens = disks.iter().map(|disk| {
            let (spec, options, wrap) = (disk.clone(), options.clone(), wrap.clone());
            let mut directory: Option<Directory> = None;
            let open = move || {
                let directory = match &mut directory {
                    Some(directory) => directory,
                    none => {
                        let (bytes, key) = (options.segment_bytes.0, options.key.as_ref());
                        none.insert(Directory::take(&spec.path, bytes, key)?)
                    }
                };
                let medium = directory.medium(options.engine, options.depth, options.wants_direct)?;
                Ok((wrap(medium), directory.secret(), directory.segment_bytes()))
            };
            (disk.clone(), Box::new(open) as Open)
        });
        Self::start(opens.collect(), options)
    }

    /// A tier on simulated disks.
    ///
    /// # Errors
    /// Wrong options.
    pub fn on_simulated(disks: &[(SimDisk, ByteCount)], options: DiskOptions) -> Result<Self, DiskError> {
        let opens = disks.iter().enumerate().map(|(index, (disk, bytes))| {
            let (disk, depth, segment_bytes) = (disk.clone(), options.depth, options.segment_bytes.0);
            let open = move || Ok((disk.open(depth), Secret(7), segment_bytes));
            let spec = DiskSpec::new(format!("simulated-{index}"), *bytes);
            (spec, Box::new(open) as Open)
        });
        Self::start(opens.collect(), options)
    }

    fn start(disks: Vec<(DiskSpec, Open)>, options: DiskOptions) -> Result<Self, DiskError> {
        let names = Names::new(options.key.as_ref())?;
        let mut tier = Self { disks: Vec::new(), options, names, begun: Instant::now() };
        let mut firsts: Vec<Receiver<Result<(), DiskError>>> = Vec::new();
        for (spec, open) in disks {
            tier.options.log(&spec, tier.options.segment_bytes.0)?;
            let names = usize::try_from(spec.bytes.0 / (256 << 10)).unwrap_or(usize::MAX);
            let shared = Arc::new(Shared::new(
                tier.options.requests_max,
                tier.options.put_bytes_max.0,
                names,
                spec.write_bytes_per_hour.map(|bytes| bytes.0),
            ));
            let (first, receiver) = sync_channel(1);
            let life = Life {
                spec: spec.clone(),
                shared: Arc::clone(&shared),
                options: tier.options.clone(),
                open,
                health: Some(Health::new(tier.options.health)),
                first: Some(first),
            };
            let path = spec.path.clone();
            let salt = xxh3_64_with_seed(path.as_os_str().as_encoded_bytes(), 1);
            thread::Builder::new().name("shoal-disk".to_owned()).spawn(move || life.run()).map_err(
                |error| DiskError::Io { doing: "cannot start the thread of", path, source: Arc::new(error) },
            )?;
            tier.disks.push(Disk { spec, shared, salt });
            firsts.push(receiver);
        }
        for (first, disk) in firsts.iter().zip(&tier.disks) {
            match first.recv_timeout(tier.options.open_deadline) {
                Ok(Err(error)) if !error.is_passing() => return Err(error),
                Ok(_) | Err(RecvTimeoutError::Disconnected) => {}
                Err(RecvTimeoutError::Timeout) => {
                    tracing::warn!(path = %disk.spec.path.display(), "a disk is still being opened; it serves later");
                }
            }
        }
        Ok(tier)
    }

    /// Tells all disks of memory that blocks will lie in: `io_uring` then moves bytes to and from it with less work. It is
    /// held until [`DiskTier::unregister`].
    pub fn register(&self, slab: &Arc<HostSlab>) {
        for disk in &self.disks {
            disk.shared.ask(Request::Register(Arc::clone(slab)));
        }
    }

    /// Forgets such memory. Done when all tickets are.
    #[must_use]
    pub fn unregister(&self, slab: &Arc<HostSlab>, deadline: Duration) -> Vec<Ticket<()>> {
        let ask = |disk: &Disk| {
            let (ticket, promise) = Ticket::new(deadline);
            disk.shared.ask(Request::Unregister { slab: Arc::clone(slab), promise });
            ticket
        };
        self.disks.iter().map(ask).collect()
    }

    /// Each disk's figures.
    #[must_use]
    pub fn usage(&self) -> Vec<DiskUsage> {
        let usage_of = |disk: &Disk| {
            let log = disk.shared.log.lock().usage();
            let state = disk.shared.queue.lock().state.clone();
            let notes = disk.shared.notes.lock();
            DiskUsage {
                path: disk.spec.path.clone(),
                state,
                bytes_max: disk.spec.bytes,
                log,
                counts: notes.counts,
                means: notes.means.clone(),
                recovered: notes.recovered,
                speed: notes.speed,
            }
        };
        self.disks.iter().map(usage_of).collect()
    }

    /// Takes no more requests, writes out what waits and closes the logs. Whether all disks were done within `deadline`;
    /// what was not is lost, as in a crash.
    #[expect(clippy::must_use_candidate, reason = "whoever only closes need not know")]
    pub fn close(&self, deadline: Duration) -> bool {
        let close_by = Instant::now() + deadline;
        for disk in &self.disks {
            let mut queue = disk.shared.queue.lock();
            queue.close_by.get_or_insert(close_by);
            let waker = queue.waker.clone();
            drop(queue);
            disk.shared.changed.notify_all();
            if let Some(waker) = waker {
                waker();
            }
        }
        let is_closed = |disk: &Disk| {
            let mut queue = disk.shared.queue.lock();
            while queue.state != DiskState::Closed {
                if disk.shared.changed.wait_until(&mut queue, close_by).timed_out() {
                    break;
                }
            }
            queue.state == DiskState::Closed
        };
        // All of them, so that each has its time.
        self.disks.iter().filter(|disk| !is_closed(disk)).count() == 0
    }

    /// The disks, best first for this name: a name has a disk of its own as long as that one is ready.
    fn by_preference(&self, key: &StoreKey) -> impl Iterator<Item = &Disk> {
        let bytes = key.to_bytes();
        let mut disks: Vec<_> =
            self.disks.iter().map(|disk| (xxh3_64_with_seed(&bytes, disk.salt), disk)).collect();
        disks.sort_by_key(|(weight, _)| *weight);
        disks.into_iter().map(|(_, disk)| disk)
    }

    fn unready(&self) -> Miss {
        let states: Vec<_> = self.disks.iter().map(|disk| disk.shared.queue.lock().state.clone()).collect();
        if !states.is_empty() && states.iter().all(|state| *state == DiskState::Closed) {
            return Miss::Closed;
        }
        let reason = states.into_iter().find_map(|state| match state {
            DiskState::Aside { reason, .. } => Some(reason),
            _ => None,
        });
        Miss::Aside { reason: reason.unwrap_or_else(|| "no disk is ready".to_owned()) }
    }
}

impl Store for DiskTier {
    fn name(&self) -> &'static str {
        "disk"
    }

    fn contains(&self, key: &StoreKey) -> bool {
        let key = self.names.on_disk(key);
        self.by_preference(&key).any(|disk| disk.shared.contains(&key))
    }

    /// What waits to be written: it takes the disk's time from what is read.
    fn queued_bytes(&self, _part: usize) -> u64 {
        self.disks.iter().map(|disk| disk.shared.queue.lock().put_bytes).fold(0, u64::saturating_add)
    }

    fn offer(&self, key: &StoreKey, offer: &Offer) -> Verdict {
        let now_ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let key = self.names.on_disk(key);
        let disk = self.by_preference(&key).find(|disk| disk.shared.is_ready());
        disk.map_or(Verdict::WornOut { bytes: offer.bytes, writable_bytes: 0 }, |disk| {
            disk.shared.offer(&key, offer, self.options.admission, now_ms)
        })
    }

    fn put(&self, key: StoreKey, source: Buffer, bytes: usize, deadline: Duration) -> Ticket<Stored> {
        let room = source.as_slice().len();
        if bytes == 0 || bytes > room {
            return Ticket::ready(Err(Miss::TooLong { bytes: bytes as u64, bytes_max: room as u64 }));
        }
        let key = self.names.on_disk(&key);
        if self.by_preference(&key).any(|disk| disk.shared.contains(&key)) {
            return Ticket::ready(Ok(Stored::Already));
        }
        let Some(disk) = self.by_preference(&key).find(|disk| disk.shared.is_ready()) else {
            return Ticket::ready(Err(self.unready()));
        };
        let Ok(bytes) = u32::try_from(bytes) else {
            return Ticket::ready(Err(Miss::TooLong { bytes: bytes as u64, bytes_max: u64::from(u32::MAX) }));
        };
        let (ticket, promise) = Ticket::new(deadline);
        disk.shared.ask(Request::Put { key, source, bytes, promise });
        ticket
    }

    fn get(&self, key: StoreKey, target: Buffer, deadline: Duration) -> Ticket<Fetched> {
        let key = self.names.on_disk(&key);
        let Some(disk) = self.by_preference(&key).find(|disk| disk.shared.contains(&key)) else {
            return Ticket::ready(Err(Miss::Absent));
        };
        let (ticket, promise) = Ticket::new(deadline);
        disk.shared.ask(Request::Get { key, target, promise });
        ticket
    }

    /// From every disk: one that was set aside for a while may have been stood in for, and come back with its own copy. What
    /// a disk has that is set aside now comes back with it, so then the answer is an error, whatever the others did.
    fn remove(&self, key: StoreKey, deadline: Duration) -> Ticket<bool> {
        let key = self.names.on_disk(&key);
        let is_ready = |disk: &&Disk| disk.shared.is_ready();
        let (ready, others): (Vec<_>, Vec<_>) = self.by_preference(&key).partition(is_ready);
        // Those that have it, else the one where it may be on its way.
        let mut asked: Vec<_> = ready.iter().filter(|disk| disk.shared.contains(&key)).collect();
        if asked.is_empty() {
            asked.extend(ready.first());
        }
        let ask = |disk: &&&Disk| {
            let (ticket, promise) = Ticket::new(deadline);
            disk.shared.ask(Request::Remove { key, promise });
            ticket
        };
        let mut tickets: Vec<_> = asked.iter().map(ask).collect();
        if !others.is_empty() || tickets.is_empty() {
            return Ticket::ready(Err(self.unready()));
        }
        if tickets.len() == 1
            && let Some(ticket) = tickets.pop()
        {
            return ticket;
        }
        let (ticket, promise) = Ticket::new(deadline);
        gather(tickets, promise, |found| found.into_iter().any(|found| found));
        ticket
    }

    fn flush(&self, deadline: Duration) -> Ticket<()> {
        let (ticket, promise) = Ticket::new(deadline);
        let ready: Vec<_> = self.disks.iter().filter(|disk| disk.shared.is_ready()).collect();
        match ready.as_slice() {
            [] => promise.answer(Err(self.unready())),
            [disk] => disk.shared.ask(Request::Flush { promise }),
            several => {
                let parts: Vec<_> = several
                    .iter()
                    .map(|disk| {
                        let (ticket, promise) = Ticket::new(deadline);
                        disk.shared.ask(Request::Flush { promise });
                        ticket
                    })
                    .collect();
                let wait = move || {
                    let results: Vec<_> = parts.into_iter().map(Ticket::wait).collect();
                    promise.answer(results.into_iter().collect());
                };
                // If there is no thread, the promise is dropped, and says so.
                let _ = thread::Builder::new().name("shoal-disk-flush".to_owned()).spawn(wait);
            }
        }
        ticket
    }
}

impl Drop for DiskTier {
    fn drop(&mut self) {
        if !self.close(DROP_WAIT) {
            tracing::warn!("a disk did not finish in time; what it had not written is lost");
        }
    }
}

/// The thread of one disk: opens it, works, sets it aside and tries again.
struct Life {
    spec: DiskSpec,
    shared: Arc<Shared>,
    options: DiskOptions,
    open: Open,
    health: Option<Health>,
    first: Option<SyncSender<Result<(), DiskError>>>,
}

impl Life {
    fn run(mut self) {
        while !self.is_closing() {
            let (reason, answer) = match self.open() {
                Ok((medium, codec, log)) => match self.work(medium, codec, log) {
                    Some(reason) => (reason, Ok(())),
                    None => break,
                },
                Err(error) => (error.to_string(), Err(error)),
            };
            let until = self.set_aside(reason);
            self.tell(answer);
            self.rest(until);
        }
        let Self { shared, open, .. } = self;
        // Before anybody hears that it is closed, so that the next one can have the directory.
        drop(open);
        let mut queue = shared.queue.lock();
        queue.state = DiskState::Closed;
        queue.waker = None;
        drop(queue);
        shared.refuse_all(&Miss::Closed);
        shared.changed.notify_all();
    }

    fn tell(&mut self, result: Result<(), DiskError>) {
        if let Some(first) = self.first.take() {
            // Whoever opened may have gone on without us.
            let _ = first.try_send(result);
        }
    }

    fn is_closing(&self) -> bool {
        self.shared.queue.lock().close_by.is_some()
    }

    fn open(&mut self) -> Result<Opened, DiskError> {
        let (mut medium, secret, segment_bytes) = (self.open)()?;
        let options = self.options.log(&self.spec, segment_bytes)?;
        let codec = Codec::new(secret, self.options.key.as_ref())?;
        let plan = recover::Plan {
            codec: Arc::clone(&codec),
            log: options,
            boot: directory::random()?,
            deadline: self.options.open_deadline,
            failures_max: self.options.health.failures_max,
        };
        let recovered = recover::recover(medium.as_mut(), &plan);
        let (log, recovered) = recovered.map_err(|error| DiskError::Io {
            doing: "cannot read what is in",
            path: self.spec.path.clone(),
            source: Arc::new(error),
        })?;
        let means = medium.means();
        tracing::info!(path = %self.spec.path.display(), ?recovered, ?means, "a disk of the disk tier is open");
        self.shared.notes.lock().recovered = recovered;
        Ok((medium, codec, log))
    }

    /// Serves until the tier closes (none) or the disk has to be set aside (why).
    fn work(&mut self, medium: Box<dyn Medium>, codec: Arc<Codec>, log: Log) -> Option<String> {
        let waker = medium.waker();
        let health = self.health.take().unwrap_or_else(|| Health::new(self.options.health));
        let (shared, options) = (Arc::clone(&self.shared), self.options.clone());
        let mut worker = Worker::new(medium, shared, options, codec, health, log, Instant::now());
        self.change(|queue| {
            queue.state = DiskState::Ready;
            queue.waker = Some(waker);
        });
        self.tell(Ok(()));
        let reason = loop {
            let close_by = self.shared.queue.lock().close_by;
            if close_by.is_some() {
                worker.close();
            }
            let due = match worker.step(Instant::now()) {
                Ok(due) => due,
                Err(reason) => break Some(reason),
            };
            if worker.is_closed() || close_by.is_some_and(|by| by <= Instant::now()) {
                break None;
            }
            worker.wait(due);
        };
        let miss = match &reason {
            None => Miss::Closed,
            Some(reason) => Miss::Aside { reason: reason.clone() },
        };
        if let Some(reason) = &reason {
            // Before anybody hears of it, so that no request comes in between.
            let reason = reason.clone();
            self.change(|queue| queue.state = DiskState::Aside { reason, retry: Duration::ZERO });
        }
        self.health = Some(worker.end(&miss));
        reason
    }

    /// Serves nothing for now. Until when.
    fn set_aside(&mut self, reason: String) -> Instant {
        let retry = Duration::from_millis(self.health.as_mut().map_or(60_000, Health::set_aside));
        self.shared.notes.lock().counts.asides += 1;
        tracing::error!(path = %self.spec.path.display(), %reason, ?retry, "a disk of the disk tier is set aside");
        let miss = Miss::Aside { reason: reason.clone() };
        self.change(|queue| {
            queue.state = DiskState::Aside { reason, retry };
            queue.waker = None;
        });
        // What came while it was being opened.
        self.shared.refuse_all(&miss);
        Instant::now() + retry
    }

    fn rest(&self, until: Instant) {
        let mut queue = self.shared.queue.lock();
        while queue.close_by.is_none() && Instant::now() < until {
            self.shared.changed.wait_until(&mut queue, until);
        }
        if queue.close_by.is_none() {
            queue.state = DiskState::Opening;
        }
    }

    fn change(&self, change: impl FnOnce(&mut MutexGuard<'_, Queue>)) {
        change(&mut self.shared.queue.lock());
        self.shared.changed.notify_all();
    }
}
