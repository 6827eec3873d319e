//! SIGKILL at every step of a fill of the weight store, in a process of its own on real files, and at moments in between (names are
//! given outside the medium). Then the directory is opened again.
//!
//! Some of the steps are tried each time; `SHOAL_HISTORIES=100000` tries all of them.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests, one of which is a process of its own")]

mod common;

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::killer::Killer;
use common::{PAGE, WAIT, noise, world};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_memory::StoredTensor;
use shoal_memory::disk::Medium;
use shoal_memory::weights::{WeightOptions, WeightStore};

const PAGES: u64 = 5;
static GOING: AtomicBool = AtomicBool::new(false);

/// Two models of which one makes room for the next, and share a part.
fn content(number: u64) -> Vec<u8> {
    let mut bytes = noise(PAGES * PAGE, 70);
    let own = noise(2 * PAGE, 80 + number);
    bytes[..own.len()].copy_from_slice(&own);
    bytes
}

fn name(number: u64) -> String {
    format!("0000000{number}")
}

fn tensors() -> Vec<StoredTensor> {
    let lengths = [(0, 2 * PAGE), (2 * PAGE, 3 * PAGE)];
    let tensor =
        |(offset, bytes)| StoredTensor { offset: ByteCount(offset), bytes: ByteCount(bytes), source: None };
    lengths.map(tensor).to_vec()
}

fn options() -> WeightOptions {
    // Room for two and the half of a third.
    let bytes_max = ByteCount(8 * PAGE);
    let io_deadline = Duration::from_mins(1);
    WeightOptions { keep: Duration::ZERO, io_deadline, ..WeightOptions::new(bytes_max) }
}

/// The process that is killed; does nothing when it is run as a test.
#[test]
fn child() {
    let Ok(path) = env::var("SHOAL_KILL_WEIGHTS") else { return };
    let last = env::var("SHOAL_KILL_AT").unwrap().parse().unwrap();
    let steps = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&steps);
    let wrap = move |inner| Box::new(Killer { inner, steps: Arc::clone(&counted), last }) as Box<dyn Medium>;
    let store = WeightStore::open_through(Path::new(&path), options(), wrap).unwrap();
    let world = world(64, 64);
    for number in 0..3 {
        let region = world.weights(PAGES, &content(number));
        let report = region.store_in(&store, &name(number), "", &tensors(), &GOING).unwrap();
        println!("\nfilled {number} {report:?}");
        let stored = Arc::new(store.find(&name(number)).unwrap());
        world.region("again", PAGES, LeaseKind::Weights).load_stored(&stored, &tensors()).unwrap();
    }
    println!("\nsteps {}", steps.load(Ordering::Relaxed));
}

/// Which models the process said that it had stored, and after how many steps it ended by itself.
fn run(path: &Path, last: u64) -> (Vec<u64>, Option<u64>) {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env("SHOAL_KILL_WEIGHTS", path)
        .env("SHOAL_KILL_AT", last.to_string())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = |word: &str| -> Vec<u64> {
        let rest = text.lines().filter_map(|line| line.strip_prefix(word)?.split(' ').nth(1)?.parse().ok());
        rest.collect()
    };
    let steps = said("steps").first().copied();
    assert_eq!(steps.is_some(), output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (said("filled"), steps)
}

#[test]
fn what_is_there_is_whole_wherever_a_fill_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let (filled, steps) = run(&folder.path().join("whole"), u64::MAX);
    let steps = steps.unwrap();
    assert!(filled == [0, 1, 2] && steps > 60, "{filled:?} {steps}");
    let tries =
        env::var("SHOAL_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(24_u64).min(steps);
    let (mut whole, mut unfinished) = (0, 0);
    for number in 0..tries {
        let last = number * steps / tries;
        let path = folder.path().join(format!("at-{last}"));
        let (filled, ended) = run(&path, last);
        assert!(ended.is_none());
        let is_unfinished = |folder: &str| {
            let names = fs::read_dir(path.join(folder)).unwrap().map(|entry| entry.unwrap().path());
            names.filter(|name| name.extension().is_some()).count()
        };
        unfinished += is_unfinished("packs") + is_unfinished("models");
        let store = WeightStore::open(&path, options()).unwrap();
        let world = world(64, 64);
        for model in 0..3 {
            let Some(stored) = store.find(&name(model)) else {
                // The second makes room for the third: what it shares with the first stays.
                assert!(model == 1 || !filled.contains(&model), "{model} of {filled:?} is gone");
                continue;
            };
            whole += 1;
            let region = world.region("woken", PAGES, LeaseKind::Weights);
            region.load_stored(&Arc::new(stored), &tensors()).unwrap();
            region.wake(WAIT).unwrap().wait(WAIT).unwrap();
            let mut bytes = vec![0; usize::try_from(PAGES * PAGE).unwrap()];
            region.read(ByteCount::ZERO, &mut bytes).unwrap();
            assert!(bytes == content(model), "killed at {last}: other bytes of {model}");
        }
        // It goes on, and clears away what was left.
        let region = world.weights(PAGES, &content(5));
        region.store_in(&store, &name(5), "", &tensors(), &GOING).unwrap();
        assert_eq!(is_unfinished("packs") + is_unfinished("models"), 0, "killed at {last}");
        assert!(store.usage().unwrap().bytes <= options().bytes_max);
        fs::remove_dir_all(path).unwrap();
    }
    assert!(unfinished > 0 && whole > 0, "{unfinished} {whole}");
    println!(
        "killed at {tries} of {steps} steps: {whole} models whole, {unfinished} unfinished files cleared away"
    );
}
