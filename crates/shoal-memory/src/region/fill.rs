//! Filling one extent's device memory: by a copy of what the host holds, or by reading its files (or what is stored of them:
//! [`super::stored`]).
//!
//! Apart because a copy is queued and goes on by itself, while a file is read here, piece by piece, and believed only
//! when its checksum is the recorded one (I8).

use std::sync::Arc;

use shoal_core::bytes::ByteCount;
use shoal_core::extent::Extent;
use shoal_core::page_table::PlannedMove;
use shoal_core::residency::Move;
use shoal_core::tier::Tier;
use shoal_device::{DeviceError, Event, Mapping, Span};

use super::Region;
use crate::arena::HostCopy;
use crate::error::MemoryError;
use crate::retire::Resident;

impl Region {
    /// Queues what fills an extent's memory. Reading from a file is done here, whole.
    pub(super) fn start_restore(
        &self,
        planned: PlannedMove,
        resident: &Resident,
    ) -> Result<Option<Event>, MemoryError> {
        let manager = self.manager();
        let (extent, host, hash, stored) = {
            let mut state = self.inner.state.lock();
            let extent = state.table.begin(planned).map_err(self.table_error())?;
            let stored = state.stored.clone();
            let slot = state.slot(planned.extent);
            (extent, slot.host.as_ref().map(HostCopy::buffer), slot.hash, stored)
        };
        let started = match (planned.step, host) {
            (Move::Zero, _) => Ok(None),
            (Move::Restore(Tier::Host), Some(buffer)) => manager
                .up
                .copy(Span::host(&buffer, ByteCount::ZERO, extent.bytes()), Span::mapping(&resident.mapping))
                .and_then(|()| manager.up.record())
                .map(Some)
                .map_err(MemoryError::device("copy to the device")),
            (Move::Restore(Tier::Source), _) if hash.is_none() => {
                Err(self
                    .refuse("wake from a file", "it is not sealed, so what is read cannot be verified (I8)"))
            }
            (Move::Restore(Tier::Source), _) => {
                let found = stored.zip(hash).and_then(|(stored, hash)| {
                    self.read_from_store(&stored, extent, hash, &resident.mapping)
                });
                found.map_or_else(|| self.read_from_source(extent, hash, &resident.mapping), Ok).map(Some)
            }
            _ => Err(self.refuse("restore", "a copy is not where the page table has it")),
        };
        if started.is_err() {
            self.inner.state.lock().table.abort(planned.extent).map_err(self.table_error())?;
        }
        started
    }

    /// Reads an extent from its files through two small buffers and compares its checksum (I8).
    fn read_from_source(
        &self,
        extent: Extent,
        expected: Option<u64>,
        mapping: &Arc<Mapping>,
    ) -> Result<Event, MemoryError> {
        let manager = self.manager();
        let pieces = self.pieces_of(extent);
        let scratch = manager.scratch()?;
        let mut events: [Option<Event>; 2] = [None, None];
        let mut hasher = shoal_device::Hasher::new();
        let mut done = ByteCount::ZERO;
        let mut turn = 0;
        while done < extent.bytes() {
            let buffer = &scratch.buffers[turn];
            if let Some(event) = events[turn].take() {
                self.await_copy(&event)?;
            }
            let bytes = buffer.bytes().min(extent.bytes() - done);
            let from = extent.offset() + done;
            buffer
                .access_mut(ByteCount::ZERO, bytes, |target| {
                    manager.files.read(&pieces, from.0, target).map(|()| hasher.update(target))
                })
                .map_err(MemoryError::device("read into host memory"))??;
            let target = Span::Device { mapping: Arc::clone(mapping), offset: done, bytes };
            let event = manager
                .up
                .copy(Span::host(buffer, ByteCount::ZERO, bytes), target)
                .and_then(|()| manager.up.record())
                .map_err(MemoryError::device("copy to the device"))?;
            events[turn] = Some(event);
            turn = 1 - turn;
            done += bytes;
        }
        let found = hasher.finish();
        if expected.is_some_and(|expected| expected != found) {
            let first = pieces.first().map(|placed| (Arc::clone(&placed.piece.path), placed.piece.offset));
            let (path, offset) = first.unwrap_or_default();
            let what = format!(
                "{} at offset {} of region {:?} read with hash {found:016x}, recorded {:016x}",
                extent.bytes(),
                extent.offset().0,
                self.name(),
                expected.unwrap_or_default()
            );
            return Err(MemoryError::SourceMismatch { path, offset, what });
        }
        for event in events.into_iter().flatten() {
            self.await_copy(&event)?;
        }
        manager.up.record().map_err(MemoryError::device("copy to the device"))
    }

    /// Waits for a copy to the device, as long as any copy may take.
    pub(super) fn await_copy(&self, event: &Event) -> Result<(), MemoryError> {
        let wait = self.manager().options.operation_wait;
        if event.wait(wait).map_err(MemoryError::device("copy to the device"))? {
            return Ok(());
        }
        let source = DeviceError::Timeout { what: "a copy", waited: wait };
        Err(MemoryError::Device { doing: "copy to the device", source })
    }
}
