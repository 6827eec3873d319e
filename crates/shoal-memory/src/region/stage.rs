//! Filling a region without device memory, and sealing it: from then on every extent's checksum is known and its copies
//! off the device count as clean.

use shoal_core::bytes::ByteCount;
use shoal_core::extent::{Extent, PageRun};
use shoal_core::ids::ExtentIndex;
use shoal_core::residency::TierSet;
use shoal_core::source::{PlacedPiece, SourcePiece};
use shoal_core::tier::Tier;

use super::Region;
use crate::arena::{Filled, HostCopy};
use crate::error::MemoryError;

/// What sealing found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SealReport {
    /// Extents with bytes.
    pub extents: usize,
    /// Their bytes.
    pub bytes: ByteCount,
    /// Bytes that can be read from a file again.
    pub in_source: ByteCount,
}

pub(super) const READ_BYTES: usize = 1 << 20;

impl Region {
    /// Writes bytes of a region that is not on the device there. They go to the host tier; where its budget has no
    /// room, extents whose bytes all come from files stay with the files. `source` says which file holds the bytes; it
    /// is read and compared before it is believed.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::State`] (sealed, on the device, a KV cache's, misaligned for its conversion),
    /// [`MemoryError::SourceMismatch`], [`MemoryError::SourceRead`], [`MemoryError::HostBudget`],
    /// [`MemoryError::Device`]. Extents written before the failing one hold the new bytes; staging again is safe.
    pub fn stage(
        &self,
        offset: ByteCount,
        bytes: &[u8],
        source: Option<SourcePiece>,
    ) -> Result<(), MemoryError> {
        let length = ByteCount(bytes.len() as u64);
        self.check_range(offset, length)?;
        self.check_no_cache("stage")?;
        if bytes.is_empty() {
            return Ok(());
        }
        if let Some(piece) = &source {
            let alignment = piece.conversion.alignment();
            if piece.bytes != length
                || !offset.0.is_multiple_of(alignment)
                || !length.0.is_multiple_of(alignment)
            {
                return Err(self.refuse(
                    "stage from a file",
                    "the piece has another length, or its conversion another alignment",
                ));
            }
            self.manager().files.verify(piece, bytes)?;
        }
        let _turn = self.manager().take_turn(self.manager().operation_deadline())?;
        let extents = self.stageable(offset, length)?;
        let mut fresh = Vec::new();
        for (index, extent) in &extents {
            if let Some(copy) = self.host_for_staging(*index, *extent, source.is_some())? {
                fresh.push((*index, copy));
            }
        }
        let mut state = self.inner.state.lock();
        for (index, copy) in fresh {
            state.slot(index).host = Some(copy);
        }
        for (index, extent) in &extents {
            let from = extent.offset().0.max(offset.0);
            let to = (extent.offset() + extent.bytes()).0.min((offset + length).0);
            let part = &bytes[index_of(from - offset.0)..index_of(to - offset.0)];
            let buffer = state.slot(*index).host.as_ref().map(HostCopy::buffer);
            let tier = if let Some(buffer) = buffer {
                buffer
                    .write(ByteCount(from - extent.offset().0), part)
                    .map_err(MemoryError::device("write host memory"))?;
                Tier::Host
            } else {
                Tier::Source
            };
            state.table.add_copy(*index, tier).map_err(self.table_error())?;
            if tier == Tier::Host && !state.sealed {
                // Until it is sealed the host copy is what counts: a file may hold only part of the extent.
                let _ = state.table.remove_copy(*index, Tier::Source);
            }
        }
        state.sources.write(offset.0, length.0, source);
        Ok(())
    }

    /// Records the checksum of every extent. From here on the copies off the device are clean: sleeping is unmapping.
    ///
    /// # Errors
    /// [`MemoryError::State`] if it is sealed; what reading the bytes failed with. It stays unsealed then.
    pub fn seal(&self) -> Result<SealReport, MemoryError> {
        let _turn = self.manager().take_turn(self.manager().operation_deadline())?;
        let extents: Vec<_> = {
            let state = self.inner.state.lock();
            if state.sealed {
                return Err(self.refuse("seal", "it is sealed"));
            }
            state.table.extents().filter(|(_, _, residency)| !residency.valid().is_empty()).collect()
        };
        let mut report = SealReport::default();
        let mut sealed = Vec::with_capacity(extents.len());
        for (index, extent, residency) in extents {
            let hash = self.hash_of(index, extent, residency.valid())?;
            let (from, to) = (extent.offset().0, (extent.offset() + extent.bytes()).0);
            let in_source = residency.valid().without(Tier::Device).fastest().is_some()
                && self.inner.state.lock().sources.covers(from, to);
            report.extents += 1;
            report.bytes += extent.bytes();
            if in_source {
                report.in_source += extent.bytes();
            }
            sealed.push((index, hash, in_source));
        }
        let mut state = self.inner.state.lock();
        for (index, hash, in_source) in sealed {
            state.slot(index).hash = Some(hash);
            if in_source {
                state.table.add_copy(index, Tier::Source).map_err(self.table_error())?;
            }
        }
        state.sealed = true;
        Ok(report)
    }

    /// [`seal`](Self::seal), also of a region that is sealed: then of the extents that came since.
    pub(crate) fn seal_more(&self) -> Result<SealReport, MemoryError> {
        if !self.inner.state.lock().sealed {
            return self.seal();
        }
        let _turn = self.manager().take_turn(self.manager().operation_deadline())?;
        let fresh: Vec<_> = {
            let state = self.inner.state.lock();
            let has_hash = |index| state.slots.get(&index).is_some_and(|slot| slot.hash.is_some());
            let extents = state.table.extents().filter(|(_, _, residency)| !residency.valid().is_empty());
            extents.filter(|(index, ..)| !has_hash(*index)).collect()
        };
        let mut report = SealReport::default();
        for (index, extent, residency) in fresh {
            let hash = self.hash_of(index, extent, residency.valid())?;
            self.inner.state.lock().slot(index).hash = Some(hash);
            report.extents += 1;
            report.bytes += extent.bytes();
        }
        Ok(report)
    }

    pub(crate) fn check_range(&self, offset: ByteCount, bytes: ByteCount) -> Result<(), MemoryError> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes()) {
            let (region, region_bytes) = (self.name().to_owned(), self.bytes());
            return Err(MemoryError::OutOfRange { region, offset, bytes, region_bytes });
        }
        Ok(())
    }

    /// The pieces that fill an extent.
    pub(super) fn pieces_of(&self, extent: Extent) -> Vec<PlacedPiece> {
        let (from, to) = (extent.offset().0, (extent.offset() + extent.bytes()).0);
        self.inner.state.lock().sources.pieces(from, to).to_vec()
    }

    fn stageable(
        &self,
        offset: ByteCount,
        length: ByteCount,
    ) -> Result<Vec<(ExtentIndex, Extent)>, MemoryError> {
        let run = PageRun::covering(offset, length);
        let state = self.inner.state.lock();
        if state.sealed {
            return Err(self.refuse("stage", "it is sealed"));
        }
        if !state.table.uncovered(run).map_err(self.table_error())?.is_empty() {
            return Err(self.refuse("stage", "only weights are staged; commit other regions and write there"));
        }
        let mut extents = Vec::new();
        for index in state.table.extents_touching(run).map_err(self.table_error())? {
            let (extent, residency) = state.table.extent(index).map_err(self.table_error())?;
            if residency.valid().has(Tier::Device) || residency.under_way().is_some() {
                return Err(self.refuse("stage", "it is on the device; write there"));
            }
            extents.push((index, extent));
        }
        Ok(extents)
    }

    /// Host memory for an extent that has none yet, filled with what its files hold so far; nothing if the extent has
    /// host memory, or may stay with its files because there is no room.
    fn host_for_staging(
        &self,
        index: ExtentIndex,
        extent: Extent,
        is_sourced: bool,
    ) -> Result<Option<HostCopy>, MemoryError> {
        let manager = self.manager();
        let with_files = {
            let mut state = self.inner.state.lock();
            if state.slot(index).host.is_some() {
                return Ok(None);
            }
            state.table.extent(index).map_err(self.table_error())?.1.valid().has(Tier::Source)
        };
        if with_files && is_sourced {
            return Ok(None);
        }
        if !is_sourced {
            manager.make_host_room(extent.bytes());
        }
        // Files are mostly read from the first byte to the last.
        manager.arena.expect(self.bytes().saturating_sub(extent.offset()));
        let copy = match manager.arena.allocate(extent.bytes(), Filled::ByHost) {
            Ok(copy) => copy,
            Err(MemoryError::HostBudget { .. }) if is_sourced => return Ok(None),
            Err(error) => return Err(error),
        };
        if with_files {
            let pieces = self.pieces_of(extent);
            copy.buffer()
                .access_mut(ByteCount::ZERO, extent.bytes(), |target| {
                    manager.files.read(&pieces, extent.offset().0, target)
                })
                .map_err(MemoryError::device("write host memory"))??;
        }
        Ok(Some(copy))
    }

    fn hash_of(&self, index: ExtentIndex, extent: Extent, valid: TierSet) -> Result<u64, MemoryError> {
        let manager = self.manager();
        match valid.fastest() {
            Some(Tier::Device) => {
                let mapping = self.inner.state.lock().mapping(index);
                let mapping = mapping.ok_or_else(|| self.refuse("seal", "an extent lost its memory"))?;
                manager
                    .down
                    .hash(shoal_device::Span::mapping(&mapping))
                    .and_then(|ticket| ticket.wait(manager.options.operation_wait))
                    .map_err(MemoryError::device("hash device memory"))
            }
            Some(Tier::Host) => {
                let buffer = self.inner.state.lock().slot(index).host.as_ref().map(HostCopy::buffer);
                let buffer = buffer.ok_or_else(|| self.refuse("seal", "an extent lost its host copy"))?;
                buffer
                    .access(ByteCount::ZERO, extent.bytes(), shoal_device::hash_bytes)
                    .map_err(MemoryError::device("read host memory"))
            }
            _ => {
                let pieces = self.pieces_of(extent);
                let mut hasher = shoal_device::Hasher::new();
                let mut chunk = vec![0; READ_BYTES.min(index_of(extent.bytes().0))];
                let (mut from, end) = (extent.offset().0, (extent.offset() + extent.bytes()).0);
                while from < end {
                    manager.files.read(&pieces, from, &mut chunk)?;
                    hasher.update(&chunk);
                    from += chunk.len() as u64;
                }
                Ok(hasher.finish())
            }
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "offsets within a slice of this process, which has 64 bits"
)]
pub(super) const fn index_of(bytes: u64) -> usize {
    bytes as usize
}
