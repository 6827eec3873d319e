//! When a model is expected back, where its uses come in rounds.
//!
//! How often somebody came ([`UseRate`](super::UseRate)) says how soon the next one comes where uses do not depend on one
//! another. Where models are used one after the other, again and again (agents that hand work on, a job over all of them),
//! it says the opposite: whoever was not used for longest comes next, and would be sent away for the one before it. What
//! is needed last goes first (L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM
//! Systems Journal 5(2), 1966), as far as the past says when that is.
//!
//! A round is known by what lies between two uses of a model: so many turns of others, or so much time. The former holds
//! however long each of them takes, the latter whoever comes in between.

use crate::ids::ModelId;

/// So many gaps in succession have to be alike.
const GAPS: usize = 4;
/// Alike: they differ by at most this part of their mean. Who is late by more is not expected any more.
///
/// These two are what serves rounds best on the traces of `benches/shelf_traces` without taking chance for a round in those
/// where nothing comes in rounds.
const GAP_PARTS: u64 = 4;
/// Who has stayed away for so many gaps is not expected any more, however few turns that were.
const GAPS_LATE: u64 = 2;

/// The turns of a shelf: uses, of which each is of another model than the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turns {
    count: u64,
    newest: Option<ModelId>,
}

impl Turns {
    /// Somebody came for `model`.
    pub fn note(&mut self, model: ModelId) {
        if self.newest.replace(model) != Some(model) {
            self.count += 1;
        }
    }
}

/// When a model was last used, by the clock and by turns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rhythm {
    times: Newest,
    turns: Newest,
}

impl Rhythm {
    /// Somebody came for this model at `now_ms`, which `turns` has noted.
    pub fn note(&mut self, turns: &Turns, now_ms: u64) {
        self.times.note(now_ms, now_ms);
        // Use after use with nobody between is one turn.
        if self.turns.newest() != Some(turns.count) {
            self.turns.note(turns.count, now_ms);
        }
    }

    /// When somebody is expected to come next (a time of the same clock, not before `now_ms`); none where nobody can tell.
    #[must_use]
    pub fn next_ms(&self, turns: &Turns, now_ms: u64) -> Option<u64> {
        self.turns.next_ms(turns.count, now_ms).or_else(|| self.times.next_ms(now_ms, now_ms))
    }
}

/// The newest uses, newest first: each by the measure that gaps are taken in, and when it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Newest([Option<(u64, u64)>; GAPS + 1]);

impl Newest {
    fn newest(&self) -> Option<u64> {
        self.0[0].map(|(at, _)| at)
    }

    fn note(&mut self, at: u64, now_ms: u64) {
        self.0.rotate_right(1);
        self.0[0] = Some((at, now_ms));
    }

    fn next_ms(&self, at: u64, now_ms: u64) -> Option<u64> {
        let ((newest, newest_ms), (oldest, oldest_ms)) = (self.0[0]?, self.0[GAPS]?);
        let gaps = self.0.windows(2).filter_map(|pair| Some(pair[0]?.0.saturating_sub(pair[1]?.0)));
        let (least, most) = gaps.fold((u64::MAX, 0), |(least, most), gap| (gap.min(least), gap.max(most)));
        let mean = newest.saturating_sub(oldest) / GAPS as u64;
        let passed = at.saturating_sub(newest);
        if mean == 0 || most - least > mean / GAP_PARTS || passed > mean + mean / GAP_PARTS {
            return None;
        }
        let gap_ms = newest_ms.saturating_sub(oldest_ms) / GAPS as u64;
        if now_ms.saturating_sub(newest_ms) > gap_ms.saturating_mul(GAPS_LATE) {
            return None;
        }
        let left = u128::from(gap_ms) * u128::from(mean.saturating_sub(passed)) / u128::from(mean);
        Some(now_ms.saturating_add(u64::try_from(left).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays uses (model, when) and gives when each of `count` models is expected, seen at `now_ms`.
    fn expected(uses: &[(u32, u64)], count: u32, now_ms: u64) -> Vec<Option<u64>> {
        let mut turns = Turns::default();
        let mut rhythms = vec![Rhythm::default(); count as usize];
        for (model, at_ms) in uses {
            turns.note(ModelId(*model));
            rhythms[*model as usize].note(&turns, *at_ms);
        }
        rhythms.iter().map(|rhythm| rhythm.next_ms(&turns, now_ms)).collect()
    }

    #[test]
    fn a_round_is_known_by_its_turns_however_long_each_takes() {
        // 0, 1, 2 and again, with 100 to 900 ms between two.
        let waits = [100, 900, 300, 700, 200, 800, 400, 600, 500, 100, 900, 300, 700, 200];
        let mut at_ms = 0;
        let uses: Vec<(u32, u64)> = (0..)
            .zip(waits)
            .map(|(turn, wait)| {
                at_ms += wait;
                (turn % 3, at_ms)
            })
            .collect();
        let of = |uses: &[(u32, u64)]| {
            let said = expected(uses, 3, at_ms);
            let mut order: Vec<(u64, u32)> =
                (0..3).filter_map(|model| Some((said[model as usize]?, model))).collect();
            order.sort_unstable();
            order.into_iter().map(|(_, model)| model).collect::<Vec<_>>()
        };
        // The last use was of 1: then come 2, 0, and 1 again.
        assert_eq!(uses.last().map(|(model, _)| *model), Some(1));
        assert_eq!(of(&uses), [0, 1], "2 was there four times only, and has three gaps");
        let longer: Vec<(u32, u64)> = [(2, 0)].into_iter().chain(uses).collect();
        assert_eq!(of(&longer), [2, 0, 1]);
    }

    #[test]
    fn use_after_use_with_nobody_between_is_one_turn() {
        let uses: Vec<(u32, u64)> = (0..5)
            .flat_map(|round| {
                let at_ms = round * 1_000;
                [(0, at_ms), (0, at_ms + 100), (1, at_ms + 500)]
            })
            .collect();
        // A second after its last turn began, that is.
        assert_eq!(expected(&uses, 2, 4_600), [Some(5_100), Some(5_600)]);
    }

    #[test]
    fn a_round_is_known_by_its_time_whoever_comes_between() {
        // 0 each minute, beside 1 as it likes.
        let between = [0, 3, 1, 0, 5];
        let uses: Vec<(u32, u64)> = (0_u64..5)
            .flat_map(|round| {
                let at_ms = round * 60_000;
                let others = (0..between[usize::try_from(round).expect("few")]).flat_map(move |number| {
                    [(1, at_ms + 1_000 + 200 * number), (2, at_ms + 1_100 + 200 * number)]
                });
                others.chain([(0, at_ms + 30_000)])
            })
            .collect();
        assert_eq!(expected(&uses, 3, 280_000)[0], Some(330_000));
        // Late, it is expected at any moment, and not for long.
        assert_eq!(expected(&uses, 3, 340_000)[0], Some(340_000));
        assert_eq!(expected(&uses, 3, 346_000)[0], None);
    }

    #[test]
    fn who_stays_away_is_not_expected_any_more_though_nobody_else_came() {
        let uses: Vec<(u32, u64)> = (0..10).map(|turn| (turn % 2, u64::from(turn) * 500)).collect();
        assert_eq!(expected(&uses, 2, 4_500), [Some(5_000), Some(5_500)]);
        assert_eq!(expected(&uses, 2, 6_100), [None, Some(7_100)]);
        assert_eq!(expected(&uses, 2, 6_600), [None, None]);
    }

    #[test]
    fn what_has_no_round_is_not_taken_for_one() {
        let uses = [(0, 0), (0, 4_000), (0, 5_000), (0, 9_000), (0, 9_500), (0, 15_000)];
        assert_eq!(expected(&uses, 1, 15_000), [None]);
        assert_eq!(expected(&[], 1, 15_000), [None]);
        // All at once.
        assert_eq!(expected(&[(0, 7); 9], 1, 7), [None]);
    }
}
