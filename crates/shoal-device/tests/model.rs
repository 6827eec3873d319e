//! Random raw verbs against a plain model, and against what the kernel says is mapped.

#![expect(clippy::unwrap_used, reason = "a test")]
#![expect(unsafe_code, reason = "marks and reads mapped device memory")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::{fs, ptr};

use proptest::prelude::*;
use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_device::device::RawFrame;
use shoal_device::sim::{LiveObjects, holders};
use shoal_device::{Device, DeviceError, SimDevice, SimOptions, VirtAddr};

const CAPACITY_PAGES: u64 = 12;
/// Tests of one process share its map; the ordinal in the memory file's name keeps this one apart.
const ORDINAL: u32 = 4711;

#[derive(Clone, Debug)]
enum Op {
    Reserve { pages: u64 },
    Release { reservation: usize },
    Create { pages: u64 },
    Destroy { frame: usize },
    Map { reservation: usize, page: u64, frame: usize },
    Unmap { mapping: usize },
    UnmapAny { reservation: usize, page: u64, pages: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    let index = 0..64_usize;
    prop_oneof![
        2 => (1..8_u64).prop_map(|pages| Op::Reserve { pages }),
        1 => index.clone().prop_map(|reservation| Op::Release { reservation }),
        4 => (1..5_u64).prop_map(|pages| Op::Create { pages }),
        2 => index.clone().prop_map(|frame| Op::Destroy { frame }),
        6 => (index.clone(), 0..8_u64, index.clone())
            .prop_map(|(reservation, page, frame)| Op::Map { reservation, page, frame }),
        3 => index.clone().prop_map(|mapping| Op::Unmap { mapping }),
        2 => (index, 0..8_u64, 1..4_u64)
            .prop_map(|(reservation, page, pages)| Op::UnmapAny { reservation, page, pages }),
    ]
}

#[derive(Debug)]
struct ModelFrame {
    raw: RawFrame,
    pages: u64,
    /// What its first word must say.
    mark: u64,
    mappings: u32,
}

/// What the device should be like, in pages and lists.
struct Model {
    device: Arc<SimDevice>,
    dir: tempfile::TempDir,
    reservations: Vec<(VirtAddr, u64)>,
    frames: Vec<ModelFrame>,
    /// Address to (pages, frame).
    mappings: BTreeMap<u64, (u64, RawFrame)>,
    marks: u64,
}

fn bytes(pages: u64) -> ByteCount {
    ByteCount(pages * PAGE_BYTES.0)
}

fn pick<T>(list: &[T], index: usize) -> Option<usize> {
    (!list.is_empty()).then(|| index % list.len())
}

impl Model {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut options = SimOptions::new(bytes(CAPACITY_PAGES), dir.path());
        options.ordinal = ORDINAL;
        let device = SimDevice::open(options).unwrap();
        Self { device, dir, reservations: vec![], frames: vec![], mappings: BTreeMap::new(), marks: 0 }
    }

    fn meeting(&self, at: u64, pages: u64) -> Vec<(u64, u64)> {
        let end = at + bytes(pages).0;
        let all = self.mappings.iter().map(|(start, (pages, _))| (*start, *pages));
        all.filter(|(start, pages)| *start < end && start + bytes(*pages).0 > at).collect()
    }

    fn used_pages(&self) -> u64 {
        self.frames.iter().map(|frame| frame.pages).sum()
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Reserve { pages } => {
                let at = self.device.reserve(bytes(pages)).unwrap();
                for (other, other_pages) in &self.reservations {
                    let apart = at.0 >= other.0 + bytes(*other_pages).0 || other.0 >= at.0 + bytes(pages).0;
                    assert!(apart, "an address was given out twice");
                }
                self.reservations.push((at, pages));
            }
            Op::Release { reservation } => {
                let Some(index) = pick(&self.reservations, reservation) else { return };
                let (at, pages) = self.reservations[index];
                let answer = self.device.release(at, bytes(pages));
                if self.meeting(at.0, pages).is_empty() {
                    answer.unwrap();
                    self.reservations.swap_remove(index);
                } else {
                    assert!(matches!(answer, Err(DeviceError::InUse { .. })), "{answer:?}");
                }
            }
            Op::Create { pages } => {
                let free = CAPACITY_PAGES - self.used_pages();
                match self.device.create_frame(bytes(pages)) {
                    Ok(raw) => {
                        assert!(pages <= free, "more than there is");
                        self.frames.push(ModelFrame { raw, pages, mark: 0, mappings: 0 });
                    }
                    Err(DeviceError::OutOfMemory { free: told, .. }) => {
                        assert!(pages > free);
                        assert_eq!(told, bytes(free));
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            Op::Destroy { frame } => {
                let Some(index) = pick(&self.frames, frame) else { return };
                let answer = self.device.destroy_frame(self.frames[index].raw);
                if self.frames[index].mappings == 0 {
                    answer.unwrap();
                    self.frames.swap_remove(index);
                } else {
                    assert!(matches!(answer, Err(DeviceError::InUse { .. })), "{answer:?}");
                }
            }
            Op::Map { reservation, page, frame } => self.map(reservation, page, frame),
            Op::Unmap { mapping } => {
                let keys: Vec<_> = self.mappings.keys().copied().collect();
                let Some(index) = pick(&keys, mapping) else { return };
                let (pages, _) = self.mappings[&keys[index]];
                self.unmap(keys[index], pages);
            }
            Op::UnmapAny { reservation, page, pages } => {
                let Some(index) = pick(&self.reservations, reservation) else { return };
                self.unmap(self.reservations[index].0.0 + bytes(page).0, pages);
            }
        }
    }

    fn map(&mut self, reservation: usize, page: u64, frame: usize) {
        let (Some(r), Some(f)) = (pick(&self.reservations, reservation), pick(&self.frames, frame)) else {
            return;
        };
        let (start, reserved) = self.reservations[r];
        let at = start.offset(bytes(page));
        let pages = self.frames[f].pages;
        let is_inside =
            self.reservations.iter().any(|(s, n)| s.0 <= at.0 && at.0 + bytes(pages).0 <= s.0 + bytes(*n).0);
        assert!(is_inside || page + pages > reserved);
        match self.device.map(at, self.frames[f].raw) {
            Ok(()) => {
                assert!(is_inside && self.meeting(at.0, pages).is_empty());
                self.mappings.insert(at.0, (pages, self.frames[f].raw));
                self.frames[f].mappings += 1;
                self.marks += 1;
                let frame = &mut self.frames[f];
                // Zero at first, and afterwards whatever was written through any of its addresses.
                for page in 0..pages {
                    assert_eq!(swap_word(at.0 + bytes(page).0, self.marks), frame.mark, "page {page}");
                }
                frame.mark = self.marks;
            }
            Err(DeviceError::NotReserved { .. }) => assert!(!is_inside),
            Err(DeviceError::AlreadyMapped { .. }) => {
                assert!(is_inside && !self.meeting(at.0, pages).is_empty());
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn unmap(&mut self, at: u64, pages: u64) {
        let answer = self.device.unmap(VirtAddr(at), bytes(pages));
        match self.meeting(at, pages).as_slice() {
            [] => assert!(matches!(answer, Err(DeviceError::NotMapped { .. })), "{answer:?}"),
            [whole] if *whole == (at, pages) => {
                answer.unwrap();
                let (_, raw) = self.mappings.remove(&at).unwrap();
                self.frames.iter_mut().find(|frame| frame.raw == raw).unwrap().mappings -= 1;
            }
            _ => assert!(matches!(answer, Err(DeviceError::PartialMapping { .. })), "{answer:?}"),
        }
    }

    fn check(&self) {
        let used = bytes(self.used_pages());
        let memory = self.device.memory().unwrap();
        assert_eq!(memory.used_by_this_process, used);
        assert_eq!(memory.free, bytes(CAPACITY_PAGES) - used);
        let shares: Vec<_> = holders(self.dir.path(), ORDINAL).unwrap().iter().map(|h| h.bytes).collect();
        assert_eq!(shares, [used], "the ledger's word");
        let live = self.device.live_objects();
        let expected = (self.reservations.len(), self.frames.len(), self.mappings.len());
        assert_eq!((live.reservations, live.frames, live.mappings), expected);
        let mapped: u64 = self.mappings.values().map(|(pages, _)| bytes(*pages).0).sum();
        assert_eq!(mapped_by_the_kernel(), mapped, "the kernel's word");
        for (at, (pages, raw)) in &self.mappings {
            let frame = self.frames.iter().find(|frame| frame.raw == *raw).unwrap();
            assert_eq!(frame.pages, *pages, "I4");
            assert_eq!(swap_word(*at, frame.mark), frame.mark);
        }
    }

    fn end(mut self) {
        for (at, (pages, _)) in std::mem::take(&mut self.mappings) {
            self.device.unmap(VirtAddr(at), bytes(pages)).unwrap();
        }
        for frame in &self.frames {
            self.device.destroy_frame(frame.raw).unwrap();
        }
        for (at, pages) in &self.reservations {
            self.device.release(*at, bytes(*pages)).unwrap();
        }
        assert_eq!(self.device.live_objects(), LiveObjects::default());
        assert_eq!(self.device.memory().unwrap().free, bytes(CAPACITY_PAGES));
    }
}

/// Puts `new` at a mapped address and says what was there.
fn swap_word(at: u64, new: u64) -> u64 {
    let word: *mut u64 = ptr::with_exposed_provenance_mut(usize::try_from(at).unwrap());
    // SAFETY: the model says that this page is mapped; a fault here is a failed test.
    unsafe { word.replace(new) }
}

/// Bytes of this test's memory file that the kernel shows mapped.
fn mapped_by_the_kernel() -> u64 {
    let name = format!("/memfd:shoal-sim-{ORDINAL} ");
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut size, mut is_ours) = (0, false);
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Size:") {
            let kib: u64 = kib.trim().trim_end_matches(" kB").parse().unwrap();
            size += if is_ours { kib << 10 } else { 0 };
        } else if line.starts_with(|c: char| c.is_ascii_digit() || ('a'..='f').contains(&c)) {
            is_ours = line.contains(&name);
        }
    }
    size
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_verbs_agrees_with_the_model(ops in prop::collection::vec(op(), 1..60)) {
        let mut model = Model::new();
        for op in &ops {
            model.apply(op);
            model.check();
        }
        model.end();
    }
}
