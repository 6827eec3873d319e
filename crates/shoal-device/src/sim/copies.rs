//! Many copies as the simulated device does them: joined as a GPU would have them, one after another.

use shoal_core::bytes::ByteCount;
use shoal_core::copy_plan::{Run, coalesce};

use crate::device::{RawCopy, RawSpan, Space};
use crate::error::DeviceError;

const SPACES: [Space; 2] = [Space::Host, Space::Device];

/// The same copies in as few parts as there are.
pub(super) fn joined(copies: &[RawCopy]) -> Result<Vec<(RawSpan, RawSpan)>, DeviceError> {
    for copy in copies {
        let (source_bytes, target_bytes) = (copy.source.bytes, copy.target.bytes);
        if source_bytes != target_bytes {
            return Err(DeviceError::LengthMismatch { source_bytes, target_bytes });
        }
    }
    let mut parts = Vec::new();
    for (from, to) in SPACES.into_iter().flat_map(|from| SPACES.map(|to| (from, to))) {
        let between = copies.iter().filter(|copy| (copy.source.space, copy.target.space) == (from, to));
        let run = |copy: &RawCopy| Run {
            source: copy.source.at,
            target: copy.target.at,
            bytes: copy.source.bytes.0,
            seam: 0,
        };
        let mut runs: Vec<Run> = between.map(run).collect();
        coalesce(&mut runs);
        parts.extend(runs.into_iter().map(|run| {
            let span = |space, at| RawSpan { space, at, bytes: ByteCount(run.bytes) };
            (span(from, run.source), span(to, run.target))
        }));
    }
    Ok(parts)
}
