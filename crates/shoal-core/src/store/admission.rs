//! What is worth a write.
//!
//! Apart because it is a decision: its inputs are logged with its answer (I11). Writing every block once wears a disk out
//! in months and fills it with prompts that never return, so a block has to have been seen before, and has to be slower to
//! compute than to read. The memory of what was seen is a table of small counters, halved now and then (the counting and
//! ageing of `TinyLFU`, Einziger, Friedman and Manes 2017; the filter in front of it left out).

use core::fmt;

use serde::Serialize;

use super::key::StoreKey;

/// What is known of a block that somebody offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Candidate {
    /// Its length.
    pub bytes: u64,
    /// How often it was seen, this time included.
    pub uses: u32,
    /// What computing it again would take, where the engine knows.
    pub recompute_us: Option<u64>,
    /// What reading it back would take, by the tier's measured speed.
    pub restore_us: u64,
    /// What may be written before the tier's share of wear is used up.
    pub writable_bytes: u64,
}

/// The rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct AdmissionRule {
    /// From which use on a block is kept; 1 keeps all.
    pub uses_min: u32,
}

impl Default for AdmissionRule {
    fn default() -> Self {
        Self { uses_min: 2 }
    }
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// Write it.
    Admit,
    /// It was not seen often enough.
    TooFewUses {
        /// How often it was seen.
        uses: u32,
        /// How often it has to be.
        uses_min: u32,
    },
    /// Computing it again is as fast as reading it.
    CheaperToRecompute {
        /// Computing.
        recompute_us: u64,
        /// Reading.
        restore_us: u64,
    },
    /// The tier has written its share for now.
    WornOut {
        /// Its length.
        bytes: u64,
        /// What may still be written.
        writable_bytes: u64,
    },
}

impl Verdict {
    /// Whether it is written.
    #[must_use]
    pub fn is_admitted(&self) -> bool {
        *self == Self::Admit
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Admit => write!(f, "kept"),
            Self::TooFewUses { uses, uses_min } => write!(f, "seen {uses} times, kept from {uses_min} on"),
            Self::CheaperToRecompute { recompute_us, restore_us } => {
                write!(f, "computed in {recompute_us} us, read in {restore_us} us")
            }
            Self::WornOut { bytes, writable_bytes } => {
                write!(f, "{bytes} bytes, and {writable_bytes} may be written for now")
            }
        }
    }
}

/// Decides. The same inputs give the same answer.
#[must_use]
pub fn decide(candidate: &Candidate, rule: &AdmissionRule) -> Verdict {
    let Candidate { bytes, uses, recompute_us, restore_us, writable_bytes } = *candidate;
    match recompute_us {
        _ if uses < rule.uses_min => Verdict::TooFewUses { uses, uses_min: rule.uses_min },
        Some(recompute_us) if recompute_us <= restore_us => {
            Verdict::CheaperToRecompute { recompute_us, restore_us }
        }
        _ if bytes > writable_bytes => Verdict::WornOut { bytes, writable_bytes },
        _ => Verdict::Admit,
    }
}

const COUNT_MAX: u8 = 15;
const ROWS: usize = 4;

/// How often names were seen, roughly and never too low until it ages: a count-min sketch of four rows.
#[derive(Clone, Debug)]
pub struct Sightings {
    counters: Vec<u8>,
    width: usize,
    seen: usize,
}

impl Sightings {
    /// For about `names` names at a time: four bytes each, rounded up to a power of two.
    #[must_use]
    pub fn new(names: usize) -> Self {
        let width = names.clamp(64, 1 << 26).next_power_of_two();
        Self { counters: vec![0; width * ROWS], width, seen: 0 }
    }

    fn places(&self, key: &StoreKey) -> [usize; ROWS] {
        let bytes = key.to_bytes();
        let hash = xxhash_rust::xxh3::xxh3_128(&bytes);
        let mask = self.width - 1;
        let word = |row: usize| (hash >> (32 * row)) as usize & mask;
        [0, 1, 2, 3].map(|row| row * self.width + word(row))
    }

    /// Notes a sighting; how many there were, this one included.
    pub fn saw(&mut self, key: &StoreKey) -> u32 {
        let places = self.places(key);
        let least = places.iter().map(|at| self.counters[*at]).min().unwrap_or(0);
        for at in places {
            // Only the least ones grow: the others count somebody else too.
            if self.counters[at] == least && least < COUNT_MAX {
                self.counters[at] += 1;
            }
        }
        self.seen += 1;
        if self.seen >= 8 * self.width {
            self.seen = 0;
            self.counters.iter_mut().for_each(|counter| *counter /= 2);
        }
        u32::from(least.saturating_add(1))
    }
}

/// Bytes that may be written: so many an hour, saved up for at most an hour, so that a disk lasts.
#[derive(Clone, Debug)]
pub struct WriteAllowance {
    bytes_per_hour: Option<u64>,
    left: u64,
    at_ms: u64,
}

impl WriteAllowance {
    /// So many bytes an hour; none for no limit.
    #[must_use]
    pub fn new(bytes_per_hour: Option<u64>, now_ms: u64) -> Self {
        Self { bytes_per_hour, left: bytes_per_hour.unwrap_or(u64::MAX), at_ms: now_ms }
    }

    /// What may be written now.
    pub fn writable(&mut self, now_ms: u64) -> u64 {
        let Some(rate) = self.bytes_per_hour else { return u64::MAX };
        let elapsed = u128::from(now_ms.saturating_sub(self.at_ms));
        let grown = u64::try_from(u128::from(rate) * elapsed / 3_600_000).unwrap_or(u64::MAX);
        if grown > 0 {
            self.left = self.left.saturating_add(grown).min(rate);
            // Only the time that whole bytes took: the rest counts next time.
            let used_ms = u128::from(grown) * 3_600_000 / u128::from(rate);
            self.at_ms += u64::try_from(used_ms).unwrap_or(0);
        }
        self.left
    }

    /// Something was written.
    pub fn wrote(&mut self, bytes: u64) {
        if self.bytes_per_hour.is_some() {
            self.left = self.left.saturating_sub(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::key::Fingerprint;
    use super::*;

    fn key(block: u128) -> StoreKey {
        StoreKey { fingerprint: Fingerprint(1), tenant: 0, block }
    }

    #[test]
    fn the_second_use_of_what_is_slow_to_compute_is_kept() {
        let rule = AdmissionRule::default();
        let good = Candidate {
            bytes: 100,
            uses: 2,
            recompute_us: Some(900),
            restore_us: 500,
            writable_bytes: u64::MAX,
        };
        assert_eq!(decide(&good, &rule), Verdict::Admit);
        assert!(
            decide(&Candidate { recompute_us: None, ..good }, &rule).is_admitted(),
            "nothing speaks against"
        );
        let refused = [
            (Candidate { uses: 1, ..good }, Verdict::TooFewUses { uses: 1, uses_min: 2 }),
            (
                Candidate { restore_us: 900, ..good },
                Verdict::CheaperToRecompute { recompute_us: 900, restore_us: 900 },
            ),
            (Candidate { writable_bytes: 99, ..good }, Verdict::WornOut { bytes: 100, writable_bytes: 99 }),
        ];
        for (candidate, verdict) in refused {
            assert_eq!(decide(&candidate, &rule), verdict);
            assert!(!verdict.to_string().is_empty());
        }
    }

    #[test]
    fn sightings_are_never_too_few_and_fade() {
        let mut sightings = Sightings::new(1024);
        assert_eq!([sightings.saw(&key(1)), sightings.saw(&key(1)), sightings.saw(&key(1))], [1, 2, 3]);
        let new = (100..600).filter(|block| sightings.saw(&key(*block)) > 1).count();
        assert!(new < 50, "{new} of 500 new ones counted as seen");
        for block in 0..20_000 {
            sightings.saw(&key(10_000 + block));
        }
        assert!(sightings.counters.iter().any(|counter| *counter < COUNT_MAX));
    }

    #[test]
    fn an_hour_has_its_bytes() {
        let mut allowance = WriteAllowance::new(Some(3600), 0);
        assert_eq!(allowance.writable(0), 3600);
        allowance.wrote(3600);
        assert_eq!(allowance.writable(500), 0);
        assert_eq!(allowance.writable(2_000), 2, "no part of a byte is lost between two looks");
        assert_eq!(allowance.writable(100_000_000), 3600);
        assert_eq!(WriteAllowance::new(None, 0).writable(0), u64::MAX);
    }
}
