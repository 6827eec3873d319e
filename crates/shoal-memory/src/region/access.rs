//! Reading and writing what lies on the device, by copies: for tools and tests, not for a fast path.

use std::sync::Arc;

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_device::{HostBuffer, Span};

use super::Region;
use super::stage::index_of;
use crate::error::MemoryError;

impl Region {
    /// Reads bytes that lie on the device, or are on their way. Hold a guard: nothing else brings them there.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::State`] where there is no memory, [`MemoryError::Device`].
    pub fn read(&self, offset: ByteCount, into: &mut [u8]) -> Result<(), MemoryError> {
        self.check_range(offset, ByteCount(into.len() as u64))?;
        let mut from = offset;
        for part in into.chunks_mut(index_of(PAGE_BYTES.0)) {
            let mut left = part;
            while !left.is_empty() {
                let (span, bytes) = self.span_at(from, ByteCount(left.len() as u64))?;
                let (now, later) = left.split_at_mut(index_of(bytes.0));
                let buffer = self.bounce(bytes)?;
                self.copy_and_wait(span, Span::host(&buffer, ByteCount::ZERO, bytes))?;
                buffer.read(ByteCount::ZERO, now).map_err(MemoryError::device("read host memory"))?;
                from += bytes;
                left = later;
            }
        }
        Ok(())
    }

    /// Reads bytes from their copies on the host, without bringing anything anywhere. False: not all of them have one.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::Device`].
    pub fn read_host_copy(&self, offset: ByteCount, into: &mut [u8]) -> Result<bool, MemoryError> {
        self.check_range(offset, ByteCount(into.len() as u64))?;
        let (mut from, mut left) = (offset, into);
        while !left.is_empty() {
            let found = {
                let state = self.inner.state.lock();
                state.table.extent_at(from.0 / PAGE_BYTES.0).and_then(|index| {
                    let (extent, _) = state.table.extent(index).ok()?;
                    let host = state.slots.get(&index)?.host.as_ref()?;
                    Some((extent, host.buffer()))
                })
            };
            let Some((extent, buffer)) = found else { return Ok(false) };
            let within = from - extent.offset();
            let bytes = (extent.bytes() - within).min(ByteCount(left.len() as u64));
            let (now, later) = left.split_at_mut(index_of(bytes.0));
            buffer.read(within, now).map_err(MemoryError::device("read host memory"))?;
            from += bytes;
            left = later;
        }
        Ok(true)
    }

    /// Writes bytes that lie on the device. Hold a guard.
    ///
    /// # Errors
    /// As [`read`](Self::read); some of the bytes may be written then.
    pub fn write(&self, offset: ByteCount, bytes: &[u8]) -> Result<(), MemoryError> {
        self.check_range(offset, ByteCount(bytes.len() as u64))?;
        let (mut from, mut left) = (offset, bytes);
        while !left.is_empty() {
            let (span, length) = self.span_at(from, ByteCount(left.len() as u64).min(PAGE_BYTES))?;
            let (now, later) = left.split_at(index_of(length.0));
            let buffer = self.bounce(length)?;
            buffer.write(ByteCount::ZERO, now).map_err(MemoryError::device("write host memory"))?;
            self.copy_and_wait(Span::host(&buffer, ByteCount::ZERO, length), span)?;
            from += length;
            left = later;
        }
        Ok(())
    }

    fn bounce(&self, bytes: ByteCount) -> Result<Arc<HostBuffer>, MemoryError> {
        HostBuffer::allocate(&self.manager().device, bytes)
            .map_err(MemoryError::device("allocate host memory"))
    }

    /// The device memory from `offset` to the end of its extent, at most `bytes_max`.
    fn span_at(&self, offset: ByteCount, bytes_max: ByteCount) -> Result<(Span, ByteCount), MemoryError> {
        if let Some(found) = self.span_now(offset, bytes_max) {
            return Ok(found);
        }
        // Beside a wake, a range that it has queued may be used; it counts a little later.
        if let Some(wake) = self.waking() {
            let deadline = self.manager().operation_deadline();
            wake.shared().wait_counted(offset.0, offset.0 + 1, deadline);
        }
        self.span_now(offset, bytes_max)
            .ok_or_else(|| self.refuse("read or write", "there is no device memory"))
    }

    pub(super) fn span_now(&self, offset: ByteCount, bytes_max: ByteCount) -> Option<(Span, ByteCount)> {
        let state = self.inner.state.lock();
        let found = state.table.extent_at(offset.0 / PAGE_BYTES.0).and_then(|index| {
            let (extent, _) = state.table.extent(index).ok()?;
            Some((extent, state.mapping(index)?))
        });
        let (extent, mapping) = found?;
        let within = offset - extent.offset();
        let bytes = bytes_max.min(extent.bytes() - within);
        Some((Span::Device { mapping, offset: within, bytes }, bytes))
    }

    fn copy_and_wait(&self, source: Span, target: Span) -> Result<(), MemoryError> {
        let (stream, wait) = (&self.manager().down, self.manager().options.operation_wait);
        let done = stream.copy(source, target).and_then(|()| stream.synchronize(wait));
        if done.map_err(MemoryError::device("copy"))? {
            return Ok(());
        }
        Err(MemoryError::Deadline { doing: "a copy", waited: wait })
    }
}
