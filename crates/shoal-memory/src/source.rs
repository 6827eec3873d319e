//! Reads bytes of a region again from the files they came from.
//!
//! Apart because files fail in their own ways. What is read here is not yet trusted: staging compares it with the bytes
//! given, restoring with the recorded checksum (I8).

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::source::{Conversion, PlacedPiece, SourcePiece};

use crate::error::MemoryError;

const COMPARE_BYTES: usize = 1 << 20;
/// Reading cached files is bound by one core's copying; from eight on it is memory that bounds it.
const COMPARE_THREADS_MAX: usize = 8;

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
        let to = from + into.len() as u64;
        if !pieces.iter().any(|placed| placed.region_offset <= from && placed.end() >= to) {
            into.fill(0);
        }
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

    /// Checks that the piece of the file makes exactly `bytes`; several threads read a long one.
    pub(crate) fn verify(&self, piece: &SourcePiece, bytes: &[u8]) -> Result<(), MemoryError> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let threads = cores.min(COMPARE_THREADS_MAX).min(bytes.len() / COMPARE_BYTES).max(1);
        let share = bytes.len().div_ceil(threads).next_multiple_of(COMPARE_BYTES);
        let mut parts = bytes.chunks(share).enumerate();
        let Some((_, first)) = parts.next() else { return Ok(()) };
        thread::scope(|scope| {
            let others: Vec<_> = parts
                .map(|(index, part)| scope.spawn(move || self.verify_part(piece, index * share, part)))
                .collect();
            let mut found = self.verify_part(piece, 0, first);
            for other in others {
                let ended = other.join().unwrap_or_else(|panic| resume_unwind(panic));
                found = found.and(ended);
            }
            found
        })
    }

    /// [`Self::verify`] of the part of the piece that begins `start` bytes of the region into it.
    fn verify_part(&self, piece: &SourcePiece, start: usize, bytes: &[u8]) -> Result<(), MemoryError> {
        let placed = [PlacedPiece { region_offset: 0, piece: piece.clone() }];
        let mut read = vec![0; bytes.len().min(COMPARE_BYTES)];
        for (index, expected) in bytes.chunks(COMPARE_BYTES).enumerate() {
            let from = (start + index * COMPARE_BYTES) as u64;
            let read = &mut read[..expected.len()];
            self.read(&placed, from, read)?;
            if read == expected {
                continue;
            }
            // Whole chunks are compared at the speed of memory; where they differ matters once only.
            let at =
                read.iter().zip(expected).position(|(read, expected)| read != expected).unwrap_or_default();
            let offset = piece.offset + piece.conversion.file_bytes(ByteCount(from + at as u64)).0;
            let what = "the file does not hold the bytes given for it".to_owned();
            return Err(MemoryError::SourceMismatch { path: Arc::clone(&piece.path), offset, what });
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

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: usize = (9 << 20) + 12;

    /// A file of `LENGTH` bytes after 5 others, and what it shall hold.
    fn written(directory: &std::path::Path) -> (SourcePiece, Vec<u8>) {
        let bytes: Vec<u8> = (0..LENGTH).map(|at| u8::try_from(at * 31 % 251).unwrap_or_default()).collect();
        let path = directory.join("weights");
        std::fs::write(&path, [b"first".as_slice(), &bytes].concat()).expect("write a file");
        let piece = SourcePiece {
            path: Arc::new(path),
            offset: 5,
            bytes: ByteCount(LENGTH as u64),
            conversion: Conversion::None,
        };
        (piece, bytes)
    }

    #[test]
    fn every_byte_is_compared_and_the_first_that_differs_is_named() {
        let directory = tempfile::tempdir().expect("make a directory");
        let (piece, mut bytes) = written(directory.path());
        let files = SourceFiles::default();
        files.verify(&piece, &bytes).expect("the file holds these bytes");
        for differing in [&[LENGTH - 1][..], &[(8 << 20) + 3, LENGTH - 7], &[0, 5 << 20]] {
            for at in differing {
                bytes[*at] ^= 1;
            }
            match files.verify(&piece, &bytes) {
                Err(MemoryError::SourceMismatch { offset, .. }) => {
                    assert_eq!(offset, 5 + differing[0] as u64);
                }
                other => panic!("{other:?}"),
            }
            bytes = written(directory.path()).1;
        }
    }

    #[test]
    fn a_file_that_ends_early_cannot_be_compared() {
        let directory = tempfile::tempdir().expect("make a directory");
        let (piece, mut bytes) = written(directory.path());
        bytes.push(0);
        let longer = SourcePiece { bytes: ByteCount(bytes.len() as u64), ..piece };
        let refused = SourceFiles::default().verify(&longer, &bytes);
        assert!(matches!(refused, Err(MemoryError::SourceRead { .. })), "{refused:?}");
    }

    #[test]
    fn what_lies_between_pieces_reads_as_zero() {
        let directory = tempfile::tempdir().expect("make a directory");
        let (piece, bytes) = written(directory.path());
        let part = SourcePiece { bytes: ByteCount(10), ..piece };
        let pieces = [
            PlacedPiece { region_offset: 2, piece: part.clone() },
            PlacedPiece { region_offset: 14, piece: part },
        ];
        let mut read = [9; 26];
        SourceFiles::default().read(&pieces, 0, &mut read).expect("read");
        let mut expected = [0; 26];
        expected[2..12].copy_from_slice(&bytes[..10]);
        expected[14..24].copy_from_slice(&bytes[..10]);
        assert_eq!(read, expected);
    }
}
