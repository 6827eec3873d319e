//! The source tier: which pieces of which files the bytes of a region were first read from.
//!
//! Apart because it is arithmetic only: ranges, conversions, coverage. Reading the files and comparing checksums
//! (I8) is shoal-memory's work.

use std::path::PathBuf;
use std::sync::Arc;

use crate::bytes::ByteCount;

/// How bytes of a file become bytes of a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Conversion {
    /// As they are.
    #[default]
    None,
    /// Little-endian bfloat16 to float32: two bytes of the file make four of the region.
    Bf16ToF32,
}

impl Conversion {
    /// Bytes of the file behind `bytes` bytes of the region.
    #[must_use]
    pub const fn file_bytes(self, bytes: ByteCount) -> ByteCount {
        match self {
            Self::None => bytes,
            Self::Bf16ToF32 => ByteCount(bytes.0 / 2),
        }
    }

    /// Ranges of the region must start and end at multiples of this many bytes.
    #[must_use]
    pub const fn alignment(self) -> u64 {
        match self {
            Self::None => 1,
            Self::Bf16ToF32 => 4,
        }
    }

    /// Converts bytes of the file. `target` must be as long as [`Conversion::file_bytes`] asks.
    ///
    /// # Panics
    /// If the lengths do not fit (a caller's bug).
    pub fn apply(self, file: &[u8], target: &mut [u8]) {
        assert_eq!(self.file_bytes(ByteCount(target.len() as u64)).0, file.len() as u64, "lengths differ");
        match self {
            Self::None => target.copy_from_slice(file),
            Self::Bf16ToF32 => {
                for (wide, narrow) in target.chunks_exact_mut(4).zip(file.chunks_exact(2)) {
                    wide.copy_from_slice(&[0, 0, narrow[0], narrow[1]]);
                }
            }
        }
    }
}

/// A piece of a file that some bytes of a region can be read from again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourcePiece {
    /// The file.
    pub path: Arc<PathBuf>,
    /// Where the piece starts in the file, in bytes.
    pub offset: u64,
    /// How many bytes of the *region* it makes.
    pub bytes: ByteCount,
    /// How the file's bytes become the region's.
    pub conversion: Conversion,
}

/// A piece, and where it lies in the region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedPiece {
    /// Where it starts in the region, in bytes.
    pub region_offset: u64,
    /// The piece.
    pub piece: SourcePiece,
}

impl PlacedPiece {
    /// Where it ends in the region.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.region_offset + self.piece.bytes.0
    }

    /// The part that makes `from..to` of the region: where it starts in the file and how many bytes of the file.
    /// `None` if the piece does not hold all of it.
    #[must_use]
    pub const fn part(&self, from: u64, to: u64) -> Option<(u64, u64)> {
        if from < self.region_offset || to > self.end() || from > to {
            return None;
        }
        let skipped = self.piece.conversion.file_bytes(ByteCount(from - self.region_offset)).0;
        Some((self.piece.offset + skipped, self.piece.conversion.file_bytes(ByteCount(to - from)).0))
    }
}

/// What was written to a region, and which of it can be read again from a file.
///
/// Later writes replace earlier ones: a piece that is overwritten, even in part, is a source no more.
#[derive(Clone, Debug, Default)]
pub struct SourceMap {
    /// Disjoint, ascending.
    pieces: Vec<PlacedPiece>,
    /// Disjoint, ascending, merged: everything written.
    written: Vec<(u64, u64)>,
}

impl SourceMap {
    /// Records that `from..from + bytes` was written, from `piece` if it came from a file.
    pub fn write(&mut self, from: u64, bytes: u64, piece: Option<SourcePiece>) {
        if bytes == 0 {
            return;
        }
        let to = from + bytes;
        let low = self.pieces.partition_point(|placed| placed.end() <= from);
        let high = self.pieces.partition_point(|placed| placed.region_offset < to);
        let placed = piece.map(|piece| PlacedPiece { region_offset: from, piece });
        self.pieces.splice(low..high.max(low), placed);

        let low = self.written.partition_point(|(_, end)| *end < from);
        let high = self.written.partition_point(|(start, _)| *start <= to).max(low);
        let merged = self.written[low..high]
            .iter()
            .fold((from, to), |(from, to), (start, end)| (from.min(*start), to.max(*end)));
        self.written.splice(low..high, [merged]);
    }

    /// The pieces that touch `from..to`, ascending.
    #[must_use]
    pub fn pieces(&self, from: u64, to: u64) -> &[PlacedPiece] {
        let low = self.pieces.partition_point(|placed| placed.end() <= from);
        let high = self.pieces.partition_point(|placed| placed.region_offset < to);
        &self.pieces[low..high.max(low)]
    }

    /// True when something was written in `from..to` and every byte of it can be read from a file again. (Bytes never
    /// written are zero; where nothing was written no file speaks for the bytes.)
    #[must_use]
    pub fn covers(&self, from: u64, to: u64) -> bool {
        let written: u64 =
            self.written.iter().map(|(start, end)| (*end).min(to).saturating_sub((*start).max(from))).sum();
        let sourced: u64 = self
            .pieces(from, to)
            .iter()
            .map(|placed| placed.end().min(to).saturating_sub(placed.region_offset.max(from)))
            .sum();
        written > 0 && written == sourced
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(bytes: u64, conversion: Conversion) -> SourcePiece {
        SourcePiece {
            path: Arc::new(PathBuf::from("m.safetensors")),
            offset: 100,
            bytes: ByteCount(bytes),
            conversion,
        }
    }

    #[test]
    fn widening_is_exact() {
        let values = [0.0_f32, -1.5, 3.0e38, f32::INFINITY];
        let narrow: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()[2..].to_vec()).collect();
        let mut wide = vec![0xAA; 16];
        Conversion::Bf16ToF32.apply(&narrow, &mut wide);
        for (value, bytes) in values.iter().zip(wide.chunks_exact(4)) {
            let expected = f32::from_bits(value.to_bits() & 0xFFFF_0000);
            assert_eq!(f32::from_le_bytes(bytes.try_into().expect("four")).to_bits(), expected.to_bits());
        }
    }

    #[test]
    fn parts_point_into_the_file() {
        let placed = PlacedPiece { region_offset: 64, piece: piece(40, Conversion::Bf16ToF32) };
        assert_eq!(placed.part(72, 80), Some((104, 4)));
        assert_eq!(placed.part(60, 80), None);
        assert_eq!(placed.part(72, 108), None);
    }

    #[test]
    fn coverage_counts_only_what_a_file_still_holds() {
        let mut map = SourceMap::default();
        map.write(0, 10, Some(piece(10, Conversion::None)));
        map.write(20, 10, Some(piece(10, Conversion::None)));
        assert!(map.covers(0, 100), "the gap was never written");
        map.write(12, 4, None);
        assert!(!map.covers(0, 100));
        assert!(map.covers(0, 12) && map.covers(16, 100));
        map.write(5, 20, Some(piece(20, Conversion::None)));
        assert_eq!(map.pieces(0, 100).len(), 1, "both neighbours were overwritten in part");
        assert!(!map.covers(0, 100));
        assert!(map.covers(5, 25));
        assert!(!map.covers(40, 50), "nothing was written there");
    }
}
