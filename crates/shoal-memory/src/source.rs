//! Reads bytes of a region again from the files they came from.
//!
//! Apart because files fail in their own ways. What is read here is not yet trusted: staging compares it with the bytes
//! given, restoring with the recorded checksum (I8).

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::source::{Conversion, PlacedPiece, SourcePiece};

use crate::error::MemoryError;

const COMPARE_BYTES: usize = 1 << 20;

/// Open files, each opened once: a file that is replaced under the same name does not change what we read.
#[derive(Debug, Default)]
pub(crate) struct SourceFiles {
    open: Mutex<HashMap<Arc<PathBuf>, Arc<File>>>,
}

impl SourceFiles {
    fn file(&self, path: &Arc<PathBuf>) -> Result<Arc<File>, MemoryError> {
        if let Some(file) = self.open.lock().get(path) {
            return Ok(Arc::clone(file));
        }
        let file = File::open(path.as_path()).map(Arc::new).map_err(|error| failed(path, error))?;
        Ok(Arc::clone(self.open.lock().entry(Arc::clone(path)).or_insert(file)))
    }

    /// Fills `into` with what `from..` of the region holds according to `pieces`; zero between them.
    pub(crate) fn read(&self, pieces: &[PlacedPiece], from: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        into.fill(0);
        let to = from + into.len() as u64;
        for placed in pieces {
            let (start, end) = (placed.region_offset.max(from), placed.end().min(to));
            if start >= end {
                continue;
            }
            let Some((file_offset, file_bytes)) = placed.part(start, end) else { continue };
            let target = &mut into[as_index(start - from)..as_index(end - from)];
            let path = &placed.piece.path;
            let file = self.file(path)?;
            let result = match placed.piece.conversion {
                Conversion::None => file.read_exact_at(target, file_offset),
                conversion @ Conversion::Bf16ToF32 => {
                    let mut narrow = vec![0; as_index(file_bytes)];
                    file.read_exact_at(&mut narrow, file_offset).map(|()| conversion.apply(&narrow, target))
                }
            };
            result.map_err(|error| failed(path, error))?;
        }
        Ok(())
    }

    /// Checks that the piece of the file makes exactly `bytes`.
    pub(crate) fn verify(&self, piece: &SourcePiece, bytes: &[u8]) -> Result<(), MemoryError> {
        let placed = [PlacedPiece { region_offset: 0, piece: piece.clone() }];
        let mut read = vec![0; bytes.len().min(COMPARE_BYTES)];
        for (index, expected) in bytes.chunks(COMPARE_BYTES).enumerate() {
            let from = (index * COMPARE_BYTES) as u64;
            let read = &mut read[..expected.len()];
            self.read(&placed, from, read)?;
            if let Some(at) = read.iter().zip(expected).position(|(read, expected)| read != expected) {
                let offset = piece.offset + piece.conversion.file_bytes(ByteCount(from + at as u64)).0;
                let what = "the file does not hold the bytes given for it".to_owned();
                return Err(MemoryError::SourceMismatch { path: Arc::clone(&piece.path), offset, what });
            }
        }
        Ok(())
    }
}

fn failed(path: &Arc<PathBuf>, error: io::Error) -> MemoryError {
    MemoryError::SourceRead { path: Arc::clone(path), source: Arc::new(error) }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "offsets within a slice of this process, which has 64 bits"
)]
const fn as_index(bytes: u64) -> usize {
    bytes as usize
}
