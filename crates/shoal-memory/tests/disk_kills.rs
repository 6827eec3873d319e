//! SIGKILL at every step of what a disk tier does, in a process of its own on real files: before a request is made, while it
//! is under way, and after it is done and before anybody hears of it. Then the directory is opened again.
//!
//! Some of the steps are tried each time; `SHOAL_HISTORIES=100000` tries all of them.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests, one of which is a process of its own")]

mod common {
    pub(crate) mod killer;
}

use std::collections::BTreeSet;
use std::env;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::killer::Killer;
use shoal_core::bytes::ByteCount;
use shoal_memory::disk::{DiskOptions, DiskSpec, DiskTier, Medium};
use shoal_memory::store::{Aligned, Buffer, Fingerprint, Store, StoreKey};

const WAIT: Duration = Duration::from_mins(1);
const BLOCKS: u64 = 40;

fn key(block: u64) -> StoreKey {
    StoreKey { fingerprint: Fingerprint(3), tenant: 1, block: block.into() }
}

fn content(block: u64) -> Vec<u8> {
    // Packed ones and ones that are written from where they lie.
    let bytes = if block.is_multiple_of(5) { 256 << 10 } else { 30_000 + block * 11 };
    (0..bytes).map(|at| (at.wrapping_mul(block + 3) >> 3).to_le_bytes()[0]).collect()
}

fn options() -> DiskOptions {
    DiskOptions {
        segment_bytes: ByteCount::mib(1),
        record_bytes: ByteCount(128 << 10),
        ..DiskOptions::default()
    }
}

fn spec(path: &Path, mib: u64) -> DiskSpec {
    DiskSpec::new(path, ByteCount::mib(mib))
}

/// The process that is killed; does nothing when it is run as a test.
#[test]
fn child() {
    let Ok(path) = env::var("SHOAL_KILL_PATH") else { return };
    let number = |name: &str| env::var(name).unwrap().parse::<u64>().unwrap();
    let (last, mib) = (number("SHOAL_KILL_AT"), number("SHOAL_KILL_MIB"));
    let steps = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&steps);
    let wrap = move |inner| Box::new(Killer { inner, steps: Arc::clone(&counted), last }) as Box<dyn Medium>;
    let tier = DiskTier::open_through(&[spec(Path::new(&path), mib)], options(), wrap).unwrap();
    for round in 0..BLOCKS / 4 {
        let blocks: Vec<u64> = (4 * round..4 * round + 4).collect();
        let put = |block: &u64| {
            let bytes = content(*block);
            (*block, tier.put(key(*block), Buffer::Own(Aligned::copy_of(&bytes)), bytes.len(), WAIT))
        };
        let tickets: Vec<_> = blocks.iter().map(put).collect();
        for (block, ticket) in tickets {
            ticket.wait().unwrap();
            println!("\nput {block}");
        }
        if round % 3 == 1 {
            let block = 4 * round - 3;
            println!("\nremoving {block}");
            tier.remove(key(block), WAIT).wait().unwrap();
            println!("\nremoved {block}");
        }
        // One that stays hot.
        let _ = tier.get(key(2), Buffer::zeroed(40_000), WAIT).wait();
    }
    tier.close(WAIT);
    println!("\nsteps {}", steps.load(Ordering::Relaxed));
}

#[derive(Debug, Default)]
struct Told {
    put: BTreeSet<u64>,
    removed: BTreeSet<u64>,
    unsure: BTreeSet<u64>,
    steps: Option<u64>,
}

fn run(path: &Path, last: u64, mib: u64) -> Told {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env("SHOAL_KILL_PATH", path)
        .env("SHOAL_KILL_AT", last.to_string())
        .env("SHOAL_KILL_MIB", mib.to_string())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let mut told = Told::default();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Some((word, number)) = line.split_once(' ') else { continue };
        let Ok(number) = number.parse() else { continue };
        match word {
            "put" => {
                told.put.insert(number);
            }
            "removing" => {
                told.put.remove(&number);
                told.unsure.insert(number);
            }
            "removed" => {
                told.removed.insert(number);
            }
            "steps" => told.steps = Some(number),
            _ => {}
        }
    }
    assert!(
        told.steps.is_some() == output.status.success(),
        "{told:?} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    told
}

fn kill_at_every_step(mib: u64, is_roomy: bool) {
    let folder = tempfile::tempdir().unwrap();
    let whole = run(&folder.path().join("whole"), u64::MAX, mib);
    let steps = whole.steps.unwrap();
    assert!(steps > 100 && whole.put.len() as u64 + 3 == BLOCKS, "{whole:?}");
    let tries =
        env::var("SHOAL_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(40_u64).min(steps);
    let (mut gone, mut torn) = (0, 0);
    for number in 0..tries {
        let last = number * steps / tries;
        let path = folder.path().join(format!("at-{last}"));
        let told = run(&path, last, mib);
        let tier = DiskTier::open(&[spec(&path, mib)], options()).unwrap();
        for block in 0..BLOCKS {
            let bytes = content(block);
            match tier.get(key(block), Buffer::zeroed(bytes.len()), WAIT).wait() {
                Ok(fetched) => {
                    assert!(fetched.as_slice() == bytes, "killed at {last}: wrong bytes of {block}");
                    assert!(!told.removed.contains(&block), "killed at {last}: {block} was removed");
                }
                Err(miss) => {
                    let is_lost = told.put.contains(&block);
                    gone += u64::from(is_lost);
                    assert!(!is_roomy || !is_lost, "killed at {last}: {block} was acknowledged: {miss}");
                }
            }
        }
        let usage = &tier.usage()[0];
        assert!(usage.recovered.scanned <= 3, "{:?}", usage.recovered);
        torn += usage.recovered.torn;
        // It goes on.
        let bytes = content(1000);
        tier.put(key(1000), Buffer::Own(Aligned::copy_of(&bytes)), bytes.len(), WAIT).wait().unwrap();
        drop(tier);
        std::fs::remove_dir_all(path).unwrap();
    }
    println!(
        "killed at {tries} of {steps} steps: {gone} acknowledged blocks gone, {torn} torn ones found and left out"
    );
}

#[test]
fn nothing_acknowledged_is_lost_wherever_the_process_is_killed() {
    kill_at_every_step(16, true);
}

#[test]
fn nothing_wrong_is_served_wherever_a_process_that_makes_room_is_killed() {
    kill_at_every_step(3, false);
}
