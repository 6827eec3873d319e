//! Memory of the workers' host copies: owned here, lent to workers by descriptor.
//!
//! Apart from the broker's core because it holds descriptors, which are memory of this machine. The server touches none of
//! it. What it is for: memory that was touched stays when its worker goes, so that the next worker of the same model maps
//! and locks it in half the time; and a worker cannot take more than its share of the host budget (I1).
//!
//! A model is the tenant of its slabs: what one model had is given back to the machine before another model gets anything,
//! and fresh memory reads as zeroes (I12).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_device::HostBacking;
use shoal_device::host::HostFile;

/// Slabs that one model may have. Each takes a descriptor here and one in its worker.
const SLABS_MAX: usize = 256;
/// How long memory is kept for the next worker of a model.
const KEPT_MAX: Duration = Duration::from_mins(5);

/// Memory that a worker gets.
#[derive(Debug)]
pub(super) struct Lent {
    /// Its number, by which it is given back.
    pub(super) slab: u64,
    pub(super) file: HostFile,
    /// Nobody has written there.
    pub(super) is_zeroed: bool,
}

#[derive(Debug)]
struct Kept {
    file: HostFile,
    since: Instant,
}

#[derive(Debug, Default)]
struct OfModel {
    lent: BTreeMap<u64, HostFile>,
    kept: Vec<Kept>,
}

impl OfModel {
    fn lent_bytes(&self) -> ByteCount {
        self.lent.values().map(HostFile::bytes).sum()
    }

    fn kept_bytes(&self) -> ByteCount {
        self.kept.iter().map(|kept| kept.file.bytes()).sum()
    }
}

/// See the module's text. Models are named by their places in the configuration.
#[derive(Debug)]
pub(super) struct HostPool {
    /// What slabs are made of; none where workers make their own.
    backing: Option<HostBacking>,
    models: Vec<OfModel>,
    slabs_lent: u64,
}

impl HostPool {
    pub(super) fn new(backing: Option<HostBacking>, models: usize) -> Self {
        Self { backing, models: (0..models).map(|_| OfModel::default()).collect(), slabs_lent: 0 }
    }

    /// A slab of exactly so many bytes within the model's host budget: one that its last worker left, else a new one. What
    /// must go for it comes back in `gone`, to be dropped where that may take a moment.
    ///
    /// # Errors
    /// Why not, in a sentence with numbers.
    pub(super) fn lend(
        &mut self,
        place: usize,
        bytes: ByteCount,
        budget: ByteCount,
        gone: &mut Vec<HostFile>,
    ) -> Result<Lent, String> {
        let Some(backing) = self.backing else {
            return Err("workers make their own memory here".to_owned());
        };
        let Some(model) = self.models.get_mut(place) else { return Err("there is no such model".to_owned()) };
        let lent = model.lent_bytes();
        if lent.checked_add(bytes).is_none_or(|sum| sum > budget) {
            return Err(format!("{bytes} beside {lent} would exceed the host budget of {budget}"));
        }
        if model.lent.len() >= SLABS_MAX {
            return Err(format!("it has {SLABS_MAX} slabs already"));
        }
        let left_there = model.kept.iter().position(|kept| kept.file.bytes() == bytes);
        let (file, is_zeroed) = if let Some(index) = left_there {
            (model.kept.swap_remove(index).file, false)
        } else {
            // What is kept makes way for what is wanted.
            while model.lent_bytes() + model.kept_bytes() + bytes > budget {
                let Some(kept) = model.kept.pop() else { break };
                gone.push(kept.file);
            }
            let made = HostFile::create(bytes, backing).map_err(|error| error.to_string())?;
            if made.bytes() != bytes {
                return Err(format!("slabs are whole huge pages, not {bytes}"));
            }
            (made, true)
        };
        let theirs = file.try_clone().map_err(|error| error.to_string())?;
        self.slabs_lent += 1;
        model.lent.insert(self.slabs_lent, file);
        Ok(Lent { slab: self.slabs_lent, file: theirs, is_zeroed })
    }

    /// A worker of a server before hands over what that one had lent it.
    ///
    /// # Errors
    /// Why not; it stays the worker's own.
    pub(super) fn adopt(&mut self, place: usize, slab: u64, file: HostFile) -> Result<(), String> {
        let Some(model) = self.models.get_mut(place) else { return Err("there is no such model".to_owned()) };
        if model.lent.len() >= SLABS_MAX {
            return Err(format!("it has {SLABS_MAX} slabs already"));
        }
        if model.lent.contains_key(&slab) {
            return Err(format!("it has slab {slab} already"));
        }
        model.lent.insert(slab, file);
        // Numbers that come after are nobody's yet.
        self.slabs_lent = self.slabs_lent.max(slab);
        Ok(())
    }

    /// A worker has unmapped a slab. Dropping it gives the memory back to the machine.
    pub(super) fn take_back(&mut self, place: usize, slab: u64) -> Option<HostFile> {
        self.models.get_mut(place)?.lent.remove(&slab)
    }

    /// A worker's process is gone: what it had is kept for the next one of its model.
    pub(super) fn process_gone(&mut self, place: usize, now: Instant) {
        if let Some(model) = self.models.get_mut(place) {
            let left = std::mem::take(&mut model.lent).into_values();
            model.kept.extend(left.map(|file| Kept { file, since: now }));
        }
    }

    /// There are so many models from now on; one that was there keeps its place.
    pub(super) fn grow(&mut self, models: usize) {
        self.models.resize_with(models.max(self.models.len()), OfModel::default);
    }

    /// Another model stands in this place: what the one before left goes (I12).
    pub(super) fn clear(&mut self, place: usize) -> Vec<HostFile> {
        let Some(model) = self.models.get_mut(place) else { return Vec::new() };
        let OfModel { lent, kept } = std::mem::take(model);
        lent.into_values().chain(kept.into_iter().map(|kept| kept.file)).collect()
    }

    /// A model's worker has staged its weights: what it did not want of what was left there goes.
    pub(super) fn is_ready(&mut self, place: usize) -> Vec<HostFile> {
        let kept =
            self.models.get_mut(place).map(|model| std::mem::take(&mut model.kept)).unwrap_or_default();
        kept.into_iter().map(|kept| kept.file).collect()
    }

    /// What models without a worker left is at most `room` in all; the oldest goes first.
    pub(super) fn trim(&mut self, live: &[bool], room: ByteCount) -> Vec<HostFile> {
        let mut gone = Vec::new();
        loop {
            let idle =
                self.models.iter_mut().zip(live).filter(|(_, is_live)| !**is_live).map(|(model, _)| model);
            let idle: Vec<&mut OfModel> = idle.filter(|model| !model.kept.is_empty()).collect();
            let kept: ByteCount = idle.iter().map(|model| model.kept_bytes()).sum();
            let oldest = idle.into_iter().min_by_key(|model| model.kept.iter().map(|kept| kept.since).min());
            let Some(oldest) = oldest.filter(|_| kept > room) else { return gone };
            gone.push(oldest.kept.remove(0).file);
        }
    }

    /// What has waited too long for another worker.
    pub(super) fn overdue(&mut self, now: Instant) -> Vec<HostFile> {
        let mut gone = Vec::new();
        for model in &mut self.models {
            let (old, young): (Vec<_>, Vec<_>) = std::mem::take(&mut model.kept)
                .into_iter()
                .partition(|kept| now.saturating_duration_since(kept.since) >= KEPT_MAX);
            model.kept = young;
            gone.extend(old.into_iter().map(|kept| kept.file));
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::fd::OwnedFd;

    use super::*;

    const SLAB: ByteCount = ByteCount::mib(4);

    const BUDGET: ByteCount = ByteCount::mib(8);

    fn pool() -> HostPool {
        HostPool::new(Some(HostBacking::SharedHugePages), 2)
    }

    fn write(file: &HostFile, text: &[u8]) {
        let mut file = std::fs::File::from(OwnedFd::from(file.try_clone().expect("a descriptor")));
        file.rewind().expect("memory");
        file.write_all(text).expect("memory");
    }

    fn read(file: &HostFile) -> [u8; 5] {
        let mut file = std::fs::File::from(OwnedFd::from(file.try_clone().expect("a descriptor")));
        let mut text = [0; 5];
        file.rewind().expect("memory");
        file.read_exact(&mut text).expect("memory");
        text
    }

    #[test]
    fn a_budget_holds_and_what_is_given_back_counts_no_more() {
        let (mut pool, mut gone) = (pool(), Vec::new());
        let first = pool.lend(1, SLAB, BUDGET, &mut gone).expect("half of the budget");
        pool.lend(1, SLAB, BUDGET, &mut gone).expect("the other half");
        let refused = pool.lend(1, SLAB, BUDGET, &mut gone).expect_err("beyond it");
        assert!(refused.contains("8 MiB"), "{refused}");
        assert!(pool.take_back(0, first.slab).is_none(), "it is another model's");
        assert!(pool.take_back(1, first.slab).is_some() && pool.take_back(1, first.slab).is_none());
        let again = pool.lend(1, SLAB, BUDGET, &mut gone).expect("room again");
        assert!(again.is_zeroed && again.slab != first.slab && gone.is_empty());
        assert!(
            pool.lend(2, SLAB, BUDGET, &mut gone).is_err()
                && pool.lend(1, ByteCount(u64::MAX), BUDGET, &mut gone).is_err()
        );
        assert!(pool.lend(0, ByteCount(4096), BUDGET, &mut gone).is_err(), "no whole huge page");
        assert!(HostPool::new(None, 1).lend(0, SLAB, BUDGET, &mut gone).is_err());
    }

    #[test]
    fn what_a_worker_leaves_is_its_models_and_nobody_elses() {
        let (mut pool, mut gone, start) = (pool(), Vec::new(), Instant::now());
        let lent = pool.lend(0, SLAB, BUDGET, &mut gone).expect("room");
        write(&lent.file, b"words");
        pool.process_gone(0, start);
        drop(lent);
        let other = pool.lend(1, SLAB, BUDGET, &mut gone).expect("room");
        assert!(other.is_zeroed && read(&other.file) == [0; 5], "another model's bytes (I12)");
        let next = pool.lend(0, SLAB, BUDGET, &mut gone).expect("it was left");
        assert_eq!((next.is_zeroed, &read(&next.file)), (false, b"words"));
        assert!(gone.is_empty());
    }

    #[test]
    fn what_a_server_before_had_lent_is_taken_on_by_its_number() {
        let (mut before, mut pool, mut gone) = (pool(), pool(), Vec::new());
        before.lend(0, SLAB, BUDGET, &mut gone).expect("room");
        let lent = before.lend(0, SLAB, BUDGET, &mut gone).expect("room");
        write(&lent.file, b"words");
        drop(before);
        assert_eq!(pool.adopt(0, lent.slab, lent.file), Ok(()));
        let again = HostFile::create(SLAB, HostBacking::SharedHugePages).expect("memory");
        assert!(pool.adopt(0, lent.slab, again).is_err() && pool.lend(0, BUDGET, BUDGET, &mut gone).is_err());
        let next = pool.lend(0, SLAB, BUDGET, &mut gone).expect("half of the budget");
        assert!(next.slab > lent.slab && next.is_zeroed);
        pool.process_gone(0, Instant::now());
        let kept = [pool.lend(0, SLAB, BUDGET, &mut gone), pool.lend(0, SLAB, BUDGET, &mut gone)];
        let texts: Vec<[u8; 5]> = kept.iter().map(|lent| read(&lent.as_ref().expect("kept").file)).collect();
        assert!(texts.contains(b"words"), "it outlives its worker as any slab does");
        let file = HostFile::create(SLAB, HostBacking::SharedHugePages).expect("memory");
        assert!(pool.adopt(9, 1, file).is_err());
    }

    #[test]
    fn what_was_left_makes_way_for_the_shares_of_others_and_goes_once_a_worker_is_ready() {
        let (mut pool, mut gone, start) = (pool(), Vec::new(), Instant::now());
        for place in [0, 1] {
            for _ in 0..2 {
                pool.lend(place, SLAB, BUDGET, &mut gone).expect("room");
            }
        }
        pool.process_gone(1, start);
        pool.process_gone(0, start + Duration::from_secs(1));
        assert!(pool.trim(&[false, false], ByteCount::mib(16)).is_empty());
        assert_eq!(pool.trim(&[false, false], ByteCount::mib(9)).len(), 2);
        assert!(pool.lend(1, SLAB, BUDGET, &mut gone).expect("room").is_zeroed, "the older ones went");
        assert!(
            pool.trim(&[true, true], ByteCount::ZERO).is_empty(),
            "of live models it is within their shares"
        );
        assert!(!pool.lend(0, SLAB, BUDGET, &mut gone).expect("room").is_zeroed);
        assert_eq!((pool.is_ready(0).len(), pool.is_ready(0).len(), pool.is_ready(9).len()), (1, 0, 0));
    }

    #[test]
    fn what_is_kept_makes_way_and_does_not_stay_for_ever() {
        let (mut pool, mut gone, start) = (pool(), Vec::new(), Instant::now());
        for _ in 0..2 {
            pool.lend(1, SLAB, BUDGET, &mut gone).expect("room");
        }
        pool.process_gone(1, start);
        let all = pool.lend(1, ByteCount::mib(8), BUDGET, &mut gone).expect("what is kept goes");
        assert!(all.is_zeroed && gone.len() == 2);
        pool.process_gone(1, start);
        assert!(pool.overdue(start + KEPT_MAX / 2).is_empty());
        assert_eq!(pool.overdue(start + KEPT_MAX).len(), 1);
        assert!(pool.lend(1, ByteCount::mib(8), BUDGET, &mut gone).expect("room").is_zeroed);
    }
}
