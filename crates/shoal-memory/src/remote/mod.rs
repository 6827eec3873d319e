//! The remote tier: blocks on an object store, a Redis or a shared directory, where several servers find them.
//!
//! Apart because it is the one tier that is somebody else's. It is never believed (`envelope`), never waited for beyond a
//! deadline (`wire`), and not asked at all while it fails (`breaker`): an outage costs misses and no waiting (I8, I10). What
//! fails in passing is tried again after a random part of a time that doubles (full jitter; M. Brooker, "Exponential Backoff
//! And Jitter", 2015), as long as the deadline allows. Threads do the work, each with a connection of its own, from two
//! queues with bounds in requests and in bytes: what is to be written, which nobody waits for, comes after all else and
//! leaves a connection to it.
//!
//! | module | subject |
//! |---|---|
//! | `address` | where the remote is, and who asks it, as people write it |
//! | `envelope` | what stands before a block's bytes, and whether both are believed |
//! | `breaker` | whether the remote is asked at all |
//! | `presence` | what is known to be there without asking |
//! | `work` | one request, with its retries |
//! | `wire`, `s3`, `redis`, `files` | how objects are read and written |

mod address;
mod breaker;
mod envelope;
mod files;
mod presence;
mod redis;
mod s3;
mod wire;
mod work;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::rand::{GetRandomFlags, getrandom};
use shoal_core::bytes::ByteCount;
use shoal_core::store::admission::{AdmissionRule, Candidate, Sightings, decide};
use shoal_core::store::health::HealthRule;
use shoal_core::store::recompute::{Cost, Estimate};

pub use self::address::login_from_file;
pub use self::envelope::{HEAD_BYTES, RemoteKey};
pub use self::redis::RedisSpec;
pub use self::s3::S3Spec;

use self::breaker::Breaker;
use self::files::Files;
use self::presence::Presence;
use self::redis::Redis;
use self::s3::S3;
use self::wire::Wire;
use self::work::{Job, Worker};
use crate::store::crew::{Crew, Later};
use crate::store::{Buffer, Fetched, Miss, Offer, Promise, Store, StoreKey, Stored, Ticket, Verdict};

/// Names that are looked for in the background at a time, for each connection.
const LOOKING_EACH: usize = 8;

/// Longer times mean this: what is added to a clock must not overflow it.
const TIME_MAX: Duration = Duration::from_hours(24);

/// Where the remote is.
#[derive(Clone, Debug)]
pub enum RemoteSpec {
    /// An object store.
    S3(S3Spec),
    /// Redis or Valkey.
    Redis(RedisSpec),
    /// A directory that is mounted here.
    Directory(PathBuf),
}

/// How it is asked.
#[derive(Clone, Debug)]
pub struct RemoteOptions {
    /// What its objects are believed by.
    pub key: RemoteKey,
    /// Requests at a time.
    pub connections: usize,
    /// Most requests that wait, and as many puts.
    pub requests_max: usize,
    /// Most bytes of blocks that wait to be written.
    pub put_bytes_max: ByteCount,
    /// The longest that one try may take; a request's deadline may be shorter.
    pub try_deadline: Duration,
    /// Most tries.
    pub tries_max: u32,
    /// The first wait between two tries is at most this, each later one at most twice as long.
    pub backoff: Duration,
    /// When the remote is set aside.
    pub health: HealthRule,
    /// The longest it is set aside for before it is tried again.
    pub retry_max: Duration,
    /// Which blocks are worth a write.
    pub admission: AdmissionRule,
    /// Names of which it is remembered whether they are there.
    pub names_max: usize,
    /// How long a name that was not there is not asked for again.
    pub absent_for: Duration,
}

impl RemoteOptions {
    /// With this key and what suits a remote in the same data centre.
    #[must_use]
    pub fn new(key: RemoteKey) -> Self {
        Self {
            key,
            connections: 8,
            requests_max: 1024,
            put_bytes_max: ByteCount::mib(256),
            try_deadline: Duration::from_secs(2),
            tries_max: 4,
            backoff: Duration::from_millis(20),
            health: HealthRule { failures_max: 6, window_ms: 10_000, retry_ms: 1000 },
            retry_max: Duration::from_mins(1),
            admission: AdmissionRule::default(),
            names_max: 1 << 18,
            absent_for: Duration::from_secs(30),
        }
    }
}

/// What a remote tier did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RemoteCounts {
    /// Blocks served.
    pub hits: u64,
    /// Blocks asked for that were not there.
    pub absent: u64,
    /// Objects that were not believed.
    pub corrupt: u64,
    /// Tries that failed.
    pub failed: u64,
    /// Tries after a first one.
    pub retries: u64,
    /// Requests that were refused because too many waited.
    pub refused: u64,
    /// Blocks written.
    pub written: u64,
    /// Bytes of blocks read.
    pub bytes_read: u64,
    /// Bytes of blocks written.
    pub bytes_written: u64,
    /// Names that were looked for in the background.
    pub probes: u64,
    /// Times it was set aside.
    pub asides: u64,
}

/// A remote tier's figures.
#[derive(Clone, Debug, PartialEq)]
pub struct RemoteUsage {
    /// What it did.
    pub counts: RemoteCounts,
    /// Why it is set aside, if it is.
    pub aside: Option<String>,
    /// What reading a block costs, by bytes.
    pub read: Cost,
    /// Bytes of blocks that wait to be written.
    pub put_bytes: u64,
}

/// What callers and threads share.
struct State {
    counts: RemoteCounts,
    presence: Presence,
    sightings: Sightings,
    read: Estimate,
    put_bytes: u64,
    put_next: u64,
    /// Puts that are under way, by number.
    putting: std::collections::BTreeMap<u64, StoreKey>,
    flushes: Vec<(u64, Promise<()>)>,
    /// Names that are being looked for with nobody waiting.
    looking: usize,
}

struct Shared {
    options: RemoteOptions,
    breaker: Breaker,
    state: Mutex<State>,
}

impl State {
    /// A put is over: whoever waited for it alone hears so.
    fn end_put(&mut self, number: u64, bytes: u64) -> Vec<Promise<()>> {
        self.putting.remove(&number);
        self.put_bytes = self.put_bytes.saturating_sub(bytes);
        let oldest = self.putting.first_key_value().map_or(u64::MAX, |(number, _)| *number);
        self.flushes.extract_if(.., |(before, _)| oldest >= *before).map(|(_, promise)| promise).collect()
    }
}

/// See the module.
pub struct RemoteTier {
    shared: Arc<Shared>,
    crew: Crew<Job>,
}

impl fmt::Debug for RemoteTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteTier").field("usage", &self.usage()).finish_non_exhaustive()
    }
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    if getrandom(&mut bytes, GetRandomFlags::empty()).is_err() {
        return 0x9e37_79b9_7f4a_7c15;
    }
    u64::from_le_bytes(bytes)
}

/// Letters, digits and what stands between them: needs no escaping in a path or a header.
fn is_plain(text: &str, more: &str) -> bool {
    text.chars().all(|character| character.is_ascii_alphanumeric() || more.contains(character))
}

impl RemoteSpec {
    fn check(&self) -> Result<(), String> {
        let check = |what: &str, text: &str, more: &str, may_be_empty: bool| {
            if (may_be_empty || !text.is_empty()) && is_plain(text, more) {
                return Ok(());
            }
            Err(format!("{what} {text:?}: letters, digits and {more:?} are right"))
        };
        match self {
            Self::S3(spec) => {
                if spec.address.starts_with("https:") {
                    return Err("an object store is reached by plain HTTP: give the address of a proxy that speaks TLS \
                                to it, as host:port"
                        .to_owned());
                }
                check("address", &spec.address, ".-_:[]", false)?;
                check("bucket", &spec.bucket, ".-_", false)?;
                check("prefix", &spec.prefix, ".-_/", true)?;
                // Stores and proxies take these out of a path, and then it is not the one that was signed.
                let is_odd = |part: &str| part == "." || part == "..";
                if is_odd(&spec.bucket)
                    || spec.prefix.starts_with('/')
                    || spec.prefix.contains("//")
                    || spec.prefix.split('/').any(is_odd)
                {
                    let (bucket, prefix) = (&spec.bucket, &spec.prefix);
                    return Err(format!(
                        "bucket {bucket:?} and prefix {prefix:?}: \".\", \"..\" and empty parts between slashes are \
                         no names"
                    ));
                }
                check("region", &spec.region, "-_", false)?;
                check("access key", &spec.access_key, "-_+=/.@", false)
            }
            Self::Redis(spec) => check("address", &spec.address, ".-_:[]", false),
            Self::Directory(path) if path.is_absolute() => Ok(()),
            Self::Directory(path) => Err(format!("{} must be an absolute path", path.display())),
        }
    }

    fn wire(&self) -> Box<dyn Wire> {
        match self {
            Self::S3(spec) => Box::new(S3::new(spec.clone())),
            Self::Redis(spec) => Box::new(Redis::new(spec.clone())),
            Self::Directory(path) => Box::new(Files::new(path.clone(), random())),
        }
    }
}

impl RemoteTier {
    /// Starts the threads. Nothing is asked of the remote: it may be away.
    ///
    /// # Errors
    /// The place is written wrongly (`InvalidInput`), or no thread could be started.
    pub fn open(spec: &RemoteSpec, mut options: RemoteOptions) -> io::Result<Self> {
        spec.check().map_err(|reason| io::Error::new(io::ErrorKind::InvalidInput, reason))?;
        for time in
            [&mut options.try_deadline, &mut options.backoff, &mut options.retry_max, &mut options.absent_for]
        {
            *time = (*time).min(TIME_MAX);
        }
        let state = State {
            counts: RemoteCounts::default(),
            presence: Presence::new(options.names_max, options.absent_for),
            sightings: Sightings::new(options.names_max),
            // A slow network, until something is known.
            read: Estimate::new(Cost::of_rate(2000.0, 500e6)),
            put_bytes: 0,
            put_next: 0,
            putting: std::collections::BTreeMap::new(),
            flushes: Vec::new(),
            looking: 0,
        };
        let breaker = Breaker::new(options.health, options.retry_max, 2 * options.try_deadline);
        let (connections, requests_max) = (options.connections.clamp(1, 256), options.requests_max.max(1));
        let shared = Arc::new(Shared { options, breaker, state: Mutex::new(state) });
        // One that writes is at it for as long as its try may take: another one is there for who only asks.
        let puts = Later { jobs_max: requests_max, threads_max: (connections - 1).max(1) };
        let crew = Crew::start_with("shoal-remote", connections, requests_max, puts, |_| {
            let mut worker = Worker::new(Arc::clone(&shared), spec.wire(), random());
            move |job| worker.work(job)
        })?;
        Ok(Self { shared, crew })
    }

    /// Its figures.
    #[must_use]
    pub fn usage(&self) -> RemoteUsage {
        let aside = self.shared.breaker.aside(Instant::now());
        let asides = self.shared.breaker.asides();
        let state = self.shared.state.lock();
        RemoteUsage {
            counts: RemoteCounts { asides, ..state.counts },
            aside,
            read: state.read.cost(),
            put_bytes: state.put_bytes,
        }
    }

    /// Asks the remote whether it has a block; [`Store::contains`] knows it from then on.
    #[must_use]
    pub fn look(&self, key: StoreKey, deadline: Duration) -> Ticket<bool> {
        let (ticket, promise) = Ticket::new(deadline);
        self.ask(Job::Look { key, promise: Some(promise) });
        ticket
    }

    fn ask(&self, job: Job) {
        if let Some(reason) = self.shared.breaker.aside(Instant::now()) {
            return job.refuse(Miss::Aside { reason }, &self.shared);
        }
        let desk = self.crew.desk();
        let asked = if matches!(job, Job::Put { .. }) { desk.ask_later(job) } else { desk.ask(job) };
        if let Err((job, waiting)) = asked {
            self.shared.state.lock().counts.refused += 1;
            job.refuse(Miss::Busy { waiting }, &self.shared);
        }
    }
}

impl Store for RemoteTier {
    fn name(&self) -> &'static str {
        "remote"
    }

    /// From memory: what this process put, got or looked for. A name of which nothing is known is looked for in the
    /// background, so that the next one to ask finds it.
    fn contains(&self, key: &StoreKey) -> bool {
        if self.shared.breaker.aside(Instant::now()).is_some() {
            return false;
        }
        let mut state = self.shared.state.lock();
        let known = state.presence.find(key, Instant::now());
        // What nobody waits for must not keep others waiting.
        let has_room = state.looking < LOOKING_EACH * self.shared.options.connections.max(1);
        if known.is_none() && has_room {
            state.looking += 1;
            state.presence.looking(key, Instant::now());
            state.counts.probes += 1;
            drop(state);
            self.ask(Job::Look { key: *key, promise: None });
        }
        known == Some(true)
    }

    /// From the first on that is not there, as far as is known, nothing more is looked for: of a sequence that is of no use.
    fn contains_each(&self, keys: &[StoreKey]) -> Vec<bool> {
        let row = keys.iter().take_while(|key| self.contains(key)).count();
        let now = Instant::now();
        let is_aside = self.shared.breaker.aside(now).is_some();
        let state = self.shared.state.lock();
        let is_known = |key| !is_aside && state.presence.find(key, now) == Some(true);
        keys.iter().enumerate().map(|(at, key)| at < row || is_known(key)).collect()
    }

    fn must_look(&self) -> bool {
        true
    }

    /// The first name is looked for alone: mostly nobody has any of a sequence, and then that is one way to the remote and
    /// back. The others follow some at a time.
    fn look_for(&self, keys: &[StoreKey], deadline: Duration) {
        let until = Instant::now() + deadline.min(TIME_MAX);
        let (mut left, mut at_once) = (keys, 1);
        while !left.is_empty() && Instant::now() < until {
            let (now, later) = left.split_at(at_once.min(left.len()));
            let known: Vec<Option<bool>> = {
                let state = self.shared.state.lock();
                now.iter().map(|key| state.presence.find(key, Instant::now())).collect()
            };
            let unknown = now.iter().zip(&known).filter(|(_, known)| known.is_none());
            let wait = until.saturating_duration_since(Instant::now());
            let asked: Vec<_> = unknown.map(|(key, _)| self.look(*key, wait)).collect();
            // All of them are waited for: each answer is worth knowing.
            let lacking =
                asked.into_iter().map(Ticket::wait).filter(|found| !matches!(found, Ok(true))).count();
            if lacking > 0 || known.contains(&Some(false)) {
                break;
            }
            (left, at_once) = (later, LOOKING_EACH * self.shared.options.connections.max(1));
        }
    }

    fn offer(&self, key: &StoreKey, offer: &Offer) -> Verdict {
        let is_aside = self.shared.breaker.aside(Instant::now()).is_some();
        let mut state = self.shared.state.lock();
        let us = state.read.cost().of(offer.bytes as f64);
        let candidate = Candidate {
            bytes: offer.bytes,
            uses: state.sightings.saw(key),
            recompute_us: offer.recompute_us,
            restore_us: u64::try_from(Duration::from_secs_f64((us / 1e6).clamp(0.0, 1e6)).as_micros())
                .unwrap_or(u64::MAX),
            writable_bytes: if is_aside { 0 } else { u64::MAX },
        };
        drop(state);
        let verdict = decide(&candidate, &self.shared.options.admission);
        tracing::trace!(%key, ?candidate, %verdict, "a block was offered to the remote tier");
        verdict
    }

    fn put(&self, key: StoreKey, source: Buffer, bytes: usize, deadline: Duration) -> Ticket<Stored> {
        let room = source.as_slice().len();
        if bytes == 0 || bytes > room {
            return Ticket::ready(Err(Miss::TooLong { bytes: bytes as u64, bytes_max: room as u64 }));
        }
        let mut state = self.shared.state.lock();
        if state.presence.find(&key, Instant::now()) == Some(true) {
            return Ticket::ready(Ok(Stored::Already));
        }
        let (waiting, length) = (state.putting.len(), bytes as u64);
        if state.put_bytes > 0 && state.put_bytes + length > self.shared.options.put_bytes_max.0 {
            state.counts.refused += 1;
            return Ticket::ready(Err(Miss::Busy { waiting }));
        }
        state.put_bytes += length;
        let number = state.put_next;
        state.put_next += 1;
        state.putting.insert(number, key);
        drop(state);
        let (ticket, promise) = Ticket::new(deadline);
        self.ask(Job::Put { key, source, bytes, number, promise });
        ticket
    }

    fn get(&self, key: StoreKey, target: Buffer, deadline: Duration) -> Ticket<Fetched> {
        let (ticket, promise) = Ticket::new(deadline);
        self.ask(Job::Get { key, target, promise });
        ticket
    }

    /// Deletes the object, for all who share the remote. Whether this process knew of one.
    fn remove(&self, key: StoreKey, deadline: Duration) -> Ticket<bool> {
        let (ticket, promise) = Ticket::new(deadline);
        let mut state = self.shared.state.lock();
        let was_there = state.presence.find(&key, Instant::now()) == Some(true);
        let number = state.put_next;
        state.put_next += 1;
        state.presence.removed(&key, number, Instant::now());
        drop(state);
        self.ask(Job::Remove { key, was_there, number, promise });
        ticket
    }

    /// Done when all puts before it are. What that means is the remote's: an object store and a directory have written them
    /// out, a Redis has them in memory.
    fn flush(&self, deadline: Duration) -> Ticket<()> {
        let (ticket, promise) = Ticket::new(deadline);
        let mut state = self.shared.state.lock();
        if state.putting.is_empty() {
            drop(state);
            promise.answer(Ok(()));
        } else {
            let before = state.put_next;
            let over = state.flushes.extract_if(.., |(_, promise)| promise.deadline() <= Instant::now());
            let over: Vec<_> = over.map(|(_, promise)| promise).collect();
            state.flushes.push((before, promise));
            drop(state);
            for promise in over {
                promise.answer(Err(Miss::Deadline));
            }
        }
        ticket
    }
}
