//! Lists of ids by words: ids of 64 neighbours as bits, out of a caller's buffer and into it.
//!
//! Apart because only here ids are looked at one by one: what callers name mostly lies side by side, and a whole word of
//! it is told by adding and comparing without a branch.

use core::num::NonZeroU64;

use super::ids::BlockId;

const WORD: usize = 64;

/// Writes the ids of some blocks of one word, lowest first: as many as `count` says, which is at least one; `ids` is not
/// shorter.
#[inline]
pub(super) fn write<T: BlockId>(ids: &mut [T], word: usize, bits: u64, count: usize) {
    debug_assert_eq!(bits.count_ones() as usize, count);
    let (ids, base) = (&mut ids[..count], first_of(word));
    let first = bits.trailing_zeros();
    if bits >> first == u64::MAX >> (WORD - count) {
        let base = base + first;
        for (id, block) in ids.iter_mut().zip(base..) {
            *id = T::of(block);
        }
        return;
    }
    let mut left = bits;
    for id in ids {
        // There is one: what is known not to be zero has its first bit told by one instruction.
        let Some(open) = NonZeroU64::new(left) else { break };
        *id = T::of(base + open.trailing_zeros());
        left &= left - 1;
    }
}

/// The first ids of a list that is not empty, as bits of one word: each names another block, and with `is_rising` one
/// after the one before. How many they are; at least one. What is no id has no bit.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "a word has 64 bits")]
pub(super) fn read<T: BlockId>(ids: &[T], is_rising: bool) -> (usize, u64, u32) {
    let first = ids[0].bits();
    let Ok(at) = u32::try_from(first) else { return (usize::MAX, 0, 1) };
    let (word, bit) = (at as usize / WORD, at as usize % WORD);
    let room = (WORD - bit).min(ids.len());
    if ids[room - 1].bits() == first + room as u64 - 1 {
        let wanted = (0..).map(|place: u64| first + place);
        let wrong =
            ids[..room].iter().zip(wanted).fold(0, |wrong, (id, wanted)| wrong | (id.bits() ^ wanted));
        if wrong == 0 {
            return (word, (u64::MAX >> (WORD - room)) << bit, room as u32);
        }
    }
    // Mostly they rise, so that none can come again.
    let end = (word as u64 + 1) * WORD as u64;
    let (mut bits, mut count, mut before) = (1_u64 << bit, 1, first);
    for id in &ids[1..] {
        let id = id.bits();
        if id <= before || id >= end {
            break;
        }
        bits |= 1 << (id % WORD as u64);
        before = id;
        count += 1;
    }
    if is_rising {
        return (word, bits, count);
    }
    for id in &ids[count as usize..] {
        let id = id.bits();
        if id / WORD as u64 != word as u64 || bits & (1 << (id % WORD as u64)) != 0 {
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
