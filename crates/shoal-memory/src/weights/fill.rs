//! Storing a region: what is new goes into one pack, and the manifest is written when that is on the disk.
//!
//! Apart because it is the one place that changes a directory, always with its lock. A crash leaves unfinished files, which the
//! next fill removes, or a pack of no model, likewise. The bytes are hashed twice, before and while they are written, and compared
//! with what was recorded when they were sealed: memory that erred meanwhile is not stored.
//!
//! What a piece is called decides whose bytes a model gets, so that is a hash for which nobody can make other bytes: a model's files
//! may be made by somebody who wishes another model ill. Against chance alone a faster one does.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest, Sha256};
use shoal_core::bytes::ByteCount;
use shoal_core::store::weights::{Manifest, Piece, StoredExtent, is_name, worth_sharing};
use shoal_device::Hasher;
use xxhash_rust::xxh3::Xxh3;

use super::pack::{PART_BYTES, Pace, Part, write};
use super::{Catalogue, UNFINISHED, WeightStore, WeightsError, remove};
use crate::disk::directory::{give_name, io_error, medium, random, write_out};
use crate::error::MemoryError;

/// Requests at a time while a pack is written: readers come first.
const WRITE_DEPTH: usize = 8;
/// Bytes after which the disk has to keep what was written.
const SYNC_BYTES: u64 = 1 << 30;

/// What is to be stored.
#[derive(Clone, Debug)]
pub struct FillSpec {
    /// What the model is found by: 8 to 64 hexadecimal digits.
    pub name: String,
    /// What whoever finds it needs to use it.
    pub note: String,
    /// The region's extents, by address.
    pub extents: Vec<StoredExtent>,
    /// The lengths of its pieces, by address: [`super::cut`].
    pub pieces: Vec<u64>,
}

/// What became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FillReport {
    /// Bytes of the region.
    pub bytes: ByteCount,
    /// Of these, written now.
    pub written: ByteCount,
    /// Of these, there already: another model's, or this one's twice.
    pub shared: ByteCount,
    /// It was stored before, and nothing was done.
    pub was_there: bool,
    /// Models that were removed to make room.
    pub evicted: Vec<String>,
}

/// Where a piece's bytes are, before it is known where its pack will be.
struct Found {
    /// What it is called: [`Piece::hash`].
    hash: String,
    bytes: u64,
    offset: u64,
    /// Tells whether the same bytes come again to be written.
    check: u128,
}

impl Found {
    fn key(&self) -> (String, u64) {
        (self.hash.clone(), self.bytes)
    }
}

impl WeightStore {
    /// Stores a region, in the place of another one that has its name. `read` gives its bytes, by offset; it is called for each byte twice. Nothing waits: where another
    /// process fills, it is refused, and may be tried again.
    ///
    /// # Errors
    /// [`WeightsError`]. The store is as it was then, but for models that made room.
    pub fn fill(
        &self,
        spec: &FillSpec,
        stop: &AtomicBool,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), MemoryError>,
    ) -> Result<FillReport, WeightsError> {
        if !is_name(&spec.name) {
            return Err(WeightsError::BadName { name: spec.name.clone() });
        }
        let (_lock, catalogue) = self.take()?;
        let bytes = ByteCount(spec.extents.iter().map(|extent| extent.bytes).sum());
        let known = catalogue.models.iter().find(|(model, _)| model.name == spec.name);
        if known.is_some_and(|(_, known)| known.note == spec.note && known.extents == spec.extents) {
            return Ok(FillReport { bytes, was_there: true, ..FillReport::default() });
        }
        let found = look_through(spec, stop, &mut read)?;
        let mut places = places(&catalogue);
        let mut shared: BTreeMap<String, u64> = BTreeMap::new();
        for piece in &found {
            if let Some((pack, _)) = places.get(&piece.key()) {
                *shared.entry(pack.clone()).or_default() += piece.bytes;
            }
        }
        let shared = worth_sharing(&shared);
        places.retain(|_, (pack, _)| shared.contains(pack));
        let kept: BTreeSet<String> = shared.union(&catalogue.read).cloned().collect();

        let id = format!("{:016x}{:016x}", random()?, random()?);
        let (mut fresh, mut end) = (Vec::new(), 0);
        for piece in &found {
            places.entry(piece.key()).or_insert_with(|| {
                fresh.push((piece, end));
                end += piece.bytes;
                (id.clone(), end - piece.bytes)
            });
        }
        let wear = self.wear(ByteCount(end))?;
        let evicted = self.make_room(&spec.name, &catalogue, &kept, ByteCount(end))?;
        if end > 0 {
            wear.map_or(Ok(()), |wear| self.remember(wear))?;
            self.write_pack(&id, &fresh, end, stop, &mut read)?;
        }
        let pieces = found.iter().map(|piece| {
            let (pack, at) = places[&piece.key()].clone();
            Piece { bytes: piece.bytes, hash: piece.hash.clone(), pack, at }
        });
        let manifest =
            Manifest { note: spec.note.clone(), extents: spec.extents.clone(), pieces: pieces.collect() };
        let path = self.model(&spec.name);
        let encoded = manifest.encode().map_err(|error| io_error("cannot write", &path)(error.into()))?;
        write_out(&path.with_extension(UNFINISHED), &path, &encoded)?;
        Ok(FillReport {
            bytes,
            written: ByteCount(end),
            shared: bytes - ByteCount(end),
            was_there: false,
            evicted,
        })
    }

    fn write_pack(
        &self,
        id: &str,
        fresh: &[(&Found, u64)],
        bytes: u64,
        stop: &AtomicBool,
        read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), MemoryError>,
    ) -> Result<(), WeightsError> {
        let path = self.pack(id);
        let new = path.with_extension(UNFINISHED);
        let written = self.write_unfinished(&new, fresh, bytes, stop, read);
        let named = written.and_then(|()| give_name(&new, &path).map_err(WeightsError::from));
        if named.is_err() {
            // Room for others; where this fails too, the next fill does it.
            let _ = remove(&new);
        }
        named
    }

    fn write_unfinished(
        &self,
        new: &Path,
        fresh: &[(&Found, u64)],
        bytes: u64,
        stop: &AtomicBool,
        read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), MemoryError>,
    ) -> Result<(), WeightsError> {
        let cannot_make = || io_error("cannot make", new);
        let mut medium = medium(new, self.options.engine, WRITE_DEPTH, self.options.wants_direct)
            .map(|medium| (self.wrap)(medium))
            .map_err(cannot_make())?;
        medium.grow(bytes).map_err(cannot_make())?;
        let pace = Pace {
            depth: WRITE_DEPTH,
            bytes_per_s: self.options.write_bytes_per_s.0,
            sync_bytes: SYNC_BYTES,
            io_deadline: self.options.io_deadline,
            stop,
        };
        let parts = fresh.iter().flat_map(|(piece, at)| {
            parts_of(piece.bytes).map(move |(start, bytes)| Part {
                offset: piece.offset + start,
                bytes,
                pack: 0,
                at: at + start,
            })
        });
        let mut under_way = (0_usize, Xxh3::new(), 0_u64);
        write(new, medium.as_mut(), parts, pace, |part, memory| {
            read(part.offset, memory)?;
            let (index, hasher, seen) = &mut under_way;
            hasher.update(memory);
            *seen += memory.len() as u64;
            let (piece, _) = fresh[*index];
            if *seen == piece.bytes {
                if hasher.digest128() != piece.check {
                    return Err(WeightsError::Changed { offset: piece.offset });
                }
                (*index, *seen) = (*index + 1, 0);
                hasher.reset();
            }
            Ok(())
        })
    }
}

/// Where each piece lies that some model has.
fn places(catalogue: &Catalogue) -> BTreeMap<(String, u64), (String, u64)> {
    let pieces = catalogue.models.iter().flat_map(|(_, manifest)| &manifest.pieces);
    pieces.map(|piece| ((piece.hash.clone(), piece.bytes), (piece.pack.clone(), piece.at))).collect()
}

/// What a piece is called.
fn name_of(hasher: Sha256) -> String {
    hasher.finalize().iter().fold(String::with_capacity(64), |mut name, byte| {
        // Writing to a string cannot fail.
        let _ = write!(name, "{byte:02x}");
        name
    })
}

/// Start and length of the requests that a piece is moved by.
fn parts_of(bytes: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..bytes.div_ceil(PART_BYTES)).map(move |index| {
        let start = index * PART_BYTES;
        (start, usize::try_from(PART_BYTES.min(bytes - start)).unwrap_or(usize::MAX))
    })
}

/// Hashes all of a region, piece by piece, and compares its extents with what was recorded.
fn look_through(
    spec: &FillSpec,
    stop: &AtomicBool,
    read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), MemoryError>,
) -> Result<Vec<Found>, WeightsError> {
    if spec.pieces.iter().sum::<u64>() != spec.extents.iter().map(|extent| extent.bytes).sum::<u64>() {
        return Err(WeightsError::OtherLayout);
    }
    let mut extents = spec.extents.iter();
    let mut extent = extents.next();
    let (mut of_extent, mut left) = (Hasher::new(), extent.map_or(0, |extent| extent.bytes));
    let mut memory = vec![0; usize::try_from(PART_BYTES).unwrap_or(usize::MAX)];
    let (mut found, mut offset) = (Vec::with_capacity(spec.pieces.len()), 0);
    for &bytes in &spec.pieces {
        let (mut of_piece, mut check) = (Sha256::new(), Xxh3::new());
        for (start, length) in parts_of(bytes) {
            if stop.load(Ordering::Relaxed) {
                return Err(WeightsError::Stopped);
            }
            let mut part = &mut memory[..length];
            read(offset + start, part)?;
            of_piece.update(&*part);
            check.update(part);
            while !part.is_empty() {
                let (now, rest) =
                    part.split_at_mut(usize::try_from(left).unwrap_or(usize::MAX).min(part.len()));
                of_extent.update(now);
                left -= now.len() as u64;
                part = rest;
                if left == 0 {
                    let hash = std::mem::take(&mut of_extent).finish();
                    if extent.is_some_and(|extent| extent.hash != hash) {
                        return Err(WeightsError::Changed { offset: offset + start });
                    }
                    extent = extents.next();
                    left = extent.map_or(u64::MAX, |extent| extent.bytes);
                }
            }
        }
        found.push(Found { hash: name_of(of_piece), bytes, offset, check: check.digest128() });
        offset += bytes;
    }
    Ok(found)
}
