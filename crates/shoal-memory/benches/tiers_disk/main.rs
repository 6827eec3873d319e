//! The disk tier against the disk: writes and reads of blocks through [`DiskTier`], against plain direct I/O of the same
//! sizes at the same depth to a file of the same kind, in the same run and taking turns. And how long it takes to read back
//! what a log of 100 GiB holds.
//!
//! `$SHOAL_DISK` is a directory on the disk to measure (the build folder by default). Each line is a row, with tabs between:
//! `benches/tiers_disk.py` runs it and writes `benches/results`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program")]

mod ceiling;
mod recovery;

use std::collections::VecDeque;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ceiling::Ceiling;
use shoal_core::bytes::ByteCount;
use shoal_device::{Device, HostBacking, HostBuffer, HostSlab, SimDevice, SimOptions};
use shoal_memory::disk::{DiskOptions, DiskSpec, DiskTier, Engine};
use shoal_memory::store::{Buffer, Fingerprint, Store, StoreKey};

const DEPTH: usize = 32;
const WAIT: Duration = Duration::from_mins(5);
const GIB: f64 = (1_u64 << 30) as f64;
const ROUNDS: usize = 5;

/// What one way of moving bytes did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Speed {
    pub(crate) gib_per_s: f64,
    pub(crate) cpu_s_per_gib: f64,
}

/// Times a piece of work over so many bytes: wall clock and processor time of this process.
pub(crate) fn timed(bytes: u64, work: impl FnOnce()) -> Speed {
    let (begun, cpu) = (Instant::now(), cpu_seconds());
    work();
    let gib = bytes as f64 / GIB;
    Speed { gib_per_s: gib / begun.elapsed().as_secs_f64(), cpu_s_per_gib: (cpu_seconds() - cpu) / gib }
}

/// Of this process, user and system, all threads.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let after = stat.rsplit(") ").next().unwrap();
    let ticks: f64 = after.split(' ').skip(11).take(2).map(|field| field.parse::<f64>().unwrap()).sum();
    ticks / 100.0
}

pub(crate) fn row(
    case: &str,
    metric: &str,
    unit: &str,
    values: &[f64],
    ceiling: Option<f64>,
    target: Option<f64>,
) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let show = |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
    println!(
        "row\t{case}\t{metric}\t{unit}\t{}\t{}\t{}\t{}\t{}\t{}",
        sorted[sorted.len() / 2],
        show(ceiling),
        show(target),
        sorted.len(),
        sorted[0],
        sorted[sorted.len() - 1],
    );
}

fn key(block: u64) -> StoreKey {
    StoreKey { fingerprint: Fingerprint(1), tenant: 0, block: block.into() }
}

/// Blocks in a shuffled order, the same each time.
pub(crate) fn shuffled(count: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut state = 7_u64;
    for at in (1..order.len()).rev() {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        order.swap(at, usize::try_from(state >> 33).unwrap() % (at + 1));
    }
    order
}

/// Memory as a worker has it: a slab of the arena, of which blocks are parts.
pub(crate) struct Arena {
    pub(crate) slab: Arc<HostSlab>,
    buffer: Arc<HostBuffer>,
    block: u64,
    _runtime: tempfile::TempDir,
}

impl Arena {
    pub(crate) fn new(bytes: u64, block: usize) -> Self {
        let runtime = tempfile::tempdir().unwrap();
        let device: Arc<dyn Device> =
            SimDevice::open(SimOptions::new(ByteCount::mib(64), runtime.path())).unwrap();
        let slab = HostSlab::allocate(&device, ByteCount(bytes), HostBacking::HugePages).unwrap();
        let buffer = slab.buffer(ByteCount::ZERO, ByteCount(bytes), ()).unwrap();
        let fill = |memory: &mut [u8]| {
            let mut state = 1_u64;
            for word in memory.chunks_exact_mut(8) {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                word.copy_from_slice(&state.to_le_bytes());
            }
        };
        buffer.access_mut(ByteCount::ZERO, ByteCount(bytes), fill).unwrap();
        Self { slab, buffer, block: block as u64, _runtime: runtime }
    }

    pub(crate) fn source(&self, part: usize) -> Buffer {
        let at = ByteCount(part as u64 * self.block);
        Buffer::Host(self.buffer.view(at, ByteCount(self.block)).unwrap())
    }

    pub(crate) fn target(&self, part: usize) -> Buffer {
        let at = ByteCount(part as u64 * self.block);
        Buffer::HostMut(self.buffer.view_mut(at, ByteCount(self.block)).unwrap())
    }
}

/// Writes, then reads, `count` blocks through the tier, `outstanding` at a time.
fn tier_round(folder: &Path, engine: Engine, block: usize, count: u64, outstanding: usize) -> [Speed; 2] {
    let path = folder.join("tier");
    let total = count * block as u64;
    let spec = DiskSpec::new(path.clone(), ByteCount(total + total / 4 + (2 << 30)));
    let options = DiskOptions { engine, depth: DEPTH, ..DiskOptions::default() };
    let tier = DiskTier::open(&[spec], options).unwrap();
    let arena = Arena::new((outstanding * block) as u64, block);
    tier.register(&arena.slab);
    let write = timed(total, || {
        let mut tickets = VecDeque::new();
        for number in 0..count {
            let part = usize::try_from(number).unwrap() % outstanding;
            tickets.push_back(tier.put(key(number), arena.source(part), block, WAIT));
            while tickets.len() >= outstanding {
                tickets.pop_front().unwrap().wait().unwrap();
            }
        }
        for ticket in tickets {
            ticket.wait().unwrap();
        }
        tier.flush(WAIT).wait().unwrap();
    });
    let order = shuffled(count);
    let read = timed(total, || {
        let mut tickets = VecDeque::new();
        let mut free: Vec<Buffer> = (0..outstanding).map(|part| arena.target(part)).collect();
        for number in order {
            let target = free.pop().unwrap();
            tickets.push_back(tier.get(key(number), target, WAIT));
            if free.is_empty() {
                free.push(tickets.pop_front().unwrap().wait().unwrap().buffer);
            }
        }
        for ticket in tickets {
            ticket.wait().unwrap();
        }
    });
    let usage = tier.usage();
    assert_eq!(usage[0].counts.corrupt, 0);
    for ticket in tier.unregister(&arena.slab, WAIT) {
        ticket.wait().unwrap();
    }
    println!("# {:?} {:?}", usage[0].means, usage[0].counts);
    drop(tier);
    fs::remove_dir_all(path).unwrap();
    [write, read]
}

fn compare(folder: &Path, name: &str, engine: Engine, block: usize, total: u64) {
    let count = total / block as u64;
    // Small blocks share records, so more of them are under way at a time.
    let outstanding = (3 * DEPTH).max((16 << 20) / block).min(512);
    let (mut ours, mut ceilings) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        // In turns, also as to who comes first: virtual disks give more to whoever comes after a pause.
        if round % 2 == 1 {
            ceilings.push(ceiling::round(folder, block, count, DEPTH));
        }
        ours.push(tier_round(folder, engine, block, count, outstanding));
        if round % 2 == 0 {
            ceilings.push(ceiling::round(folder, block, count, DEPTH));
        }
    }
    for (at, direction) in ["write", "read"].into_iter().enumerate() {
        let values: Vec<f64> = ours.iter().map(|speeds| speeds[at].gib_per_s).collect();
        let top = Ceiling::best(&ceilings, at);
        let case = format!("{direction}, blocks of {name}");
        row(&case, "rate", "GiB/s", &values, Some(top.gib_per_s), Some(0.95 * top.gib_per_s));
        let cpu: Vec<f64> = ours.iter().map(|speeds| speeds[at].cpu_s_per_gib).collect();
        row(&case, "processor time", "s/GiB", &cpu, Some(top.cpu_s_per_gib), None);
    }
}

fn main() {
    let parent = env::var_os("SHOAL_DISK").map_or_else(
        || PathBuf::from(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into())),
        PathBuf::from,
    );
    fs::create_dir_all(&parent).unwrap();
    let folder = tempfile::tempdir_in(parent).unwrap();
    let only = env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let wants = |name: &str| only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    for (name, block, mib) in
        [("2 MiB", 2 << 20, 768), ("512 KiB", 512 << 10, 768), ("128 KiB", 128 << 10, 512)]
    {
        if wants(name) {
            compare(folder.path(), name, Engine::Auto, block, mib << 20);
        }
    }
    if wants("16 KiB") {
        compare(folder.path(), "16 KiB", Engine::Auto, 16 << 10, 256 << 20);
    }
    if wants("threads") {
        compare(folder.path(), "2 MiB, threads", Engine::Threads, 2 << 20, 1024 << 20);
    }
    if wants("recovery") {
        recovery::measure(folder.path());
    }
}
