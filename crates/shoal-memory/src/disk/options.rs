//! How a disk tier is set up.

use std::path::PathBuf;
use std::time::Duration;

use shoal_core::bytes::ByteCount;
use shoal_core::store::admission::AdmissionRule;
use shoal_core::store::format::{UNIT, footer_bytes};
use shoal_core::store::health::HealthRule;
use shoal_core::store::log::LogOptions;

use super::directory::Engine;
use super::error::DiskError;
use super::seal::DiskKey;

/// One disk of a tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// A directory of its own, on a disk of its own; made if it is not there.
    pub path: PathBuf,
    /// Most bytes on it.
    pub bytes: ByteCount,
    /// Most bytes written to it an hour, so that it lasts.
    pub write_bytes_per_hour: Option<ByteCount>,
}

impl DiskSpec {
    /// A disk without a limit of what is written to it.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, bytes: ByteCount) -> Self {
        Self { path: path.into(), bytes, write_bytes_per_hour: None }
    }
}

/// How a disk tier works. `default()` is what a server uses.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskOptions {
    /// Length of a segment of a directory that is made now (one that is there keeps its own): 64 to 256 MiB.
    pub segment_bytes: ByteCount,
    /// Most payload of a record of several blocks: 512 KiB to 2 MiB.
    pub record_bytes: ByteCount,
    /// Requests at a time on each disk.
    pub depth: usize,
    /// Requests that may wait for each disk.
    pub requests_max: usize,
    /// Bytes of puts that may wait for each disk.
    pub put_bytes_max: ByteCount,
    /// How long a block waits for others to share its record.
    pub linger: Duration,
    /// After how long a request counts as hung.
    pub io_deadline: Duration,
    /// How long reading what is there may take at start.
    pub open_deadline: Duration,
    /// Most blocks on each disk.
    pub entries_max: usize,
    /// How requests reach the disks.
    pub engine: Engine,
    /// Whether to go past the page cache where that is possible.
    pub wants_direct: bool,
    /// When a disk is set aside.
    pub health: HealthRule,
    /// What is worth a write.
    pub admission: AdmissionRule,
    /// What blocks are encrypted with; they lie there as they are without one.
    pub key: Option<DiskKey>,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            segment_bytes: ByteCount::mib(256),
            record_bytes: ByteCount::mib(1),
            depth: 32,
            requests_max: 4096,
            put_bytes_max: ByteCount::mib(256),
            linger: Duration::from_millis(2),
            io_deadline: Duration::from_secs(10),
            open_deadline: Duration::from_mins(2),
            entries_max: 4 << 20,
            engine: Engine::Auto,
            wants_direct: true,
            health: HealthRule::default(),
            admission: AdmissionRule::default(),
            key: None,
        }
    }
}

/// Segments that a small tier is cut into at least, as room is made segment by segment.
const SEGMENTS_MIN: u64 = 16;

impl DiskOptions {
    /// `default()`, with segments short enough for the smallest of these disks, but of 4 MiB at least.
    #[must_use]
    pub fn fitting(disks: &[DiskSpec]) -> Self {
        let options = Self::default();
        let smallest = disks.iter().map(|disk| disk.bytes.0 / SEGMENTS_MIN).min().unwrap_or(u64::MAX);
        let most = options.segment_bytes.0;
        let wanted = smallest.clamp(ByteCount::mib(4).0, most);
        // The power of two below it: segments begin where large requests do.
        let segment_bytes = ByteCount(1 << wanted.ilog2());
        let record_bytes = options.record_bytes.min(ByteCount(segment_bytes.0 / 2));
        Self { segment_bytes, record_bytes, ..options }
    }

    /// The log of a disk, in a directory whose segments are this long.
    ///
    /// # Errors
    /// `Options`, `TooSmall`.
    pub(super) fn log(&self, disk: &DiskSpec, segment_bytes: u64) -> Result<LogOptions, DiskError> {
        let path = || disk.path.clone();
        let wrong = |reason: &str| DiskError::Options { path: path(), reason: reason.to_owned() };
        if !segment_bytes.is_multiple_of(UNIT) || segment_bytes < 4 * UNIT + footer_bytes(1) {
            return Err(wrong("segment_bytes has to be a multiple of 4 KiB, 64 MiB to 256 MiB is usual"));
        }
        if self.record_bytes.0 < UNIT || self.record_bytes.0 > segment_bytes / 2 {
            return Err(wrong("record_bytes has to be from 4 KiB to half of segment_bytes"));
        }
        if self.depth == 0 || self.requests_max == 0 || self.entries_max == 0 {
            return Err(wrong("depth, requests_max and entries_max have to be at least 1"));
        }
        let segments = disk.bytes.0 / segment_bytes;
        if segments < 2 {
            let bytes_min = ByteCount(2 * segment_bytes);
            return Err(DiskError::TooSmall { path: path(), bytes: disk.bytes, bytes_min });
        }
        Ok(LogOptions {
            segment_bytes,
            segments_max: u32::try_from(segments).unwrap_or(u32::MAX),
            record_bytes: self.record_bytes.0,
            entries_max: self.entries_max,
        })
    }
}
