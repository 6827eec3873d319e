//! The world of one history: its clock, and what happens in which order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use shoal_core::bytes::ByteCount;
use tokio::sync::mpsc;

use super::clients::{Client, Routed};
use super::overhead::BesideWeights;
use super::policies::PolicyProcess;
use super::processes::{LINGERS_MS_MAX, Lingering, Stranger};
use super::programs::Steward;
use super::shelf::whole_config;
use super::worker::Worker;
use super::{CALM_MS, DEVICE, STARVES_MS, STEPS};
use crate::broker::dice::Dice;
use crate::broker::{Core, Decision, Life, Looked, Timing, Wanted};
use crate::config::ServerConfig;

/// Decisions of one moment.
const DECISIONS_MAX: usize = 1_024;
/// One look of the calm world, in which every worker does one thing.
pub(super) const STEP_MS: u64 = 20;
/// Events that are told of a history that failed.
const TOLD_MAX: usize = 60;
/// How long all models are busy in the end, how long a request then takes, and how many clients each has.
const RUSH_MS: u64 = 15_000;
const RUSH_WORK_MS: u64 = 200;
const RUSH_CLIENTS: usize = 2;

/// What was seen in histories: a test that saw nothing would prove nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    /// Readings of the driver that counted.
    pub(super) looks: u64,
    pub(super) decisions: u64,
    /// Those that were made again from the log.
    pub(super) replanned: u64,
    pub(super) restarts: u64,
    pub(super) kills: u64,
    /// Readings at which nobody waited any more for what the dead still had.
    pub(super) stuck: u64,
    /// Configurations, models added, taken off, and served by another worker.
    pub(super) reloads: u64,
    pub(super) added: u64,
    pub(super) removed: u64,
    pub(super) restarted: u64,
    /// Keys of the server that a reload leaves as they were.
    pub(super) kept_keys: u64,
    pub(super) overhead_up: u64,
    pub(super) overhead_down: u64,
    pub(super) drifts: u64,
    /// Leases for overhead that fell by time; those for steps that came with weights, and that went with them; steps that
    /// took more without a question; steps that asked, and those that asked for what had been measured.
    pub(super) overhead_fell: u64,
    pub(super) came_with_weights: u64,
    pub(super) went_with_weights: u64,
    pub(super) steps_unasked: u64,
    pub(super) overhead_asked: u64,
    pub(super) overhead_known: u64,
    /// Programs that were ready, and that ended by themselves.
    pub(super) programs: u64,
    pub(super) program_ends: u64,
    /// Looks at such that had started something which lived longer.
    pub(super) programs_ending: u64,
    /// Programs that took again what they had given back.
    pub(super) programs_grew: u64,
    /// Questions to policies outside, and those that they left open.
    pub(super) questions: u64,
    pub(super) unanswered: u64,
    /// Leases for KV: granted, turned down, given back by order, and by themselves.
    pub(super) kv_granted: u64,
    pub(super) kv_denied: u64,
    pub(super) kv_ordered: u64,
    pub(super) kv_returned: u64,
    /// Orders that took weights of a model and left it prefixes.
    pub(super) cached_outlasted: u64,
    /// Requests that were answered by an engine with KV when nothing went wrong any more.
    pub(super) ran_with_kv: u64,
    /// Requests that were begun while all models were busy, and the longest that one waited.
    pub(super) served: u64,
    pub(super) waited_ms_max: u64,
}

impl Seen {
    pub(super) fn add(&mut self, other: &Self) {
        let waited_ms_max = self.waited_ms_max.max(other.waited_ms_max);
        self.cached_outlasted += other.cached_outlasted;
        let pairs = self.counts_mut().into_iter().zip(other.clone().counts_mut().map(|count| *count));
        pairs.for_each(|(count, more)| *count += more);
        self.waited_ms_max = waited_ms_max;
    }

    fn counts_mut(&mut self) -> [&mut u64; 32] {
        [
            &mut self.looks,
            &mut self.decisions,
            &mut self.replanned,
            &mut self.restarts,
            &mut self.kills,
            &mut self.stuck,
            &mut self.reloads,
            &mut self.added,
            &mut self.removed,
            &mut self.restarted,
            &mut self.kept_keys,
            &mut self.overhead_up,
            &mut self.overhead_down,
            &mut self.drifts,
            &mut self.overhead_fell,
            &mut self.came_with_weights,
            &mut self.went_with_weights,
            &mut self.steps_unasked,
            &mut self.overhead_asked,
            &mut self.overhead_known,
            &mut self.programs,
            &mut self.program_ends,
            &mut self.programs_ending,
            &mut self.programs_grew,
            &mut self.questions,
            &mut self.unanswered,
            &mut self.served,
            &mut self.kv_granted,
            &mut self.kv_denied,
            &mut self.kv_ordered,
            &mut self.kv_returned,
            &mut self.ran_with_kv,
        ]
    }

    /// Each kind of event happened time and again.
    pub(super) fn is_enough(&mut self) {
        let all = *self;
        for count in self.counts_mut() {
            assert!(*count >= 20, "something hardly happened: {all:?}");
        }
        // Engines are seldom idle here when memory is short; the policy's own histories have it often.
        assert!(self.cached_outlasted > 0, "weights never went before prefixes: {all:?}");
    }
}

#[expect(clippy::struct_excessive_bools, reason = "facts that do not exclude one another")]
pub(super) struct World {
    pub(super) seed: u64,
    pub(super) core: Core,
    pub(super) dice: Dice,
    pub(super) now_ms: u64,
    /// What the file says; a part of it counts from the server's next start.
    pub(super) file: ServerConfig,
    pub(super) workers: BTreeMap<usize, Worker>,
    pub(super) stewards: BTreeMap<usize, Steward>,
    pub(super) policies: Vec<PolicyProcess>,
    pub(super) clients: Vec<Client>,
    pub(super) routed: Vec<Routed>,
    /// Workers of a server before that are being ended.
    pub(super) strangers: Vec<Stranger>,
    pub(super) pids: u32,
    /// Models that were told to answer fewer requests than they have.
    pub(super) narrowed: BTreeSet<usize>,
    /// Models that were set apart while both were on the device, by name.
    pub(super) together: BTreeSet<(String, String)>,
    /// Names that were given out.
    pub(super) names: usize,
    pub(super) is_calm: bool,
    /// The server is never killed, and its shelf stays as it is.
    pub(super) lives_on: bool,
    /// Nothing fails, and nobody has to be served yet.
    pub(super) is_still: bool,
    /// All models are busy: whoever is answered asks again.
    pub(super) is_rush: bool,
    /// What others have of the device.
    pub(super) others: ByteCount,
    /// What was leased for steps, by place, when that was last looked at.
    pub(super) beside_weights: BTreeMap<usize, BesideWeights>,
    /// What the device still has of processes that are gone.
    pub(super) lingering: Vec<Lingering>,
    /// A reading on its way.
    pub(super) looked: Option<Looked>,
    /// What programs did not have of their charge at the newest few, on which what comes off the budget rests.
    pub(super) spare_then: [ByteCount; 3],
    pub(super) decisions: mpsc::Receiver<Decision>,
    /// Every event and every decision, where they are to be kept; and the newest event in it.
    pub(super) story: Option<Vec<String>>,
    pub(super) told: u64,
    pub(super) seen: Seen,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let file = whole_config(seed);
        let (core, decisions) = Self::core(&file);
        let mut world = Self {
            seed,
            core,
            dice: Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1),
            now_ms: 0,
            names: file.models.len(),
            file,
            workers: BTreeMap::new(),
            stewards: BTreeMap::new(),
            policies: Vec::new(),
            clients: Vec::new(),
            routed: Vec::new(),
            strangers: Vec::new(),
            pids: 100,
            narrowed: BTreeSet::new(),
            together: BTreeSet::new(),
            is_calm: false,
            is_still: false,
            is_rush: false,
            lives_on: false,
            others: ByteCount::ZERO,
            beside_weights: BTreeMap::new(),
            lingering: Vec::new(),
            looked: None,
            spare_then: [ByteCount::ZERO; 3],
            decisions,
            story: None,
            told: 0,
            seen: Seen::default(),
        };
        world.core.handle_timer(0);
        world
    }

    pub(super) fn core(file: &ServerConfig) -> (Core, mpsc::Receiver<Decision>) {
        let timing = Timing { quantum_ms: crate::broker::millis(file.quantum), ..Timing::default() };
        let (sender, decisions) = mpsc::channel(DECISIONS_MAX);
        (Core::new(Arc::new(file.clone()), timing, 1_000_000, Some(sender)), decisions)
    }

    /// The whole history.
    pub(super) fn whole(&mut self) {
        self.play();
        self.crowd();
        self.calm();
        self.rush();
    }

    /// What happened last, where a history failed.
    pub(super) fn tell_the_end(&self) {
        let events: Vec<_> = self.core.events.kept().collect();
        for event in events.iter().rev().take(TOLD_MAX).rev() {
            let model = event.model.as_deref().unwrap_or_default();
            eprintln!("{} {model} {}: {}", event.at_ms, event.what.name(), event.text);
        }
        eprintln!("it is {} ms after the start", self.now_ms);
    }

    pub(super) const fn is_steady(&self) -> bool {
        self.is_calm || self.is_still
    }

    /// The places of the models that the configuration has.
    pub(super) fn places(&self) -> Vec<usize> {
        self.core.by_name.values().copied().collect()
    }

    /// Time goes by, up to `ms`; timers ring when they want to, deadlines pass, policies outside answer.
    pub(super) fn pass(&mut self, ms: u64) {
        let until = self.now_ms + ms;
        loop {
            let timer = self.core.timer_ms.filter(|at| *at <= until);
            let late = self.clients.iter().map(|client| client.deadline_ms).min().filter(|at| *at <= until);
            let policy = self.next_policy_ms().filter(|at| *at <= until);
            let Some(at) = timer.into_iter().chain(late).chain(policy).min() else { break };
            self.now_ms = self.now_ms.max(at);
            if timer == Some(at) {
                self.ring();
            }
            self.keep_policies();
            self.expire();
            self.check();
        }
        self.now_ms = until;
    }

    pub(super) fn play(&mut self) {
        for _ in 0..STEPS {
            self.disturb();
            self.keep_policies();
            self.keep_processes();
            let place = self.dice.index(self.core.models.len());
            self.work(place);
            self.tend(place);
            if self.looked.is_none() && self.dice.chance(60) {
                self.look();
            } else if self.dice.chance(70) {
                self.see();
            }
            self.expire();
            self.check();
            let ms = self.dice.roll(200);
            self.pass(ms);
        }
    }

    /// Others came to stay: what they have comes off, and what was leased beyond is back, as far as anybody may be asked.
    fn crowd(&mut self) {
        self.configure_for_all();
        self.unpin_all();
        self.is_still = true;
        // Time enough to see that one does not live, and to ask the next where one does not obey.
        self.run(30_000);
        let is_hung = |name: &String| {
            let worker = self.core.by_name.get(name).and_then(|place| self.workers.get(place));
            worker.is_some_and(|worker| worker.is_hung)
        };
        let together = self.standing_together();
        let parts = |(one, other): &&(String, String)| !is_hung(one) || !is_hung(other);
        assert_eq!(together.iter().find(parts), None, "set apart, and still together");
        let others = ByteCount::mib(24).min(DEVICE.saturating_sub(self.used() - self.others));
        self.others = others;
        self.run(20_000);
        self.check_charge();
        assert!(self.used() <= DEVICE, "more than there is");
        let owed = self.core.book.owed();
        assert!(owed.is_zero() || !self.has_more(), "{owed} are owed");
        self.is_still = false;
        self.others = ByteCount::ZERO;
    }

    /// Somebody could give more of what it has. One that hangs and shows that it lives cannot, and is not ended for that.
    fn has_more(&self) -> bool {
        let least = |place: &usize| self.core.models[*place].config.min.unwrap_or_default();
        let may =
            |(place, worker): (&usize, &Worker)| !worker.is_hung && worker.held + worker.kv > least(place);
        let is_any_hung = self.workers.values().any(|worker| worker.is_hung);
        !is_any_hung
            || self.workers.iter().any(may)
            || self.stewards.values().any(|steward| !steward.held.is_zero())
    }

    fn unpin_all(&mut self) {
        for place in self.places() {
            let name = self.core.models[place].name.clone();
            let _ = self.core.handle_pin(&name, false, self.now_ms);
        }
    }

    /// Nothing goes wrong any more: whoever asks is served.
    fn calm(&mut self) {
        self.unpin_all();
        // What is left of the disorder runs out first.
        self.run(40_000);
        self.is_calm = true;
        self.run(LINGERS_MS_MAX + 1_000);
        self.check_charge();
        assert!(self.core.book.departed().next().is_none(), "all the dead are gone");
        for client in std::mem::take(&mut self.clients) {
            self.leave(client);
        }
        for place in self.places() {
            self.ask(place, Wanted::Wake, CALM_MS);
            self.run_until_served(CALM_MS);
            let caller = self.caller();
            self.ask(place, Wanted::Route(caller), CALM_MS);
            self.run_until_served(CALM_MS);
            assert!(self.clients.is_empty(), "{:?}", self.core.models[place].life());
            assert!(self.routed.is_empty(), "{} requests have no KV", self.routed.len());
        }
        let lives: Vec<_> = self.places().into_iter().map(|place| self.core.models[place].life()).collect();
        assert!(lives.iter().all(|life| **life == Life::Ready), "{lives:?}");
    }

    /// All models are wanted all the time, by more clients than they have places: nobody waits beyond the bound.
    fn rush(&mut self) {
        self.is_rush = true;
        for place in self.places() {
            for _ in 0..RUSH_CLIENTS {
                let caller = self.caller();
                self.ask(place, Wanted::Route(caller), STARVES_MS);
            }
        }
        self.run(RUSH_MS);
        let wanted = RUSH_CLIENTS * self.places().len();
        assert_eq!(self.clients.len() + self.routed.len(), wanted, "somebody was lost");
        // Those who wait still do so within the bound, though nobody asks after them.
        self.is_rush = false;
        self.run_until_served(STARVES_MS);
        assert!(self.clients.is_empty(), "{} are still waiting", self.clients.len());
        assert!(self.routed.is_empty(), "{} requests have no KV", self.routed.len());
    }

    /// How long a request takes.
    pub(super) const fn work_ms(&self) -> u64 {
        if self.is_rush { RUSH_WORK_MS } else { 0 }
    }

    fn run_until_served(&mut self, ms: u64) {
        for step in 0..ms / STEP_MS {
            self.step(step);
            if self.clients.is_empty() && self.routed.is_empty() {
                return;
            }
        }
    }

    pub(super) fn run(&mut self, ms: u64) {
        (0..ms / STEP_MS).for_each(|step| self.step(step));
    }

    fn step(&mut self, step: u64) {
        match step % 25 {
            0 => self.look(),
            5 => self.see(),
            // Workers tell what they have, whatever happens.
            15 => self.places().into_iter().for_each(|place| self.usage(place)),
            _ => {}
        }
        self.keep_policies();
        self.keep_processes();
        for place in 0..self.core.models.len() {
            self.work(place);
            self.tend(place);
        }
        self.pass(STEP_MS);
        self.expire();
        self.check();
        self.end_routes();
    }
}
