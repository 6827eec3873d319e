//! [`KvTier`]: what a KV cache seals goes down to a slower tier too, and comes back from there by name.
//!
//! Apart because an engine's step must not depend on it: whatever a tier does (miss, hang, fail, give damage), the worst is
//! that blocks are computed again. Saving has a thread of its own with a bounded queue; loading waits in the caller, until a
//! deadline, or beside whatever the caller does ([`Loading`]), and takes what has arrived in order by then (I10). What is
//! loaded was verified by the tier (I8), and its tokens are compared with those asked for.
//!
//! Blocks are found by content both ways. On the way down they are owned only while their bytes are copied, with the turn
//! held: so no eviction and no compaction comes in between, and nothing that is queued keeps a block from being given to
//! others. On the way up they are owned from before the first copy on, and nothing is moved until they are handed over.

mod bring;
mod check;
mod choice;
mod hands;
mod idle;
mod landing;
mod lift;
mod load;
mod loading;
mod prefetch;
mod save;

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use shoal_core::bytes::ByteCount;
use shoal_core::kv::layout::GroupLayout;
use shoal_core::kv::prefix::{BlockKey, KeyChain};
use shoal_core::protocol::KvTierCounts;
use shoal_core::store::format::padded;
use shoal_device::{Event, ForeignWork, HostBuffer, Stream};

use self::choice::Choices;
use self::idle::Conversations;
use self::landing::Landing;
use self::load::Call;
pub use self::loading::Loading;
use self::loading::Loads;
pub use self::prefetch::Prefetch;
use self::prefetch::Wish;
use super::KvCache;
use crate::error::MemoryError;
use crate::region::BlockCopy;
use crate::store::{Fingerprint, Miss, Store, StoreKey};

/// What is copied to host memory of a connection's own at a time, and from it.
const STAGE_BYTES: u64 = 8 << 20;
/// Bytes that are asked of a tier ahead of what is done with them.
const AHEAD_BYTES: usize = 64 << 20;
/// From here on a block's payload is padded to whole units of a disk, so that it is written from where it lies.
const PADDED_FROM: u64 = 64 << 10;
/// Version of the payload: the block's planes one after another, then its tokens (little endian, 4 bytes each), then zeroes.
const PAYLOAD: &str = "1";

/// How a cache uses a tier.
#[derive(Clone, Debug)]
pub struct KvTierOptions {
    /// What the bytes depend on beside the tokens, as named facts: model, weights, dtype, what computes them. The cache adds its
    /// own layout.
    pub facts: Vec<(String, String)>,
    /// How long a load may take, from its call on. Beside a wake of weights its copies come after those that are queued, up
    /// to a gibibyte, and are waited for.
    pub load_wait: Duration,
    /// How long a block that was handed to the tier may take to be kept.
    pub put_wait: Duration,
    /// How long saving waits where blocks cannot be copied at the moment: their cache is partly off the device, or a step runs
    /// of which nobody told when it ends.
    pub save_wait: Duration,
    /// Most tokens that wait to be saved, all sequences together; what comes on top is not saved.
    pub queued_tokens_max: usize,
    /// Most bytes that are brought up ahead of one request.
    pub prefetch_bytes_max: usize,
    /// Whether what is there is left there where computing it is faster, by what [`KvTier::computed`] was told and loads took.
    /// Else all of it is loaded.
    pub is_choosing: bool,
    /// How long a conversation's blocks stay on the device unused once the tier has them; none: until others need the memory.
    pub idle: Option<Duration>,
}

impl KvTierOptions {
    /// The usual values.
    #[must_use]
    pub fn new(facts: Vec<(String, String)>) -> Self {
        let (load_wait, put_wait) = (Duration::from_secs(1), Duration::from_secs(30));
        let (save_wait, queued_tokens_max, prefetch_bytes_max) =
            (Duration::from_secs(30), 4 << 20, 256 << 20);
        Self {
            facts,
            load_wait,
            put_wait,
            save_wait,
            queued_tokens_max,
            prefetch_bytes_max,
            is_choosing: false,
            idle: None,
        }
    }
}

/// Sequences whose blocks are to be saved.
#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Sequence>,
    tokens: usize,
    /// The thread is at work on one, or waits for the tier.
    is_busy: bool,
    /// How often what waited was discarded.
    discards: u64,
    /// Nothing is saved any more. Also said in [`Inner::is_over`], for a look without the lock.
    is_over: bool,
}

struct Sequence {
    salt: Box<[u8]>,
    tokens: Vec<u32>,
    first: usize,
    /// [`Queue::discards`] as it was queued.
    discards: u64,
    /// Nobody used it: it is offered once more.
    is_again: bool,
}

impl fmt::Debug for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sequence")
            .field("tokens", &self.tokens.len())
            .field("first", &self.first)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Inner {
    cache: Arc<KvCache>,
    store: Arc<dyn Store>,
    fingerprint: Fingerprint,
    options: KvTierOptions,
    layout: GroupLayout,
    block_tokens: usize,
    block_bytes: usize,
    payload_bytes: usize,
    counts: Mutex<KvTierCounts>,
    queue: Mutex<Queue>,
    /// Something was queued, or is done.
    changed: Condvar,
    /// Sequences to be brought up ahead of their requests.
    wishes: Mutex<VecDeque<Wish>>,
    wished: Condvar,
    loads: Loads,
    is_over: AtomicBool,
    /// Host memory for what tiers read on the way up; one load at a time.
    up: Mutex<Landing>,
    choices: Choices,
    conversations: Mutex<Conversations>,
}

/// A cache's connection to a tier. Dropping it ends it; what waits to be saved then is not ([`KvTier::flush`]).
#[derive(Debug)]
pub struct KvTier {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
    ahead: Option<JoinHandle<()>>,
    /// All that it takes to load beside running steps, or none.
    loaders: Vec<JoinHandle<()>>,
}

impl KvTier {
    /// Connects a cache to a tier.
    ///
    /// # Errors
    /// [`MemoryError::State`] for a cache that finds nothing again, of several groups, or in debug mode;
    /// [`MemoryError::Device`] where there is no host memory for copies.
    pub fn new(
        cache: &Arc<KvCache>,
        store: Arc<dyn Store>,
        options: KvTierOptions,
    ) -> Result<Self, MemoryError> {
        let refuse = |why| Err(cache.region().refuse("attach a store", why));
        let Some(block_tokens) = cache.block_tokens().filter(|tokens| *tokens > 0) else {
            return refuse("this cache finds nothing again");
        };
        if cache.groups() != 1 {
            return refuse("caches of several groups cannot have one yet");
        }
        if cache.shared.debug.is_some() {
            return refuse("a cache in debug mode cannot have one");
        }
        let layout = cache.layout(0)?;
        let block_tokens = block_tokens as usize;
        let bytes = layout.block_bytes().0;
        let payload = bytes + 4 * block_tokens as u64;
        let payload = if bytes >= PADDED_FROM { padded(payload) } else { payload };
        let fingerprint = fingerprint(&options.facts, &layout, block_tokens);
        let device = cache.region().manager().device();
        let down = HostBuffer::allocate(device, ByteCount((STAGE_BYTES / bytes).max(1) * bytes))
            .map_err(MemoryError::device("allocate host memory for copies of blocks"))?;
        let payload_bytes = usize::try_from(payload).unwrap_or(usize::MAX);
        let up = Landing::new(device, payload_bytes, blocks_ahead(payload_bytes));
        let inner = Arc::new(Inner {
            cache: Arc::clone(cache),
            choices: Choices::new(store.parts()),
            conversations: Mutex::default(),
            store,
            fingerprint,
            options,
            block_tokens,
            block_bytes: usize::try_from(bytes).unwrap_or(usize::MAX),
            payload_bytes,
            layout,
            counts: Mutex::default(),
            queue: Mutex::default(),
            changed: Condvar::new(),
            wishes: Mutex::default(),
            wished: Condvar::new(),
            loads: Loads::default(),
            is_over: AtomicBool::new(false),
            up: Mutex::new(up),
        });
        let own = Arc::clone(&inner);
        let thread = thread::Builder::new().name("shoal-kv-tier".to_owned()).spawn(move || own.run(down));
        match &thread {
            Ok(_) => inner.are_copied(|cache| cache.copy_sealed(true)),
            Err(error) => tracing::warn!(%error, "no thread saves KV blocks to the tier below"),
        }
        let own = Arc::clone(&inner);
        let ahead = thread::Builder::new().name("shoal-kv-ahead".to_owned()).spawn(move || own.run_ahead());
        if let Err(error) = &ahead {
            tracing::warn!(%error, "no thread brings KV blocks up ahead of their requests");
        }
        let loaders = start_loaders(&inner);
        Ok(Self { inner, thread: thread.ok(), ahead: ahead.ok(), loaders })
    }

    /// Brings back the blocks that follow `held`, the first blocks of `tokens`, which the caller owns: as many in a row as the
    /// tier has and gives in time. They are the caller's, and sealed. Call it outside of guards: it takes blocks, which may wait
    /// for memory.
    #[must_use]
    pub fn load(&self, salt: &[u8], tokens: &[u32], held: &[u32]) -> Vec<u32> {
        self.inner.has_looked(tokens, held.len());
        self.inner.load(&Call::waiting(salt, tokens, held))
    }

    /// Queues the full blocks of `tokens` from block `first` on to be saved; they are sealed, and are found by content when
    /// their turn comes. What the tier has already is passed over.
    pub fn save(&self, salt: &[u8], tokens: &[u32], first: usize) {
        self.inner.push(salt, tokens, first);
    }

    /// What waits to be saved shall not be, nor what is being copied at the moment, in either direction: nobody knows any more
    /// what blocks hold. Loads that are under way give nothing.
    pub fn discard_queued(&self) {
        let mut queue = self.inner.queue.lock();
        queue.discards += 1;
        queue.waiting.clear();
        queue.tokens = 0;
        drop(queue);
        *self.inner.conversations.lock() = Conversations::default();
    }

    /// Waits until what was queued is saved or given up, and written out. Whether that was so in time.
    #[must_use]
    pub fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut queue = self.inner.queue.lock();
        while queue.is_busy || !queue.waiting.is_empty() {
            if self.thread.is_none() || self.inner.changed.wait_until(&mut queue, deadline).timed_out() {
                return false;
            }
        }
        drop(queue);
        self.inner.store.flush(deadline.saturating_duration_since(Instant::now())).wait().is_ok()
    }

    /// A step of the engine computed so many tokens in that time. Tell it of steps that computed prompts: answers of one token
    /// each say nothing of what a prompt costs.
    pub fn computed(&self, tokens: u64, took: Duration) {
        self.inner.choices.computed(tokens, took);
    }

    /// Knows from now on what another connection of the cache has seen of computing, and of tiers of the same names. For one that
    /// takes the other's place, as a tier joins.
    pub fn learn_from(&self, other: &Self) {
        self.inner.choices.take_over(&other.inner.choices);
    }

    /// What bringing one MiB more to the device takes (microseconds), as loads were measured, from the fastest tier of those
    /// that were read; none before one was.
    #[must_use]
    pub fn load_us_per_mib(&self) -> Option<f64> {
        self.inner.choices.load_us_per_mib()
    }

    /// What was decided last of a sequence that the tier has something of, and why.
    #[must_use]
    pub fn last_choice(&self) -> Option<String> {
        self.inner.choices.last()
    }

    /// What was done so far.
    #[must_use]
    pub fn counts(&self) -> KvTierCounts {
        *self.inner.counts.lock()
    }
}

impl Drop for KvTier {
    fn drop(&mut self) {
        // Under the lock: a thread that has just looked would not hear of it, and sleep for a minute.
        self.inner.queue.lock().is_over = true;
        self.inner.is_over.store(true, Ordering::Relaxed);
        drop(self.inner.wishes.lock());
        self.inner.changed.notify_all();
        self.inner.wished.notify_all();
        self.inner.loads.end();
        let is_saving = self.thread.is_some();
        let others = [self.thread.take(), self.ahead.take()].into_iter().flatten();
        for thread in others.chain(self.loaders.drain(..)) {
            if thread.join().is_err() {
                tracing::error!("a thread that moves KV blocks between tiers has panicked");
            }
        }
        if !is_saving {
            return;
        }
        self.inner.are_copied(|cache| cache.copy_sealed(false));
    }
}

/// Threads for loads beside running steps: one, and another where a tier has to be asked what it has. All or none.
fn start_loaders(inner: &Arc<Inner>) -> Vec<JoinHandle<()>> {
    let start = |name: &str, run: fn(&Inner)| {
        let own = Arc::clone(inner);
        thread::Builder::new().name(name.to_owned()).spawn(move || run(&own))
    };
    let mut started = vec![start("shoal-kv-load", Inner::run_loads)];
    if inner.store.must_look() {
        started.push(start("shoal-kv-look", Inner::run_looks));
    }
    started.into_iter().collect::<Result<_, _>>().unwrap_or_else(|error| {
        // The other one, if there is one, sleeps until the end.
        tracing::warn!(%error, "no thread loads KV blocks beside running steps");
        Vec::new()
    })
}

/// Of what the caller says and of where the bytes of a block lie in its payload.
fn fingerprint(facts: &[(String, String)], layout: &GroupLayout, block_tokens: usize) -> Fingerprint {
    let own = [
        ("payload", PAYLOAD.to_owned()),
        ("block", format!("{:?}", layout.spec().shape)),
        ("layers", layout.spec().layers.to_string()),
        ("element_bytes", layout.spec().element_bytes.to_string()),
        ("planes", layout.pieces(0).count().to_string()),
        ("block_tokens", block_tokens.to_string()),
        ("block_bytes", layout.block_bytes().0.to_string()),
    ];
    let given = facts.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let all: Vec<_> = given.chain(own.iter().map(|(name, value)| (*name, value.as_str()))).collect();
    Fingerprint::of(&all)
}

impl Inner {
    /// The names of the full blocks of a sequence.
    fn keys(&self, salt: &[u8], tokens: &[u32]) -> Vec<StoreKey> {
        let mut chain = KeyChain::new(0, salt);
        let blocks = tokens.chunks_exact(self.block_tokens);
        blocks
            .map(|block| StoreKey::new(self.fingerprint, salt, &BlockKey::Tokens(chain.next_key(block))))
            .collect()
    }

    /// The tokens of a block, as they lie behind its bytes.
    fn trailer(&self, tokens: &[u32], block: usize) -> Vec<u8> {
        let tokens = tokens.iter().skip(block * self.block_tokens).take(self.block_tokens);
        tokens.flat_map(|token| token.to_le_bytes()).collect()
    }

    /// How many blocks a piece of host memory for copies takes.
    fn stage_blocks(&self, stage: &HostBuffer) -> usize {
        (usize::try_from(stage.bytes().0).unwrap_or(usize::MAX) / self.block_bytes).max(1)
    }

    /// Between blocks and host memory: each from where that begins on. What lies together on the device comes together.
    fn copies<'a>(
        &self,
        blocks: &[u32],
        memory: impl Iterator<Item = (&'a Arc<HostBuffer>, ByteCount)>,
    ) -> Vec<BlockCopy> {
        let memory: Vec<_> = memory.take(blocks.len()).collect();
        let blocks = &blocks[..memory.len()];
        let mut copies = Vec::with_capacity(blocks.len() * self.layout.planes() as usize);
        copies.extend(self.layout.pieces_by_plane(blocks).map(|(at, within, offset, bytes)| {
            let (host, start) = memory[at];
            BlockCopy { offset, bytes, host: Arc::clone(host), host_offset: start + within }
        }));
        copies
    }

    /// Makes a stream wait for the steps that may touch blocks. False: nobody knows when they end, as a step is running that
    /// nobody told of.
    fn after_steps(&self, stream: &Stream) -> Result<bool, MemoryError> {
        let shared = &self.cache.shared;
        let manager = shared.manager();
        let mut events: Vec<Arc<Event>> = shared.steps.lock().values().cloned().collect();
        events.extend(shared.step.lock().clone());
        if events.is_empty() {
            if manager.gate().is_shared() {
                return Ok(false);
            }
            let all = Event::of_foreign(manager.device(), ForeignWork::All);
            events.push(Arc::new(all.map_err(MemoryError::device("mark what is queued"))?));
        }
        for event in &events {
            stream.wait_for(event).map_err(MemoryError::device("order copies of blocks"))?;
        }
        Ok(true)
    }

    fn count(&self, change: impl FnOnce(&mut KvTierCounts)) {
        change(&mut self.counts.lock());
    }

    /// Tells the cache which blocks have their copies. It can only fail where nothing is found again.
    fn are_copied(&self, tell: impl FnOnce(&KvCache) -> Result<(), MemoryError>) {
        if let Err(error) = tell(&self.cache) {
            tracing::warn!(%error, "a cache does not know which of its blocks are saved");
        }
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }
}

/// Blocks that are asked of a tier ahead of what is done with them.
fn blocks_ahead(payload_bytes: usize) -> usize {
    (AHEAD_BYTES / payload_bytes).clamp(2, 256)
}

/// Counts a block that was looked for and did not come.
fn count_miss(counts: &mut KvTierCounts, miss: &Miss) {
    match miss {
        Miss::Deadline => counts.late += 1,
        Miss::Corrupt => counts.corrupt += 1,
        // It was evicted a moment ago.
        Miss::Absent => {}
        _ => counts.failed += 1,
    }
}
