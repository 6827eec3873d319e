//! Why something was not done. Every variant carries fields; [`MemoryError::kind`] is for machines.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use shoal_core::bytes::ByteCount;
use shoal_core::kv::backing::BackingError;
use shoal_core::kv::layout::LayoutError;
use shoal_core::kv::state::KvError;
use shoal_core::page_table::TableError;
use shoal_core::protocol::LeaseKind;
use shoal_device::DeviceError;

/// Why a lease was not granted. Nothing was granted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// Whoever grants says no.
    #[error("{requested} for {kind:?} refused: {reason}")]
    Denied {
        /// What for.
        kind: LeaseKind,
        /// Bytes asked for.
        requested: ByteCount,
        /// Why, in a sentence with numbers.
        reason: String,
    },
    /// No answer in time; the request was withdrawn.
    #[error("{requested} for {kind:?} were not granted within {waited:?}")]
    Deadline {
        /// What for.
        kind: LeaseKind,
        /// Bytes asked for.
        requested: ByteCount,
        /// How long was waited.
        waited: Duration,
    },
    /// The control socket is closed.
    #[error("the server is gone: {reason}")]
    Disconnected {
        /// What was seen.
        reason: String,
    },
    /// More requests at once than the client keeps.
    #[error("{limit} lease requests are waiting already")]
    TooMany {
        /// The bound.
        limit: usize,
    },
}

/// What to do about a [`MemoryError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The device has no room within what was leased.
    OutOfMemory,
    /// The lease was not granted.
    Lease,
    /// The host budget has no room.
    HostBudget,
    /// A region is not in a state for this, or a range is wrong.
    Region,
    /// A deadline passed or the transfer was cancelled.
    Transfer,
    /// Bytes read from a file are not those that were recorded.
    Source,
    /// KV block ids are wrong.
    Blocks,
    /// The device failed.
    Device,
    /// The control socket failed.
    Broker,
}

/// Why something was not done. Bytes are where they were before, unless a variant says otherwise.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The device failed, or has no memory.
    #[error("{doing}: {source}")]
    Device {
        /// What was being done.
        doing: &'static str,
        /// What the device said.
        source: DeviceError,
    },
    /// No lease.
    #[error("region {region:?}: {source}")]
    Lease {
        /// The region that needed it.
        region: String,
        /// Why not.
        source: LeaseError,
    },
    /// The host budget has no room for a copy, and nothing in it can be read again from a file.
    #[error("{needed} of host memory needed, {free} left of a budget of {budget}: raise host_budget to at least {}", *budget + needed.saturating_sub(*free))]
    HostBudget {
        /// What is needed.
        needed: ByteCount,
        /// What is left.
        free: ByteCount,
        /// The budget.
        budget: ByteCount,
    },
    /// A range outside its region.
    #[error("{bytes} at offset {} lie outside region {region:?} of {region_bytes}", offset.0)]
    OutOfRange {
        /// The region.
        region: String,
        /// The range's start.
        offset: ByteCount,
        /// Its length.
        bytes: ByteCount,
        /// The region's length.
        region_bytes: ByteCount,
    },
    /// The region is not in a state for this.
    #[error("region {region:?}: cannot {doing}: {why}")]
    State {
        /// The region.
        region: String,
        /// What was asked.
        doing: &'static str,
        /// What stands in the way.
        why: &'static str,
    },
    /// The page table refused (a bug in this crate, or a range nobody checked).
    #[error("region {region:?}: {source}")]
    Table {
        /// The region.
        region: String,
        /// What it said.
        source: TableError,
    },
    /// A file that bytes were to be read from again cannot be read.
    #[error("{}: {source}", path.display())]
    SourceRead {
        /// The file.
        path: Arc<PathBuf>,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// A file no longer holds the bytes that were first read from it (I8). The region stays asleep and intact.
    #[error("{} at byte {offset}: {what}; restore the file as it was when the model was loaded, or load the model again", path.display())]
    SourceMismatch {
        /// The file.
        path: Arc<PathBuf>,
        /// Where the bytes start in the file.
        offset: u64,
        /// What differs.
        what: String,
    },
    /// Inside a guard nothing is brought back: whoever would give the memory up may wait for that guard to end.
    #[error(
        "{missing} of region {region:?} and those after it are missing, and this thread holds a guard already: enter one guard over all that the step needs"
    )]
    NestedGuard {
        /// The first region of which something is missing.
        region: String,
        /// What is missing in all.
        missing: ByteCount,
    },
    /// A deadline passed.
    #[error("{doing} was not done within {waited:?}")]
    Deadline {
        /// What was waited for.
        doing: &'static str,
        /// How long.
        waited: Duration,
    },
    /// Memory that was given up at these addresses is mapped still: something holds it, or the device refuses. Nothing was
    /// changed, and the next operation asks for that memory again.
    #[error(
        "region {region:?}: what was given up at these addresses could not be unmapped within {waited:?}, so nothing can be mapped there yet"
    )]
    StillMapped {
        /// The region.
        region: String,
        /// How long was waited; hardly at all where the device refuses.
        waited: Duration,
    },
    /// The transfer was cancelled. What was brought back before stays.
    #[error("cancelled after {done} of {total}")]
    Cancelled {
        /// Bytes done.
        done: ByteCount,
        /// Bytes in all.
        total: ByteCount,
    },
    /// More transfers at once than the manager keeps.
    #[error("{limit} transfers are under way already")]
    TooManyTransfers {
        /// The bound.
        limit: usize,
    },
    /// Wrong KV block ids; nothing was changed (I7).
    #[error(transparent)]
    Blocks(#[from] BackingError),
    /// A KV cache refused: wrong ids, a wrong group, a wrong limit.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// A KV cache cannot be laid out like this.
    #[error(transparent)]
    KvLayout(#[from] LayoutError),
    /// The control socket cannot be used.
    #[error("control socket {}: {what}", path.display())]
    Broker {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

impl MemoryError {
    /// What to do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Device { source, .. } if source.kind() == shoal_device::ErrorKind::OutOfMemory => {
                ErrorKind::OutOfMemory
            }
            Self::Device { .. } => ErrorKind::Device,
            Self::Lease { .. } => ErrorKind::Lease,
            Self::HostBudget { .. } => ErrorKind::HostBudget,
            Self::OutOfRange { .. } | Self::State { .. } | Self::Table { .. } | Self::NestedGuard { .. } => {
                ErrorKind::Region
            }
            Self::SourceRead { .. } | Self::SourceMismatch { .. } => ErrorKind::Source,
            Self::Deadline { .. }
            | Self::StillMapped { .. }
            | Self::Cancelled { .. }
            | Self::TooManyTransfers { .. } => ErrorKind::Transfer,
            Self::Blocks(_) | Self::Kv(_) | Self::KvLayout(_) => ErrorKind::Blocks,
            Self::Broker { .. } => ErrorKind::Broker,
        }
    }

    /// Whether it only came too late, so that the same may be had by and by.
    pub(crate) const fn is_late(&self) -> bool {
        matches!(self, Self::Deadline { .. } | Self::StillMapped { .. })
    }

    pub(crate) fn device(doing: &'static str) -> impl FnOnce(DeviceError) -> Self {
        move |source| Self::Device { doing, source }
    }
}
