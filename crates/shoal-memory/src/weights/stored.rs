//! One model that is stored.
//!
//! Its packs stay open and are locked with other readers', so that they stay while it lives: it can be read to the end.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::store::weights::{Manifest, StoredExtent};

use super::pack::{Media, PART_BYTES, Part};
use super::{DAMAGED, WeightStore, WeightsError, remove, room};
use crate::disk::directory::medium_to_read;
use crate::store::Buffer;

/// A region that can be read from a [`WeightStore`].
pub struct Stored {
    store: WeightStore,
    manifest: Manifest,
    path: PathBuf,
    /// Of each piece, the index of its pack.
    packs: Vec<usize>,
    /// Held while it is read (I9): by the start that fills a region of it, and from then on by who has the turn. Nobody waits.
    media: Mutex<Media>,
    /// What keeps the packs where they are.
    held: Vec<File>,
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stored")
            .field("path", &self.path)
            .field("bytes", &self.bytes())
            .field("packs", &self.held.len())
            .finish_non_exhaustive()
    }
}

impl Stored {
    pub(super) fn open(store: &WeightStore, path: PathBuf, manifest: Manifest) -> Option<Self> {
        let (mut media, mut held) = (Media::default(), Vec::new());
        let mut packs = Vec::with_capacity(manifest.pieces.len());
        for piece in &manifest.pieces {
            let at = store.pack(&piece.pack);
            let known = media.packs.iter().position(|(path, _)| *path == at);
            let index = if let Some(index) = known {
                index
            } else {
                held.push(room::with_others(&at).ok()?);
                let options = &store.options;
                let opened = medium_to_read(&at, options.engine, options.depth, options.wants_direct);
                let medium = (store.wrap)(opened.ok()?);
                media.packs.push((at, medium));
                media.packs.len() - 1
            };
            if media.packs[index].1.bytes().ok()? < piece.at + piece.bytes {
                return None;
            }
            packs.push(index);
        }
        Some(Self { store: store.clone(), manifest, path, packs, media: Mutex::new(media), held })
    }

    /// What was noted when it was stored.
    #[must_use]
    pub fn note(&self) -> &str {
        &self.manifest.note
    }

    /// The region's length.
    #[must_use]
    pub fn bytes(&self) -> ByteCount {
        ByteCount(self.manifest.bytes())
    }

    /// The region's extents, by address.
    #[must_use]
    pub fn extents(&self) -> &[StoredExtent] {
        &self.manifest.extents
    }

    /// Whether all that is open has a name still.
    #[cfg(test)]
    pub(super) fn has_names(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        self.held.iter().all(|file| file.metadata().is_ok_and(|metadata| metadata.nlink() > 0))
    }

    /// How many requests are worth having under way.
    pub(crate) const fn depth(&self) -> usize {
        self.store.options.depth
    }

    /// Reads ranges of the region, in their order and cut into parts of a mebibyte at most, which begin and end at multiples of
    /// 4 KiB if the ranges do. Nothing of it is verified yet.
    ///
    /// `target` gives the memory for a part of so many bytes at that offset of the region, `done` gets it back filled, in order.
    ///
    /// # Errors
    /// The first failure, of the disk or of these two.
    pub(crate) fn read(
        &self,
        ranges: &[(u64, u64)],
        window: usize,
        part_bytes: u64,
        mut target: impl FnMut(u64, usize) -> Result<Buffer, WeightsError>,
        mut done: impl FnMut(u64, usize, Buffer) -> Result<(), WeightsError>,
    ) -> Result<(), WeightsError> {
        let parts: Vec<Part> =
            ranges.iter().flat_map(|&(offset, bytes)| self.parts(offset, bytes, part_bytes)).collect();
        self.media.lock().read(
            parts,
            window,
            self.store.options.io_deadline,
            |part| target(part.offset, part.bytes),
            |part, buffer| done(part.offset, part.bytes, buffer),
        )
    }

    fn parts(&self, offset: u64, bytes: u64, part_bytes: u64) -> Vec<Part> {
        let part_bytes = part_bytes.clamp(1, PART_BYTES);
        let (mut parts, mut start) = (Vec::new(), 0);
        let to = offset + bytes;
        for (piece, pack) in self.manifest.pieces.iter().zip(&self.packs) {
            let (mut from, end) = (start.max(offset), (start + piece.bytes).min(to));
            while from < end {
                let bytes = (end - from).min(part_bytes);
                parts.push(Part {
                    offset: from,
                    bytes: usize::try_from(bytes).unwrap_or(usize::MAX),
                    pack: *pack,
                    at: piece.at + (from - start),
                });
                from += bytes;
            }
            start += piece.bytes;
        }
        parts
    }

    /// Drops what was found damaged: the model, and the packs in which those bytes of its region lie. Whoever shares them finds
    /// nothing either, and stores them anew. The packs get names of no use, and go when nobody reads them any more.
    pub(crate) fn drop_damaged(&self, offset: u64, bytes: u64) -> WeightsError {
        let packs: BTreeSet<PathBuf> = {
            let (media, parts) = (self.media.lock(), self.parts(offset, bytes, PART_BYTES));
            parts.iter().map(|part| media.packs[part.pack].0.clone()).collect()
        };
        for path in packs {
            if let Err(error) = fs::rename(&path, path.with_extension(DAMAGED))
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, pack = %path.display(), "a damaged pack stays where it is");
            }
        }
        // Another may have been stored under its name since.
        if matches!(self.store.manifest(&self.path), Ok(Some(manifest)) if manifest == self.manifest)
            && let Err(error) = remove(&self.path)
        {
            tracing::warn!(%error, "damaged weights stay where they are");
        }
        tracing::error!(model = %self.path.display(), offset, bytes, "stored weights were damaged, and dropped");
        WeightsError::Damaged { offset, bytes: ByteCount(bytes) }
    }
}
