//! What a worker says of itself, and when.

use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_memory::{BrokerClient, ManagerOptions, MemoryManager};

use super::common::open;
use super::{Fake, pair};

/// A worker that serves a manager without regions, and its server.
fn serving(dir: &Path) -> (Arc<BrokerClient>, Fake, Arc<MemoryManager>) {
    let (client, fake) = pair(dir);
    let options = ManagerOptions::new(ByteCount::mib(16), Arc::clone(&client) as _);
    let manager = MemoryManager::new(open(dir, 64), options).expect("a manager");
    client.serve(&manager).expect("threads");
    (client, fake, manager)
}

#[test]
fn figures_are_said_when_they_change() {
    let dir = tempfile::tempdir().expect("a directory");
    let (client, mut fake, _manager) = serving(dir.path());
    client.set_requests(2, 1, 40, 50);
    client.set_kv_back(340, 70);
    client.set_overhead(ByteCount::mib(7), ByteCount::mib(9));
    let usage = fake.hear_usage(|usage| (usage.tokens_out, usage.overhead_peak) == (40, ByteCount::mib(9)));
    let overhead = (usage.overhead_device, usage.overhead_peak);
    assert_eq!((usage.requests_running, overhead), (2, (ByteCount::mib(7), ByteCount::mib(9))));
    assert_eq!((usage.requests_waiting, usage.tokens_embedded), (1, 50));
    assert_eq!((usage.kv_back_us_per_mib, usage.kv_found_milli), (340, 70));
    let mut line = String::new();
    fake.writer.set_read_timeout(Some(Duration::from_millis(500))).expect("set");
    assert!(fake.reader.read_line(&mut line).is_err(), "nothing changed, yet: {line}");
}

#[test]
fn that_the_last_request_has_ended_is_said_sooner() {
    let dir = tempfile::tempdir().expect("a directory");
    let (client, mut fake, _manager) = serving(dir.path());
    let mut late: Vec<Duration> = (0..9)
        .map(|tokens| {
            client.set_requests(1, 0, tokens, 0);
            fake.hear_usage(|usage| usage.requests_running == 1);
            let ended = Instant::now();
            client.set_requests(0, 0, tokens + 1, 0);
            fake.hear_usage(|usage| (usage.requests_running, usage.tokens_out) == (0, tokens + 1));
            ended.elapsed()
        })
        .collect();
    late.sort();
    assert!(late[4] < Duration::from_millis(100), "five times a second is too late for it: {late:?}");
}
