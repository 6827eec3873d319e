//! Weights at rest: of which pieces a model's region is made, where each lies, and which models go when room is short.
//!
//! Apart because it is arithmetic only. Files are shoal-memory's work (`weights`), which believes nothing that it reads
//! before its hash was compared (I8): a [`Manifest`] is checked whole when it is decoded, and carries the hash of each extent.
//!
//! A piece is named by the hash of its bytes, so a tensor that several models have lies there once. Pieces are cut where large
//! tensors begin and end, at whole units of direct I/O; a region's pieces follow one another without gaps, in its order of use.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use super::format::UNIT;

/// The format of manifests and packs. Another one is left alone.
pub const WEIGHTS_VERSION: u32 = 1;
/// Tensors from this length on are pieces of their own.
pub const TENSOR_BYTES_MIN: u64 = 1 << 20;
/// More than this is no manifest.
pub const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// Most packs that a model's pieces lie in: each is a file that is open while it is read, with its own ring or threads.
pub const PACKS_MAX: usize = 8;
const MAGIC: &str = "shoal-weights";

/// Some bytes of a region that lie together in a pack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// How many: a multiple of [`UNIT`].
    pub bytes: u64,
    /// Their SHA-256, in hexadecimal: what they are called.
    pub hash: String,
    /// The pack that they lie in.
    pub pack: String,
    /// Where they begin in the pack: a multiple of [`UNIT`].
    pub at: u64,
}

/// One extent of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredExtent {
    /// Its length.
    pub bytes: u64,
    /// The hash of its bytes.
    pub hash: u64,
}

/// What a model's region is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// What whoever stored it needs to use it again.
    pub note: String,
    /// The region's extents, by address.
    pub extents: Vec<StoredExtent>,
    /// Its pieces, by address, without gaps.
    pub pieces: Vec<Piece>,
}

impl Manifest {
    /// The region's length.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.bytes).sum()
    }

    /// The packs that it needs.
    #[must_use]
    pub fn packs(&self) -> BTreeSet<&str> {
        self.pieces.iter().map(|piece| piece.pack.as_str()).collect()
    }

    /// As it lies on disk: a line with version and hash, then JSON.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub fn encode(&self) -> serde_json::Result<Vec<u8>> {
        let body = serde_json::to_vec(self)?;
        let mut bytes = format!("{MAGIC} {WEIGHTS_VERSION} {:032x}\n", xxh3_128(&body)).into_bytes();
        bytes.extend(body);
        Ok(bytes)
    }

    /// What [`Manifest::encode`] made; nothing if a bit of it is another, or it cannot be true.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let end = bytes.iter().position(|byte| *byte == b'\n')?;
        let (line, body) = (std::str::from_utf8(&bytes[..end]).ok()?, &bytes[end + 1..]);
        if line != format!("{MAGIC} {WEIGHTS_VERSION} {:032x}", xxh3_128(body)) {
            return None;
        }
        let manifest: Self = serde_json::from_slice(body).ok()?;
        manifest.is_possible().then_some(manifest)
    }

    fn is_possible(&self) -> bool {
        let whole = |bytes: u64| bytes > 0 && bytes.is_multiple_of(UNIT);
        let of_extents = self.extents.iter().try_fold(0_u64, |sum, extent| sum.checked_add(extent.bytes));
        let of_pieces = self.pieces.iter().try_fold(0_u64, |sum, piece| sum.checked_add(piece.bytes));
        of_extents.is_some()
            && self.packs().len() <= PACKS_MAX
            && of_extents == of_pieces
            && self.extents.iter().all(|extent| whole(extent.bytes))
            && self.pieces.iter().all(|piece| {
                let is_in_file = piece.at.is_multiple_of(UNIT) && piece.at.checked_add(piece.bytes).is_some();
                whole(piece.bytes) && is_in_file && is_name(&piece.pack) && is_name(&piece.hash)
            })
    }
}

/// Whether it names a model or a pack: hexadecimal digits alone, so that it is a file's name and no path.
#[must_use]
pub fn is_name(name: &str) -> bool {
    (8..=64).contains(&name.len()) && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Cuts a region into pieces where tensors of [`TENSOR_BYTES_MIN`] or more begin and end, as far as whole units allow.
///
/// `tensors` are offset and length of each. Gives the pieces' lengths, by address.
#[must_use]
pub fn cut(region_bytes: u64, tensors: &[(u64, u64)]) -> Vec<u64> {
    let mut cuts = BTreeSet::from([0, region_bytes]);
    for &(offset, bytes) in tensors {
        let end = offset.saturating_add(bytes).min(region_bytes);
        if bytes >= TENSOR_BYTES_MIN && offset.is_multiple_of(UNIT) && offset < end {
            cuts.extend([offset, end - end % UNIT]);
        }
    }
    let cuts: Vec<u64> = cuts.into_iter().collect();
    cuts.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

/// What was written to a disk lately, as its directory remembers it: all bytes of packs, of which an hour makes good as many as
/// may be written in one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wear {
    /// Bytes not made good.
    pub bytes: u64,
    /// When that was so, in seconds of the system's clock.
    pub at_s: u64,
}

impl Wear {
    /// What it is when `needed` more bytes are written. They may be where that is no more than an hour's; what alone is more
    /// than an hour's may be where all is made good.
    ///
    /// # Errors
    /// After how many seconds they may be.
    pub fn add(self, needed: u64, bytes_per_hour: u64, now_s: u64) -> Result<Self, u64> {
        let made_good = u128::from(now_s.saturating_sub(self.at_s)) * u128::from(bytes_per_hour) / 3600;
        let left = self.bytes.saturating_sub(u64::try_from(made_good).unwrap_or(u64::MAX));
        let excess = left.saturating_sub(bytes_per_hour.saturating_sub(needed));
        if needed == 0 || excess == 0 {
            return Ok(Self { bytes: left.saturating_add(needed), at_s: now_s });
        }
        let wait_s = (u128::from(excess) * 3600).div_ceil(u128::from(bytes_per_hour.max(1)));
        Err(u64::try_from(wait_s).unwrap_or(u64::MAX))
    }
}

/// Which packs' pieces are used again by a model that has so many bytes in each: those with most, as many as leave room for one
/// of its own.
#[must_use]
pub fn worth_sharing(bytes: &BTreeMap<String, u64>) -> BTreeSet<String> {
    let mut by_bytes: Vec<_> = bytes.iter().collect();
    by_bytes.sort_by_key(|(name, bytes)| (std::cmp::Reverse(**bytes), *name));
    by_bytes.into_iter().take(PACKS_MAX - 1).map(|(name, _)| name.clone()).collect()
}

/// A model that is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredModel {
    /// Its name.
    pub name: String,
    /// When it was used last, by any clock.
    pub used: u64,
    /// The packs that it needs.
    pub packs: BTreeSet<String>,
}

/// Chooses the models that go so that `needed` more bytes fit into `bytes_max`: those that were used least lately, and none
/// whose going frees nothing. `packs` are the lengths of all that are there; those of no model are on their way out, those in
/// `kept` stay whatever goes. Nothing where all models together would not be enough.
#[must_use]
pub fn make_room(
    models: &[StoredModel],
    packs: &BTreeMap<String, u64>,
    kept: &BTreeSet<String>,
    needed: u64,
    bytes_max: u64,
) -> Option<Vec<String>> {
    let mut by_use: Vec<&StoredModel> = models.iter().collect();
    by_use.sort_by_key(|model| (model.used, &model.name));
    let fits = |stays: &dyn Fn(usize) -> bool| {
        let staying = by_use.iter().enumerate().filter(|(index, _)| stays(*index));
        let names: BTreeSet<&String> = staying.flat_map(|(_, model)| &model.packs).chain(kept).collect();
        let held: u64 = names.into_iter().filter_map(|name| packs.get(name)).sum();
        held.saturating_add(needed) <= bytes_max
    };
    let first = (0..=by_use.len()).find(|going| fits(&|index| index >= *going))?;
    // Of those, what was used most lately comes back if there is room for it all the same.
    let mut goes: BTreeSet<usize> = (0..first).collect();
    for index in (0..first).rev() {
        if fits(&|other| other == index || !goes.contains(&other)) {
            goes.remove(&index);
        }
    }
    Some(goes.into_iter().map(|index| by_use[index].name.clone()).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn manifest() -> Manifest {
        let piece = |bytes, at| Piece { bytes, hash: format!("{at:032x}"), pack: "00ab00ab".to_owned(), at };
        Manifest {
            note: "what it is: \"\u{e4}\"\n".to_owned(),
            extents: vec![
                StoredExtent { bytes: 3 * UNIT, hash: u64::MAX },
                StoredExtent { bytes: UNIT, hash: 1 },
            ],
            pieces: vec![piece(UNIT, 0), piece(3 * UNIT, UNIT)],
        }
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let bytes = manifest().encode().expect("written");
        assert_eq!(Manifest::decode(&bytes), Some(manifest()));
        assert_eq!(manifest().bytes(), 4 * UNIT);
    }

    #[test]
    fn what_cannot_be_true_is_no_manifest() {
        let changes: [fn(&mut Manifest); 8] = [
            |manifest| {
                let piece = |number| Piece {
                    pack: format!("{number:08x}"),
                    bytes: UNIT,
                    ..manifest.pieces[0].clone()
                };
                manifest.pieces = (0..=PACKS_MAX).map(piece).collect();
                manifest.extents = vec![StoredExtent { bytes: (PACKS_MAX as u64 + 1) * UNIT, hash: 0 }];
            },
            |manifest| manifest.pieces[0].bytes += UNIT,
            |manifest| manifest.pieces[0].at = 7,
            |manifest| manifest.pieces[1].at = u64::MAX - UNIT + 1,
            |manifest| manifest.pieces[1].pack = "../../etc".to_owned(),
            |manifest| manifest.extents[1].bytes = 0,
            |manifest| manifest.extents[0].bytes = u64::MAX - UNIT + 1,
            |manifest| drop(manifest.pieces.pop()),
        ];
        for change in changes {
            let mut wrong = manifest();
            change(&mut wrong);
            assert_eq!(Manifest::decode(&wrong.encode().expect("written")), None, "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn no_changed_byte_goes_unseen(at in 0..500_usize, flip in 1..=255_u8, cut_at in 0..500_usize) {
            let bytes = manifest().encode().expect("written");
            let mut changed = bytes.clone();
            let at = at % changed.len();
            changed[at] ^= flip;
            prop_assert_eq!(Manifest::decode(&changed), None);
            prop_assert_eq!(Manifest::decode(&bytes[..cut_at.min(bytes.len() - 1)]), None);
        }

        #[test]
        fn pieces_cover_a_region_and_large_tensors_are_their_own(
            tensors in proptest::collection::vec((0..3_000_u64, 1..4_000_000_u64), 0..12),
        ) {
            let mut at = 0;
            let mut placed = Vec::new();
            for (gap, bytes) in tensors {
                at = (at + gap).next_multiple_of(if bytes >= TENSOR_BYTES_MIN { UNIT } else { 64 });
                placed.push((at, bytes));
                at += bytes;
            }
            let region_bytes = (at + 1).next_multiple_of(2 << 20);
            let pieces = cut(region_bytes, &placed);
            prop_assert_eq!(pieces.iter().sum::<u64>(), region_bytes);
            prop_assert!(pieces.iter().all(|bytes| *bytes > 0 && bytes.is_multiple_of(UNIT)));
            let mut from = 0;
            let spans: BTreeSet<(u64, u64)> = pieces
                .iter()
                .map(|bytes| {
                    from += bytes;
                    (from - bytes, *bytes)
                })
                .collect();
            for (offset, bytes) in placed.into_iter().filter(|(_, bytes)| *bytes >= TENSOR_BYTES_MIN) {
                prop_assert!(spans.contains(&(offset, bytes - bytes % UNIT)), "{} {}", offset, bytes);
            }
        }

        #[test]
        fn no_hour_sees_more_writes_than_two_hours_worth_and_who_waits_may(
            per_hour in 1..1_000_u64,
            fills in proptest::collection::vec((0..2_000_u64, 0..4_000_u64), 1..40),
        ) {
            let (mut wear, mut now_s) = (Wear::default(), 1_000_000);
            let mut written: Vec<(u64, u64)> = Vec::new();
            for (bytes, pause_s) in fills {
                now_s += pause_s;
                if let Err(wait_s) = wear.add(bytes, per_hour, now_s) {
                    prop_assert!(wait_s > 0 && bytes > 0);
                    now_s += wait_s;
                }
                wear = wear.add(bytes, per_hour, now_s).expect("it waited");
                written.push((now_s, bytes));
                // What alone is more than an hour's begins when all is made good.
                let largest = written.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
                let lately = written.iter().filter(|(at_s, _)| at_s + 3600 > now_s);
                prop_assert!(lately.map(|(_, bytes)| bytes).sum::<u64>() <= per_hour + per_hour.max(largest) + 1);
            }
        }

        #[test]
        fn the_least_used_go_and_none_in_vain(
            used in proptest::collection::vec(0..20_u64, 0..8),
            needs in proptest::collection::vec(proptest::collection::btree_set(0..6_u8, 0..4), 8),
            lengths in proptest::collection::vec(1..10_u64, 6),
            kept in proptest::collection::btree_set(0..6_u8, 0..3),
            needed in 0..30_u64,
            bytes_max in 0..40_u64,
        ) {
            let pack = |number: &u8| format!("{number:08x}");
            let packs: BTreeMap<_, _> = (0..6_u8).map(|number| (pack(&number), lengths[usize::from(number)])).collect();
            let kept: BTreeSet<_> = kept.iter().map(pack).collect();
            let models: Vec<_> = used
                .iter()
                .zip(&needs)
                .enumerate()
                .map(|(at, (used, needs))| StoredModel {
                    name: format!("{at:08x}"),
                    used: *used,
                    packs: needs.iter().map(pack).collect(),
                })
                .collect();
            let held = |stays: &dyn Fn(&StoredModel) -> bool| -> u64 {
                let names: BTreeSet<_> =
                    models.iter().filter(|model| stays(model)).flat_map(|model| model.packs.clone()).chain(kept.clone()).collect();
                names.iter().map(|name| packs[name]).sum()
            };
            match make_room(&models, &packs, &kept, needed, bytes_max) {
                None => prop_assert!(held(&|_| false) + needed > bytes_max),
                Some(going) => {
                    let goes = |model: &StoredModel| going.contains(&model.name);
                    prop_assert!(held(&|model| !goes(model)) + needed <= bytes_max);
                    // Whoever goes would not fit beside those that stay.
                    for model in models.iter().filter(|model| goes(model)) {
                        prop_assert!(held(&|other| !goes(other) || other == model) + needed > bytes_max);
                    }
                }
            }
        }
    }
}
