//! What callers and a disk's thread share: the queue of requests, the index, figures.
//!
//! Apart because both sides see it, and neither may hold it for long: no lock here is held across I/O (I9), and the queue
//! is bounded by requests and by bytes (I10).

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use shoal_core::store::admission::{AdmissionRule, Candidate, Sightings, Verdict, WriteAllowance, decide};
use shoal_core::store::key::StoreKey;
use shoal_core::store::log::{Log, LogOptions};
use shoal_device::HostSlab;

use super::medium::{Means, Waker};
use super::recover::Recovered;
use crate::store::{Buffer, Fetched, Miss, Offer, Promise, Stored};

/// What a caller asks of a disk.
pub(super) enum Request {
    Put { key: StoreKey, source: Buffer, bytes: u32, promise: Promise<Stored> },
    Get { key: StoreKey, target: Buffer, promise: Promise<Fetched> },
    Remove { key: StoreKey, promise: Promise<bool> },
    Flush { promise: Promise<()> },
    Register(Arc<HostSlab>),
    Unregister { slab: Arc<HostSlab>, promise: Promise<()> },
}

impl Request {
    /// Answers without doing it.
    pub(super) fn refuse(self, miss: Miss) {
        match self {
            Self::Put { promise, .. } => promise.answer(Err(miss)),
            Self::Get { promise, .. } => promise.answer(Err(miss)),
            Self::Remove { promise, .. } => promise.answer(Err(miss)),
            Self::Flush { promise } | Self::Unregister { promise, .. } => promise.answer(Err(miss)),
            Self::Register(_) => {}
        }
    }

    fn put_bytes(&self) -> u64 {
        if let Self::Put { bytes, .. } = self { u64::from(*bytes) } else { 0 }
    }
}

/// How a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskState {
    /// What is on it is being read.
    Opening,
    /// It serves.
    Ready,
    /// It serves nothing for now.
    Aside {
        /// Why.
        reason: String,
        /// When it is tried again.
        retry: Duration,
    },
    /// The tier is closed.
    Closed,
}

/// What a disk did since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCounts {
    /// Blocks served.
    pub hits: u64,
    /// Blocks asked for that were not there.
    pub absent: u64,
    /// Blocks that were damaged: found, dropped, not served.
    pub corrupt: u64,
    /// Requests to the disk that failed or stopped early.
    pub failed: u64,
    /// Requests to the disk that hung.
    pub hung: u64,
    /// Blocks written, those written again included.
    pub blocks_written: u64,
    /// Bytes written, with headers, padding and footers.
    pub bytes_written: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Requests that were refused because the queue was full.
    pub refused: u64,
    /// Times it was set aside.
    pub asides: u64,
}

/// How fast a disk answers, as it was seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DiskSpeed {
    /// From a request of a block to its bytes, in microseconds, with what queues before it.
    pub read_us: f64,
    /// Of one block, bytes a second.
    pub read_bytes_per_s: f64,
}

impl Default for DiskSpeed {
    fn default() -> Self {
        // A slow disk, until something is known.
        Self { read_us: 200.0, read_bytes_per_s: 1e9 }
    }
}

impl DiskSpeed {
    /// What reading so many bytes would take.
    #[must_use]
    pub fn restore_us(&self, bytes: u64) -> u64 {
        let us = self.read_us.max(bytes as f64 / self.read_bytes_per_s * 1e6);
        u64::try_from(Duration::try_from_secs_f64(us / 1e6).unwrap_or(Duration::MAX).as_micros())
            .unwrap_or(u64::MAX)
    }

    /// Learns from a read: an average that forgets by a sixteenth.
    pub(super) fn saw(&mut self, bytes: usize, took: Duration) {
        let us = took.as_secs_f64() * 1e6;
        self.read_us += (us - self.read_us) / 16.0;
        if bytes > 0 && us > 0.0 {
            self.read_bytes_per_s += (bytes as f64 / us * 1e6 - self.read_bytes_per_s) / 16.0;
        }
    }
}

pub(super) struct Queue {
    pub(super) requests: VecDeque<Request>,
    pub(super) put_bytes: u64,
    pub(super) state: DiskState,
    /// Until when what waits is still written, once the tier closes.
    pub(super) close_by: Option<Instant>,
    pub(super) waker: Option<Waker>,
}

/// What is known from writing and reading, for figures and for deciding.
pub(super) struct Notes {
    pub(super) counts: DiskCounts,
    pub(super) means: Means,
    pub(super) recovered: Recovered,
    pub(super) speed: DiskSpeed,
    pub(super) sightings: Sightings,
    pub(super) allowance: WriteAllowance,
}

pub(super) struct Shared {
    pub(super) queue: Mutex<Queue>,
    /// Empty while the disk is not ready.
    pub(super) log: Mutex<Log>,
    pub(super) notes: Mutex<Notes>,
    /// The disk's state changed, or the tier closes.
    pub(super) changed: Condvar,
    requests_max: usize,
    put_bytes_max: u64,
}

/// The log of a disk that is not ready.
pub(super) fn nothing() -> Log {
    Log::new(LogOptions { segment_bytes: 0, segments_max: 0, record_bytes: 0, entries_max: 0 }, 0, 0)
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("state", &self.queue.lock().state).finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn new(
        requests_max: usize,
        put_bytes_max: u64,
        names: usize,
        bytes_per_hour: Option<u64>,
    ) -> Self {
        let queue = Queue {
            requests: VecDeque::new(),
            put_bytes: 0,
            state: DiskState::Opening,
            close_by: None,
            waker: None,
        };
        let notes = Notes {
            counts: DiskCounts::default(),
            means: Means::default(),
            recovered: Recovered::default(),
            speed: DiskSpeed::default(),
            sightings: Sightings::new(names),
            allowance: WriteAllowance::new(bytes_per_hour, 0),
        };
        Self {
            queue: Mutex::new(queue),
            log: Mutex::new(nothing()),
            changed: Condvar::new(),
            notes: Mutex::new(notes),
            requests_max,
            put_bytes_max,
        }
    }

    /// Hands a request to the disk's thread, or refuses it at once.
    pub(super) fn ask(&self, request: Request) {
        let mut queue = self.queue.lock();
        let refusal = match &queue.state {
            _ if queue.close_by.is_some() => Some(Miss::Closed),
            DiskState::Closed => Some(Miss::Closed),
            DiskState::Aside { reason, .. } => Some(Miss::Aside { reason: reason.clone() }),
            DiskState::Opening | DiskState::Ready => {
                let bytes = queue.put_bytes.saturating_add(request.put_bytes());
                let is_full = queue.requests.len() >= self.requests_max
                    || (queue.put_bytes > 0 && bytes > self.put_bytes_max);
                is_full.then_some(Miss::Busy { waiting: queue.requests.len() })
            }
        };
        if let Some(miss) = refusal {
            drop(queue);
            if matches!(miss, Miss::Busy { .. }) {
                self.notes.lock().counts.refused += 1;
            }
            request.refuse(miss);
            return;
        }
        queue.put_bytes += request.put_bytes();
        queue.requests.push_back(request);
        let waker = queue.waker.clone();
        drop(queue);
        if let Some(waker) = waker {
            waker();
        }
    }

    /// All that waits; bytes of puts count until [`Shared::put_is_over`].
    pub(super) fn take_requests(&self) -> VecDeque<Request> {
        std::mem::take(&mut self.queue.lock().requests)
    }

    /// Answers all that waits without doing it.
    pub(super) fn refuse_all(&self, miss: &Miss) {
        for request in self.take_requests() {
            self.put_is_over(request.put_bytes());
            request.refuse(miss.clone());
        }
    }

    pub(super) fn put_is_over(&self, bytes: u64) {
        let mut queue = self.queue.lock();
        queue.put_bytes = queue.put_bytes.saturating_sub(bytes);
    }

    pub(super) fn contains(&self, key: &StoreKey) -> bool {
        self.log.lock().contains(key)
    }

    pub(super) fn is_ready(&self) -> bool {
        self.queue.lock().state == DiskState::Ready
    }

    /// Sees a block, and says whether it is worth a write.
    pub(super) fn offer(&self, key: &StoreKey, offer: &Offer, rule: AdmissionRule, now_ms: u64) -> Verdict {
        let mut notes = self.notes.lock();
        let uses = notes.sightings.saw(key);
        let candidate = Candidate {
            bytes: offer.bytes,
            uses,
            recompute_us: offer.recompute_us,
            restore_us: notes.speed.restore_us(offer.bytes),
            writable_bytes: notes.allowance.writable(now_ms),
        };
        drop(notes);
        let verdict = decide(&candidate, &rule);
        tracing::trace!(%key, ?candidate, ?rule, %verdict, "a block was offered to the disk tier");
        verdict
    }
}
