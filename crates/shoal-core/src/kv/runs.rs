//! Lists of ids by words: ids of 64 neighbours as bits, out of a caller's buffer and into it.
//!
//! Apart because only here ids are looked at one by one: what callers name mostly lies side by side, and a whole word of
//! it is told by adding and comparing without a branch.

use super::ids::BlockId;

const WORD: usize = 64;

/// Writes the ids of some blocks of one word, lowest first. Returns how many; `ids` is not shorter.
#[inline]
pub(super) fn write<T: BlockId>(ids: &mut [T], word: usize, bits: u64) -> usize {
    let count = bits.count_ones() as usize;
    let (ids, base) = (&mut ids[..count], first_of(word));
    let first = bits.trailing_zeros();
    if bits >> first == u64::MAX >> (WORD - count) {
        let base = base + first;
        for (id, block) in ids.iter_mut().zip(base..) {
            *id = T::of(block);
        }
        return count;
    }
    let mut left = bits;
    for id in ids {
        *id = T::of(base + left.trailing_zeros());
        left &= left - 1;
    }
    count
}

/// The first ids of a list that is not empty, as bits of one word: each names another block, and with `is_rising` one
/// after the one before. How many they are; at least one. What is no id has no bit.
#[inline]
pub(super) fn read<T: BlockId>(ids: &[T], is_rising: bool) -> (usize, u64, usize) {
    let first = ids[0].bits();
    let Ok(at) = u32::try_from(first) else { return (usize::MAX, 0, 1) };
    let (word, bit) = (at as usize / WORD, at as usize % WORD);
    let room = (WORD - bit).min(ids.len());
    if ids[room - 1].bits() == first + room as u64 - 1 {
        let wanted = (0..).map(|place: u64| first + place);
        let wrong =
            ids[..room].iter().zip(wanted).fold(0, |wrong, (id, wanted)| wrong | (id.bits() ^ wanted));
        if wrong == 0 {
            return (word, (u64::MAX >> (WORD - room)) << bit, room);
        }
    }
    // What may not come again: the same bit, or, where they have to rise, any up to it.
    let above = if is_rising { u64::MAX } else { 1 };
    let (mut bits, mut count) = (1_u64 << bit, 1);
    for id in &ids[1..] {
        let id = id.bits();
        if id / WORD as u64 != word as u64 || bits & (above << (id % WORD as u64)) != 0 {
            break;
        }
        bits |= 1 << (id % WORD as u64);
        count += 1;
    }
    (word, bits, count)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "there are at most u32::MAX ids, so words are fewer still"
)]
const fn first_of(word: usize) -> u32 {
    (word * WORD) as u32
}
