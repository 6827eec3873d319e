//! Page-locked memory for blocks: pieces of a host arena, cut into slots of one length each.
//!
//! Apart because locking memory is slow and an arena gives powers of two, while blocks come one by one and are a little
//! longer than those. A piece serves blocks of one length, and goes back when its last block has gone. A slot is a buffer of
//! its own that whoever has it keeps, a copy under way too (I5); all of them together never exceed the arena (I1).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::store::format::padded;
use shoal_device::HostBuffer;

use crate::arena::{ArenaPart, HostArena};
use crate::error::{ErrorKind, MemoryError};

/// The longest piece: what is left over at its end is little then, and another one is soon made.
const PIECE_BYTES_MAX: u64 = 256 << 20;

/// A piece, by the number it has.
struct Piece {
    part: Arc<ArenaPart>,
    slot_bytes: u64,
    /// Slots that nobody has.
    free: Vec<u32>,
    slots: u32,
}

#[derive(Default)]
struct State {
    pieces: BTreeMap<u64, Piece>,
    pieces_made: u64,
    /// By the length of their slots: pieces that have a free one.
    open: BTreeMap<u64, BTreeSet<u64>>,
    /// Bytes of slots that somebody has.
    taken_bytes: u64,
}

struct Shared {
    state: Mutex<State>,
    process: u32,
}

/// Slots of one arena.
pub(super) struct SlotPool {
    shared: Arc<Shared>,
    arena: Arc<HostArena>,
    bytes_max: u64,
}

impl fmt::Debug for SlotPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotPool").field("taken_bytes", &self.taken_bytes()).finish_non_exhaustive()
    }
}

/// A slot that somebody has. Dropping it makes the slot free.
struct SlotClaim {
    shared: Arc<Shared>,
    piece: u64,
    slot: u32,
}

impl Drop for SlotClaim {
    fn drop(&mut self) {
        // In a fork the memory is the parent's, and somebody may have held the lock.
        if std::process::id() == self.shared.process {
            // Not under the lock: the arena hears of a piece that goes.
            let gone = self.shared.state.lock().give(self.piece, self.slot);
            drop(gone);
        }
    }
}

impl State {
    /// A free slot of this length, if there is one: of the oldest piece that has one, so that the others drain.
    fn take(&mut self, slot_bytes: u64) -> Option<(u64, u32, Arc<ArenaPart>)> {
        let open = self.open.get_mut(&slot_bytes)?;
        let number = *open.first()?;
        let piece = self.pieces.get_mut(&number)?;
        let slot = piece.free.pop()?;
        if piece.free.is_empty() {
            open.remove(&number);
        }
        self.taken_bytes += slot_bytes;
        Some((number, slot, Arc::clone(&piece.part)))
    }

    /// Gives a slot back, and the piece if that was its last.
    fn give(&mut self, number: u64, slot: u32) -> Option<Piece> {
        let piece = self.pieces.get_mut(&number)?;
        let slot_bytes = piece.slot_bytes;
        piece.free.push(slot);
        let is_empty = piece.free.len() == piece.slots as usize;
        self.taken_bytes -= slot_bytes;
        let open = self.open.entry(slot_bytes).or_default();
        if !is_empty {
            open.insert(number);
            return None;
        }
        open.remove(&number);
        if open.is_empty() {
            self.open.remove(&slot_bytes);
        }
        self.pieces.remove(&number)
    }

    /// Enters a piece, whose first slot is the caller's.
    fn add(&mut self, part: ArenaPart, slot_bytes: u64) -> (u64, u32, Arc<ArenaPart>) {
        let slots = u32::try_from(part.bytes().0 / slot_bytes).unwrap_or(u32::MAX);
        let (number, part) = (self.pieces_made, Arc::new(part));
        self.pieces_made += 1;
        // The first one is taken from the end.
        let free: Vec<u32> = (1..slots).rev().collect();
        if !free.is_empty() {
            self.open.entry(slot_bytes).or_default().insert(number);
        }
        self.pieces.insert(number, Piece { part: Arc::clone(&part), slot_bytes, free, slots });
        self.taken_bytes += slot_bytes;
        (number, 0, part)
    }
}

/// The shortest piece of memory with a slot of so many bytes.
fn piece_bytes_min(slot_bytes: u64) -> u64 {
    slot_bytes.next_multiple_of(PAGE_BYTES.0).next_power_of_two()
}

impl SlotPool {
    /// Of all of an arena of so many bytes. Memory comes piece by piece.
    pub(super) fn new(arena: Arc<HostArena>, bytes_max: ByteCount) -> Self {
        let shared = Shared { state: Mutex::default(), process: std::process::id() };
        Self { shared: Arc::new(shared), arena, bytes_max: bytes_max.0 }
    }

    /// What a block of so many bytes takes.
    pub(super) fn slot_bytes(bytes: usize) -> u64 {
        padded(bytes.max(1) as u64)
    }

    /// Whether an empty pool has room for a block of so many bytes: a piece of memory is a power of two.
    pub(super) fn fits(&self, bytes: usize) -> bool {
        piece_bytes_min(Self::slot_bytes(bytes)) <= self.bytes_max
    }

    /// Bytes of slots that somebody has.
    pub(super) fn taken_bytes(&self) -> u64 {
        self.shared.state.lock().taken_bytes
    }

    /// Whether memory is a slot of this pool.
    pub(super) fn owns(&self, memory: &HostBuffer) -> bool {
        let claim = memory.claim().downcast_ref::<SlotClaim>();
        claim.is_some_and(|claim| Arc::ptr_eq(&claim.shared, &self.shared))
    }

    /// A slot for a block of so many bytes, which may hold anything. None: there is no room.
    ///
    /// # Errors
    /// The device or the machine gives no memory.
    pub(super) fn take(&self, bytes: usize) -> Result<Option<Arc<HostBuffer>>, MemoryError> {
        let slot_bytes = Self::slot_bytes(bytes);
        if !self.fits(bytes) {
            return Ok(None);
        }
        let taken = self.shared.state.lock().take(slot_bytes);
        let (piece, slot, part) = match taken {
            Some(taken) => taken,
            None => match self.make_piece(slot_bytes)? {
                Some(part) => self.shared.state.lock().add(part, slot_bytes),
                None => return Ok(None),
            },
        };
        let claim = SlotClaim { shared: Arc::clone(&self.shared), piece, slot };
        let offset = ByteCount(u64::from(slot) * slot_bytes);
        // Where it fails the claim is dropped, and the slot is free again.
        let buffer = part.buffer(offset, ByteCount(slot_bytes), claim);
        buffer.map(Some).map_err(MemoryError::device("take a slot of host memory"))
    }

    /// A piece as long as is worth it, or as there is room for.
    fn make_piece(&self, slot_bytes: u64) -> Result<Option<ArenaPart>, MemoryError> {
        let least = piece_bytes_min(slot_bytes);
        let share = 1_u64 << (self.bytes_max / 4).max(1).ilog2();
        let mut length = share.clamp(PAGE_BYTES.0, PIECE_BYTES_MAX).max(least);
        loop {
            match self.arena.take(ByteCount(length)) {
                Ok(part) => {
                    // The next one is made while this one is filled.
                    self.arena.expect(ByteCount(length));
                    return Ok(Some(part));
                }
                Err(error) if !matches!(error.kind(), ErrorKind::HostBudget | ErrorKind::OutOfMemory) => {
                    return Err(error);
                }
                Err(_) if length / 2 < least => return Ok(None),
                Err(_) => length /= 2,
            }
        }
    }
}
