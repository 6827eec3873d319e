//! Who wants something of models: they ask, wait, go away, are answered, and ask again.

use std::collections::BTreeMap;

use tokio::sync::oneshot;

use super::STARVES_MS;
use super::shelf::has_kv;
use super::world::World;
use crate::broker::{Begun, Reached, Wanted};
use crate::shelf::{Caller, RouteError};

pub(super) struct Client {
    pub(super) place: usize,
    wanted: Wanted,
    ticket: u64,
    since_ms: u64,
    pub(super) deadline_ms: u64,
    answer: oneshot::Receiver<Result<Reached, RouteError>>,
}

/// A request at a model.
pub(super) struct Routed {
    pub(super) place: usize,
    pub(super) caller: Caller,
    /// Since when it has run; none while it waits for KV.
    since_ms: Option<u64>,
}

impl World {
    pub(super) fn caller(&mut self) -> Caller {
        Caller::new(["alice", "bob", "carol"][self.dice.index(3)], true)
    }

    pub(super) fn ask(&mut self, place: usize, wanted: Wanted, wait_ms: u64) {
        let deadline_ms = self.now_ms + wait_ms;
        let name = self.core.models[place].name.clone();
        match self.core.handle_wanted(&name, wanted.clone(), self.now_ms, deadline_ms) {
            Ok(Begun::Reached(reached)) => self.begun(&wanted, reached.place, self.now_ms),
            Ok(Begun::Parked { place, ticket, answer }) => {
                let since_ms = self.now_ms;
                self.clients.push(Client { place, wanted, ticket, since_ms, deadline_ms, answer });
            }
            Err(error) => assert!(!self.is_calm, "{error}"),
        }
    }

    fn begun(&mut self, wanted: &Wanted, place: usize, since_ms: u64) {
        if self.is_rush {
            self.seen.served += 1;
            self.seen.waited_ms_max = self.seen.waited_ms_max.max(self.now_ms - since_ms);
        }
        if let Wanted::Route(caller) = wanted {
            self.routed.push(Routed { place, caller: caller.clone(), since_ms: None });
        }
    }

    /// Those who were answered go on; whose time is over hears why.
    pub(super) fn expire(&mut self) {
        let now_ms = self.now_ms;
        let mut left = Vec::new();
        for mut client in std::mem::take(&mut self.clients) {
            match client.answer.try_recv() {
                Ok(Ok(reached)) => self.begun(&client.wanted, reached.place, client.since_ms),
                Ok(Err(error)) => assert!(!self.is_rush, "{error}"),
                Err(oneshot::error::TryRecvError::Closed) => panic!("a request was forgotten"),
                Err(oneshot::error::TryRecvError::Empty) if client.deadline_ms <= now_ms => {
                    let reason = self.core.handle_too_late(client.place, client.ticket, now_ms);
                    assert!(!self.is_calm, "{reason}");
                }
                Err(oneshot::error::TryRecvError::Empty) => left.push(client),
            }
        }
        self.clients.extend(left);
    }

    /// Somebody goes away, and may have been answered in the same moment.
    pub(super) fn leave(&mut self, mut client: Client) {
        client.answer.close();
        match client.answer.try_recv() {
            Ok(Ok(reached)) => self.begun(&client.wanted, reached.place, client.since_ms),
            Ok(Err(_)) => {}
            Err(_) => self.core.handle_left(client.place, client.ticket, self.now_ms),
        }
    }

    pub(super) fn end_route(&mut self, index: usize) {
        let Routed { place, caller, .. } = self.routed.swap_remove(index);
        self.core.handle_route_ended(place, &caller, self.now_ms);
    }

    /// A process is gone and answered nobody: its requests are over.
    pub(super) fn end_routes_of(&mut self, place: usize) {
        while let Some(index) = self.routed.iter().position(|routed| routed.place == place) {
            self.end_route(index);
        }
    }

    /// As many requests run as there is KV for; those that ran before go first.
    fn wait_for_kv(&mut self) {
        let mut left: BTreeMap<usize, u64> = BTreeMap::new();
        let mut order: Vec<usize> = (0..self.routed.len()).collect();
        order.sort_by_key(|index| self.routed[*index].since_ms.is_none());
        for index in order {
            let place = self.routed[index].place;
            let running = self.running(place);
            let left = left.entry(place).or_insert(running);
            let routed = &mut self.routed[index];
            routed.since_ms = (*left > 0).then(|| routed.since_ms.unwrap_or(self.now_ms));
            *left = left.saturating_sub(1);
        }
    }

    /// Requests that were worked on for long enough are answered.
    pub(super) fn end_routes(&mut self) {
        self.wait_for_kv();
        let over_ms = self.now_ms.saturating_sub(self.work_ms());
        while let Some(index) =
            self.routed.iter().position(|routed| routed.since_ms.is_some_and(|since_ms| since_ms <= over_ms))
        {
            let place = self.routed[index].place;
            self.end_route(index);
            self.seen.ran_with_kv += u64::from(has_kv(self.seed) && self.workers.contains_key(&place));
            if self.is_rush {
                let caller = self.caller();
                self.ask(place, Wanted::Route(caller), STARVES_MS);
            }
        }
    }
}
