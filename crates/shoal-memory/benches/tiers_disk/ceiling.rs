//! What the disk gives to whoever asks for nothing else: direct writes one after another, direct reads in a shuffled order,
//! by the ring and by as many threads as the depth. The better of the two is the ceiling.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use shoal_memory::disk::{Engine, Medium, Op, Verb, raw_medium};
use shoal_memory::store::{Aligned, Buffer};

use super::{Arena, Speed, shuffled, timed};

const O_DIRECT: i32 = 0o40000;

/// Writing and reading, by the ring and by threads.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ceiling {
    ring: [Speed; 2],
    threads: [Speed; 2],
}

impl Ceiling {
    /// The faster of the two by the median of all rounds; 0 is writing, 1 is reading.
    pub(crate) fn best(rounds: &[Self], at: usize) -> Speed {
        let median = |speeds: Vec<Speed>| {
            let middle = |value: fn(&Speed) -> f64| {
                let mut values: Vec<f64> = speeds.iter().map(value).collect();
                values.sort_by(f64::total_cmp);
                values[values.len() / 2]
            };
            Speed {
                gib_per_s: middle(|speed| speed.gib_per_s),
                cpu_s_per_gib: middle(|speed| speed.cpu_s_per_gib),
            }
        };
        let ring = median(rounds.iter().map(|round| round.ring[at]).collect());
        let threads = median(rounds.iter().map(|round| round.threads[at]).collect());
        if ring.gib_per_s >= threads.gib_per_s { ring } else { threads }
    }
}

pub(crate) fn round(folder: &Path, block: usize, count: u64, depth: usize) -> Ceiling {
    let ceiling = Ceiling {
        ring: by_ring(&folder.join("ring"), block, count, depth),
        threads: by_threads(&folder.join("threads"), block, count, depth),
    };
    println!("# ceiling of {block}: {ceiling:?}");
    ceiling
}

fn by_ring(path: &Path, block: usize, count: u64, depth: usize) -> [Speed; 2] {
    let mut medium = raw_medium(path, Engine::Auto, depth).unwrap();
    let total = count * block as u64;
    medium.grow(total).unwrap();
    // The same memory as the tier's: huge pages that the ring knows.
    let arena = Arena::new((depth * block) as u64, block);
    medium.register(&arena.slab);
    let mut buffers: Vec<Buffer> = (0..depth).map(|part| arena.source(part)).collect();
    let order: Vec<u64> = (0..count).collect();
    let write = timed(total, || {
        all(medium.as_mut(), Verb::Write, &order, block, &mut buffers);
        sync(medium.as_mut());
    });
    let order = shuffled(count);
    buffers.clear();
    buffers.extend((0..depth).map(|part| arena.target(part)));
    let read = timed(total, || all(medium.as_mut(), Verb::Read, &order, block, &mut buffers));
    drop((medium, buffers));
    fs::remove_file(path).unwrap();
    [write, read]
}

fn all(medium: &mut dyn Medium, verb: Verb, order: &[u64], block: usize, free: &mut Vec<Buffer>) {
    let (mut next, mut done) = (order.iter(), Vec::new());
    let mut left = order.len();
    while left > 0 {
        while let Some(buffer) = free.pop() {
            let Some(number) = next.next() else {
                free.push(buffer);
                break;
            };
            let op = Op {
                token: *number,
                verb,
                offset: number * block as u64,
                buffer: Some(buffer),
                bytes: block,
            };
            medium.submit(op).unwrap();
        }
        medium.wait(Duration::from_secs(1));
        medium.reap(&mut done);
        for done in done.drain(..) {
            assert_eq!(done.result.unwrap(), block);
            free.push(done.buffer.unwrap());
            left -= 1;
        }
    }
}

fn sync(medium: &mut dyn Medium) {
    medium.submit(Op { token: 0, verb: Verb::Sync, offset: 0, buffer: None, bytes: 0 }).unwrap();
    let mut done = Vec::new();
    while done.is_empty() {
        medium.wait(Duration::from_secs(1));
        medium.reap(&mut done);
    }
}

fn by_threads(path: &Path, block: usize, count: u64, depth: usize) -> [Speed; 2] {
    raw_medium(path, Engine::Threads, 1).unwrap().grow(count * block as u64).unwrap();
    let file = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(path).unwrap();
    let total = count * block as u64;
    let order: Vec<u64> = (0..count).collect();
    let write = timed(total, || {
        spread(&file, &order, block, depth, |file, memory, at| file.write_all_at(memory, at).unwrap());
        file.sync_data().unwrap();
    });
    let order = shuffled(count);
    let read = timed(total, || {
        spread(&file, &order, block, depth, |file, memory, at| file.read_exact_at(memory, at).unwrap());
    });
    fs::remove_file(path).unwrap();
    [write, read]
}

fn spread(
    file: &File,
    order: &[u64],
    block: usize,
    depth: usize,
    work: impl Fn(&File, &mut [u8], u64) + Sync,
) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..depth {
            scope.spawn(|| {
                let mut memory = Aligned::zeroed(block);
                while let Some(number) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(file, &mut memory.as_mut_slice()[..block], number * block as u64);
                }
            });
        }
    });
}
