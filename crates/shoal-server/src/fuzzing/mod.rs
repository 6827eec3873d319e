//! What must hold for any bytes at all: a function for each parser of what comes from outside.
//!
//! Written once and run twice: `cargo test` feeds them the seeds of `fuzz/seeds` and what grows from those (the `driver`
//! beside), and libFuzzer feeds them for hours (`fuzz/`, docs/fuzzing.md). Each panics where its parser does, and where
//! the parser took something that it must not take; a refusal is never wrong here, only in the parser's own tests.

#![expect(clippy::missing_panics_doc, reason = "to panic is how a target tells")]

#[cfg(test)]
mod driver;

use std::path::{Path, PathBuf};

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, Request, header};
use serde_json::Value;
use shoal_core::bytes::ByteCount;
use shoal_core::policy;
use shoal_core::protocol::{FromServer, FromWorker};
use shoal_core::simulate;
use shoal_core::store::format::{
    Entry, Footer, Secret, UNIT, UNIT_LEN, footer_bytes, padded, read_footer, read_record_header,
    read_segment_header, reseal,
};

use crate::api::{Order, PinOrder, SleepOrder, WakeOrder};
use crate::config::{MachineMemory, ServerConfig, Surroundings, parse, read_listing, tensor_bytes};
use crate::gateway::{Ask, Guard, Keys};
use crate::state::ShelfSnapshot;

/// One function: it comes back, whatever the bytes are.
pub type Target = fn(&[u8]);

/// All of them, by the names of their files in `fuzz/fuzz_targets` and of their folders in `fuzz/seeds`.
pub const TARGETS: [(&str, Target); 11] = [
    ("config", config),
    ("control", control),
    ("disk", disk),
    ("gate", gate),
    ("gpus", gpus),
    ("keys", keys),
    ("openai", openai),
    ("orders", orders),
    ("safetensors", safetensors),
    ("sizes", sizes),
    ("trace", trace),
];

const KEY: &str = "a-key-of-24-characters-0";
const NAME: &str = "shoal.example";

fn resolved(text: &str) -> Option<ServerConfig> {
    let sections = match parse(text) {
        Ok(sections) => sections,
        Err(problems) => {
            assert!(!problems.is_empty(), "refused without a reason");
            for problem in problems {
                assert!(problem.line <= text.lines().count() + 1, "a line that is not there: {problem:?}");
                assert!(!problem.kind.to_string().is_empty());
            }
            return None;
        }
    };
    let nowhere = PathBuf::from("/nowhere");
    let surroundings = Surroundings {
        working_dir: nowhere.clone(),
        home: Some(nowhere.clone()),
        config_home: None,
        state_home: nowhere.clone(),
        cache_home: nowhere.clone(),
        runtime_dir: nowhere.clone(),
        python: PathBuf::from("python3"),
        memory: MachineMemory { total: ByteCount::gib(8), available: ByteCount::gib(4), cgroup_left: None },
        shared_memory: None,
        nvidia: None,
        gpus: None,
        budgets_before: None,
    };
    sections.resolve(&nowhere.join("shoal.toml"), &surroundings).ok()
}

/// A `shoal.toml`: every mistake has a line of the file, and what is taken keeps the rules on names and sizes.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(config) = resolved(text) else { return };
    assert!(!config.device_budget.is_zero(), "a budget of nothing");
    assert!(!config.models.is_empty(), "a server of nothing");
    for (place, model) in config.models.iter().enumerate() {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':');
        assert!(!model.name.is_empty() && model.name.chars().all(plain), "{:?} names files too", model.name);
        assert!(config.models[..place].iter().all(|other| other.name != model.name), "two of one name");
        assert!(model.max.is_none_or(|max| model.min.is_none_or(|min| min <= max)), "{model:?}");
    }
}

/// A line on the control socket, in either direction: what is understood can be said again, in one line.
pub fn control(data: &[u8]) {
    if let Ok(said) = serde_json::from_slice::<FromWorker>(data) {
        let line = serde_json::to_vec(&said).expect("understood, so it can be said");
        assert!(!line.contains(&b'\n'), "a message is one line");
        assert_eq!(serde_json::from_slice::<FromWorker>(&line).expect("our own words"), said);
    }
    if let Ok(said) = serde_json::from_slice::<FromServer>(data) {
        let line = serde_json::to_vec(&said).expect("understood, so it can be said");
        assert!(!line.contains(&b'\n'), "a message is one line");
        // Not equal: numbers with a point may lose their last digit.
        let again = serde_json::from_slice::<FromServer>(&line).expect("our own words");
        assert_eq!(std::mem::discriminant(&again), std::mem::discriminant(&said));
    }
}

/// What a disk gives back: headers of segments and records (the front of a unit) and footers (the end of a segment), with the
/// checksum they came with and with the one they should have. All that is taken lies inside its segment.
pub fn disk(data: &[u8]) {
    const SECRET: Secret = Secret(7);
    const SEGMENT: u64 = 1 << 20;
    let units = data.len().next_multiple_of(UNIT_LEN).clamp(UNIT_LEN, 16 * UNIT_LEN);
    let data = &data[..data.len().min(units)];
    let (mut front, mut end) = (vec![0; units], vec![0; units]);
    front[..data.len()].copy_from_slice(data);
    end[units - data.len()..].copy_from_slice(data);
    let number = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 8).map_or(0, |word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
    };
    let inside = |entries: &[Entry], from: u64, to: u64| {
        for entry in entries {
            let last = entry.offset + padded(entry.bytes.into());
            let is_inside =
                entry.offset.is_multiple_of(UNIT) && entry.offset >= from && last <= to && entry.bytes > 0;
            assert!(is_inside, "{entry:?} lies outside {from}..{to}");
        }
    };
    for is_resealed in [false, true] {
        if is_resealed {
            reseal(SECRET, &mut front[..UNIT_LEN]);
            reseal(SECRET, &mut end);
        }
        if let Some(header) = read_segment_header(SECRET, SEGMENT, &front) {
            assert!(header.seq < u64::MAX, "the next segment needs a number");
        }
        let offset = number(&front, 16);
        if let Some(record) = read_record_header(SECRET, number(&front, 8), offset, SEGMENT, &front) {
            assert!(offset + record.bytes <= SEGMENT && record.bytes > UNIT, "{record:?}");
            inside(&record.entries, offset + UNIT, offset + record.bytes);
        }
        match read_footer(SECRET, number(&end, units - 56), SEGMENT, &end) {
            Footer::None => {}
            Footer::Longer(bytes) => assert!(bytes > units as u64 && bytes < SEGMENT, "{bytes}"),
            Footer::Entries(entries) => inside(&entries, 2 * UNIT, SEGMENT - footer_bytes(entries.len())),
        }
    }
}

/// Lines of headers: an order passes the gate only with a name of this server, from its own page or none, with the key
/// and as JSON.
pub fn gate(data: &[u8]) {
    let Some(config) = resolved(
        "[server]\ndevice = 'sim'\ndevice_budget = '64MiB'\nallowed_hosts = ['shoal.example']\n\
         [[model]]\nname = 'a'\nsource = 'x/a'\n",
    ) else {
        panic!("the gate's own configuration is refused");
    };
    let keys = Keys::parse(KEY, Path::new("keys")).ok();
    let guard = Guard::new(&config, keys);
    let mut request = Request::post("/api/v1/models/a/wake").body(Body::empty()).expect("a request");
    for line in data.split(|byte| *byte == b'\n') {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let (name, value) = (HeaderName::from_bytes(&line[..colon]), line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(value)) {
            request.headers_mut().append(name, value);
        }
    }
    if guard.check(&request).is_err() {
        return;
    }
    let headers = request.headers();
    let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().expect("it passed"));
    let host = text(header::HOST).expect("a request without a host passed");
    let name = host.rsplit('@').next().unwrap_or_default().to_ascii_lowercase();
    let name = match name.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => name.split(':').next().unwrap_or_default().trim_end_matches('.'),
    };
    let is_loopback =
        name.parse::<std::net::IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback());
    assert!(name == "localhost" || name == NAME || is_loopback, "{host:?} passed as a name of this server");
    if let Some(origin) = text(header::ORIGIN) {
        let own = origin.split_once("://").is_some_and(|(_, origin)| origin.eq_ignore_ascii_case(host));
        assert!(own, "a page of {origin:?} passed");
    }
    assert!(text(header::AUTHORIZATION).is_some_and(|shown| shown.ends_with(KEY)), "passed without the key");
    let kind = text(header::CONTENT_TYPE).expect("passed without a type").to_ascii_lowercase();
    assert!(kind.trim_start().starts_with("application/json"), "passed as {kind:?}");
}

/// What `nvidia-smi` lists.
pub fn gpus(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(gpus) = read_listing(&text) {
        assert!(!gpus.is_empty());
        for gpu in gpus {
            let _ = gpu.has_driver();
        }
    }
}

/// A file of keys: what is taken can be shown in a header.
pub fn keys(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if Keys::parse(text, Path::new("keys")).is_ok() {
        let shown = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        // A name may stand before it.
        for key in shown.filter_map(|line| line.split_ascii_whitespace().last()) {
            assert!(key.len() >= 16 && HeaderValue::from_str(&format!("Bearer {key}")).is_ok(), "{key:?}");
        }
    }
}

/// A request of OpenAI's format: the two fields that are read are those that any reader of JSON finds.
pub fn openai(data: &[u8]) {
    let Ok(ask) = Ask::read(data) else { return };
    assert!(!ask.model.is_empty());
    // Where the rest is too deep for it, the other reader gives up.
    if let Ok(value) = serde_json::from_slice::<Value>(data) {
        assert_eq!(value["model"], ask.model);
        assert_eq!(value["stream"].as_bool().unwrap_or(false), ask.stream);
    }
}

/// Bodies of `/api/v1`, and the state that the command line reads.
pub fn orders(data: &[u8]) {
    let _ = Order::<WakeOrder>::parse(data);
    let _ = Order::<SleepOrder>::parse(data);
    let _ = Order::<PinOrder>::parse(data);
    if let Ok(state) = serde_json::from_slice::<ShelfSnapshot>(data) {
        serde_json::to_vec(&state).expect("understood, so it can be said");
    }
}

/// The head of a weights file: a count, or nothing; halving every float never makes it larger.
pub fn safetensors(data: &[u8]) {
    let Some(whole) = tensor_bytes(data, |own| own) else { return };
    let half = tensor_bytes(data, |own| own.min(2)).expect("the same header");
    assert!(half <= whole, "{half} > {whole}");
}

/// A size as people write it: what is taken prints as a size that reads as (nearly) the same.
pub fn sizes(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(size) = text.parse::<ByteCount>() else { return };
    if size.0 > 1 << 63 {
        return; // printed with one digit behind the point it may round beyond what there is
    }
    let again: ByteCount = size.to_string().parse().expect("our own words");
    assert!(again.0.abs_diff(size.0) <= size.0 / 20, "{size} read as {again}");
}

/// A trace of requests: sorted, of models that there are, and played to its end. Every mistake has a line of the file.
pub fn trace(data: &[u8]) {
    const MODELS: [&str; 2] = ["chat", "code"];
    const GIB: ByteCount = ByteCount::gib(1);
    let Ok(text) = std::str::from_utf8(data) else { return };
    match simulate::trace::parse(text, &MODELS) {
        Err(error) => {
            let said = error.to_string();
            let line =
                said.strip_prefix("line ").and_then(|rest| rest.split([' ', ':']).next()?.parse().ok());
            assert!(line.is_none_or(|line: usize| (1..=text.lines().count()).contains(&line)), "{said}");
            assert!(line.is_some() || said == simulate::TraceError::Empty.to_string(), "{said}");
        }
        Ok(asked) => {
            assert!(!asked.is_empty() && asked.is_sorted_by_key(|one| one.at_ms));
            assert!(asked.iter().all(|one| one.model < MODELS.len()));
            let service = simulate::Service::default();
            let arrivals: Vec<_> = asked.iter().map(|one| service.arrival(one)).collect();
            let kinds = MODELS.map(|name| simulate::Kind::new(name, GIB, 100));
            let settings = simulate::Settings { wait_max_ms: Some(1_000), ..simulate::Settings::new(GIB) };
            let report = simulate::play(&policy::Value, &settings, &kinds, &arrivals, &mut |_, _| {});
            let total = report.total;
            assert_eq!(total.requests, total.served + total.refused + total.timed_out);
        }
    }
}
