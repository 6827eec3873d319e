//! What every plan must keep to, whoever made it.
//!
//! A policy of ours keeps to this by construction and is held to it by tests; one that a user brought is checked here
//! each time before it is obeyed. What is checked is safety (I1, pins, minimums, maximums, orders that can be carried out),
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
            Action::Evict { model, bytes, requester, .. } => {
                let model = of(model)?;
                requester.as_ref().map(of).transpose()?;
                let sum = ordered.entry(model.id).or_default();
                *sum = sum.checked_add(*bytes).ok_or_else(|| format!("{bytes} of {}", model.name))?;
                may_evict(model, *bytes, *sum)?;
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
    if leased > u128::from(state.budget.0) && leased > before {
        return Err(format!("{leased} bytes would be leased, and the budget is {}", state.budget));
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
