//! Copies of many small ranges between a region and host memory: an engine's KV blocks, as one job.
//!
//! Apart from [`super::access`], which is for tools: nothing is waited for here, and the copies go over the link at its
//! speed whatever their size ([`shoal_device::Stream::copy_many`]).

use std::sync::Arc;
use std::time::Duration;

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_device::{Event, HostBuffer, Span, Stream};

use super::Region;
use crate::error::MemoryError;

/// A range of a region, and the host memory that it is copied to or from.
#[derive(Clone, Debug)]
pub struct BlockCopy {
    /// Where it begins in the region.
    pub offset: ByteCount,
    /// Its length.
    pub bytes: ByteCount,
    /// Host memory of the same device.
    pub host: Arc<HostBuffer>,
    /// Where it begins there.
    pub host_offset: ByteCount,
}

impl Region {
    /// Queues copies from the device to the host, after `after` (what wrote the blocks), and says when they are done.
    /// Until then hold a guard, or the blocks could be evicted and written anew; the memory itself is held by the copies.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::State`] where there is no device memory, [`MemoryError::Device`]: a host
    /// range that is in use, or what the driver says. Nothing is copied then, except where the driver fails halfway.
    pub fn store_blocks(&self, blocks: &[BlockCopy], after: Option<&Event>) -> Result<Event, MemoryError> {
        let pairs = self.pairs(blocks)?;
        queue(&self.manager().down, &pairs, after, "copy blocks to the host")
    }

    /// Queues copies from the host to the device, after `after` (what still reads the blocks), and says when they are
    /// done. Until then hold a guard: what is evicted meanwhile may lack them.
    ///
    /// # Errors
    /// As [`store_blocks`](Self::store_blocks).
    pub fn load_blocks(&self, blocks: &[BlockCopy], after: Option<&Event>) -> Result<Event, MemoryError> {
        let mut pairs = self.pairs(blocks)?;
        for (source, target) in &mut pairs {
            std::mem::swap(source, target);
        }
        queue(&self.manager().up, &pairs, after, "copy blocks to the device")
    }

    /// Copies ranges within the region, each from the first offset to the second, and waits for them. Targets overlap
    /// nothing. Needs the turn, and that nobody uses them.
    ///
    /// # Errors
    /// [`MemoryError::State`] where there is no device memory, [`MemoryError::Device`], [`MemoryError::Deadline`]: copies may
    /// be under way still, and hold the memory that they touch.
    pub(crate) fn copy_within(
        &self,
        moves: &[(ByteCount, ByteCount, ByteCount)],
        wait: Duration,
    ) -> Result<(), MemoryError> {
        let (stream, doing) = (&self.manager().up, "move blocks on the device");
        let lacking = || self.refuse(doing, "there is no device memory");
        for (from, to, bytes) in moves {
            let (mut from, mut to, mut left) = (*from, *to, *bytes);
            while !left.is_zero() {
                let (source, length) = self.span_now(from, left).ok_or_else(lacking)?;
                let (target, length) = self.span_now(to, length).ok_or_else(lacking)?;
                let (source, _) = self.span_now(from, length).unwrap_or((source, length));
                stream.copy(source, target).map_err(MemoryError::device(doing))?;
                (from, to, left) = (from + length, to + length, left - length);
            }
        }
        if stream.synchronize(wait).map_err(MemoryError::device(doing))? {
            return Ok(());
        }
        Err(MemoryError::Deadline { doing, waited: wait })
    }

    /// Device and host span of each block; several where it reaches over extents.
    fn pairs(&self, blocks: &[BlockCopy]) -> Result<Vec<(Span, Span)>, MemoryError> {
        let mut pairs = Vec::with_capacity(blocks.len());
        // The extent of the block before: neighbours mostly lie in one.
        let mut known = None;
        let state = self.inner.state.lock();
        for block in blocks {
            self.check_range(block.offset, block.bytes)?;
            let (mut from, mut host, mut left) = (block.offset, block.host_offset, block.bytes);
            while !left.is_zero() {
                let holds = |start: ByteCount, end: ByteCount| start <= from && from < end;
                let (start, end, mapping) = match known.take() {
                    Some((start, end, mapping)) if holds(start, end) => (start, end, mapping),
                    _ => {
                        let found = state.table.extent_at(from.0 / PAGE_BYTES.0).and_then(|index| {
                            let (extent, _) = state.table.extent(index).ok()?;
                            let end = extent.offset() + extent.bytes();
                            Some((extent.offset(), end, state.mapping(index)?))
                        });
                        found.ok_or_else(|| self.refuse("copy blocks", "there is no device memory"))?
                    }
                };
                let bytes = left.min(end - from);
                let device = Span::Device { mapping: Arc::clone(&mapping), offset: from - start, bytes };
                pairs.push((device, Span::host(&block.host, host, bytes)));
                known = Some((start, end, mapping));
                (from, host, left) = (from + bytes, host + bytes, left - bytes);
            }
        }
        Ok(pairs)
    }
}

fn queue(
    stream: &Stream,
    pairs: &[(Span, Span)],
    after: Option<&Event>,
    doing: &'static str,
) -> Result<Event, MemoryError> {
    let waited = after.map_or(Ok(()), |event| stream.wait_for(event));
    let queued = waited.and_then(|()| stream.copy_many(pairs)).and_then(|()| stream.record());
    queued.map_err(MemoryError::device(doing))
}
