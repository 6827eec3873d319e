//! A region and a store of weights: stored from here, read from there to host memory or to the device.
//!
//! Apart because nothing depends on it: whatever is not stored, or not right there, comes from where it came from before. What is
//! read counts only once the hash of its extent is the recorded one (I8).

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use shoal_core::bytes::ByteCount;
use shoal_core::extent::{Extent, PageRun};
use shoal_core::ids::ExtentIndex;
use shoal_core::source::{SourceMap, SourcePiece};
use shoal_core::tier::Tier;
use shoal_device::{Event, Hasher, Mapping, Span};

use super::stage::index_of;
use super::{Region, SealReport, State};
use crate::arena::{Filled, HostCopy};
use crate::error::MemoryError;
use crate::store::Buffer;
use crate::weights::{
    FillReport, FillSpec, PART_BYTES, Stored, StoredExtent, WeightStore, WeightsError, cut,
};

/// Where a tensor lies in a region.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    /// Its first byte.
    pub offset: ByteCount,
    /// Its length.
    pub bytes: ByteCount,
    /// Where its bytes can be read again as well.
    pub source: Option<SourcePiece>,
}

/// Copies that are being read, of which so many are whole.
#[derive(Default)]
struct Copies {
    begun: Vec<HostCopy>,
    ended: usize,
}

/// Extents by address.
type Extents = Vec<(ExtentIndex, Extent)>;

fn by_address(state: &State) -> Extents {
    let mut extents: Extents = state.table.extents().map(|(index, extent, _)| (index, extent)).collect();
    extents.sort_by_key(|(_, extent)| extent.offset());
    extents
}

impl Region {
    /// Stores a sealed region under a name, with a note for whoever reads it. `tensors` say where pieces begin, so that what
    /// other models have too lies there once. It takes no turn: steps, wakes and sleeps go on.
    ///
    /// # Errors
    /// [`WeightsError`]: not sealed as a whole, bytes on the device alone, no room, or the disk's.
    pub fn store_in(
        &self,
        store: &WeightStore,
        name: &str,
        note: &str,
        tensors: &[StoredTensor],
        stop: &AtomicBool,
    ) -> Result<FillReport, WeightsError> {
        let extents = self.sealed_extents()?;
        let tensors: Vec<_> = tensors.iter().map(|tensor| (tensor.offset.0, tensor.bytes.0)).collect();
        let pieces = cut(extents.iter().map(|extent| extent.bytes).sum(), &tensors);
        let spec = FillSpec { name: name.to_owned(), note: note.to_owned(), extents, pieces };
        store.fill(&spec, stop, |offset, into| self.read_clean(offset, into))
    }

    /// Reads what is missing of this region from a store from now on, where no host copy is and its files would be read.
    ///
    /// # Errors
    /// [`WeightsError::OtherLayout`]: other bytes are stored, or cut another way.
    pub fn attach_stored(&self, stored: Arc<Stored>) -> Result<(), WeightsError> {
        if self.sealed_extents()? != stored.extents() {
            return Err(WeightsError::OtherLayout);
        }
        self.inner.state.lock().stored = Some(stored);
        Ok(())
    }

    /// Whether what no host copy holds is read from a store; not any more once that failed.
    #[must_use]
    pub fn reads_stored(&self) -> bool {
        self.inner.state.lock().stored.is_some()
    }

    /// Fills a region of which nothing was staged, in its order of use, and seals it: host copies as far as the budget has room,
    /// and from there on what its files hold too stays with them. It is attached then.
    ///
    /// # Errors
    /// [`WeightsError`]. The region is as it was.
    pub fn load_stored(
        &self,
        stored: &Arc<Stored>,
        tensors: &[StoredTensor],
    ) -> Result<SealReport, WeightsError> {
        let manager = self.manager();
        self.check_no_cache("load it")?;
        let sources = self.sources_of(tensors)?;
        let turn = manager.take_turn(manager.operation_deadline())?;
        let extents = self.empty_extents()?;
        let lengths = extents.iter().map(|(_, extent)| extent.bytes().0);
        if !lengths.eq(stored.extents().iter().map(|extent| extent.bytes)) {
            return Err(WeightsError::OtherLayout);
        }
        let in_files =
            |extent: Extent| sources.covers(extent.offset().0, (extent.offset() + extent.bytes()).0);
        // What no file holds has to have room. What is left of it is for the others, in order of use.
        let bytes =
            |extents: &mut dyn Iterator<Item = Extent>| -> ByteCount { extents.map(Extent::bytes).sum() };
        let needed =
            bytes(&mut extents.iter().map(|(_, extent)| *extent).filter(|extent| !in_files(*extent)));
        manager.make_host_room(needed);
        let (mut chosen, mut free) = (Vec::new(), manager.arena.free().saturating_sub(needed));
        for (place, (_, extent)) in extents.iter().enumerate() {
            if in_files(*extent) {
                if free < extent.bytes() {
                    continue;
                }
                free = free.saturating_sub(extent.bytes());
            }
            chosen.push(place);
        }
        manager.arena.expect(bytes(&mut chosen.iter().map(|place| extents[*place].1)));
        // Others go on while the disk is read: nothing of this region is there yet.
        drop(turn);
        let copies = self.read_copies(stored, &extents, &mut chosen, in_files)?;

        let _turn = manager.take_turn(manager.operation_deadline())?;
        if self.empty_extents()? != extents {
            return Err(WeightsError::OtherLayout);
        }
        let mut state = self.inner.state.lock();
        let mut report = SealReport::default();
        for (place, (index, extent)) in extents.iter().enumerate() {
            state.slot(*index).hash = Some(stored.extents()[place].hash);
            if in_files(*extent) {
                state.table.add_copy(*index, Tier::Source).map_err(self.table_error())?;
                report.in_source += extent.bytes();
            }
            report.extents += 1;
            report.bytes += extent.bytes();
        }
        for (place, copy) in chosen.into_iter().zip(copies) {
            let index = extents[place].0;
            state.slot(index).host = Some(copy);
            state.table.add_copy(index, Tier::Host).map_err(self.table_error())?;
        }
        (state.sources, state.stored, state.sealed) = (sources, Some(Arc::clone(stored)), true);
        Ok(report)
    }

    /// The extents of a region that has no bytes yet.
    fn empty_extents(&self) -> Result<Extents, MemoryError> {
        let state = self.inner.state.lock();
        let is_empty = state.table.extents().all(|(_, _, residency)| residency.valid().is_empty());
        if state.sealed || !is_empty {
            return Err(self.refuse("load it", "it has bytes already"));
        }
        Ok(by_address(&state))
    }

    /// Reads extents to host memory, and verifies them. Where the budget has no room after all, the last one so far that is in
    /// files as well is chosen no more.
    fn read_copies(
        &self,
        stored: &Stored,
        extents: &Extents,
        chosen: &mut Vec<usize>,
        in_files: impl Fn(Extent) -> bool,
    ) -> Result<Vec<HostCopy>, WeightsError> {
        let mut ended: Vec<HostCopy> = Vec::new();
        loop {
            let ranges: Vec<(u64, u64)> = chosen[ended.len()..]
                .iter()
                .map(|place| (extents[*place].1.offset().0, extents[*place].1.bytes().0))
                .collect();
            let hashes: Vec<u64> =
                chosen[ended.len()..].iter().map(|place| stored.extents()[*place].hash).collect();
            let (mut copies, outcome) = self.read_ranges(stored, &ranges, &hashes);
            let begun = ended.len() + copies.begun.len();
            copies.begun.truncate(copies.ended);
            ended.extend(copies.begun);
            match outcome {
                Ok(()) => return Ok(ended),
                Err(WeightsError::Memory(error @ MemoryError::HostBudget { .. })) => {
                    let may_stay = |at: &usize| in_files(extents[chosen[*at]].1);
                    let Some(at) = (0..chosen.len().min(begun + 1)).rev().find(may_stay) else {
                        return Err(error.into());
                    };
                    chosen.remove(at);
                    if at < ended.len() {
                        ended.remove(at);
                    }
                }
                Err(error) => return Err(dropped(stored, error)),
            }
        }
    }

    /// Reads ranges, each of which has a hash, to copies of their own, one after another.
    fn read_ranges(
        &self,
        stored: &Stored,
        ranges: &[(u64, u64)],
        expected: &[u64],
    ) -> (Copies, Result<(), WeightsError>) {
        let copies: RefCell<Copies> = RefCell::default();
        let mut hasher = Hasher::new();
        let outcome = stored.read(
            ranges,
            stored.depth(),
            PART_BYTES,
            |offset, bytes| {
                let begun = &mut copies.borrow_mut().begun;
                let begins = ranges.get(begun.len()).filter(|(from, _)| *from == offset);
                if let Some((_, length)) = begins {
                    begun.push(self.manager().arena.allocate(ByteCount(*length), Filled::ByHost)?);
                }
                let (from, _) = ranges[begun.len() - 1];
                let buffer = begun[begun.len() - 1].buffer();
                let view = buffer
                    .view_mut(ByteCount(offset - from), ByteCount(bytes as u64))
                    .map_err(MemoryError::device("read into host memory"))?;
                Ok(Buffer::HostMut(view))
            },
            |offset, bytes, buffer| {
                hasher.update(&buffer.as_slice()[..bytes]);
                let ended = &mut copies.borrow_mut().ended;
                let (from, length) = ranges[*ended];
                if offset + bytes as u64 == from + length {
                    if std::mem::take(&mut hasher).finish() != expected[*ended] {
                        return Err(WeightsError::Damaged { offset: from, bytes: ByteCount(length) });
                    }
                    *ended += 1;
                }
                Ok(())
            },
        );
        (copies.into_inner(), outcome)
    }

    /// Fills an extent's device memory from the store. Nothing where that failed: then it is not asked again.
    pub(super) fn read_from_store(
        &self,
        stored: &Stored,
        extent: Extent,
        expected: u64,
        mapping: &Arc<Mapping>,
    ) -> Option<Event> {
        match self.read_to_device(stored, extent, expected, mapping) {
            Ok(event) => Some(event),
            Err(error) => {
                let error = dropped(stored, error);
                tracing::warn!(%error, region = self.name(), "stored weights are not used; the files are read");
                self.inner.state.lock().stored = None;
                // What hangs may still write there: the next reader makes others.
                *self.manager().scratch.lock() = None;
                None
            }
        }
    }

    fn read_to_device(
        &self,
        stored: &Stored,
        extent: Extent,
        expected: u64,
        mapping: &Arc<Mapping>,
    ) -> Result<Event, WeightsError> {
        let manager = self.manager();
        let scratch = manager.scratch()?;
        let part_bytes = scratch.buffers[0].bytes().0.min(PART_BYTES);
        let per_buffer = index_of(scratch.buffers[0].bytes().0 / part_bytes);
        let slots = per_buffer * scratch.buffers.len();
        let slot = |number: usize| {
            let at = number % slots;
            (&scratch.buffers[at / per_buffer], ByteCount((at % per_buffer) as u64 * part_bytes))
        };
        let copied: RefCell<Vec<Option<Event>>> = RefCell::new((0..slots).map(|_| None).collect());
        let (asked, arrived) = (Cell::new(0), Cell::new(0));
        let mut hasher = Hasher::new();
        let outcome = stored.read(
            &[(extent.offset().0, extent.bytes().0)],
            slots.min(stored.depth()),
            part_bytes,
            |_, bytes| {
                let number = asked.replace(asked.get() + 1);
                if let Some(event) = copied.borrow_mut()[number % slots].take() {
                    self.await_copy(&event)?;
                }
                let (buffer, at) = slot(number);
                let view = buffer
                    .view_mut(at, ByteCount(bytes as u64))
                    .map_err(MemoryError::device("read into host memory"))?;
                Ok(Buffer::HostMut(view))
            },
            |offset, bytes, buffer| {
                hasher.update(&buffer.as_slice()[..bytes]);
                drop(buffer);
                let number = arrived.replace(arrived.get() + 1);
                let ((buffer, at), bytes) = (slot(number), ByteCount(bytes as u64));
                let target = Span::Device {
                    mapping: Arc::clone(mapping),
                    offset: ByteCount(offset) - extent.offset(),
                    bytes,
                };
                let event = manager
                    .up
                    .copy(Span::host(buffer, at, bytes), target)
                    .and_then(|()| manager.up.record())
                    .map_err(MemoryError::device("copy to the device"))?;
                copied.borrow_mut()[number % slots] = Some(event);
                Ok(())
            },
        );
        for event in copied.into_inner().into_iter().flatten() {
            self.await_copy(&event)?;
        }
        outcome?;
        if hasher.finish() != expected {
            return Err(WeightsError::Damaged { offset: extent.offset().0, bytes: extent.bytes() });
        }
        Ok(manager.up.record().map_err(MemoryError::device("copy to the device"))?)
    }

    /// Its extents with their hashes, if it has one of each.
    fn sealed_extents(&self) -> Result<Vec<StoredExtent>, WeightsError> {
        let state = self.inner.state.lock();
        let extents = by_address(&state);
        let all: Option<Vec<_>> = extents
            .into_iter()
            .map(|(index, extent)| {
                let hash = state.slots.get(&index)?.hash?;
                Some(StoredExtent { bytes: extent.bytes().0, hash })
            })
            .collect();
        let whole = all.filter(|all| {
            state.sealed && all.iter().map(|extent| extent.bytes).sum::<u64>() == self.bytes().0
        });
        drop(state);
        Ok(whole.ok_or_else(|| self.refuse("store", "it is not sealed as a whole"))?)
    }

    /// Copies bytes of host copies, or of files. They are as good as these; the caller compares hashes.
    fn read_clean(&self, offset: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let run = PageRun::covering(ByteCount(offset), ByteCount(into.len() as u64));
        let to = offset + into.len() as u64;
        let indices = self.inner.state.lock().table.extents_touching(run).map_err(self.table_error())?;
        for index in indices {
            let (extent, buffer) = {
                let mut state = self.inner.state.lock();
                let (extent, _) = state.table.extent(index).map_err(self.table_error())?;
                (extent, state.slot(index).host.as_ref().map(HostCopy::buffer))
            };
            let from = extent.offset().0.max(offset);
            let end = (extent.offset() + extent.bytes()).0.min(to);
            let part = &mut into[index_of(from - offset)..index_of(end - offset)];
            match buffer {
                Some(buffer) => buffer
                    .read(ByteCount(from) - extent.offset(), part)
                    .map_err(MemoryError::device("read host memory"))?,
                None if self
                    .inner
                    .state
                    .lock()
                    .sources
                    .covers(extent.offset().0, (extent.offset() + extent.bytes()).0) =>
                {
                    self.manager().files.read(&self.pieces_of(extent), from, part)?;
                }
                None => return Err(self.refuse("store", "some of its bytes are on the device alone")),
            }
        }
        Ok(())
    }

    fn sources_of(&self, tensors: &[StoredTensor]) -> Result<SourceMap, WeightsError> {
        let mut sources = SourceMap::default();
        for StoredTensor { offset, bytes, source } in tensors {
            self.check_range(*offset, *bytes)?;
            if let Some(piece) = source {
                let alignment = piece.conversion.alignment();
                if piece.bytes != *bytes
                    || !offset.0.is_multiple_of(alignment)
                    || !bytes.0.is_multiple_of(alignment)
                {
                    return Err(WeightsError::OtherLayout);
                }
            }
            sources.write(offset.0, bytes.0, source.clone());
        }
        Ok(sources)
    }
}

/// What is damaged is dropped where it lies, so that it is stored anew.
fn dropped(stored: &Stored, error: WeightsError) -> WeightsError {
    match error {
        WeightsError::Damaged { offset, bytes } => stored.drop_damaged(offset, bytes.0),
        other => other,
    }
}
