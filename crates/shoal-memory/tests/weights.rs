//! Regions and a store of weights, on real files and the simulated device.

#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::{PAGE, WAIT, World, noise, piece, source_file, world};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_memory::disk::{DiskError, Done, Means, Medium, Op, Verb, Waker};
use shoal_memory::weights::{WeightOptions, WeightStore, WeightsError};
use shoal_memory::{Region, StoredTensor};

const NAME: &str = "00c0ffee";
static GOING: AtomicBool = AtomicBool::new(false);
const TENSOR: u64 = 3 << 20;

/// What happens to requests of a store's packs.
#[derive(Debug, Default)]
struct Fate {
    bytes_read: AtomicU64,
    fails_reads: AtomicBool,
    hangs_reads: AtomicBool,
    cuts_reads: AtomicBool,
    fails_writes: AtomicBool,
    is_full: AtomicBool,
    /// Done at the next read.
    meanwhile: parking_lot::Mutex<Option<Meanwhile>>,
}

struct Meanwhile(Box<dyn FnOnce() + Send>);

impl fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Meanwhile")
    }
}

#[derive(Debug)]
struct Fateful {
    inner: Box<dyn Medium>,
    fate: Arc<Fate>,
    /// Held for ever.
    hung: Vec<Op>,
}

fn is(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}

impl Medium for Fateful {
    fn bytes(&mut self) -> io::Result<u64> {
        self.inner.bytes()
    }
    fn grow(&mut self, bytes: u64) -> io::Result<()> {
        if is(&self.fate.is_full) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.inner.grow(bytes)
    }
    fn shrink(&mut self, bytes: u64) -> io::Result<()> {
        self.inner.shrink(bytes)
    }
    fn submit(&mut self, op: Op) -> Result<(), Op> {
        let meanwhile = self.fate.meanwhile.lock().take_if(|_| op.verb == Verb::Read);
        if let Some(Meanwhile(act)) = meanwhile {
            act();
        }
        if op.verb == Verb::Read && is(&self.fate.hangs_reads) {
            self.hung.push(op);
            return Ok(());
        }
        self.inner.submit(op)
    }
    fn wait(&mut self, timeout: Duration) {
        self.inner.wait(if self.hung.is_empty() { timeout } else { Duration::from_millis(5) });
    }
    fn reap(&mut self, done: &mut Vec<Done>) {
        let before = done.len();
        self.inner.reap(done);
        for one in &mut done[before..] {
            let is_read = one.buffer.is_some();
            self.fate.bytes_read.fetch_add(*one.result.as_ref().unwrap_or(&0) as u64, Ordering::Relaxed);
            if is_read && (is(&self.fate.fails_reads) || is(&self.fate.fails_writes)) {
                one.result = Err(io::ErrorKind::Other.into());
            }
            if is_read && is(&self.fate.cuts_reads) {
                one.result = Ok(4096);
            }
        }
    }
    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.hung.len()
    }
    fn depth(&self) -> usize {
        self.inner.depth()
    }
    fn waker(&self) -> Waker {
        self.inner.waker()
    }
    fn means(&self) -> Means {
        self.inner.means()
    }
}

fn options() -> WeightOptions {
    WeightOptions { io_deadline: WAIT, ..WeightOptions::new(ByteCount::mib(256)) }
}

fn store(world: &World) -> (WeightStore, Arc<Fate>) {
    let fate = Arc::new(Fate::default());
    (open(world, &fate, options()), fate)
}

/// The same store for requests that all hang: what a busy disk answers late is not to be taken for one of them.
fn impatient(world: &World, fate: &Arc<Fate>) -> WeightStore {
    open(world, fate, WeightOptions { io_deadline: Duration::from_millis(300), ..options() })
}

fn open(world: &World, fate: &Arc<Fate>, options: WeightOptions) -> WeightStore {
    let fate = Arc::clone(fate);
    let wrap = move |inner| Box::new(Fateful { inner, fate: Arc::clone(&fate), hung: Vec::new() }) as _;
    WeightStore::open_through(&world.dir.path().join("store"), options, wrap).unwrap()
}

/// One after another, each from a file.
fn tensors(path: &Arc<PathBuf>, bytes: u64) -> Vec<StoredTensor> {
    let starts = (0..bytes).step_by(usize::try_from(TENSOR).unwrap());
    starts
        .map(|at| {
            let length = TENSOR.min(bytes - at);
            StoredTensor {
                offset: ByteCount(at),
                bytes: ByteCount(length),
                source: Some(piece(path, at, length)),
            }
        })
        .collect()
}

/// A model of so many pages in files, as its first start makes it.
fn first_start(world: &World, pages: u64, bytes: &[u8]) -> (Region, Arc<PathBuf>, Vec<StoredTensor>) {
    let path = source_file(world.dir.path(), bytes);
    let region = world.region("first", pages, LeaseKind::Weights);
    let tensors = tensors(&path, bytes.len() as u64);
    for tensor in &tensors {
        let at = usize::try_from(tensor.offset.0).unwrap();
        let part = &bytes[at..at + usize::try_from(tensor.bytes.0).unwrap()];
        region.stage(tensor.offset, part, tensor.source.clone()).unwrap();
    }
    region.seal().unwrap();
    (region, path, tensors)
}

fn contents(region: &Region, bytes: usize) -> Vec<u8> {
    region.wake(WAIT).unwrap().wait(WAIT).unwrap();
    let mut read = vec![0; bytes];
    region.read(ByteCount::ZERO, &mut read).unwrap();
    read
}

fn packs(world: &World) -> Vec<PathBuf> {
    let folder = world.dir.path().join("store/packs");
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

#[test]
fn the_next_start_reads_no_file_of_the_model() {
    let world = world(64, 256);
    let (store, fate) = store(&world);
    let bytes = noise(9 * PAGE - 100, 1);
    let (first, path, tensors) = first_start(&world, 9, &bytes);
    assert!(store.find(NAME).is_none());
    let report = first.store_in(&store, NAME, "what it is", &tensors, &GOING).unwrap();
    assert_eq!((report.bytes, report.was_there), (ByteCount(9 * PAGE), false));
    assert!(first.store_in(&store, NAME, "what it is", &tensors, &GOING).unwrap().was_there);
    drop(first);
    fs::write(&*path, b"gone").unwrap();

    let stored = Arc::new(store.find(NAME).unwrap());
    assert_eq!((stored.note(), stored.bytes()), ("what it is", ByteCount(9 * PAGE)));
    let region = world.region("next", 9, LeaseKind::Weights);
    let loaded = region.load_stored(&stored, &tensors).unwrap();
    assert_eq!((loaded.bytes, loaded.in_source), (ByteCount(9 * PAGE), ByteCount(9 * PAGE)));
    assert_eq!(region.usage().host, ByteCount(9 * PAGE));
    assert!(region.usage().sealed);
    fate.fails_reads.store(true, Ordering::Relaxed);
    assert_eq!(contents(&region, bytes.len()), bytes);
    world.check();
    region.sleep(0.0, false, WAIT).unwrap();
    assert_eq!(contents(&region, bytes.len()), bytes);
}

#[test]
fn what_has_no_room_in_memory_is_woken_from_the_store_and_from_files_if_that_fails() {
    type Harm = fn(&Fate, &World);
    let harms: [Option<Harm>; 6] = [
        None,
        Some(|fate, _| fate.fails_reads.store(true, Ordering::Relaxed)),
        Some(|fate, _| fate.cuts_reads.store(true, Ordering::Relaxed)),
        Some(|fate, _| fate.hangs_reads.store(true, Ordering::Relaxed)),
        Some(|_, world| packs(world).iter().for_each(|pack| flip(pack, 13 << 20))),
        Some(|_, world| {
            let cut = |pack: &PathBuf| fs::OpenOptions::new().write(true).open(pack).unwrap().set_len(4096);
            for pack in packs(world) {
                cut(&pack).unwrap();
            }
        }),
    ];
    for (number, harm) in harms.into_iter().enumerate() {
        let world = world(64, 8);
        let (store, fate) = store(&world);
        let bytes = noise(9 * PAGE - 100, 2);
        let (first, path, tensors) = first_start(&world, 9, &bytes);
        assert!(first.usage().source_only > ByteCount(4 * PAGE));
        first.store_in(&store, NAME, "", &tensors, &GOING).unwrap();
        drop(first);

        let region = world.region("next", 9, LeaseKind::Weights);
        region.load_stored(&Arc::new(store.find(NAME).unwrap()), &tensors).unwrap();
        let in_files = region.usage().source_only;
        assert!(in_files > ByteCount(4 * PAGE), "{in_files}");
        let read = fate.bytes_read.load(Ordering::Relaxed);
        match harm {
            None => fs::write(&*path, b"gone").unwrap(),
            Some(harm) => harm(&fate, &world),
        }
        if is(&fate.hangs_reads) {
            region.attach_stored(Arc::new(impatient(&world, &fate).find(NAME).unwrap())).unwrap();
        }
        assert!(contents(&region, bytes.len()) == bytes, "harm {number}");
        if harm.is_none() {
            assert_eq!(fate.bytes_read.load(Ordering::Relaxed) - read, in_files.0);
        }
        world.check();
        // It comes from wherever it can the next time too.
        region.sleep(0.0, false, WAIT).unwrap();
        assert!(contents(&region, bytes.len()) == bytes, "harm {number}");
        if number == 4 {
            assert!(store.find(NAME).is_none(), "what is damaged is dropped");
            assert!(packs(&world).iter().all(|pack| pack.extension().is_some()), "under a name of no use");
        }
    }
}

/// [`first_start`] of which the last tensor is in no file, stored, and what it stored is seen by another process with less memory.
fn small_start(host_mib: u64) -> (World, World, WeightStore, Arc<Fate>, Vec<u8>, Vec<StoredTensor>) {
    let big = world(64, 256);
    let bytes = noise(9 * PAGE, 12);
    let (first, _, mut tensors) = first_start(&big, 9, &bytes);
    let (store, fate) = store(&big);
    first.store_in(&store, NAME, "", &tensors, &GOING).unwrap();
    drop(first);
    tensors.last_mut().unwrap().source = None;
    (big, world(64, host_mib), store, fate, bytes, tensors)
}

#[test]
fn what_no_file_holds_has_its_room_before_what_files_hold_too() {
    let (_big, small, store, _, bytes, tensors) = small_start(12);
    let region = small.region("next", 9, LeaseKind::Weights);
    region.load_stored(&Arc::new(store.find(NAME).unwrap()), &tensors).unwrap();
    let usage = region.usage();
    assert!(usage.host > tensors.last().unwrap().bytes && usage.source_only > ByteCount::ZERO, "{usage:?}");
    assert!(contents(&region, bytes.len()) == bytes);
    small.check();
}

#[test]
fn what_finds_no_room_after_all_stays_in_its_files() {
    let (_big, small, store, fate, bytes, tensors) = small_start(24);
    let (region, other) =
        (small.region("next", 9, LeaseKind::Weights), small.region("other", 4, LeaseKind::Weights));
    // All would fit, if nobody else came.
    let guest = other.clone();
    *fate.meanwhile.lock() = Some(Meanwhile(Box::new(move || {
        guest.stage(ByteCount::ZERO, &noise(4 * PAGE, 13), None).unwrap();
    })));
    let loaded = region.load_stored(&Arc::new(store.find(NAME).unwrap()), &tensors);
    let usage = region.usage();
    loaded.unwrap();
    assert!(usage.source_only > ByteCount::ZERO && usage.host > ByteCount::ZERO, "{usage:?}");
    assert!(contents(&region, bytes.len()) == bytes);
    small.check();
}

#[test]
fn a_region_that_is_filled_while_it_is_loaded_stays_as_it_was_filled() {
    let (_big, small, store, fate, bytes, tensors) = small_start(64);
    let region = small.region("next", 9, LeaseKind::Weights);
    let (other, own) = (region.clone(), noise(9 * PAGE, 14));
    let staged = own.clone();
    *fate.meanwhile.lock() =
        Some(Meanwhile(Box::new(move || other.stage(ByteCount::ZERO, &staged, None).unwrap())));
    region.load_stored(&Arc::new(store.find(NAME).unwrap()), &tensors).expect_err("it has bytes already");
    region.seal().unwrap();
    assert!(contents(&region, bytes.len()) == own);
    small.check();
}

#[test]
fn a_load_that_fails_leaves_the_region_as_it_was() {
    type Harm = fn(&Fate, &World);
    let harms: [Harm; 3] = [
        |fate, _| fate.fails_reads.store(true, Ordering::Relaxed),
        |fate, _| fate.hangs_reads.store(true, Ordering::Relaxed),
        |_, world| packs(world).iter().for_each(|pack| flip(pack, 13 << 20)),
    ];
    for harm in harms {
        let world = world(64, 256);
        let (store, fate) = store(&world);
        let bytes = noise(9 * PAGE, 3);
        let (first, _, tensors) = first_start(&world, 9, &bytes);
        first.store_in(&store, NAME, "", &tensors, &GOING).unwrap();
        let mut stored = Arc::new(store.find(NAME).unwrap());
        harm(&fate, &world);
        if is(&fate.hangs_reads) {
            stored = Arc::new(impatient(&world, &fate).find(NAME).unwrap());
        }
        let region = world.region("next", 9, LeaseKind::Weights);
        region.load_stored(&stored, &tensors).expect_err("it cannot be read");
        assert_eq!(region.usage().host, ByteCount::ZERO);
        region.stage(ByteCount::ZERO, &bytes, None).unwrap();
        region.seal().unwrap();
        assert_eq!(contents(&region, bytes.len()), bytes);
        world.check();
    }
}

#[test]
fn another_layout_is_not_loaded() {
    let world = world(64, 256);
    let (store, _) = store(&world);
    let bytes = noise(9 * PAGE, 4);
    let (first, _, tensors) = first_start(&world, 9, &bytes);
    first.store_in(&store, NAME, "", &tensors, &GOING).unwrap();
    let stored = Arc::new(store.find(NAME).unwrap());
    let other = world.region("longer", 11, LeaseKind::Weights);
    assert!(matches!(other.load_stored(&stored, &tensors), Err(WeightsError::OtherLayout)));
    let other = world.weights(9, &noise(9 * PAGE, 5));
    assert!(matches!(other.attach_stored(Arc::clone(&stored)), Err(WeightsError::OtherLayout)));
    first.attach_stored(stored).unwrap();
}

#[test]
fn tensors_of_several_models_are_stored_once() {
    let world = world(64, 256);
    let (store, _) = store(&world);
    let mut bytes = noise(9 * PAGE, 6);
    let (first, _, tensors) = first_start(&world, 9, &bytes);
    first.store_in(&store, NAME, "", &tensors, &GOING).unwrap();
    // Another head, as a fine-tune of the last tensors has.
    let new = noise(TENSOR, 7);
    let at = usize::try_from(4 * TENSOR).unwrap();
    bytes[at..at + new.len()].copy_from_slice(&new);
    let (second, ..) = first_start(&world, 9, &bytes);
    let report = second.store_in(&store, "00c0ffef", "", &tensors, &GOING).unwrap();
    assert_eq!((report.written, report.shared), (ByteCount(TENSOR), ByteCount(9 * PAGE - TENSOR)));
    let usage = store.usage().unwrap();
    assert_eq!((usage.models, usage.bytes), (2, ByteCount(9 * PAGE + TENSOR)));
    assert_eq!(usage.unshared, ByteCount(18 * PAGE));
    drop((first, second));
    let region = world.region("next", 9, LeaseKind::Weights);
    region.load_stored(&Arc::new(store.find("00c0ffef").unwrap()), &tensors).unwrap();
    assert_eq!(contents(&region, bytes.len()), bytes);
}

#[test]
fn what_lies_in_many_packs_is_stored_again() {
    let world = world(64, 256);
    let (store, _) = store(&world);
    let all = noise(12 * 2 * PAGE, 11);
    let part = index(2 * PAGE);
    for (number, bytes) in all.chunks(part).enumerate() {
        world.weights(2, bytes).store_in(&store, &format!("{number:08x}"), "", &[], &GOING).unwrap();
    }
    let tensor = |number: u64| StoredTensor {
        offset: ByteCount(number * 2 * PAGE),
        bytes: ByteCount(2 * PAGE),
        source: None,
    };
    let tensors: Vec<_> = (0..12).map(tensor).collect();
    let region = world.weights(24, &all);
    let report = region.store_in(&store, NAME, "", &tensors, &GOING).unwrap();
    assert_eq!((report.shared, report.written), (ByteCount(14 * PAGE), ByteCount(10 * PAGE)));
    let woken = world.region("next", 24, LeaseKind::Weights);
    woken.load_stored(&Arc::new(store.find(NAME).unwrap()), &tensors).unwrap();
    drop(region);
    assert!(contents(&woken, all.len()) == all);
}

#[test]
fn a_fill_that_fails_leaves_nothing_behind() {
    let world = world(64, 256);
    let (store, fate) = store(&world);
    let bytes = noise(9 * PAGE, 8);
    let (first, _, tensors) = first_start(&world, 9, &bytes);
    let fill = || first.store_in(&store, NAME, "", &tensors, &GOING);
    fate.is_full.store(true, Ordering::Relaxed);
    assert!(matches!(fill(), Err(WeightsError::Disk(DiskError::Io { .. }))));
    fate.is_full.store(false, Ordering::Relaxed);
    fate.fails_writes.store(true, Ordering::Relaxed);
    assert!(matches!(fill(), Err(WeightsError::Failed { .. })));
    fate.fails_writes.store(false, Ordering::Relaxed);
    let stop = AtomicBool::new(true);
    assert!(matches!(first.store_in(&store, NAME, "", &tensors, &stop), Err(WeightsError::Stopped)));
    assert!(packs(&world).is_empty() && store.find(NAME).is_none());
    fill().unwrap();
    for path in packs(&world) {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn what_has_no_hash_yet_and_what_is_on_the_device_alone_is_not_stored() {
    let world = world(64, 256);
    let (store, _) = store(&world);
    let region = world.region("unsealed", 9, LeaseKind::Weights);
    region.stage(ByteCount::ZERO, &noise(9 * PAGE, 9), None).unwrap();
    assert!(region.store_in(&store, NAME, "", &[], &GOING).is_err());
    region.seal().unwrap();
    region.store_in(&store, NAME, "", &[], &GOING).unwrap();
}

#[test]
fn directories_that_are_not_ours_are_left_as_they_are() {
    type Case = (&'static str, &'static [u8], fn(&DiskError) -> bool);
    let folder = tempfile::tempdir().unwrap();
    let cases: [Case; 3] = [
        ("weights.json", br#"{"format": 2}"#, |error| {
            matches!(error, DiskError::OtherVersion { found: 2, .. })
        }),
        ("weights.json", b"{", |error| matches!(error, DiskError::Damaged { .. })),
        ("diary.txt", b"mine", |error| matches!(error, DiskError::Foreign { .. })),
    ];
    for (number, (name, bytes, is_right)) in cases.into_iter().enumerate() {
        let path = folder.path().join(number.to_string());
        fs::create_dir(&path).unwrap();
        fs::write(path.join(name), bytes).unwrap();
        let error = WeightStore::open(&path, options()).unwrap_err();
        assert!(is_right(&error), "{error}");
        let names: Vec<_> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [name]);
    }
    let path = folder.path().join("new");
    WeightStore::open(&path, options()).unwrap();
    for (at, mode, right) in [(".", 0o720, 0o700), ("packs", 0o777, 0o700), ("models", 0o702, 0o755)] {
        let at = path.join(at);
        let set = |mode| fs::set_permissions(&at, fs::Permissions::from_mode(mode)).unwrap();
        set(mode);
        let error = WeightStore::open(&path, options()).unwrap_err();
        assert!(matches!(error, DiskError::NotPrivate { .. }), "{error}");
        set(right);
        WeightStore::open(&path, options()).unwrap();
    }
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    WeightStore::open(&link, options()).unwrap_err();
    if rustix::process::geteuid().is_root() {
        let foreign = folder.path().join("foreign");
        fs::create_dir(&foreign).unwrap();
        std::os::unix::fs::chown(&foreign, Some(1), None).unwrap();
        let error = WeightStore::open(&foreign, options()).unwrap_err().to_string();
        assert!(error.contains("belongs to user 1, not 0"), "{error}");
    }
    WeightStore::open(&path, options()).expect("several have it open");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
}
