//! Whose request is next: the queue of one model, fair between those who ask.
//!
//! Apart from [`crate::policy`], which shares memory between models: here the places at one model (so many requests at the
//! same time) are shared between keys. Pure: time is an argument, what waits is the caller's.
//!
//! **What is shared is time at the model**, counted for each place that a request has there. The next place goes to whoever
//! has had least of it; where that is equal, to whoever has fewest places now, then to whose last turn is longest ago. So one
//! who asks for little is next as soon as a place is free, however many requests another has waiting, and long answers cost
//! their key as much as many short ones. This is fair queueing by service received, as in start-time fair queueing
//! (P. Goyal, H. Vin and H. Cheng, SIGCOMM 1996), but charged as time goes by, because nobody knows beforehand how long an
//! answer is.
//!
//! Whoever was away brings nothing back: it begins where the least served of those present stands (or where it stood, if
//! that is further). So nobody saves up time, and nobody pays for what it had while the model was idle.
//!
//! **How many may wait.** Of a bounded queue one key may have as many as there are places left in it, the threshold of A.
//! Choudhury and E. Hahne ("Dynamic queue length thresholds for shared-memory packet switches", 1998): `n` greedy keys end
//! up with a part of `1 / (n + 1)` each, and one part stays for who comes next.

use std::collections::{BTreeMap, VecDeque};

/// One who asks.
#[derive(Clone, Debug)]
struct Asker<T> {
    waiting: VecDeque<T>,
    active: u32,
    /// Time at the model until `since_ms`; from then on it grows by `active` a millisecond.
    used_ms: u64,
    since_ms: u64,
    /// The number of its last turn.
    turn: u64,
}

impl<T> Asker<T> {
    fn is_present(&self) -> bool {
        self.active > 0 || !self.waiting.is_empty()
    }

    const fn used_ms(&self, now_ms: u64) -> u64 {
        let since = now_ms.saturating_sub(self.since_ms);
        self.used_ms.saturating_add(since.saturating_mul(self.active as u64))
    }

    const fn begin(&mut self, turn: u64, now_ms: u64) {
        self.charge(now_ms);
        self.active += 1;
        self.turn = turn;
    }

    const fn charge(&mut self, now_ms: u64) {
        self.used_ms = self.used_ms(now_ms);
        self.since_ms = now_ms;
    }
}

/// What there is of one key, for others to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing<'q, K, T> {
    /// Who.
    pub key: &'q K,
    /// Its requests at the model.
    pub active: u32,
    /// The first of those that wait; none where none do.
    pub first: Option<&'q T>,
    /// How many wait.
    pub waiting: usize,
    /// Time at the model that it is charged with (milliseconds), to be compared with that of others here.
    pub used_ms: u64,
}

/// Requests of one model: those that wait, by key, and how many each key has at the model.
#[derive(Clone, Debug)]
pub struct FairQueue<K, T> {
    askers: BTreeMap<K, Asker<T>>,
    waiting: usize,
    active: u64,
    turns: u64,
}

impl<K, T> Default for FairQueue<K, T> {
    fn default() -> Self {
        Self { askers: BTreeMap::new(), waiting: 0, active: 0, turns: 0 }
    }
}

impl<K: Ord + Clone, T> FairQueue<K, T> {
    /// How many wait.
    #[must_use]
    pub const fn waiting(&self) -> usize {
        self.waiting
    }

    /// How many are at the model.
    #[must_use]
    pub const fn active(&self) -> u64 {
        self.active
    }

    /// All that wait, key by key, the oldest of each first.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.askers.values().flat_map(|asker| &asker.waiting)
    }

    /// Those that have something here, in the order of their keys.
    pub fn standings(&self, now_ms: u64) -> impl Iterator<Item = Standing<'_, K, T>> {
        self.askers.iter().filter(|(_, asker)| asker.is_present()).map(move |(key, asker)| Standing {
            key,
            active: asker.active,
            first: asker.waiting.front(),
            waiting: asker.waiting.len(),
            used_ms: asker.used_ms(now_ms),
        })
    }

    /// How many of this key wait.
    #[must_use]
    pub fn waiting_of(&self, key: &K) -> usize {
        self.askers.get(key).map_or(0, |asker| asker.waiting.len())
    }

    /// How many this key may have waiting in a queue of `limit` by now; one more may wait while fewer do.
    #[must_use]
    pub const fn share(&self, limit: usize) -> usize {
        limit.saturating_sub(self.waiting)
    }

    /// One more waits.
    pub fn push(&mut self, key: &K, item: T, now_ms: u64) {
        self.enter(key, now_ms).waiting.push_back(item);
        self.waiting += 1;
    }

    /// Gives the one whose turn it is a place at the model.
    pub fn begin_next(&mut self, now_ms: u64) -> Option<(K, T)> {
        let ready = self.askers.iter_mut().filter(|(_, asker)| !asker.waiting.is_empty());
        let (key, asker) =
            ready.min_by_key(|(_, asker)| (asker.used_ms(now_ms), asker.active, asker.turn))?;
        let item = asker.waiting.pop_front()?;
        self.waiting -= 1;
        self.active += 1;
        self.turns += 1;
        asker.begin(self.turns, now_ms);
        Some((key.clone(), item))
    }

    /// A request of this key gets a place at the model without waiting.
    pub fn begin(&mut self, key: &K, now_ms: u64) {
        self.active += 1;
        self.turns += 1;
        let turn = self.turns;
        self.enter(key, now_ms).begin(turn, now_ms);
    }

    /// A request of this key has left the model. False, and nothing else, where it has none there.
    pub fn end(&mut self, key: &K, now_ms: u64) -> bool {
        let Some(asker) = self.askers.get_mut(key).filter(|asker| asker.active > 0) else { return false };
        asker.charge(now_ms);
        asker.active -= 1;
        self.active -= 1;
        self.forget();
        true
    }

    /// Takes those out that are not to wait any longer.
    pub fn retain(&mut self, mut stays: impl FnMut(&T) -> bool) {
        for asker in self.askers.values_mut() {
            let before = asker.waiting.len();
            asker.waiting.retain(&mut stays);
            self.waiting -= before - asker.waiting.len();
        }
        self.forget();
    }

    /// Takes all out that wait.
    pub fn drain(&mut self) -> Vec<T> {
        let drained = self.askers.values_mut().flat_map(|asker| asker.waiting.drain(..)).collect();
        self.waiting = 0;
        self.forget();
        drained
    }

    /// Who comes, or comes back, begins with those that are here.
    fn enter(&mut self, key: &K, now_ms: u64) -> &mut Asker<T> {
        let present = self.askers.values().filter(|asker| asker.is_present());
        let least = present.map(|asker| asker.used_ms(now_ms)).min().unwrap_or(0);
        let asker = self.askers.entry(key.clone()).or_insert_with(|| Asker {
            waiting: VecDeque::new(),
            active: 0,
            used_ms: 0,
            since_ms: now_ms,
            turn: 0,
        });
        if !asker.is_present() {
            asker.used_ms = asker.used_ms.max(least);
            asker.since_ms = now_ms;
        }
        asker
    }

    /// Nobody is left to compare with.
    fn forget(&mut self) {
        if self.waiting == 0 && self.active == 0 {
            self.askers.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Serves in turn, and gives the order of keys.
    fn order(queue: &mut FairQueue<char, u32>, now_ms: u64, count: usize) -> String {
        let mut served = String::new();
        for _ in 0..count {
            let Some((key, _)) = queue.begin_next(now_ms) else { break };
            served.push(key);
        }
        served
    }

    #[test]
    fn one_request_does_not_wait_for_the_herd_before_it() {
        let mut queue = FairQueue::default();
        (0..200).for_each(|number| queue.push(&'a', number, 0));
        queue.push(&'b', 0, 5);
        assert_eq!(order(&mut queue, 10, 4), "abaa");
        // All places are taken; the next that is free goes to who asks for little.
        queue.push(&'c', 0, 20);
        queue.push(&'b', 1, 20);
        assert!(queue.end(&'a', 30));
        assert_eq!(order(&mut queue, 30, 4), "cbaa", "c began where b stood, and has had nothing since");
    }

    #[test]
    fn long_answers_cost_as_much_as_many_short_ones() {
        let (mut queue, mut now_ms) = (FairQueue::default(), 0);
        let mut served = [0u64; 2];
        (0..1_000).for_each(|number| ['a', 'b'].iter().for_each(|key| queue.push(key, number, 0)));
        while now_ms < 100_000 {
            let (key, _) = queue.begin_next(now_ms).expect("enough wait");
            let took = if key == 'a' { 900 } else { 100 };
            served[usize::from(key == 'b')] += took;
            now_ms += took;
            queue.end(&key, now_ms);
        }
        assert!(served[0].abs_diff(served[1]) <= 900, "{served:?}");
    }

    #[test]
    fn nobody_saves_up_time_by_being_away() {
        let mut queue = FairQueue::default();
        queue.begin(&'a', 0);
        queue.begin(&'b', 0);
        assert!(queue.end(&'b', 10));
        // b was away while a had a thousand seconds.
        (0..4).for_each(|number| ['a', 'b'].iter().for_each(|key| queue.push(key, number, 1_000_000)));
        assert_eq!(order(&mut queue, 1_000_000, 4), "baba");
        assert!(!queue.end(&'c', 1_000_000), "it has none");
    }

    #[test]
    fn nobody_fills_the_queue() {
        const LIMIT: usize = 12;
        let fill = |keys: &str| {
            let mut queue = FairQueue::default();
            for number in 0..LIMIT {
                for key in keys.chars() {
                    if queue.waiting_of(&key) < queue.share(LIMIT) {
                        queue.push(&key, number, 0);
                    }
                }
            }
            keys.chars().map(|key| queue.waiting_of(&key)).collect::<Vec<_>>()
        };
        assert_eq!(fill("a"), [6]);
        assert_eq!(fill("ab"), [4, 4]);
        assert_eq!(fill("abc"), [3, 3, 3]);
    }

    /// The same by the definition: every millisecond of every place is written down.
    #[derive(Default)]
    struct Plain {
        waiting: Vec<(u8, u32)>,
        active: Vec<u8>,
        used: BTreeMap<u8, u64>,
        turns: Vec<u8>,
    }

    impl Plain {
        fn pass(&mut self, ms: u64) {
            for key in &self.active {
                *self.used.entry(*key).or_default() += ms;
            }
        }

        fn is_present(&self, key: u8) -> bool {
            self.active.contains(&key) || self.waiting.iter().any(|(waits, _)| *waits == key)
        }

        fn enter(&mut self, key: u8) {
            if self.active.is_empty() && self.waiting.is_empty() {
                (self.used, self.turns) = (BTreeMap::new(), Vec::new());
            }
            if !self.is_present(key) {
                let others = (0..=u8::MAX).filter(|other| self.is_present(*other));
                let least = others.map(|other| self.used.get(&other).copied().unwrap_or(0)).min();
                let own = self.used.entry(key).or_default();
                *own = least.unwrap_or(0).max(*own);
            }
        }

        fn next(&mut self) -> Option<(u8, u32)> {
            let rank = |key: u8| {
                let places: u32 = self.active.iter().map(|other| u32::from(*other == key)).sum();
                let last = self.turns.iter().rposition(|other| *other == key).map_or(0, |at| at + 1);
                (self.used.get(&key).copied().unwrap_or(0), places, last, key)
            };
            let best = self.waiting.iter().map(|(key, _)| *key).min_by_key(|key| rank(*key))?;
            let at = self.waiting.iter().position(|(key, _)| *key == best)?;
            Some(self.waiting.remove(at))
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Pass(u64),
        Push(u8),
        Serve,
        Straight(u8),
        End(usize),
        Leave(usize),
        Drain,
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = prop_oneof![
            4 => (0..500u64).prop_map(Op::Pass),
            6 => (0..5u8).prop_map(Op::Push),
            5 => Just(Op::Serve),
            2 => (0..5u8).prop_map(Op::Straight),
            5 => (0..64usize).prop_map(Op::End),
            1 => (0..64usize).prop_map(Op::Leave),
            1 => Just(Op::Drain),
        ];
        proptest::collection::vec(op, 1..200)
    }

    proptest! {
        #[test]
        fn it_serves_as_the_definition_says(ops in ops()) {
            let (mut queue, mut plain) = (FairQueue::<u8, u32>::default(), Plain::default());
            let (mut now_ms, mut number) = (0, 0);
            for op in ops {
                match op {
                    Op::Pass(ms) => {
                        now_ms += ms;
                        plain.pass(ms);
                    }
                    Op::Push(key) => {
                        number += 1;
                        plain.enter(key);
                        plain.waiting.push((key, number));
                        queue.push(&key, number, now_ms);
                    }
                    Op::Serve => {
                        let next = plain.next();
                        if let Some((key, _)) = next {
                            plain.active.push(key);
                            plain.turns.push(key);
                        }
                        prop_assert_eq!(queue.begin_next(now_ms), next);
                    }
                    Op::Straight(key) => {
                        plain.enter(key);
                        plain.active.push(key);
                        plain.turns.push(key);
                        queue.begin(&key, now_ms);
                    }
                    Op::End(at) if !plain.active.is_empty() => {
                        let key = plain.active.remove(at % plain.active.len());
                        prop_assert!(queue.end(&key, now_ms));
                    }
                    Op::Leave(at) if !plain.waiting.is_empty() => {
                        let (_, gone) = plain.waiting.remove(at % plain.waiting.len());
                        queue.retain(|waits| *waits != gone);
                    }
                    Op::Drain => {
                        let mut drained = queue.drain();
                        drained.sort_unstable();
                        prop_assert_eq!(drained, plain.waiting.drain(..).map(|(_, item)| item).collect::<Vec<_>>());
                    }
                    Op::End(_) | Op::Leave(_) => {}
                }
                prop_assert_eq!(queue.waiting(), plain.waiting.len());
                prop_assert_eq!(queue.active(), plain.active.len() as u64);
                for stands in queue.standings(now_ms) {
                    prop_assert_eq!(stands.waiting, plain.waiting.iter().filter(|(key, _)| key == stands.key).count());
                    prop_assert_eq!(stands.used_ms, plain.used.get(stands.key).copied().unwrap_or(0));
                }
            }
        }

        /// Whoever keeps asking, whatever its answers take and whatever others ask for, has had its part of the time.
        #[test]
        fn who_keeps_asking_gets_a_fair_part(
            places in 1..6usize,
            took in proptest::collection::vec(1..400u64, 2..5),
            seed in any::<u64>(),
        ) {
            let keys = u8::try_from(took.len()).expect("few");
            let mut queue = FairQueue::<u8, ()>::default();
            (0..keys).for_each(|key| (0..300).for_each(|_| queue.push(&key, (), 0)));
            let (mut now_ms, mut dice) = (0, seed | 1);
            let mut under_way: Vec<(u64, u8)> = Vec::new();
            let mut used = vec![0u64; took.len()];
            loop {
                while under_way.len() < places {
                    let (key, ()) = queue.begin_next(now_ms).expect("enough wait");
                    dice ^= dice << 13;
                    dice ^= dice >> 7;
                    dice ^= dice << 17;
                    under_way.push((now_ms + 1 + dice % took[usize::from(key)], key));
                }
                // As long as all have something waiting.
                if (0..keys).any(|key| queue.waiting_of(&key) == 0) {
                    break;
                }
                let at = (0..under_way.len()).min_by_key(|at| under_way[*at].0).expect("one at least");
                let (until_ms, key) = under_way.swap_remove(at);
                for (_, key) in under_way.iter().chain([&(0, key)]) {
                    used[usize::from(*key)] += until_ms - now_ms;
                }
                now_ms = until_ms;
                queue.end(&key, now_ms);
            }
            // Nobody is ahead of anybody by more than the answers that may be under way at the same time.
            let longest = took.iter().max().copied().unwrap_or(0);
            let (least, most) = (used.iter().min().expect("two"), used.iter().max().expect("two"));
            prop_assert!(most - least <= places as u64 * longest, "{used:?} with {places} places of {longest}");
        }
    }
}
