//! Requests from a seed: the same seed gives the same requests, on every machine.

use super::trace::Asked;

/// Tokens that an answer and a prompt have on average.
const ANSWER_TOKENS: f64 = 200.0;
const PROMPT_TOKENS: f64 = 500.0;
/// Requests of one conversation on average, and the pause between two.
const TURNS: f64 = 6.0;
/// The mean of which five are left where it is drawn and rounded down.
const TURNS_AFTER_FIRST: f64 = 5.4848;
const PAUSE_MS: f64 = 15_000.0;

/// Splitmix64.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`, which must not be zero.
    pub const fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// In (0, 1].
    pub const fn part(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Exponential with this mean, as a whole number.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "means of hours at most")]
    pub fn after(&mut self, mean: f64) -> u64 {
        (-self.part().ln() * mean) as u64
    }
}

/// How requests come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pattern {
    /// A model is talked to for a while, a request every few seconds, then not for long.
    #[default]
    Conversations,
    /// Requests that have nothing to do with one another.
    Steady,
    /// One model after the other, again and again.
    Rounds,
}

impl Pattern {
    /// All of them, the default first.
    pub const ALL: [Self; 3] = [Self::Conversations, Self::Steady, Self::Rounds];

    /// As on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Conversations => "conversations",
            Self::Steady => "steady",
            Self::Rounds => "rounds",
        }
    }
}

/// Requests for `models` models over `horizon_ms`, about `per_minute` of them a minute, by time. But for rounds, the first
/// model is asked for most often, the second half as often, the third a third as often (Zipf). At most `most` of them.
#[must_use]
pub fn seeded(
    seed: u64,
    pattern: Pattern,
    models: usize,
    horizon_ms: u64,
    per_minute: f64,
    most: usize,
) -> Vec<Asked> {
    let mut random = Random(seed);
    let mut asked = Vec::new();
    let gap_ms = 60_000.0 / per_minute;
    let all: f64 = (1..=models).map(|rank| 1.0 / rank as f64).sum();
    match pattern {
        Pattern::Rounds => {
            let (mut at_ms, mut model) = (random.after(gap_ms), 0);
            while at_ms < horizon_ms && asked.len() < most {
                asked.push(one(&mut random, at_ms, model));
                model = (model + 1) % models.max(1);
                // Somebody who hands work on waits for each answer, more or less as long.
                at_ms += 1 + random.after(gap_ms * 0.25) + whole(gap_ms * 0.75);
            }
        }
        Pattern::Steady | Pattern::Conversations => {
            for model in 0..models {
                let mean_ms = gap_ms * all * (model + 1) as f64;
                let talks = pattern == Pattern::Conversations;
                let between_ms = if talks { mean_ms * TURNS } else { mean_ms };
                let mut at_ms = random.after(between_ms);
                while at_ms < horizon_ms && asked.len() < most {
                    let turns = if talks { 1 + random.after(TURNS_AFTER_FIRST) } else { 1 };
                    let mut turn_ms = at_ms;
                    for _ in 0..turns {
                        if turn_ms < horizon_ms && asked.len() < most {
                            asked.push(one(&mut random, turn_ms, model));
                        }
                        turn_ms += 1_000 + random.after(PAUSE_MS);
                    }
                    at_ms += 1 + random.after(between_ms);
                }
            }
        }
    }
    asked.sort_by_key(|one| (one.at_ms, one.model));
    asked
}

fn one(random: &mut Random, at_ms: u64, model: usize) -> Asked {
    let tokens = |drawn: u64| u32::try_from(1 + drawn).unwrap_or(u32::MAX);
    let (prompt_tokens, max_tokens) =
        (tokens(random.after(PROMPT_TOKENS)), tokens(random.after(ANSWER_TOKENS)));
    Asked { at_ms, model, prompt_tokens: Some(prompt_tokens), max_tokens: Some(max_tokens) }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a pause, and not negative")]
fn whole(ms: f64) -> u64 {
    ms as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_MS: u64 = 3_600_000;

    #[test]
    fn one_seed_gives_one_trace_and_another_another() {
        for pattern in Pattern::ALL {
            let of = |seed| seeded(seed, pattern, 4, HOUR_MS, 30.0, 1_000_000);
            assert_eq!(of(7), of(7));
            assert_ne!(of(7), of(8), "{pattern:?}");
            assert!(of(7).is_sorted_by_key(|one| one.at_ms));
        }
    }

    #[test]
    fn about_as_many_come_as_are_asked_for() {
        for pattern in Pattern::ALL {
            let count: usize =
                (0..20).map(|seed| seeded(seed, pattern, 5, HOUR_MS, 30.0, 1_000_000).len()).sum();
            let part = count as f64 / (20.0 * 60.0 * 30.0);
            assert!((0.93..1.07).contains(&part), "{pattern:?}: {part}");
        }
    }

    #[test]
    fn there_is_an_end_to_them() {
        for pattern in Pattern::ALL {
            assert_eq!(seeded(1, pattern, 3, u64::MAX >> 8, 6_000.0, 500).len(), 500, "{pattern:?}");
            assert!(seeded(1, pattern, 0, 0, 1.0, 500).is_empty());
        }
    }
}
