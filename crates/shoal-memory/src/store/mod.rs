//! What every tier below the device keeps blocks behind: put, get, contains, remove, by name.
//!
//! Apart because host, disk and remote tiers are one thing to whoever demotes and restores blocks. All calls come back at
//! once with a [`Ticket`]; queues have bounds and every ticket has a deadline (I10). What a tier gives is what was put, or
//! nothing: an error of a tier is a [`Miss`] (I8). Bytes never change under a name, so putting what is there already is
//! done at once, and nothing has to be invalidated.

mod batch;
mod buffer;
pub(crate) mod crew;
#[cfg(test)]
pub(crate) mod dice;
mod host;
mod lent;
mod slots;
mod stack;
pub(crate) mod ticket;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use shoal_device::HostBuffer;

pub use batch::{BatchOptions, Offered, get_all, put_all};
pub use buffer::{Aligned, Buffer, OnLoan};
pub use host::{HostOptions, HostTier, HostTierUsage};
pub use lent::Lent;
pub use shoal_core::store::admission::{AdmissionRule, Candidate, Verdict};
pub use shoal_core::store::key::{Fingerprint, StoreKey};
pub use stack::{Stack, StackCounts, StackOptions, TierCounts};
pub use ticket::{Promise, Ticket};

/// Why a block was not served, or not kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Miss {
    /// The tier does not have it.
    #[error("not here")]
    Absent,
    /// What was read is not what was put; it was dropped.
    #[error("damaged where it lay, and dropped")]
    Corrupt,
    /// It is encrypted, and with another key or there is none.
    #[error("encrypted with a key that is not here")]
    Locked,
    /// The disk, or whatever holds it, failed.
    #[error("{doing}: {reason}")]
    Failed {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        reason: String,
    },
    /// Not in time.
    #[error("not within its deadline")]
    Deadline,
    /// The one who asked asked no more.
    #[error("cancelled")]
    Cancelled,
    /// More is waiting than the tier keeps in its queue.
    #[error("{waiting} requests are waiting already")]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// The tier has no room, and nothing in it can make room.
    #[error("no room: {reason}")]
    NoRoom {
        /// Why.
        reason: String,
    },
    /// Longer than a block of this tier may be, or than the memory it is to be read to.
    #[error("{bytes} bytes, and at most {bytes_max} fit")]
    TooLong {
        /// Its length.
        bytes: u64,
        /// What fits.
        bytes_max: u64,
    },
    /// The disk failed too often and is left alone for now, or was never usable.
    #[error("set aside: {reason}")]
    Aside {
        /// Why.
        reason: String,
    },
    /// The tier is closed.
    #[error("closed")]
    Closed,
}

/// What became of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// It is there now.
    Written,
    /// It was there, or somebody else's put of it is done.
    Already,
}

/// A block that was read and verified.
#[derive(Debug)]
pub struct Fetched {
    /// The memory that was given for it; the block is its first `bytes`.
    pub buffer: Buffer,
    /// The block's length.
    pub bytes: usize,
}

impl Fetched {
    /// The block.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        self.buffer.as_slice().get(..self.bytes).unwrap_or_default()
    }
}

/// A block where it lies in a tier's memory. What the tier forgets meanwhile stays until this is dropped.
#[derive(Clone)]
pub struct Held(Arc<dyn AsRef<[u8]> + Send + Sync>);

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("bytes", &self.as_slice().len()).finish()
    }
}

impl Held {
    /// Holds on to a block.
    #[must_use]
    pub fn new(block: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        Self(block)
    }

    /// The block.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

/// What is known of a block that is offered to a tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// Its length.
    pub bytes: u64,
    /// What computing it again would take, where that is known.
    pub recompute_us: Option<u64>,
}

/// A tier that keeps blocks by name.
pub trait Store: fmt::Debug + Send + Sync {
    /// What it is called in logs and figures.
    fn name(&self) -> &str;

    /// Whether it has the block, as far as it knows without reading: a [`Store::get`] may still miss.
    fn contains(&self, key: &StoreKey) -> bool;

    /// Whether it has the block where it keeps blocks longest, so that nothing would be won by putting it again.
    fn is_kept(&self, key: &StoreKey) -> bool {
        self.contains(key)
    }

    /// Whether reading the block now makes it faster to read later: a slow part of the tier has it, and a fast one has not.
    fn would_rise(&self, key: &StoreKey) -> bool {
        let _ = key;
        false
    }

    /// What it is made of, the fastest first, as people call it: what [`Store::part_of`] counts by.
    fn parts(&self) -> Vec<String> {
        vec![self.name().to_owned()]
    }

    /// The fastest part that has the block, as far as it knows without reading.
    fn part_of(&self, key: &StoreKey) -> Option<usize> {
        self.contains(key).then_some(0)
    }

    /// Which of these blocks it has, as [`Store::contains`] says of each.
    fn contains_each(&self, keys: &[StoreKey]) -> Vec<bool> {
        keys.iter().map(|key| self.contains(key)).collect()
    }

    /// [`Store::part_of`] of these blocks, up to the first that none has.
    fn parts_of(&self, keys: &[StoreKey]) -> Vec<usize> {
        keys.iter().map_while(|key| self.part_of(key)).collect()
    }

    /// Whether it knows of blocks only after it has asked somebody else, as in [`Store::look_for`].
    fn must_look(&self) -> bool {
        false
    }

    /// Finds out which of these blocks of a sequence it has, as far as it does not know, up to the first that nobody has. Waits
    /// for that until the deadline; what is not known by then is not there.
    fn look_for(&self, keys: &[StoreKey], deadline: Duration) {
        let _ = (keys, deadline);
    }

    /// Bytes that a part has to move before what is asked of it now.
    fn queued_bytes(&self, part: usize) -> u64 {
        let _ = part;
        0
    }

    /// Notes that the block was seen, and says whether it is worth a [`Store::put`]. The answer binds nobody.
    fn offer(&self, key: &StoreKey, offer: &Offer) -> Verdict;

    /// Keeps `bytes`, the first of `source`, which is given back (dropped) when they are written or given up.
    fn put(&self, key: StoreKey, source: Buffer, bytes: usize, deadline: Duration) -> Ticket<Stored>;

    /// Reads a block to `target`, verified. Where the ticket ends as a miss, the memory is dropped as soon as no transfer
    /// touches it any more.
    fn get(&self, key: StoreKey, target: Buffer, deadline: Duration) -> Ticket<Fetched>;

    /// The block where it lies, verified, if that is in memory. It takes as long as a checksum of it.
    fn hold(&self, key: &StoreKey) -> Option<Held> {
        let _ = key;
        None
    }

    /// The block where it lies, to be copied from there and verified meanwhile, if that is in page-locked memory.
    fn lend(&self, key: &StoreKey) -> Option<Lent<'_>> {
        let _ = key;
        None
    }

    /// [`Store::lend`] of each of these blocks.
    fn lend_each(&self, keys: &[StoreKey]) -> Vec<Option<Lent<'_>>> {
        keys.iter().map(|key| self.lend(key)).collect()
    }

    /// Page-locked memory for a block of so many bytes, which a [`Store::put`] of that length keeps as it is, where there is
    /// such. It may hold anything, and is free again when nobody has it. What a [`Store::get`] read to it comes back lent for
    /// reading, because a tier may have kept it.
    fn room(&self, bytes: usize) -> Option<Arc<HostBuffer>> {
        let _ = bytes;
        None
    }

    /// Whether memory is what [`Store::room`] gave.
    fn is_own(&self, memory: &HostBuffer) -> bool {
        let _ = memory;
        false
    }

    /// Forgets a block: from now on it is not served, and once the ticket is done not after a restart either. Whether there
    /// was one.
    fn remove(&self, key: StoreKey, deadline: Duration) -> Ticket<bool>;

    /// Writes out what was put before, past every cache of the system.
    fn flush(&self, deadline: Duration) -> Ticket<()>;
}
