//! A set of block ids as bits, in two levels: which of a run are in it is found without looking at what is not.
//!
//! Apart because it is the inner loop of allocating: the second level has one bit a word of the first, so the cost of
//! taking `n` ids from a run hardly depends on how many of its ids are absent.

/// See the module's text.
#[derive(Clone, Debug)]
pub(super) struct Bits {
    words: Vec<u64>,
    /// One bit a word: whether it has any.
    summary: Vec<u64>,
}

const WORD: usize = 64;

impl Bits {
    /// None of `length` ids.
    pub(super) fn new(length: u32) -> Self {
        let words = (length as usize).div_ceil(WORD);
        Self { words: vec![0; words], summary: vec![0; words.div_ceil(WORD)] }
    }

    pub(super) fn has(&self, id: u32) -> bool {
        let id = id as usize;
        self.words.get(id / WORD).is_some_and(|word| word >> (id % WORD) & 1 == 1)
    }

    #[inline]
    pub(super) fn set(&mut self, id: u32) {
        let (word, bit) = (id as usize / WORD, id as usize % WORD);
        self.words[word] |= 1 << bit;
        self.summary[word / WORD] |= 1 << (word % WORD);
    }

    /// Puts in the ids of one word ([`split`](Self::split)) that `bits` says.
    #[inline]
    pub(super) fn set_word(&mut self, word: usize, bits: u64) {
        self.words[word] |= bits;
        self.summary[word / WORD] |= 1 << (word % WORD);
    }

    /// The word of an id, and its bit there.
    #[inline]
    pub(super) const fn split(id: u32) -> (usize, u64) {
        (id as usize / WORD, 1 << (id as usize % WORD))
    }

    #[inline]
    pub(super) fn clear(&mut self, id: u32) {
        let (word, bit) = (id as usize / WORD, id as usize % WORD);
        self.words[word] &= !(1 << bit);
        if self.words[word] == 0 {
            self.summary[word / WORD] &= !(1 << (word % WORD));
        }
    }

    /// The bits of a word.
    #[inline]
    pub(super) fn word(&self, word: usize) -> u64 {
        self.words[word]
    }

    /// Those bits of a word whose ids are below `end`, which is not below its first.
    #[inline]
    pub(super) fn below(word: usize, end: u32) -> u64 {
        let count = end as usize - word * WORD;
        if count < WORD { (1 << count) - 1 } else { u64::MAX }
    }

    /// The last id of some of a word; there is one.
    #[inline]
    pub(super) const fn last(word: usize, bits: u64) -> u32 {
        Self::id(word, bits.ilog2())
    }

    /// Takes the first `count` ids of `from..to` out, lowest first; fewer if there are fewer. Returns how many. `each` is
    /// given them by words, as bits, of which there is at least one, and told how many they are.
    #[inline]
    pub(super) fn take(
        &mut self,
        from: u32,
        to: u32,
        count: u32,
        mut each: impl FnMut(usize, u64, u32),
    ) -> u32 {
        let mut left = count;
        let (first, last) = (from as usize / WORD, (to as usize).saturating_sub(1) / WORD);
        if from >= to {
            return 0;
        }
        let mut next = Some(first).filter(|_| left > 0);
        while let Some(word) = next.filter(|word| *word <= last) {
            let mut mask = u64::MAX;
            if word == first {
                mask <<= from as usize % WORD;
            }
            if word == last {
                mask &= u64::MAX >> (WORD - 1 - (to as usize - 1) % WORD);
            }
            let all = self.words[word];
            let (taken, many) = lowest(all & mask, left);
            if taken != 0 {
                each(word, taken, many);
                left -= many;
                self.words[word] = all & !taken;
                if self.words[word] == 0 {
                    self.summary[word / WORD] &= !(1 << (word % WORD));
                }
            }
            if left == 0 || word == last {
                break;
            }
            next = self.next_word(word + 1);
        }
        count - left
    }

    /// Calls `each` for the ids of `from..to`, lowest first.
    pub(super) fn each(&self, from: u32, to: u32, mut each: impl FnMut(u32)) {
        let mut next = self.next_word(from as usize / WORD);
        while let Some(word) = next.filter(|word| word * WORD < to as usize) {
            let mut open = self.words[word];
            while open != 0 {
                let id = Self::id(word, open.trailing_zeros());
                if (from..to).contains(&id) {
                    each(id);
                }
                open &= open - 1;
            }
            next = self.next_word(word + 1);
        }
    }

    /// The first word from `word` on that has any.
    #[inline]
    fn next_word(&self, word: usize) -> Option<usize> {
        let mut index = word / WORD;
        let mut open = self.summary.get(index)? & (u64::MAX << (word % WORD));
        while open == 0 {
            index += 1;
            open = *self.summary.get(index)?;
        }
        Some(index * WORD + open.trailing_zeros() as usize)
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "there are at most u32::MAX ids, so words are fewer still"
    )]
    pub(super) const fn id(word: usize, bit: u32) -> u32 {
        (word * WORD) as u32 + bit
    }
}

/// The lowest `count` bits of those that are set, or all, and how many. (Counting bits takes longer than most of what is
/// done with a word: it is done once.)
#[inline]
fn lowest(open: u64, count: u32) -> (u64, u32) {
    let all = open.count_ones();
    if all <= count {
        return (open, all);
    }
    // Mostly they are neighbours.
    let first = open.trailing_zeros();
    if (open >> first).trailing_ones() >= count {
        return (((1 << count) - 1) << first, count);
    }
    let mut rest = open;
    for _ in 0..count {
        rest &= rest - 1;
    }
    (open & !rest, count)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(
            length in 1_u32..9000,
            ops in proptest::collection::vec((0_u8..4, 0_u32..9000, 0_u32..9000, 0_u32..200), 1..60),
        ) {
            let (mut bits, mut plain) = (Bits::new(length), BTreeSet::new());
            for (kind, one, two, count) in ops {
                let (one, two) = (one % length, two % length);
                match kind {
                    0 => { bits.set(one); plain.insert(one); }
                    1 => { bits.clear(one); plain.remove(&one); }
                    2 => (one..two).step_by(3).for_each(|id| { bits.set(id); plain.insert(id); }),
                    _ => {
                        let mut found = Vec::new();
                        let taken = bits.take(one, two, count, |word, mut open, many| {
                            assert_eq!(open.count_ones(), many);
                            while open != 0 {
                                found.push(Bits::id(word, open.trailing_zeros()));
                                open &= open - 1;
                            }
                        });
                        let from_to = if one < two { one..two } else { 0..0 };
                        let wanted: Vec<u32> = plain.range(from_to).copied().take(count as usize).collect();
                        prop_assert_eq!(taken as usize, found.len());
                        prop_assert_eq!(&found, &wanted);
                        plain.retain(|id| !wanted.contains(id));
                    }
                }
                let mut all = Vec::new();
                bits.each(0, length, |id| all.push(id));
                prop_assert!(all.iter().eq(&plain));
                prop_assert!(all.iter().all(|id| bits.has(*id)));
            }
        }
    }
}
