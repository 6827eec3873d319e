//! Histories of a store against a model of it, with disks that fail, and files that are damaged or gone.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use proptest::prelude::*;
use shoal_core::store::weights::TENSOR_BYTES_MIN;
use shoal_device::hash_bytes;

use super::*;
use crate::disk::{Done, Means, Op, Verb, Waker};
use crate::store::Buffer;

const TENSORS: u64 = 3;
const BYTES: u64 = TENSORS * TENSOR_BYTES_MIN;
const CAP: u64 = 8 * TENSOR_BYTES_MIN;
/// What lies there of a fill that was killed.
const LITTER: u64 = 4096;
static GOING: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// What goes wrong with every so-manieth request of a kind; 0 for nothing.
#[derive(Clone, Copy, Debug, Default)]
struct Rates {
    error: u64,
    short: u64,
    flip_read: u64,
    flip_write: u64,
    full: u64,
}

#[derive(Debug, Default)]
struct Fate {
    rates: parking_lot::Mutex<Rates>,
    requests: AtomicU64,
}

impl Fate {
    fn happens(&self, rate: u64) -> bool {
        rate > 0 && (self.requests.fetch_add(1, Ordering::Relaxed) * 7 + 3).is_multiple_of(rate)
    }
}

#[derive(Debug)]
struct Bad {
    inner: Box<dyn Medium>,
    fate: Arc<Fate>,
}

fn flip(buffer: &mut Buffer) {
    if let Some(memory) = buffer.as_mut_slice() {
        let middle = memory.len() / 2;
        memory[middle] ^= 0x10;
    }
}

impl Medium for Bad {
    fn bytes(&mut self) -> io::Result<u64> {
        self.inner.bytes()
    }
    fn grow(&mut self, bytes: u64) -> io::Result<()> {
        let full = self.fate.rates.lock().full;
        if self.fate.happens(full) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.inner.grow(bytes)
    }
    fn shrink(&mut self, bytes: u64) -> io::Result<()> {
        self.inner.shrink(bytes)
    }
    fn submit(&mut self, mut op: Op) -> Result<(), Op> {
        let rate = self.fate.rates.lock().flip_write;
        if op.verb == Verb::Write
            && self.fate.happens(rate)
            && let Some(buffer) = &mut op.buffer
        {
            flip(buffer);
        }
        self.inner.submit(op)
    }
    fn wait(&mut self, timeout: Duration) {
        self.inner.wait(timeout);
    }
    fn reap(&mut self, done: &mut Vec<Done>) {
        let before = done.len();
        self.inner.reap(done);
        let rates = *self.fate.rates.lock();
        for one in &mut done[before..] {
            if self.fate.happens(rates.error) {
                one.result = Err(io::ErrorKind::Other.into());
            } else if self.fate.happens(rates.short) {
                one.result =
                    one.result.as_ref().map(|moved| moved / 2).map_err(|_| io::ErrorKind::Other.into());
            }
            if self.fate.happens(rates.flip_read)
                && let Some(buffer) = &mut one.buffer
            {
                flip(buffer);
            }
        }
    }
    fn in_flight(&self) -> usize {
        self.inner.in_flight()
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

/// A model of three tensors, of which `kinds` says what is in each.
fn content(kinds: [u8; 3]) -> Vec<u8> {
    let of = |kind: u8| {
        let seed = u64::from(kind) + 1;
        (0..TENSOR_BYTES_MIN / 8)
            .flat_map(move |at| (at.wrapping_mul(seed * 0x9e37_79b9) ^ (seed << 56)).to_le_bytes())
    };
    kinds.into_iter().flat_map(of).collect()
}

fn name(kinds: [u8; 3]) -> String {
    format!("0000{:02x}{:02x}{:02x}", kinds[0], kinds[1], kinds[2])
}

fn spec(kinds: [u8; 3], bytes: &[u8]) -> FillSpec {
    // Extents and pieces do not coincide.
    let half = bytes.len() / 2;
    let extents = [&bytes[..half], &bytes[half..]];
    let extents = extents.map(|part| StoredExtent { bytes: part.len() as u64, hash: hash_bytes(part) });
    let tensors: Vec<_> = (0..TENSORS).map(|at| (at * TENSOR_BYTES_MIN, TENSOR_BYTES_MIN)).collect();
    FillSpec {
        name: name(kinds),
        note: format!("{kinds:?}"),
        extents: extents.to_vec(),
        pieces: cut(BYTES, &tensors),
    }
}

fn fill(store: &WeightStore, kinds: [u8; 3]) -> Result<FillReport, WeightsError> {
    let bytes = content(kinds);
    store.fill(&spec(kinds, &bytes), &GOING, |offset, into| {
        let at = usize::try_from(offset).unwrap();
        into.copy_from_slice(&bytes[at..at + into.len()]);
        Ok(())
    })
}

/// All of a model, as a region reads it: each extent verified, and what is damaged dropped.
fn load(stored: &Stored) -> Result<Vec<u8>, WeightsError> {
    let mut all = Vec::new();
    let mut from = 0;
    for extent in stored.extents() {
        let mut part = Vec::new();
        stored.read(
            &[(from, extent.bytes)],
            4,
            256 << 10,
            |_, bytes| Ok(Buffer::zeroed(bytes)),
            |offset, bytes, buffer| {
                assert_eq!(offset, from + part.len() as u64, "in order");
                part.extend_from_slice(&buffer.as_slice()[..bytes]);
                Ok(())
            },
        )?;
        if hash_bytes(&part) != extent.hash {
            return Err(stored.drop_damaged(from, extent.bytes));
        }
        all.extend(part);
        from += extent.bytes;
    }
    Ok(all)
}

#[derive(Clone, Debug)]
enum Step {
    Fill([u8; 3]),
    Get([u8; 3]),
    /// Somebody has it open from now on, until all let go.
    Hold([u8; 3]),
    LetGo,
    Fail(u8, u64),
    Mend,
    Open,
    /// A bit of the so-manieth pack, a byte of the so-manieth manifest.
    FlipPack(usize, u64),
    FlipModel(usize, u64),
    CutPack(usize),
    RemovePack(usize),
    /// What a fill that was killed leaves.
    Litter,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kinds = || proptest::array::uniform3(0..4_u8);
    let step = prop_oneof![
        6 => kinds().prop_map(Step::Fill),
        6 => kinds().prop_map(Step::Get),
        2 => kinds().prop_map(Step::Hold),
        1 => Just(Step::LetGo),
        2 => (0..5_u8, 1..9_u64).prop_map(|(what, rate)| Step::Fail(what, rate)),
        2 => Just(Step::Mend),
        1 => Just(Step::Open),
        1 => (0..4_usize, 0..CAP).prop_map(|(which, at)| Step::FlipPack(which, at)),
        1 => (0..4_usize, 0..600_u64).prop_map(|(which, at)| Step::FlipModel(which, at)),
        1 => (0..4_usize).prop_map(Step::CutPack),
        1 => (0..4_usize).prop_map(Step::RemovePack),
        1 => Just(Step::Litter),
    ];
    proptest::collection::vec(step, 1..24)
}

struct World {
    folder: tempfile::TempDir,
    store: WeightStore,
    fate: Arc<Fate>,
    held: Vec<Stored>,
    /// Whether bits may be wrong that nobody has read yet.
    is_tainted: bool,
    /// Whether somebody else removed a pack.
    is_robbed: bool,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fate = Arc::new(Fate::default());
        let store = Self::open(&folder, &fate);
        Self { folder, store, fate, held: Vec::new(), is_tainted: false, is_robbed: false }
    }

    fn open(folder: &tempfile::TempDir, fate: &Arc<Fate>) -> WeightStore {
        let options = WeightOptions {
            io_deadline: Duration::from_mins(1),
            engine: Engine::Threads,
            depth: 4,
            keep: Duration::ZERO,
            ..WeightOptions::new(ByteCount(CAP))
        };
        let fate = Arc::clone(fate);
        let wrap = move |inner| Box::new(Bad { inner, fate: Arc::clone(&fate) }) as _;
        WeightStore::open_through(folder.path(), options, wrap).unwrap()
    }

    fn files(&self, of: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.folder.path().join(of)).unwrap();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    }

    fn change(&mut self, of: &str, which: usize, change: impl FnOnce(&Path)) {
        let files = self.files(of);
        if let Some(path) = files.get(which % files.len().max(1)) {
            change(path);
            self.is_tainted = true;
        }
    }

    fn check(&self) {
        let files = self.files(PACKS);
        let bytes: u64 = files.iter().map(|path| fs::metadata(path).unwrap().len()).sum();
        assert!(bytes <= CAP + LITTER, "{bytes} are more than the cap");
        // What is open takes room on the disk whether it has a name or not.
        assert!(self.is_robbed || self.held.iter().all(Stored::has_names), "what somebody reads was removed");
    }

    fn run(&mut self, step: &Step) {
        let flip_at = |at: u64| {
            move |path: &Path| {
                let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
                let at = at % file.metadata().unwrap().len().max(1);
                let mut byte = [0];
                if file.read_at(&mut byte, at).unwrap() == 1 {
                    file.write_all_at(&[byte[0] ^ 2], at).unwrap();
                }
            }
        };
        match step {
            Step::Fill(kinds) => {
                let rates = *self.fate.rates.lock();
                let filled = fill(&self.store, *kinds);
                self.is_tainted |= rates.flip_write > 0;
                if let Err(WeightsError::NoRoom { .. }) = filled {
                    assert!(!self.held.is_empty(), "there is room");
                } else if rates.error + rates.short + rates.full == 0 {
                    filled.unwrap();
                    assert!(self.is_tainted || self.store.find(&name(*kinds)).is_some());
                }
            }
            Step::Get(kinds) => {
                let Some(stored) = self.store.find(&name(*kinds)) else { return };
                assert_eq!(stored.note(), format!("{kinds:?}"));
                match load(&stored) {
                    Ok(bytes) => assert!(bytes == content(*kinds), "other bytes were served"),
                    Err(error) => {
                        let rates = *self.fate.rates.lock();
                        let may = self.is_tainted || rates.error + rates.short + rates.flip_read > 0;
                        assert!(may, "{error}");
                    }
                }
            }
            Step::Hold(kinds) => self.held.extend(self.store.find(&name(*kinds))),
            Step::LetGo => self.held.clear(),
            Step::Fail(what, rate) => {
                let mut rates = self.fate.rates.lock();
                match what {
                    0 => rates.error = *rate,
                    1 => rates.short = *rate,
                    2 => rates.flip_read = *rate,
                    3 => rates.flip_write = *rate,
                    _ => rates.full = *rate,
                }
            }
            Step::Mend => *self.fate.rates.lock() = Rates::default(),
            Step::Open => self.store = Self::open(&self.folder, &self.fate),
            Step::FlipPack(which, at) => self.change(PACKS, *which, flip_at(*at)),
            Step::FlipModel(which, at) => self.change(MODELS, *which, flip_at(*at)),
            Step::CutPack(which) => self.change(PACKS, *which, |path| {
                fs::OpenOptions::new().write(true).open(path).unwrap().set_len(4096).unwrap();
            }),
            Step::RemovePack(which) => {
                self.change(PACKS, *which, |path| fs::remove_file(path).unwrap());
                self.is_robbed = true;
            }
            Step::Litter => {
                fs::write(
                    self.folder.path().join(PACKS).join("0badbadb.new"),
                    vec![1; usize::try_from(LITTER).unwrap()],
                )
                .unwrap();
                fs::write(self.folder.path().join(MODELS).join("0badbadb.new"), b"half").unwrap();
            }
        }
    }

    /// With disks that work again, every model can be stored and read; what nobody needs goes.
    fn ends_well(&mut self) {
        *self.fate.rates.lock() = Rates::default();
        self.held.clear();
        for kinds in [[0, 1, 2], [3, 3, 3]] {
            // What is damaged is found out as it is read, and what shares it then as well.
            let is_right = (0..8).any(|_| {
                fill(&self.store, kinds).unwrap();
                self.store
                    .find(&name(kinds))
                    .is_some_and(|stored| load(&stored).is_ok_and(|bytes| bytes == content(kinds)))
            });
            assert!(is_right, "{kinds:?} cannot be stored any more");
        }
        let catalogue = self.store.read_all().unwrap();
        let used: BTreeSet<_> = catalogue.models.iter().flat_map(|(model, _)| model.packs.clone()).collect();
        assert_eq!(used, catalogue.packs.keys().cloned().collect(), "packs of no model stay");
        assert_eq!(self.files(PACKS).len(), catalogue.packs.len(), "something unfinished stays");
        // Each piece lies once.
        let mut places: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for piece in catalogue.models.iter().flat_map(|(_, manifest)| &manifest.pieces) {
            places.entry(piece.hash.clone()).or_default().insert((piece.pack.clone(), piece.at));
        }
        assert!(places.values().all(|at| at.len() == 1), "{places:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_what_is_served_is_what_was_stored(steps in steps()) {
        let mut world = World::new();
        for step in &steps {
            world.run(step);
            world.check();
        }
        world.ends_well();
    }
}

fn cases() -> u32 {
    std::env::var("SHOAL_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(12)
}

#[test]
fn what_somebody_reads_takes_room_until_he_lets_go() {
    let world = World::new();
    let (read, other) = ([0, 1, 2], [3, 4, 5]);
    fill(&world.store, read).unwrap();
    let reader = world.store.find(&name(read)).unwrap();
    std::thread::sleep(Duration::from_millis(5));
    fill(&world.store, other).unwrap();
    // The one that was used least lately is being read.
    assert_eq!(fill(&world.store, [6, 7, 8]).unwrap().evicted, [name(other)]);
    let second = world.store.find(&name([6, 7, 8])).unwrap();
    let refused = fill(&world.store, other).unwrap_err();
    assert!(matches!(refused, WeightsError::NoRoom { .. }), "{refused}");
    world.check();
    // Damaged or not.
    reader.drop_damaged(0, BYTES);
    fill(&world.store, other).unwrap_err();
    assert_eq!(world.store.usage().unwrap().bytes, ByteCount(2 * BYTES));
    assert!(load(&reader).unwrap() == content(read), "it is read to the end");
    drop(reader);
    assert!(fill(&world.store, other).unwrap().evicted.is_empty());
    assert!(load(&second).unwrap() == content([6, 7, 8]));
    world.check();
}

#[test]
fn what_was_used_lately_stays() {
    let mut world = World::new();
    world.store.options.keep = Duration::from_hours(1);
    fill(&world.store, [0, 1, 2]).unwrap();
    fill(&world.store, [3, 4, 5]).unwrap();
    for _ in 0..3 {
        let refused = fill(&world.store, [6, 7, 8]).unwrap_err();
        assert!(matches!(refused, WeightsError::NoRoom { .. }), "{refused}");
    }
    let ago = SystemTime::now() - Duration::from_secs(3601);
    File::open(world.store.model(&name([3, 4, 5]))).unwrap().set_modified(ago).unwrap();
    assert_eq!(fill(&world.store, [6, 7, 8]).unwrap().evicted, [name([3, 4, 5])]);
}

#[test]
fn an_hour_has_its_allowance_whoever_fills() {
    let mut world = World::new();
    world.store.options.write_bytes_per_hour = Some(ByteCount(4 * TENSOR_BYTES_MIN));
    let begun = Instant::now();
    fill(&world.store, [0, 1, 2]).unwrap();
    let mut other = World::open(&world.folder, &world.fate);
    other.options.write_bytes_per_hour = world.store.options.write_bytes_per_hour;
    let refused = fill(&other, [3, 4, 5]).unwrap_err();
    let WeightsError::TooSoon { needed, wait } = refused else { panic!("{refused}") };
    assert_eq!(needed, ByteCount(BYTES));
    let made_good = begun.elapsed() + Duration::from_secs(2);
    let least = Duration::from_mins(30).saturating_sub(made_good);
    assert!((least..=Duration::from_mins(30)).contains(&wait), "{wait:?}: two of four are to be made good");
    assert!(world.store.find(&name([0, 1, 2])).is_some(), "nothing made room in vain");
    // What is there is not written, and one more is within the hour's.
    assert_eq!(fill(&other, [2, 1, 0]).unwrap().written, ByteCount::ZERO);
    fill(&other, [0, 1, 3]).unwrap();
    fill(&world.store, [0, 1, 4]).unwrap_err();
    let ago = format!(
        r#"{{"bytes": {}, "at_s": {}}}"#,
        4 * TENSOR_BYTES_MIN,
        nanoseconds(SystemTime::now()) / 1_000_000_000 - 3600
    );
    fs::write(world.folder.path().join(WEAR), ago).unwrap();
    fill(&world.store, [0, 1, 4]).unwrap();
}

#[test]
fn what_is_laid_out_another_way_is_stored_in_its_place() {
    let mut world = World::new();
    world.store.options.keep = Duration::from_hours(1);
    let (old, new) = (content([0, 1, 2]), content([3, 4, 5]));
    let store = |bytes: &[u8], note: &str| {
        let spec = FillSpec { name: name([0, 1, 2]), note: note.to_owned(), ..spec([0, 1, 2], bytes) };
        let read = |offset: u64, into: &mut [u8]| {
            let at = usize::try_from(offset).unwrap();
            into.copy_from_slice(&bytes[at..at + into.len()]);
            Ok(())
        };
        world.store.fill(&spec, &GOING, read).unwrap().was_there
    };
    assert!(!store(&old, "old") && store(&old, "old"));
    fill(&world.store, [6, 7, 8]).unwrap();
    assert!(!store(&new, "new") && store(&new, "new"));
    let stored = world.store.find(&name([0, 1, 2])).unwrap();
    assert_eq!(stored.note(), "new");
    assert!(load(&stored).unwrap() == new);
    world.check();
}

#[test]
fn what_cannot_be_read_now_is_not_taken_for_damaged() {
    let world = World::new();
    fill(&world.store, [0, 1, 2]).unwrap();
    let (models, packs) = (world.files(MODELS), world.files(PACKS));
    let mut short = world.store.clone();
    short.read_file = |_| Err(rustix::io::Errno::MFILE.into());
    let error = fill(&short, [3, 4, 5]).unwrap_err();
    assert!(matches!(error, WeightsError::Disk(DiskError::Io { .. })), "{error}");
    assert!(short.find(&name([0, 1, 2])).is_none());
    short.usage().unwrap_err();
    assert_eq!((world.files(MODELS), world.files(PACKS)), (models, packs));
    assert!(load(&world.store.find(&name([0, 1, 2])).unwrap()).unwrap() == content([0, 1, 2]));
}

#[test]
fn one_fills_at_a_time() {
    let world = World::new();
    let bytes = content([0, 1, 2]);
    let mut refused = 0;
    world
        .store
        .fill(&spec([0, 1, 2], &bytes), &GOING, |offset, into| {
            if offset == 0 {
                let error = fill(&world.store, [3, 3, 3]).unwrap_err();
                assert!(matches!(error, WeightsError::Disk(DiskError::InUse { .. })), "{error}");
                refused += 1;
            }
            let at = usize::try_from(offset).unwrap();
            into.copy_from_slice(&bytes[at..at + into.len()]);
            Ok(())
        })
        .unwrap();
    assert_eq!(refused, 2, "asked for twice: to hash, and to write");
    fill(&world.store, [3, 3, 3]).unwrap();
}

#[test]
fn memory_that_erred_is_not_stored() {
    let world = World::new();
    let bytes = content([0, 1, 2]);
    for (wrong_pass, at) in [(1, 2 << 20), (2, 1 << 20)] {
        let mut passes = 0;
        let outcome = world.store.fill(&spec([0, 1, 2], &bytes), &GOING, |offset, into| {
            passes += u32::from(offset == 0);
            let from = usize::try_from(offset).unwrap();
            into.copy_from_slice(&bytes[from..from + into.len()]);
            if passes == wrong_pass && offset == at {
                into[7] ^= 1;
            }
            Ok(())
        });
        assert!(matches!(outcome, Err(WeightsError::Changed { .. })), "{outcome:?}");
        assert!(world.store.find(&name([0, 1, 2])).is_none() && world.files(PACKS).is_empty());
    }
}

/// What is called alike is shared by models that may be by people who wish each other ill.
#[test]
fn a_piece_is_called_by_its_sha_256() {
    let world = World::new();
    let zeros = vec![0; usize::try_from(BYTES).unwrap()];
    let spec = spec([0, 1, 2], &zeros);
    let read = |_: u64, into: &mut [u8]| {
        into.fill(0);
        Ok(())
    };
    world.store.fill(&spec, &GOING, read).unwrap();
    let catalogue = world.store.read_all().unwrap();
    let names: Vec<_> = catalogue.models[0].1.pieces.iter().map(|piece| piece.hash.as_str()).collect();
    assert_eq!(names, ["30e14955ebf1352266dc2ff8067e68104607e750abb9d3b36582b8af909fcb58"; 3]);
}

#[test]
fn the_model_used_least_lately_makes_room() {
    let world = World::new();
    fill(&world.store, [0, 0, 1]).unwrap();
    fill(&world.store, [0, 0, 2]).unwrap();
    assert_eq!(
        world.store.usage().unwrap().bytes,
        ByteCount(3 * TENSOR_BYTES_MIN),
        "alike tensors of one model are one too"
    );
    fill(&world.store, [3, 2, 1]).unwrap();
    assert_eq!(world.store.usage().unwrap().bytes, ByteCount(4 * TENSOR_BYTES_MIN));
    fill(&world.store, [4, 5, 6]).unwrap();
    assert_eq!(
        world.store.usage().unwrap(),
        WeightUsage { models: 4, bytes: ByteCount(7 * TENSOR_BYTES_MIN), unshared: ByteCount(4 * BYTES) }
    );
    std::thread::sleep(Duration::from_millis(5));
    drop(world.store.find(&name([0, 0, 1])).unwrap());
    let filled = fill(&world.store, [7, 8, 9]).unwrap();
    let stays = |kinds| world.store.find(&name(kinds)).is_some();
    assert!(stays([0, 0, 1]) && stays([7, 8, 9]), "{filled:?}");
    assert!(!filled.evicted.is_empty() && !filled.evicted.contains(&name([0, 0, 1])), "{filled:?}");
    world.check();
}
