//! `ps`, `why`, `state`, `wake`, `sleep`, `pin`, `unpin`, `reload`: asking a running server.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{TierUsage, WeightsAtRest};

use super::client::Client;
use super::{At, Failure, Order, Out};
use crate::api::{PinOrder, ReloadOrder, SleepOrder, WakeOrder};
use crate::shelf::{Reloaded, Report};
use crate::state::{
    DeviceSnapshot, EventKind, LatencySnapshot, ModelSnapshot, ModelStatus, SharingSnapshot, ShelfSnapshot,
    WeightStoreSnapshot, Why,
};

const READ_WAIT_MAX: Duration = Duration::from_secs(10);
const HEADINGS: [&str; 12] = [
    "MODEL",
    "STATUS",
    "FOR",
    "DEVICE",
    "HOST",
    "LEASE",
    "ACTIVE",
    "PARKED",
    "REQUESTS",
    "TOKENS",
    "WAKES",
    "FIRST BYTE",
];

pub(super) fn state(at: &At, out: Out<'_>) -> Result<(), Failure> {
    let state: serde_json::Value = read(at, "/api/v1/state")?;
    print_json(&state, out)
}

pub(super) fn ps(at: &At, json: bool, out: Out<'_>) -> Result<(), Failure> {
    if json {
        return state(at, out);
    }
    let shelf: ShelfSnapshot = read(at, "/api/v1/state")?;
    write!(out, "{}", table_of(&shelf))?;
    Ok(())
}

pub(super) fn why(model: &str, last: u16, at: &At, json: bool, out: Out<'_>) -> Result<(), Failure> {
    let path = format!("/api/v1/models/{}/why?last={last}", in_path(model));
    if json {
        let why: serde_json::Value = read(at, &path)?;
        return print_json(&why, out);
    }
    write!(out, "{}", told(&read(at, &path)?))?;
    Ok(())
}

/// For people: how it stands, then what was decided, each with how long ago.
fn told(why: &Why) -> String {
    let mut text = String::new();
    for sentence in &why.now {
        let _ = writeln!(text, "{}", printable(sentence));
    }
    if !why.decisions.is_empty() {
        text.push('\n');
    }
    for event in &why.decisions {
        let ago = why.at_ms.saturating_sub(event.at_ms) as f64 / 1e3;
        let ago = if ago < 100.0 { format!("{ago:.1} s") } else { format!("{:.0} min", ago / 60.0) };
        let whose = event.model.as_deref().filter(|name| *name != why.model);
        let whose = whose.map_or_else(String::new, |name| format!("{name} "));
        let _ = writeln!(text, "{ago:>8} ago  {whose}{}", printable(&event.text));
    }
    if why.earlier > 0 {
        let _ = writeln!(
            text,
            "({} earlier ones: --last {})",
            why.earlier,
            why.earlier + why.decisions.len() as u64
        );
    }
    text
}

pub(super) fn wake(model: &str, order: &Order, out: Out<'_>) -> Result<(), Failure> {
    send(model, "wake", &WakeOrder { wait_s: Some(order.wait) }, order, out)
}

pub(super) fn sleep(model: &str, keep: f64, order: &Order, out: Out<'_>) -> Result<(), Failure> {
    send(model, "sleep", &SleepOrder { keep, wait_s: Some(order.wait) }, order, out)
}

pub(super) fn pin(model: &str, pinned: bool, order: &Order, out: Out<'_>) -> Result<(), Failure> {
    send(model, "pin", &PinOrder { pinned }, order, out)
}

pub(super) fn reload(order: &Order, out: Out<'_>) -> Result<(), Failure> {
    let wait_max = Duration::from_secs_f64(order.wait) + READ_WAIT_MAX;
    let said: Reloaded =
        understood(&Client::find(&order.at)?.ask("/api/v1/reload", Some(&ReloadOrder {}), wait_max)?)?;
    if order.json {
        return print_json(&said, out);
    }
    let Reloaded { added, removed, restarted, changed, policies, needs_restart } = said;
    let what = EventKind::Reloaded { added, removed, restarted, changed, policies, needs_restart };
    writeln!(out, "{}", printable(&what.to_string()))?;
    Ok(())
}

fn understood<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| {
        Failure::new(format!("the server answered in another form than this shoal's: {error}"))
    })
}

fn read<T: DeserializeOwned>(at: &At, path: &str) -> Result<T, Failure> {
    understood(&Client::find(at)?.ask(path, None::<&()>, READ_WAIT_MAX)?)
}

fn send(model: &str, verb: &str, body: &impl Serialize, order: &Order, out: Out<'_>) -> Result<(), Failure> {
    let wait_max = Duration::from_secs_f64(order.wait) + READ_WAIT_MAX;
    let path = format!("/api/v1/models/{}/{verb}", in_path(model));
    let report: Report = understood(&Client::find(&order.at)?.ask(&path, Some(body), wait_max)?)?;
    if order.json {
        return print_json(&report, out);
    }
    writeln!(out, "{}: {}", report.model, printable(&report.summary))?;
    Ok(())
}

/// As it may stand in a path.
fn in_path(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:".contains(&byte);
    name.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

fn print_json(value: &impl Serialize, out: Out<'_>) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::new(error.to_string()))?;
    writeln!(out, "{text}")?;
    Ok(())
}

fn table_of(shelf: &ShelfSnapshot) -> String {
    let device = &shelf.device;
    let simulated = if device.simulated { " (simulated in RAM)" } else { "" };
    let mut text = format!("{}{simulated}: {} of {} leased\n", device.name, device.leased, device.budget);
    text.push_str(&driver_of(device));
    text.push_str(&sharing_of(&shelf.sharing));
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(shelf.models.iter().map(|model| row(model, shelf.at_ms)));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEADINGS.len()).map(width).collect();
    for row in &rows {
        let mut line = String::new();
        for (index, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            // Words to the left, figures to the right.
            let _ =
                if index < 2 { write!(line, "{cell:<width$}  ") } else { write!(line, "{cell:>width$}  ") };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.push_str(&keys_of(&shelf.models));
    text.push_str(&tiers_of(&shelf.models));
    let at_rest =
        shelf.models.iter().filter_map(|model| Some((&*model.name, model.weights_at_rest.as_ref()?)));
    text.push_str(&at_rest_of(shelf.weights_store.as_ref(), &at_rest.collect::<Vec<_>>()));
    for model in &shelf.models {
        if let Some(error) = &model.error {
            let _ = writeln!(text, "{}: {}", model.name, printable(error));
        }
    }
    text
}

/// Whose requests they are, where keys have names.
fn keys_of(models: &[ModelSnapshot]) -> String {
    let mut text = String::new();
    for model in models {
        let named = model.keys.iter().filter_map(|key| {
            Some(format!("{} {} active, {} waiting", printable(key.key.as_deref()?), key.active, key.parked))
        });
        let named: Vec<String> = named.collect();
        if !named.is_empty() {
            let _ = writeln!(text, "{} by key: {}", model.name, named.join("; "));
        }
    }
    text
}

/// What keeps the KV that a model's cache forgets, by tiers.
fn tiers_of(models: &[ModelSnapshot]) -> String {
    let each = |model: &ModelSnapshot| -> String {
        model.tiers.iter().map(|tier| tier_of(&model.name, tier)).collect()
    };
    models.iter().map(each).collect()
}

fn tier_of(model: &str, tier: &TierUsage) -> String {
    let TierUsage { tier: name, reason, counts, bytes, bytes_max, places, .. } = tier;
    let mut text = format!("{model}: KV on {}: ", printable(name));
    // What lies on a remote is not this server's alone, and nobody counts it.
    let _ = match name.as_str() {
        "remote" => write!(text, "{} put there", counts.saved_bytes),
        _ => write!(text, "{bytes} of {bytes_max}"),
    };
    let _ = write!(text, ", {} of {} blocks looked for came back", counts.loaded, counts.looked_up);
    if counts.recomputed > 0 {
        let _ = write!(text, ", {} computed again as that is faster", counts.recomputed);
    }
    if counts.demoted > 0 {
        let _ = write!(text, ", {} left the device unused", counts.demoted);
    }
    if counts.corrupt > 0 {
        let _ = write!(text, ", {} damaged and computed again", counts.corrupt);
    }
    if let Some(reason) = reason {
        let _ = write!(text, "; not in use, {}", printable(reason));
    }
    for place in places.iter().filter(|place| place.state == "aside") {
        let why = place.reason.as_deref().unwrap_or_default();
        let _ = write!(text, "; {} set aside, {}", printable(&place.path), printable(why));
    }
    text.push('\n');
    text
}

/// What the store of weights holds, and which models' weights come from it.
fn at_rest_of(store: Option<&WeightStoreSnapshot>, told: &[(&str, &WeightsAtRest)]) -> String {
    let mut text = match (store, told) {
        (None, []) => return String::new(),
        (None, [(_, told), ..]) => {
            format!("weights at rest in {}: nobody has looked yet", printable(&told.path))
        }
        (Some(store), _) => {
            let WeightStoreSnapshot { path, bytes, bytes_max, models, unshared, .. } = store;
            let models = if *models == 1 { "1 model".to_owned() } else { format!("{models} models") };
            let mut text =
                format!("weights at rest in {}: {bytes} of {bytes_max}, of {models}", printable(path));
            if unshared > bytes {
                let _ = write!(text, ", {unshared} if they had nothing in common");
            }
            text
        }
    };
    for (model, WeightsAtRest { state, reason, .. }) in told {
        let why = reason.as_ref().map_or_else(String::new, |reason| format!(" ({})", printable(reason)));
        let _ = write!(text, "; {model} {}{why}", printable(state));
    }
    text.push('\n');
    text
}

/// What the driver shows, where it is not just what is leased.
fn driver_of(device: &DeviceSnapshot) -> String {
    let Some(driver) = &device.driver else { return String::new() };
    if let Some(lost) = &driver.lost {
        return format!("the driver is not heard, the ledger alone counts: {}\n", printable(lost));
    }
    let mut said = vec![format!("{} of {} are free on the device", driver.free, driver.total)];
    if !device.taken.is_zero() {
        said.push(format!("others have {}, of which {} come off the budget", driver.others, device.taken));
    }
    if !driver.drift.is_zero() {
        said.push(format!("models have {} beyond their leases", driver.drift));
    }
    if !device.returning.is_zero() {
        said.push(format!("{} are returning", device.returning));
    }
    if said.len() == 1 {
        return String::new();
    }
    let who = driver.processes.iter().filter(|_| !device.taken.is_zero()).take(3).map(|process| {
        let bytes = process.bytes.map_or_else(String::new, |bytes| format!(" {bytes}"));
        format!("{} ({}){bytes}", process.name.as_deref().unwrap_or("process"), process.pid)
    });
    let who: Vec<String> = who.collect();
    let who = if who.is_empty() { String::new() } else { format!(" [{}]", printable(&who.join(", "))) };
    format!("{}{who}\n", said.join("; "))
}

/// Who decides, what the moving is good for, what another policy would have done.
fn sharing_of(sharing: &SharingSnapshot) -> String {
    // A server of an earlier version says nothing of it.
    if sharing.policy.is_empty() {
        return String::new();
    }
    let thrash = &sharing.thrash;
    let by = if sharing.evicts { "" } else { ", evicts nothing by itself" };
    let mut text = format!("policy {}{by}; thrash index {:.2}", sharing.policy, thrash.index);
    if !thrash.thrashed.is_zero() {
        let _ = write!(
            text,
            " ({} came back within a minute of leaving, {} were served)",
            thrash.thrashed, thrash.served
        );
    }
    if let Some(reason) = &sharing.instead {
        let _ = write!(text, "; it does not decide now: {}", printable(reason));
    }
    if let Some(shadow) = &sharing.shadow {
        let _ = write!(
            text,
            "; {} would have decided otherwise in {} of {}",
            shadow.policy, shadow.differing, shadow.decisions
        );
        if let Some(trouble) = &shadow.trouble {
            let _ = write!(text, " and missed {}: {}", shadow.missed, printable(trouble));
        }
    }
    text.push('\n');
    text
}

fn row(model: &ModelSnapshot, at_ms: u64) -> [String; 12] {
    let (bytes, counts) = (&model.bytes, &model.counts);
    let on_device: ByteCount = bytes.weights_device + bytes.kv_device + bytes.overhead_device;
    let status = match model.status {
        ModelStatus::PartlyResident if !bytes.weights_total.is_zero() => {
            format!("{:.0}% resident", bytes.weights_device.0 as f64 * 100.0 / bytes.weights_total.0 as f64)
        }
        ModelStatus::Asleep => {
            let place = model.state.asleep_in.map(|tier| format!(" ({tier})"));
            format!("asleep{}", place.unwrap_or_default())
        }
        status => word(status),
    };
    let held_ms = at_ms.saturating_sub(model.state.since_at_ms);
    let silent = model.silent_ms.map(|ms| format!("silent for {}", span(ms)));
    let times = [time("awake", &model.first_byte_awake), time("asleep", &model.first_byte_asleep)];
    let times: Vec<String> = times.into_iter().flatten().collect();
    [
        model.name.clone(),
        [
            Some(status.as_str()),
            model.pinned.then_some("pinned"),
            (!model.is_elastic).then_some("not elastic"),
            silent.as_deref(),
        ]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(", "),
        span(held_ms),
        on_device.to_string(),
        bytes.host.to_string(),
        model.lease.total.to_string(),
        counts.requests_active.to_string(),
        counts.requests_parked.to_string(),
        counts.requests_total.to_string(),
        counts.tokens_out.to_string(),
        counts.wakes.to_string(),
        if times.is_empty() { "-".to_owned() } else { times.join(", ") },
    ]
}

fn word(status: ModelStatus) -> String {
    let word = serde_json::to_value(status).ok();
    word.and_then(|word| Some(word.as_str()?.replace('_', " "))).unwrap_or_default()
}

/// How long something has lasted.
fn span(ms: u64) -> String {
    match ms / 1_000 {
        seconds @ 0..=119 => format!("{seconds} s"),
        seconds @ 120..=7_199 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3_600),
    }
}

fn time(name: &str, latency: &LatencySnapshot) -> Option<String> {
    let ms = latency.p50_ms?;
    Some(if ms < 1000.0 { format!("{name} {ms:.0} ms") } else { format!("{name} {:.1} s", ms / 1e3) })
}

/// A worker's words, without what a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use shoal_core::protocol::TierPlace;

    use crate::state::{DriverSnapshot, Event, EventKind, ProcessSnapshot, ShadowSnapshot};

    #[test]
    fn decisions_are_told_with_how_long_ago_and_whose() {
        let event = |at_ms, model: &str, text: &str| Event {
            id: 1,
            version: 1,
            at_ms,
            model: Some(model.to_owned()),
            text: text.to_owned(),
            what: EventKind::Pinned { pinned: true },
        };
        let why = Why {
            model: "chat".to_owned(),
            at_ms: 500_000,
            status: ModelStatus::Asleep,
            now: vec!["chat is asleep.".to_owned(), "It \u{1b}[31mwaits.".to_owned()],
            decisions: vec![
                event(100_000, "chat", "gives up 2 MiB: because"),
                event(498_800, "code", "gives up it"),
            ],
            earlier: 3,
            log: String::new(),
        };
        let expected = "chat is asleep.\nIt  [31mwaits.\n\n   7 min ago  gives up 2 MiB: because\n   1.2 s ago  code \
                        gives up it\n(3 earlier ones: --last 5)\n";
        assert_eq!(told(&why), expected);
    }

    #[test]
    fn each_tier_is_told_in_a_line() {
        let mut tier = TierUsage {
            tier: "host".to_owned(),
            bytes: ByteCount::mib(12),
            bytes_max: ByteCount::mib(64),
            ..TierUsage::default()
        };
        (tier.counts.looked_up, tier.counts.loaded) = (52, 40);
        let line = "ash: KV on host: 12 MiB of 64 MiB, 40 of 52 blocks looked for came back";
        assert_eq!(tier_of("ash", &tier), format!("{line}\n"));
        (tier.counts.recomputed, tier.counts.demoted) = (7, 9);
        let line = format!("{line}, 7 computed again as that is faster, 9 left the device unused");
        tier.counts.corrupt = 1;
        tier.reason = Some("it is \u{1b}[31mtaken".to_owned());
        let aside = |state: &str| TierPlace {
            path: "/mnt/a".to_owned(),
            state: state.to_owned(),
            reason: Some("it hangs".to_owned()),
            ..TierPlace::default()
        };
        tier.places = vec![aside("ready"), aside("aside")];
        let more = ", 1 damaged and computed again; not in use, it is  [31mtaken; /mnt/a set aside, it hangs";
        assert_eq!(tier_of("ash", &tier), format!("{line}{more}\n"));
    }

    #[test]
    fn weights_at_rest_are_told_in_a_line() {
        let told = |state: &str, reason: Option<&str>| WeightsAtRest {
            path: "/mnt/a/weights".to_owned(),
            state: state.to_owned(),
            reason: reason.map(str::to_owned),
            ..WeightsAtRest::default()
        };
        let store = |models, mib| WeightStoreSnapshot {
            path: "/mnt/a/weights".to_owned(),
            models,
            bytes: ByteCount::mib(mib),
            unshared: ByteCount::mib(30),
            bytes_max: ByteCount::gib(1),
            looked_at_ms: 1,
        };
        assert_eq!(at_rest_of(None, &[]), "");
        let (read, unused) = (told("read", None), told("unused", Some("it is \u{1b}[31mfull")));
        let line = "weights at rest in /mnt/a/weights: 25 MiB of 1 GiB, of 2 models, 30 MiB if they had nothing in common; ash \
                    read; oak unused (it is  [31mfull)\n";
        assert_eq!(at_rest_of(Some(&store(2, 25)), &[("ash", &read), ("oak", &unused)]), line);
        let line = "weights at rest in /mnt/a/weights: 30 MiB of 1 GiB, of 1 model\n";
        assert_eq!(at_rest_of(Some(&store(1, 30)), &[]), line, "no worker runs");
        let line = "weights at rest in /mnt/a/weights: nobody has looked yet; ash read\n";
        assert_eq!(at_rest_of(None, &[("ash", &read)]), line);
    }

    #[test]
    fn what_others_have_is_told_with_its_numbers_and_nothing_where_there_is_nothing_to_tell() {
        let mut device = DeviceSnapshot {
            driver: Some(DriverSnapshot {
                total: ByteCount::gib(80),
                free: ByteCount::gib(3),
                others: ByteCount::gib(5),
                processes: vec![ProcessSnapshot {
                    pid: 7,
                    name: Some("py\u{1b}thon".to_owned()),
                    bytes: Some(ByteCount::gib(4)),
                }],
                ..DriverSnapshot::default()
            }),
            ..DeviceSnapshot::default()
        };
        assert_eq!(driver_of(&DeviceSnapshot::default()), "");
        assert_eq!(driver_of(&device), "");
        device.taken = ByteCount::gib(4);
        let expected = "3 GiB of 80 GiB are free on the device; others have 5 GiB, of which 4 GiB come off the budget \
                        [py thon (7) 4 GiB]\n";
        assert_eq!(driver_of(&device), expected);
        (device.taken, device.returning) = (ByteCount::ZERO, ByteCount::mib(2));
        assert_eq!(driver_of(&device), "3 GiB of 80 GiB are free on the device; 2 MiB are returning\n");
        device.driver.as_mut().expect("just made").lost = Some("it hangs".to_owned());
        assert_eq!(driver_of(&device), "the driver is not heard, the ledger alone counts: it hangs\n");
    }

    #[test]
    fn sharing_is_told_with_its_numbers() {
        let mut sharing =
            SharingSnapshot { policy: "value".to_owned(), evicts: true, ..SharingSnapshot::default() };
        assert_eq!(sharing_of(&sharing), "policy value; thrash index 0.00\n");
        sharing.evicts = false;
        (sharing.thrash.index, sharing.thrash.thrashed) = (0.25, ByteCount::mib(10));
        sharing.thrash.served = ByteCount::mib(40);
        sharing.shadow = Some(ShadowSnapshot {
            policy: "lru".to_owned(),
            decisions: 7,
            differing: 3,
            ..ShadowSnapshot::default()
        });
        let expected = "policy value, evicts nothing by itself; thrash index 0.25 (10 MiB came back within a minute of \
                        leaving, 40 MiB were served); lru would have decided otherwise in 3 of 7\n";
        assert_eq!(sharing_of(&sharing), expected);
    }

    #[test]
    fn names_are_escaped_in_paths_and_control_characters_in_texts() {
        assert_eq!(in_path("code:v1.2_x-y"), "code:v1.2_x-y");
        assert_eq!(in_path("../a b/\u{e9}"), "..%2Fa%20b%2F%C3%A9");
        assert_eq!(printable("a\u{1b}[31mb\nc"), "a [31mb c");
        assert_eq!(word(ModelStatus::PartlyResident), "partly resident");
        assert_eq!([0, 119_999, 120_000, 7_200_000].map(span), ["0 s", "119 s", "2 min", "2 h"]);
    }
}
