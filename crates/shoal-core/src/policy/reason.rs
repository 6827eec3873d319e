//! Decisions in words, with the numbers they rest on.

use super::state::{ModelState, PendingRequest};
use super::victims::{Candidate, Choice, Class, Field, Part, floor, in_use, kept, kept_for_good, owed};
use super::worth::{spread_ms, uses_milli};
use crate::bytes::ByteCount;
use crate::protocol::LeaseKind;

/// How many holders a sentence names.
const HOLDERS_NAMED_MAX: usize = 4;

fn purpose(request: &PendingRequest) -> &'static str {
    match request.kind {
        LeaseKind::Weights => "weights",
        LeaseKind::Kv => "KV",
        LeaseKind::Overhead => "overhead",
    }
}

fn needs(model: &ModelState, request: &PendingRequest) -> String {
    let least = if request.bytes_min == request.bytes {
        String::new()
    } else {
        format!(" (at least {})", request.bytes_min)
    };
    let beside = match request.kind {
        LeaseKind::Weights if !model.overhead_lacking.is_zero() => {
            format!(" and what its steps take besides ({})", model.overhead_lacking)
        }
        _ => String::new(),
    };
    format!("{} needs {}{least} for {}{beside}", model.name, request.bytes, purpose(request))
}

fn seconds(ms: u64) -> String {
    format!("{:.1} s", ms as f64 / 1_000.0)
}

pub(super) fn grant(
    model: &ModelState,
    request: &PendingRequest,
    bytes: ByteCount,
    free: ByteCount,
) -> String {
    let got = if bytes == request.bytes { "gets it".to_owned() } else { format!("gets {bytes}") };
    format!("{} and {got}: {free} were free", needs(model, request))
}

pub(super) fn evict(
    field: &Field<'_>,
    candidate: Candidate,
    victim: &ModelState,
    model: &ModelState,
    request: &PendingRequest,
    free: ByteCount,
) -> String {
    let why = if victim.id == model.id {
        format!("{} uses its own free KV memory", victim.name)
    } else {
        why_chosen(field, candidate, victim)
    };
    format!("{}, {free} are free; {why}", needs(model, request))
}

/// Why this one was chosen.
fn why_chosen(field: &Field<'_>, candidate: Candidate, victim: &ModelState) -> String {
    let idle = seconds(field.now_ms.saturating_sub(victim.last_used_ms));
    let name = &victim.name;
    match candidate.class {
        _ if candidate.part == Part::Cached
            || (candidate.class == Class::Idle && is_cached(field, candidate)) =>
        {
            format!(
                "{name} holds {} of KV for prompts that may come again, worth least ({})",
                victim.kv_cached,
                worth(field, candidate, victim)
            )
        }
        Class::Idle if field.choice == Choice::WholeLru => {
            format!("{name} has been idle for {idle}, the longest of all, and goes whole")
        }
        Class::Surplus => format!(
            "{name} holds {} of KV that no request uses",
            victim.kv_held.saturating_sub(victim.kv_live)
        ),
        Class::Idle if candidate.part == Part::Weights => format!(
            "{name} has been idle for {idle} and its weights are worth least ({}); {} of KV for prompts that may come again cost \
             more and go last",
            worth(field, candidate, victim),
            victim.kv_cached
        ),
        Class::Idle => format!(
            "{name} has been idle for {idle} and its bytes are worth least ({})",
            worth(field, candidate, victim)
        ),
        Class::IdleFresh => {
            format!(
                "{name} has been idle for {idle}; it was brought back only just now, and nothing else would do"
            )
        }
        Class::IdleKept => {
            format!("{name} has been idle for {idle}, within its keep_alive, and nothing else would do")
        }
        Class::WaitsBehind => format!("{name} waits behind it and cannot run with the part that it holds"),
        Class::TurnOver => {
            let turn = seconds(field.now_ms.saturating_sub(victim.turn_since_ms.unwrap_or(0)));
            format!(
                "all are busy, and {name} has had the longest turn ({turn} of {})",
                seconds(field.turn_ms(victim))
            )
        }
    }
}

/// Others took memory of the device.
pub(super) fn make_room(field: &Field<'_>, candidate: Candidate, victim: &ModelState) -> String {
    let over = field.state.models.iter().map(ModelState::held).sum::<ByteCount>() + field.state.returning;
    format!(
        "others have {} of the device that models share, {} is left and {over} is leased; {}",
        field.state.taken,
        field.state.budget,
        why_chosen(field, candidate, victim)
    )
}

/// What a candidate is priced by is KV that holds prefixes: that is all it stands for, or what is left once the weights went.
fn is_cached(field: &Field<'_>, candidate: Candidate) -> bool {
    candidate.part == Part::Cached || candidate.part == Part::All && field.cached_last(candidate.model)
}

/// The currency with the numbers that it was made from.
fn worth(field: &Field<'_>, candidate: Candidate, victim: &ModelState) -> String {
    let (now_ms, worth) = (field.now_ms, candidate.worth);
    let how_soon = if let Some(expected_ms) = victim.expected_ms {
        format!("expected to be used in {}", seconds(expected_ms.saturating_sub(now_ms)))
    } else {
        let uses = uses_milli(victim) as f64 / 1_000.0;
        format!("{uses:.1} uses in {}", seconds(spread_ms(victim, now_ms)))
    };
    let weights_us = victim.restore_us_per_mib;
    let kv_us = if victim.kv_back_us_per_mib > 0 { victim.kv_back_us_per_mib } else { weights_us };
    let found = match victim.kv_found_milli {
        0 => String::new(),
        milli => format!(", a use finds {:.1}% of it again", milli.min(1_000) as f64 / 10.0),
    };
    match candidate.part {
        _ if is_cached(field, candidate) => {
            format!("{worth} a second for each MiB: {kv_us} us to bring it back{found}, {how_soon}")
        }
        _ => format!("{worth} a second for each MiB: {weights_us} us to bring it back, {how_soon}"),
    }
}

pub(super) fn apart(model: &ModelState, rival: &ModelState) -> String {
    format!("{} may not stand beside {}, which holds {}", model.name, rival.name, rival.stands())
}

pub(super) fn behind_rival(model: &ModelState, elder: &ModelState) -> String {
    format!("{} may not stand beside {}, which asked before it and still waits", model.name, elder.name)
}

pub(super) fn apart_for_ever(model: &ModelState, rival: &ModelState) -> String {
    format!("{}; {} keeps {} ({})", apart(model, rival), rival.name, kept(rival), why_kept(rival))
}

/// Why a model cannot be made to yield all it has.
fn why_kept(model: &ModelState) -> &'static str {
    match () {
        () if model.pinned => "pinned",
        () if model.keeps_weights && floor(model) > model.min => "it does not sleep",
        () if model.min < floor(model) => "beside weights and KV",
        () => "its minimum",
    }
}

pub(super) fn evict_apart(field: &Field<'_>, model: &ModelState, rival: &ModelState) -> String {
    let idle = if rival.is_busy() && !rival.can_run() {
        "it waits, and cannot run with the part that it holds".to_owned()
    } else if rival.is_busy() {
        "its turn is over".to_owned()
    } else {
        format!("it has been idle for {}", seconds(field.now_ms.saturating_sub(rival.last_used_ms)))
    };
    format!("{}; {idle}", apart(model, rival))
}

pub(super) fn preload(model: &ModelState, missing: ByteCount, free: ByteCount) -> String {
    format!(
        "{} is to be there before it is asked for: {missing} are missing, and {free} are free",
        model.name
    )
}

/// Of what is `missing`, `leaving` are there still and on their way out.
pub(super) fn restore(model: &ModelState, missing: ByteCount, leaving: ByteCount) -> String {
    let requests = if model.parked == 1 {
        "1 request waits".to_owned()
    } else {
        format!("{} requests wait", model.parked)
    };
    let leaving = match leaving {
        ByteCount::ZERO => String::new(),
        leaving => format!(", {leaving} of which are still on their way out"),
    };
    format!("{requests} for {}; {missing} of its {} are missing{leaving}", model.name, model.weights_total)
}

pub(super) fn keep_alive_over(model: &ModelState, now_ms: u64) -> String {
    format!(
        "{} has been idle for {}, and its keep_alive is {}",
        model.name,
        seconds(now_ms.saturating_sub(model.last_used_ms)),
        seconds(model.keep_alive_ms.unwrap_or(0))
    )
}

/// Why a model is ordered to give up what it has itself.
pub(super) fn own_kv(model: &ModelState) -> String {
    format!("{} needs what it may hold for its weights, and has KV that no request uses", model.name)
}

/// What the model's own requests use, where that is in the way of its weights.
fn own_use(model: &ModelState, request: &PendingRequest) -> String {
    match in_use(model, request) {
        ByteCount::ZERO => String::new(),
        bytes if model.pinned => format!(" ({bytes} of it is KV of its own)"),
        bytes => format!(" ({bytes} of it is KV that its requests use)"),
    }
}

pub(super) fn over_max(model: &ModelState, request: &PendingRequest) -> String {
    format!(
        "{}, holds {}{}{} and may hold {} at most",
        needs(model, request),
        model.held(),
        own_use(model, request),
        lacking(model, request),
        model.max.unwrap_or(request.bytes)
    )
}

/// What of its weights has to come before it can use the KV that it asks for.
fn lacking(model: &ModelState, request: &PendingRequest) -> String {
    let owed = owed(model, request);
    match (owed.is_zero(), model.overhead_lacking.is_zero()) {
        (true, _) => String::new(),
        (false, true) => format!(", lacks {owed} of its weights"),
        (false, false) => format!(", lacks {owed} of its weights and of what its steps take besides"),
    }
}

pub(super) fn never(
    field: &Field<'_>,
    model: &ModelState,
    request: &PendingRequest,
    most: ByteCount,
) -> String {
    format!(
        "{}, and there are {most} at most: the budget is {}{}{}, {} holds {} itself{}{}{}",
        needs(model, request),
        field.state.budget,
        taken(field),
        falling(field),
        model.name,
        model.held(),
        own_use(model, request),
        lacking(model, request),
        holders(field, model, |other| {
            let kept = kept_for_good(other);
            (!kept.is_zero() && other.ready)
                .then(|| format!("{} keeps {kept} ({})", other.name, why_kept(other)))
        })
    )
}

/// What others have of the device, where they have some.
fn taken(field: &Field<'_>) -> String {
    match field.state.taken {
        ByteCount::ZERO => String::new(),
        taken => format!(" while others have {taken} of the device"),
    }
}

/// What processes had that are gone, where it is still to be seen free.
fn returning(field: &Field<'_>) -> String {
    match field.state.returning {
        ByteCount::ZERO => String::new(),
        returning => format!(", {returning} of processes that ended come back"),
    }
}

/// What is leased for overhead and not taken any more, where there is some.
fn falling(field: &Field<'_>) -> String {
    match field.state.falling {
        ByteCount::ZERO => String::new(),
        falling => format!(", {falling} that processes took beside weights and KV come back"),
    }
}

pub(super) fn too_late(field: &Field<'_>, model: &ModelState, request: &PendingRequest) -> String {
    let waited = seconds(field.now_ms.saturating_sub(request.asked_ms));
    format!(
        "{} and waited {waited} for it; {} are free{}{}{}",
        needs(model, request),
        field.free,
        taken(field),
        returning(field),
        busy_holders(field, model)
    )
}

pub(super) fn wait(
    field: &Field<'_>,
    model: &ModelState,
    request: &PendingRequest,
    found: ByteCount,
) -> String {
    let manual =
        if field.state.is_manual { ", and nothing is evicted by itself (evict = \"never\")" } else { "" };
    let (taken, returning) = (taken(field), returning(field));
    format!(
        "{}; {found} are free or on their way{taken}{returning}{manual}{}",
        needs(model, request),
        busy_holders(field, model)
    )
}

/// What is free or on its way is enough, and not all of it is there: `rest` is missing.
pub(super) fn coming(field: &Field<'_>, model: &ModelState, rest: ByteCount) -> String {
    format!("{} waits for {rest} that is on its way back{}", model.name, returning(field))
}

pub(super) fn behind(model: &ModelState, request: &PendingRequest, spare: ByteCount) -> String {
    format!("{}; older requests come first and leave {spare}", needs(model, request))
}

fn busy_holders(field: &Field<'_>, model: &ModelState) -> String {
    holders(field, model, |other| {
        let held = other.held();
        if held.is_zero() {
            return None;
        }
        let why = if !other.ready {
            "its worker is not up".to_owned()
        } else if other.pinned {
            "pinned".to_owned()
        } else if !other.ordered.is_zero() {
            format!("{} of it on the way back", other.ordered)
        } else if other.skip_until_ms > field.now_ms {
            "did not answer when asked".to_owned()
        } else if let Some(until) = field.protected_until(other).filter(|_| other.is_busy()) {
            format!("its turn ends in {}", seconds(until - field.now_ms))
        } else if other.is_busy() && !other.can_run() {
            "waits as well".to_owned()
        } else if other.is_busy() {
            "busy".to_owned()
        } else {
            "idle".to_owned()
        };
        Some(format!("{} holds {held} ({why})", other.name))
    })
}

/// `"; a, b"` over the largest holders that `say` has something to say of.
fn holders(field: &Field<'_>, model: &ModelState, say: impl Fn(&ModelState) -> Option<String>) -> String {
    let mut others: Vec<_> = field.state.models.iter().filter(|other| other.id != model.id).collect();
    others.sort_by_key(|other| (core::cmp::Reverse(other.held()), other.id));
    let mut said: Vec<String> =
        others.iter().filter_map(|other| say(other)).take(HOLDERS_NAMED_MAX + 1).collect();
    if said.len() > HOLDERS_NAMED_MAX {
        said.truncate(HOLDERS_NAMED_MAX);
        said.push("and others".to_owned());
    }
    if said.is_empty() { String::new() } else { format!("; {}", said.join(", ")) }
}

/// Why a model waits for what it has still to give up.
pub(super) fn leaving(model: &ModelState, request: &PendingRequest) -> String {
    let name = &model.name;
    if request.kind == LeaseKind::Kv {
        return format!("{name} is still giving weights up, and cannot use KV until it has them back");
    }
    format!("{name} is still giving weights up and asks for all that it lacks once they are gone")
}
