//! What every plan must keep to, whoever made it.
//!
//! A policy of ours keeps to this by construction and is held to it by tests; one that a user brought is checked here
//! each time before it is obeyed. What is checked is safety (I1, pins, minimums, maximums, `evict = "never"`, orders that can be carried
//! out),
//! not wisdom: a plan may be as unfair as its author likes.

use std::collections::BTreeMap;

use super::state::{Action, ModelState, Plan, ShelfState};
use super::victims::{floor, kept};
use crate::bytes::ByteCount;
use crate::ids::ModelId;
use crate::protocol::LeaseKind;

/// Says what is wrong with `plan` for `state`, if anything is.
///
/// # Errors
/// A sentence that names the first action that must not be carried out, and why.
pub fn check(state: &ShelfState, plan: &Plan) -> Result<(), String> {
    let models: BTreeMap<ModelId, &ModelState> = state.models.iter().map(|model| (model.id, model)).collect();
    let of = |id: &ModelId| models.get(id).copied().ok_or_else(|| format!("there is no {id}"));
    let mut held: BTreeMap<ModelId, ByteCount> =
        state.models.iter().map(|model| (model.id, model.held())).collect();
    let mut ordered: BTreeMap<ModelId, ByteCount> =
        state.models.iter().map(|model| (model.id, model.ordered)).collect();
    let mut answered: Vec<(ModelId, u64)> = Vec::new();
    for action in &plan.actions {
        match action {
            Action::Evict { model, bytes, requester, cached_last, .. } => {
                let model = of(model)?;
                requester.as_ref().map(of).transpose()?;
                if *cached_last && model.keeps_weights {
                    return Err(format!("{} keeps its weights, so no prefix can go after them", model.name));
                }
                let sum = ordered.entry(model.id).or_default();
                *sum = sum.checked_add(*bytes).ok_or_else(|| format!("{bytes} of {}", model.name))?;
                may_evict(model, *bytes, *sum)?;
                if state.is_manual {
                    may_evict_by_itself(model, requester.is_some(), *bytes, *sum)?;
                }
            }
            Action::Restore { model, .. } => {
                let model = of(model)?;
                if !model.ready || model.wake_ordered {
                    return Err(format!("{} cannot be woken now", model.name));
                }
            }
            Action::Grant { model, request, bytes, .. } => {
                let model = of(model)?;
                let asked = asked(state, model, *request)?;
                if *bytes < asked.0 || *bytes > asked.1 {
                    return Err(format!(
                        "{} asked for {} to {}, and is granted {bytes}",
                        model.name, asked.0, asked.1
                    ));
                }
                let sum = held.entry(model.id).or_default();
                *sum = sum.checked_add(*bytes).ok_or_else(|| format!("{bytes} for {}", model.name))?;
                if !bytes.is_zero() && model.max.is_some_and(|max| *sum > max) {
                    return Err(format!("{} would hold {sum}, more than its max", model.name));
                }
                let stands =
                    |rival: &ModelId| models.get(rival).is_some_and(|rival| !rival.stands().is_zero());
                let is_overhead = asked.2 == LeaseKind::Overhead;
                if let Some(rival) = model.apart.iter().find(|rival| !is_overhead && stands(rival)) {
                    return Err(format!("{} may not stand beside {}", model.name, of(rival)?.name));
                }
                answered.push((model.id, *request));
            }
            Action::Deny { model, request, .. } | Action::Wait { model, request, .. } => {
                if !state.requests.iter().any(|asked| asked.model == *model && asked.request == *request) {
                    return Err(format!("{model} has no request {request}"));
                }
                answered.push((*model, *request));
            }
        }
    }
    let leased: u128 = held.values().map(|bytes| u128::from(bytes.0)).sum();
    let before: u128 = state.models.iter().map(|model| u128::from(model.held().0)).sum();
    if leased + u128::from(state.returning.0) > u128::from(state.budget.0) && leased > before {
        let returning = match state.returning {
            ByteCount::ZERO => String::new(),
            returning => format!(" while {returning} of processes that ended come back"),
        };
        return Err(format!("{leased} bytes would be leased, and the budget is {}{returning}", state.budget));
    }
    answered.sort_unstable();
    if let Some(twice) = answered.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("request {} of {} is answered twice", twice[0].1, twice[0].0));
    }
    Ok(())
}

fn may_evict(model: &ModelState, bytes: ByteCount, ordered: ByteCount) -> Result<(), String> {
    let name = &model.name;
    if model.pinned || !model.ready || bytes.is_zero() {
        let why = if model.pinned { "pinned" } else { "not ready, or asked for nothing" };
        return Err(format!("{name} cannot be ordered to give up {bytes}: it is {why}"));
    }
    if kept(model).checked_add(ordered).is_none_or(|sum| sum > model.held()) {
        return Err(format!(
            "{name} cannot give up {ordered} in all: it holds {} and keeps {}",
            model.held(),
            kept(model)
        ));
    }
    if model.is_rigid && ordered < model.held().saturating_sub(floor(model)) {
        return Err(format!("{name} gives all or nothing, and was asked for {bytes}"));
    }
    Ok(())
}

/// Where nothing is to be evicted by itself ([`ShelfState::is_manual`]): only KV that nobody uses and that holds nothing,
/// and an idle model whose own `keep_alive` says that it is to go.
fn may_evict_by_itself(
    model: &ModelState,
    is_for_somebody: bool,
    bytes: ByteCount,
    ordered: ByteCount,
) -> Result<(), String> {
    let unused = model.kv_held.saturating_sub(model.kv_live).saturating_sub(model.kv_cached);
    let may_go = !is_for_somebody && model.keep_alive_ms.is_some() && !model.is_busy();
    if may_go || ordered <= unused {
        return Ok(());
    }
    let why = match (is_for_somebody, model.keep_alive_ms) {
        (true, _) => "for another's sake",
        (false, Some(_)) => "while it has requests",
        (false, None) => "without a `keep_alive`",
    };
    Err(format!(
        "{} cannot be ordered to give up {bytes} {why}: evict = \"never\", and {unused} of its KV are unused",
        model.name
    ))
}

/// Least, most and kind of what was asked.
fn asked(
    state: &ShelfState,
    model: &ModelState,
    request: u64,
) -> Result<(ByteCount, ByteCount, LeaseKind), String> {
    let found = state.requests.iter().find(|asked| asked.model == model.id && asked.request == request);
    found
        .map(|asked| (asked.bytes_min, asked.bytes, asked.kind))
        .ok_or_else(|| format!("{} has no request {request}", model.name))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{MIB, model, shelf};
    use super::*;

    fn evict(mib: u64, requester: Option<u32>) -> Plan {
        let (model, reason) = (ModelId(1), "a test".to_owned());
        let action = Action::Evict {
            model,
            requester: requester.map(ModelId),
            bytes: MIB(mib),
            cached_last: false,
            reason,
        };
        Plan { actions: vec![action], again_at_ms: None }
    }

    #[test]
    fn where_nothing_is_evicted_by_itself_only_what_nobody_misses_may_be_taken() {
        let mut idle = model(1, "idle", 60, 60);
        (idle.kv_held, idle.kv_live, idle.kv_cached) = (MIB(12), MIB(2), MIB(4));
        let mut state = shelf(80, vec![model(0, "chat", 16, 0), idle], vec![]);
        for requester in [Some(0), None] {
            assert_eq!(check(&state, &evict(20, requester)), Ok(()), "evict = \"auto\"");
        }
        state.is_manual = true;
        for requester in [Some(0), Some(1), None] {
            assert_eq!(
                check(&state, &evict(6, requester)),
                Ok(()),
                "KV that nobody uses and that holds nothing"
            );
            let wrong = check(&state, &evict(7, requester)).expect_err("a prefix would go");
            assert!(wrong.contains("evict = \"never\"") && wrong.contains("6 MiB of its KV"), "{wrong}");
        }
        let twice = Plan {
            actions: [evict(4, Some(0)).actions, evict(4, Some(0)).actions].concat(),
            again_at_ms: None,
        };
        assert!(check(&state, &twice).is_err(), "orders add up");
        state.models[1].keep_alive_ms = Some(5_000);
        assert_eq!(check(&state, &evict(70, None)), Ok(()), "its own keys say that it is to go");
        assert!(check(&state, &evict(70, Some(0))).is_err(), "for nobody's sake, though");
        state.models[1].active = 1;
        assert!(check(&state, &evict(70, None)).is_err(), "and not while it has requests");
    }
}
